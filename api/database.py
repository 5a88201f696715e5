"""The API's own small database: what has to be exact over all of its processes. SQLite embedded, or PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from sqlalchemy import MetaData, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.schema import CreateTable
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_random

from flows.errors import NotReady

TABLES: Final = MetaData()
"""Every table of it; each is defined where it is used."""

_SECONDS_TO_WAIT: Final = 30
_CREATING: Final = 0x6332646E  # any number, the same in every process: serialises CREATE TABLE in PostgreSQL


class Database:
    """
    One pool of connections to *url*, ``sqlite+aiosqlite:///<file>`` or ``postgresql+asyncpg://…``. Any number of
    processes may use one database.
    """

    def __init__(self, url: str) -> None:
        self._engine = create_async_engine(
            url,
            pool_pre_ping=True,
            hide_parameters=True,
            connect_args={"timeout": _SECONDS_TO_WAIT},
        )
        self.insert = sqlite.insert if self._engine.dialect.name == "sqlite" else postgresql.insert
        """The dialect's INSERT, which both have with ``on_conflict_do_update``."""

    async def open(self) -> None:
        """Make the tables unless they are there. Several processes may do so at once."""
        async with self._engine.begin() as connection:
            if self._engine.dialect.name == "postgresql":
                await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _CREATING})
            else:
                # Of two processes that do this at the same moment SQLite refuses one at once, however long it was told
                # to wait.
                async for attempt in AsyncRetrying(
                    retry=retry_if_exception_type(OperationalError),
                    wait=wait_random(0.01, 0.1),
                    stop=stop_after_delay(_SECONDS_TO_WAIT),
                    reraise=True,
                ):
                    with attempt:
                        await connection.execute(text("PRAGMA journal_mode=WAL"))
            for table in TABLES.sorted_tables:
                await connection.execute(CreateTable(table, if_not_exists=True))

    async def close(self) -> None:
        await self._engine.dispose()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """
        A transaction, committed at the end.

        Raises:
            NotReady: The database does not answer.
        """
        try:
            async with self._engine.begin() as connection:
                yield connection
        except (OperationalError, InterfaceError, OSError) as fault:
            raise NotReady("The database of nonces and tokens cannot be reached; try again later") from fault
