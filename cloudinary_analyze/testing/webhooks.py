"""Signed notifications, and a simulator that posts them to an application."""

from __future__ import annotations

import asyncio
import inspect
import json
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping
from functools import partial
from typing import Any, Final, Protocol
from urllib.parse import unquote, urlsplit

import aiohttp
import attrs

from cloudinary_analyze._values import NotPicklable, URLObject, read_url
from cloudinary_analyze.config import Credentials
from cloudinary_analyze.emulator import Emulator
from cloudinary_analyze.errors import ConfigurationError
from cloudinary_analyze.requests import AnalyzeRequest
from cloudinary_analyze.responses import Delivery, JSONObject
from cloudinary_analyze.testing.responses import build_response
from cloudinary_analyze.webhooks import SIGNATURE_HEADER, TIMESTAMP_HEADER, compute_signature

_SECONDS: Final = 30.0  # more than a receiver takes

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
ASGIApp = Callable[
    [Scope, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]],
    Awaitable[None],
]


_Send = Callable[[bytes, Mapping[str, str]], Coroutine[Any, Any, "WebhookReply"]]


class Client(Protocol):
    """A client of an application, for example the ``TestClient`` of FastAPI and Starlette."""

    def post(self, url: Any, /, *, content: Any, headers: Any) -> Any:
        """Post, and return a response with a ``status_code`` and a ``text``."""


class Server(Protocol):
    """A running server, for example the ``TestServer`` of aiohttp."""

    def make_url(self, path: Any, /) -> URLObject:
        """Return the URL of a path."""
        ...


def sign_notification(
    body: bytes, credentials: Credentials, *, at: float | None = None
) -> dict[str, str]:
    """Return the headers that sign a notification as the service does.

    Args:
        body: The exact bytes that are posted.
        credentials: Their first notification secret signs, with their first digest.
        at: Unix seconds of the signature. Default: now.

    Raises:
        ConfigurationError: The credentials hold no secret to sign with.
        TypeError: The body is not bytes.
    """
    if not isinstance(body, bytes):
        raise TypeError(f"The body must be the bytes that are posted, not {type(body).__name__}.")
    if not credentials.signing_secrets:
        raise ConfigurationError("The credentials hold no secret to sign notifications with.")
    timestamp = str(int(time.time() if at is None else at))
    secret, digest = credentials.signing_secrets[0], credentials.digests[0]
    return {
        TIMESTAMP_HEADER: timestamp,
        SIGNATURE_HEADER: compute_signature(body, timestamp, secret, digest=digest),
    }


def build_notification(
    task_id: str,
    request: type[AnalyzeRequest[Any]] | AnalyzeRequest[Any] | str,
    analysis: JSONObject | None = None,
    *,
    status: int = 200,
    code: str = "MA_00000",
    message: str = "the analysis failed",
) -> bytes:
    """Return the body of a notification that ends a task.

    Args:
        task_id: The task.
        request: The request, its class (``Coco``), or a model's name.
        analysis: The ``data.analysis`` object, such as ``{"data": {"caption": "A cat"}}``. Default:
            the emulator's analysis for the request.
        status: The HTTP status of the error of a failed task.
        code: The service's code of the error of a failed task.
        message: The message of the error of a failed task.

    Raises:
        InvalidRequestError: The model is unknown, or the emulator has no result for the request.
        ResponseDecodeError: The analysis is not of the model's shape.
    """
    content: dict[str, Any] = {
        "operation_name": "analyze",
        "operation_type": "single",
        "notification_type": "analyze",
        "task_id": task_id,
        "http_status": status,
    }
    if status == 200:
        content |= build_response(request, analysis).raw
    else:
        category = "server_error" if status >= 500 else "user_error"
        content["error"] = {"category": category, "code": code, "message": message}
    return json.dumps(content).encode()


@attrs.frozen
class WebhookReply:
    """The response of an application to a notification.

    Attributes:
        status: The HTTP status. 200: the application accepted the notification.
        text: The body.
    """

    status: int
    text: str = ""


