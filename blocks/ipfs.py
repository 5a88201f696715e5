"""
Files of IPFS from a gateway that is not trusted: every block is checked against its content identifier (CID).

A file is one block (codec ``raw``) or a tree of them (``dag-pb`` with UnixFS in it). Blocks are asked for one by one,
as the trustless gateway protocol has it, so that none has to be believed before it was checked.

Sources: specs.ipfs.tech, "Trustless Gateway", "UnixFS"; ipld.io, "DAG-PB".
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

from multiformats import CID, multihash, varint

from blocks.limits import MIB

LARGEST_BLOCK: Final = 4 * MIB
"""Bytes. Gateways and peers exchange blocks of 2 MiB at most."""
DEEPEST: Final = 16
"""Levels of a tree. With the 174 links a node usually has, six are enough for a petabyte."""
MOST_LINKS: Final = 16_384
AHEAD: Final = 8
"""Blocks asked for before their turn: one at a time would be a round trip for each quarter of a MiB."""
LARGEST_INLINE: Final = 128
"""Bytes a CID may hold itself (hash function ``identity``) instead of naming them; the bound Kubo has."""

_HASHES: Final = frozenset(
    {"sha2-256", "sha2-512", "sha3-256", "sha3-384", "sha3-512", "blake2b-256", "blake2b-512", "blake2s-256"}
)
_RAW: Final = "raw"
_DAG_PB: Final = "dag-pb"
_FILES: Final = frozenset({0, 2})
_FOLDERS: Final = frozenset({1, 5})

Fetch = Callable[[CID], Awaitable[bytes]]
"""Asks a gateway for a block; its answer is not checked."""


class NotThatFile(Exception):
    """What came is not the file its identifier names, or none that can be read here. The text quotes nothing of it."""


def parse_cid(text: str) -> CID:
    """
    A content identifier of a file.

    Raises:
        NotThatFile: It is none; of another kind than a file; made with a hash function that is too weak.
    """
    try:
        cid = CID.decode(text)
    except Exception:  # a dozen kinds, from three packages, some with the text in them
        cid = None
    if cid is None:
        raise NotThatFile("it is not a content identifier")
    return _readable(cid)


def _readable(cid: CID) -> CID:
    if cid.codec.name not in {_RAW, _DAG_PB}:
        raise NotThatFile("its content identifier is not that of a file")
    if cid.hashfun.name == "identity":
        if len(cid.raw_digest) > LARGEST_INLINE:
            raise NotThatFile("its content identifier holds too much itself")
    elif cid.hashfun.name not in _HASHES:
        raise NotThatFile("its content identifier is made with a hash function that is not accepted")
    return cid


def check_block(cid: CID, block: bytes) -> None:
    """Raises NotThatFile where *block* is not the one that *cid* names."""
    # The whole digest: one that was cut short is not made longer by comparing less of it.
    if multihash.digest(block, cid.hashfun) != cid.digest:
        raise NotThatFile("what came does not match its content identifier")


@dataclass(frozen=True)
class Link:
    """A part of a file: where it is, how many bytes of the file it holds, how deep it lies."""

    cid: CID
    size: int
    depth: int


@dataclass(frozen=True)
class Node:
    """A block of a file: bytes of the file, then what its links name. *size* is of all of it."""

    data: bytes
    links: tuple[Link, ...]
    size: int


def read_node(cid: CID, block: bytes, depth: int = 0) -> Node:
    """
    A checked block as part of a file.

    Raises:
        NotThatFile: A folder; not UnixFS; its sizes do not add up, its links are too many or lie too deep.
    """
    if cid.codec.name == _RAW:
        return Node(block, (), len(block))
    try:
        node = _unixfs(block, depth)
    except NotThatFile:
        raise
    except Exception:  # as in parse_cid; a block is not to be believed before it was read
        node = None
    if node is None:
        raise NotThatFile("it is not a proper file of IPFS")
    return node


def _unixfs(block: bytes, depth: int) -> Node:
    envelope = _fields(block)
    inner = _fields(next((value for value in envelope[1] if isinstance(value, bytes)), b""))
    kind = next(iter(inner[1]), None)
    if kind in _FOLDERS:
        raise NotThatFile("it is a folder; name a file in it")
    if kind not in _FILES:
        raise NotThatFile("it is neither a file nor a folder of IPFS")
    # Of a link's fields only the first counts: names are those of folders, and its size is of blocks, not of the file.
    hashes = [_fields(link)[1][0] for link in envelope[2] if isinstance(link, bytes)]
    children = [CID.decode(each) for each in hashes if isinstance(each, bytes)]
    if len(children) > MOST_LINKS or (children and depth >= DEEPEST):
        raise NotThatFile("it has too many parts")
    data = b"".join(value for value in inner[2] if isinstance(value, bytes))
    sizes = [size for value in inner[4] for size in ([value] if isinstance(value, int) else _packed(value))]
    total = len(data) + sum(sizes)
    # With sizes that add up, and no part that holds nothing, a tree has no more nodes than its file has bytes: one
    # that goes on for ever is found out where it begins.
    if len(sizes) != len(children) or 0 in sizes or any(size != total for size in inner[3]):
        raise NotThatFile("its sizes do not add up")
    links = tuple(Link(_readable(cid), size, depth + 1) for cid, size in zip(children, sizes, strict=True))
    return Node(data, links, total)


# Two messages of protobuf, two kinds of field. The one package for DAG-PB in Python (ipld-dag-pb, a single release)
# knows nothing of UnixFS inside it, and protobuf's own runtime would want generated code for it.


def _fields(message: bytes) -> defaultdict[int, list[int | bytes]]:
    """The values of each field, by its number. Raises ValueError or IndexError for what is not protobuf."""
    found: defaultdict[int, list[int | bytes]] = defaultdict(list)
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        value, at = _varint(message, at)
        if key & 7 == 0:
            found[key >> 3].append(value)
        elif key & 7 == 2 and at + value <= len(message):
            found[key >> 3].append(message[at : at + value])
            at += value
        else:
            raise ValueError("neither of the two kinds of field these messages have")
    return found


def _packed(values: bytes) -> Iterator[int]:
    at = 0
    while at < len(values):
        value, at = _varint(values, at)
        yield value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value, read, _ = varint.decode_raw(memoryview(message)[at : at + 10])
    return value, at + read


@dataclass
class _Part:
    link: Link
    node: asyncio.Task[Node] | None = None


class FileReader:
    """
    Reads a file block by block, in the order of its bytes, some blocks asked for before their turn.

    Made by ``open``; ``close`` it, whatever has happened. At most ``AHEAD`` + 1 blocks are held in memory.
    """

    def __init__(self, root: Node, fetch: Fetch) -> None:
        self.size = root.size
        """Bytes of the file, as its root tells; ``read`` holds it to that."""
        self._fetch = fetch
        self._data = root.data
        self._parts = deque(map(_Part, root.links))
        self._asked = 0

    @classmethod
    async def open(cls, cid: CID, fetch: Fetch) -> FileReader:
        """Raises NotThatFile, and what *fetch* raises."""
        return cls(await _node(cid, 0, fetch), fetch)

    async def read(self) -> bytes:
        """The next bytes, those of a block; none at the end. Raises NotThatFile, and what *fetch* raises."""
        while not self._data and self._parts:
            node = await self._next()
            # What was asked for already comes after these, and is kept.
            self._parts.extendleft(map(_Part, reversed(node.links)))
            self._data = node.data
        data, self._data = self._data, b""
        return data

    async def close(self) -> None:
        asked = [part.node for part in self._parts if part.node is not None]
        for node in asked:
            node.cancel()
        # Awaited: of a task that failed and that nobody has asked, asyncio would log the failure.
        await asyncio.gather(*asked, return_exceptions=True)

    async def _next(self) -> Node:
        first = self._parts[0]
        for part in islice(self._parts, AHEAD):
            if part.node is None and (self._asked < AHEAD or part is first):
                part.node = asyncio.create_task(_node(part.link.cid, part.link.depth, self._fetch))
                self._asked += 1
        assert first.node is not None  # noqa: S101 - the loop has seen to it
        node = await first.node
        self._parts.popleft()
        self._asked -= 1
        if node.size != first.link.size:
            raise NotThatFile("its sizes do not add up")
        return node


async def _node(cid: CID, depth: int, fetch: Fetch) -> Node:
    if cid.hashfun.name == "identity":
        return read_node(cid, cid.raw_digest, depth)
    block = await fetch(cid)
    check_block(cid, block)
    return read_node(cid, block, depth)
