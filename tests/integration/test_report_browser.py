"""The report in a real browser, checked by the page and its pixels."""

import asyncio
import base64
import json
import os
import shutil
import struct
import zlib
from contextlib import asynccontextmanager

import aiohttp
import pytest

pytest.importorskip("jinja2")

from cloudinary_analyze import AnalyzeSession, Captioning, Coco, Credentials
from cloudinary_analyze.emulator import Emulator
from cloudinary_analyze.emulator.gallery import COLORS, build_gallery_scene, render_picture
from cloudinary_analyze.results.records import build_record, dump_record
from cloudinary_analyze.results.report import write_report

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None and not os.environ.get("CI"), reason="needs chromium"),
]

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--force-device-scale-factor=1", "--remote-debugging-port=0",
]  # fmt: skip


class Page:
    """A page driven over the DevTools protocol."""

    def __init__(self, socket):
        self.socket = socket
        self.session = None
        self.number = 0
        self.events = []

    async def call(self, method, **parameters):
        self.number += 1
        number = self.number
        message = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        await self.socket.send_json(message)
        while True:
            answer = await self.socket.receive_json(timeout=60)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    async def attach(self):
        target = await self.call("Target.createTarget", url="about:blank")
        answer = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = answer["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            await self.call(f"{domain}.enable")

    async def open(self, path, *, width=1280, height=900):
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        await self.call("Page.navigate", url=path.as_uri())
        await self.until("document.readyState === 'complete'")

    async def run(self, script):
        answer = await self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, condition):
        """Wait, frame by frame, until a condition holds in the page."""
        script = f"""new Promise((resolve, reject) => {{
            const end = performance.now() + 20000;
            const look = () => ({condition}) ? resolve(true) : performance.now() > end
                ? reject(new Error("never true")) : setTimeout(look, 20);
            look();
        }})"""
        await self.run(script)

    async def settle(self):
        """Wait until every picture in the page was loaded or given up, and was painted."""
        await self.until("[...document.images].every(image => image.complete)")
        await self.run(
            "Promise.allSettled([...document.images].map(image => image.decode())).then(() =>"
            " new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1)))))"
        )

    async def shoot(self, box=None):
        parameters = {"clip": {**box, "scale": 1}} if box else {}
        answer = await self.call("Page.captureScreenshot", format="png", **parameters)
        return base64.b64decode(answer["data"])

    def addresses(self):
        """Every address that the page asked for."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]

    def complaints(self):
        """The errors in the console: of scripts and of the content security policy."""
        return [
            event
            for event in self.events
            if event.get("method") == "Runtime.exceptionThrown"
            or (event.get("method") == "Log.entryAdded"
                and event["params"]["entry"]["source"] in {"security", "javascript"})
        ]  # fmt: skip


@asynccontextmanager
async def open_browser(directory):
    assert CHROMIUM, "CI must have chromium"
    process = await asyncio.create_subprocess_exec(
        CHROMIUM, *FLAGS, f"--user-data-dir={directory}", "about:blank",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        address = None
        async with asyncio.timeout(60):
            while address is None:
                line = (await process.stderr.readline()).decode(errors="replace")
                assert line, "chromium ended before it listened"
                if line.startswith("DevTools listening on "):
                    address = line.split()[-1]
        reading = asyncio.create_task(process.stderr.read())
        async with aiohttp.ClientSession() as http:
            async with http.ws_connect(address, max_msg_size=0) as socket:
                page = Page(socket)
                await page.attach()
                yield page
                page.session = None
                await page.call("Browser.close")
        await reading
    finally:
        if process.returncode is None:
            try:
                async with asyncio.timeout(30):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


@pytest.fixture
async def page(tmp_path):
    async with open_browser(tmp_path / "profile") as page:
        yield page


def read_png(data):
    """Return the rows of a screenshot as lists of (red, green, blue)."""
    width, height, depth, kind = struct.unpack(">IIBB", data[16:26])
    assert (depth, data[28]) == (8, 0)
    size = {2: 3, 6: 4}[kind]
    packed, at = b"", 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            packed += data[at + 8 : at + 8 + length]
        at += length + 12
    raw, stride, before, rows = zlib.decompress(packed), width * size, None, []
    before = bytearray(stride)
    for index in range(height):
        method = raw[index * (stride + 1)]
        line = bytearray(raw[index * (stride + 1) + 1 : (index + 1) * (stride + 1)])
        for place in range(stride):
            left = line[place - size] if place >= size else 0
            corner = before[place - size] if place >= size else 0
            guess = 0
            if method == 1:
                guess = left
            elif method == 2:
                guess = before[place]
            elif method == 3:
                guess = (left + before[place]) // 2
            elif method == 4:
                guess = min(
                    (left, before[place], corner),
                    key=lambda value: abs(left + before[place] - corner - value),
                )
            line[place] = (line[place] + guess) & 255
        rows.append([tuple(line[x * size : x * size + 3]) for x in range(width)])
        before = line
    return rows


def near(pixel, color, tolerance=40):
    return all(abs(a - b) <= tolerance for a, b in zip(pixel, color, strict=True))


def find_extent(rows, color):
    """Return the left, top, right and bottom edges of the pixels of a color."""
    places = [
        (x, y)
        for y, row in enumerate(rows)
        for x, pixel in enumerate(row)
        if near(pixel, color, 12)
    ]
    across, down = [x for x, _ in places], [y for _, y in places]
    return min(across), min(down), max(across), max(down)


def build_line(index, source, model, analysis=None, **fields):
    record = {
        "index": index, "line": index + 1, "source": source, "model": model, "key": f"k{index}",
        "status": "ok" if analysis is not None else "error", "analysis": analysis, "entity": source,
        "request_id": "0" * 32, "limits": [], "seconds": 0.1, "error": None, **fields,
    }  # fmt: skip
    return json.dumps(record)


def tag(label, *box):
    return {"tags": {label: [{"bounding-box": list(box or (10, 10, 40, 40)), "confidence": 0.9}]}}


CARDS = "[...document.querySelectorAll('.card')]"


async def test_boxes_lie_on_the_shapes_of_the_gallery_pictures(page, tmp_path):
    async with Emulator() as emulator:
        requests = [
            kind(source) for source in emulator.sample_urls(3) for kind in (Coco, Captioning)
        ]
        async with AnalyzeSession(Credentials.from_url(emulator.cloudinary_url)) as session:
            lines = [
                dump_record(build_record(outcome))
                for outcome in await session.analyze_all(requests)
            ]
        write_report(lines, tmp_path / "report.html")
        # on the cards the pictures are shrunk, in the viewer enlarged
        for selector, width, count in ((".card", 1280, 3), ("#viewer", 1100, 1)):
            await page.open(tmp_path / "report.html", width=width)
            for number, source in enumerate(emulator.sample_urls(count)):
                if selector == "#viewer":
                    await page.run("document.querySelector('dialog').close()")
                    await page.run(f"{CARDS}[{number}].querySelector('.picture').click()")
                picture = f"{CARDS}[{number}]" if selector == ".card" else "viewer"
                await page.settle()
                await check_boxes(page, f"{picture}.querySelector('img')", source)
    assert not page.complaints()


async def check_boxes(page, image, source):
    box = await page.run(
        f"""(() => {{ const image = {image}, box = image.getBoundingClientRect();
        const scale = Math.min(box.width / image.naturalWidth, box.height / image.naturalHeight);
        const width = image.naturalWidth * scale, height = image.naturalHeight * scale;
        return {{x: box.x + (box.width - width) / 2, y: box.y + (box.height - height) / 2,
            width, height, source: image.src}} }})()"""
    )
    number = int(source.rsplit("/", 1)[1].removesuffix(".png"))
    assert box.pop("source") == (
        "data:image/png;base64," + base64.b64encode(render_picture(number)).decode()
    )
    await page.run(f"{image}.nextSibling.style.visibility = 'hidden'")
    plain = read_png(await page.shoot(box))
    await page.run(f"{image}.nextSibling.style.visibility = ''")
    drawn = read_png(await page.shoot(box))
    marks = await page.run(
        f"[...{image}.nextSibling.querySelectorAll('.box')].map(box => box.getAttribute('stroke'))"
    )
    tints = {tuple(bytes.fromhex(mark[1:])) for mark in marks}
    scene = build_gallery_scene(number)
    assert len(marks) == len(scene.shapes)
    for shape in scene.shapes:
        left, top, right, bottom = find_extent(plain, COLORS[shape.color])
        middle, centre = (left + right) // 2, (top + bottom) // 2
        edges = {
            "left": [(left + step, centre) for step in range(-3, 4)],
            "right": [(right + step, centre) for step in range(-3, 4)],
            "bottom": [(middle, bottom + step) for step in range(-3, 4)],
            "top": [(middle, top + step) for step in range(-3, 4)],
        }
        for edge, places in edges.items():
            pixels = [
                drawn[y][x] for x, y in places if 0 <= y < len(drawn) and 0 <= x < len(drawn[0])
            ]
            hits = [any(near(pixel, tint) for tint in tints) for pixel in pixels]
            assert any(hits), (edge, shape, pixels)


async def test_filters_select_models_that_share_a_card(page, tmp_path):
    lines = [
        build_line(0, "https://a.invalid/1.png", "coco", tag("dog")),
        build_line(1, "https://a.invalid/1.png", "captioning", {"data": {"caption": "A dog."}}),
        build_line(2, "https://a.invalid/2.png", "coco", tag("cat")),
        build_line(3, "https://a.invalid/3.png", "coco", tag("hot dog")),
        build_line(4, "https://a.invalid/4.png", "captioning", error={"type": "ServerError", "message": "No.", "status": 500}),
        build_line(5, "https://a.invalid/5.png", "ai_vision_moderation", {"responses": [{"prompt": "Bad?", "value": "yes"}]}),
    ]  # fmt: skip
    write_report(lines, tmp_path / "report.html")
    await page.open(tmp_path / "report.html")

    async def choose(name, value):
        if name == "status":
            await page.run(f"document.querySelector('input[value=\"{value}\"]').click()")
            return await read_cards()
        await page.run(
            f"""(() => {{ const form = document.getElementById('filters');
            form.elements[{name!r}].value = {value!r};
            form.dispatchEvent(new Event('input')); }})()"""
        )
        return await read_cards()

    async def read_cards():
        return await page.run(f"{CARDS}.map(card => card.innerText.replace(/\\s+/g, ' ').trim())")

    everything = await read_cards()
    assert len(everything) == 5
    assert "A dog." in everything[0]
    assert "dog" in everything[0].split("A dog.")[1]

    failed = await choose("status", "error")
    assert len(failed) == 1
    assert "No." in failed[0]
    assert len(await choose("status", "ok")) == 4
    assert len(await choose("status", "rejected")) == 1
    await choose("status", "")

    only_coco = await choose("model", "coco")
    assert len(only_coco) == 3
    assert "A dog." not in only_coco[0]  # the other model's findings are hidden
    await choose("model", "")

    assert len(await choose("label", "dog")) == 1  # a whole label matches only itself
    assert len(await choose("label", "do")) == 2  # a part matches all labels that contain it
    assert len(await choose("label", "zebra")) == 0
    assert await page.run("getComputedStyle(document.getElementById('empty')).display") == "block"
    await page.run("document.getElementById('clear').click()")
    await page.until(f"{CARDS}.length === 5")

    await page.run(
        "document.querySelector('.pick[data-label=cat]')"
        ".dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    )
    assert len(await read_cards()) == 1
    assert await page.run("document.getElementById('shown').textContent") == "1 of 5 pictures"


async def test_markup_in_the_data_is_shown_and_never_run(page, tmp_path):
    attack = "</script><script>window.ran = 1</script><img src=x onerror='window.ran = 2'>"
    lines = [
        build_line(0, "https://a.invalid/1.png", attack, tag(attack)),
        build_line(1, "https://a.invalid/2.png", "captioning", {"data": {"caption": attack}}),
        build_line(2, "https://a.invalid/3.png", "ai_vision_moderation", {"responses": [{"prompt": attack, "value": attack}]}),
        build_line(3, "https://a.invalid/4.png", "image_quality", {"quality": attack}),
        build_line(4, "https://a.invalid/5.png", "coco", error={"type": attack, "message": attack}),
        build_line(5, "javascript:window.ran=3", "coco", tag("<script>")),
        build_line(6, "file:///etc/passwd", "coco", tag('" onload="window.ran=4')),
        build_line(7, "data:text/html,<script>window.ran=5</script>", "coco", tag("b")),
    ]  # fmt: skip
    write_report(lines, tmp_path / "report.html")
    await page.open(tmp_path / "report.html")
    await page.settle()
    texts = await page.run(f"{CARDS}.map(card => card.innerText)")
    assert attack in texts[0]
    assert attack in texts[1]
    assert "<script>" in texts[5]
    for index in range(len(lines)):
        await page.run(f"{CARDS}[{index}].querySelector('.picture').click()")
        assert (
            await page.run(
                "document.querySelectorAll('#viewer script, #viewer img[onerror]').length"
            )
            == 0
        )
        address = await page.run("document.querySelector('#viewer a')?.href ?? null")
        assert (address or "https://").startswith("https://")
        assert (address is None) == (index >= 5)
    # it could not run: the page refuses unknown scripts, styles and connections
    assert not page.complaints()
    await page.run(
        """(() => { const script = document.createElement('script');
        script.textContent = 'window.ran = 6'; document.body.append(script);
        document.body.insertAdjacentHTML('beforeend', '<p style="color:red" onclick="window.ran=7">');
        document.body.lastChild.click(); })()"""
    )
    refused = await page.run("fetch('https://a.invalid/x').then(() => 'sent', () => 'refused')")
    assert refused == "refused"
    assert await page.run("window.ran ?? null") is None
    asked = {address.split("?")[0] for address in page.addresses()}
    pictures = {f"https://a.invalid/{number}.png" for number in range(1, 6)}
    assert asked <= pictures | {(tmp_path / "report.html").as_uri()}


async def test_10_000_results_open_and_only_those_in_view_are_drawn(page, tmp_path):
    async with Emulator() as emulator:
        source = emulator.sample_url(0).rsplit("/", 1)[0]
        entries = [
            {"bounding-box": [n * 9, n * 7, 50, 60], "confidence": 0.9, "categories": ["x"]}
            for n in range(5)
        ]
        lines = (
            build_line(n, f"{source}/{n}.png", "coco", {"tags": {f"label {n % 50}": entries}})
            for n in range(10_000)
        )
        assert write_report(lines, tmp_path / "report.html").pictures == 10_000
        await page.open(tmp_path / "report.html")
        ready = await page.run("performance.getEntriesByType('navigation')[0].domComplete")
        assert ready < 5_000  # milliseconds; well under 1,000 on an idle machine
        assert await page.run("document.getElementById('shown').textContent") == "10,000 pictures"
        assert 0 < await page.run(f"{CARDS}.length") < 60
        spent = await page.run(
            """(() => { const before = performance.now(); const form = document.getElementById('filters');
            form.elements.label.value = 'label 7'; form.dispatchEvent(new Event('input'));
            return performance.now() - before })()"""
        )
        assert (
            await page.run("document.getElementById('shown').textContent")
            == "200 of 10,000 pictures"
        )
        assert spent < 1_000
        await page.run("document.getElementById('clear').click()")
        await page.until("document.getElementById('shown').textContent === '10,000 pictures'")
        await page.run("scrollTo(0, document.body.scrollHeight)")
        await page.until(f"{CARDS}.some(card => card.dataset.index === '9999')")
        assert await page.run(f"{CARDS}.length") < 60
        await page.settle()
        last = f"{CARDS}.find(card => card.dataset.index === '9999')"
        box = await page.run(
            f"(() => {{ const b = {last}.getBoundingClientRect(); return [b.top, b.bottom, innerHeight] }})()"
        )
        assert 0 < box[0] < box[1] <= box[2]
        await page.until(f"{last}.querySelectorAll('.box').length === 5")


async def test_a_picture_that_cannot_be_shown_leaves_a_placeholder(page, tmp_path):
    async with Emulator() as emulator:
        gone = emulator.sample_url(0).replace("0.png", "gone.png")
        lines = [
            build_line(0, gone, "coco", tag("dog")),
            build_line(1, "asset:0123456789abcdef", "captioning", {"data": {"caption": "A dog."}}),
        ]
        write_report(lines, tmp_path / "report.html")
        await page.open(tmp_path / "report.html")
        await page.until("document.querySelectorAll('.absent').length === 2")
    texts = await page.run(f"{CARDS}.map(card => card.innerText)")
    assert "cannot be loaded" in texts[0]
    assert "dog" in texts[0]
    assert "asset:0123456789abcdef" in texts[1]
    assert await page.run("document.images.length") == 0
