"""Quotas of add-on features, and the ``limits`` that report them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import attrs

from cloudinary_analyze.emulator.models import FREE_PLAN
from cloudinary_analyze.emulator.validation import QUOTA_EXCEEDED, Refusal


@attrs.frozen
class Charge:
    """The units that one call used of a feature's quota, and the remainder."""

    feature: str
    used: int
    remaining: int
    limit: int


class QuotaExhausted(Refusal):
    """The 429 of a feature whose quota is used up, with the limits."""

    def __init__(self, charge: Charge) -> None:
        super().__init__(
            429,
            "quota exceeded",
            category="rate_limit_error",
            code=QUOTA_EXCEEDED,
            details={"feature_name": charge.feature},
        )
        self.charge = charge


@attrs.define(eq=False)
class QuotaBook:
    """Charges calls to quotas.

    Without quotas nothing runs out. Every response shows the free plan with only its own charge.

    Attributes:
        quotas: Units per feature. Other features have no quota. ``None``: no quotas at all.
        reset_time: The end of the period in ``limits``. ``None``: left out, as by the live service.
    """

    quotas: Mapping[str, int] | None
    reset_time: datetime | None
    _remaining: dict[str, int] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.refill(self.quotas)

    def refill(self, quotas: Mapping[str, int] | None) -> None:
        """Begin a period with these quotas."""
        self.quotas = quotas
        self._remaining = dict(quotas or {})

    def charge(self, feature: str, cost: int) -> Charge:
        """Charge a call.

        The cost of a call is known only afterwards, so the last call may cost more than the
        remainder.

        Raises:
            QuotaExhausted: The quota is used up. Nothing was charged.
        """
        if feature not in self._remaining or self.quotas is None:
            limit = FREE_PLAN[feature]
            return Charge(feature, cost, limit - cost, limit)
        left, limit = self._remaining[feature], self.quotas[feature]
        if left <= 0:
            raise QuotaExhausted(Charge(feature, 0, 0, limit))
        self._remaining[feature] = left = max(0, left - cost)
        return Charge(feature, cost, left, limit)

    def build_limits(self, charge: Charge) -> dict[str, Any]:
        """Return ``limits`` in the shape that the live service sends."""
        entry: dict[str, Any] = {
            "type": charge.feature,
            "used_by_request": charge.used,
            "remaining": charge.remaining,
            "limit": charge.limit,
        }
        if self.reset_time is not None:
            moment = self.reset_time.astimezone(UTC)
            entry["reset_time"] = moment.isoformat(timespec="seconds").replace("+00:00", "Z")
        return {"addons_quota": [entry]}
