"""One typed request per model: what to analyze, and how.

Requests are frozen, hashable and picklable. They are validated when they are created, so an invalid
request is never sent. Hints are resolved at run time: nothing is imported for type checking only.

Source: the bodies of ``POST /v2/analysis/{cloud}/analyze/{model}``. The docstrings below leave out
``/v2/analysis/{cloud}``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from itertools import islice
from typing import Any, ClassVar, Final, Generic, TypeVar, cast

import attrs

from cloudinary_analyze._values import Described, URLObject, quote, read_url
from cloudinary_analyze.analyses import (
    AIVisionGeneralAnalysis,
    AIVisionModerationAnalysis,
    AIVisionTaggingAnalysis,
    CaptioningAnalysis,
    CldFashionAnalysis,
    CldTextAnalysis,
    CocoAnalysis,
    GoogleLogoDetectionAnalysis,
    GoogleTaggingAnalysis,
    HumanAnatomyAnalysis,
    ImageQualityAnalysis,
    LvisAnalysis,
    OtherAnalysis,
    ShopClassifierAnalysis,
    UnidetAnalysis,
    WatermarkDetectionAnalysis,
)
from cloudinary_analyze.errors import InvalidRequestError

__all__ = [
    "MODELS",
    "AIVisionGeneral",
    "AIVisionModeration",
    "AIVisionTagging",
    "AnalyzeRequest",
    "Asset",
    "Captioning",
    "CldFashion",
    "CldText",
    "Coco",
    "GoogleLogoDetection",
    "GoogleTagging",
    "HumanAnatomy",
    "ImageQuality",
    "Lvis",
    "OtherModel",
    "ShopClassifier",
    "TagDefinition",
    "Unidet",
    "Uri",
    "WatermarkDetection",
    "find_request_type",
]

A_co = TypeVar("A_co", covariant=True)

KEY_VERSION: Final = "1"
MOST_PARAMETERS: Final = 10
_is_ascii_url: Final = re.compile(  # as nearly all are
    r"[Hh][Tt][Tt][Pp][Ss]?://[!\"$-.0->@-~][!-~]*"
).fullmatch
# seldom used, so compiled by the first use
_URL = r"[Hh][Tt][Tt][Pp][Ss]?://(?![/?#])[^\s\x00-\x1f\x7f]+"
_ASSET_ID = r"[0-9A-Za-z_-]+"
_MODEL_NAME = r"[0-9A-Za-z][0-9A-Za-z_.-]*"
_TAG_NAME = r"[a-z0-9-]+"


def _read_uri(uri: str | URLObject) -> str:
    if type(uri) is str and _is_ascii_url(uri):
        return uri
    text = read_url(uri)
    if not isinstance(text, str) or not _is_url(text):
        raise _build_source_error(text)
    return text


@attrs.frozen(repr=False, eq=False)
class Uri(Described):
    """A publicly reachable http(s) URL of an image, on Cloudinary or anywhere else.

    Source: ``source.uri`` of the body of ``POST /analyze/{model}``.

    Attributes:
        uri: The URL. A URL object of yarl, pydantic, Starlette, httpx or urllib becomes a string.

    Raises:
        InvalidRequestError: It is not an http(s) URL.
    """

    uri: str = attrs.field(converter=_read_uri)

    def __str__(self) -> str:
        return self.uri


@attrs.frozen(repr=False, eq=False)
class Asset(Described):
    """An asset of the same product environment, by its immutable asset id.

    Source: ``source.asset_id`` of the body of ``POST /analyze/{model}``.

    Attributes:
        asset_id: The asset id (not the public ID), usually 32 hexadecimal digits.

    Raises:
        InvalidRequestError: It is not an asset id.
    """

    asset_id: str

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.asset_id, str) or not re.fullmatch(_ASSET_ID, self.asset_id):
            raise InvalidRequestError(
                f"{quote(self.asset_id)} is not an asset id. Pass the immutable `asset_id` of the "
                "upload response; for a public ID, pass the image's delivery URL instead."
            )

    def __str__(self) -> str:
        return f"asset:{self.asset_id}"


_LOCAL_FILE = (
    r"(?i:file:.*|[/~\\.].*|[a-z]:[\\/].*|[^?#]*\\[^?#]*"
    r"|[^:?#]*\.(?:avif|bmp|gif|heic|jpe?g|pdf|png|psd|svg|tiff?|webp))"
)


def _build_source_error(source: object) -> InvalidRequestError:
    """Say what the source is, and what to write instead."""
    upload = 'cloudinary.uploader.upload({})["secure_url"]'
    if isinstance(source, str):
        if source[:5].lower() == "data:":
            return InvalidRequestError(
                "A data: URI cannot be analyzed. Pass the full URL of the image; to get one, "
                f"upload the data first: {upload.format('data_uri')}."
            )
        hint = ""
        if re.fullmatch(_LOCAL_FILE, source, re.DOTALL):
            hint = f" If it is a local file, upload it first: {upload.format(quote(source))}."
        return InvalidRequestError(
            f"{quote(source)} is not an http(s) URL. Pass the full URL of the image "
            "(https://res.cloudinary.com/<cloud>/image/upload/<public_id> for one on "
            "Cloudinary; a public ID alone is not accepted), or Asset(asset_id). "
            f"White space in a URL must be percent-encoded.{hint}"
        )
    what, argument = type(source).__name__, ""
    if isinstance(source, os.PathLike):
        argument = quote(os.fspath(source))
        what = f"the local file {argument}"
    elif isinstance(source, bytes | bytearray | memoryview) or hasattr(type(source), "read"):
        argument = "data"
    hint = f" To get one, upload the image first: {upload.format(argument)}." if argument else ""
    return InvalidRequestError(
        f"A source must be a URL or Asset(asset_id), not {what}. Pass the full URL of the "
        f"image.{hint}"
    )


def _read_source(source: str | URLObject | Uri | Asset) -> Uri | Asset:
    return source if isinstance(source, (Uri, Asset)) else Uri(source)


def _read_list(values: Any, noun: str) -> tuple[Any, ...]:
    """Return at most one value more than is allowed, so that an endless iterator ends."""
    if isinstance(values, Mapping | AbstractSet | bytes | bytearray) or not isinstance(
        values, Iterable
    ):
        raise InvalidRequestError(f"The {noun} must be a list, not {type(values).__name__}.")
    try:
        read = tuple(islice(values, MOST_PARAMETERS + 1))
    except Exception as error:
        raise InvalidRequestError(f"The {noun} could not be read: {quote(error)}.") from error
    if not 1 <= len(read) <= MOST_PARAMETERS:
        count = len(values) if isinstance(values, list | tuple) else f"{len(read)} or more"
        raise InvalidRequestError(f"There must be 1 to {MOST_PARAMETERS} {noun}, not {count}.")
    return read


def _read_strings(values: Any, noun: str) -> tuple[str, ...]:
    strings = (values,) if isinstance(values, str) else _read_list(values, noun)
    for value in strings:
        if not isinstance(value, str) or not value.strip():
            raise InvalidRequestError(f"Each of the {noun} must be a non-empty string.")
        _check_text(value, noun)
    return tuple(map(str.__str__, strings))


def _read_prompts(values: Iterable[str]) -> tuple[str, ...]:
    return _read_strings(values, "prompts")


def _read_questions(values: Iterable[str]) -> tuple[str, ...]:
    return _read_strings(values, "rejection questions")


def _is_url(value: str) -> bool:
    return re.fullmatch(_URL, value) is not None and _is_text(value)


def _is_text(value: str) -> bool:
    """Whether UTF-8 can hold it: no half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_text(value: str, noun: str) -> None:
    if not _is_text(value):
        raise InvalidRequestError(
            f"The {noun} contain an unpaired surrogate and cannot be encoded as UTF-8."
        )


