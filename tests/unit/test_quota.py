"""The lowest remainder is kept, and a used up feature is left alone until it may be renewed."""

from __future__ import annotations

import pickle
from datetime import UTC, datetime

import pytest

from cloudinary_analyze import Limit, QuotaExceededError
from cloudinary_analyze._http.quota import Quota
from cloudinary_analyze.testing import ManualClock

DECEMBER = datetime(2026, 12, 1, tzinfo=UTC)
JANUARY = datetime(2027, 1, 1, tzinfo=UTC)


def limit(remaining: int | None, of: int | None = 500, reset: datetime | None = None) -> Limit:
    return Limit("ai_vision", remaining=remaining, limit=of, reset_time=reset)


def test_the_lowest_remainder_counts_whatever_order_answers_come_in(clock: ManualClock) -> None:
    quota = Quota(clock)
    for remaining in (490, 480, 485, None, 481):
        quota.learn((limit(remaining),))
    assert quota.limits["ai_vision"].remaining == 480


@pytest.mark.parametrize("later", [limit(900, of=1000), limit(499, reset=JANUARY)])
def test_a_new_limit_or_reset_time_begins_anew(clock: ManualClock, later: Limit) -> None:
    quota = Quota(clock)
    quota.learn((limit(3),))
    quota.learn((later,))
    assert quota.limits["ai_vision"] == later


def test_features_are_counted_apart_and_the_view_is_read_only(clock: ManualClock) -> None:
    quota = Quota(clock)
    quota.learn((limit(3), Limit("object_detection", remaining=7)))
    view = quota.limits
    quota.learn((limit(2),))
    assert {name: known.remaining for name, known in view.items()} == {
        "ai_vision": 3,
        "object_detection": 7,
    }
    with pytest.raises(TypeError):
        view["x"] = limit(1)  # type: ignore[index]


def test_without_a_reset_time_one_call_in_five_minutes_probes(clock: ManualClock) -> None:
    quota = Quota(clock)
    error = QuotaExceededError("used up", feature="ai_vision", status=429, code="MA_00008")
    quota.trip("ai_vision", error)
    with pytest.raises(QuotaExceededError, match=r"Not sent.*tried again") as caught:
        quota.check("ai_vision")
    assert (caught.value.attempts, caught.value.feature, caught.value.code) == (
        0,
        "ai_vision",
        "MA_00008",
    )
    assert caught.value is not error
    pickle.loads(pickle.dumps(caught.value))
    quota.check("object_detection")
    clock.now = 299.9
    with pytest.raises(QuotaExceededError):
        quota.check("ai_vision")
    clock.now = 300.0
    assert quota.check("ai_vision"), "the probe"
    with pytest.raises(QuotaExceededError):
        quota.check("ai_vision")
    quota.reset("ai_vision")
    quota.check("ai_vision")


def test_a_failed_probe_starts_the_minutes_again(clock: ManualClock) -> None:
    quota = Quota(clock)
    error = QuotaExceededError("used up")
    quota.trip("ai_vision", error)
    clock.now = 300.0
    quota.check("ai_vision")
    quota.trip("ai_vision", error)
    clock.now = 599.0
    with pytest.raises(QuotaExceededError):
        quota.check("ai_vision")


def test_a_reset_time_is_waited_for_and_then_all_may_go(clock: ManualClock) -> None:
    quota = Quota(clock)
    quota.trip("ai_vision", QuotaExceededError("used up", reset_time=clock.wall() + 3600))
    clock.now = 3599.0
    with pytest.raises(QuotaExceededError, match="in 1 s the quota is renewed"):
        quota.check("ai_vision")
    clock.now = 3600.0
    quota.check("ai_vision")
    quota.check("ai_vision")
    assert not quota.breakers


def test_a_reset_time_that_is_past_bars_nobody(clock: ManualClock) -> None:
    quota = Quota(clock)
    quota.trip("ai_vision", QuotaExceededError("used up", reset_time=clock.wall() - 60))
    quota.check("ai_vision")
