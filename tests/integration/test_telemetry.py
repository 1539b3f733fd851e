"""Traces and metrics through the real OpenTelemetry SDK, with its exporters in memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from notification_support import (
    CREDENTIALS,
    build_delivery,
    serve_asgi,
)
from scripted import (
    CAPTION,
    URL,
    ScriptedServer,
    after,
    answer,
    hang_up,
    one_after_the_other,
    until,
)
from task_support import connected, quick

from cloudinary_analyze import (
    AnalyzeSession,
    BadRequestError,
    Captioning,
    ConfigurationError,
    Credentials,
    Delivery,
)
from cloudinary_analyze.emulator import Emulator, FaultPlan
from cloudinary_analyze.events import CallFinished, CallStarted, TaskAnswered
from cloudinary_analyze.ledger.sqlite import SQLiteLedger
from cloudinary_analyze.notifications.asgi import WebhookReceiver
from cloudinary_analyze.notifications.redis import RedisNotifications

pytest.importorskip("opentelemetry.sdk")

from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.context import attach, detach
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cloudinary_analyze import telemetry
from cloudinary_analyze.telemetry import instrument

PLANTED = "https://example.com/private.jpg?token=pLanted-query-7c1d"


@attrs.define(eq=False)
class Exported:
    """What one process exports."""

    spans: InMemorySpanExporter = attrs.field(factory=InMemorySpanExporter)
    reader: InMemoryMetricReader = attrs.field(factory=InMemoryMetricReader)
    tracer_provider: TracerProvider = attrs.field(factory=TracerProvider)
    meter_provider: MeterProvider = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self.spans))
        self.meter_provider = MeterProvider([self.reader])

    def instrument(self, *targets: Any) -> None:
        for target in targets:
            instrument(
                target,
                tracer_provider=self.tracer_provider,
                meter_provider=self.meter_provider,
            )

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans.get_finished_spans() if span.name == name]

    def only(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span

    def measure(self, name: str) -> dict[tuple[Any, ...], float]:
        """Return a metric: the attributes' values to the sum, or to the count of a histogram."""
        data = self.reader.get_metrics_data()
        assert data is not None
        found: dict[tuple[Any, ...], float] = {}
        for metric in data.resource_metrics[0].scope_metrics[0].metrics:
            if metric.name == name:
                for point in metric.data.data_points:
                    own = {
                        key: value
                        for key, value in (point.attributes or {}).items()
                        if not key.startswith("server.")
                    }
                    value = point.value if hasattr(point, "value") else point.count
                    found[*(own[key] for key in sorted(own))] = value
        return found

    def everything(self) -> str:
        """Return all that was exported, as text."""
        data = self.reader.get_metrics_data()
        spans = [span.to_json() for span in self.spans.get_finished_spans()]
        return "\n".join([*spans, data.to_json() if data else ""])


@pytest.fixture
def exported() -> Iterator[Exported]:
    exported = Exported()
    yield exported
    exported.tracer_provider.shutdown()
    exported.meter_provider.shutdown()


other = exported


def trace_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.trace_id


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.span_id


