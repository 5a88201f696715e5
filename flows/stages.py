"""
Jobs whose stages are in several environments.

The job's run does no stage itself. It begins a run for each stage, by the deployment of the stage's environment and so
in its work pool and its queue, when the stages it depends on are done, and waits for all of them::

    run of the job, in the queue ``COORDINATORS`` of its first environment's pool
        run of stage 0, in the queue of its environment        puts what it puts out into the store for hand-overs
        run of stage 1, in the queue of its environment        fetches that from there

It is in a queue of its own because it must not wait in that of an environment, nor hold a slot there: of two jobs, one
from A to B and one from B to A, each would hold the slot the other's stage waits for. No run of a stage ever waits for
the run of a job.

A stage has one run, however often it is done: at a restart a run that had failed goes back into its queue and finds
the steps it had finished; one that is completed stays, while it is still what the document asks for. Whose stage it is
stands in its parameters and tags; it has no document of its own but reads that of its job's run, so that one that is
taken up after a restart cannot do what another document said.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, TypeVar, cast
from uuid import UUID

from prefect import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.deployments.flow_runs import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Scheduled
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_fixed

from blocks.environment import ComputeEnvironment
from flows.build import AWAY_SECONDS, SERVER_PATIENCE, StageResult, is_away
from flows.plan import Plan, PlannedStage
from flows.states import as_it_goes_on, ended_state
from flows.status import BY_TEXT, TERMINAL, Status

FLOW_NAME: Final = "compute"
"""Of the flow whose runs are jobs, and stages of jobs in several environments."""

FIRST_PAUSE: Final = 0.25
LONGEST_PAUSE: Final = 3.0
"""
Seconds between two looks at the runs of the stages: short while something has just happened, then in proportion to how
long nothing has. A hundred jobs that wait for long stages ask the server thirty times a second.
"""

ITS_JOB_ENDED: Final = "the job of this stage has ended"
"""Message of the end of a run whose stage is not to be done any more."""

PAGE: Final = 200
"""Rows Prefect answers at most in one request; a job has fewer stages."""

T = TypeVar("T")


class StageBroken(Exception):
    """A stage ended with an error inside the service; its own run has the trace."""


def job_tag(job_id: str) -> str:
    """Of the runs of a job's stages. The job's own run does not have it."""
    return f"job:{job_id}"


def stage_of(run: FlowRun) -> tuple[str, int] | None:
    """The job and the index of the stage that a run does; None for one that does a whole job, or no job at all."""
    job, stage = run.parameters.get("job"), run.parameters.get("stage")
    return (job, stage) if isinstance(job, str) and isinstance(stage, int) else None


def is_spread(run: FlowRun) -> bool:
    """Whether a job's run has its stages done by runs of their own."""
    return bool((run.parameters.get("summary") or {}).get("places"))


def runs_of_jobs(job_ids: Iterable[str]) -> tuple[FlowFilter, FlowRunFilter]:
    """Which runs are those of the stages of these jobs."""
    return (
        FlowFilter(name=FlowFilterName(any_=[FLOW_NAME])),
        FlowRunFilter(tags=FlowRunFilterTags(any_=[job_tag(job_id) for job_id in job_ids])),
    )


def counts(run: FlowRun, since: datetime | None) -> bool:
    """
    Whether what a stage's run came to belongs to the life of its job that began at *since*, its last restart.

    One that failed before that is to be done again. One that was completed before is still done, or not; who looks
    from outside takes it for done until it is in its queue again. All times are the server's.
    """
    state = run.state
    if since is None or state is None or not state.is_final():
        return True
    return state.is_completed() or state.timestamp > since


def patiently(ask: Callable[[], T]) -> T:
    """What *ask* answers, once the server is there. Raises what it raises after ``SERVER_PATIENCE``."""
    asked = Retrying(
        retry=retry_if_exception(is_away),
        wait=wait_fixed(AWAY_SECONDS),
        stop=stop_after_delay(SERVER_PATIENCE),
        reraise=True,
    )
    return asked(ask)


