"""
One file from its source to the disk: over as many connections as its source gives parts for, and on from the last
good byte where one of them broke off.

Memory holds what is on its way to the disk: for each connection one read.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Final, TypeVar

from blocks.limits import MIB, FetchLimits
from blocks.remote import CHUNK, NotTheSame, Parts, Stream, Unreachable, pause
from blocks.runner import Progress
from tasks.segments import LARGE, SMALLEST, Segment, Segments, cuts

SECONDS_BETWEEN_REPORTS: Final = 0.2
WORTH_A_TRY: Final = MIB
"""Bytes. A try that has brought so much does not count: a file of a hundred gigabytes may break off many times."""
HASHED_AT_ONCE: Final = 8 * MIB

T = TypeVar("T")


class Ledger:
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

    def _too_much(self) -> Unreachable:
        return Unreachable(f"more than {self.ceiling} bytes" + (" in all" if self.files > 1 else ""))


class Download:
    """
    One file on its way into *part*, which becomes *target* when it is complete. *tried* counts the tries of whoever
    tried most often.
    """

    def __init__(self, target: Path, part: Path, ledger: Ledger, limits: FetchLimits, disk: ThreadPoolExecutor) -> None:
        self.tried = 0
        self._target = target
        self._part = part
        self._ledger = ledger
        self.limits = limits
        self._disk = disk
        self._counted = 0
        self._in_parts = True

    async def attempt(self, open_file: Callable[[], Awaitable[Stream]]) -> tuple[int, str, str | None]:
        """
        Fetch it from its first byte. What breaks off is gone on with in here as long as the source gives parts.

        Returns:
            Size, SHA-256 and media type.

        Raises:
            Unreachable: Transient where it is worth to begin anew.
            OSError: This machine's disk.
        """
        self.tried += 1
        complete = False
        try:
            done = await self._attempt(open_file)
            complete = True
        except NotTheSame as other:
            self._in_parts = not other.for_good
            raise
        finally:
            if not complete:
                self._ledger.take_back(self._counted)
                self._counted = 0
        self._ledger.done(self._target, done[0])
        return done

    async def _attempt(self, open_file: Callable[[], Awaitable[Stream]]) -> tuple[int, str, str | None]:
        stream = await open_file()
        try:
            if stream.size is not None:
                self._ledger.announce(self._target, stream.size)
            first, trouble = await _block(stream)
            parts = stream.parts if self._in_parts else None
            if trouble and not (parts and trouble.transient):
                raise trouble
            if stream.size is not None:
                # Some file systems tell it only now.
                self._ledger.announce(self._target, stream.size)
            if len(first) < CHUNK and not trouble:
                return await self._small(first, stream)
            # Opened and closed in the loop: of an await, a cancellation would make a file that nobody closes.
            sink = _Sink(self._part)
            try:
                if parts is None:
                    size = await self._read_through(stream, first, sink)
                else:
                    size = await self._read_parts(stream, first, trouble, parts, sink)
            finally:
                sink.close()
            await self.on_disk(partial(self._part.replace, self._target))
            return size, sink.sha256, stream.content_type
        finally:
            await stream.close()

    async def _small(self, body: bytes, stream: Stream) -> tuple[int, str, str | None]:
        """One visit to the disk for all there is to do: of thousands of small files, visits are what takes long."""
        self.count(len(body))
        if stream.size not in {None, len(body)}:
            raise Unreachable("broke off before its end", transient=True)
        sha256 = await self.on_disk(partial(_write_whole, body, self._part, self._target))
        return len(body), sha256, stream.content_type

    async def _read_through(self, stream: Stream, first: bytes, sink: _Sink) -> int:
        size, block = 0, first
        while block:
            self.count(len(block))
            await self.on_disk(partial(sink.write, size, block))
            size += len(block)
            block, trouble = await _block(stream)
            if trouble:
                raise trouble
        if stream.size not in {None, size}:
            raise Unreachable("broke off before its end", transient=True)
        return size

    async def _read_parts(
        self, stream: Stream, first: bytes, trouble: Unreachable | None, parts: Parts, sink: _Sink
    ) -> int:
        size = parts.size
        many = parts.side_by_side and size >= LARGE
        if parts.from_the_start and not many:
            if trouble:
                raise trouble
            return await self._read_through(stream, first, sink)
        readers = min(self.limits.connections_per_host, -(-size // SMALLEST)) if many else 1
        segments = Segments(size, cuts(size, readers) if many else [(0, size)], parts.grain)
        reading = _Reading(self, parts, sink, segments, readers)
        if trouble or parts.from_the_start:
            # It holds a connection, which may be the only one there is.
            await stream.close()
        if parts.from_the_start:
            await reading.run(None, b"", failed=0)
        else:
            await reading.run(None if trouble else stream, first, failed=self.tried if trouble else 0)
        await parts.confirm()
        return size

    def count(self, count: int) -> None:
        self._counted += count
        self._ledger.add(count)

    def on_disk(self, action: Callable[[], T]) -> Awaitable[T]:
        return asyncio.get_running_loop().run_in_executor(self._disk, action)


class _Reading:
    """A file being read in parts by several readers, each with its own connection and its own tries."""

    def __init__(self, download: Download, parts: Parts, sink: _Sink, segments: Segments, readers: int) -> None:
        self._download = download
        self._parts = parts
        self._sink = sink
        self._segments = segments
        self._readers = readers
        self._moved = asyncio.Event()

    async def run(self, begun: Stream | None, first: bytes, *, failed: int) -> None:
        """
        Read it all. *first* are its first bytes, *begun* goes on after them; where it has broken off, it was try number
        *failed*.

        Raises:
            Unreachable: The last reader that was left has used up its tries, or one was told what trying again will
                not change. Only NotTheSame is transient.
            OSError: This machine's disk.
        """
        segment = self._segments.take()
        if segment is None:
            return
        await self._keep(segment, first)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._follow())
                group.create_task(self._read(segment, begun, failed))
                for _ in range(self._readers - 1):
                    group.create_task(self._read(self._segments.take(), None, 0))
            return
        except BaseExceptionGroup as failures:
            first_failure = failures.exceptions[0]
        raise first_failure

    async def _read(self, segment: Segment | None, stream: Stream | None, failed: int) -> None:
        while segment is not None:
            before = segment.at
            try:
                await self._pour(stream, segment)
            except Unreachable as trouble:
                if isinstance(trouble, NotTheSame) or not trouble.transient:
                    raise
                failed = 1 if segment.at - before >= WORTH_A_TRY else failed + 1
                reason = trouble
            else:
                failed = 0
                self._segments.done(segment)
                segment = self._segments.take()
                stream = None
                continue
            stream = None
            self._download.tried = max(self._download.tried, failed)
            if failed >= self._download.limits.attempts:
                # Some servers give one client only so many connections: those who have one go on for the others.
                self._segments.give_back(segment)
                self._readers -= 1
                if not self._readers:
                    raise Unreachable(reason.words)
                return
            await asyncio.sleep(pause(failed, reason))
        self._readers -= 1

    async def _pour(self, stream: Stream | None, segment: Segment) -> None:
        if stream is None:
            stream = await self._parts.open(segment.at, segment.end)
        try:
            while segment.left > 0:
                block, trouble = await _block(stream)
                await self._keep(segment, block)
                if segment.left > 0 and trouble:
                    raise trouble
                if segment.left > 0 and not block:
                    raise Unreachable("broke off before its end", transient=True)
        finally:
            await stream.close()

    async def _keep(self, segment: Segment, block: bytes) -> None:
        # What lies beyond the end is another's, who has taken it meanwhile.
        block = block[: segment.left]
        if block:
            self._download.count(len(block))
            await self._download.on_disk(partial(self._sink.write, segment.at, block))
            segment.at += len(block)
            self._moved.set()

    async def _follow(self) -> None:
        """Read what has come to the disk once more, for the checksum: the kernel still has it in memory."""
        while self._sink.hashed < self._segments.size:
            front = self._segments.front
            if front == self._segments.size or front - self._sink.hashed >= HASHED_AT_ONCE:
                await self._download.on_disk(partial(self._sink.hash_to, front))
            else:
                self._moved.clear()
                await self._moved.wait()


class _Sink:
    """
    A file being written, at any place of it, with the checksum of its beginning so far. Safe for threads: one may
    still be writing when a cancelled download closes it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb", buffering=0)
        self._lock = Lock()
        self._hashing = Lock()
        self._digest = hashlib.sha256()
        self.hashed = 0
        """Bytes from the beginning that are in the checksum."""

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, at: int, block: bytes) -> None:
        with self._lock:
            if self._file.closed:
                return
            self._file.seek(at)
            rest = memoryview(block)
            while rest:
                rest = rest[self._file.write(rest) or 0 :]
        # What comes in order is at hand now; the rest is read later.
        if at == self.hashed and self._hashing.acquire(blocking=False):
            try:
                self._add(at, block)
            finally:
                self._hashing.release()

    def hash_to(self, end: int) -> None:
        """Read on to *end*, or some way towards it."""
        with self._hashing, self._path.open("rb", buffering=0) as file:
            file.seek(self.hashed)
            limit = min(end, self.hashed + HASHED_AT_ONCE)
            while self.hashed < limit and (block := file.read(min(CHUNK, limit - self.hashed))):
                self._add(self.hashed, block)

    def _add(self, at: int, block: bytes) -> None:
        if at == self.hashed:
            self._digest.update(block)
            self.hashed += len(block)

    def close(self) -> None:
        with self._lock:
            self._file.close()


def _write_whole(body: bytes, part: Path, target: Path) -> str:
    part.write_bytes(body)
    part.replace(target)
    return hashlib.sha256(body).hexdigest()


async def _block(stream: Stream) -> tuple[bytes, Unreachable | None]:
    """About CHUNK bytes, less only at the end or before what it broke off with: each block costs a thread switch."""
    pieces: list[bytes] = []
    size = 0
    trouble = None
    try:
        while size < CHUNK and (piece := await stream.read()):
            pieces.append(piece)
            size += len(piece)
    except Unreachable as broken:
        trouble = broken
    # Joined once, and not at all where there is one piece: of a large file all this is what takes long.
    return b"".join(pieces) if len(pieces) != 1 else pieces[0], trouble
