"""
A runner in another process: under another user, or one that can be killed.

As a program: ``python -m tests.runner_support`` reads a pickled ``(runner, execution)`` and writes the pickled report.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

from blocks.process import NOBODY
from blocks.runner import Execution, ExitReport, Runner

HERE = Path(__file__).resolve().parent.parent
SETPRIV = ("setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups")


@dataclass(frozen=True)
class Dropped(Runner):
    """*runner* as a service would use it that was started by an unprivileged user."""

    runner: Runner

    def obstacle(self) -> str | None:
        raise NotImplementedError

    def run(self, execution: Execution) -> ExitReport:
        command, environment = caller(self)
        ended = subprocess.run(
            command,
            input=pickle.dumps((self.runner, execution)),
            stdout=subprocess.PIPE,
            env=environment,
            cwd="/",
            check=True,
        )
        report = pickle.loads(ended.stdout)
        assert isinstance(report, ExitReport)
        return report


def caller(runner: Runner) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a process that runs what it gets on stdin as *runner* would."""
    drop, python = ([*SETPRIV], reachable_python()) if isinstance(runner, Dropped) else ([], sys.executable)
    assert python is not None
    # Not the venv, which an unprivileged user need not reach, but what is in it.
    packages = Path(psutil.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": f"{HERE}:{packages}", "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/"}
    return [*drop, python, "-m", "tests.runner_support"], environment


@cache
def reachable_python() -> str | None:
    """A Python of this version that an unprivileged user can start, with the packages of this one."""
    for python in (sys.executable, shutil.which("python3", path="/usr/local/bin:/usr/bin")):
        environment = {"PYTHONPATH": f"{HERE}:{Path(psutil.__file__).parent.parent}", "PATH": os.defpath}
        command = [*SETPRIV, python or "", "-B", "-c", "import blocks.process"]
        tried = subprocess.run(command, env=environment, cwd="/", capture_output=True, check=False)
        if python and tried.returncode == 0:
            return python
    return None


if __name__ == "__main__":
    runner, execution = pickle.load(sys.stdin.buffer)
    sys.stdout.buffer.write(pickle.dumps(runner.run(execution)))
