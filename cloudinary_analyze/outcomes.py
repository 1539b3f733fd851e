"""`Outcome`: what became of one item of bulk work."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import attrs

from cloudinary_analyze.requests import AnalyzeRequest
from cloudinary_analyze.responses import Response

Item = TypeVar("Item")
A = TypeVar("A")


@attrs.frozen(kw_only=True)
class Outcome(Generic[Item, A]):
    """What became of one item: a response or an error, never both, never neither.

    Attributes:
        item: The item, as the input gave it.
        index: Its place in the input, from 0.
        request: What was asked; ``None`` if no request could be made of the item.
        response: The answer, on success.
        seconds: From the item's pull to its answer (monotonic), queueing and retries included.
        error: Why there is none. An `AnalyzeError`, or whatever ``to_request`` raised.
    """

    item: Item
    index: int
    request: AnalyzeRequest[A] | None = None
    response: Response[A] | None = None
    error: Exception | None = None
    seconds: float = attrs.field(default=0.0, eq=False)

    def unwrap(self) -> Response[A]:
        """Return the response, or raise the error."""
        if self.response is not None:
            return self.response
        assert self.error is not None
        raise self.error


AnyOutcome = Outcome[Any, Any]
