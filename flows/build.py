"""A plan becomes Prefect tasks: a step, a task; wired by futures."""

from __future__ import annotations

import contextvars
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from threading import Event
from typing import Any, Final, ParamSpec, cast
from uuid import UUID

import httpx
from prefect import Task, allow_failure, task
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE, CacheKeyFnPolicy
from prefect.client.schemas.objects import State
from prefect.context import TaskRunContext
from prefect.exceptions import TerminationSignal
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed
from prefect.transactions import get_transaction
from prefect.utilities.annotations import quote
from tenacity import (
    Retrying,
    retry_if_exception,
    sleep_using_event,
    stop_after_delay,
    stop_when_event_set,
    wait_fixed,
)

from blocks.assets import folder_name
from blocks.environment import ComputeEnvironment
from blocks.limits import MIB
from blocks.runner import Ending, ExitReport, Image, ImageUnavailable, Progress, Waiting
from blocks.store import Kind, ManifestInput, ResultStore
from flows.plan import Plan, PlannedStage, Step
from flows.reasons import about, seconds_left
from flows.states import SKIPPED
from flows.status import Phase, Status
from tasks.execute import execute_algorithm
from tasks.handover import hand_over, receive
from tasks.provision import (
    AlgorithmUnreachable,
    FetchedFile,
    InputSource,
    InputUnreachable,
    Sealer,
    configuration_log,
    fetch_algorithm,
    fetch_inputs,
    link_stage_outputs,
    write_parameters,
)
from tasks.results import FilterReport, PublishFailed, filter_outputs, publish_outputs
from tasks.stopping import Stopped, go_on
from tasks.workspace import Workspace, stage_workspace, steps_folder


@dataclass(frozen=True)
class StageResult:
    """What became of one stage. *status* is COMPLETED or why it failed; *message* says so in a sentence."""

    status: Status
    message: str = ""

    @property
    def ok(self) -> bool:
        return self.status is Status.COMPLETED


@dataclass(frozen=True)
class Site:
    """Where a stage is run: its environment and its folder."""

    job_id: str
    """Under which it publishes."""
    run_id: str
    """Whose folder and processes these are: the job's, or of the run that does this stage of it alone."""
    stage: PlannedStage = field(repr=False)
    environment: ComputeEnvironment = field(repr=False)
    upstream: Mapping[int, Workspace] = field(default_factory=dict, repr=False)
    """The other stages of this run."""
    handovers: Mapping[int, ResultStore] = field(default_factory=dict, repr=False)
    """Where stages of other runs of the job have put what they hand over."""
    secret: str = field(default="", repr=False)
    """The algorithm's variable ``secret``: its own, the same at every try, a secret of the service."""
    seal: Sealer | None = field(default=None, repr=False)
    """Makes what only this service can read."""
    still_ours: Callable[[], bool] = field(default=lambda: True, repr=False)
    """Asks whether nobody else has this job now."""
    stop: Event = field(default_factory=Event, repr=False)
    """Set when this job is to end at once: nothing new is begun, what runs is ended."""

    @property
    def workspace(self) -> Workspace:
        return stage_workspace(self.environment.workspace_root(), self.run_id, self.stage.index)


@dataclass(frozen=True)
class Provisioned:
    """The algorithm of a stage, in its place, and what it will run in."""

    file: FetchedFile
    image: Image


# What a step gets from one before it that failed or was skipped is None or an exception, whatever it is declared to
# be; every step asks before it begins.
Upstream = Sequence[StageResult]

P = ParamSpec("P")


def _step(function: Callable[P, Any]) -> Task[P, Any]:
    """A task whose result is remembered if it did what it was to do, and forgotten if it failed or was skipped."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> Any:
        try:
            outcome = function(*args, **kwargs)
        except Stopped:
            outcome = _stopped()
        transaction = get_transaction()
        if transaction is not None and not _succeeded(outcome):
            # Whatever is returned here would be found again: to Prefect, a task that returns has a result.
            transaction.write_on_commit = False
        return outcome

    return task(cache_policy=NO_CACHE)(run)


def _succeeded(outcome: object) -> bool:
    """A state that does not bear Prefect's own name tells of another ending: withheld, out of memory, skipped."""
    if isinstance(outcome, State):
        return outcome.is_completed() and outcome.name == "Completed"
    return not isinstance(outcome, StageResult) or outcome.ok


