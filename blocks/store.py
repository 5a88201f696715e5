"""
Where results are kept: any file system fsspec can write to.

``<url>/<job>/``
    ``files/<stage>/<kind>/<path>``    what was published, names as ``_stored_name`` spells them
    ``manifest/<stage>.json``          what a stage published; written last, so without it nothing is there
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, Self, TypeVar
from urllib.parse import quote

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from blocks.limits import MIB

CHUNK: Final = MIB
PIECE: Final = MIB // 4
"""Handed to a reader at a time."""
WINDOW: Final = 16 * MIB
"""
Streamed from the store at a time, at most: one request of an object store, and the memory one download takes.

Not less for a single reader: some stores read the whole object to answer any part of it, for its ETag.
"""
ALL_WINDOWS: Final = 64 * MIB
"""About what all readers of this process together hold; with so many that it does not do, a piece each."""
SEEK_WINDOW: Final = 4 * MIB
PART: Final = 8 * MIB
"""Written at a time; S3 wants parts of 5 MiB at least and at most 10 000 of them."""
ATTEMPTS: Final = 3

T = TypeVar("T")

_JOB_ID = re.compile(r"[0-9a-f]{32}")
_OBJECT_STORES: Final = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"})
"""Schemes whose stores have no folders to make; asking them to costs a request and more rights."""


_readers: set[object] = set()


@contextmanager
def _reading() -> Iterator[Callable[[], int]]:
    """One reader more in this process. Tells what each of them may hold, in whole pieces."""
    reader = object()
    _readers.add(reader)
    try:
        yield lambda: PIECE * max(1, ALL_WINDOWS // PIECE // len(_readers))
    finally:
        _readers.discard(reader)


class StoreUnavailable(Exception):
    """The store did not do what was asked, after all tries. Says what, not where; safe to repeat later."""


class NotStored(LookupError):
    """There is no such file in the store."""


class Kind(StrEnum):
    """What a published file is, spelt as on the wire."""

    OUTPUT = "output"
    ALGORITHM_LOG = "algorithmLog"
    FILTERING_LOG = "filteringLog"
    # Last, as what only admins see: ocean.js and ocean.py ask for the nth of the results they are shown.
    CONFIGURATION_LOG = "configrationLog"
    PUBLISH_LOG = "publishLog"


_ORDER: Final = {kind: place for place, kind in enumerate(Kind)}


class ManifestFile(BaseModel):
    """One published file. *path* is what a consumer sees, *name* what the store knows it by; *size* in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    name: str
    size: int
    sha256: str
    type: str
    """Media type, found by content."""
    kind: Kind
    stage: int


class ManifestInput(BaseModel):
    """
    One file that an algorithm has read. *input* is the id of its data set, *position* its place there; *size* in bytes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: str
    position: int
    location: str = Field(default="", repr=False)
    """Where it is from: its file object, sealed; empty for what another stage has put out."""
    size: int
    sha256: str
    type: str | None = None
    """Media type, as its source says."""
    fetched: AwareDatetime
    """When the last byte was here, or when its source has said that what was here already is still the same."""
    source: str
    """``origin``, ``cache``, or ``stage <n>``."""
    stage: int
    """That has read it."""


class Manifest(BaseModel):
    """What is there to be had: of one stage as published, of a job as read; and what it was made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: tuple[ManifestFile, ...]
    inputs: tuple[ManifestInput, ...] = ()
    created: AwareDatetime
    version: Literal[1] = 1

    def ordered(self) -> tuple[ManifestFile, ...]:
        """In the order results are numbered: outputs by stage and path, the algorithm's logs, the other logs."""
        return tuple(sorted(self.files, key=lambda file: (_ORDER[file.kind], file.stage, file.path)))

    @classmethod
    def merged(cls, parts: Mapping[int, Self]) -> Self:
        """
        One manifest of a job's stages. Paths are ``<stage>/<path>`` once there is more than one.

        Not empty.
        """
        several = len(parts) > 1
        return cls(
            files=tuple(
                file.model_copy(update={"path": f"{stage}/{file.path}"}) if several else file
                for stage, part in sorted(parts.items())
                for file in part.files
            ),
            inputs=tuple(each for _, part in sorted(parts.items()) for each in part.inputs),
            created=max(part.created for part in parts.values()),
        )


@dataclass(frozen=True)
class Stored:
    """What arrived: bytes and checksum of what was sent, not of what was meant to be."""

    size: int
    sha256: str


