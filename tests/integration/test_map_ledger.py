"""`map` with a ledger: nothing is requested twice, and nothing is yielded unrecorded."""

import asyncio
import itertools
import json
from pathlib import Path

import pytest
from aiohttp import web
from scripted import (
    CAPTION,
    SECRET,
    ScriptedServer,
    after,
    answer,
    one_after_the_other,
    until,
    wind,
)
from task_support import build_failure, build_result, sign

from cloudinary_analyze import (
    AuthenticationError,
    BadRequestError,
    BulkStoppedError,
    Captioning,
    Coco,
    ConfigurationError,
    Delivery,
    InvalidRequestError,
    LedgerError,
    NotFoundError,
    ResultNotDeliveredError,
    ServerError,
    TaskFailedError,
)
from cloudinary_analyze.ledger.sqlite import SQLiteLedger
from cloudinary_analyze.protocols import Claim, Ledger, LedgerRecord
from cloudinary_analyze.testing import ManualClock

URLS = [f"https://example.com/{number}.jpg" for number in range(12)]


def source_of(body):
    return json.loads(body)["source"]["uri"]


def by_source(answers, default=CAPTION):
    """Respond according to the last part of the source's path."""

    async def handle(request):
        name = Path(source_of(await request.read())).name
        return await answers.get(name, default)(request)

    return handle


async def collect(session, urls=URLS, to_request=Captioning, **options):
    async with session.map(urls, to_request, **options) as stream:
        return [outcome async for outcome in stream]


async def drain(stream, into):
    async with stream:
        async for outcome in stream:
            into.append(outcome)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.ledger"


class Recorder(Ledger):
    """A ledger in memory that a test can pause and break."""

    def __init__(self):
        self.records = {}
        self.durable = asyncio.Event()
        self.durable.set()
        self.broken = None
        self.left = 10**9

    async def open(self, **owner):
        self.owner = owner

    async def find(self, key):
        return self.records.get(key)

    async def _record(self, key, **fields):
        await self.durable.wait()
        self.left -= 1
        if self.left < 0:
            raise self.broken
        self.records[key] = LedgerRecord(key=key, **fields)

    async def record_submitted(self, key, task_id):
        await self._record(key, task_id=task_id)

    async def record_response(self, key, response, *, seconds):
        await self._record(key, response=response.raw)

    async def record_error(self, key, error, *, seconds):
        await self._record(key, error=error)


# calls


async def test_finished_items_are_restored_and_others_are_sent(path):
    error = {"error": {"message": "no"}}
    faults = {
        "1.jpg": answer(400, error),
        "2.jpg": answer(404, error),
        "3.jpg": answer(500, error),
        "4.jpg": answer(200, {"data": {}}),
    }
    expected = {1: BadRequestError, 2: NotFoundError, 3: ServerError}
    async with ScriptedServer(by_source(faults)) as server:
        async with SQLiteLedger(path) as ledger, server.session(attempts=1) as session:
            first = await collect(session, ledger=ledger)
            for outcome in first:
                record = await ledger.find(outcome.request.key)
                assert outcome.response is None or outcome.response.raw == record.response
        assert {o.index: type(o.error) for o in first if o.index in expected} == expected
        asked = len(server.seen)
        async with SQLiteLedger(path) as ledger, server.session(attempts=1) as session:
            second = await collect(session, ledger=ledger, ordered=True)
        again = [source_of(seen.body) for seen in server.seen[asked:]]
    assert sorted(again) == [URLS[3], URLS[4]]
    assert [type(o.error) for o in second] == [
        type(o.error) for o in sorted(first, key=lambda o: o.index)
    ]
    assert [o.response for o in second] == [
        o.response for o in sorted(first, key=lambda o: o.index)
    ]
    assert vars(second[1].error) == vars(next(o for o in first if o.index == 1).error)


