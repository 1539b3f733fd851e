"""Fuzz targets: one harness each, for hypothesis (`test_fuzz.py`) and atheris (`__main__.py`).

A target takes bytes and raises if a promise is broken:

* only the documented errors leave the code, and each survives pickling and the ledger's encoding;
* no message, log line or response holds a secret or a control character;
* a server answers in time and never with 500, and serves the next request.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import gzip
import io
import json
import logging
import math
import pickle
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
from notification_support import serve_asgi
from scripted import KEY, SECRET, serve_on_thread

from cloudinary_analyze import (
    MODELS,
    AnalyzeError,
    AnalyzeSession,
    Credentials,
    OtherModel,
    Settings,
)
from cloudinary_analyze._wire import codec
from cloudinary_analyze._wire.protocol import (
    build_task_failure,
    find_result,
    read_accepted,
    read_error,
    read_response,
    read_result,
    read_retry_after,
    read_task_status,
    reports_progress,
)
from cloudinary_analyze.cli.feed import InputOptions, open_source
from cloudinary_analyze.cli.notifications import ListenPlan, _show_refusals, serve
from cloudinary_analyze.cli.outlet import escape_controls
from cloudinary_analyze.cli.screen import CommandError, build_console
from cloudinary_analyze.config import URL_FORM
from cloudinary_analyze.emulator import Emulator
from cloudinary_analyze.errors import (
    ConfigurationError,
    LedgerError,
    NotificationError,
    ResponseDecodeError,
)
from cloudinary_analyze.ledger import SQLiteLedger
from cloudinary_analyze.ledger.compression import compress
from cloudinary_analyze.ledger.encoding import dump_error, load_error
from cloudinary_analyze.ledger.file import COMPANIONS
from cloudinary_analyze.ledger.items import LedgerItem
from cloudinary_analyze.ledger.redis import RedisLedger
from cloudinary_analyze.notifications import aiohttp as aiohttp_receiver
from cloudinary_analyze.notifications import asgi as asgi_receiver
from cloudinary_analyze.notifications import decode_delivery, encode_delivery
from cloudinary_analyze.notifications.redis import RedisNotifications
from cloudinary_analyze.requests import AnalyzeRequest
from cloudinary_analyze.responses import Delivery, Response
from cloudinary_analyze.results.export import build_row
from cloudinary_analyze.results.findings import read_findings
from cloudinary_analyze.results.records import build_ledger_record, dump_record
from cloudinary_analyze.results.statistics import Statistics
from cloudinary_analyze.serialization import to_json
from cloudinary_analyze.webhooks import (
    compute_signature,
    parse_notification,
    read_delivery,
    verify_signature,
)

TESTS = Path(__file__).parent.parent
SAMPLES = {path.stem: path.read_bytes() for path in sorted((TESTS / "samples").glob("*.json"))}
CREDENTIALS = Credentials("demo", KEY, SECRET)
NOW = 1_700_000_000.0
PATIENCE = 10.0  # seconds until a server that does not answer counts as hung

Run = Callable[[bytes], None]


@attrs.frozen
class Target:
    """One harness.

    Attributes:
        open: Opens the resources of the target and returns the function that takes one input.
        seeds: Inputs that the fuzzer mutates.
        words: Fragments that a fuzzer would not guess.
    """

    open: Callable[[], AbstractContextManager[Run]]
    seeds: tuple[bytes, ...]
    words: tuple[bytes, ...] = ()


def take(data: bytes, *sizes: int) -> tuple[Any, ...]:
    """Consume one byte per size for a choice below that size. Return the choices and the rest."""
    choices = [(data[place] if place < len(data) else 0) % size for place, size in enumerate(sizes)]
    return (*choices, data[len(sizes) :])


PARAMETERS: dict[str, dict[str, Any]] = {
    "ai_vision_general": {"prompts": ["What?"]},
    "ai_vision_moderation": {"rejection_questions": ["Is it?"]},
    "ai_vision_tagging": {"tag_definitions": {"cat": "A cat."}},
}
SOURCE = "https://a.example/1.jpg"
REQUESTS: list[AnalyzeRequest[Any]] = [
    *(kind(SOURCE, **PARAMETERS.get(name, {})) for name, kind in MODELS.items()),
    OtherModel("new_model", SOURCE),
]


def check_text(text: str) -> None:
    """Check that a message is encodable and contains no secret or control character."""
    assert SECRET not in text
    bad = [char for char in text if not char.isprintable() and char not in "\n\t"]
    assert not bad, f"unprintable {bad[:5]!r} in {text[:300]!r}"
    text.encode()


def check_error(error: AnalyzeError) -> None:
    """Check that an error survives pickling and the ledger's encoding unchanged."""
    check_text(str(error))
    assert SECRET not in repr(error)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (type(error), str(error))
    stored = load_error(dump_error(error))
    assert (type(stored), str(stored)) == (type(error), str(error))
    to_json(error, raw=True)


