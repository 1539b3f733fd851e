"""The configuration of a session: `Credentials` and `Settings`. Frozen and validated.

An invalid value raises `ConfigurationError` before any request is sent. No message quotes a
credential, a host or a part of a Cloudinary URL, because after a typo each may contain the secret.

# Credentials

``AnalyzeSession()`` reads the environment. ``AnalyzeSession(Credentials(…))`` does not. Explicit
arguments come first, then ``CLOUDINARY_URL`` alone, then the separate variables.

| where | what |
|---|---|
| explicit | ``Credentials(cloud_name, api_key, api_secret)`` or \
``Credentials(cloud_name, oauth_token=…)`` |
| ``CLOUDINARY_URL`` | ``cloudinary://<api_key>:<api_secret>@<cloud_name>``. Options: \
``?upload_prefix=https://api-eu.cloudinary.com`` for a regional host, ``?oauth_token=…``, \
``?signature_algorithm=sha256`` |
| variables | ``CLOUDINARY_CLOUD_NAME``, ``CLOUDINARY_API_KEY``, ``CLOUDINARY_API_SECRET``, \
``CLOUDINARY_OAUTH_TOKEN``, ``CLOUDINARY_UPLOAD_PREFIX`` |

``oauth_token`` may be an async function that returns a token, for tokens that expire. The session
calls it when it opens, and once more for a call or poll that is answered 401, which is then repeated.
All calls that wait share one renewal. Percent-encoding in the URL is decoded. A secret may contain
``/``, ``#``, ``@`` and ``?`` unencoded.

.. include:: docs/throttling.md
"""

from __future__ import annotations

import ipaddress
import os
import re
import sys
from collections.abc import Awaitable, Callable, Mapping
from functools import cached_property
from typing import Any, Final, Literal, Protocol, Self, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import attrs

from cloudinary_analyze._proxy import ProxyURL, find_proxy, read_proxy
from cloudinary_analyze._values import Described, URLObject, quote, read_url
from cloudinary_analyze.errors import ConfigurationError

__all__ = ["Credentials", "Pacer", "Settings", "proxy_from_environment"]

DEFAULT_HOST: Final = "api.cloudinary.com"
URL_VARIABLE: Final = "CLOUDINARY_URL"
URL_FORM: Final = "cloudinary://<api_key>:<api_secret>@<cloud_name>"
# compiled by the first use
_CLOUD_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_LOCATION = r"[^@/?#]*(?:/[^@?#]*)?(?:\?(?s:.*))?"
_QUOTES: Final = ("'", '"')
_UNPRINTABLE = r"[\x00-\x20\x7f]"
_HOST = r"[A-Za-z0-9.-]+(?::\d{1,5})?|\[[0-9A-Fa-f:.]+\](?::\d{1,5})?"


def _clean(given: Any, name: str) -> str | None:
    """Strip what pasting leaves behind, and refuse what cannot be part of a credential."""
    if given is None or type(given) is _Unquoted:
        return given
    if not isinstance(given, str):
        raise ConfigurationError(f"{name} must be a string, not {type(given).__name__}.")
    value = str.__str__(given).strip()  # of a string enum: its value
    if len(value) > 1 and value[0] == value[-1] and value[0] in _QUOTES:
        value = value[1:-1]
    elif value[:1] in _QUOTES or value[-1:] in _QUOTES:
        raise ConfigurationError(f"{name} has a quotation mark at one end only.")
    if not value:
        return None
    if value.startswith("<") and value.endswith(">"):
        raise ConfigurationError(
            f"{name} is still in the angle brackets of the template. Remove the < and the >."
        )
    if re.search(_UNPRINTABLE, value):
        raise ConfigurationError(f"{name} contains white space or control characters.")
    if re.search("[\ud800-\udfff]", value):
        raise ConfigurationError(f"{name} contains an unpaired surrogate. UTF-8 cannot encode it.")
    return _Unquoted(value) if value[0] in _QUOTES or value[-1] in _QUOTES else value


