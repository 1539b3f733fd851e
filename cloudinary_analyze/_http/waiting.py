"""The queue in front of `Admission`: starts waiting attempts when they may start.

One attempt loop serves calls and polls. Each kind has a queue. The intended loop:

    # `again`: the last attempt was throttled, or was a probe. `since`: when the call first waited.
    attempt = queue.start_at_once() or await queue.start(urgent=urgent, first=again, since=since)
    probe = attempt.probe
    try:
        # A pacer or a claim is awaited here. After about a second, or if the claim is denied,
        # `queue.withdraw(attempt)` returns the slot. The call then waits without a slot and calls
        # `start(first=True)` again. After any wait, check `queue.is_current(attempt)`; if it is
        # false, withdraw the attempt and start again.
        answer = await transport.post(url, body)
        queue.succeed(attempt)                       # any response but those below, also a 400
        queue.throttle(attempt, retry_after)         # 429, 420
        queue.throttle(attempt, seconds, stall=True) # 503 with Retry-After, a throttled poll
        queue.fail(attempt)                          # other 5xx, connection errors
        queue.refuse(until, build_error)             # Retry-After over `max_server_wait`
    finally:
        queue.release(attempt)                       # after the report: else two probes could start
    # Here, without a permit, the call sleeps for its backoff or Retry-After. A failed probe that
    # is not ambiguous costs no attempt and needs no sleep, because the queue pauses anyway. An
    # ambiguous failure starts with `first=False`, which spreads possible charges over the items.

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
from collections import OrderedDict
from collections.abc import Callable
from copy import copy
from math import inf
from typing import Final

import attrs

from cloudinary_analyze._clock import Clock, TimerHandle, wake
from cloudinary_analyze._http.admission import Admission, Attempt

# While both kinds wait, urgent attempts get three of four starts. Bulk work still moves on if
# interactive calls could use every start.
URGENT_IN_A_ROW: Final = 3

BuildError = Callable[[float], Exception]


@attrs.define(eq=False)
class _Waiter:
    """A waiting attempt.

    Attributes:
        started: Receives the attempt.
        since: When its patience began.
    """

    started: asyncio.Future[Attempt]
    since: float


Waiters = OrderedDict[_Waiter, None]


@attrs.define(eq=False)
class _Line:
    """The waiters of one kind.

    Attributes:
        patience: Seconds of a stall after which a waiter fails.
        again: Those that start first, in the order of arrival.
        fresh: The others, in the order of arrival.
    """

    patience: float
    again: Waiters = attrs.field(factory=OrderedDict)
    fresh: Waiters = attrs.field(factory=OrderedDict)

    def find_first(self) -> Waiters | None:
        """Return the waiters whose first one starts next."""
        return self.again or self.fresh or None

    def find_expired(self, stalled_at: float, now: float) -> Waiters | None:
        """Return the waiters whose first one has no more patience."""
        for waiters in (self.again, self.fresh):
            if self._find_expiry(waiters, stalled_at) <= now:
                return waiters
        return None

    def find_expiry(self, stalled_at: float) -> float:
        """Return when the next waiter's patience ends, if the stall does not."""
        return min(
            self._find_expiry(self.again, stalled_at), self._find_expiry(self.fresh, stalled_at)
        )

    def _find_expiry(self, waiters: Waiters, stalled_at: float) -> float:
        for waiter in waiters:
            return max(waiter.since, stalled_at) + self.patience
        return inf


