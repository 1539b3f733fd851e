"""Runs on several machines that share one ledger: `--ledger redis://…` and `--shard`.

Each run keeps its items in a file. The ledger in Redis is checked before a request is sent, and
receives every record.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from cloudinary_analyze._wire import codec
from cloudinary_analyze.cli.feed import LineSource
from cloudinary_analyze.cli.ledger import RunLedger
from cloudinary_analyze.cli.screen import CommandError
from cloudinary_analyze.cli.text import read_count
from cloudinary_analyze.errors import AnalyzeError
from cloudinary_analyze.ledger.encoding import dump_error
from cloudinary_analyze.ledger.file import ANSWERED, FAILED
from cloudinary_analyze.ledger.writer import write_answer
from cloudinary_analyze.protocols import Claim, LedgerRecord
from cloudinary_analyze.responses import Response
from cloudinary_analyze.results.records import InputLine

if TYPE_CHECKING:
    from cloudinary_analyze._redis import RedisLocation
    from cloudinary_analyze.ledger.items import LedgerItem
    from cloudinary_analyze.ledger.redis import RedisLedger

_SCHEMES: Final = ("redis://", "rediss://", "unix://")


def is_shared(name: str) -> bool:
    """Whether the name of a ledger is the URL of a Redis."""
    return name.startswith(_SCHEMES)


def build_shared_ledger(url: str) -> RedisLedger:
    """Return the ledger at a URL, whose password comes from the environment.

    Raises:
        CommandError: The [redis] extra is missing, or the URL has a password.
        ConfigurationError: The URL is invalid.
    """
    try:
        from cloudinary_analyze.ledger.redis import RedisLedger
    except ImportError as error:
        raise CommandError(str(error)) from None
    ledger = RedisLedger(url)
    if ledger.location.protected and url != os.environ.get("REDIS_URL"):
        raise CommandError(
            "The URL of the ledger has a password, which every user of this machine can read in "
            "the list of processes. Set REDIS_URL to the URL with the password, and pass it "
            "without."
        )
    return ledger


class SharedRunLedger(RunLedger):
    """The ledger of a run in a file, in front of one in Redis that other machines share."""

    def __init__(self, path: Path, shared: RedisLedger, *, patience: float) -> None:
        super().__init__(path, patience=patience)
        self._shared = shared

    async def open(self, *, base_url: str, cloud_name: str) -> None:
        """Open both."""
        await super().open(base_url=base_url, cloud_name=cloud_name)
        await self._shared.open(base_url=base_url, cloud_name=cloud_name)

    async def aclose(self) -> None:
        """Close both."""
        try:
            await self._shared.aclose()
        finally:
            await super().aclose()

    def expect(self, key: str) -> None:
        """Do nothing, because another machine may record the key at any time."""

    async def find(self, key: str) -> LedgerRecord | None:
        """Return what either ledger knows. Copy records of other machines to the file."""
        record = await super().find(key)
        if record is not None and record.final:
            return record
        theirs = await self._shared.find(key)
        if theirs is None:
            return record
        if not theirs.final:
            if record is None:
                return theirs
            source = theirs.source or record.source
            return attrs.evolve(record if theirs.task_id is None else theirs, source=source)
        packed = bytes.fromhex(key)
        if theirs.error is not None:
            state, content = FAILED, dump_error(theirs.error)
        else:
            state, content = ANSWERED, codec.dumps(theirs.response)
        copy = partial(
            write_answer,
            key=packed,
            state=state,
            content=content,
            seconds=theirs.seconds or 0.0,
            recorded=0.0,  # recorded before this run, so this run was not charged for it
        )
        await self._use().perform(copy, key=packed)
        return theirs

    async def claim(self, key: str) -> Claim | None:
        """Claim a key for this machine, unless the file cannot be written."""
        return None if self._use().trouble is not None else await self._shared.claim(key)

    async def watch(self, key: str) -> None:
        """Return when a new result may be recorded."""
        await super().watch(key)
        await self._shared.watch(key)

    def release(self, key: str, *, ambiguous: bool) -> None:
        """Release the claim."""
        self._shared.release(key, ambiguous=ambiguous)

    async def note_source(self, key: str, source: str) -> None:
        """Note it in both."""
        await self._shared.note_source(key, source)
        await super().note_source(key, source)

    async def note_item(self, key: str, *, source: str, model: str, index: int) -> None:
        """Note the item in Redis. The file already has it; see `Book.register`."""
        await self._shared.note_item(key, source=source, model=model, index=index)

    # A paid response is recorded in the file even if Redis fails.

    async def record_submitted(self, key: str, task_id: str | None) -> None:
        """Record it in both."""
        try:
            await self._shared.record_submitted(key, task_id)
        finally:
            await super().record_submitted(key, task_id)

    async def record_response(self, key: str, response: Response[Any], *, seconds: float) -> None:
        """Record it in both."""
        try:
            await self._shared.record_response(key, response, seconds=seconds)
        finally:
            await super().record_response(key, response, seconds=seconds)

    async def record_error(self, key: str, error: AnalyzeError, *, seconds: float) -> None:
        """Record it in both."""
        try:
            await self._shared.record_error(key, error, seconds=seconds)
        finally:
            await super().record_error(key, error, seconds=seconds)


class SharedItems:
    """The records of a ledger in Redis, to be exported like the items of a file."""

    def __init__(self, url: str) -> None:
        self._ledger = build_shared_ledger(url)
        self.path: RedisLocation = self._ledger.location

    def iter_items(self) -> Iterator[LedgerItem]:
        """Yield every final response and error."""
        return self._ledger.iter_records()

    def iter_columns(self) -> Iterator[Any]:
        """Yield nothing: each machine keeps the columns of its input."""
        yield from ()


def read_shard(text: str) -> tuple[int, int]:
    """Read ``i/n``.

    Raises:
        CommandError: It has another form.
    """
    first, _, second = text.partition("/")
    number, count = read_count(first), read_count(second)
    if number is None or count is None:
        raise CommandError(f"--shard must be I/N, such as 1/4, not {text!r:.40}.")
    if not 1 <= number <= count:
        raise CommandError(f"--shard must be I/N with I from 1 to N, not {text!r:.40}.")
    return number, count


def shard_source(source: LineSource, text: str) -> LineSource:
    """Return the part of an input that a shard processes. Lines keep their numbers.

    Raises:
        CommandError: See `read_shard`.
    """
    number, count = read_shard(text)

    def read() -> Generator[InputLine, None, None]:
        with closing(source.read()) as lines:
            yield from islice(lines, min(number - 1, sys.maxsize), None, min(count, sys.maxsize))

    return attrs.evolve(source, read=read, name=f"shard {number}/{count} of {source.name}")
