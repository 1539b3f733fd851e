"""For any JSON, the codec returns a typed value or raises one error with a path."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudinary_analyze import MODELS, BadRequestError, Captioning, OtherModel
from cloudinary_analyze._wire import codec
from cloudinary_analyze._wire.protocol import read_response
from cloudinary_analyze.ledger.encoding import dump_error, load_error

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["data", "caption", "tags", "name", "responses", "value", "prompt", "detections",
             "labels", "label_annotations", "logo_annotations", "description", "bounding_poly",
             "vertices", "x", "score", "quality", "model_version", "confidence", "other"]
        ),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip
KINDS = [kind.analysis_type for kind in MODELS.values()] + [OtherModel.analysis_type]


@given(kind=st.sampled_from(KINDS), raw=st.dictionaries(st.text(max_size=5), JSON) | JSON)
def test_any_object_is_read_or_refused_with_one_error(kind: type[Any], raw: Any) -> None:
    if not isinstance(raw, dict):
        raw = {"data": raw, "tags": raw, "responses": raw, "detections": raw,
               "label_annotations": raw, "logo_annotations": raw, "quality": raw}  # fmt: skip
    try:
        analysis = codec.read_analysis(raw, kind)
    except codec.CodecError:
        return
    assert isinstance(analysis, kind)
    hash(analysis), repr(analysis)
    if hasattr(analysis, "detections"):
        for found in analysis.detections:
            hash(found), repr(found)
            getattr(found, "attributes", None)


@pytest.mark.parametrize(
    ("model", "raw", "path", "reason"),
    [
        ("captioning", {}, ".data", "an object, not null"),
        ("captioning", {"data": []}, ".data", "an object, not list"),
        ("captioning", {"data": {}}, ".data.caption", "missing"),
        ("captioning", {"data": {"caption": None}}, ".data.caption", "a string, not null"),
        ("captioning", {"data": {"caption": 5}}, ".data.caption", "a string, not int"),
        ("google_tagging", {}, ".label_annotations", "an object, not null"),
        (
            "google_tagging",
            {"label_annotations": {"labels": [{"label": "a"}, "b"]}},
            ".label_annotations.labels[1]",
            "an object, not str",
        ),
        ("google_logo_detection", {}, ".logo_annotations", "missing"),
        (
            "google_logo_detection",
            {"logo_annotations": ["x"]},
            ".logo_annotations[0]",
            "an object, not str",
        ),
        ("ai_vision_general", {"responses": {}}, ".responses", "an array, not dict"),
        ("ai_vision_general", {}, ".responses", "missing"),
        ("ai_vision_general", {"responses": [None]}, ".responses[0]", "an object, not null"),
        ("ai_vision_tagging", {"tags": {"cat": []}}, ".tags", "an array, not dict"),
        ("watermark_detection", {"detections": [5]}, ".detections[0]", "an object, not int"),
    ],
)
def test_the_error_names_the_place_and_the_reason(
    model: str, raw: dict[str, Any], path: str, reason: str
) -> None:
    with pytest.raises(codec.CodecError, match=reason) as caught:
        codec.read_analysis(raw, MODELS[model].analysis_type)
    assert caught.value.path == path


@given(JSON)
def test_what_is_written_is_read_back(value: Any) -> None:
    assert codec.loads(codec.dumps(value)) == json.loads(json.dumps(value))


def test_integers_over_64_bits_can_be_sent() -> None:
    assert json.loads(codec.dumps({"a": 2**70})) == {"a": 2**70}


@pytest.mark.parametrize("fast", [True, False])
def test_the_speed_extra_refuses_no_readable_json(
    monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    if not fast:
        monkeypatch.setattr(codec, "orjson", None)
    body = rb'{"data":{"analysis":{"data":{"caption":"half \ud800"}},"score":NaN}}'
    response = read_response(Captioning("https://example.com/a.jpg"), body)
    assert response.analysis.caption == "half \ud800"


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("beside", [1, 2**70, "\ud800"])
def test_json_is_written_without_nan(
    monkeypatch: pytest.MonkeyPatch, fast: bool, beside: object
) -> None:
    if not fast:
        monkeypatch.setattr(codec, "orjson", None)
    numbers = [float("nan"), float("inf"), float("-inf"), 0.5]
    written = codec.dumps({"numbers": numbers, "beside": beside})
    assert b'"numbers":[null,null,null,0.5]' in written
    assert codec.loads(written)["beside"] == beside


def test_the_standard_library_reads_json_without_orjson(monkeypatch: pytest.MonkeyPatch) -> None:
    from cloudinary_analyze._wire.protocol import read_error

    monkeypatch.setattr(codec, "orjson", None)
    assert codec.dumps({"a": "ä"}) == '{"a":"ä"}'.encode()
    body = rb'{"error":{"message":"half \ud800","details":{"text":"half \ud800"}}}'
    error = read_error(400, {}, body, now=0)
    assert isinstance(error, BadRequestError)
    assert error.raw_body == body
    assert "half" in str(error)
    assert str(error).encode()


NUMBERS = [-(2**63) - 1, 2**63, 2**64 - 1, 2**64, -(10**30), 10**30, 10**18, 1.5, 0]


@pytest.mark.parametrize("fast", [True, False])
def test_integers_of_any_size_stay_integers(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    if not fast:
        monkeypatch.setattr(codec, "orjson", None)
    body = json.dumps({"numbers": NUMBERS}).encode()
    for read in (codec.loads(body), codec.loads(codec.dumps(codec.loads(body)))):
        assert read == {"numbers": NUMBERS}
        assert [type(number) for number in read["numbers"]] == [type(n) for n in NUMBERS]


@pytest.mark.parametrize("fast", [True, False])
def test_an_integer_too_long_to_convert_is_kept_as_text(
    monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    if not fast:
        monkeypatch.setattr(codec, "orjson", None)
    assert codec.loads(b"[" + b"1" * 5000 + b", 1]") == ["1" * 5000, 1]


@given(st.integers() | st.floats(allow_nan=False, allow_infinity=False))
def test_the_speed_extra_changes_no_number(number: float) -> None:
    body = json.dumps([number]).encode()
    (read,) = codec.loads(body)
    assert (type(read), read) == (type(number), number)


@pytest.mark.parametrize("depth", [200, 254, 255, 600, 900, 1000, 1020])
@pytest.mark.parametrize(
    ("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}"), (b"[1,[2],", b"]")]
)
def test_readable_nesting_is_written_and_read_back(
    depth: int, opening: bytes, closing: bytes
) -> None:
    body = opening * depth + b"1" + closing * depth
    value = codec.loads(body)
    assert codec.dumps(value) == body
    error = BadRequestError("No.", status=400, details={"deep": value}, raw_body=body)
    again = load_error(dump_error(error)) if depth < 1000 else error
    assert codec.dumps(getattr(again, "details", None)) == codec.dumps({"deep": value})


def test_nesting_is_the_same_without_the_speed_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "orjson", None)
    body = b"[" * 850 + b"]" * 850
    assert codec.dumps(codec.loads(body)) == body


@pytest.mark.parametrize("odd", [b"NaN", b"1" * 30])
def test_the_nesting_limit_is_the_same_everywhere(odd: bytes) -> None:
    with pytest.raises((ValueError, RecursionError)):
        codec.loads(b"[" * 1100 + odd + b"]" * 1100)
    assert codec.is_deep(json.loads("[" * 500 + "1" + "]" * 500), 499)
    assert not codec.is_deep(json.loads("[" * 500 + "1" + "]" * 500), 500)


@given(JSON)
def test_deep_values_are_written_like_shallow_ones(value: Any) -> None:
    assert codec.dump_deep(value) == json.dumps(value, ensure_ascii=False, separators=(",", ":"))


@pytest.mark.parametrize("fast", [True, False])
def test_an_unpaired_surrogate_is_kept(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    if not fast:
        monkeypatch.setattr(codec, "orjson", None)
    for text in ("\ud800", "\\\ud800", 'a"\udfff"', "\u00e4"):
        assert json.loads(codec.dumps({text: [text]})) == {text: [text]}
