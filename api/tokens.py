"""Auth tokens of the Provider dialect: one signature instead of one for each call, until they expire or are deleted."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Final
from uuid import uuid4

from itsdangerous import BadData, URLSafeSerializer
from sqlalchemy import BigInteger, Column, String, Table, delete, select

from api.database import TABLES, Database
from api.links import derived_keys
from flows.errors import BadToken, InvalidParameter

LONGEST_LIFE: Final = 30 * 86_400
"""Seconds."""

_PURPOSE: Final = b"auth tokens"
_DELETED: Final = Table(
    "deleted_tokens",
    TABLES,
    # Of the token, and not the token: its text can be spelt in several ways.
    Column("name", String(32), primary_key=True),
    Column("expires", BigInteger, nullable=False),
)


class Tokens:
    """
    A token is signed by this service and says whose it is and until when; nothing has to be stored of it. The
    original signed it with the *address*, which everybody knows.
    """

    def __init__(self, database: Database, key_file: Path) -> None:
        self._database = database
        self._serializer = URLSafeSerializer(
            derived_keys(key_file, _PURPOSE), salt=_PURPOSE, signer_kwargs={"digest_method": hashlib.sha256}
        )

    def create(self, address: str, expiration: int) -> str:
        """
        A token of *address*, good until *expiration* (Unix time, seconds).

        Raises:
            InvalidParameter: It would have expired already, or live longer than ``LONGEST_LIFE``.
        """
        left = expiration - time.time()
        if left <= 0:
            raise InvalidParameter("expiration: lies in the past; give a Unix time in seconds")
        if left > LONGEST_LIFE:
            raise InvalidParameter(f"expiration: at most {LONGEST_LIFE // 86_400} days from now")
        return str(self._serializer.dumps([address.lower(), expiration, uuid4().hex]))

    async def holder(self, token: str) -> str:
        """
        The address in lower case whose *token* it is.

        Raises:
            BadToken: Not one of this service, expired, or deleted.
            NotReady
        """
        return (await self._read(token))[0]

    async def delete(self, token: str, address: str) -> None:
        """
        The token is good for nothing from now on.

        Raises:
            BadToken: As ``holder``, or it is not that of *address*.
            NotReady
        """
        holder, expires, name = await self._read(token)
        if holder != address.lower():
            raise BadToken("The token is another address's")
        statement = self._database.insert(_DELETED).values(name=name, expires=expires)
        async with self._database.transaction() as connection:
            await connection.execute(delete(_DELETED).where(_DELETED.c.expires < int(time.time())))
            await connection.execute(statement.on_conflict_do_nothing(index_elements=[_DELETED.c.name]))

    async def _read(self, token: str) -> tuple[str, int, str]:
        try:
            address, expires, name = self._serializer.loads(token)
        except BadData:
            raise BadToken("The token is not one of this service") from None
        if expires <= time.time():
            raise BadToken("The token has expired")
        async with self._database.transaction() as connection:
            deleted = await connection.execute(select(_DELETED.c.name).where(_DELETED.c.name == name))
        if deleted.first() is not None:
            raise BadToken("The token has been deleted")
        return address, expires, name
