"""Files in parts: what is asked for, what is gone on with, what is begun anew; and how a file is dealt out."""

from __future__ import annotations

import asyncio
import hashlib
import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Final

import fsspec
import pytest
from fsspec.asyn import AbstractAsyncStreamedFile, AsyncFileSystem
from hypothesis import given
from hypothesis import strategies as st

from blocks.files import UrlFile
from blocks.limits import MIB, FetchLimits
from blocks.ranges import is_part, validator
from blocks.remote import CHUNK, PIECE, Access
from tasks.provision import FetchedFile, InputSource, InputUnreachable, fetch_inputs
from tasks.segments import LARGE, LARGEST, SMALLEST, Segment, Segments, cuts
from tests.file_server import LOOPBACK, FileServer, Ranges
from tests.s3_server import s3_server

TAG: Final = {"ETag": '"one"'}
BODY: Final = random.Random(1).randbytes(20 * MIB + 12_345)
SHA256: Final = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def file_server() -> Iterator[FileServer]:
    with FileServer() as server:
        yield server


def fetched(
    url: str, into: Path, limits: FetchLimits = LOOPBACK, *, headers: dict[str, str] | None = None
) -> FetchedFile:
    (file,) = fetch_inputs([InputSource("a", 0, (UrlFile(url=url, headers=headers or {}),))], into, limits)
    return file


def ranges(server: FileServer) -> list[str | None]:
    return [request.headers.get("Range") for request in server.received]


def limited(**changes: object) -> FetchLimits:
    return LOOPBACK.model_copy(update=changes)


# Over several connections


def test_a_large_file_comes_in_parts(file_server: FileServer, tmp_path: Path) -> None:
    """Over as many connections as are allowed, under one validator, each byte where it belongs."""
    file = fetched(file_server.add(BODY, headers=TAG, pause=0.05), tmp_path, limited(connections_per_host=4))
    assert (tmp_path / "a" / "0").read_bytes() == BODY
    assert (file.size, file.sha256) == (len(BODY), SHA256)
    assert file_server.most_at_once == 4
    first, *parts = file_server.received
    assert "Range" not in first.headers
    assert {request.headers["If-Range"] for request in parts} == {'"one"'}


