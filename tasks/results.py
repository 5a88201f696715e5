"""
What leaves the house: the filter over an algorithm's outputs, and their publication.

Outputs are the algorithm's: names, links, types and sizes are whatever it liked. Nothing here follows a link.
"""

from __future__ import annotations

import codecs
import csv
import os
import re
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import partial
from io import BufferedReader
from pathlib import Path
from threading import Event
from typing import BinaryIO, Final, cast

import puremagic
from pydantic import BaseModel, ConfigDict
from pydantic_core import from_json

from blocks.limits import MIB, FilterLimits
from blocks.store import Kind, Manifest, ManifestFile, ManifestInput, ResultStore, StoreUnavailable
from tasks.stopping import NEVER, Stoppable, go_on

LONGEST_PATH: Final = 900
"""Bytes of a relative path; object stores take keys of 1024."""
LONGEST_NAME: Final = 255
NAMED: Final = 100
"""Refused files named in a report, by rule; the rest are counted."""
UPLOADS: Final = 4
HEAD: Final = 64 * 1024
LONGEST_JSON: Final = 4 * MIB

_UNSAFE_NAME = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_BINARY = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")


class Rule(StrEnum):
    """Why a file does not leave."""

    LINK = "link"
    SPECIAL = "special"
    NAME = "name"
    COUNT = "count"
    SIZE = "size"
    TOTAL = "total"
    TYPE = "type"


LEFT_BEHIND: Final = frozenset({Rule.LINK, Rule.SPECIAL, Rule.NAME})
"""Rules under which one file stays and the job goes on. The others withhold all outputs."""


class OutputFile(BaseModel):
    """A file that may leave. *path* is relative and POSIX, *size* in bytes, *media_type* found by content."""

    model_config = ConfigDict(frozen=True)

    path: str
    size: int
    media_type: str


class Refused(BaseModel):
    """A file that may not. *path* is escaped where it could not be printed; empty where many are meant."""

    model_config = ConfigDict(frozen=True)

    path: str
    rule: Rule
    message: str


