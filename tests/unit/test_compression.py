"""Compressed JSON of a Redis ledger."""

import json
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudinary_analyze.ledger import compression
from cloudinary_analyze.ledger.compression import compress, decompress

SAMPLES = Path(__file__).parent.parent / "samples"


@given(st.binary(max_size=2000))
def test_any_content_survives_compression(content):
    packed = compress(content)
    assert decompress(packed) == content
    assert len(packed) <= len(content) + 1


def test_small_responses_shrink_to_a_third():
    sizes = []
    for name in ("captioning", "coco", "google_tagging", "image_quality", "shop_classifier"):
        raw = json.loads((SAMPLES / f"{name}.json").read_bytes())
        raw["request_id"] = "5" + raw["request_id"][::-1]
        plain = json.dumps(
            {"source": raw["data"]["entity"], "model": name, "raw": raw}, separators=(",", ":")
        ).encode()
        sizes.append(len(compress(plain)) / len(plain))
    assert max(sizes) < 0.36


def test_the_first_format_stays_readable():
    # a stored ledger depends on the dictionary: a better one needs a new format byte
    assert zlib.crc32(compression._DICTIONARY_1) == 0xE3121726
    packed = bytes.fromhex("01c312a8781c872fb0510341a9b61600")
    assert json.loads(decompress(packed))["model"] == "captioning"


@pytest.mark.parametrize("packed", [b"", b"\x07abc", b"\x01\xff\xff\xff", compress(b"a" * 99)[:-1]])
def test_damaged_content_is_an_error(packed):
    with pytest.raises(ValueError):
        decompress(packed)


def test_a_bomb_is_refused_and_long_content_is_read(monkeypatch):
    monkeypatch.setattr(compression, "LARGEST", 1000)
    assert decompress(compress(b"a" * 1000)) == b"a" * 1000
    assert decompress(compress(b"a" * 1001)) == b"a" * 1001
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 5, 0, compression._DICTIONARY_1)
    bomb = b"\x01" + packer.compress(b"a" * 1_000_000) + packer.flush()
    with pytest.raises(ValueError, match="unpacks to more than 1000 bytes"):
        decompress(bomb)
