"""Signatures match the vendor's to the byte. This verifier is stricter than the vendor's."""

from __future__ import annotations

import base64
import copy
import pickle
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudinary_analyze import (
    ConfigurationError,
    Credentials,
    Delivery,
    InvalidSignatureError,
    MalformedNotificationError,
    NotificationError,
    StaleNotificationError,
    parse_notification,
    verify_signature,
    webhooks,
)
from cloudinary_analyze.emulator.webhooks import sign as sign_as_the_emulator
from cloudinary_analyze.webhooks import (
    VerifiedDelivery,
    compute_signature,
    find_header,
    parse_delivery,
    read_delivery,
    seal_delivery,
    verify_delivery,
)

BODY = b'{"task_id":"abc"}'
NOW = 1_790_000_000
SECRET = "test-api-secret-Zx9"
CREDENTIALS = Credentials("demo", "key", SECRET)


def sign(
    body: bytes = BODY, at: int | str = NOW, secret: str = SECRET, digest: str = "sha1"
) -> str:
    return compute_signature(body, str(at), secret, digest=digest)


def build_delivery(body: bytes = BODY, at: int = NOW) -> Delivery:
    headers = {"X-Cld-Signature": sign(body, at), "X-Cld-Timestamp": str(at)}
    return Delivery(body, headers, received_at=float(NOW))


def test_every_signature_vector_verifies(vectors: dict[str, Any]) -> None:
    cases = vectors["signature_vectors"]
    assert len(cases) == 15
    for case in cases:
        body = case["body"].encode()
        if case["body_utf8_hex_if_non_ascii"]:
            assert body.hex() == case["body_utf8_hex_if_non_ascii"]
        secret, timestamp, digest = case["api_secret"], case["timestamp"], case["algorithm"]
        assert compute_signature(body, timestamp, secret, digest=digest) == case["signature"]
        assert sign_as_the_emulator(body, timestamp, secret, digest=digest) == case["signature"]
        verify_signature(body, timestamp, case["signature"], [secret], now=int(timestamp))
        verify_signature(
            body, timestamp, case["signature"], secret, digests=digest, now=int(timestamp)
        )
        for wrong in (
            {"body": body + b" "},
            {"timestamp": str(int(timestamp) + 1)},
            {"signature": case["signature"][:-1] + ("0" if case["signature"][-1] != "0" else "1")},
            {"secrets": [secret + "x"]},
            {"digests": ["sha256" if digest == "sha1" else "sha1"]},
        ):
            call: dict[str, Any] = {
                "body": body,
                "timestamp": timestamp,
                "signature": case["signature"],
                "secrets": [secret],
                "now": int(timestamp),
                **wrong,
            }
            with pytest.raises(InvalidSignatureError):
                verify_signature(**call)


# how this verifier decides each case of the vendor's verifier; `None` means accepted
OURS: dict[str, tuple[dict[str, Any], type[Exception] | None]] = {
    "fresh": ({}, None),
    "stale_7201s": ({"timestamp": str(NOW - 7205)}, StaleNotificationError),
    "within_7190s": ({"timestamp": str(NOW - 7190)}, None),
    "future_1_day": ({"timestamp": str(NOW + 86_400)}, StaleNotificationError),  # stricter
    "uppercase_signature": ({"signature": sign().upper()}, InvalidSignatureError),
    "wrong_algorithm": (
        {"signature": sign(digest="sha256"), "digests": ["sha1"]},
        InvalidSignatureError,
    ),
    "sha256_explicit": ({"signature": sign(digest="sha256"), "digests": ["sha256"]}, None),
    "empty_signature": ({"signature": ""}, InvalidSignatureError),
    "none_signature": ({"signature": None}, InvalidSignatureError),
    "bytes_body": (
        {"body": BODY.decode()},
        TypeError,
    ),  # the reverse of the vendor's rule: only raw bytes
    "non_numeric_timestamp": ({"timestamp": "abc"}, InvalidSignatureError),
    "none_timestamp": ({"timestamp": None}, InvalidSignatureError),
    "float_string_timestamp": ({"timestamp": f"{NOW}.5"}, InvalidSignatureError),
    "unknown_algorithm": ({"digests": ["md5"]}, ConfigurationError),
    "stale_with_bytes_body": ({"timestamp": str(NOW - 7205)}, StaleNotificationError),
    "no_secret": ({"secrets": []}, ConfigurationError),
}


