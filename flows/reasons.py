"""Why a job is where it is and what comes next, in words for its consumer. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Final

from flows.jobs import EnvironmentState
from flows.status import Status

SILENT_AFTER: Final = 90.0
"""Seconds without a heartbeat after which a worker counts as away; Prefect's workers report every 30 s."""

STOPPING: Final = "a stop was requested; the algorithm is being ended"
RESUMING: Final = "the job was interrupted; it goes on after its last finished step, as soon as a worker is free"
STAGE_INTERRUPTED: Final = "was interrupted; it goes on after its last finished step, as soon as a worker is free"
STAGE_BEGINS: Final = "is about to begin: a worker has taken it"
"""For ``why_stages_wait``."""

SOONEST_ESTIMATE: Final = 2.0
"""Seconds after which it is told how long a transfer still takes: before that it is a guess."""

NAMED: Final = 3
"""Waiting stages that a reason names."""

_LIVE: Final = {
    Status.WARMING_UP: "a worker has taken the job and is starting it",
    Status.STARTED: "the flow has started and lays out its steps",
    Status.CONFIGURING: "inputs and algorithm are being fetched",
    Status.PROVISIONED: "inputs and algorithm are here; the algorithm starts next",
    Status.RUNNING: "the algorithm is running",
    Status.FILTERING: "the outputs are checked against what may leave",
    Status.PUBLISHING: "outputs and logs are being put into the result store",
}


def silent(last_seen: datetime | None, now: datetime) -> bool:
    """Whether the workers last seen then count as away."""
    return last_seen is None or (now - last_seen).total_seconds() > SILENT_AFTER


def why_waiting(environment: EnvironmentState | None, now: datetime, before: int | None = None) -> str:
    """For a job no worker has taken yet. *before* is how many jobs of its environment come first; None: not known."""
    if environment is None:
        return "waiting for a worker"
    offer = environment.offer
    if environment.last_seen is None:
        return f"waiting for a worker: none has ever reported for `{offer.id}`"
    if silent(environment.last_seen, now):
        seconds = (now - environment.last_seen).total_seconds()
        return f"waiting for a worker: none has reported for `{offer.id}` for {seconds:.0f} s"
    if environment.running >= offer.max_jobs:
        slots = f"{environment.running} of {offer.max_jobs} jobs are running in `{offer.id}`"
        return f"waiting for a free slot: {slots}{_place(before)}"
    return f"waiting to be picked up by a worker{_place(before) if before else ''}"


def _place(before: int | None) -> str:
    match before:
        case None:
            return ""
        case 0:
            return "; this one is next"
        case 1:
            return "; 1 job is before this one"
    return f"; {before} jobs are before this one"


def why_live(
    status: Status, *, seconds: float | None = None, fetching: str | None = None, waiting: str | None = None
) -> str:
    """
    For a job in progress. *seconds* is what its algorithm has at most, *fetching* how far the inputs are, *waiting* why
    its algorithm cannot begin yet.
    """
    if status is Status.CONFIGURING and fetching:
        return fetching
    if status is Status.RUNNING and waiting:
        return waiting
    if status is Status.RUNNING and seconds:
        return f"{_LIVE[status]}; it has {seconds:g} s at most"
    return _LIVE[status]


def seconds_left(done: float, seconds: float) -> float | None:
    """What a transfer still takes that has come to *done*, 0 to 1, in so many *seconds*; None while nobody can say."""
    if seconds < SOONEST_ESTIMATE or not 0.0 < done < 1.0:
        return None
    return seconds * (1.0 - done) / done


def about(seconds: float) -> str:
    """A time in words: in two digits at most, for it is an estimate."""
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"about {seconds / length:.0f} {unit} left"
    return f"about {max(1.0, seconds):.0f} s left"


def why_stages_wait(reasons: Mapping[int, str]) -> str:
    """For a job in several environments, from what is told of each stage that has not begun: the rest of a sentence."""
    told = [f"stage {stage} {why}" for stage, why in sorted(reasons.items())[:NAMED]]
    more = len(reasons) - len(told)
    return "; ".join([*told, *([f"{more} more stages wait"] if more else [])])


def why_ended(status: Status, message: str, *, stage: int | None, stages: int) -> str:
    """For a job that has ended with *message* in the stage numbered *stage*."""
    if status is Status.COMPLETED:
        return "all stages are done and published"
    if status is Status.STOPPED:
        return "stopped on request"
    where = f"stage {stage}: " if stage is not None and stages > 1 else ""
    after = "; see the algorithm's log" if status is Status.RUN_FAILED else ""
    return f"{where}{message}{after}"
