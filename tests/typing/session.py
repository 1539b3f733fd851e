"""Type-level tests of the public names. Checked by mypy, never run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, assert_type

import yarl

from cloudinary_analyze import (
    AIVisionGeneral,
    AIVisionGeneralAnalysis,
    AIVisionModeration,
    AIVisionModerationAnalysis,
    AIVisionTagging,
    AIVisionTaggingAnalysis,
    AnalyzeRequest,
    AnalyzeSession,
    Asset,
    BoundingBox,
    Captioning,
    CaptioningAnalysis,
    CldFashion,
    CldFashionAnalysis,
    CldText,
    CldTextAnalysis,
    Coco,
    CocoAnalysis,
    Detection,
    GoogleLogoDetection,
    GoogleLogoDetectionAnalysis,
    GoogleTagging,
    GoogleTaggingAnalysis,
    HumanAnatomy,
    HumanAnatomyAnalysis,
    ImageQuality,
    ImageQualityAnalysis,
    Limit,
    Lvis,
    LvisAnalysis,
    OtherAnalysis,
    OtherModel,
    Outcome,
    OutcomeStream,
    Response,
    Settings,
    ShopClassifier,
    ShopClassifierAnalysis,
    TagDefinition,
    Unidet,
    UnidetAnalysis,
    Uri,
    WatermarkDetection,
    WatermarkDetectionAnalysis,
)

URL = "https://example.com/a.jpg"


async def every_model_has_its_own_analysis(session: AnalyzeSession) -> None:
    assert_type(await session.analyze(Captioning(URL)), Response[CaptioningAnalysis])
    assert_type(await session.analyze(CldFashion(URL)), Response[CldFashionAnalysis])
    assert_type(await session.analyze(CldText(URL)), Response[CldTextAnalysis])
    assert_type(await session.analyze(Coco(URL)), Response[CocoAnalysis])
    assert_type(await session.analyze(GoogleTagging(URL)), Response[GoogleTaggingAnalysis])
    assert_type(
        await session.analyze(GoogleLogoDetection(URL)), Response[GoogleLogoDetectionAnalysis]
    )
    assert_type(await session.analyze(HumanAnatomy(URL)), Response[HumanAnatomyAnalysis])
    assert_type(await session.analyze(ImageQuality(URL)), Response[ImageQualityAnalysis])
    assert_type(await session.analyze(Lvis(URL)), Response[LvisAnalysis])
    assert_type(await session.analyze(ShopClassifier(URL)), Response[ShopClassifierAnalysis])
    assert_type(await session.analyze(Unidet(URL)), Response[UnidetAnalysis])
    assert_type(
        await session.analyze(WatermarkDetection(URL)), Response[WatermarkDetectionAnalysis]
    )
    assert_type(await session.analyze(OtherModel("new", URL, {"a": 1})), Response[OtherAnalysis])
    assert_type(
        await session.analyze(AIVisionGeneral(URL, prompts=["a"])),
        Response[AIVisionGeneralAnalysis],
    )
    assert_type(
        await session.analyze(AIVisionModeration(URL, rejection_questions=["a"])),
        Response[AIVisionModerationAnalysis],
    )
    assert_type(
        await session.analyze(
            AIVisionTagging(URL, tag_definitions=[TagDefinition("a", "b")]), timeout=5
        ),
        Response[AIVisionTaggingAnalysis],
    )


async def analyses_are_typed_to_the_leaf(session: AnalyzeSession) -> None:
    response = await session.analyze(Coco(Asset("abc")))
    assert_type(response.analysis.tags["person"], tuple[Detection, ...])
    assert_type(response.analysis.tags["person"][0].bounding_box, BoundingBox | None)
    assert_type(response.analysis.detections[0].confidence, float | None)
    assert_type(response.limits, tuple[Limit, ...])
    assert_type(response.raw, Mapping[str, Any])
    assert_type((await session.analyze(Captioning(Uri(URL)))).analysis.caption, str)
    quality = (await session.analyze(ImageQuality(URL))).analysis
    assert_type(quality.score, float | None)
    general = await session.analyze(AIVisionGeneral(URL, prompts=["a"]))
    assert_type(general.analysis.answers, tuple[str, ...])


def build_coco(row: tuple[int, str]) -> Coco:
    return Coco(row[1])


async def map_knows_its_items_and_its_analyses(
    session: AnalyzeSession,
    urls: list[str],
    later: AsyncIterator[str],
    requests: list[Captioning],
) -> None:
    assert_type(session.map(urls, Captioning), OutcomeStream[str, CaptioningAnalysis])
    assert_type(session.map(later, Coco, ordered=True), OutcomeStream[str, CocoAnalysis])
    assert_type(
        session.map([(1, URL)], build_coco, window=5), OutcomeStream[tuple[int, str], CocoAnalysis]
    )
    assert_type(
        session.map([(1, URL)], lambda row: ImageQuality(row[1])),
        OutcomeStream[tuple[int, str], ImageQualityAnalysis],
    )
    async with session.map(urls, Captioning) as stream:
        async for outcome in stream:
            assert_type(outcome, Outcome[str, CaptioningAnalysis])
            assert_type(outcome.item, str)
            assert_type(outcome.response, Response[CaptioningAnalysis] | None)
            assert_type(outcome.error, Exception | None)
            assert_type(outcome.unwrap().analysis.caption, str)
    async for of_request in session.map(requests):
        assert_type(of_request.unwrap().analysis, CaptioningAnalysis)
    outcomes = await session.analyze_all(requests)
    assert_type(outcomes, list[Outcome[AnalyzeRequest[CaptioningAnalysis], CaptioningAnalysis]])


def url_objects_are_sources() -> None:
    assert_type(Captioning(yarl.URL(URL)).source, Uri | Asset)
    assert_type(Uri(yarl.URL(URL)).uri, str)
    assert_type(Settings(host=yarl.URL(URL)).host, str | None)


async def mistakes_are_seen(session: AnalyzeSession) -> None:
    Captioning(5)  # type: ignore[arg-type]
    Captioning(Path("a.jpg"))  # type: ignore[arg-type]
    Settings(on_missing_result="retry")  # type: ignore[arg-type]
    AIVisionGeneral(URL)  # type: ignore[call-arg]
    AIVisionGeneral(URL, ["positional"])  # type: ignore[call-arg]
    await session.analyze(URL)  # type: ignore[arg-type]
    session.map([URL])  # type: ignore[arg-type]
    response = await session.analyze(Captioning(URL))
    response.analysis.tags  # type: ignore[attr-defined]  # noqa: B018
    response.analysis = response.analysis  # type: ignore[misc]


async def mixed_models_are_allowed(session: AnalyzeSession) -> None:
    requests: list[AnalyzeRequest[Any]] = [Captioning(URL), Coco(URL)]
    async for outcome in session.map(requests):
        assert_type(outcome.unwrap(), Response[Any])
