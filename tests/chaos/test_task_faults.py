"""Thousands of tasks under all faults at once: each ends once, for the right reason."""

import asyncio
from collections import Counter

import pytest
from scripted import until
from task_support import connected, count_scheduled, idle, quick, unconnected

from cloudinary_analyze import (
    Captioning,
    Response,
    ResultNotDeliveredError,
    TaskFailedError,
    TaskTimeoutError,
)
from cloudinary_analyze.emulator import FaultPlan
from cloudinary_analyze.events import TaskAnswered

EVERYTHING = FaultPlan(
    early=0.05,
    duplicated=0.05,
    delayed=0.05,
    lost=0.05,
    forged=0.05,
    stale=0.05,
    malformed=0.05,
    foreign=0.05,
    unrelated=0.05,
    unknown_status=0.05,
    failed=0.05,
    delay_seconds=0.6,
)
EXTRAS = ("forged", "stale", "malformed", "foreign", "unrelated")
PATIENCE = 250.0  # real seconds; only a hang takes longer
COUNTS = [1_000, pytest.param(10_000, marks=pytest.mark.slow)]


def source(index):
    return f"https://example.com/{index}.jpg"


class Witness:
    """Counts how often each task is answered."""

    def __init__(self):
        self.answered = Counter()

    def __call__(self, event):
        if isinstance(event, TaskAnswered):
            self.answered[event.task_id] += 1


async def submit_all(session, count, *, mode="task"):
    """Submit a number of tasks and return their handles, in order."""
    handles = []
    for index in range(count):
        handles.append(session.submit(Captioning(source(index)), mode=mode))
        if index % 500 == 499:
            await handles[-1].accepted()
    return handles


async def gather_all(handles):
    return await asyncio.gather(*handles, return_exceptions=True)


def list_kinds(faults):
    """Return the kinds of notifications that are sent for a task."""
    yield from (kind for kind in EXTRAS if kind in faults)
    if "lost" not in faults:
        yield "genuine"
        if "duplicated" in faults:
            yield "duplicate"


async def receive_all(emulator, session, count):
    """Wait until all tasks ended and all of their notifications were read."""

    def is_over():
        tasks = emulator.tasks.values()
        if len(tasks) < count or any(task.outcome is None for task in tasks):
            return False
        expected = Counter(kind for task in tasks for kind in list_kinds(task.faults))
        return emulator.counts.webhooks == expected and session._source.queue.empty()

    await until(is_over, seconds=PATIENCE)


async def pass_time(session, clock, seconds):
    """Advance the clock; each poll is answered at the instant when it is made."""
    polls = session._connection.caller.attempts.poll_queue.admission
    for _ in range(round(seconds / 0.05)):
        await clock.advance(0.05)
        await until(lambda: not polls.in_use, seconds=PATIENCE)


def check_failure(outcome, *, by_notification):
    assert isinstance(outcome, TaskFailedError)
    assert outcome.cause_known is by_notification
    assert outcome.status == (500 if by_notification else 0)


def check_response(outcome, index):
    assert isinstance(outcome, Response), outcome
    assert outcome.entity == source(index)  # forged and stale ones name another
    assert outcome.analysis.caption