class FilterReport(BaseModel):
    """What the filter found, in the order of paths."""

    model_config = ConfigDict(frozen=True)

    allowed: tuple[OutputFile, ...] = ()
    refused: tuple[Refused, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the allowed files may leave. False withholds them all."""
        return not self.withholding

    @property
    def withholding(self) -> tuple[Refused, ...]:
        """The refusals because of which no output leaves at all."""
        return tuple(refused for refused in self.refused if refused.rule not in LEFT_BEHIND)

    def __str__(self) -> str:
        """A line per file and one verdict."""
        lines = [f"allowed: {file.path}: {file.size} bytes, {file.media_type}" for file in self.allowed]
        lines += [f"refused: {file.path or '-'}: {file.rule}: {file.message}" for file in self.refused]
        lines.append("passed" if self.passed else "withheld: no output leaves")
        return "\n".join(lines) + "\n"


class PublishFailed(Exception):
    """The store did not take a stage's results. Nothing of the stage is visible there."""


@dataclass(frozen=True)
class _Found:
    """What stands under a name, itself, not what it points to. *path* may hold surrogates."""

    path: str
    status: os.stat_result

    @property
    def is_regular(self) -> bool:
        return stat.S_ISREG(self.status.st_mode)

    @property
    def inode(self) -> tuple[int, int]:
        return self.status.st_dev, self.status.st_ino


def filter_outputs(outputs: Path, logs: Iterable[Path], limits: FilterLimits, *, stop: Event = NEVER) -> FilterReport:
    """
    Decide which files under *outputs* may leave, and cut each of *logs* to ``log_bytes``.

    Links, special files and names no other machine would take are left behind and named. More files, bytes or
    other types than *limits* allow withhold everything. Pure but for the logs; safe to repeat.

    Raises:
        Stopped: *stop* was set, from any thread.
    """
    for log in logs:
        cut_log(log, limits.log_bytes)
    # Ten entries for each file allowed: folders and links count too, and there is no end to them otherwise.
    entries, complete = _entries(outputs, 10 * limits.files, stop)
    refused = _Refusals()
    if not complete:
        refused.add("", Rule.COUNT, f"more than {10 * limits.files} files and folders")
        return FilterReport(refused=refused.listed())
    names = Counter(entry.inode for entry in entries)
    candidates = []
    for entry in entries:
        if objection := _objection(entry, names[entry.inode]):
            refused.add(entry.path, *objection)
        else:
            candidates.append(entry)
    if len(candidates) > limits.files:
        refused.add("", Rule.COUNT, f"{len(candidates)} files, {limits.files} are allowed")
        return FilterReport(refused=refused.listed())
    total = sum(entry.status.st_size for entry in candidates)
    if total > limits.total_bytes:
        refused.add("", Rule.TOTAL, f"{total} bytes in all, {limits.total_bytes} are allowed")
    allowed = []
    for entry in candidates:
        size = entry.status.st_size
        if size > limits.file_bytes:
            refused.add(entry.path, Rule.SIZE, f"{size} bytes, {limits.file_bytes} are allowed")
            continue
        with open_regular(outputs, entry.path) as file:
            found = media_type(cast(BinaryIO, Stoppable(file, stop)))
        if limits.types and not any(fnmatchcase(found, pattern) for pattern in limits.types):
            refused.add(entry.path, Rule.TYPE, f"{found} is not among the types allowed")
        else:
            allowed.append(OutputFile(path=entry.path, size=size, media_type=found))
    return FilterReport(allowed=tuple(allowed), refused=refused.listed())


class _Refusals:
    """Refusals, of which each rule names only so many: an algorithm can make links without end."""

    def __init__(self) -> None:
        self._listed: list[Refused] = []
        self._count: Counter[Rule] = Counter()

    def add(self, path: str, rule: Rule, message: str) -> None:
        self._count[rule] += 1
        if self._count[rule] <= NAMED:
            self._listed.append(Refused(path=_printable(path), rule=rule, message=message))

    def listed(self) -> tuple[Refused, ...]:
        more = [
            Refused(path="", rule=rule, message=f"{count - NAMED} more")
            for rule, count in self._count.items()
            if count > NAMED
        ]
        return tuple(sorted(self._listed, key=lambda refused: refused.path) + more)


def _printable(path: str) -> str:
    text = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return _UNSAFE_NAME.sub(lambda found: f"\\x{ord(found[0]):02x}", text)[:LONGEST_PATH]


def _objection(entry: _Found, names_inside: int) -> tuple[Rule, str] | None:
    if stat.S_ISLNK(entry.status.st_mode):
        return Rule.LINK, "a symbolic link"
    if stat.S_ISDIR(entry.status.st_mode):
        return Rule.NAME, f"a folder nested deeper than {LONGEST_PATH} bytes of path, with all that is in it"
    if not entry.is_regular:
        return Rule.SPECIAL, "neither a file nor a folder"
    if entry.status.st_nlink > names_inside:
        return Rule.LINK, "a hard link to a file outside the outputs"
    if problem := _name_problem(entry.path):
        return Rule.NAME, problem
    return None


def _name_problem(path: str) -> str | None:
    try:
        parts = path.encode().split(b"/")
    except UnicodeEncodeError:
        return "a name that is not UTF-8"
    if _UNSAFE_NAME.search(path):
        return "a name with control characters"
    if any(len(part) > LONGEST_NAME for part in parts):
        return f"a name of more than {LONGEST_NAME} bytes"
    if len(path.encode()) > LONGEST_PATH:
        return f"a path of more than {LONGEST_PATH} bytes"
    return None


def regular_files(root: Path) -> Iterator[str]:
    """Relative POSIX paths of the regular files under *root*, sorted; links are neither listed nor followed."""
    entries, _ = _entries(root, None, NEVER)
    return (entry.path for entry in entries if entry.is_regular)


def _entries(root: Path, most: int | None, stop: Event) -> tuple[list[_Found], bool]:
    """
    Everything under *root* but folders, sorted by path, and whether that is all; stops after *most* entries.

    A folder too deep to be published is not entered and listed itself.
    """
    found: list[_Found] = []
    folders = [""]
    seen = 0
    while folders:
        folder = folders.pop()
        with os.scandir(root / folder) as entries:
            for entry in entries:
                go_on(stop)
                seen += 1
                if most is not None and seen > most:
                    return found, False
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir(follow_symlinks=False) and len(os.fsencode(path)) <= LONGEST_PATH:
                    folders.append(path)
                else:
                    # Not the entry's own stat: on Windows it lacks what is asked for here, and it may be old.
                    found.append(_Found(path, os.lstat(root / path)))
    return sorted(found, key=lambda each: each.path), True


def open_regular(root: Path, path: str) -> BufferedReader:
    """
    Open a regular file under *root* for reading, following no link on the way.

    Raises:
        OSError: There is none, or a link stands in its place or in that of a folder.
    """
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        *parents, name = path.split("/")
        for parent in parents:
            inner = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            os.close(folder)
            folder = inner
        # Not blocking: a pipe in the file's place would wait for a writer.
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError("not a regular file")
    return os.fdopen(file, "rb")


def cut_log(path: Path, limit: int) -> None:
    """
    Keep the last *limit* bytes of a log, a notice in front; a log that fits, or that is not there, stays as it is.

    The end is kept because that is where a failure shows.
    """
    if not path.is_file() or path.is_symlink():
        return
    size = path.stat().st_size
    if size <= limit:
        return
    notice = f"[the first part of this log was cut: {size} bytes, {limit} are kept]\n".encode()[:limit]
    part = path.with_name(f"{path.name}.part")
    with path.open("rb") as log, part.open("wb") as cut:
        cut.write(notice)
        log.seek(size - (limit - len(notice)))
        # Up to the next line, lest the first one begin in the middle of a character; not in a log without lines.
        if b"\n" not in log.readline(4096):
            log.seek(size - (limit - len(notice)))
        shutil.copyfileobj(log, cut)
    part.replace(path)


# What puremagic does not know or calls by a name that says too much. The first that fits.
_SIGNATURES: Final[tuple[tuple[bytes, str], ...]] = (
    (b"\x7fELF", "application/x-executable"),
    (b"MZ", "application/x-executable"),
    (b"\xfe\xed\xfa\xce", "application/x-executable"),
    (b"\xfe\xed\xfa\xcf", "application/x-executable"),
    (b"\xce\xfa\xed\xfe", "application/x-executable"),
    (b"\xcf\xfa\xed\xfe", "application/x-executable"),
    (b"\xca\xfe\xba\xbe", "application/x-executable"),
    (b"\x00asm", "application/wasm"),
    (b"#!", "text/x-script"),
    (b"PAR1", "application/vnd.apache.parquet"),
    (b"ARROW1\0\0", "application/vnd.apache.arrow.file"),
    (b"\x93NUMPY", "application/x-npy"),
    (b"\x89HDF\r\n\x1a\n", "application/x-hdf5"),
    (b"SQLite format 3\0", "application/vnd.sqlite3"),
    (b"PK\x03\x04", "application/zip"),
    (b"PK\x05\x06", "application/zip"),
    (b"\x1f\x8b", "application/gzip"),
    (b"\x80\x02", "application/x-python-pickle"),
    (b"\x80\x03", "application/x-python-pickle"),
    (b"\x80\x04", "application/x-python-pickle"),
    (b"\x80\x05", "application/x-python-pickle"),
)


def media_type(file: BinaryIO) -> str:
    """
    The type of a file by its content alone; its name counts for nothing.

    All of a text is looked at, so what is called ``text/…`` or JSON is text to its end. Of other formats the
    beginning is: whoever wants to hide bytes behind a picture's header can.
    """
    head = file.read(HEAD)
    if not head:
        return "application/x-empty"
    for signature, known in _SIGNATURES:
        if head.startswith(signature) and (signature != b"MZ" or b"\0" in head):
            return known
    file.seek(0)
    if _is_text(file):
        return _text_type(head, file)
    try:
        matches = puremagic.magic_string(head)
    except puremagic.PureError:
        matches = []
    # Below 0.3 puremagic has seen one or two bytes. A text format in what is no text is such an accident too.
    names = [match.mime_type for match in matches if match.confidence >= 0.3 and match.mime_type]
    return next((str(name) for name in names if not name.startswith("text/")), "application/octet-stream")


def _is_text(file: BinaryIO) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for chunk in iter(partial(file.read, MIB), b""):
            if _BINARY.search(chunk):
                return False
            decoder.decode(chunk)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _text_type(head: bytes, file: BinaryIO) -> str:
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()
    lowered = start[:64].lower()
    if start.startswith((b"{", b"[")):
        return _json_type(head, file)
    if lowered.startswith((b"<!doctype html", b"<html")):
        return "text/html"
    if lowered.startswith(b"<?xml"):
        return "image/svg+xml" if b"<svg" in head else "application/xml"
    if lowered.startswith(b"<svg"):
        return "image/svg+xml"
    if lowered.startswith(b"%pdf"):
        return "application/pdf"
    return _table_type(head) or "text/plain"


def _json_type(head: bytes, file: BinaryIO) -> str:
    """JSON, lines of JSON, or mere text. What is too long to parse is judged by its two ends."""
    first, newline, rest = head.strip().partition(b"\n")
    if newline and rest and _parses(first):
        return "application/x-ndjson"
    size = file.seek(0, os.SEEK_END)
    if size <= LONGEST_JSON:
        file.seek(0)
        return "application/json" if _parses(file.read()) else "text/plain"
    file.seek(size - 64)
    closing = {b"{": b"}", b"[": b"]"}[first.removeprefix(codecs.BOM_UTF8).lstrip()[:1]]
    return "application/json" if file.read().rstrip().endswith(closing) else "text/plain"


def _parses(text: bytes) -> bool:
    try:
        # Its depth has a bound of its own. That of json is the recursion limit, which other packages raise until a
        # hundred thousand brackets end the process.
        from_json(text.removeprefix(codecs.BOM_UTF8), cache_strings=False)
    except ValueError:
        return False
    return True


def _table_type(head: bytes) -> str | None:
    """The kind of table: at least two rows, each with the same number of columns, and more than one of them."""
    lines = head.decode("utf-8-sig", "ignore").splitlines(keepends=True)
    if len(head) == HEAD:
        lines.pop()
    for delimiter, name in ((",", "text/csv"), (";", "text/csv"), ("\t", "text/tab-separated-values")):
        try:
            widths = [len(row) for row in csv.reader(lines, delimiter=delimiter) if row]
        except csv.Error:
            continue
        if len(widths) > 1 and set(widths) == {max(widths[0], 2)}:
            return name
    return None


def publish_outputs(
    store: ResultStore,
    job_id: str,
    stage: int,
    outputs: Path,
    report: FilterReport,
    *,
    logs: Mapping[Kind, Path],
    publish_output: bool,
    publish_algorithm_log: bool,
    inputs: Sequence[ManifestInput] = (),
    stop: Event = NEVER,
    before_it_shows: Callable[[], None] = lambda: None,
) -> Manifest:
    """
    Store what a stage may show, a few files at a time, then its manifest, which makes it visible.

    Outputs leave if *publish_output* and the report passed; the algorithm's log if *publish_algorithm_log*; the
    other logs always. A log that is not there is left out. The publish log is written here, to the path *logs*
    has for it. *inputs* are told in the manifest. May be repeated: names are the same, and the manifest is replaced.

    Returns:
        The stage's part of the job's manifest, as stored.

    *before_it_shows* is called when all but the manifest is there; what it raises keeps that back.

    Raises:
        PublishFailed: The store failed, or an output is not what it was when it was filtered.
        Stopped: *stop* was set, from any thread, before the manifest was there. What the store is at is still waited
            for.
    """
    chosen = report.allowed if publish_output and report.passed else ()
    send = partial(_send, store, job_id, stage, stop=stop)

    def send_output(numbered: tuple[int, OutputFile]) -> ManifestFile:
        number, output = numbered
        try:
            with open_regular(outputs, output.path) as file:
                return send(file, Kind.OUTPUT, path=output.path, media_type=output.media_type)
        except StoreUnavailable as error:
            go_on(stop)
            cause = str(error)
        except OSError:
            cause = "it cannot be read any more"
        raise PublishFailed(f"output {number} of {len(chosen)}: {cause}")

    def send_log(kind: Kind, path: Path) -> ManifestFile:
        with path.open("rb") as file:
            return send(file, kind, path=path.name, media_type="text/plain")

    pool = ThreadPoolExecutor(UPLOADS, thread_name_prefix="publish")
    try:
        files = list(pool.map(send_output, enumerate(chosen, start=1)))
    finally:
        # After a failure, those not begun would only keep the job waiting.
        pool.shutdown(cancel_futures=True)
    if any(file.size != output.size for output, file in zip(chosen, files, strict=True)):
        raise PublishFailed("an output has changed since it was filtered")
    failure = None
    try:
        for kind, path in logs.items():
            wanted = publish_algorithm_log or kind is not Kind.ALGORITHM_LOG
            if wanted and kind is not Kind.PUBLISH_LOG and path.is_file():
                files.append(send_log(kind, path))
        if Kind.PUBLISH_LOG in logs:
            logs[Kind.PUBLISH_LOG].write_text(_publish_log(files), encoding="utf-8")
            files.append(send_log(Kind.PUBLISH_LOG, logs[Kind.PUBLISH_LOG]))
        part = Manifest(files=tuple(files), inputs=tuple(inputs), created=datetime.now(UTC))
        go_on(stop)
        before_it_shows()
        store.publish_manifest(job_id, stage, part)
    except StoreUnavailable as error:
        go_on(stop)
        failure = str(error)
    if failure is not None:
        raise PublishFailed(f"logs and manifest: {failure}")
    return part


def _publish_log(files: Iterable[ManifestFile]) -> str:
    return "".join(
        f"{file.kind}: {file.path}: {file.size} bytes, {file.type}, sha256 {file.sha256}\n" for file in files
    )


def _send(
    store: ResultStore, job_id: str, stage: int, file: BinaryIO, kind: Kind, *, path: str, media_type: str, stop: Event
) -> ManifestFile:
    go_on(stop)
    # The kind is part of the name: an output may be called like a log.
    name = f"{stage}/{kind}/{path}"
    # What it raises then is to the store an error like any other, and the caller knows better.
    stored = store.put_stream(job_id, name, cast(BinaryIO, Stoppable(file, stop)))
    return ManifestFile(
        path=path,
        name=name,
        size=stored.size,
        sha256=stored.sha256,
        type=media_type,
        kind=kind,
        stage=stage,
    )
