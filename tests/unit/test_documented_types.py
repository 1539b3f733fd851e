"""Strict type checkers accept every example of the README, the guides and the docstrings."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from examples import OWN_CONTEXT, find_examples, is_program, write_context

SETTINGS = """
[tool.mypy]
strict = true
files = ["."]

[tool.pyright]
include = ["."]
typeCheckingMode = "strict"
reportUnusedVariable = false # an example may end with an assignment
"""


def complete(name: str, example: str) -> str:
    """Return a docstring's example as a complete file."""
    if is_program(example):
        return example
    try:
        compile(example, f"<{name}>", "exec")
    except SyntaxError:  # `async with` outside a function
        example = f"async def example() -> None:\n{textwrap.indent(example, '    ')}"
    return f"from context import *\n{OWN_CONTEXT.get(name, '')}\n{example}"


def write_examples(folder: Path) -> int:
    """Write each example to a separate file; return how many there are."""
    files: dict[str, str] = {}
    for name, examples in find_examples().items():
        for number, example in enumerate(examples, 1):
            if name == "cloudinary_analyze.stage" and number > 1:
                continue  # engines without types; tests/engines runs these programs
            files[f"{name}_{number}".replace(".", "_")] = complete(name, example)
    files["app"] = files.pop("cloudinary_analyze_testing_1")  # a test imports this example
    for name, content in files.items():
        (folder / f"{name}.py").write_text(content, encoding="utf-8")
    (folder / "context.py").write_text(write_context(), encoding="utf-8")
    (folder / "pyproject.toml").write_text(SETTINGS, encoding="utf-8")
    return len(files)


@pytest.mark.slow
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_strict_type_checkers_accept_every_example(checker: str, tmp_path: Path) -> None:
    for needed in (checker, "nats", "httpx2"):
        pytest.importorskip(needed, reason=f"{needed} belongs to the group `dev`")
    assert write_examples(tmp_path) >= 20
    options = {
        "mypy": ["--cache-dir", str(tmp_path / "cache")],
        "pyright": ["--pythonpath", sys.executable, "--warnings"],
    }
    environment = Path(sys.executable).parent
    done = subprocess.run(
        [environment / checker, *options[checker]],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{environment}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
