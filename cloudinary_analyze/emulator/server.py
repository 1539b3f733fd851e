"""The emulator: an aiohttp server that replaces the Analyze API on this machine.

It has the routes, the authentication and the lifecycle. The other modules of the package decide the
responses.
"""

from __future__ import annotations

import asyncio
import base64
import socket
import struct
from collections import deque
from collections.abc import Iterable, Mapping
from datetime import datetime
from html import escape
from http import HTTPStatus
from secrets import token_hex
from typing import Any, Final, Literal, Self
from urllib.parse import quote

import attrs
from aiohttp import web

from cloudinary_analyze.emulator._json import dump_json
from cloudinary_analyze.emulator.analyses import compute_cost, compute_latency
from cloudinary_analyze.emulator.canned import CannedResults, find_analysis, find_refusal
from cloudinary_analyze.emulator.counts import Counts
from cloudinary_analyze.emulator.faults import FaultDesk, FaultPlan
from cloudinary_analyze.emulator.gallery import (
    build_gallery_scene,
    read_picture_number,
    render_picture,
)
from cloudinary_analyze.emulator.models import FREE_PLAN, PATH_NAMES, Model
from cloudinary_analyze.emulator.notices import EmulatedTask, build_result
from cloudinary_analyze.emulator.quotas import Charge, QuotaBook, QuotaExhausted
from cloudinary_analyze.emulator.scheduler import Scheduler
from cloudinary_analyze.emulator.tasks import TaskDesk
from cloudinary_analyze.emulator.validation import (
    NOT_SUBSCRIBED,
    AnalyzeRequest,
    Refusal,
    read_analyze_request,
    refuse_invalid,
)
from cloudinary_analyze.emulator.webhooks import Hook, WebhookPolicy, WebhookSender

CLOUD_NAME_PREFIX: Final = "emulator-"
SERVER_NAME: Final = "CloudinaryAnalyzeEmulator (synthetic analyses)"
_MAX_BODY: Final = 1 << 20
_LISTED_PICTURES: Final = 24
_MOST_REQUESTS: Final = 10_000
_STOP_SECONDS: Final = 0.1
_HTML_502: Final = b"<html><head><title>502 Bad Gateway</title></head><body>502</body></html>"
_LINGER_ZERO: Final = struct.pack("ii", 1, 0)


def _check_features(_emulator: Any, _attribute: Any, features: Iterable[str] | None) -> None:
    unknown = set(features or ()) - set(FREE_PLAN)
    if unknown:
        raise ValueError(
            f"No feature is called {', '.join(sorted(unknown))}: "
            f"the features are {', '.join(FREE_PLAN)}."
        )


def _check_cloud_name(_emulator: Any, _attribute: Any, name: str) -> None:
    if not name.startswith(CLOUD_NAME_PREFIX):
        raise ValueError(
            f"The cloud name of an emulator begins with {CLOUD_NAME_PREFIX!r}, so that synthetic "
            f"results are never taken for real ones; got {name!r}."
        )


def _refill(emulator: Any, _attribute: Any, quotas: Mapping[str, int] | None) -> Any:
    emulator._quota_book.refill(quotas)  # noqa: SLF001 - of the emulator itself
    return quotas


Seconds = float | Literal["realistic"]


