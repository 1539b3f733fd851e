"""Twenty thousand items under all faults: none is lost, charged twice unreported, or left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import ssl
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import attrs
import pytest
from aiohttp import abc
from notification_support import RedisServer, run_redis
from scripted import serve_aiohttp

sys.path.insert(0, str(Path(__file__).parent))

from faulty_proxy import AFTER, BEFORE, CERTIFICATE, HARMLESS, OF_CONNECTIONS
from sweep_support import find_descriptors

from cloudinary_analyze import (
    AnalyzeSession,
    BulkStoppedError,
    Captioning,
    Credentials,
    QuotaExceededError,
    ServerError,
    SessionStats,
    Settings,
    TaskFailedError,
)
from cloudinary_analyze.events import AttemptFinished, CallFinished, CallStarted
from cloudinary_analyze.ledger import SQLiteLedger
from cloudinary_analyze.ledger.redis import RedisLedger
from cloudinary_analyze.notifications.aiohttp import WebhookReceiver
from cloudinary_analyze.notifications.redis import RedisNotifications

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ITEMS = 20_000
WARM_UP = 1_000  # everything is imported and cached once before anything is measured
SEED = 7
OUTAGE = 0.7  # seconds without Redis
BLOCKED = 1.0  # seconds
LONGEST_WAIT = 4.0  # seconds that the service may ask for

PROXY_FAULTS = {
    **dict.fromkeys(BEFORE, 0.005),
    **dict.fromkeys(AFTER, 0.004),
    **dict.fromkeys(HARMLESS, 0.01),
    **dict.fromkeys(OF_CONNECTIONS, 0.04),
}
LOOKUPS_FAIL = 0.05
SERVICE_FAULTS = {
    **dict.fromkeys(("error_500", "error_502_html", "error_503", "reset_connection"), 0.004),
    **dict.fromkeys(("drop_response", "slow"), 0.004),
    "rate_limited_429": 0.01,
    "truncated_json": 0.002,
    "slow_seconds": 0.2,
}
TASK_FAULTS = {
    **dict.fromkeys(("early", "duplicated", "forged", "stale", "malformed", "foreign"), 0.02),
    **dict.fromkeys(("delayed", "lost", "unrelated", "unknown_status"), 0.02),
    "failed": 0.003,
    "delay_seconds": 0.5,
}
UNCHARGED = ("error_500", "error_502_html", "reset_connection")  # and ambiguous for the client
REDIS_FORMS = ("redis_killed", "loop_blocked", "dns_failure")


RETRY_AFTER = (  # every form, valid or not; the last one exceeds the longest wait
    *("0", "1", "0.25", "1e-2", "-5", "-0.0", "soon", "", "nan", "inf", "1_0", "1, 2", "9" * 400),
    *("@soon@", "Sun, 06 Nov 1994 08:49:37 GMT", "Fri, 99 Foo 2026 99:99:99 GMT", "86400"),
)


def build_scripted(count: int) -> dict[int, tuple[str, int, str, str | None]]:
    """Return the first responses of some items: every form of Retry-After, and exhausted quotas."""
    error = {"message": "no", "code": "MA_00000"}
    scripted: dict[int, tuple[str, int, str, str | None]] = {}
    for number, form in enumerate(RETRY_AFTER, 1):
        name = f"retry_after {form[:32]!r}"
        where = number * count // (len(RETRY_AFTER) + 1)
        scripted[where] = (name, 503, json.dumps({"error": error}), form)
    limit = {"type": "object_detection", "remaining": 0, "limit": 9, "reset_time": "@soon@"}
    content = {"error": error | {"code": "MA_00008"}, "limits": {"addons_quota": [limit]}}
    for share in (3, 7):
        scripted[share * count // 10 + 3] = ("quota_429", 429, json.dumps(content), None)
    return scripted


class FailingResolver(abc.AbstractResolver):
    """Resolves every name to this machine, except when the lookup fails."""

    def __init__(self) -> None:
        self.chance = random.Random(SEED)
        self.failed = 0

    async def resolve(self, host: str, port: int = 0, family: Any = 0) -> list[Any]:
        if self.chance.random() < LOOKUPS_FAIL:
            self.failed += 1
            raise OSError(None, "Temporary failure in name resolution")
        return [
            {"hostname": host, "host": "127.0.0.1", "port": port}
            | {"family": 2, "proto": 0, "flags": 0}
        ]

    async def close(self) -> None:
        pass


@attrs.define
class Service:
    """The process that runs the emulator and its proxy."""

    process: asyncio.subprocess.Process
    cloudinary_url: str
    port: int

    async def count(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"\n")
        counts: dict[str, Any] = json.loads(await self.process.stdout.readline())
        return counts


@contextlib.asynccontextmanager
async def serve(count: int, mode: str) -> Any:
    job = {
        "seed": SEED,
        "faults": PROXY_FAULTS,
        "scripted": build_scripted(count),
        "service_faults": SERVICE_FAULTS | (TASK_FAULTS if mode == "task" else {}),
        "webhooks": {"retry_scale": 0.002},  # again after 0.4, 0.7 and 1.1 s
        "options": {"task_seconds": 0.05},
    }
    program = Path(__file__).parent / "faulty_proxy.py"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        program,
        json.dumps(job),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=2**20,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield Service(process, *json.loads(await process.stdout.readline()))
    finally:
        process.stdin.close()
        await asyncio.wait_for(process.wait(), 20)


@attrs.define(eq=False)
class Record:
    """The client's events and statistics over all of its sessions."""

    stats: Counter[str] = attrs.field(factory=Counter)
    verdicts: Counter[str] = attrs.field(factory=Counter)
    successes: int = 0
    repeats: int = 0  # calls that repeated a task whose result was lost
    repeating: set[int] = attrs.field(factory=set)
    given_up: int = 0
    ambiguous: int = 0  # attempts
    reported: int = 0  # items that may have been charged twice, by statistics and outcomes
    failures: Counter[str] = attrs.field(factory=Counter)
    stops: Counter[str] = attrs.field(factory=Counter)
    injected: Counter[str] = attrs.field(factory=Counter)

    def see(self, event: object) -> None:
        if type(event) is AttemptFinished:
            self.ambiguous += event.ambiguous
        elif type(event) is CallFinished:
            self.successes += event.error is None
            if event.call in self.repeating:
                self.repeating.discard(event.call)
                # without quota, the next run submits the item again instead of repeating its task
                self.repeats += event.error is None
                self.given_up += isinstance(event.error, QuotaExceededError)
        elif type(event) is CallStarted and event.repeats is not None:
            self.repeating.add(event.call)

    def add(self, stats: SessionStats) -> None:
        for name in ("calls", "attempts", "retries", "ambiguous_retries", "pauses", "polls"):
            self.stats[name] += getattr(stats, name)
        self.reported += stats.ambiguous_retries
        self.verdicts.update(stats.notifications)


