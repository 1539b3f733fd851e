"""What others may implement: sources and sinks of deliveries, and the ledger of bulk work.

Sources are recognised by their methods; no subclassing is needed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol, runtime_checkable

import attrs

from cloudinary_analyze.errors import AnalyzeError
from cloudinary_analyze.responses import Delivery, JSONObject, Response


@runtime_checkable
class NotificationSource(Protocol):
    """Where a session gets deliveries from: a queue, a broker, a mailbox.

    A source serves one session at a time. One that also has ``fetch`` is a `ReplayableSource`,
    one that also has ``acknowledge`` an `AcknowledgingSource`.
    """

    def listen(self) -> AsyncIterator[Delivery]:
        """Yield deliveries as they arrive.

        Returning means that nothing more will arrive: pending tasks fail. Raising means that the
        source broke: `listen` is called again after a pause, and everything pending is fetched.
        An async generator is closed when the session closes.
        """
        ...


@runtime_checkable
class ReplayableSource(NotificationSource, Protocol):
    """A source that also returns what was delivered earlier."""

    async def fetch(self, task_ids: Sequence[str]) -> Sequence[Delivery]:
        """Return the deliveries of these tasks that arrived earlier.

        The session asks, in batches, for each task once its id is known, for everything pending
        after `listen` broke, and for everything pending every 30 s.
        """
        ...


@runtime_checkable
class AcknowledgingSource(NotificationSource, Protocol):
    """A source that needs to know which deliveries were used."""

    def acknowledge(self, delivery: Delivery) -> None:
        """Note that a delivery of this source resolved a task, or was a duplicate.

        Must not block; acknowledge in batches.
        """
        ...


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
