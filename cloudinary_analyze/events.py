"""Events of a session, for progress, statistics and telemetry.

Pass ``on_event`` to `AnalyzeSession`: any function of one event. It runs on the event loop, so it
must return quickly. Its exceptions are logged and never break a call. Without a hook, no events are
built. Events contain no secrets and no source URLs. ``error`` may quote text of the service.

| event | when | fields |
|---|---|---|
| `CallStarted` | an analyze call begins to queue | ``call``, ``model``, ``as_task``, ``repeats`` |
| `AttemptFinished` | an HTTP request of a call or poll ended | ``call``, ``model``, ``attempt``, \
``seconds``, ``permit_wait``, ``status``, ``ambiguous``, ``probe``, \
``error`` |
| `AttemptRetried` | the attempt failed and will be repeated | ``call``, ``model``, ``attempt``, \
``wait``, ``ambiguous``, ``error`` |
| `CallFinished` | the call has its response, its task or its error; exactly one for each \
`CallStarted` | ``call``, ``model``, ``attempts``, ``seconds``, ``permit_wait``, ``status``, \
``request_id``, ``task_id``, ``limits``, ``denied``, ``error`` |
| `TaskAccepted` | the service made a task of a call | ``task_id``, ``model`` |
| `PollFinished` | a status poll ended | ``call``, ``task_id``, ``attempts``, ``seconds``, \
``permit_wait``, ``state``, ``error`` |
| `NotificationSeen` | a delivery was read and judged | ``verdict``, ``task_id``, ``queued``, \
``trace`` |
| `TaskAnswered` | a task has its result or its error | ``task_id``, ``by``, ``model``, \
``seconds``, ``limits``, ``error`` |
| `ItemRestored` | a stream read an item from its ledger | ``key``, ``model``, ``seconds``, \
``error`` |
| `SessionPaused` | no new attempt starts for a while | ``seconds``, ``permits``, ``polls``, \
``cause`` |
| `PaceChanged` | the session learned a limit of the service | ``pace``, ``permits`` |

``call`` identifies the events of one call or poll: a number that is unique in its session.
``task_id`` identifies the events of one task. The `CallFinished` of its submission has the same
``task_id``.

Log lines go to these loggers. They are silent until the application configures `logging`.

| logger | lines |
|---|---|
| ``cloudinary_analyze.events`` | ERROR: a hook raised |
| ``cloudinary_analyze.tasks`` | ERROR, WARNING: polls are refused or fail unexpectedly, unknown \
states, unreadable deliveries; INFO: deliveries that the session refused |
| ``cloudinary_analyze.notifications`` | WARNING: a source or a sink failed; INFO: webhooks that \
a receiver refused |
| ``cloudinary_analyze.ledger`` | WARNING: settings and restarts of Redis; DEBUG: submissions \
that were abandoned |
| ``cloudinary_analyze.emulator`` | DEBUG: notifications that an application did not accept |

Log lines contain task ids and no sources. They shorten other errors, and leave out query strings
and passwords of URLs. An exception of your own hook or sink is logged with its traceback.

.. include:: docs/observability.md
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import attrs

from cloudinary_analyze._meter import SessionStats
from cloudinary_analyze._values import Described
from cloudinary_analyze.responses import Limit

__all__ = [
    "AttemptFinished",
    "AttemptRetried",
    "CallFinished",
    "CallStarted",
    "Event",
    "EventHook",
    "ItemRestored",
    "NotificationSeen",
    "PaceChanged",
    "PollFinished",
    "SessionPaused",
    "SessionStats",
    "TaskAccepted",
    "TaskAnswered",
]


@attrs.frozen(kw_only=True, repr=False, eq=False)
class CallStarted(Described):
    """An analyze call begins to queue for a permit.

    Attributes:
        call: The number of the call.
        model: The model's name in URLs.
        as_task: Whether it asks for a task.
        repeats: The task that it repeats (`Settings.on_missing_result`), if any.
    """

    call: int
    model: str
    as_task: bool = False
    repeats: str | None = None


@attrs.frozen(kw_only=True, repr=False, eq=False)
class AttemptFinished(Described):
    """An HTTP request ended, with a response, an error or a cancellation.

    Attributes:
        call: The call or poll that it belongs to.
        model: The model's name in URLs; ``None`` for a status poll.
        attempt: Its number in the call, from 1.
        seconds: Seconds from sending to the decoded response (monotonic).
        permit_wait: Seconds that it queued before: for a permit, a pause, a pace or a claim.
        status: HTTP status; ``None`` if no response arrived.
        ambiguous: Whether it may have been charged although it has no usable response.
        probe: Whether it tested, during a pause, if the service has recovered.
        error: ``None`` on success.
    """

    call: int
    model: str | None
    attempt: int
    seconds: float
    permit_wait: float
    status: int | None = None
    ambiguous: bool = False
    probe: bool = False
    error: BaseException | None = None


@attrs.frozen(kw_only=True, repr=False, eq=False)
class AttemptRetried(Described):
    """An attempt failed and will be repeated.

    Attributes:
        call: The call or poll that it belongs to.
        model: The model's name in URLs; ``None`` for a status poll.
        attempt: Number of the attempt that failed, from 1.
        wait: Seconds until the next one begins to queue.
        ambiguous: Whether the failed attempt may have been charged.
        error: Why it failed.
    """

    call: int
    model: str | None
    attempt: int
    wait: float
    ambiguous: bool
    error: BaseException


@attrs.frozen(kw_only=True, repr=False, eq=False)
class CallFinished(Described):
    """An analyze call ended, with a response, a task or an error.

    Attributes:
        call: The number of the call.
        model: The model's name in URLs.
        attempts: HTTP attempts made.
        seconds: Seconds from the call to its end, queueing and retries included (monotonic).
        permit_wait: The part of ``seconds`` that its attempts queued.
        status: HTTP status of the last attempt. ``None`` if it got no response.
        request_id: The service's id of the last request, if it sent one.
        task_id: The task, if the service turned the call into one.
        limits: The quotas that came with the response or error.
        denied: Whether a ledger denied the claim, or the stream had stopped. Then nothing was sent
            or counted.
        error: ``None`` on success.
    """

    call: int
    model: str
    attempts: int
    seconds: float
    permit_wait: float = 0.0
    status: int | None = None
    request_id: str | None = None
    task_id: str | None = None
    limits: tuple[Limit, ...] = ()
    denied: bool = False
    error: BaseException | None = None


@attrs.frozen(kw_only=True, repr=False, eq=False)
class TaskAccepted(Described):
    """The service accepted a task (202).

    Attributes:
        task_id: The task.
        model: The model's name in URLs.
    """

    task_id: str
    model: str


@attrs.frozen(kw_only=True, repr=False, eq=False)
class PollFinished(Described):
    """A request for a task's status ended.

    Attributes:
        call: The number of the poll, in the sequence of the calls.
        task_id: The task.
        attempts: HTTP attempts made.
        seconds: Seconds from the start to the end, queueing and retries included (monotonic).
        permit_wait: The part of ``seconds`` that its attempts queued.
        state: The task's state as reported. ``None`` if there is an error.
        error: ``None`` on success.
    """

    call: int
    task_id: str
    attempts: int
    seconds: float
    permit_wait: float = 0.0
    state: str | None = None
    error: BaseException | None = None


@attrs.frozen(kw_only=True, repr=False, eq=False)
class NotificationSeen(Described):
    """A delivery was read and verified.

    Attributes:
        verdict: ``"resolved"``, ``"progress"`` (the task is still running), ``"parked"``,
            ``"duplicate"``, ``"foreign"``, ``"forged"``, ``"stale"``, ``"malformed"`` or
            ``"unrelated"``.
        task_id: The task it names, if it was verified.
        queued: Seconds from its receipt to now (wall clock), if the receiver recorded the time.
            ``None`` for a delivery that was parked before.
        trace: The delivery's ``traceparent`` header: the trace context of its task's submission,
            if the source carries it.
    """

    verdict: str
    task_id: str | None = None
    queued: float | None = None
    trace: str | None = None


@attrs.frozen(kw_only=True, repr=False, eq=False)
class TaskAnswered(Described):
    """A task has its result or its error.

    A task that was answered without a notification is reported again if that arrives later.

    Attributes:
        task_id: The task.
        by: ``"notification"``, ``"poll"``, ``"analyze"`` (repeated as a call), or ``"session"``.
        model: The model's name in URLs, if a handle or the request is known.
        seconds: Seconds since the session learned the task's id (monotonic). ``None`` if unknown.
        limits: The quotas that came with the notification or poll.
        error: ``None`` on success.
    """

    task_id: str
    by: str
    model: str | None = None
    seconds: float | None = None
    limits: tuple[Limit, ...] = ()
    error: BaseException | None = None


@attrs.frozen(kw_only=True, repr=False, eq=False)
class ItemRestored(Described):
    """An item of a stream was restored from the ledger. Nothing was sent.

    Attributes:
        key: The request's key in the ledger, a hash.
        model: The model's name in URLs.
        seconds: How long the recorded attempts took.
        error: The recorded error; ``None`` if a response is recorded.
    """

    key: str
    model: str
    seconds: float = 0.0
    error: BaseException | None = None


@attrs.frozen(kw_only=True, repr=False, eq=False)
class SessionPaused(Described):
    """No new attempt starts for a while. Then single attempts test if the service has recovered.

    Attributes:
        seconds: Seconds from now until the first of these.
        permits: How many attempts may be in flight after the pause.
        polls: Whether status polls pause instead of analyses.
        cause: ``"throttled"``: the service throttles everything (429, 420) or asked for a pause
            (503 with Retry-After). ``"failing"``: every request fails (5xx, connection errors).
            ``"refused"``: it refused a poll (401, 403).
    """

    seconds: float
    permits: int
    polls: bool = False
    cause: str = "throttled"


@attrs.frozen(kw_only=True, repr=False, eq=False)
class PaceChanged(Described):
    """The session learned a rate or a concurrency that the service allows.

    Attributes:
        pace: Attempts per second. ``None``: no limit is known.
        permits: The maximum number of attempts in flight.
    """

    pace: float | None
    permits: int


Event: TypeAlias = (
    CallStarted
    | AttemptFinished
    | AttemptRetried
    | CallFinished
    | TaskAccepted
    | PollFinished
    | NotificationSeen
    | TaskAnswered
    | ItemRestored
    | SessionPaused
    | PaceChanged
)
EventHook: TypeAlias = Callable[[Event], None]
