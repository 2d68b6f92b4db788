"""Which of the responses that a job added explicitly its spans gave already. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from xpander_celery.recording.facts import key_of
from xpander_celery.recording.results import Added, Call
from xpander_celery.recording.tree import Tree
from xpander_celery.report import Tokens

_CLOCK_SKEW_NS = 10_000_000_000  # between a provider's `created`, in whole seconds, and the spans' clock


def not_given(added: Iterable[Added], tree: Tree, positions: Sequence[int]) -> Iterator[Call]:
    """The calls in `added` that are not among those at the `positions` of the tree. Each Agno run is taken once.

    A call was given by a span with its response id, or with its counts at its time; a run output that states only a
    sum, by a span whose calls sum up to it. Each span answers for one call. Plain tokens are never a duplicate.
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
        self._sums: list[tuple[int, int]] | None = None

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
        if self._sums is None:
            self._sums = self._sums_below()
        if counts in self._sums:
            self._sums.remove(counts)
            return True
        return False

    def _sums_below(self) -> list[tuple[int, int]]:
        """The counts below each span with several calls below it, and of the whole job."""
        tree = self._tree
        below: dict[int, list[int]] = {at: [tree.prompts[at], tree.completions[at], 1] for at in self._positions}
        for at in tree.upwards():
            if at in below:
                above = below.setdefault(tree.parents[at], [0, 0, 0])
                for index, number in enumerate(below[at]):
                    above[index] += number
        return [(prompt, completion) for prompt, completion, calls in below.values() if calls > 1]
