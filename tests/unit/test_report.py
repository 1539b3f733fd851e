"""The report counts every line, shows a bounded gallery, and escapes all recorded text."""

import base64
import hashlib
import json
import math
import re
import sys
import tracemalloc
from datetime import UTC, datetime
from functools import partial
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudinary_analyze import ConfigurationError
from cloudinary_analyze.results import report as report_module
from cloudinary_analyze.results.findings import NOTHING, Findings, Mark, read_findings
from cloudinary_analyze.results.report import gallery as gallery_module
from cloudinary_analyze.results.report.gallery import Gallery, embed_json, find_address
from cloudinary_analyze.results.statistics import Durations, Statistics, build_axis

JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


def build(analysis=None, **fields):
    return {
        "index": 0, "line": 1, "source": "https://x.test/a.jpg", "model": "coco", "key": None,
        "status": "error" if analysis is None else "ok", "analysis": analysis, "entity": None,
        "request_id": "r", "limits": [], "seconds": 0.25, "error": None, **fields,
    }  # fmt: skip


def count(*records):
    statistics = Statistics()
    for record in records:
        statistics.add(record, read_findings(record["analysis"]))
    return statistics


def test_only_paid_responses_use_units():
    def charge(remaining):
        return [{"type": "ai_vision", "used_by_request": 5, "remaining": remaining}]

    statistics = count(
        build({}, limits=charge(80)),
        build({}, limits=charge(70), restored=True),
        build(error={"type": "ServerError", "ambiguous": True}, limits=charge(60)),
        build({}, limits=charge(90)),
    )
    assert statistics.find_used("ai_vision") == 10
    assert statistics.quotas["ai_vision"].remaining == 60
    assert [cause.ambiguous for cause in statistics.causes.values()] == [1]


def test_boxes_and_notes_are_read_from_every_form(sample):
    def read(model):
        return read_findings(sample(model)["data"]["analysis"]).marks

    assert read("coco")[0] == Mark("person", 0.9912, (302.5, 58.25, 161.75, 389.5))
    assert [mark.score for mark in read("coco")] == [0.9912, 0.9477, 0.8734]
    assert read("google_logo_detection") == (Mark("google", 0.980325, (12, 42, 427, 243)),)
    assert read("cld_fashion")[0].note == "sleeve length: long (wrist), closure type: zip-up"
    assert read("shop_classifier")[0].box is None


keys = st.sampled_from(
    ["tags", "data", "caption", "responses", "value", "prompt", "detections", "name", "labels",
     "label_annotations", "label", "score", "logo_annotations", "description", "bounding_poly",
     "vertices", "x", "y", "quality", "bounding-box", "confidence", "attributes"]
)  # fmt: skip


@pytest.mark.slow
@given(st.recursive(JSON, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(keys, inner)))
def test_no_analysis_breaks_the_report(analysis):
    """Every recorded analysis is counted, embedded and readable."""
    record = build(analysis, limits=analysis, error=analysis, seconds=analysis, source=analysis)
    for status in ("ok", "error"):
        record["status"] = status
        findings = read_findings(analysis)
        gallery = Gallery()
        gallery.add(record, findings)
        count(record)
        (picture,) = map(json.loads, gallery.dump())
        assert len(picture["results"]) == 1


def test_an_analysis_of_an_unknown_form_is_shown_as_json():
    findings = read_findings({"depth": [1, 2], "model_version": 1})
    assert findings.rest == '{"depth": [1, 2], "model_version": 1}'
    assert read_findings({"tags": [], "model_version": 1}) == NOTHING


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=60), st.floats(0, 1))
def test_quantiles_are_accurate_to_three_percent(values, quantile):
    durations = Durations()
    for value in values:
        durations.add(value)
    exact = sorted(values)[max(1, math.ceil(quantile * len(values))) - 1]
    assert durations.compute_quantile(quantile) == pytest.approx(exact, rel=0.03)
    axis = build_axis([durations])
    assert sum(durations.spread(axis)) == len(values)
    assert all(0 <= place <= 1 for place, _ in axis.ticks())


