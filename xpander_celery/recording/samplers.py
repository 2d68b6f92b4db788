"""Samplers made to record what they would drop, while a job wants it: a dropped span reaches no processor.

The spans stay unsampled, so that exporters skip them still. It must not know what a job is: it asks.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk.trace import Tracer
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult

_DROP = Decision.DROP  # a look-up takes 0.2 µs on Python 3.11, and this is on every span's way
Wanted = Callable[[Context | None], bool]
Undo = Callable[[], None]


def record_unsampled(provider: Any, wanted: Wanted) -> Undo | None:
    """From now on record what the provider's sampler drops where `wanted(parent_context)`; None where that cannot be.

    Tracers that exist already hold the sampler itself, so it is changed in place: by an attribute of the instance,
    or, where `__slots__` forbid that, by a subclass. A sampler of a foreign layout is replaced in each tracer.
    Replacing `provider.sampler` alone would reach new tracers only.
    """
    sampler = getattr(provider, "sampler", None)
    if not callable(getattr(sampler, "should_sample", None)):
        return None
    for change in (_override, _subclass):
        undo = change(sampler, wanted)
        if undo is not None:
            return undo
    return _replace(provider, sampler, wanted)


def _recording(should_sample: Callable[..., Any], wanted: Wanted) -> Callable[..., Any]:
    """The decision of `should_sample`, with RECORD_ONLY in the place of an unwanted DROP."""

    def decide(parent_context: Context | None, *args: Any, **kwargs: Any) -> Any:
        result = should_sample(parent_context, *args, **kwargs)
        if result.decision is not _DROP or not wanted(parent_context):
            return result
        attributes = kwargs.get("attributes", args[3] if len(args) > 3 else None)  # a dropping sampler returns none
        return SamplingResult(Decision.RECORD_ONLY, attributes, result.trace_state)

    return decide


def _override(sampler: Any, wanted: Wanted) -> Undo | None:
    """By an attribute of the instance. Past its own `__setattr__`: a sampler may be a frozen dataclass."""
    decide = _recording(sampler.should_sample, wanted)
    try:
        before = sampler.__dict__.get("should_sample")
        object.__setattr__(sampler, "should_sample", decide)
    except (AttributeError, TypeError):
        return None

    def undo() -> None:
        if sampler.__dict__.get("should_sample") is not decide:
            return
        if before is None:
            object.__delattr__(sampler, "should_sample")
        else:
            object.__setattr__(sampler, "should_sample", before)

    return undo


def _subclass(sampler: Any, wanted: Wanted) -> Undo | None:
    """By a class with the same layout."""
    original = type(sampler)

    def should_sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _recording(original.should_sample.__get__(self), wanted)(*args, **kwargs)

    try:
        recording = type(original.__name__, (original,), {"__slots__": (), "should_sample": should_sample})
        object.__setattr__(sampler, "__class__", recording)
    except (AttributeError, TypeError):
        return None

    def undo() -> None:
        if type(sampler) is recording:
            object.__setattr__(sampler, "__class__", original)

    return undo


class _RecordingSampler(Sampler):
    """A sampler in the place of one that cannot be changed."""

    def __init__(self, sampler: Any, wanted: Wanted) -> None:
        self._sampler = sampler
        self._decide = _recording(sampler.should_sample, wanted)

    def should_sample(self, *args: Any, **kwargs: Any) -> SamplingResult:
        result: SamplingResult = self._decide(*args, **kwargs)
        return result

    def get_description(self) -> str:
        return str(self._sampler.get_description())


def _replace(provider: Any, sampler: Any, wanted: Wanted) -> Undo | None:
    """In the provider, for the tracers to come, and in each tracer that it made: found by the references to their
    class, since opentelemetry-sdk 1.27 keeps no list of them.
    """
    replacement = _RecordingSampler(sampler, wanted)
    holders = [provider, *(tracer for tracer in gc.get_referrers(Tracer) if type(tracer) is Tracer)]
    holders = [holder for holder in holders if getattr(holder, "sampler", None) is sampler]
    for holder in holders:
        holder.sampler = replacement

    def undo() -> None:
        for holder in holders:
            if getattr(holder, "sampler", None) is replacement:
                holder.sampler = sampler

    return undo
