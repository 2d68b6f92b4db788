"""The calls that a tree of spans really made: agents restate what their calls spent, and wrappers what they wrap.

Pure. It works on positions in a list of spans and never recurses: a tree may be 100,000 deep.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from xpander_celery.recording.attributes import Kind
from xpander_celery.recording.facts import SpanFacts

ROOT = -1


@dataclass(frozen=True, slots=True)
class Tree:
    """Spans by position, each span id once; `parents` holds positions, or `ROOT` where the parent is not among them."""

    spans: list[SpanFacts]
    parents: list[int]
    depths: list[int]

    def is_above(self, upper: int, lower: int) -> bool:
        """Whether `upper` is an ancestor of `lower`, or the same."""
        while self.depths[lower] > self.depths[upper]:
            lower = self.parents[lower]
        return lower == upper


def tree_of(spans: Iterable[SpanFacts]) -> Tree:
    """The tree of the spans. A span given twice counts once, an unknown parent is the root, a cycle is cut."""
    positions: dict[int | str, int] = {}
    distinct: list[SpanFacts] = []
    for span in spans:
        if span.span_id not in positions:
            positions[span.span_id] = len(distinct)
            distinct.append(span)
    parents = [ROOT if span.parent_id is None else positions.get(span.parent_id, ROOT) for span in distinct]
    return Tree(distinct, parents, _depths(parents))


def _depths(parents: list[int]) -> list[int]:
    """The depth of each position, from 1. Cuts cycles in `parents`, which no tracer writes but a bad one might."""
    unknown, underway = 0, -1
    depths = [unknown] * len(parents)
    for position in range(len(parents)):
        path = []
        at = position
        while at != ROOT and depths[at] == unknown:
            depths[at] = underway
            path.append(at)
            at = parents[at]
        if at != ROOT and depths[at] == underway:
            parents[path[-1]] = at = ROOT
        depth = 0 if at == ROOT else depths[at]
        for below in reversed(path):
            depth += 1
            depths[below] = depth
    return depths


# What counts at a span with usage: its own numbers, the calls below it, the sub-containers below it. Plain integers,
# since flags of an enum cost as much as the rest of the algorithm.
_OWN, _CALLS, _CONTAINERS = 1, 2, 4
_BELOW = _CALLS | _CONTAINERS


@dataclass(slots=True)
class _Below:
    """What was found below one span, down to the next spans with usage."""

    calls: int = 0
    calls_prompt: int = 0
    calls_total: int = 0
    containers: int = 0
    containers_prompt: int = 0
    containers_total: int = 0
    scopes: frozenset[str] = frozenset()  # of the calls

    @property
    def prompt(self) -> int:
        return self.calls_prompt + self.containers_prompt

    @property
    def total(self) -> int:
        return self.calls_total + self.containers_total

    def absorb(self, other: _Below) -> None:
        self.calls += other.calls
        self.calls_prompt += other.calls_prompt
        self.calls_total += other.calls_total
        self.containers += other.containers
        self.containers_prompt += other.containers_prompt
        self.containers_total += other.containers_total
        self.add_scopes(other.scopes)

    def add_scopes(self, scopes: frozenset[str]) -> None:
        if not scopes <= self.scopes:
            self.scopes |= scopes

    def add_call(self, prompt: int, total: int) -> None:
        self.calls += 1
        self.calls_prompt += prompt
        self.calls_total += total

    def add_container(self, prompt: int, total: int) -> None:
        self.containers += 1
        self.containers_prompt += prompt
        self.containers_total += total


_NOTHING = _Below()


def counted(tree: Tree, stated: Sequence[SpanFacts | None]) -> list[int]:
    """The positions whose own numbers count, each call of the job once.

    `stated` holds what each span states, None where the span duplicates another one (it still shows, by its scope,
    who reports the calls of a container).
    """
    take = _decide(tree, stated)
    return _select(tree, stated, take)


def _decide(tree: Tree, stated: Sequence[SpanFacts | None]) -> dict[int, int]:
    """What counts at each span with usage, from the leaves up."""
    take: dict[int, int] = {}
    found: dict[int, _Below] = {}
    for position in sorted(range(len(tree.spans)), key=tree.depths.__getitem__, reverse=True):
        span = tree.spans[position]
        parent = tree.parents[position]
        below = found.pop(position, None)
        if span.prompt is None:
            if below is not None and parent != ROOT:
                _merge(found, parent, below)
            continue
        below = below or _NOTHING
        own = stated[position]
        if own is None:
            chosen = _BELOW
        elif span.kind is Kind.LLM:
            chosen = _of_call(own, below)
        else:
            chosen = _of_container(own, below)
        take[position] = chosen
        if parent != ROOT:
            _pass_up(found, parent, own or span, below, chosen)
    return take


def _merge(found: dict[int, _Below], parent: int, below: _Below) -> None:
    """A span without usage is transparent."""
    if parent in found:
        found[parent].absorb(below)
    else:
        found[parent] = below


def _pass_up(found: dict[int, _Below], parent: int, span: SpanFacts, below: _Below, chosen: int) -> None:
    """Tell the parent what counts here: as one call, or as one sub-container."""
    prompt = total = 0
    if chosen & _CALLS:
        prompt, total = below.calls_prompt, below.calls_total
    if chosen & _CONTAINERS:
        prompt, total = prompt + below.containers_prompt, total + below.containers_total
    own_prompt = span.prompt or 0
    if chosen & _OWN:
        prompt, total = prompt + own_prompt, total + own_prompt + span.completion
    elif span.kind is Kind.LLM and own_prompt > prompt:  # a duplicate, counted elsewhere: still, this much was called
        prompt, total = own_prompt, own_prompt + span.completion
    above = found.get(parent)
    if above is None:
        above = found[parent] = _Below()
    if span.kind is Kind.LLM:
        above.add_call(prompt, total)
        above.add_scopes(below.scopes)
        if span.scope not in above.scopes:
            above.scopes |= {span.scope}
    else:
        above.add_container(prompt, total)


def _of_call(own: SpanFacts, below: _Below) -> int:
    """A wrapper and the call in it: the inner one is nearer to the provider, unless it saw less."""
    return _BELOW if below.total and below.prompt >= (own.prompt or 0) else _OWN


def _of_container(own: SpanFacts, below: _Below) -> int:
    """An agent and what is below it: whether its own numbers restate, exclude or replace those."""
    if own.scope in below.scopes:
        return _BELOW  # who reports this agent reports its calls too
    if not below.calls:
        return _OWN | _CONTAINERS
    total = (own.prompt or 0) + own.completion
    if below.containers and total >= below.total:
        return _OWN
    return _OWN | _CONTAINERS if total > below.calls_total else _BELOW


def _select(tree: Tree, stated: Sequence[SpanFacts | None], take: dict[int, int]) -> list[int]:
    """The positions that count, from the root down: what an ancestor does not take is gone."""
    passed = [_BELOW] * len(tree.spans)
    selected: list[int] = []
    for position in sorted(range(len(tree.spans)), key=tree.depths.__getitem__):
        parent = tree.parents[position]
        allowed = _BELOW if parent == ROOT else passed[parent]
        chosen = take.get(position)
        if chosen is not None:
            wanted = _CALLS if tree.spans[position].kind is Kind.LLM else _CONTAINERS
            if not allowed & wanted:
                allowed = 0
            else:
                allowed = chosen & _BELOW
                if chosen & _OWN and stated[position] is not None:
                    selected.append(position)
        passed[position] = allowed
    return selected
