"""The contract of a runner: how an algorithm is shut in beside the data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from threading import Event

from blocks.limits import Limits


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

    @abstractmethod
    def run(self, execution: Execution, *, stop: Event | None = None) -> ExitReport:
        """
        Run the algorithm to its end or to a limit, whichever comes first. Blocks. Setting *stop*, from any thread,
        ends the run within a second, as STOPPED.

        Pre-state: every folder exists and belongs to the caller, and their parent keeps other users out;
        ``transformations/algorithm`` is the program;
        no other run has this name.
        Effect: stdout and stderr are in ``folders.log`` as they come, outputs in ``folders.outputs``.
        Post-state: no process of the run is alive, nothing the runner made outside the folders is left, and
        everything in the folders belongs to the caller and is readable by it, whatever the algorithm did to modes.
        ``limits.seconds`` is kept to within one second. If the calling process dies, even by SIGKILL, so does
        the algorithm with all its children.
        Safe to repeat: yes, over emptied outputs and logs; a repeat under the same name after a crash first
        removes what the crashed run left.
        Raises: nothing for what the algorithm does; OSError only if this machine is broken.
        """
