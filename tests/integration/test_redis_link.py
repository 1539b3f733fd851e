"""The connection that sends commands ahead of their replies, against a scripted server."""

import asyncio
import contextlib

import pytest
from scripted import until

from cloudinary_analyze._clock import SYSTEM_CLOCK
from cloudinary_analyze._redis import (
    REPLIES,
    Link,
    LinkBrokenError,
    LinkFailedError,
    RedisLocation,
    read_location,
)


class Server:
    """Speaks enough of the protocol of Redis. Echoes of a number wait for `allowed` of them."""

    def __init__(self):
        self.allowed = asyncio.Event()
        self.connections = []  # the echoes that each received
        self.serving = []
        self.break_after = None

    async def serve(self, reader, writer):
        echoes = []
        self.connections.append(echoes)
        self.serving.append(asyncio.current_task())
        pending = None
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while count := int((await reader.readline())[1:] or 0):
                parts = []
                for _ in range(count):
                    size = int((await reader.readline())[1:])
                    parts.append((await reader.readexactly(size + 2))[:-2])
                if parts[0] == b"EVALSHA":
                    writer.write(b"-NOSCRIPT No matching script.\r\n")
                    continue
                if parts[0] != b"ECHO":
                    writer.write(b"+OK\r\n")
                    continue
                echoes.append(parts[1])
                if pending is None:
                    pending = asyncio.ensure_future(self.reply(writer, echoes))
        writer.close()
        if pending is not None:
            await pending
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async def reply(self, writer, echoes):
        await self.allowed.wait()
        for number in range(10_000):
            if number == self.break_after:
                self.break_after = None
                writer.close()
                return
            while number >= len(echoes):
                if writer.is_closing():
                    return
                await asyncio.sleep(0.001)
            writer.write(b"$%d\r\n%b\r\n" % (len(echoes[number]), echoes[number]))


@pytest.fixture
async def scripted():
    server = Server()
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    host, port = listener.sockets[0].getsockname()
    prepared = []

    async def prepare(link):
        prepared.append(await link.exchange([("PING",)]))
        await asyncio.sleep(0.01)  # what is queued meanwhile must wait

    location: RedisLocation = read_location(f"redis://{host}:{port}/0")
    link = Link(location, 5.0, SYSTEM_CLOCK, prepare, {})
    yield server, link, prepared
    server.allowed.set()
    await link.aclose()
    listener.close()
    await until(lambda: all(task.done() for task in server.serving))


async def test_commands_do_not_wait_for_earlier_replies(scripted):
    server, link, _ = scripted
    first = asyncio.ensure_future(link.ask("ECHO", "1"))
    await until(lambda: server.connections and server.connections[0] == [b"1"])
    second = asyncio.ensure_future(link.ask("ECHO", "2"))
    await until(lambda: server.connections[0] == [b"1", b"2"])
    server.allowed.set()
    assert await first == b"1"
    assert await second == b"2"


async def test_commands_of_two_turns_go_out_together(scripted, monkeypatch):
    """A response frees a slot, and the task that gets it claims a key in the next turn."""
    server, link, _ = scripted
    server.allowed.set()
    await link.ask("PING")
    sizes, send = [], link._connection.send_packed_command

    async def count(content, **options):
        sizes.append(content.count(b"ECHO"))
        await send(content, **options)

    async def record_and_claim(number):
        record = asyncio.ensure_future(link.ask("ECHO", number))
        await asyncio.sleep(0)
        await asyncio.gather(record, link.ask("ECHO", 50 + number))

    monkeypatch.setattr(link._connection, "send_packed_command", count)
    await asyncio.gather(*map(record_and_claim, range(50)))
    assert sizes == [100]


async def test_replies_of_a_burst_do_not_pile_up(scripted):
    """The tasks of the first replies go on before the rest get theirs."""
    server, link, _ = scripted
    steps = []

    async def ask_and_go_on(number):
        await link.ask("ECHO", number)
        steps.append(f"reply {number}")
        await asyncio.sleep(0)
        steps.append(f"request {number}")

    tasks = [asyncio.ensure_future(ask_and_go_on(number)) for number in range(3 * REPLIES)]
    await until(lambda: server.connections and len(server.connections[0]) == len(tasks))
    server.allowed.set()
    await asyncio.gather(*tasks)
    for number in range(REPLIES):
        late = f"reply {number + 2 * REPLIES}"
        assert steps.index(f"request {number}") < steps.index(late)


async def test_a_broken_connection_repeats_unanswered_commands(scripted):
    server, link, prepared = scripted
    server.break_after = 1
    await link.ask("PING")
    asks = [asyncio.ensure_future(link.ask("ECHO", n, repeat=n != 2)) for n in range(4)]
    await until(lambda: server.connections and len(server.connections[0]) == 4)
    server.allowed.set()
    replies = await asyncio.gather(*asks, return_exceptions=True)
    assert replies[:2] + replies[3:] == [b"0", b"1", b"3"]
    assert isinstance(replies[2], LinkBrokenError)
    assert server.connections == [[b"0", b"1", b"2", b"3"], [b"1", b"3"]]
    assert prepared == [[b"OK"], [b"OK"]]


async def test_a_link_without_commands_waits_for_no_reply(scripted):
    _, link, prepared = scripted
    with pytest.raises(LinkBrokenError):
        await link.ask("ECHO", 1, repeat=False)
    assert prepared
    await asyncio.wait_for(link.aclose(), 5)


async def test_a_script_that_is_never_found_ends_the_patience(scripted):
    server, link, _ = scripted
    link.patience = 0.2
    with pytest.raises(LinkFailedError, match="No matching script"):
        await link.ask("EVALSHA", "digest", 0)
    assert len(server.connections) < 10


async def test_replies_to_others_do_not_prolong_the_patience(scripted):
    _, link, _ = scripted
    link.patience = 0.2

    async def ask_often():
        while True:
            await asyncio.gather(*(link.ask("PING", first=True) for _ in range(REPLIES)))

    asking = asyncio.ensure_future(ask_often())
    with pytest.raises(LinkFailedError, match="No matching script"):
        await asyncio.wait_for(link.ask("EVALSHA", "digest", 0), 15)
    with pytest.raises(LinkFailedError):
        await asking


async def test_an_urgent_command_does_not_queue(scripted):
    server, link, _ = scripted
    asks = [asyncio.ensure_future(link.ask("ECHO", n, first=n == 2)) for n in range(3)]
    await until(lambda: server.connections and len(server.connections[0]) == 3)
    assert server.connections[0] == [b"2", b"0", b"1"]
    server.allowed.set()
    assert await asyncio.gather(*asks) == [b"0", b"1", b"2"]


async def test_more_commands_than_may_be_unanswered_all_arrive(scripted):
    server, link, _ = scripted
    asks = [asyncio.ensure_future(link.ask("ECHO", number)) for number in range(3000)]
    await until(lambda: server.connections and len(server.connections[0]) >= 1024)
    await asyncio.sleep(0)
    assert len(server.connections[0]) < 2048
    server.allowed.set()
    assert await asyncio.gather(*asks) == [b"%d" % number for number in range(3000)]


async def test_closing_ends_unanswered_commands(scripted):
    server, link, _ = scripted
    asks = [asyncio.ensure_future(link.ask("ECHO", number)) for number in range(3)]
    await until(lambda: server.connections and len(server.connections[0]) == 3)
    await link.aclose(patience=0.01)
    replies = await asyncio.gather(*asks, return_exceptions=True)
    assert [str(reply) for reply in replies] == ["it was closed"] * 3
