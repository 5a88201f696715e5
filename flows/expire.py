"""
The deployed flow that removes what has expired, finishes deletions that were cut off, and ends jobs that have waited
for too long. One deployment for each work pool, on a schedule of Prefect's.

In the pool of the environments it is about: so it reaches the stores that their workers reach, and the job folders of
the machine that it runs on. Nothing depends on when it runs: what has expired is told as such on the second
(``flows.jobs.as_of``), and is out of reach from then on. So is a job that has waited for too long: who looks at it ends
it.
"""

from __future__ import annotations

import asyncio
import subprocess
from datetime import UTC, datetime
from typing import Any, Final

from prefect import flow, get_client
from prefect.artifacts import acreate_table_artifact
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Failed

from blocks.environment import ComputeEnvironment, load_environments
from flows.compute import key_file
from flows.errors import NotReady
from flows.jobs import Job
from flows.prefect_jobs import PrefectJobs
from flows.sealing import Seal
from tasks.execute import end_left_runs
from tasks.workspace import sweep

FLOW_NAME: Final = "expire"

ARTIFACT: Final = "expired-results"

GRACE: Final = 600.0
"""
Seconds after their expiry that results are removed, at the earliest: whoever began a download in time can end it, and
clocks of several machines may differ.
"""

MOST: Final = 200
"""Jobs of one environment dealt with in one run, so that no run holds a slot of its pool for long."""


@flow(name=FLOW_NAME, persist_result=False)
async def expire(grace: float = GRACE, most: int = MOST) -> State[Any]:
    """
    Remove results, sealed documents and job folders that have expired, and those of jobs whose deletion was begun; of
    the environments of the work pool this runs in, of all where it runs in none. May be repeated, and run in several
    places at once.

    Args:
        grace: Seconds to wait after the expiry.
        most: Jobs of each environment that are dealt with; the next run goes on.

    Returns:
        A failed state if a store did not do what it was to.
    """
    logger = get_run_logger()
    async with get_client() as client:
        this = await client.read_flow_run(flow_run.id)
        await _drop_missed(client, this)
        jobs = PrefectJobs(client, Seal.from_file(key_file()))
        blocks = await load_environments(client)
        removed: list[Job] = []
        failed: list[str] = []
        waiting = deleted = 0
        for name, block in sorted(blocks.items()):
            if this.work_pool_name not in (None, block.work_pool):
                continue
            try:
                waiting += len(await jobs.expire_waiting(name, most=most))
                begun = await jobs.finish_deletions(name, most=most)
                deleted += len(begun.removed)
                done = await jobs.expire(name, grace=grace, most=most)
            except NotReady as fault:
                logger.warning("%s: %s", name, fault)
                failed.append(name)
                continue
            removed.extend(done.removed)
            if done.failed:
                logger.warning("%s: the store did not remove what %d jobs left", name, len(done.failed))
                failed.append(name)
            elif begun.failed:
                logger.warning("%s: %d jobs that are being deleted could not be removed", name, len(begun.failed))
                failed.append(name)
            await asyncio.to_thread(_sweep, block)
            try:
                await jobs.sweep_handovers(name)
            except NotReady as fault:
                logger.warning("%s: what was handed over between stages was not looked at: %s", name, fault)
                failed.append(name)
        if orphans := await jobs.unattended():
            logger.warning("%d jobs of environments that are not registered keep what they left", orphans)
    if removed:
        await acreate_table_artifact(
            table=[_row(job) for job in removed],
            key=ARTIFACT,
            description=f"Results that expired and were removed; {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        )
    told = f"results of {len(removed)} jobs removed, {waiting} jobs expired in the queue, {deleted} deletions finished"
    return (
        Failed(message=f"{told}; not all of {', '.join(dict.fromkeys(failed))}") if failed else Completed(message=told)
    )


async def _drop_missed(client: PrefectClient, this: FlowRun) -> None:
    """While no worker was there, Prefect has gone on scheduling. One run is enough for all that were missed."""
    if this.deployment_id is None:
        return
    missed = await client.read_flow_runs(
        flow_run_filter=FlowRunFilter(
            deployment_id=FlowRunFilterDeploymentId(any_=[this.deployment_id]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
            expected_start_time=FlowRunFilterExpectedStartTime(before_=datetime.now(UTC)),
        )
    )
    for run in missed:
        await client.set_flow_run_state(run.id, Cancelled(message="missed; a later run does what it was to do"))


def _sweep(block: ComputeEnvironment) -> None:
    try:
        end_left_runs(block.make_runner(), block.workspace_root())
    except OSError:
        get_run_logger().warning("algorithms of %s that run without their process could not be ended", block.offer.id)
    try:
        sweep(block.workspace_root(), block.offer.storage_expiry)
    except (OSError, subprocess.CalledProcessError):
        get_run_logger().warning("folders of jobs of %s that ended long ago could not be removed", block.offer.id)


def _row(job: Job) -> dict[str, str]:
    """No owner and no name of a file: artifacts are read by whoever reads the Prefect UI."""
    return {
        "job": job.id,
        "environment": job.environment,
        "ended": job.finished.isoformat(timespec="seconds") if job.finished else "",
        "expired": job.expires.isoformat(timespec="seconds") if job.expires else "",
    }
