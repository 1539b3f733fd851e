"""The table: one entry per task, the first answer wins, and everything that is kept is bounded."""

import asyncio
import json

import pytest
from task_support import build_failure, build_result

from cloudinary_analyze import Captioning, Settings, TaskFailedError, TaskTimeoutError
from cloudinary_analyze._tasks.table import Answer, Entry, Table
from cloudinary_analyze._wire.protocol import build_task_failure
from cloudinary_analyze.errors import NotFoundError, ResultNotDeliveredError, SessionClosedError
from cloudinary_analyze.events import Meter
from cloudinary_analyze.webhooks import parse_notification

REQUEST = Captioning("https://example.com/a.jpg")


def build_table(clock, **settings):
    return Table(Settings(**settings), clock, Meter())


def deliver(table, body):
    return table.deliver(parse_notification(body), body)


def accept(table, task_id, *, deadline=None):
    entry = Entry(REQUEST)
    wait = table.watch(entry, deadline)
    table.register(entry, task_id)
    return entry, wait


class TestFirstAnswerWins:
    def test_duplicates_and_second_answers_change_nothing(self, clock):
        table = build_table(clock)
        entry, _ = accept(table, "t1")
        assert deliver(table, build_result("t1", "first")) == "resolved"
        answer = entry.answer
        assert deliver(table, build_result("t1", "second")) == "duplicate"
        assert deliver(table, build_failure("t1")) == "duplicate"
        assert not table.answer(entry, Answer("poll", error=ValueError()))
        assert entry.answer is answer
        assert table.meter.notifications == {"resolved": 1, "duplicate": 2}

    def test_a_failure_tells_its_reason(self, clock):
        table = build_table(clock)
        entry, _ = accept(table, "t1")
        assert deliver(table, build_failure("t1", "too dark")) == "resolved"
        error = entry.answer.error
        assert isinstance(error, TaskFailedError)
        assert error.cause_known
        assert (error.task_id, error.status, error.code) == ("t1", 400, "MA_00003")
        assert "too dark" in str(error)

    @pytest.mark.parametrize(
        ("body", "verdict"),
        [
            (json.dumps({"notification_type": "upload", "public_id": "a"}), "unrelated"),
            (json.dumps({"notification_type": "upload", "task_id": "t1"}), "unrelated"),
            (json.dumps({"task_id": "t1"}), "malformed"),
            (json.dumps({"task_id": "t1", "http_status": 200, "data": {}}), "malformed"),
            (json.dumps({"task_id": "t1", "data": {"analysis": []}}), "malformed"),
            (json.dumps({"task_id": 7, "data": {"analysis": {}}}), "unrelated"),
            ("{}", "unrelated"),
        ],
    )
    def test_what_is_no_answer_touches_no_task(self, clock, body, verdict):
        table = build_table(clock)
        entry, _ = accept(table, "t1")
        assert deliver(table, body.encode()) == verdict
        assert entry.answer is None
        assert table.parked == 0

    @pytest.mark.parametrize(
        "guess",
        [build_task_failure("t1", model="captioning"), ResultNotDeliveredError("", task_id="t1")],
    )
    def test_a_late_result_corrects_a_guess_for_whoever_asks_later(self, clock, guess):
        """Handles keep to what they were told; the task can be taken up again with its result."""
        table = build_table(clock)
        entry, _ = accept(table, "t1")
        table.answer(entry, Answer("poll", error=guess))
        assert table.find("t1") is entry
        assert deliver(table, build_result("t1")) == "resolved"
        assert entry.answer.error is guess
        assert table.find("t1").answer.data is not None
        assert deliver(table, build_result("t1")) == "duplicate"


class TestParked:
    def test_a_notification_before_the_202_answers_at_registration(self, clock):
        table = build_table(clock)
        assert deliver(table, build_result("t1")) == "parked"
        assert table.parked == 1
        entry, wait = accept(table, "t1", deadline=50)
        assert entry.answer.data["analysis"]["data"]["caption"] == "a cat"
        assert (table.parked, table._parked_bytes, len(table.pending)) == (0, 0, 0)
        assert wait.deadline is None

    def test_the_same_one_again_is_parked_once_and_no_duplicate(self, clock):
        """A duplicate would be acknowledged to a queue that other processes read too."""
        table = build_table(clock)
        body = build_result("t1")
        assert [deliver(table, body), deliver(table, body)] == ["parked", "parked"]
        assert table.parked == 1
        assert table._parked_bytes == len(body)

    def test_bounded_by_time_and_then_foreign(self, clock):
        table = build_table(clock, parked_seconds=600)
        deliver(table, build_result("t1"))
        clock.now = 600
        deliver(table, build_result("t2"))
        assert table.parked == 2
        clock.now = 600.1
        assert table.parked == 1
        assert table.meter.notifications["foreign"] == 1
        entry, _ = accept(table, "t1")
        assert entry.answer is None

    def test_bounded_by_bytes_and_the_oldest_go_first(self, clock):
        size = len(build_result("t00"))
        table = build_table(clock, parked_bytes=3 * size)
        for index in range(10):
            deliver(table, build_result(f"t{index:02}"))
        assert list(table._parked) == ["t07", "t08", "t09"]
        assert table._parked_bytes == 3 * size
        assert table.meter.notifications["foreign"] == 7

    def test_one_over_the_bound_alone_is_not_kept(self, clock):
        table = build_table(clock, parked_bytes=100)
        assert deliver(table, build_result("t1")) == "foreign"
        assert table.parked == 0

    def test_a_malformed_one_is_never_parked(self, clock):
        table = build_table(clock)
        assert deliver(table, b'{"task_id": "t1", "http_status": 200}') == "malformed"
        assert table.parked == 0


