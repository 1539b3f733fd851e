"""The public names of the package, and the examples in its docstrings."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap
from pathlib import Path

import cloudinary_analyze

PACKAGE = Path(cloudinary_analyze.__file__).parent


def find_public_names() -> set[tuple[str, str]]:
    """Return the names in every `__all__`, each with its module."""
    names = {("cloudinary_analyze", name) for name in cloudinary_analyze.__all__}
    for found in pkgutil.walk_packages(cloudinary_analyze.__path__, "cloudinary_analyze."):
        if not any(part.startswith("_") for part in found.name.split(".")):
            module = importlib.import_module(found.name)
            names |= {(found.name, name) for name in getattr(module, "__all__", ())}
    return names


def read_examples(docstring: str) -> list[str]:
    """Return the literal blocks (after ``::``) of a docstring, dedented."""
    text = inspect.cleandoc(docstring)
    blocks = re.findall(r"::\n\n((?:(?:[ ]{4}.*)?\n)+)", text + "\n\n")
    return [textwrap.dedent(block).strip() + "\n" for block in blocks]


def find_examples() -> dict[str, list[str]]:
    """Return the examples of every public class, function and module, by its qualified name."""
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__")
        _visit(ast.parse(path.read_text(encoding="utf-8")), module, found)
    return found


def _visit(node: ast.AST, name: str, found: dict[str, list[str]]) -> None:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring and (examples := read_examples(docstring)):
            found[name] = examples
        for child in node.body:
            _visit(child, f"{name}.{getattr(child, 'name', '')}", found)
