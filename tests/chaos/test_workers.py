"""The documented FastAPI program, with two workers and a Redis that is killed, loses no result."""

import asyncio
import contextlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import aiohttp
import pytest
from ports import reserve_port

from cloudinary_analyze.emulator import Emulator, FaultPlan, WebhookPolicy

pytestmark = pytest.mark.slow

APPS = Path(__file__).parent.parent / "apps"
REQUESTS = 1000
PATIENCE = 200.0


@contextlib.asynccontextmanager
async def run_workers(emulator, own_redis, program="fastapi_app:app"):
    """Run the program with two workers, as its documentation says; yield its origin."""
    port = reserve_port()
    origin = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(APPS), program]
    command += ["--workers", "2", "--port", str(port), "--log-level", "warning"]
    environment = {
        **os.environ,
        "CLOUDINARY_URL": emulator.cloudinary_url,
        "REDIS_URL": own_redis.url,
        "PUBLIC_URL": origin,
    }
    process = subprocess.Popen(command, env=environment)
    try:
        async with asyncio.timeout(PATIENCE), aiohttp.ClientSession() as client:
            while True:
                try:
                    async with client.get(f"{origin}/openapi.json") as response:
                        assert response.status == 200
                        break
                except aiohttp.ClientConnectorError:
                    assert process.poll() is None
                    await asyncio.sleep(0.05)
        yield origin
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, PATIENCE)


def open_emulator():
    """Send 10 % of webhooks before the 202 and 5 % twice. Quickly resend those that were not stored."""
    return Emulator(
        task_seconds=0.1,
        faults=FaultPlan(early=0.1, duplicated=0.05),
        webhooks=WebhookPolicy(retry_scale=0.01),
    )


async def ask(client, origin, uri, statuses):
    """Request a caption as a client that repeats the request with the task id."""
    url, query = f"{origin}/captions", {"uri": uri}
    while True:
        async with client.get(url, params=query) as response:
            statuses[response.status] += 1
            content = await response.json()
        if response.status != 504:
            return content
        url, query = f"{origin}/captions/{content['detail']['task_id']}", {}


def open_client():
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=PATIENCE)
    )


def check_faults(emulator):
    """Check that the planned faults occurred and that no item was requested twice."""
    faults = Counter(fault for task in emulator.tasks.values() for fault in task.faults)
    assert faults["early"] > 0.07 * REQUESTS
    assert faults["duplicated"] > 0.03 * REQUESTS
    assert emulator.counts.webhooks["duplicate"] == faults["duplicated"]
    assert len(emulator.tasks) == emulator.counts.total_done == REQUESTS


async def test_each_of_a_thousand_handlers_gets_its_result(own_redis):
    program = "patient_fastapi_app:app"  # so that a busy machine causes no 504
    async with open_emulator() as emulator, run_workers(emulator, own_redis, program) as origin:
        uris, statuses = emulator.sample_urls(REQUESTS), Counter()
        async with open_client() as client, asyncio.timeout(PATIENCE):
            answers = await asyncio.gather(*(ask(client, origin, uri, statuses) for uri in uris))
        assert [answer["uri"] for answer in answers] == uris
        assert statuses == {200: REQUESTS}
        check_faults(emulator)


async def test_no_result_is_lost_when_redis_restarts(own_redis):
    async with open_emulator() as emulator, run_workers(emulator, own_redis) as origin:
        uris, statuses = emulator.sample_urls(REQUESTS), Counter()
        async with open_client() as client, asyncio.timeout(PATIENCE):
            asking = [asyncio.create_task(ask(client, origin, uri, statuses)) for uri in uris]
            for answered in (REQUESTS // 10, REQUESTS // 3):
                while statuses[200] < answered:
                    await asyncio.sleep(0.005)
                await asyncio.to_thread(own_redis.kill)
                refused = emulator.counts.webhooks_refused
                while emulator.counts.webhooks_refused < refused + 5:
                    await asyncio.sleep(0.005)
                await asyncio.to_thread(own_redis.start)
            answers = await asyncio.gather(*asking)
        assert [answer["uri"] for answer in answers] == uris
        assert set(statuses) <= {200, 504}
        assert emulator.counts.webhooks["redelivery"] >= 10
        check_faults(emulator)
