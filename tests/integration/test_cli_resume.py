"""The same command resumes: nothing is lost, and nothing is requested twice."""

from __future__ import annotations

import asyncio
import csv
import json
import resource
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cli_support
import pytest
from cli_support import (
    StartEmulator,
    build_urls,
    end,
    read_records,
    start,
    until,
    write_lines,
    write_urls,
)

from cloudinary_analyze.cli import main
from cloudinary_analyze.cli.output import DEFAULT_OUTPUT, LedgerExport, plan_places
from cloudinary_analyze.cli.screen import CommandError
from cloudinary_analyze.emulator import Emulator, FaultPlan
from cloudinary_analyze.errors import AnalyzeError
from cloudinary_analyze.ledger.sqlite import SQLiteLedger, build_row

cli_folder, start_emulator = cli_support.cli_folder, cli_support.start_emulator
pytestmark = pytest.mark.usefixtures("cli_folder")

RUN = ["run", "coco", "--input", "urls.txt"]


def read_sources(path: str = "results.jsonl") -> list[str]:
    return [record["source"] for record in read_records(path)]


def read_results(path: str = "results.jsonl") -> list[dict[str, Any]]:
    """Read records, apart from which run paid for them."""
    return [{**record, "restored": None} for record in read_records(path)]


@pytest.mark.parametrize("reset_time", [None, datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)])
def test_a_run_stops_at_its_quota_and_resumes_later(
    reset_time: datetime | None,
    start_emulator: StartEmulator,
    capfd: pytest.CaptureFixture[str],
):
    first = start_emulator(quotas={"object_detection": 5}, reset_time=reset_time)
    urls = build_urls(100)
    write_lines(*urls)
    assert main([*RUN, "--permits", "1"]) == 3
    assert read_sources() == urls[:5]
    assert first.counts.total_received <= 10
    err = capfd.readouterr().err
    assert "5 items are answered, 95 left" in err
    assert "run the same command again" in err
    told = (
        "did not report when the quota resets"
        if reset_time is None
        else "resets at 2030-01-02 03:04:05 UTC"
    )
    assert told in err
    second = start_emulator(quotas={"object_detection": 1000})
    assert main(RUN) == 0
    assert read_sources() == urls
    assert second.counts.total_received == 95


def test_an_exhausted_quota_is_reported_after_the_whole_input_was_pulled(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
):
    start_emulator(quotas={"object_detection": 1})
    write_lines(*build_urls(3))
    assert main(RUN) == 3
    assert "1 item is answered, 2 left" in capfd.readouterr().err
    assert len(read_records()) == 1


def test_permanent_failures_are_sent_again_only_on_request(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
):
    emulator = start_emulator()
    missing = f"{emulator.url}/samples/nosuch.png"
    write_lines("https://example.com/a.jpg", missing)
    assert main(RUN) == 1
    assert "--retry-failed" in capfd.readouterr().err
    assert main(RUN) == 1  # still not every item is answered
    assert emulator.counts.total_received == 2
    assert main([*RUN, "--retry-failed"]) == 1
    assert emulator.counts.received == {
        ("coco", "https://example.com/a.jpg"): 1,
        ("coco", missing): 2,
    }
    assert [record["status"] for record in read_records()] == ["ok", "error"]


def test_transient_failures_are_reported_and_retried(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
):
    start_emulator(faults=FaultPlan(truncated_json=1.0, fault_times=100))
    write_lines("https://example.com/a.jpg")
    assert main(RUN) == 1
    (record,) = read_records()
    assert (record["status"], record["error"]["type"]) == ("error", "ResponseDecodeError")
    assert "1 item failed for transient reasons" in capfd.readouterr().err
    start_emulator()
    assert main(RUN) == 0
    assert [record["status"] for record in read_records()] == ["ok"]


def test_the_key_column_identifies_signed_urls(start_emulator: StartEmulator):
    emulator = start_emulator()

    def write(signature: str, *names: str) -> None:
        rows = [f"{name},https://example.com/{name}.jpg?sig={signature}" for name in names]
        write_lines("id,url", *rows, name="images.csv")

    arguments = ["run", "coco", "--input", "images.csv", "--key-column", "ID"]
    write("first", "a", "b")
    assert main(arguments) == 0
    write("second", "a", "b", "c")
    assert main(arguments) == 0
    assert emulator.counts.total_received == 3
    assert [source.rpartition("/")[2] for source in read_sources()] == [
        *("a.jpg?sig=second", "b.jpg?sig=second"),
        "c.jpg?sig=second",
    ]
    assert [record["restored"] for record in read_records()] == [True, True, False]


def test_a_line_without_its_key_is_a_bad_line(start_emulator: StartEmulator):
    start_emulator()
    write_lines(
        '{"url": "https://example.com/a.jpg", "id": 7}',
        '{"url": "https://example.com/b.jpg"}',
        name="images.jsonl",
    )
    assert main(["run", "coco", "--input", "images.jsonl", "--key-column", "id"]) == 1
    ok, bad = read_records()
    assert (ok["status"], bad["model"]) == ("ok", None)
    assert "'id', which identifies the images, is empty" in bad["error"]["message"]


