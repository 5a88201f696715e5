"""
Files opened where they are: file objects of every kind, for whoever fetches them or looks at them.

Where a file is, and what is sent along to get it, is its owner's secret. Nothing here puts any of it into a message,
a repr or a log: what went wrong is said in words. Exceptions of the libraries below quote URLs in their text, so they
are turned into words where they are caught, and what is raised is raised outside the ``except`` block, without a
context.
"""

from __future__ import annotations

import asyncio
import random
import re
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TypeVar

import aiohttp
import fsspec
from fsspec.asyn import AsyncFileSystem
from multiformats import CID
from pydantic_core import from_json
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
)
from yarl import URL

from blocks.files import ArweaveFile, FileObject, GraphqlFile, IpfsFile, SmartContractFile, UrlFile
from blocks.guard import (
    REDIRECTS,
    ForbiddenAddress,
    LeftOrigin,
    guarded_session,
    keeps_to_itself,
    operators_session,
    schemes_only,
    stays_at,
)
from blocks.ipfs import LARGEST_BLOCK, FileReader, NotThatFile, parse_cid
from blocks.limits import MIB, FetchLimits
from blocks.ranges import conditional, is_part, validator
from blocks.urls import HTTP, ForbiddenUrl, check_request, check_url, scheme_of

if TYPE_CHECKING:
    from blocks.keys import ProviderKey  # takes a second to import, and few environments have a key

CHUNK: Final = MIB // 2
"""Bytes of one file that a read brings, about; times ``FetchLimits.connections`` is what fetching holds in memory."""
PIECE: Final = 4 * MIB
"""Bytes of one request to a file system, which holds them all, twice for a moment, before it hands them on."""
PIECE_SILENCES: Final = 8
"""
What such a request may take, in ``FetchLimits.seconds_silent``: it cannot be seen whether any of it arrives, and all of
them may share a narrow wire. Clients of stores have a timeout of their own for one that is silent.
"""
MOST_PIECES: Final = 16
"""Such requests at a time."""
LONGEST_WAIT: Final = 30.0
"""Seconds between two tries, whatever Retry-After asks for."""
LARGEST_REFUSAL: Final = MIB
"""Bytes of a GraphQL answer that are looked into for an error; one that is longer has data in it."""
LARGEST_ANSWER: Final = 32 * MIB
"""Bytes of what the node of a chain answers."""

_MEDIA_TYPE = re.compile(r"[\w!#$&^.+-]{1,64}/[\w!#$&^.+-]{1,64}")
TRANSIENT_STATUS: Final = frozenset({408, 425, 429})
OK: Final = 200
PARTIAL: Final = 206
UNSATISFIABLE: Final = 416
_IPFS_GATEWAY: Final = "at the IPFS gateway"
_ARWEAVE_GATEWAY: Final = "at the Arweave gateway"
_NODE: Final = "at the node of its chain"

T = TypeVar("T")


class Unreachable(Exception):
    """Why a file cannot be had, in *words* that may be shown; *wait* is what a server asked for, in seconds."""

    def __init__(
        self, words: str, *, transient: bool = False, wait: float | None = None, status: int | None = None
    ) -> None:
        super().__init__(words)
        self.words = words
        self.transient = transient
        self.wait = wait
        self.status = status
        """What a server has answered, where that is the reason."""


class NotTheSame(Unreachable):
    """
    A part is not one of the file that was begun, which has to be begun anew. *for_good*: its server says that it gives
    parts and does not give them, so it is to be asked for none again.
    """

    def __init__(self, *, for_good: bool = False) -> None:
        words = "does not give the parts it says it gives" if for_good else "changed while it was being fetched"
        super().__init__(words, transient=True)
        self.for_good = for_good


