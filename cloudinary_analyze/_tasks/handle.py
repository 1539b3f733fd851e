"""`AnalysisTask`: a handle on an analysis in progress, a future to its user."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextvars import Context
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import attrs

from cloudinary_analyze._tasks.entries import Answer, Wait
from cloudinary_analyze._values import Described, NotPicklable
from cloudinary_analyze._wire import codec
from cloudinary_analyze._wire.protocol import read_result
from cloudinary_analyze.errors import SessionClosedError, WrongEventLoopError
from cloudinary_analyze.responses import Response, TaskStatus

if TYPE_CHECKING:
    from cloudinary_analyze._tasks.tracker import Tracker

A = TypeVar("A")
A_co = TypeVar("A_co", covariant=True)

FINISHED: Final = frozenset({"completed", "failed"})


class AnalysisTask(NotPicklable, Generic[A_co]):
    """A handle on one analysis, from `AnalyzeSession.submit` or `AnalyzeSession.task`.

    ``await task`` returns the response or raises what `result` raises. Any number of tasks can await
    one handle, at any time. Cancelling one does not affect the others or the remote task. A handle
    works in ``asyncio.wait``, ``gather``, ``as_completed``, ``wait_for`` and under
    ``asyncio.timeout``. Type checkers accept only futures in ``asyncio.wait``: pass `as_future`
    there, and pass a coroutine that awaits the handle to a ``TaskGroup``.

    asyncio reports the error of a handle that is dropped and was never awaited, as it does for
    futures.

    ```python
    import asyncio

    tasks = [session.submit(Captioning(url)) for url in urls]
    for task in asyncio.as_completed(tasks):
        print((await task).analysis.caption)
    ```

    Source: the 202 of ``POST /v2/analysis/{cloud}/analyze/{model}``,
    ``GET /v2/analysis/{cloud}/tasks/{task_id}``, and the webhook.

    Not created directly. Belongs to its session's event loop.
    """

    __slots__ = ("__weakref__", "_future", "_shared", "_tracker", "_wait")

    def __init__(self, tracker: Tracker, wait: Wait) -> None:
        self._tracker = tracker
        self._wait = wait
        self._future: asyncio.Future[Response[A_co]] | None = None
        self._shared: asyncio.Task[Response[A_co]] | None = None

    def __repr__(self) -> str:
        accepted = self.task_id or "not accepted"
        return f"<AnalysisTask {self._wait.model} {accepted}, {self.status}>"

    @property
    def task_id(self) -> str | None:
        """The service's id. ``None`` before it accepted the task, or if it answered directly."""
        return self._wait.entry.task_id

    @property
    def status(self) -> str:
        """The last known remote state.

        ``"submitting"`` until the service accepted the task, ``"unknown"`` if it does not know it.
        """
        return self._wait.entry.status

    def done(self) -> bool:
        """Whether `result` returns or raises the outcome."""
        return self._wait.answer is not None

    def cancelled(self) -> bool:
        """Return ``False``, because a handle always ends with a response or an error."""
        return False

    def __await__(self) -> Generator[Any, None, Response[A_co]]:
        return self._join().__await__()

    async def _join(self) -> Response[A_co]:
        if self._wait.answer is not None:
            return self.result()
        # Shielded, because `wait_for` and `gather` cancel what they wait for.
        outer = asyncio.shield(self._get_future())
        try:
            return await outer
        finally:
            if outer.done() and not outer.cancelled():
                outer.exception()  # retrieved also if this waiter is cancelled in the same turn

    def _get_future(self) -> asyncio.Future[Response[A_co]]:
        future = self._future
        if future is None:
            future = self._future = self._tracker.loop.create_future()
            if self._wait.answer is None:
                self._wait.future = future
            else:
                complete(self._wait, future)
        if not future.done():
            self._check_loop()
        return future

    def _check_loop(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return
        if loop is not self._tracker.loop:
            raise WrongEventLoopError(
                "A task can be awaited only on the event loop of its session. Open one session "
                "per loop, and pass the task id on: session.task(task_id, …)."
            )

    def result(self) -> Response[A_co]:
        """Return the response, or raise what ``await`` would raise.

        Raises:
            TaskFailedError: The remote work failed.
            TaskTimeoutError: This handle's wait ended; the remote work continues.
            QuotaExceededError: The task failed because its quota is used up.
            TaskLimitError: The session already waits for 10,000 ids that the service has not
                confirmed.
            ResultNotDeliveredError: The task is completed, but its result did not arrive.
            ResponseDecodeError: The result cannot be read; ``raw_body`` has it.
            SessionClosedError: The session was closed first.
            AnalyzeError: The request was refused, or did not reach the service.
            asyncio.InvalidStateError: The task is still pending.
        """
        self._check_done()
        return self._get_future().result()

    def exception(self) -> Exception | None:
        """Return what `result` would raise, or ``None``.

        Raises:
            asyncio.InvalidStateError: The task is still pending.
        """
        self._check_done()
        error = self._get_future().exception()
        assert error is None or isinstance(error, Exception)
        return error

    def _check_done(self) -> None:
        if self._wait.answer is None:
            raise asyncio.InvalidStateError("The task is still pending.")

    async def accepted(self) -> str | None:
        """Wait until the service has accepted the request, and return the task id.

        Cancelling is safe: it ends this wait only.

        Returns:
            The id for `AnalyzeSession.task`. ``None`` if the service answered directly.

        Raises:
            AnalyzeError: The service did not accept it; as ``await`` raises.
        """
        while self.task_id is None and not self.done():
            await self._change()
        if self.task_id is None:
            self.result()
        return self.task_id

    async def wait(self) -> TaskStatus:
        """Wait until a poll or a notification reports the end of the work, and return the status.

        Does not wait for the result, and does not raise for a failed task. Cancelling is safe: it
        ends this wait only.

        Raises:
            AnalyzeError: The task id is unknown, or this handle's wait ended.
        """
        while self.status not in FINISHED and not self.done():
            await self._change()
        if self.status not in FINISHED or self.task_id is None:
            self.result()
        self._get_future().add_done_callback(_mark_retrieved)  # the caller now knows the outcome
        return TaskStatus(self.task_id or "", self.status)

    async def is_known(self) -> bool:
        """Wait until the task is done (``True``) or the service twice did not know it (``False``).

        Cancelling is safe: it ends this wait only.
        """
        while not self.done():
            if self._wait.entry.forgotten:
                return False
            await self._change()
        return True

    async def _change(self) -> None:
        self._check_loop()
        await self._tracker.change(self._wait)

    def abandon(self) -> None:
        """Stop waiting. Every wait for this handle ends with a `TaskTimeoutError`.

        The remote work continues and is charged, because the API cannot cancel a task. Other
        handles on the same task are not affected.
        """
        self._tracker.abandon(self._wait)
        self.exception()

    def withdraw(self) -> None:
        """Stop waiting, and cancel the submission if the service has not accepted it yet."""
        self._tracker.withdraw(self._wait)
        self.exception()

    def as_future(self) -> asyncio.Future[Response[A_co]]:
        """Return an `asyncio.Future`, the typed form for ``asyncio.wait``.

        Returns the same future each time. Cancelling it affects neither other waiters nor the
        remote task.
        """
        if self._shared is None or self._shared.cancelled():
            self._shared = asyncio.ensure_future(self._join())
        return self._shared

    def add_done_callback(
        self, callback: Callable[[AnalysisTask[A_co]], object], *, context: Context | None = None
    ) -> None:
        """Call a function with this handle soon after it is done.

        Args:
            callback: A function of one argument, the handle.
            context: The context to run it in. Default: the current one.
        """
        self._get_future().add_done_callback(_Callback(self, callback), context=context)

    def remove_done_callback(self, callback: Callable[[AnalysisTask[A_co]], object]) -> int:
        """Remove a callback and return how often it had been added."""
        if self._future is None:
            return 0
        return self._future.remove_done_callback(_Callback(self, callback))

    def __del__(self) -> None:
        wait: Wait | None = getattr(self, "_wait", None)
        if wait is None:
            return
        if wait.answer is None:
            self._tracker.drop(wait, unobserved=self._future is None)
        elif wait.answer.error is not None and self._future is None:
            report(wait.answer.error, self._tracker.loop)


def _mark_retrieved(future: asyncio.Future[Any]) -> None:
    future.exception()


@attrs.frozen(repr=False, eq=False)
class _Callback(Described):
    """A function of a handle as a callback of its future. Equal ones can be removed."""

    handle: AnalysisTask[Any]
    function: Callable[[AnalysisTask[Any]], object]

    def __call__(self, _: object) -> None:
        self.function(self.handle)


def complete(wait: Wait, future: asyncio.Future[Any], raw: Mapping[str, Any] | None = None) -> None:
    """Give a wait's answer to its handle's future.

    Args:
        wait: The wait that ended.
        future: The handle's.
        raw: The parsed body of the answer, if it was already parsed.
    """
    answer = wait.answer
    assert answer is not None
    error = answer.error
    if error is None:
        try:
            future.set_result(_read(wait, answer, raw))
        except Exception as failure:
            error = failure
    if error is not None:
        future.set_exception(error.with_traceback(None))  # frames would keep the handle alive
        if isinstance(error, SessionClosedError):
            future.exception()  # the user closed the session, so asyncio does not report it


def _read(wait: Wait, answer: Answer, raw: Mapping[str, Any] | None) -> Response[Any]:
    response = answer.response
    if response is not None:
        if response.model == wait.model:
            return response
        raw = response.raw
    content: Mapping[str, Any] = codec.loads(answer.body or b"{}") if raw is None else raw
    return read_result(wait.model, wait.analysis_type, content, body=answer.body)


def report(error: Exception, loop: asyncio.AbstractEventLoop) -> None:
    """Let asyncio report an error that no code has retrieved."""
    if not isinstance(error, SessionClosedError) and not loop.is_closed():
        loop.create_future().set_exception(error)


async def follow(
    task: AnalysisTask[A], *, on_accepted: Callable[[str], Awaitable[None]] | None = None
) -> Response[A]:
    """Await a task that has no other handle. If the wait ends early, the task is withdrawn.

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
