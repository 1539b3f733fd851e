"""Exported tables are complete, never partly written, and safe to open in a spreadsheet."""

import csv
import io
import json
import os
import sys
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudinary_analyze import ConfigurationError
from cloudinary_analyze.results.export import (
    COLUMNS,
    build_row,
    export_results,
    find_own_columns,
    read_records,
)

MODELS = (
    "ai_vision_general", "ai_vision_moderation", "ai_vision_tagging", "captioning", "cld_fashion",
    "cld_text", "coco", "google_logo_detection", "google_tagging", "human_anatomy",
    "image_quality", "lvis", "shop_classifier", "unidet", "watermark_detection",
)  # fmt: skip


def build(analysis=None, **fields):
    return {
        "index": 0, "line": 1, "source": "https://x.test/a.jpg", "model": "coco", "key": "k",
        "status": "ok", "analysis": analysis, "entity": None, "request_id": "r", "limits": [],
        "seconds": 0.25, "error": None, **fields,
    }  # fmt: skip


def read_csv(path):
    return list(csv.DictReader(io.StringIO(path.read_bytes().decode(), newline="")))


@pytest.mark.parametrize(
    ("model", "columns"),
    [
        ("captioning", {"caption": "A white and tan sneaker with pink accents floats in the foreground against a solid pink background."}),
        ("coco", {"labels": "person; dog", "top_score": 0.9912}),
        ("ai_vision_tagging", {"labels": "vegetation", "top_score": None}),
        ("google_tagging", {"labels": "cat; table", "top_score": 0.9}),
        ("google_logo_detection", {"labels": "google", "top_score": 0.980325}),
        ("watermark_detection", {"labels": "banner", "top_score": 0.99}),
        ("shop_classifier", {"labels": "studio", "top_score": 0.9812}),
        ("image_quality", {"quality": "medium", "quality_score": 0.45218, "labels": None}),
        ("ai_vision_general", {"answers": "A bee collects nectar from a yellow flower.\nYes, the image contains an insect.", "rejected": None}),
        ("ai_vision_moderation", {"answers": "Does the image contain any violent activity?: no\nIs there any nudity in the image?: unknown", "rejected": False}),
    ],
)  # fmt: skip
def test_a_row_holds_the_models_result(sample, model, columns):
    analysis = sample(model)["data"]["analysis"]
    row = build_row(build(analysis, model=model))
    assert {name: row[name] for name in columns} == columns
    assert json.loads(row["analysis"]) == analysis


