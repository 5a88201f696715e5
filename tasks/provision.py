"""
Bring the data sets, the algorithm and its parameters into a stage's folder.

A data set's URL is its owner's secret. Nothing here puts one into a message, a repr or a log: what went wrong
is said by position. Exceptions of the libraries below quote the URL in their text, so they are turned into
words where they are caught and what is raised is raised outside the ``except`` block, without a context.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import re
import socket
import stat
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AsyncExitStack, nullcontext
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import partial
from io import BufferedReader
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO, Final, TypeVar

import aiohttp
import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.http import HTTPFileSystem
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential_jitter,
)

from blocks.guard import HTTP, REDIRECTS, ForbiddenAddress, ForbiddenUrl, check_url, guarded_session
from blocks.limits import MIB, FetchLimits
from tasks.results import open_regular, regular_files
from tasks.workspace import Workspace

CHUNK: Final = MIB // 2
"""Bytes of one file held in memory; times ``FetchLimits.connections`` is what a stage's fetching needs."""
LONGEST_WAIT: Final = 30.0
"""Seconds between two tries, whatever Retry-After asks for."""
SECONDS_BETWEEN_REPORTS: Final = 0.2
STOP_TICK: Final = 0.25
"""Seconds between two looks at whether to stop."""

DID_PREFIX: Final = "did:op:"
_MEDIA_TYPE = re.compile(r"[\w!#$&^.+-]{1,64}/[\w!#$&^.+-]{1,64}")
_TRANSIENT_STATUS: Final = frozenset({408, 425, 429})

T = TypeVar("T")
Progress = Callable[[int, int, int, int], None]
"""Called with (bytes done, bytes announced or 0 while unknown, files done, files)."""


class InputUnreachable(Exception):
    """A data set could not be fetched. Names it by position, never by URL."""


class AlgorithmUnreachable(Exception):
    """The algorithm could not be fetched. Never names its URL."""


@dataclass(frozen=True)
class InputSource:
    """One input of a stage. *index* is its place in the order of the plan."""

    id: str
    index: int
    urls: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True)
class FetchedFile:
    """A file that arrived. *position* is its file name in the input's folder; *seconds* includes all tries."""

    input_id: str
    position: int
    size: int
    sha256: str
    content_type: str | None
    seconds: float


def fetch_inputs(
    sources: Sequence[InputSource],
    into: Path,
    limits: FetchLimits,
    *,
    storage_options: Mapping[str, Mapping[str, Any]] | None = None,
    on_progress: Progress | None = None,
    stop: Event | None = None,
) -> tuple[FetchedFile, ...]:
    """
    Fetch every URL of every input at once into ``<into>/<id without "did:op:">/<n>``.

    n counts the URLs of an input from 0; inputs with the same id share a folder and the count goes on.
    *storage_options* are fsspec's, by scheme; http and https take none, because a header for every host would
    be told to every host. *on_progress* is called in the calling thread, a few times a second at most. Setting
    *stop*, from any thread, ends the fetching as a failure within a second.
    Blocks; runs an event loop of its own. Repeating it overwrites.

    File systems of fsspec that are not asynchronous run in threads: one that hangs is given up after
    ``seconds_silent``, and its thread is still waited for at the end.

    Returns:
        One per URL, in the order given.

    Raises:
        InputUnreachable: One URL failed for good, or there are more than ``total_bytes`` in all, or
            ``seconds_total`` have passed. The others are cancelled at once. No partial file is left; complete
            ones are.
        OSError: This machine's disk.
    """
    positions: Counter[str] = Counter()
    items = []
    for source in sources:
        name = _folder_name(source.id)
        for number, url in enumerate(source.urls, start=1):
            items.append(
                _Item(
                    label=f"input {source.index} ({source.id}), URL {number} of {len(source.urls)}",
                    input_id=source.id,
                    position=positions[name],
                    url=url,
                    target=into / name / str(positions[name]),
                )
            )
            positions[name] += 1
    outcome = _fetch_all(items, limits, storage_options or {}, _Ledger(limits.total_bytes, on_progress), stop)
    if isinstance(outcome, _Failed):
        raise InputUnreachable(str(outcome))
    return outcome


