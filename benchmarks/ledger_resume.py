"""Resuming a run of a million items of which the last few are not done.

Measures the seconds from the start to the first new call, and the most memory held, in a process
of its own; the items are skipped as a run does it: each line is read, its key is made and looked
up beside the items of the run before. Standalone: ``python -m benchmarks.ledger_resume``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final

CLOUD: Final = "emulator-demo"
LEFT: Final = 20
MODEL: Final = "captioning"


def _build_line(number: int) -> str:
    return f"https://res.cloudinary.com/demo/image/upload/v1700000000/shop/{number:07d}.jpg"


def prepare(directory: Path, items: int, base_url: str) -> None:
    """Write the input and the ledger of a run that was killed shortly before its end."""
    from benchmarks.payloads import ANSWERS
    from cloudinary_analyze import Captioning, Uri
    from cloudinary_analyze._ledgered import KeyMaker
    from cloudinary_analyze.bulk.ledger_file import ANSWERED, create

    (directory / "input.txt").write_text("".join(f"{_build_line(n)}\n" for n in range(items)))
    path = directory / "run.ledger"
    create(path, base_url, CLOUD)
    make_key = KeyMaker(Captioning(_build_line(0))).make
    answer = ANSWERS[MODEL]

    def build_rows() -> Iterator[tuple[Any, ...]]:
        for number in range(items):
            source = _build_line(number)
            yield number, number + 1, source, MODEL, bytes.fromhex(make_key(Uri(source)))

    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_size = -262144")
        connection.execute("BEGIN")
        connection.executemany(
            "INSERT INTO items (position, line, source, model, key) VALUES (?, ?, ?, ?, ?)",
            build_rows(),
        )
        connection.executemany(
            "INSERT INTO answers (id, content) VALUES (?, ?)",
            ((number, answer) for number in range(items - LEFT)),
        )
        connection.execute(
            "INSERT INTO records (key, state, seconds, answer) "
            "SELECT key, ?, 0.5, position FROM items WHERE position < ? ORDER BY key",
            (ANSWERED, items - LEFT),
        )
        connection.execute("COMMIT")


async def resume(directory: Path, url: str, begun: float) -> None:
    """Run again, as after a kill, until everything is done."""
    from cloudinary_analyze import AnalyzeSession, Captioning, Credentials
    from cloudinary_analyze._ledgered import KeyMaker
    from cloudinary_analyze.bulk.input import InputLine, read_input
    from cloudinary_analyze.bulk.sqlite import SQLiteLedger

    first: float | None = None
    sent = 0

    def build_request(line: InputLine) -> Captioning:
        nonlocal first, sent
        first = first or time.time()
        sent += 1
        assert line.source is not None
        return Captioning(line.source)

    def find_undone(ledger: SQLiteLedger) -> Iterator[InputLine]:
        make_key = KeyMaker(Captioning(_build_line(0))).make
        with (directory / "input.txt").open("rb") as stream, ledger.earlier_items() as earlier:
            for index, line in enumerate(read_input(stream, input_format="text")):
                assert line.source is not None
                if not earlier.is_done(index, make_key(line.source)):
                    yield line

    async with (
        SQLiteLedger(directory / "run.ledger") as ledger,
        AnalyzeSession(Credentials.from_url(url)) as session,
    ):
        async with session.map(find_undone(ledger), build_request, ledger=ledger) as outcomes:
            async for outcome in outcomes:
                outcome.unwrap()
    assert first is not None
    assert sent == LEFT
    print(json.dumps({"seconds": first - begun, "MiB": _read_peak_memory()}))


def _read_peak_memory() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise AssertionError


async def _measure(items: int) -> dict[str, Any]:
    from cloudinary_analyze.emulator import Emulator

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        async with Emulator(cloud_name=CLOUD) as emulator:
            preparing = time.perf_counter()
            await asyncio.to_thread(prepare, directory, items, emulator.url)
            preparing = time.perf_counter() - preparing
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "benchmarks.ledger_resume",
                "--resume",
                name,
                "--url",
                emulator.cloudinary_url,
                "--begun",
                str(time.time()),
                stdout=subprocess.PIPE,
                cwd=Path(__file__).parent.parent,
            )
            output, _ = await process.communicate()
        assert process.returncode == 0
        size = (directory / "run.ledger").stat().st_size / 2**20
    measured = json.loads(output)
    return {
        "items": items,
        "undone": LEFT,
        "ledger MiB": round(size, 1),
        "seconds to the first new call": round(measured["seconds"], 2),
        "peak memory MiB": round(measured["MiB"], 1),
        "targets": {"seconds": 10, "MiB": 150},
        "seconds of preparation": round(preparing, 1),
    }


def main() -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--resume", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--begun", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.resume is not None:
        asyncio.run(resume(arguments.resume, arguments.url, arguments.begun))
    else:
        print(json.dumps(asyncio.run(_measure(arguments.items)), indent=2))


if __name__ == "__main__":
    main()
