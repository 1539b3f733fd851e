"""OpenTelemetry traces and metrics of a session, built on its events. Needs the ``otel`` extra.

```python
from cloudinary_analyze.telemetry import instrument

session = AnalyzeSession(notifications=notifications)
instrument(session)
```

The session's own ``on_event`` keeps working. Nothing is exported until the application configures
an OpenTelemetry SDK. A session that is not instrumented has no overhead.

| span | kind | meaning |
|---|---|---|
| ``analyze {model}`` | INTERNAL | a call, or the submission of a task; a child of the caller's \
span |
| ``POST`` | CLIENT | an attempt of the call; its child, with HTTP attributes |
| ``task {model}`` | INTERNAL | a task from its acceptance to its answer; a child of its \
submission |
| ``GET`` | CLIENT | a status poll of the task; a child of the submission |
| ``receive …`` | CONSUMER | a webhook until it is stored; a child of the submission, with a link |
| ``process …`` | CONSUMER | a notification from its receipt to the session that it answers; a \
child of the submission, with a link |

Several processes share one trace if their notifications go through `RedisNotifications`: the
context of a submission is stored beside the mailbox of its task. A process that receives webhooks
and has no session passes the `RedisNotifications` to `instrument`. Sampling decisions are kept.
``tracestate`` is carried too, up to 512 characters.

| metric | unit | meaning, and its attributes |
|---|---|---|
| ``cloudinary.analyze.call.duration`` | s | calls: model, ``error.type`` |
| ``cloudinary.analyze.call.queue.duration`` | s | time that a call queued for permits: model |
| ``http.client.request.duration`` | s | attempts of calls and polls, as HTTP names it |
| ``cloudinary.analyze.retries`` | {retry} | attempts that are repeated: model, ``error.type`` |
| ``cloudinary.analyze.possible_charges`` | {call} | attempts without a usable response that may \
have been charged: model |
| ``cloudinary.analyze.units`` | {unit} | units used, as responses report them: feature |
| ``cloudinary.analyze.pause.duration`` | s | pauses: cause, whether of polls |
| ``cloudinary.analyze.pending_tasks`` | {task} | tasks that are awaited now |
| ``cloudinary.analyze.task.duration`` | s | tasks from acceptance to answer: model, \
``error.type``, by what they were answered |
| ``cloudinary.analyze.notifications`` | {item} | deliveries: verdict |
| ``cloudinary.analyze.notification.queue.duration`` | s | from the receipt of a notification to \
the session |
| ``cloudinary.analyze.restored_items`` | {item} | items of streams read from a ledger: model, \
``error.type`` |

Attributes that are not of the OpenTelemetry conventions begin with ``cloudinary.analyze.``. All
metrics have ``server.address`` and ``server.port``. Histograms also count. No attribute contains a
secret, a source URL, a query string or the text of an error; errors appear by their type.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary, WeakSet

import attrs

from cloudinary_analyze._version import __version__
from cloudinary_analyze._wire.protocol import build_analyze_url, build_task_url
from cloudinary_analyze.errors import ApiError, ConfigurationError
from cloudinary_analyze.events import (
    AttemptFinished,
    AttemptRetried,
    CallFinished,
    CallStarted,
    Event,
    ItemRestored,
    NotificationSeen,
    PollFinished,
    SessionPaused,
    TaskAnswered,
)

__all__ = ["instrument"]
from cloudinary_analyze.protocols import TRACE_HEADER, TraceCarrier
from cloudinary_analyze.responses import Limit
from cloudinary_analyze.session import AnalyzeSession

try:
    from opentelemetry import metrics, trace
    from opentelemetry.context import Context
    from opentelemetry.trace import Link, Span, SpanContext, SpanKind, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as _missing:
    raise ImportError(
        "Telemetry needs OpenTelemetry: pip install 'cloudinary-analyze[otel]'."
    ) from _missing

SCOPE: Final = "cloudinary_analyze"
TASKS: Final = 100_000  # tasks whose submissions are remembered; the oldest are dropped first
SHOWN: Final = 100  # characters of text from the service
STATE_HEADER: Final = "tracestate"
LONGEST_STATE: Final = 512  # characters, as W3C asks of every participant
LONGEST_ENTRY: Final = 128

Attributes = dict[str, str | bool | int | float]

_W3C: Final = TraceContextTextMapPropagator()
_SHORT: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 30, 60)
_LONG: Final = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)

# one observation of all sessions per meter provider; the key of the global one is `metrics`
_pending: Final[WeakKeyDictionary[Any, WeakSet[AnalyzeSession]]] = WeakKeyDictionary()
_instrumented: Final[WeakSet[AnalyzeSession]] = WeakSet()


def instrument(
    target: AnalyzeSession | TraceCarrier,
    *,
    tracer_provider: trace.TracerProvider | None = None,
    meter_provider: metrics.MeterProvider | None = None,
) -> None:
    """Report the activity of a session as spans and metrics, from now on.

    Args:
        target: A session or, in a process that only receives webhooks, its `RedisNotifications`.
        tracer_provider: Default: the global one.
        meter_provider: Default: the global one.

    Raises:
        ConfigurationError: ``target`` is neither, or the session is already instrumented.
    """
    tracer = trace.get_tracer(SCOPE, __version__, tracer_provider)
    if isinstance(target, AnalyzeSession):
        if target in _instrumented:
            raise ConfigurationError("The session is instrumented already. Call this once.")
        _instrumented.add(target)
        source = target._source  # noqa: SLF001
        carrier = source if isinstance(source, TraceCarrier) else None
        telemetry = _Telemetry(
            tracer,
            _Instruments.create(metrics.get_meter(SCOPE, __version__, meter_provider)),
            target._base_url,  # noqa: SLF001
            target._credentials.cloud_name,  # noqa: SLF001
            carrier,
        )
        _observe_pending(target, meter_provider)
        from cloudinary_analyze._http import watch  # noqa: F401 -- as a session with a hook does

        target._meter.add_hook(telemetry.take)  # noqa: SLF001
    elif isinstance(target, TraceCarrier):
        carrier = target
    else:
        raise ConfigurationError(
            f"instrument() takes an AnalyzeSession or RedisNotifications, not {target!r:.80}."
        )
    if carrier is not None:
        carrier.carry_traces(_Receipts(tracer).follow)


def _observe_pending(session: AnalyzeSession, provider: metrics.MeterProvider | None) -> None:
    """Add a session to the metric of pending tasks; meters allow one such metric for all."""
    key = metrics if provider is None else provider
    known = _pending.get(key)
    if known is not None:
        known.add(session)
        return
    sessions = _pending[key] = WeakSet((session,))

    def observe(_: metrics.CallbackOptions) -> Iterable[metrics.Observation]:
        totals: Tally[tuple[str, int]] = Tally()
        for one in list(sessions):
            totals[_read_place(one._base_url)] += one.stats.pending  # noqa: SLF001
        for place, pending in totals.items():
            yield metrics.Observation(pending, _describe_place(place))

    metrics.get_meter(SCOPE, __version__, provider).create_observable_up_down_counter(
        "cloudinary.analyze.pending_tasks", [observe], "{task}", "Tasks that are awaited now."
    )


def _read_place(base_url: str) -> tuple[str, int]:
    parts = urlsplit(base_url)
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def _describe_place(place: tuple[str, int]) -> Attributes:
    return {"server.address": place[0], "server.port": place[1]}


def _read_error_type(error: BaseException, status: int | None = None) -> str:
    """Return a word for the type of an error, without its text."""
    if status is not None and status >= 400:
        return str(status)
    return type(error).__name__


def _compute_start(seconds: float) -> int:
    return time.time_ns() - int(seconds * 1e9)


def _link(*contexts: SpanContext) -> list[Link]:
    named = {context.span_id: context for context in contexts if context.is_valid}
    return [Link(context) for context in named.values()]


def _read_context(text: str | None) -> SpanContext:
    """Return the span that a carried context names; an invalid one if there is none."""
    parent, _, state = (text or "").partition(" ")
    carrier = {TRACE_HEADER: parent}
    if 0 < len(state) <= LONGEST_STATE:
        carrier[STATE_HEADER] = state
    return trace.get_current_span(_W3C.extract(carrier, Context())).get_span_context()


def _write_context(context: SpanContext) -> str | None:
    """Return a context as one string, see `TraceCarrier`; ``None`` if there is no trace."""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, _enter(context))
    parent, state = carrier.get(TRACE_HEADER), _bound_state(carrier.get(STATE_HEADER, ""))
    return f"{parent} {state}" if parent and state else parent


def _bound_state(state: str) -> str:
    """Return the newest entries of a ``tracestate`` that fit into `LONGEST_STATE` characters.

    As W3C says, long entries are dropped first, and then the oldest, which come last.
    """
    entries = state.split(",")
    if len(state) > LONGEST_STATE:
        entries = [entry for entry in entries if len(entry) <= LONGEST_ENTRY]
    while len(",".join(entries)) > LONGEST_STATE:
        entries.pop()
    return ",".join(entries)


def _enter(context: SpanContext) -> Context:
    """Return the context of children of a span."""
    return trace.set_span_in_context(trace.NonRecordingSpan(context), Context())


def _end(span: Span, error: BaseException | None, status: int | None = None) -> None:
    if error is not None:
        span.set_attribute("error.type", _read_error_type(error, status))
        span.set_status(StatusCode.ERROR)
    span.end()


@attrs.frozen(eq=False)
class _Receipts:
    """Traces deliveries from the webhook to their mailbox."""

    tracer: trace.Tracer

    async def follow(self, task_id: str, stored: Awaitable[str | None]) -> None:
        """Wait until a delivery is stored, and report it in the trace of its task."""
        begun = time.time_ns()
        current = trace.get_current_span().get_span_context()
        submission: SpanContext = trace.INVALID_SPAN_CONTEXT
        error: BaseException | None = None
        try:
            submission = _read_context(await stored)
        except BaseException as raised:
            error = raised
            raise
        finally:
            parent = submission if submission.is_valid else current
            span = self.tracer.start_span(
                "receive notification",
                _enter(parent),
                SpanKind.CONSUMER,
                {"cloudinary.analyze.task_id": task_id, "messaging.operation.type": "receive"},
                _link(submission, current),
                begun,
            )
            _end(span, error)


@attrs.frozen(eq=False)
class _Instruments:
    """The metrics; see the table in the module's docstring."""

    calls: metrics.Histogram
    queueing: metrics.Histogram
    attempts: metrics.Histogram
    retries: metrics.Counter
    charges: metrics.Counter
    units: metrics.Counter
    pauses: metrics.Histogram
    tasks: metrics.Histogram
    notifications: metrics.Counter
    delays: metrics.Histogram
    restored: metrics.Counter

    @classmethod
    def create(cls, meter: metrics.Meter) -> _Instruments:
        def time_of(name: str, what: str, buckets: tuple[float, ...] = _SHORT) -> metrics.Histogram:
            return meter.create_histogram(
                name, "s", what, explicit_bucket_boundaries_advisory=buckets
            )

        own = "cloudinary.analyze."
        return cls(
            calls=time_of(f"{own}call.duration", "Duration of calls."),
            queueing=time_of(f"{own}call.queue.duration", "Time that calls queue for permits."),
            attempts=time_of("http.client.request.duration", "Duration of HTTP client requests."),
            retries=meter.create_counter(f"{own}retries", "{retry}", "Attempts that are repeated."),
            charges=meter.create_counter(
                f"{own}possible_charges",
                "{call}",
                "Attempts without a usable response that may have been charged.",
            ),
            units=meter.create_counter(f"{own}units", "{unit}", "Units used, as reported."),
            pauses=time_of(f"{own}pause.duration", "Duration of pauses.", _LONG),
            tasks=time_of(f"{own}task.duration", "Duration of tasks.", _LONG),
            notifications=meter.create_counter(
                f"{own}notifications", "{item}", "Deliveries by verdict."
            ),
            delays=time_of(
                f"{own}notification.queue.duration",
                "From the receipt of a notification to the session.",
            ),
            restored=meter.create_counter(
                f"{own}restored_items", "{item}", "Items read from a ledger."
            ),
        )


