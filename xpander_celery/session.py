"""What hooks and requests work with once reporting is on; the runtime builds it from the settings. Layer 3."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from xpander_celery import messages
from xpander_celery.events import attempt_id_of
from xpander_celery.plans import Plans, TaskPlan
from xpander_celery.recording.contained import pass_limit, text_of
from xpander_celery.recording.current import running_recording
from xpander_celery.recording.recording import Recorder, Recording
from xpander_celery.rendering import describe

if TYPE_CHECKING:
    from xpander_celery.recording.spans import Tracing

_IDS = ("id", "root_id", "parent_id", "group")


@dataclass(frozen=True, slots=True)
class Session:
    """`process_id` gives the liveness id of this process, another one in each forked child."""

    plans: Plans
    recorder: Recorder
    tracing: Tracing
    process_id: Callable[[], str]
    _numbers: itertools.count[int] = field(default_factory=itertools.count, repr=False)

    def new_attempt(self) -> tuple[str, str]:
        """The id of a new attempt, which no process gives twice, and that of this process."""
        process_id = self.process_id()
        return f"{process_id}-{next(self._numbers):x}", process_id

    def plan_of(self, task: Any) -> TaskPlan:
        """The plan of a task, made at the first time."""
        return self.plans.find(task) or self.plans.of(task)

    def facts_of(
        self, plan: TaskPlan, message: Mapping[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The facts of one job with its input, as text that is capped and redacted."""
        facts = plan.facts_of(message)
        try:
            given = plan.input_of(message, args, kwargs)
        except Exception as failure:  # noqa: BLE001 - the author's own function
            pass_limit(failure)
            given = f"(the function for the input failed: {describe(failure)})"
        if given is not None:
            facts["input"] = self.recorder.renderer.input(given)
        return facts

    def recording_of(
        self, plan: TaskPlan, message: Mapping[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Recording:
        """A recording of the attempt that a message starts here, with its span; neither is begun yet."""
        message = with_text_ids(message)
        facts = self.facts_of(plan, message, args, kwargs)
        if message.get("is_eager") and "parent_id" not in facts:  # Celery 5.4 does not say it
            outer = running_recording()
            if outer is not None and outer.id != message["id"]:
                facts["parent_id"] = outer.id
        queue_wait_s = messages.queue_wait_s(message, self.recorder.clock())
        if queue_wait_s is not None:
            facts["queue_wait_s"] = queue_wait_s
        child = self.process_id()
        attempt_id, owner = messages.attempt_in(message) or self.new_attempt()
        if owner != child:
            attempt_id = attempt_id_of(attempt_id, child)
        recording = Recording(
            self.recorder,
            job_id=message["id"],
            attempt_id=attempt_id,
            child=child,
            owner=owner,
            facts=facts,
            carried=messages.carried_in(message),
            sends_result=plan.captures_result,
            result_of=plan.options.result if callable(plan.options.result) else None,
        )
        span = recording.span = self.tracing.start_job(
            plan.span_name,
            carrier=messages.carrier_in(message),
            attributes=plan.span_attributes(message, facts),
            earlier=messages.header(message, messages.EARLIER),
            on_usage=recording.progress,
        )
        if span.trace_id is not None:
            facts["trace_id"] = span.trace_id
        return recording

    def recording_of_block(self, name: str, job_id: str, agent_id: str | None, given: Any) -> Recording:
        """A recording of a block of code as a job, with its span; neither is begun yet."""
        agent_id = agent_id or self.plans.agent_of(name)
        if agent_id is None:
            self.plans.warn_without_agent(name)
        outer = running_recording()
        facts: dict[str, Any] = {
            "task": name,
            "agent_id": agent_id,
            "parent_id": outer.id if outer is not None else None,
        }
        if given is not None:
            facts["input"] = self.recorder.renderer.input(given)
        attempt_id, process_id = self.new_attempt()
        recording = Recording(
            self.recorder, job_id=job_id, attempt_id=attempt_id, child=process_id, owner=process_id, facts=facts
        )
        span = recording.span = self.tracing.start_job(f"run {name}", on_usage=recording.progress)
        facts["trace_id"] = span.trace_id
        return recording


def with_text_ids(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """`message` with its ids as text: Celery takes any value (`apply_async(task_id=77)`), a record only text."""
    for name in _IDS:
        value = message.get(name)
        if value is not None and type(value) is not str:
            return {**message, **{each: text_of(message.get(each)) for each in _IDS}}
    return message
