"""Which job a finished span belongs to, and its facts, kept until the job asks. It must not know what they add up to.

One collector serves every provider of a process. It never raises into the code that starts or ends a span, holds no
lock (each step is one dict operation), and forgets everything in a forked child.
"""

from __future__ import annotations

import struct
from collections import OrderedDict, deque
from collections.abc import Callable
from contextvars import ContextVar
from logging import getLogger
from time import time_ns

from opentelemetry.context import Context, create_key, get_current
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.trace import SpanContext, get_current_span

from xpander_celery.recording.facts import SpanFacts
from xpander_celery.recording.packed import PackedSpans

logger = getLogger(__name__)

# What our own code can raise on a malformed span. Not Exception: a soft time limit is one, and may arrive in here.
FAILURES = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError, struct.error)

JOB_KEY = create_key("xpander_celery.job")
active_job: ContextVar[JobSpans | None] = ContextVar("xpander_celery.spans", default=None)

_MAX_TRACES = 4096
_MAX_SPANS = 500_000


class JobSpans:
    """What one job's spans said so far. Filled by the collector, from any thread."""

    __slots__ = (
        "collector",
        "dropped",
        "ended",
        "facts",
        "forgotten",
        "on_usage",
        "seen",
        "span_id",
        "started",
        "trace_id",
    )

    def __init__(self, collector: Collector, on_usage: Callable[[], None] | None) -> None:
        self.collector = collector
        self.on_usage = on_usage
        self.started = collector.clock()
        self.ended: int | None = None
        self.forgotten = False  # the grace is over, or this is a forked child
        self.facts = PackedSpans()
        self.span_id: int | None = None  # until its own span has started
        self.trace_id = 0
        self.seen = False  # the processor saw the job's own span start
        self.dropped = 0

    @property
    def is_open(self) -> bool:
        """Whether the job still runs in this process."""
        return self.ended is None and not self.forgotten

    def add(self, facts: SpanFacts) -> None:
        """Keep the facts of a span, and tell the job if they change its usage."""
        if len(self.facts) >= _MAX_SPANS:
            self.dropped += 1
            if self.dropped == 1:
                logger.warning("a job has too many spans; the rest is not counted", extra={"event": "spans_dropped"})
            return
        self.facts.append(facts)
        if self.on_usage is not None and (facts.prompt is not None or facts.tool is not None):
            self.on_usage()


