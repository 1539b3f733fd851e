"""Credentials are read correctly or refused with a message, and never misread."""

from __future__ import annotations

import contextlib
import enum
import math
import pickle
import string
import traceback
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import attrs
import pydantic
import pytest
import starlette.datastructures
import yarl
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
def test_an_unencoded_secret_is_read_correctly_or_refused(secret: str, tail: str) -> None:
    assume("%" not in secret)  # the reader cannot know whether %41 is an encoded A
    try:
        credentials = Credentials.from_url(f"cloudinary://123:{secret}@demo{tail}")
    except ConfigurationError:
        return
    assert (credentials.cloud_name, credentials.api_key) == ("demo", "123")
    assert credentials.api_secret == secret


@pytest.mark.parametrize("secret", ["a/b", "a#b", "a@b", "a?b", "a:b", "a&b=c", "a+b", "a[b]"])
def test_one_special_character_in_a_secret_is_read(secret: str) -> None:
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
def test_common_pasted_forms_are_read(url: str) -> None:
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
        ("cloudinary://demo", "missing '@' and a cloud name"),
        ("cloudinary://123:abc@", "Missing cloud name"),
        ("cloudinary://123:abc@?secure=true", "Missing cloud name"),
        ("cloudinary://123@demo", "missing the ':'"),
        ("cloudinary://:abc@demo", "Missing API key"),
        ("cloudinary://123:@demo", "Missing API secret"),
        ("cloudinary://<123>:abc@demo", "angle brackets"),
        ("cloudinary://123:<abc>@demo", "angle brackets"),
        ("cloudinary://123:abc@<demo>", "angle brackets"),
        ("cloudinary://123:abc@demo:8080", "cloud name has invalid characters"),
        ("cloudinary://123:abc@demo#x", "missing '@' and a cloud name"),
        ("cloudinary://123:a@b?c@demo", "ambiguous"),
        ("cloudinary://123:abc@demo?oauth_token=a@b", "ambiguous"),
        ("cloudinary://123:a b@demo", "white space"),
        ("cloudinary://123:abc%20@demo", "white space"),
        ("cloudinary://123:a%FFb@demo", "UTF-8"),
        ("cloudinary://demo?oauth_token=a:x@b", "API key"),
        ("cloudinary://123:abc@demo?signature_algorithm=md5", "digests"),
        ("cloudinary://123:abc@demo?upload_prefix=ftp://h", "host must be a host name"),
    ],
)
def test_invalid_values_are_refused_with_a_message(url: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Credentials.from_url(url)


@given(text=st.text(max_size=60) | NASTY)
def test_any_url_is_read_or_is_a_configuration_error(text: str) -> None:
    for url in (text, f"cloudinary://{text}", f"cloudinary://1:2@demo?{text}"):
        with contextlib.suppress(ConfigurationError):
            assert Credentials.from_url(url).cloud_name


PLANTED = "Zq7Xk9Vw3Jy5Hb8"
TEMPLATES = [
    "cloudinary://123456789:{}@demo",
    "cloudinary://{}:123456789@demo",
    "cloudinary://demo:{}@123456789",
    "cloudinary://123456789:{}@demo?upload_prefix=https://api-eu.cloudinary.com",
    "cloudinary://123456789:{}?oauth_token={}",
    "cloudinary://demo?oauth_token={}",
    "cloudinary://123456789:a@demo?upload_prefix=https://user:{}@host",
    "cloudinary://123456789:a@demo?signature_algorithm={}",
    "cloudinary://123456789:a@demo:{}",
    "cloudinary://123456789:a@demo?oauth_token={}%ff",
    "https://123456789:{}@demo",
    "CLOUDINARY_URL=cloudinary://123456789:<{}>@demo",
]
EDITS = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(["delete", "insert", "replace", "cut"]),
        st.sampled_from([*"@:/?#&=%<>'\" \n", "\x00", "\ud800", "ä", "%ff", "https://", "[::"]),
    ),
    max_size=4,
)


@given(template=st.sampled_from(TEMPLATES), edits=EDITS)
def test_no_error_of_a_mistyped_url_shows_the_secret(
    template: str, edits: list[tuple[float, str, str]]
) -> None:
    url = template.replace("{}", PLANTED)
    for place, kind, text in edits:
        at = int(place * len(url))
        rest = {"delete": url[at + 1 :], "insert": text + url[at:], "cut": text}
        url = url[:at] + rest.get(kind, text + url[at + 1 :])
    pieces = {PLANTED[at : at + 4].lower() for at in range(len(PLANTED) - 3)}
    for error in refuse(url):
        shown = f"{error} {error!r} {error.args} {vars(error)} {show_our_variables(error)}"
        shown += "".join(traceback.format_exception(error))
        assert not [piece for piece in pieces if piece in shown.lower()]
        assert (error.__cause__, error.__context__) == (None, None)


def refuse(url: str) -> Iterator[ConfigurationError]:
    readers: list[Callable[[], object]] = [
        lambda: Credentials.from_url(url),
        lambda: Credentials.from_environment({"CLOUDINARY_URL": url}),
    ]
    for read in readers:
        try:
            read()
        except ConfigurationError as error:
            yield error


def show_our_variables(error: BaseException) -> str:
    """Return the local variables of the package's frames, as an error tracker logs them."""
    stack = traceback.StackSummary.extract(
        traceback.walk_tb(error.__traceback__), capture_locals=True
    )
    ours = [frame for frame in stack if Path(frame.filename).name == "config.py"]
    assert ours
    return " ".join(str(frame.locals) for frame in ours)


