"""What is worked out once for a task, and what it makes of each of its jobs."""

from __future__ import annotations

import datetime
import json
import logging
import uuid
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from celery import Celery
from celery.utils.saferepr import saferepr

import xpander_celery as xc
from xpander_celery.plans import Plans, TaskPlan
from xpander_celery.settings import Settings


def plan_of(app: Celery, function: Any, *, settings: dict[str, Any] | None = None, **options: Any) -> TaskPlan:
    task = app.task(name=options.pop("name", "shop.ask"), **options)(function)
    app.finalize()
    return Plans(Settings(**({"agent_id": "agent"} if settings is None else settings)), [app]).of(app.tasks[task.name])


def take_anything(*args: Any, **kwargs: Any) -> None: ...


def charge(card: str, pin: str) -> None: ...


def ask(question: str, *rest: str, model: str = "small", **more: Any) -> None: ...


@pytest.mark.parametrize(
    ("args", "kwargs", "bound"),
    [
        (("why?",), {}, {"question": "why?"}),
        ((), {"question": "why?", "model": "large"}, {"question": "why?", "model": "large"}),
        (("why?", "and", "how?"), {"extra": 1}, {"question": "why?", "args": ["and", "how?"], "extra": 1}),
        ((), {}, {}),
    ],
)
def test_arguments_are_bound_to_their_names(app: Celery, args: Any, kwargs: Any, bound: dict[str, Any]) -> None:
    assert plan_of(app, ask).bound(args, kwargs) == bound


def test_self_is_no_argument(app: Celery) -> None:
    def method(self: Any, x: int) -> None: ...

    assert plan_of(app, method, bind=True).bound((3,), {}) == {"x": 3}
    retried = plan_of(app, method, bind=True, name="shop.retried", autoretry_for=(ValueError,))
    assert retried.bound((3,), {}) == {"x": 3}


VALUES = [
    (),
    ("why?",),
    ("it's", {"deep": [{"deeper": {"deepest": [1]}}]}, None, True, 1.5),
    ("x" * 5000, "y" * 10),
    (datetime.datetime(2026, 1, 31, tzinfo=datetime.UTC), uuid.UUID(int=3), Decimal("1.5")),
    ((1, 2), [3, (4,)]),
    (list(range(2000)),),
]


@pytest.mark.parametrize("args", VALUES)
def test_celerys_own_text_of_the_arguments_is_not_taken_for_the_authors(app: Celery, args: tuple[Any, ...]) -> None:
    message = {"argsrepr": saferepr(args, 1024), "kwargsrepr": saferepr({"k": args}, 1024)}

    def as_lists(value: Any) -> Any:
        """What a JSON serializer makes of it."""
        if isinstance(value, (list, tuple)):
            return [as_lists(item) for item in value]
        return {key: as_lists(item) for key, item in value.items()} if isinstance(value, dict) else value

    arrived = as_lists(args)
    given = plan_of(app, take_anything).input_of(message, arrived, {"k": arrived})
    assert given == ({"args": arrived, "k": arrived} if args else {"k": []})


@pytest.mark.parametrize(
    ("argsrepr", "kwargsrepr", "said"),
    [
        ("('<hidden>',)", "{}", "('<hidden>',)"),
        ("('4242424242424242',)", "{'pin': '****'}", "('4242424242424242',) {'pin': '****'}"),
        ("(...)", "{'pin': '1234'}", "(...) {'pin': '1234'}"),
        ("", "{'pin': '****'}", "{'pin': '****'}"),
    ],
)
def test_what_the_author_wrote_for_the_arguments_is_respected(
    app: Celery, argsrepr: str, kwargsrepr: str, said: str
) -> None:
    plan = plan_of(app, charge)
    message = {"argsrepr": argsrepr, "kwargsrepr": kwargsrepr}
    assert plan.input_of(message, ["4242424242424242"], {"pin": "1234"}) == said


@pytest.mark.parametrize("changed", [{1: "a"}, datetime.datetime(2026, 1, 31, tzinfo=datetime.UTC)])
def test_celerys_text_of_what_a_serializer_changed_tells_no_secret(app: Celery, changed: Any) -> None:
    def sign_in(user: str, password: str, answer: dict[str, str], when: Any) -> None: ...

    plan = plan_of(app, sign_in, settings={"redact_keys": ["answer"]})
    args = ("ann", "hunter2", {"pet": "Rex"}, changed)
    message = {"argsrepr": saferepr(args, 1024), "kwargsrepr": "{}"}
    arrived = json.loads(json.dumps(args, default=str))
    assert plan.input_of(message, arrived, {}) == (
        f"('ann', '[redacted]', {{'pet': '[redacted]'}}, {saferepr(changed)})"
    )


