"""Links to results: signed, expiring, and good for exactly one file of one job."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final
from urllib.parse import quote

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from itsdangerous import BadData, SignatureExpired, URLSafeTimedSerializer

from flows.errors import LinkExpired, NoSuchResult
from flows.jobs import Job, Result

PREFIX: Final = "/api/results"
_PURPOSE: Final = b"result links"
_FERNET_KEY_CHARACTERS: Final = 44


class Links:
    """Makes links that hold for *seconds*, with a key derived from the service's own for this purpose alone."""

    def __init__(self, key_file: Path, seconds: int) -> None:
        self._seconds = seconds
        self._serializer = URLSafeTimedSerializer(
            derived_keys(key_file, _PURPOSE), salt=_PURPOSE, signer_kwargs={"digest_method": hashlib.sha256}
        )

    def path(self, job: Job, index: int) -> str:
        """The name at the end is for people and their download folders; it decides nothing."""
        result = job.results[index]
        name = quote(result.filename.rpartition("/")[2], safe="", errors="replace")
        return f"{PREFIX}/{self._serializer.dumps([job.id, index, _mark(result)])}/{name}"

    def resolve(self, token: str) -> tuple[str, int, str]:
        """
        Job and index a link stands for, and the mark of the file it was made for: a job that is started again may
        have another one in its place, which is not for whoever holds the link.

        Raises:
            LinkExpired, NoSuchResult: The latter for what this service has not signed.
        """
        try:
            job_id, index, mark = self._serializer.loads(token, max_age=self._seconds)
        except SignatureExpired:
            raise LinkExpired from None
        except BadData:
            raise NoSuchResult("There is no such link") from None
        return job_id, index, mark

    def holds(self, job: Job, index: int, mark: str) -> bool:
        """Whether the result *index* of *job* is the file a link with this *mark* was made for."""
        return index < len(job.results) and _mark(job.results[index]) == mark


def _mark(result: Result) -> str:
    """16 hex digits, which tell one file from another."""
    said = f"{result.kind} {result.filename} {result.sha256}"
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def derived_keys(key_file: Path, purpose: bytes) -> list[bytes]:
    """Keys for *purpose* alone, out of the service's own; itsdangerous signs with the last and accepts all."""
    keys = key_file.read_bytes().split()
    if not keys or any(len(key) < _FERNET_KEY_CHARACTERS for key in keys):
        raise ValueError(f"{key_file} must hold the service's keys, one a line, of 32 bytes each in base64")
    # The key file has the newest first.
    return [HKDF(algorithm=SHA256(), length=32, salt=None, info=purpose).derive(key) for key in reversed(keys)]
