"""Inputs of every kind, their columns in every output, and rows of the present input only."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cli_support
import pytest
from cli_support import (
    StartEmulator,
    build_urls,
    end,
    read_records,
    start,
    until,
    write_lines,
    write_urls,
)

from cloudinary_analyze.cli import main
from cloudinary_analyze.cli.ledger import Book
from cloudinary_analyze.emulator import Emulator
from cloudinary_analyze.results.records import InputItem

cli_folder, start_emulator = cli_support.cli_folder, cli_support.start_emulator
pytestmark = pytest.mark.usefixtures("cli_folder")

A, B, C = build_urls(3)
SHOP = ["sku,url,price,source", f"s1,{A},9.90,web", f's2,{B},"1,000",', f"s3,{C},=SUM(A1),shop"]


def read_csv(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(Path(path).read_bytes().decode(), newline="")))


def read_parquet(path: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()
    return rows


# columns


def test_columns_are_nested_in_json_lines(start_emulator: StartEmulator):
    start_emulator()
    write_lines(*SHOP, name="in.csv")
    assert main(["run", "coco", "lvis", "--input", "in.csv"]) == 0
    for number, record in enumerate(read_records()):
        sku, url, price, source = (("s1", A, "9.90", "web"), ("s2", B, "1,000", ""), ("s3", C, "=SUM(A1)", "shop"))[number // 2]  # fmt: skip
        assert record["input"] == {"sku": sku, "url": url, "price": price, "source": source}
        assert (record["source"], record["item_key"], record["file"]) == (url, None, None)


def test_columns_are_columns_of_tables(start_emulator: StartEmulator):
    start_emulator()
    write_lines(*SHOP, name="in.csv")
    arguments = ["run", "coco", "--input", "in.csv", "--key-column", "sku"]
    assert main([*arguments, "-o", "out.csv"]) == 0
    rows = read_csv("out.csv")
    assert list(rows[0])[:5] == ["sku", "url", "price", "input_source", "index"]
    assert [(r["sku"], r["price"], r["input_source"], r["source"]) for r in rows] == [
        ("s1", "9.90", "web", A),
        ("s2", "1,000", "", B),
        ("s3", "'=SUM(A1)", "shop", C),
    ]
    assert [row["item_key"] for row in rows] == ["s1", "s2", "s3"]
    assert main(["export", "out.csv.ledger", "-o", "out.parquet"]) == 0
    table = read_parquet("out.parquet")
    assert [row["price"] for row in table] == ["9.90", "1,000", "=SUM(A1)"]
    for row in table:
        assert row["units_used"] == 1
        assert row["restored"] is False
        assert row["request_id"]
        assert row["entity"] == row["source"]
        assert json.loads(row["limits"])[0]["type"] == "object_detection"


def test_columns_of_json_keep_their_types(start_emulator: StartEmulator):
    start_emulator()
    rows: list[dict[str, Any]] = [
        {"url": A, "n": 1, "x": 1, "ok": True, "mixed": 1, "tags": ["a"], "big": 2**70},
        {"url": B, "n": 2, "x": 0.5, "ok": None, "mixed": "b", "more": {"c": None}},
        {"url": 5, "n": 3},
    ]
    write_lines(*map(json.dumps, rows), name="in.jsonl")
    assert main(["run", "coco", "--input", "in.jsonl", "-o", "out.parquet"]) == 1
    table = read_parquet("out.parquet")
    assert [row["n"] for row in table] == [1, 2, 3]
    assert [row["x"] for row in table] == [1.0, 0.5, None]
    assert [row["ok"] for row in table] == [True, None, None]
    assert [row["mixed"] for row in table] == ["1", "b", None]
    assert [row["tags"] for row in table] == ['["a"]', None, None]
    assert [row["big"] for row in table] == [str(2**70), None, None]
    assert [row["more"] for row in table] == [None, '{"c":null}', None]
    assert main(["export", "out.parquet.ledger", "-o", "out.jsonl"]) == 0
    assert [record["input"] for record in read_records("out.jsonl")] == rows


@pytest.mark.parametrize(
    ("keep", "expected"),
    [("sku", {"sku": "s1"}), ("price, SKU", {"sku": "s1", "price": "9.90"}), ("none", None)],
)
def test_the_columns_that_are_kept_can_be_chosen(
    start_emulator: StartEmulator, keep: str, expected: dict[str, str] | None
):
    emulator = start_emulator()
    write_lines(*SHOP, name="in.csv")
    for option in ([], ["--keep", keep]):  # a later run may choose others
        assert main(["run", "coco", "--input", "in.csv", *option]) == 0
    assert read_records()[0]["input"] == expected
    assert emulator.counts.total_received == 3
    assert main(["export", "results.jsonl.ledger", "-o", "out.csv"]) == 0
    own = {
        name for name in ("sku", "price", "url", "input_source") if name in read_csv("out.csv")[0]
    }
    assert own == set(expected or ())


def test_a_streamed_run_has_the_columns_too(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
):
    start_emulator()
    write_lines(*SHOP, "s4,nonsense,1,x", name="in.csv")
    for ledger in ([], ["--ledger", "l"], ["--ledger", "l"]):
        assert main(["run", "coco", "--input", "in.csv", "-o", "-", *ledger]) == 1
        records = sorted(
            map(json.loads, capfd.readouterr().out.splitlines()), key=lambda r: r["line"]
        )
        assert [record["input"]["sku"] for record in records] == ["s1", "s2", "s3", "s4"]


# inputs


def test_several_files_and_patterns_are_one_input(start_emulator: StartEmulator):
    start_emulator()
    Path("in").mkdir()
    write_lines("url,n", f"{A},1", name="in/b.csv")
    write_lines(json.dumps({"url": B, "n": 2}), name="in/a.jsonl")
    Path("more.txt.gz").write_bytes(gzip.compress(f"{C}\nbad\n".encode()))
    write_lines("[x]", name="[x].txt")
    arguments = ["run", "coco", "--input", "in/*", "--input", "more.txt.gz"]
    assert main(arguments) == 1
    found = [(r["file"], r["line"], r["source"]) for r in read_records()]
    assert found == [
        ("in/a.jsonl", 1, B),
        ("in/b.csv", 2, A),
        ("more.txt.gz", 1, C),
        ("more.txt.gz", 2, "bad"),
    ]


def test_a_file_name_may_look_like_a_pattern(start_emulator: StartEmulator):
    start_emulator()
    write_lines(A, name="[x]*.txt")
    assert main(["run", "coco", "--input", "[x]*.txt"]) == 0
    assert read_records()[0]["file"] is None


@pytest.mark.parametrize("kind", ["parquet", "csv.gz", "jsonl.gz", "tsv"])
def test_every_kind_of_file_is_an_input(start_emulator: StartEmulator, kind: str):
    start_emulator()
    rows: list[dict[str, Any]] = [{"id": n, "url": url} for n, url in enumerate((A, B, C))]
    name = f"in.{kind}"
    if kind == "parquet":
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), name)
    elif kind == "csv.gz":
        text = "id,url\n" + "".join(f"{row['id']},{row['url']}\n" for row in rows)
        Path(name).write_bytes(gzip.compress(text.encode()))
    elif kind == "jsonl.gz":
        Path(name).write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    else:
        write_lines("id\turl", *[f"{row['id']}\t{row['url']}" for row in rows], name=name)
    assert main(["run", "coco", "--input", name, "--key-column", "id"]) == 0
    records = read_records()
    assert [record["item_key"] for record in records] == ["0", "1", "2"]
    assert [str(record["input"]["id"]) for record in records] == ["0", "1", "2"]


@pytest.mark.parametrize(
    "case",
    [
        ("u.txt", b"", "has no rows"),
        ("u.txt", b"\n# only a comment\n\n", "has no rows"),
        ("u.csv", b"", "has no rows"),
        ("u.csv", b"id,url\n", "has no rows"),
        ("u.csv", b"sep=,\n", "has no rows"),
        ("u.jsonl", b"\n", "has no rows"),
        ("u.csv.gz", gzip.compress(b"id,url\n"), "has no rows"),
        ("u.csv.gz", gzip.compress(b"id,url\n" + b"1,https://example.com/\n" * 9000)[:-50], "damaged"),
        ("u.gz", b"\x1f\x8bnonsense", "damaged"),
        ("u.csv", b"id,url\n" + b"1,https://example.com/\n" * 99 + b'2,"https://x', "line 101"),
        ("u.xlsx", b"PK\x03\x04", "Unknown extension '.xlsx'"),
        ("u.parquet", b"PK\x03\x04", "not a readable Parquet file"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("output", ["results.jsonl", "-"])
def test_an_empty_or_damaged_input_is_refused(
    start_emulator: StartEmulator,
    capfd: pytest.CaptureFixture[str],
    case: tuple[str, bytes, str],
    output: str,
):
    name, content, sentence = case
    emulator = start_emulator()
    Path(name).write_bytes(content)
    if (output == "-" and "damaged" in sentence) or sentence == "line 101":
        output = "results.jsonl"  # a streamed run sends what comes before
    assert main(["run", "coco", "--input", name, "-o", output]) == 2
    assert sentence in capfd.readouterr().err
    assert emulator.counts.total_received == 0
    assert not Path("results.jsonl").exists()
    if sentence == "has no rows":
        assert [path.name for path in Path().iterdir()] == [name]


def test_an_empty_input_leaves_earlier_items_alone(start_emulator: StartEmulator):
    start_emulator()
    write_lines(A, B)
    assert main(["run", "coco", "--input", "urls.txt"]) == 0
    before = read_records()
    Path("urls.txt").write_text("")
    assert main(["run", "coco", "--input", "urls.txt"]) == 2
    assert read_records() == before
    assert main(["export", "results.jsonl.ledger", "-o", "x.jsonl"]) == 0
    assert len(read_records("x.jsonl")) == 2


def test_duplicates_are_charged_once_and_marked(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
):
    emulator = start_emulator()
    write_lines(A, B, A, A)
    assert main(["run", "coco", "--input", "urls.txt"]) == 0
    assert [record["restored"] for record in read_records()] == [False, False, True, True]
    assert emulator.counts.total_received == 2
    assert main(["run", "coco", "--input", "urls.txt"]) == 0
    assert [record["restored"] for record in read_records()] == [True] * 4
    assert emulator.counts.total_received == 2


def test_duplicates_far_apart_are_charged_once(start_emulator: StartEmulator):
    emulator = start_emulator()
    write_lines(*build_urls(200), *build_urls(200), *reversed(build_urls(200)))
    assert main(["run", "coco", "lvis", "--input", "urls.txt", "--permits", "4"]) == 0
    assert set(emulator.counts.done.values()) == {1}
    restored = [record["restored"] for record in read_records()]
    assert restored == [False] * 400 + [True] * 800


# identity


@pytest.mark.parametrize("source", ["file", "pipe"])
def test_one_key_for_two_sources_is_refused_with_both_lines(
    start_emulator: StartEmulator,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    source: str,
):
    emulator = start_emulator()
    write_lines("sku,url", f"s1,{A}", f"s2,{B}", f"s1,{C}", f"s1,{A}", name="in.csv")
    with Path("in.csv").open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        name = "-" if source == "pipe" else "in.csv"
        options = ["--input-format", "csv", "--key-column", "sku"]
        assert main(["run", "coco", "--input", name, *options]) == 1
    assert [record["status"] for record in read_records()] == ["ok", "ok", "error", "ok"]
    assert emulator.counts.total_received == 2
    err = capfd.readouterr().err
    assert "line 4: The key 's1' already names another source, in line 2." in err


def test_a_key_accepts_new_signatures_of_one_image_only(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
):
    emulator = start_emulator()
    arguments = ["run", "coco", "--input", "in.csv", "--key-column", "sku"]
    write_lines("sku,url", f"s1,{A}?id=1&sig=a", f"s1,{A}?sig=b&id=1", f"s1,{A}?id=2&sig=a",
                f"s2,{B}?id=1", name="in.csv")  # fmt: skip
    assert main(arguments) == 1
    assert [record["status"] for record in read_records()] == ["ok", "ok", "error", "ok"]
    assert emulator.counts.total_received == 2
    write_lines("sku,url", f"s1,{A}?id=1&sig=c", f"s2,{B}?id=2", name="in.csv")
    assert main(arguments) == 1
    first, second = read_records()
    assert (first["status"], first["restored"]) == ("ok", True)
    assert "The ledger knows the key 's2'" in second["error"]["message"]
    assert emulator.counts.total_received == 2


def test_another_input_in_the_ledger_is_reported(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
):
    emulator = start_emulator()
    write_urls(Path(), 30)
    assert main(["run", "coco", "--input", "urls.txt"]) == 0
    capfd.readouterr()
    write_lines(*build_urls(35)[20:], name="urls.txt")
    assert main(["run", "coco", "--input", "urls.txt"]) == 0
    err = capfd.readouterr().err
    assert "also holds 20 results of another input" in err
    assert "Of its 15 items, 10 are answered already" in err
    assert len(read_records()) == 15
    assert len(read_records("results.jsonl.1")) == 30
    assert emulator.counts.total_received == 35


async def test_a_killed_run_exports_rows_of_its_input(tmp_path: Path):
    write_lines(*[f"{url}?a" for url in build_urls(100)], name="a.txt")
    write_lines(*[f"{url}?b" for url in build_urls(100)], name="b.txt")
    arguments = ("run", "coco", "--permits", "4", "--input")
    async with Emulator() as emulator:
        async with start(*arguments, "a.txt", folder=tmp_path, emulator=emulator) as process:
            assert (await end(process))[0] == 0
        emulator.latency = 0.1
        async with start(*arguments, "b.txt", folder=tmp_path, emulator=emulator) as process:
            await until(lambda: emulator.counts.total_done > 110)
            process.kill()
            await process.wait()
    assert not Path("results.jsonl").exists()  # it was a's
    assert len(read_records("results.jsonl.1")) == 100
    assert main(["export", "results.jsonl.ledger", "-o", "x.jsonl"]) == 0
    records = read_records("x.jsonl")
    assert records
    assert all(record["source"].endswith("?b") for record in records)


@pytest.mark.slow
@pytest.mark.usefixtures("untraced")
async def test_interrupted_runs_over_an_edited_input_end_in_its_rows(tmp_path: Path):
    """Five models, one without quota; three interrupts; an edit between two of them."""
    models = ("captioning", "coco", "lvis", "ai_vision_general", "google_tagging")
    draw = random.Random(7)
    rows = [(f"s{n}", f"https://example.com/{n % 1900}.jpg") for n in range(2000)]

    def write() -> None:
        lines = ["sku,url,note", *[f'{sku},{url},"n, {sku}"' for sku, url in rows]]
        write_lines(*lines, name="in.csv")

    arguments = ("run", *models, "--prompt", "x", "--input", "in.csv", "--permits", "32")
    write()
    async with Emulator(latency=0.02, quotas={"ai_vision": 40_000}) as emulator:
        for attempt in range(3):
            async with start(*arguments, folder=tmp_path, emulator=emulator) as process:
                until_count = emulator.counts.total_done + draw.randrange(200, 1500)
                await until(lambda count=until_count: emulator.counts.total_done > count)
                process.send_signal(draw.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP]))
                assert (await end(process))[0] in {3, 130}
            records = read_records(tmp_path / "results.jsonl")
            known = dict(rows)
            assert all(known[record["input"]["sku"]] == record["source"] for record in records)
            if attempt == 1:
                del rows[100:200]
                rows[50:50] = [(f"new{n}", f"https://example.com/new{n}.jpg") for n in range(70)]
                rows.reverse()
                write()
        async with start(*arguments, folder=tmp_path, emulator=emulator) as process:
            code, _, err = await end(process)
        done = emulator.counts.done
    assert code == 3, err
    records = read_records(tmp_path / "results.jsonl")
    expected = [(sku, url, model) for sku, url in rows for model in models]
    without_vision = [row for row in expected if row[2] != "ai_vision_general"]
    found = [(r["input"]["sku"], r["source"], r["model"]) for r in records if r["status"] == "ok"]
    assert [row for row in found if row[2] != "ai_vision_general"] == without_vision
    assert len(set(found)) == len(found)
    assert [row for row in expected if row in set(found)] == found
    assert all(r["input"]["note"] == f"n, {r['input']['sku']}" for r in records)
    assert set(done.values()) == {1}  # over all runs
    assert {(row[2], row[1]) for row in found} <= set(done)


@pytest.mark.parametrize("first", ["ai_vision_general", "captioning"])
def test_an_early_refusal_stops_only_its_model(
    start_emulator: StartEmulator, monkeypatch: pytest.MonkeyPatch, first: str
):
    """The service refuses the first item while the input is still being read."""
    read = Book.read_items

    def read_slowly(book: Book, **options: Any) -> Iterator[InputItem]:
        for number, item in enumerate(read(book, **options)):
            if number in {1, 2}:
                time.sleep(0.3)
            yield item

    monkeypatch.setattr(Book, "read_items", read_slowly)
    models = [first, *{"ai_vision_general", "captioning", "google_tagging"} - {first}]
    emulator = start_emulator(quotas={"ai_vision": 0})
    write_urls(Path(), 30)
    assert main(["run", *models, "--prompt", "x", "--input", "urls.txt"]) == 3
    answered = [record["model"] for record in read_records() if record["status"] == "ok"]
    assert answered.count("captioning") == answered.count("google_tagging") == 30
    assert set(emulator.counts.done.values()) == {1}


@pytest.mark.parametrize("permits", ["1", "16"])
def test_open_items_of_a_refused_model_do_not_starve_the_others(
    start_emulator: StartEmulator, permits: str
):
    """Many consecutive open items belong to one model, whose quota is used up."""
    arguments = ["run", "ai_vision_general", "captioning", "google_tagging", "--prompt", "x"]
    arguments += ["--input", "urls.txt", "--permits", permits]
    quotas = {"ai_vision": 2000}
    emulator = start_emulator(quotas=quotas)
    write_urls(Path(), 200)
    assert main(arguments) == 3
    write_urls(Path(), 400)
    assert main(arguments) == 3
    answered = [record["model"] for record in read_records() if record["status"] == "ok"]
    assert answered.count("captioning") == answered.count("google_tagging") == 400
    assert 0 < answered.count("ai_vision_general") < 20
    assert set(emulator.counts.done.values()) == {1}


# odd options


LONG, DIGITS = "x" * 300, "9" * 5000
TASKS = [
    "run",
    "coco",
    "--input",
    "urls.txt",
    "--mode",
    "task",
    "--public-url",
    "https://x.example",
]
TASKS += ["--receive"]
ODD = {
    "an output name that is too long": ["run", "coco", "--input", "urls.txt", "-o", LONG],
    "a report name that is too long": ["run", "coco", "--input", "urls.txt", "--report", LONG],
    "a ledger name that is too long": ["run", "coco", "--input", "urls.txt", "--ledger", LONG],
    "an input name that is too long": ["run", "coco", "--input", LONG],
    "too many permits": ["run", "coco", "--input", "urls.txt", "--permits", str(10**30)],
    "a shard of none": ["run", "coco", "--input", "urls.txt", "--shard", "0/0"],
    "an export name that is too long": ["export", "urls.txt", "-o", LONG],
    "a ledger to export that is too long": ["export", LONG, "-o", "x.jsonl"],
    "results to report that are too long": ["report", LONG],
    "a directory in place of a ledger": ["export", ".", "-o", "x.jsonl"],
    "no ledger": ["export", "", "-o", "x.jsonl"],
    "no task": ["status", ""],
    "a shard with too many digits": [
        "run",
        "coco",
        "--input",
        "urls.txt",
        "--shard",
        f"1/{DIGITS}",
    ],
    "units with too many digits": [
        "run",
        "coco",
        "--input",
        "urls.txt",
        "--max-units",
        f"object_detection={DIGITS}",
    ],
    "a quota with too many digits": ["emulator", "--quota", f"ai_vision={DIGITS}"],
    "a webhook port with too many digits": [*TASKS, f"127.0.0.1:{DIGITS}"],
    "a webhook port that is too high": [*TASKS, "127.0.0.1:65536"],
    "a port that is too high": ["emulator", "--port", "65536"],
    "a negative port": ["listen", "--port", "-1"],
    "no address to listen on": ["listen", "--host", ""],
    "an address that cannot be encoded": ["listen", "--host", LONG],
    "an address that is none": ["emulator", "--host", "no address"],
    "a port that is in use": ["listen", "--port", "USED"],
    "an emulator's port that is in use": ["emulator", "--port", "USED"],
    "a webhook port that is in use": [*TASKS, "127.0.0.1:USED"],
}


@pytest.mark.parametrize("name", ODD)
def test_odd_options_are_refused_with_a_sentence(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str], name: str
):
    port = start_emulator().url.rpartition(":")[2]
    write_urls(Path(), 2)
    assert main([argument.replace("USED", port) for argument in ODD[name]]) == 2
    (sentence,) = capfd.readouterr().err.splitlines()
    assert sentence
    assert ".." not in sentence
    assert LONG in sentence or "file system failed" not in sentence


@pytest.mark.parametrize("option", ["--limit", "--sample", "--max-calls"])
def test_a_count_may_be_of_any_size(start_emulator: StartEmulator, option: str):
    start_emulator()
    write_urls(Path(), 2)
    assert main(["run", "coco", "--input", "urls.txt", option, str(10**30)]) == 0
    assert len(read_records()) == 2


def test_a_shard_may_be_of_any_size(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
):
    start_emulator()
    write_urls(Path(), 2)
    assert main(["run", "coco", "--input", "urls.txt", "--shard", f"1/{10**30}"]) == 0
    assert len(read_records()) == 1
    assert main(["run", "coco", "--input", "urls.txt", "--shard", f"{10**30}/{10**30}"]) == 2
    assert "has no rows" in capfd.readouterr().err
