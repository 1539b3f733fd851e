"""Sources: who may read one, what ends it, and how a delivery is stored."""

import asyncio
import gc
import json
import subprocess
import sys
import warnings

import pytest
from notification_support import CREDENTIALS, build_answer, build_delivery, sign

from cloudinary_analyze import AnalyzeSession, Captioning, ConfigurationError, Delivery, Settings
from cloudinary_analyze.errors import NotificationSourceError
from cloudinary_analyze.notifications import QueueSource, decode_delivery, encode_delivery
from cloudinary_analyze.notifications.forwarding import forward
from cloudinary_analyze.protocols import AcknowledgingSource, NotificationSource, ReplayableSource

SETTINGS = Settings(host="http://127.0.0.1:9", poll_first=3600, poll_longest=3600)


class Silent:
    """A source that does not subclass anything, and cannot be referenced weakly."""

    __slots__ = ()

    async def listen(self):
        await asyncio.Event().wait()
        yield


def open_session(source):
    return AnalyzeSession(CREDENTIALS, settings=SETTINGS, notifications=source)


def build_pairs():
    queue, source, silent = asyncio.Queue(), QueueSource(asyncio.Queue()), Silent()
    return {
        "one queue": (queue, queue),
        "two sources of one queue": (QueueSource(queue), QueueSource(queue)),
        "a queue and a source of it": (queue, QueueSource(queue)),
        "one source": (source, source),
        "one source of a user": (silent, silent),
    }


@pytest.mark.parametrize("name", build_pairs())
async def test_a_source_serves_one_session_at_a_time(name):
    first, second = build_pairs()[name]
    async with open_session(first):
        refused = open_session(second)
        with pytest.raises(ConfigurationError, match="Another session already reads"):
            await refused.__aenter__()
        await refused.aclose()
        with pytest.raises(ConfigurationError, match="Another session already reads"):
            await forward(
                QueueSource(second) if isinstance(second, asyncio.Queue) else second,
                asyncio.Queue(),
                CREDENTIALS,
            )
    async with open_session(second):
        pass
    async with open_session(first):
        pass


async def test_a_session_cannot_read_a_source_of_forward():
    queue = asyncio.Queue()
    forwarding = asyncio.create_task(forward(QueueSource(queue), asyncio.Queue(), CREDENTIALS))
    await asyncio.sleep(0)
    with pytest.raises(ConfigurationError, match="Another session already reads"):
        await open_session(queue).__aenter__()
    forwarding.cancel()
    await asyncio.wait({forwarding})
    async with open_session(queue):
        pass


async def test_sessions_with_separate_sources_are_independent():
    async with open_session(asyncio.Queue()), open_session(asyncio.Queue()), open_session(Silent()):
        pass


def test_a_dropped_session_releases_its_source():
    source = Silent()

    async def drop():
        session = open_session(source)
        await session.__aenter__()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        asyncio.run(drop())
        gc.collect()

    async def take():
        async with open_session(source):
            pass

    asyncio.run(take())


@pytest.mark.skipif(not hasattr(asyncio, "QueueShutDown"), reason="needs Python 3.13")
@pytest.mark.parametrize("immediate", [True, False])
async def test_a_queue_that_was_shut_down_ends_the_source(immediate):
    queue = asyncio.Queue()
    async with open_session(queue) as session, asyncio.timeout(30):
        first, second = session.task("t1", Captioning), session.task("t2", Captioning)
        queue.put_nowait(build_delivery("t1"))
        queue.shutdown(immediate=immediate)
        with pytest.raises(NotificationSourceError):
            await second
        if not immediate:
            assert (await first).analysis.caption == "A cat"


@pytest.mark.skipif(not hasattr(asyncio, "QueueShutDown"), reason="needs Python 3.13")
async def test_forwarding_ends_with_a_queue_that_was_shut_down():
    queue, sink = asyncio.Queue(), asyncio.Queue()
    queue.put_nowait(build_delivery("t1"))
    queue.shutdown()
    await asyncio.wait_for(forward(QueueSource(queue), sink, CREDENTIALS), 30)
    assert sink.qsize() == 1


def test_a_source_is_identified_by_its_methods():
    class Full(Silent):
        async def fetch(self, task_ids):
            return ()

        def acknowledge(self, delivery):
            pass

    for source, kinds in ((Silent(), (True, False, False)), (Full(), (True, True, True))):
        known = (NotificationSource, ReplayableSource, AcknowledgingSource)
        assert tuple(isinstance(source, kind) for kind in known) == kinds


@pytest.mark.parametrize("received_at", [1790000000.123456, 1790000000, None])
def test_a_delivery_is_stored_exactly_with_its_receipt(received_at):
    body = bytes(range(256)) + b"\n\n"
    headers = sign(body, at=1) | {"Authorization": "private"}
    delivery = decode_delivery(encode_delivery(Delivery(body, headers, received_at=received_at)))
    assert (delivery.body, delivery.received_at) == (body, received_at)
    assert delivery.headers == sign(body, at=1)


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"\n",
        b"{}\n{}",
        b"[]\nsomething else",
        b"null\n",
        b"\xff\n",
        b"[" * 100_000 + b"\n",
        b'{"headers": {}, "received_at": 1}',
        b'{"headers": {}, "received_at": "1"}\n{}',
        b'{"headers": {}, "received_at": true}\n{}',
        b'{"headers": null, "received_at": 1}\n{}',
        b'{"headers": {"X-Cld-Signature": 1}, "received_at": 1}\n{}',
        json.dumps({"headers": {}}).encode() + b"\n" + build_answer("t1"),
    ],
)
def test_an_invalid_stored_delivery_is_a_value_error(stored):
    with pytest.raises(ValueError, match="Not a stored delivery"):
        decode_delivery(stored)


def test_delivery_encoding_works_without_redis():
    program = (
        "import sys; sys.modules['redis'] = None\n"
        "from cloudinary_analyze.notifications import encode_delivery, decode_delivery"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)


async def test_any_iterator_is_closed_with_its_session():
    class Iterator:
        closed = 0

        def listen(self):
            return self

        def __aiter__(self):
            return self

        async def __anext__(self):
            await asyncio.Event().wait()

        async def aclose(self):
            self.closed += 1

    source = Iterator()
    async with open_session(source):
        await asyncio.sleep(0.01)
        assert not source.closed
    assert source.closed == 1


async def test_forwarding_ends_only_if_it_is_cancelled(clock):
    class Odd:
        """Raises the `CancelledError` of a library that cancels an internal future."""

        def __init__(self):
            self.ends = 3

        async def listen(self):
            self.ends -= 1
            if self.ends:
                raise asyncio.CancelledError
            yield build_delivery("t1")
            await asyncio.Event().wait()

    class OddSink:
        def __init__(self):
            self.ends, self.stored = 3, []

        async def put(self, delivery, /):
            self.ends -= 1
            if self.ends:
                raise asyncio.CancelledError
            self.stored.append(delivery)

    sink = OddSink()
    forwarding = asyncio.create_task(forward(Odd(), sink, CREDENTIALS, clock=clock))
    await clock.advance(10)
    assert len(sink.stored) == 1
    forwarding.cancel()
    done, _ = await asyncio.wait({forwarding}, timeout=30)
    assert done
    assert forwarding.cancelled()
