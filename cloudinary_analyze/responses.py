"""Plain values that came from the service: responses, limits, statuses, deliveries.

Only values enter here: no I/O, no decoding, nothing that knows a model. Hints are resolved
at run time by `_wire.structure`, so nothing is imported for type checking only.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Generic, TypeVar

import attrs

A_co = TypeVar("A_co", covariant=True)

JSONObject = Mapping[str, Any]


@attrs.frozen
class Limit:
    """One entry of an answer's ``limits``: how much of an add-on's quota is left.

    The service has sent three shapes of ``limits`` over time; all three are read into this one.

    Attributes:
        type: The add-on feature that is counted (``ai_vision``, ``object_detection``, …).
        used_by_request: Units that this request cost (AI Vision: tokens), if told.
        remaining: Units left in the period, if told.
        limit: Units in the period, if told.
        reset_time: When the period ends (aware, UTC), if told. The live service does not tell.
    """

    type: str
    used_by_request: int | None = attrs.field(default=None, kw_only=True)
    remaining: int | None = attrs.field(default=None, kw_only=True)
    limit: int | None = attrs.field(default=None, kw_only=True)
    reset_time: datetime | None = attrs.field(default=None, kw_only=True)


@attrs.frozen
class Response(Generic[A_co]):
    """The answer to one analysis: the typed analysis and the envelope it came in.

    Attributes:
        analysis: The typed ``data.analysis`` of the request's model.
        model: The model's name on the wire.
        entity: What the service says it analysed (the input URL), if told.
        request_id: The service's id of the request, for support, if told.
        limits: What the answer says about quotas; empty if it says nothing.
        raw: The JSON object as received. Nothing that the server sent is missing here.
    """

    analysis: A_co
    model: str = attrs.field(kw_only=True)
    entity: str | None = attrs.field(default=None, kw_only=True)
    request_id: str | None = attrs.field(default=None, kw_only=True)
    limits: tuple[Limit, ...] = attrs.field(default=(), kw_only=True)
    raw: JSONObject = attrs.field(factory=dict, kw_only=True, repr=False, hash=False)


@attrs.frozen
class TaskStatus:
    """What ``GET /tasks/{id}`` says of a task. It never carries the result.

    Attributes:
        task_id: The task's id.
        state: ``"pending"``, ``"processing"``, ``"completed"``, ``"failed"``, or whatever else
            the service says: unknown states are kept as received and count as still running.
        request_id: The service's id of the status request, if told.
        raw: The JSON object as received.
    """

    task_id: str
    state: str
    request_id: str | None = attrs.field(default=None, kw_only=True)
    raw: JSONObject = attrs.field(factory=dict, kw_only=True, repr=False, hash=False)

    @property
    def finished(self) -> bool:
        """Whether the remote work is over, for better or worse."""
        return self.state in {"completed", "failed"}


@attrs.frozen
class Delivery:
    """The raw bytes and headers of a webhook, with the instant it was first received.

    A delivery is not trusted: it becomes a :class:`Notification` when its signature was verified.

    Attributes:
        body: The body, byte for byte as received. Re-serialised JSON never verifies.
        headers: The HTTP headers; names are compared without regard to case.
        received_at: Unix seconds (wall clock) of the first receipt. The age of the signature is
            judged against this instant, so a delivery may be stored for hours before it is read.
            ``None``: the age is unknown (pulled from a queue) and is not judged.
    """

    body: bytes = attrs.field(repr=lambda body: f"<{len(body)} bytes>")
    headers: Mapping[str, str] = attrs.field(repr=False, hash=False)
    received_at: float | None = attrs.field(factory=time.time, kw_only=True)


@attrs.frozen
class Notification:
    """A delivery whose signature was verified and whose body was read.

    Attributes:
        task_id: The task that it answers; ``None`` if it is no answer to an analysis task.
        raw: The JSON object as received.
    """

    task_id: str | None
    raw: JSONObject = attrs.field(repr=False, hash=False)

    @property
    def request_id(self) -> str | None:
        """The service's id of the original request, if told."""
        request_id = self.raw.get("request_id")
        return request_id if type(request_id) is str else None

    @property
    def http_status(self) -> int | None:
        """The status that the synchronous call would have had, if told."""
        status = self.raw.get("http_status")
        return status if type(status) is int else None

    @property
    def data(self) -> JSONObject | None:
        """``{"entity": …, "analysis": {…}}`` on success."""
        data = self.raw.get("data")
        return data if type(data) is dict else None

    @property
    def error(self) -> JSONObject | None:
        """The error object on failure."""
        error = self.raw.get("error")
        if type(error) is str:
            return {"message": error}
        return error if type(error) is dict else None

    @property
    def failed(self) -> bool:
        """Whether the task failed, by its error object or by its status."""
        status = self.raw.get("http_status")
        if type(status) is int and status >= 400:
            return True
        return "error" in self.raw and self.error is not None

    @property
    def answers_task(self) -> bool:
        """Whether it ends a task: with an analysis, or with a failure."""
        return self.task_id is not None and (self.failed or has_analysis(self.data))


def has_analysis(data: JSONObject | None) -> bool:
    """Whether the ``data`` of a notification carries an analysis."""
    return data is not None and type(data.get("analysis")) is dict