async def test_an_outcome_is_yielded_only_once_its_record_is_durable():
    ledger = Recorder()
    ledger.durable.clear()
    async with ScriptedServer(CAPTION) as server, server.session() as session:
        async with session.map(URLS[:1], Captioning, ledger=ledger) as stream:
            first = asyncio.ensure_future(anext(stream))
            await until(
                lambda: server.seen and not server.in_flight and not session.stats.in_flight
            )
            assert not first.done()
            ledger.durable.set()
            assert (await first).response is not None
    assert ledger.owner == {"base_url": server.url, "cloud_name": "demo"}


async def test_equal_keys_in_flight_share_one_call(path):
    released = asyncio.Event()
    async with ScriptedServer(after(released)) as server:
        async with SQLiteLedger(path) as ledger, server.session() as session:
            jobs = [
                asyncio.create_task(collect(session, URLS[:1] * 5, ledger=ledger)) for _ in "ab"
            ]
            await until(lambda: server.seen)
            for _ in range(20):
                await asyncio.sleep(0)
            released.set()
            outcomes = [outcome for job in jobs for outcome in await job]
        assert len(server.seen) == 1
    assert [outcome.response.analysis.caption for outcome in outcomes] == [
        outcomes[0].response.analysis.caption
    ] * 10
    assert (
        sorted(outcome.restored for outcome in outcomes) == [False] + [True] * 9
    )  # one is charged
    assert all(outcome.seconds > 0 for outcome in outcomes)


async def test_two_sessions_with_one_ledger_send_each_item_once(path):
    async with ScriptedServer(CAPTION) as server, SQLiteLedger(path) as ledger:
        async with server.session() as one, server.session() as other:
            found = await asyncio.gather(*(collect(s, ledger=ledger) for s in (one, other)))
        assert len(server.seen) == len(URLS)
    assert all(outcome.response for outcomes in found for outcome in outcomes)


async def test_a_transient_error_is_not_another_sessions(path):
    """Each session retries as its own settings say."""
    released = asyncio.Event()
    handler = one_after_the_other(after(released, answer(500)), CAPTION)
    async with ScriptedServer(handler) as server, SQLiteLedger(path) as ledger:
        async with server.session(attempts=1) as one, server.session() as other:
            first = asyncio.create_task(collect(one, URLS[:1], ledger=ledger))
            await until(lambda: server.seen)
            second = asyncio.create_task(collect(other, URLS[:1], ledger=ledger))
            for _ in range(20):
                await asyncio.sleep(0)
            released.set()
            (failed,), (answered,) = await first, await second
        assert isinstance(failed.error, ServerError)
        assert answered.response is not None
        assert len(server.seen) == 2


async def test_another_item_sends_if_the_sender_is_cancelled(path):
    released = asyncio.Event()
    async with ScriptedServer(after(released)) as server:
        async with SQLiteLedger(path) as ledger, server.session() as session:
            first = session.map(URLS[:1], Captioning, ledger=ledger)
            waiting = asyncio.ensure_future(anext(first))
            await until(lambda: len(server.seen) == 1)
            second = asyncio.create_task(collect(session, URLS[:1], ledger=ledger))
            for _ in range(20):
                await asyncio.sleep(0)
            await first.aclose()
            with pytest.raises(BulkStoppedError):
                await waiting
            released.set()
            assert (await second)[0].response is not None
        assert len(server.seen) == 2


async def test_a_key_identifies_sources_that_change(path):
    def sign_url(run):
        return [
            (number, f"https://example.com/{number}.jpg?v=1&Signature={run}") for number in range(4)
        ]

    def name(item):
        return "" if item[0] == 3 else f"picture {item[0]}"

    async with ScriptedServer(CAPTION) as server:
        for run in range(3):
            async with SQLiteLedger(path) as ledger, server.session() as session:
                outcomes = await collect(
                    session,
                    sign_url(run),
                    lambda item: Captioning(item[1]),
                    ledger=ledger,
                    key=name,
                )
                assert sum(outcome.response is not None for outcome in outcomes) == 3
                (bad,) = [outcome for outcome in outcomes if outcome.error]
                assert isinstance(bad.error, InvalidRequestError)
        assert len(server.seen) == 3
        server.handler = answer(sample="coco")
        async with SQLiteLedger(path) as ledger, server.session() as session:
            await collect(session, sign_url(0), lambda i: Coco(i[1]), ledger=ledger, key=name)
        assert len(server.seen) == 6  # another model, another key


