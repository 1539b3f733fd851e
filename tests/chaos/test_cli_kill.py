"""The command line is killed without warning, repeatedly, and resumes each time."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import closing
from pathlib import Path

import pytest
from cli_support import build_urls, end, read_records, start, until, write_urls
from ports import reserve_port

from cloudinary_analyze import Captioning, Uri
from cloudinary_analyze.emulator import Emulator, WebhookPolicy
from cloudinary_analyze.ledger.file import (
    ANSWERED,
    SUBMITTED,
    connect_for_reading,
    connect_for_writing,
    create,
)
from cloudinary_analyze.ledger.items import write_item
from cloudinary_analyze.ledger.sqlite import SQLiteLedger
from cloudinary_analyze.ledger.writer import write_answer
from cloudinary_analyze.requests import KeyBuilder

pytestmark = pytest.mark.slow

KILLS = 5
ITEMS = 3000
DONE = 1_000_000


def count_durable(folder: Path, *states: int) -> int:
    """Return how many requests the ledger holds in some states."""
    path = folder / "results.jsonl.ledger"
    if not path.exists():
        return 0
    with closing(connect_for_reading(path)) as connection:
        rows = connection.execute("SELECT state, count(*) FROM records GROUP BY state")
        return sum(count for state, count in rows if state in states)


def read_answered(folder: Path) -> set[str]:
    """Return the sources whose answers the ledger holds."""
    return {
        item.source
        for item in SQLiteLedger(folder / "results.jsonl.ledger").iter_items()
        if item.response is not None
    }


@pytest.mark.parametrize("mode", ["call", "task"])
async def test_a_killed_run_repeats_no_recorded_request(mode: str, tmp_path: Path):
    write_urls(tmp_path, ITEMS)
    address = f"127.0.0.1:{reserve_port()}"
    # at this rate the killed runs leave something to do
    arguments = ["run", "captioning", "--input", "urls.txt", "--mode", mode, "--rate", "300"]
    if mode == "task":
        arguments += ["--receive", address, "--public-url", f"http://{address}/"]
    states = (ANSWERED, SUBMITTED) if mode == "task" else (ANSWERED,)
    dice = random.Random(4711)
    repeats = 0
    async with Emulator(latency=0.1, webhooks=WebhookPolicy(concurrency=64)) as emulator:
        for _ in range(KILLS):
            async with start(*arguments, folder=tmp_path, emulator=emulator) as process:
                before = count_durable(tmp_path, ANSWERED)
                await until(lambda before=before: count_durable(tmp_path, ANSWERED) > before)
                await asyncio.sleep(dice.uniform(0.0, 0.5))
                assert count_durable(tmp_path, ANSWERED) < ITEMS, "nothing was left to do"
                process.kill()
                await process.wait()
            await asyncio.sleep(0.2)  # requests in flight reach the emulator
            sent = emulator.counts.total_received
            repeats = sent - count_durable(tmp_path, *states)
            notified = {task.source for task in emulator.tasks.values() if task.notified}
            assert notified <= read_answered(tmp_path)  # a webhook was answered 200 for these
        async with start(*arguments, folder=tmp_path, emulator=emulator) as process:
            await until(lambda: emulator.counts.total_received == ITEMS + repeats, 200)
            for task in emulator.tasks.values():
                if task.outcome and not task.notified:
                    emulator._desk._finish(task)  # the service also delivers webhooks repeatedly
            code, out, err = await end(process)
        assert code == 0, err
        assert not out
        assert emulator.counts.total_received == ITEMS + repeats
        print(f"{mode}: {repeats} of {ITEMS} asked again after {KILLS} kills")
        assert repeats < KILLS * 400
        assert "done in an earlier run" in err
    records = read_records(tmp_path / "results.jsonl")
    assert [record["source"] for record in records] == build_urls(ITEMS)
    assert {record["status"] for record in records} == {"ok"}
    assert all(record["entity"] == record["source"] for record in records)


async def test_a_million_done_items_are_skipped_in_little_memory(tmp_path: Path):
    """This test bounds memory. `benchmarks` measures the time on an idle machine."""
    with (tmp_path / "urls.txt").open("w", encoding="utf-8") as stream:
        stream.writelines(f"{build_url(number)}\n" for number in range(DONE + 5))
    async with Emulator(latency=300) as emulator:
        await asyncio.to_thread(fill, tmp_path / "results.jsonl.ledger", emulator)
        arguments = ("run", "captioning", "--input", "urls.txt")
        begun = time.monotonic()
        async with start(*arguments, folder=tmp_path, emulator=emulator) as process:
            await until(lambda: emulator.counts.total_received == 5, 200)  # coverage traces it
            seconds = time.monotonic() - begun
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            process.kill()
        assert set(emulator.counts.received) == {
            ("captioning", build_url(DONE + number)) for number in range(5)
        }
    (peak,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    print(f"{DONE:,} done items passed over in {seconds:.1f} s, {peak / 1024:.0f} MiB")
    assert peak <= 150 * 1024


def build_url(number: int) -> str:
    return f"https://example.com/{number}.jpg"


def fill(path: Path, emulator: Emulator) -> None:
    """Write the ledger of a run with a million done items in one transaction."""
    keys = KeyBuilder(Captioning(build_url(0)))
    answer = b'{"data":{"analysis":{"data":{"caption":"A cat"}}}}'
    create(path, emulator.url, emulator.cloud_name)
    with closing(connect_for_writing(path)) as connection:
        connection.execute("BEGIN")
        for number in range(DONE):
            url = build_url(number)
            key = bytes.fromhex(keys.build(Uri(url)))
            write_item(
                connection,
                number,
                (number + 1, url, "captioning", key, None, None, None, None),
            )
            write_answer(connection, key, ANSWERED, answer, seconds=0.1, recorded=0.0)
        connection.execute("COMMIT")
