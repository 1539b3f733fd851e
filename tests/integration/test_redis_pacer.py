"""`RedisPacer` against a real Redis: one even rate for all who share it."""

import asyncio
import pickle
import time

import pytest
from scripted import CAPTION, ScriptedServer, until

from cloudinary_analyze import Captioning, ConfigurationError
from cloudinary_analyze.pacing import RedisPacer


@pytest.fixture
def build(shared_redis, request):
    def build(url=None, **options):
        return RedisPacer(
            url or shared_redis.url, **{"name": request.node.name, "rate": 100, **options}
        )

    return build


async def take(pacer, count):
    """Return when each of many waiters may start."""

    async def wait():
        await pacer.acquire()
        return time.monotonic()

    return await asyncio.gather(*(wait() for _ in range(count)))


def count_commands(shared_redis):
    import redis

    with redis.Redis.from_url(shared_redis.url) as client:
        return client.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"]


async def test_pacers_of_a_name_share_one_even_rate(build, shared_redis):
    before = count_commands(shared_redis)
    async with build() as one, build() as other:
        await asyncio.gather(one.acquire(), other.acquire())  # connected from now on
        begun = time.monotonic()
        taken = await asyncio.gather(take(one, 40), take(other, 40))
        last = max(map(max, taken)) - begun
        assert 0.78 < last < 20
        # a process that reserves does not hold the others up
        assert max(map(min, taken)) - begun < last / 2
    assert count_commands(shared_redis) - before <= 0.3 * 80


async def until_reserved(*pacers):
    """Wait until every waiting attempt has its start."""
    for _ in range(3):  # until all have begun to wait
        await asyncio.sleep(0)
    await until(lambda: not any(pacer._reserved.waiting for pacer in pacers))


async def test_other_names_have_their_own_rate(build, clock):
    async with (
        build(rate=0.02, clock=clock) as one,
        build(rate=0.02, name="another", clock=clock) as other,
    ):
        taking = asyncio.gather(take(one, 5), take(other, 5))
        await until_reserved(one, other)
        await clock.advance(200)
        await until(taking.done)


async def test_a_burst_may_start_at_once_after_a_quiet_time(build, clock):
    async with build(rate=0.02, burst=5, clock=clock) as pacer:
        async with asyncio.timeout(30):
            await take(pacer, 5)
        following = asyncio.create_task(pacer.acquire())
        await until_reserved(pacer)
        await clock.advance(20)
        assert not following.done()
        await clock.advance(30)
        await following


async def test_a_cancelled_wait_leaves_its_start_to_the_next(build, shared_redis, clock):
    async with build(rate=0.02, clock=clock) as pacer:
        await pacer.acquire()
        waiting = asyncio.create_task(pacer.acquire())
        await until_reserved(pacer)
        reserved = count_commands(shared_redis)
        waiting.cancel()
        await asyncio.wait([waiting])
        following = asyncio.create_task(pacer.acquire())
        await until_reserved(pacer)
        assert count_commands(shared_redis) == reserved
        await clock.advance(50)
        await following


async def test_unused_starts_are_not_saved_up(build):
    async with build(rate=50) as pacer:
        waiting = [asyncio.create_task(pacer.acquire()) for _ in range(20)]
        await asyncio.sleep(0.02)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        await asyncio.sleep(0.5)
        begun = time.monotonic()
        await take(pacer, 10)
        assert time.monotonic() - begun > 0.1


async def test_it_waits_for_redis_and_then_raises(build, own_redis):
    async with build(own_redis.url, patience=60) as pacer:
        await pacer.acquire()
        own_redis.kill()
        waiting = asyncio.create_task(pacer.acquire())
        await asyncio.sleep(0.3)
        assert not waiting.done()
        own_redis.start()
        await waiting
    async with build(own_redis.url, patience=0.2) as pacer:
        await pacer.acquire()
        own_redis.kill()
        results = await asyncio.gather(*(pacer.acquire() for _ in range(3)), return_exceptions=True)
        assert all(isinstance(result, ConnectionError) for result in results)
        assert "was not available" in str(results[0])
        own_redis.start()
        await pacer.acquire()


async def test_a_session_starts_at_its_rate(build):
    async with ScriptedServer(CAPTION) as server, build(rate=50) as pacer:
        async with server.session(pacer=pacer) as session:
            begun = time.monotonic()
            requests = [Captioning(f"https://example.com/{n}.jpg") for n in range(20)]
            outcomes = await session.analyze_all(requests)
            assert time.monotonic() - begun > 0.3
        assert all(outcome.response for outcome in outcomes)


def test_it_pickles_without_the_password(build):
    pacer = build("redis://:hunter2@127.0.0.1:7777/0", rate=7.5, burst=2, patience=9)
    assert b"hunter2" not in pickle.dumps(pacer)
    assert "hunter2" not in repr(pacer)
    again = pickle.loads(pickle.dumps(pacer))
    assert (again.rate, again.burst, again.name) == (7.5, 2, pacer.name)


@pytest.mark.parametrize(
    "options",
    [
        {"rate": 0},
        {"rate": float("inf")},
        {"rate": True},
        {"burst": 0},
        {"burst": 1.5},
        {"name": ""},
    ],
)
def test_invalid_arguments_are_refused(build, options):
    with pytest.raises(ConfigurationError):
        build(**options)
