"""
Looks after a work pool whose workers are Prefect's own, of type ``process``, ``docker`` or ``kubernetes``; for pools of
this project's type the workers do so themselves (``flows.worker``).

Those workers start runs and tell of their ends. What they do not do: take up what was lost, finish what an API process
has begun, remove the folders of jobs that are no more. This process does, for one pool; it has to see the job folders
that the runs of the pool work in, and runs none of them itself. There may be several of it, say one on each machine.

How it is known that nobody runs a run any more, without asking the infrastructure, which is another one for each type
of pool: whoever works on a job holds the lock of its folder, and the kernel lets go of it when that process ends,
however it ends. A run that has begun and whose folder nobody holds for a while is lost, then. Where the folder is on
another machine, silence has to do: runs of these pools report by Prefect's heartbeats, and of one that did and does not
any more for minutes, while the server was there, the machine is gone. Should it live all the same, its process asks
before it publishes, and ends.

What one of Prefect's workers or runners tells to have crashed goes on as well. To Prefect such a run has ended, so
for a moment its job would seem to have ended, too; ``flows.prefect_jobs`` knows about that moment.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import anyio
import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.events.clients import get_events_subscriber
from prefect.events.filters import (
    EventAnyResourceFilter,
    EventFilter,
    EventNameFilter,
    EventOccurredFilter,
    EventOrder,
    EventResourceFilter,
)
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import AwaitingRetry, Cancelled, Crashed

from blocks.environment import load_environments
from flows.compute import key_file
from flows.errors import NotReady
from flows.prefect_jobs import DELETING, PAGE, PrefectJobs, is_job
from flows.reconcile import CLAIM_SECONDS, MOST_RESUMES, Reconciler, age, pause, resumes, worker_of
from flows.sealing import Seal
from flows.stages import stage_of
from flows.states import CRASH_SECONDS, DIED, STOPPED_IN_QUEUE, stopped_before_it_began, told_as_crashed
from flows.worker import RECONCILE_SECONDS, ROUND_SECONDS, THREADS, UPKEEP_SECONDS, WORKER_TYPE
from tasks.workspace import in_use

IDLE_SECONDS: Final = 20.0
"""
For so long nobody has to hold the folder of a run that has begun, as seen from here. Its process takes hold of it a
moment after the beginning, and lets go of it a moment before the end.
"""

STOPPED_SECONDS: Final = 8.0
"""The same for a run that is being stopped: that nobody works on it any more is what is wanted of it."""

PENDING_SECONDS: Final = 900.0
"""A run that a worker has claimed has to begin within this time, pulling its image included."""

SILENT_SECONDS: Final = 180.0
"""Without a heartbeat for so long the machine of a run is gone whose folder is not here; they come every 30 s."""

_HEARTBEAT: Final = "prefect.flow-run.heartbeat"


class CannotKeepUp(Exception):
    """There is nothing to be done here for this pool; the message says why."""


@dataclass
class Upkeep(Reconciler):
    """Compares the runs of a work pool with who works on their folders. Every method is one round."""

    idle_seconds: float = IDLE_SECONDS
    silent_seconds: float = SILENT_SECONDS
    _idle_since: dict[UUID, tuple[UUID, float]] = field(default_factory=dict)
    """Since when nobody holds the folder of a run, and the state that the run was in then."""
    _roots: Collection[Path] = ()
    """The folders of the jobs of this pool, as of this round."""
    _answered_since: float | None = None
    """Since when the server has answered every round."""

    async def runs(self) -> list[UUID]:
        try:
            taken = await super().runs()
        except BaseException:
            # What was silent while the server was away may be about to say what it had to say.
            self._answered_since = None
            self._idle_since.clear()
            raise
        self._answered_since = self._answered_since or time.monotonic()
        return taken

    async def _lost(self, run: FlowRun, offline: Collection[str]) -> bool:
        state = run.state
        if state is None:
            return False
        if state.type is StateType.PENDING:
            owner = worker_of(run)
            return age(state) > (CLAIM_SECONDS if owner is None or owner in offline else PENDING_SECONDS)
        held = await self._held(run)
        if held is None:
            return await self._silent(run)
        now = time.monotonic()
        if held or self._idle_since.get(run.id, (state.id, now))[0] != state.id:
            self._idle_since.pop(run.id, None)
        if held:
            return False
        _, since = self._idle_since.setdefault(run.id, (state.id, now))
        patience = STOPPED_SECONDS if state.type is StateType.CANCELLING else self.idle_seconds
        return now - since >= min(patience, self.idle_seconds)

    async def _in_progress(self) -> list[FlowRun]:
        found = await super()._in_progress()
        blocks = await load_environments(self.client)
        self._roots = {block.workspace_root() for block in blocks.values() if block.work_pool == self.work_pool}
        ids = {run.id for run in found}
        self._idle_since = {run_id: since for run_id, since in self._idle_since.items() if run_id in ids}
        return found

    async def _held(self, run: FlowRun) -> bool | None:
        """Whether somebody works on the run's job; None if its folder is not on this machine."""
        found = [await asyncio.to_thread(in_use, root, run.id.hex) for root in self._roots]
        known = [held for held in found if held is not None]
        return any(known) if known else None

    async def _silent(self, run: FlowRun) -> bool:
        """Whether a run that did report has not done so for long, though the server was there."""
        now = time.monotonic()
        if self._answered_since is None or now - self._answered_since < self.silent_seconds:
            return False
        begun = run.state.timestamp if run.state is not None else datetime.now(UTC)
        page = await self.client.read_events(
            EventFilter(
                event=EventNameFilter(name=[_HEARTBEAT]),
                resource=EventResourceFilter(id=[f"prefect.flow-run.{run.id}"]),
                occurred=EventOccurredFilter(since=begun - timedelta(days=1)),
                order=EventOrder.DESC,
            ),
            limit=1,
        )
        last = max((event.occurred for event in page.events), default=None)
        quiet = timedelta(seconds=self.silent_seconds)
        # Without a heartbeat ever, nothing can be told: they may be switched off.
        return last is not None and datetime.now(UTC) - max(last, begun) > quiet

    async def crashed(self) -> list[UUID]:
        """What Prefect's workers and runners have told to have crashed lately. Returns the jobs that go on."""
        after = datetime.now(UTC) - timedelta(seconds=CRASH_SECONDS)
        found = await self.client.read_flow_runs(
            flow_run_filter=FlowRunFilter(
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CRASHED])),
                end_time=FlowRunFilterEndTime(after_=after),
            ),
            work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[self.work_pool])),
            limit=PAGE,
        )
        told = [run for run in found if told_as_crashed(run.state) and DELETING not in run.tags]
        wanted = [run for run in told if is_job(run) or stage_of(run) is not None]
        return [run.id for run in wanted if await self._go_on(run)]

    async def _go_on(self, run: FlowRun) -> bool:
        """Put a job that crashed back into the queue, unless it was being stopped or that did not help before."""
        crash = run.state
        assert crash is not None  # noqa: S101  # for mypy: it was found by its state
        try:
            states = await self.client.read_flow_run_states(run.id)
            before = resumes(states)
            told = f"{DIED}: {crash.message}"
            state: State[Any]
            if stopped_before_it_began(states):
                state = Cancelled(message=STOPPED_IN_QUEUE)
            elif before >= MOST_RESUMES:
                state = Crashed(message=told)
            else:
                at = datetime.now(UTC) + timedelta(seconds=pause(before))
                state = AwaitingRetry(message=told, scheduled_time=at)
            now = (await self.client.read_flow_run(run.id)).state
            if now is None or now.id != crash.id:
                return False
            # To Prefect it has ended, and what has ended does not end once more, unless by force.
            answer = await self.client.set_flow_run_state(run.id, state, force=state.is_final())
            if answer.status is not SetStateStatus.ACCEPT:
                return False
            # It may have been stopped between our look at it and its new state.
            states = await self.client.read_flow_run_states(run.id)
            stops = [end for end in states if end.is_cancelled() and end.timestamp > crash.timestamp]
            if stops and not state.is_final():
                await self.client.set_flow_run_state(run.id, stops[0], force=True)
                return False
        except ObjectNotFound:
            return False
        self.logger.warning("flow run %s had crashed: %s; now %s", run.id, crash.message, state.name)
        return not state.is_final()


