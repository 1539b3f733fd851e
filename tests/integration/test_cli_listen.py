"""The development receiver."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import aiohttp
from cli_support import end, see, start, until
from notification_support import SECRET, build_answer, sign

from cloudinary_analyze.emulator import Emulator


async def test_listen_shows_what_is_genuine_and_refuses_the_rest(tmp_path: Path):
    genuine, forged = build_answer("task-1"), build_answer("task-2")
    unrelated = json.dumps({"notification_type": "upload", "asset_id": "a"}).encode()
    async with (
        Emulator() as emulator,
        start(
            "listen", "--port", "0", "--path", "/hook", folder=tmp_path, emulator=emulator
        ) as process,
        aiohttp.ClientSession() as http,
    ):
        output = await see(process, "Ctrl-C ends it")
        url = re.search(r"http://\S+/hook", output)
        assert url
        now = time.time()

        async def post(body: bytes, headers: dict[str, str], to: str = url[0]) -> int:
            async with http.post(to, data=body, headers=headers) as response:
                return response.status

        assert await post(genuine, sign(genuine, at=now)) == 200
        assert await post(forged, sign(forged, at=now, secret="guessed")) == 401
        assert await post(forged, sign(forged, at=now - 86_400)) == 401
        assert await post(forged, {}) == 401
        assert await post(unrelated, sign(unrelated, at=now)) == 200
        assert await post(genuine, sign(genuine, at=now), to=f"{url[0]}/other") == 404
        process.send_signal(signal.SIGINT)
        code, out, err = await end(process)
    assert code == 0
    assert [json.loads(line) for line in out.splitlines()] == [json.loads(genuine)]
    assert err.count("Refused with 401") == 3
    for reason in (
        "Signature mismatch",
        "s before it arrived",
        "Missing X-Cld-Signature",
        "404",
    ):
        assert reason in err
    assert "Names no analysis task" in err
    assert SECRET not in err
    assert "guessed" not in err


async def test_listen_ends_when_its_reader_goes_away(tmp_path: Path):
    body = build_answer("task-1")
    async with (
        Emulator() as emulator,
        start("listen", "--port", "0", folder=tmp_path, emulator=emulator) as process,
        aiohttp.ClientSession() as http,
    ):
        output = await see(process, "Ctrl-C ends it")
        url = re.search(r"http://[^\s/]+/", output)
        assert url
        process._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined]
        headers = sign(body, at=time.time())
        async with http.post(url[0], data=body, headers=headers) as response:
            assert response.status == 503  # it was not seen, so it must come again
        output = await see(process, "was closed by the reader")
        await until(lambda: process.returncode is not None)
    assert process.returncode == 3
    assert "Traceback" not in output