def fetch_algorithm(
    url: str | None,
    rawcode: str | None,
    into: Path,
    limits: FetchLimits,
    *,
    storage_options: Mapping[str, Mapping[str, Any]] | None = None,
    stop: Event | None = None,
) -> FetchedFile:
    """
    Write the algorithm to the file *into*, executable. *url* wins over *rawcode*; one of them is given.

    Raises:
        AlgorithmUnreachable: The URL failed for good, or the algorithm has more than ``algorithm_bytes``.
        OSError: This machine's disk.
    """
    ledger = _Ledger(limits.algorithm_bytes)
    if url is not None:
        item = _Item("the algorithm's URL", input_id="algorithm", position=0, url=url, target=into)
        outcome = _fetch_all([item], limits, storage_options or {}, ledger, stop)
        if isinstance(outcome, _Failed):
            raise AlgorithmUnreachable(str(outcome))
        (fetched,) = outcome
    elif rawcode is not None:
        code = rawcode.encode()
        if len(code) > limits.algorithm_bytes:
            raise AlgorithmUnreachable(f"the algorithm's code: more than {limits.algorithm_bytes} bytes")
        # Unlinked first: what an earlier try left is read-only.
        into.unlink(missing_ok=True)
        into.write_bytes(code)
        fetched = FetchedFile("algorithm", 0, len(code), hashlib.sha256(code).hexdigest(), None, 0.0)
    else:
        raise ValueError("neither url nor rawcode")
    into.chmod(0o555)
    return fetched


def link_stage_outputs(outputs: Path, into: Path) -> tuple[FetchedFile, ...]:
    """
    Give a stage's outputs to a later stage as ``<into>/<the same relative path>``.

    Hard links where the file system has them, copies elsewhere. Regular files only: what an algorithm linked
    to is not handed on. Call it when the outputs have been filtered: to the filter, a file with a second
    name elsewhere is one that leads outside.

    Returns:
        One per file, sorted by path; *position* is the place in that order, *input_id* the name of *into*.
    """
    linked = []
    into.mkdir(parents=True, exist_ok=True)
    for position, relative in enumerate(regular_files(outputs)):
        started = time.monotonic()
        target = into / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        with open_regular(outputs, relative) as source:
            size, digest = _link_or_copy(source, outputs / relative, target)
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
    """What was provisioned, a line per file: id, position, bytes, checksum, seconds. No URL, no name of a host."""
    lines = [f"input {file.input_id} {file.position}: {_line(file)}" for file in inputs]
    if algorithm is not None:
        lines.append(f"algorithm: {_line(algorithm)}")
    return "".join(f"{line}\n" for line in lines)


def _line(file: FetchedFile) -> str:
    kind = f", {file.content_type}" if file.content_type else ""
    return f"{file.size} bytes, sha256 {file.sha256}{kind}, {file.seconds:.2f} s"


def _folder_name(did: str) -> str:
    """The id as a file name. A plan is checked for bad ids; that one comes here is a bug, not a refusal."""
    name = did.removeprefix(DID_PREFIX)
    if name in {"", ".", ".."} or re.search(r"[/\\\x00-\x1f\x7f]", name):
        raise ValueError("the id of an input is not a file name")
    return name


def _link_or_copy(source: BufferedReader, path: Path, target: Path) -> tuple[int, str]:
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
        return source.seek(0, os.SEEK_END), _sha256(source)
    digest = hashlib.sha256()
    with target.open("wb") as copy:
        while chunk := source.read(CHUNK):
            digest.update(chunk)
            copy.write(chunk)
        return copy.tell(), digest.hexdigest()


