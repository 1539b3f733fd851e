"""Send the items of a stream to the service: as calls or tasks, unless a budget or a stop forbids it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import attrs

from cloudinary_analyze._cancellation import Sections
from cloudinary_analyze._clock import Clock
from cloudinary_analyze._policy import Stop
from cloudinary_analyze._tasks.handle import AnalysisTask, follow
from cloudinary_analyze._tasks.tracker import Tracker
from cloudinary_analyze._wire.protocol import Accepted
from cloudinary_analyze.errors import BulkStoppedError, ForeignCancellationError, LedgerError
from cloudinary_analyze.requests import AnalyzeRequest
from cloudinary_analyze.responses import Response

if TYPE_CHECKING:
    from cloudinary_analyze._budget import Spending

Item = TypeVar("Item")
A = TypeVar("A")


def wrap_cancellation(culprit: str, error: asyncio.CancelledError) -> ForeignCancellationError:
    """Return the error for a `CancelledError` that is not a cancellation of the running task."""
    wrapped = ForeignCancellationError(
        f"CancelledError was raised by {culprit}, but nothing cancelled the stream."
    )
    wrapped.__cause__ = error
    return wrapped


@attrs.define(eq=False, repr=False)
class Stops:
    """The requests that are no longer sent, because the service would refuse them.

    Attributes:
        seen: The models of all requests so far, and their features.
        reasons: The kinds of requests that are refused, each with the error that showed it.
        unsent: Items in a row that were not sent for that reason.
        halted: Whether the caller stopped or closed the stream.
        waits: The waits of its calls between their attempts.
    """

    seen: dict[str, str | None] = attrs.field(factory=dict)
    reasons: dict[tuple[Stop, str], Exception] = attrs.field(factory=dict)
    unsent: int = 0
    halted: bool = False
    waits: Sections = attrs.field(factory=Sections)

    def halt(self) -> None:
        """Send nothing more: no request that queues, and no further attempt of any."""
        self.halted = True
        self.waits.interrupt_all()

    def check_halted(self) -> None:
        """Raise if nothing more is sent.

        Raises:
            BulkStoppedError: Nothing more is sent.
        """
        if self.halted:
            raise BulkStoppedError("Not sent, because the stream was stopped.")

    def check(self, request: AnalyzeRequest[Any]) -> None:
        """Raise if a request would be refused; called before it queues and is first sent.

        Raises:
            BulkStoppedError: Its kind is stopped. Nothing was sent.
        """
        self.check_halted()
        if not self.reasons:
            return
        reason = self.find(request.model, request.feature)
        if reason is None:
            self.unsent = 0
        else:
            self.unsent += 1
            raise BulkStoppedError(
                f"Not sent, because it would fail with an earlier error: {reason}", reason=reason
            ) from reason

    def find(self, model: str, feature: str | None) -> Exception | None:
        """Return why a kind of request is stopped. ``None`` if it is not."""
        reasons = self.reasons
        return (
            reasons.get((Stop.EVERYTHING, ""))
            or reasons.get((Stop.MODEL, model))
            or reasons.get((Stop.FEATURE, feature or ""))
        )

    def add(self, stop: Stop, request: AnalyzeRequest[Any], error: Exception) -> bool:
        """Stop a kind of request. Return whether every request so far was of this kind."""
        name = ""
        if stop is not Stop.EVERYTHING:
            feature = request.feature if stop is Stop.FEATURE else None
            stop, name = (Stop.FEATURE, feature) if feature else (Stop.MODEL, request.model)
        self.reasons.setdefault((stop, name), error)
        return all(self.find(model, feature) for model, feature in self.seen.items())


@attrs.define(eq=False, repr=False)
class Work(Generic[Item, A]):
    """One item of a stream, from its pull to its outcome.

    The code that performs it calls `check` and `reserve` before the request queues, and `start` before
    each attempt. The stream settles it.

    Attributes:
        item: The item.
        index: Its position in the input.
        clock: The clock for its times.
        begun: Monotonic instant of the pull.
        request: The request; set before it is performed.
        name: Its name in the ledger. ``None``: its source is used.
        started: Monotonic instant when its first attempt could start.
        restored: Whether its response or error was read from the ledger.
        recorded_seconds: The recorded duration of its attempts.
        unsent: Whether it was not sent because its kind of request is stopped.
        reserved: Whether the cost of its request is reserved.
        claim: See `Owner`; set by a stream with a ledger.
        unrecorded: Why the ledger could not record its response or error.
    """

    item: Item
    index: int
    clock: Clock
    _stops: Stops
    begun: float
    _spending: Spending | None
    _stop: Callable[[Work[Any, Any], LedgerError], None]
    request: AnalyzeRequest[A] = attrs.field(init=False)
    name: str | None = attrs.field(default=None, init=False)
    started: float | None = attrs.field(default=None, init=False)
    restored: bool = attrs.field(default=False, init=False)
    recorded_seconds: float = attrs.field(default=0.0, init=False)
    unsent: bool = attrs.field(default=False, init=False)
    reserved: bool = attrs.field(default=False, init=False)
    claim: Callable[[], Coroutine[Any, Any, None]] | None = attrs.field(default=None, init=False)
    unrecorded: LedgerError | None = attrs.field(default=None, init=False)

    @property
    def _feature(self) -> str:
        return self.request.feature or self.request.model

    def check(self) -> None:
        """Raise if the request would be refused for a known reason.

        Raises:
            BulkStoppedError: It would be refused. Nothing was sent.
        """
        try:
            self._stops.check(self.request)
        except BulkStoppedError:
            self.unsent = True
            raise

    @property
    def halted(self) -> bool:
        """Whether nothing more is sent for the item."""
        return self._stops.halted

    @property
    def waits(self) -> Sections:
        """See `Stops`."""
        return self._stops.waits

    def lose_record(self, error: LedgerError) -> None:
        """Stop the stream, because the ledger could not record the result of the request."""
        self.unrecorded = error
        self._stop(self, error)

    async def reserve(self) -> None:
        """Reserve the cost of the request in the stream's budget, unless it is already reserved.

        Raises:
            BudgetReachedError: It does not fit. Nothing was sent.
        """
        if self._spending is not None and not self.reserved:
            await self._spending.reserve(self._feature)
            self.reserved = True

    async def reserve_again(self) -> None:
        """Reserve the cost of repeating a request that was already charged once.

        Raises:
            BudgetReachedError: It does not fit.
            BulkStoppedError: Nothing more is sent.
        """
        self._stops.check_halted()
        self.settle(charged=True)
        await self.reserve()

    def settle(self, response: Response[A] | None = None, *, charged: bool) -> None:
        """Replace the reservation, if there is one, with the cost of the request."""
        if self._spending is not None and self.reserved:
            self.reserved = False
            limits = None if response is None else response.limits
            self._spending.settle(self._feature, limits, charged=charged)

    def start(self) -> None:
        """Note that an attempt is about to start.

        Raises:
            BulkStoppedError: See `check`. Only `halted` stops an attempt that is not the first.
        """
        if self.started is None:
            self.check()
            self.started = self.clock.monotonic()
        else:
            self._stops.check_halted()

    def report(self) -> dict[str, Any]:
        """Return the fields that both kinds of outcome have."""
        seconds, queued = self.measure()
        return {
            "item": self.item,
            "index": self.index,
            "restored": self.restored,
            "unrecorded": self.unrecorded is not None,
            "seconds": seconds,
            "queued": queued,
        }

    def measure(self) -> tuple[float, float]:
        """Return the seconds of its attempts until now, and the seconds that it queued before."""
        now = self.clock.monotonic()
        if self.restored:
            return self.recorded_seconds, now - self.begun
        if self.started is None:
            return 0.0, now - self.begun
        started = max(self.started, self.begun)  # a shared request may have started earlier
        return now - started, started - self.begun


@attrs.define(eq=False, repr=False, kw_only=True)
class Sender:
    """Sends the requests of one stream.

    Attributes:
        as_tasks: Whether requests are submitted as tasks, or made as calls.
        tracker: Sends the requests, and resolves tasks.
    """

    as_tasks: bool
    tracker: Tracker

    async def perform(self, work: Work[Item, A]) -> Response[A]:
        """Send the request of an item and return the response.

        Raises:
            AnalyzeError: As the call or the task raises.
        """
        work.check()
        await work.reserve()
        if self.as_tasks:
            return await follow(self.submit(work))
        return await self.call(work)

    async def call(
        self, work: Work[Item, A], *, on_accepted: Callable[[str], Awaitable[None]] | None = None
    ) -> Response[A]:
        """Make a call, and follow the task if the service turns it into one."""
        answer = await self.tracker.caller.analyze(
            work.request,
            deadline=self._build_deadline(self.tracker.settings.call_timeout),
            owner=work,
        )
        if not isinstance(answer, Accepted):
            return answer
        task = self.attach(answer.task_id, work, just_accepted=True)
        return await follow(task, on_accepted=on_accepted)

    def submit(self, work: Work[Item, A]) -> AnalysisTask[A]:
        """Submit the request of an item as a task."""
        return self.tracker.submit(
            work.request,
            as_task=True,
            deadline=self._build_deadline(self.tracker.settings.task_timeout),
            owner=work,
        )

    def attach(
        self, task_id: str, work: Work[Item, A], *, just_accepted: bool = False
    ) -> AnalysisTask[A]:
        """Return a handle on an accepted task."""
        return self.tracker.attach(
            task_id,
            work.request,
            just_accepted=just_accepted,
            trusted=True,
            deadline=self._build_deadline(self.tracker.settings.task_timeout),
            owner=work,
        )

    def _build_deadline(self, seconds: float | None) -> float | None:
        return None if seconds is None else self.tracker.clock.monotonic() + seconds
