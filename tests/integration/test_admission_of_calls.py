"""A session keeps to what the service allows, waits out outages, and serves interactive calls first."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from ports import reserve_port
from scripted import (
    CAPTION,
    URL,
    ScriptedServer,
    answer,
    busy,
    one_after_the_other,
    requests_of,
    until,
    watch,
    wind,
)

from cloudinary_analyze import (
    AnalyzeSession,
    BulkStoppedError,
    Captioning,
    Coco,
    ConfigurationError,
    Credentials,
    OutageError,
    OutcomeStream,
    PacerError,
    RateLimitedError,
    Response,
    ServerError,
    Settings,
    TransportError,
)
from cloudinary_analyze.ledger import SQLiteLedger
from cloudinary_analyze.outcomes import Answered
from cloudinary_analyze.protocols import Claim
from cloudinary_analyze.testing import ManualClock

PATIENT: dict[str, Any] = {"backoff_first": 0.5, "backoff_max": 30}


def urls(count: int) -> Iterator[str]:
    return (f"https://example.com/{number}.jpg" for number in range(count))


async def drain(stream: OutcomeStream[Any, Any], into: list[Any]) -> None:
    async for outcome in stream:
        into.append(outcome)


# ---------------------------------------------------------------- waits over the settings'


@pytest.mark.parametrize("status", [429, 503])
async def test_nothing_is_sent_until_a_long_wait_is_over(clock: ManualClock, status: int) -> None:
    handler = one_after_the_other(answer(status, headers={"Retry-After": "3600"}), CAPTION)
    async with ScriptedServer(handler) as server, server.session(clock=clock) as session:
        with pytest.raises((RateLimitedError, ServerError)) as sent:
            await session.analyze(Captioning(URL))
        await clock.advance(600)
        with pytest.raises(type(sent.value), match="3000 s of it are left") as unsent:
            await session.analyze(Captioning(URL))
        assert (unsent.value.attempts, unsent.value.retry_after) == (0, 3000)
        assert not unsent.value.ambiguous
        assert len(server.seen) == 1
        await clock.advance(3000)
        await session.analyze(Captioning(URL))
        assert busy(session.stats) == (0, 0, 0)


async def test_a_long_wait_stops_later_streams_too(clock: ManualClock) -> None:
    handler = one_after_the_other(answer(429, headers={"Retry-After": "200"}), CAPTION)
    async with ScriptedServer(handler) as server, server.session(clock=clock, permits=1) as session:
        for left in (200, 50):
            with pytest.raises(BulkStoppedError):
                await drain(session.map(urls(10_000), Captioning), [])
            assert len(server.seen) == 1
            await clock.advance(left - 50)
        await clock.advance(200)
        assert [o.error async for o in session.map(urls(3), Captioning)] == [None] * 3


async def test_queued_calls_fail_if_the_service_asks_for_too_long(clock: ManualClock) -> None:
    handler = answer(429, headers={"Retry-After": "3600"})
    async with ScriptedServer(handler) as server, server.session(clock=clock, permits=2) as session:
        async with asyncio.timeout(30):
            results = await asyncio.gather(
                *(session.analyze(request) for request in requests_of(50, Captioning)),
                return_exceptions=True,
            )
    assert all(isinstance(result, RateLimitedError) for result in results)
    assert len(server.seen) <= 2


# ---------------------------------------------------------------- rates and pacers


class Pacer:
    """Never waits, and records when it was awaited."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.asked: list[float] = []

    async def acquire(self) -> None:
        self.asked.append(self.clock.now)


async def test_a_pacer_is_awaited_only_after_a_pause(clock: ManualClock) -> None:
    pacer = Pacer(clock)
    handler = one_after_the_other(answer(503, headers={"Retry-After": "5"}), CAPTION)
    async with ScriptedServer(handler) as server:
        async with server.session(clock=clock, pacer=pacer, **PATIENT) as session:
            first = asyncio.create_task(session.analyze(Captioning(URL)))
            await until(lambda: session.stats.pauses == 1)
            others = [session.analyze(request) for request in requests_of(10, Captioning)]
            await wind(clock, asyncio.gather(first, *others))
    assert len(pacer.asked) == len(server.seen) == 12
    assert [at for at in pacer.asked if at < 5] == [0]


class BrokenPacer:
    async def acquire(self) -> None:
        raise ConnectionError("the store is down")