def _sha256(source: BufferedReader) -> str:
    source.seek(0)
    return hashlib.file_digest(source, "sha256").hexdigest()


# From here on: the machinery of fetching.


@dataclass(frozen=True)
class _Item:
    """One URL to fetch. *label* is how a message may name it."""

    label: str
    input_id: str
    position: int
    url: str = field(repr=False)
    target: Path

    @property
    def part(self) -> Path:
        return self.target.with_name(f"{self.target.name}.part")


class _Trouble(Exception):
    """Why a try failed, in *words* that may be shown; *wait* is what the server asked for, in seconds."""

    def __init__(self, words: str, *, transient: bool = False, wait: float | None = None) -> None:
        super().__init__(words)
        self.words = words
        self.transient = transient
        self.wait = wait


class _Failed(Exception):
    """One item failed for good, and with it the fetching. Its text is what the caller is told."""


class _Ledger:
    """Counts bytes and files over all items, holds the ceiling, reports progress. Used in the event loop only."""

    def __init__(self, ceiling: int, on_progress: Progress | None = None) -> None:
        self.ceiling = ceiling
        self.files = 0
        self._on_progress = on_progress
        self._bytes = 0
        self._announced: dict[Path, int] = {}
        self._expected = 0
        self._files_done = 0
        self._reported = 0.0

    def announce(self, target: Path, size: int) -> None:
        """A server says how much will come. Refused before it comes, where it is too much."""
        self._expect(target, size)
        if self._expected > self.ceiling:
            raise self._too_much()

    def add(self, count: int) -> None:
        self._bytes += count
        if self._bytes > self.ceiling:
            raise self._too_much()
        self._report()

    def take_back(self, count: int) -> None:
        """A try failed after *count* bytes."""
        self._bytes -= count

    def done(self, target: Path, size: int) -> None:
        self._expect(target, size)
        self._files_done += 1
        self._report(always=self._files_done == self.files)

    def _expect(self, target: Path, size: int) -> None:
        self._expected += size - self._announced.get(target, 0)
        self._announced[target] = size

    def _report(self, always: bool = False) -> None:
        now = time.monotonic()
        if self._on_progress and (always or now - self._reported >= SECONDS_BETWEEN_REPORTS):
            self._reported = now
            total = self._expected if len(self._announced) == self.files else 0
            self._on_progress(self._bytes, total, self._files_done, self.files)

    def _too_much(self) -> _Trouble:
        return _Trouble(f"more than {self.ceiling} bytes" + (" in all" if self.files > 1 else ""))


class _Stream(ABC):
    """The body of one remote file. *size* and *content_type* are known, if at all, after the first read."""

    size: int | None = None
    content_type: str | None = None

    @abstractmethod
    async def read(self) -> bytes:
        """Some bytes, at most about CHUNK; none at the end. A body shorter than announced raises."""

    @abstractmethod
    async def close(self) -> None: ...


class _HttpStream(_Stream):
    def __init__(self, file: Any) -> None:
        self._file = file

    async def read(self) -> bytes:
        chunk: bytes = await self._file.read(CHUNK)
        response: aiohttp.ClientResponse | None = self._file.r
        if response is not None:
            # An encoded body is decoded on the way, and its announced length is not that of what arrives.
            if not response.headers.get("Content-Encoding"):
                self.size = response.content_length
            found = _MEDIA_TYPE.match(response.headers.get("Content-Type", ""))
            self.content_type = found.group() if found else None
        return chunk

    async def close(self) -> None:
        await self._file.close()


class _AsyncStream(_Stream):
    """A file of any other asynchronous file system; aiohttp's timeouts are not there, so reads have one here."""

    def __init__(self, file: Any, silence: float) -> None:
        self._file = file
        self._silence = silence

    async def read(self) -> bytes:
        async with asyncio.timeout(self._silence):
            chunk: bytes = await self._file.read(CHUNK)
        self.size = getattr(self._file, "size", None)
        return chunk

    async def close(self) -> None:
        await self._file.close()