def check_response(request: AnalyzeRequest[Any], response: Response[Any]) -> None:
    """Check that a response can be shown, stored, exported and read again."""
    repr(response), hash(response), response.limits, response.entity, response.request_id
    text = codec.dumps(dict(response.raw))
    again = codec.loads(text)
    assert codec.dumps(again) == text
    assert type(Response.from_raw(request, again).analysis) is type(response.analysis)
    to_json(response, raw=True)
    item = LedgerItem(
        index=0, line=1, source="a", model=request.model, key="00", response=dict(response.raw)
    )
    record = build_ledger_record(item)
    dump_record(record)
    build_row(record)
    Statistics().add(record, read_findings(record["analysis"]))
    detections = getattr(response.analysis, "detections", ())
    for found in detections:
        repr(found), hash(found), getattr(found, "attributes", None), getattr(found, "box", None)


@contextmanager
def only(*kinds: type[BaseException]) -> Iterator[None]:
    """Check and accept errors of these kinds. Any other error is a finding."""
    try:
        yield
    except kinds as error:
        if isinstance(error, AnalyzeError):
            check_error(error)
        else:
            check_text(str(error))


def plain(run: Run) -> Callable[[], AbstractContextManager[Run]]:
    """Return the opener of a target that needs nothing."""
    return lambda: contextlib.nullcontext(run)


# -- reading responses


STATUSES = (400, 401, 403, 404, 413, 420, 429, 500, 502, 503, 302, 204)


def fuzz_codec(data: bytes) -> None:
    """Response bodies: each value is stored and read back, or one error names the faulty place."""
    number, choice, body = take(data, len(REQUESTS), len(STATUSES))
    request, status = REQUESTS[number], STATUSES[choice]
    with only(ResponseDecodeError):
        check_response(request, read_response(request, body))
    with only(ResponseDecodeError):
        read_accepted(body, model=request.model)
    with only(ResponseDecodeError):
        found = read_task_status("t", body)
        repr(found), to_json(found, raw=True), found.finished
    check_error(read_error(status, {}, body, now=NOW, model=request.model))
    with only(ValueError, RecursionError):
        value = codec.loads(body)
        assert codec.dumps(codec.loads(codec.dumps(value))) == codec.dumps(value)
    with only(ValueError):
        load_error(body)


def fuzz_retry_after(data: bytes) -> None:
    """Any header gives seconds above 0, or nothing."""
    for text in (data.decode("latin-1"), data.decode(errors="surrogateescape")):
        seconds = read_retry_after({"Retry-After": text}, now=NOW)
        assert seconds is None or (0 < seconds < math.inf)


def read_constants(name: str) -> str:
    """Return all strings in a module of the package, which its messages may contain for any input."""
    source = (TESTS.parent / "cloudinary_analyze" / name).read_text(encoding="utf-8")
    found = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return "\0".join(text for text in found if isinstance(text, str))


STATIC = read_constants("config.py") + f"\0 {URL_FORM}.\0CLOUDINARY_URL={URL_FORM}"


