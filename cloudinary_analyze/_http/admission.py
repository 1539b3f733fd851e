"""Decide when the next attempt may start. Pure: the caller passes the time and sends the requests.

`Admission` combines three controls. Each learns from the results of attempts and from nothing else.

*Pace* (`Pace`): the most starts per second. It is ``None`` until throttling shows a limit.
    One probe raises the pace by a gain g. A rate limit then throttles g / (1 + g) of the starts.
    Sporadic 429s throttle no larger share than before. So the pace is judged by *shares*, in rounds
    of starts, and a share that cuts do not lower is noise.
*Cap* (`Cap`): the most attempts in flight. It is learned where throttles depend on how many
    attempts were in flight, which shows a limit on concurrency.
*Stall*: nothing starts but one probe at a time, because the service throttles or fails everything.

Legal states, from the fastest to the slowest:

    state      | starts                 | left when
    -----------+------------------------+----------------------------------------------------------
    CALM       | under the permits      | an attempt is throttled or fails -> WATCHED
    WATCHED    | under cap              | a round without throttles, cap = permits -> CALM;
               |                        | too large a share throttled -> CRUISING
    SEARCHING  | under cap, at a pace    | a clean round: the pace doubles; a bad round -> CRUISING;
               | after a stall          | the pace delays nothing -> WATCHED; `ceiling` -> CRUISING;
               |                        | most are throttled: half the pace -> CRUISING
    CRUISING   | under cap, at the pace | the rest is over -> PROBING; a bad round, or doubt in
               |                        | the middle of one: a lower pace;
               |                        | the pace delays nothing -> WATCHED
    PROBING    | under cap, at a pace   | a clean round: a higher pace; a bad one, or doubt in
               | above the last one     | the middle of one -> CRUISING;
               |                        | the pace delays nothing -> WATCHED
    STALLED    | one, after a pause     | its start -> TESTING
    TESTING    | none                   | the probe's success -> SEARCHING; otherwise -> STALLED;
               |                        | if the service only asked for a pause, a success leads
               |                        | back to the state before it

A run of mostly bad results (`RUN`, `MOST`) leads from any of the first five states to STALLED. In
SEARCHING, throttles lead to CRUISING first.
`Settings.rate` adds a second pace, which limits the starts in every state. With it, the state is
never CALM.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from math import inf
from typing import Final

import attrs

from cloudinary_analyze._http.limits import Cap, Pace, State, Turnstile

# A stall needs this many bad results in a row, which make up this share of the starts since the
# first of them. Noise of 10 % does not reach 8. With a share of one half, a pace of twice the limit
# would lead to a stall. A cut handles that better.
RUN: Final = 8
MOST: Final = 2 / 3
# The first pause of a stall, the factor of its growth, and the longest pause. Seconds, before
# jitter of 50 %. The end of an outage is noticed within 7.5 s, at 12 probes a minute.
FIRST_PAUSE: Final = 0.5
PAUSE_GROWTH: Final = 1.5
LONGEST_PAUSE: Final = 5.0
# After a stall the pace starts at a quarter of the permits per second, and at least at 4: slow enough
# for a window quota, and within 2 s of what 64 permits can use.
FIRST_PACE: Final = 4.0
FIRST_PACE_SHARE: Final = 1 / 4


@attrs.define(eq=False)
class Attempt:
    """A started attempt, as `Admission` remembers it until its release.

    Attributes:
        depth: Attempts in flight when it started, including itself.
        number: Counts the starts.
        generation: Counts the stalls.
        at: When it started.
        recorded: Whether the cap's and the round's counts include it.
        probe: Whether it is the only attempt allowed in a stall.
    """

    depth: int
    number: int
    generation: int
    at: float
    recorded: bool = False
    probe: bool = False


@attrs.define(eq=False)
class Admission:
    """The state machine. Every result is reported before the attempt's release.

    Attributes:
        permits: The most attempts in flight at once.
        first_pause: Seconds of the first pause of a stall.
        longest_pause: Seconds of the longest pause.
        in_use: Attempts in flight.
        calm: Whether only the permits limit starts. Then results need no report.
        generation: Counts the stalls. Results from before the last one are ignored.
        probes: Probes so far.
        stalled_at: When the stall began; ``None`` if there is none.
        asked_until: Until when the service asked to wait in a stall.
    """

    permits: int
    chance: Callable[[], float] = random.random
    rate: Turnstile | None = None
    first_pause: float = FIRST_PAUSE
    longest_pause: float = LONGEST_PAUSE
    in_use: int = attrs.field(default=0, init=False)
    calm: bool = attrs.field(init=False)
    generation: int = attrs.field(default=0, init=False)
    probes: int = attrs.field(default=0, init=False)
    stalled_at: float | None = attrs.field(default=None, init=False)
    asked_until: float = attrs.field(default=-inf, init=False)
    cap: Cap = attrs.field(init=False)
    pace: Pace = attrs.field(factory=Pace, init=False)
    _number: int = attrs.field(default=0, init=False)
    _asked: bool = attrs.field(default=False, init=False)  # the stall is a pause that it asked for
    _echoes: int = attrs.field(default=0, init=False)  # bad results of attempts from before it
    _testing: bool = attrs.field(default=False, init=False)
    _probe_at: float = attrs.field(default=0.0, init=False)
    _pauses: int = attrs.field(default=0, init=False)
    _run: int = attrs.field(default=0, init=False)  # bad results in a row
    _run_from: int = attrs.field(default=0, init=False)  # the number of the first of them

    def __attrs_post_init__(self) -> None:
        self.cap = Cap(self.permits)
        self.calm = self.rate is None

    @property
    def state(self) -> State:
        """The state that the module's docstring describes."""
        if self.stalled_at is not None:
            return State.TESTING if self._testing else State.STALLED
        return State.CALM if self.calm else self.pace.state

    @property
    def allowed(self) -> int:
        """The most attempts in flight now."""
        return self.cap.limit if self.stalled_at is None else 1

    def find_start(self, now: float) -> float:
        """Return when the next attempt may start: not after `now` means at once.

        Infinity means after a release. Then at least one attempt is in flight.
        """
        if self.stalled_at is not None:
            return inf if self._testing else self._probe_at
        if self.in_use >= self.cap.limit:
            return inf
        if self._run and self.in_use and self._number - self._run_from >= self.cap.limit - 1:
            # As many have started since the first bad result as can be in flight, and none of
            # them succeeded yet. In an outage, more starts would be wasted.
            return inf
        at = now
        if self.pace.rate is not None and self.pace.turnstile.free_at > now:
            self.pace.held = True
            at = self.pace.turnstile.free_at
        if self.rate is not None:
            at = max(at, self.rate.free_at)
        return at

    def start(self, now: float) -> Attempt:
        """Count a start, which `find_start` allowed."""
        self.in_use += 1
        self._number += 1
        attempt = Attempt(self.in_use, self._number, self.generation, now)
        if self.calm:
            return attempt
        if self.rate is not None:
            self.rate.take(now)
        if self.stalled_at is not None:
            attempt.probe = self._testing = True
            self.probes += 1
            return attempt
        attempt.recorded = True
        self.cap.count_start(attempt.depth, now)
        self.pace.count_start(now)
        return attempt

    def withdraw(self, attempt: Attempt) -> None:
        """Undo a start whose request was not sent. Releases the attempt."""
        if self.rate is not None:
            self.rate.put_back()
        if attempt.recorded and attempt.generation == self.generation:
            self.cap.count_withdrawal(attempt.depth)
            self.pace.count_withdrawal()
        self.release(attempt)

    def release(self, attempt: Attempt) -> None:
        """End an attempt. A probe without a result is followed by another one."""
        self.in_use -= 1
        if attempt.probe:
            self._testing = attempt.probe = False

    def succeed(self, attempt: Attempt, now: float) -> None:
        """Record that the service processed a request, whatever its response."""
        if self.calm:
            return
        if attempt.probe:
            self._end_stall(attempt, now)
            return
        if attempt.number >= self._run_from:
            self._run = 0  # older attempts show nothing about the present
        self._judge(attempt, now)

    def throttle(self, attempt: Attempt, now: float, retry_after: float = 0.0) -> None:
        """Record that the service refused a request for now.

        Args:
            attempt: The attempt.
            now: The time.
            retry_after: Seconds that the service asked for. They bind only the call, except that
                the pause of a stall is at least as long.
        """
        self._observe(now)
        self.pace.lag = max(now - attempt.at, 0.9 * self.pace.lag)
        if attempt.probe:
            self._pause(attempt, now, retry_after)
            return
        if attempt.generation != self.generation or attempt.depth > self.cap.limit:
            self._echoes += 1
            return  # it started before the last stall or cut
        explained = self.cap.count_throttle(attempt.depth, now, self.chance())
        self.pace.count_throttle(attempt.number, explained=explained)
        if self.pace.is_doubtful and (not self._run or self._run_from > self.pace.round_from):
            # otherwise nothing has succeeded since the last cut, which may become a stall
            self.cap.learn(MOST)
            self._cut(now)
        self._count_bad(attempt, now, retry_after, throttled=True)
        self._judge(attempt, now)

    def fail(self, attempt: Attempt, now: float) -> None:
        """Record that the service or the connection failed."""
        self._observe(now)
        if attempt.probe:
            self._pause(attempt, now, 0.0)
        elif attempt.generation == self.generation:
            self._count_bad(attempt, now, 0.0, throttled=False)
        else:
            self._echoes += 1

    def pause(self, now: float, seconds: float) -> None:
        """Start nothing for a time that the service asked for, then probe.

        A pause shows no rate. If the probe succeeds, the earlier state continues, unless most
        attempts in flight failed, too.
        """
        if self.stalled_at is not None:
            self._delay_probe(now, seconds)
            return
        self.stall(now, 0.0)
        self._asked, self._echoes = True, 0
        self._pauses = 0
        self._probe_at = self.asked_until = now + seconds

    def stall(self, now: float, seconds: float, *, throttled: bool = True) -> None:
        """Start nothing for a time, then probe.

        Args:
            now: The time.
            seconds: The shortest pause.
            throttled: Whether the service throttles, so that what it accepted is a limit.
        """
        self._observe(now)
        if self.stalled_at is None:
            self.pace.remember_ceiling(now, throttled=throttled)
            self.generation += 1
            self.stalled_at = now
            self._run = self._pauses = 0
            self._asked = False
        self._delay_probe(now, seconds)

    def _observe(self, now: float) -> None:
        if self.calm:
            self.calm = False
            self.cap.clear(self.in_use)
            self.pace.watch(now, self._number, self.in_use)
            self._run = 0

    def _count_bad(
        self, attempt: Attempt, now: float, retry_after: float, *, throttled: bool
    ) -> None:
        if self._run == 0:
            self._run_from = attempt.number
        self._run += 1
        if self._run < RUN or self._run < MOST * (self._number - self._run_from + 1):
            return
        if self.cap.learn(0.0):
            self._cut(now)
        elif throttled and self.pace.step_back(now, self.chance()):
            self._run = 0
            self.pace.begin_round(now, self._number)
        else:
            self.stall(now, retry_after, throttled=throttled)

    def _pause(self, probe: Attempt, now: float, seconds: float) -> None:
        self._testing = probe.probe = self._asked = False
        self._delay_probe(now, seconds)

    def _delay_probe(self, now: float, seconds: float) -> None:
        pause = min(self.longest_pause, self.first_pause * PAUSE_GROWTH**self._pauses)
        self._pauses += 1
        if seconds > 0:
            self.asked_until = max(self.asked_until, now + seconds)
        self._probe_at = max(self._probe_at, now + max(seconds, pause * (0.5 + self.chance())))

    def _end_stall(self, probe: Attempt, now: float) -> None:
        self._testing = probe.probe = False
        self.stalled_at = None
        self._run = 0
        self.cap.clear()
        if self._asked and self._echoes < RUN:
            self.pace.begin_round(now, self._number)
            return
        self.pace.search(max(FIRST_PACE, self.permits * FIRST_PACE_SHARE), now, self._number)

    def _judge(self, attempt: Attempt, now: float) -> None:
        if self.stalled_at is not None or not self.pace.is_over(attempt.number, now):
            return
        if self.pace.is_bad:
            self.cap.learn(MOST)
            if not self.pace.is_noise:
                self._cut(now)
                return
            self.pace.accept_noise(now)
        else:
            throttled = self.pace.throttled
            self.pace.pass_round(now, self.chance())
            self.calm = (
                self.pace.rate is None
                and not throttled
                and self.cap.limit == self.permits
                and self.rate is None
            )
        self.cap.fade()
        self.pace.begin_round(now, self._number)

    def _cut(self, now: float) -> None:
        self.pace.cut(now, self.chance())
        self.pace.begin_round(now, self._number)
