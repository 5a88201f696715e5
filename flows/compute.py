"""The deployed flow: one run of it is one job."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, cast
from uuid import UUID

import httpx
from prefect import Flow, flow, get_client
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Cancelled
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from blocks.environment import ComputeEnvironment, load_environments_sync, state_folder
from blocks.store import StoreUnavailable
from flows.build import StageResult, is_away, run_plan
from flows.errors import InvalidWorkflow
from flows.jobs import waited_too_long
from flows.plan import Plan, compile_plan
from flows.sealing import Seal
from flows.states import STOPPED_IN_QUEUE, ended_state, stopped_before_it_began, waited
from flows.status import Phase, Status
from flows.steps import settle, step_keys
from flows.workflow import parse_workflow
from tasks.execute import end_left_runs
from tasks.workspace import held, remove_job, sweep

FLOW_NAME: Final = "compute"
DOCUMENT: Final = "document"
"""Name of a sealed document in the store of documents."""

# A step that waits for others holds a thread, so this bounds how many steps of one job are laid out at once.
# They are submitted in an order in which they can be done, so whatever the bound, the first can always go on.
_THREADS: Final = 64


def key_file() -> Path:
    """Where the service's key is: ``$C2D_KEY_FILE``, else ``key`` in the state folder."""
    return Path(os.environ.get("C2D_KEY_FILE") or state_folder() / "key")


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


@flow(name=FLOW_NAME, task_runner=_TASK_RUNNER, persist_result=False, on_completion=[_tidy])
def run_job(sealed: str, summary: dict[str, Any], stored_in: str | None = None) -> State[Any]:
    """
    Run one job to its end.

    Args:
        sealed: The workflow document, sealed; with *stored_in*, the name of the sealed document in a store.
        summary: What of the document may be read by anyone who sees this run. For people, never used here.
        stored_in: The environment in whose store a document too large for a parameter is kept.

    Returns:
        A state named after the job's terminal status, with the reason as its message.

    Raises:
        Exception: Only for a bug or a broken installation; the run then ends as failed without a name of ours.
    """
    try:
        return _run_job(sealed, stored_in)
    except httpx.HTTPError as fault:
        if not is_away(fault):
            raise
        # Were it raised, the job would end with an error inside the service. As it is, its worker finds that the
        # process is gone, and the job goes on when the server is back.
        get_run_logger().error("the server is away; this process gives up: %s", type(fault).__name__)
        os._exit(os.EX_TEMPFAIL)


def _run_job(sealed: str, stored_in: str | None) -> State[Any]:
    job_id = str(flow_run.id).replace("-", "")
    with get_client(sync_client=True) as client:
        environments = load_environments_sync(client)
        states = client.read_flow_run_states(flow_run.id)
    if stopped_before_it_began(states):
        # To Prefect a run that is cancelled may begin, which is what a worker does with one that it had taken before.
        return Cancelled(message=STOPPED_IN_QUEUE)
    if stored_in is not None:
        sealed = environments[stored_in].documents().read_bytes(sealed, DOCUMENT).decode("ascii")
    seal = Seal.from_file(key_file())
    document = seal.open(sealed)
    try:
        plan = compile_plan(parse_workflow(document), {name: block.offer for name, block in environments.items()})
    except InvalidWorkflow as refusal:
        # It was valid when it was taken in, so an environment has changed since.
        return ended_state(Status.RUN_FAILED, f"refused: the environment has changed: {refusal}")
    offer = environments[plan.stages[0].environment].offer
    if 0 < offer.max_wait < waited(states):
        # A worker that was away for long may come before anyone has looked at the job.
        return ended_state(Status.EXPIRED_IN_QUEUE, waited_too_long(offer))
    get_run_logger().info("plan\n%s", plan)
    if obstacle := _obstacle(plan, environments):
        return ended_state(Status.RUN_FAILED, f"refused: {obstacle}")
    used = [environments[stage.environment] for stage in plan.stages]
    blocks = {block.workspace_root(): block for block in used}
    _sweep(blocks)
    with ExitStack() as stack:
        for root, block in blocks.items():
            stack.enter_context(held(root, job_id, block.offer.storage_expiry, waits=_tell_of_waiting))
        result = _go_on(plan, job_id, environments, seal)
    return ended_state(result.status, result.message)


def _go_on(plan: Plan, job_id: str, environments: dict[str, ComputeEnvironment], seal: Seal) -> StageResult:
    """Do what no earlier try of this job has done, and leave of it what the next one need not do."""
    keys = step_keys(plan, environments, seal.fingerprint)
    published = _published(plan, job_id, environments) if flow_run.run_count > 1 else None
    done = settle(plan, job_id, keys, environments, published)
    if flow_run.run_count > 1:
        get_run_logger().info("%d of %d steps had finished before", len(done), len(plan.steps))
        _retract_unfinished(plan, job_id, environments, done)
    try:
        result = run_plan(plan, job_id, environments, seal.fingerprint, _still_ours(flow_run.id, flow_run.run_count))
    except BaseException:
        # Logs that have not been published are all there is to tell what an algorithm was at when it was stopped.
        settle(plan, job_id, keys, environments, logs=True)
        raise
    settle(plan, job_id, keys, environments)
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
    """The stages whose part is in the store; None while nobody can tell."""
    try:
        return {
            stage
            for environment in {stage.environment for stage in plan.stages}
            for stage in environments[environment].store().stages(job_id)
        }
    except StoreUnavailable:
        return None


def _retract_unfinished(
    plan: Plan, job_id: str, environments: dict[str, ComputeEnvironment], done: frozenset[str]
) -> None:
    """What an earlier try has published of stages that are done anew, or are no more, is not to be taken for theirs."""
    keep = {stage.index for stage in plan.stages if f"{stage.index}/{Phase.PUBLISH}" in done}
    for environment in {stage.environment for stage in plan.stages}:
        try:
            environments[environment].store().retract(job_id, keep)
        except StoreUnavailable:
            get_run_logger().warning("the store is away; what an earlier try has published is replaced at the end")


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
