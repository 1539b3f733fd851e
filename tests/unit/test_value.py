"""How the package's values show themselves: by their fields, without a compiled repr each."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, Generic, TypeVar

import attrs

from cloudinary_analyze import (
    BoundingBox,
    Captioning,
    Coco,
    CocoAnalysis,
    Notification,
    Response,
)
from cloudinary_analyze._value import Value

T = TypeVar("T")


@attrs.frozen
class Compiled(Generic[T]):
    first: T
    second: str = "two"
    secret: str = attrs.field(default="secret", repr=False)
    body: bytes = attrs.field(default=b"body", repr=lambda body: f"<{len(body)} bytes>")


@attrs.frozen(repr=False)
class Shown(Value, Generic[T]):
    first: T
    second: str = "two"
    secret: str = attrs.field(default="secret", repr=False)
    body: bytes = attrs.field(default=b"body", repr=lambda body: f"<{len(body)} bytes>")


def test_a_value_shows_itself_as_attrs_would() -> None:
    for first in (1, "it's", None, [Shown(1)]):
        assert repr(Shown(first)) == repr(Compiled(first)).replace("Compiled", "Shown")
    assert "secret" not in repr(Shown(1))


def test_a_class_without_fields_of_its_own_shows_those_it_inherits() -> None:
    url = "https://images.example/a.jpg"
    assert repr(Captioning(url)) == f"Captioning(source=Uri(uri={url!r}))"
    assert (
        repr(CocoAnalysis(model_version=1))
        == "CocoAnalysis(model_version=1, tags=DetectedTags({}))"
    )
    assert repr(Response(BoundingBox(1, 2, 3.5, 4), model="coco")) == (
        "Response(analysis=BoundingBox(x=1, y=2, width=3.5, height=4), model='coco', entity=None, "
        "request_id=None, limits=())"
    )
    assert repr(Coco(url)).startswith("Coco(")


def test_a_notification_shows_whose_it_is_and_not_its_whole_body() -> None:
    assert repr(Notification("t1", {"public_id": "private"})) == "Notification(task_id='t1')"


def test_a_value_inside_of_itself_is_shown_once() -> None:
    items: list[Any] = []
    items.append(Shown(items))
    assert "..." in repr(items[0])


PROBE = """
import sys
import cloudinary_analyze
kinds = {
    kind
    for name, module in list(sys.modules.items())
    if name.startswith("cloudinary_analyze")
    for kind in vars(module).values()
    if isinstance(kind, type) and "__attrs_attrs__" in vars(kind)
}
print(len(kinds))
for kind in kinds:
    code = getattr(kind.__repr__, "__code__", None)
    if code is not None and code.co_filename.startswith("<attrs generated"):
        print(kind.__name__)
"""


def test_no_class_that_comes_with_the_package_compiles_a_repr() -> None:
    """Each would cost every import 0.1 ms."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    count, *compiling = done.stdout.split()
    assert int(count) > 50
    assert compiling == []
    assert Compiled.__repr__.__code__.co_filename.startswith("<attrs generated")
