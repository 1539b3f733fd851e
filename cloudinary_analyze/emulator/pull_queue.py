"""The hosted pull queue: notifications that wait to be fetched and acknowledged.

A message that was fetched is invisible for a while and comes again unless it is acknowledged.
"""

from __future__ import annotations

import asyncio
import base64
import heapq
import time
from collections import deque
from collections.abc import Mapping
from secrets import token_hex
from typing import Any

import attrs

from cloudinary_analyze.emulator._json import load_json
from cloudinary_analyze.emulator.validation import Refusal, refuse_invalid, refuse_missing


@attrs.frozen
class Message:
    """A signed notification, byte for byte."""

    body: bytes
    timestamp: str
    signature: str

    def build(self, handle: str) -> dict[str, Any]:
        """Return the message as it is sent."""
        try:
            payload = load_json(self.body)
        except ValueError:
            payload = {}
        return {
            "payload": payload,
            "signed_payload": base64.urlsafe_b64encode(self.body).decode(),
            "signature": self.signature,
            "timestamp": self.timestamp,
            "receipt_handle": handle,
        }


@attrs.frozen
class PullRequest:
    """One request for messages: a channel and how long to wait, to hide, and for how many."""

    channel: str
    max_messages: int
    wait_seconds: int
    visibility_timeout: int


@attrs.define(eq=False)
class _Channel:
    ready: deque[Message] = attrs.field(factory=deque)
    hidden: dict[str, Message] = attrs.field(factory=dict)
    returns: list[tuple[float, str]] = attrs.field(factory=list)
    arrived: asyncio.Event = attrs.field(factory=asyncio.Event)

    def restore(self, now: float) -> None:
        while self.returns and self.returns[0][0] <= now:
            message = self.hidden.pop(heapq.heappop(self.returns)[1], None)
            if message is not None:
                self.ready.append(message)

    def claim(self, request: PullRequest, now: float) -> list[dict[str, Any]]:
        self.restore(now)
        messages: list[dict[str, Any]] = []
        while self.ready and len(messages) < request.max_messages:
            handle, message = token_hex(16), self.ready.popleft()
            self.hidden[handle] = message
            heapq.heappush(self.returns, (now + request.visibility_timeout, handle))
            messages.append(message.build(handle))
        return messages


@attrs.define(eq=False)
class PullQueue:
    """All channels of an account."""

    _channels: dict[str, _Channel] = attrs.field(factory=dict, init=False)
    _closed: bool = attrs.field(default=False, init=False)

    def put(self, channel: str, message: Message) -> None:
        """Store a message for whoever fetches the channel."""
        found = self._channels.setdefault(channel, _Channel())
        found.ready.append(message)
        found.arrived.set()

    async def fetch(self, request: PullRequest) -> list[dict[str, Any]]:
        """Return messages as soon as there are some, or none when the wait is over.

        Safe to cancel: what was not returned was not claimed.
        """
        channel = self._channels.setdefault(request.channel, _Channel())
        deadline = time.monotonic() + request.wait_seconds
        while True:
            now = time.monotonic()
            messages = channel.claim(request, now)
            if messages or now >= deadline or self._closed:
                return messages
            channel.arrived.clear()
            wake = min(deadline, channel.returns[0][0]) if channel.returns else deadline
            try:
                async with asyncio.timeout(wake - now):
                    await channel.arrived.wait()
            except TimeoutError:
                continue

    def acknowledge(self, handles: list[str]) -> int:
        """Delete fetched messages; handles that are unknown or expired are skipped.

        Returns:
            How many were deleted.
        """
        now, deleted = time.monotonic(), 0
        for channel in self._channels.values():
            channel.restore(now)
            deleted += sum(channel.hidden.pop(handle, None) is not None for handle in handles)
        return deleted

    def close(self) -> None:
        """Send everyone who waits away with nothing."""
        self._closed = True
        for channel in self._channels.values():
            channel.arrived.set()


def read_pull_request(query: Mapping[str, str]) -> PullRequest:
    """Return the request in a query string.

    Raises:
        Refusal: A parameter is missing or out of its range.
    """
    channel, batch = query.get("channel"), query.get("batch_id")
    if not channel and not batch:
        raise refuse_missing("channel")
    if channel and batch:
        raise refuse_invalid("Exactly one of channel and batch_id must be given")
    return PullRequest(
        channel or f"batch:{batch}",
        _read_number(query, "max_messages", 10, 1, 100),
        _read_number(query, "wait_seconds", 20, 0, 60),
        _read_number(query, "visibility_timeout", 30, 1, 600),
    )


def _read_number(
    query: Mapping[str, str], name: str, default: int, lowest: int, highest: int
) -> int:
    text = query.get(name, str(default))
    out_of_range: Refusal = refuse_invalid(f"{name} must be from {lowest} to {highest}")
    if not (text.isascii() and text.isdigit() and len(text) <= 4):
        raise out_of_range
    number = int(text)
    if not lowest <= number <= highest:
        raise out_of_range
    return number
