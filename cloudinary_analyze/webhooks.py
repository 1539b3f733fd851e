"""Webhooks: digest, verification and parsing. Pure functions without I/O.

The signature is ``hex(H(raw body ‖ timestamp ‖ secret))``, where H is SHA-1 or SHA-256. It is a
plain digest, not an HMAC. The tests compare it with signatures of the vendor's own SDK. Keep the
raw bytes: JSON that was parsed and serialized again never verifies.

Each process digests and parses a webhook once. The receiver makes a `VerifiedDelivery`, which
carries its `Notification` to a session of the same process and credentials (`read_delivery`).

Source: the webhook.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Final

import attrs

from cloudinary_analyze._wire.codec import loads
from cloudinary_analyze.config import Credentials
from cloudinary_analyze.errors import (
    ConfigurationError,
    InvalidSignatureError,
    MalformedNotificationError,
    StaleNotificationError,
    shorten,
)
from cloudinary_analyze.responses import Delivery, Notification, find_string

__all__ = ["parse_notification", "verify_signature"]

SIGNATURE_HEADER: Final = "X-Cld-Signature"
SIGNATURE_V2_HEADER: Final = "X-Cld-Signature_v2"
TIMESTAMP_HEADER: Final = "X-Cld-Timestamp"
SIGNATURE_HEADERS: Final = (SIGNATURE_HEADER, SIGNATURE_V2_HEADER, TIMESTAMP_HEADER)

OLDEST: Final = 7200.0
NEWEST: Final = 300.0
MOST_DIGITS: Final = 15
_DIGESTS: Final[Mapping[str, Callable[..., Any]]] = {"sha1": hashlib.sha1, "sha256": hashlib.sha256}
_HEX_LENGTHS: Final = {40: "sha1", 64: "sha256"}


def is_timestamp(text: str) -> bool:
    """Whether it is Unix seconds in decimal, of a plausible length."""
    return text.isdigit() and text.isascii() and len(text) <= MOST_DIGITS


def compute_signature(body: bytes, timestamp: str, secret: str, *, digest: str = "sha1") -> str:
    """Return the lower-case hex signature of a webhook.

    Args:
        body: The raw bytes of the body.
        timestamp: Unix seconds in decimal, as sent in ``X-Cld-Timestamp``.
        secret: The secret that signs the account's notifications.
        digest: ``"sha1"`` (the service's default) or ``"sha256"``.
    """
    signed = body + (timestamp + secret).encode()
    signature: str = _DIGESTS[digest](signed, usedforsecurity=False).hexdigest()
    return signature


def verify_signature(
    body: bytes,
    timestamp: str | None,
    signature: str | None,
    secrets: Iterable[str],
    *,
    digests: Iterable[str] = ("sha1", "sha256"),
    now: float | None = None,
    oldest: float | None = OLDEST,
    newest: float | None = NEWEST,
) -> None:
    """Verify that a notification was signed recently and with one of the secrets; raise otherwise.

    Sessions and receivers call it for you. The comparison takes the same time for any signature.

    ```python
    body = b'{"notification_type": "analyze"}'
    headers = sign_notification(body, credentials)
    verify_signature(
        body,
        headers["X-Cld-Timestamp"],
        headers["X-Cld-Signature"],
        credentials.signing_secrets,
    )
    print(parse_notification(body).raw)
    ```

    Source: the headers ``X-Cld-Timestamp`` and ``X-Cld-Signature`` of the webhook.

    Args:
        body: The raw body, byte for byte as received.
        timestamp: The value of ``X-Cld-Timestamp``: Unix seconds in decimal.
        signature: The value of ``X-Cld-Signature``: lower-case hex.
        secrets: The secrets that may have signed it. Pass several while one is rotated.
        digests: The digests to accept. Default: SHA-1 and SHA-256.
        now: Unix seconds of the receipt. Default: the time of the wall clock.
        oldest: The maximum age of the timestamp, in seconds. Default: 7,200. ``None``: any.
        newest: The maximum distance of the timestamp into the future, in seconds. Default: 300.
            ``None``: any.

    Raises:
        InvalidSignatureError: The signature is missing, malformed, or made with another secret.
        StaleNotificationError: The signature is valid, but too old or too far in the future.
        ConfigurationError: A secret is missing, or a digest is unknown.
        TypeError: The body is a string.
    """
    secrets = (secrets,) if isinstance(secrets, str) else tuple(secrets)
    digests = (digests,) if isinstance(digests, str) else tuple(digests)
    if not secrets or not all(secrets):
        raise ConfigurationError("Missing a secret to verify notifications with.")
    for name in digests:
        if name not in _DIGESTS:
            raise ConfigurationError(f"Digests are 'sha1' and 'sha256', not {name!r}.")
    signed_at = _verify(body, timestamp, signature, secrets, digests)
    oldest = math.inf if oldest is None else oldest
    newest = math.inf if newest is None else newest
    age = (time.time() if now is None else now) - signed_at
    if not -newest <= age <= oldest:
        raise _build_age_error(age, oldest=oldest, newest=newest)


def _verify(
    body: bytes,
    timestamp: str | None,
    signature: str | None,
    secrets: tuple[str, ...],
    digests: tuple[str, ...],
) -> int:
    """Return when it was signed, if it was signed with one of the secrets; else raise."""
    if isinstance(body, str):
        raise TypeError("The body must be the raw bytes as received, not a string.")
    if not signature:
        raise InvalidSignatureError("The notification has no signature.")
    if timestamp is None or not is_timestamp(timestamp):
        raise InvalidSignatureError("The notification has no readable timestamp.")
    matched = False
    digest = _HEX_LENGTHS.get(len(signature), "")
    if digest in digests and signature.isascii():
        for secret in secrets:  # all of them, so that the time taken reveals nothing
            expected = compute_signature(body, timestamp, secret, digest=digest)
            matched |= hmac.compare_digest(expected, signature)
    if not matched:
        raise InvalidSignatureError(
            "Signature mismatch: the notification was not signed with any configured secret. It "
            "may be forged, its body may have been changed in transit, or the account signs with "
            "another key or digest (see Credentials.notification_secrets and .digests)."
        )
    return int(timestamp)


def _build_age_error(age: float, *, oldest: float, newest: float) -> StaleNotificationError:
    if age < 0:
        seen = f"{-age:.0f} s in the future (limit: {newest:.0f} s), so it may be forged"
    else:
        seen = f"{age:.0f} s before it arrived (limit: {oldest:.0f} s), so it may be a replay"
    return StaleNotificationError(
        f"The timestamp of the notification is {seen}. If many are refused, check this machine's "
        "clock."
    )


def parse_notification(body: bytes) -> Notification:
    """Parse the body of a notification. Verify its signature first.

    A notification of any type that names a task belongs to it. Other notifications, such as those
    of uploads, are parsed too; their ``task_id`` is ``None``.

    Source: the body of the webhook.

    Args:
        body: The raw body.

    Raises:
        MalformedNotificationError: The body is not a JSON object.
    """
    try:
        raw = loads(body)
    except (ValueError, RecursionError) as error:
        raise MalformedNotificationError(
            f"The notification is not valid JSON: '{shorten(body)}'"
        ) from error
    if type(raw) is not dict:
        raise MalformedNotificationError(
            f"The notification is not a JSON object but {type(raw).__name__}."
        )
    task_id = raw.get("task_id")
    if type(task_id) is not str:
        task_id = find_string(raw, "task_id")  # the schema requires none of the fields
    return Notification(task_id or None, raw)


def find_header(headers: Mapping[str, str], name: str) -> str | None:
    """Return a header's value; names are compared without regard to case."""
    value = headers.get(name)
    if value is None:
        folded = name.lower()
        value = next((value for key, value in headers.items() if key.lower() == folded), None)
    return value


def verify_delivery(delivery: Delivery, credentials: Credentials) -> None:
    """Return if a delivery was signed with one of the secrets shortly before its first receipt.

    The age of a delivery without ``received_at`` is unknown, and not judged.

    Raises:
        InvalidSignatureError: See `verify_signature`.
        StaleNotificationError: See `verify_signature`.
    """
    headers = delivery.headers
    # nearly always under these names, and each call of `find_header` costs time
    signature = headers.get(SIGNATURE_HEADER) or find_header(headers, SIGNATURE_HEADER)
    if signature is None and find_header(headers, SIGNATURE_V2_HEADER) is not None:
        raise InvalidSignatureError(
            "The notification has a v2 signature only, which only the vendor can verify. "
            "Set the trigger's auth_scheme to 'default' or 'legacy_hmac'."
        )
    signed_at = _verify(
        delivery.body,
        headers.get(TIMESTAMP_HEADER) or find_header(headers, TIMESTAMP_HEADER),
        signature,
        credentials.signing_secrets,
        credentials.digests,
    )
    received_at = delivery.received_at
    if received_at is not None and not -NEWEST <= received_at - signed_at <= OLDEST:
        raise _build_age_error(received_at - signed_at, oldest=OLDEST, newest=NEWEST)


_SEAL_KEY: Final = os.urandom(32)
_seals: Final[dict[bytes, object]] = {}


def _find_seal(credentials: Credentials) -> object:
    """Return the object that identifies some credentials in this process only."""
    parts = "\0".join((*credentials.digests, *credentials.signing_secrets))
    name = hashlib.blake2b(parts.encode(), key=_SEAL_KEY, digest_size=16).digest()
    return _seals.setdefault(name, object())


@attrs.frozen(repr=False, eq=False)
class VerifiedDelivery(Delivery):
    """A delivery that was verified and parsed in this process. Only `seal_delivery` makes one.

    Its copies and pickles are plain deliveries, which are verified again. The seal is an object
    that is compared by identity, so nothing that was deserialized can hold it. It holds no secret.

    Attributes:
        seal: Identifies the credentials it was verified with.
        notification: What it says.
    """

    seal: object = attrs.field(default=None, init=False, repr=False)
    notification: Notification | None = attrs.field(default=None, init=False, repr=False)

    def __eq__(self, other: object) -> bool:
        return self._build_plain() == other

    def __hash__(self) -> int:
        return hash(self._build_plain())

    def __reduce__(self) -> tuple[Callable[..., Delivery], tuple[Any, ...]]:
        return partial(Delivery, received_at=self.received_at), (self.body, self.headers)

    def _build_plain(self) -> Delivery:
        return Delivery(self.body, self.headers, received_at=self.received_at)


def seal_delivery(delivery: Delivery, credentials: Credentials) -> VerifiedDelivery:
    """Verify and parse a delivery, so that this process does neither again.

    Raises:
        NotificationError: It is forged, stale or malformed.
    """
    notification = read_delivery(delivery, credentials)
    sealed = VerifiedDelivery(delivery.body, delivery.headers, received_at=delivery.received_at)
    object.__setattr__(sealed, "seal", _find_seal(credentials))
    object.__setattr__(sealed, "notification", notification)
    return sealed


def read_delivery(delivery: Delivery, credentials: Credentials) -> Notification:
    """Verify a delivery and return what it says.

    A `VerifiedDelivery` of the same process and secrets is neither verified nor parsed again.

    Raises:
        NotificationError: It is forged, stale or malformed.
    """
    if type(delivery) is not VerifiedDelivery or delivery.seal is not _find_seal(credentials):
        verify_delivery(delivery, credentials)
    return parse_delivery(delivery)


def parse_delivery(delivery: Delivery) -> Notification:
    """Return what a delivery says, unverified; parsed only if this process did not before.

    Raises:
        MalformedNotificationError: The body is not a JSON object.
    """
    known = delivery.notification if type(delivery) is VerifiedDelivery else None
    return parse_notification(delivery.body) if known is None else known