def test_the_url_wins_over_the_separate_variables() -> None:
    credentials = Credentials.from_environment(
        {"CLOUDINARY_URL": "cloudinary://1:a@first", "CLOUDINARY_CLOUD_NAME": "second"}
    )
    assert credentials.cloud_name == "first"


def test_a_wrong_url_is_refused_beside_valid_variables() -> None:
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
    with pytest.raises(ConfigurationError, match=r"Missing (credentials|API key|API secret)"):
        Credentials.from_environment(variables)


def test_without_variables_the_error_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_url_sets_signature_algorithm_and_host() -> None:
    credentials = Credentials.from_url(
        "cloudinary://1:a@demo?signature_algorithm=SHA256&upload_prefix=https://api-ap.cloudinary.com"
    )
    assert credentials.digests == ("sha256",)
    assert credentials.host == "https://api-ap.cloudinary.com"


def test_the_api_secret_verifies_unless_others_are_given() -> None:
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
def test_hosts_and_origins_are_read(host: str, cloud: str, expected: str) -> None:
    assert read_base_url(host, cloud) == expected


@given(host=st.text(alphabet=string.ascii_letters + "0123456789.-:[]/@ %", max_size=20))
def test_any_host_is_read_or_is_a_configuration_error(host: str) -> None:
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
        {"permits": 10**30},
        {"poll_permits": 65_536},
        {"attempts": 0},
        {"connect_timeout": 0},
        {"read_timeout": float("inf")},
        {"read_timeout": float("nan")},
        {"read_timeout": True},
        {"result_grace": False},
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
        {"pacer": type("Limiter", (), {"acquire": print})},
        {"host": 5},
        {"host": "https://user:pw@host"},
        {"host": "https://host/path"},
    ],
)
def test_invalid_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Settings(**wrong)  # type: ignore[arg-type]
    assert next(iter(wrong)).rpartition(".")[2] in str(caught.value)


class Unfriendly:
    """An object that raises on every use."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __repr__(self) -> str:
        raise RuntimeError

    def __eq__(self, other: object) -> bool:
        raise RuntimeError

    __hash__ = None  # type: ignore[assignment]


ODD = st.sampled_from(
    [
        None, True, 0, -1, 1, 10**400, 1.5, math.nan, math.inf, -0.0, 5e-324, 1j, Decimal(1),
        "", "raise", "analyze", "demo", "1", "sha1", "\ud800", "a\x00b", "host:1", "http://h", "'",
        "https://user:pw@host", b"demo", bytearray(b"x"), Path("a"), object(), int,
        print, ..., enum.Enum("Odd", ["a"]).a, range(3), iter([1]), ValueError("x"),
        yarl.URL("https://h"), pydantic.SecretStr("abc"), pydantic.AnyUrl("ftp://h/a"),
    ]
)  # fmt: skip
ANYTHING = st.recursive(
    ODD | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)


@given(values=st.dictionaries(st.sampled_from([f.name for f in attrs.fields(Settings)]), ANYTHING))
def test_any_setting_is_valid_or_a_configuration_error(
    values: dict[str, Any],
) -> None:
    with contextlib.suppress(ConfigurationError):
        Settings(**values)


@pytest.mark.parametrize("kind", [Settings, Credentials])
def test_an_object_that_raises_on_every_use_is_refused(kind: Any) -> None:
    for field in attrs.fields(kind):
        values = RIGHT if kind is Credentials else {}
        with pytest.raises(ConfigurationError):
            kind(**{**values, field.name: Unfriendly()})


RIGHT = {"cloud_name": "demo", "api_key": "1", "api_secret": "a"}


@given(
    values=st.dictionaries(st.sampled_from([f.name for f in attrs.fields(Credentials)]), ANYTHING)
)
def test_any_secret_is_valid_or_a_configuration_error(
    values: dict[str, Any],
) -> None:
    with contextlib.suppress(ConfigurationError):
        made = Credentials(**{**RIGHT, **values})
        assert type(made.cloud_name) is str
        assert hash(made) == hash(pickle.loads(pickle.dumps(made)))


@given(value=ANYTHING)
def test_credential_readers_refuse_all_but_text(value: Any) -> None:
    for read in (
        Credentials.from_url,
        Credentials.from_environment,
        lambda value: Credentials.from_environment({"CLOUDINARY_URL": value}),
        lambda value: Credentials.from_environment(
            {"CLOUDINARY_CLOUD_NAME": value, "CLOUDINARY_API_KEY": value}
        ),
    ):
        if value is not None and not isinstance(value, dict):
            with pytest.raises(ConfigurationError):
                read(value)


@pytest.mark.parametrize(
    "make", [yarl.URL, pydantic.HttpUrl, starlette.datastructures.URL, urlsplit]
)
def test_a_host_may_be_a_url_object(make: Any) -> None:
    origin = "https://api-eu.cloudinary.com"
    assert read_base_url(Settings(host=make(origin)).host or "", "demo") == origin
    host = Credentials("demo", "1", "a", host=make(origin)).host
    assert type(host) is str
    assert read_base_url(host, "demo") == origin


def test_an_unknown_choice_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Settings(on_missing_result="retry")  # type: ignore[arg-type]
    assert str(caught.value) == (
        "Settings.on_missing_result must be 'raise' or 'analyze', not 'retry'."
    )


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


@pytest.mark.parametrize("secret", ['"abc"', "'abc", 'abc"', '"', "''"])
def test_evolving_keeps_a_secret_with_quotes(secret):
    credentials = Credentials.from_url(f"cloudinary://1:{quote(secret, safe='')}@demo")
    assert credentials.api_secret == secret
    again = attrs.evolve(credentials, host="api-eu.cloudinary.com")
    assert again.api_secret == secret
    assert pickle.loads(pickle.dumps(again)) == again
