"""`AnalyzeStage`: in threads, processes and event loops; stops as outcomes; clean ends."""

import asyncio
import concurrent.futures
import contextlib
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cloudinary_analyze import (
    Answered,
    BulkStoppedError,
    Captioning,
    ConfigurationError,
    Credentials,
    Failed,
    LedgerError,
    QuotaExceededError,
    Settings,
)
from cloudinary_analyze import (
    stage as room,
)
from cloudinary_analyze.emulator import Emulator
from cloudinary_analyze.ledger import SQLiteLedger
from cloudinary_analyze.ledger import worker as ledger_room
from cloudinary_analyze.ledger.redis import RedisLedger
from cloudinary_analyze.notifications.redis import RedisNotifications
from cloudinary_analyze.stage import (
    COLUMNS,
    AnalyzeStage,
    close_sessions,
    outcome_columns,
    worker_stats,
)

ROOT = Path(__file__).parents[2]
URLS = [f"https://example.com/{number}.jpg" for number in range(40)]
SETTINGS = Settings(permits=8, backoff_first=0.01, backoff_max=0.02)


@pytest.fixture(autouse=True)
def _closed(monkeypatch):
    monkeypatch.setattr(ledger_room, "QUIET", 0.1)
    yield
    close_sessions()


@pytest.fixture
def build_ledger(shared_redis, request):
    def build_ledger(**options):
        return RedisLedger(shared_redis.url, namespace=f"test:{request.node.name}", **options)

    return build_ledger


@pytest.fixture
def emulate(monkeypatch):
    """Run an emulator on a thread, and name it in the environment."""

    @contextlib.contextmanager
    def emulate(**options):
        ready, stop = threading.Event(), threading.Event()
        emulator = Emulator(**{"latency": 0.005, **options})

        async def serve():
            async with emulator:
                ready.set()
                while not stop.is_set():
                    await asyncio.sleep(0.01)

        thread = threading.Thread(target=asyncio.run, args=(serve(),))
        thread.start()
        assert ready.wait(30)
        monkeypatch.setenv("CLOUDINARY_URL", emulator.cloudinary_url)
        try:
            yield emulator
        finally:
            close_sessions()
            stop.set()
            thread.join()

    return emulate


def fail_for_one(url):
    if url.endswith("/7.jpg"):
        raise KeyError("seven")
    return Captioning(url)


def test_each_item_has_its_outcome_in_order(emulate):
    with emulate():
        outcomes = AnalyzeStage(fail_for_one, settings=SETTINGS)(URLS)
        assert [outcome.item for outcome in outcomes] == URLS
        assert [o.index for o in outcomes if isinstance(o, Failed)] == [7]
        assert isinstance(outcomes[7].error, KeyError)
        assert AnalyzeStage(Captioning, settings=SETTINGS)([]) == []


def test_stages_with_other_settings_have_other_sessions(emulate):
    with emulate():
        for permits in (1, 2, 1):
            AnalyzeStage(Captioning, settings=Settings(permits=permits))(URLS[:3])
        assert [shown["calls"] for shown in worker_stats()] == [6, 3]


def test_stages_and_threads_share_one_session(emulate):
    with emulate() as emulator:

        def work(number):
            stage = AnalyzeStage(Captioning, settings=Settings(permits=5))
            return stage(URLS[number::4])

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            results = list(pool.map(work, range(4)))
        assert sum(isinstance(o, Answered) for outcomes in results for o in outcomes) == 40
        (shown,) = worker_stats()
        assert (shown["calls"], shown["pid"]) == (40, os.getpid())
        assert emulator.counts.max_in_flight <= 5
        assert threading.active_count() < 12


async def test_coroutines_call_it_and_may_be_cancelled(emulate):
    with emulate(latency=0.05) as emulator:
        stage = AnalyzeStage(Captioning, settings=SETTINGS)
        first, second = await asyncio.gather(stage.acall(URLS[:5]), stage.acall(URLS[5:9]))
        assert [o.item for o in first + second] == URLS[:9]
        calling = asyncio.create_task(stage.acall(URLS * 20))
        while emulator.counts.total_received < 20:
            await asyncio.sleep(0.005)
        emulator.latency = 0.5  # the bound below is one of seconds, too
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        while worker_stats()[0]["in_flight"]:
            await asyncio.sleep(0.005)
        assert emulator.counts.total_received < 60


