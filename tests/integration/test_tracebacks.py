"""Tools that log a traceback with the variables of its frames log no credentials."""

from __future__ import annotations

import base64
import io
import json
import logging
import traceback
from typing import Any

import aiohttp
import pytest
from rich.console import Console
from rich.traceback import Traceback
from scripted import CAPTION, KEY, URL, Handler, ScriptedServer, answer, hang_up, wire

from cloudinary_analyze import (
    AnalyzeError,
    AnalyzeSession,
    Captioning,
    ConfigurationError,
    Credentials,
    Settings,
)

SECRET = "pLanted/5ecret+Kq7z"
TOKEN = "pLanted-0auth-token-Xw3v"


HEX = TOKEN.encode().hex()  # so that the line of the source does not show it


async def renew() -> str:
    return bytes.fromhex(HEX).decode()


ACCOUNTS = {
    "key": Credentials("demo", KEY, SECRET),
    "token": Credentials("demo", oauth_token=TOKEN),
    "renewed token": Credentials("demo", oauth_token=renew),
}
NEEDLES = [
    SECRET,
    TOKEN,
    base64.b64encode(f"{KEY}:{SECRET}".encode()).decode(),
    "Bearer pLanted",
]
TROUBLES: dict[str, Handler] = {
    "401": answer(401, sample="error_401"),
    "500": answer(500),
    "hang up": hang_up(),
    "not HTTP": wire(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"),
    "truncated": wire(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"),
    "encoding": wire(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc"),
    "no JSON": answer(body=b"no json"),
    "redirect": answer(302, headers={"Location": "http://127.0.0.1:1/"}),
}


def dump(error: BaseException, *, with_rich: bool = True) -> str:
    """Return all that such tools show: of the error, its causes, and our frames and libraries'."""
    while (frames := error.__traceback__) and frames.tb_frame.f_code.co_filename == __file__:
        error.__traceback__ = frames.tb_next  # a test's own frame holds what the server has seen
    plain = traceback.TracebackException.from_exception(error, capture_locals=True)
    if not with_rich:
        return "".join(plain.format())
    shown = io.StringIO()
    console = Console(file=shown, width=400, force_terminal=False)
    rich = Traceback.from_exception(
        type(error),
        error,
        error.__traceback__,
        show_locals=True,
        locals_hide_dunder=False,
        locals_hide_sunder=False,
    )
    console.print(rich)
    return "".join(plain.format()) + shown.getvalue()


def find_leaks(text: str) -> list[str]:
    return [needle for needle in NEEDLES if needle in text]


def test_the_search_would_find_a_leak() -> None:
    def fail(header: str) -> None:
        raise ValueError("fine")

    with pytest.raises(ValueError, match="fine") as caught:
        fail(f"Bearer {TOKEN}")
    shown = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    assert find_leaks("".join(shown.format()))
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with pytest.raises(TypeError) as refused:
        json.dumps({"headers": headers, "unwritable": object()})
    assert find_leaks(dump(refused.value))


@pytest.mark.parametrize("own_http", [False, True], ids=["", "own http"])
@pytest.mark.parametrize("account", ACCOUNTS)
@pytest.mark.parametrize("trouble", TROUBLES)
async def test_a_failed_call_holds_no_credentials(
    trouble: str, account: str, own_http: bool
) -> None:
    errors: list[BaseException] = []
    async with ScriptedServer(TROUBLES[trouble]) as server, aiohttp.ClientSession() as http:
        options: dict[str, Any] = {"http": http, "permits": 8} if own_http else {}
        async with server.session(credentials=ACCOUNTS[account], attempts=1, **options) as session:
            for call in (
                session.analyze(Captioning(URL)),
                session.task_status("t1"),
                session.submit(Captioning(URL), mode="call"),
            ):
                with pytest.raises(AnalyzeError) as caught:
                    await call
                errors.append(caught.value)
            (outcome,) = await session.analyze_all([Captioning(URL)])
            assert outcome.error is not None
            errors.append(outcome.error)
    for error in errors:
        shown = dump(
            error, with_rich=(trouble, account) == ("hang up", "key") and error is errors[0]
        )
        assert "cloudinary_analyze" in shown, "our frames are there"
        assert not find_leaks(shown)


@pytest.mark.parametrize("account", ACCOUNTS)
async def test_unreachable_hosts_hold_no_credentials(account: str) -> None:
    for settings in (
        Settings(host="http://127.0.0.1:1", attempts=1),
        Settings(host="https://127.0.0.1:1", attempts=1),
        Settings(host="http://127.0.0.1:1", proxy="http://127.0.0.1:1", attempts=1),
        Settings(host="https://a.invalid", proxy="http://127.0.0.1:1", attempts=1),
    ):
        async with AnalyzeSession(ACCOUNTS[account], settings=settings) as session:
            with pytest.raises(AnalyzeError) as caught:
                await session.analyze(Captioning(URL))
        assert not find_leaks(dump(caught.value, with_rich=False))


async def test_a_refused_http_session_holds_no_credentials() -> None:
    async with (
        aiohttp.ClientSession(auto_decompress=False) as http,
        ScriptedServer(CAPTION) as server,
    ):
        for account in ACCOUNTS.values():
            with pytest.raises(ConfigurationError) as caught:
                async with server.session(credentials=account, http=http, permits=8):
                    pass
            assert not find_leaks(dump(caught.value, with_rich=False))


async def test_a_broken_token_function_holds_no_token() -> None:
    async def bad() -> str:
        return f"{await renew()} \n"[:-2] + " x"

    async with ScriptedServer(CAPTION) as server:
        credentials = Credentials("demo", oauth_token=bad)
        with pytest.raises(ConfigurationError) as caught:
            async with server.session(credentials=credentials):
                pass
    assert not find_leaks(dump(caught.value))


async def test_frames_of_the_users_own_code_stay() -> None:
    """A middleware that fails must be found, so only aiohttp's frames are left out."""

    async def my_middleware(request: Any, handler: Any) -> Any:
        raise RuntimeError("in my middleware")

    async with (
        ScriptedServer(CAPTION) as server,
        aiohttp.ClientSession(middlewares=[my_middleware]) as http,
        server.session(http=http, permits=8, attempts=1) as session,
    ):
        with pytest.raises(AnalyzeError) as caught:
            await session.analyze(Captioning(URL))
    logging.getLogger("app").error("it failed", exc_info=caught.value)
    shown = dump(caught.value)
    assert "in my_middleware" in shown
    assert "aiohttp/client.py" not in shown
