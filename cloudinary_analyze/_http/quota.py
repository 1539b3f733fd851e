"""What is known of the account's quotas, and a breaker for each feature whose quota is used up."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import attrs

from cloudinary_analyze._clock import Clock
from cloudinary_analyze.errors import QuotaExceededError
from cloudinary_analyze.responses import Limit

PROBE_INTERVAL: Final = 300.0


@attrs.define(eq=False, repr=False)
class _Breaker:
    error: QuotaExceededError
    probe_at: float  # monotonic


@attrs.define(eq=False, repr=False)
class Quota:
    """The lowest remainder seen of each feature, and which features are used up.

    A used up feature fails at once, unsent, until its reset time; where the service told none,
    one call every few minutes is let through, and the first that succeeds opens the way again.
    A remainder of 0 on a success says nothing: the account may go on all the same.
    """

    clock: Clock
    breakers: dict[str, _Breaker] = attrs.field(factory=dict)
    _limits: dict[str, Limit] = attrs.field(factory=dict)

    @property
    def limits(self) -> Mapping[str, Limit]:
        """Feature to its limit, with the lowest remainder seen in this period."""
        return MappingProxyType(dict(self._limits))

    def learn(self, limits: tuple[Limit, ...]) -> None:
        """Take note of what an answer says. Answers come in any order, so the lowest counts."""
        for limit in limits:
            known = self._limits.get(limit.type)
            if (
                known is None
                or known.remaining is None
                or limit.limit != known.limit
                or limit.reset_time != known.reset_time
                or (limit.remaining is not None and limit.remaining < known.remaining)
            ):
                self._limits[limit.type] = limit

    def check(self, feature: str) -> bool:
        """Return if a call may be sent, and whether it is the probe of a used up feature.

        Raises:
            QuotaExceededError: The feature's quota is known to be used up; nothing was sent.
        """
        breaker = self.breakers.get(feature)
        if breaker is None:
            return False
        now = self.clock.monotonic()
        if now < breaker.probe_at:
            raise build_unsent_error(breaker.error, seconds=breaker.probe_at - now)
        if breaker.error.reset_time is not None:
            del self.breakers[feature]
            return False
        breaker.probe_at = now + PROBE_INTERVAL
        return True

    def trip(self, feature: str, error: QuotaExceededError) -> None:
        """Take note that a feature's quota is used up."""
        wait = PROBE_INTERVAL
        if error.reset_time is not None:
            wait = max(0.0, error.reset_time - self.clock.wall())
        self.breakers[feature] = _Breaker(error, self.clock.monotonic() + wait)

    def reset(self, feature: str) -> None:
        """Take note that a probe succeeded. What was sent before the trip tells nothing."""
        self.breakers.pop(feature, None)


def build_unsent_error(error: QuotaExceededError, *, seconds: float) -> QuotaExceededError:
    """Return the error for a call that was not sent because of an earlier answer."""
    fields = {name: value for name, value in vars(error).items() if name != "message"}
    fields["attempts"], fields["ambiguous"] = 0, False  # that was the other call's
    then = "the quota is renewed" if error.reset_time is not None else "it is tried again"
    return QuotaExceededError(
        f"Not sent: the quota of the add-on feature {error.feature or 'of this model'!r} was used "
        f"up at an earlier call; in {seconds:.0f} s {then}.",
        **fields,
    )
