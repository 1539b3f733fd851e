"""The read timeout bounds a whole attempt, and is never confused with a cancellation."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web
from scripted import CAPTION, URL, ScriptedServer, busy, requests_of, until

from cloudinary_analyze import AttemptTimeoutError, Captioning


async def _drip(request: web.Request) -> web.StreamResponse:
    """Send a byte now and then, without an end."""
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b" ")
        await asyncio.sleep(0.01)


async def test_a_server_that_drips_is_timed_out_like_a_silent_one() -> None:
    async with (
        ScriptedServer(_drip) as server,
        server.session(read_timeout=0.5, attempts=1) as session,
    ):
        with pytest.raises(AttemptTimeoutError, match=r"0\.5 s") as caught:
            await session.analyze(Captioning(URL))

        assert caught.value.ambiguous
        assert busy(session.stats) == (0, 0, 0)


async def test_many_attempts_share_the_timer_and_each_times_out() -> None:
    async with (
        ScriptedServer(_drip) as server,
        server.session(read_timeout=0.2, attempts=1, permits=40) as session,
    ):
        outcomes = await session.analyze_all(requests_of(40, Captioning))

        assert {type(outcome.error) for outcome in outcomes} == {AttemptTimeoutError}
        assert busy(session.stats) == (0, 0, 0)


async def test_an_attempt_in_time_is_left_alone_when_an_older_one_expires() -> None:
    async def first_drips(request: web.Request) -> web.StreamResponse:
        return await (_drip if len(server.seen) == 1 else CAPTION)(request)

    async with (
        ScriptedServer(first_drips) as server,
        server.session(read_timeout=1, attempts=1) as session,
    ):
        stuck = asyncio.create_task(session.analyze(Captioning(URL)))
        await until(lambda: server.seen)
        answered = 0
        while not stuck.done():
            await session.analyze(Captioning(URL + str(answered)))
            answered += 1

        assert isinstance(stuck.exception(), AttemptTimeoutError)
        assert answered > 1


async def test_a_cancellation_from_outside_stays_one() -> None:
    """Also when the timeout fires in the same turn of the loop."""
    async with (
        ScriptedServer(_drip) as server,
        server.session(read_timeout=0.05, attempts=1) as session,
    ):
        call = asyncio.create_task(session.analyze(Captioning(URL)))
        asyncio.get_running_loop().call_later(0.05, call.cancel)
        (result,) = await asyncio.gather(call, return_exceptions=True)
        assert isinstance(result, AttemptTimeoutError | asyncio.CancelledError)
        assert busy(session.stats) == (0, 0, 0)

    async with ScriptedServer(_drip) as server, server.session(attempts=1) as session:
        call = asyncio.create_task(session.analyze(Captioning(URL)))
        await until(lambda: server.seen)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert busy(session.stats) == (0, 0, 0)


async def test_a_callers_timeout_is_not_the_read_timeout() -> None:
    async with (
        ScriptedServer(_drip) as server,
        server.session(read_timeout=5, attempts=1) as session,
    ):
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(0.05):
                await session.analyze(Captioning(URL))

        assert type(caught.value) is TimeoutError
