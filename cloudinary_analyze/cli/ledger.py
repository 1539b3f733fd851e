"""The ledger of a run, as the run sees it: which items are done, and what becomes of the others."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Final

import attrs
from rich.console import Console

from cloudinary_analyze._policy import is_final, stops_the_stream
from cloudinary_analyze.cli.feed import ItemFeed
from cloudinary_analyze.cli.models import BuildRequest
from cloudinary_analyze.cli.screen import say
from cloudinary_analyze.cli.service import Service
from cloudinary_analyze.config import DEFAULT_HOST, Settings, read_base_url
from cloudinary_analyze.errors import AnalyzeError, LedgerError
from cloudinary_analyze.ledger.file import (
    connect_for_reading,
    explaining,
    find_companion,
    lock,
)
from cloudinary_analyze.ledger.sqlite import EarlierItems, SQLiteLedger
from cloudinary_analyze.outcomes import AnyOutcome
from cloudinary_analyze.requests import KeyBuilder, Uri
from cloudinary_analyze.results.records import InputItem

_ANY_SOURCE: Final = Uri("https://example.com/")


class _RunLedger(SQLiteLedger):
    """The ledger of a run, which notes its items by itself: with their lines, bad ones too."""

    async def note_item(self, key: str, *, source: str, model: str, index: int) -> None:
        """Do nothing; see `Book.note_all`."""


@attrs.define(eq=False)
class Book:
    """The ledger of a run.

    Attributes:
        ledger: The ledger; open.
        begun_before: Whether an earlier run noted items in it.
        displaced: Whether the input or the models differ, so that answered items of an earlier run
            are no longer among this one's. Their answers are kept all the same.
    """

    ledger: SQLiteLedger
    begun_before: bool
    displaced: bool = attrs.field(default=False, init=False)
    _makers: Mapping[str, KeyBuilder]

    def make_key(self, item: InputItem) -> str | None:
        """Return the key of an item's request; ``None`` for a bad line."""
        line = item.line
        if line.source is None or item.model is None:
            return None
        maker = self._makers[item.model]
        return maker.build(line.source) if line.name is None else maker.build_named(line.name)

    @contextmanager
    def open_earlier(self) -> Iterator[Earlier]:
        """Open what tells which items are done; for one thread."""
        with self.ledger.earlier_items() as items:
            earlier = Earlier(self, items)
            yield earlier

    async def note_all(self, feed: ItemFeed) -> AsyncIterator[InputItem]:
        """Pass the items on, each once it is noted.

        Raises:
            LedgerError: It cannot be written.
        """
        async for item in feed:
            await self._note(item, item.line.error)
            yield item

    async def note_outcome(self, outcome: AnyOutcome, settings: Settings) -> bool:
        """Note why an item failed for now, which a ledger's answers do not tell.

        Returns:
            Whether that is so: the item failed, and may fare better another time.

        Raises:
            LedgerError: It cannot be written.
        """
        error, item = outcome.error, outcome.item
        if error is None or item.line.error is not None or stops_the_stream(error, settings):
            return False
        if not isinstance(error, AnalyzeError):
            error = AnalyzeError(f"{type(error).__name__}: {error}")
        elif is_final(error):
            return False
        await self._note(item, error)
        return True

    async def _note(self, item: InputItem, error: AnalyzeError | None) -> None:
        assert item.index is not None
        line = item.line
        await self.ledger.add_item(
            item.index,
            line=line.number,
            source=line.text if line.source is None else str(line.source),
            model=item.model,
            key=self.make_key(item),
            error=error,
        )


@attrs.define(eq=False)
class Earlier:
    """Compares the items of this run with those of an earlier one, in their order."""

    _book: Book
    _items: EarlierItems

    def is_done(self, item: InputItem) -> bool:
        """Whether an item was noted in its place, and has its answer."""
        assert item.index is not None
        standing = self._items.compare(
            item.index, line=item.line.number, key=self._book.make_key(item)
        )
        if standing == "displaced":
            self._book.displaced = True
        return standing == "done"

    def end(self, count: int) -> None:
        """Take note that the run has so many items and no more."""
        if self._items.goes_on(count):
            self._book.displaced = True


@asynccontextmanager
async def open_book(
    path: Path,
    service: Service,
    builders: Mapping[str, BuildRequest],
    *,
    retry_failed: bool,
    console: Console,
) -> AsyncIterator[Book]:
    """Open the ledger of a run for as long as the block lasts.

    An emulator in this process has another address each time, so its run begins anew.

    Raises:
        LedgerError: It cannot be used.
    """
    if service.emulator is not None and remove_emulated(path):
        say(
            console,
            f"The ledger {path} of an earlier emulator run was removed: each begins anew.",
            style="dim",
        )
        begun_before = True  # what lies there is its output
    else:
        begun_before = False
    credentials = service.credentials
    base_url = read_base_url(credentials.host or DEFAULT_HOST, credentials.cloud_name)
    async with _RunLedger(path) as ledger:
        await ledger.open(base_url=base_url, cloud_name=credentials.cloud_name)
        with closing(iter(ledger.iter_items())) as items:  # type: ignore[type-var]
            begun_before = begun_before or next(items, None) is not None
        if retry_failed:
            await ledger.forget_errors()
        makers = {model: KeyBuilder(build(_ANY_SOURCE)) for model, build in builders.items()}
        yield Book(ledger, begun_before, makers)


def remove_emulated(path: Path) -> bool:
    """Remove a ledger if it is an emulator's, and say whether there was one.

    Raises:
        LedgerError: Another run writes to it.
    """
    from cloudinary_analyze.emulator.server import CLOUD_NAME_PREFIX

    if not path.exists() or not path.stat().st_size:
        return False
    try:
        with closing(connect_for_reading(path)) as connection, explaining(path):
            ((cloud_name,),) = connection.execute("SELECT cloud_name FROM owner")
    except LedgerError:
        return False  # opening it says what is wrong with it
    if not cloud_name.startswith(CLOUD_NAME_PREFIX):
        return False
    with closing(lock(path)), explaining(path):
        for suffix in ("", "-wal", "-shm"):
            find_companion(path, suffix).unlink(missing_ok=True)
    return True
