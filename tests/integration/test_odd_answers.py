"""For every odd response of a server or gateway, the caller gets an error with the raw body."""

from __future__ import annotations

import asyncio
import gzip
import pickle
import traceback
from typing import Any

import attrs
import pytest
from aiohttp import web
from scripted import (
    CAPTION,
    SECRET,
    URL,
    Handler,
    ScriptedServer,
    answer,
    hang_up,
    never_answer,
    until,
    wire,
)

from cloudinary_analyze import (
    AnalyzeError,
    AnalyzeSession,
    ApiError,
    AttemptTimeoutError,
    BadRequestError,
    Captioning,
    Coco,
    ResponseDecodeError,
    ServerError,
    TransportError,
)
from cloudinary_analyze.errors import SHOWN_BODY

HTML = b"<html><head><title>502 Bad Gateway</title></head><body>" + b"nginx " * 500 + b"</body>"
GOOD = b'{"data":{"analysis":{"data":{"caption":"A cat"}}}}'


def head(length: int | None, *more: bytes, status: bytes = b"200 OK") -> bytes:
    lines = [b"HTTP/1.1 " + status, b"Content-Type: application/json", *more]
    if length is not None:
        lines.append(b"Content-Length: %d" % length)
    return b"\r\n".join(lines) + b"\r\n\r\n"


@attrs.frozen
class Case:
    handler: Handler
    error: type[AnalyzeError]
    said: str
    calls: int = 1  # attempts; an unreadable response that was charged is not requested again
    body: bytes | None = None
    ambiguous: bool = False


def unreadable(said: str, status: int = 200, content: Any = None, **answer_: Any) -> Case:
    return Case(answer(status, content, **answer_), ResponseDecodeError, said, ambiguous=True)


def broken(data: bytes, said: str) -> Case:
    return Case(wire(data), TransportError, said, calls=3, ambiguous=True)


CASES: dict[str, Case] = {
    "200 that is not JSON": unreadable("not valid JSON: 'OK, done'", body=b"OK, done"),
    "200 with truncated JSON": unreadable("not valid JSON", body=GOOD[:30]),
    "200 with HTML": unreadable(
        "not valid JSON: '<html>", body=HTML, headers={"Content-Type": "text/html"}
    ),
    "200 with bytes of no encoding": unreadable("not valid JSON", body=b"\xff\xfe\x00\x81" * 300),
    "empty 200": unreadable("an empty body", body=b""),
    "200 of white space": unreadable("an empty body", body=b" \n "),
    "200 null": unreadable(r"at \$, it should be an object", body=b"null"),
    "200 array": unreadable(r"at \$, it should be an object", body=b"[1]"),
    "200 very deep": unreadable("not valid JSON", body=b"[" * 200_000),
    "200 without data": unreadable(r"at \$.data, it is missing", content={"request_id": "x"}),
    "200 with odd data": unreadable(r"at \$.data, it should be an object", content={"data": [1]}),
    "200 without analysis": unreadable(
        r"at \$.data.analysis, it is missing", content={"data": {"entity": URL}}
    ),
    "200 with odd analysis": unreadable(
        r"at \$.data.analysis, it should be an object", content={"data": {"analysis": "x"}}
    ),
    "200 of another model": unreadable(
        r"at \$.data.analysis.data, it should be an object", sample="coco"
    ),
    "200 that is an error": unreadable(r"at \$.data, it is missing", sample="error_500"),
    "202 without data": unreadable(r"at \$.data.task_id, it is missing", 202, {"x": 1}),
    "202 with an empty id": unreadable(r"at \$.data.task_id", 202, {"data": {"task_id": ""}}),
    "202 with a number as id": unreadable(r"at \$.data.task_id", 202, {"data": {"task_id": 12}}),
    "202 that is not JSON": unreadable("status 202", 202, body=b"x"),
    "201": Case(answer(201, body=GOOD), ServerError, "status 201", body=GOOD, ambiguous=True),
    "204": Case(answer(204), ServerError, "status 204", body=b"", ambiguous=True),
    "304": Case(answer(304), ServerError, "status 304"),
    "502 with HTML": Case(
        answer(502, body=HTML, headers={"Content-Type": "text/html"}),
        ServerError,
        "502 '<html>",
        calls=3,
        body=HTML,
        ambiguous=True,
    ),
    "503 empty": Case(answer(503), ServerError, "503", calls=3, body=b""),
    "400 with HTML": Case(answer(400, body=HTML), BadRequestError, "400 '<html>", body=HTML),
    "400 array": Case(answer(400, body=b"[1]"), BadRequestError, "400", body=b"[1]"),
    "400 with a null error": Case(answer(400, {"error": None}), BadRequestError, "400"),
    "400 with an odd error": Case(
        answer(400, {"error": {"message": {"a": 1}, "code": 5, "details": [1]}}),
        BadRequestError,
        "400",
    ),
    "413": Case(answer(413, body=b""), BadRequestError, "413"),
    "no answer at all": Case(
        hang_up(), TransportError, "connection was lost", calls=3, ambiguous=True
    ),
    "no HTTP": broken(b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "not valid HTTP"),
    "a body shorter than its length": broken(head(len(GOOD) + 10) + GOOD, "connection was lost"),
    "a length that is not a number": broken(
        head(None, b"Content-Length: many") + GOOD, "not valid HTTP"
    ),
    "chunks that break off": broken(
        head(None, b"Transfer-Encoding: chunked") + b'5\r\n{"dat\r\n', "connection was lost"
    ),
    "chunks that are none": broken(
        head(None, b"Transfer-Encoding: chunked") + b"zz\r\nhello\r\n", "not valid HTTP|lost"
    ),
    "gzip that is none": broken(
        head(len(GOOD), b"Content-Encoding: gzip") + GOOD, "not valid HTTP|lost"
    ),
    "a body longer than its length": broken(head(len(GOOD)) + GOOD + b"more", "not valid HTTP"),
}


