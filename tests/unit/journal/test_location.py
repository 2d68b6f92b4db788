"""Where a journal lies, and which places are refused."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from xpander_celery.errors import JournalError
from xpander_celery.journal import location
from xpander_celery.journal.location import destination_directory, prepare, root_beside, warn_of_network_file_system
from xpander_celery.redis_address import Address

URL = "https://inbound.xpander.ai"


def place(journal: str | None = "/j", base_url: str | None = URL, organization_id: str | None = "org") -> Path:
    return destination_directory(journal, base_url=base_url, organization_id=organization_id)


def test_a_destination_has_a_folder_of_its_own() -> None:
    folders = {
        place(),
        place(organization_id="other"),
        place(organization_id=None),
        place(base_url="https://inbound.stg.xpander.ai"),
        place(base_url=URL + "/v1"),
        place(base_url=None),
    }
    assert len(folders) == 6
    assert {folder.parent for folder in folders} == {Path("/j")}


def test_the_folder_is_named_after_the_host() -> None:
    assert place().name.startswith("inbound.xpander.ai-")
    assert place(base_url="http://127.0.0.1:8000").name.startswith("127.0.0.1-8000-")


@pytest.mark.parametrize("same", [URL + "/", " " + URL, "HTTPS://Inbound.Xpander.AI"])
def test_one_destination_written_in_two_ways_is_one(same: str) -> None:
    assert place(base_url=same) == place()


def test_a_password_in_a_url_is_not_in_the_name() -> None:
    assert "secret" not in str(place(base_url="https://user:secret@host"))


def test_beside_a_redis_a_machine_keeps_little_in_its_state_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    roots = {root_beside(Address.parse(url)) for url in ("redis://h/1", "redis://h/2", "redis://g/1")}
    assert len(roots) == 3
    assert {root.parent for root in roots} == {tmp_path / "xpander-celery"}
    assert root_beside(Address.parse("redis://user:password@h/1")) in roots


def test_where_that_cannot_be_written_it_is_kept_in_the_temporary_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(location.os, "access", lambda place, mode: False)  # to root all places may be written
    monkeypatch.setattr(location.tempfile, "tempdir", str(tmp_path))
    assert root_beside(Address.parse("redis://h/1")).parent == tmp_path / f"xpander-celery-{os.geteuid()}"


def test_without_a_home_it_is_kept_in_the_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(location.tempfile, "tempdir", str(tmp_path))
    assert root_beside(Address.parse("redis://h/1")).parent == tmp_path / f"xpander-celery-{os.geteuid()}"


def test_a_relative_directory_stays_where_it_was_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert place("journal").parent == tmp_path / "journal"


def test_the_default_is_the_users_state_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert place(None).parent == Path("/home/someone/.local/state/xpander-celery")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert place(None).parent == Path("/home/someone/.local/state/xpander-celery")
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert place(None).parent == Path("/state/xpander-celery")
    assert place("~/here").parent == Path("/home/someone/here")


@pytest.mark.parametrize("journal", [None, "~/here"])
def test_a_user_without_a_home_is_told_what_to_set(journal: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(path: str) -> str:
        return path

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", no_home)
    with pytest.raises(JournalError, match="XPANDER_CELERY_JOURNAL"):
        place(journal)


def test_a_prepared_directory_is_for_its_owner_alone(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b"
    prepare(directory)
    prepare(directory)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(directory.parent.stat().st_mode) & 0o077 in (0, 0o055)


def test_a_directory_that_was_open_to_others_is_closed(tmp_path: Path) -> None:
    directory = tmp_path / "destination"
    directory.mkdir(mode=0o755)
    prepare(directory)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to another user")
@pytest.mark.parametrize("depth", ["root", "destination"])
def test_another_users_directory_is_refused(tmp_path: Path, depth: str) -> None:
    directory = tmp_path / "root" / "destination"
    directory.mkdir(parents=True)
    os.chown(directory if depth == "destination" else directory.parent, 12345, 12345)
    with pytest.raises(JournalError, match=r"belongs to another user \(uid 12345\)"):
        prepare(directory)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_volume_that_belongs_to_root_is_taken_and_an_unwritable_one_refused(tmp_path: Path) -> None:
    volume, closed = tmp_path / "volume", tmp_path / "closed"
    volume.mkdir()
    volume.chmod(0o777)
    closed.mkdir(mode=0o755)
    for parent in (tmp_path, *tmp_path.parents):
        parent.chmod(parent.stat().st_mode | 0o011)
    child = os.fork()
    if child == 0:
        failed = 1
        try:
            os.setuid(12345)
            prepare(volume / "destination")
            try:
                prepare(closed / "destination")
            except JournalError as error:
                failed = 0 if str(closed) in str(error) else 2
        finally:
            os._exit(failed)
    assert os.waitpid(child, 0)[1] == 0
    assert (volume / "destination").stat().st_uid == 12345


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    for wrong in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "link"):
        with pytest.raises(JournalError, match=str(tmp_path)):
            prepare(wrong)


@pytest.mark.parametrize(("kind", "warned"), [("nfs4", True), ("cifs", True), ("ext4", False), ("tmpfs", False)])
def test_a_network_file_system_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str, warned: bool
) -> None:
    directory = tmp_path / "my state" / "destination"
    directory.mkdir(parents=True)
    mounts = tmp_path / "mounts"
    escaped = str(tmp_path / "my state").replace(" ", r"\040")
    mounts.write_text(f"/dev/vda / ext4 rw 0 0\nserver:/x {escaped} {kind} rw 0 0\nnoise\nproc /proc proc rw 0 0\n")
    monkeypatch.setattr(location, "_MOUNTS", mounts)
    warn_of_network_file_system(directory)
    assert ("network file system" in caplog.text) is warned


def test_a_system_without_a_list_of_mounts_is_not_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(location, "_MOUNTS", tmp_path / "none")
    warn_of_network_file_system(tmp_path)
    assert caplog.records == []
