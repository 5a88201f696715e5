"""
The folder of a job: the only place that joins its paths.

``<root>/<job>/``
    ``lock``      held while a process works here; tells when it last did, and for how long the folder is to be kept
    ``steps/``    the results of the steps that have finished, as Prefect persists them; nothing of it is ever mounted

``<root>/<job>/<stage>/``
    ``data/inputs/<id>/<n>``                 what the algorithm reads, one file per URL
    ``data/inputs/algoCustomData.json``      the consumer's parameters
    ``data/ddos/<id>``                       what is known of each data set
    ``data/transformations/algorithm``       the algorithm, executable
    ``data/outputs/``                        what it writes
    ``data/logs/``                           logs it writes itself
    ``algorithm.log``                        its stdout and stderr
    ``configuration.log``                    what was provisioned: sizes and checksums, never a URL
    ``filtering.log``                        the filter's report
    ``publish.log``                          what was published
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from blocks.runner import Folders

_JOB_ID: Final = re.compile(r"[0-9a-f]{32}")
_LOCK: Final = "lock"
_STEPS: Final = "steps"


@dataclass(frozen=True)
class Workspace:
    """One stage's folder."""

    root: Path

    @property
    def inputs(self) -> Path:
        return self.root / "data" / "inputs"

    @property
    def ddos(self) -> Path:
        return self.root / "data" / "ddos"

    @property
    def algorithm(self) -> Path:
        return self.root / "data" / "transformations" / "algorithm"

    @property
    def custom_data(self) -> Path:
        return self.inputs / "algoCustomData.json"

    @property
    def outputs(self) -> Path:
        return self.root / "data" / "outputs"

    @property
    def logs(self) -> Path:
        return self.root / "data" / "logs"

    @property
    def algorithm_log(self) -> Path:
        return self.root / "algorithm.log"

    @property
    def configuration_log(self) -> Path:
        return self.root / "configuration.log"

    @property
    def filtering_log(self) -> Path:
        return self.root / "filtering.log"

    @property
    def publish_log(self) -> Path:
        return self.root / "publish.log"

    @property
    def all_logs(self) -> tuple[Path, ...]:
        return self.logs, self.algorithm_log, self.configuration_log, self.filtering_log, self.publish_log

    @property
    def folders(self) -> Folders:
        """The same tree as a runner wants it."""
        return Folders(
            inputs=self.inputs,
            ddos=self.ddos,
            transformations=self.algorithm.parent,
            outputs=self.outputs,
            logs=self.logs,
            log=self.algorithm_log,
        )

    def create(self) -> None:
        """Make every folder; what exists stays. 0700: a job's data are nobody else's on this machine."""
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        for folder in (self.inputs, self.ddos, self.algorithm.parent, self.outputs, self.logs):
            folder.mkdir(parents=True, exist_ok=True)


def stage_workspace(root: Path, job_id: str, stage: int) -> Workspace:
    """The folder of stage *stage* of a job. Nothing is created."""
    return Workspace(root / job_id / str(stage))


def steps_folder(root: Path, job_id: str) -> Path:
    """Where the results of a job's finished steps are. Nothing is created."""
    return root / job_id / _STEPS


