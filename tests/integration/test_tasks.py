"""Tasks over real sockets: handles as awaitables, re-attachment, timeouts, closing."""

import asyncio
import gc
import itertools
import time

import pytest
from scripted import ScriptedServer, after, answer, until
from task_support import (
    URL,
    build_failure,
    build_result,
    connected,
    count_scheduled,
    idle,
    library_tasks,
    quick,
    sign,
)

from cloudinary_analyze import (
    AnalysisTask,
    AnalyzeSession,
    Captioning,
    CaptioningAnalysis,
    Credentials,
    OtherModel,
    SessionClosedError,
    TaskFailedError,
    TaskLimitError,
    TaskTimeoutError,
)
from cloudinary_analyze.emulator import FaultPlan
from cloudinary_analyze.errors import BadRequestError, InvalidRequestError, ResponseDecodeError
from cloudinary_analyze.webhooks import parse_notification

NEVER = 3600.0
FAILING = FaultPlan(failed=1)


def request(index=0):
    return Captioning(f"https://example.com/{index}.jpg")


def notify(session, task_id, **fields):
    """Let a signed notification of a task arrive, and return its body."""
    body = build_result(task_id, **fields)
    secret, now = session._credentials.api_secret, time.time()
    session._source.queue.put_nowait(sign(body, secret=secret, at=now, received_at=now))
    return body


def finish(emulator):
    """End the tasks of an emulator, and deliver their results."""
    for task in emulator.tasks.values():
        emulator._desk._finish(task)


@pytest.fixture
async def reported():
    """Collect what the loop's exception handler gets."""
    told = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    yield told
    asyncio.get_running_loop().set_exception_handler(None)


