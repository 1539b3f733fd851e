"""Checks of what a user passes to a session. Nothing here needs an event loop."""

from __future__ import annotations

import asyncio
import re
from inspect import iscoroutinefunction
from typing import Final

from cloudinary_analyze._values import read_url
from cloudinary_analyze.config import (
    DEFAULT_HOST,
    Credentials,
    Settings,
    check_proxy,
    read_base_url,
)
from cloudinary_analyze.errors import ConfigurationError, InvalidRequestError
from cloudinary_analyze.protocols import NotificationSource
from cloudinary_analyze.responses import Delivery

_NOTIFICATION_URL: Final = r"(?ai:https?)://[^\s/?#][^\s]*"


def check_arguments(credentials: object, settings: object, http: object, on_event: object) -> None:
    """Raise if one of them has another type, or two exclude each other.

    Raises:
        ConfigurationError: See above.
    """
    if not isinstance(credentials, Credentials):
        raise ConfigurationError(
            f"`credentials` are Credentials(…), not {type(credentials).__name__}; for a "
            "cloudinary:// URL pass Credentials.from_url(url)."
        )
    if not isinstance(settings, Settings):
        raise ConfigurationError(f"`settings` are Settings(…), not {type(settings).__name__}.")
    if http is not None and settings.proxy is not None:
        raise ConfigurationError(
            "Settings.proxy and `http` exclude each other. Pass the proxy to the "
            "aiohttp.ClientSession instead."
        )
    if on_event is not None and not callable(on_event):
        raise ConfigurationError(f"`on_event` is a function of one event, not {on_event!r:.80}.")
    if iscoroutinefunction(on_event) or iscoroutinefunction(getattr(on_event, "__call__", None)):  # noqa: B004
        raise ConfigurationError(
            "`on_event` must be a plain function, because events are not awaited. In it, start an "
            "asyncio task or put the event into a queue."
        )


def choose_base_url(credentials: Credentials, settings: Settings) -> str:
    """Return ``scheme://host[:port]`` of the service. The settings come first.

    Raises:
        ConfigurationError: The credentials could be read in transit.
    """
    host = settings.host or credentials.host or DEFAULT_HOST
    base_url = read_base_url(host, credentials.cloud_name)
    check_proxy(settings.proxy, base_url, credentials.cloud_name)
    return base_url


def read_source(
    notifications: asyncio.Queue[Delivery] | NotificationSource | None, credentials: Credentials
) -> NotificationSource | None:
    """Return the source of notifications, which may be passed as a queue.

    Raises:
        ConfigurationError: It is neither, or the credentials have no secret to verify with.
    """
    if notifications is None:
        return None
    if isinstance(notifications, asyncio.Queue):
        from cloudinary_analyze.notifications import QueueSource

        notifications = QueueSource(notifications)
    elif not callable(getattr(notifications, "listen", None)):
        raise ConfigurationError(
            "`notifications` takes an asyncio.Queue or a NotificationSource, not "
            f"{notifications!r:.80}."
        )
    if not credentials.signing_secrets:
        raise ConfigurationError(
            "Notifications cannot be verified without a secret. Pass "
            "Credentials(…, notification_secrets=…) beside the OAuth token."
        )
    return notifications


def read_notification_url(value: object) -> str | None:
    """Return a URL or URL object as text.

    Raises:
        ConfigurationError: It is not an http(s) URL.
    """
    if value is None:
        return None
    text = read_url(value)
    if not isinstance(text, str):
        raise ConfigurationError(
            f"`notification_url` must be a string or a URL object, not {type(value).__name__}."
        )
    if not re.fullmatch(_NOTIFICATION_URL, text):
        raise ConfigurationError(
            f"The notification URL {text!r:.200} must begin with https:// (or http://)."
        )
    return text


def build_no_request_error(value: object) -> InvalidRequestError:
    """Return the error for a value that is not a request."""
    return InvalidRequestError(
        f"{value!r:.80} is not a request. Pass one of a model, such as Captioning(url)."
    )
