"""A user's aiohttp session works, or is refused when our session opens."""

from __future__ import annotations

import asyncio
import gzip
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from scripted import (
    CAPTION,
    SAMPLES,
    URL,
    ScriptedServer,
    answer,
    busy,
    never_answer,
    one_after_the_other,
    until,
)

from cloudinary_analyze import (
    AnalyzeError,
    AnalyzeSession,
    AttemptTimeoutError,
    Captioning,
    ConfigurationError,
    Credentials,
    SessionClosedError,
    TransportError,
)

DEMO = Credentials("demo", "key", "planted-Api-Secret-8f3a")


async def expect_refusal(http: aiohttp.ClientSession, said: str, **options: Any) -> None:
    session = AnalyzeSession(DEMO, http=http, **options)
    with pytest.raises(ConfigurationError, match=said) as caught:
        await session.__aenter__()
    assert "planted" not in str(caught.value)
    await session.aclose()


def test_a_session_of_another_loop_is_refused() -> None:
    other = asyncio.new_event_loop()

    async def create() -> aiohttp.ClientSession:
        return aiohttp.ClientSession()

    http = other.run_until_complete(create())
    try:
        asyncio.run(expect_refusal(http, "another event loop"))
    finally:
        other.run_until_complete(http.close())
        other.close()


async def test_a_session_that_does_not_decompress_is_refused() -> None:
    async with aiohttp.ClientSession(auto_decompress=False) as http:
        await expect_refusal(http, "auto_decompress=False")


