"""Fault plans: which faults occur, how often, and for which sources. Deterministic per seed."""

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
    """The faults that an emulator injects, each with a probability from 0 to 1.

    ```python
    Emulator(faults=FaultPlan(error_503=0.1, lost=0.05))
    ```

    Faults of calls exclude one another, so their sum is at most 1. The sources that they affect
    depend on the seed, the model and the source. After ``fault_times`` faults, a source recovers.
    Faults of tasks are independent of one another, and stay with the task.

    Attributes:
        error_500: 500 with an error body. Nothing is done.
        error_502_html: 502 with an HTML page. Nothing is done.
        error_503: 503. Nothing is done.
        rate_limited_429: 429. Nothing is done, and no quota is used.
        reset_connection: The connection is reset before any work.
        drop_response: The connection is closed after the work. The call is done and charged.
        slow: The correct response arrives ``slow_seconds`` late.
        truncated_json: Half of the JSON is missing. The call is done and charged.
        fault_times: How many attempts for a source have a fault before it recovers. Default: 1.
        retry_after: The ``Retry-After`` of the 429 and 503, in seconds. ``None``: absent.
        slow_seconds: The delay of a slow response, in seconds. Default: 1.
        early: The notification is delivered before the 202 is sent.
        duplicated: The notification is delivered twice.
        delayed: The notification is sent ``delay_seconds`` late.
        lost: The notification is never sent.
        forged: A notification with a bad signature and a wrong result comes first.
        stale: A notification with a valid signature from three hours ago and a wrong result comes
            first.
        malformed: A notification with a valid signature, whose body is not JSON, comes first.
        foreign: A notification with a valid signature for an unknown task comes first.
        unrelated: A notification with a valid signature about an upload comes first.
        unknown_status: The status is ``queued_for_gpu`` while the task runs.
        failed: The task fails. Its notification has an error.
        delay_seconds: The delay of a delayed notification, in seconds. Default: 1.

    Raises:
        ValueError: A value is out of range, or the faults of calls add up to more than 1.
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
        """Return the fault of the calls for a source, or ``None``.

        Args:
            seed: The seed of the emulator.
            model: The model's name in URLs.
            source: The source as text.
        """
        roll = Entropy("http fault", str(seed), model, source).fraction()
        for name in HTTP_FAULTS:
            roll -= getattr(self, name)
            if roll < 0:
                return name
        return None

    def choose_task_faults(self, seed: int, model: str, source: str, turn: int) -> tuple[str, ...]:
        """Return the faults of a task.

        Args:
            seed: The seed of the emulator.
            model: The model's name in URLs.
            source: The source as text.
            turn: The number of the task for this source, from 1.
        """
        return tuple(self._choose_task_faults(Entropy(str(seed), model, source, str(turn))))

    def _choose_task_faults(self, entropy: Entropy) -> Iterator[str]:
        for name in TASK_FAULTS:
            if entropy.fraction() < getattr(self, name):
                yield name


@attrs.define(eq=False)
class FaultDesk:
    """Applies a plan to calls and tasks, and counts the faults of each source."""

    find_plan: Callable[[], FaultPlan | None]
    seed: int
    _hits: Counter[tuple[str, str]] = attrs.field(factory=Counter, init=False)
    _turns: Counter[tuple[str, str]] = attrs.field(factory=Counter, init=False)

    @property
    def plan(self) -> FaultPlan | None:
        """The current plan."""
        return self.find_plan()

    @property
    def delay_seconds(self) -> float:
        """The delay of a delayed notification, in seconds."""
        plan = self.plan
        return 0.0 if plan is None else plan.delay_seconds

    def choose_http_fault(self, model: str, source: str) -> str | None:
        """Return the fault of this attempt, and count it."""
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
