"""Prefect's states read as ours: real states and task runs, made here instead of by a server."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import State, StateDetails, StateType, TaskRun
from prefect.states import (
    AwaitingRetry,
    Cancelled,
    Cancelling,
    Completed,
    Crashed,
    Failed,
    Late,
    Paused,
    Pending,
    Running,
    Scheduled,
)

from flows.jobs import StopRequest, Transition
from flows.states import (
    STOPPED_IN_QUEUE,
    ended_state,
    expired_in_queue,
    has_begun,
    history,
    is_taken_out,
    live_status,
    of_tries,
    queued_at,
    restarted_at,
    run_status,
    steps_of,
    stop_request,
    stopped_before_it_began,
    taken_out_of_the_queue,
    transitions,
    waited,
)
from flows.status import TERMINAL, Phase, Status

AnyState = State[Any]

START: Final = datetime(2026, 1, 1, tzinfo=UTC)
DATA, ALGORITHM, RUN, FILTER, PUBLISH = Phase
NOT_READY: Final[AnyState] = Pending(name="NotReady")
SKIPPED: Final[AnyState] = Cancelled(name="Skipped", message="a stage this one depends on failed")


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def task_run(
    name: str,
    state: AnyState | None,
    *,
    created: float = 0.0,
    start: float | None = None,
    end: float | None = None,
) -> TaskRun:
    """As the server answers it; times are seconds after ``START``."""
    return TaskRun.model_validate(
        {
            "id": uuid4(),
            "task_key": "step",
            "dynamic_key": "0",
            "name": name,
            "state": state,
            "created": at(created),
            "start_time": None if start is None else at(start),
            "end_time": None if end is None else at(end),
        }
    )


def stage_runs(index: int, **states: AnyState) -> list[TaskRun]:
    """The steps of one stage; ``data=…, algorithm=…, run=…, filter=…, publish=…``."""
    return [task_run(f"{index}/{Phase[name.upper()]}", state) for name, state in states.items()]


def finished(index: int = 0) -> list[TaskRun]:
    return [task_run(f"{index}/{phase}", Completed()) for phase in Phase]


def skipped(index: int) -> list[TaskRun]:
    first = stage_runs(index, data=SKIPPED, algorithm=SKIPPED)
    return [*first, *stage_runs(index, run=NOT_READY, filter=NOT_READY, publish=NOT_READY)]


# Which task run is which step.


def test_steps_are_known_by_name() -> None:
    """Stage and phase are read from the name; task runs of other names are none of ours."""
    names = ["3/provision-data", "12/run", "3/provision-algorithm", "fetch-3", "x3/run", "3/runner", "3/", "run"]
    steps = steps_of(task_run(name, None) for name in names)
    assert {3: {DATA, ALGORITHM}, 12: {RUN}} == {index: set(stage) for index, stage in steps.items()}


def test_a_step_that_was_never_named() -> None:
    """A step whose upstream failed keeps the name Prefect gave it first, with something appended."""
    steps = steps_of([task_run("0/publish-2af", NOT_READY), task_run("1/provision-data-0", NOT_READY)])
    assert {0: {PUBLISH}, 1: {DATA}} == {index: set(stage) for index, stage in steps.items()}


def test_the_latest_task_run_of_a_step_counts() -> None:
    """After a restart a step has several task runs; the one made last is the step, whatever their order."""
    old, new = task_run("0/run", Crashed(), created=1), task_run("0/run", Running(), created=2)
    assert new is steps_of([old, new])[0][RUN] is steps_of([new, old])[0][RUN]


def test_a_step_whose_turn_never_came_is_none() -> None:
    """Steps skipped after a failure are left out: nothing ever happened in them."""
    assert {0} == set(steps_of([*finished(0), *stage_runs(1, data=SKIPPED, algorithm=SKIPPED, run=SKIPPED)]))


def test_steps_recorded_behind_their_run() -> None:
    """Once the flow has told its end, a step still said to be running is left out; after a crash it counts."""
    runs = stage_runs(0, data=Completed(), algorithm=Running())
    ends: list[tuple[AnyState, set[Phase]]] = [
        (ended_state(Status.DATA_FAILED, "why"), {DATA}),
        (Crashed(), {DATA, ALGORITHM}),
        (Running(), {DATA, ALGORITHM}),
    ]
    assert [phases for _, phases in ends] == [set(steps_of(runs, of=state)[0]) for state, _ in ends]


# Status of a run.


@pytest.mark.parametrize(
    ("state", "status"),
    [
        (None, Status.WARMING_UP),
        (Scheduled(), Status.WARMING_UP),
        (Late(), Status.WARMING_UP),
        (AwaitingRetry(), Status.WARMING_UP),
        (Pending(), Status.WARMING_UP),
        (Running(), Status.STARTED),
        (Paused(), Status.STARTED),
        (Cancelling(), Status.STARTED),
        (Cancelled(), Status.STOPPED),
        (Failed(), Status.RUN_FAILED),
        (Crashed(), Status.RUN_FAILED),
    ],
    ids=lambda value: value.name if isinstance(value, State | Status) else None,
)
def test_a_run_without_steps(state: AnyState | None, status: Status) -> None:
    """Before the first step, the run's own state says it all."""
    assert (status, None) == run_status(state, {})