def test_a_quota_becomes_outcomes_and_a_resume_restores(emulate, build_ledger):
    urls = [f"https://example.com/{number}.jpg" for number in range(300)]
    with emulate(quotas={"object_detection": 100}) as emulator:
        stage = AnalyzeStage(Captioning, settings=SETTINGS, ledger=build_ledger())
        columns = outcome_columns(stage(urls))
        assert {s: columns["status"].count(s) for s in ("answered", "stopped")} == {
            "answered": 100,
            "stopped": 200,
        }
        sent = emulator.counts.total_received
        again = outcome_columns(stage(urls[::-1]))
        assert again["status"].count("answered") == 100
        assert sum(again["restored"]) == 100
        assert emulator.counts.total_done == 100
        assert emulator.counts.total_received - sent <= 8


def test_refused_credentials_become_outcomes(emulate):
    with emulate() as emulator:
        wrong = Credentials("emulator-demo", "1", "2", host=emulator.url)
        outcomes = AnalyzeStage(Captioning, credentials=wrong, settings=SETTINGS)(URLS)
        assert set(outcome_columns(outcomes)["status"]) == {"stopped"}
        assert any(isinstance(outcome.error, BulkStoppedError) for outcome in outcomes)


def test_recorded_responses_are_returned_after_a_stop(emulate, build_ledger):
    with emulate(quotas={"object_detection": 5}) as emulator:
        stage = AnalyzeStage(Captioning, settings=SETTINGS, ledger=build_ledger())
        stage(URLS[-5:])
        outcomes = stage(URLS)  # the stream ends long before these
        assert [o.index for o in outcomes if isinstance(o, Answered)] == list(range(35, 40))
        assert all(outcome.restored for outcome in outcomes[-5:])
        assert emulator.counts.total_done == 5


def test_missing_credentials_raise_and_the_next_call_works(emulate, monkeypatch):
    stage = AnalyzeStage(Captioning, settings=SETTINGS)
    with pytest.raises(ConfigurationError, match="CLOUDINARY_URL"):
        stage(URLS)
    with emulate():
        assert all(isinstance(outcome, Answered) for outcome in stage(URLS))


def test_only_shared_ledgers_know_their_workers(tmp_path):
    with pytest.raises(ConfigurationError, match="SQLiteLedger"):
        worker_stats(SQLiteLedger(tmp_path / "a"))


def test_a_ledger_that_cannot_be_opened_raises(emulate):
    with emulate() as emulator:
        ledger = RedisLedger("redis://127.0.0.1:1/0", patience=0.1)
        with pytest.raises(LedgerError):
            AnalyzeStage(Captioning, ledger=ledger)(URLS)
        assert emulator.counts.total_received == 0


def test_a_ledger_of_one_file_serves_one_process(emulate, tmp_path):
    with emulate() as emulator:
        stage = AnalyzeStage(Captioning, ledger=SQLiteLedger(tmp_path / "run.ledger"))
        for _ in range(2):
            assert all(isinstance(outcome, Answered) for outcome in stage(URLS))
        assert emulator.counts.total_received == 40
        with pytest.raises(TypeError):
            pickle.dumps(stage)


def test_it_opens_again_after_it_was_closed(emulate):
    with emulate():
        stage = AnalyzeStage(Captioning, settings=SETTINGS)
        stage(URLS[:2])
        close_sessions()
        close_sessions()
        assert worker_stats() == []
        assert len(stage(URLS[:2])) == 2


def test_closing_stops_what_is_in_flight(emulate):
    with emulate(latency=0.02) as emulator:
        stage = AnalyzeStage(Captioning, settings=Settings(permits=2))
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(stage, URLS * 10)
            while emulator.counts.total_received < 10:
                time.sleep(0.005)
            close_sessions()
            statuses = outcome_columns(running.result(50))["status"]
        assert {"answered", "stopped"} <= set(statuses)


def call_a_stage(url):
    AnalyzeStage(Captioning)([url])
    return Captioning(url)


def test_a_stage_inside_a_stage_is_an_error_and_no_hang(emulate):
    with emulate():
        (outcome,) = AnalyzeStage(call_a_stage)(URLS[:1])
        assert isinstance(outcome.error, RuntimeError)


# pickling


def test_it_pickles_without_secrets(build_ledger, shared_redis):
    url = shared_redis.url.replace("//", "//:hunter2@")
    stage = AnalyzeStage(
        Captioning,
        settings=SETTINGS,
        ledger=RedisLedger(url),
        notifications=RedisNotifications(url),
        notification_url="https://example.com/hook",
        mode="task",
    )
    content = pickle.dumps(stage)
    assert b"hunter2" not in content
    again = pickle.loads(content)
    assert (again.settings, again.mode, again.to_request) == (SETTINGS, "task", Captioning)
    assert again._identify() == pickle.loads(content)._identify()
    assert again._identify() == pickle.loads(pickle.dumps(again))._identify()


