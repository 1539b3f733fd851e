"""The server of the throttling scenarios, in a separate process.

It prints its origin, serves until stdin ends, and then prints what it saw as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from typing import Any, Final

import attrs
from aiohttp import web

from benchmarks.payloads import ANSWERS
from benchmarks.processes import run_module
from benchmarks.services import OK, REFUSED, SCENARIOS, THROTTLED, Outage, Scenario, Service

# The type is what botocore recognizes; the message is what ours reads.
_ERRORS: Final = {
    THROTTLED: b'{"error":{"message":"slow down"},"__type":"ThrottlingException"}',
    500: b'{"error":{"message":"internal error"},"__type":"InternalFailure"}',
}
# In an outage, idle connections are closed after this time.
DRAIN_SECONDS: Final = 0.5


@attrs.define(eq=False)
class _Server:
    """Serves one scenario.

    Attributes:
        requests: The arrival, the status and the client of each; clients are distinguished by their path.
    """

    scenario: Scenario
    service: Service
    requests: list[tuple[float, int, int]] = attrs.field(factory=list)
    paths: dict[str, int] = attrs.field(factory=dict)
    began: float | None = None
    refusing: bool = False
    refusal: asyncio.Task[None] | None = None
    listener: asyncio.Server = attrs.field(init=False)
    web_server: web.Server = attrs.field(init=False)
    port: int = 0
    chance: random.Random = attrs.field(factory=lambda: random.Random(2))

    async def listen(self) -> None:
        loop = asyncio.get_running_loop()
        self.listener = await loop.create_server(
            self.web_server, "127.0.0.1", self.port, backlog=1024
        )
        self.port = self.listener.sockets[0].getsockname()[1]

    async def refuse(self, outage: Outage) -> None:
        """Refuse connections for a time, like a process that restarts gracefully."""
        assert self.began is not None
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self.began + outage.begins - loop.time())
        self.listener.close()
        self.refusing = True
        await asyncio.sleep(DRAIN_SECONDS)
        self.web_server.pre_shutdown()
        await asyncio.sleep(self.began + outage.ends - loop.time())
        self.refusing = False
        await self.listen()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            await request.read()
        except ConnectionError:
            return web.Response()  # the client has gone
        now = asyncio.get_running_loop().time()
        if self.began is None:
            self.began = now
            if isinstance(self.service, Outage) and self.service.status == REFUSED:
                self.refusal = asyncio.create_task(self.refuse(self.service))
        now -= self.began
        # connections from before the outage get one more response
        status = self.service.answer(now) or OK
        client = self.paths.setdefault(request.path, len(self.paths))
        self.requests.append((round(now, 4), status, client))
        headers = {}
        if status == OK:
            sigma = self.scenario.sigma
            try:
                await asyncio.sleep(
                    self.scenario.latency * math.exp(self.chance.gauss(0, sigma))
                    if sigma
                    else self.scenario.latency
                )
            finally:
                self.service.end()
        elif status == THROTTLED and self.scenario.retry_after:
            headers["Retry-After"] = str(self.scenario.retry_after)
        response = web.Response(
            status=status,
            headers=headers,
            body=ANSWERS["captioning"] if status == OK else _ERRORS[status],
            content_type="application/json",
        )
        if self.refusing:
            response.force_close()
        return response


async def _serve(scenario: Scenario) -> None:
    server = _Server(scenario, scenario.build())
    server.web_server = web.Server(server.handle, access_log=None)
    await server.listen()
    print(f"http://127.0.0.1:{server.port}", flush=True)
    over = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), over.set)
    await over.wait()
    seen = {"requests": server.requests, "cpu_seconds": time.process_time()}
    print(json.dumps(seen), flush=True)


@contextlib.contextmanager
def run_limited_server(name: str, seen: dict[str, Any]) -> Iterator[str]:
    """Run the server of a scenario; give its origin, and fill `seen` at the end."""
    with run_module("benchmarks.limiting", name) as printed:
        yield printed.address
    seen.update(json.loads(printed.rest or "{}"))


if __name__ == "__main__":
    asyncio.run(_serve(SCENARIOS[sys.argv[1]]))
