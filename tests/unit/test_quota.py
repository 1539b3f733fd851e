"""The newest figures are kept, and an exhausted feature is paused until it may be renewed."""

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


def learn(quota: Quota, *limits: Limit, number: int = 1, newest: int = 8) -> None:
    """Learn from an attempt that, by default, was in flight with seven others."""
    quota.meter.attempts = newest
    quota.learn(limits, number=number)


def test_the_lowest_remainder_in_flight_counts(clock: ManualClock) -> None:
    quota = Quota(clock, permits=8)
    for remaining in (490, 480, 485, None, 481):
        learn(quota, limit(remaining))
    assert quota.limits["ai_vision"].remaining == 480


def test_a_later_attempt_needs_a_smaller_rise(
    clock: ManualClock,
) -> None:
    quota = Quota(clock, permits=64)
    learn(quota, limit(300), number=1, newest=1)
    learn(quota, limit(315), number=2, newest=2)  # an outdated replica of the service answered
    assert quota.limits["ai_vision"].remaining == 300
    learn(quota, limit(499), number=3, newest=3)
    assert quota.limits["ai_vision"].remaining == 499
    learn(quota, limit(None), number=4, newest=4)
    assert quota.limits["ai_vision"].remaining == 499


def test_another_plan_replaces_the_figures(clock: ManualClock) -> None:
    quota = Quota(clock)
    learn(quota, limit(3))
    learn(quota, limit(900, of=1000))
    assert quota.limits["ai_vision"] == limit(900, of=1000)


@pytest.mark.parametrize("seen", [(3, 500, 499), (500, 3, 2), (3, 500, 2)])
def test_a_remainder_up_by_over_half_is_a_new_period(
    clock: ManualClock, seen: tuple[int, ...]
) -> None:
    """Attempts in flight together may show both periods. The next attempt settles which one counts."""
    quota = Quota(clock, permits=8)
    for remaining in seen:
        learn(quota, limit(remaining))
    assert quota.limits["ai_vision"].remaining == seen[-1]
    learn(quota, limit(450), number=9, newest=9)
    assert quota.limits["ai_vision"].remaining == 450


def test_a_small_quota_used_in_a_burst_is_not_renewed(clock: ManualClock) -> None:
    quota = Quota(clock, permits=10)
    for number, remaining in enumerate((0, 9, 4, 8, 7), start=1):
        learn(quota, limit(remaining, of=10), number=number, newest=10)
    assert quota.limits["ai_vision"].remaining == 0


def test_a_later_reset_time_starts_a_new_period(clock: ManualClock) -> None:
    quota = Quota(clock)
    learn(quota, limit(3, reset=DECEMBER))
    learn(quota, limit(499, reset=DECEMBER))
    assert quota.limits["ai_vision"].remaining == 3
    learn(quota, limit(499, reset=JANUARY))
    learn(quota, limit(2, reset=DECEMBER))
    assert quota.limits["ai_vision"] == limit(499, reset=JANUARY)


def test_features_have_separate_read_only_figures(clock: ManualClock) -> None:
    quota = Quota(clock)
    learn(quota, limit(3), Limit("object_detection", remaining=7))
    view = quota.limits
    learn(quota, limit(2))
    assert {name: known.remaining for name, known in view.items()} == {
        "ai_vision": 3,
        "object_detection": 7,
    }
    with pytest.raises(TypeError):
        view["x"] = limit(1)  # type: ignore[index]


def test_without_a_reset_time_a_call_probes_every_5_min(clock: ManualClock) -> None:
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


def test_a_failed_probe_restarts_the_five_minutes(clock: ManualClock) -> None:
    quota = Quota(clock)
    error = QuotaExceededError("used up")
    quota.trip("ai_vision", error)
    clock.now = 300.0
    quota.check("ai_vision")
    quota.trip("ai_vision", error)
    clock.now = 599.0
    with pytest.raises(QuotaExceededError):
        quota.check("ai_vision")


def test_after_the_reset_time_every_call_may_start(clock: ManualClock) -> None:
    quota = Quota(clock)
    quota.trip("ai_vision", QuotaExceededError("used up", reset_time=clock.wall() + 3600))
    clock.now = 3599.0
    with pytest.raises(QuotaExceededError, match="in 1 s the quota is renewed"):
        quota.check("ai_vision")
    clock.now = 3600.0
    quota.check("ai_vision")
    quota.check("ai_vision")
    assert not quota.breakers


def test_a_reset_time_in_the_past_stops_nothing(clock: ManualClock) -> None:
    quota = Quota(clock)
    quota.trip("ai_vision", QuotaExceededError("used up", reset_time=clock.wall() - 60))
    quota.check("ai_vision")


USED_UP = QuotaExceededError("used up", status=429, task_id="t1")


def fail(quota: Quota, *, since: float) -> None:
    """Let a task that was accepted at an instant fail because of its quota."""
    quota.take_failure("ai_vision", USED_UP, number=0, since=since)


def test_tasks_that_fail_for_hours_do_not_delay_the_probe(clock: ManualClock) -> None:
    quota = Quota(clock)
    for minute in range(5):
        clock.now = 60.0 * minute
        fail(quota, since=0)
        with pytest.raises(QuotaExceededError):
            quota.check("ai_vision")
    clock.now = 300.0
    assert quota.check("ai_vision")


def test_a_task_accepted_before_a_renewal_trips_nothing(clock: ManualClock) -> None:
    quota = Quota(clock)
    fail(quota, since=0)
    clock.now = 300.0
    assert quota.check("ai_vision")
    quota.reset("ai_vision")
    fail(quota, since=299)
    assert not quota.breakers
    fail(quota, since=301)
    assert quota.breakers


def test_only_the_result_of_a_task_shows_a_renewal(clock: ManualClock) -> None:
    """The service accepts tasks although their quota is exhausted."""
    quota = Quota(clock)
    fail(quota, since=0)
    quota.take_result("ai_vision", since=0)  # accepted before the quota ended
    clock.now = 300.0
    assert quota.check("ai_vision")
    quota.reset("ai_vision", accepted=True)
    with pytest.raises(QuotaExceededError) as caught:
        quota.check("ai_vision")
    assert caught.value.task_id is None
    quota.take_result("ai_vision", since=300.0)
    assert not quota.check("ai_vision")


def test_a_failure_of_an_unknown_feature_trips_nothing(clock: ManualClock) -> None:
    quota = Quota(clock)
    quota.take_failure("", USED_UP, number=0)
    assert not quota.breakers
