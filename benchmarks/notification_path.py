"""A notification from its bytes to a resolved task, against the least that one writes by hand.

``python -m benchmarks.notification_path`` prints JSON. Ours is what the session's listener does
with each delivery: verify the signature in constant time and against every secret, judge its
age, read it, find the task and answer it. By hand: one SHA-1, ``orjson.loads``, ``set_result``.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

import orjson

from benchmarks.payloads import ANSWERS
from cloudinary_analyze import AnalyzeSession, Captioning, Credentials, Settings
from cloudinary_analyze._wire.signature import compute_signature
from cloudinary_analyze.responses import Delivery

SECRET: Final = "benchmark-secret"
MOST: Final = 2.5
ROUNDS: Final = 7

Measure = Callable[[list[Delivery], list[str]], Coroutine[Any, Any, float]]


def build_delivery(task_id: str, answer: bytes) -> Delivery:
    """Return the signed notification of a task that a call would have answered like this."""
    content = {
        "operation_name": "analyze",
        "notification_type": "analyze",
        "task_id": task_id,
        "http_status": 200,
        **orjson.loads(answer),
    }
    body = orjson.dumps(content)
    now = str(int(time.time()))
    headers = {
        "Content-Type": "application/json",
        "X-Cld-Timestamp": now,
        "X-Cld-Signature": compute_signature(body, now, SECRET),
    }
    return Delivery(body, headers)


async def resolve_by_hand(deliveries: list[Delivery], task_ids: list[str]) -> float:
    """Return the CPU seconds that the bare minimum takes."""
    loop = asyncio.get_running_loop()
    futures: dict[str, asyncio.Future[Any]] = {
        task_id: loop.create_future() for task_id in task_ids
    }
    queue: asyncio.Queue[Delivery] = asyncio.Queue()
    for delivery in deliveries:
        queue.put_nowait(delivery)
    secret = SECRET.encode()
    pending = dict(futures)
    gc.collect()
    begun = time.process_time()
    while pending:
        delivery = await queue.get()
        headers = delivery.headers
        signed = delivery.body + headers["X-Cld-Timestamp"].encode() + secret
        if hashlib.sha1(signed).hexdigest() == headers["X-Cld-Signature"]:
            content = orjson.loads(delivery.body)
            pending.pop(content["task_id"]).set_result(content)
    taken = time.process_time() - begun
    assert all(future.done() for future in futures.values())
    return taken


async def resolve_with_ours(deliveries: list[Delivery], task_ids: list[str]) -> float:
    """Return the CPU seconds that a session takes."""
    queue: asyncio.Queue[Delivery] = asyncio.Queue()
    settings = Settings(host="http://127.0.0.1:9", poll_first=3600, poll_longest=3600)
    async with AnalyzeSession(
        Credentials("benchmark", "key", SECRET), settings=settings, notifications=queue
    ) as session:
        tasks = [session.task(task_id, Captioning) for task_id in task_ids]
        assert session._resolver is not None  # noqa: SLF001
        poller = session._resolver.poller  # noqa: SLF001
        for entry in session._resolver.table.pending.values():  # noqa: SLF001
            poller.schedule(entry)  # as if accepted just now, not taken up: no poll is due
        gc.collect()
        for delivery in deliveries:
            queue.put_nowait(delivery)
        begun = time.process_time()
        while session.stats.pending:
            await asyncio.sleep(0)
        taken = time.process_time() - begun
        assert all(task.done() for task in tasks)
        return taken


CONTENDERS: Final[dict[str, Measure]] = {"ours": resolve_with_ours, "by hand": resolve_by_hand}


def measure(model: str, *, count: int) -> dict[str, Any]:
    """Return the microseconds of each contender, in turns, and the ratio of their medians."""
    task_ids = [f"{number:0160x}" for number in range(count)]
    deliveries = [build_delivery(task_id, ANSWERS[model]) for task_id in task_ids]
    samples: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(ROUNDS):
        for name, resolve in CONTENDERS.items():
            taken = asyncio.run(resolve(deliveries, task_ids))
            samples[name].append(1e6 * taken / count)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    ratio = medians["ours"] / medians["by hand"]
    return {
        "body_bytes": len(deliveries[0].body),
        "us_cpu": {name: round(median, 2) for name, median in medians.items()},
        "range": {name: [round(min(v), 2), round(max(v), 2)] for name, v in samples.items()},
        "ratio": round(ratio, 2),
        "kept": ratio <= MOST,
    }


def main() -> None:
    """Print the measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    options = parser.parse_args()
    result = {model: measure(model, count=options.count) for model in ("captioning", "coco")}
    print(json.dumps({"most": MOST, "models": result}, indent=2))


if __name__ == "__main__":
    main()
