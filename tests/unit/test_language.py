"""The project is written in plain English, without translated phrases."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripted import no_collector

ROOT = Path(__file__).parents[2]
PLACES = ["cloudinary_analyze", "benchmarks", "tests", "README.md", "CHANGELOG.md", ".github"]
# a phrase and what to write instead
PHRASES = {
    r"(?<!there )(is|are) no (?!longer)": "Unknown …, Missing …, … must be …",
    r"(tell|tells|told)": "report, show, distinguish, return",
    r"anew": "again; reset",
    r"for good": "permanently",
    r"for ever": "forever; without a limit",
    r"(nobody|somebody|whoever)": "name the actor",
    r"of (its|their) own": "a separate …",
    r"mend(s|ed|ing)?": "fix",
    r"the wire": "the network; the service's names",
    r"(take|takes|took|taken|taking) up": "resume, attach",
    r"(be it|being signed|goes before|due to come|for want of|cannot be right)": "say it directly",
    r"stands (for|in for|on|as)": "is, represents, identifies",
    r"(shall|hereby|thereof|whereof|therefor)": "must, does",
    r"(beforehand|all the same)": "in advance; still, nevertheless",
    r"(one's|our|your) own (ones?|choosing)": "custom; state which",
    r"wire names?": "the model's name in URLs",
    r"(takes?|took|taking) note": "record, note",
    r"whichever (process|worker|task)": "the process that …",
    r"(analys(e|ed|ing)|serialis\w+|recognis\w+|behaviour|colours?|licence)": "American spelling",
}
PATTERN = re.compile(rf"\b({'|'.join(PHRASES)})\b", re.IGNORECASE)
OWN = Path(__file__).name


def list_files() -> Iterator[Path]:
    for place in PLACES:
        path = ROOT / place
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        yield from (f for f in files if f.suffix in {".py", ".md", ".yml"} and f.name != OWN)


def list_texts(path: Path) -> Iterator[tuple[int, str]]:
    """Return the text of a file: its lines or, of code, its strings, comments and names."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(source.splitlines(), 1)
        return
    prose = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in prose:
            yield from enumerate(token.string.splitlines(), token.start[0])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name.replace("_", " ")


def test_no_text_contains_a_translated_phrase() -> None:
    # a collection may run code that parses, too, which Python 3.11 reports as a `SystemError`
    with no_collector():
        found = [
            f"{path.relative_to(ROOT)}:{line}: {match[0]!r} in {text.strip()[:100]!r}"
            for path in list_files()
            for line, text in list_texts(path)
            if (match := PATTERN.search(text))
        ]
    assert found == [], f"write instead: {PHRASES}"


@pytest.mark.parametrize(
    "text", ["It is no JSON.", "The sender is told so.", "Mend it.", "a list of its own"]
)
def test_the_check_finds_translated_phrases(text: str) -> None:
    assert PATTERN.search(text)


@pytest.mark.parametrize(
    "text", ["It is no longer used.", "for goodness", "stands still", "amended"]
)
def test_the_check_accepts_plain_sentences(text: str) -> None:
    assert not PATTERN.search(text)
