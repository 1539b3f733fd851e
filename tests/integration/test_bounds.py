"""The documented bounds: nesting, bodies, headers and decompression, for all that comes from outside."""

from __future__ import annotations

import asyncio
import csv
import gzip
import json
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fuzz.fuzz_targets import Sink, exchange, in_thread, read_statuses
from notification_support import run_redis, serve_asgi
from scripted import KEY, SECRET, ScriptedServer, answer, wire

from cloudinary_analyze import (
    Captioning,
    Coco,
    ConfigurationError,
    Credentials,
    OtherModel,
    ResponseDecodeError,
    TransportError,
)
from cloudinary_analyze.cli.feed import InputOptions, open_source
from cloudinary_analyze.cli.notifications import serve
from cloudinary_analyze.ledger import worker as redis_worker
from cloudinary_analyze.ledger.redis import RedisLedger
from cloudinary_analyze.ledger.sqlite import SQLiteLedger
from cloudinary_analyze.notifications import asgi
from cloudinary_analyze.notifications.aiohttp import WebhookReceiver
from cloudinary_analyze.results.export import write_records
from cloudinary_analyze.results.files import read_records
from cloudinary_analyze.results.records import build_ledger_record, build_record, dump_record
from cloudinary_analyze.webhooks import compute_signature

URL = "https://example.com/a.jpg"


def nest(depth: int) -> bytes:
    inner = b"[" * depth + b"]" * depth
    return b'{"data":{"analysis":{"data":{"caption":"A cat"},"tags":%b}}}' % inner


@asynccontextmanager
async def open_ledger(kind: str, folder: Path) -> Any:
    if kind == "sqlite":
        yield lambda: SQLiteLedger(folder / "run.ledger")
        return
    with run_redis(folder) as server:
        yield lambda: RedisLedger(server.url)


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
@pytest.mark.parametrize("depth", [300, 985, 1015])
async def test_deep_responses_are_stored_and_read_back(
    kind: str, depth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_worker, "QUIET", 0.1)
    requests = [Captioning(URL), Coco(URL), OtherModel("new", URL)]
    async with (
        open_ledger(kind, tmp_path) as build,
        ScriptedServer(answer(body=nest(depth))) as server,
    ):
        for restored in (False, True):
            async with (
                build() as ledger,
                server.session() as session,
                session.map(requests, ledger=ledger, ordered=True) as stream,
            ):
                outcomes = [outcome async for outcome in stream]
            assert [outcome.restored for outcome in outcomes] == [restored] * 3
            for outcome in outcomes:
                assert count(outcome.response.raw["data"]["analysis"]["tags"]) == depth
        assert len(server.seen) == 3
        read = ledger.iter_items if kind == "sqlite" else ledger.iter_records
        records = [build_ledger_record(item) for item in await asyncio.to_thread(list, read())]
    records += map(build_record, outcomes)
    await asyncio.to_thread(check_outputs, records, depth, tmp_path)


def check_outputs(records: list[Any], depth: int, tmp_path: Path) -> None:
    assert len(records) == 6
    lines = [dump_record(record) for record in records]
    for record in read_records(lines):
        assert count(record["analysis"]["tags"]) == depth
    for format_name in ("jsonl", "csv", "parquet"):
        with (tmp_path / "out").open("wb") as stream:
            assert write_records(records, stream, format_name) == 6
    with (tmp_path / "out.csv").open("w+b") as stream:
        write_records(records, stream, "csv")
    csv.field_size_limit(10**9)
    for row in csv.DictReader((tmp_path / "out.csv").read_text().splitlines()):
        assert row["analysis"].count("[") == depth


def count(value: Any) -> int:
    levels = 1
    while value:
        (value,) = value
        levels += 1
    return levels


@pytest.mark.parametrize("depth", [1030, 100_000])
async def test_deeper_json_may_have_been_charged(depth: int) -> None:
    async with ScriptedServer(answer(body=nest(depth))) as server, server.session() as session:
        with pytest.raises(ResponseDecodeError, match="may have been accepted, and charged"):
            await session.analyze(Captioning(URL))
        assert len(server.seen) == 1


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.99])
async def test_a_truncated_200_may_have_been_charged(cut: float) -> None:
    body = nest(3)
    start = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
    short = body[: int(cut * len(body))]
    for handler in (wire(start + short), answer(body=short)):
        async with ScriptedServer(handler) as server, server.session(attempts=1) as session:
            with pytest.raises((ResponseDecodeError, TransportError)) as caught:
                await session.analyze(Captioning(URL))
            assert caught.value.ambiguous
            assert "may have been accepted, and charged" in str(caught.value)


