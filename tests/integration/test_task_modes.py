"""The modes of an analysis: a call, a task, or a call that becomes a task."""

import asyncio
import warnings
from typing import Any

import pytest
from scripted import ScriptedServer, answer, busy, until
from task_support import build_result, connected, count_scheduled, idle, quick, sign, unconnected

from cloudinary_analyze import (
    AnalyzeSession,
    Captioning,
    Credentials,
    ResultNotDeliveredError,
    SessionNotOpenError,
    Settings,
    WrongEventLoopError,
)
from cloudinary_analyze.errors import ConfigurationError, TaskTimeoutError
from cloudinary_analyze.notifications import QueueSource

NEVER = 3600.0
ACCEPTED = answer(202, sample="accepted_202")


def request(index=0):
    return Captioning(f"https://example.com/{index}.jpg")


class TestSubmit:
    async def test_auto_with_a_source_makes_a_task(self):
        async with connected() as (emulator, session):
            response = await session.submit(request())
            assert response.analysis.caption
            assert len(emulator.tasks) == 1

    async def test_auto_without_a_source_makes_a_call_and_is_charged_once(self):
        async with unconnected() as (emulator, session):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                task = session.submit(request())
            assert (await task).analysis.caption
            assert await task.accepted() is None  # answered directly: nothing to attach to later
            assert (task.task_id, task.status) == (None, "completed")
            assert not emulator.tasks
            assert emulator.counts.total_done == 1
            assert emulator.counts.total_polls == 0

    async def test_a_task_without_a_source_warns_once_and_names_the_ways_out(self):
        async with unconnected() as (emulator, session):
            with pytest.warns(UserWarning, match="without a notification source") as caught:
                first = session.submit(request(1), mode="task")
            message = str(caught[0].message)
            assert all(way in message for way in ("notifications=", "mode='call'", "'analyze'"))
            assert caught[0].filename == __file__
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                second = session.submit(request(2), mode="task")
            for task in (first, second):
                with pytest.raises(ResultNotDeliveredError) as refused:
                    await task
                assert refused.value.task_id == task.task_id
                assert refused.value.last_status.state == "completed"
            assert len(emulator.tasks) == 2

    async def test_a_task_attached_with_its_request_can_be_repeated(self):
        async with unconnected(quick(on_missing_result="analyze")) as (emulator, session):
            with pytest.warns(UserWarning, match="without a notification source"):
                task_id = await session.submit(request(), mode="task").accepted()
            async with AnalyzeSession(
                Credentials.from_url(emulator.cloudinary_url),
                settings=quick(on_missing_result="analyze"),
            ) as later:
                with pytest.raises(
                    ResultNotDeliveredError, match=r"session\.task\(task_id, request"
                ):
                    await later.task(task_id, Captioning)
            async with AnalyzeSession(
                Credentials.from_url(emulator.cloudinary_url),
                settings=quick(on_missing_result="analyze"),
            ) as latest:
                assert (await latest.task(task_id, request())).analysis.caption

    async def test_a_call_where_a_source_is_attached(self):
        async with connected() as (emulator, session):
            task = session.submit(request(), mode="call")
            assert not task.done()
            assert (await task).analysis.caption
            assert not emulator.tasks

    async def test_another_mode_is_refused(self):
        async with unconnected() as (_, session):
            with pytest.raises(ConfigurationError, match="'tasks'"):
                session.submit(request(), mode="tasks")

    async def test_on_a_session_that_is_not_open_it_raises_at_once(self):
        async with unconnected() as (_, session):
            pass
        with pytest.raises(RuntimeError, match="closed"):
            session.submit(request())
        async with ScriptedServer(ACCEPTED) as server:
            with pytest.raises(SessionNotOpenError):
                server.session().submit(request())


class TestWhateverTheServiceAnswers:
    async def test_a_200_to_a_task_resolves_it_at_once(self):
        async with ScriptedServer(answer(sample="captioning")) as server:
            async with server.session(notifications=asyncio.Queue()) as session:
                task = session.submit(request(), mode="task")
                assert await task.accepted() is None
                assert (await task).analysis.caption
                assert server.seen[0].json["async"] is True
                assert idle(session) == (0, 0, 0, 0)

    async def test_a_202_to_a_call_is_followed_to_its_notification(self):
        queue = asyncio.Queue()

        async def accept(http):
            queue.put_nowait(sign(build_result("t1"), secret="planted-Api-Secret-8f3a"))
            return await answer(202, {"data": {"task_id": "t1"}})(http)

        async with ScriptedServer(accept) as server:
            async with server.session(notifications=queue) as session:
                assert (await session.analyze(request())).analysis.caption == "a cat"
                assert "async" not in server.seen[0].json
                assert (await session.submit(request(), mode="call")).analysis.caption == "a cat"
                assert idle(session) == (0, 0, 0, 0)

    async def test_a_202_to_a_call_without_a_source_is_followed_by_polls(self):
        async def accept(http):
            if http.method == "POST":
                return await ACCEPTED(http)
            analysis = {"data": {"caption": "a cat"}}
            data = {"status": "completed", "result": {"analysis": analysis}}
            return await answer(200, {"data": data})(http)

        async with ScriptedServer(accept) as server:
            async with server.session(poll_first=0.01) as session:
                assert (await session.analyze(request())).analysis.caption == "a cat"

    async def test_the_timeout_of_a_call_bounds_the_task_that_it_became(self):
        async def accept(http):
            if http.method == "POST":
                return await ACCEPTED(http)
            return await answer(sample="task_status_processing")(http)

        async with ScriptedServer(accept) as server:
            async with server.session() as session:
                with pytest.raises(TaskTimeoutError) as caught:
                    await session.analyze(request(), timeout=0.2)
                assert caught.value.task_id
                assert busy(session.stats) == (0, 0, 0)

    async def test_two_202s_with_one_id_share_one_task(self):
        """Should the service recognize a repetition, both handles have the result."""
        queue = asyncio.Queue()
        async with ScriptedServer(ACCEPTED) as server:
            async with server.session(notifications=queue) as session:
                tasks = [session.submit(request()) for _ in range(3)]
                ids = {await task.accepted() for task in tasks}
                assert len(ids) == session.stats.pending == 1
                body = build_result(ids.pop())
                queue.put_nowait(sign(body, secret="planted-Api-Secret-8f3a"))
                responses = await asyncio.gather(*tasks)
                assert {response.analysis.caption for response in responses} == {"a cat"}
                assert idle(session) == (0, 0, 0, 0)

    async def test_the_notification_url_goes_with_tasks_alone(self):
        async with ScriptedServer(answer(sample="captioning")) as server:
            url = "https://example.com/hooks"
            async with server.session(
                notifications=asyncio.Queue(), notification_url=url
            ) as session:
                await session.submit(request(), mode="task")
                await session.submit(request(), mode="call")
            task, call = (seen.json for seen in server.seen)
            assert task["notification_url"] == url
            assert "notification_url" not in call


