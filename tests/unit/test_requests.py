"""A request is checked when it is made, and says to the service exactly what was meant."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudinary_analyze import (
    MODELS,
    AIVisionGeneral,
    AIVisionModeration,
    AIVisionTagging,
    Asset,
    Captioning,
    Coco,
    GoogleLogoDetection,
    InvalidRequestError,
    OtherModel,
    TagDefinition,
    Uri,
    find_request_type,
)
from cloudinary_analyze._wire.protocol import build_analyze_url, build_body, build_task_url

URL = "https://res.cloudinary.com/demo/image/upload/sample.jpg"
PARAMETERS: dict[str, dict[str, Any]] = {
    "ai_vision_general": {"prompts": ["Describe this image"]},
    "ai_vision_moderation": {"rejection_questions": ["Is there any nudity?"]},
    "ai_vision_tagging": {"tag_definitions": [TagDefinition("cat", "Is there a cat?")]},
}
ALL = [kind(URL, **PARAMETERS.get(name, {})) for name, kind in MODELS.items()]


def test_there_are_fifteen_models_with_the_names_of_the_wire() -> None:
    assert sorted(MODELS) == [
        "ai_vision_general",
        "ai_vision_moderation",
        "ai_vision_tagging",
        "captioning",
        "cld_fashion",
        "cld_text",
        "coco",
        "google_logo_detection",
        "google_tagging",
        "human_anatomy",
        "image_quality",
        "lvis",
        "shop_classifier",
        "unidet",
        "watermark_detection",
    ]
    features = {name: kind.feature for name, kind in MODELS.items()}
    assert {name for name in features if features[name] == "google_tagging"} == {
        "google_logo_detection",
        "google_tagging",
    }
    assert {name for name in features if features[name] == "ai_vision"} == {
        "ai_vision_general",
        "ai_vision_moderation",
        "ai_vision_tagging",
    }


@pytest.mark.parametrize(
    ("name", "build"),
    [
        (
            "request_ai_vision_general",
            lambda body: build_body(AIVisionGeneral(URL, prompts=body["prompts"])),
        ),
        (
            "request_ai_vision_moderation",
            lambda body: build_body(
                AIVisionModeration(URL, rejection_questions=body["rejection_questions"])
            ),
        ),
        (
            "request_ai_vision_tagging",
            lambda body: build_body(
                AIVisionTagging(
                    URL,
                    tag_definitions={t["name"]: t["description"] for t in body["tag_definitions"]},
                )
            ),
        ),
        (
            "request_captioning_async",
            lambda body: build_body(
                Captioning(Asset(body["source"]["asset_id"])),
                as_task=True,
                notification_url=body["notification_url"],
            ),
        ),
    ],
)
def test_the_body_is_the_contracts(sample: Any, name: str, build: Any) -> None:
    assert json.loads(build(sample(name))) == sample(name)


@pytest.mark.parametrize("request_", ALL, ids=lambda request: request.model)
def test_every_request_is_a_frozen_picklable_value(request_: Any) -> None:
    assert pickle.loads(pickle.dumps(request_)) == request_
    assert copy.deepcopy(request_) == request_
    assert hash(copy.copy(request_)) == hash(request_)
    assert pickle.loads(pickle.dumps(request_)).key == request_.key
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        request_.source = Uri("https://other.example/")
    moved = attrs.evolve(request_, source="https://other.example/b.jpg")
    assert type(moved) is type(request_)
    assert moved.key != request_.key


def test_equal_questions_have_one_key_whatever_class_asks() -> None:
    keys = {
        Captioning(URL).key,
        Captioning(Uri(URL)).key,
        OtherModel("captioning", URL, {}).key,
        OtherModel("Captioning", URL).key,
    }
    assert len(keys) == 1
    assert (
        AIVisionGeneral(URL, prompts=["a"]).key
        == OtherModel("ai-vision-general", URL, {"prompts": ["a"]}).key
    )
    assert OtherModel("x", URL, {"a": 1, "b": 2}).key == OtherModel("x", URL, {"b": 2, "a": 1}).key


def test_different_questions_have_different_keys() -> None:
    requests = [
        Captioning(URL),
        Coco(URL),
        Captioning(URL + "?v=2"),
        Captioning(Asset("abc")),
        Captioning("https://abc"),
        OtherModel("captioning", URL, {"a": 1}),
        AIVisionGeneral(URL, prompts=["a", "b"]),
        AIVisionGeneral(URL, prompts=["b", "a"]),
        AIVisionGeneral(URL, prompts=["a,b"]),
    ]
    assert len({request.key for request in requests}) == len(requests)
    assert len(set(requests)) == len(requests)


def test_a_key_is_the_same_for_ever() -> None:
    """Ledgers on disk hold keys: changing the recipe means to pay again for everything."""
    recipes = {
        rb'["1","captioning",["uri","https://example.com/\u00e4.jpg"],{}]': Captioning(
            "https://example.com/ä.jpg"
        ),
        b'["1","ai_vision_general",["asset_id","abc"],{"prompts":["b","a"]}]': AIVisionGeneral(
            Asset("abc"), prompts=["b", "a"]
        ),
    }
    for recipe, request in recipes.items():
        assert request.key == hashlib.sha256(recipe).hexdigest()


@pytest.mark.parametrize(
    "source",
    [
        "sample",
        "folder/sample.jpg",
        "cloudinary://demo/sample",
        "ftp://example.com/a.jpg",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "http://",
        "http\u017f://images.example/a.jpg",  # a long s, which folds to s
        "https:///a.jpg",
        "https://example.com/a b.jpg",
        " https://example.com/a.jpg",
        "https://example.com/\n",
        "https://example.com/\ud800",
        "",
        None,
        5,
        b"https://example.com/a.jpg",
        ["https://example.com"],
    ],
)
def test_what_is_no_source_is_refused_and_the_sentence_tells_what_to_pass(source: Any) -> None:
    with pytest.raises(InvalidRequestError, match="Pass the full URL of the image"):
        Captioning(source)


@pytest.mark.parametrize("asset_id", ["", "a/b", "a b", "../x", None, 5, "a?b"])
def test_what_is_no_asset_id_is_refused(asset_id: Any) -> None:
    with pytest.raises(InvalidRequestError, match="no asset id"):
        Asset(asset_id)


@pytest.mark.parametrize("count", [0, 11, 50])
def test_one_to_ten_parameters(count: int) -> None:
    texts = [f"question {index}" for index in range(count)]
    with pytest.raises(InvalidRequestError, match="1 to 10 prompts"):
        AIVisionGeneral(URL, prompts=texts)
    with pytest.raises(InvalidRequestError, match="1 to 10 rejection questions"):
        AIVisionModeration(URL, rejection_questions=texts)
    with pytest.raises(InvalidRequestError, match="1 to 10 tag definitions"):
        AIVisionTagging(
            URL,
            tag_definitions=[
                TagDefinition(f"tag-{index}", text) for index, text in enumerate(texts)
            ],
        )


def test_a_single_prompt_may_be_a_string() -> None:
    assert AIVisionGeneral(URL, prompts="What is it?").prompts == ("What is it?",)


@pytest.mark.parametrize("text", ["", "  ", None, 5, "half \ud800"])
def test_texts_that_cannot_be_sent_are_refused(text: Any) -> None:
    for build in (
        lambda: AIVisionGeneral(URL, prompts=["ok", text]),
        lambda: AIVisionModeration(URL, rejection_questions=[text]),
        lambda: TagDefinition("cat", text),
    ):
        with pytest.raises(InvalidRequestError):
            build()


@pytest.mark.parametrize("name", ["Cat", "my_tag", "a b", "", "ä", None, "cat\n"])
def test_tag_names_the_service_refuses_are_refused_unsent(name: Any) -> None:
    with pytest.raises(InvalidRequestError, match="no tag name"):
        TagDefinition(name, "Is there a cat?")


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "a?b", None, "é"])
def test_what_is_no_model_name_is_refused(name: Any) -> None:
    with pytest.raises(InvalidRequestError):
        OtherModel(name, URL)


@pytest.mark.parametrize(
    "parameters",
    [
        {"source": 1},
        {"async": True},
        {"notification_url": "x"},
        {"a": float("nan")},
        {"a": object()},
        {"a": b"bytes"},
        {"a": "half \ud800"},
        {"half \ud800": 1},
        [1],
        "[1]",
    ],
)
def test_parameters_that_are_no_json_or_take_ours_are_refused(parameters: Any) -> None:
    with pytest.raises(InvalidRequestError):
        OtherModel("x", URL, parameters)


def test_an_unknown_model_is_sent_as_it_is() -> None:
    request = OtherModel("brand_new-v2", Asset("abc"), {"threshold": 0.5, "big": 2**80})
    assert request.model == "brand_new-v2"
    assert json.loads(build_body(request)) == {
        "source": {"asset_id": "abc"},
        "threshold": 0.5,
        "big": 2**80,
    }


def test_a_frozen_request_does_not_see_later_changes_of_its_parameters() -> None:
    parameters = {"words": ["a"]}
    request = OtherModel("x", URL, parameters)
    parameters["words"].append("b")
    request.parameters["words"].append("c")  # type: ignore[index]
    assert request.parameters == {"words": ["a"]}


@pytest.mark.parametrize(
    "name",
    [
        "google_logo_detection",
        "google_logo_detections",
        "Google-Logo-Detection",
        " google_logo_detections ",
    ],
)
def test_the_guides_plural_and_other_spellings_find_the_singular(name: str) -> None:
    assert find_request_type(name) is GoogleLogoDetection
    assert OtherModel(name, URL).model == "google_logo_detection"


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidRequestError, match=r"captioning, .*OtherModel"):
        find_request_type("caption")


@given(st.text(min_size=1, max_size=40))
def test_no_cloud_name_or_task_id_leaves_its_segment_of_the_path(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    url = build_task_url("https://h", text, text)
    assert url.count("/") == len(["", "", "v2", "analysis", "cloud", "tasks", "id"])
    assert "?" not in url
    assert "#" not in url
    assert build_analyze_url("https://h", text, text).count("/") == url.count("/")
