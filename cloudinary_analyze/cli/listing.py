"""``cloudinary-analyze models``: which models there are, and what they need."""

from __future__ import annotations

import re
import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cloudinary_analyze.cli.choices import OPTIONS
from cloudinary_analyze.cli.console import is_interactive
from cloudinary_analyze.requests import MODELS


def list_models() -> list[tuple[str, str, str, str]]:
    """Return a row for each model: name, add-on feature, needed option, what it does."""
    return [
        (name, kind.feature or "", OPTIONS.get(name, ""), _describe(kind.__doc__ or ""))
        for name, kind in MODELS.items()
    ]


def print_models() -> None:
    """Print the models: a table on a terminal, else a line each with tabs between."""
    rows = list_models()
    if not is_interactive(sys.stdout):
        for row in rows:
            print("\t".join(row))
        return
    table = Table("model", "add-on quota", "needs", "what it does")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(file=sys.stdout).print(table)


def _describe(docstring: str) -> str:
    sentence = docstring.partition("\n")[0]
    return re.sub(r" \(``[^)]*\)", "", sentence)
