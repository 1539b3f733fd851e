"""Searches everything that the suite logs, at DEBUG, for the secrets of its tests."""

from __future__ import annotations

import base64
import logging

from scripted import KEY, SECRET

from cloudinary_analyze.emulator import Emulator

_EMULATOR = Emulator()
NEEDLES = [
    SECRET,
    _EMULATOR.api_secret,
    _EMULATOR.oauth_token,
    base64.b64encode(f"{KEY}:{SECRET}".encode()).decode(),
    base64.b64encode(f"{_EMULATOR.api_key}:{_EMULATOR.api_secret}".encode()).decode(),
]


class SecretSearch(logging.Handler):
    """Collects every log record whose message or traceback contains a secret."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.leaks: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{self.format(record)} {record.args!r}"
        if any(needle in text for needle in NEEDLES):
            self.leaks.append(text)
