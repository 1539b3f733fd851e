"""The contenders that call over the network: this package and its alternatives.

Each opens its client once and yields a function that makes one call: from the image's URL to the
value that the caller uses. Functions import the libraries, so a process loads only those of its
contender.
"""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

import attrs

from benchmarks.payloads import (
    API_KEY,
    API_SECRET,
    CLOUD,
    build_image_url,
    read_plain_detections,
)

if TYPE_CHECKING:
    import asyncio

    from cloudinary_analyze import (
        AnalyzeRequest,
        AnalyzeSession,
        CocoAnalysis,
        Delivery,
        NotificationSource,
    )


@attrs.frozen(kw_only=True)
class Workload:
    """The model to call, the concurrency, and what is read from the response.

    Attributes:
        model: ``"captioning"`` or ``"coco"``.
        read: Whether every detection is read.
        in_flight: Calls at once.
        url: The server's origin.
    """

    model: str
    read: bool
    in_flight: int
    url: str

    @property
    def target_url(self) -> str:
        """The URL of the model's analyze operation."""
        return f"{self.url}/v2/analysis/{CLOUD}/analyze/{self.model}"


Call = Callable[[int], Awaitable[object]]
Opener = Callable[[Workload], AbstractAsyncContextManager[Call]]


def read_typed_detections(analysis: CocoAnalysis) -> float:
    """Read label, confidence and box of every detection of a typed response."""
    total = 0.0
    for found in analysis.detections:
        box = found.bounding_box
        if box is not None and found.confidence is not None:
            total += len(found.label) + found.confidence + box.x + box.y + box.width + box.height
    return total


def build_session(
    url: str,
    *,
    notifications: asyncio.Queue[Delivery] | NotificationSource | None = None,
    **settings: Any,
) -> AnalyzeSession:
    """Return a session that calls the server at `url`."""
    from cloudinary_analyze import AnalyzeSession, Credentials, Settings

    credentials = Credentials(CLOUD, API_KEY, API_SECRET, host=url)
    return AnalyzeSession(credentials, settings=Settings(**settings), notifications=notifications)


@contextlib.asynccontextmanager
async def open_ours(load: Workload) -> AsyncIterator[Call]:
    """``await session.analyze(Captioning(url))``."""
    from cloudinary_analyze import Captioning, Coco, Settings

    permits = max(Settings().permits, load.in_flight)
    kind: Callable[[str], AnalyzeRequest[Any]] = Captioning if load.model == "captioning" else Coco
    async with build_session(load.url, permits=permits) as session:

        async def call(number: int) -> object:
            return await session.analyze(kind(build_image_url(number)))

        async def call_and_read(number: int) -> object:
            response = await session.analyze(Coco(build_image_url(number)))
            return read_typed_detections(response.analysis)

        yield call_and_read if load.read else call


def _build_headers() -> dict[str, str]:
    pair = f"{API_KEY}:{API_SECRET}".encode()
    return {
        "Authorization": f"Basic {base64.b64encode(pair).decode()}",
        "Content-Type": "application/json",
    }


def _open_aiohttp(
    dumps: Callable[[Any], bytes], loads: Callable[[bytes], Any]
) -> Callable[[Workload], AbstractAsyncContextManager[Call]]:
    @contextlib.asynccontextmanager
    async def open_client(load: Workload) -> AsyncIterator[Call]:
        import aiohttp

        # a default session, except that its pool has a connection for each call in flight
        connector = aiohttp.TCPConnector(limit=max(100, load.in_flight))
        url = load.target_url
        async with aiohttp.ClientSession(connector=connector, headers=_build_headers()) as http:

            async def call(number: int) -> object:
                body = dumps({"source": {"uri": build_image_url(number)}})
                async with http.post(url, data=body) as response:
                    answer = loads(await response.read())
                return read_plain_detections(answer) if load.read else answer

            yield call

    return open_client


def _dump_json(value: Any) -> bytes:
    return json.dumps(value).encode()


open_aiohttp_json = _open_aiohttp(_dump_json, json.loads)


@contextlib.asynccontextmanager
async def open_aiohttp_orjson(load: Workload) -> AsyncIterator[Call]:
    """By hand, with aiohttp and orjson: the baseline."""
    import orjson

    async with _open_aiohttp(orjson.dumps, orjson.loads)(load) as call:
        yield call


@contextlib.asynccontextmanager
async def open_httpx(load: Workload) -> AsyncIterator[Call]:
    """By hand, with httpx and orjson."""
    import httpx
    import orjson

    limits = httpx.Limits(max_connections=max(100, load.in_flight))
    url = load.target_url
    async with httpx.AsyncClient(limits=limits, timeout=60, headers=_build_headers()) as http:

        async def call(number: int) -> object:
            body = orjson.dumps({"source": {"uri": build_image_url(number)}})
            answer = orjson.loads((await http.post(url, content=body)).content)
            return read_plain_detections(answer) if load.read else answer

        yield call


@contextlib.asynccontextmanager
async def open_vendor(load: Workload) -> AsyncIterator[Call]:
    """The vendor's SDK. Its coco responses contain no detections, so none are read."""
    import httpx
    from cloudinary_analysis import CloudinaryAnalysis, models

    limits = httpx.Limits(max_connections=max(100, load.in_flight))
    security = models.Security(
        cloudinary_auth=models.SchemeCloudinaryAuth(api_key=API_KEY, api_secret=API_SECRET)
    )
    async with (
        httpx.AsyncClient(limits=limits, timeout=60) as http,
        CloudinaryAnalysis(
            security=security, server_url=f"{load.url}/v2/analysis/{CLOUD}", async_client=http
        ) as sdk,
    ):
        send = getattr(sdk.analyze, f"{load.model}_async")

        async def call(number: int) -> object:
            answer: object = await send(source={"uri": build_image_url(number)})
            return answer

        yield call
