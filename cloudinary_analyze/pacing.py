"""`RedisPacer`: one request rate for all processes and machines. Needs the ``redis`` extra.

The service limits an account, not a process. Sessions that share a pacer share one rate:

```python
pacer = RedisPacer("redis://host:6379/0", rate=50)
async with pacer, AnalyzeSession(settings=Settings(pacer=pacer)) as session:
    ...
```

Starts are spread evenly (GCRA). A process reserves some starts at a time, so most calls need no
round trip to Redis.
"""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial
from typing import Any, Final

import attrs

from cloudinary_analyze._clock import SYSTEM_CLOCK, Clock
from cloudinary_analyze._redis import Link, LinkFailedError, RedisLocation, read_location
from cloudinary_analyze._values import Closable
from cloudinary_analyze.errors import ConfigurationError, describe_reason

__all__ = ["RedisPacer"]

LEASE_SECONDS: Final = 0.1  # the seconds of starts that one round trip reserves

# The key holds the instant of the next free start, in microseconds. The script returns the time
# until then, which is negative while a burst is left.
_SCRIPT: Final = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local interval, burst, count = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local free = tonumber(redis.call('GET', KEYS[1]) or '0')
free = math.max(free, now - interval * (burst - 1))
local following = free + interval * count
local keep = math.ceil((following - now + interval * burst) / 1000) + 1000
redis.call('SET', KEYS[1], string.format('%.0f', following), 'PX', string.format('%.0f', keep))
return string.format('%.0f', free - now)
"""


def _check_positive(_: Any, attribute: Any, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < float("inf"):
        raise ConfigurationError(
            f"RedisPacer.{attribute.name} must be a positive number, not {value!r:.80}."
        )


@attrs.define(eq=False, repr=False)
class _Reservations:
    """The starts that a process has reserved, on one event loop.

    Attributes:
        loop: The event loop.
        link: The connection.
        turn: Held while starts are taken or reserved, so that attempts start in order.
        starts: Reserved monotonic instants that no attempt has taken.
        waiting: How many attempts wait for one.
    """

    loop: asyncio.AbstractEventLoop
    link: Link
    turn: asyncio.Lock = attrs.field(factory=asyncio.Lock)
    starts: deque[float] = attrs.field(factory=deque)
    waiting: int = 0


@attrs.define(eq=False)
class RedisPacer(Closable):
    """A pacer for `Settings.pacer` that many processes share.

    Before its first use it can be pickled. The pickle does not contain the password, which workers
    read from the environment; see `RedisLedger`. It connects at its first use. Close it with
    `aclose` or ``async with``. `AnalyzeStage` closes its own copy.

    Attributes:
        location: The server. The argument is ``url``: ``redis://``, ``rediss://`` (TLS) or
            ``unix://``. Default: ``REDIS_URL``.
        rate: Attempts per second, over all pacers with the same name.
        burst: Attempts that may start at once after a quiet time. Default: 1.
        name: Pacers with the same name share one rate.
        patience: Seconds to wait for Redis. Then `acquire` raises, which stops a stream. Default:
            300.
        clock: For tests.

    Raises:
        ConfigurationError: An argument is invalid.
    """

    location: RedisLocation = attrs.field(default=None, converter=read_location, alias="url")
    rate: float = attrs.field(kw_only=True, validator=_check_positive)
    burst: int = attrs.field(default=1, kw_only=True, validator=_check_positive)
    name: str = attrs.field(default="default", kw_only=True)
    patience: float = attrs.field(default=300.0, kw_only=True, validator=_check_positive)
    clock: Clock = attrs.field(default=SYSTEM_CLOCK, kw_only=True, repr=False)
    _reserved: _Reservations | None = attrs.field(default=None, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigurationError("RedisPacer.name must be a non-empty string.")
        if not isinstance(self.burst, int):
            raise ConfigurationError(
                f"RedisPacer.burst must be a whole number, not {self.burst!r}."
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments, without the password."""
        names = ("rate", "burst", "name", "patience", "clock")
        return partial(type(self), self.location, **{n: getattr(self, n) for n in names}), ()

    async def acquire(self) -> None:
        """Return when one more attempt may start. If cancelled, the next attempt gets the start.

        Raises:
            ConnectionError: Redis could not be reached for `patience` seconds, or refused the
                command.
        """
        reserved = self._use()
        reserved.waiting += 1
        try:
            async with reserved.turn:
                now = self.clock.monotonic()
                while reserved.starts and reserved.starts[0] < now - 1 / self.rate:
                    reserved.starts.popleft()  # no attempt took it in time
                if not reserved.starts:
                    await self._reserve(reserved)
                start = reserved.starts.popleft()
        finally:
            reserved.waiting -= 1
        wait = start - self.clock.monotonic()
        if wait > 0:
            try:
                await self.clock.sleep(wait)
            except BaseException:
                reserved.starts.appendleft(start)
                raise

    async def _reserve(self, reserved: _Reservations) -> None:
        count = max(1, min(reserved.waiting, int(LEASE_SECONDS * self.rate)))
        key = f"cloudinary-analyze:pace:{self.name}".encode()
        interval = 1_000_000 / self.rate
        command = reserved.link.build_call("reserve", key, interval, self.burst, count)
        try:
            away = int(await reserved.link.ask(*command)) / 1_000_000
        except LinkFailedError as error:
            await self.aclose()
            raise ConnectionError(
                f"The pacer at {self.location} cannot be used: {describe_reason(error)}. Nothing was sent."
            ) from error
        now = self.clock.monotonic()
        reserved.starts.extend(now + away + number / self.rate for number in range(count))

    def _use(self) -> _Reservations:
        loop = asyncio.get_running_loop()
        reserved = self._reserved
        if reserved is None or reserved.loop is not loop:
            scripts = {"reserve": _SCRIPT}
            link = Link(self.location, self.patience, self.clock, _prepare_nothing, scripts)
            reserved = self._reserved = _Reservations(loop, link)
        return reserved

    async def aclose(self) -> None:
        """Disconnect. Idempotent. A later use connects again. Cancelling is safe."""
        reserved, self._reserved = self._reserved, None
        if reserved is not None and reserved.loop is asyncio.get_running_loop():
            await reserved.link.aclose()


async def _prepare_nothing(_: Link) -> None:
    """Accept any server: losing the pace only costs some refusals."""
