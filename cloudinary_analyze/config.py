"""Who calls (`Credentials`) and how (`Settings`): frozen, validated when they are made.

A wrong value is refused here, with a sentence, because it would surface much later elsewhere.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Final, Literal, Protocol, Self
from urllib.parse import parse_qsl, unquote, urlsplit

import attrs

from cloudinary_analyze.errors import ConfigurationError

DEFAULT_HOST: Final = "api.cloudinary.com"
URL_VARIABLE: Final = "CLOUDINARY_URL"
URL_FORM: Final = "cloudinary://<api_key>:<api_secret>@<cloud_name>"
# compiled by the first use
_CLOUD_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_LOCATION = r"[^@/?#]*(?:/[^@?#]*)?(?:\?(?s:.*))?"
_QUOTES: Final = ("'", '"')
_UNPRINTABLE = r"[\x00-\x20\x7f]"
_HOST = r"[A-Za-z0-9.-]+(?::\d{1,5})?|\[[0-9A-Fa-f:.]+\](?::\d{1,5})?"


def _clean(value: str | None, name: str) -> str | None:
    """Strip what pasting leaves behind, and refuse what cannot be part of a credential."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise ConfigurationError(f"{name} must be a string, not {type(value).__name__}.")
    value = value.strip()
    if len(value) > 1 and value[0] == value[-1] and value[0] in _QUOTES:
        value = value[1:-1]
    elif value[:1] in _QUOTES or value[-1:] in _QUOTES:
        raise ConfigurationError(f"{name} has a quotation mark at one end only.")
    if not value:
        return None
    if value.startswith("<") and value.endswith(">"):
        raise ConfigurationError(
            f"{name} still has angle brackets around it. Leave out the < and the > of the template."
        )
    if re.search(_UNPRINTABLE, value):
        raise ConfigurationError(f"{name} contains white space or control characters.")
    return value


def _clean_cloud_name(value: str) -> str:
    return _clean(value, "The cloud name") or ""


def _clean_api_key(value: str | None) -> str | None:
    return _clean(value, "The API key")


def _clean_api_secret(value: str | None) -> str | None:
    return _clean(value, "The API secret")


def _clean_oauth_token(value: str | None) -> str | None:
    return _clean(value, "The OAuth token")


def _clean_host(value: str | None) -> str | None:
    return _clean(value, "The host")


def read_base_url(host: str, cloud_name: str) -> str:
    """Return ``scheme://host[:port]`` of the API.

    Args:
        host: A host name (``api-eu.cloudinary.com``) or an origin (``https://…``).
        cloud_name: Plain http is refused unless the host is this machine or the cloud is an
            emulator's, since the credentials would be readable on the way.

    Raises:
        ConfigurationError: It is neither, or plain http would leave the machine.
    """
    origin = host if "://" in host else f"https://{host}"
    scheme, _, rest = origin.rstrip("/").partition("://")
    if scheme not in {"http", "https"} or not re.fullmatch(_HOST, rest):
        raise ConfigurationError(
            f"The host {host!r} is neither a host name nor an origin. "
            f"Pass {DEFAULT_HOST!r}, 'api-eu.cloudinary.com' or 'https://host:port'."
        )
    try:
        parts = urlsplit(f"//{rest}")
        name, _ = parts.hostname or "", parts.port
    except ValueError as error:
        raise ConfigurationError(f"The host {host!r} cannot be right: {error}.") from None
    if scheme == "http" and not cloud_name.startswith("emulator-") and not _is_loopback(name):
        raise ConfigurationError(
            f"The host {host!r} is plain http: the credentials could be read on the way. Use https."
        )
    return f"{scheme}://{rest}"


def _is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _read_secrets(value: str | tuple[str, ...] | list[str]) -> tuple[str, ...]:
    secrets = (value,) if isinstance(value, str) else tuple(value)
    cleaned = tuple(_clean(secret, "A notification secret") for secret in secrets)
    if None in cleaned:
        raise ConfigurationError("A notification secret is empty.")
    return tuple(secret for secret in cleaned if secret)


def _read_digests(value: str | tuple[str, ...] | list[str]) -> tuple[str, ...]:
    digests = (value,) if isinstance(value, str) else tuple(value)
    if not digests or not set(digests) <= {"sha1", "sha256"}:
        raise ConfigurationError(f"digests must be of 'sha1' and 'sha256', not {digests!r}.")
    return digests