def _check_seconds(_emulator: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value == "realistic":
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ValueError(
            f"{attribute.name} is 'realistic' or a number of seconds, 0 or more; not {value!r}."
        )


@attrs.define(eq=False, kw_only=True)
class Emulator:
    """A local emulator of the Analyze API.

    ``async with Emulator() as emulator:`` serves on a free port of this machine until the end of the
    block. Its analyses are synthetic: the same source and parameters always give the same analysis.
    Gallery images (`sample_url`) are described accurately. No URLs are fetched. Calls with another
    cloud name get 404, and bad credentials get 401.

    ``unsubscribed``, ``quotas``, ``latency``, ``task_seconds``, ``results_in_status``,
    ``on_delivery`` and ``faults`` can be set while it runs.

    Attributes:
        host: The address to listen on.
        port: The port to listen on; 0 takes a free one.
        cloud_name: The only cloud name that exists. It begins with ``emulator-``.
        api_key: The key of Basic authentication.
        api_secret: The secret of Basic authentication. It also signs notifications.
        oauth_token: The token of Bearer authentication.
        unsubscribed: Features whose add-on is not subscribed. Their calls get 403.
        quotas: Units per feature. A feature whose units are used up gets 429. ``None``: no quotas.
        reset_time: The end of the period in ``limits`` (aware). The live service sends none.
        latency: Seconds that an analysis takes. ``"realistic"``: as long as the service takes.
        task_seconds: Seconds that a task takes, or ``"realistic"``.
        results_in_status: Whether the status of a completed task carries its result, as the
            service's sibling APIs do. The Analyze API itself does not.
        webhooks: How notifications are delivered.
        on_delivery: Called with every notification, instead of a POST, on the emulator's loop. It
            must not block. A notification counts as refused if the function raises, or if an async
            function returns ``False``.
        faults: The faults to inject. Default: none.
        seed: Determines which sources have faults.
        count_sources: Whether `counts` are kept per source and per task, and the last requests are
            kept.
        counts: The counters of the server.
        tasks: Every task that was accepted, by id.
    """

    host: str = "127.0.0.1"
    port: int = 0
    cloud_name: str = attrs.field(default="emulator-demo", validator=_check_cloud_name)
    api_key: str = "123456789012345"
    api_secret: str = attrs.field(default="emulator-secret", repr=False)
    oauth_token: str = attrs.field(default="emulator-oauth-token", repr=False)
    unsubscribed: frozenset[str] = attrs.field(
        default=frozenset(), converter=frozenset, validator=_check_features
    )
    quotas: Mapping[str, int] | None = attrs.field(
        default=None,
        validator=_check_features,
        on_setattr=attrs.setters.pipe(attrs.setters.validate, _refill),
    )
    reset_time: datetime | None = None
    latency: Seconds | None = attrs.field(
        default=None, validator=attrs.validators.optional(_check_seconds)
    )
    task_seconds: Seconds = attrs.field(default=0.05, validator=_check_seconds)
    results_in_status: bool = False
    webhooks: WebhookPolicy = attrs.field(factory=WebhookPolicy)
    on_delivery: Hook | None = attrs.field(default=None, repr=False)
    faults: FaultPlan | None = None
    seed: int = 0
    count_sources: bool = True
    counts: Counts = attrs.field(init=False, repr=False)
    tasks: dict[str, EmulatedTask] = attrs.field(factory=dict, init=False, repr=False)
    _quota_book: QuotaBook = attrs.field(init=False, repr=False)
    _fault_desk: FaultDesk = attrs.field(init=False, repr=False)
    _canned: CannedResults = attrs.field(factory=CannedResults, init=False, repr=False)
    _received: deque[AnalyzeRequest] = attrs.field(init=False, repr=False)
    _credentials: frozenset[str] = attrs.field(init=False, repr=False)
    _desk: TaskDesk = attrs.field(init=False, repr=False)
    _runner: web.AppRunner | None = attrs.field(default=None, init=False, repr=False)
    _url: str | None = attrs.field(default=None, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self.counts = Counts(per_source=self.count_sources)
        self._quota_book = QuotaBook(self.quotas, self.reset_time)
        self._fault_desk = FaultDesk(lambda: self.faults, self.seed)
        self._received = deque(maxlen=_MOST_REQUESTS if self.count_sources else 0)
        basic = base64.b64encode(f"{self.api_key}:{self.api_secret}".encode()).decode()
        self._credentials = frozenset({f"basic {basic}", f"bearer {self.oauth_token}"})

    @property
    def url(self) -> str:
        """``http://host:port`` of the running server.

        Raises:
            RuntimeError: The emulator is not running.
        """
        if self._url is None:
            raise RuntimeError("The emulator is not running: enter it with `async with` first.")
        return self._url

    @property
    def cloudinary_url(self) -> str:
        """The ``CLOUDINARY_URL`` that leads a client to the running server."""
        credentials = f"{quote(self.api_key, safe='')}:{quote(self.api_secret, safe='')}"
        return f"cloudinary://{credentials}@{self.cloud_name}?upload_prefix={self.url}"

    def sample_url(self, index: int) -> str:
        """Return the URL of a gallery image, which this server serves.

        Args:
            index: The number of the image, from 0.
        """
        return f"{self.url}/samples/{index}.png"

    def sample_urls(self, count: int) -> list[str]:
        """Return the URLs of the first ``count`` gallery images."""
        return [self.sample_url(index) for index in range(count)]

    def banner(self) -> str:
        """Return a line with the URL and a notice that analyses are synthetic."""
        return (
            f"Analyze API emulator on {self.url} (cloud name {self.cloud_name}): analyses are "
            "synthetic, nothing is fetched or sent to Cloudinary."
        )

    async def start(self) -> None:
        """Start to serve. ``async with`` does this for you. Cancelling is safe: nothing stays open.

        Raises:
            OSError: The port is in use.
        """
        self._desk = self._build_desk(Scheduler(asyncio.get_running_loop()))
        runner = web.AppRunner(self._build_app(), access_log=None, shutdown_timeout=_STOP_SECONDS)
        await runner.setup()
        try:
            await web.TCPSite(runner, self.host, self.port).start()
        except BaseException:
            await runner.cleanup()
            raise
        port = runner.addresses[0][1]
        self._runner = runner
        self._url = f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{port}"

    async def stop(self) -> None:
        """Stop. Requests in flight are cut off, and unsent notifications are dropped. Idempotent.

        A cancelled stop may leave connections open until the event loop closes.
        """
        runner, self._runner, self._url = self._runner, None, None
        if runner is None:
            return
        self._desk.scheduler.close()
        await self._desk.sender.close()
        await runner.cleanup()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def _build_desk(self, scheduler: Scheduler) -> TaskDesk:
        sender = WebhookSender(
            self.webhooks,
            self.api_secret,
            self._quota_book,
            scheduler,
            self.counts,
            lambda: self.on_delivery,
        )
        return TaskDesk(scheduler, sender, self._fault_desk, self.tasks)

    def _build_app(self) -> web.Application:
        app = web.Application(client_max_size=_MAX_BODY)
        app.router.add_post(
            "/v2/analysis/{cloud}/analyze/{model}", self._analyze, expect_handler=_handle_expect
        )
        app.router.add_get("/v2/analysis/{cloud}/tasks/{task_id}", self._get_status)
        app.router.add_get("/samples/", self._list_samples)
        app.router.add_get("/samples/{name}", self._get_sample)
        app.router.add_route("*", "/{path:.*}", self._refuse_path, expect_handler=_handle_expect)
        return app

    async def _analyze(self, request: web.Request) -> web.StreamResponse:
        self.counts.enter()
        try:
            model = PATH_NAMES.get(request.match_info["model"])
            body = await self._read_call(request)
            if model is None:
                raise Refusal(404, "not found")
            return await self._answer(request, read_analyze_request(model, body))
        except Refusal as refusal:
            return self._build_refusal(refusal)
        finally:
            self.counts.leave()

    async def _read_call(self, request: web.Request) -> bytes:
        self._authorise(request)
        try:
            body = await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise Refusal(413, "request entity too large") from None
        if request.content_type != "application/json":
            raise refuse_invalid("Content-Type must be application/json")
        return body

    def _authorise(self, request: web.Request) -> None:
        scheme, _, value = request.headers.get("Authorization", "").partition(" ")
        if f"{scheme.lower()} {value.strip()}" not in self._credentials:
            raise Refusal(401, "unauthorized", category="auth_error")
        if request.match_info["cloud"] != self.cloud_name:
            raise Refusal(404, "not found", details={"message": "No such cloud name"})

    async def _answer(self, http: web.Request, request: AnalyzeRequest) -> web.StreamResponse:
        name, source = request.model.name, request.source
        self.counts.count_received(name, source)
        self._received.append(request)
        self._check_subscription(request.model)
        fault = self._fault_desk.choose_http_fault(name, source)
        if fault is not None:
            self.counts.http_faults[fault] += 1
            if fault == "reset_connection":
                return self._cut(http, reset=True)
            if (early := self._build_fault(fault)) is not None:
                return early
        perform = self._accept if request.asynchronous else self._work
        return await self._spoil(http, await perform(request), fault)

    async def _accept(self, request: AnalyzeRequest) -> web.Response:
        canned = self._canned.take(request.model.name, request.source)
        charge = self._charge(request) if find_refusal(request, canned) is None else None
        task = self._desk.accept(
            request,
            charge,
            canned=canned,
            seconds=_compute_seconds(self.task_seconds, request),
            faults=self._fault_desk.choose_task_faults(request.model.name, request.source),
        )
        if "early" in task.faults:
            await self._desk.finish_early(task)
        data = {"task_id": task.task_id, "status": "pending"}
        return _build_json(202, {"data": data, "request_id": task.request_id})

    async def _work(self, request: AnalyzeRequest) -> web.Response:
        canned = self._canned.take(request.model.name, request.source)
        if (refusal := find_refusal(request, canned)) is not None:
            raise refusal
        charge = self._charge(request)
        if self.latency is not None:
            await asyncio.sleep(_compute_seconds(self.latency, request))
        content = {
            "limits": self._quota_book.build_limits(charge),
            "request_id": token_hex(16),
            "data": {"entity": request.source, "analysis": find_analysis(request, canned)},
        }
        return _build_json(200, content)

    async def _get_status(self, request: web.Request) -> web.Response:
        try:
            self._authorise(request)
            task = self.tasks.get(request.match_info["task_id"])
            if task is None:
                raise Refusal(404, "not found")
        except Refusal as refusal:
            return self._build_refusal(refusal)
        self.counts.count_poll(task.task_id)
        status = task.read_status(self._desk.scheduler.loop.time())
        data = {"task_id": task.task_id, "status": status}
        if self.results_in_status and status == "completed":
            data |= build_result(task)
        return _build_json(200, {"data": data, "request_id": token_hex(16)})

    def _charge(self, request: AnalyzeRequest) -> Charge:
        charge = self._quota_book.charge(request.model.feature, compute_cost(request))
        self.counts.count_done(request.model.name, request.source)
        return charge

    def _check_subscription(self, model: Model) -> None:
        if model.feature in self.unsubscribed:
            raise Refusal(
                403,
                "account does not have an active subscription for feature",
                category="auth_error",
                code=NOT_SUBSCRIBED,
                details={"feature_name": model.feature},
            )

    def _build_fault(self, fault: str) -> web.Response | None:
        """Return the response of a fault that occurs before the work, if it is one."""
        match fault:
            case "error_500":
                return self._build_refusal(
                    Refusal(500, "internal server error", category="server_error")
                )
            case "error_502_html":
                return web.Response(
                    status=502,
                    body=_HTML_502,
                    headers={"Server": SERVER_NAME, "Content-Type": "text/html"},
                )
            case "error_503":
                response = self._build_refusal(
                    Refusal(503, "service unavailable", category="server_error")
                )
            case "rate_limited_429":
                response = self._build_refusal(
                    Refusal(429, "too many requests", category="rate_limit_error")
                )
            case _:
                return None
        if self.faults is not None and self.faults.retry_after is not None:
            response.headers["Retry-After"] = f"{self.faults.retry_after:.10g}"
        return response

    async def _spoil(
        self, http: web.Request, response: web.Response, fault: str | None
    ) -> web.StreamResponse:
        """Apply a fault that occurs after the work."""
        if fault == "drop_response":
            return self._cut(http, reset=False)
        if fault == "slow" and self.faults is not None:
            await asyncio.sleep(self.faults.slow_seconds)
        elif fault == "truncated_json":
            body = bytes(response.body)  # type: ignore[arg-type]
            response.body = body[: len(body) // 2]
        return response

    def _cut(self, http: web.Request, *, reset: bool) -> web.StreamResponse:
        """Close a connection without a response."""
        transport = http.transport
        if transport is not None:
            if reset:
                connection = transport.get_extra_info("socket")
                # Closing with a linger of zero sends a reset instead of an orderly end.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
            transport.abort()
        return web.Response(status=HTTPStatus.NO_CONTENT)

    def _build_refusal(self, refusal: Refusal) -> web.Response:
        content: dict[str, Any] = {"error": refusal.build_error(token_hex(16))}
        if isinstance(refusal, QuotaExhausted):
            content["limits"] = self._quota_book.build_limits(refusal.charge)
        return _build_json(refusal.status, content)

    async def _refuse_path(self, _request: web.Request) -> web.Response:
        return self._build_refusal(Refusal(404, "not found"))

    async def _list_samples(self, _request: web.Request) -> web.Response:
        pictures = "\n".join(
            f'<figure><img src="{index}.png" width="320" alt=""><figcaption>{index}: '
            f"{escape(build_gallery_scene(index).describe())}</figcaption></figure>"
            for index in range(_LISTED_PICTURES)
        )
        page = f"<!doctype html>\n<title>Sample pictures</title>\n{pictures}\n"
        headers = {"Server": SERVER_NAME, "Content-Type": "text/html; charset=utf-8"}
        return web.Response(body=page.encode(), headers=headers)

    async def _get_sample(self, request: web.Request) -> web.Response:
        number = read_picture_number(request.match_info["name"])
        if number is None:
            return await self._refuse_path(request)
        headers = {"Server": SERVER_NAME, "Content-Type": "image/png"}
        return web.Response(body=render_picture(number), headers=headers)


async def _handle_expect(request: web.Request) -> None:
    """Answer ``Expect: 100-continue``. aiohttp's own handler fails if the header is not UTF-8."""
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def _compute_seconds(seconds: Seconds, request: AnalyzeRequest) -> float:
    return compute_latency(request) if seconds == "realistic" else float(seconds)


def _build_json(status: int, content: Any) -> web.Response:
    headers = {"Server": SERVER_NAME, "Content-Type": "application/json"}
    return web.Response(status=status, body=dump_json(content), headers=headers)