class _Unquoted(str):
    """A credential with quotation marks that `attrs.evolve` must not strip."""

    __slots__ = ()


def _clean_cloud_name(value: str) -> str:
    return _clean(value, "The cloud name") or ""


def _clean_api_key(value: str | None) -> str | None:
    return _clean(value, "The API key")


def _clean_api_secret(value: str | None) -> str | None:
    return _clean(value, "The API secret")


def _read_oauth_token(
    value: str | Callable[[], Awaitable[str]] | None,
) -> str | Callable[[], Awaitable[str]] | None:
    if callable(value) and not isinstance(value, type):
        return value
    return _clean(value, "The OAuth token")


def clean_oauth_token(value: object) -> str:
    """Return the token that a user's function returned.

    Raises:
        ConfigurationError: It is not a token.
    """
    if (token := _clean(value, "The OAuth token")) is None:
        raise ConfigurationError("Credentials.oauth_token() returned no token.")
    return token


def _clean_host(value: str | URLObject | None) -> str | None:
    return _clean(read_url(value), "The host")


def read_base_url(host: str, cloud_name: str) -> str:
    """Return ``scheme://host[:port]`` of the API.

    Args:
        host: A host name (``api-eu.cloudinary.com``) or an origin (``https://…``).
        cloud_name: Plain http is refused unless the host is this machine or the cloud is an
            emulator's, because the credentials would be readable in transit.

    Raises:
        ConfigurationError: It is neither, or plain http would leave the machine.
    """
    scheme, rest, name = _split_host(host)
    if scheme == "http" and not cloud_name.startswith("emulator-") and not _is_loopback(name):
        raise ConfigurationError(
            "The host is plain http. The credentials could be read in transit. Use https."
        )
    return f"{scheme}://{rest}"


def proxy_from_environment(
    host: str | URLObject | None = None, *, environment: Mapping[str, str] | None = None
) -> str | None:
    """Return the proxy that the usual variables name for a host, for `Settings.proxy`.

    ``HTTPS_PROXY`` applies to an https host, ``HTTP_PROXY`` to a plain http one. Lower case names
    come first. ``NO_PROXY`` lists the hosts without a proxy: names with their subdomains,
    addresses, networks such as ``10.0.0.0/8``, each with or without a port, or ``*``. This machine
    never has one. A session reads none of these variables by itself.

    Args:
        host: The host or origin to call, as in `Settings.host`. Default: ``api.cloudinary.com``.
        environment: Default: the process's.

    Returns:
        A URL whose `repr` hides the password; ``None`` if no proxy applies.

    Raises:
        ConfigurationError: The host or the variable is invalid. The message quotes no part of it.
    """
    scheme, rest, name = _split_host(_clean_host(host) or DEFAULT_HOST)
    port = urlsplit(f"//{rest}").port or (443 if scheme == "https" else 80)
    if _is_loopback(name):
        return None
    return find_proxy(
        os.environ if environment is None else environment, scheme=scheme, host=name, port=port
    )


def check_proxy(proxy: str | None, base_url: str, cloud_name: str) -> None:
    """Refuse a proxy elsewhere for plain http: it could read the credentials.

    Raises:
        ConfigurationError: See above.
    """
    if proxy is None or base_url.startswith("https:") or cloud_name.startswith("emulator-"):
        return
    if not _is_loopback(ProxyURL(proxy).host):
        raise ConfigurationError(
            "The host is plain http, so a proxy on another machine could read the credentials. "
            "Use https, or no proxy."
        )


def _split_host(host: str) -> tuple[str, str, str]:
    """Return the scheme, the host with its port, and the bare host name."""
    origin = host if "://" in host else f"https://{host}"
    scheme, _, rest = origin.rstrip("/").partition("://")
    invalid = ConfigurationError(
        "The host must be a host name or an origin, without user, path or query: "
        f"{DEFAULT_HOST!r}, 'api-eu.cloudinary.com' or 'https://host:port'."
    )
    if scheme not in {"http", "https"} or not re.fullmatch(_HOST, rest):
        raise invalid
    try:
        parts = urlsplit(f"//{rest}")
        name, _ = parts.hostname or "", parts.port
    except ValueError:  # its text quotes the host
        name = ""
    if not name.strip("."):
        raise invalid
    return scheme, rest, name


