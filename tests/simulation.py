"""A discrete-event simulation of clients with an endless backlog and a service that limits them.

The clients drive the real `Admission`; time is simulated, and the services are those of the
benchmark in real time. ``python tests/simulation.py [seeds]`` prints a table of all scenarios.
"""

from __future__ import annotations

import heapq
import math
import random
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloudinary_analyze._http.admission import Admission, Attempt

# at the end, so that an installed package has precedence over the one beside the tests
sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.services import (
    FAILED,
    OK,
    REFUSED,
    THROTTLED,
    AtOnce,
    Bucket,
    Outage,
    Service,
    Window,
)

# ---------------------------------------------------------------- the simulation


@dataclass
class Scenario:
    """The parameters of a simulation.

    Attributes:
        service: Makes the service.
        latency: Seconds until an accepted request is answered. It is the median if `sigma` is not 0.
        sigma: Standard deviation of the logarithm of the latency.
        rejection: Seconds until any other request is answered.
        seconds: The simulated duration.
    """

    service: Callable[[], Any]
    latency: float = 0.1
    sigma: float = 0.0
    rejection: float = 0.005
    retry_after: float = 0.0
    clients: int = 1
    permits: int = 64
    seconds: float = 60.0


@dataclass
class Item:
    """Work that needs one accepted request."""

    throttles: int = 0
    failures: int = 0


@dataclass
class Simulation:
    """One run of a scenario.

    Attributes:
        requests: (time, status, number of the client).
    """

    scenario: Scenario
    seed: int
    now: float = 0.0
    requests: list[tuple[float, int, int]] = field(default_factory=list)
    most_throttles: int = 0
    ambiguous_retries: int = 0
    lost: int = 0

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        self.service = self.scenario.service()
        self.service.chance = self.chance.random
        self.events: list[tuple[float, int, Callable[..., None], Any]] = []
        self.order = 0
        self.clients = [Client(self, number) for number in range(self.scenario.clients)]

    def at(self, when: float, call: Callable[..., None], *arguments: Any) -> None:
        self.order += 1
        heapq.heappush(self.events, (when, self.order, call, arguments))

    def run(self) -> Simulation:
        for client in self.clients:
            self.at(0.001 * self.chance.random(), client.start_items)
        while self.events[0][0] <= self.scenario.seconds:
            self.now, _, call, arguments = heapq.heappop(self.events)
            call(*arguments)
        return self

    def arrive(self, client: Client, attempt: Attempt, item: Item) -> None:
        status = self.service.answer(self.now)
        self.requests.append((self.now, status, client.number))
        took = self.scenario.rejection
        if status == OK:
            took = self.scenario.latency * math.exp(self.chance.gauss(0, self.scenario.sigma))
        self.at(self.now + took, client.take_answer, attempt, item, status)

    def count(self, status: int, begin: float = 0.0, client: int | None = None) -> int:
        return sum(
            at >= begin and status == seen and client in (None, number)
            for at, seen, number in self.requests
        )

    def goodput(self, begin: float) -> float:
        """Return the successes as a share of the number that the service allows."""
        return self.count(OK, begin) / self.service.allow(begin, self.scenario.seconds)

    def throttled(self, begin: float) -> float:
        """Return the throttled responses per success."""
        return self.count(THROTTLED, begin) / max(1, self.count(OK, begin))

    @property
    def fairness(self) -> float:
        """Return the successes of the slowest client per success of the fastest."""
        each = [self.count(OK, 10, client.number) for client in self.clients]
        return min(each) / max(each)

    @property
    def bad_in_outage(self) -> int:
        return sum(status == self.service.status for _, status, _ in self.requests)

    @property
    def recovery(self) -> float:
        """Return the seconds from the end of the outage to the first success."""
        return min(at for at, _, _ in self.requests if at >= self.service.ends) - self.service.ends


