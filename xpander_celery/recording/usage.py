"""From the facts of a job's spans to its tokens and tools. Pure: no OpenTelemetry, no clock, no state.

In three steps: one span per call is kept where several layers saw it (`duplicates`), agents that restate their calls
are told from those that do not (`tree`), and what was added explicitly counts where no span gave it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from xpander_celery.recording.attributes import NO_TOOLS, Kind
from xpander_celery.recording.duplicates import without_duplicates
from xpander_celery.recording.facts import SpanFacts
from xpander_celery.recording.results import Added, Call, Returned
from xpander_celery.recording.tree import Tree, counted, tree_of
from xpander_celery.report import Tokens

_CLOCK_SKEW_NS = 10_000_000_000  # between a provider's `created`, in whole seconds, and the spans' clock


@dataclass(frozen=True)
class Usage:
    """What a job spent. `inclusive` counts cached tokens inside the prompt; `sent` keeps each provider's semantics."""

    inclusive: Tokens = field(default_factory=Tokens)
    sent: Tokens = field(default_factory=Tokens)
    by_model: Mapping[str, Tokens] = field(default_factory=dict)  # inclusive; "" where no model was named
    used_tools: tuple[str, ...] = ()  # distinct, in order of first use
    llm_calls: int = 0
    llm_errors: int = 0
    tool_calls: int = 0
    tool_errors: int = 0


def usage_of(spans: Iterable[SpanFacts], *, added: Iterable[Added] = (), returned: Returned | None = None) -> Usage:
    """The usage that the spans of one job state, and what was added explicitly, each call once.

    An added response that a span gave already is not counted again; plain tokens always are. `returned`, read from the
    job's return value, counts only if there is nothing else.
    """
    tree = tree_of(spans)
    stated = without_duplicates(tree)
    positions = counted(tree, stated)
    calls: list[SpanFacts | Call] = [span for at in positions if (span := stated[at]) is not None]
    used = _tools_of(tree.spans)
    added = list(added)
    if added:
        calls += _added_calls(added, tree, positions)
        for item in added:
            if isinstance(item.what, Returned):
                used.names.update(dict.fromkeys(item.what.used_tools))
    if returned is not None:
        if not calls:
            calls += returned.calls
        if not used.names:
            used.names.update(dict.fromkeys(returned.used_tools))
    return Usage(
        inclusive=_sum(calls),
        sent=_sum(calls, as_sent=True),
        by_model=_by_model(calls),
        used_tools=tuple(used.names),
        llm_calls=len(calls),
        llm_errors=_times(span for span in tree.spans if span.kind is Kind.LLM and span.failed),
        tool_calls=used.calls,
        tool_errors=used.errors,
    )


def _sum(calls: Iterable[SpanFacts | Call], *, as_sent: bool = False) -> Tokens:
    prompt = completion = cache_read = cache_write = 0
    for call in calls:
        prompt += call.prompt or 0
        completion += call.completion
        cache_read += call.cache_read
        cache_write += call.cache_write
        if as_sent and call.beside:
            prompt -= call.cache_read + call.cache_write
    return Tokens(
        completion_tokens=completion,
        prompt_tokens=max(prompt, 0),
        cache_read_tokens=cache_read,
        cache_write_tokens=cache_write,
    )


def _by_model(calls: Iterable[SpanFacts | Call]) -> dict[str, Tokens]:
    by_model: defaultdict[str, list[SpanFacts | Call]] = defaultdict(list)
    for call in calls:
        by_model[call.model or ""].append(call)
    return {model: _sum(of_model) for model, of_model in by_model.items()}


class _Tools(NamedTuple):
    names: dict[str, None]  # an ordered set
    calls: int = 0
    errors: int = 0


