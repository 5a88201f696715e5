"""
The whole service on one machine: Prefect server on SQLite, a worker, the API. All on loopback, all in one folder.

For several machines each part is started by its own means instead; see docs/deploy.md.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

import httpx
import psutil
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import AwaitingRetry, Cancelled
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from flows.compute import FLOW_NAME
from flows.environments import read_definitions
from flows.prefect_jobs import LIVE
from flows.sealing import create_key_file

ROOT: Final = Path(__file__).resolve().parent.parent
"""Where prefect.yaml is: the checkout this runs from."""

_PREFECT: Final = (sys.executable, "-m", "prefect")

START_DEADLINE: Final = 180.0
"""Seconds a part may take to answer. A first start makes Prefect's database, which takes most of it."""

STOP_DEADLINE: Final = 20.0


class CannotStart(Exception):
    """A part did not come up; the message names it and its log."""


def free_port() -> int:
    """A loopback port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Part:
    """One process of the service. It leads a session of its own: a Ctrl-C in the terminal must reach only us."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        """Ask it to end, then make it; what it started goes with it."""
        try:
            family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            family = []
        self.process.terminate()
        try:
            self.process.wait(STOP_DEADLINE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for process in psutil.wait_procs(family, timeout=1.0)[1]:
            process.kill()


@dataclass
class Service:
    """
    Started on entering, stopped on leaving, jobs in flight handed back to the queue: they go on at the next start.

    Args:
        state: Folder of everything that is kept. One service at a time.
        variables: Further environment variables for every part, for example ``C2D_NETWORKS``.
        definitions: The prefect.yaml to deploy; each of its work pools for processes gets a worker.
        api_port, prefect_port: 0 for any free one.
        say: Told one line per step of the start.
    """

    state: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    definitions: Path = ROOT / "prefect.yaml"
    api_port: int = 0
    prefect_port: int = 0
    say: Callable[[str], None] = lambda line: None
    parts: list[Part] = field(default_factory=list)
    _stack: ExitStack = field(default_factory=ExitStack)

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.api_port}"

    @property
    def prefect_url(self) -> str:
        return f"http://127.0.0.1:{self.prefect_port}"

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def failed_part(self) -> Part | None:
        """A part that ended by itself, if any did."""
        return next((part for part in self.parts if not part.alive), None)

    def _start(self) -> None:
        self.state = self.state.resolve()
        self.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        (self.state / "logs").mkdir(exist_ok=True)
        self._lock()
        create_key_file(self.state / "key")
        self.prefect_port = self.prefect_port or free_port()
        self.api_port = self.api_port or free_port()

        self.say("Prefect server")
        self._launch(
            "prefect-server",
            [
                sys.executable,
                "-m",
                "prefect",
                "server",
                "start",
                "--host",
                "127.0.0.1",
                "--port",
                f"{self.prefect_port}",
            ],
        )
        self._until_healthy(self.parts[-1], f"{self.prefect_url}/api/health")
        self.say("work pool, environment, deployments (prefect deploy --all)")
        self._deploy()
        resumed = self._hand_back()
        if resumed:
            self.say(f"{resumed} job(s) in flight at the last stop go on")
        for pool in sorted({b.work_pool for b in read_definitions(self.definitions) if b.work_pool_type == "process"}):
            self.say(f"worker of work pool {pool}")
            self._launch(
                f"worker-{pool}",
                [*_PREFECT, "worker", "start", "--pool", pool, "--type", "process", "--name", f"{pool}-embedded"],
            )
        self.say("API")
        self._launch(
            "api",
            [sys.executable, "-m", "api.main"],
        )
        self._until_healthy(self.parts[-1], f"{self.api_url}/health")

    def stop(self) -> None:
        """
        End every part, the Prefect server last: it has to hear of the jobs that are handed back. Safe to repeat.
        """
        while len(self.parts) > 1:
            self.parts.pop().stop()
        if self.parts and self.parts[0].alive:
            try:
                self._hand_back()
            except httpx.HTTPError as fault:
                self.say(f"jobs in flight are handed back at the next start ({type(fault).__name__})")
        if self.parts:
            self.parts.pop().stop()
        self._stack.close()

    def environment(self) -> dict[str, str]:
        """The environment variables of every part; also those a `prefect` command needs to speak to this service."""
        return {
            **os.environ,
            "PREFECT_HOME": str(self.state / "prefect"),
            "PREFECT_API_URL": f"{self.prefect_url}/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_UI_API_URL": f"{self.prefect_url}/api",
            "PREFECT_CLI_PROMPT": "false",
            # Stock workers ask every 15 s; on one machine asking often costs next to nothing.
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "DO_NOT_TRACK": "1",
            "C2D_STATE": str(self.state),
            "C2D_DEFINITIONS": str(self.definitions),
            "C2D_KEY_FILE": str(self.state / "key"),
            "C2D_NONCE_DATABASE": f"sqlite+aiosqlite:///{self.state / 'nonces.sqlite'}",
            "C2D_LOCAL_WORKERS": "true",
            "C2D_HOST": "127.0.0.1",
            "C2D_PORT": str(self.api_port),
            **self.variables,
        }

    def _lock(self) -> None:
        file = self._stack.enter_context((self.state / "lock").open("w"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CannotStart(f"another service is running in {self.state}; stop it or name another folder") from None

    def _launch(self, name: str, command: list[str]) -> None:
        log = self.state / "logs" / f"{name}.log"
        output: IO[bytes] = self._stack.enter_context(log.open("ab"))
        # If this process is killed outright, nothing may be left behind: the kernel ends each part for us. And a
        # shell that starts us in the background has SIGINT ignored, which a worker would inherit and never stop.
        guarded = ["env", "--default-signal=INT", "setpriv", "--pdeathsig", "TERM", "--", *command]
        process = subprocess.Popen(
            guarded,
            cwd=ROOT,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.parts.append(Part(name, process, log))

    def _until_healthy(self, part: Part, url: str) -> None:
        def check() -> None:
            if not part.alive:
                raise CannotStart(f"{part.name} ended while it started; its log is {part.log}")
            httpx.get(url, timeout=5.0).raise_for_status()

        try:
            Retrying(
                retry=retry_if_exception_type(httpx.HTTPError),
                stop=stop_after_delay(START_DEADLINE),
                wait=wait_fixed(0.2),
                reraise=True,
            )(check)
        except httpx.HTTPError:
            raise CannotStart(
                f"{part.name} did not answer within {START_DEADLINE:g} s; its log is {part.log}"
            ) from None

    def _deploy(self) -> None:
        log = self.state / "logs" / "deploy.log"
        with log.open("ab") as output:
            done = subprocess.run(
                [*_PREFECT, "--no-prompt", "deploy", "--all", "--prefect-file", str(self.definitions)],
                cwd=ROOT,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=START_DEADLINE,
                check=False,
            )
        if done.returncode:
            raise CannotStart(f"`prefect deploy --all` failed; its log is {log}")

    def _hand_back(self) -> int:
        """
        Put every job that nobody runs any more back into the queue, and end those being stopped.

        Right only while no worker runs: then a run that is said to be in progress is in progress nowhere.
        """
        handed_back = 0
        with (
            temporary_settings({PREFECT_API_URL: f"{self.prefect_url}/api"}),
            get_client(sync_client=True) as client,
        ):
            runs = client.read_flow_runs(
                flow_filter=FlowFilter(name=FlowFilterName(any_=[FLOW_NAME])), flow_run_filter=LIVE
            )
            for run in runs:
                if run.state is None or run.state.is_scheduled():
                    continue
                if run.state.is_cancelling():
                    client.set_flow_run_state(run.id, Cancelled(message="stopped on request"), force=True)
                else:
                    client.set_flow_run_state(run.id, AwaitingRetry(message="the service was shut down"), force=True)
                    handed_back += 1
        return handed_back


def interruptible() -> None:
    """SIGTERM ends this program as Ctrl-C does; so does SIGINT where a shell started it with SIGINT ignored."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def wait_for_interrupt(service: Service) -> Part | None:
    """Block until Ctrl-C or SIGTERM (None), or until a part has ended by itself (that part)."""
    try:
        while (failed := service.failed_part()) is None:
            time.sleep(0.5)
        return failed
    except KeyboardInterrupt:
        return None
