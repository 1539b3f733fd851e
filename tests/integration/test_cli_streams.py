"""A faulty terminal or pipe never stops the work, and outside text never controls a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from cli_support import (
    COMMAND,
    PATIENCE,
    build_urls,
    end,
    read_records,
    read_terminal,
    see,
    start,
    until,
    write_lines,
    write_urls,
)
from notification_support import build_answer, sign
from rich.table import Table
from rich.text import Text
from scripted import ScriptedServer, answer

from cloudinary_analyze.cli.outlet import MessageStream, Outlet, escape_controls
from cloudinary_analyze.cli.screen import build_console, encode_json, say
from cloudinary_analyze.emulator import Emulator
from cloudinary_analyze.ledger.sqlite import SQLiteLedger

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pipes and signals of POSIX")

RUN = ("run", "coco", "--input", "urls.txt")


@contextlib.asynccontextmanager
async def open_unread_pipe() -> AsyncIterator[int]:
    reader, writer = os.pipe()
    try:
        yield writer
    finally:
        os.close(reader)
        os.close(writer)


async def test_a_reader_of_messages_that_goes_away_stops_nothing(tmp_path: Path):
    write_lines(*build_urls(150), "bad", *build_urls(300), name=str(tmp_path / "urls.txt"))
    reader, writer = os.pipe()
    async with Emulator(latency=0.02) as emulator:
        async with start(*RUN, folder=tmp_path, emulator=emulator, stderr=writer) as process:
            os.close(writer)
            await until(lambda: emulator.counts.total_done > 30)
            os.close(reader)
            assert (await end(process))[0] == 1
    assert len(read_records(tmp_path / "results.jsonl")) == 451


async def test_messages_that_are_never_read_stop_nothing(tmp_path: Path):
    """The pipe of stderr is full from the beginning."""
    write_lines(*build_urls(40), *["bad"] * 20, name=str(tmp_path / "urls.txt"))
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writer, b"x" * 4096):
            pass
    os.set_blocking(writer, True)
    try:
        async with (
            Emulator() as emulator,
            start(*RUN, folder=tmp_path, emulator=emulator, stderr=writer) as process,
        ):
            assert (await end(process))[0] == 1
    finally:
        os.close(reader)
        os.close(writer)
    assert len(read_records(tmp_path / "results.jsonl")) == 60


@pytest.mark.parametrize(
    "closed", ["2>&-", "0<&- 2>&-", ">&- 2>&-", "0<&- >&- 2>&-", "2>/dev/full"]
)
async def test_closed_and_full_streams_stop_nothing(tmp_path: Path, closed: str):
    write_lines(*build_urls(3), "bad", name=str(tmp_path / "urls.txt"))
    async with Emulator() as emulator:
        command = " ".join([*COMMAND, *RUN, closed])
        process = await asyncio.create_subprocess_shell(
            command,
            cwd=tmp_path,
            env={**os.environ, "CLOUDINARY_URL": emulator.cloudinary_url},
        )
        async with asyncio.timeout(PATIENCE):
            assert await process.wait() == 1
    assert len(read_records(tmp_path / "results.jsonl")) == 4
    # no message was written into the ledger, which got a descriptor that was free
    assert len(list(SQLiteLedger(tmp_path / "results.jsonl.ledger").iter_items())) == 4


@pytest.mark.parametrize(
    "arguments",
    [(*RUN, "--output", "-"), ("analyze", "coco", build_urls(1)[0]), ("status", "x"), ("listen",)],
    ids=lambda arguments: arguments[0],
)
async def test_a_run_without_a_place_for_results_is_refused(
    tmp_path: Path, arguments: tuple[str, ...]
):
    write_urls(tmp_path, 2)
    async with Emulator() as emulator:
        process = await asyncio.create_subprocess_shell(
            " ".join([*COMMAND, *arguments, ">&-"]),
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            env={**os.environ, "CLOUDINARY_URL": emulator.cloudinary_url},
        )
        async with asyncio.timeout(PATIENCE):
            _, err = await process.communicate()
        assert process.returncode == 2
        assert b"closed" in err
        assert emulator.counts.total_received == 0


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-16"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("analyze", "captioning", "https://example.com/猫.jpg"),
        ("models",),
        ("run", "--help"),
        ("--help",),
        ("run", "captioning", "--input", "urls.txt"),
        ("run", "captioning", "--input", "urls.txt", "-o", "-"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_no_encoding_breaks_a_command(tmp_path: Path, arguments: tuple[str, ...], encoding: str):
    write_lines("https://example.com/猫.jpg", "猫 \U0001f408", name=str(tmp_path / "urls.txt"))
    if arguments[0] in {"analyze", "run"} and "--help" not in arguments:
        arguments = (*arguments, "--emulator")
    done = subprocess.run(
        [*COMMAND, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        timeout=PATIENCE,
    )
    assert b"Traceback" not in done.stderr
    assert done.returncode == (1 if "--input" in arguments else 0)
    if arguments[0] == "analyze":
        assert json.loads(done.stdout.decode(encoding))["data"]


@pytest.mark.parametrize(
    "arguments", [("models",), ("analyze", "coco", build_urls(1)[0], "--emulator")]
)
@pytest.mark.parametrize("stdout", ["/dev/full", "closed reader"])
def test_a_result_that_cannot_be_shown_is_reported(arguments: tuple[str, ...], stdout: str):
    if stdout == "closed reader":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(stdout, os.O_WRONLY)
    try:
        done = subprocess.run(
            [*COMMAND, *arguments], stdout=writer, stderr=subprocess.PIPE, timeout=PATIENCE
        )
    finally:
        os.close(writer)
    assert done.returncode == 3
    err = done.stderr.decode()
    assert "Standard output could not be" in err or "Standard output was closed" in err
    assert "Traceback" not in err
    assert "Exception ignored" not in err


@pytest.mark.slow
async def test_an_output_that_is_not_read_slows_down_and_can_be_aborted(tmp_path: Path):
    write_urls(tmp_path, 5000)
    async with (
        Emulator() as emulator,
        open_unread_pipe() as writer,
        start(*RUN, "-o", "-", folder=tmp_path, emulator=emulator, stdout=writer) as process,
    ):
        counts = [-1]
        while counts[-1] != emulator.counts.total_done or counts[-1] < 100:
            counts.append(emulator.counts.total_done)
            await asyncio.sleep(0.5)
        assert counts[-1] < 5000
        process.send_signal(signal.SIGINT)
        await see(process, "A second interrupt aborts")
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(PATIENCE):
            assert await process.wait() == 130


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
async def test_each_signal_lets_calls_in_flight_finish(tmp_path: Path, number: signal.Signals):
    write_urls(tmp_path, 500)
    release = asyncio.Event()

    async def hold(request: web.Request) -> web.StreamResponse:
        await release.wait()
        return await answer(sample="coco")(request)

    async with (
        ScriptedServer(hold) as server,
        start(*RUN, "--permits", "8", folder=tmp_path, emulator=server) as process,
    ):
        await until(lambda: server.in_flight == 8)
        process.send_signal(number)
        await see(process, "A second interrupt aborts")
        release.set()
        code, _, err = await end(process)
        assert code == 130, err
        assert len(server.seen) == 8
        assert "8 items are answered, 492 left" in err
    assert len(read_records(tmp_path / "results.jsonl")) == 8


async def test_a_closed_terminal_lets_the_run_finish(tmp_path: Path):
    write_urls(tmp_path, 500)
    ours, theirs = pty.openpty()
    async with Emulator(latency=0.3) as emulator:
        process = subprocess.Popen(
            [*COMMAND, *RUN, "--permits", "4"],
            cwd=tmp_path,
            env={**os.environ, "CLOUDINARY_URL": emulator.cloudinary_url, "TERM": "xterm"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509
        )
        os.close(theirs)
        try:
            await until(lambda: emulator.counts.total_done >= 8)
            os.close(ours)  # the kernel sends SIGHUP; writes fail from now on
            async with asyncio.timeout(PATIENCE):
                assert await asyncio.to_thread(process.wait) == 130
        finally:
            process.kill()
            process.wait()
        done = emulator.counts.total_done
    assert len(read_records(tmp_path / "results.jsonl")) == done < 500


@pytest.mark.parametrize(("first", "second"), [("INT", "TERM"), ("TERM", "TERM"), ("TERM", "HUP")])
async def test_a_second_request_to_end_ends_at_once(tmp_path: Path, first: str, second: str):
    write_urls(tmp_path, 100)
    async with (
        Emulator(latency=300) as emulator,
        start(*RUN, "--summary-json", "s.json", folder=tmp_path, emulator=emulator) as process,
    ):
        await until(lambda: emulator.counts.total_received >= 64)
        process.send_signal(signal.Signals[f"SIG{first}"])
        await see(process, "A second interrupt aborts")
        process.send_signal(signal.Signals[f"SIG{second}"])
        code, _, err = await end(process)
    assert code == 130
    assert "Traceback" not in err
    summary = json.loads((tmp_path / "s.json").read_text())
    # what the ledger holds was not counted
    assert [summary[name] for name in ("items", "answered", "left", "units")] == [100, *[None] * 3]


@contextlib.contextmanager
def ignoring(number: signal.Signals) -> Iterator[None]:
    """Ignore a signal in the processes that are started in the block."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
