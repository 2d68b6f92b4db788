"""The calls that a tree of spans really made: agents restate what their calls spent, and wrappers what they wrap.

Pure. Spans are held by position, in columns, and nothing recurses: a tree may have 100,000 spans, or be as deep.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

from xpander_celery.recording.attributes import Kind
from xpander_celery.recording.facts import SpanFacts

ROOT = -1
_UNDERWAY = -1  # the depth of a span while the way up from it is walked


def _integers() -> array[int]:
    return array("q")


@dataclass(slots=True)
class Tree:
    """The spans that state usage, by position, each span id once; spans without usage only connect them.

    `parents` holds the nearest such span above, or `ROOT`; `depths` counts all spans. A scope is one bit, named in
    `scope_names`, so that a set of scopes is an integer. `duplicates` marks spans of a call for which another stands.
    """

    parents: array[int] = field(default_factory=_integers)
    depths: array[int] = field(default_factory=_integers)
    kinds: bytearray = field(default_factory=bytearray)
    scopes: list[int] = field(default_factory=list)
    scope_names: dict[int, str] = field(default_factory=dict)
    starts: array[int] = field(default_factory=_integers)
    ends: array[int] = field(default_factory=_integers)
    prompts: array[int] = field(default_factory=_integers)
    completions: array[int] = field(default_factory=_integers)
    cache_reads: array[int] = field(default_factory=_integers)
    cache_writes: array[int] = field(default_factory=_integers)
    beside: bytearray = field(default_factory=bytearray)
    models: list[str | None] = field(default_factory=list)
    response_keys: array[int] = field(default_factory=_integers)
    duplicates: bytearray = field(default_factory=bytearray)

    def is_above(self, upper: int, lower: int) -> bool:
        """Whether `upper` is an ancestor of `lower`, or the same."""
        while self.depths[lower] > self.depths[upper]:
            lower = self.parents[lower]
            if lower == ROOT:
                return False
        return lower == upper

    def complete(
        self, position: int, *, prompt: int, cache_read: int, cache_write: int, beside: bool, model: str | None
    ) -> None:
        """Add to a call what another witness of it knows and the span does not: the model, and the cache."""
        self.models[position] = self.models[position] or model
        self.beside[position] |= beside
        cache = cache_read + cache_write
        if cache and not self.cache_reads[position] and not self.cache_writes[position]:
            self.cache_reads[position], self.cache_writes[position] = cache_read, cache_write
            if self.prompts[position] + cache == prompt:  # it counted without the cache, and did not say so
                self.prompts[position] = prompt

    def upwards(self) -> list[int]:
        """All positions, children before their parents."""
        return sorted(range(len(self.kinds)), key=self.depths.__getitem__, reverse=True)


def tree_of(spans: Iterable[SpanFacts]) -> Tree:
    """The tree of the spans. A span given twice counts once, an unknown parent is the root, a cycle is cut."""
    tree = Tree()
    scopes: dict[str, int] = {}
    parent_ids: dict[int, int] = {}
    positions: dict[int, int] = {}
    for span in spans:
        if span.span_id in parent_ids:
            continue
        parent_ids[span.span_id] = span.parent_id
        if span.prompt is None:
            continue
        positions[span.span_id] = len(positions)
        tree.kinds.append(span.kind)
        tree.scopes.append(scopes.setdefault(span.scope, 1 << len(scopes)))
        tree.starts.append(span.start)
        tree.ends.append(span.end)
        tree.prompts.append(span.prompt)
        tree.completions.append(span.completion)
        tree.cache_reads.append(span.cache_read)
        tree.cache_writes.append(span.cache_write)
        tree.beside.append(span.beside)
        tree.models.append(span.model)
        tree.response_keys.append(span.response_key)
    tree.scope_names = {bit: scope for scope, bit in scopes.items()}
    tree.duplicates = bytearray(len(positions))
    _connect(tree, positions, parent_ids)
    return tree


def _connect(tree: Tree, positions: dict[int, int], parent_ids: dict[int, int]) -> None:
    """Find each span's nearest ancestor with usage, and its depth. Cuts cycles: no tracer writes them, a bad one might.

    Every span is passed once: where the way up meets one that was passed already, the rest is known.
    """
    parents = tree.parents = array("q", bytes(8 * len(positions)))
    depths = tree.depths = array("q", bytes(8 * len(positions)))
    between: dict[int, tuple[int, int]] = {}  # spans without usage: the position of the nearest with usage, the depth
    for span_id in positions:
        path = []
        at = span_id
        nearest, depth = ROOT, 0
        while at in parent_ids:
            position = positions.get(at)
            if position is not None:
                if depths[position]:
                    nearest, depth = position, max(depths[position], 0)
                    break
                depths[position] = _UNDERWAY
            elif at in between:
                nearest, depth = between[at]
                break
            else:
                between[at] = ROOT, 0
            path.append(at)
            at = parent_ids[at]
        if depth == 0:
            nearest = ROOT  # a cycle, met where its spans are underway
        for below in reversed(path):
            depth += 1
            position = positions.get(below)
            if position is None:
                between[below] = nearest, depth
            else:
                parents[position], depths[position] = nearest, depth
                nearest = position


# What counts at a span: its own numbers, the calls below it, the sub-containers below it. Plain integers,
# since flags of an enum cost as much as the rest of the algorithm.
_OWN, _CALLS, _CONTAINERS = 1, 2, 4
_BELOW = _CALLS | _CONTAINERS


@dataclass(slots=True)
class _Below:
    """What was found directly below one span."""

    calls: int = 0
    calls_prompt: int = 0
    calls_total: int = 0
    containers: int = 0
    containers_prompt: int = 0
    containers_total: int = 0
    scopes: int = 0  # of the calls

    @property
    def prompt(self) -> int:
        return self.calls_prompt + self.containers_prompt

    @property
    def total(self) -> int:
        return self.calls_total + self.containers_total

    def add_call(self, prompt: int, total: int, scopes: int) -> None:
        self.calls += 1
        self.calls_prompt += prompt
        self.calls_total += total
        self.scopes |= scopes

    def add_container(self, prompt: int, total: int) -> None:
        self.containers += 1
        self.containers_prompt += prompt
        self.containers_total += total


_NOTHING = _Below()


def counted(tree: Tree) -> list[int]:
    """The positions whose own numbers count: each call of the job once, topmost first."""
    upwards = tree.upwards()
    take = bytearray(len(upwards))
    _decide(tree, upwards, take)
    return _select(tree, upwards, take)


def _decide(tree: Tree, upwards: list[int], take: bytearray) -> None:
    """Set what counts at each span, from the leaves up."""
    found: dict[int, _Below] = {}
    for position in upwards:
        below = found.pop(position, _NOTHING)
        if tree.duplicates[position]:
            chosen = _BELOW
        elif tree.kinds[position] == Kind.LLM:
            chosen = _of_call(tree, position, below)
        else:
            chosen = _of_container(tree, position, below)
        take[position] = chosen
        if tree.parents[position] != ROOT:
            _pass_up(tree, position, found, below, chosen)


def _pass_up(tree: Tree, position: int, found: dict[int, _Below], below: _Below, chosen: int) -> None:
    """Tell the parent what counts here: as one call, or as one sub-container."""
    prompt = total = 0
    if chosen & _CALLS:
        prompt, total = below.calls_prompt, below.calls_total
    if chosen & _CONTAINERS:
        prompt, total = prompt + below.containers_prompt, total + below.containers_total
    own_prompt, own_total = tree.prompts[position], tree.prompts[position] + tree.completions[position]
    if chosen & _OWN:
        prompt, total = prompt + own_prompt, total + own_total
    elif tree.duplicates[position] and own_total > total:  # counted elsewhere: still, this much was called below here
        prompt, total = own_prompt, own_total
    above = found.get(tree.parents[position])
    if above is None:
        above = found[tree.parents[position]] = _Below()
    if tree.kinds[position] == Kind.LLM:
        above.add_call(prompt, total, tree.scopes[position] | below.scopes)
    else:
        above.add_container(prompt, total)


def _of_call(tree: Tree, position: int, below: _Below) -> int:
    """A wrapper and the call in it: the inner one is nearer to the provider, unless it saw less."""
    return _BELOW if below.total and below.prompt >= tree.prompts[position] else _OWN


def _of_container(tree: Tree, position: int, below: _Below) -> int:
    """An agent and what is below it: whether its own numbers restate, exclude or replace those."""
    if tree.scopes[position] & below.scopes:
        return _BELOW  # who reports this agent reports its calls too
    if not below.calls:
        return _OWN | _CONTAINERS
    total = tree.prompts[position] + tree.completions[position]
    if below.containers and total >= below.total:
        return _OWN
    return _OWN | _CONTAINERS if total > below.calls_total else _BELOW


def _select(tree: Tree, upwards: list[int], take: bytearray) -> list[int]:
    """The positions that count, from the root down: what an ancestor does not take is gone."""
    passed = bytearray(len(upwards))
    selected: list[int] = []
    for position in reversed(upwards):
        parent = tree.parents[position]
        allowed = _BELOW if parent == ROOT else passed[parent]
        if allowed & (_CALLS if tree.kinds[position] == Kind.LLM else _CONTAINERS):
            passed[position] = take[position] & _BELOW
            if take[position] & _OWN:
                selected.append(position)
    return selected
