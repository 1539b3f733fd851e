"""Tasks of the emulator: their states, their notifications, and their faults."""

import asyncio
import contextlib
import gc
import json
import time

import aiohttp
import pytest
from aiohttp import web
from scripted import after, answer, serve_aiohttp, until

from cloudinary_analyze.emulator import Emulator, FaultPlan, WebhookPolicy
from cloudinary_analyze.webhooks import compute_signature

URI = "https://x.test/a.jpg"


def open_client(emulator):
    basic = aiohttp.encode_basic_auth(emulator.api_key, emulator.api_secret)
    return aiohttp.ClientSession(headers={"Authorization": basic})


async def submit(client, emulator, *, uri=URI, model="captioning", notification_url=None):
    body = {"source": {"uri": uri}, "async": True}
    if notification_url is not None:
        body["notification_url"] = notification_url
    url = f"{emulator.url}/v2/analysis/{emulator.cloud_name}/analyze/{model}"
    async with client.post(url, json=body) as response:
        assert response.status == 202
        return await response.json()


async def read_status(client, emulator, task_id):
    url = f"{emulator.url}/v2/analysis/{emulator.cloud_name}/tasks/{task_id}"
    async with client.get(url) as response:
        assert response.status == 200
        return (await response.json())["data"]


def verifies(emulator, delivery, digest="sha1"):
    timestamp = delivery.headers["X-Cld-Timestamp"]
    expected = compute_signature(delivery.body, timestamp, emulator.api_secret, digest=digest)
    return delivery.headers["X-Cld-Signature"] == expected


class Receiver:
    """A webhook endpoint that answers with the given statuses, then with 200."""

    def __init__(self, statuses=()):
        self.statuses = list(statuses)
        self.got = []
        self.connections = set()

    async def handle(self, request):
        self.connections.add(request.transport.get_extra_info("peername"))
        self.got.append((await request.read(), dict(request.headers)))
        status = self.statuses.pop(0) if self.statuses else 200
        headers = {"Location": "/elsewhere"} if status == 307 else {}
        return web.Response(status=status, headers=headers)


@contextlib.asynccontextmanager
async def receive(statuses=()):
    receiver = Receiver(statuses)
    async with serve_aiohttp(receiver.handle) as origin:
        receiver.url = f"{origin}/hook"
        yield receiver


async def test_a_task_goes_from_pending_to_completed_and_its_status_has_no_result():
    async with Emulator(task_seconds=60) as emulator, open_client(emulator) as client:
        accepted = await submit(client, emulator)
        task_id = accepted["data"]["task_id"]
        assert len(task_id) == 160
        assert accepted["data"]["status"] == "pending"
        assert set(accepted) == {"data", "request_id"}
        task = emulator.tasks[task_id]
        assert await read_status(client, emulator, task_id) == {
            "task_id": task_id,
            "status": "pending",
        }
        assert task.read_status(task.accepted_at + 59) == "processing"
        assert emulator.counts.polls == {task_id: 1}
    async with Emulator(task_seconds=0) as emulator, open_client(emulator) as client:
        task_id = (await submit(client, emulator))["data"]["task_id"]
        await until(lambda: emulator.tasks[task_id].outcome)
        assert await read_status(client, emulator, task_id) == {
            "task_id": task_id,
            "status": "completed",
        }


async def test_the_status_carries_the_result_only_if_asked():
    async with (
        Emulator(task_seconds=0, results_in_status=True) as emulator,
        open_client(emulator) as client,
    ):
        task_id = (await submit(client, emulator))["data"]["task_id"]
        await until(lambda: emulator.tasks[task_id].outcome)
        data = await read_status(client, emulator, task_id)
    assert data["analysis"]["data"]["caption"]
    assert data["entity"] == URI


