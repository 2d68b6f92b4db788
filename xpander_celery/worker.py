"""What a worker's main process does around its jobs: opens the journal, observes requests, keeps the relay running,
and flushes at its end. Layer 3; the runtime says what reporting consists of.

A worker whose settings or journal cannot be used stops at its start, with the reason: an exception in a handler of
Celery's signals would be swallowed, SystemExit is not.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from celery import signals

from xpander_celery.errors import XpanderCeleryError
from xpander_celery.guard import Guard, guarded
from xpander_celery.journal import Journal
from xpander_celery.relay.config import RelayConfig
from xpander_celery.relay.launch import Launcher
from xpander_celery.requests import ParentView, observe
from xpander_celery.session import Session

if TYPE_CHECKING:
    from xpander_celery.settings import Settings

logger = logging.getLogger(__name__)

_TICK_S = 3.0
_STOP_FLUSH_S = 5.0
_EXIT_FLUSH_S = 1.0
_CHILD_SPAN_FLUSH_MS = 2000


@dataclass(frozen=True, slots=True)
class Reporting:
    """All that is built once reporting is on. `relay` is None where nothing is to be delivered (tests)."""

    settings: Settings
    session: Session
    journal: Journal
    relay: RelayConfig | None

    @property
    def starts_relay(self) -> bool:
        """Whether the relay is ours to start."""
        return self.relay is not None and self.settings.relay == "auto"

    def flush(self, timeout_s: float, *, launcher: Launcher | None = None) -> bool:
        """Whether all that this machine has written was delivered in time; runs a relay for that where none runs."""
        self.journal.tend()
        if self.relay is None:
            return True
        return (launcher or Launcher(self.relay)).flush(timeout_s, foreground=self.starts_relay)


class Switch(Protocol):
    """The runtime, as far as a worker's life depends on it."""

    guard: Guard

    def turn_on(self, app: Any = None) -> Reporting | None: ...
    def turned_on(self, app: Any = None) -> Reporting | None: ...
    def warn_if_without_key(self) -> None: ...
    def leave_if_idle(self) -> None: ...


class WorkerLife:
    """Listens to the signals of a worker's life. In any other process these never come."""

    def __init__(self, switch: Switch) -> None:
        self.guard = switch.guard
        self._switch = switch
        self.ran_above = False  # in a forked child: whether it is the child of a worker that reports
        self._reporting: Reporting | None = None  # only in the main process of a worker that runs
        self._launcher: Launcher | None = None
        self._unobserve: Callable[[], None] | None = None
        self._step: type | None = None
        self._signals = (
            (signals.worker_init, self.initialized),
            (signals.celeryd_after_setup, self.set_up),
            (signals.worker_shutdown, self.stopped),
            (signals.worker_process_shutdown, self.child_stops),
        )

    @property
    def is_running(self) -> bool:
        """Whether this is the main process of a worker that runs and reports."""
        return self._reporting is not None

    def connect(self) -> None:
        """Listen to the signals; a second time it does nothing."""
        for signal, handler in self._signals:
            signal.connect(handler, weak=False, dispatch_uid=f"xpander_celery.{handler.__name__}")

    def disconnect(self, apps: Iterable[Any]) -> None:
        """Listen no longer, and take the step out of `apps`."""
        for signal, handler in self._signals:
            signal.disconnect(dispatch_uid=f"xpander_celery.{handler.__name__}")
        if self._step is not None:
            for app in apps:
                app.steps["consumer"].discard(self._step)
        self._leave()

    def look_after(self, app: Any) -> None:
        """Have the worker of `app` keep the relay running, if this process is one. `instrument()` may be called within
        its `worker_init`, and handlers that are connected there are not called.
        """
        if "celery.bootsteps" in sys.modules:  # which only workers load
            self._add_step(app)

    @guarded
    def initialized(self, sender: Any = None, **_: Any) -> None:
        """`worker_init`. The worker program sends another signal when logging is set up; embedded workers do not."""
        from celery.apps.worker import Worker  # 85 ms, and loaded already in every worker

        self._add_step(sender.app)
        if not isinstance(sender, Worker):
            self._begin(sender.app)

    @guarded
    def set_up(self, instance: Any = None, **_: Any) -> None:
        """`celeryd_after_setup`: all tasks are known, and no child has been forked."""
        self._begin(instance.app)

    @guarded
    def stopped(self, **_: Any) -> None:
        """`worker_shutdown`: the pool has ended. Cold stops of prefork and solo skip it."""
        self._flush(_STOP_FLUSH_S)
        self._leave()
        self._switch.leave_if_idle()

    @guarded
    def child_stops(self, **_: Any) -> None:
        """`worker_process_shutdown`, the last that a child does: it runs no atexit."""
        reporting = self._switch.turned_on()
        if reporting is not None:
            reporting.session.tracing.flush(_CHILD_SPAN_FLUSH_MS)
            reporting.journal.close()

    @guarded
    def tick(self) -> None:
        """Every few seconds, on the consumer's timer."""
        reporting = self._reporting
        if reporting is None:
            return
        reporting.journal.tend()
        if self._launcher is not None and reporting.starts_relay:
            self._launcher.tick()

    def forget(self) -> None:
        """In a forked child: this is the main process's business."""
        self.ran_above = self.ran_above or self.is_running
        self._reporting = self._launcher = self._unobserve = None

    def _add_step(self, app: Any) -> None:
        if self._step is None:
            self._step = _step_of(self)
        app.steps["consumer"].add(self._step)

    def _begin(self, app: Any) -> None:
        if self._reporting is not None:
            return
        try:
            reporting = self._switch.turn_on(app)
            if reporting is None:
                self._switch.warn_if_without_key()
                return
            reporting.journal.open()
            if getattr(reporting.journal, "is_off", False):
                return  # no place for it, and none was asked for: the journal said so
            reporting.session.tracing.prepare()
            for task in app.tasks.values():
                try:
                    reporting.session.plan_of(task)
                except XpanderCeleryError:
                    raise
                except Exception:  # noqa: BLE001 - of this task something cannot be read; the others are reported
                    self.guard.note("TaskPlan")
        except XpanderCeleryError as error:
            logger.critical("This worker stops: %s", error, extra={"event": "worker_refused"})
            raise SystemExit(1) from error
        self._reporting = reporting
        if reporting.relay is not None:
            self._launcher = Launcher(reporting.relay)
        self._unobserve = observe(app.tasks.values(), ParentView(reporting.session, self.guard))
        atexit.register(self._exits)

    @guarded
    def _exits(self) -> None:
        self._flush(_EXIT_FLUSH_S)
        self._leave()

    def _flush(self, timeout_s: float) -> None:
        if self._reporting is not None:
            self._reporting.flush(timeout_s, launcher=self._launcher)

    def _leave(self) -> None:
        reporting, self._reporting = self._reporting, None
        launcher, self._launcher = self._launcher, None
        unobserve, self._unobserve = self._unobserve, None
        atexit.unregister(self._exits)
        if unobserve is not None:
            unobserve()
        if reporting is not None:
            reporting.journal.close()
        if launcher is not None:
            launcher.close()


