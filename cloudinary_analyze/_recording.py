"""Bulk work with a ledger: what is known is not asked again, what is learned is recorded first.

Stands between the windowed stream and the session's calls. `is_final` decides; `Recording` does the steps in the order that makes a kill at any moment harmless.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, Generic, TypeVar

import attrs

from cloudinary_analyze._clock import Clock
from cloudinary_analyze._policy import is_final
from cloudinary_analyze._tasks.handle import AnalysisTask, follow
from cloudinary_analyze._tasks.tracker import Tracker
from cloudinary_analyze._wire.protocol import Accepted, read_result
from cloudinary_analyze.config import Settings
from cloudinary_analyze.errors import (
    AnalyzeError,
    InvalidRequestError,
    LedgerError,
    NotFoundError,
)
from cloudinary_analyze.protocols import Ledger, LedgerRecord
from cloudinary_analyze.requests import AnalyzeRequest, KeyBuilder
from cloudinary_analyze.responses import JSONObject, Response

Item = TypeVar("Item")
A = TypeVar("A")
T = TypeVar("T")

logger = logging.getLogger("cloudinary_analyze")

SENDING: Final = 2  # times the permits: one half on the wire, one half retrying or waiting
POST_PATIENCE: Final = 5.0  # seconds for submissions on the wire when the stream is left
BURST: Final = 64  # answers from the ledger between two yields to the loop


def restore_response(request: AnalyzeRequest[A], raw: JSONObject) -> Response[A]:
    """Build the response from its JSON.

    Raises:
        ResponseDecodeError: It holds no analysis of the request's model.
    """
    return read_result(request.model, request.analysis_type, raw)


# (response, error); None if who asked was cancelled
Shared = asyncio.Future[tuple[Response[Any] | None, Exception | None] | None]


@attrs.define(eq=False, repr=False, kw_only=True)
class Recording(Generic[Item]):
    """The way of one stream's items through a ledger.

    Attributes:
        ledger: What remembers.
        name: The name of an item, which stands in its key for the source; ``None``: the source.
        as_tasks: Whether requests are submitted as tasks, or made as calls.
        tracker: Sends them, and brings tasks to their answer.
        settings: How to call.
        clock: For the deadlines.
        shared: The requests under way in the session, by ledger and key.
        failure: Why the ledger broke, if it did. Nothing is sent from then on.
    """

    ledger: Ledger
    name: Callable[[Item], str] | None
    as_tasks: bool
    tracker: Tracker
    settings: Settings
    clock: Clock
    shared: dict[tuple[int, str], Shared]
    failure: LedgerError | None = attrs.field(default=None, init=False)
    _sending: asyncio.Semaphore = attrs.field(init=False)
    _restored: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        # a stream that is left, or whose ledger breaks, must not have its whole window committed
        self._sending = asyncio.Semaphore(SENDING * self.settings.permits)

    async def open(self) -> None:
        """Open the ledger.

        Raises:
            LedgerError: It cannot be.
        """
        caller = self.tracker.caller
        await self._ask(self.ledger.open(base_url=caller.base_url, cloud_name=caller.cloud_name))

    async def perform(self, item: Item, request: AnalyzeRequest[A]) -> Response[A]:
        """Return the response from the ledger or the service; final answers are durable then.

        Raises:
            LedgerError: The ledger broke; whether the service was asked is not known to it.
            AnalyzeError: As the call or the task raises.
        """
        key = self._make_key(item, request)
        slot = (id(self.ledger), key)
        while (other := self.shared.get(slot)) is not None:
            outcome = await asyncio.shield(other)
            if outcome is None:
                continue  # it was cancelled, and somebody else must ask
            response, error = outcome
            if error is not None:
                raise error
            assert response is not None
            return response
        mine: Shared = asyncio.get_running_loop().create_future()
        self.shared[slot] = mine
        try:
            response = await self._settle(key, request)
        except Exception as error:
            mine.set_result((None, error))
            raise
        else:
            mine.set_result((response, None))
            return response
        finally:
            del self.shared[slot]
            if not mine.done():
                mine.set_result(None)

    def _make_key(self, item: Item, request: AnalyzeRequest[A]) -> str:
        if self.name is None:
            return request.key
        name = self.name(item)
        if not isinstance(name, str) or not name:
            raise InvalidRequestError(
                f"`key` must return a non-empty string for each item, not {name!r:.80}."
            )
        return KeyBuilder(request).build_named(name)

    async def _settle(self, key: str, request: AnalyzeRequest[A]) -> Response[A]:
        record = await self._ask(self.ledger.find(key))
        if record is not None and (record.response is not None or record.error is not None):
            self._restored += 1
            if self._restored % BURST == 0:
                await asyncio.sleep(0)
            if record.response is not None:
                return restore_response(request, record.response)
            assert record.error is not None
            raise record.error
        begun = self.clock.monotonic()
        try:
            response = await self._obtain(key, request, record)
        except AnalyzeError as error:
            if is_final(error):
                seconds = self.clock.monotonic() - begun
                await self._ask(self.ledger.record_error(key, error, seconds=seconds))
            raise
        seconds = self.clock.monotonic() - begun
        await self._ask(self.ledger.record_response(key, response, seconds=seconds))
        return response

    async def _obtain(
        self, key: str, request: AnalyzeRequest[A], record: LedgerRecord | None
    ) -> Response[A]:
        if record is not None and record.task_id is not None:
            try:
                return await self._resume(record.task_id, request)
            except NotFoundError as error:
                if error.model is not None:
                    raise  # not the task is unknown, but the source of a repeated call
        if self.as_tasks:
            return await self._submit(key, request)
        async with self._sending:
            self._check()
            answer = await self.tracker.caller.analyze(
                request, deadline=self._deadline(self.settings.call_timeout)
            )
        if not isinstance(answer, Accepted):
            return answer
        task = self._attach(answer.task_id, request, just_accepted=True)
        return await follow(task, on_accepted=partial(self._record_submitted, key))

    async def _submit(self, key: str, request: AnalyzeRequest[A]) -> Response[A]:
        async with self._sending:
            self._check()
            task = self.tracker.submit(
                request, as_task=True, deadline=self._deadline(self.settings.task_timeout)
            )
            try:
                await task.accepted()
            except asyncio.CancelledError:
                await self._await_acceptance(key, task)
                raise
        return await follow(task, on_accepted=partial(self._record_submitted, key))

    async def _record_submitted(self, key: str, task_id: str) -> None:
        await self._ask(self.ledger.record_submitted(key, task_id))

    async def _await_acceptance(self, key: str, task: AnalysisTask[Any]) -> None:
        """Let a submission in flight finish, because its task is paid for."""
        try:
            async with self.clock.timeout_at(self.clock.monotonic() + POST_PATIENCE):
                task_id = await task.accepted()
                if task_id is not None:
                    await self.ledger.record_submitted(key, task_id)
        except Exception as error:
            logger.debug("A submission was given up: %r", error)
        finally:
            task.withdraw()

    async def _resume(self, task_id: str, request: AnalyzeRequest[A]) -> Response[A]:
        """Re-attach a task of an earlier run, unless the service has forgotten it.

        Raises:
            NotFoundError: It has. Its result is lost, and only a new request helps.
        """
        task = self._attach(task_id, request)
        try:
            if not await task.is_known():
                raise NotFoundError(f"The service does not know the task {task_id}.")
        except BaseException:
            task.withdraw()
            raise
        return await follow(task)

    def _attach(
        self, task_id: str, request: AnalyzeRequest[A], *, just_accepted: bool = False
    ) -> AnalysisTask[A]:
        return self.tracker.attach(
            task_id,
            request.model,
            request.analysis_type,
            request=request,
            just_accepted=just_accepted,
            deadline=self._deadline(self.settings.task_timeout),
        )

    def _deadline(self, seconds: float | None) -> float | None:
        return None if seconds is None else self.clock.monotonic() + seconds

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure

    async def _ask(self, answer: Awaitable[T]) -> T:
        """Await the ledger; whatever it raises breaks it for this stream."""
        try:
            return await answer
        except LedgerError as error:
            self.failure = error
            raise
        except Exception as error:
            self.failure = LedgerError(
                f"The ledger failed ({type(error).__name__}: {error}), so no answer can be "
                "recorded. Mend it and run again; what was recorded is kept."
            )
            raise self.failure from error
