"""``python -m benchmarks throttling``: how much of what a service allows its clients use.

Each scenario runs in real time on the real client, 64 permits, against a local server. The rates
are the server's own record.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import fnmatch
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import attrs

from benchmarks.bulk_clients import CONTENDERS, PACKAGES
from benchmarks.drawing import Line, Panel, draw
from benchmarks.limiting import run_limited_server
from benchmarks.model import OURS
from benchmarks.processes import ROOT
from benchmarks.services import (
    DRAWN,
    OK,
    PERMITS,
    REFUSED,
    SCENARIOS,
    THROTTLED,
    Outage,
    Scenario,
    Service,
)

LONG_OUTAGE: Final = 45.0  # seconds; in a shorter outage, the first pauses weigh more
MARGIN: Final = 1.0  # seconds that clients run longer than the measurement


@attrs.define(slots=False)
class Run:
    """One run of a scenario by one contender.

    Attributes:
        seconds: How long.
        requests: The server's record: arrival, status, client.
        counts: What each client counted.
        load: The machine's load average over a minute, before and after.
        server_busy: The share of one core that the server used.
    """

    name: str
    contender: str
    seconds: float
    requests: list[tuple[float, int, int]]
    counts: list[dict[str, Any]]
    load: tuple[float, float]
    server_busy: float

    @property
    def scenario(self) -> Scenario:
        """The scenario."""
        return SCENARIOS[self.name]

    @cached_property
    def service(self) -> Service:
        """A copy of the server's service, to compute what it allows."""
        return self.scenario.build()

    def count(self, status: int, begin: float, end: float, client: int | None = None) -> int:
        """Count the requests of a period that got a status."""
        return sum(
            begin <= at < end and status == seen and client in (None, number)
            for at, seen, number in self.requests
        )

    def measure_goodput(self) -> float:
        """Return the share of what the service allows."""
        begin, end = self.scenario.early, self.seconds
        return self.count(OK, begin, end) / self.service.allow(begin, end)

    def measure_throttled(self, begin: float) -> float:
        """Return the throttled responses per success."""
        good = self.count(OK, begin, self.seconds)
        return self.count(THROTTLED, begin, self.seconds) / max(1, good)

    def list_rates(self, status: int) -> list[int]:
        """Return the requests with a status in each second."""
        counts = [0] * int(self.seconds)
        for at, seen, _ in self.requests:
            if status == seen and at < len(counts):
                counts[int(at)] += 1
        return counts

    @cached_property
    def figures(self) -> dict[str, float]:
        """Name to figure."""
        scenario = self.scenario
        figures = {
            "goodput": self.measure_goodput(),
            "throttled": self.measure_throttled(0.0),
            "late throttled": self.measure_throttled(scenario.late),
            "failed": sum(counts["failed"] for counts in self.counts),
        }
        if scenario.clients > 1:
            each = [self.count(OK, scenario.late, self.seconds, n) for n in range(scenario.clients)]
            figures["fairness"] = min(each) / max(1, *each)
        if isinstance(self.service, Outage):
            figures |= self._measure_outage(self.service)
        return figures

    def _measure_outage(self, outage: Outage) -> dict[str, float]:
        ends = min(outage.ends, self.seconds)
        after = [at for at, status, _ in self.requests if status == OK and at >= ends]
        figures = {"recovery": after[0] - ends if after else float("inf")}
        mine = [counts for counts in self.counts if "attempts" in counts]
        if outage.status == REFUSED:
            arrived = len(self.requests)
            # requests that arrived after the record's end are among the attempts, too
            bad = sum(counts["attempts"] for counts in mine) - arrived
        else:
            bad = self.count(outage.status, outage.begins, ends)
        figures["bad attempts"] = bad
        for name in ("ambiguous_retries", "probes"):
            if mine:
                figures[name.replace("_", " ")] = sum(counts[name] for counts in mine)
        return figures

    def list_misses(self) -> list[str]:
        """Return which requirements were missed."""
        scenario, figures = self.scenario, self.figures
        misses = []
        # in a shorter run, the beginning and a recovery weigh too much
        whole = self.seconds >= scenario.seconds
        if whole and round(figures["goodput"], 2) < scenario.required:
            misses.append(f"goodput below {scenario.required}")
        if round(figures["late throttled"], 3) > scenario.throttled:
            misses.append(f"throttled above {scenario.throttled:.2g}")
        if figures["failed"] or any(counts.get("stopped") for counts in self.counts):
            misses.append("items failed")
        if isinstance(self.service, Outage):
            length, probes = self.service.ends - self.service.begins, figures.get("probes", 0)
            refused = self.service.status == REFUSED
            if figures["bad attempts"] > 2 * PERMITS + probes:
                misses.append("too many attempts")
            if figures.get("ambiguous retries", 0) > (0 if refused else PERMITS + probes):
                misses.append("too many ambiguous retries")
            if length >= LONG_OUTAGE and figures["recovery"] > min(15, length / 4):
                misses.append("late recovery")
        return misses