@_step
def provision_data(site: Site, upstream: Upstream) -> Any:
    """Fetch every input of a stage into its workspace, in parallel."""
    if not _may_begin(site, upstream):
        return _skipped()
    stage, workspace, limits = site.stage, site.workspace, site.environment.offer.fetch
    workspace.create()
    sources = [
        InputSource(id=planned.id, index=n, files=planned.files, remote=planned.remote)
        for n, planned in enumerate(stage.inputs)
        if planned.stage is None
    ]
    ddos: dict[str, Mapping[str, Any]] = {
        planned.id: planned.ddo if planned.ddo is not None else {"id": planned.id} for planned in stage.inputs
    }
    try:
        with _progress(fetch_key(stage.index), f"Inputs of stage {stage.index}") as report:
            fetched = fetch_inputs(
                sources,
                workspace.inputs,
                limits,
                access=site.environment.access(),
                on_progress=report,
                on_found=ddos.__setitem__,
                seal=site.seal,
                stop=site.stop,
            )
        for planned in stage.inputs:
            if planned.stage is not None:
                fetched += _outputs_of(planned.stage, site, workspace.inputs / folder_name(planned.id))
    except InputUnreachable as problem:
        if site.stop.is_set():
            return _stopped()
        return Failed(name="Input unreachable", message=str(problem))
    write_parameters(stage.custom_data, ddos, workspace)
    _inputs_table(stage.index, fetched)
    return Completed(message=f"{len(fetched)} files, {sum(file.size for file in fetched)} bytes", data=fetched)


def _outputs_of(stage: int, site: Site, into: Path) -> tuple[FetchedFile, ...]:
    if stage in site.handovers:
        files = receive(site.handovers[stage], site.job_id, stage, into, stop=site.stop)
    else:
        files = link_stage_outputs(site.upstream[stage].outputs, into, stop=site.stop)
    return tuple(replace(file, source=f"stage {stage}") for file in files)


@_step
def provision_algorithm(site: Site, upstream: Upstream) -> Any:
    """Fetch or write the algorithm of a stage, and get its image."""
    if not _may_begin(site, upstream):
        return _skipped()
    stage, workspace = site.stage, site.workspace
    workspace.create()
    try:
        fetched = fetch_algorithm(
            stage.algorithm_file,
            stage.rawcode,
            workspace.algorithm,
            site.environment.offer.fetch,
            remote=stage.algorithm_remote,
            sha256=stage.algorithm_sha256,
            access=site.environment.access(),
            stop=site.stop,
        )
    except AlgorithmUnreachable as problem:
        if site.stop.is_set():
            return _stopped()
        return Failed(name="Algorithm unreachable", message=str(problem))
    asked = Image(stage.container.image, stage.container.tag, stage.container.checksum)
    try:
        with _progress_if_any(fetch_key(stage.index), f"Image of stage {stage.index}", "layers") as report:
            image = site.environment.make_runner().fetch_image(asked, on_progress=report, stop=site.stop)
    except ImageUnavailable as problem:
        if site.stop.is_set():
            return _stopped()
        return Failed(name="Image unavailable", message=str(problem))
    return Completed(message=f"{fetched.size} bytes", data=Provisioned(fetched, image))


@_step
def run_algorithm(site: Site, inputs: tuple[FetchedFile, ...], algorithm: Provisioned) -> Any:
    """Run the algorithm of a stage, shut in. A failing algorithm is a result, not an error of this task."""
    if not (isinstance(inputs, tuple) and isinstance(algorithm, Provisioned)) or site.stop.is_set():
        return _skipped()
    stage, environment = site.stage, site.environment
    site.workspace.create()
    site.workspace.configuration_log.write_text(configuration_log(inputs, algorithm.file))
    with _waiting(waiting_key(stage.index)) as on_waiting:
        report = execute_algorithm(
            environment.make_runner(),
            site.workspace,
            job=site.run_id,
            name=f"{site.run_id}-{stage.index}",
            entrypoint=stage.container.entrypoint,
            image=algorithm.image,
            dids=stage.dids,
            algorithm_did=folder_name(stage.algorithm_id or ""),
            secret=site.secret,
            variables=stage.variables,
            limits=stage.limits,
            network=environment.offer.network and stage.network,
            stop=site.stop,
            on_waiting=on_waiting,
        )
    logger = get_run_logger()
    if report.ok:
        logger.info("algorithm ended after %.1f s", report.seconds)
        return report
    logger.warning("algorithm failed after %.1f s: %s", report.seconds, _sentence(report))
    return Completed(name=_sentence(report).capitalize()[:200], message=_sentence(report), data=report)


