"""Distinguish our own cancellations from those of other tasks and from errors of user code.

Three events raise the same `asyncio.CancelledError`, even in one turn of the loop: we interrupt a
section of a task (a timeout, a close), another task cancels this one, or code that we await raises
the error itself. Only `asyncio.Task.cancelling`, compared with its value before the await,
distinguishes them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import attrs

T = TypeVar("T")


class InterruptedSectionError(Exception):
    """A section was interrupted."""


def get_task(loop: asyncio.AbstractEventLoop | None = None) -> asyncio.Task[object]:
    """Return the running task. Passing the running loop saves looking it up.

    Raises:
        RuntimeError: No task is running, so asyncio can neither time out nor cancel the code.
    """
    task = asyncio.current_task(loop)
    if task is None:
        raise RuntimeError("This coroutine must run in an asyncio task.")
    return task


def count_cancellations() -> int:
    """Return how many cancellations of the running task were requested."""
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()


def is_own_cancellation(error: BaseException, before: int) -> bool:
    """Whether an error is a cancellation of the running task, and not raised by user code.

    Args:
        error: The error.
        before: How many cancellations were requested before the code ran.
    """
    return isinstance(error, asyncio.CancelledError) and count_cancellations() > before


@attrs.define(eq=False, repr=False)
class Sections:
    """Sections of tasks that we can interrupt by cancelling the task.

    States of a task: *outside*, *inside* (after `enter`), *interrupted* (after `interrupt`).
    `leave` returns it to *outside*. A section that was interrupted raises `InterruptedSectionError`
    if the task's count of cancellations is the same as before.

    Attributes:
        inside: The tasks inside, each with the loop's time at which its section times out.
            Oldest first if all sections have the same limit.
    """

    inside: dict[asyncio.Task[object], float] = attrs.field(factory=dict)
    _interrupted: set[asyncio.Task[object]] = attrs.field(factory=set)

    def interrupt(self, task: asyncio.Task[object]) -> None:
        """Interrupt one task that is inside."""
        del self.inside[task]
        self._interrupted.add(task)
        task.cancel()

    def interrupt_all(self) -> None:
        """Interrupt every task that is inside."""
        for task in list(self.inside):
            self.interrupt(task)

    async def run(self, section: Coroutine[Any, Any, T]) -> T:
        """Await a section of the running task.

        Raises:
            InterruptedSectionError: It was interrupted, and nothing else cancelled the task.
        """
        task = get_task()
        cancelling = task.cancelling()
        self.inside[task] = 0.0
        try:
            return await section
        except asyncio.CancelledError:
            if self.leave(task) and task.cancelling() <= cancelling:
                raise InterruptedSectionError from None
            raise
        finally:
            self.leave(task)

    def leave(self, task: asyncio.Task[object]) -> bool:
        """End a task's section and withdraw our cancellation. Return whether there was one."""
        self.inside.pop(task, None)
        if task not in self._interrupted:
            return False
        self._interrupted.remove(task)
        task.uncancel()
        return True
