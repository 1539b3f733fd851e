"""An expired OAuth token is renewed once for all waiting calls, and no call fails because of it."""

import asyncio
import copy
import functools
import pickle
from typing import Any

import pytest
from aiohttp import web
from scripted import CAPTION, KEY, SECRET, ScriptedServer, answer, until

from cloudinary_analyze import (
    AuthenticationError,
    Captioning,
    ConfigurationError,
    Credentials,
    SessionClosedError,
    Settings,
)
from cloudinary_analyze.errors import CallTimeoutError

URL = "https://images.example/a.jpg"
refuse = answer(401, sample="error_401")


class Tokens:
    """A token service: each call gives the next token; the server takes only the newest."""

    def __init__(self) -> None:
        self.asked = self.asking = self.most = 0
        self.failure: BaseException | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.valid = 1
        self.sent: list[str] = []

    async def __call__(self) -> str:
        self.asked += 1
        self.asking += 1
        self.most = max(self.most, self.asking)
        try:
            await asyncio.sleep(0)
            await self.gate.wait()
            if self.failure is not None:
                raise self.failure
            return f"pLanted-{self.asked}"
        finally:
            self.asking -= 1

    async def handle(self, request: web.Request) -> web.StreamResponse:
        sent = request.headers.getall("Authorization")
        self.sent += sent
        return await (CAPTION if sent == [f"Bearer pLanted-{self.valid}"] else refuse)(request)

    def expire(self) -> None:
        self.valid = self.asked + 1

    @property
    def credentials(self) -> Credentials:
        return Credentials("demo", oauth_token=self)


async def test_a_token_is_fetched_at_opening_and_after_a_401() -> None:
    tokens = Tokens()
    async with ScriptedServer(tokens.handle) as server:
        async with server.session(credentials=tokens.credentials) as session:
            assert tokens.asked == 1
            for _ in range(3):
                await session.analyze(Captioning(URL))
            assert tokens.asked == 1
            tokens.expire()
            await session.analyze(Captioning(URL))
            assert tokens.asked == 2
            assert tokens.sent == ["Bearer pLanted-1"] * 4 + ["Bearer pLanted-2"]
            assert session.stats.retries == 1


async def test_a_long_run_survives_many_renewals_without_a_failed_item() -> None:
    tokens = Tokens()
    async with ScriptedServer(tokens.handle) as server:
        async with server.session(credentials=tokens.credentials, permits=16) as session:
            done = 0
            async for outcome in session.map([f"{URL}?{n}" for n in range(400)], Captioning):
                outcome.unwrap()
                done += 1
                if done % 100 == 50:
                    # a call that still had the token before this one would be refused twice
                    await until(lambda: session.stats.permits_in_use == 0)
                    tokens.expire()
    assert done == 400
    assert (tokens.asked, tokens.most) == (5, 1)


async def test_many_calls_that_are_refused_at_once_share_one_renewal() -> None:
    tokens = Tokens()
    async with ScriptedServer(tokens.handle) as server:
        async with server.session(credentials=tokens.credentials) as session:
            tokens.expire()
            calls = [session.analyze(Captioning(f"{URL}?{n}")) for n in range(50)]
            await asyncio.gather(*calls)
    assert (tokens.asked, tokens.most) == (2, 1)


async def test_a_token_that_is_refused_again_fails_the_call() -> None:
    tokens = Tokens()
    tokens.valid = 99
    async with ScriptedServer(tokens.handle) as server:
        async with server.session(credentials=tokens.credentials) as session:
            with pytest.raises(AuthenticationError):
                await session.analyze(Captioning(URL))
    assert (tokens.asked, len(tokens.sent)) == (2, 2)


async def test_polls_renew_the_token_too() -> None:
    tokens = Tokens()
    status = answer(200, {"data": {"status": "pending"}})

    async def handle(request: web.Request) -> web.StreamResponse:
        sent = request.headers["Authorization"]
        return await (status if sent == f"Bearer pLanted-{tokens.valid}" else refuse)(request)

    async with ScriptedServer(handle) as server:
        async with server.session(credentials=tokens.credentials) as session:
            tokens.expire()
            assert (await session.task_status("t1")).state == "pending"
    assert tokens.asked == 2


@pytest.mark.parametrize(
    "failure", [OSError("pLanted"), asyncio.CancelledError(), KeyError("pLanted")], ids=repr
)
async def test_a_session_without_a_first_token_does_not_open(failure: BaseException) -> None:
    tokens = Tokens()
    tokens.failure = failure
    async with ScriptedServer(CAPTION) as server:
        session = server.session(credentials=tokens.credentials)
        with pytest.raises(ConfigurationError, match=type(failure).__name__) as caught:
            await session.__aenter__()
        assert caught.value.__cause__ is failure
        assert "pLanted" not in str(caught.value)
        with pytest.raises(SessionClosedError):
            await session.__aenter__()
        assert server.seen == []