@dataclass
class Coordinator:
    """
    Begins the runs of a job's stages and waits for them, in the job's own run. Keeps nothing that is lost with its
    process: whoever takes the job up finds its runs.

    Args:
        keys: Of the steps of the whole plan.
        since: When the job was restarted last; None if it never was.
        kept: The stages of which everything is in the stores that they put there when they were completed.
        run_count: Of the job's run, in this try.
        withdraw: Remove what a stage that is to be done again has put into the stores.
        environments: By id; the type of their pools tells whether a stage that crashed is about to go on.
    """

    plan: Plan
    job_id: str
    keys: Mapping[str, str] = field(repr=False)
    since: datetime | None
    kept: Collection[int]
    run_count: int
    withdraw: Callable[[int], None]
    environments: Mapping[str, ComputeEnvironment] = field(repr=False)

    def run(self) -> State[Any]:
        """
        Returns:
            The state the job ends in: COMPLETED, or the failure of the first stage (in the plan's order) that failed.

        Raises:
            StageBroken: A stage ended with an error inside the service.
            ObjectNotFound: The job's run is no more.
        """
        changed = time.monotonic()
        seen: object = None
        for index in self._stale(self._runs()):
            # Also of those whose turn may not come again, because one before them fails this time.
            self.withdraw(index)
        while True:
            runs = self._runs()
            ended = self._advance(runs)
            if len(ended) == len(self.plan.stages):
                break
            if (now := {run.id: run.state.id for run in runs.values() if run.state}) != seen:
                seen, changed = now, time.monotonic()
            time.sleep(min(LONGEST_PAUSE, max(FIRST_PAUSE, 0.1 * (time.monotonic() - changed))))
        for stage in self.plan.stages:
            run = ended[stage.index]
            if run is not None and not _completed(run):
                return self._failure(stage, run)
        return ended_state(Status.COMPLETED, "")

    def _stale(self, runs: Mapping[int, FlowRun]) -> set[int]:
        """The stages that ended before the last restart in a way that does not stand, or follow one that is redone."""
        stale: set[int] = set()
        again: set[int] = set()
        for stage in self.plan.stages:
            run = runs.get(stage.index)
            if run is None or run.state is None or not run.state.is_final() or self._is_of_now(run.state):
                again.add(stage.index)
            elif not self._stands(stage, run, again):
                again.add(stage.index)
                stale.add(stage.index)
        return stale if self.since is not None else set()

    def _advance(self, runs: Mapping[int, FlowRun]) -> dict[int, FlowRun | None]:
        """Begin what can begin. Answers the stages that have ended, with None those that are not to begin."""
        ended: dict[int, FlowRun | None] = {}
        again: set[int] = set()
        for stage in self.plan.stages:
            run = runs.get(stage.index)
            if any(other in ended and not _completed(ended[other]) for other in stage.depends_on):
                # One that was begun before a restart, say, is still waited for.
                if run is None or run.state is None or run.state.is_final():
                    ended[stage.index] = None
                continue
            if not all(other in ended for other in stage.depends_on):
                continue
            if run is None:
                self._begin(stage)
            elif run.state is not None and run.state.is_final():
                if self._stands(stage, run, again):
                    ended[stage.index] = run
                    if self._is_of_now(run.state):
                        again.add(stage.index)
                else:
                    self._begin_again(stage, run)
        return ended

    def _stands(self, stage: PlannedStage, run: FlowRun, again: AbstractSet[int]) -> bool:
        """
        Whether the end of a stage's run is that of the stage: it ended since the last restart, or what it came to
        before is still what the document asks for, is there, and was made from what the stages before it put out last.
        """
        assert run.state is not None  # noqa: S101  # for mypy: it has ended
        if self._is_of_now(run.state):
            return True
        made = self.keys[f"{stage.index}/publish"]
        same = run.state.is_completed() and run.state.message == made and stage.index in self.kept
        return same and again.isdisjoint(stage.depends_on)

    def _is_of_now(self, state: State[Any]) -> bool:
        return self.since is None or state.timestamp > self.since

    def _runs(self) -> dict[int, FlowRun]:
        which, wanted = runs_of_jobs([self.job_id])

        def read() -> list[FlowRun]:
            with get_client(sync_client=True) as client:
                return client.read_flow_runs(flow_filter=which, flow_run_filter=wanted, limit=PAGE)

        found: dict[int, FlowRun] = {}
        for run in patiently(read):
            of = stage_of(run)
            if of is not None and of[0] == self.job_id:
                found[of[1]] = as_it_goes_on(run, self.environments)
        return found

    def _begin(self, stage: PlannedStage) -> None:
        if not self._may_begin():
            return
        environment = stage.environment

        def begin() -> FlowRun:
            # What was asked for and not answered is found by its key, or by the next look at the runs.
            run = run_deployment(
                f"{FLOW_NAME}/{environment}",
                parameters=stage_parameters(self.job_id, stage),
                flow_run_name=f"{self.plan.agreement_id[:80]}, stage {stage.index}",
                tags=[job_tag(self.job_id), f"stage:{stage.index}", f"environment:{environment}"],
                idempotency_key=f"stage:{self.job_id}/{stage.index}",
                work_queue_name=environment,
                timeout=0,
            )
            return cast(FlowRun, run)  # no coroutine: nothing here runs on an event loop

        try:
            run = patiently(begin)
        except ObjectNotFound:
            raise NotDeployed(environment) from None
        get_run_logger().info("stage %d is flow run %s in %s", stage.index, run.id, environment)

    def _begin_again(self, stage: PlannedStage, run: FlowRun) -> None:
        if not self._may_begin():
            return

        def put_back() -> None:
            with get_client(sync_client=True) as client:
                now = client.read_flow_run(run.id).state
                if now is None or run.state is None or now.id != run.state.id:
                    return  # asked for before, and not answered; it may run already
                # Task runs of earlier tries stay on record; this tells them from those to come.
                parameters = stage_parameters(self.job_id, stage, tries=run.run_count)
                client.update_flow_run(run.id, parameters=parameters)
                client.set_flow_run_state(run.id, Scheduled(), force=True)

        patiently(put_back)
        get_run_logger().info("stage %d, flow run %s, is in the queue again", stage.index, run.id)

    def _may_begin(self) -> bool:
        """
        Whether the job's run is still ours and not being stopped. If somebody else has taken it up this process ends;
        both would put the same run back into its queue.
        """

        def read() -> FlowRun:
            with get_client(sync_client=True) as client:
                return client.read_flow_run(UUID(self.job_id))

        run = patiently(read)
        kind = run.state.type if run.state is not None else None
        if run.run_count == self.run_count and kind in (StateType.RUNNING, StateType.CANCELLING):
            return kind is StateType.RUNNING
        get_run_logger().error("this job has been taken up elsewhere; no stage of it is begun from here")
        os._exit(os.EX_TEMPFAIL)

    def _failure(self, stage: PlannedStage, run: FlowRun) -> State[Any]:
        assert run.state is not None  # noqa: S101  # for mypy: it has ended
        result = stage_result(run.state)
        if result is None:
            raise StageBroken(f"stage {stage.index} ended as {run.state.name}; see flow run {run.id}")
        if result.status is Status.STOPPED:
            return Cancelled(message=f"stage {stage.index} was stopped")
        return ended_state(result.status, result.message)


class NotDeployed(Exception):
    """An environment has lost its deployment since the job was taken in. Its name is the argument."""


def stage_parameters(job_id: str, stage: PlannedStage, tries: int | None = None) -> dict[str, Any]:
    """*tries* is how often the run had been begun when it was put back into its queue last."""
    summary = {"environments": [stage.environment], **({} if tries is None else {"tries": tries})}
    return {"sealed": "", "summary": summary, "job": job_id, "stage": stage.index}


def stage_result(state: State[Any]) -> StageResult | None:
    """What the final *state* of a stage's run tells of the stage; None after a bug, or a process lost too often."""
    named = BY_TEXT.get(state.name or "")
    if named in TERMINAL:
        return StageResult(named, state.message or "")
    if state.type is StateType.CANCELLED:
        return StageResult(Status.STOPPED)
    return None


def _completed(run: FlowRun | None) -> bool:
    return run is not None and run.state is not None and run.state.is_completed()