@attrs.frozen(repr=False, eq=False)
class AnalyzeRequest(Described, Generic[A_co]):
    """The base class of all requests. Not created directly: use the class of a model.

    Source: the body of ``POST /analyze/{model}``.

    Attributes:
        source: What to analyze: `Uri` or `Asset`. An http(s) URL, as a string or a URL object of
            yarl, pydantic, Starlette, httpx or urllib, becomes a `Uri`.
        model_name: The model's name in URLs (of the class).
        feature: The add-on feature whose quota the model uses (of the class). ``None`` if unknown.
        analysis_type: The class of ``response.analysis`` (of the class).

    Raises:
        InvalidRequestError: The source or a parameter is invalid.
    """

    source: Uri | Asset = attrs.field(converter=_read_source)

    model_name: ClassVar[str] = ""
    feature: ClassVar[str | None] = None
    analysis_type: ClassVar[type[Any]] = OtherAnalysis

    @property
    def model(self) -> str:
        """The model's name in URLs, such as ``google_logo_detection``."""
        return self.model_name

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The fields of the body besides ``source``, by the service's names."""
        return _NO_PARAMETERS

    @property
    def key(self) -> str:
        """The key of the request in a ledger. Requests with the same content have the same key.

        64 hexadecimal digits: the SHA-256 of a version, the model's name, the source, and the
        parameters.
        """
        return KeyBuilder(self).build(self.source)


