"""Asynchronous tasks: accept them, finish them in time, and send their notifications."""

from __future__ import annotations

import asyncio
from secrets import token_hex
from typing import Final

import attrs

from cloudinary_analyze.emulator.canned import CannedResult
from cloudinary_analyze.emulator.faults import FaultDesk
from cloudinary_analyze.emulator.notices import EmulatedTask
from cloudinary_analyze.emulator.quotas import Charge
from cloudinary_analyze.emulator.scheduler import Scheduler
from cloudinary_analyze.emulator.validation import AnalyzeRequest
from cloudinary_analyze.emulator.webhooks import Envelope, WebhookSender

_EXTRAS: Final = ("forged", "stale", "malformed", "foreign", "unrelated")


@attrs.define(eq=False)
class TaskDesk:
    """Accepts tasks, finishes them in time, and sends their notifications.

    Attributes:
        scheduler: Finishes tasks when they are due.
        sender: Delivers their notifications.
        fault_desk: Determines the delay of a delayed notification.
        tasks: All tasks by id, kept until the emulator ends.
    """

    scheduler: Scheduler
    sender: WebhookSender
    fault_desk: FaultDesk
    tasks: dict[str, EmulatedTask]

    def accept(
        self,
        request: AnalyzeRequest,
        charge: Charge | None,
        *,
        seconds: float,
        faults: tuple[str, ...],
        canned: CannedResult | None,
    ) -> EmulatedTask:
        """Accept a request. Its task is finished when due, or now if its notification comes early."""
        task = EmulatedTask(
            token_hex(80),
            request,
            token_hex(16),
            charge,
            self.scheduler.loop.time(),
            seconds,
            faults,
            canned,
        )
        self.tasks[task.task_id] = task
        if "early" not in faults:
            self.scheduler.push(seconds, self._finish, task)
        return task

    async def finish_early(self, task: EmulatedTask) -> None:
        """Finish a task. Return once its notifications are delivered."""
        self._settle(task)
        kinds = self._list_extras(task) + self._list_genuine(task)
        await asyncio.gather(
            *(
                self.sender.deliver(Envelope(task, place, kinds))
                for place in self._list_places(task)
            )
        )

    def _finish(self, task: EmulatedTask) -> None:
        self._settle(task)
        extras, genuine = self._list_extras(task), self._list_genuine(task)
        for place in self._list_places(task):
            if "delayed" not in task.faults:
                self._send(task, place, extras + genuine)
                continue
            self._send(task, place, extras)
            self.scheduler.push(self.fault_desk.delay_seconds, self._send, task, place, genuine)

    def _send(self, task: EmulatedTask, place: str | None, kinds: tuple[str, ...]) -> None:
        if kinds:
            self.sender.send(Envelope(task, place, kinds))

    @staticmethod
    def _settle(task: EmulatedTask) -> None:
        failed = task.charge is None or "failed" in task.faults
        task.outcome = "failed" if failed else "completed"

    @staticmethod
    def _list_extras(task: EmulatedTask) -> tuple[str, ...]:
        # Forged and malformed ones come first, to detect a client that accepts them.
        return tuple(kind for kind in _EXTRAS if kind in task.faults)

    @staticmethod
    def _list_genuine(task: EmulatedTask) -> tuple[str, ...]:
        if "lost" in task.faults:
            return ()
        return ("genuine", "duplicate") if "duplicated" in task.faults else ("genuine",)

    def _list_places(self, task: EmulatedTask) -> list[str | None]:
        """Return the places of notifications: a URL, ``None`` for the hook, or nothing."""
        if self.sender.find_hook() is not None:
            return [None]
        url = task.request.notification_url or self.sender.policy.default_notification_url
        return [] if url is None else [url]
