"""The same call through the official client and through ours, compared to the byte."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
import xpander_sdk

from xpander_celery.backend import Backend, Configuration

from .calls import AGREED, DIFFERENCES, LOAD, Case, Difference
from .capture import Capture, Request

TWIN = {"areport_external_task": "report_external_task", "ainvoke_agent": "invoke_agent", "aload_task": "load_task"}


@dataclass(frozen=True)
class Outcome:
    """What one client did: what it sent, and the error that it ended with."""

    requests: list[Request]
    error: Exception | None

    def meets(self, expected: Any) -> bool:
        if isinstance(expected, str):
            return type(self.error).__name__ == expected
        return self.error is None and bool(expected(self.requests))

    def __str__(self) -> str:
        return "\n".join([*map(str, self.requests), f"{type(self.error).__name__}: {self.error}"])


async def through_the_official(capture: Capture, case: Case) -> Outcome:
    configuration = xpander_sdk.Configuration(
        api_key="key-1", base_url=capture.url + case.base, organization_id=case.organization_id
    )
    if case.method == LOAD:
        call = xpander_sdk.Tasks(configuration=configuration).aget
    else:
        call = getattr(xpander_sdk.Backend(configuration=configuration), case.method)
    return await outcome(capture, call, case.arguments)


async def through_ours(capture: Capture, case: Case, *, synchronous: bool) -> Outcome:
    configuration = Configuration("key-1", case.organization_id, capture.url + case.base)
    async with Backend(configuration) as backend:
        if not synchronous:
            return await outcome(capture, getattr(backend, case.method), case.arguments)
        twin = getattr(backend, TWIN[case.method])
        return await outcome(capture, lambda **arguments: asyncio.to_thread(twin, **arguments), case.arguments)


async def outcome(capture: Capture, call: Any, arguments: dict[str, Any]) -> Outcome:
    capture.take()
    error = None
    try:
        await call(**arguments)
    except Exception as raised:
        error = raised
    return Outcome(capture.take(), error)


@pytest.mark.parametrize("synchronous", [False, True], ids=["asynchronous", "synchronous"])
@pytest.mark.parametrize("case", AGREED, ids=str)
async def test_both_clients_send_the_same(
    capture: Capture, monkeypatch: pytest.MonkeyPatch, case: Case, synchronous: bool
) -> None:
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    official = await through_the_official(capture, case)
    ours = await through_ours(capture, case, synchronous=synchronous)
    assert official.error is None, official
    assert ours.error is None, ours
    assert ours.requests == official.requests, f"\nofficial\n{official}\nours\n{ours}"


def test_the_table_is_as_long_as_was_asked() -> None:
    assert len({str(case) for case in AGREED}) == len(AGREED) >= 40


@pytest.mark.parametrize("synchronous", [False, True], ids=["asynchronous", "synchronous"])
@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda difference: str(difference.case))
async def test_the_clients_differ_only_as_is_meant(capture: Capture, difference: Difference, synchronous: bool) -> None:
    official = await through_the_official(capture, difference.case)
    ours = await through_ours(capture, difference.case, synchronous=synchronous)
    assert official.meets(difference.official), f"the official client changed:\n{official}"
    assert ours.meets(difference.ours), f"ours should: {difference.reason}\n{ours}"
    if isinstance(difference.ours, str):
        assert ours.requests == []