def test_models_labels_causes_and_quotas_are_counted():
    quota = {"type": "object_detection", "used_by_request": 1, "limit": 500, "reset_time": None}
    refusal = {"type": "RateLimitedError", "status": 429, "code": "MA_1", "message": "Slow."}
    answers = [{"prompt": "Bad?", "value": "Yes"}, {"prompt": "Worse?", "value": "maybe"}]
    statistics = count(
        build({"tags": {"dog": [{"confidence": 0.97}, {"confidence": 1}]}}, limits=[{**quota, "remaining": 7}]),
        build({"tags": {"dog": [{"confidence": 0.02}]}}, limits=[{**quota, "remaining": 9}]),
        build({"responses": answers}, model="ai_vision_moderation"),
        build({"quality": "low", "score": 0.1}, model="image_quality"),
        build(error={**refusal, "ambiguous": True}, line=4),
        build(error={**refusal, "message": "Slower."}, line=5),
        build(model=None, error={"type": "InvalidRequestError", "message": "No URL."}, line=6),
    )  # fmt: skip
    assert (statistics.total, statistics.ok, statistics.failed) == (7, 4, 3)
    assert (statistics.models["coco"].ok, statistics.models["coco"].failed) == (2, 2)
    assert statistics.labels == {"dog": 2}  # results, not instances
    assert statistics.models["coco"].scores.columns == [1] + [0] * 18 + [2]
    assert statistics.questions == {"Bad?": {"yes": 1}, "Worse?": {"unknown": 1}}
    assert statistics.qualities == {"low": 1}
    cause = statistics.causes["RateLimitedError 429 MA_1"]
    assert (cause.count, cause.ambiguous, cause.lines, cause.message) == (2, 1, [4, 5], "Slow.")
    assert statistics.causes["bad input line"].lines == [6]
    used = statistics.quotas["object_detection"]
    assert (used.used, used.remaining, used.limit) == (2, 7, 500)
    assert (statistics.find_used("object_detection"), statistics.find_used("x")) == (2, 0)
    assert cause.example == "line 4: Slow."


def test_restored_responses_use_no_units():
    quota = {"type": "object_detection", "used_by_request": 1, "remaining": 7, "limit": 500}
    records = [
        build({"tags": {}}, limits=[quota], restored=restored) for restored in (False, True, True)
    ]
    statistics = count(*records)
    assert statistics.find_used("object_detection") == 1
    assert statistics.quotas["object_detection"].remaining == 7
    assert statistics.durations.count == statistics.ok == 3


def test_pictures_are_grouped_in_order_and_limited():
    gallery = Gallery(most_pictures=2)
    for index, (source, model) in enumerate(
        [("b", "coco"), ("c", "coco"), ("d", "x"), ("b", "lvis")]
    ):
        record = build({"tags": {}}, source=source, model=model, index=9 - index)
        gallery.add(record, NOTHING)
    pictures = [json.loads(picture) for picture in gallery.dump()]
    shown = [(each["source"], [result["model"] for result in each["results"]]) for each in pictures]
    assert shown == [("b", ["lvis", "coco"]), ("c", ["coco"])]
    assert (len(gallery), gallery.left_out) == (2, 1)


def test_a_result_replaces_a_failure_but_not_vice_versa():
    gallery = Gallery()
    for record in (build(key="k"), build({"tags": {}}, key="k"), build(key="k")):
        gallery.add(record, NOTHING)
    (picture,) = map(json.loads, gallery.dump())
    assert [result["ok"] for result in picture["results"]] == [True]


def read_pictures(gallery):
    return [json.loads(picture) for picture in gallery.dump()]


def test_failures_at_the_end_are_shown_too(monkeypatch):
    monkeypatch.setattr(gallery_module, "MOST_BYTES", 2_000)
    gallery = Gallery(most_pictures=7)
    for index in range(100):
        source = f"https://x.test/{index}"
        record = build({"tags": {}}, source=source, index=index, key=str(index))
        if index >= 90:
            record = build(source=source, index=index, key=str(index))
        gallery.add(record, NOTHING)
    pictures = read_pictures(gallery)
    shown = [each["source"].rpartition("/")[2] for each in pictures]
    assert shown[-10:] == [str(index) for index in range(90, 100)]
    assert len(shown) + gallery.left_out == 100
    assert 13 < len(shown) < 18
    assert gallery.complete_failures


def test_memory_for_failures_is_bounded(monkeypatch):
    monkeypatch.setattr(gallery_module, "MOST_FAILURES", 2_000)
    gallery = Gallery()
    for index in range(100):
        gallery.add(build(source=f"https://x.test/{index}", index=index, key=str(index)), NOTHING)
    assert 0 < len(gallery) < 20
    assert not gallery.complete_failures


