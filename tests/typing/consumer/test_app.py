"""Tests of an application, with the test kit."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import pytest

from cloudinary_analyze import AnalyzeSession, Captioning, CaptioningAnalysis, Delivery, Response
from cloudinary_analyze.emulator import Counts, EmulatedTask, Emulator, FaultPlan, WebhookPolicy
from cloudinary_analyze.testing import (
    ManualClock,
    ScriptedEmulator,
    WebhookReply,
    WebhookSimulator,
    build_notification,
    build_response,
    run_emulator,
    sign_notification,
)

Message = MutableMapping[str, Any]


async def application(
    scope: MutableMapping[str, Any],
    receive: Callable[[], Awaitable[Message]],
    send: Callable[[Message], Awaitable[None]],
) -> None:
    """Answer anything."""
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(scope["path"]).encode()})


async def test_a_webhook_is_delivered(cloudinary_emulator: ScriptedEmulator) -> None:
    """Post a webhook."""
    simulator = WebhookSimulator(application, "/hook")
    reply: WebhookReply = await simulator.post(build_notification("t1", Captioning))
    assert (reply.status, simulator.replies) == (200, [reply])
    headers: dict[str, str] = sign_notification(b"{}", cloudinary_emulator.credentials)
    assert Delivery(b"{}", headers).headers == headers
    simulator.connect(cloudinary_emulator)


async def test_a_caption_is_returned(
    cloudinary_emulator: ScriptedEmulator,
    analyze_session: AnalyzeSession,
    manual_clock: ManualClock,
) -> None:
    """Ask for a caption."""
    request = Captioning("https://example.com/a.jpg")
    cloudinary_emulator.respond(request, {"data": {"caption": "A bee"}})
    cloudinary_emulator.faults = FaultPlan(error_503=0.5)
    async with analyze_session as session:
        response: Response[CaptioningAnalysis] = await session.analyze(request)
    assert response.analysis.caption == "A bee"
    assert cloudinary_emulator.requests == [request]
    counts: Counts = cloudinary_emulator.counts
    tasks: list[EmulatedTask] = list(cloudinary_emulator.tasks.values())
    assert (counts.total_done, tasks) == (1, [])
    await manual_clock.advance(3600)


@pytest.mark.parametrize("digest", ["sha1"])
def test_the_emulator_runs_without_the_fixture(digest: str) -> None:
    """Run an emulator by hand."""
    emulator = Emulator(webhooks=WebhookPolicy(retry_scale=0.1), latency="realistic")
    with run_emulator(emulator) as running:
        assert running.url
        assert build_response(Captioning).analysis.caption
        assert digest
