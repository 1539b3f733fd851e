"""The table: one entry per task, the first answer wins, and memory is bounded."""

import json

import pytest
from task_support import build_failure, build_result

from cloudinary_analyze import (
    Captioning,
    CaptioningAnalysis,
    Response,
    Settings,
    TaskFailedError,
    TaskLimitError,
    TaskTimeoutError,
)
from cloudinary_analyze._tasks.entries import Answer, Changed, Ended, Phase, Poll, Seen
from cloudinary_analyze._tasks.table import Table
from cloudinary_analyze._wire.protocol import build_task_failure
from cloudinary_analyze.errors import (
    NotFoundError,
    ResponseDecodeError,
    ResultNotDeliveredError,
    SessionClosedError,
)
from cloudinary_analyze.responses import TaskStatus
from cloudinary_analyze.webhooks import parse_notification

REQUEST = Captioning("https://example.com/a.jpg")


def build_table(*, with_source=True, **settings):
    return Table(Settings(**settings), with_source=with_source)


def deliver(table, body, now=0.0):
    return table.deliver(parse_notification(body), body, now)[0]


def accept(table, task_id, now=0.0, *, deadline=None):
    wait = table.submit(REQUEST)
    table.accept(wait, task_id, now, deadline=deadline)
    return wait


def attach(table, task_id, now=0.0, **options):
    return table.attach(task_id, Captioning, now, **options)


def find(table, task_id):
    """Return the answer that a new handle gets at once."""
    wait, _ = attach(table, task_id)
    answer = wait.answer
    table.leave(wait, 0.0)
    return answer


def advance(table, now):
    """Process everything that is due, and return the effects."""
    effects = []
    while (due := table.take_due(now)) is not None:
        effects += due
    return effects


def poll(table, wait, state, now):
    return table.take_status(wait.entry, TaskStatus("t1", state), now)


class TestFirstAnswerWins:
    def test_duplicates_and_second_answers_change_nothing(self):
        table = build_table()
        wait = accept(table, "t1")
        assert deliver(table, build_result("t1", "first")) == "resolved"
        answer = wait.answer
        assert deliver(table, build_result("t1", "second")) == "duplicate"
        assert deliver(table, build_failure("t1")) == "duplicate"
        assert not table.answer(wait.entry, Answer("poll", ValueError()), 0)
        assert wait.answer is answer

    def test_a_failure_has_the_services_reason(self):
        table = build_table()
        wait = accept(table, "t1")
        assert deliver(table, build_failure("t1", "too dark")) == "resolved"
        error = wait.answer.error
        assert isinstance(error, TaskFailedError)
        assert error.cause_known
        assert (error.task_id, error.status, error.code) == ("t1", 400, "MA_00003")
        assert "too dark" in str(error)
        assert wait.entry.status == "failed"

    @pytest.mark.parametrize(
        "fields",
        [
            {"data": None},
            {"data": {}},
            {"data": {"analysis": []}},
            {"data": {"result": {"analysis": {"data": {"caption": "a"}}}}},
            {"notification_type": "analysis"},
            {"notification_type": "upload"},
        ],
    )
    def test_a_verified_body_of_any_shape_answers_a_handle(self, fields):
        table = build_table()
        wait = accept(table, "t1")
        body = build_result("t1", **fields)
        assert deliver(table, body) == "resolved"
        assert wait.answer.body == body

    @pytest.mark.parametrize(
        "content",
        [
            {"notification_type": "upload", "public_id": "a"},
            {"task_id": 7, "data": {"analysis": {}}},
            {"task_id": ""},
            {},
        ],
    )
    def test_a_body_without_a_task_id_changes_no_task(self, content):
        table = build_table()
        wait = accept(table, "t1")
        assert deliver(table, json.dumps(content).encode()) == "unrelated"
        assert wait.answer is None
        assert not table.parked

    @pytest.mark.parametrize(
        "guess",
        [build_task_failure("t1", model="captioning"), ResultNotDeliveredError("", task_id="t1")],
    )
    def test_a_late_result_corrects_a_guess_for_later_handles(self, guess):
        """Handles keep their outcome; the task can be attached again with its result."""
        table = build_table()
        wait = accept(table, "t1")
        table.answer(wait.entry, Answer("poll", guess, guess=True), 0)
        assert find(table, "t1").error is guess
        assert deliver(table, build_result("t1")) == "resolved"
        assert wait.answer.error is guess
        assert find(table, "t1").body is not None
        assert deliver(table, build_result("t1")) == "duplicate"

    def test_a_readable_result_corrects_an_unreadable_one(self):
        table = build_table()
        accept(table, "t1")
        assert deliver(table, build_result("t1", data={"progress": 50})) == "resolved"
        assert deliver(table, build_result("t1", data={"progress": 60})) == "duplicate"
        assert deliver(table, build_result("t1", "a dog")) == "resolved"
        assert b"a dog" in find(table, "t1").body


