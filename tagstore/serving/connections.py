"""Ends TCP connections of this process, which gRPC's asyncio API cannot."""

from __future__ import annotations

import ipaddress
import os
import socket
from contextlib import suppress
from pathlib import Path
from stat import S_ISSOCK
from urllib.parse import unquote


def hang_up(peer: str) -> bool:
    """End the connection with a peer, "ipv4:127.0.0.1:50051" as gRPC says; tells whether there was one."""
    family, _, address = unquote(peer).partition(":")
    host, _, port = address.rpartition(":")
    if family not in ("ipv4", "ipv6") or not port.isdecimal():
        return False
    wanted = _plain(host.strip("[]")), int(port)
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # it was closed meanwhile, or is no connection
            if not S_ISSOCK(os.stat(Path("/proc/self/fd") / name).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                host, port_number, *_ = connection.getpeername()
                if (_plain(host), port_number) == wanted:
                    connection.shutdown(socket.SHUT_RDWR)
                    return True
    return False


def _plain(host: str) -> str:
    """Return an address in one way of writing, without a zone."""
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)
