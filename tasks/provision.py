"""
Bring the data sets, the algorithm and its parameters into a stage's folder.

Where a data set's files are is its owner's secret. Nothing here puts any of it into a message, a repr or a log: what
went wrong is said by position, in the words of ``blocks.remote``, and raised without a context.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from io import BufferedReader
from pathlib import Path
from threading import Event
from typing import Any, Final

from blocks.assets import RemoteAsset, folder_name
from blocks.files import FileObject, UrlFile
from blocks.limits import FetchLimits
from blocks.provider import AssetFile, FoundAsset, Providers, providers
from blocks.remote import CHUNK, Access, Remotes, Stream, Unreachable, pause, remotes
from blocks.runner import Progress
from tasks.download import Download, Ledger
from tasks.results import open_regular, regular_files
from tasks.stopping import NEVER, go_on
from tasks.workspace import Workspace

BEGUN_AT_ONCE: Final = 16
STOP_TICK: Final = 0.25
"""Seconds between two looks at whether to stop."""

OnFound = Callable[[str, Mapping[str, Any]], None]
"""Called with the id of an input and its asset's document."""

ORIGIN: Final = "origin"
CACHE: Final = "cache"
"""Of ``FetchedFile.source``."""

Sealer = Callable[[Any], str]
"""Makes of JSON a text that only this service can read."""

_NOTHING_CONFIGURED: Final = Access()


class InputUnreachable(Exception):
    """A data set could not be fetched. Names it by position, never by where it is."""


class AlgorithmUnreachable(Exception):
    """The algorithm could not be fetched. Never says where it is."""


@dataclass(frozen=True)
class InputSource:
    """One input of a stage: *files*, or an asset to be looked up. *index* is its place in the order of the plan."""

    id: str
    index: int
    files: tuple[FileObject, ...] = field(repr=False, default=())
    remote: RemoteAsset | None = None

    @property
    def label(self) -> str:
        """How a message may name it."""
        return f"input {self.index} ({self.id})"


@dataclass(frozen=True)
class FetchedFile:
    """
    A file that arrived. *position* is its file name in the input's folder; *seconds* includes all tries, *at* is when
    it was complete. *location* says where it is from, to nobody but this service, and *source* how it came.
    """

    input_id: str
    position: int
    size: int
    sha256: str
    content_type: str | None
    seconds: float
    source: str = ORIGIN
    location: str = field(default="", repr=False)
    at: datetime = field(default_factory=partial(datetime.now, UTC), compare=False)


def fetch_inputs(
    sources: Sequence[InputSource],
    into: Path,
    limits: FetchLimits,
    *,
    access: Access = _NOTHING_CONFIGURED,
    on_progress: Progress | None = None,
    on_found: OnFound | None = None,
    seal: Sealer | None = None,
    stop: Event | None = None,
) -> tuple[FetchedFile, ...]:
    """
    Fetch every file of every input at once into ``<into>/<id without "did:op:">/<n>``, when all assets that have to
    be looked up are found.

    n counts the files of an input from 0; inputs with the same id share a folder and the count goes on. *access* is
    how this house reaches sources, and *seal* makes what a file is told to be from. *on_progress* is called in the
    calling thread, a few times a second at most, and *on_found* for each asset that was looked up. Setting *stop*,
    from any thread, ends the fetching as a failure within a second.
    Blocks; runs an event loop of its own. Repeating it overwrites.

    File systems of fsspec that are not asynchronous run in threads: one that hangs is given up after
    ``seconds_silent``, and its thread is still waited for at the end.

    Returns:
        One per file, in the order given.

    Raises:
        InputUnreachable: One asset or file failed for good, or there are more than ``total_bytes`` in all, or
            ``seconds_total`` have passed. The others are cancelled at once. No partial file is left; complete
            ones are.
        OSError: This machine's disk.
    """
    remote = {n: source.remote for n, source in enumerate(sources) if source.remote is not None}

    def items(found: Sequence[FoundAsset]) -> Iterator[_Item]:
        assets = dict(zip(remote, found, strict=True))
        positions: Counter[str] = Counter()
        for n, source in enumerate(sources):
            name = _folder_name(source.id)
            files: Sequence[FileObject | AssetFile] = source.files
            if n in assets:
                files = assets[n].files
                if on_found is not None:
                    on_found(source.id, assets[n].ddo)
            kind = "URL" if all(map(_is_plain, files)) else "file"
            for number, file in enumerate(files, start=1):
                yield _Item(
                    label=f"{source.label}, {kind} {number} of {len(files)}",
                    input_id=source.id,
                    position=positions[name],
                    file=file,
                    target=into / name / str(positions[name]),
                )
                positions[name] += 1

    wanted = [_Wanted(sources[n].label, asset) for n, asset in remote.items()]
    outcome = _fetch_all(wanted, items, limits, access, Ledger(limits.total_bytes, on_progress), seal=seal, stop=stop)
    if isinstance(outcome, _Failed):
        raise InputUnreachable(str(outcome))
    return outcome


