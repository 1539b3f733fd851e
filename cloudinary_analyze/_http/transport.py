"""One attempt over the network, with its timeouts. Only this module uses aiohttp's client."""

from __future__ import annotations

import asyncio
import base64
import netrc
import os
import platform
import ssl
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import aiohttp
import attrs
from aiohttp import hdrs
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from cloudinary_analyze._cancellation import Sections, get_task
from cloudinary_analyze._clock import Clock
from cloudinary_analyze._http.token import Token
from cloudinary_analyze._policy import find_rule
from cloudinary_analyze._proxy import read_proxy
from cloudinary_analyze._values import NotPicklable
from cloudinary_analyze._version import __version__
from cloudinary_analyze.config import Credentials, Settings
from cloudinary_analyze.errors import (
    AttemptTimeoutError,
    ConfigurationError,
    ResponseDecodeError,
    TransportError,
    describe_reason,
    shorten,
)

Answer = tuple[int, CIMultiDictProxy[str], bytes]  # status, headers, body


class Body(aiohttp.BytesPayload):
    """The body of one attempt. It records whether any of it was sent.

    Attributes:
        sent: Whether a connection was open and the body handed to it. Until then the service
            cannot have acted on the request.
    """

    sent: bool = False

    def write_with_length(self, writer: Any, content_length: int | None) -> Any:
        """Write the body to the connection; called by aiohttp."""
        # on a connection that is closing, aiohttp raises and writes nothing
        transport = writer.transport
        self.sent |= transport is not None and not transport.is_closing()
        return super().write_with_length(writer, content_length)


class _Request(aiohttp.ClientRequest):
    """A request that refuses a connection on which something arrived while it was idle.

    aiohttp would take that for the response to this request. The real one would then be taken for
    the response to the next request, and so on.
    """

    def send(self, conn: Any) -> Any:
        """Send the request on a connection; called by aiohttp."""
        if conn.protocol.should_close:
            raise aiohttp.ClientConnectionError(
                "The server sent something while the connection was idle"
            )
        return super().send(conn)


