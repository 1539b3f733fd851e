"""Fault plans: what goes wrong, how often, and to whom, decided by hash and seed alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final

import attrs

from cloudinary_analyze.emulator.gallery import Entropy

HTTP_FAULTS: Final = (
    "error_500",
    "error_502_html",
    "error_503",
    "rate_limited_429",
    "reset_connection",
    "drop_response",
    "slow",
    "truncated_json",
)
TASK_FAULTS: Final = (
    "early",
    "duplicated",
    "delayed",
    "lost",
    "forged",
    "stale",
    "malformed",
    "foreign",
    "unrelated",
    "unknown_status",
    "failed",
)


def _check_probability(_plan: Any, attribute: attrs.Attribute[float], value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{attribute.name} is a probability: give a number from 0 to 1.")


def _check_duration(_plan: Any, attribute: attrs.Attribute[Any], value: float | None) -> None:
    if value is not None and not value >= 0:
        raise ValueError(f"{attribute.name} is in seconds: give 0 or more.")


def _probability() -> float:
    field: float = attrs.field(default=0.0, validator=_check_probability)
    return field


def _seconds(default: float | None) -> Any:
    return attrs.field(default=default, validator=_check_duration)


@attrs.frozen(kw_only=True)
class FaultPlan:
    """What goes wrong, each as a probability from 0 to 1.

    Faults of calls exclude one another, so their sum is at most 1. Which sources are hit depends
    on seed, model and source alone; a source that was hit ``fault_times`` times is well again.
    Faults of tasks are independent of one another, and stay with the task.

    Attributes:
        error_500: Answered 500 with an error body, nothing done.
        error_502_html: Answered 502 with a page of HTML, nothing done.
        error_503: Answered 503, nothing done.
        rate_limited_429: Answered 429, nothing done and no quota used up.
        reset_connection: The connection is reset before any work.
        drop_response: The connection is closed after the work: done and charged, unanswered.
        slow: Answered rightly, ``slow_seconds`` late.
        truncated_json: Done and charged, but half of the JSON is missing.
        fault_times: How many attempts of a source are hit before it recovers.
        retry_after: What ``Retry-After`` of the 429 and 503 says, in seconds; ``None``: absent.
        slow_seconds: By how much a slow answer is late.
        early: The notification is delivered before the 202 is sent.
        duplicated: The notification is delivered twice.
        delayed: The notification is sent ``delay_seconds`` late.
        lost: The notification is never sent.
        forged: An extra notification with a bad signature and a wrong result comes first.
        stale: An extra one, rightly signed three hours ago, with a wrong result, comes first.
        malformed: An extra one, rightly signed, whose body is not JSON, comes first.
        foreign: An extra one, rightly signed, for a task that was never handed out.
        unrelated: An extra one, rightly signed, about an upload.
        unknown_status: The status says ``queued_for_gpu`` while the task runs.
        failed: The task fails; its notification has an error.
        delay_seconds: By how much a delayed notification is late.
    """

    error_500: float = _probability()
    error_502_html: float = _probability()
    error_503: float = _probability()
    rate_limited_429: float = _probability()
    reset_connection: float = _probability()
    drop_response: float = _probability()
    slow: float = _probability()
    truncated_json: float = _probability()
    fault_times: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    retry_after: float | None = _seconds(None)
    slow_seconds: float = _seconds(1.0)

    early: float = _probability()
    duplicated: float = _probability()
    delayed: float = _probability()
    lost: float = _probability()
    forged: float = _probability()
    stale: float = _probability()
    malformed: float = _probability()
    foreign: float = _probability()
    unrelated: float = _probability()
    unknown_status: float = _probability()
    failed: float = _probability()
    delay_seconds: float = _seconds(1.0)

    def __attrs_post_init__(self) -> None:
        total = sum(getattr(self, name) for name in HTTP_FAULTS)
        if total > 1 + 1e-9:
            raise ValueError(
                f"The faults of calls exclude one another, but their probabilities add up to "
                f"{total:g}. Lower them to a sum of at most 1."
            )

    def choose_http_fault(self, seed: int, model: str, source: str) -> str | None:
        """Return the fault that hits the calls of a source, if one does."""
        roll = Entropy("http fault", str(seed), model, source).fraction()
        for name in HTTP_FAULTS:
            roll -= getattr(self, name)
            if roll < 0:
                return name
        return None

    def choose_task_faults(self, seed: int, model: str, source: str, turn: int) -> tuple[str, ...]:
        """Return the faults that hit the ``turn``-th task of a source."""
        return tuple(self._choose_task_faults(Entropy(str(seed), model, source, str(turn))))

    def _choose_task_faults(self, entropy: Entropy) -> Iterator[str]:
        for name in TASK_FAULTS:
            if entropy.fraction() < getattr(self, name):
                yield name


@attrs.define(eq=False)
class FaultDesk:
    """Applies a plan to calls and remembers which sources have had their share."""

    find_plan: Callable[[], FaultPlan | None]
    seed: int
    _hits: Counter[tuple[str, str]] = attrs.field(factory=Counter, init=False)
    _turns: Counter[tuple[str, str]] = attrs.field(factory=Counter, init=False)

    @property
    def plan(self) -> FaultPlan | None:
        """The plan of this moment."""
        return self.find_plan()

    @property
    def delay_seconds(self) -> float:
        """By how much a delayed notification is late."""
        plan = self.plan
        return 0.0 if plan is None else plan.delay_seconds

    def choose_http_fault(self, model: str, source: str) -> str | None:
        """Return the fault of this attempt, and count it as had."""
        plan = self.plan
        if plan is None:
            return None
        fault = plan.choose_http_fault(self.seed, model, source)
        if fault is None or self._hits[model, source] >= plan.fault_times:
            return None
        self._hits[model, source] += 1
        return fault

    def choose_task_faults(self, model: str, source: str) -> tuple[str, ...]:
        """Return the faults of a source's next task."""
        plan = self.plan
        if plan is None:
            return ()
        self._turns[model, source] += 1
        return plan.choose_task_faults(self.seed, model, source, self._turns[model, source])
