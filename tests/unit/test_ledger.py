"""The ledger file: what it stores, what it refuses, and that it never changes foreign files."""

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudinary_analyze import errors as error_tree
from cloudinary_analyze._policy import is_final
from cloudinary_analyze._wire.protocol import read_error
from cloudinary_analyze.errors import (
    AnalyzeError,
    BadRequestError,
    InvalidRequestError,
    LedgerError,
    NotFoundError,
    QuotaExceededError,
    ResultNotDeliveredError,
    TaskFailedError,
)
from cloudinary_analyze.ledger import file as ledger_file
from cloudinary_analyze.ledger.encoding import dump_error, load_error
from cloudinary_analyze.ledger.items import RecordSet
from cloudinary_analyze.ledger.sqlite import SQLiteLedger, build_row
from cloudinary_analyze.ledger.writer import Entry
from cloudinary_analyze.requests import (
    AIVisionGeneral,
    AIVisionTagging,
    Asset,
    Captioning,
    Coco,
    KeyBuilder,
    OtherModel,
    TagDefinition,
    Uri,
)
from cloudinary_analyze.responses import Limit, Response, TaskStatus

OWNER = {"base_url": "https://api.example.com", "cloud_name": "demo"}
KEYS = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(4)]


def respond(number):
    return Response(None, model="captioning", raw={"data": {"number": number}, "odd": 2**70})


@contextlib.asynccontextmanager
async def opened(path, **owner):
    async with SQLiteLedger(path) as ledger:
        await ledger.open(**{**OWNER, **owner})
        yield ledger


async def is_done(ledger, key):
    record = await ledger.find(key)
    return record is not None and (record.response is not None or record.error is not None)


async def fill(path, count=3):
    async with opened(path) as ledger:
        await asyncio.gather(
            *[ledger.record_response(KEYS[n], respond(n), seconds=0.5) for n in range(count)]
        )


def list_bytes(path):
    """Return the files of a directory, without those that only coordinate writers and readers."""
    return {
        file.name: file.read_bytes()
        for file in path.iterdir()
        if not file.name.endswith(("-lock", "-shm"))
    }


# what the ledger stores