def fuzz_cloudinary_url(data: bytes) -> None:
    """A URL is read, or refused with a message that quotes no part of it."""
    text = data.decode(errors="surrogateescape")
    for read in (
        Credentials.from_url,
        lambda text: Credentials.from_environment({"CLOUDINARY_URL": text}),
        lambda text: Credentials("demo", host=text, oauth_token="t"),
        lambda text: Credentials("demo", "1", text),
    ):
        try:
            credentials = read(text)
        except ConfigurationError as error:
            check_error(error)
            said = str(error)
            for begin in range(len(text) - 7):
                part = text[begin : begin + 8]
                assert part not in said or part in STATIC, f"{part!r} of {text!r} in {said!r}"
        else:
            secret = credentials.api_secret or ""
            shown = repr(attrs.evolve(credentials, api_key="1", cloud_name="demo", host=None))
            assert len(secret) < 8 or secret in STATIC or secret not in shown


# -- notifications


def fuzz_notification(data: bytes) -> None:
    """Bodies and headers of webhooks, signed and not."""
    mode, body = take(data, 4)
    signature, _, rest = body.partition(b"\n")
    timestamp, _, content = rest.partition(b"\n")
    shown, when = signature.decode("latin-1"), timestamp.decode("latin-1")
    with only(NotificationError, ConfigurationError):
        verify_signature(content, when, shown, [SECRET], now=NOW)
    if mode == 1:
        when = str(int(NOW))
    if mode >= 2:
        when, content = str(int(NOW)), body
        shown = compute_signature(content, when, SECRET, digest=("sha1", "sha256")[mode % 2])
    headers = {"X-Cld-Signature": shown, "x-cld-timestamp": when}
    delivery = Delivery(content, headers, received_at=NOW)
    with only(NotificationError):
        read_delivery(delivery, CREDENTIALS)
    stored = decode_delivery(encode_delivery(delivery))
    assert (stored.body, stored.received_at) == (delivery.body, delivery.received_at)
    with only(NotificationError):
        check_notification(parse_notification(content), content)


def check_notification(notification: Any, body: bytes) -> None:
    repr(notification), hash(notification), notification.request_id, notification.http_status
    repr((notification.data, notification.limits, notification.error))
    reports_progress(notification)
    for request in (REQUESTS[3], REQUESTS[-1]):
        if notification.failed:
            failure = build_task_failure(
                notification.task_id or "t",
                model=request.model,
                notification=notification,
                body=body,
            )
            check_error(failure)
        elif find_result(notification.raw, request.analysis_type) is not None:
            with only(ResponseDecodeError):
                read_result(request.model, request.analysis_type, notification.raw, body=body)


# -- servers


# exceptions that servers raise and log for bytes that are not HTTP, with any application
NOT_HTTP = {"BadHttpMessage", "BadHttpMethod", "BadStatusLine", "InvalidHeader", "InvalidURLError",
            "LineTooLong", "LocalProtocolError", "RequestPayloadError", "TransferEncodingError", "ContentLengthError",
            "ContentEncodingError", "HttpProcessingError"}  # fmt: skip


