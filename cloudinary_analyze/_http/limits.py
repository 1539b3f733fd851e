"""The limits of the service that the session has learned: a pace and a cap. Pure.

`Pace` and `Cap` are parts of `Admission`, which documents their states. Nothing here knows about
stalls or the queue.
"""

from __future__ import annotations

import enum
from math import inf, log
from typing import Final

import attrs

# How large a step of a probe is, at least. It must exceed twice the noise of the share of a round:
# 1/8 distinguishes a limit from 10 % of sporadic 429s.
GAIN: Final = 1 / 8
# The largest step of a probe while cruising. With 1, a probe that a full bucket hides overshoots
# the limit so far that it ends in a stall. With 1/2, it takes so much from other clients of the
# limit that they are throttled for seconds; with 0.3, a raised limit is noticed too late.
LARGEST_GAIN: Final = 0.4
# Throttles that a round expects if the pace is above a limit. Fewer make wrong cuts likely.
EXPECTED: Final = 4
# `Doubt` compares two shares of throttles: what is expected, and what shows that the pace is too
# high. Both are above the noise, but the noise is only an estimate, so each has a floor. A probe
# that fails costs two throttles. A wrong cut while cruising costs a search, and needs about five.
EXPECTED_WHEN_PROBING: Final = 0.01
EXPECTED_WHEN_CRUISING: Final = 0.03
TOO_MANY: Final = 1 / 4
# The logarithm of the odds that end a probe, and those that lower the pace while cruising.
PROBE_ODDS: Final = 4.0
CRUISE_ODDS: Final = 9.0
# The largest cut on such evidence, because a few starts show the limit only roughly. The second one
# in a row is at most half as large, and so on. Otherwise the slower of two clients of one limit
# starves.
LARGEST_CUT: Final = 0.75
# A failed probe lowers the rate from before it by half of this at most: two throttles show nothing
# about that rate. If the limit fell during the probe, the next throttles show it.
FAILED_PROBE: Final = 0.08
# A round lasts at least this long at gain 1, so that bursts and latency do not pass for a rate.
SHORTEST_ROUND: Final = 0.25
# A round with few starts ends after this time.
LONGEST_ROUND: Final = 5.0
# A round lasts for at least two latencies of a rejection; otherwise its throttles come too late.
ROUND_LAGS: Final = 2
# Starts before a round may end early.
FEWEST_STARTS: Final = 8
# A cut stays this far below what was accepted. Otherwise half of the cuts end above the limit, and
# throttle until the next one. It costs at most 2 % of the goodput, and halves the throttles at 10/s.
UNDERSHOOT: Final = 0.98
# The time between probes is this share of the time since the limit changed, but at least 1 s and at
# most this many seconds. A probe costs about 2.5 throttles: at 10/s, with rests of 16 s, 1.6 % of
# the calls. So a limit that changed recently is expected to change again, and the longest delay
# until a raised limit is noticed is 20 s and a probe.
REST: Final = 0.4
LONGEST_REST: Final = 16.0
# A cut by half, or a probe that doubled the rate, shows that the limit changed. It divides the time
# since the last change by this, so that the next change is noticed early. Forgetting that time
# costs one and a half times the throttles where two clients share a limit.
CHANGE: Final = 2
SOONER: Final = 4
# A late timer may be made up for by this many seconds of starts. More of them would be a burst.
CATCH_UP: Final = 0.02
# The least share of the pace that counts as accepted after a stall. A stall begins when two thirds
# are throttled, so at most 1/3 was accepted; with half of it the next search is short.
STALL_FLOOR: Final = 1 / 6
# The lowest learned pace per second. It still sends enough for a round every few seconds.
LOWEST_PACE: Final = 0.5
# The noise is the throttled share of about this many starts: a round of n starts has the weight
# n / (n + this). Low rates learn it slowly, because 36 starts show a share only roughly. The first
# round after a cut shows more, because no limit should cause its throttles. Probes do not raise it,
# because a limit causes theirs.
NOISE_STARTS: Final = 300
FRESH_STARTS: Final = 100
# Cuts in a row that did not lower the share show that it is noise. With 2, another client that
# probes for a few seconds passes for noise, and both send too much for minutes.
NOISE_CUTS: Final = 4
# The share of the counts per depth that is kept after each round. They cover about 5 rounds.
FADE: Final = 0.8
# Seconds between steps of the cap upward, and the longest wait after a step that failed.
CAP_STEP: Final = 1.0
LONGEST_CAP_REST: Final = 16.0