@pytest.mark.parametrize(
    "error",
    [
        BadRequestError(
            "No.",
            status=400,
            code="MA_1",
            details={"a": [1, {"b": "\ud800"}]},
            raw_body=b"\xff\0{",
            limits=(Limit("x", remaining=0, reset_time=datetime(2026, 1, 2, tzinfo=UTC)),),
            retry_after=1.5,
            ambiguous=True,
        ),
        QuotaExceededError("Used up.", status=429, feature="ai", reset_time=1.0, limits=()),
        TaskFailedError("Failed.", task_id="t", cause_known=False),
        ResultNotDeliveredError(
            "Lost.", task_id="t", last_status=TaskStatus("t", "completed", raw={"data": {}})
        ),
        read_error(404, {}, b'{"error": {"message": "gone"}}', now=0.0, model="captioning"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_is_stored_as_json_and_restored(error):
    again = load_error(dump_error(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_an_unknown_error_class_keeps_only_its_message():
    for name in ("FutureError", "Final", "shorten", "__builtins__"):
        again = load_error(b'{"type": "%s", "message": "m", "fields": {"a": 1}}' % name.encode())
        assert type(again) is AnalyzeError
        assert again.message == "m"


def test_every_error_class_can_be_stored():
    for kind in vars(error_tree).values():
        if isinstance(kind, type) and issubclass(kind, AnalyzeError):
            assert type(load_error(dump_error(kind("m")))) is kind


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("task"), st.sampled_from(KEYS), st.integers(0, 9)),
        st.tuples(st.just("response"), st.sampled_from(KEYS), st.integers(0, 9)),
        st.tuples(st.just("error"), st.sampled_from(KEYS), st.integers(0, 9)),
        st.tuples(st.just("item"), st.sampled_from(KEYS), st.integers(0, 9)),
        st.just(("forget errors",)),
        st.just(("reopen",)),
    ),
    max_size=20,
)


def expect(known, operation, number):
    """The rule, as a table: task id, state and number of a key after an operation."""
    task_id, state, value = known
    if operation == "task":
        return (task_id, state, value) if state else (f"task-{number}", None, None)
    if operation == "error" and state == "response":
        return known
    return (task_id, operation, number)


@pytest.mark.slow
@settings(max_examples=60)
@given(OPERATIONS)
def test_the_last_final_record_wins_and_responses_stay(operations):
    async def perform(path):
        expected = {}
        noted = {}
        ledger = SQLiteLedger(path)
        await ledger.open(**OWNER)
        jobs = []
        for name, *rest in [*operations, ("reopen",)]:
            if name == "reopen":
                # these writes have begun, so they finish although their waits were cancelled
                await asyncio.sleep(0)
                await ledger.aclose()
                await asyncio.gather(*jobs)
                jobs.clear()
                await ledger.open(**OWNER)
                continue
            if name == "forget errors":
                jobs.append(asyncio.create_task(ledger.forget_errors()))
                expected = {k: known for k, known in expected.items() if known[1] != "error"}
                continue
            key, number = rest
            if name == "item":
                noted[number] = key
                await ledger.add_item(number, build_row(source="s", line=1, model="coco", key=key))
                continue
            expected[key] = expect(expected.get(key, (None, None, None)), name, number)
            if name == "task":
                job = ledger.record_submitted(key, f"task-{number}")
            elif name == "response":
                job = ledger.record_response(key, respond(number), seconds=number)
            else:
                error = TaskFailedError("m", task_id=str(number))
                job = ledger.record_error(key, error, seconds=number)
            jobs.append(asyncio.create_task(job))
        for key in KEYS:
            record = await ledger.find(key)
            if key not in expected:
                assert record is None
                continue
            task_id, state, number = expected[key]
            assert record.task_id == task_id
            assert record.response == (respond(number).raw if state == "response" else None)
            assert (record.error and record.error.task_id) == (
                str(number) if state == "error" else None
            )
            assert record.seconds == (number if state else None)
        await ledger.flush()
        assert {item.index: item.key for item in ledger.iter_items()} == noted
        for item in ledger.iter_items():
            task_id, state, number = expected.get(item.key, (None, None, None))
            assert (item.task_id, item.done) == (task_id, state is not None)
            assert item.response == (respond(number).raw if state == "response" else None)
        states = [known[1] for known in expected.values()]
        counts = ledger.counts()
        assert counts.answered == states.count("response")
        assert counts.failed == states.count("error")
        assert counts.submitted == states.count(None)
        await ledger.aclose()

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(perform(Path(directory) / "a.ledger"))


async def test_an_error_never_replaces_a_response(tmp_path):
    request = Captioning("https://example.com/a.jpg")
    raw = {"data": {"analysis": {"data": {"caption": "A cat"}}}}
    async with SQLiteLedger(tmp_path / "a.ledger") as ledger:
        await ledger.open(base_url="https://h", cloud_name="demo")
        response = Response.from_raw(request, raw)
        await ledger.record_response(request.key, response, seconds=1)
        await ledger.record_error(request.key, NotFoundError("gone"), seconds=1)
        await ledger.record_submitted(request.key, "late")
        found = await ledger.find(request.key)
        assert ledger.counts().answered == 1
    assert (found.response, found.error) == (raw, None)


async def test_a_record_with_a_cancelled_wait_is_kept(tmp_path):
    async with opened(tmp_path / "a.ledger") as ledger:
        job = asyncio.create_task(ledger.record_response(KEYS[0], respond(1), seconds=1))
        await asyncio.sleep(0)
        job.cancel()
        assert (await ledger.find(KEYS[0])).response == respond(1).raw
        await asyncio.wait([job])
        assert job.cancelled()
    async with opened(tmp_path / "a.ledger") as ledger:
        assert await is_done(ledger, KEYS[0])


# items


async def test_each_item_is_listed_once_in_order_with_its_state(tmp_path):
    path = tmp_path / "a.ledger"
    bad = InvalidRequestError("no URL")
    async with opened(path) as ledger:
        for index in reversed(range(1200)):
            await ledger.add_item(
                index,
                build_row(line=index + 1, source=f"s{index}", model="coco", key=KEYS[index % 4]),
            )
        await ledger.add_item(1, build_row(line=2, source="half \ud800", error=bad))
        await ledger.record_response(KEYS[0], respond(0), seconds=0.25)
        await ledger.record_error(KEYS[2], TaskFailedError("m", task_id="t"), seconds=1)
        await ledger.record_submitted(KEYS[3], "task-3")
        items = list(ledger.iter_items())  # while it is open
    again = list(SQLiteLedger(path).iter_items())  # and without opening it
    assert [item.index for item in items] == [item.index for item in again] == list(range(1200))
    assert (items[4].response, items[4].seconds, items[4].key) == (respond(0).raw, 0.25, KEYS[0])
    assert items[1].error.message == "no URL"
    assert (items[1].model, items[1].key, items[1].source) == (None, None, "half ?")
    assert type(items[2].error) is TaskFailedError
    assert (items[3].done, items[3].task_id, items[3].line) == (False, "task-3", 4)
    assert not items[5].done
    assert again[7] == items[7]


def build_rows(*keys, model="coco", **fields):
    return [
        build_row(source=f"s{key}", line=line, model=model, key=key, **fields)
        if key is not None
        else build_row(source="bad", line=line, error=InvalidRequestError("no URL"))
        for line, key in enumerate(keys, start=1)
    ]


def list_keys(ledger):
    return [item.key for item in ledger.iter_items()]


async def test_an_input_replaces_the_items_and_is_counted(tmp_path):
    async with opened(tmp_path / "a.ledger") as ledger:
        rows = build_rows(KEYS[0], KEYS[1], None, KEYS[1], KEYS[2], KEYS[3])
        first = await ledger.replace_items(lambda: rows)
        assert (first.items, first.bad, first.repeated.total(), first.done) == (6, 1, 1, 0)
        assert (first.changed, first.other, first.displaced) == (6, 0, False)
        assert first.calls == {"coco": 4}
        await ledger.record_response(KEYS[1], respond(0), seconds=0)
        await ledger.record_error(KEYS[3], TaskFailedError("m", task_id="t"), seconds=0)
        again = await ledger.replace_items(lambda: rows)
        assert (again.done, again.changed, again.displaced) == (3, 0, False)
        assert again.calls == {"coco": 2}
        shorter = await ledger.replace_items(lambda: rows[:3])
        assert (shorter.items, shorter.other, shorter.displaced) == (3, 1, True)
        assert list_keys(ledger) == [KEYS[0], KEYS[1], None]


async def test_swapped_answers_count_as_displaced(tmp_path):
    async with opened(tmp_path / "a.ledger") as ledger:
        await ledger.replace_items(lambda: build_rows(KEYS[0]))
        for key in KEYS[:2]:
            await ledger.record_response(key, respond(0), seconds=0)
        swapped = await ledger.replace_items(lambda: build_rows(KEYS[1]))
        assert (swapped.done, swapped.other, swapped.displaced) == (1, 1, True)


async def test_a_failed_input_leaves_the_items_unchanged(tmp_path):
    def break_off():
        yield from build_rows(KEYS[1], KEYS[2])
        raise OSError(5, "Input/output error")

    async with opened(tmp_path / "a.ledger") as ledger:
        await ledger.replace_items(lambda: build_rows(KEYS[0]))
        with pytest.raises(OSError, match="Input/output"):
            await ledger.replace_items(break_off)
        assert list_keys(ledger) == [KEYS[0]]
        await ledger.record_response(KEYS[1], respond(0), seconds=0)  # it can still be written


@pytest.mark.parametrize(
    "change",
    [
        {"line": 9},
        {"source": "other"},
        {"file": "b.csv"},
        {"name": "n"},
        {"columns": b'{"a":1}'},
        {"model": "lvis"},
    ],
    ids=lambda change: next(iter(change)),
)
async def test_every_difference_of_an_item_is_recorded(tmp_path, change):
    fields = {"line": 1, "source": "s", "model": "coco", "key": KEYS[0]}
    async with opened(tmp_path / "a.ledger") as ledger:
        await ledger.replace_items(lambda: [build_row(**fields)])
        assert (await ledger.replace_items(lambda: [build_row(**fields | change)])).changed == 1
        (item,) = ledger.iter_items()
        for name, value in change.items():
            assert getattr(item, name) == ({"a": 1} if name == "columns" else value)


async def test_a_key_of_another_source_is_refused_in_later_runs(tmp_path):
    def build(source):
        return lambda: [build_row(source=source, model="coco", key=KEYS[0], name="sku")]

    async with opened(tmp_path / "a.ledger") as ledger:
        await ledger.replace_items(build("https://a.example/1.jpg?signature=a"))
        await ledger.note_source(KEYS[0], "https://a.example/1.jpg?signature=a")
        await ledger.record_response(KEYS[0], respond(0), seconds=0)
        signed = await ledger.replace_items(build("https://a.example/1.jpg?signature=b"))
        assert (signed.done, signed.bad) == (1, 0)
        moved = await ledger.replace_items(build("https://a.example/2.jpg"))
        assert (moved.done, moved.bad) == (0, 1)
        (item,) = ledger.iter_items()
        assert "knows the key 'sku' as 'https://a.example/1.jpg" in item.error.message
        assert item.source == "https://a.example/2.jpg"


async def test_a_locked_replacement_reads_the_items_again(tmp_path):
    path = tmp_path / "a.ledger"
    async with opened(path) as ledger:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        replacing = asyncio.create_task(ledger.replace_items(lambda: iter(build_rows(*KEYS))))
        while ledger._writer.trouble is None:
            await asyncio.sleep(0.01)
        other.execute("ROLLBACK")
        other.close()
        assert (await replacing).items == 4
        assert list_keys(ledger) == KEYS


async def test_only_charges_of_the_latest_run_are_not_restored(tmp_path):
    path = tmp_path / "a.ledger"
    async with opened(path) as ledger:
        await ledger.replace_items(lambda: build_rows(KEYS[0], KEYS[1], KEYS[0]))
        await ledger.record_response(KEYS[0], respond(0), seconds=0)
        assert [item.restored for item in ledger.iter_items()] == [False, False, True]
    async with opened(path) as ledger:
        await ledger.record_response(KEYS[1], respond(0), seconds=0)
        assert [item.restored for item in ledger.iter_items()] == [True, False, True]


async def test_open_items_among_many_done_ones_are_in_order(tmp_path):
    keys = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(12_000)]
    left = [3, 4999, 5000, 11_999]
    async with opened(tmp_path / "a.ledger") as ledger:
        await ledger.replace_items(lambda: build_rows(*keys, None))
        done = set(range(12_000)) - set(left)
        await asyncio.gather(
            *[ledger.record_response(keys[n], respond(0), seconds=0) for n in done]
        )
        assert [item.index for item in ledger.iter_noted(open_only=True)] == left
        noted = list(ledger.iter_noted(open_only=False))
        assert [item.key for item in noted] == [*keys, None]
        assert noted[-1].error.message == "no URL"


def test_reading_a_missing_ledger_creates_none(tmp_path):
    with pytest.raises(LedgerError, match="does not exist"):
        SQLiteLedger(tmp_path / "a.ledger").counts()
    assert not list(tmp_path.iterdir())


# what the ledger refuses and leaves unchanged


def damage_middle(path):
    content = bytearray(path.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    path.write_bytes(content)


def damage_items(path):
    query = "SELECT rootpage FROM sqlite_master WHERE name = 'items'"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        ((page,),) = connection.execute(query)
    content = bytearray(path.read_bytes())
    content[4096 * (page - 1) : 4096 * page] = os.urandom(4096)
    path.write_bytes(content)


def make_database(path):
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript("PRAGMA journal_mode = WAL; CREATE TABLE theirs (a)")


def make_newer(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(b"a caption\n" * 99), "damaged, or not a ledger"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "damaged"),
        (damage_middle, "damaged"),
        (damage_items, "damaged"),
        (make_database, "a database, but not a ledger"),
        (make_newer, "has format 99"),
    ],
    ids=["text", "cut short", "overwritten", "items", "other database", "newer format"],
)
async def test_a_damaged_ledger_is_refused_unchanged(tmp_path, spoil, message):
    path = tmp_path / "a.ledger"
    await fill(path)
    spoil(path)
    before = list_bytes(tmp_path)
    async with SQLiteLedger(path) as ledger:
        with pytest.raises(LedgerError, match=message):
            await ledger.open(**OWNER)
    assert list_bytes(tmp_path) == before


