"""From the facts of a job's spans to its tokens and tools. Pure: no OpenTelemetry, no clock, no state.

In three steps: one span per call is kept where several layers saw it (`duplicates`), agents that restate their calls
are told from those that do not (`tree`), and what was added explicitly counts where no span gave it (`added`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from xpander_celery.recording.added import not_given
from xpander_celery.recording.attributes import NO_TOOLS, Kind
from xpander_celery.recording.calls import Added, Call, Returned
from xpander_celery.recording.duplicates import mark_duplicates
from xpander_celery.recording.facts import SpanFacts
from xpander_celery.recording.tree import Tree, counted, tree_of
from xpander_celery.report import Tokens


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
    job's return value, counts only if nothing else states a token: spans of calls without counts do not.
    """
    tools = _Tools()
    tree = tree_of(tools.watching(spans))
    mark_duplicates(tree)
    positions = counted(tree)
    calls = _Sums()
    used = dict.fromkeys(tools.names())
    added = tuple(added)
    if added:
        calls.add(not_given(added, tree, positions))  # before the spans are summed, since it completes them
        for item in added:
            if isinstance(item.what, Returned):
                used.update(dict.fromkeys(item.what.used_tools))
    calls.add_spans(tree, positions)
    if returned is not None:
        if returned.calls and not calls.spent_anything:
            calls = _Sums()
            calls.add(returned.calls)
        used = used or dict.fromkeys(returned.used_tools)
    by_model = calls.by_model()
    inclusive = _sum(by_model.values())
    return Usage(
        inclusive=inclusive,
        sent=calls.sent(inclusive),
        by_model=by_model,
        used_tools=tuple(used),
        llm_calls=calls.count,
        llm_errors=tools.llm_errors(),
        tool_calls=tools.calls(),
        tool_errors=tools.errors(),
    )


class _Sums:
    """Sums per model, so that 100,000 calls need no object each."""

    def __init__(self) -> None:
        self.count = 0
        self._models: dict[str, list[int]] = {}  # prompt, completion, cache read, cache write
        self._cache_beside = 0

    def add_spans(self, tree: Tree, positions: Sequence[int]) -> None:
        for at in positions:
            self._add(
                tree.models[at],
                tree.prompts[at],
                tree.completions[at],
                tree.cache_reads[at],
                tree.cache_writes[at],
                bool(tree.beside[at]),
            )

    def add(self, calls: Iterable[Call]) -> None:
        for call in calls:
            self._add(call.model, call.prompt, call.completion, call.cache_read, call.cache_write, call.beside)

    @property
    def spent_anything(self) -> bool:
        return any(any(sums) for sums in self._models.values())

    def sent(self, inclusive: Tokens) -> Tokens:
        if not self._cache_beside:
            return inclusive
        return inclusive.model_copy(update={"prompt_tokens": max(inclusive.prompt_tokens - self._cache_beside, 0)})

    def by_model(self) -> dict[str, Tokens]:
        return {
            model: Tokens(
                prompt_tokens=prompt, completion_tokens=completion, cache_read_tokens=read, cache_write_tokens=write
            )
            for model, (prompt, completion, read, write) in self._models.items()
        }

    def _add(self, model: str | None, prompt: int, completion: int, read: int, write: int, beside: bool) -> None:
        self.count += 1
        sums = self._models.get(model or "")
        if sums is None:
            self._models[model or ""] = [prompt, completion, read, write]
        else:
            sums[0] += prompt
            sums[1] += completion
            sums[2] += read
            sums[3] += write
        if beside:
            self._cache_beside += read + write


def _sum(of_models: Collection[Tokens]) -> Tokens:
    """Of several models; most jobs have one, and a job waits for this each time that it tells of its progress."""
    if len(of_models) == 1:
        return next(iter(of_models))
    return sum(of_models, Tokens())


@dataclass(slots=True)
class _Uses:
    """The uses of one tool that one layer saw."""

    first: int
    times: int = 0
    errors: int = 0


class _Tools:
    """The tools that spans show and, where none does, those that the models asked for."""

    def __init__(self) -> None:
        self._shown: dict[str, dict[str, _Uses]] = {}  # by tool, by scope
        self._asked: dict[str, tuple[int, int]] = {}  # tool: when first, as which in that answer
        self._llm_errors: dict[str, int] = {}  # by scope

    def watching(self, spans: Iterable[SpanFacts]) -> Iterator[SpanFacts]:
        """The same spans, seen in passing."""
        for span in spans:
            if span.tool is not None:
                self._saw(span, span.tool)
            elif span.kind is Kind.LLM:
                if span.failed:
                    self._llm_errors[span.scope] = self._llm_errors.get(span.scope, 0) + 1
                for index, tool in enumerate(span.requested):
                    self._asked[tool] = min((span.start, index), self._asked.get(tool, (span.start, index)))
            yield span

    def names(self) -> list[str]:
        """Distinct, in order of first use."""
        if not self._shown:
            return sorted(self._asked, key=self._asked.__getitem__)
        return sorted(self._shown, key=lambda tool: min(uses.first for uses in self._shown[tool].values()))

    def calls(self) -> int:
        """Layers repeat each other: per tool, the one that saw most says how often it was called."""
        return sum(max(uses.times for uses in by_scope.values()) for by_scope in self._shown.values())

    def errors(self) -> int:
        return sum(max(uses.errors for uses in by_scope.values()) for by_scope in self._shown.values())

    def llm_errors(self) -> int:
        return max(self._llm_errors.values(), default=0)

    def _saw(self, span: SpanFacts, tool: str) -> None:
        if tool in NO_TOOLS:
            return
        uses = self._shown.setdefault(tool, {}).setdefault(span.scope, _Uses(span.start))
        uses.first = min(uses.first, span.start)
        uses.times += 1
        uses.errors += span.failed