async def test_a_signal_ignored_at_the_start_stays_ignored(tmp_path: Path, number: signal.Signals):
    """As SIGHUP is under ``nohup``, and SIGINT in a background job of a script."""
    write_urls(tmp_path, 60)
    async with contextlib.AsyncExitStack() as stack:
        emulator = await stack.enter_async_context(Emulator(latency=0.05))
        running = start(*RUN, "--permits", "2", folder=tmp_path, emulator=emulator)
        with ignoring(number):
            process = await stack.enter_async_context(running)
        await until(lambda: emulator.counts.total_received >= 4)
        process.send_signal(number)
        code, _, err = await end(process)
    assert code == 0, err
    assert len(read_records(tmp_path / "results.jsonl")) == 60


@pytest.mark.slow
@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("seconds", [0, 0.3, 2])
async def test_an_interrupt_while_the_input_is_read_sends_nothing(tmp_path: Path, seconds: float):
    """This includes an interrupt before the signal handlers are installed."""
    write_urls(tmp_path, 1_500_000)
    async with (
        Emulator() as emulator,
        start(*RUN, folder=tmp_path, emulator=emulator) as process,
    ):
        await until((tmp_path / "results.jsonl.ledger").exists)
        await asyncio.sleep(seconds)
        process.send_signal(signal.SIGINT)
        begun = time.monotonic()
        code, _, err = await end(process)
        assert (code, emulator.counts.total_received) == (130, 0)
        assert "Interrupted" in err
        assert "Traceback" not in err
        assert time.monotonic() - begun < 8
    assert not list(SQLiteLedger(tmp_path / "results.jsonl.ledger").iter_items())


