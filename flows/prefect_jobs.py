"""Jobs over the Prefect API: a flow run is a job, its id is the job's id."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final
from uuid import UUID, uuid4

import httpx
from cachetools import LRUCache, TTLCache
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterType,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterId,
    FlowRunFilterNextScheduledStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
    WorkPoolFilter,
    WorkPoolFilterName,
    WorkQueueFilter,
    WorkQueueFilterId,
    WorkQueueFilterName,
)
from prefect.client.schemas.objects import Artifact, FlowRun, State, StateType, TaskRun
from prefect.client.schemas.responses import SetStateStatus
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Cancelled, Cancelling, Scheduled

from blocks.environment import ComputeEnvironment, load_environments
from blocks.limits import FetchLimits, Offer
from blocks.remote import Access
from blocks.store import Manifest, NotStored, StoreUnavailable
from flows.build import fetch_key, waiting_key
from flows.compute import DOCUMENT
from flows.environments import COORDINATORS
from flows.errors import AgreementInUse, JobNotFound, NoSuchResult, NotReady, NotRestartable
from flows.jobs import (
    EnvironmentState,
    Expiry,
    Job,
    JobQuery,
    Jobs,
    Result,
    Transition,
    as_of,
    check_takes_over,
    document_digest,
    expiry_of,
    not_restartable,
    only_job,
    overdue,
    results_expired,
    summary_of,
    waited_too_long,
)
from flows.plan import Plan, compile_plan
from flows.reasons import (
    RESUMING,
    STAGE_BEGINS,
    STAGE_INTERRUPTED,
    STOPPING,
    seconds_left,
    silent,
    why_ended,
    why_live,
    why_stages_wait,
    why_waiting,
)
from flows.sealing import Seal
from flows.stages import FLOW_NAME, counts, is_spread, runs_of_jobs, stage_of
from flows.states import (
    STOPPED_IN_QUEUE,
    Steps,
    as_it_goes_on,
    expired_in_queue,
    goes_on,
    has_begun,
    history,
    is_taken_out,
    live_status,
    of_tries,
    outcomes,
    queued_at,
    restarted_at,
    run_status,
    stage_finished,
    steps_of,
    stop_request,
    taken_out_of_the_queue,
    told_as_crashed,
    transitions,
)
from flows.status import BY_TEXT, Phase, Status, status_of
from flows.workflow import Workflow
from tasks.workspace import remove_job

PAGE: Final = 200
"""Rows Prefect answers at most in one request (``server.api.default_limit``)."""

LARGEST_PARAMETER: Final = 256 * 1024
"""Characters of a sealed document kept in a run's parameters; Prefect refuses 512 kB of parameters in all."""

STOP_DEADLINE: Final = 15
"""Seconds a stop waits for the job's process to be gone before it answers all the same."""

BEGINNING: Final = 2.0
"""Seconds that a stop leaves to a job which a worker has taken and not begun, for its process to hear of it."""

LOOK_AGAIN: Final = 0.25
"""Seconds between two looks at a job that is being stopped."""

PLACES: Final = 25
"""Waiting jobs of one answer that are told how many are before them; each costs a request."""

AT_ONCE: Final = 20
"""Jobs that are ended at the same time because they have waited for too long."""

SETTLED: Final = 30.0
"""Seconds after a run's end until its task runs are surely recorded: Prefect records them behind the run."""

RESTARTS: Final = "job-restarts"
"""Name of Prefect's concurrency limit that lets only one restart happen at a time, whichever API it is asked of."""

RESTART_DECAY: Final = 0.02
"""Slots a second that it frees by itself: of an API that died with the slot nothing is left after 50 s."""

KEPT: Final = "kept"
"""Tag of a run that may have left something: since it was taken in or restarted, until that was removed."""

REMOVING: Final = "removing:"
"""
What begins a second tag of a run while what it left is being removed; the Unix time of the beginning follows.

A tag and not a lock: Prefect's limits forget a holder after a while (``RESTART_DECAY``), and a removal that takes
longer than that must not meet a restart.
"""

DELETING: Final = "deleting"
"""
Tag of a run that is being deleted. From then on there is no such job; its record stays, and its agreement with it,
until all that it left is gone, so that a deletion that was cut off is known of and finished.
"""

PATIENCE: Final = 5.0
"""Seconds a deletion waits for its turn among the restarts."""

LOOK_UP: Final = 2.0
"""Seconds a status waits for the store to tell what there is; a stop has to be answered also while a store hangs."""

TOLD: Final = 3.0
"""
Seconds after the end of its process until nothing more arrives of a run. Workers send their log lines every two
seconds, Prefect takes those of a run that is deleted as well, and then nobody can remove them any more.
"""

REMOVAL_SECONDS: Final = 3600.0
"""After so long whoever began a removal is taken for dead, and another takes it up."""

_NOWHERE: Final = "The environment of this job is not registered any more, so its results cannot be deleted."

LIVE_STATES: Final = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING]
_WAITING: Final = [StateType.SCHEDULED]
IN_PROGRESS: Final = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
"""Of runs that a worker has, or is about to begin."""
_ENDED: Final = [StateType.COMPLETED, StateType.FAILED, StateType.CRASHED, StateType.CANCELLED]

_JOBS: Final = FlowFilter(name=FlowFilterName(any_=[FLOW_NAME]))


def _owner_tag(owner: str) -> str:
    return f"owner:{owner.lower()}"


def _agreement_tag(agreement_id: str) -> str:
    return f"agreement:{agreement_id}"


def _environment_tag(environment: str) -> str:
    return f"environment:{environment}"


def _document_tag(document_id: str) -> str:
    return f"document:{document_id}"


def _tags(plan: Plan) -> list[str]:
    return [
        _owner_tag(plan.owner),
        _agreement_tag(plan.agreement_id),
        *map(_environment_tag, plan.environments),
        _document_tag(summary_of(plan)["document"]),
        KEPT,
    ]


def _wanted(query: JobQuery) -> FlowRunFilter:
    tags = [
        *([_owner_tag(query.owner)] if query.owner else []),
        *([_agreement_tag(query.agreement_id)] if query.agreement_id else []),
        *([_document_tag(query.document_id)] if query.document_id else []),
    ]
    return FlowRunFilter(
        id=FlowRunFilterId(any_=[UUID(query.job_id)]) if query.job_id else None,
        tags=FlowRunFilterTags(all_=tags) if tags else None,
    )


def _in_states(kinds: Sequence[StateType], *tags: str) -> FlowRunFilter:
    return FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(kinds))),
        tags=FlowRunFilterTags(all_=list(tags)) if tags else None,
    )


def _by_ids(run_ids: Iterable[UUID]) -> FlowRunFilter:
    return FlowRunFilter(id=FlowRunFilterId(any_=list(run_ids)))


def _environments(run: FlowRun) -> list[str]:
    """Those of a run of a job, or of a stage; that of the first stage first."""
    names: list[str] = run.parameters["summary"]["environments"]
    return names


def is_job(run: FlowRun) -> bool:
    """Whether it was submitted as a job. Stages, flows of the upkeep and what an operator starts by hand are none."""
    return "fingerprint" in (run.parameters.get("summary") or {})


LIVE: Final = _in_states(LIVE_STATES)
"""Runs that have not ended."""


