"""Tools for testing applications: a local service, signed webhooks, a clock, pytest fixtures.

Put ``pytest_plugins = ["cloudinary_analyze.testing"]`` into the ``conftest.py`` of your root
directory. Each test then has these fixtures:

* ``cloudinary_emulator``: a running `ScriptedEmulator`. During the test, ``CLOUDINARY_URL`` is its
  URL, so ``AnalyzeSession()`` calls it. It has a separate thread and loop, so it also works in
  synchronous tests.
* ``analyze_session``: an `AnalyzeSession` to that emulator, for ``async with``.
* ``manual_clock``: a `ManualClock`, for ``AnalyzeSession(…, clock=manual_clock)``.

For example, with ``pip install pytest fastapi httpx``, a FastAPI application ``app.py``:

```python
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request

from cloudinary_analyze import AnalyzeSession, Captioning


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
    async with AnalyzeSession() as app.state.session:
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/captions")
async def caption(uri: str, request: Request) -> dict[str, str]:
    session: AnalyzeSession = request.app.state.session
    response = await session.analyze(Captioning(uri))
    return {"caption": response.analysis.caption}
```

And its test:

```python
from app import app
from fastapi.testclient import TestClient

from cloudinary_analyze import Captioning
from cloudinary_analyze.testing import ScriptedEmulator

BEE = Captioning("https://images.example/bee.jpg")


def test_caption(cloudinary_emulator: ScriptedEmulator) -> None:
    cloudinary_emulator.respond(BEE, {"data": {"caption": "A bee"}})
    with TestClient(app) as client:
        response = client.get("/captions", params={"uri": str(BEE.source)})
    assert response.json() == {"caption": "A bee"}
    assert cloudinary_emulator.requests == [BEE]
```

`ScriptedEmulator.respond` sets results and errors; ``cloudinary_emulator.faults = FaultPlan(…)``
makes some or all requests fail, and ``cloudinary_emulator.quotas = {"ai_vision": 0}`` exhausts a
quota. If the application takes webhooks, let the emulator post them to
it:

```python
with TestClient(app) as client:
    WebhookSimulator(client, "/hooks/cloudinary").connect(cloudinary_emulator)
```

or post your own with `sign_notification` and `build_notification`:

```python
body = build_notification(task_id, Captioning, {"data": {"caption": "A bee"}})
headers = sign_notification(body, cloudinary_emulator.credentials)
assert client.post("/hooks/cloudinary", content=body, headers=headers).status_code == 200
```

Modules that read the credentials on import need ``CLOUDINARY_URL`` by then. Import them in a
fixture or a test that uses ``cloudinary_emulator``, whose port stays the same.

For an emulator with another scope, write a fixture with `run_emulator` and call
`ScriptedEmulator.reset` between tests. Instead of ``pytest_plugins`` you can put ``-p
cloudinary_analyze.testing`` into ``addopts``.

`build_response` builds a response for code that receives one. A `ManualClock` replaces time: every
wait and deadline of the session follows it. Only the timeouts of sockets are real. ``await
manual_clock.run(session.analyze(…))`` moves it until the call is done; `ManualClock.advance` moves
it by some seconds.
"""

from cloudinary_analyze.testing.clock import ManualClock
from cloudinary_analyze.testing.emulator import ScriptedEmulator, run_emulator
from cloudinary_analyze.testing.responses import build_response
from cloudinary_analyze.testing.webhooks import (
    WebhookReply,
    WebhookSimulator,
    build_notification,
    sign_notification,
)

__all__ = [
    "ManualClock",
    "ScriptedEmulator",
    "WebhookReply",
    "WebhookSimulator",
    "build_notification",
    "build_response",
    "run_emulator",
    "sign_notification",
]

pytest_plugins: list[str] = ["cloudinary_analyze.testing.fixtures"]
