"""The state machine of a key in Redis: random walks of workers that steal, sleep and die."""

import random
from collections import Counter

import pytest
import redis

from cloudinary_analyze.ledger.claims import SCRIPT, decode_task, encode_task, read_state

WALKS = 40
STEPS = 300


@pytest.fixture
def client(shared_redis):
    with redis.Redis.from_url(shared_redis.url) as client:
        client.flushall()
        yield client


class Walk:
    """One key, four workers, and their invariants.

    A worker that counts as dead may be suspended, and later continue with its old token.
    """

    def __init__(self, client, seed):
        self.script = client.register_script(SCRIPT)
        self.client = client
        self.chance = random.Random(seed)
        self.number = 0
        self.holding = {}  # worker to the token that it believes to hold
        self.stale = []  # tokens of suspended workers
        self.answer = None
        self.failed = False
        self.task = ""
        self.source = ""
        self.lost = 0
        self.seen = Counter()

    def step(self, name, token, *arguments):
        reply = self.script(keys=[b"k"], args=[name, 0, token, *arguments])
        if self.chance.random() < 0.3:  # the reply was lost, so the step is sent again
            again = self.script(keys=[b"k"], args=[name, 0, token, *arguments])
            if name == "claim":
                assert again == reply
        return reply

    def read(self):
        value = self.client.get(b"k")
        return None if value is None else read_state(value)

    def claim(self, worker):
        self.number += 1
        token, dead = f"w{worker}#{self.number}", ""
        others = [other for other in self.holding if other != worker]
        if others and self.chance.random() < 0.3:
            dead = f"w{others[0]}"
        source = self.chance.choice(["", "a|1", "b\nü"])
        reply = self.step("claim", token, dead, source)
        if reply in {b"A", b"F"}:
            assert self.answer is not None or self.failed
            self.seen["final"] += 1
            return
        found = read_state(reply)
        if found.token != token:
            assert found.token in self.holding.values()
            self.seen["held"] += 1
            return
        assert self.answer is None
        assert not self.failed
        if self.holding:
            ((holder, old),) = self.holding.items()
            assert dead == f"w{holder}", "a key was held by two live workers"
            self.stale.append(old)
            del self.holding[holder]
            self.lost += not self.task
            self.seen["stolen"] += 1
        self.source = self.source or source
        told = found.lost, encode_task(found.task_id), found.source or ""
        assert told == (self.lost, self.task, self.source)
        self.holding[worker] = token

    def pick(self):
        """Return a token: of the holder, of a suspended worker, or of none."""
        tokens = [*self.holding.values(), *self.stale[-2:], ""]
        return self.chance.choice(tokens)

    def submit(self, _):
        token, task = self.pick(), self.chance.choice(["", "t|1", "t|2"])
        mine = token and token in self.holding.values()
        final = self.answer is not None or self.failed
        allowed = mine or not self.holding or (not self.task and task)
        self.step("submitted", token, encode_task(task or None))
        if not final and allowed:
            self.task = encode_task(task or None)

    def record(self, _):
        token, state = self.pick(), self.chance.choice("AF")
        self.number += 1
        self.step(state, token, f"1|{self.number}")
        if state == "A" and self.answer is None:
            self.answer = f"{self.number}".encode()
        self.failed |= state == "F"
        self.holding.clear()

    def release(self, _):
        token, ambiguous = self.pick(), self.chance.random() < 0.5
        empty = self.read() is None
        mine = token and token in self.holding.values()
        if empty and ambiguous and token:
            return  # only after a restart of Redis
        self.step("release", token, "1" if ambiguous and token else "0")
        if mine:
            self.holding.clear()
            self.lost += ambiguous and not self.task

    def check(self):
        found = self.read()
        if self.answer is not None:
            assert (found.state, found.payload) == ("A", self.answer), "a response was lost"
        elif self.failed:
            assert found.state == "F"
        elif self.holding:
            (token,) = self.holding.values()
            assert (found.state, found.token) == ("C", token)
        else:
            assert found is None or found.state == "O"
        if found is not None:
            assert (found.lost, encode_task(found.task_id)) == (self.lost, self.task)
            assert found.state in "AF" or (found.source or "") == self.source
        else:
            assert (self.lost, self.task, self.source) == (0, "", "")


def test_random_walks_keep_every_response_and_one_holder(client):
    seen = Counter()
    for seed in range(WALKS):
        client.flushall()
        walk = Walk(client, seed)
        final = walk.chance.choice([0.0, 0.002, 0.02])
        for _ in range(STEPS):
            worker = walk.chance.randrange(4)
            if walk.chance.random() < final:
                walk.record(worker)
            else:
                walk.chance.choice([walk.claim, walk.claim, walk.submit, walk.release])(worker)
            walk.check()
        seen += walk.seen
    assert min(seen["held"], seen["final"], seen["stolen"]) > 100


def test_a_claim_that_redis_lost_is_released_as_ambiguous(client):
    script = client.register_script(SCRIPT)
    assert script(keys=[b"k"], args=["release", 0, "w#1", "1"]) == 1
    assert read_state(client.get(b"k")).lost == 1
    assert script(keys=[b"k"], args=["release", 0, "w#1", "1"]) == 0


def test_answers_expire_when_asked_to_and_claims_never(client):
    script = client.register_script(SCRIPT)
    script(keys=[b"k"], args=["claim", 60_000, "w#1", ""])
    assert client.ttl(b"k") == -1
    script(keys=[b"k"], args=["A", 90_000, "w#1", "1|x"])
    assert client.ttl(b"k") > 80


@pytest.mark.parametrize("task", ["t|1", "%7C", "ü\ud800", "a" * 500])
def test_task_ids_may_hold_any_character(task):
    assert decode_task(encode_task(task).encode()) == task
    assert "|" not in encode_task(task)
