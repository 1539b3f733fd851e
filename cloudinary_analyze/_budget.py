"""`Budget`, the limits of what a stream may spend, and the account of what it has spent.

A call's cost is reserved before it queues, and settled once its outcome is known. If calls in
flight decide whether another call fits, that call waits for them. So a stream stops with nothing
reserved, and its figures are final.

This module neither sends nor counts: `Work` reserves and settles for its item.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from cloudinary_analyze._clock import wake_next
from cloudinary_analyze._values import Jsonable, quote
from cloudinary_analyze.errors import BudgetReachedError, ConfigurationError
from cloudinary_analyze.requests import MODELS
from cloudinary_analyze.responses import Limit


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _copy_units(units: Any) -> Any:
    return dict(units) if isinstance(units, Mapping) else units


@attrs.frozen(kw_only=True, repr=False, eq=False)
class Budget(Jsonable):
    """The limits of what one stream may spend. Responses restored from a ledger do not count.

    A call that is repeated because its task's result was not delivered
    (`Settings.on_missing_result`) counts again. A call counts once, however many attempts it
    takes, and not at all if it failed without a charge.

    ```python
    budget = Budget(calls=1_000, units={"ai_vision": 50_000})
    async with session.map(urls, Captioning, budget=budget) as outcomes:
        async for outcome in outcomes:
            print(outcome.item, outcomes.spent)
    ```

    Attributes:
        calls: The maximum number of calls, which is exact. ``None``: no limit.
        units: Add-on features (``ai_vision``, ``object_detection``, …) and their maximum units. A
            call waits or is refused if the units spent, plus the calls in flight and this call at
            the largest cost seen, would exceed the limit. The first call of a feature runs alone,
            because its cost is unknown. Only a call that costs more than every call before it can
            exceed the limit; see `Spent.overshoot`.

    Raises:
        ConfigurationError: A limit is not a whole number from 0, or ``units`` names a model.
    """

    calls: int | None = None
    units: Mapping[str, int] = attrs.field(factory=dict, converter=_copy_units, hash=False)

    def __attrs_post_init__(self) -> None:
        if self.calls is not None and not _is_count(self.calls):
            raise ConfigurationError(
                f"Budget.calls must be a whole number from 0, not {quote(self.calls)}."
            )
        if not isinstance(self.units, Mapping):
            raise ConfigurationError(
                f"Budget.units must map features to units, not {quote(self.units)}."
            )
        for feature, units in self.units.items():
            if not isinstance(feature, str) or not feature or not _is_count(units):
                raise ConfigurationError(
                    "Budget.units must map the name of a feature to a whole number from 0, not "
                    f"{quote(feature)} to {quote(units)}."
                )
            model = MODELS.get(feature)
            if model is not None and model.feature not in {None, feature}:
                raise ConfigurationError(
                    f"{feature!r} is a model. Its units are counted by its feature: "
                    f"Budget(units={{{model.feature!r}: {units}}})."
                )


@attrs.frozen(kw_only=True, repr=False, eq=False)
class Spent(Jsonable):
    """What a stream has spent so far.

    Attributes:
        calls: Calls that were charged, or may have been.
        units: Add-on features and their units, as the responses report them. A call whose response
            was lost counts with the largest cost seen.
        overshoot: Add-on features and their units above the limit. Empty if every limit was kept.
    """

    calls: int = 0
    units: Mapping[str, int] = attrs.field(factory=dict, hash=False)
    overshoot: Mapping[str, int] = attrs.field(factory=dict, hash=False)


@attrs.define(eq=False, repr=False)
class Spending:
    """The account of one stream.

    Attributes:
        budget: The limits.
    """

    budget: Budget
    _calls: int = attrs.field(default=0, init=False)
    _units: Counter[str] = attrs.field(factory=Counter, init=False)
    _largest: dict[str, int] = attrs.field(factory=dict, init=False)
    _reserved: Counter[str] = attrs.field(factory=Counter, init=False)
    _waiting: dict[str, deque[asyncio.Future[None]]] = attrs.field(factory=dict, init=False)

    @property
    def spent(self) -> Spent:
        """What was spent so far."""
        over = {
            feature: self._units[feature] - units
            for feature, units in self.budget.units.items()
            if self._units[feature] > units
        }
        return Spent(calls=self._calls, units=dict(self._units), overshoot=over)

    async def reserve(self, feature: str) -> None:
        """Reserve the cost of a call. Wait while calls in flight decide whether it fits.

        Cancelling is safe. Each reservation must be settled.

        Raises:
            BudgetReachedError: It does not fit.
        """
        waiting = self._waiting.setdefault(feature, deque())
        enter = waiting.append
        try:
            while not self._fits(feature):
                woken = asyncio.get_running_loop().create_future()
                enter(woken)
                await woken
                enter = waiting.appendleft  # a call that must wait again stays first
            self._reserved[feature] += 1
        finally:
            wake_next(waiting)

    def _fits(self, feature: str) -> bool:
        """Whether another call fits now. ``False``: calls in flight decide it.

        Raises:
            BudgetReachedError: It does not fit, whatever the calls in flight cost.
        """
        most = self.budget.calls
        if most is not None and self._calls + self._reserved.total() >= most:
            if self._calls >= most or not self._reserved.total():
                raise self.build_error(None)
            return False
        cap = self.budget.units.get(feature)
        if cap is None:
            return True
        spent, in_flight = self._units[feature], self._reserved[feature]
        largest = self._largest.get(feature)
        if spent < cap:
            if largest is None:
                return not in_flight
            if spent + (in_flight + 1) * largest <= cap:
                return True
        if not in_flight:
            raise self.build_error(feature)
        return False

    def settle(self, feature: str, limits: Iterable[Limit] | None, *, charged: bool) -> None:
        """Replace a reservation with the cost of the call.

        Args:
            feature: The feature of the reservation.
            limits: The limits of its response. ``None``: it has none, so the cost is estimated.
            charged: Whether it was charged, or may have been.
        """
        self._reserved[feature] -= 1
        if charged:
            self._calls += 1
            if limits is None:
                self._units[feature] += self._largest.get(feature, 0)
            else:
                self._largest.setdefault(feature, 0)
                for limit in limits:
                    used = limit.used_by_request or 0
                    self._units[limit.type] += used
                    self._largest[limit.type] = max(used, self._largest.get(limit.type, 0))
        for waiting in self._waiting.values():
            wake_next(waiting)

    def build_error(self, feature: str | None) -> BudgetReachedError:
        """Return the error for a limit that was reached, with the amounts spent."""
        spent = self.spent
        if feature is None:
            what = f"{spent.calls:,} of {self.budget.calls:,} calls"
        else:
            what = f"{spent.units.get(feature, 0):,} of {self.budget.units[feature]:,} units"
            what += f" of {feature}"
        return BudgetReachedError(
            f"The budget was reached: {what} were spent. No further items were sent for it.",
            feature=feature,
            calls=spent.calls,
            units=dict(spent.units),
            overshoot=dict(spent.overshoot),
        )
