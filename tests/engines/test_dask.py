"""Dask on a local cluster: quotas, killed workers and the plugin."""

import os
import signal
import time

import pytest
from machines_support import build_urls, count_statuses, emulate_in_environment, split

from cloudinary_analyze import Captioning, Credentials, Settings
from cloudinary_analyze.ledger.redis import RedisLedger
from cloudinary_analyze.stage import AnalyzeStage, close_sessions, worker_stats

distributed = pytest.importorskip("distributed")
from cloudinary_analyze.dask import AnalyzePlugin  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

PERMITS = 16


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with distributed.Client(
        n_workers=2,
        threads_per_worker=1,
        dashboard_address=None,
        local_directory=str(tmp_path_factory.mktemp("dask")),
        silence_logs=50,
    ) as client:
        yield client


@pytest.fixture
def build_stage(own_redis, client):
    def build_stage(emulator):
        return AnalyzeStage(
            Captioning,
            settings=Settings(permits=PERMITS),
            ledger=RedisLedger(own_redis.url, lease=2.0),
            # the environment of the workers is that of the first test
            credentials=Credentials.from_url(emulator.cloudinary_url),
            pickle_credentials=True,
        )

    yield build_stage
    client.run(close_sessions)


def add_up(results):
    answered = sum(statuses["answered"] for statuses, _, _ in results)
    stopped = sum(statuses["stopped"] for statuses, _, _ in results)
    repeated = {}
    for _, pid, retries in results:
        repeated[pid] = max(retries, repeated.get(pid, 0))
    return answered, stopped, sum(repeated.values())


def test_a_quota_that_ends_midway_loses_no_response(monkeypatch, build_stage, client):
    parts = split(build_urls(4000), 16)
    options = {"latency": 0.02, "quotas": {"object_detection": 1000}}
    with emulate_in_environment(monkeypatch, **options) as emulator:
        stage = build_stage(emulator)
        results = client.gather(client.map(lambda part: count_statuses(stage, part), parts))
        assert add_up(results)[:2] == (1000, 3000)
        received = emulator.counts.total_received
        again = client.gather(
            client.map(lambda part: count_statuses(stage, part), parts, pure=False)
        )
        assert add_up(again)[:2] == (1000, 3000)
        assert emulator.counts.total_done == 1000
        # the resumed job probed the quota and received only refusals
        assert emulator.counts.total_received - received <= 16 * PERMITS


def test_a_killed_worker_costs_no_row(monkeypatch, build_stage, client):
    parts = split(build_urls(2000), 8)
    with emulate_in_environment(monkeypatch, latency=0.05) as emulator:
        stage = build_stage(emulator)
        client.register_plugin(AnalyzePlugin())
        jobs = client.map(lambda part: count_statuses(stage, part), parts)
        while emulator.counts.total_done < 600:
            time.sleep(0.01)
        victim = next(iter(client.run(os.getpid).values()))
        os.kill(victim, signal.SIGKILL)
        answered, stopped, repeated = add_up(client.gather(jobs))
        assert (answered, stopped) == (2000, 0)
        assert 0 <= emulator.counts.total_done - 2000 <= repeated <= PERMITS
        assert len(worker_stats(stage.ledger)) >= 1


def test_the_plugin_closes_the_sessions_of_workers(monkeypatch, build_stage, client):
    with emulate_in_environment(monkeypatch) as emulator:
        stage = build_stage(emulator)
        client.register_plugin(AnalyzePlugin())
        parts = split(build_urls(40), 4)
        client.gather(client.map(lambda part: count_statuses(stage, part), parts))
        assert worker_stats(stage.ledger)
        client.unregister_worker_plugin("cloudinary-analyze")
        deadline = time.monotonic() + 10
        while worker_stats(stage.ledger):
            assert time.monotonic() < deadline
            time.sleep(0.05)
