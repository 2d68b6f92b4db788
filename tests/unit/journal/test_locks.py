"""Files locked from their first moment, and the liveness that is made of them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from xpander_celery.journal import liveness
from xpander_celery.journal.locks import create_locked, is_abandoned, is_free, is_stale_temporary


def test_a_created_file_is_locked_private_and_not_inherited(tmp_path: Path) -> None:
    descriptor = create_locked(tmp_path / "a")
    assert not is_abandoned(tmp_path / "a")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    assert not os.get_inheritable(descriptor)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    os.close(descriptor)
    assert is_abandoned(tmp_path / "a")


def test_no_moment_shows_the_file_unlocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename
    seen: list[bool] = []

    def watch(source: Path, target: Path) -> Path:
        moved = rename(source, target)
        seen.append(is_abandoned(target))
        return moved

    monkeypatch.setattr(Path, "rename", watch)
    os.close(create_locked(tmp_path / "a"))
    assert seen == [False]


def test_a_creation_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, target: Path) -> Path:
        raise OSError("no")

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"):
        create_locked(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_two_readers_do_not_take_each_other_for_the_writer(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with (tmp_path / "a").open("rb") as one, (tmp_path / "a").open("rb") as two:
        assert is_free(one.fileno())
        assert is_free(two.fileno())


def test_a_missing_file_is_abandoned_and_an_unreadable_place_is_not(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert is_abandoned(tmp_path / "missing")
    assert not is_abandoned(tmp_path / "file" / "below")


def test_a_temporary_file_that_is_still_locked_is_not_stale(tmp_path: Path) -> None:
    path = tmp_path / ".a.ab.new"
    descriptor = create_locked(path)
    os.utime(path, (0, 0))
    assert not is_stale_temporary(path)
    os.close(descriptor)
    assert is_stale_temporary(path)


def test_a_process_is_alive_while_it_holds_its_file(tmp_path: Path) -> None:
    process_id = liveness.new_process_id()
    assert not liveness.is_alive(tmp_path, process_id)
    descriptor = liveness.announce(tmp_path, process_id)
    assert liveness.is_alive(tmp_path, process_id)
    os.close(descriptor)
    assert not liveness.is_alive(tmp_path, process_id)


def test_a_withdrawn_process_is_dead_at_once(tmp_path: Path) -> None:
    process_id = liveness.new_process_id()
    descriptor = liveness.announce(tmp_path, process_id)
    liveness.withdraw(tmp_path, process_id)
    assert not liveness.is_alive(tmp_path, process_id)
    os.close(descriptor)


def test_a_child_that_holds_on_to_an_inherited_file_is_what_closing_at_fork_prevents(tmp_path: Path) -> None:
    """The kernel's rule that makes closing necessary: the lock lives as long as any copy of the descriptor."""
    process_id = liveness.new_process_id()
    descriptor = liveness.announce(tmp_path, process_id)
    copy = os.dup(descriptor)
    os.close(descriptor)
    assert liveness.is_alive(tmp_path, process_id)
    os.close(copy)
    assert not liveness.is_alive(tmp_path, process_id)
