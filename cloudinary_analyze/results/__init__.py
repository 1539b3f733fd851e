"""Results of bulk work as files: records, exports and reports.

A record is a JSON object with the request, the response and the error of one outcome. The command
line writes one record per line:

```python
import asyncio
from pathlib import Path

from cloudinary_analyze import AnalyzeSession, Captioning
from cloudinary_analyze.results import build_record, dump_record

URLS = [f"https://images.example/{number}.jpg" for number in range(3)]


async def main() -> None:
    with Path("results.jsonl").open("w", encoding="utf-8") as file:
        async with AnalyzeSession() as session, session.map(URLS, Captioning) as outcomes:
            async for outcome in outcomes:
                file.write(dump_record(build_record(outcome)).decode())


asyncio.run(main())
```

``cloudinary-analyze report results.jsonl -o report.html`` turns such a file into one self-contained
page: the pictures with what was found drawn over them, filters, and the distributions of labels,
scores and latencies. `cloudinary_analyze.results.export.export_results` writes records as CSV or
Parquet. For plain JSON of a response, see `cloudinary_analyze.serialization`.
"""

from cloudinary_analyze.results.records import build_record, dump_record

__all__ = ["build_record", "dump_record"]