Kind = AnalyzeRequest[A_co] | type[AnalyzeRequest[A_co]]  # a request, or its class alone


def name_model(kind: Kind[Any]) -> str:
    """Return the name of a model in URLs. Empty for a class that names none."""
    return kind.model_name if isinstance(kind, type) else kind.model


_NO_PARAMETERS: Final[Mapping[str, Any]] = {}
_encode_string: Final[Callable[[str], str]] = json.encoder.encode_basestring_ascii


class KeyBuilder:
    """Builds the ledger keys of requests that differ only in their source.

    The model and the parameters are encoded once; a key then costs one hash.

    Args:
        example: Any of these requests.
    """

    def __init__(self, example: AnalyzeRequest[Any]) -> None:
        parameters = "{}"
        if example.parameters:
            parameters = json.dumps(example.parameters, sort_keys=True, separators=(",", ":"))
        self._head = f"[{_encode_string(KEY_VERSION)},{_encode_string(example.model)},["
        self._tail = f"],{parameters}]"

    def build(self, source: Uri | Asset) -> str:
        """Return `AnalyzeRequest.key` of the request with this source."""
        if isinstance(source, Uri):
            return self._hash("uri", source.uri)
        return self._hash("asset_id", source.asset_id)

    def build_named(self, name: str) -> str:
        """Return the key of the request with a name in place of its source."""
        return self._hash("key", name)

    def _hash(self, kind: str, text: str) -> str:
        canonical = f'{self._head}"{kind}",{_encode_string(text)}{self._tail}'
        return hashlib.sha256(canonical.encode()).hexdigest()


@attrs.frozen(repr=False, eq=False)
class AIVisionGeneral(AnalyzeRequest[AIVisionGeneralAnalysis]):
    """Ask free questions about an image. Costs AI Vision tokens.

    Source: ``POST /analyze/ai_vision_general``.

    Attributes:
        prompts: 1 to 10 prompts. A string counts as one prompt.
    """

    prompts: tuple[str, ...] = attrs.field(kw_only=True, converter=_read_prompts)

    model_name = "ai_vision_general"
    feature: ClassVar[str | None] = "ai_vision"
    analysis_type = AIVisionGeneralAnalysis

    @property
    def parameters(self) -> Mapping[str, Any]:
        """See `AnalyzeRequest.parameters`."""
        return {"prompts": list(self.prompts)}


