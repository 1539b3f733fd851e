"""Helpers for tests of the command line: processes, an emulator, and files."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from ports import reserve_port
from scripted import ScriptedServer

from cloudinary_analyze.emulator import Emulator

PATIENCE = (
    250.0  # seconds after which a slow test hangs; other tests have `timeout` of pyproject.toml
)
COMMAND = (sys.executable, "-m", "cloudinary_analyze")
StartEmulator = Callable[..., Emulator]


@pytest.fixture
def cli_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a separate folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


@pytest.fixture
def start_emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[StartEmulator]:
    """Start an emulator on a separate event loop, because commands run their own event loop.

    A second emulator replaces the first at the same address.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    running: list[Emulator] = []
    port = reserve_port()

    def stop() -> None:
        asyncio.run_coroutine_threadsafe(running.pop().stop(), loop).result(PATIENCE)

    def start(**options: Any) -> Emulator:
        if running:
            stop()
        emulator = Emulator(port=port, **options)
        asyncio.run_coroutine_threadsafe(emulator.start(), loop).result(PATIENCE)
        running.append(emulator)
        monkeypatch.setenv("CLOUDINARY_URL", emulator.cloudinary_url)
        return emulator

    yield start
    if running:
        stop()
    loop.call_soon_threadsafe(loop.stop)
    thread.join(PATIENCE)
    loop.close()


@asynccontextmanager
async def start(
    *arguments: str,
    folder: Path,
    emulator: Emulator | ScriptedServer | None = None,
    **options: Any,
) -> AsyncIterator[Process]:
    """Start the command line. Kill it if it still runs at the end of the block."""
    environment = {name: value for name, value in os.environ.items() if "CLOUDINARY" not in name}
    environment |= {"COLUMNS": "160", "TERM": "xterm"}
    if emulator is not None:
        environment["CLOUDINARY_URL"] = emulator.cloudinary_url
    streams = {"stdin": PIPE, "stdout": PIPE, "stderr": PIPE} | options
    process = await asyncio.create_subprocess_exec(
        *COMMAND, *arguments, cwd=folder, env=environment, **streams
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def see(process: Process, sentence: str) -> str:
    """Return stderr up to and including the line that contains a sentence."""
    assert process.stderr is not None
    output = ""
    async with asyncio.timeout(PATIENCE):
        while sentence not in output:
            line = await process.stderr.readline()
            assert line, f"missing {sentence!r} in: {output}"
            output += line.decode()
    return output


async def end(process: Process) -> tuple[int, str, str]:
    """Wait for a process to end, and return its exit code, stdout and stderr."""
    async with asyncio.timeout(PATIENCE):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, (out or b"").decode(), (err or b"").decode()


async def until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Wait until another thread or process makes a condition true."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def build_urls(count: int) -> list[str]:
    """Return different sources."""
    return [f"https://example.com/{number}.jpg" for number in range(1, count + 1)]


def write_urls(folder: Path, count: int) -> str:
    """Write ``urls.txt``."""
    return write_lines(*build_urls(count), name=str(folder / "urls.txt"))


def write_lines(*lines: str, name: str = "urls.txt") -> str:
    """Write a file of lines and return its name."""
    Path(name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return name


def read_records(path: str | Path = "results.jsonl") -> list[dict[str, Any]]:
    """Read results."""
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def read_terminal(descriptor: int, shown: bytes = b"") -> str:
    """Read a terminal until its last writer closes it, and return all, after what was read before."""
    while True:
        try:
            chunk = os.read(descriptor, 65536)
        except OSError:  # Linux raises EIO at the end
            chunk = b""
        if not chunk:
            return shown.decode()
        shown += chunk
