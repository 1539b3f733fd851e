"""A run is killed twenty times without warning. It loses nothing and pays for nothing twice."""

import contextlib
import json
import random
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from ports import reserve_port

from cloudinary_analyze import Captioning
from cloudinary_analyze.ledger.file import ANSWERED, OPEN, SUBMITTED, connect_for_reading
from tests.chaos.kill_support import ITEMS, build_urls

KILLS = 20
ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def start(*arguments):
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.kill_support", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def read_received(emulator):
    emulator.stdin.write("\n")
    emulator.stdin.flush()
    return json.loads(emulator.stdout.readline())


def read_durable(path, sources):
    """Return the sources with an answer in the ledger, and those with a task."""
    found = {ANSWERED: set(), SUBMITTED: set()}
    if not path.exists():  # killed before it was created
        return found[ANSWERED], found[SUBMITTED]
    with closing(connect_for_reading(path)) as connection:
        query = "SELECT key, state FROM records WHERE state <> ?"
        for key, state in connection.execute(query, (OPEN,)):
            found[state].add(sources[key.hex()])
    return found[ANSWERED], found[SUBMITTED]


def wait_for_a_moment(log, chance, *, known):
    """Return at a random point of the run, sometimes right at its beginning.

    Outcomes of earlier runs come first and are not counted.
    """
    wanted = chance.choice([0, known + chance.randint(1, 800)])
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not wanted or (log.exists() and log.read_bytes().count(b"\n") >= wanted):
            break
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 0.2))


@pytest.mark.slow
@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("mode", ["call", "task"])
def test_a_run_killed_twenty_times_answers_each_item_once(tmp_path, mode):
    urls = build_urls()
    sources = {Captioning(url).key: url for url in urls}
    chance = random.Random(mode)
    path, port = tmp_path / "run.ledger", reserve_port()
    durable, paid, submitted, allowed = set(), {}, {}, 0
    with start("emulate") as emulator:
        cloudinary_url = emulator.stdout.readline().strip()
        for kill in range(KILLS):
            log = tmp_path / f"{kill}.log"
            with start("run", mode, cloudinary_url, path, log, port) as run:
                assert run.stdout.readline() == "begun\n"
                wait_for_a_moment(log, chance, known=len(durable))
                assert run.poll() is None, "the run ended before it could be killed"
                run.kill()
            at_kill, tasks, _ = read_received(emulator)
            earlier = durable
            durable, under_way = read_durable(path, sources)
            assert earlier <= durable, "a durable answer was lost"
            handed_over = {urls[int(line.split()[0])] for line in log.read_text().splitlines()}
            assert handed_over <= durable, "an outcome was yielded before it was durable"
            for source in durable - earlier:
                paid[source] = at_kill[source]
            for source in under_way:
                submitted.setdefault(source, tasks[source])
            allowed += len(at_kill.keys() - durable)
        assert len(durable) > 1000
        log = tmp_path / "last.log"
        with start("run", mode, cloudinary_url, path, log, port) as run:
            assert run.wait(timeout=400) == 0
        received, tasks, delivered = read_received(emulator)
    outcomes = [line.split() for line in log.read_text().splitlines()]
    assert sorted(int(index) for index, _ in outcomes) == list(range(ITEMS))
    assert {right for _, right in outcomes} == {"True"}
    assert {source: received[source] for source in paid} == paid, (
        "a durable answer was charged again"
    )
    assert {source: tasks[source] for source in submitted} == submitted, "a task was charged again"
    repeated = sum(received.values()) - ITEMS
    lost = sum(received[s] - tasks[s] for s in tasks) if mode == "task" else 0
    undelivered = sum(tasks[s] - delivered.get(s, 0) for s in tasks)
    print(
        f"{mode}: {repeated} calls repeated, of these {lost} for results that were lost; "
        f"{undelivered} never delivered; {len(submitted)} tasks; {len(durable)} answers before"
    )
    assert repeated <= allowed
