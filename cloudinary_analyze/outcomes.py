"""`Outcome`: the result of one item of bulk work, `Answered` or `Failed`.

Both classes have the same fields, so an outcome narrows by ``outcome.error is None``, by
``isinstance`` and by ``match``.
"""

from __future__ import annotations

from typing import Any, Generic, NoReturn, TypeVar

import attrs

from cloudinary_analyze._values import Jsonable
from cloudinary_analyze.requests import AnalyzeRequest
from cloudinary_analyze.responses import Response

__all__ = ["Answered", "AnyOutcome", "Failed", "Outcome"]

Item_co = TypeVar("Item_co", covariant=True)
A_co = TypeVar("A_co", covariant=True)


@attrs.frozen(kw_only=True, repr=False, eq=False)
class Answered(Jsonable, Generic[Item_co, A_co]):
    """The outcome of an item that has a response.

    ```python
    async for outcome in session.map(urls, Captioning):
        match outcome:
            case Answered(item=url, response=response):
                print(url, response.analysis.caption)
            case Failed(item=url, error=error):
                print(url, "failed:", error)
    ```

    Attributes:
        item: The item, as the input yielded it.
        index: Its position in the input, from 0.
        request: The request that was built from it.
        response: The response.
        error: Always ``None``.
        restored: Whether this item was not charged for: its response was read from the ledger, or
            an equal request in flight received it.
        unrecorded: Whether the ledger failed before it could record the response. The stream
            stops, and a later run requests it again.
        seconds: Seconds from the start of the first attempt to the response (monotonic), retries
            included. For a restored response, the seconds of the attempts that led to it.
        queued: Seconds before that: the wait for a permit, a pause, a pace or the ledger.
    """

    item: Item_co
    index: int
    request: AnalyzeRequest[A_co]
    response: Response[A_co]
    error: None = attrs.field(default=None, init=False)
    restored: bool = False
    unrecorded: bool = False
    seconds: float = attrs.field(default=0.0, eq=False)
    queued: float = attrs.field(default=0.0, eq=False)

    def unwrap(self) -> Response[A_co]:
        """Return the response. `Failed.unwrap` raises instead."""
        return self.response


@attrs.frozen(kw_only=True, repr=False, eq=False)
class Failed(Jsonable, Generic[Item_co, A_co]):
    """The outcome of an item that has no response.

    Attributes:
        item: The item, as the input yielded it.
        index: Its position in the input, from 0.
        request: The request; ``None`` if none could be built from the item.
        response: Always ``None``.
        error: An `AnalyzeError`, or the exception that ``to_request`` or ``key`` raised.
        restored: Whether the error was read from the ledger; nothing was sent.
        unrecorded: Whether the ledger failed before it could record a permanent error.
        seconds: Seconds from the start of the first attempt to the error (monotonic), retries
            included. 0 if nothing was sent. For a restored error, what the ledger recorded.
        queued: Seconds before that: the wait for a permit, a pause, a pace or the ledger.
    """

    item: Item_co
    index: int
    error: Exception
    request: AnalyzeRequest[A_co] | None = None
    response: None = attrs.field(default=None, init=False)
    restored: bool = False
    unrecorded: bool = False
    seconds: float = attrs.field(default=0.0, eq=False)
    queued: float = attrs.field(default=0.0, eq=False)

    def unwrap(self) -> NoReturn:
        """Raise the error of this item.

        Raises:
            Exception: `error`.
        """
        raise self.error


Outcome = Answered[Item_co, A_co] | Failed[Item_co, A_co]
AnyOutcome = Outcome[Any, Any]