async def check_quiet(session):
    """Check that no task, permit, poll or timer is left."""
    assert idle(session) == (0, 0, 0, 0)
    tracker = session._connection.tracker
    assert count_scheduled(tracker) == 0
    assert len(tracker.table.dues) == 0
    assert not tracker._calls


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.filterwarnings("ignore:A task was submitted on a session without:UserWarning")
class TestEverythingAtOnce:
    """A mix of all faults at 5 % each: nothing hangs, nothing ends twice, nothing forged counts."""

    async def test_with_notifications_and_polls(self, count, caplog, clock):
        caplog.set_level("ERROR")
        witness = Witness()
        options = {"on_event": witness, "clock": clock}
        settings = quick(
            poll_first=0.5,
            poll_longest=1.0,
            polls_per_second=100_000,
            result_grace=1.5,
            failure_grace=1.5,
            permits=256,
        )
        async with connected(
            settings, session_options=options, faults=EVERYTHING, task_seconds=0.2
        ) as (emulator, session):
            handles = await submit_all(session, count)
            await until(
                lambda: session.stats.notifications.get("resolved", 0) >= count / 2,
                seconds=PATIENCE,
            )
            assert emulator.counts.total_polls == 0
            # polls race with notifications that are still to come
            await pass_time(session, clock, 0.7)
            assert 0 < emulator.counts.total_polls <= count / 2
            await receive_all(emulator, session, count)
            await pass_time(session, clock, 3.0)
            assert all(handle.done() for handle in handles)
            outcomes = await gather_all(handles)
            for index, (handle, outcome) in enumerate(zip(handles, outcomes, strict=True)):
                task = emulator.tasks[handle.task_id]
                notified = "lost" not in task.faults
                if "failed" in task.faults:
                    check_failure(outcome, by_notification=notified)
                elif notified:
                    check_response(outcome, index)
                else:
                    assert isinstance(outcome, ResultNotDeliveredError)
                    assert outcome.task_id == handle.task_id
            expected = Counter(fault for task in emulator.tasks.values() for fault in task.faults)
            lost_twice = sum(
                {"duplicated", "lost"} <= set(t.faults) for t in emulator.tasks.values()
            )
            twice = expected["duplicated"] - lost_twice

            def duplicates_bounds():
                """Two notifications that precede the 202 are both parked, so neither is a duplicate."""
                seen = session.stats.notifications
                parked = seen["parked"] - expected["foreign"]
                return twice - parked // 2, seen["duplicate"], twice

            seen = session.stats.notifications
            assert seen["resolved"] == sum("lost" not in t.faults for t in emulator.tasks.values())
            for fault in ("forged", "stale", "malformed", "unrelated"):
                assert seen[fault] == expected[fault] > 0
            assert duplicates_bounds() == tuple(sorted(duplicates_bounds()))
            assert session.stats.parked == expected["foreign"]  # for unknown tasks
            assert set(witness.answered.values()) == {1}
            assert len(witness.answered) == count == len(emulator.tasks)
            assert emulator.counts.total_polls < count
            await check_quiet(session)
        assert not caplog.records

    async def test_with_notifications_alone(self, count, clock):
        """Without polls, tasks whose notification is lost end at their handle's timeout."""
        settings = quick(
            poll_first=3000, poll_longest=3000, permits=256, task_timeout=5.0, answered_seconds=0.3
        )
        async with connected(
            settings, session_options={"clock": clock}, faults=EVERYTHING, task_seconds=0.05
        ) as (emulator, session):
            handles = await submit_all(session, count)
            await receive_all(emulator, session, count)
            await clock.advance(5.0)
            outcomes = await gather_all(handles)
            for index, (handle, outcome) in enumerate(zip(handles, outcomes, strict=True)):
                faults = emulator.tasks[handle.task_id].faults
                if "lost" in faults:
                    assert isinstance(outcome, TaskTimeoutError)
                    assert outcome.task_id == handle.task_id
                elif "failed" in faults:
                    check_failure(outcome, by_notification=True)
                else:
                    check_response(outcome, index)
            assert emulator.counts.total_polls == 0
            await clock.advance(0.4)  # then the table also forgets abandoned tasks
            await check_quiet(session)

    @pytest.mark.parametrize("ways", ["raise", "analyze", "results_in_status"])
    async def test_with_polls_alone(self, count, ways):
        """Without a source, the poll decides, and the settings determine the outcome."""
        settings = quick(
            permits=256,
            poll_permits=32,
            polls_per_second=100_000,
            on_missing_result="analyze" if ways == "analyze" else "raise",
        )
        async with unconnected(
            settings,
            faults=EVERYTHING,
            task_seconds=0.05,
            results_in_status=ways == "results_in_status",
        ) as (emulator, session):
            handles = await submit_all(session, count)
            outcomes = await gather_all(handles)
            failed = 0
            for index, (handle, outcome) in enumerate(zip(handles, outcomes, strict=True)):
                if "failed" in emulator.tasks[handle.task_id].faults:
                    failed += 1
                    check_failure(outcome, by_notification=False)
                elif ways == "raise":
                    assert isinstance(outcome, ResultNotDeliveredError)
                else:
                    check_response(outcome, index)
            charged = 2 * count - failed if ways == "analyze" else count
            assert emulator.counts.total_done == charged
            await check_quiet(session)