def _tools_of(spans: Sequence[SpanFacts]) -> _Tools:
    """The tools that spans show; if none does, those that the model asked for."""
    shown = [span for span in spans if span.tool is not None and span.tool not in NO_TOOLS]
    if shown:
        shown.sort(key=lambda span: span.start)
        names = dict.fromkeys(span.tool for span in shown if span.tool is not None)
        return _Tools(names, _times(shown), _times(span for span in shown if span.failed))
    asking = sorted((span for span in spans if span.requested), key=lambda span: span.start)
    return _Tools(dict.fromkeys(tool for span in asking for tool in span.requested))


def _times(spans: Iterable[SpanFacts]) -> int:
    """How many uses the spans show. Layers repeat each other: per tool, the one that saw most says how many."""
    most: dict[str | None, int] = {}
    for (tool, _), times in Counter((span.tool, span.scope) for span in spans).items():
        most[tool] = max(times, most.get(tool, 0))
    return sum(most.values())


class _Given:
    """What the spans gave already, so that a response that was added as well counts once."""

    def __init__(self, tree: Tree, positions: Sequence[int]) -> None:
        self._tree = tree
        self._positions = positions
        self._ids = {span.response_id for span in tree.spans if span.response_id is not None}
        self._calls: defaultdict[tuple[int, int], list[SpanFacts]] = defaultdict(list)
        for at in positions:
            span = tree.spans[at]
            self._calls[span.prompt or 0, span.completion].append(span)
        self._subtrees: list[tuple[int, int]] | None = None

    def includes(self, call: Call, at: int) -> bool:
        """Whether a span gave this call, which was added at the time `at`; each span answers for one."""
        if call.response_id is not None:
            if call.response_id in self._ids:
                return True
            self._ids.add(call.response_id)
        counts = (call.prompt, call.completion)
        for index, span in enumerate(self._calls.get(counts, ())):
            if _same_time(span, call, at) and not (span.response_id and call.response_id):
                del self._calls[counts][index]
                return True
        return self._includes_run(counts)

    def _includes_run(self, counts: tuple[int, int]) -> bool:
        """Whether the calls below some span sum up to these counts: a run output states the sum of its calls."""
        if self._subtrees is None:
            self._subtrees = self._sums()
        if counts in self._subtrees:
            self._subtrees.remove(counts)
            return True
        return False

    def _sums(self) -> list[tuple[int, int]]:
        """The counts below each span with several calls below it, and of the whole job."""
        spans, parents, depths = self._tree.spans, self._tree.parents, self._tree.depths
        below: defaultdict[int, list[int]] = defaultdict(lambda: [0, 0, 0])
        for at in self._positions:
            sums = below[at]
            sums[0] += spans[at].prompt or 0
            sums[1] += spans[at].completion
            sums[2] += 1
        for at in sorted(range(len(spans)), key=depths.__getitem__, reverse=True):
            if at in below:
                above = below[parents[at]]
                for index, number in enumerate(below[at]):
                    above[index] += number
        return [(prompt, completion) for prompt, completion, calls in below.values() if calls > 1]


def _same_time(span: SpanFacts, call: Call, at: int) -> bool:
    """Whether the span may be of the call: begun before the call was added, and around when its provider made it."""
    if call.created is None:
        return span.start <= at
    return span.start - _CLOCK_SKEW_NS <= call.created <= span.end + _CLOCK_SKEW_NS


def _added_calls(added: Iterable[Added], tree: Tree, positions: Sequence[int]) -> Iterator[Call]:
    """The calls among what was added that no span gave, each Agno run once."""
    given = _Given(tree, positions)
    runs: set[str] = set()
    for item in added:
        if isinstance(item.what, Tokens):
            tokens = item.what
            yield Call(
                tokens.prompt_tokens, tokens.completion_tokens, tokens.cache_read_tokens, tokens.cache_write_tokens
            )
            continue
        calls = [call for call in item.what.calls if call.run_id not in runs]
        runs.update(call.run_id for call in calls if call.run_id is not None)
        yield from (call for call in calls if not given.includes(call, item.at))