class _ThreadStream(_Stream):
    """A file of a file system that is not asynchronous: every call in a thread."""

    def __init__(self, opened: Callable[[], BinaryIO], silence: float) -> None:
        self._opened = opened
        self._file: BinaryIO | None = None
        self._silence = silence

    async def read(self) -> bytes:
        async with asyncio.timeout(self._silence):
            if self._file is None:
                self._file = await asyncio.to_thread(self._opened)
            return await asyncio.to_thread(self._file.read, CHUNK)

    async def close(self) -> None:
        if self._file is not None:
            await asyncio.to_thread(self._file.close)


class _Remotes:
    """The file systems of one fetching, each opened on first use; closed with *stack*."""

    def __init__(self, limits: FetchLimits, options: Mapping[str, Mapping[str, Any]], stack: AsyncExitStack) -> None:
        self._limits = limits
        self._options = options
        self._stack = stack
        self._lock = asyncio.Lock()
        self._opened: dict[str, Any] = {}
        self._slots = asyncio.Semaphore(limits.connections)

    def slot(self, url: str) -> AbstractAsyncContextManager[None]:
        """Held during a try. Free for http, whose connector counts its connections, by host too."""
        return nullcontext() if _scheme(url) in HTTP else self._slots

    async def open(self, url: str) -> _Stream:
        scheme = _scheme(url)
        async with self._lock:
            if scheme not in self._opened:
                self._opened[scheme] = await self._filesystem(scheme)
        remote = self._opened[scheme]
        if scheme in HTTP:
            # A size, because without one fsspec first asks for it with a HEAD, which many servers refuse.
            return _HttpStream(await remote.open_async(url, size=0, max_redirects=REDIRECTS))
        path = remote._strip_protocol(url)
        if isinstance(remote, AsyncFileSystem) and remote.asynchronous:
            return _AsyncStream(await remote.open_async(path), self._limits.seconds_silent)
        return _ThreadStream(partial(remote.open, path, "rb"), self._limits.seconds_silent)

    async def _filesystem(self, scheme: str) -> Any:
        if scheme in HTTP:
            remote = HTTPFileSystem(
                asynchronous=True,
                loop=asyncio.get_running_loop(),
                skip_instance_cache=True,
                # The URL is normalised; spelling it anew would break one signed over its spelling.
                encoded=True,
                get_client=self._client,
            )
            session = await remote.set_session()
            self._stack.push_async_callback(session.close)
            return remote
        options = dict(self._options.get(scheme, {}))
        kind = fsspec.get_filesystem_class(scheme)
        if not (issubclass(kind, AsyncFileSystem) and kind.open_async is not AsyncFileSystem.open_async):
            return kind(**options)
        remote = kind(**options, asynchronous=True, loop=asyncio.get_running_loop(), skip_instance_cache=True)
        if hasattr(remote, "set_session"):
            session = await remote.set_session()
            self._stack.push_async_callback(session.close)
        return remote

    async def _client(self, **more: Any) -> aiohttp.ClientSession:
        return guarded_session(
            self._limits,
            headers={"Accept-Encoding": "identity"},
            # Not left to fsspec: it raises FileNotFoundError for 404 and drops Retry-After for all others.
            raise_for_status=_check_status,
            **more,
        )


def _scheme(url: str) -> str:
    return url.partition(":")[0].lower()


async def _check_status(response: aiohttp.ClientResponse) -> None:
    status = response.status
    if 200 <= status < 300:
        return
    raise _Trouble(
        f"answered {status}",
        transient=status >= 500 or status in _TRANSIENT_STATUS,
        wait=_seconds(response.headers.get("Retry-After")),
    )


