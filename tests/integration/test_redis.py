"""Redis as sink and source, against a real server of our own."""

import asyncio
import contextlib
import copy
import pickle
import re
import signal
import sys
import time

import pydantic
import pytest
import yarl
from notification_support import CREDENTIALS, build_answer, build_delivery, sign, until
from redis.exceptions import RedisError
from scripted import no_collector

from cloudinary_analyze import (
    AnalyzeSession,
    Captioning,
    ConfigurationError,
    Credentials,
    MalformedNotificationError,
    ResponseDecodeError,
)
from cloudinary_analyze.emulator import Emulator
from cloudinary_analyze.notifications import encode_delivery
from cloudinary_analyze.notifications import redis as room
from cloudinary_analyze.notifications.receiver import Intake
from cloudinary_analyze.notifications.redis import RedisNotifications
from cloudinary_analyze.testing import ManualClock


@pytest.fixture
def namespace(request):
    return f"test:{request.node.name}"


@pytest.fixture
async def notifications(shared_redis, namespace):
    async with RedisNotifications(shared_redis.url, namespace=namespace) as notifications:
        yield notifications


@pytest.fixture
async def emulator():
    """An emulator whose tasks never end, so that the tests deliver their results."""
    async with Emulator(task_seconds=3600) as emulator:
        yield emulator


@pytest.fixture
def open_worker(shared_redis, namespace, emulator):
    """Open what one process of an application has: its own notifications and session."""

    @contextlib.asynccontextmanager
    async def open_worker(server=shared_redis, **options):
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
        {"url": "redis://user:hunter2@localhost/0?db=abc"},
        {"url": "redis://user:hunter2@localhost/hunter2"},
        {"url": "redis://user:12#hunter2@localhost/0"},
        {"url": "redis://user:12?hunter2@localhost/0"},
        {"url": "redis://user:12/hunter2@localhost/0"},
        {"url": "redis://user:hunter2@[localhost/0"},
        {"url": "redis://user:hunter2@localhost:port/0"},
        {"url": "redis://user:hunter2@localhost/0?max_connections=-1"},
        {"url": "rediss://user:hunter2@localhost/0?ssl_cert_reqs=hunter2"},
        {"url": "redis://user:hunter2@localhost/0?ssl_ca_certs=x"},
        {"url": b"redis://user:hunter2@localhost/0"},
        {"url": None},
        {"namespace": ""},
        {"keep": 0},
        {"keep_resolved": float("nan")},
    ],
)
def test_invalid_values_are_refused_at_construction_without_the_password(options):
    with pytest.raises(ConfigurationError) as caught:
        RedisNotifications(**{"url": "redis://localhost"} | options)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "option",
    [
        "decode_responses=True",
        "decode_responses=",
        "protocol=3",
        "legacy_responses=False",
        "encoding=latin-1",
        "encoding_errors=ignore",
        "socket_timeout=5",
        "timeout=5",
        "retry_on_timeout=True",
        "parser_class=x",
        "nonsense=1",
        "db=1&nonsense=1",
    ],
)
@pytest.mark.parametrize("url", ["redis://:hunter2@localhost/0", "unix:///tmp/redis.sock"])
def test_options_that_change_replies_or_limits_and_unknown_ones_are_refused(url, option):
    with pytest.raises(ConfigurationError, match="Valid options") as caught:
        RedisNotifications(f"{url}?{option}")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost",
        "redis://user:p%40ss@localhost:6380/3?client_name=me&health_check_interval=5",
        "rediss://localhost/0?ssl_ca_certs=/x.pem&ssl_check_hostname=True",
        "unix:///tmp/redis.sock?db=2",
    ],
)
def test_other_options_are_accepted(url):
    RedisNotifications(url)


@pytest.mark.parametrize("make", [yarl.URL, pydantic.RedisDsn])
def test_its_url_may_be_a_url_object(make):
    url = "redis://user:hunter2@localhost:6379/1"
    assert RedisNotifications(make(url)).location.resolve() == url


