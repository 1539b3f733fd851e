"""The listener: no delivery stops it, and a source that fails is read again."""

import asyncio
import itertools
import sys
import time

import pytest
from scripted import no_collector
from task_support import (
    NOW,
    SECRET,
    Service,
    attach,
    build_failure,
    build_result,
    hold,
    resolving,
    sign,
    submit,
)

from cloudinary_analyze import Delivery
from cloudinary_analyze._tasks import listener
from cloudinary_analyze._tasks.listener import FETCH_BATCH
from cloudinary_analyze.errors import NotificationSourceError
from cloudinary_analyze.notifications import QueueSource

HOUR = 3600.0
LIMITS = {"addons_quota": [{"type": "object_detection", "remaining": 40}]}


class Recorder(QueueSource):
    """A queue that records which deliveries were acknowledged."""

    def __init__(self):
        super().__init__(asyncio.Queue())
        self.acknowledged = []

    def acknowledge(self, delivery):
        self.acknowledged.append(delivery)

    def send(self, delivery):
        self.queue.put_nowait(delivery)


class Brittle:
    """A source that fails or ends as often as the test asks, with an optional memory."""

    def __init__(self, *ends):
        self.ends = list(ends)
        self.begun = []

    async def listen(self):
        self.begun.append(None)
        end = self.ends.pop(0) if self.ends else asyncio.Event()
        if isinstance(end, asyncio.Event):
            await end.wait()
            return
        if isinstance(end, BaseException):
            raise end
        for delivery in end:
            yield delivery


class Mailbox(Brittle):
    """A source that stores its deliveries."""

    def __init__(self, *ends):
        super().__init__(*ends)
        self.kept = {}
        self.asked = []
        self.failures = []

    async def fetch(self, task_ids):
        self.asked.append(list(task_ids))
        if self.failures:
            raise self.failures.pop(0)
        return [self.kept[task_id] for task_id in task_ids if task_id in self.kept]


async def settled():
    for _ in range(20):
        await asyncio.sleep(0)


def verdicts(tracker):
    return dict(tracker.meter.notifications)


class TestRefused:
    """Forged, stale, malformed and foreign deliveries touch no task and stop nothing."""

    @pytest.mark.parametrize(
        ("delivery", "verdict"),
        [
            (sign(build_result("t1", "wrong"), secret="another"), "forged"),
            (Delivery(build_result("t1", "wrong"), {}, received_at=NOW), "forged"),
            (Delivery(build_result("t1"), {"X-Cld-Signature_v2": "v2"}), "forged"),
            (sign(build_result("t1", "wrong"), at=NOW - 3 * HOUR), "stale"),
            (sign(build_result("t1", "wrong"), at=NOW + 600), "stale"),
            (sign(build_result("t1", "wrong"), received_at=float("nan")), "stale"),
            (sign(b'{"task_id": "t1", '), "malformed"),
            (sign(b"[]"), "malformed"),
            (sign(b"\xff\xfe"), "malformed"),
            ("no delivery at all", "malformed"),
            (Delivery("text", {}), "malformed"),
            (Delivery(b"{}", None), "malformed"),
            (sign(build_result("t99")), "parked"),
            (sign(b'{"notification_type": "upload"}'), "unrelated"),
        ],
    )
    async def test_verdict(self, clock, delivery, verdict):
        source = Recorder()
        async with resolving(Service(clock), source=source) as tracker:
            wait = await submit(tracker)
            source.send(delivery)
            await settled()
            assert verdicts(tracker) == {verdict: 1}
            assert wait.answer is None
            assert not source.acknowledged
            other = await submit(tracker)
            genuine = sign(build_result(other.entry.task_id))
            source.send(genuine)
            await settled()
            assert other.answer.body is not None
            assert genuine in source.acknowledged
            assert len(source.begun if hasattr(source, "begun") else [1]) == 1

    async def test_no_secret_is_logged(self, clock, caplog):
        caplog.set_level("DEBUG")
        source = Recorder()
        async with resolving(Service(clock), source=source):
            for delivery in (sign(b"garbage"), sign(b"{}", secret="x"), sign(b"{}", at=0)):
                source.send(delivery)
            await settled()
        assert len(caplog.records) == 3
        assert SECRET not in caplog.text


