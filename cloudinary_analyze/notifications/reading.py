"""Reading a source: by one reader at a time, and again after it breaks."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import attrs

from cloudinary_analyze._cancellation import count_cancellations, is_own_cancellation
from cloudinary_analyze._clock import Clock
from cloudinary_analyze.errors import ConfigurationError, describe
from cloudinary_analyze.notifications import QueueSource
from cloudinary_analyze.protocols import NotificationSource
from cloudinary_analyze.responses import Delivery

logger: logging.Logger = logging.getLogger("cloudinary_analyze.notifications")

FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 30.0

_SHUT_DOWN: Final[Any] = getattr(asyncio, "QueueShutDown", ())  # since Python 3.13


@attrs.define(eq=False)
class Claim:
    """The exclusive right to read a source. It ends with `release`, or when it is dropped.

    Attributes:
        source: The source, kept so that its ``id`` is not reused. ``None`` once released.
    """

    source: object

    def release(self) -> None:
        """Release the source for another reader. Idempotent."""
        if self.source is not None:
            del _claims[id(self.source)]
            self.source = None


_claims: Final[weakref.WeakValueDictionary[int, Claim]] = weakref.WeakValueDictionary()


def claim_source(source: NotificationSource) -> Claim:
    """Return the right to read a source.

    Raises:
        ConfigurationError: Another session reads it, or `forward` does.
    """
    claimed = source.queue if isinstance(source, QueueSource) else source
    if id(claimed) in _claims:
        raise ConfigurationError(
            "Another session already reads this notification source. Each delivery reaches one "
            "reader only, so each would lose results. Use one session, or one source for each."
        )
    claim = _claims[id(claimed)] = Claim(claimed)
    return claim


@asynccontextmanager
async def open_deliveries(source: NotificationSource) -> AsyncIterator[AsyncIterator[Delivery]]:
    """Listen to a source, and close its iterator at the end.

    A queue that was shut down ends the block as the end of the deliveries does.
    """
    deliveries = source.listen()
    try:
        yield deliveries
    except _SHUT_DOWN:
        return
    finally:
        close = getattr(deliveries, "aclose", None)  # generators have `aclose`
        if close is not None:
            await close()


@attrs.define(eq=False)
class Retries:
    """The growing pauses between the attempts of one task.

    Attributes:
        clock: Measures the pauses.
        pause: Seconds before the next attempt.
    """

    clock: Clock
    pause: float = FIRST_PAUSE
    _cancelling: int = attrs.field(factory=count_cancellations, init=False)

    async def rest(self, what: str, error: BaseException) -> None:
        """Log a failed attempt and pause. Re-raise the error if it is a cancellation of this task.

        A `CancelledError` that user code raised is a failure like any other.
        """
        if is_own_cancellation(error, self._cancelling):
            raise error
        logger.warning("%s (%s); trying again in %.1f s.", what, describe(error), self.pause)
        await self.clock.sleep(self.pause)
        self.pause = min(2 * self.pause, LONGEST_PAUSE)

    def reset(self) -> None:
        """Reset to the shortest pause, because an attempt made progress."""
        self.pause = FIRST_PAUSE
