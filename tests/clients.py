"""
Clients of others, as they are: installed on first use into ``clients/``, by npm and pip as this machine has them set,
each locked with the hashes of what is installed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

CLIENTS: Final = Path(__file__).resolve().parent.parent / "clients"
PYTHON: Final = (3, 11)
"""What ocean.py pins has no wheels for any later one."""

INSTALL_SECONDS: Final = 600.0
SECONDS: Final = 240.0

_VENV: Final = CLIENTS / ".venv"


class CannotInstall(Exception):
    """A client could not be installed; says what was tried."""


def ocean_js(command: str, given: Mapping[str, Any], folder: Path) -> Steps:
    """Run ocean.js. Raises CannotInstall, ClientFailed."""
    return _run([_node(), str(CLIENTS / "ocean_js.js"), command], given, folder)


def squid_js(given: Mapping[str, Any], folder: Path) -> Steps:
    """Run squid-js. Raises CannotInstall, ClientFailed."""
    return _run([_node(), str(CLIENTS / "squid_js.js")], given, folder)


def ocean_py(command: str, given: Mapping[str, Any], folder: Path, **variables: str) -> Steps:
    """Run ocean.py, with environment *variables*. Raises CannotInstall, ClientFailed."""
    return _run([_python(), str(CLIENTS / "ocean_py.py"), command], given, folder, **variables)


@dataclass(frozen=True)
class Steps:
    """What a client has told, step by step."""

    told: tuple[Mapping[str, Any], ...]

    def __getitem__(self, step: str) -> Mapping[str, Any]:
        """The only step of this name."""
        (found,) = self.all(step)
        return found

    def all(self, step: str) -> list[Mapping[str, Any]]:
        return [told for told in self.told if told["step"] == step]


class ClientFailed(AssertionError):
    """A client ended with a fault, or not in time. Its own words are in the message."""


def _run(command: Sequence[str], given: Mapping[str, Any], folder: Path, **variables: str) -> Steps:
    document = folder / f"{Path(command[1]).stem}.json"
    document.write_text(json.dumps(given), encoding="utf-8")
    environment = {**os.environ, "NO_PROXY": "127.0.0.1", **variables}
    try:
        done = subprocess.run(
            [*command, str(document)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as fault:
        told = fault.stdout.decode() if isinstance(fault.stdout, bytes) else fault.stdout
        raise ClientFailed(f"{command[1]} has not ended within {SECONDS:g} s; it told:\n{told}") from None
    if done.returncode:
        raise ClientFailed(f"{command[1]} ended with {done.returncode}\n{done.stdout}\n{done.stderr[-8000:]}")
    return Steps(tuple(json.loads(line) for line in done.stdout.splitlines()))


def _node() -> str:
    """Path of node, once the packages are there."""
    node, npm = (_beside_python(name) for name in ("node", "npm"))
    # No scripts: a package's scripts may do anything, and what they would compile is not needed.
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier"]
    with _installing(CLIENTS / "package-lock.json", CLIENTS / "node_modules" / ".installed") as needed:
        if needed:
            _do(command)
    return node


def _python() -> str:
    """Path of a Python of its own: what ocean.py pins is older than what the service needs."""
    python = str(_VENV / "bin" / "python")
    with _installing(CLIENTS / "requirements.txt", _VENV / ".installed") as needed:
        if needed:
            _do([sys.executable, "-m", "venv", "--clear", str(_VENV)])
            install = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
            _do([*install, "--require-hashes", "--only-binary=:all:", "--requirement", "requirements.txt"])
    return python


@contextmanager
def _installing(locked: Path, stamp: Path) -> Iterator[bool]:
    """Whether *locked* has to be installed; *stamp* is written when that has been done."""
    # The lock file is locked, in every sense: test sessions side by side would take the packages from each other.
    with locked.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        version = f"{hashlib.sha256(file.read()).hexdigest()} {CLIENTS}"
        needed = not (stamp.exists() and stamp.read_text() == version)
        yield needed
        if needed:
            stamp.write_text(version)


def _do(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            command, cwd=CLIENTS, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as fault:
        raise CannotInstall(f"{' '.join(command)}: {type(fault).__name__}") from None
    if done.returncode:
        raise CannotInstall(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-4000:]}")


def _beside_python(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise CannotInstall(f"{name} is not here")
    return found