@pytest.mark.parametrize("url", [None, 5, b"redis://localhost", ["redis://localhost"]], ids=repr)
def test_an_invalid_url_is_refused(url):
    with pytest.raises(ConfigurationError):
        RedisNotifications(url)


def test_it_pickles_without_the_password(monkeypatch):
    notifications = RedisNotifications("redis://user:hunter2@localhost/1", keep=60)
    content = pickle.dumps(notifications)
    assert b"hunter2" not in content
    again = pickle.loads(content)
    assert (again.keep, again.namespace) == (60, notifications.namespace)
    assert again.location.resolve() == "redis://user@localhost/1"
    monkeypatch.setenv("REDIS_URL", "redis://:other@localhost")
    assert again.location.resolve() == "redis://user:other@localhost/1"


@pytest.mark.parametrize(
    ("url", "environment", "resolved"),
    [
        ("redis://:a1b2@host:6379/1", "redis://:c3@host", "redis://:c3@host:6379/1"),
        ("redis://:a1b2@HOST/1", "redis://:c3@host:6379/0", "redis://:c3@HOST/1"),
        ("redis://host?password=a1b2", "redis://host?password=c3", "redis://:c3@host"),
        ("redis://bob:a1b2@host", "redis://bob:c3@host", "redis://bob:c3@host"),
        ("redis://:a1b2@host", "redis://bob:c3@host", "redis://bob:c3@host"),
        (
            "rediss://host?password=a1b2&ssl_password=a1b2",
            "rediss://host?password=c3&ssl_password=d4",
            "rediss://:c3@host?ssl_password=d4",
        ),
        ("unix:///a.sock?password=a1b2", "unix:///a.sock?password=c3", "unix://:c3@/a.sock"),
    ],
)
def test_a_worker_takes_the_password_from_its_environment(monkeypatch, url, environment, resolved):
    content = pickle.dumps(RedisNotifications(url))
    assert b"a1b2" not in content
    monkeypatch.setenv("REDIS_URL", environment)
    again = pickle.loads(content)
    assert again.location.resolve() == resolved
    again.location.build_client(1)


@pytest.mark.parametrize(
    ("url", "environment"),
    [
        ("redis://:a1b2@host", ""),
        ("redis://:a1b2@host", "c3"),
        ("redis://:a1b2@host", "redis://:c3@other"),
        ("redis://:a1b2@host", "redis://:c3@host:7777"),
        ("redis://:a1b2@host", "redis://:c3@host:port"),
        ("redis://bob:a1b2@host", "redis://alice:c3@host"),
        ("unix:///a.sock?password=a1b2", "unix:///b.sock?password=c3"),
        ("redis://host?password_env=UNSET", "redis://:c3@host"),
    ],
)
async def test_a_worker_without_the_password_says_so(monkeypatch, url, environment):
    """It neither connects without one nor sends that of another server or user."""
    monkeypatch.setenv("UNSET", "a1b2")
    content = pickle.dumps(RedisNotifications(url))
    monkeypatch.setenv("UNSET", "")
    monkeypatch.setenv("REDIS_URL", environment)
    with pytest.raises(ConfigurationError, match="Missing password") as caught:
        await pickle.loads(content).fetch(["t1"])
    assert not {"a1b2", "c3"} & set(re.findall(r"\w+", str(caught.value)))


def test_copies_in_the_process_keep_the_password():
    notifications = RedisNotifications("redis://user:a1b2@host")
    for again in (copy.copy(notifications), copy.deepcopy(notifications)):
        assert again.location.resolve() == "redis://user:a1b2@host"


def test_the_password_is_in_no_repr():
    assert "hunter2" not in repr(RedisNotifications("redis://user:hunter2@localhost"))


def test_tls_is_spoken_with_rediss_urls():
    pool = RedisNotifications("rediss://localhost/0")._connect().connection_pool
    assert pool.connection_class.__name__ == "SSLConnection"
    assert pool.connection_kwargs.get("ssl_cert_reqs", "required") == "required"