# listen


async def post_answers(url: str, count: int, size: int) -> list[int]:
    """Deliver genuine notifications one after the other; return the statuses."""
    statuses = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(PATIENCE)) as http:
        for number in range(count):
            body = json.loads(build_answer(f"task-{number}"))
            body["padding"] = "x" * size
            raw = json.dumps(body).encode()
            async with http.post(url, data=raw, headers=sign(raw, at=time.time())) as response:
                statuses.append(response.status)
    return statuses


async def test_listen_answers_others_while_its_output_is_not_read(tmp_path: Path):
    async with (
        Emulator() as emulator,
        start("listen", "--port", "0", folder=tmp_path, emulator=emulator) as process,
    ):
        output = await see(process, "Ctrl-C ends it")
        url = re.search(r"http://\S+/", output)
        assert url
        # more than fits into the pipe, so the sender waits for its response
        waiting = asyncio.create_task(post_answers(url[0], 40, 8000))
        await asyncio.sleep(1)
        assert not waiting.done()
        async with aiohttp.ClientSession() as http, http.get(f"{url[0]}other") as response:
            assert response.status == 404
        assert process.stdout is not None
        lines = [json.loads(await process.stdout.readline()) for _ in range(40)]
        assert await waiting == [200] * 40
        assert [line["task_id"] for line in lines] == [f"task-{n}" for n in range(40)]
        process.send_signal(signal.SIGINT)
        assert (await end(process))[0] == 0


async def test_listen_can_be_ended_while_its_output_is_not_read(tmp_path: Path):
    async with (
        Emulator() as emulator,
        open_unread_pipe() as writer,
        start(
            "listen", "--port", "0", folder=tmp_path, emulator=emulator, stdout=writer
        ) as process,
    ):
        output = await see(process, "Ctrl-C ends it")
        url = re.search(r"http://\S+/", output)
        assert url
        waiting = asyncio.create_task(post_answers(url[0], 40, 8000))
        await asyncio.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE):
            assert await process.wait() == 0
        await asyncio.wait({waiting})
        waiting.exception()