def test_csv_and_parquet_hold_the_same_rows(sample, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [
        build(sample(model)["data"]["analysis"], model=model, index=index)
        for index, model in enumerate(MODELS)
    ]
    records.append(build(status="error", error={"type": "ServerError", "message": "No.", "status": 500, "code": "MA_1", "ambiguous": True}))  # fmt: skip
    records.append(build({"data": {"caption": "half a pair \ud800"}}, seconds=None))
    assert export_results(iter(records), tmp_path / "r.csv", "csv") == len(records)
    assert export_results(iter(records), tmp_path / "r.parquet", "parquet") == len(records)
    table = parquet.read_table(tmp_path / "r.parquet")
    assert table.column_names == list(COLUMNS)
    rows = table.to_pylist()
    assert rows == [build_row(record) for record in records]
    assert rows[-2]["error_status"] == 500
    assert rows[-2]["may_be_charged"] is True
    written = [
        {name: {None: "", True: "true", False: "false"}.get(cell, str(cell)) for name, cell in row.items()}
        for row in rows
    ]  # fmt: skip
    # 0 and 1 equal False and True, so numbers are compared separately
    for text, row in zip(read_csv(tmp_path / "r.csv"), written, strict=True):
        for name, kind in COLUMNS.items():
            if kind in (int, float) and text[name]:
                assert float(text[name]) == float({"false": 0, "true": 1}.get(row[name], row[name]))
            else:
                assert text[name] == row[name]


def test_jsonl_keeps_every_field(tmp_path):
    records = [build({"tags": {"a": [{"new": [1, 2]}]}}, extra="kept"), build(status="error")]
    export_results(records, tmp_path / "r.jsonl", "jsonl")
    assert list(read_records((tmp_path / "r.jsonl").read_bytes().splitlines())) == records


@given(st.text(alphabet="=+-@\t\r\n ;,\"'ax＝\0", max_size=8))
def test_no_csv_cell_begins_a_formula(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "formula.csv"
    record = build({"tags": {text: [{}]}, "data": {"caption": text}}, source=text, model=text)
    export_results([record], path, "csv")
    raw = path.read_bytes().decode()
    (row,) = csv.DictReader(io.StringIO(raw, newline=""))
    for cell in row.values():
        assert not cell.startswith(tuple("=+-@\t\r\n＝"))
    for name in ("source", "caption"):
        assert row[name].removeprefix("'" if not text.startswith("'") else "") == text


@pytest.mark.parametrize("number", ["-73.98", "+1", "-5", "-1e-9"])
def test_a_csv_keeps_text_that_is_a_number(tmp_path, number):
    columns = {"longitude": number, "-1": "name", "n": "-1 "}
    own = find_own_columns([columns])
    export_results([build(input=columns)], tmp_path / "r.csv", "csv", own=own)
    (row,) = read_csv(tmp_path / "r.csv")
    assert (row["longitude"], row["-1"], row["n"]) == (number, "name", "'-1 ")


def test_no_csv_header_begins_a_formula(tmp_path):
    own = find_own_columns([{"=1+1": "a", "\t@x": "b"}])
    export_results([build(input={"=1+1": "a", "\t@x": "b"})], tmp_path / "r.csv", "csv", own=own)
    (row,) = read_csv(tmp_path / "r.csv")
    assert [name for name in row if row[name] in {"a", "b"}] == ["'=1+1", "'\t@x"]


def test_a_number_that_no_column_can_hold_is_left_out(tmp_path):
    pytest.importorskip("pyarrow")
    record = build({"quality": "low", "score": 10**400}, index=2**64, line=True, seconds="soon")
    row = build_row(record)
    assert [row[name] for name in ("index", "line", "seconds", "quality_score")] == [None] * 4
    export_results([record], tmp_path / "r.parquet", "parquet")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_failure_midway_leaves_only_the_old_file(tmp_path, kind):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / "out"
    path.write_text("old")

    def break_off():
        yield build()
        raise RuntimeError("input broke")

    with pytest.raises(RuntimeError, match="input broke"):
        export_results(break_off(), path, kind)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link_and_a_pipe_is_written(tmp_path):
    real, link, pipe = tmp_path / "real", tmp_path / "link", tmp_path / "pipe"
    real.write_text("old")
    link.symlink_to(real)
    export_results([build()], link, "jsonl")
    assert link.is_symlink()
    assert json.loads(real.read_text())["source"] == "https://x.test/a.jpg"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        export_results([build()], pipe, "jsonl")
        assert json.loads(os.read(reader, 65536))["status"] == "ok"
    finally:
        os.close(reader)
    assert pipe.is_fifo()


@pytest.mark.slow
def test_memory_stays_flat_over_many_records(tmp_path):
    pytest.importorskip("pyarrow")
    analysis = {"data": {"caption": "x" * 16_000}}
    # the writers allocate buffers and import modules with the first row
    for kind in ("csv", "parquet"):
        export_results([build(analysis)], tmp_path / kind, kind)
        tracemalloc.start()
        export_results((build(analysis, index=n) for n in range(5_000)), tmp_path / kind, kind)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 80 * 2**20  # the input has 160 MB of captions and analyses


def test_a_line_that_is_not_a_record_is_reported(sample):
    lines = [b"\n", json.dumps(build()), b'{"index": 1, "sta', b"[]", b'{"a": 1}']
    with pytest.raises(ConfigurationError, match="Line 3 of the results is not a record"):
        list(read_records(lines))
    bad = []
    assert list(read_records(lines, on_bad_line=bad.append)) == [build()]
    assert bad == [3, 4, 5]


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="jsonl, csv or parquet"):
        export_results([], tmp_path / "r", "xlsx")
    assert not list(tmp_path.iterdir())


def test_without_the_extra_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'cloudinary-analyze\[parquet\]'"):
        export_results([], tmp_path / "r", "parquet")
    assert not list(tmp_path.iterdir())