def test_input_can_be_switched_off_and_computed(app: Celery) -> None:
    assert plan_of(app, ask, xpander={"input": False}).input_of({}, ["why?"], {}) is None
    off = {"capture_input": False}
    assert plan_of(app, ask, name="a", settings=off).input_of({}, ["why?"], {}) is None
    assert plan_of(app, ask, name="b", settings=off, xpander={"input": True}).input_of({}, ["w"], {}) is not None
    computed = plan_of(app, ask, name="c", settings=off, xpander={"input": lambda question, **_: question.upper()})
    assert computed.input_of({}, ["why?"], {"model": "large"}) == "WHY?"


@pytest.mark.parametrize(
    ("settings", "options", "agent_id"),
    [
        ({"agent_id": "default"}, {}, "default"),
        ({"agent_id": "default", "agents": {"bank.*": "bank", "shop.*": "shop", "*": "all"}}, {}, "shop"),
        ({"agents": {"shop.*": "shop"}}, {"xpander": {"agent_id": "own"}}, "own"),
        ({}, {}, None),
    ],
)
def test_the_nearest_agent_wins(app: Celery, settings: Any, options: Any, agent_id: str | None) -> None:
    plan = plan_of(app, ask, settings=settings, **options)
    assert plan.agent_of({"id": "1"}) == agent_id
    assert plan.agent_of({"id": "1", "xpander_agent_id": "called"}) == "called"
    assert plan.agent_of({"id": "1", "headers": {"xpander_agent_id": "called"}}) == "called"
    assert plan.agent_of({"id": "1", "xpander_agent_id": UUID(int=1)}) == str(UUID(int=1))  # as JSON gives it back


@pytest.mark.parametrize(
    ("settings", "reported"),
    [
        ({}, True),
        ({"tasks": ["shop.*"]}, True),
        ({"tasks": ["bank.*"]}, False),
        ({"exclude": ["*.ask"]}, False),
        ({"tasks": ["shop.*"], "exclude": ["shop.a*"]}, False),
    ],
)
def test_patterns_choose_the_tasks(app: Celery, settings: Any, reported: bool) -> None:
    assert plan_of(app, ask, settings=settings).is_reported is reported


def test_a_marked_task_needs_no_pattern_but_can_be_excluded(app: Celery) -> None:
    narrow = {"tasks": ["bank.*"]}
    assert plan_of(app, ask, settings=narrow, base=xc.XpanderTask).is_reported
    assert plan_of(app, ask, name="shop.b", settings=narrow, xpander={"agent_id": "a"}).is_reported
    assert not plan_of(app, ask, name="shop.c", settings={"exclude": ["shop.*"]}, base=xc.XpanderTask).is_reported


def test_tasks_of_other_apps_are_left_alone(app: Celery) -> None:
    with Celery("other", set_as_current=False) as other:
        task = other.task(name="other.ask", lazy=False)(ask)
        assert not Plans(Settings(), [app]).of(task).is_reported


def test_celerys_own_tasks_are_left_out_unless_named(app: Celery) -> None:
    app.finalize()
    own = app.tasks["celery.starmap"]
    assert not Plans(Settings(), [app]).of(own).is_reported
    assert Plans(Settings(tasks=("*", "celery.starmap")), [app]).of(own).is_reported


def test_accumulate_is_reported_only_where_it_continues_a_replaced_job(app: Celery) -> None:
    app.finalize()
    plan = Plans(Settings(), [app]).of(app.tasks["celery.accumulate"])
    assert plan.is_one_of_ours({"replaced_task_nesting": 1})
    assert not plan.is_one_of_ours({"replaced_task_nesting": 0})


def test_a_task_without_an_agent_is_warned_of_once(app: Celery, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "xpander_celery.plans")
    task = app.task(name="shop.ask", lazy=False)(ask)
    plans = Plans(Settings(), [app])
    plans.of(task)
    plans.of(task)
    plans.warn_without_agent("shop.ask")
    assert [record.getMessage().split(" ")[0] for record in caplog.records] == ["shop.ask"]


def test_facts_say_whether_and_when_a_message_comes_again(app: Celery) -> None:
    task = app.task(name="shop.late", acks_late=True, lazy=False)(ask)
    facts = Plans(Settings(agent_id="a", job_metadata=False), [app], 60.0).of(task).facts_of({"id": "1"})
    assert facts == {
        "task": "shop.late",
        "agent_id": "a",
        "acks_late": True,
        "visibility_timeout_s": 60.0,
        "job_metadata": False,
    }


def test_a_log_handler_that_fails_does_not_fail_a_plan(app: Celery) -> None:
    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise RuntimeError("no space left")

    handler = Broken()
    logging.getLogger("xpander_celery").addHandler(handler)
    try:
        assert plan_of(app, ask, settings={}).is_reported
    finally:
        logging.getLogger("xpander_celery").removeHandler(handler)