@pytest.mark.slow
@pytest.mark.parametrize(
    "sent", [b"", b"POST / HTTP/1.1\r\nHost: x\r\n", b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n"]
)
async def test_idle_connections_are_closed(tmp_path: Path, sent: bytes):
    async with (
        Emulator() as emulator,
        start("listen", "--port", "0", folder=tmp_path, emulator=emulator) as process,
    ):
        told = await see(process, "Ctrl-C ends it")
        port = re.search(r":(\d+)/", told)
        assert port
        connections = [await asyncio.open_connection("127.0.0.1", port[1]) for _ in range(100)]
        for _, writer in connections:
            writer.write(sent)
        async with asyncio.timeout(PATIENCE):
            for reader, _ in connections:
                await reader.read()  # to its end
        for _, writer in connections:
            writer.close()
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 0


# control characters

WILD = "\x1b]0;PWNED\x07\x1b[2J\x9b2J\x85\u202egpj.exe\u2066\x00\r\x7f"


def contains_control(text: str) -> bool:
    return bool(
        re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]", text)
    )


def test_nothing_that_is_printed_controls_the_terminal():
    shown = io.StringIO()
    console = build_console(shown)
    say(console, f"a {WILD} b", style="bold")
    table = Table(WILD)
    table.add_row(Text(WILD), WILD)
    console.print(table, Text(WILD))
    assert not contains_control(shown.getvalue())
    assert "PWNED" in shown.getvalue()


def test_escaped_json_is_still_json():
    value = {"caption": WILD, "n": [1, None]}
    assert json.loads(escape_controls(encode_json(value))) == value


@contextlib.contextmanager
def open_terminal() -> Iterator[tuple[int, int]]:
    ours, theirs = pty.openpty()
    try:
        yield ours, theirs
    finally:
        with contextlib.suppress(OSError):
            os.close(theirs)
        os.close(ours)


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "captioning", "--input", "urls.txt", "--emulator"),
        ("run", "captioning", "--input", "urls.txt", "--emulator", "-o", "-"),
        ("run", WILD.replace("\0", ""), "--emulator"),
        ("run", "captioning", "--input", WILD.replace("\0", "")),
        ("analyze", "captioning", f"https://example.com/{WILD}".replace("\0", "")),
        ("export", WILD.replace("\0", ""), "-o", "x"),
        ("report", WILD.replace("\0", "")),
    ],
    ids=range(7),
)
def test_no_command_prints_controls_of_its_input(tmp_path: Path, arguments: tuple[str, ...]):
    wild = WILD.replace("\0", "").replace("\r", "")
    lines = [f"https://example.com/{wild}", wild, "https://example.com/a\u202eb"]
    write_lines(*lines, name=str(tmp_path / "urls.txt"))
    with open_terminal() as (ours, theirs):
        process = subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=tmp_path,
            env={**os.environ, "TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "200"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        shown = read_terminal(ours).replace("\r\n", "\n")
        process.wait(PATIENCE)
    assert "PWNED" in shown
    assert not contains_control(shown)


# the parts


def test_an_outlet_writes_in_order_until_it_is_closed():
    reader, writer = os.pipe()
    outlet = Outlet(writer)
    for number in range(100):
        outlet.put(f"{number}\n".encode())
    outlet.close()
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as stream:
        assert stream.read().split() == [str(number) for number in range(100)]


async def test_an_outlet_survives_a_stream_that_does_not_block():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    outlet = Outlet(writer)
    writing = asyncio.create_task(outlet.write(b"x" * 1_000_000))
    got = 0
    while got < 1_000_000:
        got += len(await asyncio.to_thread(os.read, reader, 65536))
    await writing
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        await outlet.write(b"y")
    with pytest.raises(BrokenPipeError):  # nor is anything written later
        await outlet.write(b"z")
    os.close(writer)


def test_an_outlet_bounds_what_waits():
    reader, writer = os.pipe()
    outlet = Outlet(writer)
    for _ in range(20_000):
        outlet.put(b"x" * 1000)
    assert outlet._queue.qsize() <= 1001
    begun = time.monotonic()
    outlet.close(0.2)
    assert time.monotonic() - begun < 30
    os.close(reader)
    os.close(writer)


def test_a_message_stream_without_a_stream_drops_all():
    stream: Any = MessageStream(None)
    assert stream.write("x") == 1
    assert not stream.isatty()
    stream.flush()
    stream.finish()
    with pytest.raises(OSError, match="fileno"):
        stream.fileno()
