"""A runner at work: the folders of a job, algorithms given as text, and what a test wants to know of the machine."""

from __future__ import annotations

import os
import random
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent

import psutil
import pytest

from blocks.limits import MIB, Limits
from blocks.pods import KubernetesRunner
from blocks.process import ProcessRunner
from blocks.run_folder import NOBODY
from blocks.runner import Execution, ExitReport, Folders, Image, Runner
from tests.docker_engine import IMAGE
from tests.runner_support import Dropped, reachable_python


@dataclass
class Bench:
    """A job's folder and the runner under test."""

    runner: Runner
    root: Path
    name: str = field(default_factory=lambda: f"test-{uuid.uuid4().hex}")
    image: Image = IMAGE
    """For runners that have any."""

    @property
    def in_container(self) -> bool:
        return not isinstance(self.runner, ProcessRunner | Dropped)

    @property
    def in_pod(self) -> bool:
        return isinstance(self.runner, KubernetesRunner)

    @property
    def slack(self) -> float:
        """Seconds a runner may be late: what a cluster is told it does when it comes to it."""
        return 8.0 if self.in_pod else 0.0

    @property
    def caller_uid(self) -> int:
        return NOBODY if isinstance(self.runner, Dropped) else os.geteuid()

    @property
    def folders(self) -> Folders:
        names = ("inputs", "ddos", "transformations", "outputs", "logs")
        return Folders(**{name: self.root / "data" / name for name in names}, log=self.root / "algorithm.log")

    @property
    def outputs(self) -> Path:
        return self.folders.outputs

    @property
    def log(self) -> str:
        return self.folders.log.read_text()

    def execution(
        self,
        script: str,
        *,
        entrypoint: str = "python3 $ALGO",
        limits: dict[str, float] | None = None,
        variables: dict[str, str] | None = None,
        network: bool = False,
    ) -> Execution:
        (self.folders.transformations / "algorithm").write_text(dedent(script))
        for path in [self.root, *self.root.rglob("*")]:
            os.chown(path, self.caller_uid, -1, follow_symlinks=False)
        usual: dict[str, float] = {"seconds": 20, "memory_bytes": 256 * MIB, "disk_bytes": 64 * MIB}
        return Execution(
            job=f"job-{self.name}",
            name=self.name,
            entrypoint=entrypoint,
            folders=self.folders,
            limits=Limits.model_validate(usual | (limits or {})),
            image=self.image,
            variables=variables or {},
            network=network,
        )

    def python(self, script: str, **limits: float) -> ExitReport:
        return self.runner.run(self.execution(script, limits=limits))

    def sh(self, script: str, *, stop: threading.Event | None = None, **limits: float) -> ExitReport:
        return self.runner.run(self.execution(script, entrypoint="sh $ALGO", limits=limits), stop=stop)


def bench(runner: Runner, root: Path) -> Bench:
    if isinstance(runner, Dropped) and reachable_python() is None:
        pytest.skip("no Python that an unprivileged user can start")
    made = Bench(runner, root)
    for folder in (f for f in vars(made.folders).values() if f != made.folders.log):
        folder.mkdir(parents=True)
    made.folders.log.touch()
    return made


def eventually(true: Callable[[], bool], seconds: float = 5.0) -> bool:
    patience = time.monotonic() + seconds
    while not true():
        if time.monotonic() > patience:
            return False
        time.sleep(0.01)
    return True


def a_long_time() -> str:
    """Seconds, more than a test takes, that no other test sleeps for."""
    return str(random.randrange(10**6, 10**9))


def sleepers(seconds: str) -> list[psutil.Process]:
    """Processes on this machine that sleep for a time no other test chose."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cmdline() == ["sleep", seconds]:
                found.append(process)
    return found