PROGRESS = [
    {"data": {"status": "pending"}},
    {"data": {"task_id": "t1", "status": "processing"}, "http_status": 202},
    {"data": {"status": "processing", "progress": 50}},
    {"data": {"status": "In Progress"}, "http_status": None},
    {"data": None, "status": "progress"},
    {"data": {"data": {"status": "queued"}}},
    {"data": {"result": {"status": "running", "analysis": None}}},
    {"data": {"analysis": {}, "status": "pending"}, "error": None},
    {"data": None, "http_status": 202},
]
UNREADABLE_ENDS = [
    {"data": {"status": "completed"}},
    {"data": {"status": "done"}},
    {"data": {"status": "pending"}, "status": "completed"},
    {"data": {"status": "pending", "analysis": ["a cat"]}},
    {"data": {"progress": 50}},
    {"data": None, "status": 7},
    {"data": None},
]


class TestProgress:
    """A signed body without a result does not end a task that it reports as running."""

    @pytest.mark.parametrize("fields", PROGRESS)
    def test_ends_nothing_and_the_result_is_awaited(self, fields):
        table = build_table()
        wait, _ = attach(table, "t1")
        assert not wait.entry.verified
        assert deliver(table, build_result("t1", **fields)) == "progress"
        assert wait.answer is None
        assert wait.entry.verified
        assert deliver(table, build_result("t1")) == "resolved"
        assert b"a cat" in wait.answer.body

    @pytest.mark.parametrize("fields", UNREADABLE_ENDS)
    def test_a_final_body_without_a_result_ends_the_task(self, fields):
        table = build_table()
        wait = accept(table, "t1")
        body = build_result("t1", **fields)
        assert deliver(table, body) == "resolved"
        assert wait.answer.body == body
        with pytest.raises(ResponseDecodeError):
            Response.from_raw(Captioning, json.loads(body))

    @pytest.mark.parametrize(
        "fields",
        [
            {"data": {"status": "pending", "analysis": {"data": {"caption": "a cat"}}}},
            {"data": {"status": "pending", "result": {"caption": "a cat"}}},
        ],
    )
    def test_a_result_counts_whatever_its_status(self, fields):
        table = build_table()
        wait = accept(table, "t1")
        assert deliver(table, build_result("t1", **fields)) == "resolved"
        assert not wait.answer.guess

    @pytest.mark.parametrize(
        "fields",
        [
            {"data": {"status": "pending"}, "http_status": 500},
            {"data": {"status": "pending", "error": "it broke"}},
            {"data": {"status": "failed"}},
            {"data": None, "status": "failed"},
        ],
    )
    def test_a_failure_counts_whatever_its_status(self, fields):
        table = build_table()
        wait = accept(table, "t1")
        assert deliver(table, build_result("t1", **fields)) == "resolved"
        assert isinstance(wait.answer.error, TaskFailedError)

    def test_its_status_is_shown_until_a_poll_knows_more(self):
        table = build_table()
        wait = accept(table, "t1")
        body = build_result("t1", data={"status": "processing"})
        _, effects = table.deliver(parse_notification(body), body, 0)
        assert [type(effect) for effect in effects] == [Changed]
        assert wait.entry.status == "processing"
        assert table.deliver(parse_notification(body), body, 0) == ("progress", ())
        poll(table, wait, "completed", 1)
        assert deliver(table, body) == "progress"
        assert (wait.entry.status, wait.entry.phase) == ("completed", Phase.GRACE)

    def test_it_shows_that_the_service_knows_the_task(self):
        table = build_table(with_source=False)
        wait = accept(table, "t1")
        unknown = NotFoundError("404", status=404)
        table.take_error(wait.entry, unknown, 100)
        deliver(table, build_result("t1", data={"status": "pending"}))
        table.take_error(wait.entry, unknown, 200)
        assert wait.answer is None

    def test_it_does_not_replace_a_parked_result(self):
        table = build_table()
        body = build_result("t1", data={"status": "processing"})
        assert deliver(table, body) == "progress"
        assert not table.parked
        assert deliver(table, build_result("t1")) == "parked"
        assert deliver(table, body) == "progress"
        assert b"a cat" in accept(table, "t1").answer.body

    def test_an_empty_analysis_counts_once_the_task_has_ended(self):
        table = build_table()
        wait = accept(table, "t1")
        for state in ("processing", "completed"):
            assert wait.answer is None
            raw = {"data": {"status": state, "analysis": {}}}
            table.take_status(wait.entry, TaskStatus("t1", state, raw=raw), 0)
        assert json.loads(wait.answer.body) == raw

    def test_after_the_answer_it_is_a_duplicate(self):
        table = build_table()
        wait = accept(table, "t1")
        failure = build_task_failure("t1", model="captioning")
        table.answer(wait.entry, Answer("poll", failure, guess=True), 0)
        assert deliver(table, build_result("t1", data={"status": "pending"})) == "duplicate"
        assert find(table, "t1").error is failure

    def test_a_task_without_a_waiting_handle_keeps_resting(self):
        table = build_table()
        wait = accept(table, "t1")
        table.leave(wait, 0)
        assert deliver(table, build_result("t1", data={"status": "processing"})) == "progress"
        assert wait.entry.phase == Phase.RESTING
        assert deliver(table, build_result("t1")) == "resolved"