def parent_of(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


async def test_a_call_has_its_attempts_as_children(exported: Exported) -> None:
    handler = one_after_the_other(answer(503), hang_up(), CAPTION)
    async with ScriptedServer(handler) as server, server.session() as session:
        exported.instrument(session)
        tracer = exported.tracer_provider.get_tracer("test")
        with tracer.start_as_current_span("outer") as outer:
            await session.analyze(Captioning(URL))
    call, attempts = exported.only("analyze captioning"), exported.named("POST")
    assert parent_of(call) == outer.get_span_context().span_id
    assert {parent_of(attempt) for attempt in attempts} == {id_of(call)}
    assert {trace_of(span) for span in (call, *attempts)} == {trace_of(call)}
    details = [dict(attempt.attributes or {}) for attempt in attempts]
    assert [detail.get("http.response.status_code") for detail in details] == [503, None, 200]
    assert [detail.get("error.type") for detail in details] == ["503", "TransportError", None]
    assert [detail.get("http.request.resend_count") for detail in details] == [None, 1, 2]
    host, port = server.url.removeprefix("http://").split(":")
    for detail in details:
        assert (detail["server.address"], detail["server.port"]) == (host, int(port))
        assert detail["http.request.method"] == "POST"
        assert detail["url.full"] == f"{server.url}/v2/analysis/demo/analyze/captioning"
    assert [attempt.kind.name for attempt in attempts] == ["CLIENT"] * 3
    assert [attempt.status.status_code.name for attempt in attempts] == ["ERROR", "ERROR", "UNSET"]
    shown = dict(call.attributes or {})
    assert (shown["cloudinary.analyze.model"], shown["cloudinary.analyze.attempts"]) == (
        "captioning",
        3,
    )
    assert call.status.status_code.name == "UNSET"
    for attempt in attempts:
        assert (call.start_time or 0) - 10**7 <= (attempt.start_time or 0)
        assert (attempt.end_time or 0) <= (call.end_time or 0) + 10**7


async def test_calls_of_many_tasks_do_not_mix(exported: Exported) -> None:
    async with ScriptedServer(CAPTION) as server, server.session(permits=3) as session:
        exported.instrument(session)
        tracer = exported.tracer_provider.get_tracer("test")

        async def call() -> None:
            with tracer.start_as_current_span("outer"):
                await session.analyze(Captioning(URL))

        await asyncio.gather(*(call() for _ in range(20)))
    outer = {id_of(span): trace_of(span) for span in exported.named("outer")}
    calls = {id_of(span): span for span in exported.named("analyze captioning")}
    assert len(calls) == len({parent_of(span) for span in calls.values()}) == 20
    for span in calls.values():
        assert outer[parent_of(span) or 0] == trace_of(span)
    for attempt in exported.named("POST"):
        assert trace_of(calls[parent_of(attempt) or 0]) == trace_of(attempt)


async def test_an_error_shows_its_type_and_no_text(exported: Exported) -> None:
    handler = answer(400, {"error": {"message": f"could not fetch {PLANTED}"}})
    async with ScriptedServer(handler) as server, server.session() as session:
        exported.instrument(session)
        with pytest.raises(BadRequestError):
            await session.analyze(Captioning(PLANTED))
    call = exported.only("analyze captioning")
    assert (call.attributes or {})["error.type"] == "400"
    assert call.status.status_code.name == "ERROR"
    assert not call.events
    assert "pLanted" not in exported.everything()
    assert "private.jpg" not in exported.everything()


async def test_a_task_is_one_trace(exported: Exported) -> None:
    async with connected(quick(poll_first=0.02), task_seconds=3600) as (emulator, session):
        exported.instrument(session)
        task = session.submit(Captioning(URL))
        task_id = await task.accepted()
        await asyncio.sleep(0.2)
        await until(lambda: exported.named("GET"))
        emulator._desk._finish(emulator.tasks[task_id])
        await task
        await until(lambda: exported.named("process notification"))
    submission = exported.only("analyze captioning")
    task_span = exported.only("task captioning")
    notification = exported.only("process notification")
    polls = exported.named("GET")
    assert polls
    assert {parent_of(span) for span in (task_span, notification, *polls)} == {id_of(submission)}
    assert [link.context.span_id for link in notification.links] == [id_of(submission)]
    assert len({trace_of(span) for span in exported.spans.get_finished_spans()}) == 1
    seconds = ((task_span.end_time or 0) - (task_span.start_time or 0)) / 1e9
    assert 0.1 < seconds < 60
    assert (task_span.attributes or {})["cloudinary.analyze.task_id"] == task.task_id


async def test_a_repeated_task_stays_in_its_trace(exported: Exported) -> None:
    settings = quick(poll_first=0.01, result_grace=0.01, on_missing_result="analyze")
    async with connected(settings, task_seconds=0.01, faults=FaultPlan(lost=1)) as (_, session):
        exported.instrument(session)
        with exported.tracer_provider.get_tracer("test").start_as_current_span("outer"):
            await session.submit(Captioning(URL))
    assert len({trace_of(span) for span in exported.spans.get_finished_spans()}) == 1
    first, again = exported.named("analyze captioning")
    assert parent_of(again) == id_of(first)
    assert parent_of(exported.only("task captioning")) == id_of(first)


async def test_metrics_count_what_the_statistics_count(exported: Exported) -> None:
    handler = one_after_the_other(
        answer(500), answer(503, headers={"Retry-After": "0.01"}), CAPTION
    )
    async with (
        ScriptedServer(handler) as server,
        server.session(backoff_first=0.3, backoff_max=5) as session,
    ):
        exported.instrument(session)
        for _ in range(3):
            await session.analyze(Captioning(URL))
        stats = session.stats
    assert exported.measure("cloudinary.analyze.call.duration") == {("captioning",): stats.calls}
    assert exported.measure("cloudinary.analyze.call.queue.duration") == {("captioning",): 3}
    assert exported.measure("http.client.request.duration") == {
        ("500", "POST", 500): 1,
        ("503", "POST", 503): 1,
        ("POST", 200): 3,
    }
    retries = exported.measure("cloudinary.analyze.retries")
    assert sum(retries.values()) == stats.retries == 2
    charges = exported.measure("cloudinary.analyze.possible_charges")
    assert charges == {("captioning",): stats.ambiguous_retries}
    pauses = exported.measure("cloudinary.analyze.pause.duration")
    assert pauses == {("throttled", False): stats.pauses}
    (units,) = exported.measure("cloudinary.analyze.units").items()
    assert (units[0], units[1] > 0) == (("object_detection",), True)


async def test_task_metrics_end_at_zero(exported: Exported) -> None:
    pending = "cloudinary.analyze.pending_tasks"
    async with connected(task_seconds=0.1) as (_, session):
        exported.instrument(session)
        tasks = [session.submit(Captioning(URL)) for _ in range(5)]
        await asyncio.gather(*(task.accepted() for task in tasks))
        assert exported.measure(pending) == {(): session.stats.pending}
        await asyncio.gather(*tasks)
        assert exported.measure(pending) == {(): 0}
        await until(lambda: session.stats.notifications.get("resolved") == 5)
    assert exported.measure("cloudinary.analyze.notifications") == {("resolved",): 5}
    assert exported.measure("cloudinary.analyze.notification.queue.duration") == {(): 5}
    assert exported.measure("cloudinary.analyze.task.duration") == {
        ("notification", "captioning"): 5
    }
    assert sum(exported.measure("cloudinary.analyze.units").values()) > 0


async def test_two_sessions_share_the_metric_of_pending_tasks(exported: Exported) -> None:
    async with (
        connected(task_seconds=3600) as (emulator, first),
        AnalyzeSession(
            Credentials.from_url(emulator.cloudinary_url), notifications=asyncio.Queue()
        ) as second,
    ):
        exported.instrument(first, second)
        for session in (first, second, second):
            await session.submit(Captioning(URL)).accepted()
        handles = [await h.accepted() for h in (first.submit(Captioning(URL)),)]
        assert handles
        total = first.stats.pending + second.stats.pending
        assert exported.measure("cloudinary.analyze.pending_tasks") == {(): total}


async def test_restored_items_are_measured(exported: Exported, tmp_path: Path) -> None:
    async with ScriptedServer(CAPTION) as server, SQLiteLedger(tmp_path / "a.ledger") as ledger:
        for _ in range(2):
            async with server.session() as session:
                exported.instrument(session)
                async with session.map([URL], Captioning, ledger=ledger) as stream:
                    assert [outcome.error async for outcome in stream] == [None]
    assert exported.measure("cloudinary.analyze.restored_items") == {("captioning",): 1}
    assert len(exported.named("analyze captioning")) == 1


async def test_the_users_hook_still_gets_all_events(exported: Exported) -> None:
    events: list[Any] = []

    def hook(event: Any) -> None:
        events.append(event)
        raise ValueError

    async with ScriptedServer(CAPTION) as server, server.session(on_event=hook) as session:
        exported.instrument(session)
        await session.analyze(Captioning(URL))
    assert type(events[-1]) is CallFinished
    assert len(exported.named("POST")) == 1


async def test_a_session_may_be_instrumented_while_it_works(exported: Exported) -> None:
    release = asyncio.Event()
    async with ScriptedServer(after(release)) as server, server.session() as session:
        call = asyncio.create_task(session.analyze(Captioning(URL)))
        await until(lambda: server.seen)
        exported.instrument(session)
        release.set()
        await call
        await session.analyze(Captioning(URL))
    assert len(exported.named("analyze captioning")) == 1


async def test_a_second_time_is_refused(exported: Exported) -> None:
    session = AnalyzeSession(Credentials("demo", "1", "a"))
    exported.instrument(session)
    with pytest.raises(ConfigurationError, match="already"):
        exported.instrument(session)
    with pytest.raises(ConfigurationError, match="takes an AnalyzeSession"):
        instrument(object())  # type: ignore[arg-type]


async def test_without_an_sdk_nothing_happens() -> None:
    async with connected(task_seconds=0.05) as (_, session):
        instrument(session)
        assert (await session.submit(Captioning(URL))).analysis.caption
        assert (await session.analyze(Captioning(URL))).analysis.caption


def test_tasks_without_an_answer_are_forgotten(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "TASKS", 3)
    hook = telemetry._Telemetry(
        exported.tracer_provider.get_tracer("test"),
        telemetry._Instruments.create(exported.meter_provider.get_meter("test")),
        "https://api.cloudinary.com",
        "demo",
        None,
    )
    for number in range(5):
        hook.take(CallStarted(call=number, model="coco"))
        hook.take(
            CallFinished(call=number, model="coco", attempts=1, seconds=1, task_id=f"t{number}")
        )
    assert ([*hook.tasks], hook.calls) == (["t2", "t3", "t4"], {})
    for number in range(5):
        hook.take(TaskAnswered(task_id=f"t{number}", by="session"))
    assert not hook.tasks
    assert len(exported.named("task analysis")) == 3


@contextlib.asynccontextmanager
async def open_mailboxes(shared_redis: Any, namespace: str) -> AsyncIterator[RedisNotifications]:
    async with RedisNotifications(shared_redis.url, namespace=namespace) as notifications:
        yield notifications


@contextlib.asynccontextmanager
async def submit_in_a_and_receive_at_b(
    shared_redis: Any, namespace: str, at_a: Exported, at_b: Exported
) -> AsyncIterator[AnalyzeSession]:
    """Open a session in worker A. Its notifications arrive at worker B, and both are instrumented.

    B receives once A has stored the trace. An earlier notification would not have it.
    """

    async def receive_late(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await until(lambda: mailboxes_a._writer is not None and mailboxes_a._writer.done())
        await WebhookReceiver(mailboxes_b, CREDENTIALS)(scope, receive, send)

    async with (
        open_mailboxes(shared_redis, namespace) as mailboxes_a,
        open_mailboxes(shared_redis, namespace) as mailboxes_b,
        serve_asgi(receive_late) as origin,
        Emulator(task_seconds=0.2) as emulator,
        AnalyzeSession(
            Credentials.from_url(emulator.cloudinary_url),
            notifications=mailboxes_a,
            notification_url=f"{origin}/hook?key=pLanted-query-7c1d",
        ) as session,
    ):
        at_a.instrument(session)
        at_b.instrument(mailboxes_b)
        yield session
        await until(lambda: at_a.named("process notification"))
        await until(lambda: at_b.named("receive notification"))


async def test_submit_in_a_and_webhook_at_b_are_one_trace(
    shared_redis: Any, exported: Exported, request: pytest.FixtureRequest
) -> None:
    """Worker A submits, worker B receives the webhook, A answers: one trace over two exporters."""
    at_a, at_b, namespace = exported, Exported(), request.node.name
    async with submit_in_a_and_receive_at_b(shared_redis, namespace, at_a, at_b) as session:
        response = await session.submit(Captioning(PLANTED), timeout=60)
        assert response.analysis.caption
    submission = at_a.only("analyze captioning")
    received, processed = at_b.only("receive notification"), at_a.only("process notification")
    spans = [*at_a.spans.get_finished_spans(), *at_b.spans.get_finished_spans()]
    assert {trace_of(span) for span in spans} == {trace_of(submission)}
    for span in (received, processed, at_a.only("task captioning")):
        assert parent_of(span) == id_of(submission)
    for span in (received, processed):
        assert [link.context.span_id for link in span.links] == [id_of(submission)]
        assert span.kind.name == "CONSUMER"
    for text in (at_a.everything(), at_b.everything()):
        assert "pLanted" not in text
        assert "?" not in text


@pytest.mark.parametrize(
    ("state", "carried"),
    [
        ("vendor=abc, other=1:2", {"vendor": "abc", "other": "1:2"}),
        ("", {}),
        (
            ",".join(
                [f"new=a{'n' * 50}", f"long={'l' * 200}", *(f"k{n}={'v' * 90}" for n in range(8))]
            ),
            {"new": f"a{'n' * 50}"} | {f"k{n}": "v" * 90 for n in range(4)},
        ),
    ],
    ids=["two", "none", "too long"],
)
async def test_tracestate_is_carried_with_the_trace(
    shared_redis: Any,
    exported: Exported,
    request: pytest.FixtureRequest,
    state: str,
    carried: dict[str, str],
) -> None:
    """It goes from the submission through Redis to the webhook and to the answer, bounded."""
    at_b, namespace = Exported(), f"state-{len(state)}"
    parent = f"00-{'1' * 32}-{'2' * 16}-01"
    outer = TraceContextTextMapPropagator().extract({"traceparent": parent, "tracestate": state})
    async with submit_in_a_and_receive_at_b(shared_redis, namespace, exported, at_b) as session:
        token = attach(outer)
        try:
            await session.submit(Captioning(URL), timeout=60)
        finally:
            detach(token)
    received, processed = at_b.only("receive notification"), exported.only("process notification")
    assert dict(received.context.trace_state) == carried
    assert carried.items() <= dict(processed.context.trace_state).items()
    assert {trace_of(received), trace_of(processed)} == {
        trace_of(exported.only("analyze captioning"))
    }


@given(st.text(max_size=3000))
def test_any_carried_context_is_read(text: str) -> None:
    """Redis and a user's own source may hold anything."""
    for carried in (text, f"00-{'1' * 32}-{'2' * 16}-01 {text}"):
        context = telemetry._read_context(carried)
        assert len(context.trace_state.to_header()) <= 512
        assert len(telemetry._write_context(context) or "") <= 55 + 1 + 512


async def test_a_third_worker_links_to_the_submission(
    shared_redis: Any, exported: Exported, request: pytest.FixtureRequest
) -> None:
    """A submits and goes away, B receives, C attaches by the task's id and gets the result."""
    at_c, namespace = Exported(), request.node.name
    async with Emulator(task_seconds=3600) as emulator:
        credentials = Credentials.from_url(emulator.cloudinary_url)
        async with (
            open_mailboxes(shared_redis, namespace) as mailboxes,
            AnalyzeSession(credentials, notifications=mailboxes) as session,
        ):
            exported.instrument(session)
            handle = session.submit(Captioning(URL))
            task_id = await handle.accepted()
            assert task_id
            handle.abandon()
            await until(lambda: mailboxes._writer is not None and mailboxes._writer.done())
        async with open_mailboxes(shared_redis, namespace) as mailboxes:  # not instrumented
            await mailboxes.put(build_delivery(task_id))
        async with (
            open_mailboxes(shared_redis, namespace) as mailboxes,
            AnalyzeSession(credentials, notifications=mailboxes) as session,
        ):
            at_c.instrument(session)
            await session.task(task_id, Captioning, timeout=60)
            await until(lambda: at_c.named("process notification"))
    submission, processed = (
        exported.only("analyze captioning"),
        at_c.only("process notification"),
    )
    assert trace_of(processed) == trace_of(submission)
    assert parent_of(processed) == id_of(submission)
    assert [link.context.span_id for link in processed.links] == [id_of(submission)]


@pytest.mark.parametrize("stored", [None, b"garbage", b"\xff\xfe", b"00-0-0-00", "a list"])
async def test_a_task_without_a_usable_trace_is_answered(
    shared_redis: Any, exported: Exported, stored: Any, request: pytest.FixtureRequest
) -> None:
    namespace = request.node.name
    async with (
        open_mailboxes(shared_redis, namespace) as mailboxes,
        Emulator(task_seconds=3600) as emulator,
        AnalyzeSession(
            Credentials.from_url(emulator.cloudinary_url), notifications=mailboxes
        ) as session,
    ):
        task_id = await (task := session.submit(Captioning(URL))).accepted()
        assert task_id
        name = f"{namespace}:trace:{task_id}"
        if isinstance(stored, bytes):
            await mailboxes._connect().set(name, stored)
        elif stored is not None:
            await mailboxes._connect().rpush(name, stored)
        exported.instrument(session)
        await mailboxes.put(build_delivery(task_id))
        assert (await task).analysis.caption == "A cat"
        await until(lambda: exported.measure("cloudinary.analyze.notifications"))
    received = exported.only("receive notification")
    assert (received.parent, list(received.links)) == (None, [])
    assert not exported.named("process notification")


async def test_a_receipt_is_a_child_of_the_request_where_no_trace_is_known(
    shared_redis: Any, exported: Exported, request: pytest.FixtureRequest
) -> None:
    async with open_mailboxes(shared_redis, request.node.name) as mailboxes:
        exported.instrument(mailboxes)
        with exported.tracer_provider.get_tracer("test").start_as_current_span("POST /hook"):
            await mailboxes.put(build_delivery("t1"))
    assert parent_of(exported.only("receive notification")) == id_of(exported.only("POST /hook"))


async def test_a_sampling_decision_is_kept(
    shared_redis: Any, exported: Exported, request: pytest.FixtureRequest
) -> None:
    """What A does not sample, B does not export."""
    silent = TracerProvider(sampler=ALWAYS_OFF)
    async with (
        open_mailboxes(shared_redis, request.node.name) as mailboxes_a,
        open_mailboxes(shared_redis, request.node.name) as mailboxes_b,
        Emulator(task_seconds=3600) as emulator,
        AnalyzeSession(
            Credentials.from_url(emulator.cloudinary_url), notifications=mailboxes_a
        ) as session,
    ):
        instrument(session, tracer_provider=silent)
        exported.instrument(mailboxes_b)
        task_id = await (task := session.submit(Captioning(URL))).accepted()
        assert task_id
        await until(lambda: mailboxes_a._writer is not None and mailboxes_a._writer.done())
        await mailboxes_b.put(build_delivery(task_id))
        await task
    assert not exported.spans.get_finished_spans()


async def test_a_broken_store_is_an_error_of_the_receipt(
    exported: Exported, own_redis: Any
) -> None:
    async with open_mailboxes(own_redis, "x") as mailboxes:
        exported.instrument(mailboxes)
        await mailboxes.put(build_delivery("t1"))
        own_redis.kill()
        with pytest.raises(Exception, match="onnect"):
            await mailboxes.put(build_delivery("t2"))
    good, bad = exported.named("receive notification")
    assert good.status.status_code.name == "UNSET"
    assert bad.status.status_code.name == "ERROR"


async def test_an_attribute_is_never_long(exported: Exported) -> None:
    body = {"request_id": "r" * 100_000, "data": {"analysis": {"data": {"caption": "x"}}}}
    async with ScriptedServer(answer(content=body)) as server, server.session() as session:
        exported.instrument(session)
        await session.analyze(Captioning(URL))
    assert len(exported.only("analyze captioning").to_json()) < 3000


async def test_a_header_from_outside_joins_no_trace_of_a_known_task(exported: Exported) -> None:
    """A delivery that a user's own source fills may have any `traceparent`."""
    queue: asyncio.Queue[Delivery] = asyncio.Queue()
    async with Emulator(on_delivery=queue.put_nowait, task_seconds=3600) as emulator:
        credentials = Credentials.from_url(emulator.cloudinary_url)
        async with AnalyzeSession(credentials, notifications=queue) as session:
            exported.instrument(session)
            task_id = await (task := session.submit(Captioning(URL))).accepted()
            delivery = build_delivery(task_id)
            outside = f"00-{'a' * 32}-{'b' * 16}-01"
            headers = {**delivery.headers, "TraceParent": outside}
            queue.put_nowait(Delivery(delivery.body, headers))
            await task
            await until(lambda: exported.named("process notification"))
    submission, processed = (
        exported.only("analyze captioning"),
        exported.only("process notification"),
    )
    assert trace_of(processed) == trace_of(submission)
    assert [link.context.span_id for link in processed.links] == [
        id_of(submission),
        0xBBBBBBBBBBBBBBBB,
    ]
    assert trace.INVALID_SPAN_CONTEXT.span_id == 0
