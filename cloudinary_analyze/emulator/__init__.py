"""A local stand-in for the Analyze API: develop and test without an account, at no cost.

It has all fifteen models, Basic and Bearer authentication, the documented errors, quotas, tasks,
signed webhooks, and a gallery of generated images, whose detections match the shapes drawn in them.
**Its analyses are synthetic:** deterministic per source, but made up. Its cloud names begin with
``emulator-``, and its ``Server`` header names it.

```python
import asyncio

from cloudinary_analyze import AnalyzeSession, Coco, Credentials
from cloudinary_analyze.emulator import Emulator, FaultPlan


async def main() -> None:
    async with Emulator(faults=FaultPlan(error_503=0.5)) as emulator:
        credentials = Credentials.from_url(emulator.cloudinary_url)
        async with AnalyzeSession(credentials) as session:
            response = await session.analyze(Coco(emulator.sample_url(1)))
            print(response.analysis.detections)
            print(session.stats.retries, "retries")


asyncio.run(main())
```

``cloudinary-analyze emulator`` runs it from a shell. To write the results yourself in tests, use
`cloudinary_analyze.testing.ScriptedEmulator`.
"""

from cloudinary_analyze.emulator.counts import Counts
from cloudinary_analyze.emulator.faults import FaultPlan
from cloudinary_analyze.emulator.notices import EmulatedTask
from cloudinary_analyze.emulator.server import Emulator
from cloudinary_analyze.emulator.webhooks import WebhookPolicy

__all__ = ["Counts", "EmulatedTask", "Emulator", "FaultPlan", "WebhookPolicy"]
