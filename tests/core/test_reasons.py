"""Why a job is where it is: each case a sentence its consumer can act on."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

import pytest

from flows.jobs import EnvironmentState
from flows.reasons import (
    SILENT_AFTER,
    STAGE_BEGINS,
    STAGE_INTERRUPTED,
    about,
    seconds_left,
    why_ended,
    why_live,
    why_stages_wait,
    why_waiting,
)
from flows.status import TERMINAL, Status
from tests.documents import offer

NOW: Final = datetime(2026, 1, 1, tzinfo=UTC)


def environment(*, running: int = 0, seen: float | None = 1.0) -> EnvironmentState:
    """With two slots and a worker that reported *seen* seconds ago."""
    last = None if seen is None else NOW - timedelta(seconds=seen)
    return EnvironmentState(offer=offer("withgpu", max_jobs=2), running=running, waiting=1, last_seen=last)


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (None, "waiting for a worker"),
        (environment(seen=None), "waiting for a worker: none has ever reported for `withgpu`"),
        (environment(seen=100), "waiting for a worker: none has reported for `withgpu` for 100 s"),
        (environment(seen=100, running=2), "waiting for a worker: none has reported for `withgpu` for 100 s"),
        (environment(running=2), "waiting for a free slot: 2 of 2 jobs are running in `withgpu`"),
        (environment(running=3), "waiting for a free slot: 3 of 2 jobs are running in `withgpu`"),
        (environment(running=1), "waiting to be picked up by a worker"),
        (environment(seen=SILENT_AFTER), "waiting to be picked up by a worker"),
    ],
)
def test_why_a_job_waits(found: EnvironmentState | None, sentence: str) -> None:
    """No worker comes before no slot: with nobody there, a free slot helps nothing."""
    assert sentence == why_waiting(found, NOW)


@pytest.mark.parametrize(
    ("before", "place"),
    [(0, "; this one is next"), (1, "; 1 job is before this one"), (3, "; 3 jobs are before this one")],
)
def test_the_place_of_a_job_that_waits(before: int, place: str) -> None:
    """Where somebody is there to take it, and it is known; with a slot free, being next goes without saying."""
    sentence = f"waiting for a free slot: 2 of 2 jobs are running in `withgpu`{place}"
    assert sentence == why_waiting(environment(running=2), NOW, before)
    picked_up = f"waiting to be picked up by a worker{place if before else ''}"
    assert picked_up == why_waiting(environment(running=1), NOW, before)
    assert "before" not in why_waiting(environment(seen=100), NOW, before)


def test_why_the_stages_of_a_job_wait() -> None:
    """By stage, and not more of them than a sentence can hold."""
    waits = f"is {why_waiting(environment(running=2), NOW, 0)}"
    assert "stage 1 is waiting for a free slot: 2 of 2 jobs are running in `withgpu`; this one is next" == (
        why_stages_wait({1: waits})
    )
    told = why_stages_wait({7: STAGE_BEGINS, 2: STAGE_INTERRUPTED, 9: waits, 8: waits, 10: waits})
    assert told.startswith("stage 2 was interrupted; it goes on")
    assert "; stage 7 is about to begin" in told and "; stage 8 is waiting" in told
    assert told.endswith("; 2 more stages wait")


@pytest.mark.parametrize("status", sorted(set(Status) - TERMINAL))
def test_every_living_status_has_a_reason(status: Status) -> None:
    """No status of a job in progress is without a cause."""
    assert why_live(status)
    assert why_live(status) == why_live(status, seconds=None, fetching="")


def test_how_far_a_fetch_is() -> None:
    """While inputs are fetched, the reason is how far they are; at no other time."""
    assert "Inputs of stage 0: 1 of 3 files" == why_live(
        Status.CONFIGURING, fetching="Inputs of stage 0: 1 of 3 files", seconds=60
    )
    assert "files" not in why_live(Status.FILTERING, fetching="Inputs of stage 0: 3 of 3 files")


@pytest.mark.parametrize(
    ("done", "seconds", "left"),
    [
        (0.5, 10.0, "about 10 s left"),
        (0.25, 100.0, "about 5 min left"),
        (0.01, 300.0, "about 8 h left"),
        (0.999, 5.0, "about 1 s left"),
        (0.5, 1.0, None),
        (0.0, 60.0, None),
        (1.0, 60.0, None),
    ],
)
def test_how_long_a_fetch_still_takes(done: float, seconds: float, left: str | None) -> None:
    """As long as what is left of it, at the speed so far; nothing is said where that would be a guess."""
    estimate = seconds_left(done, seconds)
    assert left == (None if estimate is None else about(estimate))


def test_how_long_an_algorithm_has() -> None:
    """While the algorithm runs, the reason says how much time it has at most; at no other time."""
    assert "the algorithm is running; it has 90 s at most" == why_live(Status.RUNNING, seconds=90.0, fetching="x")
    assert "90" not in why_live(Status.PUBLISHING, seconds=90.0)


def test_an_algorithm_that_cannot_begin_says_what_it_waits_for() -> None:
    """What it waits for comes before how long it may run, and only until it runs."""
    assert "no GPU is free" == why_live(Status.RUNNING, seconds=90.0, waiting="no GPU is free")
    assert "GPU" not in why_live(Status.FILTERING, waiting="no GPU is free")


@pytest.mark.parametrize(
    ("status", "message", "stage", "stages", "sentence"),
    [
        (Status.COMPLETED, "", 0, 1, "all stages are done and published"),
        (Status.STOPPED, "anything", 1, 2, "stopped on request"),
        (Status.RUN_FAILED, "exit code 3", 0, 1, "exit code 3; see the algorithm's log"),
        (Status.RUN_FAILED, "timed out", 1, 2, "stage 1: timed out; see the algorithm's log"),
        (Status.DATA_FAILED, "input a, URL 0: 404", 0, 2, "stage 0: input a, URL 0: 404"),
        (Status.WITHHELD, "too large", None, 2, "too large"),
    ],
)
def test_why_a_job_has_ended(status: Status, message: str, stage: int | None, stages: int, sentence: str) -> None:
    """The message, in which stage where there are several, and where to look next."""
    assert sentence == why_ended(status, message, stage=stage, stages=stages)
