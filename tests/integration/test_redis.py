"""Redis as sink and source, against a real server of our own."""

import asyncio
import contextlib
import signal
import sys
import time

import pytest
from notification_support import CREDENTIALS, build_answer, build_delivery, sign, start_redis, until
from redis.exceptions import RedisError

from cloudinary_analyze import (
    AnalyzeSession,
    Captioning,
    ConfigurationError,
    Credentials,
    MalformedNotificationError,
)
from cloudinary_analyze.emulator import Emulator
from cloudinary_analyze.notifications import encode_delivery
from cloudinary_analyze.notifications import redis as room
from cloudinary_analyze.notifications.receiver import Intake
from cloudinary_analyze.notifications.redis import RedisNotifications
from cloudinary_analyze.testing import ManualClock


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    server = start_redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def namespace(request):
    return f"test:{request.node.name}"


@pytest.fixture
async def emulator():
    """An emulator whose tasks never end by themselves: the tests deliver."""
    async with Emulator(task_seconds=3600) as emulator:
        yield emulator


@pytest.fixture
def open_worker(shared, namespace, emulator):
    """Open what one process of an application has: its own notifications and session."""

    @contextlib.asynccontextmanager
    async def open_worker(server=shared, **options):
        credentials = Credentials.from_url(emulator.cloudinary_url)
        async with (
            RedisNotifications(server.url, namespace=namespace) as notifications,
            AnalyzeSession(credentials, notifications=notifications, **options) as session,
        ):
            yield session, notifications

    return open_worker


@pytest.mark.parametrize(
    "options",
    [
        {"url": "http://user:hunter2@x"},
        {"url": "redis://user:hunter2@localhost/0?socket_timeout=abc"},
        {"namespace": ""},
        {"keep": 0},
    ],
)
def test_what_cannot_be_right_is_refused_at_construction_without_the_password(options):
    with pytest.raises(ConfigurationError) as caught:
        RedisNotifications(**{"url": "redis://localhost"} | options)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_socket_timeout_in_the_url_is_refused():
    """The library's own can swallow a cancellation, and with it the closing of a session."""
    with pytest.raises(ConfigurationError, match="socket_timeout"):
        RedisNotifications("redis://localhost/0?db=1&socket_timeout=5")


def test_the_password_is_in_no_repr():
    assert "hunter2" not in repr(RedisNotifications("redis://user:hunter2@localhost"))


def test_tls_is_spoken_with_rediss_urls():
    pool = RedisNotifications("rediss://localhost/0")._redis.connection_pool
    assert pool.connection_class.__name__ == "SSLConnection"
    assert pool.connection_kwargs.get("ssl_cert_reqs", "required") == "required"


def test_a_missing_library_is_named_with_the_line_that_installs_it(monkeypatch):
    for name in list(sys.modules):
        if name == "redis" or name.startswith("redis."):
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, room.__name__)
    with pytest.raises(ImportError, match=r"pip install 'cloudinary-analyze\[redis\]'"):
        __import__(room.__name__)


async def test_a_webhook_that_one_process_received_resolves_the_future_in_another(open_worker):
    async with open_worker() as (session, _), open_worker() as (_, receiving):
        intake = Intake(receiving, CREDENTIALS)
        task = session.submit(Captioning("https://x.test/a.jpg"))
        body = build_answer(await task.accepted(), "Found")
        assert (await intake.take(body, sign(body, at=time.time()))).status == 200
        async with asyncio.timeout(5):
            assert (await task).analysis.caption == "Found"


async def test_what_came_hours_before_the_process_started_is_found(open_worker, shared, namespace):
    """Its age is judged at its first receipt, not when it is read."""
    hours_ago = ManualClock(started_at=time.time() - 10 * 3600)
    async with RedisNotifications(shared.url, namespace=namespace) as sink:
        body = build_answer("early-bird")
        intake = Intake(sink, CREDENTIALS, clock=hours_ago)
        assert (await intake.take(body, sign(body, at=hours_ago.wall()))).status == 200
    async with open_worker() as (session, _), asyncio.timeout(5):
        assert (await session.task("early-bird", Captioning)).analysis.caption == "A cat"
        assert session.stats.notifications == {"resolved": 1}


async def test_the_first_delivery_stays_and_a_second_one_only_wakes(open_worker):
    async with open_worker() as (session, notifications):
        await notifications.put(build_delivery("t1", "first"))
        await notifications.put(build_delivery("t1", "second"))
        async with asyncio.timeout(5):
            assert (await session.task("t1", Captioning)).analysis.caption == "first"