def run(name: str, contender: str, seconds: float) -> Run:
    """Run a scenario once."""
    load, begun = os.getloadavg()[0], time.monotonic()
    seen: dict[str, Any] = {}
    counts = []
    with run_limited_server(name, seen) as url, contextlib.ExitStack() as stack:
        clients = []
        for number in range(SCENARIOS[name].clients):
            arguments = [contender, url, str(seconds + MARGIN), str(number)]
            client = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.bulk_clients", *arguments],
                cwd=ROOT,
                env={
                    key: os.environ[key] for key in os.environ if not key.startswith("CLOUDINARY")
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            clients.append(stack.enter_context(client))
        for client in clients:
            assert client.stdout is not None
            client.stdout.readline()
        for client in clients:
            assert client.stdin is not None
            client.stdin.write("\n")
            client.stdin.flush()
        for client in clients:
            assert client.stdout is not None
            line = client.stdout.readline()
            if not line:
                raise RuntimeError(f"{contender} broke in {name}; stderr says why.")
            counts.append(json.loads(line))
    return Run(
        name,
        contender,
        seconds,
        [(at, status, client) for at, status, client in seen["requests"]],
        counts,
        (load, os.getloadavg()[0]),
        seen["cpu_seconds"] / (time.monotonic() - begun),
    )


def format_run(measured: Run) -> str:
    """Return the line of a run."""
    figures, scenario = measured.figures, measured.scenario
    line = (
        f"  {measured.contender:<20}{figures['goodput']:.2f} / {figures['throttled']:.3f}"
        f"  late {figures['late throttled']:.3f}  {figures['failed']:.0f} failed"
    )
    for name in ("fairness", "bad attempts", "ambiguous retries", "probes", "recovery"):
        if name in figures:
            digits = 2 if name == "fairness" else 1 if name == "recovery" else 0
            line += f", {name} {figures[name]:.{digits}f}"
    line = f"{line:<62}  load {measured.load[0]:.1f}-{measured.load[1]:.1f}"
    if measured.contender == OURS:
        misses = measured.list_misses()
        line += f"  MISSED: {', '.join(misses)}" if misses else "  met"
        if scenario.goal is not None:
            reached = round(figures["goodput"], 2) >= scenario.goal
            line += f", goal {scenario.goal:.2f} {'reached' if reached else 'not reached'}"
    return line


def build_document(runs: list[Run]) -> dict[str, Any]:
    """Return everything that was measured, as values for JSON."""
    return {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {
            name: version(name)
            for name in ("cloudinary-analyze", "aiohttp", *PACKAGES.values())
            if importlib.util.find_spec(name.replace("-", "_")) is not None
        },
        "runs": [
            {
                "scenario": measured.name,
                "title": measured.scenario.title,
                "contender": measured.contender,
                "seconds": measured.seconds,
                "figures": measured.figures,
                "misses": measured.list_misses() if measured.contender == OURS else None,
                "clients": measured.counts,
                "accepted_per_second": measured.list_rates(OK),
                "throttled_per_second": measured.list_rates(THROTTLED),
                "load": measured.load,
                "server_busy": measured.server_busy,
            }
            for measured in runs
        ],
    }


def draw_runs(runs: list[Run]) -> str:
    """Return the picture of five scenarios: the first run of each contender."""
    panels = []
    for name in DRAWN:
        first = {
            measured.contender: measured for measured in reversed(runs) if measured.name == name
        }
        drawn = [first[contender] for contender in CONTENDERS if contender in first]
        if not drawn:
            continue
        service, seconds = drawn[0].service, range(int(drawn[0].seconds))
        accepted = [Line(values=measured.list_rates(OK)) for measured in drawn]
        allowed = [service.allow(second, second + 1) for second in seconds]
        throttled = [
            Line(name=measured.contender, values=measured.list_rates(THROTTLED))
            for measured in drawn
        ]
        panels += [
            Panel(
                title=SCENARIOS[name].title, lines=[*accepted, Line(values=allowed, kind="limit")]
            ),
            Panel(title="429s", lines=throttled),
        ]
    title = "Accepted requests per second (dashed: what the service allows), and throttled requests"
    return draw(title, panels)


def _read_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks throttling", description=__doc__)
    parser.add_argument("scenarios", nargs="*", help="names or patterns; default: all")
    parser.add_argument("--list", action="store_true", help="list the scenarios and stop")
    parser.add_argument(
        "--quick", action="store_true", help="four short scenarios without peers, in two minutes"
    )
    parser.add_argument("--check", action="store_true", help="exit 1 if a requirement is missed")
    parser.add_argument("--no-peers", action="store_true", help="run only this package")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="runs of each")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the file for the JSON")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="the file for the picture")
    read = parser.parse_args(arguments)
    for pattern in read.scenarios:
        if not fnmatch.filter(SCENARIOS, pattern):
            parser.error(f"Unknown scenario {pattern!r}; --list shows all.")
    return read


