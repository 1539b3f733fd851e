"""A stream's budget, checked with calls that the tests control."""

from __future__ import annotations

import asyncio
import pickle
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import Suspensions, until

from cloudinary_analyze import (
    Budget,
    BudgetReachedError,
    BulkStoppedError,
    Captioning,
    Coco,
    ConfigurationError,
    GoogleTagging,
    OutcomeStream,
    Response,
    ServerError,
    Settings,
    Spent,
    to_dict,
)
from cloudinary_analyze._budget import Spending
from cloudinary_analyze._clock import SYSTEM_CLOCK
from cloudinary_analyze.responses import Limit

FEATURE = "object_detection"
URL = "https://example.com/a.jpg"


class Calls:
    """Performs requests at a given cost and counts them."""

    def __init__(self, cost: Any = lambda _: 1, turns: Any = lambda _: 1) -> None:
        self.cost, self.turns = cost, turns
        self.sent = self.now = self.most = 0
        self.charged: dict[str, int] = {}
        self.failing: set[int] = set()

    async def perform(self, work: Any) -> Any:
        work.check()
        await work.reserve()
        work.start()
        number, self.sent = self.sent, self.sent + 1
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            for _ in range(self.turns(number)):
                await asyncio.sleep(0)
        finally:
            self.now -= 1
        if number in self.failing:
            raise ServerError("No.", status=503)
        cost, feature = self.cost(number), work.request.feature
        self.charged[feature] = self.charged.get(feature, 0) + cost
        raw = {"limits": {"addons_quota": [{"type": feature, "used_by_request": cost}]}}
        return Response(number, model=work.request.model, raw=raw)


def stream(
    calls: Calls, items: Any, budget: Budget, *, window: int = 8, convert: Any = None
) -> OutcomeStream[Any, Any]:
    return OutcomeStream(
        items,
        convert or (lambda _: Captioning(URL)),
        calls.perform,
        settings=Settings(),
        clock=SYSTEM_CLOCK,
        window=window,
        ordered=False,
        budget=budget,
    )


async def collect(stream: OutcomeStream[Any, Any]) -> tuple[list[Any], BulkStoppedError | None]:
    found = []
    try:
        async for outcome in stream:
            found.append(outcome)
    except BulkStoppedError as error:
        return found, error
    return found, None


def spent_of(stream: OutcomeStream[Any, Any]) -> Spent:
    assert stream.spent is not None
    return stream.spent


@given(
    calls=st.integers(0, 20),
    count=st.integers(0, 30),
    window=st.integers(1, 12),
    failing=st.sets(st.integers(0, 30)),
    seed=st.integers(0, 9),
)
def test_the_number_of_charged_calls_is_exact(
    calls: int, count: int, window: int, failing: set[int], seed: int
) -> None:
    async def run() -> None:
        rng = random.Random(seed)
        service = Calls(turns=lambda _: rng.randrange(5))
        service.failing = failing
        work = stream(service, range(count), Budget(calls=calls), window=window)
        found, error = await collect(work)
        charged = service.charged.get(FEATURE, 0)
        free = sum(number in failing for number in range(service.sent))
        assert charged == min(calls, count - free)
        assert spent_of(work) == Spent(calls=charged, units={FEATURE: charged} if charged else {})
        assert (error is None) == (service.sent == count)
        assert sum(outcome.error is None for outcome in found) == charged

    asyncio.run(run())


