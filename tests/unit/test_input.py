"""Bulk input: every line becomes a source or a numbered error, and files are read lazily."""

from __future__ import annotations

import gzip
import io
import itertools
import json
from datetime import date
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudinary_analyze._wire import codec
from cloudinary_analyze.cli.input import (
    Columns,
    InputFormat,
    InputLine,
    detect_format,
    read_input,
)
from cloudinary_analyze.cli.text import LONGEST_LINE, read_source
from cloudinary_analyze.errors import ConfigurationError, InvalidRequestError
from cloudinary_analyze.requests import Asset, Uri

A, B = "https://example.com/a.jpg", "https://example.com/b.jpg"


def read(
    content: str | bytes,
    input_format: InputFormat = "text",
    column: str | None = None,
    **columns: Any,
) -> list[InputLine]:
    raw = content.encode() if isinstance(content, str) else content
    meaning = Columns(source=column, **columns)
    return list(read_input(io.BytesIO(raw), input_format=input_format, columns=meaning))


def show(lines: list[InputLine]) -> list[tuple[int, str]]:
    """Return each line's number and source, or its number and '!' with the reason."""
    return [
        (line.number, str(line.source) if line.error is None else f"!{line.error}")
        for line in lines
    ]


def test_text_skips_but_counts_blanks_and_comments():
    content = f"\ufeff{A}\r\n\n# a comment\n   \n  asset:0123abcd  \n{B}"
    assert show(read(content)) == [(1, A), (5, "asset:0123abcd"), (6, B)]


def test_a_bad_line_is_numbered_and_does_not_stop_others():
    lines = read(f"{A}\nfolder/public_id\n{B}\n")
    assert [line.number for line in lines] == [1, 2, 3]
    assert lines[1].source is None
    assert "public ID" in str(lines[1].error)
    assert lines[2].source == Uri(B)


def test_a_line_that_is_not_utf_8_is_one_bad_line():
    lines = read(A.encode() + b"\nhttps://example.com/caf\xe9.jpg\n" + B.encode())
    assert show(lines) == [(1, A), (2, "!The line is not UTF-8."), (3, B)]
    lines[1].text.encode()  # the kept text can be written as UTF-8


@pytest.mark.parametrize("input_format", ["text", "jsonl"])
def test_an_endless_line_is_cut_and_refused(input_format: InputFormat):
    long = b"https://example.com/" + b"x" * (2 * LONGEST_LINE)
    lines = read(long + b"\n" + b"bad\n", input_format)
    assert [line.number for line in lines] == [1, 2]
    assert "longer than 64 MiB" in str(lines[0].error)
    assert len(lines[0].text) < 1000


def test_csv_finds_the_column_and_counts_file_lines():
    content = f'id,Note,URL\n1,"two\nlines",{A}\n\n2,,\n3,"a, b",{B}\n'
    lines = read(content, "csv")
    assert show(lines) == [(2, A), (5, "!The column 'URL' is empty."), (6, B)]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_recognizes_delimiters_by_the_header(delimiter: str):
    content = f"name{delimiter}image\nx{delimiter}{A}\n"
    assert show(read(content, "csv", "image")) == [(2, A)]


def test_a_single_csv_column_needs_no_name():
    assert show(read(f"picture\n{A}\n", "csv")) == [(2, A)]


def build_csv(count: int = 1500, **odd: str) -> str:
    """Return a CSV. A keyword such as ``r10`` replaces the row of that number."""
    rows = [odd.get(f"r{n}", f"{n},https://example.com/{n}.jpg,plain") for n in range(count)]
    return "id,url,name\n" + "".join(f"{row}\n" for row in rows)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (build_csv(r10=f'10,{A},"open'), "in lines 12 to 112 is longer than 100 lines"),
        (build_csv(20, r10=f'10,{A},"open'), "in lines 12 to 21 is not valid CSV"),
        (build_csv(r10=f'10,{A},"open', r20=f'20,{B},"closed"'), "in lines 12 to 22 is not valid"),
        (build_csv(r10=f'10,{A},"open', r20=f'20,{B},"'), "another record in line 13"),
        (build_csv(r10=f'10,{A},"open', r11=f'11,{B},"'), "another record in line 13"),
        (build_csv(20, r19=f'19,{A},"open'), "in line 21 is not valid CSV"),
        (f'url\n"{A}\n{B}\n', "in lines 2 to 3 is not valid CSV"),
        ('"url\n' + f"{A}\n" * 9, "header has an open quote"),
        ('"url\n' + f"{A}\n" * 999, "header has an open quote"),
    ],
    ids=["far", "end", "pair", "swallowed", "next", "last", "only", "header", "long header"],
)
def test_an_open_quote_is_an_error_that_names_its_lines(content: str, sentence: str):
    with pytest.raises(ConfigurationError, match=sentence):
        read(content, "csv")