@pytest.mark.parametrize(
    "reset_time",
    ["9999-12-31T23:59:59.999999-14:00", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59Z"],
)
async def test_dates_at_the_ends_of_the_calendar_are_read(reset_time: str) -> None:
    limit = {"type": "object_detection", "remaining": 0, "limit": 1, "reset_time": reset_time}
    content = json.loads(nest(1)) | {"limits": {"items": [limit]}}
    async with ScriptedServer(answer(content=content)) as server, server.session() as session:
        response = await session.analyze(Captioning(URL))
        assert len(response.limits) == 1
        dump_record(build_record((await session.analyze_all([Captioning(URL)]))[0]))


async def test_too_many_headers_of_a_response_are_an_error() -> None:
    head = b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: a\r\n" % n for n in range(100_000))
    data = head + b"Content-Length: 2\r\n\r\n{}"
    async with ScriptedServer(wire(data)) as server, server.session(attempts=1) as session:
        async with asyncio.timeout(30):
            with pytest.raises((TransportError, ResponseDecodeError)) as caught:
                await session.analyze(Captioning(URL))
        assert caught.value.ambiguous


def run_asgi() -> Any:
    return serve_asgi(asgi.WebhookReceiver(Sink(), Credentials("demo", KEY, SECRET)))


def run_listener() -> Any:
    handle = WebhookReceiver(Sink(), Credentials("demo", KEY, SECRET)).handle
    return serve(handle, "127.0.0.1", 0)


def post(*headers: bytes, body: bytes) -> bytes:
    timestamp = str(int(time.time()))
    signature = compute_signature(body, timestamp, SECRET)
    lines = [
        b"POST / HTTP/1.1",
        b"Host: a",
        b"Connection: close",
        b"X-Cld-Timestamp: " + timestamp.encode(),
        b"X-Cld-Signature: " + signature.encode(),
        b"Content-Length: %d" % len(body),
        *headers,
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


GOOD = b'{"task_id":"t","data":{}}'


@pytest.mark.parametrize("run", [run_asgi, run_listener])
def test_a_receiver_bounds_headers_and_decompression(run: Any) -> None:
    many = [b"X-%d: a" % number for number in range(20_000)]
    bomb = gzip.compress(b"a" * 2**26, 9)
    with in_thread(run()) as (origin, check):
        port = int(origin.rpartition(":")[2])
        for request in (
            post(*many, body=b"{}"),
            post(b"X-Long: " + b"a" * 2**20, body=b"{}"),
            post(b"Content-Encoding: gzip", body=bomb),
        ):
            statuses = read_statuses(exchange(port, request, wait=5))
            assert statuses in ([], [400], [401], [413], [417], [431]), statuses
            packed = post(b"Content-Encoding: gzip", body=gzip.compress(GOOD))
            assert read_statuses(exchange(port, packed, wait=5)) == [400]  # signed, but not JSON
            odd = post(b"Expect: \xdc\xac", body=b"{}")
            assert read_statuses(exchange(port, odd, wait=5)) in ([200], [417])
            good = post(body=GOOD)
            assert read_statuses(exchange(port, good, wait=5)) == [200]
        check()


def read_errors(path: Path) -> str:
    try:
        return "".join(
            str(line.error) for line in open_source(InputOptions(names=(str(path),))).read()
        )
    except ConfigurationError as error:
        return str(error)


def test_a_bomb_as_input_takes_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tracemalloc

    for module in ("table", "text"):
        monkeypatch.setattr(f"cloudinary_analyze.cli.{module}.LONGEST_LINE", 2**18)
    for name in ("in.txt.gz", "in.csv.gz", "in.jsonl.gz"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(b"url\n" + b'"' + b"a" * 2**24 + b"\n", 1))
        tracemalloc.start()
        said = read_errors(path)
        assert "longer than 0 MiB" in said
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**22