class Watch(logging.Handler):
    """Collects the errors that a server logs: unhandled exceptions."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        kind = record.exc_info[0] if record.exc_info else None
        if kind is None or kind.__name__ not in NOT_HTTP:
            self.errors.append(self.format(record))


@contextmanager
def in_thread(
    service: AbstractAsyncContextManager[Any],
) -> Iterator[tuple[Any, Callable[[], None]]]:
    """Enter an async context manager in a thread; yield its value and a check for stray errors."""
    watch = Watch()
    names = ("asyncio", "aiohttp.server", "aiohttp.web", "uvicorn.error", "cloudinary_analyze")

    def check() -> None:
        assert not watch.errors, watch.errors[:3]

    for name in names:
        logging.getLogger(name).addHandler(watch)
    try:
        with serve_on_thread(service) as value:
            yield value, check
    finally:
        for name in names:
            logging.getLogger(name).removeHandler(watch)


def exchange(port: int, data: bytes, *, wait: float = 0.03) -> bytes:
    """Send bytes and return the whole reply. End the stream if the server waits for more."""
    received = bytearray()
    deadline = time.monotonic() + PATIENCE
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
            connection.settimeout(wait)
            ended = False
            while time.monotonic() < deadline:
                try:
                    chunk = connection.recv(65536)
                except TimeoutError:
                    if not ended:
                        ended = True
                        connection.shutdown(socket.SHUT_WR)
                        connection.settimeout(PATIENCE)
                        continue
                    break
                if not chunk:
                    return bytes(received)
                received += chunk
            raise AssertionError("The server neither answered nor closed the connection.")
    return bytes(received)


def read_statuses(reply: bytes) -> list[int]:
    return [
        int(line.split()[1])
        for line in reply.split(b"\r\n")
        if line.startswith((b"HTTP/1.1 ", b"HTTP/1.0 ")) and line.split()[1:2]
    ]


def frame(data: bytes) -> bytes:
    """Return a request with a correct length around a fuzzed head and body, or the bytes as they are."""
    mode, rest = take(data, 3)
    if mode == 0:
        return rest
    head, _, body = rest.partition(b"\n\n")
    lines = [line for line in head.split(b"\n") if line][:200]
    if mode == 2:  # signed
        now = str(int(time.time()))
        signature = compute_signature(body, now, SECRET)
        lines += [b"X-Cld-Timestamp: " + now.encode(), b"X-Cld-Signature: " + signature.encode()]
    return build_message(
        b"POST /hooks HTTP/1.1", b"Host: a", *lines, b"Connection: close", body=body
    )


def build_message(*lines: bytes, body: bytes) -> bytes:
    """Return a request or a response with a correct length."""
    return b"\r\n".join([*lines, b"Content-Length: %d" % len(body), b"", body])


RECEIVED = {200, 400, 401, 404, 405, 408, 411, 413, 414, 415, 417, 426, 431, 501, 100, 101}
GOOD = b"\2" + b"Content-Type: application/json\n\n" + SAMPLES["webhook_success"]


def check_receiver(port: int, check: Callable[[], None]) -> Run:
    count = 0

    def run(data: bytes) -> None:
        nonlocal count
        reply = exchange(port, frame(data))
        assert SECRET.encode() not in reply
        statuses = read_statuses(reply)
        assert RECEIVED.issuperset(statuses), (statuses, reply[:300])
        check()
        count += 1
        if count % 20 == 0:
            assert read_statuses(exchange(port, frame(GOOD), wait=5))[:1] == [200]

    return run


class Sink:
    async def put(self, delivery: Delivery, /) -> None:
        assert delivery.body


@contextmanager
def open_asgi() -> Iterator[Run]:
    """The ASGI receiver under uvicorn, over raw sockets."""
    app = asgi_receiver.WebhookReceiver(Sink(), CREDENTIALS)
    with in_thread(serve_asgi(app)) as (origin, check):
        yield check_receiver(int(origin.rpartition(":")[2]), check)


@contextmanager
def open_listen() -> Iterator[Run]:
    """The server of ``cloudinary-analyze listen``, over raw sockets."""
    shown = io.StringIO()
    console = build_console(shown)
    plan = ListenPlan(host="127.0.0.1", port=0, path="/hooks", redis=None)
    handle = _show_refusals(
        aiohttp_receiver.WebhookReceiver(Sink(), CREDENTIALS).handle, plan, console
    )
    with in_thread(serve(handle, plan.host, plan.port)) as (origin, check):
        run = check_receiver(int(origin.rpartition(":")[2]), check)

        def run_and_look(data: bytes) -> None:
            run(data)
            said = shown.getvalue()
            assert escape_controls(said) == said
            assert SECRET not in said
            shown.seek(0)
            shown.truncate()

        yield run_and_look


# -- responses over the network


class Answering(asyncio.Protocol):
    """Sends the same bytes in response to every request, and closes."""

    answer = b""

    def connection_made(self, transport: Any) -> None:
        self.transport, self.received = transport, bytearray()

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, found, body = bytes(self.received).partition(b"\r\n\r\n")
        if found and len(body) >= int(head.lower().partition(b"content-length: ")[2].split()[0]):
            self.transport.write(type(self).answer)
            self.transport.close()


@contextlib.asynccontextmanager
async def run_session() -> Any:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Answering, "127.0.0.1", 0)
    host = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    settings = Settings(host=host, attempts=1, read_timeout=5, max_response_bytes=2**20)
    try:
        async with AnalyzeSession(CREDENTIALS, settings=settings) as session:
            yield loop, session
    finally:
        server.close()


@contextmanager
def open_response() -> Iterator[Run]:
    """Arbitrary bytes that a session receives as a response."""
    with in_thread(run_session()) as ((loop, session), check):

        def run(data: bytes) -> None:
            mode, number, rest = take(data, 3, len(REQUESTS))
            request = REQUESTS[number]
            head, _, body = rest.partition(b"\n\n")
            if mode == 1:
                body = gzip.compress(body, 1)
                head += b"\nContent-Encoding: gzip"
            lines = [line for line in head.split(b"\n") if line]
            built = build_message(b"HTTP/1.1 200 OK", *lines, body=body)
            Answering.answer = rest if mode == 0 else built
            with only(AnalyzeError):
                work = asyncio.wait_for(session.analyze(request), PATIENCE)
                response = asyncio.run_coroutine_threadsafe(work, loop).result(30)
                check_response(request, response)
            check()

        yield run


# -- input files


EXTENSIONS = ("txt", "csv", "tsv", "jsonl", "json", "parquet")


@contextmanager
def open_input() -> Iterator[Run]:
    """Files of every format, compressed or not."""
    with tempfile.TemporaryDirectory() as folder:

        def run(data: bytes) -> None:
            number, mode, option, content = take(data, len(EXTENSIONS), 4, 4)
            path = Path(folder) / f"in.{EXTENSIONS[number]}{'.gz' if mode == 1 else ''}"
            if mode == 2:
                content = gzip.compress(content, 1)
            path.write_bytes(content)
            options = InputOptions(
                names=(str(path),),
                column=(None, "url", "image.url", None)[option] if number else None,
                key_column=(None, None, None, "id")[option] if number else None,
            )
            with only(ConfigurationError, CommandError):
                source = open_source(options)
                for line in source.read():
                    assert (line.source is None) == (line.error is not None)
                    if line.error is not None:
                        check_error(line.error)
                    if line.columns is not None:
                        codec.dumps(line.columns)

        yield run


# -- ledgers


def build_redis_values() -> tuple[bytes, ...]:
    error = read_error(400, {}, SAMPLES["error_400_tag_name"], now=NOW, model="captioning")
    record = b'{"source":"a","model":"captioning","raw":%b}'
    payloads = [record % SAMPLES["captioning"], record % dump_error(error)]
    answered = b"A|0||0.5|" + compress(payloads[0])
    failed = b"F|1|task%20id|0.5|" + compress(payloads[1])
    plain_payload = b"A|0|t|1e3|\0" + payloads[0]
    delivery = encode_delivery(Delivery(SAMPLES["webhook_success"], {"X-Cld-Signature": "a"}))
    stats = b'{"worker":"a","at":1.5,"claims":0}'
    return answered, failed, plain_payload, b"C|w#1|0|t|", b"O|1|t|", delivery, stats


@contextmanager
def open_redis_entries() -> Iterator[Run]:
    """Arbitrary values in Redis in place of records, mailboxes and the workers' statistics."""
    value = b""

    class Client:
        def close(self) -> None: ...
        def scan_iter(self, **_: Any) -> Iterator[bytes]:
            return iter([b"cloudinary-analyze:key:" + bytes(16)])

        def mget(self, names: list[Any]) -> list[bytes]:
            return [value for _ in names]

        def zrevrange(self, *_: Any) -> list[bytes]:
            return [value]

    class AsyncClient(Client):
        async def mget(self, names: list[Any]) -> list[bytes]:  # type: ignore[override]
            return [value for _ in names]

    class Link:
        async def ask(self, *_: Any) -> bytes:
            return value

    ledger, notifications = RedisLedger("redis://h/0"), RedisNotifications("redis://h/0")
    object.__setattr__(ledger, "location", SimpleNamespace(build_blocking_client=Client))
    notifications._redis = AsyncClient()
    loop = asyncio.new_event_loop()
    names = ledger._names

    async def find(owned: bool) -> Any:
        token = "w#1" if owned else ""
        worker: Any = SimpleNamespace(
            loop=loop, link=Link(), names=names, tokens={bytes(16): token}
        )
        ledger._worker = worker
        try:
            return await ledger.find("00" * 16)
        finally:
            ledger._worker = None

    def run(data: bytes) -> None:
        nonlocal value
        mode, value = take(data, 2)
        with only(LedgerError):
            loop.run_until_complete(find(owned=bool(mode)))
        with only(LedgerError):
            for item in ledger.iter_records():
                dump_record(build_ledger_record(item))
        with only(LedgerError):
            ledger.worker_stats()
        for delivery in loop.run_until_complete(notifications._collect(["t"])):
            with only(NotificationError):
                read_delivery(delivery, CREDENTIALS)

    try:
        yield run
    finally:
        loop.close()