class TestAwaiting:
    async def test_submit_returns_a_handle_at_once_and_it_resolves(self):
        settings = quick(poll_first=NEVER, poll_longest=NEVER)
        async with connected(settings, task_seconds=NEVER) as (emulator, session):
            task = session.submit(request())
            assert isinstance(task, AnalysisTask)
            assert (task.task_id, task.status, task.done()) == (None, "submitting", False)
            with pytest.raises(asyncio.InvalidStateError):
                task.result()
            task_id = await task.accepted()
            assert task_id in emulator.tasks
            assert task.task_id == task_id
            assert task.status == "pending"
            notify(session, task_id)
            response = await task
            assert isinstance(response.analysis, CaptioningAnalysis)
            assert response.entity == URL
            assert response.raw["task_id"] == task_id
            assert (task.done(), task.status) == (True, "completed")
            assert task.result() is response is await task
            assert task.exception() is None
            assert idle(session) == (0, 0, 0, 0)

    async def test_every_asyncio_function_can_wait(self):
        """gather, as_completed, wait_for, timeout, shield, TaskGroup, and wait by as_future."""
        async with connected(task_seconds=0.1) as (_, session):
            tasks = [session.submit(request(index)) for index in range(4)]
            gathered = await asyncio.gather(*tasks)
            assert [response.entity for response in gathered] == [
                f"https://example.com/{index}.jpg" for index in range(4)
            ]

            tasks = [session.submit(request(index)) for index in range(4)]
            found = {(await first).entity for first in asyncio.as_completed(tasks)}
            assert len(found) == 4

            assert (await asyncio.wait_for(session.submit(request()), 30)).analysis.caption
            assert (await asyncio.shield(session.submit(request()))).analysis.caption
            async with asyncio.timeout(30):
                assert (await session.submit(request())).analysis.caption

            async def awaited(task):
                return await task

            async with asyncio.TaskGroup() as group:
                members = [group.create_task(awaited(session.submit(request(i)))) for i in "ab"]
            assert all(member.result().analysis.caption for member in members)

            tasks = [session.submit(request(index)) for index in range(4)]
            done, pending = await asyncio.wait(tasks)
            assert (done, pending) == (set(tasks), set())
            tasks = [session.submit(request(index)) for index in range(4)]
            done, pending = await asyncio.wait(tasks, return_when="FIRST_COMPLETED")
            assert done
            assert done | pending == set(tasks)
            await asyncio.wait(tasks, return_when="FIRST_EXCEPTION")

            done, pending = await asyncio.wait([task.as_future() for task in tasks])
            assert (len(done), pending) == (4, set())
            assert tasks[0].as_future() is tasks[0].as_future()
            assert idle(session) == (0, 0, 0, 0)

    async def test_a_failure_reaches_each_waiter(self):
        async with connected(faults=FAILING) as (_, session):
            task = session.submit(request())
            outcomes = await asyncio.gather(task, task, task, return_exceptions=True)
            assert all(isinstance(outcome, TaskFailedError) for outcome in outcomes)
            assert task.exception() is outcomes[0]
            with pytest.raises(TaskFailedError, match="internal server error"):
                task.result()

    async def test_a_cancelled_waiter_disturbs_no_other(self):
        async with connected(task_seconds=NEVER) as (emulator, session):
            task = session.submit(request())
            waiters = [asyncio.ensure_future(task) for _ in range(3)]
            future = task.as_future()
            await task.accepted()
            waiters[1].cancel()
            future.cancel()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await task
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(task, 0.01)
            finish(emulator)
            responses = await asyncio.gather(waiters[0], waiters[2], task, task.as_future())
            assert len(set(map(id, responses))) == 1
            assert waiters[1].cancelled()

    async def test_done_callbacks_get_the_handle(self):
        async with connected() as (_, session):
            told = []
            task = session.submit(request())
            task.add_done_callback(told.append)
            await task
            await until(lambda: told)
            assert told == [task]

    async def test_wait_gives_the_status_by_polls_and_raises_for_no_failure(self):
        settings = quick(failure_grace=NEVER, result_grace=NEVER)
        async with connected(settings, faults=FaultPlan(lost=1, failed=1)) as (_, session):
            task = session.submit(request())
            status = await task.wait()
            assert (status.task_id, status.state) == (task.task_id, "failed")
            assert not task.done()
        async with connected(settings, faults=FaultPlan(lost=1)) as (_, session):
            assert (await session.submit(request()).wait()).state == "completed"

    async def test_a_refused_submission_raises_its_error_everywhere(self):
        async with ScriptedServer(answer(400, sample="error_400_tag_name")) as server:
            async with server.session(notifications=asyncio.Queue()) as session:
                task = session.submit(request())
                for wait in (task, task.accepted(), task.wait()):
                    with pytest.raises(BadRequestError, match="MA_00003"):
                        await wait
                assert task.task_id is None
                assert idle(session) == (0, 0, 0, 0)

    async def test_a_removed_callback_is_not_called(self):
        async with connected() as (_, session):
            told = []
            task = session.submit(request())
            assert task.remove_done_callback(told.append) == 0
            for _ in range(2):
                task.add_done_callback(told.append)
            assert task.remove_done_callback(told.append) == 2
            await task
            await asyncio.sleep(0)
            assert not told

    async def test_a_future_outlives_the_handle_that_it_was_taken_from(self):
        async with connected(task_seconds=0.1) as (_, session):
            future = session.submit(request()).as_future()
            gc.collect()
            assert (await future).analysis.caption

    async def test_a_signed_result_that_cannot_be_read_ends_its_task_with_the_body(self):
        async with connected(task_seconds=NEVER) as (_, session):
            task = session.submit(request())
            body = notify(session, await task.accepted(), data={"progress": 50})
            with pytest.raises(ResponseDecodeError) as caught:
                await task
            assert caught.value.raw_body == body

    async def test_signed_progress_changes_the_status_and_ends_nothing(self):
        async with connected(task_seconds=NEVER) as (_, session):
            task = session.submit(request())
            task_id = await task.accepted()
            notify(session, task_id, data={"status": "processing", "progress": 50})
            await until(lambda: task.status == "processing")
            assert not task.done()
            notify(session, task_id)
            assert (await task).analysis.caption == "a cat"
            assert session.stats.notifications == {"progress": 1, "resolved": 1}


class TestEveryHandleEnds:
    """This holds for any order of closes, cancellations and drops."""

    @pytest.mark.parametrize("mode", ["call", "task"])
    @pytest.mark.parametrize("turns", range(6))
    async def test_when_its_session_closes_a_few_turns_after_the_submission(self, mode, turns):
        async with connected() as (_, session):
            tasks = [session.submit(request(index), mode=mode) for index in range(3)]
            waiters = [
                asyncio.ensure_future(wait)
                for wait in (tasks[0], tasks[0].accepted(), tasks[1].wait(), tasks[1].as_future())
            ]
            for _ in range(turns):
                await asyncio.sleep(0)
            await session.aclose()
            await asyncio.wait(waiters)
            await asyncio.wait(tasks)
            for task in tasks:
                assert task.done()
                assert isinstance(task.exception(), SessionClosedError | None)

    async def test_when_the_close_is_cancelled_in_the_turn_of_the_submission(self):
        async with connected() as (_, session):
            task = session.submit(request())
            closing = asyncio.ensure_future(session.aclose())
            await asyncio.sleep(0)
            closing.cancel()
            await asyncio.wait([closing])
            assert isinstance((await asyncio.gather(task, return_exceptions=True))[0], Exception)

    async def test_when_the_submission_was_cancelled_by_others(self):
        async with connected() as (_, session):
            task = session.submit(request())
            for call in session._connection.tracker._calls.values():
                call.cancel()
            with pytest.raises(SessionClosedError):
                await task


