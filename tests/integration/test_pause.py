"""Throttling slows the whole session down. An exhausted quota closes only its feature."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web
from scripted import (
    CAPTION,
    URL,
    ScriptedServer,
    answer,
    busy,
    have_failed,
    one_after_the_other,
    requests_of,
    until,
    wind,
)

from cloudinary_analyze import (
    AIVisionGeneral,
    Captioning,
    Coco,
    OtherModel,
    QuotaExceededError,
    RateLimitedError,
)
from cloudinary_analyze.events import AttemptFinished, PaceChanged, SessionPaused
from cloudinary_analyze.testing import ManualClock

SLOW_DOWN = answer(429, headers={"Retry-After": "5"})
PATIENT: dict[str, float] = {"backoff_first": 0.5, "backoff_max": 30}


class Crowd:
    """Holds requests until a number of them is there, then throttles all; later ones succeed."""

    def __init__(self, size: int) -> None:
        self.size, self.arrived, self.full = size, 0, asyncio.Event()

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        self.arrived += 1
        if self.arrived > self.size:
            await asyncio.sleep(0.002)
            return await CAPTION(request)
        if self.arrived == self.size:
            self.full.set()
        await self.full.wait()
        return await SLOW_DOWN(request)


async def test_nothing_is_sent_while_everything_is_throttled(clock: ManualClock) -> None:
    """Then one request tests whether the service accepts requests again. The others follow."""
    events: list[Any] = []
    async with ScriptedServer(Crowd(64)) as server:
        async with server.session(clock=clock, on_event=events.append, **PATIENT) as session:
            calls = [
                asyncio.create_task(session.analyze(request))
                for request in requests_of(64, Captioning)
            ]
            await until(lambda: have_failed(session, 64))
            assert (session.stats.pauses, session.stats.permits_allowed) == (1, 1)
            latecomer = asyncio.create_task(session.analyze(Captioning(URL)))
            await until(lambda: session.stats.waiting == 1)
            await clock.advance(4.99)
            await asyncio.sleep(0.02)
            assert len(server.seen) == 64
            server.most_in_flight = 0
            await wind(clock, asyncio.gather(*calls, latecomer))
            assert 5 <= clock.now <= 10
            assert server.most_in_flight < 32
            assert (session.stats.pauses, session.stats.probes) == (1, 1)
            attempts = [event for event in events if type(event) is AttemptFinished]
            assert sum(attempt.probe for attempt in attempts) == 1
            paces = [event.pace for event in events if type(event) is PaceChanged]
            assert paces[0] == 16
            (pause,) = [event for event in events if type(event) is SessionPaused]
            assert (pause.seconds >= 5, pause.polls) == (True, False)
    assert len(server.seen) == 64 + 65


async def test_a_session_starts_slowly_after_a_pause(clock: ManualClock) -> None:
    async with ScriptedServer(Crowd(8)) as server:
        async with server.session(clock=clock, permits=8, **PATIENT) as session:
            first = [session.analyze(request) for request in requests_of(8, Captioning)]
            await wind(clock, asyncio.gather(*first))
            paces = [session.stats.pace]
            for _ in range(40):
                await wind(clock, session.analyze(Captioning(URL)))
                paces.append(session.stats.pace)
            known = [pace for pace in paces if pace is not None]
            assert known == sorted(known)
            assert known[0] <= 8
            assert known[-1] >= 32


async def test_a_call_throttled_alone_pauses_no_other(clock: ManualClock) -> None:
    async with ScriptedServer(SLOW_DOWN) as server:
        async with server.session(clock=clock, permits=8, attempts=3) as session:
            with pytest.raises(RateLimitedError) as caught:
                await wind(clock, session.analyze(Captioning(URL)))
            assert caught.value.attempts == 3
            assert (session.stats.pauses, session.stats.permits_allowed) == (0, 8)


@pytest.mark.parametrize(
    "handler", [answer(500, headers={"Retry-After": "5"}), answer(503), answer(400)]
)
async def test_other_failures_pause_no_other(handler: Any) -> None:
    async with ScriptedServer(handler) as server, server.session(attempts=1) as session:
        with pytest.raises(Exception, match="service"):
            await session.analyze(Captioning(URL))
        assert (session.stats.pauses, session.stats.permits_allowed) == (0, 64)


async def test_a_503_with_retry_after_pauses_the_session(clock: ManualClock) -> None:
    handler = answer(503, headers={"Retry-After": "5"})
    async with ScriptedServer(handler) as server:
        async with server.session(clock=clock, attempts=1) as session:
            with pytest.raises(Exception, match="503"):
                await session.analyze(Captioning(URL))
            other = asyncio.create_task(session.analyze(Coco(URL)))
            await until(lambda: session.stats.waiting == 1)
            assert session.stats.pauses == 1
            server.handler = answer(sample="coco")
            await clock.advance(4.99)
            assert len(server.seen) == 1
            await wind(clock, other)


QUOTA = answer(429, sample="error_429_quota")
VISION = AIVisionGeneral(URL, prompts=["What is it?"])


async def by_model(request: web.Request) -> web.StreamResponse:
    name = request.path.rpartition("/")[2]
    return await (QUOTA if name == "ai_vision_general" else CAPTION)(request)


async def test_a_used_up_quota_closes_its_feature_until_a_probe(
    clock: ManualClock,
) -> None:
    async with ScriptedServer(by_model) as server, server.session(clock=clock) as session:
        with pytest.raises(QuotaExceededError, match="'ai_vision' is used up") as caught:
            await session.analyze(VISION)
        assert (caught.value.feature, caught.value.reset_time) == ("ai_vision", None)
        assert (caught.value.attempts, session.stats.pauses) == (1, 0)
        for _ in range(5):
            with pytest.raises(QuotaExceededError, match="Not sent") as unsent:
                await session.analyze(VISION)
            assert unsent.value.attempts == 0
        assert len(server.seen) == 1
        await session.analyze(Captioning(URL))  # another feature
        assert session.quota["ai_vision"].remaining == 0

        await clock.advance(301)
        results = await asyncio.gather(
            *(session.analyze(VISION) for _ in range(10)), return_exceptions=True
        )
        assert len(server.seen) == 3, "one probe of the ten"
        assert all(isinstance(result, QuotaExceededError) for result in results)

        server.handler = answer(sample="ai_vision_general")
        await clock.advance(301)
        await session.analyze(VISION)
        await session.analyze(VISION)
        assert len(server.seen) == 5


async def test_a_reset_time_from_the_service_is_waited_for(clock: ManualClock, sample: Any) -> None:
    content = sample("error_429_quota")
    content["limits"]["addons_quota"][0]["reset_time"] = "2026-09-21T16:00:00Z"
    async with ScriptedServer(answer(429, content)) as server:
        async with server.session(clock=clock) as session:
            with pytest.raises(QuotaExceededError, match="2026-09-21 16:00:00 UTC") as caught:
                await session.analyze(VISION)
            assert caught.value.reset_time is not None
            seconds = caught.value.reset_time - clock.wall()
            assert 0 < seconds < 10**6
            server.handler = answer(sample="ai_vision_general")
            await clock.advance(seconds - 1)
            with pytest.raises(QuotaExceededError, match="Not sent"):
                await session.analyze(VISION)
            await clock.advance(1)
            await session.analyze(VISION)
    assert len(server.seen) == 2


async def test_a_response_from_before_a_quota_error_reopens_nothing(
    clock: ManualClock,
) -> None:
    """A call in flight when the quota ends may succeed. That proves nothing about later calls."""
    held, arrived = asyncio.Event(), asyncio.Event()

    async def answer_in_turn(request: web.Request) -> web.StreamResponse:
        if not arrived.is_set():
            arrived.set()
            await held.wait()
            return await answer(sample="ai_vision_general")(request)
        return await QUOTA(request)

    async with ScriptedServer(answer_in_turn) as server, server.session(clock=clock) as session:
        early = asyncio.create_task(session.analyze(VISION))
        await arrived.wait()
        with pytest.raises(QuotaExceededError):
            await session.analyze(VISION)
        held.set()
        await early
        with pytest.raises(QuotaExceededError, match="Not sent"):
            await session.analyze(VISION)
    assert len(server.seen) == 2


async def test_queued_calls_of_a_used_up_quota_are_not_sent() -> None:
    async with ScriptedServer(QUOTA) as server, server.session(permits=2) as session:
        results = await asyncio.gather(
            *(session.analyze(VISION) for _ in range(20)), return_exceptions=True
        )
        assert all(isinstance(result, QuotaExceededError) for result in results)
        assert len(server.seen) == 2
        assert busy(session.stats) == (0, 0, 0)


async def test_a_quota_error_keeps_an_earlier_ambiguity(
    clock: ManualClock,
) -> None:
    """The last error says that nothing was sent, but an earlier attempt was sent."""
    handlers = one_after_the_other(answer(502), QUOTA)
    async with ScriptedServer(handlers) as server, server.session(clock=clock) as session:
        doubtful = asyncio.create_task(session.analyze(VISION))
        await until(lambda: have_failed(session, 1))
        with pytest.raises(QuotaExceededError):
            await session.analyze(VISION)
        with pytest.raises(QuotaExceededError, match="Not sent") as caught:
            await wind(clock, doubtful)
    assert caught.value.ambiguous
    assert len(server.seen) == 2


async def test_an_unsent_call_does_not_inherit_ambiguity() -> None:
    handlers = one_after_the_other(answer(502), QUOTA)
    async with ScriptedServer(handlers) as server, server.session() as session:
        with pytest.raises(QuotaExceededError) as first:
            await session.analyze(VISION)
        with pytest.raises(QuotaExceededError, match="Not sent") as second:
            await session.analyze(VISION)
    assert (first.value.ambiguous, second.value.ambiguous) == (True, False)


async def test_an_unknown_models_quota_is_separate() -> None:
    async with ScriptedServer(QUOTA) as server, server.session() as session:
        with pytest.raises(QuotaExceededError):
            await session.analyze(OtherModel("new_model", URL))
        with pytest.raises(QuotaExceededError, match="Not sent"):
            await session.analyze(OtherModel("new_model", URL))
        server.handler = CAPTION
        await session.analyze(Captioning(URL))
    assert len(server.seen) == 2


async def test_nothing_remaining_on_a_200_closes_nothing(sample: Any) -> None:
    content = sample("captioning")
    content["limits"]["addons_quota"][0]["remaining"] = 0
    async with ScriptedServer(answer(content=content)) as server, server.session() as session:
        for _ in range(3):
            await session.analyze(Captioning(URL))
        assert session.quota["object_detection"].remaining == 0
    assert len(server.seen) == 3


async def test_the_session_keeps_the_lowest_remainder(sample: Any) -> None:
    left = iter([450, 430, 440, 445])

    async def count_down(_: web.Request) -> web.StreamResponse:
        content = sample("captioning")
        content["limits"]["addons_quota"][0]["remaining"] = next(left)
        return web.Response(body=json.dumps(content))

    async with ScriptedServer(count_down) as server, server.session() as session:
        assert dict(session.quota) == {}
        for _ in range(4):
            await session.analyze(Captioning(URL))
        assert session.quota["object_detection"].remaining == 430
        assert session.quota["object_detection"].limit == 500


async def test_a_probe_with_a_transient_failure_is_repeated(clock: ManualClock) -> None:
    async with ScriptedServer(QUOTA) as server, server.session(clock=clock) as session:
        with pytest.raises(QuotaExceededError):
            await session.analyze(VISION)
        await clock.advance(301)
        server.handler = one_after_the_other(answer(503), answer(sample="ai_vision_general"))
        await wind(clock, session.analyze(VISION))
        await session.analyze(VISION)
    assert len(server.seen) == 4