def fetch_algorithm(
    file: FileObject | None,
    rawcode: str | None,
    into: Path,
    limits: FetchLimits,
    *,
    remote: RemoteAsset | None = None,
    sha256: str | None = None,
    access: Access = _NOTHING_CONFIGURED,
    stop: Event | None = None,
) -> FetchedFile:
    """
    Write the algorithm to the file *into*, executable. *file* wins over *rawcode*, and both over *remote*, whose first
    file it is then; one of them is given. *sha256*, in lower case, is the checksum it has to have.

    Raises:
        AlgorithmUnreachable: The file failed for good, or the algorithm has more than ``algorithm_bytes`` or another
            checksum. It is not there then.
        OSError: This machine's disk.
    """
    ledger = Ledger(limits.algorithm_bytes)
    label = "the algorithm's URL" if file is not None and _is_plain(file) else "the algorithm's file"
    if file is None and rawcode is not None:
        label = "the algorithm's code"
        code = rawcode.encode()
        if len(code) > limits.algorithm_bytes:
            raise AlgorithmUnreachable(f"{label}: more than {limits.algorithm_bytes} bytes")
        # Unlinked first: what an earlier try left is read-only.
        into.unlink(missing_ok=True)
        into.write_bytes(code)
        fetched = FetchedFile("algorithm", 0, len(code), hashlib.sha256(code).hexdigest(), None, 0.0)
    elif file is not None or remote is not None:
        wanted = [_Wanted("the algorithm", remote)] if file is None and remote is not None else []

        def items(found: Sequence[FoundAsset]) -> Iterator[_Item]:
            files = found[0].files[:1] if file is None else (file,)
            yield from (_Item(label, input_id="algorithm", position=0, file=each, target=into) for each in files)

        outcome = _fetch_all(wanted, items, limits, access, ledger, stop=stop)
        if isinstance(outcome, _Failed):
            raise AlgorithmUnreachable(str(outcome))
        (fetched,) = outcome
    else:
        raise ValueError("none of file, rawcode and remote")
    if sha256 is not None and fetched.sha256 != sha256:
        # A data set's owner trusts it by its checksum; what was read when the job was taken in has been changed since.
        into.unlink()
        raise AlgorithmUnreachable(f"{label}: is not the file that was approved")
    into.chmod(0o555)
    return fetched


def link_stage_outputs(outputs: Path, into: Path, *, stop: Event = NEVER) -> tuple[FetchedFile, ...]:
    """
    Give a stage's outputs to a later stage as ``<into>/<the same relative path>``.

    Hard links where the file system has them, copies elsewhere. Regular files only: what an algorithm linked
    to is not handed on. Call it when the outputs have been filtered: to the filter, a file with a second
    name elsewhere is one that leads outside.

    Returns:
        One per file, sorted by path; *position* is the place in that order, *input_id* the name of *into*.

    Raises:
        Stopped: *stop* was set, from any thread.
    """
    linked = []
    into.mkdir(parents=True, exist_ok=True)
    for position, relative in enumerate(regular_files(outputs)):
        go_on(stop)
        started = time.monotonic()
        target = into / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        with open_regular(outputs, relative) as source:
            size, digest = _link_or_copy(source, outputs / relative, target, stop)
        linked.append(FetchedFile(into.name, position, size, digest, None, time.monotonic() - started))
    return tuple(linked)


def write_parameters(custom_data: Any, ddos: Mapping[str, Any], workspace: Workspace) -> None:
    """
    Write the consumer's parameters (``{}`` where there are none) and what is known of each data set, as JSON.

    *ddos* is keyed by the data set's id; the file's name is the id without its ``did:op:``.
    """
    given = {} if custom_data is None else custom_data
    workspace.custom_data.write_text(json.dumps(given, ensure_ascii=False), encoding="utf-8")
    for did, ddo in ddos.items():
        path = workspace.ddos / _folder_name(did)
        path.write_text(json.dumps(ddo, ensure_ascii=False), encoding="utf-8")


