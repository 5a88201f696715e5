"""The only translation between Prefect's states and ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from itertools import zip_longest
from typing import Any, Final

from prefect.client.schemas.objects import FlowRun, State, StateType, TaskRun

from blocks.environment import ComputeEnvironment
from flows.jobs import StopRequest, Transition
from flows.status import BY_TEXT, TERMINAL, TEXT, Outcome, Phase, Status, failure_of, status_of

# The name of a step, with or without what Prefect appends to it until the run is named: a task whose upstream
# failed is never named. Names and not tags, because Prefect asks its server for a concurrency slot for every tag
# of every task, which took 2.3 s on the first task of a process (prefect 3.8.8).
_STEP_NAME: Final = re.compile(rf"^(\d+)/({'|'.join(Phase)})(-|$)")

_OUTCOME: Final = {
    StateType.SCHEDULED: Outcome.WAITING,
    StateType.PENDING: Outcome.WAITING,
    StateType.RUNNING: Outcome.RUNNING,
    StateType.PAUSED: Outcome.RUNNING,
    StateType.COMPLETED: Outcome.DONE,
    StateType.CANCELLING: Outcome.RUNNING,
    StateType.CANCELLED: Outcome.FAILED,
    StateType.FAILED: Outcome.FAILED,
    StateType.CRASHED: Outcome.FAILED,
}


def ended_state(status: Status, message: str) -> State[None]:
    """The state a flow returns for a job that ended as *status*; the inverse of ``run_status``."""
    kind = StateType.COMPLETED if status is Status.COMPLETED else StateType.FAILED
    return State(type=kind, name=TEXT[status], message=message)


CACHED: Final = "Cached"
"""Name that Prefect gives the state of a step whose result was there."""

_PLAIN: Final = ("Completed", CACHED)
"""Names of the states of steps that did what they were to do, now or in an earlier try; other names tell endings."""

EXPIRING: Final = "waited for too long"
"""Message of the state of a run that has been taken out of the queue and whose end is about to be recorded."""


STOPPED_IN_QUEUE: Final = "stopped on request"
"""The same of a run that is stopped while it waits."""


def taken_out_of_the_queue(why: str = EXPIRING) -> State[None]:
    """
    What is proposed for a run that has waited for too long, or is stopped while it waits, and accepted only while it
    waits.

    Prefect lets nobody propose ``Pending``, by this name, for a run that is pending, running, cancelling or cancelled:
    that is how of several workers one gets a run. So of a worker and of whoever ends the waiting one succeeds. A run
    that is merely said to be cancelled, while a worker is getting it, would be begun all the same.
    """
    return State(type=StateType.PENDING, name="Pending", message=why)


def is_taken_out(state: State[Any] | None) -> bool:
    taken_out = (EXPIRING, STOPPED_IN_QUEUE)
    return state is not None and state.type is StateType.PENDING and state.message in taken_out


def expired_in_queue(message: str) -> State[None]:
    """
    The end of a run that was taken out of the queue.

    Cancelled and not failed: a failed run may become pending again, if a worker that has read the queue a moment
    before proposes it; a cancelled one may not (prefect 3.8.8, PreventPendingTransitions).
    """
    return State(type=StateType.CANCELLED, name=TEXT[Status.EXPIRED_IN_QUEUE], message=message)


def end_of_taken_out(state: State[Any]) -> State[None]:
    """The end of a run in a *state* that ``is_taken_out``, where nobody can say more."""
    if state.message == STOPPED_IN_QUEUE:
        return State(type=StateType.CANCELLED, message=STOPPED_IN_QUEUE)
    return expired_in_queue("its turn did not come in time; restart it to queue it again")


LOST: Final = "nobody ran it any more"
DIED: Final = "its process ended unexpectedly"
"""What the message of a state begins with in which a run that was lost goes back into the queue, or ends at last."""


def told_as_crashed(state: State[Any] | None) -> bool:
    """
    Whether it is Prefect's own worker or runner that has told of a crash. That ends no job by itself: whoever looks
    after the work pool puts the job back into the queue, or ends it in a state of its own (``flows.upkeep``).
    """
    return state is not None and state.type is StateType.CRASHED and not (state.message or "").startswith((LOST, DIED))


def going_on(crash: State[Any]) -> State[Any]:
    """The state a run is about to get after a *crash* that was told; with the id and the time of that."""
    return crash.model_copy(update={"type": StateType.SCHEDULED, "name": "AwaitingRetry", "data": None})


CRASH_SECONDS: Final = 60.0
"""
For so long a job of which Prefect's own worker has told that it crashed counts as one that goes on: whoever looks after
the pool is about to put it back into the queue (``flows.upkeep``). If nobody has by then, it has ended.
"""

OWN_TYPE: Final = "warm-process"
"""Type of the work pools whose workers put a job back into the queue before anybody could take it for ended."""


def goes_on(run: FlowRun, blocks: Mapping[str, ComputeEnvironment]) -> bool:
    """Whether *run* has crashed, to Prefect, and is about to be put back into the queue."""
    block = blocks.get(run.parameters["summary"]["environments"][0])
    return (
        told_as_crashed(run.state)
        and run.state is not None
        and block is not None
        and block.work_pool_type != OWN_TYPE
        and (datetime.now(UTC) - run.state.timestamp).total_seconds() < CRASH_SECONDS
    )


def as_it_goes_on(run: FlowRun, blocks: Mapping[str, ComputeEnvironment]) -> FlowRun:
    """*run*; one that is about to go on after a crash as it will be in a moment."""
    if run.state is None or not goes_on(run, blocks):
        return run
    return run.model_copy(update={"state": going_on(run.state)})


def queued_at(state: State[Any] | None) -> datetime | None:
    """
    Since when a run waits; None if it does not.

    Not the state's own time: Prefect puts a run that waits into a new one, named Late, after a while.
    """
    if state is None or state.type is not StateType.SCHEDULED:
        return None
    return state.state_details.scheduled_time or state.timestamp


def waited(states: Iterable[State[Any]]) -> float:
    """Seconds a run has waited the last time that it was in the queue, from all *states* it has had."""
    since = until = None
    for state in sorted(states, key=lambda state: state.timestamp):
        if (queued := queued_at(state)) is not None:
            since, until = queued, None
        elif until is None:
            until = state.timestamp
    return (until - since).total_seconds() if since and until else 0.0


def stopped_before_it_began(states: Iterable[State[Any]]) -> bool:
    """Whether a run was stopped since it was queued the last time, from all *states* it has had."""
    asked = False
    for state in sorted(states, key=lambda state: state.timestamp):
        if state.type is StateType.SCHEDULED:
            asked = False
        elif state.type in (StateType.CANCELLING, StateType.CANCELLED):
            asked = True
    return asked


def has_begun(states: Iterable[State[Any]]) -> bool:
    """Whether a run has begun since it was queued the last time, from all *states* it has had."""
    begun = False
    for state in sorted(states, key=lambda state: state.timestamp):
        if state.type in (StateType.SCHEDULED, StateType.RUNNING):
            begun = state.type is StateType.RUNNING
    return begun


def restarted_at(states: Iterable[State[Any]]) -> datetime | None:
    """When a run was put back into its queue after an end, the last time, from all *states* it has had; None: never."""
    found = None
    ended = False
    for state in sorted(states, key=lambda state: state.timestamp):
        if ended and state.type is StateType.SCHEDULED:
            found = state.timestamp
        ended = state.is_final()
    return found


SKIPPED: Final = "Skipped"
"""Name of the state of a step whose turn never came, because one before it failed."""


Steps = Mapping[int, Mapping[Phase, TaskRun]]
"""The latest task run of every step whose turn came, by stage and phase."""


def steps_of(task_runs: Iterable[TaskRun], *, of: State[Any] | None = None) -> Steps:
    """
    The steps among *task_runs* of a flow run in the state *of*.

    A run that was taken up again has several of one step: the latest counts. Prefect records task runs a moment
    behind their flow run, so after an end that the flow itself has told, a step still said to be running has
    ended too, and how is not known yet: it is left out.
    """
    told = of is not None and of.is_final() and of.name in BY_TEXT
    steps: dict[int, dict[Phase, TaskRun]] = {}
    for run in sorted(task_runs, key=lambda run: run.created.timestamp() if run.created else 0.0):
        found = _STEP_NAME.match(run.name)
        skipped = run.state is not None and run.state.name == SKIPPED
        lagging = told and not (run.state is not None and run.state.is_final())
        if found and not skipped and not lagging:
            steps.setdefault(int(found[1]), {})[Phase(found[2])] = run
    return steps


def of_tries(task_runs: Iterable[TaskRun], first: int, last: int | None = None) -> list[TaskRun]:
    """Those of *task_runs* that belong to the tries of their flow run from *first* to *last*, counted from 1."""
    return [
        run for run in task_runs if first <= run.flow_run_run_count and (last is None or run.flow_run_run_count <= last)
    ]


def outcomes(steps: Mapping[Phase, TaskRun]) -> list[tuple[Phase, Outcome]]:
    return [(phase, _OUTCOME[run.state.type] if run.state else Outcome.WAITING) for phase, run in steps.items()]


def stage_finished(steps: Mapping[Phase, TaskRun]) -> bool:
    """Whether nothing more will happen in a stage: it has published, or a step before that failed."""
    known = dict(outcomes(steps))
    return known.get(Phase.PUBLISH) in (Outcome.DONE, Outcome.FAILED) or Outcome.FAILED in known.values()


def live_status(steps: Steps) -> tuple[Status, int | None]:
    """Status and stage of a run in progress: its least advanced stage that has begun and not finished."""
    begun = {index: stage for index, stage in steps.items() if _begun(stage)}
    failed = {index: stage for index, stage in begun.items() if Outcome.FAILED in dict(outcomes(stage)).values()}
    going = {index: stage for index, stage in begun.items() if not stage_finished(stage)} or failed or begun
    if not going:
        return Status.STARTED, None
    last = {index: status_of(outcomes(stage)) for index, stage in going.items()}
    index = min(last, key=lambda index: (last[index], index))
    return last[index], index


def _begun(stage: Mapping[Phase, TaskRun]) -> bool:
    return any(outcome is not Outcome.WAITING for _, outcome in outcomes(stage))


def run_status(state: State | None, steps: Steps) -> tuple[Status, int | None]:
    """Status of a flow run, and the stage it is in. A stopped run's last status is ``live_status``."""
    if state is None or state.type in (StateType.SCHEDULED, StateType.PENDING):
        return Status.WARMING_UP, None
    named = BY_TEXT.get(state.name or "")
    if state.is_final() and named in TERMINAL:
        return named, _ended_in(steps)
    if state.type is StateType.CANCELLED:
        return Status.STOPPED, live_status(steps)[1]
    status, stage = live_status(steps)
    if not state.is_final():
        return status, stage
    # Failed or crashed without a name of ours: a bug, or the process died. The step it died in says which
    # terminal status is true.
    return _died_in(status, steps.get(stage, {}) if stage is not None else {}), stage


