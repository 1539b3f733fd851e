"""Responses become values or `AnalyzeError`s. No header or body raises any other error."""

from __future__ import annotations

import pickle
import time
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudinary_analyze import (
    MODELS,
    AnalyzeError,
    ApiError,
    Captioning,
    Coco,
    Limit,
    MalformedNotificationError,
    Notification,
    OtherAnalysis,
    OtherModel,
    QuotaExceededError,
    Response,
    ResponseDecodeError,
    Settings,
    TaskFailedError,
    parse_notification,
)
from cloudinary_analyze._policy import Stop, find_stop, is_final
from cloudinary_analyze._wire import codec, protocol
from cloudinary_analyze.ledger.encoding import dump_error, load_error
from cloudinary_analyze.responses import read_limits

NOW = 1_790_000_000.0
URL = "https://images.example/a.jpg"
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
def test_every_form_of_retry_after_is_read(value: str, seconds: float | None) -> None:
    read = protocol.read_retry_after({"Retry-After": value}, now=NOW)
    assert read == pytest.approx(seconds)


def test_a_date_without_a_zone_is_in_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    date = format_datetime(datetime.fromtimestamp(NOW + 30, UTC).replace(tzinfo=None))
    assert date.endswith("-0000")
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        read = protocol.read_retry_after({"Retry-After": date}, now=NOW)
    time.tzset()
    assert read == pytest.approx(30)


def test_a_missing_retry_after_is_none() -> None:
    assert protocol.read_retry_after({}, now=NOW) is None


@given(HEADERS)
def test_any_retry_after_is_read_or_ignored(value: str) -> None:
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
def test_limits_of_every_shape_are_read(raw: Any, limits: tuple[Limit, ...]) -> None:
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
def test_every_error_response_makes_an_analyze_error(
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
def test_every_body_is_read_or_is_an_analyze_error(body: bytes) -> None:
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


def test_notifications_of_the_contract_are_read(sample: Any) -> None:
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
def test_notifications_of_any_type_name_their_task(kind: Any) -> None:
    body = codec.dumps({"task_id": "abc", "notification_type": kind})
    assert parse_notification(body).task_id == "abc"
    body = codec.dumps({"notification_type": kind, "data": {"task_id": "abc"}})
    assert parse_notification(body).task_id == "abc"


@pytest.mark.parametrize("task_id", [None, "", 5, ["abc"]])
def test_a_notification_without_a_task_id_is_foreign(task_id: Any) -> None:
    assert parse_notification(codec.dumps({"task_id": task_id})).task_id is None


@pytest.mark.parametrize("body", [b"", b"[]", b"5", b"null", b"{", b"\xff", b"[" * 100_000])
def test_a_body_other_than_an_object_is_malformed(body: bytes) -> None:
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
def test_known_and_unknown_task_statuses_are_read(state: str, finished: bool) -> None:
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


ENVELOPES: dict[str, Any] = {
    "data.analysis": lambda analysis: {"data": {"entity": URL, "analysis": analysis}},
    "data itself": lambda analysis: {"data": {**analysis, "entity": URL, "task_id": "t"}},
    "data.result.analysis": lambda analysis: {
        "data": {"task_id": "t", "status": "completed", "result": {"entity": URL, "analysis": analysis}}
    },
    "data.result itself": lambda analysis: {"data": {"result": {**analysis, "entity": URL}}},
    "a whole response in data": lambda analysis: {
        "data": {"data": {"entity": URL, "analysis": analysis}, "request_id": "inner"}
    },
    "a whole response in data.result": lambda analysis: {
        "data": {"result": {"data": {"entity": URL, "analysis": analysis}}}
    },
    "beside data": lambda analysis: {"analysis": analysis, "entity": URL, "data": None},
    "result": lambda analysis: {"result": {"entity": URL, "analysis": analysis}},
}  # fmt: skip
LIMITS = {"addons_quota": [{"type": "object_detection", "remaining": 40}]}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shape", ENVELOPES)
def test_a_result_is_read_wherever_the_schema_allows_it(
    sample: Any, model: str, shape: str
) -> None:
    plain = sample(model)
    analysis = plain["data"]["analysis"]
    kind = MODELS[model].analysis_type
    expected = protocol.read_result(model, kind, plain).analysis
    raw = ENVELOPES[shape](analysis)
    body = codec.dumps({"task_id": "t", "notification_type": "analysis", **raw})
    notification = parse_notification(body)
    assert (notification.task_id, notification.failed) == ("t", False)
    response = protocol.read_result(model, kind, notification.raw, body=body)
    assert response.analysis == expected
    assert response.entity == URL


@pytest.mark.parametrize("shape", ENVELOPES)
def test_a_result_of_another_model_is_read_as_received(shape: str) -> None:
    raw = ENVELOPES[shape]({"novelty": {"a": 1}})
    response = protocol.read_result("new", OtherAnalysis, raw)
    assert response.analysis.raw["novelty"] == {"a": 1}


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"data": None},
        {"data": {}},
        {"data": {"task_id": "t", "status": "completed", "request_id": "r", "entity": URL}},
        {"data": {"result": None}},
        {"data": {"analysis": []}},
        {"data": {"result": {"data": {"result": {"data": {"analysis": {"tags": {}}}}}}}},
        {"data": {"data": {"task_id": "t"}}},
        {"data": [{"analysis": {"tags": {}}}]},
    ],
)
def test_a_body_without_a_result_is_a_decode_error(raw: Any) -> None:
    for request in (Coco(URL), Captioning(URL), OtherModel("new", URL)):
        assert protocol.find_result(raw, request.analysis_type) is None
        with pytest.raises(ResponseDecodeError, match=r"at \$\.data") as caught:
            protocol.read_result(request.model, request.analysis_type, raw, body=b"whole")
        assert caught.value.raw_body == b"whole"
        assert caught.value.ambiguous


