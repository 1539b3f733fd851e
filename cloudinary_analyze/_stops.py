"""The requests that a stream no longer sends, and why. Pure."""

from __future__ import annotations

from typing import Any

import attrs

from cloudinary_analyze._cancellation import Sections
from cloudinary_analyze._policy import Stop
from cloudinary_analyze.errors import BulkStoppedError
from cloudinary_analyze.requests import AnalyzeRequest


@attrs.define(eq=False, repr=False)
class Stops:
    """The requests that are no longer sent, because the service would refuse them.

    Attributes:
        seen: The models of all requests so far, and their features.
        reasons: The kinds of requests that are refused, each with the error that showed it.
        unsent: Items in a row that were not sent for that reason.
        halted: Whether the caller stopped or closed the stream.
        waits: The waits of its calls between their attempts.
    """

    seen: dict[str, str | None] = attrs.field(factory=dict)
    reasons: dict[tuple[Stop, str], Exception] = attrs.field(factory=dict)
    unsent: int = 0
    halted: bool = False
    waits: Sections = attrs.field(factory=Sections)

    def halt(self) -> None:
        """Send nothing more: no request that queues, and no further attempt of any."""
        self.halted = True
        self.waits.interrupt_all()

    def check_halted(self) -> None:
        """Raise if nothing more is sent.

        Raises:
            BulkStoppedError: Nothing more is sent.
        """
        if self.halted:
            raise BulkStoppedError("Not sent, because the stream was stopped.")

    def check(self, request: AnalyzeRequest[Any]) -> None:
        """Raise if a request would be refused; called before it queues and is first sent.

        Raises:
            BulkStoppedError: Its kind is stopped. Nothing was sent.
        """
        self.check_halted()
        if not self.reasons:
            return
        reason = self.find(request.model, request.feature)
        if reason is None:
            self.unsent = 0
        else:
            self.unsent += 1
            raise BulkStoppedError(
                f"Not sent, because it would fail with an earlier error: {reason}", reason=reason
            ) from reason

    def find(self, model: str, feature: str | None) -> Exception | None:
        """Return why a kind of request is stopped. ``None`` if it is not."""
        reasons = self.reasons
        return (
            reasons.get((Stop.EVERYTHING, ""))
            or reasons.get((Stop.MODEL, model))
            or reasons.get((Stop.FEATURE, feature or ""))
        )

    def add(self, stop: Stop, request: AnalyzeRequest[Any], error: Exception) -> bool:
        """Stop a kind of request. Return whether every request so far was of this kind."""
        name = ""
        if stop is not Stop.EVERYTHING:
            feature = request.feature if stop is Stop.FEATURE else None
            stop, name = (Stop.FEATURE, feature) if feature else (Stop.MODEL, request.model)
        self.reasons.setdefault((stop, name), error)
        return all(self.find(model, feature) for model, feature in self.seen.items())