async def test_arguments_that_do_not_fit_are_refused(path):
    async with ScriptedServer(CAPTION) as server, server.session() as session:
        with pytest.raises(ConfigurationError, match="pass `ledger` too"):
            session.map(URLS, Captioning, key=str)
        with pytest.raises(ConfigurationError, match="SQLiteLedger"):
            session.map(URLS, Captioning, ledger=str(path))


async def test_a_slow_consumer_holds_the_window(path):
    pulled = 0

    def items():
        nonlocal pulled
        for pulled in range(1, 301):
            yield f"https://example.com/{pulled}.jpg"

    most = taken = 0
    async with ScriptedServer(CAPTION) as server:
        async with SQLiteLedger(path) as ledger, server.session() as session:
            async with session.map(items(), Captioning, ledger=ledger, window=20) as stream:
                async for _ in stream:
                    most = max(most, pulled - taken)
                    taken += 1
                    await asyncio.sleep(0.005)
    assert taken == 300
    assert most == 20


# a ledger that breaks


@pytest.mark.parametrize("cause", [LedgerError("The disk is full."), OSError("gone")])
async def test_a_broken_ledger_stops_the_stream(cause):
    ledger = Recorder()
    ledger.left, ledger.broken = 5, cause
    endless = (f"https://example.com/{n}.jpg" for n in range(10**6))
    got = []
    async with ScriptedServer(CAPTION) as server, server.session(permits=2) as session:
        stream = session.map(endless, Captioning, ledger=ledger, window=50)
        with pytest.raises(BulkStoppedError) as caught:
            await drain(stream, got)
    assert isinstance(caught.value.reason, LedgerError)
    answered = [outcome for outcome in got if outcome.response is not None]
    assert len(answered) == len(server.seen) <= 5 + 2 * 2 + 1  # all that was charged
    recorded = [outcome for outcome in answered if not outcome.unrecorded]
    assert len(recorded) == 5 < len(answered)
    assert {outcome.request.key for outcome in recorded} == set(ledger.records)
    failed = [outcome.error for outcome in got if outcome.error]
    assert {type(error.reason) for error in failed} == {LedgerError}


async def test_a_ledger_that_cannot_be_opened_fails_before_anything_is_pulled(path):
    path.write_text("something else")
    pulled = []
    async with ScriptedServer(CAPTION) as server:
        async with SQLiteLedger(path) as ledger, server.session() as session:
            with pytest.raises(LedgerError, match="not a ledger"):
                await collect(session, map(pulled.append, URLS), ledger=ledger)
        assert not server.seen
    assert not pulled


async def test_an_error_of_all_items_stops_the_stream_unrecorded(path):
    async with ScriptedServer(answer(401, {"error": {"message": "who?"}})) as server:
        async with SQLiteLedger(path) as ledger, server.session(permits=1) as session:
            with pytest.raises(BulkStoppedError) as caught:
                await collect(session, ledger=ledger, window=1)
            assert isinstance(caught.value.reason, AuthenticationError)
            assert ledger.counts().failed == 0
        server.handler = CAPTION
        async with SQLiteLedger(path) as ledger, server.session() as session:
            assert all(outcome.response for outcome in await collect(session, ledger=ledger))


# tasks


