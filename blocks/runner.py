"""The contract of a runner: how an algorithm is shut in beside the data."""

from __future__ import annotations

import re
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from threading import Event
from typing import Final

from blocks.limits import GIB, MIB, Limits

TICK: Final = 0.05
"""Seconds between two looks at a run."""
GRACE: Final = 0.5
"""Seconds between SIGTERM and SIGKILL, at the deadline and on a stop."""


class Ending(StrEnum):
    """Why a run is over. Told apart because each needs another remedy from the consumer."""

    EXITED = "exited"
    """The entrypoint ended by itself; the code tells how."""
    TIMED_OUT = "timed out"
    OUT_OF_MEMORY = "out of memory"
    """Also when only a child was ended for it and the entrypoint itself exited with 0."""
    DISK_FULL = "disk full"
    STOPPED = "stopped"
    """On request, after the processes were asked to end."""
    REFUSED = "refused"
    """Nothing was started: this runner cannot shut the algorithm in here."""
    IMAGE_UNAVAILABLE = "image unavailable"
    """Nothing was started: the image is not here and could not be had."""


@dataclass(frozen=True)
class Folders:
    """
    The host side of the tree an algorithm sees under ``/data``. Every path is absolute and exists before a run.

    *log* is the file that receives stdout and stderr; it stands outside every folder the algorithm can write.
    """

    inputs: Path
    ddos: Path
    transformations: Path
    outputs: Path
    logs: Path
    log: Path


@dataclass(frozen=True)
class Image:
    """The container an algorithm asks for; a runner without containers ignores it."""

    name: str
    tag: str = "latest"
    checksum: str | None = None
    """``sha256:…`` of the image's manifest; an image with one is addressed by digest."""

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.checksum}" if self.checksum else f"{self.name}:{self.tag}"


class ImageUnavailable(Exception):
    """Why an image cannot be had, as one sentence for the consumer, without credentials."""


Progress = Callable[[int, int, int, int], None]
"""Told how far a transfer is: bytes done, bytes in all or 0 while unknown, parts done, parts in all."""


def untold(done_bytes: int, total_bytes: int, done: int, total: int) -> None:
    """For whom nobody waits."""


Waiting = Callable[[str], None]
"""Told why a run has not begun yet, each time that changes, and an empty text as soon as it has."""


def unheard(why: str) -> None:
    """For whom nobody waits, either."""


@dataclass(frozen=True)
class Execution:
    """One algorithm to run."""

    name: str
    """Unique among runs in progress; letters, digits, dash. Names what the runner creates outside the folders."""
    entrypoint: str
    """Run by ``sh -c``; ``$ALGO`` in it is the path of the algorithm as the algorithm sees it."""
    folders: Folders
    limits: Limits
    image: Image
    variables: Mapping[str, str] = field(default_factory=dict)
    """Beside these the runner sets VOLUME, INPUTS, OUTPUTS, LOGS and ALGO to the paths as the algorithm sees them."""
    network: bool = False
    job: str = ""
    """Whose run this is; a job may have several, under names of their own."""


@dataclass(frozen=True)
class ExitReport:
    """What became of a run. Never an exception: a failing algorithm is an outcome."""

    ending: Ending
    code: int | None
    """Exit code of the entrypoint, 128 + n when signal n ended it, None where the ending is not EXITED."""
    seconds: float
    detail: str = ""
    """One sentence for the consumer, without anything the algorithm printed."""

    @property
    def ok(self) -> bool:
        return self.ending is Ending.EXITED and self.code == 0


def without_paths(text: str) -> str:
    """The last line of what a tool said, printable, short, and without paths of this machine."""
    line = (text.strip().splitlines() or [""])[-1]
    printable = "".join(c for c in line if c.isprintable())
    return re.sub(r"(?<![\w/])/[^\s:;,'\"]+", "(path)", printable)[:200]


