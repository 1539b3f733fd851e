"""Answers become values or errors of the tree; no header or body breaks the reader."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudinary_analyze import (
    AnalyzeError,
    ApiError,
    Captioning,
    Limit,
    MalformedNotificationError,
    ResponseDecodeError,
    parse_notification,
)
from cloudinary_analyze._wire import codec, protocol
from cloudinary_analyze.responses import read_limits

NOW = 1_790_000_000.0
HEADERS = st.text(max_size=40) | st.from_regex(
    r"(Mon, )?[0-9]{1,5} (Jan|Feb|Xxx) [0-9]{1,6} [0-9]{2}:[0-9]{2}:[0-9]{2}( GMT| [+-][0-9]{1,12})?",
    fullmatch=True,
)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("5", 5.0),
        (" 5 ", 5.0),
        ("0.25", 0.25),
        ("1e2", 100.0),
        (format_datetime(datetime.fromtimestamp(NOW + 30, UTC), usegmt=True), 30.0),
        (format_datetime(datetime.fromtimestamp(NOW + 30, UTC)), 30.0),
        (format_datetime(datetime.fromtimestamp(NOW - 30, UTC), usegmt=True), None),
        ("0", None),
        ("-5", None),
        ("nan", None),
        ("inf", None),
        ("-inf", None),
        ("1e999", None),
        ("1_0", None),
        ("", None),
        ("soon", None),
        ("5 seconds", None),
        ("Mon, 32 Foo 2024 99:99:99 GMT", None),
    ],
)
def test_retry_after_in_every_form(value: str, seconds: float | None) -> None:
    read = protocol.read_retry_after({"Retry-After": value}, now=NOW)
    assert read == pytest.approx(seconds)


def test_no_retry_after_is_none() -> None:
    assert protocol.read_retry_after({}, now=NOW) is None


@given(HEADERS)
def test_no_retry_after_breaks_the_reader(value: str) -> None:
    seconds = protocol.read_retry_after({"Retry-After": value}, now=NOW)
    assert seconds is None or 0 < seconds < float("inf")


@pytest.mark.parametrize(
    ("raw", "limits"),
    [
        (None, ()),
        ({}, ()),
        ([], ()),
        ("x", ()),
        ({"addons_quota": None}, ()),
        ({"addons_quota": "x", "items": 5}, ()),
        ({"usage": None}, ()),
        ({"usage": {"count": 1}}, ()),
        ({"addons_quota": [None, 5, {}, {"type": None}, {"type": 5}]}, ()),
        ({"addons_quota": [{"type": "new"}]}, (Limit("new"),)),
        ({"items": [{"type": "a", "remaining": None}]}, (Limit("a"),)),
        ({"items": [{"type": "a", "remaining": "many", "limit": True}]}, (Limit("a"),)),
        ({"items": [{"type": "a", "remaining": 1.5}]}, (Limit("a", remaining=1),)),
        ({"items": [{"type": "a", "reset_time": "soon"}]}, (Limit("a"),)),
        ({"items": [{"type": "a", "reset_time": 5}]}, (Limit("a"),)),
        ({"items": [{"type": "a", "reset_time": "0001-01-01T00:00:00+23:59"}]}, (Limit("a"),)),
        ({"items": [{"type": "a", "reset_time": "9999-12-31T23:59:59-23:59"}]}, (Limit("a"),)),
        (
            {"items": [{"type": "a", "reset_time": "2026-12-01T01:00:00+01:00"}]},
            (Limit("a", reset_time=datetime(2026, 12, 1, tzinfo=UTC)),),
        ),
        (
            {"items": [{"type": "a", "reset_time": "2026-12-01T00:00:00"}]},
            (Limit("a", reset_time=datetime(2026, 12, 1, tzinfo=UTC)),),
        ),
        ({"usage": {"type": "a", "count": 3}}, (Limit("a", used_by_request=3),)),
        (
            {"addons_quota": [{"type": "a"}, {"type": "b"}], "items": [{"type": "c"}]},
            (Limit("a"), Limit("b")),
        ),
    ],
)
def test_limits_of_every_shape(raw: Any, limits: tuple[Limit, ...]) -> None:
    assert read_limits(raw) == limits


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["error", "message", "code", "category", "details", "request_id", "limits", "items",
             "addons_quota", "usage", "type", "remaining", "reset_time", "data", "analysis",
             "task_id", "status", "http_status", "notification_type", "feature_name", "result"]
        ),
        inner,
        max_size=5,
    ),
    max_leaves=15,
)  # fmt: skip
BODIES = st.binary(max_size=40) | JSON.map(codec.dumps)


@given(
    status=st.integers(100, 999),
    body=BODIES,
    retry_after=HEADERS,
    model=st.sampled_from([None, "captioning"]),
)
def test_every_answer_makes_an_error_of_the_tree(
    status: int, body: bytes, retry_after: str, model: str | None
) -> None:
    error = protocol.read_error(
        status, {"Retry-After": retry_after}, body, now=NOW, model=model, feature="object_detection"
    )
    assert isinstance(error, ApiError)
    assert (error.status, error.raw_body, error.model) == (status, body, model)
    assert str(status) in str(error)
    assert len(str(error)) < 1500


@given(BODIES)
def test_every_body_is_read_or_refused_with_an_error_of_the_tree(body: bytes) -> None:
    for read in (
        lambda: protocol.read_response(Captioning("https://example.com/"), body),
        lambda: protocol.read_accepted(body, model="captioning"),
        lambda: protocol.find_result(protocol.read_task_status("id", body).raw),
    ):
        error: ResponseDecodeError | None = None
        try:
            read()
        except ResponseDecodeError as raised:
            error = raised
        if error is not None:
            assert error.raw_body == body
            assert len(str(error)) < 1500


@given(BODIES)
def test_every_notification_is_read_or_malformed(body: bytes) -> None:
    try:
        notification = parse_notification(body)
    except MalformedNotificationError:
        return
    assert notification.raw == codec.loads(body) or b"NaN" in body
    if notification.failed:
        failure = protocol.build_task_failure("id", model="captioning", notification=notification)
        assert isinstance(failure, AnalyzeError)
        assert str(failure)


def test_the_notifications_of_the_contract(sample: Any) -> None:
    success = parse_notification(codec.dumps(sample("webhook_success")))
    assert success.task_id == sample("webhook_success")["task_id"]
    assert (success.http_status, success.error, success.failed) == (200, None, False)
    assert success.data is not None
    assert success.data["analysis"]["data"]["caption"] == "A cat sitting on a table"
    failure = parse_notification(codec.dumps(sample("webhook_failure")))
    assert failure.failed
    assert failure.data is None
    error = protocol.build_task_failure(str(failure.task_id), model="coco", notification=failure)
    assert (error.status, error.code, error.category) == (403, "MA_00007", "auth_error")
    assert error.details == {"feature_name": "object_detection"}
    assert error.request_id == "17c3b70c5096df0e77e838323abb7029"
    assert error.cause_known


@pytest.mark.parametrize("kind", ["analyze", "analysis", "upload", "", None, 5, ["analyze"]])
def test_a_notification_of_any_type_belongs_to_the_task_that_it_names(kind: Any) -> None:
    body = codec.dumps({"task_id": "abc", "notification_type": kind})
    assert parse_notification(body).task_id == "abc"
    body = codec.dumps({"notification_type": kind, "data": {"task_id": "abc"}})
    assert parse_notification(body).task_id == "abc"


@pytest.mark.parametrize("task_id", [None, "", 5, ["abc"]])
def test_a_notification_without_a_task_id_is_foreign(task_id: Any) -> None:
    assert parse_notification(codec.dumps({"task_id": task_id})).task_id is None


@pytest.mark.parametrize("body", [b"", b"[]", b"5", b"null", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_object_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedNotificationError):
        parse_notification(body)


@pytest.mark.parametrize(
    ("state", "finished"),
    [
        ("pending", False),
        ("processing", False),
        ("completed", True),
        ("failed", True),
        ("odd", False),
    ],
)
def test_task_statuses_known_and_unknown(state: str, finished: bool) -> None:
    status = protocol.read_task_status("id", codec.dumps({"data": {"status": state, "x": 1}}))
    assert (status.state, status.finished) == (state, finished)
    assert status.raw == {"data": {"status": state, "x": 1}}


@pytest.mark.parametrize(
    "name",
    [
        "task_status_pending",
        "task_status_processing",
        "task_status_completed",
        "task_status_failed",
    ],
)
def test_the_statuses_of_the_contract_carry_no_result(sample: Any, name: str) -> None:
    status = protocol.read_task_status("id", codec.dumps(sample(name)))
    assert status.state == name.removeprefix("task_status_")
    assert protocol.find_result(status.raw) is None


@pytest.mark.parametrize(
    "data",
    [
        {"analysis": {"a": 1}},
        {"result": {"analysis": {"a": 1}}},
        {"result": {"data": {"analysis": {"a": 1}}}},
    ],
)
def test_a_result_in_a_status_is_found(data: dict[str, Any]) -> None:
    status = protocol.read_task_status("id", codec.dumps({"data": {"status": "completed", **data}}))
    assert protocol.find_result(status.raw) == {"a": 1}


def test_the_202_of_the_contract_names_its_task(sample: Any) -> None:
    accepted = protocol.read_accepted(codec.dumps(sample("accepted_202")), model="coco")
    assert accepted.task_id == sample("accepted_202")["data"]["task_id"]
    assert accepted.request_id == "17c3b70c5096df0e77e838323abb7029"