class TaskService:
    """Accepts tasks, reports their status, and delivers on request."""

    def __init__(self):
        self.deliveries = asyncio.Queue()
        self.accepted = []
        self.hold = asyncio.Event()
        self.hold.set()
        self.known = True

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        if request.method == "GET":
            task_id = Path(request.path).name
            if not self.known:
                return await answer(404, {"error": {"message": "no such task"}})(request)
            data = {"data": {"task_id": task_id, "status": "processing"}}
            return await answer(200, data)(request)
        task_id = f"task-{Path(source_of(await request.read())).stem}"
        self.accepted.append(task_id)
        await self.hold.wait()
        return await answer(202, {"data": {"task_id": task_id, "status": "pending"}})(request)

    def deliver(self, task_id, *, failed=False):
        body = (build_failure if failed else build_result)(task_id)
        self.deliveries.put_nowait(
            Delivery(body, sign(body, secret=SECRET).headers, received_at=1_790_000_000.0)
        )

    def session(self, server, **options):
        return server.session(notifications=self.deliveries, **options)


async def test_tasks_are_resumed_and_not_submitted_again(path):
    service = TaskService()
    async with ScriptedServer(service) as server:
        async with SQLiteLedger(path) as ledger, service.session(server) as session:
            async with session.map(URLS, Captioning, mode="task", ledger=ledger) as stream:
                first = asyncio.ensure_future(anext(stream))
                await until(lambda: path.exists() and SQLiteLedger(path).counts().submitted == 12)
                service.deliver("task-5")
                assert (await first).item == URLS[5]
        async with SQLiteLedger(path) as ledger, service.session(server) as session:
            assert (ledger.counts().submitted, ledger.counts().answered) == (11, 1)
            for number in range(12):
                service.deliver(f"task-{number}", failed=number == 7)
            outcomes = await collect(session, mode="task", ledger=ledger, ordered=True)
        assert len(service.accepted) == 12
        assert isinstance(outcomes[7].error, TaskFailedError)
        assert all(outcome.response for outcome in outcomes if outcome.index != 7)
        async with SQLiteLedger(path) as ledger, service.session(server) as session:
            again = await collect(session, mode="task", ledger=ledger, ordered=True)
        assert len(service.accepted) == 12
        assert vars(again[7].error) == vars(outcomes[7].error)
        assert [o.response for o in again] == [o.response for o in outcomes]


async def test_leaving_the_stream_records_submissions_in_flight(path):
    service = TaskService()
    service.hold.clear()
    async with ScriptedServer(service) as server:
        async with SQLiteLedger(path) as ledger, service.session(server, permits=3) as session:
            stream = session.map(URLS, Captioning, mode="task", ledger=ledger)
            waiting = asyncio.ensure_future(anext(stream))
            await until(lambda: len(service.accepted) == 3)
            leaving = asyncio.create_task(stream.aclose())
            await asyncio.sleep(0)
            service.hold.set()
            await leaving
            with pytest.raises(BulkStoppedError):
                await waiting
            sent = len(service.accepted)
            assert sent <= 6  # of 12: only those that were about to be sent
        assert SQLiteLedger(path).counts().submitted == sent


@pytest.mark.parametrize("with_source", [False, True])
async def test_a_task_unknown_to_the_service_is_submitted_again(path, with_source):
    """Otherwise every later run would wait for it until its timeout."""
    service = TaskService()
    service.known = False
    clock = ManualClock()
    async with ScriptedServer(service) as server:
        async with SQLiteLedger(path) as ledger:
            await ledger.open(base_url=server.url, cloud_name="demo")
            await ledger.record_submitted(Captioning(URLS[0]).key, "task-old")
            server.handler = lambda request: (
                service(request) if request.method == "GET" else CAPTION(request)
            )
            # without a deadline, the clock moves only from poll to poll
            source = service.deliveries if with_source else None
            async with server.session(
                clock=clock, task_timeout=None, notifications=source
            ) as session:
                (outcome,) = await wind(clock, collect(session, URLS[:1], ledger=ledger))
            assert outcome.response is not None
            assert clock.now > 60
        assert [seen.method for seen in server.seen].count("POST") == 1


