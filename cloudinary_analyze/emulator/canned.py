"""Results that a test sets, by model and source, instead of the synthetic ones."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

import attrs

from cloudinary_analyze.emulator.analyses import build_analysis
from cloudinary_analyze.emulator.gallery import find_scene
from cloudinary_analyze.emulator.validation import AnalyzeRequest, Refusal, refuse_unfetchable

_CATEGORIES: Final = {401: "auth_error", 403: "auth_error", 429: "rate_limit_error"}


@attrs.define(eq=False)
class CannedResult:
    """The result of a model, or the error that it ends with.

    Attributes:
        analysis: The ``data.analysis`` object. ``None``: the synthetic one.
        status: 200, or the status of the error.
        left: The number of requests that it still serves. ``None``: any number.
    """

    analysis: Mapping[str, Any] | None
    status: int = 200
    left: int | None = None


@attrs.define(eq=False)
class CannedResults:
    """Rules by model and source. A rule for a source is used before one for its model."""

    _rules: dict[tuple[str, str | None], list[CannedResult]] = attrs.field(factory=dict, init=False)

    def add(self, model: str, source: str | None, result: CannedResult) -> None:
        """Add a rule, used after those of the same target. It replaces a rule without a limit."""
        rules = self._rules.setdefault((model, source), [])
        if rules and rules[-1].left is None:
            rules.pop()
        rules.append(result)

    def take(self, model: str, source: str) -> CannedResult | None:
        """Return the result of a request, and count it as used."""
        for target in ((model, source), (model, None)):
            rules = self._rules.get(target)
            if rules:
                rule = rules[0]
                if rule.left is not None:
                    rule.left -= 1
                    if rule.left == 0:
                        rules.pop(0)
                return rule
        return None


def find_refusal(request: AnalyzeRequest, canned: CannedResult | None) -> Refusal | None:
    """Return the error that a request ends with. ``None``: it has a result."""
    if canned is not None and canned.status != 200:
        default = "server_error" if canned.status >= 500 else "user_error"
        category = _CATEGORIES.get(canned.status, default)
        known = canned.status in {status.value for status in HTTPStatus}
        message = HTTPStatus(canned.status).phrase.lower() if known else "error"
        return Refusal(canned.status, message, category=category)
    if (canned is None or canned.analysis is None) and find_scene(request.source) is None:
        return refuse_unfetchable()
    return None


def find_analysis(request: AnalyzeRequest, canned: CannedResult | None) -> dict[str, Any]:
    """Return ``data.analysis`` of a request that has a result."""
    if canned is not None and canned.analysis is not None:
        return dict(canned.analysis)
    return build_analysis(request) or {}