@attrs.frozen(repr=False, eq=False)
class AIVisionModeration(AnalyzeRequest[AIVisionModerationAnalysis]):
    """Ask yes/no questions about an image. Costs AI Vision tokens.

    Source: ``POST /analyze/ai_vision_moderation``.

    Attributes:
        rejection_questions: 1 to 10 yes/no questions. A *yes* rejects the image.
    """

    rejection_questions: tuple[str, ...] = attrs.field(kw_only=True, converter=_read_questions)

    model_name = "ai_vision_moderation"
    feature: ClassVar[str | None] = "ai_vision"
    analysis_type = AIVisionModerationAnalysis

    @property
    def parameters(self) -> Mapping[str, Any]:
        """See `AnalyzeRequest.parameters`."""
        return {"rejection_questions": list(self.rejection_questions)}


@attrs.frozen(repr=False, eq=False)
class TagDefinition(Described):
    """The name of a tag, and the description of the images that it fits.

    Source: an entry of ``tag_definitions`` of the body of ``POST /analyze/ai_vision_tagging``.

    Attributes:
        name: The tag: lower-case letters, digits and hyphens. The service rejects other characters.
        description: When the tag fits, as a sentence or a question.

    Raises:
        InvalidRequestError: The name or the description is invalid.
    """

    name: str
    description: str

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(_TAG_NAME, self.name):
            raise InvalidRequestError(
                f"{quote(self.name)} is not a tag name. The service accepts only lower-case "
                "letters, digits and hyphens."
            )
        if not isinstance(self.description, str) or not self.description.strip():
            raise InvalidRequestError(f"Missing description of the tag {self.name!r}.")
        _check_text(self.description, "tag descriptions")


def _read_definitions(
    values: Iterable[TagDefinition] | Mapping[str, str] | TagDefinition,
) -> tuple[TagDefinition, ...]:
    if isinstance(values, Mapping):
        named = cast("Mapping[str, str]", values)
        values = [TagDefinition(name, description) for name, description in named.items()]
    single = isinstance(values, TagDefinition)
    definitions = (values,) if single else _read_list(values, "tag definitions")
    if not all(isinstance(definition, TagDefinition) for definition in definitions):
        raise InvalidRequestError(
            "Each of the tag_definitions must be a TagDefinition(name, description)."
        )
    return definitions


@attrs.frozen(repr=False, eq=False)
class AIVisionTagging(AnalyzeRequest[AIVisionTaggingAnalysis]):
    """Find which of your own tags fit an image. Costs AI Vision tokens.

    ```python
    request = AIVisionTagging(urls[0], tag_definitions={"indoors": "Does it show a room?"})
    print((await session.analyze(request)).analysis.names)
    ```

    Source: ``POST /analyze/ai_vision_tagging``.

    Attributes:
        tag_definitions: 1 to 10 definitions. The argument can also be a mapping of names to
            descriptions, or one `TagDefinition`.
    """

    tag_definitions: tuple[TagDefinition, ...] = attrs.field(
        kw_only=True, converter=_read_definitions
    )

    model_name = "ai_vision_tagging"
    feature: ClassVar[str | None] = "ai_vision"
    analysis_type = AIVisionTaggingAnalysis

    @property
    def parameters(self) -> Mapping[str, Any]:
        """See `AnalyzeRequest.parameters`."""
        return {"tag_definitions": [attrs.asdict(tag) for tag in self.tag_definitions]}


# Subclasses without fields skip `@attrs.frozen`: decorating each one adds 0.2 ms to import time.
class Captioning(AnalyzeRequest[CaptioningAnalysis]):
    """Describe an image in a sentence.

    Source: ``POST /analyze/captioning``.
    """

    __slots__ = ()
    model_name = "captioning"
    feature: ClassVar[str | None] = "object_detection"
    analysis_type = CaptioningAnalysis


class CldFashion(AnalyzeRequest[CldFashionAnalysis]):
    """Find garments and their attributes.

    Source: ``POST /analyze/cld_fashion``.
    """

    __slots__ = ()
    model_name = "cld_fashion"
    feature: ClassVar[str | None] = "object_detection"
    analysis_type = CldFashionAnalysis