@pytest.mark.parametrize("status", sorted(TERMINAL - {Status.STOPPED, Status.DELETED}))
def test_what_a_flow_returns_is_read_back(status: Status) -> None:
    """Every way a job can end is a state Prefect shows by name, and the same status when it is read again."""
    state = ended_state(status, "why")
    again = State[Any].model_validate_json(state.model_dump_json())
    assert (status, "why") == (run_status(again, {})[0], again.message)
    assert (status is Status.COMPLETED) == again.is_completed()
    assert again.is_final()


@pytest.mark.parametrize(
    ("steps", "status"),
    [
        ({}, Status.STARTED),
        ({"data": Pending()}, Status.STARTED),
        ({"data": Running(), "algorithm": Pending()}, Status.CONFIGURING),
        ({"data": Completed(), "algorithm": Running()}, Status.CONFIGURING),
        ({"data": Completed(), "algorithm": Completed(), "run": Pending()}, Status.PROVISIONED),
        ({"data": Completed(), "algorithm": Completed(), "run": Running()}, Status.RUNNING),
        ({"run": Completed(name="Exit code 3"), "filter": Running()}, Status.FILTERING),
        ({"run": Completed(), "filter": Completed(), "publish": Running()}, Status.PUBLISHING),
        ({"run": Completed(), "filter": Completed(), "publish": Completed()}, Status.PUBLISHING),
    ],
)
def test_a_run_in_progress(steps: dict[str, AnyState], status: Status) -> None:
    """While the flow lives, its steps say how far it is, also while it is being stopped."""
    known = steps_of(stage_runs(0, **steps))
    states: list[AnyState] = [Running(), Cancelling()]
    for state in states:
        assert status is run_status(state, known)[0]


def test_the_least_advanced_stage_is_shown() -> None:
    """With several stages under way the hindmost is shown; those that are done or not begun do not count."""
    steps = steps_of(
        [
            *finished(0),
            *stage_runs(1, data=Completed(), algorithm=Completed(), run=Running()),
            *stage_runs(2, data=Running(), algorithm=Running()),
            *stage_runs(3, data=Pending()),
        ]
    )
    assert (Status.CONFIGURING, 2) == live_status(steps)


def test_between_two_stages() -> None:
    """When one stage is done and the next has not begun, the one that is done is shown."""
    assert (Status.PUBLISHING, 0) == live_status(steps_of([*finished(0), *stage_runs(1, data=Pending())]))


