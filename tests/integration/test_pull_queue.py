"""The hosted pull queue as a source: results without a public address. Against the emulator."""

import asyncio
import base64
import contextlib

import attrs
import pytest
from aiohttp import web
from notification_support import CREDENTIALS, build_answer, sign, start_redis, until

from cloudinary_analyze import (
    AnalyzeSession,
    Captioning,
    ConfigurationError,
    Credentials,
    InvalidSignatureError,
)
from cloudinary_analyze.emulator import Emulator, FaultPlan, WebhookPolicy
from cloudinary_analyze.errors import AuthenticationError
from cloudinary_analyze.notifications.forwarding import forward
from cloudinary_analyze.notifications.pull import PolledNotifications, read_message
from cloudinary_analyze.notifications.redis import RedisNotifications
from cloudinary_analyze.webhooks import verify_delivery

CHANNEL = "results"


def open_emulator(**options):
    return Emulator(
        **{"task_seconds": 0, "webhooks": WebhookPolicy(pull_channel=CHANNEL)} | options
    )


def build_source(emulator, **options):
    credentials = Credentials.from_url(emulator.cloudinary_url)
    return PolledNotifications(CHANNEL, credentials=credentials, **options)


def open_session(emulator, source):
    credentials = Credentials.from_url(emulator.cloudinary_url)
    return AnalyzeSession(credentials, notifications=source)


def count_messages(emulator):
    """Return how many messages nobody has acknowledged."""
    channel = emulator._pull_queue._channels[CHANNEL]
    return len(channel.ready) + len(channel.hidden)


def build_message(body, *, at=1790000000, padding=True, **fields):
    payload = base64.urlsafe_b64encode(body).decode()
    headers = sign(body, at=at)
    return {
        "signed_payload": payload if padding else payload.rstrip("="),
        "signature": headers["X-Cld-Signature"],
        "timestamp": headers["X-Cld-Timestamp"],
        "receipt_handle": "handle",
    } | fields


@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("length", range(4))
def test_a_message_is_verified_over_its_decoded_bytes_and_its_age_is_not_judged(padding, length):
    body = build_answer("t1", "?>" * 20 + "x" * length)
    delivery = read_message(build_message(body, padding=padding))
    assert (delivery.body, delivery.received_at) == (body, None)
    verify_delivery(delivery, CREDENTIALS)
    with pytest.raises(InvalidSignatureError):
        verify_delivery(attrs.evolve(delivery, body=body + b" "), CREDENTIALS)


def test_messages_are_verified_as_the_vendors_sdk_verifies_them(vectors):
    *whole, incomplete = vectors["polled_message_vectors"]
    for case in whole:
        delivery = read_message(case["message"] | {"receipt_handle": "handle"})
        assert delivery.body == case["decoded_body"].encode()
        assert case["pycloudinary_result"] is True
        credentials = Credentials("demo", "key", case["api_secret"], digests=[case["algorithm"]])
        verify_delivery(delivery, credentials)
    assert incomplete["pycloudinary_result"]["raises"] == "ValueError"
    with pytest.raises(ValueError, match="signed_payload"):
        read_message(incomplete["message"] | {"receipt_handle": "handle"})


@pytest.mark.parametrize(
    "message",
    [
        None,
        [],
        {},
        build_message(b"{}", signed_payload=None),
        build_message(b"{}", signed_payload="***"),
        build_message(b"{}", signed_payload="a"),
        build_message(b"{}", receipt_handle=None),
    ],
)
def test_what_is_no_message_is_refused(message):
    with pytest.raises(ValueError, match=r"signed_payload"):
        read_message(message)


@pytest.mark.parametrize(
    "options", [{"channel": ""}, {"channel": "poll://a"}, {"visibility_timeout": 601}]
)
def test_what_cannot_be_right_is_refused_at_construction(options):
    with pytest.raises(ConfigurationError):
        PolledNotifications(**{"channel": "a", "credentials": CREDENTIALS} | options)


async def test_without_a_public_address_submit_resolves_and_what_resolved_is_acknowledged():
    """Many at once, so that acknowledging in batches is seen too."""
    async with open_emulator() as emulator:
        async with open_session(emulator, build_source(emulator)) as session:
            uris = emulator.sample_urls(250)
            tasks = [session.submit(Captioning(uri)) for uri in uris]
            async with asyncio.timeout(20):
                assert [(await task).entity for task in tasks] == uris
                await until(lambda: count_messages(emulator) == 0)


async def test_what_was_settled_last_is_acknowledged_on_closing():
    async with open_emulator() as emulator:
        async with open_session(emulator, build_source(emulator)) as session:
            await session.submit(Captioning(emulator.sample_url(1)))
        assert count_messages(emulator) == 0


async def test_a_message_that_came_before_its_202_is_acknowledged_when_it_comes_again():
    async with open_emulator(faults=FaultPlan(early=1.0)) as emulator:
        source = build_source(emulator, visibility_timeout=1)
        async with open_session(emulator, source) as session:
            await session.submit(Captioning(emulator.sample_url(1)))
            await until(lambda: count_messages(emulator) == 0)


