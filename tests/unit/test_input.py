"""Bulk input: every line becomes a source or an error with its number, and nothing is slurped."""

from __future__ import annotations

import gzip
import io
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudinary_analyze.cli.input import (
    LONGEST_LINE,
    InputFormat,
    InputLine,
    detect_format,
    read_input,
    read_source,
)
from cloudinary_analyze.errors import ConfigurationError, InvalidRequestError
from cloudinary_analyze.requests import Asset, Uri

A, B = "https://example.com/a.jpg", "https://example.com/b.jpg"


def read(
    content: str | bytes, input_format: InputFormat = "text", column: str | None = None
) -> list[InputLine]:
    raw = content.encode() if isinstance(content, str) else content
    return list(read_input(io.BytesIO(raw), input_format=input_format, column=column))


def show(lines: list[InputLine]) -> list[tuple[int, str]]:
    """Return number and source of each line, or number and '!' with the reason."""
    return [
        (line.number, str(line.source) if line.error is None else f"!{line.error}")
        for line in lines
    ]


def test_text_skips_blanks_and_comments_but_counts_them():
    content = f"\ufeff{A}\r\n\n# a comment\n   \n  asset:0123abcd  \n{B}"
    assert show(read(content)) == [(1, A), (5, "asset:0123abcd"), (6, B)]


def test_a_bad_line_is_told_with_its_number_and_does_not_stop_the_rest():
    lines = read(f"{A}\nfolder/public_id\n{B}\n")
    assert [line.number for line in lines] == [1, 2, 3]
    assert lines[1].source is None
    assert "public ID" in str(lines[1].error)
    assert lines[2].source == Uri(B)


def test_a_line_that_is_not_utf_8_is_one_bad_line():
    lines = read(A.encode() + b"\nhttps://example.com/caf\xe9.jpg\n" + B.encode())
    assert show(lines) == [(1, A), (2, "!The line is not UTF-8."), (3, B)]
    lines[1].text.encode()  # what is kept of it can be written


@pytest.mark.parametrize("input_format", ["text", "jsonl"])
def test_a_line_without_end_is_cut_and_refused(input_format: InputFormat):
    long = b"https://example.com/" + b"x" * (2 * LONGEST_LINE)
    lines = read(long + b"\n" + b"bad\n", input_format)
    assert [line.number for line in lines] == [1, 2]
    assert "longer than 1 MiB" in str(lines[0].error)
    assert len(lines[0].text) < 1000


def test_csv_finds_its_column_and_counts_physical_lines():
    content = f'id,Note,URL\n1,"two\nlines",{A}\n\n2,,\n3,"a, b",{B}\n'
    lines = read(content, "csv")
    assert show(lines) == [(2, A), (5, "!The column 'URL' is empty here."), (6, B)]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_tells_delimiters_apart_by_the_header(delimiter: str):
    content = f"name{delimiter}image\nx{delimiter}{A}\n"
    assert show(read(content, "csv", "image")) == [(2, A)]


def test_csv_with_one_column_needs_no_name_for_it():
    assert show(read(f"picture\n{A}\n", "csv")) == [(2, A)]


def test_an_open_quote_spoils_its_record_and_says_so():
    rest = "".join(f"{B}\n" for _ in range(10))
    (line,) = read(f'url\n"{A}\n{rest}', "csv")
    assert line.number == 2
    assert "quote" in str(line.error)


def test_an_open_quote_in_a_long_file_does_not_swallow_all_of_it():
    rest = "".join(f"{B}\n" for _ in range(20_000))
    lines = read(f'url\n"{A}\n{rest}', "csv")
    assert "quote" in str(lines[0].error)
    assert sum(line.error is None for line in lines) > 10_000


@pytest.mark.parametrize(
    ("content", "column", "sentence"),
    [
        ("a,b\n1,2\n", None, "no column 'url'; it has 'a', 'b'"),
        ("a,url\n1,2\n", "image", "no column 'image'; it has 'a', 'url'"),
        (f"{A}\n{B}\n", None, "no header"),
    ],
)
def test_csv_without_the_column_is_refused_as_a_whole(
    content: str, column: str | None, sentence: str
):
    with pytest.raises(ConfigurationError, match=sentence):
        read(content, "csv", column)


def test_jsonl_reports_every_way_to_be_wrong():
    content = f'{{"url": "{A}"}}\n\nnonsense\n[]\n{{"id": 1}}\n{{"url": 5}}\n{{"uri": "{B}"}}\n'
    lines = read(content, "jsonl")
    assert [line.number for line in lines] == [1, 3, 4, 5, 6, 7]
    reasons = ["no JSON", "no object", "no 'url'; it has 'id'", "'url' is no text"]
    for line, reason in zip(lines[1:5], reasons, strict=True):
        assert reason in str(line.error)
    assert lines[-1].source == Uri(B)


def test_a_named_field_is_the_only_one_that_is_read():
    assert show(read(f'{{"url": "{A}", "source": "{B}"}}', "jsonl", "source")) == [(1, B)]


def test_a_json_array_is_refused_with_the_way_to_convert_it():
    with pytest.raises(ConfigurationError, match="jq"):
        read(f'[\n{{"url": "{A}"}}\n]', "jsonl")


@pytest.mark.parametrize(
    "content",
    [gzip.compress(A.encode(), mtime=1), A.encode("utf-16"), b"\x89PNG\r\n\x1a\n", b"PK\x03\x04\n"],
)
@pytest.mark.parametrize("input_format", ["text", "csv", "jsonl"])
def test_what_is_no_text_is_refused_with_a_sentence(content: bytes, input_format: InputFormat):
    with pytest.raises(ConfigurationError, match="not a text file"):
        read(content, input_format)


@pytest.mark.parametrize("input_format", ["text", "csv", "jsonl"])
def test_an_empty_input_has_no_lines(input_format: InputFormat):
    assert read(b"", input_format) == []


class _Endless(io.RawIOBase):
    """A stream that never ends, and counts how much was read of it."""

    def __init__(self, line: bytes) -> None:
        self.line = line
        self.given = 0

    def readable(self) -> bool:
        return True

    def readline(self, size: int | None = -1) -> bytes:
        self.given += 1
        return b"url\n" if self.given == 1 else self.line


@pytest.mark.parametrize(
    ("input_format", "line"),
    [("text", f"{A}\n"), ("csv", f"{A}\n"), ("jsonl", f'{{"url": "{A}"}}\n')],
)
def test_input_is_read_lazily(input_format: InputFormat, line: str):
    stream = _Endless(line.encode())
    lines = list(itertools.islice(read_input(stream, input_format=input_format), 1000))  # type: ignore[arg-type]
    assert len(lines) == 1000
    assert stream.given <= 1002


@given(st.binary(max_size=400), st.sampled_from(["text", "csv", "jsonl"]))
def test_any_bytes_are_read_or_refused(content: bytes, input_format: InputFormat):
    try:
        lines = read(content, input_format)
    except ConfigurationError:
        return
    numbers = [line.number for line in lines]
    assert numbers == sorted(set(numbers))
    assert all((line.source is None) != (line.error is None) for line in lines)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.CSV", "csv"), ("a.tsv", "csv"), ("a.ndjson", "jsonl"), ("a.txt", "text"), ("-", "text")],
)
def test_the_extension_tells_the_format(name: str, expected: str):
    assert detect_format(name) == expected


def test_a_source_is_a_url_or_an_asset_id():
    assert read_source(" asset: 0a1b ") == Asset("0a1b")
    assert read_source(f" {A} ") == Uri(A)
    with pytest.raises(InvalidRequestError):
        read_source("asset:")
