"""The items of a run in a SQLite ledger: the input, separate from the responses.

A run of the command line replaces the items with those of its input, so an export contains rows of
that input only, however the run ends. A stream of the library adds its items to the others.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from operator import ge
from pathlib import Path
from typing import Any, Final, TypeAlias

import attrs

from cloudinary_analyze._sources import is_same_image
from cloudinary_analyze._values import quote
from cloudinary_analyze._wire import codec
from cloudinary_analyze.errors import AnalyzeError, InvalidRequestError, LedgerError, shorten
from cloudinary_analyze.ledger.encoding import dump_error, load_error
from cloudinary_analyze.ledger.file import (
    ANSWERED,
    FAILED,
    OPEN,
    SUBMITTED,
    connect_for_reading,
    explaining,
)
from cloudinary_analyze.responses import JSONObject

READ_BATCH: Final = 500  # rows per read; a long one would keep the log from being emptied
OPEN_BATCH: Final = 5000  # rows that one search for open items covers
BLOCK_BITS: Final = 16  # numbers per block of a `RecordSet`, as a power of two
LARGEST: Final = 2**63 - 1  # of SQLite's integers
_DONE: Final = frozenset({ANSWERED, FAILED})
_NONE: Final = type(None)
# the types of each column; a damaged page may contain others
_KINDS: Final[dict[str, frozenset[type[Any]]]] = {
    "position": frozenset({int}),
    "source": frozenset({str}),
    "begun": frozenset({int, float}),
    **dict.fromkeys(("line", "record", "state"), frozenset({int, _NONE})),
    **dict.fromkeys(("model", "file", "name", "noted", "task_id"), frozenset({str, _NONE})),
    **dict.fromkeys(("key", "columns", "error", "content"), frozenset({bytes, _NONE})),
    **dict.fromkeys(("seconds", "recorded"), frozenset({int, float, _NONE})),
}
COMPARED: Final = ("line", "source", "model", "key", "file", "name", "columns", "error")

ItemRow: TypeAlias = tuple[
    int | None, str, str | None, bytes | None, str | None, str | None, bytes | None, bytes | None
]
"""The row of an item, in the order of `COMPARED`."""


@attrs.frozen(kw_only=True)
class LedgerItem:
    """An item of a run and its result.

    Attributes:
        index: Its position among the items of the run, from 0.
        line: Line of the input, from 1, if any.
        source: What is analyzed, as text.
        model: The model's name; ``None`` if no request could be built.
        key: The key of its request; ``None`` if no request could be built.
        file: The file of the input, if any.
        name: What identifies it instead of its source, if anything.
        columns: The other columns of its row in the input, if they were kept.
        task_id: The task that was submitted for it, if any.
        response: The response's JSON as received, if any.
        error: The final error, if any: of the request, or of building it.
        seconds: How long its attempts took, if it has a response or a final error.
        restored: Whether its response or error was not charged for it by the latest run: an
            earlier run recorded it, or an earlier item of the same request received it.
        first: Whether no earlier item that was read has the same request.
    """

    index: int
    line: int | None
    source: str
    model: str | None
    key: str | None
    file: str | None = None
    name: str | None = None
    columns: JSONObject | None = None
    task_id: str | None = None
    response: JSONObject | None = None
    error: AnalyzeError | None = None
    seconds: float | None = None
    restored: bool = False
    first: bool = True

    @property
    def done(self) -> bool:
        """Whether it has a response or a final error."""
        return self.response is not None or self.error is not None


@attrs.define(kw_only=True, eq=False)
class Inventory:
    """The counts of an input, compared with a ledger.

    Attributes:
        items: Items in all.
        bad: Items that make no request.
        done: Items with a recorded response or final error.
        repeated: Further items whose request an earlier item makes, too, by model.
        submitted: Further items whose task was submitted.
        calls: Requests to send, by model: the rest.
        changed: Items that differ from those that the ledger held before.
        other: If there are any: recorded responses and errors of no item of this input, but of
            another input, other models or other parameters.
        displaced: Whether the items that the ledger held before have some of these.
    """

    items: int = 0
    bad: int = 0
    done: int = 0
    repeated: Counter[str] = attrs.field(factory=Counter)
    submitted: int = 0
    calls: Counter[str] = attrs.field(factory=Counter)
    changed: int = 0
    other: int = 0
    displaced: bool = False


class RecordSet:
    """A set of the numbers of records, one bit each.

    The bits are kept in blocks, so that one large number in a damaged file takes one block.
    """

    def __init__(self) -> None:
        self.blocks: dict[int, bytearray] = {}

    def add(self, number: int) -> bool:
        """Add a number. Return whether it is new."""
        block = self.blocks.get(number >> BLOCK_BITS)
        if block is None:
            block = self.blocks[number >> BLOCK_BITS] = bytearray(1 << BLOCK_BITS - 3)
        place, bit = (number & (1 << BLOCK_BITS) - 1) >> 3, 1 << (number & 7)
        new = not block[place] & bit
        block[place] |= bit
        return bool(new)

    def is_within(self, other: RecordSet) -> bool:
        """Whether the other set contains all numbers of this one."""
        for number, block in self.blocks.items():
            mine = int.from_bytes(block, "little")
            if mine & ~int.from_bytes(other.blocks.get(number, b""), "little"):
                return False
        return True


def take_record(connection: sqlite3.Connection, key: bytes) -> tuple[int, int]:
    """Return the number and the state of a key's record, which is created if necessary."""
    query = "INSERT OR IGNORE INTO records (key, state) VALUES (?, ?)"
    inserted = connection.execute(query, (key, OPEN))
    if inserted.rowcount and inserted.lastrowid is not None:
        return inserted.lastrowid, OPEN
    query = "SELECT id, state FROM records WHERE key = ?"
    known: tuple[int, int] = connection.execute(query, (key,)).fetchone()
    return known


