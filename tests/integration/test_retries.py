"""Retries over a real socket: which, how often, and with which result."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any

import aiohttp
import pytest
from aiohttp import ClientConnectionResetError, web
from aiohttp.abc import AbstractResolver
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import StreamWriter
from scripted import (
    CAPTION,
    URL,
    ScriptedServer,
    answer,
    busy,
    hang_up,
    never_answer,
    one_after_the_other,
    until,
    wind,
)

from cloudinary_analyze import (
    AnalyzeError,
    AnalyzeSession,
    BadRequestError,
    CallTimeoutError,
    Captioning,
    Credentials,
    RateLimitedError,
    ServerError,
    TransportError,
)
from cloudinary_analyze._http.transport import Body
from cloudinary_analyze.events import AttemptRetried, CallFinished
from cloudinary_analyze.testing import ManualClock


@pytest.mark.parametrize("status", [408, 420, 423, 429, 500, 501, 502, 503, 504])
async def test_a_transient_failure_is_retried_until_it_succeeds(status: int) -> None:
    handler = one_after_the_other(answer(status), answer(status), CAPTION)
    events: list[Any] = []
    async with ScriptedServer(handler) as server:
        async with server.session(on_event=events.append) as session:
            await session.analyze(Captioning(URL))
            stats = session.stats
    ambiguous = 2 if status in {500, 502, 504} else 0
    assert (stats.calls, stats.attempts, stats.retries) == (1, 3, 2)
    assert (stats.ambiguous_retries, busy(stats)) == (ambiguous, (0, 0, 0))
    assert len({seen.body for seen in server.seen}) == 1
    assert [(type(e), e.attempt) for e in events if type(e) is AttemptRetried] == [
        (AttemptRetried, 1),
        (AttemptRetried, 2),
    ]
    (finished,) = [e for e in events if type(e) is CallFinished]
    assert (finished.model, finished.attempts, finished.error) == ("captioning", 3, None)


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 405, 409, 410, 413, 415, 422, 451])
async def test_a_refusal_is_sent_once(status: int) -> None:
    async with ScriptedServer(answer(status)) as server, server.session() as session:
        with pytest.raises(Exception, match=str(status)):
            await session.analyze(Captioning(URL))
        assert session.stats.retries == 0
    assert len(server.seen) == 1


async def test_a_request_on_a_lost_connection_is_retried() -> None:
    handler = one_after_the_other(hang_up(), CAPTION)
    async with ScriptedServer(handler) as server, server.session() as session:
        await session.analyze(Captioning(URL))
        assert session.stats.ambiguous_retries == 1
    assert len(server.seen) == 2


@pytest.mark.parametrize("attempts", [1, 2, 6])
async def test_attempts_are_counted_and_limited(attempts: int) -> None:
    async with ScriptedServer(answer(503)) as server, server.session(attempts=attempts) as session:
        with pytest.raises(ServerError) as caught:
            await session.analyze(Captioning(URL))
    assert caught.value.attempts == len(server.seen) == attempts
    assert not caught.value.ambiguous


@pytest.mark.parametrize("handler", [answer(500), answer(502), answer(504), hang_up()])
async def test_retry_ambiguous_off_sends_ambiguous_calls_once(handler: Any) -> None:
    async with ScriptedServer(handler) as server, server.session(retry_ambiguous=False) as session:
        with pytest.raises((ServerError, TransportError), match="may have been accepted") as caught:
            await session.analyze(Captioning(URL))
    assert len(server.seen) == 1
    assert caught.value.ambiguous


@pytest.mark.parametrize("status", [408, 429, 503])
async def test_retry_ambiguous_off_retries_uncharged_calls(status: int) -> None:
    handler = one_after_the_other(answer(status), CAPTION)
    async with ScriptedServer(handler) as server, server.session(retry_ambiguous=False) as session:
        await session.analyze(Captioning(URL))
    assert len(server.seen) == 2


async def test_the_last_error_keeps_an_earlier_ambiguity() -> None:
    handler = one_after_the_other(answer(500), answer(400))
    async with ScriptedServer(handler) as server, server.session() as session:
        with pytest.raises(BadRequestError, match="may have been accepted") as caught:
            await session.analyze(Captioning(URL))
    assert (caught.value.ambiguous, caught.value.attempts) == (True, 2)


def in_seconds(clock: ManualClock, seconds: float) -> str:
    return format_datetime(datetime.fromtimestamp(clock.wall() + seconds, UTC), usegmt=True)


@pytest.mark.parametrize("status", [429, 503, 500, 408])
@pytest.mark.parametrize(
    ("asked", "seconds"),
    [("7", 7), ("7.5", 7.5), ("date", 7), ("-1", 0), ("nan", 0), ("soon", 0), ("1e999", 0)],
)
async def test_retry_after_is_honored_and_garbage_is_ignored(
    clock: ManualClock, status: int, asked: str, seconds: float
) -> None:
    header = in_seconds(clock, 7) if asked == "date" else asked
    handler = one_after_the_other(answer(status, headers={"Retry-After": header}), CAPTION)
    async with ScriptedServer(handler) as server, server.session(clock=clock) as session:
        call = asyncio.create_task(session.analyze(Captioning(URL)))
        await until(lambda: clock.next_at is not None)
        if seconds:
            await clock.advance(seconds - 0.001)
            await asyncio.sleep(0.01)
            assert len(server.seen) == 1
        await wind(clock, call)
        assert len(server.seen) == 2
        assert seconds <= clock.now <= seconds * 1.1 + 0.5


async def test_too_long_a_retry_after_fails_the_call(clock: ManualClock) -> None:
    handler = answer(503, headers={"Retry-After": "121"})
    async with ScriptedServer(handler) as server, server.session(clock=clock) as session:
        async with asyncio.timeout(30):
            with pytest.raises(ServerError) as caught:
                await session.analyze(Captioning(URL))
    assert (caught.value.retry_after, caught.value.attempts) == (121, 1)
    assert clock.now == 0


async def test_the_call_timeout_bounds_the_waits_between_attempts(clock: ManualClock) -> None:
    handler = answer(429, headers={"Retry-After": "4"})
    async with ScriptedServer(handler) as server, server.session(clock=clock) as session:
        with pytest.raises(
            CallTimeoutError, match=r"10.0 s for the whole call \(\d attempts\)"
        ) as e:
            await wind(clock, session.analyze(Captioning(URL), timeout=10))
        assert clock.now == 10
        assert busy(session.stats) == (0, 0, 0)
    assert e.value.attempts == len(server.seen) == 3
    assert isinstance(e.value.__cause__, RateLimitedError)
    assert not e.value.ambiguous


async def test_the_call_timeout_of_the_settings_is_the_default(clock: ManualClock) -> None:
    handler = answer(503, headers={"Retry-After": "4"})
    async with ScriptedServer(handler) as server:
        async with server.session(clock=clock, call_timeout=6) as session:
            with pytest.raises(CallTimeoutError):
                await wind(clock, session.analyze(Captioning(URL)))
    assert clock.now == 6


async def test_the_call_timeout_bounds_the_queue_for_a_permit(clock: ManualClock) -> None:
    arrived, release = asyncio.Event(), asyncio.Event()

    async def hold(request: web.Request) -> web.StreamResponse:
        arrived.set()
        await release.wait()
        return await CAPTION(request)

    async with ScriptedServer(hold) as server, server.session(clock=clock, permits=1) as session:
        first = asyncio.create_task(session.analyze(Captioning(URL)))
        await arrived.wait()
        with pytest.raises(CallTimeoutError, match="queueing for a permit") as caught:
            await wind(clock, session.analyze(Captioning(URL), timeout=3))
        assert (caught.value.attempts, caught.value.ambiguous) == (0, False)
        assert session.stats.waiting == 0
        release.set()
        await first
    assert len(server.seen) == 1


async def test_the_call_timeout_ends_an_attempt_and_says_it_may_be_charged(
    clock: ManualClock,
) -> None:
    arrived = asyncio.Event()

    async def hang(_: web.Request) -> web.StreamResponse:
        arrived.set()
        await asyncio.sleep(60)
        return web.Response()

    async with ScriptedServer(hang) as server, server.session(clock=clock) as session:
        call = asyncio.create_task(session.analyze(Captioning(URL), timeout=3))
        await arrived.wait()
        with pytest.raises(CallTimeoutError, match="may have been accepted") as caught:
            await wind(clock, call)
        assert (caught.value.attempts, caught.value.ambiguous) == (1, True)
        assert busy(session.stats) == (0, 0, 0)


async def test_a_timeout_in_a_wait_keeps_an_earlier_ambiguity(
    clock: ManualClock,
) -> None:
    handler = answer(500, headers={"Retry-After": "60"})
    async with ScriptedServer(handler) as server, server.session(clock=clock) as session:
        with pytest.raises(CallTimeoutError) as caught:
            await wind(clock, session.analyze(Captioning(URL), timeout=3))
    assert caught.value.ambiguous
    assert len(server.seen) == 1


async def test_a_pacer_is_awaited_once_per_attempt() -> None:
    asked: list[int] = []

    class Pacer:
        async def acquire(self) -> None:
            asked.append(session.stats.permits_in_use)
            await asyncio.sleep(0)

    handler = one_after_the_other(answer(503), answer(503), CAPTION)
    async with ScriptedServer(handler) as server, server.session(pacer=Pacer()) as session:
        await session.analyze(Captioning(URL))
    assert asked == [1, 1, 1]


@pytest.mark.parametrize("closes", [False, True])
async def test_a_body_is_unsent_on_a_closing_connection(closes: bool) -> None:
    """An idle connection may begin to close between its choice and the request."""
    loop = asyncio.get_running_loop()
    async with ScriptedServer(CAPTION) as server:
        port = int(server.url.rpartition(":")[2])
        transport, protocol = await loop.create_connection(
            lambda: BaseProtocol(loop), "127.0.0.1", port
        )
        body = Body(b"{}")
        if closes:
            transport.close()
            with pytest.raises(ClientConnectionResetError):
                await body.write_with_length(StreamWriter(protocol, loop), 2)
        else:
            await body.write_with_length(StreamWriter(protocol, loop), 2)
            transport.close()
        assert body.sent is not closes


@pytest.mark.parametrize(
    ("handler", "attempts", "lost"),
    [
        (hang_up(), 1, 1),
        (hang_up(), 3, 1),  # the two before it were repeated
        (answer(500), 2, 1),
        (answer(503), 2, 0),
        (answer(400), 1, 0),
        (one_after_the_other(hang_up(), answer(400)), 3, 0),
        (one_after_the_other(answer(503), hang_up()), 2, 1),
        (answer(200, body=b"{"), 1, 1),
    ],
)
async def test_calls_that_may_have_been_charged_are_counted(
    handler: Any, attempts: int, lost: int
) -> None:
    async with ScriptedServer(handler) as server, server.session(attempts=attempts) as session:
        with pytest.raises(AnalyzeError):
            await session.analyze(Captioning(URL))
        stats = session.stats
    assert stats.ambiguous_failures == lost
    assert stats.ambiguous_retries + lost <= len(server.seen)


async def test_a_call_that_is_cancelled_in_flight_may_have_been_charged() -> None:
    async with ScriptedServer(never_answer) as server, server.session(permits=1) as session:
        calls = [asyncio.create_task(session.analyze(Captioning(f"{URL}?{n}"))) for n in range(3)]
        await until(lambda: server.in_flight == 1 and session.stats.waiting == 2)
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        assert session.stats.ambiguous_failures == 1


async def test_a_call_that_is_cut_off_while_it_connects_is_not_charged() -> None:
    class Resolver(AbstractResolver):
        asked = 0

        async def resolve(self, *_: Any, **__: Any) -> Any:
            self.asked += 1
            await asyncio.sleep(60)

        async def close(self) -> None: ...

    resolver = Resolver()
    connector = aiohttp.TCPConnector(limit=0, resolver=resolver)
    async with aiohttp.ClientSession(connector=connector) as http:
        credentials = Credentials("demo", "1", "2", host="https://api.invalid")
        async with AnalyzeSession(credentials, http=http) as session:
            cancelled = asyncio.create_task(session.analyze(Captioning(URL)))
            await until(lambda: resolver.asked == 1)
            cancelled.cancel()
            await asyncio.wait([cancelled])
            with pytest.raises(CallTimeoutError) as caught:
                await session.analyze(Captioning(URL), timeout=0.05)
            assert (caught.value.attempts, caught.value.ambiguous) == (1, False)
            assert session.stats.ambiguous_failures == 0