def test_results_are_shortened_before_they_are_left_out(monkeypatch):
    monkeypatch.setattr(gallery_module, "MOST_BYTES", 20_000)
    gallery = Gallery()
    marks = tuple(Mark(f"label {number}", 0.5) for number in range(50))
    for index in range(30):
        record = build({"tags": {}}, source=f"https://x.test/{index}", index=index, key=str(index))
        gallery.add(record, Findings(marks=marks))
    results = [each["results"][0] for each in read_pictures(gallery)]
    assert gallery.shortened
    assert len(results[0]["marks"]) == 50
    assert (len(results[-1]["marks"]), results[-1]["more"]) == (6, 44)


@pytest.mark.parametrize(
    ("source", "embedded"),
    [
        ("http://127.0.0.1:8080/samples/7.png", True),
        ("http://localhost/samples/7.png", True),
        ("http://[::1]:1/samples/7.png", True),
        ("https://shop.example/samples/7.png", False),
        ("http://127.0.0.1:8080/samples/cat.png", False),
        ("http://127.0.0.1:8080/other/7.png", False),
    ],
)
def test_pictures_of_a_local_gallery_are_embedded(source, embedded):
    gallery = Gallery()
    gallery.add(build({"tags": {}}, source=source), NOTHING)
    (picture,) = read_pictures(gallery)
    assert picture["source"] == source
    assert picture["url"].startswith("data:image/png;base64," if embedded else "http")


@given(st.lists(st.floats(0.001, 100_000), min_size=1, max_size=20))
def test_texts_of_an_axis_never_overprint(values):
    durations = Durations()
    for value in values:
        durations.add(value)
    axis = build_axis([durations])
    places = [place for place, _ in axis.ticks()]
    assert places
    assert all(right - left >= 0.16 for left, right in pairwise(places))
    assert sum(durations.spread(axis)) == len(values)
    assert (axis.last + 1 - axis.first) % axis.columns == 0


def test_the_header_names_title_input_models_and_date(tmp_path):
    from cloudinary_analyze.results.report import write_report

    lines = [json.dumps(build({"tags": {}}, model=model)) for model in ("coco", "lvis")]
    made = datetime(2026, 3, 4, 5, 6, tzinfo=UTC)
    write_report(lines, tmp_path / "r.html", title="Spring <1>", source="a & b.csv", made=made)
    page = (tmp_path / "r.html").read_text("utf-8")
    header = page[page.index("<header>") : page.index("</header>")]
    for text in ("Spring &lt;1&gt;", "a &amp; b.csv", "coco, lvis", "2026-03-04 05:06 UTC"):
        assert text in header
    assert "<title>Spring &lt;1&gt;: 2 results</title>" in page


def test_memory_is_bounded_whatever_the_lines_hold(monkeypatch):
    """Many names, long texts and repeated pictures take bounded memory."""
    monkeypatch.setattr(gallery_module, "MOST_BYTES", 8 * 2**20)

    def run(rounds):
        statistics, gallery = Statistics(), Gallery(most_pictures=50)
        for number in range(rounds):
            text = f"{number} " * 400
            findings = Findings(caption=text, marks=(Mark(text),) * 500)
            record = build({}, source=f"https://x.test/{number % 100}", model=text, key=text)
            statistics.add(record, findings)
            gallery.add(record, findings)
            statistics.add({**record, "status": "error", "error": {"type": text}}, NOTHING)
        return statistics, gallery

    tracemalloc.start()
    try:
        kept = run(2_000)
        before = tracemalloc.get_traced_memory()[0]
        del kept
        kept = run(4_000)
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert kept[0].total == 8_000
    # the report keeps up to 20,000 labels of up to 200 characters
    assert after - before < 2_000 * 1_000


@given(st.text() | st.sampled_from(["</script>", "<!--", "]]>", "\u2028", "&lt;", "\ud800"]))
def test_embedded_json_cannot_end_its_script(text):
    embedded = embed_json({text: [text]})
    assert embedded.isascii()
    assert not set("<>&") & set(embedded)
    assert json.loads(embedded) == {text: [text]}


@pytest.mark.parametrize("source", ["https://x.test/a.jpg?b=1", "HTTP://x.test/", "http://[::1]/a"])
def test_http_urls_become_links(source):
    assert find_address(source) == source