def test_added_lines_are_sent_and_the_order_is_kept(start_emulator: StartEmulator):
    emulator = start_emulator()
    a, b, c, d = build_urls(4)
    write_lines(a, c)
    assert main(RUN) == 0
    write_lines(a, c, d)
    assert main(RUN) == 0
    write_lines("# one more in front", b, a, "no url", c, d, a)
    assert main(RUN) == 1
    assert emulator.counts.total_received == 4
    assert [(r["line"], r["source"]) for r in read_records()] == [
        *((2, b), (3, a), (4, "no url")),
        *((5, c), (6, d), (7, a)),
    ]


def test_results_of_another_command_are_set_aside(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
):
    emulator = start_emulator()
    write_lines(*build_urls(3))
    assert main(RUN) == 0
    coco = read_results()
    assert main(["run", "captioning", "--input", "urls.txt"]) == 0
    assert [record["model"] for record in read_records()] == ["captioning"] * 3
    assert "results.jsonl.1" in capfd.readouterr().err
    assert read_results("results.jsonl.1") == coco
    assert main(RUN) == 0  # they are still known
    assert read_results() == coco
    assert main([*RUN, "--limit", "2"]) == 0
    assert read_results() == coco[:2]
    assert read_results("results.jsonl.3") == coco
    assert emulator.counts.total_received == 6
    before = sorted(Path().iterdir())
    assert main([*RUN, "--limit", "2"]) == 0
    assert sorted(Path().iterdir()) == before


def test_an_output_without_a_ledger_is_set_aside(start_emulator: StartEmulator):
    start_emulator()
    write_lines(*build_urls(1))
    Path("results.jsonl").write_text("paid for", encoding="utf-8")
    assert main(RUN) == 0
    assert Path("results.jsonl.1").read_text(encoding="utf-8") == "paid for"
    assert main(RUN) == 0
    assert not Path("results.jsonl.2").exists()


def test_an_emulator_run_starts_over_and_says_so(capfd: pytest.CaptureFixture[str]):
    arguments = ["run", "coco", "--emulator", "--samples"]
    assert main([*arguments, "3"]) == 0
    assert "was removed" not in capfd.readouterr().err
    assert main([*arguments, "2"]) == 0
    assert "was removed" in capfd.readouterr().err
    assert len(read_records()) == 2
    assert not Path("results.jsonl.1").exists()


def test_an_emulator_run_does_not_touch_the_ledger_of_an_account(
    capfd: pytest.CaptureFixture[str],
):
    async def make() -> None:
        async with SQLiteLedger("results.jsonl.ledger") as ledger:
            await ledger.open(base_url="https://api.cloudinary.com", cloud_name="real")

    asyncio.run(make())
    before = Path("results.jsonl.ledger").read_bytes()
    assert main(["run", "coco", "--emulator", "--samples", "1"]) == 2
    assert "belongs to real" in capfd.readouterr().err
    assert Path("results.jsonl.ledger").read_bytes() == before
    assert not Path("results.jsonl").exists()


def test_a_damaged_ledger_is_refused_and_left_alone(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
):
    emulator = start_emulator()
    write_lines(*build_urls(1))
    Path("results.jsonl.ledger").write_bytes(b"not a ledger" * 1000)
    assert main(RUN) == 2
    assert "is damaged, or not a ledger" in capfd.readouterr().err
    assert Path("results.jsonl.ledger").read_bytes() == b"not a ledger" * 1000
    assert not emulator.counts.total_received


def test_a_streamed_run_with_a_ledger_reports_earlier_items_too(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
):
    emulator = start_emulator()
    write_lines(*build_urls(3))
    arguments = [*RUN, "--output", "-", "--ledger", "kept"]
    for _ in range(2):
        assert main(arguments) == 0
        out = capfd.readouterr().out
        assert sorted(json.loads(line)["line"] for line in out.splitlines()) == [1, 2, 3]
    assert emulator.counts.total_received == 3
    assert not Path("results.jsonl").exists()


def test_the_output_is_a_table_if_its_name_or_the_option_says_so(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
):
    emulator = start_emulator()
    write_lines(*build_urls(3))
    assert main([*RUN, "--output", "results.csv"]) == 0
    assert main([*RUN, "--output", "other", "--format", "csv"]) == 0
    for name in ("results.csv", "other"):
        with Path(name).open(encoding="utf-8", newline="") as stream:
            assert [row["source"] for row in csv.DictReader(stream)] == build_urls(3)
    assert emulator.counts.total_received == 6  # a ledger for each output
    parquet = pytest.importorskip("pyarrow.parquet")
    capfd.readouterr()
    assert main(["export", "results.csv.ledger", "-o", "results.parquet"]) == 0
    assert "3 ok, 0 failed" in capfd.readouterr().err
    assert parquet.read_table("results.parquet").column("source").to_pylist() == build_urls(3)
    assert main(["export", "results.csv.ledger", "-o", "-"]) == 0
    assert len(capfd.readouterr().out.splitlines()) == 3