def test_every_case_of_the_vendors_verifier_is_covered(vectors: dict[str, Any]) -> None:
    cases = {case["name"]: case["result"] for case in vectors["verifier_behaviour"]}
    assert cases.keys() == OURS.keys()
    for name, (_, expected) in OURS.items():
        if expected is None:
            assert cases[name] is True, "this verifier may only be stricter"


@pytest.mark.parametrize("name", OURS)
def test_each_case_is_accepted_or_refused(name: str) -> None:
    changes, expected = OURS[name]
    call: dict[str, Any] = {"body": BODY, "timestamp": str(NOW), "secrets": [SECRET], "now": NOW}
    call |= changes
    call.setdefault("signature", sign(at=call["timestamp"]) if call["timestamp"] else sign())
    if expected is None:
        verify_signature(**call)
    else:
        with pytest.raises(expected):
            verify_signature(**call)


def test_polled_messages_verify_over_their_decoded_payload(vectors: dict[str, Any]) -> None:
    cases = [case for case in vectors["polled_message_vectors"] if "decoded_body" in case]
    assert len(cases) == 4
    for case in cases:
        message = case["message"]
        body = base64.urlsafe_b64decode(message["signed_payload"] + "==")
        assert body == case["decoded_body"].encode()
        # a polled message may be old: only its digest is checked
        delivery = Delivery(
            body,
            {"X-Cld-Signature": message["signature"], "X-Cld-Timestamp": message["timestamp"]},
            received_at=None,
        )
        verify_delivery(delivery, Credentials("demo", "key", case["api_secret"]))
        parse_notification(body)


def test_a_message_without_its_keys_never_verifies(vectors: dict[str, Any]) -> None:
    (case,) = [case for case in vectors["polled_message_vectors"] if "decoded_body" not in case]
    with pytest.raises(InvalidSignatureError):
        verify_signature(b"", None, case["message"]["signature"], [SECRET])


@pytest.mark.parametrize("digest", ["sha1", "sha256"])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_any_configured_secret_verifies(digest: str, position: int) -> None:
    secrets = ["first", "second", "third"]
    signature = sign(secret=secrets[position], digest=digest)
    verify_signature(BODY, str(NOW), signature, iter(secrets), now=NOW)
    with pytest.raises(InvalidSignatureError):
        verify_signature(BODY, str(NOW), signature, [s for s in secrets if s != secrets[position]])


@pytest.mark.parametrize(
    ("age", "error"),
    [(0, None), (7200, None), (7201, "limit: 7200 s"), (-300, None), (-301, "in the future")],
)
def test_the_window_bounds_past_and_future(age: int, error: str | None) -> None:
    timestamp = str(NOW - age)
    if error is None:
        verify_signature(BODY, timestamp, sign(at=timestamp), [SECRET], now=NOW)
    else:
        with pytest.raises(StaleNotificationError, match=error):
            verify_signature(BODY, timestamp, sign(at=timestamp), [SECRET], now=NOW)
    verify_signature(
        BODY, timestamp, sign(at=timestamp), [SECRET], now=NOW, oldest=None, newest=None
    )


def test_a_stale_forgery_is_reported_as_forged() -> None:
    with pytest.raises(InvalidSignatureError):
        verify_signature(BODY, "1", "0" * 40, [SECRET], now=NOW)