class Collector(SpanProcessor):
    """A span processor that hands each span to its job. `grace_s`: how long an ended job still takes late spans."""

    def __init__(self, *, grace_s: float, clock: Callable[[], int] = time_ns) -> None:
        self.clock = clock
        self._grace_ns = int(grace_s * 1e9)
        self._owners: dict[int, JobSpans] = {}  # of the spans that are open
        self._own_spans: dict[int, JobSpans] = {}  # of the jobs themselves
        # None: of several jobs, or of one that is over. A dict would look past all that it forgot for its first key
        self._traces: OrderedDict[int, JobSpans | None] = OrderedDict()
        self._jobs: dict[int, JobSpans] = {}  # running or in grace
        self._ended: deque[JobSpans] = deque()
        self._swept_at = 0  # so many open spans make looking for those of forgotten jobs worth it
        self.enabled = True

    def open(self, on_usage: Callable[[], None] | None) -> JobSpans:
        """Begin to collect for a job; its span is about to start in a context that holds it under `JOB_KEY`."""
        self._purge()
        job = JobSpans(self, on_usage)
        self._jobs[id(job)] = job
        return job

    def identify(self, job: JobSpans, context: SpanContext) -> None:
        """The job's own span has this context."""
        span_id = job.span_id = context.span_id
        if not context.is_valid:
            return
        trace_id = job.trace_id = context.trace_id
        traces = self._traces
        self._own_spans[span_id] = job
        traces[trace_id] = None if trace_id in traces else job
        if len(traces) > _MAX_TRACES:
            traces.popitem(last=False)

    def close(self, job: JobSpans) -> None:
        """The job has ended; its late spans are taken for the grace."""
        job.ended = self.clock()
        self._ended.append(job)

    def owner_of(self, context: Context | None, parent: SpanContext | None, start: int) -> JobSpans | None:
        """The job of a span that starts at `start` below `parent`; `context` is None where the current one is meant.

        First the job in the span's context; then the job of this flow of control, which also wins where the current
        context was leaked by a job that is over; then the job of the parent, of the trace; last, for a root, the one
        job that was running. A trace that several jobs share says nothing.
        """
        job = (get_current() if context is None else context).get(JOB_KEY)
        if not isinstance(job, JobSpans) or job.collector is not self:
            job = None
        own = active_job.get()
        if (
            own is not None
            and own.collector is self
            and (job is None or (context is None and own.is_open and not job.is_open))
        ):
            job = own
        if job is None:
            job = self._by_descent(parent) if parent is not None and parent.is_valid else self._by_time(start)
        return job if job is not None and self._takes(job) else None

    def wants(self, context: Context | None) -> bool:
        """Whether a span that would start in this context is of a job, so that it must be recorded. Never raises."""
        if not self._jobs or not self.enabled:
            return False
        try:
            return self.owner_of(context, get_current_span(context).get_span_context(), self.clock()) is not None
        except FAILURES:
            return False

    def after_fork(self) -> None:
        """In a forked child: the jobs of the parent are not here, even if a body was running when it forked."""
        for job in self._jobs.values():
            job.forgotten = True
            job.on_usage = None
        self._owners.clear()
        self._own_spans.clear()
        self._traces.clear()
        self._jobs.clear()
        self._ended.clear()
        self._swept_at = 0

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Remember whose span it is."""
        if not self.enabled:
            return
        try:
            if parent_context is not None:
                job = parent_context.get(JOB_KEY)
                if isinstance(job, JobSpans) and job.span_id is None:
                    job.seen = True  # its own span, which is about to be identified
                    return
            owner = active_job.get()  # nearly always its job: that of this flow of control, and of its context
            if (
                owner is None
                or owner.collector is not self
                or not owner.is_open
                or (get_current() if parent_context is None else parent_context).get(JOB_KEY) is not owner
            ):
                owner = self.owner_of(parent_context, span.parent, span.start_time or 0)
            if owner is not None:
                self._owners[span.context.span_id] = owner
        except FAILURES:
            logger.warning("a span could not be attributed", exc_info=True, extra={"event": "span_not_attributed"})

    def on_end(self, span: ReadableSpan) -> None:
        """Keep the span's facts with its job. A span that arrives twice is taken once."""
        try:
            span_id = span.context.span_id
            owner = self._owners.pop(span_id, None)
            if owner is not None and self._takes(owner):
                facts = SpanFacts.from_span(span, span_id)
                if facts is not None:
                    owner.add(facts)
        except FAILURES:
            logger.warning("a span could not be read", exc_info=True, extra={"event": "span_not_read"})

    def _by_descent(self, parent: SpanContext) -> JobSpans | None:
        span_id = parent.span_id
        return self._owners.get(span_id) or self._own_spans.get(span_id) or self._traces.get(parent.trace_id)

    def _by_time(self, start: int) -> JobSpans | None:
        running = [
            job
            for job in list(self._jobs.values())
            if job.started <= start and (job.ended is None or start <= job.ended)
        ]
        return running[0] if len(running) == 1 else None

    def _takes(self, job: JobSpans) -> bool:
        if job.ended is None:
            return not job.forgotten
        return not job.forgotten and self.clock() - job.ended <= self._grace_ns

    def _purge(self) -> None:
        """Forget the jobs whose grace is over, with the spans that they never ended.

        Each job does this at its start, so it must not look at all that is kept: only now and then at the open spans.
        """
        while True:
            try:
                job = self._ended[0]
                if self._takes(job):
                    return
                self._ended.remove(job)
            except (IndexError, ValueError):  # none is left, or another thread's job forgot this one
                return
            job.forgotten = True
            job.on_usage = None
            self._jobs.pop(id(job), None)
            self._own_spans.pop(job.span_id or 0, None)
            if self._traces.get(job.trace_id) is job:
                self._traces[job.trace_id] = None
            if len(self._owners) > self._swept_at:
                self._sweep()

    def _sweep(self) -> None:
        """Drop the open spans of forgotten jobs; not again before as many more are open as are left."""
        for span_id, owner in list(self._owners.items()):
            if owner.forgotten:
                self._owners.pop(span_id, None)
        self._swept_at = 2 * len(self._owners)