@pytest.mark.parametrize(
    ("steps", "status"),
    [
        ({"data": Running()}, Status.DATA_FAILED),
        ({"data": Crashed(), "algorithm": Completed()}, Status.DATA_FAILED),
        ({"data": Completed(), "algorithm": Running()}, Status.ALGORITHM_FAILED),
        ({"data": Completed(), "algorithm": Failed()}, Status.ALGORITHM_FAILED),
        ({"data": Completed(), "algorithm": Completed()}, Status.RUN_FAILED),
        ({"run": Running()}, Status.RUN_FAILED),
        ({"run": Failed()}, Status.RUN_FAILED),
        ({"run": Completed(), "filter": Running()}, Status.WITHHELD),
        ({"run": Completed(), "filter": Completed(), "publish": Running()}, Status.UPLOAD_FAILED),
        ({"run": Completed(), "filter": Completed(), "publish": Failed()}, Status.UPLOAD_FAILED),
    ],
)
def test_a_run_that_died(steps: dict[str, AnyState], status: Status) -> None:
    """A run that ended without saying how failed in the step it was in: by a crash, or by a bug."""
    known = steps_of(stage_runs(2, **steps))
    states: list[AnyState] = [Crashed(message="process gone"), Failed(message="a bug")]
    for state in states:
        assert (status, 2) == run_status(state, known)


def test_a_bug_in_a_later_stage() -> None:
    """Where an earlier stage is done, the stage that died is the one that is named."""
    broken = [task_run(f"1/{phase}", Completed()) for phase in (DATA, ALGORITHM, RUN, FILTER)]
    steps = steps_of([*finished(0), *broken, *stage_runs(1, publish=Failed())])
    assert (Status.UPLOAD_FAILED, 1) == run_status(Failed(message="a bug"), steps)


def test_a_stopped_run_tells_where_it_was() -> None:
    """After a stop the stage and, through ``live_status``, the step it was in are still known."""
    steps = steps_of([*finished(0), *stage_runs(1, data=Completed(), algorithm=Completed(), run=Running())])
    assert (Status.STOPPED, 1) == run_status(Cancelled(), steps)
    assert (Status.RUNNING, 1) == live_status(steps)


@pytest.mark.parametrize(
    ("status", "failed"),
    [
        (Status.DATA_FAILED, {"data": Failed(name="Input unreachable"), "run": NOT_READY}),
        (Status.ALGORITHM_FAILED, {"data": Completed(), "algorithm": Failed(name="Algorithm unreachable")}),
        (Status.RUN_FAILED, {"run": Completed(name="Exit code 3"), "publish": Completed()}),
        (Status.WITHHELD, {"run": Completed(), "filter": Completed(name="Withheld"), "publish": Completed()}),
        (Status.UPLOAD_FAILED, {"run": Completed(), "publish": Failed(name="Upload failed")}),
    ],
)
def test_the_stage_a_job_failed_in(status: Status, failed: dict[str, AnyState]) -> None:
    """A failed job names the stage that failed, not one that was skipped for it, whatever their numbers are."""
    state = ended_state(status, "why")
    earlier = [*finished(0), *stage_runs(1, **failed), *skipped(2)]
    later = [*skipped(0), *finished(1), *stage_runs(2, **failed)]
    assert (status, 1) == run_status(state, steps_of(earlier))
    assert (status, 2) == run_status(state, steps_of(later))


def test_a_completed_job_is_in_its_last_stage() -> None:
    """A job that is done shows its last stage."""
    assert (Status.COMPLETED, 4) == run_status(
        ended_state(Status.COMPLETED, ""), steps_of([*finished(4), *finished(1)])
    )


# What no poll may have seen.


def test_every_status_of_a_stage_has_its_time() -> None:
    """However short a step was, the statuses it stood for are told with the times of its own clock."""
    times = {DATA: (1, 5), ALGORITHM: (2, 3), RUN: (6, 8), FILTER: (9, 10), PUBLISH: (11, 12)}
    runs = [task_run(f"0/{phase}", Completed(), start=start, end=end) for phase, (start, end) in times.items()]
    assert [
        Transition(Status.CONFIGURING, at(1), 0),
        Transition(Status.PROVISIONED, at(5), 0),
        Transition(Status.RUNNING, at(6), 0),
        Transition(Status.FILTERING, at(9), 0),
        Transition(Status.PUBLISHING, at(11), 0),
    ] == transitions(steps_of(reversed(runs)))