async def test_a_large_ledger_that_is_cut_short_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.ledger"
    await fill(path)
    path.write_bytes(path.read_bytes()[:-1])
    monkeypatch.setattr(ledger_file, "LARGEST_CHECKED", 0)
    async with SQLiteLedger(path) as ledger:
        with pytest.raises(LedgerError, match="1 bytes are missing at its end"):
            await ledger.open(**OWNER)


async def test_steps_of_a_failed_commit_keep_their_order(tmp_path):
    done = []

    async with opened(tmp_path / "a.ledger") as ledger:

        def first(_):
            if not done:
                done.append("busy")
                ledger._use().put(Entry(lambda _: done.append("second")))
                error = sqlite3.OperationalError("locked")
                error.sqlite_errorname = "SQLITE_BUSY"
                raise error
            done.append("first")

        async with asyncio.timeout(20):
            await ledger._use().perform(first)
            await ledger.flush()
    assert done == ["busy", "first", "second"]


@pytest.mark.parametrize("killed", [False, True], ids=["closed", "killed"])
@pytest.mark.parametrize("owner", [{"cloud_name": "other"}, {"base_url": "https://eu.example.com"}])
async def test_a_ledger_of_another_cloud_is_refused_unchanged(tmp_path, owner, killed):
    path = tmp_path / "own" / "a.ledger"
    path.parent.mkdir()
    await fill(path)
    if killed:  # the log is not written back yet
        async with opened(path) as ledger:
            await ledger.record_response(KEYS[3], respond(3), seconds=0)
            shutil.copytree(path.parent, tmp_path / "copy")
        path = tmp_path / "copy" / "a.ledger"
    before = list_bytes(path.parent)
    assert ("a.ledger-wal" in before) == killed
    async with SQLiteLedger(path) as ledger:
        with pytest.raises(LedgerError, match=r"belongs to demo at https://api\.example\.com"):
            await ledger.open(**{**OWNER, **owner})
    assert list_bytes(path.parent) == before
    async with opened(path) as ledger:
        assert await is_done(ledger, KEYS[0])
        assert await is_done(ledger, KEYS[3]) == killed


