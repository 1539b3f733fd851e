"""The image gallery: scenes of plain shapes, and their PNG files.

A scene is a pure function of its key. The analyses describe the scene and the renderer draws it, so
detections in a gallery image are exact to the pixel.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from hashlib import blake2b
from types import MappingProxyType
from typing import Final

import attrs

WIDTH: Final = 640
HEIGHT: Final = 480
_CELL: Final = 160
_CELLS: Final = (WIDTH // _CELL) * (HEIGHT // _CELL)
_MARGIN: Final = 4
_SMALLEST, _LARGEST = 48, 144

KINDS: Final = ("rectangle", "ellipse", "triangle")
COLORS: Final[Mapping[str, tuple[int, int, int]]] = MappingProxyType(
    {
        "red": (214, 40, 40),
        "orange": (247, 127, 0),
        "yellow": (252, 191, 73),
        "green": (56, 142, 60),
        "turquoise": (0, 150, 136),
        "blue": (25, 118, 210),
        "purple": (123, 31, 162),
        "pink": (236, 64, 122),
        "brown": (121, 85, 72),
        "black": (33, 33, 33),
    }
)
BACKGROUNDS: Final[Mapping[str, tuple[int, int, int]]] = MappingProxyType(
    {
        "white": (255, 255, 255),
        "light grey": (224, 224, 224),
        "cream": (255, 248, 225),
        "pale blue": (225, 245, 254),
    }
)
_BACKGROUND_NAMES: Final = tuple(BACKGROUNDS)

_GALLERY_PATH: Final = re.compile(r"https?://[^/?#]+/samples/([^?#]*)", re.IGNORECASE)
_PICTURE_NAME: Final = re.compile(r"([0-9]{1,9})\.png")


class Entropy:
    """Numbers from the hash of some texts. The same texts give the same numbers."""

    __slots__ = ("_value",)

    def __init__(self, *texts: str) -> None:
        key = "\0".join(texts).encode("utf-8", "surrogatepass")
        self._value = int.from_bytes(blake2b(key, digest_size=64).digest(), "big")

    def pick(self, count: int) -> int:
        """Return a number in ``range(count)``. About 500 bits are available in total."""
        self._value, choice = divmod(self._value, count)
        return choice

    def fraction(self) -> float:
        """Return a number in [0, 1)."""
        return self.pick(1 << 32) / (1 << 32)


@attrs.frozen
class Shape:
    """One shape: its kind and color, and the box of pixels that it fills from edge to edge."""

    kind: str
    color: str
    x: int
    y: int
    width: int
    height: int
    confidence: float

    def find_span(self, row: int) -> tuple[int, int]:
        """Return the columns that the shape fills in a row of its box, as start and stop."""
        if self.kind == "rectangle":
            return self.x, self.x + self.width
        middle = self.width / 2
        if self.kind == "triangle":
            half = middle * (row + 1) / self.height
            return self.x + math.floor(middle - half), self.x + math.ceil(middle + half)
        offset = (2 * row + 1) / self.height - 1
        half = middle * math.sqrt(1 - offset * offset)
        return self.x + round(middle - half), self.x + round(middle + half)


@attrs.frozen
class Scene:
    """A background and the shapes on it; no two have the same color and none overlap.

    Attributes:
        key: What the scene is derived from.
        drawn: Whether it is a gallery scene: those have at least one shape of every kind.
    """

    key: str
    drawn: bool = False

    @cached_property
    def background(self) -> str:
        """The name of the background's color."""
        return _BACKGROUND_NAMES[Entropy("background", self.key).pick(len(_BACKGROUND_NAMES))]

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes, each in its cell."""
        return tuple(_place_shapes(self.key, drawn=self.drawn))

    def describe(self) -> str:
        """Return a sentence that names every shape."""
        names = [f"{_article(shape.color)} {shape.color} {shape.kind}" for shape in self.shapes]
        listed = ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
        return f"{listed[0].upper()}{listed[1:]} on a {self.background} background."


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _place_shapes(key: str, *, drawn: bool) -> Iterator[Shape]:
    entropy = Entropy("shapes", key)
    count = len(KINDS) + entropy.pick(4) if drawn else 1 + entropy.pick(6)
    cells, colors = list(range(_CELLS)), list(COLORS)
    for index in range(count):
        kind = KINDS[index] if drawn and index < len(KINDS) else KINDS[entropy.pick(len(KINDS))]
        row, column = divmod(cells.pop(entropy.pick(len(cells))), WIDTH // _CELL)
        width = _SMALLEST + entropy.pick(_LARGEST - _SMALLEST)
        height = _SMALLEST + entropy.pick(_LARGEST - _SMALLEST)
        yield Shape(
            kind,
            colors.pop(entropy.pick(len(colors))),
            column * _CELL + _MARGIN + entropy.pick(_CELL - 2 * _MARGIN - width + 1),
            row * _CELL + _MARGIN + entropy.pick(_CELL - 2 * _MARGIN - height + 1),
            width,
            height,
            round(0.55 + entropy.pick(4400) / 10_000, 4),
        )


@lru_cache(maxsize=1024)
def build_gallery_scene(number: int) -> Scene:
    """Return the scene of gallery picture ``number``."""
    return Scene(f"gallery/{number}", drawn=True)


def find_scene(source: str) -> Scene | None:
    """Return the scene of a source, or ``None`` for a gallery URL without an image.

    A gallery image is recognized by its path, with any host and port.
    """
    # The plain search spares most sources the regular expression.
    if "/samples/" in source and (path := _GALLERY_PATH.match(source)):
        number = read_picture_number(path[1])
        return None if number is None else build_gallery_scene(number)
    return Scene(source)


def read_picture_number(name: str) -> int | None:
    """Return the number in a file name such as ``7.png``. ``None`` if it names no image."""
    match = _PICTURE_NAME.fullmatch(name)
    return int(match[1]) if match else None


@lru_cache(maxsize=256)
def render_picture(number: int) -> bytes:
    """Return gallery picture ``number`` as a PNG file with a palette."""
    scene = build_gallery_scene(number)
    rows = [b"\0" * WIDTH] * HEIGHT
    palette = [BACKGROUNDS[scene.background]]
    for color, shape in enumerate(scene.shapes, start=1):
        palette.append(COLORS[shape.color])
        pixel = bytes((color,))
        for offset in range(shape.height):
            start, stop = shape.find_span(offset)
            row = rows[shape.y + offset]
            rows[shape.y + offset] = row[:start] + pixel * (stop - start) + row[stop:]
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 3, 0, 0, 0)
    # Each line of a PNG begins with its filter; 0 is none.
    lines = b"\0" + b"\0".join(rows)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _build_chunk(b"IHDR", header),
            _build_chunk(b"PLTE", b"".join(map(bytes, palette))),
            _build_chunk(b"IDAT", zlib.compress(lines, 6)),
            _build_chunk(b"IEND", b""),
        )
    )


def _build_chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
