"""The pytest fixtures that applications opt in to, in separate test runs."""

from __future__ import annotations

import pytest
from examples import read_examples

from cloudinary_analyze import testing

pytest_plugins = ["pytester"]

APPLICATION, APPLICATION_TEST, *_ = read_examples(testing.__doc__ or "")

SYNCHRONOUS_TEST = """
import asyncio

from cloudinary_analyze import AnalyzeSession, Captioning


async def caption(url):
    async with AnalyzeSession() as session:
        return (await session.analyze(Captioning(url))).analysis.caption


def test_captions(cloudinary_emulator):
    assert asyncio.run(caption(cloudinary_emulator.sample_url(1)))
    assert cloudinary_emulator.counts.total_done == 1


def test_time(manual_clock):
    asyncio.run(manual_clock.advance(3600))
    assert manual_clock.monotonic() == 3600
"""

IMPORTED_LATE_TEST = """
import pytest
from fastapi.testclient import TestClient


@pytest.fixture
def client(cloudinary_emulator):
    from late import app  # reads the credentials while it is imported, once for all tests

    with TestClient(app) as client:
        yield client


@pytest.mark.parametrize("number", range(3))
def test_each(client, cloudinary_emulator, number):
    assert client.get("/captions", params={"uri": f"https://x.test/{number}.jpg"}).json()
    assert [str(each.source) for each in cloudinary_emulator.requests] == [
        f"https://x.test/{number}.jpg"
    ]
"""

ASYNC_TEST = """
import pytest

from cloudinary_analyze import Coco, ServerError
from cloudinary_analyze.emulator import FaultPlan


async def test_each_retry_is_seen(analyze_session, cloudinary_emulator):
    cloudinary_emulator.respond(Coco, status=503, times=2)
    async with analyze_session as session:
        await session.analyze(Coco("https://x.test/a.jpg"))
    assert len(cloudinary_emulator.requests) == 3


async def test_faults_can_be_planned_while_it_runs(analyze_session, cloudinary_emulator):
    async with analyze_session as session:
        await session.analyze(Coco("https://x.test/a.jpg"))
        cloudinary_emulator.faults = FaultPlan(error_503=1.0, fault_times=1000)
        with pytest.raises(ServerError):
            await session.analyze(Coco("https://x.test/a.jpg"))
        (outcome,) = await session.analyze_all([Coco("https://x.test/a.jpg")])
        assert isinstance(outcome.error, ServerError)
"""


LATE = (
    APPLICATION.replace("import AnalyzeSession,", "import AnalyzeSession, Credentials,")
    .replace("app = FastAPI(", "credentials = Credentials.from_environment()\napp = FastAPI(")
    .replace("AnalyzeSession() as", "AnalyzeSession(credentials) as")
)


@pytest.mark.slow
def test_tests_of_applications_run_as_documented(pytester: pytest.Pytester) -> None:
    """The last test fails on purpose. Its message names the actual request."""
    pytester.makeconftest('pytest_plugins = ["cloudinary_analyze.testing"]')
    pytester.makeini("[pytest]\nasyncio_mode=auto\nasyncio_default_fixture_loop_scope=function\n")
    pytester.makepyfile(
        app=APPLICATION,
        test_app=APPLICATION_TEST,
        test_async=ASYNC_TEST,
        late=LATE,
        test_late=IMPORTED_LATE_TEST,
        test_synchronous=SYNCHRONOUS_TEST,
        test_wrong=APPLICATION_TEST.replace("== [BEE]", "== []"),
    )
    warnings = ["-W", "error", "-W", "ignore:Using `httpx`"]
    done = pytester.runpytest_subprocess(*warnings, "-p", "no:cacheprovider")
    done.assert_outcomes(passed=8, failed=1)
    done.stdout.fnmatch_lines(["*Captioning(source=Uri(uri='https://images.example/bee.jpg'))*"])


def test_the_documented_test_has_ten_lines() -> None:
    function = APPLICATION_TEST[APPLICATION_TEST.index("def test_") :]
    assert len(function.splitlines()) <= 10
