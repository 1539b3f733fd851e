"""Open once, use on one loop, close once: anything else is one clear error."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yarl
from aiohttp import web
from scripted import (
    CAPTION,
    KEY,
    SAMPLES,
    SECRET,
    URL,
    ScriptedServer,
    answer,
    busy,
    have_failed,
    requests_of,
    until,
)

import cloudinary_analyze
from cloudinary_analyze import (
    AnalyzeSession,
    BulkStoppedError,
    Captioning,
    ConfigurationError,
    Credentials,
    Delivery,
    SessionAlreadyOpenError,
    SessionClosedError,
    SessionNotOpenError,
    Settings,
    WrongEventLoopError,
)
from cloudinary_analyze.testing import ManualClock

DEMO = Credentials("demo", KEY, SECRET)


class Held:
    """Answers on request."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        await self.open.wait()
        return await CAPTION(request)


async def test_a_session_that_is_not_open_says_how_to_open_it() -> None:
    session = AnalyzeSession(DEMO)
    with pytest.raises(SessionNotOpenError, match="async with"):
        await session.analyze(Captioning(URL))
    with pytest.raises(SessionNotOpenError, match="async with"):
        session.map([Captioning(URL)])
    with pytest.raises(SessionNotOpenError, match="async with"):
        await session.analyze_all([Captioning(URL)])
    assert session.stats.calls == 0
    await session.aclose()


def test_a_plain_with_says_to_write_async_with() -> None:
    with pytest.raises(SessionNotOpenError, match="write `async with`, not `with`"):
        with AnalyzeSession(DEMO):
            pass


async def test_a_closed_session_stays_closed() -> None:
    async with ScriptedServer(CAPTION) as server:
        async with server.session() as session:
            await session.analyze(Captioning(URL))
        with pytest.raises(SessionClosedError):
            await session.analyze(Captioning(URL))
        with pytest.raises(SessionClosedError):
            session.map([Captioning(URL)])
        with pytest.raises(SessionClosedError, match="cannot be opened again"):
            await session.__aenter__()
        await session.aclose()
        assert session.stats.calls == 1
        assert "closed" in repr(session)


async def test_a_session_opens_once() -> None:
    async with AnalyzeSession(DEMO) as session:
        with pytest.raises(SessionAlreadyOpenError, match="already open"):
            await session.__aenter__()


async def test_an_unopened_session_that_was_closed_does_not_open() -> None:
    session = AnalyzeSession(DEMO)
    await session.aclose()
    with pytest.raises(SessionClosedError):
        await session.__aenter__()


def test_another_event_loop_is_one_clear_error() -> None:
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    try:
        session = first.run_until_complete(AnalyzeSession(DEMO).__aenter__())

        async def use() -> None:
            with pytest.raises(WrongEventLoopError, match="one session per loop"):
                await session.analyze(Captioning(URL))
            with pytest.raises(WrongEventLoopError, match="one session per loop"):
                session.map([Captioning(URL)])

        second.run_until_complete(use())
        with pytest.raises(WrongEventLoopError, match="one session per loop"):
            session.submit(Captioning(URL))  # on no loop at all
        first.run_until_complete(session.aclose())
    finally:
        first.close()
        second.close()


def test_a_close_refused_on_another_loop_can_be_repeated() -> None:
    """A refused `aclose` must not mark a session as closed while its pool is open."""
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    session = first.run_until_complete(AnalyzeSession(DEMO).__aenter__())
    assert session._connection.caller is not None
    transport = session._connection.caller.transport

    async def close_wrongly() -> None:
        with pytest.raises(WrongEventLoopError):
            await session.aclose()

    try:
        second.run_until_complete(close_wrongly())
        first.run_until_complete(session.aclose())
        assert transport._http.closed
    finally:
        first.run_until_complete(transport.close())
        first.close()
        second.close()


