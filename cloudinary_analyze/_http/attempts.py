"""Attempts: the one loop that repeats calls and polls, each attempt admitted by a queue.

The policy decides, `AdmissionQueue` admits, `Transport` sends. The order of an attempt: quota
breaker, pause or probe, slot and pace, pacer, claim, send, report, release. No slot is held while a
call sleeps.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from functools import partial
from math import inf
from typing import Final, TypeVar

import attrs

from cloudinary_analyze._cancellation import (
    InterruptedSectionError,
    Sections,
    count_cancellations,
    is_own_cancellation,
)
from cloudinary_analyze._clock import Clock
from cloudinary_analyze._http.admission import LONGEST_PAUSE, RUN, Admission, Attempt
from cloudinary_analyze._http.call import Call
from cloudinary_analyze._http.limits import CATCH_UP, Turnstile
from cloudinary_analyze._http.quota import Quota
from cloudinary_analyze._http.transport import Answer, Body, Transport
from cloudinary_analyze._http.waiting import AdmissionQueue
from cloudinary_analyze._meter import Meter
from cloudinary_analyze._policy import (
    asks_for_more,
    build_waits,
    compute_patience,
    decide_wait,
    is_outage,
    is_throttle,
)
from cloudinary_analyze._values import NotPicklable
from cloudinary_analyze.config import Pacer, Settings
from cloudinary_analyze.errors import (
    AnalyzeError,
    ApiError,
    AuthenticationError,
    CallTimeoutError,
    OutageError,
    PacerError,
    ResponseDecodeError,
    TransportError,
    build_unsent,
    shorten,
)

T = TypeVar("T")

# Seconds that a slot waits for a claim. A slow store must not keep calls that need none.
SLOT_PATIENCE: Final = 1.0


@attrs.define(eq=False, repr=False)
class Attempts(NotPicklable):
    """Makes the attempts of one session's calls and polls.

    Attributes:
        queue: Admits the attempts of analyze calls.
        poll_queue: Admits those of status polls.
        own_patience: The maximum seconds of all our own waits of a call.
    """

    settings: Settings
    clock: Clock
    transport: Transport
    meter: Meter
    quota: Quota
    queue: AdmissionQueue = attrs.field(init=False)
    poll_queue: AdmissionQueue = attrs.field(init=False)
    own_patience: float = attrs.field(init=False)
    _bulk_patience: float = attrs.field(init=False)
    _free_attempts: float = attrs.field(init=False)  # more than the pauses in that time
    _limits: tuple[float | None, int] = attrs.field(init=False)
    _pauses: Sections = attrs.field(factory=Sections, init=False)  # sleeps and waits for the pacer
    _closed: AnalyzeError | None = attrs.field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        settings = self.settings
        rate = None
        if settings.rate is not None:
            # a late timer is made up for, but not more, so that the rate is kept
            slack = max(CATCH_UP, (settings.burst - 1) / settings.rate)
            rate = Turnstile(1 / settings.rate, slack)
        self.queue = self._build_queue(settings.permits, rate)
        self.poll_queue = self._build_queue(settings.poll_permits)
        self._limits = None, settings.permits
        self.own_patience = compute_patience(settings)
        self._bulk_patience = inf if settings.outage_timeout is None else settings.outage_timeout
        self._free_attempts = RUN + self._bulk_patience / LONGEST_PAUSE

    def _build_queue(self, permits: int, rate: Turnstile | None = None) -> AdmissionQueue:
        admission = Admission(
            permits,
            rate=rate,
            # pauses are also waits of our own
            first_pause=min(LONGEST_PAUSE, self.settings.backoff_first),
            longest_pause=min(LONGEST_PAUSE, self.settings.backoff_max),
        )
        return AdmissionQueue(admission, self.clock)

    async def repeat_until(
        self, deadline: float, call: Call, read: Callable[[Call, Answer], T]
    ) -> T:
        if deadline <= call.begun:
            raise CallTimeoutError("The time for the whole call was over before it was sent.")
        scope: asyncio.Timeout | None = None
        try:
            async with self.clock.timeout_at(deadline) as scope:
                return await self.repeat(call, read)
        except TimeoutError as error:
            if isinstance(error, AnalyzeError) or scope is None or not scope.expired():
                raise  # an attempt's, or the pacer's own
            how = f"{call.attempts} attempts" if call.attempts else "queueing for a permit"
            raise CallTimeoutError(
                f"No response arrived within the {deadline - call.begun:.1f} s for the whole call "
                f"({how}).",
                attempts=call.attempts,
                ambiguous=call.ambiguous or (call.sending is not None and call.sending.sent),
            ) from call.error

    async def repeat(self, call: Call, read: Callable[[Call, Answer], T]) -> T:
        """Repeat a call until it has a response or a final error."""
        queue = call.queue
        quota = self.quota
        watch = call.watch
        waits_for_turn = call.model is not None and (
            self.settings.pacer is not None
            or (call.owner is not None and call.owner.claim is not None)
        )
        while True:
            if watch is not None:
                watch.queue()
            if quota.breakers and call.model is not None and not call.probing:
                call.probing = quota.check(call.feature)
            attempt = queue.start_at_once() or await self._wait_to_start(call)
            if waits_for_turn and not await self._take_turn(call, attempt):
                continue
            try:
                self._begin(call)
            except BaseException:
                queue.withdraw(attempt)
                raise
            try:
                sending = self.transport.send(call.url, call.sending)
                if watch is None:
                    result = read(call, await sending)
                else:
                    result = await watch.attempt(
                        sending, call.sending, partial(read, call), probe=attempt.probe
                    )
            except (ApiError, TransportError) as error:
                refused = error
                wait = self._judge(call, attempt, error)
                if wait is None and not self._may_renew(call, error):
                    raise
            except ResponseDecodeError as error:
                queue.succeed(attempt)  # the service did respond
                error.model = call.model
                error.ambiguous &= call.model is not None
                raise
            else:
                queue.succeed(attempt)
                return result
            finally:
                queue.release(attempt)
                if watch is not None and call.model is not None:
                    self._emit_pace(queue.admission)
            if wait is None:
                await self._renew_token(call, refused)
            elif wait:
                await call.wait(self._sleep(wait))

    async def _wait_to_start(self, call: Call) -> Attempt:
        """Wait in the queue. In an outage, wait no longer than the call may.

        Raises:
            OutageError: The outage lasts too long for bulk work, or for a call that was not sent.
            AnalyzeError: The error of its last attempt, of an interactive call; the queue was
                closed; or the service asked for a longer wait than the settings allow.
        """
        since, patience = call.begun, self._bulk_patience
        if call.urgent:
            since, patience = self.clock.monotonic(), call.patience
        starting = call.queue.start(
            urgent=call.urgent, first=call.again, since=since, patience=patience
        )
        try:
            attempt = await call.wait(starting)
            if attempt.probe:
                stalled_at = call.queue.admission.stalled_at or since
                call.patience -= self.clock.monotonic() - max(since, stalled_at)
            return attempt
        except OutageError as error:
            if not call.urgent or call.error is None:
                error.attempts = call.attempts
                raise error from call.error
        raise call.error

    async def _take_turn(self, call: Call, attempt: Attempt) -> bool:
        """Await the pacer and the claim with the slot held.

        Every call of a session needs its pacer, so a slot that waits for the pacer is kept. Other
        calls may need no claim, so after `SLOT_PATIENCE` the slot is given back.

        Returns:
            Whether the attempt may be sent now. Otherwise it was withdrawn.
        """
        queue = call.queue
        slot: list[Attempt] = [attempt]
        try:
            if self.settings.pacer is not None:
                await call.wait(self._await_pacer(self.settings.pacer))
            if (owner := call.owner) is not None and (claim := owner.claim) is not None:
                owner.claim = None
                call.unsent = True
                patient_until = self.clock.monotonic() + SLOT_PATIENCE
                timer = self.clock.call_at(patient_until, lambda: queue.withdraw(slot.pop()))
                try:
                    await claim()
                finally:
                    timer.cancel()
                call.unsent = False
            if slot and queue.is_current(attempt):
                slot.clear()
                return True
        finally:
            if slot:
                queue.withdraw(attempt)
        call.again = True
        return False

    def _may_renew(self, call: Call, error: AnalyzeError) -> bool:
        """Whether a failed call may be repeated, once, with a new OAuth token."""
        refused = isinstance(error, AuthenticationError)
        may = refused and self.transport.token is not None and not call.renewed
        return may and not call.halted

    async def _renew_token(self, call: Call, error: AnalyzeError) -> None:
        """Wait for a newer OAuth token than the refused one.

        Raises:
            AuthenticationError: There is none. Its cause is the reason.
            SessionClosedError: The session was closed meanwhile.
        """
        assert self.transport.token is not None
        call.renewed = True
        failure = await self.transport.token.renew(call.token)
        self._check_open(error)
        if failure is not None:
            raise error from failure
        if call.watch is not None:
            call.watch.retry(error, 0.0)

    def _begin(self, call: Call) -> None:
        """Check that an attempt may still be sent, and count it."""
        if call.owner is not None:
            call.ask_owner(call.owner)
        if call.deadline is not None and self.clock.monotonic() >= call.deadline:
            # the loop was late: the permit came before the timer, which is due by now
            raise CallTimeoutError(
                "The time for the whole call ran out while it was waiting.",
                attempts=call.attempts,
            ) from call.error
        if call.content is None:
            self.meter.polls += 1
        else:
            if self.quota.breakers and not call.probing:
                call.probing = self.quota.check(call.feature)  # it may have tripped meanwhile
            call.sending = Body(call.content)
            self.meter.attempts += 1
            call.number = self.meter.attempts
        if call.error is not None:
            self.meter.retries += 1
            self.meter.ambiguous_retries += call.error.ambiguous
        call.attempts += 1
        if self.transport.token is not None:
            call.token = self.transport.token.number

    async def _await_pacer(self, pacer: Pacer) -> None:
        """Wait for the user's pacer; closing the session ends the wait.

        Raises:
            PacerError: It failed.
            SessionClosedError: The session was closed meanwhile.
        """
        cancelling = count_cancellations()
        cause: BaseException | None = None
        try:
            await self._pauses.run(pacer.acquire())
        except InterruptedSectionError:
            pass
        except (Exception, asyncio.CancelledError) as error:
            if is_own_cancellation(error, cancelling):
                raise
            cause = error
        self._check_open(cause)
        if cause is not None:
            raise PacerError(
                f"Settings.pacer failed ({type(cause).__name__}: {shorten(str(cause))}). This "
                "attempt was not sent."
            ) from cause

    def _judge(
        self, call: Call, attempt: Attempt, error: ApiError | TransportError
    ) -> float | None:
        """Report a failed attempt to the queue and the quota, and decide on the call.

        Returns:
            The seconds until the next attempt; ``None`` if the error is final.

        Raises:
            SessionClosedError: The session was closed meanwhile.
        """
        call.sending = None
        call.error = error
        call.ambiguous |= error.ambiguous
        error.attempts = call.attempts
        probe = attempt.probe
        if call.waits is None:
            call.failed_at, call.waits = self.clock.monotonic(), build_waits(self.settings)
        own_wait = next(call.waits)
        self._report(call, attempt, error, own_wait)
        self._check_open(error)
        wait = None
        if self._may_repeat(call, error, probe=probe):
            wait = decide_wait(error, self.settings, own_wait=own_wait, chance=random.random())
        if wait is not None and call.urgent:
            call.patience -= min(wait, own_wait)
            wait = wait if call.patience > -0.001 else None  # but for rounding errors
        if call.model is not None and isinstance(error, ApiError):
            self.quota.take_failure(call.feature, error, number=call.number)
        if wait is not None:
            if probe and not error.ambiguous:
                wait = 0.0  # the queue pauses
            call.again = not error.ambiguous  # possible charges are spread over the items
            if call.watch is not None:
                call.watch.retry(error, wait)
        return wait

    def _may_repeat(self, call: Call, error: AnalyzeError, *, probe: bool) -> bool:
        """Whether its owner and the limits of a call allow one more attempt.

        For bulk work, an attempt that only shows a limit of the service or an outage does not
        count. Its wait is bounded by time instead. Otherwise items would fail permanently when
        progress is slow.
        """
        if call.halted:
            return False
        shows_a_limit = is_throttle(error) or (probe and not error.ambiguous)
        is_bulk = call.model is not None and not call.urgent
        if is_bulk and shows_a_limit and call.free < self._free_attempts:
            call.free += 1
            return probe or self.clock.monotonic() < call.failed_at + self._bulk_patience
        return call.attempts - call.free < call.limit

    def _report(
        self, call: Call, attempt: Attempt, error: ApiError | TransportError, own_wait: float
    ) -> None:
        """Report the result of an attempt to the queue."""
        queue, generation = call.queue, call.queue.admission.generation
        if isinstance(error, ApiError) and asks_for_more(error, self.settings.max_server_wait):
            assert error.retry_after is not None
            queue.refuse(self.clock.monotonic() + error.retry_after, partial(_build_refusal, error))
        elif isinstance(error, ApiError) and is_throttle(error):
            poll = call.model is None
            seconds = max(error.retry_after or 0.0, own_wait if poll else 0.0)
            queue.throttle(attempt, seconds, stall=poll or error.status == 503)
        elif is_outage(error):
            if call.failed_in != generation:
                call.failed_in, call.failed_first = generation, attempt.number
            # Otherwise a request that was sent later succeeded: the service fails this one only.
            # Images that it cannot process would look like an outage, once they fill the window.
            if attempt.probe or queue.newest_success < call.failed_first:
                queue.fail(attempt)
        else:
            queue.succeed(attempt)
        if queue.admission.generation > generation:
            self.meter.pauses += 1
            if self.meter.hook is not None:
                self._emit_pause(queue, "throttled" if is_throttle(error) else "failing")

    def _emit_pause(self, queue: AdmissionQueue, cause: str) -> None:
        from cloudinary_analyze.events import SessionPaused

        now = self.clock.monotonic()
        self.meter.emit(
            SessionPaused(
                seconds=queue.admission.find_start(now) - now,
                permits=queue.admission.cap.limit,
                polls=queue is self.poll_queue,
                cause=cause,
            )
        )

    def _emit_pace(self, admission: Admission) -> None:
        from cloudinary_analyze.events import PaceChanged

        limits = (admission.pace.rate, admission.cap.limit)
        if limits != self._limits:
            self._limits = limits
            self.meter.emit(PaceChanged(pace=limits[0], permits=limits[1]))

    async def _sleep(self, seconds: float) -> None:
        """Sleep on the session's clock. Closing the session ends the sleep with its error."""
        with suppress(InterruptedSectionError):
            await self._pauses.run(self.clock.sleep(seconds))
        self._check_open()

    def _check_open(self, cause: BaseException | None = None) -> None:
        """Raise if the session was closed meanwhile. `Caller` adds if the call may be charged."""
        if self._closed is not None:
            raise copy(self._closed) from cause

    def close(self, error: AnalyzeError) -> None:
        """Fail all calls that queue or sleep, and all later ones."""
        self._closed = error
        self.queue.close(error)
        self._pauses.interrupt_all()
        if self.transport.token is not None:
            self.transport.token.close()

    def close_polls(self) -> None:
        """Fail all status polls that queue, and all later ones."""
        if self._closed is not None:
            self.poll_queue.close(self._closed)


def _build_refusal(error: ApiError, seconds: float) -> ApiError:
    """Return the error for a call during a wait that the service asked for at another call."""
    unsent = build_unsent(
        error,
        f"Not sent: the service asked at an earlier call for a wait of {error.retry_after:.0f} s, "
        f"which is longer than Settings.max_server_wait. {seconds:.0f} s of it are left. Its "
        f"response was: {error.message}",
    )
    unsent.retry_after = seconds
    return unsent