class Client:
    """A session with an endless `map`: a window of twice the permits, and 6 attempts per item."""

    def __init__(self, simulation: Simulation, number: int) -> None:
        self.simulation, self.number = simulation, number
        permits = simulation.scenario.permits
        chance = random.Random(simulation.seed * 7919 + number).random
        self.admission = Admission(permits, chance=chance)
        self.window = 2 * permits
        self.head: deque[Item] = deque()
        self.tail: deque[Item] = deque()
        self.out = 0
        self.timer_at = math.inf

    def start_items(self) -> None:
        simulation, now = self.simulation, self.simulation.now
        if self.timer_at <= now:
            self.timer_at = math.inf
        while self.head or self.tail or self.out < self.window:
            when = self.admission.find_start(now)
            if when > now:
                if when < self.timer_at:
                    self.timer_at = when
                    simulation.at(when, self.start_items)
                return
            attempt = self.admission.start(now)
            simulation.at(now + 0.001, simulation.arrive, self, attempt, self.take_item())

    def take_item(self) -> Item:
        if self.head:
            return self.head.popleft()
        if self.out < self.window:
            self.out += 1
            return Item()
        return self.tail.popleft()

    def take_answer(self, attempt: Attempt, item: Item, status: int) -> None:
        simulation, admission, probe = self.simulation, self.admission, attempt.probe
        now, retry_after = simulation.now, simulation.scenario.retry_after
        if status == OK:
            simulation.service.end()
            admission.succeed(attempt, now)
            self.out -= 1
        elif status == THROTTLED:
            admission.throttle(attempt, now, retry_after)
            item.throttles += not probe
            simulation.most_throttles = max(simulation.most_throttles, item.throttles)
            self.retry_later(
                item, self.head, max(retry_after, self.back_off(item.throttles, probe))
            )
        else:
            admission.fail(attempt, now)
            ambiguous = status == FAILED
            simulation.ambiguous_retries += ambiguous
            item.failures += ambiguous or not probe
            if item.failures < 6:
                line = self.tail if ambiguous else self.head
                self.retry_later(item, line, self.back_off(item.failures, probe and not ambiguous))
            else:
                simulation.lost += 1
                self.out -= 1
        admission.release(attempt)
        self.start_items()

    def back_off(self, failures: int, free: bool) -> float:
        wait = 0.5 * 2 ** max(0, failures - 1) * (1 - self.simulation.chance.random() / 2)
        return 0.0 if free else min(30.0, wait)

    def retry_later(self, item: Item, line: deque[Item], seconds: float) -> None:
        self.simulation.at(self.simulation.now + seconds, self.rejoin, item, line)

    def rejoin(self, item: Item, line: deque[Item]) -> None:
        line.append(item)
        self.start_items()


# ---------------------------------------------------------------- the scenarios


def jittered(sigma: float) -> Scenario:
    mean = 0.2 * math.exp(sigma * sigma / 2) + 0.001
    return Scenario(lambda: AtOnce(16, mean), latency=0.2, sigma=sigma)


def noise(share: float, **more: Any) -> Scenario:
    # a rejection takes a permit for 6 ms; the service itself allows what 64 permits can use
    rate = 64 / ((0.2 + 0.001) + share / (1 - share) * 0.006)
    return Scenario(lambda: Service(rate, share), latency=0.2, **more)


def outage(seconds: float, status: int) -> Scenario:
    return Scenario(
        lambda: Outage(64 / 0.201, 5, 5 + seconds, status),
        latency=0.2,
        seconds=max(60.0, seconds + 45),
    )


