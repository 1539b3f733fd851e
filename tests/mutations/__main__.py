"""Runs mutations: breaks one promise at a time in a copy, and reports whether a test fails.

    python tests/mutations                            all of them, about half an hour
    python tests/mutations --only NAME                one; repeatable
    python tests/mutations --sample 10 --seed HASH    ten, chosen by a commit

The exit code is 0 only if each mutation makes a test fail. A test that hangs does not count.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
from catalogue import PACKAGE, ROOT, Mutation, choose, read_mutations

RUN_TIMEOUT = 240.0  # seconds for the tests of one mutation
TEST_TIMEOUT = 60.0  # seconds for one test; tests themselves wait for up to 30
_COPIED = (PACKAGE, "tests", "pyproject.toml", "README.md", "CHANGELOG.md")
_FAILED = re.compile(r"^(?:FAILED|ERROR) (?:tests/)?(\S+?::\S+)", re.MULTILINE)
_NO_TESTS_RAN = 5


@attrs.frozen
class Run:
    """How a run of tests ended: passed, failed, hung, or broke before a test ran."""

    kind: str
    detail: str


def copy_repository(target: Path) -> None:
    """Copy the files that the tests need."""
    for name in _COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name)  # including bytecode, which saves seconds
        elif source.exists():
            shutil.copy2(source, target / name)


def run_tests(root: Path, tests: Sequence[str]) -> Run:
    """Run tests against a copy, until the first failure."""
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("COV", "PYTEST_"))
    }
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment["PYTHONPATH"] = str(root)
    probe = f"import {PACKAGE}; print({PACKAGE}.__file__)"
    command = [sys.executable, "-c", probe]
    imported = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if not imported.stdout.startswith(str(root)):
        return Run("broke", f"the copy was not imported: {imported.stdout}{imported.stderr[-300:]}")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--tb=short"]
    command += ["-p", "no:cacheprovider", f"--timeout={TEST_TIMEOUT:g}"]
    # it imports modules when the session ends, which fails on 3.11 while leaked coroutines are freed
    command += ["-p", "no:schemathesis"]
    command += [f"tests/{test}" for test in tests]
    process = subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=RUN_TIMEOUT)
    except subprocess.TimeoutExpired:
        return Run("hung", f"over {RUN_TIMEOUT:.0f} s")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode == 0:
        return Run("passed", "")
    failed = _FAILED.findall(output)
    if not failed or process.returncode == _NO_TESTS_RAN:
        return Run("broke", output[-1500:])
    kind = "hung" if "Failed: Timeout" in output or "Timeout (>" in output else "failed"
    return Run(kind, failed[0])


def try_mutation(mutation: Mutation) -> tuple[Mutation, str, str, float]:
    """Apply one mutation to a fresh copy and run its tests."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutation-") as directory:
        root = Path(directory).resolve()
        copy_repository(root)
        problem = mutation.apply(root)
        if problem is not None:
            return mutation, "DOES NOT APPLY", problem, 0.0
        run = run_tests(root, mutation.tests)
    verdict = {"failed": "killed", "passed": "SURVIVED", "hung": "HANG", "broke": "BROKE"}[run.kind]
    return mutation, verdict, run.detail, time.monotonic() - begun


def check_baseline(mutations: Sequence[Mutation]) -> Run:
    """Run the tests of all these mutations on an unchanged copy."""
    tests = list(dict.fromkeys(test for mutation in mutations for test in mutation.tests))
    with tempfile.TemporaryDirectory(prefix="mutation-") as directory:
        root = Path(directory).resolve()
        copy_repository(root)
        return run_tests(root, tests)


def main() -> int:
    """Run the chosen mutations and print one line each."""
    parser = argparse.ArgumentParser(prog="mutations", description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", help="a mutation; repeatable")
    parser.add_argument("--sample", type=int, metavar="N", help="run N mutations")
    parser.add_argument("--seed", default="", help="what the sample is chosen by")
    parser.add_argument("--jobs", type=int, default=1, help="mutations at the same time")
    parser.add_argument("--baseline", action="store_true", help="first run the tests unchanged")
    options = parser.parse_args()
    mutations = read_mutations()
    if options.only:
        unknown = {*options.only} - {mutation.name for mutation in mutations}
        if unknown:
            parser.error(f"unknown: {', '.join(sorted(unknown))}")
        mutations = [mutation for mutation in mutations if mutation.name in options.only]
    if options.sample is not None:
        mutations = choose(mutations, options.sample, options.seed)
    if options.baseline:
        baseline = check_baseline(mutations)
        if baseline.kind != "passed":
            print(f"The unchanged package {baseline.kind}: {baseline.detail}")
            return 2
    bad = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutation, verdict, detail, seconds in pool.map(try_mutation, mutations):
            bad += verdict != "killed"
            print(f"{verdict:8} {mutation.name} ({seconds:.0f} s): {mutation.promise}", flush=True)
            print(f"         {detail}", flush=True)
    print(f"{len(mutations) - bad} of {len(mutations)} mutations were killed by a failing test.")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
