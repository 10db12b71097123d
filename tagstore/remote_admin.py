"""Deprecated name of `tagstore.client.admin`."""

from warnings import warn

from tagstore.client.admin import RemoteAdmin, administer

warn("tagstore.remote_admin is now tagstore.client.admin", DeprecationWarning, stacklevel=2)

__all__ = ["RemoteAdmin", "administer"]
