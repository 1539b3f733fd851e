"""The counts of a session, and the one place that calls its hook.

The module does not import the events. The first session with a hook imports them, because most
sessions have none.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs

from cloudinary_analyze._values import Jsonable

if TYPE_CHECKING:
    from cloudinary_analyze.events import Event, EventHook

logger: logging.Logger = logging.getLogger("cloudinary_analyze.events")


def _copy_counts(counts: Mapping[str, int]) -> Mapping[str, int]:
    return dict(counts)


@attrs.frozen(kw_only=True, repr=False, eq=False)
class SessionStats(Jsonable):
    """A snapshot of a session's statistics since it was created.

    Attributes:
        calls: Analyze calls begun.
        attempts: HTTP attempts of analyze calls.
        retries: Attempts that were repeated.
        ambiguous_retries: Repeated attempts that may have been charged already.
        ambiguous_failures: Calls that ended without a response, and whose last attempt may have
            been charged. A cancelled call is one if its attempt was in flight.
        pauses: How often all attempts had to wait, because the service refused or failed everything
            or asked for a pause.
        probes: Attempts that tested whether a pause can end.
        in_flight: Analyze calls begun and not finished.
        permits_in_use: Attempts in flight now.
        permits_allowed: Attempts allowed at once now: fewer than the setting while the service
            limits them, and 1 during a pause.
        pace: Attempts per second that the service was found to allow. ``None`` while no limit is
            known.
        waiting: Attempts queueing for a permit now.
        polls: Status polls made.
        accepted: Tasks that the service accepted.
        pending: Tasks accepted and not yet done.
        parked: Notifications that arrived before their task was known here.
        notifications: Deliveries read, by verdict.
    """

    calls: int = 0
    attempts: int = 0
    retries: int = 0
    ambiguous_retries: int = 0
    ambiguous_failures: int = 0
    pauses: int = 0
    probes: int = 0
    in_flight: int = 0
    permits_in_use: int = 0
    permits_allowed: int = 0
    pace: float | None = None
    waiting: int = 0
    polls: int = 0
    accepted: int = 0
    pending: int = 0
    parked: int = 0
    # a copy, because the session keeps counting
    notifications: Mapping[str, int] = attrs.field(factory=dict, converter=_copy_counts, hash=False)


@attrs.define(eq=False, repr=False)
class Meter:
    """The counts behind `AnalyzeSession.stats`, and the only caller of ``on_event``.

    Callers check `hook` before they build an event, so that nothing is built without a hook.
    """

    hook: EventHook | None = None
    calls: int = 0
    attempts: int = 0
    retries: int = 0
    ambiguous_retries: int = 0
    ambiguous_failures: int = 0
    pauses: int = 0
    in_flight: int = 0
    polls: int = 0
    accepted: int = 0
    notifications: dict[str, int] = attrs.field(factory=dict)
    watched: int = 0  # the number of the last call or poll that events name

    @property
    def counts(self) -> dict[str, Any]:
        """The counts, by their names in `SessionStats`."""
        hidden = attrs.filters.exclude("hook", "watched")
        return attrs.asdict(self, recurse=False, filter=hidden)

    def count(
        self,
        verdict: str,
        task_id: str | None = None,
        *,
        queued: float | None = None,
        trace: str | None = None,
    ) -> None:
        """Count a delivery by its verdict."""
        self.notifications[verdict] = self.notifications.get(verdict, 0) + 1
        if self.hook is not None:
            from cloudinary_analyze.events import NotificationSeen

            self.emit(
                NotificationSeen(verdict=verdict, task_id=task_id, queued=queued, trace=trace)
            )

    def emit(self, event: Event) -> None:
        """Pass an event to the hook. Its exceptions are logged and not raised."""
        if self.hook is not None:
            _call(self.hook, event)

    def add_hook(self, hook: EventHook) -> None:
        """Add a hook, to be called after the existing ones."""
        first = self.hook

        def call_both(event: Event) -> None:
            if first is not None:
                _call(first, event)
            _call(hook, event)

        self.hook = hook if first is None else call_both


def _call(hook: EventHook, event: Event) -> None:
    try:
        hook(event)
    except (Exception, asyncio.CancelledError):  # raised by the hook, which cannot await
        logger.exception("The on_event hook failed on %s.", type(event).__name__)