class TestDropped:
    """A dropped handle leaves nothing behind."""

    async def test_by_a_handler_that_polls_one_task_again_and_again(self):
        settings = quick(poll_first=NEVER, poll_longest=NEVER)
        async with connected(settings, task_seconds=NEVER) as (_, session):
            tracker = session._connection.tracker
            task_id = await session.submit(request()).accepted()
            for _ in range(50):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(session.task(task_id, Captioning), 0.001)
                session.task(task_id, Captioning)
            await until(lambda: not tracker._dropped)
            gc.collect()
            await until(lambda: not tracker.table.pending)
            assert len(tracker.table.dues) == 0
            assert not tracker._changes
            assert len(tracker.table.resting) == 1

    async def test_by_strangers_who_ask_for_made_up_ids(self):
        async with connected() as (_, session):
            tracker = session._connection.tracker
            for index in range(200):
                session.task(f"made-up-{index}", Captioning)
            await until(lambda: not tracker.table.pending)
            assert len(tracker.table.resting) == len(tracker.table.dues) == 0
            assert count_scheduled(tracker) == 0

    @pytest.mark.slow
    async def test_100_000_made_up_ids_delay_no_task(self):
        settings = quick(poll_first=0.5, polls_per_second=200)
        async with connected(settings, faults=FaultPlan(lost=0.5), results_in_status=True) as (
            _,
            session,
        ):
            flood = [session.task(f"made-up-{index}", Captioning) for index in range(100_000)]
            assert session.stats.pending == 10_000
            errors = [task.exception() for task in flood if task.done()]
            assert len(errors) == 90_000
            assert {type(error) for error in errors} == {TaskLimitError}
            begun = time.monotonic()
            tasks = [session.submit(request(index)) for index in range(50)]
            async with asyncio.timeout(30):
                responses = await asyncio.gather(*tasks)
            assert all(response.analysis.caption for response in responses)
            assert time.monotonic() - begun > 0.4  # half of them needed a poll
            flood.clear()
            gc.collect()
            await until(lambda: not session.stats.pending)
            assert not session.task("made-up-0", Captioning).done()

    async def test_in_another_thread(self):
        settings = quick(poll_first=NEVER, poll_longest=NEVER)
        async with connected(settings, task_seconds=NEVER) as (_, session):
            tasks = [session.submit(request(index)) for index in range(100)]
            await asyncio.gather(*(task.accepted() for task in tasks))
            await asyncio.to_thread(tasks.clear)
            await until(lambda: not session._connection.tracker.table.pending)

    @pytest.mark.parametrize("turns", range(5))
    async def test_by_a_waiter_cancelled_in_the_turn_of_the_failure(self, reported, turns):
        async with connected(quick(poll_first=NEVER, poll_longest=NEVER), task_seconds=NEVER) as (
            _,
            session,
        ):
            task = session.submit(request())
            body = build_failure(await task.accepted())
            waiter = asyncio.ensure_future(task)
            await asyncio.sleep(0)
            session._opened().tracker.deliver(parse_notification(body), body)
            for _ in range(turns):
                await asyncio.sleep(0)
            waiter.cancel()
            await asyncio.wait([waiter])
            if not waiter.cancelled():
                waiter.exception()
            assert isinstance(task.exception(), TaskFailedError)
            del task, waiter
            gc.collect()
            assert not reported

    async def test_in_the_turn_of_its_failure_is_not_reported(self, reported):
        async with connected(task_seconds=NEVER) as (_, session):
            task = session.submit(request())
            body = build_failure(await task.accepted())
            waiter = asyncio.ensure_future(task)
            await asyncio.sleep(0)
            waiter.cancel()
            await asyncio.wait([waiter])
            del task, waiter
            gc.collect()  # the wait is removed in the next turn
            session._opened().tracker.deliver(parse_notification(body), body)
            gc.collect()
            assert not reported

    async def test_and_awaited_before_its_failure_is_not_reported(self, reported):
        async with connected(faults=FAILING, task_seconds=NEVER) as (emulator, session):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(session.submit(request()), 0.02)
            await until(lambda: emulator.tasks)
            finish(emulator)
            await until(lambda: session.stats.notifications.get("resolved"))
            gc.collect()
            assert not reported


