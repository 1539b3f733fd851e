"""OAuth tokens that expire: call the user's function for a new one, once for all that wait.

States of a `Token`: unasked (number 0), asking (a task runs), known (number 1 and above), closed.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable

import attrs

from cloudinary_analyze._cancellation import is_own_cancellation
from cloudinary_analyze._clock import Clock
from cloudinary_analyze._values import NotPicklable
from cloudinary_analyze.config import clean_oauth_token
from cloudinary_analyze.errors import AnalyzeError, ConfigurationError


@attrs.define(eq=False, repr=False)
class Token(NotPicklable):
    """The current token of a session.

    Attributes:
        ask: `Credentials.oauth_token`.
        seconds: The time limit of the function.
        clock: The clock for that limit.
        value: The token.
        number: The number of tokens so far. A call remembers the number that it was sent with.
    """

    ask: Callable[[], Awaitable[str]]
    seconds: float
    clock: Clock
    value: str = attrs.field(default="", repr=False)
    number: int = 0
    _asking: asyncio.Task[AnalyzeError | None] | None = None

    async def renew(self, number: int) -> AnalyzeError | None:
        """Wait for a token newer than a number. Return an error if there is none.

        All waiters share one call of the user's function. It continues if one of them is cancelled.
        Closing ends it.
        """
        if self.number > number:
            return None
        if self._asking is None or self._asking.done():
            self._asking = asyncio.ensure_future(self._ask())
        asking = self._asking
        await asyncio.wait([asking])
        if asking.cancelled():
            return ConfigurationError("The session was closed while it asked for an OAuth token.")
        return asking.result()

    async def _ask(self) -> AnalyzeError | None:
        try:
            async with self.clock.timeout_at(self.clock.monotonic() + self.seconds):
                answer = self.ask()
                if not inspect.isawaitable(answer):
                    raise ConfigurationError("Credentials.oauth_token must be an async function.")
                self.value = clean_oauth_token(await answer)
        except ConfigurationError as error:
            return error.with_traceback(None)  # whose frames hold the token
        except (Exception, asyncio.CancelledError) as error:
            if is_own_cancellation(error, 0):
                raise
            failure = ConfigurationError(
                f"Credentials.oauth_token() failed with {type(error).__name__}."
            )
            failure.__cause__ = error
            return failure
        self.number += 1
        return None

    def close(self) -> None:
        """Stop asking."""
        if self._asking is not None:
            self._asking.cancel()
