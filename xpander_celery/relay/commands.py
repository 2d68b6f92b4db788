"""`xpander-celery relay …` and `xpander-celery journal …`: run a relay, see how it stands, and tend what is dead.

Commands work beside a running relay, which then does what is asked, and without one. Results go to standard output, as
text or with `--json` as JSON; progress and problems go to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

from xpander_celery.errors import JournalError

if TYPE_CHECKING:
    from xpander_celery.relay.config import RelayConfig

_PHASES = ("dead", "waiting", "held", "running", "settled")
_INTERNAL = {"waiting": "due", "running": "open"}
_ANSWERS_WITHIN_S = 60.0
_STALE_AFTER_S = 30.0
_COUNTERS = ("appended", "delivered", "retried", "died", "dropped", "corrupt")  # there also where they are 0

_Ask = Callable[..., dict[str, Any]]


def add_parsers(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `relay` and `journal`."""
    relay = subparsers.add_parser("relay", help="run the relay in the foreground, or see how it stands")
    how = relay.add_mutually_exclusive_group()
    how.add_argument(
        "--once",
        action="store_true",
        help="deliver what is there and end (73: another runs, 75: some is left)",
    )
    how.add_argument("--check", action="store_true", help="say how the running relay stands (1: none is well)")
    relay.add_argument("--timeout", type=float, metavar="SECONDS", help="with --once: for how long at most")
    relay.add_argument("--json", action="store_true", help="with --check: as JSON")
    relay.set_defaults(run_with_config=_relay)

    journal = subparsers.add_parser("journal", help="see and tend what is not delivered")
    actions = journal.add_subparsers(title="actions", metavar="ACTION", required=True)

    def action(name: str, text: str, run: Callable[[argparse.Namespace, RelayConfig], int]) -> argparse.ArgumentParser:
        parser = actions.add_parser(name, help=text, description=text)
        parser.add_argument("--json", action="store_true", help="as JSON")
        parser.set_defaults(run_with_config=run)
        return parser

    listing = action("list", "list reports: the dead ones, or those of another phase", _list)
    listing.add_argument("--phase", choices=_PHASES, default="dead")
    listing.add_argument("--limit", type=int, default=50, metavar="N", help="at most N of them (default 50; 0: all)")
    show = action("show", "show everything known of one job", _show)
    show.add_argument("id", metavar="ID")
    for name, text in (("requeue", "let dead reports be tried again"), ("purge", "forget dead reports for good")):
        parser = action(name, text, _requeue if name == "requeue" else _purge)
        which = parser.add_mutually_exclusive_group(required=True)
        which.add_argument("id", nargs="?", metavar="ID")
        which.add_argument("--reason", metavar="TEXT", help="those whose reason holds this text")
        which.add_argument("--all", action="store_true")
    drain = action("drain", "wait until everything is delivered (75: something is left)", _drain)
    drain.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS", help="for how long at most (300)")


# The relay


def _relay(arguments: argparse.Namespace, config: RelayConfig) -> int:
    from xpander_celery.relay.launch import MODULE

    if arguments.check:
        return _check(arguments, config)
    command = [sys.executable, "-P", "-m", MODULE, "--once" if arguments.once else "--stay"]
    if arguments.timeout is not None:
        command += ["--for", str(arguments.timeout)]
    sys.stdout.flush()
    return os.execve(command[0], command, {**os.environ, **config.to_environ()})  # in a process as light as it gets