@dataclass(frozen=True)
class Access:
    """
    How this house reaches what consumers and owners name. All of it is the operator's choice: gateways and nodes may
    be at addresses that are not public.
    """

    storage_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    """fsspec's, by scheme; http and https take none: a header for every host would be told to every host."""
    ipfs_gateway: str = ""
    """Its URL; it has to speak the trustless gateway protocol. Empty: there is none."""
    arweave_gateway: str = ""
    chains: Mapping[int, str] = field(default_factory=dict, repr=False)
    """The URL of a node by the id of its chain. May hold a key."""
    signer: ProviderKey | None = field(default=None, repr=False)
    """Signs for what is fetched from other Providers."""
    metadata_stores: tuple[str, ...] = ()
    """Where their assets may be looked up; empty: wherever a consumer says."""


def check_file(file: FileObject, limits: FetchLimits, access: Access) -> None:
    """
    Everything that can be told before anything is asked of the network.

    Raises:
        ForbiddenUrl: It cannot be had here. The reason quotes nothing of it.
    """
    match file:
        case UrlFile() | GraphqlFile():
            check_request(file, limits.schemes)
        case IpfsFile() if not access.ipfs_gateway:
            raise ForbiddenUrl("no gateway to IPFS is configured here")
        case IpfsFile():
            _cid(file)
        case ArweaveFile() if not access.arweave_gateway:
            raise ForbiddenUrl("no gateway to Arweave is configured here")
        case SmartContractFile() if file.chain_id not in access.chains:
            raise ForbiddenUrl("its chain is not configured here")


def _cid(file: IpfsFile) -> CID:
    try:
        return parse_cid(file.hash)
    except NotThatFile as fault:
        reason = str(fault)
    raise ForbiddenUrl(reason)


def tries(limits: FetchLimits) -> AsyncRetrying:
    """Tries again what fails with a transient Unreachable, ``limits.attempts`` times in all, as servers ask for."""
    return AsyncRetrying(
        stop=stop_after_attempt(limits.attempts),
        wait=_wait,
        retry=retry_if_exception(lambda error: isinstance(error, Unreachable) and error.transient),
        reraise=True,
    )


async def tried(limits: FetchLimits, attempt: Callable[[], Awaitable[T]]) -> T:
    """*attempt* with its tries; the Unreachable it fails with for good says how many there were."""
    count = 0
    try:
        async for each in tries(limits):
            with each:
                count += 1
                return await attempt()
    except Unreachable as trouble:
        words = trouble.words + (f" ({count} tries)" if count > 1 else "")
    raise Unreachable(words)


_JITTER: Final = 0.25


def pause(tried: int, trouble: BaseException | None) -> float:
    """Seconds until the next try, after *tried* that have failed. As long as a server asks for, within reason."""
    jitter = random.uniform(0, _JITTER)  # noqa: S311 - so that many who failed together do not come back together
    if isinstance(trouble, Unreachable) and trouble.wait is not None:
        return min(trouble.wait + jitter, LONGEST_WAIT)
    return min(_JITTER * float(2 ** min(tried - 1, 16)) + jitter, LONGEST_WAIT)


def _wait(state: RetryCallState) -> float:
    return pause(state.attempt_number, state.outcome.exception() if state.outcome else None)


class Stream(ABC):
    """A file being read. Close it, whatever has happened. Both methods raise Unreachable and no other Exception."""

    size: int | None = None
    """Bytes of it all, where the source says so; known when it is opened, for some file systems after a read."""
    content_type: str | None = None
    """The media type the source gives it, without parameters."""
    parts: Parts | None = None
    """How to read other parts of the same file, where its source gives them; known when ``size`` is."""

    def __init__(self, limits: FetchLimits) -> None:
        self._limits = limits

    async def read(self) -> bytes:
        """Some bytes, at most about CHUNK or a block; none at the end. A body shorter than announced raises."""
        return await in_words(self._read(), self._limits)

    async def close(self) -> None:
        await in_words(self._close(), self._limits)

    @abstractmethod
    async def _read(self) -> bytes: ...

    @abstractmethod
    async def _close(self) -> None: ...