class WebhookSimulator(NotPicklable):
    """Posts signed notifications to an application, as the service does.

    An ASGI application and an async client belong to an event loop: create their simulator on that
    loop, in an async test. For a ``TestClient`` or a server, create it anywhere.

    Args:
        target: The application: an ASGI application such as ``FastAPI()``; a client of one (a
            ``TestClient``, or an async client of httpx); the ``TestServer`` or ``TestClient`` of an
            aiohttp application; or the origin of a server, such as ``http://127.0.0.1:8000``.
        path: The path of the receiver, such as ``/hooks/cloudinary``.
        credentials: The credentials that sign. Default: `Credentials.from_environment`.

    Attributes:
        replies: The replies of the application, in order. Code that awaits a result may get it
            before the reply is recorded.

    Raises:
        ConfigurationError: The target or the path is invalid, the loop is not running, or there are
            no credentials.
    """

    def __init__(
        self,
        target: ASGIApp | Client | Server | str | URLObject,
        path: str,
        *,
        credentials: Credentials | None = None,
    ) -> None:
        self.replies: list[WebhookReply] = []
        self._credentials = Credentials.from_environment() if credentials is None else credentials
        self._loop: asyncio.AbstractEventLoop | None = None
        if isinstance(target, type):  # FastAPI instead of FastAPI()
            raise _build_target_error(target)
        make_url = getattr(target, "make_url", None)  # aiohttp's TestServer and TestClient
        origin = read_url(make_url("/") if callable(make_url) else target)
        post = getattr(target, "post", None)
        if not path.startswith("/"):
            raise ConfigurationError(f"The path must begin with '/', not be {path!r}.")
        if isinstance(origin, str) and origin.startswith(("http://", "https://")):
            self._send: _Send = partial(_post_to_server, origin.rstrip("/") + path)
        elif callable(target):
            self._send = partial(_call_application, target, path)
            self._loop = _find_loop()
        elif inspect.iscoroutinefunction(post):
            self._send = partial(_post_by_async_client, target, path)
            self._loop = _find_loop()
        elif callable(post):
            self._send = partial(_post_by_client, target, path)
        else:
            raise _build_target_error(target)

    async def post(self, body: bytes, *, at: float | None = None) -> WebhookReply:
        """Sign a notification, post it, and return the reply.

        Cancelling may leave a request that is already on its way to the application.

        Args:
            body: The body, for example from `build_notification`.
            at: Unix seconds of the signature. Default: now.

        Raises:
            TimeoutError: The application did not respond in time.
        """
        headers = sign_notification(body, self._credentials, at=at)
        return await self._post(body, headers)

    def connect(self, emulator: Emulator) -> None:
        """Post all notifications of an emulator, for any URL of the tasks.

        The emulator signs them, and repeats those whose reply is not 200.
        """
        emulator.on_delivery = self._take

    async def _take(self, delivery: Delivery) -> bool:
        try:
            return (await self._post(delivery.body, delivery.headers)).status == 200
        except (ConnectionRefusedError, aiohttp.ClientConnectionError):
            return False  # the application has ended, or has not started yet

    async def _post(self, body: bytes, headers: Mapping[str, str]) -> WebhookReply:
        sending = self._send(body, {**headers, "Content-Type": "application/json"})
        elsewhere = self._loop is not None and self._loop is not asyncio.get_running_loop()
        async with asyncio.timeout(_SECONDS):
            reply = await (_start(sending, self._loop) if elsewhere else sending)
        self.replies.append(reply)
        return reply


def _build_target_error(target: object) -> ConfigurationError:
    return ConfigurationError(
        "The target must be an ASGI application, a client of one, or an origin such as "
        f"http://127.0.0.1:8000, not {target!r:.80}."
    )


def _find_loop() -> asyncio.AbstractEventLoop:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise ConfigurationError(
            "Create the simulator of an ASGI application on its event loop, in an async test. "
            "In other tests, pass a TestClient."
        ) from None


def _start(
    sending: Coroutine[Any, Any, WebhookReply], loop: asyncio.AbstractEventLoop | None
) -> asyncio.Future[WebhookReply]:
    """Send on the loop of the application, from that of an emulator."""
    if loop is None or loop.is_closed():
        sending.close()
        raise ConnectionRefusedError("The event loop of the application is closed.")
    return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(sending, loop))


async def _post_to_server(url: str, body: bytes, headers: Mapping[str, str]) -> WebhookReply:
    async with (
        aiohttp.ClientSession() as http,
        http.post(url, data=body, headers=headers, allow_redirects=False) as response,
    ):
        return WebhookReply(response.status, await response.text(errors="replace"))


async def _post_by_client(
    client: Any, path: str, body: bytes, headers: Mapping[str, str]
) -> WebhookReply:
    entered = getattr(client, "portal", None)  # a TestClient: set inside its `with` block
    try:
        response = await asyncio.to_thread(client.post, path, content=body, headers=headers)
    except Exception as error:
        if entered is not None and client.portal is None:
            raise ConnectionRefusedError("The application has ended.") from error
        raise
    return WebhookReply(response.status_code, response.text)


async def _post_by_async_client(
    client: Any, path: str, body: bytes, headers: Mapping[str, str]
) -> WebhookReply:
    response = await client.post(path, content=body, headers=headers)
    return WebhookReply(response.status_code, response.text)


async def _call_application(
    application: Any, path: str, body: bytes, headers: Mapping[str, str]
) -> WebhookReply:
    """Call an ASGI application, with the whole body in one message."""
    url = urlsplit(path)
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": unquote(url.path),
        "raw_path": url.path.encode(),
        "query_string": url.query.encode(),
        "root_path": "",
        "headers": [
            (b"host", b"testserver"),
            (b"content-length", str(len(body)).encode()),
            *((name.lower().encode(), value.encode()) for name, value in headers.items()),
        ],
        "client": ("127.0.0.1", 1),
        "server": ("testserver", 80),
    }
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])
    status, text, replied = 0, bytearray(), asyncio.Event()

    async def receive() -> Message:
        for message in messages:
            return message
        await replied.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            text.extend(message.get("body", b""))
            if not message.get("more_body", False):
                replied.set()

    await application(scope, receive, send)
    return WebhookReply(status, text.decode(errors="replace"))
