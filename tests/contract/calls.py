"""The calls that both clients are asked to make: those in which they must agree, and those in which they differ."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from pydantic import BaseModel
from xpander_sdk.models.shared import OutputFormat, Tokens
from xpander_sdk.models.user import User
from xpander_sdk.modules.tasks.models.task import AttachmentKind, AttachmentRef

from xpander_celery import errors
from xpander_celery.report import Tokens as OurTokens

REPORT, INVOKE, LOAD = "areport_external_task", "ainvoke_agent", "aload_task"


@dataclass(frozen=True)
class Case:
    """One call. `base` and `organization_id` make the configuration, `environment` is set while both run."""

    name: str
    method: str
    arguments: dict[str, Any] = field(default_factory=dict)
    base: str = ""
    organization_id: str | None = "org-1"
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.method[1:].split('_')[0]} {self.name}"


@dataclass(frozen=True)
class Difference:
    """A call in which ours does better on purpose, and what each client does.

    `official` and `ours` are either the error's type name, or a check on the requests that were sent.
    """

    case: Case
    reason: str
    official: str | Callable[[list[Any]], bool]
    ours: str | Callable[[list[Any]], bool]


class Answer(BaseModel):
    text: str
    score: float = 1.5


@dataclasses.dataclass
class Usage:
    total: int
    note: str | None = None


class Kind(enum.Enum):
    FAST = "fast"


TOKENS = Tokens(completion_tokens=380, prompt_tokens=2140)
AGENT = SimpleNamespace(id="agent-object")


def report(name: str, **arguments: Any) -> Case:
    return Case(name, REPORT, {"agent_id": "agent-1", **arguments})


def invoke(name: str, **arguments: Any) -> Case:
    return Case(name, INVOKE, {"agent_id": "agent-1", **arguments})


def response(name: str, value: Any) -> Case:
    return report(f"with a response: {name}", llm_response=value)


AGREED = [
    report("with nothing"),
    report("with an id", id="ext-job-9921"),
    report("with an id of odd characters", id='a/b?c#d "e" \\ ü'),
    report("with input", input="What is new?"),
    report("with empty texts", input="", result=""),
    report("with text of every script", input="Grüße, 你好, 🎉", result="\u2028 \u00e9 \U0001f600"),
    report("with control characters", input="tab\t line\n null\x00 delete\x7f escape\x1b", result='"quoted" \\ /'),
    report("with a long text", result="0123456789ü" * 20_000),
    report("with the official tokens", tokens=TOKENS),
    report("with cached tokens", tokens=Tokens(prompt_tokens=10, cache_read_tokens=7, cache_write_tokens=3)),
    report("with no tokens spent", tokens=Tokens()),
    report("with tokens as a mapping", tokens={"prompt_tokens": 3, "completion_tokens": 4}),
    report("with many tokens", tokens=Tokens(prompt_tokens=10**12, completion_tokens=1)),
    report("of a failure", is_success=False, result="ValueError: no"),
    report("with a whole duration", duration=3),
    report("with a fraction as duration", duration=0.1),
    report("with a long duration", duration=86400.125),
    report("with a duration as text", duration="1.5"),
    report("with tools", used_tools=["search", "browse", "search", "sücht"]),
    report("with no tools", used_tools=[]),
    report("with tools left out", used_tools=None),
    response("an object", {"id": "r1", "choices": [{"message": {"content": "ü", "tool_calls": None}}], "n": 1.5}),
    response("a list", [1, "two", None, True, [], {}]),
    response("a text", "plain"),
    response("a number", 0),
    response("numbers of exponent form", [1e16, 1.5e300, 1e-4, -0.0]),
    response("false", False),
    response("an empty object", {}),
    response("a model", Answer(text="t")),
    response("models inside", {"answers": [Answer(text="a"), Answer(text="b", score=0)]}),
    response("a dataclass", Usage(3)),
    response("a tuple", (1, (2, 3))),
    response("a set", {"only": {7}}),
    response("an enumeration", {"kind": Kind.FAST}),
    response("a UUID", uuid.UUID(int=1)),
    response("a date", datetime.date(2026, 1, 2)),
    response("bytes that are text", {"raw": b"abc"}),
    response("integer keys", {1: "a", 2: "b"}),
    response("deep nesting", [[[[[[[[[[[[[[[[[[[["deep"]]]]]]]]]]]]]]]]]]]]),
    report(
        "with everything",
        id="job-1",
        input="in",
        llm_response={"a": 1},
        tokens=TOKENS,
        is_success=True,
        result="out",
        duration=12.75,
        used_tools=["search"],
    ),
    Case("with an agent object", REPORT, {"agent_id": "ignored", "agent": AGENT}),
    Case("with the agent of the environment", REPORT, environment={"XPANDER_AGENT_ID": "agent-env"}),
    Case("with an agent beside the environment's", REPORT, {"agent_id": "a"}, environment={"XPANDER_AGENT_ID": "e"}),
    Case("below a path", REPORT, {"agent_id": "a"}, base="/proxy/xpander"),
    Case("at a controller", REPORT, {"agent_id": "a"}, base="/agent-controller"),
    Case("at a controller with a longer path", REPORT, {"agent_id": "a"}, base="/agent-controller/v2"),
    Case("beside a controller", REPORT, {"agent_id": "a"}, base="/x/agent-controller"),
    invoke("with nothing"),
    invoke("with a prompt", prompt="Grüße"),
    invoke("with a prompt of JSON", prompt='{"question": "what"}'),
    invoke("with a prompt of a JSON list", prompt='["xpander"]'),
    invoke("with a named task", prompt='{"xpander_task_id": "task-7"}'),
    invoke("with an existing task", prompt="more", existing_task_id="task-0"),
    invoke("with files", prompt="see", file_urls=["https://files.example/1.pdf", "https://files.example/2.png"]),
    invoke("with no files", prompt="see", file_urls=[]),
    invoke("with the official user", prompt="me", user_details=User(id="u1", email="u@x.example", timezone="UTC")),
    invoke("with a user as a mapping", prompt="me", user_details={"email": "u@x.example", "first_name": "U"}),
    invoke("with a user's attributes", user_details=User(email="u@x", additional_attributes={"a": [1, None]})),
    invoke("with a version", prompt="x", agent_version="7"),
    invoke("with a version as number", prompt="x", agent_version=7),
    invoke("with a payload extension", prompt="x", tool_call_payload_extension={"headers": {"a": "b"}}),
    invoke("with another source", prompt="x", source="celery"),
    invoke("with no source", prompt="x", source=None),
    invoke("with a worker, locally", prompt="x", worker_id="w1", run_locally=True),
    invoke("with the official output format", prompt="x", output_format=OutputFormat.Json, output_schema={"type": "x"}),
    invoke("with an output format by name", prompt="x", output_format="markdown"),
    invoke("with events", prompt="x", events_streaming=True),
    invoke("with switches left out", prompt="x", events_streaming=None, run_locally=None),
    invoke("with context", prompt="x", additional_context="c\nü", expected_output="e"),
    invoke(
        "with the official attachments",
        prompt="x",
        attachments=[AttachmentRef(url="https://f/1", kind=AttachmentKind.image, size=3), AttachmentRef(url="https://f/2")],
    ),
    invoke("with attachments as mappings", prompt="x", attachments=[{"url": "https://f/1", "name": "n"}]),
    invoke("with no attachments", prompt="x", attachments=[]),
    Case("the agent of the environment", INVOKE, {"prompt": "x"}, environment={"XPANDER_AGENT_ID": "agent-env"}),
    Case("at a controller", INVOKE, {"agent_id": "a", "prompt": "x"}, base="/agent-controller"),
    Case("a task", LOAD, {"task_id": "task-1"}),
    Case("a task at a controller", LOAD, {"task_id": "task-1"}, base="/agent-controller"),
]  # fmt: skip


def path(expected: str) -> Callable[[list[Any]], bool]:
    return lambda requests: [f"{request.method} {request.path}" for request in requests] == expected.split(", ")


def body(**expected: Any) -> Callable[[list[Any]], bool]:
    import json

    return lambda requests: all(json.loads(requests[-1].body)[name] == value for name, value in expected.items())


def cycle() -> list[Any]:
    inner: list[Any] = []
    inner.append(inner)
    return inner


NOTHING_SENT = "ModuleException"
DIFFERENCES = [
    Difference(
        Case("without an agent", REPORT),
        "a report to the agent None helps nobody; the error names XPANDER_AGENT_ID",
        path("POST /agent-execution/None/report_task"),
        "InvalidValueError",
    ),
    Difference(
        Case("without an agent", INVOKE, {"prompt": "x"}),
        "the same",
        path("GET /agents/None, POST /agent-execution/None"),
        "InvalidValueError",
    ),
    Difference(
        Case("for an agent with a slash", REPORT, {"agent_id": "a/b?c#d"}),
        "an id must not lead to another route",
        path("POST /agent-execution/a/b?c"),
        path("POST /agent-execution/a%2Fb%3Fc%23d/report_task"),
    ),
    Difference(
        Case("for an agent of dots", REPORT, {"agent_id": ".."}),
        "the same",
        path("POST /report_task"),
        "InvalidValueError",
    ),
    Difference(
        Case("at a controller without an organization", REPORT, {"agent_id": "a"}, "/agent-controller", None),
        "the organization None helps nobody; the error names XPANDER_ORGANIZATION_ID",
        path("POST /agent-controller/None/agent-execution/a/report_task"),
        "ConfigurationError",
    ),
    Difference(
        Case("at a controller with a trailing slash", REPORT, {"agent_id": "a"}, "/agent-controller/"),
        "a doubled slash is another route",
        path("POST /agent-controller//org-1/agent-execution/a/report_task"),
        path("POST /agent-controller/org-1/agent-execution/a/report_task"),
    ),
    Difference(
        Case("with a named task that cannot be named", INVOKE, {"agent_id": "a", "prompt": '{"xpander_task_id": ""}'}),
        "a prompt that names a task starts no other where that task cannot be loaded",
        path("GET /agent-execution//status"),
        "InvalidValueError",
    ),
    Difference(
        report("with an object as input", input={"a": 1}),
        "rendered as JSON text",
        NOTHING_SENT,
        body(input='{"a":1}'),
    ),
    Difference(report("with a number as result", result=5), "the same", NOTHING_SENT, body(result="5")),
    Difference(
        report("with our tokens", tokens=OurTokens(prompt_tokens=3)),
        "either package's object is taken",
        NOTHING_SENT,
        lambda requests: b'"prompt_tokens":3' in requests[-1].body,
    ),
    Difference(
        report("with absent counts", tokens=Tokens(prompt_tokens=3, completion_tokens=None)),
        "a count is a number: absent is zero",
        lambda requests: b'"completion_tokens":null' in requests[-1].body,
        lambda requests: b'"completion_tokens":0' in requests[-1].body,
    ),
    Difference(
        report("with fewer tokens than none", tokens=Tokens(prompt_tokens=-3)),
        "metrics must not go down",
        lambda requests: b'"prompt_tokens":-3' in requests[-1].body,
        "InvalidValueError",
    ),
    Difference(
        report("without a verdict", is_success=None),
        "a run succeeded or did not",
        body(is_success=None),
        "InvalidValueError",
    ),
    Difference(report("with no duration", duration=None), "zero", body(duration=None), body(duration=0.0)),
    Difference(
        report("with a duration that is no number", duration=float("nan")),
        "a duration that was measured wrongly is said, not dropped",
        body(duration=None),
        "InvalidValueError",
    ),
    Difference(
        report("with an endless duration", duration=float("inf")), "the same", body(duration=None), "InvalidValueError"
    ),
    Difference(report("with an empty id", id=""), "an id that names nothing", body(id=""), "InvalidValueError"),
    Difference(report("with a number as id", id=42), "as good as its text", NOTHING_SENT, body(id="42")),
    Difference(
        report("with a tool that is no text", used_tools=[print]),
        "a callable counts by its name",
        NOTHING_SENT,
        body(used_tools=["print"]),
    ),
    Difference(
        response("a plain object", {"client": SimpleNamespace}),
        "rendered, since the report is worth more",
        NOTHING_SENT,
        lambda requests: b"SimpleNamespace" in requests[-1].body,
    ),
    Difference(
        response("an exception", ValueError("bad")), "the same", NOTHING_SENT, body(llm_response="ValueError: bad")
    ),
    Difference(response("a cycle", cycle()), "the same", NOTHING_SENT, body(llm_response=["<circular reference>"])),
    Difference(response("bytes", b"\xff"), "the same", NOTHING_SENT, body(llm_response="/w==")),
    Difference(response("a lone surrogate", "\ud800"), "the same", NOTHING_SENT, body(llm_response="?")),
    Difference(
        response("no number", {"loss": float("nan")}),
        "the value is kept as text",
        body(llm_response={"loss": None}),
        body(llm_response={"loss": "nan"}),
    ),
    Difference(
        response("a time", datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)),
        "one rendering for every value of this package; both are ISO 8601",
        body(llm_response="2026-01-02T00:00:00Z"),
        body(llm_response="2026-01-02T00:00:00+00:00"),
    ),
    Difference(
        response("a time span", datetime.timedelta(seconds=90)),
        "the same; Python's own text",
        body(llm_response="PT1M30S"),
        body(llm_response="0:01:30"),
    ),
    Difference(
        response("a very small number", 1e-7),
        "the same number, as the faster encoder writes it",
        lambda requests: b'"llm_response":1e-07' in requests[-1].body,
        lambda requests: b'"llm_response":1e-7' in requests[-1].body,
    ),
    Difference(
        invoke("with a user without an address", prompt="x", user_details={"first_name": "U"}),
        "refused before the agent is looked up, naming the field",
        "ModuleException",
        "InvalidValueError",
    ),
]  # fmt: skip

assert {difference.ours for difference in DIFFERENCES if isinstance(difference.ours, str)} <= set(vars(errors))
