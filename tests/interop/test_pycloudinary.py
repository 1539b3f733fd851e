"""pycloudinary, the vendor's general client, accepts the emulator's notifications as genuine."""

import asyncio

import aiohttp
import pytest

from cloudinary_analyze.emulator import Emulator, WebhookPolicy

cloudinary = pytest.importorskip("cloudinary")
api = pytest.importorskip("cloudinary.api")
utils = pytest.importorskip("cloudinary.utils")
exceptions = pytest.importorskip("cloudinary.exceptions")

URI = "https://x.test/a.jpg"


@pytest.fixture
def configure(monkeypatch):
    """Point pycloudinary, which has one global configuration, at an emulator."""
    for name in ("CLOUD_NAME", "API_KEY", "API_SECRET"):
        monkeypatch.delenv(f"CLOUDINARY_{name}", raising=False)

    def apply(emulator, digest="sha1"):
        monkeypatch.setenv("CLOUDINARY_URL", emulator.cloudinary_url)
        cloudinary.reset_config()
        cloudinary.config(signature_algorithm=digest)

    yield apply
    monkeypatch.undo()
    cloudinary.reset_config()


async def submit(emulator, **options):
    basic = aiohttp.encode_basic_auth(emulator.api_key, emulator.api_secret)
    url = f"{emulator.url}/v2/analysis/{emulator.cloud_name}/analyze/captioning"
    body = {"source": {"uri": URI}, "async": True, **options}
    async with aiohttp.ClientSession(headers={"Authorization": basic}) as client:
        async with client.post(url, json=body) as response:
            return (await response.json())["data"]["task_id"]


@pytest.mark.parametrize("digest", ["sha1", "sha256"])
async def test_pycloudinary_verifies_the_notifications(configure, digest):
    got = asyncio.Queue()
    policy = WebhookPolicy(digest=digest)
    async with Emulator(task_seconds=0, on_delivery=got.put_nowait, webhooks=policy) as emulator:
        configure(emulator, digest)
        await submit(emulator)
        delivery = await asyncio.wait_for(got.get(), 30)
    body = delivery.body.decode()
    stamp, signature = (delivery.headers[f"X-Cld-{part}"] for part in ("Timestamp", "Signature"))
    assert utils.verify_notification_signature(body, stamp, signature)
    assert not utils.verify_notification_signature(body + " ", stamp, signature)


async def test_the_path_of_the_first_schema_is_not_served(configure):
    async with Emulator() as emulator:
        configure(emulator)
        with pytest.raises(exceptions.NotFound, match="not found"):
            await asyncio.to_thread(api.analyze, URI, "captioning")