async def test_a_wake_up_between_the_first_look_and_the_wait_is_not_missed(shared, namespace):
    """The cursor is fixed before the first fetch: what comes after that fetch is yielded."""
    async with (
        RedisNotifications(shared.url, namespace=namespace) as source,
        RedisNotifications(shared.url, namespace=namespace) as sink,
    ):
        await sink.put(build_delivery("t0"))
        assert await source.fetch(["t1"]) == []
        delivery = build_delivery("t1")
        await sink.put(delivery)
        async with asyncio.timeout(5), contextlib.aclosing(source.listen()) as listening:
            assert await anext(listening) == delivery


async def test_only_the_tasks_that_are_awaited_here_are_read(shared, namespace):
    async with RedisNotifications(shared.url, namespace=namespace) as notifications:
        await notifications.fetch(["mine"])
        for task_id in ("foreign", "mine"):
            await notifications.put(build_delivery(task_id))
        async with asyncio.timeout(5), contextlib.aclosing(notifications.listen()) as listening:
            assert (await anext(listening)).body == build_answer("mine")
        assert notifications._awaited == {}


async def test_tasks_nobody_asks_for_any_more_are_forgotten(shared, namespace, clock):
    async with RedisNotifications(shared.url, namespace=namespace, clock=clock) as notifications:
        await notifications.fetch(["abandoned", "pending"])
        await clock.advance(100)
        await notifications.fetch(["pending"])
        await clock.advance(30)
        await notifications.fetch([])
        assert list(notifications._awaited) == ["pending"]


async def test_keys_are_namespaced_and_expire(shared, namespace):
    async with RedisNotifications(shared.url, namespace=namespace, keep=60) as notifications:
        await notifications.put(build_delivery("t1"))
        client = notifications._redis
        names = [key.decode() async for key in client.scan_iter(f"{namespace}:*")]
        assert sorted(names) == [f"{namespace}:delivery:t1", f"{namespace}:wake-ups"]
        assert 0 < await client.pttl(f"{namespace}:delivery:t1") <= 60_000


async def test_what_answers_no_task_has_no_mailbox(shared, namespace):
    async with RedisNotifications(shared.url, namespace=namespace) as notifications:
        with pytest.raises(MalformedNotificationError):
            await notifications.put(build_delivery("", notification_type="upload"))
        assert not [key async for key in notifications._redis.scan_iter(f"{namespace}:*")]


async def test_a_mailbox_that_holds_something_else_is_passed_over(shared, namespace, caplog):
    async with RedisNotifications(shared.url, namespace=namespace) as notifications:
        await notifications._redis.set(f"{namespace}:delivery:t1", b"[]\nsomething else")
        await notifications.put(build_delivery("t2"))
        (found,) = await notifications.fetch(["t1", "t2", "t3"])
        assert found.body == build_answer("t2")
    assert "t1" in caplog.text


async def test_a_gap_in_the_stream_makes_everything_pending_be_fetched(
    open_worker, monkeypatch, caplog
):
    """A process that was away for longer than the stream remembers still finds its results."""
    monkeypatch.setattr(room, "WAKE_UPS", 200)
    monkeypatch.setattr(room, "BATCH", 100)
    async with open_worker() as (session, notifications):
        tasks = [session.submit(Captioning(f"https://x.test/{n}.jpg")) for n in range(20)]
        ids = [await task.accepted() for task in tasks]
        await until(lambda: len(notifications._awaited) == 20)
        # all in one MULTI, so that the reader sees nothing before the stream is trimmed
        async with notifications._redis.pipeline(transaction=True) as pipe:
            for task_id in ids:
                key = f"{notifications.namespace}:delivery:{task_id}"
                pipe.set(key, encode_delivery(build_delivery(task_id)))
                pipe.xadd(notifications._stream, {"task": task_id})
            for number in range(1000):
                pipe.xadd(notifications._stream, {"task": f"foreign-{number}"})
            pipe.xtrim(notifications._stream, maxlen=200, approximate=False)
            await pipe.execute()
        async with asyncio.timeout(10):
            await asyncio.gather(*tasks)
    assert "dropped the oldest" in caplog.text


async def test_many_waiters_share_the_pool_and_each_gets_its_own(open_worker):
    """The pool makes them queue for a connection instead of failing."""
    async with open_worker() as (session, notifications):
        tasks = [session.submit(Captioning(f"https://x.test/{n}.jpg")) for n in range(200)]
        ids = [await task.accepted() for task in tasks]
        await asyncio.gather(*(notifications.put(build_delivery(i, i[:8])) for i in ids))
        async with asyncio.timeout(20):
            for task, task_id in zip(tasks, ids, strict=True):
                assert (await task).analysis.caption == task_id[:8]


async def test_a_stream_that_is_quiet_for_long_is_waited_for_again(shared, namespace, monkeypatch):
    monkeypatch.setattr(room, "BLOCK_SECONDS", 0.01)
    async with RedisNotifications(shared.url, namespace=namespace) as notifications:
        await notifications.fetch(["t1"])
        listening = asyncio.create_task(anext(notifications.listen()))
        done, _ = await asyncio.wait({listening}, timeout=0.2)
        assert not done
        await notifications.put(build_delivery("t1"))
        async with asyncio.timeout(5):
            assert (await listening).body == build_answer("t1")


