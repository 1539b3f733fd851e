"""Cells of webhooks over Redis: from the POST to the resolved future, in another process.

One process serves the receiver, with uvicorn; the worker sends the webhooks and awaits the
futures. The ``appendfsync`` of Redis decides when it acknowledges: with ``always``, a webhook gets
its 200 only once it is on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from benchmarks.clients import build_session
from benchmarks.model import Cell, Job, Sample, Samples
from benchmarks.notices import build_notice
from benchmarks.payloads import ANSWERS, API_KEY, API_SECRET, CLOUD, build_image_url
from benchmarks.processes import run_listener, run_redis
from benchmarks.server import run_server

if TYPE_CHECKING:
    import aiohttp

    from cloudinary_analyze import AnalysisTask
    from cloudinary_analyze.notifications.asgi import WebhookReceiver

PART: Final = 1000  # divides the items of a job
WARM_UP: Final = 50
TOGETHER: Final = (1, 16)
POLICIES: Final = ("everysec", "always")


def build_receiver() -> WebhookReceiver:
    """Return the application of the other process."""
    from cloudinary_analyze import Credentials
    from cloudinary_analyze.notifications.asgi import WebhookReceiver
    from cloudinary_analyze.notifications.redis import RedisNotifications

    credentials = Credentials(CLOUD, API_KEY, API_SECRET)
    return WebhookReceiver(RedisNotifications(os.environ["REDIS_URL"]), credentials)


@contextlib.contextmanager
def _run_servers(policy: str) -> Iterator[tuple[str, str]]:
    """Yield the URLs of a Redis and of a receiver in front of it."""
    uvicorn = [sys.executable, "-m", "uvicorn", "--factory", f"{__name__}:build_receiver"]
    uvicorn += ["--log-level", "warning", "--no-access-log"]
    with run_redis(policy) as redis_url, run_listener(*uvicorn, REDIS_URL=redis_url) as port:
        yield redis_url, f"http://127.0.0.1:{port}/"


async def _send(
    client: aiohttp.ClientSession, url: str, task: AnalysisTask[Any], seconds: list[float]
) -> None:
    """Send a task's webhook, and record the seconds until the task is resolved."""
    assert task.task_id is not None
    body, headers = build_notice(task.task_id, ANSWERS["captioning"])
    resolved = task.as_future()
    begun = time.perf_counter()
    posting = asyncio.create_task(_post(client, url, body, headers))
    await resolved
    seconds.append(time.perf_counter() - begun)
    await posting


async def _post(
    client: aiohttp.ClientSession, url: str, body: bytes, headers: dict[str, str]
) -> None:
    async with client.post(url, data=body, headers=headers) as response:
        if response.status != 200:
            raise RuntimeError(f"The receiver answered {response.status}.")


async def _deliver(job: Job, redis_url: str, hook: str, *, together: int) -> list[float]:
    import aiohttp

    from cloudinary_analyze import Captioning
    from cloudinary_analyze.notifications.redis import RedisNotifications

    async with (
        aiohttp.ClientSession() as client,
        RedisNotifications(redis_url) as notifications,
        build_session(job.url, notifications=notifications) as session,
    ):
        count = WARM_UP + job.items // PART
        tasks = [session.submit(Captioning(build_image_url(number))) for number in range(count)]
        for task in tasks:
            await task.accepted()
        await notifications.fetch([task.task_id for task in tasks if task.task_id])
        seconds: list[float] = []

        async def keep_sending(waiting: Iterator[AnalysisTask[Any]]) -> None:
            for task in waiting:
                await _send(client, hook, task, seconds)

        shared = iter(tasks)
        await asyncio.gather(*[keep_sending(shared) for _ in range(together)])
        return seconds[WARM_UP:]


def _measure(job: Job, *, policy: str, together: int) -> Samples:
    with _run_servers(policy) as (redis_url, hook):
        seconds = asyncio.run(_deliver(job, redis_url, hook, together=together))
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    yield Sample(
        value=1e3 * cuts[49],
        notes={"p95 ms": 1e3 * cuts[94], "p99 ms": 1e3 * cuts[98], "most ms": 1e3 * max(seconds)},
    )


CELLS: Final = tuple(
    Cell(
        name=f"webhook-{together}",
        unit="ms from POST to future",
        contenders={
            f"appendfsync {policy}": partial(_measure, policy=policy, together=together)
            for policy in POLICIES
        },
        baseline=f"appendfsync {POLICIES[0]}",
        subject=f"appendfsync {POLICIES[1]}",
        prepare=run_server,
        program="redis-server",
    )
    for together in TOGETHER
)
