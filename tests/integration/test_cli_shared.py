"""`run --ledger redis://…`, `--shard` and `export redis://…`: machines that share the work."""

import asyncio
import json

import cli_support
import pytest
from cli_support import build_urls, end, read_records, start, write_lines

from cloudinary_analyze import Captioning, LedgerError
from cloudinary_analyze.cli import main
from cloudinary_analyze.cli.shared import SharedRunLedger
from cloudinary_analyze.ledger import worker as ledger_room
from cloudinary_analyze.testing import build_response

cli_folder, start_emulator = cli_support.cli_folder, cli_support.start_emulator
pytestmark = pytest.mark.usefixtures("cli_folder")

URLS = build_urls(60)


@pytest.fixture
def url(shared_redis, monkeypatch):
    """The URL of an empty Redis."""
    import redis

    monkeypatch.setattr(ledger_room, "QUIET", 0.1)
    with redis.Redis.from_url(shared_redis.url) as client:
        client.flushall()
    return shared_redis.url


def run(url, *options, output="results.jsonl"):
    return main(
        ["run", "captioning", "--input", "urls.txt", "--ledger", url, "-o", output, *options]
    )


def test_another_machine_gets_the_responses_and_sends_nothing(start_emulator, url, capfd):
    emulator = start_emulator()
    write_lines(*URLS)
    assert run(url, output="one.jsonl") == 0
    assert run(url, output="two.jsonl") == 0
    assert emulator.counts.total_received == 60
    one, two = read_records("one.jsonl"), read_records("two.jsonl")
    assert [record["source"] for record in two] == URLS
    assert {record["restored"] for record in one} == {False}
    assert {record["restored"] for record in two} == {True}
    assert [record["analysis"] for record in one] == [record["analysis"] for record in two]


def test_shards_are_parts_with_the_lines_of_the_whole(start_emulator, url):
    emulator = start_emulator()
    write_lines(*URLS)
    lines = []
    for number in (1, 2, 3):
        assert run(url, "--shard", f"{number}/3", output=f"{number}.jsonl") == 0
        records = read_records(f"{number}.jsonl")
        assert len(records) == 20
        assert all(URLS[record["line"] - 1] == record["source"] for record in records)
        lines += [record["line"] for record in records]
    assert sorted(lines) == list(range(1, 61))
    assert emulator.counts.total_received == 60


async def test_runs_at_the_same_time_send_each_request_once(start_emulator, url, tmp_path):
    emulator = start_emulator(latency=0.02)
    write_lines(*URLS)
    arguments = [
        "run",
        "captioning",
        "--input",
        "urls.txt",
        "--ledger",
        url,
        "--permits",
        "4",
        "-o",
    ]
    async with (
        start(*arguments, "one.jsonl", folder=tmp_path, emulator=emulator) as one,
        start(*arguments, "two.jsonl", folder=tmp_path, emulator=emulator) as two,
    ):
        codes = [code for code, _, _ in await asyncio.gather(end(one), end(two))]
    assert codes == [0, 0]
    assert emulator.counts.total_received == 60
    assert len(read_records("one.jsonl")) == len(read_records("two.jsonl")) == 60


def test_permanent_errors_are_shared_too(start_emulator, url):
    emulator = start_emulator()
    write_lines("https://example.com/missing-404.jpg", *URLS[:3])
    first = run(url, output="one.jsonl")
    sent = emulator.counts.total_received
    assert run(url, output="two.jsonl") == first
    assert emulator.counts.total_received == sent


def test_a_shared_ledger_is_exported(start_emulator, url, capfd):
    start_emulator()
    write_lines(*URLS)
    for number in (1, 2):
        assert run(url, "--shard", f"{number}/2", output=f"{number}.jsonl") == 0
    assert main(["export", url, "-o", "all.csv"]) == 0
    assert main(["export", url, "-o", "all.jsonl", "--status", "ok"]) == 0
    assert sorted(record["source"] for record in read_records("all.jsonl")) == sorted(URLS)
    assert "60 items in all.jsonl" in capfd.readouterr().err


def test_the_password_comes_from_the_environment(start_emulator, url, monkeypatch, capfd):
    start_emulator()
    write_lines(*URLS)
    with_password = url.replace("//", "//:hunter2@")
    assert run(with_password) == 2
    assert main(["export", with_password, "-o", "all.csv"]) == 2
    shown = capfd.readouterr().err
    assert "REDIS_URL" in shown
    assert "hunter2" not in shown


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--shard", "0/3"], "I from 1 to N"),
        (["--shard", "4/3"], "I from 1 to N"),
        (["--shard", "x"], "must be I/N"),
        (["--shard", "1/\u0663"], "must be I/N"),
        (["--retry-failed"], "--retry-failed does not work"),
        (["--emulator"], "--emulator does not work"),
    ],
)
def test_options_that_do_not_fit_are_refused(start_emulator, url, options, sentence, capfd):
    emulator = start_emulator()
    write_lines(*URLS)
    assert run(url, *options) == 2
    assert sentence in " ".join(capfd.readouterr().err.split())
    assert emulator.counts.total_received == 0


def test_a_shared_ledger_needs_a_file_for_the_output(url, capfd):
    write_lines(*URLS)
    assert run(url, output="-") == 2
    assert "--output" in capfd.readouterr().err


def test_an_unreachable_redis_is_reported_before_anything_is_sent(
    start_emulator, capfd, monkeypatch
):
    from cloudinary_analyze.ledger import redis as room

    monkeypatch.setattr(room, "OPEN_PATIENCE", 0.2)
    emulator = start_emulator()
    write_lines(*URLS)
    assert run("redis://127.0.0.1:1/0") == 2
    assert "127.0.0.1:1" in capfd.readouterr().err
    assert emulator.counts.total_received == 0


def test_a_summary_names_the_file_of_the_run(start_emulator, url, cli_folder):
    start_emulator()
    write_lines(*URLS)
    assert run(url, "--summary-json", "summary.json") == 0
    summary = json.loads((cli_folder / "summary.json").read_bytes())
    assert summary["ledger"] == "results.jsonl.ledger"


async def test_a_response_that_redis_lost_is_in_the_file(tmp_path):
    class Failing:
        async def open(self, **_):
            pass

        async def aclose(self):
            pass

        async def find(self, _):
            return None

        async def record_response(self, *_, **__):
            raise LedgerError("Redis is gone.")

        record_submitted = record_response

    path = tmp_path / "a.ledger"
    async with SharedRunLedger(path, Failing(), patience=1) as ledger:
        await ledger.open(base_url="https://api.example.com", cloud_name="demo")
        request = Captioning("https://example.com/a.jpg")
        with pytest.raises(LedgerError, match="Redis is gone"):
            await ledger.record_response(request.key, build_response(request), seconds=1)
        with pytest.raises(LedgerError, match="Redis is gone"):
            await ledger.record_submitted("ab" * 32, "task")
        assert (await ledger.find(request.key)).response is not None
        assert (await ledger.find("ab" * 32)).task_id == "task"


def test_a_dry_run_does_not_ask_redis(start_emulator, url, capfd):
    emulator = start_emulator()
    write_lines(*URLS)
    assert run(url, "--dry-run") == 0
    assert "What other machines recorded in Redis" in capfd.readouterr().err
    assert not emulator.counts.total_received
