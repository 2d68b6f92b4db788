"""Which of the responses that a job added explicitly its spans gave already. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

from xpander_celery.recording.facts import key_of
from xpander_celery.recording.results import Added, Call
from xpander_celery.recording.tree import Tree
from xpander_celery.report import Tokens

_MOST_SUMMED = 1000  # of the latest calls, looked through for each run that states only a sum
_CLOCK_SKEW_NS = 10_000_000_000  # between a provider's `created`, in whole seconds, and the spans' clock


def not_given(added: Iterable[Added], tree: Tree, positions: Sequence[int]) -> list[Call]:
    """The calls in `added` that are not among those at the `positions` of the tree. Each Agno run is taken once.

    A call was given by a span with its response id, or with its counts at its time (each span answers for one), and
    completes that span by what it alone knows. A run as a whole was given by a span that states its sum, as agents do;
    and a run output that states only a sum, by the spans of calls that follow each other and sum up to it. Plain tokens
    are never a duplicate.
    """
    given = _Given(tree, positions)
    runs: set[str] = set()
    found: list[Call] = []
    for item in added:
        if isinstance(item.what, Tokens):
            tokens = item.what
            found.append(
                Call(
                    tokens.prompt_tokens, tokens.completion_tokens, tokens.cache_read_tokens, tokens.cache_write_tokens
                )
            )
            continue
        calls = [call for call in item.what.calls if call.run_id not in runs]
        runs.update(call.run_id for call in calls if call.run_id is not None)
        rest = [call for call in calls if not given.includes(call, item.at)]
        if not rest or len(rest) < len(calls) or not given.includes_sum(_sum(rest), item.at):
            found += rest
    return found


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


class _Given:
    """What the spans gave, less what was recognized already."""

    def __init__(self, tree: Tree, positions: Sequence[int]) -> None:
        self._tree = tree
        self._positions = positions
        self._keys = {key for key in tree.response_keys if key}
        self._by_key = {key: at for at in positions if (key := tree.response_keys[at])}
        self._calls: dict[tuple[int, int], list[int]] = {}
        for at in positions:
            self._calls.setdefault((tree.prompts[at], tree.completions[at]), []).append(at)
        self._running: dict[tuple[int, int], int] | None = None

    def includes(self, call: Call, added_at: int) -> bool:
        """Whether a span gave this call, which was added at the time `added_at`."""
        key = key_of(call.response_id)
        if key in self._keys:
            if key in self._by_key:
                self._complete(self._by_key[key], call)
            return True
        if key:
            self._keys.add(key)
        without_cache = (call.prompt - call.cache_read - call.cache_write, call.completion)
        for counts in ((call.prompt, call.completion), *([without_cache] if call.beside else [])):
            alike = self._calls.get(counts, [])
            for at in alike:
                if self._is_call(at, call, key, added_at):
                    alike.remove(at)
                    self._complete(at, call)
                    return True
        return False

    def includes_sum(self, call: Call, added_at: int) -> bool:
        """Whether an agent's span states this sum, or calls that follow each other make it up."""
        if call.response_id is not None:
            return False  # one response, and no sum
        if self.includes(call, added_at):
            return True
        if self._running is None:
            self._running = self._running_sums()
        return any(
            self._running.get((before + call.prompt, after + call.completion), 0) - calls > 1
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

    def _is_call(self, at: int, call: Call, key: int, added_at: int) -> bool:
        """Whether a span with its counts may be of this call: begun before it was added, or around its creation."""
        tree = self._tree
        if key and tree.response_keys[at]:
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