class TestAcknowledge:
    async def test_only_deliveries_that_answer_are_acknowledged(self, clock):
        source = Recorder()
        async with resolving(Service(clock), source=source) as tracker:
            await submit(tracker)
            result, again = sign(build_result("t1")), sign(build_result("t1"))
            foreign = sign(build_result("someone-elses"))
            for delivery in (result, again, foreign, foreign):
                source.send(delivery)
            await settled()
            assert source.acknowledged == [result, again]
            assert verdicts(tracker) == {"resolved": 1, "duplicate": 1, "parked": 2}

    async def test_a_failed_acknowledgement_stops_no_listener(self, clock, caplog):
        source = Recorder()
        source.acknowledge = lambda _: 1 / 0
        async with resolving(Service(clock), source=source) as tracker:
            waits = [await submit(tracker) for _ in range(3)]
            for wait in waits:
                source.send(sign(build_result(wait.entry.task_id)))
            await settled()
            assert all(wait.answer.body is not None for wait in waits)
            assert clock.next_at is None or clock.now == 0
        assert "acknowledge" in caplog.text


class TestReceipt:
    """The age of a delivery is measured at its first receipt, however late it is read."""

    async def test_one_that_was_stored_for_hours_is_fresh(self, clock):
        source = Recorder()
        async with resolving(Service(clock), source=source) as tracker:
            wait = await submit(tracker)
            stored = NOW - 1000 * HOUR
            source.send(sign(build_result("t1"), at=stored, received_at=stored + 60))
            await settled()
            assert wait.answer.body is not None

    async def test_one_that_was_old_when_received_stays_stale(self, clock):
        source = Recorder()
        async with resolving(Service(clock), source=source) as tracker:
            await submit(tracker)
            source.send(sign(build_result("t1"), at=NOW - 3 * HOUR, received_at=NOW))
            await settled()
            assert verdicts(tracker) == {"stale": 1}

    async def test_without_a_receipt_only_the_digest_counts(self, clock):
        source = Recorder()
        async with resolving(Service(clock), source=source) as tracker:
            wait = await submit(tracker)
            source.send(sign(build_result("t1"), at=1, received_at=None, secret="another"))
            await settled()
            assert verdicts(tracker) == {"forged": 1}
            source.send(sign(build_result("t1"), at=1, received_at=None))
            await settled()
            assert wait.answer.body is not None


class TestGrace:
    async def test_a_failed_tasks_reason_arrives_within_the_grace(self, clock):
        source = Recorder()
        service = Service(clock, state=lambda _: "failed")
        async with resolving(service, source=source) as tracker:
            wait = await submit(tracker)
            await clock.advance(7)
            assert wait.entry.status == "failed"
            source.send(sign(build_failure("t1", "too dark")))
            await settled()
            assert wait.answer.error.cause_known
            await clock.advance(1000)
            assert verdicts(tracker) == {"resolved": 1}

    async def test_a_completed_result_arrives_within_the_grace(self, clock):
        source = Recorder()
        service = Service(clock, state=lambda _: "completed")
        async with resolving(service, source=source) as tracker:
            wait = await submit(tracker)
            await clock.advance(1100)
            source.send(sign(build_result("t1")))
            await settled()
            assert wait.answer.body is not None


class TestYield:
    async def test_a_full_queue_never_blocks_the_loop_for_long(self, clock):
        """The listener yields to the loop by elapsed time, whatever the queue holds."""
        source = Recorder()
        body = build_result("t0", "a cat " * 30_000)
        for index in range(100):
            source.send(sign(body.replace(b"t0", b"t%d" % index)))
        async with resolving(Service(clock), source=source, parked_bytes=100 * 2**20):
            longest, left = 0.0, source.queue.qsize()
            with no_collector():
                while left:
                    begun = time.thread_time()
                    await asyncio.sleep(0)
                    longest = max(longest, time.thread_time() - begun)
                    left = source.queue.qsize()
            assert longest < 0.05

    async def test_a_turn_takes_about_two_milliseconds(self, clock, monkeypatch):
        ticks = itertools.count()
        monkeypatch.setattr(listener, "perf_counter", lambda: next(ticks) / 1000)
        source = Recorder()
        for index in range(100):
            source.send(sign(build_result(f"t{index}")))
        async with resolving(Service(clock), source=source):
            most, left = 0, source.queue.qsize()
            while left:
                await asyncio.sleep(0)
                most, left = max(most, left - source.queue.qsize()), source.queue.qsize()
            assert most <= 4


