"""Which failures are retried and when: never before the server allows, never after the cap."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudinary_analyze import AnalyzeError, AttemptTimeoutError, Settings, TransportError
from cloudinary_analyze._policy import (
    build_waits,
    compute_wait,
    decide_wait,
    is_retriable,
    is_throttle,
    may_be_charged,
)
from cloudinary_analyze._wire.protocol import read_error
from cloudinary_analyze.errors import (
    LedgerError,
    QuotaExceededError,
    ResponseDecodeError,
    ResultNotDeliveredError,
    TaskFailedError,
)

SETTINGS = Settings()
CHANCE = st.floats(0, 1)
SECONDS = st.floats(0.001, 1000)


def error_of(status: int, *, code: str = "", retry_after: str | None = None) -> AnalyzeError:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    body = b'{"error":{"code":"%s"}}' % code.encode()
    return read_error(status, headers, body, now=0, model="captioning")


@pytest.mark.parametrize(
    ("status", "retried", "ambiguous"),
    [
        (201, False, True),
        (204, False, True),
        (301, False, False),
        (302, False, False),
        (304, False, False),
        (307, False, False),
        (400, False, False),
        (401, False, False),
        (402, False, False),
        (403, False, False),
        (404, False, False),
        (405, False, False),
        (408, True, False),
        (409, False, False),
        (410, False, False),
        (413, False, False),
        (415, False, False),
        (418, False, False),
        (420, True, False),
        (422, False, False),
        (423, True, False),
        (429, True, False),
        (451, False, False),
        (500, True, True),
        (501, True, False),
        (502, True, True),
        (503, True, False),
        (504, True, True),
        (520, True, False),
        (599, True, False),
    ],
)
def test_each_status_has_its_retry_and_charge_rules(
    status: int, retried: bool, ambiguous: bool
) -> None:
    error = error_of(status)
    assert is_retriable(error, retry_ambiguous=True) is retried
    assert is_retriable(error, retry_ambiguous=False) is (retried and not ambiguous)
    assert error.ambiguous is ambiguous


@pytest.mark.parametrize(
    ("error", "retried"),
    [
        (TransportError("no connection"), True),
        (TransportError("broke", ambiguous=True), True),
        (TransportError("certificate", permanent=True), False),
        (AttemptTimeoutError("late", ambiguous=True), True),
        (error_of(429, code="MA_00008"), False),
        (ResponseDecodeError("paid and unreadable"), False),
    ],
)
def test_each_failure_is_retried_or_final(error: AnalyzeError, retried: bool) -> None:
    assert is_retriable(error, retry_ambiguous=True) is retried
    if error.ambiguous:
        assert not is_retriable(error, retry_ambiguous=False)


def test_only_a_charged_call_is_ambiguous() -> None:
    assert read_error(500, {}, b"", now=0, model="coco").ambiguous
    assert not read_error(500, {}, b"", now=0, model=None).ambiguous


@pytest.mark.parametrize(
    ("error", "throttle"),
    [
        (error_of(429), True),
        (error_of(420), True),
        (error_of(503, retry_after="1"), True),
        (error_of(503), False),
        (error_of(503, retry_after="nonsense"), False),
        (error_of(500, retry_after="1"), False),
        (error_of(408, retry_after="1"), False),
        (error_of(429, code="MA_00008"), False),
        (TransportError("broke"), False),
    ],
)
def test_only_throttling_errors_slow_all_calls_down(error: AnalyzeError, throttle: bool) -> None:
    assert is_throttle(error) is throttle


def test_backoff_doubles_up_to_the_cap() -> None:
    assert list(islice(build_waits(SETTINGS), 9)) == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert max(islice(build_waits(Settings(attempts=5000)), 5000)) == 30


@given(first=SECONDS, factor=st.floats(1, 100))
def test_backoff_never_exceeds_the_cap_or_shrinks(first: float, factor: float) -> None:
    settings = Settings(backoff_first=first, backoff_max=first * factor)
    waits = list(islice(build_waits(settings), 50))
    assert waits[0] == first
    assert waits == sorted(waits)
    assert waits[-1] <= settings.backoff_max


@given(own=SECONDS, chance=CHANCE)
def test_jitter_shortens_backoff_by_half_at_most(own: float, chance: float) -> None:
    assert own / 2 <= compute_wait(own, None, chance=chance) <= own
    assert compute_wait(own, None, chance=1) == own / 2


@given(own=SECONDS, asked=SECONDS, chance=CHANCE)
def test_a_wait_is_never_below_retry_after(own: float, asked: float, chance: float) -> None:
    wait = compute_wait(own, asked, chance=chance)
    assert wait >= asked
    assert wait <= max(own, asked + max(0.25, 0.1 * asked))


@given(asked=SECONDS, chances=st.lists(CHANCE, min_size=2, max_size=2, unique=True))
def test_throttled_calls_do_not_retry_together(asked: float, chances: list[float]) -> None:
    low, high = sorted(chances)
    early = compute_wait(0.001, asked, chance=low)
    late = compute_wait(0.001, asked, chance=high)
    assert late >= early
    if high - low > 0.01:
        assert late > early


@given(
    status=st.sampled_from([408, 420, 423, 429, 500, 502, 503, 504]),
    asked=st.none() | st.floats(0.01, 500),
    own=st.floats(0.01, 30),
    chance=CHANCE,
    cap=st.floats(0.1, 300),
)
def test_a_decision_respects_retry_after_and_both_caps(
    *, status: int, asked: float | None, own: float, chance: float, cap: float
) -> None:
    settings = Settings(max_server_wait=cap)
    error = error_of(status, retry_after=None if asked is None else repr(asked))
    wait = decide_wait(error, settings, own_wait=own, chance=chance)
    if asked is not None and asked > cap:
        assert wait is None
    elif asked is None:
        assert wait is not None
        assert own / 2 <= wait <= own
    else:
        assert wait is not None
        assert asked <= wait <= cap


def test_a_quota_error_is_final_even_with_retry_after() -> None:
    error = error_of(429, code="MA_00008", retry_after="1")
    assert isinstance(error, QuotaExceededError)
    assert decide_wait(error, SETTINGS, own_wait=1, chance=0) is None


@pytest.mark.parametrize(
    ("error", "charged"),
    [
        (TaskFailedError("failed", task_id="t"), True),
        (ResultNotDeliveredError("lost", task_id="t"), True),
        (LedgerError("full"), True),  # after the response
        (TransportError("broke", ambiguous=True), True),
        (TransportError("no connection"), False),
        (error_of(400), False),
        (QuotaExceededError("used up", task_id="t"), False),
        (ValueError("the caller's"), False),
    ],
    ids=str,
)
def test_each_failure_reports_a_possible_charge(error: Exception, charged: bool) -> None:
    assert may_be_charged(error) is charged
