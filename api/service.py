"""What the handlers work with, put together once in ``api.app``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Annotated, cast

from fastapi import Depends
from fastapi.requests import Request

from api import wire
from api.agreements import Agreements
from api.auth import Caller, ConsumerGate, OperatorGate
from api.links import Links
from api.settings import Settings
from blocks.assets import spellings
from flows.broker import Broker
from flows.errors import AgreementInUse, JobNotFound, NoSelector
from flows.jobs import Job, JobQuery, Jobs, only_job, parse_job_id
from flows.workflow import Workflow


@dataclass(frozen=True)
class Service:
    settings: Settings
    jobs: Jobs
    broker: Broker
    gate: OperatorGate
    consumers: ConsumerGate
    agreements: Agreements
    links: Links

    @property
    def address(self) -> str:
        """This provider's, "" without a key."""
        return self.broker.key.address if self.broker.key else ""

    async def start(self, workflow: Workflow, earlier: Job | None = None) -> Job:
        """
        A new job of a consumer; or *earlier* once more, under its id.

        Raises:
            AgreementInUse: The agreement has had its job, also if that was deleted.
            As ``Jobs.submit`` and ``Jobs.restart``.
        """
        if earlier is not None:
            return await self.jobs.restart(earlier.id, workflow)
        used_for = await self.agreements.job_of(workflow.agreement_id)
        if used_for is not None and not await self.jobs.find(JobQuery(job_id=used_for)):
            raise AgreementInUse
        job = await self.jobs.submit(workflow)
        await self.agreements.use(workflow.agreement_id, job.id)
        return job

    async def own_job(self, job_id: str, caller: Caller) -> Job:
        """The caller's job of this id. Raises JobNotFound, also for another's: nobody learns which ids there are."""
        job = await only_job(self.jobs, parse_job_id(job_id))
        if job.owner.lower() != caller.address:
            raise JobNotFound(f"No job {parse_job_id(job_id)}")
        return job

    async def jobs_for(self, query: JobQuery, caller: Caller) -> list[Job]:
        """
        The jobs that match, of an owner where one is given; a job named by its id also for those on its whitelist, and
        for admins.

        Raises:
            NoSelector: Nothing is given.
        """
        if query.empty:
            raise NoSelector
        owner = query.owner
        found = await any_spelling(self.jobs.find, replace(query, owner=None) if query.job_id else query)
        if not query.job_id or owner is None or caller.admin:
            return found
        return [job for job in found if job.owner.lower() == owner.lower() or caller.address in job.whitelist]

    async def environments(
        self, chain_id: int | None, *, by_chain: bool
    ) -> list[wire.Environment] | dict[str, list[wire.Environment]]:
        """What is on offer; of one chain, or by chain id where the caller or the settings ask for that."""
        offered = await self.broker.offers()
        states = [state for state in await self.jobs.environments() if state.offer.id in offered]
        known = tuple(self.broker.chains)

        def on(chain: int | None) -> list[wire.Environment]:
            serving = self.broker.chains.get(chain) if chain is not None else None
            token = serving.config.fee_token if serving else ""
            return [wire.environment(state, address=self.address, fee_token=token) for state in states]

        if by_chain or self.settings.environments_by_chain:
            # Without a chain what is free is on offer to whoever asks, whichever chain it is asked for.
            chains = known or ((chain_id,) if chain_id is not None else ())
            return {str(chain): on(chain) for chain in chains if chain_id in (None, chain)}
        return (
            [] if chain_id is not None and known and chain_id not in known else on(chain_id or next(iter(known), None))
        )


async def any_spelling(act: Callable[[JobQuery], Awaitable[list[Job]]], query: JobQuery) -> list[Job]:
    """Find, stop or delete by an agreement with or without 0x: by the first of its spellings that has a job."""
    if query.agreement_id is None:
        return await act(query)
    for spelling in spellings(query.agreement_id):
        if found := await act(replace(query, agreement_id=spelling)):
            return found
    return []


def _service(request: Request) -> Service:
    return cast(Service, request.app.state.service)


ServiceDep = Annotated[Service, Depends(_service)]
