"""Two processes of the kill test: the emulator, which is never killed, and the run, which is."""

import asyncio
import json
import os
import sys
from collections import Counter

from aiohttp import web

from cloudinary_analyze import AnalyzeSession, Captioning, Credentials, Delivery, Settings
from cloudinary_analyze.emulator import Emulator, WebhookPolicy
from cloudinary_analyze.ledger.sqlite import SQLiteLedger

ITEMS = 20_000


def build_urls():
    return [f"https://pictures.example.com/{number}.jpg" for number in range(ITEMS)]


async def emulate():
    """Run the emulator. Answer each line on stdin with the requests received, once none is in flight."""
    policy = WebhookPolicy(retry_scale=0.004)  # again after 0.7, 1.4 and 2.2 s
    async with Emulator(latency=0.1, task_seconds=0.1, webhooks=policy) as emulator:
        print(emulator.cloudinary_url, flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            total = -1
            while total != emulator.counts.total_received or emulator.counts.in_flight:
                total = emulator.counts.total_received
                await asyncio.sleep(0.05)
            received = {source: n for (_, source), n in emulator.counts.received.items()}
            tasks = Counter(task.source for task in emulator.tasks.values())
            delivered = Counter(task.source for task in emulator.tasks.values() if task.notified)
            print(json.dumps([received, tasks, delivered]), flush=True)


async def run(mode, cloudinary_url, ledger_path, log_path, port):
    """Analyze every item, and log each outcome that was yielded."""
    deliveries = asyncio.Queue()

    async def receive(request):
        deliveries.put_nowait(Delivery(await request.read(), dict(request.headers)))
        return web.Response()

    app = web.Application()
    app.router.add_post("/hook", receive)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", int(port)).start()
    session = AnalyzeSession(
        Credentials.from_url(cloudinary_url),
        # what was answered to a run that was killed is not delivered again, and must be repeated
        settings=Settings(on_missing_result="analyze", result_grace=6, polls_per_second=1000),
        notifications=deliveries,
        notification_url=f"http://127.0.0.1:{port}/hook",
    )
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    async with SQLiteLedger(ledger_path) as ledger, session:
        print("begun", flush=True)
        async with session.map(build_urls(), Captioning, mode=mode, ledger=ledger) as stream:
            async for outcome in stream:
                right = outcome.response is not None and outcome.response.entity == outcome.item
                os.write(log, f"{outcome.index} {right}\n".encode())
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(emulate() if sys.argv[1] == "emulate" else run(*sys.argv[2:]))