def _died_in(status: Status, stage: Mapping[Phase, TaskRun]) -> Status:
    if status is Status.CONFIGURING:
        data = dict(outcomes(stage)).get(Phase.DATA)
        return failure_of(Phase.ALGORITHM if data is Outcome.DONE else Phase.DATA)
    return {Status.FILTERING: Status.WITHHELD, Status.PUBLISHING: Status.UPLOAD_FAILED}.get(status, Status.RUN_FAILED)


def _ended_in(steps: Steps) -> int | None:
    """The first stage one of whose steps did not simply complete; a failed algorithm's step names its ending."""
    odd = [
        index
        for index, stage in sorted(steps.items())
        if any(run.state and run.state.is_final() and run.state.name not in _PLAIN for run in stage.values())
    ]
    return odd[0] if odd else (max(steps) if steps else None)


def transitions(steps: Steps) -> list[Transition]:
    """
    Every status the stages have had, by the clocks of their steps: what no poll may have been quick enough to see.
    """
    found: list[Transition] = []
    for index, stage in steps.items():
        # Not those whose result was there from an earlier try: nothing was done then.
        done_now = {phase: run for phase, run in stage.items() if run.state is None or run.state.name != CACHED}
        starts = {phase: run.start_time for phase, run in done_now.items() if run.start_time is not None}
        provisioning = [at for phase, at in starts.items() if phase in (Phase.DATA, Phase.ALGORITHM)]
        if provisioning:
            found.append(Transition(Status.CONFIGURING, min(provisioning), index))
        done = [
            run.end_time
            for phase in (Phase.DATA, Phase.ALGORITHM)
            if (run := stage.get(phase)) and run.end_time and run.state and run.state.is_completed()
        ]
        if len(done) == 2 and provisioning:
            found.append(Transition(Status.PROVISIONED, max(done), index))
        found.extend(
            Transition(status, starts[phase], index)
            for phase, status in (
                (Phase.RUN, Status.RUNNING),
                (Phase.FILTER, Status.FILTERING),
                (Phase.PUBLISH, Status.PUBLISHING),
            )
            if phase in starts
        )
    return sorted(found, key=lambda transition: (transition.at, transition.stage or 0))


