"""Fixtures for all tests: no outside credentials, no secrets in logs, fixed hypothesis seeds."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from blocking import forbid_blocking, take_blocked
from secret_search import SecretSearch

from cloudinary_analyze.testing import ManualClock

TESTS = Path(__file__).parent
collect_ignore = ["typing/consumer"]  # a separate project, which test_consumer.py runs

hypothesis.settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=150,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # which judges by wall time
)
hypothesis.settings.load_profile("suite")

SLOW_TIMEOUT = 600.0  # only a hang takes longer, also on a busy machine and under coverage


def pytest_configure() -> None:
    """Let the processes of tests handle signals that the parent of this process ignored.

    A shell ignores SIGINT for a script's background jobs, and ``nohup`` ignores SIGHUP. A child
    inherits an ignored signal, but not a handler.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("SIGHUP", "SIGQUIT"):
        number = getattr(signal, name, None)  # not on Windows
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give slow tests more time than `timeout` in pyproject.toml, unless they set their own."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT))


@pytest.fixture(autouse=True)
def _no_outside_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the developer's own account out of the tests."""
    import os

    for name in list(os.environ):
        if name.startswith("CLOUDINARY_"):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _no_secret_is_logged() -> Iterator[None]:
    """Search the DEBUG log of each test, including libraries, for secrets."""
    root = logging.getLogger()
    level, search = root.level, SecretSearch()
    root.setLevel(logging.DEBUG)
    root.addHandler(search)
    yield
    root.removeHandler(search)
    root.setLevel(level)
    assert not search.leaks


@pytest.fixture(scope="session", autouse=True)
def _blocking_calls_raise() -> Iterator[None]:
    with forbid_blocking():
        yield


@pytest.fixture(autouse=True)
def _nothing_blocks_the_loop() -> Iterator[None]:
    """Fail a test in which the package blocked a running event loop."""
    take_blocked()
    yield
    blocked = take_blocked()
    assert not blocked, blocked[0]


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes of a test run without coverage, which makes them several times slower."""
    monkeypatch.delenv("COVERAGE_PROCESS_START", raising=False)


@pytest.fixture
def clock() -> ManualClock:
    """Return a clock that does not move until the test advances it."""
    return ManualClock()


@pytest.fixture(scope="module")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Run a Redis server for all tests of a module, which use separate namespaces."""
    from notification_support import run_redis

    with run_redis(tmp_path_factory.mktemp("redis"), fsync="no") as server:
        yield server


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[Any]:
    """Run a Redis server for one test, which may kill it. It fsyncs every write."""
    from notification_support import run_redis

    with run_redis(tmp_path) as server:
        yield server


@pytest.fixture(scope="session")
def sample() -> Callable[[str], dict[str, Any]]:
    """Return a reader of the contract's payloads; each call gives a fresh object."""

    def read(name: str) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((TESTS / "samples" / f"{name}.json").read_bytes())
        return value

    return read


@pytest.fixture(scope="session")
def vectors() -> dict[str, Any]:
    """Return the signature vectors."""
    value: dict[str, Any] = json.loads((TESTS / "vectors.json").read_bytes())
    return value
