"""A plugin for Dask workers that closes the sessions of stages. Needs ``distributed``.

See `cloudinary_analyze.stage` for how to use Dask.
"""

from __future__ import annotations

import asyncio
from importlib import import_module
from typing import Any

from cloudinary_analyze.stage import close_sessions

try:
    _WorkerPlugin: Any = import_module("distributed").WorkerPlugin  # by name: it has no types
except ImportError as _missing:
    raise ImportError(
        "The plugin needs dask.distributed: pip install 'dask[distributed]'."
    ) from _missing

__all__ = ["AnalyzePlugin"]


async def _teardown(_: Any, worker: Any) -> None:  # noqa: ARG001 -- the plugin's signature
    """Close the sessions of the worker process. Dask calls it when a worker ends.

    If cancelled, the closing continues in a thread.
    """
    await asyncio.to_thread(close_sessions)


AnalyzePlugin: Any = type(
    "AnalyzePlugin",
    (_WorkerPlugin,),
    {
        "__doc__": "Register it once: ``client.register_plugin(AnalyzePlugin())``.",
        "__module__": __name__,
        "name": "cloudinary-analyze",
        "teardown": _teardown,
    },
)
