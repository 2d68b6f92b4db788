"""One frozen `Settings`: keyword > Celery conf (`xpander_*`) > environment > default. Layer 0.

A malformed value raises `ConfigurationError`, naming the setting as its author wrote it and the remedy. The relay does
not import this module: it gets plain values by environment (see `relay/config.py`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from xpander_celery.errors import ConfigurationError, JournalError
from xpander_celery.redis_address import Address, is_url

_OF_THE_PLATFORM = ("api_key", "organization_id", "base_url", "agent_id")
_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*[:.][A-Za-z_]\w*")


Names = Annotated[tuple[str, ...], NoDecode]  # in a variable: a comma-separated list


class _PlatformVariables(PydanticBaseSettingsSource):
    """The variables that the platform's own client reads too, so without our prefix.

    No aliases of the fields: pydantic-settings would read the fields' bare names from the environment as well, and
    `API_KEY` or `BASE_URL` there are somebody else's.
    """

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return os.environ.get(variable_of(field_name)), field_name, False

    def __call__(self) -> dict[str, Any]:
        said = {name: os.environ.get(variable_of(name)) for name in _OF_THE_PLATFORM}
        return {name: value for name, value in said.items() if value}


class Settings(BaseSettings):
    """Everything that can be set. Durations end in `_s` (seconds), sizes in `_bytes`."""

    model_config = SettingsConfigDict(env_prefix="XPANDER_CELERY_", frozen=True, extra="forbid", env_ignore_empty=True)

    disabled: bool = Field(False, description="Switches everything off: no span, no file, no process.")

    api_key: SecretStr | None = Field(None, description="The platform's API key; without it, off.")
    organization_id: str | None = Field(None, description="The organization at the platform.")
    base_url: str | None = Field(
        None, description="Where the platform is. Default: `https://inbound.xpander.ai` (staging with `IS_STG=true`)."
    )
    agent_id: str | None = Field(None, description="The agent of tasks that name none.")
    agents: dict[str, str] = Field({}, description="Agent by task name pattern; the first pattern that fits wins.")

    tasks: Names = Field(("*",), description="Patterns of the task names that are reported.")
    exclude: Names = Field((), description="Patterns of the task names that are not.")

    capture_input: bool = Field(True, description="Send the arguments of a job.")
    capture_result: bool = Field(True, description="Send the result of a job; off, a failure still names its type.")
    capture_traceback: bool = Field(True, description="Send the traceback of a failed job.")
    job_metadata: bool = Field(True, description="Send task, queue, worker, trace id and the like in `llm_response`.")
    redact_keys: Names = Field((), description="Further key names whose values are masked.")
    max_input_bytes: int = Field(16 * 1024, ge=64, le=64 * 1024, description="Cap of the input.")
    max_result_bytes: int = Field(64 * 1024, ge=64, le=64 * 1024, description="Cap of the result.")
    max_traceback_bytes: int = Field(16 * 1024, ge=64, le=16 * 1024, description="Cap of the traceback.")
    max_llm_response_bytes: int = Field(
        128 * 1024, ge=64, le=128 * 1024, description="Cap of the recorded model response."
    )
    before_send: str | None = Field(
        None, description="Import path of `f(report) -> report | None`, called in the relay; None drops the report."
    )

    late_spans_s: float = Field(
        5.0, ge=0, le=60, description="How long after a job its late spans still correct its usage."
    )

    journal: str | None = Field(
        None,
        repr=False,  # a URL may hold a password
        description="Directory or Redis URL of the journal. Default: `xpander-celery` in the user's state directory.",
    )
    fsync: Literal["interval", "always"] = Field(
        "interval", description="`always`: each event is on disk before the job goes on (about 150 µs)."
    )
    max_journal_bytes: int = Field(1024**3, ge=1024**2, description="Cap of all segments together.")

    relay: Literal["auto", "external"] = Field(
        "auto", description="`auto`: workers start the relay; `external`: you run `xpander-celery relay`."
    )
    backend: str | None = Field(
        None, description="Import path of an own backend object or factory with `areport_external_task`."
    )
    rate_limit_per_minute: int | None = Field(
        None, ge=1, description="Most reports a minute, of a relay, or of all that share a Redis."
    )
    concurrency: int = Field(8, ge=1, le=256, description="Reports sent at once.")
    connect_timeout_s: float = Field(5.0, gt=0, description="Longest wait for a connection.")
    read_timeout_s: float = Field(15.0, gt=0, description="Longest wait for an answer.")
    total_timeout_s: float = Field(30.0, gt=0, description="Longest time for one report.")
    redelivery_wait_s: float = Field(
        7200.0,
        ge=0,
        description="How long a job waits for its next attempt, from when that is due, before it is closed.",
    )
    max_age_s: float = Field(14 * 86400.0, gt=0, description="A report older than this is given up, and kept as dead.")
    max_index_bytes: int = Field(4 * 1024**3, ge=16 * 1024**2, description="Cap of the relay's index.")

    @field_validator(
        "api_key", "organization_id", "base_url", "agent_id", "journal", "backend", "before_send", mode="before"
    )
    @classmethod
    def _blank_is_unset(cls, value: object) -> object:
        return None if isinstance(value, str) and not value.strip() else value

    @field_validator("tasks", "exclude", "redact_keys", mode="before")
    @classmethod
    def _listed(cls, names: object) -> object:
        if isinstance(names, str):
            return tuple(name.strip() for name in names.split(",") if name.strip())
        return names

    @field_validator("before_send", "backend")
    @classmethod
    def _import_path(cls, path: str | None) -> str | None:
        if path is not None and not _IMPORT_PATH.fullmatch(path):
            raise ValueError("is no import path such as 'package.module:name'")
        return path

    @field_validator("journal")
    @classmethod
    def _known_journal(cls, journal: str | None) -> str | None:
        if journal is not None and is_url(journal):
            try:
                Address.parse(journal)
            except JournalError as error:
                raise ValueError(str(error).removeprefix("the journal's URL ")) from None
        return journal

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, _PlatformVariables(settings_cls), env_settings

    @classmethod
    def load(cls, conf: Mapping[str, Any] | None = None, **keywords: Any) -> Settings:
        """The settings from `keywords`, then the `xpander_*` keys of `conf` (Celery's), then the environment.

        A keyword that is None counts as not given. Raises `ConfigurationError` for the first thing that is wrong.
        """
        chosen: dict[str, Any] = {}
        written: dict[str, str] = {}  # field -> the name under which its author knows it
        for key, value in (conf or {}).items():
            chosen[key.removeprefix("xpander_")] = value
            written[key.removeprefix("xpander_")] = key
        for name, value in keywords.items():
            if value is not None:
                chosen[name] = value
                written[name] = name
        try:
            return cls(**chosen)
        except (ValidationError, SettingsError) as error:
            raise _explained(error, written) from None


def _explained(error: ValidationError | SettingsError, written: Mapping[str, str]) -> ConfigurationError:
    """The first problem, under the name that the user wrote, and never with the value of a secret."""
    if isinstance(error, SettingsError):  # a variable that should be JSON is not
        named = re.search(r'field "(\w+)"', str(error))
        name = variable_of(named.group(1)) if named else "the environment"
        return ConfigurationError(name, "is not valid JSON", 'Write it as {"pattern": "agent id"}.')
    problem: ErrorDetails = error.errors(include_url=False)[0]
    field = str(problem["loc"][0]) if problem["loc"] else "settings"
    if problem["type"] == "extra_forbidden":
        return ConfigurationError(written.get(field, field), "is no setting", f"Known: {', '.join(_names())}.")
    name = written.get(field) or variable_of(field)
    remedy = str(Settings.model_fields[field].description)
    return ConfigurationError(name, problem["msg"].removeprefix("Value error, "), remedy)


def variable_of(field: str) -> str:
    """The environment variable of a setting."""
    return f"XPANDER_{field.upper()}" if field in _OF_THE_PLATFORM else f"XPANDER_CELERY_{field.upper()}"


def _names() -> list[str]:
    return sorted(Settings.model_fields)
