"""What others may implement: sources and sinks of deliveries, and the ledger of bulk work."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import attrs

from cloudinary_analyze.errors import AnalyzeError
from cloudinary_analyze.responses import Delivery, JSONObject, Response


class NotificationSource(Protocol):
    """Where a session gets deliveries from: a queue, a broker, a mailbox.

    Subclass it and write `listen`; the other two have a default that fits a source without
    memory. One session uses one source; the session alone iterates it.
    """

    def listen(self) -> AsyncIterator[Delivery]:
        """Yield deliveries as they come; begun anew after an error, with backoff.

        Ending it means that nothing will come any more: what is pending fails. Raising means
        that the source broke: `listen` is called again, and all that is pending is fetched.
        An async generator is closed when the session closes.
        """
        ...

    async def fetch(self, task_ids: Sequence[str]) -> Sequence[Delivery]:  # noqa: ARG002
        """Return what was delivered for these tasks earlier, where the source has a memory.

        Asked for each task once it is known, in batches, and for all that is pending after
        `listen` broke.
        """
        return ()

    def settle(self, delivery: Delivery) -> None:  # noqa: ARG002
        """Take note that a delivery resolved a task here, so that it can be acknowledged.

        Must not block; acknowledge in batches.
        """
        return


class NotificationSink(Protocol):
    """Where a receiver puts verified deliveries. A plain ``asyncio.Queue[Delivery]`` is one."""

    async def put(self, delivery: Delivery, /) -> None:
        """Return once the delivery is stored; the sender is told 200 only then."""
        ...


@attrs.frozen(kw_only=True)
class LedgerRecord:
    """What a ledger knows of one request key.

    Attributes:
        key: See `AnalyzeRequest.key`.
        task_id: The task that was submitted for it, if one was.
        response: The final response's JSON as received, if there is one.
        error: The final error, if there is one.
        seconds: How long the answer took, queueing and retries included, if there is one.
    """

    key: str
    task_id: str | None = None
    response: JSONObject | None = None
    error: AnalyzeError | None = None
    seconds: float | None = None


class Ledger(Protocol):
    """What remembers, per request key, the submitted task id and the final response or error.

    So that bulk work can be killed at any moment and knowingly pays twice for nothing. A ledger
    belongs to one host and cloud name, and to who made it: a session opens it, but never closes
    it.

    What a ``record_`` method returned for is durable. The first of its statements takes note of
    what is to be recorded, so cancelling the wait loses nothing. A response is never replaced by
    an error or a task, an error never by a task. Whatever a method raises stops the stream.
    """

    async def open(self, *, base_url: str, cloud_name: str) -> None:
        """Open it for a session; idempotent.

        Args:
            base_url: ``scheme://host[:port]`` of the service.
            cloud_name: The product environment.

        Raises:
            LedgerError: It is damaged, foreign, or of another host or cloud; it is left untouched.
        """
        ...

    async def find(self, key: str) -> LedgerRecord | None:
        """Return what is known of a key, with all that was recorded before."""
        ...

    async def record_submitted(self, key: str, task_id: str) -> None:
        """Remember the task that was submitted for a key; it replaces an earlier task."""
        ...

    async def record_response(self, key: str, response: Response[Any], *, seconds: float) -> None:
        """Remember a final response, and how long it took."""
        ...

    async def record_error(self, key: str, error: AnalyzeError, *, seconds: float) -> None:
        """Remember a final error, and how long it took."""
        ...
