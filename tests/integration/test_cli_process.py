"""The command line as a process: signals, pipes and terminals, against a real emulator."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
from asyncio.subprocess import PIPE
from collections.abc import Sequence
from pathlib import Path

import pytest
from cli_support import PATIENCE, end, read_records, read_terminal, see, start, until, write_urls
from scripted import CAPTION, ScriptedServer, after, one_after_the_other, until_still

from cloudinary_analyze import AnalyzeSession, Captioning, Credentials
from cloudinary_analyze.emulator import Emulator, FaultPlan


async def test_an_interrupted_run_writes_results_and_resumes(tmp_path: Path):
    write_urls(tmp_path, 200)
    arguments = ("run", "coco", "lvis", "--input", "urls.txt", "--permits", "8")
    async with Emulator(latency=0.2) as emulator:
        async with start(*arguments, folder=tmp_path, emulator=emulator) as process:
            await until(lambda: emulator.counts.total_done > 8)
            process.send_signal(signal.SIGINT)
            code, _, err = await end(process)
        assert code == 130, err
        records = read_records(tmp_path / "results.jsonl")
        assert {record["status"] for record in records} == {"ok"}
        assert len(records) == emulator.counts.total_done  # all that was charged was written
        assert f"{len(records)} items are answered, {400 - len(records)} left" in err
        assert "run the same command again" in err
        emulator.latency = None
        async with start(*arguments, folder=tmp_path, emulator=emulator) as process:
            code, _, err = await end(process)
        assert code == 0, err
        assert f"{len(records)} of these were done in an earlier run" in err
        found = [(r["line"], r["model"]) for r in read_records(tmp_path / "results.jsonl")]
        assert found == [(n, model) for n in range(1, 201) for model in ("coco", "lvis")]
        assert emulator.counts.total_received == 400


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_an_interrupt_ends_the_retries(number: signal.Signals, tmp_path: Path):
    write_urls(tmp_path, 12)
    arguments = ("run", "coco", "--input", "urls.txt", "--permits", "6")
    faults = FaultPlan(error_500=1.0, fault_times=1)  # each attempt fails once
    async with Emulator(faults=faults) as emulator:
        async with start(*arguments, folder=tmp_path, emulator=emulator) as process:
            await until(lambda: emulator.counts.total_received >= 6)
            process.send_signal(number)
            await see(process, "Interrupted:")
            await until_still(lambda: emulator.counts.total_received)  # sent before
            sent = emulator.counts.total_received
            code, _, err = await end(process)
        assert code == 130, err
        assert emulator.counts.total_received == sent < 24
        assert {r["error"]["status"] for r in read_records(tmp_path / "results.jsonl")} == {500}
        async with start(*arguments, folder=tmp_path, emulator=emulator) as process:
            code, _, err = await end(process)
        assert code == 0, err
        assert len(read_records(tmp_path / "results.jsonl")) == 12
        assert set(emulator.counts.done.values()) == {1}


async def test_a_second_interrupt_aborts_at_once(tmp_path: Path):
    write_urls(tmp_path, 50)
    async with (
        Emulator(latency=300) as emulator,
        start("run", "coco", "--input", "urls.txt", folder=tmp_path, emulator=emulator) as process,
    ):
        await until(lambda: emulator.counts.total_received)
        process.send_signal(signal.SIGINT)
        await see(process, "A second interrupt aborts")
        process.send_signal(signal.SIGINT)
        code, _, err = await end(process)
    assert code == 130
    assert "may have been charged" in err
    assert "Traceback" not in err
    assert (tmp_path / "results.jsonl").read_bytes() == b""


async def test_a_silent_pipe_blocks_neither_calls_nor_ctrl_c(tmp_path: Path):
    arguments = ("run", "coco", "--input", "-", "--output", "-")
    async with (
        Emulator() as emulator,
        start(*arguments, folder=tmp_path, emulator=emulator) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"https://example.com/1.jpg\n")
        await process.stdin.drain()
        async with asyncio.timeout(PATIENCE):
            record = json.loads(await process.stdout.readline())
        assert (record["line"], record["status"]) == (1, "ok")
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        told = await see(process, "To resume")
        async with asyncio.timeout(PATIENCE):
            assert await process.wait() == 130
        told += (await process.stderr.read()).decode()
    assert "Fatal" not in told
    assert "Traceback" not in told


async def test_piped_results_are_json_alone_and_progress_is_not_drawn(tmp_path: Path):
    urls = "".join(f"https://example.com/{number}.jpg\n" for number in range(30)).encode()
    arguments = ("run", "captioning", "--input", "-", "--output", "-")
    async with (
        Emulator() as emulator,
        start(*arguments, folder=tmp_path, emulator=emulator) as process,
    ):
        async with asyncio.timeout(PATIENCE):
            out, err = await process.communicate(urls)
    assert process.returncode == 0
    assert sorted(json.loads(line)["line"] for line in out.splitlines()) == list(range(1, 31))
    assert b"\x1b" not in err
    assert b"standard output" in err


async def test_a_reader_that_goes_away_stops_the_run(tmp_path: Path):
    write_urls(tmp_path, 2000)
    arguments = ("run", "coco", "--input", "urls.txt", "--output", "-")
    async with (
        Emulator(latency=0.02) as emulator,
        start(*arguments, folder=tmp_path, emulator=emulator, stdout=PIPE) as process,
    ):
        assert process.stdout is not None
        await process.stdout.readline()
        process._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined]
        told = await see(process, "To resume")
        async with asyncio.timeout(PATIENCE):
            assert await process.wait() == 3
        assert emulator.counts.total_received < 2000
    assert "was closed by the reader" in told
    assert "Traceback" not in told


async def run_on_terminal(
    arguments: Sequence[str], folder: Path, emulator: Emulator, *streams: str
) -> tuple[int | None, str]:
    ours, theirs = pty.openpty()
    try:
        options = dict.fromkeys(streams, theirs)
        async with start(*arguments, folder=folder, emulator=emulator, **options) as process:
            os.close(theirs)
            async with asyncio.timeout(PATIENCE):
                shown = await asyncio.to_thread(read_terminal, ours)
                await process.wait()
    finally:
        os.close(ours)
    return process.returncode, shown


async def test_a_terminal_shows_progress_with_failures_rate_and_quota(tmp_path: Path):
    """The server holds half of the calls until the terminal shows the other half."""
    write_urls(tmp_path, 60)
    ours, theirs = pty.openpty()
    release, shown = asyncio.Event(), b""
    ahead = one_after_the_other(*[CAPTION] * 30, after(release))
    arguments = ("run", "captioning", "--input", "urls.txt", "--permits", "10")
    try:
        async with (
            ScriptedServer(ahead) as server,
            start(*arguments, folder=tmp_path, emulator=server, stderr=theirs) as process,
        ):
            os.close(theirs)
            async with asyncio.timeout(PATIENCE):
                while b"30/60 0 failed" not in re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", shown):
                    shown += await asyncio.to_thread(os.read, ours, 65536)
                release.set()
                screen = await asyncio.to_thread(read_terminal, ours, shown)
                assert await process.wait() == 0
    finally:
        os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen)
    assert "60/60" in text
    assert re.search(r"\d/s", text)
    assert "quota left: object_detection 499" in text
    assert len(read_records(tmp_path / "results.jsonl")) == 60


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ("captioning", [r"\n\w[^\n]* background\."]),
        ("coco", ["label", "confidence", "box", r"│ +0\.\d\d\d │ \d+, \d+, \d+, \d+ +│"]),
        ("google_tagging", ["label", r"│ +0\.\d\d\d │"]),
        ("image_quality", [r"quality: \w+ \(score 0\.\d+\)"]),
        ("ai_vision_moderation --question Odd?", ["question", r"Odd\? +│ (yes|no|unknown)"]),
        ("ai_vision_general --prompt What?", [r"prompt 1 │ \w"]),
    ],
)
async def test_analyze_prints_readable_text_on_a_terminal(
    tmp_path: Path, arguments: str, shown: list[str]
):
    async with Emulator() as emulator:
        model, *options = arguments.split()
        url = emulator.sample_url(1)
        code, screen = await run_on_terminal(
            ("analyze", model, url, *options), tmp_path, emulator, "stdout", "stderr"
        )
    assert code == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen).replace("\r", "")
    assert text.startswith(f"{model}  {url}")
    for pattern in [*shown, "request id: "]:
        assert re.search(pattern, text), text


async def test_the_emulator_command_serves_until_it_is_interrupted(tmp_path: Path):
    arguments = ("emulator", "--quota", "object_detection=1")
    async with start(*arguments, folder=tmp_path) as process:
        assert process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            line = (await process.stdout.readline()).decode()
        told = re.fullmatch(r"export CLOUDINARY_URL='(cloudinary://\S+)'\n", line)
        assert told
        async with AnalyzeSession(Credentials.from_url(told[1])) as session:
            response = await session.analyze(Captioning("https://example.com/a.jpg"))
            assert response.limits[0].remaining == 0
        process.send_signal(signal.SIGINT)
        code, _, err = await end(process)
    assert code == 0
    assert "synthetic" in err
    assert "Traceback" not in err
