"""Events of calls, polls, tasks and streams over real sockets: a trace can be built from them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest
from scripted import (
    CAPTION,
    KEY,
    SECRET,
    URL,
    ScriptedServer,
    after,
    answer,
    hang_up,
    never_answer,
    one_after_the_other,
    until,
    wind,
)
from task_support import build_result, connected, quick, sign

from cloudinary_analyze import (
    AnalyzeSession,
    BadRequestError,
    CallTimeoutError,
    Captioning,
    ConfigurationError,
    Credentials,
    Delivery,
    NotFoundError,
    QuotaExceededError,
    ResponseDecodeError,
    ServerError,
    TaskFailedError,
)
from cloudinary_analyze.emulator import FaultPlan
from cloudinary_analyze.events import (
    AttemptFinished,
    AttemptRetried,
    CallFinished,
    CallStarted,
    ItemRestored,
    NotificationSeen,
    PollFinished,
    SessionPaused,
    TaskAccepted,
    TaskAnswered,
)
from cloudinary_analyze.ledger.sqlite import SQLiteLedger
from cloudinary_analyze.notifications.receiver import Intake
from cloudinary_analyze.protocols import Claim
from cloudinary_analyze.testing import ManualClock

LIMITED = answer(
    content={
        "request_id": "r1",
        "data": {"entity": URL, "analysis": {"data": {"caption": "a cat"}, "model_version": 1}},
        "limits": {"addons_quota": [{"type": "ai_vision", "used_by_request": 3, "remaining": 7}]},
    }
)


def names(events: list[Any]) -> list[str]:
    return [type(event).__name__ for event in events]


def only(events: list[Any], kind: type[Any]) -> Any:
    (found,) = [event for event in events if type(event) is kind]
    return found


async def test_a_success_on_the_third_attempt_shows_all() -> None:
    events: list[Any] = []
    handler = one_after_the_other(answer(503), hang_up(), LIMITED)
    async with ScriptedServer(handler) as server:
        async with server.session(on_event=events.append) as session:
            await session.analyze(Captioning(URL))
    assert names(events) == [
        "CallStarted",
        *["AttemptFinished", "AttemptRetried"] * 2,
        "AttemptFinished",
        "CallFinished",
    ]
    assert {event.call for event in events} == {1}
    assert events[0] == CallStarted(call=1, model="captioning", as_task=False)
    attempts = [event for event in events if type(event) is AttemptFinished]
    assert [(e.attempt, e.status, e.ambiguous) for e in attempts] == [
        (1, 503, False),
        (2, None, True),
        (3, 200, False),
    ]
    assert isinstance(attempts[0].error, ServerError)
    assert attempts[2].error is None
    finished = events[-1]
    assert (finished.status, finished.request_id, finished.attempts) == (200, "r1", 3)
    assert (finished.limits[0].used_by_request, finished.task_id) == (3, None)
    assert finished.seconds >= sum(e.seconds + e.permit_wait for e in attempts)
    assert finished.permit_wait == pytest.approx(sum(e.permit_wait for e in attempts))


async def test_each_call_in_flight_has_its_number() -> None:
    events: list[Any] = []
    async with ScriptedServer(CAPTION) as server:
        async with server.session(on_event=events.append, permits=2) as session:
            await asyncio.gather(*(session.analyze(Captioning(URL)) for _ in range(20)))
    calls: dict[int, list[str]] = {}
    for event in events:
        calls.setdefault(event.call, []).append(type(event).__name__)
    assert sorted(calls) == [*range(1, 21)]
    assert {(*told,) for told in calls.values()} == {
        ("CallStarted", "AttemptFinished", "CallFinished")
    }


async def test_the_wait_for_a_permit_is_reported(clock: ManualClock) -> None:
    events: list[Any] = []
    release = asyncio.Event()
    async with ScriptedServer(after(release)) as server:
        async with server.session(clock=clock, on_event=events.append, permits=1) as session:
            first = asyncio.create_task(session.analyze(Captioning(URL)))
            await until(lambda: server.seen)
            second = asyncio.create_task(session.analyze(Captioning(URL)))
            late = asyncio.create_task(session.analyze(Captioning(URL), timeout=2))
            await until(lambda: session.stats.waiting == 2)
            await clock.advance(3.0)
            with pytest.raises(CallTimeoutError):
                await late
            release.set()
            await asyncio.gather(first, second)
    ended = {event.call: event for event in events if type(event) is CallFinished}
    assert [ended[number].permit_wait for number in (1, 2, 3)] == [0, 3, 2]
    assert (ended[3].attempts, ended[3].status) == (0, None)
    assert isinstance(ended[3].error, CallTimeoutError)
    waits = {e.call: e.permit_wait for e in events if type(e) is AttemptFinished}
    assert waits == {1: 0, 2: 3}


async def test_a_cancelled_attempt_may_be_charged() -> None:
    events: list[Any] = []
    async with ScriptedServer(never_answer) as server:
        async with server.session(on_event=events.append) as session:
            call = asyncio.create_task(session.analyze(Captioning(URL)))
            await until(lambda: server.seen)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
    assert names(events) == ["CallStarted", "AttemptFinished", "CallFinished"]
    assert (events[1].ambiguous, events[1].status) == (True, None)
    assert isinstance(events[2].error, asyncio.CancelledError)


async def test_an_unreadable_response_has_its_status() -> None:
    events: list[Any] = []
    async with ScriptedServer(answer(body=b"{")) as server:
        async with server.session(on_event=events.append) as session:
            with pytest.raises(ResponseDecodeError):
                await session.analyze(Captioning(URL))
    attempt = only(events, AttemptFinished)
    assert (attempt.status, attempt.ambiguous, events[-1].status) == (200, True, 200)


async def test_an_error_has_its_request_id() -> None:
    events: list[Any] = []
    handler = answer(400, {"error": {"message": "no"}, "request_id": "r9"})
    async with ScriptedServer(handler) as server:
        async with server.session(on_event=events.append) as session:
            with pytest.raises(BadRequestError):
                await session.analyze(Captioning(URL))
    finished = only(events, CallFinished)
    assert (finished.status, finished.request_id) == (400, "r9")


async def test_a_task_is_followed_from_call_to_answer() -> None:
    events: list[Any] = []
    async with connected(
        quick(poll_first=0.02), session_options={"on_event": events.append}, task_seconds=3600
    ) as (emulator, session):
        task_id = await (task := session.submit(Captioning(URL))).accepted()
        await asyncio.sleep(0.2)
        await until(lambda: any(type(event) is PollFinished for event in events))
        emulator._desk._finish(emulator.tasks[task_id])
        await task
    started, finished = only(events, CallStarted), only(events, CallFinished)
    assert (started.as_task, finished.task_id, finished.status) == (True, task_id, 202)
    accepted = only(events, TaskAccepted)
    assert (accepted.task_id, accepted.model) == (task_id, "captioning")
    assert events.index(finished) < events.index(accepted)
    polls = [e for e in events if type(e) is PollFinished and e.error is None]
    assert polls
    assert {poll.task_id for poll in polls} == {task_id}
    assert {poll.state for poll in polls} <= {"pending", "processing", "completed"}
    assert started.call not in {poll.call for poll in polls}
    answered = only(events, TaskAnswered)
    assert (answered.task_id, answered.by, answered.model) == (
        task_id,
        "notification",
        "captioning",
    )
    assert 0.1 < answered.seconds < 60
    assert answered.limits[0].used_by_request
    seen = only(events, NotificationSeen)
    assert (seen.verdict, seen.task_id) == ("resolved", task_id)


async def test_a_failed_poll_brings_its_error() -> None:
    events: list[Any] = []
    async with ScriptedServer(answer(404)) as server:
        async with server.session(on_event=events.append) as session:
            with pytest.raises(NotFoundError):
                await session.task_status("t1")
    poll = only(events, PollFinished)
    assert (poll.task_id, poll.state, poll.attempts) == ("t1", None, 1)
    assert isinstance(poll.error, NotFoundError)
    assert only(events, AttemptFinished).model is None


async def test_a_poll_is_never_charged() -> None:
    events: list[Any] = []
    handler = one_after_the_other(answer(500), answer(sample="task_status_pending"))
    async with ScriptedServer(handler) as server:
        async with server.session(on_event=events.append) as session:
            await session.task_status("t1")
    assert names(events) == [
        "AttemptFinished",
        "AttemptRetried",
        "AttemptFinished",
        "PollFinished",
    ]
    assert not any(getattr(event, "ambiguous", False) for event in events)


async def test_a_handle_by_id_reports_its_model() -> None:
    events: list[Any] = []
    async with connected(
        quick(poll_first=0.02),
        session_options={"on_event": events.append},
        faults=FaultPlan(failed=1, lost=1),
    ) as (_, session):
        handle = session.submit(Captioning(URL), mode="task", timeout=60)
        task_id = await handle.accepted()
        handle.abandon()
        with pytest.raises(Exception, match="task"):
            await session.task(task_id or "", Captioning, timeout=60)
    answered = only(events, TaskAnswered)
    assert (answered.model, answered.by) == ("captioning", "poll")
    assert answered.error is not None


async def test_restored_items_are_reported(tmp_path: Path) -> None:
    events: list[Any] = []
    handler = one_after_the_other(LIMITED, answer(400, {"error": {"message": "no"}}))
    urls = [f"https://example.com/{number}.jpg" for number in range(2)]
    async with ScriptedServer(handler) as server, SQLiteLedger(tmp_path / "a.ledger") as ledger:
        for hook in (None, events.append):
            async with server.session(on_event=hook, permits=1) as session:
                async with session.map([*urls, urls[0]], Captioning, ledger=ledger) as stream:
                    outcomes = [outcome async for outcome in stream]
    assert {outcome.restored for outcome in outcomes} == {True}
    assert names(events) == ["ItemRestored"] * 3
    assert {event.model for event in events} == {"captioning"}
    assert sorted(type(event.error).__name__ for event in events) == [
        "BadRequestError",
        "NoneType",
        "NoneType",
    ]
    assert {event.key for event in events} == {Captioning(url).key for url in urls}
    assert not any(url in repr(events) for url in urls)


async def test_a_denied_call_ends_with_an_event(tmp_path: Path) -> None:
    class Denying(SQLiteLedger):
        denials = 1

        async def claim(self, key: str) -> Claim | None:
            if self.denials:
                self.denials -= 1
                return None
            return await super().claim(key)

    events: list[Any] = []
    async with ScriptedServer(CAPTION) as server, Denying(tmp_path / "a.ledger") as ledger:
        async with server.session(on_event=events.append) as session:
            async with session.map([URL], Captioning, ledger=ledger) as stream:
                assert [outcome.restored async for outcome in stream] == [False]
            assert session.stats.calls == 1
    assert [(e.call, e.denied) for e in events if type(e) is CallFinished] == [
        (1, True),
        (2, False),
    ]
    assert len(server.seen) == 1


@pytest.mark.parametrize(("status", "cause"), [(429, "throttled"), (503, "failing")])
async def test_pauses_have_a_cause(clock: ManualClock, status: int, cause: str) -> None:
    events: list[Any] = []
    handler = one_after_the_other(*[answer(status)] * 8, CAPTION)
    requests = [Captioning(f"{URL}?{number}") for number in range(8)]
    async with ScriptedServer(handler) as server:
        async with server.session(clock=clock, on_event=events.append) as session:
            stream = session.map(requests)
            await wind(clock, asyncio.gather(*(anext(stream) for _ in requests)))
            await stream.aclose()
    pause = only(events, SessionPaused)
    assert (pause.cause, pause.polls) == (cause, False)


async def test_refused_polls_emit_a_pause() -> None:
    events: list[Any] = []

    async def refuse_polls(request: Any) -> Any:
        polled = request.method == "GET"
        return await (answer(403) if polled else answer(sample="accepted_202", status=202))(request)

    async with ScriptedServer(refuse_polls) as server:
        async with server.session(
            on_event=events.append, notifications=asyncio.Queue(), poll_first=0.01
        ) as session:
            handle = session.submit(Captioning(URL))
            await until(lambda: SessionPaused in map(type, events))
            handle.abandon()
    pause = only(events, SessionPaused)
    assert (pause.cause, pause.polls, pause.seconds) == ("refused", True, 2.0)


@pytest.mark.parametrize("raised", [ValueError("no"), asyncio.CancelledError(), RecursionError()])
async def test_a_hook_that_raises_breaks_nothing(
    raised: BaseException, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def hook(_: object) -> None:
        raise raised

    async with connected(
        quick(poll_first=0.02), session_options={"on_event": hook}, task_seconds=0.1
    ) as (_, session):
        await session.analyze(Captioning(URL))
        await session.submit(Captioning(URL))
        async with SQLiteLedger(tmp_path / "a.ledger") as ledger:
            for _ in range(2):
                async with session.map([URL], Captioning, ledger=ledger) as stream:
                    assert [outcome.error async for outcome in stream] == [None]
        assert session.stats.in_flight == session.stats.permits_in_use == 0
    named = {record.args[0] for record in caplog.records if "hook failed" in record.message}
    assert named >= {"CallStarted", "AttemptFinished", "CallFinished", "TaskAnswered"}


async def hook(_: object) -> None: ...


class AsyncHook:
    async def __call__(self, _: object) -> None: ...


@pytest.mark.parametrize("wrong", [hook, partial(hook), AsyncHook(), AsyncMock()])
def test_a_coroutine_function_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="plain function"):
        AnalyzeSession(Credentials("demo", "1", "a"), on_event=wrong)


async def test_restored_and_retried_are_distinguished(tmp_path: Path) -> None:
    events: list[Any] = []
    handler = one_after_the_other(answer(503), CAPTION)
    async with ScriptedServer(handler) as server, SQLiteLedger(tmp_path / "a.ledger") as ledger:
        for _ in range(2):
            async with server.session(on_event=events.append) as session:
                async with session.map([URL], Captioning, ledger=ledger) as stream:
                    assert [outcome.error async for outcome in stream] == [None]
    assert only(events, CallFinished).attempts == 2
    assert only(events, AttemptRetried).attempt == 1
    assert only(events, ItemRestored).error is None


async def test_a_late_notification_is_reported_again() -> None:
    """Only the task's id is known by then. An exhausted quota still stops its feature."""
    events: list[Any] = []
    queue: asyncio.Queue[Delivery] = asyncio.Queue()

    async def fail(request: Any) -> Any:
        if request.method == "GET":
            return await answer(content={"data": {"task_id": "t1", "status": "failed"}})(request)
        return await answer(202, {"data": {"task_id": "t1", "status": "pending"}})(request)

    async with ScriptedServer(fail) as server:
        async with server.session(
            on_event=events.append, notifications=queue, poll_first=0.01, failure_grace=0.01
        ) as session:
            with pytest.raises(TaskFailedError):
                await session.submit(Captioning(URL), timeout=60)
            error = {
                "code": "MA_00429",
                "message": "quota exceeded",
                "details": {"feature_name": "object_detection"},
            }
            limits = {"addons_quota": [{"type": "object_detection", "remaining": 0}]}
            body = build_result("t1", data=None, error=error, http_status=429, limits=limits)
            before = session.stats
            queue.put_nowait(sign(body, at=time.time(), received_at=time.time(), secret=SECRET))
            await until(lambda: session.stats.notifications)
            assert not before.notifications  # a snapshot
            with pytest.raises(QuotaExceededError):
                await session.analyze(Captioning(URL))
            assert len([seen for seen in server.seen if seen.method == "POST"]) == 1
    first, second = (event for event in events if type(event) is TaskAnswered)
    assert (first.by, first.model, first.seconds > 0) == ("poll", "captioning", True)
    assert (second.by, second.model, second.seconds) == ("notification", None, None)
    assert second.limits[0].remaining == 0


