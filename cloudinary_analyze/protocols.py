"""What others may implement: sources and sinks of deliveries, and the ledger of bulk work.

.. include:: docs/extending.md
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

import attrs

from cloudinary_analyze._values import Described
from cloudinary_analyze.errors import AnalyzeError
from cloudinary_analyze.responses import Delivery, JSONObject, Response

__all__ = [
    "AcknowledgingSource",
    "Claim",
    "Ledger",
    "LedgerRecord",
    "NotificationSink",
    "NotificationSource",
    "ReplayableSource",
    "TraceCarrier",
]


@runtime_checkable
class NotificationSource(Protocol):
    """Where a session gets deliveries from: a queue, a broker, a mailbox.

    A source serves one session at a time. One that also has ``fetch`` is a `ReplayableSource`,
    one that also has ``acknowledge`` an `AcknowledgingSource`.
    """

    def listen(self) -> AsyncIterator[Delivery]:
        """Yield deliveries as they arrive.

        If it returns, nothing more will arrive, and pending tasks fail with
        `NotificationSourceError`. If it raises, the session calls it again after a pause and
        fetches everything pending. The session cancels the wait for the next delivery when it
        closes, and closes an async generator.
        """
        ...


@runtime_checkable
class ReplayableSource(NotificationSource, Protocol):
    """A source that also returns what was delivered earlier."""

    async def fetch(self, task_ids: Sequence[str]) -> Sequence[Delivery]:
        """Return the deliveries of these tasks that arrived earlier.

        The session asks, in batches, for each task once its id is known, for everything pending
        after `listen` broke, and for everything pending every 30 s. It cancels a fetch when it
        closes.

        Args:
            task_ids: The tasks that are pending.
        """
        ...


@runtime_checkable
class AcknowledgingSource(NotificationSource, Protocol):
    """A source that needs to know which deliveries were used."""

    def acknowledge(self, delivery: Delivery) -> None:
        """Note that a delivery of this source resolved a task, or was a duplicate.

        Must not block. Acknowledge in batches.

        Args:
            delivery: An object that `listen` or ``fetch`` returned.
        """
        ...


class NotificationSink(Protocol):
    """Where a receiver puts verified deliveries. A plain ``asyncio.Queue[Delivery]`` is one."""

    async def put(self, delivery: Delivery, /) -> None:
        """Store a delivery. The sender gets 200 only after this returns.

        Must be safe to cancel: a receiver cancels it after 20 s. The sender then gets 503 and sends
        the delivery again.

        Raises:
            Exception: The delivery was not stored. The sender gets 503 and tries again.
        """
        ...


TRACE_HEADER: Final = "traceparent"
FollowPut: TypeAlias = Callable[[str, Awaitable[str | None]], Awaitable[None]]


@runtime_checkable
class TraceCarrier(Protocol):
    """A source or sink that carries trace contexts; used by `cloudinary_analyze.telemetry`.

    A context is the value of a ``traceparent`` header (W3C), followed by a space and the value of
    ``tracestate`` if there is one. The deliveries that it yields have it as their header
    ``traceparent`` if the context of their task is known.
    """

    def note_trace(self, task_id: str, trace: str) -> None:
        """Keep the trace context of a task that was submitted. Must not block.

        Args:
            task_id: The task.
            trace: The context.
        """
        ...

    def carry_traces(self, follow: FollowPut) -> None:
        """Begin to carry contexts.

        Args:
            follow: Awaited by ``put`` with the task id and an awaitable: that stores the delivery
                and returns the context of its task, or ``None``.
        """
        ...


@attrs.frozen(kw_only=True, repr=False, eq=False)
class LedgerRecord(Described):
    """What a ledger knows about one request key.

    Attributes:
        key: See `AnalyzeRequest.key`.
        task_id: The task that was submitted for the key, if any.
        response: The JSON of the final response as received, if any.
        error: The final error, if any.
        seconds: How long the attempts took that led to the response or error, if any.
        source: What `Ledger.note_source` noted last, if anything.
    """

    key: str
    task_id: str | None = None
    response: JSONObject | None = None
    error: AnalyzeError | None = None
    seconds: float | None = None
    source: str | None = None

    @property
    def final(self) -> bool:
        """Whether the key has a response or a final error, so nothing is sent for it."""
        return self.response is not None or self.error is not None


@attrs.frozen(kw_only=True, repr=False, eq=False)
class Claim(Described):
    """The exclusive right of one worker to send a request for a key.

    Attributes:
        task_id: The task that an earlier holder submitted. Re-attach to it instead of sending.
        ambiguous: Whether an earlier holder may have sent the request and then vanished.
    """

    task_id: str | None = None
    ambiguous: bool = False


class Ledger(ABC):
    """Stores, per request key, the submitted task id and the final response or error.

    Lets bulk jobs be interrupted at any time without knowingly paying for the same item twice.
    Subclass it and implement the abstract methods. The defaults of `claim`, `watch` and `release`
    fit a ledger with one writer; override them together in a ledger that several workers share.

    A ledger belongs to one host and cloud name. A session opens it but never closes it.

    When a ``record_`` method returns, its record is durable. Each call notes its record before its
    first ``await``, so cancelling the wait loses nothing. An error or a task never replaces a
    response, and a task never replaces an error. Any exception from any method stops the stream.

    A ledger that cannot be written for a while denies claims, so nothing is sent meanwhile, and
    keeps its records in memory. How long it tries before it raises is up to the ledger.
    """

    @abstractmethod
    async def open(self, *, base_url: str, cloud_name: str) -> None:
        """Open the ledger for a session. Idempotent. Must be safe to cancel.

        Args:
            base_url: ``scheme://host[:port]`` of the service.
            cloud_name: The product environment.

        Raises:
            LedgerError: It is damaged, not a ledger, or of another host or cloud name. It is left
                unchanged.
        """

    @abstractmethod
    async def find(self, key: str) -> LedgerRecord | None:
        """Return what is known about a key, including everything recorded before the call.

        Must be safe to cancel.

        Args:
            key: See `AnalyzeRequest.key`.
        """

    @abstractmethod
    async def record_submitted(self, key: str, task_id: str | None) -> None:
        """Record the task that was submitted for a key. It replaces an earlier task.

        Cancelling the wait must not lose the record.

        Args:
            key: See `AnalyzeRequest.key`.
            task_id: The task. ``None``: the recorded task failed for a transient reason, so the next
                run sends the request again.
        """

    @abstractmethod
    async def record_response(self, key: str, response: Response[Any], *, seconds: float) -> None:
        """Record a final response. Cancelling the wait must not lose the record.

        Args:
            key: See `AnalyzeRequest.key`.
            response: The response. Store its ``raw``.
            seconds: How long its attempts took.
        """

    @abstractmethod
    async def record_error(self, key: str, error: AnalyzeError, *, seconds: float) -> None:
        """Record a final error. Cancelling the wait must not lose the record.

        Args:
            key: See `AnalyzeRequest.key`.
            error: The error. It can be pickled.
            seconds: How long its attempts took.
        """

    async def claim(self, key: str) -> Claim | None:
        """Claim the right to send a request for a key. Never waits for other workers.

        Called immediately before the first attempt of a request. A ``record_`` method for a final
        response or error, or `release`, ends the claim. A cancelled call must leave no claim.

        Args:
            key: See `AnalyzeRequest.key`.

        Returns:
            ``None`` if another worker holds the claim, the key is final, or nothing can be recorded
            at the moment: call `watch`, then `find` again.
        """
        record = await self.find(key)
        if record is None:
            return Claim()
        return None if record.final else Claim(task_id=record.task_id)

    async def watch(self, key: str) -> None:  # noqa: B027 -- one writer never waits for another
        """Return when `find` or `claim` may have a new result for a key that was denied.

        Must be safe to cancel.

        Args:
            key: See `AnalyzeRequest.key`.
        """

    def release(self, key: str, *, ambiguous: bool) -> None:  # noqa: B027 -- nothing is held
        """Give up the claim on a key without a response. Must not block.

        Args:
            key: See `AnalyzeRequest.key`.
            ambiguous: Whether the request may have been sent, accepted and charged.
        """

    async def note_source(self, key: str, source: str) -> None:  # noqa: B027 -- a safeguard
        """Note the source that a key names, before its request is sent.

        Called for items that ``key=`` names. `find` returns it as `LedgerRecord.source`, so that
        another source under the same key is refused. Durable no later than the next record, also
        if the call is cancelled.

        Args:
            key: See `AnalyzeRequest.key`.
            source: The source as text.
        """

    async def note_item(  # noqa: B027 -- for ledgers that can be exported
        self, key: str, *, source: str, model: str, index: int
    ) -> None:
        """Note an item of a stream before its request is sent, so that it can be exported.

        Need not be durable when it returns, but no later than the next record, also if the call is
        cancelled.

        Args:
            key: The key of its request.
            source: What is analyzed, as text.
            model: The model's name.
            index: Its position in the input of its stream, from 0.
        """