def test_a_missing_library_is_named_with_the_line_that_installs_it(monkeypatch):
    for name in list(sys.modules):
        if name == "redis" or name.startswith("redis."):
            monkeypatch.setitem(sys.modules, name, None)
    for name in (room.__name__, "cloudinary_analyze._redis"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"pip install 'cloudinary-analyze\[redis\]'"):
        __import__(room.__name__)


async def test_a_webhook_that_one_process_received_resolves_the_future_in_another(open_worker):
    async with open_worker() as (session, _), open_worker() as (_, receiving):
        intake = Intake(receiving, CREDENTIALS)
        task = session.submit(Captioning("https://x.test/a.jpg"))
        body = build_answer(await task.accepted(), "Found")
        assert (await intake.take(body, sign(body, at=time.time()))).status == 200
        async with asyncio.timeout(30):
            assert (await task).analysis.caption == "Found"


async def test_deliveries_from_before_the_start_are_found(open_worker, shared_redis, namespace):
    """Its age is judged at its first receipt, not when it is read."""
    hours_ago = ManualClock(started_at=time.time() - 10 * 3600)
    async with RedisNotifications(shared_redis.url, namespace=namespace) as sink:
        body = build_answer("early-bird")
        intake = Intake(sink, CREDENTIALS, clock=hours_ago)
        assert (await intake.take(body, sign(body, at=hours_ago.wall()))).status == 200
    async with open_worker() as (session, _), asyncio.timeout(30):
        assert (await session.task("early-bird", Captioning)).analysis.caption == "A cat"
        assert session.stats.notifications == {"resolved": 1}


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        ({"caption": "first"}, {"caption": "second"}, "second"),
        ({"caption": "first"}, {"data": None}, "first"),
        ({"data": {"progress": 50}}, {"caption": "second"}, "second"),
        ({"data": {"status": "processing"}}, {"caption": "second"}, "second"),
        ({"caption": "first"}, {"data": {"status": "processing"}}, "first"),
    ],
)
async def test_a_result_stays_whatever_else_arrives_for_its_task(open_worker, first, second, kept):
    async with open_worker() as (session, notifications):
        await notifications.put(build_delivery("t1", **first))
        await notifications.put(build_delivery("t1", **second))
        async with asyncio.timeout(30):
            assert (await session.task("t1", Captioning)).analysis.caption == kept


async def test_progress_does_not_take_the_place_of_an_unreadable_result(open_worker):
    async with open_worker() as (session, notifications):
        await notifications.put(build_delivery("t1", data={"status": "processing"}))
        end = build_delivery("t1", data={"status": "completed"})
        await notifications.put(end)
        async with asyncio.timeout(30):
            with pytest.raises(ResponseDecodeError) as caught:
                await session.task("t1", Captioning)
        assert caught.value.raw_body == end.body


async def test_a_wake_up_between_the_first_look_and_the_wait_is_not_missed(shared_redis, namespace):
    """The cursor is fixed before the first fetch: what comes after that fetch is yielded."""
    async with (
        RedisNotifications(shared_redis.url, namespace=namespace) as source,
        RedisNotifications(shared_redis.url, namespace=namespace) as sink,
    ):
        await sink.put(build_delivery("t0"))
        assert await source.fetch(["t1"]) == []
        delivery = build_delivery("t1")
        await sink.put(delivery)
        async with asyncio.timeout(30), contextlib.aclosing(source.listen()) as listening:
            assert (await anext(listening)).body == delivery.body


async def test_only_the_tasks_that_are_awaited_here_are_read(notifications):
    await notifications.fetch(["mine"])
    for task_id in ("foreign", "mine"):
        await notifications.put(build_delivery(task_id))
    async with asyncio.timeout(30), contextlib.aclosing(notifications.listen()) as listening:
        assert (await anext(listening)).body == build_answer("mine")
    assert notifications._awaited == {}


async def test_tasks_that_are_no_longer_fetched_are_forgotten(shared_redis, namespace, clock):
    async with RedisNotifications(
        shared_redis.url, namespace=namespace, clock=clock
    ) as notifications:
        await notifications.fetch(["abandoned", "pending"])
        await clock.advance(100)
        await notifications.fetch(["pending"])
        await clock.advance(30)
        await notifications.fetch([])
        assert list(notifications._awaited) == ["pending"]


