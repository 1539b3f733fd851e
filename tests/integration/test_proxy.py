"""Calls and polls through a proxy: what it sees, how it fails, and who gets its password."""

from __future__ import annotations

import asyncio
import base64
import copy
import os
import pickle
import ssl
import sys
import traceback
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import attrs
import pytest
import yarl
from aiohttp import web
from cli_support import COMMAND
from ports import reserve_port
from proxy_support import Proxy
from scripted import CAPTION, KEY, SECRET, URL, ScriptedServer

from cloudinary_analyze import (
    AnalyzeSession,
    AttemptTimeoutError,
    Captioning,
    ConfigurationError,
    Credentials,
    Delivery,
    Settings,
    TransportError,
)
from cloudinary_analyze.emulator import Emulator

CERTIFICATE = Path(__file__).parents[1] / "untrusted.pem"
PASSWORD = "pr0xy-Pass/w:rd"
QUOTED = "pr0xy-Pass%2Fw%3Ard"
CREDENTIALS = Credentials("demo", KEY, SECRET)
AUTHORIZATION = base64.b64encode(f"{KEY}:{SECRET}".encode()).decode()
FAST = {"backoff_first": 0.001, "backoff_max": 0.002}


def with_password(url: str) -> str:
    return url.replace("://", f"://me:{QUOTED}@")


def build_context() -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(CERTIFICATE)
    return context


@pytest.fixture
async def tls_port() -> AsyncIterator[int]:
    """Serve captions with TLS on a port of this machine."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", CAPTION)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=build_context()).start()
    yield runner.addresses[0][1]
    await runner.cleanup()


def read_port(url: str) -> int:
    return int(url.rpartition(":")[2])


async def test_calls_and_polls_go_through_the_proxy() -> None:
    async with Emulator() as emulator, Proxy(read_port(emulator.url)) as proxy:
        # only the proxy resolves this name
        url = emulator.cloudinary_url.replace(emulator.url, "http://service.test:1234")
        credentials = Credentials.from_url(url)
        settings = Settings(proxy=proxy.url, poll_first=0.01)
        inbox: asyncio.Queue[Delivery] = asyncio.Queue()
        async with AnalyzeSession(credentials, settings=settings, notifications=inbox) as session:
            await session.analyze(Captioning(URL))
            handle = session.submit(Captioning(URL), mode="task")
            task_id = await handle.accepted()
            assert (await session.task_status(task_id)).task_id == task_id
            handle.abandon()
        lines = [head.line for head in proxy.heads]
    assert lines
    assert all(" http://service.test:1234/v2/analysis/" in line for line in lines), lines
    assert emulator.counts.total_received == 2


async def test_a_plain_proxy_gets_its_own_password() -> None:
    async with ScriptedServer(CAPTION) as server, Proxy(read_port(server.url)) as proxy:
        async with server.session(proxy=with_password(proxy.url)) as session:
            await session.analyze(Captioning(URL))
        (head,) = proxy.heads
    assert base64.b64decode(head.headers["proxy-authorization"][6:]).decode() == f"me:{PASSWORD}"


async def test_a_tunnel_shows_the_proxy_no_credentials(tls_port: int) -> None:
    """aiohttp would send the default headers of its session with CONNECT, in clear text."""
    for given in ("http://{}", f"http://me:{QUOTED}@{{}}"):
        async with Proxy(tls_port) as proxy:
            settings = Settings(
                host=f"https://localhost:{tls_port}",
                proxy=given.format(proxy.url.removeprefix("http://")),
            )
            async with AnalyzeSession(CREDENTIALS, settings=settings) as session:
                with pytest.raises(TransportError, match="certificate is not trusted") as caught:
                    await session.analyze(Captioning(URL))
        assert (caught.value.permanent, caught.value.ambiguous) == (True, False)
        (head,) = proxy.heads
        assert head.line == f"CONNECT localhost:{tls_port} HTTP/1.1"
        assert "authorization" not in head.headers
        assert AUTHORIZATION not in repr(head)
        if "@" in given:
            sent = base64.b64decode(head.headers["proxy-authorization"][6:]).decode()
            assert sent == f"me:{PASSWORD}"
        else:
            assert "proxy-authorization" not in head.headers


TUNNEL = """
import asyncio, sys
from cloudinary_analyze import AnalyzeSession, Captioning, Credentials, Settings

