"""A user's project uses every public name, and strict type checkers accept it."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
import tokenize
from pathlib import Path
from typing import get_args

import pytest
from examples import find_public_names
from scripted import no_collector

from cloudinary_analyze import events

CONSUMER = Path(__file__).parents[1] / "typing" / "consumer"
FILES = sorted(CONSUMER.glob("*.py"))


def find_used_names(tree: ast.Module) -> set[tuple[str, str]]:
    """Return the names that a file imports and also uses, each with its module."""
    imported: dict[str, tuple[str, str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                imported[alias.asname or alias.name] = (node.module or "", alias.name)
    used: set[tuple[str, str]] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in imported:
            used.add(imported[node.id])
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = ".".join(imported.get(node.value.id, ()))
            used.add((module, node.attr))
    return used


def test_every_public_name_is_used() -> None:
    used: set[tuple[str, str]] = set()
    with no_collector():  # see `read_modules`
        for path in FILES:
            used |= find_used_names(ast.parse(path.read_text(encoding="utf-8")))
    unused = sorted(find_public_names() - used)
    assert unused == [], "use each new public name in a file of tests/typing/consumer"


def test_every_event_is_public() -> None:
    assert {kind.__name__ for kind in get_args(events.Event)} <= set(events.__all__)


def test_no_cast_and_no_ignore_is_needed() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        assert "cast" not in {token.string for token in tokens if token.type == tokenize.NAME}
        assert "ignore" not in {
            word
            for token in tokens
            if token.type == tokenize.COMMENT
            for word in token.string.replace(":", " ").replace("[", " ").split()
        }


def check(checker: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a type checker in the folder of the project, with the project's settings."""
    pytest.importorskip(checker, reason=f"{checker} belongs to the group `dev`")
    environment = Path(sys.executable).parent
    return subprocess.run(
        [environment / checker, *options],
        cwd=CONSUMER,
        env={**os.environ, "PATH": f"{environment}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_strict_mypy_accepts_it(tmp_path: Path) -> None:
    done = check("mypy", "--cache-dir", str(tmp_path))
    assert done.stdout == f"Success: no issues found in {len(FILES)} source files\n", done.stdout


@pytest.mark.slow
def test_strict_pyright_accepts_it() -> None:
    done = check("pyright", "--pythonpath", sys.executable, "--warnings")
    assert done.returncode == 0, done.stdout


def test_pyrefly_accepts_it() -> None:
    done = check("pyrefly", "check", "--python-interpreter-path", sys.executable)
    assert done.returncode == 0, done.stdout


def test_ty_accepts_it() -> None:
    done = check("ty", "check", "--python", sys.prefix)
    assert done.returncode == 0, done.stdout
