"""Ledgers, records, exports, reports and the command line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloudinary_analyze import AnalyzeError, AnalyzeSession, Captioning, Response
from cloudinary_analyze.cli import main
from cloudinary_analyze.ledger import SQLiteLedger
from cloudinary_analyze.ledger.redis import RedisLedger
from cloudinary_analyze.protocols import Claim, Ledger, LedgerRecord
from cloudinary_analyze.results import build_record, dump_record
from cloudinary_analyze.results.export import (
    COLUMNS,
    ExportFormat,
    OwnColumns,
    build_row,
    export_results,
    find_own_columns,
    read_records,
    write_records,
)
from cloudinary_analyze.results.report import MOST_PICTURES, WrittenReport, write_report


class MemoryLedger(Ledger):
    """A custom ledger, which several streams of this process share."""

    def __init__(self) -> None:
        """Create an empty ledger."""
        self._records: dict[str, LedgerRecord] = {}

    async def open(self, *, base_url: str, cloud_name: str) -> None:
        """Do nothing."""

    async def find(self, key: str) -> LedgerRecord | None:
        """Return the record of a key."""
        return self._records.get(key)

    async def record_submitted(self, key: str, task_id: str | None) -> None:
        """Record a task."""
        self._records[key] = LedgerRecord(key=key, task_id=task_id)

    async def record_response(self, key: str, response: Response[Any], *, seconds: float) -> None:
        """Record a response."""
        self._records[key] = LedgerRecord(key=key, response=response.raw, seconds=seconds)

    async def record_error(self, key: str, error: AnalyzeError, *, seconds: float) -> None:
        """Record an error."""
        self._records[key] = LedgerRecord(key=key, error=error, seconds=seconds)

    async def claim(self, key: str) -> Claim | None:
        """Claim a key."""
        record = await self.find(key)
        return None if record is not None and record.final else Claim()


async def run(session: AnalyzeSession, urls: list[str], folder: Path, redis_url: str) -> None:
    """Run with each ledger, and write the results."""
    async with SQLiteLedger(folder / "run.ledger") as file, RedisLedger(redis_url) as shared:
        ledgers: list[Ledger] = [file, shared, MemoryLedger()]
        for ledger in ledgers:
            lines: list[bytes] = []
            async with session.map(urls, Captioning, ledger=ledger, key=str.lower) as stream:
                async for outcome in stream:
                    lines.append(dump_record(build_record(outcome)))
            print(export(lines, folder, "csv"))


def export(lines: list[bytes], folder: Path, form: ExportFormat) -> int:
    """Write a table and a report."""
    with (folder / f"copy.{form}").open("wb") as stream:
        write_records(read_records(lines), stream, form)
    rows: list[Mapping[str, Any]] = [build_row(record) for record in read_records(lines)]
    print([[row[name] for name in COLUMNS] for row in rows], MOST_PICTURES)
    report: WrittenReport = write_report(lines, folder / "report.html")
    print(report.pictures)
    own: OwnColumns = find_own_columns([{"sku": 7}])
    return export_results(read_records(lines), folder / f"results.{form}", form, own=own)


if __name__ == "__main__":
    raise SystemExit(main(["models"]))