def write_item(connection: sqlite3.Connection, position: int, row: ItemRow) -> tuple[int, int]:
    """Note an item of a run. Return the number and the state of its record, or zeros."""
    line, source, model, key, file, name, columns, error = row
    record, state = (0, OPEN) if key is None else take_record(connection, key)
    connection.execute(
        "INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (position, line, source, model, record or None, error, file, name, columns),
    )
    return record, state


def write_stream_item(
    connection: sqlite3.Connection, key: bytes, *, position: int, source: str, model: str
) -> None:
    """Note an item of a stream at its index, or after all others if the index is taken.

    Streams that share a ledger all count from 0. A record is appended only once, so repeating a run
    adds nothing.
    """
    record = take_record(connection, key)[0]
    found = connection.execute(
        "SELECT record FROM items WHERE position = ?", (position,)
    ).fetchone()
    if found is not None:
        if found[0] == record:
            return
        connection.execute("CREATE INDEX IF NOT EXISTS items_by_record ON items (record)")
        if connection.execute("SELECT 1 FROM items WHERE record = ?", (record,)).fetchone():
            return
        ((position,),) = connection.execute("SELECT max(position) + 1 FROM items")
    connection.execute(
        "INSERT INTO items (position, source, model, record) VALUES (?, ?, ?, ?)",
        (position, source, model, record),
    )


def write_items(connection: sqlite3.Connection, rows: Iterable[ItemRow], path: Path) -> Inventory:
    """Replace the items. Those that are unchanged are only read."""
    inventory, seen, answered_before = Inventory(), RecordSet(), RecordSet()
    earlier = _read_in_order(
        connection,
        "SELECT position, line, source, model, key, file, name, columns, error, record, state "
        "FROM items LEFT JOIN records ON records.id = items.record ",
        path,
    )

    def advance() -> Sequence[Any] | None:
        known = next(earlier, None)
        if known is not None and known[10] in _DONE:
            answered_before.add(known[9])
        return known

    known = advance()
    for position, row in enumerate(rows):
        while known is not None and known[0] < position:
            known = advance()
        if known is not None and known[0] == position and _is_same(known, row):
            record, state = known[9] or 0, known[10] or OPEN
        else:
            record, state = write_item(connection, position, _check_name(connection, row))
            inventory.changed += 1
        inventory.items += 1
        if not record:
            inventory.bad += 1
            continue
        model = row[2] or ""
        new = seen.add(record)
        if state in _DONE:
            inventory.done += 1
        elif not new:
            inventory.repeated[model] += 1
        elif state == SUBMITTED:
            inventory.submitted += 1
        else:
            inventory.calls[model] += 1
    while known is not None:
        known = advance()
    deleted = connection.execute("DELETE FROM items WHERE position >= ?", (inventory.items,))
    inventory.changed += deleted.rowcount
    inventory.displaced = not answered_before.is_within(seen)
    if inventory.changed:
        inventory.other = _count_other(connection)
    return inventory


def _check_name(connection: sqlite3.Connection, row: ItemRow) -> ItemRow:
    """Return a row. It has no request if the ledger knows its name as another source."""
    line, source, _, key, file, name, columns, _ = row
    if name is None or key is None:
        return row
    query = "SELECT source FROM named JOIN records ON records.id = named.record WHERE key = ?"
    known = connection.execute(query, (key,)).fetchone()
    if known is None or is_same_image(known[0], source):
        return row
    error = InvalidRequestError(
        f"The ledger knows the key {quote(name)} as {quote(known[0])}, and the input has "
        f"{quote(source)}. Nothing was sent. Give each source its own key, or use another ledger."
    )
    return (line, source, None, None, file, name, columns, dump_error(error))


