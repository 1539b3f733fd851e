"""Reads the mutations: small patches, one per promise, that must make a test fail."""

from __future__ import annotations

import random
import tomllib
from pathlib import Path

import attrs

ROOT = Path(__file__).parents[2]
PACKAGE = "cloudinary_analyze"
_FILE = Path(__file__).with_name("mutations.toml")


@attrs.frozen(kw_only=True)
class Mutation:
    """A patch that breaks one promise.

    Attributes:
        name: Its name in the file.
        promise: The promise that no longer holds.
        file: The module, relative to the package.
        old: Text that occurs exactly once in it.
        new: The replacement.
        tests: Files or node ids, relative to `tests`; at least one test must fail.
    """

    name: str
    promise: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = attrs.field(converter=tuple)

    def apply(self, root: Path) -> str | None:
        """Patch a copy of the repository. Return why it is impossible, or ``None``."""
        path = root / PACKAGE / self.file
        if not path.is_file():
            return f"{self.file} does not exist"
        text = path.read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            return f"the old text occurs {text.count(self.old)} times in {self.file}"
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")
        for stale in path.parent.glob(f"__pycache__/{path.stem}.*"):
            stale.unlink()
        return None

    def find_missing_tests(self) -> list[str]:
        """Return the tests that do not exist."""
        missing = []
        for test in self.tests:
            file, _, name = test.partition("::")
            path = ROOT / "tests" / file
            function = name.rpartition("::")[2].partition("[")[0]
            if not path.is_file() or f"def {function}" not in path.read_text(encoding="utf-8"):
                missing.append(test)
        return missing


def read_mutations() -> list[Mutation]:
    """Read all mutations, in the order of the file."""
    with _FILE.open("rb") as stream:
        tables = tomllib.load(stream)
    return [Mutation(name=name, **table) for name, table in tables.items()]


def choose(mutations: list[Mutation], count: int, seed: str) -> list[Mutation]:
    """Choose some mutations; the same ones for the same seed."""
    chosen = random.Random(seed).sample(mutations, min(count, len(mutations)))
    return sorted(chosen, key=mutations.index)
