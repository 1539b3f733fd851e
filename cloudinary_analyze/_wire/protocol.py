"""The Analyze API's calls and answers: (status, headers, bytes) to values or errors, pure.

Source: ``POST /v2/analysis/{cloud}/analyze/{model}`` and ``GET …/tasks/{task_id}``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final, TypeVar
from urllib.parse import quote

import attrs

from cloudinary_analyze._wire import codec
from cloudinary_analyze.errors import (
    ApiError,
    AuthenticationError,
    BadRequestError,
    NotFoundError,
    PermissionDeniedError,
    QuotaExceededError,
    RateLimitedError,
    ResponseDecodeError,
    ServerError,
    TaskFailedError,
    shorten,
)
from cloudinary_analyze.requests import AnalyzeRequest, Uri
from cloudinary_analyze.responses import Limit, Notification, Response, TaskStatus

A = TypeVar("A")

QUOTA_CODE: Final = "MA_00008"
PASSING_STATUSES: Final = frozenset({408, 423})  # the fault is of the moment
AMBIGUOUS_STATUSES: Final = frozenset({500, 502, 504})


@attrs.frozen
class Accepted:
    """A 202: the analysis was accepted as a task.

    Attributes:
        task_id: The task's id.
        request_id: The service's id of the request, if told.
    """

    task_id: str
    request_id: str | None = None


def build_analyze_url(base_url: str, cloud_name: str, model: str) -> str:
    """Return the URL of a model's analyze operation."""
    return f"{base_url}/v2/analysis/{quote(cloud_name, safe='')}/analyze/{quote(model, safe='')}"


def build_task_url(base_url: str, cloud_name: str, task_id: str) -> str:
    """Return the URL of a task's status."""
    return f"{base_url}/v2/analysis/{quote(cloud_name, safe='')}/tasks/{quote(task_id, safe='')}"


def build_body(
    request: AnalyzeRequest[Any],
    *,
    as_task: bool = False,
    notification_url: str | None = None,
) -> bytes:
    """Return the JSON body of an analyze call."""
    source = request.source
    body: dict[str, Any] = {
        "source": {"uri": source.uri} if type(source) is Uri else {"asset_id": source.asset_id}  # type: ignore[union-attr]
    }
    if parameters := request.parameters:
        body.update(parameters)
    if as_task:
        body["async"] = True
        if notification_url is not None:
            body["notification_url"] = notification_url
    return codec.dumps(body)


def read_object(body: bytes, *, status: int, model: str | None = None) -> dict[str, Any]:
    """Return the JSON object of a 2xx body.

    Raises:
        ResponseDecodeError: It is none.
    """
    try:
        value = codec.loads(body)
    except (ValueError, RecursionError) as error:
        what = "an empty body" if not body.strip() else f"no JSON: {shorten(body)!r}"
        raise ResponseDecodeError(
            f"The service answered {status} with {what}. The analysis may have been made and "
            "charged, but cannot be read.",
            status=status,
            raw_body=body,
            model=model,
        ) from error
    if type(value) is not dict:
        raise build_shape_error(body, status, "$", "it should be an object", model=model)
    return value


def build_shape_error(
    body: bytes, status: int, path: str, reason: str, *, model: str | None = None
) -> ResponseDecodeError:
    """Return the error for a JSON body of another shape."""
    return ResponseDecodeError(
        f"The service answered {status} with JSON of an unexpected shape: at {path}, {reason}. "
        f"The whole body is in `raw_body`; it begins {shorten(body)!r}",
        status=status,
        path=path,
        raw_body=body,
        model=model,
    )


def read_response(request: AnalyzeRequest[A], body: bytes) -> Response[A]:
    """Read the body of a 200.

    Raises:
        ResponseDecodeError: It holds no analysis of the request's model.
    """
    raw = read_object(body, status=200, model=request.model)
    data = raw.get("data")
    if type(data) is not dict:
        reason = "it is missing" if data is None else "it should be an object"
        raise build_shape_error(body, 200, "$.data", reason, model=request.model)
    return read_analysis_data(request.model, request.analysis_type, data, raw, body=body)


def read_analysis_data(
    model: str,
    analysis_type: type[A],
    data: Mapping[str, Any],
    raw: Mapping[str, Any],
    *,
    body: bytes | None = None,
) -> Response[A]:
    """Build the response from ``{"entity": …, "analysis": {…}}`` and its envelope.

    Args:
        model: The model's wire name.
        analysis_type: Its typed analysis.
        data: The ``data`` object, of a 200, a notification, or a status with a result.
        raw: The envelope with ``limits`` and ``request_id``.
        body: The bytes it was read from, for errors; encoded anew if they are gone.

    Raises:
        ResponseDecodeError: It holds no analysis of the request's model.
    """
    analysis = data.get("analysis")
    if type(analysis) is not dict:
        reason = "it is missing" if analysis is None else "it should be an object"
        raise build_shape_error(
            body or codec.dumps(raw), 200, "$.data.analysis", reason, model=model
        )
    try:
        typed = codec.read_analysis(analysis, analysis_type)
    except codec.CodecError as error:
        raise build_shape_error(
            body or codec.dumps(raw),
            200,
            f"$.data.analysis{error.path}",
            str(error),
            model=model,
        ) from error
    limits = raw.get("limits")
    return Response(
        typed,
        model=model,
        entity=_string_or_none(data.get("entity")),
        request_id=_string_or_none(raw.get("request_id")),
        limits=read_limits(limits) if limits else (),
        raw=raw,
    )


