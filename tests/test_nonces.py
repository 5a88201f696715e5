"""One contract of the nonces, over both databases, and over processes."""

from __future__ import annotations

import asyncio
import multiprocessing
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from api.database import Database
from api.nonces import Nonces
from flows.errors import NotReady, ReplayedNonce

ADDRESS = "0xC41808BBef371AD5CFc76466dDF9dEe228d2BdAA"
RACES = 300


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        server = pytest.importorskip("pgserver.postgres_server").get_server(Path(folder) / "data")
        yield server.get_uri().replace("postgresql://", "postgresql+asyncpg://")
        server.cleanup()


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path}/nonces.db"
    return str(request.getfixturevalue("postgres"))


def accepted(url: str, *offered: tuple[str, str]) -> list[bool]:
    """Which of the (address, nonce) were accepted, by one process that opens, asks and closes."""

    async def ask() -> list[bool]:
        async with opened(url) as nonces:
            return [await _accepts(nonces, *pair) for pair in offered]

    return asyncio.run(ask())


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Nonces]:
    database = Database(url)
    await database.open()
    yield Nonces(database)
    await database.close()


async def _accepts(nonces: Nonces, address: str, nonce: str) -> bool:
    try:
        await nonces.accept(address, nonce)
    except ReplayedNonce:
        return False
    return True


def test_only_a_greater_nonce_is_accepted(url: str, request: pytest.FixtureRequest) -> None:
    """By its value, not its text; an equal one is a replay; a fraction counts."""
    me = request.node.name
    numbers = ["0", "0", "9", "10", "9", "10", "10.0", "10.5", "10.50", "10.45", "10.51", "11", "100", "99.99"]
    expected = [True, False, True, True, False, False, False, True, False, False, True, True, True, False]
    assert expected == accepted(url, *((me, number) for number in numbers))


def test_integers_are_exact_at_any_size(url: str, request: pytest.FixtureRequest) -> None:
    """Beyond what doubles, 64 bits, 256 bits and numeric columns hold."""
    me = request.node.name
    for digits in (15, 16, 18, 19, 77, 1_000, 20_000):
        base = "9" * digits
        assert [True, True, False] == accepted(url, (me, base + "1"), (me, base + "2"), (me, base + "1")), digits


def test_each_address_counts_for_itself_whatever_its_case(url: str) -> None:
    """Addresses compare case-insensitively."""
    assert [True, False, True] == accepted(url, (ADDRESS, "5"), (ADDRESS.lower(), "5"), ("0x2", "5"))


def test_what_was_accepted_outlives_the_process(url: str, request: pytest.FixtureRequest) -> None:
    """A restart forgets no nonce."""
    me = request.node.name
    assert [True] == accepted(url, (me, "5"))
    assert [False, True] == accepted(url, (me, "5"), (me, "6"))


def race(url: str, address: str, start: Barrier, won: Queue[list[int]]) -> None:
    """One of the processes: offers 1, 2, 3 … as fast as it can."""
    start.wait()
    answers = accepted(url, *((address, str(nonce)) for nonce in range(1, RACES + 1)))
    won.put([nonce for nonce, yes in enumerate(answers, 1) if yes])


def test_of_two_processes_one_gets_each_nonce(url: str, request: pytest.FixtureRequest) -> None:
    """Both make the table, both offer the same numbers in the same order; each number is accepted once."""
    context = multiprocessing.get_context("spawn")
    start, won = context.Barrier(2), context.Queue()
    racers = [context.Process(target=race, args=(url, request.node.name, start, won)) for _ in range(2)]
    for racer in racers:
        racer.start()
    wins: list[list[int]] = [won.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join()
    assert dict.fromkeys(range(1, RACES + 1), 1) == Counter(nonce for of_one in wins for nonce in of_one)


def test_a_check_uses_nothing_up(url: str, request: pytest.FixtureRequest) -> None:
    """And says what accepting would say; the latest, plus one, is always acceptable."""
    me = request.node.name

    async def ask() -> list[int]:
        async with opened(url) as nonces:
            seen = [await nonces.latest(me)]
            for nonce in ("5", "7.5", "9" * 80):
                await nonces.check(me, nonce)
                await nonces.check(me, nonce)
                await nonces.accept(me, nonce)
                with pytest.raises(ReplayedNonce):
                    await nonces.check(me, nonce)
                seen.append(await nonces.latest(me))
            await nonces.accept(me, str(seen[-1] + 1))
            return seen

    assert [0, 5, 8, int("9" * 80)] == asyncio.run(ask())


def test_of_many_at_once_one_gets_the_nonce(url: str, request: pytest.FixtureRequest) -> None:
    """Twenty requests of one process with one nonce."""

    async def rush() -> list[Any]:
        async with opened(url) as nonces:
            return await asyncio.gather(*(_accepts(nonces, request.node.name, "7") for _ in range(20)))

    assert [False] * 19 + [True] == sorted(asyncio.run(rush()))


def test_a_database_that_does_not_answer_is_not_a_verdict() -> None:
    """Neither accepted nor replayed: ask again later."""

    async def ask() -> None:
        database = Database("postgresql+asyncpg://nobody@127.0.0.1:1/none")
        try:
            await Nonces(database).accept(ADDRESS, "1")
        finally:
            await database.close()

    with pytest.raises(NotReady):
        asyncio.run(ask())
