"""The README tells the truth: its code runs, and its tables are those of the code."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

import cloudinary_analyze.config
from cloudinary_analyze import MODELS, AnalyzeError, Settings, errors
from cloudinary_analyze._policy import QUOTA, RULES, Rule, find_rule
from cloudinary_analyze.emulator import Emulator
from cloudinary_analyze.testing import run_emulator

README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def emulator_url() -> Iterator[str]:
    """An emulator on a loop and thread of its own, since the README's code brings its own loop."""
    with run_emulator(Emulator()) as emulator:
        yield emulator.cloudinary_url


def describe(block: str) -> str:
    imported = re.search(r"import (AnalyzeSession, )?(\w+)", block.replace("import asyncio", ""))
    return f"{TEXT[: TEXT.index(block)].count(chr(10)) + 1}-{imported[2] if imported else ''}"


@pytest.mark.parametrize("block", BLOCKS, ids=describe)
def test_every_python_block_runs(
    block: str, emulator_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CLOUDINARY_URL", emulator_url)
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1")  # made, and not connected to
    monkeypatch.setenv("PUBLIC_URL", "https://app.example")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(README), "exec"), {"__name__": "readme"})


def test_the_fastapi_application_is_the_one_that_is_tested() -> None:
    """What the README prints is run with uvicorn elsewhere, letter by letter."""
    assert (README.parent / "tests/apps/fastapi_app.py").read_text(encoding="utf-8") in BLOCKS


def build_settings_table() -> str:
    tree = ast.parse(inspect.getsource(cloudinary_analyze.config))
    (cls,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Settings"]
    docs = {
        field.target.id: " ".join(doc.value.value.split())
        for field, doc in zip(cls.body, cls.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(doc, ast.Expr)
        and isinstance(doc.value, ast.Constant)
    }
    rows = ["| field | default | meaning |", "|---|---|---|"]
    for field in attrs.fields(Settings):
        default = field.default
        shown = f"{default:,}" if type(default) is int and default >= 10_000 else f"{default}"
        rows.append(f"| `{field.name}` | {shown} | {docs[field.name].replace('``', '`')} |")
    return "\n".join(rows)


def test_the_settings_table_is_that_of_the_code() -> None:
    """Every field of Settings is documented, with its true default."""
    assert build_settings_table() in TEXT


def test_the_models_table_names_every_model_with_its_feature() -> None:
    for name, request_type in MODELS.items():
        start = f"| `{request_type.__name__}(source"
        row = next(line for line in TEXT.splitlines() if line.startswith(start))

        assert f"| `{name}` |" in row
        assert row.endswith(f"| `{request_type.feature}` |")


def test_the_errors_table_names_every_error() -> None:
    table = TEXT[TEXT.index("## Errors") : TEXT.index("## Settings")]
    roots = {AnalyzeError, errors.RemoteError, errors.ApiError, errors.NotificationError}
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, AnalyzeError) and value not in roots:
            assert f"`{name}`" in table


def build_status_table() -> str:
    statuses: dict[Rule, list[str]] = {}
    for status in range(100, 600):
        if status not in {200, 202}:
            statuses.setdefault(find_rule(status), []).append(str(status))
    rows = [
        "| status | error | retried | charged | slows down | final | stops in a stream |",
        "|---|---|---|---|---|---|---|",
    ]
    shown = [(_name_statuses(rule, codes), rule) for rule, codes in statuses.items()]
    for codes, rule in [*shown, ("429, exhausted quota", QUOTA)]:
        marks = [rule.retriable, rule.ambiguous, rule.throttle, rule.permanent]
        cells = ["yes" if mark else "" for mark in marks]
        stop = "" if rule.stop is None else rule.stop.value
        rows.append(f"| {codes} | `{rule.error.__name__}` | {' | '.join(cells)} | {stop} |")
    return "\n".join(rows)


def _name_statuses(rule: Rule, codes: list[str]) -> str:
    if len(codes) < 10:
        return ", ".join(codes)
    named = [code for code in codes if int(code) in RULES]
    return ", ".join([*named, f"other {codes[-1][0]}xx" if codes[0][0] != "1" else "1xx, 3xx"])


def test_the_status_table_is_that_of_the_policy() -> None:
    assert build_status_table() in TEXT


if __name__ == "__main__":
    print(build_settings_table())
    print(build_status_table())
