"""No secret appears in a log, a repr, a traceback, a pickle, an event or an error."""

from __future__ import annotations

import asyncio
import base64
import logging
import pickle
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web
from scripted import (
    CAPTION,
    KEY,
    Handler,
    ScriptedServer,
    answer,
    hang_up,
    never_answer,
    requests_of,
    wire,
)
from secret_search import NEEDLES as SUITE_NEEDLES
from secret_search import SecretSearch

from cloudinary_analyze import (
    AnalyzeError,
    AnalyzeSession,
    ApiError,
    Captioning,
    ConfigurationError,
    Credentials,
    Delivery,
    NotificationError,
    Settings,
    verify_signature,
)
from cloudinary_analyze._http.transport import build_headers
from cloudinary_analyze.testing import ManualClock

SECRET = "pLanted/5ecret+Kq7z"
TOKEN = "pLanted-0auth-token-Xw3v"
SIGNING = "pLanted-s1gning-secret"
NEEDLES = [
    SECRET,
    TOKEN,
    SIGNING,
    base64.b64encode(f"{KEY}:{SECRET}".encode()).decode(),
    "pLanted",
    base64.b64encode(b"pLanted").decode()[:9],
]
BY_KEY = Credentials("demo", KEY, SECRET, notification_secrets=(SIGNING,))
BY_TOKEN = Credentials("demo", oauth_token=TOKEN)

