"""Send the items of a stream through a ledger.

`Recording` asks the ledger first and records before it returns, in an order that makes it safe to
kill the process at any moment. It is imported by the first stream with a ledger.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any, Final, TypeVar

import attrs

from cloudinary_analyze._cancellation import InterruptedSectionError, count_cancellations
from cloudinary_analyze._clock import wake
from cloudinary_analyze._policy import is_final
from cloudinary_analyze._sources import is_same_image
from cloudinary_analyze._tasks.handle import AnalysisTask, follow
from cloudinary_analyze._tasks.tracker import Tracker
from cloudinary_analyze._work import Sender, Work
from cloudinary_analyze.errors import (
    AnalyzeError,
    BudgetReachedError,
    BulkStoppedError,
    InvalidRequestError,
    LedgerError,
    NotFoundError,
    QuotaExceededError,
    TaskFailedError,
    TransportError,
    describe,
)
from cloudinary_analyze.events import ItemRestored
from cloudinary_analyze.protocols import Ledger, LedgerRecord
from cloudinary_analyze.requests import KeyBuilder
from cloudinary_analyze.responses import Response

Item = TypeVar("Item")
A = TypeVar("A")
T = TypeVar("T")

logger = logging.getLogger("cloudinary_analyze.ledger")

POST_PATIENCE: Final = 5.0  # seconds for submissions in flight when the stream is left
TURN: Final = 0.002  # seconds of restoring from the ledger between two yields to the loop
RESTORED_IN_A_TURN: Final = 16  # items while many workers restore


@attrs.define(eq=False, repr=False)
class Leader:
    """The item that sends the request for a key. Other items with the same key share its result.

    Attributes:
        work: The item.
        tracker: That of its session.
        end: Its response or error. ``None`` if it was cancelled, so that another item must send.
    """

    work: Work[Any, Any]
    tracker: Tracker
    end: asyncio.Future[Response[Any] | Exception | None]


# The requests in progress, by loop, ledger and key. Sessions may share a ledger.
_leaders: Final[dict[tuple[int, int, str], Leader]] = {}


class _NotAdmittedError(Exception):
    """The claim on a key was denied, or an earlier holder submitted a task for it."""

    def __init__(self, task_id: str | None = None) -> None:
        super().__init__()
        self.task_id = task_id


class _TaskForgottenError(Exception):
    """The service no longer knows a recorded task, so a new request is needed."""


@attrs.define(eq=False, repr=False)
class _Progress:
    """The progress of the request for a key.

    Attributes:
        task_id: Its task, if one is known. It is awaited, and no new request is sent.
        lost_task_id: A task that the service no longer knows.
        claimed: Whether this worker holds the claim on the key.
        noted: Whether the item was noted for later exports.
    """

    task_id: str | None = None
    lost_task_id: str | None = None
    claimed: bool = False
    noted: bool = False


@attrs.define(eq=False, repr=False, kw_only=True)
class Recording:
    """Sends the items of one stream through a ledger.

    Attributes:
        ledger: Where responses and final errors are recorded.
        sender: Sends what the ledger does not have.
    """

    ledger: Ledger
    sender: Sender
    _turn_began: float = attrs.field(default=0.0, init=False)
    _waiting: deque[asyncio.Future[None]] = attrs.field(factory=deque, init=False)

    async def open(self) -> None:
        """Open the ledger.

        Raises:
            LedgerError: It cannot be opened.
        """
        caller = self.sender.tracker.caller
        await self._ask(self.ledger.open(base_url=caller.base_url, cloud_name=caller.cloud_name))

    async def perform(self, work: Work[Item, A]) -> Response[A]:
        """Return the response from the ledger or the service.

        The response, or a final error, is durable by then, unless the ledger failed; see
        `Work.unrecorded`.

        Raises:
            LedgerError: The ledger failed. Nothing was sent.
            AnalyzeError: As the call or the task raises.
        """
        request = work.request
        key = request.key if work.name is None else KeyBuilder(request).build_named(work.name)
        loop = asyncio.get_running_loop()
        slot = (id(loop), id(self.ledger), key)
        while (leader := _leaders.get(slot)) is not None:
            shared = await self._share(leader, key, work)
            if shared is not None:
                return shared
        leader = _leaders[slot] = Leader(work, self.sender.tracker, loop.create_future())
        try:
            response = await self._look_up_or_send(key, work)
        except Exception as error:
            leader.end.set_result(error)
            raise
        else:
            leader.end.set_result(response)
            return response
        finally:
            del _leaders[slot]
            if not leader.end.done():
                leader.end.set_result(None)

    async def _share(self, leader: Leader, key: str, work: Work[Item, A]) -> Response[A] | None:
        """Return the response of another item. ``None`` if its request must be sent again.

        It must if that item was cancelled, or if its error concerns only its stream or its
        session, a different one.
        """
        source, other = str(work.request.source), str(leader.work.request.source)
        if not is_same_image(source, other):
            raise InvalidRequestError(
                f"The key {work.name!r:.80} names two sources, {other!r:.120} and "
                f"{source!r:.120}. Nothing was sent for the second. Give each source its own "
                "key."
            )
        end = await asyncio.shield(leader.end)
        if end is None:
            return None
        if isinstance(end, Exception) and (
            leader.tracker is not self.sender.tracker or _is_of_stream(end, leader.work, work)
        ):
            return None
        work.started, work.restored = leader.work.started, leader.work.restored
        work.unrecorded = leader.work.unrecorded
        work.recorded_seconds, _ = leader.work.measure()
        failure = end if isinstance(end, Exception) else None
        work.restored |= failure is None  # it was charged to the other item
        if work.restored:
            self._emit_restored(key, work, failure)
        if isinstance(end, Exception):
            work.unsent = leader.work.unsent
            raise end
        return end

    async def _look_up_or_send(self, key: str, work: Work[Item, A]) -> Response[A]:
        progress = _Progress()
        while True:
            if progress.task_id is None:
                record = await self._ask(self.ledger.find(key))
                if record is not None:
                    _check_source(record, work)
                if record is not None and record.final:
                    return await self._restore(record, work)
                if record is not None and record.task_id != progress.lost_task_id:
                    progress.task_id = record.task_id
            if not progress.noted:  # the item was noted when its request was sent
                await self._note(key, work)
                progress.noted = True
            work.check()
            try:
                if progress.task_id is None:
                    await work.reserve()
                response = await self._obtain(key, work, progress)
            except _NotAdmittedError as denied:
                work.settle(charged=False)
                work.started = None
                progress.task_id = denied.task_id
                if denied.task_id is None:
                    with suppress(InterruptedSectionError):  # nothing more is sent then
                        await work.waits.run(self._ask(self.ledger.watch(key)))
            except _TaskForgottenError:
                progress.lost_task_id, progress.task_id = progress.task_id, None
            except AnalyzeError as error:
                await self._record_failure(key, work, progress, error)
                raise
            except BaseException:
                self._release(key, progress, ambiguous=True)
                raise
            else:
                seconds, _ = work.measure()
                await self._record(
                    work, self.ledger.record_response(key, response, seconds=seconds)
                )
                return response

    async def _record(self, work: Work[Any, Any], recording: Awaitable[None]) -> None:
        """Await a record. If the ledger fails, the stream stops, but the paid response is kept."""
        try:
            await self._ask(recording)
        except LedgerError as error:
            work.lose_record(error)

    async def _note(self, key: str, work: Work[Any, Any]) -> None:
        request = work.request
        if work.name is not None:
            await self._ask(self.ledger.note_source(key, str(request.source)))
        await self._ask(
            self.ledger.note_item(
                key, source=str(request.source), model=request.model, index=work.index
            )
        )

    async def _restore(self, record: LedgerRecord, work: Work[Item, A]) -> Response[A]:
        work.restored, work.recorded_seconds = True, record.seconds or 0.0
        await self._wait_for_turn()
        self._emit_restored(record.key, work, record.error)
        if record.response is not None:
            return Response.from_raw(work.request, record.response)
        assert record.error is not None
        raise record.error

    async def _wait_for_turn(self) -> None:
        """Let other tasks run from time to time, however many workers restore."""
        loop = asyncio.get_running_loop()
        if not self._waiting:
            if loop.time() - self._turn_began <= TURN:
                return
            loop.call_soon(self._begin_turn)
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _begin_turn(self) -> None:
        loop = asyncio.get_running_loop()
        self._turn_began = loop.time()
        for _ in range(min(RESTORED_IN_A_TURN, len(self._waiting))):
            wake(self._waiting.popleft())
        if self._waiting:
            loop.call_soon(self._begin_turn)

    def _emit_restored(self, key: str, work: Work[Any, Any], error: Exception | None) -> None:
        meter = self.sender.tracker.meter
        if meter.hook is not None:
            meter.emit(
                ItemRestored(
                    key=key, model=work.request.model, seconds=work.recorded_seconds, error=error
                )
            )

    async def _obtain(self, key: str, work: Work[Item, A], progress: _Progress) -> Response[A]:
        """Await the known task, or send the request."""

        async def claim() -> None:
            work.check()
            await self._claim(key, progress)

        async def record_task(task_id: str) -> None:
            progress.task_id = task_id
            await self._record(work, self.ledger.record_submitted(key, task_id))

        if progress.task_id is not None:
            return await self._resume(progress.task_id, work)
        work.claim = claim
        if not self.sender.as_tasks:
            return await self.sender.call(work, on_accepted=record_task)
        task = self.sender.submit(work)
        try:
            await task.accepted()
        except asyncio.CancelledError:
            try:
                if work.started is not None:
                    await self._await_acceptance(key, task)
            finally:  # a second cancellation ends the patience, not the withdrawal
                task.withdraw()
            raise
        return await follow(task, on_accepted=record_task)

    async def _claim(self, key: str, progress: _Progress) -> None:
        """Claim a key immediately before the first attempt of its request.

        Raises:
            _NotAdmittedError: Another worker holds the claim, or submitted a task before.
            TransportError: An earlier holder may have sent the request, so it is not repeated.
        """
        if progress.claimed:
            return  # the service has forgotten the task
        claim = await self._ask(self.ledger.claim(key))
        if claim is None:
            raise _NotAdmittedError
        progress.claimed = True
        if claim.task_id not in {None, progress.lost_task_id}:
            raise _NotAdmittedError(claim.task_id)
        if claim.ambiguous:
            if not self.sender.tracker.settings.retry_ambiguous:
                raise TransportError(
                    "Another worker stopped while it sent this request. It is not repeated, "
                    "because Settings.retry_ambiguous is false.",
                    ambiguous=True,
                )
            self.sender.tracker.meter.ambiguous_retries += 1

    async def _await_acceptance(self, key: str, task: AnalysisTask[Any]) -> None:
        """Let a submission in flight finish, because its task will be charged."""
        clock = self.sender.tracker.clock
        try:
            async with clock.timeout_at(clock.monotonic() + POST_PATIENCE):
                task_id = await task.accepted()
                if task_id is not None:
                    await self.ledger.record_submitted(key, task_id)
        except Exception as error:
            logger.debug("A submission was abandoned (%s).", describe(error))

    async def _resume(self, task_id: str, work: Work[Item, A]) -> Response[A]:
        """Re-attach to a recorded task, unless the service has forgotten it.

        Raises:
            _TaskForgottenError: The service has forgotten it.
        """
        work.start()
        task = self.sender.attach(task_id, work)
        try:
            if not await task.is_known():
                raise _TaskForgottenError
        except BaseException:
            task.withdraw()
            raise
        try:
            return await follow(task)
        except NotFoundError as error:
            if error.model is not None:
                raise  # a call was repeated: the service does not know its source
            raise _TaskForgottenError from error

    async def _record_failure(
        self, key: str, work: Work[Any, Any], progress: _Progress, error: AnalyzeError
    ) -> None:
        """Record a permanent error. For any other, record that the next run sends again."""
        if isinstance(error, LedgerError):
            return  # nothing more can be recorded; a claim expires
        if is_final(error):
            seconds, _ = work.measure()
            await self._record(work, self.ledger.record_error(key, error, seconds=seconds))
            return
        if progress.task_id is not None and isinstance(error, TaskFailedError | QuotaExceededError):
            # it has ended, or its repetition was refused; then the next run submits the item again
            await self._record(work, self.ledger.record_submitted(key, None))
        self._release(key, progress, ambiguous=error.ambiguous)

    def _release(self, key: str, progress: _Progress, *, ambiguous: bool) -> None:
        if not progress.claimed:
            return
        try:
            self.ledger.release(key, ambiguous=ambiguous)
        except Exception as error:
            raise _build_ledger_error(error) from error

    async def _ask(self, answer: Awaitable[T]) -> T:
        """Await the ledger. Any exception becomes a `LedgerError`."""
        cancelling = count_cancellations()
        try:
            return await answer
        except LedgerError:
            raise
        except Exception as error:
            raise _build_ledger_error(error) from error
        except asyncio.CancelledError as error:
            if count_cancellations() > cancelling:
                raise
            raise _build_ledger_error(error) from error


def _is_of_stream(error: Exception, failed: Work[Any, Any], work: Work[Any, Any]) -> bool:
    """Whether a failed item belongs to another stream, and its error concerns only that stream.

    Its stop, its budget and the errors of its other items do not apply to this stream.
    """
    stopped = failed.halted or isinstance(error, BudgetReachedError | BulkStoppedError)
    return stopped and failed.waits is not work.waits


def _check_source(record: LedgerRecord, work: Work[Any, Any]) -> None:
    """Check that the ledger has the same source for a named item.

    Raises:
        InvalidRequestError: Another source is recorded for the name.
    """
    recorded, source = record.source, str(work.request.source)
    if work.name is None or recorded is None or is_same_image(recorded, source):
        return
    raise InvalidRequestError(
        f"The key {work.name!r:.80} names {recorded!r:.120} in the ledger, and not "
        f"{source!r:.120}. Nothing was sent. Give each source its own key, or use another ledger."
    )


def _build_ledger_error(error: BaseException) -> LedgerError:
    return LedgerError(
        f"The ledger failed ({describe(error)}), so no response can be recorded. Fix "
        "the problem and run again; existing records are intact."
    )
