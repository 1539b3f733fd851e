"""How much memory a process has."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from pathlib import Path


def read_memory() -> float:
    """Return the resident MiB after a collection. If that is unknown, return the peak."""
    gc.collect()
    return _read_status("VmRSS:") or read_peak_memory()


def read_resident() -> float:
    """Return the resident MiB now, without a collection. Linux only."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


class _MallocInfo(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def read_allocated() -> float:
    """Return the MiB that malloc has allocated: large objects, and those of C code. glibc only.

    Unlike resident memory, it excludes free memory between allocations.
    """
    read = ctypes.CDLL(None).mallinfo2
    read.restype = _MallocInfo
    found = read()
    return float(found.uordblks + found.hblkhd) / 2**20


def read_peak_memory(process: int | None = None) -> float:
    """Return the most memory that a process has held, in MiB.

    Args:
        process: Its id (Linux only). Default: this process.
    """
    # on Linux a child inherits its parent's ru_maxrss, which would hide growth below it
    if (peak := _read_status("VmHWM:", process)) is not None:
        return peak
    assert process is None, "only Linux reports it for another process"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _read_status(name: str, process: int | None = None) -> float | None:
    try:
        lines = Path(f"/proc/{process or 'self'}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(name)), None)