@contextmanager
def held(root: Path, job_id: str, keep_seconds: float, *, waits: Callable[[], None] = lambda: None) -> Iterator[None]:
    """
    Make a job's folder if it is not there and hold it: nobody sweeps it away, and no other process works in it.

    Blocks while another process holds it, which is told by *waits*; a signal's handler that raises ends that. When it
    is let go, by whatever end of this process, the folder is kept for *keep_seconds* more.
    """
    with ExitStack() as stack:
        lock = None
        while lock is None:
            (root / job_id).mkdir(parents=True, exist_ok=True, mode=0o700)
            file = stack.enter_context((root / job_id / _LOCK).open("a+"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waits()
                fcntl.flock(file, fcntl.LOCK_EX)
            lock = file if _is_in_place(root, job_id, file) else None  # swept away between the two
        lock.truncate(0)
        lock.write(str(keep_seconds))
        lock.flush()
        os.utime(lock.fileno())
        (root / job_id / _STEPS).mkdir(exist_ok=True, mode=0o700)
        try:
            yield
        finally:
            # From here on it is of no use to anybody but a restart, which may never come.
            os.utime(lock.fileno())


@contextmanager
def idle(root: Path, job_id: str) -> Iterator[bool]:
    """Whether no process on this machine works on a job; if so, none begins to before the end of the block."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context((root / job_id / _LOCK).open())
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except FileNotFoundError:
            pass  # nobody has ever worked on it here, or its folder has been removed since
        yield True


def in_use(root: Path, job_id: str) -> bool | None:
    """Whether a process that shares this folder works on a job; None if the job has no folder here."""
    try:
        with (root / job_id / _LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return None


def sweep(root: Path, keep_seconds: float) -> list[str]:
    """
    Remove the folders of jobs that nobody works on and that have been kept for as long as they were to be.

    What a folder says of that comes before *keep_seconds*. Of one whose process was killed, age counts from the last
    step that had finished, else from the beginning. What an algorithm can write to plays no part: it could set a
    time far in the future.

    Returns:
        The ids of the jobs.

    Raises:
        subprocess.CalledProcessError: Something could not be removed.
    """
    removed = []
    for folder in _folders(root):
        lock = folder / _LOCK
        with suppress(FileNotFoundError, PermissionError), lock.open("r" if lock.exists() else "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if time.time() - _last_used(folder) >= _kept_for(file, keep_seconds):
                remove_job(root, folder.name)
                removed.append(folder.name)
    return removed


def job_ids(root: Path) -> list[str]:
    """The jobs that have a folder here."""
    return [folder.name for folder in _folders(root)]


def discard(root: Path, job_id: str) -> bool:
    """
    Remove the folder of a job unless a process works in it. Returns whether it was removed.

    Raises:
        subprocess.CalledProcessError: Something could not be removed.
    """
    with suppress(FileNotFoundError), (root / job_id / _LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        remove_job(root, job_id)
        return True
    return False


def _folders(root: Path) -> list[Path]:
    found = sorted(root.iterdir()) if root.is_dir() else []
    return [
        folder for folder in found if _JOB_ID.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink()
    ]


def _is_in_place(root: Path, job_id: str, file: IO[str]) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat((root / job_id / _LOCK).stat(), os.fstat(file.fileno()))
    return False


def _kept_for(file: IO[str], otherwise: float) -> float:
    try:
        return float(file.read())
    except ValueError:  # killed before it was written, or the folder is older than this file
        return otherwise


def _last_used(folder: Path) -> float:
    steps = folder / _STEPS
    found = [folder / _LOCK, *(steps.iterdir() if steps.is_dir() else ())]
    times: list[float] = [path.stat().st_mtime for path in found]
    return max(times)


def remove_job(root: Path, job_id: str) -> None:
    """
    Remove everything of a job on this machine. Safe to repeat.

    Raises:
        subprocess.CalledProcessError: Something could not be removed; its message has no name from inside.
    """
    # Steps first: were this cut off, a step would seem to have finished whose files are gone.
    remove(steps_folder(root, job_id), root / job_id)


def remove(*paths: Path) -> None:
    """
    Remove files and folders, in this order. What is not there is no error.

    By ``rm``, which walks folders nested to any depth; ``shutil.rmtree`` recurses (Python 3.11 and 3.12) and gives
    up on the thousands of levels that an algorithm can make.

    Raises:
        subprocess.CalledProcessError: Something could not be removed; its message has no name from inside.
    """
    if paths:
        subprocess.run(
            ["rm", "-rf", "--", *map(str, paths)], check=True, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