def build_settings() -> Settings:
    return Settings(
        attempts=10,
        connect_timeout=5,
        read_timeout=3,
        backoff_first=0.01,
        backoff_max=0.1,
        max_server_wait=LONGEST_WAIT,
        poll_first=1.0,
        poll_longest=2.0,
        polls_per_second=500,
        poll_permits=16,
        result_grace=2.5,
        failure_grace=1.0,
        on_missing_result="analyze",
        task_timeout=60.0,
    )


@attrs.define(eq=False)
class Run:
    """One run over all items, with as many sessions and streams as the faults require."""

    count: int
    mode: str
    service: Service
    redis: RedisServer
    folder: Path
    resolver: FailingResolver = attrs.field(factory=FailingResolver)
    record: Record = attrs.field(factory=Record)
    handed_over: bytearray = attrs.field(init=False)
    left: list[int] = attrs.field(init=False)
    final: set[int] = attrs.field(factory=set)  # items that failed permanently
    outcomes: int = 0
    troubles: list[tuple[int, str]] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.handed_over = bytearray(self.count)
        self.left = list(range(self.count))
        # actions that run once so many items have an outcome
        self.troubles = [
            (share * self.count // 100, what)
            for share, what in ((15, "block"), (30, "kill"), (55, "block"), (75, "kill"))
        ]

    @property
    def credentials(self) -> Credentials:
        return Credentials.from_url(self.service.cloudinary_url)

    @contextlib.asynccontextmanager
    async def open_http(self) -> Any:
        connector = aiohttp.TCPConnector(
            limit=0,
            resolver=self.resolver,
            use_dns_cache=False,
            ssl=ssl.create_default_context(cafile=str(CERTIFICATE)),
        )
        async with aiohttp.ClientSession(connector=connector) as http:
            yield http

    @contextlib.asynccontextmanager
    async def receive(self) -> Any:
        """Receive webhooks through Redis; yield the options of sessions."""
        if self.mode == "call":
            yield {}
            return
        async with RedisNotifications(self.redis.url) as notifications:
            receiver = WebhookReceiver(notifications, self.credentials)
            async with serve_aiohttp(receiver.handle) as url:
                yield {"notifications": notifications, "notification_url": f"{url}/hook"}

    def open_ledger(self) -> Any:
        if self.mode == "call":
            return RedisLedger(self.redis.url, lease=5.0, patience=30.0)
        return SQLiteLedger(self.folder / "ledger")

    async def perform(self) -> None:
        """Analyze all items, over sessions and streams, until none is left."""
        with ThreadPoolExecutor(1) as helper:
            async with self.open_ledger() as ledger:
                while self.left:
                    await self.perform_session(ledger, helper)
                await self.restore(ledger)

    async def perform_session(self, ledger: Any, helper: ThreadPoolExecutor) -> None:
        """Use one session until no item is left, or the service asks for too long a wait."""
        async with self.receive() as options, self.open_http() as http:
            async with AnalyzeSession(
                self.credentials,
                settings=attrs.evolve(
                    build_settings(), host=f"https://localhost:{self.service.port}"
                ),
                http=http,
                on_event=self.record.see,
                **options,
            ) as session:
                usable = True
                while self.left and usable:
                    usable = await self.perform_stream(session, ledger, helper)
                await asyncio.sleep(0)
                self.record.add(session.stats)
                check_idle(session.stats)

    async def perform_stream(
        self, session: AnalyzeSession, ledger: Any, helper: ThreadPoolExecutor
    ) -> bool:
        """Run one stream over the remaining items; return whether the session can continue."""
        items = self.left
        self.left = []
        pulled = 0

        def pull() -> Any:
            nonlocal pulled
            for number in items:
                pulled += 1
                yield number

        stream = session.map(
            pull(),
            build_request,
            mode=self.mode,
            ledger=ledger,
            window=1_000 if self.mode == "task" else None,
        )
        try:
            async with stream:
                async for outcome in stream:
                    await self.take(outcome, helper)
        except BulkStoppedError as stop:
            reason = stop.reason
            self.record.stops[type(reason).__name__] += 1
            self.left = sorted({*self.left, *items[pulled:]})
            if isinstance(reason, QuotaExceededError):
                assert reason.reset_time is not None
                await asyncio.sleep(max(0, reason.reset_time - time.time()) + 0.01)
                return True
            assert isinstance(reason, ServerError), reason
            assert reason.retry_after is not None
            return False
        self.left = sorted(self.left)
        return True

    async def take(self, outcome: Any, helper: ThreadPoolExecutor) -> None:
        self.outcomes += 1
        if outcome.error is None:
            number = outcome.item
            assert outcome.response.entity == build_url(number)
            self.handed_over[number] += 1
        elif outcome.restored:  # failed without a reason, since the notification was lost
            assert isinstance(outcome.error, TaskFailedError)
            assert not outcome.error.cause_known
            self.handed_over[outcome.item] += 1
            self.final.add(outcome.item)
        else:
            self.record.failures[type(outcome.error).__name__] += 1
            # a shared ledger counts the repetition of such an item as an ambiguous retry
            self.record.reported += self.mode == "task" and outcome.error.ambiguous
            self.left.append(outcome.item)
        while self.troubles and self.outcomes >= self.troubles[0][0]:
            _, what = self.troubles.pop(0)
            if what == "block":
                self.record.injected["loop_blocked"] += 1
                time.sleep(BLOCKED)
            else:
                self.record.injected["redis_killed"] += 1
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(helper, self.redis.kill)
                await asyncio.sleep(OUTAGE)
                await loop.run_in_executor(helper, self.redis.start)

    async def restore(self, ledger: Any) -> None:
        """Run all items again. All of them are in the ledger, so nothing is sent."""
        async with AnalyzeSession(
            self.credentials,
            settings=attrs.evolve(build_settings(), host=f"https://localhost:{self.service.port}"),
        ) as session:
            restored = 0
            async with session.map(range(self.count), build_request, ledger=ledger) as stream:
                async for outcome in stream:
                    assert outcome.restored, outcome
                    restored += 1
                    if outcome.item not in self.final:
                        assert outcome.unwrap().entity == build_url(outcome.item)
            assert restored == self.count
            assert session.stats.attempts == 0


def build_url(number: int) -> str:
    return f"https://pictures.example.com/{number}.jpg"


def build_request(number: int) -> Captioning:
    return Captioning(build_url(number))


def check_idle(stats: SessionStats) -> None:
    busy = (stats.in_flight, stats.permits_in_use, stats.waiting, stats.pending)
    assert busy == (0, 0, 0, 0), stats


async def perform(count: int, mode: str, folder: Path) -> tuple[Run, dict[str, Any]]:
    folder.mkdir()
    with run_redis(folder) as redis:
        async with serve(count, mode) as service:
            run = Run(count, mode, service, redis, folder)
            await run.perform()
            counts = await service.count()
    return run, counts


def check_charges(run: Run, counts: dict[str, Any]) -> None:
    """Compare the charges with the client's statistics exactly."""
    record, proxy, service = run.record, Counter(counts["proxy"]), Counter(counts["service"])
    lost = sum(proxy[name] for name in (*AFTER, "abandoned"))
    lost += service["drop_response"] + service["truncated_json"]
    uncharged = sum(proxy[name] for name in (*BEFORE, "raced"))
    uncharged += sum(service[name] for name in UNCHARGED)
    assert counts["done"] == record.successes + lost
    # asyncio's TLS drops data written in the turn of the loop after the peer's close
    assert 0 <= record.ambiguous - lost - uncharged <= proxy["idle_close"] - proxy["raced"]
    # if a stop precedes the retry of an attempt, the next run counts the attempt again
    assert 0 <= record.reported - record.ambiguous <= sum(record.failures.values())
    # the next run submits a failed task again, as its error announced
    again = record.repeats + record.given_up + record.failures["TaskFailedError"] - len(run.final)
    assert record.successes == run.count + again
    assert counts["done"] <= run.count + again + record.reported


def take_stock() -> dict[str, Any]:
    """Return the tasks, threads, descriptors and memory of this process."""
    for _ in range(3):
        gc.collect()
    kinds = Counter(
        f"{type(thing).__module__}.{type(thing).__qualname__}" for thing in gc.get_objects()
    )
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        "kinds": kinds,
        "descriptors": find_descriptors(),
        "threads": set(threading.enumerate()),
        "tasks": asyncio.all_tasks(),
        "blocks": sys.getallocatedblocks(),
        "resident": next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024,
    }


