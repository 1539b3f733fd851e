"""How a run ended: the exit code, and the sentence that says how to go on. Pure."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

import attrs

from cloudinary_analyze.cli.screen import CommandError, ExitCode
from cloudinary_analyze.errors import AnalyzeError, BulkStoppedError, QuotaExceededError

AGAIN: Final = "To go on, run the same command again: what is recorded is not asked again."


@attrs.frozen(kw_only=True)
class Position:
    """How far a run without a ledger came in its input.

    Attributes:
        finished_through: The last line up to which every line has all of its results.
        begun_lines: How many lines were begun.
        total_lines: How many there are; ``None`` if that is not known.
        exhausted: Whether the input was seen to end.
    """

    finished_through: int
    begun_lines: int
    total_lines: int | None
    exhausted: bool

    @property
    def complete(self) -> bool:
        """Whether every line was begun."""
        return self.exhausted or self.begun_lines == self.total_lines


@attrs.frozen(kw_only=True)
class Balance:
    """What a ledger holds of a run.

    Attributes:
        answered: Items with a response.
        failed: Items with an error.
        passing: How many of these failed for reasons that may pass.
        undelivered: How many failed because the result of their task was never delivered.
        total: Items in all; ``None`` if that is not known.
        lasting: Whether the same command goes on with it. An emulator's run begins anew.
    """

    answered: int
    failed: int
    passing: int
    undelivered: int
    total: int | None
    lasting: bool = True

    @property
    def left(self) -> int | None:
        """How many items have no outcome; ``None`` if that is not known."""
        return None if self.total is None else max(0, self.total - self.answered - self.failed)


@attrs.frozen
class Ending:
    """How a run ended.

    Attributes:
        exit_code: What the process ends with.
        sentence: What to say of it; empty if there is nothing to say.
    """

    exit_code: ExitCode
    sentence: str = ""


def decide_ending(
    position: Position,
    *,
    failed: int,
    balance: Balance | str | None = None,
    failure: BaseException | None = None,
    stopping: Exception | None = None,
    interrupted: bool = False,
    aborted: bool = False,
    as_tasks: bool = False,
) -> Ending:
    """Decide how a run ended.

    Args:
        position: How far it came.
        failed: Items that have an error for their outcome, of earlier runs too if there is a
            ledger.
        balance: What the ledger holds, if there is one; or why that is not known.
        failure: What ended the stream, if it was not the end of the input.
        stopping: An item's error that would have stopped it, had there been more of the input.
        interrupted: Whether an interrupt asked it to finish.
        aborted: Whether a second interrupt cut off what was in flight.
        as_tasks: Whether what was in flight were tasks, which go on remotely.
    """
    if balance is None:
        way_on = _build_way_on(position)
    else:
        way_on = balance if isinstance(balance, str) else _build_balance(balance)
    if failure is not None:
        code, reason = _explain(failure)
        return Ending(code, f"{reason} {way_on}")
    if aborted:
        reason = "Aborted: calls in flight were cut off, and may have been charged."
        if as_tasks and balance is not None:
            reason = "Aborted: tasks under way go on, and the same command takes them up again."
        return Ending(ExitCode.INTERRUPTED, f"{reason} {way_on}")
    if stopping is not None:
        return Ending(ExitCode.STOPPED, f"{_explain_stop(stopping)} {way_on}")
    if interrupted and not position.complete:
        reason = "Interrupted: what was in flight was finished and written."
        return Ending(ExitCode.INTERRUPTED, f"{reason} {way_on}")
    code = ExitCode.FAILURES if failed else ExitCode.DONE
    return Ending(code, _build_retry(balance) if isinstance(balance, Balance) else "")


def _explain(failure: BaseException) -> tuple[ExitCode, str]:
    match failure:
        case CommandError():
            return failure.exit_code, str(failure)
        case BulkStoppedError(reason=AnalyzeError() as reason):
            return ExitCode.STOPPED, _explain_stop(reason)
        case AnalyzeError():
            return ExitCode.STOPPED, failure.message
        case OSError():
            return ExitCode.STOPPED, f"The input could not be read on: {failure.strerror}."
    raise failure


def _explain_stop(reason: Exception) -> str:
    sentence = f"Stopped early, because every further item would fail alike: {reason}"
    if isinstance(reason, QuotaExceededError):
        sentence += f" {_tell_renewal(reason)}"
    return sentence


def _tell_renewal(error: QuotaExceededError) -> str:
    if error.reset_time is None:
        return "When the quota is renewed, the service did not tell."
    instant = datetime.fromtimestamp(error.reset_time, UTC)
    return f"The quota is renewed at {instant:%Y-%m-%d %H:%M:%S} UTC."


def _build_balance(balance: Balance) -> str:
    """Return the sentences that say what is done, what is left, and how to go on."""
    sentence = f"{_count(balance.answered, 'item is', 'items are')} answered"
    if balance.failed:
        sentence += f", {balance.failed:,} failed"
    left = balance.left
    sentence += ", the rest of the input is left" if left is None else f", {left:,} left"
    return f"{sentence}. To go on, run the same command again: what is recorded is not asked again."


def _build_retry(balance: Balance) -> str:
    final = balance.failed - balance.passing - balance.undelivered
    sentences = []
    if not balance.lasting:
        return ""
    if balance.passing:
        sentences.append(
            f"{_count(balance.passing, 'item', 'items')} failed for reasons that may pass; "
            "the same command asks them again."
        )
    if balance.undelivered:
        sentences.append(
            f"{_count(balance.undelivered, 'result was', 'results were')} never delivered; "
            "--retry-failed asks for them once more, as calls."
        )
    if final > 0:
        sentences.append(
            f"{_count(final, 'item', 'items')} failed for good; --retry-failed asks them again "
            "all the same."
        )
    return " ".join(sentences)


def _count(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _build_way_on(position: Position) -> str:
    """Return the sentences that say where a run without a ledger stands and how to go on."""
    if position.complete:
        return "Every input line has its outcome."
    through = position.finished_through
    so_far = (
        f"Every input line up to {through:,} has its results"
        if through
        else "No input line has all of its results"
    )
    unsent = "the lines that were not reached were not sent"
    if position.total_lines is not None:
        left = position.total_lines - position.begun_lines
        unsent = f"{_count(left, 'line was', 'lines were')} not sent"
    return f"{so_far}; {unsent}. To go on, run again with the input from line {through + 1:,} on."
