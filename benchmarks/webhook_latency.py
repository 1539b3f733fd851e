"""How long from the POST of a webhook to the resolved future in another process, over Redis.

One process serves the receiver, with uvicorn; this one sends the webhooks and awaits the futures.
Needs ``redis-server``, which it starts for itself. Run with ``python -m benchmarks.webhook_latency``;
prints JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, Final

import aiohttp

from cloudinary_analyze import AnalysisTask, AnalyzeSession, Captioning, Credentials
from cloudinary_analyze._wire.signature import (
    SIGNATURE_HEADER,
    TIMESTAMP_HEADER,
    compute_signature,
)
from cloudinary_analyze.emulator import Emulator
from cloudinary_analyze.notifications.asgi import WebhookReceiver
from cloudinary_analyze.notifications.redis import RedisNotifications

SECRET: Final = "benchmark-secret"
WEBHOOKS: Final = 1000
WARM_UP: Final = 50
TOGETHER: Final = (1, 16)
POLICIES: Final = ("always", "everysec")
START_SECONDS: Final = 20.0


def build_receiver() -> WebhookReceiver:
    """Return the application of the other process."""
    notifications = RedisNotifications(os.environ["REDIS_URL"])
    return WebhookReceiver(notifications, Credentials.from_environment())


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def _run(command: list[str], port: int, **environment: str) -> Iterator[None]:
    """Run a server, from when it can be connected to."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, env={**os.environ, **environment}
    )
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} did not start.")
            time.sleep(0.01)
        yield
    finally:
        process.kill()
        process.wait()


def _sign(task_id: str) -> tuple[bytes, dict[str, str]]:
    content = {
        "notification_type": "analyze",
        "task_id": task_id,
        "http_status": 200,
        "data": {"entity": "https://x.test/a.jpg", "analysis": {"data": {"caption": "A cat"}}},
    }
    body, timestamp = json.dumps(content).encode(), str(int(time.time()))
    signature = compute_signature(body, timestamp, SECRET)
    return body, {TIMESTAMP_HEADER: timestamp, SIGNATURE_HEADER: signature}


async def _send(
    client: aiohttp.ClientSession, url: str, task: AnalysisTask[Any], seconds: list[float]
) -> None:
    """Send a task's webhook, and note the seconds until the task was resolved."""
    assert task.task_id is not None
    body, headers = _sign(task.task_id)
    resolved = task.as_future()
    begun = time.perf_counter()
    posting = asyncio.ensure_future(_post(client, url, body, headers))
    await resolved
    seconds.append(time.perf_counter() - begun)
    await posting


async def _post(
    client: aiohttp.ClientSession, url: str, body: bytes, headers: dict[str, str]
) -> None:
    async with client.post(url, data=body, headers=headers) as response:
        if response.status != 200:
            raise RuntimeError(f"The receiver answered {response.status}.")


async def _measure(emulator: Emulator, redis_url: str, hook: str, together: int) -> list[float]:
    credentials = Credentials.from_url(emulator.cloudinary_url)
    async with (
        aiohttp.ClientSession() as client,
        RedisNotifications(redis_url) as notifications,
        AnalyzeSession(credentials, notifications=notifications) as session,
    ):
        count = WARM_UP + WEBHOOKS
        tasks = [session.submit(Captioning(f"https://x.test/{n}.jpg")) for n in range(count)]
        for task in tasks:
            await task.accepted()
        await notifications.fetch([task.task_id for task in tasks if task.task_id])
        waiting = iter(tasks)
        seconds: list[float] = []

        async def keep_sending() -> None:
            for task in waiting:
                await _send(client, hook, task, seconds)

        await asyncio.gather(*[keep_sending() for _ in range(together)])
        return seconds[WARM_UP:]


async def _measure_policy(policy: str) -> dict[str, Any]:
    redis_port, port = _find_free_port(), _find_free_port()
    redis_url, hook = f"redis://127.0.0.1:{redis_port}/0", f"http://127.0.0.1:{port}/"
    with tempfile.TemporaryDirectory() as directory:
        redis = ["redis-server", "--bind", "127.0.0.1", "--port", str(redis_port), "--save", ""]
        redis += ["--dir", directory, "--appendonly", "yes", "--appendfsync", policy]
        uvicorn = [sys.executable, "-m", "uvicorn", "--factory", f"{__spec__.name}:build_receiver"]
        uvicorn += ["--port", str(port), "--log-level", "warning", "--no-access-log"]
        with _run(redis, redis_port):
            async with Emulator(task_seconds=3600, api_secret=SECRET) as emulator:
                url = emulator.cloudinary_url
                with _run(uvicorn, port, REDIS_URL=redis_url, CLOUDINARY_URL=url):
                    return {
                        f"{together} at once": _summarise(
                            await _measure(emulator, redis_url, hook, together)
                        )
                        for together in TOGETHER
                    }


def _summarise(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100)
    figures = {"median": cuts[49], "p95": cuts[94], "p99": cuts[98], "most": max(seconds)}
    return {name: round(1000 * value, 2) for name, value in figures.items()}


def main() -> None:
    """Measure with both durable fsync policies and print milliseconds."""
    results = {f"appendfsync {policy}": asyncio.run(_measure_policy(policy)) for policy in POLICIES}
    print(json.dumps({"unit": "ms", "webhooks": WEBHOOKS, "latency": results}, indent=2))


if __name__ == "__main__":
    main()