class TestSourceEnds:
    async def test_pending_tasks_fail_with_the_cause(self, clock):
        over = asyncio.Event()
        service = Service(clock)
        async with resolving(service, source=Brittle(over)) as tracker:
            waits = [await submit(tracker) for _ in range(3)]
            over.set()
            await settled()
            for wait in waits:
                error = wait.answer.error
                assert isinstance(error, NotificationSourceError)
                assert error.task_id == wait.entry.task_id
                assert "ended" in str(error)
                assert error.__cause__ is not None
            assert not tracker.table.pending

            paid = service.calls
            late = hold(tracker.submit(waits[0].entry.request, as_task=True, deadline=None))
            assert isinstance(late.answer.error, NotificationSourceError)
            assert isinstance(attach(tracker, "t9").answer.error, NotificationSourceError)
            await settled()
            assert service.calls == paid  # its result could not arrive, so it was not sent

    @pytest.mark.skipif(sys.version_info < (3, 13), reason="needs asyncio.Queue.shutdown")
    @pytest.mark.parametrize("immediate", [True, False])
    async def test_a_queue_that_was_shut_down_has_ended(self, clock, immediate):
        source = QueueSource(asyncio.Queue())
        async with resolving(Service(clock), source=source) as tracker:
            waits = [await submit(tracker) for _ in range(2)]
            source.queue.put_nowait(sign(build_result("t1")))
            source.queue.shutdown(immediate=immediate)
            await settled()
            assert all(wait.answer is not None for wait in waits)
            assert isinstance(waits[1].answer.error, NotificationSourceError)
            assert immediate or waits[0].answer.body is not None


class TestSourceFails:
    async def test_a_failed_source_is_resumed_with_backoff(self, clock, caplog):
        source = Brittle(*[ConnectionError("gone")] * 10)
        async with resolving(Service(clock), source=source):
            begun_at = []
            for _ in range(200):
                await clock.advance(0.5)
                while len(begun_at) < len(source.begun):
                    begun_at.append(clock.now)
            gaps = [b - a for a, b in itertools.pairwise(begun_at[1:])]
            assert gaps[:5] == [1, 2, 4, 8, 16]
            assert max(gaps) == 30
        assert "gone" in caplog.text

    async def test_a_delivery_resets_the_backoff(self, clock):
        async def once_then_break(self):
            self.begun.append(clock.now)
            yield sign(build_result("t9"))
            raise ConnectionError("gone")

        source = Brittle()
        source.listen = once_then_break.__get__(source)
        async with resolving(Service(clock), source=source):
            await clock.advance(5)
            assert source.begun == [index / 2 for index in range(11)]

    async def test_a_source_that_cancels_itself_is_resumed(self, clock):
        source = Brittle(asyncio.CancelledError(), [sign(build_result("t1"))])
        async with resolving(Service(clock), source=source) as tracker:
            wait = await submit(tracker)
            await clock.advance(1)
            assert wait.answer.body is not None

    async def test_every_pending_task_is_fetched_again(self, clock):
        broken = asyncio.Event()

        class Breaking(Mailbox):
            async def listen(self):
                self.begun.append(clock.now)
                if len(self.begun) == 1:
                    await broken.wait()
                    raise ConnectionError("gone")
                await asyncio.Event().wait()
                yield

        source = Breaking()
        async with resolving(Service(clock), source=source) as tracker:
            waits = [await submit(tracker) for _ in range(5)]
            await settled()
            assert list(itertools.chain(*source.asked)) == [f"t{number}" for number in range(1, 6)]
            source.kept = {"t3": sign(build_result("t3"))}  # without a listener
            source.asked.clear()
            broken.set()
            await clock.advance(1)
            assert sorted(itertools.chain(*source.asked)) == [
                f"t{number}" for number in range(1, 6)
            ]
            assert [wait.answer is not None for wait in waits] == [0, 0, 1, 0, 0]


