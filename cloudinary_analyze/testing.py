"""For tests of applications: a clock that stands still until it is moved, and pytest fixtures.

Use the clock as ``AnalyzeSession(…, clock=ManualClock())`` and move it with `ManualClock.advance`.
The fixtures are there once a ``conftest.py`` says
``pytest_plugins = ["cloudinary_analyze.testing"]``:

* ``cloudinary_emulator``: a running `Emulator`, on a loop and thread of its own, so that it serves
  synchronous tests as well; ``CLOUDINARY_URL`` leads to it while the test runs.
* ``manual_clock``: a `ManualClock`.

`build_response` makes a response for tests of code that receives one.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from functools import partial
from typing import Any, Final, TypeVar, overload

import attrs

from cloudinary_analyze._clock import wake
from cloudinary_analyze._wire.protocol import build_body
from cloudinary_analyze.emulator import Emulator
from cloudinary_analyze.emulator.analyses import build_analysis, compute_cost
from cloudinary_analyze.emulator.models import FREE_PLAN
from cloudinary_analyze.emulator.models import MODELS as EMULATED
from cloudinary_analyze.emulator.validation import Refusal, read_analyze_request
from cloudinary_analyze.errors import InvalidRequestError
from cloudinary_analyze.requests import AnalyzeRequest, find_request_type
from cloudinary_analyze.responses import JSONObject, Response

__all__ = ["ManualClock", "build_response", "run_emulator"]

A = TypeVar("A")

SOURCE: Final = "https://images.example/a.jpg"
_PARAMETERS: Final[Mapping[str, Mapping[str, Any]]] = {
    "ai_vision_general": {"prompts": ("What does the image show?",)},
    "ai_vision_moderation": {"rejection_questions": ("Is there any violence?",)},
    "ai_vision_tagging": {"tag_definitions": {"cat": "Does the image show a cat?"}},
}


@attrs.define(eq=False)
class _Timer:
    callback: Callable[[], None] | None

    def cancel(self) -> None:
        self.callback = None


@attrs.define(eq=False)
class ManualClock:
    """A clock that moves only when told to.

    Attributes:
        now: Seconds since the clock was made; the monotonic reading.
        started_at: Unix seconds of the wall clock at ``now == 0``.
    """

    now: float = 0.0
    started_at: float = attrs.field(default=1_790_000_000.0, kw_only=True)
    _timers: list[tuple[float, int, _Timer]] = attrs.field(factory=list, init=False)
    _order: itertools.count[int] = attrs.field(factory=itertools.count, init=False)

    def monotonic(self) -> float:
        """Return the reading."""
        return self.now

    def wall(self) -> float:
        """Return the wall clock's reading, which moves with the other."""
        return self.started_at + self.now

    def call_at(self, when: float, callback: Callable[[], None], /) -> _Timer:
        """Run a callback once the clock was moved to an instant; at once if that is past."""
        timer = _Timer(callback)
        if when <= self.now:
            asyncio.get_running_loop().call_soon(self._fire, timer)
        else:
            heapq.heappush(self._timers, (when, next(self._order), timer))
        return timer

    async def sleep(self, seconds: float) -> None:
        """Wait until the clock was moved on."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        woken = asyncio.get_running_loop().create_future()
        timer = self.call_at(self.now + seconds, partial(wake, woken))
        try:
            await woken
        finally:
            timer.cancel()

    def timeout_at(self, deadline: float, /) -> AbstractAsyncContextManager[asyncio.Timeout]:
        """Time the block out once the clock was moved to an instant."""
        return self._timeout_at(deadline)

    @asynccontextmanager
    async def _timeout_at(self, deadline: float) -> AsyncIterator[asyncio.Timeout]:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(None) as scope:
            timer = self.call_at(deadline, lambda: scope.reschedule(loop.time()))
            try:
                yield scope
            finally:
                timer.cancel()

    @property
    def next_at(self) -> float | None:
        """When the next callback is due; ``None`` if nothing waits for this clock."""
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    async def advance(self, seconds: float) -> None:
        """Move the clock on, stopping at every callback that is due on the way.

        Args:
            seconds: How far.
        """
        target = self.now + seconds
        await _settle()
        while (due := self.next_at) is not None and due <= target:
            self.now = max(self.now, due)
            self._fire(heapq.heappop(self._timers)[2])
            await _settle()
        self.now = target
        await _settle()

    @staticmethod
    def _fire(timer: _Timer) -> None:
        callback, timer.callback = timer.callback, None
        if callback is not None:
            callback()


async def _settle() -> None:
    """Let everything that can run on the loop run a few steps."""
    for _ in range(10):
        await asyncio.sleep(0)


@overload
def build_response(
    request: type[AnalyzeRequest[A]], analysis: JSONObject | None = None
) -> Response[A]: ...


@overload
def build_response(
    request: AnalyzeRequest[A], analysis: JSONObject | None = None
) -> Response[A]: ...


@overload
def build_response(request: str, analysis: JSONObject | None = None) -> Response[Any]: ...


def build_response(
    request: type[AnalyzeRequest[Any]] | AnalyzeRequest[Any] | str,
    analysis: JSONObject | None = None,
) -> Response[Any]:
    """Build a response as the service sends it; the same request gives the same response.

    Args:
        request: A request, its class (``Coco``), or a model's name.
        analysis: The ``data.analysis`` object, such as ``{"data": {"caption": "a cat"}}``.
            Default: what the emulator answers to the request.

    Raises:
        InvalidRequestError: The model is unknown, or the emulator has no result for the request.
        ResponseDecodeError: The analysis is not of the model's shape.
    """
    if isinstance(request, str):
        request = find_request_type(request)
    if isinstance(request, type):
        request = request(SOURCE, **_PARAMETERS.get(request.model_name, {}))
    cost = 1
    if analysis is None:
        analysis, cost = _emulate(request)
    feature = request.feature or request.model
    quota = FREE_PLAN.get(feature, 1000)
    limit = {"type": feature, "used_by_request": cost, "remaining": quota - cost, "limit": quota}
    raw = {
        "limits": {"addons_quota": [limit]},
        "request_id": f"{zlib.crc32(request.key.encode()):032x}",
        "data": {"entity": str(request.source), "analysis": dict(analysis)},
    }
    return Response.from_raw(request, raw)


def _emulate(request: AnalyzeRequest[Any]) -> tuple[JSONObject, int]:
    """Return the emulator's analysis and its cost."""
    model = EMULATED.get(request.model)
    if model is None:
        raise InvalidRequestError(f"The emulator has no model {request.model!r}; pass `analysis`.")
    try:
        emulated = read_analyze_request(model, build_body(request))
    except Refusal as refusal:
        raise InvalidRequestError(f"The emulator refuses the request: {refusal.message}.") from None
    analysis = build_analysis(emulated)
    if analysis is None:
        raise InvalidRequestError("The emulator has no image at this source; pass `analysis`.")
    return analysis, compute_cost(emulated)


@contextmanager
def run_emulator(emulator: Emulator) -> Iterator[Emulator]:
    """Run an emulator on a loop and thread of its own, for code that brings its own loop.

    Args:
        emulator: Not started yet. Its counts may be read from the outside.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="emulator")
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(emulator.start(), loop).result()
        try:
            yield emulator
        finally:
            asyncio.run_coroutine_threadsafe(emulator.stop(), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


try:
    import pytest
except ImportError:  # the clock is of use without pytest, too
    pass
else:

    @pytest.fixture
    def cloudinary_emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
        """Return a running emulator that ``AnalyzeSession()`` calls."""
        with run_emulator(Emulator()) as emulator:
            monkeypatch.setenv("CLOUDINARY_URL", emulator.cloudinary_url)
            yield emulator

    @pytest.fixture
    def manual_clock() -> ManualClock:
        """Return a clock that stands still until it is moved."""
        return ManualClock()