def test_statuses_of_several_stages_come_in_time() -> None:
    """What stages did side by side is told in the order it happened, each with its stage."""
    runs = [
        task_run("0/provision-data", Completed(), start=2, end=3),
        task_run("1/provision-data", Completed(), start=1, end=4),
        task_run("1/provision-algorithm", Completed(), start=1, end=2),
    ]
    assert [
        Transition(Status.CONFIGURING, at(1), 1),
        Transition(Status.CONFIGURING, at(2), 0),
        Transition(Status.PROVISIONED, at(4), 1),
    ] == transitions(steps_of(runs))


def test_what_failed_was_not_provisioned() -> None:
    """A stage whose algorithm could not be had never was in 'Provisioning success'."""
    runs = [
        task_run("0/provision-data", Completed(), start=1, end=2),
        task_run("0/provision-algorithm", Failed(), start=1, end=3),
        task_run("0/run", NOT_READY),
    ]
    assert [Transition(Status.CONFIGURING, at(1), 0)] == transitions(steps_of(runs))


# Who stopped it.


@pytest.mark.parametrize(
    ("state", "status", "request_seen"),
    [
        (None, Status.WARMING_UP, StopRequest.NONE),
        (Running(), Status.RUNNING, StopRequest.NONE),
        (Cancelling(), Status.RUNNING, StopRequest.STOP),
        (Cancelled(), Status.STOPPED, StopRequest.STOP),
        (
            ended_state(Status.RUN_FAILED, "timed out: it ran longer than 60 s"),
            Status.RUN_FAILED,
            StopRequest.TIMED_OUT,
        ),
        (ended_state(Status.RUN_FAILED, "exit code 3"), Status.RUN_FAILED, StopRequest.NONE),
        (ended_state(Status.DATA_FAILED, "the server timed out"), Status.DATA_FAILED, StopRequest.NONE),
        (ended_state(Status.COMPLETED, ""), Status.COMPLETED, StopRequest.NONE),
    ],
    ids=lambda value: str(getattr(value, "name", value)),
)
def test_stop_request(state: AnyState | None, status: Status, request_seen: StopRequest) -> None:
    """A stop on request and a limit of time are told apart; a failure by itself is neither."""
    assert request_seen is stop_request(state, status)


def test_prefect_has_no_state_we_do_not_know() -> None:
    """Every type of state a task run can have is read, so that none is a traceback one day."""
    for kind in StateType:
        steps = steps_of([task_run("0/run", State(type=kind))])
        assert run_status(Running(), steps)[0] in (Status.STARTED, Status.RUNNING)


# Several tries.


def of_try(number: int, *runs: TaskRun) -> list[TaskRun]:
    return [run.model_copy(update={"flow_run_run_count": number}) for run in runs]


def stated(state: AnyState, seconds: float) -> AnyState:
    return state.model_copy(update={"timestamp": at(seconds)})


def test_a_step_that_was_found_done_counts_as_done_and_not_as_done_again() -> None:
    """``Cached`` is Prefect's name for it: no odd ending, no status that the job has had."""
    cached = [task_run(f"0/{phase}", Completed(name="Cached"), start=1, end=1) for phase in Phase]
    failing = task_run("1/provision-data", Failed(name="Input unreachable"), start=2, end=3)
    steps = steps_of([*cached, failing])
    assert (Status.DATA_FAILED, 1) == run_status(ended_state(Status.DATA_FAILED, "no"), steps)
    assert [(Status.CONFIGURING, 1)] == [(passed.status, passed.stage) for passed in transitions(steps)]


def test_only_the_tries_that_are_asked_for() -> None:
    """A task run bears the number of the try it belongs to; one that has not begun bears none."""
    runs = [*of_try(0, task_run("0/run", Pending())), *of_try(1, *finished()), *of_try(2, *finished(1))]
    assert {0, 1} == set(steps_of(of_tries(runs, 1)))
    assert {1} == set(steps_of(of_tries(runs, 2)))
    assert {0} == set(steps_of(of_tries(runs, 1, 1)))