async def test_keys_are_namespaced_and_expire(shared_redis, namespace):
    async with RedisNotifications(shared_redis.url, namespace=namespace, keep=60) as notifications:
        await notifications.put(build_delivery("t1"))
        client = notifications._connect()
        names = [key.decode() async for key in client.scan_iter(f"{namespace}:*")]
        assert sorted(names) == [f"{namespace}:delivery:t1", f"{namespace}:wake-ups"]
        assert 0 < await client.pttl(f"{namespace}:delivery:t1") <= 60_000


async def test_a_delivery_without_a_task_has_no_mailbox(notifications, namespace):
    with pytest.raises(MalformedNotificationError):
        await notifications.put(build_delivery("", notification_type="upload"))
    assert not [key async for key in notifications._connect().scan_iter(f"{namespace}:*")]


async def test_an_unreadable_mailbox_is_counted_skipped_and_replaced(
    notifications, namespace, caplog
):
    client = notifications._connect()
    await client.set(f"{namespace}:delivery:t1", b"[]\nsomething else")
    await client.rpush(f"{namespace}:delivery:t2", "a list")
    await notifications.put(build_delivery("t3"))
    (found,) = await notifications.fetch(["t1", "t2", "t3", "t4"])
    assert found.body == build_answer("t3")
    assert notifications.unreadable == 1
    await notifications.put(build_delivery("t1"))
    async with asyncio.timeout(30), contextlib.aclosing(notifications.listen()) as listening:
        await client.xadd(notifications._stream, {b"\xff": b"\xff"})
        await client.xadd(notifications._stream, {"task": b"\xff"})
        await notifications.put(build_delivery("t1"))
        assert (await anext(listening)).body == build_answer("t1")
    assert "t1" in caplog.text


async def test_after_a_gap_all_pending_tasks_are_fetched(open_worker, monkeypatch, caplog):
    """A process that was away for longer than the stream remembers still finds its results."""
    monkeypatch.setattr(room, "WAKE_UPS", 200)
    monkeypatch.setattr(room, "BATCH", 100)
    async with open_worker() as (session, notifications):
        tasks = [session.submit(Captioning(f"https://x.test/{n}.jpg")) for n in range(20)]
        ids = [await task.accepted() for task in tasks]
        await until(lambda: len(notifications._awaited) == 20)
        # all in one MULTI, so that the reader sees nothing before the stream is trimmed
        async with notifications._connect().pipeline(transaction=True) as pipe:
            for task_id in ids:
                key = f"{notifications.namespace}:delivery:{task_id}"
                pipe.set(key, encode_delivery(build_delivery(task_id)))
                pipe.xadd(notifications._stream, {"task": task_id})
            for number in range(1000):
                pipe.xadd(notifications._stream, {"task": f"foreign-{number}"})
            pipe.xtrim(notifications._stream, maxlen=200, approximate=False)
            await pipe.execute()
        async with asyncio.timeout(30):
            await asyncio.gather(*tasks)
    assert "dropped the oldest" in caplog.text


async def test_many_waiters_share_the_pool_and_each_gets_its_own(open_worker):
    """The pool makes them queue for a connection instead of failing."""
    async with open_worker() as (session, notifications):
        tasks = [session.submit(Captioning(f"https://x.test/{n}.jpg")) for n in range(200)]
        ids = [await task.accepted() for task in tasks]
        await asyncio.gather(*(notifications.put(build_delivery(i, i[:8])) for i in ids))
        async with asyncio.timeout(30):
            for task, task_id in zip(tasks, ids, strict=True):
                assert (await task).analysis.caption == task_id[:8]