@pytest.mark.parametrize("pages", range(1, 9))
async def test_a_kill_during_a_checkpoint_loses_nothing(tmp_path, pages):
    path, copy = tmp_path / "own" / "a.ledger", tmp_path / "copy" / "a.ledger"
    path.parent.mkdir()
    async with opened(path) as ledger:
        for key in KEYS:
            await ledger.record_response(key, respond("x" * 5000), seconds=0)
        shutil.copytree(path.parent, copy.parent)
    emptied = path.read_bytes()
    assert len(emptied) >= 9 * 4096
    copy.write_bytes(emptied[: pages * 4096] + copy.read_bytes()[pages * 4096 :])
    async with opened(copy) as ledger:
        assert [key for key in KEYS if not await is_done(ledger, key)] == []


async def test_a_log_without_its_ledger_is_refused(tmp_path):
    path = tmp_path / "a.ledger"
    (tmp_path / "a.ledger-wal").write_bytes(b"records")
    async with SQLiteLedger(path) as ledger:
        with pytest.raises(LedgerError, match=r"its log a\.ledger-wal exists and holds records"):
            await ledger.open(**OWNER)


async def test_a_second_writer_is_refused_in_any_process(tmp_path):
    path = tmp_path / "a.ledger"
    async with opened(path) as ledger:
        async with SQLiteLedger(path) as second:
            with pytest.raises(LedgerError, match="in use by another process"):
                await second.open(**OWNER)
        other = await asyncio.to_thread(run_script, "await ledger.open(**OWNER)", path)
        assert "in use by another process" in other.stderr
        await ledger.record_response(KEYS[0], respond(0), seconds=0)
    async with opened(path) as ledger:
        assert await is_done(ledger, KEYS[0])


