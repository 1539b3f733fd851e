"""How a run ended: the exit code, and the sentence that says how to go on. Pure."""

from __future__ import annotations

import attrs

from cloudinary_analyze.cli.console import CommandError, ExitCode
from cloudinary_analyze.errors import AnalyzeError, BulkStoppedError


@attrs.frozen(kw_only=True)
class Position:
    """How far a run came in its input.

    Attributes:
        finished_through: The last line up to which every line has all of its results.
        pulled_lines: How many lines were begun.
        total_lines: How many there are; ``None`` if that is not known.
        exhausted: Whether the input was seen to end.
    """

    finished_through: int
    pulled_lines: int
    total_lines: int | None
    exhausted: bool

    @property
    def complete(self) -> bool:
        """Whether every line was begun."""
        return self.exhausted or self.pulled_lines == self.total_lines


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
    failure: BaseException | None = None,
    stopping: Exception | None = None,
    interrupted: bool = False,
    aborted: bool = False,
) -> Ending:
    """Decide how a run ended.

    Args:
        position: How far it came.
        failed: Items that have an error for their outcome.
        failure: What ended the stream, if it was not the end of the input.
        stopping: An item's error that would have stopped it, had there been more of the input.
        interrupted: Whether an interrupt asked it to finish.
        aborted: Whether a second interrupt cut off what was in flight.
    """
    if failure is not None:
        code, reason = _explain(failure)
        return Ending(code, f"{reason} {build_way_on(position)}")
    if aborted:
        reason = "Aborted: calls in flight were cut off, and may have been charged."
        return Ending(ExitCode.INTERRUPTED, f"{reason} {build_way_on(position)}")
    if interrupted and not position.complete:
        reason = "Interrupted: what was in flight was finished and written."
        return Ending(ExitCode.INTERRUPTED, f"{reason} {build_way_on(position)}")
    if stopping is not None:
        return Ending(ExitCode.STOPPED, f"Any further item would have failed alike: {stopping}")
    return Ending(ExitCode.FAILURES if failed else ExitCode.DONE)


def _explain(failure: BaseException) -> tuple[ExitCode, str]:
    match failure:
        case CommandError():
            return failure.exit_code, str(failure)
        case BulkStoppedError(reason=AnalyzeError() as reason):
            return ExitCode.STOPPED, (
                f"Stopped early, because every further item would fail alike: {reason}"
            )
        case AnalyzeError():
            return ExitCode.STOPPED, failure.message
        case OSError():
            return ExitCode.STOPPED, f"The input could not be read on: {failure.strerror}."
    raise failure


def build_way_on(position: Position) -> str:
    """Return the sentences that say where a run stands and how to go on."""
    through = position.finished_through
    so_far = (
        f"Every input line up to {through:,} has its results"
        if through
        else "No input line has all of its results"
    )
    unsent = "the lines that were not reached were not sent"
    if position.total_lines is not None:
        left = position.total_lines - position.pulled_lines
        unsent = f"{left:,} {'line was' if left == 1 else 'lines were'} not sent"
    return (
        f"{so_far}; {unsent}. "
        f"To go on, run again with the input from line {through + 1:,} on and another --output."
    )