async def test_a_session_dropped_open_warns() -> None:
    session = await AnalyzeSession(DEMO).__aenter__()
    # without an open pool, the only warning is the session's
    await session._connection.caller.transport.close()  # type: ignore[union-attr]
    with pytest.warns(ResourceWarning, match="dropped without being closed"):  # noqa: PT031
        del session
        for _ in range(3):
            await asyncio.sleep(0)
        gc.collect()


async def test_a_session_that_was_never_opened_or_was_closed_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AnalyzeSession(DEMO)
        async with AnalyzeSession(DEMO):
            pass
        gc.collect()


async def test_our_own_pool_is_closed_and_an_injected_one_is_not() -> None:
    async with ScriptedServer(CAPTION) as server:
        connector = aiohttp.TCPConnector(limit=64)
        async with aiohttp.ClientSession(connector=connector, headers={"X-Mine": "1"}) as http:
            for _ in range(2):
                async with server.session(http=http) as session:
                    await session.analyze(Captioning(URL))
                assert not http.closed
            async with http.get(server.url) as response:
                assert response.status == 200
            assert "Authorization" not in server.seen[-1].headers
        assert server.seen[0].headers["X-Mine"] == "1"
        assert server.seen[0].headers["Authorization"].startswith("Basic ")
        async with server.session() as session:
            own = session._connection.caller.transport._http  # type: ignore[union-attr]
        assert own.closed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"connector": {"limit": 63}}, "limit=63, less than Settings.permits=64"),
        ({"connector": {"limit_per_host": 10}}, "limit_per_host=10"),
        ({"auth": ("a", "b")}, "its own credentials"),
        ({"headers": {"authorization": "Bearer x"}}, "its own credentials"),
        ({"closed": True}, "is closed"),
    ],
)
async def test_an_unsuitable_injected_session_is_refused(
    options: dict[str, Any], said: str
) -> None:
    closed = options.pop("closed", False)
    if "connector" in options:
        options = {"connector": aiohttp.TCPConnector(**options["connector"])}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # users still pass `auth`
        if "auth" in options:
            options = {"auth": aiohttp.BasicAuth(*options["auth"])}
        http = aiohttp.ClientSession(**options)
    async with http:
        if closed:
            await http.close()
        session = AnalyzeSession(DEMO, http=http)
        with pytest.raises(ConfigurationError, match=said):
            await session.__aenter__()


async def test_a_closed_injected_session_is_one_clear_error() -> None:
    async with ScriptedServer(CAPTION) as server, aiohttp.ClientSession() as http:
        async with server.session(http=http, permits=4) as session:
            await session.analyze(Captioning(URL))
            await http.close()
            with pytest.raises(ConfigurationError, match="was closed"):
                await session.analyze(Captioning(URL))
            with pytest.raises(BulkStoppedError, match="was closed"):
                [outcome async for outcome in session.map([URL] * 3, Captioning)]
            assert busy(session.stats) == (0, 0, 0)


async def test_options_of_an_injected_session_do_not_interfere() -> None:
    async with ScriptedServer(answer(404, sample="error_404_task")) as server:
        async with aiohttp.ClientSession(
            raise_for_status=True, timeout=aiohttp.ClientTimeout(total=0.001)
        ) as http:
            async with server.session(http=http) as session:
                with pytest.raises(cloudinary_analyze.NotFoundError):
                    await session.analyze(Captioning(URL))


async def test_an_unlimited_or_wide_enough_connector_is_accepted() -> None:
    for limit in (0, 64, 100):
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=limit)) as http:
            async with AnalyzeSession(DEMO, http=http):
                pass


async def test_closing_is_idempotent_and_lets_attempts_in_flight_finish() -> None:
    held = Held()
    async with ScriptedServer(held) as server:
        session = await server.session().__aenter__()
        call = asyncio.create_task(session.analyze(Captioning(URL)))
        await until(lambda: server.in_flight)
        closing = asyncio.create_task(session.aclose())
        await asyncio.sleep(0)
        with pytest.raises(SessionClosedError):
            await session.analyze(Captioning(URL))
        held.open.set()
        assert (await call).model == "captioning"
        await closing
        await session.aclose()
        assert busy(session.stats) == (0, 0, 0)


