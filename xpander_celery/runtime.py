"""Wires the worker side: `instrument()`, `uninstrument()`, `job()`, `flush()`. Layer 4, and the only place that does.

Installing connects signals and nothing else: no file, thread, process or socket, since web processes, beat, scripts and
`celery inspect` import the app too. What costs something is built at worker start, or for the first job that runs
elsewhere. One runtime serves all apps of a process, with one set of settings, which stays as it is while jobs run.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

from billiard.process import current_process
from celery import Celery
from celery._state import get_current_task
from celery.local import Proxy

from xpander_celery import task as tasks
from xpander_celery.assembly import (
    journal_of,
    load_settings,
    recorder_of,
    relay_config,
    settings_class,
    visibility_timeout_s,
)
from xpander_celery.errors import ConfigurationError, JournalError, XpanderCeleryError
from xpander_celery.guard import Guard
from xpander_celery.hooks import Hooks
from xpander_celery.journal import Journal
from xpander_celery.plans import Plans
from xpander_celery.recording.blocks import JobBlock
from xpander_celery.recording.recording import Recording
from xpander_celery.relay.launch import Launcher
from xpander_celery.session import Session
from xpander_celery.task import TaskOptions, XpanderTask, reported
from xpander_celery.worker import DrainAtExit, Reporting, WorkerLife

if TYPE_CHECKING:
    from xpander_celery.recording.spans import Tracing
    from xpander_celery.settings import Settings

__all__ = ["TaskOptions", "XpanderTask", "flush", "instrument", "job", "reported", "uninstrument"]

logger = logging.getLogger(__name__)

_SECRET = ("api_key", "journal")  # keywords whose values are in no message
_NO_KEY = (
    "Reporting to xpander.ai is off: there is no API key. Set XPANDER_API_KEY (or xpander_api_key in Celery's "
    "configuration, or instrument(api_key=...)) and start again"
)


def instrument(app: Celery, **settings: Any) -> None:
    """Report the jobs of every task of `app`; each keyword is one of `Settings`, and wins over configuration and
    environment. `tasks=["reports.*"]` and `exclude=[...]` narrow it.

    May come before or after the tasks are defined, more than once, and for several apps: a process has one set of
    settings, so the keywords of all apps hold together, and a later call for the same app replaces its own. While a
    worker or a job runs they cannot change: a warning says so. Raises `ConfigurationError` for a setting that is
    malformed or has another value for another app, naming it and the remedy. A missing API key raises nothing: workers
    say so when they start.
    """
    if issubclass(type(app), Proxy):
        app = app._get_current_object()
    if not isinstance(app, Celery):
        raise ConfigurationError("app", f"is a {type(app).__name__}", "Call instrument(app) with your Celery app.")
    loaded = load_settings(app, settings)
    if loaded.disabled:
        _switch_off()
        return
    if _runtime is not None and _runtime.is_switched_off:
        _runtime.leave()
    _installed().serve(app, settings)


def uninstrument() -> None:
    """Undo `instrument()`, for all apps; what is in the journal is still delivered. Jobs that run are recorded to their
    end, and a worker's main process goes on to tell how those of its children end.
    """
    if _runtime is not None:
        _runtime.uninstall()


def job(name: str, *, agent_id: str | None = None, id: str | None = None, input: Any = None) -> JobBlock:  # noqa: A002
    """Report a block of any code as a job: `with job("digest", input=day) as job: job.result = ...`, or `async with`.

    `agent_id` defaults to that of the settings, `id` to a new one; the same id again updates the same record. An
    exception makes it a failed job and passes through. Needs no `instrument()`. Where no worker runs on this machine,
    what was recorded is delivered when the process ends, within 5 s, or by `flush()`.
    """

    def begin(job_id: str) -> Recording | None:
        if _runtime is None and _is_disabled_by_environment():
            return None
        return _installed().begin_block(name, job_id, agent_id, input)

    return JobBlock(begin, id)


def flush(timeout_s: float = 5.0) -> bool:
    """Deliver what this machine's jobs have written until now; False if that took longer, and then nothing is lost.

    Needs no `instrument()`. Where reporting is off, there is nothing to deliver.
    """
    return _runtime.flush(timeout_s) if _runtime is not None else _flushed(None, timeout_s)


@contextmanager
def recording_into(
    journal: Journal, app: Celery | None, keywords: Mapping[str, Any], *, agent_id: str
) -> Iterator[None]:
    """Record into `journal`, and deliver nothing; afterwards all is as before. For `xpander_celery.testing`.

    `agent_id` is for tasks that have no agent otherwise.
    """
    global _runtime
    outer = _runtime
    inner = Runtime(journal, like=outer, overrides=keywords, agent_id=agent_id)
    inner.check(app)
    if outer is not None:
        outer.suspend()
    _runtime = inner
    try:
        inner.install()
        inner.serve(app, inner.keywords_of(app))
        yield
    finally:
        inner.leave()
        _runtime = outer
        if outer is not None and not outer.is_switched_off:
            outer.install()


def settings_of(app: Any = None) -> Settings:
    """The settings that hold for `app`, or for a process without one; raises `ConfigurationError`."""
    if _runtime is not None:
        return _runtime.check(app)
    return load_settings(app, {})


class Runtime:
    """The installed hooks, and what they work with once it is needed.

    For tests: `journal` is used instead of files, and nothing is delivered; apps and settings are taken from `like`;
    `overrides` win over all settings, `agent_id` is for where there is none.
    """

    def __init__(
        self,
        journal: Journal | None = None,
        *,
        like: Runtime | None = None,
        overrides: Mapping[str, Any] | None = None,
        agent_id: str | None = None,
    ) -> None:
        self._overrides = dict(overrides or {})
        self._agent_id = agent_id
        self.guard = Guard()
        self._given: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()
        if like is not None:
            self._given.update(like._given)
        self._given_journal = journal
        self._apps: WeakSet[Any] = WeakSet(like._apps if like is not None else ())
        self._reporting: Reporting | None = None
        self._is_off = False
        self._lacks_key = False
        self._is_leaving = self._has_left = False
        self._has_warned: set[str] = set()
        self._running: set[str] = set()  # the attempts that run in this process
        self._late_spans_s = 5.0
        self._tracing: Tracing | None = None
        self._building = threading.RLock()
        self._hooks = Hooks(self.session_for, self.tracing, self.guard)
        self._worker = WorkerLife(self)
        self._drain = DrainAtExit(self)

    def install(self) -> None:
        """Listen to Celery's signals."""
        self._hooks.connect()
        self._worker.connect()
        for app in self._apps:
            self._worker.look_after(app)

    @property
    def keywords(self) -> dict[str, Any]:
        """Those of all apps together."""
        return {name: value for keywords in self._given.values() for name, value in keywords.items()}

    def keywords_of(self, app: Any) -> dict[str, Any]:
        """Those that were given with this app."""
        return self._given.get(app, {}) if app is not None else {}

    @property
    def is_switched_off(self) -> bool:
        """Whether this one stands for `disabled`, and listens to nothing."""
        return bool(self._overrides.get("disabled"))

    @property
    def is_busy(self) -> bool:
        """Whether a worker or a job runs in this process: its journal must stay open."""
        return self._worker.is_running or bool(self._running)

    def check(self, app: Any, keywords: Mapping[str, Any] | None = None) -> Settings:
        """The settings as they are by now; raises `ConfigurationError` for what is malformed."""
        settings = load_settings(app, {**(self.keywords if keywords is None else keywords), **self._overrides})
        if settings.agent_id is None and self._agent_id is not None:
            settings = settings.model_copy(update={"agent_id": self._agent_id})
        return settings

    def serve(self, app: Any, keywords: Mapping[str, Any]) -> None:
        """Use these settings from now on, and report every task of one more app, if there is one. While a worker or a
        job runs, the settings stay as they are.
        """
        held = {} if self._is_leaving else {k: v for k, v in self._given.items() if k is not app}
        _refuse_conflict(keywords, held.values())
        before, is_new = self.keywords, app is not None and app not in self._apps
        is_changed = {name: value for each in (*held.values(), keywords) for name, value in each.items()} != before
        self._is_leaving = False
        if self._reporting is not None and self.is_busy:
            if is_changed or (is_new and self._worker.is_running):
                self._warn_once(
                    "settings_kept",
                    "instrument() does not take effect: the settings of a running worker cannot change; restart it",
                )
        else:
            if is_new or is_changed or self._is_off:
                self._turn_off()
            self._given = WeakKeyDictionary(held)
            if app is not None:
                self._given[app] = dict(keywords)
            self._late_spans_s = self.check(app).late_spans_s
        if app is not None:
            self._apps.add(app)
            self._worker.look_after(app)

    def suspend(self) -> None:
        """Listen no longer, until `install`."""
        self._hooks.disconnect()
        self._worker.disconnect(self._apps)

    def uninstall(self) -> None:
        """Record no further job, and leave once none runs here and no worker does."""
        self._is_leaving = True
        self._drain.cancel()
        self.leave_if_idle()

    def leave_if_idle(self) -> None:
        """Do what `uninstall` put off."""
        if self._is_leaving and not self.is_busy:
            self.leave()

    def leave(self) -> None:
        """Leave Celery as it was, at once."""
        global _runtime
        if self._has_left:
            return
        self._has_left = True
        self.suspend()
        self._drain.cancel()
        self._turn_off()
        if self._tracing is not None:
            self._tracing.close()
        if _runtime is self:
            _runtime = None

    def session_for(self, sender: Any) -> Session | None:
        """What to work with for a task or consumer, or for a block of code (None); None while reporting is off."""
        reporting = self._reporting
        if self._is_leaving and sender is not None and (reporting is None or get_current_task() is not None):
            return None  # a job that begins now; how earlier ones end is told outside of any
        if reporting is None:
            reporting = self.turned_on(getattr(sender, "app", None))
        return reporting.session if reporting is not None else None

    def tracing(self) -> Tracing:
        """The spans of this process, also where only messages are published."""
        if self._tracing is None:
            from xpander_celery.recording.spans import Tracing  # OpenTelemetry's SDK, 50 ms that many processes save

            self._tracing = Tracing(late_spans_s=self._late_spans_s)
        return self._tracing

    def turned_on(self, app: Any = None) -> Reporting | None:
        """Turn reporting on, if that has not been tried; None where it is off. For processes that are no workers:
        what is wrong with the settings is logged once.
        """
        if self._reporting is None and not self._is_off:
            try:
                self.turn_on(app)
            except (XpanderCeleryError, OSError) as error:
                self._is_off = True
                _say(logging.ERROR, "reporting_off", "Reporting to xpander.ai is off: %s", error)
        return self._reporting

    def turn_on(self, app: Any = None) -> Reporting | None:
        """Build everything from the settings as they are by now; raises `XpanderCeleryError` where that fails. Without
        a place for a journal that nobody named, it warns and stays off.
        """
        with self._building:
            if self._reporting is None and not self._is_off:
                settings = self.check(app)
                can_deliver = settings.api_key is not None or settings.backend is not None
                if self._given_journal is not None or (can_deliver and not settings.disabled):
                    self._reporting = self._built_or_off(settings, app)
                else:
                    self._lacks_key = not settings.disabled
                self._is_off = self._reporting is None
            return self._reporting

    def warn_if_without_key(self) -> None:
        """Say why nothing is reported and how to change it, unless it was switched off on purpose."""
        if self._is_off and self._lacks_key:
            _say(logging.WARNING, "no_api_key", _NO_KEY)

    def begin_block(self, name: str, job_id: str, agent_id: str | None, given: Any) -> Recording | None:
        """A recording for `job()`."""
        was_off = self._is_off
        session = self.session_for(None)
        if session is None:
            if not was_off:
                self.warn_if_without_key()
            return None
        if not self._worker.ran_above:  # else that worker keeps a relay running, and the job would wait
            self._drain.prepare()
        return session.recording_of_block(name, job_id, agent_id, given)

    def flush(self, timeout_s: float) -> bool:
        """Whether all that is written was delivered in time, also by others where this process recorded nothing."""
        reporting = self._reporting
        if reporting is not None:
            return reporting.flush(timeout_s)
        return self._given_journal is not None or _flushed(next(iter(self._apps), None), timeout_s)

    def forked(self) -> None:
        """In a forked child: what the worker's main process does is not its business."""
        self._building = threading.RLock()
        self._running.clear()
        self._hooks.forget()
        self._worker.forget()
        self._drain.cancel()

    def _built_or_off(self, settings: Settings, app: Any) -> Reporting | None:
        try:
            reporting = self._built(settings, app)
        except (JournalError, OSError) as error:
            problem = error if isinstance(error, JournalError) else JournalError(f"no place for the journal: {error}")
            if settings.journal is not None:
                raise problem from error
            _say(logging.WARNING, "journal_off", "Reporting is off: %s", problem)
            return None
        if self._given_journal is None and _is_pool_child() and not self._worker.ran_above:
            self._warn_once(
                "instrumented_in_child",
                "Jobs are recorded by this pool child only: the main process of its worker neither delivers them nor "
                "sees them lost. Call instrument() where the app is defined, not in worker_process_init",
            )
        return reporting

    def _built(self, settings: Settings, app: Any) -> Reporting:
        relay = relay_config(settings) if self._given_journal is None else None
        journal = self._given_journal if relay is None else journal_of(settings, relay.directory)
        assert journal is not None
        plans = Plans(settings, self._apps, visibility_timeout_s(app) if app is not None else None)
        recorder = recorder_of(settings, self._counted(journal.append))
        session = Session(plans, recorder, self.tracing(), lambda: journal.process_id)
        return Reporting(settings, session, journal, relay)

    def _counted(self, append: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
        """`append` that knows which attempts run in this process."""
        running = self._running

        def emit(event: dict[str, Any]) -> object:
            kind = event["kind"]
            if kind == "started":
                running.add(event["attempt_id"])
            appended = append(event)
            if kind == "finished":
                running.discard(event["attempt_id"])
                if self._is_leaving:
                    self.leave_if_idle()
            return appended

        return emit

    def _warn_once(self, event: str, message: str) -> None:
        if event not in self._has_warned:
            self._has_warned.add(event)
            _say(logging.WARNING, event, message)

    def _turn_off(self) -> None:
        reporting, self._reporting = self._reporting, None
        self._is_off = self._lacks_key = False
        if reporting is not None:
            reporting.journal.close()


_runtime: Runtime | None = None


def _installed() -> Runtime:
    """The runtime of this process, installed if there was none."""
    global _runtime
    if _runtime is None:
        _runtime = Runtime()
        _runtime.install()
    return _runtime


def _switch_off() -> None:
    """Undo what was installed, and have neither `job()` nor a task that is marked later install it again."""
    global _runtime
    uninstrument()
    if _runtime is None:
        _runtime = Runtime(overrides={"disabled": True})


def _install_for_marked_task() -> None:
    """A task was marked to be reported, so somebody has to listen, with or without `instrument()`."""
    if _runtime is None and not _is_disabled_by_environment():
        _installed()


def _forked() -> None:
    if _runtime is not None:
        _runtime.forked()


tasks.on_mark(_install_for_marked_task)
os.register_at_fork(after_in_child=_forked)


def _flushed(app: Any, timeout_s: float) -> bool:
    """Whether what others wrote to our journal was delivered in time, for a process that has not written to it."""
    try:
        settings = settings_of(app)
        if settings.disabled or (settings.api_key is None and settings.backend is None):
            return True
        relay = relay_config(settings)
    except XpanderCeleryError as error:
        _say(logging.ERROR, "reporting_off", "Reporting to xpander.ai is off: %s", error)
        return False
    if relay.journal is None and not relay.directory.exists():
        return True
    return Launcher(relay).flush(timeout_s, foreground=settings.relay == "auto")


def _say(level: int, event: str, message: str, *values: object) -> None:
    """Log, and let no handler of the user's fail a job: there is nobody left to tell."""
    with suppress(Exception):
        logger.log(level, message, *values, extra={"event": event})


def _refuse_conflict(keywords: Mapping[str, Any], of_others: Iterable[Mapping[str, Any]]) -> None:
    """Raise `ConfigurationError` for a keyword that another app gave another value: nobody knows which is meant."""
    for held in of_others:
        for name in keywords.keys() & held.keys():
            if keywords[name] != held[name]:
                value = "of another value" if name in _SECRET else repr(held[name])
                raise ConfigurationError(
                    name,
                    f"is {value} for another app of this process; one process has one set of settings",
                    "Give all its apps the same value, or run them in processes of their own.",
                )


def _is_pool_child() -> bool:
    return bool(current_process().name != "MainProcess")


def _is_disabled_by_environment() -> bool:
    try:
        return settings_class().load().disabled
    except ConfigurationError:  # raised again, where somebody can act on it
        return False