@_step
def filter_results(site: Site, report: ExitReport) -> Any:
    """Decide which outputs may leave. Outputs of a failed algorithm never do; its log does."""
    if not isinstance(report, ExitReport) or site.stop.is_set():
        return _skipped()
    workspace, limits = site.workspace, site.environment.offer.filter
    verdict = filter_outputs(workspace.outputs, [workspace.algorithm_log], limits, stop=site.stop)
    workspace.filtering_log.write_text(str(verdict))
    _tell(
        create_markdown_artifact,
        key=f"filter-{site.stage.index}",
        markdown=f"```\n{_shortened(str(verdict))}\n```",
        description=f"What may leave stage {site.stage.index}",
    )
    if not verdict.passed:
        return Completed(name="Withheld", message="no output leaves; see the filter's report", data=verdict)
    return verdict


@_step
def publish_results(site: Site, inputs: tuple[FetchedFile, ...], report: ExitReport, verdict: FilterReport) -> Any:
    """Put what may leave, and the logs, into the result store."""
    if not (isinstance(report, ExitReport) and isinstance(verdict, FilterReport)) or site.stop.is_set():
        return _skipped()
    stage, workspace = site.stage, site.workspace
    result = _judge(report, verdict)
    try:
        if stage.handed_over and result.ok:
            # Before anything shows: a stage that has published is not run again, and the next one needs this.
            hand_over(
                site.environment.handover(),
                site.job_id,
                stage.index,
                workspace.outputs,
                stop=site.stop,
                before_it_shows=lambda: _check_still_ours(site),
            )
        part = publish_outputs(
            site.environment.store(),
            site.job_id,
            stage.index,
            workspace.outputs,
            verdict,
            logs={
                Kind.ALGORITHM_LOG: workspace.algorithm_log,
                Kind.CONFIGURATION_LOG: workspace.configuration_log,
                Kind.FILTERING_LOG: workspace.filtering_log,
                Kind.PUBLISH_LOG: workspace.publish_log,
            },
            publish_output=stage.publish_output and result.ok,
            publish_algorithm_log=stage.publish_algorithm_log,
            inputs=[_as_read(file, stage.index) for file in inputs],
            stop=site.stop,
            before_it_shows=lambda: _check_still_ours(site),
        )
    except PublishFailed as problem:
        if result.ok:
            return Failed(name="Upload failed", message=str(problem))
        # The reason the job failed for is worth more to the consumer than the log that could not be kept.
        return StageResult(result.status, f"{result.message}; the log could not be published")
    if part.files:
        _tell(
            create_table_artifact,
            key=f"results-{stage.index}",
            table=[{"path": f.path, "bytes": f.size, "kind": f.kind, "type": f.type} for f in part.files[:SHOWN]],
            description=f"Published by stage {stage.index}: {len(part.files)} files, {SHOWN} of them shown at most",
        )
    return result


def _as_read(file: FetchedFile, stage: int) -> ManifestInput:
    return ManifestInput(
        input=file.input_id,
        position=file.position,
        location=file.location,
        size=file.size,
        sha256=file.sha256,
        type=file.content_type,
        fetched=file.at,
        source=file.source,
        stage=stage,
    )


def _check_still_ours(site: Site) -> None:
    """
    A worker that Prefect has not heard of for long is taken for dead, and another takes its jobs up. If it lives all
    the same, what it has computed is not to be published beside what the other computes, and it is to be silent.

    Raises:
        Stopped: Somebody else has the job. This process ends then.
    """
    # What was computed is here: better to wait for the server than to lose it.
    asked = Retrying(
        retry=retry_if_exception(is_away),
        wait=wait_fixed(AWAY_SECONDS),
        stop=stop_when_event_set(site.stop) | stop_after_delay(SERVER_PATIENCE),
        sleep=sleep_using_event(site.stop),
        reraise=True,
    )
    ours = asked(site.still_ours)
    go_on(site.stop)
    if not ours:
        get_run_logger().error("this job has been taken up elsewhere; nothing is published from here")
        site.stop.set()
        _end_process_after(TOLD_SECONDS)
        raise Stopped


