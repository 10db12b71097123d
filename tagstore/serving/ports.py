"""Reserve a port for several listeners."""

from __future__ import annotations

import socket

from tagstore.errors import Unavailable


def reserve(host: str, port: int, address: str) -> socket.socket:
    """Bind a port, without listening, for listeners that use SO_REUSEPORT.

    Raises `Unavailable` if it is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    plain = host.strip("[]")
    try:
        # without SO_REUSEPORT binding fails if any process has the port, also another group of workers
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((plain, port))
            port = probe.getsockname()[1]
        reservation = socket.socket(family)
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reservation.bind((plain, port))
    except OSError as error:
        raise Unavailable(
            f"cannot listen on {address}: is another server running there? Port 0 picks a free one"
        ) from error
    return reservation