class TestParked:
    @pytest.mark.parametrize("body", [build_result("t1"), build_failure("t1")])
    def test_a_readable_body_replaces_an_unreadable_one(self, body):
        table = build_table()
        unreadable = build_result("t1", data=None)
        assert [deliver(table, each) for each in (unreadable, body, unreadable)] == ["parked"] * 3
        assert table.parked.bytes == len(body)
        assert not accept(table, "t1").answer.guess

    def test_a_notification_before_the_202_answers_the_task(self):
        table = build_table()
        assert deliver(table, build_result("t1")) == "parked"
        wait = table.submit(REQUEST)
        effects = table.accept(wait, "t1", 0, deadline=50)
        assert b"a cat" in wait.answer.body
        assert [type(effect) for effect in effects] == [Ended, Seen]
        assert (len(table.parked), table.parked.bytes, len(table.pending)) == (0, 0, 0)
        assert wait.due is None

    def test_the_same_one_again_is_parked_once_and_no_duplicate(self):
        """A duplicate would be acknowledged to a queue that other processes read too."""
        table = build_table()
        body = build_result("t1")
        assert [deliver(table, body), deliver(table, body)] == ["parked", "parked"]
        assert len(table.parked) == 1
        assert table.parked.bytes == len(body)

    def test_bounded_by_time_and_then_foreign(self):
        table = build_table(parked_seconds=600)
        deliver(table, build_result("t1"), 0)
        deliver(table, build_result("t2"), 599)
        assert table.wake_at == 600
        assert advance(table, 600) == [Seen("foreign", "t1")] or len(table.parked) == 1
        assert table.wake_at == 1199
        assert accept(table, "t1", 600).answer is None

    def test_bounded_by_bytes_and_the_oldest_go_first(self):
        size = len(build_result("t00"))
        table = build_table(parked_bytes=3 * size)
        foreign = []
        for index in range(10):
            body = build_result(f"t{index:02}")
            verdict, effects = table.deliver(parse_notification(body), body, 0)
            assert verdict == "parked"
            foreign += [effect.task_id for effect in effects if effect.verdict == "foreign"]
        assert foreign == [f"t{index:02}" for index in range(7)]
        assert table.parked.bytes == 3 * size

    def test_an_oversized_one_is_dropped_and_evicts_nothing(self):
        small = build_result("t1")
        table = build_table(parked_bytes=len(small) + 100)
        assert deliver(table, small) == "parked"
        assert deliver(table, build_result("t2", "a cat" * 100)) == "foreign"
        assert table.parked.bytes == len(small)


