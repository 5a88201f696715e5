"""The last nonce accepted for each address: one row an address, exact, and atomic over all processes."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError
from sqlalchemy import Column, Integer, MetaData, String, Table, Text, text, tuple_
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.schema import CreateTable

from flows.errors import NotReady, ReplayedNonce

_WRITTEN: Final = re.compile(r"(0|[1-9][0-9]*)(?:\.([0-9]+))?")
_SECONDS_TO_WAIT: Final = 30

# Digits compare as text once their number is known, whatever their size; the C collation keeps a database's
# language out of it.
_Digits = Text().with_variant(postgresql.TEXT(collation="C"), "postgresql")
_TABLE: Final = Table(
    "accepted_nonces",
    MetaData(),
    Column("address", String(120), primary_key=True),
    Column("length", Integer, nullable=False),
    Column("whole", _Digits, nullable=False),
    Column("fraction", _Digits, nullable=False),
)
_CREATING: Final = 0x6332646E  # any number, the same in every process: serialises CREATE TABLE in PostgreSQL


def _nonce(value: Any) -> str:
    written = str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else ""
    if not _WRITTEN.fullmatch(written):
        raise PydanticCustomError(
            "nonce", "must be a number in plain digits: no sign, no exponent, no leading zero, no blank"
        )
    return written


# The original Provider signs its calls to the operator with milliseconds *with a fraction* (Python's
# ``timestamp() * 1000``), so digits may follow a point. Kept as the text it was written as: that text is signed.
Nonce = Annotated[str, BeforeValidator(_nonce)]


class Nonces:
    """Accepts, for each address, only numbers greater than the last one accepted."""

    def __init__(self, url: str) -> None:
        self._engine = create_async_engine(
            url,
            pool_pre_ping=True,
            hide_parameters=True,
            connect_args={"timeout": _SECONDS_TO_WAIT},
        )
        self._insert = sqlite.insert if self._engine.dialect.name == "sqlite" else postgresql.insert

    async def open(self) -> None:
        """Make the table unless it is there. Several processes may do so at once."""
        async with self._engine.begin() as connection:
            if self._engine.dialect.name == "postgresql":
                await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _CREATING})
            else:
                await connection.execute(text("PRAGMA journal_mode=WAL"))
            await connection.execute(CreateTable(_TABLE, if_not_exists=True))

    async def close(self) -> None:
        await self._engine.dispose()

    async def accept(self, address: str, nonce: str) -> None:
        """
        Take *nonce* (as ``Nonce`` lets it pass) as the last one of *address*.

        One statement compares and stores, so of several processes offering the same number one succeeds.

        Raises:
            ReplayedNonce: It is not greater than the last one; nothing is changed.
            NotReady: The database does not answer.
        """
        whole, _, fraction = nonce.partition(".")
        row = {"address": address.lower(), "length": len(whole), "whole": whole, "fraction": fraction.rstrip("0")}
        insert = self._insert(_TABLE).values(row)
        offered, last = insert.excluded, _TABLE.c
        statement = insert.on_conflict_do_update(
            index_elements=[last.address],
            set_={name: offered[name] for name in ("length", "whole", "fraction")},
            where=tuple_(offered.length, offered.whole, offered.fraction)
            > tuple_(last.length, last.whole, last.fraction),
        ).returning(last.address)
        try:
            async with self._engine.begin() as connection:
                accepted = (await connection.execute(statement)).first()
        except (OperationalError, InterfaceError, OSError) as fault:
            raise NotReady("The nonce database cannot be reached; try again later") from fault
        if accepted is None:
            raise ReplayedNonce