def test_the_last_modified_does_as_well(file_server: FileServer, tmp_path: Path) -> None:
    """Where there is no tag, a date that is old enough tells one content from another."""
    headers = {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
    file = fetched(file_server.add(BODY, headers=headers), tmp_path)
    assert file.sha256 == SHA256
    assert {request.headers.get("If-Range") for request in file_server.received} == {None, *headers.values()}
    assert ranges(file_server).count(None) == 1


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"weak"'}, {**TAG, "Accept-Ranges": "none"}])
def test_without_a_strong_validator_a_file_comes_whole(
    file_server: FileServer, tmp_path: Path, headers: dict[str, str]
) -> None:
    """Parts of what may change in between are not put together."""
    assert fetched(file_server.add(BODY, headers=headers), tmp_path).sha256 == SHA256
    assert ranges(file_server) == [None]


def test_an_owner_who_asks_for_a_range_gets_that(file_server: FileServer, tmp_path: Path) -> None:
    """What an owner's own headers ask for is not taken apart."""
    url = file_server.add(BODY, headers=TAG)
    fetched(url, tmp_path, headers={"Range": f"bytes=5-{15 * MIB}"})
    assert (tmp_path / "a" / "0").read_bytes() == BODY[5 : 15 * MIB + 1]
    assert len(file_server.received) == 1


def test_a_part_that_nobody_has_asked_for_is_refused(file_server: FileServer, tmp_path: Path) -> None:
    """An answer of 206 to a request without a range is not taken for the file."""
    with pytest.raises(InputUnreachable, match=r"answered with a part of it only$"):
        fetched(file_server.add(b"", status=206), tmp_path)


def test_a_server_that_takes_few_connections(file_server: FileServer, tmp_path: Path) -> None:
    """Readers it turns away leave their share to those that have a connection."""
    url = file_server.add(BODY, headers=TAG, at_most=2, pause=0.01)
    file = fetched(url, tmp_path, limited(attempts=2))
    assert file.sha256 == SHA256


def test_progress_of_parts_adds_up(file_server: FileServer, tmp_path: Path) -> None:
    """The last report tells all bytes, none twice, whatever broke off meanwhile."""
    url = file_server.add(BODY, headers=TAG, drop_after=MIB, drop_times=3)
    seen: list[tuple[int, int, int, int]] = []
    source = InputSource("a", 0, (UrlFile(url=url),))
    fetch_inputs([source], tmp_path, LOOPBACK, on_progress=lambda *report: seen.append(report))
    assert seen[-1] == (len(BODY), len(BODY), 1, 1)


def test_the_ceiling_holds_for_parts(file_server: FileServer, tmp_path: Path) -> None:
    """A size that is too large is refused before any part is asked for."""
    with pytest.raises(InputUnreachable, match=r"more than 10485760 bytes$"):
        fetched(file_server.add(BODY, headers=TAG), tmp_path, limited(total_bytes=10 * MIB))
    assert ranges(file_server) == [None]


# What breaks off


def test_a_file_goes_on_where_it_broke_off(file_server: FileServer, tmp_path: Path) -> None:
    """Of a file too small for parts, only what the client had not handed on yet is asked for again: a MiB at most."""
    size = LARGE - 1
    url = file_server.add(BODY[:size], headers=TAG, drop_after=3 * MIB, drop_times=1)
    assert fetched(url, tmp_path).sha256 == hashlib.sha256(BODY[:size]).hexdigest()
    _, again = file_server.received
    (start, end) = map(int, again.headers["Range"].removeprefix("bytes=").split("-"))
    assert 3 * MIB - 2 * CHUNK <= start <= 3 * MIB
    assert end == size - 1


def test_tries_that_bring_something_do_not_count(file_server: FileServer, tmp_path: Path) -> None:
    """A server that cuts every connection after two MiB is asked as often as it takes."""
    url = file_server.add(BODY[:LARGE], headers=TAG, drop_after=2 * MIB)
    assert fetched(url, tmp_path, limited(attempts=2, connections_per_host=1)).size == LARGE
    assert len(file_server.received) >= 4


def test_tries_that_bring_next_to_nothing_do(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.add(BODY[:LARGE], headers=TAG, drop_after=1000)
    with pytest.raises(InputUnreachable, match=r"broke off before its end \(3 tries\)$"):
        fetched(url, tmp_path, limited(connections_per_host=1))
    assert len(file_server.received) == 3
    assert not list((tmp_path / "a").iterdir())


@pytest.mark.parametrize("status", [404, 401, 403])
def test_what_trying_again_does_not_change_ends_it_at_once(
    file_server: FileServer, tmp_path: Path, status: int
) -> None:
    """A part that is refused is not asked for again, and nobody else's is read to its end."""
    url = file_server.add(BODY, headers=TAG, name="x", pause=0.1)

    def gone(*_: int) -> None:
        file_server.add(name="x", status=status)

    source = InputSource("a", 0, (UrlFile(url=url),))
    with pytest.raises(InputUnreachable, match=rf"answered {status}$"):
        fetch_inputs([source], tmp_path, limited(connections_per_host=1), on_progress=gone)
    assert len(file_server.received) == 2


# Whose parts they are


@pytest.mark.parametrize("kind", ["ignored", "shifted", "short"])
def test_a_server_that_gives_no_proper_parts(file_server: FileServer, tmp_path: Path, kind: Ranges) -> None:
    """It says that it gives them and gives something else: the file is begun anew, and asked for whole."""
    file = fetched(file_server.add(BODY, headers=TAG, ranges=kind), tmp_path)
    assert file.sha256 == SHA256
    assert ranges(file_server)[-1] is None
    assert ranges(file_server).count(None) == 2


def test_a_server_whose_parts_are_of_another_file(file_server: FileServer, tmp_path: Path) -> None:
    """Nothing is put together that does not belong together, however often it is tried."""
    url = file_server.add(BODY, headers=TAG, ranges="renamed")
    with pytest.raises(InputUnreachable, match=r"changed while it was being fetched \(3 tries\)$"):
        fetched(url, tmp_path)
    assert not list((tmp_path / "a").iterdir())


def test_a_file_that_changes_meanwhile_is_begun_anew(file_server: FileServer, tmp_path: Path) -> None:
    """What arrives is all of the newer one, and nothing of the older."""
    newer = bytes(reversed(BODY))
    url = file_server.add(BODY, headers=TAG, name="x", pause=0.3)

    def change(*_: int) -> None:
        file_server.add(newer, headers={"ETag": '"two"'}, name="x")

    fetch_inputs(
        [InputSource("a", 0, (UrlFile(url=url),))], tmp_path, limited(connections_per_host=2), on_progress=change
    )
    assert (tmp_path / "a" / "0").read_bytes() == newer


def test_a_redirect_is_followed_for_each_part(file_server: FileServer, tmp_path: Path) -> None:
    """Range and If-Range go along, an owner's headers stay where they belong."""
    with FileServer("127.0.0.2") as elsewhere:
        url = file_server.add(redirect_to=elsewhere.add(BODY, headers=TAG))
        assert fetched(url, tmp_path, headers={"X-Api-Key": "hush"}).sha256 == SHA256
        assert len(elsewhere.received) > 2
        assert "hush" not in str(elsewhere.received)


class Shelf(AsyncFileSystem):  # type: ignore[misc] # fsspec has no types
    """A file system in memory, asynchronous as those of clouds are: it has an ETag and no If-Range."""

    protocol = "shelf"
    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[tuple[int, int]]] = []

    async def _info(self, path: str, **_: object) -> dict[str, object]:
        body = self.files[path]
        return {"name": path, "size": len(body), "type": "file", "ETag": hashlib.sha256(body).hexdigest()}

    async def _cat_file(self, path: str, start: int = 0, end: int = 0, **_: object) -> bytes:
        self.asked.append((start, end))
        await asyncio.sleep(0.05 if start else 0)
        return self.files[path][start:end]

    async def open_async(self, path: str, mode: str = "rb", **_: object) -> Taken:
        return Taken(self.files[path])


class Taken(AbstractAsyncStreamedFile):  # type: ignore[misc]
    """One file of it."""

    def __init__(self, body: bytes) -> None:
        self.size = len(body)
        self._rest = io.BytesIO(body)

    async def read(self, length: int = -1) -> bytes:
        return self._rest.read(length)

    async def close(self) -> None: ...


@pytest.fixture
def shelf() -> Iterator[type[Shelf]]:
    fsspec.register_implementation("shelf", Shelf, clobber=True)
    yield Shelf
    Shelf.files.clear()
    Shelf.asked.clear()


@pytest.mark.parametrize("newer", [bytes(reversed(BODY)), BODY[: 15 * MIB]])
def test_an_object_that_changes_meanwhile_is_begun_anew(tmp_path: Path, shelf: type[Shelf], newer: bytes) -> None:
    """Of a store that has no If-Range, it is asked before the first part and after the last."""
    shelf.files["x"] = BODY
    source = InputSource("a", 0, (UrlFile(url="shelf://x"),))
    limits = FetchLimits(schemes=("shelf",), connections_per_host=2)
    seen: list[int] = []

    def change(done: int, *_: int) -> None:
        seen.append(done)
        shelf.files["x"] = newer

    (file,) = fetch_inputs([source], tmp_path, limits, on_progress=change)
    assert (tmp_path / "a" / "0").read_bytes() == newer
    assert file.sha256 == hashlib.sha256(newer).hexdigest()
    assert seen[-1] == len(newer)
    # Begun twice, each part a request of its own.
    assert [start for start, _ in shelf.asked].count(0) == 2
    assert all(end - start <= PIECE for start, end in shelf.asked)


@pytest.mark.s3
def test_a_large_object_comes_in_parts(tmp_path: Path) -> None:
    """From a real store, over several connections."""
    (tmp_path / "s3" / "data").mkdir(parents=True)
    (tmp_path / "s3" / "data" / "x").write_bytes(BODY)
    source = InputSource("a", 0, (UrlFile(url="s3://data/x"),))
    with s3_server(tmp_path / "s3") as options:
        access = Access(storage_options={"s3": options})
        (file,) = fetch_inputs([source], tmp_path / "in", FetchLimits(schemes=("s3",)), access=access)
    assert (file.size, file.sha256) == (len(BODY), SHA256)
    assert (tmp_path / "in" / "a" / "0").read_bytes() == BODY


# Pure: how a file is dealt out


@given(st.integers(1, 3000 * MIB), st.integers(1, 64))
def test_cuts_cover_a_file(size: int, readers: int) -> None:
    """Without gap or overlap, none too large, and only a small file has one that is small."""
    found = list(cuts(size, readers))
    assert [start for start, _ in found] == [0, *(end for _, end in found[:-1])]
    assert found[-1][1] == size
    assert all(end - start <= LARGEST + SMALLEST // 2 for start, end in found)
    assert all(end - start >= SMALLEST // 2 for start, end in found if size >= SMALLEST)


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**32))
def test_however_they_are_read_every_byte_is_read_once(mebibytes: int, readers: int, seed: int) -> None:
    """Readers of any speed that give up and come back: what is read is the file, and the front follows it."""
    chance = random.Random(seed)
    size = mebibytes * MIB
    segments = Segments(size, cuts(size, readers), MIB)
    read = bytearray(mebibytes)
    hands: list[Segment] = []
    while segments.front < size:
        if len(hands) < readers and (taken := segments.take()):
            hands.append(taken)
        assert hands, "bytes are left, and nobody can have them"
        segment = chance.choice(hands)
        end = min(segment.end, segment.at + chance.randint(0, 3) * MIB)
        for at in range(segment.at // MIB, -(-end // MIB)):
            read[at] += 1
        segment.at = end
        if segment.left <= 0:
            segments.done(segment)
            hands.remove(segment)
        elif chance.random() < 0.2:
            segments.give_back(segment)
            hands.remove(segment)
        assert all(read[: segments.front // MIB])
    # Two segments may meet within a MiB: that one both have read a part of.
    assert all(read)
    assert sum(read) <= mebibytes + len(list(cuts(size, readers))) + 64


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"ETag": '"a"'}, '"a"'),
        ({"ETag": 'W/"a"'}, None),
        ({"ETag": "a"}, None),
        ({"ETag": '"a"\r\nX: y"'}, None),
        (
            {
                "ETag": 'W/"a"',
                "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT",
                "Date": "Tue, 02 Jan 2024 00:00:00 GMT",
            },
            None,
        ),
        ({"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}, None),
        ({"Last-Modified": "then", "Date": "now"}, None),
        ({"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT", "Date": "Mon, 01 Jan 2024 00:00:00 GMT"}, None),
        (
            {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT", "Date": "Mon, 01 Jan 2024 00:00:01 GMT"},
            "Mon, 01 Jan 2024 00:00:00 GMT",
        ),
    ],
)
def test_validators(headers: dict[str, str], expected: str | None) -> None:
    assert expected == validator(headers)


@pytest.mark.parametrize(
    ("told", "fits"),
    [
        ("bytes 5-9/20", True),
        ("Bytes 5-9/20", True),
        ("bytes 5-8/20", False),
        ("bytes 4-9/20", False),
        ("bytes 5-9/21", False),
        ("bytes 5-9/*", False),
        ("lines 5-9/20", False),
        ("bytes 5-9/20 ", False),
        ("", False),
        (None, False),
    ],
)
def test_content_ranges(told: str | None, fits: bool) -> None:
    assert fits == is_part(told, 5, 10, 20)
