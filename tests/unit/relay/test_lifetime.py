from __future__ import annotations

import pytest

from xpander_celery.relay.lifetime import LINGER_S, Lifetime, Mode

BUSY = {"is_quiet": False, "is_drained": False}
QUIET = {"is_quiet": True, "is_drained": False}
DRAINED = {"is_quiet": True, "is_drained": True}


def over_at(lifetime: Lifetime, *, has_workers: bool, state: dict[str, bool]) -> float | None:
    """When it ends, if anything stays as it is for a day."""
    for now in (*range(200), 86_400):
        if lifetime.is_over(float(now), has_workers=has_workers, **state):
            return float(now)
    return None


@pytest.mark.parametrize(
    ("mode", "has_workers", "state", "end"),
    [
        (Mode.WITH_WORKERS, True, DRAINED, None),
        (Mode.WITH_WORKERS, False, DRAINED, 0),
        (Mode.WITH_WORKERS, False, QUIET, LINGER_S),
        (Mode.WITH_WORKERS, False, BUSY, LINGER_S),
        (Mode.STAY, True, DRAINED, None),
        (Mode.STAY, False, DRAINED, None),
        (Mode.ONCE, True, DRAINED, 0),
        (Mode.ONCE, True, QUIET, None),
        (Mode.ONCE, False, BUSY, None),
    ],
)
def test_it_ends_as_its_mode_says(mode: Mode, has_workers: bool, state: dict[str, bool], end: float | None) -> None:
    assert over_at(Lifetime(mode, 0.0), has_workers=has_workers, state=state) == end


@pytest.mark.parametrize("mode", [Mode.WITH_WORKERS, Mode.STAY])
@pytest.mark.parametrize(
    ("has_workers", "state", "end"),
    [(True, BUSY, LINGER_S), (True, DRAINED, LINGER_S), (False, BUSY, LINGER_S), (False, QUIET, 0)],
)
def test_after_a_signal_it_goes_on_for_the_workers_that_end_too(
    mode: Mode, has_workers: bool, state: dict[str, bool], end: float
) -> None:
    lifetime = Lifetime(mode, 0.0)
    lifetime.terminate(0.0)
    assert over_at(lifetime, has_workers=has_workers, state=state) == end
    assert not lifetime.is_hurried


@pytest.mark.parametrize("mode", Mode)
def test_a_second_signal_ends_it_at_once(mode: Mode) -> None:
    lifetime = Lifetime(mode, 0.0)
    lifetime.terminate(0.0)
    lifetime.terminate(1.0)
    assert lifetime.is_hurried
    assert over_at(lifetime, has_workers=True, state=BUSY) == 0


@pytest.mark.parametrize("mode", Mode)
def test_it_leaves_when_it_is_relieved(mode: Mode) -> None:
    lifetime = Lifetime(mode, 0.0)
    lifetime.relieve()
    assert over_at(lifetime, has_workers=True, state=BUSY) == 0
    assert not lifetime.is_hurried


def test_a_signal_ends_a_relay_that_was_only_to_deliver_once() -> None:
    lifetime = Lifetime(Mode.ONCE, 0.0)
    lifetime.terminate(0.0)
    assert over_at(lifetime, has_workers=True, state=BUSY) == 0


def test_it_lingers_after_the_last_worker_and_not_after_its_own_start() -> None:
    lifetime = Lifetime(Mode.WITH_WORKERS, 0.0)
    assert not lifetime.is_over(100.0, has_workers=True, **QUIET)
    assert not lifetime.is_over(129.0, has_workers=False, **QUIET)
    assert not lifetime.is_over(131.0, has_workers=True, **QUIET)  # a new worker
    assert not lifetime.is_over(160.0, has_workers=False, **QUIET)
    assert lifetime.is_over(161.0, has_workers=False, **QUIET)


def test_it_takes_no_longer_than_allowed() -> None:
    lifetime = Lifetime(Mode.ONCE, 0.0, at_most_s=5.0)
    assert over_at(lifetime, has_workers=True, state=BUSY) == 5
