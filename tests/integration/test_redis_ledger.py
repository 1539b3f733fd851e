"""`RedisLedger` against a real Redis: shared by workers, durable, patient, without secrets."""

import asyncio
import contextlib
import copy
import json
import logging
import pickle
import time
from pathlib import Path

import pytest
import redis
from notification_support import run_redis
from scripted import CAPTION, ScriptedServer, answer, until, until_still

from cloudinary_analyze import (
    BadRequestError,
    BulkStoppedError,
    Captioning,
    ConfigurationError,
    InvalidRequestError,
    LedgerError,
    ServerError,
)
from cloudinary_analyze.ledger import redis as ledgers
from cloudinary_analyze.ledger import worker as room
from cloudinary_analyze.ledger.redis import RedisLedger
from cloudinary_analyze.protocols import Claim
from cloudinary_analyze.responses import Response
from cloudinary_analyze.testing import ManualClock

URLS = [f"https://example.com/{number}.jpg" for number in range(12)]
OWNER = {"base_url": "http://127.0.0.1:1", "cloud_name": "demo"}
KEY = Captioning(URLS[0]).key
RAW = json.loads((Path(__file__).parent.parent / "samples" / "captioning.json").read_bytes())
RESPONSE = Response.from_raw(Captioning, RAW)


@pytest.fixture(autouse=True)
def _short_quiet(monkeypatch):
    monkeypatch.setattr(room, "QUIET", 0.5)


@pytest.fixture
def namespace(request):
    return f"test:{request.node.name}*["


@pytest.fixture
def build(shared_redis, namespace):
    def build(url=None, **options):
        return RedisLedger(url or shared_redis.url, **{"namespace": namespace, **options})

    return build


@contextlib.asynccontextmanager
async def opened(ledger):
    async with ledger:
        await ledger.open(**OWNER)
        yield ledger


async def collect(session, urls=URLS, **options):
    async with session.map(urls, Captioning, **options) as stream:
        return [outcome async for outcome in stream]


async def release(ledger, key, *, ambiguous):
    """Release a claim, and return when Redis has executed that, so that other workers see it."""
    ledger.release(key, ambiguous=ambiguous)
    await ledger.find(key)


def source_of(seen):
    return seen.json["source"]["uri"]


async def slow_caption(request):
    await asyncio.sleep(0.02)
    return await CAPTION(request)


# with a session


async def test_what_is_recorded_is_restored_and_the_rest_sent_again(build):
    error = {"error": {"message": "no"}}
    faults = {URLS[1]: answer(400, error), URLS[3]: answer(500, error)}

    async def handle(request):
        return await faults.get((await request.json())["source"]["uri"], CAPTION)(request)

    async with ScriptedServer(handle) as api:
        for run in range(2):
            async with build() as ledger, api.session(attempts=1) as session:
                outcomes = await collect(session, ledger=ledger, ordered=True)
            kinds = {o.index: type(o.error) for o in outcomes if o.error is not None}
            assert kinds == {1: BadRequestError, 3: ServerError}
            assert [o.restored for o in outcomes] == [run == 1 and i != 3 for i in range(12)]
        assert len(api.seen) == 13
        assert outcomes[0].unwrap().raw == RAW
        assert outcomes[1].error.api_message == "no"


async def test_workers_over_the_same_items_send_each_once(build):
    urls = [f"https://example.com/{number}.jpg" for number in range(300)]
    async with ScriptedServer(slow_caption) as api:

        async def work(items):
            async with build() as ledger, api.session(permits=16) as session:
                return await collect(session, items, ledger=ledger)

        results = await asyncio.gather(work(urls), work(urls[::-1]), work(urls))
        assert sorted(map(source_of, api.seen)) == sorted(urls)
        assert all(outcome.response for outcomes in results for outcome in outcomes)
        assert sum(not o.restored for outcomes in results for o in outcomes) == 300
        await work(urls)
        assert len(api.seen) == 300


