"""Credentials are right or refused with a sentence, never silently something else."""

from __future__ import annotations

import contextlib
import pickle
import string
from urllib.parse import quote

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cloudinary_analyze import ConfigurationError, Credentials, Settings
from cloudinary_analyze.config import read_base_url

PRINTABLE = st.characters(min_codepoint=0x21, exclude_categories=("Cs", "Cc", "Z"))
SECRETS = st.text(PRINTABLE, min_size=1, max_size=30)
NASTY = st.text(alphabet="ab1/:#@?&=%+'\"<>[]!$,;\\|~.", min_size=1, max_size=12)


@given(secret=SECRETS | NASTY)
def test_a_percent_encoded_secret_round_trips(secret: str) -> None:
    url = f"cloudinary://123:{quote(secret, safe='')}@demo"
    if secret.startswith("<") and secret.endswith(">"):
        with pytest.raises(ConfigurationError, match="angle brackets"):
            Credentials.from_url(url)
        return
    credentials = Credentials.from_url(url)
    assert (credentials.cloud_name, credentials.api_key) == ("demo", "123")
    assert credentials.api_secret == secret


@given(secret=SECRETS | NASTY, tail=st.sampled_from(["", "/cdn.example.com", "?secure=true"]))
def test_an_unencoded_secret_is_right_or_refused(secret: str, tail: str) -> None:
    assume("%" not in secret)  # whether %41 is an encoded A nobody can tell
    try:
        credentials = Credentials.from_url(f"cloudinary://123:{secret}@demo{tail}")
    except ConfigurationError:
        return
    assert (credentials.cloud_name, credentials.api_key) == ("demo", "123")
    assert credentials.api_secret == secret


@pytest.mark.parametrize("secret", ["a/b", "a#b", "a@b", "a?b", "a:b", "a&b=c", "a+b", "a[b]"])
def test_an_unencoded_secret_with_one_odd_character_is_right(secret: str) -> None:
    credentials = Credentials.from_url(f"cloudinary://123:{secret}@demo")
    assert (credentials.api_key, credentials.api_secret) == ("123", secret)


