"""The arithmetic of Cloudinary's webhook signature.

``hex(H(raw body ‖ timestamp ‖ secret))`` with SHA-1 or SHA-256: a plain digest, not an HMAC.
The client verifies with it and the emulator signs with it; it is the one rule they share, and
it is pinned to vectors that the vendor's own SDK made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Final

SIGNATURE_HEADER: Final = "X-Cld-Signature"
SIGNATURE_V2_HEADER: Final = "X-Cld-Signature_v2"
TIMESTAMP_HEADER: Final = "X-Cld-Timestamp"

DIGESTS: Final[Mapping[str, Callable[..., Any]]] = {"sha1": hashlib.sha1, "sha256": hashlib.sha256}

MOST_DIGITS: Final = 15


def is_timestamp(text: str) -> bool:
    """Whether it is Unix seconds in decimal, of a length that can be right."""
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
    signature: str = DIGESTS[digest](signed, usedforsecurity=False).hexdigest()
    return signature
