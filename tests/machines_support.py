"""Helpers for tests with many local workers: an emulator, and the workers' functions."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from cloudinary_analyze.emulator import Emulator
from cloudinary_analyze.stage import close_sessions, outcome_columns, worker_stats
from cloudinary_analyze.testing import run_emulator

# The fork server imports everything once, and its children inherit no thread. Children get the
# environment of the server, which may be that of an earlier test.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["cloudinary_analyze._http.caller", "machines_support", "redis"])


def build_urls(count):
    return [f"https://pictures.example.com/{number}.jpg" for number in range(count)]


@contextlib.contextmanager
def emulate_in_environment(monkeypatch, **options):
    """Run an emulator with its address in ``CLOUDINARY_URL``; close its sessions at the end."""
    with run_emulator(Emulator(**options)) as emulator:
        monkeypatch.setenv("CLOUDINARY_URL", emulator.cloudinary_url)
        try:
            yield emulator
        finally:
            close_sessions()


def count_statuses(stage, items):
    """Analyze items in a worker; return the statuses, the worker's id, and its repeated attempts."""
    statuses = Counter(outcome_columns(stage(items))["status"])
    repeated = sum(shown["ambiguous_retries"] for shown in worker_stats())
    return statuses, os.getpid(), repeated


def split(items, count):
    return [items[number::count] for number in range(count)]


@contextlib.contextmanager
def open_pool(workers=2):
    """Open a pool of processes that fork from a preloaded server."""
    with ProcessPoolExecutor(workers, mp_context=CONTEXT) as pool:
        yield pool