@pytest.mark.parametrize(
    "source",
    ["javascript:alert(1)", "JavaScript://x%0aalert(1)", "data:text/html,x", "file:///etc/passwd",
     "asset:0123", "//x.test/a", " https://x.test", "java\nscript://x", "https:alert(1)", "https://", ""],
)  # fmt: skip
def test_other_urls_do_not_become_links(source):
    assert find_address(source) is None


class Elements(HTMLParser):
    """The elements of a page and the texts in them."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.open = False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append([tag, dict(attributes), ""])
        self.open = True

    def handle_endtag(self, tag):
        self.open = False

    def handle_data(self, data):
        if self.open:
            self.found[-1][2] += data

    def all(self, tag):
        return [(attributes, text) for name, attributes, text in self.found if name == tag]


def write(path, *records):
    pytest.importorskip("jinja2")
    from cloudinary_analyze.results.report import write_report

    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    return write_report(lines, path), path.read_text("utf-8")


def test_the_policy_allows_only_its_script_and_style(tmp_path):
    _, page = write(tmp_path / "r.html", build({"tags": {"dog": [{"confidence": 0.5}]}}))
    elements = Elements(page)
    policy = next(
        attributes["content"]
        for attributes, _ in elements.all("meta")
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "http: https: data:"
    (style,) = elements.all("style")
    data, script = elements.all("script")
    assert data[0] == {"type": "application/json", "id": "data"}
    for name, (_, text) in (("style-src", style), ("script-src", script)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[name] == f"'sha256-{digest}'"
    assert not elements.all("link")
    assert not [attributes for _, attributes, _ in elements.found if "style" in attributes]
    assert not re.search(r"@import|url\(", style[1])
    for _, attributes, _ in elements.found:
        assert not {"src", "href"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]


def test_recorded_text_is_never_markup(tmp_path):
    attack = "'\"></svg></script><script>alert(1)</script><img src=x onerror=alert(1)>"
    limits = [
        {"type": attack, "used_by_request": 1, "remaining": 1, "limit": 2, "reset_time": attack}
    ]
    _, page = write(
        tmp_path / "r.html",
        build({"tags": {attack: [{"confidence": 0.5}]}}, model=attack, source=attack, limits=limits),
        build({"responses": [{"prompt": attack, "value": attack}]}),
        build({"quality": attack}),
        build(error={"type": attack, "message": attack, "code": attack}),
    )  # fmt: skip
    assert "<script>alert" not in page
    assert "<img" not in page.partition('id="data"')[0]
    assert len(Elements(page).all("script")) == 2


def test_the_page_says_what_it_leaves_out(tmp_path, monkeypatch):
    monkeypatch.setattr(report_module, "Gallery", partial(Gallery, most_pictures=10_000))
    records = [build({"tags": {}}, source=f"https://x.test/{n}", key=str(n)) for n in range(10_002)]
    written, page = write(tmp_path / "r.html", *records, '{"index": 4, "sta')
    assert (written.results, written.pictures, written.bad_lines) == (10_002, 10_000, 1)
    assert "10,002 answers" in page
    assert "shows 10,000 pictures; 2 further results are in the figures only" in page
    assert "1 line of the file was not a result and is left out" in page
    assert len(json.loads(Elements(page).all("script")[0][1])) == 10_000


def test_a_report_without_results_is_a_valid_page(tmp_path):
    written, page = write(tmp_path / "r.html")
    assert written.results == 0
    assert "0 answers" in page


def test_an_unpaired_surrogate_does_not_break_the_page(tmp_path):
    _, page = write(tmp_path / "r.html", build({"tags": {"a\ud800": [{}]}}, model="m\udfff"))
    assert json.loads(Elements(page).all("script")[0][1])[0]["results"][0]["marks"] == [["a\ud800"]]


def test_without_the_extra_the_error_says_what_to_install(monkeypatch, tmp_path):
    from cloudinary_analyze.results.report import write_report

    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'cloudinary-analyze\[report\]'"):
        write_report([], tmp_path / "r.html")


def test_the_header_names_models_only(tmp_path):
    bad = build(status="error", model=None, error={"type": "InvalidRequestError"}, line=7)
    _, page = write(tmp_path / "r.html", build({"tags": {}}, model="coco"), bad)
    assert "<dt>Models</dt><dd>coco</dd>" in page
    assert "bad input lines" in page
