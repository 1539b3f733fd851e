"""URLs that differ only in their signature and its expiry name the same image."""

import pytest

from cloudinary_analyze._sources import is_same_image

A = "https://shop.example/a.jpg"

SIGNED = {
    "S3, version 4": (
        f"{A}?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Date=20260101T000000Z&X-Amz-Signature=aa",
        f"{A}?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Date=20260102T000000Z&X-Amz-Signature=bb",
    ),
    "S3, version 2": (
        f"{A}?AWSAccessKeyId=AK&Expires=1&Signature=x%2B",
        f"{A}?AWSAccessKeyId=AK&Expires=2&Signature=y",
    ),
    "CloudFront": (
        f"{A}?Policy=e30&Signature=a~&Key-Pair-Id=K1",
        f"{A}?Expires=5&Signature=b&Key-Pair-Id=K2&Hash-Algorithm=SHA256",
    ),
    "Google": (f"{A}?X-Goog-Date=1&X-Goog-Signature=a", f"{A}?x-goog-date=2&x-goog-signature=b"),
    "Azure": (
        f"{A}?sv=2024-11-04&st=2026-01-01&se=2026-01-02&sr=b&sp=r&sig=a%3D",
        f"{A}?sp=r&sv=2025-01-05&se=2026-02-02&sr=b&skoid=1&ske=2&sig=b",
    ),
    "Cloudinary, path": (
        "https://res.cloudinary.com/demo/image/upload/s--abcd_-12--/v1/a.jpg",
        "https://res.cloudinary.com/demo/image/upload/s--zzzzzzzz--/v1/a.jpg",
    ),
    "Cloudinary, token": (f"{A}?__cld_token__=exp=1~hmac=ab", f"{A}?__cld_token__=exp=2~hmac=cd"),
    "Tencent": (f"{A}?q-sign-time=1;2&q-ak=x&q-signature=a", f"{A}?q-sign-time=3;4&q-signature=b"),
    "imgix": (f"{A}?w=5&s={'0a' * 16}", f"{A}?w=5&s={'1b' * 16}&expires=7"),
    "token": (f"{A}?alt=media&token=1", f"{A}?alt=media&token=2"),
    "signed and unsigned": (A, f"{A}?Expires=1&Signature=a"),
    "case": (f"{A}?EXPIRES=1&SIG=a", f"{A}?expires=2&sig=b"),
    "order": (f"{A}?id=1&w=2", f"{A}?w=2&id=1"),
    "fragment": (f"{A}#one", f"{A}#two"),
    "spelling": (f"{A}?n=a%2fb", f"{A}?n=a/b"),
    "empty query": (A, f"{A}?"),
}


@pytest.mark.parametrize("name", SIGNED)
def test_urls_that_differ_by_signature_are_one_image(name: str) -> None:
    one, other = SIGNED[name]
    assert is_same_image(one, other)
    assert is_same_image(other, one)


DIFFERENT = {
    "id": (f"{A}?id=1", f"{A}?id=2"),
    "id beside a signature": (f"{A}?id=1&sig=a", f"{A}?id=2&sig=b"),
    "with and without": (A, f"{A}?id=1"),
    "width": (f"{A}?w=1&Expires=1", f"{A}?w=2&Expires=1"),
    "empty value": (f"{A}?id=", f"{A}?id=1"),
    "flag": (f"{A}?1", f"{A}?2"),
    "how often": (f"{A}?id=1", f"{A}?id=1&id=1"),
    "value's case": (f"{A}?id=a", f"{A}?id=A"),
    "name's case": (f"{A}?id=a", f"{A}?ID=a"),
    "short name without a sig": (f"{A}?sp=1", f"{A}?sp=2"),
    "q- without a signature": (f"{A}?q-size=1", f"{A}?q-size=2"),
    "s that is a size": (f"{A}?s=1", f"{A}?s=2"),
    "a name that holds one": (f"{A}?designature=1", f"{A}?designature=2"),
    "a nested url": (f"{A}?url=https://b.example/?id=1", f"{A}?url=https://b.example/?id=2"),
    "path": (A, "https://shop.example/b.jpg"),
    "host": (A, A.replace("shop", "other")),
    "scheme": (A, A.replace("https", "http")),
    "version": (A.replace("a.", "v1/a."), A.replace("a.", "v2/a.")),
    "signature as a file": (f"{A}/s--abcd--", f"{A}/s--efgh--"),
    "not utf-8": (f"{A}?id=%ff", f"{A}?id=%fe"),
    "asset": ("asset:a?token=1", "asset:a?token=2"),
    "kind": ("asset:a", A),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_urls_that_differ_otherwise_are_two_images(name: str) -> None:
    one, other = DIFFERENT[name]
    assert not is_same_image(one, other)
    assert not is_same_image(other, one)
    assert is_same_image(one, one)