@asynccontextmanager
async def _reaching_out() -> AsyncIterator[None]:
    """A server or store that is away or broken is NotReady for the caller, not a bug of ours."""
    try:
        yield
    except (httpx.TransportError, PrefectHTTPStatusError) as fault:
        if isinstance(fault, PrefectHTTPStatusError) and fault.response.status_code < 500:
            raise
        raise NotReady("The workflow engine cannot be reached; try again in a moment.") from None
    except StoreUnavailable:
        raise NotReady("The store of results cannot be reached; try again in a moment.") from None
    except NotStored:
        raise NoSuchResult("This result is not in the store any more.") from None


class PrefectJobs(Jobs):
    """
    Jobs of one Prefect server. Holds no state of its own but caches; any number of these can serve one server.

    Args:
        client: Entered by the caller, for as long as this is used. Loading of blocks goes by ``PREFECT_API_URL`` all
            the same, so it has to name the same server.
        seal: The service's key; the workers have the same.
        local_workers: The workers run on this machine, so that an environment which cannot shut an algorithm in
            is known before a job is taken.
    """

    def __init__(self, client: PrefectClient, seal: Seal, *, local_workers: bool = False) -> None:
        self._client = client
        self._seal = seal
        self._local_workers = local_workers
        self._blocks_cache: TTLCache[None, dict[str, ComputeEnvironment]] = TTLCache(1, ttl=5)
        self._offers_cache: TTLCache[None, list[EnvironmentState]] = TTLCache(1, ttl=1)
        self._deployments: TTLCache[str, UUID] = TTLCache(1_000, ttl=30)
        self._restarting = asyncio.Lock()
        self._limit_made = False
        self._ended: LRUCache[tuple[UUID, UUID], Job] = LRUCache(10_000)

    async def submit(self, workflow: Workflow) -> Job:
        async with _reaching_out():
            blocks = await self._blocks()
            offers = {name: block.offer for name, block in blocks.items()}
            # Off the event loop: the largest documents take seconds.
            plan = await asyncio.to_thread(compile_plan, workflow, offers)
            environment = blocks[plan.stages[0].environment]
            for name in plan.environments:
                await self._check_shuts_in(blocks[name])
                await self._deployment(name)
            parameters = await self._parameters(workflow, plan, environment)
            try:
                run = await self._create(plan, environment.offer.id, parameters)
            except BaseException:
                await _remove_document(blocks, parameters)
                raise
            if run.parameters["sealed"] != parameters["sealed"]:
                await _remove_document(blocks, parameters)
        if DELETING in run.tags:
            raise NotReady("The job that had this agreement is still being deleted; try again in a moment.")
        if run.parameters["summary"]["fingerprint"] != parameters["summary"]["fingerprint"]:
            raise AgreementInUse
        return (await self._jobs_of([run]))[0]

    async def find(self, query: JobQuery) -> list[Job]:
        if query.empty:
            return []
        async with _reaching_out():
            return await self._jobs_of(await self._runs(_wanted(query)))

    async def running(self) -> list[Job]:
        async with _reaching_out():
            return await self._jobs_of(await self._runs(LIVE))

    async def stop(self, query: JobQuery) -> list[Job]:
        live = [job for job in await self.find(query) if not job.ended]
        async with _reaching_out():
            await asyncio.gather(*(self._cancel_job(UUID(job.id), spread=bool(job.places)) for job in live))
        return await self.find(query)

    async def restart(self, job_id: str, workflow: Workflow | None = None) -> Job:
        async with _reaching_out():
            run, job = await self._restartable(job_id)
            blocks = await self._blocks()
            if any(name not in blocks for name in job.environments):
                raise NotReady("The environment of this job is not registered any more.")
            environment = blocks[job.environment]
            parameters = tags = None
            if workflow is not None:
                offers = {name: block.offer for name, block in blocks.items()}
                plan = await asyncio.to_thread(compile_plan, workflow, offers)
                check_takes_over(job, plan)
                parameters, tags = await self._parameters(workflow, plan, environment), _tags(plan)
            try:
                for name in job.environments:
                    await self._check_shuts_in(blocks[name])
                before = await self._requeue(run, environment, parameters, tags)
            except BaseException:
                if parameters is not None:
                    await _remove_document(blocks, parameters)
                raise
            if parameters is not None:
                # Not before: what waits must find its document, whatever becomes of us.
                await _remove_document(blocks, before)
        return await only_job(self, job_id)

    async def delete(self, query: JobQuery) -> list[Job]:
        if query.empty:
            return []
        async with _reaching_out():
            # Those as well whose deletion was begun before: "not found" would tell whoever asks again that all of it
            # is gone, while it may still lie in a store that was away.
            runs = await self._runs(_wanted(query), deleting=True)
            blocks = await self._blocks() if runs else {}
            if any(name not in blocks for run in runs for name in _environments(run)):
                # Their records are the only thing that knows of their files, so they must not go before them. Not
                # begun, so that they can still be seen.
                raise NotReady(_NOWHERE)
            runs = await self._begin_deletions(runs)
            jobs, faults = await self._delete(runs)
        if faults:
            raise faults[0]
        at = datetime.now(UTC)
        return [
            replace(
                job,
                expires=None,
                expired=False,
                status=Status.DELETED,
                detail="",
                reason="deleted on request, with everything it left",
                finished=job.finished or at,
                stopped_in=job.stopped_in if job.status is Status.STOPPED else job.status,
                history=(*job.history, Transition(Status.DELETED, at)),
                results=(),
                removed=True,
            )
            for job in jobs
        ]

    async def finish_deletions(self, *environments: str, most: int = 100) -> Expiry:
        async with _reaching_out():
            of_any = [_environment_tag(name) for name in environments] or None
            tags = FlowRunFilterTags(all_=[DELETING], any_=of_any)
            begun = await self._runs(FlowRunFilter(tags=tags), deleting=True)
            # Any of them: those that cannot be finished, for want of their store, are not to hold up the others.
            runs = random.sample(begun, min(most, len(begun)))
            removed, faults = await self._delete(runs)
            gone = {job.id for job in removed}
            failed = await self._jobs_of([run for run in runs if run.id.hex not in gone]) if faults else []
        return Expiry(tuple(removed), tuple(failed))

    async def expire_waiting(self, environment: str, *, most: int = 100) -> list[Job]:
        async with _reaching_out():
            block = (await self._blocks()).get(environment)
            if block is None:
                return []
            tag = _environment_tag(environment)
            # Those whose end was cut off are not scheduled any more. Also where nobody waits for too long: they may
            # have been taken out to be stopped.
            pending = await self._runs(_in_states([StateType.PENDING], tag), stages=True)
            found = [run for run in pending if is_taken_out(run.state)]
            if block.offer.max_wait:
                wanted = _in_states(_WAITING, tag)
                wanted.next_scheduled_start_time = FlowRunFilterNextScheduledStartTime(
                    before_=datetime.now(UTC) - timedelta(seconds=block.offer.max_wait)
                )
                found.extend(await self._runs(wanted, most=most, stages=True))
            found = found[:most]
            # Of stages that have waited for too long the job's own run tells, a moment later.
            await self._end_overdue([run for run in found if stage_of(run) is not None])
            jobs = await self._jobs_of([run for run in found if stage_of(run) is None])
        return [job for job in jobs if job.status is Status.EXPIRED_IN_QUEUE]

    async def expire(self, environment: str, *, grace: float = 0.0, most: int = 100) -> Expiry:
        removed: list[Job] = []
        failed: list[Job] = []
        async with _reaching_out():
            # Not as the cache has it: what is removed is gone.
            blocks = await load_environments(self._client)
            block = blocks.get(environment)
            if block is None:
                return Expiry()
            before = datetime.now(UTC) - timedelta(seconds=block.offer.storage_expiry + grace)
            wanted = _in_states(_ENDED, _environment_tag(environment), KEPT)
            wanted.end_time = FlowRunFilterEndTime(before_=before)
            for run in (await self._runs(wanted, most=most))[:most]:
                parameters = await self._begin_removal(run.id, before)
                if parameters is None:
                    continue
                (job,) = await self._jobs_of([run])
                try:
                    await _remove_results(blocks, run)
                    await _remove_document(blocks, parameters)
                except StoreUnavailable:
                    failed.append(job)
                    await self._end_removal(run.id, kept=True)
                else:
                    removed.append(job)
                    await self._end_removal(run.id, kept=False)
        return Expiry(tuple(removed), tuple(failed))

    async def sweep_handovers(self, environment: str) -> list[str]:
        """
        Remove what stages of jobs that are completed, or no more, have handed over in *environment*. Whoever was to do
        that has died before. Answers those jobs. Raises NotReady.
        """
        async with _reaching_out():
            block = (await load_environments(self._client)).get(environment)
            if block is None:
                return []
            store = block.handover()
            # First what is there, then the jobs: a job comes before what it leaves.
            found = await asyncio.to_thread(lambda: list(store.jobs()))
            wanted: set[str] = set()
            for chunk in _chunks([UUID(job_id) for job_id in found], 50):
                runs = await self._client.read_flow_runs(flow_run_filter=_by_ids(chunk))
                wanted.update(run.id.hex for run in runs if not (run.state and run.state.is_completed()))
            swept = [job_id for job_id in found if job_id not in wanted]
            for job_id in swept:
                await asyncio.to_thread(store.delete_job, job_id)
        return swept

    async def unattended(self) -> int:
        """
        Jobs that have left something and whose environment is not registered any more: nothing says for how long it
        is to be kept, nor where it is.
        """
        async with _reaching_out():
            tags = [_environment_tag(name) for name in await load_environments(self._client)]
            left, known = await asyncio.gather(
                self._client.count_flow_runs(flow_filter=_JOBS, flow_run_filter=_in_states(_ENDED, KEPT)),
                self._client.count_flow_runs(
                    flow_filter=_JOBS,
                    flow_run_filter=FlowRunFilter(
                        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_ENDED)),
                        tags=FlowRunFilterTags(all_=[KEPT], any_=tags),
                    ),
                ),
            )
        return left - known

    async def environments(self) -> list[EnvironmentState]:
        known = self._offers_cache.get(None)
        if known is None:
            async with _reaching_out():
                blocks = await self._blocks()
                known = await asyncio.gather(*(self._environment_state(b) for _, b in sorted(blocks.items())))
            self._offers_cache[None] = known
        return known

    async def sources(self) -> list[tuple[FetchLimits, Access]]:
        """How each environment may fetch and what it fetches with, by id. Raises NotReady."""
        async with _reaching_out():
            return [(block.offer.fetch, block.access()) for _, block in sorted((await self._blocks()).items())]

    async def read(self, job_id: str, index: int, start: int, end: int) -> Iterator[bytes]:
        async with _reaching_out():
            block, name = await self._stored(job_id, index)
            return await asyncio.to_thread(block.store().stream, job_id, name, start, end)

    async def link(self, job_id: str, index: int, disposition: str, media_type: str) -> str | None:
        async with _reaching_out():
            if not any(block.link_seconds for block in (await self._blocks()).values()):
                return None
            block, name = await self._stored(job_id, index)
            if not block.link_seconds:
                return None
            link = partial(block.store().link, disposition=disposition, media_type=media_type)
            return await asyncio.to_thread(link, job_id, name, block.link_seconds)

    async def _stored(self, job_id: str, index: int) -> tuple[ComputeEnvironment, str]:
        """Where a result is: in the store of which environment, under which name. Raises as ``read``."""
        job = await only_job(self, job_id)
        if job.expired:
            raise results_expired(job)
        if not 0 <= index < len(job.results):
            raise NoSuchResult(f"No such index {index} in this compute job")
        blocks = await self._blocks()
        files = Manifest.merged(parts).ordered() if (parts := await self._parts(job, blocks)) else ()
        if not files:
            raise NoSuchResult(f"No results for job {job_id}")
        if index >= len(files):
            raise NoSuchResult(f"No such index {index} in this compute job")
        file = files[index]
        return blocks[job.places.get(file.stage, job.environment)], file.name

    async def _parts(self, job: Job, blocks: Mapping[str, ComputeEnvironment]) -> dict[int, Manifest]:
        """What each stage of a job has published. Raises StoreUnavailable if one store cannot tell; NotReady."""
        if any(name not in blocks for name in job.environments):
            raise NotReady("The environment of this job is not registered any more.")
        stores = {name: blocks[name].store() for name in job.environments}
        found = await asyncio.gather(*(asyncio.to_thread(store.parts, job.id) for store in stores.values()))
        # Each stage's from the store of its own environment: two environments may share one.
        return {
            stage: part
            for name, parts in zip(stores, found, strict=True)
            for stage, part in parts.items()
            if job.places.get(stage, job.environment) == name
        }

    def _sealed(self, workflow: Workflow) -> tuple[str, str]:
        return self._seal.fingerprint(document_digest(workflow)), self._seal.close(workflow.model_dump(mode="json"))

    async def _create(self, plan: Plan, environment: str, parameters: dict[str, Any]) -> FlowRun:
        return await self._client.create_flow_run_from_deployment(
            await self._deployment(environment),
            parameters=parameters,
            name=plan.agreement_id[:100],
            state=Scheduled(),
            # One agreement, one run, whatever arrives at the same time: Prefect's database holds the key unique.
            idempotency_key=f"agreement:{hashlib.sha256(plan.agreement_id.encode()).hexdigest()}",
            tags=_tags(plan),
            # Its environment's own queue, whose limit is max_jobs: full, it is in nobody else's way. A run that has its
            # stages done by others takes no slot of an environment.
            work_queue_name=environment if len(plan.environments) == 1 else COORDINATORS,
        )

    async def _parameters(self, workflow: Workflow, plan: Plan, environment: ComputeEnvironment) -> dict[str, Any]:
        """Those of a run of *plan*. A document too large for them is in the store of documents when this returns."""
        fingerprint, sealed = await asyncio.to_thread(self._sealed, workflow)
        summary = {**summary_of(plan), "fingerprint": fingerprint}
        if len(sealed) <= LARGEST_PARAMETER:
            return {"sealed": sealed, "summary": summary}
        # A name of its own: what is refused because its agreement is in use must not replace what has it.
        name = uuid4().hex
        await asyncio.to_thread(environment.documents().put_bytes, name, DOCUMENT, sealed.encode("ascii"))
        return {"sealed": name, "summary": summary, "stored_in": environment.offer.id}

    async def _restartable(self, job_id: str) -> tuple[FlowRun, Job]:
        """Raises JobNotFound, NotRestartable."""
        runs = await self._runs(_by_ids([UUID(job_id)]))
        if not runs:
            raise JobNotFound(f"No job {job_id}")
        (job,) = await self._jobs_of(runs)
        if not job.restartable:
            raise not_restartable(job)
        return runs[0], job

    async def _requeue(
        self,
        run: FlowRun,
        environment: ComputeEnvironment,
        parameters: Mapping[str, Any] | None,
        tags: Sequence[str] | None,
    ) -> Mapping[str, Any]:
        """
        Put an ended run back into the queue, once, whoever else is at it.

        Prefect would take a run that goes on already back into the queue as well, so that it would run twice: nobody
        may do this between our look at it and its new state.

        Returns:
            The parameters it had before; those of *run* if another has put it back in the meantime.

        Raises:
            JobNotFound, NotRestartable, NotReady.
        """
        async with self._alone():
            now, _ = await self._restartable(run.id.hex)
            if _removal(now) is not None:
                raise NotReady("What this job left has expired and is being removed; try again in a moment.")
            if parameters is None and KEPT not in now.tags and not await _has_document(environment, now.parameters):
                raise NotRestartable(
                    f"The document of job {run.id.hex} has expired with its results; send it along as `workflow`"
                )
            given = dict(parameters or now.parameters)
            # Task runs of earlier tries stay on record; this tells them from those to come.
            given["summary"] = {**given["summary"], "tries": now.run_count}
            # What it leaves from now on is to be removed once more.
            marked = {*(tags or now.tags), KEPT}
            await self._client.update_flow_run(run.id, parameters=given, tags=marked)
            await self._client.set_flow_run_state(run.id, Scheduled(), force=True)
        return now.parameters

    async def _begin_removal(self, run_id: UUID, before: datetime) -> Mapping[str, Any] | None:
        """
        Mark a run that ended *before* as one that is not to be restarted until ``_end_removal``.

        Returns:
            Its parameters; None if it is not to be touched: it has been restarted or deleted, another is at it, or
            it cannot be known at this moment.
        """
        try:
            # The same as for restarts, so that none comes between our look at the run and its mark.
            async with self._alone():
                run = await self._client.read_flow_run(run_id)
                since = _removal(run)
                going_on = since is not None and time.time() - since < REMOVAL_SECONDS
                ended = run.state is not None and run.state.is_final() and run.state.timestamp <= before
                if going_on or not ended or KEPT not in run.tags or DELETING in run.tags:
                    return None
                await self._client.update_flow_run(run_id, tags=[*_unmarked(run), KEPT, f"{REMOVING}{time.time():.0f}"])
        except (NotReady, ObjectNotFound):
            return None
        return run.parameters

    async def _end_removal(self, run_id: UUID, *, kept: bool) -> None:
        with suppress(ObjectNotFound):
            tags = _unmarked(await self._client.read_flow_run(run_id))
            await self._client.update_flow_run(run_id, tags=[*tags, KEPT] if kept else tags)

    async def _cancel_job(self, run_id: UUID, *, spread: bool) -> None:
        """
        End a job's run, and with it those of its stages.

        The job's own first: once that is being stopped it begins no other, and a stage's run that comes later sees so
        before it does anything.
        """
        if not spread:
            await self._cancel(run_id)
            return
        takes_a_while = await self._ask_to_end(run_id)
        with suppress(ObjectNotFound):
            ends = [self._gone(run_id)] if takes_a_while else []
            await asyncio.gather(self._cancel_stages(run_id), *ends)
        # Begun by a request that was on its way when the stop came.
        await self._cancel_stages(run_id)

    async def _cancel_stages(self, run_id: UUID) -> None:
        runs = (await self._stage_runs([run_id])).get(run_id, {})
        # One that has crashed may be about to go on.
        live = [run.id for run in runs.values() if not _has_ended(run) or told_as_crashed(run.state)]
        await asyncio.gather(*map(self._cancel, live))

    async def _stage_runs(self, run_ids: Sequence[UUID]) -> dict[UUID, dict[int, FlowRun]]:
        """The runs that do stages of these jobs, by job and the stage's index."""
        found: dict[UUID, dict[int, FlowRun]] = {}
        for chunk in _chunks(run_ids, 50):
            _, wanted = runs_of_jobs(run_id.hex for run_id in chunk)
            for run in await self._runs(wanted, deleting=True, stages=True):
                if (of := stage_of(run)) is not None:
                    found.setdefault(UUID(of[0]), {})[of[1]] = run
        return found

    async def _cancel(self, run_id: UUID) -> None:
        # A job that is not gone at the end tells how far it is, with stopreq set; or it was deleted meanwhile.
        with suppress(ObjectNotFound):
            if await self._ask_to_end(run_id):
                await self._gone(run_id)

    async def _ask_to_end(self, run_id: UUID) -> bool:
        """Whether it takes a while: it has a process, or is about to have one."""
        with suppress(ObjectNotFound):
            run = await self._client.read_flow_run(run_id)
            if run.state is None or run.state.is_scheduled():
                answer = await self._client.set_flow_run_state(run_id, taken_out_of_the_queue(STOPPED_IN_QUEUE))
                if answer.status is SetStateStatus.ACCEPT:
                    # It has no process that could end it: left to Prefect, one that was handed back once, and so still
                    # bears the number of a process, would be cancelling for ever.
                    await self._client.set_flow_run_state(run_id, Cancelled(message=STOPPED_IN_QUEUE))
                    return False
            elif run.state.is_final():
                if goes_on(run, await self._blocks()):
                    await self._client.set_flow_run_state(run_id, Cancelled(message=STOPPED_IN_QUEUE), force=True)
                return False
            await self._client.set_flow_run_state(run_id, Cancelling(message="stopped on request"))
            return True
        return False

    async def _gone(self, run_id: UUID) -> None:
        """
        Wait for the end of a run that is to end, for a while. Raises ObjectNotFound.

        By asking: ``prefect.flow_runs.wait_for_flow_run`` is told of events of some minutes ago first, so that of a job
        that was restarted it takes an earlier end for the one it waits for (prefect 3.8.8).
        """
        began = time.monotonic()
        while time.monotonic() - began < STOP_DEADLINE:
            state = (await self._client.read_flow_run(run_id)).state
            if state is not None and state.is_final():
                return
            if time.monotonic() - began > BEGINNING and not has_begun(await self._client.read_flow_run_states(run_id)):
                # A worker had taken it, and listens for stops of what it has begun only. The server refuses to let a
                # run begin that is cancelling, and nobody ends such a one; should its process come later than this,
                # the flow itself sees that it was stopped.
                await self._client.set_flow_run_state(run_id, Cancelled(message=STOPPED_IN_QUEUE))
                return
            await asyncio.sleep(LOOK_AGAIN)

    async def _begin_deletions(self, runs: Sequence[FlowRun]) -> list[FlowRun]:
        """Mark *runs* as being deleted; answers them as they are then, without those that are gone."""
        marked: list[FlowRun | None] = []

        async def mark(run: FlowRun) -> FlowRun | None:
            try:
                now = await self._client.read_flow_run(run.id)
                if DELETING not in now.tags:
                    await self._client.update_flow_run(run.id, tags=[*now.tags, DELETING])
            except ObjectNotFound:
                return None
            return now

        for start in range(0, len(runs), AT_ONCE):
            # The same as for restarts: one that has looked at its run before this must not take the mark off again,
            # nor begin a job whose results are being removed.
            async with self._alone(patience=PATIENCE):
                marked.extend(await asyncio.gather(*map(mark, runs[start : start + AT_ONCE])))
        return [run for run in marked if run is not None]

    async def _delete(self, runs: Sequence[FlowRun]) -> tuple[list[Job], list[BaseException]]:
        """Stop and remove *runs*, which are marked. Answers those that are gone, and why others are not."""
        deleted: list[Job] = []
        faults: list[BaseException] = []
        for start in range(0, len(runs), AT_ONCE):
            part = runs[start : start + AT_ONCE]
            for outcome in await asyncio.gather(*map(self._delete_one, part), return_exceptions=True):
                if isinstance(outcome, BaseException):
                    # One that cannot be removed now is not to keep the others from it.
                    faults.append(outcome)
                else:
                    deleted.extend(outcome)
        if bugs := [fault for fault in faults if not isinstance(fault, NotReady)]:
            raise bugs[0]
        return deleted, faults

    async def _delete_one(self, run: FlowRun) -> list[Job]:
        """Empty if somebody else has deleted it before. Raises NotReady."""
        async with _reaching_out():
            jobs = await self._jobs_of([run])
            await self._cancel_job(run.id, spread=is_spread(run))
            with suppress(ObjectNotFound):
                run = await self._client.read_flow_run(run.id)
                jobs = await self._jobs_of([run])
                for job in jobs:
                    await self._remove(run, job)
        return jobs

    async def _remove(self, run: FlowRun, job: Job) -> None:
        """
        Everything a job left: first what it could still be reading or writing for, its record last. The runs of its
        stages before its own: were this cut off in between, the next would find them by that.
        """
        blocks = await self._blocks()
        stages = list((await self._stage_runs([run.id])).get(run.id, {}).values()) if job.places else []
        for each in (run, *stages):
            await self._end(each, blocks)
        if any(name not in blocks for name in job.environments):
            raise NotReady(_NOWHERE)
        await _remove_results(blocks, run)
        await _remove_document(blocks, run.parameters)
        for each in (run, *stages):
            for name in _environments(each):
                await self._remove_folder(blocks[name], each.id.hex)
            await self._remove_artifacts(each.id)
        # The run of a job whose stages others do has ended after all of those that it has waited for, but not if it
        # was stopped.
        ends = [each.state.timestamp for each in stages if each.state is not None and each.state.is_final()]
        since = max([*ends, *([job.finished] if job.finished is not None else [])], default=None)
        if since is not None and any(each.run_count or each.infrastructure_pid for each in (run, *stages)):
            seconds = (datetime.now(UTC) - since).total_seconds()
            await asyncio.sleep(min(max(0.0, TOLD - seconds), TOLD))
        for each in (*stages, run):
            with suppress(ObjectNotFound):
                # Its states, task runs and log lines go with it.
                await self._client.delete_flow_run(each.id)

    async def _end(self, run: FlowRun, blocks: Mapping[str, ComputeEnvironment]) -> None:
        """Of a run that is to be removed. Raises NotReady if it goes on."""
        if run.state is not None and run.state.is_final():
            return
        block = blocks.get(_environments(run)[0])
        if block is not None and not silent(await self._last_seen(block.work_pool), datetime.now(UTC)):
            # Its process may still be publishing; deleted now, it would leave results that nobody knows of.
            raise NotReady("The job is still being stopped; delete it again in a moment.")
        await self._client.set_flow_run_state(run.id, Cancelled(message="deleted on request"), force=True)

    async def _remove_folder(self, block: ComputeEnvironment, run_id: str) -> None:
        """
        If it is on this machine, with what runs in it; elsewhere both are known by nobody any more, and removed for
        that.
        """
        try:
            await asyncio.to_thread(_remove_what_is_here, block, run_id)
        except (subprocess.CalledProcessError, OSError):
            raise NotReady("Files of this job cannot be removed at this moment; delete it again later.") from None

    async def _remove_artifacts(self, run_id: UUID) -> None:
        """Prefect keeps them when their run is deleted."""
        of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
        while page := await self._client.read_artifacts(artifact_filter=of_run, limit=PAGE):
            for start in range(0, len(page), AT_ONCE):
                part = page[start : start + AT_ONCE]
                await asyncio.gather(*(self._remove_artifact(artifact.id) for artifact in part))

    async def _remove_artifact(self, artifact_id: UUID) -> None:
        with suppress(ObjectNotFound):
            await self._client.delete_artifact(artifact_id)

    async def _runs(
        self, wanted: FlowRunFilter, *, most: int | None = None, deleting: bool = False, stages: bool = False
    ) -> list[FlowRun]:
        """
        Oldest first. With *most* no more pages are asked for than it takes to have so many. Those that are being
        deleted are left out, unless they are wanted too; so are runs of *stages*.
        """
        runs: list[FlowRun] = []
        read = 0
        while True:
            page = await self._client.read_flow_runs(
                flow_filter=_JOBS,
                flow_run_filter=wanted,
                sort=FlowRunSort.EXPECTED_START_TIME_ASC,
                limit=PAGE,
                offset=read,
            )
            read += len(page)
            # A run started by hand, from the UI say, is no job: nothing tells whose it would be.
            jobs = [run for run in page if is_job(run) or (stages and stage_of(run) is not None)]
            runs.extend(run for run in jobs if deleting or DELETING not in run.tags)
            if len(page) < PAGE or (most is not None and len(runs) >= most):
                return sorted(runs, key=_created)

    async def _end_overdue(self, runs: Sequence[FlowRun]) -> list[FlowRun]:
        """*runs* as they are once those that have waited for too long are ended; without those that are deleted."""
        waiting = [run for run in runs if queued_at(run.state) is not None or is_taken_out(run.state)]
        blocks = await self._blocks() if waiting else {}
        now = datetime.now(UTC)
        ended: dict[UUID, FlowRun | None] = {}
        late: list[tuple[FlowRun, Offer]] = []
        for run in waiting:
            block = blocks.get(_environments(run)[0])
            since = queued_at(run.state)
            if block is not None and (since is None or overdue(since, block.offer, now)):
                late.append((run, block.offer))
        for start in range(0, len(late), AT_ONCE):
            part = late[start : start + AT_ONCE]
            found = await asyncio.gather(*(self._end_waiting(run, offer) for run, offer in part))
            ended.update({run.id: now_is for (run, _), now_is in zip(part, found, strict=True)})
        told = (ended.get(run.id, run) for run in runs)
        return [run for run in told if run is not None]

    async def _end_waiting(self, run: FlowRun, offer: Offer) -> FlowRun | None:
        """
        End a run that waits, if it still does; the server decides. Answers it as it is afterwards, None if deleted.
        """
        ending = expired_in_queue(waited_too_long(offer))
        try:
            if is_taken_out(run.state):
                if run.state is not None and run.state.message == STOPPED_IN_QUEUE:
                    ending = Cancelled(message=STOPPED_IN_QUEUE)
            else:
                answer = await self._client.set_flow_run_state(run.id, taken_out_of_the_queue())
                if answer.status is not SetStateStatus.ACCEPT:
                    return await self._client.read_flow_run(run.id)
            # Whoever has taken it out may be gone: then the next that looks does this.
            await self._client.set_flow_run_state(run.id, ending)
            return await self._client.read_flow_run(run.id)
        except ObjectNotFound:
            return None

    async def _places(self, runs: Sequence[FlowRun], environments: Mapping[str, EnvironmentState]) -> dict[UUID, int]:
        """How many runs of its environment come before each of *runs* that waits for a slot of a worker there is."""
        now = datetime.now(UTC)
        asked: list[tuple[UUID, FlowRunFilter, WorkQueueFilter]] = []
        for run in runs:
            environment = environments.get(_environments(run)[0])
            if queued_at(run.state) is None or environment is None or silent(environment.last_seen, now):
                continue
            if run.work_queue_id is None:
                continue
            wanted = _in_states(_WAITING)
            # The order in which Prefect gives the runs of a queue to workers.
            wanted.next_scheduled_start_time = FlowRunFilterNextScheduledStartTime(
                before_=run.next_scheduled_start_time
            )
            queue = WorkQueueFilter(id=WorkQueueFilterId(any_=[run.work_queue_id]))
            asked.append((run.id, wanted, queue))
        asked = asked[:PLACES]
        before = await asyncio.gather(
            *(
                self._client.count_flow_runs(flow_filter=_JOBS, flow_run_filter=wanted, work_queue_filter=queue)
                for _, wanted, queue in asked
            )
        )
        # It is among those counted.
        return {run_id: max(0, count - 1) for (run_id, _, _), count in zip(asked, before, strict=True)}

    async def _jobs_of(self, runs: Sequence[FlowRun]) -> list[Job]:
        runs = await self._as_they_go_on(await self._end_overdue(runs))
        open_runs = [run for run in runs if _key(run) not in self._ended]
        of_stages = await self._live_stage_runs([run.id for run in open_runs if is_spread(run)])
        with_stages = [*open_runs, *(each for stages in of_stages.values() for each in stages.values())]
        steps = await self._steps([run.id for run in with_stages])
        fetches = await self._fetches([run.id for run in with_stages if run.state and run.state.is_running()])
        repeated = [run.id for run in open_runs if any(map(_is_repeated, (run, *of_stages.get(run.id, {}).values())))]
        states = dict(
            zip(repeated, await asyncio.gather(*map(self._client.read_flow_run_states, repeated)), strict=True)
        )
        histories = {
            run_id: history(
                seen,
                steps.get(run_id, ()),
                [task_run for each in of_stages.get(run_id, {}).values() for task_run in steps.get(each.id, ())],
            )
            for run_id, seen in states.items()
        }
        waiting = any(run.state is None or run.state.is_scheduled() for run in with_stages)
        environments = {state.offer.id: state for state in await self.environments()} if waiting else {}
        places = await self._places(with_stages, environments)
        jobs: list[Job] = []
        for run in runs:
            job = self._ended.get(_key(run))
            if job is None:
                since = restarted_at(states.get(run.id, ()))
                stages = {n: each for n, each in of_stages.get(run.id, {}).items() if counts(each, since)}
                current = {
                    index: stage
                    for each in (run, *stages.values())
                    for index, stage in steps_of(
                        of_tries(steps.get(each.id, ()), 1 + (_tries(each) or 0)), of=each.state
                    ).items()
                }
                job = _job_of(run, stages, current, fetches, environments, past=histories.get(run.id), places=places)
                if job.ended:
                    # Not before: while stages are still publishing, indexes would shift under the consumer.
                    results = await self._results(job)
                    job = replace(job, results=results or ())
                if (
                    job.finished
                    and results is not None
                    and (datetime.now(UTC) - job.finished).total_seconds() > SETTLED
                ):
                    self._ended[_key(run)] = job
            jobs.append(job)
        # Not remembered with the rest: an operator may change for how long results are kept.
        blocks = await self._blocks() if any(job.ended for job in jobs) else {}
        now = datetime.now(UTC)
        offers = {name: block.offer for name, block in blocks.items()}
        return [as_of(replace(job, expires=expiry_of(job, offers)), now) for job in jobs]

    async def _live_stage_runs(self, job_ids: Sequence[UUID]) -> dict[UUID, dict[int, FlowRun]]:
        """``_stage_runs`` as they are once those that have waited for too long are ended."""
        if not job_ids:
            return {}
        found = await self._stage_runs(job_ids)
        runs_now = await self._end_overdue([run for runs in found.values() for run in runs.values()])
        now = {run.id: run for run in await self._as_they_go_on(runs_now)}
        return {
            job_id: {index: now[run.id] for index, run in runs.items() if run.id in now}
            for job_id, runs in found.items()
        }

    async def _as_they_go_on(self, runs: Sequence[FlowRun]) -> list[FlowRun]:
        """*runs*, those that are about to go on after a crash as they will be in a moment."""
        crashed = any(told_as_crashed(run.state) for run in runs)
        blocks = await self._blocks() if crashed else {}
        return [as_it_goes_on(run, blocks) for run in runs]

    async def _steps(self, run_ids: Sequence[UUID]) -> dict[UUID, list[TaskRun]]:
        found: dict[UUID, list[TaskRun]] = {}
        for chunk in _chunks(run_ids, 50):
            offset = 0
            while True:
                page = await self._client.read_task_runs(
                    flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=list(chunk))), limit=PAGE, offset=offset
                )
                for task_run in page:
                    if task_run.flow_run_id is not None:
                        found.setdefault(task_run.flow_run_id, []).append(task_run)
                offset += len(page)
                if len(page) < PAGE:
                    break
        return found

    async def _fetches(self, run_ids: Sequence[UUID]) -> dict[tuple[UUID, str], Artifact]:
        """What the tasks of each run report of their fetches and waits, by run and key of the artifact."""
        if not run_ids:
            return {}
        artifacts = await self._client.read_artifacts(
            artifact_filter=ArtifactFilter(
                flow_run_id=ArtifactFilterFlowRunId(any_=list(run_ids)), type=ArtifactFilterType(any_=["progress"])
            )
        )
        return {
            (artifact.flow_run_id, artifact.key): artifact
            for artifact in sorted(artifacts, key=_created)
            if artifact.flow_run_id is not None and artifact.key is not None
        }

    async def _results(self, job: Job) -> tuple[Result, ...] | None:
        """None while nobody can tell: a status must not fail because the store is away, nor remember that it was."""
        try:
            blocks = await self._blocks()
            async with asyncio.timeout(LOOK_UP):
                parts = await self._parts(job, blocks)
        except (StoreUnavailable, NotReady, TimeoutError):
            return None
        return tuple(
            Result(filename=file.path, filesize=file.size, media_type=file.type, kind=file.kind, sha256=file.sha256)
            for file in (Manifest.merged(parts).ordered() if parts else ())
        )

    async def _blocks(self) -> dict[str, ComputeEnvironment]:
        known = self._blocks_cache.get(None)
        if known is None:
            known = self._blocks_cache[None] = await load_environments(self._client)
        return known

    @asynccontextmanager
    async def _alone(self, *, patience: float = 0.0) -> AsyncIterator[None]:
        """
        Restarting alone: of the calls to this instance one after the other, of several instances whoever comes first.

        The slot is taken by hand: ``prefect.concurrency`` looks again only after some seconds when it is taken.

        Raises:
            NotReady: Another instance is at it, and still is after *patience* seconds.
        """
        async with self._restarting:
            if not self._limit_made:
                with suppress(ObjectAlreadyExists):
                    await self._client.create_global_concurrency_limit(
                        GlobalConcurrencyLimitCreate(name=RESTARTS, limit=1, slot_decay_per_second=RESTART_DECAY)
                    )
                self._limit_made = True
            until = time.monotonic() + patience
            while not await self._slot_taken():
                if time.monotonic() >= until:
                    raise NotReady("Another job is being restarted at this moment; try again in a moment.")
                await asyncio.sleep(0.1)
            since = time.monotonic()
            try:
                yield
            finally:
                await self._client.release_concurrency_slots([RESTARTS], 1, time.monotonic() - since)

    async def _slot_taken(self) -> bool:
        try:
            await self._client.increment_concurrency_slots([RESTARTS], slots=1, mode="concurrency")
        except httpx.HTTPStatusError as fault:
            if fault.response.status_code != httpx.codes.LOCKED:
                raise
            return False
        return True

    async def _check_shuts_in(self, block: ComputeEnvironment) -> None:
        """Raises NotReady."""
        if obstacle := await self._obstacle(block):
            raise NotReady(f"This environment cannot shut an algorithm in, so it runs none: {obstacle}")

    async def _obstacle(self, block: ComputeEnvironment) -> str | None:
        if not self._local_workers or block.allow_unsandboxed:
            return None
        return await asyncio.to_thread(block.make_runner().obstacle)

    async def _deployment(self, environment: str) -> UUID:
        known = self._deployments.get(environment)
        if known is None:
            try:
                known = (await self._client.read_deployment_by_name(f"{FLOW_NAME}/{environment}")).id
            except ObjectNotFound:
                raise NotReady(
                    "This environment is announced but not deployed yet; its operator has to run `prefect deploy`."
                ) from None
            self._deployments[environment] = known
        return known

    async def _environment_state(self, block: ComputeEnvironment) -> EnvironmentState:
        # What is in its queue, and so the stages of jobs in several environments, of which the jobs' own runs have the
        # tag as well.
        pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[block.work_pool]))
        queue = WorkQueueFilter(name=WorkQueueFilterName(any_=[block.offer.id]))

        async def count(kinds: Sequence[StateType]) -> int:
            return await self._client.count_flow_runs(
                flow_filter=_JOBS, flow_run_filter=_in_states(kinds), work_pool_filter=pool, work_queue_filter=queue
            )

        busy, waiting, workers = await asyncio.gather(
            count(IN_PROGRESS), count(_WAITING), self._last_seen(block.work_pool)
        )
        return EnvironmentState(
            offer=block.offer,
            running=busy,
            waiting=waiting,
            last_seen=workers,
            free_gpus=await self._free_gpus(block.offer),
            obstacle=await self._obstacle(block),
        )

    async def _free_gpus(self, offer: Offer) -> int:
        if not offer.all_gpus:
            return 0
        jobs = await self._jobs_of(await self._runs(_in_states(IN_PROGRESS, _environment_tag(offer.id))))
        return max(0, offer.all_gpus - sum(job.gpus.get(offer.id, 0) for job in jobs))

    async def _last_seen(self, work_pool: str) -> datetime | None:
        try:
            workers = await self._client.read_workers_for_work_pool(work_pool)
        except ObjectNotFound:
            return None
        return max((w.last_heartbeat_time for w in workers if w.last_heartbeat_time), default=None)