class DrainAtExit:
    """Delivers at the end of a process that is no worker what `job()` recorded there."""

    def __init__(self, switch: Switch) -> None:
        self.guard = switch.guard
        self._switch = switch
        self._prepared_in: int | None = None

    def prepare(self) -> None:
        """Drain when this process ends."""
        if self._prepared_in is None:
            self._prepared_in = os.getpid()
            atexit.register(self._drain)
            _finally_in_multiprocessing(self._drain)

    def cancel(self) -> None:
        """Do not, after all; or not yet, in a forked child."""
        self._prepared_in = None
        atexit.unregister(self._drain)

    @guarded
    def _drain(self) -> None:
        reporting = self._switch.turned_on()
        if reporting is not None and self._prepared_in == os.getpid():
            self._prepared_in = None
            reporting.flush(_STOP_FLUSH_S)
            reporting.journal.close()


def _finally_in_multiprocessing(drain: Callable[[], object]) -> None:
    """Call `drain` at the end of a process that multiprocessing forked: Python 3.11 runs no atexit there
    (multiprocessing/popen_fork.py, `Popen._launch`).
    """
    process = sys.modules.get("multiprocessing.process")
    if process is not None and process.parent_process() is not None:
        from multiprocessing.util import Finalize

        Finalize(None, drain, exitpriority=0)


def _step_of(life: WorkerLife) -> type:
    """A step of the consumer: started with each connection to the broker, after which Celery clears its timer."""
    from celery import bootsteps  # 15 ms that other processes are spared

    class RelayStep(bootsteps.StartStopStep):  # type: ignore[misc]  # celery is untyped
        label = "xpander_celery relay"
        name = "xpander_celery.relay"

        def __init__(self, consumer: Any, **keywords: Any) -> None:
            super().__init__(consumer, **keywords)
            self._entry: Any = None

        def start(self, consumer: Any) -> None:
            life.tick()
            self._entry = consumer.timer.call_repeatedly(_TICK_S, life.tick)

        def stop(self, consumer: Any) -> None:
            if self._entry is not None:
                self._entry.cancel()
                self._entry = None

    return RelayStep
