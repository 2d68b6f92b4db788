"""Which of the responses that a job added explicitly its spans gave already. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from xpander_celery.recording.facts import key_of
from xpander_celery.recording.results import Added, Call
from xpander_celery.recording.tree import Tree
from xpander_celery.report import Tokens

_CLOCK_SKEW_NS = 10_000_000_000  # between a provider's `created`, in whole seconds, and the spans' clock


def not_given(added: Iterable[Added], tree: Tree, positions: Sequence[int]) -> Iterator[Call]:
    """The calls in `added` that are not among those at the `positions` of the tree. Each Agno run is taken once.

    A call was given by a span with its response id, or with its counts at its time (each span answers for one); what
    states only the sum of its calls, as some run outputs do, by the spans of calls that follow each other and sum up to
    it. Plain tokens are never a duplicate.
    """
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


class _Given:
    """What the spans gave, less what was recognized already."""

    def __init__(self, tree: Tree, positions: Sequence[int]) -> None:
        self._tree = tree
        self._positions = positions
        self._keys = {key for key in tree.response_keys if key}
        self._calls: dict[tuple[int, int], list[int]] = {}
        for at in positions:
            self._calls.setdefault((tree.prompts[at], tree.completions[at]), []).append(at)
        self._running: dict[tuple[int, int], int] | None = None

    def includes(self, call: Call, added_at: int) -> bool:
        key = key_of(call.response_id)
        if key in self._keys:
            return True
        if key:
            self._keys.add(key)
        counts = (call.prompt, call.completion)
        alike = self._calls.get(counts, [])
        for at in alike:
            if self._is_call(at, call, key, added_at):
                alike.remove(at)
                return True
        return self._includes_sum(counts)

    def _is_call(self, at: int, call: Call, key: int, added_at: int) -> bool:
        """Whether a span with its counts may be of this call: begun before it was added, or around its creation."""
        tree = self._tree
        if key and tree.response_keys[at]:
            return False
        if call.created is None:
            return tree.starts[at] <= added_at
        return tree.starts[at] - _CLOCK_SKEW_NS <= call.created <= tree.ends[at] + _CLOCK_SKEW_NS

    def _includes_sum(self, counts: tuple[int, int]) -> bool:
        """Whether calls that follow each other sum up to these counts."""
        if self._running is None:
            self._running = self._running_sums()
        prompt, completion = counts
        return any(
            self._running.get((before + prompt, after + completion), 0) - calls > 1
            for (before, after), calls in self._running.items()
        )

    def _running_sums(self) -> dict[tuple[int, int], int]:
        """The sums of the calls so far, by start, and how many calls that was."""
        tree = self._tree
        in_time = sorted(self._positions, key=tree.starts.__getitem__)
        prompts = accumulate((tree.prompts[at] for at in in_time), initial=0)
        completions = accumulate((tree.completions[at] for at in in_time), initial=0)
        return {sums: calls for calls, sums in enumerate(zip(prompts, completions, strict=True))}