def test_credentials_pickle_only_on_demand():
    credentials = Credentials("demo", "key", "secret-8f3a")
    stage = AnalyzeStage(Captioning, credentials=credentials)
    assert "secret-8f3a" not in repr(stage)
    with pytest.raises(TypeError, match="pickle_credentials"):
        pickle.dumps(stage)
    stage = AnalyzeStage(Captioning, credentials=credentials, pickle_credentials=True)
    assert pickle.loads(pickle.dumps(stage)).credentials == credentials


def test_invalid_arguments_are_refused():
    with pytest.raises(ConfigurationError, match="to_request"):
        AnalyzeStage(URLS)
    with pytest.raises(ConfigurationError, match="RedisNotifications"):
        AnalyzeStage(Captioning, notifications=asyncio.Queue())


# tables


@pytest.mark.slow
def test_outcomes_become_columns_of_arrow_and_pandas(emulate):
    arrow, pandas = pytest.importorskip("pyarrow"), pytest.importorskip("pandas")
    with emulate():
        outcomes = AnalyzeStage(fail_for_one)(URLS)
    columns = outcome_columns(outcomes)
    assert list(columns) == list(COLUMNS)
    table = arrow.table(columns, schema=room.SCHEMA)
    assert table.num_rows == 40
    assert table["status"].to_pylist().count("answered") == 39
    frame = pandas.DataFrame(columns).astype(room.META.dtypes)
    assert (frame.dtypes == room.META.dtypes).all()
    assert frame["error_type"].dropna().tolist() == ["KeyError"]
    assert table["caption"].null_count == 1


def test_a_quota_error_counts_as_stopped():
    error = QuotaExceededError("no", status=429)
    assert outcome_columns([Failed(item=1, index=0, error=error)])["status"] == ["stopped"]
    restored = Failed(item=1, index=0, error=error, restored=True)
    assert outcome_columns([restored])["status"] == ["failed"]


# processes


def count_answered(stage, items):
    return sum(isinstance(outcome, Answered) for outcome in stage(items)), os.getpid()


def set_url(url):
    """Name the emulator in a process whose environment may be that of an earlier test."""
    os.environ["CLOUDINARY_URL"] = url


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    "method",
    [
        "fork",
        pytest.param("spawn", marks=pytest.mark.slow),
        pytest.param("forkserver", marks=pytest.mark.slow),
    ],
)
def test_processes_of_a_pool_share_the_work_and_end_cleanly(emulate, build_ledger, method):
    with emulate() as emulator:
        stage = AnalyzeStage(Captioning, settings=SETTINGS, ledger=build_ledger())
        count_answered(stage, URLS[:3])  # so that a fork inherits a running session
        context = multiprocessing.get_context(method)
        with concurrent.futures.ProcessPoolExecutor(
            2, mp_context=context, initializer=set_url, initargs=(emulator.cloudinary_url,)
        ) as pool:
            jobs = [pool.submit(count_answered, stage, URLS) for _ in range(4)]
            results = [job.result(100) for job in jobs]
        assert {answered for answered, _ in results} == {40}
        assert os.getpid() not in {pid for _, pid in results}
        assert emulator.counts.total_received == 40
        assert count_answered(stage, URLS[:3]) == (3, os.getpid())
        # workers that ended normally left no lease; this process still has one
        assert [shown["pid"] for shown in worker_stats(build_ledger())] == [os.getpid()]


SCRIPT = """
import sys, threading
from cloudinary_analyze import Captioning
from cloudinary_analyze.stage import AnalyzeStage
from cloudinary_analyze.ledger.redis import RedisLedger
stage = AnalyzeStage(Captioning, ledger=RedisLedger(sys.argv[1], namespace=sys.argv[2]))
print(len(stage(["https://example.com/1.jpg"])))
"""


@pytest.mark.slow
def test_a_program_that_ends_closes_its_sessions(emulate, build_ledger):
    ledger = build_ledger()
    with emulate():
        command = [sys.executable, "-W", "error", "-c", SCRIPT]
        done = subprocess.run(
            [*command, ledger.location.url, ledger.namespace],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=50,
        )
    assert (done.stdout, done.stderr, done.returncode) == ("1\n", "", 0)
    assert worker_stats(ledger) == []
