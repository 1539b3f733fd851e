"""A run is interrupted three times and its input is edited. Every charge must be accounted for.

It takes about 90 seconds of CPU time. Fewer rows, and other seeds:

    BULK_ROWS=2000 BULK_SEEDS=1,2,3 python -m pytest -m '' -s tests/chaos/test_cli_edits.py
"""

from __future__ import annotations

import asyncio
import csv
import json
import os
import random
import signal
from asyncio.subprocess import DEVNULL, Process
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import attrs
import pytest
from cli_support import read_records, start, until

from cloudinary_analyze.emulator import Emulator, FaultPlan
from cloudinary_analyze.ledger.file import ANSWERED, connect_for_reading

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.usefixtures("untraced"),
]

ROWS = int(os.environ.get("BULK_ROWS", "20000"))
SEEDS = os.environ.get("BULK_SEEDS", "11").split(",")
PERMITS = 64
WINDOW = 2 * PERMITS  # items in flight, or not yet durable
PATIENCE = 1200.0
MODELS = ("captioning", "ai_vision_general", "coco", "google_tagging", "lvis")
OPTIONS = ("--prompt", "What is it?", "--permits", str(PERMITS), "--quiet")
RUN = ("run", *MODELS, *OPTIONS, "--input", "shop.csv", "--summary-json", "summary.json")