def build_ledger_file(path: Path) -> bytes:
    """Return the bytes of a small ledger with rows of every kind."""

    async def fill() -> None:
        async with SQLiteLedger(path) as ledger:
            await ledger.open(base_url="https://h", cloud_name="demo")
            for number, request in enumerate(REQUESTS[:5]):
                key = bytes([number]) * 16
                await ledger.note_item(key.hex(), source="a", model=request.model, index=number)
                await ledger.note_source(key.hex(), "a")
            response = read_response(REQUESTS[3], SAMPLES["captioning"])
            await ledger.record_response((b"\0" * 16).hex(), response, seconds=0.5)
            error = read_error(400, {}, SAMPLES["error_400_tag_name"], now=NOW)
            await ledger.record_error((b"\1" * 16).hex(), error, seconds=0.5)
            await ledger.record_submitted((b"\2" * 16).hex(), "task")
            row = (1, "x", None, None, "f", "n", b'{"a":1}', dump_error(error))
            await ledger.add_item(7, row)

    asyncio.run(fill())
    return path.read_bytes()


@contextmanager
def open_ledger_file() -> Iterator[Run]:
    """A damaged or truncated ledger file: each step reads it or raises `LedgerError`."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # no fsync
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        path = Path(folder) / "l.db"
        whole = build_ledger_file(path)

        def run(data: bytes) -> None:
            mode, rest = take(data, 16)
            content = bytearray(whole)
            for begin in range(0, len(rest) - 2, 3):
                place = int.from_bytes(rest[begin : begin + 2], "big") % len(content)
                content[place] ^= rest[begin + 2]
            if mode == 1:
                del content[int.from_bytes(rest[:2], "big") % len(content) :]
            for suffix in COMPANIONS:
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            path.write_bytes(content)
            ledger = SQLiteLedger(path)
            for read in (
                ledger.counts,
                ledger.answered_items,
                lambda: [dump_record(build_ledger_record(item)) for item in ledger.iter_items()],
                lambda: list(ledger.iter_columns()),
                lambda: list(ledger.iter_noted(open_only=True)),
                lambda: list(ledger.iter_noted(open_only=False)),
            ):
                with only(LedgerError):
                    read()
            if mode == 3:
                with only(LedgerError):
                    asyncio.run(use(ledger))

        yield run


async def use(ledger: SQLiteLedger) -> None:
    async with ledger:
        await ledger.open(base_url="https://h", cloud_name="demo")
        for number in range(6):
            with only(LedgerError):
                await ledger.find((bytes([number]) * 16).hex())
        await ledger.record_submitted((b"\4" * 16).hex(), "task")


# -- the emulator


@contextmanager
def open_emulator() -> Iterator[Run]:
    """Requests to the emulator: each gets a JSON response of the service's shape, never a 500."""
    from cloudinary_analyze.emulator.models import PATH_NAMES

    emulator = Emulator(count_sources=False, on_delivery=bool)  # posts nothing anywhere
    paths = [*PATH_NAMES, "unknown"]
    with in_thread(emulator) as (_, check):
        port = int(emulator.url.rpartition(":")[2])
        auth = next(iter(emulator._credentials)).encode()

        def run(data: bytes) -> None:
            mode, number, rest = take(data, 4, len(paths))
            head, _, body = rest.partition(b"\n\n")
            if mode == 0:
                request = rest
            else:
                target = b"/v2/analysis/emulator-demo/analyze/" + paths[number].encode()
                if mode == 2:
                    target = b"/v2/analysis/emulator-demo/tasks/" + head.replace(b"\n", b"%0A")[:80]
                lines = [b"Content-Type: application/json"] if mode == 3 else []
                lines += [line for line in head.split(b"\n") if line and mode == 1]
                first = b"%b %b HTTP/1.1" % (b"GET" if mode == 2 else b"POST", target)
                lines += [b"Host: a", b"Connection: close", b"Authorization: " + auth]
                request = build_message(first, *lines, body=body)
            reply = exchange(port, request)
            assert emulator.api_secret.encode() not in reply
            statuses = read_statuses(reply)
            assert not {500, 501, 502, 503} & set(statuses), (statuses, reply[:300])
            if mode == 3 and statuses:
                assert isinstance(json.loads(reply.partition(b"\r\n\r\n")[2]), dict)
            check()

        yield run


