"""The public names of the package, and the examples in its docstrings, read from its source."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import cloudinary_analyze

PACKAGE = Path(cloudinary_analyze.__file__).parent


def read_modules() -> Iterator[tuple[str, ast.Module]]:
    """Yield every module by its name."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        yield name, ast.parse(path.read_text(encoding="utf-8"))


def find_public_names() -> set[tuple[str, str]]:
    """Return the names in every `__all__`, each with its module."""
    return {
        (module, name)
        for module, tree in read_modules()
        if "._" not in module
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        for name in ast.literal_eval(node.value)
    }


def read_examples(docstring: str) -> list[str]:
    """Return the literal blocks (after ``::``) of a docstring, dedented."""
    text = inspect.cleandoc(docstring)
    blocks = re.findall(r"::\n\n((?:(?:[ ]{4}.*)?\n)+)", text + "\n\n")
    return [textwrap.dedent(block).strip() + "\n" for block in blocks]


def find_examples() -> dict[str, list[str]]:
    """Return the examples of every class, function and module, by its qualified name."""
    found: dict[str, list[str]] = {}
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
