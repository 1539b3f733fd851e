"""``python -m benchmarks machines``: items per second with a shared ledger, in processes and engines.

6,000 items, a service that takes 50 ms, 64 permits in all. The base is one plain session without a
ledger. The others record in a separate Redis that fsyncs every write. Workers are warm. The
contenders take turns.

A killed worker may repeat as many charges as it has permits. So a slot sends its next request only
after Redis stored the last response and the next claim, and each request waits for an fsync at
least. On average it also waits for half of the fsync in progress. The table shows the time of an
fsync of the same disk, and the ratios that are possible with it if the rest took no time.
The service's latency is exact, so requests that leave together come back together, and each waits
for the CPU time of the others. On a fast disk this costs more than the fsyncs.
``--appendfsync no`` measures without the disk.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from typing import Any, Final

from benchmarks.clients import build_session
from benchmarks.payloads import API_KEY, API_SECRET, CLOUD
from benchmarks.processes import run_redis
from benchmarks.server import run_server
from cloudinary_analyze import Captioning, Credentials, Settings
from cloudinary_analyze.ledger.redis import RedisLedger
from cloudinary_analyze.stage import AnalyzeStage, close_sessions

ITEMS: Final = 6000
PERMITS: Final = 64
WORKERS: Final = 2
FSYNCS: Final = 100  # per round
TARGETS: Final = {"stage": 0.93, "ProcessPool": 0.75, "Dask bag": 0.75}


def build_urls(count: int = ITEMS) -> list[str]:
    return [f"https://example.com/{uuid.uuid4()}/{number}.jpg" for number in range(count)]


def build_stage(url: str, redis_url: str, permits: int) -> AnalyzeStage[str, Any]:
    return AnalyzeStage(
        Captioning,
        credentials=Credentials(CLOUD, API_KEY, API_SECRET, host=url),
        settings=Settings(permits=permits),
        ledger=RedisLedger(redis_url),
        pickle_credentials=True,
    )


def count_answered(stage: AnalyzeStage[str, Any], urls: list[str]) -> int:
    return sum(outcome.error is None for outcome in stage(urls))


def measure(perform: Callable[[], int]) -> float:
    begun = time.perf_counter()
    answered = perform()
    seconds = time.perf_counter() - begun
    assert answered == ITEMS, f"{answered} of {ITEMS} items were answered"
    return ITEMS / seconds


def measure_fsyncs() -> list[float]:
    """Return the seconds of fsyncs after small writes, on the disk that Redis writes to."""
    found: list[float] = []
    with tempfile.TemporaryFile(buffering=0) as file:
        for _ in range(FSYNCS):
            file.write(bytes(500))
            begun = time.perf_counter()
            os.fsync(file.fileno())
            found.append(time.perf_counter() - begun)
    return found


def run_plain(url: str) -> float:
    async def run() -> float:
        async with build_session(url, permits=PERMITS) as session:
            await session.analyze_all([Captioning(each) for each in build_urls(200)])
            urls, begun = build_urls(), time.perf_counter()
            async with session.map(urls, Captioning) as stream:
                answered = [outcome.error is None async for outcome in stream]
            assert all(answered)
            return ITEMS / (time.perf_counter() - begun)

    return asyncio.run(run())


def run_stage(url: str, redis_url: str) -> float:
    stage = build_stage(url, redis_url, PERMITS)
    try:
        count_answered(stage, build_urls(200))
        return measure(lambda: count_answered(stage, build_urls()))
    finally:
        close_sessions()


def run_pool(url: str, redis_url: str) -> float:
    stage = build_stage(url, redis_url, PERMITS // WORKERS)
    context = multiprocessing.get_context("spawn")

    def run(urls: list[str], parts: int) -> int:
        jobs = [pool.submit(count_answered, stage, urls[n::parts]) for n in range(parts)]
        return sum(job.result() for job in jobs)

    with ProcessPoolExecutor(WORKERS, mp_context=context) as pool:
        run(build_urls(400), 2 * WORKERS)
        return measure(lambda: run(build_urls(), 2 * WORKERS))


def run_bag(url: str, redis_url: str) -> float:
    import importlib

    bag: Any = importlib.import_module("dask.bag")
    distributed: Any = importlib.import_module("distributed")
    stage = build_stage(url, redis_url, PERMITS // WORKERS)

    def run(urls: list[str]) -> int:
        parts = bag.from_sequence(urls, npartitions=2 * WORKERS).map_partitions(stage)
        answered: int = parts.filter(lambda outcome: outcome.error is None).count().compute()
        return answered

    with distributed.Client(n_workers=WORKERS, threads_per_worker=1, dashboard_address=None):
        run(build_urls(400))
        return measure(lambda: run(build_urls()))


def main(arguments: list[str]) -> int:
    """Print the table; return 1 if a target is missed and ``--check`` was given."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks machines", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--appendfsync", default="always", choices=["always", "everysec", "no"])
    parser.add_argument("--check", action="store_true", help="exit 1 if a target is missed")
    options = parser.parse_args(arguments)
    if shutil.which("redis-server") is None:
        print("redis-server is not installed.")
        return 1
    with run_server(delay=0.05) as place, run_redis(options.appendfsync) as redis_url:
        contenders: dict[str, Callable[[], float]] = {
            "plain session": lambda: run_plain(place.url),
            "stage": lambda: run_stage(place.url, redis_url),
            "ProcessPool": lambda: run_pool(place.url, redis_url),
        }
        if find_spec("distributed") is not None:
            contenders["Dask bag"] = lambda: run_bag(place.url, redis_url)
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        fsyncs: list[float] = []
        for _ in range(options.rounds):
            fsyncs += measure_fsyncs()
            for name, run in contenders.items():
                rates[name].append(run())
    missed = 0
    for name, found in rates.items():
        pairs = zip(found, rates["plain session"], strict=True)
        ratio = statistics.median(rate / base for rate, base in pairs)
        target = TARGETS.get(name)
        wanted = "" if target is None else f"  (target {target})"
        missed += target is not None and ratio < target
        print(f"{name:<16}{statistics.median(found):>8.0f} items/s{ratio:>7.2f}{wanted}")
    if options.appendfsync == "always":
        fsync = statistics.mean(fsyncs)
        cycle = PERMITS / statistics.median(rates["plain session"])
        most, usual = (cycle / (cycle + count * fsync) for count in (1, 1.5))
        print(
            f"\nAn fsync takes {1000 * fsync:.2f} ms, and a plain request {1000 * cycle:.1f} ms of a "
            f"permit. With 1 fsync in each, stage reaches {most:.2f} at most; with 1.5, {usual:.2f}."
        )
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
