"""What a receiver accepts, what it refuses, and how it answers."""

import asyncio
import json

import pytest
from notification_support import CREDENTIALS, SECRET, build_answer, sign

from cloudinary_analyze import ConfigurationError, Credentials
from cloudinary_analyze.notifications.asgi import WebhookReceiver
from cloudinary_analyze.notifications.receiver import (
    MAX_BODY,
    SINK_SECONDS,
    Intake,
    RefusedError,
    read_headers,
)

SHA1 = "a" * 40
TIMESTAMP = ("X-Cld-Timestamp", "1790000000")
GOOD = [TIMESTAMP, ("X-Cld-Signature", SHA1)]


@pytest.fixture
def queue():
    return asyncio.Queue()


@pytest.fixture
def intake(queue, clock):
    return Intake(queue, CREDENTIALS, clock=clock)


def test_only_signature_headers_are_kept_in_any_case():
    pairs = [("x-cld-TIMESTAMP", "1790000000"), ("x-cld-signature", SHA1), ("Cookie", "secret")]
    assert read_headers(pairs) == dict(GOOD)


@pytest.mark.parametrize(
    ("pairs", "status"),
    [
        ([], 401),
        ([TIMESTAMP], 401),
        ([TIMESTAMP, ("X-Cld-Signature_v2", "xyz")], 401),
        ([("X-Cld-Signature", SHA1)], 400),
        ([("X-Cld-Timestamp", "1.5"), ("X-Cld-Signature", SHA1)], 400),
        ([("X-Cld-Timestamp", "-1"), ("X-Cld-Signature", SHA1)], 400),
        ([("X-Cld-Timestamp", "1" * 16), ("X-Cld-Signature", SHA1)], 400),
        ([("X-Cld-Timestamp", chr(0x661)), ("X-Cld-Signature", SHA1)], 400),
        ([TIMESTAMP, ("X-Cld-Signature", "zz")], 400),
        ([TIMESTAMP, ("X-Cld-Signature", chr(0xFF) * 40)], 400),
        ([TIMESTAMP, ("X-Cld-Signature", "")], 400),
        ([*GOOD, ("x-cld-signature", SHA1)], 400),
        ([*GOOD, ("Content-Length", str(MAX_BODY + 1))], 413),
    ],
)
def test_invalid_headers_are_refused_before_the_body(pairs, status):
    with pytest.raises(RefusedError) as caught:
        read_headers(pairs)
    assert caught.value.reply.status == status


def test_a_v2_signature_alone_logs_the_setting_to_change(caplog):
    with pytest.raises(RefusedError):
        read_headers([TIMESTAMP, ("X-Cld-Signature_v2", "xyz")])
    assert "auth_scheme" in caplog.text


@pytest.mark.parametrize("digest", ["sha1", "sha256"])
async def test_a_signed_result_is_stored_with_its_receipt_time(intake, queue, clock, digest):
    body = build_answer("t1")
    headers = sign(body, at=clock.wall() - 60, digest=digest)
    assert (await intake.take(body, headers)).status == 200
    delivery = queue.get_nowait()
    assert (delivery.body, delivery.received_at) == (body, clock.wall())
    assert delivery.headers == headers


async def test_a_failure_is_stored_too(intake, queue, clock):
    body = json.dumps({"task_id": "t1", "http_status": 404, "error": {"message": "gone"}}).encode()
    assert (await intake.take(body, sign(body, at=clock.wall()))).status == 200
    assert queue.get_nowait().body == body


@pytest.mark.parametrize(
    ("age", "secret", "status"),
    [(0, "another", 401), (7300, SECRET, 401), (-400, SECRET, 401), (7100, SECRET, 200)],
)
async def test_a_forged_or_stale_body_gets_401_and_is_not_stored(queue, clock, age, secret, status):
    body = build_answer("t1")
    headers = sign(body, at=clock.wall() - age, secret=secret)
    reply = await Intake(queue, CREDENTIALS, clock=clock).take(body, headers)
    assert (reply.status, queue.qsize()) == (status, int(status == 200))


@pytest.mark.parametrize("body", [b'{"task_id": ', b"[1]", bytes([0xFF, 0xFE])])
async def test_a_signed_unreadable_body_gets_400(intake, queue, clock, body):
    assert (await intake.take(body, sign(body, at=clock.wall()))).status == 400
    assert queue.empty()


@pytest.mark.parametrize(
    "content",
    [
        {"notification_type": "upload", "public_id": "a"},
        {"notification_type": "upload", "task_id": 5, "data": {"analysis": {}}},
        {"task_id": "", "data": {"analysis": {}}},
        {"task_id": ["t1"], "data": {"analysis": {}}},
        {},
    ],
)
async def test_a_body_without_a_task_gets_200_and_is_dropped(intake, queue, clock, content):
    body = json.dumps(content).encode()
    assert (await intake.take(body, sign(body, at=clock.wall()))).status == 200
    assert queue.empty()


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"http_status": 200, "data": {"analysis": None}},
        {"data": {"result": {"analysis": {"data": {"caption": "x"}}}}},
        {"error": ["odd"], "http_status": "400"},
    ],
)
async def test_a_signed_body_of_any_shape_is_stored(intake, queue, clock, content):
    body = json.dumps({"task_id": "t1"} | content).encode()
    assert (await intake.take(body, sign(body, at=clock.wall()))).status == 200
    assert queue.get_nowait().body == body