def _remove_what_is_here(block: ComputeEnvironment, job_id: str) -> None:
    """What runs of a job on this machine, which is to write no more, and then its folder."""
    root = block.workspace_root()
    if os.path.lexists(root / job_id):
        block.make_runner().remove_job(job_id)
        remove_job(root, job_id)


async def _remove_results(blocks: Mapping[str, ComputeEnvironment], run: FlowRun) -> None:
    """
    What a job has published in the stores of its environments, and what its stages have handed over in them.

    Raises:
        StoreUnavailable: Also if the environment of one is not registered any more. All that can be removed is.
    """
    away = StoreUnavailable("the environment is not registered any more")
    faults = [away for name in _environments(run) if name not in blocks]
    used = [blocks[name] for name in _environments(run) if name in blocks]
    stores = [block.store() for block in used] + [block.handover() for block in used if is_spread(run)]
    for store in stores:
        try:
            await asyncio.to_thread(store.delete_job, run.id.hex)
        except StoreUnavailable as fault:
            faults.append(fault)
    if faults:
        raise faults[0]


async def _remove_document(blocks: Mapping[str, ComputeEnvironment], parameters: Mapping[str, Any]) -> None:
    """Delete the stored document of a run with these parameters, if it has one."""
    place = parameters.get("stored_in")
    if place is not None and place in blocks:
        await asyncio.to_thread(blocks[place].documents().delete_job, parameters["sealed"])