def test_the_history_of_a_job_that_was_cut_off_and_restarted() -> None:
    """Every try tells what it did: one that a crash cut off, one that failed, and the restart, which waits twice."""
    states = [
        stated(Scheduled(), 0),
        stated(Pending(), 1),
        stated(Running(), 2),
        stated(AwaitingRetry(), 5),
        stated(Running(), 6),
        stated(ended_state(Status.ALGORITHM_FAILED, "gone"), 9),
        stated(Scheduled(), 20),
        stated(Late(), 21),
        stated(Cancelled(), 25),
        stated(Scheduled(), 30),
        stated(Running(), 31),
        stated(ended_state(Status.COMPLETED, ""), 40),
    ]
    runs = [
        *of_try(1, task_run("0/provision-data", Running(), start=3)),
        *of_try(2, task_run("0/provision-data", Completed(), start=7, end=8)),
        *of_try(2, task_run("0/provision-algorithm", Failed(), start=7, end=8)),
        *of_try(3, task_run("0/provision-data", Completed(name="Cached"), start=32, end=32)),
        *of_try(3, task_run("0/provision-algorithm", Completed(), start=32, end=33)),
        *of_try(3, task_run("0/run", Completed(), start=34, end=35)),
    ]
    assert [
        (Status.WARMING_UP, 0, None),
        (Status.STARTED, 2, None),
        (Status.CONFIGURING, 3, 0),
        (Status.WARMING_UP, 5, None),
        (Status.STARTED, 6, None),
        (Status.CONFIGURING, 7, 0),
        (Status.ALGORITHM_FAILED, 9, 0),
        (Status.WARMING_UP, 20, None),
        (Status.STOPPED, 25, None),
        (Status.WARMING_UP, 30, None),
        (Status.STARTED, 31, None),
        (Status.CONFIGURING, 32, 0),
        (Status.PROVISIONED, 33, 0),
        (Status.RUNNING, 34, 0),
        (Status.COMPLETED, 40, None),
    ] == [
        (passed.status, (passed.at - START).total_seconds(), passed.stage)
        for passed in history(reversed(states), reversed(runs))
    ]


def test_the_history_of_a_job_whose_stages_others_do() -> None:
    """What they did and when is told as its own; an end tells of the stage that had failed by then."""
    states = [
        stated(Scheduled(), 0),
        stated(Running(), 1),
        stated(ended_state(Status.ALGORITHM_FAILED, "gone"), 9),
        stated(Scheduled(), 20),
        stated(Running(), 21),
        stated(ended_state(Status.COMPLETED, ""), 40),
    ]
    first, second = uuid4(), uuid4()
    runs = [
        *of_run(first, *of_try(1, task_run("0/run", Completed(), start=3, end=4))),
        *of_run(second, *of_try(1, task_run("1/provision-algorithm", Failed(), start=7, end=8))),
        *of_run(second, *of_try(2, task_run("1/provision-algorithm", Completed(), start=32, end=33))),
    ]
    assert [
        (Status.WARMING_UP, 0, None),
        (Status.STARTED, 1, None),
        (Status.RUNNING, 3, 0),
        (Status.CONFIGURING, 7, 1),
        (Status.ALGORITHM_FAILED, 9, 1),
        (Status.WARMING_UP, 20, None),
        (Status.STARTED, 21, None),
        (Status.CONFIGURING, 32, 1),
        (Status.COMPLETED, 40, None),
    ] == [(passed.status, (passed.at - START).total_seconds(), passed.stage) for passed in history(states, [], runs)]


def of_run(run_id: UUID, *runs: TaskRun) -> list[TaskRun]:
    return [run.model_copy(update={"flow_run_id": run_id}) for run in runs]


def test_when_a_run_was_restarted() -> None:
    """Put back after an end, the last time; what was lost and taken up again was not."""
    states = [stated(Scheduled(), 0), stated(Running(), 1), stated(AwaitingRetry(), 2), stated(Running(), 3)]
    assert restarted_at(states) is None
    states += [stated(Failed(), 4), stated(Scheduled(), 5), stated(Late(), 6), stated(Running(), 7)]
    assert at(5) == restarted_at(reversed(states))
    states += [stated(Cancelled(), 8)]
    assert at(5) == restarted_at(states)
    assert at(9) == restarted_at([*states, stated(Scheduled(), 9)])


