"""Errors have one root and matching built-ins, can be pickled, and never contain secrets."""

from __future__ import annotations

import builtins
import copy
import inspect
import pickle
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cloudinary_analyze
from cloudinary_analyze import (
    AnalyzeError,
    ApiError,
    AttemptTimeoutError,
    AuthenticationError,
    BadRequestError,
    BulkStoppedError,
    CallTimeoutError,
    ConfigurationError,
    InvalidRequestError,
    Limit,
    NotFoundError,
    PermissionDeniedError,
    QuotaExceededError,
    RateLimitedError,
    ResponseDecodeError,
    ServerError,
    TaskStatus,
    TaskTimeoutError,
    TransportError,
)
from cloudinary_analyze import errors as errors_module
from cloudinary_analyze.errors import shorten

ERRORS = [
    value
    for value in vars(errors_module).values()
    if isinstance(value, type) and issubclass(value, AnalyzeError)
]
VALUES: dict[str, Any] = {
    "ambiguous": True,
    "attempts": 3,
    "permanent": True,
    "status": 429,
    "code": "MA_00008",
    "category": "rate_limit_error",
    "api_message": "quota exceeded",
    "details": {"feature_name": "ai_vision", "more": [1, {"a": None}]},
    "request_id": "17c3b70c",
    "retry_after": 1.5,
    "limits": (Limit("ai_vision", remaining=0, reset_time=datetime(2026, 12, 1, tzinfo=UTC)),),
    "raw_body": b'{"error": "\xff"}',
    "model": "captioning",
    "feature": "ai_vision",
    "reset_time": 1_790_000_000.0,
    "path": "$.data",
    "task_id": "053f",
    "cause_known": False,
    "last_status": TaskStatus("053f", "completed"),
    "reason": None,
    "seconds": 121.5,
    "calls": 3,
    "units": {"ai_vision": 7},
    "overshoot": {"ai_vision": 1},
}


def fields_of(kind: type[AnalyzeError]) -> list[str]:
    names: dict[str, None] = {}
    for base in kind.__mro__:
        if issubclass(base, AnalyzeError) and "__init__" in vars(base):
            parameters = inspect.signature(base).parameters
            names |= dict.fromkeys(parameters)
            if "fields" not in parameters:
                break  # it passes none on
    return [name for name in names if name not in {"message", "fields"}]


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_pickles_and_copies_completely(kind: type[AnalyzeError]) -> None:
    fields = {name: VALUES[name] for name in fields_of(kind)}
    error = kind("It went wrong.", **fields)
    error.add_note("a note")
    twins = [pickle.loads(pickle.dumps(error, protocol)) for protocol in range(2, 6)]
    for twin in [*twins, copy.copy(error), copy.deepcopy(error)]:
        assert type(twin) is kind
        assert vars(twin) == vars(error)
        assert {name: getattr(twin, name) for name in fields} == fields
        assert (twin.args, str(twin), repr(twin)) == (error.args, str(error), repr(error))
        assert twin.message == "It went wrong."


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_can_be_made_from_a_message_alone(kind: type[AnalyzeError]) -> None:
    error = kind("It went wrong.")
    assert str(error) == "It went wrong."
    for name in fields_of(kind):
        getattr(error, name)
    assert getattr(cloudinary_analyze, kind.__name__) is kind


def test_a_stopped_stream_pickles_with_its_reason() -> None:
    reason = AuthenticationError("No.", status=401, raw_body=b"x")
    twin = pickle.loads(pickle.dumps(BulkStoppedError("Stopped.", reason=reason)))
    assert isinstance(twin.reason, AuthenticationError)
    assert vars(twin.reason) == vars(reason)


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (ConfigurationError, ValueError),
        (InvalidRequestError, ValueError),
        (TransportError, ConnectionError),
        (AttemptTimeoutError, TimeoutError),
        (AttemptTimeoutError, ConnectionError),
        (CallTimeoutError, TimeoutError),
        (TaskTimeoutError, TimeoutError),
        (BadRequestError, ValueError),
        (AuthenticationError, PermissionError),
        (PermissionDeniedError, PermissionError),
        (NotFoundError, LookupError),
        (ResponseDecodeError, ValueError),
        (QuotaExceededError, RateLimitedError),
        (RateLimitedError, ApiError),
        (ServerError, ApiError),
    ],
)
def test_errors_subclass_the_matching_built_in(
    kind: type[Exception], builtin: type[Exception]
) -> None:
    assert issubclass(kind, builtin)
    assert issubclass(kind, AnalyzeError)


def test_no_error_hides_a_built_in_name() -> None:
    assert not {kind.__name__ for kind in ERRORS} & set(dir(builtins))


def test_an_ambiguous_error_reports_it() -> None:
    assert str(ServerError("The service failed.", ambiguous=True)).endswith(
        "The request may have been accepted, and charged."
    )


def test_bodies_are_shortened_for_messages() -> None:
    assert shorten(b"a" * 10_000) == "a" * 200 + "…"
    assert shorten(b"a\r\n\t b") == "a b"
    assert shorten(b"\xff\xfe") == "\ufffd\ufffd"
    assert shorten("ä".encode() * 200) == "ä" * 200
    assert shorten("a" * 10_000) == "a" * 200 + "…"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202eabc", "\\u202eabc"),
        ("\ud800", "\\ud800"),
        (b"\x07bell\0", "\\x07bell\\x00"),
        ("\U000e0001", "\\U000e0001"),
        ("plain ä 猫 🐈", "plain ä 猫 🐈"),
    ],
)
def test_terminal_control_characters_are_escaped(text: Any, shown: str) -> None:
    assert shorten(text) == shown


@given(st.text() | st.binary())
def test_shortened_text_is_printable_and_can_be_encoded(text: Any) -> None:
    assert shorten(text).isprintable()
    assert len(shorten(text, 20)) <= 21
    shorten(text).encode()


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_an_unknown_field_of_an_error_is_refused(kind: type[AnalyzeError]) -> None:
    with pytest.raises(TypeError):
        kind("It went wrong.", taskid="t1")  # type: ignore[call-arg]


class Unpicklable(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


@pytest.mark.parametrize("reason", [Unpicklable("a", "b"), ValueError(lambda: 1), ValueError("v")])
def test_a_stopped_stream_pickles_whatever_its_reason_is(reason: Exception) -> None:
    error = BulkStoppedError("Stopped.", reason=reason)
    twin = pickle.loads(pickle.dumps(error))
    assert str(twin) == "Stopped."
    assert error.reason is reason
    if type(reason.args[0]) is str and type(reason) is ValueError:
        assert repr(twin.reason) == repr(reason)
    else:
        assert type(twin.reason) is AnalyzeError
        assert str(twin.reason).startswith(type(reason).__name__)


@pytest.mark.parametrize("message", ["a" * 5_000, "\n" * 5_000])
def test_a_message_has_2000_characters_at_most(message: str) -> None:
    assert len(AnalyzeError(message).message) <= 2_000