def upkeep_of(client: PrefectClient, work_pool: str, logger: logging.Logger, **more: Any) -> Upkeep:
    """What looks after *work_pool*. The service's key is read in each round that needs it."""

    async def nothing(_: UUID) -> None:
        """It runs nothing that it could stop or leave."""

    return Upkeep(
        client=client,
        jobs=lambda: PrefectJobs(client, Seal.from_file(key_file()), local_workers=False),
        work_pool=work_pool,
        # No worker has this name, so no run is taken for one of its own.
        worker="",
        live=frozenset,
        stop=nothing,
        leave=nothing,
        logger=logger,
        **more,
    )


async def keep_up(work_pool: str, logger: logging.Logger) -> None:
    """
    Look after *work_pool* until cancelled, the server being there or not.

    Raises:
        CannotKeepUp: No server is named, or the workers of that pool do all of this themselves.
    """
    if not PREFECT_API_URL.value():
        raise CannotKeepUp("PREFECT_API_URL does not say where the Prefect server is")
    # A store or an engine that hangs holds threads; the rounds over the runs must not wait for them.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS))
    async with get_client() as client:
        await _check(client, work_pool, logger)
        upkeep = upkeep_of(client, work_pool, logger)
        told = asyncio.Event()
        async with anyio.create_task_group() as tasks:
            for round, seconds in (
                (upkeep.runs, RECONCILE_SECONDS),
                (upkeep.upkeep, UPKEEP_SECONDS),
                (upkeep.folders, UPKEEP_SECONDS),
            ):
                tasks.start_soon(_again_and_again, round, seconds, asyncio.Event(), logger)
            tasks.start_soon(_again_and_again, upkeep.crashed, RECONCILE_SECONDS, told, logger)
            tasks.start_soon(_hear_of_crashes, work_pool, client, told, logger)


