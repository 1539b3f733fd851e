"""No command overwrites a file of the user, for any options, and links are followed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import cli_support
import pytest
from cli_support import StartEmulator, build_urls, read_records, write_lines

from cloudinary_analyze.cli import main
from cloudinary_analyze.cli.files import check_conflicts, set_aside
from cloudinary_analyze.cli.screen import CommandError
from cloudinary_analyze.emulator import Emulator
from cloudinary_analyze.ledger.file import COMPANIONS
from cloudinary_analyze.results.files import open_replacement

cli_folder, start_emulator = cli_support.cli_folder, cli_support.start_emulator
pytestmark = [
    pytest.mark.usefixtures("cli_folder"),
    pytest.mark.skipif(sys.platform == "win32", reason="hard links, pipes and modes of POSIX"),
]

RUN = {
    "--input": "u.txt",
    "--output": "o.jsonl",
    "--ledger": "l",
    "--report": "r.html",
    "--summary-json": "s.json",
}
EXPORT = {"": "done.ledger", "--output": "x.jsonl"}
REPORT = {"": "done.ledger", "--output": "r.html"}
COMMANDS = {"run": RUN, "export": EXPORT, "report": REPORT}
PAIRS = [
    (command, one, other)
    for command, paths in COMMANDS.items()
    for number, one in enumerate(paths)
    for other in list(paths)[number + 1 :]
]


def same(path: Path) -> str:
    return str(path)


def dotted(path: Path) -> str:
    return f"./{path}"


def absolute(path: Path) -> str:
    return str(path.absolute())


def through_parent(path: Path) -> str:
    Path("folder").mkdir()
    return f"folder/../{path}"


def symlink(path: Path) -> str:
    Path("link").symlink_to(path)
    return "link"


def linked_folder(path: Path) -> str:
    Path("here").symlink_to(".")
    return f"here/{path}"


def hard_link(path: Path) -> str:
    if not path.exists():
        path.touch()
    os.link(path, "hard")
    return "hard"


RELATIONS = [same, dotted, absolute, through_parent, symlink, linked_folder, hard_link]
Files = dict[str, bytes | str]


def snapshot() -> Files:
    """Return the kind and content of each path in the folder."""
    found: Files = {}
    for path in sorted(Path().rglob("*")):
        if path.is_symlink():
            found[str(path)] = f"link to {path.readlink()}"
        elif path.is_file():
            found[str(path)] = path.read_bytes()
        else:
            found[str(path)] = "folder" if path.is_dir() else "pipe"
    return found


@pytest.fixture
def service(start_emulator: StartEmulator) -> Emulator:
    """Lay out an input and a finished run, and start a service for more."""
    start_emulator()
    write_lines(*build_urls(3), name="u.txt")
    assert main(["run", "coco", "--input", "u.txt", "-o", "done.jsonl"]) == 0
    Path("done.jsonl.ledger").rename("done.ledger")
    Path("done.jsonl.ledger-lock").unlink()
    return start_emulator()


def run(command: str, paths: dict[str, str]) -> int:
    arguments = ["run", "coco"] if command == "run" else [command]
    for option, path in paths.items():
        arguments += [option, path] if option else [path]
    return main(arguments)


@pytest.mark.parametrize(("command", "one", "other"), PAIRS)
def test_two_options_that_name_one_file_are_refused(
    service: Emulator, command: str, one: str, other: str, capfd: pytest.CaptureFixture[str]
):
    for relation in RELATIONS:
        paths = dict(COMMANDS[command])
        paths[other] = relation(Path(paths[one]))
        before = snapshot()
        assert run(command, paths) == 2, relation
        assert snapshot() == before
        assert service.counts.total_received == 0
        err = capfd.readouterr().err
        assert "same file" in err or "would be lost" in err


@pytest.mark.slow
@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.__name__)
@pytest.mark.parametrize(
    ("command", "option"),
    [(command, option) for command in COMMANDS for option in COMMANDS[command]],
)
def test_a_path_may_have_any_spelling(
    service: Emulator, command: str, option: str, relation: Callable[[Path], str]
):
    paths = dict(COMMANDS[command])
    target = Path(paths[option])
    existed = target.exists()
    paths[option] = relation(target)
    was_link = Path(paths[option]).is_symlink()
    before = snapshot()
    assert run(command, paths) == 0
    assert Path(paths[option]).is_symlink() == was_link
    after = snapshot()
    for name in ("u.txt", "done.ledger", "done.jsonl"):
        assert after[name] == before[name]
    if relation is not hard_link and not existed:
        assert target.stat().st_size  # the link was followed
    assert not [name for name in after if name.endswith((".part", "-new"))]


@pytest.mark.parametrize(
    ("command", "option"),
    [(command, option) for command in COMMANDS for option in COMMANDS[command]],
)
def test_a_directory_is_refused(service: Emulator, command: str, option: str):
    Path("folder").mkdir()
    Path("folder/kept.txt").write_text("mine")
    Path("link").symlink_to("folder")
    for name in ("folder", "link", "folder/", "."):
        before = snapshot()
        assert run(command, COMMANDS[command] | {option: name}) == 2
        assert snapshot() == before
    assert service.counts.total_received == 0


@contextlib.contextmanager
def drain(pipe: str) -> Iterator[list[bytes]]:
    """Read a pipe to its end."""
    got: list[bytes] = []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(Path(pipe).read_bytes()), daemon=True)
    reader.start()
    yield got
    reader.join(30)


@pytest.mark.parametrize(
    ("command", "option"),
    [("run", "--output"), ("run", "--report"), ("export", "--output"), ("report", "--output")],
)
def test_a_pipe_is_written_and_stays(service: Emulator, command: str, option: str):
    with drain("pipe") as got:
        assert run(command, COMMANDS[command] | {option: "pipe"}) == 0
    assert len(got[0]) > 100
    assert stat.S_ISFIFO(Path("pipe").stat().st_mode)


@pytest.mark.parametrize("linked", [False, True])
def test_a_ledger_cannot_be_a_pipe_or_device(service: Emulator, linked: bool):
    os.mkfifo("pipe")
    if linked:
        Path("link").symlink_to("pipe")
    before = snapshot()
    assert run("run", RUN | {"--ledger": "link" if linked else "pipe"}) == 2
    assert snapshot() == before
    assert service.counts.total_received == 0


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize(
    ("command", "option"),
    [(command, option) for command in COMMANDS for option in COMMANDS[command]],
)
def test_a_device_is_refused_or_stays(
    service: Emulator, command: str, option: str, linked: bool
) -> None:
    """A node of the null device in the temporary folder. Nothing takes its place."""
    try:
        os.mknod("device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("making a device node needs root")
    if linked:
        Path("link").symlink_to("device")
    code = run(command, COMMANDS[command] | {option: "link" if linked else "device"})
    refused = option in {"--input", "--ledger", ""}
    assert code == (2 if refused else 0)
    assert stat.S_ISCHR(Path("device").lstat().st_mode)
    assert Path("link").is_symlink() == linked
    if refused:
        assert service.counts.total_received == 0


@pytest.mark.parametrize("suffix", COMPANIONS)
@pytest.mark.parametrize("option", ["--input", "--output", "--report"])
def test_files_next_to_the_ledger_are_its_own(service: Emulator, option: str, suffix: str):
    shutil.copy("u.txt", f"l{suffix}")
    before = snapshot()
    assert (
        run(
            "run",
            RUN
            | {option: f"l{suffix}", "--input": f"l{suffix}" if option == "--input" else "u.txt"},
        )
        == 2
    )
    assert snapshot() == before
    assert service.counts.total_received == 0


@pytest.mark.parametrize(
    ("command", "option"),
    [("run", "--output"), ("run", "--report"), ("export", "--output"), ("report", "--output")],
)
def test_no_ledger_is_overwritten_by_results(
    service: Emulator, command: str, option: str, capfd: pytest.CaptureFixture[str]
):
    shutil.copy("done.ledger", "other.ledger")
    before = snapshot()
    assert run(command, COMMANDS[command] | {option: "other.ledger"}) == 2
    assert snapshot() == before
    assert "such as a ledger" in capfd.readouterr().err


def test_no_ledger_is_overwritten_by_the_export_of_another(service: Emulator):
    before = snapshot()
    assert main(["export", "redis://127.0.0.1:1/0", "-o", "done.ledger"]) == 2
    assert snapshot() == before


def test_several_inputs_are_each_compared(service: Emulator):
    write_lines(*build_urls(2), name="v.txt")
    before = snapshot()
    arguments = ["run", "coco", "--input", "u.txt", "--input", "?.txt"]
    assert main([*arguments[:3], "u.txt", "--input", "./u.txt"]) == 2
    assert main(["run", "coco", "--input", "?.txt", "--output", "v.txt"]) == 2
    assert snapshot() == before
    assert service.counts.total_received == 0


def test_standard_streams_are_compared_too(monkeypatch: pytest.MonkeyPatch):
    Path("u.txt").write_text("https://example.com/\n")
    with Path("u.txt").open("a") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(CommandError, match="same file"):
            check_conflicts([("--input", Path("u.txt"))], [("--output", "-")])
        monkeypatch.setattr(sys, "stdin", stream)
        with pytest.raises(CommandError, match="same file"):
            check_conflicts([("--input", "-")], [("--output", Path("u.txt"))])


def test_new_files_are_private_and_modes_are_kept(service: Emulator):
    before = os.umask(0o022)
    try:
        assert run("run", RUN) == 0
        files = [path for path in Path().iterdir() if path.name.startswith(("o.", "l", "r.", "s."))]
        assert len(files) >= 4
        for path in files:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
            path.chmod(0o640)
        for name in ("e.jsonl", "e.csv", "e.parquet"):
            assert main(["export", "l", "-o", name]) == 0
            assert stat.S_IMODE(Path(name).stat().st_mode) == 0o600, name
        write_lines(*build_urls(5), name="u.txt")
        assert run("run", RUN) == 0
        for path in files:
            assert stat.S_IMODE(path.stat().st_mode) == 0o640, path
    finally:
        os.umask(before)


def test_the_next_run_cleans_up_after_a_kill(service: Emulator):
    for name in ("o.jsonl", "r.html"):
        Path(f".{name}.cloudinary-analyze.part").write_text(
            "half of it, and longer than the rest" * 9999
        )
    assert run("run", RUN) == 0
    assert not list(Path().glob(".*"))
    assert len(read_records("o.jsonl")) == 3


def test_a_file_that_another_process_writes_is_left_to_it():
    with open_replacement("o") as first:
        first.write(b"first")
        with pytest.raises(OSError, match="Another process is writing it"):
            with open_replacement("o"):
                pass
    assert Path("o").read_bytes() == b"first"
    assert not list(Path().glob(".*"))


def test_a_link_in_place_of_an_unfinished_file_is_not_followed():
    Path("mine").write_text("mine")
    Path(".o.cloudinary-analyze.part").symlink_to("mine")
    with pytest.raises(OSError, match="symbolic link"):
        with open_replacement("o"):
            pass
    assert Path("mine").read_text() == "mine"


def test_results_are_set_aside_next_to_what_a_link_names():
    Path("disk").mkdir()
    Path("disk/r").write_text("earlier")
    Path("disk/r.1").symlink_to("nowhere")
    Path("r").symlink_to("disk/r")
    assert set_aside("r") == Path("disk/r.2").resolve()
    assert Path("r").is_symlink()
    assert Path("disk/r.2").read_text() == "earlier"
    assert set_aside("r") is None


def test_results_that_cannot_be_written_end_with_3(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("cloudinary_analyze.cli.output.export_results", fail)
    assert main(["run", "coco", "--emulator", "--samples", "3"]) == 3
    err = capfd.readouterr().err
    assert "results.jsonl could not be written: No space left on device" in err
    assert "What was answered is kept in the ledger" in err
