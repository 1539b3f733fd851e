"""Captions behind FastAPI, in any number of processes: ``uvicorn fastapi_app:app --workers 2``."""

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request
from starlette.routing import Route

from cloudinary_analyze import (
    AnalysisTask,
    AnalyzeSession,
    Captioning,
    CaptioningAnalysis,
    Credentials,
    NotFoundError,
    TaskLimitError,
)
from cloudinary_analyze.notifications.asgi import WebhookReceiver
from cloudinary_analyze.notifications.redis import RedisNotifications

HOOK = "/hooks/cloudinary"
PATIENCE = 20.0  # seconds; then the client asks again by the task id

credentials = Credentials.from_environment()
notifications = RedisNotifications(os.environ["REDIS_URL"])


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
    url = os.environ["PUBLIC_URL"] + HOOK
    async with (
        notifications,
        AnalyzeSession(credentials, notifications=notifications, notification_url=url) as session,
    ):
        app.state.session = session
        yield


def get_session(request: Request) -> AnalyzeSession:
    session: AnalyzeSession = request.app.state.session
    return session


Caption = dict[str, str | None]
Session = Annotated[AnalyzeSession, Depends(get_session)]
receiver = WebhookReceiver(notifications, credentials)
app = FastAPI(lifespan=lifespan, routes=[Route(HOOK, endpoint=receiver)])


@app.get("/captions")
async def caption(uri: str, request: Request, session: Session) -> Caption:
    return await answer(request, session.submit(Captioning(uri)))


@app.get("/captions/{task_id}")
async def caption_of_task(task_id: str, request: Request, session: Session) -> Caption:
    return await answer(request, session.task(task_id, Captioning))


async def answer(request: Request, task: AnalysisTask[CaptioningAnalysis]) -> Caption:
    """Wait for the result, for as long as the patience lasts and the client stays."""
    result = task.as_future()
    gone = asyncio.create_task(wait_until_gone(request))
    try:
        either: set[asyncio.Future[Any]] = {result, gone}
        await asyncio.wait(either, timeout=PATIENCE, return_when="FIRST_COMPLETED")
        if result.done():
            response = result.result()
            return {"caption": response.analysis.caption, "uri": response.entity}
        status = 404 if task.status == "unknown" else 504
        raise HTTPException(status, {"task_id": task.task_id})
    except NotFoundError as error:
        raise HTTPException(404, {"task_id": task.task_id}) from error
    except TaskLimitError as error:
        raise HTTPException(503, {"task_id": task.task_id}) from error
    finally:
        gone.cancel()
        result.cancel()
        task.abandon()


async def wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
