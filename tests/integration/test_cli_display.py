"""The messages of a run: summaries, JSON Lines, quiet runs, and the command for the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cli_support
import pytest
from cli_support import StartEmulator, build_urls, read_records, write_lines, write_urls

from cloudinary_analyze.cli import main
from cloudinary_analyze.cli import run as run_module
from cloudinary_analyze.cli import running as running_module
from cloudinary_analyze.cli.screen import MessageConsole
from cloudinary_analyze.emulator import FaultPlan
from cloudinary_analyze.progress import ProgressReporter, Reading

cli_folder, start_emulator = cli_support.cli_folder, cli_support.start_emulator
pytestmark = pytest.mark.usefixtures("cli_folder")

RUN = ["run", "captioning", "--input", "urls.txt"]


def read_summary() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("s.json").read_text(encoding="utf-8"))
    return found


def write_input(count: int = 12) -> None:
    write_urls(Path(), count)
    with Path("urls.txt").open("a", encoding="utf-8") as stream:
        stream.write("nonsense\nhttps://example.com/1.jpg\n")


def test_a_summary_holds_the_counts_of_the_run(start_emulator: StartEmulator) -> None:
    start_emulator(quotas={"object_detection": 5000})
    write_input()
    assert main([*RUN, "--summary-json", "s.json", "--max-calls", "5"]) == 3
    first = read_summary()
    assert (first["exit_code"], first["answered"], first["failed"], first["left"]) == (3, 6, 1, 7)
    assert "5 of 5 calls" in first["message"]
    assert "5 of 5 calls" in first["stopped"]["everything"]
    assert main([*RUN, "--summary-json", "s.json"]) == 1
    found = read_summary()
    records = read_records()
    assert found["items"] == len(records) == 14
    assert (found["answered"], found["failed"], found["left"]) == (13, 1, 0)
    assert found["answered_before"] == 6
    assert found["models"]["captioning"]["ok"] == 13
    assert found["models"]["captioning"]["median_seconds"] > 0
    assert found["units"] == {"object_detection": 7}
    assert found["quota"] == {"object_detection": 4988}
    assert found["calls"] == 7
    assert found["may_be_charged_twice"] == 0
    assert found["stopped"] == {}
    assert (found["output"], found["ledger"]) == ("results.jsonl", "results.jsonl.ledger")
    assert [cause["items"] for cause in found["causes"]] == [1]


def test_attempts_that_may_be_charged_twice_are_listed(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
) -> None:
    emulator = start_emulator(faults=FaultPlan(drop_response=0.3, error_503=0.3))
    write_urls(Path(), 40)
    assert main([*RUN, "--summary-json", "s.json", "--max-calls", "30"]) == 3
    found = read_summary()
    twice = found["may_be_charged_twice"]
    assert 3 < twice < 30
    assert emulator.counts.total_done == 30 + twice
    assert found["answered"] == 30
    assert found["retries"] > twice  # a 503 is free of charge
    assert f"{twice} attempts may have been charged twice" in capfd.readouterr().err


def test_calls_that_may_be_charged_for_nothing_are_listed(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
) -> None:
    start_emulator(faults=FaultPlan(drop_response=1.0))
    write_urls(Path(), 3)
    assert main([*RUN, "--summary-json", "s.json", "--attempts", "1"]) == 1
    assert read_summary()["failed_may_be_charged"] == 3
    assert "3 calls may have been charged without a result" in capfd.readouterr().err


def test_the_report_has_the_figures_of_the_summary(start_emulator: StartEmulator) -> None:
    start_emulator(quotas={"object_detection": 1000})
    write_lines(*build_urls(9), *build_urls(4), "nonsense")
    assert main([*RUN, "--summary-json", "s.json", "--report", "r.html"]) == 1
    found, page = read_summary(), Path("r.html").read_text(encoding="utf-8")
    ((feature, used),) = found["units"].items()
    assert used == 9
    assert f"{feature} <span>{used} used by this run</span>" in page
    (cause,) = found["causes"]
    assert cause["example"].startswith("line 14: ")
    assert cause["example"].removeprefix("line 14: ").split("'")[0] in page
    assert found["models"]["bad input lines"]["failed"] == 1
    assert "bad input lines" in page


def test_a_dry_run_writes_its_summary(start_emulator: StartEmulator) -> None:
    start_emulator()
    write_input()
    assert main([*RUN, "--dry-run", "--summary-json", "s.json"]) == 0
    found = read_summary()
    assert found["dry_run"] is True
    assert (found["rows"], found["invalid"], found["duplicates"]) == (14, 1, 1)
    assert found["calls"] == {"captioning": 12}


def test_a_summary_never_replaces_another_file(start_emulator: StartEmulator) -> None:
    emulator = start_emulator()
    write_input()
    for name in ("urls.txt", "./urls.txt", "results.jsonl", "results.jsonl.ledger"):
        assert main([*RUN, "--summary-json", name]) == 2
    assert not emulator.counts.total_received


def test_messages_are_json_lines(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
) -> None:
    start_emulator()
    write_input()
    assert main([*RUN, "--log-format", "json"]) == 1
    events = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert all({"time", "level", "message"} <= set(event) for event in events)
    (bad,) = [event for event in events if event["level"] == "warning"]
    assert bad["message"].startswith("line 13: ")
    (summary,) = [event["summary"] for event in events if event.get("event") == "summary"]
    assert (summary["answered"], summary["failed"]) == (13, 1)


INVALID = {
    "an unknown option": ["run", "coco", "--log-format", "json", "--bogus"],
    "an unknown model": ["run", "captionning", "--input", "a.txt", "--log-format", "json"],
    "before the models": ["run", "--log-format=json", "nonsense"],
    "a missing file": ["run", "coco", "--input", "missing.txt", "--log-format=json"],
    "an invalid value": ["run", "coco", "--permits", "many", "--log-format", "json"],
    "no command": ["--log-format", "json"],
    "another command": ["analyze", "coco", "nonsense", "--log-format", "json"],
    "credentials": ["run", "coco", "--input", "urls.txt", "--log-format", "json"],
}


@pytest.mark.parametrize("name", INVALID)
def test_errors_of_the_command_line_are_json_lines(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CLOUDINARY_URL", raising=False)
    write_urls(Path(), 1)
    assert main(INVALID[name]) == 2
    out, err = capfd.readouterr()
    assert not out
    (event,) = [json.loads(line) for line in err.splitlines()]
    assert event["level"] == "error"


@pytest.mark.parametrize("arguments", [["--log-format", "text"], ["--log-format"], []])
def test_errors_are_text_otherwise(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "nonsense", *arguments]) == 2
    assert not capfd.readouterr().err.startswith("{")


def test_a_dry_run_is_a_json_line_too(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
) -> None:
    start_emulator()
    write_input()
    assert main([*RUN, "--dry-run", "--log-format", "json"]) == 0
    events = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    (forecast,) = [event["forecast"] for event in events if event.get("event") == "dry_run"]
    assert forecast["calls"] == {"captioning": 12}


def test_progress_is_json_too(
    start_emulator: StartEmulator,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start_emulator(latency=0.05)
    write_input(60)

    def report_often(*arguments: Any) -> ProgressReporter:
        return ProgressReporter(*arguments, interval=0.05)

    monkeypatch.setattr(run_module, "ProgressReporter", report_often)
    arguments = [*RUN, "--log-format", "json", "--permits", "4"]
    assert main([*arguments, "--max-calls", "20"]) == 3
    capfd.readouterr()
    assert main(arguments) == 1
    events = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    progress = [event for event in events if event.get("event") == "progress"]
    assert len(progress) > 3
    assert progress[-1]["total"] == 62
    assert 20 <= progress[0]["done"] < progress[-1]["done"]  # those of the first run count


def test_items_that_are_left_are_neither_done_nor_failed(
    start_emulator: StartEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bar agrees with the summary after a budget or a quota stopped a model."""
    start_emulator(quotas={"object_detection": 7})
    write_urls(Path(), 60)
    runs: list[running_module.Run] = []
    measure = running_module.Run.measure

    def note(run: running_module.Run) -> Reading:
        runs.append(run)
        return measure(run)

    monkeypatch.setattr(running_module.Run, "measure", note)
    for command, done in (([*RUN, "--max-calls", "4"], 4), (RUN, 7)):
        assert main([*command, "--summary-json", "s.json"]) == 3
        reading = measure(runs[-1])
        assert (reading.done, reading.failed) == (done, 0)
        assert read_summary()["answered"] == done


