"""Code that all values share: reading URL objects, quoting values, writing them as JSON.

The lowest module. It imports only `serialization` of the package, and only when a value is written.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from typing import Annotated, Any, Final, Protocol, Self

import attrs

_REPR: Final = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80


class URLObject(Protocol):
    """A URL object of yarl, pydantic, Starlette, httpx or urllib."""

    @property
    def scheme(self) -> object:  # yarl's descriptor is not a `str` to pyright
        """Such as ``https``."""


def read_url(value: object) -> Any:
    """Return the text of a URL object (see `URLObject`).

    Anything else is returned unchanged, for the caller to accept or refuse.
    """
    if type(value) is str or isinstance(value, type):
        return value
    try:
        if isinstance(getattr(value, "scheme", None), str):
            unsplit = getattr(value, "geturl", None)
            value = unsplit() if callable(unsplit) else str(value)
    except Exception:  # an object whose attributes raise is not a URL
        return value
    return str.__str__(value) if isinstance(value, str) else value  # of a string enum: its value


def quote(value: object) -> str:
    """Return a short `repr` for an error message; one that raises is replaced."""
    return _REPR.repr(value)


class Described:
    """An attrs object. One `repr`, ``==`` and `hash` serve all.

    If attrs compiled them for each class, that would take a sixth of the import time.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        kind: Any = type(self)
        shown = []
        for field in attrs.fields(kind):
            if field.repr:
                describe = repr if field.repr is True else field.repr
                shown.append(f"{field.name}={describe(getattr(self, field.name))}")
        return f"{kind.__qualname__.rsplit('>.', 1)[-1]}({', '.join(shown)})"

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        kind: Any = type(self)
        compared = (field.name for field in attrs.fields(kind) if field.eq)
        return all(getattr(self, name) == getattr(other, name) for name in compared)

    def __hash__(self) -> int:
        kind: Any = type(self)
        hashed = (field for field in attrs.fields(kind) if field.eq and field.hash is not False)
        return hash((kind, *(getattr(self, field.name) for field in hashed)))


class Jsonable(Described):
    """A value that ``dict(value)``, pydantic and FastAPI convert to JSON, as `to_dict` does."""

    __slots__ = ()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Iterate over the items of `to_dict`, so that ``dict(value)`` returns it."""
        from cloudinary_analyze.serialization import to_dict

        return iter(to_dict(self).items())

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from cloudinary_analyze.serialization import PydanticHooks

        return handler.generate_schema(Annotated[Any, PydanticHooks(source)])


class NotPicklable:
    """An object with a lifetime. It cannot be copied, and its pickle would contain secrets."""

    __slots__ = ()

    def __reduce_ex__(self, _: Any) -> Any:
        raise TypeError(
            f"{type(self).__name__} cannot be pickled or copied: it belongs to one process, and "
            "may hold a secret or a password. Make a new one where it is needed."
        )

    def __reduce__(self) -> Any:
        return self.__reduce_ex__(2)


class Closable:
    """An object that ``async with`` closes."""

    __slots__ = ()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close it. Idempotent."""
        raise NotImplementedError
