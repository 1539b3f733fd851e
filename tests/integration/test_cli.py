"""The command line inside this process: results, messages and exit codes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import cli_support
import pytest
from cli_support import StartEmulator, read_records, write_lines

from cloudinary_analyze import MODELS
from cloudinary_analyze.cli import main
from cloudinary_analyze.cli.feed import READ_AHEAD, ItemFeed
from cloudinary_analyze.cli.ledger import Book
from cloudinary_analyze.cli.summary import Balance, Position, decide_ending
from cloudinary_analyze.requests import Uri
from cloudinary_analyze.results.records import InputItem, InputLine
from cloudinary_analyze.results.statistics import Durations

cli_folder, start_emulator = cli_support.cli_folder, cli_support.start_emulator
pytestmark = pytest.mark.usefixtures("cli_folder")

A, B = "https://example.com/a.jpg", "https://example.com/b.jpg"


def test_a_run_of_two_models_on_the_gallery_needs_no_account(
    capfd: pytest.CaptureFixture[str],
):
    assert main(["run", "captioning", "COCO", "--emulator", "--samples", "20"]) == 0
    records = read_records()
    pairs = {(record["line"], record["model"]) for record in records}
    assert pairs == {(line, model) for line in range(1, 21) for model in ("captioning", "coco")}
    assert all(record["analysis"] for record in records)
    assert [record["index"] for record in records] == list(range(40))
    out, err = capfd.readouterr()
    assert out == ""
    assert "synthetic" in err
    for shown in ("captioning", "coco", "median", "Results: results.jsonl"):
        assert shown in err


def test_bad_lines_are_numbered_and_do_not_stop_the_rest(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
):
    emulator = start_emulator()
    name = write_lines("id,image", f"1,{A}", "2,folder/public_id", f"3,{B}", name="in.csv")
    assert main(["run", "coco", "lvis", "--input", name, "--column", "image"]) == 1
    found = [(record["line"], record["model"], record["status"]) for record in read_records()]
    assert found == [
        (2, "coco", "ok"),
        (2, "lvis", "ok"),
        (3, None, "error"),
        (4, "coco", "ok"),
        (4, "lvis", "ok"),
    ]
    (bad,) = [record for record in read_records() if record["model"] is None]
    assert (bad["line"], bad["status"], bad["source"]) == (3, "error", "folder/public_id")
    assert emulator.counts.total_received == 4
    assert "line 3: 'folder/public_id' is not an http(s) URL" in capfd.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_an_interrupt_after_the_last_line_sends_nothing(
    start_emulator: StartEmulator,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    register = Book.register

    async def register_and_interrupt(*arguments: Any) -> object:
        inventory = await register(*arguments)
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(3):  # the loop calls the handler
            await asyncio.sleep(0)
        return inventory

    monkeypatch.setattr(Book, "register", register_and_interrupt)
    emulator = start_emulator()
    assert main(["run", "coco", "--input", write_lines(A, B)]) == 130
    assert "Nothing was sent" in capfd.readouterr().err
    assert emulator.counts.total_received == 0


def test_an_interrupt_during_imports_prints_one_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    class Finder:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "cloudinary_analyze.cli.app":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "cloudinary_analyze.cli.app", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    assert main(["models"]) == 130
    assert capfd.readouterr().err == "Interrupted.\n"


def test_each_model_gets_only_its_parameters():
    arguments = ["run", "ai_vision_general", "ai-vision-moderation", "ai_vision_tagging"]
    arguments += ["captioning", "--emulator", "--samples", "1"]
    arguments += ["--prompt", "What?", "--prompt", "Where?", "--question", "Is it?"]
    assert main([*arguments, "--tag", "dog=Is there a dog, a=b?"]) == 0
    answers = {record["model"]: record["analysis"] for record in read_records()}
    assert len(answers["ai_vision_general"]["responses"]) == 2
    assert len(answers) == 4


def test_limit_takes_the_first_lines_only(start_emulator: StartEmulator):
    start_emulator()
    name = write_lines("# sources", A, "", "asset:0a1b", B)
    assert main(["run", "coco", "--input", name, "--limit", "2", "--output", "o"]) == 0
    assert [(r["line"], r["source"]) for r in read_records("o")] == [
        (2, A),
        (4, "asset:0a1b"),
    ]


def test_earlier_results_are_kept(capfd: pytest.CaptureFixture[str]):
    Path("results.jsonl").write_text("paid for", encoding="utf-8")
    Path("results.jsonl.1").write_text("also", encoding="utf-8")
    assert main(["run", "coco", "--emulator", "--samples", "1"]) == 0
    assert len(read_records()) == 1
    assert Path("results.jsonl.1").read_text(encoding="utf-8") == "also"
    assert Path("results.jsonl.2").read_text(encoding="utf-8") == "paid for"
    assert "results.jsonl.2" in capfd.readouterr().err


def test_a_device_is_written_to_and_not_replaced():
    assert main(["run", "coco", "--emulator", "--samples", "2", "--output", "/dev/null"]) == 0
    assert Path("/dev/null").is_char_device()


def test_missing_credentials_name_both_alternatives(capfd: pytest.CaptureFixture[str]):
    name = write_lines(A)
    for command in (["run", "coco", "--input", name], ["analyze", "coco", A]):
        assert main(command) == 2
        err = capfd.readouterr().err
        assert "CLOUDINARY_URL=" in err
        assert "--emulator" in err
    assert not Path("results.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("run --emulator", "Name at least one model"),
        ("run nosuch --emulator", "watermark_detection"),
        ("run coco", "--input"),
        ("run captionning --emulator", "did you mean captioning?"),
        ("run Google-Taging --emulator", "did you mean google_tagging?"),
        ("run urls.txt coco --emulator", "--input FILE"),
        ("run missing.csv coco --emulator", "--input FILE"),
        ("run https://example.com/a.jpg coco --emulator", "--input FILE"),
        ("analyze https://example.com/a.jpg coco --emulator", "analyze MODEL URL"),
        ("analyze coco photo.jpg --emulator", "uploader.upload('photo.jpg')"),
        ("analyze coco data:image/png;base64,AA --emulator", "uploader.upload(data_uri)"),
        ("run coco -o results.xlsx --emulator", "Known: .json, .jsonl"),
        ("run coco --input urls.xlsx --emulator", "--input-format"),
        ("export results.csv -o x.csv", "ledger"),
        ("run coco --input nosuch.txt --emulator", "nosuch.txt cannot be read"),
        ("run coco --input . --emulator", "directory"),
        ("run coco --input urls.txt --column url --emulator", "--input-format"),
        ("run coco --input urls.txt --key-column id --emulator", "--input-format"),
        ("run coco --input urls.txt --samples 3 --emulator", "--samples"),
        ("run coco --input urls.txt --input-format csv --column x --emulator", "no header"),
        ("run coco --input binary.csv --emulator", "not a text file"),
        ("run coco --output /proc/results.jsonl --emulator", "/proc"),
        ("run coco --report nosuch/report.html --emulator", "cannot be written"),
        ("run coco --ledger nosuch/ledger --emulator", "cannot be written"),
        ("run coco --output - --format csv --emulator", "JSON Lines"),
        ("run coco --output - --report r.html --emulator", "--ledger"),
        ("run coco --output - --retry-failed --emulator", "--ledger"),
        ("run coco --receive 127.0.0.1:0 --emulator", "--mode task"),
        ("export nosuch.ledger -o x.jsonl", "does not exist"),
        ("export urls.txt -o x.jsonl", "not a ledger"),
        ("report nosuch.jsonl", "cannot be read"),
        ("status", "task"),
        ("listen --path hooks", "slash"),
        ("run coco --samples 3 --input urls.txt", "--samples"),
        ("run ai_vision_general --emulator", "needs --prompt"),
        ("run ai_vision_moderation --emulator", "needs --question"),
        ("run ai_vision_tagging --emulator", "needs --tag"),
        ("run ai_vision_tagging --tag dog --emulator", "name=description"),
        ("run ai_vision_tagging --tag Dog=x --emulator", "lower-case"),
        ("run coco --prompt what --emulator", "ai_vision_general alone"),
        ("run ai_vision_general --emulator " + "--prompt x " * 11, "1 to 10 prompts, not 11"),
        ("run coco --permits 0 --emulator", "--permits"),
        ("run coco --permits x --emulator", "permits"),
        ("run coco --output nosuch/results.jsonl --emulator", "cannot be written"),
        ("run coco --nosuch --emulator", "--nosuch"),
        ("analyze coco", "source"),
        ("analyze coco folder/public_id --emulator", "public ID"),
        ("analyze nosuch https://example.com/ --emulator", "Unknown model"),
        ("emulator --latency soon", "realistic"),
        ("emulator --quota ai_vision", "feature=units"),
        ("emulator --quota nosuch=1", "nosuch"),
        ("emulator --port 70000", "--port"),
    ],
)
def test_an_invalid_value_is_reported_before_anything_is_sent(
    arguments: str, sentence: str, capfd: pytest.CaptureFixture[str]
):
    write_lines(A)
    Path("binary.csv").write_bytes(b"PK\x03\x04" + bytes(100))
    assert main(arguments.split()) == 2
    out, err = capfd.readouterr()
    assert sentence.lower() in err.lower()
    assert out == ""
    assert "Traceback" not in err
    assert {path.name for path in Path().iterdir()} == {"urls.txt", "binary.csv"}


def test_refused_credentials_stop_the_run_and_are_not_shown(
    start_emulator: StartEmulator,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    url = start_emulator().cloudinary_url.replace("emulator-secret", "planted-secret-4711")
    monkeypatch.setenv("CLOUDINARY_URL", url)
    assert main(["run", "coco", "--input", write_lines(A, B)]) == 3
    assert main(["analyze", "coco", A]) == 3
    shown = "".join(capfd.readouterr())
    assert "401" in shown
    assert "0 items are answered, 2 left" in shown
    for path in Path().iterdir():
        assert b"planted-secret" not in path.read_bytes()
    assert "planted-secret" not in shown


def test_a_failed_item_is_in_the_results_and_in_the_summary(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
):
    emulator = start_emulator()
    missing = f"{emulator.url}/samples/nosuch.png"
    assert main(["run", "coco", "--input", write_lines(A, missing)]) == 1
    (failed,) = [record for record in read_records() if record["status"] == "error"]
    assert (failed["line"], failed["error"]["type"], failed["error"]["status"]) == (
        *(2, "NotFoundError"),
        404,
    )
    err = capfd.readouterr().err
    assert "NotFoundError 404" in err
    assert "line 2:" in err
    assert main(["analyze", "coco", missing]) == 1


def test_analyze_prints_the_raw_response_when_piped(capfd: pytest.CaptureFixture[str]):
    assert main(["analyze", "captioning", A, "--emulator"]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert answer["data"]["analysis"]["data"]["caption"]


def test_models_lists_every_model_and_its_option(capfd: pytest.CaptureFixture[str]):
    assert main(["models"]) == 0
    rows = [line.split("\t") for line in capfd.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == list(MODELS)
    needs = {row[0]: row[2] for row in rows if row[2]}
    assert needs == {
        "ai_vision_general": "--prompt",
        "ai_vision_moderation": "--question",
        "ai_vision_tagging": "--tag",
    }
    assert all(row[3].endswith(".") for row in rows)


def test_help_documents_the_exit_codes(capfd: pytest.CaptureFixture[str]):
    for arguments in (["--help"], ["run", "--help"]):
        assert main(arguments) == 0
        out = capfd.readouterr().out
        for code in ("0: every", "1: some", "2: invalid", "3: stopped", "130: interrupted"):
            assert code in out


def test_without_the_extra_a_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.delitem(sys.modules, "cloudinary_analyze.cli.app", raising=False)
    monkeypatch.setitem(sys.modules, "cyclopts", None)
    assert main(["models"]) == 2
    assert "pip install 'cloudinary-analyze[cli]'" in capfd.readouterr().err


def build_items(count: int, models: Sequence[str] = ("coco", "lvis")) -> Iterator[InputItem]:
    for number in range(1, count + 1):
        line = InputLine(number, A, Uri(A))
        for model in models:
            yield InputItem(line, model)


async def test_the_feed_reads_ahead_within_its_bound():
    """Memory does not depend on the length of the input."""
    read = 0

    def read_forever() -> Generator[InputItem, None, None]:
        nonlocal read
        for item in build_items(10**9):
            read += 1
            yield item

    feed = ItemFeed(read_forever, 2)
    feed.start()
    for _ in range(5000):
        feed.finish(await anext(feed))
    assert feed.pulled == 5000
    assert feed.finished_through == (None, 2500)
    assert read <= 5000 + READ_AHEAD + 1
    feed.stop()
    with pytest.raises(StopAsyncIteration):
        await anext(feed)
    assert not feed.exhausted


async def test_a_stopped_feed_yields_nothing_more():
    feed = ItemFeed(lambda: (item for item in build_items(3)), 2)
    feed.start()
    items = [await anext(feed) for _ in range(3)]
    feed.stop()
    with pytest.raises(StopAsyncIteration):
        await anext(feed)
    for item in items:
        feed.finish(item)
    # the second line has one of its two results
    assert feed.finished_through == (None, 1)


async def test_an_input_error_comes_after_earlier_lines():
    def read() -> Generator[InputItem, None, None]:
        yield from build_items(1, ["coco"])
        raise OSError(5, "Input/output error")

    feed = ItemFeed(read, 1)
    feed.start()
    assert (await anext(feed)).line.number == 1
    with pytest.raises(OSError, match="Input/output"):
        await anext(feed)


def test_quantiles_are_right_to_a_hundredth():
    durations = Durations()
    assert durations.compute_quantile(0.5) is None
    for step in range(1, 1001):
        durations.add(step / 100)
    assert durations.compute_quantile(0.5) == pytest.approx(5.0, rel=0.01)
    assert durations.compute_quantile(0.95) == pytest.approx(9.5, rel=0.01)


@pytest.mark.parametrize(
    ("through", "exhausted", "left", "code", "sentence"),
    [
        ("line 7", False, None, 130, "line through line 7 has its results; lines that were not"),
        (None, False, None, 130, "No input line has all of its results"),
        ("line 7", True, None, 0, ""),  # it came too late to leave anything out
        ("line 7", False, 3, 130, "4 items are answered, 3 left"),
        ("line 7", False, 0, 0, ""),
    ],
)
def test_an_interrupt_counts_only_if_lines_were_left(
    through: str | None, exhausted: bool, left: int | None, code: int, sentence: str
):
    position = Position(finished_through=through, exhausted=exhausted)
    balance = None
    if left is not None:
        balance = Balance(answered=4, failed=0, passing=0, undelivered=0, invalid=0, total=4 + left)
    ending = decide_ending(position, failed=0, balance=balance, interrupted=True)
    assert ending.exit_code == code
    assert sentence in ending.sentence
    assert bool(sentence) == bool(ending.sentence)


def test_transient_failures_are_listed_separately():
    position = Position(finished_through="line 9", exhausted=True)
    balance = Balance(answered=3, failed=8, passing=1, undelivered=2, invalid=2, total=11)
    ending = decide_ending(position, failed=8, balance=balance)
    assert ending.exit_code == 1
    assert ending.sentence == (
        "1 item failed for transient reasons; run the same command again to retry. "
        "2 results were never delivered; --retry-failed requests them again as calls, which are charged. "
        "3 items failed permanently; use --retry-failed to retry. "
        "2 input lines are invalid; correct the input and run the same command again."
    )


def test_an_output_passed_as_a_ledger_names_its_ledger(capfd: pytest.CaptureFixture[str]):
    assert main(["run", "coco", "--emulator", "--samples", "1"]) == 0
    assert main(["export", "results.jsonl", "-o", "x.csv"]) == 2
    assert "The ledger of that run is results.jsonl.ledger" in capfd.readouterr().err
    Path("results.jsonl").unlink()
    assert main(["export", "results.jsonl", "-o", "x.csv"]) == 2
    assert "results.jsonl does not exist. The ledger of that run is" in capfd.readouterr().err