TROUBLES: list[Handler] = [
    CAPTION,
    answer(500),
    hang_up(),
    answer(429, headers={"Retry-After": "0.001"}),
    wire(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"),
    wire(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"),
    wire(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc"),
    answer(302, headers={"Location": "http://127.0.0.1:1/"}),
    answer(body=b"no json"),
    answer(400, sample="error_400_tag_name"),
    answer(404, sample="error_404_task"),
    answer(503),
]
FINAL: list[Handler] = [
    answer(401, sample="error_401"),
    answer(403, sample="error_403_subscription"),
    answer(429, sample="error_429_quota"),
]


def find_secrets(text: str) -> list[str]:
    return [needle for needle in NEEDLES if needle in text]


def read_all(value: Any) -> Iterator[str]:
    """Yield every form in which an object may show itself."""
    yield repr(value)
    yield str(value)
    if isinstance(value, BaseException):
        yield "".join(traceback.format_exception(value))
        for link in (value.__cause__, value.__context__):
            if link is not None:
                yield from read_all(link)
        yield repr(vars(value))
    if not isinstance(value, AnalyzeSession | BaseException) or isinstance(value, AnalyzeError):
        try:
            yield pickle.dumps(value).decode("latin-1")
        except (TypeError, AttributeError, pickle.PicklingError):
            yield ""  # an object that cannot be pickled cannot leak that way


@pytest.mark.parametrize("leak", NEEDLES[:4])
def test_the_search_would_find_a_leak(leak: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("aiohttp.client").debug("sent %s", leak)
    assert find_secrets(caplog.text)
    assert any(find_secrets(form) for form in read_all(ValueError(leak)))
    assert any(find_secrets(form) for form in read_all({"a": [leak]}))
    error = AnalyzeError("fine")
    error.__cause__ = ValueError(leak)
    assert any(find_secrets(form) for form in read_all(error))
    assert any(find_secrets(form) for form in read_all(ApiError("fine", code=leak)))


@pytest.mark.parametrize("leak", SUITE_NEEDLES)
def test_the_search_of_the_whole_suite_would_find_a_leak(leak: str) -> None:
    """The search that `conftest` makes of every test's logs."""
    search = SecretSearch()
    logger = logging.getLogger("leaky")
    logger.propagate = False  # otherwise the search of the suite would find it
    logger.addHandler(search)
    logger.debug("nothing")
    assert not search.leaks
    logger.debug("sent %s", leak)
    logger.debug("sent %(header)s", {"header": "x", "hidden": leak})
    try:
        raise ValueError(leak)
    except ValueError:
        logger.exception("it broke")
    logger.removeHandler(search)
    assert len(search.leaks) == 3


def test_the_needles_are_what_is_sent() -> None:
    sent = build_headers(BY_KEY)["Authorization"]
    assert find_secrets(sent)
    assert find_secrets(build_headers(BY_TOKEN)["Authorization"])
    assert find_secrets(pickle.dumps(BY_KEY).decode("latin-1")), "a pickle holds the secret"


@pytest.mark.parametrize("credentials", [BY_KEY, BY_TOKEN], ids=["key", "token"])
async def test_a_busy_session_shows_no_secret(
    credentials: Credentials, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    asyncio.get_running_loop().set_debug(True)
    shown: list[Any] = []
    authorized: set[str] = set()
    count = 0

    async def trouble(request: web.Request) -> web.StreamResponse:
        nonlocal count
        count += 1
        authorized.add(request.headers["Authorization"])
        return await TROUBLES[count % len(TROUBLES)](request)

    def hook(event: Any) -> None:
        shown.append(event)
        raise RuntimeError("a broken hook")

    async with ScriptedServer(trouble) as server:
        session = server.session(credentials=credentials, attempts=2, permits=4, on_event=hook)
        shown += [session, credentials, session.stats]
        async with session:
            async with session.map(requests_of(60, Captioning)) as stream:
                shown.append(stream)
                async for outcome in stream:
                    shown += [outcome, outcome.request, outcome.response, outcome.error]
                    if outcome.error is not None:
                        try:
                            outcome.unwrap()
                        except Exception as error:
                            shown.append(error)
            for handler in FINAL:
                server.handler = handler
                with pytest.raises(AnalyzeError) as caught:
                    await session.analyze(Captioning("https://example.com/"))
                shown.append(caught.value)
                logging.getLogger("app").error("it failed", exc_info=caught.value)
            shown += [session.stats, session.quota, session._connection.caller, vars(session)]
            shown.append(
                vars(session._connection.caller)
                if hasattr(session._connection.caller, "__dict__")
                else None
            )
        shown += [session, vars(session)]
    async with server.session(credentials=credentials, attempts=1) as session:
        with pytest.raises(AnalyzeError, match="nothing was sent") as caught:
            await session.analyze(Captioning("https://example.com/"))
        shown.append(caught.value)

    assert all(find_secrets(header) for header in authorized), "the secrets were in play"
    kinds = {type(value).__name__ for value in shown}
    assert {"TransportError", "ServerError", "ResponseDecodeError", "BadRequestError"} <= kinds
    assert {"AuthenticationError", "PermissionDeniedError", "QuotaExceededError"} <= kinds
    assert len(caplog.records) > 60
    assert not find_secrets(caplog.text)
    for record in caplog.records:
        assert not find_secrets(repr(vars(record)))
    for value in shown:
        if value is credentials:
            assert not find_secrets(f"{value!r} {value}")
            continue
        for form in read_all(value):
            assert not find_secrets(form), type(value)


@pytest.mark.parametrize("credentials", [BY_KEY, BY_TOKEN], ids=["key", "token"])
@pytest.mark.parametrize("number", range(1, len(TROUBLES)))
async def test_no_final_error_shows_a_secret(number: int, credentials: Credentials) -> None:
    """The HTTP library's errors contain the request's headers. They must not stay attached to
    ours."""
    events: list[Any] = []
    async with ScriptedServer(TROUBLES[number]) as server:
        async with server.session(
            credentials=credentials, attempts=2, on_event=events.append
        ) as session:
            with pytest.raises(AnalyzeError) as caught:
                await session.analyze(Captioning("https://example.com/"))
    for error in [caught.value, *(event.error for event in events if hasattr(event, "error"))]:
        if error is not None:
            assert not any(find_secrets(form) for form in read_all(error))


async def test_a_timeout_and_a_close_show_no_secret(clock: ManualClock) -> None:
    errors: list[BaseException] = []
    async with ScriptedServer(never_answer) as server:
        for options in ({"read_timeout": 0.02, "attempts": 1}, {"call_timeout": 0.02}):
            async with server.session(credentials=BY_KEY, **options) as session:
                with pytest.raises(AnalyzeError) as caught:
                    await session.analyze(Captioning("https://example.com/"))
                errors.append(caught.value)
        with pytest.raises(AnalyzeError) as caught:
            await session.analyze(Captioning("https://example.com/"))
        errors.append(caught.value)
    assert len({type(error) for error in errors}) == 3
    for error in errors:
        assert not any(find_secrets(form) for form in read_all(error))


def test_no_refusal_and_no_notification_error_shows_a_secret() -> None:
    errors: list[BaseException] = []
    for build in (
        lambda: Credentials.from_url(f"cloudinary://{KEY}:{SECRET}@a b"),
        lambda: Credentials.from_url(f"cloudinary://{KEY}:{SECRET}"),
        lambda: Credentials("demo", None, SECRET),
        lambda: Credentials("demo", KEY, f"{SECRET} x"),
        lambda: Credentials("demo", oauth_token=f"{TOKEN}\n x"),
        lambda: Credentials("demo", KEY, SECRET, notification_secrets=(SIGNING, "")),
        lambda: AnalyzeSession(BY_KEY, settings=Settings(host="http://example.com")),
    ):
        with pytest.raises(ConfigurationError) as caught:
            build()
        errors.append(caught.value)
    for timestamp, signature in (("1790000000", "0" * 40), ("x", "0" * 40), (None, None)):
        with pytest.raises(NotificationError) as refused:
            verify_signature(b"{}", timestamp, signature, [SIGNING], now=1_790_000_000)
        errors.append(refused.value)
    for error in errors:
        assert not any(find_secrets(form) for form in read_all(error))


def test_a_delivery_shows_neither_its_body_nor_its_headers() -> None:
    delivery = Delivery(b"pLanted", {"X-Cld-Signature": "pLanted"})
    assert "pLanted" not in f"{delivery!r} {delivery}"
    assert "<7 bytes>" in repr(delivery)
