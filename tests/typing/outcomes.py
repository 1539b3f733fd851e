"""Type-level tests of outcomes and of lists with several models. Checked, never run.

mypy joins the analyses of a mixed list to `Analysis`; pyright infers their union. Both must be
without an error, so this file assigns where they differ and asserts where they agree.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, assert_type

from cloudinary_analyze import (
    Analysis,
    AnalysisTask,
    AnalyzeRequest,
    AnalyzeSession,
    Answered,
    Captioning,
    CaptioningAnalysis,
    Coco,
    CocoAnalysis,
    DetectionAnalysis,
    Failed,
    ImageQuality,
    Lvis,
    Outcome,
    OutcomeStream,
    Response,
)
from cloudinary_analyze.outcomes import AnyOutcome

URL = "https://example.com/a.jpg"

Captioned = Outcome[str, CaptioningAnalysis]


def an_error_that_is_none_narrows(outcome: Captioned) -> str:
    if outcome.error is None:
        assert_type(outcome, Answered[str, CaptioningAnalysis])
        assert_type(outcome.request, AnalyzeRequest[CaptioningAnalysis])
        return outcome.response.analysis.caption
    assert_type(outcome, Failed[str, CaptioningAnalysis])
    assert_type(outcome.error, Exception)
    return str(outcome.error)


def a_response_that_is_not_none_narrows(outcome: Captioned) -> str:
    if outcome.response is not None:
        return outcome.response.analysis.caption
    raise outcome.error


def isinstance_narrows(outcome: Captioned) -> str:
    if isinstance(outcome, Failed):
        assert_type(outcome.request, AnalyzeRequest[CaptioningAnalysis] | None)
        raise outcome.error
    assert_type(outcome, Answered[str, CaptioningAnalysis])
    return outcome.response.analysis.caption


def match_narrows_and_is_exhaustive(outcome: Captioned) -> str:
    match outcome:
        case Answered(item=url, response=response):
            assert_type(url, str)
            assert_type(response, Response[CaptioningAnalysis])
            return response.analysis.caption
        case Failed(item=url, error=error):
            return f"{url}: {error}"


def fields_are_shared(outcome: Captioned) -> None:
    assert_type(outcome.item, str)
    assert_type(outcome.index, int)
    assert_type(outcome.restored, bool)
    assert_type(outcome.seconds, float)
    assert_type(outcome.queued, float)
    assert_type(outcome.unwrap(), Response[CaptioningAnalysis])
    anything: AnyOutcome = outcome
    wider: Outcome[object, Analysis] = outcome
    print(anything, wider)


async def lists_of_several_models(session: AnalyzeSession) -> None:
    for outcome in await session.analyze_all([Captioning(URL), Coco(URL)]):
        if outcome.error is None:
            analysis: Analysis = outcome.response.analysis
            if isinstance(analysis, CocoAnalysis):
                print(analysis.detections)
    requests = [Captioning(URL), Coco(URL), ImageQuality(URL)]
    async with session.map(requests) as stream:
        async for one in stream:
            request: AnalyzeRequest[Analysis] | None = one.request
            response: Response[Analysis] | None = one.response
            print(one.item, request, response)
    wider: OutcomeStream[object, Analysis] = session.map([Captioning(URL)])
    detections: list[AnalyzeRequest[DetectionAnalysis]] = [Coco(URL), Lvis(URL)]
    for detected in await session.analyze_all(detections):
        assert_type(detected.unwrap().analysis, DetectionAnalysis)
    print(wider)


async def generators_of_several_models(
    session: AnalyzeSession,
    later: AsyncIterator[Captioning | Coco],
    choose: Callable[[str], Captioning | Coco],
) -> None:
    async for outcome in session.map(later):
        first: Analysis = outcome.unwrap().analysis
        print(first)
    async for chosen in session.map([URL], choose):
        assert_type(chosen.item, str)
        second: Analysis = chosen.unwrap().analysis
        print(second)


async def handles_of_several_models(session: AnalyzeSession) -> None:
    handles: list[AnalysisTask[Analysis]] = [
        session.submit(Captioning(URL)),
        session.submit(Coco(URL)),
    ]
    for handle in handles:
        assert_type(await handle, Response[Analysis])
    narrow: AnalysisTask[CocoAnalysis] = session.submit(Coco(URL))
    handles.append(narrow)


async def one_of_two(session: AnalyzeSession, request: Captioning | Coco) -> None:
    response: Response[Analysis] = await session.analyze(request)
    print(response)


async def mistakes_are_seen(session: AnalyzeSession, outcome: Captioned) -> None:
    outcome.response.analysis  # type: ignore[union-attr]  # noqa: B018
    narrow: Response[CocoAnalysis] = outcome.unwrap()  # type: ignore[assignment]
    detecting: AnalyzeRequest[DetectionAnalysis] = Captioning(URL)  # type: ignore[assignment]
    session.map([URL], Captioning, key=len)  # type: ignore[arg-type]
    with session.map([URL], Captioning) as stream:  # type: ignore[attr-defined]
        print(stream, narrow, detecting)
    for each in session.map([URL], Captioning):  # type: ignore[attr-defined]
        print(each)
    await session.map([URL], Captioning)  # type: ignore[misc]
    Answered(item=1, index=0)  # type: ignore[call-arg]
    Failed(item=1, index=0, error=None)  # type: ignore[arg-type]
    outcome.index = 5  # type: ignore[misc]
    unknown: Outcome[Any, Any] = Failed(item=1, index=0, error=ValueError())
    print(unknown)
