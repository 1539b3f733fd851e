"""Every error of the contract arrives as its class, with every field that the service sent."""

from __future__ import annotations

from typing import Any

import pytest
from scripted import URL, ScriptedServer, answer

from cloudinary_analyze import (
    ApiError,
    AuthenticationError,
    BadRequestError,
    Captioning,
    Limit,
    NotFoundError,
    PermissionDeniedError,
    QuotaExceededError,
    RateLimitedError,
    ServerError,
)

SAMPLES: dict[str, tuple[int, type[ApiError], str]] = {
    "error_400_missing_parameters": (400, BadRequestError, "uri"),
    "error_400_tag_name": (400, BadRequestError, "Tag names can only contain"),
    "error_401": (401, AuthenticationError, "API key, secret and cloud name"),
    "error_403_subscription": (403, PermissionDeniedError, "feature 'ai_vision'"),
    "error_404_task": (404, NotFoundError, "Check the model, the cloud name"),
    "error_429_quota": (429, QuotaExceededError, "is used up"),
    "error_500": (500, ServerError, "internal server error"),
}


@pytest.mark.parametrize("name", SAMPLES)
async def test_every_error_of_the_contract(sample: Any, name: str) -> None:
    status, kind, said = SAMPLES[name]
    content = sample(name)
    handler = answer(status, sample=name, headers={"Retry-After": "1"})
    async with ScriptedServer(handler) as server, server.session(attempts=1) as session:
        with pytest.raises(kind, match=said) as caught:
            await session.analyze(Captioning(URL))
    error = caught.value
    assert type(error) is kind
    assert error.status == status
    assert error.code == content["error"]["code"]
    assert error.category == content["error"]["category"]
    assert error.api_message == content["error"]["message"]
    assert error.details == content["error"]["details"]
    assert error.request_id == content["error"]["request_id"]
    assert error.retry_after == 1
    assert error.model == "captioning"
    assert (error.attempts, len(server.seen)) == (1, 1)
    assert content["error"]["message"].encode() in error.raw_body
    for part in ("code", "message", "request_id"):
        assert content["error"][part] in str(error)
    if "limits" in content:
        assert error.limits == (Limit("ai_vision", used_by_request=0, remaining=0, limit=100_000),)


async def test_a_403_names_the_add_on_that_is_not_subscribed() -> None:
    handler = answer(403, sample="error_403_subscription")
    async with ScriptedServer(handler) as server, server.session() as session:
        with pytest.raises(PermissionDeniedError, match="Add-ons page") as caught:
            await session.analyze(Captioning(URL))
    assert caught.value.feature == "ai_vision"


async def test_a_403_without_an_add_on_says_what_to_check() -> None:
    async with ScriptedServer(answer(403)) as server, server.session() as session:
        with pytest.raises(PermissionDeniedError, match="add-on is not subscribed") as caught:
            await session.analyze(Captioning(URL))
    assert caught.value.feature is None


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, BadRequestError),
        (402, BadRequestError),
        (405, BadRequestError),
        (409, BadRequestError),
        (413, BadRequestError),
        (415, BadRequestError),
        (422, BadRequestError),
        (408, ServerError),
        (423, ServerError),
        (420, RateLimitedError),
        (429, RateLimitedError),
        (501, ServerError),
        (504, ServerError),
        (529, ServerError),
    ],
)
async def test_every_status_has_its_class(status: int, kind: type[ApiError]) -> None:
    async with ScriptedServer(answer(status)) as server, server.session(attempts=1) as session:
        with pytest.raises(ApiError) as caught:
            await session.analyze(Captioning(URL))
    assert type(caught.value) is kind
    assert (caught.value.status, caught.value.raw_body) == (status, b"")


async def test_the_form_of_the_v1_api_is_read() -> None:
    handler = answer(401, sample="v1_error_401", headers={"X-Request-Id": "v1-id"})
    async with ScriptedServer(handler) as server, server.session() as session:
        with pytest.raises(AuthenticationError, match="Invalid credentials") as caught:
            await session.analyze(Captioning(URL))
    error = caught.value
    assert (error.code, error.category, error.details) == (None, None, None)
    assert (error.api_message, error.request_id) == ("Invalid credentials", "v1-id")


async def test_unknown_codes_and_categories_are_kept() -> None:
    content = {"error": {"category": "new_error", "code": "MA_99999", "details": ["a", "b"]}}
    async with ScriptedServer(answer(400, content)) as server, server.session() as session:
        with pytest.raises(BadRequestError) as caught:
            await session.analyze(Captioning(URL))
    assert (caught.value.category, caught.value.code) == ("new_error", "MA_99999")
    assert caught.value.details == {"details": ["a", "b"]}
