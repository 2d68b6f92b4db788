"""What the relay does to a report before it sends it: tells whether it is a new one, and makes it smaller. Pure."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

from xpander_celery.report import TaskReport

_TRIMMED_TEXT = 2048


def digest_of(report: TaskReport) -> bytes:
    """Equal for reports that would leave the same record."""
    digest = blake2b(report.agent_id.encode(errors="surrogatepass"), digest_size=16)
    digest.update(b"\0" + report.to_wire())
    return digest.digest()


def trimmed(report: TaskReport) -> TaskReport:
    """The report with its texts cut and without the raw model response: for a platform that found it too large."""
    response: Any = report.llm_response
    if isinstance(response, dict) and set(response) == {"celery", "response"}:
        response = {"celery": response["celery"], "response": None}
    else:
        response = None
    texts = {"input": _cut(report.input), "result": _cut(report.result)}
    return report.model_copy(update={**texts, "llm_response": response})


def _cut(text: str | None) -> str | None:
    if text is None or len(text) <= _TRIMMED_TEXT:
        return text
    return f"{text[:_TRIMMED_TEXT]}… [cut from {len(text.encode(errors='replace'))} bytes: too large for the platform]"
