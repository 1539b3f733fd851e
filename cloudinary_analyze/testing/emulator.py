"""The emulator for tests: a test sets its results and checks the requests that it received."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from cloudinary_analyze.config import Credentials
from cloudinary_analyze.emulator import Emulator
from cloudinary_analyze.emulator.canned import CannedResult, CannedResults
from cloudinary_analyze.emulator.models import MODELS as EMULATED
from cloudinary_analyze.emulator.validation import AnalyzeRequest as ReceivedRequest
from cloudinary_analyze.errors import InvalidRequestError
from cloudinary_analyze.requests import AnalyzeRequest, Asset, find_request_type
from cloudinary_analyze.responses import JSONObject
from cloudinary_analyze.testing.responses import build_response

E = TypeVar("E", bound=Emulator)


class ScriptedEmulator(Emulator):
    """An `Emulator` whose results a test sets. It records the requests that it receives.

    Requests that `respond` does not cover get synthetic results, as from any emulator. For faults,
    set ``faults`` to a `FaultPlan`, also while the emulator runs.
    """

    def respond(
        self,
        request: type[AnalyzeRequest[Any]] | AnalyzeRequest[Any] | str,
        analysis: JSONObject | None = None,
        *,
        status: int = 200,
        times: int | None = None,
    ) -> None:
        """Set the result of a model, or of a model for one source, or the error that it ends with.

        A call gets it in its response, a task in its notification. A rule for one source is used
        before a rule for its model. Rules for the same target are used in the order in which they
        were set; a rule without ``times`` lasts until another is set for its target.

        Args:
            request: A request class or a model's name, for every source, or a request, for its
                source.
            analysis: The ``data.analysis`` object, such as ``{"data": {"caption": "A cat"}}``; for
                another model, look at ``build_response(Coco).raw["data"]["analysis"]``. Default:
                the synthetic one.
            status: The HTTP status of an error, such as 404 or 503.
            times: How many requests it serves. A retry counts as a request. Default: no limit.

        Raises:
            InvalidRequestError: The emulator does not have the model, or an argument is invalid.
            ResponseDecodeError: The analysis does not have the model's shape.
        """
        kind = find_request_type(request) if isinstance(request, str) else request
        model = kind.model_name if isinstance(kind, type) else kind.model
        if model not in EMULATED:
            raise InvalidRequestError(f"The emulator does not have the model {model!r}.")
        if status != 200 and (analysis is not None or not 400 <= status <= 599):
            raise InvalidRequestError(
                "Pass an analysis, or the status of an error from 400 to 599, but not both."
            )
        if times is not None and times < 1:
            raise InvalidRequestError(f"`times` must be 1 or more, not {times!r}.")
        if analysis is not None:  # checked, and copied
            analysis = build_response(kind, analysis).raw["data"]["analysis"]
        source = None if isinstance(kind, type) else _write_source(kind)
        self._canned.add(model, source, CannedResult(analysis, status, times))

    def reset(self) -> None:
        """Remove all rules, requests, faults and quotas, between tests that share an emulator.

        Other settings stay, and so does where notifications go.
        """
        self._canned = CannedResults()
        self._received.clear()
        # for type checkers: assigned to `self`, they would become attributes of this class
        options: Emulator = self
        options.faults = options.quotas = None

    @property
    def credentials(self) -> Credentials:
        """The credentials for the running server, which also sign its notifications."""
        return Credentials.from_url(self.cloudinary_url)

    @property
    def requests(self) -> list[AnalyzeRequest[Any]]:
        """The last 10,000 received requests, retries included, oldest first."""
        return [_read_received(received) for received in tuple(self._received)]


def _write_source(request: AnalyzeRequest[Any]) -> str:
    source = request.source
    return source.asset_id if isinstance(source, Asset) else source.uri


def _read_received(received: ReceivedRequest) -> AnalyzeRequest[Any]:
    """Return the request that the client made."""
    model, items = received.model, received.items
    parameters: dict[str, Any] = {}
    if model.list_field is not None:
        tags = model.list_field == "tag_definitions"
        parameters[model.list_field] = dict(items) if tags else items
    source = received.source if ":" in received.source else Asset(received.source)
    request: AnalyzeRequest[Any] = find_request_type(model.name)(source, **parameters)
    return request


@contextmanager
def run_emulator(emulator: E) -> Iterator[E]:
    """Run an emulator on a separate loop and thread, for code that brings its own loop.

    Args:
        emulator: An emulator that is not started. Any thread can read its counts.
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
