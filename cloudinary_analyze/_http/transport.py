"""One attempt over the network. The only file that knows aiohttp's client."""

from __future__ import annotations

import asyncio
import base64
import platform
import ssl
from collections.abc import Coroutine
from typing import Any, Final

import aiohttp
import attrs
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from cloudinary_analyze._http.watchdog import Watchdog
from cloudinary_analyze.config import Credentials, Settings
from cloudinary_analyze.errors import (
    AttemptTimeoutError,
    ConfigurationError,
    ResponseDecodeError,
    TransportError,
    shorten,
)

Answer = tuple[int, CIMultiDictProxy[str], bytes]


@attrs.define(eq=False, repr=False)
class Transport:
    """Sends one attempt at a time on a pooled connection, and reads the whole answer.

    Attributes:
        settings: For timeouts and the longest body.
        owned: Whether the aiohttp session is ours to close.
    """

    settings: Settings
    owned: bool
    _http: aiohttp.ClientSession
    _headers: CIMultiDict[str] | None = attrs.field(repr=False)
    _timeout: aiohttp.ClientTimeout
    _watchdog: Watchdog

    @classmethod
    def open(
        cls,
        credentials: Credentials,
        settings: Settings,
        *,
        version: str,
        http: aiohttp.ClientSession | None,
    ) -> Transport:
        """Make the pool, or take the given one. Needs the running loop.

        Raises:
            ConfigurationError: The given session would get in the way.
        """
        headers = build_headers(credentials, version=version)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=settings.connect_timeout)
        watchdog = Watchdog(settings.read_timeout, asyncio.get_running_loop())
        if http is not None:
            check_client_session(http, settings)
            return cls(settings, False, http, headers, timeout, watchdog)
        # our own gates bound what is in flight, so the pool need not
        connector = aiohttp.TCPConnector(limit=0)
        own = aiohttp.ClientSession(
            connector=connector,
            headers=headers,
            timeout=timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return cls(settings, True, own, None, timeout, watchdog)

    async def close(self) -> None:
        """Close the pool if it is ours."""
        self._watchdog.close()
        if self.owned:
            await self._http.close()

    def post(self, url: URL, body: bytes) -> Coroutine[Any, Any, Answer]:
        """POST JSON and return (status, headers, body). Redirects are not followed.

        Cancelling closes the connection; whether the service got the request is then unknown.

        Raises:
            TransportError: No answer; `ambiguous` says whether the request had been sent.
            ResponseDecodeError: The body is longer than the settings allow.
            ConfigurationError: The aiohttp session that was passed in is closed.
        """
        return self._send("POST", url, body)

    def get(self, url: URL) -> Coroutine[Any, Any, Answer]:
        """GET and return (status, headers, body); otherwise as `post`."""
        return self._send("GET", url, None)

    async def _send(self, method: str, url: URL, body: bytes | None) -> Answer:
        watch = self._watchdog.begin()
        cause: Exception | None = None
        try:
            response = await self._http.request(
                method,
                url,
                data=body,
                headers=self._headers,
                allow_redirects=False,
                raise_for_status=False,
                timeout=self._timeout,
            )
            try:
                content = response.content
                payload = await content.readany()
                if not content.at_eof():
                    payload = await self._read_rest(content, payload)
            except BaseException:
                response.close()
                raise
        except asyncio.CancelledError:
            if not watch.expired or watch.task.uncancel() > watch.cancelling:
                raise
            failure: TransportError = AttemptTimeoutError(
                f"No whole answer came within {self.settings.read_timeout} s "
                "(Settings.read_timeout).",
                ambiguous=True,
            )
        except (aiohttp.ClientError, OSError) as error:
            failure = build_transport_error(error, self.settings)
            if not isinstance(error, aiohttp.ClientResponseError):
                cause = error  # that one's repr holds the request's headers, credentials and all
        except RuntimeError as error:
            if self.owned or not self._http.closed:
                raise
            raise ConfigurationError(
                "The aiohttp session passed as `http` was closed. Keep it open until this session "
                "is closed."
            ) from error
        else:
            if len(payload) <= self.settings.max_response_bytes:
                return response.status, response.headers, payload
            response.close()
            raise ResponseDecodeError(
                f"The service answered {response.status} with more than "
                f"{self.settings.max_response_bytes} bytes (Settings.max_response_bytes); "
                "the rest was not read.",
                status=response.status,
                raw_body=payload[:4096],
            )
        finally:
            self._watchdog.end(watch)
        raise failure from cause

    async def _read_rest(self, content: aiohttp.StreamReader, first: bytes) -> bytes:
        """Read a body of several chunks, but not much more of it than is allowed."""
        chunks = [first]
        length = len(first)
        while not content.at_eof() and length <= self.settings.max_response_bytes:
            chunks.append(await content.readany())
            length += len(chunks[-1])
        return b"".join(chunks)


_UNSENT: Final = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
_CERTIFICATE: Final = (aiohttp.ClientConnectorCertificateError, ssl.SSLCertVerificationError)


def build_transport_error(
    error: aiohttp.ClientError | OSError, settings: Settings
) -> TransportError:
    """Say what became of an attempt without an answer."""
    if isinstance(error, _CERTIFICATE):
        return TransportError(
            f"The server's certificate is not trusted, so nothing was sent: {error}.",
            permanent=True,
        )
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return AttemptTimeoutError(
            f"No connection stood within {settings.connect_timeout} s "
            "(Settings.connect_timeout); nothing was sent."
        )
    if isinstance(error, _UNSENT):
        return TransportError(f"No connection could be made, so nothing was sent: {error}.")
    if isinstance(error, aiohttp.ClientResponseError):
        return TransportError(
            f"The answer is no valid HTTP: {shorten(str(error.message or error.status).encode())}.",
            ambiguous=True,
        )
    reason = shorten(str(error).encode()) or type(error).__name__
    return TransportError(
        f"The connection broke before the whole answer was there: {reason}.", ambiguous=True
    )


def build_headers(credentials: Credentials, *, version: str) -> CIMultiDict[str]:
    """Return the headers of every call; the only place where the secrets are written out."""
    if credentials.oauth_token is not None:
        authorization = f"Bearer {credentials.oauth_token}"
    else:
        pair = f"{credentials.api_key}:{credentials.api_secret}".encode()
        authorization = f"Basic {base64.b64encode(pair).decode()}"
    return CIMultiDict(
        {
            "Accept": "application/json",
            "Authorization": authorization,
            "Content-Type": "application/json",
            "User-Agent": f"cloudinary-analyze/{version} "
            f"(Python/{platform.python_version()}; aiohttp/{aiohttp.__version__})",
        }
    )


def check_client_session(http: aiohttp.ClientSession, settings: Settings) -> None:
    """Refuse an aiohttp session that would get in the way of ours."""
    if not isinstance(http, aiohttp.ClientSession):
        raise ConfigurationError(f"`http` takes an aiohttp.ClientSession, not {http!r:.80}.")
    if http.closed:
        raise ConfigurationError("The aiohttp session passed as `http` is closed.")
    if http.auth is not None or "Authorization" in http.headers:
        raise ConfigurationError(
            "The aiohttp session passed as `http` has credentials of its own, which would go to "
            "the service beside the session's. Make it without `auth`."
        )
    connector = http.connector
    assert connector is not None
    for name in ("limit", "limit_per_host"):
        limit = getattr(connector, name)
        if 0 < limit < settings.permits:
            raise ConfigurationError(
                f"The connector of the aiohttp session passed as `http` has {name}={limit}, less "
                f"than Settings.permits={settings.permits}: calls would queue unseen. Make it "
                f"with {name}=0, or lower the permits."
            )