async def test_one_ledger_serves_one_cloud_at_a_time(tmp_path):
    async with opened(tmp_path / "a.ledger") as ledger:
        await ledger.open(**OWNER)
        with pytest.raises(LedgerError, match="open for demo"):
            await ledger.open(**{**OWNER, "cloud_name": "other"})


async def test_a_closed_ledger_says_how_to_open_it(tmp_path):
    ledger = SQLiteLedger(tmp_path / "a.ledger")
    with pytest.raises(LedgerError, match="before the session's"):
        await ledger.find(KEYS[0])
    await ledger.aclose()


async def test_a_dropped_ledger_warns_and_releases_the_file(tmp_path):
    path = tmp_path / "a.ledger"
    ledger = SQLiteLedger(path)
    await ledger.open(**OWNER)
    ended = ledger._writer.ended
    with pytest.warns(ResourceWarning, match="without being closed"):
        del ledger
    await asyncio.wait([ended])
    async with opened(path):
        pass


# what breaks it

SCRIPT = """
import asyncio, resource, shutil, signal, sys
from tests.unit.test_ledger import KEYS, OWNER, respond
from cloudinary_analyze.ledger.sqlite import SQLiteLedger, build_row
from cloudinary_analyze.errors import LedgerError
import hashlib

async def main():
    async with SQLiteLedger(sys.argv[1], patience=0.5) as ledger:
        {body}

try:
    asyncio.run(main())
except LedgerError as error:
    print(error, file=sys.stderr)
"""


