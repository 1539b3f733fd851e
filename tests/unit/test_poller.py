"""Polls: their schedule, their meaning, and that they never fail a task that has a source."""

import asyncio
import itertools

import pytest
from task_support import Service, attach, count_scheduled, resolving, submit

from cloudinary_analyze import (
    Captioning,
    CaptioningAnalysis,
    Response,
    ResultNotDeliveredError,
    Settings,
    TaskFailedError,
    TaskTimeoutError,
)
from cloudinary_analyze._tasks.poller import compute_interval
from cloudinary_analyze._tasks.table import MOST_UNCONFIRMED
from cloudinary_analyze.errors import (
    AuthenticationError,
    NotFoundError,
    NotificationSourceError,
    PermissionDeniedError,
    ResponseDecodeError,
    ServerError,
    TransportError,
)
from cloudinary_analyze.responses import TaskStatus

RESPONSE = Response(CaptioningAnalysis("a dog"), model="captioning")


def gaps(instants):
    return [after - before for before, after in itertools.pairwise(instants)]


class TestIntervals:
    @pytest.mark.parametrize(("with_source", "first", "longest"), [(True, 5, 300), (False, 1, 30)])
    def test_grow_from_the_first_to_the_longest(self, with_source, first, longest):
        interval, intervals = 0.0, []
        for _ in range(20):
            interval = compute_interval(interval, Settings(), with_source=with_source)
            intervals.append(interval)
        assert intervals[0] == first
        assert intervals[-1] == longest
        assert intervals == sorted(intervals)
        assert all(after <= 2 * before for before, after in itertools.pairwise(intervals))

    def test_settings_override_the_defaults(self):
        settings = Settings(poll_first=2, poll_longest=3)
        assert compute_interval(0, settings, with_source=True) == 2
        assert compute_interval(2, settings, with_source=True) == 3

    def test_a_first_over_the_default_longest_stays(self):
        assert compute_interval(0, Settings(poll_first=900), with_source=True) == 900
        assert compute_interval(900, Settings(poll_first=900), with_source=True) == 900

    async def test_are_jittered_within_a_fifth(self, clock):
        service = Service(clock)
        async with resolving(
            service, source=None, poll_first=10, poll_longest=10, polls_per_second=100_000
        ) as tracker:
            for _ in range(100):
                await submit(tracker)
            await clock.advance(12.1)
            first = [service.when(f"t{number}")[0] for number in range(1, 101)]
            assert all(8 <= at <= 12.01 for at in first)
            assert max(first) - min(first) > 2