async def test_many_wake_ups_are_no_gap_as_long_as_none_was_trimmed(shared, namespace, monkeypatch):
    monkeypatch.setattr(room, "BATCH", 10)
    ids = [f"t{number}" for number in range(35)]
    async with RedisNotifications(shared.url, namespace=namespace) as notifications:
        await notifications.fetch(ids)
        for task_id in ids:
            await notifications.put(build_delivery(task_id))
        async with asyncio.timeout(5), contextlib.aclosing(notifications.listen()) as listening:
            assert [(await anext(listening)).body for _ in ids] == [build_answer(i) for i in ids]


async def test_listening_ends_when_it_is_cancelled_whatever_it_was_about_to_do(shared, namespace):
    """Libraries below may swallow a cancellation; closing a session must not wait for them."""
    async with RedisNotifications(shared.url, namespace=namespace) as notifications:
        for steps in range(12):
            await notifications.fetch([f"t{steps}"])
            await notifications.put(build_delivery(f"t{steps}"))
            source = notifications.listen()
            await anext(source)
            listening = asyncio.create_task(anext(source))
            for _ in range(steps):
                await asyncio.sleep(0)
            listening.cancel()
            done, _ = await asyncio.wait({listening}, timeout=2)
            assert done, f"after {steps} steps"
            await source.aclose()


async def test_a_redis_that_hangs_makes_the_sender_try_again_and_hangs_nobody(
    tmp_path, namespace, clock
):
    server = start_redis(tmp_path)
    try:
        async with RedisNotifications(
            server.url, namespace=namespace, clock=clock
        ) as notifications:
            intake = Intake(notifications, CREDENTIALS, clock=clock)
            body = build_answer("t1")
            await notifications.fetch(["t1"])
            server.process.send_signal(signal.SIGSTOP)
            taking = asyncio.create_task(intake.take(body, sign(body, at=clock.wall())))
            await until(lambda: clock.next_at is not None)
            await clock.advance(5.1)
            async with asyncio.timeout(2):
                assert (await taking).status == 503
            looking = asyncio.create_task(notifications.fetch(["t1"]))
            await until(lambda: clock.next_at is not None)
            await clock.advance(10.1)
            with pytest.raises(TimeoutError, match="Redis did not answer within 10 s"):
                await looking
            server.process.send_signal(signal.SIGCONT)
            assert (await intake.take(body, sign(body, at=clock.wall()))).status == 200
            (delivery,) = await notifications.fetch(["t1"])
            assert delivery.body == body
    finally:
        server.kill()


async def test_what_was_stored_while_the_connection_was_cut_is_found_afterwards(
    tmp_path, open_worker
):
    """Redis is killed with -9 under a session and comes back with a delivery it never announced."""
    server = start_redis(tmp_path)
    try:
        async with open_worker(server=server) as (session, notifications):
            tasks = [session.submit(Captioning(f"https://x.test/{n}.jpg")) for n in range(3)]
            first, second, third = [await task.accepted() for task in tasks]
            await notifications.put(build_delivery(first, "before"))
            async with asyncio.timeout(10):
                assert (await tasks[0]).analysis.caption == "before"
            server.kill()
            with pytest.raises(RedisError):
                await notifications.put(build_delivery(second))
            server.start()
            await notifications.put(build_delivery(second, "after"))
            async with RedisNotifications(server.url, namespace=notifications.namespace) as other:
                key = other._name_mailbox(third)
                await other._redis.set(key, encode_delivery(build_delivery(third, "silent")))
            async with asyncio.timeout(10):
                assert (await tasks[1]).analysis.caption == "after"
                assert (await tasks[2]).analysis.caption == "silent"
    finally:
        server.kill()


async def test_a_redis_that_lost_everything_and_whose_clock_is_behind_wakes_all_the_same(
    tmp_path, open_worker
):
    """After a failover to a replica that lags, say: the cursor is fixed anew."""
    server = start_redis(tmp_path)
    try:
        async with open_worker(server=server) as (session, notifications), asyncio.timeout(20):
            task = session.submit(Captioning("https://x.test/a.jpg"))
            task_id = await task.accepted()
            future = "9999999999999-0"
            await notifications._redis.xadd(notifications._stream, {"task": "x"}, id=future)
            await until(lambda: notifications._cursor == future.encode())
            server.kill()
            for path in (tmp_path / "appendonlydir").iterdir():
                path.unlink()
            server.start()
            await until(lambda: notifications._cursor == b"0-0")
            await notifications.put(build_delivery(task_id))
            assert (await task).analysis.caption == "A cat"
    finally:
        server.kill()