def _plan(arguments: argparse.Namespace) -> list[tuple[str, str, float]]:
    patterns = arguments.scenarios or ["*"]
    peers = []
    if not (arguments.quick or arguments.no_peers):
        for peer, package in PACKAGES.items():
            if importlib.util.find_spec(package) is not None:
                peers.append(peer)
            else:
                print(f"{peer}: skipped, because {package} is missing (pip install {package})")
    return [
        (name, contender, scenario.quick if arguments.quick else scenario.seconds)
        for name, scenario in SCENARIOS.items()
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        and (scenario.quick or not arguments.quick)
        for contender in [OURS, *(peers if scenario.peers else [])]
        for _ in range(arguments.repeat)
    ]


def main(arguments: list[str]) -> int:
    """Run the chosen scenarios; return the exit code."""
    options = _read_arguments(arguments)
    if options.list:
        for name, scenario in SCENARIOS.items():
            print(f"{name:<26}{scenario.title}{'  quick' if scenario.quick else ''}")
        return 0
    path = options.json or ROOT / "benchmarks" / "results" / (
        f"throttling-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    print("goodput / throttled per success, over all; late: after 10 s or one window")
    runs: list[Run] = []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for measured in pool.map(lambda planned: run(*planned), _plan(options)):
            if not runs or runs[-1].name != measured.name:
                required = measured.scenario.required
                print(f"{measured.name}  ({measured.scenario.title}; required {required:.2f})")
            print(format_run(measured), flush=True)
            runs.append(measured)
            # after each run, so that an interrupted benchmark keeps its results
            path.write_text(json.dumps(build_document(runs)) + "\n")
    if options.svg is not None:
        options.svg.write_text(draw_runs(runs), encoding="utf-8")
    missed = [run for run in runs if run.contender == OURS and run.list_misses()]
    return 1 if options.check and missed else 0