class Parts(ABC):
    """Parts of a file that was begun to be read: each of that very file, or NotTheSame."""

    def __init__(
        self, limits: FetchLimits, size: int, *, side_by_side: bool, grain: int, from_the_start: bool = False
    ) -> None:
        self._limits = limits
        self.size = size
        """Bytes of the whole file."""
        self.side_by_side = side_by_side
        """Whether several may be read at the same time; else only the rest of one that broke off."""
        self.grain = grain
        """Bytes one read may bring."""
        self.from_the_start = from_the_start
        """Whether what was read before a first part does not count."""

    async def open(self, start: int, end: int) -> Stream:
        """
        Begin to read the bytes from *start* to before *end*. The stream brings these and no others.

        Raises:
            Unreachable: For whatever reason, and no other Exception.
        """
        return await in_words(self._open(start, end), self._limits)

    async def confirm(self) -> None:
        """Call it when all is read. Raises NotTheSame where parts may be those of several files, and Unreachable."""
        return await in_words(self._confirm(), self._limits)

    @abstractmethod
    async def _open(self, start: int, end: int) -> Stream: ...

    async def _confirm(self) -> None:
        return None


class HttpStream(Stream):
    """The body of an answer, after what has *begun* to be read of it."""

    def __init__(self, response: aiohttp.ClientResponse, limits: FetchLimits, begun: bytes = b"") -> None:
        super().__init__(limits)
        self._response = response
        self._begun = begun
        # An encoded body is decoded on the way, and its announced length is not that of what arrives.
        if not response.headers.get("Content-Encoding"):
            self.size = response.content_length
        found = _MEDIA_TYPE.match(response.headers.get("Content-Type", ""))
        self.content_type = found.group() if found else None

    async def _read(self) -> bytes:
        if self._begun:
            begun, self._begun = self._begun, b""
            return begun
        return await self._response.content.read(CHUNK)

    async def _close(self) -> None:
        self._response.close()


_Ask = Callable[[Mapping[str, str]], Awaitable[aiohttp.ClientResponse]]
"""Sends the request for a file once more, with further headers."""


def _of_whole(response: aiohttp.ClientResponse, ask: _Ask, limits: FetchLimits) -> Stream:
    """The body of an answer to a request without a range, and how parts of the same can be asked for."""
    if response.status == PARTIAL:
        response.close()
        raise Unreachable("answered with a part of it only")
    stream = HttpStream(response, limits)
    # Of what one read brings, no part will be asked for: thousands of small files are spared this.
    if response.status != OK or stream.size is None or stream.size <= CHUNK:
        return stream
    units = response.headers.get("Accept-Ranges", "").strip().lower()
    same = validator(response.headers)
    if same is not None and units != "none":
        stream.parts = _HttpParts(ask, stream.size, same, limits, side_by_side=units == "bytes")
    return stream


class _HttpParts(Parts):
    def __init__(self, ask: _Ask, size: int, same: str, limits: FetchLimits, *, side_by_side: bool) -> None:
        super().__init__(limits, size, side_by_side=side_by_side, grain=2 * CHUNK)
        self._ask = ask
        self._same = same

    async def _open(self, start: int, end: int) -> Stream:
        try:
            response = await self._ask({"Range": f"bytes={start}-{end - 1}", "If-Range": self._same})
        except Unreachable as refused:
            # It was longer than this when it was begun.
            if refused.status == UNSATISFIABLE:
                raise NotTheSame from None
            raise
        told = validator(response.headers)
        if response.status != PARTIAL:
            response.close()
            # The whole of it: another one, or the same from a server that knows no ranges.
            raise NotTheSame(for_good=told == self._same)
        # A part may leave out Last-Modified, and a weak date may have become a strong one meanwhile; a tag stays.
        if told != self._same and (self._same.startswith('"') or "ETag" in response.headers):
            response.close()
            raise NotTheSame
        if response.headers.get("Content-Encoding") or not is_part(
            response.headers.get("Content-Range"), start, end, self.size
        ):
            response.close()
            raise NotTheSame(for_good=True)
        return _HttpPart(response, end - start, self._limits)


class _HttpPart(HttpStream):
    """Of what is sent beyond the range that was asked for, nothing is read."""

    def __init__(self, response: aiohttp.ClientResponse, size: int, limits: FetchLimits) -> None:
        super().__init__(response, limits)
        self.size = size
        self._left = size

    async def _read(self) -> bytes:
        chunk = await self._response.content.read(min(CHUNK, self._left)) if self._left else b""
        self._left -= len(chunk)
        return chunk


