"""Which of the responses that a job added explicitly its spans gave already. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from xpander_celery.recording.attributes import Kind
from xpander_celery.recording.calls import Added, Call, Returned
from xpander_celery.recording.facts import key_of
from xpander_celery.recording.tree import Tree
from xpander_celery.report import Tokens

_MOST_SUMMED = 1000  # of the latest calls, looked through for each run that states only a sum
_CLOCK_SKEW_NS = 10_000_000_000  # between a provider's `created`, in whole seconds, and the spans' clock


def not_given(added: Sequence[Added], tree: Tree, positions: Sequence[int]) -> list[Call]:
    """The calls in `added` that are not among those at the `positions` of the tree.

    A call was given by a span with its response id, or with its counts at its time (each span answers for one), and
    completes that span by what it alone knows. Calls are given together by a span that states their sum, as agents do,
    or, as far as they are not known alone, by the spans of calls that follow each other and sum up to it: all calls of
    an output, or those of one run in it. Of an Agno run the last word counts, since one that continues states
    everything again. Plain tokens are never a duplicate.
    """
    given = _Given(tree, positions)
    last = {
        call.run_id: number
        for number, item in enumerate(added)
        if isinstance(item.what, Returned)
        for call in item.what.calls
    }
    found: list[Call] = []
    for number, item in enumerate(added):
        if isinstance(item.what, Tokens):
            found.append(_call_of(item.what))
        else:
            calls = [call for call in item.what.calls if call.run_id is None or last[call.run_id] == number]
            found += given.missing(calls, item.at)
    return found


def _call_of(tokens: Tokens) -> Call:
    return Call(tokens.prompt_tokens, tokens.completion_tokens, tokens.cache_read_tokens, tokens.cache_write_tokens)


def _sum(calls: Sequence[Call]) -> Call:
    """Several calls as one agent states them."""
    if len(calls) == 1:
        return calls[0]
    return Call(
        prompt=sum(call.prompt for call in calls),
        completion=sum(call.completion for call in calls),
        cache_read=sum(call.cache_read for call in calls),
        cache_write=sum(call.cache_write for call in calls),
        beside=any(call.beside for call in calls),
        model=calls[0].model,
    )


def _countings(call: Call) -> Iterator[tuple[int, int]]:
    """The counts that a span of this call may state: some leave the cache out."""
    yield call.prompt, call.completion
    if call.beside:
        yield call.prompt - call.cache_read - call.cache_write, call.completion


_ByCounts = dict[tuple[int, int], list[int]]


class _Given:
    """What the spans gave, less what was recognized already."""

    def __init__(self, tree: Tree, positions: Sequence[int]) -> None:
        self._tree = tree
        self._positions = positions
        self._keys = {key for key in tree.response_keys if key}
        self._by_key = {key: at for at in positions if (key := tree.response_keys[at])}
        self._calls: _ByCounts = {}
        self._agents: _ByCounts = {}
        for at in positions:
            self._index(self._calls if tree.kinds[at] == Kind.LLM else self._agents, at)
        self._restating: _ByCounts | None = None
        self._running: dict[tuple[int, int], int] | None = None

    def missing(self, calls: Sequence[Call], added_at: int) -> list[Call]:
        """Those calls of one output, added at the time `added_at`, that no span gave."""
        known = [self._includes(call, added_at) for call in calls]
        if self._includes_together(calls, known, added_at):
            return []
        runs: dict[str | None, list[int]] = {}
        for at, call in enumerate(calls):
            runs.setdefault(call.run_id, []).append(at)
        missing: list[Call] = []
        for run in runs.values():
            its, its_known = [calls[at] for at in run], [known[at] for at in run]
            if len(runs) == 1 or not self._includes_together(its, its_known, added_at):
                missing += [
                    call
                    for call, is_known in zip(its, its_known, strict=True)
                    if not is_known and not self._finds(self._agents, call, added_at)
                ]
        return missing

    def _includes(self, call: Call, added_at: int) -> bool:
        """Whether the span of a call gave this one."""
        key = key_of(call.response_id)
        if key in self._keys:
            if key in self._by_key:
                self._complete(self._by_key[key], call)
            return True
        if key:
            self._keys.add(key)
        return self._finds(self._calls, call, added_at)

    def _includes_together(self, calls: Sequence[Call], known: Sequence[bool], added_at: int) -> bool:
        """Whether the spans gave all these calls: the `known` ones alone, or else their sum."""
        if all(known):
            return True
        total = _sum(calls)
        if self._finds(self._agents, total, added_at):
            return True
        if total.response_id is not None:
            return False  # one response, and no sum
        if self._finds(self._calls, total, added_at) or self._finds(self._agents_that_restate(), total, added_at):
            return True
        return self._is_running_sum(_sum([call for call, is_known in zip(calls, known, strict=True) if not is_known]))

    def _finds(self, spans: _ByCounts, call: Call, added_at: int) -> bool:
        """Whether one of these states this call, which it does for no further one."""
        for counts in _countings(call):
            alike = spans.get(counts, [])
            for at in alike:
                if self._is_call(at, call, added_at):
                    alike.remove(at)
                    self._complete(at, call)
                    return True
        return False

    def _agents_that_restate(self) -> _ByCounts:
        """Those whose calls count in their place."""
        if self._restating is None:
            self._restating = {}
            for at in set(range(len(self._tree.kinds))).difference(self._positions):
                if self._tree.kinds[at] != Kind.LLM:
                    self._index(self._restating, at)
        return self._restating

    def _index(self, spans: _ByCounts, at: int) -> None:
        spans.setdefault((self._tree.prompts[at], self._tree.completions[at]), []).append(at)

    def _is_running_sum(self, total: Call) -> bool:
        """Whether calls that follow each other make up this sum."""
        if self._running is None:
            self._running = self._running_sums()
        return any(
            self._running.get((before + total.prompt, after + total.completion), 0) - calls > 1
            for (before, after), calls in self._running.items()
        )

    def _complete(self, at: int, call: Call) -> None:
        self._tree.complete(
            at,
            prompt=call.prompt,
            cache_read=call.cache_read,
            cache_write=call.cache_write,
            beside=call.beside,
            model=call.model,
        )

    def _is_call(self, at: int, call: Call, added_at: int) -> bool:
        """Whether a span with its counts may be of this call: begun before it was added, or around its creation."""
        tree = self._tree
        if call.response_id is not None and tree.response_keys[at]:
            return False
        if call.created is None:
            return tree.starts[at] <= added_at
        return tree.starts[at] - _CLOCK_SKEW_NS <= call.created <= tree.ends[at] + _CLOCK_SKEW_NS

    def _running_sums(self) -> dict[tuple[int, int], int]:
        """The sums of the calls so far, by start, and how many calls that was."""
        tree = self._tree
        in_time = sorted(self._positions, key=tree.starts.__getitem__)[-_MOST_SUMMED:]
        prompts = accumulate((tree.prompts[at] for at in in_time), initial=0)
        completions = accumulate((tree.completions[at] for at in in_time), initial=0)
        return {sums: calls for calls, sums in enumerate(zip(prompts, completions, strict=True))}