@pytest.mark.parametrize("name", CASES)
async def test_an_odd_answer_is_a_clear_error(name: str) -> None:
    case = CASES[name]
    async with ScriptedServer(case.handler) as server, server.session(attempts=3) as session:
        async with asyncio.timeout(30):
            with pytest.raises(case.error, match=case.said) as caught:
                await session.analyze(Captioning(URL))
        stats = session.stats
        assert (stats.in_flight, stats.permits_in_use, stats.waiting) == (0, 0, 0)
    error = caught.value
    assert len(server.seen) == case.calls
    assert error.ambiguous is case.ambiguous
    if case.body is not None:
        assert error.raw_body == case.body  # type: ignore[attr-defined]
    assert len(str(error)) < 3 * SHOWN_BODY
    assert "\n" not in str(error)
    assert vars(pickle.loads(pickle.dumps(error))) == vars(error)
    assert SECRET not in "".join(traceback.format_exception(error))
    if isinstance(error, ApiError | TransportError):
        assert error.attempts == case.calls
    if isinstance(error, ApiError | ResponseDecodeError):
        assert error.model == "captioning"


async def test_a_truncated_compressed_body_is_an_analyze_error() -> None:
    data = head(20, b"Content-Encoding: gzip") + gzip.compress(GOOD)[:20]
    async with ScriptedServer(wire(data)) as server, server.session(attempts=1) as session:
        async with asyncio.timeout(30):
            with pytest.raises((ResponseDecodeError, TransportError)):
                await session.analyze(Captioning(URL))


async def test_chunked_compressed_and_unmeasured_answers_are_read() -> None:
    chunked = head(None, b"Transfer-Encoding: chunked") + b"".join(
        b"1\r\n%c\r\n" % byte for byte in GOOD
    )
    packed = gzip.compress(GOOD)
    for data in (
        chunked + b"0\r\n\r\n",
        head(len(packed), b"Content-Encoding: gzip") + packed,
        head(None) + GOOD,  # until the connection ends
    ):
        async with ScriptedServer(wire(data)) as server, server.session(attempts=1) as session:
            assert (await session.analyze(Captioning(URL))).analysis.caption == "A cat"


def padded(size: int) -> bytes:
    return b'{"data":{"analysis":{"data":{"caption":"' + b"a" * size + b'"}}}}'


