"""
What Prefect lacks: a run that nobody runs any more is taken up again, and what no job has any more is removed.

Prefect believes what it is told. If whoever was to tell it dies, a run stays as it is for ever: claimed by a worker
that is no more, running in a process that was killed with its machine, cancelling with nobody there to cancel it. Its
own remedy, an automation that waits for heartbeats and calls a run without them crashed, ends jobs that are well: a
heartbeat is late where a machine is busy or the server was away.

So each worker of this project compares what is declared with what is alive, at its start and every few seconds. It
knows for certain what it runs itself, since a run of its own dies with it (see ``flows.worker``). A run that bears its
name and that it does not run is lost, then. Runs of other workers it leaves alone while they report; only if one has
been silent for long, as seen from here, are its runs taken up here.

A run that is taken up goes back into the queue, under its id; its steps that had finished are not done again. A run
that is lost again and again is ended, so that nothing goes round for ever.
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import httpx
import psutil
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType, WorkerStatus
from prefect.client.schemas.responses import SetStateStatus
from prefect.exceptions import ObjectNotFound
from prefect.states import AwaitingRetry, Cancelled, Cancelling, Crashed, Pending

from blocks.environment import ComputeEnvironment, load_environments
from flows.prefect_jobs import IN_PROGRESS, PAGE, PrefectJobs, is_job
from flows.stages import ITS_JOB_ENDED, stage_of
from flows.states import DIED, LOST, end_of_taken_out, is_taken_out, told_as_crashed
from tasks.execute import end_left_runs
from tasks.workspace import discard, job_ids

HANDED_BACK: Final = "handed back by a worker that ends"
"""
With LOST and DIED, the messages of the states in which a run goes back into the queue. This one was nobody's fault.
"""

MOST_RESUMES: Final = 10
"""So often a run is taken up again after it was lost; then it is what loses them, and it ends as crashed."""

LONGEST_PAUSE: Final = 30.0
"""Seconds at most before a run that was lost several times is begun once more."""

PEER_SECONDS: Final = 60.0
"""
Seconds for which Prefect has to say that another worker is offline before its runs are taken up here. Prefect says so
after three heartbeats have failed to come, also of all workers at once when the server itself was away.
"""

CLAIM_SECONDS: Final = 30.0
"""Age of a claim from which on somebody must have taken it further, where it does not say whose claim it is."""

STOP_SECONDS: Final = 2.0
"""Seconds in which a run of ours is to hear by Prefect's own events that it is being stopped."""

_CLAIM: Final = "claimed by "


def claimed(worker: str) -> State[Any]:
    """What a worker proposes to claim a run. The claim itself says whose it is: labels are written only afterwards."""
    return Pending(message=f"{_CLAIM}{worker}")


def worker_of(run: FlowRun) -> str | None:
    """The worker that runs it or is about to; None if that is not known."""
    state = run.state
    if state is not None and state.type is StateType.PENDING and state.name == "Pending":
        message = state.message or ""
        return message.removeprefix(_CLAIM) if message.startswith(_CLAIM) else None
    name = run.labels.get("prefect.worker.name")
    return name if isinstance(name, str) else None


def resumes(states: Iterable[State[Any]]) -> int:
    """How often a run with these *states* was lost since it was submitted or restarted."""
    count = 0
    for state in sorted(states, key=lambda state: state.timestamp):
        # A crash that was told by others than us is a loss that was taken up, or a restart follows it.
        ended = state.is_final() and not told_as_crashed(state)
        if ended or (state.type is StateType.SCHEDULED and state.name == "Scheduled"):
            count = 0
        elif state.name == "AwaitingRetry" and (state.message or "").startswith((LOST, DIED)):
            count += 1
    return count


def pause(resumes: int) -> float:
    """Seconds before a run that was lost *resumes* times before is begun again: none the first time."""
    return min(2.0 ** (resumes - 1), LONGEST_PAUSE) if resumes else 0.0


async def give_up(
    client: PrefectClient,
    run_id: UUID,
    why: str,
    detail: str = "",
    *,
    worker: str | None = None,
    seen: UUID | None = None,
) -> State[Any] | None:
    """
    Put a run whose process is gone where it belongs: a stopped one is stopped, a job goes back into the queue, unless
    that did not help before, and everything else has crashed. A run that has ended stays as it is.

    Never by force but for what is being stopped: so a stop that is asked for at this moment is not lost. *why* is LOST,
    DIED or HANDED_BACK. If it is another than *worker* that has the run now, or if its state is another than *seen*, it
    stays as it is, too: whoever calls this knows something that was true of that.

    Returns:
        Its new state; None if it keeps the one it has.
    """
    with suppress(ObjectNotFound):
        # First what takes longer: the less lies between the look at the run and its new state, the better.
        before = resumes(await client.read_flow_run_states(run_id))
        run = await client.read_flow_run(run_id)
        others = worker is not None and worker_of(run) not in (None, worker)
        if run.state is None or run.state.type not in IN_PROGRESS or seen not in (None, run.state.id) or others:
            return None
        if run.state.type is StateType.CANCELLING:
            stopped: State[Any] = Cancelled(message=run.state.message or "stopped on request")
            await client.set_flow_run_state(run_id, stopped, force=True)
            return stopped
        told = f"{why}: {detail}" if detail else why
        state: State[Any] = Crashed(message=told)
        if (is_job(run) or stage_of(run) is not None) and (why == HANDED_BACK or before < MOST_RESUMES):
            at = datetime.now(UTC) + timedelta(seconds=0.0 if why == HANDED_BACK else pause(before))
            state = AwaitingRetry(message=told, scheduled_time=at)
        answer = await client.set_flow_run_state(run_id, state)
        if answer.status is not SetStateStatus.ACCEPT:
            return None
        # To the server a run that has ended may be begun again, and this one may have ended since our look at it.
        states = await client.read_flow_run_states(run_id)
        ends = [end for end in states if end.is_final() and end.timestamp > run.state.timestamp]
        if ends and not state.is_final():
            await client.set_flow_run_state(run_id, max(ends, key=lambda end: end.timestamp), force=True)
            return None
        return state
    return None


