"""The benchmark server: canned answers over a bare protocol, in a separate process.

It reads only the model in a request's path, its Content-Length, and whether it asks for a task, so
that mostly the clients are measured. Tasks remain in the state "processing".
``GET /usage`` reports the CPU seconds it has used; from these comes the busy share that is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Final, cast

from benchmarks.model import Place
from benchmarks.payloads import ANSWERS, build_task_id
from benchmarks.processes import run_module

_HEAD: Final = (
    "HTTP/1.1 200 OK\r\n"
    "Content-Type: application/json; charset=utf-8\r\n"
    "Date: Mon, 01 Jan 2024 00:00:00 GMT\r\n"
    "Server: Cloudinary\r\n"
    "Vary: Accept-Encoding\r\n"
    "X-Request-Id: 17c3b70c5096df0e77e838323abb7029\r\n"
    "Connection: keep-alive\r\n"
    "Content-Length: {length}\r\n\r\n"
)


def build_answer(body: bytes) -> bytes:
    """Return the bytes of a 200."""
    return _HEAD.format(length=len(body)).encode() + body


def build_acceptance(number: int) -> bytes:
    """Return the bytes of a 202."""
    task_id = build_task_id(number).encode()
    task = b'{"data":{"task_id":"%s","status":"pending"},"request_id":"0"}' % task_id
    return build_answer(task).replace(b" 200 OK", b" 202 Accepted", 1)


PROCESSING: Final = build_answer(b'{"data":{"status":"processing"},"request_id":"0"}')


class _Answerer(asyncio.Protocol):
    """Answers one connection's requests, one after the other."""

    task_numbers = itertools.count()

    def __init__(self, delay: float, answers: dict[bytes, bytes]) -> None:
        self.delay = delay
        self.answers = answers
        self.pending = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's has another class

    def data_received(self, data: bytes) -> None:
        data = self.pending + data if self.pending else data
        while (end := data.find(b"\r\n\r\n")) >= 0:
            end += 4
            head = data[:end].lower()
            at = head.find(b"content-length:")
            if at >= 0:
                end += int(head[at + 15 : head.index(b"\r", at)])
            if len(data) < end:
                break
            self.answer(head, as_task=b'"async":true' in data[len(head) : end])
            data = data[end:]
        self.pending = data

    def answer(self, head: bytes, *, as_task: bool) -> None:
        path = head.split(b" ", 2)[1]
        if path == b"/usage":
            self.transport.write(build_answer(str(time.process_time()).encode()))
            return
        if as_task:
            answer = build_acceptance(next(self.task_numbers))
        elif b"/tasks/" in path:
            answer = PROCESSING
        else:
            answer = self.answers[path.rpartition(b"/")[2]]
        if self.delay:
            asyncio.get_running_loop().call_later(self.delay, self.write, answer)
        else:
            self.transport.write(answer)

    def write(self, answer: bytes) -> None:
        """Write a response, unless the client has disconnected."""
        if not self.transport.is_closing():
            self.transport.write(answer)


async def _serve(delay: float) -> None:
    loop = asyncio.get_running_loop()
    answers = {model.encode(): build_answer(body) for model, body in ANSWERS.items()}
    server = await loop.create_server(
        lambda: _Answerer(delay, answers), "127.0.0.1", 0, backlog=4096
    )
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    over = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), over.set)  # stdin ends when the parent does
    await over.wait()


@contextlib.contextmanager
def run_server(_items: int = 0, *, delay: float = 0.0) -> Iterator[Place]:
    """Run a server in a separate process."""
    with run_module("benchmarks.server", "--delay", str(delay)) as printed:
        yield Place(url=printed.address)


def read_usage(url: str) -> float:
    """Return the CPU seconds that the server at `url` has used."""
    with urllib.request.urlopen(f"{url}/usage", timeout=10) as answer:
        return float(answer.read())


def main() -> None:
    """Serve until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--delay", type=float, default=0.0)
    delay = parser.parse_args().delay
    try:
        import uvloop
    except ImportError:
        asyncio.run(_serve(delay))
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(delay))


if __name__ == "__main__":
    main()