@attrs.define(eq=False, repr=False)
class _Telemetry:
    """Turns the events of one session into spans and metrics.

    Attributes:
        calls: The span of each call in progress.
        tasks: The submission and the start, in Unix nanoseconds, of each task without an answer.
    """

    tracer: trace.Tracer
    instruments: _Instruments
    base_url: str
    cloud_name: str
    carrier: TraceCarrier | None
    calls: dict[int, Span] = attrs.field(factory=dict, init=False)
    tasks: OrderedDict[str, tuple[SpanContext, int]] = attrs.field(factory=OrderedDict, init=False)
    _base: Attributes = attrs.field(init=False)
    _takers: dict[type[Event], Callable[[Any], None]] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._base = _describe_place(_read_place(self.base_url))
        self._takers = {
            CallStarted: self._start_call,
            AttemptFinished: self._finish_attempt,
            AttemptRetried: self._count_retry,
            CallFinished: self._finish_call,
            PollFinished: self._finish_poll,
            NotificationSeen: self._see_notification,
            TaskAnswered: self._answer_task,
            ItemRestored: self._restore_item,
            SessionPaused: self._pause,
        }

    def take(self, event: Event) -> None:
        """Report an event; this is the session's hook."""
        taker = self._takers.get(type(event))
        if taker is not None:
            taker(event)

    def _describe(
        self, model: str | None, error: BaseException | None = None, **more: str | bool
    ) -> Attributes:
        """Return the attributes of a metric."""
        described: Attributes = dict(self._base)
        if model is not None:
            described["cloudinary.analyze.model"] = model
        if error is not None:
            status = error.status if isinstance(error, ApiError) else None
            described["error.type"] = _read_error_type(error, status)
        for name, value in more.items():
            described[f"cloudinary.analyze.{name}"] = value
        return described

    def _describe_request(
        self, method: str, status: int | None, error: BaseException | None
    ) -> Attributes:
        """Return the attributes of an HTTP request."""
        described: Attributes = {**self._base, "http.request.method": method}
        if status is not None:
            described["http.response.status_code"] = status
        if error is not None:
            described["error.type"] = _read_error_type(error, status)
        return described

    def _start_call(self, event: CallStarted) -> None:
        repeated = self.tasks.get(event.repeats or "")
        self.calls[event.call] = self.tracer.start_span(
            f"analyze {event.model}",
            None if repeated is None else _enter(repeated[0]),
            attributes={
                **self._base,
                "cloudinary.cloud_name": self.cloud_name,
                "cloudinary.analyze.model": event.model,
                "cloudinary.analyze.as_task": event.as_task,
            },
        )

    def _finish_attempt(self, event: AttemptFinished) -> None:
        method = "GET" if event.model is None else "POST"
        described = self._describe_request(method, event.status, event.error)
        self.instruments.attempts.record(event.seconds, described)
        if event.ambiguous:
            self.instruments.charges.add(1, self._describe(event.model))
        call = self.calls.get(event.call)
        if call is None or event.model is None:  # a poll, or a call that began before
            return
        url = build_analyze_url(self.base_url, self.cloud_name, event.model)
        more: Attributes = {"url.full": url, "cloudinary.analyze.permit_wait": event.permit_wait}
        if event.attempt > 1:
            more["http.request.resend_count"] = event.attempt - 1
        span = self.tracer.start_span(
            method,
            _enter(call.get_span_context()),
            SpanKind.CLIENT,
            {**described, **more},
            start_time=_compute_start(event.seconds),
        )
        _end(span, event.error, event.status)

    def _count_retry(self, event: AttemptRetried) -> None:
        self.instruments.retries.add(1, self._describe(event.model, event.error))

    def _finish_call(self, event: CallFinished) -> None:
        span = self.calls.pop(event.call, None)
        if not event.denied:
            self.instruments.calls.record(event.seconds, self._describe(event.model, event.error))
            self.instruments.queueing.record(event.permit_wait, self._describe(event.model))
            if event.error is None:
                self._count_units(event.limits)
        if span is None:
            return
        shown: dict[str, Any] = {
            "attempts": event.attempts,
            "permit_wait": event.permit_wait,
            "request_id": event.request_id and event.request_id[:SHOWN],
            "task_id": event.task_id,
            "denied": event.denied or None,
        }
        for name, value in shown.items():
            if value is not None:
                span.set_attribute(f"cloudinary.analyze.{name}", value)
        _end(span, None if event.denied else event.error, event.status)
        if event.task_id is not None:
            self._remember(event.task_id, span.get_span_context())

    def _remember(self, task_id: str, submission: SpanContext) -> None:
        self.tasks[task_id] = submission, time.time_ns()
        if len(self.tasks) > TASKS:
            self.tasks.popitem(last=False)
        context = _write_context(submission)
        if self.carrier is not None and context is not None:
            self.carrier.note_trace(task_id, context)

    def _count_units(self, limits: Iterable[Limit]) -> None:
        for limit in limits:
            if limit.used_by_request:
                self.instruments.units.add(
                    limit.used_by_request, self._describe(None, feature=limit.type)
                )

    def _finish_poll(self, event: PollFinished) -> None:
        known = self.tasks.get(event.task_id)
        if known is None:
            return
        status = event.error.status if isinstance(event.error, ApiError) else None
        described = self._describe_request("GET", status, event.error)
        described["url.full"] = build_task_url(self.base_url, self.cloud_name, event.task_id)
        if event.state is not None:
            described["cloudinary.analyze.task_state"] = event.state[:SHOWN]
        span = self.tracer.start_span(
            "GET",
            _enter(known[0]),
            SpanKind.CLIENT,
            described,
            start_time=_compute_start(event.seconds - event.permit_wait),
        )
        _end(span, event.error, status)

    def _see_notification(self, event: NotificationSeen) -> None:
        self.instruments.notifications.add(1, self._describe(None, verdict=event.verdict))
        if event.queued is not None:
            self.instruments.delays.record(event.queued, self._base)
        if event.task_id is None:
            return
        carried = _read_context(event.trace)
        known = self.tasks.get(event.task_id)
        submission = carried if known is None else known[0]
        if submission.is_valid:
            self.tracer.start_span(
                "process notification",
                _enter(submission),
                SpanKind.CONSUMER,
                {
                    "cloudinary.analyze.task_id": event.task_id,
                    "cloudinary.analyze.verdict": event.verdict,
                    "messaging.operation.type": "process",
                },
                _link(submission, carried),
                _compute_start(event.queued or 0.0),
            ).end()
        if event.verdict == "resolved":
            self.tasks.pop(event.task_id, None)

    def _answer_task(self, event: TaskAnswered) -> None:
        self._count_units(event.limits)
        if event.seconds is not None:
            self.instruments.tasks.record(
                event.seconds, self._describe(event.model, event.error, answered_by=event.by)
            )
        known = self.tasks.get(event.task_id)
        if known is None:
            return
        if event.by != "notification":  # of a notification another event follows
            del self.tasks[event.task_id]
        described = self._describe(event.model, answered_by=event.by, task_id=event.task_id)
        span = self.tracer.start_span(
            f"task {event.model or 'analysis'}",
            _enter(known[0]),
            attributes=described,
            start_time=known[1],
        )
        _end(span, event.error)

    def _restore_item(self, event: ItemRestored) -> None:
        self.instruments.restored.add(1, self._describe(event.model, event.error))

    def _pause(self, event: SessionPaused) -> None:
        described = self._describe(None, cause=event.cause, polls=event.polls)
        self.instruments.pauses.record(event.seconds, described)