@attrs.frozen
class Credentials:
    """Who calls: a cloud, and either an API key with its secret or an OAuth token.

    One precedence: what is passed explicitly, else ``CLOUDINARY_URL`` alone, else the separate
    variables. A variable that is set but wrong is refused, never passed over.

    Attributes:
        cloud_name: The product environment. Required before anything is sent.
        api_key: The API key.
        api_secret: Its secret. Also signs notifications, unless `notification_secrets` are given.
        oauth_token: An OAuth access token (scopes ``media_analysis``, ``query_analysis_tasks``).
            Goes before key and secret where both are given.
        notification_secrets: The secrets that may sign notifications, several while one is
            rotated. Default: the API secret.
        digests: The digests that a notification's signature may use. Accounts sign with SHA-1
            unless support switched them to SHA-256; naming one alone refuses the other.
        host: Host or origin of the API, from ``upload_prefix``; `Settings.host` goes before it.

    Raises:
        ConfigurationError: Anything is missing, or cannot be right.
    """

    cloud_name: str = attrs.field(converter=_clean_cloud_name)
    api_key: str | None = attrs.field(default=None, converter=_clean_api_key)
    api_secret: str | None = attrs.field(default=None, converter=_clean_api_secret, repr=False)
    oauth_token: str | None = attrs.field(
        default=None, converter=_clean_oauth_token, repr=False, kw_only=True
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
                "There is no cloud name. It stands on the Console's dashboard; "
                f"pass Credentials(cloud_name, …) or set {URL_VARIABLE}={URL_FORM}."
            )
        if not re.fullmatch(_CLOUD_NAME, self.cloud_name):
            raise ConfigurationError(
                f"The cloud name {self.cloud_name!r} has characters that no cloud name has. "
                "Only letters, digits, '-', '_' and '.' can be right."
            )
        if self.oauth_token is None:
            if self.api_key is None or self.api_secret is None:
                missing = "API key" if self.api_key is None else "API secret"
                raise ConfigurationError(
                    f"There is no {missing} for the cloud {self.cloud_name!r}. "
                    "Pass api_key and api_secret, or an oauth_token."
                )
            if re.search("[:<>/?#@&=]", self.api_key):
                raise ConfigurationError("The API key has characters that no API key has.")
        if self.host is not None:
            read_base_url(self.host, self.cloud_name)

    @cached_property
    def signing_secrets(self) -> tuple[str, ...]:
        """The secrets that a notification may be signed with; empty if there is none."""
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
            ConfigurationError: Nothing is set, or it cannot be right.
        """
        environment = os.environ if environment is None else environment
        if url := environment.get(URL_VARIABLE, "").strip():
            return cls.from_url(url)
        if not environment.get("CLOUDINARY_CLOUD_NAME", "").strip():
            raise ConfigurationError(
                f"There are no credentials. Set {URL_VARIABLE}={URL_FORM} "
                "(the Console's dashboard shows it), or CLOUDINARY_CLOUD_NAME, CLOUDINARY_API_KEY "
                "and CLOUDINARY_API_SECRET, or pass Credentials(…)."
            )
        return cls(
            environment["CLOUDINARY_CLOUD_NAME"],
            environment.get("CLOUDINARY_API_KEY"),
            environment.get("CLOUDINARY_API_SECRET"),
            oauth_token=environment.get("CLOUDINARY_OAUTH_TOKEN")
            or environment.get("CLOUDINARY_O_AUTH2"),
            host=environment.get("CLOUDINARY_UPLOAD_PREFIX"),
        )

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Read ``cloudinary://<api_key>:<api_secret>@<cloud_name>[?upload_prefix=…]``.

        The secret may hold any character, percent-encoded or not. Of the parameters,
        ``upload_prefix``, ``oauth_token`` and ``signature_algorithm`` are heeded; a private CDN
        after the cloud name is passed over.

        Raises:
            ConfigurationError: It is no such URL; the sentence never quotes the secret.
        """
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
        except UnicodeDecodeError:
            raise ConfigurationError(
                "The Cloudinary URL has a percent-encoding that is no UTF-8. Write '%' as %25."
            ) from None
        if not colon and "oauth_token" not in options:
            raise ConfigurationError(
                f"The Cloudinary URL has no ':' between API key and secret; its form is {URL_FORM}."
            )
        try:
            algorithm = options.get("signature_algorithm", "").lower()
            return cls(
                cloud_name,
                key,
                secret,
                oauth_token=options.get("oauth_token"),
                digests=(algorithm,) if algorithm else ("sha1", "sha256"),
                host=options.get("upload_prefix"),
            )
        except ConfigurationError as error:
            raise ConfigurationError(f"The Cloudinary URL cannot be right: {error}") from None


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
            "The Cloudinary URL can be read in two ways. Write '@' as %40 and '?' as %3F inside "
            "of the secret and of the parameters."
        )
    if found:
        return found[0]
    if re.fullmatch(_LOCATION, rest) and "?" in rest:
        return "", rest
    raise ConfigurationError(
        f"The Cloudinary URL has no cloud name behind an '@'; its form is {URL_FORM}."
    )


class Pacer(Protocol):
    """Anything that says when the next attempt may start, such as an ``aiolimiter`` limiter."""

    async def acquire(self) -> object:
        """Return when one more attempt may start."""