def history(
    states: Iterable[State[Any]], task_runs: Iterable[TaskRun], of_stages: Iterable[TaskRun] = ()
) -> list[Transition]:
    """
    What a flow run that was begun several times went through, from all *states* it has had and all its *task_runs*;
    *of_stages* are those of the runs that did its stages, if it had them done.

    Every try begins with waiting; one that was restarted also ended before. A crash after which the run went on by
    itself was no end.
    """
    runs = list(task_runs)
    elsewhere = list(of_stages)
    found: list[Transition] = []
    before = tries = 0  # begun before the last restart, and now
    waits = False
    passed = sorted(states, key=lambda state: state.timestamp)
    for state, after in zip_longest(passed, passed[1:]):
        if told_as_crashed(state) and after is not None and after.name == "AwaitingRetry":
            continue
        if state.type is StateType.SCHEDULED and not waits:
            found.append(Transition(Status.WARMING_UP, state.timestamp))
            waits = True
        elif state.type is StateType.RUNNING:
            tries += 1
            waits = False
            found.append(Transition(Status.STARTED, state.timestamp))
        elif state.is_final():
            then = [run for run in elsewhere if (begun := run.start_time or run.created) and begun <= state.timestamp]
            status, stage = run_status(state, steps_of([*of_tries(runs, before + 1, tries), *then], of=state))
            found.append(Transition(status, state.timestamp, None if status is Status.COMPLETED else stage))
            before, waits = tries, False
    for n in range(1, tries + 1):
        found.extend(transitions(steps_of(of_tries(runs, n, n))))
    for run_id, n in {(run.flow_run_id, run.flow_run_run_count) for run in elsewhere}:
        found.extend(transitions(steps_of(of_tries([run for run in elsewhere if run.flow_run_id == run_id], n, n))))
    return sorted(found, key=lambda transition: transition.at)


def stop_request(state: State | None, status: Status) -> StopRequest:
    """``stopreq``: 1 while and after a stop on request, 2 when the time limit stopped the algorithm."""
    if status is Status.EXPIRED_IN_QUEUE:
        return StopRequest.NONE
    if state is not None and state.type in (StateType.CANCELLING, StateType.CANCELLED):
        return StopRequest.STOP
    if status is Status.RUN_FAILED and state is not None and "timed out" in (state.message or ""):
        return StopRequest.TIMED_OUT
    return StopRequest.NONE
