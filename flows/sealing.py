"""
A document is sealed before Prefect sees it and opened in the flow: URLs, code, credentials and user data are
their owners' secrets and must not be readable in a database, a log or the UI.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from cryptography.fernet import Fernet, InvalidToken, MultiFernet


class CannotUnseal(Exception):
    """The document was sealed with another key, or altered. A fault of the set-up, never of the job."""


def create_key_file(path: Path) -> None:
    """Make the service's key, readable by its user alone; an existing file stays as it is. Safe to repeat."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if path.exists():
        return
    # Linked into place when it is whole: whoever starts at the same moment finds no file or one with a key in it.
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # 0600
    whole = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(Fernet.generate_key() + b"\n")
        with suppress(FileExistsError):
            path.hardlink_to(whole)
    finally:
        whole.unlink()


class Seal:
    """Seals with the first key of a key file (one a line) and opens with any: keys can be rotated."""

    def __init__(self, keys: list[bytes]) -> None:
        self._fernet = MultiFernet([Fernet(key) for key in keys])
        self._fingerprint_key = hashlib.sha256(b"fingerprint" + keys[-1]).digest()

    @classmethod
    def from_file(cls, path: Path) -> Seal:
        return cls(path.read_bytes().split())

    def close(self, document: Any) -> str:
        """*document* (JSON) as text that tells nothing but its rough length."""
        return self._fernet.encrypt(zlib.compress(json.dumps(document).encode(), 6)).decode("ascii")

    def open(self, sealed: str) -> Any:
        """Raises CannotUnseal."""
        try:
            return json.loads(zlib.decompress(self._fernet.decrypt(sealed.encode("ascii"))))
        except (InvalidToken, zlib.error, ValueError):
            raise CannotUnseal(
                "the document was sealed with another key than this worker has; give both one C2D_KEY_FILE"
            ) from None

    def fingerprint(self, content: bytes) -> str:
        """
        64 hex digits that are the same for the same *content* and tell nothing of it without the key: a plain
        hash of a short document could be found by trying. The oldest key makes it, so that a new key in front
        changes no fingerprint.
        """
        return hmac.new(self._fingerprint_key, content, hashlib.sha256).hexdigest()