@pytest.mark.parametrize(
    "url",
    [
        "cloudinary://123:abc@demo",
        "  cloudinary://123:abc@demo \n",
        "'cloudinary://123:abc@demo'",
        '"cloudinary://123:abc@demo"',
        "CLOUDINARY_URL=cloudinary://123:abc@demo",
        'CLOUDINARY_URL="cloudinary://123:abc@demo"',
        "export_is_not".removeprefix("export_is_not") + "CLOUDINARY://123:abc@demo",
        "cloudinary://123:abc@demo/res.example.com",
        "cloudinary://123:abc@demo?secure=true&secure=false",
        "cloudinary://123:abc@demo/cdn.example.com?a[b]=1",
    ],
)
def test_the_forms_that_people_paste_are_read(url: str) -> None:
    credentials = Credentials.from_url(url)
    assert (credentials.cloud_name, credentials.api_key, credentials.api_secret) == (
        "demo",
        "123",
        "abc",
    )
    assert Credentials.from_environment({"CLOUDINARY_URL": url}) == credentials


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://123:abc@demo", "form cloudinary://"),
        ("cloudinary:123:abc@demo", "form cloudinary://"),
        ("cloudinary://demo", "no cloud name behind an '@'"),
        ("cloudinary://123:abc@", "no cloud name"),
        ("cloudinary://123:abc@?secure=true", "no cloud name"),
        ("cloudinary://123@demo", "no ':'"),
        ("cloudinary://:abc@demo", "no API key"),
        ("cloudinary://123:@demo", "no API secret"),
        ("cloudinary://<123>:abc@demo", "angle brackets"),
        ("cloudinary://123:<abc>@demo", "angle brackets"),
        ("cloudinary://123:abc@<demo>", "angle brackets"),
        ("cloudinary://123:abc@demo:8080", "characters that no cloud name has"),
        ("cloudinary://123:abc@demo#x", "no cloud name behind an '@'"),
        ("cloudinary://123:a@b?c@demo", "two ways"),
        ("cloudinary://123:abc@demo?oauth_token=a@b", "two ways"),
        ("cloudinary://123:a b@demo", "white space"),
        ("cloudinary://123:abc%20@demo", "white space"),
        ("cloudinary://123:a%FFb@demo", "UTF-8"),
        ("cloudinary://demo?oauth_token=a:x@b", "API key"),
        ("cloudinary://123:abc@demo?signature_algorithm=md5", "digests"),
        ("cloudinary://123:abc@demo?upload_prefix=ftp://h", "neither a host name"),
    ],
)
def test_what_cannot_be_right_is_refused_with_a_sentence(url: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Credentials.from_url(url)


@given(text=st.text(max_size=60) | NASTY)
def test_no_url_makes_anything_but_credentials_or_a_configuration_error(text: str) -> None:
    for url in (text, f"cloudinary://{text}", f"cloudinary://1:2@demo?{text}"):
        with contextlib.suppress(ConfigurationError):
            assert Credentials.from_url(url).cloud_name


def test_a_refusal_never_quotes_the_secret() -> None:
    secret = "pLanted-5ecret"
    for url in (
        f"cloudinary://123:{secret}@demo:8080",
        f"cloudinary://123:{secret}@a@?x",
        f"cloudinary://123:{secret} x@demo",
        f"cloudinary://123:<{secret}>@demo",
        f"cloudinary://demo?oauth_token={secret}@x",
        f"CLOUDINARY_URL=https://123:{secret}@demo",
        f"cloudinary://123:{secret}",
    ):
        with pytest.raises(ConfigurationError) as caught:
            Credentials.from_url(url)
        assert secret not in str(caught.value)
        assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_the_url_goes_before_the_separate_variables() -> None:
    credentials = Credentials.from_environment(
        {"CLOUDINARY_URL": "cloudinary://1:a@first", "CLOUDINARY_CLOUD_NAME": "second"}
    )
    assert credentials.cloud_name == "first"


def test_a_wrong_url_is_refused_even_where_the_separate_variables_are_right() -> None:
    with pytest.raises(ConfigurationError):
        Credentials.from_environment(
            {
                "CLOUDINARY_URL": "nonsense",
                "CLOUDINARY_CLOUD_NAME": "demo",
                "CLOUDINARY_API_KEY": "1",
                "CLOUDINARY_API_SECRET": "a",
            }
        )


def test_the_separate_variables_make_credentials() -> None:
    credentials = Credentials.from_environment(
        {
            "CLOUDINARY_URL": " ",
            "CLOUDINARY_CLOUD_NAME": " demo ",
            "CLOUDINARY_API_KEY": '"123"',
            "CLOUDINARY_API_SECRET": "'a/b#c'",
            "CLOUDINARY_UPLOAD_PREFIX": "https://api-eu.cloudinary.com",
        }
    )
    assert credentials == Credentials("demo", "123", "a/b#c", host="https://api-eu.cloudinary.com")


@pytest.mark.parametrize(
    "missing", ["CLOUDINARY_CLOUD_NAME", "CLOUDINARY_API_KEY", "CLOUDINARY_API_SECRET"]
)
def test_a_missing_variable_is_named(missing: str) -> None:
    variables = {
        "CLOUDINARY_CLOUD_NAME": "demo",
        "CLOUDINARY_API_KEY": "123",
        "CLOUDINARY_API_SECRET": "abc",
    }
    del variables[missing]
    with pytest.raises(ConfigurationError, match=r"no (credentials|API key|API secret)"):
        Credentials.from_environment(variables)


def test_nothing_set_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLOUDINARY_URL", raising=False)
    with pytest.raises(ConfigurationError, match="CLOUDINARY_URL=cloudinary://"):
        Credentials.from_environment()


@pytest.mark.parametrize(
    "environment",
    [
        {"CLOUDINARY_CLOUD_NAME": "demo", "CLOUDINARY_OAUTH_TOKEN": "tok+en/="},
        {"CLOUDINARY_CLOUD_NAME": "demo", "CLOUDINARY_O_AUTH2": "tok+en/="},
        {"CLOUDINARY_URL": "cloudinary://demo?oauth_token=tok%2Ben/="},
        {"CLOUDINARY_URL": "cloudinary://1:a@demo?oauth_token=tok%2Ben/="},
    ],
)
def test_an_oauth_token_is_enough(environment: dict[str, str]) -> None:
    credentials = Credentials.from_environment(environment)
    assert (credentials.cloud_name, credentials.oauth_token) == ("demo", "tok+en/=")


def test_the_signature_algorithm_and_the_host_come_from_the_url() -> None:
    credentials = Credentials.from_url(
        "cloudinary://1:a@demo?signature_algorithm=SHA256&upload_prefix=https://api-ap.cloudinary.com"
    )
    assert credentials.digests == ("sha256",)
    assert credentials.host == "https://api-ap.cloudinary.com"


def test_the_api_secret_signs_unless_other_secrets_are_given() -> None:
    assert Credentials("demo", "1", "a").signing_secrets == ("a",)
    assert Credentials("demo", "1", "a", notification_secrets=["b", "c"]).signing_secrets == (
        "b",
        "c",
    )
    assert Credentials("demo", oauth_token="t").signing_secrets == ()


@pytest.mark.parametrize(
    "build",
    [
        lambda: Credentials("", "1", "a"),
        lambda: Credentials("demo"),
        lambda: Credentials("demo", "1"),
        lambda: Credentials("demo", None, "a"),
        lambda: Credentials("a/b", "1", "a"),
        lambda: Credentials("..", "1", "a"),
        lambda: Credentials("demo", "1:2", "a"),
        lambda: Credentials("demo", "1", "a\nb"),
        lambda: Credentials("demo", oauth_token="a b"),
        lambda: Credentials("demo", 5, "a"),  # type: ignore[arg-type]
        lambda: Credentials("demo", "1", "a", notification_secrets=("",)),
        lambda: Credentials("demo", "1", "a", digests=("md5",)),
        lambda: Credentials("demo", "1", "a", digests=()),
        lambda: Credentials("demo", "1", "a", host="http://api.cloudinary.com"),
        lambda: Credentials("demo", "1", "a", host="https://user:pw@host"),
        lambda: Credentials("demo", "1", "a", host="https://host/path"),
        lambda: Credentials("demo", "1", "a", host="host:99999"),
        lambda: Credentials("demo", "1", "a", host="[::::]"),
        lambda: Credentials("demo", "1", "'a"),
    ],
)
def test_wrong_credentials_are_refused_at_construction(build: object) -> None:
    with pytest.raises(ConfigurationError):
        build()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("host", "cloud", "expected"),
    [
        ("api.cloudinary.com", "demo", "https://api.cloudinary.com"),
        ("api-eu.cloudinary.com", "demo", "https://api-eu.cloudinary.com"),
        ("https://api-ap.cloudinary.com/", "demo", "https://api-ap.cloudinary.com"),
        ("https://host:8443", "demo", "https://host:8443"),
        ("http://127.0.0.1:8080", "demo", "http://127.0.0.1:8080"),
        ("http://localhost:8080", "demo", "http://localhost:8080"),
        ("http://[::1]:8080", "demo", "http://[::1]:8080"),
        ("http://emulator:8080", "emulator-demo", "http://emulator:8080"),
    ],
)
def test_hosts_and_origins_are_understood(host: str, cloud: str, expected: str) -> None:
    assert read_base_url(host, cloud) == expected