@given(
    st.integers(2, 40),
    st.sets(st.tuples(st.integers(0, 39), st.integers(0, 2), st.booleans()), max_size=4),
)
def test_no_row_is_lost_wherever_quotes_are(count: int, places: set[tuple[int, int, bool]]):
    """Each row is a separate line, or the input is refused, wherever quotes are unbalanced."""
    rows = [[str(n), f"https://example.com/{n}.jpg", "plain"] for n in range(count)]
    for row, cell, before in places:
        if row < count:
            text = rows[row][cell]
            rows[row][cell] = f'"{text}' if before else f'{text}"'
    content = "id,url,name\n" + "".join(",".join(row) + "\n" for row in rows)
    try:
        lines = read(content, "csv")
    except ConfigurationError:
        return
    assert [line.number for line in lines] == list(range(2, count + 2))


def test_a_cell_of_several_lines_is_one_record():
    text = "".join(f"line {n}\n" for n in range(80))
    content = f'id,note,url\n1,"{text}",{A}\n2,"see\nhttps://example.com/, too",{B}\n'
    assert show(read(content, "csv")) == [(2, A), (83, B)]


def test_a_broken_record_on_one_line_is_one_bad_line():
    content = f'id,url,name\n1,{A},"a "quoted" word"\n2,{B},x\n'
    bad, good = read(content, "csv")
    assert "not valid CSV" in str(bad.error)
    assert (bad.number, good.number, good.source) == (2, 3, Uri(B))


def test_a_stray_delimiter_is_one_bad_line():
    lines = read(f"id,url,name\n1,{A},one, two\n2,{B},x\n3,{A},y,,\n4,{B}\n", "csv")
    assert [line.source is None for line in lines] == [True, False, False, False]
    assert "has 4 cells, but the header names 3 columns" in str(lines[0].error)
    assert lines[3].columns == {"id": "4", "url": B}


def test_a_cell_may_have_any_length():
    long = "x" * 3_000_000
    (line,) = read(f"id,url\n{long},{A}\n", "csv")
    assert line.columns == {"id": long, "url": A}


@pytest.mark.parametrize(
    "content",
    [
        "sep=;\nname;url\nx, y, z;{A}\n",
        '"sep=|"\r\nname|url\r\nx|{A}\r\n',
        "SEP=^\nname^url\nx^{A}\n",
        "name|url|a,b,c,d\nx|{A}|1\n",
        '"name, first; last";url\nx;{A}\n',
        '"a\nb";"url"\nx;{A}\n',
        '\n\n"a;b;c;d",url\nx,{A}\n',
    ],
)
def test_the_delimiter_is_found(content: str):
    (line,) = read(content.replace("{A}", A), "csv")
    assert line.source == Uri(A)


def test_columns_with_the_same_name_are_distinguished():
    (line,) = read(f"url,a,a,,a_2\n{A},1,2,3,4\n", "csv")
    assert line.columns == {"url": A, "a": "1", "a_2": "2", "column_4": "3", "a_2_2": "4"}


def test_a_csv_record_that_is_not_utf_8_is_one_bad_line():
    lines = read(f"url,name\n{A},caf\udce9\n{B},x\n".encode(errors="surrogateescape"), "csv")
    assert [line.source is None for line in lines] == [True, False]
    assert "not UTF-8" in str(lines[0].error)
    assert lines[0].columns == {"url": A, "name": "caf?"}


