"""What others may implement: where deliveries come from and where they go to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from cloudinary_analyze.responses import Delivery


class NotificationSource(Protocol):
    """Where a session gets deliveries from: a queue, a broker, a mailbox.

    Subclass it and write `listen`; the other two have a default that fits a source without
    memory. One session uses one source; the session alone iterates it.
    """

    def listen(self) -> AsyncIterator[Delivery]:
        """Yield deliveries as they come; begun anew after an error, with backoff.

        Ending it means that nothing will come any more: what is pending fails. Raising means
        that the source broke: `listen` is called again, and all that is pending is fetched.
        An async generator is closed when the session closes.
        """
        ...

    async def fetch(self, task_ids: Sequence[str]) -> Sequence[Delivery]:  # noqa: ARG002
        """Return what was delivered for these tasks earlier, where the source has a memory.

        Asked for each task once it is known, in batches, and for all that is pending after
        `listen` broke.
        """
        return ()

    def settle(self, delivery: Delivery) -> None:  # noqa: ARG002
        """Take note that a delivery resolved a task here, so that it can be acknowledged.

        Must not block; acknowledge in batches.
        """
        return


class NotificationSink(Protocol):
    """Where a receiver puts verified deliveries. A plain ``asyncio.Queue[Delivery]`` is one."""

    async def put(self, delivery: Delivery, /) -> None:
        """Return once the delivery is stored; the sender is told 200 only then."""
        ...