class TestPace:
    async def test_polls_keep_the_rate_and_start_with_the_oldest(self, clock):
        service = Service(clock)
        async with resolving(service, polls_per_second=20, poll_first=5) as tracker:
            request = Captioning("https://example.com/a.jpg")
            handles = [tracker.submit(request, as_task=True, deadline=None) for _ in range(3000)]
            while len(tracker.table.pending) < 3000:
                await asyncio.sleep(0)
            due = {entry.task_id: entry.poll_at for entry in tracker.table.pending.values()}
            await clock.advance(100)
            instants = [at for at, _ in service.polls]
            assert 20 * 95 <= len(instants) <= 20 * 97
            assert all(gap >= 0.05 - 1e-9 for gap in gaps(instants))
            firsts = [due[asked] for _, asked in service.polls[:1500]]
            assert firsts == sorted(firsts)
            assert not any(handle.done() for handle in handles)

    async def test_no_more_than_the_permits_are_in_flight(self, clock):
        service = Service(clock, hold=asyncio.Event())
        async with resolving(
            service, poll_permits=3, polls_per_second=1000, poll_first=1
        ) as tracker:
            for _ in range(20):
                await submit(tracker)
            await clock.advance(10)
            assert service.most_on_the_wire == len(service.polls) == 3
            service.hold.set()
            await clock.advance(0.1)
            assert len(service.polls) == 20
            assert service.most_on_the_wire == 3

    async def test_a_task_due_later_delays_no_earlier_one(self, clock):
        service = Service(clock)
        async with resolving(service, poll_first=100) as tracker:
            await submit(tracker)
            await clock.advance(1)  # now the poller sleeps until that task is due
            attach(tracker, "known-elsewhere")
            await clock.advance(0)
            assert service.when("known-elsewhere") == [1]
            assert service.when("t1") == []

    async def test_a_requested_poll_runs_before_the_backlog(self, clock):
        service = Service(clock)
        async with resolving(service, polls_per_second=20, poll_first=1) as tracker:
            waits = [await submit(tracker) for _ in range(1500)]
            await clock.advance(10)
            attach(tracker, "mine")
            attach(tracker, "mine too")
            await clock.advance(0.5)
            assert service.when("mine")
            assert service.when("mine too")
            tracker.abandon(waits[-1])
            attach(tracker, "t1500")
            made = len(service.when("t1500"))
            await clock.advance(0.5)
            assert len(service.when("t1500")) == made + 1

    @pytest.mark.slow
    async def test_100_000_made_up_ids_delay_no_poll_of_a_task(self, clock):
        def report(task_id):
            return NotFoundError("404", status=404) if "made" in task_id else "completed"

        service = Service(clock, state=report)
        async with resolving(service, polls_per_second=20, result_grace=100) as tracker:
            tasks = [await submit(tracker) for _ in range(20)]
            flood = [attach(tracker, f"made-up-{index}") for index in range(100_000)]
            assert sum(wait.answer is None for wait in flood) == MOST_UNCONFIRMED
            assert len(tracker.table.pending) == MOST_UNCONFIRMED + 20
            due = {wait.entry.task_id: wait.entry.poll_at for wait in tasks}
            await clock.advance(10)
            for wait in tasks:
                (polled,) = service.when(wait.entry.task_id)
                assert polled - due[wait.entry.task_id] <= 2.1  # 20 of them, every other poll
            await clock.advance(110)
            for wait in tasks:
                assert isinstance(wait.answer.error, ResultNotDeliveredError)
            assert attach(tracker, "one-more").answer is not None
            for wait in flood:
                tracker.abandon(wait)
            assert attach(tracker, "one-more").answer is None

    async def test_made_up_ids_use_half_of_the_polls_at_most(self, clock):
        def answer(task_id):
            return NotFoundError("404", status=404) if "made" in task_id else "pending"

        service = Service(clock, state=answer)
        async with resolving(service, polls_per_second=20, poll_first=1, poll_longest=1) as tracker:
            for _ in range(100):
                await submit(tracker)
            for index in range(2000):
                attach(tracker, f"made-up-{index}")
            await clock.advance(20)
            honest = sum("made" not in asked for _, asked in service.polls)
            assert honest >= len(service.polls) / 2 - 20
            assert len(service.polls) >= 390

    async def test_an_answered_task_is_not_polled_again(self, clock):
        service = Service(clock)
        async with resolving(service, poll_first=1) as tracker:
            await submit(tracker)
            await clock.advance(2)
            made = len(service.polls)
            tracker.end_source(NotificationSourceError("ended"))
            await clock.advance(1000)
            assert len(service.polls) == made
            assert count_scheduled(tracker) == 0

    async def test_a_task_attached_during_a_poll_has_one_schedule(self, clock):
        service = Service(clock, hold=asyncio.Event())
        async with resolving(service, poll_first=10, poll_longest=10) as tracker:
            wait = await submit(tracker)
            await clock.advance(12)
            tracker.abandon(wait)  # while the poll is in flight
            attach(tracker, "t1")
            service.hold.set()
            await clock.advance(300)
            assert len(service.polls) <= 2 + 300 / 8
            assert count_scheduled(tracker) == 1