async def test_a_call_that_becomes_a_task_is_recorded_before_it_is_awaited(path):
    service = TaskService()
    async with ScriptedServer(service) as server:
        async with SQLiteLedger(path) as ledger, service.session(server) as session:
            stream = session.map(URLS[:1], Captioning, ledger=ledger)
            waiting = asyncio.ensure_future(anext(stream))
            await until(lambda: path.exists() and SQLiteLedger(path).counts().submitted == 1)
            service.deliver("task-0")
            assert (await waiting).response is not None
            await stream.aclose()


async def test_a_result_that_was_not_delivered_is_not_recorded(path):
    completed = answer(200, {"data": {"task_id": "task-0", "status": "completed"}})
    service = TaskService()
    async with ScriptedServer(service) as server:
        server.handler = lambda r: completed(r) if r.method == "GET" else service(r)
        session = service.session(server, poll_first=0.01, result_grace=0)
        async with SQLiteLedger(path) as ledger, session:
            (outcome,) = await collect(session, URLS[:1], ledger=ledger, mode="task")
            assert isinstance(outcome.error, ResultNotDeliveredError)
            assert (ledger.counts().submitted, ledger.counts().failed) == (1, 0)


# a failure of a task is judged like that of a call


async def test_the_next_run_repeats_transient_task_failures(path):
    service = TaskService()
    async with ScriptedServer(service) as server:
        async with SQLiteLedger(path) as ledger, service.session(server) as session:
            stream = session.map(URLS[:1], Captioning, mode="task", ledger=ledger)
            waiting = asyncio.ensure_future(anext(stream))
            await until(lambda: service.accepted)
            error = {"category": "server_error", "message": "unavailable"}
            body = build_result("task-0", data=None, error=error, http_status=503)
            headers = sign(body, secret=SECRET).headers
            service.deliveries.put_nowait(Delivery(body, headers, received_at=1_790_000_000.0))
            assert isinstance((await waiting).error, TaskFailedError)
            await stream.aclose()
            assert (ledger.counts().submitted, ledger.counts().failed) == (0, 0)
        async with SQLiteLedger(path) as ledger, service.session(server) as session:
            again = asyncio.create_task(collect(session, URLS[:1], mode="task", ledger=ledger))
            await until(lambda: len(service.accepted) == 2)
            service.deliver("task-0")
            (outcome,) = await again
        assert outcome.response is not None


# what outcomes and ledgers report


async def test_a_restored_outcome_has_its_recorded_duration(path):
    faults = {"1.jpg": answer(400, {"error": {"message": "no"}})}
    async with ScriptedServer(by_source(faults)) as server:
        for run in range(2):
            async with SQLiteLedger(path) as ledger, server.session() as session:
                outcomes = await collect(session, URLS[:3], ledger=ledger, ordered=True)
                assert [outcome.restored for outcome in outcomes] == [run == 1] * 3
                records = [await ledger.find(outcome.request.key) for outcome in outcomes]
            if run == 0:
                for outcome, record in zip(outcomes, records, strict=True):
                    assert 0 < record.seconds <= outcome.seconds
            else:
                seconds = [record.seconds for record in records]
                assert [outcome.seconds for outcome in outcomes] == seconds
        assert len(server.seen) == 3


async def test_a_ledger_keeps_the_items_of_all_its_streams(path):
    """The items of two streams over one ledger are all there, however often they run."""
    async with ScriptedServer(CAPTION) as server:
        for _ in range(2):
            async with SQLiteLedger(path) as ledger, server.session() as session:
                server.handler = CAPTION
                await collect(session, URLS, ledger=ledger)
                server.handler = answer(sample="coco")
                await collect(session, URLS[:5], Coco, ledger=ledger)
            items = list(SQLiteLedger(path).iter_items())
            assert [(item.index, item.source, item.model) for item in items[:12]] == [
                (index, url, "captioning") for index, url in enumerate(URLS)
            ]
            assert sorted((item.source, item.model) for item in items[12:]) == [
                (url, "coco") for url in sorted(URLS[:5])
            ]
            assert all(item.response is not None for item in items)
        assert len(server.seen) == 17


