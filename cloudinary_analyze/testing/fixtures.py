"""The fixtures of pytest. Only pytest imports this module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest

from cloudinary_analyze.config import Settings
from cloudinary_analyze.session import AnalyzeSession
from cloudinary_analyze.testing.clock import ManualClock
from cloudinary_analyze.testing.emulator import ScriptedEmulator, run_emulator


@pytest.fixture(scope="session")
def _cloudinary_ports() -> list[int]:
    """Return the port of the last emulator, which the next one uses if it is free.

    So modules that read their credentials on import reach the emulator of each test.
    """
    return [0]


@pytest.fixture
def cloudinary_emulator(
    monkeypatch: pytest.MonkeyPatch, _cloudinary_ports: list[int]
) -> Iterator[ScriptedEmulator]:
    """Return a running emulator that ``AnalyzeSession()`` calls."""
    with ExitStack() as stack:
        try:
            emulator = stack.enter_context(
                run_emulator(ScriptedEmulator(port=_cloudinary_ports[0]))
            )
        except OSError:  # another process took the port
            emulator = stack.enter_context(run_emulator(ScriptedEmulator()))
        _cloudinary_ports[0] = urlsplit(emulator.url).port or 0
        monkeypatch.setenv("CLOUDINARY_URL", emulator.cloudinary_url)
        yield emulator


@pytest.fixture
def analyze_session(cloudinary_emulator: ScriptedEmulator) -> AnalyzeSession:
    """Return a session to the emulator, for ``async with``, with short waits between attempts."""
    settings = Settings(backoff_first=0.001, backoff_max=0.01, outage_timeout=1.0)
    return AnalyzeSession(cloudinary_emulator.credentials, settings=settings)


@pytest.fixture
def manual_clock() -> ManualClock:
    """Return a clock that moves only on request."""
    return ManualClock()