class TestAnsweredAreKept:
    def test_by_time_even_in_an_idle_session(self):
        table = build_table(answered_seconds=3600)
        accept(table, "t1")
        deliver(table, build_result("t1"))
        assert table.wake_at == 3600
        advance(table, 3599)
        assert find(table, "t1") is not None
        advance(table, 3600)
        assert find(table, "t1") is None
        assert not table.answered

    def test_a_corrected_guess_is_kept_from_its_correction_on(self):
        table = build_table(answered_seconds=10)
        for task_id in ("t1", "t2"):
            wait = accept(table, task_id)
            failure = build_task_failure(task_id, model="captioning")
            table.answer(wait.entry, Answer("poll", failure, guess=True), 0, status="failed")
        assert deliver(table, build_result("t1"), 8) == "resolved"
        advance(table, 12)
        assert find(table, "t1").error is None
        assert find(table, "t2") is None

    def test_by_count_and_the_oldest_go_first(self):
        table = build_table(answered_count=3)
        for index in range(5):
            accept(table, f"t{index}")
            deliver(table, build_result(f"t{index}"))
        assert [index for index in range(5) if find(table, f"t{index}")] == [2, 3, 4]

    def test_by_bytes(self):
        size = len(build_result("t0"))
        table = build_table(answered_bytes=3 * size)
        for index in range(9):
            accept(table, f"t{index}")
            deliver(table, build_result(f"t{index}"))
        assert [index for index in range(9) if find(table, f"t{index}")] == [6, 7, 8]
        assert table.answered.bytes == 3 * size

    def test_as_bytes_from_any_kind_of_answer(self):
        table = build_table()
        raw = {"data": {"analysis": {"data": {"caption": "a cat"}}}}
        wait = accept(table, "t1")
        table.take_status(wait.entry, TaskStatus("t1", "completed", raw=raw), 0)
        again = accept(table, "t2")
        response = Response(CaptioningAnalysis("a cat"), model="captioning", raw=raw)
        table.answer(again.entry, Answer("analyze", response=response), 0)
        assert again.answer.response is response
        for task_id in ("t1", "t2"):
            kept = find(table, task_id)
            assert json.loads(kept.body) == raw
            assert kept.response is None

    @pytest.mark.parametrize(
        "answer",
        [
            Answer("session", SessionClosedError("closed")),
            Answer("poll", NotFoundError("not found")),
        ],
    )
    def test_not_if_the_task_had_no_outcome(self, answer):
        table = build_table()
        wait = accept(table, "t1")
        table.answer(wait.entry, answer, 0)
        assert find(table, "t1") is None
        assert not table.pending


