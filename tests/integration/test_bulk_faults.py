"""Bulk work over a service that fails now and then: exactly one outcome for each item."""

from __future__ import annotations

import gc
from collections import Counter

import pytest
from scripted import busy

from cloudinary_analyze import AnalyzeSession, Captioning, Credentials, Settings
from cloudinary_analyze.emulator import Emulator, FaultPlan

UNCHARGED = FaultPlan(
    error_500=0.01,
    error_502_html=0.01,
    error_503=0.01,
    reset_connection=0.01,
    rate_limited_429=0.01,
    retry_after=0.02,
)


async def run(emulator: Emulator, count: int, *, permits: int, ordered: bool) -> Counter[int]:
    settings = Settings(permits=permits, backoff_first=0.01, backoff_max=0.1)
    credentials = Credentials.from_url(emulator.cloudinary_url)
    outcomes: Counter[int] = Counter()
    async with AnalyzeSession(credentials, settings=settings) as session:
        base = emulator.url

        def build(number: int) -> Captioning:
            return Captioning(f"{base}/samples/{number}.png")

        async with session.map(range(count), build, ordered=ordered) as stream:
            async for outcome in stream:
                assert outcome.error is None, outcome.error
                assert outcome.unwrap().entity == f"{base}/samples/{outcome.item}.png"
                if ordered:
                    assert outcome.item == len(outcomes)
                outcomes[outcome.item] += 1
        stats = session.stats
        assert busy(stats) == (0, 0, 0)
        assert stats.calls == count
        assert stats.attempts == count + stats.retries
        faults = emulator.counts.http_faults
        assert stats.retries == faults.total()
        ambiguous = ("error_500", "error_502_html", "reset_connection", "drop_response")
        assert stats.ambiguous_retries == sum(faults[name] for name in ambiguous)
    return outcomes


@pytest.mark.parametrize("ordered", [False, True])
async def test_1000_items_with_faults_are_analyzed_once(
    ordered: bool,
) -> None:
    async with Emulator(latency=0.01, faults=UNCHARGED, seed=7) as emulator:
        outcomes = await run(emulator, 1000, permits=64, ordered=ordered)
        assert outcomes == Counter(range(1000))
        counts = emulator.counts
        assert set(counts.http_faults) == {
            "error_500",
            "error_502_html",
            "error_503",
            "reset_connection",
            "rate_limited_429",
        }
        assert set(counts.done.values()) == {1}
        assert (len(counts.done), counts.total_done) == (1000, 1000)
        assert counts.total_received == 1000 + counts.http_faults.total()
        assert counts.max_in_flight <= 64


async def test_only_analyses_with_a_lost_response_are_repeated() -> None:
    plan = FaultPlan(drop_response=0.05)
    async with Emulator(faults=plan, seed=7) as emulator:
        assert await run(emulator, 300, permits=32, ordered=False) == Counter(range(300))
        counts = emulator.counts
        dropped = counts.http_faults["drop_response"]
        assert 0 < dropped < 40
        assert Counter(counts.done.values()) == Counter({1: 300 - dropped, 2: dropped})


# One call in 500 is throttled. More would test the slower pace, not the number of items.
CROWD = FaultPlan(
    error_500=0.016,
    error_502_html=0.011,
    error_503=0.011,
    reset_connection=0.01,
    rate_limited_429=0.002,
)


@pytest.mark.slow
async def test_ten_thousand_items_at_50_ms_with_5_percent_faults() -> None:
    async with Emulator(latency=0.05, faults=CROWD, seed=3) as emulator:
        gc.collect()
        outcomes = await run(emulator, 10_000, permits=128, ordered=False)
        assert outcomes == Counter(range(10_000))
        counts = emulator.counts
        assert set(counts.done.values()) == {1}
        assert len(counts.done) == counts.total_done == 10_000
        assert 300 < counts.http_faults.total() < 700
        assert counts.max_in_flight <= 128