async def test_closing_fails_queued_calls_unsent() -> None:
    held = Held()
    async with ScriptedServer(held) as server:
        session = await server.session(permits=1).__aenter__()
        calls = [asyncio.create_task(session.analyze(r)) for r in requests_of(4, Captioning)]
        await until(lambda: server.in_flight and session.stats.waiting == 3)
        closing = asyncio.create_task(session.aclose())
        await asyncio.wait(calls[1:], timeout=30)
        held.open.set()
        await closing
        await calls[0]
        for call in calls[1:]:
            with pytest.raises(SessionClosedError):
                await call
        assert len(server.seen) == 1


async def test_closing_ends_the_waits_between_retries(caplog: pytest.LogCaptureFixture) -> None:
    handler = answer(503, headers={"Retry-After": "60"})
    async with ScriptedServer(handler) as server:
        session = await server.session().__aenter__()
        calls = [asyncio.create_task(session.analyze(r)) for r in requests_of(3, Captioning)]
        await until(lambda: have_failed(session, 3))
        async with asyncio.timeout(30):
            await session.aclose()
            for call in calls:
                with pytest.raises(SessionClosedError):
                    await call
        assert busy(session.stats) == (0, 0, 0)
    # threads of other tests may start event loops
    assert [r for r in caplog.records if (r.name, r.levelno) != ("asyncio", logging.DEBUG)] == []


async def test_closing_a_waiting_stream_leaves_no_unread_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "asyncio")
    handler = answer(503, headers={"Retry-After": "60"})
    async with ScriptedServer(handler) as server:
        session = await server.session().__aenter__()
        stream = session.map(requests_of(3, Captioning))
        consumer = asyncio.create_task(anext(stream))
        await until(lambda: have_failed(session, 3))
        await session.aclose()
        async with asyncio.timeout(30):
            with pytest.raises(BulkStoppedError):
                await consumer
    gc.collect()
    await asyncio.sleep(0)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("injected", [False, True])
async def test_a_hanging_response_delays_the_close_briefly(
    monkeypatch: pytest.MonkeyPatch, injected: bool
) -> None:
    monkeypatch.setattr("cloudinary_analyze.session.CLOSE_PATIENCE", 0.05)
    async with ScriptedServer(Held()) as server, aiohttp.ClientSession() as http:
        session = await server.session(http=http if injected else None).__aenter__()
        call = asyncio.create_task(session.analyze(Captioning(URL)))
        await until(lambda: server.in_flight)
        async with asyncio.timeout(30):
            await session.aclose()
            with pytest.raises(SessionClosedError):
                await call
        assert busy(session.stats) == (0, 0, 0)


async def test_a_close_waits_five_seconds_for_responses(clock: ManualClock) -> None:
    async with ScriptedServer(Held()) as server:
        session = await server.session(clock=clock).__aenter__()
        call = asyncio.create_task(session.analyze(Captioning(URL)))
        await until(lambda: server.in_flight)
        closing = asyncio.create_task(session.aclose())
        await clock.advance(4.9)
        assert not closing.done()
        await clock.advance(0.2)
        await asyncio.wait_for(closing, 10)
        with pytest.raises(SessionClosedError):
            await call


async def test_a_closed_session_releases_its_source() -> None:
    queue: asyncio.Queue[Delivery] = asyncio.Queue()
    async with ScriptedServer(CAPTION) as server:
        async with server.session(notifications=queue) as first:
            await first.analyze(Captioning(URL))
        async with server.session(notifications=queue) as second:
            await second.analyze(Captioning(URL))
        assert first is not second  # the first one still exists