class TestMemory:
    async def test_earlier_deliveries_are_fetched_for_a_new_task(self, clock):
        """A worker that starts hours later still finds the result."""
        source = Mailbox()
        long_ago = NOW - 10 * HOUR
        source.kept["t7"] = sign(build_result("t7"), at=long_ago, received_at=long_ago)
        async with resolving(Service(clock), source=source) as tracker:
            wait = attach(tracker, "t7")
            await settled()
            assert wait.answer.body is not None

    async def test_a_lost_wake_up_delays_a_result_by_30_s_at_most(self, clock):
        source = Mailbox()
        async with resolving(Service(clock), source=source) as tracker:
            wait = await submit(tracker)
            await settled()
            source.kept["t1"] = sign(build_result("t1"))
            await clock.advance(29)
            assert wait.answer is None
            await clock.advance(1)
            assert wait.answer.body is not None

    async def test_a_failed_fetch_is_repeated(self, clock, caplog):
        source = Mailbox()
        source.failures = [ConnectionError("gone"), asyncio.CancelledError()]
        source.kept["t1"] = sign(build_result("t1"))
        async with resolving(Service(clock), source=source) as tracker:
            wait = await submit(tracker)
            await clock.advance(0.4)
            assert wait.answer is None
            await clock.advance(2)
            assert wait.answer.body is not None
        assert "could not be fetched" in caplog.text

    async def test_thousands_are_fetched_in_batches(self, clock):
        source = Mailbox()
        async with resolving(Service(clock), source=source) as tracker:
            for index in range(2 * FETCH_BATCH + 1):
                attach(tracker, f"t{index}")
            await settled()
            assert [len(batch) for batch in source.asked] == [FETCH_BATCH, FETCH_BATCH, 1]
            source.asked.clear()
            new = attach(tracker, "new")
            await clock.advance(31)
            asked = list(itertools.chain(*source.asked))
            assert asked[0] == new.entry.task_id
            assert sorted(set(asked)) == sorted(tracker.table.pending)
            assert max(len(batch) for batch in source.asked) == FETCH_BATCH

    async def test_a_requested_task_is_fetched_before_a_round_of_all(self, clock):
        source = Mailbox()
        async with resolving(Service(clock), source=source) as tracker:
            for index in range(4 * FETCH_BATCH):
                attach(tracker, f"t{index}")
            await settled()
            source.asked.clear()
            tracker.listener._ask_for_all()
            attach(tracker, "new")
            await settled()
            assert source.asked[0][0] == "new"
            assert len(set(itertools.chain(*source.asked))) == 4 * FETCH_BATCH + 1

    async def test_a_round_of_100_000_begins_quickly(self, clock):
        async with resolving(Service(clock), source=Mailbox()) as tracker:
            tracker.table.pending.update({f"t{index}": None for index in range(100_000)})
            with no_collector():
                begun = time.thread_time()
                tracker.listener._ask_for_all()
                assert time.thread_time() - begun < 0.03
            tracker.table.pending.clear()

    async def test_ids_without_a_waiting_handle_are_not_fetched(self, clock):
        source = Mailbox()
        async with resolving(Service(clock), source=source) as tracker:
            waits = [attach(tracker, f"t{index}") for index in range(3)]
            tracker.abandon(waits[1])
            await settled()
            assert source.asked == [["t0", "t2"]]

    async def test_a_source_that_is_down_retains_no_made_up_ids(self, clock):
        source = Mailbox()
        source.failures = [ConnectionError("gone")] * 1000
        async with resolving(Service(clock), source=source) as tracker:
            stays = attach(tracker, "stays")
            for index in range(20 * FETCH_BATCH):
                tracker.abandon(attach(tracker, f"t{index}"))
            assert len(tracker.listener._to_fetch) <= FETCH_BATCH + 10
            source.failures.clear()
            source.kept["stays"] = sign(build_result("stays"))
            await clock.advance(40)
            assert stays.answer.body is not None


class TestQuota:
    @pytest.mark.parametrize(
        "fields",
        [
            {"limits": LIMITS},
            {"limits": LIMITS, "data": None, "http_status": 400},
            {"limits": LIMITS, "data": None, "http_status": 429},
            {"data": {"limits": LIMITS, "analysis": {"data": {"caption": "a cat"}}}},
        ],
    )
    async def test_the_limits_of_a_notification_are_in_the_quota(self, clock, fields):
        source = Recorder()
        service = Service(clock)
        async with resolving(service, source=source) as tracker:
            wait = await submit(tracker)
            source.send(sign(build_result("t1", **fields)))
            await settled()
            assert wait.answer is not None
            assert service.quota.limits["object_detection"].remaining == 40
            await submit(tracker)
            odd = {**fields, "limits": {"items": "odd"}, "data": {"limits": 5}}
            source.send(sign(build_result("t2", **odd)))
            await settled()
            assert service.quota.limits["object_detection"].remaining == 40