async def test_a_sink_that_fails_makes_the_sender_retry(clock, caplog):
    class Broken:
        async def put(self, delivery, /):
            raise ConnectionError("the broker is away")

    body = build_answer("t1")
    reply = await Intake(Broken(), CREDENTIALS, clock=clock).take(body, sign(body, at=clock.wall()))
    assert reply.status == 503
    assert "the broker is away" in caplog.text
    assert SECRET not in caplog.text


async def test_a_sink_times_out_after_twenty_seconds(clock):
    full = asyncio.Queue(maxsize=1)
    full.put_nowait(None)
    body = build_answer("t1")
    taking = asyncio.create_task(
        Intake(full, CREDENTIALS, clock=clock).take(body, sign(body, at=clock.wall()))
    )
    await clock.advance(19.9)
    assert not taking.done()
    await clock.advance(0.2)
    assert (await asyncio.wait_for(taking, 30)).status == 503
    assert full.qsize() == 1


def test_credentials_without_a_secret_are_refused(queue):
    with pytest.raises(ConfigurationError, match="notification_secrets"):
        WebhookReceiver(queue, Credentials("demo", oauth_token="token"))


async def test_lifespan_and_websocket_scopes_are_handled(queue):
    """Without a framework, the receiver handles startup and shutdown, and closes websockets."""
    receiver = WebhookReceiver(queue, CREDENTIALS)

    async def run(scope, *messages):
        incoming, sent = list(messages), []

        async def receive():
            return {"type": incoming.pop(0)}

        async def send(message):
            sent.append(message["type"])

        await receiver({"type": scope}, receive, send)
        return sent

    assert await run("lifespan", "lifespan.startup", "lifespan.shutdown") == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
    ]
    assert await run("websocket", "websocket.connect") == ["websocket.close"]


async def test_a_sender_that_disconnects_is_not_an_error(queue, clock):
    body = build_answer("t1")
    scope = {
        "type": "http",
        "method": "POST",
        "http_version": "2",
        "headers": [
            (name.lower().encode(), value.encode())
            for name, value in sign(body, at=clock.wall()).items()
        ],
    }

    async def receive():
        return {"type": "http.request", "body": body}

    async def send(message):
        raise OSError("gone")

    await WebhookReceiver(queue, CREDENTIALS, clock=clock)(scope, receive, send)
    assert queue.get_nowait().body == body


async def test_a_sinks_cancelled_error_makes_the_sender_retry(clock):
    class Odd:
        async def put(self, delivery, /):
            raise asyncio.CancelledError

    body = build_answer("t1")
    reply = await Intake(Odd(), CREDENTIALS, clock=clock).take(body, sign(body, at=clock.wall()))
    assert reply.status == 503


@pytest.mark.parametrize("deadline_first", [True, False])
async def test_a_cancellation_at_the_deadline_is_not_swallowed(clock, deadline_first):
    body = build_answer("t1")
    full = asyncio.Queue(maxsize=1)
    full.put_nowait(None)
    taking = asyncio.create_task(
        Intake(full, CREDENTIALS, clock=clock).take(body, sign(body, at=clock.wall()))
    )
    await asyncio.sleep(0)
    if not deadline_first:
        taking.cancel()
    clock.now = SINK_SECONDS
    clock._fire(clock._timers[0][2])
    await asyncio.sleep(0) if deadline_first else None
    taking.cancel()
    await asyncio.wait({taking})
    assert taking.cancelled()


@pytest.mark.parametrize("steps", range(10))
@pytest.mark.parametrize("size", [0, 1])
async def test_a_cancelled_receiver_accepts_the_next_webhook(queue, clock, steps, size):
    sink = asyncio.Queue(maxsize=size)
    receiver, told = WebhookReceiver(sink, CREDENTIALS, clock=clock), []
    body = build_answer("t1")
    headers = [
        (name.lower().encode(), value.encode())
        for name, value in sign(body, at=clock.wall()).items()
    ]

    def start():
        parts = [body[:10], body[10:]]

        async def receive():
            await asyncio.sleep(0)
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

        async def send(message):
            await asyncio.sleep(0)
            told.append(message.get("status"))

        scope = {"type": "http", "method": "POST", "headers": headers}
        return asyncio.create_task(receiver(scope, receive, send))

    serving = start()
    for _ in range(steps):
        await asyncio.sleep(0)
    serving.cancel()
    done, _ = await asyncio.wait({serving}, timeout=30)
    assert done
    assert serving.cancelled() or told[-2:] == [200, None]
    while not sink.empty():
        sink.get_nowait()
    told.clear()
    await asyncio.wait_for(start(), 30)
    assert told == [200, None]
    assert sink.get_nowait().body == body
    assert clock.next_at is None