async def test_two_sources_of_one_key_in_the_window_are_refused(path):
    released = asyncio.Event()
    async with ScriptedServer(after(released)) as server:
        async with SQLiteLedger(path) as ledger, server.session() as session:
            stream = session.map(
                URLS[:2], Captioning, ledger=ledger, key=lambda _: "same", ordered=True
            )
            both = asyncio.create_task(drain(stream, outcomes := []))
            await until(lambda: server.seen)
            released.set()
            await both
        assert len(server.seen) == 1
    assert outcomes[0].response is not None
    assert isinstance(outcomes[1].error, InvalidRequestError)
    assert URLS[0] in str(outcomes[1].error)
    assert URLS[1] in str(outcomes[1].error)


@pytest.mark.parametrize("query", ["?id=2", "?id=1&w=2", "", "?id=1&id=2"])
async def test_a_key_with_another_query_is_refused(path, query):
    async with ScriptedServer(CAPTION) as server:
        async with SQLiteLedger(path) as ledger, server.session() as session:

            async def run(query):
                urls = [f"{URLS[0]}{query}"]
                (outcome,) = await collect(
                    session, urls, Captioning, ledger=ledger, key=lambda _: "one"
                )
                return outcome

            assert (await run("?id=1&Expires=1")).response is not None
            assert (await run("?Expires=2&id=1")).restored
            error = (await run(query)).error
            assert isinstance(error, InvalidRequestError)
            assert "Nothing was sent" in str(error)
        assert len(server.seen) == 1


# claims, as a ledger of several workers gives them


class Claims(Recorder):
    """A ledger whose claims a test decides on."""

    def __init__(self, *claims):
        super().__init__()
        self.claims = list(claims)
        self.steps = []
        self.on_watch = None

    async def claim(self, key):
        self.steps.append("claim")
        return self.claims.pop(0) if self.claims else Claim()

    async def watch(self, key):
        self.steps.append("watch")
        if self.on_watch is not None:
            self.records[key] = self.on_watch

    def release(self, key, *, ambiguous):
        self.steps.append(("release", ambiguous))

    async def note_item(self, key, **fields):
        self.noted = fields


async def test_a_denied_claim_waits_and_asks_the_ledger_again():
    ledger = Claims(None, None)
    async with ScriptedServer(CAPTION) as server, server.session() as session:
        (outcome,) = await collect(session, URLS[:1], ledger=ledger)
        assert outcome.response is not None
        assert ledger.steps == ["claim", "watch", "claim", "watch", "claim"]
        assert (len(server.seen), session.stats.calls) == (1, 1)  # denied claims do not count
        assert ledger.noted == {"source": URLS[0], "model": "captioning", "index": 0}


async def test_results_of_another_worker_are_restored():
    ledger = Claims(None)
    raw = {"data": {"analysis": {"data": {"caption": "theirs"}, "model_version": 1.0}}}
    ledger.on_watch = LedgerRecord(key="x", response=raw, seconds=2.0)
    async with ScriptedServer(CAPTION) as server, server.session() as session:
        (outcome,) = await collect(session, URLS[:1], ledger=ledger)
        assert (outcome.restored, outcome.seconds) == (True, 2.0)
        assert outcome.unwrap().analysis.caption == "theirs"
        assert (server.seen, session.stats.calls) == ([], 0)