def told_of_limit(ending: Ending, limits: Limits) -> str:
    """A detail of a report, for an ending by a limit or a stop."""
    match ending:
        case Ending.OUT_OF_MEMORY:
            return f"ran out of its {_amount(limits.memory_bytes)} of memory"
        case Ending.DISK_FULL:
            return f"wrote more than its {_amount(limits.disk_bytes)} of disk"
        case Ending.STOPPED:
            return "on request"
        case _:
            return f"ran longer than its {limits.seconds:g} s"


def told_of_code(code: int) -> str:
    """A detail of a report, for an ending by itself."""
    with suppress(ValueError):
        return f"was ended by {signal.Signals(code - 128).name}"
    return ""


def _amount(size: int) -> str:
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (1024, "KiB")):
        if size >= unit:
            return f"{size / unit:.4g} {name}"
    return f"{size} bytes"


class Runner(ABC):
    """
    Runs one algorithm, shut in. Implementations are values: they hold configuration, never a run's state.

    The algorithm sees ``inputs``, ``ddos`` and ``transformations`` read-only, ``outputs`` and ``logs`` writable,
    the log file read-only as ``logs/algorithm.log``, and of the machine no more than it needs to start.
    It has no network unless *network* is true, no capability, no way to gain one, and a cleared environment.
    """

    @abstractmethod
    def obstacle(self) -> str | None:
        """
        Why no algorithm can be shut in on this machine, as one sentence with the remedy; None when all is well.

        Pre-state: any. Effect: none outside the process; may probe the machine by starting a trivial program.
        Safe to repeat: always.
        """

    def fetch_image(self, image: Image, *, on_progress: Progress = untold, stop: Event | None = None) -> Image:
        """
        Get the image here before anything is to run in it. Blocks for as long as that takes; setting *stop* ends it.
        A runner without containers has nothing to do.

        Returns:
            The image with the checksum by which it is known from now on, where it has one; a run of it is a run of
            what was fetched, whatever its tag comes to mean meanwhile.

        Safe to repeat: always.
        Raises: ImageUnavailable.
        """
        return image

    def jobs_left(self) -> frozenset[str]:
        """Jobs of this service of which something is outside their folders, running or not; see ``remove_job``."""
        return frozenset()

    def remove_job(self, job: str) -> None:
        """
        End what runs for a job and remove all that is left of its runs outside the folders.

        For a job nobody works on any more: deleted, or left by a process that died together with whatever was to
        tidy up after it. Safe to repeat: always.
        """
        return

    @abstractmethod
    def run(self, execution: Execution, *, stop: Event | None = None, on_waiting: Waiting = unheard) -> ExitReport:
        """
        Run the algorithm to its end or to a limit, whichever comes first. Blocks. Setting *stop*, from any thread,
        ends the run within a second, as STOPPED. *on_waiting* is told why it cannot begin yet, as one sentence for
        the consumer, where what it needs is in use; it is called by this thread and must not hold it.

        Pre-state: every folder exists and belongs to the caller, and their parent keeps other users out;
        ``transformations/algorithm`` is the program;
        no other run has this name.
        Effect: stdout and stderr are in ``folders.log`` as they come, outputs in ``folders.outputs``.
        Post-state: no process of the run is alive, nothing the runner made outside the folders is left, and
        everything in the folders belongs to the caller and is readable by it, whatever the algorithm did to modes.
        ``limits.seconds`` is kept to within one second. If the calling process dies, even by SIGKILL, so does
        the algorithm with all its children, at once or within two seconds; ``jobs_left`` tells where that can fail.
        A cluster takes some seconds more for each of these, a minute for the last, and up to a quarter of one until it
        has forgotten a run, of which nothing is alive by then.
        Safe to repeat: yes, over emptied outputs and logs; a repeat under the same name after a crash first
        removes what the crashed run left.
        Raises: nothing for what the algorithm does; OSError only if this machine is broken.
        """
