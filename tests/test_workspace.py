"""How long the folder of a job stays, and who may work in it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Final

from tasks.workspace import held, remove_job, stage_workspace, steps_folder, sweep

JOB: Final = "0123456789abcdef" * 2
OTHER: Final = "f" * 32
DAY: Final = 86_400.0


def aged(root: Path, job_id: str, seconds: float) -> None:
    """As if nobody had done anything in the folder for so long."""
    at = time.time() - seconds
    for path in ((root / job_id / "lock"), *steps_folder(root, job_id).iterdir()):
        os.utime(path, (at, at))


def test_a_folder_is_kept_for_as_long_as_it_says(tmp_path: Path) -> None:
    """What its job's environment said counts, not what the one that sweeps says."""
    for job_id, keep in ((JOB, 2 * DAY), (OTHER, 10 * DAY)):
        with held(tmp_path, job_id, keep):
            stage_workspace(tmp_path, job_id, 0).create()
        aged(tmp_path, job_id, 3 * DAY)
    assert [JOB] == sweep(tmp_path, 1.0)
    assert [OTHER] == [path.name for path in tmp_path.iterdir()]


def test_the_end_of_a_job_counts_not_its_beginning(tmp_path: Path) -> None:
    """A job may run for longer than its folder is kept."""
    with held(tmp_path, JOB, DAY):
        aged(tmp_path, JOB, 3 * DAY)
    assert [] == sweep(tmp_path, DAY)


def test_a_folder_in_use_stays(tmp_path: Path) -> None:
    """However old it looks."""
    with held(tmp_path, JOB, DAY):
        aged(tmp_path, JOB, 3 * DAY)
        assert [] == sweep(tmp_path, DAY)


def test_what_an_algorithm_writes_does_not_keep_its_folder(tmp_path: Path) -> None:
    """A file from the future among the outputs is no reason to keep them."""
    with held(tmp_path, JOB, DAY):
        workspace = stage_workspace(tmp_path, JOB, 0)
        workspace.create()
        late = time.time() + 1000 * DAY
        (workspace.outputs / "late").touch()
        os.utime(workspace.outputs / "late", (late, late))
    aged(tmp_path, JOB, 2 * DAY)
    assert [JOB] == sweep(tmp_path, DAY)


def test_of_a_killed_job_the_last_step_counts(tmp_path: Path) -> None:
    """A process that is killed marks no end, lets its folder go, and has it kept from its last finished step on."""
    script = (
        "import os, signal\nfrom pathlib import Path\nfrom tasks.workspace import held\n"
        f"with held(Path({str(tmp_path)!r}), {JOB!r}, {DAY}):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=False, cwd=Path(__file__).parents[1])
    (steps_folder(tmp_path, JOB) / "0-run-x").touch()
    aged(tmp_path, JOB, 2 * DAY)
    (steps_folder(tmp_path, JOB) / "0-run-x").touch()
    assert [] == sweep(tmp_path, DAY)
    aged(tmp_path, JOB, 2 * DAY)
    assert [JOB] == sweep(tmp_path, DAY)


def test_a_folder_of_an_earlier_version_is_kept_from_now_on(tmp_path: Path) -> None:
    """It has no lock that would tell its age, and what is no job's is left alone."""
    stage_workspace(tmp_path, JOB, 0).create()
    (tmp_path / "notes").mkdir()
    assert [] == sweep(tmp_path, DAY)
    at = time.time() - 2 * DAY
    os.utime(tmp_path / JOB / "lock", (at, at))
    assert [JOB] == sweep(tmp_path, DAY)
    assert [] == sweep(tmp_path / "nowhere", DAY)
    assert ["notes"] == [path.name for path in tmp_path.iterdir()]


def test_two_processes_never_work_in_one_folder(tmp_path: Path) -> None:
    """The second waits, says so, and goes on when the first is done, also when the folder went with the first."""
    waits, entered = Event(), Event()

    def second() -> bool:
        with held(tmp_path, JOB, DAY, waits=waits.set):
            entered.set()
            return steps_folder(tmp_path, JOB).is_dir()

    with ThreadPoolExecutor(1) as pool:
        with held(tmp_path, JOB, DAY):
            waiting = pool.submit(second)
            assert waits.wait(10)
            assert not entered.wait(0.2)
            remove_job(tmp_path, JOB)
        assert waiting.result(10)


def test_nobody_else_can_look_into_a_folder(tmp_path: Path) -> None:
    """Results of steps lie beside the stages."""
    with held(tmp_path, JOB, DAY):
        for folder in (tmp_path / JOB, steps_folder(tmp_path, JOB)):
            assert 0o700 == folder.stat().st_mode & 0o777