def configuration_log(inputs: Iterable[FetchedFile], algorithm: FetchedFile | None) -> str:
    """What was provisioned, a line per file: id, position, bytes, checksum, seconds. Nothing of where it came from."""
    lines = [f"input {file.input_id} {file.position}: {_line(file)}" for file in inputs]
    if algorithm is not None:
        lines.append(f"algorithm: {_line(algorithm)}")
    return "".join(f"{line}\n" for line in lines)


def _line(file: FetchedFile) -> str:
    kind = f", {file.content_type}" if file.content_type else ""
    return f"{file.size} bytes, sha256 {file.sha256}{kind}, {file.seconds:.2f} s"


def _is_plain(file: FileObject | AssetFile) -> bool:
    return isinstance(file, UrlFile)


def _folder_name(did: str) -> str:
    """The id as a file name. A plan is checked for bad ids; that one comes here is a bug, not a refusal."""
    name = folder_name(did)
    if name in {"", ".", ".."} or re.search(r"[/\\\x00-\x1f\x7f]", name):
        raise ValueError("the id of an input is not a file name")
    return name


def _link_or_copy(source: BufferedReader, path: Path, target: Path, stop: Event) -> tuple[int, str]:
    # A file written the careful way, by mkstemp and rename, is 0600; the next stage may be another user, and a linked
    # file is not handed over to it. What keeps others out is the job's folder.
    os.fchmod(source.fileno(), stat.S_IMODE(os.fstat(source.fileno()).st_mode) | 0o444)
    try:
        os.link(path, target, follow_symlinks=False)
    except OSError as error:
        # EXDEV: another file system. EPERM, EOPNOTSUPP: one without hard links. EMLINK: too many of them.
        if error.errno not in {errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK}:
            raise
    else:
        return source.seek(0, os.SEEK_END), _sha256(source, stop)
    digest = hashlib.sha256()
    with target.open("wb") as copy:
        while chunk := source.read(CHUNK):
            go_on(stop)
            digest.update(chunk)
            copy.write(chunk)
        return copy.tell(), digest.hexdigest()


def _sha256(source: BufferedReader, stop: Event) -> str:
    source.seek(0)
    digest = hashlib.sha256()
    while chunk := source.read(CHUNK):
        go_on(stop)
        digest.update(chunk)
    return digest.hexdigest()


# From here on: the machinery of fetching.


@dataclass(frozen=True)
class _Wanted:
    """An asset to look up. *label* is how a message may name it."""

    label: str
    asset: RemoteAsset


@dataclass(frozen=True)
class _Item:
    """One file to fetch. *label* is how a message may name it."""

    label: str
    input_id: str
    position: int
    file: FileObject | AssetFile = field(repr=False)
    target: Path

    @property
    def part(self) -> Path:
        return Path(f"{self.target}.part")


class _Failed(Exception):
    """One item failed for good, and with it the fetching. Its text is what the caller is told."""


def _fetch_all(
    wanted: Sequence[_Wanted],
    items: Callable[[Sequence[FoundAsset]], Iterable[_Item]],
    limits: FetchLimits,
    access: Access,
    ledger: Ledger,
    *,
    seal: Sealer | None = None,
    stop: Event | None,
) -> tuple[FetchedFile, ...] | _Failed:
    """Look up what is *wanted*, and fetch the *items* made of what was found, in that order."""
    laid_out: list[_Item] = []

    def lay_out(found: Sequence[FoundAsset]) -> Sequence[_Item]:
        laid_out.extend(items(found))
        for folder in {item.target.parent for item in laid_out}:
            folder.mkdir(parents=True, exist_ok=True)
        ledger.files = len(laid_out)
        return laid_out

    try:
        # Not the loop's own pool: name look-ups run there, and some that hang would stop every write.
        with ThreadPoolExecutor(3, thread_name_prefix="fetch-disk") as disk:
            return asyncio.run(
                _gather(wanted, lay_out, limits, access, ledger, disk=disk, seal=seal, stop=stop or Event())
            )
    finally:
        # When no thread is left that could still make one.
        for item in laid_out:
            item.part.unlink(missing_ok=True)