def read_accepted(body: bytes, *, model: str) -> Accepted:
    """Read the body of a 202.

    Raises:
        ResponseDecodeError: It names no task.
    """
    raw = read_object(body, status=202, model=model)
    data = raw.get("data")
    task_id = data.get("task_id") if isinstance(data, dict) else None
    if not isinstance(task_id, str) or not task_id:
        raise build_shape_error(body, 202, "$.data.task_id", "it is missing", model=model)
    return Accepted(task_id, _string_or_none(raw.get("request_id")))


def read_task_status(task_id: str, body: bytes) -> TaskStatus:
    """Read the body of a task's status.

    Raises:
        ResponseDecodeError: It names no status.
    """
    raw = read_object(body, status=200)
    data = raw.get("data")
    state = data.get("status") if isinstance(data, dict) else None
    if not isinstance(state, str) or not state:
        raise build_shape_error(body, 200, "$.data.status", "it is missing")
    return TaskStatus(task_id, state, request_id=_string_or_none(raw.get("request_id")), raw=raw)


def find_result(status: TaskStatus) -> Mapping[str, Any] | None:
    """Return the result that a status carries, if it does.

    The Analyze API's never does; the sibling generate API's does, under ``data.result``.
    """
    data = status.raw.get("data")
    if not isinstance(data, dict):
        return None
    if isinstance(data.get("analysis"), dict):
        return data
    result = data.get("result")
    if not isinstance(result, dict):
        return None
    inner = result.get("data")
    for candidate in (result, inner):
        if isinstance(candidate, dict) and isinstance(candidate.get("analysis"), dict):
            return candidate
    return None


def read_limits(raw: Any) -> tuple[Limit, ...]:
    """Read ``limits`` in any of its three shapes: ``addons_quota``, ``items``, ``usage``.

    Entries without a type are passed over, and numbers that are none are ``None``.
    """
    if type(raw) is not dict:
        return ()
    entries = raw.get("addons_quota")
    if type(entries) is not list:
        entries = raw.get("items")
    if type(entries) is not list:
        usage = raw.get("usage")
        if not isinstance(usage, dict):
            return ()
        entries = [{"used_by_request": usage.get("count"), **usage}]
    return tuple([_read_limit(entry) for entry in entries if _has_type(entry)])


def _has_type(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("type"), str)


def _read_limit(entry: Mapping[str, Any]) -> Limit:
    reset_time = entry.get("reset_time")
    return Limit(
        entry["type"],
        used_by_request=_integer_or_none(entry.get("used_by_request")),
        remaining=_integer_or_none(entry.get("remaining")),
        limit=_integer_or_none(entry.get("limit")),
        reset_time=_read_time(reset_time) if reset_time else None,
    )


def _read_time(value: Any) -> datetime | None:
    try:
        time = datetime.fromisoformat(value)
        return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
    except (TypeError, ValueError, OverflowError):
        return None


def _integer_or_none(value: Any) -> int | None:
    if type(value) is int:
        return value
    if type(value) is float and math.isfinite(value):
        return int(value)
    return None


def _string_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def read_retry_after(headers: Mapping[str, str], *, now: float) -> float | None:
    """Return the seconds that a ``Retry-After`` header asks to wait.

    Args:
        headers: With names as received; looked up as ``Retry-After``.
        now: Unix seconds, for the form that is a date.

    Returns:
        Seconds above 0. ``None`` if there is no such header, or it is negative, past or garbled.
    """
    value = headers.get("Retry-After")
    if value is None:
        return None
    try:
        seconds = float(value.replace("_", "?"))  # Python's digit separator is not HTTP's
    except ValueError:
        try:
            instant = parsedate_to_datetime(value)
        except (TypeError, ValueError, OverflowError):
            return None
        if instant.tzinfo is None:
            instant = instant.replace(tzinfo=UTC)
        seconds = instant.timestamp() - now
    return seconds if 0 < seconds < math.inf else None


