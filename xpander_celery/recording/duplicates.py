"""Spans of several instrumentations that saw the same call to a model, found where they are not nested. Pure.

Two layers often wrap one call in parallel branches: a framework's callback and a client library, say. The same call has
the same response id, or the same counts at the same time. Two parallel calls with equal counts stay two, since no layer
sees one call twice: a group holds each scope once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby, islice

from xpander_celery.recording.attributes import Kind, nearness
from xpander_celery.recording.tree import Tree

_OVERLAP = 0.8  # of the shorter span
_MOST_CANDIDATES = 64  # looked at per span: bounds the work where thousands of equal calls run in parallel


class _Group:
    """The spans of one call."""

    __slots__ = ("cache", "end", "members", "model", "response_key", "scopes")

    def __init__(self, tree: Tree, position: int) -> None:
        self.members = [position]
        self.end = tree.ends[position]
        self.scopes = tree.scopes[position]
        self.cache = tree.cache_reads[position], tree.cache_writes[position]
        self.response_key = tree.response_keys[position]
        self.model = tree.models[position]


class _Groups:
    """The calls of a tree. Only groups of several spans are remembered: most calls are seen once."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._by_member: dict[int, _Group] = {}

    def of(self, position: int) -> _Group:
        return self._by_member.get(position) or _Group(self._tree, position)

    def join(self, group: _Group, other: _Group) -> None:
        if group is other:
            return
        group.members += other.members
        group.end = max(group.end, other.end)
        group.scopes |= other.scopes
        group.cache = max(group.cache, other.cache)
        group.response_key = group.response_key or other.response_key
        group.model = group.model or other.model
        for member in group.members:
            self._by_member[member] = group

    def __iter__(self) -> Iterator[_Group]:
        return iter({id(group): group for group in self._by_member.values()}.values())


def mark_duplicates(tree: Tree) -> None:
    """Of several spans of one call mark all but one in `tree.duplicates`, and complete that one from the others."""
    calls = [
        position
        for position, kind in enumerate(tree.kinds)
        if kind == Kind.LLM and (tree.prompts[position] or tree.completions[position])
    ]
    if len(calls) > 1:
        groups = _Groups(tree)
        _join_by_id(tree, calls, groups)
        _join_by_counts(tree, calls, groups)
        for group in groups:
            _keep_one(tree, group)


def _buckets(calls: list[int], key: Callable[[int], int]) -> Iterator[list[int]]:
    """The calls that agree in `key`, where several do. By sorting, since a dictionary of lists takes much memory."""
    calls = sorted(calls, key=key)
    for _, bucket in groupby(calls, key=key):
        positions = list(bucket)
        if len(positions) > 1:
            yield positions


def _join_by_id(tree: Tree, calls: list[int], groups: _Groups) -> None:
    """Spans with one response id: the same call if their usage is identical, or if two layers saw it at one time."""
    identified = [at for at in calls if tree.response_keys[at]]
    if len({tree.response_keys[at] for at in identified}) == len(identified):
        return
    for bucket in _buckets(identified, tree.response_keys.__getitem__):
        first_with: dict[tuple[int, ...], int] = {}
        for at in bucket:
            usage = (tree.prompts[at], tree.completions[at], tree.cache_reads[at], tree.cache_writes[at])
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
    return tree.scopes[a] != tree.scopes[b] and _overlap(tree, a, b) > 0


def _join_by_counts(tree: Tree, calls: list[int], groups: _Groups) -> None:
    """Spans with equal counts: the same call if different layers saw it at nearly the same time."""
    if len(set(tree.scopes)) == 1:
        return
    counts = [prompt << 50 | completion for prompt, completion in zip(tree.prompts, tree.completions, strict=True)]
    for bucket in _buckets(calls, counts.__getitem__):
        scopes = 0
        for at in bucket:
            scopes |= tree.scopes[at]
        if scopes == tree.scopes[bucket[0]]:
            continue
        incomplete: dict[int, _Group] = {}
        for at in sorted(bucket, key=tree.starts.__getitem__):
            group = groups.of(at)
            if id(group) not in incomplete:
                group = _joined(tree, groups, incomplete, group, at)
            if scopes & ~group.scopes == 0:
                incomplete.pop(id(group), None)
            else:
                incomplete[id(group)] = group


def _joined(tree: Tree, groups: _Groups, incomplete: dict[int, _Group], group: _Group, position: int) -> _Group:
    """The group of a span, after it met an incomplete one that saw the same call.

    One with the same cache counts if there is one, else one where a layer did not see the cache.
    """
    found: _Group | None = None
    for key, candidate in list(islice(incomplete.items(), _MOST_CANDIDATES)):
        if candidate.end < tree.starts[position]:
            del incomplete[key]
        elif (found is None or candidate.cache == group.cache) and _same_call(tree, candidate, group, position):
            found = candidate
            if candidate.cache == group.cache:
                break
    if found is None:
        return group
    groups.join(found, group)
    return found


def _same_call(tree: Tree, candidate: _Group, group: _Group, position: int) -> bool:
    if candidate.scopes & group.scopes:
        return False
    if candidate.response_key and group.response_key and candidate.response_key != group.response_key:
        return False
    if candidate.cache != group.cache and any(candidate.cache) and any(group.cache):
        return False
    if not _compatible(candidate.model, group.model):
        return False
    return any(_overlap(tree, member, position) >= _OVERLAP for member in candidate.members)


def _overlap(tree: Tree, a: int, b: int) -> float:
    """How much of the shorter span the two share, 0 to 1; a span without length lies in the other or not."""
    shared = min(tree.ends[a], tree.ends[b]) - max(tree.starts[a], tree.starts[b])
    shorter = min(tree.ends[a] - tree.starts[a], tree.ends[b] - tree.starts[b])
    if shared < 0:
        return 0.0
    return shared / shorter if shorter > 0 else 1.0


def _compatible(a: str | None, b: str | None) -> bool:
    """Whether two names may mean one model: `gpt-4o`, `openai/gpt-4o` and `gpt-4o-2024-08-06` do."""
    if a is None or b is None or a == b:
        return True
    a, b = a.rpartition("/")[2], b.rpartition("/")[2]
    return a.startswith(b) or b.startswith(a)


def _keep_one(tree: Tree, group: _Group) -> None:
    """Keep the span nearest to the provider, completed by the cache counts and the model that others know."""

    def distance(at: int) -> tuple[int, int, int]:
        return -tree.depths[at], nearness(tree.scope_names[tree.scopes[at]]), tree.starts[at]

    keeper = min(group.members, key=distance)
    for other in group.members:
        if other == keeper:
            continue
        tree.duplicates[other] = True
        tree.complete(
            keeper,
            prompt=tree.prompts[other],
            cache_read=tree.cache_reads[other],
            cache_write=tree.cache_writes[other],
            beside=bool(tree.beside[other]),
            model=tree.models[other],
        )
