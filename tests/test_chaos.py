"""The crash test: its planning, its table, and a short form of it: one kill of each part of a service of its own."""

from __future__ import annotations

import fcntl
import json
from collections import Counter
from pathlib import Path

import pytest

from chaos import plan, table
from chaos.driver import Driver
from chaos.parts import Postgres, Stand, is_held
from chaos.plan import STATUSES, Part, applies
from flows.status import TERMINAL, Status

CELLS = [(status, part) for status in STATUSES for part in Part if applies(status, part)]


def test_the_same_seed_plans_the_same_kills() -> None:
    """Status, part, moment and shapes of all jobs; a longer run begins as a shorter one."""
    assert plan.kills(50, 7) == plan.kills(100, 7)[:50]
    assert plan.kills(50, 7) != plan.kills(50, 8)


def test_every_cell_comes_once_before_any_comes_again() -> None:
    """So any number of kills is spread evenly over the table."""
    planned = [(kill.status, kill.part) for kill in plan.kills(2 * len(CELLS), 1)]
    assert sorted(CELLS) == sorted(planned[: len(CELLS)])
    assert {2} == set(Counter(planned).values())


def test_nothing_is_planned_that_is_not_there() -> None:
    """No algorithm but while it runs, no flow while the job waits; every status but the ends is one of the rows."""
    assert [Status.RUNNING] == [status for status in STATUSES if applies(status, Part.ALGORITHM)]
    assert not applies(Status.WARMING_UP, Part.FLOW)
    assert set(Status) - TERMINAL - {Status.DELETED} == set(STATUSES)
    assert all(applies(kill.status, kill.part) for kill in plan.kills(500, 1))


def test_parts_that_are_left_out_are_not_killed() -> None:
    """With SQLite there is no database to be killed by itself."""
    parts = (Part.API, Part.FLOW)
    assert set(parts) == {kill.part for kill in plan.kills(100, 1, parts)}


def test_one_of_each_kills_every_part_once() -> None:
    """Each in another status."""
    kills = plan.one_of_each(1)
    assert sorted(Part) == sorted(kill.part for kill in kills)
    assert len(kills) == len({kill.status for kill in kills})


def test_a_cell_counts_kills_and_those_that_failed() -> None:
    """Not failures: one kill may break several promises. A failed kill that hit nothing is in the list all the same."""
    tally = table.Tally()
    failure = table.Failure("kill 1", "job", "an end", "none")
    tally.count(Status.RUNNING, Part.FLOW, [failure, failure])
    tally.count(Status.RUNNING, Part.FLOW, [])
    tally.miss([failure])
    assert "2/1" == tally.cell(Status.RUNNING, Part.FLOW)
    assert (2, 3, 1) == (tally.kills, len(tally.failures), tally.missed)


def test_an_interrupted_run_is_taken_up() -> None:
    """By what it has written of its kills: also of those that stand in no cell, and of promises not kept."""
    lines = [
        {
            "kill": "kill 1: flow in 20, 3% into it",
            "status": 20,
            "seconds": [1.5, 2.5],
            "jobs": {"a": ""},
            "broken": [],
        },
        {"kill": "kill 2: all in 40, 9% into it", "status": 50, "seconds": [], "jobs": {}, "broken": ["b: not kept"]},
        {"kill": "kill 3: api in 60, 1% into it", "status": 70, "seconds": [1], "jobs": {"c": ""}, "broken": []},
    ]
    tally = table.Tally()
    assert 3 == tally.take_up(map(json.dumps, lines))
    assert ("1/0", "1/1") == (tally.cell(Status.CONFIGURING, Part.FLOW), tally.cell(Status.FILTERING, Part.ALL))
    assert (2, 1, 1, 2, 5.0) == (tally.kills, tally.missed, len(tally.failures), tally.jobs, tally.seconds)


def test_the_table_has_a_row_for_each_status_and_a_column_for_each_part() -> None:
    """Cells that make no sense are marked; the last row sums up."""
    tally = table.Tally()
    tally.count(Status.PUBLISHING, Part.ALL, [])
    text = table.markdown(tally, {"seed": 1, "kills": 1})
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert text.startswith("seed: 1; kills: 1.\n")
    assert ["status", *Part] == rows[0]
    assert 2 + len(STATUSES) + 1 == len(rows)
    assert ["60 Publishing results", "0/0", "0/0", "0/0", "0/0", "0/0", table.NOT_APPLICABLE, "1/0"] == rows[-2]
    assert ["all", "0/0", "0/0", "0/0", "0/0", "0/0", "0/0", "1/0"] == rows[-1]
    assert len(STATUSES) == table.shown(tally).row_count - 1


def test_the_table_is_put_between_its_marks_again_and_again() -> None:
    """The text around stays."""
    page = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    once = table.put_between(page, r"new \1")
    assert once.startswith("before\n") and once.endswith("after\n") and r"new \1" in once and "old" not in once
    assert once == table.put_between(once, r"new \1")
    with pytest.raises(ValueError, match="there is no line"):
        table.put_between("before\nafter\n", "new")


def test_the_page_has_the_marks() -> None:
    """``--out docs/reliability.md`` finds where to write."""
    page = Path(__file__).parents[1] / "docs" / "reliability.md"
    assert table.put_between(page.read_text(encoding="utf-8"), "")


def test_a_lock_that_is_held_is_seen_without_taking_it(tmp_path: Path) -> None:
    """By whoever holds it, this process too."""
    lock = tmp_path / "lock"
    assert not is_held(lock)
    with lock.open("w") as file:
        assert not is_held(lock)
        fcntl.flock(file, fcntl.LOCK_EX)
        assert is_held(lock)
    assert not is_held(lock)


@pytest.mark.postgres
def test_the_database_can_be_killed_and_comes_back(tmp_path: Path) -> None:
    """By another process, after its recovery. Where there is no PostgreSQL the next test leaves that part out."""
    if obstacle := Postgres.obstacle():
        pytest.skip(obstacle)
    with Postgres(tmp_path / "log") as database:
        before = {process.pid for process in database.processes()}
        database.kill()
        assert not database._answers()
        database.start()
        assert database._answers()
        assert before.isdisjoint(process.pid for process in database.processes())


@pytest.mark.worker
@pytest.mark.sandbox
@pytest.mark.s3
@pytest.mark.postgres
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_whatever_is_killed_every_job_ends_as_it_should(tmp_path: Path) -> None:
    """Each part once, in different statuses, and then power: no job is lost, none ends twice, nothing is left."""
    postgres = Postgres.obstacle() is None
    parts = tuple(part for part in Part if postgres or part is not Part.DATABASE)
    with Stand(tmp_path / "chaos", postgres=postgres) as stand:
        driver = Driver(stand)
        driver.run(plan.one_of_each(1, parts))
    assert [] == driver.tally.failures
    assert len(parts) == driver.tally.kills + driver.tally.missed
