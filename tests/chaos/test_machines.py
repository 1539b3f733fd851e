"""Clusters that share a ledger are killed, suspended or disconnected, and their charges counted."""

import contextlib
import os
import random
import signal
import time
from collections import Counter
from concurrent.futures import wait
from concurrent.futures.process import BrokenProcessPool

import pytest
from machines_support import build_urls, count_statuses, emulate_in_environment, open_pool, split

from cloudinary_analyze import Captioning, Credentials, Settings
from cloudinary_analyze.ledger.redis import RedisLedger
from cloudinary_analyze.stage import AnalyzeStage, worker_stats

pytestmark = pytest.mark.slow

PERMITS = 16


@pytest.fixture
def emulator(monkeypatch, request):
    latency = getattr(request, "param", 0.05)
    with emulate_in_environment(monkeypatch, latency=latency) as emulator:
        yield emulator


@pytest.fixture
def build_stage(own_redis, emulator):
    def build_stage(**options):
        return AnalyzeStage(
            Captioning,
            settings=Settings(permits=PERMITS),
            ledger=RedisLedger(own_redis.url, **{"lease": 2.0, **options}),
            # the environment of the server of CONTEXT is that of an earlier test
            credentials=Credentials.from_url(emulator.cloudinary_url),
            pickle_credentials=True,
        )

    return build_stage


def run(pool, stage, parts):
    return [pool.submit(count_statuses, stage, part) for part in parts]


def add_up(jobs):
    """Return all statuses, and the repeated attempts of all processes."""
    statuses, repeated = Counter(), {}
    for job in jobs:
        counts, pid, retries = job.result(120)
        statuses += counts
        repeated[pid] = max(retries, repeated.get(pid, 0))
    return statuses, sum(repeated.values())


def wait_for(emulator, count, *, source=None):
    """Wait until this many items are done, including the given source."""
    deadline = time.monotonic() + 120
    counts = emulator.counts
    while counts.total_done < count or (source and not counts.done["captioning", source]):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_clusters_over_the_same_keys_pay_once(emulator, build_stage):
    urls = build_urls(3000)
    other = random.Random(1).sample(urls, len(urls))
    with open_pool() as one, open_pool() as two:
        jobs = run(one, build_stage(), split(urls, 6)) + run(two, build_stage(), split(other, 4))
        statuses, repeated = add_up(jobs)
        assert (statuses, repeated) == ({"answered": 6000}, 0)
        assert emulator.counts.total_received == emulator.counts.total_done == 3000
        statuses, _ = add_up(run(one, build_stage(), split(urls, 11)))
        assert statuses == {"answered": 3000}
        assert emulator.counts.total_received == 3000


def test_the_next_pool_resumes_after_a_kill(emulator, build_stage):
    urls = build_urls(1500)
    with open_pool(1) as survivor:
        jobs = run(survivor, build_stage(), [urls])
        with contextlib.suppress(BrokenProcessPool), open_pool(1) as pool:
            killed = run(pool, build_stage(), [urls[::-1]])
            wait_for(emulator, 300, source=urls[-1])  # both workers are at work
            (victim,) = pool._processes
            os.kill(victim, signal.SIGKILL)
            killed[0].result(120)
        statuses, repeated = add_up(jobs)
    assert statuses == {"answered": 1500}
    paid_twice = emulator.counts.total_done - 1500
    assert 0 < repeated <= PERMITS, (paid_twice, repeated)
    assert paid_twice <= repeated


def test_a_suspended_worker_is_harmless(emulator, build_stage):
    urls = build_urls(1500)
    with open_pool(1) as one, open_pool(1) as other:
        jobs = run(one, build_stage(lease=1.0), [urls])
        wait_for(emulator, 200)
        (suspended,) = one._processes
        os.kill(suspended, signal.SIGSTOP)
        jobs += run(other, build_stage(lease=1.0), [urls])
        wait(jobs[1:], 120)  # with what the suspended one had claimed, once its lease is over
        os.kill(suspended, signal.SIGCONT)
        statuses, repeated = add_up(jobs)
    assert statuses == {"answered": 3000}
    assert 0 < emulator.counts.total_done - 1500 <= repeated <= PERMITS


def test_killing_redis_twice_costs_no_charge(emulator, build_stage, own_redis):
    urls = build_urls(2000)
    with open_pool() as pool:
        jobs = run(pool, build_stage(), split(urls, 2))
        for count in (400, 1200):
            wait_for(emulator, count)
            own_redis.kill()
            time.sleep(0.3)
            own_redis.start()
        statuses, repeated = add_up(jobs)
    assert (statuses, repeated) == ({"answered": 2000}, 0)
    assert emulator.counts.total_received == 2000


@pytest.mark.parametrize("emulator", [0.02], indirect=True)
def test_lost_writes_of_redis_cost_no_charge(emulator, build_stage, own_redis):
    urls = build_urls(4000)
    with open_pool() as pool:
        jobs = run(pool, build_stage(), split(urls, 2))
        wait_for(emulator, 2500)
        own_redis.kill()
        (log,) = (own_redis.directory / "appendonlydir").glob("*.incr.aof")
        size = log.stat().st_size
        os.truncate(log, max(0, size - 500_000))
        own_redis.start()
        statuses, repeated = add_up(jobs)
    assert size > 600_000
    assert (statuses, repeated) == ({"answered": 4000}, 0)
    assert emulator.counts.total_received == 4000


def test_a_long_redis_outage_stops_the_job(emulator, build_stage, own_redis):
    urls = build_urls(2000)
    stage = build_stage(patience=1.0)
    with open_pool() as pool:
        jobs = run(pool, stage, split(urls, 2))
        wait_for(emulator, 500)
        own_redis.kill()
        statuses, _ = add_up(jobs)
        paid = emulator.counts.total_done
        assert statuses["answered"] == paid, "a response that was paid for was dropped"
        assert statuses["stopped"] == 2000 - paid
        own_redis.start()
        statuses, _ = add_up(run(pool, stage, split(urls, 3)))
    assert statuses == {"answered": 2000}
    assert emulator.counts.total_done - 2000 <= 2 * PERMITS


def test_running_workers_are_listed(emulator, build_stage, own_redis):
    stage = build_stage()
    with open_pool() as pool:
        jobs = run(pool, stage, split(build_urls(1500), 2))
        wait_for(emulator, 1000)
        shown = worker_stats(stage.ledger)
        assert {stats["pid"] for stats in shown} == set(pool._processes)
        assert sum(stats["calls"] for stats in shown) > 300
        wait(jobs)
    assert worker_stats(stage.ledger) == []