def _judge(report: ExitReport, verdict: FilterReport) -> StageResult:
    if report.ending is Ending.DISK_FULL:
        return StageResult(Status.DISK_FULL, _sentence(report))
    if report.ending is Ending.IMAGE_UNAVAILABLE:
        return StageResult(Status.IMAGE_FAILED, report.detail)
    if not report.ok:
        return StageResult(Status.RUN_FAILED, _sentence(report))
    if not verdict.passed:
        return StageResult(Status.WITHHELD, "; ".join(refused.message for refused in verdict.withholding[:3]))
    return StageResult(Status.COMPLETED)


def _sentence(report: ExitReport) -> str:
    """Begins with what tells the endings apart: exit code, timed out, out of memory, disk full, refused."""
    start = f"exit code {report.code}" if report.ending is Ending.EXITED else str(report.ending)
    return f"{start}: {report.detail}" if report.detail else start


def _may_begin(site: Site, upstream: Upstream) -> bool:
    """A stage is not begun after one that did not complete, nor when the job is being stopped."""
    return not site.stop.is_set() and all(isinstance(result, StageResult) and result.ok for result in upstream)


def _skipped() -> State[None]:
    """
    The end of a step whose turn never came. It ends by itself: Prefect would leave a task whose upstream failed in a
    pending state for ever, which the UI draws as a task that runs to this day. It ends as completed: an ended step
    of any other type makes Prefect log an error for each that waits for it.
    """
    return Completed(name=SKIPPED, message="a step before this one failed, or the job was stopped")


def _stopped() -> State[None]:
    """The end of a step that was cut off by a stop. Completed for the reason that ``_skipped`` is."""
    return Completed(name="Stopped", message="the job was stopped")


TASK_FOR: Final[Mapping[Phase, Task[..., Any]]] = {
    Phase.DATA: provision_data,
    Phase.ALGORITHM: provision_algorithm,
    Phase.RUN: run_algorithm,
    Phase.FILTER: filter_results,
    Phase.PUBLISH: publish_results,
}

_EXPECTED: Final = {
    "Input unreachable": Status.DATA_FAILED,
    "Algorithm unreachable": Status.ALGORITHM_FAILED,
    "Image unavailable": Status.IMAGE_FAILED,
    "Upload failed": Status.UPLOAD_FAILED,
}
"""Names of the states a step fails with for a reason the consumer is told. Any other failure is a bug."""

AWAY_SECONDS: Final = 2.0
"""Between two questions to a server that is away; the client repeats each for a minute."""

SERVER_PATIENCE: Final = 3600.0
"""Seconds for which a step waits for the server before its process gives up, and another goes on when it is back."""

TOLD_SECONDS: Final = 1.0
"""For the log, before a process ends that has lost its job to another."""

STOP_SECONDS: Final = 2.5
"""
Seconds from the signal that stops a job until its process is gone, whatever its steps are at. With what Prefect needs
before and after it, a stop is to be answered within five.
"""

BEGUN: Final = "begun"
"""What the artifact of a wait says when that is over."""

SHOWN: Final = 100
"""Rows of an artifact: for people. All of them are in the job's logs."""

Futures = Mapping[str, PrefectFuture[Any]]