@dataclass
class Reconciler:
    """
    Compares the runs of one work pool with what one worker runs. To be called by that worker alone.

    Args:
        jobs: Opened when they are needed: that takes the service's key.
        live: The runs that this worker runs or is about to, at the moment of the call.
        stop: End a run of this worker that is being stopped. It may be on its way already.
        leave: End a run of this worker that another has taken up, and say nothing about it.
    """

    client: PrefectClient
    jobs: Callable[[], PrefectJobs]
    work_pool: str
    worker: str
    live: Callable[[], Collection[UUID]]
    stop: Callable[[UUID], Awaitable[None]]
    leave: Callable[[UUID], Awaitable[None]]
    logger: logging.Logger | logging.LoggerAdapter[logging.Logger]
    _silent_since: dict[str, float] = field(default_factory=dict)

    async def runs(self) -> list[UUID]:
        """One round over the runs. Returns those that were taken up."""
        before = set(self.live())
        found = await self._in_progress()
        peers = {name for run in found if (name := worker_of(run)) not in (None, self.worker) and name is not None}
        offline = await self._offline(peers)
        found = await self._without_their_jobs(found)
        taken: list[UUID] = []
        for run in found:
            try:
                if await self._run(run, before, offline):
                    taken.append(run.id)
            except httpx.TransportError:
                raise
            except Exception:
                # One that cannot be helped is not to keep the others from it.
                self.logger.exception("flow run %s could not be looked after", run.id)
        return taken

    async def _without_their_jobs(self, found: list[FlowRun]) -> list[FlowRun]:
        """
        *found*, of which those are being stopped now that do a stage of a job that has ended or is no more: who has
        stopped the job did not come to them, or nobody has, and the job's own run came to an end by itself.
        """
        jobs = {run.id: UUID(of[0]) for run in found if (of := stage_of(run)) is not None}
        going: set[UUID] = set()
        wanted = sorted(set(jobs.values()))
        for start in range(0, len(wanted), PAGE):
            ids = FlowRunFilter(id=FlowRunFilterId(any_=wanted[start : start + PAGE]))
            runs = await self.client.read_flow_runs(flow_run_filter=ids)
            going.update(run.id for run in runs if run.state is None or not run.state.is_final())
        left: list[FlowRun] = []
        for run in found:
            if run.id not in jobs or jobs[run.id] in going:
                left.append(run)
                continue
            with suppress(ObjectNotFound):
                # As it is now: a job ends after its stages, so that of one which has ended in order since they were
                # found, none is in progress any more.
                now = await self.client.read_flow_run(run.id)
                if now.state is None or now.state.type not in IN_PROGRESS:
                    continue
                if now.state.type is not StateType.CANCELLING and not is_taken_out(now.state):
                    self.logger.warning("flow run %s is being stopped, since its job has ended", run.id)
                    await self.client.set_flow_run_state(run.id, Cancelling(message=ITS_JOB_ENDED))
                    now = await self.client.read_flow_run(run.id)
                left.append(now)
        return [run for run in left if run.state is not None and run.state.type in IN_PROGRESS]

    async def _run(self, run: FlowRun, before: Collection[UUID], offline: Collection[str]) -> bool:
        """Look after one run, which ran here *before* or not. Whether it was taken up."""
        assert run.state is not None  # noqa: S101  # for mypy: it was found by its state
        if is_taken_out(run.state):
            # To be ended, by whoever has taken it out, or by ``upkeep`` where its environment is still registered.
            if age(run.state) > CLAIM_SECONDS:
                await self.client.set_flow_run_state(run.id, end_of_taken_out(run.state))
            return False
        # Also now: one that was begun or has ended since we asked is not what the answer says.
        if run.id in before and run.id in self.live():
            await self._attend(run)
            return False
        if run.id in before or run.id in self.live() or not await self._lost(run, offline):
            return False
        if (now := await self._now(run.id)) is None or now.id != run.state.id:
            return False
        await asyncio.to_thread(_end_process, run.id)
        state = await give_up(self.client, run.id, LOST, seen=run.state.id)
        if state is None:
            return False
        self.logger.warning("flow run %s was lost by %s: now %s", run.id, worker_of(run), state.name)
        return True

    async def _now(self, run_id: UUID) -> State[Any] | None:
        with suppress(ObjectNotFound):
            return (await self.client.read_flow_run(run_id)).state
        return None

    async def upkeep(self) -> None:
        """
        One round over what an API process may have left half done: jobs taken out of the queue and not ended, deletions
        that were begun; and over jobs that have waited for too long and that nobody looks at.
        """
        blocks = await load_environments(self.client)
        names = [name for name, block in blocks.items() if block.work_pool == self.work_pool]
        jobs = self.jobs()
        for name in names:
            await jobs.expire_waiting(name)
        if names:
            await jobs.finish_deletions(*names)

    async def folders(self) -> list[str]:
        """
        One round over the job folders on this machine. Returns the jobs whose folder was removed, since they are
        completed or no more: whoever completed or deleted them died before he did that, or was on another machine.
        Algorithms that run on though nobody holds their job's folder are ended first.
        """
        blocks = [
            block for block in (await load_environments(self.client)).values() if block.work_pool == self.work_pool
        ]
        for block in blocks:
            await asyncio.to_thread(self._end_left_runs, block)
        roots = {block.workspace_root() for block in blocks}
        gone: list[str] = []
        for root in roots:
            # First the folders, then the jobs: a folder is made after its job.
            found = await asyncio.to_thread(job_ids, root)
            wanted = await self._wanting(found)
            for job_id in found:
                if job_id not in wanted and await asyncio.to_thread(self._discard, root, job_id):
                    self.logger.info("the folder of job %s, which nobody needs any more, was removed", job_id)
                    gone.append(job_id)
        return gone

    def _end_left_runs(self, block: ComputeEnvironment) -> None:
        try:
            for job_id in end_left_runs(block.make_runner(), block.workspace_root()):
                self.logger.warning("the algorithm of job %s, which ran on without its process, was ended", job_id)
        except OSError:
            self.logger.warning("algorithms of %s that run without their process could not be ended", block.offer.id)

    def _discard(self, root: Path, job_id: str) -> bool:
        try:
            return discard(root, job_id)
        except (OSError, subprocess.CalledProcessError):
            self.logger.warning("the folder of job %s, which nobody needs any more, could not be removed", job_id)
            return False

    async def _attend(self, run: FlowRun) -> None:
        """Prefect's own observers are told by events, which are lost while the server is away."""
        state = run.state
        if state is None:
            return
        if state.type is StateType.CANCELLING:
            if age(state) > STOP_SECONDS:
                await self.stop(run.id)
        elif worker_of(run) not in (None, self.worker):
            self.logger.warning("flow run %s has been taken up by %s; it is ended here", run.id, worker_of(run))
            await self.leave(run.id)

    async def _lost(self, run: FlowRun, offline: Collection[str]) -> bool:
        owner = worker_of(run)
        if owner is None:
            return run.state is not None and age(run.state) > CLAIM_SECONDS
        return owner == self.worker or owner in offline

    async def _offline(self, names: Iterable[str]) -> set[str]:
        """Those of the workers *names* that have been offline for so long that they are taken for dead."""
        workers = await self.client.read_workers_for_work_pool(self.work_pool)
        online = {worker.name for worker in workers if worker.status is WorkerStatus.ONLINE}
        now = time.monotonic()
        # One that is gone from the list is not told apart from one that is silent: Prefect removes neither by itself.
        self._silent_since = {name: self._silent_since.get(name, now) for name in names if name not in online}
        return {name for name, since in self._silent_since.items() if now - since >= PEER_SECONDS}

    async def _in_progress(self) -> list[FlowRun]:
        runs: list[FlowRun] = []
        while True:
            page = await self.client.read_flow_runs(
                flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=IN_PROGRESS))),
                work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[self.work_pool])),
                limit=PAGE,
                offset=len(runs),
            )
            runs.extend(page)
            if len(page) < PAGE:
                return runs

    async def _wanting(self, job_ids: Sequence[str]) -> set[str]:
        """Those of the jobs that have a use for their folder: they are there and not completed."""
        wanting: set[str] = set()
        for start in range(0, len(job_ids), PAGE):
            ids = [UUID(job_id) for job_id in job_ids[start : start + PAGE]]
            runs = await self.client.read_flow_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=ids)))
            wanting.update(run.id.hex for run in runs if not (run.state and run.state.is_completed()))
        return wanting


def age(state: State[Any]) -> float:
    """Seconds since a run is in *state*."""
    return (datetime.now(UTC) - state.timestamp).total_seconds()


def _end_process(run_id: UUID) -> None:
    """
    End what an earlier process of this worker may have left of a run.

    A run of ours dies with its worker, but one that could not be forked does not (``flows.worker``).
    """
    mark = f"PREFECT__FLOW_RUN_ID={run_id}".encode()
    left = []
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            if process.pid != os.getpid() and mark in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                process.kill()
                left.append(process)
    psutil.wait_procs(left, timeout=5.0)
