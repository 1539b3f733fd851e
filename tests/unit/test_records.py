"""Records: one JSON format for every outcome, with the complete analysis."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from cloudinary_analyze._wire.protocol import read_error, read_response
from cloudinary_analyze.errors import InvalidRequestError, TransportError
from cloudinary_analyze.outcomes import Answered, AnyOutcome, Failed
from cloudinary_analyze.requests import MODELS, Asset, Coco, Uri
from cloudinary_analyze.results.records import InputItem, InputLine, build_record, dump_record

URL = "https://example.com/a.jpg?token=x"
FIELDS = [
    *("index", "file", "line", "source", "model", "item_key", "key", "status", "analysis"),
    *("entity", "request_id", "limits", "restored", "seconds", "error", "input"),
]
Sample = Callable[[str], dict[str, Any]]


def reload(outcome: AnyOutcome) -> dict[str, Any]:
    """Return the record as a reader of the file receives it."""
    line = dump_record(build_record(outcome))
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    record: dict[str, Any] = json.loads(line)
    assert list(record) == FIELDS
    return record


PLAIN_MODELS = sorted(name for name in MODELS if not name.startswith("ai_vision"))


@pytest.mark.parametrize("model", PLAIN_MODELS)
def test_a_result_is_recorded_with_its_whole_analysis(model: str, sample: Sample):
    payload = sample(model)
    request = MODELS[model](URL)
    item = InputItem(InputLine(17, URL, Uri(URL)), model)
    response = read_response(request, json.dumps(payload).encode())
    record = reload(Answered(item=item, index=4, request=request, response=response, seconds=1.5))
    assert record["analysis"] == payload["data"]["analysis"]
    assert record["request_id"] == payload["request_id"]
    assert (record["index"], record["line"], record["source"]) == (4, 17, URL)
    assert (record["model"], record["key"], record["status"]) == (model, request.key, "ok")
    assert (record["seconds"], record["error"]) == (1.5, None)


def test_limits_are_recorded_in_one_shape(sample: Sample):
    request = Coco(URL)
    response = read_response(request, json.dumps(sample("coco")).encode())
    record = reload(Answered(item=request, index=0, request=request, response=response))
    assert record["limits"]
    for limit in record["limits"]:
        assert list(limit) == ["type", "used_by_request", "remaining", "limit", "reset_time"]


def test_a_refusal_is_recorded_with_the_services_message(sample: Sample):
    body = json.dumps(sample("error_429_quota")).encode()
    error = read_error(429, {}, body, now=0.0, model="coco", feature="object_detection")
    request = Coco(Asset("0a1b"))
    record = reload(Failed(item=request, index=0, request=request, error=error))
    assert (record["status"], record["source"], record["line"]) == ("error", "asset:0a1b", None)
    assert record["error"] == {
        "type": "QuotaExceededError",
        "message": error.message,
        "status": 429,
        "code": "MA_00008",
        "details": error.details,
        "request_id": error.request_id,
        "ambiguous": False,
    }
    assert record["request_id"] == error.request_id


def test_a_failure_that_may_have_been_charged_says_so():
    error = TransportError("No answer.", ambiguous=True)
    request = Coco(URL)
    told = reload(Failed(item=request, index=0, request=request, error=error))["error"]
    assert told["ambiguous"] is True
    assert (told["status"], told["code"], told["message"]) == (None, None, "No answer.")


def test_a_bad_line_is_recorded_without_a_model():
    line = InputLine(3, "nonsense", error=InvalidRequestError("It is not a URL."))
    record = reload(Failed(item=InputItem(line), index=2, error=line.error))
    assert (record["line"], record["source"]) == (3, "nonsense")
    assert (record["model"], record["key"]) == (None, None)
    assert record["error"]["type"] == "InvalidRequestError"


def test_a_foreign_error_is_recorded_by_its_name():
    class Odd(Exception):
        status = object()  # the fields of foreign errors are ignored

    told = reload(Failed(item=object(), index=0, error=Odd()))["error"]
    assert told["type"] == "Odd"
    assert "Odd" in told["message"]
    assert told["status"] is None


def test_an_unpaired_surrogate_does_not_break_a_record():
    record = reload(Failed(item=None, index=0, error=ValueError("half a pair: \ud83d")))
    assert record["error"]["message"].startswith("half a pair: ")