SCENARIOS = {
    "10/s": Scenario(lambda: Bucket(10, 5)),
    "10/s, Retry-After": Scenario(lambda: Bucket(10, 5), retry_after=1),
    "50/s": Scenario(lambda: Bucket(50, 10)),
    "50/s, Retry-After": Scenario(lambda: Bucket(50, 10), retry_after=1),
    "50/s, lognormal latency": Scenario(lambda: Bucket(50, 10), sigma=0.8),
    "200/s": Scenario(lambda: Bucket(200, 20)),
    "200/s, Retry-After": Scenario(lambda: Bucket(200, 20), retry_after=1),
    "10/s, 5 s latency": Scenario(lambda: Bucket(10, 5), latency=5, seconds=180),
    "10/s, slow rejections": Scenario(lambda: Bucket(10, 5), rejection=1.0, seconds=120),
    "1 % noise": noise(0.01),
    "1 % noise, Retry-After": noise(0.01, retry_after=1),
    "5 % noise": noise(0.05),
    "10 % noise": noise(0.10),
    "16 at once": jittered(0.0),
    "16 at once, sigma 0.35": jittered(0.35),
    "16 at once, sigma 0.8": jittered(0.8),
    "100 per 10 s": Scenario(lambda: Window(100, 10), seconds=100),
    "1000 per 60 s": Scenario(lambda: Window(1000, 60), seconds=300),
    "12 s of 429": outage(12, THROTTLED),
    "12 s of 500": outage(12, FAILED),
    "45 s of 500": outage(45, FAILED),
    "45 s of refused connections": outage(45, REFUSED),
    "60 s of 429": outage(60, THROTTLED),
    "60 s of 500": outage(60, FAILED),
    "50/s, 10/s, 50/s": Scenario(lambda: Bucket(50, 10, (20, 10), (40, 50))),
    "two clients on 50/s": Scenario(lambda: Bucket(50, 10), clients=2, seconds=120),
    "two clients, 16 at once": Scenario(
        lambda: AtOnce(16, 0.201), latency=0.2, clients=2, seconds=120
    ),
}


@dataclass
class Figures:
    """Mean figures over several seeds."""

    goodput: float
    throttled: float
    late_goodput: float
    late_throttled: float
    runs: list[Simulation]


def measure(name: str, seeds: range) -> Figures:
    """Return the figures of a scenario. Late figures exclude the first 10 s, or the first window."""
    runs = [Simulation(SCENARIOS[name], seed).run() for seed in seeds]
    window = getattr(runs[0].service, "seconds", 0.0)
    early, late = window or 1.0, window or 10.0

    def mean(figure: Callable[[Simulation], float]) -> float:
        return sum(map(figure, runs)) / len(runs)

    return Figures(
        mean(lambda run: run.goodput(early)),
        mean(lambda run: run.throttled(early)),
        mean(lambda run: run.goodput(late)),
        mean(lambda run: run.throttled(late)),
        runs,
    )


def describe(figures: Figures) -> str:
    """Return the figures of an outage or of fairness, for scenarios that have them."""
    runs = figures.runs
    if isinstance(runs[0].service, Outage):
        return (
            f"bad {max(run.bad_in_outage for run in runs)}, lost {sum(run.lost for run in runs)}, "
            f"ambiguous retries {max(run.ambiguous_retries for run in runs)}, probes "
            f"{max(run.clients[0].admission.probes for run in runs)}, recovery "
            f"{max(run.recovery for run in runs):.1f} s"
        )
    if len(runs[0].clients) > 1:
        fairness = [run.fairness for run in runs]
        return f"fairness {sum(fairness) / len(fairness):.2f}, least {min(fairness):.2f}"
    return ""


def print_table(seeds: range) -> None:
    """Print the figures of all scenarios."""
    for name in SCENARIOS:
        figures = measure(name, seeds)
        print(
            f"{name:28} {figures.goodput:.2f} / {figures.throttled:.3f}"
            f"  after 10 s {figures.late_goodput:.2f} / {figures.late_throttled:.3f}"
            f"  most throttles of an item {max(run.most_throttles for run in figures.runs)}"
            f"  {describe(figures)}"
        )


if __name__ == "__main__":
    print_table(range(1001, 1001 + int(sys.argv[1] if len(sys.argv) > 1 else 8)))
