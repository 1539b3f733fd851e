"""A Redis server: its URL without secrets, and one connection that sends commands in batches.

Shared by the ledger, the pacer and the notifications. It is independent of requests and records.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from math import inf
from typing import Any, Final
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

import attrs

from cloudinary_analyze._clock import Clock
from cloudinary_analyze._values import URLObject, read_url
from cloudinary_analyze.errors import ConfigurationError, shorten

try:
    from redis import Redis as BlockingRedis
    from redis import __version__ as redis_version
    from redis.asyncio import BlockingConnectionPool, Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
    from redis.driver_info import DriverInfo
    from redis.exceptions import (
        AuthenticationError,
        AuthorizationError,
        MovedError,
        NoPermissionError,
        NoScriptError,
        RedisError,
        ResponseError,
    )
    from redis.exceptions import ConnectionError as RedisConnectionError
    from redis.exceptions import TimeoutError as RedisTimeoutError
except ImportError as _missing:
    raise ImportError(
        "Redis needs the redis library: pip install 'cloudinary-analyze[redis]'."
    ) from _missing

__all__ = [
    "BATCH",
    "BATCH_BYTES",
    "Command",
    "Link",
    "LinkBrokenError",
    "LinkFailedError",
    "RedisConnectionError",
    "RedisError",
    "RedisLocation",
    "measure_command",
    "read_location",
]

URL_VARIABLE: Final = "REDIS_URL"
CONNECT_SECONDS: Final = 5.0
ANSWER_SECONDS: Final = 10.0  # seconds to wait for replies
BATCH: Final = 256  # commands
BATCH_BYTES: Final = 2**20
UNANSWERED: Final = 4 * BATCH  # commands that are sent ahead of their replies
# Replies that are handed over in one turn of the loop. If all replies of a burst were, the requests
# that wait for them would leave together. A service with a steady latency would return the responses
# together, and each of them would wait for the CPU time of the others.
REPLIES: Final = 4
FIRST_PAUSE: Final = 0.05  # seconds before another attempt to connect; doubles
LONGEST_PAUSE: Final = 1.0

BROKEN: Final = (RedisConnectionError, RedisTimeoutError, TimeoutError, OSError)

REFUSED: Final = (AuthenticationError, AuthorizationError, MovedError, NoPermissionError)

_OPTIONS: Final = frozenset(
    {
        "client_name",
        "db",
        "health_check_interval",
        "max_connections",
        "password",
        "password_env",
        "socket_connect_timeout",
        "socket_keepalive",
        "socket_read_size",
        "ssl_ca_certs",
        "ssl_ca_data",
        "ssl_ca_path",
        "ssl_cert_reqs",
        "ssl_certfile",
        "ssl_check_hostname",
        "ssl_ciphers",
        "ssl_keyfile",
        "ssl_min_version",
        "ssl_password",
        "username",
    }
)
_SECRETS: Final = frozenset({"password", "ssl_password"})
_FORMS: Final = (
    "Pass redis://[user:password@]host:port/0, rediss://… for TLS, or unix:///path. Write "
    "reserved characters of the password in percent-encoding."
)


def check_url(url: str) -> None:
    """Refuse a URL with options that change replies or time limits, or that are unknown.

    The error quotes no part of the URL: a password with reserved characters may be anywhere in it.

    Raises:
        ConfigurationError: It has such an option, or parts that a Redis URL does not have.
    """
    try:
        parts = urlsplit(url)
        names = {name for name, _ in parse_qsl(parts.query, keep_blank_values=True)}
        database = parts.path.strip("/")
        scheme, _ = parts.scheme, parts.port
    except (ValueError, TypeError, AttributeError):
        raise ConfigurationError(f"The Redis URL is invalid. {_FORMS}") from None
    if parts.fragment or (scheme != "unix" and database and not database.isdecimal()):
        raise ConfigurationError(f"The Redis URL is invalid. {_FORMS}")
    if not names <= _OPTIONS:
        raise ConfigurationError(
            "The Redis URL has an option that is unknown, or that this class sets itself, such as "
            "decode_responses, encoding, protocol or socket_timeout. Valid options: "
            f"{', '.join(sorted(_OPTIONS))}."
        )


@attrs.frozen
class Secrets:
    """What a URL holds that a pickle, a repr and a log must not.

    Attributes:
        password: The password of the server.
        options: Secret options of the URL.
    """

    password: str | None = attrs.field(default=None, repr=False)
    options: Mapping[str, str] = attrs.field(factory=dict, repr=False, hash=False)


@attrs.frozen
class RedisLocation:
    """A Redis server as a value. It pickles without passwords.

    Passwords are taken from, in this order: the URL that it was built with in this process; the
    environment variable that the option ``password_env`` names; the variable ``REDIS_URL`` if that
    is of the same server and user.

    Attributes:
        url: The URL without passwords.
        protected: Whether the URL that it was built with had a password.
    """

    url: str
    protected: bool = attrs.field(default=False, repr=False)
    _secrets: Secrets = attrs.field(default=Secrets(), repr=False, eq=False)

    def __getstate__(self) -> tuple[str, bool]:
        return self.url, self.protected

    def __setstate__(self, state: tuple[str, bool]) -> None:
        for name, value in zip(("url", "protected", "_secrets"), (*state, Secrets()), strict=True):
            object.__setattr__(self, name, value)

    def __deepcopy__(self, _: Any) -> RedisLocation:
        return self  # it is immutable, and stays in the process

    def resolve(self) -> str:
        """Return the URL with its passwords, from the environment if need be."""
        parts = urlsplit(self.url)
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        options.pop("password_env", None)
        username, secrets = self._find_secrets()
        options |= secrets.options
        return urlunsplit(
            parts._replace(
                netloc=_build_netloc(parts.netloc, parts.username or username, secrets.password),
                query=urlencode(options),
            )
        )

    def _find_secrets(self) -> tuple[str | None, Secrets]:
        """Return the user, if the environment names one, and the passwords."""
        if self._secrets.password is not None or self._secrets.options:
            return None, self._secrets
        name = dict(parse_qsl(urlsplit(self.url).query)).get("password_env")
        text = os.environ.get(name or URL_VARIABLE, "")
        if "://" not in text:
            return None, Secrets(text or None) if name else Secrets()
        try:
            shown, secrets = _split_secrets(text)
            same = _name_server(shown) == _name_server(self.url)
        except ValueError:  # not a URL
            return None, Secrets()
        user, other = urlsplit(self.url).username, urlsplit(shown).username
        if name is None and not (same and (user is None or user == other or other is None)):
            return None, Secrets()
        return other, secrets

    def _connectable(self) -> str:
        """Return the URL to connect to.

        Raises:
            ConfigurationError: Its password stayed behind in another process.
        """
        named = "password_env" in dict(parse_qsl(urlsplit(self.url).query))
        if (self.protected or named) and self._find_secrets()[1] == Secrets():
            raise ConfigurationError(
                f"Missing password of {self}. Pickles do not contain it. In each worker, set "
                f"{URL_VARIABLE} to the URL of this server, or set the variable that the option "
                "password_env of the URL names."
            )
        return self.resolve()

    def build_client(self, connections: int, *, retries: int = 0) -> Any:
        """Return an asyncio client with its own pool.

        Raises:
            ConfigurationError: The URL is invalid, or its password is missing.
        """
        return _build_client(self._connectable(), connections, retries=retries)

    def build_blocking_client(self) -> Any:
        """Return a client for code without an event loop."""
        return BlockingRedis.from_url(
            self._connectable(),
            protocol=2,
            socket_timeout=ANSWER_SECONDS,
            socket_connect_timeout=CONNECT_SECONDS,
        )

    def __str__(self) -> str:
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=""))


def read_location(value: str | URLObject | RedisLocation | None) -> RedisLocation:
    """Read a URL; ``None``: the one in ``REDIS_URL``.

    Raises:
        ConfigurationError: It is missing or invalid. The message quotes no part of it.
    """
    if isinstance(value, RedisLocation):
        return value
    url = os.environ.get(URL_VARIABLE) if value is None else read_url(value)
    if url is None:
        raise ConfigurationError(f"Missing Redis URL. Set {URL_VARIABLE} or pass one. {_FORMS}")
    if not isinstance(url, str):
        raise ConfigurationError(f"The Redis URL must be a string, not {type(value).__name__}.")
    check_url(url)
    shown, secrets = _split_secrets(url)
    location = RedisLocation(shown, secrets != Secrets(), secrets)
    _build_client(location.resolve(), 1)  # checks the options; connects to nothing
    return location


# attrs copies it to the classes whose converter this is; as text it would not resolve there
read_location.__annotations__["value"] = str | URLObject | RedisLocation | None


def _build_client(url: str, connections: int, *, retries: int = 0) -> Any:
    options: dict[str, Any] = {
        "max_connections": connections,
        "timeout": CONNECT_SECONDS,
        "socket_connect_timeout": CONNECT_SECONDS,
        # callers have their own: the library's can swallow a cancellation on Python 3.11
        "socket_timeout": None,
        "retry": Retry(NoBackoff(), retries),
        "protocol": 2,
        # without it, each connection reads the installed package's version from the disk
        "driver_info": DriverInfo(lib_version=redis_version),
    }
    try:
        pool: Any = BlockingConnectionPool.from_url(url, **options)
        pool.make_connection()
        return Redis.from_pool(pool)
    except (ValueError, TypeError, RedisError):
        # the library's message may quote the URL, and with it the password
        raise ConfigurationError(f"The Redis URL is invalid. {_FORMS}") from None


def _split_secrets(url: str) -> tuple[str, Secrets]:
    parts = urlsplit(url)
    options = parse_qsl(parts.query, keep_blank_values=True)
    hidden = {name: value for name, value in options if name in _SECRETS}
    password = hidden.pop("password", None)
    if parts.password is not None:
        password = unquote(parts.password)
    shown = urlunsplit(
        parts._replace(
            netloc=_build_netloc(parts.netloc, parts.username, None),
            query=urlencode([(name, value) for name, value in options if name not in _SECRETS]),
        )
    )
    return shown, Secrets(password, hidden)


def _name_server(url: str) -> tuple[str | None, int, str]:
    """Return what two URLs of one server have in common."""
    parts = urlsplit(url)
    return parts.hostname, parts.port or 6379, parts.path if parts.scheme == "unix" else ""


def _build_netloc(netloc: str, username: str | None, password: str | None) -> str:
    host = netloc.rpartition("@")[2]
    user = "" if username is None else quote(unquote(username), safe="")
    if password is not None:
        return f"{user}:{quote(password, safe='')}@{host}"
    return f"{user}@{host}" if user else host


class LinkBrokenError(Exception):
    """The connection changed before the reply to a command that is not repeated by itself."""


class LinkFailedError(Exception):
    """Redis refused the commands, or could not be reached for longer than the patience."""


Command = Sequence[bytes | str | int | float]


@attrs.define(eq=False, repr=False)
class _Pending:
    """A command that has no reply yet.

    Attributes:
        content: The command in the protocol of Redis.
        reply: Receives the reply; ``None`` if it does not matter.
        repeat: Whether it is sent again if its reply is lost.
    """

    content: bytes
    reply: asyncio.Future[Any] | None
    repeat: bool


@attrs.define(eq=False, repr=False)
class Link:
    """One connection of one event loop. Commands go out in order, without waiting for replies.

    A command whose reply was lost is sent again, so it must be idempotent. Replies keep the order
    of the commands. Each command is either queued or sent; a broken connection queues what was
    sent again, before the rest.

    States: *down* (no connection, or it is not prepared; the next command connects), *up*,
    *failed* (everything raises `LinkFailedError`), *closed*. Down → up when `prepare` returned; up →
    down when the connection breaks; down → failed when `patience` is over, or Redis refuses the
    credentials.

    Attributes:
        location: The server.
        patience: Seconds without success before it fails.
        clock: For waits and deadlines.
        prepare: Awaited with each new connection, before the commands that wait. Raises
            `LinkFailedError` if this server must not be used.
        scripts: The Lua scripts by name; `build_call` builds the command that runs one.
        failure: Why nothing is sent any more.
        answered_at: Monotonic instant of the last replies.
    """

    location: RedisLocation
    patience: float
    clock: Clock
    prepare: Callable[[Link], Awaitable[None]]
    scripts: Mapping[str, str]
    failure: str | None = attrs.field(default=None, init=False)
    answered_at: float = attrs.field(default=-inf, init=False)
    _digests: dict[str, str] = attrs.field(init=False)
    _connection: Any = attrs.field(default=None, init=False)
    _up: bool = attrs.field(default=False, init=False)
    _queue: deque[_Pending] = attrs.field(factory=deque, init=False)
    _sent: deque[_Pending] = attrs.field(factory=deque, init=False)
    _reader: asyncio.Task[None] | None = attrs.field(default=None, init=False)
    _writer: asyncio.Task[None] | None = attrs.field(default=None, init=False)
    _troubled_at: float | None = attrs.field(default=None, init=False)
    # a refused command; until it has its reply, those to others do not end the trouble
    _refused: _Pending | None = attrs.field(default=None, init=False)
    _closed: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self._digests = {
            name: hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()
            for name, source in self.scripts.items()
        }

    async def ask(
        self, *command: bytes | str | float, repeat: bool = True, first: bool = False
    ) -> Any:
        """Send a command and return the reply. Cancelling the wait does not withdraw it.

        Args:
            command: Its parts.
            repeat: Whether to send it again if its reply is lost, and to send it at all on a
                connection that is newer than this call.
            first: Whether to send it before what is queued.

        Raises:
            LinkBrokenError: The connection changed before its reply, and it is not repeated.
            LinkFailedError: Redis is out of reach, or refuses it.
        """
        self._check()
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._put(_Pending(_pack([command]), reply, repeat), first=first)
        return await reply

    def send_later(self, *command: bytes | str | float) -> None:
        """Send a command whose reply does not matter. Does nothing once the link has failed."""
        if self.failure is None and not self._closed:
            self._put(_Pending(_pack([command]), None, repeat=True))

    def build_call(self, name: str, key: bytes, *arguments: bytes | str | float) -> Command:
        """Return the command that runs a script on one key."""
        return ("EVALSHA", self._digests[name], 1, key, *arguments)

    def _check(self) -> None:
        if self.failure is not None:
            raise LinkFailedError(self.failure)
        if self._closed:
            raise LinkFailedError("it is closed")

    def _put(self, pending: _Pending, *, first: bool = False) -> None:
        if first:
            self._queue.appendleft(pending)
        else:
            self._queue.append(pending)
        self._start_writing()
        if self._reader is None or self._reader.done():
            self._reader = asyncio.get_running_loop().create_task(self._serve())

    def _start_writing(self) -> None:
        if self._up and self._queue and (self._writer is None or self._writer.done()):
            self._writer = asyncio.get_running_loop().create_task(self._write(self._connection))

    async def _write(self, connection: Any) -> None:
        """Send what is queued. The reader notices if the connection breaks."""
        # A burst of responses queues its records in one turn of the loop. The tasks that get its
        # slots queue their claims in the next. This yield puts both into one batch.
        await asyncio.sleep(0)
        while self._queue and len(self._sent) < UNANSWERED:
            if not connection.is_connected:  # redis-py would connect without `prepare`
                return
            batch = self._take_batch()
            self._sent.extend(batch)
            content = b"".join([pending.content for pending in batch])
            with suppress(Exception):  # the connection is closed then
                await connection.send_packed_command(content, check_health=False)

    async def _serve(self) -> None:
        """Connect, and read replies until nothing waits for one."""
        pause = FIRST_PAUSE
        while self._queue or self._sent:
            try:
                if not self._up:
                    await self._connect()
                    self._put_back()  # `prepare` may have changed what these commands rely on
                    continue  # none may be left
                self._start_writing()
                await self._read()
                self.answered_at = self.clock.monotonic()
                if self._refused is None:
                    self._troubled_at, pause = None, FIRST_PAUSE
            except REFUSED as error:
                self._fail(f"Redis refused the credentials or a command ({shorten(str(error))})")
            except (*BROKEN, ResponseError) as error:
                # another server may have taken over; a new connection loads the scripts
                await self._disconnect()
                if isinstance(error, ResponseError):
                    self._refused = next(iter(self._sent), None)
                self._put_back()
                at_once = isinstance(error, NoScriptError) and pause == FIRST_PAUSE
                if not at_once and not await self._wait_after(error, pause):
                    return
                pause = min(2 * pause, LONGEST_PAUSE)
            except LinkFailedError as error:
                self._fail(str(error))
            except BaseException as error:
                self._fail(f"{type(error).__name__}: {shorten(str(error))}")
                if not isinstance(error, Exception):
                    raise

    async def _read(self) -> None:
        """Hand over the next replies to what was sent, and let their tasks run.

        Raises:
            ResponseError: Redis refused a command, other than for the type of its key. It counts
                as unanswered, as all after it.
        """
        connection, sent = self._connection, self._sent
        async with self.clock.timeout_at(self.clock.monotonic() + ANSWER_SECONDS):
            for _ in range(min(len(sent), REPLIES) or 1):
                reply: Any
                try:
                    reply = await connection.read_response()
                except ResponseError as error:
                    if not str(error).startswith("WRONGTYPE "):  # redis-py has no class for it
                        raise
                    reply = LinkFailedError(
                        f"a key has another type than this package writes ({error})"
                    )
                pending = sent.popleft()
                if pending is self._refused:
                    self._refused = None
                if isinstance(reply, LinkFailedError):
                    _end(pending, reply)
                elif pending.reply is not None and not pending.reply.done():
                    pending.reply.set_result(reply)
        await asyncio.sleep(0)

    def _take_batch(self) -> list[_Pending]:
        batch: list[_Pending] = []
        size = 0
        while self._queue and len(batch) < BATCH and size < BATCH_BYTES:
            pending = self._queue.popleft()
            batch.append(pending)
            size += len(pending.content)
        return batch

    async def _connect(self) -> None:
        connection = self.location.build_client(1).connection_pool.make_connection()
        try:
            async with self.clock.timeout_at(self.clock.monotonic() + ANSWER_SECONDS):
                await connection.connect()
            self._connection = connection
            for reply in await self.exchange(
                [("SCRIPT", "LOAD", source) for source in self.scripts.values()]
            ):
                if isinstance(reply, Exception):
                    raise reply
            await self.prepare(self)
            self._up = True
        except BaseException:
            self._connection = None
            await connection.disconnect(nowait=True)
            raise

    async def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands on the connection at once; return replies, errors among them.

        For `prepare`. Others `ask`.
        """
        connection = self._connection
        replies: list[Any] = []
        async with self.clock.timeout_at(self.clock.monotonic() + ANSWER_SECONDS):
            await connection.send_packed_command(_pack(commands), check_health=False)
            for _ in commands:
                try:
                    replies.append(await connection.read_response())
                except ResponseError as error:
                    replies.append(error)
        return replies

    async def _disconnect(self, *, nowait: bool = True) -> None:
        if self._writer is not None:
            self._writer.cancel()
        connection, self._connection, self._up = self._connection, None, False
        self._writer = None
        if connection is not None:
            await connection.disconnect(nowait=nowait)

    def _put_back(self) -> None:
        """Queue what has no reply again, first, and end what is not to be repeated."""
        waiting = [*self._sent, *self._queue]
        self._sent.clear()
        self._queue.clear()
        for pending in waiting:
            if pending.repeat:
                self._queue.append(pending)
            else:
                _end(pending, LinkBrokenError())
                if pending is self._refused:
                    self._refused = None

    async def _wait_after(self, error: Exception, pause: float) -> bool:
        """Wait before another attempt; once the patience is over, fail and return ``False``."""
        now = self.clock.monotonic()
        if self._troubled_at is None:
            self._troubled_at = now
        if now - self._troubled_at >= self.patience:
            self._fail(f"Redis was not available for {self.patience:g} s ({shorten(str(error))})")
            return False
        await self.clock.sleep(pause)
        return True

    def _fail(self, why: str) -> None:
        self.failure = why
        self._end_all(why)

    def _end_all(self, why: str) -> None:
        for waiting in (self._sent, self._queue):
            while waiting:
                _end(waiting.popleft(), LinkFailedError(why))

    async def aclose(self, *, patience: float = ANSWER_SECONDS) -> None:
        """Send what waits, for a limited time, and disconnect. Idempotent."""
        self._closed = True
        reader, self._reader = self._reader, None
        try:
            if reader is not None and not reader.done():
                await asyncio.wait({reader}, timeout=patience)
        finally:
            if reader is not None:
                reader.cancel()
            self._end_all("it was closed")
            await asyncio.shield(self._disconnect(nowait=False))


def measure_command(command: Command) -> int:
    """Return about how many bytes a command has. Only its last part may be long."""
    last = command[-1]
    return 200 + (len(last) if isinstance(last, bytes | str) else 0)


def _pack(commands: Sequence[Command]) -> bytes:
    """Return commands in the protocol of Redis; redis-py takes five times as long."""
    parts: list[bytes] = []
    for command in commands:
        parts.append(b"*%d\r\n" % len(command))
        for part in command:
            content = part if isinstance(part, bytes) else str(part).encode()
            parts.append(b"$%d\r\n%b\r\n" % (len(content), content))
    return b"".join(parts)


def _end(pending: _Pending, error: Exception) -> None:
    if pending.reply is not None and not pending.reply.done():
        pending.reply.set_exception(error)
        pending.reply.exception()  # retrieved, even if the waiter is cancelled right now