async def test_polls_do_not_run_in_the_context_of_a_request() -> None:
    """Polls serve all tasks, so a request handler's context variables are not theirs."""
    request: ContextVar[str] = ContextVar("request", default="none")
    contexts: dict[str, set[str]] = {}

    def hook(event: Any) -> None:
        contexts.setdefault(type(event).__name__, set()).add(request.get())

    async def handle(number: int) -> None:
        request.set(f"request {number}")
        await session.submit(Captioning(URL))

    async with connected(
        quick(poll_first=0.01), session_options={"on_event": hook}, task_seconds=3600
    ) as (emulator, session):
        handling = [asyncio.create_task(handle(number)) for number in range(3)]
        await until(lambda: len(emulator.tasks) == 3 and "PollFinished" in contexts)
        for task in list(emulator.tasks.values()):
            emulator._desk._finish(task)
        await asyncio.gather(*handling)
    assert contexts["PollFinished"] == {"none"}
    assert contexts["CallStarted"] == {"request 0", "request 1", "request 2"}


async def test_a_repeated_task_names_itself() -> None:
    events: list[Any] = []
    async with connected(
        quick(poll_first=0.01, result_grace=0.01, on_missing_result="analyze"),
        session_options={"on_event": events.append},
        task_seconds=0.01,
        faults=FaultPlan(lost=1),
    ) as (_, session):
        await (task := session.submit(Captioning(URL)))
    first, second = (event for event in events if type(event) is CallStarted)
    assert (first.repeats, second.repeats) == (None, task.task_id)
    assert only(events, TaskAnswered).by == "analyze"


