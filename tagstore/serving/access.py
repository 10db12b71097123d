"""Callers and their rights.

A file, which is read again when it changes, or the variable TAGSTORE_TOKENS lists the callers as JSON:

    {"callers": [
      {"name": "trainer", "token": "a long random text", "stores": {"fashion": "read"}},
      {"name": "data team", "sha256": "hex sha256 of its token", "stores": {"shoes": "ingest", "*": "read"}},
      {"name": "operator", "certificate": "common name of its client certificate", "stores": {"*": "admin"}}
    ]}

`read` looks tags up, `ingest` also adds to a store and deletes from it, `admin` also rolls back, builds
indexes, loads and unloads. A token comes as `authorization: Bearer TOKEN`; its sha256 is compared with every
caller's, in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Literal, get_args

from tagstore.errors import InvalidInput, NotAuthenticated, NotPermitted

log = logging.getLogger(__name__)

Role = Literal["read", "ingest", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
VARIABLE = "TAGSTORE_TOKENS"
"""Environment variable with the callers."""
_KEYS = {"name", "token", "sha256", "certificate", "stores"}


@dataclass(frozen=True, slots=True)
class Caller:
    """A caller, identified or anonymous."""

    name: str
    stores: Mapping[str, Role] = field(default_factory=dict)
    """Role by store; "*" is every store that is not named."""
    known: bool = True
    """Whether a token or certificate identifies the caller."""

    def may(self, role: Role, store: str) -> bool:
        """Tell whether the caller has a role on a store, or a higher one."""
        granted = self.stores.get(store, self.stores.get("*"))
        return granted is not None and ROLES.index(granted) >= ROLES.index(role)

    def may_anywhere(self, role: Role) -> bool:
        """Tell whether the caller has a role, or a higher one, on any store at all."""
        return any(ROLES.index(granted) >= ROLES.index(role) for granted in self.stores.values())

    def check_anywhere(self, role: Role) -> None:
        """Raise `NotPermitted` if the caller has a role on no store: known before a message is read."""
        if not self.may_anywhere(role):
            raise NotPermitted(
                f"{self.name} may not {_VERBS[role]} any store: ask for the role {role} on one"
            )

    def check(self, role: Role, store: str) -> None:
        """Raise `NotPermitted` if the caller lacks a role, whether or not the store exists."""
        if not self.may(role, store):
            raise NotPermitted(
                f"{self.name} may not {_VERBS[role]} store '{store}': ask for the role {role} on it"
            )


_VERBS: dict[Role, str] = {"read": "read", "ingest": "write to", "admin": "administer"}


class Access:
    """The callers of a server.

    Args:
        path: file of callers; None to read the environment variable.
        anonymous: role of callers without token or certificate on every store. None: `read` if the server
            asks for neither, else no role.
        certificates: whether the server asks for client certificates. A caller whose certificate is not
            listed may read.
    """

    def __init__(
        self, path: str | Path | None = None, *, anonymous: Role | None = None, certificates: bool = False
    ) -> None:
        self._path = Path(path) if path else None
        self._lock = Lock()
        self._checked = time.monotonic()
        self._changed: tuple[int, int] = (0, 0)
        self._tokens: list[tuple[bytes, Caller]] = []
        self._certificates: dict[str, Caller] = {}
        self.certificates = certificates
        self.changes = 0
        """How often the callers were read."""
        text = os.environ.get(VARIABLE, "")
        if self._path:
            self._changed = _identity(self._path)
            self._read(_text(self._path), str(self._path))
        elif text:
            self._read(text, VARIABLE)
        self.authenticates = bool(self._path or text or certificates)
        granted = anonymous or (None if self.authenticates else "read")
        self._anonymous = Caller("a caller without a token", {"*": granted}, known=False) if granted else None

    def caller(self, authorization: str, certificate: str = "") -> Caller:
        """Identify the caller of a call.

        Args:
            authorization: metadata of that name, or "".
            certificate: common name of the client's certificate, which TLS has verified; or "".

        Raises:
            NotAuthenticated: the token is unknown, or missing where one is required.
        """
        self.refresh()
        if authorization:
            scheme, _, token = authorization.partition(" ")
            if scheme.lower() != "bearer" or not token:
                raise NotAuthenticated("the metadata 'authorization' is not 'Bearer TOKEN'")
            digest = hashlib.sha256(token.strip().encode()).digest()
            # all tokens are compared, so that the time does not tell which one matched
            matching = [caller for known, caller in self._tokens if hmac.compare_digest(known, digest)]
            if not matching:
                raise NotAuthenticated("the token is not known here: it is mistyped, or was withdrawn")
            return matching[-1]
        if certificate:
            return self._certificates.get(certificate) or Caller(
                f"certificate '{certificate}'", {"*": "read"}
            )
        if self._anonymous is None:
            raise NotAuthenticated(
                "this server wants a token: send the metadata 'authorization: Bearer TOKEN'"
            )
        return self._anonymous

    def refresh(self) -> None:
        """Read the file of callers again if it has changed, at most once a second."""
        if self._path is not None and time.monotonic() - self._checked > 1.0:
            self._reload(self._path)

    def _reload(self, path: Path) -> None:
        with self._lock:
            self._checked = time.monotonic()
            try:
                changed = _identity(path)
                if changed == self._changed:
                    return
                self._changed = changed
                self._read(_text(path), str(path))
                log.warning("read %s again: %d callers", path, len(self._tokens) + len(self._certificates))
            except InvalidInput as error:
                log.error("the previous tokens stay in use: %s", error)

    def _read(self, text: str, origin: str) -> None:
        tokens: list[tuple[bytes, Caller]] = []
        certificates: dict[str, Caller] = {}
        try:
            entries = json.loads(text)["callers"]
            for number, entry in enumerate(entries):
                _parse(entry, f"{origin}, caller {number}", tokens, certificates)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, InvalidInput):
                raise
            raise InvalidInput(
                f"{origin} is no list of callers: "
                'write {"callers": [{"name": ..., "token": ..., "stores": ...}]}'
            ) from error
        self._tokens, self._certificates = tokens, certificates
        self.changes += 1


def _parse(
    entry: Mapping[str, Any], where: str, tokens: list[tuple[bytes, Caller]], certificates: dict[str, Caller]
) -> None:
    unknown = set(entry) - _KEYS
    if unknown:
        raise InvalidInput(
            f"{where} has the unknown key '{min(unknown)}': there are {', '.join(sorted(_KEYS))}"
        )
    stores = entry.get("stores") or {}
    for store, role in stores.items():
        if role not in ROLES:
            raise InvalidInput(f"{where} has role '{role}' on store '{store}': there are {', '.join(ROLES)}")
    if not entry.get("name") or not stores:
        raise InvalidInput(f"{where} needs a name and stores")
    caller = Caller(str(entry["name"]), dict(stores))
    if "certificate" in entry:
        certificates[str(entry["certificate"])] = caller
    if "token" in entry:
        if len(str(entry["token"])) < 16:
            raise InvalidInput(
                f"{where} has a token of {len(str(entry['token']))} characters: take at least 16 random ones"
            )
        tokens.append((hashlib.sha256(str(entry["token"]).encode()).digest(), caller))
    if "sha256" in entry:
        try:
            digest = bytes.fromhex(entry["sha256"])
        except ValueError:
            digest = b""
        if len(digest) != 32:
            raise InvalidInput(f"{where} has a sha256 that is none: 64 hexadecimal digits")
        tokens.append((digest, caller))
    if not {"token", "sha256", "certificate"} & set(entry):
        raise InvalidInput(f"{where} has neither token, sha256 nor certificate")


def read_metadata(metadata: Iterable[tuple[str, str | bytes]]) -> tuple[str, str]:
    """Return `authorization` and `tagstore-store` from a call's metadata, or "" for what is not there."""
    authorization = store = ""
    for key, value in metadata:
        if key in ("authorization", "tagstore-store"):
            text = value if isinstance(value, str) else value.decode("utf-8", "replace")
            authorization, store = (text, store) if key == "authorization" else (authorization, text)
    return authorization, store


def _identity(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise InvalidInput(f"the file of tokens {path} cannot be read: {error.strerror}") from error
    return status.st_mtime_ns, status.st_ino


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"the file of tokens {path} cannot be read: {error}") from error