async def test_two_sessions_share_an_open_ledger(build):
    async with ScriptedServer(slow_caption) as api, build() as ledger:
        async with api.session() as one, api.session() as other:
            await asyncio.gather(*(collect(s, ledger=ledger) for s in (one, other)))
        assert len(api.seen) == len(URLS)


async def test_a_key_names_one_source_for_all_workers(build):
    async with ScriptedServer(CAPTION) as api:
        for url in URLS[:2]:
            async with build() as ledger, api.session() as session:
                (outcome,) = await collect(session, [url], ledger=ledger, key=lambda _: "same")
        assert isinstance(outcome.error, InvalidRequestError)
        assert URLS[0] in str(outcome.error)
        assert len(api.seen) == 1


async def test_a_named_task_is_not_resumed_for_another_source(build):
    async with opened(build()) as one, opened(build()) as other:
        await one.note_source(KEY, URLS[0])
        assert await one.claim(KEY) == Claim()
        assert (await other.find(KEY)).source == URLS[0]  # while it is claimed
        await one.record_submitted(KEY, "task")
        await release(one, KEY, ambiguous=False)
        record = await other.find(KEY)
        assert (record.task_id, record.source) == ("task", URLS[0])


async def test_a_name_keeps_its_first_source_while_nothing_is_recorded(build):
    strange = "data:|%d|\n\ud800"
    async with opened(build()) as one, opened(build()) as other:
        await one.note_source(KEY, strange)
        await other.note_source(KEY, URLS[1])
        assert await one.claim(KEY) == Claim()
        await release(one, KEY, ambiguous=False)
        assert await other.claim(KEY) is None
        await asyncio.wait_for(other.watch(KEY), 30)
        record = await other.find(KEY)
        assert (record.task_id, record.source) == (None, "data:|%d|\n?")
        await one.note_source(KEY, strange)
        assert await one.claim(KEY) == Claim()


async def test_a_signed_url_keeps_its_name_with_a_new_signature(build):
    signed = "https://example.com/a.jpg?X-Amz-Signature={}&X-Amz-Expires=1"
    async with opened(build()) as one, opened(build()) as other:
        await one.note_source(KEY, signed.format("1"))
        await one.claim(KEY)
        await release(one, KEY, ambiguous=True)
        await other.note_source(KEY, signed.format("2"))
        assert await other.claim(KEY) == Claim(ambiguous=True)


