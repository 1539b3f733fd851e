"""A hundred thousand pending tasks nobody waits for: bytes each, polls each, lag of the loop.

``python -m benchmarks.pending_tasks`` prints JSON. The tasks are accepted and polled over real
sockets; the server is a process of its own. What a task costs is counted beyond the requests
themselves, which the program holds anyway.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

from benchmarks.server import build_answer
from cloudinary_analyze import AnalysisTask, AnalyzeSession, Captioning, Credentials, Settings
from cloudinary_analyze._wire.signature import compute_signature
from cloudinary_analyze.responses import Delivery

SECRET: Final = "benchmark-secret"
BATCH: Final = 1000
TICK: Final = 0.002
TARGETS: Final = {"bytes_each": 1024, "lag_p99_ms": 20}
_PROCESSING: Final = build_answer(b'{"data":{"status":"processing"},"request_id":"0"}')


class _Acceptor(asyncio.Protocol):
    """Accepts every POST as a task of a new id; every GET finds it being processed."""

    numbers = itertools.count()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.pending = b""

    def data_received(self, data: bytes) -> None:
        data = self.pending + data
        while (end := data.find(b"\r\n\r\n")) >= 0:
            end += 4
            head = data[:end].lower()
            at = head.find(b"content-length:")
            if at >= 0:
                end += int(head[at + 15 : head.index(b"\r", at)])
            if len(data) < end:
                break
            if head.startswith(b"get"):
                self.transport.write(_PROCESSING)
            else:
                task = {"task_id": f"{next(self.numbers):0160x}", "status": "pending"}
                answer = build_answer(json.dumps({"data": task, "request_id": "0"}).encode())
                self.transport.write(answer.replace(b" 200 OK", b" 202 Accepted", 1))
            data = data[end:]
        self.pending = data


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Acceptor, "127.0.0.1", 0, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    over = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), over.set)  # stdin ends when the parent does
    await over.wait()


@contextmanager
def _run_server() -> Iterator[str]:
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.pending_tasks", "--serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()
            process.wait(10)


def read_memory() -> int:
    """Return the bytes that the process has resident, after a collection."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def build_delivery(task_id: str) -> Delivery:
    """Return the signed notification of a task's result."""
    analysis = {"data": {"caption": "a cat on a mat"}, "model_version": 4}
    content = {"task_id": task_id, "http_status": 200, "data": {"analysis": analysis}}
    body = json.dumps({"notification_type": "analyze", **content}).encode()
    now = str(int(time.time()))
    headers = {"X-Cld-Timestamp": now, "X-Cld-Signature": compute_signature(body, now, SECRET)}
    return Delivery(body, headers)


class Lag:
    """Samples how late the loop runs what is due."""

    def __init__(self) -> None:
        self.samples: list[float] = []
        self._task = asyncio.create_task(self._sample())

    async def _sample(self) -> None:
        while True:
            due = time.perf_counter() + TICK
            await asyncio.sleep(TICK)
            self.samples.append(1000 * max(0.0, time.perf_counter() - due))

    def stop(self) -> dict[str, float]:
        """Return the lag in milliseconds."""
        self._task.cancel()
        hundredths = statistics.quantiles(self.samples, n=100)
        return {
            "p50": round(hundredths[49], 2),
            "p99": round(hundredths[98], 2),
            "most": round(max(self.samples), 2),
        }


async def measure(url: str, *, count: int, seconds: float) -> dict[str, Any]:
    """Submit `count` tasks, watch them for a while, and let them all be answered."""
    queue: asyncio.Queue[Delivery] = asyncio.Queue()
    settings = Settings(host=url, answered_count=10_000)
    async with AnalyzeSession(
        Credentials("benchmark", "key", SECRET), settings=settings, notifications=queue
    ) as session:
        warm = [session.submit(Captioning(f"https://example.com/w/{i}")) for i in range(BATCH)]
        await asyncio.gather(*(task.accepted() for task in warm))
        empty = read_memory()
        requests = [Captioning(f"https://example.com/folder/{i:08}.jpg") for i in range(count)]
        before = read_memory()
        tasks: list[AnalysisTask[Any]] = []
        begun = time.process_time()
        for index in range(0, count, BATCH):
            batch = [session.submit(request) for request in requests[index : index + BATCH]]
            await asyncio.gather(*(task.accepted() for task in batch))
            tasks += batch
        submitted = time.process_time() - begun
        after = read_memory()

        gc.collect()
        polls = session.stats.polls
        lag = Lag()
        begun = time.process_time()
        await asyncio.sleep(seconds)
        busy = (time.process_time() - begun) / seconds
        waiting = lag.stop()
        rate = (session.stats.polls - polls) / seconds

        deliveries = [build_delivery(task.task_id or "") for task in warm + tasks]
        lag = Lag()
        begun = time.process_time()
        for delivery in deliveries:
            queue.put_nowait(delivery)
        while session.stats.pending:
            await asyncio.sleep(0.01)
        resolved = time.process_time() - begun
        resolving = lag.stop()
        assert all(task.done() for task in tasks)
        return {
            "pending": count,
            "bytes_each": round((after - before) / count),
            "bytes_of_a_request": round((before - empty) / count),
            "submit_us_cpu": round(1e6 * submitted / count, 1),
            "polls_per_second": round(rate, 1),
            "polls_per_resolved_task": round(session.stats.polls / count, 4),
            "cpu_share_while_pending": round(busy, 4),
            "lag_ms_while_pending": waiting,
            "lag_ms_while_resolving": resolving,
            "resolve_us_cpu": round(1e6 * resolved / count, 1),
            "kept": {
                "bytes_each": (after - before) / count <= TARGETS["bytes_each"],
                "lag_p99": waiting["p99"] <= TARGETS["lag_p99_ms"],
            },
        }


def main() -> None:
    """Print the measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(_serve())
        return
    with _run_server() as url:
        result = asyncio.run(measure(url, count=options.count, seconds=options.seconds))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
