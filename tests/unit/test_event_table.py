"""The table of events in the module's docstring matches the event classes."""

from __future__ import annotations

import inspect
import re

import attrs

from cloudinary_analyze import events


def read_table() -> dict[str, list[str]]:
    """Return the fields of each event as the docstring lists them."""
    _, _, rest = (events.__doc__ or "").partition("| fields |\n|---|---|---|\n")
    table: dict[str, list[str]] = {}
    for row in rest.partition("\n\n")[0].splitlines():
        name, _, fields = row.strip("| ").split(" | ")
        table[name.strip("`")] = re.findall(r"``(\w+)``", fields)
    return table


def test_the_table_lists_every_event_and_field() -> None:
    kinds = events.Event.__args__
    assert read_table() == {
        kind.__name__: [field.name for field in attrs.fields(kind)] for kind in kinds
    }


def test_every_event_class_is_in_the_union() -> None:
    kinds = {
        kind
        for kind in vars(events).values()
        if isinstance(kind, type) and kind.__module__ == events.__name__ and attrs.has(kind)
    }
    assert kinds == set(events.Event.__args__)


def test_every_field_is_documented() -> None:
    for kind in events.Event.__args__:
        documented = re.findall(r"^    (\w+):", inspect.getdoc(kind) or "", re.MULTILINE)
        assert documented == [field.name for field in attrs.fields(kind)], kind
