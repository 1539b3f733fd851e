"""The emulator's own reading of requests, and the error bodies of the service.

Nothing here is shared with the client, so that a bug in the client is not hidden by the same bug in
the server.
"""

from __future__ import annotations

import re
from typing import Any, Final

import attrs

from cloudinary_analyze.emulator._json import load_json
from cloudinary_analyze.emulator.models import Model

MISSING_PARAMETERS: Final = "MA_00001"
INVALID_REQUEST: Final = "MA_00003"
NOT_SUBSCRIBED: Final = "MA_00007"
QUOTA_EXCEEDED: Final = "MA_00008"
# The service has codes for the rest too, but they are not published.
UNPUBLISHED: Final = "MA_00000"

_TAG_NAME: Final = re.compile(r"[a-z0-9-]+")
_TAG_RULE: Final = "Tag names can only contain lower-case alphanumeric characters or hyphens"
_HTTP_URL: Final = re.compile(r"https?://[^\s/?#]+(?:[/?#]\S*)?", re.IGNORECASE)


class Refusal(Exception):
    """A request whose response is an error.

    Attributes:
        status: The HTTP status.
        category: The service's category of errors.
        code: The service's code.
        message: What happened, in the service's words.
        details: Further information.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        category: str = "user_error",
        code: str = UNPUBLISHED,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.category = category
        self.code = code
        self.message = message
        self.details: dict[str, Any] = details or {}

    def build_error(self, request_id: str) -> dict[str, Any]:
        """Return the ``error`` object of the response."""
        return {
            "category": self.category,
            "code": self.code,
            "message": self.message,
            "details": self.details,
            "request_id": request_id,
        }


@attrs.frozen
class AnalyzeRequest:
    """A valid request.

    Attributes:
        model: The model.
        source: The URI or the asset id.
        items: The prompts, the questions, or the (name, description) pairs of tags.
        asynchronous: Whether it asks for a task.
        notification_url: Where its notification is sent, if given.
    """

    model: Model
    source: str
    items: tuple[Any, ...] = ()
    asynchronous: bool = False
    notification_url: str | None = None


def refuse_invalid(message: str) -> Refusal:
    """Return the refusal of a request that breaks a rule. ``message`` is a sentence."""
    return Refusal(400, "invalid request", code=INVALID_REQUEST, details={"message": message})


def refuse_missing(*parameters: str) -> Refusal:
    """Return the refusal of a request that lacks parameters."""
    details = {"parameters": list(parameters)}
    return Refusal(400, "missing parameters", code=MISSING_PARAMETERS, details=details)


def refuse_unfetchable() -> Refusal:
    """Return the refusal of a source that cannot be fetched."""
    return Refusal(404, "not found", details={"message": "The source could not be fetched"})


def read_analyze_request(model: Model, body: bytes) -> AnalyzeRequest:
    """Return the request in a body.

    Raises:
        Refusal: The body is not a JSON object, lacks something, or breaks a rule.
    """
    content = _read_object(body)
    missing = [name for name in ("source", model.list_field) if name and name not in content]
    if missing:
        raise refuse_missing(*missing)
    asynchronous = content.get("async", False)
    if not isinstance(asynchronous, bool):
        raise refuse_invalid("async must be a boolean")
    return AnalyzeRequest(
        model,
        _read_source(content["source"]),
        _read_items(model.list_field, content[model.list_field]) if model.list_field else (),
        asynchronous,
        _read_notification_url(content),
    )


def _read_object(body: bytes) -> dict[str, Any]:
    try:
        content = load_json(body)
    except ValueError:
        raise refuse_invalid("The body is not valid JSON") from None
    if not isinstance(content, dict):
        raise refuse_invalid("The body must be a JSON object")
    return content


def _read_source(source: Any) -> str:
    if not isinstance(source, dict):
        raise refuse_invalid("source must be an object")
    if "uri" in source and "asset_id" in source:
        raise refuse_invalid("source must have exactly one of uri and asset_id")
    if "asset_id" in source:
        asset_id = source["asset_id"]
        if not isinstance(asset_id, str) or not asset_id:
            raise refuse_invalid("source.asset_id must be a string that is not empty")
        return asset_id
    if "uri" not in source:
        raise refuse_missing("uri")
    uri = source["uri"]
    if not isinstance(uri, str) or not _HTTP_URL.fullmatch(uri):
        raise refuse_invalid("source.uri must be an http or https URL")
    return uri


def _read_items(name: str, items: Any) -> tuple[Any, ...]:
    if not isinstance(items, list) or not 1 <= len(items) <= 10:
        raise refuse_invalid(f"{name} must be a list of 1 to 10 items")
    if name == "tag_definitions":
        return tuple(_read_tag_definition(index, item) for index, item in enumerate(items))
    if not all(isinstance(item, str) for item in items):
        raise refuse_invalid(f"{name} must be a list of strings")
    return tuple(items)


def _read_tag_definition(index: int, item: Any) -> tuple[str, str]:
    if not isinstance(item, dict):
        raise refuse_invalid(f"tag_definitions[{index}] must be an object")
    missing = [key for key in ("name", "description") if key not in item]
    if missing:
        raise refuse_missing(*(f"tag_definitions[{index}].{key}" for key in missing))
    name, description = item["name"], item["description"]
    if not isinstance(name, str) or not isinstance(description, str):
        raise refuse_invalid(f"tag_definitions[{index}] must have two strings")
    if not _TAG_NAME.fullmatch(name):
        raise refuse_invalid(_TAG_RULE)
    return name, description


def _read_notification_url(content: dict[str, Any]) -> str | None:
    if "notification_url" not in content:
        return None
    url = content["notification_url"]
    if isinstance(url, str) and _HTTP_URL.fullmatch(url):
        return url
    raise refuse_invalid("notification_url must be an http or https URL")
