"""The queue in front of `Admission`: starts waiting attempts when they may start.

Calls have one queue and status polls another. An attempt that was started ends in one of two ways:
`release` after it was sent and its result reported, or `withdraw` if it was not sent. The report
comes before the release; otherwise two probes could be in flight.

Order: urgent attempts (`analyze`, `submit`) start before the others (`map`), but after
`URGENT_IN_A_ROW` of them one of the others starts. Within each kind, attempts with `first` start
first. The rest start in the order of arrival.

Each waiter is in exactly one of these states:

    WAITING   in its line                      -> STARTED, FAILED, or cancelled (removed)
    STARTED   its attempt counts, but its task -> ends; if the queue stalled or closed meanwhile,
              has not run yet                     its attempt is withdrawn, and it waits or raises
    FAILED    the queue closed or refuses, or  -> raises
              its patience is over
"""

from __future__ import annotations

import asyncio
import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator
from copy import copy
from itertools import chain, count
from math import inf
from typing import Final

import attrs

from cloudinary_analyze._clock import Clock, TimerHandle, wake
from cloudinary_analyze._http.admission import Admission, Attempt
from cloudinary_analyze.errors import OutageError

# While both kinds wait, urgent attempts get three of four starts. Bulk work still moves on if
# interactive calls could use every start.
URGENT_IN_A_ROW: Final = 3
# Waiters that fail in one turn of the loop. Each of them then runs its task.
FAILURES_IN_A_TURN: Final = 100

BuildError = Callable[[float], Exception]


Waiter = asyncio.Future[Attempt]
# The earliest start of each waiter's patience, and the seconds of a stall that it lasts.
# Waiters are in their line until they start or fail.
Waiters = OrderedDict[Waiter, tuple[float, float]]
Lines = tuple[tuple[Waiters, Waiters], tuple[Waiters, Waiters]]


def _build_lines() -> Lines:
    return (OrderedDict(), OrderedDict()), (OrderedDict(), OrderedDict())