class _BytesStream(Stream):
    def __init__(self, body: bytes, content_type: str, limits: FetchLimits) -> None:
        super().__init__(limits)
        self._body = body
        self.size = len(body)
        self.content_type = content_type

    async def _read(self) -> bytes:
        body, self._body = self._body, b""
        return body

    async def _close(self) -> None: ...


class _IpfsStream(Stream):
    def __init__(self, reader: FileReader, limits: FetchLimits) -> None:
        super().__init__(limits)
        self._reader = reader
        self.size = reader.size

    async def _read(self) -> bytes:
        return await self._reader.read()

    async def _close(self) -> None:
        await self._reader.close()


class _AsyncStream(Stream):
    """A file of an asynchronous file system; aiohttp's timeouts are not there, so reads have one here."""

    def __init__(self, file: Any, limits: FetchLimits, parts: _PiecesOfFile | None) -> None:
        super().__init__(limits)
        self._file = file
        self._parts = parts

    async def _read(self) -> bytes:
        async with asyncio.timeout(self._limits.seconds_silent):
            chunk: bytes = await self._file.read(CHUNK)
        self.size = getattr(self._file, "size", None)
        if self._parts is not None and self.size is not None:
            self._parts.size = self.size
            self.parts = self._parts
        return chunk

    async def _close(self) -> None:
        await self._file.close()


class _PiecesOfFile(Parts):
    """
    Parts of a file of an asynchronous file system, a request for each PIECE of them. Such a system has no If-Range;
    that the file has stayed the same is asked before the first part and after the last.
    """

    def __init__(self, remote: Any, path: str, at_once: asyncio.Semaphore, limits: FetchLimits) -> None:
        super().__init__(limits, 0, side_by_side=True, grain=PIECE, from_the_start=True)
        self._remote = remote
        self._path = path
        self._at_once = at_once
        self._lock = asyncio.Lock()
        self._known: tuple[Any, ...] | None = None

    async def _open(self, start: int, end: int) -> Stream:
        async with self._lock:
            if self._known is None:
                known = await self._identity()
                if known[0] != self.size:
                    raise NotTheSame
                self._known = known
        return _Pieces(self.piece, start, end, self._limits)

    async def _confirm(self) -> None:
        if self._known is not None and await self._identity() != self._known:
            raise NotTheSame

    async def _identity(self) -> tuple[Any, ...]:
        self._remote.invalidate_cache(self._path)
        async with asyncio.timeout(self._limits.seconds_silent):
            info = await self._remote._info(self._path)
        # As S3, Google, Azure, WebHDFS and others of fsspec name them.
        names = ("size", "ETag", "etag", "LastModified", "last_modified", "mtime", "VersionId", "generation")
        return tuple(info.get(name) for name in names)

    async def piece(self, start: int, end: int) -> bytes:
        try:
            async with self._at_once, asyncio.timeout(PIECE_SILENCES * self._limits.seconds_silent):
                found: bytes = await self._remote._cat_file(self._path, start=start, end=end)
        except Exception:
            # Past the end of a shorter one, every system fails in its own way.
            await self._confirm()
            raise
        if len(found) != end - start:
            await self._confirm()
            raise NotTheSame(for_good=True)
        return found


class _Pieces(Stream):
    def __init__(
        self, piece: Callable[[int, int], Awaitable[bytes]], start: int, end: int, limits: FetchLimits
    ) -> None:
        super().__init__(limits)
        self._piece = piece
        self._at = start
        self._end = end

    async def _read(self) -> bytes:
        if self._at >= self._end:
            return b""
        found = await self._piece(self._at, min(self._at + PIECE, self._end))
        self._at += len(found)
        return found

    async def _close(self) -> None: ...


class _ThreadStream(Stream):
    """A file of a file system that is not asynchronous: every call in a thread."""

    def __init__(self, opened: Callable[[], BinaryIO], limits: FetchLimits) -> None:
        super().__init__(limits)
        self._opened = opened
        self._file: BinaryIO | None = None

    async def _read(self) -> bytes:
        async with asyncio.timeout(self._limits.seconds_silent):
            if self._file is None:
                self._file = await asyncio.to_thread(self._opened)
            return await asyncio.to_thread(self._file.read, CHUNK)

    async def _close(self) -> None:
        if self._file is not None:
            await asyncio.to_thread(self._file.close)