class BreakingSource:
    """A source and a sink whose errors quote a URL."""

    def __init__(self, url: str) -> None:
        self.url, self.calls = url, 0

    async def listen(self) -> AsyncIterator[Delivery]:
        self.calls += 1
        raise OSError(f"GET {self.url} failed")
        yield

    async def fetch(self, _: object) -> list[Delivery]:
        raise OSError(f"GET {self.url} failed")

    async def put(self, _: Delivery, /) -> None:
        raise OSError(f"PUT {self.url} failed")


async def test_no_log_line_holds_a_query_string(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "cloudinary_analyze")
    url = "https://x.test/a.jpg?sig=pLanted-query"
    source = BreakingSource(url)
    quoted = {"error": {"message": f"could not fetch {url}", "code": "MA_00001"}}

    async def refuse(request: Any) -> Any:
        if request.method == "GET":
            return await answer(403, quoted)(request)
        return await answer(202, {"data": {"task_id": "t1", "status": "pending"}})(request)

    async with ScriptedServer(refuse) as server:
        credentials = Credentials("demo", KEY, SECRET)
        async with server.session(
            notifications=source, notification_url=url, poll_first=0.01, credentials=credentials
        ) as session:
            task = session.submit(Captioning(url))
            await until(lambda: "are refused" in caplog.text and source.calls)
            task.abandon()
            server.handler = answer(400, quoted)
            async with SQLiteLedger(tmp_path / "a.ledger") as ledger:
                async with session.map([url], Captioning, mode="task", ledger=ledger) as stream:
                    assert [type(outcome.error) async for outcome in stream] == [BadRequestError]
        delivery = sign(build_result("t1"), at=time.time(), secret=SECRET)
        reply = await Intake(source, credentials).take(delivery.body, delivery.headers)
        assert reply.status == 503
    names = {record.name for record in caplog.records}
    assert names >= {"cloudinary_analyze.tasks", "cloudinary_analyze.notifications"}
    for record in caplog.records:
        if record.name.startswith("cloudinary_analyze"):
            assert "pLanted" not in f"{record.getMessage()} {record.args!r}", record
