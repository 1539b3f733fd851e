"""The windowed stream: bounded concurrency and memory over any input, an outcome per item.

Workers pull items themselves, so there is no task per item and nothing is pulled that has no
place in the window. The window counts every item between its pull and its outcome's hand-over,
so a slow consumer slows the input down.
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
)
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import attrs

from cloudinary_analyze._clock import Clock
from cloudinary_analyze._policy import stops_the_stream
from cloudinary_analyze._recording import Recording
from cloudinary_analyze.config import Settings
from cloudinary_analyze.errors import (
    BulkStoppedError,
    ConfigurationError,
    InvalidRequestError,
)
from cloudinary_analyze.outcomes import Answered, Failed, Outcome
from cloudinary_analyze.requests import AnalyzeRequest
from cloudinary_analyze.responses import Response

Item = TypeVar("Item")
A = TypeVar("A")
Item_co = TypeVar("Item_co", covariant=True)
A_co = TypeVar("A_co", covariant=True)

Perform = Callable[[AnalyzeRequest[A]], Awaitable[Response[A]]]


@attrs.define(eq=False, repr=False)
class _Pump(Generic[Item, A]):
    """The working part of a stream. Holds no reference to it, so a dropped stream can stop it."""

    source: Iterator[Item] | AsyncIterator[Item]
    to_request: Callable[[Item], AnalyzeRequest[A]] | None
    perform: Perform[A]
    settings: Settings
    clock: Clock
    window: int
    ordered: bool
    recording: Recording[Item] | None = None
    ready: deque[Outcome[Item, A]] = attrs.field(factory=deque)
    early: dict[int, Outcome[Item, A]] = attrs.field(factory=dict)
    pulled: int = 0
    handed_over: int = 0
    exhausted: bool = False
    failure: Exception | None = None
    workers: set[asyncio.Task[None]] = attrs.field(factory=set)
    consumers: deque[asyncio.Future[None]] = attrs.field(factory=deque)
    parked: deque[asyncio.Future[None]] = attrs.field(factory=deque)
    pulling: asyncio.Lock = attrs.field(factory=asyncio.Lock)

    def start(self) -> None:
        worker = asyncio.create_task(self._work())
        self.workers.add(worker)
        worker.add_done_callback(self._end)

    def _end(self, worker: asyncio.Task[None]) -> None:
        self.workers.discard(worker)
        if not worker.cancelled() and (error := worker.exception()) is not None:
            # only what is no Exception (KeyboardInterrupt, SystemExit) comes here
            self.stop(BulkStoppedError(f"The stream broke: {error!r}."))
        if not self.workers:
            self._wake(self.consumers, everybody=True)

    async def _work(self) -> None:
        if self.recording is not None and not self.pulled:
            try:
                await self.recording.open()
            except Exception as error:
                self.stop(error)
        asynchronous = isinstance(self.source, AsyncIterator)
        while not self.exhausted:
            if self.pulled - self.handed_over >= self.window:
                place = asyncio.get_running_loop().create_future()
                self.parked.append(place)
                await place
                continue
            if asynchronous:
                async with self.pulling:
                    if self.exhausted or self.pulled - self.handed_over >= self.window:
                        continue
                    pulled = await self._pull_async()
            else:
                pulled = self._pull()
            if pulled is not None:
                if len(self.workers) < self.window and not self.exhausted:
                    self.start()  # one more, as long as there is something to pull
                await self._answer(*pulled)

    def _pull(self) -> tuple[int, Item] | None:
        try:
            item = next(self.source)  # type: ignore[arg-type]
        except StopIteration:
            self.stop(None)
        except Exception as error:
            self.stop(error)
        else:
            self.pulled += 1
            return self.pulled - 1, item
        return None

    async def _pull_async(self) -> tuple[int, Item] | None:
        try:
            item = await anext(self.source)  # type: ignore[arg-type]
        except StopAsyncIteration:
            self.stop(None)
        except Exception as error:
            self.stop(error)
        else:
            self.pulled += 1
            return self.pulled - 1, item
        return None

    async def _answer(self, index: int, item: Item) -> None:
        request: AnalyzeRequest[A] | None = None
        outcome: Outcome[Item, A]
        begun = self.clock.monotonic()
        try:
            request = self._build_request(item)
            if self.recording is None:
                response = await self.perform(request)
            else:
                response = await self.recording.perform(item, request)
        except Exception as error:
            seconds = self.clock.monotonic() - begun
            outcome = Failed(item=item, index=index, request=request, error=error, seconds=seconds)
            if stops_the_stream(error, self.settings):
                self._stop_for(error)
        else:
            seconds = self.clock.monotonic() - begun
            outcome = Answered(
                item=item, index=index, request=request, response=response, seconds=seconds
            )
        self._keep(outcome)

    def _build_request(self, item: Item) -> AnalyzeRequest[A]:
        request: Any = item if self.to_request is None else self.to_request(item)
        if not isinstance(request, AnalyzeRequest):
            raise InvalidRequestError(
                f"{type(request).__name__} is no request. Pass requests, or a `to_request` that "
                "builds one from each item: session.map(urls, Captioning)."
            )
        return request

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
            self._wake(self.consumers)

    def _stop_for(self, error: Exception) -> None:
        stopped = BulkStoppedError(
            f"The stream stopped, because every further item would fail alike: {error} "
            "Items that were not sent yet stay unsent.",
            reason=error,
        )
        stopped.__cause__ = error
        self.stop(stopped)

    def stop(self, failure: Exception | None) -> None:
        """Pull no more. What is in flight is finished and handed over, then `failure` raised."""
        self.exhausted = True
        if self.failure is None:
            self.failure = failure
        self._wake(self.parked, everybody=True)

    async def take(self) -> Outcome[Item, A]:
        while not self.ready:
            if not self.workers:
                if self.early:  # the stream was cut off, and what is behind the gap is paid for
                    self.ready.extend(self.early.pop(index) for index in sorted(self.early))
                    break
                if (failure := self.failure) is not None:
                    self.failure = None
                    raise failure
                raise StopAsyncIteration
            woken = asyncio.get_running_loop().create_future()
            self.consumers.append(woken)
            try:
                await woken
            except asyncio.CancelledError:
                if woken.done() and not woken.cancelled():
                    self._wake(self.consumers)  # pass the turn on
                raise
        outcome = self.ready.popleft()
        self.handed_over += 1
        if self.parked:
            self._wake(self.parked)
        if self.ready and self.consumers:
            self._wake(self.consumers)
        return outcome

    @staticmethod
    def _wake(sleepers: deque[asyncio.Future[None]], *, everybody: bool = False) -> None:
        while sleepers:
            sleeper = sleepers.popleft()
            if not sleeper.done():
                sleeper.set_result(None)
                if not everybody:
                    return

    def cancel(self) -> None:
        if self.workers or not self.exhausted:
            self.exhausted = True
            if self.failure is None:  # whoever still iterates must not take this for the end
                self.failure = BulkStoppedError(
                    "The stream was closed, or its session was, before every item had its "
                    "outcome. Of the items without one, some may have been sent."
                )
        self.stop(None)
        for worker in self.workers:
            worker.cancel()


class OutcomeStream(Generic[Item_co, A_co]):
    """The outcomes of `AnalyzeSession.map`: an async iterator and async context manager.

    Iterate it, best inside of ``async with``: leaving that cancels the calls in flight and waits
    until they are gone. A stream that is dropped half-way cancels them too, but does not wait.
    Cancelling an iteration loses no outcome. Several tasks may iterate one stream; each outcome
    goes to one of them.
    """

    def __init__(
        self,
        items: Iterable[Item_co] | AsyncIterable[Item_co],
        to_request: Callable[[Item_co], AnalyzeRequest[A_co]] | None,
        perform: Perform[A_co],
        *,
        settings: Settings,
        clock: Clock,
        window: int,
        ordered: bool,
        recording: Recording[Item_co] | None = None,
    ) -> None:
        source: Iterator[Item_co] | AsyncIterator[Item_co]
        if isinstance(items, AsyncIterable):
            source = aiter(items)
        elif isinstance(items, Iterable) and not isinstance(items, str | bytes):
            source = iter(items)
        else:
            raise InvalidRequestError(
                f"map() takes an iterable or async iterable of items, not {type(items).__name__}."
            )
        if to_request is not None and not callable(to_request):
            raise ConfigurationError(
                f"`to_request` makes a request of an item: Captioning, or a function; not "
                f"{to_request!r:.80}."
            )
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise ConfigurationError(f"The window must be a whole number from 1, not {window!r}.")
        self._pump = _Pump(source, to_request, perform, settings, clock, window, ordered, recording)
        self._started = False
        # a stage before this one would else stay open until it is collected
        self._stage = source if isinstance(source, AsyncGenerator | OutcomeStream) else None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Outcome[Item_co, A_co]:
        """Return the next outcome.

        Raises:
            BulkStoppedError: An error stopped the stream; all that was in flight was handed over.
            LedgerError: The ledger could not be opened; nothing was pulled or sent.
            StopAsyncIteration: All items have had their outcome.
            Exception: What the input raised, after all that was in flight was handed over.
        """
        if not self._started:
            self._started = True
            self._pump.start()
        return await self._pump.take()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancel what is in flight and wait until it is gone. Idempotent.

        Closes the input too, if that is an async generator or another stream.
        """
        self._started = True
        self._pump.cancel()
        if self._pump.workers:
            await asyncio.wait(self._pump.workers)
        stage, self._stage = self._stage, None
        if stage is not None:
            await stage.aclose()

    def __del__(self) -> None:
        pump = getattr(self, "_pump", None)
        if pump is not None and pump.workers:
            loop = next(iter(pump.workers)).get_loop()
            if not loop.is_closed():
                loop.call_soon_threadsafe(pump.cancel)
