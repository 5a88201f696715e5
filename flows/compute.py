"""The deployed flow: one run of it is one job."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final, cast
from uuid import UUID

import httpx
from prefect import Flow, flow, get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import ObjectNotFound
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Cancelled
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from blocks.environment import ComputeEnvironment, load_environments_sync, state_folder
from blocks.store import ResultStore, StoreUnavailable
from flows.build import StageResult, is_away, run_plan
from flows.errors import InvalidWorkflow
from flows.jobs import waited_too_long
from flows.plan import Plan, compile_plan
from flows.sealing import Seal
from flows.stages import FLOW_NAME, ITS_JOB_ENDED, Coordinator, NotDeployed, is_spread
from flows.states import STOPPED_IN_QUEUE, ended_state, restarted_at, stopped_before_it_began, waited
from flows.status import Phase, Status
from flows.steps import settle, step_keys
from flows.workflow import parse_workflow
from tasks.execute import end_left_runs
from tasks.handover import handed_over
from tasks.provision import InputUnreachable
from tasks.workspace import held, remove_job, sweep

DOCUMENT: Final = "document"
"""Name of a sealed document in the store of documents."""

# A step that waits for others holds a thread, so this bounds how many steps of one job are laid out at once.
# They are submitted in an order in which they can be done, so whatever the bound, the first can always go on.
_THREADS: Final = 64


def key_file() -> Path:
    """Where the service's key is: ``$C2D_KEY_FILE``, else ``key`` in the state folder."""
    return Path(os.environ.get("C2D_KEY_FILE") or state_folder() / "key")


_STORE_AWAY: Final = "the store is away; what an earlier try has published is replaced at the end"

_TASK_RUNNER: Final = cast("TaskRunner[PrefectFuture[Any]]", ThreadPoolTaskRunner(max_workers=_THREADS))


