"""Environment variables choose the proxy of a host. Invalid values are refused."""

from __future__ import annotations

import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudinary_analyze import ConfigurationError, Settings, proxy_from_environment

PROXY = "http://proxy.test:3128"
DEFAULT = "api.cloudinary.com"


@pytest.mark.parametrize(
    ("variables", "host", "found"),
    [
        ({}, None, None),
        ({"HTTPS_PROXY": PROXY}, None, PROXY),
        ({"https_proxy": PROXY, "HTTPS_PROXY": "http://other.test"}, None, PROXY),
        ({"https_proxy": "", "HTTPS_PROXY": PROXY}, None, PROXY),
        ({"HTTPS_PROXY": " "}, None, None),
        ({"HTTPS_PROXY": "proxy.test:3128"}, None, PROXY),
        ({"HTTPS_PROXY": f"{PROXY}/"}, None, PROXY),
        ({"HTTPS_PROXY": "HTTPS://[::1]:8443"}, None, "https://[::1]:8443"),
        ({"HTTP_PROXY": PROXY}, None, None),
        ({"HTTP_PROXY": PROXY}, "http://emulator.test:8080", PROXY),
        ({"HTTPS_PROXY": PROXY}, "http://emulator.test:8080", None),
        ({"HTTP_PROXY": PROXY, "REQUEST_METHOD": "GET"}, "http://emulator.test", None),
        ({"http_proxy": PROXY, "REQUEST_METHOD": "GET"}, "http://emulator.test", PROXY),
        ({"HTTPS_PROXY": PROXY, "REQUEST_METHOD": "GET"}, None, PROXY),
        ({"ALL_PROXY": PROXY}, None, None),
        ({"HTTPS_PROXY": PROXY}, "https://localhost:8443", None),
        ({"HTTPS_PROXY": PROXY}, "https://127.1.2.3", None),
        ({"HTTPS_PROXY": PROXY}, "https://[::1]:8443", None),
    ],
)
def test_the_variable_of_the_scheme_applies(
    variables: dict[str, str], host: str | None, found: str | None
) -> None:
    assert proxy_from_environment(host, environment=variables) == found


@pytest.mark.parametrize(
    ("no_proxy", "host", "excepted"),
    [
        ("*", DEFAULT, True),
        (DEFAULT, DEFAULT, True),
        ("API.Cloudinary.COM.", DEFAULT, True),
        ("cloudinary.com", DEFAULT, True),
        (".cloudinary.com", DEFAULT, True),
        ("*.cloudinary.com", DEFAULT, True),
        ("a.test, cloudinary.com b.test", DEFAULT, True),
        ("cloudinary.com:443", DEFAULT, True),
        ("cloudinary.com:8443", DEFAULT, False),
        ("cloudinary.com:8443", "https://api.cloudinary.com:8443", True),
        ("udinary.com", DEFAULT, False),
        ("cloudinary.com.evil.test", DEFAULT, False),
        ("com.", DEFAULT, True),
        (".", DEFAULT, False),
        (",,:,:443,[", DEFAULT, False),
        ("10.0.0.0/8", "https://10.1.2.3", True),
        ("10.0.0.0/8", "https://11.1.2.3", False),
        ("10.1.2.3", "https://10.1.2.3:8443", True),
        ("10.1.2.3:443", "https://10.1.2.3:8443", False),
        ("1.2.3", "https://0.1.2.3", False),
        ("fd00::/8", "https://[fd00::1]", True),
        ("fd00::1", "https://[fd00::1]", True),
        ("[fd00::1]:443", "https://[fd00::1]", True),
        ("[fd00::1]:8443", "https://[fd00::1]", False),
    ],
)
def test_no_proxy_excepts_names_addresses_and_networks(
    no_proxy: str, host: str, excepted: bool
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        found = proxy_from_environment(host, environment={"HTTPS_PROXY": PROXY, name: no_proxy})
        assert found == (None if excepted else PROXY)


@pytest.mark.parametrize(
    "value",
    [
        "socks5://me:pLanted@proxy.test",
        "http://me:pLanted@",
        "http://me:pLanted@proxy.test:0",
        "http://me:pLanted@proxy.test:99999",
        "http://me:pLanted@proxy.test:pLanted",
        "http://me:pLa@nted@proxy.test",
        "http://me:pLa/nted@proxy.test",
        "http://me:pLa#nted@proxy.test",
        "http://me:pLanted@proxy.test/path",
        "http://me:pLanted@proxy.test?pLanted",
        "http://me:pLanted@[::1",
        "http://me:pLanted@pro xy.test",
        "http://me:pLanted\x1b@proxy.test",
        "http://me:pLanted\r\nX-Evil: 1@proxy.test",
        "http://me:%ffpLanted@proxy.test",
        "://pLanted",
    ],
)
def test_an_invalid_proxy_is_refused_without_quoting_it(value: str) -> None:
    for build in (
        lambda: Settings(proxy=value),
        lambda: proxy_from_environment(environment={"HTTPS_PROXY": value}),
    ):
        with pytest.raises(ConfigurationError) as caught:
            build()
        assert "nted" not in str(caught.value)
        assert caught.value.__cause__ is caught.value.__context__ is None
    shown = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    frames = [frame for frame in shown.stack if "cloudinary_analyze" in frame.filename]
    own = "\n".join(f"{frame.locals}" for frame in frames if frame.name == "read_proxy")
    assert "nted" not in own


@given(st.text(max_size=20) | st.integers() | st.binary(max_size=5) | st.none())
def test_any_proxy_is_used_or_refused(value: object) -> None:
    try:
        proxy = Settings(proxy=value).proxy  # type: ignore[arg-type]
    except ConfigurationError:
        return
    assert proxy is None or Settings(proxy=proxy).proxy == proxy


@given(st.text(max_size=20))
def test_any_exception_list_is_read(no_proxy: str) -> None:
    proxy_from_environment(environment={"HTTPS_PROXY": PROXY, "NO_PROXY": no_proxy})