class CldText(AnalyzeRequest[CldTextAnalysis]):
    """Find blocks of text.

    Source: ``POST /analyze/cld_text``.
    """

    __slots__ = ()
    model_name = "cld_text"
    feature: ClassVar[str | None] = "object_detection"
    analysis_type = CldTextAnalysis


class Coco(AnalyzeRequest[CocoAnalysis]):
    """Find 80 common objects.

    Source: ``POST /analyze/coco``.
    """

    __slots__ = ()
    model_name = "coco"
    feature: ClassVar[str | None] = "object_detection"
    analysis_type = CocoAnalysis


class GoogleLogoDetection(AnalyzeRequest[GoogleLogoDetectionAnalysis]):
    """Find logos of known products.

    Source: ``POST /analyze/google_logo_detection`` (singular; the guide writes the plural).
    """

    __slots__ = ()
    model_name = "google_logo_detection"
    feature: ClassVar[str | None] = "google_tagging"
    analysis_type = GoogleLogoDetectionAnalysis


class GoogleTagging(AnalyzeRequest[GoogleTaggingAnalysis]):
    """Label an image with Google's tagging service.

    Source: ``POST /analyze/google_tagging``.
    """

    __slots__ = ()
    model_name = "google_tagging"
    feature: ClassVar[str | None] = "google_tagging"
    analysis_type = GoogleTaggingAnalysis


class HumanAnatomy(AnalyzeRequest[HumanAnatomyAnalysis]):
    """Find parts of the human body.

    Source: ``POST /analyze/human_anatomy``.
    """

    __slots__ = ()
    model_name = "human_anatomy"
    feature: ClassVar[str | None] = "object_detection"
    analysis_type = HumanAnatomyAnalysis


class ImageQuality(AnalyzeRequest[ImageQualityAnalysis]):
    """Rate the technical quality of an image.

    Source: ``POST /analyze/image_quality``.
    """

    __slots__ = ()
    model_name = "image_quality"
    feature: ClassVar[str | None] = "object_detection"
    analysis_type = ImageQualityAnalysis


class Lvis(AnalyzeRequest[LvisAnalysis]):
    """Find everyday objects of more than a thousand kinds.

    Source: ``POST /analyze/lvis``.
    """

    __slots__ = ()
    model_name = "lvis"
    feature: ClassVar[str | None] = "object_detection"
    analysis_type = LvisAnalysis


class ShopClassifier(AnalyzeRequest[ShopClassifierAnalysis]):
    """Classify a product image as a studio or a natural one.

    Source: ``POST /analyze/shop_classifier``.
    """

    __slots__ = ()
    model_name = "shop_classifier"
    feature: ClassVar[str | None] = "object_detection"
    analysis_type = ShopClassifierAnalysis


class Unidet(AnalyzeRequest[UnidetAnalysis]):
    """Find objects with a detector that was trained on several datasets.

    Source: ``POST /analyze/unidet``.
    """

    __slots__ = ()
    model_name = "unidet"
    feature: ClassVar[str | None] = "object_detection"
    analysis_type = UnidetAnalysis


class WatermarkDetection(AnalyzeRequest[WatermarkDetectionAnalysis]):
    """Find watermarks and banners.

    Source: ``POST /analyze/watermark_detection``.
    """

    __slots__ = ()
    model_name = "watermark_detection"
    feature: ClassVar[str | None] = "object_detection"
    analysis_type = WatermarkDetectionAnalysis


MODELS: Final[Mapping[str, type[AnalyzeRequest[Any]]]] = {
    request_type.model_name: request_type
    for request_type in cast(
        "list[type[AnalyzeRequest[Any]]]",
        [
            AIVisionGeneral,
            AIVisionModeration,
            AIVisionTagging,
            Captioning,
            CldFashion,
            CldText,
            Coco,
            GoogleLogoDetection,
            GoogleTagging,
            HumanAnatomy,
            ImageQuality,
            Lvis,
            ShopClassifier,
            Unidet,
            WatermarkDetection,
        ],
    )
}
"""The request classes, by the names of their models in URLs."""