class TestCompleted:
    async def test_with_a_source_the_task_waits_for_the_grace(self, clock):
        service = Service(clock, state=lambda _: "completed")
        async with resolving(service) as tracker:
            wait = await submit(tracker, deadline=None)
            await clock.advance(6)
            assert wait.entry.status == "completed"
            polled_at = service.polls[0][0]
            await clock.advance(polled_at + 1200 - clock.now - 0.01)
            assert wait.answer is None
            await clock.advance(0.01)
            error = wait.answer.error
            assert isinstance(error, ResultNotDeliveredError)
            assert error.task_id == "t1"
            assert error.last_status.state == "completed"
            assert "1200 s" in str(error)
            assert "notification URL" in str(error)
            assert len(service.polls) == 1  # a task that ended needs no further poll

    @pytest.mark.parametrize(("source", "grace"), [(None, 1200), (True, 0)])
    async def test_without_source_or_grace_it_fails_at_once(self, clock, source, grace):
        service = Service(clock, state=lambda _: "completed")
        async with resolving(service, source=source, result_grace=grace) as tracker:
            wait = await submit(tracker)
            await clock.advance(6)
            assert isinstance(wait.answer.error, ResultNotDeliveredError)
            assert "mode='call'" in str(wait.answer.error) or source

    async def test_on_missing_result_analyze_calls_once(self, clock):
        service = Service(clock, state=lambda _: "completed", repeat=RESPONSE)
        async with resolving(service, source=None, on_missing_result="analyze") as tracker:
            wait = await submit(tracker)
            await clock.advance(2)
            assert wait.answer.response is RESPONSE
            assert wait.answer.by == "analyze"
            assert service.calls == 2

    async def test_attached_during_the_call_it_is_not_repeated(self, clock):
        release = asyncio.Event()

        class Slow(Service):
            async def analyze(self, request, *, as_task=False, **options):
                answer = await super().analyze(request, as_task=as_task, **options)
                if not as_task:
                    await release.wait()
                return answer

        service = Slow(clock, state=lambda _: "completed", repeat=RESPONSE)
        async with resolving(service, source=None, on_missing_result="analyze") as tracker:
            wait = await submit(tracker)
            await clock.advance(2)
            tracker.abandon(wait)
            again = attach(tracker, "t1")
            await clock.advance(60)
            release.set()
            await clock.advance(1)
            assert again.answer.response is RESPONSE
            assert service.calls == 2
            assert len(service.polls) == 1

    async def test_the_error_of_the_repeated_call_fails_the_task(self, clock):
        service = Service(clock, state=lambda _: "completed", repeat=ServerError("broken"))
        async with resolving(service, source=None, on_missing_result="analyze") as tracker:
            wait = await submit(tracker)
            await clock.advance(2)
            assert wait.answer.error is service.repeat

    async def test_a_task_without_a_waiting_handle_is_not_repeated(self, clock):
        asked, release = asyncio.Event(), asyncio.Event()

        class Slow(Service):
            async def get_task_status(self, task_id, **options):
                status = await super().get_task_status(task_id, **options)
                asked.set()
                await release.wait()
                return status

        service = Slow(clock, state=lambda _: "completed", repeat=RESPONSE)
        async with resolving(service, source=None, on_missing_result="analyze") as tracker:
            wait = await submit(tracker)
            await clock.advance(2)
            assert asked.is_set()
            tracker.abandon(wait)
            release.set()
            await clock.advance(1)
            assert service.calls == 1
            again = attach(tracker, "t1")  # its request is known here
            await clock.advance(2)
            assert again.answer.response is RESPONSE
            assert service.calls == 2

    async def test_attached_by_its_id_it_cannot_be_repeated(self, clock):
        service = Service(clock, state=lambda _: "completed", repeat=RESPONSE)
        async with resolving(service, source=None, on_missing_result="analyze") as tracker:
            wait = attach(tracker, "t1")
            await clock.advance(2)
            assert isinstance(wait.answer.error, ResultNotDeliveredError)
            assert service.calls == 0

    @pytest.mark.parametrize(
        "data",
        [
            {"status": "completed", "analysis": {"data": {"caption": "a cat"}}},
            {"status": "completed", "result": {"analysis": {"data": {"caption": "a cat"}}}},
            {"status": "completed", "result": {"data": {"analysis": {"data": {"caption": "a"}}}}},
        ],
    )
    async def test_an_analysis_in_the_status_is_used(self, clock, data):
        status = TaskStatus("t1", "completed", raw={"data": data})
        service = Service(clock, state=lambda _: status)
        async with resolving(service) as tracker:
            wait = await submit(tracker)
            await clock.advance(6)
            assert wait.answer.by == "poll"
            assert b"caption" in wait.answer.body


class TestFailed:
    async def test_the_notification_with_the_reason_has_its_grace(self, clock):
        service = Service(clock, state=lambda _: "failed")
        async with resolving(service) as tracker:
            wait = await submit(tracker)
            await clock.advance(6)
            at = service.polls[0][0]
            await clock.advance(at + 15 - clock.now - 0.01)
            assert wait.answer is None
            await clock.advance(0.01)
            error = wait.answer.error
            assert isinstance(error, TaskFailedError)
            assert not error.cause_known
            assert error.task_id == "t1"

    async def test_without_a_source_it_fails_at_once(self, clock):
        service = Service(clock, state=lambda _: "failed")
        async with resolving(service, source=None) as tracker:
            wait = await submit(tracker)
            await clock.advance(2)
            assert not wait.answer.error.cause_known


