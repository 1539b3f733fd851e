"""Workers that share notifications and a request rate."""

import contextlib
import os
import signal
import time
from concurrent.futures.process import BrokenProcessPool

import attrs
import pytest
from aiohttp import web
from machines_support import (
    build_urls,
    count_statuses,
    emulate_in_environment,
    open_pool,
    split,
)
from scripted import CAPTION, ScriptedServer, serve_aiohttp, serve_on_thread

from cloudinary_analyze import Captioning, Credentials, Settings
from cloudinary_analyze.ledger.redis import RedisLedger
from cloudinary_analyze.notifications.aiohttp import WebhookReceiver
from cloudinary_analyze.notifications.redis import RedisNotifications
from cloudinary_analyze.pacing import RedisPacer
from cloudinary_analyze.stage import AnalyzeStage

pytestmark = pytest.mark.slow

PERMITS = 16
LIMIT = 150  # per second


@contextlib.asynccontextmanager
async def receive(redis_url, credentials):
    """Run the only webhook receiver. It stores webhooks in Redis for the worker that waits."""
    async with RedisNotifications(redis_url) as notifications:
        async with serve_aiohttp(WebhookReceiver(notifications, credentials).handle) as url:
            yield f"{url}/hook"


def test_tasks_of_a_killed_worker_are_taken_over(monkeypatch, own_redis):
    urls = build_urls(600)
    with emulate_in_environment(monkeypatch, task_seconds=3, latency=0.05) as emulator:
        credentials = Credentials.from_url(emulator.cloudinary_url)
        with serve_on_thread(receive(own_redis.url, credentials)) as hook:
            stage = AnalyzeStage(
                Captioning,
                settings=Settings(permits=PERMITS),
                ledger=RedisLedger(own_redis.url, lease=2.0),
                notifications=RedisNotifications(own_redis.url),
                notification_url=hook,
                mode="task",
                credentials=credentials,
                pickle_credentials=True,
            )
            with contextlib.suppress(BrokenProcessPool), open_pool(1) as pool:
                job = pool.submit(count_statuses, stage, urls)
                while len(emulator.tasks) < 200:
                    time.sleep(0.005)
                (victim,) = pool._processes
                os.kill(victim, signal.SIGKILL)
                job.result(120)
            submitted = len(emulator.tasks)
            assert 200 <= submitted < 600
            with open_pool(1) as pool:
                statuses, _, repeated = pool.submit(count_statuses, stage, urls[::-1]).result(120)
        assert statuses == {"answered": 600}
        # requests in flight, or accepted and not recorded yet
        assert len(emulator.tasks) - 600 <= repeated <= 2 * PERMITS


@attrs.define(eq=False)
class Limiter:
    """Refuses requests that exceed a rate by more than a tenth of a second."""

    free: float = 0.0
    answered: list = attrs.field(factory=list)
    refused: int = 0

    async def __call__(self, request):
        now = time.monotonic()
        if self.free > now + 0.1:
            self.refused += 1
            return web.Response(status=429)
        self.free = max(self.free, now) + 1 / LIMIT
        self.answered.append(now)
        return await CAPTION(request)


TRIALS = 3  # other work on the machine only ever slows a trial


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_processes_that_share_a_pace_use_the_limit(own_redis, workers):
    limiter = Limiter()
    with serve_on_thread(ScriptedServer(limiter)) as server, open_pool(workers) as pool:
        stage = AnalyzeStage(
            Captioning,
            settings=Settings(pacer=RedisPacer(own_redis.url, rate=LIMIT)),
            credentials=Credentials("demo", "key", "secret", host=server.url),
            pickle_credentials=True,
        )
        warm = [pool.submit(count_statuses, stage, build_urls(20)) for _ in range(2 * workers)]
        assert all(job.result(60)[0] == {"answered": 20} for job in warm)
        parts, trials = split(build_urls(750), workers), []
        for _ in range(TRIALS):
            limiter.answered.clear()
            limiter.refused = 0
            for job in [pool.submit(count_statuses, stage, part) for part in parts]:
                job.result(120)
            rate = (len(limiter.answered) - 1) / (limiter.answered[-1] - limiter.answered[0])
            trials.append(
                (rate >= 0.95 * LIMIT and limiter.refused <= 0.01 * 750, rate, limiter.refused)
            )
            if trials[-1][0]:
                break
    print(f"{workers} processes, {LIMIT}/s: kept, rate and refused of each trial: {trials}")
    assert trials[-1][0], trials
