"""The command line, ``cloudinary-analyze``. Needs the [cli] extra; nothing else imports it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]

_EXTRA = frozenset({"cyclopts", "rich"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What stands behind the program's name. Default: the process's.

    Returns:
        The exit code: 0 all answered, 1 some items failed, 2 usage or configuration error,
        3 stopped early, 130 interrupted.
    """
    try:
        from cloudinary_analyze.cli.app import run_app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        print(
            f"The command line needs the package {error.name}, which is not installed: "
            "pip install 'cloudinary-analyze[cli]'",
            file=sys.stderr,
        )
        return 2
    return run_app(sys.argv[1:] if arguments is None else arguments)
