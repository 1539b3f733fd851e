"""Runs of tasks, with every way to receive results, and the status of a task."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
from pathlib import Path

import attrs
import cli_support
import pytest
from cli_support import (
    StartEmulator,
    build_urls,
    end,
    read_records,
    see,
    start,
    until,
    write_urls,
)
from notification_support import RedisServer, build_delivery
from ports import reserve_port

from cloudinary_analyze import AnalyzeSession, Answered, Coco, Credentials, Response, Settings
from cloudinary_analyze.analyses import OtherAnalysis
from cloudinary_analyze.cli import main, notifications
from cloudinary_analyze.cli.money import NO_LIMITS
from cloudinary_analyze.cli.notifications import CALLS, ReceivingOptions, open_line
from cloudinary_analyze.cli.output import DEFAULT_OUTPUT, plan_places
from cloudinary_analyze.cli.plan import RunPlan
from cloudinary_analyze.cli.screen import DEFAULT_DISPLAY, build_console
from cloudinary_analyze.cli.service import DEFAULT_CALLS, Service
from cloudinary_analyze.emulator import Emulator, FaultPlan
from cloudinary_analyze.events import NotificationSeen
from cloudinary_analyze.ledger import SQLiteLedger

cli_folder, start_emulator = cli_support.cli_folder, cli_support.start_emulator
pytestmark = pytest.mark.usefixtures("cli_folder")

RUN = ("run", "coco", "--input", "urls.txt", "--mode", "task")


def check_results(count: int) -> None:
    records = read_records()
    assert [record["source"] for record in records] == build_urls(count)
    assert {record["status"] for record in records} == {"ok"}
    assert all(record["analysis"] for record in records)


def test_tasks_of_the_emulator_need_nothing_else(capfd: pytest.CaptureFixture[str]):
    arguments = ["run", "coco", "captioning", "--mode", "task", "--emulator", "--samples", "100"]
    assert main(arguments) == 0
    records = read_records()
    assert len(records) == 200
    assert all(record["analysis"] and record["limits"] for record in records)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentences"),
    [
        ("", ("--receive", "--redis", "--emulator")),
        ("--receive 127.0.0.1:8080", ("--public-url",)),
        ("--receive 8080 --public-url https://x.example/", ("HOST:PORT",)),
        ("--receive 127.0.0.1:1 --redis redis://127.0.0.1", ("only one of these",)),
        ("--redis redis://127.0.0.1 --emulator", ("Omit --redis",)),
        ("--redis nonsense://", ("Redis URL",)),
        ("--receive 127.0.0.1:8080 --public-url ftp://x.example/", ("notification URL",)),
    ],
)
def test_tasks_whose_results_cannot_arrive_are_refused(
    options: str,
    sentences: tuple[str, ...],
    start_emulator: StartEmulator,
    capfd: pytest.CaptureFixture[str],
):
    emulator = start_emulator()
    write_urls(Path(), 1)
    assert main([*RUN, *options.split()]) == 2
    err = capfd.readouterr().err
    for sentence in sentences:
        assert sentence in err
    assert not emulator.counts.total_received


async def test_a_receiver_gets_all_results_despite_faults(tmp_path: Path):
    write_urls(tmp_path, 100)
    port = reserve_port()
    receive = ("--receive", f"127.0.0.1:{port}", "--public-url", f"http://127.0.0.1:{port}/hook")
    faults = FaultPlan(duplicated=0.2, forged=0.2, stale=0.2, malformed=0.2, foreign=0.2)
    async with (
        Emulator(faults=faults) as emulator,
        start(*RUN, *receive, folder=tmp_path, emulator=emulator) as process,
    ):
        code, _, err = await end(process)
        assert code == 0, err
        assert emulator.counts.total_received == 100
        assert emulator.counts.webhooks["forged"] > 5
    check_results(100)
    for record in read_records():
        assert record["entity"] == record["source"]


async def deliver_all(emulator: Emulator) -> None:
    """End all tasks, and repeat each notification until it is accepted."""
    while True:
        for task in emulator.tasks.values():
            if not task.notified:
                emulator._desk._finish(task)
        await asyncio.sleep(0.5)


async def test_pending_tasks_are_resumed_and_not_submitted_again(tmp_path: Path):
    write_urls(tmp_path, 30)
    port = reserve_port()
    receive = ("--receive", f"127.0.0.1:{port}", "--public-url", f"http://127.0.0.1:{port}/")
    async with Emulator(task_seconds=300) as emulator:
        async with start(*RUN, *receive, folder=tmp_path, emulator=emulator) as process:
            await until(lambda: len(emulator.tasks) == 30)
            ledger = SQLiteLedger(tmp_path / "results.jsonl.ledger")
            await until(lambda: ledger.counts().submitted == 30)
            process.send_signal(signal.SIGINT)
            await see(process, "in flight will be")
            process.send_signal(signal.SIGINT)
            code, _, err = await end(process)
        assert code == 130
        assert "submitted tasks continue" in err
        assert "0 items are answered, 30 left" in err
        delivering = asyncio.create_task(deliver_all(emulator))
        await until(lambda: emulator.counts.webhooks_refused >= 30)  # without a listener
        async with start(*RUN, *receive, folder=tmp_path, emulator=emulator) as process:
            code, _, err = await end(process)
        delivering.cancel()
        assert code == 0, err
        assert emulator.counts.total_received == 30
    check_results(30)


async def test_a_run_reads_results_that_listen_stored(tmp_path: Path, own_redis: RedisServer):
    write_urls(tmp_path, 30)
    redis = ("--redis", own_redis.url)
    async with Emulator() as emulator:
        async with start(
            *("listen", "--port", "0", "--path", "/hook", *redis),
            folder=tmp_path,
            emulator=emulator,
        ) as listener:
            told = await see(listener, "Ctrl-C ends it")
            url = re.search(r"http://\S+/hook", told)
            assert url
            arguments = (*RUN, *redis, "--public-url", url[0])
            async with start(*arguments, folder=tmp_path, emulator=emulator) as process:
                code, _, err = await end(process)
            assert code == 0, err
            listener.send_signal(signal.SIGINT)
            code, out, _ = await end(listener)
            assert code == 0
            assert len(out.splitlines()) == 30
    check_results(30)


async def test_no_command_line_needs_the_password_of_redis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    server = RedisServer(tmp_path, options=("--requirepass", "pLanted-redis"))
    server.start()
    try:
        write_urls(tmp_path, 3)
        with_password = server.url.replace("//", "//:pLanted-redis@")
        monkeypatch.setenv("REDIS_URL", with_password)
        redis = ("--redis", server.url)
        async with (
            Emulator() as emulator,
            start(
                *("listen", "--port", "0", *redis), folder=tmp_path, emulator=emulator
            ) as listener,
        ):
            url = (await see(listener, "Ctrl-C ends it")).split("on ")[1].split(" ")[0]
            arguments = (*RUN, *redis, "--public-url", url)
            async with start(*arguments, folder=tmp_path, emulator=emulator) as process:
                code, out, err = await end(process)
            assert (code, "pLanted" in out + err) == (0, False), err
            listener.send_signal(signal.SIGINT)
            code, out, err = await end(listener)
            assert (code, "pLanted" in out + err) == (0, False), err
        check_results(3)
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("retry_failed", "receiving", "expected"),
    [
        (False, ReceivingOptions(mode="task"), "raise"),
        (True, ReceivingOptions(mode="task"), "analyze"),
        (True, CALLS, "raise"),
    ],
)
def test_undelivered_results_are_paid_again_on_request(
    retry_failed: bool, receiving: ReceivingOptions, expected: str
):
    plan = RunPlan(
        models={},
        source=None,
        samples=1,
        places=plan_places(DEFAULT_OUTPUT, needs_ledger=False),
        named=False,
        retry_failed=retry_failed,
        receiving=receiving,
        calling=DEFAULT_CALLS,
        spending=NO_LIMITS,
        display=DEFAULT_DISPLAY,
        limit=None,
        emulated=False,
    )
    service = Service(Credentials("demo", "1", "2"))
    assert plan.build_settings(service).on_missing_result == expected


def test_undelivered_results_are_counted_apart(
    start_emulator: StartEmulator,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    start_emulator(faults=FaultPlan(lost=1.0), task_seconds=0)
    build = RunPlan.build_settings

    def build_impatient(plan: RunPlan, service: Service) -> Settings:
        return attrs.evolve(build(plan, service), poll_first=0.05, result_grace=0)

    monkeypatch.setattr(RunPlan, "build_settings", build_impatient)
    write_urls(Path(), 2)
    receiving = ["--receive", "127.0.0.1:0", "--public-url", "http://127.0.0.1:9/"]
    assert main([*RUN, *receiving]) == 1
    err = capfd.readouterr().err
    assert "2 results were never delivered" in err
    assert "transient" not in err


# a webhook is answered only once its result is kept


async def test_a_webhook_waits_until_its_result_is_kept():
    service = Service(Credentials("emulator-demo", "123456789012345", "emulator-secret"))
    async with open_line(ReceivingOptions(mode="task"), service, build_console()) as line:
        assert line is not None
        put = asyncio.create_task(line.source.put(build_delivery("t1")))  # type: ignore[attr-defined]
        await anext(aiter(line.source.listen()))
        line.hear(NotificationSeen(verdict="resolved", task_id="t1"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not put.done()
        response = Response(OtherAnalysis({}), model="coco", raw={"task_id": "t1"})
        outcome = Answered(
            item="x", index=0, request=Coco("https://example.com/a.jpg"), response=response
        )
        line.note_outcome(attrs.evolve(outcome, unrecorded=True))
        await asyncio.sleep(0)
        assert not put.done()
        line.note_outcome(outcome)
        await asyncio.wait_for(put, 30)


@pytest.mark.parametrize("verdict", ["duplicate", "foreign", "malformed"])
async def test_an_unexpected_webhook_is_answered_at_once(verdict: str):
    service = Service(Credentials("emulator-demo", "123456789012345", "emulator-secret"))
    async with open_line(ReceivingOptions(mode="task"), service, build_console()) as line:
        assert line is not None
        put = asyncio.create_task(line.source.put(build_delivery("t1")))  # type: ignore[attr-defined]
        await anext(aiter(line.source.listen()))
        line.hear(NotificationSeen(verdict=verdict, task_id="t1"))
        await asyncio.wait_for(put, 30)


async def test_a_webhook_for_a_task_that_stays_unknown_is_refused_soon(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(notifications, "PARKED_SECONDS", 0.01)
    service = Service(Credentials("emulator-demo", "123456789012345", "emulator-secret"))
    async with open_line(ReceivingOptions(mode="task"), service, build_console()) as line:
        assert line is not None
        put = asyncio.create_task(line.source.put(build_delivery("t1")))  # type: ignore[attr-defined]
        await anext(aiter(line.source.listen()))
        line.hear(NotificationSeen(verdict="parked", task_id="t1"))
        with pytest.raises(notifications.UnknownTaskError):
            await asyncio.wait_for(put, 30)


# status


async def accept_task(emulator: Emulator) -> str:
    async with AnalyzeSession(Credentials.from_url(emulator.cloudinary_url)) as session:
        with pytest.warns(UserWarning, match="without a notification source"):
            task = session.submit(Coco("https://example.com/a.jpg"), mode="task")
        task_id = await task.accepted()
        task.abandon()
    assert task_id is not None
    return task_id


async def test_status_is_json_only_when_piped(tmp_path: Path):
    async with Emulator() as emulator:
        task_id = await accept_task(emulator)
        await until(lambda: emulator.tasks[task_id].outcome)
        async with start("status", task_id, folder=tmp_path, emulator=emulator) as process:
            code, out, err = await end(process)
        assert code == 0, err
        data = json.loads(out)["data"]
        assert (data["task_id"], data["status"]) == (task_id, "completed")
        ours, theirs = pty.openpty()
        async with start(
            "status", task_id, folder=tmp_path, emulator=emulator, stdout=theirs
        ) as process:
            os.close(theirs)
            shown = await asyncio.to_thread(cli_support.read_terminal, ours)
        os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert text.startswith(f"completed  {task_id}")
    assert "comes by notification" in text


def test_the_status_of_an_unknown_task_is_a_failure(
    start_emulator: StartEmulator, capfd: pytest.CaptureFixture[str]
):
    start_emulator()
    assert main(["status", "nosuch"]) == 1
    assert "Task not found" in capfd.readouterr().err
