"""Ctrl-C in two steps: the first asks to finish, the second aborts."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Final

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def handle_interrupts(finish: Callable[[], object], abort: Callable[[], object]) -> Iterator[None]:
    """Call ``finish`` at the first interrupt and ``abort`` at each later one, on the loop.

    SIGTERM counts as an interrupt: what is in flight was paid for.
    """
    loop = asyncio.get_running_loop()
    steps = iter((finish,))

    def interrupt() -> None:
        next(steps, abort)()

    def interrupt_soon(_number: int, _frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(interrupt)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        try:
            loop.add_signal_handler(number, interrupt)
        except NotImplementedError:  # Windows
            signal.signal(number, interrupt_soon)
    try:
        yield
    finally:
        for number, handler in before.items():
            with suppress(NotImplementedError):
                loop.remove_signal_handler(number)
            if handler is not None:  # None: not set from Python
                signal.signal(number, handler)
