"""The cell of resuming a run of a million items, all but the last few of them done.

Runs the command as a user does. Measures the seconds until its first new call reaches the service,
and its peak memory until then.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from benchmarks.memory import read_peak_memory
from benchmarks.model import OURS, Cell, Job, Place, Sample, Samples, Target
from benchmarks.payloads import (
    ANSWERS,
    CLOUD,
    build_cloudinary_url,
    build_image_url,
    write_urls,
)

LEFT: Final = 20
MODEL: Final = "captioning"
INPUT: Final = "input.txt"
LEDGER: Final = "killed.ledger"
PEAK: Final = "peak memory MiB"


@contextlib.contextmanager
def prepare(items: int) -> Iterator[Place]:
    """Give the input and the ledger of a run that was killed shortly before its end."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_urls(directory / INPUT, items)
        _write_ledger(directory / LEDGER, items)
        yield Place(directory=name)


def _write_ledger(path: Path, items: int) -> None:
    from cloudinary_analyze import Captioning, Uri
    from cloudinary_analyze.ledger.file import ANSWERED, create
    from cloudinary_analyze.ledger.items import write_item
    from cloudinary_analyze.ledger.writer import write_answer
    from cloudinary_analyze.requests import KeyBuilder

    make_key = KeyBuilder(Captioning(build_image_url(0))).build
    create(path, "", CLOUD)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN")
        for number in range(items):
            source = build_image_url(number)
            key = bytes.fromhex(make_key(Uri(source)))
            write_item(
                connection,
                number,
                (number + 1, source, MODEL, key, None, None, None, None),
            )
            if number < items - LEFT:
                write_answer(connection, key, ANSWERED, ANSWERS[MODEL], seconds=0.5, recorded=0.0)
        connection.execute("COMMIT")


async def _resume(directory: Path) -> tuple[float, float]:
    """Resume in a directory; return the seconds to the first call, and the MiB held until then."""
    called: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        if not called.done():
            called.set_result(time.perf_counter())
        await reader.read()  # the call never gets a response
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = "http://{}:{}".format(*server.sockets[0].getsockname())
    ledger = directory / "results.jsonl.ledger"
    shutil.copyfile(directory.parent / LEDGER, ledger)
    with closing(sqlite3.connect(ledger)) as connection, connection:
        connection.execute("UPDATE owner SET base_url = ?", (url,))
    begun = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cloudinary_analyze", "run", MODEL),
        *("--input", str(directory.parent / INPUT), "--output", "results.jsonl"),
        cwd=directory,
        env=os.environ | {"CLOUDINARY_URL": build_cloudinary_url(url)},
        stderr=asyncio.subprocess.DEVNULL,
    )
    ended = asyncio.create_task(process.wait())
    try:
        either: set[asyncio.Future[Any]] = {called, ended}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        assert called.done(), f"the command ended with {process.returncode}"
        return called.result() - begun, read_peak_memory(process.pid)
    finally:
        if not ended.done():
            process.kill()
        await ended
        server.close()


def _measure(job: Job) -> Samples:
    with tempfile.TemporaryDirectory(dir=job.directory) as name:
        seconds, peak = asyncio.run(_resume(Path(name)))
    size = (Path(job.directory) / LEDGER).stat().st_size / 2**20
    yield Sample(value=seconds, notes={PEAK: peak, "items": job.items, "ledger MiB": size})


CELLS: Final = (
    Cell(
        name="resume",
        unit="s to the first new call",
        contenders={OURS: _measure},
        baseline=OURS,
        targets=(
            Target(figure="value", most=10),
            Target(figure="note", most=150, note=PEAK),
        ),
        prepare=prepare,
    ),
)