@pytest.mark.parametrize("columns", ["200", "30", "20"])
def test_a_narrow_terminal_shows_every_figure(
    start_emulator: StartEmulator,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    columns: str,
) -> None:
    start_emulator()
    write_urls(Path(), 12)
    monkeypatch.setenv("COLUMNS", columns)
    assert main([*RUN, "--dry-run", "--max-calls", "9"]) == 0
    assert "--max-calls stops the run after 9 of the 12 calls" in capfd.readouterr().err
    assert main([*RUN, "--dry-run"]) == 0
    assert main(RUN) == 0
    assert "…" not in capfd.readouterr().err


def test_a_quiet_run_prints_only_how_it_ended(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
) -> None:
    start_emulator()
    write_urls(Path(), 9)
    assert main([*RUN, "--quiet", "--max-calls", "4"]) == 3
    err = capfd.readouterr().err
    assert "4 of 4 calls were spent" in err
    assert "median" not in err
    assert "Results:" not in err


def test_the_command_for_the_report_is_named(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
) -> None:
    start_emulator()
    write_urls(Path(), 2)
    for output, named in (("a b.jsonl", "'a b.jsonl'"), ("c.csv", "c.csv.ledger")):
        assert main([*RUN, "--output", output]) == 0
        (hint,) = [
            line for line in capfd.readouterr().err.splitlines() if line.startswith("Report: ")
        ]
        assert hint == f"Report: cloudinary-analyze report {named}"
    assert main(["report", "a b.jsonl"]) == 0
    assert main(["report", "c.csv.ledger"]) == 0
    assert main([*RUN, "--report", "r.html", "--output", "d.jsonl"]) == 0
    assert "Report: " not in capfd.readouterr().err


def test_non_text_is_left_out_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    console = MessageConsole(file=sys.stderr)
    console.as_json = True
    console.print("a table", object())
    console.log_event("\x1b[2J\u202e\ud800", more={"a": 1})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line)["more"] == {"a": 1}
