"""Strict type checkers accept every example of the README and of the docstrings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from examples import find_examples, find_public_names

README = Path(__file__).parents[2] / "README.md"
SETTINGS = """
[tool.mypy]
strict = true
files = ["."]

[tool.pyright]
include = ["."]
typeCheckingMode = "strict"
reportUnusedVariable = false # an example may end with an assignment
"""
# what an example that is only a part of a program takes for granted
CONTEXT = """
from fastapi import FastAPI as FastAPI
from fastapi.testclient import TestClient as TestClient
from starlette.routing import Route as Route

client: TestClient
cloudinary_emulator: ScriptedEmulator
credentials: Credentials
notifications: RedisNotifications
session: AnalyzeSession
sink: NotificationSink
task_id: str
urls: list[str]
"""
OWN_CONTEXT = {
    "cloudinary_analyze.notifications.aiohttp": """
from aiohttp import web
from cloudinary_analyze.notifications.aiohttp import WebhookReceiver

app = web.Application()
""",
    "cloudinary_analyze.notifications.asgi": """
from cloudinary_analyze.notifications.asgi import WebhookReceiver
""",
    "cloudinary_analyze.notifications.redis.RedisNotifications": """
from cloudinary_analyze.notifications.asgi import WebhookReceiver
""",
    "cloudinary_analyze.testing": """
app = FastAPI()
""",
}


def write_context() -> str:
    """Return what fragments take for granted: the public names, and some variables."""
    modules = {name: module for module, name in sorted(find_public_names(), reverse=True)}
    del modules["WebhookReceiver"]  # there are two
    lines = [f"from {module} import {name} as {name}" for name, module in modules.items()]
    return "\n".join(lines) + CONTEXT


def complete(name: str, example: str) -> str:
    """Return an example of a docstring as a file."""
    if example.startswith("from ") and "from cloudinary_analyze import" in example:
        return example
    try:
        compile(example, name, "exec")
    except SyntaxError:  # `async with` outside a function
        example = f"async def example() -> None:\n{textwrap.indent(example, '    ')}"
    return f"from context import *\n{OWN_CONTEXT.get(name, '')}\n{example}"


def write_examples(folder: Path) -> int:
    """Write each example as a file of its own; return how many there are."""
    text = README.read_text(encoding="utf-8")
    files = {
        f"readme_{text.count(chr(10), 0, match.start()) + 2}": match[1]
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    }
    for name, examples in find_examples().items():
        for number, example in enumerate(examples, 1):
            if name == "cloudinary_analyze.stage" and number > 1:
                continue  # engines without types; tests/engines runs these programs
            files[f"{name}_{number}".replace(".", "_")] = complete(name, example)
    files["app"] = files.pop("cloudinary_analyze_testing_1")  # its test imports it
    for name, content in files.items():
        (folder / f"{name}.py").write_text(content, encoding="utf-8")
    (folder / "context.py").write_text(write_context(), encoding="utf-8")
    (folder / "pyproject.toml").write_text(SETTINGS, encoding="utf-8")
    return len(files)


@pytest.mark.slow
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_strict_type_checkers_accept_every_example(checker: str, tmp_path: Path) -> None:
    for needed in (checker, "nats", "httpx2"):
        pytest.importorskip(needed, reason=f"{needed} belongs to the extra `dev`")
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
