"""When two URLs name one image: they differ by their signature and its expiry alone. Pure.

Ignored are the fragment, the order of the query's parameters, Cloudinary's signature in the path
(``/s--…--/``), and the parameters of signatures:

====================  ==========================================================================
Any service           ``signature``, ``sig``, ``hmac``, ``token``, ``access_token``,
                      ``expires``, ``expiry``, ``expiration``, ``exp``
Cloudinary, Akamai    ``__cld_token__``, ``__token__``, ``__gda__``, ``hdnts``, ``hdnea``, ``_a``
Amazon S3             ``X-Amz-*``, ``AWSAccessKeyId``
Amazon CloudFront     ``Key-Pair-Id``, ``Policy``, ``Hash-Algorithm``
Google Cloud Storage  ``X-Goog-*``, ``GoogleAccessId``
Azure, beside a sig   ``sv``, ``ss``, ``srt``, ``sr``, ``sp``, ``st``, ``se``, ``sip``, ``spr``,
                      ``sdd``, ``si``, ``ses``, ``sk*`` (``skoid``, ``sktid``, …), ``saoid``,
                      ``suoid``, ``scid``
Alibaba, Tencent      ``OSSAccessKeyId``, ``security-token``, ``X-Oss-*``, ``q-*`` beside a
                      ``q-signature``
imgix                 ``s``, if it is an MD5 sum
====================  ==========================================================================

Their case does not matter. Every other parameter, such as ``id`` or ``width``, distinguishes images.
"""

from __future__ import annotations

import re
from collections.abc import Set as AbstractSet
from typing import Final
from urllib.parse import parse_qsl

_IN_PATH: Final = re.compile(r"/s--[\w-]+--(?=/)")
_ALWAYS: Final = re.compile(
    r"signature|sig|hmac|token|access_token|expires|expiry|expiration|exp"
    r"|__cld_token__|__token__|__gda__|hdnts|hdnea|_a"
    r"|x-(?:amz|goog|oss)-.+|awsaccesskeyid|googleaccessid|ossaccesskeyid|security-token"
    r"|key-pair-id|policy|hash-algorithm"
)
_AZURE: Final = re.compile(
    r"sv|ss|srt|sr|sp|st|se|sip|spr|sdd|si|ses|sk(?:oid|tid|t|e|s|v)|saoid|suoid|scid"
)
_TENCENT: Final = re.compile(r"q-.+")
_MD5: Final = re.compile(r"[0-9a-f]{32}")


def is_same_image(source: str, other: str) -> bool:
    """Whether two sources name one image: they are equal, or URLs that differ by their signature."""
    return source == other or _simplify(source) == _simplify(other)


def _simplify(source: str) -> tuple[str, list[tuple[str, str]]]:
    if source[:4].lower() != "http":
        return source, []
    url, _, _ = source.partition("#")
    path, _, query = url.partition("?")
    parameters = parse_qsl(query, keep_blank_values=True, errors="surrogateescape")
    names = {name.lower() for name, _ in parameters}
    kept = [pair for pair in parameters if not _is_signature(*pair, names)]
    return _IN_PATH.sub("", path), sorted(kept)


def _is_signature(name: str, value: str, names: AbstractSet[str]) -> bool:
    name = name.lower()
    if _ALWAYS.fullmatch(name):
        return True
    if name == "s":
        return _MD5.fullmatch(value) is not None
    azure = "sig" in names and _AZURE.fullmatch(name)
    return bool(azure or ("q-signature" in names and _TENCENT.fullmatch(name)))
