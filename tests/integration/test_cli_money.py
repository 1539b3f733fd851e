"""The spending of a run: dry runs, samples, limits, and reports of the cost."""

from __future__ import annotations

import asyncio
import json
import random
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import cli_support
import pytest
from cli_support import StartEmulator, build_urls, end, read_records, start, until, write_urls
from rich.console import Console

from cloudinary_analyze import (
    Answered,
    BadRequestError,
    Captioning,
    Coco,
    Credentials,
    Response,
    Spent,
)
from cloudinary_analyze.cli import main
from cloudinary_analyze.cli.ledger import find_rescued, open_book
from cloudinary_analyze.cli.money import Estimate, describe_spent, read_recorded_quota
from cloudinary_analyze.cli.service import Service
from cloudinary_analyze.emulator import Emulator
from cloudinary_analyze.ledger import SQLiteLedger

cli_folder, start_emulator = cli_support.cli_folder, cli_support.start_emulator
pytestmark = pytest.mark.usefixtures("cli_folder")

RUN = ["run", "captioning", "--input", "urls.txt"]
CAPTIONED = {"data": {"analysis": {"data": {"caption": "a cat"}}}}


def read_table(text: str) -> dict[str, str]:
    """Return the rows of the tables of two columns or more: name to first value."""
    rows = re.findall(r"^[│┃] ([^│┃]+?) +[│┃] +([^│┃]*?) +[│┃]", text, re.MULTILINE)
    return dict(rows)


def read_files() -> dict[str, bytes]:
    """Return the files of the folder, except those that SQLite creates for readers."""
    return {
        path.name: path.read_bytes()
        for path in Path().iterdir()
        if path.is_file() and not path.name.endswith(("-shm", "-wal"))
    }


def read_number(text: str) -> int:
    return int(text.replace(",", ""))


def write_random_input(seed: int) -> tuple[list[str], int]:
    """Write an input with duplicates and invalid rows. Return the models and the number of rows."""
    rng = random.Random(seed)
    count = rng.randrange(20, 120)
    rows = [
        rng.choice(["nonsense", "", "ftp://x/y"])
        if rng.random() < 0.1
        else f"https://example.com/{rng.randrange(1 + count * rng.randrange(1, 4) // 2)}.jpg"
        for _ in range(count)
    ]
    lines = ["id,url", *(f"{number},{row}" for number, row in enumerate(rows))]
    Path("in.csv").write_text("\n".join(lines), encoding="utf-8")
    models = rng.sample(["captioning", "coco", "google_tagging"], rng.randrange(1, 4))
    return models, count


@pytest.mark.parametrize("seed", range(10))
def test_a_dry_run_predicts_the_run(
    seed: int, start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
) -> None:
    emulator = start_emulator()
    models, rows = write_random_input(seed)
    run = ["run", *models, "--input", "in.csv"]
    if seed % 2:  # some items are already answered
        assert main([*run, "--max-calls", str(seed * 3)]) in {0, 1, 3}
    before = emulator.counts.total_done
    files = read_files()
    capfd.readouterr()
    assert main([*run, "--dry-run"]) == 0
    err = capfd.readouterr().err
    table = read_table(err)
    assert emulator.counts.total_received == before  # nothing was sent
    assert files == read_files()
    assert main(run) in {0, 1}
    calls = read_number(table["calls to make"])
    assert calls == emulator.counts.total_done - before
    by_addon = sum(
        read_number(table[name]) for name in ("object_detection", "google_tagging") if name in table
    )
    assert by_addon == calls
    records = read_records()
    invalid = [record for record in records if record["model"] is None]
    assert read_number(table["rows"]) == rows
    assert read_number(table["invalid"]) == len(invalid)
    shown = sum(
        read_number(table[name])
        for name in ("invalid", "answered already", "duplicates", "calls to make")
    )
    assert shown == len(records) == read_number(table["items (rows × models)"])


def test_a_dry_run_of_a_stream_counts_each_row(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
) -> None:
    emulator = start_emulator()
    Path("urls.txt").write_text("https://a.b/1.jpg\n" * 3, encoding="utf-8")
    assert main([*RUN, "--output", "-", "--dry-run"]) == 0
    out, err = capfd.readouterr()
    assert not out
    assert read_table(err)["calls to make"] == "3"
    assert main([*RUN, "--output", "-"]) == 0
    assert emulator.counts.total_done == 3
    assert [path.name for path in Path().iterdir()] == ["urls.txt"]