class TestReattaching:
    async def test_after_a_504_the_second_request_handler_has_the_result_at_once(self):
        """One handler gives up; the result arrives; a later one asks for the same id."""
        settings = quick(poll_first=NEVER, poll_longest=NEVER)
        async with connected(settings, task_seconds=NEVER) as (emulator, session):
            task = session.submit(request())
            task_id = await task.accepted()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await task  # here the web framework answers 504
            del task
            finish(emulator)
            await until(lambda: session.stats.notifications.get("resolved"))
            polls = emulator.counts.total_polls
            again = session.task(task_id, Captioning)
            assert again.done()
            assert (await again).analysis.caption
            assert await again.accepted() == task_id
            assert emulator.counts.total_polls == polls
            assert (await session.task(task_id, request())).analysis.caption

    async def test_handles_on_one_task_share_one_entry_and_one_answer(self):
        settings = quick(poll_first=NEVER, poll_longest=NEVER)
        async with connected(settings, task_seconds=NEVER) as (emulator, session):
            first = session.submit(request())
            task_id = await first.accepted()
            others = [session.task(task_id, Captioning) for _ in range(5)]
            assert session.stats.pending == 1
            finish(emulator)
            responses = await asyncio.gather(first, *others)
            assert {response.entity for response in responses} == {"https://example.com/0.jpg"}
            assert session.stats.notifications["resolved"] == 1
            assert emulator.counts.total_polls == 0

    async def test_a_task_attached_in_another_session_is_polled_at_once(self):
        """After a restart: what failed meanwhile is found, though its webhook went elsewhere."""
        async with connected(faults=FAILING) as (emulator, session):
            task = session.submit(request())
            await asyncio.gather(task, return_exceptions=True)
            async with AnalyzeSession(
                Credentials.from_url(emulator.cloudinary_url),
                settings=quick(poll_first=NEVER, poll_longest=NEVER),
                notifications=asyncio.Queue(),
            ) as restarted:
                with pytest.raises(TaskFailedError) as caught:
                    await restarted.task(task.task_id, Captioning)
                assert not caught.value.cause_known

    async def test_a_notification_for_a_task_of_another_process_waits_for_its_handle(self):
        queue = asyncio.Queue()
        credentials = Credentials("demo", "key", "secret")
        async with ScriptedServer(answer(404, sample="error_404_task")) as server:
            async with server.session(notifications=queue, credentials=credentials) as session:
                now = time.time()
                body = build_result("t-elsewhere")
                queue.put_nowait(sign(body, secret="secret", at=now, received_at=now))
                await until(lambda: session.stats.parked == 1)
                handle = session.task("t-elsewhere", Captioning)
                assert handle.done()
                assert (await handle).analysis.caption == "a cat"

    async def test_another_model_can_be_named_by_a_request_alone(self):
        async with connected() as (_, session):
            task = session.submit(request())
            task_id = await task.accepted()
            other = await session.task(task_id, OtherModel("captioning", "https://a.test/a.jpg"))
            assert other.analysis.raw["data"]["caption"] == (await task).analysis.caption
            with pytest.raises(InvalidRequestError, match="OtherModel"):
                session.task(task_id, OtherModel)
            with pytest.raises(InvalidRequestError, match="task id"):
                session.task("", Captioning)