@attrs.define(eq=False)
class AdmissionQueue:
    """Starts attempts in order, as `Admission` allows. Each operation takes constant time.

    Attributes:
        admission: Decides when attempts start.
        clock: The source of time.
        patience: Seconds of a stall after which a waiting attempt fails.
        urgent_patience: The same for urgent attempts.
        build_outage_error: Builds the error of such an attempt from the seconds of the stall.
    """

    admission: Admission
    clock: Clock
    patience: float
    urgent_patience: float
    build_outage_error: BuildError
    _urgent: _Line = attrs.field(init=False)
    _others: _Line = attrs.field(init=False)
    _waiting: int = attrs.field(default=0, init=False)
    _in_a_row: int = attrs.field(default=0, init=False)
    _timer: TimerHandle | None = attrs.field(default=None, init=False)
    _timer_at: float = attrs.field(default=inf, init=False)
    _open: bool = attrs.field(default=True, init=False)  # neither closed nor refusing
    _closed: Exception | None = attrs.field(default=None, init=False)
    _refused_until: float = attrs.field(default=-inf, init=False)
    _build_refusal: BuildError | None = attrs.field(default=None, init=False)
    _emptied: asyncio.Future[None] | None = attrs.field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self._urgent = _Line(self.urgent_patience)
        self._others = _Line(self.patience)

    @property
    def waiting(self) -> int:
        """Attempts that wait."""
        return self._waiting

    def start_at_once(self) -> Attempt | None:
        """Start an attempt if nothing limits starts. The fast path: no coroutine, no queue."""
        admission = self.admission
        if (
            admission.calm
            and admission.in_use < admission.permits
            and not self._waiting
            and self._open
        ):
            return admission.start(self.clock.monotonic())
        return None

    async def start(
        self, *, urgent: bool = False, first: bool = False, since: float | None = None
    ) -> Attempt:
        """Wait until an attempt may start, and start it. Cancelling leaves the queue as it was.

        Args:
            urgent: Whether it is interactive.
            first: Whether it starts before the others of its kind.
            since: When its patience began; default: now.

        Raises:
            Exception: The queue is closed, the service refuses calls for a known time, or the
                patience is over. Nothing was sent.
        """
        line = self._urgent if urgent else self._others
        since = self.clock.monotonic() if since is None else since
        while True:
            self._check_open()
            waiter = _Waiter(asyncio.get_running_loop().create_future(), since)
            waiters = line.again if first else line.fresh
            waiters[waiter] = None
            self._waiting += 1
            self._start_waiters()
            try:
                attempt = await waiter.started
            except BaseException:
                self._abandon(waiters, waiter)
                raise
            if self.is_current(attempt):
                return attempt
            # The queue stalled or closed between the start and now.
            self.withdraw(attempt)
            first = True

    def is_current(self, attempt: Attempt) -> bool:
        """Return whether a started attempt may still be sent."""
        return self._open and (attempt.probe or attempt.generation == self.admission.generation)

    def succeed(self, attempt: Attempt) -> None:
        """Report that the service processed the request, whatever it answered."""
        if not self.admission.calm:
            self.admission.succeed(attempt, self.clock.monotonic())

    def throttle(self, attempt: Attempt, retry_after: float = 0.0, *, stall: bool = False) -> bool:
        """Report that the service refused the request for now.

        Args:
            attempt: The attempt.
            retry_after: Seconds that the service asked for.
            stall: Whether all attempts of the queue wait that long.

        Returns:
            Whether a stall began.
        """
        generation, now = self.admission.generation, self.clock.monotonic()
        self.admission.throttle(attempt, now, retry_after)
        if stall:
            self.admission.stall(now, retry_after)
        return self.admission.generation > generation

    def fail(self, attempt: Attempt) -> bool:
        """Report that the service or the connection failed. Return whether a stall began."""
        generation = self.admission.generation
        self.admission.fail(attempt, self.clock.monotonic())
        return self.admission.generation > generation

    def release(self, attempt: Attempt) -> None:
        """End an attempt, after its report. Without a report, its result is unknown."""
        admission = self.admission
        if admission.calm and not self._waiting and self._emptied is None:
            admission.in_use -= 1  # the fast path
            return
        admission.release(attempt)
        self._go_on()

    def withdraw(self, attempt: Attempt) -> None:
        """End an attempt that was not sent. It does not count in what is learned."""
        self.admission.withdraw(attempt)
        self._go_on()

    def refuse(self, until: float, build_error: BuildError) -> None:
        """Fail everything that waits, and all starts until a time.

        Args:
            until: The monotonic time.
            build_error: Builds the error from the seconds that are left.
        """
        if self._closed is not None or until <= self._refused_until:
            return
        self._refused_until, self._build_refusal, self._open = until, build_error, False
        left = until - self.clock.monotonic()
        self._fail_waiters(lambda: build_error(left))

    def close(self, error: Exception) -> None:
        """Fail everything that waits, and all later starts."""
        self._closed, self._open = error, False
        if self._timer is not None:
            self._timer.cancel()
        self._fail_waiters(lambda: copy(error))  # one each: they collect tracebacks

    async def wait_empty(self) -> None:
        """Wait until nothing is in flight. For one waiter, after `close`."""
        if self.admission.in_use:
            self._emptied = asyncio.get_running_loop().create_future()
            await self._emptied

    def _check_open(self) -> None:
        if self._open:
            return
        if self._closed is not None:
            raise copy(self._closed)
        left = self._refused_until - self.clock.monotonic()
        if left > 0 and self._build_refusal is not None:
            raise self._build_refusal(left)
        self._open, self._build_refusal = True, None

    def _abandon(self, waiters: Waiters, waiter: _Waiter) -> None:
        started = waiter.started
        if started.done() and not started.cancelled() and started.exception() is None:
            self.withdraw(started.result())
        elif waiter in waiters:
            del waiters[waiter]
            self._waiting -= 1

    def _pop(self, waiters: Waiters) -> asyncio.Future[Attempt]:
        self._waiting -= 1
        return waiters.popitem(last=False)[0].started

    def _go_on(self) -> None:
        if self._waiting:
            self._start_waiters()
        elif self._emptied is not None and not self.admission.in_use:
            wake(self._emptied)

    def _start_waiters(self) -> None:
        """Start what may start now, fail what waited too long, and set the timer for the rest."""
        now = self.clock.monotonic()
        due = inf
        while self._waiting:
            due = self.admission.find_start(now)
            if due > now:
                break
            urgent, others = self._urgent.find_first(), self._others.find_first()
            if others is None or (urgent is not None and self._in_a_row < URGENT_IN_A_ROW):
                assert urgent is not None
                started, in_a_row = self._pop(urgent), self._in_a_row + 1
            else:
                started, in_a_row = self._pop(others), 0
            if not started.done():  # otherwise its task was cancelled, but has not run yet
                self._in_a_row = in_a_row
                started.set_result(self.admission.start(now))
        stalled_at = self.admission.stalled_at
        if self._waiting and stalled_at is not None:
            due = min(due, self._expire(stalled_at, now))
        if self._waiting and due < self._timer_at:
            self._set_timer(due)

    def _expire(self, stalled_at: float, now: float) -> float:
        """Fail the waiters whose patience is over. Return when the next one's is."""
        for line in (self._urgent, self._others):
            while (waiters := line.find_expired(stalled_at, now)) is not None:
                self._fail(self._pop(waiters), self.build_outage_error(now - stalled_at))
        return min(self._urgent.find_expiry(stalled_at), self._others.find_expiry(stalled_at))

    def _fail_waiters(self, build: Callable[[], Exception]) -> None:
        for line in (self._urgent, self._others):
            while (waiters := line.find_first()) is not None:
                self._fail(self._pop(waiters), build())

    @staticmethod
    def _fail(started: asyncio.Future[Attempt], error: Exception) -> None:
        if not started.done():
            started.set_exception(error)

    def _set_timer(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = self.clock.call_at(at, self._wake)

    def _wake(self) -> None:
        self._timer, self._timer_at = None, inf
        self._start_waiters()
