"""The pytest fixtures that applications opt in to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

APPLICATION_TEST = """
import asyncio

from cloudinary_analyze import AnalyzeSession, Captioning


async def caption(url):
    async with AnalyzeSession() as session:
        return (await session.analyze(Captioning(url))).analysis.caption


def test_captions(cloudinary_emulator):
    assert asyncio.run(caption(cloudinary_emulator.sample_url(1)))
    assert cloudinary_emulator.counts.total_done == 1


def test_time(manual_clock):
    asyncio.run(manual_clock.advance(3600))
    assert manual_clock.monotonic() == 3600
"""


def test_an_application_that_opts_in_has_an_emulator_and_a_clock(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["cloudinary_analyze.testing"]')
    (tmp_path / "test_application.py").write_text(APPLICATION_TEST)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-W",
            "error",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:asyncio",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
