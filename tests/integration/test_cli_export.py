"""`export` and `report` of any ledger: of a run, or of a program."""

from __future__ import annotations

from pathlib import Path

import cli_support
import pytest
from cli_support import build_urls, read_records

from cloudinary_analyze import AnalyzeSession, Captioning, Coco, Credentials
from cloudinary_analyze.cli import main
from cloudinary_analyze.emulator import Emulator
from cloudinary_analyze.ledger import SQLiteLedger

cli_folder = cli_support.cli_folder
pytestmark = pytest.mark.usefixtures("cli_folder")


async def fill_ledger(count: int = 10) -> None:
    """Fill a ledger as a program does: two maps of different models, one item invalid."""
    async with Emulator(unsubscribed={"google_tagging"}) as emulator:
        credentials = Credentials.from_url(emulator.cloudinary_url)
        async with SQLiteLedger("my.ledger") as ledger, AnalyzeSession(credentials) as session:
            for kind in (Captioning, Coco):
                async with session.map(build_urls(count), kind, ledger=ledger) as stream:
                    async for outcome in stream:
                        outcome.unwrap()


async def test_a_ledger_of_a_program_exports_and_reports(
    capfd: pytest.CaptureFixture[str],
) -> None:
    await fill_ledger()
    assert main(["export", "my.ledger", "-o", "all.jsonl"]) == 0
    records = read_records("all.jsonl")
    assert [record["source"] for record in records] == build_urls(10) * 2
    assert [record["model"] for record in records] == ["captioning"] * 10 + ["coco"] * 10
    assert main(["report", "my.ledger", "-o", "r.html", "--title", "My run"]) == 0
    page = Path("r.html").read_text(encoding="utf-8")
    assert "<title>My run: 20 results</title>" in page
    assert "my.ledger" in page
    assert "20 results, 10 pictures" in capfd.readouterr().err


async def test_an_export_chooses_by_model_and_status(
    capfd: pytest.CaptureFixture[str],
) -> None:
    await fill_ledger()
    assert main(["export", "my.ledger", "-o", "c.jsonl", "--model", "coco"]) == 0
    assert {record["model"] for record in read_records("c.jsonl")} == {"coco"}
    two = ["--model", "coco", "--model", "captioning", "--status", "ok"]
    assert main(["export", "my.ledger", "-o", "b.csv", *two]) == 0
    assert "20 ok, 0 failed" in capfd.readouterr().err
    assert main(["export", "my.ledger", "-o", "e.jsonl", "--status", "error"]) == 0
    assert read_records("e.jsonl") == []
    assert main(["export", "my.ledger", "-o", "n.jsonl", "--model", "lvis"]) == 0
    assert "its models: captioning, coco" in capfd.readouterr().err
    assert main(["export", "my.ledger", "-o", "n.jsonl", "--status", "done"]) == 2
    assert main(["export", "my.ledger", "-o", "-", "--model", "coco"]) == 0
    streams = capfd.readouterr()
    assert "10 items in standard output: 10 ok" in streams.err
    assert streams.out.count("\n") == 10


def test_a_report_of_no_results_keeps_an_earlier_page(
    capfd: pytest.CaptureFixture[str],
) -> None:
    Path("report.html").write_text("the earlier page")
    for content in ("https://images.example/a.jpg\n", ""):
        Path("urls.txt").write_text(content)
        assert main(["report", "urls.txt"]) == 2
        assert "report.html was not written" in capfd.readouterr().err
        assert Path("report.html").read_text() == "the earlier page"
    assert main(["export", "urls.txt", "-o", "r.csv"]) == 2
    assert "urls.txt is empty" in capfd.readouterr().err


def test_a_report_of_a_run_names_its_input() -> None:
    Path("in put.txt").write_text("https://a.b/1.jpg\nnonsense\n", encoding="utf-8")
    run = ["run", "coco", "--input", "in put.txt", "--emulator", "--report", "r.html"]
    assert main(run) == 1
    page = Path("r.html").read_text(encoding="utf-8")
    assert "<dd>in put.txt</dd>" in page
    assert main(["export", "results.jsonl.ledger", "-o", "e.jsonl", "--status", "error"]) == 0
    assert [record["line"] for record in read_records("e.jsonl")] == [2]