_ALIASES: Final = {"google_logo_detections": "google_logo_detection"}


def read_model_name(name: str) -> str:
    """Return a model's name in URLs, from any spelling that the documentation uses.

    ``google_logo_detections`` (the guide's plural), hyphens and capitals are understood.
    """
    folded = name.strip().lower().replace("-", "_")
    folded = _ALIASES.get(folded, folded)
    return folded if folded in MODELS else name.strip()


def find_request_type(name: str) -> type[AnalyzeRequest[Any]]:
    """Return the request class of a model.

    Source: the last part of the path ``POST /analyze/{model}``.

    Args:
        name: The model's name in URLs. Hyphens, capitals and the plural
            ``google_logo_detections`` are accepted.

    Raises:
        InvalidRequestError: The model is unknown. The message lists the known ones.
    """
    request_type = MODELS.get(read_model_name(name)) if isinstance(name, str) else None
    if request_type is None:
        raise InvalidRequestError(
            f"Unknown model {quote(name)}. The known models are {', '.join(sorted(MODELS))}. "
            "For a newer one, use OtherModel(name, source, parameters)."
        )
    return request_type


def _freeze_parameters(parameters: Mapping[str, Any] | str | None) -> str:
    try:
        if isinstance(parameters, str):  # the canonical form, from attrs.evolve
            parameters = json.loads(parameters)
        if parameters is not None and not isinstance(parameters, Mapping):
            raise InvalidRequestError("The parameters of OtherModel must be a mapping.")
        named = dict(parameters or {})
        text = json.dumps(named, sort_keys=True, separators=(",", ":"), allow_nan=False)
        json.dumps(named, ensure_ascii=False).encode()  # an unpaired surrogate fails here
    except InvalidRequestError:
        raise
    except Exception as error:
        raise InvalidRequestError(
            f"The parameters of OtherModel cannot be encoded as JSON: {quote(error)}."
        ) from None
    if taken := sorted({"source", "async", "notification_url"} & named.keys()):
        raise InvalidRequestError(f"The parameters of OtherModel must not contain {taken}.")
    return text


def _check_model_name(name: str) -> str:
    if not isinstance(name, str) or not re.fullmatch(_MODEL_NAME, name.strip()):
        raise InvalidRequestError(f"{quote(name)} is not the name of a model.")
    return read_model_name(str.__str__(name))


@attrs.frozen(init=False, repr=False, eq=False)
class OtherModel(AnalyzeRequest[OtherAnalysis]):
    """A request for a model that this package does not know. Its analysis is an `OtherAnalysis`.

    ```python
    request = OtherModel("a_new_model", urls[0], {"sensitivity": 3})
    ```

    Source: ``POST /analyze/{name}``.

    Args:
        name: The model's name in URLs.
        source: See `AnalyzeRequest`.
        parameters: The fields of the body besides ``source``, as a mapping. Default: none.

    Attributes:
        name: The model's name in URLs.
        canonical_parameters: The parameters as canonical JSON.

    Raises:
        InvalidRequestError: The name is malformed, or the parameters cannot be encoded as JSON or
            contain ``source``, ``async`` or ``notification_url``.
    """

    name: str
    canonical_parameters: str = attrs.field(alias="parameters")

    analysis_type = OtherAnalysis

    # written out, because the name precedes a field of the base class
    def __init__(
        self,
        name: str,
        source: str | URLObject | Uri | Asset,
        parameters: Mapping[str, Any] | str | None = None,
    ) -> None:
        super().__init__(source)
        object.__setattr__(self, "name", _check_model_name(name))
        object.__setattr__(self, "canonical_parameters", _freeze_parameters(parameters))

    @property
    def model(self) -> str:
        """The model's name in URLs."""
        return self.name

    @property
    def parameters(self) -> Mapping[str, Any]:
        """See `AnalyzeRequest.parameters`."""
        parameters: dict[str, Any] = json.loads(self.canonical_parameters)
        return parameters