async def main(host, proxy):
    settings = Settings(host=host, proxy=proxy, attempts=1)
    async with AnalyzeSession(Credentials("demo", "1", "2"), settings=settings) as session:
        for _ in range(3):
            print((await session.analyze(Captioning("https://e.example/a.jpg"))).analysis.caption)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("secure", [False, True], ids=["http proxy", "https proxy"])
async def test_a_tunnel_carries_calls_and_is_reused(tls_port: int, secure: bool) -> None:
    context = build_context() if secure else None
    async with Proxy(tls_port, context=context) as proxy:
        host = f"https://localhost:{tls_port}"
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-c", TUNNEL, host, with_password(proxy.url)),
            env={**os.environ, "SSL_CERT_FILE": str(CERTIFICATE)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await asyncio.wait_for(process.communicate(), 100)
    assert process.returncode == 0, err.decode()
    assert len(out.splitlines()) == 3
    assert len(proxy.heads) == 1


@pytest.mark.parametrize(
    ("reply", "sentence", "permanent"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "user and password", True),
        (b"HTTP/1.1 403 \x1b[31mForbidden\r\n\r\n", "answered 403", True),
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n\r\n", "answered 302", True),
        (b"HTTP/1.1 503 Busy\r\n\r\n", "answered 503 (Busy)", False),
        (b"HTTP/1.1 429 Slow Down\r\n\r\n", "answered 429", False),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "not valid HTTP", False),
        (b"HTTP/1.1 200 OK\r\n\r\nnot TLS", "nothing was sent", False),
        (b"", "before anything was sent", False),
    ],
)
async def test_a_failing_tunnel_sends_nothing(reply: bytes, sentence: str, permanent: bool) -> None:
    async with Proxy(1, reply=reply) as proxy:
        settings = Settings(
            host="https://service.test", proxy=with_password(proxy.url), attempts=2, **FAST
        )
        async with AnalyzeSession(CREDENTIALS, settings=settings) as session:
            with pytest.raises(TransportError) as caught:
                await session.analyze(Captioning(URL))
            assert session.stats.ambiguous_retries == 0
    error = caught.value
    assert sentence in str(error)
    assert (error.ambiguous, error.permanent) == (False, permanent)
    assert error.attempts == (1 if permanent else 2)
    shown = "".join(
        traceback.TracebackException.from_exception(error, capture_locals=True).format()
    )
    assert str(error).isprintable()
    for secret in (PASSWORD, QUOTED, SECRET, AUTHORIZATION):
        assert secret not in shown


async def test_a_refusal_of_plain_http_is_the_proxys() -> None:
    reply = b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"
    async with Proxy(1, reply=reply) as proxy, ScriptedServer(CAPTION) as server:
        async with server.session(proxy=proxy.url) as session:
            with pytest.raises(TransportError, match="user and password") as caught:
                await session.analyze(Captioning(URL))
    assert (caught.value.ambiguous, caught.value.permanent) == (False, True)
    assert server.seen == []


async def test_an_absent_proxy_sends_nothing() -> None:
    proxy = f"http://127.0.0.1:{reserve_port()}"
    settings = Settings(host="https://service.test", proxy=proxy, attempts=2, **FAST)
    async with AnalyzeSession(CREDENTIALS, settings=settings) as session:
        with pytest.raises(TransportError, match="connect to the proxy, so nothing was sent") as e:
            await session.analyze(Captioning(URL))
    assert (e.value.ambiguous, e.value.attempts) == (False, 2)


async def test_a_silent_proxy_times_out_unsent() -> None:
    async with Proxy(1, silent=True) as proxy:
        settings = Settings(
            host="https://service.test", proxy=proxy.url, attempts=1, connect_timeout=0.1
        )
        async with AnalyzeSession(CREDENTIALS, settings=settings) as session:
            with pytest.raises(AttemptTimeoutError, match="nothing was sent") as caught:
                await session.analyze(Captioning(URL))
    assert not caught.value.ambiguous