def _is_same(known: Sequence[Any], row: ItemRow) -> bool:
    """Whether the same item is already noted. The error of an earlier attempt does not matter."""
    return known[1:8] == row[:7] and (row[3] is not None or known[8] == row[7])


def read_answered(path: Path) -> RecordSet:
    """Return the records of items that have a response or a final error.

    Raises:
        LedgerError: The ledger does not exist or cannot be read.
    """
    found = RecordSet()
    with closing(connect_for_reading(path)) as connection:
        query = "SELECT position, record, state FROM items JOIN records ON records.id = record "
        for _, record, state in _read_in_order(connection, query, path):
            if state in _DONE:
                found.add(record)
    return found


def _count_other(connection: sqlite3.Connection) -> int:
    """Count the records that have a response or final error, but no item."""
    ((count,),) = connection.execute(
        "SELECT count(*) FROM records WHERE state IN (?, ?) "
        "AND id NOT IN (SELECT record FROM items WHERE record IS NOT NULL)",
        (ANSWERED, FAILED),
    )
    return int(count)


def read_items(path: Path) -> Iterator[LedgerItem]:
    """Yield every item once, in order, with its durable response or error.

    Raises:
        LedgerError: The ledger does not exist or cannot be read.
    """
    seen = RecordSet()
    with closing(connect_for_reading(path)) as connection:
        begun = max(
            (row[0] for row in fetch(connection, path, "SELECT begun FROM owner")), default=0
        )
        query = (
            "SELECT position, line, source, model, key, file, name, columns, error, items.record, "
            "state, task_id, content, seconds, recorded FROM items "
            "LEFT JOIN records ON records.id = items.record "
            "LEFT JOIN answers ON answers.record = records.id "
        )
        for row in _read_in_order(connection, query, path):
            first = row[9] is None or seen.add(row[9])
            yield _build_item(row, path, answered_before=not first or (row[14] or 0.0) < begun)


def read_newest_responses(path: Path) -> Iterator[tuple[JSONObject, float]]:
    """Yield the newest response of each model, and when it was recorded (Unix seconds).

    Raises:
        LedgerError: The ledger does not exist or cannot be read.
    """
    newest = (
        "SELECT record, max(recorded) AS recorded FROM items "
        "JOIN records ON records.id = record WHERE state = ? GROUP BY model"
    )
    query = "SELECT content FROM answers WHERE record = ?"
    with closing(connect_for_reading(path)) as connection:
        for record, recorded in fetch(connection, path, newest, ANSWERED):
            for (content,) in fetch(connection, path, query, record):
                response, _ = load_answer(ANSWERED, content, path)
                if response is not None:
                    yield response, recorded or 0.0


def copy_states(connection: sqlite3.Connection, path: Path) -> None:
    """Copy the state of every key of another ledger, without the responses."""
    add = (
        "INSERT INTO records (key, state, task_id) VALUES (?, ?, ?) "
        "ON CONFLICT (key) DO UPDATE SET state = max(state, excluded.state)"
    )
    name = "INSERT OR REPLACE INTO named SELECT id, ? FROM records WHERE key = ?"
    named = "SELECT source, key FROM named JOIN records ON records.id = named.record"
    with closing(connect_for_reading(path)) as other:
        connection.executemany(add, other.execute("SELECT key, state, task_id FROM records"))
        connection.executemany(name, other.execute(named))


def read_columns(path: Path) -> Iterator[JSONObject]:
    """Yield the columns of the input that were kept for each item.

    Raises:
        LedgerError: The ledger does not exist or cannot be read.
    """
    with closing(connect_for_reading(path)) as connection:
        for _, columns in _read_in_order(connection, "SELECT position, columns FROM items ", path):
            if columns is not None:
                yield _read_object(columns, path)


def _build_item(row: Sequence[Any], path: Path, *, answered_before: bool) -> LedgerItem:
    index, line, source, model, key, file, name, columns, own_error = row[:9]
    state, task_id, content, seconds = row[10:14]
    response, error = load_answer(state, content, path)
    if own_error is not None and response is None:
        _, error = load_answer(FAILED, own_error, path)
    return LedgerItem(
        index=index,
        line=line,
        source=source,
        model=model,
        key=None if key is None else key.hex(),
        file=file,
        name=name,
        columns=None if columns is None else _read_object(columns, path),
        task_id=task_id,
        response=response,
        error=error,
        seconds=seconds,
        restored=answered_before and content is not None,
    )