class TestTimeouts:
    async def test_each_handle_has_its_own_and_the_task_goes_on(self):
        async with connected(task_seconds=NEVER) as (emulator, session):
            patient = session.submit(request())
            task_id = await patient.accepted()
            hasty = session.task(task_id, Captioning, timeout=0.05)
            with pytest.raises(TaskTimeoutError) as caught:
                await hasty
            assert caught.value.task_id == task_id
            assert task_id in str(caught.value)
            assert isinstance(caught.value, TimeoutError)
            assert not patient.done()
            finish(emulator)
            response = await patient
            assert response.analysis.caption
            assert (await session.task(task_id, Captioning)).entity == response.entity
            with pytest.raises(TaskTimeoutError):
                hasty.result()  # a handle keeps to its outcome

    async def test_a_timeout_bounds_the_queue_for_a_permit(self, clock):
        release = asyncio.Event()
        async with ScriptedServer(after(release, answer(202, sample="accepted_202"))) as server:
            async with server.session(
                notifications=asyncio.Queue(), permits=1, clock=clock
            ) as session:
                on_the_wire = session.submit(request(), timeout=3)
                queueing = session.submit(request(), timeout=3)
                await until(lambda: server.seen and session.stats.waiting == 1)
                await clock.advance(3)
                with pytest.raises(TaskTimeoutError) as caught:
                    await queueing
                assert not caught.value.ambiguous  # it was never sent
                with pytest.raises(TaskTimeoutError) as caught:
                    await on_the_wire
                assert caught.value.ambiguous
                assert caught.value.task_id is None
                assert idle(session) == (0, 0, 0, 0)
                release.set()

    async def test_the_setting_is_the_default_timeout(self):
        settings = quick(task_timeout=0.05, poll_first=NEVER, poll_longest=NEVER)
        async with connected(settings, task_seconds=NEVER) as (_, session):
            with pytest.raises(TaskTimeoutError):
                await session.submit(request())


class TestAbandon:
    async def test_ends_every_waiter_of_the_handle_and_no_other(self):
        async with connected(task_seconds=NEVER) as (emulator, session):
            task = session.submit(request())
            other = session.task(await task.accepted(), Captioning)
            waiters = [asyncio.ensure_future(task) for _ in range(2)]
            await asyncio.sleep(0)
            task.abandon()
            task.abandon()
            outcomes = await asyncio.gather(*waiters, return_exceptions=True)
            assert all(isinstance(outcome, TaskTimeoutError) for outcome in outcomes)
            assert "abandoned" in str(outcomes[0])
            finish(emulator)
            assert (await other).analysis.caption
            assert (await session.task(task.task_id, Captioning)).analysis.caption

    async def test_before_it_was_sent_the_task_is_still_submitted(self):
        async with connected() as (emulator, session):
            session.submit(request()).abandon()
            await until(lambda: session.stats.notifications.get("resolved"))
            assert len(emulator.tasks) == 1
            assert idle(session) == (0, 0, 0, 0)


class TestNeverRetrieved:
    async def test_a_dropped_handle_whose_task_failed_is_reported(self, reported):
        async with connected(faults=FAILING) as (_, session):
            task = session.submit(request())
            await until(task.done)
            del task
            gc.collect()
            assert [type(context["exception"]) for context in reported] == [TaskFailedError]
            assert "never retrieved" in reported[0]["message"]

    async def test_a_handle_dropped_before_its_task_failed_is_reported_too(self, reported):
        """As with asyncio's tasks, "fire and forget" must not hide failures."""
        async with connected(faults=FAILING) as (_, session):
            session.submit(request())
            await until(lambda: session.stats.notifications.get("resolved"))
            assert [type(context["exception"]) for context in reported] == [TaskFailedError]

    async def test_a_retrieved_error_and_a_success_are_not(self, reported):
        async with connected(faults=FAILING) as (_, session):
            tasks = [session.submit(request(index)) for index in range(4)]
            await asyncio.gather(tasks[0], return_exceptions=True)
            await until(lambda: all(task.done() for task in tasks))
            tasks[1].exception()
            tasks[2].abandon()
            assert (await tasks[3].wait()).state == "failed"
            await session.submit(request(9)).wait()
            tasks.clear()
        async with connected() as (_, session):
            session.submit(request())
            await until(lambda: session.stats.notifications.get("resolved"))
        gc.collect()
        assert not reported


