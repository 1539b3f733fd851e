"""Messages and log lines escape what a hostile server, sender or file name contains."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import pty
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_support import COMMAND, end, see, start, write_lines
from notification_support import CREDENTIALS, build_delivery, sign
from scripted import KEY, SECRET, URL, Handler, ScriptedServer, answer, wire

from cloudinary_analyze import (
    AnalyzeError,
    AnalyzeSession,
    Captioning,
    Delivery,
    Settings,
)
from cloudinary_analyze.emulator import Emulator
from cloudinary_analyze.ledger.sqlite import SQLiteLedger
from cloudinary_analyze.notifications import QueueSource
from cloudinary_analyze.notifications.forwarding import forward
from cloudinary_analyze.notifications.receiver import Intake
from cloudinary_analyze.webhooks import seal_delivery

WILD = "\x1b]0;PWNED\x07\x1b[2J\x9b2J\x85\u202egpj\u2066\r\nFORGED line\x7f\u2028" + "x" * 3000
LONGEST = 1500  # characters of a message


def is_clean(text: str) -> bool:
    return text.isprintable() and len(text) <= LONGEST


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """Collect what our loggers say, as a plain handler formats it."""
    kept: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            kept.append(self.format(record))

    handler = Keep(logging.DEBUG)
    logger = logging.getLogger("cloudinary_analyze")
    logger.addHandler(handler)
    yield kept
    logger.removeHandler(handler)


def build_error(**more: Any) -> dict[str, Any]:
    error = {"message": WILD, "code": WILD, "category": WILD, "details": {WILD: [WILD]}}
    return {"error": error, "request_id": WILD, **more}


LIMITS = {"limits": [{"type": WILD, "limit": 1, "remaining": 0, "reset_time": WILD}]}
HOSTILE: dict[str, Handler] = {
    **{f"error {status}": answer(status, build_error()) for status in (400, 401, 403, 404, 500)},
    "quota": answer(429, build_error(**LIMITS)),
    "a string": answer(400, {"error": WILD, "request_id": WILD}),
    "text": answer(400, body=WILD.encode()),
    "html": answer(502, body=b"<html>" + WILD.encode()),
    "unreadable 200": answer(200, {"data": {"analysis": WILD}, "request_id": WILD, "entity": WILD}),
    "text 200": answer(200, body=WILD.encode()),
    "no task": answer(202, {"data": {"task_id": 1}, "request_id": WILD}),
    "reason": wire(b"HTTP/1.1 500 \x1b[2J\x9b PWNED\r\nContent-Length: 0\r\n\r\n"),
    "request id": wire(
        b"HTTP/1.1 400 Bad\r\nX-Request-Id: \xc2\x9b2J\xe2\x80\xae\r\nContent-Length: 0\r\n\r\n"
    ),
    "not HTTP": wire(b"\x1b]0;PWNED\x07\x9b\r\n\r\n"),
    "encoding": wire(b"HTTP/1.1 200 \r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\n\x1b[2"),
    "header": wire(b"HTTP/1.1 200 OK\r\nX-\x1b[2J: \x9b\r\n\r\n"),
    "redirect": answer(302, headers={"Location": "http://127.0.0.1:1/%1b[2J"}),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_server_controls_no_terminal(name: str, lines: list[str]) -> None:
    errors: list[AnalyzeError] = []
    async with ScriptedServer(HOSTILE[name]) as server:
        async with server.session(attempts=2, poll_first=0.01) as session:
            for attempt in (
                session.analyze(Captioning(URL)),
                session.task_status("t1"),
                session.submit(Captioning(URL), mode="call", timeout=5),
            ):
                with pytest.raises(AnalyzeError) as caught:
                    await attempt
                errors.append(caught.value)
                logging.getLogger("cloudinary_analyze").warning("failed: %s", caught.value)
    for error in errors:
        assert is_clean(str(error)), str(error)
    assert all(map(is_clean, lines)), lines


def fail_a_task(**content: Any) -> Delivery:
    body = {"task_id": "t1", "notification_type": WILD, "request_id": WILD, **content}
    raw, now = json.dumps(body).encode(), time.time()
    return Delivery(raw, sign(raw, at=now), received_at=now)


@pytest.mark.parametrize(
    "content",
    [
        build_error(status="failed"),
        {"data": build_error(), "status": "failed"},
        {"status": "failed", "error": WILD},
        {"status": WILD, "data": {"analysis": WILD}},
        {"data": {WILD: WILD}},
    ],
)
async def test_a_signed_notification_controls_no_terminal(
    content: dict[str, Any], lines: list[str]
) -> None:
    accepted = answer(202, {"data": {"task_id": "t1", "status": WILD}, "request_id": WILD})
    inbox: asyncio.Queue[Delivery] = asyncio.Queue()
    async with ScriptedServer(accepted) as server:
        async with server.session(credentials=CREDENTIALS, notifications=inbox) as session:
            task = session.submit(Captioning(URL), timeout=0.5)
            await task.accepted()
            inbox.put_nowait(fail_a_task(**content))
            with pytest.raises(AnalyzeError) as caught:
                await task
    assert is_clean(str(caught.value)), str(caught.value)
    assert all(map(is_clean, lines)), lines


async def test_ids_of_strangers_are_escaped_in_logs(lines: list[str]) -> None:
    """Ids come from paths of requests, from bodies and from headers."""

    class Failing:
        async def put(self, delivery: Delivery, /) -> None:
            raise RuntimeError(WILD)

    intake = Intake(Failing(), CREDENTIALS)
    signed = build_delivery(WILD)
    assert (await intake.take(signed.body, signed.headers)).status == 503
    forged = {**signed.headers, "X-Cld-Signature": WILD, "X-Cld-Timestamp": WILD}
    assert is_clean((await intake.take(signed.body, forged)).text)
    unknown = answer(404, build_error())
    inbox: asyncio.Queue[Delivery] = asyncio.Queue()
    async with ScriptedServer(unknown) as server:
        async with server.session(credentials=CREDENTIALS, notifications=inbox) as session:
            inbox.put_nowait(signed)
            inbox.put_nowait(Delivery(WILD.encode(), {WILD: WILD}))
            inbox.put_nowait(Delivery(signed.body, forged))
            with pytest.raises(AnalyzeError) as caught:
                await session.task(WILD[:200], Captioning, timeout=0.3)
            assert is_clean(str(caught.value))
            with pytest.raises(AnalyzeError) as caught:
                await session.task_status(WILD[:200])
            assert is_clean(str(caught.value))
    assert lines
    assert all(map(is_clean, lines)), lines


async def test_forwarding_logs_no_controls(lines: list[str]) -> None:
    signed = build_delivery("t1")
    source: asyncio.Queue[Delivery] = asyncio.Queue()
    sink: asyncio.Queue[Delivery] = asyncio.Queue()
    source.put_nowait(Delivery(signed.body, {**signed.headers, "X-Cld-Timestamp": WILD}))
    source.put_nowait(Delivery(WILD.encode(), signed.headers))
    source.put_nowait(signed)
    task = asyncio.create_task(forward(QueueSource(source), sink, CREDENTIALS))
    async with asyncio.timeout(30):
        assert (await sink.get()).body == signed.body
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert all(map(is_clean, lines)), lines


async def test_names_of_ledgers_are_escaped(tmp_path: Path, lines: list[str]) -> None:
    path = tmp_path / f"{WILD[:60]}\x1b[2J.ledger".replace("\x00", "").replace("/", "")
    path.write_bytes(b"no ledger at all" * 300)
    with pytest.raises(AnalyzeError) as caught:
        async with SQLiteLedger(path) as ledger:
            await ledger.open(base_url="https://api.cloudinary.com", cloud_name="demo")
    assert is_clean(str(caught.value)), str(caught.value)
    assert all(map(is_clean, lines)), lines


def test_a_receivers_replies_quote_nothing() -> None:
    for headers in ({}, {"X-Cld-Signature": WILD, "X-Cld-Timestamp": WILD}):
        with pytest.raises(AnalyzeError) as caught:
            seal_delivery(Delivery(WILD.encode(), headers), CREDENTIALS)
        assert is_clean(str(caught.value))


def contains_control(text: str) -> bool:
    return not all(char.isprintable() or char in "\n\t" for char in text)


async def run_on_terminal(folder: Path, *arguments: str, **variables: str) -> str:
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if "CLOUDINARY" not in name}
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        *arguments,
        cwd=folder,
        env={**environment, "TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "200", **variables},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)

    def read() -> bytes:
        shown = b""
        while True:
            try:
                chunk = os.read(ours, 65_536)
            except OSError:  # Linux reports EIO at the end
                chunk = b""
            if not chunk:
                return shown
            shown += chunk

    reading = asyncio.create_task(asyncio.to_thread(read))
    try:
        shown = await asyncio.wait_for(asyncio.shield(reading), 50)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await reading
        os.close(ours)
    return shown.decode().replace("\r\n", "\n")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("error 400", "analyze captioning https://example.com/a.jpg"),
        ("unreadable 200", "analyze captioning https://example.com/a.jpg"),
        ("error 404", "status t1"),
        ("error 401", "run captioning --input urls.txt -o a.jsonl"),
        ("html", "run captioning --input urls.txt -o a.jsonl --attempts 1"),
    ],
)
async def test_the_command_line_escapes_a_hostile_server(
    tmp_path: Path, name: str, command: str
) -> None:
    write_lines(URL, name=str(tmp_path / "urls.txt"))
    async with ScriptedServer(HOSTILE[name]) as server:
        url = f"cloudinary://{KEY}:{SECRET}@demo?upload_prefix={server.url}"
        shown = await run_on_terminal(tmp_path, *command.split(), CLOUDINARY_URL=url)
    assert "PWNED" in shown
    assert not contains_control(shown), ascii(shown)
    assert SECRET not in shown


async def test_listen_escapes_what_senders_write(tmp_path: Path) -> None:
    async with Emulator() as emulator:
        async with start("listen", "--port", "0", folder=tmp_path, emulator=emulator) as process:
            address = (await see(process, "Ctrl-C ends it")).split("http://")[1].split("/")[0]
            port = int(address.rpartition(":")[2])
            for request in (
                b"POST /%1b%5d0;PWNED%07%c2%9b2J%0dFORGED HTTP/1.1\r\nHost: a\r\n\r\n",
                b"POST /%0d%0aFORGED HTTP/1.1\r\nHost: a\r\n\r\n",
                b"P\x1b[2J / HTTP/1.1\r\nHost: a\r\n\r\n",
                b"POST / HTTP/1.1\r\nHost: \x1b[2J\r\nX-Cld-Signature: \x1b[2J\r\n\r\n",
                b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: \x1b[2J\r\n\r\n",
            ):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(request)
                await asyncio.wait_for(reader.readline(), 30)
                writer.close()
            process.send_signal(2)
            code, out, err = await end(process)
    assert (code, out) == (0, "")
    assert "Refused with 404" in err
    assert "Traceback" not in err
    assert not contains_control(err), ascii(err)
    assert all(not line.startswith("FORGED") for line in err.splitlines())


def test_a_session_shows_no_controls_of_its_arguments() -> None:
    for build in (
        lambda: Settings(host=WILD),
        lambda: Settings(proxy=WILD),
        lambda: Settings(on_missing_result=WILD),  # type: ignore[arg-type]
        lambda: Captioning(WILD),
        lambda: AnalyzeSession(CREDENTIALS, notification_url=WILD),
    ):
        with pytest.raises(AnalyzeError) as caught:
            build()
        assert is_clean(str(caught.value)), str(caught.value)