async def test_a_stream_that_is_quiet_for_long_is_waited_for_again(notifications, monkeypatch):
    monkeypatch.setattr(room, "BLOCK_SECONDS", 0.01)
    await notifications.fetch(["t1"])
    listening = asyncio.create_task(anext(notifications.listen()))
    done, _ = await asyncio.wait({listening}, timeout=0.2)
    assert not done
    await notifications.put(build_delivery("t1"))
    async with asyncio.timeout(30):
        assert (await listening).body == build_answer("t1")


async def test_many_untrimmed_wake_ups_are_not_a_gap(notifications, monkeypatch):
    monkeypatch.setattr(room, "BATCH", 10)
    ids = [f"t{number}" for number in range(35)]
    await notifications.fetch(ids)
    for task_id in ids:
        await notifications.put(build_delivery(task_id))
    async with asyncio.timeout(30), contextlib.aclosing(notifications.listen()) as listening:
        assert [(await anext(listening)).body for _ in ids] == [build_answer(i) for i in ids]


async def test_listening_can_be_cancelled_at_any_step(notifications, monkeypatch):
    """Libraries below may swallow a cancellation; closing a session must not wait for them."""
    monkeypatch.setattr(room, "BLOCK_SECONDS", 1000.0)
    monkeypatch.setattr(room, "ANSWER_SECONDS", 2000.0)
    for steps in range(12):
        await notifications.fetch([f"t{steps}"])
        await notifications.put(build_delivery(f"t{steps}"))
        source = notifications.listen()
        await anext(source)
        listening = asyncio.create_task(anext(source))
        for _ in range(steps):
            await asyncio.sleep(0)
        listening.cancel()
        done, _ = await asyncio.wait({listening}, timeout=30)
        assert done, f"after {steps} steps"
        await source.aclose()


async def test_a_hanging_redis_gives_503_and_blocks_nothing(own_redis, namespace, clock):
    async with RedisNotifications(own_redis.url, namespace=namespace, clock=clock) as notifications:
        intake = Intake(notifications, CREDENTIALS, clock=clock)
        body = build_answer("t1")
        await notifications.fetch(["t1"])
        own_redis.process.send_signal(signal.SIGSTOP)
        taking = asyncio.create_task(intake.take(body, sign(body, at=clock.wall())))
        await until(lambda: clock.next_at is not None)
        await clock.advance(10.1)
        async with asyncio.timeout(30):
            assert (await taking).status == 503
        looking = asyncio.create_task(notifications.fetch(["t1"]))
        await until(lambda: clock.next_at is not None)
        await clock.advance(10.1)
        with pytest.raises(TimeoutError, match="Redis did not respond within 10 s"):
            await looking
        own_redis.process.send_signal(signal.SIGCONT)
        assert (await intake.take(body, sign(body, at=clock.wall()))).status == 200
        (delivery,) = await notifications.fetch(["t1"])
        assert delivery.body == body


async def test_deliveries_during_a_lost_connection_are_found(own_redis, open_worker):
    """Redis is killed under a session, and restarts with a delivery that it never announced."""
    async with open_worker(server=own_redis) as (session, notifications):
        tasks = [session.submit(Captioning(f"https://x.test/{n}.jpg")) for n in range(3)]
        first, second, third = [await task.accepted() for task in tasks]
        await notifications.put(build_delivery(first, "before"))
        async with asyncio.timeout(30):
            assert (await tasks[0]).analysis.caption == "before"
        own_redis.kill()
        with pytest.raises(RedisError):
            await notifications.put(build_delivery(second))
        own_redis.start()
        await notifications.put(build_delivery(second, "after"))
        async with RedisNotifications(own_redis.url, namespace=notifications.namespace) as other:
            key = other._name_mailbox(third)
            await other._connect().set(key, encode_delivery(build_delivery(third, "silent")))
        async with asyncio.timeout(30):
            assert (await tasks[1]).analysis.caption == "after"
            assert (await tasks[2]).analysis.caption == "silent"


