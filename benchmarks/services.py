"""Services that limit their clients, and the scenarios of the benchmark.

A service decides on a request when it arrives. Times are seconds since the first request.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from http import HTTPStatus
from typing import Final

import attrs

OK: Final = HTTPStatus.OK.value
THROTTLED: Final = HTTPStatus.TOO_MANY_REQUESTS.value
FAILED: Final = HTTPStatus.INTERNAL_SERVER_ERROR.value
REFUSED: Final = 0  # no connection


class Service:
    """Throttles a share of the requests at random. Only the clients limit the rate.

    Attributes:
        rate: Requests per second that the clients can use.
        share: Of the requests that are throttled at random.
        chance: Returns a random number from 0 to 1.
    """

    def __init__(self, rate: float, share: float = 0.0) -> None:
        self.rate, self.share = rate, share
        self.chance = random.Random(1).random

    def allow(self, begin: float, end: float) -> float:
        """Return how many requests the service accepts in a time, apart from bursts."""
        return self.rate * (end - begin)

    def answer(self, now: float) -> int:
        """Return the status of a request that arrives."""
        return THROTTLED if self.chance() < self.share else OK

    def end(self) -> None:
        """Record the response to an accepted request."""


class Bucket(Service):
    """A rate with a burst. The rate may change: pairs of a time and the rate from then on."""

    def __init__(self, rate: float, burst: float, *changes: tuple[float, float]) -> None:
        super().__init__(rate)
        self.rates = [(0.0, rate), *changes]
        self.burst, self.tokens, self.last = burst, burst, 0.0

    def allow(self, begin: float, end: float) -> float:
        """See `Service`."""
        ends = [at for at, _ in self.rates[1:]] + [math.inf]
        return sum(
            rate * max(0.0, min(end, until) - max(begin, at))
            for (at, rate), until in zip(self.rates, ends, strict=True)
        )

    def answer(self, now: float) -> int:
        """See `Service`."""
        self.tokens = min(self.burst, self.tokens + self.allow(self.last, now))
        self.last = now
        if self.tokens < 1:
            return THROTTLED
        self.tokens -= 1
        return OK


class AtOnce(Service):
    """A limit of concurrent requests, of a mean latency."""

    def __init__(self, most: int, latency: float) -> None:
        super().__init__(most / latency)
        self.most, self.in_use = most, 0

    def answer(self, now: float) -> int:
        """See `Service`."""
        if self.in_use >= self.most:
            return THROTTLED
        self.in_use += 1
        return OK

    def end(self) -> None:
        """See `Service`."""
        self.in_use -= 1


class Window(Service):
    """A number of requests per window of seconds."""

    def __init__(self, most: int, seconds: float) -> None:
        super().__init__(most / seconds)
        self.most, self.seconds, self.used, self.window = most, seconds, 0, -1

    def answer(self, now: float) -> int:
        """See `Service`."""
        window = int(now / self.seconds)
        if window != self.window:
            self.window, self.used = window, 0
        self.used += 1
        return OK if self.used <= self.most else THROTTLED


class Outage(Service):
    """No limit, but for some time every request gets one status, or no connection."""

    def __init__(self, rate: float, begin: float, end: float, status: int) -> None:
        super().__init__(rate)
        self.begins, self.ends, self.status = begin, end, status

    def allow(self, begin: float, end: float) -> float:
        """See `Service`."""
        down = max(0.0, min(end, self.ends) - max(begin, self.begins))
        return self.rate * (end - begin - down)

    def answer(self, now: float) -> int:
        """See `Service`."""
        return self.status if self.begins <= now < self.ends else OK


@attrs.frozen(kw_only=True)
class Scenario:
    """A scenario.

    Attributes:
        title: What the service does.
        build: Builds the service.
        latency: Seconds until an accepted request is answered; the median if `sigma` is not 0.
        sigma: Of the lognormal latency.
        retry_after: The ``Retry-After`` of a 429 in seconds; 0: none.
        clients: Clients at once, in a process each.
        seconds: How long it lasts.
        quick: How long with ``--quick``; 0: it is left out.
        required: The least share of what the service allows, from second `early`.
        goal: The share to aim at.
        throttled: The most throttled responses per success, from second `late`.
        early: See `required`.
        late: See `throttled`.
        peers: Whether other libraries take part.
    """

    title: str
    build: Callable[[], Service]
    latency: float = 0.1
    sigma: float = 0.0
    retry_after: int = 0
    clients: int = 1
    seconds: float = 60.0
    quick: float = 0.0
    required: float
    goal: float | None = None
    throttled: float = 0.03
    early: float = 1.0
    late: float = 10.0
    peers: bool = False


PERMITS: Final = 64
LATENCY: Final = 0.2
MOST: Final = PERMITS / LATENCY


def _limit_rate(
    rate: float, burst: float, required: float, goal: float | None = 0.95, **more: object
) -> Scenario:
    asks = ", Retry-After: 1" if more.get("retry_after") else ""
    title = str(more.pop("title", f"{rate:g}/s, burst {burst:g}{asks}"))
    return Scenario(
        title=title,
        build=lambda: Bucket(rate, burst),
        required=required,
        goal=goal,
        **more,  # type: ignore[arg-type]
    )


def _limit_concurrency(required: float, sigma: float = 0.0, **more: object) -> Scenario:
    mean = LATENCY * math.exp(sigma * sigma / 2)
    return Scenario(
        title="16 at once" + (f", lognormal latency (σ {sigma:g})" if sigma else ""),
        build=lambda: AtOnce(16, mean),
        latency=LATENCY,
        sigma=sigma,
        required=required,
        goal=0.90,
        **more,  # type: ignore[arg-type]
    )


def _limit_window(most: int, seconds: float, required: float, windows: int) -> Scenario:
    return Scenario(
        title=f"{most} per {seconds:g} s",
        build=lambda: Window(most, seconds),
        seconds=windows * seconds,
        required=required,
        goal=0.90,
        throttled=0.15,
        early=seconds,
        late=seconds,
    )


def _throttle_at_random(share: float, required: float, goal: float, **more: object) -> Scenario:
    asks = ", Retry-After: 1" if more.get("retry_after") else ""
    return Scenario(
        title=f"{share:.0%} of the responses are 429{asks}",
        build=lambda: Service(MOST, share),
        latency=LATENCY,
        required=required,
        goal=goal,
        throttled=share / (1 - share) + 0.03,  # the noise, and the throttles that it causes
        **more,  # type: ignore[arg-type]
    )


def _fail(seconds: float, status: int, required: float, **more: object) -> Scenario:
    what = {THROTTLED: "429s", FAILED: "500s", REFUSED: "refused connections"}[status]
    return Scenario(
        title=f"{seconds:g} s of {what}",
        build=lambda: Outage(MOST, 5, 5 + seconds, status),
        latency=LATENCY,
        seconds=max(60.0, seconds + 45),
        required=required,
        **more,  # type: ignore[arg-type]
    )


SCENARIOS: Final[dict[str, Scenario]] = {
    # a control: a busy machine reaches less here, too
    "unlimited": Scenario(
        title="no limit but 64 permits", build=lambda: Service(MOST), latency=LATENCY, required=0.0
    ),
    "rate-10": _limit_rate(10, 5, 0.94),
    "rate-10-retry-after": _limit_rate(10, 5, 0.92, retry_after=1),
    "rate-50": _limit_rate(50, 10, 0.96, quick=25, peers=True),
    "rate-50-retry-after": _limit_rate(50, 10, 0.93, retry_after=1, peers=True),
    "rate-50-lognormal": _limit_rate(
        50, 10, 0.93, sigma=0.8, title="50/s, burst 10, lognormal latency (σ 0.8)"
    ),
    "rate-200": _limit_rate(200, 20, 0.92),
    "rate-200-retry-after": _limit_rate(200, 20, 0.88, retry_after=1),
    "rate-10-slow": _limit_rate(
        10, 5, 0.81, goal=None, latency=5, seconds=120, title="10/s, burst 5, 5 s of latency"
    ),
    "noise-1": _throttle_at_random(0.01, 0.92, 0.95, quick=15, peers=True),
    "noise-1-retry-after": _throttle_at_random(0.01, 0.82, 0.95, retry_after=1),
    "noise-5": _throttle_at_random(0.05, 0.33, 0.80),
    "concurrency-16": _limit_concurrency(0.89, quick=20, peers=True),
    "concurrency-16-lognormal": _limit_concurrency(0.76, sigma=0.8),
    "window-10": _limit_window(100, 10, 0.93, windows=8),
    "window-60": _limit_window(1000, 60, 0.97, windows=4),
    "throttling-12": _fail(12, THROTTLED, 0.73),
    "failing-12": _fail(12, FAILED, 0.83, quick=30),
    "changing-rate": Scenario(
        title="50/s, 10/s from second 20, 50/s from second 40",
        build=lambda: Bucket(50, 10, (20, 10), (40, 50)),
        required=0.79,
        peers=True,
    ),
    "two-clients": _limit_rate(50, 10, 0.97, clients=2, title="50/s, burst 10, two clients"),
    # attempts and recovery are limited instead of goodput
    "failing-45": _fail(45, FAILED, 0.0, peers=True),
    "refusing-45": _fail(45, REFUSED, 0.0),
}
# the scenarios in the picture
DRAWN: Final = ("rate-50", "noise-1", "concurrency-16", "changing-rate", "failing-45")