def run_script(body, path, **options):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(body=body.replace("\n", "\n        ")), str(path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
        **options,
    )


RECORD_UNTIL_IT_BREAKS = """
await ledger.open(**OWNER)
{limit}
for number in range(2000):
    key = hashlib.sha256(str(number).encode()).hexdigest()
    await ledger.record_response(key, respond("x" * 20_000), seconds=1)
    print(key, flush=True)
"""


async def check_acknowledged(done, path):
    acknowledged = done.stdout.split()
    assert 3 < len(acknowledged) < 2000
    async with opened(path) as ledger:
        assert [key for key in acknowledged if not await is_done(ledger, key)] == []
        extra = hashlib.sha256(b"extra").hexdigest()
        await ledger.record_response(extra, respond(1), seconds=0)  # and the ledger works again


async def test_a_full_disk_loses_no_acknowledged_record(tmp_path):
    path = tmp_path / "a.ledger"
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, -1))"
    done = run_script(RECORD_UNTIL_IT_BREAKS.format(limit=limit), path)
    assert "the disk is full" in done.stderr or "disk or its file system failed" in done.stderr
    assert "Existing records are intact." in done.stderr
    await check_acknowledged(done, path)


@pytest.mark.skipif(os.name != "posix", reason="an open directory cannot be removed there")
async def test_a_missing_directory_is_reported_first(tmp_path):
    directory = tmp_path / "out"
    directory.mkdir()
    async with SQLiteLedger(directory / "a.ledger") as ledger:
        await ledger.open(**OWNER)
        await ledger.record_response(KEYS[0], respond(0), seconds=0)
        directory.rename(tmp_path / "moved")
        with pytest.raises(LedgerError, match="was removed or replaced"):
            await ledger.record_response(KEYS[1], respond(1), seconds=0)
        with pytest.raises(LedgerError, match="was removed or replaced"):
            await ledger.find(KEYS[0])
    async with opened(tmp_path / "moved" / "a.ledger") as ledger:
        assert await is_done(ledger, KEYS[0])


async def test_an_unreported_failure_is_raised_on_closing(tmp_path):
    directory = tmp_path / "out"
    directory.mkdir()
    ledger = SQLiteLedger(directory / "a.ledger")
    await ledger.open(**OWNER)
    shutil.rmtree(directory)
    await ledger.add_item(0, build_row(source="s", model="coco", key=KEYS[0]))
    with pytest.raises(LedgerError, match="was removed or replaced"):
        await ledger.aclose()