def load_answer(
    state: int | None, content: bytes | None, path: Path
) -> tuple[JSONObject | None, AnalyzeError | None]:
    """Return a recorded response or error.

    Raises:
        LedgerError: It cannot be read.
    """
    if content is None:
        return None, None
    if state != FAILED:
        return _read_object(content, path), None
    try:
        return None, load_error(content)
    except ValueError as error:
        raise _build_damage(path, str(error)) from error


def _build_damage(path: Path, reason: str) -> LedgerError:
    return LedgerError(
        f"A record in the ledger {path} cannot be read ({shorten(reason)}). Restore the file "
        "from a copy, or move it away."
    )


def _read_object(content: bytes, path: Path) -> JSONObject:
    try:
        value = codec.loads(content)
    except (ValueError, RecursionError) as error:
        raise _build_damage(path, str(error)) from error
    if type(value) is not dict:
        raise _build_damage(path, "it is not a JSON object")
    return value


def fetch(
    connection: sqlite3.Connection, path: Path, query: str, *parameters: Any
) -> Sequence[Sequence[Any]]:
    """Return the rows of a query. Their types are checked, because SQLite does not enforce them.

    Raises:
        LedgerError: It cannot be read, or a column contains an unexpected type.
    """
    with explaining(path):
        cursor = connection.execute(query, parameters)
        rows = cursor.fetchall()
    shape = (query, *map(type, rows[0])) if len(rows) == 1 else None
    if shape in _accepted:
        return rows  # nearly always, if there is one
    for (name, *_), column in zip(cursor.description, zip(*rows, strict=True), strict=False):
        # SQLite ignores the case of names, which a flipped bit changes
        if wrong := set(map(type, column)) - _KINDS[name.lower()]:
            raise _build_damage(path, f"{name} is {wrong.pop().__name__}")
    if shape is not None:
        _accepted.add(shape)
    return rows


_accepted: Final[set[tuple[Any, ...] | None]] = set()  # queries, with the types of single rows


def read_noted(path: Path, *, open_only: bool) -> Iterator[LedgerItem]:
    """Yield the items without their responses. For one thread.

    Items come in order, but the first open item of each model comes before all others. So if one
    model is refused, a stream knows from the beginning that there are others.

    Args:
        path: The ledger.
        open_only: Whether to leave out items without a request, and items that have a response or a
            final error.

    Raises:
        LedgerError: The ledger does not exist or cannot be read.
    """
    query = (
        "SELECT position, line, source, model, key, file, name, columns, error, items.record, "
        "state, task_id, NULL AS content, NULL AS seconds "
        "FROM items LEFT JOIN records ON records.id = items.record "
        "WHERE position >= ? AND position < ? "
    )
    query += f"AND state < {ANSWERED} ORDER BY position" if open_only else "ORDER BY position"
    seen = RecordSet()
    with closing(connect_for_reading(path)) as connection:

        def read(start: int, end: int) -> Iterator[LedgerItem]:
            for row in fetch(connection, path, query, start, end):
                item = _build_item(row, path, answered_before=False)
                new = row[9] is None or seen.add(row[9])
                yield item if new else attrs.evolve(item, first=False)

        first = _find_first_open(connection, path) if open_only else ()
        for position in first:
            yield from read(position, position + 1)
        following = 0
        while following < LARGEST:
            end = min(following + OPEN_BATCH, LARGEST)
            for item in read(following, end):
                if item.index not in first:
                    yield item
            # may not be the end: positions in a damaged file may be far apart
            later = "SELECT position FROM items WHERE position >= ? ORDER BY position LIMIT 1"
            following = next((row[0] for row in fetch(connection, path, later, end)), LARGEST)
            if following < end:
                raise _build_damage(path, "the positions of items are not in order")


def _find_first_open(connection: sqlite3.Connection, path: Path) -> Sequence[int]:
    """Return the position of the first open item of each model."""
    query = (
        "SELECT min(position) AS position FROM items JOIN records ON records.id = items.record "
        "WHERE state < ? GROUP BY model ORDER BY 1"
    )
    return [position for (position,) in fetch(connection, path, query, ANSWERED)]


def _read_in_order(
    connection: sqlite3.Connection, query: str, path: Path
) -> Iterator[Sequence[Any]]:
    last = -1
    query += "WHERE position > ? ORDER BY position LIMIT ?"
    while rows := fetch(connection, path, query, last, READ_BATCH):
        positions = [last, *(row[0] for row in rows)]
        if any(map(ge, positions, positions[1:])):  # pages of a damaged file can form a circle
            raise _build_damage(path, "the positions of items are not in order")
        yield from rows
        last = positions[-1]
