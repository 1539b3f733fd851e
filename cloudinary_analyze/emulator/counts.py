"""Counters of the emulator, for tests and reports."""

from __future__ import annotations

from collections import Counter

import attrs


@attrs.define(eq=False)
class Counts:
    """Counters of one emulator since its start.

    Attributes:
        per_source: Whether `received`, `done` and `polls` are kept.
        received: Well-formed analyze calls by (model, source), including those with a fault.
        done: Analyses done, and charged, by (model, source).
        polls: Status requests by task id, for tasks that exist.
        total_received: The sum of `received`. Always kept.
        total_done: The sum of `done`. Always kept.
        total_polls: The sum of `polls`. Always kept.
        http_faults: Faults of calls, by name.
        webhooks: Notifications sent, by kind (``genuine``, ``duplicate``, ``redelivery``,
            ``forged``, …). Every attempt counts.
        webhooks_refused: Attempts whose response was not 200.
        in_flight: Analyze calls in progress now.
        max_in_flight: The largest number of analyze calls in progress at the same time.
    """

    per_source: bool = True
    received: Counter[tuple[str, str]] = attrs.field(factory=Counter, init=False)
    done: Counter[tuple[str, str]] = attrs.field(factory=Counter, init=False)
    polls: Counter[str] = attrs.field(factory=Counter, init=False)
    total_received: int = attrs.field(default=0, init=False)
    total_done: int = attrs.field(default=0, init=False)
    total_polls: int = attrs.field(default=0, init=False)
    http_faults: Counter[str] = attrs.field(factory=Counter, init=False)
    webhooks: Counter[str] = attrs.field(factory=Counter, init=False)
    webhooks_refused: int = attrs.field(default=0, init=False)
    in_flight: int = attrs.field(default=0, init=False)
    max_in_flight: int = attrs.field(default=0, init=False)

    def count_received(self, model: str, source: str) -> None:
        """Count a call to a model with a source."""
        self.total_received += 1
        if self.per_source:
            self.received[model, source] += 1

    def count_done(self, model: str, source: str) -> None:
        """Count an analysis, done and charged, of a source by a model."""
        self.total_done += 1
        if self.per_source:
            self.done[model, source] += 1

    def count_poll(self, task_id: str) -> None:
        """Count a status request for a task."""
        self.total_polls += 1
        if self.per_source:
            self.polls[task_id] += 1

    def enter(self) -> None:
        """Count the start of a call."""
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)

    def leave(self) -> None:
        """Count the end of a call."""
        self.in_flight -= 1