class State(enum.Enum):
    """What limits the starts of attempts. The docstring of `admission` describes the states."""

    CALM = "calm"
    WATCHED = "watched"
    SEARCHING = "searching"
    CRUISING = "cruising"
    PROBING = "probing"
    STALLED = "stalled"
    TESTING = "testing"


@attrs.define(eq=False)
class Turnstile:
    """Spaces starts evenly (the generic cell rate algorithm).

    Attributes:
        interval: Seconds between starts.
        slack: Seconds of unused starts that may be made up for.
        free_at: When the next start is due.
    """

    interval: float
    slack: float
    free_at: float = -inf

    def take(self, now: float) -> None:
        """Count a start."""
        self.free_at = max(self.free_at, now - self.slack) + self.interval

    def put_back(self) -> None:
        """Return a start that was not used."""
        self.free_at -= self.interval


@attrs.define(eq=False)
class Cap:
    """How many attempts may be in flight, learned from the depths at which attempts are throttled.

    Sessions that share one limit on concurrency do not share it evenly: the one that has most of it
    rarely sees a throttle.

    Attributes:
        permits: The most, from the settings.
        limit: The most now.
        proven: The most that were not throttled. Above it, the limit is being probed.
    """

    permits: int
    limit: int = attrs.field(init=False)
    proven: int = attrs.field(init=False)
    _step: int = attrs.field(default=1, init=False)
    _rest: float = attrs.field(default=CAP_STEP, init=False)
    _raise_at: float = attrs.field(default=0.0, init=False)
    _accepted: list[float] = attrs.field(init=False)  # starts that were not throttled, by depth
    _throttled: list[float] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.limit = self.proven = self.permits
        self.clear()

    def clear(self, in_use: int = 0) -> None:
        """Forget the counts; assume a start at each depth that is in use."""
        self._accepted = [float(0 < depth <= in_use) for depth in range(self.permits + 1)]
        self._throttled = [0.0] * (self.permits + 1)

    def fade(self) -> None:
        """Give the counts so far less weight."""
        self._accepted = [count * FADE for count in self._accepted]
        self._throttled = [count * FADE for count in self._throttled]

    def count_start(self, depth: int, now: float) -> None:
        """Count a start. One at the limit may raise the limit."""
        self._accepted[depth] += 1
        if depth == self.limit < self.permits and now >= self._raise_at:
            if self.limit > self.proven:  # the last step was not throttled
                self._step *= 2
                self._rest = CAP_STEP
            self.proven = self.limit
            self.limit = min(self.permits, self.limit + self._step)
            self._raise_at = now + CAP_STEP

    def count_withdrawal(self, depth: int) -> None:
        """Undo `count_start`."""
        self._accepted[depth] = max(0.0, self._accepted[depth] - 1)

    def count_throttle(self, depth: int, now: float, chance: float) -> bool:
        """Count a throttle. Return whether the cap explains it, so that it does not concern the pace.

        It does so only if most starts above the proven limit were throttled. A rate limit throttles
        a smaller share, which is the pace's concern.

        Args:
            depth: Of the throttled attempt.
            now: The time.
            chance: From 0 to 1, to spread the clients of one limit.
        """
        self.count_withdrawal(depth)
        self._throttled[depth] += 1
        if depth <= self.proven:
            return False
        throttled = sum(self._throttled[self.proven + 1 :])
        if throttled < sum(self._accepted[self.proven + 1 :]):
            return False
        self.limit = self.proven
        self._step = 1
        self._rest = min(LONGEST_CAP_REST, 2 * self._rest)
        self._raise_at = now + self._rest * (0.5 + chance)
        return True

    def learn(self, mistakes: float) -> bool:
        """Lower the limit to the depth that best separates accepted from throttled attempts.

        A depth counts only if starts went through it twice. Otherwise the depth has only risen
        since the beginning, so depth and time cannot be distinguished: a burst into a rate limit.

        Args:
            mistakes: The share of the throttles that the limit may leave unexplained.

        Returns:
            Whether there is such a depth.
        """
        throttled = sum(self._throttled)
        above, below, visits = sum(self._accepted), 0.0, 0.0
        fewest, best = mistakes * throttled, 0
        for depth in range(1, self.limit):
            above -= self._accepted[depth]
            below += self._throttled[depth]
            visits += self._accepted[depth]
            if (
                visits >= 2 * depth
                and above + below <= fewest
                and (above + below < fewest or not best)
            ):
                fewest, best = above + below, depth
        if not throttled or not best:
            return False
        self.limit = self.proven = best
        self._step = 1
        self._throttled = [0.0] * (self.permits + 1)
        return True