def test_a_dry_run_shows_the_quota_as_it_was_recorded(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
) -> None:
    start_emulator(quotas={"object_detection": 5000})
    write_urls(Path(), 30)
    assert main([*RUN, "--dry-run"]) == 0
    assert read_table(capfd.readouterr().err)["object_detection"] == "30"
    assert main([*RUN, "--limit", "12", "--permits", "1"]) == 0  # the newest response is the last
    capfd.readouterr()
    assert main([*RUN, "--dry-run"]) == 0
    assert re.search(
        r"object_detection +│ +18 +│ +4,988 +│ 20\d\d-\d\d-\d\d", capfd.readouterr().err
    )


def test_a_dry_run_retries_what_the_run_retries(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
) -> None:
    start_emulator()
    Path("urls.txt").write_text("https://a.b/1.jpg\nhttps://a.b/2.jpg\n", encoding="utf-8")
    assert main(RUN) == 0
    with closing(sqlite3.connect("results.jsonl.ledger")) as connection:
        error = {"type": "BadRequestError", "message": "No.", "fields": {}}
        connection.execute("UPDATE records SET state = 3 WHERE id = 1")
        connection.execute(
            "UPDATE answers SET content = ? WHERE record = 1", (json.dumps(error).encode(),)
        )
        connection.commit()
    for extra, calls in (([], "0"), (["--retry-failed"], "1")):
        capfd.readouterr()
        assert main([*RUN, *extra, "--dry-run"]) == 0
        assert read_table(capfd.readouterr().err)["calls to make"] == calls


