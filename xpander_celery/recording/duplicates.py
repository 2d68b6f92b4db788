"""Spans of several instrumentations that saw the same call to a model, found where they are not nested. Pure.

Two layers often wrap one call in parallel branches: a framework's callback and a client library, say. The same call has
the same response id, or the same counts at the same time. Two parallel calls with equal counts stay two, since no layer
sees one call twice: a group holds each scope once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby, islice
from typing import Any

from xpander_celery.recording.attributes import Kind, nearness
from xpander_celery.recording.facts import SpanFacts
from xpander_celery.recording.tree import Tree

_OVERLAP = 0.8  # of the shorter span
_MOST_CANDIDATES = 64  # looked at per span: bounds the work where thousands of equal calls run in parallel


class _Group:
    """The spans of one call."""

    __slots__ = ("members", "model", "response_id", "scopes")

    def __init__(self, position: int, span: SpanFacts) -> None:
        self.members = [position]
        self.scopes = {span.scope}
        self.response_id = span.response_id
        self.model = span.model


class _Groups:
    """The calls of a tree. Only groups of several spans are remembered: most calls are seen once."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._by_member: dict[int, _Group] = {}

    def of(self, position: int) -> _Group:
        return self._by_member.get(position) or _Group(position, self._tree.spans[position])

    def join(self, group: _Group, other: _Group) -> None:
        if group is other:
            return
        group.members += other.members
        group.scopes |= other.scopes
        group.response_id = group.response_id or other.response_id
        group.model = group.model or other.model
        for member in group.members:
            self._by_member[member] = group

    def __iter__(self) -> Iterator[_Group]:
        return iter({id(group): group for group in self._by_member.values()}.values())


def without_duplicates(tree: Tree) -> list[SpanFacts | None]:
    """What each span of the tree states: None where another one of the same call was kept, which may be completed."""
    stated: list[SpanFacts | None] = list(tree.spans)
    calls = [at for at, span in enumerate(tree.spans) if span.kind is Kind.LLM and (span.prompt or span.completion)]
    if len(calls) > 1:
        groups = _Groups(tree)
        _join_by_id(tree, calls, groups)
        _join_by_counts(tree, calls, groups)
        for group in groups:
            _keep_one(tree, group, stated)
    return stated


def _buckets(tree: Tree, calls: list[int], key: Callable[[SpanFacts], Any]) -> Iterator[list[int]]:
    """The calls that agree in `key`, where several do. By sorting, since a dictionary of lists takes much memory."""
    calls = sorted(calls, key=lambda at: key(tree.spans[at]))
    for _, bucket in groupby(calls, key=lambda at: key(tree.spans[at])):
        positions = list(bucket)
        if len(positions) > 1:
            yield positions


def _join_by_id(tree: Tree, calls: list[int], groups: _Groups) -> None:
    """Spans with one response id: the same call if their usage is identical, or if two layers saw it at one time."""
    identified = [at for at in calls if tree.spans[at].response_id is not None]
    for bucket in _buckets(tree, identified, lambda span: span.response_id):
        first_with: dict[tuple[int | None, int, int, int], int] = {}
        for at in bucket:
            span = tree.spans[at]
            usage = (span.prompt, span.completion, span.cache_read, span.cache_write)
            if usage in first_with:
                groups.join(groups.of(first_with[usage]), groups.of(at))
                continue
            for other in islice(first_with.values(), _MOST_CANDIDATES):
                if _same_response(tree, other, at):
                    groups.join(groups.of(other), groups.of(at))
            first_with[usage] = at


def _same_response(tree: Tree, a: int, b: int) -> bool:
    """Whether two spans with one response id but different usage are of one call; nested ones are left to the tree."""
    if tree.is_above(a, b) or tree.is_above(b, a):
        return False
    return tree.spans[a].scope != tree.spans[b].scope and _overlap(tree.spans[a], tree.spans[b]) > 0


def _join_by_counts(tree: Tree, calls: list[int], groups: _Groups) -> None:
    """Spans with equal counts: the same call if different layers saw it at nearly the same time."""
    if len({tree.spans[at].scope for at in calls}) == 1:
        return
    for bucket in _buckets(tree, calls, lambda span: (span.prompt, span.completion)):
        scopes = {tree.spans[at].scope for at in bucket}
        if len(scopes) == 1:
            continue
        incomplete: dict[int, _Group] = {}
        for at in sorted(bucket, key=lambda at: tree.spans[at].start):
            group = groups.of(at)
            if id(group) not in incomplete:
                group = _joined(tree, groups, incomplete, group, tree.spans[at])
            if scopes <= group.scopes:
                incomplete.pop(id(group), None)
            else:
                incomplete[id(group)] = group


def _joined(tree: Tree, groups: _Groups, incomplete: dict[int, _Group], group: _Group, span: SpanFacts) -> _Group:
    """The group of a span, after it met the first incomplete one that saw the same call."""
    for key, candidate in list(islice(incomplete.items(), _MOST_CANDIDATES)):
        if all(tree.spans[member].end < span.start for member in candidate.members):
            del incomplete[key]
        elif _same_call(tree, candidate, group, span):
            groups.join(candidate, group)
            return candidate
    return group


def _same_call(tree: Tree, candidate: _Group, group: _Group, span: SpanFacts) -> bool:
    if candidate.scopes & group.scopes:
        return False
    if candidate.response_id and group.response_id and candidate.response_id != group.response_id:
        return False
    if not _compatible(candidate.model, group.model):
        return False
    return any(_overlap(tree.spans[member], span) >= _OVERLAP for member in candidate.members)


def _overlap(a: SpanFacts, b: SpanFacts) -> float:
    """How much of the shorter span the two share, 0 to 1; a span without length lies in the other or not."""
    shared = min(a.end, b.end) - max(a.start, b.start)
    shorter = min(a.end - a.start, b.end - b.start)
    if shared < 0:
        return 0.0
    return shared / shorter if shorter > 0 else 1.0


def _compatible(a: str | None, b: str | None) -> bool:
    """Whether two names may mean one model: `gpt-4o`, `openai/gpt-4o` and `gpt-4o-2024-08-06` do."""
    if a is None or b is None or a == b:
        return True
    a, b = a.rpartition("/")[2], b.rpartition("/")[2]
    return a.startswith(b) or b.startswith(a)


def _keep_one(tree: Tree, group: _Group, stated: list[SpanFacts | None]) -> None:
    """Keep the span nearest to the provider, completed by the cache counts and the model that others know."""
    spans = tree.spans
    keeper = min(group.members, key=lambda at: (-tree.depths[at], nearness(spans[at].scope), spans[at].start))
    kept = spans[keeper]
    for at in group.members:
        if at == keeper:
            continue
        other = spans[at]
        stated[at] = None
        if not kept.cache_read and not kept.cache_write and (other.cache_read or other.cache_write):
            prompt = max(kept.prompt or 0, other.cache_read + other.cache_write)
            if prompt + other.cache_read + other.cache_write == other.prompt:
                prompt = other.prompt  # the kept one counted without the cache, and did not say so
            kept = kept._replace(prompt=prompt, cache_read=other.cache_read, cache_write=other.cache_write)
        kept = kept._replace(beside=kept.beside or other.beside, model=kept.model or other.model)
    stated[keeper] = kept