def test_the_report_comes_with_the_run_or_later(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
):
    start_emulator()
    write_lines(*build_urls(3))
    assert main([*RUN, "--report", "page.html"]) == 0
    assert main(["report", "results.jsonl"]) == 0
    assert main(["report", "results.jsonl.ledger", "-o", "again.html"]) == 0
    for name in ("page.html", "report.html", "again.html"):
        assert "https://example.com/3.jpg" in Path(name).read_text(encoding="utf-8")
    assert "3 results, 3 pictures in again.html" in capfd.readouterr().err
    assert main(["report", "urls.txt"]) == 2


@pytest.mark.slow
async def test_export_reads_while_the_run_goes_on(tmp_path: Path):
    write_urls(tmp_path, 800)  # for longer than the export takes to start on a busy machine
    async with (
        Emulator(latency=0.1) as emulator,
        start(*RUN, "--permits", "4", folder=tmp_path, emulator=emulator) as process,
    ):
        await until(lambda: emulator.counts.total_done > 20)
        async with start("export", "results.jsonl.ledger", "-o", "now.csv", folder=tmp_path) as now:
            code, _, err = await end(now)
        assert code == 0, err
        assert "more have no outcome yet" in err
        with (tmp_path / "now.csv").open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert {row["status"] for row in rows} == {"ok"}
        assert 10 < len(rows) < 800
        emulator.latency = None
        code, _, err = await end(process)
    assert code == 0, err
    assert read_sources() == build_urls(800)


async def test_two_runs_cannot_write_one_ledger(tmp_path: Path):
    write_urls(tmp_path, 8)
    async with (
        Emulator(latency=300) as emulator,
        start(*RUN, folder=tmp_path, emulator=emulator) as process,
    ):
        await until(lambda: emulator.counts.total_received)
        async with start(*RUN, folder=tmp_path, emulator=emulator) as other:
            code, _, err = await end(other)
        assert code == 2
        assert "in use by another process" in err
        assert process.returncode is None


async def test_an_output_folder_that_vanishes_stops_the_run(tmp_path: Path):
    write_urls(tmp_path, 500)
    folder = tmp_path / "results"
    folder.mkdir()
    arguments = (*RUN, "--permits", "4", "--output", "results/r.jsonl")
    async with (
        Emulator(latency=0.05) as emulator,
        start(*arguments, folder=tmp_path, emulator=emulator) as process,
    ):
        await until(lambda: emulator.counts.total_done > 8)
        emulator.latency = 1.5  # the bound below is one of seconds, too
        shutil.rmtree(folder)
        code, _, err = await end(process)
        assert code == 3, err
        assert "was removed or replaced" in err
        assert "items are answered" not in err  # which is unknown
        assert "Traceback" not in err
        assert emulator.counts.total_received < 60


@pytest.mark.slow
async def test_a_full_disk_stops_the_run_and_loses_nothing(tmp_path: Path):
    """To a writer, a limit on file sizes looks like a full disk."""
    write_urls(tmp_path, 2000)

    def bound_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))

    async with Emulator() as emulator:
        async with start(
            *(*RUN, "--ledger-patience", "2"),
            folder=tmp_path,
            emulator=emulator,
            preexec_fn=bound_files,
        ) as process:
            code, _, err = await end(process)
        assert code == 3, err
        assert "Traceback" not in err
        assert "Existing records are intact" in err
        first = emulator.counts.total_received
        assert first < 2000
        durable = {
            item.source for item in SQLiteLedger("results.jsonl.ledger").iter_items() if item.done
        }
        assert len(durable) >= first - 256  # what was in flight when the disk was full
        async with start(*RUN, folder=tmp_path, emulator=emulator) as process:
            code, _, err = await end(process)
        assert code == 0, err
        assert emulator.counts.total_received == 2000  # the rest had been saved elsewhere
    assert read_sources() == build_urls(2000)


async def test_an_interrupt_while_the_results_are_written_leaves_the_earlier_ones(tmp_path: Path):
    write_lines("from an earlier run", name="results.jsonl")
    async with SQLiteLedger("results.jsonl.ledger") as ledger:
        await ledger.open(base_url="https://api.cloudinary.com", cloud_name="real")
        await ledger.add_item(0, build_row(source="x", error=AnalyzeError("bad")))
        await ledger.flush()
        export = LedgerExport(ledger)
        export.halt()
        with pytest.raises(CommandError, match="cloudinary-analyze export") as caught:
            await export.write(plan_places(DEFAULT_OUTPUT, needs_ledger=False), source="urls.txt")
    assert caught.value.exit_code == 130
    assert Path("results.jsonl").read_text(encoding="utf-8") == "from an earlier run\n"
    assert not list(Path().glob("*.part"))
    assert not list(Path().glob("results.jsonl.1"))
