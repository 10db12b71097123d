"""A port that several listeners share, and nobody else."""

from __future__ import annotations

import socket

from tagstore.errors import Unavailable


def reserved(host: str, port: int, address: str) -> socket.socket:
    """Hold a port for those who will listen on it with SO_REUSEPORT: bound, not listened on.

    Raises `Unavailable` if somebody else has it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    plain = host.strip("[]")
    try:
        with socket.socket(
            family
        ) as probe:  # without SO_REUSEPORT: this fails if anybody is there, another group of workers too
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((plain, port))
            port = probe.getsockname()[1]
        held = socket.socket(family)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((plain, port))
    except OSError as error:
        raise Unavailable(
            f"cannot listen on {address}: is another server running there? Port 0 picks a free one"
        ) from error
    return held