class TestWaits:
    def test_a_submission_that_is_abandoned_may_be_charged(self):
        table = build_table()
        for submitted, ambiguous in ((table.submit(REQUEST), True), (accept(table, "t1"), False)):
            table.abandon(submitted, 0)
            assert submitted.answer.error.ambiguous is ambiguous

    def test_a_deadline_ends_one_wait_and_the_entry_stays(self):
        table = build_table()
        hasty = accept(table, "t1", deadline=10)
        patient, _ = attach(table, "t1", deadline=20)
        advance(table, 10)
        assert isinstance(hasty.answer.error, TaskTimeoutError)
        assert hasty.answer.error.task_id == "t1"
        assert "t1" in str(hasty.answer.error)
        assert patient.answer is None
        assert deliver(table, build_result("t1")) == "resolved"
        advance(table, 20)
        assert patient.answer.error is None
        assert len(table.dues) == 0

    def test_a_task_without_a_handle_rests_and_is_answered(self):
        table = build_table(answered_seconds=100)
        wait = accept(table, "t1")
        table.abandon(wait, 0)
        assert wait.answer is not None
        assert wait.entry.phase == Phase.RESTING
        assert wait.entry.poll_at is None
        advance(table, 99)
        assert deliver(table, build_result("t1"), 99) == "resolved"
        assert find(table, "t1") is not None

    def test_resting_tasks_are_bounded_by_time_and_count(self):
        table = build_table(answered_seconds=100, answered_count=3)
        for index in range(5):
            table.leave(accept(table, f"t{index}"), index)
        assert len(table.resting) == 3
        assert not table.pending
        assert table.wake_at == 100  # a timer ends them, and no later activity
        advance(table, 104)
        assert not table.resting

    def test_a_new_wait_ends_the_rest_and_polls_at_once(self):
        table = build_table(answered_seconds=100)
        wait = accept(table, "t1")
        table.abandon(wait, 0)
        again, effects = attach(table, "t1", 50)
        assert [type(effect) for effect in effects] == [Poll]
        assert effects[0].at_once
        advance(table, 1000)
        assert again.entry is wait.entry is table.pending["t1"]

    def test_a_task_abandoned_before_its_202_rests_after_it(self):
        table = build_table(answered_seconds=100)
        wait = table.submit(REQUEST)
        table.abandon(wait, 0)
        assert table.accept(wait, "t1", 0, deadline=None) == ()
        assert deliver(table, build_result("t1")) == "resolved"

    def test_dropped_handles_leave_nothing_behind(self):
        """A handler that long-polls an id attaches and drops a handle again and again."""
        table = build_table()
        keeper = accept(table, "t1")
        for index in range(5000):
            wait, _ = attach(table, "t1", index, deadline=index + 3600)
            table.leave(wait, index)
        assert keeper.entry.waits == [keeper]
        assert len(table.dues) == 0
        assert len(table.dues._heap) < 1000

    def test_many_handles_of_one_task_leave_in_any_order(self):
        table = build_table()
        waits = [attach(table, "t1", deadline=9)[0] for _ in range(100)]
        for wait in waits[::3] + waits[1::3]:
            table.leave(wait, 0)
            table.leave(wait, 0)
        assert set(waits[0].entry.waits) == set(waits[2::3])
        deliver(table, build_result("t1"))
        assert all((wait.answer is not None) == (i % 3 == 2) for i, wait in enumerate(waits))

    def test_unconfirmed_ids_leave_nothing_behind(self):
        table = build_table()
        for index in range(1000):
            wait, _ = attach(table, f"made-up-{index}", deadline=3600)
            table.take_error(wait.entry, NotFoundError("404", status=404), 0)
            table.leave(wait, 0)
        assert not table.pending
        assert not table.resting
        assert len(table.dues) == 0


