"""Requests are validated at construction and sent as the caller specified."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import itertools
import json
import pickle
import re
from enum import StrEnum
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import urlsplit

import attrs
import pydantic
import pytest
import starlette.datastructures
import yarl
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
ODD = st.sampled_from(
    [
        None, True, 10**400, 1j, "", URL, "cat", "\ud800", b"x", Path("a"), object(), int, print,
        range(3), ValueError("x"), yarl.URL(URL), TagDefinition("a", "b"), Asset("a"), 0.5, {1, 2},
    ]
)  # fmt: skip
ANYTHING = st.recursive(
    ODD | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
ALL = [kind(URL, **PARAMETERS.get(name, {})) for name, kind in MODELS.items()]


def test_there_are_fifteen_models_with_the_services_names() -> None:
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
def test_the_body_matches_the_contract(sample: Any, name: str, build: Any) -> None:
    assert json.loads(build(sample(name))) == sample(name)


def test_a_subclass_of_a_source_is_sent_like_it() -> None:
    class OwnUri(Uri):
        pass

    class OwnAsset(Asset):
        pass

    assert json.loads(build_body(Captioning(OwnUri(URL)))) == {"source": {"uri": URL}}
    assert json.loads(build_body(Captioning(OwnAsset("id")))) == {"source": {"asset_id": "id"}}


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


def test_equal_requests_of_any_class_have_one_key() -> None:
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


def test_different_requests_have_different_keys() -> None:
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


def test_a_key_never_changes() -> None:
    """Ledgers store keys, so a changed recipe would charge every item again."""
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
        "http\u017f://images.example/a.jpg",  # the long s, which case folding turns into s
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
def test_an_invalid_source_is_refused_with_what_to_pass(source: Any) -> None:
    with pytest.raises(InvalidRequestError, match="Pass the full URL of the image"):
        Captioning(source)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (Path("folder/a.jpg"), "not the local file 'folder/a.jpg'. "),
        (PureWindowsPath("C:\\a.jpg"), "upload('C:\\\\a.jpg')"),
        ("photo.JPG", "If it is a local file, upload it first: "),
        ("/srv/images/photo", "upload('/srv/images/photo')"),
        ("./photo", "upload('./photo')"),
        ("~/photo", "upload('~/photo')"),
        ("file:///etc/passwd", "upload('file:///etc/passwd')"),
        ("C:\\images\\photo.jpg", "If it is a local file"),
        (b"\xff\xd8\xff", "not bytes. "),
        (bytearray(b"\xff"), "not bytearray. "),
        (memoryview(b"\xff"), "not memoryview. "),
        (io.BytesIO(b"\xff"), "not BytesIO. "),
        ("DATA:image/png;base64,pLanted" + "A" * 100_000, "A data: URI cannot be analyzed"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_file_is_refused_with_the_code_to_upload_it(source: Any, said: str) -> None:
    for build in (Captioning, Uri, lambda source: OtherModel("new", source)):
        with pytest.raises(InvalidRequestError) as caught:
            build(source)
        text = str(caught.value)
        assert said in text
        assert re.search(r'cloudinary\.uploader\.upload\(.+\)\["secure_url"\]', text)
        assert len(text) < 600
        assert "pLanted" not in text


@pytest.mark.parametrize("source", ["folder/sample", "a.jpg?x", "sample", "ftp://h/a.jpg", 5, None])
def test_other_sources_are_not_called_files(source: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Captioning(source)
    assert "upload(" not in str(caught.value)


@pytest.mark.parametrize(
    "make", [yarl.URL, pydantic.HttpUrl, starlette.datastructures.URL, urlsplit]
)
def test_a_url_object_is_a_source_and_becomes_a_string(make: Any) -> None:
    url = "https://images.example/a.jpg?x=%20b&y=%C3%A4"
    request = Captioning(make(url))
    assert request == Captioning(Uri(make(url))) == Captioning(url)
    assert type(request.source.uri) is str
    assert (request.key, pickle.loads(pickle.dumps(request))) == (Captioning(url).key, request)
    with pytest.raises(InvalidRequestError, match=r"not an http\(s\) URL"):
        Captioning(urlsplit("ftp://images.example/a.jpg"))


def test_a_string_enum_is_its_value() -> None:
    pictures = StrEnum("Pictures", {"cat": URL})
    assert type(Captioning(pictures.cat).source.uri) is str
    assert Captioning(pictures.cat) == Captioning(URL)
    assert AIVisionGeneral(URL, prompts=[pictures.cat]).key == AIVisionGeneral(URL, prompts=URL).key


@pytest.mark.parametrize("asset_id", ["", "a/b", "a b", "../x", None, 5, "a?b"])
def test_an_invalid_asset_id_is_refused(asset_id: Any) -> None:
    with pytest.raises(InvalidRequestError, match="not an asset id"):
        Asset(asset_id)


@pytest.mark.parametrize("count", [0, 11, 50])
def test_a_request_has_one_to_ten_parameters(count: int) -> None:
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


@pytest.mark.parametrize(
    "values",
    [{"a", "b"}, {"a": 1}, b"ab", 5, None, itertools.count(), (1 / 0 for _ in "a"), Path("a")],
    ids=lambda values: type(values).__name__,
)
def test_prompts_must_be_an_ordered_list(values: Any) -> None:
    """The order of a set, and so the key of the request, would change between runs."""
    for build in (
        lambda: AIVisionGeneral(URL, prompts=values),
        lambda: AIVisionModeration(URL, rejection_questions=values),
        lambda: AIVisionTagging(URL, tag_definitions=values),
    ):
        with pytest.raises(InvalidRequestError):
            build()


def test_an_endless_iterator_of_prompts_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="not 11 or more"):
        AIVisionGeneral(URL, prompts=itertools.repeat("Again?"))


@given(
    kind=st.sampled_from([*MODELS.values(), OtherModel, Uri, Asset, TagDefinition]), data=st.data()
)
def test_every_request_accepts_or_refuses_any_value(kind: Any, data: st.DataObject) -> None:
    values = {field.alias: data.draw(ANYTHING, field.alias) for field in attrs.fields(kind)}
    with contextlib.suppress(InvalidRequestError):
        made = kind(**values)
        assert pickle.loads(pickle.dumps(made)) == made


@given(name=ANYTHING)
def test_any_model_name_is_found_or_refused(name: Any) -> None:
    with contextlib.suppress(InvalidRequestError):
        assert find_request_type(name) in MODELS.values()


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
    with pytest.raises(InvalidRequestError, match="not a tag name"):
        TagDefinition(name, "Is there a cat?")


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "a?b", None, "é"])
def test_an_invalid_model_name_is_refused(name: Any) -> None:
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
        "no JSON",
        {1: 2, "a": 3},
        {"a": [[]] * 2 + [{}] * 2, "b": {object()}},
    ],
)
def test_non_json_and_reserved_parameters_are_refused(parameters: Any) -> None:
    with pytest.raises(InvalidRequestError):
        OtherModel("x", URL, parameters)


def test_every_request_can_be_evolved() -> None:
    request = OtherModel("new", URL, {"a": [1, {"b": 2**80}]})
    moved = attrs.evolve(request, source="https://other.example/b.jpg")
    assert moved == OtherModel("new", "https://other.example/b.jpg", request.parameters)
    assert attrs.evolve(request, name="newer", parameters={"c": 1}) == OtherModel(
        "newer", URL, {"c": 1}
    )
    assert attrs.evolve(request) == request
    assert OtherModel("new", URL, None) == OtherModel("new", URL)
    assert pickle.loads(pickle.dumps(request)) == copy.deepcopy(request) == request
    for other in ALL:
        assert attrs.evolve(other) == other


def test_an_unknown_model_is_sent_as_it_is() -> None:
    request = OtherModel("brand_new-v2", Asset("abc"), {"threshold": 0.5, "big": 2**80})
    assert request.model == "brand_new-v2"
    assert json.loads(build_body(request)) == {
        "source": {"asset_id": "abc"},
        "threshold": 0.5,
        "big": 2**80,
    }


def test_a_request_copies_its_parameters() -> None:
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
def test_other_spellings_find_the_model(name: str) -> None:
    assert find_request_type(name) is GoogleLogoDetection
    assert OtherModel(name, URL).model == "google_logo_detection"


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidRequestError, match=r"captioning, .*OtherModel"):
        find_request_type("caption")


@given(st.text(min_size=1, max_size=40))
def test_names_and_ids_stay_in_their_path_segment(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    url = build_task_url("https://h", text, text)
    assert url.count("/") == len(["", "", "v2", "analysis", "cloud", "tasks", "id"])
    assert "?" not in url
    assert "#" not in url
    assert build_analyze_url("https://h", text, text).count("/") == url.count("/")