def test_a_sample_is_spread_and_the_rest_is_estimated(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
) -> None:
    emulator = start_emulator()
    write_urls(Path(), 400)
    run = ["run", "ai_vision_general", "--prompt", "What?", "--input", "urls.txt"]
    assert main([*run, "--sample", "20"]) == 0
    err = capfd.readouterr().err
    lines = [record["line"] for record in read_records()]
    assert len(lines) == emulator.counts.total_done == 20
    assert {(line - 1) // 20 for line in lines} == set(range(20))
    estimate = re.search(
        r"The other 380 calls will cost about ([\d,]+) units of ai_vision \(95 %: ([\d,]+) to "
        r"([\d,]+)\)",
        err,
    )
    assert estimate
    about, low, high = map(read_number, estimate.groups())
    assert main(run) == 0
    used = [
        limit["used_by_request"]
        for record in read_records()
        if not record["restored"]
        for limit in record["limits"]
    ]
    assert len(used) == 380
    assert low <= sum(used) <= high
    assert abs(about - sum(used)) < 0.1 * sum(used)


def test_a_sample_larger_than_the_input_takes_all(start_emulator: StartEmulator) -> None:
    emulator = start_emulator()
    write_urls(Path(), 7)
    assert main([*RUN, "--sample", "20"]) == 0
    assert emulator.counts.total_done == 7


@pytest.mark.parametrize("permits", ["1", "64"])
def test_max_calls_is_exact_and_ends_with_3(
    permits: str, start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
) -> None:
    emulator = start_emulator()
    write_urls(Path(), 100)
    for run in (1, 2):
        assert main([*RUN, "--permits", permits, "--max-calls", "30"]) == 3
        err = capfd.readouterr().err
        assert emulator.counts.total_done == len(read_records()) == 30 * run
        assert "30 of 30 calls were spent" in err
        assert f"{30 * run} items are answered, {100 - 30 * run} left" in err
    assert main([*RUN, "--max-calls", "40"]) == 0
    assert emulator.counts.total_done == 100


def test_max_units_stops_its_feature_alone(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
) -> None:
    emulator = start_emulator()
    write_urls(Path(), 60)
    run = ["run", "captioning", "ai_vision_general", "--prompt", "What?", "--input", "urls.txt"]
    assert main([*run, "--max-units", "ai_vision=9000"]) == 3
    err = capfd.readouterr().err
    models = [record["model"] for record in read_records()]
    assert models.count("captioning") == 60
    spent = re.search(r"([\d,]+) of 9,000 units of ai_vision were spent", err)
    assert spent
    assert 8000 < read_number(spent[1]) <= 9000
    assert "The other models continued." in err
    assert emulator.counts.total_done == len(models)


def test_a_used_up_quota_is_named_and_the_others_continue(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
) -> None:
    start_emulator(quotas={"ai_vision": 500, "object_detection": 1000})
    write_urls(Path(), 40)
    run = ["run", "captioning", "ai_vision_general", "--prompt", "What?", "--input", "urls.txt"]
    assert main([*run, "--permits", "2"]) == 3
    err = capfd.readouterr().err
    assert [r["model"] for r in read_records()].count("captioning") == 40
    assert "Stopped sending ai_vision: " in err
    assert "The other models continued." in err
    assert "every remaining item" not in err


def test_a_missing_add_on_stops_its_model_alone(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
) -> None:
    emulator = start_emulator(unsubscribed={"google_tagging"})
    write_urls(Path(), 40)
    run = ["run", "captioning", "google_tagging", "--input", "urls.txt", "--permits", "2"]
    assert main(run) == 3
    err = capfd.readouterr().err
    assert [record["model"] for record in read_records()] == ["captioning"] * 40
    assert "Stopped sending google_tagging: " in err
    assert "40 items are answered, 40 left" in err
    assert emulator.counts.total_received < 50


def test_many_items_of_a_stopped_model_do_not_end_the_run(start_emulator: StartEmulator) -> None:
    start_emulator(unsubscribed={"google_tagging"})
    write_urls(Path(), 20)
    assert main([*RUN, "--permits", "2"]) == 0
    write_urls(Path(), 23)
    run = ["run", "google_tagging", "captioning", "--input", "urls.txt", "--permits", "2"]
    assert main(run) == 3
    assert [record["model"] for record in read_records()] == ["captioning"] * 23


def test_an_estimate_is_of_calls_that_were_paid() -> None:
    request = Captioning(build_urls(1)[0])
    limits = {"addons_quota": [{"type": "object_detection", "used_by_request": 5}]}
    response = Response.from_raw(request, CAPTIONED | {"limits": limits})
    estimate = Estimate()
    for restored in (False, True):
        outcome = Answered(item=0, index=0, request=request, response=response, restored=restored)
        estimate.add(outcome)
    assert estimate.count_calls("captioning") == 1
    assert estimate.extrapolate({"captioning": 10}) == {"object_detection": (10, 50.0, 0.0)}


@pytest.mark.parametrize("models", [(Captioning, Coco), (Coco, Captioning)])
async def test_the_newest_recorded_quota_is_shown(tmp_path: Path, models: Any) -> None:
    path = tmp_path / "a.ledger"
    async with SQLiteLedger(path) as ledger:
        await ledger.open(base_url="https://h", cloud_name="demo")
        for index, model in enumerate(models):
            request = model(build_urls(1)[0])
            left = 100 - 50 * index
            limits = {"addons_quota": [{"type": "object_detection", "remaining": left}]}
            await ledger.note_item(
                request.key, source=str(request.source), model=request.model, index=index
            )
            response = Response.from_raw(request, CAPTIONED | {"limits": limits})
            await ledger.record_response(request.key, response, seconds=1)
            await asyncio.sleep(0.01)  # the time of the record is real
    assert read_recorded_quota(path)["object_detection"][0].remaining == 50


def test_units_above_a_limit_are_reported() -> None:
    spent = Spent(calls=3, units={"ai_vision": 120}, overshoot={"ai_vision": 20})
    assert describe_spent(spent) == (
        "Spent by this run: 3 calls, 120 units of ai_vision. "
        "The limit of ai_vision was exceeded by 20 units."
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--max-units", "ai_vision"], "must be FEATURE=N"),
        (["--max-units", "ai_vision=x"], "must be FEATURE=N"),
        (["--max-units", "ai_vision=5"], "no model of this run uses 'ai_vision'"),
        (["--max-calls", "-1"], "--max-calls"),
        (["--sample", "0"], "--sample"),
        (["--sample", "3", "--dry-run"], "takes no --sample"),
        (["--sample", "3", "--output", "-"], "needs a ledger"),
        (["--attempts", "0"], "attempts"),
        (["--read-timeout", "-1"], "read_timeout"),
        (["--host", "not a host"], "host"),
        (["--host", "api-eu.cloudinary.com", "--emulator"], "--host has no meaning"),
    ],
)
def test_limits_that_cannot_work_are_refused(
    options: list[str],
    sentence: str,
    start_emulator: StartEmulator,
    capfd: pytest.CaptureFixture[str],
) -> None:
    emulator = start_emulator()
    write_urls(Path(), 3)
    assert main([*RUN, *options]) == 2
    assert re.search(sentence, capfd.readouterr().err)
    assert not emulator.counts.total_received


def test_settings_are_options(start_emulator: StartEmulator) -> None:
    emulator = start_emulator()
    write_urls(Path(), 3)
    options = ["--attempts", "2", "--connect-timeout", "3", "--read-timeout", "9.5"]
    options += ["--call-timeout", "30", "--task-timeout", "60", "--no-retry-ambiguous"]
    assert main([*RUN, *options, "--host", emulator.url]) == 0
    assert emulator.counts.total_done == 3


