"""The workflows run pinned actions with few permissions, on every Python that the package supports."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))
TEXTS = {path.stem: path.read_text(encoding="utf-8") for path in WORKFLOWS}


@pytest.mark.parametrize("name", TEXTS)
def test_actions_are_pinned_to_commits(name: str) -> None:
    used = re.findall(r"uses: (.*)", TEXTS[name])
    assert used
    for action in used:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


@pytest.mark.parametrize("name", TEXTS)
def test_a_workflow_may_only_read(name: str) -> None:
    """Further permissions belong to single jobs."""
    assert re.search(r"^permissions:\n  contents: read\n\w", TEXTS[name], re.MULTILINE)
    assert TEXTS[name].count("persist-credentials: false") == TEXTS[name].count("actions/checkout@")


def test_every_supported_python_is_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    supported = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    (matrix,) = re.findall(r"python: \[(.*)\]", TEXTS["ci"])
    assert set(supported) <= set(re.findall(r"3\.\d+", matrix))


def test_releases_are_attested_and_need_no_token() -> None:
    release = TEXTS["release"]
    assert "attestations: write" in release
    assert release.count("id-token: write") == 2
    assert "environment:" in release
    assert "secrets." not in release
