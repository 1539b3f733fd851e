"""The stream behind `map`: bounded concurrency and memory, one outcome per item.

Workers pull the items, so there are no tasks per item, and an item is pulled only if the window has
a place for it. The window counts an item from its pull until its outcome is handed over, so a slow
consumer slows the input down.

The input, ``to_request``, ``key`` and the code that ``perform`` calls may raise anything. If they
raise `CancelledError` and the worker was not cancelled, it is treated as their error.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
)
from typing import TYPE_CHECKING, Any, Final, Generic, Never, Self, TypeVar

import attrs

from cloudinary_analyze._cancellation import count_cancellations
from cloudinary_analyze._clock import Clock, wake_next
from cloudinary_analyze._policy import Stop, find_stop, may_be_charged
from cloudinary_analyze._values import Closable, NotPicklable
from cloudinary_analyze._work import Stops, Work, wrap_cancellation
from cloudinary_analyze.config import Settings
from cloudinary_analyze.errors import (
    BudgetReachedError,
    BulkStoppedError,
    ConfigurationError,
    InvalidRequestError,
    LedgerError,
)
from cloudinary_analyze.outcomes import Answered, Failed, Outcome
from cloudinary_analyze.requests import AnalyzeRequest
from cloudinary_analyze.responses import Response

if TYPE_CHECKING:
    from cloudinary_analyze._budget import Budget, Spending, Spent

Item = TypeVar("Item")
A = TypeVar("A")
Item_co = TypeVar("Item_co", covariant=True)
A_co = TypeVar("A_co", covariant=True)

Perform = Callable[[Work[Item, A]], Awaitable[Response[A]]]

UNUSABLE: Final = 100  # the stream stops if none of this many first items makes a request
_TABLES: Final = frozenset({"DataFrame", "LazyFrame"})  # iterating a table yields its columns


@attrs.define(eq=False, repr=False)
class _Pump(Generic[Item, A]):
    """The working part of a stream. It does not refer to the stream, so dropping a stream stops it.

    It pulls until it is `exhausted`: the input ended or failed, an error stopped the stream, or
    the stream was closed. Then each worker finishes its item and ends.
    """

    source: Iterator[Item] | AsyncIterator[Item]
    asynchronous: bool
    to_request: Callable[[Item], AnalyzeRequest[A]] | None
    name: Callable[[Item], str] | None
    open: Callable[[], Awaitable[None]] | None
    perform: Perform[Item, A]
    settings: Settings
    clock: Clock
    window: int
    ordered: bool
    spending: Spending | None
    ready: deque[Outcome[Item, A]] = attrs.field(factory=deque)
    early: dict[int, Outcome[Item, A]] = attrs.field(factory=dict)
    pulled: int = 0
    handed_over: int = 0
    unusable: int = 0
    stops: Stops = attrs.field(factory=Stops)
    exhausted: bool = False
    failure: Exception | None = None
    workers: set[asyncio.Task[None]] = attrs.field(factory=set)
    consumers: deque[asyncio.Future[None]] = attrs.field(factory=deque)
    parked: deque[asyncio.Future[None]] = attrs.field(factory=deque)
    pulling: asyncio.Lock = attrs.field(factory=asyncio.Lock)

    def start(self) -> None:
        # not through the loop's task factory: an eager one would run each worker inside the
        # previous one
        worker = asyncio.Task(self._work(), loop=asyncio.get_running_loop())
        self.workers.add(worker)
        worker.add_done_callback(self._end)

    def _end(self, worker: asyncio.Task[None]) -> None:
        self.workers.discard(worker)
        if worker.cancelled():
            if not self.exhausted:
                self.stop(BulkStoppedError("A task of the stream was cancelled from outside."))
        elif (error := worker.exception()) is not None:
            # only exceptions that do not subclass `Exception` get here (KeyboardInterrupt, SystemExit)
            self.stop(BulkStoppedError(f"The stream broke: {error!r}."))
        if not self.workers:
            while self.consumers:
                wake_next(self.consumers)

    async def _work(self) -> None:
        if self.open is not None and not self.pulled:
            try:
                await self.open()
            except Exception as error:
                self.stop(error)
        while not self.exhausted:
            if self.pulled - self.handed_over >= self.window:
                place = asyncio.get_running_loop().create_future()
                self.parked.append(place)
                await place
                continue
            pulled = await self._pull()
            if pulled is not None:
                if len(self.workers) < self.window and not self.exhausted:
                    self.start()  # one more, while there are items to pull
                await self._answer(*pulled)

    async def _pull(self) -> tuple[int, Item] | None:
        """Return the next index and item. ``None`` if there is none, or no place for one."""
        try:
            if self.asynchronous:
                async with self.pulling:
                    if self.exhausted or self.pulled - self.handed_over >= self.window:
                        return None
                    item = await anext(self.source)  # type: ignore[arg-type]
            else:
                item = next(self.source)  # type: ignore[arg-type]
        except (StopIteration, StopAsyncIteration):
            self.stop(None)
        except Exception as error:
            self.stop(error)
        except asyncio.CancelledError as error:
            if count_cancellations():
                raise
            self.stop(wrap_cancellation("the input of the stream", error))
        else:
            self.pulled += 1
            return self.pulled - 1, item
        return None

    async def _answer(self, index: int, item: Item) -> None:
        request: AnalyzeRequest[A] | None = None
        work: Work[Item, A] = Work(
            item,
            index,
            self.clock,
            self.stops,
            self.clock.monotonic(),
            self.spending,
            self._stop_recording,
        )
        error: Exception
        try:
            request = self._prepare(work)
            response = await self.perform(work)
        except Exception as raised:
            error = raised
        except asyncio.CancelledError as raised:
            if count_cancellations():
                work.settle(charged=work.started is not None)
                raise
            error = wrap_cancellation("code that handled this item", raised)
        else:
            self.stops.unsent = 0
            work.settle(response, charged=True)
            self._keep(Answered(request=request, response=response, **work.report()))
            return
        work.settle(charged=work.started is not None and may_be_charged(error))
        self._judge(work, request, error)
        self._keep(Failed(request=request, error=error, **work.report()))

    def _prepare(self, work: Work[Item, A]) -> AnalyzeRequest[A]:
        """Build the request of an item, and its name in the ledger."""
        item = work.item
        request: Any = item if self.to_request is None else self.to_request(item)
        if not isinstance(request, AnalyzeRequest):
            raise InvalidRequestError(
                f"{type(request).__name__} is not a request. Pass requests, or a `to_request` that "
                "builds one from each item: session.map(urls, Captioning)."
            )
        if self.name is not None:
            name: object = self.name(item)
            if not isinstance(name, str) or not name:
                raise InvalidRequestError(
                    f"`key` must return a non-empty string for each item, not {name!r:.80}."
                )
            work.name = name
        work.request = request
        self.stops.seen[request.model] = request.feature
        return request

    def _judge(
        self, work: Work[Item, A], request: AnalyzeRequest[A] | None, error: Exception
    ) -> None:
        """Decide what a failed item means for later items."""
        stops = self.stops
        if request is None:
            self.unusable += 1
            if self.unusable == UNUSABLE and not stops.seen:
                self._stop_for(error, f"None of the first {UNUSABLE} items made a request.")
        elif work.unsent:
            if stops.unsent >= self.window and not stops.halted:
                reason = stops.find(request.model, request.feature) or error
                self._stop_for(reason, f"{self.window} items in a row would fail.")
        elif not work.restored:
            stop = find_stop(error, self.settings)
            if stop is not None and stops.add(stop, request, error):
                self._stop_for(error, "Every remaining item would fail with the same error.")

    def _stop_recording(self, work: Work[Any, Any], error: LedgerError) -> None:
        self.stops.add(Stop.EVERYTHING, work.request, error)
        self._stop_for(error, "No more responses can be recorded.")

    def _stop_for(self, error: Exception, why: str) -> None:
        if not isinstance(error, BudgetReachedError):
            stopped = BulkStoppedError(
                f"Stopped: {why} {error} No further items were sent.", reason=error
            )
            stopped.__cause__ = error
            error = stopped
        self.stop(error)

    def _keep(self, outcome: Outcome[Item, A]) -> None:
        if not self.ordered:
            self.ready.append(outcome)
        else:
            self.early[outcome.index] = outcome
            following = self.handed_over + len(self.ready)
            while (next_one := self.early.pop(following, None)) is not None:
                self.ready.append(next_one)
                following += 1
        if self.ready:
            wake_next(self.consumers)

    def stop(self, failure: Exception | None) -> None:
        """Pull no more items. Finish those in flight, then raise `failure` to the consumer."""
        self.exhausted = True
        if self.failure is None:
            self.failure = failure
        while self.parked:
            wake_next(self.parked)

    async def take(self) -> Outcome[Item, A]:
        while not self.ready:
            if not self.workers:
                if self.early:  # cut off, but the outcomes after the gap were paid for
                    self.ready.extend(self.early.pop(index) for index in sorted(self.early))
                    break
                if (failure := self.failure) is not None:
                    self.failure = None
                    if isinstance(failure, BudgetReachedError) and self.spending is not None:
                        failure = self.spending.build_error(failure.feature)  # the final figures
                    raise failure
                raise StopAsyncIteration
            woken = asyncio.get_running_loop().create_future()
            self.consumers.append(woken)
            try:
                await woken
            except asyncio.CancelledError:
                if not woken.cancelled():
                    wake_next(self.consumers)  # another consumer takes this one's turn
                elif woken in self.consumers:
                    self.consumers.remove(woken)
                raise
        outcome = self.ready.popleft()
        self.handed_over += 1
        if self.parked:
            wake_next(self.parked)
        if self.ready and self.consumers:
            wake_next(self.consumers)
        return outcome

    def cancel(self) -> None:
        if self.workers or not self.exhausted:
            self.exhausted = True
            if (
                self.failure is None
            ):  # a consumer that still iterates must not take this for the end
                self.failure = BulkStoppedError(
                    "The stream was closed, or its session was, before every item had its "
                    "outcome. Of the items without one, some may have been sent."
                )
        self.stop(None)
        self.stops.halt()  # submissions in flight are finished, but not repeated
        for worker in self.workers:
            worker.cancel()


class OutcomeStream(NotPicklable, Closable, Generic[Item_co, A_co]):
    """The outcomes of `AnalyzeSession.map`: an async iterator and async context manager.

    Iterate it inside ``async with``. Leaving the block cancels the calls in flight and waits until
    they have ended. A stream that is dropped half-way cancels them too, but does not wait.
    Cancelling an iteration loses no outcome. Several tasks can iterate one stream; each outcome
    goes to one of them.

    Not created directly: `AnalyzeSession.map` returns one, and raises its errors.
    """

    def __init__(
        self,
        items: Iterable[Item_co] | AsyncIterable[Item_co],
        to_request: Callable[[Item_co], AnalyzeRequest[A_co]] | None,
        perform: Perform[Item_co, A_co],
        *,
        settings: Settings,
        clock: Clock,
        window: int,
        ordered: bool,
        name: Callable[[Item_co], str] | None = None,
        open: Callable[[], Awaitable[None]] | None = None,  # noqa: A002 -- a ledger's
        budget: Budget | None = None,
    ) -> None:
        source: Iterator[Item_co] | AsyncIterator[Item_co]
        asynchronous = isinstance(items, AsyncIterable)
        if isinstance(items, AsyncIterable):
            source = aiter(items)
        elif _is_iterable_of_items(items):
            source = iter(items)
        else:
            raise InvalidRequestError(
                f"map() takes an iterable or async iterable of items, not {type(items).__name__}. "
                "Pass a list, a generator, the values of a mapping, or the rows of a table."
            )
        if to_request is not None and not callable(to_request):
            raise ConfigurationError(
                "`to_request` must be a request class such as Captioning, or a function that "
                f"builds a request from an item; not {to_request!r:.80}."
            )
        if name is not None and not callable(name):
            raise ConfigurationError(f"`key` must be a function of one item, not {name!r:.80}.")
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise ConfigurationError(f"The window must be a whole number from 1, not {window!r}.")
        spending = None
        if budget is not None:
            from cloudinary_analyze._budget import Budget, Spending

            if not isinstance(budget, Budget):
                raise ConfigurationError(f"`budget` must be a Budget, not {budget!r:.80}.")
            spending = Spending(budget)
        self._pump = _Pump(
            source,
            asynchronous,
            to_request,
            name,
            open,
            perform,
            settings,
            clock,
            window,
            ordered,
            spending,
        )
        self._started = False
        # a stage before this one would otherwise stay open until it is collected
        self._stage = source if isinstance(source, AsyncGenerator | OutcomeStream) else None

    @property
    def spent(self) -> Spent | None:
        """What was spent so far. ``None`` if the stream has no budget."""
        spending = self._pump.spending
        return None if spending is None else spending.spent

    def stop(self) -> None:
        """Send nothing more, and end once everything in flight has its outcome. Idempotent.

        Attempts in flight are finished and not repeated: an item whose attempt fails, or that
        waits for its next attempt, is `Failed` with its last error. Items that were pulled but not
        sent are `Failed` with `BulkStoppedError`. Pulling an item that the input is about to yield
        is not interrupted.
        """
        self._pump.stops.halt()
        self._pump.stop(None)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Outcome[Item_co, A_co]:
        """Return the next outcome. Cancelling is safe: the outcome stays for the next call.

        Raises:
            BudgetReachedError: A limit of the budget was reached.
            BulkStoppedError: An error stopped the stream. The outcomes of everything in flight were
                returned before.
            LedgerError: The ledger could not be opened. Nothing was pulled or sent.
            StopAsyncIteration: Every item has had its outcome.
            Exception: The error of the input, after the outcomes of everything in flight.
        """
        if not self._started:
            self._started = True
            self._pump.start()
        return await self._pump.take()

    async def aclose(self) -> None:
        """Cancel the calls in flight and wait until they have ended. Idempotent.

        Then closes the input, if it is an async generator or another stream. A cancelled close
        still cancels the calls, but neither waits for them nor closes the input.
        """
        self._started = True
        self._pump.cancel()
        if self._pump.workers:
            await asyncio.wait(self._pump.workers)
        stage, self._stage = self._stage, None
        if stage is not None:
            cancelling = count_cancellations()
            try:
                await stage.aclose()
            except asyncio.CancelledError as error:
                if count_cancellations() > cancelling:
                    raise
                raise wrap_cancellation("the input of the stream", error) from error

    if not TYPE_CHECKING:  # type checkers report the mistake because these are absent

        def __iter__(self) -> Never:
            raise TypeError("An OutcomeStream is asynchronous. Use `async for`, not `for`.")

        def __enter__(self) -> Never:
            raise TypeError("An OutcomeStream is asynchronous. Use `async with`, not `with`.")

        def __exit__(self, *_: object) -> None: ...

        def __await__(self) -> Never:
            raise TypeError(
                "An OutcomeStream cannot be awaited. Iterate it with `async for`; to get a list, "
                "`await session.analyze_all(requests)`."
            )

    def __del__(self) -> None:
        pump = getattr(self, "_pump", None)
        if pump is not None and pump.workers:
            loop = next(iter(pump.workers)).get_loop()
            if not loop.is_closed():
                loop.call_soon_threadsafe(pump.cancel)


def _is_iterable_of_items(items: object) -> bool:
    """Whether iterating a value yields items rather than characters, keys or columns."""
    if isinstance(items, str | bytes | bytearray | memoryview | Mapping):
        return False
    return isinstance(items, Iterable) and type(items).__name__ not in _TABLES
