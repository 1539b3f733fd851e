"""A session trusts verified servers only, and reads nothing from the environment."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from ports import reserve_port
from scripted import URL, ScriptedServer, answer

from cloudinary_analyze import AnalyzeSession, Captioning, Credentials, Settings, TransportError

CERTIFICATE = Path(__file__).parents[1] / "untrusted.pem"
CREDENTIALS = Credentials("demo", "111222333444555", "planted-Api-Secret-8f3a")
CAPTION = answer(sample="captioning")


@pytest.fixture
async def untrusted() -> AsyncIterator[tuple[int, list[str]]]:
    """Serve TLS with an untrusted certificate; give the port and what was received."""
    seen: list[str] = []

    async def note(request: web.Request) -> web.StreamResponse:
        seen.append(request.path)
        return await CAPTION(request)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", note)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(CERTIFICATE)
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    yield runner.addresses[0][1], seen
    await runner.cleanup()


async def test_an_untrusted_certificate_sends_nothing(untrusted: tuple[int, list[str]]) -> None:
    port, seen = untrusted
    settings = Settings(host=f"https://localhost:{port}", backoff_first=0.001)
    async with AnalyzeSession(CREDENTIALS, settings=settings) as session:
        with pytest.raises(TransportError, match="certificate is not trusted") as caught:
            await session.analyze(Captioning(URL))
        assert session.stats.attempts == 1  # it is not retried
    assert (caught.value.permanent, caught.value.ambiguous) == (True, False)
    assert seen == []


async def test_no_proxy_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    async with ScriptedServer(CAPTION) as server:
        dead = f"http://127.0.0.1:{reserve_port()}"
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, dead)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        async with server.session(attempts=1) as session:
            await session.analyze(Captioning(URL))
        assert len(server.seen) == 1


async def test_no_cookie_is_kept_for_a_named_host() -> None:
    # aiohttp's jar ignores cookies of addresses, so the host needs a name
    handler = answer(sample="captioning", headers={"Set-Cookie": "a=b; Path=/"})
    async with ScriptedServer(handler) as server:
        named = server.url.replace("127.0.0.1", "localhost")
        async with server.session(host=named) as session:
            for _ in range(2):
                await session.analyze(Captioning(URL))
        assert len(server.seen) == 2
        assert not any("Cookie" in seen.headers for seen in server.seen)
