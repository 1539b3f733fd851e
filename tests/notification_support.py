"""Helpers for tests of notifications: signed webhooks, an ASGI server, a Redis server."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import attrs
import pytest
import uvicorn
from ports import release_port, reserve_port

from cloudinary_analyze import Captioning, Credentials, Delivery
from cloudinary_analyze.testing import build_notification, sign_notification

SECRET = "emulator-secret"
CREDENTIALS = Credentials("emulator-demo", "123456789012345", SECRET)


def build_answer(task_id, caption="A cat", **fields):
    """Return the body of a notification that brings a caption."""
    body = build_notification(task_id, Captioning, {"data": {"caption": caption}})
    return json.dumps(json.loads(body) | fields).encode()


def sign(body, *, at, secret=SECRET, digest="sha1"):
    """Return the headers that sign a body at an instant, in Unix seconds."""
    credentials = Credentials("emulator-demo", "1", secret, digests=(digest,))
    return sign_notification(body, credentials, at=at)


def build_delivery(task_id, caption="A cat", *, received_at=None, **fields):
    """Return a delivery that brings a caption, signed when it was received; default: now."""
    body = build_answer(task_id, caption, **fields)
    received_at = time.time() if received_at is None else received_at
    return Delivery(body, sign(body, at=received_at), received_at=received_at)


async def until(condition, seconds=30.0):
    """Wait until another task, thread or process makes a condition true."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def serve_asgi(app, *, port=0):
    """Serve an ASGI application, on a free port unless one is named, and yield its origin."""
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=port,
        log_config=None,  # errors reach the handlers of the tests
        log_level="warning",
        ws="none",
        lifespan="on",
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    try:
        await until(lambda: server.started or serving.done())
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving


@attrs.define(eq=False)
class RedisServer:
    """A private Redis server that can be killed and restarted. By default, it fsyncs every write."""

    directory: Path
    port: int = attrs.field(factory=reserve_port)
    fsync: str = "always"
    options: tuple[str, ...] = ()
    process: subprocess.Popen | None = None

    @property
    def url(self):
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self):
        command = ["redis-server", "--bind", "127.0.0.1", "--port", str(self.port), "--save", ""]
        command += ["--dir", str(self.directory), "--appendonly", "yes"]
        command += ["--appendfsync", self.fsync, *self.options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while not self.answers():
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError("redis-server did not start.")
            time.sleep(0.01)

    def answers(self):
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False

    def kill(self):
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(10)
            self.process = None


@contextlib.contextmanager
def run_redis(directory, **options):
    """Run a Redis server. Skip the test if Redis is not installed, but never in CI."""
    if shutil.which("redis-server") is None and not os.environ.get("CI"):
        pytest.skip("redis-server is not installed")
    server = RedisServer(directory, **options)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        release_port(server.port)