@dataclass(frozen=True)
class ResultStore:
    """
    Results by job and name, under an fsspec *url*; *storage_options* go to its file system.

    A job id is 32 hex digits, a name a relative POSIX path; other ones are a ValueError, for they are checked
    long before. Every method may be repeated. Each raises StoreUnavailable when the store fails, after a few
    tries of its own beside those of the file system; its text has neither URL nor credentials nor content.
    """

    url: str
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)

    def put_file(self, job_id: str, name: str, path: Path) -> Stored:
        with path.open("rb") as source:
            return self.put_stream(job_id, name, source)

    def put_bytes(self, job_id: str, name: str, content: bytes) -> Stored:
        return self.put_stream(job_id, name, io.BytesIO(content))

    def put_stream(self, job_id: str, name: str, source: BinaryIO) -> Stored:
        """Store a seekable stream from its beginning, in constant memory. Not atomic: the manifest is."""
        place = self._place(job_id, name)

        def put(fs: Any, root: str) -> Stored:
            path = f"{root}/{place}"
            _make_parent(fs, path)
            source.seek(0)
            digest, size = hashlib.sha256(), 0
            with fs.open(path, "wb", block_size=PART) as target:
                while chunk := source.read(CHUNK):
                    digest.update(chunk)
                    size += len(chunk)
                    target.write(chunk)
            return Stored(size, digest.hexdigest())

        return self._do("a file could not be written", put, reading=False)

    def read_bytes(self, job_id: str, name: str) -> bytes:
        """The whole file. Raises: NotStored."""
        place = self._place(job_id, name)
        content: bytes = self._do("a file could not be read", lambda fs, root: fs.cat_file(f"{root}/{place}"))
        return content

    def size(self, job_id: str, name: str) -> int:
        """Bytes of a file. Raises: NotStored."""
        place = self._place(job_id, name)

        def size(fs: Any, root: str) -> int:
            # info, not size or exists: those answer "no" to a store that is down.
            info = fs.info(f"{root}/{place}")
            if info["type"] != "file":
                raise FileNotFoundError
            return int(info["size"])

        return self._do("a file could not be looked up", size)

    def exists(self, job_id: str, name: str) -> bool:
        try:
            self.size(job_id, name)
        except NotStored:
            return False
        return True

    def open(self, job_id: str, name: str) -> BinaryIO:
        """A file to read and seek in, never in memory as a whole. Raises: NotStored."""
        window = _Window(self, self._place(job_id, name), self.size(job_id, name))
        return io.BufferedReader(window, SEEK_WINDOW)

    def stream(self, job_id: str, name: str, start: int = 0, end: int | None = None) -> Generator[bytes, None, None]:
        """
        Bytes from *start* up to, not including, *end* (the end of the file if None), in pieces of 256 KiB. What is held
        of the file is more only for who reads on, and less the more are reading in this process.

        Raises:
            NotStored: At the call, not at the first piece.
            StoreUnavailable: Also between pieces.
        """
        place, size = self._place(job_id, name), self.size(job_id, name)
        return self._pieces(place, max(0, start), size if end is None else min(end, size))

    def _pieces(self, place: str, start: int, end: int) -> Generator[bytes, None, None]:
        at, size = start, PIECE
        with _reading() as share:
            while at < end:
                window = self._range(place, at, min(at + size, end))
                at += len(window)
                for offset in range(0, len(window), PIECE):
                    yield window[offset : offset + PIECE]
                del window  # else it is held beside the next one
                size = min(2 * size, WINDOW, share())

    def link(self, job_id: str, name: str, seconds: int, *, disposition: str, media_type: str) -> str | None:
        """
        A URL by which whoever has it can get a file from the store itself, for so many *seconds*, under the headers
        Content-Disposition and Content-Type that are given. None if stores of this kind make no such URLs; whether the
        file is there is not asked.
        """
        if not _is_s3(self.url):
            return None
        place = self._place(job_id, name)
        headers = {"ResponseContentDisposition": disposition, "ResponseContentType": media_type}
        return str(
            self._do("a link could not be made", lambda fs, root: fs.url(f"{root}/{place}", expires=seconds, **headers))
        )

    def _range(self, place: str, start: int, end: int) -> bytes:
        """Bytes from *start* up to *end*, both within the file, each time by a request that can be repeated."""
        failure = "a file could not be read"
        content: bytes = self._do(failure, lambda fs, root: fs.cat_file(f"{root}/{place}", start=start, end=end))
        if len(content) != end - start:
            raise StoreUnavailable(f"{failure}: it is shorter than it was")
        return content

    def delete_job(self, job_id: str) -> None:
        """Delete everything of a job; its manifests go first. Nothing to delete is no error."""
        job = self._job(job_id)

        def delete(fs: Any, root: str) -> None:
            for folder in (f"{root}/{job}/manifest", f"{root}/{job}"):
                try:
                    fs.rm(folder, recursive=True)
                except FileNotFoundError:
                    continue

        self._do("a job could not be deleted", delete)

    def stages(self, job_id: str) -> frozenset[int]:
        """Stages of a job that have published."""
        folder = f"{self._job(job_id)}/manifest"
        try:
            paths = self._do("a manifest could not be read", lambda fs, root: fs.ls(f"{root}/{folder}", detail=False))
        except NotStored:
            return frozenset()
        return frozenset(stage for path in paths if (stage := _stage_of(path)) is not None)

    def retract(self, job_id: str, keep: Collection[int]) -> None:
        """Delete what the stages of a job have published but those in *keep*; their manifests go first."""
        if not keep:
            self.delete_job(job_id)
            return
        self._delete_stages(job_id, lambda stage: stage not in keep)

    def withdraw(self, job_id: str, stages: Collection[int]) -> None:
        """
        Delete what these stages of a job have published, and touch nothing of the others, which may be publishing at
        this moment. Their manifests go first.
        """
        self._delete_stages(job_id, lambda stage: stage in stages)

    def _delete_stages(self, job_id: str, unwanted: Callable[[int], bool]) -> None:
        job = self._job(job_id)

        def retract(fs: Any, root: str) -> None:
            for folder in ("manifest", "files"):
                with suppress(FileNotFoundError):
                    for path in fs.ls(f"{root}/{job}/{folder}", detail=False):
                        name = path.rstrip("/").rpartition("/")[2].removesuffix(".json")
                        # Files whose names had to be hashed stay: no name tells their stage, and no manifest them.
                        if name.isdecimal() and unwanted(int(name)):
                            fs.rm(path, recursive=True)

        self._do("results of an earlier try could not be deleted", retract)

    def publish_manifest(self, job_id: str, stage: int, part: Manifest) -> None:
        """
        Make what a stage has stored visible, at once or not at all; a repeat replaces the stage's part.

        Atomic in a local folder and in object stores.
        """
        place = f"{self._job(job_id)}/manifest/{int(stage)}.json"
        text = part.model_dump_json().encode()

        def publish(fs: Any, root: str) -> None:
            path = f"{root}/{place}"
            _make_parent(fs, path)
            if isinstance(fs, LocalFileSystem):
                _replace(Path(path), text)
            else:
                fs.pipe_file(path, text)

        self._do("a manifest could not be written", publish, reading=False)

    def manifest(self, job_id: str) -> Manifest | None:
        """What the stages of a job have published so far; None if none has."""
        parts = self.parts(job_id)
        return Manifest.merged(parts) if parts else None

    def parts(self, job_id: str) -> dict[int, Manifest]:
        """What each stage of a job has published so far, of those that have."""
        folder = f"{self._job(job_id)}/manifest"

        def read(fs: Any, root: str) -> dict[int, bytes]:
            parts = {}
            for path in fs.ls(f"{root}/{folder}", detail=False):
                if (stage := _stage_of(path)) is not None:
                    parts[stage] = fs.cat_file(path)
            return parts

        try:
            texts = self._do("a manifest could not be read", read)
        except NotStored:
            return {}
        return {stage: _parsed(text) for stage, text in texts.items()}

    def part(self, job_id: str, stage: int) -> Manifest:
        """What one stage of a job has published. Raises: NotStored."""
        place = f"{self._job(job_id)}/manifest/{int(stage)}.json"
        return _parsed(self._do("a manifest could not be read", lambda fs, root: fs.cat_file(f"{root}/{place}")))

    def jobs(self) -> Iterator[str]:
        """Every job with anything in the store, published or not, in no order."""
        try:
            paths = self._do("the jobs could not be listed", lambda fs, root: fs.ls(root, detail=False))
        except NotStored:
            return
        for path in paths:
            name = path.rstrip("/").rpartition("/")[2]
            if _JOB_ID.fullmatch(name):
                yield name

    def _job(self, job_id: str) -> str:
        if not _JOB_ID.fullmatch(job_id):
            raise ValueError("not a job id")
        return job_id

    def _place(self, job_id: str, name: str) -> str:
        return f"{self._job(job_id)}/files/{_stored_name(name)}"

    def _do(self, failure: str, action: Callable[[Any, str], T], *, reading: bool = True) -> T:
        """
        Call *action* with the file system and the root in it; its errors come out as words without context.

        What is not found is NotStored when *reading*; when writing it is the store itself, a bucket say.
        """
        missing = False
        cause = ""
        try:
            # Not kept: fsspec keeps its instances itself, and knows when the process has forked.
            # No listings cache: other processes write here too.
            options = _options(self.url, self.storage_options)
            fs, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False, **options)
            retrying = Retrying(
                stop=stop_after_attempt(ATTEMPTS),
                wait=wait_exponential_jitter(multiplier=0.2, max=2, jitter=0.2),
                retry=retry_if_exception(_is_transient),
                reraise=True,
            )
            return retrying(action, fs, root.rstrip("/"))
        except FileNotFoundError:
            missing = True
            cause = "the place of the results does not exist"
        except PermissionError:
            cause = "access is denied"
        # All of them: an error of the file system's library quotes the URL, and with it the bucket.
        except Exception as error:
            cause = type(error).__name__
        if missing and reading:
            raise NotStored("not in the store")
        raise StoreUnavailable(f"{failure}: {cause}")


