"""Detects calls in the package that block a running event loop, with blockbuster.

A blocking call raises, and the test fails even if the code under test handles the error.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import blockbuster.blockbuster
import pytest

import cloudinary_analyze

PACKAGE: Final = Path(cloudinary_analyze.__file__).parent

# (end of the file name, functions): calls below these functions may block, for the stated reason
ALLOWED: Final = (
    # imports are up to the interpreter, and log handlers up to the application
    ("<frozen importlib._bootstrap>", {"_find_and_load"}),
    ("logging/__init__.py", {"handle"}),
    # finalizers of any object, because the garbage collector runs them anywhere
    ("weakref.py", {"__call__"}),
    # local reads by key take a few microseconds; handing each to a thread would cost ten times more
    ("ledger/sqlite.py", {"find"}),
    # documented as synchronous, and called by the tests on their event loop
    ("ledger/sqlite.py", {"__init__", "absorb", "counts", "copy_states"}),
    ("ledger/items.py", {"read", "read_items", "read_noted", "read_newest_responses"}),
    ("ledger/redis.py", {"iter_records", "worker_stats", "_batch"}),
    ("results/export.py", {"export_results"}),
    ("results/report/__init__.py", {"write_report"}),
    ("cloudinary_analyze/stage.py", {"__call__", "close_sessions"}),
    # once, when a session opens with a user's `trust_env`, as aiohttp itself does per request
    ("_http/transport.py", {"has_netrc_login"}),
    # a user's synchronous iterator, and a user's hook
    ("cloudinary_analyze/_stream.py", {"_pull"}),
    ("cloudinary_analyze/_meter.py", {"_call"}),
    # a test looks into the ledger of another process
    ("chaos/test_cli_kill.py", {"count_durable"}),
    # a test reads a setting of a connection when it is closed
    ("unit/test_durability.py", {"close"}),
)

_blocked: list[str] = []


class _EveryFunction:
    """A container that contains every name."""

    def __contains__(self, _: object) -> bool:
        return True


class _BlockingError(blockbuster.BlockingError):
    def __init__(self, function: str) -> None:
        super().__init__(function)
        _blocked.append("".join(traceback.format_stack(limit=20)))


def is_measured() -> bool:
    """Whether coverage measures this process."""
    coverage = sys.modules.get("coverage")
    return coverage is not None and coverage.Coverage.current() is not None


@contextlib.contextmanager
def forbid_blocking() -> Iterator[None]:
    """Make blocking calls raise in coroutines and callbacks of the package.

    Not while coverage measures: its tracer takes locks and looks at files in any function.
    """
    if is_measured():
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockbuster.blockbuster, "BlockingError", _BlockingError)
        with blockbuster.blockbuster_ctx(cloudinary_analyze) as detector:
            for function in detector.functions.values():
                function.can_block_functions += ALLOWED
                # the command line reads and writes its files between streams, alone on its loop
                function.can_block_functions += [
                    (f"cloudinary_analyze/cli/{path.name}", _EveryFunction())
                    for path in PACKAGE.glob("cli/*.py")
                ]
            yield


def take_blocked() -> list[str]:
    """Return the stacks of the blocking calls since the last call of this function."""
    found = _blocked.copy()
    _blocked.clear()
    return found