class TestMap:
    async def test_as_tasks_holds_its_window_and_gives_each_item_its_outcome(self):
        async with connected(quick(permits=4), task_seconds=0.05) as (emulator, session):
            pulled, most = 0, 0

            def items():
                nonlocal pulled
                for index in range(100):
                    pulled += 1
                    yield request(index)

            seen = set()
            async with session.map(items(), mode="task", window=10) as stream:
                async for outcome in stream:
                    assert outcome.unwrap().entity == outcome.item.source.uri
                    seen.add(outcome.index)
                    most = max(most, pulled - len(seen) + 1)
            assert seen == set(range(100))
            assert most <= 11
            assert len(emulator.tasks) == 100
            assert emulator.counts.max_in_flight <= 4
            assert idle(session) == (0, 0, 0, 0)

    async def test_auto_makes_tasks_where_a_source_is_attached(self):
        async with connected() as (emulator, session):
            outcomes = [o async for o in session.map(map(request, range(3)), mode="auto")]
            assert all(outcome.error is None for outcome in outcomes)
            assert len(emulator.tasks) == 3
        async with unconnected() as (emulator, session):
            outcomes = [o async for o in session.map(map(request, range(3)), mode="auto")]
            assert all(outcome.error is None for outcome in outcomes)
            assert not emulator.tasks

    async def test_leaving_it_sends_nothing_more(self):
        """A request that only queued for a permit is never charged."""
        release = asyncio.Event()

        async def hold(http):
            await release.wait()
            return await ACCEPTED(http)

        async with ScriptedServer(hold) as server:
            async with server.session(notifications=asyncio.Queue(), permits=2) as session:
                async with session.map(map(request, range(500)), mode="task") as stream:
                    waiting = asyncio.ensure_future(anext(stream))
                    await until(lambda: session.stats.waiting > 100 and len(server.seen) == 2)
                    waiting.cancel()
                    await asyncio.wait([waiting])
                await until(lambda: busy(session.stats) == (0, 0, 0))
                release.set()
                await until(lambda: not session._connection.tracker._calls)
                assert len(server.seen) == 2
                assert not session._connection.tracker.table.pending

    async def test_leaving_it_stops_the_polls_of_what_was_accepted(self):
        settings = quick(poll_first=0.01, poll_longest=0.01)
        async with connected(settings, task_seconds=NEVER) as (emulator, session):
            async with session.map(map(request, range(20)), mode="task") as stream:
                waiting = asyncio.ensure_future(anext(stream))
                await until(lambda: session.stats.pending == 20 and session.stats.polls > 20)
                waiting.cancel()
                await asyncio.wait([waiting])
            tracker = session._connection.tracker
            await until(lambda: tracker.caller.attempts.poll_queue.admission.in_use == 0)
            polls = emulator.counts.total_polls
            await asyncio.sleep(0.05)
            assert emulator.counts.total_polls == polls
            assert count_scheduled(tracker) == 0

    async def test_an_item_whose_task_failed_is_an_outcome_and_stops_nothing(self):
        queue = QueueSource(asyncio.Queue())
        accepted = []

        async def accept(http):
            accepted.append(f"t{len(accepted)}")
            error = {"message": "no image"} if len(accepted) % 3 == 0 else None
            body = build_result(accepted[-1], error=error)
            queue.queue.put_nowait(sign(body, secret="planted-Api-Secret-8f3a"))
            return await answer(202, {"data": {"task_id": accepted[-1]}})(http)

        async with ScriptedServer(accept) as server:
            async with server.session(notifications=queue) as session:
                stream = session.map(map(request, range(30)), mode="task")
                outcomes = [outcome async for outcome in stream]
            assert sum(outcome.error is not None for outcome in outcomes) == 10


def test_a_handle_awaited_on_another_loop_says_so():
    """Otherwise its waiter would hang, or be woken from a foreign thread."""

    async def submit(session: AnalyzeSession) -> Any:
        return session.submit(Captioning("https://example.com/a.jpg"), mode="call")

    async def wait_for(task: Any) -> None:
        await task

    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    try:
        session = AnalyzeSession(
            Credentials("demo", "key", "secret"), settings=Settings(host="http://127.0.0.1:9")
        )
        first.run_until_complete(session.__aenter__())
        task = first.run_until_complete(submit(session))
        with pytest.raises(WrongEventLoopError, match="event loop"):
            second.run_until_complete(wait_for(task))
        task.abandon()
        first.run_until_complete(session.aclose())
    finally:
        first.close()
        second.close()