async def test_an_invalid_path_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "missing" / "a.ledger", tmp_path / "file" / "a.ledger", tmp_path):
        ledger = SQLiteLedger(path)
        with pytest.raises(LedgerError, match=r"directory exists|is not a file|cannot be used"):
            await ledger.open(**OWNER)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user"
)
async def test_an_unwritable_ledger_is_reported_and_unchanged():
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        await fill(directory / "a.ledger")
        for path in (directory, *directory.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        before = list_bytes(directory)
        body = "import os; os.setgroups([]); os.setuid(65534)\nawait ledger.open(**OWNER)"
        done = run_script(body, directory / "a.ledger")
        assert "is writable" in done.stderr or "is not writable" in done.stderr
        assert list_bytes(directory) == before


# the rules


@pytest.mark.parametrize(
    "request_",
    [
        Captioning("https://example.com/ä?a=1"),
        Coco(Asset("0a1b2c")),
        AIVisionGeneral("https://example.com/\U0001f600", prompts=["one", "zwei ü"]),
        AIVisionTagging("https://example.com", tag_definitions=[TagDefinition("cat", "a cat")]),
        OtherModel("newest", "https://example.com", {"b": 1, "a": {"d": 1, "c": None}}),
    ],
    ids=lambda request: request.model,
)
def test_a_key_from_parts_equals_the_requests_key(request_):
    assert KeyBuilder(request_).build(request_.source) == request_.key


@given(st.text(min_size=1), st.text(min_size=1))
def test_named_keys_depend_on_name_and_model(one, other):
    captioning, coco = KeyBuilder(Captioning("https://a.b")), KeyBuilder(Coco("https://a.b"))
    assert (captioning.build_named(one) == captioning.build_named(other)) == (one == other)
    assert captioning.build_named(one) != coco.build_named(one)
    assert captioning.build_named("https://a.b") != captioning.build(Uri("https://a.b"))


@pytest.mark.parametrize(
    "status",
    [*range(400, 432), 451, 500, 503],
)
def test_only_permanent_errors_are_final(status):
    body = b'{"error": {"message": "said so"}}'
    error = read_error(status, {}, body, now=0.0, model="captioning")
    assert is_final(error) == (status in {400, 404, 413, 415, 422})


def test_only_a_404_of_the_service_itself_is_final():
    assert not is_final(read_error(404, {}, b"<html>", now=0.0, model="captioning"))
    assert not is_final(read_error(404, {}, b'{"error": {"message": "m"}}', now=0.0))
    assert not is_final(NotFoundError("m"))
    assert is_final(TaskFailedError("m", task_id="t", cause_known=False))


async def fill_items(path):
    async with opened(path) as ledger:
        for number in range(3):
            await ledger.note_item(KEYS[number], source="a", model="coco", index=number)
            await ledger.record_response(KEYS[number], respond(number), seconds=0.5)
        await ledger.add_item(3, build_row(line=4, source="b", columns=b'{"n": 1}', error=BAD))


BAD = InvalidRequestError("No.")


def read_everything(path):
    ledger = SQLiteLedger(path)
    for read in (
        ledger.iter_items,
        ledger.iter_columns,
        lambda: ledger.iter_noted(open_only=False),
        lambda: ledger.iter_noted(open_only=True),
        ledger.answered_items,
        ledger.counts,
    ):
        try:
            found = read()
            list(found) if hasattr(found, "__next__") else None
        except LedgerError as error:
            yield str(error)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE items SET source = x'ff'",
        "UPDATE items SET columns = '[1]' WHERE position = 3",
        "UPDATE items SET columns = x'5b' WHERE position = 3",
        "UPDATE items SET line = 'x'",
        "UPDATE items SET error = x'7b7d' WHERE position = 3",
        "UPDATE items SET error = 'text' WHERE position = 3",
        "UPDATE records SET key = 'text' WHERE id = 1",
        "UPDATE records SET seconds = 'soon'",
        "UPDATE records SET state = 'A'",
        "UPDATE answers SET content = x'31'",
        "UPDATE answers SET content = 'text'",
        "UPDATE owner SET begun = 'x'",
    ],
)
async def test_a_damaged_row_is_an_error_of_the_ledger(tmp_path, change):
    path = tmp_path / "run.ledger"
    await fill_items(path)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(change)
    found = await asyncio.to_thread(list, read_everything(path))
    assert any("cannot be read" in said for said in found)
    async with SQLiteLedger(path) as ledger:
        with contextlib.suppress(LedgerError):
            await ledger.open(**OWNER)
            await ledger.find(KEYS[0])


