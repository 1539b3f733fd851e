"""`Value`: what the package's frozen values have in common, which is how they show themselves.

attrs would compile a ``__repr__`` for each class, a third of what making the class costs at import.
One that reads the fields when it is called serves them all.
"""

from __future__ import annotations

from reprlib import recursive_repr
from typing import cast

import attrs


class Value:
    """Base of the values that ``@attrs.frozen(repr=False)`` makes.

    Fields with ``repr=False`` are not shown, those with a function of their own as that says.
    """

    __slots__ = ()

    @recursive_repr()
    def __repr__(self) -> str:
        kind = type(self)
        shown = []
        for field in attrs.fields(cast("type[attrs.AttrsInstance]", kind)):
            if field.repr:
                show = repr if field.repr is True else field.repr
                shown.append(f"{field.name}={show(getattr(self, field.name))}")
        return f"{kind.__qualname__}({', '.join(shown)})"