def _positive(instance: Any, attribute: Any, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigurationError(
            f"{type(instance).__name__}.{attribute.name} must be a positive number, not {value!r}."
        )


def _count(instance: Any, attribute: Any, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(
            f"{type(instance).__name__}.{attribute.name} must be a whole number from 1, "
            f"not {value!r}."
        )


def _not_negative(instance: Any, attribute: Any, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ConfigurationError(
            f"{type(instance).__name__}.{attribute.name} must be a number from 0, not {value!r}."
        )


def _truth(instance: Any, attribute: Any, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigurationError(
            f"{type(instance).__name__}.{attribute.name} must be True or False, not {value!r}."
        )


_maybe_positive: Any = attrs.validators.optional(_positive)


@attrs.frozen(kw_only=True)
class Settings:
    """How a session calls. All times are seconds.

    Raises:
        ConfigurationError: A value cannot be right.
    """

    permits: int = attrs.field(default=64, validator=_count)
    """HTTP attempts of analyze calls in flight at once; halved for a while when throttled."""

    attempts: int = attrs.field(default=6, validator=_count)
    """Attempts per call, the first included."""

    connect_timeout: float = attrs.field(default=10, validator=_positive)
    """For one attempt: until the connection stands (real time)."""

    read_timeout: float = attrs.field(default=120, validator=_positive)
    """For one attempt: until its whole answer is read, from when its permit is held (real time)."""

    call_timeout: float | None = attrs.field(default=None, validator=_maybe_positive)
    """For a whole `analyze`, queueing and retries included, where the call names no ``timeout``.
    ``None``: no limit but the attempts'."""

    backoff_first: float = attrs.field(default=0.5, validator=_positive)
    """The wait before the second attempt; doubles with each, jittered down to a half."""

    backoff_max: float = attrs.field(default=30, validator=_positive)
    """The longest wait of our own choosing."""

    max_server_wait: float = attrs.field(default=120, validator=_positive)
    """The longest wait that the server may ask for; when it asks for more, the call raises."""

    retry_ambiguous: bool = attrs.field(default=True, validator=_truth)
    """Whether attempts that may have been charged (sent and unanswered; 500, 502, 504) are
    repeated. ``False``: such a call raises at once and says so."""

    host: str | None = None
    """Host or origin of the API: ``api-eu.cloudinary.com``, ``http://127.0.0.1:8080``.
    ``None``: the credentials', else ``api.cloudinary.com``."""

    max_response_bytes: int = attrs.field(default=32 * 2**20, validator=_count)
    """The longest body that is read, after decompression."""

    poll_first: float | None = attrs.field(default=None, validator=_maybe_positive)
    """From a task's acceptance to its first status poll; grows from there. ``None``: 5 with a
    notification source, 1 without."""

    poll_longest: float | None = attrs.field(default=None, validator=_maybe_positive)
    """The longest interval between polls of a task. ``None``: 300 with a source, 30 without."""

    poll_permits: int = attrs.field(default=4, validator=_count)
    """Status polls in flight at once, beside the permits."""

    polls_per_second: float = attrs.field(default=20, validator=_positive)
    """Status polls begun in a second, over all tasks. With many tasks, polls are late instead."""

    result_grace: float = attrs.field(default=1200, validator=_not_negative)
    """After a poll said ``completed``: how long the notification may still arrive. The service
    re-delivers after about 3, 6 and 9 minutes."""

    failure_grace: float = attrs.field(default=15, validator=_not_negative)
    """After a poll said ``failed``: how long the notification with the reason may still arrive."""

    on_missing_result: Literal["raise", "analyze"] = attrs.field(
        default="raise", validator=attrs.validators.in_(("raise", "analyze"))
    )
    """What to do when a task is completed and no result arrives: ``"raise"``
    `ResultNotDeliveredError`, or ``"analyze"``: repeat it as a call, which spends quota again."""

    task_timeout: float | None = attrs.field(default=3600.0, validator=_maybe_positive)
    """How long a task handle waits where it names no ``timeout``. ``None``: for ever."""

    answered_seconds: float = attrs.field(default=3600, validator=_not_negative)
    """How long an answered task can be taken up again by its id."""

    answered_count: int = attrs.field(default=10_000, validator=_count)
    """How many answered tasks are kept for that."""

    parked_seconds: float = attrs.field(default=600, validator=_not_negative)
    """How long a notification waits for its task to become known here."""

    parked_bytes: int = attrs.field(default=16 * 2**20, validator=_count)
    """How many bytes of such notifications are kept; the oldest are dropped first."""

    pacer: Pacer | None = None
    """Something with ``async acquire()``, awaited before each attempt of an analyze call, for a
    rate of your own. Holds no permit while it waits."""

    def __attrs_post_init__(self) -> None:
        if self.backoff_max < self.backoff_first:
            raise ConfigurationError("Settings.backoff_max must not be less than backoff_first.")
        if self.poll_first and self.poll_longest and self.poll_longest < self.poll_first:
            raise ConfigurationError("Settings.poll_longest must not be less than poll_first.")
        if self.pacer is not None and not callable(getattr(self.pacer, "acquire", None)):
            raise ConfigurationError("Settings.pacer must have a method `async acquire()`.")