class TestPollsThatFail:
    @pytest.mark.parametrize(
        "error",
        [
            ServerError("500", status=500),
            TransportError("gone"),
            ResponseDecodeError("HTML"),
            RuntimeError("a bug"),
        ],
    )
    @pytest.mark.parametrize("source", [True, None])
    async def test_failed_polls_are_repeated(self, clock, error, source):
        service = Service(clock, state=lambda _: error)
        async with resolving(service, source=source) as tracker:
            wait = await submit(tracker)
            await clock.advance(3600)
            assert wait.answer is None
            assert len(service.polls) > 10

    @pytest.mark.parametrize("kind", [AuthenticationError, PermissionDeniedError])
    async def test_refused_they_pause_for_minutes_with_one_warning(self, clock, kind, caplog):
        service = Service(clock, state=lambda _: kind("no", status=403))
        async with resolving(service) as tracker:
            waits = [await submit(tracker) for _ in range(50)]
            await clock.advance(60)
            waits.append(await submit(tracker))
            await clock.advance(3600)
            paused = gaps([at for at, _ in service.polls])
            assert [round(gap) for gap in paused[:4]] == [2, 16, 128, 300]
            assert all(round(gap) == 300 for gap in paused[4:])
            assert all(wait.answer is None for wait in waits)
            warnings = [r for r in caplog.records if r.levelname == "WARNING"]
            assert len(warnings) == 1
            assert "query_analysis_tasks" in caplog.text
            service.state = lambda _: "failed"
            await clock.advance(330)
            assert all(isinstance(wait.answer.error, TaskFailedError) for wait in waits)

    async def test_late_refusals_do_not_prolong_a_pause(self, clock):
        service = Service(clock, hold=asyncio.Event())
        service.state = lambda _: AuthenticationError("no", status=401)
        options = {"polls_per_second": 1000, "poll_first": 1, "poll_longest": 1}
        async with resolving(service, **options) as tracker:
            for _ in range(4):
                await submit(tracker)
            await clock.advance(2)
            assert len(service.polls) == 4
            service.hold.set()
            await clock.advance(0)
            service.state = lambda _: "pending"
            await clock.advance(3)
            assert len(service.polls) > 4

    @pytest.mark.parametrize("kind", [AuthenticationError, PermissionDeniedError])
    async def test_refused_without_a_source_they_fail_the_task(self, clock, kind):
        error = kind("no", status=403)
        service = Service(clock, state=lambda _: error)
        async with resolving(service, source=None) as tracker:
            wait = await submit(tracker)
            await clock.advance(2)
            assert wait.answer.error is error

    async def test_not_found_counts_only_after_a_minute_and_twice(self, clock):
        error = NotFoundError("unknown", status=404)
        service = Service(clock, state=lambda _: error)
        async with resolving(service, source=None, poll_first=10, poll_longest=10) as tracker:
            wait = await submit(tracker)
            while wait.answer is None:
                assert wait.entry.misses == sum(at >= 60 for at in service.when()) < 2
                await clock.advance(1)
            assert isinstance(wait.answer.error, NotFoundError)
            assert "does not know the task t1" in str(wait.answer.error)
            assert wait.answer.error.__cause__ is error
            assert len([at for at in service.when() if at >= 60]) == 2
            assert len(service.polls) >= 7

    async def test_a_status_between_two_not_founds_resets_the_count(self, clock):
        answers = iter([NotFoundError("unknown", status=404), "pending"] * 20)
        service = Service(clock, state=lambda _: next(answers))
        async with resolving(service, source=None, poll_first=100, poll_longest=100) as tracker:
            wait = await submit(tracker)
            await clock.advance(1000)
            assert len(service.polls) > 6
            assert wait.answer is None

    async def test_not_found_never_fails_a_task_with_a_source(self, clock):
        service = Service(clock, state=lambda _: NotFoundError("unknown", status=404))
        async with resolving(service) as tracker:
            wait = await submit(tracker)
            await clock.advance(20_000)
            assert wait.entry.misses > 2
            assert wait.answer is None

    async def test_an_unknown_state_warns_once_and_counts_as_running(self, clock, caplog):
        service = Service(clock, state=lambda _: "queued_for_gpu")
        async with resolving(service, source=None) as tracker:
            waits = [await submit(tracker) for _ in range(3)]
            await clock.advance(100)
            assert all(wait.entry.status == "queued_for_gpu" for wait in waits)
            assert all(wait.answer is None for wait in waits)
            assert min(service.per_task().values()) > 3
            assert caplog.text.count("queued_for_gpu") == 1


class TestTimeouts:
    async def test_end_the_handle_alone_and_its_polls(self, clock):
        service = Service(clock)
        async with resolving(service) as tracker:
            wait = await submit(tracker, deadline=100)
            await clock.advance(100)
            assert isinstance(wait.answer.error, TaskTimeoutError)
            assert wait.answer.error.task_id == "t1"
            made = len(service.polls)
            await clock.advance(500)
            assert len(service.polls) == made
            again = attach(tracker, "t1")
            assert again.entry is wait.entry
            await clock.advance(0.1)
            assert len(service.polls) == made + 1  # the task may have ended by now