class TestAnsweredAreKept:
    def test_by_time(self, clock):
        table = build_table(clock, answered_seconds=3600)
        accept(table, "t1")
        deliver(table, build_result("t1"))
        clock.now = 3600
        assert table.find("t1").answer is not None
        clock.now = 3600.1
        assert table.find("t1") is None

    def test_what_is_too_old_goes_also_while_nobody_looks_for_it(self, clock):
        table = build_table(clock, answered_seconds=10)
        for index in range(100):
            accept(table, f"t{index}")
        for index in range(100):
            deliver(table, build_result(f"t{index}"))
            clock.now += 5
        assert len(table._answered) == 3

    def test_a_corrected_guess_is_as_young_as_its_correction(self, clock):
        table = build_table(clock, answered_seconds=10)
        for task_id in ("t1", "t2"):
            entry, _ = accept(table, task_id)
            failure = build_task_failure(task_id, model="captioning")
            table.answer(entry, Answer("poll", error=failure), state="failed")
        clock.now = 8
        assert deliver(table, build_result("t1")) == "resolved"
        clock.now = 12
        assert table.find("t1").answer.error is None
        assert table.find("t2") is None
        assert list(table._answered) == ["t1"]

    def test_by_count_and_the_oldest_go_first(self, clock):
        table = build_table(clock, answered_count=3)
        for index in range(5):
            accept(table, f"t{index}")
            deliver(table, build_result(f"t{index}"))
        kept = [index for index in range(5) if table.find(f"t{index}") is not None]
        assert kept == [2, 3, 4]

    @pytest.mark.parametrize(
        "answer",
        [
            Answer("session", error=SessionClosedError("closed")),
            Answer("poll", error=NotFoundError("not found")),
        ],
    )
    def test_not_when_the_task_itself_had_no_outcome(self, clock, answer):
        table = build_table(clock)
        entry, _ = accept(table, "t1")
        table.answer(entry, answer)
        assert table.find("t1") is None
        assert not table.pending


class TestWaits:
    async def test_a_deadline_ends_one_wait_and_the_entry_stays(self, clock):
        table = build_table(clock)
        entry, hasty = accept(table, "t1", deadline=10)
        patient = table.watch(entry, 20)
        await clock.advance(10)
        assert isinstance(hasty.ended, TaskTimeoutError)
        assert hasty.ended.task_id == "t1"
        assert "t1" in str(hasty.ended)
        assert patient.ended is None
        assert deliver(table, build_result("t1")) == "resolved"
        await clock.advance(20)
        assert patient.ended is None
        assert len(table.timers) == 0

    async def test_a_task_nobody_waits_for_rests_and_is_answered_all_the_same(self, clock):
        table = build_table(clock, answered_seconds=100)
        _, wait = accept(table, "t1")
        table.abandon(wait)
        assert wait.ended is not None
        await clock.advance(99)
        assert deliver(table, build_result("t1")) == "resolved"
        assert table.find("t1").answer is not None

    async def test_a_resting_task_is_forgotten_after_a_while(self, clock):
        table = build_table(clock, answered_seconds=100)
        _, wait = accept(table, "t1")
        table.abandon(wait)
        await clock.advance(100)
        assert not table.pending
        assert len(table.timers) == 0

    async def test_a_new_wait_ends_the_rest(self, clock):
        table = build_table(clock, answered_seconds=100)
        entry, wait = accept(table, "t1")
        table.abandon(wait)
        table.watch(entry, None)
        await clock.advance(1000)
        assert table.find("t1") is entry

    async def test_abandoned_before_it_was_accepted_it_rests_from_the_202_on(self, clock):
        table = build_table(clock, answered_seconds=100)
        entry = Entry(REQUEST)
        table.abandon(table.watch(entry, None))
        assert table.register(entry, "t1") is None
        assert deliver(table, build_result("t1")) == "resolved"

    async def test_a_cancelled_waiter_leaves_nothing_and_wakes_nobody(self, clock):
        table = build_table(clock)
        entry, _ = accept(table, "t1")
        waiters = [asyncio.create_task(entry.change()) for _ in range(3)]
        await asyncio.sleep(0)
        waiters[1].cancel()
        await asyncio.wait([waiters[1]])
        assert len(entry._waiters) == 2
        assert not waiters[0].done()
        deliver(table, build_result("t1"))
        await asyncio.gather(waiters[0], waiters[2])


class TestOneEntryPerTask:
    """A 202 may name a task that was taken up by its id before."""

    async def test_waits_move_to_the_entry_that_is_there(self, clock):
        table = build_table(clock)
        known, early = accept(table, "t1", deadline=50)
        entry = Entry(REQUEST)
        late = table.watch(entry, 5)
        assert table.register(entry, "t1") is None  # its polls are under way
        assert table.find("t1") is known
        await clock.advance(5)
        assert late.ended is not None
        assert early.ended is None
        deliver(table, build_result("t1"))
        assert early.entry.answer is late.entry.answer is not None

    async def test_an_answer_that_is_there_is_theirs_at_once(self, clock):
        table = build_table(clock)
        accept(table, "t1")
        deliver(table, build_result("t1"))
        entry = Entry(REQUEST)
        wait = table.watch(entry, None)
        waiter = asyncio.create_task(entry.change())
        await asyncio.sleep(0)
        assert table.register(entry, "t1") is None
        await waiter
        assert wait.entry.answer.data is not None

    async def test_a_resting_task_is_asked_for_again(self, clock):
        table = build_table(clock, answered_seconds=100)
        known, wait = accept(table, "t1")
        table.abandon(wait)
        entry = Entry(REQUEST)
        table.watch(entry, None)
        assert table.register(entry, "t1") is known
        await clock.advance(1000)
        assert table.find("t1") is known
