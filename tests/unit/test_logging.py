"""One tree of loggers, listed in the docstring of `events`. Log lines show no URL or secret."""

from __future__ import annotations

import ast
import logging
import re

import pytest
from examples import read_modules
from hypothesis import given
from hypothesis import strategies as st

from cloudinary_analyze import events
from cloudinary_analyze.errors import describe


def find_loggers() -> set[str]:
    """Return the argument of each `getLogger` in the package."""
    found = set()
    for _, tree in read_modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "logging.getLogger":
                found.add(ast.unparse(node.args[0]).strip("'") if node.args else "root")
    return found


def test_the_docstring_lists_every_logger() -> None:
    listed = re.findall(r"^\| ``(cloudinary_analyze\.\w+)`` \|", events.__doc__ or "", re.MULTILINE)
    assert len(listed) == 5
    # `__name__`: the root of the tree; "root": where the command line shows its lines;
    # aiohttp's: where `listen` leaves out the tracebacks of requests that are not valid HTTP
    assert find_loggers() == {*listed, "__name__", "root", "aiohttp.server.receiver"}


def test_the_tree_is_silent_by_default() -> None:
    handlers = logging.getLogger("cloudinary_analyze").handlers
    assert [type(handler) for handler in handlers] == [logging.NullHandler]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", "ValueError"),
        ("it broke", "ValueError: it broke"),
        ("GET https://x.test/a?token=s3cret failed", "ValueError: GET https://x.test/a failed"),
        ("('https://x.test/?s3cret', 5)", "ValueError: ('https://x.test/', 5)"),
        ("redis://me:s3cret@x.test:1/0 is down", "ValueError: redis://x.test:1/0 is down"),
        ("amqp://s3cret@x.test?s3cret#s3cret", "ValueError: amqp://x.test"),
        ("what? nothing", "ValueError: what? nothing"),
        ("one\n two\x1b[2J", "ValueError: one two\\x1b[2J"),
        ("x" * 10_000, f"ValueError: {'x' * 200}…"),
    ],
)
def test_an_error_is_described_without_query_or_password(text: str, shown: str) -> None:
    assert describe(ValueError(text)) == shown


@given(st.text(alphabet="ab?/:@ '\"", max_size=60))
def test_no_query_or_password_remains(before: str) -> None:
    for url in ("https://u:pLanted@h/p?pLanted=1&b=pLanted", "//pLanted@h?pLanted"):
        assert "pLanted" not in describe(ValueError(f"{before} {url} x"))


def test_an_error_without_a_message_is_named_by_its_class() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError

    assert describe(Mute()) == "Mute"
