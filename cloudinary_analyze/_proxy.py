"""Proxies: their URLs, whose password no repr and no pickle shows, and the usual variables.

Pure, except that unpickling a URL reads the environment.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from typing import Any, Final, Self
from urllib.parse import quote, unquote, urlsplit

from cloudinary_analyze._values import read_url
from cloudinary_analyze.errors import ConfigurationError

PROXY_FORM: Final = "http://<host>:<port> or http://<user>:<password>@<host>:<port>"
VARIABLES: Final = ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY")
_HIDDEN: Final = "***"
_SERVER: Final = r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?"


class ProxyURL(str):
    """The URL of a proxy. It is a string whose `repr` and pickle do not contain the password.

    An unpickled one takes the password from a proxy variable of its process that names the same
    server and user.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(self.hidden)

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        return _restore, (self.bare if self.userinfo is None else self._keep_user(""),)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _: Any) -> Self:
        return self

    @property
    def bare(self) -> str:
        """The URL without user and password."""
        parts = urlsplit(self)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"

    @property
    def hidden(self) -> str:
        """The URL with asterisks instead of the password."""
        return self.bare if self.userinfo is None else self._keep_user(f":{_HIDDEN}")

    @property
    def host(self) -> str:
        """The name or address of the proxy."""
        return urlsplit(self).hostname or ""

    @property
    def userinfo(self) -> tuple[str, str] | None:
        """The user and the password, decoded."""
        user, separator, _ = urlsplit(self).netloc.rpartition("@")
        name, _, password = user.partition(":")
        return (unquote(name), unquote(password)) if separator else None

    def _keep_user(self, password: str) -> str:
        scheme, _, rest = self.bare.partition("://")
        name = "" if self.userinfo is None else self.userinfo[0]
        return f"{scheme}://{quote(name, safe='')}{password}@{rest}"


def _restore(text: str) -> ProxyURL:
    """Return an unpickled URL, with the password of this process's environment if it has one."""
    url = ProxyURL(text)
    if url.userinfo is None:
        return url
    for name in VARIABLES:
        try:
            found = read_proxy(os.environ.get(name))
        except ConfigurationError:
            continue
        if found is None or found.userinfo is None or found.bare != url.bare:
            continue
        if found.userinfo[0] == url.userinfo[0]:
            return found
    return url


def read_proxy(value: object, name: str = "The proxy") -> ProxyURL | None:
    """Return the URL of a proxy; ``None`` for ``None`` and for white space.

    Args:
        value: A string or a URL object; without a scheme it means http.
        name: What the value is, for the error.

    Raises:
        ConfigurationError: It is something else. The message quotes no part of it.
    """
    if value is None or type(value) is ProxyURL:
        return value
    read = _parse_proxy(read_url(value), name)
    del value  # tools that log a traceback with its variables must not log the password
    if isinstance(read, ConfigurationError):
        raise read
    return read


def _parse_proxy(text: Any, name: str) -> ProxyURL | ConfigurationError | None:
    """Return the error instead of raising it, without the frame that holds the password."""
    if not isinstance(text, str):
        return ConfigurationError(f"{name} must be a URL, not {type(text).__name__}.")
    text = text.strip()
    if not text:
        return None
    invalid = ConfigurationError(
        f"{name} is invalid. Its form is {PROXY_FORM}. Percent-encode special characters in the "
        "user and the password, such as %40 for '@' and %2F for '/'."
    )
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        user, at, server = parts.netloc.rpartition("@")
        _, _ = parts.port, unquote(user, errors="strict")
    except ValueError:  # its text may quote the password
        return invalid
    scheme = parts.scheme.lower()
    if scheme not in {"http", "https"} and text.partition("://")[0].isalnum():
        return ConfigurationError(f"{name} must be an http:// or https:// URL.")
    if not re.fullmatch(_SERVER, server) or parts.port == 0 or "@" in user:
        return invalid
    if parts.path.strip("/") or parts.query or parts.fragment or not _is_clean(text):
        return invalid
    return ProxyURL(f"{scheme}://{user}{at}{server}")


def _is_clean(text: str) -> bool:
    return text.isprintable() and " " not in text


def find_proxy(
    environment: Mapping[str, str], *, scheme: str, host: str, port: int
) -> ProxyURL | None:
    """Return the proxy that the usual variables name for a host, if any.

    Raises:
        ConfigurationError: The variable that applies is invalid.
    """
    names = [f"{scheme}_proxy", f"{scheme.upper()}_PROXY"]
    if "REQUEST_METHOD" in environment and scheme == "http":
        names.pop()  # in a CGI script, HTTP_PROXY is the header `Proxy` of the request
    if is_excepted(environment.get("no_proxy") or environment.get("NO_PROXY") or "", host, port):
        return None
    for name in names:
        if (proxy := read_proxy(environment.get(name), name)) is not None:
            return proxy
    return None


def is_excepted(no_proxy: str, host: str, port: int) -> bool:
    """Whether ``NO_PROXY`` names a host.

    It lists names, which include their subdomains, addresses and networks (``10.0.0.0/8``), each
    with or without a port; ``*`` is every host.
    """
    host = host.strip("[]").rstrip(".").lower()
    address = _read_address(host)
    for entry in no_proxy.lower().replace(",", " ").split():
        if entry == "*":
            return True
        name, _, wanted = entry.rpartition(":")
        if not (name and wanted.isdecimal() and (":" not in name or name.endswith("]"))):
            name = entry
        elif int(wanted) != port:
            continue
        name = name.strip("[]").removeprefix("*").strip(".")
        if address is not None:
            if _covers(name, address):
                return True
        elif name and (host == name or host.endswith(f".{name}")):
            return True
    return False


def _read_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _covers(entry: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    try:
        return address in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return False