# The queue.


def queue_state(kind: StateType, seconds: float, *, scheduled: float | None = None) -> State[Any]:
    """Of a run that was in it at *seconds*; *scheduled* is when it was to be begun."""
    details = StateDetails(scheduled_time=None if scheduled is None else at(scheduled))
    return State(type=kind, timestamp=at(seconds), state_details=details)


def test_a_job_that_expired_in_the_queue() -> None:
    """Nobody has stopped it, though Prefect calls it cancelled."""
    state = expired_in_queue("its turn did not come")
    assert (Status.EXPIRED_IN_QUEUE, None) == run_status(state, {})
    assert StopRequest.NONE is stop_request(state, Status.EXPIRED_IN_QUEUE)
    assert not is_taken_out(state)
    assert (True, None) == (is_taken_out(taken_out_of_the_queue()), queued_at(taken_out_of_the_queue()))
    assert (Status.WARMING_UP, None) == run_status(taken_out_of_the_queue(), {})


def test_a_run_that_is_stopped_in_the_queue_is_taken_out_of_it() -> None:
    """As one that has waited for too long, and told apart from it."""
    state = taken_out_of_the_queue(STOPPED_IN_QUEUE)
    assert (True, None) == (is_taken_out(state), queued_at(state))
    assert state.message != taken_out_of_the_queue().message


@pytest.mark.parametrize(
    ("kinds", "begun", "stopped"),
    [
        ([], False, False),
        ([StateType.SCHEDULED, StateType.PENDING], False, False),
        ([StateType.SCHEDULED, StateType.PENDING, StateType.CANCELLING], False, True),
        ([StateType.SCHEDULED, StateType.PENDING, StateType.CANCELLED, StateType.RUNNING], True, True),
        ([StateType.SCHEDULED, StateType.RUNNING, StateType.CANCELLING], True, True),
        ([StateType.SCHEDULED, StateType.RUNNING, StateType.CANCELLED, StateType.SCHEDULED], False, False),
        ([StateType.CANCELLED, StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING], True, False),
    ],
)
def test_whether_a_run_has_begun_and_was_stopped(kinds: list[StateType], begun: bool, stopped: bool) -> None:
    """Since it was queued the last time, in whatever order its states come."""
    states = [queue_state(kind, n) for n, kind in enumerate(kinds)]
    assert (begun, stopped) == (has_begun(states[::-1]), stopped_before_it_began(states[::-1]))


def test_a_run_waits_since_it_was_scheduled() -> None:
    """Prefect calling it late changes nothing; one that a worker has does not wait."""
    late = queue_state(StateType.SCHEDULED, 30, scheduled=0)
    assert START == queued_at(late)
    assert [None] * 3 == [queued_at(queue_state(kind, 1)) for kind in (StateType.PENDING, StateType.RUNNING)] + [
        queued_at(None)
    ]


@pytest.mark.parametrize(
    ("states", "seconds"),
    [
        ([], 0.0),
        ([queue_state(StateType.SCHEDULED, 0, scheduled=0)], 0.0),
        ([queue_state(StateType.SCHEDULED, 0, scheduled=0), queue_state(StateType.PENDING, 5)], 5.0),
        (
            [
                queue_state(StateType.RUNNING, 50),
                queue_state(StateType.PENDING, 40),
                queue_state(StateType.SCHEDULED, 15, scheduled=0),
                queue_state(StateType.SCHEDULED, 0, scheduled=0),
            ],
            40.0,
        ),
        (
            [
                queue_state(StateType.SCHEDULED, 0, scheduled=0),
                queue_state(StateType.RUNNING, 40),
                queue_state(StateType.SCHEDULED, 100, scheduled=100),
                queue_state(StateType.PENDING, 103),
                queue_state(StateType.RUNNING, 110),
            ],
            3.0,
        ),
    ],
)
def test_how_long_a_run_has_waited(states: list[State[Any]], seconds: float) -> None:
    """The last time that it was queued, until a worker took it."""
    assert seconds == waited(states)
