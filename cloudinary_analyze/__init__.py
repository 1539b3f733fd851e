"""Asyncio client for Cloudinary's Analyze API.

# Tutorial

You need Python 3.11 or newer, and no account: start the emulator, and export the address that it
prints.

```sh
pip install 'cloudinary-analyze[cli]'
cloudinary-analyze emulator                    # in another terminal; prints CLOUDINARY_URL=…
export CLOUDINARY_URL='cloudinary://…'
```

With an account, `CLOUDINARY_URL` is on the dashboard of the Cloudinary Console.

Examples without `import asyncio` are parts of a program: put them into a coroutine like `main` below. In
them, `session` is an open `AnalyzeSession`, and `urls` is a list of URLs.

**Analyze one image.** A request names a model and an image. The type of `response.analysis` follows
from the request:

```python
import asyncio

from cloudinary_analyze import AnalyzeSession, Captioning, Coco

URL = "https://res.cloudinary.com/demo/image/upload/sample.jpg"


async def main() -> None:
    async with AnalyzeSession() as session:  # reads CLOUDINARY_URL
        response = await session.analyze(Captioning(URL))
        print(response.analysis.caption)

        for found in (await session.analyze(Coco(URL))).analysis.detections:
            print(found.label, found.confidence, found.bounding_box)


asyncio.run(main())
```

**Ask questions.** Vision models take prompts, yes/no questions, or definitions of tags:

```python
import asyncio

from cloudinary_analyze import AIVisionGeneral, AIVisionModeration, AIVisionTagging, AnalyzeSession

URL = "https://images.example/party.jpg"
PROMPTS = ["Describe this image in detail.", "Does it contain an insect?"]


async def main() -> None:
    async with AnalyzeSession() as session:
        described = await session.analyze(AIVisionGeneral(URL, prompts=PROMPTS))
        for prompt, answer in zip(PROMPTS, described.analysis.answers, strict=True):
            print(prompt, "→", answer)

        questions = ["Does the image show alcohol?"]
        moderated = await session.analyze(AIVisionModeration(URL, rejection_questions=questions))
        print("reject:", moderated.analysis.rejected)  # any answer was "yes"

        tags = {"indoors": "Does the image show a room?"}
        tagged = await session.analyze(AIVisionTagging(URL, tag_definitions=tags))
        print(tagged.analysis.names)


asyncio.run(main())
```

**Analyze many images.** `map` takes any iterable or async iterable and pulls from it lazily. It yields
an outcome for each item: `Answered`, with a `response`, or `Failed`, with an `error`. A failed item
does not raise. Memory is bounded by the window, and a slow consumer slows the input down:

```python
import asyncio

from cloudinary_analyze import AnalyzeSession, Answered, Captioning, Failed

URLS = [f"https://images.example/{number}.jpg" for number in range(20)]


async def main() -> None:
    async with AnalyzeSession() as session, session.map(URLS, Captioning) as outcomes:
        async for outcome in outcomes:
            match outcome:
                case Answered(item=url, response=response):
                    print(url, response.analysis.caption)
                case Failed(item=url, error=error):
                    print("no caption for", url, error)


asyncio.run(main())
```

**Resume.** With a ledger, a run can be killed at any moment and repeated. Recorded responses are not
requested again. Streams also chain: an async generator between two of them feeds the second from the
first, with backpressure from end to end.

```python
import asyncio
from collections.abc import AsyncIterator

from cloudinary_analyze import AIVisionModeration, AnalyzeSession, Captioning
from cloudinary_analyze.ledger import SQLiteLedger

URLS = [f"https://images.example/{number}.jpg" for number in range(30)]


async def find_circles(session: AnalyzeSession, ledger: SQLiteLedger) -> AsyncIterator[str]:
    async with session.map(URLS, Captioning, ledger=ledger) as captions:
        async for outcome in captions:
            if outcome.error is None and "background" in outcome.response.analysis.caption:
                yield outcome.item


def moderate(url: str) -> AIVisionModeration:
    return AIVisionModeration(url, rejection_questions=["Does it show a weapon?"])


async def main() -> None:
    async with SQLiteLedger("run.ledger") as ledger, AnalyzeSession() as session:
        chosen = find_circles(session, ledger)
        async with session.map(chosen, moderate, ledger=ledger) as verdicts:
            async for outcome in verdicts:
                if outcome.error is None:
                    print(outcome.item, outcome.response.analysis.rejected)


asyncio.run(main())
```

# Guides

| guide | where |
|---|---|
| Choosing between analyze, submit and map; tasks; quotas and money; notebooks and scripts; troubleshooting; moving over; security | below |
| Errors and what to do | `cloudinary_analyze.errors` |
| Credentials, settings, throttling, rates and outages | `cloudinary_analyze.config` |
| Many workers: webhooks in FastAPI | `cloudinary_analyze.notifications` |
| Many workers: bulk analysis in any engine | `cloudinary_analyze.stage` |
| Ledgers and resuming | `cloudinary_analyze.ledger` |
| Results as JSON, tables and reports | `cloudinary_analyze.serialization`, `cloudinary_analyze.results` |
| Observability | `cloudinary_analyze.events`, `cloudinary_analyze.telemetry` |
| Testing your application | `cloudinary_analyze.testing`, `cloudinary_analyze.emulator` |
| Writing a source, a sink, a ledger, a pacer | `cloudinary_analyze.protocols` |
| The command line | `cloudinary_analyze.cli` |

.. include:: docs/choosing.md

.. include:: docs/models.md

.. include:: docs/quotas.md

.. include:: docs/notebooks.md

.. include:: docs/troubleshooting.md

.. include:: docs/migrating.md

.. include:: docs/security.md
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any, Final

from cloudinary_analyze._meter import SessionStats
from cloudinary_analyze._stream import OutcomeStream
from cloudinary_analyze._tasks.handle import AnalysisTask
from cloudinary_analyze._version import __version__
from cloudinary_analyze.analyses import (
    AIVisionGeneralAnalysis,
    AIVisionModerationAnalysis,
    AIVisionTaggingAnalysis,
    Analysis,
    AttributeValue,
    BoundingBox,
    CaptioningAnalysis,
    CldFashionAnalysis,
    CldTextAnalysis,
    CocoAnalysis,
    DetectedTags,
    Detection,
    DetectionAnalysis,
    GoogleLabel,
    GoogleLogoDetectionAnalysis,
    GoogleTaggingAnalysis,
    HumanAnatomyAnalysis,
    ImageQualityAnalysis,
    Logo,
    LogoVertex,
    LvisAnalysis,
    ModerationAnswer,
    OtherAnalysis,
    ShopClassifierAnalysis,
    UnidetAnalysis,
    VisionAnswer,
    VisionTag,
    Watermark,
    WatermarkDetectionAnalysis,
)
from cloudinary_analyze.config import Credentials, Settings, proxy_from_environment
from cloudinary_analyze.errors import (
    AnalyzeError,
    ApiError,
    AttemptTimeoutError,
    AuthenticationError,
    BadRequestError,
    BudgetReachedError,
    BulkStoppedError,
    CallTimeoutError,
    ConfigurationError,
    ForeignCancellationError,
    InvalidRequestError,
    InvalidSignatureError,
    LedgerError,
    MalformedNotificationError,
    NotFoundError,
    NotificationError,
    NotificationSourceError,
    OutageError,
    PacerError,
    PermissionDeniedError,
    QuotaExceededError,
    RateLimitedError,
    RemoteError,
    ResponseDecodeError,
    ResultNotDeliveredError,
    ServerError,
    SessionAlreadyOpenError,
    SessionClosedError,
    SessionNotOpenError,
    SessionStateError,
    StaleNotificationError,
    TaskFailedError,
    TaskLimitError,
    TaskTimeoutError,
    TransportError,
    WrongEventLoopError,
)
from cloudinary_analyze.outcomes import Answered, Failed, Outcome
from cloudinary_analyze.protocols import NotificationSink, NotificationSource
from cloudinary_analyze.requests import (
    MODELS,
    AIVisionGeneral,
    AIVisionModeration,
    AIVisionTagging,
    AnalyzeRequest,
    Asset,
    Captioning,
    CldFashion,
    CldText,
    Coco,
    GoogleLogoDetection,
    GoogleTagging,
    HumanAnatomy,
    ImageQuality,
    Lvis,
    OtherModel,
    ShopClassifier,
    TagDefinition,
    Unidet,
    Uri,
    WatermarkDetection,
    find_request_type,
)
from cloudinary_analyze.responses import Delivery, Limit, Notification, Response, TaskStatus
from cloudinary_analyze.session import AnalyzeSession
from cloudinary_analyze.webhooks import parse_notification, verify_signature

__all__ = [
    "MODELS",
    "AIVisionGeneral",
    "AIVisionGeneralAnalysis",
    "AIVisionModeration",
    "AIVisionModerationAnalysis",
    "AIVisionTagging",
    "AIVisionTaggingAnalysis",
    "Analysis",
    "AnalysisTask",
    "AnalyzeError",
    "AnalyzeRequest",
    "AnalyzeSession",
    "Answered",
    "ApiError",
    "Asset",
    "AttemptTimeoutError",
    "AttributeValue",
    "AuthenticationError",
    "BadRequestError",
    "BoundingBox",
    "Budget",
    "BudgetReachedError",
    "BulkStoppedError",
    "CallTimeoutError",
    "Captioning",
    "CaptioningAnalysis",
    "CldFashion",
    "CldFashionAnalysis",
    "CldText",
    "CldTextAnalysis",
    "Coco",
    "CocoAnalysis",
    "ConfigurationError",
    "Credentials",
    "Delivery",
    "DetectedTags",
    "Detection",
    "DetectionAnalysis",
    "Failed",
    "ForeignCancellationError",
    "GoogleLabel",
    "GoogleLogoDetection",
    "GoogleLogoDetectionAnalysis",
    "GoogleTagging",
    "GoogleTaggingAnalysis",
    "HumanAnatomy",
    "HumanAnatomyAnalysis",
    "ImageQuality",
    "ImageQualityAnalysis",
    "InvalidRequestError",
    "InvalidSignatureError",
    "LedgerError",
    "Limit",
    "Logo",
    "LogoVertex",
    "Lvis",
    "LvisAnalysis",
    "MalformedNotificationError",
    "ModerationAnswer",
    "NotFoundError",
    "Notification",
    "NotificationError",
    "NotificationSink",
    "NotificationSource",
    "NotificationSourceError",
    "OtherAnalysis",
    "OtherModel",
    "OutageError",
    "Outcome",
    "OutcomeStream",
    "PacerError",
    "PermissionDeniedError",
    "QuotaExceededError",
    "RateLimitedError",
    "RemoteError",
    "Response",
    "ResponseDecodeError",
    "ResultNotDeliveredError",
    "ServerError",
    "SessionAlreadyOpenError",
    "SessionClosedError",
    "SessionNotOpenError",
    "SessionStateError",
    "SessionStats",
    "Settings",
    "ShopClassifier",
    "ShopClassifierAnalysis",
    "Spent",
    "StaleNotificationError",
    "TagDefinition",
    "TaskFailedError",
    "TaskLimitError",
    "TaskStatus",
    "TaskTimeoutError",
    "TransportError",
    "Unidet",
    "UnidetAnalysis",
    "Uri",
    "VisionAnswer",
    "VisionTag",
    "Watermark",
    "WatermarkDetection",
    "WatermarkDetectionAnalysis",
    "WrongEventLoopError",
    "__version__",
    "find_request_type",
    "parse_notification",
    "proxy_from_environment",
    "to_dict",
    "to_json",
    "verify_signature",
]

# silent until the application configures logging; see `cloudinary_analyze.events`
logging.getLogger(__name__).addHandler(logging.NullHandler())

if TYPE_CHECKING:
    from cloudinary_analyze._budget import Budget, Spent
    from cloudinary_analyze.serialization import to_dict, to_json

# imported by their first use, because few programs need them
_MODULES: Final = {
    "Budget": "_budget",
    "Spent": "_budget",
    "to_dict": "serialization",
    "to_json": "serialization",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    value = globals()[name] = getattr(module, name)
    return value
