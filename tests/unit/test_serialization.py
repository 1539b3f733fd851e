"""`to_dict` and `to_json` write every value as standard JSON, for any response of the service."""

from __future__ import annotations

import enum
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudinary_analyze import (
    MODELS,
    AnalyzeError,
    Answered,
    Asset,
    BulkStoppedError,
    Captioning,
    Coco,
    ConfigurationError,
    Credentials,
    Failed,
    Limit,
    OtherModel,
    QuotaExceededError,
    Response,
    ResultNotDeliveredError,
    SessionStats,
    TaskStatus,
    Uri,
    analyses,
    errors,
    serialization,
    to_dict,
    to_json,
)

URL = "https://images.example/a.jpg"
ANALYSES = [
    value for value in vars(analyses).values() if isinstance(value, type) and attrs.has(value)
]
LIMIT = Limit("ai_vision", remaining=0, reset_time=datetime(2026, 12, 1, tzinfo=UTC))


def read(model: str, raw: dict[str, Any]) -> Response[Any]:
    return Response.from_raw(MODELS[model], raw)


def read_caption(caption: str, **envelope: Any) -> Response[Any]:
    analysis = {"data": {"caption": caption}, "model_version": 1}
    return Response.from_raw(Captioning, {"data": {"analysis": analysis}, **envelope})


@pytest.mark.parametrize("model", MODELS)
def test_every_response_is_written_and_read_back(model: str, sample: Any) -> None:
    response = read(model, sample(model))
    written = to_dict(response)
    assert list(written) == ["model", "entity", "request_id", "limits", "analysis"]
    assert json.loads(to_json(response)) == written == dict(response)
    assert to_dict(response.analysis) == written["analysis"] == dict(response.analysis)
    assert written["limits"] == [to_dict(limit) for limit in response.limits]
    with_raw = to_dict(response, raw=True)
    assert with_raw["raw"] == response.raw
    assert Response.from_raw(MODELS[model], with_raw["raw"]) == response


def test_detections_are_written_with_every_attribute(sample: Any) -> None:
    response = read("cld_fashion", sample("cld_fashion"))
    written = to_dict(response.analysis)["detections"]
    assert written
    for found, shown in zip(response.analysis.detections, written, strict=True):
        assert shown["label"] == found.label
        assert shown["bounding_box"] == (found.bounding_box and list(found.bounding_box))
        assert shown["categories"] == list(found.categories)
        assert shown["attributes"] == {
            name: [{"value": each.value, "score": each.score} for each in values]
            for name, values in found.attributes.items()
        }
        assert "raw" not in shown
        assert to_dict(found, raw=True)["raw"] == found.raw


def test_an_unknown_models_analysis_is_written_as_received() -> None:
    analysis = {"what": [1, {"ever": None}], "model_version": "x"}
    request = OtherModel("new", URL)
    response = Response.from_raw(request, {"data": {"analysis": analysis}})
    assert to_dict(response)["analysis"] == {"model_version": "x", "raw": analysis}
    assert Response.from_raw(request, to_dict(response, raw=True)["raw"]) == response


