"""Compressed JSON: zlib with a dictionary of the text that analyses have in common.

The first byte of the result names the format. A format is never changed; a better dictionary gets a
new byte, so that older ledgers stay readable.
"""

from __future__ import annotations

import zlib
from typing import Final

_RAW: Final = 0
_ZLIB_1: Final = 1
_LEVEL: Final = 6
_WINDOW: Final = -15
LARGEST: Final = 2**28  # bytes of unpacked content; longer content is stored uncompressed
_MEMORY: Final = 5  # halves the time of small texts

# the most frequent text comes last, where references are shortest
_DICTIONARY_1: Final = (
    b'"type":"BadRequestError","message":"","fields":{"status":400,"code":"","category":"user_error'
    b'","request_id":"","details":["json",{}],"raw_body":["bytes",""]}'
    b'"quality_analysis":{"focus":0.9,"jpeg_quality":0.9,"color_score":0.9,"noise":0.9}'
    b'"moderation":{"status":"rejected","response":{"labels":[]}}'
    b'"answers":[{"prompt_id":"","value":""}],"responses":[{"prompt":"","value":"yes"}],"usage":'
    b'"full_text_annotation":{"text":"","locale":"en"},"text_annotations":[{"bounding_poly":'
    b'"vertices":[{"x":0,"y":0}]'
    b'"label_annotations":{"labels":[{"label":"table","score":0.8},{"label":"'
    b'"people":[{"confidence":0.9,"keypoints":{"nose":{"x":0.5,"y":0.5,"confidence":0.9}'
    b'"tags":{"chair":[{"bounding-box":[0.0,0.0,100.5,100.25],"categories":["animal"],"confidence"'
    b':0.9734},{"bounding-box":[12.0,70.5],"categories":["person"],"confidence":0.9912}]'
    b'"used_by_request":1,"remaining":49,"limit":50}]},"request_id":"'
    b'{"index":0,"source":"https://res.cloudinary.com/demo/image/upload/sample.jpg","model":"coco"'
    b',"raw":{"limits":{"addons_quota":[{"type":"google_tagging","used_by_request":1,"remaining":'
    b'{"source":"https://","model":"captioning","raw":{"limits":{"addons_quota":[{"type":"'
    b'object_detection","used_by_request":1,"remaining":499,"limit":500}]},"request_id":"17c3b70c"'
    b',"data":{"entity":"https://example.com/images/1.jpg","analysis":{"data":{"caption":"A person '
    b'standing in front of a white background with the "},"model_version":1}}}'
)

# its copies need not read the dictionary, which takes longer than a small text
_PACKER: Final = zlib.compressobj(
    _LEVEL, zlib.DEFLATED, _WINDOW, _MEMORY, zlib.Z_DEFAULT_STRATEGY, _DICTIONARY_1
)


def compress(content: bytes) -> bytes:
    """Return the content, compressed if that is shorter."""
    if len(content) > LARGEST:
        return bytes((_RAW,)) + content
    packer = _PACKER.copy()
    packed = packer.compress(content) + packer.flush()
    if len(packed) < len(content):
        return bytes((_ZLIB_1,)) + packed
    return bytes((_RAW,)) + content


def decompress(packed: bytes) -> bytes:
    """Return the content that `compress` received.

    Raises:
        ValueError: The format is unknown, or the content is damaged.
    """
    if not packed:
        raise ValueError("empty content")
    kind, content = packed[0], packed[1:]
    if kind == _RAW:
        return content
    if kind != _ZLIB_1:
        raise ValueError(f"content of the unknown format {kind}; it needs a newer version")
    unpacker = zlib.decompressobj(_WINDOW, _DICTIONARY_1)
    try:
        plain = unpacker.decompress(content, LARGEST)
    except zlib.error as error:
        raise ValueError(f"damaged content: {error}") from error
    if unpacker.unconsumed_tail:
        raise ValueError(f"damaged content: it unpacks to more than {LARGEST} bytes")
    if not unpacker.eof:
        raise ValueError("damaged content: its end is missing")
    return plain