@pytest.mark.parametrize("input_format", ["csv", "jsonl"])
def test_requested_columns_are_kept(input_format: InputFormat):
    csv_, jsonl = f"id,url,sku\n1,{A},x\n", f'{{"id": "1", "url": "{A}", "sku": "x"}}\n'
    content = csv_ if input_format == "csv" else jsonl
    for keep, expected in (
        (None, {"id": "1", "url": A, "sku": "x"}),
        (("sku", "id"), {"id": "1", "sku": "x"}),
        ((), None),
    ):
        (line,) = read(content, input_format, keep=keep)
        assert line.columns == expected


def test_a_column_to_keep_must_exist():
    with pytest.raises(ConfigurationError, match=r"no column 'sku'.*--keep"):
        read(f"id,url\n1,{A}\n", "csv", keep=("sku",))


@pytest.mark.parametrize(
    ("record", "column"),
    [
        ('{"image": {"url": "{A}"}}', "image.url"),
        ('{"image.url": "{A}", "image": {"url": 1}}', "image.url"),
        ('{"images": [{"src": "x"}, {"src": "{A}"}]}', "images.1.src"),
        ('{"a": {"b": {"c": "{A}"}}}', "a.b.c"),
    ],
)
def test_a_dotted_column_is_a_nested_field(record: str, column: str):
    (line,) = read(record.replace("{A}", A), "jsonl", column, name=column)
    assert (line.source, line.name) == (Uri(A), A)


@pytest.mark.parametrize("path", ["image.src", "image.url.x", "images.7", "images.x", ".", ""])
def test_a_dotted_column_that_is_missing_is_one_bad_line(path: str):
    bad, good = read(f'{{"image": {{"url": 5}}, "images": []}}\n{{"{path}": "{A}"}}', "jsonl", path)
    assert "is missing" in str(bad.error)
    assert good.source == Uri(A)


@pytest.mark.parametrize(
    "odd",
    [
        '{"url": "\\ud800"}',
        '{"\\ud800": 1}',
        '{"url": "https://example.com/\\ud800"}',
        '{"url": ' + "[" * 2000 + "]" * 2000 + "}",
        '{"url": {"a": NaN}, "b": Infinity}',
        '{"url": "' + "x" * 200_000 + '"}',
        '{"url": 1' + "0" * 5000 + "}",
        '{"url": null}',
        '"url"',
        "{",
        "\x00",
    ],
    ids=range(11),
)
def test_any_json_line_costs_at_most_one_bad_line(odd: str):
    lines = read(f'{{"url": "{A}"}}\n{odd}\n{{"url": "{B}"}}\n', "jsonl")
    assert [line.source is not None for line in lines] == [True, False, True]
    bad = lines[1]
    codec.dumps(bad.columns)
    f"{bad.text} {bad.error}".encode()


def write_parquet(rows: list[dict[str, Any]]) -> bytes:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    stream = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(rows), stream)
    return stream.getvalue()


def test_parquet_rows_are_lines():
    rows: list[dict[str, Any]] = [
        {"id": 2**40, "image": {"url": A, "day": date(2026, 1, 2)}, "tags": ["x"], "raw": b"1"},
        {"id": None, "image": {"url": "nonsense", "day": None}, "tags": None, "raw": None},
        {"id": 3, "image": None, "tags": [], "raw": b"3"},
    ]
    lines = read(write_parquet(rows), "parquet", "image.url", name="id")
    assert [(line.number, line.name, line.source) for line in lines] == [
        (1, str(2**40), Uri(A)),
        (2, None, None),
        (3, None, None),
    ]
    assert lines[0].columns == {
        "id": 2**40,
        "image": {"url": A, "day": "2026-01-02"},
        "tags": ["x"],
    }


