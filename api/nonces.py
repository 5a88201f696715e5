"""The last nonce accepted for each address: one row an address, exact, and atomic over all processes."""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError
from sqlalchemy import Column, Integer, String, Table, Text, select, tuple_
from sqlalchemy.dialects import postgresql

from api.database import TABLES, Database
from flows.errors import ReplayedNonce

LONGEST: Final = 4_000
"""Characters of a nonce; Python converts numbers of up to 4,300."""

_WRITTEN: Final = re.compile(r"(0|[1-9][0-9]*)(?:\.([0-9]+))?")

# Digits compare as text once their number is known, whatever their size; the C collation keeps a database's
# language out of it.
_Digits = Text().with_variant(postgresql.TEXT(collation="C"), "postgresql")
_TABLE: Final = Table(
    "accepted_nonces",
    TABLES,
    Column("address", String(120), primary_key=True),
    Column("length", Integer, nullable=False),
    Column("whole", _Digits, nullable=False),
    Column("fraction", _Digits, nullable=False),
)

_TEXTS: Final = Table("accepted_texts", TABLES, Column("digest", String(64), primary_key=True))
"""What was signed and accepted, as digests. It is kept for as long as the nonces are: see ``Nonces.accept``."""


def _nonce(value: Any) -> str:
    written = str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else ""
    if len(written) > LONGEST or not _WRITTEN.fullmatch(written):
        raise PydanticCustomError(
            "nonce", "must be a number in plain digits: no sign, no exponent, no leading zero, no blank"
        )
    return written


# The original Provider signs its calls to the operator with milliseconds *with a fraction* (Python's
# ``timestamp() * 1000``), so digits may follow a point. Kept as the text it was written as: that text is signed.
Nonce = Annotated[
    str,
    BeforeValidator(
        _nonce,
        json_schema_input_type=Annotated[str, Field(pattern=f"^{_WRITTEN.pattern}$", max_length=LONGEST)]
        | Annotated[int, Field(ge=0)]
        | Annotated[float, Field(ge=0)],
    ),
]


class Nonces:
    """Accepts, for each address, only numbers greater than the last one accepted."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def accept(self, address: str, nonce: str, text: str = "") -> None:
        """
        Take *nonce* (as ``Nonce`` lets it pass) as the last one of *address*.

        One statement compares and stores, so of several processes offering the same number one succeeds.

        Args:
            text: All that was signed, where the nonce stands beside other digits in it. Whoever sees such a call could
                count some of them to the nonce, which makes it greater: ``…12`` and ``5`` as ``…1`` and ``25``. So a
                text is good once, however it is taken apart.

        Raises:
            ReplayedNonce: It is not greater than the last one, or *text* was accepted before; nothing is changed.
            NotReady: The database does not answer.
        """
        row = {"address": address.lower(), **_parts(nonce)}
        insert = self._database.insert(_TABLE).values(row)
        offered, last = insert.excluded, _TABLE.c
        statement = insert.on_conflict_do_update(
            index_elements=[last.address],
            set_={name: offered[name] for name in ("length", "whole", "fraction")},
            where=tuple_(offered.length, offered.whole, offered.fraction)
            > tuple_(last.length, last.whole, last.fraction),
        ).returning(last.address)
        async with self._database.transaction() as connection:
            if (await connection.execute(statement)).first() is None:
                raise ReplayedNonce
            if text:
                once = self._database.insert(_TEXTS).values(digest=_digest(text)).on_conflict_do_nothing()
                if (await connection.execute(once.returning(_TEXTS.c.digest))).first() is None:
                    raise ReplayedNonce

    async def check(self, address: str, nonce: str, text: str = "") -> None:
        """
        Whether *nonce* would be accepted; it stays unused. For calls that may fail for reasons the caller can wait
        out: these refuse a replay before they cost anything, and use the nonce up when all else is in order.

        Raises:
            ReplayedNonce, NotReady
        """
        offered = _parts(nonce)
        last = await self._last(address)
        if last is not None and last >= (offered["length"], offered["whole"], offered["fraction"]):
            raise ReplayedNonce
        if text:
            known = select(_TEXTS.c.digest).where(_TEXTS.c.digest == _digest(text))
            async with self._database.transaction() as connection:
                if (await connection.execute(known)).first() is not None:
                    raise ReplayedNonce

    async def latest(self, address: str) -> int:
        """
        The last one accepted for *address*, rounded up: adding one makes the next; 0 if there was none.

        Raises:
            NotReady
        """
        last = await self._last(address)
        if last is None:
            return 0
        _, whole, fraction = last
        return int(whole) + bool(fraction)

    async def _last(self, address: str) -> tuple[int, str, str] | None:
        last = _TABLE.c
        statement = select(last.length, last.whole, last.fraction).where(last.address == address.lower())
        async with self._database.transaction() as connection:
            row = (await connection.execute(statement)).first()
        return None if row is None else (row.length, row.whole, row.fraction)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _parts(nonce: str) -> dict[str, Any]:
    whole, _, fraction = nonce.partition(".")
    return {"length": len(whole), "whole": whole, "fraction": fraction.rstrip("0")}