@pytest.mark.parametrize("entry", ["machine api.cloudinary.com login me password x", "default"])
async def test_a_netrc_login_for_the_service_is_refused(
    entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    login = entry if "login" in entry else f"{entry} login me password x"
    (tmp_path / "netrc").write_text(login + "\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    async with aiohttp.ClientSession(trust_env=True) as http:
        await expect_refusal(http, "netrc has a login for api.cloudinary.com")


@pytest.mark.parametrize("text", ["machine elsewhere login me password x\n", "garbled {", None])
async def test_trust_env_works_without_a_login_for_the_service(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if text is not None:
        (tmp_path / "netrc").write_text(text)
    async with ScriptedServer(CAPTION) as server, aiohttp.ClientSession(trust_env=True) as http:
        async with server.session(http=http) as session:
            await session.analyze(Captioning(URL))
        assert server.seen[0].headers["Authorization"].startswith("Basic ")


async def test_a_netrc_login_that_appears_later_is_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    async with ScriptedServer(CAPTION) as server, aiohttp.ClientSession(trust_env=True) as http:
        async with server.session(http=http) as session:
            (tmp_path / "netrc").write_text("default login me password x\n")
            with pytest.raises(TransportError, match="ValueError") as caught:
                await session.analyze(Captioning(URL))
            assert (caught.value.permanent, caught.value.ambiguous) == (True, False)
            assert (len(server.seen), busy(session.stats)) == (0, (0, 0, 0))


async def test_cookies_and_compressed_responses_work() -> None:
    body = gzip.compress((SAMPLES / "captioning.json").read_bytes())
    handler = answer(body=body, headers={"Content-Encoding": "gzip", "Set-Cookie": "a=b"})
    jar_for_addresses = {"cookie_jar": aiohttp.CookieJar(unsafe=True)}
    async with (
        ScriptedServer(handler) as server,
        aiohttp.ClientSession(**jar_for_addresses) as http,
    ):
        async with server.session(http=http) as session:
            for _ in range(2):
                assert (await session.analyze(Captioning(URL))).model == "captioning"
        assert server.seen[1].headers["Cookie"] == "a=b"


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, ZeroDivisionError, KeyError])
async def test_an_error_of_a_trace_is_an_error_of_ours_and_is_not_repeated(
    kind: type[Exception],
) -> None:
    async def fail(*_: object) -> None:
        raise kind("it failed")

    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(fail)
    async with ScriptedServer(CAPTION) as server:
        async with aiohttp.ClientSession(trace_configs=[trace]) as http:
            async with server.session(http=http) as session:
                with pytest.raises(TransportError, match=kind.__name__) as caught:
                    await session.analyze(Captioning(URL))
                assert isinstance(caught.value.__cause__, kind)
                assert (caught.value.attempts, caught.value.ambiguous) == (1, False)


async def test_a_cancelled_error_of_a_trace_is_an_error_of_ours() -> None:
    async def fail(*_: object) -> None:
        raise asyncio.CancelledError

    trace = aiohttp.TraceConfig()
    trace.on_request_end.append(fail)
    async with ScriptedServer(CAPTION) as server:
        async with aiohttp.ClientSession(trace_configs=[trace]) as http:
            async with server.session(http=http, attempts=1) as session:
                with pytest.raises(TransportError) as caught:
                    await session.analyze(Captioning(URL))
                assert isinstance(caught.value.__cause__, asyncio.CancelledError)
                assert caught.value.ambiguous


async def test_its_close_while_a_call_is_in_flight_is_an_error_of_ours() -> None:
    async with ScriptedServer(never_answer) as server, aiohttp.ClientSession() as http:
        async with server.session(http=http) as session:
            call = asyncio.create_task(session.analyze(Captioning(URL)))
            await until(lambda: server.seen)
            await http.close()
            with pytest.raises(AnalyzeError):
                await asyncio.wait_for(call, 30)


async def test_a_read_timeout_still_holds_while_our_session_closes() -> None:
    async with ScriptedServer(never_answer) as server, aiohttp.ClientSession() as http:
        session = await server.session(http=http, read_timeout=1).__aenter__()
        call = asyncio.create_task(session.analyze(Captioning(URL)))
        await until(lambda: server.seen)
        async with asyncio.timeout(30):
            await session.aclose()
            with pytest.raises(SessionClosedError) as caught:
                await call
        assert caught.value.ambiguous
        assert isinstance(caught.value.__cause__, AttemptTimeoutError)
        assert not http.closed


async def test_a_cancelled_close_leaves_no_call_in_flight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The close does not wait for the response, and the aiohttp session is not ours to close."""
    monkeypatch.setattr("cloudinary_analyze.session.CLOSE_PATIENCE", 1000.0)
    async with ScriptedServer(never_answer) as server, aiohttp.ClientSession() as http:
        session = await server.session(http=http).__aenter__()
        call = asyncio.create_task(session.analyze(Captioning(URL)))
        await until(lambda: server.seen)
        closing = asyncio.create_task(session.aclose())
        await asyncio.sleep(0.01)
        closing.cancel()
        async with asyncio.timeout(30):
            with pytest.raises(asyncio.CancelledError):
                await closing
            with pytest.raises(SessionClosedError) as caught:
                await call
        assert caught.value.ambiguous
        assert call.cancelling() == 0


async def test_a_body_that_never_reached_a_connection_is_not_ambiguous() -> None:
    """The read timeout is shorter than the connect timeout, and nothing accepts."""

    class Endless(aiohttp.abc.AbstractResolver):
        async def resolve(self, *_: object, **__: object) -> Any:
            await asyncio.sleep(60)

        async def close(self) -> None: ...

    connector = aiohttp.TCPConnector(resolver=Endless(), limit=0)
    async with (
        ScriptedServer(never_answer) as server,
        aiohttp.ClientSession(connector=connector) as http,
    ):
        host = "https://api.invalid"
        async with server.session(http=http, host=host, read_timeout=0.05, attempts=2) as session:
            with pytest.raises(AttemptTimeoutError) as caught:
                await session.analyze(Captioning(URL))
            assert (caught.value.attempts, caught.value.ambiguous) == (2, False)
        async with server.session(
            http=http, host=host, connect_timeout=0.05, attempts=1, retry_ambiguous=False
        ) as session:
            with pytest.raises(AttemptTimeoutError, match="connect_timeout") as caught:
                await session.analyze(Captioning(URL))
            assert not caught.value.ambiguous


async def test_an_attempt_that_was_sent_before_an_unsent_one_stays_ambiguous() -> None:
    async with ScriptedServer(one_after_the_other(never_answer, never_answer)) as server:
        async with server.session(read_timeout=0.5, attempts=1) as session:
            with pytest.raises(AttemptTimeoutError) as caught:
                await session.analyze(Captioning(URL))
            assert caught.value.ambiguous