async def test_a_slot_is_not_sent_into_a_pause(clock: ManualClock) -> None:
    class Gate:
        open = asyncio.Event()
        asked = 0

        async def acquire(self) -> None:
            self.asked += 1
            if self.asked == 1:
                await self.open.wait()

    gate = Gate()
    handler = one_after_the_other(answer(503, headers={"Retry-After": "5"}), CAPTION)
    async with ScriptedServer(handler) as server:
        async with server.session(clock=clock, pacer=gate, **PATIENT) as session:
            first = asyncio.create_task(session.analyze(Captioning(URL)))
            await until(lambda: gate.asked == 1)
            second = asyncio.create_task(session.analyze(Captioning(URL)))
            await until(lambda: session.stats.pauses == 1)
            gate.open.set()
            await asyncio.sleep(0.05)
            assert len(server.seen) == 1
            await wind(clock, asyncio.gather(first, second))
            assert (len(server.seen), clock.now >= 5) == (3, True)
            assert busy(session.stats) == (0, 0, 0)


async def test_a_pacer_that_fails_stops_the_stream() -> None:
    async with ScriptedServer(CAPTION) as server:
        async with server.session(pacer=BrokenPacer(), permits=4) as session:
            outcomes: list[Any] = []
            with pytest.raises(BulkStoppedError) as stopped:
                await drain(session.map(urls(10_000), Captioning), outcomes)
            assert isinstance(stopped.value.reason, PacerError)
            assert isinstance(stopped.value.reason.__cause__, ConnectionError)
            assert len(outcomes) <= 8
            assert (server.seen, busy(session.stats)) == ([], (0, 0, 0))


@pytest.mark.parametrize("burst", [1, 5])
async def test_a_rate_spaces_the_attempts(clock: ManualClock, burst: int) -> None:
    began: list[float] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        began.append(clock.now)
        return await CAPTION(request)

    async with ScriptedServer(handle) as server:
        async with server.session(clock=clock, rate=10, burst=burst) as session:
            calls = [session.analyze(request) for request in requests_of(20, Captioning)]
            await wind(clock, asyncio.gather(*calls))
            assert 0.1 * (20 - burst) - 0.021 <= clock.now
            assert clock.now <= 0.1 * (20 - burst) + 0.05
            assert busy(session.stats) == (0, 0, 0)
    assert sum(at == 0 for at in began) == burst


def test_a_rate_and_a_pacer_exclude_each_other(clock: ManualClock) -> None:
    with pytest.raises(ConfigurationError, match="exclude"):
        Settings(rate=5, pacer=Pacer(clock))
    with pytest.raises(ConfigurationError, match="needs"):
        Settings(burst=5)
    for rate in (0, -1, float("nan"), float("inf"), "5", True):
        with pytest.raises(ConfigurationError):
            Settings(rate=rate)  # type: ignore[arg-type]


class PicklablePacer:
    async def acquire(self) -> None: ...

    def __eq__(self, other: object) -> bool:
        return type(other) is PicklablePacer

    def __hash__(self) -> int:
        return 1


def test_settings_pickle_if_their_pacer_does() -> None:
    settings = Settings(pacer=PicklablePacer(), permits=3)
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert pickle.loads(pickle.dumps(Settings(rate=5, burst=2))) == Settings(rate=5, burst=2)


# ---------------------------------------------------------------- outages


class Service:
    """Fails with a status until an instant, and answers after it."""

    def __init__(self, clock: ManualClock, until: float, status: int) -> None:
        self.clock, self.until, self.failure = clock, until, answer(status)
        self.bad: list[float] = []
        self.good: list[float] = []

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        if self.clock.now < self.until:
            self.bad.append(self.clock.now)
            return await self.failure(request)
        self.good.append(self.clock.now)
        return await CAPTION(request)


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_an_outage_of_45_seconds_fails_no_item(clock: ManualClock, status: int) -> None:
    service = Service(clock, 45, status)
    async with ScriptedServer(service) as server:
        async with server.session(clock=clock, **PATIENT) as session:

            async def run() -> list[Any]:
                return [outcome.error async for outcome in session.map(urls(300), Captioning)]

            assert await wind(clock, run()) == [None] * 300
            stats = session.stats
            assert len(service.bad) <= 2 * 64 + stats.probes
            assert stats.ambiguous_retries <= (64 + stats.probes if status == 500 else 0)
            assert service.good[0] - 45 <= 45 / 4
            assert busy(stats) == (0, 0, 0)