class TestClosing:
    async def test_pending_tasks_fail_with_their_ids(self):
        async with connected(task_seconds=NEVER) as (_, session):
            tasks = [session.submit(request(index)) for index in range(5)]
            ids = [await task.accepted() for task in tasks]
            waiters = [asyncio.ensure_future(task) for task in tasks]
            await asyncio.sleep(0)
            await session.aclose()
            for task_id, waiter in zip(ids, waiters, strict=True):
                with pytest.raises(SessionClosedError, match=r"session\.task") as caught:
                    await waiter
                assert caught.value.task_id == task_id
            assert idle(session) == (0, 0, 0, 0)
            with pytest.raises(SessionClosedError):
                session.task(ids[0], Captioning)

    async def test_a_close_waits_for_the_ids_of_sent_submissions(self):
        arrived = asyncio.Event()

        async def slowly(http):
            arrived.set()
            await asyncio.sleep(0.2)
            return await answer(202, sample="accepted_202")(http)

        async with ScriptedServer(slowly) as server:
            session = server.session(notifications=asyncio.Queue(), permits=1)
            async with session:
                on_the_wire, queueing = session.submit(request(1)), session.submit(request(2))
                await arrived.wait()
            with pytest.raises(SessionClosedError) as caught:
                on_the_wire.result()
            assert caught.value.task_id == on_the_wire.task_id is not None
            with pytest.raises(SessionClosedError) as caught:
                queueing.result()
            assert caught.value.task_id is None
            assert len(server.seen) == 1

    async def test_drain_waits_only_for_answers(self):
        async with connected(task_seconds=0.2) as (_, session):
            tasks = [session.submit(request(index)) for index in range(5)]
            for task in tasks:
                await task.accepted()
            async with asyncio.timeout(30):
                await session.aclose(drain=NEVER)
            assert all(task.result().analysis.caption for task in tasks)
        async with connected(task_seconds=NEVER) as (_, session):
            given_up = session.submit(request())
            await given_up.accepted()
            given_up.abandon()
            async with asyncio.timeout(30):
                await session.aclose(drain=NEVER)  # no handle waits for it, nor does the drain
        async with connected(task_seconds=NEVER) as (_, session):
            task = session.submit(request())
            await task.accepted()
            begun = time.monotonic()
            await session.aclose(drain=0.1)
            assert 0.1 <= time.monotonic() - begun < 30
            assert isinstance(task.exception(), SessionClosedError)

    async def test_a_cancelled_close_still_fails_what_is_pending(self):
        async with connected(task_seconds=NEVER) as (_, session):
            task = session.submit(request())
            await task.accepted()
            closing = asyncio.create_task(session.aclose(drain=NEVER))
            await asyncio.sleep(0.01)
            closing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await closing
            assert isinstance(task.exception(), SessionClosedError)
            await until(lambda: not library_tasks())

    async def test_with_1000_pending_tasks_it_is_quick_and_clean(self, reported):
        async with connected(quick(permits=256), task_seconds=NEVER) as (_, session):
            tasks = [session.submit(request(index)) for index in range(1000)]
            await asyncio.gather(*(task.accepted() for task in tasks))
            waiters = [asyncio.ensure_future(task) for task in tasks]
            await asyncio.sleep(0)
            begun = time.process_time()
            await session.aclose()
            assert time.process_time() - begun < 1
            outcomes = await asyncio.gather(*waiters, return_exceptions=True)
            assert all(isinstance(outcome, SessionClosedError) for outcome in outcomes)
            assert idle(session) == (0, 0, 0, 0)
            assert not library_tasks()
            tasks.clear()
            waiters.clear()
            outcomes.clear()
            gc.collect()
            assert not reported


class TestThrottledPolls:
    async def test_a_throttled_status_endpoint_pauses_polls_and_no_analysis(self):
        polled, accepted = [], 0

        async def handle(http):
            nonlocal accepted
            if http.method == "GET":
                polled.append(time.monotonic())
                return await answer(429, {}, headers={"Retry-After": "0.4"})(http)
            if "async" in (await http.json()):
                accepted += 1
                data = {"data": {"task_id": f"t{accepted}", "status": "pending"}}
                return await answer(202, data)(http)
            return await answer(sample="captioning")(http)

        async with ScriptedServer(handle) as server:
            async with server.session(
                notifications=asyncio.Queue(),
                poll_first=0.01,
                poll_longest=0.02,
                polls_per_second=1000,
                poll_permits=1,
            ) as session:
                tasks = [session.submit(request(index)) for index in range(10)]
                await until(lambda: polled)
                begun = time.monotonic()
                await asyncio.gather(*(session.analyze(request(index)) for index in range(50)))
                assert len(polled) == 1 or time.monotonic() - begun > 0.3
                assert session.stats.permits_allowed == 64
                await until(lambda: len(polled) >= 3)
                gaps = [b - a for a, b in itertools.pairwise(polled)]
                assert min(gaps) >= 0.39
                assert not any(task.done() for task in tasks)