async def _gather(
    wanted: Sequence[_Wanted],
    lay_out: Callable[[Sequence[FoundAsset]], Sequence[_Item]],
    limits: FetchLimits,
    access: Access,
    ledger: Ledger,
    *,
    disk: ThreadPoolExecutor,
    seal: Sealer | None,
    stop: Event,
) -> tuple[FetchedFile, ...] | _Failed:
    first: BaseException
    items: Sequence[_Item] = ()
    async with remotes(limits, access) as opener, providers(limits, access) as others:
        fetching = _Fetching(opener, others, limits, ledger, disk, seal)
        try:
            async with asyncio.timeout(limits.seconds_total), asyncio.TaskGroup() as group:
                watch = group.create_task(_until(stop))
                finding = [group.create_task(fetching.find(each)) for each in wanted]
                if finding:
                    await asyncio.wait(finding)
                items = lay_out([task.result() for task in finding])
                tasks = []
                for item in items:
                    tasks.append(group.create_task(fetching.fetch(item)))
                    if len(tasks) % BEGUN_AT_ONCE == 0:
                        # Of thousands, the first would otherwise wait on the network until all have been begun.
                        await asyncio.sleep(0)
                if tasks:
                    await asyncio.wait(tasks)
                watch.cancel()
            return tuple(task.result() for task in tasks)
        except TimeoutError:
            missing = _unfinished(items) if items else ", ".join(each.label for each in wanted[:3])
            return _Failed(f"{missing}: not here after {limits.seconds_total:g} s in all")
        except BaseExceptionGroup as failures:
            first = failures.exceptions[0]
    if isinstance(first, _Failed):
        return first
    raise first


def _digest(path: Path, function: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, function).hexdigest()


def _location(file: FileObject | AssetFile) -> Any:
    """What a file's place is sealed as, in JSON."""
    if isinstance(file, AssetFile):
        return {"did": file.asset.did, "serviceId": file.asset.service_id, "fileIndex": file.index}
    return file.model_dump(mode="json", by_alias=True)


async def _until(stop: Event) -> None:
    """Fails once *stop* is set. Asks, a few times a second: an event of threads cannot be awaited."""
    while not stop.is_set():  # noqa: ASYNC110 - set by a thread
        await asyncio.sleep(STOP_TICK)
    raise _Failed("the job is being stopped")


def _unfinished(items: Sequence[_Item]) -> str:
    missing = [item for item in items if item.part.exists() or not item.target.exists()]
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return (missing or items)[0].label + more


@dataclass(frozen=True)
class _Fetching:
    """What the items of one fetching share."""

    remotes: Remotes
    providers: Providers
    limits: FetchLimits
    ledger: Ledger
    disk: ThreadPoolExecutor
    seal: Sealer | None

    async def find(self, wanted: _Wanted) -> FoundAsset:
        """One asset. What it fails with comes out as _Failed."""
        try:
            return await self.providers.find(wanted.asset)
        except Unreachable as trouble:
            words = trouble.words
        raise _Failed(f"{wanted.label}: {words}")

    def _slot(self, file: FileObject | AssetFile) -> AbstractAsyncContextManager[Any]:
        """Free for what another Provider has: that is one request, which a connector counts."""
        return nullcontext() if isinstance(file, AssetFile) else self.remotes.slot(file)

    async def _open(self, file: FileObject | AssetFile) -> Stream:
        return await (self.providers.open(file) if isinstance(file, AssetFile) else self.remotes.open(file))

    async def fetch(self, item: _Item) -> FetchedFile:
        """One file, with its tries. Every failure that is not this machine's comes out as _Failed."""
        started = time.monotonic()
        download = Download(item.target, item.part, self.ledger, self.limits, self.disk)
        words = ""
        while not words:
            try:
                async with self._slot(item.file):
                    size, sha256, content_type = await download.attempt(partial(self._open, item.file))
            except Unreachable as trouble:
                waiting = pause(download.tried, trouble)
                if not trouble.transient or download.tried >= self.limits.attempts:
                    words = trouble.words + (f" ({download.tried} tries)" if download.tried > 1 else "")
            else:
                await self._check(item, sha256)
                seconds = time.monotonic() - started
                location = self.seal(_location(item.file)) if self.seal else ""
                return FetchedFile(item.input_id, item.position, size, sha256, content_type, seconds, location=location)
            if not words:
                await asyncio.sleep(waiting)
        raise _Failed(f"{item.label}: {words}")

    async def _check(self, item: _Item, sha256: str) -> None:
        """Whether a file is what its owner has declared; else it does not stay."""
        if isinstance(item.file, AssetFile) or item.file.declared is None:
            return
        function, declared = item.file.declared
        found = sha256
        if function != "sha256":
            digest = partial(_digest, item.target, function)
            found = await asyncio.get_running_loop().run_in_executor(self.disk, digest)
        if found != declared:
            item.target.unlink()
            raise _Failed(f"{item.label}: has another checksum than its owner declares")
