"""Ledgers: durable stores of what bulk work submitted and received.

| ledger | for |
|---|---|
| `SQLiteLedger` | one process; one file |
| `cloudinary_analyze.ledger.redis.RedisLedger` | workers on many machines |
| a subclass of `cloudinary_analyze.protocols.Ledger` | your own store |

Pass one to `AnalyzeSession.map`. Running the same code again resumes it: recorded responses are
yielded from the ledger (``outcome.restored``), submitted tasks are re-attached, and the rest is sent.

```python
import asyncio

from cloudinary_analyze import AnalyzeSession, Coco
from cloudinary_analyze.ledger import SQLiteLedger

SIGNED = {"bee": "https://images.example/bee.jpg?token=1"}  # the token differs in each run


async def main() -> None:
    async with SQLiteLedger("run.ledger") as ledger, AnalyzeSession() as session:
        for _ in range(2):
            async with session.map(
                list(SIGNED), lambda name: Coco(SIGNED[name]), ledger=ledger, key=str
            ) as outcomes:
                async for outcome in outcomes:
                    print(outcome.item, "restored" if outcome.restored else "sent")


asyncio.run(main())
```

A ledger belongs to one host and cloud name. It stores responses and permanent errors: 400, 404, 413,
415, 422 and failed tasks. Rate limits, server errors, timeouts and network errors are not stored, so
the next run sends these items again. Pass ``key=`` when URLs change between runs, for example because
they are signed. A key names one source: URLs may differ by their signature and its expiry
(``X-Amz-*``, ``Expires``, ``Signature``, ``sig``, ``__cld_token__``, ``token``, …), not by ``?id=2``.

A request that was in flight when the process was killed is sent again, because it is unknown whether
it was charged. ``cloudinary-analyze export run.ledger -o results.parquet`` writes the contents of a
ledger, also during a run.
"""

from cloudinary_analyze.ledger.sqlite import SQLiteLedger

__all__ = ["SQLiteLedger"]