@pytest.mark.parametrize("status", [500, 503])
@pytest.mark.parametrize("bad", ["odd", "coco"])
async def test_images_that_always_fail_are_not_an_outage(
    clock: ManualClock, status: int, bad: str
) -> None:
    """Items that always fail (broken images, a model that is down) fill the window."""
    refuse = answer(status)

    async def handle(request: web.Request) -> web.StreamResponse:
        content = await request.json()
        failing = bad in content["source"]["uri"] or bad in request.path
        return await (refuse if failing else CAPTION)(request)

    requests = [
        (Coco if bad == "coco" and number % 2 else Captioning)(
            f"https://images.example/{'odd' if number % 2 else 'even'}-{number}.jpg"
        )
        for number in range(100)
    ]
    async with ScriptedServer(handle) as server:
        async with server.session(clock=clock, permits=4, **PATIENT) as session:

            async def run() -> list[Any]:
                return [outcome.error async for outcome in session.map(requests, ordered=True)]

            errors = await wind(clock, run())
            assert errors[::2] == [None] * 50
            assert {type(error) for error in errors[1::2]} == {ServerError}
            assert (session.stats.pauses, session.stats.attempts) == (0, 50 + 50 * 6)


async def test_refused_connections_fail_no_item_and_are_not_ambiguous(clock: ManualClock) -> None:
    port = reserve_port()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", CAPTION)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    settings = Settings(host=f"http://127.0.0.1:{port}")
    credentials = Credentials("demo", "1", "s")
    async with watch(AnalyzeSession(credentials, settings=settings, clock=clock)) as session:

        async def run() -> list[Any]:
            return [outcome.error async for outcome in session.map(urls(200), Captioning)]

        work = asyncio.create_task(run())
        while clock.now < 45:
            await until(lambda: clock.next_at is not None)
            await clock.advance(0.25)
            await asyncio.sleep(0.001)
        down = session.stats
        await web.TCPSite(runner, "127.0.0.1", port).start()
        assert await wind(clock, work) == [None] * 200
        assert down.attempts <= 2 * 64 + down.probes
        assert session.stats.ambiguous_retries == 0
    await runner.cleanup()


async def test_a_stream_stops_when_an_outage_lasts_too_long(
    clock: ManualClock, tmp_path: Path
) -> None:
    """The next run with the same ledger sends what is missing, once."""
    service = Service(clock, 1e9, 500)
    ledger = SQLiteLedger(tmp_path / "ledger")
    async with ScriptedServer(service) as server:
        options = {"clock": clock, "outage_timeout": 60, "permits": 16, **PATIENT}
        async with server.session(**options) as session:
            pulled = 0

            def items() -> Iterator[str]:
                nonlocal pulled
                for url in urls(5000):
                    pulled += 1
                    yield url

            async def run() -> list[Any]:
                outcomes: list[Any] = []
                with pytest.raises(BulkStoppedError, match="Stopped") as stopped:
                    await drain(session.map(items(), Captioning, ledger=ledger), outcomes)
                assert isinstance(stopped.value.reason, OutageError)
                assert stopped.value.reason.seconds >= 60
                assert "Run again later" in str(stopped.value)
                return outcomes

            outcomes = await wind(clock, run())
            assert 60 <= clock.now <= 70
            assert pulled == len(outcomes) <= 32
            assert len(service.bad) <= 2 * 16 + session.stats.probes
            assert busy(session.stats) == (0, 0, 0)
        service.until = 0
        async with server.session(**options) as session:

            async def again() -> int:
                stream = session.map(urls(50), Captioning, ledger=ledger)
                return len([o async for o in stream if isinstance(o, Answered)])

            assert await wind(clock, again()) == 50
            assert len(service.good) == 50
    await ledger.aclose()


async def test_a_call_waits_no_longer_than_its_retries_would(clock: ManualClock) -> None:
    async with ScriptedServer(answer(500)) as server:
        async with server.session(clock=clock, **PATIENT) as session:
            calls = [
                asyncio.create_task(session.analyze(request))
                for request in requests_of(64, Captioning)
            ]
            results = await wind(clock, asyncio.gather(*calls, return_exceptions=True))
            assert all(isinstance(result, ServerError) for result in results)
            assert clock.now <= 0.5 + 1 + 2 + 4 + 8 + 0.1
            assert len(server.seen) <= 2 * 64 + session.stats.probes
            late = asyncio.create_task(session.analyze(Captioning(URL)))
            with pytest.raises((OutageError, ServerError)):
                await wind(clock, late)


async def test_a_call_that_was_not_sent_in_an_outage_says_so(clock: ManualClock) -> None:
    hang = asyncio.Event()
    failing = True

    async def handle(request: web.Request) -> web.StreamResponse:
        if not failing:
            await hang.wait()
        return await answer(503)(request)

    async with ScriptedServer(handle) as server:
        async with server.session(clock=clock, permits=8, **PATIENT) as session:
            calls = [session.analyze(request) for request in requests_of(8, Captioning)]
            failing = True
            first = asyncio.gather(*calls, return_exceptions=True)
            await until(lambda: session.stats.pauses == 1)
            failing = False
            await clock.advance(1)  # a probe is in flight, and hangs
            await until(lambda: server.in_flight == 1)
            with pytest.raises(OutageError, match="Nothing more was sent") as caught:
                await wind(clock, session.analyze(Captioning(URL)))
            assert (caught.value.attempts, caught.value.ambiguous) == (0, False)
            hang.set()
            await wind(clock, first)


