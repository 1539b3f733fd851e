"""The vendor's client ``cloudinary-analysis`` completes every operation against the emulator."""

import asyncio

import pytest

from cloudinary_analyze.emulator import Emulator, FaultPlan
from cloudinary_analyze.emulator.models import MODELS

vendor = pytest.importorskip("cloudinary_analysis")

LISTS = {
    "prompts": ["Describe this image", "Is there a red circle?"],
    "rejection_questions": ["Is there any nudity?"],
    "tag_definitions": [{"name": "cat", "description": "Is there a cat?"}],
}
EXPECTED = {
    "ai_vision_general": lambda analysis: len(analysis.responses) == 2,
    "ai_vision_moderation": lambda analysis: analysis.responses[0].value.value in "yes no unknown",
    "captioning": lambda analysis: "background" in analysis.data.caption,
    "google_logo_detection": lambda analysis: analysis.logo_annotations[0].bounding_poly.vertices,
    "google_tagging": lambda analysis: analysis.label_annotations.labels[0].score > 0,
    "image_quality": lambda analysis: 0 <= analysis.score <= 1,
    "watermark_detection": lambda analysis: analysis.detections[0].name == "clean",
}


@pytest.fixture(autouse=True)
def _no_account(monkeypatch):
    for name in ("URL", "CLOUD_NAME", "API_KEY", "API_SECRET", "O_AUTH2"):
        monkeypatch.delenv(f"CLOUDINARY_{name}", raising=False)


def open_vendor(emulator, *, api_secret=None, cloud_name=None):
    # Keep the client object: its connections are closed when it is garbage collected.
    return vendor.CloudinaryAnalysis(
        security=vendor.models.Security(
            cloudinary_auth=vendor.models.SchemeCloudinaryAuth(
                api_key=emulator.api_key, api_secret=api_secret or emulator.api_secret
            )
        ),
        server_url=f"{emulator.url}/v2/analysis/{cloud_name or emulator.cloud_name}",
    )


def build_arguments(emulator, model):
    name = MODELS[model].list_field
    source = {"uri": emulator.sample_url(1)}
    return {"source": source, **({name: LISTS[name]} if name else {})}


def check(model, answer, source):
    assert answer.data.entity == source
    assert len(answer.request_id) == 32
    assert EXPECTED.get(model, lambda analysis: analysis.tags is not None)(answer.data.analysis)


@pytest.mark.parametrize("model", MODELS)
async def test_every_operation_completes_sync_and_async(model):
    async with Emulator() as emulator:
        arguments = build_arguments(emulator, model)
        client = open_vendor(emulator)

        def run():
            with client:
                return getattr(client.analyze, model)(**arguments)

        check(model, await asyncio.to_thread(run), emulator.sample_url(1))
        async with client:
            answer = await getattr(client.analyze, f"{model}_async")(**arguments)
        check(model, answer, emulator.sample_url(1))
        assert emulator.counts.done[model, emulator.sample_url(1)] == 2


async def test_a_task_is_accepted_and_its_status_read():
    async with Emulator(task_seconds=60) as emulator:
        async with open_vendor(emulator) as client:
            accepted = await client.analyze.coco_async(
                async_=True,
                notification_url="http://127.0.0.1:9/hook",
                **build_arguments(emulator, "coco"),
            )
            status = await client.tasks.get_status_async(task_id=accepted.data.task_id)
            client.sdk_configuration.client.close()
        assert status.data.status.value == accepted.data.status.value == "pending"
        assert emulator.tasks[accepted.data.task_id].model == "coco"


@pytest.mark.parametrize(
    ("options", "client_options", "call", "error", "code"),
    [
        ({}, {}, {"source": {"uri": "sample"}}, "ErrorResponse", "MA_00003"),
        ({}, {"api_secret": "wrong"}, {}, "ErrorResponse", "MA_00000"),
        ({"unsubscribed": {"object_detection"}}, {}, {}, "ErrorResponse", "MA_00007"),
        ({}, {"cloud_name": "unknown"}, {}, "ErrorResponse", "MA_00000"),
        ({"quotas": {"object_detection": 0}}, {}, {}, "RateLimitedResponse", "MA_00008"),
        ({"faults": FaultPlan(error_500=1.0)}, {}, {}, "ErrorResponse", "MA_00000"),
    ],
    ids=["400", "401", "403", "404", "429", "500"],
)
async def test_the_client_raises_its_documented_errors(options, client_options, call, error, code):
    async with Emulator(**options) as emulator:
        async with open_vendor(emulator, **client_options) as client:
            with pytest.raises(getattr(vendor.models, error)) as caught:
                await client.analyze.captioning_async(
                    **build_arguments(emulator, "captioning") | call
                )
            client.sdk_configuration.client.close()
    assert caught.value.data.error.code == code
    assert caught.value.data.error.request_id
