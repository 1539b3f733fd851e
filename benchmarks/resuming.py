"""The cell of resuming a run of a million items of which the last few are not done.

Measures the seconds from the start of the process to the first new call, and the most memory that
it ever held. The items are skipped as a run does it: each line is read, its key is made and looked
up beside the items of the run before.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.memory import read_peak_memory
from benchmarks.model import OURS, Cell, Job, Place, Sample, Samples, Target
from benchmarks.payloads import ANSWERS, API_KEY, API_SECRET, CLOUD, build_image_url
from benchmarks.server import run_server

if TYPE_CHECKING:
    from cloudinary_analyze import Captioning
    from cloudinary_analyze.bulk.input import InputLine
    from cloudinary_analyze.bulk.sqlite import SQLiteLedger

LEFT: Final = 20
MODEL: Final = "captioning"
INPUT: Final = "input.txt"
LEDGER: Final = "run.ledger"
PEAK: Final = "peak memory MiB"


@contextlib.contextmanager
def prepare(items: int) -> Iterator[Place]:
    """Give a server, and the input and the ledger of a run that was killed shortly before its end."""
    with run_server() as served, tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        lines = "".join(f"{build_image_url(number)}\n" for number in range(items))
        (directory / INPUT).write_text(lines)
        _write_ledger(directory / LEDGER, items, served.url)
        yield Place(url=served.url, directory=name)


def _write_ledger(path: Path, items: int, url: str) -> None:
    from cloudinary_analyze import Captioning, Uri
    from cloudinary_analyze._ledgered import KeyMaker
    from cloudinary_analyze.bulk.ledger_file import ANSWERED, create

    make_key = KeyMaker(Captioning(build_image_url(0))).make

    def build_rows() -> Iterator[tuple[Any, ...]]:
        for number in range(items):
            source = build_image_url(number)
            yield number, number + 1, source, MODEL, bytes.fromhex(make_key(Uri(source)))

    create(path, url, CLOUD)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_size = -262144")
        connection.execute("BEGIN")
        connection.executemany(
            "INSERT INTO items (position, line, source, model, key) VALUES (?, ?, ?, ?, ?)",
            build_rows(),
        )
        connection.executemany(
            "INSERT INTO answers (id, content) VALUES (?, ?)",
            ((number, ANSWERS[MODEL]) for number in range(items - LEFT)),
        )
        connection.execute(
            "INSERT INTO records (key, state, seconds, answer) "
            "SELECT key, ?, 0.5, position FROM items WHERE position < ? ORDER BY key",
            (ANSWERED, items - LEFT),
        )
        connection.execute("COMMIT")


def _forget_last(path: Path, items: int) -> None:
    """Take the ledger back to where the run was killed, for the next sample."""
    done = (items - LEFT,)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(
            "DELETE FROM records WHERE key IN (SELECT key FROM items WHERE position >= ?)", done
        )
        connection.execute("DELETE FROM answers WHERE id >= ?", done)
        connection.commit()


async def _resume(job: Job) -> float:
    """Run again until everything is done, and return when the first call was begun."""
    from cloudinary_analyze import AnalyzeSession, Captioning, Credentials, Settings
    from cloudinary_analyze._ledgered import KeyMaker
    from cloudinary_analyze.bulk.input import read_input
    from cloudinary_analyze.bulk.sqlite import SQLiteLedger

    directory = Path(job.directory)
    begun: list[float] = []

    def build_request(line: InputLine) -> Captioning:
        begun.append(time.time())
        assert line.source is not None
        return Captioning(line.source)

    def find_undone(ledger: SQLiteLedger) -> Iterator[InputLine]:
        make_key = KeyMaker(Captioning(build_image_url(0))).make
        with (directory / INPUT).open("rb") as stream, ledger.earlier_items() as earlier:
            for index, line in enumerate(read_input(stream, input_format="text")):
                assert line.source is not None
                if not earlier.is_done(index, make_key(line.source)):
                    yield line

    credentials = Credentials(CLOUD, API_KEY, API_SECRET)
    async with (
        SQLiteLedger(directory / LEDGER) as ledger,
        AnalyzeSession(credentials, settings=Settings(host=job.url)) as session,
    ):
        async with session.map(find_undone(ledger), build_request, ledger=ledger) as outcomes:
            async for outcome in outcomes:
                outcome.unwrap()
    assert len(begun) == LEFT
    return begun[0]


def _measure(job: Job) -> Samples:
    begun = asyncio.run(_resume(job))
    path = Path(job.directory) / LEDGER
    notes = {
        PEAK: read_peak_memory(),
        "items": job.items,
        "ledger MiB": path.stat().st_size / 2**20,
    }
    _forget_last(path, job.items)
    yield Sample(value=begun - job.started_at, notes=notes)


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
