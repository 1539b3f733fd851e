"""The windowed stream alone, with a `perform` that the tests control."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import Suspensions

from cloudinary_analyze import (
    AnalyzeError,
    ApiError,
    AuthenticationError,
    BulkStoppedError,
    Captioning,
    CldText,
    Coco,
    ConfigurationError,
    Failed,
    ForeignCancellationError,
    GoogleTagging,
    InvalidRequestError,
    Outcome,
    OutcomeStream,
    PermissionDeniedError,
    QuotaExceededError,
    RateLimitedError,
    Response,
    ServerError,
    SessionClosedError,
    Settings,
)
from cloudinary_analyze._clock import SYSTEM_CLOCK
from cloudinary_analyze.testing import ManualClock

BASE = "https://example.com/"


def to_request(item: int) -> Captioning:
    return Captioning(f"{BASE}{item}")


class Service:
    """Performs requests on demand and counts them."""

    def __init__(self, *, held: bool = False) -> None:
        self.open = asyncio.Event()
        if not held:
            self.open.set()
        self.sent: list[int] = []
        self.now = self.most = self.cancelled = 0
        self.errors: dict[int, Exception] = {}
        self.delay: Callable[[int], int] = lambda _: 1

    async def perform(self, work: Any) -> Any:
        work.check()
        number = int(work.request.source.uri.removeprefix(BASE))
        work.start()
        self.sent.append(number)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self.open.wait()
            for _ in range(self.delay(number)):
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.now -= 1
        if number in self.errors:
            raise self.errors[number]
        return Response(number, model="captioning")


def stream(
    service: Service,
    items: Any,
    convert: Any = to_request,
    *,
    window: int = 4,
    ordered: bool = False,
) -> OutcomeStream[Any, Any]:
    return OutcomeStream(
        items,
        convert,
        service.perform,
        settings=Settings(),
        clock=SYSTEM_CLOCK,
        window=window,
        ordered=ordered,
    )


async def settle() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


class Pulled:
    """An iterator that counts the pulled items and is endless for practical purposes."""

    def __init__(self, count: int | None = None, *, breaks_at: int | None = None) -> None:
        self.count, self.breaks_at, self.pulled = count, breaks_at, 0

    def __iter__(self) -> Iterator[int]:
        while self.count is None or self.pulled < self.count:
            if self.pulled == self.breaks_at:
                raise OSError("the input broke")
            assert self.pulled < 20_000, "the stream pulls without a bound"
            self.pulled += 1
            yield self.pulled - 1


async def later(items: Any) -> AsyncIterator[int]:
    for item in items:
        await asyncio.sleep(0)
        yield item


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
@given(
    count=st.integers(0, 30),
    window=st.integers(1, 40),
    delays=st.lists(st.integers(0, 6), min_size=1, max_size=7),
)
def test_every_item_has_exactly_one_outcome(
    ordered: bool, asynchronous: bool, count: int, window: int, delays: list[int]
) -> None:
    async def run() -> None:
        service = Service()
        service.delay = lambda number: delays[number % len(delays)]
        items = later(range(count)) if asynchronous else range(count)
        found = [o async for o in stream(service, items, window=window, ordered=ordered)]
        numbers = [outcome.item for outcome in found]
        assert sorted(numbers) == list(range(count))
        assert all(o.index == o.item == o.unwrap().analysis for o in found)
        assert all(o.request == to_request(o.item) and o.error is None for o in found)
        if ordered:
            assert numbers == list(range(count))
        assert service.most <= window

    asyncio.run(run())


async def test_unordered_outcomes_come_in_order_of_completion() -> None:
    service = Service()
    service.delay = lambda number: 50 if number == 0 else 1
    found = [o.item async for o in stream(service, range(4))]
    assert found[-1] == 0
    assert [o.item async for o in stream(service, range(4), ordered=True)] == [0, 1, 2, 3]


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_nothing_is_pulled_before_the_first_outcome(asynchronous: bool) -> None:
    items = Pulled(5)
    stream(Service(), later(items) if asynchronous else items)
    await settle()
    assert items.pulled == 0


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_a_slow_consumer_slows_an_infinite_input_down(
    ordered: bool, asynchronous: bool
) -> None:
    items = Pulled()
    service = Service()
    outcomes = stream(service, later(items) if asynchronous else items, window=5, ordered=ordered)
    async with outcomes:
        for taken in range(1, 20):
            await anext(outcomes)
            await settle()
            assert items.pulled == taken + 5


@pytest.mark.parametrize("ordered", [False, True])
async def test_a_slow_consumer_does_not_exceed_the_window(
    ordered: bool,
) -> None:
    """The sender takes one turn of the loop per item, the consumer a hundred."""
    items = Pulled()
    service = Service()
    service.delay = lambda _: 1
    async with stream(service, items, window=16, ordered=ordered) as outcomes:
        for taken in range(1, 200):
            await anext(outcomes)
            for _ in range(100):
                await asyncio.sleep(0)
                assert items.pulled <= taken + 16
            assert items.pulled == taken + 16


async def test_buffered_outcomes_count_in_the_window() -> None:
    items = Pulled()
    service = Service(held=True)
    outcomes = stream(service, items, window=5, ordered=True)
    service.delay = lambda number: 200 if number == 0 else 0
    async with outcomes:
        first = asyncio.create_task(anext(outcomes))
        await settle()
        service.open.set()
        await settle()
        assert not first.done()
        assert items.pulled == 5  # one in flight, four buffered behind it
        assert (await first).item == 0


async def test_an_error_of_to_request_is_the_items_error() -> None:
    def convert(item: int) -> Captioning:
        if item % 2:
            raise KeyError(item)
        return to_request(item)

    found = [o async for o in stream(Service(), range(6), convert, ordered=True)]
    assert [type(o.error) for o in found] == [type(None), KeyError] * 3
    assert [o.request is None for o in found] == [False, True] * 3
    with pytest.raises(KeyError):
        found[1].unwrap()


async def test_endless_bad_items_do_not_starve_the_loop() -> None:
    def convert(_: int) -> Captioning:
        raise ValueError("bad")

    outcomes = stream(Service(), Pulled(), convert, window=3)
    async with asyncio.timeout(30), outcomes:
        for _ in range(50):
            assert isinstance((await anext(outcomes)).error, ValueError)


@pytest.mark.parametrize("wrong", [None, "https://example.com/a.jpg", 5])
async def test_an_invalid_request_is_its_items_error(wrong: Any) -> None:
    for outcomes in (stream(Service(), [wrong], None), stream(Service(), [1], lambda _: wrong)):
        (found,) = [o async for o in outcomes]
        assert isinstance(found.error, InvalidRequestError)
        assert "session.map(urls, Captioning)" in str(found.error)


async def test_items_that_are_requests_need_no_to_request() -> None:
    found = [o async for o in stream(Service(), [to_request(7)], None)]
    assert found[0].request is found[0].item


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
async def test_an_input_error_is_raised_after_items_in_flight(
    asynchronous: bool, ordered: bool
) -> None:
    items = Pulled(breaks_at=7)
    outcomes = stream(Service(), later(items) if asynchronous else items, window=3, ordered=ordered)
    found = []
    with pytest.raises(OSError, match="the input broke"):  # noqa: PT012
        async for outcome in outcomes:
            found.append(outcome.item)
    assert sorted(found) == list(range(7))
    with pytest.raises(StopAsyncIteration):
        await anext(outcomes)


STOPPERS: list[Exception] = [
    AuthenticationError("401", status=401),
    PermissionDeniedError("403", status=403),
    QuotaExceededError("quota", status=429),
    SessionClosedError("closed"),
    RateLimitedError("too long", status=429, retry_after=121.0),
    ServerError("too long", status=503, retry_after=121.0),
]
PASSERS: list[Exception] = [
    ApiError("404", status=404),
    RateLimitedError("short", status=429, retry_after=120.0),
    ServerError("500", status=500),
    AnalyzeError("other"),
    ValueError("a bug of the caller's"),
]


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("error", STOPPERS, ids=str)
async def test_a_fatal_error_stops_after_items_in_flight(error: Exception, ordered: bool) -> None:
    service = Service()
    service.errors = {10: error}
    service.delay = lambda number: 2 if number == 10 else 20
    items = Pulled()
    found: list[Outcome[Any, Any]] = []
    outcomes = stream(service, items, window=4, ordered=ordered)
    with pytest.raises(BulkStoppedError) as caught:  # noqa: PT012
        async for outcome in outcomes:
            found.append(outcome)
            assert len(found) < 100, "an endless input was not stopped"
    assert caught.value.reason is caught.value.__cause__ is error
    assert sorted(o.item for o in found) == sorted(service.sent)
    assert len(service.sent) == items.pulled < 20
    assert [o.item for o in found if o.error] == [10]
    if ordered:
        assert [o.item for o in found] == list(range(len(found)))
    with pytest.raises(StopAsyncIteration):
        await anext(outcomes)


@pytest.mark.parametrize("error", PASSERS, ids=str)
async def test_any_other_error_fails_its_item_alone(error: Exception) -> None:
    service = Service()
    service.errors = {3: error}
    found = [o async for o in stream(service, range(10), ordered=True)]
    assert [o.error for o in found] == [error if n == 3 else None for n in range(10)]


async def test_leaving_the_block_cancels_items_in_flight() -> None:
    service = Service()
    service.delay = lambda number: 0 if number == 0 else 10_000
    async with stream(service, Pulled(), window=8) as outcomes:
        async for _ in outcomes:
            break
        await settle()
        assert service.now == 8
    assert service.now == 0
    assert service.cancelled == 8
    assert not outcomes._pump.workers
    await outcomes.aclose()


async def test_breaking_out_without_a_block_cancels_too() -> None:
    service = Service()
    service.delay = lambda number: 0 if number == 0 else 10_000
    async for _ in stream(service, Pulled(), window=8):
        break
    gc.collect()
    await settle()
    assert service.now == 0
    assert service.cancelled > 0


@pytest.mark.parametrize("ordered", [False, True])
async def test_each_outcome_goes_to_one_of_the_consumers(ordered: bool) -> None:
    service = Service()
    service.delay = lambda number: number % 5
    outcomes = stream(service, range(60), window=7, ordered=ordered)
    found: list[int] = []

    async def consume(pause: int) -> None:
        async for outcome in outcomes:
            found.append(outcome.item)
            for _ in range(pause):
                await asyncio.sleep(0)

    async with asyncio.timeout(30):
        await asyncio.gather(*(consume(pause) for pause in (0, 1, 3, 20)))
    assert sorted(found) == list(range(60))


async def test_when_a_shared_stream_stops_no_consumer_hangs() -> None:
    service = Service()
    service.errors = {20: AuthenticationError("401", status=401)}
    outcomes = stream(service, Pulled(), window=7)

    async def consume() -> int:
        return len([outcome async for outcome in outcomes])

    async with asyncio.timeout(30):
        ends = await asyncio.gather(*(consume() for _ in range(4)), return_exceptions=True)
    assert [type(end) for end in ends].count(BulkStoppedError) == 1


@given(st.lists(st.integers(0, 12), min_size=1, max_size=12))
def test_cancelling_a_consumer_loses_no_outcome(pauses: list[int]) -> None:
    async def run() -> None:
        service = Service()
        service.delay = lambda number: number % 4
        outcomes = stream(service, range(25), window=3)
        found: list[int] = []

        async def take() -> None:
            found.append((await anext(outcomes)).item)

        for pause in pauses:
            takers = [asyncio.create_task(take()) for _ in range(2)]
            for _ in range(pause):
                await asyncio.sleep(0)
            takers[0].cancel()
            await asyncio.wait(takers)
            for taker in takers:
                if not taker.cancelled() and taker.exception() is not None:
                    assert isinstance(taker.exception(), RuntimeError | StopAsyncIteration)
        found += [outcome.item async for outcome in outcomes]
        assert sorted(found) == list(range(25))

    asyncio.run(run())


async def test_a_consumer_cancelled_on_its_turn_passes_it_on() -> None:
    service = Service()
    service.delay = lambda number: 3 if number == 0 else 100_000
    async with stream(service, range(2), window=2) as outcomes:
        first = asyncio.create_task(Suspensions(1, late=True).drive(anext(outcomes)))
        await asyncio.sleep(0)
        second = asyncio.create_task(anext(outcomes))
        await settle()
        assert first.cancelled()
        assert second.done()
        assert second.result().item == 0


async def test_a_consumer_of_a_closed_stream_gets_an_error() -> None:
    """An early end must not look as if every item had an outcome."""
    service = Service(held=True)
    outcomes = stream(service, Pulled(), window=4)
    consumer = asyncio.create_task(anext(outcomes))
    await settle()
    await outcomes.aclose()
    with pytest.raises(BulkStoppedError):
        await consumer


async def test_a_fatal_error_is_raised_after_the_last_item() -> None:
    """The caller gets the error whether or not the whole input was already pulled."""
    service = Service()
    service.errors = {1: AuthenticationError("no")}
    found = []
    with pytest.raises(BulkStoppedError):  # noqa: PT012
        async for outcome in stream(service, range(2), window=8):
            found.append(outcome)
    assert len(found) == 2


async def test_closing_an_ordered_stream_yields_held_outcomes() -> None:
    """Outcomes behind a gap are already charged, so closing the stream must not lose them."""
    service = Service()
    service.delay = lambda number: 10_000 if number == 1 else 0
    outcomes = stream(service, range(6), window=6, ordered=True)
    assert (await anext(outcomes)).item == 0
    await settle()
    await outcomes.aclose()
    assert [(await anext(outcomes)).item for _ in range(4)] == [2, 3, 4, 5]
    with pytest.raises(BulkStoppedError):
        await anext(outcomes)


async def test_closing_a_finished_stream_is_not_an_error() -> None:
    outcomes = stream(Service(), range(3))
    assert len([o async for o in outcomes]) == 3
    await outcomes.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(outcomes)


async def test_a_stream_that_never_started_closes() -> None:
    items = Pulled()
    outcomes = stream(Service(), items)
    await outcomes.aclose()
    with pytest.raises(BulkStoppedError):
        await anext(outcomes)
    assert items.pulled == 0


@pytest.mark.parametrize("items", ["https://example.com/", b"x", 5, None, object()])
async def test_an_invalid_input_is_refused(items: Any) -> None:
    with pytest.raises(InvalidRequestError, match="iterable"):
        stream(Service(), items)


@pytest.mark.parametrize("window", [0, -1, 1.5, True, "4"])
async def test_a_window_is_a_positive_integer(window: Any) -> None:
    with pytest.raises(ConfigurationError, match="whole number from 1"):
        stream(Service(), [], window=window)


async def test_an_input_without_items_ends_at_once() -> None:
    assert [o async for o in stream(Service(), [])] == []
    assert [o async for o in stream(Service(), later([]))] == []


# foreign cancellations


async def raise_cancelled(*_: Any) -> Any:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.cancel()
    await future


class Cancelled:
    """A synchronous and asynchronous iterator that ends with `CancelledError`."""

    left = 7

    def __iter__(self) -> Cancelled:
        return self

    def __next__(self) -> int:
        self.left -= 1
        if self.left < 0:
            raise asyncio.CancelledError
        return self.left


async def later_cancelled() -> AsyncIterator[int]:
    for item in range(7):
        yield item
    await raise_cancelled()


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("items", [Cancelled, later_cancelled])
async def test_a_cancelled_input_ends_after_items_in_flight(
    items: Callable[[], Any], ordered: bool
) -> None:
    outcomes = stream(Service(), items(), window=3, ordered=ordered)
    found = []
    async with asyncio.timeout(30):
        with pytest.raises(ForeignCancellationError, match="input") as caught:  # noqa: PT012
            async for outcome in outcomes:
                found.append(outcome.item)
    assert isinstance(caught.value.__cause__, asyncio.CancelledError)
    assert sorted(found) == list(range(7))


@pytest.mark.parametrize("culprit", ["to_request", "key", "perform"])
async def test_a_foreign_cancelled_error_fails_its_item_alone(culprit: str) -> None:
    def fail_at_three(item: int, result: Any) -> Any:
        if item == 3:
            raise asyncio.CancelledError
        return result

    service = Service()
    perform = service.perform

    async def perform_three(work: Any) -> Any:
        if work.item == 3:
            await raise_cancelled()
        return await perform(work)

    outcomes = OutcomeStream(
        range(9),
        lambda item: fail_at_three(item if culprit == "to_request" else 0, to_request(item)),
        perform_three if culprit == "perform" else perform,
        settings=Settings(),
        clock=SYSTEM_CLOCK,
        window=4,
        ordered=True,
        name=lambda item: fail_at_three(item if culprit == "key" else 0, "name"),
    )
    async with asyncio.timeout(30):
        found = [outcome async for outcome in outcomes]
    assert [type(o.error) for o in found] == [
        ForeignCancellationError if n == 3 else type(None) for n in range(9)
    ]


async def test_a_cancelled_worker_stops_with_an_error() -> None:
    service = Service(held=True)
    outcomes = stream(service, range(40), window=4)
    consumer = asyncio.create_task(anext(outcomes))
    await settle()
    for worker in list(outcomes._pump.workers):
        worker.cancel()
    async with asyncio.timeout(30):
        with pytest.raises(BulkStoppedError, match="cancelled"):
            await consumer


async def test_a_cancelled_error_on_closing_is_foreign() -> None:
    async def rows() -> AsyncIterator[int]:
        try:
            while True:
                yield 1
        finally:
            await raise_cancelled()

    outcomes = stream(Service(), rows())
    await anext(outcomes)
    with pytest.raises(ForeignCancellationError):
        await outcomes.aclose()
    assert not asyncio.current_task().cancelling()  # type: ignore[union-attr]


@pytest.mark.skipif(not hasattr(asyncio, "eager_task_factory"), reason="needs Python 3.12")
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_a_stream_works_on_a_loop_whose_tasks_start_eagerly(asynchronous: bool) -> None:
    loop = asyncio.get_running_loop()
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]
    service = Service()
    service.delay = lambda _: 0  # an eager task would end before the stream has recorded it
    items = later(range(3000)) if asynchronous else range(3000)
    async with asyncio.timeout(30):
        assert len([o async for o in stream(service, items, window=2000)]) == 3000


# kinds of requests that are stopped


MODELS = [Captioning, Coco, CldText, GoogleTagging]  # one feature has the first three


def by_turns(item: int) -> Any:
    return MODELS[item % 4](f"{BASE}{item}")


def refuse_model(service: Service, kind: type, error: Exception) -> Any:
    async def perform(work: Any) -> Any:
        response = await service.perform(work)
        if isinstance(work.request, kind):
            raise error
        return response

    return perform


def stream_by_turns(perform: Any, items: Any, *, window: int, convert: Any = by_turns) -> Any:
    return OutcomeStream(
        items,
        convert,
        perform,
        settings=Settings(),
        clock=SYSTEM_CLOCK,
        window=window,
        ordered=True,
    )


@pytest.mark.parametrize(
    ("error", "stopped"),
    [
        (QuotaExceededError("quota", status=429), {Captioning, Coco, CldText}),
        (PermissionDeniedError("no add-on", status=403, feature="x"), {Coco}),
    ],
    ids=["quota", "add-on"],
)
async def test_an_error_stops_only_its_feature_or_model(
    error: Exception, stopped: set[type]
) -> None:
    service = Service()
    found = [
        outcome
        async for outcome in stream_by_turns(
            refuse_model(service, Coco, error), range(80), window=4
        )
    ]
    assert len(found) == 80
    for outcome in found[20:]:
        kind = MODELS[outcome.item % 4]
        assert (outcome.response is None) == (kind in stopped)
        if kind in stopped:
            assert isinstance(outcome.error, BulkStoppedError)
            assert outcome.error.reason is error
            assert (outcome.seconds, outcome.request) == (0.0, by_turns(outcome.item))
    assert len(service.sent) < 80 - 60 * len(stopped) / 4 + 4


async def test_a_stream_of_one_stopped_kind_ends_at_once() -> None:
    error = QuotaExceededError("quota", status=429)
    service, items = Service(), Pulled()
    perform = refuse_model(service, Captioning, error)
    found = []
    with pytest.raises(BulkStoppedError) as caught:  # noqa: PT012
        async for outcome in stream_by_turns(perform, items, window=4, convert=to_request):
            found.append(outcome)
    assert caught.value.reason is error
    assert items.pulled == len(found) <= 8
    assert len(service.sent) <= 4


async def test_a_stream_ends_after_a_window_of_unsent_items() -> None:
    """Otherwise, an endless input would be consumed as failures."""
    error = QuotaExceededError("quota", status=429)
    service, items = Service(), Pulled()

    def convert(item: int) -> Any:
        return GoogleTagging(f"{BASE}{item}") if item < 10 else to_request(item)

    found = []
    with pytest.raises(BulkStoppedError) as caught:  # noqa: PT012
        async for outcome in stream_by_turns(
            refuse_model(service, Captioning, error), items, window=6, convert=convert
        ):
            found.append(outcome)
    assert caught.value.reason is error
    assert sum(outcome.error is None for outcome in found) == 10
    assert items.pulled == len(found) <= 10 + 6 + 6 + 6


async def test_restored_items_interrupt_a_row_of_unsent_items() -> None:
    error = QuotaExceededError("quota", status=429)
    send = refuse_model(Service(), Captioning, error)

    async def perform(work: Any) -> Any:
        work.restored = work.index % 2 == 1
        return None if work.restored else await send(work)

    def convert(item: int) -> Any:
        return (Captioning if item else GoogleTagging)(f"{BASE}{item}")

    stream = stream_by_turns(perform, range(40), window=2, convert=convert)
    found = [outcome async for outcome in stream]
    assert [outcome.index for outcome in found if outcome.error is None] == [0, *range(1, 40, 2)]


async def test_a_waiting_item_of_a_stopped_kind_is_not_sent() -> None:
    """The stream checks again when the request gets its permit."""
    error = QuotaExceededError("quota", status=429)
    service = Service()
    turn = asyncio.Semaphore(1)

    async def perform(work: Any) -> Any:
        work.check()
        async with turn:
            await service.perform(work)
            raise error

    found = []
    with pytest.raises(BulkStoppedError):  # noqa: PT012
        async for outcome in stream(service, range(50)).__class__(
            range(50),
            to_request,
            perform,
            settings=Settings(),
            clock=SYSTEM_CLOCK,
            window=8,
            ordered=False,
        ):
            found.append(outcome)
    assert service.sent == [0]
    assert [outcome.error for outcome in found].count(error) == 1


@pytest.mark.parametrize("convert", [None, lambda _: 1 / 0, lambda _: None])
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_an_input_without_requests_ends_after_100_items(
    convert: Any, asynchronous: bool
) -> None:
    items = Pulled()
    source = later(items) if asynchronous else items
    outcomes = stream(Service(), source, convert)
    found = []
    with pytest.raises(BulkStoppedError, match="first 100 items"):  # noqa: PT012
        async for outcome in outcomes:
            found.append(outcome)
    assert len(found) == items.pulled == 100
    assert all(isinstance(outcome, Failed) and outcome.request is None for outcome in found)


async def test_bad_items_after_a_good_one_fail_separately() -> None:
    def convert(item: int) -> Captioning:
        if item:
            raise ValueError(item)
        return to_request(item)

    found = [o async for o in stream(Service(), range(1000), convert)]
    assert [o.error is None for o in found].count(True) == 1
    assert len(found) == 1000


# misuse


async def test_a_stream_used_as_a_list_says_how_to_use_it() -> None:
    outcomes: Any = stream(Service(), range(3))
    with pytest.raises(TypeError, match="async for"):
        for _ in outcomes:
            pass
    with pytest.raises(TypeError, match="async for"):
        list(outcomes)
    with pytest.raises(TypeError, match="async with"):
        with outcomes:
            pass
    with pytest.raises(TypeError, match="async for"):
        await outcomes


class DataFrame:
    """Iterates over its columns, like a pandas or polars DataFrame."""

    def __iter__(self) -> Iterator[str]:
        return iter(["url"])


@pytest.mark.parametrize("items", [{"a": 1}, bytearray(b"x"), memoryview(b"x"), DataFrame()])
async def test_an_input_that_iterates_over_keys_is_refused(items: Any) -> None:
    with pytest.raises(InvalidRequestError, match="rows of a table"):
        stream(Service(), items)


# figures


async def test_an_outcome_has_its_waiting_and_attempt_times() -> None:
    clock = ManualClock()

    async def perform(work: Any) -> Any:
        work.check()
        clock.now += 3
        if work.item == 1:
            raise ValueError
        work.start()
        clock.now += 5
        return Response(1, model="captioning")

    outcomes = OutcomeStream(
        range(2),
        to_request,
        perform,
        settings=Settings(),
        clock=clock,
        window=1,
        ordered=True,
    )
    first, second = [outcome async for outcome in outcomes]
    assert (first.queued, first.seconds, first.restored) == (3.0, 5.0, False)
    assert (second.queued, second.seconds, second.restored) == (3.0, 0.0, False)


async def test_cancelled_consumers_leave_nothing_behind() -> None:
    service = Service(held=True)
    outcomes = stream(service, range(3))
    for _ in range(50):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await anext(outcomes)
    assert len(outcomes._pump.consumers) == 0
    await outcomes.aclose()


async def collect(outcomes: OutcomeStream[Any, Any]) -> list[Outcome[Any, Any]]:
    return [outcome async for outcome in outcomes]


async def test_a_stopped_stream_finishes_items_in_flight():
    service = Service(held=True)
    running = stream(service, iter(range(100)), window=8)
    taking = asyncio.create_task(collect(running))
    while service.now < 8:
        await asyncio.sleep(0)
    running.stop()
    running.stop()
    service.open.set()
    outcomes = await taking
    assert service.sent == list(range(8))
    assert [outcome.error for outcome in outcomes] == [None] * 8


async def test_queued_items_of_a_stopped_stream_fail_unsent():
    gate = asyncio.Event()
    sent: list[int] = []
    queued: list[int] = []

    async def perform(work: Any) -> Any:
        work.check()
        if work.index >= 2:
            queued.append(work.index)
            await gate.wait()  # for a permit
        work.start()
        sent.append(work.index)
        await gate.wait()
        return Response(work.index, model="captioning")

    running = OutcomeStream(
        iter(range(100)),
        to_request,
        perform,
        settings=Settings(),
        clock=SYSTEM_CLOCK,
        window=6,
        ordered=True,
    )
    taking = asyncio.create_task(collect(running))
    while len(sent) < 2 or len(queued) < 4:
        await asyncio.sleep(0)
    running.stop()
    gate.set()
    outcomes = await taking
    assert sent == [0, 1]
    assert [outcome.error is None for outcome in outcomes] == [True, True] + [False] * 4
    assert all(type(outcome.error) is BulkStoppedError for outcome in outcomes[2:])


async def test_a_stream_can_be_stopped_before_and_after_use():
    service = Service()
    stopped = stream(service, iter(range(3)))
    stopped.stop()
    assert await collect(stopped) == []
    other = stream(service, iter(range(3)))
    assert len(await collect(other)) == 3
    other.stop()
    assert await collect(other) == []