@pytest.mark.parametrize("far", [2**40, 2**62, 2**63 - 1])
async def test_huge_numbers_in_a_damaged_file_are_read_fast(tmp_path, far):
    path = tmp_path / "run.ledger"
    await fill_items(path)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE items SET position = ? WHERE position = 2", (far,))
        connection.execute("UPDATE items SET record = ? WHERE position = 1", (far,))
        connection.execute("UPDATE records SET id = ? WHERE id = 2", (far,))
        connection.execute("UPDATE answers SET record = ? WHERE record = 2", (far,))
    assert await asyncio.to_thread(list, read_everything(path)) == []
    items = await asyncio.to_thread(list, SQLiteLedger(path).iter_items())
    assert [item.index for item in items] == [0, 1, 3, far]


@given(st.sets(st.integers(0, 2**70)), st.sets(st.integers(0, 2**70)))
def test_a_set_of_records_is_a_set_of_numbers(mine, theirs):
    sets = []
    for numbers in (mine, theirs, mine | theirs):
        found = RecordSet()
        assert all(found.add(number) for number in numbers)
        assert not any(found.add(number) for number in numbers)
        sets.append(found)
    assert sets[0].is_within(sets[1]) == (mine <= theirs)
    assert sets[0].is_within(sets[2])


@pytest.mark.parametrize(
    "fields",
    [{"status": "x"}, {"ambiguous": 1}, {"details": "x"}, {"limits": 5}, {"raw_body": None}],
)
def test_a_stored_error_with_other_types_is_refused(fields):
    content = {"type": "BadRequestError", "message": "No.", "fields": fields}
    with pytest.raises(ValueError, match="unexpected shape"):
        load_error(json.dumps(content).encode())
    with pytest.raises(ValueError, match="unexpected shape"):
        load_error(b'{"type": "AnalyzeError", "message": 5, "fields": {}}')


def flip(path, places):
    content = bytearray(path.read_bytes())
    for place, mask in places:
        content[place] ^= mask
    path.write_bytes(content)


async def test_rows_out_of_order_raise_an_error_without_a_loop(tmp_path):
    path = tmp_path / "run.ledger"
    await fill_items(path)
    content = path.read_bytes()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        root = "SELECT rootpage FROM sqlite_master WHERE name = 'items'"
        ((page,),) = connection.execute(root)
        ((size,),) = connection.execute("PRAGMA page_size")
    assert content[(page - 1) * size] == 13  # a leaf: its cells are listed from byte 8 on
    cells = (page - 1) * size + 8
    for first, second in ((0, 2), (1, 3), (0, 3)):  # exchanged
        swapped = bytearray(content)
        one, other = (slice(cells + 2 * n, cells + 2 * n + 2) for n in (first, second))
        swapped[one], swapped[other] = content[other], content[one]
        path.write_bytes(swapped)
        said = await asyncio.to_thread(list, read_everything(path))
        assert any("not in order" in text for text in said), said


async def test_a_broken_schema_text_is_an_error_of_the_ledger(tmp_path):
    path = tmp_path / "run.ledger"
    await fill_items(path)
    content = path.read_bytes()
    place = content.index(b"TABLE records")
    for offset in (0, 2, 5):
        path.write_bytes(content)
        flip(path, [(place + offset, 0xB0)])
        said = await asyncio.to_thread(list, read_everything(path))
        assert len(said) == 6, offset
        assert all(text.isprintable() for text in said)


async def test_column_names_ignore_case(tmp_path):
    path = tmp_path / "run.ledger"
    await fill_items(path)
    flip(path, [(path.read_bytes().index(b"content BLOB") + 1, 0x20)])
    assert await asyncio.to_thread(list, read_everything(path)) == []