async def test_messages_of_others_are_left_and_block_nobody():
    """More than one request may return, and they come again and again."""
    async with open_emulator() as emulator:
        credentials = Credentials.from_url(emulator.cloudinary_url)
        async with AnalyzeSession(credentials, notifications=asyncio.Queue()) as elsewhere:
            for uri in emulator.sample_urls(250):
                await elsewhere.submit(Captioning(uri)).accepted()
        assert count_messages(emulator) == 250
        source = build_source(emulator, visibility_timeout=1)
        async with open_session(emulator, source) as session, asyncio.timeout(10):
            for uri in emulator.sample_urls(5):
                assert (await session.submit(Captioning(uri))).entity == uri
        await until(lambda: count_messages(emulator) == 250)


async def test_forged_and_unrelated_messages_are_left_and_disturb_nothing():
    plan = FaultPlan(forged=1.0, unrelated=1.0, malformed=1.0, stale=1.0)
    async with open_emulator(faults=plan) as emulator:
        source = build_source(emulator)
        async with open_session(emulator, source) as session:
            response = await session.submit(Captioning(emulator.sample_url(1)))
            assert session.stats.notifications["forged"] == 1
            assert "resolved" in session.stats.notifications
        assert response.model == "captioning"


async def test_refused_credentials_break_the_source_with_their_error():
    async with open_emulator() as emulator:
        wrong = Credentials(emulator.cloud_name, "1", "wrong", host=emulator.url)
        source = PolledNotifications(CHANNEL, credentials=wrong)
        with pytest.raises(AuthenticationError):
            async for _ in source.listen():
                pass


@contextlib.asynccontextmanager
async def serve_queue(answer):
    """Serve a pull queue that answers as told; yields credentials that lead to it."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        host = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield attrs.evolve(CREDENTIALS, host=host)
    finally:
        await runner.cleanup()


async def test_a_server_that_does_not_wait_is_not_asked_in_a_tight_loop(clock):
    asked = []

    async def answer(request):
        asked.append(request.path_qs)
        return web.json_response({})

    async with serve_queue(answer) as credentials:
        source = PolledNotifications("a b&c", credentials=credentials, clock=clock)
        listening = asyncio.create_task(anext(source.listen()))
        await until(lambda: clock.next_at is not None)
        assert len(asked) == 1
        assert "channel=a+b%26c&max_messages=100&wait_seconds=20" in asked[0]
        await clock.advance(1.0)
        await until(lambda: len(asked) == 2 and clock.next_at is not None)
        listening.cancel()
        await asyncio.wait({listening})


async def test_a_failed_acknowledgement_and_an_unreadable_message_stop_nothing(caplog):
    refused = asyncio.Event()

    async def answer(request):
        if request.method == "POST":
            refused.set()
            return web.json_response({"error": {"message": "not now"}}, status=500)
        messages = ["nonsense", build_message(build_answer("t1"))]
        return web.json_response({"messages": messages})

    async with serve_queue(answer) as credentials:
        source = PolledNotifications(CHANNEL, credentials=credentials)
        async with contextlib.aclosing(source.listen()) as listening:
            source.settle(await anext(listening))
            await refused.wait()
            await until(lambda: "will come again" in caplog.text)
            assert (await anext(listening)).body == build_answer("t1")
    assert "could not be read" in caplog.text
    assert CREDENTIALS.api_secret not in caplog.text


async def test_an_acknowledgement_that_hangs_holds_up_closing_for_two_seconds_at_most(clock):
    asked = asyncio.Event()

    async def answer(request):
        if request.method == "POST":
            asked.set()
            await asyncio.Event().wait()
        return web.json_response({"messages": [build_message(build_answer("t1"))]})

    async with serve_queue(answer) as credentials:
        source = PolledNotifications(CHANNEL, credentials=credentials, clock=clock)
        listening = source.listen()
        source.settle(await anext(listening))
        closing = asyncio.create_task(listening.aclose())
        await asked.wait()
        assert not closing.done()
        await clock.advance(2.1)
        await asyncio.wait_for(closing, 2)


async def test_one_process_pulls_and_feeds_all_others_over_redis(tmp_path):
    server = start_redis(tmp_path)
    try:
        async with contextlib.AsyncExitStack() as stack:
            emulator = await stack.enter_async_context(open_emulator())
            sink = await stack.enter_async_context(RedisNotifications(server.url))
            forwarding = asyncio.create_task(
                forward(build_source(emulator), sink, Credentials.from_url(emulator.cloudinary_url))
            )
            workers = []
            for _ in range(2):
                notifications = await stack.enter_async_context(RedisNotifications(server.url))
                session = open_session(emulator, notifications)
                workers.append(await stack.enter_async_context(session))
            uris = emulator.sample_urls(60)
            tasks = [workers[n % 2].submit(Captioning(uri)) for n, uri in enumerate(uris)]
            async with asyncio.timeout(15):
                assert [(await task).entity for task in tasks] == uris
                await until(lambda: count_messages(emulator) == 0)
            forwarding.cancel()
            await asyncio.wait({forwarding})
    finally:
        server.kill()