@attrs.define(eq=False, repr=False)
class Transport(NotPicklable):
    """Sends one attempt at a time on a pooled connection, and reads the whole response.

    All attempts have the same read timeout, so the oldest expires first, and one timer for the
    oldest is enough. A timer for each attempt, ours or aiohttp's, costs several times as much.

    Attributes:
        settings: For timeouts and the longest body.
        owned: Whether the aiohttp session is ours to close.
        token: The OAuth token, if it can be renewed.
        _proxy: What each request passes to aiohttp about the proxy; empty without one.
    """

    settings: Settings
    owned: bool
    _http: aiohttp.ClientSession
    _headers: CIMultiDict[str] | None = attrs.field(repr=False)
    _timeout: aiohttp.ClientTimeout
    _loop: asyncio.AbstractEventLoop = attrs.field(factory=asyncio.get_running_loop, init=False)
    _attempts: Sections = attrs.field(factory=Sections)
    _timer: asyncio.TimerHandle | None = None
    _closed: bool = False
    token: Token | None = None
    _proxy: dict[str, Any] = attrs.field(factory=dict, repr=False, alias="proxy")

    @classmethod
    def open(
        cls,
        credentials: Credentials,
        settings: Settings,
        *,
        base_url: str,
        http: aiohttp.ClientSession | None,
        clock: Clock,
    ) -> Transport:
        """Create the connection pool, or use the given session. Needs the running loop.

        Raises:
            ConfigurationError: The given session cannot be used.
        """
        if http is not None:  # before the headers, which a traceback of its errors would show
            check_client_session(http, settings, host=URL(base_url).host or "")
        token = None
        if callable(credentials.oauth_token):
            token = Token(credentials.oauth_token, settings.read_timeout, clock)
        headers = build_headers(credentials)
        timeout = aiohttp.ClientTimeout(total=None, connect=settings.connect_timeout)
        proxy = read_proxy(settings.proxy)
        options: dict[str, Any] = {} if proxy is None else {"proxy": URL(proxy.bare)}
        if proxy is not None and proxy.userinfo is not None:
            # not in the URL, which aiohttp's errors and connection keys show
            pair = base64.b64encode(":".join(proxy.userinfo).encode()).decode()
            if base_url.startswith("https:"):
                options["proxy_headers"] = {"Proxy-Authorization": f"Basic {pair}"}
            else:
                headers["Proxy-Authorization"] = f"Basic {pair}"
        if http is not None:
            return cls(settings, False, http, headers, timeout, token=token)
        own = aiohttp.ClientSession(
            # the permits bound the attempts in flight, so the pool need not
            connector=aiohttp.TCPConnector(limit=0),
            request_class=_Request,
            # aiohttp sends default headers to the proxy too, in clear text
            headers=headers if proxy is None else None,
            timeout=timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        each = None if proxy is None else headers
        return cls(settings, True, own, each, timeout, token=token, proxy=options)

    async def close(self) -> None:
        """Interrupt the attempts that are still in flight, and close the pool if it is ours."""
        self._closed = True
        if self.token is not None:
            self.token.close()
        if self._timer is not None:
            self._timer.cancel()
        self._attempts.interrupt_all()
        if self.owned:
            connector = self._http.connector
            try:
                await self._http.close()
            finally:
                # a cancelled close would leave the name resolver and its descriptors open
                if connector is not None:
                    await connector.close()

    async def send(self, url: URL, body: Body | None) -> Answer:
        """POST a JSON body, or GET without one. Redirects are not followed.

        Cancelling closes the connection; `Body.sent` says whether the service may have the request.

        Raises:
            TransportError: No response arrived. `ambiguous` says whether the request was sent.
            ResponseDecodeError: The body is longer than the settings allow.
            ConfigurationError: The aiohttp session that was passed in is closed.
        """
        task = get_task(self._loop)
        cancelling = task.cancelling()
        deadline = self._loop.time() + self.settings.read_timeout
        self._attempts.inside[task] = deadline
        if self._timer is None:
            self._timer = self._loop.call_at(deadline, self._end_overdue)
        cause: BaseException | None = None
        try:
            response = await self._http.request(
                "GET" if body is None else "POST",
                url,
                data=body,
                headers=self._headers if self.token is None else self._add_token(self.token),
                allow_redirects=False,
                raise_for_status=False,
                timeout=self._timeout,
                **self._proxy,
            )
            try:
                content = response.content
                if content.is_eof():  # the body came with the headers
                    payload = content.read_nowait()
                else:
                    payload = await self._read(content)
            except BaseException:
                response.close()
                raise
        except asyncio.CancelledError as error:
            interrupted = self._attempts.leave(task)
            if task.cancelling() > cancelling:
                raise
            if interrupted:
                failure = self._build_interruption()
            else:
                failure = TransportError("The HTTP session cancelled the attempt by itself.")
                cause = error
        except (aiohttp.ClientError, OSError) as error:
            failure = build_transport_error(
                error, self.settings, sent=body is None or body.sent, proxied=bool(self._proxy)
            )
            if not _has_headers(error):
                cause = error
        except Exception as error:
            failure = self._build_unexpected_error(error)
            cause = error
        else:
            if response.status == 407 and self._proxy:
                raise build_proxy_refusal(407, response.reason)
            if len(payload) <= self.settings.max_response_bytes:
                return response.status, response.headers, payload
            response.close()
            raise self._build_length_error(response.status, payload)
        finally:
            self._attempts.leave(task)
        failure.ambiguous = body is not None and body.sent
        if cause is not None:
            hide_frames(cause)
        raise failure from cause

    def _add_token(self, token: Token) -> CIMultiDict[str]:
        headers = CIMultiDict(self._headers or ())
        headers[hdrs.AUTHORIZATION] = f"Bearer {token.value}"
        return headers

    def _end_overdue(self) -> None:
        """Interrupt the attempts whose time has run out, and set the timer for the next one."""
        self._timer = None
        now = self._loop.time()
        for task, deadline in list(self._attempts.inside.items()):
            if deadline > now:
                self._timer = self._loop.call_at(deadline, self._end_overdue)
                break
            self._attempts.interrupt(task)

    def _build_interruption(self) -> TransportError:
        if self._closed:
            return TransportError("The session was closed before the response was complete.")
        return AttemptTimeoutError(
            f"No complete response arrived within {self.settings.read_timeout} s "
            "(Settings.read_timeout)."
        )

    def _build_unexpected_error(self, error: Exception) -> TransportError:
        if not self.owned and self._http.closed:
            raise ConfigurationError(
                "The aiohttp session passed as `http` was closed. Keep it open until this "
                "session is closed."
            ) from error
        reason = describe_reason(error)
        return TransportError(
            f"The HTTP session failed with {type(error).__name__}: {reason}.", permanent=True
        )

    def _build_length_error(self, status: int, payload: bytes) -> ResponseDecodeError:
        return ResponseDecodeError(
            f"The service answered {status} with more than {self.settings.max_response_bytes} "
            "bytes (Settings.max_response_bytes); the rest was not read.",
            status=status,
            raw_body=payload[:4096],
            ambiguous=status in {200, 202} or find_rule(status).ambiguous,
        )

    async def _read(self, content: aiohttp.StreamReader) -> bytes:
        """Read a body that is still arriving, up to the allowed length."""
        chunks: list[bytes] = []
        length = 0
        while not content.at_eof() and length <= self.settings.max_response_bytes:
            chunks.append(await content.readany())
            length += len(chunks[-1])
        return b"".join(chunks)


_CERTIFICATE: Final = (aiohttp.ClientConnectorCertificateError, ssl.SSLCertVerificationError)


def build_transport_error(
    error: aiohttp.ClientError | OSError, settings: Settings, *, sent: bool, proxied: bool
) -> TransportError:
    """Say why an attempt has no response.

    Args:
        error: What aiohttp raised.
        settings: For the timeouts.
        sent: Whether the request may have been sent.
        proxied: Whether it goes through a proxy.
    """
    if isinstance(error, aiohttp.ServerDisconnectedError):
        reason = "Server disconnected"
    else:
        reason = describe_reason(error)
    if isinstance(error, _CERTIFICATE):
        return TransportError(
            f"The server's certificate is not trusted, so nothing was sent: {reason}.",
            permanent=True,
        )
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return AttemptTimeoutError(
            f"Could not connect within {settings.connect_timeout} s "
            "(Settings.connect_timeout); nothing was sent."
        )
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return build_proxy_refusal(error.status, error.message)
    if isinstance(error, aiohttp.ClientConnectorError):
        place = " to the proxy" if isinstance(error, aiohttp.ClientProxyConnectionError) else ""
        return TransportError(f"Could not connect{place}, so nothing was sent: {reason}.")
    if isinstance(error, aiohttp.ClientResponseError):
        reason = shorten(str(error.message or error.status).encode()).rstrip(".")
        whose = "response" if sent or not proxied else "proxy's response"
        return TransportError(f"The {whose} is not valid HTTP: {reason}.")
    if not sent:
        return TransportError(f"The connection was lost before anything was sent: {reason}.")
    return TransportError(f"The connection was lost before the response was complete: {reason}.")


def _has_headers(error: aiohttp.ClientError | OSError) -> bool:
    """Whether an error contains headers: the request's, with the credentials, or the response's.

    Those of an unfinished response cannot be pickled, and Dask pickles the causes of errors.
    """
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return not isinstance(error.message, str)
    return isinstance(error, aiohttp.ClientResponseError)


def hide_frames(error: BaseException) -> None:
    """Take aiohttp's frames out of an error's tracebacks: their variables hold the credentials.

    Tools that log a traceback with its variables would show them.
    """
    seen: set[int] = set()
    links: list[BaseException | None] = [error]
    while links:
        link = links.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        links += [link.__cause__, link.__context__]
        frames: list[TracebackType] = []
        step = link.__traceback__
        while step is not None:
            frames.append(step)
            step = step.tb_next
        kept: TracebackType | None = None
        for step in reversed(frames):
            if not str(step.tb_frame.f_globals.get("__name__")).startswith("aiohttp."):
                kept = TracebackType(kept, step.tb_frame, step.tb_lasti, step.tb_lineno)
        link.__traceback__ = kept


def build_proxy_refusal(status: int, reason: str | None) -> TransportError:
    """Return the error of a request that a proxy did not pass on."""
    advice = "Check that it allows connections to the host of the service."
    if status == 407:
        advice = (
            "Check the user and password of Settings.proxy. Pickles do not contain the password; "
            "workers read it from HTTPS_PROXY."
        )
    shown = shorten(reason or "")
    return TransportError(
        f"The proxy answered {status}{f' ({shown})' if shown else ''}, so nothing was sent to the "
        f"service. {advice}",
        permanent=status < 500 and status not in {408, 425, 429},
    )


def build_headers(credentials: Credentials) -> CIMultiDict[str]:
    """Return the headers of every call. Those with a token that can be renewed get it later."""
    if callable(credentials.oauth_token):
        authorization = ""
    elif credentials.oauth_token is not None:
        authorization = f"Bearer {credentials.oauth_token}"
    else:
        pair = f"{credentials.api_key}:{credentials.api_secret}".encode()
        authorization = f"Basic {base64.b64encode(pair).decode()}"
    return CIMultiDict(
        {
            **({hdrs.AUTHORIZATION: authorization} if authorization else {}),
            hdrs.ACCEPT: "application/json",
            hdrs.CONTENT_TYPE: "application/json",
            hdrs.USER_AGENT: f"cloudinary-analyze/{__version__} "
            f"(Python/{platform.python_version()}; aiohttp/{aiohttp.__version__})",
        }
    )


def check_client_session(http: aiohttp.ClientSession, settings: Settings, *, host: str) -> None:
    """Raise if an aiohttp session would change our requests or responses.

    Raises:
        ConfigurationError: It would. Proxies, cookies, middlewares and traces are up to the user.
            Timeouts and `raise_for_status` are overridden.
    """
    if not isinstance(http, aiohttp.ClientSession):
        raise ConfigurationError(f"`http` takes an aiohttp.ClientSession, not {http!r:.80}.")
    connector = http.connector
    if http.closed or connector is None:
        raise ConfigurationError("The aiohttp session passed as `http` is closed.")
    # its loop is not public; a session that hides it is used, and would fail at the first call
    if getattr(http, "_loop", None) not in {None, asyncio.get_running_loop()}:
        raise ConfigurationError(
            "The aiohttp session passed as `http` was created on another event loop. Create it on "
            "the loop that opens this session."
        )
    if http.auth is not None or "Authorization" in http.headers:
        raise ConfigurationError(
            "The aiohttp session passed as `http` has its own credentials, which would be sent to "
            "the service instead of this session's. Create it without `auth`."
        )
    if http.trust_env and has_netrc_login(host):
        raise ConfigurationError(
            f"The aiohttp session passed as `http` has trust_env=True, and netrc has a login for "
            f"{host}, which would be sent to the service instead of this session's credentials. "
            "Create it without `trust_env` (pass `proxy` if you need one), or remove the entry."
        )
    if not http.auto_decompress:
        raise ConfigurationError(
            "The aiohttp session passed as `http` has auto_decompress=False, so compressed "
            "responses could not be read. Create it without that option."
        )
    for name in ("limit", "limit_per_host"):
        limit = getattr(connector, name)
        if 0 < limit < settings.permits:
            raise ConfigurationError(
                f"The connector of the aiohttp session passed as `http` has {name}={limit}, less "
                f"than Settings.permits={settings.permits}: calls would queue unseen. Make it "
                f"with {name}=0, or lower the permits."
            )


def has_netrc_login(host: str) -> bool:
    """Whether the netrc file that aiohttp reads has a login for a host, or a default one."""
    name = "_netrc" if platform.system() == "Windows" else ".netrc"
    try:
        path = os.environ.get("NETRC") or Path.home() / name
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, RuntimeError, UnicodeDecodeError, netrc.NetrcParseError):
        return False  # aiohttp ignores a file that cannot be read
