"""Signatures by a key that is not in the bucket: who can only write there cannot say which bytes are the model.

HMAC-SHA256 over what is signed, as canonical JSON, and its kind. docs/security.md tells what is signed, and what not.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.documents import canonical_json
from training.errors import UntrustedError, UserError

VARIABLE = "UNBROKEN_SIGNING_KEY_FILE"
"""Names the file of keys, one a line. If it is not set, nothing is signed and nothing refused."""
MIN_KEY_CHARACTERS = 32
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True, kw_only=True)
class Keyring:
    """The keys of a file. The first one signs, all verify: a new one is put before those that it follows."""

    path: Path
    keys: tuple[bytes, ...] = field(repr=False)

    def sign(self, kind: str, content: Any) -> str:
        return _signature(self.keys[0], kind, content)

    def why_not(self, kind: str, content: Any, signature: object) -> str:
        """Why this is no signature of `content`; empty if it is one."""
        if not isinstance(signature, str):
            return "carries no signature"
        known = {_key_id(key): key for key in self.keys}
        key_id = signature.partition(":")[0]
        if key_id not in known:
            return f"is signed with key {key_id[:8]!r}, and {self.path} has {', '.join(map(repr, known))}"
        if hmac.compare_digest(_signature(known[key_id], kind, content).encode(), signature.encode()):
            return ""
        return "carries a signature of something else: it was changed, or put there in another's place"


def keyring() -> Keyring | None:
    """The keys of this process; None if it is given none. Read anew each time, so that keys may change.

    Raises `UserError` for a file that others may read, or that holds no keys.
    """
    if not os.environ.get(VARIABLE):
        return None
    path = Path(os.environ[VARIABLE])
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            keys = tuple(line.strip() for line in file.read(1 << 16).splitlines() if line.strip())
    except OSError as error:
        raise UserError(f"{VARIABLE} names {path}, which cannot be read: {error.strerror}") from error
    if mode & _OTHERS:
        raise UserError(f"{path}, which {VARIABLE} names, may be used by others than its owner: chmod 600 {path}")
    if not keys or min(map(len, keys)) < MIN_KEY_CHARACTERS:
        raise UserError(
            f"{path}, which {VARIABLE} names, must hold one key a line, each of at least {MIN_KEY_CHARACTERS}"
            f" characters: (umask 077; openssl rand -hex 32 > {path})"
        )
    return Keyring(path=path, keys=keys)


def sign(kind: str, content: Any) -> str | None:
    """By this process's key; None if it has none. `kind` keeps a signature from being one of another kind's."""
    maybe_keys = keyring()
    return maybe_keys.sign(kind, content) if maybe_keys is not None else None


def require_signed(kind: str, content: Any, signature: object, *, name: str, remedy: str) -> None:
    """Raises `UntrustedError` naming the object, if this process has keys and the signature is by none of them."""
    maybe_keys = keyring()
    why = maybe_keys.why_not(kind, content, signature) if maybe_keys is not None else ""
    if why:
        raise UntrustedError(f"{name} {why}. If you know who wrote it, {remedy}; if not, it may be forged")


def _signature(key: bytes, kind: str, content: Any) -> str:
    message = canonical_json({"kind": kind, "content": content})
    return f"{_key_id(key)}:{hmac.new(key, message, hashlib.sha256).hexdigest()}"


def _key_id(key: bytes) -> str:
    """Tells keys apart, and nothing of them: they are random."""
    return hashlib.sha256(b"unbroken signing key " + key).hexdigest()[:8]