def _tidy(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """
    What has been published is in the store; data that must not leave must not lie about either.

    Not before the end is recorded: a job that is cut off in between would do all of it again, and publish twice. If
    this is cut off, the worker makes up for it (``flows.reconcile``).
    """
    with get_client(sync_client=True) as client:
        environments = load_environments_sync(client)
    for name in flow_run.parameters["summary"]["environments"]:
        remove_job(environments[name].workspace_root(), flow_run.id.hex)
    if is_spread(flow_run):
        for name in flow_run.parameters["summary"]["environments"]:
            environments[name].handover().delete_job(flow_run.id.hex)


@flow(name=FLOW_NAME, task_runner=_TASK_RUNNER, persist_result=False, on_completion=[_tidy])
def run_job(
    sealed: str,
    summary: dict[str, Any],
    stored_in: str | None = None,
    job: str | None = None,
    stage: int | None = None,
) -> State[Any]:
    """
    Run one job to its end, or one stage of a job that is in several environments.

    Args:
        sealed: The workflow document, sealed; with *stored_in*, the name of the sealed document in a store; with *job*,
            nothing.
        summary: What of the document may be read by anyone who sees this run. For people, never used here.
        stored_in: The environment in whose store a document too large for a parameter is kept.
        job, stage: Run this stage of this job, with the document of the job's own run; see ``flows.stages``.

    Returns:
        A state named after the terminal status of the job, or of the stage, with the reason as its message. That of a
        stage that is done has its key.

    Raises:
        Exception: Only for a bug or a broken installation; the run then ends as failed without a name of ours.
    """
    try:
        return _run_job(sealed, stored_in, None if job is None or stage is None else (job, stage))
    except httpx.HTTPError as fault:
        if not is_away(fault):
            raise
        # Were it raised, the job would end with an error inside the service. As it is, its worker finds that the
        # process is gone, and the job goes on when the server is back.
        get_run_logger().error("the server is away; this process gives up: %s", type(fault).__name__)
        os._exit(os.EX_TEMPFAIL)


def _run_job(sealed: str, stored_in: str | None, of_job: tuple[str, int] | None) -> State[Any]:
    run_id = str(flow_run.id).replace("-", "")
    job_id, index = of_job or (run_id, None)
    with get_client(sync_client=True) as client:
        environments = load_environments_sync(client)
        states = client.read_flow_run_states(flow_run.id)
        job = _going_on(client, job_id) if of_job else None
    if stopped_before_it_began(states):
        # To Prefect a run that is cancelled may begin, which is what a worker does with one that it had taken before.
        return Cancelled(message=STOPPED_IN_QUEUE)
    if of_job:
        if job is None:
            return Cancelled(message=ITS_JOB_ENDED)
        sealed, stored_in = job.parameters["sealed"], job.parameters.get("stored_in")
    if stored_in is not None:
        sealed = environments[stored_in].documents().read_bytes(sealed, DOCUMENT).decode("ascii")
    seal = Seal.from_file(key_file())
    document = seal.open(sealed)
    try:
        plan = compile_plan(parse_workflow(document), {name: block.offer for name, block in environments.items()})
    except InvalidWorkflow as refusal:
        # It was valid when it was taken in, so an environment has changed since.
        return ended_state(Status.RUN_FAILED, f"refused: the environment has changed: {refusal}")
    return _run_plan(plan, index, job_id, run_id, environments=environments, seal=seal, states=states)


def _run_plan(
    plan: Plan,
    index: int | None,
    job_id: str,
    run_id: str,
    *,
    environments: dict[str, ComputeEnvironment],
    seal: Seal,
    states: list[State],
) -> State[Any]:
    """All of the job's plan, or stage *index* of it."""
    own = plan if index is None else plan.part(index)
    offer = environments[own.stages[0].environment].offer
    if 0 < offer.max_wait < waited(states):
        # A worker that was away for long may come before anyone has looked at the job.
        return ended_state(Status.EXPIRED_IN_QUEUE, waited_too_long(offer))
    get_run_logger().info("plan\n%s", own)
    if len(own.environments) > 1:
        return _coordinate(plan, job_id, environments, seal, restarted_at(states))
    if obstacle := _obstacle(own, environments):
        return ended_state(Status.RUN_FAILED, f"refused: {obstacle}")
    used = [environments[stage.environment] for stage in own.stages]
    blocks = {block.workspace_root(): block for block in used}
    _sweep(blocks)
    with ExitStack() as stack:
        for root, block in blocks.items():
            stack.enter_context(held(root, run_id, block.offer.storage_expiry, waits=_tell_of_waiting))
        try:
            task = _task(plan, own, job_id, run_id, environments=environments, seal=seal)
        except InputUnreachable as problem:
            return ended_state(Status.DATA_FAILED, str(problem))
        result = _go_on(task)
    made = task.keys[f"{index}/{Phase.PUBLISH}"] if index is not None else ""
    return ended_state(result.status, made if result.ok and index is not None else result.message)


def _going_on(client: SyncPrefectClient, job_id: str) -> FlowRun | None:
    """The job's own run; None if the job has ended, is being stopped, or is no more."""
    try:
        run = client.read_flow_run(UUID(job_id))
    except ObjectNotFound:
        return None
    over = run.state is None or run.state.is_final() or run.state.type is StateType.CANCELLING
    return None if over else run


def _coordinate(
    plan: Plan,
    job_id: str,
    environments: dict[str, ComputeEnvironment],
    seal: Seal,
    since: datetime | None,
) -> State[Any]:
    """Have each stage done by a run of its own."""

    def withdraw(index: int) -> None:
        _withdraw(environments[plan.stage(index).environment], job_id, index)

    coordinator = Coordinator(
        plan,
        job_id,
        step_keys(plan, environments, seal.fingerprint),
        since,
        _kept(plan, job_id, environments) if since is not None else frozenset(),
        flow_run.run_count,
        withdraw,
        environments,
    )
    try:
        return coordinator.run()
    except NotDeployed as fault:
        return ended_state(Status.RUN_FAILED, f"refused: the environment `{fault}` is not deployed any more")


def _kept(plan: Plan, job_id: str, environments: dict[str, ComputeEnvironment]) -> frozenset[int]:
    """The stages whose part is in the stores, with what they have handed over; all of which nobody can tell."""
    published = _published(plan, job_id, environments)
    return frozenset(stage.index for stage in plan.stages if published is None or stage.index in published)


@dataclass(frozen=True)
class _Task:
    """What one run has to do: all of a job, or a stage of it."""

    plan: Plan
    job_id: str
    run_id: str
    environments: dict[str, ComputeEnvironment] = field(repr=False)
    seal: Seal = field(repr=False)
    keys: dict[str, str] = field(repr=False)
    local_keys: dict[str, str] = field(repr=False)
    """The same, but of a stage that reads what another run has handed over, with what exactly that is."""
    handovers: dict[int, ResultStore] = field(repr=False)


def _task(
    plan: Plan, own: Plan, job_id: str, run_id: str, *, environments: dict[str, ComputeEnvironment], seal: Seal
) -> _Task:
    """Raises: InputUnreachable."""
    here = {stage.index for stage in own.stages}
    read = {part.stage for stage in own.stages for part in stage.inputs if part.stage is not None} - here
    handovers = {index: environments[plan.stage(index).environment].handover() for index in read}
    received = {index: handed_over(store, job_id, index) for index, store in handovers.items()}
    keys = step_keys(plan, environments, seal.fingerprint)
    return _Task(
        plan=own,
        job_id=job_id,
        run_id=run_id,
        environments=environments,
        seal=seal,
        keys=keys,
        local_keys=step_keys(plan, environments, seal.fingerprint, received) if received else keys,
        handovers=handovers,
    )


def _go_on(task: _Task) -> StageResult:
    """Do what no earlier try has done, and leave of it what the next one need not do."""
    plan, environments, keys = task.plan, task.environments, task.local_keys
    published = _published(plan, task.job_id, environments) if flow_run.run_count > 1 else None
    done = settle(plan, task.run_id, keys, environments, published)
    if flow_run.run_count > 1:
        get_run_logger().info("%d of %d steps had finished before", len(done), len(plan.steps))
        _retract_unfinished(task, done)
    try:
        result = run_plan(
            plan,
            task.job_id,
            environments,
            task.seal.fingerprint,
            _still_ours(flow_run.id, flow_run.run_count),
            seal=task.seal.close,
            keys=keys,
            run_id=task.run_id,
            handovers=task.handovers,
        )
    except BaseException:
        # Logs that have not been published are all there is to tell what an algorithm was at when it was stopped.
        settle(plan, task.run_id, keys, environments, logs=True)
        raise
    settle(plan, task.run_id, keys, environments)
    return result


def _still_ours(run_id: str, run_count: int) -> Callable[[], bool]:
    """Whether the run is still in the try that it is in now."""

    def ask() -> bool:
        with get_client(sync_client=True) as client:
            run = client.read_flow_run(UUID(run_id))
        live = run.state is not None and run.state.type in (StateType.RUNNING, StateType.CANCELLING)
        return live and run.run_count == run_count

    return ask


def _published(plan: Plan, job_id: str, environments: dict[str, ComputeEnvironment]) -> set[int] | None:
    """
    The stages whose part is in the store, and what they hand over in the store for that; None while nobody can tell.
    """
    try:
        found = {
            stage for environment in plan.environments for stage in environments[environment].store().stages(job_id)
        }
        for stage in plan.stages:
            if stage.handed_over and stage.index in found:
                found -= {stage.index} - environments[stage.environment].handover().stages(job_id)
    except StoreUnavailable:
        return None
    return found


def _retract_unfinished(task: _Task, done: frozenset[str]) -> None:
    """What an earlier try has published of stages that are done anew, or are no more, is not to be taken for theirs."""
    keep = {stage.index for stage in task.plan.stages if f"{stage.index}/{Phase.PUBLISH}" in done}
    if task.run_id != task.job_id:
        for stage in task.plan.stages:
            if stage.index not in keep:
                _withdraw(task.environments[stage.environment], task.job_id, stage.index)
        return
    for environment in task.plan.environments:
        try:
            task.environments[environment].store().retract(task.job_id, keep)
        except StoreUnavailable:
            get_run_logger().warning(_STORE_AWAY)


def _withdraw(environment: ComputeEnvironment, job_id: str, stage: int) -> None:
    """The same of one stage, and what it has handed over; other stages may be publishing beside it."""
    try:
        environment.handover().withdraw(job_id, [stage])
        environment.store().withdraw(job_id, [stage])
    except StoreUnavailable:
        get_run_logger().warning(_STORE_AWAY)


def _sweep(blocks: dict[Path, ComputeEnvironment]) -> None:
    """Of jobs that were never restarted. Not this job's business, so nothing of it may end this job."""
    for root, block in blocks.items():
        try:
            # Of this one's earlier try too: no folder is touched while an algorithm may be writing into it.
            if ended := end_left_runs(block.make_runner(), root):
                get_run_logger().warning("algorithms of %d jobs were still running without their process", len(ended))
        except OSError:
            get_run_logger().warning("algorithms that run without their process could not be ended")
        try:
            sweep(root, block.offer.storage_expiry)
        except (OSError, subprocess.CalledProcessError):
            get_run_logger().warning("folders of jobs that ended long ago could not be removed")


def _tell_of_waiting() -> None:
    get_run_logger().warning("another process still works on this job; waiting for its end")


def _obstacle(plan: Plan, environments: dict[str, ComputeEnvironment]) -> str | None:
    """Why a stage could not be shut in on this machine; asked before anything is fetched."""
    blocks = {stage.environment: environments[stage.environment] for stage in plan.stages}
    found = [block.make_runner().obstacle() for block in blocks.values() if not block.allow_unsandboxed]
    return next((obstacle for obstacle in found if obstacle), None)