def _seconds(retry_after: str | None) -> float | None:
    """RFC 9110: a number of seconds or a date. Nonsense counts as nothing."""
    if not retry_after:
        return None
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after[:9])
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _fetch_all(
    items: Sequence[_Item],
    limits: FetchLimits,
    options: Mapping[str, Mapping[str, Any]],
    ledger: _Ledger,
    stop: Event | None,
) -> tuple[FetchedFile, ...] | _Failed:
    for folder in {item.target.parent for item in items}:
        folder.mkdir(parents=True, exist_ok=True)
    ledger.files = len(items)
    # Not the loop's own pool: name look-ups run there, and some that hang would stop every write.
    with ThreadPoolExecutor(2, thread_name_prefix="fetch-disk") as disk:
        try:
            return asyncio.run(_gather(items, limits, options, ledger, disk=disk, stop=stop or Event()))
        finally:
            for item in items:
                item.part.unlink(missing_ok=True)


async def _gather(
    items: Sequence[_Item],
    limits: FetchLimits,
    options: Mapping[str, Mapping[str, Any]],
    ledger: _Ledger,
    *,
    disk: ThreadPoolExecutor,
    stop: Event,
) -> tuple[FetchedFile, ...] | _Failed:
    first: BaseException
    async with AsyncExitStack() as stack:
        fetching = _Fetching(_Remotes(limits, options, stack), limits, ledger, disk)
        try:
            async with asyncio.timeout(limits.seconds_total), asyncio.TaskGroup() as group:
                tasks = [group.create_task(fetching.fetch(item)) for item in items]
                watch = group.create_task(_until(stop))
                if tasks:
                    await asyncio.wait(tasks)
                watch.cancel()
            return tuple(task.result() for task in tasks)
        except TimeoutError:
            return _Failed(f"{_unfinished(items)}: not here after {limits.seconds_total:g} s in all")
        except BaseExceptionGroup as failures:
            first = failures.exceptions[0]
    if isinstance(first, _Failed):
        return first
    raise first


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

    remotes: _Remotes
    limits: FetchLimits
    ledger: _Ledger
    disk: ThreadPoolExecutor

    async def fetch(self, item: _Item) -> FetchedFile:
        """One URL, with its tries. Every failure that is not this machine's comes out as _Failed."""
        started = time.monotonic()
        tries = 0
        try:
            url = check_url(item.url, self.limits)
            async for attempt in AsyncRetrying(
                stop=stop_after_attempt(self.limits.attempts),
                wait=_wait,
                retry=retry_if_exception(lambda error: isinstance(error, _Trouble) and error.transient),
                reraise=True,
            ):
                with attempt:
                    tries += 1
                    async with self.remotes.slot(url):
                        size, sha256, content_type = await self._try(item, url)
            await asyncio.get_running_loop().run_in_executor(self.disk, item.part.replace, item.target)
        except ForbiddenUrl as refused:
            words = f"its URL is refused: {refused.reason}"
        except _Trouble as trouble:
            words = trouble.words + (f" ({tries} tries)" if tries > 1 else "")
        else:
            self.ledger.done(item.target, size)
            seconds = time.monotonic() - started
            return FetchedFile(item.input_id, item.position, size, sha256, content_type, seconds)
        raise _Failed(f"{item.label}: {words}")

    async def _try(self, item: _Item, url: str) -> tuple[int, str, str | None]:
        """One try: size, SHA-256 and media type of what now lies in ``item.part``."""
        on_disk = partial(asyncio.get_running_loop().run_in_executor, self.disk)
        # Opened and closed in the loop: of an await, a cancellation would make a file that nobody closes.
        sink = _Sink(item.part)
        stream = None
        complete = False
        try:
            stream = await _in_words(self.remotes.open(url), self.limits)
            while block := await _in_words(_block(stream), self.limits):
                if not sink.size and stream.size is not None:
                    self.ledger.announce(item.target, stream.size)
                self.ledger.add(len(block))
                await on_disk(sink.write, block)
            if stream.size not in {None, sink.size}:
                raise _Trouble("broke off before its end", transient=True)
            complete = True
        finally:
            if not complete:
                self.ledger.take_back(sink.size)
            try:
                if stream is not None:
                    await _in_words(stream.close(), self.limits)
            finally:
                sink.close()
        return sink.size, sink.digest.hexdigest(), stream.content_type


