"""The service of the soak: an emulator with mixed faults, in a separate process."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Iterator
from typing import Final

from benchmarks.processes import run_module
from cloudinary_analyze.emulator import Emulator, FaultPlan, WebhookPolicy

FAULTS: Final = FaultPlan(
    error_500=0.005,
    error_502_html=0.005,
    error_503=0.005,
    rate_limited_429=0.01,
    reset_connection=0.005,
    drop_response=0.005,
    truncated_json=0.002,
    slow=0.005,
    early=0.02,
    duplicated=0.02,
    delayed=0.02,
    lost=0.01,
    forged=0.02,
    stale=0.02,
    malformed=0.02,
    foreign=0.02,
    unrelated=0.02,
    unknown_status=0.02,
    failed=0.01,
)
KEPT_TASKS: Final = 20_000


async def _serve() -> None:
    over = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), over.set)
    webhooks = WebhookPolicy(retry_scale=0.005)
    async with Emulator(
        faults=FAULTS, webhooks=webhooks, task_seconds=0.2, count_sources=False
    ) as emulator:
        print(emulator.cloudinary_url, flush=True)
        while not over.is_set():
            await asyncio.sleep(1)
            for task_id in list(emulator.tasks)[:-KEPT_TASKS]:
                del emulator.tasks[task_id]


@contextlib.contextmanager
def run_faulty_service() -> Iterator[str]:
    """Run the service; give its ``CLOUDINARY_URL``."""
    with run_module("benchmarks.soaking") as printed:
        yield printed.address


if __name__ == "__main__":
    asyncio.run(_serve())