async def stream_forever(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    try:
        while True:
            await response.write(b"a" * 65_536)
    except ConnectionError:  # the client hung up, as it should
        return response


PACKED = {"Content-Encoding": "gzip"}


@pytest.mark.parametrize(
    "handler",
    [
        answer(body=padded(200_000)),
        answer(body=gzip.compress(padded(5_000_000)), headers=PACKED),
        stream_forever,
        answer(500, body=b"a" * 200_000),
    ],
    ids=["long", "gzip bomb", "endless chunks", "long error"],
)
async def test_an_over_long_body_is_cut_off_and_not_paid_for_again(handler: Handler) -> None:
    async with (
        ScriptedServer(handler) as server,
        server.session(max_response_bytes=100_000) as session,
    ):
        async with asyncio.timeout(30):
            with pytest.raises(ResponseDecodeError, match="more than 100000 bytes") as caught:
                await session.analyze(Captioning(URL))
        assert len(caught.value.raw_body) <= 4096
        assert caught.value.model == "captioning"
        assert caught.value.ambiguous
        assert session.stats.ambiguous_failures == 1
        assert len(server.seen) == 1
        await until(lambda: server.in_flight == 0)
        server.handler = CAPTION
        await session.analyze(Captioning(URL))  # the session goes on


def has_unread_data(session: AnalyzeSession) -> bool:
    """Whether something arrived on an idle connection of a session."""
    private: Any = session
    pools = private._connection.caller.transport._http.connector._conns.values()
    return any(protocol.should_close for pool in pools for protocol, _ in pool)


@pytest.mark.parametrize("status", [b"200 OK", b"408 Request Timeout", b"503 Unavailable"])
async def test_an_unasked_response_answers_no_request(status: bytes) -> None:
    """It arrives while the connection is idle, and without `Connection: close`."""
    transports: list[Any] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        transports.append(request.transport)
        caption = (await request.json())["source"]["uri"]
        return web.json_response({"data": {"analysis": {"data": {"caption": caption}}}})

    async with ScriptedServer(handle) as server:
        async with server.session(retry_ambiguous=False) as session:
            for number in range(4):
                url = f"{URL}{number}"
                assert (await session.analyze(Captioning(url))).analysis.caption == url
                transports[-1].write(head(len(GOOD), status=status) + GOOD)
                await until(lambda: has_unread_data(session))
        assert len(server.seen) == 4
        assert session.stats.retries == 3


@pytest.mark.parametrize("body", [b"a" * 200_000, b"{", b"[]"])
async def test_an_unreadable_status_was_not_charged(body: bytes) -> None:
    async with ScriptedServer(answer(body=body)) as server:
        async with server.session(max_response_bytes=100_000) as session:
            with pytest.raises(ResponseDecodeError) as caught:
                await session.task_status("t")
    assert not caught.value.ambiguous
    assert caught.value.model is None


async def test_a_bomb_over_the_default_limit_is_not_paid_for_again() -> None:
    """64 MiB in 64 KiB: over the limit of the session, and over the HTTP library's own."""
    bomb = gzip.compress(padded(64 * 2**20), compresslevel=1)
    async with (
        ScriptedServer(answer(body=bomb, headers=PACKED)) as server,
        server.session() as session,
    ):
        async with asyncio.timeout(30):
            with pytest.raises(ResponseDecodeError, match="more than"):
                await session.analyze(Captioning(URL))
        assert len(server.seen) == 1


async def test_the_limit_is_inclusive() -> None:
    body = padded(1000)
    async with ScriptedServer(answer(body=body)) as server:
        async with server.session(max_response_bytes=len(body)) as session:
            await session.analyze(Captioning(URL))
        async with server.session(max_response_bytes=len(body) - 1) as session:
            with pytest.raises(ResponseDecodeError):
                await session.analyze(Captioning(URL))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed_so_no_secret_goes_elsewhere(status: int) -> None:
    async with (
        ScriptedServer(CAPTION) as elsewhere,
        ScriptedServer(answer(status, headers={"Location": elsewhere.url})) as server,
        server.session() as session,
    ):
        with pytest.raises(ServerError, match="Redirects are never followed") as caught:
            await session.analyze(Captioning(URL))
        assert caught.value.status == status
        assert (len(server.seen), len(elsewhere.seen)) == (1, 0)


async def test_a_silent_server_times_out_and_says_it_may_have_been_charged() -> None:
    async with (
        ScriptedServer(never_answer) as server,
        server.session(read_timeout=0.5, attempts=2) as session,
        asyncio.timeout(10),
    ):
        with pytest.raises(AttemptTimeoutError, match=r"0.5 s \(Settings.read_timeout\)") as caught:
            await session.analyze(Captioning(URL))
    assert (caught.value.attempts, caught.value.ambiguous) == (2, True)
    assert len(server.seen) == 2


async def test_each_attempt_in_flight_has_its_read_timeout() -> None:
    async def silent(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(30)
        return web.Response()

    async with (
        ScriptedServer(silent) as server,
        server.session(read_timeout=0.2, attempts=1) as session,
        asyncio.timeout(10),
    ):
        calls = []
        for number in range(3):
            calls.append(asyncio.create_task(session.analyze(Captioning(f"{URL}?{number}"))))
            await asyncio.sleep(0.05)
        ends = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(end) for end in ends] == [AttemptTimeoutError] * 3


async def test_a_refused_connection_is_not_ambiguous() -> None:
    async with ScriptedServer(CAPTION) as server:
        session = server.session(attempts=2)
    async with session:
        with pytest.raises(TransportError, match="nothing was sent") as caught:
            await session.analyze(Captioning(URL))
    assert (caught.value.attempts, caught.value.ambiguous) == (2, False)


async def test_a_good_response_of_odd_shape_is_kept_whole() -> None:
    content: dict[str, Any] = {
        "data": {"analysis": {"tags": {"a": 5}, "x": [1]}, "y": 1},
        "limits": None,
        "z": {"a": None},
    }
    async with ScriptedServer(answer(content=content)) as server, server.session() as session:
        response = await session.analyze(Coco(URL))
    assert response.raw == content
    assert (response.entity, response.request_id, response.limits) == (None, None, ())
