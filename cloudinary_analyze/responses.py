"""Values that the service sent: responses, limits, statuses, deliveries, notifications.

This module does no I/O and knows no models. Properties read the received JSON on access and never
raise. Hints are resolved at run time by `_wire.structure`, so nothing is imported for type checking
only.

Source: the responses of ``POST /v2/analysis/{cloud}/analyze/{model}`` and
``GET /v2/analysis/{cloud}/tasks/{task_id}``, and the webhook.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import attrs

from cloudinary_analyze._values import Described, Jsonable

if TYPE_CHECKING:
    from cloudinary_analyze.requests import AnalyzeRequest

__all__ = [
    "Delivery",
    "Limit",
    "Notification",
    "Response",
    "TaskStatus",
]

A = TypeVar("A")
A_co = TypeVar("A_co", covariant=True)

JSONObject = Mapping[str, Any]


@attrs.frozen(repr=False, eq=False)
class Limit(Jsonable):
    """How much of an add-on's quota is left.

    The service has sent three shapes of ``limits`` over time. All three are read into this one.
    ``None`` means that the service did not send the value.

    Source: ``limits.addons_quota``, ``limits.items`` or ``limits.usage`` of a response or a
    notification.

    Attributes:
        type: The add-on feature that is counted (``ai_vision``, ``object_detection``, …).
        used_by_request: Units that this request cost. For ``ai_vision``, units are tokens.
        remaining: Units left in the period.
        limit: Units in the period.
        reset_time: The end of the period (aware, UTC). The live service has not been seen to send
            it.
    """

    type: str
    used_by_request: int | None = attrs.field(default=None, kw_only=True)
    remaining: int | None = attrs.field(default=None, kw_only=True)
    limit: int | None = attrs.field(default=None, kw_only=True)
    reset_time: datetime | None = attrs.field(default=None, kw_only=True)


DEEPEST_ENVELOPE: Final = 3  # a result in a whole response in ``data``


def walk_envelopes(raw: JSONObject) -> Iterator[tuple[str, JSONObject]]:
    """Yield the path of each object that can hold a result or its limits, outermost first.

    Responses, statuses and notifications nest them under ``data`` and ``result``.
    """
    level: list[tuple[str, Any]] = [("$", raw)]
    for _ in range(DEEPEST_ENVELOPE + 1):
        inner: list[tuple[str, Any]] = []
        for path, envelope in level:
            if isinstance(envelope, Mapping):
                yield path, envelope
                inner += [(f"{path}.{key}", envelope.get(key)) for key in ("data", "result")]
        level = inner


def find_string(raw: JSONObject, name: str) -> str | None:
    """Return the outermost string of a name in the envelopes, or ``None``."""
    for _, envelope in walk_envelopes(raw):
        value = envelope.get(name)
        if isinstance(value, str):
            return value
    return None


def find_limits(raw: JSONObject) -> tuple[Limit, ...]:
    """Return the limits that an envelope carries, beside ``data`` or in it."""
    if limits := read_limits(raw.get("limits")):
        return limits  # nearly always here, once per call
    for _, envelope in walk_envelopes(raw):
        if limits := read_limits(envelope.get("limits")):
            return limits
    return ()


def read_limits(raw: Any) -> tuple[Limit, ...]:
    """Read ``limits`` in any of its three shapes: ``addons_quota``, ``items``, ``usage``.

    Entries without a type are skipped; invalid numbers and times are ``None``.
    """
    if type(raw) is not dict:
        return ()
    entries = raw.get("addons_quota")
    if type(entries) is not list:
        entries = raw.get("items")
    if type(entries) is not list:
        usage = raw.get("usage")
        if type(usage) is not dict:
            return ()
        entries = [{"type": usage.get("type"), "used_by_request": usage.get("count")}]
    return tuple([_read_limit(entry) for entry in entries if _has_type(entry)])


def _has_type(entry: Any) -> bool:
    return type(entry) is dict and isinstance(entry.get("type"), str)


def _read_limit(entry: JSONObject) -> Limit:
    reset_time = entry.get("reset_time")
    return Limit(
        entry["type"],
        used_by_request=_read_integer(entry.get("used_by_request")),
        remaining=_read_integer(entry.get("remaining")),
        limit=_read_integer(entry.get("limit")),
        reset_time=_read_time(reset_time) if reset_time else None,
    )


def _read_time(value: Any) -> datetime | None:
    try:
        time = datetime.fromisoformat(value)
        return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
    except (TypeError, ValueError, OverflowError):
        return None


def _read_integer(value: Any) -> int | None:
    if type(value) is int:
        return value
    if type(value) is float and math.isfinite(value):
        return int(value)
    return None


@attrs.frozen(repr=False, eq=False)
class Response(Jsonable, Generic[A_co]):
    """The response to one analysis: the typed analysis, and the JSON as received.

    Source: the 200 of ``POST /analyze/{model}``, or the notification of a task.

    Attributes:
        analysis: The typed ``data.analysis``. Its class depends on the request's model.
        model: The model's name in URLs.
        raw: The JSON object as received, with everything that the server sent.
    """

    analysis: A_co
    model: str = attrs.field(kw_only=True)
    raw: JSONObject = attrs.field(factory=dict, kw_only=True, hash=False)

    @property
    def entity(self) -> str | None:
        """The URL that the service analyzed, as it reports it. ``None`` if not sent."""
        return find_string(self.raw, "entity")

    @property
    def request_id(self) -> str | None:
        """The service's id of the request, for Cloudinary's support. ``None`` if not sent."""
        return find_string(self.raw, "request_id")

    @property
    def limits(self) -> tuple[Limit, ...]:
        """The quotas after this request. Empty if not sent."""
        return find_limits(self.raw)

    @classmethod
    def from_raw(
        cls, request: type[AnalyzeRequest[A]] | AnalyzeRequest[A], raw: JSONObject
    ) -> Response[A]:
        """Build a response from JSON of the service, such as a stored `raw`.

        ```python
        stored = dict((await session.analyze(Coco(urls[0]))).raw)
        print(Response.from_raw(Coco, stored).analysis.detections)
        ```

        Args:
            request: The request class (``Coco``) or a request. For `OtherModel`, pass a request.
            raw: The JSON object as received, of a response or a notification.

        Raises:
            ResponseDecodeError: The JSON contains no analysis of the model.
        """
        from cloudinary_analyze._wire.protocol import read_result
        from cloudinary_analyze.requests import name_model

        return read_result(name_model(request), request.analysis_type, raw)

    def __repr__(self) -> str:
        return (
            f"Response(analysis={self.analysis!r}, model={self.model!r}, "
            f"entity={self.entity!r}, request_id={self.request_id!r}, limits={self.limits!r})"
        )


@attrs.frozen(repr=False, eq=False)
class TaskStatus(Jsonable):
    """The status of a task. It never carries the result.

    Source: the 200 of ``GET /tasks/{task_id}``.

    Attributes:
        task_id: The task's id.
        state: ``"pending"``, ``"processing"``, ``"completed"`` or ``"failed"``. Unknown states are
            kept as received and count as still running.
        request_id: The service's id of the status request. ``None`` if not sent.
        raw: The JSON object as received.
    """

    task_id: str
    state: str
    request_id: str | None = attrs.field(default=None, kw_only=True)
    raw: JSONObject = attrs.field(factory=dict, kw_only=True, repr=False, hash=False)

    @property
    def finished(self) -> bool:
        """Whether the state is ``"completed"`` or ``"failed"``."""
        return self.state in {"completed", "failed"}


@attrs.frozen(repr=False, eq=False)
class Delivery(Described):
    """The raw bytes and headers of a webhook, with the time of its first receipt.

    A delivery is not trusted. It becomes a `Notification` once its signature is verified.

    Source: the webhook.

    Attributes:
        body: The body, byte for byte as received. JSON that was serialized again never verifies.
        headers: The HTTP headers. Names are compared without regard to case.
        received_at: Unix seconds (wall clock) of the first receipt. Default: now. The age of the
            signature is measured at this time, so a delivery can be stored for hours before it is
            read. ``None``: the age is unknown and is not checked.
    """

    body: bytes = attrs.field(repr=lambda body: f"<{len(body)} bytes>")
    headers: Mapping[str, str] = attrs.field(repr=False, hash=False)
    received_at: float | None = attrs.field(factory=time.time, kw_only=True)


@attrs.frozen(repr=False, eq=False)
class Notification(Described):
    """The parsed body of a webhook.

    Source: the webhook. The schema requires none of its fields.

    Attributes:
        task_id: The task that it names. ``None`` if it does not belong to an analysis task.
        raw: The JSON object as received.
    """

    task_id: str | None
    raw: JSONObject = attrs.field(repr=False, hash=False)

    @property
    def request_id(self) -> str | None:
        """The service's id of the original request. ``None`` if not sent."""
        return find_string(self.raw, "request_id")

    @property
    def http_status(self) -> int | None:
        """The HTTP status that the synchronous call would have had. ``None`` if not sent."""
        return _read_integer(self.raw.get("http_status"))

    @property
    def data(self) -> JSONObject | None:
        """The object ``data``. On success usually ``{"entity": …, "analysis": {…}}``."""
        data = self.raw.get("data")
        return data if type(data) is dict else None

    @property
    def limits(self) -> tuple[Limit, ...]:
        """The quotas after the request. Empty if not sent."""
        return find_limits(self.raw)

    @property
    def error(self) -> JSONObject | None:
        """The error object of a failed task. ``None`` if there is none."""
        data = self.data
        for error in (self.raw.get("error"), None if data is None else data.get("error")):
            if error:
                return read_error_object(error)
        return None

    @property
    def failed(self) -> bool:
        """Whether the HTTP status, the error object or the task status reports a failure."""
        raw = self.raw  # read directly, because every notification is checked
        status = raw.get("http_status")
        if raw.get("error") or (status != 200 and (_read_integer(status) or 0) >= 400):
            return True
        data = raw.get("data")
        if type(data) is dict and data:
            return data.get("status") == "failed" or bool(data.get("error"))
        return bool(raw.get("status") == "failed")


def read_error_object(error: Any) -> JSONObject:
    """Return the fields of an ``error`` in any form."""
    if isinstance(error, Mapping):
        return error
    return {"message": error} if isinstance(error, str) else {"details": error}