async def test_records_are_exported_with_their_sources(build, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    from cloudinary_analyze.results.export import export_results
    from cloudinary_analyze.results.records import build_ledger_record

    async with ScriptedServer(CAPTION) as api:
        async with build() as ledger, api.session() as session:
            await collect(session, ledger=ledger)
    records = list(map(build_ledger_record, build().iter_records()))
    assert sorted(record["source"] for record in records) == sorted(URLS)
    assert [record["index"] for record in records] == list(range(12))
    assert {(record["model"], record["status"]) for record in records} == {("captioning", "ok")}
    export_results(records, tmp_path / "out.parquet", "parquet")
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table.num_rows == 12
    assert set(table["caption"].to_pylist()) == {RAW["data"]["analysis"]["data"]["caption"]}


async def test_redis_killed_during_a_run_costs_nothing(build, own_redis):
    urls = [f"https://example.com/{number}.jpg" for number in range(400)]
    async with ScriptedServer(slow_caption) as api:

        async def work():
            ledger = build(own_redis.url, lease=5)
            async with ledger, api.session(permits=8) as session:
                return await collect(session, urls, ledger=ledger)

        runs = [asyncio.create_task(work()) for _ in range(2)]
        await until(lambda: len(api.seen) > 100)
        await asyncio.to_thread(own_redis.kill)
        await until_still(lambda: (len(api.seen), api.in_flight))
        sent = len(api.seen)
        await asyncio.sleep(0.2)
        assert len(api.seen) == sent, "a request was sent without a claim"
        await asyncio.to_thread(own_redis.start)
        results = await asyncio.gather(*runs)
        assert sorted(map(source_of, api.seen)) == sorted(urls)
    assert all(outcome.response for outcomes in results for outcome in outcomes)


async def test_redis_away_for_longer_than_the_patience_stops(build, own_redis):
    async with ScriptedServer(slow_caption) as api, api.session(permits=8) as session:
        async with build(own_redis.url, patience=0.5) as ledger:

            def yield_urls():
                for number in range(10_000):
                    if number == 50:
                        own_redis.kill()
                    yield f"https://example.com/{number}.jpg"

            with pytest.raises(BulkStoppedError) as caught:
                await collect(session, yield_urls(), ledger=ledger)
            assert isinstance(caught.value.reason, LedgerError)
            assert len(api.seen) < 100
            own_redis.start()
            ledger.patience = 30
            sent = len(api.seen)
            first = [f"https://example.com/{number}.jpg" for number in range(50)]
            again = await collect(session, first, ledger=ledger)
            assert all(outcome.response for outcome in again)
            assert len(api.seen) - sent < 20


# claims


async def test_a_claim_is_held_until_it_is_released(build):
    async with opened(build()) as one, opened(build()) as other:
        assert await one.claim(KEY) == Claim()
        assert await other.claim(KEY) is None
        watching = asyncio.create_task(other.watch(KEY))
        await asyncio.sleep(0.1)
        assert not watching.done()
        await release(one, KEY, ambiguous=False)
        await watching
        assert await other.claim(KEY) == Claim()
        await release(other, KEY, ambiguous=True)
        assert await one.claim(KEY) == Claim(ambiguous=True)
        await one.record_response(KEY, RESPONSE, seconds=1.5)
        assert await other.claim(KEY) is None
        await other.watch(KEY)
        record = await other.find(KEY)
        assert (record.response, record.seconds) == (RAW, 1.5)


async def test_a_task_is_handed_on_with_its_claim(build):
    async with opened(build()) as one, opened(build()) as other:
        await one.claim(KEY)
        await one.record_submitted(KEY, "task|1")
        assert (await one.find(KEY)).task_id == "task|1"
        assert await other.find(KEY) is None  # another worker waits for it
        await release(one, KEY, ambiguous=True)
        assert (await other.find(KEY)).task_id == "task|1"
        assert await other.claim(KEY) == Claim(task_id="task|1")
        await other.record_submitted(KEY, None)
        await release(other, KEY, ambiguous=False)
        assert await one.claim(KEY) == Claim()


async def test_the_claims_of_a_dead_worker_are_taken_over(build):
    dead = build(lease=0.5)
    await dead.open(**OWNER)
    await dead.claim(KEY)
    dead._worker._heart.cancel()  # not closed, as if its process was killed
    async with opened(build(lease=0.5)) as ledger:
        begun = time.monotonic()
        assert await ledger.claim(KEY) is None
        async with asyncio.timeout(30):
            await ledger.watch(KEY)
        assert time.monotonic() - begun >= 0.25  # half a lease, after it ended
        assert await ledger.claim(KEY) == Claim(ambiguous=True)
        # its late response counts; the error after it is ignored
        await dead.record_response(KEY, RESPONSE, seconds=1)
        await ledger.record_error(KEY, ServerError("no", status=500), seconds=2)
        assert (await ledger.find(KEY)).seconds == 1
    await dead.aclose()


async def test_a_worker_is_dead_after_half_a_lease_without_one(build, shared_redis):
    clock = ManualClock()
    one, other = build(lease=30), build(lease=30, clock=clock)
    async with opened(one), opened(other):
        for worker in (other._worker, one._worker):
            worker._heart.cancel()
        lease = worker.names.find_lease(worker.id)
        with redis.Redis.from_url(shared_redis.url) as client:
            await one.claim(KEY)
            await clock.advance(room.QUIET)  # the server may be new
            for _ in range(2):  # the second time, after it was found alive
                client.delete(lease)
                assert await other.claim(KEY) is None
                await clock.advance(14)
                assert await other.claim(KEY) is None
                client.set(lease, "{}")
                assert await other.claim(KEY) is None
            client.delete(lease)
            assert await other.claim(KEY) is None
            await clock.advance(16)
            client.client_kill_filter(_type="normal", skipme=True)
            claiming = asyncio.create_task(other.claim(KEY))
            while not claiming.done():
                await clock.advance(0.05)
                await asyncio.sleep(0.02)
            assert await claiming is None  # perhaps Redis was away, and not the worker
            await clock.advance(16)
            assert await other.claim(KEY) == Claim(ambiguous=True)


async def test_a_closed_worker_counts_as_dead_before_its_lease_ends(build):
    clock = ManualClock()
    async with opened(build(lease=30, clock=clock)) as other:
        other._worker._heart.cancel()
        await clock.advance(room.QUIET)
        async with opened(build(lease=30)) as one:
            await one.claim(KEY)
        assert await other.claim(KEY) is None
        await clock.advance(16)
        assert await other.claim(KEY) == Claim(ambiguous=True)


async def test_claims_wait_after_a_recent_start_of_redis(build, own_redis, monkeypatch):
    monkeypatch.setattr(room, "QUIET", 100)
    clock = ManualClock()
    async with opened(build(own_redis.url)), opened(build(own_redis.url, clock=clock)) as other:
        claiming = asyncio.create_task(other.claim(KEY))
        for _ in range(3):
            await other.find(KEY)
        assert not claiming.done()
        await clock.advance(100)
        assert await claiming == Claim()


async def test_a_cancelled_claim_leaves_the_key_free(build):
    async with opened(build()) as one, opened(build()) as other:
        for steps in range(6):
            claiming = asyncio.create_task(one.claim(KEY))
            for _ in range(steps):
                await asyncio.sleep(0)
            claiming.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                if await claiming is not None:
                    one.release(KEY, ambiguous=False)
            await one.find(KEY)
            assert await other.claim(KEY) == Claim()
            await release(other, KEY, ambiguous=False)


async def test_records_noted_before_a_cancellation_are_kept(build):
    async with opened(build()) as ledger:
        recording = asyncio.create_task(ledger.record_response(KEY, RESPONSE, seconds=1))
        await asyncio.sleep(0)
        recording.cancel()
        await asyncio.wait([recording])
        assert (await ledger.find(KEY)).response == RAW


async def test_a_response_replaces_an_error_and_is_not_replaced(build):
    async with opened(build()) as ledger:
        await ledger.record_error(KEY, BadRequestError("no", status=400), seconds=1)
        assert isinstance((await ledger.find(KEY)).error, BadRequestError)
        await ledger.record_response(KEY, RESPONSE, seconds=2)
        await ledger.record_error(KEY, BadRequestError("no", status=400), seconds=3)
        await ledger.record_submitted(KEY, "late")
        record = await ledger.find(KEY)
        assert (record.response, record.error, record.seconds) == (RAW, None, 2)


async def test_writes_that_redis_lost_are_repeated(build, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "QUIET", 5.0)
    clock = ManualClock()
    with run_redis(tmp_path, fsync="no", options=("--appendonly", "no")) as forgetful:
        one, other = build(forgetful.url, lease=0.5), build(forgetful.url, clock=clock)
        async with opened(one), opened(other):
            keys = [Captioning(url).key for url in URLS[:4]]
            await one.claim(keys[0])
            await one.record_response(keys[0], RESPONSE, seconds=1)
            await one.claim(keys[1])
            await one.claim(keys[2])
            await one.record_submitted(keys[2], "task")
            await one.claim(keys[3])
            await release(one, keys[3], ambiguous=True)
            await clock.advance(room.QUIET)  # the server is new
            forgetful.kill()
            forgetful.start()
            asked = asyncio.gather(*(other.claim(key) for key in keys))
            finding = asyncio.create_task(other.find(keys[3]))
            while not finding.done():
                await clock.advance(0.05)
                await asyncio.sleep(0.02)
            for _ in range(3):
                await other.find(keys[3])
            assert not asked.done(), "a claim did not wait for the writes of others"
            await one.find(keys[3])
            await clock.advance(room.QUIET)
            claims = await asked
            assert claims == [None, None, None, Claim(ambiguous=True)]
            assert (await other.find(keys[0])).response == RAW
            assert (await one.find(keys[2])).task_id == "task"


async def test_a_broken_replay_is_repeated(build, tmp_path, monkeypatch):
    replay, broken = room.Worker._replay, []

    async def break_once(worker, link):
        if not broken:
            broken.append(worker)
            raise redis.exceptions.ConnectionError("broken")
        await replay(worker, link)

    monkeypatch.setattr(room.Worker, "_replay", break_once)
    with run_redis(tmp_path, fsync="no", options=("--appendonly", "no")) as forgetful:
        async with opened(build(forgetful.url)) as ledger:
            await ledger.record_response(KEY, RESPONSE, seconds=1)
            forgetful.kill()
            forgetful.start()
            assert (await ledger.find(KEY)).response == RAW
            assert broken


async def test_writes_before_a_long_outage_are_repeated(build, tmp_path, monkeypatch):
    """What Redis lost when it stopped is older than `REPLAY_SECONDS` when it comes back."""
    monkeypatch.setattr(room, "REPLAY_SECONDS", 0.1)
    monkeypatch.setattr(room, "BATCH_BYTES", 1)
    with run_redis(tmp_path, fsync="no", options=("--appendonly", "no")) as forgetful:
        async with opened(build(forgetful.url)) as ledger:
            await ledger.record_response(KEY, RESPONSE, seconds=1)
            forgetful.kill()
            await asyncio.sleep(0.2)
            key = Captioning(URLS[1]).key
            recording = asyncio.create_task(ledger.record_response(key, RESPONSE, seconds=1))
            await asyncio.sleep(0)
            forgetful.start()
            await recording
            assert (await ledger.find(KEY)).response == RAW


async def test_a_release_that_redis_lost_is_repeated(build, own_redis, namespace):
    name = f"{namespace}:key:".encode() + bytes.fromhex(KEY)
    with redis.Redis.from_url(own_redis.url) as admin:
        async with opened(build(own_redis.url)) as ledger:
            await ledger.claim(KEY)
            claimed = admin.get(name)
            await release(ledger, KEY, ambiguous=False)
            admin.set(name, claimed)  # as if the release were lost
            own_redis.kill()
            own_redis.start()
            assert await ledger.claim(KEY) == Claim()


async def test_opening_twice_after_a_failure_leaves_one_worker(build):
    async with opened(build()) as ledger:
        ledger._worker.link._fail("out of reach")
        await asyncio.gather(ledger.open(**OWNER), ledger.open(**OWNER))
    assert len(build().worker_stats()) == 1  # the one that failed, until its lease ends


async def test_a_restart_of_redis_kills_no_worker(build, own_redis):
    async with opened(build(own_redis.url, lease=0.5)) as one:
        async with opened(build(own_redis.url, lease=0.5)) as other:
            await one.claim(KEY)
            for _ in range(2):
                own_redis.kill()
                await asyncio.sleep(0.7)
                own_redis.start()
                assert await other.claim(KEY) is None


# the server


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
async def test_a_server_that_evicts_is_refused(build, tmp_path, policy):
    with run_redis(tmp_path, fsync="no", options=("--maxmemory-policy", policy)) as server:
        with pytest.raises(LedgerError, match="noeviction"):
            await build(server.url).open(**OWNER)


async def test_a_server_without_a_file_is_warned_of(build, tmp_path, caplog):
    with run_redis(tmp_path, fsync="no", options=("--appendonly", "no")) as server:
        async with opened(build(server.url)):
            assert "append-only" in caplog.text


async def test_a_full_server_is_waited_for(build, own_redis):
    with redis.Redis.from_url(own_redis.url) as admin:
        async with opened(build(own_redis.url)) as ledger:
            admin.config_set("maxmemory", 1)
            recording = asyncio.create_task(ledger.record_response(KEY, RESPONSE, seconds=1))
            await asyncio.sleep(0.2)
            assert not recording.done()
            admin.config_set("maxmemory", 0)
            await recording
            assert (await ledger.find(KEY)).response == RAW


async def test_a_server_that_became_a_replica_is_waited_for(build, own_redis):
    with redis.Redis.from_url(own_redis.url) as admin:
        async with opened(build(own_redis.url)) as ledger:
            admin.replicaof("127.0.0.1", 1)
            recording = asyncio.create_task(ledger.record_response(KEY, RESPONSE, seconds=1))
            claiming = asyncio.create_task(ledger.claim(Captioning(URLS[1]).key))
            await asyncio.sleep(0.3)
            assert not recording.done()
            assert not claiming.done()
            admin.replicaof("NO", "ONE")
            await recording
            assert await claiming == Claim()
            assert (await ledger.find(KEY)).response == RAW


async def test_opening_can_be_cancelled_at_any_step(build):
    for steps in range(12):
        ledger = build()
        opening = asyncio.create_task(ledger.open(**OWNER))
        for _ in range(steps):
            await asyncio.sleep(0.0005)
        opening.cancel()
        await asyncio.wait([opening])
        await ledger.open(**OWNER)
        assert await ledger.claim(KEY) == Claim()
        ledger.release(KEY, ambiguous=False)
        await ledger.aclose()
        await ledger.aclose()
    await until(lambda: len(asyncio.all_tasks()) == 1)


@pytest.mark.slow
async def test_a_hundred_thousand_steps_at_once_are_served(build):
    keys = [f"{number:064x}" for number in range(20_000)]
    async with opened(build()) as one, opened(build()) as other:
        claims = await asyncio.gather(*(w.claim(key) for key in keys for w in (one, other)))
        assert sum(claim is not None for claim in claims) == len(keys)
        await asyncio.gather(*(one.record_submitted(key, key) for key in keys))
        for key in keys:
            one.release(key, ambiguous=False)
            other.release(key, ambiguous=False)
        await asyncio.gather(one.find(keys[0]), other.find(keys[0]))  # after the releases
        found = await asyncio.gather(*(other.find(key) for key in keys))
        assert [record.task_id for record in found] == keys


async def test_a_namespace_belongs_to_one_cloud(build):
    async with opened(build()) as ledger:
        with pytest.raises(LedgerError, match="other-cloud"):
            await ledger.open(**{**OWNER, "cloud_name": "other-cloud"})
        with pytest.raises(LedgerError, match=r"belongs to demo at http://127.0.0.1:1"):
            await build().open(**{**OWNER, "cloud_name": "other-cloud"})


async def test_a_server_out_of_reach_is_an_error(build, monkeypatch):
    monkeypatch.setattr(ledgers, "OPEN_PATIENCE", 1000.0)
    async with asyncio.timeout(30):
        with pytest.raises(LedgerError, match=r"redis://127\.0\.0\.1:1/0"):
            await build("redis://127.0.0.1:1/0", patience=0.3).open(**OWNER)


async def test_lost_scripts_are_loaded_again(build, shared_redis):
    async with opened(build()) as ledger:
        with redis.Redis.from_url(shared_redis.url) as admin:
            admin.script_flush()
        assert await ledger.claim(KEY) == Claim()


async def test_strange_values_are_an_error_and_left_alone(build, shared_redis, namespace):
    async with opened(build()) as ledger:
        name = f"{namespace}:key:".encode() + bytes.fromhex(KEY)
        for value in (b"junk", b"A|0||1|\x09junk", b"A|0||x|"):
            with redis.Redis.from_url(shared_redis.url) as admin:
                admin.set(name, value)
            with pytest.raises(LedgerError, match="cannot be read"):
                await ledger.find(KEY)


async def test_strange_claims_are_an_error_and_left_alone(build, shared_redis, namespace):
    name = f"{namespace}:key:".encode() + bytes.fromhex(KEY)
    with redis.Redis.from_url(shared_redis.url) as admin:
        for value in (b"C|w#1|0|t|\xff", b"C|\xff#1|0||s", b"C|w", b"O|1", b"junk"):
            async with opened(build(patience=1)) as ledger:
                admin.set(name, value)
                with pytest.raises(LedgerError, match="cannot be read"):
                    await ledger.claim(KEY)
            assert admin.get(name) == value


async def test_an_answer_replaces_a_value_that_cannot_be_read(build, shared_redis, namespace):
    name = f"{namespace}:key:".encode() + bytes.fromhex(KEY)
    async with opened(build(patience=1)) as ledger:
        for value in (b"C|w", b"O|1", b"junk"):
            with redis.Redis.from_url(shared_redis.url) as admin:
                admin.set(name, value)
            await ledger.record_response(KEY, RESPONSE, seconds=1)
            assert (await ledger.find(KEY)).response == RAW


async def test_a_key_of_another_type_concerns_no_other_key(build, shared_redis, namespace):
    async with opened(build(patience=1)) as ledger:
        with redis.Redis.from_url(shared_redis.url) as admin:
            admin.lpush(f"{namespace}:key:".encode() + bytes.fromhex(KEY), "x")
        for asking in (
            ledger.find(KEY),
            ledger.claim(KEY),
            ledger.record_response(KEY, RESPONSE, seconds=1),
        ):
            other = asyncio.ensure_future(ledger.claim(Captioning(URLS[1]).key))
            with pytest.raises(LedgerError, match="WRONGTYPE"):
                await asking
            assert await other == Claim()
            await release(ledger, Captioning(URLS[1]).key, ambiguous=False)


async def test_a_claim_that_is_always_refused_ends_the_patience(build, monkeypatch):
    """The replies to other commands do not prolong it."""
    monkeypatch.setattr(room, "SCRIPT", "return redis.error_reply('ERR refused')")
    async with opened(build(patience=0.5, lease=0.5)) as ledger:
        with pytest.raises(LedgerError, match="a claim was not answered"):
            await asyncio.wait_for(ledger.claim(KEY), 20)


async def test_records_expire_if_asked(build, shared_redis, namespace):
    async with opened(build(keep=60)) as ledger:
        await ledger.record_response(KEY, RESPONSE, seconds=1)
    with redis.Redis.from_url(shared_redis.url) as admin:
        assert 50 < admin.ttl(f"{namespace}:key:".encode() + bytes.fromhex(KEY)) <= 60


async def test_workers_show_statistics_while_they_run(build):
    async with opened(build(lease=0.5)) as one, opened(build(lease=0.5)) as other:
        one.describe(lambda: {"calls": 7})
        await other.claim(KEY)
        async with asyncio.timeout(30):
            while True:
                shown = await asyncio.to_thread(build().worker_stats)
                if {(s.get("calls"), s["claims"]) for s in shown} == {(7, 0), (None, 1)}:
                    break
                await asyncio.sleep(0.02)
    assert build().worker_stats() == []


# the value


def test_it_pickles_and_prints_without_the_password(build, monkeypatch):
    url = "rediss://user:hunter2@127.0.0.1:7777/0?ssl_password=hunter3"
    ledger = build(url, lease=7)
    for text in (repr(ledger), pickle.dumps(ledger), str(ledger.location)):
        assert b"hunter" not in (text if isinstance(text, bytes) else text.encode())
    assert ":hunter2@" in ledger.location.resolve()
    again = pickle.loads(pickle.dumps(ledger))
    assert (again.lease, again.namespace) == (7, ledger.namespace)
    assert again.location.resolve() == "rediss://user@127.0.0.1:7777/0"
    monkeypatch.setenv("REDIS_URL", "redis://:p%40ss@127.0.0.1:7777")
    assert again.location.resolve() == "rediss://user:p%40ss@127.0.0.1:7777/0"
    monkeypatch.setenv("REDIS_URL", "redis://:p%40ss@elsewhere:7777")
    assert "p%40ss" not in again.location.resolve()
    assert copy.copy(ledger)._worker is None


def test_a_url_names_the_variable_of_its_password(build, monkeypatch):
    ledger = build("redis://127.0.0.1:7777/0?password_env=MINE")
    assert ledger.location.resolve() == "redis://127.0.0.1:7777/0"
    monkeypatch.setenv("MINE", "p@ss")
    assert ledger.location.resolve() == "redis://:p%40ss@127.0.0.1:7777/0"
    monkeypatch.setenv("MINE", "redis://me:p%40ss@elsewhere")
    assert ledger.location.resolve() == "redis://me:p%40ss@127.0.0.1:7777/0"


def test_the_url_may_come_from_the_environment(monkeypatch):
    with pytest.raises(ConfigurationError, match="REDIS_URL"):
        RedisLedger()
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:7777/3")
    assert RedisLedger().location.url == "redis://127.0.0.1:7777/3"


@pytest.mark.parametrize(
    "options",
    [
        {"url": "http://user:hunter2@x"},
        {"url": "redis://user:12#hunter2@localhost/0"},
        {"url": "redis://localhost/0?decode_responses=True"},
        {"url": 3},
        {"namespace": ""},
        {"keep": 0},
        {"lease": 0.1},
        {"lease": True},
        {"patience": -1},
        {"patience": float("nan")},
    ],
)
def test_invalid_arguments_are_refused_without_the_password(build, options):
    with pytest.raises(ConfigurationError) as caught:
        build(**options)
    assert "hunter2" not in str(caught.value)


async def test_a_password_works_and_a_wrong_one_is_reported(build, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(ledgers, "OPEN_PATIENCE", 1000.0)
    with run_redis(tmp_path, fsync="no", options=("--requirepass", "hunter2")) as server:
        url = server.url.replace("//", "//:hunter2@")
        async with opened(build(url)) as ledger:
            assert await ledger.claim(KEY) == Claim()
            assert await asyncio.to_thread(lambda: list(ledger.iter_records())) == []
        for wrong in (server.url, server.url.replace("//", "//:hunter3@")):
            async with asyncio.timeout(30):  # at once, without patience
                with pytest.raises(LedgerError, match="credentials") as caught:
                    await build(wrong).open(**OWNER)
            assert "hunter" not in str(caught.value)
    assert "hunter2" not in caplog.text


async def test_using_it_when_it_is_not_open_is_an_error(build):
    ledger = build()
    for step in (ledger.find(KEY), ledger.claim(KEY), ledger.record_submitted(KEY, "x")):
        with pytest.raises(LedgerError, match="not open"):
            await step
    ledger.release(KEY, ambiguous=False)
    await ledger.aclose()


async def test_an_open_ledger_that_is_dropped_warns(build):
    ledger = build()
    await ledger.open(**OWNER)
    with pytest.warns(ResourceWarning, match="dropped"):
        del ledger
    await until(lambda: len(asyncio.all_tasks()) == 1)


async def test_an_open_ledger_belongs_to_its_loop(build):
    async with opened(build()) as ledger:

        def use():
            with pytest.raises(LedgerError, match="another event loop"):
                asyncio.run(ledger.find(KEY))
            with pytest.raises(LedgerError, match="another event loop"):
                asyncio.run(ledger.open(**OWNER))

        await asyncio.to_thread(use)


async def test_large_and_odd_responses_survive(build):
    raw = {"data": {"analysis": {"x": "ü\u2028" * 300_000}}, "n": -9223372036854775809}
    async with opened(build()) as ledger:
        response = Response(None, model="captioning", raw=raw)
        await ledger.record_response(KEY, response, seconds=1)
        assert (await ledger.find(KEY)).response == raw
