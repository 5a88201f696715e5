"""The status table, spelled out: codes, texts, what each dialect shows, and how steps add up."""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.status import BY_TEXT, TERMINAL, TEXT, Dialect, Outcome, Phase, Status, failure_of, project, status_of

TABLE: Final = {
    # code: (text, terminal, 000, 001, 003)
    1: ("Warming up", False, 1, 1, 1),
    2: ("Job expired in queue", True, 1, 1, 1),
    10: ("Job started", False, 1, 1, 1),
    11: ("Pulling algorithm image failed", True, 2, 2, 2),
    20: ("Configuring volumes", False, 2, 2, 2),
    30: ("Provisioning success", False, 2, 2, 2),
    31: ("Data provisioning failed", True, 2, 2, 2),
    32: ("Algorithm provisioning failed", True, 2, 2, 2),
    40: ("Running algorithm", False, 3, 3, 3),
    41: ("Failed to run algorithm", True, 3, 3, 3),
    42: ("Disk quota exceeded", True, 3, 3, 3),
    50: ("Filtering results", False, 4, 4, 4),
    51: ("Results withheld by the filter", True, 4, 4, 4),
    60: ("Publishing results", False, 5, 4, 5),
    62: ("Failed to upload results to storage", True, 5, 4, 5),
    70: ("Job completed", True, 6, 5, 6),
}
"""Contract, section 2, without the rows of stopped and deleted jobs."""

WAITING, RUNNING, DONE, FAILED = Outcome.WAITING, Outcome.RUNNING, Outcome.DONE, Outcome.FAILED
DATA, ALGORITHM, RUN, FILTER, PUBLISH = Phase


def test_the_table_is_the_contract() -> None:
    """Every code of the contract is a status, and no other is but stopped and deleted."""
    assert {*TABLE, 7, 8} == {int(status) for status in Status}


def test_every_status_has_a_text_of_its_own() -> None:
    """A text tells exactly one status: states of runs are named by it and read back by it."""
    assert set(TEXT) == set(Status)
    assert {text: status for status, text in TEXT.items()} == BY_TEXT
    assert len(BY_TEXT) == len(Status)


@pytest.mark.parametrize(("code", "row"), TABLE.items(), ids=map(str, TABLE))
def test_a_row_of_the_table(code: int, row: tuple[str, bool, int, int, int]) -> None:
    """Text, end and the number in each dialect are as the contract has them."""
    status = Status(code)
    dialects = (Dialect.OPERATOR, Dialect.OPERATOR_EARLY, Dialect.BRIZO)
    assert row == (TEXT[status], status in TERMINAL, *(project(status, dialect) for dialect in dialects))
    assert code == project(status, Dialect.PROVIDER)


@pytest.mark.parametrize(
    ("status", "code", "text"),
    [(Status.STOPPED, 7, "Job stopped"), (Status.DELETED, 8, "Job deleted successfully")],
)
def test_stopped_and_deleted(status: Status, code: int, text: str) -> None:
    """Two dialects have numbers for them; the operator's show the step the job was in."""
    assert status in TERMINAL
    assert text == TEXT[status]
    assert [code, code] == [project(status, dialect) for dialect in (Dialect.PROVIDER, Dialect.BRIZO)]
    for before, row in TABLE.items():
        shown = [
            project(status, dialect, stopped_in=Status(before))
            for dialect in (Dialect.OPERATOR, Dialect.OPERATOR_EARLY)
        ]
        assert [row[2], row[3]] == shown


def test_failed_jobs_never_look_completed() -> None:
    """No dialect shows the number of success for anything but success."""
    for dialect in Dialect:
        success = project(Status.COMPLETED, dialect)
        assert [Status.COMPLETED] == [status for status in Status if project(status, dialect) == success]


@pytest.mark.parametrize(
    ("steps", "status"),
    [
        ({}, Status.STARTED),
        ({DATA: WAITING, ALGORITHM: WAITING}, Status.STARTED),
        ({DATA: RUNNING}, Status.CONFIGURING),
        ({ALGORITHM: RUNNING}, Status.CONFIGURING),
        ({DATA: DONE}, Status.CONFIGURING),
        ({DATA: DONE, ALGORITHM: RUNNING}, Status.CONFIGURING),
        ({DATA: RUNNING, ALGORITHM: DONE}, Status.CONFIGURING),
        ({DATA: FAILED, ALGORITHM: DONE}, Status.CONFIGURING),
        ({DATA: DONE, ALGORITHM: FAILED}, Status.CONFIGURING),
        ({DATA: DONE, ALGORITHM: DONE}, Status.PROVISIONED),
        ({DATA: DONE, ALGORITHM: DONE, RUN: WAITING}, Status.PROVISIONED),
        ({DATA: DONE, ALGORITHM: DONE, RUN: RUNNING}, Status.RUNNING),
        ({DATA: DONE, ALGORITHM: DONE, RUN: FAILED}, Status.RUNNING),
        ({DATA: DONE, ALGORITHM: DONE, RUN: DONE, FILTER: WAITING}, Status.RUNNING),
        ({DATA: DONE, ALGORITHM: DONE, RUN: DONE, FILTER: RUNNING}, Status.FILTERING),
        ({DATA: DONE, ALGORITHM: DONE, RUN: DONE, FILTER: DONE, PUBLISH: WAITING}, Status.FILTERING),
        ({DATA: DONE, ALGORITHM: DONE, RUN: DONE, FILTER: DONE, PUBLISH: RUNNING}, Status.PUBLISHING),
        ({DATA: DONE, ALGORITHM: DONE, RUN: DONE, FILTER: DONE, PUBLISH: DONE}, Status.PUBLISHING),
        ({PUBLISH: RUNNING}, Status.PUBLISHING),
    ],
    ids=str,
)
def test_steps_add_up(steps: dict[Phase, Outcome], status: Status) -> None:
    """The furthest step that has begun says where a stage is; both kinds of fetching count as one."""
    assert status is status_of(steps.items())


@given(st.dictionaries(st.sampled_from(Phase), st.sampled_from(Outcome)))
def test_a_living_stage_has_not_ended(steps: dict[Phase, Outcome]) -> None:
    """No combination of steps ends a job: only its flow does, once the log is published."""
    assert status_of(steps.items()) not in TERMINAL


@given(st.permutations([DATA, ALGORITHM]), st.integers(0, 10))
def test_a_stage_never_goes_back(fetching: list[Phase], cut: int) -> None:
    """As steps begin and end in turn, the status only grows."""
    moves = [(phase, outcome) for phase in [*fetching, RUN, FILTER, PUBLISH] for outcome in (RUNNING, DONE)]
    seen = [status_of(dict(moves[:n]).items()) for n in range(cut + 1)]
    assert sorted(seen) == seen


def test_every_phase_can_fail() -> None:
    """Each phase has a terminal status of its own for a failure without a code."""
    failures = [failure_of(phase) for phase in Phase]
    assert TERMINAL.issuperset(failures)
    assert len(Phase) == len(set(failures))
