"""`AnalysisTask`: a handle on an analysis that is under way, an awaitable future."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from cloudinary_analyze._tasks.table import Answer, Wait, report_error
from cloudinary_analyze._wire.protocol import read_analysis_data
from cloudinary_analyze.errors import WrongEventLoopError
from cloudinary_analyze.responses import Response, TaskStatus

if TYPE_CHECKING:
    from cloudinary_analyze._tasks.tracker import Tracker

A = TypeVar("A")

MISSES: Final = 2
FINISHED: Final = frozenset({"completed", "failed"})


class AnalysisTask(Generic[A]):
    """A handle on one analysis, from `AnalyzeSession.submit` or `AnalyzeSession.task`.

    ``await task`` gives the response or raises; any number of waiters may do so, at any time,
    and cancelling one disturbs no other and nothing remote. It works as it is in
    ``asyncio.gather``, ``as_completed``, ``wait_for`` and under ``asyncio.timeout``; pass
    `as_future` to ``asyncio.wait``, and a coroutine that awaits it to a ``TaskGroup``.

    Not made directly. Belongs to its session's event loop.
    """

    __slots__ = (
        "__weakref__",
        "_analysis_type",
        "_future",
        "_model",
        "_response",
        "_retrieved",
        "_tracker",
        "_wait",
    )

    def __init__(self, model: str, analysis_type: type[A], tracker: Tracker, wait: Wait) -> None:
        self._model = model
        self._analysis_type = analysis_type
        self._tracker = tracker
        self._wait = wait
        self._response: Response[A] | None = None
        self._future: asyncio.Task[Response[A]] | None = None
        self._retrieved = False

    def __repr__(self) -> str:
        return f"<AnalysisTask {self._model} {self.task_id or 'not accepted'}, {self.status}>"

    @property
    def task_id(self) -> str | None:
        """The service's id; ``None`` until it accepted the task, or if it answered directly."""
        return self._wait.entry.task_id

    @property
    def status(self) -> str:
        """The remote state as last heard; ``"submitting"`` until the service accepted the task."""
        return self._wait.entry.state

    def done(self) -> bool:
        """Whether `result` would return or raise the outcome."""
        return self._wait.entry.answer is not None or self._wait.ended is not None

    def __await__(self) -> Generator[Any, None, Response[A]]:
        return self._join().__await__()

    async def _join(self) -> Response[A]:
        while not self.done():
            await self._change()
        return self.result()

    async def _change(self) -> None:
        if asyncio.get_running_loop() is not self._tracker.table.loop:
            raise WrongEventLoopError(
                "A task can be awaited only on the event loop of its session. Open one session "
                "per loop, and pass the task id on: session.task(task_id, …)."
            )
        await self._wait.entry.change()

    def result(self) -> Response[A]:
        """Return the response, or raise what ``await`` would raise.

        Raises:
            TaskFailedError: The remote work failed.
            TaskTimeoutError: This handle's wait ended; the remote work goes on.
            ResultNotDeliveredError: The task is completed, but its result did not arrive.
            SessionClosedError: The session was closed meanwhile.
            AnalyzeError: The request was refused, or did not get through.
            asyncio.InvalidStateError: There is no outcome yet.
        """
        ended = self._wait.ended
        if ended is not None:
            self._retrieved = True
            raise ended.with_traceback(None)
        answer = self._wait.entry.answer
        if answer is None:
            raise asyncio.InvalidStateError("The task has no outcome yet.")
        self._retrieved = True
        if answer.error is not None:
            raise answer.error.with_traceback(None)  # raised once per waiter
        if self._response is None:
            self._response = self._read(answer)
        return self._response

    def _read(self, answer: Answer) -> Response[A]:
        if answer.response is not None and answer.response.model == self._model:
            response: Response[A] = answer.response
            return response
        raw = answer.raw if answer.response is None else answer.response.raw
        assert raw is not None
        return read_analysis_data(self._model, self._analysis_type, answer.data or raw["data"], raw)

    def exception(self) -> Exception | None:
        """Return what `result` would raise, or ``None``.

        Raises:
            asyncio.InvalidStateError: There is no outcome yet.
        """
        try:
            self.result()
        except asyncio.InvalidStateError:
            raise
        except Exception as error:
            return error
        return None

    async def accepted(self) -> str | None:
        """Wait until the service has the request, and return the task id.

        Returns:
            The id to take the task up by later; ``None`` if the service answered directly.

        Raises:
            AnalyzeError: The service did not accept it; as ``await`` raises.
        """
        while self.task_id is None and not self.done():
            await self._change()
        if self.task_id is None:
            self.result()
        return self.task_id

    async def wait(self) -> TaskStatus:
        """Wait until the remote work is over, as far as polls tell, and return its status.

        Does not wait for the result, and does not raise for a failed task.

        Raises:
            AnalyzeError: There is no task to ask for, or this handle's wait ended.
        """
        while self.status not in FINISHED and not self.done():
            await self._change()
        if self.status not in FINISHED or self.task_id is None:
            self.result()
        self._retrieved = True
        return TaskStatus(self.task_id or "", self.status)

    async def is_known(self) -> bool:
        """Wait until the task is done, or until the service twice did not know it."""
        while not self.done():
            if self._wait.entry.misses >= MISSES:
                return False
            await self._change()
        return True

    def abandon(self) -> None:
        """Stop waiting: every waiter on this handle gets a `TaskTimeoutError`.

        The remote work goes on and is charged; the API cannot cancel it. Other handles on the
        same task are not disturbed.
        """
        self._retrieved = True
        self._tracker.table.abandon(self._wait)

    def withdraw(self) -> None:
        """Stop waiting, and cancel the submission if the service has not accepted it yet."""
        self._retrieved = True
        self._tracker.withdraw(self._wait)

    def as_future(self) -> asyncio.Future[Response[A]]:
        """Return a real `asyncio.Future`, for ``asyncio.wait``.

        The same one each time. Cancelling it disturbs no other waiter and nothing remote.
        """
        if self._future is None or self._future.cancelled():
            self._future = asyncio.ensure_future(self._join())
        return self._future

    def add_done_callback(self, callback: Callable[[AnalysisTask[A]], object]) -> None:
        """Call a function with this handle, soon after it is done."""

        def call(future: asyncio.Future[Response[A]]) -> None:
            if not future.cancelled():
                future.exception()  # the callback is told by the handle
                callback(self)

        self.as_future().add_done_callback(call)

    def __del__(self) -> None:
        wait = getattr(self, "_wait", None)
        if wait is None or self._retrieved:
            return
        answer = wait.entry.answer
        if wait.ended is None and answer is None:
            wait.orphaned = True  # the table reports it, should it fail
            return
        report_error(wait.entry, wait.ended or (answer and answer.error))


async def follow(
    task: AnalysisTask[A], *, on_accepted: Callable[[str], Awaitable[None]] | None = None
) -> Response[A]:
    """Await a task that has no other holder; leaving early withdraws it.

    Args:
        task: The handle.
        on_accepted: Called once with the task id, before the result is awaited.
    """
    try:
        if on_accepted is not None and (task_id := await task.accepted()) is not None:
            await on_accepted(task_id)
        return await task
    except BaseException:
        task.withdraw()
        raise