@given(
    cap=st.integers(0, 200),
    costs=st.lists(st.integers(0, 50), min_size=1, max_size=9),
    window=st.integers(1, 12),
)
def test_only_unforeseen_costs_exceed_the_units(cap: int, costs: list[int], window: int) -> None:
    async def run() -> None:
        service = Calls(cost=lambda number: costs[number % len(costs)], turns=lambda n: n % 4)
        work = stream(service, range(40), Budget(units={FEATURE: cap}), window=window)
        _, error = await collect(work)
        spent = spent_of(work)
        units = spent.units.get(FEATURE, 0)
        assert units == service.charged.get(FEATURE, 0)
        over = units - cap
        assert spent.overshoot == ({FEATURE: over} if over > 0 else {})
        if len(set(costs)) == 1:
            assert over <= max(0, costs[0] - cap)
        else:
            assert over < max(costs) * min(window, 40)
        if error is not None:
            assert isinstance(error, BudgetReachedError)
            assert (error.feature, error.calls) == (FEATURE, spent.calls)
            assert error.overshoot == spent.overshoot
            assert units + max(costs) >= cap

    asyncio.run(run())


async def test_equal_costs_use_every_unit() -> None:
    service = Calls(cost=lambda _: 3, turns=lambda n: n % 5)
    work = stream(service, range(1000), Budget(units={FEATURE: 300}), window=64)
    await collect(work)
    assert spent_of(work) == Spent(calls=100, units={FEATURE: 300})
    assert service.most > 30


async def test_the_first_call_of_a_feature_runs_alone() -> None:
    together: list[int] = []
    service = Calls(cost=lambda _: 400, turns=lambda n: together.append(service.now) or 3)
    work = stream(service, range(100), Budget(units={FEATURE: 1000}), window=64)
    await collect(work)
    assert together[0] == 1
    assert spent_of(work) == Spent(calls=2, units={FEATURE: 800})


async def test_a_feature_stops_and_others_continue() -> None:
    service = Calls()
    kinds = [Captioning, GoogleTagging, Coco]
    items = [kind(URL) for _ in range(50) for kind in kinds]
    work = stream(service, items, Budget(units={FEATURE: 10}), window=200, convert=lambda x: x)
    found, error = await collect(work)
    assert error is None
    assert service.charged == {FEATURE: 10, "google_tagging": 50}
    failed = [outcome for outcome in found if outcome.error is not None]
    assert len(failed) == 90
    assert all(isinstance(outcome.error, BulkStoppedError) for outcome in failed)
    assert len({outcome.index for outcome in found}) == 150


async def test_every_call_in_flight_has_its_outcome() -> None:
    service = Calls(turns=lambda n: 20 - n)
    work = stream(service, range(100), Budget(calls=10), window=64)
    found, error = await collect(work)
    assert sum(outcome.error is None for outcome in found) == 10
    assert isinstance(error, BudgetReachedError)
    assert (error.feature, error.calls, error.units) == (None, 10, {FEATURE: 10})
    refused = [outcome for outcome in found if outcome.error is not None]
    assert all(isinstance(outcome.error, BudgetReachedError) for outcome in refused)
    assert [o.index for o in found if o.error is None] != [o.index for o in refused]


async def test_the_error_of_a_stopped_feature_has_the_final_figures() -> None:
    service = Calls(turns=lambda _: 3)
    first, rest = [GoogleTagging(URL), Captioning(URL)], [GoogleTagging(URL)] * 4
    items = [*first, Captioning(URL), *rest, Captioning(URL)]
    budget = Budget(units={FEATURE: 1})
    work = stream(service, items, budget, window=1, convert=lambda x: x)
    _, error = await collect(work)
    assert isinstance(error, BudgetReachedError)
    assert (error.feature, error.calls) == (FEATURE, 6)
    assert error.units == spent_of(work).units == {FEATURE: 1, "google_tagging": 5}


async def test_a_budget_without_limits_only_counts() -> None:
    work = stream(Calls(cost=lambda n: n), range(5), Budget())
    assert (await collect(work))[1] is None
    assert spent_of(work) == Spent(calls=5, units={FEATURE: 10})


async def test_without_a_budget_nothing_is_counted() -> None:
    calls = Calls()
    work: OutcomeStream[Any, Any] = OutcomeStream(
        range(3),
        lambda _: Captioning(URL),
        calls.perform,
        settings=Settings(),
        clock=SYSTEM_CLOCK,
        window=2,
        ordered=False,
    )
    await collect(work)
    assert work.spent is None


