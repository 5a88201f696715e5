"""
Which agreements have had their job. An order and an agreement are good for one; deleted, it is forgotten by the jobs
and not by this list, else one payment would do for any number of them, one after another.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Column, String, Table, select

from api.database import TABLES, Database

_USED: Final = Table(
    "used_agreements",
    TABLES,
    Column("agreement", String(200), primary_key=True),
    Column("job_id", String(32), nullable=False),
)


class Agreements:
    """Remembers, over all processes of the service, the job that each agreement was used for."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def job_of(self, agreement: str) -> str | None:
        """The id of the job, which may be gone. Raises NotReady."""
        async with self._database.transaction() as connection:
            return (await connection.execute(select(_USED.c.job_id).where(_USED.c.agreement == agreement))).scalar()

    async def use(self, agreement: str, job_id: str) -> None:
        """Of several jobs the first counts. Raises NotReady."""
        statement = self._database.insert(_USED).values(agreement=agreement, job_id=job_id)
        async with self._database.transaction() as connection:
            await connection.execute(statement.on_conflict_do_nothing(index_elements=[_USED.c.agreement]))
