"""The official client as the relay's back-end, named by import path."""

from __future__ import annotations

from xpander_sdk import Backend


def make() -> Backend:
    """Configured by the environment, as the official client is."""
    return Backend()