def build_odd_parquet() -> tuple[bytes, list[dict[str, Any]]]:
    """Return a file with values that Python cannot hold, and its rows."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    instants = arrow.array([1577836800123456789, 1577836800000000000, None], arrow.timestamp("ns"))
    exact, rounded = "2020-01-01T00:00:00.123456789", "2020-01-01T00:00:00"
    bad = arrow.array([b"\xff", b"ok", None])
    texts = arrow.Array.from_buffers(arrow.string(), 3, bad.buffers())
    columns: dict[str, tuple[Any, list[Any]]] = {
        "ns": (instants, [exact, rounded, None]),
        "zone": (
            instants.cast(arrow.timestamp("ns", "UTC")),
            [exact + "+00:00", rounded + "+00:00", None],
        ),
        "struct": (
            arrow.StructArray.from_arrays([instants, instants], names=["x", "x"]),
            [{"x": text, "x_2": text} for text in (exact, rounded, None)],
        ),
        "list": (
            arrow.ListArray.from_arrays([0, 2, 2, 3], instants),
            [[exact, rounded], [], [None]],
        ),
        "map": (
            arrow.MapArray.from_arrays([0, 1, 2, 2], arrow.array(["a", "b", "c"]), instants),
            [[["a", exact]], [["b", rounded]], []],
        ),
        "far": (arrow.array([2**62, None, 0], arrow.timestamp("ms")), [2**62, None, "1970-01-01T00:00:00"]),
        "span": (arrow.array([-1234, None, 0], arrow.duration("ns")), ["-1234", None, "0:00:00"]),
        "text": (texts, ["\udcff", "ok", None]),
        "coded": (texts.dictionary_encode(), ["\udcff", "ok", None]),
    }  # fmt: skip
    urls = [A, A, A]
    names = [*columns, "url", "url"]
    arrays = [array for array, _ in columns.values()] + [arrow.array(urls), arrow.array(urls)]
    stream = io.BytesIO()
    parquet.write_table(arrow.Table.from_arrays(arrays, names=names), stream)
    rows = [{name: values[row] for name, (_, values) in columns.items()} for row in range(3)]
    return stream.getvalue(), [{**row, "url": A, "url_2": A} for row in rows]


def test_parquet_values_that_python_cannot_hold_are_read():
    content, rows = build_odd_parquet()
    lines = read(content, "parquet")
    assert [line.error for line in lines] == [None] * 3
    assert [line.columns for line in lines] == rows


def test_binary_fields_of_parquet_are_never_read():
    image = {"bytes": b"x", "path": "a.jpg"}
    (line,) = read(write_parquet([{"url": A, "image": image, "all": [b"x"]}]), "parquet")
    assert line.columns == {"url": A, "image": {"path": "a.jpg"}}


@pytest.mark.parametrize("key", [1.5, True, [1], {"a": 1}])
def test_a_key_that_is_neither_text_nor_integer_is_refused(key: object):
    (line,) = read(json.dumps({"url": A, "id": key}), "jsonl", name="id")
    assert "must be text or an integer" in str(line.error)


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"a.b": {"url": A}}, "a.b.url"),
        ({"a": {"b.c": A}}, "a.b.c"),
        ({"a": {"x": 1}, "a.b": [{"c.d": A}]}, "a.b.0.c.d"),
        ({"a": [A]}, "a.0"),
    ],
)
def test_names_on_a_dotted_path_may_contain_dots(record: dict[str, Any], name: str):
    assert [line.source for line in read(json.dumps(record), "jsonl", name)] == [Uri(A)]


def test_a_path_into_a_list_may_have_any_number():
    (line,) = read(json.dumps({"a": [A]}), "jsonl", "a." + "9" * 5000)
    assert "The field" in str(line.error)


def test_an_invalid_parquet_file_is_refused():
    for content in (b"", b"PAR1", write_parquet([{"url": A}])[:-20] + bytes(20)):
        with pytest.raises(ConfigurationError, match="not a readable Parquet file"):
            read(content, "parquet")


@pytest.mark.parametrize(
    ("content", "column", "sentence"),
    [
        ("a,b\n1,2\n", None, "no column 'url'; its columns are 'a', 'b'"),
        ("a,url\n1,2\n", "image", "no column 'image'; its columns are 'a', 'url'"),
        (f"{A}\n{B}\n", None, "no header"),
    ],
)
def test_csv_without_the_column_is_refused(content: str, column: str | None, sentence: str):
    with pytest.raises(ConfigurationError, match=sentence):
        read(content, "csv", column)


def test_every_kind_of_invalid_jsonl_is_reported():
    content = f'{{"url": "{A}"}}\n\nnonsense\n[]\n{{"id": 1}}\n{{"url": 5}}\n{{"uri": "{B}"}}\n'
    lines = read(content, "jsonl")
    assert [line.number for line in lines] == [1, 3, 4, 5, 6, 7]
    reasons = [
        "not valid JSON",
        "not an object",
        "'url' is missing; the fields are 'id'",
        "be text",
    ]
    for line, reason in zip(lines[1:5], reasons, strict=True):
        assert reason in str(line.error)
    assert lines[-1].source == Uri(B)


def test_only_the_named_field_is_read():
    assert show(read(f'{{"url": "{A}", "source": "{B}"}}', "jsonl", "source")) == [(1, B)]


def test_a_json_array_is_refused_with_a_conversion():
    with pytest.raises(ConfigurationError, match="jq"):
        read(f'[\n{{"url": "{A}"}}\n]', "jsonl")


@pytest.mark.parametrize(
    "content",
    [gzip.compress(A.encode(), mtime=1), A.encode("utf-16"), b"\x89PNG\r\n\x1a\n", b"PK\x03\x04\n"],
)
@pytest.mark.parametrize("input_format", ["text", "csv", "jsonl"])
def test_binary_input_is_refused_with_a_message(content: bytes, input_format: InputFormat):
    with pytest.raises(ConfigurationError, match="not a text file"):
        read(content, input_format)


@pytest.mark.parametrize("input_format", ["text", "csv", "jsonl"])
def test_an_empty_input_has_no_lines(input_format: InputFormat):
    assert read(b"", input_format) == []


class _Endless(io.RawIOBase):
    """A stream that never ends and counts the bytes that were read."""

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
    [
        *[("a.CSV", "csv"), ("a.tsv", "csv"), ("a.ndjson", "jsonl"), ("a.txt", "text")],
        *[("a", "text"), ("a.csv.gz", "csv"), ("a.gz", "text"), ("a.parquet", "parquet")],
    ],
)
def test_the_extension_names_the_format(name: str, expected: str):
    assert detect_format(name) == expected


def test_a_source_is_a_url_or_an_asset_id():
    assert read_source(" asset: 0a1b ") == Asset("0a1b")
    assert read_source(f" {A} ") == Uri(A)
    with pytest.raises(InvalidRequestError):
        read_source("asset:")


def test_an_unknown_extension_is_refused_with_a_list():
    for name in ("a.xlsx", "a.xlsx.gz", "a.lst"):
        with pytest.raises(ConfigurationError, match=r"\.csv.*\.parquet.*--input-format"):
            detect_format(name)


@pytest.mark.parametrize(("depth", "good"), [(999, True), (1001, False), (100_000, False)])
def test_a_line_nested_too_deeply_is_a_bad_line(depth: int, good: bool):
    content = f'{{"url":"{A}","x":{"[" * depth}{"]" * depth}}}\n{{"url":"{B}"}}\n'
    lines = read(content, "jsonl")
    assert [line.error is None for line in lines] == [good, True]


def test_a_csv_record_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch):
    for module in ("table", "text"):
        monkeypatch.setattr(f"cloudinary_analyze.cli.{module}.LONGEST_LINE", 2**20)
    for content in ('url,n\n"' + ("x" * 2**19 + "\n") * 3, 'url,"' + ("x" * 2**19 + "\n") * 3):
        with pytest.raises(ConfigurationError, match=r"or 1 MiB|open quote"):
            read(content, "csv")


def test_a_header_of_many_columns_is_read_fast():
    for names in ([*map(str, range(100_000))], ["a"] * 100_000, [""] * 100_000):
        content = f"url,{','.join(names)}\n{A},{','.join('1' * len(names))}\n"
        (line,) = read(content, "csv")
        assert line.columns is not None
        assert len(line.columns) == len(names) + 1


def test_an_invalid_source_is_explained_as_it_is_written_in_a_file():
    (line,) = read("catalog/front")
    assert "or asset:ID." in str(line.error)