def _check(arguments: argparse.Namespace, config: RelayConfig) -> int:
    from xpander_celery.relay.status import Status, is_running

    status = Status.read(config.directory)
    age_s = Status.age_s(config.directory) if status is not None else None
    runs = is_running(config.directory)
    is_well = runs and age_s is not None and age_s < _STALE_AFTER_S
    if arguments.json:
        known = asdict(status) if status is not None else {}
        counters = dict.fromkeys(_COUNTERS, 0) | known.get("counters", {})
        _print_json({"running": runs, "well": is_well, **known, "counters": counters})
        return 0 if is_well else 1
    if status is None:
        _print(f"No relay has run for {config.directory}.")
        return 1
    state = "runs" if is_well else f"runs, but has not been heard of for {age_s:.0f} s" if runs else "does not run"
    _print(f"The relay {state} (process {status.pid}, release {status.version}).")
    if not status.leads:
        leader = f"{status.leader} leads" if status.leader else "no other was heard of lately"
        _print(f"It stands by: {leader}.")
        return 0 if is_well else 1
    if status.reason:
        _print(f"Delivery is {status.flow}: {status.reason}")
    for agent_id, reason in status.held_agents.items():
        _print(f"Agent {agent_id} is paused: {reason}")
    oldest = f", the oldest for {status.oldest_waiting_s:.0f} s" if status.waiting + status.held else ""
    _print(f"waiting {status.waiting}, held {status.held}{oldest}; dead {status.dead}; running jobs {status.running}")
    _print("so far: " + ", ".join(f"{name} {count}" for name, count in sorted(status.counters.items()) if count))
    return 0 if is_well else 1


# The journal


def _list(arguments: argparse.Namespace, config: RelayConfig) -> int:
    left = arguments.limit or sys.maxsize
    after: list[Any] = []
    with _desk(config) as ask:
        while left > 0:
            phase = _INTERNAL.get(arguments.phase, arguments.phase)
            page = ask("list", phase=phase, limit=min(left, 500), after=after)
            for job in page["jobs"]:
                _print_json(_named(job)) if arguments.json else _print(_line(job))
            left -= len(page["jobs"])
            after = page["after"]
            if not page["jobs"]:
                break
    return 0


def _show(arguments: argparse.Namespace, config: RelayConfig) -> int:
    with _desk(config) as ask:
        job = ask("show", job_id=arguments.id)["job"]
    if job is None:
        raise JournalError(f"nothing is known of {arguments.id}: it was never seen, or is settled for long")
    if arguments.json:
        _print_json(_named(job))
        return 0
    for name, value in _named(job).items():
        if name not in ("report", "state"):
            _print(f"{name:>16}  {_date(value) if name in ('since', 'at') else value}")
    _print(json.dumps(job["report"] or job["state"], indent=2, ensure_ascii=False))
    return 0


def _requeue(arguments: argparse.Namespace, config: RelayConfig) -> int:
    return _tend(arguments, config, "requeue")


def _purge(arguments: argparse.Namespace, config: RelayConfig) -> int:
    return _tend(arguments, config, "purge")


def _tend(arguments: argparse.Namespace, config: RelayConfig, verb: str) -> int:
    """Step by step through the dead reports, so that a running relay goes on meanwhile."""
    from xpander_celery.relay.status import Status

    status = Status.read(config.directory)
    done = seen = 0
    which: dict[str, Any] = {"job_id": arguments.id, "reason": arguments.reason}
    with _desk(config) as ask, _Progress(status.dead if status is not None else 0) as progress:
        while True:
            step = ask(verb, **which)
            done, seen = done + step["done"], seen + step["seen"]
            progress.show(seen)
            if not step["after"]:
                break
            which |= {"after": step["after"], "until": step["until"]}
    if arguments.id is not None and not done:
        raise JournalError(f"{arguments.id} is not among the dead reports")
    what = "requeued" if verb == "requeue" else "purged"
    _print_json({what: done}) if arguments.json else _print(f"{done} {what}")
    return 0


