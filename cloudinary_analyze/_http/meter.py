"""Counts what happens in a session, and tells the hook."""

from __future__ import annotations

import logging

import attrs

from cloudinary_analyze.events import Event, EventHook

logger = logging.getLogger("cloudinary_analyze")


@attrs.define(eq=False, repr=False)
class Meter:
    """The counts behind `AnalyzeSession.stats`, and the one place that calls ``on_event``.

    Callers test `hook` before they build an event: without one the happy path builds none.
    """

    hook: EventHook | None = None
    calls: int = 0
    attempts: int = 0
    retries: int = 0
    ambiguous_retries: int = 0
    pauses: int = 0
    in_flight: int = 0
    polls: int = 0
    notifications: dict[str, int] = attrs.field(factory=dict)

    def tell(self, event: Event) -> None:
        """Tell the hook of an event; what the hook raises is logged and goes no further."""
        if self.hook is None:
            return
        try:
            self.hook(event)
        except Exception:
            logger.exception("The on_event hook failed on %s.", type(event).__name__)
