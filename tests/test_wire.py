"""Spellings that no request can show."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from api import wire
from blocks.limits import GIB, Limits, Offer
from flows.errors import Problem
from flows.jobs import EnvironmentState, Job, StopRequest, Transition
from flows.status import Dialect, Status
from tests.factories import result

AT = datetime(2026, 11, 22, 21, 41, 27, 590750, tzinfo=UTC)
JOB = Job(id="0" * 32, owner="0x1", agreement_id="1", environment="e", status=Status.RUNNING, created=AT, reason="runs")
ALL = wire.View(link=lambda job, index: f"{job.id[:2]}/{index}", admin=True)


def test_a_timestamp_is_decimal_seconds_as_text() -> None:
    """Six digits after the point, always."""
    assert "1795383687.590750" == wire.timestamp(AT)
    assert "1795383687.000000" == wire.timestamp(AT.replace(microsecond=0))


def test_a_stopped_job_shows_the_step_it_was_stopped_in() -> None:
    """000 and 001 have no number for it; the history says the same."""
    history = tuple(Transition(status, AT) for status in (Status.STARTED, Status.FILTERING, Status.STOPPED))
    job = replace(JOB, status=Status.STOPPED, stopped_in=Status.FILTERING, finished=AT, history=history)
    early = wire.early_status(job, Dialect.OPERATOR, ALL)
    assert 4 == early.status
    assert [1, 4, 4] == [passage.status for passage in early.history]
    assert [10, 50, 7] == [passage.status for passage in wire.operator_status(job, ALL).history]


def test_stop_requests_are_numbers() -> None:
    """``stopreq``: 0 none, 1 stop requested, 2 timed out."""
    jobs = [replace(JOB, stop_request=request) for request in StopRequest]
    assert [0, 1, 2] == [wire.operator_status(job, ALL).stopreq for job in jobs]


def test_detail_follows_the_text() -> None:
    """41 says which."""
    job = replace(JOB, status=Status.RUN_FAILED, detail="exit code 3", finished=AT)
    assert "Failed to run algorithm: exit code 3" == wire.operator_status(job, ALL).statusText


def test_of_several_logs_the_last_stages_is_linked() -> None:
    """The document has room for one."""
    files = [result(name, b"", kind)[0] for name, kind in (("0/a.log", "algorithmLog"), ("1/a.log", "algorithmLog"))]
    assert "00/1" == wire.early_status(replace(JOB, results=tuple(files)), Dialect.OPERATOR, ALL).algologURL


def test_results_only_for_admins_are_no_results() -> None:
    """ "" until there are any that the caller may see."""
    job = replace(JOB, results=(result("publish.log", b"", "publishLog")[0],))
    assert "" == wire.operator_status(job, wire.View(link=None)).results
    assert isinstance(wire.operator_status(job, ALL).results, list)


def test_an_environment_tells_parts_of_a_gib_and_that_it_was_never_seen() -> None:
    """Whole numbers stand as whole numbers."""
    limits = Limits(memory_bytes=GIB // 2, cpus=1.5, seconds=60)
    state = EnvironmentState(
        offer=Offer(id="e", limits=limits), running=1, waiting=4, last_seen=None, obstacle="none up"
    )
    environment = wire.environment(state)
    assert (0, 0, 0) == (environment.gpuNumber, environment.totalGPU, environment.freeGPU)
    assert (0.5, 10, 1.5, 60) == (
        environment.ramGB,
        environment.diskGB,
        environment.nCPU,
        environment.maxJobDuration,
    )
    assert (None, 1, 4, "none up") == (
        environment.lastSeen,
        environment.currentJobs,
        environment.queuedJobs,
        environment.obstacle,
    )


def test_gpus_of_a_job_and_of_all() -> None:
    """What one job may have, what all have together, never less than that, and what nobody has now."""
    for gpus, total in ((0, 2), (8, 8)):
        offer = Offer(id="e", gpus=gpus, limits=Limits(gpus=2))
        state = EnvironmentState(offer=offer, running=1, waiting=0, last_seen=None, free_gpus=1)
        listed = wire.environment(state)
        assert (2, 2, total, 1) == (listed.nGPU, listed.gpuNumber, listed.totalGPU, listed.freeGPU)


@pytest.mark.parametrize(
    ("path", "message", "text"),
    [
        ("stages", "is required", "Missing stages"),
        ("stages.3.input", "is required", "Missing input in stage 3"),
        ("owner", "is required", '"owner" is required in the call to POST:/init'),
        ("stages.0.compute.namespace", "anything", "Environment invalid or does not exist"),
        ("stages.0.input.0.id", "is required", "stages.0.input.0.id: is required"),
        ("stages", "101 stages; at most 100", "stages: 101 stages; at most 100"),
    ],
)
def test_a_problem_is_told_in_the_words_of_the_original(path: str, message: str, text: str) -> None:
    """Where it had words for it."""
    assert text == wire.operator_text(Problem(path, message), "POST:/init")
