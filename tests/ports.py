"""Ports for servers that tests start later, stop and start again, or never start."""

from __future__ import annotations

import socket

_holders: dict[int, socket.socket] = {}


def reserve_port() -> int:
    """Return a port of 127.0.0.1 that no other process gets while this one runs, or until it is
    released.

    A socket stays bound to the port and does not listen: connections are refused, and only servers
    that name the port, with ``SO_REUSEADDR``, can listen on it. Otherwise, the system might give the
    port to another test before the server starts, or while it restarts.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    port: int = holder.getsockname()[1]
    _holders[port] = holder
    return port


def release_port(port: int) -> None:
    """Leave a port to other processes."""
    _holders.pop(port).close()