@attrs.define(eq=False)
class Doubt:
    """Evidence that a limit causes the latest throttles (a CUSUM test).

    Throttles add to the odds and starts take from them. While there is no doubt, nothing is counted,
    so that throttles before a limit fell do not hide the fall.

    Attributes:
        odds: The logarithm of the odds; 0: no doubt.
        starts: Since the doubt began.
        throttles: Since then, with the one that began it.
    """

    odds: float = 0.0
    starts: int = 0
    throttles: int = 0
    _per_throttle: float = 0.0
    _per_start: float = 0.0

    def begin(self, expected: float, too_many: float) -> None:
        """Begin to compare two shares of throttles, without doubt."""
        self._per_start = log((1 - too_many) / (1 - expected))
        self._per_throttle = log(too_many / expected)
        self.odds, self.starts, self.throttles = 0.0, 0, 0

    def count_start(self) -> None:
        """Count a start."""
        if self.odds > 0:
            self.odds += self._per_start
            self.starts += 1
            if self.odds <= 0:
                self.odds, self.starts, self.throttles = 0.0, 0, 0

    def count_withdrawal(self) -> None:
        """Undo `count_start`."""
        if self.starts:
            self.odds -= self._per_start
            self.starts -= 1

    def count_throttle(self) -> None:
        """Count a throttle."""
        self.odds += self._per_throttle
        self.throttles += 1

    @property
    def share(self) -> float:
        """The share of throttles since the first."""
        return (self.throttles - 1) / max(1, self.starts)