def test_a_proxy_and_an_own_http_session_exclude_each_other() -> None:
    async def build() -> None:
        async with aiohttp.ClientSession() as http:
            with pytest.raises(ConfigurationError, match="exclude each other"):
                AnalyzeSession(CREDENTIALS, settings=Settings(proxy="http://p.test"), http=http)

    asyncio.run(build())


def test_no_proxy_elsewhere_reads_credentials_in_clear() -> None:
    settings = Settings(host="http://127.0.0.1:8080", proxy="http://proxy.test:3128")
    with pytest.raises(ConfigurationError, match="could read the credentials"):
        AnalyzeSession(CREDENTIALS, settings=settings)
    AnalyzeSession(Credentials("emulator-1", KEY, SECRET), settings=settings)


def test_no_repr_and_no_pickle_has_the_password() -> None:
    settings = Settings(proxy=f"http://me:{QUOTED}@proxy.test:3128")
    assert settings.proxy == f"http://me:{QUOTED}@proxy.test:3128"
    for shown in (repr(settings), repr(settings.proxy), repr([settings.proxy])):
        assert QUOTED not in shown
    assert "me:***@proxy.test:3128" in repr(settings)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        stored = pickle.dumps(settings, protocol)
        assert QUOTED.encode() not in stored
        assert PASSWORD.encode() not in stored
    assert copy.copy(settings) == copy.deepcopy(settings) == attrs.evolve(settings) == settings


def test_a_pickle_finds_the_password_of_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://me:{QUOTED}@proxy.test:3128"
    stored = pickle.dumps(Settings(proxy=url))
    for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert pickle.loads(stored).proxy == "http://me@proxy.test:3128"
    for other in ("http://me:x@other.test:3128", "http://you:x@proxy.test:3128", "nonsense://"):
        monkeypatch.setenv("HTTP_PROXY", other)
        assert pickle.loads(stored).proxy == "http://me@proxy.test:3128"
    monkeypatch.setenv("HTTPS_PROXY", url)
    assert pickle.loads(stored).proxy == url


async def run_command(*arguments: str, **variables: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        *arguments,
        env={**os.environ, **variables},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await asyncio.wait_for(process.communicate(), 100)
    assert process.returncode is not None
    return process.returncode, out.decode()


@pytest.mark.parametrize("how", ["variable", "option", "no_proxy", "empty option"])
async def test_the_command_line_reads_the_usual_variables(tmp_path: Path, how: str) -> None:
    names = tmp_path / "urls.txt"
    names.write_text(URL)
    async with Emulator() as emulator, Proxy(read_port(emulator.url)) as proxy:
        url = emulator.cloudinary_url.replace("127.0.0.1", "service.test")
        variables = {"CLOUDINARY_URL": url, "HTTP_PROXY": with_password(proxy.url)}
        options = ["--attempts", "1"]
        if how == "option":
            options += ["--proxy", proxy.url]
            variables["HTTP_PROXY"] = "http://127.0.0.1:1"
        if how == "empty option":
            options += ["--proxy", ""]
        if how == "no_proxy":
            variables["NO_PROXY"] = "example.com,.test"
        command = (
            "run",
            "captioning",
            "--input",
            str(names),
            "--output",
            str(tmp_path / "o.jsonl"),
        )
        code, out = await run_command(*command, *options, **variables)
    assert (code, len(proxy.heads)) == ((0, 1) if how in {"variable", "option"} else (1, 0)), out
    assert QUOTED not in out


async def test_an_invalid_proxy_variable_is_an_error_that_hides_it() -> None:
    for command in (("analyze", "captioning", URL), ("status", "abc")):
        code, out = await run_command(
            *command,
            CLOUDINARY_URL=f"cloudinary://{KEY}:{SECRET}@demo",
            HTTPS_PROXY=f"socks5://me:{QUOTED}@proxy.test:1080",
        )
        assert code == 2
        assert "https_proxy" in out.lower()
        assert QUOTED not in out


def test_url_objects_are_proxies() -> None:
    assert Settings(proxy=yarl.URL("http://p.test:3128/")).proxy == "http://p.test:3128"  # type: ignore[arg-type]