@pytest.mark.parametrize(
    "raw",
    [
        {"limits": LIMITS},
        {"data": {"limits": LIMITS}},
        {"data": {"result": {"limits": LIMITS}}},
        {"limits": None, "data": {"data": {"limits": LIMITS}}},
        {"limits": {"items": []}, "data": {"limits": LIMITS}},
    ],
)
def test_limits_are_read_beside_and_inside_data(raw: Any) -> None:
    expected = (Limit("object_detection", remaining=40),)
    assert Response(None, model="coco", raw=raw).limits == expected
    assert Notification("t", raw).limits == expected
    failure = protocol.build_task_failure("t", model="coco", notification=Notification("t", raw))
    assert failure.limits == expected


@given(JSON, st.sampled_from([*MODELS, "new"]))
def test_any_json_is_a_response_or_an_analyze_error(raw: Any, model: str) -> None:
    body = codec.dumps(raw)
    kind = MODELS[model].analysis_type if model in MODELS else OtherAnalysis
    envelope = raw if isinstance(raw, dict) else {"data": raw}
    refusal: ResponseDecodeError | None = None
    try:
        response = protocol.read_result(model, kind, envelope, body=body)
    except ResponseDecodeError as error:
        refusal = error
    if refusal is not None:
        assert (refusal.raw_body, refusal.ambiguous) == (body, True)
        assert str(refusal).isprintable()
        return
    assert repr(response)
    assert isinstance(response.entity, str | None)
    assert isinstance(response.request_id, str | None)
    hash(response)
    assert all(isinstance(limit, Limit) for limit in response.limits)


@pytest.mark.parametrize("body", [b"", b" ", b"{", b"null", b"[]", b'{"data":', b"{}", b"[" * 9999])
def test_a_200_that_cannot_be_read_may_have_been_charged(body: bytes) -> None:
    with pytest.raises(ResponseDecodeError) as caught:
        protocol.read_response(Captioning(URL), body)
    assert caught.value.ambiguous
    with pytest.raises(ResponseDecodeError) as caught:
        protocol.read_accepted(body, model="captioning")
    assert caught.value.ambiguous
    with pytest.raises(ResponseDecodeError) as caught:
        protocol.read_task_status("t", body)  # a poll costs nothing
    assert not caught.value.ambiguous


WILD = ["\x1b]0;pwn\x07", "\x1b[2J", "\x9b31m", "a\r\nb", "\u202e", "\u2066", "\ud800", "\0", "\x7f", "\ue000", "\u2028"]  # fmt: skip


@pytest.mark.parametrize("wild", WILD, ids=ascii)
@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500, 302])
def test_external_text_is_shortened_and_escaped_in_messages(status: int, wild: str) -> None:
    text = wild + "A" * 100_000
    error = {"code": text, "message": text, "details": {"feature_name": text}, "request_id": text}
    for content in (
        {"error": error},
        {"error": text},
        text,
        {"error": {**error, "code": "MA_00008"}},
    ):
        body = codec.dumps(content)
        headers = {"X-Request-Id": text}
        said = str(protocol.read_error(status, headers, body, now=NOW, model="coco"))
        assert len(said) < 2500
        assert said.isprintable()
        said.encode()
    for raw in ({"task_id": text, "error": error, "http_status": status}, {"error": text}):
        failure = protocol.build_task_failure(
            text, model="coco", notification=Notification(text, raw)
        )
        assert len(str(failure)) < 2500
        assert str(failure).isprintable()
    with pytest.raises(ResponseDecodeError) as caught:
        protocol.read_response(Captioning(URL), text.encode("utf-8", "replace"))
    assert str(caught.value).isprintable()