@attrs.define
class Shop:
    """The rows of the input, and how they are edited."""

    dice: random.Random
    rows: list[tuple[str, str, str]] = attrs.field(factory=list)

    def __attrs_post_init__(self) -> None:
        self.rows = [self._build_row(number) for number in range(ROWS)]

    def _build_row(self, number: int) -> tuple[str, str, str]:
        picture = number % (ROWS - ROWS // 50)  # some pictures are in two rows
        return f"sku{number}", f"https://shop.example/{picture}.jpg", f'{number},"Größe"\nS'

    def edit(self) -> None:
        """Remove rows, add others, move some, and change the columns of some."""
        many = ROWS // 20
        self.dice.shuffle(self.rows)
        del self.rows[:many]
        self.rows += [self._build_row(ROWS + number) for number in range(many)]
        self.rows += [
            (f"sku{number}", f"https://shop.example/new/{number}.jpg", "")
            for number in range(2 * ROWS, 2 * ROWS + many)
        ]
        for index in self.dice.sample(range(len(self.rows)), many):
            sku, url, _ = self.rows[index]
            self.rows[index] = (sku, url, "changed")

    def write(self, folder: Path) -> None:
        with (folder / "shop.csv").open("w", encoding="utf-8", newline="") as stream:
            table = csv.writer(stream)
            table.writerow(("sku", "photo url", "note"))
            table.writerows(self.rows)


@attrs.define
class Books:
    """Compares the emulator's charges with the ledger and the summaries."""

    emulator: Emulator
    folder: Path
    charged: int = 0
    recorded: int = 0
    dropped: int = 0
    explained: int = 0

    def _read_recorded(self) -> int:
        with closing(connect_for_reading(self.folder / "results.jsonl.ledger")) as connection:
            query = "SELECT count(*) FROM records WHERE state = ?"
            ((count,),) = connection.execute(query, (ANSWERED,))
            return int(count)

    async def close(self, *, killed: bool = False) -> dict[str, Any]:
        """Compare the charges of a finished run with its report; return its summary."""
        await until(lambda: not self.emulator.counts.in_flight)
        charged = self.emulator.counts.total_done
        recorded = await asyncio.to_thread(self._read_recorded)
        unrecorded = (charged - self.charged) - (recorded - self.recorded)
        dropped = self.emulator.counts.http_faults["drop_response"]
        print(
            f"{charged - self.charged:,} charges, {recorded - self.recorded:,} new records; "
            f"{unrecorded} charges without one, {dropped - self.dropped} responses dropped"
        )
        summary: dict[str, Any] = {}
        if killed:  # a killed run reports neither its retries nor the records that were not durable
            assert 0 <= unrecorded <= dropped - self.dropped + WINDOW
        else:
            summary = json.loads((self.folder / "summary.json").read_bytes())
            reported = summary["may_be_charged_twice"] + summary["failed_may_be_charged"]
            assert unrecorded == reported <= dropped - self.dropped
        (self.folder / "summary.json").unlink(missing_ok=True)
        self.charged, self.recorded, self.dropped = charged, recorded, dropped
        self.explained += unrecorded
        return summary


def check_records(records: list[dict[str, Any]], shop: Shop, *, complete: bool) -> None:
    """Check that each row of the current input has one record, in order, with its columns."""
    rows = {sku: (url, note) for sku, url, note in shop.rows}
    order = {(sku, model): n for n, (sku, model) in enumerate(_list_items(shop))}
    places = []
    for record in records:
        sku = record["input"]["sku"]
        url, note = rows[sku]
        assert record["input"] == {"sku": sku, "photo url": url, "note": note}
        assert record["source"] == url
        if record["status"] == "ok":
            assert record["entity"] == url
        places.append(order[sku, record["model"]])
    assert places == sorted(set(places))
    if complete:
        assert len(places) == len(order)
        assert {record["status"] for record in records} == {"ok"}


def _list_items(shop: Shop) -> Iterator[tuple[str, str]]:
    return ((sku, model) for sku, _, _ in shop.rows for model in MODELS)


async def finish(process: Process) -> int:
    async with asyncio.timeout(PATIENCE):
        return await process.wait()


@pytest.mark.parametrize("seed", SEEDS)
async def test_every_charge_belongs_to_a_row_or_a_report(seed: str, tmp_path: Path):
    dice = random.Random(seed)
    shop = Shop(dice)
    shop.write(tmp_path)
    faults = FaultPlan(drop_response=0.004, error_503=0.004, retry_after=0.05)
    quotas = {"ai_vision": 100 * ROWS}
    options = {"stdout": DEVNULL, "stderr": DEVNULL}
    arguments = (*RUN, "--column", "photo url")
    async with Emulator(latency=0.02, quotas=quotas, faults=faults, seed=int(seed)) as emulator:
        books = Books(emulator, tmp_path)
        steps = [
            (0.08, 0.3, signal.SIGINT),
            (0.38, 0.55, signal.SIGKILL),
            (0.6, 0.72, signal.SIGTERM),
        ]
        for low, high, number in steps:
            async with start(*arguments, folder=tmp_path, emulator=emulator, **options) as process:
                enough = dice.uniform(low, high) * ROWS * len(MODELS)
                await until(lambda n=enough: emulator.counts.total_done > n, PATIENCE)
                process.send_signal(number)
                code = await finish(process)
            assert code == (-9 if number == signal.SIGKILL else code), "SIGKILL did not end the run"
            summary = await books.close(killed=number == signal.SIGKILL)
            if number == signal.SIGKILL:
                async with start(
                    "export", "results.jsonl.ledger", "-o", "export.jsonl", folder=tmp_path
                ) as process:
                    assert await finish(process) == 0
                check_records(read_records(tmp_path / "export.jsonl"), shop, complete=False)
                shop.edit()
                shop.write(tmp_path)
            else:
                assert summary["exit_code"] == code in {3, 130}
                check_records(read_records(tmp_path / "results.jsonl"), shop, complete=False)
        stopped = set()
        for renewed in (False, True):
            if renewed:
                emulator.quotas = None
            async with start(*arguments, folder=tmp_path, emulator=emulator, **options) as process:
                code = await finish(process)
            summary = await books.close()
            records = read_records(tmp_path / "results.jsonl")
            check_records(records, shop, complete=renewed)
            stopped |= set(summary["stopped"])
            if not renewed:
                assert (code, stopped) == (3, {"ai_vision"})
                answered = Counter(r["model"] for r in records if r["status"] == "ok")
                vision = answered.pop("ai_vision_general")
                assert 0 < vision < len(shop.rows)
                assert set(answered.values()) == {len(shop.rows)}
        assert code == 0
        done = emulator.counts.done
        repeats, forgotten = done.total() - len(done), len(done) - books.recorded
        present = {(model, url) for _, url, _ in shop.rows for model in MODELS}
        assert present <= set(done)
        assert forgotten <= len(set(done) - present)  # their rows were removed
        print(
            f"{ROWS:,} rows: {done.total():,} charges for {len(done):,} requests, {repeats} repeated; "
            f"{forgotten} charged, unanswered and then removed from the input"
        )
        assert repeats + forgotten == books.explained
