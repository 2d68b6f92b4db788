"""The relay's process: holds the lock, gives the core real time and signals, and puts a damaged index aside."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from xpander_celery.errors import ConfigurationError, JournalError
from xpander_celery.journal import liveness
from xpander_celery.journal.location import prepare
from xpander_celery.relay.clock import Clock
from xpander_celery.relay.config import RelayConfig
from xpander_celery.relay.core import Relay
from xpander_celery.relay.index import Index
from xpander_celery.relay.journals import open_reader
from xpander_celery.relay.lifetime import LINGER_S, Lifetime, Mode
from xpander_celery.relay.schema import IndexDamagedError, IndexNewerError, quarantine
from xpander_celery.relay.status import EXIT_LEFT, EXIT_TAKEN, EXIT_UNUSABLE, RelayLock, Status
from xpander_celery.relay.targets import make_hook, make_targets
from xpander_celery.relay.upkeep import Upkeep

_WORKERS_EVERY_S = 1.0
_MOST_QUARANTINES = 3
_LEADS_WITHIN_S = 25.0  # where the relay before it died
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Be the relay that `environ` describes; returns the exit code.

    `--stay`: until told to end. `--once [--for SECONDS]`: until everything is delivered. Without: as long as workers.
    """
    os.umask(0o077)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=_FORMAT)
    try:
        config = RelayConfig.from_environ(environ)
        mode = Mode.ONCE if "--once" in arguments else Mode.STAY if "--stay" in arguments else Mode.WITH_WORKERS
        at_most_s = float(arguments[arguments.index("--for") + 1]) if "--for" in arguments else None
        prepare(config.directory)
        lock = RelayLock.acquire(config.directory)
        if lock is None:
            logger.info("another relay runs")
            return EXIT_TAKEN if mode is Mode.ONCE else 0
        return _serve(config, mode, at_most_s)
    except (ConfigurationError, IndexNewerError) as error:
        logger.error("the relay cannot run: %s", error, extra={"event": "relay_unusable"})
        return EXIT_UNUSABLE


def _serve(config: RelayConfig, mode: Mode, at_most_s: float | None) -> int:
    """Run on an index, and on a fresh one whenever it turns out to be damaged."""
    clock = Clock()
    lifetime = Lifetime(mode, clock.now(), at_most_s=at_most_s)
    for attempt in range(_MOST_QUARANTINES + 1):
        try:
            index = Index.open(config.directory, max_bytes=config.max_index_bytes)
            try:
                if attempt:
                    index.record([], clock.now(), counters={"indexes_quarantined": attempt})
                return asyncio.run(_run(config, index, clock, lifetime))
            finally:
                index.close()
        except IndexDamagedError as error:
            seen = Status.read(config.directory)
            kept = quarantine(config.directory)
            logger.error(
                "the index is damaged and was put aside as %s; about %d reports waited in it: %s",
                kept, seen.waiting + seen.held if seen else 0, error, extra={"event": "index_damaged"},
            )  # fmt: skip
    raise JournalError(f"{config.directory}: a fresh index was damaged {_MOST_QUARANTINES} times in a row")


async def _run(config: RelayConfig, index: Index, clock: Clock, lifetime: Lifetime) -> int:
    reader, postboxes = open_reader(config, identity=index.identity, clock=clock.now)
    relay = Relay(
        config,
        index=index,
        reader=reader,
        targets=make_targets(config),
        chance=random.random,
        clock=clock,
        hook=make_hook(config),
        postboxes=postboxes,
    )
    relay.is_eager = lifetime.mode is Mode.ONCE
    upkeep = Upkeep(
        config, index=index, reader=reader, gate=relay.gate, clock=clock.now, leads=lambda: relay.is_leading
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _terminate, lifetime, clock, relay)
    workers = [asyncio.create_task(relay.delivery.work(slot)) for slot in range(config.concurrency)]
    gc.freeze()  # what is loaded by now stays; looking through it again and again is for nothing
    gc.enable()
    logger.info("relay started", extra={"event": "relay_started"})
    try:
        await _turn_until_over(relay, upkeep, lifetime, clock, config.directory, workers)
        await _finish_what_was_begun(relay, lifetime, config.total_timeout_s)
        relay.store()
        with contextlib.suppress(OSError):  # no room: the one before it stays
            upkeep.write_status(clock.now())
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        relay.close()
        reader.close()
    logger.info("relay ends", extra={"event": "relay_ended"})
    if lifetime.mode is not Mode.ONCE or relay.is_drained:
        return 0
    return EXIT_LEFT if relay.is_leading or not upkeep.knows_leader else EXIT_TAKEN


async def _turn_until_over(
    relay: Relay,
    upkeep: Upkeep,
    lifetime: Lifetime,
    clock: Clock,
    directory: Path,
    workers: Sequence[asyncio.Task[None]],
) -> None:
    has_workers, look_at, began = True, 0.0, clock.now()
    while True:
        relay.woken.clear()
        wait_s = relay.turn()
        now = clock.now()
        upkeep.tend(now)
        for worker in workers:
            if worker.done():
                worker.result()  # it ends only by an error, and then the relay ends too
        if now >= look_at:
            has_workers, look_at = _has_workers(directory), now + _WORKERS_EVERY_S
        if relay.is_relieved:
            lifetime.relieve()
        # without workers, what an open job watches is dead: it falls due soon, though the index does not know that yet
        is_settled = relay.next_look() > now + LINGER_S and not (relay.is_watching and not has_workers)
        is_drained = relay.is_drained and (lifetime.mode is Mode.ONCE or is_settled)
        if not relay.is_leading:  # one that stands by has nothing to deliver; it waits longer than a lease lasts
            is_drained = lifetime.mode is not Mode.ONCE
            if lifetime.mode is Mode.ONCE and upkeep.knows_leader and now - began > _LEADS_WITHIN_S:
                return
        if lifetime.is_over(now, has_workers=has_workers, is_quiet=relay.is_quiet, is_drained=is_drained):
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await relay.woken.wait()


async def _finish_what_was_begun(relay: Relay, lifetime: Lifetime, at_most_s: float) -> None:
    relay.delivery.stop()
    deadline = time.monotonic() + at_most_s
    while relay.delivery.is_sending and not lifetime.is_hurried and time.monotonic() < deadline:
        await asyncio.sleep(0.01)


def _terminate(lifetime: Lifetime, clock: Clock, relay: Relay) -> None:
    lifetime.terminate(clock.now())
    relay.woken.set()


def _has_workers(directory: Path) -> bool:
    """Whether any process that writes to this journal lives."""
    with os.scandir(directory) as entries:
        processes = [process_id for entry in entries if (process_id := liveness.process_of(entry.name))]
    return any(liveness.is_alive(directory, process_id) for process_id in processes)