def build_input_seeds() -> tuple[bytes, ...]:
    rows = b'url,id,n\nhttps://a.example/1.jpg,1,"x, y"\nasset:abc,2,\n'
    lines = (
        b'{"url":"https://a.example/1.jpg","id":"1","image":{"url":"https://a.example/2.jpg"}}\n'
    )
    seeds = [
        b"\0\0\0https://a.example/1.jpg\n# c\nasset:1\n",
        b"\1\0\0" + rows,
        b"\1\0\3" + rows,
        b"\2\0\0" + rows.replace(b",", b"\t"),
        b"\1\0\0sep=;\n" + rows.replace(b",", b";"),
        b"\3\0\2" + lines,
        b"\4\0\0" + lines,
        b"\3\2\0" + lines,
        b"\1\1\0" + gzip.compress(rows),
    ]
    with contextlib.suppress(ImportError):
        import pyarrow as pa
        from pyarrow import parquet

        table = pa.table({"url": ["https://a.example/1.jpg"], "id": [1], "b": [b"x"], "l": [[1.5]]})
        stream = io.BytesIO()
        parquet.write_table(table, stream, compression="none")
        seeds.append(b"\5\0\0" + stream.getvalue())
    return tuple(seeds)


def build_body_seeds() -> tuple[bytes, ...]:
    return tuple(
        bytes([number, 0]) + SAMPLES.get(request.model, SAMPLES["coco"])
        for number, request in enumerate(REQUESTS)
    ) + tuple(
        bytes([3, number]) + body
        for number, (name, body) in enumerate(SAMPLES.items())
        if not name.startswith("request")
    )