@attrs.define(eq=False)
class Pace:
    """The learned rate, and the round in which it is judged.

    Attributes:
        rate: Starts per second; ``None`` if nothing shows a limit.
        held: Whether the rate delayed a start in this round.
        ceiling: Where the search after a stall ends.
        lag: The latency of rejections: the longest recent one.
        doubt: Evidence against the rate that does not wait for the end of the round.
        round_from: The number of the last start before the round.
    """

    turnstile: Turnstile = attrs.field(factory=lambda: Turnstile(0.0, CATCH_UP))
    rate: float | None = None
    state: State = State.WATCHED
    held: bool = False
    ceiling: float = inf
    lag: float = 0.0
    doubt: Doubt = attrs.field(factory=Doubt)
    started: int = 0
    throttled: int = 0
    round_from: int = 0
    _gain: float = GAIN
    _noise: float = 0.0  # the share of throttles that no cut removed
    _fresh: bool = False  # the round is the first after a cut
    _cuts: int = 0  # in a row; a failed probe is none, because it only returns to the rate before
    _last_share: float = 0.0
    _cruised_at: float = 0.0  # the rate before the probe
    _confirmed: bool = False  # the probe's first step was clean twice
    _changed_at: float = 0.0  # when the limit changed last
    _probe_at: float = 0.0
    _round_at: float = 0.0
    _unanswered: int = 0  # starts of the round that are too young for a rejection
    _climb_at: float = 0.0
    _climbed: int = 0  # starts since then that were not throttled

    def begin_round(self, now: float, number: int, started: int = 0) -> None:
        """Reset the counts."""
        self._round_at, self.round_from = now, number - started
        self.started, self.throttled, self.held = started, 0, False
        if self.state is State.PROBING:
            expected = min(0.4, max(EXPECTED_WHEN_PROBING, self._noise))
            excess = self._gain / (1 + self._gain)
            self.doubt.begin(expected, expected + (1 - expected) * excess)
        else:
            expected = min(0.4, EXPECTED_WHEN_CRUISING + self._noise)
            self.doubt.begin(expected, max(TOO_MANY, 2 * expected))

    def begin_climb(self, now: float, started: int = 0) -> None:
        """Start to measure what the service accepts until the next stall."""
        self._climb_at, self._climbed = now, started

    def watch(self, now: float, number: int, in_use: int) -> None:
        """Leave CALM. What is in flight belongs to the first round."""
        self.state = State.WATCHED
        self._noise, self._fresh, self._cuts = 0.0, False, 0
        self.begin_round(now, number, in_use)
        self.begin_climb(now, in_use)

    def search(self, rate: float, now: float, number: int) -> None:
        """Start slowly after a stall, and double the rate with each clean round."""
        self._set_rate(min(rate, self.ceiling))
        self.turnstile.free_at = now
        self.state, self._gain, self._changed_at = State.SEARCHING, 1.0, now
        self.begin_round(now, number)
        self.begin_climb(now)

    def count_start(self, now: float) -> None:
        """Count a start."""
        self.started += 1
        self._climbed += 1
        self.doubt.count_start()
        if self.rate is not None:
            self.turnstile.take(now)

    def count_withdrawal(self) -> None:
        """Undo `count_start`."""
        self.started = max(0, self.started - 1)
        self._climbed -= 1
        self.doubt.count_withdrawal()
        if self.rate is not None:
            self.turnstile.put_back()

    def count_throttle(self, number: int, *, explained: bool) -> None:
        """Count a throttle.

        Args:
            number: Of the attempt. One from before the round says nothing about the round's rate.
            explained: The cap explains it.
        """
        self._climbed -= 1
        if not explained and number > self.round_from:
            self.throttled += 1
            self.doubt.count_throttle()

    def remember_ceiling(self, now: float, *, throttled: bool) -> None:
        """Record a stall. If nothing was accepted, or in an outage, the rate stays unknown.

        The mean since the climb began is low if that was long ago, so it has a floor.
        """
        accepted = self._climbed / max(0.001, now - self._climb_at)
        accepted = max(1.0, accepted, (self.rate or 0.0) * STALL_FLOOR)
        self.ceiling = accepted if throttled and self._climbed > 0 else inf

    def is_over(self, number: int, now: float) -> bool:
        """Return whether the round can be judged.

        Args:
            number: Of the attempt whose result arrived. Older ones say nothing about the round.
            now: The time.
        """
        if number <= self.round_from or not self.started:
            return False
        seconds, gain = now - self._round_at, self._gain
        # At most half, because a round lasts for two lags.
        self._unanswered = int(self.started * min(0.5, self.lag / max(0.001, seconds)))
        if seconds >= LONGEST_ROUND:
            return True
        shortest = max(SHORTEST_ROUND, GAIN / gain, ROUND_LAGS * self.lag)
        if self.started >= EXPECTED * (1 + gain) / gain and seconds >= shortest:
            return True
        if self.started < FEWEST_STARTS:
            return False
        return self.state is State.CRUISING and now >= self._probe_at and self.throttled <= 1

    @property
    def share(self) -> float:
        """The throttled share of the round's starts that are old enough to have a result."""
        return self.throttled / max(1, self.started - self._unanswered)

    @property
    def is_bad(self) -> bool:
        """Whether half of what a limit would throttle was throttled, beyond the noise."""
        excess = self.share - self._noise
        return self.throttled > 1 and (
            excess > self._gain / (1 + self._gain) / 2 or self.share > 0.5
        )

    @property
    def is_doubtful(self) -> bool:
        """Whether the latest throttles show that the rate is too high, before the round is over."""
        if self.state is State.PROBING:
            return self.doubt.odds >= PROBE_ODDS
        return self.state is State.CRUISING and self.doubt.odds >= CRUISE_ODDS

    @property
    def is_noise(self) -> bool:
        """Whether several cuts in a row did not lower the share. Then no limit causes it."""
        return self._cuts >= NOISE_CUTS and self._last_share / 2 < self.share <= 0.5

    def accept_noise(self, now: float) -> None:
        """Treat the share as noise, and raise the rate again soon."""
        self._noise, self._cuts = self.share, 0
        self._probe_at = now

    def cut(self, now: float, chance: float) -> None:
        """Lower the rate to what the service accepted, and cruise."""
        share, rate = self.share, self.rate
        if self.is_doubtful:
            share = min(LARGEST_CUT / (1 + self._cuts), self.doubt.share)
        if rate is None or not self.held:
            rate = self.started / max(0.05, now - self._round_at)
        before = rate
        rate = max(LOWEST_PACE, rate * (1 - share) * UNDERSHOOT)
        if self.state is State.PROBING:
            rate, before = self._limit_cut(rate), self._cruised_at
        else:
            self._cuts += 1
        if self.state is State.SEARCHING:
            self._changed_at = now
        elif not before / CHANGE <= rate <= before * CHANGE:
            self._changed_at = now - (now - self._changed_at) / SOONER
        self._set_rate(rate)
        self._cruise(now, chance)
        self._fresh, self._last_share = True, share

    def _limit_cut(self, rate: float) -> float:
        """Return the rate after a failed probe, given the rate that its throttles show."""
        assert self.rate is not None
        step = 1 + self._gain
        if self.rate > 1.01 * step * self._cruised_at:
            # The rate before was clean, and a full bucket hid at most one step.
            return max(rate, self.rate / step**2, self._cruised_at)
        if rate < self._cruised_at:
            return (max(rate, (1 - FAILED_PROBE) * self._cruised_at) + self._cruised_at) / 2
        return rate

    def step_back(self, now: float, chance: float) -> bool:
        """Undo the last step of a search, and cruise. Return whether a search was in progress.

        A full bucket hides the limit for a step or two. Then the next one is so far above it that
        most starts are throttled. A stall would cost seconds.
        """
        if self.state is not State.SEARCHING or self.rate is None:
            return False
        self._set_rate(self.rate / 2)
        self._changed_at, self._fresh = now, True
        self._cruise(now, chance)
        return True

    def pass_round(self, now: float, chance: float) -> None:
        """Act on a round that was not bad."""
        excess = self.share - self._noise
        steady = self.state not in (State.PROBING, State.SEARCHING)
        if excess < 0 or steady:
            memory = FRESH_STARTS if self._fresh else NOISE_STARTS
            self._noise += excess * self.started / (self.started + memory)
        self._fresh, self._cuts = False, 0
        if self.rate is None:
            return
        if not self.held:
            self.rate, self.state = None, State.WATCHED
            self._gain, self._changed_at = GAIN, now
        elif self.state is State.SEARCHING:
            self._set_rate(2 * self.rate)
            if self.rate >= self.ceiling:
                self._set_rate(self.ceiling)
                self.ceiling = inf
                self._cruise(now, chance)
        elif self.state is State.PROBING:
            if self._confirmed:
                self._gain = min(LARGEST_GAIN, 2 * self._gain)
                self._set_rate(self.rate * (1 + self._gain))
            self._confirmed = True  # a full bucket hides the first round of a probe
        elif now >= self._probe_at:
            self.state, self._confirmed, self._cruised_at = State.PROBING, False, self.rate
            self._gain = min(LARGEST_GAIN, GAIN + 1 / self.rate)  # low rates need larger steps
            self._set_rate(self.rate * (1 + self._gain))
            self.begin_climb(now)
        elif excess > 0:
            self._set_rate(self.rate * (1 - min(LARGEST_CUT, excess)))

    def _cruise(self, now: float, chance: float) -> None:
        self.state, self._gain = State.CRUISING, GAIN
        # The jitter keeps two clients of one limit from probing together forever.
        rest = min(LONGEST_REST, max(1.0, REST * (now - self._changed_at)))
        self._probe_at = now + rest * (0.75 + chance / 2)

    def _set_rate(self, rate: float) -> None:
        self.rate = max(LOWEST_PACE, rate)
        self.turnstile.interval = 1 / self.rate