def run_plan(
    plan: Plan,
    job_id: str,
    environments: Mapping[str, ComputeEnvironment],
    secret_of: Callable[[bytes], str],
    still_ours: Callable[[], bool] = lambda: True,
    *,
    seal: Sealer | None = None,
    keys: Mapping[str, str],
    run_id: str,
    handovers: Mapping[int, ResultStore],
) -> StageResult:
    """
    Run every step of *plan* as a task of the current flow run, each as soon as what it waits for is done.

    A step whose result is in the run's folder is not run; ``flows.steps.settle`` leaves only those that hold.
    *secret_of* makes a text from a name that nobody else can make, *seal* one that nobody else can read. *still_ours*
    is asked before anything is published. *keys* are those of the steps, *run_id* and *handovers* as in ``Site``.

    Returns:
        COMPLETED, or the failure of the first stage (in the plan's order) that failed.

    Raises:
        Exception: A bug in a task, as it was raised there.
    """
    futures: dict[str, PrefectFuture[Any]] = {}
    stop = Event()
    try:
        for step in plan.steps:
            stage = plan.stage(step.stage)
            site = Site(
                job_id=job_id,
                run_id=run_id,
                handovers=handovers,
                stop=stop,
                still_ours=still_ours,
                secret=secret_of(f"{job_id}/{step.stage}".encode()),
                seal=seal,
                stage=stage,
                environment=environments[stage.environment],
                upstream={
                    other.index: stage_workspace(environments[other.environment].workspace_root(), run_id, other.index)
                    for other in plan.stages
                },
            )
            futures[step.name] = (
                TASK_FOR[step.phase]
                .with_options(
                    name=step.name,
                    task_run_name=step.name,
                    persist_result=True,
                    cache_policy=CacheKeyFnPolicy(cache_key_fn=_constantly(keys[step.name])),
                    # A path, not a block: it goes with the job, and holds only on the machine where the files are.
                    result_storage=steps_folder(site.environment.workspace_root(), run_id),
                    result_serializer="pickle",
                )
                .submit(
                    # Quoted: nothing in it is a future, and Prefect would search all of it for one, task by task.
                    quote(site),
                    **_handed_on(step, futures),
                    wait_for=[allow_failure(futures[name]) for name in step.after],
                )
            )
        for future in futures.values():
            future.wait()
    except BaseException as problem:
        # A stop arrives here, as what SIGTERM raises. Prefect then waits for the threads of the tasks, so those
        # have to end.
        stop.set()
        if isinstance(problem, TerminationSignal):
            _end_process_after(STOP_SECONDS)
        # So do we, because whoever called us tidies up what they leave: a result that is remembered after that would
        # have no files. A thread that does not end is ended with the process, and then the next try tidies up.
        for future in futures.values():
            future.wait()
        raise
    results = [_stage_result(stage, futures) for stage in plan.stages]
    return next((result for result in results if result is not None and not result.ok), StageResult(Status.COMPLETED))


def _end_process_after(seconds: float) -> None:
    """
    End this process, and what it has started to tidy up, if it is not gone by then.

    A step may be inside a library that nothing interrupts: a store that does not answer, a name look-up. By a kill,
    because the end of an interpreter waits for its threads as well; algorithms have their own sessions and end with
    us. All that is left undone is what the next try of the job looks at first, as after a crash.
    """

    def end() -> None:
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(128 + signal.SIGTERM)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def _constantly(key: str) -> Callable[[TaskRunContext, dict[str, Any]], str]:
    return lambda context, parameters: key


def _handed_on(step: Step, futures: Futures) -> dict[str, Any]:
    """
    What a step gets from the steps before it: futures, which Prefect resolves to values, or to the exception that
    stands for a failure.
    """
    before = {name.split("/", 1)[1]: allow_failure(futures[name]) for name in step.after}
    match step.phase:
        case Phase.DATA | Phase.ALGORITHM:
            return {"upstream": [allow_failure(futures[name]) for name in step.after]}
        case Phase.RUN:
            return {"inputs": before[Phase.DATA], "algorithm": before[Phase.ALGORITHM]}
        case Phase.FILTER:
            return {"report": before[Phase.RUN]}
        case Phase.PUBLISH:
            inputs, run = (allow_failure(futures[f"{step.stage}/{phase}"]) for phase in (Phase.DATA, Phase.RUN))
            return {"inputs": inputs, "report": run, "verdict": before[Phase.FILTER]}


def _stage_result(stage: PlannedStage, futures: Futures) -> StageResult | None:
    """None for a stage that was skipped because one before it failed."""
    own = [futures[f"{stage.index}/{phase}"] for phase in Phase]
    for future in own:
        state = future.state
        if state.name == SKIPPED:
            return None
        if state.is_failed() and state.name in _EXPECTED:
            return StageResult(_EXPECTED[state.name], state.message or "")
        if state.is_failed() or state.is_crashed():
            future.result()  # raises what was raised in the task: a bug
    result = own[-1].result()
    assert isinstance(result, StageResult)  # noqa: S101  # for mypy: futures of several tasks share a dict
    return result


def is_away(fault: BaseException) -> bool:
    """Whether it tells that the server, or its database, cannot be reached; not that it has refused something."""
    if isinstance(fault, httpx.HTTPStatusError):
        return fault.response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR
    return isinstance(fault, httpx.TransportError)


