"""Every public name documents its parameters, fields, cancellation and API endpoint."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import attrs
import pytest
from examples import find_public_names

from cloudinary_analyze import AnalyzeError, ConfigurationError

PACKAGE = "cloudinary_analyze"
# modules whose classes and functions represent the service's API, or send its requests
API_MODULES = {"analyses", "requests", "responses", "webhooks"}
API_CALLS = {"AnalyzeSession.analyze", "AnalyzeSession.submit", "AnalyzeSession.task_status"}
API_CALLS |= {"AnalyzeSession.task", "AnalyzeSession.map", "AnalyzeSession.analyze_all"}
TIMES = re.compile(r"timeout|seconds|patience|lease|drain|grace|oldest|newest|started_at")
UNITS = re.compile(r"[Ss]econds|Unix|See |`Settings|How long")
# the names that users need most; each docstring has an example that tests execute
EXAMPLES = {
    *(
        "AIVisionTagging",
        "AnalysisTask",
        "AnalyzeSession",
        "AnalyzeSession.map",
        "Answered",
        "Budget",
    ),
    *(
        "AnalyzeSession.submit",
        "Credentials",
        "FaultPlan",
        "ManualClock",
        "OtherModel",
        "RedisLedger",
    ),
    *("RedisNotifications", "Response.from_raw", "SQLiteLedger", "to_json", "verify_signature"),
}
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Warns):$", re.MULTILINE)


class Member(NamedTuple):
    """A public name: of a module, or of a class.

    Attributes:
        path: Such as ``cloudinary_analyze.session.AnalyzeSession.analyze``.
        value: The class, function or property.
        owner: The class that defines the member, if any.
    """

    path: str
    value: Any
    owner: type[Any] | None = None

    @property
    def function(self) -> Any:
        """The function that implements the member, or ``None``."""
        value = self.value
        if isinstance(value, property):
            return value.fget
        if isinstance(value, classmethod | staticmethod):
            return value.__func__
        return value if inspect.isfunction(value) else None

    @property
    def short(self) -> str:
        """Its name without the modules."""
        return ".".join(self.path.split(".")[-2:] if self.owner else self.path.split(".")[-1:])

    @property
    def docs(self) -> str:
        """Its docstring, which a method may inherit."""
        if self.owner is not None:
            name = self.path.rpartition(".")[2]
            docs = inspect.getdoc(getattr(self.owner, name)) or ""
            if docs.startswith("See `"):  # an override documents only what differs
                overridden = next(base for base in self.owner.__mro__[1:] if name in vars(base))
                docs = f"{docs}\n\n{inspect.getdoc(getattr(overridden, name))}"
            return docs
        if isinstance(self.value, type):
            return inspect.cleandoc(self.value.__dict__.get("__doc__") or "")
        return inspect.getdoc(self.value) or ""


def is_documented_kind(value: Any) -> bool:
    return inspect.isfunction(value) or isinstance(value, property | classmethod | staticmethod)


def find_members() -> Iterator[Member]:
    """Yield every public class and function, and the public methods and properties of classes."""
    seen = set()
    for module, name in sorted(find_public_names()):
        if module == f"{PACKAGE}.dask" and not find_spec("distributed"):
            continue
        if name in {"META", "SCHEMA"}:  # values of optional libraries
            continue
        value = getattr(importlib.import_module(module), name)
        if not isinstance(value, type | FunctionType | MethodType) or id(value) in seen:
            continue
        seen.add(id(value))
        path = f"{value.__module__}.{value.__qualname__}"
        yield Member(path, value)
        if isinstance(value, type):
            for base in reversed(value.__mro__):
                if base.__module__.startswith(PACKAGE):
                    for attribute, member in vars(base).items():
                        hidden = value.__dict__.get(attribute, member) is not member
                        if attribute[0] != "_" and is_documented_kind(member) and not hidden:
                            yield Member(f"{path}.{attribute}", member, value)


MEMBERS = list(find_members())


def read_section(docs: str, *titles: str) -> dict[str, str]:
    """Return the entries of a section such as ``Args:``, each with its text."""
    entries: dict[str, str] = {}
    parts = SECTION.split(docs)
    for title, text in zip(parts[1::2], parts[2::2], strict=True):
        if title in titles:
            body = textwrap.dedent(text.strip("\n").partition("\n\n")[0])
            for name, entry in re.findall(
                r"^\*{0,2}([\w, ]+): ((?:.|\n(?=\s))*)", body, re.MULTILINE
            ):
                entries.update(dict.fromkeys(name.split(", "), entry))
    return entries


def read_source(value: type[Any]) -> str:
    """Return the source of a class, or nothing if it has no class statement (Dask)."""
    try:
        return textwrap.dedent(inspect.getsource(value))
    except OSError:
        return ""


@cache
def read_inline_docs(value: type[Any]) -> frozenset[str]:
    """Return the fields of a class that have a docstring below them."""
    (cls,) = ast.parse(read_source(value) or "class Empty: ...").body
    assert isinstance(cls, ast.ClassDef)
    return frozenset(
        field.target.id
        for field, doc in zip(cls.body, cls.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(doc, ast.Expr)
        and isinstance(doc.value, ast.Constant)
    )


def list_documented_fields(value: type[Any]) -> set[str]:
    """Return what the docstrings of a class and its bases describe."""
    names: set[str] = set()
    for base in value.__mro__:
        if base.__module__.startswith(PACKAGE):
            docs = inspect.cleandoc(base.__dict__.get("__doc__") or "")
            names |= set(read_section(docs, "Args", "Attributes")) | read_inline_docs(base)
            for name, member in vars(base).items():
                if isinstance(member, property):
                    names.add(name)
    return names


def list_parameters(function: Any) -> list[str]:
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in {"self", "cls"}
        and name[0] != "_"
        and parameter.kind not in {parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL}
    ]


def list_fields(value: type[Any]) -> list[str]:
    """Return the fields of an attrs class, or else the arguments of the constructor."""
    if attrs.has(value):
        return [field.name for field in attrs.fields(value)]
    if "Not created directly" in (value.__doc__ or "") or "__init__" not in vars(value):
        return list(getattr(value, "_fields", ()))
    return list_parameters(value)


def find_missing_summary(member: Member) -> str | None:
    summary = member.docs.partition("\n\n")[0].rstrip()
    if not summary:
        return "no docstring"
    if summary[0].islower() or not summary.endswith((".", ":")):
        return f"the summary is not a sentence: {summary}"
    return None


def find_unknown_names(member: Member) -> str | None:
    documented = set(read_section(member.docs, "Args"))
    if not isinstance(member.value, type):
        unknown = documented - set(inspect.signature(member.function).parameters)
        return f"unknown parameters {sorted(unknown)}" if unknown else None
    accepted = set(list_parameters(member.value)) if documented else set()
    known = {"message", *dir(member.value), *inspect.get_annotations(member.value)}
    for base in member.value.__mro__:
        if base.__module__.startswith(PACKAGE):
            known |= set(re.findall(r"self\.(\w+)\b", read_source(base)))
    unknown = documented - accepted
    unknown |= set(read_section(member.docs, "Attributes")) - known - accepted
    return f"unknown fields {sorted(unknown)}" if unknown else None


def find_undocumented(member: Member) -> str | None:
    if isinstance(member.value, type):
        missing = {name for name in list_fields(member.value) if name[0] != "_"}
        missing -= list_documented_fields(member.value)
    elif isinstance(member.value, property):
        return None
    else:
        parameters = list_parameters(member.function)
        listed = set(read_section(member.docs, "Args"))
        if not listed:  # a short docstring may name them in its sentences
            words = set(re.findall(r"\w+", member.docs.lower().replace("-", "_")))
            listed = {name for name in parameters if {name, *name.split("_")} & words}
        missing = set(parameters) - listed
    return f"undocumented {sorted(missing)}" if missing else None


def find_undocumented_errors(member: Member) -> str | None:
    """Compare what the body itself raises with the section ``Raises``."""
    functions = [member.function]
    if isinstance(member.value, type):
        if "Not created directly" in member.docs:
            return None
        made = vars(member.value)
        functions = [made.get("__init__"), made.get("__attrs_post_init__")]
    raised: set[type[BaseException]] = set()
    for function in functions:
        if inspect.isfunction(function):
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
            for node in ast.walk(tree):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                    kind = function.__globals__.get(ast.unparse(node.exc.func))
                    if isinstance(kind, type) and issubclass(kind, AnalyzeError):
                        raised.add(kind)
    documented = set(read_section(member.docs, "Raises"))
    missing = {
        kind.__name__
        for kind in raised
        if not documented & {base.__name__ for base in kind.__mro__}
    }
    return f"undocumented errors {sorted(missing)}" if missing else None


def find_missing_unit(member: Member) -> str | None:
    entries = read_section(member.docs, "Args", "Attributes")
    unclear = [
        name
        for name, text in entries.items()
        if TIMES.search(name)
        and not UNITS.search(text)
        and "All times are seconds" not in member.docs
    ]
    return f"no unit for {unclear}" if unclear else None


def find_missing_default(member: Member) -> str | None:
    """Require every argument that may be ``None`` to document what ``None`` means."""
    function = member.function
    if function is None or isinstance(member.value, property):
        return None
    entries = read_section(member.docs, "Args")
    unclear = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is None
        and name in entries
        and not re.search(r"[Dd]efault|None|[Ii]f |See ", entries[name])
    ]
    return f"what is the default of {unclear}?" if unclear else None


def find_missing_cancellation(member: Member) -> str | None:
    function = member.function
    waits = inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
    return (
        "it awaits: what if it is cancelled?"
        if waits and "cancel" not in member.docs.lower()
        else None
    )


def find_missing_source(member: Member) -> str | None:
    part = member.path.split(".")[1] in API_MODULES and member.owner is None
    if not part and member.short not in API_CALLS:
        return None
    return None if re.search(r"^Source: .+", member.docs, re.MULTILINE) else "no line 'Source: …'"


CHECKS = [
    find_missing_summary,
    find_unknown_names,
    find_undocumented,
    find_undocumented_errors,
    find_missing_unit,
    find_missing_default,
    find_missing_cancellation,
    find_missing_source,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_public_name_is_documented(check: Callable[[Member], str | None]) -> None:
    faults = {member.path: fault for member in MEMBERS if (fault := check(member)) is not None}
    assert faults == {}


def test_important_names_have_an_example() -> None:
    shown = {member.short for member in MEMBERS if "```python" in member.docs}
    assert shown >= EXAMPLES, EXAMPLES - shown


def test_the_search_finds_every_public_name() -> None:
    """A fault in the search must not hide names."""
    assert sum(isinstance(member.value, type) for member in MEMBERS) >= 140
    assert sum(inspect.iscoroutinefunction(member.function) for member in MEMBERS) >= 60
    assert len(MEMBERS) >= 380


async def wait_long(timeout: float | None = None) -> None:
    """wait

    Args:
        timeout: Of the wait.
        other: Nothing.
    """
    raise ConfigurationError(f"{timeout}")


@pytest.mark.parametrize(
    "check",
    [check for check in CHECKS if check != find_undocumented],
    ids=lambda c: c.__name__,
)
def test_each_check_finds_a_fault(check: Callable[[Member], str | None]) -> None:
    assert check(Member(f"{PACKAGE}.webhooks.wait_long", wait_long)) is not None


def test_the_check_finds_an_undocumented_parameter() -> None:
    def wait(delay: float) -> None:
        """Wait."""

    assert find_undocumented(Member(f"{PACKAGE}.wait", wait)) == "undocumented ['delay']"