def check_stock(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Check that no task, thread, descriptor or memory is left."""
    assert after["tasks"] == before["tasks"]
    assert after["threads"] <= before["threads"]
    assert len(after["descriptors"]) <= len(before["descriptors"]), after["descriptors"]
    more = after["kinds"] - before["kinds"]
    ours = {name: number for name, number in more.items() if name.startswith("cloudinary_analyze")}
    assert not ours
    assert sum(more.values()) < 2_000, more.most_common(10)
    assert after["blocks"] - before["blocks"] < ITEMS  # not one for each item
    assert after["resident"] - before["resident"] < 64  # MiB, most of it for free blocks


@pytest.mark.parametrize("mode", ["call", "task"])
async def test_all_faults_together_lose_no_item(
    mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("ERROR")  # pytest keeps all that is logged
    await perform(WARM_UP, mode, tmp_path / "first")
    before = take_stock()
    begun = time.monotonic()
    run, counts = await perform(ITEMS, mode, tmp_path / "second")
    seconds = time.monotonic() - begun
    record, resolver = run.record, run.resolver
    record.injected["dns_failure"] = resolver.failed
    report = {
        "seconds": round(seconds, 1),
        "client": dict(record.stats) | {"successes": record.successes, "repeats": record.repeats},
        "stops": dict(record.stops),
        "failed outcomes": dict(record.failures),
        "verdicts": dict(record.verdicts),
        "ambiguous": {"attempts": record.ambiguous, "reported": record.reported},
        "injected": dict(record.injected),
        "charged": counts["done"],
        **counts,
    }
    print(json.dumps(report, indent=1, ensure_ascii=False))
    assert set(run.handed_over) == {1}  # no item is lost or yielded twice
    check_charges(run, counts)
    scripted = {name for name, *_ in build_scripted(ITEMS).values()}
    assert not {*PROXY_FAULTS, *scripted} - counts["proxy"].keys()
    assert not {name for name in SERVICE_FAULTS if "seconds" not in name} - counts["service"].keys()
    assert min(record.injected[name] for name in REDIS_FORMS) >= 2
    if mode == "task":
        assert not {n for n in TASK_FAULTS if "seconds" not in n} - counts["tasks"].keys()
        assert {"genuine", "duplicate", "redelivery", "forged", "stale"} <= counts[
            "webhooks"
        ].keys()
        assert {"resolved", "duplicate"} <= record.verdicts.keys()
        refused = sum(counts["webhooks"][kind] for kind in ("forged", "stale"))
        assert counts["refused webhooks"] > refused  # and those that Redis could not store
    del run, record, resolver
    after = take_stock()
    for what in ("resident", "blocks"):
        print(f"{what}: {before[what]:,.0f} before, {after[what]:,.0f} after")
    check_stock(before, after)
