"""In any order of events, each wait ends once, states stay legal, and nothing is retained."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from task_support import build_failure, build_result

from cloudinary_analyze import Captioning, NotFoundError, Settings
from cloudinary_analyze._tasks.entries import AWAITED, NOBODY, Answer, Ended, Phase, Repeat
from cloudinary_analyze._tasks.table import Table
from cloudinary_analyze.errors import ServerError, SessionClosedError
from cloudinary_analyze.responses import TaskStatus
from cloudinary_analyze.webhooks import parse_notification

REQUEST = Captioning("https://example.com/a.jpg")
IDS = st.sampled_from(["t1", "t2", "t3", "t4"])


class TableMachine(RuleBasedStateMachine):
    """Applies the actions of handles, the service and time to a table."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.table = Table(
            Settings(
                answered_seconds=50,
                answered_count=3,
                answered_bytes=2000,
                parked_seconds=40,
                parked_bytes=1500,
                result_grace=20,
                failure_grace=5,
                on_missing_result="analyze",
            ),
            with_source=True,
        )
        self.submitted = []
        self.open = []
        self.dropped = set()
        self.entries = []
        self.repeating = []
        self.trusted = set()
        self.outcomes = {}

    def perform(self, effects):
        for effect in effects:
            if isinstance(effect, Repeat):
                self.repeating.append(effect.entry)
            if isinstance(effect, Ended):
                for wait in effect.waits:
                    assert wait not in self.outcomes, "it ended twice"
                    assert wait.answer is effect.answer
                    self.outcomes[wait] = effect.answer

    def note(self, wait):
        self.open.append(wait)
        if wait.entry not in self.entries:
            self.entries.append(wait.entry)

    @rule()
    def submit(self):
        wait = self.table.submit(REQUEST)
        self.submitted.append(wait)
        self.note(wait)

    @precondition(lambda self: self.submitted)
    @rule(task_id=IDS, seconds=st.sampled_from([None, 7.0, 30.0]))
    def accept(self, task_id, seconds):
        wait = self.submitted.pop(0)
        deadline = None if seconds is None else self.now + seconds
        self.perform(self.table.accept(wait, task_id, self.now, deadline=deadline))

    @precondition(lambda self: self.submitted)
    @rule()
    def refuse(self):
        wait = self.submitted.pop(0)
        answer = Answer("session", ServerError("no", status=500))
        self.perform(self.table.answer(wait.entry, answer, self.now))

    @rule(
        task_id=IDS,
        seconds=st.sampled_from([None, 7.0, 30.0]),
        known=st.booleans(),
        trusted=st.booleans(),
    )
    def attach(self, task_id, seconds, known, trusted):
        deadline = None if seconds is None else self.now + seconds
        wait, effects = self.table.attach(
            task_id,
            REQUEST if known else Captioning,
            self.now,
            deadline=deadline,
            trusted=trusted,
        )
        if trusted:
            self.trusted.add(wait.entry)
        if wait.answer is not None and not effects:
            self.outcomes[wait] = wait.answer
        self.perform(effects)
        self.note(wait)

    @rule(task_id=IDS, kind=st.sampled_from(["result", "failure", "odd", "progress"]))
    def deliver(self, task_id, kind):
        body = build_failure(task_id) if kind == "failure" else build_result(task_id)
        if kind == "odd":
            body = build_result(task_id, data=None)
        if kind == "progress":
            body = build_result(task_id, data={"status": "processing"})
        _, effects = self.table.deliver(parse_notification(body), body, self.now)
        self.perform(effects)

    @precondition(lambda self: self.entries)
    @rule(
        data=st.data(),
        state=st.sampled_from(["pending", "completed", "failed", "odd", "404", "500"]),
    )
    def poll(self, data, state):
        entry = self.entries[data.draw(st.integers(0, len(self.entries) - 1))]
        if entry.task_id is None:
            return
        if state in {"404", "500"}:
            kind = NotFoundError if state == "404" else ServerError
            effects = self.table.take_error(entry, kind("no", status=int(state)), self.now)
        else:
            effects = self.table.take_status(entry, TaskStatus(entry.task_id, state), self.now)
        self.perform(effects)

    @precondition(lambda self: self.repeating)
    @rule(fails=st.booleans())
    def end_repetition(self, fails):
        error = ServerError("no", status=500) if fails else SessionClosedError("closed")
        answer = Answer("analyze" if fails else "session", error)
        self.perform(self.table.answer(self.repeating.pop(), answer, self.now))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), unobserved=st.booleans())
    def drop(self, data, unobserved):
        wait = self.open[data.draw(st.integers(0, len(self.open) - 1))]
        self.perform(self.table.leave(wait, self.now, unobserved=unobserved))
        if wait not in self.outcomes:
            self.dropped.add(wait)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def abandon(self, data):
        wait = self.open[data.draw(st.integers(0, len(self.open) - 1))]
        self.perform(self.table.abandon(wait, self.now))

    @rule(seconds=st.sampled_from([1.0, 6.0, 25.0, 60.0]))
    def pass_time(self, seconds):
        self.now += seconds
        while (effects := self.table.take_due(self.now)) is not None:
            self.perform(effects)
        assert self.table.wake_at > self.now

    @rule()
    def end_source(self):
        self.table.end(lambda task_id: SessionClosedError(str(task_id)))

    @precondition(lambda self: self.table.ending)
    @rule(most=st.integers(1, 3))
    def end_some(self, most):
        for _ in range(most):
            self.perform(self.table.take_ending(self.now) or ())

    @invariant()
    def states_are_legal(self):
        table = self.table
        for task_id, entry in table.pending.items():
            assert entry.task_id == task_id
            assert entry.phase in {*AWAITED, Phase.REPEATING}
            assert entry.waits or entry.phase == Phase.REPEATING
            assert (entry.due is None) == (entry.phase == Phase.PENDING)
            assert task_id not in table.resting
            assert task_id not in table.parked
        for entry in self.entries:
            for index, wait in enumerate(entry.waits):
                assert (wait.index, wait.entry, wait.answer) == (index, entry, None)
            if entry.phase == Phase.OVER:
                assert not entry.waits
                assert (entry.due, entry.poll_at) == (None, None)
            assert entry.waits is not NOBODY or entry.phase == Phase.OVER
            if entry.phase == Phase.RESTING:
                assert not entry.waits
        doubtful = [entry for entry in table.pending.values() if not entry.verified]
        # less, if a poll of an entry that is gone confirmed the id
        assert table.unconfirmed <= {e.task_id for e in doubtful if e not in self.trusted}
        assert len(table.answered) <= 3
        assert table.answered.bytes <= 2000
        assert table.parked.bytes <= 1500
        assert len(table.resting) <= 3

    def teardown(self):
        self.table.end(lambda task_id: SessionClosedError(str(task_id)))
        while (effects := self.table.take_ending(self.now)) is not None:
            self.perform(effects)
        for wait in self.submitted:
            answer = Answer("session", SessionClosedError("closed"))
            self.perform(self.table.answer(wait.entry, answer, self.now))
        for entry in self.repeating:
            answer = Answer("session", SessionClosedError("closed"))
            self.perform(self.table.answer(entry, answer, self.now))
        self.table.clear()
        for wait in self.open:
            assert (wait in self.outcomes) != (wait in self.dropped), "a handle did not end"
        assert not self.table.pending
        kept = (self.table.resting, self.table.answered, self.table.parked)
        assert not any(map(len, kept))
        assert len(self.table.dues) == 0


TestTable = TableMachine.TestCase
TestTable.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
