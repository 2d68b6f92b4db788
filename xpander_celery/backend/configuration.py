"""Where the platform is and who asks: `Configuration`, from arguments or the environment. Knows no HTTP."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

from xpander_celery.errors import ConfigurationError

PRODUCTION_URL = "https://inbound.xpander.ai"
STAGING_URL = "https://inbound.stg.xpander.ai"

_CONTROLLER = "agent-controller"
_CONTROLLER_PORT = 9016
_VISIBLE_ASCII = re.compile(r"[\x21-\x7e]+")
_HOST = re.compile(r"[^\s/?#@\\<>\"^`{|}%]+")
_EXAMPLE = f"Give a URL such as {PRODUCTION_URL}."


@dataclass(frozen=True)
class Configuration:
    """The platform's address and the caller's credentials; what is not given comes from the environment, read now.

    An empty or blank value counts as not given. The variables are `XPANDER_API_KEY`, `XPANDER_ORGANIZATION_ID`,
    `XPANDER_BASE_URL` (default: production, or staging with `IS_STG=true`) and `XPANDER_AGENT_ID`.

    Raises `ConfigurationError` for a malformed value. A missing key or organization is raised by the call that needs
    it, so that a program without credentials can be imported and tested.
    """

    api_key: str | None = None
    organization_id: str | None = None
    base_url: str | None = None
    agent_id: str | None = None

    def __post_init__(self) -> None:
        for name in ("api_key", "organization_id", "base_url", "agent_id"):
            object.__setattr__(self, name, _given(name, getattr(self, name)) or _from_environment(name))
        if self.api_key is not None and not _VISIBLE_ASCII.fullmatch(self.api_key):
            raise ConfigurationError(
                "XPANDER_API_KEY", "has characters that no header can carry", "Copy the key again, without line breaks."
            )
        object.__setattr__(self, "base_url", _normal_url(self.base_url or _default_url()))

    @classmethod
    def of(cls, given: Any) -> Configuration:
        """`given` as it is, or the same read from the official client's object; None is the environment."""
        if isinstance(given, cls):
            return given
        if given is None:
            return cls()
        if not hasattr(given, "api_key"):
            raise ConfigurationError(
                "configuration", f"is a {type(given).__name__}", "Pass a Configuration, the official or this one."
            )
        return cls(*(getattr(given, name, None) for name in ("api_key", "organization_id", "base_url", "agent_id")))

    def get_full_url(self) -> str:
        """The base of every path. For controller hosts it ends in the organization, and raises where that is unset."""
        base_url = str(self.base_url)
        if not _is_controller(urlsplit(base_url)):
            return base_url
        if self.organization_id is None:
            raise ConfigurationError(
                "XPANDER_ORGANIZATION_ID", f"is needed for {base_url}", "Set it, or pass organization_id."
            )
        return f"{base_url}/{quote(self.organization_id, safe='')}"

    def require_key(self) -> str:
        """The API key; raises `ConfigurationError` where there is none."""
        if self.api_key is None:
            raise ConfigurationError("XPANDER_API_KEY", "is not set", "Set it, or pass Configuration(api_key=...).")
        return self.api_key

    def __repr__(self) -> str:
        key = "None" if self.api_key is None else "<hidden>"
        return (
            f"Configuration(api_key={key}, organization_id={self.organization_id!r}, "
            f"base_url={self.base_url!r}, agent_id={self.agent_id!r})"
        )


def _given(name: str, value: Any) -> str | None:
    if value is None:
        return None
    secret = getattr(value, "get_secret_value", None)  # a pydantic SecretStr
    text = secret() if callable(secret) else value
    if not isinstance(text, str):
        raise ConfigurationError(name, f"is a {type(value).__name__}", "Give text.")
    return text.strip() or None


def _from_environment(name: str) -> str | None:
    return os.environ.get(f"XPANDER_{name.upper()}", "").strip() or None


def _default_url() -> str:
    return STAGING_URL if os.environ.get("IS_STG", "").strip().lower() == "true" else PRODUCTION_URL


def _normal_url(text: str) -> str:
    """`text` with a scheme and without a trailing slash; raises for what is no address of a platform."""
    url = text if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) else f"https://{text}"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigurationError("XPANDER_BASE_URL", f"is malformed ({error})", _EXAMPLE) from error
    if parts.username is not None or parts.password is not None:
        raise ConfigurationError("XPANDER_BASE_URL", "holds a user name", "The key goes into XPANDER_API_KEY.")
    if parts.scheme not in ("http", "https"):
        raise ConfigurationError("XPANDER_BASE_URL", f"has the scheme {parts.scheme!r}", _EXAMPLE)
    if not host or not _HOST.fullmatch(host) or port == 0:
        raise ConfigurationError("XPANDER_BASE_URL", "names no host", _EXAMPLE)
    if parts.query or parts.fragment or not _VISIBLE_ASCII.fullmatch(parts.path or "/"):
        raise ConfigurationError("XPANDER_BASE_URL", "has more than a host and a path", _EXAMPLE)
    return f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")


def _is_controller(parts: SplitResult) -> bool:
    """Whether the organization belongs into the path: the platform's rule for its controller hosts."""
    first_segment = parts.path.strip("/").split("/", 1)[0].lower()
    return (
        _CONTROLLER in (parts.hostname or "").lower() or parts.port == _CONTROLLER_PORT or first_segment == _CONTROLLER
    )