class TestUnconfirmed:
    """Ids that may be made up are limited in number. Tasks that the service named are not."""

    @pytest.fixture(autouse=True)
    def _few(self, monkeypatch):
        monkeypatch.setattr("cloudinary_analyze._tasks.table.MOST_UNCONFIRMED", 3)

    def fill(self, table):
        return [attach(table, f"made-up-{index}")[0] for index in range(3)]

    def check_full(self, table):
        wait, effects = attach(table, "one-more")
        error = wait.answer.error
        assert isinstance(error, TaskLimitError)
        assert error.task_id == "one-more"
        assert str(error).startswith(
            "The session already waits for 3 task ids that the service has not confirmed, so it "
            "does not wait for one-more."
        )
        assert (effects, wait.entry.phase, wait.entry.status) == ((), Phase.OVER, "unknown")
        assert "one-more" not in table.pending
        assert find(table, "one-more").error is not error

    def check_room(self, table):
        wait, _ = attach(table, "one-more")
        assert wait.answer is None
        table.leave(wait, 0)

    def test_one_more_is_refused(self):
        table = build_table()
        self.fill(table)
        self.check_full(table)
        assert len(table.pending) == 3

    def test_other_tasks_do_not_count(self):
        table = build_table()
        accept(table, "t1")
        attach(table, "t2", verified=True)
        attach(table, "t3", trusted=True)
        self.fill(table)
        self.check_full(table)
        assert accept(table, "t4").answer is None
        assert attach(table, "t5", trusted=True)[0].answer is None
        for task_id in ("t1", "t2", "t3", "made-up-0"):
            assert attach(table, task_id)[0].answer is None

    def test_an_id_with_a_parked_notification_is_answered(self):
        table = build_table()
        self.fill(table)
        deliver(table, build_result("real"))
        assert attach(table, "real")[0].answer.body is not None

    @pytest.mark.parametrize(
        "end",
        [
            lambda table, wait: table.leave(wait, 0),
            lambda table, wait: table.abandon(wait, 0),
            lambda table, wait: table.attach("made-up-0", Captioning, 0, trusted=True),
            lambda table, wait: accept(table, "made-up-0"),
            lambda table, wait: deliver(table, build_result("made-up-0")),
            lambda table, wait: deliver(
                table, build_result("made-up-0", data={"status": "pending"})
            ),
            lambda table, wait: table.take_status(wait.entry, TaskStatus("", "pending"), 0),
            lambda table, wait: table.answer(wait.entry, Answer("poll", ValueError()), 0),
        ],
        ids=["leave", "abandon", "trust", "merge", "result", "progress", "poll", "refusal"],
    )
    def test_a_confirmed_or_finished_id_makes_room(self, end):
        table = build_table()
        end(table, self.fill(table)[0])
        self.check_room(table)
        assert table.unconfirmed == {"made-up-1", "made-up-2"}

    def test_deadlines_make_room(self):
        table = build_table()
        attach(table, "made-up", deadline=9)
        advance(table, 9)
        assert not table.unconfirmed

    def test_404s_make_room_without_a_source(self):
        table = build_table(with_source=False)
        wait = self.fill(table)[0]
        for now in (100, 200):
            table.take_error(wait.entry, NotFoundError("404", status=404), now)
        assert isinstance(wait.answer.error, NotFoundError)
        self.check_room(table)

    def test_after_the_end_the_error_names_the_end(self):
        table = build_table()
        self.fill(table)
        table.end(lambda task_id: SessionClosedError("closed", task_id=task_id))
        assert isinstance(attach(table, "one-more")[0].answer.error, SessionClosedError)
        while table.take_ending(0) is not None:
            pass
        assert not table.unconfirmed


class TestGrace:
    """The grace begins with the first *completed* poll, even if handles come and go."""

    def test_handles_that_come_and_go_do_not_restart_it(self):
        table = build_table(result_grace=100)
        wait, _ = attach(table, "t1", 0)
        poll(table, wait, "completed", 10)
        for now in range(20, 110, 30):
            table.leave(wait, now)
            advance(table, now)
            wait, effects = attach(table, "t1", now + 1)
            assert not any(isinstance(effect, Poll) for effect in effects)
            poll(table, wait, "completed", now + 2)
            assert wait.answer is None
        assert len(table.pending) == 1
        advance(table, 110)
        assert isinstance(wait.answer.error, ResultNotDeliveredError)

    def test_an_ended_task_ends_its_next_handle_at_once(self):
        table = build_table(result_grace=100)
        wait, _ = attach(table, "t1", 0)
        poll(table, wait, "completed", 10)
        table.leave(wait, 20)
        advance(table, 120)
        wait, _ = attach(table, "t1", 130)
        assert isinstance(wait.answer.error, ResultNotDeliveredError)

    def test_a_poll_counts_after_its_handle_was_dropped(self):
        table = build_table(result_grace=100)
        wait = accept(table, "t1")
        table.leave(wait, 5)
        poll(table, wait, "completed", 10)
        again, _ = attach(table, "t1", 110)
        assert isinstance(again.answer.error, ResultNotDeliveredError)

    def test_a_late_result_corrects_its_error(self):
        table = build_table(result_grace=100)
        wait = accept(table, "t1")
        poll(table, wait, "completed", 10)
        advance(table, 110)
        assert isinstance(wait.answer.error, ResultNotDeliveredError)
        assert deliver(table, build_result("t1"), 120) == "resolved"
        assert find(table, "t1").body is not None
        assert deliver(table, build_result("t1"), 130) == "duplicate"

    def test_a_failed_task_waits_for_its_reason_briefly(self):
        table = build_table(failure_grace=15)
        wait = accept(table, "t1")
        poll(table, wait, "failed", 10)
        advance(table, 24)
        assert wait.answer is None
        advance(table, 25)
        assert not wait.answer.error.cause_known
        assert deliver(table, build_failure("t1"), 30) == "resolved"
        assert find(table, "t1").error.cause_known