@pytest.mark.parametrize("digest", ["sha1", "sha256"])
async def test_a_signed_notification_has_the_result_of_the_call(digest):
    async with (
        receive() as receiver,
        Emulator(task_seconds=0, webhooks=WebhookPolicy(digest=digest)) as emulator,
        open_client(emulator) as client,
    ):
        accepted = await submit(client, emulator, notification_url=receiver.url)
        await until(lambda: emulator.tasks[accepted["data"]["task_id"]].notified)
        url = f"{emulator.url}/v2/analysis/{emulator.cloud_name}/analyze/captioning"
        async with client.post(url, json={"source": {"uri": URI}}) as response:
            direct = await response.json()
        ((body, headers),) = receiver.got
        expected = compute_signature(
            body, headers["X-Cld-Timestamp"], emulator.api_secret, digest=digest
        )
    assert headers["X-Cld-Signature"] == expected
    assert headers["Content-Type"] == "application/json"
    content = json.loads(body)
    assert content["data"] == direct["data"]
    assert content["limits"] == direct["limits"]
    assert content["task_id"] == accepted["data"]["task_id"]
    assert content["request_id"] == accepted["request_id"]
    assert (content["http_status"], content["notification_type"]) == (200, "analyze")


async def test_the_accounts_url_is_used_when_the_request_names_none():
    async with receive() as account, receive() as own:
        policy = WebhookPolicy(default_notification_url=account.url)
        async with (
            Emulator(task_seconds=0, webhooks=policy) as emulator,
            open_client(emulator) as client,
        ):
            await submit(client, emulator)
            await submit(client, emulator, notification_url=own.url)
            await until(lambda: account.got and own.got)
    assert (len(account.got), len(own.got)) == (1, 1)


@pytest.mark.parametrize(
    ("statuses", "sent", "notified"),
    [([500, 307, 201], 4, True), ([500] * 9, 4, False)],
)
async def test_a_refused_webhook_is_repeated_at_most_3_times(statuses, sent, notified):
    policy = WebhookPolicy(retry_scale=0.0001)
    async with (
        receive(statuses) as receiver,
        Emulator(task_seconds=0, webhooks=policy) as emulator,
        open_client(emulator) as client,
    ):
        answer = await submit(client, emulator, notification_url=receiver.url)
        task = emulator.tasks[answer["data"]["task_id"]]
        await until(lambda: emulator.counts.webhooks_refused + task.notified == sent)
        assert emulator.counts.webhooks == {"genuine": 1, "redelivery": 3}
    assert task.notified is notified
    assert len(receiver.got) == sent
    assert len({body for body, _ in receiver.got}) == 1


async def test_a_webhook_is_repeated_while_its_receiver_is_down():
    async with receive() as receiver:
        url = receiver.url
    policy = WebhookPolicy(retry_scale=0.0001)
    async with (
        Emulator(task_seconds=0, webhooks=policy) as emulator,
        open_client(emulator) as client,
    ):
        await submit(client, emulator, notification_url=url)
        await until(lambda: emulator.counts.webhooks_refused == 4)


async def test_deliveries_share_a_bounded_number_of_connections():
    policy = WebhookPolicy(concurrency=3)
    async with (
        receive() as receiver,
        Emulator(task_seconds=0.05, webhooks=policy) as emulator,
        open_client(emulator) as client,
    ):
        for index in range(60):
            uri = f"{URI}?{index}"
            await submit(client, emulator, uri=uri, notification_url=receiver.url)
        await until(lambda: len(receiver.got) == 60)
    assert len(receiver.connections) <= 3


async def test_the_hook_gets_deliveries_in_process_and_its_errors_count_as_refusals(caplog):
    got = []

    def hook(delivery):
        got.append(delivery)
        if len(got) == 1:
            raise LookupError("not now")

    policy = WebhookPolicy(retry_scale=0.0001)
    async with (
        Emulator(task_seconds=0, on_delivery=hook, webhooks=policy) as emulator,
        open_client(emulator) as client,
    ):
        task_id = (await submit(client, emulator))["data"]["task_id"]
        await until(lambda: emulator.tasks[task_id].notified)
        assert [verifies(emulator, delivery) for delivery in got] == [True, True]
    assert abs(got[0].received_at - time.time()) < 60
    assert "not now" in caplog.text