async def test_an_emptied_redis_with_a_late_clock_still_wakes(tmp_path, own_redis, open_worker):
    """For example, after a failover to a replica that lags. The cursor is reset."""
    async with open_worker(server=own_redis) as (session, notifications), asyncio.timeout(30):
        task = session.submit(Captioning("https://x.test/a.jpg"))
        task_id = await task.accepted()
        future = "9999999999999-0"
        await notifications._connect().xadd(notifications._stream, {"task": "x"}, id=future)
        await until(lambda: notifications._cursor == future.encode())
        own_redis.kill()
        for path in (tmp_path / "appendonlydir").iterdir():
            path.unlink()
        own_redis.start()
        await until(lambda: notifications._cursor == b"0-0")
        await notifications.put(build_delivery(task_id))
        assert (await task).analysis.caption == "A cat"


# what is written


async def count_transactions(client):
    return (await client.info("commandstats")).get("cmdstat_exec", {}).get("calls", 0)


async def test_a_burst_is_stored_in_few_round_trips(notifications, namespace):
    client = notifications._connect()
    before = await count_transactions(client)

    async def put(number):
        await notifications.put(build_delivery(f"t{number}"))
        return number % 50 or await client.exists(f"{namespace}:delivery:t{number}")

    async with asyncio.timeout(30):
        assert all(await asyncio.gather(*map(put, range(2000))))
    assert await client.xlen(notifications._stream) == 2000
    assert await count_transactions(client) - before <= 30


async def test_a_burst_of_webhooks_is_answered_200(notifications):
    intake, now = Intake(notifications, CREDENTIALS), time.time()
    bodies = [build_answer(f"t{number}") for number in range(3000)]
    async with asyncio.timeout(40):
        replies = await asyncio.gather(*(intake.take(body, sign(body, at=now)) for body in bodies))
    assert {reply.status for reply in replies} == {200}


@pytest.mark.parametrize("steps", range(12))
async def test_cancelling_a_put_disturbs_no_other(notifications, steps):
    puts = [asyncio.create_task(notifications.put(build_delivery(f"t{n}"))) for n in range(50)]
    for _ in range(steps):
        await asyncio.sleep(0)
    for number in range(0, 50, 2):
        puts[number].cancel()
    async with asyncio.timeout(30):
        results = await asyncio.gather(*puts, return_exceptions=True)
        assert results[1::2] == [None] * 25
        await notifications.put(build_delivery("afterwards"))
    found = await notifications.fetch([f"t{number}" for number in range(50)])
    assert {delivery.task_id for delivery in found} >= {f"t{n}" for n in range(1, 50, 2)}
    assert not notifications._waiting


async def test_after_a_refusal_later_deliveries_are_stored(own_redis, namespace):
    async with RedisNotifications(own_redis.url, namespace=namespace) as notifications:
        client = notifications._connect()
        await client.config_set("maxmemory", 1)
        puts = [notifications.put(build_delivery(f"t{number}")) for number in range(600)]
        async with asyncio.timeout(30):
            results = await asyncio.gather(*puts, return_exceptions=True)
        assert all(isinstance(result, RedisError) for result in results)
        await client.config_set("maxmemory", 0)
        await notifications.put(build_delivery("t1"))
        assert len(await notifications.fetch(["t1"])) == 1


async def test_a_delivery_whose_wake_up_is_refused_fails(notifications):
    await notifications._connect().set(notifications._stream, "not a stream")
    with pytest.raises(RedisError):
        await notifications.put(build_delivery("t1"))


async def test_thousands_that_wait_for_a_dead_redis_fail_together(own_redis, namespace):
    async with RedisNotifications(own_redis.url, namespace=namespace) as notifications:
        await notifications.put(build_delivery("t0"))
        own_redis.kill()
        puts = [notifications.put(build_delivery(f"t{number}")) for number in range(3000)]
        async with asyncio.timeout(30):
            results = await asyncio.gather(*puts, return_exceptions=True)
        assert all(isinstance(result, RedisError) for result in results)


async def test_closing_stores_waiting_deliveries(shared_redis, namespace):
    notifications = RedisNotifications(shared_redis.url, namespace=namespace)
    puts = [asyncio.create_task(notifications.put(build_delivery(f"t{n}"))) for n in range(700)]
    await asyncio.sleep(0)
    async with asyncio.timeout(30):
        await notifications.aclose()
        await asyncio.gather(*puts)