async def test_a_closed_stream_wakes_every_waiter() -> None:
    service = Calls(turns=lambda _: 10_000)
    work = stream(service, range(100), Budget(units={FEATURE: 1000}), window=50)
    task = asyncio.ensure_future(collect(work))
    await until(lambda: service.now == 1)
    await work.aclose()
    with pytest.raises(BulkStoppedError):
        raise (await task)[1] or AssertionError
    assert spent_of(work).calls == 1  # it may have been charged


@pytest.mark.parametrize("late", [False, True])
async def test_a_cancelled_reservation_leaves_no_trace(late: bool) -> None:
    for step in range(1, 6):
        spending = Spending(Budget(calls=2))
        await spending.reserve("a")
        await spending.reserve("a")
        waiter = asyncio.create_task(Suspensions(step, late).drive(spending.reserve("a")))
        other = asyncio.create_task(spending.reserve("a"))
        await asyncio.sleep(0.001)
        for _ in range(2):
            spending.settle("a", None, charged=False)
        await asyncio.wait([waiter, other], timeout=30)
        assert other.done()
        assert other.exception() is None
        held = 1 + (not waiter.cancelled())
        for _ in range(held):
            spending.settle("a", (), charged=True)
        assert spending.spent.calls == held
        if held == 1:
            await spending.reserve("a")


@pytest.mark.slow
async def test_100_000_items_wait_in_linear_time() -> None:
    spending = Spending(Budget(calls=50_000, units={"a": 10**9}))
    done = refused = 0

    async def call() -> None:
        nonlocal done, refused
        try:
            await spending.reserve("a")
        except BudgetReachedError:
            refused += 1
            return
        await asyncio.sleep(0)
        spending.settle("a", [Limit("a", used_by_request=7)], charged=True)
        done += 1

    await asyncio.gather(*(call() for _ in range(100_000)))
    assert (done, refused) == (50_000, 50_000)
    assert spending.spent == Spent(calls=50_000, units={"a": 350_000})


@pytest.mark.slow
async def test_a_stream_of_100_000_items_keeps_its_budget() -> None:
    service = Calls(cost=lambda n: 1 + n % 7, turns=lambda n: n % 3)
    budget = Budget(calls=90_000, units={FEATURE: 300_000})
    work = stream(service, range(100_000), budget, window=10_000)
    found, error = await collect(work)
    spent = spent_of(work)
    assert 300_000 - 7 < spent.units[FEATURE] <= 300_000
    assert isinstance(error, BudgetReachedError)
    assert sum(outcome.error is None for outcome in found) == spent.calls


@pytest.mark.parametrize(
    "options",
    [
        {"calls": -1},
        {"calls": 1.5},
        {"calls": True},
        {"calls": "10"},
        {"units": 5},
        {"units": ["ai_vision"]},
        {"units": {"ai_vision": -1}},
        {"units": {"ai_vision": None}},
        {"units": {"": 1}},
        {"units": {3: 1}},
        {"units": {"captioning": 10}},
    ],
)
def test_invalid_budgets_are_refused(options: Any) -> None:
    with pytest.raises(ConfigurationError):
        Budget(**options)


def test_a_model_in_place_of_a_feature_is_named() -> None:
    with pytest.raises(ConfigurationError, match="'object_detection': 10"):
        Budget(units={"captioning": 10})


def test_a_budget_is_a_frozen_value() -> None:
    units = {"ai_vision": 5}
    budget = Budget(calls=3, units=units)
    units["ai_vision"] = 9
    assert budget == Budget(calls=3, units={"ai_vision": 5}) == pickle.loads(pickle.dumps(budget))
    assert hash(budget) == hash(Budget(calls=3, units={"ai_vision": 5}))
    assert to_dict(budget) == {"calls": 3, "units": {"ai_vision": 5}}
    with pytest.raises(AttributeError):
        budget.calls = 4  # type: ignore[misc]
