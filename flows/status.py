"""The one status table: codes, texts, projections of each dialect, and how steps add up to a status. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, IntEnum, StrEnum
from typing import Final


class Status(IntEnum):
    """Job status, spec 002 "Status description"; 2, 11, 41, 42, 51 and 62 extend it."""

    WARMING_UP = 1
    EXPIRED_IN_QUEUE = 2
    STOPPED = 7
    DELETED = 8
    STARTED = 10
    IMAGE_FAILED = 11
    CONFIGURING = 20
    PROVISIONED = 30
    DATA_FAILED = 31
    ALGORITHM_FAILED = 32
    RUNNING = 40
    RUN_FAILED = 41
    DISK_FULL = 42
    FILTERING = 50
    WITHHELD = 51
    PUBLISHING = 60
    UPLOAD_FAILED = 62
    COMPLETED = 70


TEXT: Final = {
    Status.WARMING_UP: "Warming up",
    Status.EXPIRED_IN_QUEUE: "Job expired in queue",
    Status.STOPPED: "Job stopped",
    Status.DELETED: "Job deleted successfully",
    Status.STARTED: "Job started",
    Status.IMAGE_FAILED: "Pulling algorithm image failed",
    Status.CONFIGURING: "Configuring volumes",
    Status.PROVISIONED: "Provisioning success",
    Status.DATA_FAILED: "Data provisioning failed",
    Status.ALGORITHM_FAILED: "Algorithm provisioning failed",
    Status.RUNNING: "Running algorithm",
    Status.RUN_FAILED: "Failed to run algorithm",
    Status.DISK_FULL: "Disk quota exceeded",
    Status.FILTERING: "Filtering results",
    Status.WITHHELD: "Results withheld by the filter",
    Status.PUBLISHING: "Publishing results",
    Status.UPLOAD_FAILED: "Failed to upload results to storage",
    Status.COMPLETED: "Job completed",
}

TERMINAL: Final = frozenset(
    {
        Status.EXPIRED_IN_QUEUE,
        Status.STOPPED,
        Status.DELETED,
        Status.IMAGE_FAILED,
        Status.DATA_FAILED,
        Status.ALGORITHM_FAILED,
        Status.RUN_FAILED,
        Status.DISK_FULL,
        Status.WITHHELD,
        Status.UPLOAD_FAILED,
        Status.COMPLETED,
    }
)

BY_TEXT: Final = {text: status for status, text in TEXT.items()}


class Dialect(Enum):
    """A table a status is spelled in."""

    PROVIDER = "002"
    OPERATOR = "000"
    OPERATOR_EARLY = "001"
    BRIZO = "003"


# Contract, section 2. A failed job keeps, in the short tables, the number of the step it failed in.
_STEP_000: Final = {
    Status.WARMING_UP: 1,
    Status.EXPIRED_IN_QUEUE: 1,
    Status.STARTED: 1,
    Status.CONFIGURING: 2,
    Status.PROVISIONED: 2,
    Status.DATA_FAILED: 2,
    Status.ALGORITHM_FAILED: 2,
    Status.IMAGE_FAILED: 2,
    Status.RUNNING: 3,
    Status.RUN_FAILED: 3,
    Status.DISK_FULL: 3,
    Status.FILTERING: 4,
    Status.WITHHELD: 4,
    Status.PUBLISHING: 5,
    Status.UPLOAD_FAILED: 5,
    Status.COMPLETED: 6,
}


def project(status: Status, dialect: Dialect, *, stopped_in: Status = Status.WARMING_UP) -> int:
    """
    *status* as *dialect* numbers it.

    *stopped_in* is the status a stopped or deleted job had before: the operator's tables have no number for
    either and show that step instead.
    """
    if dialect is Dialect.PROVIDER:
        return int(status)
    if status in (Status.STOPPED, Status.DELETED):
        if dialect is Dialect.BRIZO:
            return int(status)
        return project(stopped_in, dialect)
    step = _STEP_000[status]
    if dialect is Dialect.OPERATOR_EARLY and step >= 5:
        return step - 1  # 001 knows no filtering: uploading is 4 with it, finished is 5
    return step


class Phase(StrEnum):
    """A step of a stage; the value is part of its task run's name."""

    DATA = "provision-data"
    ALGORITHM = "provision-algorithm"
    RUN = "run"
    FILTER = "filter"
    PUBLISH = "publish"


class Outcome(StrEnum):
    """How far one step has come."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


_RUNNING_STATUS: Final = {
    Phase.RUN: Status.RUNNING,
    Phase.FILTER: Status.FILTERING,
    Phase.PUBLISH: Status.PUBLISHING,
}

_FAILED_STATUS: Final = {
    Phase.DATA: Status.DATA_FAILED,
    Phase.ALGORITHM: Status.ALGORITHM_FAILED,
    Phase.RUN: Status.RUN_FAILED,
    Phase.FILTER: Status.WITHHELD,
    Phase.PUBLISH: Status.UPLOAD_FAILED,
}


def status_of(steps: Iterable[tuple[Phase, Outcome]]) -> Status:
    """
    The status of one stage whose flow is alive, from its steps; steps not named have not begun.

    A failed step does not end the job here: the flow still has to publish the log and say so itself, so a
    stage with a failed step shows the step that is failing, not a terminal status.
    """
    known = dict(steps)
    begun = {phase for phase, outcome in known.items() if outcome is not Outcome.WAITING}
    for phase in (Phase.PUBLISH, Phase.FILTER, Phase.RUN):
        if phase in begun:
            return _RUNNING_STATUS[phase]
    provisioning = [known.get(phase, Outcome.WAITING) for phase in (Phase.DATA, Phase.ALGORITHM)]
    if all(outcome is Outcome.DONE for outcome in provisioning):
        return Status.PROVISIONED
    if Phase.DATA in begun or Phase.ALGORITHM in begun:
        return Status.CONFIGURING
    return Status.STARTED


def failure_of(phase: Phase) -> Status:
    """The terminal status of a job one of whose steps failed for a reason without a code of its own."""
    return _FAILED_STATUS[phase]
