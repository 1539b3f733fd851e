"""Forwarding from a source to a sink, and the example of a custom broker."""

import asyncio
import sys
from types import ModuleType, SimpleNamespace

import pytest
from examples import read_examples
from notification_support import CREDENTIALS, SECRET, build_answer, build_delivery, sign

from cloudinary_analyze import AnalyzeSession, Captioning, ConfigurationError, Credentials, Delivery
from cloudinary_analyze import notifications as room
from cloudinary_analyze.emulator import Emulator
from cloudinary_analyze.notifications.forwarding import forward
from cloudinary_analyze.notifications.receiver import Intake


class ListSource:
    """Yields deliveries and raises errors, as listed, then ends."""

    def __init__(self, *listed):
        self.listed = list(listed)
        self.acknowledged = []

    async def listen(self):
        while self.listed:
            item = self.listed.pop(0)
            if isinstance(item, Exception):
                raise item
            yield item

    def acknowledge(self, delivery):
        self.acknowledged.append(delivery)


async def test_only_verified_results_are_forwarded():
    good, failure = build_delivery("t1"), build_delivery("t2", data=None, http_status=500)
    forged = Delivery(good.body, sign(good.body, at=good.received_at, secret="another"))
    unrelated = build_delivery("", notification_type="upload")
    garbled = Delivery(b"{", sign(b"{", at=good.received_at), received_at=good.received_at)
    source = ListSource(forged, good, unrelated, garbled, failure)
    queue = asyncio.Queue()
    await forward(source, queue, CREDENTIALS)
    assert [queue.get_nowait() for _ in range(queue.qsize())] == [good, failure]
    assert source.acknowledged == [good, failure]


async def test_a_failed_put_is_retried_before_acknowledging(clock):
    source = ListSource(build_delivery("t1"))
    stored = []

    class Moody:
        failures = 2

        async def put(self, delivery, /):
            if self.failures:
                self.failures -= 1
                raise ConnectionError("away")
            assert source.acknowledged == []
            stored.append(delivery)

    forwarding = asyncio.create_task(forward(source, Moody(), CREDENTIALS, clock=clock))
    await clock.advance(0.5)
    assert not stored
    await clock.advance(1.0)
    assert len(stored) == 1
    assert source.acknowledged == stored
    await forwarding


async def test_a_source_that_fails_is_read_again(clock, caplog):
    source = ListSource(ConnectionError("cut"), build_delivery("t1"))
    queue = asyncio.Queue()
    forwarding = asyncio.create_task(forward(source, queue, CREDENTIALS, clock=clock))
    await clock.advance(0.4)
    assert queue.empty()
    await clock.advance(0.1)
    await forwarding
    assert queue.qsize() == 1
    assert "cut" in caplog.text
    assert SECRET not in caplog.text


async def test_forwarding_without_a_secret_is_refused():
    with pytest.raises(ConfigurationError, match="notification_secrets"):
        await forward(ListSource(), asyncio.Queue(), Credentials("demo", oauth_token="token"))


class NotFoundError(Exception):
    pass


class FakeJetStream:
    """An in-memory broker with the methods that the example uses."""

    def __init__(self):
        self.stored = []
        self.subscriptions = []

    async def publish(self, subject, payload):
        message = SimpleNamespace(subject=subject, data=payload)
        self.stored.append(message)
        for subscription in self.subscriptions:
            subscription.put_nowait(message)

    async def subscribe(self, subject, *, ordered_consumer, deliver_policy):
        assert (subject, ordered_consumer, deliver_policy) == ("analyses.*", True, "new")
        queue = asyncio.Queue()
        self.subscriptions.append(queue)

        async def messages():
            while True:
                yield await queue.get()

        return SimpleNamespace(messages=messages())

    async def get_last_msg(self, stream, subject):
        for message in reversed(self.stored):
            if message.subject == subject:
                return message
        raise NotFoundError


@pytest.fixture
def example(monkeypatch):
    """The example broker, executed as the documentation prints it."""
    js, api, errors = map(ModuleType, ("nats.js", "nats.js.api", "nats.js.errors"))
    js.JetStreamContext = FakeJetStream
    api.DeliverPolicy = SimpleNamespace(NEW="new")
    errors.NotFoundError = NotFoundError
    for module in (ModuleType("nats"), js, api, errors):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    (printed,) = read_examples(room.__doc__)
    namespace = {}
    exec(printed, namespace)
    return namespace["NatsNotifications"]


async def test_the_example_broker_resolves_tasks(example):
    jetstream = FakeJetStream()
    notifications = example(jetstream)
    intake = Intake(notifications, CREDENTIALS)
    async with Emulator(task_seconds=3600) as emulator:
        credentials = Credentials.from_url(emulator.cloudinary_url)
        async with AnalyzeSession(credentials, notifications=notifications) as session:
            waiting = session.submit(Captioning("https://x.test/a.jpg"))
            body = build_answer(await waiting.accepted(), "In time")
            reply = await intake.take(body, sign(body, at=intake.clock.wall()))
            assert reply.status == 200
            assert (await waiting).analysis.caption == "In time"
        late = example(jetstream)
        async with AnalyzeSession(credentials, notifications=late) as session:
            again = session.task(waiting.task_id, Captioning)
            assert (await again).analysis.caption == "In time"