class TestUnknown:
    def test_a_timeout_reports_that_the_task_is_unknown(self):
        table = build_table()
        wait, _ = attach(table, "nosuchtask", 0, deadline=6)
        table.take_error(wait.entry, NotFoundError("404", status=404), 1)
        assert wait.entry.status == "unknown"
        advance(table, 6)
        assert isinstance(wait.answer.error, TaskTimeoutError)
        assert "does not know" in str(wait.answer.error)

    def test_a_submitted_task_may_be_unknown_for_a_minute(self):
        table = build_table()
        wait = accept(table, "t1", 0)
        table.take_error(wait.entry, NotFoundError("404", status=404), 30)
        assert wait.entry.status == "pending"
        effects = table.take_error(wait.entry, NotFoundError("404", status=404), 61)
        assert wait.entry.status == "unknown"
        assert [type(effect) for effect in effects] == [Changed, Poll]

    def test_a_poll_that_finds_it_ends_the_count_of_misses(self):
        table = build_table(with_source=False)
        wait = accept(table, "t1", 0)
        missing = NotFoundError("404", status=404)
        table.take_error(wait.entry, missing, 61)
        poll(table, wait, "pending", 70)
        table.take_error(wait.entry, missing, 80)
        assert wait.answer is None
        table.take_error(wait.entry, missing, 90)
        assert isinstance(wait.answer.error, NotFoundError)


class TestOneEntryPerTask:
    """A 202 may name a task that was attached by its id before."""

    def test_waits_move_to_the_existing_entry(self):
        table = build_table()
        early = accept(table, "t1", deadline=50)
        late = table.submit(REQUEST)
        effects = table.accept(late, "t1", 0, deadline=5)
        assert [type(effect) for effect in effects] == [Changed]  # its polls are in flight
        assert late.entry is early.entry
        advance(table, 5)
        assert late.answer is not None
        assert early.answer is None
        deliver(table, build_result("t1"))
        assert early.answer.body is not None

    def test_an_existing_answer_ends_them_at_once(self):
        table = build_table()
        accept(table, "t1")
        deliver(table, build_result("t1"))
        wait = table.submit(REQUEST)
        (ended,) = table.accept(wait, "t1", 0, deadline=9)
        assert ended.waits == [wait]
        assert wait.answer.body is not None
        assert wait.due is None

    def test_a_resting_task_is_polled_again(self):
        table = build_table(answered_seconds=100)
        first = accept(table, "t1")
        table.abandon(first, 0)
        wait = table.submit(REQUEST)
        effects = table.accept(wait, "t1", 0, deadline=None)
        assert Poll in [type(effect) for effect in effects]
        assert wait.entry is first.entry
        advance(table, 1000)
        assert table.pending["t1"] is wait.entry


class TestEnd:
    def test_pending_and_later_waits_fail(self):
        table = build_table()
        resting = accept(table, "t0")
        table.leave(resting, 0)
        waits = [accept(table, "t1"), accept(table, "t2", deadline=9)]
        submitting = table.submit(REQUEST)
        table.end(lambda task_id: SessionClosedError("closed", task_id=task_id))
        while table.take_ending(0) is not None:
            pass
        waits.append(attach(table, "t0")[0])
        waits.append(attach(table, "t3")[0])
        table.accept(submitting, "t4", 0, deadline=9)
        waits.append(submitting)
        assert [wait.answer.error.task_id for wait in waits] == ["t1", "t2", "t0", "t3", "t4"]
        table.clear()
        assert not table.pending
        assert [len(table.resting), len(table.answered), len(table.parked)] == [0, 0, 0]