@pytest.mark.parametrize(
    "timestamp",
    ["", " 1790000000", "1790000000\n", "+1790000000", "-1", "1e9", "1_790_000_000",
     "1" * 16, "١٧٩٠٠٠٠٠٠٠", "0x6ab1", "１７９００００000"],
)  # fmt: skip
def test_a_timestamp_is_one_to_fifteen_ascii_digits(timestamp: str) -> None:
    with pytest.raises(InvalidSignatureError, match="no readable timestamp"):
        verify_signature(BODY, timestamp, sign(at=timestamp), [SECRET], now=NOW, oldest=None)


@pytest.mark.parametrize("timestamp", ["0", "1" * 15])
def test_timestamps_of_any_allowed_length_are_read(timestamp: str) -> None:
    verify_signature(
        BODY, timestamp, sign(at=timestamp), [SECRET], now=NOW, oldest=None, newest=None
    )


@given(signature=st.text(max_size=70), body=st.binary(max_size=50), timestamp=st.text(max_size=20))
def test_unsigned_bodies_raise_only_a_notification_error(
    signature: str, body: bytes, timestamp: str
) -> None:
    with pytest.raises(NotificationError):
        verify_signature(body, timestamp, signature, [SECRET], now=NOW)


@pytest.mark.parametrize("secrets", [[], [""], ["a", ""], ""])
def test_an_empty_secret_never_verifies_anything(secrets: Any) -> None:
    with pytest.raises(ConfigurationError):
        verify_signature(BODY, str(NOW), sign(secret=""), secrets, now=NOW)


@pytest.mark.parametrize("names", [str, str.lower, str.upper])
def test_header_names_are_case_insensitive(names: Any) -> None:
    headers = {names("X-Cld-Signature"): sign(), names("X-Cld-Timestamp"): str(NOW)}
    verify_delivery(Delivery(BODY, headers, received_at=NOW), CREDENTIALS)
    assert find_header(headers, "x-cLD-timestamp") == str(NOW)
    assert find_header(headers, "X-Other") is None


def test_freshness_is_judged_at_the_first_receipt() -> None:
    headers = {"X-Cld-Signature": sign(), "X-Cld-Timestamp": str(NOW)}
    verify_delivery(Delivery(BODY, headers, received_at=NOW + 7199), CREDENTIALS)
    with pytest.raises(StaleNotificationError):
        verify_delivery(Delivery(BODY, headers, received_at=NOW + 7201), CREDENTIALS)
    with pytest.raises(StaleNotificationError):
        verify_delivery(Delivery(BODY, headers, received_at=NOW - 301), CREDENTIALS)


@pytest.mark.parametrize(
    "body", [b'{"data":{"task_id":"t"}}', b'{"task_id":7,"data":{"task_id":"t"}}']
)
def test_a_task_id_inside_the_data_is_read(body: bytes) -> None:
    assert parse_notification(body).task_id == "t"


def test_a_v2_signature_alone_is_refused_with_the_fix() -> None:
    headers = {"X-Cld-Signature_v2": "abc", "X-Cld-Timestamp": str(NOW)}
    with pytest.raises(InvalidSignatureError, match="auth_scheme"):
        verify_delivery(Delivery(BODY, headers, received_at=NOW), CREDENTIALS)


def test_no_error_reveals_the_expected_signature() -> None:
    with pytest.raises(InvalidSignatureError) as caught:
        verify_signature(BODY, str(NOW), "0" * 40, [SECRET], now=NOW)
    assert SECRET not in str(caught.value)
    assert sign() not in str(caught.value)


