"""Every model: its request, and every field of its analysis."""

from collections.abc import Iterator, Mapping
from typing import Any

from cloudinary_analyze import (
    MODELS,
    AIVisionGeneral,
    AIVisionGeneralAnalysis,
    AIVisionModeration,
    AIVisionModerationAnalysis,
    AIVisionTagging,
    AIVisionTaggingAnalysis,
    Analysis,
    AnalyzeRequest,
    AnalyzeSession,
    Asset,
    AttributeValue,
    BoundingBox,
    Captioning,
    CaptioningAnalysis,
    CldFashion,
    CldFashionAnalysis,
    CldText,
    CldTextAnalysis,
    Coco,
    CocoAnalysis,
    DetectedTags,
    Detection,
    DetectionAnalysis,
    GoogleLabel,
    GoogleLogoDetection,
    GoogleLogoDetectionAnalysis,
    GoogleTagging,
    GoogleTaggingAnalysis,
    HumanAnatomy,
    HumanAnatomyAnalysis,
    ImageQuality,
    ImageQualityAnalysis,
    Logo,
    LogoVertex,
    Lvis,
    LvisAnalysis,
    ModerationAnswer,
    OtherAnalysis,
    OtherModel,
    Response,
    ShopClassifier,
    ShopClassifierAnalysis,
    TagDefinition,
    Unidet,
    UnidetAnalysis,
    Uri,
    VisionAnswer,
    VisionTag,
    Watermark,
    WatermarkDetection,
    WatermarkDetectionAnalysis,
    find_request_type,
)

URL = "https://example.com/a.jpg"


def build_requests(source: str | Uri | Asset) -> list[AnalyzeRequest[Analysis]]:
    """Return requests of every model, typed as requests of any analysis."""
    return [
        AIVisionGeneral(source, prompts=["What is it?"]),
        AIVisionModeration(source, rejection_questions=("Is it red?",)),
        AIVisionTagging(source, tag_definitions=[TagDefinition("cat", "A cat?")]),
        AIVisionTagging(source, tag_definitions={"cat": "A cat?"}),
        Captioning(source),
        CldFashion(source),
        CldText(source),
        Coco(source),
        GoogleLogoDetection(source),
        GoogleTagging(source),
        HumanAnatomy(source),
        ImageQuality(source),
        Lvis(source),
        ShopClassifier(source),
        Unidet(source),
        WatermarkDetection(source),
        OtherModel("new_model", source, {"level": 3}),
    ]


async def analyze_each(session: AnalyzeSession, uri: Uri) -> Iterator[Analysis]:
    """Call each model; the analysis has the model's type."""
    general: AIVisionGeneralAnalysis = (
        await session.analyze(AIVisionGeneral(uri, prompts="What is it?"))
    ).analysis
    moderation: AIVisionModerationAnalysis = (
        await session.analyze(AIVisionModeration(uri, rejection_questions=["Is it red?"]))
    ).analysis
    tagging: AIVisionTaggingAnalysis = (
        await session.analyze(AIVisionTagging(uri, tag_definitions={"cat": "A cat?"}))
    ).analysis
    captioning: CaptioningAnalysis = (await session.analyze(Captioning(uri))).analysis
    fashion: CldFashionAnalysis = (await session.analyze(CldFashion(uri))).analysis
    text: CldTextAnalysis = (await session.analyze(CldText(uri))).analysis
    coco: CocoAnalysis = (await session.analyze(Coco(uri))).analysis
    logos: GoogleLogoDetectionAnalysis = (await session.analyze(GoogleLogoDetection(uri))).analysis
    google: GoogleTaggingAnalysis = (await session.analyze(GoogleTagging(uri))).analysis
    anatomy: HumanAnatomyAnalysis = (await session.analyze(HumanAnatomy(uri))).analysis
    quality: ImageQualityAnalysis = (await session.analyze(ImageQuality(uri))).analysis
    lvis: LvisAnalysis = (await session.analyze(Lvis(uri))).analysis
    shop: ShopClassifierAnalysis = (await session.analyze(ShopClassifier(uri))).analysis
    unidet: UnidetAnalysis = (await session.analyze(Unidet(uri))).analysis
    marks: WatermarkDetectionAnalysis = (await session.analyze(WatermarkDetection(uri))).analysis
    other: OtherAnalysis = (await session.analyze(OtherModel("new_model", uri))).analysis

    answers: tuple[VisionAnswer, ...] = general.responses
    verdicts: tuple[ModerationAnswer, ...] = moderation.responses
    tags: tuple[VisionTag, ...] = tagging.tags
    labels: tuple[GoogleLabel, ...] = google.labels
    found: tuple[Watermark, ...] = marks.detections
    print(*general.answers, *(answer.value for answer in answers))
    print(moderation.rejected, *(verdict.prompt or verdict.value for verdict in verdicts))
    print(*tagging.names, *(tag.name for tag in tags), captioning.caption.upper())
    print(*(label.label for label in labels), *(mark.name for mark in found))
    print(quality.quality, round(quality.score or 0.0, 2), quality.confidence)
    for logo in logos.logos:
        print(describe_logo(logo))
    raw: Mapping[str, Any] = other.raw
    print(raw.keys(), other.model_version)
    detecting: list[DetectionAnalysis] = [fashion, text, coco, anatomy, lvis, shop, unidet]
    for analysis in detecting:
        print(*describe_detections(analysis))
    return iter(detecting)


def describe_logo(logo: Logo) -> str:
    """Return a line."""
    corners: tuple[LogoVertex, ...] = logo.vertices
    return f"{logo.description} {logo.mid} {logo.score} {[(each.x, each.y) for each in corners]}"


def describe_detections(analysis: DetectionAnalysis) -> Iterator[str]:
    """Yield a line for each detection."""
    tags: DetectedTags = analysis.tags
    for label, detections in tags.items():
        for detection in detections:
            yield f"{label}: {describe_detection(detection)}"


def describe_detection(detection: Detection) -> str:
    """Return a line."""
    box: BoundingBox | None = detection.bounding_box
    values: list[AttributeValue] = [
        value for found in detection.attributes.values() for value in found
    ]
    area = 0.0 if box is None else box.width * box.height
    return f"{detection.label} {area} {detection.categories} {[each.score for each in values]}"


def read_stored(model: str, raw: Mapping[str, Any]) -> Response[Any]:
    """Read a response of a model that is known only at run time."""
    kind = MODELS.get(model) or find_request_type(model)
    return Response.from_raw(kind, raw)