async def _check(client: PrefectClient, work_pool: str, logger: logging.Logger) -> None:
    """Wait for the pool. Raises CannotKeepUp."""
    said = ""
    while True:
        try:
            kind = (await client.read_work_pool(work_pool)).type
            break
        except ObjectNotFound:
            why = f"there is no work pool {work_pool} yet; `prefect deploy` makes it"
        except httpx.HTTPError as fault:
            why = f"the Prefect server does not answer: {type(fault).__name__}"
        if why != said:
            logger.warning("%s", why)
            said = why
        await anyio.sleep(RECONCILE_SECONDS)
    if kind == WORKER_TYPE:
        raise CannotKeepUp(f"the work pool {work_pool} is of type {kind}, whose workers look after it themselves")
    logger.info("looking after the work pool %s, of type %s", work_pool, kind)


async def _again_and_again(
    round: Callable[[], Coroutine[Any, Any, Any]], seconds: float, wanted: asyncio.Event, logger: logging.Logger
) -> None:
    """A round every *seconds*, and whenever one is *wanted*."""
    while True:
        wanted.clear()
        try:
            # No retries: the next round is one. In a task of its own, which nobody else has these settings from.
            with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), anyio.fail_after(ROUND_SECONDS):
                await round()
        except Exception as problem:
            # Whatever it is, the next round may go well, and nobody else would do this.
            away = isinstance(problem, httpx.HTTPError | NotReady)
            logger.log(logging.DEBUG if away else logging.ERROR, "%s: %r", round.__name__, problem)
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await wanted.wait()


async def _hear_of_crashes(work_pool: str, client: PrefectClient, told: asyncio.Event, logger: logging.Logger) -> None:
    """Set *told* when a run of the pool is said to have crashed. What is not heard of is found by looking."""
    seconds = 1.0
    while True:
        try:
            pool = await client.read_work_pool(work_pool)
            crashes = EventFilter(
                event=EventNameFilter(prefix=["prefect.flow-run."]),
                resource=EventResourceFilter(
                    labels=ResourceSpecification({"prefect.state-type": [StateType.CRASHED.value]})
                ),
                any_resource=EventAnyResourceFilter(id=[f"prefect.work-pool.{pool.id}"]),
            )
            async with get_events_subscriber(filter=crashes, reconnect_on_clean_close=True) as events:
                seconds = 1.0
                async for _ in events:
                    told.set()
        except Exception as problem:
            logger.log(
                logging.WARNING if seconds == 1.0 else logging.DEBUG,
                "crashes are found by looking until events can be had again: %s",
                type(problem).__name__,
            )
        await anyio.sleep(seconds)
        seconds = min(2 * seconds, 10.0)