async def test_calls_failed_by_the_close_do_not_share_one_exception() -> None:
    """A shared exception would collect the tracebacks of all calls and keep their frames alive."""
    handler = answer(503, headers={"Retry-After": "60"})
    async with ScriptedServer(handler) as server:
        session = await server.session(permits=2).__aenter__()
        calls = [asyncio.create_task(session.analyze(r)) for r in requests_of(6, Captioning)]
        await until(lambda: have_failed(session, 2) and session.stats.waiting == 4)
        await session.aclose()
        errors = [error for call in calls if (error := await outcome_of(call))]
    assert len({id(error) for error in errors}) == 6
    assert {type(error) for error in errors} == {SessionClosedError}


async def outcome_of(call: asyncio.Task[Any]) -> BaseException | None:
    try:
        await call
    except SessionClosedError as error:
        return error
    return None


async def test_a_stream_of_a_closed_session_raises() -> None:
    held = Held()
    async with ScriptedServer(held) as server:
        session = await server.session(permits=2).__aenter__()
        found: list[Any] = []

        async def consume() -> None:
            async for outcome in session.map(requests_of(20, Captioning)):
                found.append(outcome)

        consumer = asyncio.create_task(consume())
        await until(lambda: server.in_flight == 2)
        held.open.set()
        await until(lambda: found)
        await session.aclose()
        with pytest.raises(BulkStoppedError):
            await consumer
        assert len(found) < 20


async def test_analyze_all_has_all_outcomes_after_a_close() -> None:
    held = Held()
    async with ScriptedServer(held) as server:
        session = await server.session(permits=2).__aenter__()
        everything = asyncio.create_task(session.analyze_all(requests_of(20, Captioning)))
        await until(lambda: server.in_flight == 2)
        closing = asyncio.create_task(session.aclose())
        await asyncio.sleep(0)
        held.open.set()
        outcomes = await everything
        await closing
    assert [outcome.index for outcome in outcomes] == list(range(20))
    assert all((outcome.response is None) != (outcome.error is None) for outcome in outcomes)
    assert isinstance(outcomes[-1].error, BulkStoppedError)


def test_credentials_and_hosts_are_checked_without_a_loop() -> None:
    with pytest.raises(ConfigurationError, match="CLOUDINARY_URL"):
        AnalyzeSession()
    with pytest.raises(ConfigurationError, match="plain http"):
        AnalyzeSession(DEMO, settings=Settings(host="http://api.cloudinary.com"))
    session = AnalyzeSession(DEMO, settings=Settings(host="api-eu.cloudinary.com"))
    assert "https://api-eu.cloudinary.com" in repr(session)
    assert SECRET not in repr(session)


async def test_a_call_cut_off_by_the_close_says_that_it_may_be_charged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cloudinary_analyze.session.CLOSE_PATIENCE", 0.01)
    async with ScriptedServer(Held()) as server:
        session = await server.session(permits=1).__aenter__()
        on_the_wire = asyncio.create_task(session.analyze(Captioning(URL)))
        queueing = asyncio.create_task(session.analyze(Captioning(URL)))
        await until(lambda: server.in_flight and session.stats.waiting)
        await session.aclose()
        errors = [await outcome_of(on_the_wire), await outcome_of(queueing)]
    assert [getattr(error, "ambiguous", None) for error in errors] == [True, False]


async def test_a_second_close_waits_for_the_first() -> None:
    held = Held()
    async with asyncio.timeout(30), ScriptedServer(held) as server:
        session = await server.session().__aenter__()
        call = asyncio.create_task(session.analyze(Captioning(URL)))
        await until(lambda: server.in_flight)
        first = asyncio.create_task(session.aclose())
        await asyncio.sleep(0)
        others = [asyncio.create_task(session.aclose()) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in [first, *others])
        others[0].cancel()
        await asyncio.wait(others[:1])
        assert others[0].cancelled()
        assert not first.done()
        held.open.set()
        await asyncio.gather(call, first, *others[1:])
        assert session._connection.caller.transport._http.closed  # type: ignore[union-attr]


