"""One worker of a Redis ledger: its lease, its claims, and its writes after a restart of Redis.

A worker has one lease key, independent of the number of request keys. A worker is *dead* if its
lease is missing in two checks that are at least half a lease apart, without a break of the
connection in between. So a restart of Redis does not make workers dead.

After a restart each worker writes its last seconds and its claims again. Claims wait until the
others have done the same.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import secrets
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs

from cloudinary_analyze._clock import Clock
from cloudinary_analyze._redis import (
    BATCH,
    BATCH_BYTES,
    Command,
    Link,
    LinkBrokenError,
    LinkFailedError,
    RedisLocation,
    measure_command,
)
from cloudinary_analyze._sources import is_same_image
from cloudinary_analyze.errors import shorten
from cloudinary_analyze.ledger.claims import SCRIPT, encode_task, read_state
from cloudinary_analyze.protocols import Claim

logger: logging.Logger = logging.getLogger("cloudinary_analyze.ledger")

QUIET: Final = 4.0  # seconds without claims after a restart of Redis
REPLAY_SECONDS: Final = 10.0  # seconds of writes that are repeated after a restart
REPLAY_BYTES: Final = 2**26
BEATS: Final = 3  # renewals per lease, at least
LONGEST_BEAT: Final = 1.0  # seconds; well below QUIET, since a beat notices a restart
FIRST_LOOK: Final = 0.05  # seconds between two checks of a key that another worker holds; grows
LONGEST_LOOK: Final = 1.0
FORGET_WORKERS: Final = 86_400  # seconds until a dead worker is no longer listed


@attrs.define(eq=False, repr=False, kw_only=True)
class Worker:
    """A worker, from the opening of a ledger to its closing or failure.

    Attributes:
        location: The server.
        patience: See `Link`, until it is open.
        names: The names of the keys.
        owner: Host and cloud name that the ledger must belong to.
        lease: Seconds that its lease lasts without renewal.
        keep: Milliseconds that a key is kept; 0: no limit.
        clock: For waits.
        loop: The event loop that it belongs to.
        describe: Returns the statistics that the lease shows.
        former: The workers that this ledger was before it failed or was closed.
        link: Its connection.
        id: Its name.
        tokens: The claims that it holds, by key.
        sources: The sources of those of named items.
    """

    location: RedisLocation
    patience: float
    names: Names
    owner: tuple[str, str]
    lease: float
    keep: int
    clock: Clock
    loop: asyncio.AbstractEventLoop
    describe: Callable[[], Mapping[str, Any]]
    former: frozenset[str]
    link: Link = attrs.field(init=False)
    id: str = attrs.field(factory=lambda: secrets.token_hex(6), init=False)
    tokens: dict[bytes, str] = attrs.field(factory=dict, init=False)
    sources: dict[bytes, str] = attrs.field(factory=dict, init=False)
    _numbers: itertools.count[int] = attrs.field(factory=itertools.count, init=False)
    _recent: deque[tuple[float, int, Command]] = attrs.field(factory=deque, init=False)
    _recent_bytes: int = attrs.field(default=0, init=False)
    _suspects: dict[str, float] = attrs.field(factory=dict, init=False)
    _run_id: str | None = attrs.field(default=None, init=False)
    _quiet_until: float = attrs.field(default=0.0, init=False)
    _heart: asyncio.Task[None] | None = attrs.field(default=None, init=False)
    _warned: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self.link = Link(self.location, self.patience, self.clock, self.prepare, {"step": SCRIPT})

    async def start(self) -> None:
        """Connect, check the server, and keep the lease from now on.

        Raises:
            LinkFailedError: The server cannot or must not be used.
        """
        await self.link.ask("PING")
        if self._heart is None:
            self._heart = self.loop.create_task(self._beat())

    async def _beat(self) -> None:
        try:
            while True:
                await self.clock.sleep(min(self.lease / BEATS, LONGEST_BEAT))
                lease, *others = self._build_beat()
                for command in others:
                    self.link.send_later(*command)
                await self.link.ask(*lease, first=True)  # a long queue must not delay it
        except LinkFailedError:
            return  # the next user of the ledger gets the error

    def _build_beat(self) -> list[Command]:
        now = self.clock.wall()
        shown = {"worker": self.id, "at": round(now, 3), "claims": len(self.tokens)}
        try:
            shown |= self.describe()
        except Exception:
            logger.exception("The statistics of a worker cannot be read.")
        lease = round(1000 * self.lease)
        return [
            ("SET", self.names.find_lease(self.id), json.dumps(shown, default=str), "PX", lease),
            ("ZADD", self.names.workers, now, self.id),
            ("ZREMRANGEBYSCORE", self.names.workers, "-inf", now - FORGET_WORKERS),
        ]

    async def prepare(self, link: Link) -> None:
        """Check the server of a new connection, and repeat writes that it may have lost.

        Raises:
            LinkFailedError: It evicts keys, or the ledger belongs to another host or cloud.
        """
        owner = json.dumps(self.owner)
        text, created, stored = _raise_first(
            await link.exchange(
                [
                    ("INFO",),
                    ("SET", self.names.owner, owner, "NX"),
                    ("GET", self.names.owner),
                ]
            )
        )
        theirs = _read_owner(stored)
        if theirs != self.owner:
            raise LinkFailedError(
                f"the ledger belongs to {theirs[1]} at {theirs[0]}, and this session to "
                f"{self.owner[1]} at {self.owner[0]}. Use another namespace"
            )
        info = dict(line.split(":", 1) for line in text.decode().splitlines() if ":" in line)
        self._check_server(info)
        restarted = self._run_id not in {None, info.get("run_id")}
        quiet = 0.0
        if restarted:
            quiet = QUIET
        elif self._run_id is None and not created:
            quiet = QUIET - float(info.get("uptime_in_seconds", QUIET))
        self._quiet_until = max(self._quiet_until, self.clock.monotonic() + quiet)
        self._suspects.clear()
        _raise_first(await link.exchange(self._build_beat()))
        if restarted:
            await self._replay(link)
        self._run_id = info.get("run_id")  # if the replay breaks, the next connection repeats it

    def _check_server(self, info: Mapping[str, str]) -> None:
        policy = info.get("maxmemory_policy")
        if policy not in {None, "noeviction"}:
            raise LinkFailedError(
                f"the server evicts keys (maxmemory-policy is {policy}), and with them answers "
                "that are paid for. Set it to noeviction"
            )
        if self._warned:
            return
        self._warned = True
        if policy is None:
            logger.warning(
                "Redis does not report its maxmemory-policy. Check that it is noeviction: other "
                "policies delete answers that are paid for."
            )
        if info.get("aof_enabled") != "1":
            logger.warning(
                "Redis does not report an append-only file. If it restarts, answers that are paid "
                "for are lost. Set appendonly to yes."
            )

    async def _replay(self, link: Link) -> None:
        commands = [command for _, _, command in self._recent]
        commands += [
            self._build_step("claim", key, token, "", self.sources.get(key, ""))
            for key, token in self.tokens.items()
        ]
        logger.warning("Redis was restarted; %d writes are repeated.", len(commands))
        batch: list[Command] = []
        size = 0
        for command in commands:
            batch.append(command)
            size += measure_command(command)
            if len(batch) == BATCH or size >= BATCH_BYTES:
                _raise_first(await link.exchange(batch))
                batch, size = [], 0
        _raise_first(await link.exchange(batch))

    def _build_step(self, step: str, key: bytes, token: str, *rest: bytes | str) -> Command:
        return self.link.build_call("step", self.names.find_key(key), step, self.keep, token, *rest)

    def _remember(self, command: Command) -> None:
        now = self.clock.monotonic()
        size = measure_command(command)
        self._recent.append((now, size, command))
        self._recent_bytes += size
        # in an outage, those are kept that Redis may have lost at its beginning
        oldest = min(now, self.link.answered_at) - REPLAY_SECONDS
        while self._recent and (self._recent[0][0] < oldest or self._recent_bytes > REPLAY_BYTES):
            self._recent_bytes -= self._recent.popleft()[1]

    async def claim(self, key: bytes, source: str = "") -> Claim | None:
        """Claim a key. ``None`` if it is held, final, or of another source. Cancelling is safe."""
        token = f"{self.id}#{next(self._numbers)}"
        dead = ""
        broken_at: float | None = None
        try:
            while True:
                while (rest := self._quiet_until - self.clock.monotonic()) > 0:
                    await self.clock.sleep(rest)
                command = self._build_step("claim", key, token, dead, source)
                try:
                    reply = await self.link.ask(*command, repeat=False)
                except LinkBrokenError:
                    # Redis may have lost claims of other workers, so wait for them. Replies to other
                    # commands prove nothing about this one.
                    now = self.clock.monotonic()
                    broken_at = now if broken_at is None else broken_at
                    if now - broken_at > self.link.patience:
                        raise LinkFailedError(
                            f"a claim was not answered for {self.link.patience:g} s"
                        ) from None
                    continue
                if reply[:1] in {b"A", b"F"}:
                    return None
                found = read_state(reply)
                if found.token == token:
                    self.tokens[key] = token
                    if source:
                        self.sources[key] = recorded = found.source or source
                        if not is_same_image(recorded, source):
                            self.release(key, ambiguous=False)
                            return None
                    return Claim(task_id=found.task_id, ambiguous=found.lost > 0)
                holder = found.token.partition("#")[0]
                if holder == dead or not await self._is_dead(holder):
                    return None
                dead = holder
        except BaseException:
            self._release(key, token, ambiguous=False)
            raise

    async def _is_dead(self, worker: str) -> bool:
        if worker == self.id or worker in self.former:
            return worker != self.id
        if await self.link.ask("EXISTS", self.names.find_lease(worker)):
            self._suspects.pop(worker, None)
            return False
        now = self.clock.monotonic()
        return now - self._suspects.setdefault(worker, now) >= self.lease / 2

    async def watch(self, key: bytes) -> None:
        """Return when a key is no longer claimed, or when its holder is dead."""
        pause = FIRST_LOOK
        while True:
            await self.clock.sleep(pause)
            head = await self.link.ask("GETRANGE", self.names.find_key(key), 0, 63)
            if head[:1] != b"C":
                return
            holder = head[2:].partition(b"#")[0].decode(errors="replace")
            if await self._is_dead(holder):
                return
            pause = min(1.5 * pause, LONGEST_LOOK)

    async def record_submitted(self, key: bytes, task_id: str | None) -> None:
        """Record a task."""
        token = self.tokens.get(key, "")
        await self._write(self._build_step("submitted", key, token, encode_task(task_id)))

    async def record_answer(self, key: bytes, state: str, content: bytes) -> None:
        """Record a response (``A``) or a final error (``F``), which ends the claim."""
        self.sources.pop(key, None)
        await self._write(self._build_step(state, key, self.tokens.pop(key, ""), content))

    async def _write(self, command: Command) -> None:
        self._remember(command)
        await self.link.ask(*command)

    def release(self, key: bytes, *, ambiguous: bool) -> None:
        """Release a claim."""
        token = self.tokens.pop(key, None)
        self.sources.pop(key, None)
        if token is not None:
            self._release(key, token, ambiguous=ambiguous)

    def _release(self, key: bytes, token: str, *, ambiguous: bool) -> None:
        command = self._build_step("release", key, token, "1" if ambiguous else "0")
        self._remember(command)
        self.link.send_later(*command)

    async def stop(self) -> None:
        """Write what waits, end the lease, and disconnect."""
        if self._heart is not None:
            self._heart.cancel()
        self.link.send_later("DEL", self.names.find_lease(self.id))
        self.link.send_later("ZREM", self.names.workers, self.id)
        await self.link.aclose()


@attrs.frozen
class Names:
    """The names of the keys of a namespace."""

    namespace: str

    @property
    def owner(self) -> str:
        """Whose ledger it is."""
        return f"{self.namespace}:owner"

    @property
    def workers(self) -> str:
        """The workers, by the time of their last renewal."""
        return f"{self.namespace}:workers"

    def find_lease(self, worker: str) -> str:
        """Return the lease of a worker, with its statistics."""
        return f"{self.namespace}:worker:{worker}"

    @property
    def prefix(self) -> bytes:
        """The prefix of the names of all request keys."""
        return f"{self.namespace}:key:".encode()

    def find_key(self, key: bytes) -> bytes:
        """Return the name of a request key."""
        return self.prefix + key


def _read_owner(stored: bytes) -> tuple[str, str]:
    try:
        base_url, cloud_name = json.loads(stored)
    except (ValueError, TypeError, RecursionError):
        return "an unknown host", "an unknown cloud"
    return shorten(str(base_url)), shorten(str(cloud_name))


def _raise_first(replies: list[Any]) -> list[Any]:
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies
