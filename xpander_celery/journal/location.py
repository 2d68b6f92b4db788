"""Where the journal of a destination lies, and whether that place may be used. It knows nothing of what lies there."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import stat
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from xpander_celery.errors import JournalError
from xpander_celery.redis_address import Address

_logger = logging.getLogger(__name__)

_NETWORK_FILE_SYSTEMS = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "fuse.glusterfs", "fuse.s3fs", "fuse.sshfs", "glusterfs", "gpfs", "lustre"}
    | {"nfs", "nfs4", "smb3", "smbfs"}
)
_MOUNTS = Path("/proc/self/mounts")


def destination_directory(journal: str | None, *, base_url: str | None, organization_id: str | None) -> Path:
    """The folder of one destination (platform and organization; agents share it), below `journal` or the default root.

    Nothing is created. Raises `JournalError` if no directory is given and the user has no home.
    """
    try:
        root = Path(journal).expanduser() if journal is not None else _default_root()
    except RuntimeError as error:
        raise JournalError(
            "no directory for the journal: this user has no home; set XPANDER_CELERY_JOURNAL to an absolute path"
        ) from error
    url = urlsplit((base_url or "").strip().rstrip("/"))
    place = f"{url.scheme.lower()}://{url.netloc.lower()}{url.path}"
    name = re.sub(r"[^a-z0-9.]+", "-", url.netloc.lower().rpartition("@")[2]) or "default"
    digest = hashlib.sha256(f"{place}\n{organization_id or ''}".encode()).hexdigest()[:12]
    return root.absolute() / f"{name}-{digest}"


def root_beside(address: Address) -> Path:
    """The root of what this machine keeps beside a journal in Redis: events that wait for Redis, and a relay's index.

    In the state directory, or where that cannot be written, as in a read-only container, in the temporary one: Redis
    keeps all that has to survive. Nothing is created.
    """
    name = f"redis-{hashlib.sha256(str(address).encode()).hexdigest()[:12]}"
    try:
        root = _default_root()
    except (RuntimeError, OSError):  # this user has no home
        root = None
    if root is None or not _may_be_made(root):
        root = Path(tempfile.gettempdir()) / f"xpander-celery-{os.geteuid()}"
    return root / name


def _may_be_made(directory: Path) -> bool:
    place = next(parent for parent in (directory, *directory.parents) if parent.exists())
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def _default_root() -> Path:
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    if state.is_absolute():  # a relative one is to be ignored, says the XDG specification
        return state / "xpander-celery"
    return Path.home() / ".local" / "state" / "xpander-celery"


def prepare(directory: Path) -> None:
    """Make sure that `directory` exists, is ours alone (mode 0700) and can be written; else raise `JournalError`.

    The folder above it may also belong to root, as mounted volumes do.
    """
    try:
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_other_owner(directory.parent, directory.parent.stat(), allowed={os.geteuid(), 0})
        directory.mkdir(mode=0o700, exist_ok=True)
        found = directory.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise JournalError(f"{directory}: is no directory")
        _refuse_other_owner(directory, found, allowed={os.geteuid()})
        if stat.S_IMODE(found.st_mode) & 0o077:
            directory.chmod(0o700)
    except OSError as error:
        raise JournalError(f"{directory}: cannot be used as the journal: {error.strerror or error}") from error
    if not os.access(directory, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise JournalError(f"{directory}: cannot be written")


def _refuse_other_owner(directory: Path, found: os.stat_result, *, allowed: set[int]) -> None:
    if found.st_uid not in allowed:
        raise JournalError(f"{directory}: belongs to another user (uid {found.st_uid}); choose another directory")


def warn_of_network_file_system(directory: Path) -> None:
    """Log a warning where file locks may not tell whether another host's process is alive. Linux only."""
    kind = _file_system_of(directory)
    if kind in _NETWORK_FILE_SYSTEMS:
        _logger.warning(
            "The journal %s lies on a network file system (%s): give each host a local directory of its own",
            directory,
            kind,
            extra={"event": "journal_on_network"},
        )


def _file_system_of(directory: Path) -> str | None:
    try:
        mounts = _MOUNTS.read_text(errors="replace")
    except OSError:
        return None
    place = os.path.realpath(directory)
    best, kind = -1, None
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[1])
        inside = place == point or place.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= best:  # of two mounts on one point the later one is seen
            best, kind = len(point), fields[2]
    return kind
