"""Gallery pictures match their analyses to the pixel. Fault plans depend only on a hash."""

import struct
import zlib

import pytest

from cloudinary_analyze.emulator import Emulator, FaultPlan
from cloudinary_analyze.emulator.analyses import build_analysis, compute_latency
from cloudinary_analyze.emulator.faults import HTTP_FAULTS, TASK_FAULTS
from cloudinary_analyze.emulator.gallery import (
    BACKGROUNDS,
    COLORS,
    build_gallery_scene,
    render_picture,
)
from cloudinary_analyze.emulator.models import MODELS
from cloudinary_analyze.emulator.validation import AnalyzeRequest

COLOR_NAMES = {rgb: name for name, rgb in {**COLORS, **BACKGROUNDS}.items()}
ITEMS = {
    "prompts": ("Describe this image",),
    "rejection_questions": ("Is there alcohol?", "Is there nudity?"),
    "tag_definitions": (("cat", "Is there a cat?"),),
}


def read_png(content):
    """Return width, height, and the box of pixels (x, y, width, height) of every color."""
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    position, chunks = 8, {}
    while position < len(content):
        (length,) = struct.unpack_from(">I", content, position)
        kind = content[position + 4 : position + 8]
        data = content[position + 8 : position + 8 + length]
        (checksum,) = struct.unpack_from(">I", content, position + 8 + length)
        assert checksum == zlib.crc32(kind + data)
        chunks[kind] = data
        position += length + 12
    width, height = struct.unpack_from(">II", chunks[b"IHDR"])
    palette = [tuple(chunks[b"PLTE"][i : i + 3]) for i in range(0, len(chunks[b"PLTE"]), 3)]
    pixels = zlib.decompress(chunks[b"IDAT"])
    assert len(pixels) == height * (width + 1)
    boxes = {}
    for index, rgb in enumerate(palette):
        rows = [pixels[y * (width + 1) + 1 : (y + 1) * (width + 1)] for y in range(height)]
        hits = [
            (y, row.find(index), row.rfind(index)) for y, row in enumerate(rows) if index in row
        ]
        left, right = min(hit[1] for hit in hits), max(hit[2] for hit in hits)
        top, bottom = hits[0][0], hits[-1][0]
        boxes[COLOR_NAMES[rgb]] = (left, top, right - left + 1, bottom - top + 1)
    return width, height, boxes


def analyze(model, source):
    traits = MODELS[model]
    analysis = build_analysis(AnalyzeRequest(traits, source, ITEMS.get(traits.list_field, ())))
    assert analysis is not None
    return analysis


@pytest.mark.parametrize("number", range(12))
def test_every_box_bounds_its_shape_exactly(number):
    width, height, drawn = read_png(render_picture(number))
    shapes = build_gallery_scene(number).shapes
    source = f"http://127.0.0.1:1/samples/{number}.png"

    assert (width, height) == (640, 480)
    assert {color: drawn[color] for color in drawn if color in COLORS} == {
        shape.color: (shape.x, shape.y, shape.width, shape.height) for shape in shapes
    }
    by_kind = {
        kind: {drawn[shape.color] for shape in shapes if shape.kind == kind}
        for kind in ("rectangle", "ellipse", "triangle")
    }
    everything = set().union(*by_kind.values())
    expected = {
        "coco": everything,
        "lvis": everything,
        "unidet": everything,
        "cld_fashion": everything,
        "human_anatomy": by_kind["ellipse"],
        "cld_text": by_kind["rectangle"],
    }
    for model, boxes in expected.items():
        tags = analyze(model, source)["tags"]
        found = [tuple(entry["bounding-box"]) for entries in tags.values() for entry in entries]
        assert sorted(found) == sorted(boxes), model
        assert found, model
    logos = analyze("google_logo_detection", source)["logo_annotations"]
    corners = [[(v["x"], v["y"]) for v in logo["bounding_poly"]["vertices"]] for logo in logos]
    assert sorted((c[0][0], c[0][1], c[2][0] - c[0][0], c[2][1] - c[0][1]) for c in corners) == (
        sorted(by_kind["triangle"])
    )
    caption = analyze("captioning", source)["data"]["caption"]
    assert all(f"{shape.color} {shape.kind}" in caption for shape in shapes)


