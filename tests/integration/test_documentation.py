"""The documentation is true: its code runs, and its tables are those of the code."""

from __future__ import annotations

import ast
import asyncio
import importlib
import inspect
import re
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from examples import GUIDES, OWN_CONTEXT, README, find_examples, find_public_names, is_program
from fastapi import FastAPI
from starlette.routing import Route

import cloudinary_analyze.config
from cloudinary_analyze import (
    MODELS,
    AnalyzeError,
    AnalyzeSession,
    Credentials,
    Settings,
    errors,
)
from cloudinary_analyze._policy import QUOTA, RULES, Rule, find_rule
from cloudinary_analyze.notifications.asgi import WebhookReceiver
from cloudinary_analyze.notifications.redis import RedisNotifications
from cloudinary_analyze.stage import close_sessions
from cloudinary_analyze.testing import ScriptedEmulator, run_emulator

with warnings.catch_warnings():  # Starlette warns if it finds httpx but not httpx2
    warnings.simplefilter("ignore")
    from fastapi.testclient import TestClient

EXAMPLES = {
    f"{name.removeprefix('cloudinary_analyze.')}-{number}": (name, example)
    for name, examples in find_examples().items()
    for number, example in enumerate(examples, 1)
    # tests/engines runs the other programs of the stage
    if name != "cloudinary_analyze.stage" or number == 1
}
NEEDS = {"nats": "from nats."}  # libraries that the test extra does not install


@pytest.fixture(scope="module")
def emulator() -> Iterator[ScriptedEmulator]:
    """An emulator on a separate loop and thread, since examples bring their own loop."""
    with run_emulator(ScriptedEmulator()) as emulator:
        yield emulator


def import_names(code: str) -> dict[str, Any]:
    """Import the public names that an example uses without importing them."""
    names: dict[str, Any] = {"FastAPI": FastAPI, "TestClient": TestClient, "Route": Route}
    for module, name in find_public_names():
        if re.search(rf"\b{name}\b", code):
            names[name] = getattr(importlib.import_module(module), name)
    return names


def run_fragment(name: str, example: str, names: dict[str, Any], redis_url: str) -> None:
    """Run a part of a program, which may await at its top level."""

    async def run() -> None:
        sink: asyncio.Queue[Any] = asyncio.Queue()
        credentials = Credentials.from_environment()
        hook = Route("/hooks/cloudinary", endpoint=WebhookReceiver(sink, credentials))
        names.update(
            credentials=credentials,
            sink=sink,
            task_id="a-task",
            urls=[f"https://images.example/{number}.jpg" for number in range(3)],
            client=TestClient(FastAPI(routes=[hook])),
        )
        exec(OWN_CONTEXT.get(name, ""), names)
        async with RedisNotifications(redis_url) as notifications, AnalyzeSession() as session:
            names.update(notifications=notifications, session=session)
            code = compile(example, f"<{name}>", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            running = eval(code, names)
            if running is not None:
                await running

    asyncio.run(run())


@pytest.mark.usefixtures("_environment")
@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_runs(
    example: str,
    emulator: ScriptedEmulator,
    shared_redis: Any,
) -> None:
    name, code = EXAMPLES[example]
    for library, line in NEEDS.items():
        if line in code:
            pytest.importorskip(library, reason=f"{library} belongs to the group `dev`")
    for shown in ("redis://host:6379/0", "redis://…"):
        code = code.replace(shown, shared_redis.url)
    emulator._received.clear()
    emulator.on_delivery = None  # an example connects it to its application
    try:
        if is_program(code):
            module = types.ModuleType("__main__")
            exec(compile(code, f"<{name}>", "exec"), vars(module))
            names = vars(module)
        else:
            names = {**import_names(code), "cloudinary_emulator": emulator}
            run_fragment(name, code, names, shared_redis.url)
        run_tests_of(names, emulator)
    finally:
        close_sessions()


def run_tests_of(names: dict[str, Any], emulator: ScriptedEmulator) -> None:
    """Run the tests that an example shows."""
    for name, test in list(names.items()):
        if name.startswith("test_"):
            result = test(cloudinary_emulator=emulator)
            if inspect.isawaitable(result):
                asyncio.run(result)  # type: ignore[arg-type]


@pytest.fixture
def _environment(
    emulator: ScriptedEmulator,
    shared_redis: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The variables that examples read, an empty directory, and the application that one tests."""
    monkeypatch.setenv("CLOUDINARY_URL", emulator.cloudinary_url)
    monkeypatch.setenv("REDIS_URL", shared_redis.url)
    monkeypatch.setenv("PUBLIC_URL", "https://app.example")
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("app")
    exec(EXAMPLES["testing-1"][1], vars(module))
    monkeypatch.setitem(sys.modules, "app", module)


def test_the_fastapi_application_is_the_one_that_is_tested() -> None:
    """Another test runs the exact text of the guide with uvicorn."""
    tested = README.parent / "tests/apps/fastapi_app.py"
    assert tested.read_text(encoding="utf-8") == EXAMPLES["workers-1"][1]


def read_guide(name: str) -> str:
    return (GUIDES / f"{name}.md").read_text(encoding="utf-8")


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
    assert build_settings_table() in read_guide("throttling")


def test_the_models_table_names_every_model_with_its_feature() -> None:
    for name, request_type in MODELS.items():
        start = f"| `{request_type.__name__}(source"
        row = next(line for line in read_guide("models").splitlines() if line.startswith(start))

        assert f"| `{name}` |" in row
        assert row.endswith(f"| `{request_type.feature}` |")


def test_the_errors_table_names_every_error() -> None:
    table = read_guide("errors")
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
    assert build_status_table() in read_guide("errors")


PAGES = [README, *GUIDES.glob("*.md"), *README.parent.glob(".github/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8"))
    for target in targets:
        assert "://" in target or (page.parent / target).exists(), target


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


if __name__ == "__main__":
    print(build_settings_table())
    print(build_status_table())