@pytest.mark.parametrize(
    ("fault", "kinds"),
    [
        ("duplicated", ["genuine", "duplicate"]),
        ("forged", ["forged", "genuine"]),
        ("stale", ["stale", "genuine"]),
        ("malformed", ["malformed", "genuine"]),
        ("foreign", ["foreign", "genuine"]),
        ("unrelated", ["unrelated", "genuine"]),
        ("delayed", ["genuine"]),
        ("early", ["genuine"]),
        ("failed", ["genuine"]),
        ("lost", []),
    ],
)
async def test_notification_faults_occur_and_are_recorded(fault, kinds):
    got = []
    plan = FaultPlan(**{fault: 1.0}, delay_seconds=0.2)
    async with (
        Emulator(task_seconds=0, on_delivery=got.append, faults=plan) as emulator,
        open_client(emulator) as client,
    ):
        started = time.monotonic()
        task_id = (await submit(client, emulator))["data"]["task_id"]
        if fault == "early":
            assert len(got) == 1
        task = emulator.tasks[task_id]
        assert task.faults == (fault,)
        await until(lambda: task.outcome and len(got) >= len(kinds))
        assert emulator.counts.webhooks == dict.fromkeys(kinds, 1)
        status = (await read_status(client, emulator, task_id))["status"]
        assert status == ("failed" if fault == "failed" else "completed")
    assert fault != "delayed" or time.monotonic() - started >= 0.2
    for kind, delivery in zip(kinds, got, strict=True):
        assert verifies(emulator, delivery) == (kind != "forged")
        old = time.time() - int(delivery.headers["X-Cld-Timestamp"]) > 7200
        assert old == (kind == "stale")
        if kind == "malformed":
            with pytest.raises(ValueError, match="Expecting"):
                json.loads(delivery.body)
            continue
        content = json.loads(delivery.body)
        if kind in {"genuine", "duplicate", "forged", "stale"}:
            assert content["task_id"] == task_id
        elif kind == "foreign":
            assert content["task_id"] not in emulator.tasks
        else:
            assert content["notification_type"] == "upload"
        if kind in {"forged", "stale"}:
            assert content["data"]["entity"] != URI
        elif fault == "failed":
            assert (content["http_status"], "data" in content) == (500, False)
            assert content["error"]["category"] == "server_error"


async def test_an_unknown_status_is_shown_while_the_task_runs():
    plan = FaultPlan(unknown_status=1.0)
    async with Emulator(task_seconds=60, faults=plan) as emulator, open_client(emulator) as client:
        task_id = (await submit(client, emulator))["data"]["task_id"]
        assert (await read_status(client, emulator, task_id))["status"] == "queued_for_gpu"


async def test_a_source_that_cannot_be_fetched_fails_the_task_and_is_not_charged():
    got = []
    async with (
        Emulator(task_seconds=0, on_delivery=got.append) as emulator,
        open_client(emulator) as client,
    ):
        await submit(client, emulator, uri=f"{emulator.url}/samples/none.png")
        await until(lambda: got)
    content = json.loads(got[0].body)
    assert (content["http_status"], content["error"]["message"]) == (404, "not found")
    assert emulator.counts.total_done == 0


async def test_many_sleeping_tasks_cost_little_and_no_asyncio_task():
    async with Emulator(task_seconds=3600) as emulator, open_client(emulator) as client:
        before = len(asyncio.all_tasks())
        await asyncio.gather(*(submit(client, emulator, uri=f"{URI}?{i}") for i in range(500)))
        await until(lambda: len(asyncio.all_tasks()) <= before + 200)
        assert len(emulator.tasks) == 500


async def test_stopping_leaves_nothing_behind_with_notifications_outstanding():
    before = asyncio.all_tasks()
    release = asyncio.Event()
    async with serve_aiohttp(after(release, answer())) as url:
        async with Emulator(task_seconds=0) as emulator, open_client(emulator) as client:
            for _ in range(40):
                await submit(client, emulator, notification_url=url)
            await until(lambda: emulator.counts.webhooks["genuine"] == 16)
            started = time.monotonic()
            await emulator.stop()
            assert time.monotonic() - started < 8
        release.set()
    assert asyncio.all_tasks() == before
    gc.collect()


async def test_a_stopped_emulator_starts_again_and_still_knows_its_tasks():
    emulator = Emulator(task_seconds=0)
    async with emulator, open_client(emulator) as client:
        task_id = (await submit(client, emulator))["data"]["task_id"]
        await until(lambda: emulator.tasks[task_id].outcome)
    async with emulator, open_client(emulator) as client:
        assert (await read_status(client, emulator, task_id))["status"] == "completed"