@asynccontextmanager
async def remotes(limits: FetchLimits, access: Access) -> AsyncIterator[Remotes]:
    """What files are opened with, for the time of the ``async with``; its connections are closed at the end."""
    async with AsyncExitStack() as stack:
        yield Remotes(limits, access, stack)


class Remotes:
    """HTTP clients and file systems, each opened on first use. Made by ``remotes``."""

    def __init__(self, limits: FetchLimits, access: Access, stack: AsyncExitStack) -> None:
        self._limits = limits
        self._access = access
        self._stack = stack
        self._lock = asyncio.Lock()
        self._opened: dict[str, Any] = {}
        self._sessions: dict[str, aiohttp.ClientSession] = {}
        self._slots = asyncio.Semaphore(limits.connections)
        self._pieces = asyncio.Semaphore(min(limits.connections_per_host, MOST_PIECES))

    def slot(self, file: FileObject) -> AbstractAsyncContextManager[Any]:
        """
        Held during a try. Free for what is one request of http, whose connector counts its connections, by host too;
        not for a file that is many requests, and holds what they bring.
        """
        one_request = not isinstance(file, IpfsFile) and not (
            isinstance(file, UrlFile) and scheme_of(file.url) not in HTTP
        )
        return nullcontext() if one_request else self._slots

    async def open(self, file: FileObject) -> Stream:
        """
        Begin to read *file*.

        Raises:
            Unreachable: For whatever reason, and no other Exception.
        """
        return await in_words(self._open(file), self._limits)

    async def _open(self, file: FileObject) -> Stream:
        match file:
            # These two are checked as they are normalised.
            case UrlFile():
                return await self._open_url(file)
            case GraphqlFile():
                return await self._open_graphql(file)
        check_file(file, self._limits, self._access)
        match file:
            case IpfsFile():
                return await self._open_ipfs(file)
            case ArweaveFile():
                return await self._open_arweave(file)
            case SmartContractFile():
                return await self._open_contract(file)

    async def _open_url(self, file: UrlFile) -> Stream:
        url = check_request(file, self._limits.schemes)
        scheme = scheme_of(url)
        if scheme in HTTP:
            ask = partial(self._request, file.method, url, file.headers)
            response = await ask({})
            if file.method != "GET" or conditional(file.headers):
                return HttpStream(response, self._limits)
            return _of_whole(response, ask, self._limits)
        async with self._lock:
            if scheme not in self._opened:
                self._opened[scheme] = await self._filesystem(scheme)
        remote = self._opened[scheme]
        path = remote._strip_protocol(url)
        if isinstance(remote, AsyncFileSystem) and remote.asynchronous:
            ranged = type(remote)._cat_file is not AsyncFileSystem._cat_file
            parts = _PiecesOfFile(remote, path, self._pieces, self._limits) if ranged else None
            return _AsyncStream(await remote.open_async(path), self._limits, parts)
        return _ThreadStream(partial(remote.open, path, "rb"), self._limits)

    async def _open_ipfs(self, file: IpfsFile) -> Stream:
        return _IpfsStream(await FileReader.open(_cid(file), self._block), self._limits)

    async def _block(self, cid: CID) -> bytes:
        """A block with its tries: a file that has a thousand is not begun anew for one of them."""
        gateway = URL(self._access.ipfs_gateway)
        name = str(cid) if cid.version == 0 else cid.encode("base32")
        # The query of the configured URL stays: with some gateways it holds the key.
        url = (gateway / "ipfs" / name).with_query({**gateway.query, "format": "raw"})

        async def ask() -> bytes:
            answer = self._from_gateway(url, {"Accept": "application/vnd.ipld.raw"})
            return await in_words(whole_body(answer, LARGEST_BLOCK), self._limits, _IPFS_GATEWAY)

        return await tried(self._limits, ask)

    async def _open_arweave(self, file: ArweaveFile) -> Stream:
        gateway = URL(self._access.arweave_gateway)
        url = (gateway / file.transaction_id).with_query(gateway.query)

        async def ask(more: Mapping[str, str]) -> aiohttp.ClientResponse:
            return await in_words(self._from_gateway(url, more), self._limits, _ARWEAVE_GATEWAY)

        response = await ask({})
        if response.status != OK:
            # Gateways answer 202 and "Pending" for a transaction that is not in a block yet.
            response.close()
            raise Unreachable("its transaction is not confirmed yet", transient=True)
        return _of_whole(response, ask, self._limits)

    async def _open_graphql(self, file: GraphqlFile) -> Stream:
        url = check_request(file, self._limits.schemes)
        headers = dict(file.headers)
        if not any(name.lower() == "accept" for name in headers):
            headers["Accept"] = "application/graphql-response+json, application/json;q=0.9"
        query = {"query": file.query, "variables": dict(file.variables)}
        response = await self._request("POST", url, headers, {}, query)
        try:
            begun = bytearray()
            while len(begun) <= LARGEST_REFUSAL and (chunk := await response.content.read(CHUNK)):
                begun += chunk
            if len(begun) <= LARGEST_REFUSAL:
                _check_answer(bytes(begun))
        except BaseException:
            response.close()
            raise
        return HttpStream(response, self._limits, bytes(begun))

    async def _open_contract(self, file: SmartContractFile) -> Stream:
        from blocks.contract_view import NoAnswer, call_view  # noqa: PLC0415 - web3 takes a second to import

        node = URL(self._access.chains[file.chain_id])

        async def post(request: bytes) -> bytes:
            answer = self._session("operator").post(
                node,
                data=request,
                headers={"Content-Type": "application/json"},
                middlewares=(stays_at(node),),
            )
            return await in_words(whole_body(answer, LARGEST_ANSWER), self._limits, _NODE)

        try:
            return _BytesStream(await call_view(file, post), "application/json", self._limits)
        except NoAnswer as fault:
            words = str(fault)
        raise Unreachable(words)

    async def _request(
        self, method: str, url: str, headers: Mapping[str, str], more: Mapping[str, str], body: Any = None
    ) -> aiohttp.ClientResponse:
        """
        As the owner of a file wants it, to a server that anybody may have named. *more* are headers of ours, which may
        follow a redirect to another one.
        """
        # The URL is normalised; spelling it anew would break one signed over its spelling.
        home = URL(url, encoded=True)
        return await self._session("guarded").request(
            method,
            home,
            headers={**headers, **more},
            json=body,
            max_redirects=REDIRECTS,
            middlewares=(schemes_only(self._limits), keeps_to_itself(home, headers, body=body is not None)),
        )

    async def _from_gateway(self, url: URL, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        session = self._session("operator")
        try:
            return await session.get(url, headers=headers, max_redirects=REDIRECTS, middlewares=(stays_at(url),))
        except LeftOrigin as left:
            elsewhere = str(left.url)
        # Gateways send on to one of their subdomains, a sandbox for each file. That is not what the operator has
        # configured any more, so it is fetched as if a consumer had named it.
        return await self._request("GET", check_url(elsewhere, HTTP), {}, headers)

    def _session(self, kind: str) -> aiohttp.ClientSession:
        if kind not in self._sessions:
            make = guarded_session if kind == "guarded" else operators_session
            session = make(
                self._limits,
                headers={"Accept-Encoding": "identity"},
                # Not left to aiohttp: it drops Retry-After, and its error quotes the URL.
                raise_for_status=check_status,
            )
            self._stack.push_async_callback(session.close)
            self._sessions[kind] = session
        return self._sessions[kind]

    async def _filesystem(self, scheme: str) -> Any:
        options = dict(self._access.storage_options.get(scheme, {}))
        if scheme in {"s3", "s3a"}:
            # Its client has ten connections if nothing else is said.
            pool = {"max_pool_connections": self._limits.connections_per_host}
            options["config_kwargs"] = {**pool, **options.get("config_kwargs", {})}
        kind = fsspec.get_filesystem_class(scheme)
        if not (issubclass(kind, AsyncFileSystem) and kind.open_async is not AsyncFileSystem.open_async):
            return kind(**options)
        remote = kind(**options, asynchronous=True, loop=asyncio.get_running_loop(), skip_instance_cache=True)
        if hasattr(remote, "set_session"):
            session = await remote.set_session()
            self._stack.push_async_callback(session.close)
        return remote


async def whole_body(answer: Awaitable[aiohttp.ClientResponse], ceiling: int) -> bytes:
    """All that is answered. Raises Unreachable beyond *ceiling* bytes, and whatever *answer* does."""
    body = bytearray()
    async with await answer as response:
        while chunk := await response.content.read(CHUNK):
            body += chunk
            if len(body) > ceiling:
                raise Unreachable(f"answers with more than {ceiling} bytes")
    return bytes(body)


def _check_answer(body: bytes) -> None:
    """An answer that holds no data but errors is none, though its status says 200. Source: spec.graphql.org, 7.1."""
    try:
        answer = from_json(body)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise Unreachable("did not answer in JSON as GraphQL has it")
    if answer.get("data") is None:
        raise Unreachable("answered with errors and no data" if answer.get("errors") else "answered with no data")


async def check_status(response: aiohttp.ClientResponse) -> None:
    """Raises Unreachable, with the body given up, for every status but success."""
    status = response.status
    if 200 <= status < 300:
        return
    response.release()
    raise Unreachable(
        f"answered {status}",
        transient=status >= 500 or status in TRANSIENT_STATUS,
        wait=_seconds(response.headers.get("Retry-After")),
        status=status,
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


_CLOSED: Final = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError, aiohttp.ServerDisconnectedError)

# The first that fits: some are subclasses of later ones. (what was raised, in words, transient)
_WORDS: Final[tuple[tuple[type[Exception] | tuple[type[Exception], ...], str, bool], ...]] = (
    (ForbiddenAddress, "address is not public", False),
    (LeftOrigin, "redirects to another server", False),
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

# By name: botocore takes a second to import, and few environments need it.
_DAMAGED: Final = frozenset({"FlexibleChecksumError", "ChecksumError"})


async def in_words(remote: Awaitable[T], limits: FetchLimits, at: str = "") -> T:
    """
    Await something remote; whatever goes wrong comes out as Unreachable. *at* names what is asked, if not the file.

    Every Exception, even a bug of a library: its text or its context would carry the URL into a traceback.
    """
    try:
        return await remote
    except NotTheSame as changed:
        trouble: Unreachable = NotTheSame(for_good=changed.for_good)
    except Unreachable as known:
        trouble = known
    except NotThatFile as fault:
        trouble = Unreachable(str(fault))
    except ForbiddenUrl as refused:
        trouble = Unreachable(f"refused: {refused.reason}")
    except Exception as error:
        trouble = _described(error, limits)
    if isinstance(trouble, NotTheSame):
        raise trouble
    words = f"{at}: {trouble.words}" if at else trouble.words
    raise Unreachable(words, transient=trouble.transient, wait=trouble.wait, status=trouble.status)


def _described(error: Exception, limits: FetchLimits) -> Unreachable:
    cause: Exception = error
    if isinstance(error, aiohttp.ClientConnectorError) and isinstance(
        error.os_error, ForbiddenAddress | ConnectionError
    ):
        cause = error.os_error
    for kinds, words, transient in _WORDS:
        if isinstance(cause, kinds):
            text = words.format(connect=limits.seconds_to_connect, silent=limits.seconds_silent)
            return Unreachable(text, transient=transient or _resolver_is_busy(cause))
    if type(cause).__name__ in _DAMAGED:
        return Unreachable("arrived damaged", transient=True)
    return Unreachable(f"could not be read ({type(cause).__name__})")


def _resolver_is_busy(error: Exception) -> bool:
    """No answer about the name, as opposed to the answer that there is none."""
    return isinstance(error, aiohttp.ClientConnectorDNSError) and error.os_error.errno == socket.EAI_AGAIN