class _Window(io.RawIOBase):
    """A stored file, read by ranges."""

    def __init__(self, store: ResultStore, place: str, size: int) -> None:
        super().__init__()
        self._store = store
        self._place = place
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, origin + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        got = self._store._range(self._place, self._at, end)
        buffer[: len(got)] = got
        self._at += len(got)
        return len(got)


def _parsed(text: bytes) -> Manifest:
    try:
        return Manifest.model_validate_json(text)
    except ValidationError:
        damaged = StoreUnavailable("a manifest could not be read: it is damaged")
    raise damaged


def _stage_of(path: str) -> int | None:
    """The stage whose part of a manifest *path* is; None for what else may lie there."""
    found = re.fullmatch(r"(\d+)\.json", path.rstrip("/").rpartition("/")[2])
    return int(found[1]) if found else None


def _is_s3(url: str) -> bool:
    return url.startswith(("s3://", "s3a://"))


def _options(url: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The operator's options, over those without which a kind of store does not serve."""
    if not _is_s3(url):
        return dict(given)
    config = {
        # By default botocore checks every answer against a checksum only Amazon leaves out of ranged ones; rclone
        # and others send that of the whole object. Results have a checksum of their own, in the manifest.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        # s3fs tries five times around botocore's five: a store that is down took a quarter of a minute to say so.
        "retries": {"total_max_attempts": 2},
        # For links only; Amazon's newer regions, and most other stores, take no older ones.
        "signature_version": "s3v4",
        "connect_timeout": 10,
        **given.get("config_kwargs", {}),
    }
    return {**given, "config_kwargs": config}


def _is_transient(error: BaseException) -> bool:
    """Failures of the way there. What the store itself decided stands."""
    decided = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
    return isinstance(error, OSError | TimeoutError) and not isinstance(error, decided)


def _make_parent(fs: Any, path: str) -> None:
    schemes = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if not schemes & _OBJECT_STORES:
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)


def _replace(path: Path, content: bytes) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _stored_name(name: str) -> str:
    """
    A relative POSIX path in characters every store takes, different for different paths.

    ``=`` escapes, as in quoted-printable (``a b`` is ``a=20b``): ``%`` is decoded once too often by stores that
    speak HTTP. What gets longer than a file name or a key may be, is replaced by its checksum.
    """
    parts = name.split("/")
    if "\0" in name or any(part in {"", ".", ".."} for part in parts):
        raise ValueError("the name of a result is a relative path")
    stored = "/".join(map(_escaped, parts))
    return stored if len(stored) <= 800 else _hashed(name)


def _escaped(part: str) -> str:
    escaped = quote(part, safe="").replace("%", "=")
    return escaped if len(escaped) <= 200 else _hashed(part)


def _hashed(text: str) -> str:
    # "=h" is never the beginning of an escaped name: = is followed by a hexadecimal digit there.
    return f"=h{hashlib.sha256(text.encode()).hexdigest()}"
