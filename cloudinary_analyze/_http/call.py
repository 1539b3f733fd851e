"""One call, and the owner that may stop it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import attrs
from yarl import URL

from cloudinary_analyze._cancellation import InterruptedSectionError, Sections
from cloudinary_analyze._http.transport import Body
from cloudinary_analyze._http.waiting import AdmissionQueue
from cloudinary_analyze.errors import AnalyzeError, BulkStoppedError

if TYPE_CHECKING:
    from cloudinary_analyze._http.watch import Watch

T = TypeVar("T")


class Owner(Protocol):
    """The owner of a call. It may stop the call before each of its attempts.

    Attributes:
        claim: Awaited once with the slot held, before the first attempt, if the owner has one.
        halted: Whether nothing more is sent.
        waits: The waits of its calls between attempts, which it interrupts to halt them.
    """

    claim: Callable[[], Coroutine[Any, Any, None]] | None

    @property
    def halted(self) -> bool: ...

    @property
    def waits(self) -> Sections: ...

    def start(self) -> None:
        """Note that an attempt is about to start.

        Raises:
            BulkStoppedError: It may not be sent.
        """

    async def reserve_again(self) -> None:
        """Prepare to repeat the request of a task as a call.

        Raises:
            BulkStoppedError: It may not be sent.
        """


@attrs.define(eq=False, repr=False)
class Call:
    """One call: its request and its progress.

    Attributes:
        url: The URL.
        queue: Admits its attempts.
        limit: The maximum number of attempts, without those that do not count.
        begun: Monotonic instant of the call.
        model: The model's name in URLs; ``None`` for a status poll.
        feature: The add-on feature that it is charged to.
        content: The JSON to POST. ``None``: a GET.
        patience: The remaining seconds of our own waits of an interactive call. Waiting for the end
            of an outage counts; waits that the service asked for do not.
        deadline: Monotonic instant when it gives up.
        urgent: Whether it is interactive: it is admitted before bulk work, and waits less in an
            outage.
        owner: Asked immediately before each attempt whether it may be sent.
        unsent: Whether `owner` or its claim refused the first attempt, so that the call does not
            count.
        attempts: Attempts begun.
        free: The attempts that do not count towards the limit.
        number: The number of the last attempt among all attempts of the session.
        sending: The body of the attempt in flight.
        ambiguous: Whether an earlier attempt may have been charged.
        error: The error of the last attempt.
        failed_at: Monotonic instant of its first failure.
        failed_first: The number of the first attempt that the service failed, since the last stall.
        failed_in: The number of that stall.
        again: Whether the next attempt starts before those of other calls.
        waits: Our own waits between attempts, once there was a failure.
        token: The number of the OAuth token that the last attempt was sent with.
        renewed: Whether a refusal has already led to a new token.
        probing: Whether this call tests if an exhausted quota has been reset.
        watch: Reports its events; ``None`` if the session has no hook.
    """

    url: URL
    queue: AdmissionQueue
    limit: int
    begun: float
    patience: float
    model: str | None = None
    feature: str = ""
    content: bytes | None = None
    deadline: float | None = None
    urgent: bool = True
    owner: Owner | None = None
    unsent: bool = False
    attempts: int = 0
    free: int = 0
    number: int = 0
    sending: Body | None = None
    ambiguous: bool = False
    error: AnalyzeError | None = None
    failed_at: float = 0.0
    failed_first: int = 0
    failed_in: int = -1
    again: bool = False
    waits: Iterator[float] | None = None
    token: int = 0
    renewed: bool = False
    probing: bool = False
    watch: Watch | None = None

    @property
    def halted(self) -> bool:
        """Whether its owner sends nothing more."""
        return self.owner is not None and self.owner.halted

    def ask_owner(self, owner: Owner) -> None:
        """Ask the owner whether an attempt may be sent.

        Raises:
            BulkStoppedError: Not the first one.
            AnalyzeError: No further one; the error of the last attempt.
        """
        self.unsent = self.error is None
        try:
            owner.start()
        except BulkStoppedError:
            if self.error is None:
                raise
            raise self.error from self.error.__cause__
        self.unsent = False

    async def wait(self, waiting: Coroutine[Any, Any, T]) -> T:
        """Await a step before an attempt. The owner may interrupt it.

        Raises:
            BulkStoppedError: It was interrupted. Nothing was sent.
            AnalyzeError: It was interrupted; the error of the last attempt.
        """
        owner = self.owner
        if owner is None:
            return await waiting
        if owner.halted:
            waiting.close()
            self.ask_owner(owner)  # it refuses
        try:
            return await owner.waits.run(waiting)
        except InterruptedSectionError:
            self.ask_owner(owner)  # it refuses
            raise