async def test_a_cancelled_close_does_not_connect_again(shared_redis, namespace):
    monitor = RedisNotifications(shared_redis.url)._connect()
    before = len(await monitor.client_list())
    for steps in range(12):
        notifications = RedisNotifications(shared_redis.url, namespace=namespace)
        puts = [asyncio.create_task(notifications.put(build_delivery("t"))) for _ in range(1500)]
        while notifications._redis is None:
            await asyncio.sleep(0)
        closing = asyncio.create_task(notifications.aclose())
        for _ in range(1 + steps):
            await asyncio.sleep(0)
        closing.cancel()
        async with asyncio.timeout(5):
            await asyncio.wait([closing])
            await asyncio.gather(*puts, return_exceptions=True)
            await asyncio.wait([notifications._writer])
        assert notifications._redis is None
    async with asyncio.timeout(5):
        while len(await monitor.client_list()) > before:
            await asyncio.sleep(0.01)
    await monitor.aclose()


async def test_a_writer_that_is_cancelled_hangs_no_receiver(notifications):
    """As `asyncio.run` does with what is left at its end."""
    for steps in range(8):
        puts = [asyncio.create_task(notifications.put(build_delivery("t"))) for _ in range(600)]
        for _ in range(1 + steps):
            await asyncio.sleep(0)
        notifications._writer.cancel()
        async with asyncio.timeout(30):
            await asyncio.gather(*puts, return_exceptions=True)
    await notifications.put(build_delivery("t"))


@pytest.mark.parametrize(("keep", "most"), [(86_400, 3_600_000), (60, 60_000)])
async def test_the_mailbox_of_a_resolved_task_expires_soon(
    shared_redis, namespace, emulator, keep, most
):
    credentials = Credentials.from_url(emulator.cloudinary_url)
    async with RedisNotifications(
        shared_redis.url, namespace=namespace, keep=keep
    ) as notifications:
        async with AnalyzeSession(credentials, notifications=notifications) as session:
            await notifications.put(build_delivery("resolved"))
            await notifications.put(build_delivery("foreign"))
            async with asyncio.timeout(30):
                await session.task("resolved", Captioning)
        client = notifications._connect()
        async with asyncio.timeout(30):
            while await client.pttl(f"{namespace}:delivery:resolved") > most:
                await asyncio.sleep(0.01)
        assert await client.pttl(f"{namespace}:delivery:resolved") > most - 30_000
        assert await client.pttl(f"{namespace}:delivery:foreign") > 1000 * keep - 30_000
        assert len(await notifications.fetch(["resolved"])) == 1  # for handles in other processes


async def test_it_serves_one_session(open_worker):
    async with open_worker() as (session, notifications):
        other = AnalyzeSession(session._credentials, notifications=notifications)
        with pytest.raises(ConfigurationError, match="Another session already reads"):
            await other.__aenter__()


async def test_100_000_ids_that_expire_together_are_forgotten_in_short_turns(clock):
    notifications = RedisNotifications("redis://localhost", clock=clock)
    for first in range(0, 100_000, 500):
        notifications._await([f"t{number}" for number in range(first, first + 500)])
    await clock.advance(room.AWAITED_SECONDS + 1)
    begun, longest, rounds = time.thread_time(), 0.0, 0
    with no_collector():
        while len(notifications._awaited) > 1:
            rounds += 1
            started = time.thread_time()
            notifications._await(["kept"])
            longest = max(longest, time.thread_time() - started)
    assert rounds == 100_000 // room.EXPIRE_BATCH
    assert time.thread_time() - begun < 2
    assert longest < 0.1


async def test_a_delivery_and_its_wake_up_are_one_transaction(notifications):
    client = notifications.location.build_blocking_client()
    with contextlib.closing(client):
        client.config_resetstat()
        await notifications.put(build_delivery("t1"))
        used = client.info("commandstats")
    assert used["cmdstat_multi"]["calls"] == used["cmdstat_exec"]["calls"] == 1