async def test_a_second_close_ends_when_the_first_is_cancelled() -> None:
    held = Held()
    async with asyncio.timeout(30), ScriptedServer(held) as server:
        session = await server.session().__aenter__()
        call = asyncio.create_task(session.analyze(Captioning(URL)))
        await until(lambda: server.in_flight)
        first = asyncio.create_task(session.aclose())
        await asyncio.sleep(0)
        second = asyncio.create_task(session.aclose())
        await asyncio.sleep(0)
        first.cancel()
        await second
        assert first.cancelled()
        with pytest.raises(SessionClosedError):
            await call
        held.open.set()


@pytest.mark.parametrize("first", ["input", "outside"])
async def test_an_input_may_close_the_session_in_its_clean_up(first: str) -> None:
    async def rows() -> AsyncIterator[str]:
        try:
            yield URL
            await asyncio.sleep(60)
        finally:
            await session.aclose()

    async with asyncio.timeout(30), ScriptedServer(CAPTION) as server:
        session = await server.session().__aenter__()
        stream = session.map(rows(), Captioning)
        await anext(stream)
        if first == "input":
            await stream.aclose()
        await session.aclose()
        assert session._connection.closed.done()  # type: ignore[union-attr]


async def test_a_close_fails_a_call_that_just_got_its_permit() -> None:
    """It fails even if a pause begins in the same turn."""
    for throttled in (False, True):
        async with asyncio.timeout(30), ScriptedServer(CAPTION) as server:
            session = await server.session(permits=1).__aenter__()
            queue = session._connection.caller.attempts.queue  # type: ignore[union-attr]
            held = await queue.start()
            calls = [asyncio.create_task(session.analyze(r)) for r in requests_of(3, Captioning)]
            await asyncio.sleep(0)
            if throttled:
                queue.throttle(held, 60, stall=True)
            queue.release(held)  # granted to the first, which has not run yet
            await session.aclose()
            for call in calls:
                with pytest.raises(SessionClosedError):
                    await call
            assert (server.seen, busy(session.stats)) == ([], (0, 0, 0))


class StarletteUrl:
    """Shaped like the URL objects of other libraries."""

    scheme = "https"

    def __str__(self) -> str:
        return "https://example.com/hook?a=1"


class TextUrl(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "not this"


@pytest.mark.parametrize(
    "url",
    [
        yarl.URL("https://example.com/hook?a=1"),
        StarletteUrl(),
        TextUrl("https://example.com/hook?a=1"),
    ],
)
async def test_a_notification_url_may_be_a_url_object(url: Any) -> None:
    accepted = answer(202, {"data": {"task_id": "t1", "status": "pending"}})
    async with ScriptedServer(accepted) as server:
        async with server.session(
            notifications=asyncio.Queue(), notification_url=url, poll_first=900, poll_longest=900
        ) as session:
            task = session.submit(Captioning(URL))
            await task.accepted()
            task.abandon()
        assert server.seen[0].json["notification_url"] == "https://example.com/hook?a=1"


@pytest.mark.parametrize(
    "url",
    [b"https://example.com/", 7, ["https://example.com/"], object(), Path("/x"), "ftp://x", ""],
)
def test_an_invalid_notification_url_is_refused_at_once(url: Any) -> None:
    with pytest.raises(ConfigurationError):
        AnalyzeSession(DEMO, notifications=asyncio.Queue(), notification_url=url)


async def test_the_quota_follows_a_reset_without_a_reset_time() -> None:
    left = iter([5, 4, 3, 100_000, 99_000, 98_000])
    sample = json.loads((SAMPLES / "captioning.json").read_bytes())

    async def count(_: web.Request) -> web.Response:
        sample["limits"]["addons_quota"][0].update(remaining=next(left), limit=100_000)
        return web.Response(body=json.dumps(sample))

    async with ScriptedServer(count) as server, server.session() as session:
        for seen in (5, 4, 3, 100_000, 99_000, 98_000):
            await session.analyze(Captioning(URL))
            (limit,) = session.quota.values()
            assert limit.remaining == seen