def read_error(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    now: float,
    model: str | None = None,
    feature: str | None = None,
) -> ApiError:
    """Build the error of an answer that is neither 200 nor 202.

    Args:
        status: HTTP status.
        headers: The answer's headers.
        body: The answer's body, JSON or not.
        now: Unix seconds.
        model: The model that was asked.
        feature: The model's add-on feature, where the answer names none.
    """
    try:
        raw = codec.loads(body)
    except (ValueError, RecursionError):
        raw = None
    raw = raw if isinstance(raw, dict) else {}
    error = raw.get("error")
    if isinstance(error, str):
        error = {"message": error}
    error = error if isinstance(error, dict) else {}
    details = _read_details(error)
    limits = read_limits(raw.get("limits"))
    code = _string_or_none(error.get("code"))
    fields: dict[str, Any] = {
        "status": status,
        "code": code,
        "category": _string_or_none(error.get("category")),
        "api_message": _string_or_none(error.get("message")),
        "details": details,
        "request_id": _string_or_none(error.get("request_id"))
        or _string_or_none(raw.get("request_id"))
        or headers.get("X-Request-Id"),
        "retry_after": read_retry_after(headers, now=now),
        "limits": limits,
        "raw_body": body,
        "model": model,
    }
    said = _quote_error(fields, body)
    named = _string_or_none(details.get("feature_name")) if details else None
    about = f" for {model}" if model else ""
    if status == 429 and code == QUOTA_CODE:
        return _build_quota_error(said, named or feature, limits, fields)
    if status == 403:
        fields["feature"] = named
        return PermissionDeniedError(_explain_refusal(named, said, about), **fields)
    if status in {429, 420}:
        return RateLimitedError(f"The service asks to slow down{about}: {said}", **fields)
    if status == 401:
        return AuthenticationError(
            f"The service does not accept the credentials: {said}. Check that API key, secret "
            "and cloud name (or the OAuth token) belong together.",
            **fields,
        )
    if status == 404:
        return NotFoundError(
            f"The service does not find it{about}: {said}. Check the model, the cloud name, "
            "and the asset id or task id.",
            **fields,
        )
    if 400 <= status < 500 and status not in PASSING_STATUSES:
        return BadRequestError(f"The service refuses the request{about}: {said}", **fields)
    if status >= 400:
        fields["ambiguous"] = model is not None and status in AMBIGUOUS_STATUSES
        return ServerError(f"The service failed{about}: {said}.", **fields)
    return ServerError(
        f"The service answered {status}{about}, which no analyze call should: {said}. "
        "Redirects are never followed, as they would carry the credentials elsewhere.",
        **fields,
    )


def _explain_refusal(feature: str | None, said: str, about: str) -> str:
    if feature:
        return (
            f"The account is not subscribed to the add-on with the feature {feature!r}{about}: "
            f"{said}. Subscribe to it on the Console's Add-ons page."
        )
    return (
        f"The service forbids the call{about}: {said}. Usually the model's add-on is not "
        "subscribed; see the Console's Add-ons page."
    )


def _build_quota_error(
    said: str, feature: str | None, limits: tuple[Limit, ...], fields: dict[str, Any]
) -> QuotaExceededError:
    reset_times = [
        limit.reset_time.timestamp()
        for limit in limits
        if limit.reset_time and feature in {None, limit.type}
    ]
    reset_time = max(reset_times, default=None)
    renewed = (
        f" It is renewed at {datetime.fromtimestamp(reset_time, UTC):%Y-%m-%d %H:%M:%S} UTC."
        if reset_time
        else ""
    )
    return QuotaExceededError(
        f"The quota of the add-on feature {feature or 'of this model'!r} is used up: {said}."
        f"{renewed} Nothing was analysed; buy more, or go on when it is renewed.",
        **fields,
        feature=feature,
        reset_time=reset_time,
    )


def _read_details(error: Mapping[str, Any]) -> Mapping[str, Any] | None:
    details = error.get("details")
    if details is None or isinstance(details, dict):
        return details
    return {"details": details}


def _quote_error(fields: Mapping[str, Any], body: bytes) -> str:
    """Say in a line what the server said: status, code, message, details, request id."""
    said = [str(fields["status"])]
    if fields["code"]:
        said.append(fields["code"])
    if fields["api_message"]:
        said.append(shorten(fields["api_message"].encode("utf-8", "replace")))
    elif body:
        said.append(repr(shorten(body)))
    if fields["details"]:
        said.append(shorten(codec.dumps(fields["details"])))
    quoted = " ".join(said)
    return f"{quoted} (request {fields['request_id']})" if fields["request_id"] else quoted


def build_task_failure(
    task_id: str, *, model: str, notification: Notification | None = None
) -> TaskFailedError:
    """Build the error of a task that failed, with its reason where a notification told it."""
    if notification is None:
        return TaskFailedError(
            f"The task {task_id} ({model}) failed. The notification with the reason did not "
            "arrive; only the status is known.",
            task_id=task_id,
            cause_known=False,
        )
    error = notification.error or {}
    fields: dict[str, Any] = {
        "status": notification.http_status,
        "code": _string_or_none(error.get("code")),
        "category": _string_or_none(error.get("category")),
        "api_message": _string_or_none(error.get("message")),
        "details": _read_details(error),
        "request_id": _string_or_none(error.get("request_id")) or notification.request_id,
    }
    said = _quote_error({**fields, "status": fields["status"] or "no status"}, b"")
    return TaskFailedError(
        f"The task {task_id} ({model}) failed: {said}.", task_id=task_id, **fields
    )