def test_questions_about_drawn_shapes_get_true_answers():
    shape = build_gallery_scene(5).shapes[0]
    absent = next(c for c in COLORS if c not in {s.color for s in build_gallery_scene(5).shapes})
    questions = (f"Is there a {shape.color} {shape.kind}?", f"Is anything {absent}?")
    request = AnalyzeRequest(MODELS["ai_vision_moderation"], "http://h/samples/5.png", questions)
    analysis = build_analysis(request)
    assert [answer["value"] for answer in analysis["responses"]] == ["yes", "no"]


@pytest.mark.parametrize("model", MODELS)
def test_results_depend_only_on_the_source(model):
    answers = [analyze(model, f"https://x.test/{index}.jpg") for index in range(60)]
    assert answers == [analyze(model, f"https://x.test/{index}.jpg") for index in range(60)]
    assert len({str(answer) for answer in answers}) > 1


def test_moderation_is_mostly_no_with_some_yes_and_unknown():
    values = [
        response["value"]
        for index in range(400)
        for response in analyze("ai_vision_moderation", f"https://x.test/{index}")["responses"]
    ]
    assert set(values) == {"yes", "no", "unknown"}
    assert values.count("no") > 0.7 * len(values)


@pytest.mark.parametrize(
    ("model", "count", "low", "high"),
    [("ai_vision_general", 1, 1.9, 3.9), ("ai_vision_general", 4, 5.5, 8.5), ("coco", 0, 0.5, 1)],
)
def test_realistic_latency_matches_live_measurements(model, count, low, high):
    seconds = [
        compute_latency(AnalyzeRequest(MODELS[model], f"https://x.test/{index}", ("a",) * count))
        for index in range(50)
    ]
    assert all(low <= second <= high for second in seconds)
    assert len(set(seconds)) > 40


def test_a_plan_hits_its_share_of_sources_repeatably():
    plan = FaultPlan(error_500=0.2, slow=0.1, forged=0.5)
    sources = [f"https://x.test/{index}" for index in range(2000)]
    faults = [plan.choose_http_fault(7, "coco", source) for source in sources]
    assert faults == [plan.choose_http_fault(7, "coco", source) for source in sources]
    assert faults != [plan.choose_http_fault(8, "coco", source) for source in sources]
    assert 300 < faults.count("error_500") < 500
    assert 130 < faults.count("slow") < 270
    assert set(faults) == {"error_500", "slow", None}
    forged = sum(plan.choose_task_faults(7, "coco", source, 1) == ("forged",) for source in sources)
    assert 900 < forged < 1100


def test_invalid_options_are_refused_with_a_message():
    assert {*HTTP_FAULTS, *TASK_FAULTS} <= set(FaultPlan.__slots__)
    with pytest.raises(ValueError, match=r"add up to 1\.2"):
        FaultPlan(error_500=0.6, slow=0.6)
    with pytest.raises(ValueError, match="lost is a probability"):
        FaultPlan(lost=1.5)
    with pytest.raises(ValueError, match="No feature is called tokens"):
        Emulator(quotas={"tokens": 1})
    with pytest.raises(ValueError, match="No feature is called vision"):
        Emulator(unsubscribed={"vision"})
    with pytest.raises(ValueError, match="begins with 'emulator-'"):
        Emulator(cloud_name="demo")
    with pytest.raises(ValueError, match="latency is 'realistic' or a number"):
        Emulator(latency="slow")
    with pytest.raises(RuntimeError, match="not running"):
        _ = Emulator().url
