"""The Analyze API's calls and responses: (status, headers, bytes) to values or errors, pure.

Source: ``POST /v2/analysis/{cloud}/analyze/{model}``, ``GET …/tasks/{task_id}``, and the webhook.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC
from typing import Any, Final, TypeVar
from urllib.parse import quote

import attrs

from cloudinary_analyze._policy import find_rule, is_exhausted
from cloudinary_analyze._values import Described
from cloudinary_analyze._wire import codec
from cloudinary_analyze.analyses import OtherAnalysis
from cloudinary_analyze.errors import (
    ApiError,
    AuthenticationError,
    BadRequestError,
    NotFoundError,
    PermissionDeniedError,
    QuotaExceededError,
    RateLimitedError,
    RemoteFields,
    ResponseDecodeError,
    ServerError,
    TaskFailedError,
    shorten,
)
from cloudinary_analyze.requests import MODELS, AnalyzeRequest, Uri
from cloudinary_analyze.responses import (
    JSONObject,
    Notification,
    Response,
    TaskStatus,
    find_limits,
    find_string,
    read_error_object,
    walk_envelopes,
)

A = TypeVar("A")

_ENVELOPE_KEYS: Final = frozenset(
    {"analysis", "data", "entity", "error", "limits", "notices", "request_id", "result", "status"}
    | {"task_id"}
)
_RESULT_KEYS: Final = frozenset(
    {"caption", "detections", "label_annotations", "labels", "logo_annotations", "quality"}
    | {"responses", "score", "tags"}
)
DEEPEST_DETAILS: Final = 100  # levels
# `pending` and `processing` are documented, for polls; a notification may use other words
_RUNNING: Final = frozenset(
    {"accepted", "in_progress", "pending", "processing", "progress", "queued", "running"}
    | {"scheduled", "started", "submitted", "waiting"}
)


@attrs.frozen(repr=False, eq=False)
class Accepted(Described):
    """A 202: the analysis was accepted as a task.

    Attributes:
        task_id: The task's id.
        request_id: The service's id of the request, if sent.
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
        "source": {"uri": source.uri} if isinstance(source, Uri) else {"asset_id": source.asset_id}
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
        ResponseDecodeError: The body is not a JSON object.
    """
    try:
        value = codec.loads(body)
    except (ValueError, RecursionError) as error:
        what = f"is not valid JSON: '{shorten(body)}'" if body.strip() else "has an empty body"
        raise ResponseDecodeError(
            f"The response with status {status} {what}.",
            status=status,
            raw_body=body,
            model=model,
            ambiguous=model is not None,
        ) from error
    if type(value) is not dict:
        raise _build_shape_error(body, status, "$", "it should be an object", model=model)
    return value


def _build_shape_error(
    body: bytes, status: int, path: str, reason: str, *, model: str | None
) -> ResponseDecodeError:
    """Return the error for JSON of another shape. Only a response for a model may be charged."""
    return ResponseDecodeError(
        f"The response with status {status} has an unexpected shape: at {shorten(path)}, "
        f"{shorten(reason)}. The whole body is in `raw_body`; it begins '{shorten(body)}'.",
        status=status,
        path=path,
        raw_body=body,
        model=model,
        ambiguous=model is not None,
    )


def read_response(request: AnalyzeRequest[A], body: bytes) -> Response[A]:
    """Read the body of a 200.

    Raises:
        ResponseDecodeError: It holds no analysis of the request's model.
    """
    model = request.model
    raw = read_object(body, status=200, model=model)
    return read_result(model, request.analysis_type, raw, body=body)


def read_result(
    model: str, analysis_type: type[A], raw: JSONObject, *, body: bytes | None = None
) -> Response[A]:
    """Build the response from the envelope of a 200, a notification, a status or a ledger.

    Args:
        model: The model's name in URLs.
        analysis_type: Its typed analysis.
        raw: The envelope, in any of the shapes of `find_result`.
        body: The bytes that it was read from, for errors. Default: ``raw`` is encoded again.

    Raises:
        ResponseDecodeError: It holds no analysis of the model.
    """
    analysis = find_result(raw, analysis_type)
    if analysis is None:
        path, reason = _explain_missing(raw)
        raise _build_shape_error(body or codec.dumps(raw), 200, path, reason, model=model)
    try:
        typed = codec.read_analysis(analysis, analysis_type)
    except codec.CodecError as error:
        path = f"{_find_path(raw, analysis)}{error.path}"
        raise _build_shape_error(
            body or codec.dumps(raw), 200, path, str(error), model=model
        ) from error
    return Response(typed, model=model, raw=raw)


def find_result(raw: JSONObject, analysis_type: type[Any] | None = None) -> JSONObject | None:
    """Return the ``analysis`` object that an envelope carries, or ``None``.

    The envelope is of a response, a status, a notification or a record in a ledger. The schema
    leaves the shape of a notification's ``data`` open. So the analysis is accepted as
    ``data.analysis``, as ``data`` itself, under ``data.result``, and in a whole response in
    ``data``.

    Args:
        raw: The envelope.
        analysis_type: The expected typed analysis; without it only known models are found in
            ``data`` itself.
    """
    data = raw.get("data")
    if type(data) is dict and type(analysis := data.get("analysis")) is dict:
        return analysis  # nearly always
    envelopes = [envelope for _, envelope in walk_envelopes(raw)]
    for envelope in envelopes:
        if type(analysis := envelope.get("analysis")) is dict:
            return analysis
    return next((inner for inner in envelopes[1:] if _is_analysis(inner, analysis_type)), None)


def _find_path(raw: JSONObject, analysis: JSONObject) -> str:
    """Return where `find_result` found an analysis."""
    for path, envelope in walk_envelopes(raw):
        if envelope.get("analysis") is analysis:
            return f"{path}.analysis"
        if envelope is analysis:
            return path
    return "$"


def reports_progress(notification: Notification) -> bool:
    """Whether a notification says only that its task is still running.

    It does if it carries neither an error nor a non-empty analysis, and every status in it is that
    of a running task. The status of the task takes precedence, because ``http_status`` is that of
    the call.
    """
    raw = notification.raw
    if find_result(raw) or notification.failed:
        return False
    envelopes = [envelope for _, envelope in walk_envelopes(raw)]
    if any(envelope.get("analysis") for envelope in envelopes):
        return False  # an unknown shape, but it was paid for
    states = [state for envelope in envelopes if isinstance(state := envelope.get("status"), str)]
    if not states:
        return notification.http_status == 202
    words = (state.strip().lower().replace(" ", "_").replace("-", "_") for state in states)
    return _RUNNING.issuperset(words)


def _is_analysis(value: JSONObject, analysis_type: type[Any] | None) -> bool:
    """Whether an object is itself an analysis, without a key that names it."""
    inner = value.get("data")
    if not _RESULT_KEYS.isdisjoint(value) or (isinstance(inner, Mapping) and "caption" in inner):
        return True
    return analysis_type is OtherAnalysis and not _ENVELOPE_KEYS.issuperset(value)


def _explain_missing(raw: JSONObject) -> tuple[str, str]:
    path, value = "$.data", raw.get("data")
    if isinstance(value, dict):
        path, value = "$.data.analysis", value.get("analysis")
    return path, "it is missing" if value is None else "it should be an object"


def read_accepted(body: bytes, *, model: str) -> Accepted:
    """Read the body of a 202.

    Raises:
        ResponseDecodeError: It names no task.
    """
    raw = read_object(body, status=202, model=model)
    data = raw.get("data")
    task_id = data.get("task_id") if isinstance(data, dict) else None
    if not isinstance(task_id, str) or not task_id:
        raise _build_shape_error(body, 202, "$.data.task_id", "it is missing", model=model)
    return Accepted(task_id, find_string(raw, "request_id"))


def read_task_status(task_id: str, body: bytes) -> TaskStatus:
    """Read the body of a task's status.

    Raises:
        ResponseDecodeError: It names no status.
    """
    raw = read_object(body, status=200)
    data = raw.get("data")
    state = data.get("status") if isinstance(data, dict) else None
    if not isinstance(state, str) or not state:
        raise _build_shape_error(body, 200, "$.data.status", "it is missing", model=None)
    return TaskStatus(task_id, state, request_id=find_string(raw, "request_id"), raw=raw)


def _string_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def read_retry_after(headers: Mapping[str, str], *, now: float) -> float | None:
    """Return the seconds that a ``Retry-After`` header asks to wait.

    Args:
        headers: The headers, by the names as received.
        now: Unix seconds, for the form that is a date.

    Returns:
        Seconds above 0. ``None`` if the header is missing, negative, past or malformed.
    """
    value = headers.get("Retry-After")
    if value is None:
        return None
    try:
        seconds = float(value.replace("_", "?"))  # Python's digit separator is not HTTP's
    except ValueError:
        from email.utils import parsedate_to_datetime

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
    """Build the error of a response that is neither 200 nor 202.

    Args:
        status: HTTP status.
        headers: The response's headers.
        body: The response's body, JSON or not.
        now: Unix seconds.
        model: The model of the request.
        feature: The model's add-on feature; used if the response names none.
    """
    try:
        raw = codec.loads(body)
    except (ValueError, RecursionError):
        raw = None
    raw = raw if isinstance(raw, dict) else {}
    fields = _read_fields(
        read_error_object(raw.get("error") or {}), raw, status=status, body=body, model=model
    )
    fields["request_id"] = fields.get("request_id") or headers.get("X-Request-Id")
    fields["retry_after"] = read_retry_after(headers, now=now)
    said = _quote_error(fields, body)
    about = f" for {model}" if model else ""
    named = _find_feature(fields.get("details"))
    if is_exhausted(status, None, fields.get("code"), fields.get("limits", ()), named or feature):
        return _build_quota_error(said, named or feature, fields)
    rule = find_rule(status)
    if rule.error is PermissionDeniedError:
        return PermissionDeniedError(_explain_refusal(named, said, about), feature=named, **fields)
    fields["ambiguous"] = model is not None and rule.ambiguous
    explain = _EXPLANATIONS[rule.error] if status >= 400 else _UNEXPECTED
    return rule.error(explain.format(status=status, said=said, about=about), **fields)


_EXPLANATIONS: Final[Mapping[type[ApiError], str]] = {
    AuthenticationError: "The service refused the credentials: {said}. Check that API key, secret "
    "and cloud name (or the OAuth token) belong together.",
    BadRequestError: "The service refused the request{about}: {said}.",
    NotFoundError: "Not found{about}: {said}. Check the model, the cloud name, "
    "and the asset id or task id.",
    RateLimitedError: "The service limits the rate of requests{about}: {said}.",
    ServerError: "The service failed{about}: {said}.",
}
_UNEXPECTED: Final = (
    "Unexpected status {status}{about}: {said}. Redirects are never followed, because they would "
    "carry the credentials elsewhere."
)


def _read_fields(
    error: JSONObject, raw: JSONObject, *, status: int, body: bytes, model: str | None
) -> RemoteFields:
    """Read an error object, and what its envelope adds."""
    details = error.get("details")
    if codec.is_deep(details, DEEPEST_DETAILS):
        details = codec.dumps(details).decode()  # an error must pickle
    return {
        "status": status,
        "code": _string_or_none(error.get("code")),
        "category": _string_or_none(error.get("category")),
        "api_message": _string_or_none(error.get("message")),
        "details": details
        if details is None or isinstance(details, dict)
        else {"details": details},
        "request_id": _string_or_none(error.get("request_id")) or find_string(raw, "request_id"),
        "limits": find_limits(raw),
        "raw_body": body,
        "model": model,
    }


def _quote_error(fields: RemoteFields, body: bytes) -> str:
    """Describe the error in one line: status, code, message, details, request id."""
    said = [str(fields.get("status") or "no status")]
    if code := fields.get("code"):
        said.append(shorten(code))
    if message := fields.get("api_message"):
        said.append(shorten(message))
    elif body:
        said.append(f"'{shorten(body)}'")
    if fields.get("details"):
        said.append(shorten(codec.dumps(fields.get("details"))))
    if request_id := fields.get("request_id"):
        said.append(f"(request {shorten(request_id)})")
    return " ".join(said)


def _find_feature(details: JSONObject | None) -> str | None:
    return _string_or_none(details.get("feature_name")) if details else None


def _explain_refusal(feature: str | None, said: str, about: str) -> str:
    if feature:
        return (
            f"The account is not subscribed to the add-on with the feature '{shorten(feature)}'"
            f"{about}: {said}. Subscribe to it on the Console's Add-ons page."
        )
    return (
        f"The service forbids the call{about}: {said}. Usually the model's add-on is not "
        "subscribed; see the Console's Add-ons page."
    )


def _build_quota_error(
    said: str, feature: str | None, fields: RemoteFields, *, task_id: str | None = None
) -> QuotaExceededError:
    reset_time = max(
        (
            limit.reset_time
            for limit in fields.get("limits", ())
            if limit.reset_time and feature in {None, limit.type}
        ),
        default=None,
    )
    what = f"add-on feature '{shorten(feature)}'" if feature else "model's add-on"
    resets = f" It resets at {reset_time:%Y-%m-%d %H:%M:%S} UTC." if reset_time else ""
    return QuotaExceededError(
        f"The quota of the {what} is used up: {said}.{resets} Nothing was analyzed. Buy more, or "
        "continue after the reset.",
        feature=feature,
        # whole seconds: rounded up, the end of the calendar is not a datetime any more
        reset_time=None if reset_time is None else reset_time.replace(microsecond=0).timestamp(),
        task_id=task_id,
        **fields,
    )


def build_task_failure(
    task_id: str, *, model: str, notification: Notification | None = None, body: bytes = b""
) -> TaskFailedError | QuotaExceededError:
    """Build the error of a task that failed, with its reason if a notification states it.

    Args:
        task_id: The task.
        model: The model's name in URLs.
        notification: The service's notification of the failure.
        body: The notification's body.
    """
    about = f"The task {shorten(task_id)} ({model}) failed"
    if notification is None:
        return TaskFailedError(
            f"{about}. The notification with the reason did not arrive; only the status is known.",
            task_id=task_id,
            model=model,
            cause_known=False,
        )
    status = notification.http_status or 0
    fields = _read_fields(
        notification.error or {}, notification.raw, status=status, body=body, model=model
    )
    said = _quote_error(fields, b"")
    kind = MODELS.get(model)
    feature = _find_feature(fields.get("details")) or (kind.feature if kind is not None else None)
    if is_exhausted(
        status, fields.get("category"), fields.get("code"), fields.get("limits", ()), feature
    ):
        return _build_quota_error(f"{about}: {said}", feature, fields, task_id=task_id)
    return TaskFailedError(f"{about}: {said}.", task_id=task_id, **fields)
