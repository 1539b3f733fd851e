"""The command line, ``cloudinary-analyze``. Needs the ``cli`` extra; nothing else imports it.

```sh
cloudinary-analyze models
cloudinary-analyze analyze captioning https://images.example/a.jpg
cloudinary-analyze run captioning coco --input urls.txt --output results.jsonl --report report.html
cloudinary-analyze run ai_vision_general --prompt "What is shown?" --input shop.csv --column photo
cloudinary-analyze run coco --input urls.txt --dry-run       # what it would send, and the quota left
cloudinary-analyze export results.jsonl.ledger -o results.parquet
cloudinary-analyze report results.jsonl -o report.html
cloudinary-analyze status TASK_ID
cloudinary-analyze listen --redis redis://localhost
cloudinary-analyze emulator
```

``run`` takes one URL or ``asset:ID`` per line, or CSV, JSON Lines or Parquet with a column. It writes
one record per line and model. The extension of the output, or ``--format``, chooses JSON Lines, CSV or
Parquet. ``--input`` is repeatable, takes glob patterns, and reads ``.gz``. CSV is read strictly: an open
quote is refused with its lines, so that no row is lost. The columns of the input are in each record, under
``input`` in JSON Lines and as columns in tables. ``restored`` says which responses this run did not pay for.

**The same command again resumes.** Every response is recorded in a ledger next to the output
(``results.jsonl.ledger``). After Ctrl-C, a kill or an exhausted quota, completed items are skipped and
submitted tasks are picked up. Requests that were in flight at a kill are sent again. The output is
written from the ledger when the run ends, however it ends: every item once, in the order of the input.

| option | effect |
|---|---|
| ``--retry-failed`` | Also retry items that failed permanently. |
| ``--key-column NAME`` | Identify each image by a column, when URLs change between runs. |
| ``--keep a,b`` | Write only these columns of the input to the output; ``none`` for none. |
| ``--output -`` | Stream records to standard output, without a ledger. |
| ``--dry-run`` | Print the calls that a run would make and the quota left; send nothing. |
| ``--sample N`` | Process N rows spread over the input, then estimate what the rest will cost. |
| ``--max-calls N``, ``--max-units F=N`` | Stop before more is spent. |
| ``--emulator`` | Use an emulator in this process; each run begins with a new one. |

An edited input resumes, too. The output and the counts are those of the present input; results of another
one stay in the ledger, and the earlier output is kept as ``OUTPUT.1``. No command overwrites its inputs or
a ledger. Symbolic links are followed, and new files are readable by their owner only.

If the ledger is locked or its disk is full, nothing more is sent. What the ledger cannot take is saved
in another directory, and the next run reads it.

``--mode task`` submits tasks. Their results arrive through ``--receive HOST:PORT --public-url URL``, or
through ``--redis URL``, which ``cloudinary-analyze listen --redis URL`` fills for any number of
processes. Results received by ``--receive`` are acknowledged once the ledger holds them.

| exit code | meaning |
|---|---|
| 0 | Every item was answered. |
| 1 | Some items failed; the results say which and why. |
| 2 | The command line, the configuration or the input is invalid; nothing was sent. |
| 3 | Stopped early: refused credentials, an exhausted quota, or results that cannot be written. |
| 130 | Interrupted by Ctrl-C or SIGTERM. |
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

__all__ = ["main"]

COLLECTED_AFTER: Final = 20_000  # more new objects than freed ones; 700 by default
_EXTRA = frozenset({"cyclopts", "rich"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The arguments after the program's name. Default: those of the process.

    Returns:
        The exit code: 0 all answered, 1 some items failed, 2 usage or configuration error,
        3 stopped early, 130 interrupted.
    """
    try:
        return _start(arguments)
    except KeyboardInterrupt:  # before a command handles it itself, or after it ended
        with suppress(OSError):
            print("Interrupted.", file=sys.stderr)
        return 130


def _start(arguments: Sequence[str] | None) -> int:
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
    if arguments is not None:
        return run_app(arguments)
    _tune_collector()
    return run_app(sys.argv[1:])


def _tune_collector() -> None:
    """Let the collector of this process run less often, and leave out what was imported.

    A run makes some hundred objects an item, few of them in cycles, so most of its passes find
    nothing. This saves a sixth of the CPU time of an item.
    """
    gc.freeze()
    gc.set_threshold(COLLECTED_AFTER, *gc.get_threshold()[1:])
