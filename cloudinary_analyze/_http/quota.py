"""The known quotas of the account, and a breaker for each feature whose quota is used up."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import attrs

from cloudinary_analyze._clock import Clock
from cloudinary_analyze._meter import Meter
from cloudinary_analyze.errors import QuotaExceededError, RemoteError, build_unsent
from cloudinary_analyze.responses import Limit, read_limits

PROBE_INTERVAL: Final = 300.0
MOST_TYPES: Final = 1000  # of limits; an account has a few
UNREAD: Final = 64  # responses of a feature; each is newer than the ones before


@attrs.define(eq=False, repr=False)
class _Breaker:
    error: QuotaExceededError
    since: float  # monotonic, like the next
    probe_at: float


@attrs.define(eq=False, repr=False)
class _Known:
    limit: Limit
    newest: int  # the number of the last attempt that had begun when the figures arrived


@attrs.define(eq=False, repr=False)
class Quota:
    """The newest figures of each feature, and which features are used up.

    Calls of a feature that is used up fail at once, unsent, until its reset time. If the service
    sent none, one call every few minutes is let through, and the first that succeeds closes the
    breaker. A remainder of 0 in a successful response is not an exhausted quota: some accounts may
    continue.

    Attributes:
        clock: For the breakers.
        permits: Attempts in flight at most.
        meter: Counts the attempts that have begun.
        breakers: The breakers, by feature.
    """

    clock: Clock
    permits: int = 64
    meter: Meter = attrs.field(factory=Meter)
    breakers: dict[str, _Breaker] = attrs.field(factory=dict)
    _renewed: dict[str, float] = attrs.field(factory=dict)  # monotonic
    _known: dict[str, _Known] = attrs.field(factory=dict)
    _unread: dict[str, deque[tuple[Any, int, int]]] = attrs.field(factory=dict)

    @property
    def limits(self) -> Mapping[str, Limit]:
        """The newest figures by feature: the lowest remainder of the newest period."""
        for feature in list(self._unread):
            for raw, number, newest in self._unread.pop(feature):
                self._learn(read_limits(raw), number, newest)
        return MappingProxyType({feature: known.limit for feature, known in self._known.items()})

    def note(self, feature: str, raw: Any, *, number: int) -> None:
        """Keep the limits of a response as received, until they are needed; see `learn`.

        Reading them costs more than the rest of a small response.
        """
        unread = self._unread.get(feature)
        if unread is None:
            unread = self._unread[feature] = deque(maxlen=UNREAD)
        unread.append((raw, number, self.meter.attempts))

    def learn(self, limits: tuple[Limit, ...], *, number: int) -> None:
        """Record the limits of a response. Responses of attempts in flight arrive in any order.

        Args:
            limits: The limits.
            number: The number of the attempt, in the order in which attempts begin.
        """
        self._learn(limits, number, self.meter.attempts)

    def _learn(self, limits: tuple[Limit, ...], number: int, newest: int) -> None:
        for limit in limits:
            known = self._known.get(limit.type)
            if known is None:
                if len(self._known) < MOST_TYPES:
                    self._known[limit.type] = _Known(limit, newest)
                continue
            size = limit.limit or 0
            later = number > known.newest  # it began after the known figures arrived
            if later:
                least_rise = min(self.permits, size / 10) if size else self.permits
            else:
                least_rise = max(newest - number + self.permits, size / 2)
            if is_newer(limit, known.limit, least_rise=least_rise):
                known.limit = limit
                if later:
                    known.newest = newest

    def check(self, feature: str) -> bool:
        """Return whether a call is the probe of an exhausted feature. Raise if it may not be sent.

        Raises:
            QuotaExceededError: The feature's quota is known to be used up. Nothing was sent.
        """
        breaker = self.breakers.get(feature)
        if breaker is None:
            return False
        now = self.clock.monotonic()
        if now < breaker.probe_at:
            raise build_unsent_error(breaker.error, seconds=breaker.probe_at - now)
        if breaker.error.reset_time is not None:
            self.reset(feature)
            return False
        breaker.probe_at = now + PROBE_INTERVAL
        return True

    def take_failure(
        self,
        feature: str,
        error: RemoteError,
        *,
        number: int,
        since: float = math.inf,
    ) -> None:
        """Record what the failure of a call or a task shows about a quota.

        Args:
            feature: The feature that the call or task is charged to. Empty if unknown.
            error: The failure.
            number: As for `learn`.
            since: Monotonic instant when the service accepted the task. If the feature was reset
                later, it stays open.
        """
        self.learn(error.limits, number=number)
        if not feature or not isinstance(error, QuotaExceededError):
            return
        if since >= self._renewed.get(feature, since):
            self.trip(feature, error)

    def trip(self, feature: str, error: QuotaExceededError) -> None:
        """Record that a feature's quota is used up."""
        wait = PROBE_INTERVAL
        if error.reset_time is not None:
            wait = max(0.0, error.reset_time - self.clock.wall())
        elif feature in self.breakers:
            return  # tasks can fail for hours, and each would delay the probe
        now = self.clock.monotonic()
        self.breakers[feature] = _Breaker(error, now, now + wait)

    def take_result(self, feature: str, *, since: float) -> None:
        """Record the result of a task that the service accepted at a monotonic instant."""
        breaker = self.breakers.get(feature)
        if breaker is not None and since > breaker.since:
            self.reset(feature)

    def reset(self, feature: str, *, accepted: bool = False) -> None:
        """Record that a quota was reset. Earlier responses do not count any more.

        Args:
            feature: The feature.
            accepted: Whether the service only accepted a task. This proves nothing if an accepted
                task has failed for the quota; only a task's result does.
        """
        breaker = self.breakers.get(feature)
        if breaker is None or (accepted and breaker.error.task_id is not None):
            return
        del self.breakers[feature]
        self._renewed[feature] = self.clock.monotonic()


def is_newer(limit: Limit, known: Limit, *, least_rise: float) -> bool:
    """Whether limits are newer than others. Their order of arrival does not decide it.

    Within a period the lower remainder is the newer one. A new period has a later reset time or,
    where the service sends none, a remainder that rises clearly.

    Args:
        limit: The figures.
        known: The others.
        least_rise: A rise above this is a new period.
    """
    if limit.reset_time != known.reset_time:
        if limit.reset_time is None or known.reset_time is None:
            return limit.reset_time is not None
        return limit.reset_time > known.reset_time
    if limit.remaining is None or known.remaining is None:
        return known.remaining is None
    if limit.limit != known.limit:
        return True  # the account has another plan
    rise = limit.remaining - known.remaining
    return rise < 0 or (limit.reset_time is None and rise > least_rise)


def build_unsent_error(error: QuotaExceededError, *, seconds: float) -> QuotaExceededError:
    """Return the error for a call that was not sent because of an earlier response."""
    then = "the quota is renewed" if error.reset_time is not None else "it is tried again"
    unsent = build_unsent(
        error,
        f"Not sent: the quota of the add-on feature {error.feature or 'of this model'!r} was used "
        f"up at an earlier request; in {seconds:.0f} s {then}.",
    )
    unsent.task_id = None  # the original value belongs to the other request
    return unsent
