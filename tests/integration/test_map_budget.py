"""`map(..., budget=...)` against the emulator, which counts what it charges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from task_support import connected, quick, unconnected

from cloudinary_analyze import (
    AIVisionGeneral,
    AnalyzeSession,
    Budget,
    BudgetReachedError,
    Captioning,
    ConfigurationError,
    Credentials,
    Settings,
    Spent,
)
from cloudinary_analyze.emulator import Emulator
from cloudinary_analyze.ledger import SQLiteLedger

URLS = [f"https://example.com/{number}.jpg" for number in range(60)]
FEATURE = "object_detection"


def open_session(emulator: Emulator, **options: Any) -> AnalyzeSession:
    credentials = Credentials.from_url(emulator.cloudinary_url)
    return AnalyzeSession(credentials, settings=Settings(backoff_first=0.001, **options))


async def collect(
    session: AnalyzeSession, items: Any = URLS, to_request: Any = Captioning, **options: Any
) -> tuple[list[Any], BudgetReachedError | None, Spent]:
    found: list[Any] = []
    error = None
    async with session.map(items, to_request, **options) as stream:
        try:
            async for outcome in stream:
                found.append(outcome)
        except BudgetReachedError as stopped:
            error = stopped
        assert stream.spent is not None
        return found, error, stream.spent


def count_charged(emulator: Emulator) -> int:
    return emulator.counts.total_done


@pytest.mark.parametrize("mode", ["call", "task"])
async def test_calls_are_exact(mode: Any) -> None:
    async with connected() as (emulator, session):
        found, error, spent = await collect(session, mode=mode, budget=Budget(calls=17))
    assert count_charged(emulator) == emulator.counts.total_received == 17
    assert sum(outcome.error is None for outcome in found) == 17
    assert isinstance(error, BudgetReachedError)
    assert spent.calls == error.calls == 17


async def test_a_budget_that_suffices_stops_nothing() -> None:
    async with connected() as (_, session):
        found, error, spent = await collect(session, budget=Budget(calls=60, units={FEATURE: 60}))
    assert (len(found), error, spent.units) == (60, None, {FEATURE: 60})


async def test_restored_and_shared_responses_cost_nothing(tmp_path: Path) -> None:
    items = [url for url in URLS for _ in range(3)]
    async with Emulator() as emulator:
        for run in range(1, 5):
            async with (
                SQLiteLedger(tmp_path / "x.ledger") as ledger,
                open_session(emulator) as session,
            ):
                found, error, spent = await collect(
                    session, items, ledger=ledger, budget=Budget(calls=20)
                )
            new = 20 if run < 4 else 0
            assert spent.calls == new
            assert (error is None) == (run >= 3)
            assert count_charged(emulator) == min(60, run * 20)
    assert len(found) == 180
    assert all(outcome.restored for outcome in found)


async def test_units_of_tokens_stay_within_the_cap() -> None:
    def ask(url: str) -> AIVisionGeneral:
        return AIVisionGeneral(url, prompts=("What is in the foreground?",))

    async with Emulator() as emulator:
        async with open_session(emulator) as session:
            found, error, spent = await collect(
                session, to_request=ask, budget=Budget(units={"ai_vision": 20_000})
            )
    answered = [outcome.response for outcome in found if outcome.error is None]
    used = sum(response.limits[0].used_by_request or 0 for response in answered)
    assert spent.units == {"ai_vision": used}
    assert len(answered) == spent.calls == count_charged(emulator) < 60
    assert isinstance(error, BudgetReachedError)
    assert error.feature == "ai_vision"
    largest = max(response.limits[0].used_by_request or 0 for response in answered)
    assert 20_000 - largest < used <= 20_000 + sum(spent.overshoot.values())


@pytest.mark.parametrize("with_ledger", [False, True])
async def test_repeats_count_as_calls(tmp_path: Path, with_ledger: bool) -> None:
    settings = quick(on_missing_result="analyze", result_grace=0.05)
    async with unconnected(settings) as (emulator, session):
        async with SQLiteLedger(tmp_path / "x.ledger") as ledger:
            options: dict[str, Any] = {"ledger": ledger} if with_ledger else {}
            with pytest.warns(UserWarning, match="without a notification source"):
                found, error, spent = await collect(
                    session, URLS[:20], mode="task", window=1, budget=Budget(calls=9), **options
                )
            await session.aclose()
    assert count_charged(emulator) == 9 == spent.calls
    assert sum(outcome.error is None for outcome in found) == 4
    assert isinstance(error, BudgetReachedError)


async def test_only_a_budget_is_accepted() -> None:
    async with Emulator() as emulator, open_session(emulator) as session:
        with pytest.raises(ConfigurationError, match="`budget` must be a Budget"):
            session.map(URLS, Captioning, budget=100)  # type: ignore[arg-type]