async def test_restoring_yields_to_the_loop_every_few_milliseconds(monkeypatch):
    raw = {"data": {"analysis": {"data": {"caption": "a cat"}, "model_version": 1.0}}}
    ledger = Claims()
    urls = [f"https://example.com/{number}.jpg" for number in range(200)]
    for url in urls:
        key = Captioning(url).key
        ledger.records[key] = LedgerRecord(key=key, response=raw)
    restored = []
    async with ScriptedServer(CAPTION) as server:
        async with server.session(on_event=lambda _: restored.append(len(restored))) as session:
            loop = asyncio.get_running_loop()
            begun, calls = loop.time(), itertools.count()
            async with session.map(urls, Captioning, ledger=ledger, window=300) as stream:
                first = asyncio.ensure_future(anext(stream))
                most = 0
                with monkeypatch.context() as patch:
                    patch.setattr(loop, "time", lambda: begun + next(calls) / 1000)
                    while len(restored) < len(urls):
                        before = len(restored)
                        await asyncio.sleep(0)
                        most = max(most, len(restored) - before)
                await first
    assert most <= 20
    assert not server.seen


async def test_a_claim_with_a_task_attaches_to_it_and_sends_nothing():
    service = TaskService()
    ledger = Claims(Claim(task_id="task-9"))
    async with ScriptedServer(service) as server, service.session(server) as session:
        service.deliver("task-9")
        (outcome,) = await collect(session, URLS[:1], ledger=ledger)
    assert outcome.response is not None
    assert service.accepted == []


async def test_an_ambiguous_claim_counts_as_a_repeated_attempt_or_fails_unsent():
    async with ScriptedServer(CAPTION) as server:
        async with server.session() as session:
            ledger = Claims(Claim(ambiguous=True))
            (outcome,) = await collect(session, URLS[:1], ledger=ledger)
            assert outcome.response is not None
            assert session.stats.ambiguous_retries == 1
        async with server.session(retry_ambiguous=False) as session:
            ledger = Claims(Claim(ambiguous=True))
            (outcome,) = await collect(session, URLS[1:2], ledger=ledger)
            assert outcome.error.ambiguous
            assert ledger.steps == ["claim", ("release", True)]
        assert len(server.seen) == 1


async def test_a_claim_is_released_or_its_final_error_recorded():
    faults = {"0.jpg": answer(503), "1.jpg": answer(400), "2.jpg": answer(500)}
    async with ScriptedServer(by_source(faults)) as server:
        async with server.session(attempts=1) as session:
            releases = [[("release", False)], [], [("release", True)]]
            for url, release in zip(URLS[:3], releases, strict=True):
                ledger = Claims()
                await collect(session, [url], ledger=ledger)
                assert ledger.steps == ["claim", *release]
                assert bool(ledger.records) == (not release)


async def test_leaving_the_stream_releases_a_claim_as_ambiguous():
    ledger = Claims()
    async with ScriptedServer(lambda _: asyncio.Event().wait()) as server:
        async with server.session() as session:
            stream = session.map(URLS[:1], Captioning, ledger=ledger)
            waiting = asyncio.ensure_future(anext(stream))
            await until(lambda: server.seen)
            await stream.aclose()
            assert ledger.steps == ["claim", ("release", True)]
            with pytest.raises(BulkStoppedError):
                await waiting


@pytest.mark.parametrize("step", ["open", "note_item", "find", "claim", "record_response"])
async def test_a_cancelled_error_of_the_ledger_stops_the_stream_and_nothing_hangs(step):
    class Broken(Claims):
        pass

    async def fail(self, *_, **__):
        raise asyncio.CancelledError

    setattr(Broken, step, fail)
    async with ScriptedServer(CAPTION) as server, server.session(permits=2) as session:
        with pytest.raises((BulkStoppedError, LedgerError)) as caught:
            async with asyncio.timeout(30):
                await collect(session, ledger=Broken())
    reason = getattr(caught.value, "reason", None) or caught.value
    assert isinstance(reason, LedgerError)
    assert isinstance(reason.__cause__, asyncio.CancelledError)