_backoff = wait_exponential_jitter(multiplier=0.25, max=LONGEST_WAIT, jitter=0.25)


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, _Trouble) and error.wait is not None:
        return min(error.wait, LONGEST_WAIT)
    return _backoff(state)


class _Sink:
    """A file being written, with its size and checksum so far."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, block: bytes) -> None:
        self.digest.update(block)
        self._file.write(block)
        self.size += len(block)

    def close(self) -> None:
        self._file.close()


async def _block(stream: _Stream) -> bytes:
    """About CHUNK bytes, less only at the end: network reads are small, and each block costs a thread switch."""
    block = bytearray()
    while len(block) < CHUNK and (chunk := await stream.read()):
        block += chunk
    return bytes(block)


_CLOSED: Final = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError, aiohttp.ServerDisconnectedError)

# The first that fits: some are subclasses of later ones. (what was raised, in words, transient)
_WORDS: Final[tuple[tuple[type[Exception] | tuple[type[Exception], ...], str, bool], ...]] = (
    (ForbiddenAddress, "address is not public", False),
    (aiohttp.ClientConnectorDNSError, "its host name does not resolve", False),
    (aiohttp.ClientSSLError, "its certificate is not accepted", False),
    (aiohttp.ConnectionTimeoutError, "did not accept a connection within {connect:g} s", True),
    (TimeoutError, "did not answer within {silent:g} s", True),
    (aiohttp.TooManyRedirects, "redirects too often", False),
    (aiohttp.NonHttpUrlRedirectClientError, "redirects to a URL that is not http", False),
    (aiohttp.InvalidURL, "its URL is not valid", False),
    (aiohttp.ClientPayloadError, "broke off before its end", True),
    (ConnectionRefusedError, "refuses connections", True),
    (_CLOSED, "closed the connection", True),
    (aiohttp.ClientConnectorError, "cannot be reached", True),
    (aiohttp.ClientResponseError, "did not answer in proper HTTP", False),
    (FileNotFoundError, "does not exist", False),
    (PermissionError, "access is denied", False),
    (aiohttp.ClientOSError, "closed the connection", True),
)


async def _in_words(remote: Awaitable[T], limits: FetchLimits) -> T:
    """
    Await something remote; whatever goes wrong comes out as _Trouble.

    Every Exception, even a bug of a library: its text or its context would carry the URL into a traceback.
    """
    try:
        return await remote
    except _Trouble:
        raise
    except ForbiddenUrl as refused:
        trouble = _Trouble(f"its URL is refused: {refused.reason}")
    except Exception as error:
        trouble = _described(error, limits)
    raise trouble


def _described(error: Exception, limits: FetchLimits) -> _Trouble:
    cause: Exception = error
    if isinstance(error, aiohttp.ClientConnectorError) and isinstance(
        error.os_error, ForbiddenAddress | ConnectionError
    ):
        cause = error.os_error
    for kinds, words, transient in _WORDS:
        if isinstance(cause, kinds):
            text = words.format(connect=limits.seconds_to_connect, silent=limits.seconds_silent)
            return _Trouble(text, transient=transient or _resolver_is_busy(cause))
    return _Trouble(f"could not be read ({type(cause).__name__})")


def _resolver_is_busy(error: Exception) -> bool:
    """No answer about the name, as opposed to the answer that there is none."""
    return isinstance(error, aiohttp.ClientConnectorDNSError) and error.os_error.errno == socket.EAI_AGAIN
