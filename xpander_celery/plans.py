"""What is known of a task before any of its jobs runs, worked out once: a `TaskPlan`. Layer 3.

A plan answers, for each job, whether it is reported, to which agent, and how its input is made, without looking at
settings, options or signatures again. Plans are made once the app is final: at worker start, or at the first job.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

from celery.utils.saferepr import saferepr

from xpander_celery import messages
from xpander_celery.redaction import looks_secret, mask_shown, spellings
from xpander_celery.task import TaskOptions, options_of, warn_if_async

if TYPE_CHECKING:
    from xpander_celery.settings import Settings

logger = logging.getLogger(__name__)

ACCUMULATE = "celery.accumulate"
_CELERYS_OWN = "celery."
_ABBREVIATED_BYTES = 1024  # of the texts that Celery makes of arguments (celery/app/amqp.py, `argsrepr_maxsize`)
_UNBRACKETED = str.maketrans("", "", "()[], ")


@dataclass(frozen=True, slots=True)
class TaskPlan:
    """How the jobs of one task are recorded."""

    task: str
    is_reported: bool
    agent_id: str | None = None
    options: TaskOptions = field(default_factory=TaskOptions)
    facts: dict[str, Any] = field(default_factory=dict)  # the same for every job
    positional: tuple[str, ...] = ()
    secrets: tuple[int, ...] = ()  # the places in `positional` whose names look secret
    span_name: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)  # of the span, the same for every job
    captures_input: bool = True
    captures_result: bool = True

    def agent_of(self, message: Mapping[str, Any]) -> str | None:
        """The agent that the call names, else that of the task."""
        return messages.agent_in(message) or self.agent_id

    def facts_of(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """All facts of one job, but for its input and what only a running attempt knows."""
        facts = messages.facts_of(message)
        facts.update(self.facts)
        agent_id = self.agent_of(message)
        if agent_id is not None:
            facts["agent_id"] = agent_id
        return facts

    def input_of(self, message: Mapping[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What stands for the arguments of one job: not rendered yet, None where nothing is to be sent.

        Raises what the author's own callable raises.
        """
        if callable(self.options.input):
            return self.options.input(*args, **kwargs)
        if not self.captures_input:
            return None
        shown = self.shown_of(message, args, kwargs)
        return shown if shown is not None else self.bound(args, kwargs)

    def shown_of(self, message: Mapping[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        """What the author lets be seen of the arguments of one job, in this or an earlier message of it."""
        if message.get("argsrepr") or message.get("kwargsrepr"):
            said = _authors_words(message, args, kwargs)
            if said is not None:  # or a serializer changed a value, and the words are Celery's after all
                return mask_shown(said, [args[place] for place in self.secrets if place < len(args)])
        return messages.shown_in(message, message.get("id"))

    def span_attributes(self, message: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """All attributes of one job's span."""
        attributes = self.attributes.copy()
        attributes["messaging.message.id"] = message["id"]
        for name, fact in _SPAN_FACTS:
            value = facts.get(fact)
            if value:
                attributes[name] = value
        return attributes

    def bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The given arguments by their names; surplus positional ones as `args`."""
        names = self.positional
        bound: dict[str, Any] = dict(zip(names, args, strict=False))
        if len(args) > len(names):
            bound["args"] = list(args[len(names) :])
        bound.update(kwargs)
        return bound

    def is_one_of_ours(self, message: Mapping[str, Any]) -> bool:
        """Whether this very job is reported: `celery.accumulate` is only where it continues a replaced job."""
        return self.is_reported and (self.task != ACCUMULATE or bool(message.get("replaced_task_nesting")))


_SPAN_FACTS = (("messaging.destination.name", "queue"), ("celery.retries", "retries"))


class Plans:
    """The plans of all tasks of a process. `apps` are those of which every task is reported, not only the marked."""

    def __init__(
        self, settings: Settings, apps: Collection[Any] | WeakSet[Any], visibility_timeout_s: float | None = None
    ) -> None:
        self._settings = settings
        self._apps = apps
        self._visibility_timeout_s = visibility_timeout_s
        self._of: WeakKeyDictionary[Any, TaskPlan] = WeakKeyDictionary()
        self._without_agent: set[str] = set()
        self.find = self._of.get  # one call less per job

    def of(self, task: Any) -> TaskPlan:
        """The plan of `task`; raises `ConfigurationError` for options that it cannot have."""
        plan = self._of.get(task)
        if plan is None:
            plan = self._of[task] = self._made(task)
        return plan

    def of_name(self, name: str) -> TaskPlan:
        """The plan of a task that this process does not have."""
        if not self._is_chosen(name):
            return TaskPlan(name, is_reported=False)
        return TaskPlan(name, is_reported=True, agent_id=self.agent_of(name), facts=self._facts_of(name))

    def warn_without_agent(self, name: str) -> None:
        """Say once that nobody is known to report the jobs of a task to."""
        if name in self._without_agent:
            return
        self._without_agent.add(name)
        with suppress(Exception):  # a handler of the user's that fails: there is nobody left to tell
            logger.warning(
                "%s has no agent, so only its jobs that name one are reported. Set XPANDER_AGENT_ID, "
                "instrument(agents=...) or xpander={'agent_id': ...}, or exclude it",
                name,
                extra={"event": "no_agent", "task": name},
            )

    def _made(self, task: Any) -> TaskPlan:
        name = task.name
        options, is_marked = options_of(task)
        if not self._is_chosen(name, is_marked=is_marked, is_all=task.app in self._apps):
            return TaskPlan(name, is_reported=False)
        warn_if_async(task.run)
        agent_id = options.agent_id or self.agent_of(name)
        if agent_id is None and name != ACCUMULATE:
            self.warn_without_agent(name)
        facts = self._facts_of(name)
        if task.acks_late:
            facts["acks_late"] = True
            if self._visibility_timeout_s is not None:
                facts["visibility_timeout_s"] = self._visibility_timeout_s
        settings = self._settings
        positional = _positional(task.run)
        more = spellings(settings.redact_keys)
        return TaskPlan(
            name,
            is_reported=True,
            agent_id=agent_id,
            options=options,
            facts=facts,
            positional=positional,
            secrets=tuple(place for place, each in enumerate(positional) if looks_secret(each, more)),
            span_name=f"run {name}",
            attributes={
                "messaging.system": "celery",
                "messaging.operation.type": "process",
                "celery.task_name": name,
            },
            captures_input=options.input is not False and (settings.capture_input or options.input is True),
            captures_result=options.result is not False and (settings.capture_result or options.result is True),
        )

    def _is_chosen(self, name: str, *, is_marked: bool = False, is_all: bool = True) -> bool:
        if _matches(name, self._settings.exclude):
            return False
        if is_marked:
            return True
        patterns = self._settings.tasks
        if name.startswith(_CELERYS_OWN) and name != ACCUMULATE:
            patterns = tuple(pattern for pattern in patterns if pattern.startswith(_CELERYS_OWN))
        return is_all and _matches(name, patterns)

    def agent_of(self, name: str) -> str | None:
        """The agent that the settings give to a name."""
        for pattern, agent_id in self._settings.agents.items():
            if fnmatchcase(name, pattern):
                return agent_id
        return self._settings.agent_id

    def _facts_of(self, name: str) -> dict[str, Any]:
        facts: dict[str, Any] = {"task": name}
        if not self._settings.job_metadata:
            facts["job_metadata"] = False
        return facts


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _positional(run: Callable[..., Any]) -> tuple[str, ...]:
    """The names that positional arguments go to; none where the signature cannot be read."""
    try:
        parameters = inspect.signature(run).parameters.values()
    except Exception:  # noqa: BLE001 - a signature evaluates annotations on Python 3.14, which may raise anything
        return ()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def _authors_words(message: Mapping[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """`argsrepr` and `kwargsrepr`, where the author wrote them to hide something, None where Celery made them."""
    args_text, kwargs_text = message.get("argsrepr") or "", message.get("kwargsrepr") or ""
    if _is_celerys(args_text, tuple(args)) and _is_celerys(kwargs_text, dict(kwargs)):
        return None
    return " ".join(text for text in (args_text, kwargs_text) if text and text not in ("()", "[]", "{}"))


def _is_celerys(text: str, value: Any) -> bool:
    """Whether Celery made `text` of `value` before a serializer made lists of tuples."""
    if not text or (len(text) < _ABBREVIATED_BYTES and text == _short_repr(value)):
        return True
    made: str = saferepr(value, _ABBREVIATED_BYTES)
    if text == made:
        return True
    text, made = text.translate(_UNBRACKETED), made.translate(_UNBRACKETED)
    if "..." not in made:
        return text == made
    length = min(len(text), len(made)) - 16  # abbreviated, and not at the same place
    return text[:length] == made[:length]


def _short_repr(value: Any) -> str | None:
    """`repr(value)` where it is surely short."""
    items = value.values() if isinstance(value, dict) else value
    for item in items:
        if not (item is None or type(item) in (int, bool, float) or (type(item) is str and len(item) < 256)):
            return None
    return repr(value)
