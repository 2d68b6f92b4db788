"""What a job's own code sees of it: `Job`, and the one that stands for no job. Layer 2."""

from __future__ import annotations

from typing import Any


class Job:
    """What `current_job()` returns. This one stands for no job: it takes everything and keeps nothing."""

    __slots__ = ()

    @property
    def id(self) -> str | None:
        """The job's id, that of its record; None outside a job."""
        return None

    @property
    def agent_id(self) -> str | None:
        """The agent that the job is reported to; may be set while it runs."""
        return None

    @agent_id.setter
    def agent_id(self, agent_id: str | None) -> None:
        pass

    @property
    def input(self) -> Any:
        """What to send as the input, any value; the job's arguments where it is not set."""
        return None

    @input.setter  # noqa: A003 - the platform's own word
    def input(self, value: Any) -> None:
        pass

    @property
    def result(self) -> Any:
        """What to send as the result, any value; what the job returns where it is not set. A failure stays one."""
        return None

    @result.setter
    def result(self, value: Any) -> None:
        pass

    @property
    def llm_response(self) -> Any:
        """The raw response of a model, any value, kept with the record for debugging."""
        return None

    @llm_response.setter
    def llm_response(self, value: Any) -> None:
        pass

    def add_usage(self, usage: Any) -> None:
        """Add tokens and tools: `Tokens`, a response of OpenAI, Anthropic or LiteLLM, or what an agent of Agno,
        OpenAI, pydantic-ai or Strands returns.

        A response that an instrumentation's span already gave counts once; plain `Tokens` always count. Of a run that
        an earlier job began, or an agent that served one, only what was spent since this job began counts, where the
        library says when that was.
        """


NO_JOB = Job()
