"""Two chained maps: backpressure, failures and cancellations pass from one to the other."""

import asyncio
import json

import pytest
from scripted import CAPTION, ScriptedServer, answer, busy, until

from cloudinary_analyze import (
    AIVisionModeration,
    AnalyzeSession,
    BulkStoppedError,
    Captioning,
    Credentials,
    PermissionDeniedError,
)
from cloudinary_analyze.emulator import Emulator
from cloudinary_analyze.ledger.sqlite import SQLiteLedger

MODERATION = answer(sample="ai_vision_moderation")


def moderate(url):
    return AIVisionModeration(url, rejection_questions="Does it show a weapon?")


async def find_captioned(session, urls, wanted="", **options):
    """The first stage: the URLs whose caption holds a word."""
    async with session.map(urls, Captioning, **options) as captions:
        async for outcome in captions:
            if wanted in outcome.unwrap().analysis.caption:
                yield outcome.item


async def drain(stream, into):
    async with stream:
        async for outcome in stream:
            into.append(outcome)


class Pulled:
    """Endless URLs that count how many were taken."""

    count = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.count += 1
        return f"https://example.com/{self.count}.jpg"


def by_model(moderation=MODERATION, caption=CAPTION):
    async def handle(request):
        return await (moderation if "moderation" in request.path else caption)(request)

    return handle


def is_idle(session):
    return busy(session.stats) == (0, 0, 0)


async def test_chained_stages_resume_from_one_ledger(
    tmp_path,
):
    path = tmp_path / "a.ledger"
    async with Emulator() as emulator:
        urls = emulator.sample_urls(60)
        for _ in range(2):
            verdicts = {}
            credentials = Credentials.from_url(emulator.cloudinary_url)
            async with SQLiteLedger(path) as ledger, AnalyzeSession(credentials) as session:
                found = find_captioned(session, urls, "red ellipse", ledger=ledger)
                async with session.map(found, moderate, ledger=ledger) as moderated:
                    async for outcome in moderated:
                        verdicts[outcome.item] = outcome.unwrap().analysis.responses
            captioned = {source for model, source in emulator.counts.done if model == "captioning"}
            asked = {s for model, s in emulator.counts.done if model == "ai_vision_moderation"}
            assert captioned == set(urls)
            assert set(verdicts) == asked
            assert 0 < len(asked) < 60
            assert set(emulator.counts.done.values()) == {1}


async def test_a_paused_consumer_stops_the_first_stage(tmp_path):
    items = Pulled()
    async with ScriptedServer(by_model()) as server, server.session() as session:
        found = find_captioned(session, items, window=5)
        async with session.map(found, moderate, window=7) as moderated:
            await anext(moderated)
            seen = -1
            while seen != items.count:  # until nothing moves any more
                seen = items.count
                await until(lambda: is_idle(session) and not server.in_flight)
                for _ in range(50):
                    await asyncio.sleep(0)
            # one was handed over, one may wait in the generator, the windows are full
            assert 5 < items.count <= 1 + 7 + 1 + 5
        assert is_idle(session)


async def test_leaving_the_second_stage_cancels_the_first(tmp_path):
    items = Pulled()
    never = asyncio.Event()

    async def hang(request):
        if json.loads(await request.read())["source"]["uri"].endswith("/1.jpg"):
            return await CAPTION(request)
        await never.wait()
        raise AssertionError

    async with ScriptedServer(by_model(caption=hang)) as server, server.session() as session:
        found = find_captioned(session, items, window=5)
        async with session.map(found, moderate, window=7) as moderated:
            await anext(moderated)
            await until(lambda: server.in_flight == 5)
        assert is_idle(session)  # at once, without a turn of the loop or the collector
        assert found.ag_frame is None  # the generator is over
        assert items.count == 6


async def test_cancelling_the_consumer_cancels_both_stages():
    never = asyncio.Event()

    async def hang(_):
        await never.wait()
        raise AssertionError

    async with ScriptedServer(by_model(moderation=hang)) as server, server.session() as session:

        async def consume():
            found = find_captioned(session, Pulled(), window=5)
            async with session.map(found, moderate, window=7) as moderated:
                await anext(moderated)

        job = asyncio.create_task(consume())
        await until(lambda: server.in_flight >= 7)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        assert is_idle(session)


@pytest.mark.parametrize("stage", ["first", "second"])
async def test_a_stopped_stage_stops_the_other_with_its_reason(stage):
    refused = answer(sample="error_403_subscription", status=403)
    handler = by_model(caption=refused) if stage == "first" else by_model(moderation=refused)
    items = Pulled()
    seen = []
    async with ScriptedServer(handler) as server, server.session(permits=4) as session:
        found = find_captioned(session, items)
        with pytest.raises((BulkStoppedError, PermissionDeniedError)) as caught:
            await drain(session.map(found, moderate), seen)
        assert is_idle(session)
        assert found.ag_frame is None
    reason = getattr(caught.value, "reason", None) or caught.value
    assert isinstance(reason, PermissionDeniedError)
    assert items.count < 40
    reasons = [getattr(outcome.error, "reason", outcome.error) for outcome in seen]
    assert all(isinstance(reason, PermissionDeniedError) for reason in reasons)
    assert bool(seen) == (stage == "second")


async def test_a_stream_feeds_another_directly():
    async with ScriptedServer(by_model()) as server, server.session() as session:
        captions = session.map([f"https://example.com/{n}.jpg" for n in range(9)], Captioning)
        async with session.map(captions, lambda outcome: moderate(outcome.item)) as moderated:
            outcomes = [outcome async for outcome in moderated]
        assert all(outcome.response and outcome.item.response for outcome in outcomes)
        assert len(server.seen) == 18
