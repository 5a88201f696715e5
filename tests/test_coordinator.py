"""What a restart makes of the runs of a job's stages: real records, made here instead of by a server."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Cancelled, Completed, Crashed, Failed, Running, Scheduled

from flows.build import StageResult
from flows.plan import Plan, compile_plan
from flows.stages import Coordinator, counts, is_spread, stage_of, stage_parameters, stage_result
from flows.states import ended_state, expired_in_queue
from flows.status import Status
from tests.documents import offer, outputs_of, parsed, stage

JOB: Final = "0123456789abcdef" * 2
START: Final = datetime(2026, 1, 1, tzinfo=UTC)
OFFERS: Final = {name: offer(name) for name in ("default", "other")}

AnyState = State[Any]


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def plan() -> Plan:
    """0 in one environment; 1 in another reads it; 2 follows 1; 3 depends on nothing."""
    return compile_plan(
        parsed(
            stage(0),
            stage(1, environment="other", input=[outputs_of(0)]),
            stage(2, after=[1]),
            stage(3, environment="other", after=[]),
        ),
        OFFERS,
    )


KEYS: Final = {f"{n}/publish": f"key-{n}" for n in range(4)}


def run(index: int, state: AnyState, seconds: float) -> FlowRun:
    of = plan()
    return FlowRun.model_validate(
        {
            "id": uuid4(),
            "flow_id": uuid4(),
            "name": "stage",
            "parameters": stage_parameters(JOB, of.stage(index)),
            "state": state.model_copy(update={"timestamp": at(seconds)}),
        }
    )


def done(index: int, seconds: float, *, key: str = "") -> FlowRun:
    return run(index, ended_state(Status.COMPLETED, key or f"key-{index}"), seconds)


def failed(index: int, seconds: float) -> FlowRun:
    return run(index, ended_state(Status.RUN_FAILED, "exit code 1"), seconds)


def stale(
    runs: Mapping[int, FlowRun], *, since: float | None = 50, kept: tuple[int, ...] = (0, 1, 2, 3)
) -> tuple[int, ...]:
    """The stages that are done anew after a restart at *since*, of those that had ended before."""
    restart = None if since is None else at(since)
    coordinator = Coordinator(plan(), JOB, KEYS, restart, kept, 2, lambda index: None, {})
    return tuple(sorted(coordinator._stale(runs)))


def test_what_is_done_stays_done() -> None:
    """Stages that have ended as the document still asks for, in the order in which they follow each other."""
    runs = {0: done(0, 10), 1: done(1, 20), 2: done(2, 30), 3: done(3, 5)}
    assert () == stale(runs)
    assert () == stale({0: done(0, 10), 1: failed(1, 20)}, since=None)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({1: failed(1, 20)}, (1, 2)),
        ({1: run(1, Cancelled(), 20)}, (1, 2)),
        ({0: done(0, 10, key="of another document")}, (0, 1, 2)),
        ({3: failed(3, 5)}, (3,)),
        # Done again since, or about to be: what followed is done again as well.
        ({0: done(0, 60)}, (1, 2)),
        ({0: run(0, Running(), 60)}, (1, 2)),
        ({0: run(0, Scheduled(), 60)}, (1, 2)),
        ({0: done(0, 60), 1: done(1, 70)}, (2,)),
    ],
    ids=["failed", "stopped", "changed", "alone", "done again", "running", "waiting", "two done again"],
)
def test_what_is_done_anew(changes: Mapping[int, FlowRun], expected: tuple[int, ...]) -> None:
    """What failed, what is asked for otherwise now, and all that follows from it."""
    runs = {0: done(0, 10), 1: done(1, 20), 2: done(2, 30), 3: done(3, 5), **changes}
    assert expected == stale(runs)


def test_what_is_gone_from_a_store_is_done_anew() -> None:
    """With all that was made from it."""
    runs = {0: done(0, 10), 1: done(1, 20), 2: done(2, 30), 3: done(3, 5)}
    assert (0, 1, 2) == stale(runs, kept=(1, 2, 3))
    assert (3,) == stale(runs, kept=(0, 1, 2))


def test_which_ends_belong_to_a_restarted_job() -> None:
    """Those since then, those that still stand, and what has not ended; a failure of before is to be forgotten."""
    ends = [failed(0, 40), failed(0, 60), done(0, 40), run(0, Scheduled(), 40)]
    assert [False, True, True, True] == [counts(each, at(50)) for each in ends]
    assert [True] * 4 == [counts(each, None) for each in ends]


@pytest.mark.parametrize(
    ("state", "result"),
    [
        (ended_state(Status.COMPLETED, "key"), StageResult(Status.COMPLETED, "key")),
        (ended_state(Status.WITHHELD, "too much"), StageResult(Status.WITHHELD, "too much")),
        (expired_in_queue("too late"), StageResult(Status.EXPIRED_IN_QUEUE, "too late")),
        (Cancelled(message="by hand"), StageResult(Status.STOPPED)),
        (Crashed(message="code -9"), None),
        (Failed(message="KeyError: 'secret'"), None),
    ],
)
def test_how_a_stage_ended(state: AnyState, result: StageResult | None) -> None:
    """As its own run tells it; of a bug nothing is passed on."""
    assert result == stage_result(state)


def test_whose_stage_a_run_does() -> None:
    """It is no job, and no job is taken for one that does a stage."""
    assert (JOB, 1) == stage_of(done(1, 0))
    assert not is_spread(done(1, 0))
    summary = {"fingerprint": "f", "environments": ["default", "other"], "places": {"0": "default", "1": "other"}}
    job = done(0, 0).model_copy(update={"parameters": {"sealed": "…", "summary": summary}, "state": Completed()})
    assert stage_of(job) is None and is_spread(job)
