"""Every payload of the contract is parsed into its type without loss."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import attrs
import pytest

from cloudinary_analyze import (
    MODELS,
    AIVisionTagging,
    AnalyzeRequest,
    Answered,
    AttributeValue,
    BoundingBox,
    Captioning,
    CldFashion,
    CldTextAnalysis,
    Coco,
    CocoAnalysis,
    Detection,
    GoogleLabel,
    GoogleLogoDetection,
    GoogleTagging,
    ImageQuality,
    InvalidRequestError,
    LogoVertex,
    ModerationAnswer,
    OtherModel,
    Response,
    ResponseDecodeError,
    TagDefinition,
    VisionAnswer,
    VisionTag,
    Watermark,
)
from cloudinary_analyze._wire import codec
from cloudinary_analyze._wire.protocol import read_response
from cloudinary_analyze.analyses import DetectedTags
from cloudinary_analyze.events import TaskAccepted
from cloudinary_analyze.testing import build_response

URL = "https://res.cloudinary.com/demo/image/upload/sample.jpg"
PARAMETERS: dict[str, dict[str, Any]] = {
    "ai_vision_general": {"prompts": ["a", "b"]},
    "ai_vision_moderation": {"rejection_questions": ["a"]},
    "ai_vision_tagging": {"tag_definitions": [TagDefinition("cat", "A cat?")]},
}
DETECTORS = (
    "cld_text",
    "coco",
    "human_anatomy",
    "lvis",
    "shop_classifier",
    "unidet",
    "cld_fashion",
)
FASHION = CldFashion(URL)


def build(model: str) -> AnalyzeRequest[Any]:
    return MODELS[model](URL, **PARAMETERS.get(model, {}))


def read(request: AnalyzeRequest[Any], analysis: dict[str, Any], **envelope: Any) -> Any:
    return read_response(
        request, codec.dumps({"data": {"entity": URL, "analysis": analysis}, **envelope})
    )


@pytest.mark.parametrize("model", MODELS)
def test_every_models_sample_is_parsed_without_loss(sample: Any, model: str) -> None:
    content = sample(model)
    response = read_response(build(model), codec.dumps(content))
    assert response.raw == content
    assert response.model == model
    assert response.entity == URL
    assert response.request_id == "17c3b70c5096df0e77e838323abb7029"
    assert type(response.analysis) is MODELS[model].analysis_type
    assert response.analysis.model_version == content["data"]["analysis"].get("model_version")
    (limit,) = response.limits
    (entry,) = content["limits"]["addons_quota"]
    assert (limit.type, limit.used_by_request, limit.remaining, limit.limit, limit.reset_time) == (
        entry["type"],
        entry["used_by_request"],
        entry["remaining"],
        entry["limit"],
        None,
    )
    assert limit.type == MODELS[model].feature
    assert pickle.loads(pickle.dumps(response)) == response
    assert copy.deepcopy(response) == response
    assert hash(response) == hash(pickle.loads(pickle.dumps(response)))


@pytest.mark.parametrize("model", MODELS)
def test_another_model_keeps_the_analysis_as_received(sample: Any, model: str) -> None:
    content = sample(model)
    response = read_response(OtherModel("x-" + model, URL), codec.dumps(content))
    assert response.analysis.raw == content["data"]["analysis"]
    assert response.analysis.model_version == content["data"]["analysis"].get("model_version")


def test_the_custom_model_of_schema_0_1_is_read(sample: Any) -> None:
    response = read_response(
        OtherModel("custom", URL, {"model_name": "m", "model_version": 1}),
        codec.dumps(sample("custom_v0_1_0_removed")),
    )
    assert response.analysis.raw == {"tags": {}, "model_version": 1}
    (limit,) = response.limits
    assert (limit.type, limit.used_by_request, limit.remaining) == ("object_detection", 1, None)


def test_the_caption_is_read_from_the_nested_data(sample: Any) -> None:
    analysis = read_response(Captioning(URL), codec.dumps(sample("captioning"))).analysis
    assert analysis.caption.startswith("A white and tan sneaker")
    assert analysis.model_version == 4


def test_results_of_the_vision_models_are_read(sample: Any) -> None:
    general = read_response(build("ai_vision_general"), codec.dumps(sample("ai_vision_general")))
    assert general.analysis.responses[1] == VisionAnswer("Yes, the image contains an insect.")
    assert len(general.analysis.answers) == 2
    moderation = read_response(
        build("ai_vision_moderation"), codec.dumps(sample("ai_vision_moderation"))
    ).analysis
    assert moderation.responses == (
        ModerationAnswer("no", "Does the image contain any violent activity?"),
        ModerationAnswer("unknown", "Is there any nudity in the image?"),
    )
    assert not moderation.rejected


@pytest.mark.parametrize(
    ("value", "rejected"),
    [("yes", True), ("Yes ", True), ("no", False), ("unknown", False), ("maybe", False)],
)
def test_an_unknown_moderation_value_never_raises(value: str, rejected: bool) -> None:
    response = read(build("ai_vision_moderation"), {"responses": [{"prompt": "?", "value": value}]})
    assert response.analysis.responses[0].value == value
    assert response.analysis.rejected is rejected


def test_tags_of_ai_vision_tagging_are_an_array(sample: Any) -> None:
    some = read_response(build("ai_vision_tagging"), codec.dumps(sample("ai_vision_tagging")))
    assert some.analysis.tags == (VisionTag("vegetation"),)
    assert some.analysis.names == ("vegetation",)
    none = read_response(
        build("ai_vision_tagging"), codec.dumps(sample("ai_vision_tagging_no_match"))
    )
    assert none.analysis.tags == ()
    items = read_response(
        AIVisionTagging(URL, tag_definitions={"cat": "A cat?"}),
        codec.dumps(sample("limits_items_variant")),
    )
    assert items.analysis.names == ("cat", "table")
    (limit,) = items.limits
    assert limit.reset_time is not None
    assert limit.reset_time.isoformat() == "2024-01-20T12:34:56+00:00"


@pytest.mark.parametrize("model", DETECTORS)
def test_every_detection_keeps_every_field(sample: Any, model: str) -> None:
    content = sample(model)
    analysis = read_response(build(model), codec.dumps(content)).analysis
    raw_tags = content["data"]["analysis"]["tags"]
    assert list(analysis.tags) == list(raw_tags)
    assert len(analysis.tags) == len(raw_tags)
    assert len(analysis.detections) == sum(map(len, raw_tags.values()))
    for label, entries in raw_tags.items():
        for found, entry in zip(analysis.tags[label], entries, strict=True):
            box = entry.get("bounding-box")
            assert found.label == label
            assert found.confidence == entry["confidence"]
            assert found.categories == tuple(entry["categories"])
            assert found.bounding_box == (BoundingBox(*box) if box else None)
            assert type(found.bounding_box) is (BoundingBox if box else type(None))
            assert found.raw == entry
            assert {k: [[v.value, v.score] for v in vs] for k, vs in found.attributes.items()} == (
                entry.get("attributes", {})
            )


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({}, Detection("cat", None, None, {})),
        ({"confidence": None}, Detection("cat", None, None, {"confidence": None})),
        ({"confidence": "high"}, Detection("cat", None, None, {"confidence": "high"})),
        ({"confidence": True}, Detection("cat", None, None, {"confidence": True})),
        ({"confidence": 1}, Detection("cat", 1, None, {"confidence": 1})),
        (
            {"bounding-box": [1, 2, 3]},
            Detection("cat", None, None, {"bounding-box": [1, 2, 3]}),
        ),
        (
            {"bounding-box": [1, 2, 3, None]},
            Detection("cat", None, None, {"bounding-box": [1, 2, 3, None]}),
        ),
        (
            {"bounding_box": [1, 2, 3, 4]},
            Detection("cat", None, None, {"bounding_box": [1, 2, 3, 4]}),
        ),
        (
            {"bounding-box": [1, 2, 3, 4]},
            Detection("cat", None, BoundingBox(1, 2, 3, 4), {"bounding-box": [1, 2, 3, 4]}),
        ),
        ({"categories": None}, Detection("cat", None, None, {"categories": None})),
        ({"categories": "pet"}, Detection("cat", None, None, {"categories": "pet"})),
        (
            {"categories": ["pet", 5], "new": [1]},
            Detection("cat", None, None, {"categories": ["pet", 5], "new": [1]}),
        ),
        ("an odd one", Detection("cat", None, None, "an odd one")),
        (None, Detection("cat", None, None, None)),
        ([1], Detection("cat", None, None, [1])),
    ],
)
def test_a_detection_of_any_shape_is_read_and_kept(entry: Any, expected: Detection) -> None:
    (found,) = read(Coco(URL), {"tags": {"cat": [entry]}}).analysis.tags["cat"]
    assert found == expected
    assert type(found.raw) is type(entry)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"categories": ["pet", 5]}, ("pet", "5")),
        ({"categories": []}, ()),
        ({"categories": None}, ()),
        ({"categories": "pet"}, ()),
        ({}, ()),
        ("an odd one", ()),
    ],
)
def test_categories_of_any_shape_are_strings(entry: Any, expected: tuple[str, ...]) -> None:
    (found,) = read(Coco(URL), {"tags": {"cat": [entry]}}).analysis.tags["cat"]
    assert found.categories == expected


@pytest.mark.parametrize("value", [None, 5, "cat", {"confidence": 1}, True])
def test_a_label_without_an_array_has_no_instances(value: Any) -> None:
    response = read(Coco(URL), {"tags": {"odd": value, "cat": [{}]}})
    tags = response.analysis.tags
    assert tags["odd"] == ()
    assert len(tags["cat"]) == 1
    assert tags.raw["odd"] == value
    assert len(response.analysis.detections) == 1


@pytest.mark.parametrize("analysis", [{}, {"tags": None}, {"tags": []}, {"tags": "x"}])
def test_a_detector_without_tags_has_no_detections(analysis: dict[str, Any]) -> None:
    response = read(Coco(URL), analysis)
    assert response.analysis.detections == ()
    assert response.raw["data"]["analysis"] == analysis


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ([["midi", 0.5]], (AttributeValue("midi", 0.5),)),
        ([["midi"]], (AttributeValue("midi"),)),
        ([["midi", 0.5, "more"]], (AttributeValue("midi", 0.5),)),
        ([["midi", "high"]], (AttributeValue("midi"),)),
        ([[]], ()),
        ([[None, 0.5]], ()),
        ([], ()),
        (["midi"], (AttributeValue("midi"),)),
        ("midi", (AttributeValue("midi"),)),
        (None, ()),
    ],
)
def test_attribute_lists_of_any_length_are_read(
    sent: Any, expected: tuple[AttributeValue, ...]
) -> None:
    response = read(FASHION, {"tags": {"skirt": [{"attributes": {"skirt length": sent}}]}})
    found = response.analysis.tags["skirt"][0]
    assert found.attributes["skirt length"] == expected
    assert found.raw["attributes"]["skirt length"] == sent


@pytest.mark.parametrize("attributes", [None, [], "x", 5])
def test_attributes_of_another_shape_are_empty(attributes: Any) -> None:
    response = read(FASHION, {"tags": {"skirt": [{"attributes": attributes}]}})
    assert response.analysis.tags["skirt"][0].attributes == {}


def test_detected_tags_are_a_mapping_that_pickles() -> None:
    tags = DetectedTags({"cat": [{"confidence": 0.5}], "odd": 5})
    assert tags["cat"] is tags["cat"]
    assert pickle.loads(pickle.dumps(tags)) == tags == copy.deepcopy(tags)
    assert tags != DetectedTags({})
    assert tags.get("dog") is None
    assert "cat" in tags
    assert "0.5" in repr(tags)
    with pytest.raises(KeyError):
        tags["dog"]


def test_a_detection_that_was_read_is_frozen() -> None:
    raw = {"confidence": 0.5, "bounding-box": [1, 2, 3, 4]}
    (found,) = DetectedTags({"cat": [raw]})["cat"]
    assert type(found) is Detection
    assert found == Detection("cat", 0.5, BoundingBox(1, 2, 3, 4), raw)
    assert hash(found) == hash(copy.copy(found)) == hash(pickle.loads(pickle.dumps(found)))
    for name in ("label", "confidence", "bounding_box", "raw", "other"):
        with pytest.raises(AttributeError):
            setattr(found, name, None)
    with pytest.raises(AttributeError):
        del found.label


def test_missing_coordinates_of_a_logo_are_zero(sample: Any) -> None:
    (logo,) = read_response(
        GoogleLogoDetection(URL), codec.dumps(sample("google_logo_detection"))
    ).analysis.logos
    assert (logo.description, logo.score, logo.mid) == ("google", 0.980325, "/m/045c7b")
    assert logo.vertices == (
        LogoVertex(12, 42),
        LogoVertex(439, 42),
        LogoVertex(439, 285),
        LogoVertex(12, 285),
    )
    part = {"description": "x", "bounding_poly": {"vertices": [{"x": 5}, {"y": 6}, {}, None, "z"]}}
    (logo,) = read(GoogleLogoDetection(URL), {"logo_annotations": [part]}).analysis.logos
    assert logo.vertices == (LogoVertex(5, 0), LogoVertex(0, 6), LogoVertex())
    assert (logo.score, logo.mid) == (None, None)


@pytest.mark.parametrize("poly", [None, {}, [], {"vertices": None}, {"vertices": {}}, "x"])
def test_a_logo_without_vertices_is_read(poly: Any) -> None:
    sent = {"logo_annotations": [{"description": "x", "bounding_poly": poly}, {"description": "y"}]}
    response = read(GoogleLogoDetection(URL), sent)
    assert [logo.vertices for logo in response.analysis.logos] == [(), ()]
    assert response.raw["data"]["analysis"] == sent


def test_results_of_the_small_models_are_read(sample: Any) -> None:
    labels = read_response(GoogleTagging(URL), codec.dumps(sample("google_tagging"))).analysis
    assert labels.labels == (GoogleLabel("cat", 0.9), GoogleLabel("table", 0.8))
    assert labels.model_version is None
    quality = read_response(ImageQuality(URL), codec.dumps(sample("image_quality"))).analysis
    assert (quality.quality, quality.score, quality.confidence) == ("medium", 0.45218, 0.8)
    assert read(ImageQuality(URL), {"quality": "superb"}).analysis.quality == "superb"
    marks = read_response(build("watermark_detection"), codec.dumps(sample("watermark_detection")))
    assert marks.analysis.detections == (Watermark("banner", 0.99),)
    assert read(build("watermark_detection"), {"detections": []}).analysis.detections == ()


@pytest.mark.parametrize("version", [1, "1.0.3", 2.5, None, [1], {"major": 1}])
def test_a_model_version_of_any_type_is_accepted(version: Any) -> None:
    for request, body in (
        (Captioning(URL), {"data": {"caption": "A cat"}}),
        (Coco(URL), {"tags": {}}),
        (GoogleTagging(URL), {"label_annotations": {"labels": []}}),
        (OtherModel("new", URL), {"x": 1}),
    ):
        response = read(request, {**body, "model_version": version})
        expected = version if isinstance(version, int | str | float) else None
        assert response.analysis.model_version == expected
        assert response.raw["data"]["analysis"]["model_version"] == version


def test_unknown_fields_are_accepted_and_kept(sample: Any) -> None:
    for model in MODELS:
        content = sample(model)
        content["later"] = {"a": 1}
        content["data"]["later"] = [1]
        content["data"]["analysis"]["later"] = "x"
        response = read_response(build(model), codec.dumps(content))
        assert response.raw["later"] == {"a": 1}
        assert response.raw["data"]["analysis"]["later"] == "x"


def test_optional_values_of_a_wrong_type_are_tolerated() -> None:
    assert read(ImageQuality(URL), {"quality": "low", "score": "n/a"}).analysis.score is None
    label = {"labels": [{"label": "cat", "score": None}]}
    assert read(GoogleTagging(URL), {"label_annotations": label}).analysis.labels[0].score is None
    logo = {"description": "x", "mid": 5}
    assert (
        read(GoogleLogoDetection(URL), {"logo_annotations": [logo]}).analysis.logos[0].mid is None
    )


def test_a_box_unpacks_and_pickles(sample: Any) -> None:
    analysis = read_response(build("coco"), codec.dumps(sample("coco"))).analysis
    box = analysis.detections[0].bounding_box
    x, y, width, height = box
    assert (x, y, width, height) == (box.x, box.y, box.width, box.height)
    assert repr(box) == f"BoundingBox(x={x}, y={y}, width={width}, height={height})"
    copy = pickle.loads(pickle.dumps(box))
    assert (copy, type(copy)) == (box, BoundingBox)


REQUIRED = {
    "ai_vision_general": {"responses"},
    "ai_vision_moderation": {"responses"},
    "ai_vision_tagging": {"tags"},
    "captioning": {"data", "data.caption"},
    "google_logo_detection": {"logo_annotations"},
    "google_tagging": {"label_annotations"},
}
VARIANTS = {  # as the vendor's schema allows
    "ai_vision_general": {"responses": [{}]},
    "ai_vision_moderation": {"responses": [{}, {"prompt": "?"}]},
    "ai_vision_tagging": {"tags": [{}]},
    "captioning": {"data": {"caption": ""}},
    "google_logo_detection": {"logo_annotations": []},
    "google_tagging": {"label_annotations": {}},
    "image_quality": {},
    "watermark_detection": {},
}


def list_paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each field, in objects at any depth."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in entries:
        if isinstance(value, dict):
            yield (*path, key)
        if isinstance(inner, (dict, list)):
            yield from list_paths(inner, (*path, key))


@pytest.mark.parametrize("change", ["drop", "null", "odd"])
@pytest.mark.parametrize("model", MODELS)
def test_a_response_without_any_optional_field_is_read(
    sample: Any, model: str, change: str
) -> None:
    content = sample(model)
    required = {("data", "analysis", *path.split(".")) for path in REQUIRED.get(model, ())}
    required |= {("data",), ("data", "analysis")}
    paths = [path for path in list_paths(content) if path not in required]
    assert len(paths) > 5
    for path in paths:
        changed = copy.deepcopy(content)
        parent = changed
        for key in path[:-1]:
            parent = parent[key]
        if change == "drop":
            del parent[path[-1]]
        elif change == "null" or isinstance(parent[path[-1]], list):
            parent[path[-1]] = None  # an array of another type is refused: nothing is dropped
        else:
            parent[path[-1]] = {"odd": True}
        response = read_response(build(model), codec.dumps(changed))
        assert response.raw == changed
        assert hash(response)
        assert repr(response)
        for name in ("answers", "names", "rejected", "detections"):
            getattr(response.analysis, name, None)


@pytest.mark.parametrize("model", VARIANTS)
def test_what_the_schema_allows_is_read(model: str) -> None:
    response = read(build(model), VARIANTS[model])
    assert type(response.analysis) is MODELS[model].analysis_type


def test_missing_text_is_empty() -> None:
    assert read(build("ai_vision_general"), {"responses": [{}]}).analysis.answers == ("",)
    moderation = read(build("ai_vision_moderation"), {"responses": [{}]}).analysis
    assert (moderation.responses, moderation.rejected) == ((ModerationAnswer(),), False)
    assert read(build("ai_vision_tagging"), {"tags": [{}]}).analysis.names == ("",)
    assert read(GoogleTagging(URL), {"label_annotations": None}).analysis.labels == ()
    assert read(ImageQuality(URL), {}).analysis.quality == ""


@pytest.mark.parametrize("model", MODELS)
def test_a_response_is_rebuilt_from_its_json(sample: Any, model: str) -> None:
    response = read_response(build(model), codec.dumps(sample(model)))
    assert Response.from_raw(build(model), response.raw) == response
    assert Response.from_raw(MODELS[model], response.raw) == response


@pytest.mark.parametrize("model", MODELS)
def test_a_response_can_be_built_for_tests(model: str) -> None:
    response = build_response(model)
    assert response == build_response(MODELS[model])
    assert type(response.analysis) is MODELS[model].analysis_type
    assert (response.model, response.entity) == (model, "https://images.example/a.jpg")
    assert response.limits[0].type == MODELS[model].feature
    assert len(response.request_id or "") == 32


def test_a_response_is_built_from_request_and_analysis() -> None:
    response = build_response(Captioning(URL), {"data": {"caption": "a cat"}})
    assert (response.analysis.caption, response.entity) == ("a cat", URL)
    other = build_response(OtherModel("new", URL), {"x": 1})
    assert other.analysis.raw == {"x": 1}
    with pytest.raises(InvalidRequestError, match="pass `analysis`"):
        build_response(OtherModel("new", URL))
    with pytest.raises(InvalidRequestError, match="Unknown model"):
        build_response("nonsense")
    with pytest.raises(ResponseDecodeError, match="caption"):
        build_response(Captioning, {"data": {}})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Detection("cat", None, None, {"x": 1}), "label='cat', confidence=None, bounding_box=None"),
        (CocoAnalysis(), "model_version=None, tags=DetectedTags({})"),
        (TagDefinition("a", "b"), "name='a', description='b'"),
        (TaskAccepted(task_id="a", model="b"), "task_id='a', model='b'"),
    ],
)
def test_a_repr_shows_every_field_that_is_not_hidden(value: Any, text: str):
    assert repr(value) == f"{type(value).__name__}({text})"


def test_values_are_equal_if_their_compared_fields_are() -> None:
    request = Coco(URL)
    response = Response(CocoAnalysis(), model="coco", raw={"a": 1})
    outcome = Answered(item=1, index=0, request=request, response=response)
    assert outcome == attrs.evolve(outcome, seconds=5.0, queued=1.0)  # times are not compared
    assert hash(outcome) == hash(attrs.evolve(outcome, seconds=5.0))
    for changes in ({"item": 2}, {"index": 1}, {"request": Coco(f"{URL}?2")}, {"restored": True}):
        assert outcome != attrs.evolve(outcome, **changes)
    other = attrs.evolve(response, raw={"a": 2})
    assert response != other
    assert hash(response) == hash(other)  # JSON objects and arrays are unhashable
    assert CocoAnalysis() != CldTextAnalysis()
    assert Coco(URL) != Captioning(URL)
    assert len({Coco(URL), Coco(URL), Captioning(URL)}) == 2
    assert Coco(URL) != URL