class TestVerifiedDelivery:
    """A process verifies and parses each webhook once. Any other delivery is verified again."""

    @pytest.fixture
    def counted(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Count digests and parses."""
        calls: list[str] = []

        def count(name: str) -> None:
            inner = getattr(webhooks, name)

            def call(*arguments: Any, **options: Any) -> Any:
                calls.append(name)
                return inner(*arguments, **options)

            monkeypatch.setattr(webhooks, name, call)

        count("compute_signature")
        count("parse_notification")
        return calls

    @staticmethod
    def seal() -> VerifiedDelivery:
        return seal_delivery(build_delivery(), CREDENTIALS)

    def test_a_delivery_is_verified_and_parsed_once(self, counted: list[str]) -> None:
        sealed = self.seal()
        assert counted == ["compute_signature", "parse_notification"]
        notification = read_delivery(sealed, Credentials("demo", "another-key", SECRET))
        assert notification.task_id == parse_delivery(sealed).task_id == "abc"
        assert read_delivery(seal_delivery(sealed, CREDENTIALS), CREDENTIALS) is notification
        assert len(counted) == 2

    @pytest.mark.parametrize(
        "credentials",
        [
            Credentials("demo", "key", "another-secret"),
            Credentials("demo", "key", SECRET, digests=["sha256"]),
            Credentials("demo", "key", SECRET, notification_secrets=["another-secret"]),
        ],
    )
    def test_other_secrets_and_digests_verify_again(self, credentials: Credentials) -> None:
        with pytest.raises(InvalidSignatureError):
            read_delivery(self.seal(), credentials)

    @pytest.mark.parametrize(
        "rebuild",
        [
            copy.copy,
            copy.deepcopy,
            *(
                lambda sealed, protocol=protocol: pickle.loads(pickle.dumps(sealed, protocol))
                for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
            ),
        ],
    )
    def test_a_copy_or_a_pickle_is_a_plain_delivery(self, rebuild: Any, counted: list[str]) -> None:
        sealed = self.seal()
        rebuilt = rebuild(sealed)
        assert type(rebuilt) is Delivery
        assert rebuilt == sealed == rebuilt
        assert hash(rebuilt) == hash(sealed)
        read_delivery(rebuilt, CREDENTIALS)
        assert counted == ["compute_signature", "parse_notification"] * 2

    @pytest.mark.parametrize(
        "changes",
        [{}, {"body": b'{"task_id":"forged"}'}, {"received_at": NOW + 9000.0}, {"headers": {}}],
    )
    def test_a_rebuilt_delivery_is_verified_again(
        self, changes: dict[str, Any], counted: list[str]
    ) -> None:
        sealed = self.seal()
        forged = attrs.evolve(sealed, **changes)
        assert parse_delivery(forged).raw == parse_notification(forged.body).raw
        counted.clear()
        if changes:
            with pytest.raises(NotificationError):
                read_delivery(forged, CREDENTIALS)
        else:
            read_delivery(forged, CREDENTIALS)
        assert ("compute_signature" in counted) is ("headers" not in changes)

    def test_a_restored_seal_is_ignored(self) -> None:
        """Some serializers restore objects by setting each attribute."""
        sealed, forged = self.seal(), VerifiedDelivery(b'{"task_id":"forged"}', {})
        for name in ("seal", "notification"):
            object.__setattr__(forged, name, copy.deepcopy(getattr(sealed, name)))
        with pytest.raises(InvalidSignatureError):
            read_delivery(forged, CREDENTIALS)

    def test_it_shows_no_secret(self) -> None:
        sealed = self.seal()
        shown = [repr(sealed), str(attrs.asdict(sealed)), repr(sealed.__reduce_ex__(4))]
        assert SECRET not in "".join(shown)
        assert SECRET.encode() not in pickle.dumps(sealed)

    @pytest.mark.parametrize(
        ("body", "at", "error"),
        [
            (BODY, NOW - 9000, StaleNotificationError),
            (b"[]", NOW, MalformedNotificationError),
            (b"{", NOW, MalformedNotificationError),
        ],
    )
    def test_a_stale_or_malformed_delivery_is_not_sealed(
        self, body: bytes, at: int, error: type[Exception]
    ) -> None:
        with pytest.raises(error):
            seal_delivery(build_delivery(body, at), CREDENTIALS)
