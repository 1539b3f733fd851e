"""Notifications: receivers, brokers, custom sources; events and telemetry."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from aiohttp import web

from cloudinary_analyze import (
    AnalyzeSession,
    Credentials,
    Delivery,
    InvalidSignatureError,
    MalformedNotificationError,
    Notification,
    NotificationError,
    NotificationSink,
    NotificationSource,
    NotificationSourceError,
    StaleNotificationError,
    events,
    parse_notification,
    protocols,
    verify_signature,
    webhooks,
)
from cloudinary_analyze.notifications import aiohttp, asgi, decode_delivery, encode_delivery
from cloudinary_analyze.notifications.forwarding import forward
from cloudinary_analyze.notifications.redis import RedisNotifications
from cloudinary_analyze.telemetry import instrument


class Mailbox:
    """A custom source and sink, with all optional methods."""

    def __init__(self) -> None:
        """Create an empty mailbox."""
        self._stored: dict[str, bytes] = {}
        self._arrived: asyncio.Queue[Delivery] = asyncio.Queue()

    async def put(self, delivery: Delivery, /) -> None:
        """Store a delivery."""
        notification: Notification = parse_notification(delivery.body)
        if notification.task_id is not None and not notification.failed:
            self._stored[notification.task_id] = encode_delivery(delivery)
        await self._arrived.put(delivery)

    async def listen(self) -> AsyncIterator[Delivery]:
        """Yield deliveries."""
        while True:
            yield await self._arrived.get()

    async def fetch(self, task_ids: Sequence[str]) -> Sequence[Delivery]:
        """Return earlier ones."""
        found = [self._stored.get(task_id) for task_id in task_ids]
        return [decode_delivery(stored) for stored in found if stored is not None]

    def acknowledge(self, delivery: Delivery) -> None:
        """Record the acknowledgement."""
        print(delivery.received_at)

    def note_trace(self, task_id: str, trace: str) -> None:
        """Keep a trace context."""
        print(task_id, trace)

    def carry_traces(self, follow: Callable[[str, Awaitable[str | None]], Awaitable[None]]) -> None:
        """Enable trace contexts."""
        print(follow)


async def serve(credentials: Credentials, redis_url: str) -> None:
    """Route receivers, and forward from one broker to another."""
    mailbox = Mailbox()
    source: NotificationSource = mailbox
    sink: NotificationSink = mailbox
    replayable: protocols.ReplayableSource = mailbox
    acknowledging: protocols.AcknowledgingSource = mailbox
    carrier: protocols.TraceCarrier = mailbox
    queue: asyncio.Queue[Delivery] = asyncio.Queue()
    for value in list[object]([replayable, acknowledging, queue]):
        print(isinstance(value, protocols.NotificationSource))
    async with RedisNotifications(redis_url, keep=3600) as redis:
        sinks: list[protocols.NotificationSink] = [sink, redis, queue]
        receivers = [asgi.WebhookReceiver(each, credentials) for each in sinks]
        app = web.Application()
        app.router.add_post("/hook", aiohttp.WebhookReceiver(redis, credentials).handle)
        print(receivers)
        session = AnalyzeSession(
            credentials,
            notifications=redis,
            notification_url="https://app.example/hook",
            on_event=print_event,
        )
        instrument(session)
        instrument(carrier)
        for origin in (queue, redis, source):
            print(AnalyzeSession(credentials, notifications=origin))
        async with session, asyncio.TaskGroup() as group:
            group.create_task(forward(source, redis, credentials))


def check(body: bytes, timestamp: str | None, signature: str | None) -> str:
    """Verify and parse a webhook by hand."""
    try:
        verify_signature(body, timestamp, signature, ["secret"])
        webhooks.verify_signature(body, timestamp, signature, ("secret",), digests=["sha256"])
        return str(webhooks.parse_notification(body).http_status)
    except InvalidSignatureError:
        return "forged"
    except StaleNotificationError:
        return "stale"
    except MalformedNotificationError:
        return "malformed"
    except (NotificationError, NotificationSourceError) as error:
        return error.message


def print_event(event: events.Event) -> None:
    """Print a line for every event."""
    match event:
        case events.CallStarted():
            print(event.call, event.as_task)
        case events.AttemptFinished() | events.AttemptRetried():
            print(event.attempt, event.ambiguous)
        case events.CallFinished():
            print(event.status, event.limits)
        case events.TaskAccepted():
            print(event.task_id)
        case events.PollFinished():
            print(event.state)
        case events.NotificationSeen():
            print(event.verdict)
        case events.TaskAnswered():
            print(event.by)
        case events.ItemRestored():
            print(event.key)
        case events.PaceChanged():
            print(event)
        case events.SessionPaused():
            print(event.cause)


hook: events.EventHook = print_event
zero: events.SessionStats = events.SessionStats()
