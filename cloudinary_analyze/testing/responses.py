"""Build responses of the service, for tests of code that receives one."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any, Final, TypeVar, overload

from cloudinary_analyze._wire.protocol import build_body
from cloudinary_analyze.emulator.analyses import build_analysis, compute_cost
from cloudinary_analyze.emulator.models import FREE_PLAN
from cloudinary_analyze.emulator.models import MODELS as EMULATED
from cloudinary_analyze.emulator.validation import Refusal, read_analyze_request
from cloudinary_analyze.errors import InvalidRequestError
from cloudinary_analyze.requests import AnalyzeRequest, find_request_type
from cloudinary_analyze.responses import JSONObject, Response

A = TypeVar("A")

SOURCE: Final = "https://images.example/a.jpg"
_PARAMETERS: Final[Mapping[str, Mapping[str, Any]]] = {
    "ai_vision_general": {"prompts": ("What does the image show?",)},
    "ai_vision_moderation": {"rejection_questions": ("Is there any violence?",)},
    "ai_vision_tagging": {"tag_definitions": {"cat": "Does the image show a cat?"}},
}


@overload
def build_response(
    request: type[AnalyzeRequest[A]], analysis: JSONObject | None = None
) -> Response[A]: ...


@overload
def build_response(
    request: AnalyzeRequest[A], analysis: JSONObject | None = None
) -> Response[A]: ...


@overload
def build_response(request: str, analysis: JSONObject | None = None) -> Response[Any]: ...


def build_response(
    request: type[AnalyzeRequest[Any]] | AnalyzeRequest[Any] | str,
    analysis: JSONObject | None = None,
) -> Response[Any]:
    """Build a response as the service sends it. The same request gives the same response.

    Args:
        request: A request, its class (``Coco``), or a model's name.
        analysis: The ``data.analysis`` object, such as ``{"data": {"caption": "a cat"}}``. Default:
            the emulator's analysis for the request.

    Raises:
        InvalidRequestError: The model is unknown, the emulator has no result for the request, or
            the analysis is not JSON.
        ResponseDecodeError: The analysis is not of the model's shape.
    """
    if isinstance(request, str):
        request = find_request_type(request)
    if isinstance(request, type):
        request = request(SOURCE, **_PARAMETERS.get(request.model_name, {}))
    cost = 1
    if analysis is None:
        analysis, cost = _emulate(request)
    else:
        analysis = _copy_json(analysis)
    feature = request.feature or request.model
    quota = FREE_PLAN.get(feature, 1000)
    limit = {"type": feature, "used_by_request": cost, "remaining": quota - cost, "limit": quota}
    raw = {
        "limits": {"addons_quota": [limit]},
        "request_id": f"{zlib.crc32(request.key.encode()):032x}",
        "data": {"entity": str(request.source), "analysis": analysis},
    }
    return Response.from_raw(request, raw)


def _copy_json(analysis: JSONObject) -> JSONObject:
    """Return an object as it arrives over the network."""
    try:
        copied: JSONObject = json.loads(json.dumps(dict(analysis)))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"The analysis must be a JSON object: {error!s:.200}.") from None
    return copied


def _emulate(request: AnalyzeRequest[Any]) -> tuple[JSONObject, int]:
    """Return the emulator's analysis and its cost."""
    model = EMULATED.get(request.model)
    if model is None:
        raise InvalidRequestError(f"The emulator has no model {request.model!r}; pass `analysis`.")
    try:
        emulated = read_analyze_request(model, build_body(request))
    except Refusal as refusal:
        raise InvalidRequestError(f"The emulator refuses the request: {refusal.message}.") from None
    analysis = build_analysis(emulated)
    if analysis is None:
        raise InvalidRequestError("The emulator has no image at this source; pass `analysis`.")
    return analysis, compute_cost(emulated)