def _drain(arguments: argparse.Namespace, config: RelayConfig) -> int:
    """Through the running relay, or one that runs just for this."""
    from xpander_celery.relay.journals import leader
    from xpander_celery.relay.launch import Launcher
    from xpander_celery.relay.status import EXIT_LEFT, Status

    deadline = time.monotonic() + arguments.timeout
    launcher = Launcher(config)
    before = Status.read(config.directory)
    total = before.waiting + before.held if before is not None else 0
    is_drained = config.journal is None and not config.directory.exists()
    with _Progress(total) as progress:
        while not is_drained and (left_s := deadline - time.monotonic()) > 0:
            is_drained = launcher.flush(min(1.0, left_s) if sys.stderr.isatty() else left_s)
            status = Status.read(config.directory)
            progress.show(total - (status.waiting + status.held if status is not None and not is_drained else 0))
            if not is_drained and status is not None and status.flow != "flowing":
                time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))  # it is told at once that nothing moves
    status = leader(config) or Status.read(config.directory)
    left = {"waiting": status.waiting, "held": status.held, "dead": status.dead} if status is not None else {}
    if arguments.json:
        _print_json({"drained": is_drained, **left, "reason": status.reason if status is not None else ""})
    else:
        _print("Everything is delivered." if is_drained else f"Not everything is delivered: {left}")
    return 0 if is_drained else EXIT_LEFT


@contextlib.contextmanager
def _desk(config: RelayConfig) -> Iterator[_Ask]:
    """Whom to ask: the running relay, or the index itself, whose owner we are meanwhile. What waits in Redis is known
    only to the relay that leads.
    """
    from xpander_celery.relay.journals import ask
    from xpander_celery.relay.status import RelayLock, is_running

    def ask_relay(verb: str, **arguments: Any) -> dict[str, Any]:
        answer = ask(config, verb, timeout_s=_ANSWERS_WITHIN_S, **arguments)
        if answer is None and config.journal is not None:
            raise JournalError("no relay leads, or Redis is away: `xpander-celery relay` starts one here")
        if answer is None:
            raise JournalError(f"the relay of {config.directory} does not answer")
        return _checked(answer)

    if config.journal is not None:
        yield ask_relay
        return
    if not config.directory.exists():
        raise JournalError(f"no journal is at {config.directory}: nothing was recorded for this destination so far")
    lock = None if is_running(config.directory) else RelayLock.acquire(config.directory)
    if lock is None:
        yield ask_relay
        return
    from xpander_celery.relay.desk import Desk
    from xpander_celery.relay.index import Index

    try:
        with contextlib.closing(Index.open(config.directory, max_bytes=config.max_index_bytes)) as index:
            desk = Desk(index, now=time.time, redelivery_wait_s=config.redelivery_wait_s)
            yield lambda verb, **arguments: _checked(desk.answer(verb, arguments))
    finally:
        lock.release()


def _checked(answer: dict[str, Any]) -> dict[str, Any]:
    if "error" in answer:
        raise JournalError(answer["error"])
    return answer


# What is printed


class _Progress:
    """A bar on standard error, where that is a terminal and there is something to wait for."""

    _WIDTH = 30

    def __init__(self, total: int) -> None:
        self._total = total
        self._is_shown = sys.stderr.isatty() and total > 0

    def __enter__(self) -> _Progress:
        self.show(0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_shown:
            sys.stderr.write("\n")

    def show(self, done: int) -> None:
        if self._is_shown:
            share = min(1.0, max(0.0, done / self._total))
            bar = "█" * round(share * self._WIDTH)
            sys.stderr.write(f"\r{bar:░<{self._WIDTH}} {share:4.0%}  {done:,}/{self._total:,}")
            sys.stderr.flush()


def _named(job: dict[str, Any]) -> dict[str, Any]:
    """The phase as the user knows it."""
    names = {internal: name for name, internal in _INTERNAL.items()}
    return {**job, "phase": names.get(job["phase"], job["phase"])}


def _line(job: dict[str, Any]) -> str:
    tried = f"{job['tries']} tries" if job["tries"] else ""
    return (
        f"{job['id']:<36}  {_date(job['at'] or job['since'])}  {job['agent_id'] or '-'}  {tried}  {job['reason'] or ''}"
    )


def _date(seconds: float | None) -> str:
    return "-" if seconds is None else datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _print_json(value: Any) -> None:
    _print(json.dumps(value, ensure_ascii=False))