async def _has_document(block: ComputeEnvironment, parameters: Mapping[str, Any]) -> bool:
    """Whether the sealed document of a run with these parameters can be had."""
    if not parameters.get("stored_in"):
        return True
    return await asyncio.to_thread(block.documents().exists, parameters["sealed"], DOCUMENT)


def _removal(run: FlowRun) -> float | None:
    """Unix time since when what *run* left is being removed; None if it is not."""
    return next((float(tag.removeprefix(REMOVING)) for tag in run.tags if tag.startswith(REMOVING)), None)


def _unmarked(run: FlowRun) -> list[str]:
    return [tag for tag in run.tags if tag != KEPT and not tag.startswith(REMOVING)]


def _key(run: FlowRun) -> tuple[UUID, UUID]:
    """A run in one state: what is known of an ended job holds until its state is another."""
    return run.id, run.state.id if run.state else run.id


def _created(record: FlowRun | Artifact) -> datetime:
    return record.created or datetime.min.replace(tzinfo=UTC)


def _chunks(ids: Sequence[UUID], size: int) -> Iterator[Sequence[UUID]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def _tries(run: FlowRun) -> int | None:
    """How often a run had been begun when it was restarted last; None if it never was."""
    tries: int | None = run.parameters["summary"].get("tries")
    return tries


def _is_repeated(run: FlowRun) -> bool:
    """Whether it was begun several times."""
    return run.run_count > 1 or _tries(run) is not None


def _job_of(
    run: FlowRun,
    stage_runs: Mapping[int, FlowRun],
    steps: Steps,
    fetches: Mapping[tuple[UUID, str], Artifact],
    environments: Mapping[str, EnvironmentState],
    *,
    past: Sequence[Transition] | None,
    places: Mapping[UUID, int],
) -> Job:
    """
    *stage_runs* are those that do its stages, by stage, if others do. *steps* are those since the last restart. *past*
    is its whole history, for a run that was begun several times. *places* is how many come first, of runs that wait and
    where that is known.
    """
    summary = run.parameters["summary"]
    status, stage = _status_of(run, stage_runs, steps)
    state = run.state

    def told(index: int, key: str) -> Artifact | None:
        artifact = fetches.get((stage_runs.get(index, run).id, key))
        tasks = [step.id for step in steps.get(index, {}).values()]
        return artifact if artifact is not None and artifact.task_run_id in tasks else None  # of an earlier try

    fetch = told(stage, fetch_key(stage)) if stage is not None else None
    wait = told(stage, waiting_key(stage)) if stage is not None else None
    final = state is not None and state.is_final()
    environment = _environments(run)[0]
    message = _told(state)
    created = _created(run)
    if past is None:
        past = [Transition(Status.WARMING_UP, created)]
        # Prefect gives a start time also to a run that was cancelled before it began; such a one has run 0 times.
        if run.start_time is not None and run.run_count:
            past.append(Transition(Status.STARTED, run.start_time))
        past.extend(transitions(steps))
        if final and state is not None:
            past.append(Transition(status, state.timestamp, None if status is Status.COMPLETED else stage))
    return Job(
        id=run.id.hex,
        owner=summary["owner"],
        agreement_id=summary["agreement"],
        environment=environment,
        status=status,
        created=created,
        finished=state.timestamp if final and state is not None else None,
        detail=message if status is Status.RUN_FAILED else "",
        reason=_reason(
            state,
            status,
            stage,
            summary=summary,
            fetch=fetch,
            wait=wait,
            waits=_waits(stage_runs, steps, environments, places),
            going=any(_is_doing(each, steps.get(index, {})) for index, each in stage_runs.items()),
            environment=_told_to(run, environments.get(environment)),
            before=places.get(run.id),
        ),
        stopped_in=_before_the_end(steps, run) if status is Status.STOPPED else Status.WARMING_UP,
        stage=stage,
        stages=len(summary["stages"]),
        progress=1.0 if status is Status.COMPLETED else _progress(steps, len(summary["stages"]), fetch),
        seconds_left=_seconds_left(fetch) if status is Status.CONFIGURING and not final else None,
        history=tuple(past),
        stop_request=stop_request(state, status),
        algorithm_did=summary["algorithm"],
        input_dids=tuple(summary["inputs"]),
        # Runs made by earlier versions tell neither.
        document_id=summary.get("document", ""),
        whitelist=tuple(summary.get("whitelist", ())),
        gpus=_gpus(run, stage_runs, steps, lambda index: _holds_up(told(index, waiting_key(index)))),
        places=_job_places(run),
    )


def _job_places(run: FlowRun) -> dict[int, str]:
    """``Job.places``. Runs made by earlier versions have none."""
    return {int(index): name for index, name in run.parameters["summary"].get("places", {}).items()}


def _gpus(
    run: FlowRun, stage_runs: Mapping[int, FlowRun], steps: Steps, holds_up: Callable[[int], bool]
) -> dict[str, int]:
    """``Job.gpus``; *holds_up* tells of a stage whether its algorithm waits for something."""
    wanted: Mapping[str, int] = run.parameters["summary"].get("gpus", {})
    places = _job_places(run)
    found: dict[str, int] = {}
    for index, stage in steps.items():
        state = stage_runs.get(index, run).state
        going = state is not None and state.type in (StateType.RUNNING, StateType.CANCELLING)
        if str(index) in wanted and going and status_of(outcomes(stage)) is Status.RUNNING and not holds_up(index):
            name = places.get(index, _environments(run)[0])
            found[name] = found.get(name, 0) + wanted[str(index)]
    return found


def _told_to(run: FlowRun, environment: EnvironmentState | None) -> EnvironmentState | None:
    """What a job that waits is told of its environment. Where others do its stages, it waits for no slot there."""
    return replace(environment, running=0) if environment is not None and is_spread(run) else environment


def _status_of(run: FlowRun, stage_runs: Mapping[int, FlowRun], steps: Steps) -> tuple[Status, int | None]:
    """Status of a job's run, and the stage it is in, whoever does its stages."""
    status, stage = run_status(run.state, steps)
    final = run.state is not None and run.state.is_final()
    if not final and status is Status.WARMING_UP and any(not _has_ended(each) for each in stage_runs.values()):
        # It was interrupted, and they go on.
        return live_status(steps)
    if final and status not in (Status.COMPLETED, Status.STOPPED):
        order = [int(index) for index in run.parameters["summary"]["stages"]]
        failed = [n for n in order if (each := stage_runs.get(n)) and _has_ended(each) and not _is_completed(each)]
        return status, next(iter(failed), stage)
    return status, stage


def _has_ended(run: FlowRun) -> bool:
    return run.state is not None and run.state.is_final()


def _is_completed(run: FlowRun) -> bool:
    return run.state is not None and run.state.is_completed()


def _waits(
    stage_runs: Mapping[int, FlowRun],
    steps: Steps,
    environments: Mapping[str, EnvironmentState],
    places: Mapping[UUID, int],
) -> dict[int, str]:
    """Of each stage whose run has not begun with it, or not again, why."""
    found: dict[int, str] = {}
    for index, run in stage_runs.items():
        state = run.state
        if state is None or state.is_final() or _is_doing(run, steps.get(index, {})):
            continue
        if state.name == "AwaitingRetry":
            found[index] = STAGE_INTERRUPTED
        elif state.is_scheduled():
            waiting = why_waiting(environments.get(_environments(run)[0]), datetime.now(UTC), places.get(run.id))
            found[index] = f"is {waiting}"
        elif not state.is_running() or not steps.get(index):
            found[index] = STAGE_BEGINS
    return found


def _is_doing(run: FlowRun, stage: Mapping[Phase, TaskRun]) -> bool:
    """Whether the run of a stage is at a step of it now."""
    return run.state is not None and run.state.is_running() and bool(stage) and not stage_finished(stage)


def _before_the_end(steps: Steps, run: FlowRun) -> Status:
    return live_status(steps)[0] if run.run_count > (_tries(run) or 0) else Status.WARMING_UP


def _told(state: State[Any] | None) -> str:
    """What the flow said of its end. After a bug it is Prefect that speaks, and quotes the exception: not told."""
    if state is None or state.name in BY_TEXT:
        return (state.message if state else None) or ""
    return "an error inside the service; its operator finds the trace under this job's id"


def _progress(steps: Steps, stages: int, fetch: Artifact | None) -> float:
    ended = [
        run for stage in steps.values() for run in stage.values() if run.state is not None and run.state.is_final()
    ]
    fetching = _fraction(fetch) if fetch is not None else 0.0
    done = len(ended) + (fetching if fetching < 1.0 else 0.0)
    return min(round(done / (len(Phase) * stages), 3), 1.0)


def _holds_up(wait: Artifact | None) -> bool:
    return wait is not None and _fraction(wait) < 1.0


def _fraction(fetch: Artifact) -> float:
    return float(fetch.data) / 100.0 if isinstance(fetch.data, int | float) else 0.0


def _seconds_left(fetch: Artifact | None) -> float | None:
    if fetch is None or fetch.created is None or fetch.updated is None:
        return None
    left = seconds_left(_fraction(fetch), (fetch.updated - fetch.created).total_seconds())
    since = (datetime.now(UTC) - fetch.updated).total_seconds()
    return None if left is None else max(0.0, left - since)


def _reason(
    state: State[Any] | None,
    status: Status,
    stage: int | None,
    *,
    summary: Mapping[str, Any],
    fetch: Artifact | None,
    wait: Artifact | None,
    waits: Mapping[int, str],
    going: bool,
    environment: EnvironmentState | None,
    before: int | None,
) -> str:
    """*waits* is of each stage that waits why, where others do the stages; *going* whether any is in progress."""
    if state is not None and state.is_final():
        return why_ended(status, _told(state), stage=stage, stages=len(summary["stages"]))
    if state is not None and state.type is StateType.CANCELLING:
        return STOPPING
    if waits and not going:
        return why_stages_wait(waits)
    if state is not None and state.name == "AwaitingRetry" and not going:
        return RESUMING
    if (state is None or state.is_scheduled()) and not going:
        return why_waiting(environment, datetime.now(UTC), before)
    why = why_live(
        status,
        seconds=summary["seconds"].get(str(stage)),
        fetching=fetch.description if fetch is not None else None,
        waiting=wait.description if wait is not None and _holds_up(wait) else None,
    )
    return f"{why}; {why_stages_wait(waits)}" if waits else why
