"""Type-level tests of tasks: checked by mypy and pyright, never run."""

import asyncio
from typing import assert_type

from cloudinary_analyze import (
    AnalysisTask,
    AnalyzeRequest,
    AnalyzeSession,
    Captioning,
    CaptioningAnalysis,
    Coco,
    OtherModel,
    Response,
    TaskStatus,
)
from cloudinary_analyze.analyses import CocoAnalysis, OtherAnalysis


async def submit_gives_the_models_own_analysis(session: AnalyzeSession) -> None:
    task = assert_type(
        session.submit(Coco("https://example.com/a.jpg")), AnalysisTask[CocoAnalysis]
    )
    assert_type(await task, Response[CocoAnalysis])
    assert_type(task.result(), Response[CocoAnalysis])
    assert_type((await task).analysis, CocoAnalysis)
    assert_type(await task.accepted(), str | None)
    assert_type(task.task_id, str | None)
    assert_type(task.status, str)
    assert_type(await task.wait(), TaskStatus)
    assert_type(task.exception(), Exception | None)
    _ = assert_type(task.as_future(), asyncio.Future[Response[CocoAnalysis]])
    other = session.submit(OtherModel("new", "https://example.com/a.jpg"), mode="task", timeout=5)
    assert_type(await other, Response[OtherAnalysis])


async def task_takes_a_class_or_a_request(session: AnalyzeSession) -> None:
    by_class = session.task("id", Coco, timeout=5)
    assert_type(await by_class, Response[CocoAnalysis])
    by_request = session.task("id", Captioning("https://example.com/a.jpg"))
    assert_type(await by_request, Response[CaptioningAnalysis])


async def asyncio_keeps_the_types(session: AnalyzeSession) -> None:
    task = session.submit(Captioning("https://example.com/a.jpg"))
    other = session.submit(Coco("https://example.com/a.jpg"))
    both = await asyncio.gather(task, other)
    assert_type(both, tuple[Response[CaptioningAnalysis], Response[CocoAnalysis]])
    assert_type(await asyncio.wait_for(task, 1), Response[CaptioningAnalysis])


async def mistakes_are_found(session: AnalyzeSession) -> None:
    await session.submit("https://example.com/a.jpg")  # type: ignore[arg-type]
    await session.submit(Coco("https://example.com/a.jpg"), mode="later")  # type: ignore[arg-type]
    await session.task(7, Coco)  # type: ignore[arg-type]
    task = session.submit(Captioning("https://example.com/a.jpg"))
    wrong: AnalysisTask[CocoAnalysis] = task  # type: ignore[assignment]
    await wrong


async def any_request(session: AnalyzeSession, request: AnalyzeRequest[CocoAnalysis]) -> None:
    assert_type(await session.submit(request), Response[CocoAnalysis])