def _is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _read_tuple(value: Any, name: str) -> tuple[Any, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, tuple | list):
        raise ConfigurationError(
            f"{name} must be a string or a tuple of strings, not {type(value).__name__}."
        )
    return tuple(value)


def _read_secrets(value: str | tuple[str, ...] | list[str]) -> tuple[str, ...]:
    secrets = _read_tuple(value, "notification_secrets")
    cleaned = [_clean(secret, "A notification secret") for secret in secrets]
    if None in cleaned:
        raise ConfigurationError("A notification secret is empty.")
    return tuple(secret for secret in cleaned if secret)


def _read_digests(value: str | tuple[str, ...] | list[str]) -> tuple[str, ...]:
    digests = _read_tuple(value, "digests")
    if not digests or not all(digest in ("sha1", "sha256") for digest in digests):
        raise ConfigurationError("digests must be 'sha1', 'sha256' or both, as a tuple.")
    return digests


C = TypeVar("C", bound="Credentials")


@attrs.frozen(repr=False, eq=False)
class Credentials(Described):
    """The cloud name, and either an API key with its secret or an OAuth token.

    Explicit arguments come first, then ``CLOUDINARY_URL`` alone, then the separate variables. An
    invalid variable is an error; it is never skipped.

    ```python
    Credentials("demo", "123456789012345", "the-secret")
    Credentials("demo", oauth_token="the-token", notification_secrets="the-secret")
    Credentials.from_url("cloudinary://123456789012345:the-secret@demo")
    ```

    Attributes:
        cloud_name: The product environment. Required before anything is sent.
        api_key: The API key.
        api_secret: Its secret. Also signs notifications, unless `notification_secrets` are given.
        oauth_token: An OAuth access token (scopes ``media_analysis``, ``query_analysis_tasks``), or
            an async function without arguments that returns one. A session calls the function when
            it opens, and once more for each call that is answered 401; calls that wait share it.
            Used instead of key and secret if both are given.
        notification_secrets: The secrets that may sign notifications. Pass several while one is
            rotated. Default: the API secret.
        digests: The digests that are accepted in signatures of notifications. Default: ``sha1`` and
            ``sha256``. Accounts sign with SHA-1 unless Cloudinary's support has switched them to
            SHA-256.
        host: Host or origin of the API, from ``upload_prefix``; `Settings.host` overrides it. A URL
            object is accepted.

    Raises:
        ConfigurationError: A value is missing or invalid.
    """

    cloud_name: str = attrs.field(converter=_clean_cloud_name)
    api_key: str | None = attrs.field(default=None, converter=_clean_api_key)
    api_secret: str | None = attrs.field(default=None, converter=_clean_api_secret, repr=False)
    oauth_token: str | Callable[[], Awaitable[str]] | None = attrs.field(
        default=None, converter=_read_oauth_token, repr=False, kw_only=True
    )
    notification_secrets: tuple[str, ...] = attrs.field(
        default=(), converter=_read_secrets, repr=False, kw_only=True
    )
    digests: tuple[str, ...] = attrs.field(
        default=("sha1", "sha256"), converter=_read_digests, kw_only=True
    )
    host: str | None = attrs.field(default=None, converter=_clean_host, kw_only=True)

    def __attrs_post_init__(self) -> None:
        if not self.cloud_name:
            raise ConfigurationError(
                "Missing cloud name. You can find it on the Cloudinary Console dashboard. "
                f"Pass Credentials(cloud_name, …) or set {URL_VARIABLE}={URL_FORM}."
            )
        if not re.fullmatch(_CLOUD_NAME, self.cloud_name):
            raise ConfigurationError(
                "The cloud name has invalid characters. "
                "It consists of letters, digits, '-', '_' and '.'."
            )
        if self.oauth_token is None:
            if self.api_key is None or self.api_secret is None:
                missing = "API key" if self.api_key is None else "API secret"
                raise ConfigurationError(
                    f"Missing {missing}. Pass api_key and api_secret, or an oauth_token."
                )
            if re.search("[:<>/?#@&=]", self.api_key):
                raise ConfigurationError("The API key has invalid characters.")
        if self.host is not None:
            read_base_url(self.host, self.cloud_name)

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields, for pickling."""
        if callable(self.oauth_token):
            import pickle

            try:
                pickle.dumps(self.oauth_token)
            except Exception:  # its text may quote what the function holds
                raise TypeError(
                    "Credentials with this oauth_token cannot be pickled. Use a function that is "
                    "defined at the top level of a module."
                ) from None
        return {field.name: getattr(self, field.name) for field in attrs.fields(Credentials)}

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _: Any) -> Self:
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the fields."""
        for name, value in state.items():
            object.__setattr__(self, name, value)

    @cached_property
    def signing_secrets(self) -> tuple[str, ...]:
        """The secrets that a notification may be signed with. Empty if there are none."""
        if self.notification_secrets:
            return self.notification_secrets
        return (self.api_secret,) if self.api_secret else ()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Self:
        """Read ``CLOUDINARY_URL`` or, where it is unset, the separate variables.

        The separate ones are ``CLOUDINARY_CLOUD_NAME``, ``CLOUDINARY_API_KEY``,
        ``CLOUDINARY_API_SECRET``, ``CLOUDINARY_OAUTH_TOKEN`` (or ``CLOUDINARY_O_AUTH2``) and
        ``CLOUDINARY_UPLOAD_PREFIX``.

        Args:
            environment: Default: the process's.

        Raises:
            ConfigurationError: No variable is set, or one is invalid.
        """
        read = _try(_read_environment, cls, os.environ if environment is None else environment)
        del environment  # tools that log a traceback with its variables must not log the secret
        if isinstance(read, ConfigurationError):
            raise read
        return read

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Read ``cloudinary://<api_key>:<api_secret>@<cloud_name>[?upload_prefix=…]``.

        The secret may hold any character, percent-encoded or not. Of the parameters,
        ``upload_prefix``, ``oauth_token`` and ``signature_algorithm`` are used; a private CDN
        after the cloud name is ignored.

        Raises:
            ConfigurationError: The URL is invalid. The message quotes no part of it.
        """
        read = _try(_read_cloudinary_url, cls, url)
        del url  # see from_environment
        if isinstance(read, ConfigurationError):
            raise read
        return read


def _try(read: Callable[[type[C], Any], C], kind: type[C], text: Any) -> C | ConfigurationError:
    """Return the error of a reader instead of raising it, without the frames that hold secrets."""
    try:
        return read(kind, text)
    except ConfigurationError as error:
        message = error.message
    return ConfigurationError(message)


def _read_environment(kind: type[C], environment: Any) -> C:
    if not isinstance(environment, Mapping):
        raise ConfigurationError(
            f"The environment must be a mapping, not {type(environment).__name__}."
        )
    for name in (URL_VARIABLE, "CLOUDINARY_CLOUD_NAME"):
        if not isinstance(environment.get(name, ""), str):
            raise ConfigurationError(f"{name} must be a string.")
    if (url := environment.get(URL_VARIABLE, "")).strip():
        return _read_cloudinary_url(kind, url)
    if not environment.get("CLOUDINARY_CLOUD_NAME", "").strip():
        raise ConfigurationError(
            f"Missing credentials. Set {URL_VARIABLE}={URL_FORM} "
            "(the Console's dashboard shows it), or CLOUDINARY_CLOUD_NAME, CLOUDINARY_API_KEY "
            "and CLOUDINARY_API_SECRET, or pass Credentials(…)."
        )
    return kind(
        environment["CLOUDINARY_CLOUD_NAME"],
        environment.get("CLOUDINARY_API_KEY"),
        environment.get("CLOUDINARY_API_SECRET"),
        oauth_token=environment.get("CLOUDINARY_OAUTH_TOKEN")
        or environment.get("CLOUDINARY_O_AUTH2"),
        host=environment.get("CLOUDINARY_UPLOAD_PREFIX"),
    )


def _read_cloudinary_url(kind: type[C], url: Any) -> C:
    if not isinstance(url, str):
        raise ConfigurationError(f"The Cloudinary URL must be a string, not {type(url).__name__}.")
    text = url.strip().strip("'\"").strip()
    if text[: len(URL_VARIABLE) + 1].upper() == f"{URL_VARIABLE}=":
        text = text[len(URL_VARIABLE) + 1 :].strip().strip("'\"").strip()
    scheme, separator, rest = text.partition("://")
    if scheme.lower() != "cloudinary" or not separator:
        raise ConfigurationError(f"The Cloudinary URL must have the form {URL_FORM}.")
    # a secret may hold '/', '#', '?' and '@', which the generic URL grammar would cut at
    userinfo, location = _split_userinfo(rest)
    key, colon, secret = userinfo.partition(":")
    cloud_name, _, query = location.partition("?")
    cloud_name = cloud_name.partition("/")[0]
    options: dict[str, str] = {}
    try:
        for name, value in parse_qsl(query, errors="strict"):
            options.setdefault(name, value)
        key, secret, cloud_name = _decode(key), _decode(secret), _decode(cloud_name)
    except UnicodeError:
        raise ConfigurationError(
            "The Cloudinary URL has a percent-encoding that is not UTF-8. Write '%' as %25."
        ) from None
    except ValueError:  # more parameters than urllib reads
        raise ConfigurationError("The Cloudinary URL has too many parameters.") from None
    if not colon and "oauth_token" not in options:
        raise ConfigurationError(
            "The Cloudinary URL is missing the ':' between API key and secret. "
            f"Its form is {URL_FORM}."
        )
    algorithm = options.get("signature_algorithm", "").lower()
    try:
        return kind(
            cloud_name,
            key,
            secret,
            oauth_token=options.get("oauth_token"),
            digests=(algorithm,) if algorithm else ("sha1", "sha256"),
            host=options.get("upload_prefix"),
        )
    except ConfigurationError as error:
        raise ConfigurationError(
            f"The Cloudinary URL is invalid: {error.message} Its form is {URL_FORM}."
        ) from None


def _decode(part: str) -> str:
    """Decode a part of a URL, and quote it, so that nothing at its ends is taken for pasting."""
    return f'"{unquote(part, errors="strict")}"'


def _split_userinfo(rest: str) -> tuple[str, str]:
    """Split at the one '@' that a cloud name follows."""
    found = [
        (rest[:index], rest[index + 1 :])
        for index in (match.start() for match in re.finditer("@", rest))
        if re.fullmatch(_LOCATION, rest[index + 1 :])
    ]
    if len(found) > 1:
        raise ConfigurationError(
            "The Cloudinary URL is ambiguous. Write '@' as %40 and '?' as %3F inside "
            "the secret and the parameters."
        )
    if found:
        return found[0]
    if re.fullmatch(_LOCATION, rest) and "?" in rest:
        return "", rest
    raise ConfigurationError(
        f"The Cloudinary URL is missing '@' and a cloud name. Its form is {URL_FORM}."
    )


def _read_proxy(value: str | URLObject | None) -> str | None:
    return read_proxy(value, "Settings.proxy")


class Pacer(Protocol):
    """Decides when the next attempt may start. An ``aiolimiter`` limiter is one, for example."""

    async def acquire(self) -> object:
        """Return when one more attempt may start.

        Must be safe to cancel: a cancelled wait must not use up a start.

        Raises:
            Exception: The attempt is not sent. The call raises `PacerError`, and a bulk stream stops.
        """


def _build_validator(what: str, accepts: Callable[[Any], bool]) -> Any:
    def validate(_: Any, attribute: Any, value: Any) -> None:
        if not accepts(value):
            raise ConfigurationError(
                f"Settings.{attribute.name} must be {what}, not {quote(value)}."
            )

    return validate


def _is_number(value: Any) -> bool:
    # the upper bound is that of a float: larger integers cannot be added to an instant
    return isinstance(value, int | float) and type(value) is not bool and abs(value) <= _LARGEST


_LARGEST: Final = sys.float_info.max
_positive = _build_validator("a positive number", lambda value: _is_number(value) and value > 0)
_maybe_positive = _build_validator(
    "a positive number or None", lambda value: value is None or (_is_number(value) and value > 0)
)
_not_negative = _build_validator("0 or more", lambda value: _is_number(value) and value >= 0)
_count = _build_validator(
    "a whole number from 1",
    lambda value: isinstance(value, int) and type(value) is not bool and value >= 1,
)
MOST_PERMITS: Final = 65_535  # a client address has no more ports
_permits = _build_validator(
    f"a whole number from 1 to {MOST_PERMITS}",
    lambda value: isinstance(value, int) and type(value) is not bool and 1 <= value <= MOST_PERMITS,
)
_truth = _build_validator("True or False", lambda value: type(value) is bool)


def _one_of(*names: str) -> Any:
    return _build_validator(
        " or ".join(map(repr, names)), lambda value: type(value) is str and value in names
    )


@attrs.frozen(kw_only=True, repr=False, eq=False)
class Settings(Described):
    """The settings of a session. All times are seconds.

    Raises:
        ConfigurationError: A value is invalid.
    """

    permits: int = attrs.field(default=64, validator=_permits)
    """HTTP attempts of analyze calls in flight at once, up to 65,535. Fewer while the service allows fewer."""

    attempts: int = attrs.field(default=6, validator=_count)
    """Attempts per call, the first included. In bulk work, attempts that only show a limit of the
    service (429) do not count, because they cost nothing."""

    connect_timeout: float = attrs.field(default=10, validator=_positive)
    """The limit for connecting in one attempt, name lookup included (real time)."""

    read_timeout: float = attrs.field(default=120, validator=_positive)
    """The limit for one attempt until the whole response is read, connecting included (real time).
    """

    call_timeout: float | None = attrs.field(default=None, validator=_maybe_positive)
    """The limit for a whole `analyze`, queueing and retries included, unless the call has a
    ``timeout``. ``None``: only the limits of its attempts."""

    outage_timeout: float | None = attrs.field(default=120, validator=_maybe_positive)
    """How long bulk work waits while the service fails or refuses everything. Then the stream stops
    with `OutageError`. ``None``: without a limit. Meanwhile single requests test whether it is over."""

    backoff_first: float = attrs.field(default=0.5, validator=_positive)
    """The wait before the second attempt. It doubles with each attempt. Jitter shortens it by up to
    half."""

    backoff_max: float = attrs.field(default=30, validator=_positive)
    """The longest wait between attempts that the server did not ask for."""

    max_server_wait: float = attrs.field(default=120, validator=_positive)
    """The longest wait that the server may ask for. If it asks for more, the call raises. Later
    calls raise without being sent until that time has passed."""

    retry_ambiguous: bool = attrs.field(default=True, validator=_truth)
    """Whether attempts that may have been charged (sent and unanswered; 500, 502, 504) are
    repeated. ``False``: such a call raises at once and says so."""

    host: str | None = attrs.field(default=None, converter=_clean_host)
    """Host or origin of the API: ``api-eu.cloudinary.com``, ``http://127.0.0.1:8080``.
    ``None``: the credentials', else ``api.cloudinary.com``."""

    proxy: str | None = attrs.field(default=None, converter=_read_proxy)
    """The HTTP proxy of all calls and polls: ``http://host:port``, ``http://user:password@host:port``,
    or a URL object. ``None``: no proxy, whatever the environment says; see `proxy_from_environment`.
    Its password appears in no repr and no pickle. Workers read it from the proxy variable of the same
    server. An ``https://`` proxy needs asyncio's own event loop."""

    max_response_bytes: int = attrs.field(default=32 * 2**20, validator=_count)
    """The longest body that is read, after decompression."""

    poll_first: float | None = attrs.field(default=None, validator=_maybe_positive)
    """The time from a task's acceptance to its first status poll. Intervals grow from there.
    ``None``: 5 with a notification source, 1 without."""

    poll_longest: float | None = attrs.field(default=None, validator=_maybe_positive)
    """The longest interval between polls of a task. ``None``: 300 with a source, 30 without."""

    poll_permits: int = attrs.field(default=4, validator=_permits)
    """Status polls in flight at once, in addition to the permits."""

    polls_per_second: float = attrs.field(default=20, validator=_positive)
    """Status polls per second, over all tasks. With many tasks, polls are late."""

    result_grace: float = attrs.field(default=1200, validator=_not_negative)
    """How long to wait for the notification after a poll said ``completed``. The service delivers
    again after about 3, 6 and 9 minutes."""

    failure_grace: float = attrs.field(default=15, validator=_not_negative)
    """How long to wait for the notification with the reason after a poll said ``failed``."""

    on_missing_result: Literal["raise", "analyze"] = attrs.field(
        default="raise", validator=_one_of("raise", "analyze")
    )
    """What to do if a task is completed and no result arrives. ``"raise"``: raise
    `ResultNotDeliveredError`. ``"analyze"``: repeat it as a call, which spends quota again."""

    task_timeout: float | None = attrs.field(default=3600.0, validator=_maybe_positive)
    """How long a task handle waits, unless it has a ``timeout``. ``None``: without a limit."""

    answered_seconds: float = attrs.field(default=3600, validator=_not_negative)
    """How long `AnalyzeSession.task` can return the result of an answered task."""

    answered_count: int = attrs.field(default=10_000, validator=_count)
    """How many answered tasks are kept for this."""

    answered_bytes: int = attrs.field(default=52 * 2**20, validator=_count)
    """How many bytes of their results are kept. The oldest are dropped first."""

    parked_seconds: float = attrs.field(default=600, validator=_not_negative)
    """How long a notification is kept until its task is known here."""

    parked_bytes: int = attrs.field(default=16 * 2**20, validator=_count)
    """How many bytes of such notifications are kept. The oldest are dropped first."""

    rate: float | None = attrs.field(default=None, validator=_maybe_positive)
    """The maximum rate of this session: attempts of analyze calls per second, evenly spaced.
    ``None``: only the limits of the service, which the session learns."""

    burst: int = attrs.field(default=1, validator=_count)
    """How many attempts may begin at once under `rate`, after a time with fewer attempts."""

    pacer: Pacer | None = None
    """Instead of `rate`, an object with ``async acquire()`` of your own, for example one that all
    workers share. It is awaited once before each attempt of an analyze call, after any pause, with
    the permit held. If it raises, the attempt is not sent and a bulk stream stops."""

    def __attrs_post_init__(self) -> None:
        if self.backoff_max < self.backoff_first:
            raise ConfigurationError("Settings.backoff_max must not be less than backoff_first.")
        if self.poll_first and self.poll_longest and self.poll_longest < self.poll_first:
            raise ConfigurationError("Settings.poll_longest must not be less than poll_first.")
        if self.host is not None:
            _split_host(self.host)
        if self.rate is not None and self.pacer is not None:
            raise ConfigurationError("Settings.rate and Settings.pacer exclude each other.")
        if self.rate is None and self.burst != 1:
            raise ConfigurationError("Settings.burst needs Settings.rate.")
        if self.pacer is not None and not _has_method(self.pacer, "acquire"):
            raise ConfigurationError(
                "Settings.pacer must be an object with a method `async acquire()`, "
                f"not {quote(self.pacer)}."
            )


def _has_method(value: object, name: str) -> bool:
    try:
        return not isinstance(value, type) and callable(getattr(value, name, None))
    except Exception:  # raised by the object's own attribute access
        return False
