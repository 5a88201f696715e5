"""
A runner in another process: under another user, or one that can be killed.

As a program: ``python -m tests.runner_support`` reads a pickled ``(runner, execution)`` and writes the pickled report;
SIGUSR1 stops the run.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Event

import psutil

from blocks.run_folder import NOBODY
from blocks.runner import Execution, ExitReport, Runner, Waiting, unheard

HERE = Path(__file__).resolve().parent.parent
SETPRIV = ("setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups")


@dataclass(frozen=True)
class Dropped(Runner):
    """*runner* as a service would use it that was started by an unprivileged user."""

    runner: Runner

    def obstacle(self) -> str | None:
        raise NotImplementedError

    def run(self, execution: Execution, *, stop: Event | None = None, on_waiting: Waiting = unheard) -> ExitReport:
        command, environment = caller(self)
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd="/"
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            with process.stdin as pipe:
                pipe.write(pickle.dumps((self.runner, execution)))
            while process.poll() is None:
                if stop is not None and stop.wait(0.05):
                    process.send_signal(signal.SIGUSR1)
                    break
                time.sleep(0.01)
            output = process.stdout.read()
        assert 0 == process.returncode
        report = pickle.loads(output)
        assert isinstance(report, ExitReport)
        return report


def caller(runner: Runner) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a process that runs what it gets on stdin as *runner* would."""
    python: str | None
    drop, python = [], sys.executable
    if isinstance(runner, Dropped):
        drop, python = [*SETPRIV], reachable_python(again=True) or reachable_python()
    assert python is not None
    # Not the venv, which an unprivileged user need not reach, but what is in it.
    packages = Path(psutil.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": f"{HERE}:{packages}", "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/"}
    return [*drop, python, "-m", "tests.runner_support"], environment


@cache
def reachable_python(*, again: bool = False) -> str | None:
    """
    A Python of this version that an unprivileged user can start, with the packages of this one. *again*: also once it
    is that user, and not only on the way there.
    """
    check = "import os, sys, blocks.process; sys.exit(not os.access(sys.executable, os.X_OK))"
    for python in (sys.executable, shutil.which("python3", path="/usr/local/bin:/usr/bin")):
        environment = {"PYTHONPATH": f"{HERE}:{Path(psutil.__file__).parent.parent}", "PATH": os.defpath}
        command = [*SETPRIV, python or "", "-B", "-c", check if again else "import blocks.process"]
        tried = subprocess.run(command, env=environment, cwd="/", capture_output=True, check=False)
        if python and tried.returncode == 0:
            return python
    return None


if __name__ == "__main__":
    stop = Event()
    signal.signal(signal.SIGUSR1, lambda *_: stop.set())
    runner, execution = pickle.load(sys.stdin.buffer)
    sys.stdout.buffer.write(pickle.dumps(runner.run(execution, stop=stop)))