@attrs.define(eq=False)
class AdmissionQueue:
    """Starts attempts in order, as `Admission` allows.

    Each operation takes constant time, and logarithmic time during a stall.

    Attributes:
        admission: Decides when attempts start.
        clock: The source of time.
        waiting: Attempts that wait.
        newest_success: The highest number of an attempt that succeeded.
    """

    admission: Admission
    clock: Clock
    newest_success: int = attrs.field(default=0, init=False)
    # the waiters by whether they are urgent, and whether they start first, in order of arrival
    _lines: Lines = attrs.field(factory=_build_lines, init=False)
    waiting: int = attrs.field(default=0, init=False)
    _in_a_row: int = attrs.field(default=0, init=False)
    _timer: TimerHandle | None = attrs.field(default=None, init=False)
    _timer_at: float = attrs.field(default=inf, init=False)
    # during a stall: when the patience of each waiter ends; may hold waiters that have left
    _expiries: list[tuple[float, int, Waiters, Waiter]] = attrs.field(factory=list, init=False)
    _expiries_of: int | None = attrs.field(default=None, init=False)  # the stall's generation
    _order: Iterator[int] = attrs.field(factory=count, init=False)
    _open: bool = attrs.field(default=True, init=False)
    _refused_until: float = attrs.field(default=-inf, init=False)  # infinity: closed
    _build_refusal: BuildError | None = attrs.field(default=None, init=False)
    _emptied: asyncio.Future[None] | None = attrs.field(default=None, init=False)

    def start_at_once(self) -> Attempt | None:
        """Start an attempt if nothing limits starts. The fast path: no coroutine, no queue."""
        admission = self.admission
        if (
            admission.calm
            and admission.in_use < admission.permits
            and not self.waiting
            and self._open
        ):
            return admission.start(self.clock.monotonic())
        return None

    async def start(
        self,
        *,
        urgent: bool = False,
        first: bool = False,
        since: float | None = None,
        patience: float = inf,
    ) -> Attempt:
        """Wait until an attempt may start, and start it. Cancelling leaves the queue as it was.

        Args:
            urgent: Whether it is interactive.
            first: Whether it starts before the others of its kind.
            since: When its patience began; default: now. In a later stall: when that begins.
            patience: Seconds of a stall after which the wait fails, besides what the service asked
                for before.

        Raises:
            Exception: The queue is closed, the service refuses calls for a known time, or the
                patience is over. Nothing was sent.
        """
        since = self.clock.monotonic() if since is None else since
        admission = self.admission
        while True:
            if not self._open:
                self._check_open()
            line = self._lines[urgent][first]
            waiter: Waiter = asyncio.Future()  # faster than the loop's `create_future`
            line[waiter] = since, patience
            self.waiting += 1
            if not admission.calm or admission.in_use < admission.permits:
                if self._expiries_of is not None:
                    self._push_expiry(line, waiter)
                self._start_waiters()
            try:
                attempt = await waiter
            except BaseException:
                self._abandon(line, waiter)
                raise
            if self._open and attempt.generation == admission.generation:
                return attempt  # `is_current`, without a call
            # The queue stalled or closed between the start and now.
            self.withdraw(attempt)
            first = True

    def is_current(self, attempt: Attempt) -> bool:
        """Return whether a started attempt may still be sent."""
        return self._open and attempt.generation == self.admission.generation

    def succeed(self, attempt: Attempt) -> None:
        """Report that the service processed the request, whatever its response."""
        if attempt.number > self.newest_success:  # noqa: PLR1730  # `max` takes twice the time
            self.newest_success = attempt.number
        if not self.admission.calm:
            self.admission.succeed(attempt, self.clock.monotonic())

    def throttle(self, attempt: Attempt, retry_after: float = 0.0, *, stall: bool = False) -> None:
        """Report that the service refused the request for now.

        Args:
            attempt: The attempt.
            retry_after: Seconds that the service asked for.
            stall: Whether all attempts of the queue wait that long.
        """
        now = self.clock.monotonic()
        self.admission.throttle(attempt, now, retry_after)
        if stall:
            self.admission.pause(now, retry_after)

    def fail(self, attempt: Attempt) -> None:
        """Report that the service or the connection failed."""
        self.admission.fail(attempt, self.clock.monotonic())

    def release(self, attempt: Attempt) -> None:
        """End an attempt, after its report. Without a report, its result is unknown."""
        admission = self.admission
        if admission.calm and self._open:  # the fast path: only the permits limit starts
            admission.in_use -= 1
            while self.waiting and admission.in_use < admission.permits:
                self._start_next(self.clock.monotonic())
            return
        admission.release(attempt)
        self._go_on()

    def withdraw(self, attempt: Attempt) -> None:
        """End an attempt that was not sent. It does not count in what is learned."""
        self.admission.withdraw(attempt)
        self._go_on()

    def refuse(self, until: float, build_error: BuildError) -> None:
        """Fail everything that waits, over some turns of the loop, and all starts until a time.

        Args:
            until: The monotonic time.
            build_error: Builds the error from the seconds that are left.
        """
        if until <= self._refused_until:
            return
        self._refused_until, self._build_refusal, self._open = until, build_error, False
        left = until - self.clock.monotonic()
        self._fail_waiters(lambda: build_error(left))

    def close(self, error: Exception) -> None:
        """Fail everything that waits, over some turns of the loop, and all later starts."""
        if self._timer is not None:
            self._timer.cancel()
        self.refuse(inf, lambda _: copy(error))  # one each: they collect tracebacks

    async def wait_empty(self) -> None:
        """Wait until nothing waits or is in flight. For one waiter, after `close`."""
        if self.waiting or self.admission.in_use:
            self._emptied = asyncio.get_running_loop().create_future()
            await self._emptied

    def _check_open(self) -> None:
        """Raise if starts are refused now."""
        left = self._refused_until - self.clock.monotonic()
        if left > 0 and self._build_refusal is not None:
            raise self._build_refusal(left)
        self._open, self._build_refusal = True, None

    def _abandon(self, line: Waiters, waiter: Waiter) -> None:
        if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
            self.withdraw(waiter.result())
        elif waiter in line:
            self._remove(line, waiter)

    def _remove(self, line: Waiters, waiter: Waiter) -> None:
        del line[waiter]
        self.waiting -= 1

    def _go_on(self) -> None:
        if self.waiting:
            if self._open:  # otherwise they are about to fail
                self._start_waiters()
        elif self._emptied is not None and not self.admission.in_use:
            wake(self._emptied)

    def _start_waiters(self) -> None:
        """Start what may start now, fail what waited too long, and set the timer for the rest."""
        now = self.clock.monotonic()
        due = inf
        while self.waiting:
            due = self.admission.find_start(now)
            if due > now:
                break
            self._start_next(now)
        if self.admission.stalled_at is not None:
            due = min(due, self._expire(self.admission.stalled_at, now))
        elif self._expiries_of is not None:
            self._expiries_of = None
            self._expiries.clear()
        if self.waiting and due < self._timer_at:
            self._set_timer(due)

    def _start_next(self, now: float) -> None:
        """Start the next waiter."""
        (rest, rest_first), (urgent, urgent_first) = self._lines
        urgent, line = urgent_first or urgent, rest_first or rest
        if urgent and (self._in_a_row < URGENT_IN_A_ROW or not line):
            self._in_a_row += 1
            line = urgent
        else:
            self._in_a_row = 0
        waiter, _ = line.popitem(last=False)
        self.waiting -= 1
        if not waiter.done():  # otherwise its task was cancelled, but has not run yet
            waiter.set_result(self.admission.start(now))

    def _list_lines(self) -> Iterator[Waiters]:
        """Return the lines in the order of their starts."""
        rest, urgent = self._lines
        return chain(reversed(urgent), reversed(rest))

    def _expire(self, stalled_at: float, now: float) -> float:
        """Fail the waiters whose patience is over. Return when the next one's is."""
        if self._expiries_of != self.admission.generation:
            self._expiries_of = self.admission.generation
            self._expiries.clear()
            for line in self._list_lines():
                for waiter in line:
                    self._push_expiry(line, waiter)
        while self._expiries:
            at, _, line, waiter = self._expiries[0]
            if not waiter.done():
                if at > now:
                    return at
                self._remove(line, waiter)
                waiter.set_exception(_build_outage_error(now - stalled_at))
            heapq.heappop(self._expiries)
        return inf

    def _push_expiry(self, line: Waiters, waiter: Waiter) -> None:
        stalled_at = self.admission.stalled_at
        since, patience = line[waiter]
        if stalled_at is not None and patience < inf:
            at = max(since, stalled_at, self.admission.asked_until) + patience
            heapq.heappush(self._expiries, (at, next(self._order), line, waiter))

    def _fail_waiters(self, build: Callable[[], Exception]) -> None:
        """Fail waiters while starts are refused, urgent ones first, over some turns of the loop."""
        failures = 0
        for line in self._list_lines():
            while line and not self._open:
                if failures == FAILURES_IN_A_TURN:
                    asyncio.get_running_loop().call_soon(self._fail_waiters, build)
                    return
                failures += 1
                waiter = next(iter(line))
                self._remove(line, waiter)
                if not waiter.done():
                    waiter.set_exception(build())
        self._go_on()

    def _set_timer(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = self.clock.call_at(at, self._wake)

    def _wake(self) -> None:
        self._timer, self._timer_at = None, inf
        self._start_waiters()


def _build_outage_error(seconds: float) -> OutageError:
    return OutageError(
        f"The service has failed or refused every request for {seconds:.0f} s. Nothing more was "
        "sent for this request. Run again later; with a ledger, only what is missing is sent.",
        seconds=seconds,
    )
