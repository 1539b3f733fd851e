"""The package's public names, import cost, and freedom from circular imports."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
from importlib.util import find_spec

import pytest

import cloudinary_analyze

NAMES = [
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
    "MODELS",
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
LATER = ("aiohttp", "cattrs", "backoff", "cloudinary_analyze.notifications.receiver")
OPTIONAL = (
    "cyclopts",
    "opentelemetry",
    "pydantic",
    "rich",
    "redis",
    "jinja2",
    "pyarrow",
    "uvloop",
)
PROBE = """
import importlib, sys
importlib.import_module(sys.argv[1])
print(*(name for name in sys.argv[2:] if name in sys.modules))
"""
SESSION_PROBE = """
import sys
from cloudinary_analyze import AnalyzeSession, Credentials
AnalyzeSession(Credentials("demo", "1", "a"))
print(*(name for name in sys.argv[1:] if name in sys.modules))
"""
CLI_PROBE = """
import contextlib, io, sys
from cloudinary_analyze.cli import main
watched = sys.argv[1:]
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main({})
print(*(name for name in watched if name in sys.modules))
"""
# A package is always imported before its modules. So each module meets the same half-made
# modules in a fresh interpreter and in a fork of one that imported the package alone.
# Other libraries never import this package, so importing them once serves all forks.
LIBRARIES = (
    "aiohttp.web",
    "cattrs",
    "backoff",
    "orjson",
    "uvloop",
    "redis.asyncio",
    "opentelemetry.metrics",
    "opentelemetry.trace.propagation.tracecontext",
    "cyclopts",
    "rich.live",
    "jinja2",
    "pyarrow.parquet",
    "sqlite3",
    "pytest",
    "asyncio",
)
FORKS = """
import importlib, os, sys
for library in sys.argv[1].split():
    importlib.import_module(library)
import cloudinary_analyze
for module in sys.argv[2:]:
    if module not in sys.modules:
        if (child := os.fork()) == 0:
            importlib.import_module(module)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"{module} cannot be imported first")
    print(module)
"""
MODULES = [
    "cloudinary_analyze",
    *(
        found.name
        for found in pkgutil.walk_packages(cloudinary_analyze.__path__, "cloudinary_analyze.")
        if not found.name.endswith("__main__")
        # the test environment does not install the engines
        and (found.name != "cloudinary_analyze.dask" or find_spec("distributed"))
    ),
]


def start_probe(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # coverage, started in each subprocess by its variables, imports sqlite3 for itself
    bare = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=bare,
    )


def run_probe(program: str, *watched: str) -> list[str]:
    """Return which of the watched modules a program has imported."""
    done = start_probe(program, *watched)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def import_first(module: str, *watched: str) -> list[str]:
    return run_probe(PROBE, module, *watched)


def test_the_public_names_are_listed_and_exist() -> None:
    assert sorted(cloudinary_analyze.__all__) == sorted(NAMES)
    assert all(hasattr(cloudinary_analyze, name) for name in NAMES)


def test_the_import_loads_no_optional_module() -> None:
    watched = [
        *OPTIONAL,
        *LATER,
        "cloudinary_analyze.emulator",
        "cloudinary_analyze.cli",
        "sqlite3",
    ]
    assert import_first("cloudinary_analyze", *watched) == []


def test_the_first_session_imports_all_that_calls_need() -> None:
    """No call blocks the loop for an import, or fails to import when descriptors run out."""
    assert run_probe(SESSION_PROBE, *LATER[:3], "cloudinary_analyze._wire.structure") == [
        *LATER[:3],
        "cloudinary_analyze._wire.structure",
    ]


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["models"]], ids=" ".join)
def test_the_command_line_helps_without_a_network_library(arguments: list[str]) -> None:
    assert run_probe(CLI_PROBE.format(arguments), *LATER[:3], "redis", "pyarrow") == []


def test_the_probe_detects_an_optional_library() -> None:
    assert import_first("rich", *OPTIONAL) == ["rich"]


@pytest.mark.slow
def test_every_module_can_be_imported_first() -> None:
    """Each process starts without the package's modules, so that no circular import can hide."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FORKS, " ".join(LIBRARIES), *MODULES],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == MODULES