@given(host=st.text(alphabet=string.ascii_letters + "0123456789.-:[]/@ %", max_size=20))
def test_no_host_raises_anything_but_a_configuration_error(host: str) -> None:
    from yarl import URL

    try:
        base = read_base_url(host, "demo")
    except ConfigurationError:
        return
    assert URL(f"{base}/v2", encoded=True).host


def test_no_secret_is_in_a_repr() -> None:
    credentials = Credentials(
        "demo", "1", "s3cr3t-a", oauth_token="s3cr3t-b", notification_secrets=("s3cr3t-c",)
    )
    assert "s3cr3t" not in f"{credentials!r} {credentials}"
    assert pickle.loads(pickle.dumps(credentials)) == credentials


@pytest.mark.parametrize(
    "wrong",
    [
        {"permits": 0},
        {"permits": True},
        {"permits": 1.5},
        {"attempts": 0},
        {"connect_timeout": 0},
        {"read_timeout": float("inf")},
        {"read_timeout": float("nan")},
        {"call_timeout": -1},
        {"backoff_first": 0},
        {"backoff_first": 2, "backoff_max": 1},
        {"max_server_wait": "5"},
        {"max_response_bytes": 0},
        {"poll_first": 10, "poll_longest": 5},
        {"result_grace": -1},
        {"on_missing_result": "ignore"},
        {"task_timeout": 0},
        {"answered_count": 0},
        {"pacer": object()},
    ],
)
def test_settings_that_cannot_be_right_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises((ConfigurationError, ValueError)) as caught:
        Settings(**wrong)  # type: ignore[arg-type]
    assert next(iter(wrong)).rpartition(".")[2] in str(caught.value)


def test_the_settings_have_the_documented_defaults() -> None:
    settings = Settings()
    assert (settings.permits, settings.attempts, settings.backoff_first, settings.backoff_max) == (
        64,
        6,
        0.5,
        30,
    )
    assert (settings.max_server_wait, settings.call_timeout, settings.retry_ambiguous) == (
        120,
        None,
        True,
    )
    assert settings.max_response_bytes == 32 * 2**20
