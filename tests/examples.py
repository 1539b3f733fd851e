"""The public names of the package, and the examples of the documentation, read from its source."""

from __future__ import annotations

import ast
import functools
import inspect
import re
from pathlib import Path

from scripted import no_collector

import cloudinary_analyze

PACKAGE = Path(cloudinary_analyze.__file__).parent
GUIDES = PACKAGE / "docs"
README = PACKAGE.parent / "README.md"
# names that partial examples assume to exist
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


@functools.cache
def read_modules() -> list[tuple[str, ast.Module]]:
    """Return every module with its name."""
    found = []
    # a collection may run code that parses, too, which Python 3.11 reports as a `SystemError`
    with no_collector():
        for path in sorted(PACKAGE.rglob("*.py")):
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            name = ".".join(part for part in parts if part != "__init__")
            found.append((name, ast.parse(path.read_text(encoding="utf-8"))))
    return found


def find_public_names() -> set[tuple[str, str]]:
    """Return the names in every `__all__`, each with its module.

    A name that the package and a module both list is attributed to the package.
    """
    listed = {
        (module, name)
        for module, tree in read_modules()
        if "._" not in module
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        for name in ast.literal_eval(node.value)
    }
    root = cloudinary_analyze.__name__
    return {(root if (root, name) in listed else module, name) for module, name in listed}


def read_examples(docstring: str) -> list[str]:
    """Return the blocks of Python in a docstring, dedented."""
    return read_fences(inspect.cleandoc(docstring))


def read_fences(text: str) -> list[str]:
    """Return the blocks of Python in Markdown."""
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def find_examples() -> dict[str, list[str]]:
    """Return the examples of the README, each guide, class, function and module, by its name."""
    found = {
        path.stem: read_fences(path.read_text(encoding="utf-8"))
        for path in [README, *sorted(GUIDES.glob("*.md"))]
    }
    for name, tree in read_modules():
        _visit(tree, name, found)
    return found


def _visit(node: ast.AST, name: str, found: dict[str, list[str]]) -> None:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring and (examples := read_examples(docstring)):
            found[name] = examples
        for child in node.body:
            _visit(child, f"{name}.{getattr(child, 'name', '')}", found)


def write_context() -> str:
    """Return the context of partial examples: the public names, and some variables."""
    modules = {name: module for module, name in sorted(find_public_names(), reverse=True)}
    del modules["WebhookReceiver"]  # there are two
    lines = [f"from {module} import {name} as {name}" for name, module in modules.items()]
    return "\n".join(lines) + CONTEXT


def is_program(example: str) -> bool:
    """Return whether an example imports everything that it needs."""
    return "from cloudinary_analyze import" in example or "\nasyncio.run(" in example
