"""The contenders of the throttling scenarios: each works through endless items with 64 at once.

A process runs one: it prints ``ready``, begins at the first line on stdin, and prints what it counted
as JSON at the end. Functions import the libraries, so a missing one only skips its contender.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, Final

from benchmarks.model import OURS
from benchmarks.payloads import API_KEY, API_SECRET, build_image_url
from benchmarks.services import PERMITS

Counts = dict[str, Any]
BOTOCORE: Final = "botocore, adaptive"
OPENAI: Final = "openai"
ATTEMPTS: Final = 6  # for each item, as in our settings


def _wait_to_begin() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


def _build_counts(done: int, failures: Counter[str], **more: Any) -> Counts:
    return {
        "done": done,
        "failed": failures.total(),
        "failures": dict(failures),
        "cpu_seconds": time.process_time(),
        **more,
    }


async def _map(url: str, seconds: float, number: int) -> Counts:
    """Run ``session.map``."""
    from cloudinary_analyze import (
        AnalyzeSession,
        BulkStoppedError,
        Captioning,
        Credentials,
        Settings,
    )

    done, failures, stopped = 0, Counter[str](), ""
    credentials = Credentials(f"emulator-{number}", API_KEY, API_SECRET)
    settings = Settings(host=url, permits=PERMITS)
    async with AnalyzeSession(credentials, settings=settings) as session:
        _wait_to_begin()
        items: Iterator[str] = map(build_image_url, count())
        try:
            async with asyncio.timeout(seconds), session.map(items, Captioning) as outcomes:
                async for outcome in outcomes:
                    if outcome.error is None:
                        done += 1
                    else:
                        failures[type(outcome.error).__name__] += 1
        except TimeoutError:
            pass
        except BulkStoppedError as error:
            stopped = str(error)
        stats = session.stats
    return _build_counts(
        done,
        failures,
        stopped=stopped,
        attempts=stats.attempts,
        ambiguous_retries=stats.ambiguous_retries,
        pauses=stats.pauses,
        probes=stats.probes,
    )


def _run_ours(url: str, seconds: float, number: int) -> Counts:
    return asyncio.run(_map(url, seconds, number))


async def _run_openai_tasks(url: str, seconds: float) -> Counts:
    """Run 64 tasks on openai's client."""
    from openai import APIError, AsyncOpenAI

    done, failures = 0, Counter[str]()
    async with AsyncOpenAI(base_url=url, api_key=API_KEY, max_retries=ATTEMPTS - 1) as client:
        _wait_to_begin()

        async def work() -> None:
            nonlocal done
            while True:
                try:
                    await client.post("/analyze", cast_to=object, body={"uri": build_image_url(1)})
                    done += 1
                except APIError as error:
                    failures[type(error).__name__] += 1

        tasks = [asyncio.create_task(work()) for _ in range(PERMITS)]
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result
    return _build_counts(done, failures)


def _run_openai(url: str, seconds: float, _: int) -> Counts:
    return asyncio.run(_run_openai_tasks(url, seconds))


def _run_botocore(url: str, seconds: float, _: int) -> Counts:
    """Run 64 threads on a botocore client of an arbitrary AWS service."""
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.session import get_session

    client = get_session().create_client(
        "logs",
        region_name="us-east-1",
        endpoint_url=url,
        aws_access_key_id=API_KEY,
        aws_secret_access_key=API_SECRET,
        config=Config(
            max_pool_connections=PERMITS,
            retries={"mode": "adaptive", "total_max_attempts": ATTEMPTS},
        ),
    )
    done, failures, lock = 0, Counter[str](), threading.Lock()

    def work(until: float) -> None:
        nonlocal done
        while time.monotonic() < until:
            try:
                client.describe_log_groups()
            except (ClientError, BotoCoreError) as error:
                with lock:
                    failures[type(error).__name__] += 1
            else:
                with lock:
                    done += 1

    _wait_to_begin()
    # A thread may sleep for minutes in a retry; it ends with the process.
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=work, args=[until], daemon=True) for _ in range(PERMITS)]
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    return _build_counts(done, failures)


CONTENDERS: Final[dict[str, Callable[[str, float, int], Counts]]] = {
    OURS: _run_ours,
    BOTOCORE: _run_botocore,
    OPENAI: _run_openai,
}
PACKAGES: Final = {BOTOCORE: "botocore", OPENAI: "openai"}


def main() -> None:
    """Run the contender that the arguments name."""
    logging.disable()
    contender, url, seconds, number = sys.argv[1:]
    counts = CONTENDERS[contender](url, float(seconds), int(number))
    print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    main()