def exhausted(status: int = 429, *, code: str | None = None, feature: str | None = "object_detection", **limit: Any) -> ApiError:  # fmt: skip
    entry = {"type": "object_detection", "remaining": 0, **limit}
    content = {"error": {"code": code}, "limits": {"addons_quota": [entry]}}
    return protocol.read_error(
        status, {}, codec.dumps(content), now=NOW, model="coco", feature=feature
    )


@pytest.mark.parametrize(
    ("error", "is_quota"),
    [
        (exhausted(code="MA_00429"), True),
        (exhausted(code=None), True),
        (exhausted(code="MA_00008", remaining=5), True),
        (exhausted(code="MA_00008", remaining=None), True),
        (exhausted(remaining=-3), True),
        (exhausted(feature=None), True),
        (exhausted(code="MA_00429", remaining=5), False),
        (exhausted(remaining=None), False),
        (exhausted(type="ai_vision"), False),  # the limits of another feature
        (exhausted(status=403), False),
        (exhausted(status=503), False),
    ],
)
def test_an_exhausted_quota_is_recognized_by_its_limits(error: ApiError, is_quota: bool) -> None:
    assert isinstance(error, QuotaExceededError) is is_quota
    if isinstance(error, QuotaExceededError):
        assert error.feature in {"object_detection", None}


@pytest.mark.parametrize(
    "reset_time",
    ["9999-12-31T23:59:59.999999Z", "0001-01-01", "0001-01-01T00:00:00Z", "2026-12-01T00:00:00Z",
     "9999-12-31T23:59:59-12:00", "0001-01-01T00:00:00+12:00", "", "soon", 5, [], None, 1e300],
)  # fmt: skip
def test_errors_accept_any_reset_time(reset_time: Any) -> None:
    error = exhausted(reset_time=reset_time)
    assert isinstance(error, QuotaExceededError)
    assert "is used up" in str(error)
    if error.reset_time is not None:
        assert datetime.fromtimestamp(error.reset_time, UTC).year in {1, 2026, 9999}
    assert load_error(dump_error(error)).limits == error.limits  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("raw", "kind", "final", "stop"),
    [
        ({"http_status": 400}, TaskFailedError, True, None),
        ({"http_status": 422}, TaskFailedError, True, None),
        ({"http_status": 404}, TaskFailedError, True, None),
        ({"http_status": 500}, TaskFailedError, False, None),
        ({"http_status": 503}, TaskFailedError, False, None),
        ({"http_status": 429}, TaskFailedError, False, None),
        ({"http_status": 401}, TaskFailedError, False, Stop.EVERYTHING),
        ({"http_status": 403}, TaskFailedError, False, Stop.MODEL),
        ({"http_status": 429, "error": {"code": "MA_00008"}}, QuotaExceededError, False, Stop.FEATURE),
        (
            {"http_status": 429, "limits": {"items": [{"type": "object_detection", "remaining": 0}]}},
            QuotaExceededError,
            False,
            Stop.FEATURE,
        ),
        ({"error": {"category": "server_error"}}, TaskFailedError, False, None),
        ({"error": {"category": "user_error"}}, TaskFailedError, True, None),
        ({"error": {"category": "rate_limit_error"}}, TaskFailedError, False, None),
        (
            {"error": {"category": "rate_limit_error", "code": "MA_00008"}},
            QuotaExceededError,
            False,
            Stop.FEATURE,
        ),
        ({"error": "it broke"}, TaskFailedError, True, None),
        ({"http_status": 200, "error": {"message": "x"}}, TaskFailedError, True, None),
        ({"data": {"status": "failed"}}, TaskFailedError, True, None),
        ({"data": {"status": "failed", "error": {"category": "server_error"}}}, TaskFailedError, False, None),
        ({"http_status": 503.0}, TaskFailedError, False, None),
    ],
)  # fmt: skip
def test_a_failed_task_has_the_error_of_its_status(
    raw: dict[str, Any], kind: type[AnalyzeError], final: bool, stop: Stop | None
) -> None:
    notification = parse_notification(codec.dumps({"task_id": "t", **raw}))
    assert notification.failed
    error = protocol.build_task_failure("t", model="coco", notification=notification, body=b"all")
    assert type(error) is kind
    assert (error.task_id, error.model, error.raw_body) == ("t", "coco", b"all")
    assert is_final(error) is final
    assert find_stop(error, Settings()) is stop
    assert vars(pickle.loads(pickle.dumps(error))) == vars(error)


@pytest.mark.parametrize("depth", [100, 101, 600, 1010])
def test_an_errors_deep_details_survive_pickling(depth):
    inner = "[" * depth + "]" * depth
    body = f'{{"error":{{"message":"No.","details":{inner}}}}}'.encode()
    error = protocol.read_error(400, {}, body, now=0)
    assert codec.dumps(error.details["details"]).count(b"[") == depth
    assert pickle.loads(pickle.dumps(error)).details == error.details
    assert load_error(dump_error(error)).details == error.details
