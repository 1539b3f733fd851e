"""The command line inside of this process: results, sentences and exit codes."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cloudinary_analyze import MODELS
from cloudinary_analyze.bulk.input import InputLine
from cloudinary_analyze.cli import main
from cloudinary_analyze.cli.ending import Position, decide_ending
from cloudinary_analyze.cli.feed import READ_AHEAD, ItemFeed, LineSource
from cloudinary_analyze.cli.summary import Durations
from cloudinary_analyze.emulator import Emulator
from cloudinary_analyze.requests import Uri

A, B = "https://example.com/a.jpg", "https://example.com/b.jpg"
StartEmulator = Callable[..., Emulator]


@pytest.fixture
def start_emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[StartEmulator]:
    """Start an emulator on a loop of its own, because the commands bring theirs."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    started: list[Emulator] = []

    def start(**options: Any) -> Emulator:
        emulator = Emulator(**options)
        asyncio.run_coroutine_threadsafe(emulator.start(), loop).result(10)
        started.append(emulator)
        monkeypatch.setenv("CLOUDINARY_URL", emulator.cloudinary_url)
        return emulator

    yield start
    for emulator in started:
        asyncio.run_coroutine_threadsafe(emulator.stop(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def read_records(path: str = "results.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def write_lines(*lines: str, name: str = "urls.txt") -> str:
    Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return name


def test_a_run_of_two_models_on_the_gallery_needs_no_account(
    capfd: pytest.CaptureFixture[str],
):
    assert main(["run", "captioning", "COCO", "--emulator", "--samples", "20"]) == 0
    records = read_records()
    pairs = {(record["line"], record["model"]) for record in records}
    assert pairs == {(line, model) for line in range(1, 21) for model in ("captioning", "coco")}
    assert {record["index"] for record in records} == set(range(40))
    assert all(record["analysis"] for record in records)
    assert [path.name for path in Path().iterdir()] == ["results.jsonl"]
    out, err = capfd.readouterr()
    assert out == ""
    assert "synthetic" in err
    for shown in ("captioning", "coco", "median", "object_detection", "Results: results.jsonl"):
        assert shown in err


def test_bad_lines_are_told_by_number_and_do_not_stop_the_rest(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
):
    emulator = start_emulator()
    name = write_lines("id,image", f"1,{A}", "2,folder/public_id", f"3,{B}", name="in.csv")
    assert main(["run", "coco", "lvis", "--input", name, "--column", "image"]) == 1
    found = sorted(
        (record["line"], record["model"], record["status"])
        for record in read_records()
        if record["model"]
    )
    assert found == [(line, model, "ok") for line in (2, 4) for model in ("coco", "lvis")]
    (bad,) = [record for record in read_records() if record["model"] is None]
    assert (bad["line"], bad["status"], bad["source"]) == (3, "error", "folder/public_id")
    assert emulator.counts.total_received == 4
    assert "line 3: 'folder/public_id' is no http(s) URL" in capfd.readouterr().err


def test_each_model_gets_the_parameters_that_are_its_own():
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
    assert sorted((r["line"], r["source"]) for r in read_records("o")) == [
        (2, A),
        (4, "asset:0a1b"),
    ]


def test_results_that_were_there_before_are_kept(capfd: pytest.CaptureFixture[str]):
    Path("results.jsonl").write_text("paid for", encoding="utf-8")
    Path("results.jsonl.1").write_text("also", encoding="utf-8")
    assert main(["run", "coco", "--emulator", "--samples", "1"]) == 0
    assert len(read_records()) == 1
    assert Path("results.jsonl.1").read_text(encoding="utf-8") == "also"
    assert Path("results.jsonl.2").read_text(encoding="utf-8") == "paid for"
    assert "results.jsonl.2" in capfd.readouterr().err


def test_results_of_a_killed_run_are_not_overwritten(capfd: pytest.CaptureFixture[str]):
    Path("results.jsonl.part").write_text("paid for", encoding="utf-8")
    assert main(["run", "coco", "--emulator", "--samples", "1"]) == 2
    assert Path("results.jsonl.part").read_text(encoding="utf-8") == "paid for"
    assert "results.jsonl.part" in capfd.readouterr().err


def test_a_device_is_written_to_and_not_replaced():
    assert main(["run", "coco", "--emulator", "--samples", "2", "--output", "/dev/null"]) == 0
    assert Path("/dev/null").is_char_device()


def test_without_credentials_both_ways_forward_are_named(capfd: pytest.CaptureFixture[str]):
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
        ("run coco --input nosuch.txt --emulator", "nosuch.txt cannot be read"),
        ("run coco --input . --emulator", "directory"),
        ("run coco --input urls.txt --column url --emulator", "--format"),
        ("run coco --input urls.txt --samples 3 --emulator", "--samples"),
        ("run coco --input urls.txt --format csv --column x --emulator", "no header"),
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
        ("analyze nosuch https://example.com/ --emulator", "is no model"),
        ("emulator --latency soon", "realistic"),
        ("emulator --quota ai_vision", "feature=units"),
        ("emulator --quota nosuch=1", "nosuch"),
        ("emulator --port 70000", "--port"),
    ],
)
def test_what_cannot_be_right_is_told_before_anything_is_sent(
    arguments: str, sentence: str, capfd: pytest.CaptureFixture[str]
):
    write_lines(A)
    assert main(arguments.split()) == 2
    out, err = capfd.readouterr()
    assert sentence.lower() in err.lower()
    assert out == ""
    assert "Traceback" not in err
    assert [path.name for path in Path().iterdir()] == ["urls.txt"]


def test_an_exhausted_quota_stops_the_run_and_says_how_to_go_on(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
):
    emulator = start_emulator(quotas={"object_detection": 5})
    name = write_lines(*(f"https://example.com/{number}.jpg" for number in range(1, 101)))
    assert main(["run", "coco", "--input", name, "--permits", "1"]) == 3
    answered = {record["line"] for record in read_records() if record["status"] == "ok"}
    assert answered == {1, 2, 3, 4, 5}
    assert emulator.counts.total_received <= 10
    err = capfd.readouterr().err
    assert "QuotaExceededError 429 MA_00008" in err
    sent = len(read_records())
    assert f"Every input line up to {sent} has its results; {100 - sent} lines were not sent" in err
    assert f"from line {sent + 1} on" in err


def test_refused_credentials_stop_the_run_and_are_not_shown(
    start_emulator: StartEmulator,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    url = start_emulator().cloudinary_url.replace("emulator-secret", "planted-secret-4711")
    monkeypatch.setenv("CLOUDINARY_URL", url)
    assert main(["run", "coco", "--input", write_lines(A, B)]) == 3
    assert main(["analyze", "coco", A]) == 3
    told = "".join(capfd.readouterr()) + Path("results.jsonl").read_text(encoding="utf-8")
    assert "AuthenticationError" in told
    assert "planted-secret" not in told


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


def test_analyze_prints_the_answer_as_received_when_piped(capfd: pytest.CaptureFixture[str]):
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
        for code in ("0: every", "1: some", "2: the", "3: stopped", "130: interrupted"):
            assert code in out


def test_without_the_extra_a_sentence_tells_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.delitem(sys.modules, "cloudinary_analyze.cli.app", raising=False)
    monkeypatch.setitem(sys.modules, "cyclopts", None)
    assert main(["models"]) == 2
    assert "pip install 'cloudinary-analyze[cli]'" in capfd.readouterr().err


async def test_the_feed_reads_ahead_no_further_than_it_may():
    """Memory stays flat, whatever the length of the input."""
    read = 0

    def read_for_ever():
        nonlocal read
        while True:
            read += 1
            yield InputLine(read, A, Uri(A))

    feed = ItemFeed(LineSource(read=read_for_ever, name="", countable=False), ("coco", "lvis"))
    feed.start()
    for _ in range(5000):
        feed.finish(await anext(feed))
    assert feed.pulled_lines == 2500
    assert feed.finished_through == 2500
    assert read <= 2500 + READ_AHEAD + 2
    feed.stop()
    with pytest.raises(StopAsyncIteration):
        await anext(feed)


async def test_the_feed_stops_only_between_lines():
    """A line that was begun gets all of its models, so that the way on is a line number."""
    lines = [InputLine(number, A, Uri(A)) for number in (1, 2, 3)]
    source = LineSource(read=lambda: (line for line in lines), name="", countable=True)
    feed = ItemFeed(source, ("coco", "lvis"))
    feed.start()
    first = await anext(feed)
    feed.stop()
    second = await anext(feed)
    assert [first.model, second.model] == ["coco", "lvis"]
    with pytest.raises(StopAsyncIteration):
        await anext(feed)
    feed.finish(first)
    assert feed.finished_through == 0
    feed.finish(second)
    assert feed.finished_through == 1


async def test_what_breaks_the_input_comes_after_the_lines_before_it():
    def read():
        yield InputLine(1, A, Uri(A))
        raise OSError(5, "Input/output error")

    feed = ItemFeed(LineSource(read=read, name="", countable=True), ("coco",))
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
    ("pulled", "total", "exhausted", "code", "sentence"),
    [
        (7, 10, False, 130, "line up to 7 has its results; 3 lines were not sent. To go on"),
        (7, None, False, 130, "the lines that were not reached were not sent. To go on"),
        (9, 10, False, 130, "; 1 line was not sent"),
        (10, 10, False, 0, ""),  # it came too late to leave anything out
        (10, None, True, 0, ""),
    ],
)
def test_an_interrupt_counts_only_if_lines_were_left(
    pulled: int, total: int | None, exhausted: bool, code: int, sentence: str
):
    position = Position(
        finished_through=pulled, pulled_lines=pulled, total_lines=total, exhausted=exhausted
    )
    ending = decide_ending(position, failed=0, interrupted=True)
    assert ending.exit_code == code
    assert sentence in ending.sentence
    assert bool(sentence) == bool(ending.sentence)