# a ledger that cannot be written


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with closing(sqlite3.connect(path, timeout=60, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


@pytest.mark.slow
async def test_the_next_run_reads_rescued_responses(tmp_path: Path) -> None:
    write_urls(tmp_path, 600)
    ledger = tmp_path / "results.jsonl.ledger"
    run = [*RUN, "--ledger-patience", "1", "--permits", "8"]
    async with Emulator(latency=0.02) as emulator:
        async with start(*run, folder=tmp_path, emulator=emulator) as process:
            await until(lambda: emulator.counts.total_done > 40)
            with locked(ledger):
                code, _, err = await end(process)
        assert code == 3, err
        assert "Traceback" not in err
        paid = emulator.counts.total_done
        assert paid < 600
        (saved,) = [path for path in find_rescued(ledger) if path.exists()]
        assert f" are saved in {saved}" in err.replace("\n", "")
        assert saved.stat().st_mode & 0o077 == 0
        recorded = SQLiteLedger(ledger).counts().answered
        assert recorded + SQLiteLedger(saved).counts().answered == paid
        async with start(*run, folder=tmp_path, emulator=emulator) as process:
            code, _, err = await end(process)
        assert code == 0, err
        assert emulator.counts.total_done == 600  # nothing was charged twice
        assert not saved.exists()
    assert [record["source"] for record in read_records()] == build_urls(600)


def test_a_dry_run_counts_rescued_responses(
    tmp_path: Path, start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
) -> None:
    start_emulator()
    write_urls(tmp_path, 5)
    assert main(RUN) == 0
    ledger = tmp_path / "results.jsonl.ledger"
    saved = next(iter(find_rescued(ledger)))
    saved.parent.mkdir(parents=True, mode=0o700)
    saved.write_bytes(ledger.read_bytes())
    with closing(sqlite3.connect(ledger)) as connection:
        connection.execute("UPDATE records SET state = 0")
        connection.commit()
    capfd.readouterr()
    assert main([*RUN, "--dry-run"]) == 0
    assert read_table(capfd.readouterr().err)["answered already"] == "5"


async def test_retrying_failed_items_includes_saved_errors(tmp_path: Path) -> None:
    request = Captioning("https://example.com/1.jpg")
    error = BadRequestError("No.", status=400)
    path = tmp_path / "run.ledger"
    saved = next(iter(find_rescued(path)))
    saved.parent.mkdir(parents=True, mode=0o700)
    service = Service(credentials=Credentials("demo", "key", "secret"))
    async with SQLiteLedger(saved) as ledger:
        await ledger.open(**service.identify())
        await ledger.record_error(request.key, error, seconds=1)
    options: dict[str, Any] = {"patience": 1, "console": Console(quiet=True)}
    async with open_book(path, service, {}, retry_failed=True, **options) as book:
        assert await book.ledger.find(request.key) is None


def test_saved_responses_of_another_cloud_do_not_stop_a_run(
    tmp_path: Path, start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
) -> None:
    emulator = start_emulator()
    write_urls(tmp_path, 5)
    saved = next(iter(find_rescued(tmp_path / "results.jsonl.ledger")))
    saved.parent.mkdir(parents=True, mode=0o700)
    saved.write_bytes(b"not a ledger" * 100)
    assert main([*RUN, "--dry-run"]) == 0
    assert main(RUN) == 0
    assert "Saved responses were not read" in capfd.readouterr().err
    assert emulator.counts.total_done == 5
    assert saved.exists()


def test_a_rescued_file_in_an_open_directory_is_ignored(
    tmp_path: Path, start_emulator: StartEmulator
) -> None:
    emulator = start_emulator()
    write_urls(tmp_path, 5)
    ledger = tmp_path / "results.jsonl.ledger"
    saved = next(iter(find_rescued(ledger)))
    saved.parent.mkdir(parents=True)
    saved.parent.chmod(0o777)
    request = Captioning(build_urls(1)[0])

    async def plant() -> None:
        async with SQLiteLedger(saved) as planted:
            await planted.open(base_url=emulator.url, cloud_name=emulator.cloud_name)
            response = Response.from_raw(request, CAPTIONED)
            await planted.record_response(request.key, response, seconds=1)

    asyncio.run(plant())
    assert main(RUN) == 0
    assert emulator.counts.total_done == 5
    assert saved.exists()