async def test_an_item_that_is_always_throttled_fails_alone() -> None:
    """It waits no longer than the settings allow, and delays no other item."""

    async def handle(request: web.Request) -> web.StreamResponse:
        bad = "/1.jpg" in (await request.json())["source"]["uri"]
        return await (answer(429) if bad else CAPTION)(request)

    async with ScriptedServer(handle) as server, server.session() as session:
        async with asyncio.timeout(30):
            errors = [outcome.error async for outcome in session.map(urls(3), Captioning)]
    assert [type(error) for error in errors if error is not None] == [RateLimitedError]


async def test_throttles_do_not_use_up_the_attempts_of_an_item() -> None:
    throttled = 0

    async def handle(request: web.Request) -> web.StreamResponse:
        nonlocal throttled
        if "/1.jpg" in (await request.json())["source"]["uri"] and throttled < 10:
            throttled += 1
            return await answer(429)(request)
        return await CAPTION(request)

    async with ScriptedServer(handle) as server, server.session(attempts=2) as session:
        async with asyncio.timeout(20):
            errors = [outcome.error async for outcome in session.map(urls(3), Captioning)]
    assert (errors, throttled) == ([None] * 3, 10)


async def test_a_certificate_error_stops_a_stream() -> None:
    error = TransportError("The certificate is refused.", permanent=True)
    from cloudinary_analyze._policy import Stop, find_stop

    assert find_stop(error, Settings()) is Stop.EVERYTHING


# ---------------------------------------------------------------- fair shares


async def test_interactive_calls_start_before_items_of_a_stream() -> None:
    seen: list[str] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        seen.append((await request.json())["source"]["uri"])
        await asyncio.sleep(0.002)
        return await CAPTION(request)

    async with ScriptedServer(handle) as server, server.session(permits=2) as session:

        async def bulk() -> None:
            async for _ in session.map(urls(60), Captioning, window=60):
                pass

        work = asyncio.create_task(bulk())
        await until(lambda: len(seen) >= 10)
        await session.analyze(Captioning("https://example.com/interactive.jpg"))
        at = seen.index("https://example.com/interactive.jpg")
        assert at <= 20
        await work


class SlowClaims(SQLiteLedger):
    """A shared ledger whose store does not answer."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.asked = 0
        self.answers = asyncio.Event()

    async def claim(self, key: str) -> Claim | None:
        self.asked += 1
        await self.answers.wait()
        return Claim()


async def test_a_slow_claim_does_not_keep_its_permit(clock: ManualClock, tmp_path: Path) -> None:
    async with SlowClaims(tmp_path / "ledger") as ledger, ScriptedServer(CAPTION) as server:
        async with server.session(clock=clock, permits=2) as session:

            async def bulk() -> list[Response[Any] | None]:
                stream = session.map(urls(4), Captioning, ledger=ledger)
                return [outcome.response async for outcome in stream]

            work = asyncio.create_task(bulk())
            await until(lambda: ledger.asked == 2)
            call = asyncio.create_task(session.analyze(Captioning(URL)))
            await clock.advance(0.9)
            await asyncio.sleep(0.01)
            assert not call.done()
            await clock.advance(0.2)
            try:
                await until(call.done)
            finally:
                ledger.answers.set()
                await wind(clock, asyncio.wait([work]))
            assert len(await work) == 4
            assert len(server.seen) == 5
            assert busy(session.stats) == (0, 0, 0)


async def test_a_cancelled_claim_frees_its_slot(clock: ManualClock, tmp_path: Path) -> None:
    ledger = SlowClaims(tmp_path / "ledger")
    async with ScriptedServer(CAPTION) as server:
        async with server.session(clock=clock, permits=2) as session:
            for waited in (0.0, 1.5):
                asked = ledger.asked
                async with session.map(urls(4), Captioning, ledger=ledger) as stream:
                    first = asyncio.create_task(anext(stream))
                    await until(lambda asked=asked: ledger.asked == asked + 2)
                    await clock.advance(waited)
                first.cancel()
                await asyncio.wait([first])
                assert busy(session.stats) == (0, 0, 0)
            assert (server.seen, session.stats.attempts) == ([], 0)
    await ledger.aclose()