@pytest.mark.parametrize("speedup", [True, False], ids=["orjson", "json"])
@pytest.mark.parametrize("more", [None, math.nan], ids=["", "nan"])
def test_integers_keep_their_digits(
    speedup: bool, more: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not speedup:
        monkeypatch.setattr(serialization, "orjson", None)
    response = read_caption("a", big=[2**63, 2**64, -(2**80), 1, 0.5, more])
    written = to_dict(response, raw=True)
    assert written["raw"]["big"] == [2**63, 2**64, -(2**80), 1, 0.5, None]
    assert f"{2**64},{-(2**80)}" in to_json(response, raw=True)


@pytest.mark.parametrize("speedup", [True, False], ids=["orjson", "json"])
def test_what_json_cannot_represent_is_replaced(
    speedup: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not speedup:
        monkeypatch.setattr(serialization, "orjson", None)
    response = read_caption("half \ud800 ä", odd=[math.nan, {"a": -math.inf}, 1.5])
    written = to_dict(response, raw=True)
    assert written["analysis"]["caption"] == "half \ufffd ä"
    assert written["raw"]["odd"] == [None, {"a": None}, 1.5]
    assert to_json(response, raw=True).encode()


def test_nesting_of_any_depth_is_written() -> None:
    deep: Any = []
    for _ in range(600):
        deep = [deep]
    response = read_caption("a", deep=deep)
    assert to_dict(response)["analysis"]["caption"] == "a"
    assert to_dict(response, raw=True)["raw"] == response.raw
    for _ in range(100_000):
        deep = [deep]
    assert to_json(read_caption("a", deep=deep), raw=True).count("[") >= 100_600
    with pytest.raises(ConfigurationError, match="nested too deeply"):
        to_dict(read_caption("a", deep=deep), raw=True)
    while deep:  # so that its deallocation does not recurse either
        deep = deep[0]


def test_limits_statuses_and_stats_are_written() -> None:
    assert to_dict(LIMIT) == {
        "type": "ai_vision",
        "used_by_request": None,
        "remaining": 0,
        "limit": None,
        "reset_time": "2026-12-01T00:00:00+00:00",
    }
    status = TaskStatus("053f", "completed", request_id="r", raw={"data": {}})
    assert to_dict(status) == {
        "task_id": "053f",
        "state": "completed",
        "finished": True,
        "request_id": "r",
    }
    assert to_dict(status, raw=True)["raw"] == {"data": {}}
    stats = SessionStats(calls=3, notifications={"resolved": 2})
    assert to_dict(stats) == attrs.asdict(stats)


def test_requests_are_written_with_source_and_parameters() -> None:
    assert to_dict(Coco(Asset("abc"))) == {
        "model": "coco",
        "source": {"asset_id": "abc"},
        "parameters": {},
    }
    other = OtherModel("new", URL, {"a": {"b": [2**80]}})
    assert to_dict(other) == {
        "model": "new",
        "source": {"uri": URL},
        "parameters": {"a": {"b": [2**80]}},
    }


def test_errors_are_written_with_their_fields() -> None:
    error = QuotaExceededError(
        "Used up.", status=429, code="MA_00008", details={"a": [1, None]}, limits=(LIMIT,),
        raw_body=b'{"a": "\xff"}', feature="ai_vision", ambiguous=True,
    )  # fmt: skip
    written = to_dict(error)
    assert (written["type"], written["message"]) == ("QuotaExceededError", "Used up.")
    assert (written["ambiguous"], written["status"], written["feature"]) == (True, 429, "ai_vision")
    assert written["details"] == {"a": [1, None]}
    assert written["limits"] == [to_dict(LIMIT)]
    assert "raw_body" not in written
    assert to_dict(error, raw=True)["raw_body"] == '{"a": "\ufffd"}'
    error.add_note("a note")
    assert to_dict(error) == written
    nested = BulkStoppedError("Stopped.", reason=error)
    assert to_dict(nested)["reason"] == written
    status = TaskStatus("t1", "completed")
    missing = ResultNotDeliveredError("Missing.", task_id="t1", last_status=status)
    assert to_dict(missing)["last_status"] == to_dict(status)


@pytest.mark.parametrize(
    "kind",
    [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AnalyzeError)],
    ids=lambda kind: kind.__name__,
)  # fmt: skip
def test_every_error_is_written(kind: type[AnalyzeError]) -> None:
    written = to_dict(kind("It went wrong."))
    assert list(written)[:3] == ["type", "message", "ambiguous"]
    assert set(written) >= {name for name in vars(kind("x")) if name != "raw_body"}


@pytest.mark.parametrize("kind", ANALYSES, ids=lambda kind: kind.__name__)
def test_every_field_of_an_analysis_is_written(kind: type[Any]) -> None:
    left_out = {"tags"} if issubclass(kind, analyses.DetectionAnalysis) else set()
    keys = serialization.list_keys(kind, raw=True)
    assert {field.name for field in attrs.fields(kind)} - left_out <= set(keys)


@pytest.mark.parametrize(
    "value",
    [None, 5, "text", {}, [], object(), Captioning, Credentials("demo", "1", "pLanted")],
    ids=lambda value: type(value).__name__,
)
def test_other_values_are_refused(value: Any) -> None:
    for write in (to_dict, to_json):
        with pytest.raises(ConfigurationError) as caught:
            write(value)
        assert "pLanted" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@pytest.mark.slow
@given(
    model=st.sampled_from(sorted(MODELS)),
    tags=st.dictionaries(
        st.text(),
        JSON
        | st.lists(
            st.fixed_dictionaries(
                {}, optional=dict.fromkeys(["confidence", "bounding-box", "categories", "attributes"], JSON)
            )
        ),
    ),
    envelope=st.dictionaries(st.sampled_from(["limits", "request_id", "entity", "x"]), JSON),
)  # fmt: skip
def test_any_response_is_written_as_strict_json(model: str, tags: Any, envelope: Any) -> None:
    raw = {"data": {"analysis": {"tags": tags, "model_version": envelope.get("x")}}, **envelope}
    kind = Coco if "vision" in model else MODELS[model]
    try:
        response = Response.from_raw(kind, raw)
    except AnalyzeError:
        return
    for with_raw in (False, True):
        text = to_json(response, raw=with_raw)
        text.encode()
        json.loads(text, parse_constant=pytest.fail)


class Unwritable:
    def __str__(self) -> str:
        raise RuntimeError("no text")


def write_item(item: Any) -> Any:
    return to_dict(make_outcome(item))["item"]


@pytest.mark.parametrize(
    ("item", "shown"),
    [
        (URL, URL),
        (None, None),
        ({"a": (1, 2.5, True), 3: {4}}, {"a": [1, 2.5, True], "3": [4]}),
        (Path("a.jpg"), "a.jpg"),
        (Uri(URL), {"uri": URL}),
        (Coco(URL), {"model": "coco", "source": {"uri": URL}, "parameters": {}}),
        (LIMIT, to_dict(LIMIT)),
        (datetime(2026, 1, 1, tzinfo=UTC), "2026-01-01T00:00:00+00:00"),
        (enum.Enum("Shade", {"red": "r"})["red"], "r"),
        (2**100, 2**100),
        (b"a\xff", "a\ufffd"),
        (math.nan, None),
        ("\ud800", "\ufffd"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_item_is_written_as_json_or_as_its_text(item: Any, shown: Any) -> None:
    assert write_item(item) == shown


def test_an_item_that_holds_credentials_shows_no_secret() -> None:
    credentials = Credentials("demo", "1", "pLanted")
    assert "pLanted" not in str(write_item([credentials]))


def test_items_that_cannot_be_written_are_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    for item in (endless, Unwritable(), 10**5000):
        with pytest.raises(ConfigurationError, match="cannot be written as JSON"):
            write_item(item)


def make_outcome(item: Any, error: Exception | None = None) -> Any:
    if error is not None:
        return Failed(item=item, index=3, error=error)
    return Answered(item=item, index=3, request=Captioning(URL), response=read_caption("a cat"))


def test_outcomes_are_written_with_item_and_response() -> None:
    outcome = make_outcome(URL)
    written = to_dict(outcome)
    assert set(written) == {field.name for field in attrs.fields(type(outcome))}
    assert written["response"] == to_dict(outcome.response)
    assert written["request"] == to_dict(outcome.request)
    assert (written["item"], written["index"], written["error"]) == (URL, 3, None)
    failed = to_dict(make_outcome(URL, KeyError("photo")))
    assert failed["error"] == {"type": "KeyError", "message": "'photo'", "ambiguous": False}
    assert (failed["response"], failed["request"]) == (None, None)