@pytest.mark.parametrize("value", [None, 5, "", "a b", "half \ud800"])
async def test_an_invalid_token_is_refused(value: Any) -> None:
    async def ask() -> Any:
        return value

    async with ScriptedServer(CAPTION) as server:
        session = server.session(credentials=Credentials("demo", oauth_token=ask))
        with pytest.raises(ConfigurationError, match=r"OAuth token|oauth_token"):
            await session.__aenter__()


async def test_a_function_that_is_not_async_is_refused() -> None:
    async with ScriptedServer(CAPTION) as server:
        credentials = Credentials("demo", oauth_token=lambda: "pLanted")  # type: ignore[arg-type, return-value]
        with pytest.raises(ConfigurationError, match="async function"):
            await server.session(credentials=credentials).__aenter__()


async def test_a_renewal_that_fails_fails_the_call_with_its_401() -> None:
    tokens = Tokens()
    async with ScriptedServer(tokens.handle) as server:
        async with server.session(credentials=tokens.credentials) as session:
            tokens.expire()
            tokens.failure = OSError("the token service is down")
            with pytest.raises(AuthenticationError) as caught:
                await session.analyze(Captioning(URL))
            assert isinstance(caught.value.__cause__, ConfigurationError)
            assert caught.value.__cause__.__cause__ is tokens.failure
            tokens.failure = None
            tokens.expire()
            await session.analyze(Captioning(URL))


async def start_renewal(tokens: Tokens, session: Any, count: int = 1) -> list[asyncio.Task[Any]]:
    tokens.expire()
    tokens.gate.clear()
    calls = [asyncio.ensure_future(session.analyze(Captioning(URL))) for _ in range(count)]
    while not tokens.asking:
        await asyncio.sleep(0.001)
    return calls


async def test_closing_ends_calls_that_wait_for_a_token() -> None:
    tokens = Tokens()
    async with ScriptedServer(tokens.handle) as server:
        async with server.session(credentials=tokens.credentials) as session:
            calls = await start_renewal(tokens, session, 5)
        for call in calls:
            with pytest.raises(SessionClosedError):
                await call
    await asyncio.sleep(0)
    assert tokens.asking == 0


async def test_cancelling_one_call_does_not_stop_the_renewal_for_the_others() -> None:
    tokens = Tokens()
    async with ScriptedServer(tokens.handle) as server:
        async with server.session(credentials=tokens.credentials) as session:
            first, *others = await start_renewal(tokens, session, 4)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            tokens.gate.set()
            for call in others:
                assert (await call).analysis.caption
    assert tokens.asked == 2


async def test_a_deadline_ends_the_wait_for_a_token() -> None:
    tokens = Tokens()
    async with ScriptedServer(tokens.handle) as server:
        async with server.session(credentials=tokens.credentials) as session:
            tokens.expire()
            tokens.gate.clear()
            with pytest.raises(CallTimeoutError):
                await session.analyze(Captioning(URL), timeout=0.1)


async def test_a_function_that_hangs_ends_after_the_read_timeout() -> None:
    tokens = Tokens()
    tokens.gate.clear()
    async with ScriptedServer(CAPTION) as server:
        session = server.session(credentials=tokens.credentials, read_timeout=0.05)
        with pytest.raises(ConfigurationError, match="TimeoutError"):
            await session.__aenter__()


async def test_cancelling_the_opening_leaves_nothing_open() -> None:
    tokens = Tokens()
    tokens.gate.clear()
    async with ScriptedServer(CAPTION) as server:
        session = server.session(credentials=tokens.credentials)
        opening = asyncio.ensure_future(session.__aenter__())
        while not tokens.asking:
            await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        await asyncio.sleep(0)
        assert tokens.asking == 0


async def get_token() -> str:
    return "pLanted"


def test_the_function_is_not_in_a_repr_and_pickles_only_by_name() -> None:
    for ask in (Tokens.__call__, get_token, functools.partial(get_token)):
        credentials = Credentials("demo", oauth_token=ask)  # type: ignore[arg-type]
        assert "token" not in repr(credentials)
        assert copy.deepcopy(credentials) == copy.copy(credentials) == credentials
    named = Credentials("demo", oauth_token=get_token)
    assert pickle.loads(pickle.dumps(named)) == named
    secret = "pLanted"
    local = Credentials("demo", oauth_token=lambda: secret)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="top level of a module"):
        pickle.dumps(local)
    both = Credentials("demo", KEY, SECRET, oauth_token=get_token)
    assert both.signing_secrets == (SECRET,)
    with pytest.raises(ConfigurationError):
        Credentials("demo", oauth_token=int)  # type: ignore[arg-type]
    assert Settings().read_timeout