def _tell(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """An artifact for people. That it cannot be made, because the server is away for long, is no reason to fail."""
    try:
        return make(*args, **kwargs)
    except httpx.HTTPError as fault:
        get_run_logger().warning("what this step shows is not shown: %s", type(fault).__name__)
        return None


def fetch_key(stage: int) -> str:
    """Key of the artifacts that tell how far a stage's inputs and its image are; of two the later one is shown."""
    return f"fetch-{stage}"


def waiting_key(stage: int) -> str:
    """Key of the artifact that tells why a stage's algorithm cannot begin yet; at 100 % it has begun."""
    return f"waiting-{stage}"


@contextmanager
def _progress(key: str, description: str, things: str = "files") -> Iterator[Progress]:
    """A progress artifact of the current task that follows what the yielded function is told, once a second."""
    told = (0, 0, 0, 0)
    began = time.monotonic()

    def report(done_bytes: int, total_bytes: int, done_things: int, all_things: int) -> None:
        nonlocal told
        told = (done_bytes, total_bytes, done_things, all_things)

    def shown() -> tuple[float, str]:
        percent = _percent(*told)
        left = seconds_left(percent / 100.0, time.monotonic() - began)
        return percent, f"{description}: {_amounts(things, *told)}" + (f", {about(left)}" if left is not None else "")

    with _followed(key, f"{description}: not begun to arrive", shown):
        yield report


@contextmanager
def _followed(key: str, begun: str, shown: Callable[[], tuple[float, str]]) -> Iterator[None]:
    """
    A progress artifact of the current task that says *begun* and then what *shown* answers, once a second; at the
    end it is at 100 %.

    A thread of its own does the updates: what is shown comes from the event loop that fetches, or from whoever keeps
    an algorithm to its time, and neither must wait for the Prefect server.
    """
    done = threading.Event()
    artifact = cast("UUID | None", _tell(create_progress_artifact, progress=0.0, key=key, description=begun))

    def show(percent: float, text: str) -> None:
        if artifact is not None:
            _tell(update_progress_artifact, artifact, percent, text)

    def update() -> None:
        before = shown()
        while not done.wait(1.0):
            if (now := shown()) != before:
                before = now
                show(*now)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(update,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    show(100.0, shown()[1])


@contextmanager
def _waiting(key: str) -> Iterator[Waiting]:
    """
    A progress artifact of the current task that says what the yielded function was told last, if it ever is told
    anything; at 100 % nothing is waited for any more. Made by a thread, as it is updated by one.
    """
    context = contextvars.copy_context()
    over = Event()
    why = ""
    thread: threading.Thread | None = None

    def follow() -> None:
        with _followed(key, why, lambda: (0.0, why) if why else (100.0, BEGUN)):
            over.wait()

    def tell(text: str) -> None:
        nonlocal why, thread
        why = text
        if text and thread is None:
            thread = threading.Thread(target=context.run, args=(follow,), daemon=True)
            thread.start()

    try:
        yield tell
    finally:
        why = ""
        over.set()
        if thread is not None:
            thread.join()


@contextmanager
def _progress_if_any(key: str, description: str, things: str) -> Iterator[Progress]:
    """``_progress``, begun when it is first told anything, by whatever thread."""
    context = contextvars.copy_context()
    begun: list[Progress] = []
    with ExitStack() as stack:

        def report(*amounts: int) -> None:
            if not begun:
                begun.append(context.run(stack.enter_context, _progress(key, description, things)))
            begun[0](*amounts)

        yield report


def _percent(done_bytes: int, total_bytes: int, done: int, total: int) -> float:
    if total_bytes:
        return min(100.0, 100.0 * done_bytes / total_bytes)
    return 100.0 * done / total if total else 0.0


def _amounts(things: str, done_bytes: int, total_bytes: int, done: int, total: int) -> str:
    of_bytes = f" of {total_bytes / MIB:.1f}" if total_bytes else ""
    return f"{done} of {total} {things}, {done_bytes / MIB:.1f}{of_bytes} MiB"


def _shortened(text: str) -> str:
    """The beginning and the verdict at the end."""
    lines = text.splitlines()
    more = f"... and {len(lines) - SHOWN} lines more, in the filter's log"
    return text if len(lines) <= SHOWN else "\n".join([*lines[: SHOWN - 1], more, lines[-1]])


def _inputs_table(stage: int, fetched: Sequence[FetchedFile]) -> None:
    """
    Sizes and times. No checksum: who knows that a data set is one of a few could tell by it which, and Prefect's
    database is open to more people than the job's configuration log, which has them.
    """
    if fetched:
        _tell(
            create_table_artifact,
            key=f"inputs-{stage}",
            table=[
                {"input": f.input_id, "n": f.position, "bytes": f.size, "seconds": round(f.seconds, 3)}
                for f in fetched[:SHOWN]
            ],
            description=f"Provisioned for stage {stage}: {len(fetched)} files, {SHOWN} of them shown at most",
        )