_SIGNED = str(int(NOW))
_HEADERS = b"Content-Type: application/json\n\n"
JSON_WORDS = (
    *tuple(
        b'"%b"' % word
        for word in b"analysis data limits items addons_quota usage type reset_time remaining error "
        b"details message code category request_id task_id status result tags bounding-box confidence "
        b"attributes categories caption responses value detections label_annotations labels "
        b"logo_annotations bounding_poly vertices x y quality score model_version http_status".split()
    ),
    b"\\ud800",
    b"1e999",
    b"NaN",
    b"9" * 25,
    b"9999-12-31T23:59:59-14:00",
    b"null",
    b"[[[[",
    b"{",
)
WEBHOOKS = (
    GOOD,
    b"\1X-Cld-Signature: " + b"a" * 40 + b"\nX-Cld-Timestamp: 1700000000\n\n{}",
    b"\0GET /%1b%5b HTTP/1.1\r\nHost: a\r\n\r\n",
    b"\0POST /hooks HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
)
WEBHOOK_WORDS = (
    b"Content-Encoding: gzip",
    b"Content-Encoding: br",
    b"Expect: 100-continue",
    b"Upgrade: websocket",
    b"Transfer-Encoding: chunked",
    b"X-Cld-Signature_v2: a",
)

TARGETS = {
    "codec": Target(plain(fuzz_codec), build_body_seeds(), JSON_WORDS),
    "response": Target(
        open_response,
        (
            *(b"\1" + bytes([n]) + _HEADERS + SAMPLES["captioning"] for n in (3, 6)),
            b"\2\3" + _HEADERS + SAMPLES["captioning"],
            b"\0\3HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
            b"\0\3HTTP/1.1 429 No\r\nRetry-After: 3\r\nContent-Length: 2\r\n\r\n{}",
            b"\0\3HTTP/1.1 302 Found\r\nLocation: http://a/\r\nSet-Cookie: a=b\r\n\r\n",
        ),
        (
            b"Content-Encoding: gzip",
            b"Content-Encoding: deflate",
            b"Transfer-Encoding: chunked",
            b"Content-Length: 5",
            b"Content-Type: text/html; charset=x",
            b"HTTP/1.1 101 X\r\n",
        ),
    ),
    "notification": Target(
        plain(fuzz_notification),
        (
            *(b"\2" + SAMPLES[name] for name in ("webhook_success", "webhook_failure")),
            *(b"\3" + SAMPLES[name] for name in ("captioning", "task_status_failed")),
            b"\0" + compute_signature(b"{}", _SIGNED, SECRET).encode() + b"\n1700000000\n{}",
        ),
        JSON_WORDS,
    ),
    "receiver-asgi": Target(open_asgi, WEBHOOKS, WEBHOOK_WORDS),
    "receiver-listen": Target(open_listen, WEBHOOKS, WEBHOOK_WORDS),
    "cloudinary-url": Target(
        plain(fuzz_cloudinary_url),
        (
            f"cloudinary://123456:{SECRET}@demo".encode(),
            f"cloudinary://123456:{SECRET}/x#y@demo?upload_prefix=https://api-eu.cloudinary.com".encode(),
            f"cloudinary://demo?oauth_token={SECRET}&signature_algorithm=sha256".encode(),
            f"'CLOUDINARY_URL=cloudinary://1:{SECRET}%2F@demo/cdn'".encode(),
            b"https://[::1]:8080",
        ),
        (
            b"%2F",
            b"upload_prefix=",
            b"oauth_token=",
            b"http://",
            b"[::1]",
            b":65536",
            b"\xed\xa0\x80",
        ),
    ),
    "retry-after": Target(
        plain(fuzz_retry_after),
        (
            b"120",
            b"1.5",
            b"-1",
            b"nan",
            b"Wed, 21 Oct 2099 07:28:00 GMT",
            b"Fri, 31 Dec 9999 23:59:59 -1200",
            b"Mon, 01 Jan 0001 00:00:00 +2359",
        ),
        (b"1e400", b"GMT", b"+9999", b"Dec"),
    ),
    "input": Target(
        open_input, build_input_seeds(), (b'"', b"sep=\t", b"asset:", b"\xef\xbb\xbf", b"\0")
    ),
    "redis": Target(
        open_redis_entries,
        tuple(bytes([number % 2]) + value for number, value in enumerate(build_redis_values())),
        (b"|", b"A|", b"F|", b"1e999", b'["limits",', b'["status",', b'"fields"'),
    ),
    "ledger": Target(
        open_ledger_file,
        (b"\0", b"\1\x40\0\0", b"\3", b"\0\x00\x10\xff", b"\2\x20\x00\x01\x30\x10\x80"),
    ),
    "emulator": Target(
        open_emulator,
        (
            *tuple(
                bytes([3, number])
                + b"\n\n"
                + SAMPLES.get(f"request_{request.model}", SAMPLES["request_captioning_async"])
                for number, request in enumerate(REQUESTS)
            ),
            b"\x02\x00abc\n\n",
            b"\x00\x00GET /samples/1.png HTTP/1.1\r\nHost: a\r\n\r\n",
            b"\x01\x00Content-Type: application/json; charset=x\n\n{}",
        ),
        (
            b'"async":true',
            b'"notification_url":"http://127.0.0.1:1/"',
            b"/samples/%00",
            b"9" * 30,
            *JSON_WORDS,
        ),
    ),
}
