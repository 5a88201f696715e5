"""
A worker of type ``warm-process``: a Prefect process worker that begins a run within a fraction of a second, and loses
none.

Three things differ from Prefect's own worker of type ``process``.

**It is woken.** It listens to the server's events and asks for work as soon as a run of its pool is scheduled or a
slot is free. Asking every ``PREFECT_WORKER_QUERY_SECONDS`` stays, for events that were lost.

**It forks.** A run is a fork of a process that has imported everything and done nothing else, the fork server::

    worker ──socket, one byte and one end of a socket pair per run──▶ fork server ──fork──▶ run
       └──────────────── socket pair: what to run ▶, ◀ pid, ◀ exit code ────────────────────┘

The fork server is started with the environment of the runs it will fork, so what was read at import (Prefect's
settings and its logging among it) is what the run would have read itself. There is one server for each environment
met. It has one thread and one socket, and learns nothing about a run: what to run is read by the child. Nothing of
one run can reach another, then; each is a fresh fork, leads a session of its own and ends as an interpreter ends.

**It reconciles.** What it runs ends with it, however it ends. So at its start it takes up what it ran before, and from
then on every few seconds what was lost since: see ``flows.reconcile``. A run whose process ended unexpectedly goes back
into the queue as well, and so does what is running when the worker is told to end. That holds for jobs; other runs
crash, as with Prefect's worker.

Everything else is Prefect's: claiming runs, slots, heartbeat, cancellation, hooks. A run that this cannot be done for
is given to Prefect's own code: one whose deployment has pull steps or an entrypoint in a file, one with a command of
its own, and any run while no fork server will start.

Linux only, as the sandbox is.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import logging
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self, cast
from urllib.parse import quote
from uuid import UUID

import anyio
import anyio.abc
import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkQueueFilter,
    WorkQueueFilterId,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import DeploymentResponse, SetStateStatus, WorkerFlowRunResponse
from prefect.events.clients import get_events_subscriber
from prefect.events.filters import EventAnyResourceFilter, EventFilter, EventNameFilter, EventResourceFilter
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import Abort
from prefect.flows import load_flow_from_flow_run
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, get_current_settings, temporary_settings
from prefect.states import AwaitingRetry, Scheduled
from prefect.utilities.engine import propose_state
from prefect.workers.base import BaseWorkerResult
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker, ProcessWorkerResult
from pydantic import PrivateAttr

# isort: split
# What Prefect keeps to itself, all of it here. It is how its own process worker is built, and pyproject.toml
# stays below 3.10. If one of these moves, the import fails, `prefect worker start` finds no such type,
# and tests/test_worker.py says so; work_pool_type `process` is the way back. Used beside these and named in comments:
# BaseWorker._initialize_after_sync, _release_limit_slot, _runs_task_group, _scheduled_task_scopes.
from prefect.runner._flow_run_executor import FlowRunExecutionResult, FlowRunExecutorContext
from prefect.runner._hook_runner import HookRunner
from prefect.runner._process_manager import ProcessHandle
from prefect.runner._starter_engine import EngineCommandStarter
from prefect.runner._state_proposer import StateProposer

if TYPE_CHECKING:
    from prefect.runner._control_channel import ControlChannel

WORKER_TYPE: Final = "warm-process"

START_DEADLINE: Final = 60.0
"""Seconds a fork server may take to import everything."""

RETRY_SECONDS: Final = 60.0
"""After a fork server failed to start, runs are started cold for so long."""

STOP_GRACE: Final = 30.0
"""Seconds between asking a run that is stopped to end and making it; as Prefect's."""

SHUTDOWN_GRACE: Final = 8.0
"""The same when the worker is being ended, which is itself given a deadline by whoever ends it."""

SECOND_LOOK_SECONDS: Final = 0.3
"""After an event that there was no work for."""

RECONCILE_SECONDS: Final = 5.0
"""Between two looks at the runs of the pool."""

UPKEEP_SECONDS: Final = 20.0
"""Between two looks at the folders of jobs, and at what was left half done."""

ROUND_SECONDS: Final = 300.0
"""A round that takes longer is given up; what is lost waits for the next."""

THREADS: Final = 64
"""For what blocks: calls of stores and engines."""

LOOK_SECONDS: Final = 2.0
"""Between two looks of a worker that lets its runs end, whether one is being stopped."""

REPORT_EVERY: Final = 10
"""Looks between two heartbeats of such a worker."""

HAND_BACK_SECONDS: Final = 5.0
"""For telling Prefect of a run that is handed back; if it cannot be told, the next worker of this name finds out."""

EXIT_SECONDS: Final = 5.0
"""For sending what was logged, at the end of a worker."""

SERVERS: Final = 4
"""Environments that a fork server is kept for; beyond it the one not used for longest goes."""

_PER_RUN: Final = "PREFECT__"
"""Prefix of the variables that tell a run who it is. Nothing reads them at import."""

PRELOADED: Final = (
    "flows.compute",
    "prefect.flow_engine",
    # Prefect imports these when it first needs them, in every run.
    "encodings.idna",
    "prefect.task_engine",
    "prefect.utilities.visualization",
)
"""What a fork server imports: what a run imports, and nothing that connects, starts a thread or opens a file."""

_PACKAGES: Final = ("flows", "tasks", "blocks")
"""What a fork server has imported of this project."""

_PROGRAM: Final = "from flows.worker import serve; serve()"

_PR_SET_PDEATHSIG: Final = 1

Environment = Mapping[str, str]


class NoForkServer(Exception):
    """A fork server did not start, or is gone; the message says why."""


# ---------------------------------------------------------------------------------------------------- fork server


def serve() -> None:
    """
    Be a fork server. Standard input is the socket to the worker; its end is the end of the server and of every run.

    Returns:
        In a child only, when the run has ended; the interpreter then ends as after ``python -m prefect.engine``.
    """
    # The worker ends us by closing its socket. Whoever signals a whole group means the runs as well, and those
    # are the worker's to end.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for module in PRELOADED:
        importlib.import_module(module)
    if len(list(Path("/proc/self/task").iterdir())) != 1:
        # A lock held by another thread at the time of a fork is held for ever in the child.
        raise SystemExit(f"fork server: an import has started threads: {threading.enumerate()}")
    # Kept out of the collector's way: it would write to, and so copy, every page that parent and child share.
    gc.collect()
    gc.freeze()
    libc = ctypes.CDLL(None, use_errno=True)
    control = socket.socket(fileno=os.dup(0))
    line = _fork_on_demand(control, os.getpid(), libc)
    _become(line)


def _fork_on_demand(control: socket.socket, server: int, libc: ctypes.CDLL) -> socket.socket:
    """Fork once for each byte on *control*. Returns in the children only, with their line to the worker."""
    runs: dict[int, tuple[int, socket.socket]] = {}
    events = select.poll()
    events.register(control, select.POLLIN)
    with contextlib.suppress(BrokenPipeError):  # Given up meanwhile, which is seen below.
        control.send(b"r")
    while True:
        for ready, _ in events.poll():
            if ready != control.fileno():
                pid, line = runs.pop(ready)
                events.unregister(ready)
                os.close(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(OSError):
                    line.send(b"exit %d\n" % code)
                line.close()
                continue
            byte, files, _, _ = socket.recv_fds(control, 1, 1)
            if not byte:
                # The worker is gone. Its runs go with us: see the death signal below.
                raise SystemExit(0)
            line = socket.socket(fileno=files[0])
            line.set_inheritable(False)
            try:
                pid = os.fork()
            except OSError:
                line.close()  # without a word, which tells the worker
                continue
            if pid == 0:
                os.setsid()
                # SIGKILL: the state of the run then stays what it was, so that it can be handed to another worker.
                libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != server:
                    os._exit(1)
                control.close()
                for other, (_, its_line) in runs.items():
                    os.close(other)
                    its_line.close()
                return line
            pidfd = os.pidfd_open(pid)
            runs[pidfd] = (pid, line)
            events.register(pidfd, select.POLLIN)


def _become(line: socket.socket) -> None:
    """Become the run that *line* tells of. This is the only place where a process of ours learns of a run."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with line, line.makefile("r") as told, Path(os.devnull).open("r+b", buffering=0) as nothing:
        os.dup2(nothing.fileno(), 0)
        line.send(b"pid %d\n" % os.getpid())
        request = json.load(told)
    os.chdir(request["cwd"])
    if sys.path[0] == "":
        sys.path[0] = request["cwd"]
    os.environ.clear()
    os.environ.update(request["environment"])
    if not request["stream_output"]:
        os.dup2(0, 1)
        os.dup2(0, 2)
    sys.argv = [""]
    # It is imported already, on purpose; as a program it is run a second time, as with `python -m` as well.
    warnings.filterwarnings("ignore", r"'prefect\.engine' found in sys\.modules", RuntimeWarning)
    runpy.run_module("prefect.engine", run_name="__main__", alter_sys=True)


# --------------------------------------------------------------------------------------------------------- worker


class Request(NamedTuple):
    """What a run is told, as JSON."""

    environment: dict[str, str]
    cwd: str
    stream_output: bool


@dataclass
class ForkedRun:
    """A run's process, in the form Prefect's process handles take: *pid* and *returncode*."""

    pid: int
    reader: asyncio.StreamReader = field(repr=False)
    writer: asyncio.StreamWriter = field(repr=False)
    returncode: int | None = None
    ended: anyio.Event = field(default_factory=anyio.Event, repr=False)

    async def follow(self) -> None:
        """Wait for the end, and know the exit code then."""
        word = (await self.reader.readline()).split()
        # Without a word the fork server is dead, and so is the run.
        self.returncode = int(word[1]) if word else -signal.SIGKILL
        self.writer.close()
        self.ended.set()

    def signal_all(self, number: signal.Signals) -> None:
        """Signal the run and what it started in its own session."""
        if self.returncode is None:
            os.killpg(self.pid, number)

    # What follows is Prefect's ProcessTerminationScope.

    wait_after_graceful_kill: bool = False
    """Prefect looks every 3 s whether the process is gone; ``Hooks`` hears of it."""

    def is_alive(self, pid: int) -> bool:
        return self.returncode is None

    def graceful_kill(self, pid: int) -> None:
        self.signal_all(signal.SIGTERM)

    def hard_kill(self, pid: int) -> None:
        self.signal_all(signal.SIGKILL)

    def close(self) -> None:
        """Nothing is held that ``follow`` does not close."""


@dataclass
class ForkServer:
    """A fork server as its worker sees it. It ends when *control* is closed, by us or by our death."""

    control: socket.socket
    process: asyncio.subprocess.Process
    stamp: int
    """State of the code when it was started."""
    runs: int = 0
    """Runs of it that have not ended."""
    retired: bool = False

    @classmethod
    async def start(cls, environment: Environment) -> Self:
        """
        Start one for runs in *environment*, which is to hold nothing about a single run.

        Raises:
            NoForkServer: It did not come up; it has written why to the worker's log.
        """
        stamp = code_stamp()
        control, theirs = socket.socketpair()
        control.setblocking(False)
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-c",
                    _PROGRAM,
                    stdin=theirs.fileno(),
                    env=environment,
                    # Nothing is to be imported from where the worker happens to be; a run looks in its own folder.
                    cwd="/",
                    # A Ctrl-C in the terminal is for the worker. Each run leads a session of its own as well.
                    start_new_session=True,
                )
            async with asyncio.timeout(START_DEADLINE):
                ready = await asyncio.get_running_loop().sock_recv(control, 1)
        except (OSError, TimeoutError) as problem:
            control.close()
            raise NoForkServer(str(problem) or "it did not answer in time") from problem
        except BaseException:
            control.close()
            raise
        if not ready:
            control.close()
            raise NoForkServer(f"it ended with code {await process.wait()}")
        return cls(control, process, stamp)

    @property
    def usable(self) -> bool:
        return not self.retired and self.process.returncode is None and self.stamp == code_stamp()

    async def fork(self, request: Request) -> ForkedRun:
        """
        Start a run.

        Raises:
            NoForkServer: It is gone or cannot fork any more, and is retired. Nothing was started.
        """
        ours, theirs = socket.socketpair()
        line: socket.socket | asyncio.StreamWriter = ours
        self.runs += 1
        try:
            with theirs:
                socket.send_fds(self.control, [b"f"], [theirs.fileno()])
            reader, line = await asyncio.open_connection(sock=ours)
            word = (await reader.readline()).split()
            if not word or word[0] != b"pid":
                raise OSError("it ended while it forked")
            line.write(json.dumps(request._asdict()).encode())
            line.write_eof()
        except BaseException as problem:
            line.close()
            self.release()
            if not isinstance(problem, OSError):
                raise
            self.retire()
            raise NoForkServer(str(problem)) from problem
        return ForkedRun(int(word[1]), reader, line)

    def release(self) -> None:
        """A run has ended."""
        self.runs -= 1
        if self.retired and not self.runs:
            self.control.close()

    def retire(self) -> None:
        """Let it end with its last run."""
        self.retired = True
        if not self.runs:
            self.control.close()


class ForkServers:
    """One fork server for each environment met lately, started when first wanted."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        """*warn* is told of every failure to start one, after which it is not tried again for a while."""
        self._warn = warn
        self._servers: dict[frozenset[tuple[str, str]], ForkServer] = {}
        self._failed: dict[frozenset[tuple[str, str]], float] = {}
        self._starting = asyncio.Lock()

    async def ready(self, environment: Environment) -> ForkServer:
        """
        The server for runs in *environment*.

        Raises:
            NoForkServer: None will start.
        """
        shared = {name: value for name, value in environment.items() if not name.startswith(_PER_RUN)}
        key = frozenset(shared.items())
        async with self._starting:
            server = self._servers.pop(key, None)
            if server is not None and not server.usable:
                server.retire()
                server = None
            if server is None:
                server = await self._start(key, shared)
            self._servers[key] = server  # the last one is the one used last
            for oldest in list(self._servers)[:-SERVERS]:
                self._servers.pop(oldest).retire()
        return server

    async def _start(self, key: frozenset[tuple[str, str]], shared: Environment) -> ForkServer:
        now = time.monotonic()
        self._failed = {other: at for other, at in self._failed.items() if now < at + RETRY_SECONDS}
        if key in self._failed:
            raise NoForkServer("it failed to start a moment ago")
        try:
            return await ForkServer.start(shared)
        except NoForkServer as problem:
            self._failed[key] = now
            self._warn(f"no fork server, so runs start a few seconds later than they could: {problem}")
            raise

    async def close(self) -> None:
        """End every server and wait for its end; runs that are left are killed."""
        for server in self._servers.values():
            server.control.close()
        for server in self._servers.values():
            await server.process.wait()
        self._servers.clear()


def code_stamp() -> int:
    """Changes when the code that a fork server has imported changes; some dozens of files, under a millisecond."""
    root = Path(__file__).parents[1]
    return max(file.stat().st_mtime_ns for package in _PACKAGES for file in (root / package).rglob("*.py"))


class WarmJobConfiguration(ProcessJobConfiguration):
    _module: str | None = PrivateAttr(default=None)

    @property
    def module(self) -> str | None:
        """The entrypoint of a deployment whose code is installed here; None for all others."""
        return None if self._command_configured else self._module

    def prepare_for_flow_run(
        self, flow_run: FlowRun, deployment: DeploymentResponse | None = None, *more: Any, **named: Any
    ) -> None:
        super().prepare_for_flow_run(flow_run, deployment, *more, **named)
        entrypoint = deployment.entrypoint if deployment is not None and not deployment.pull_steps else None
        self._module = entrypoint if entrypoint and ":" not in entrypoint else None

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """Where the run is started: the folder that was configured, else one that goes with the run."""
        if self.working_dir:
            yield self.working_dir.resolve()
        else:
            with tempfile.TemporaryDirectory(suffix="prefect") as made:
                yield Path(made).resolve()


class ForkStarter:
    """Starts one run; Prefect's ProcessStarter. What it does otherwise is what Prefect's EngineCommandStarter does."""

    def __init__(
        self,
        servers: ForkServers,
        configuration: WarmJobConfiguration,
        cwd: Path,
        control_channel: ControlChannel,
        *,
        worker: str,
        report: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        self._servers = servers
        self._worker = worker
        self._report = report
        self._configuration = configuration
        self._cwd = cwd
        self._control_channel = control_channel
        self.run: ForkedRun | None = None

    async def start(
        self,
        flow_run: FlowRun,
        task_status: anyio.abc.TaskStatus[ProcessHandle] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        try:
            server, run = await self._fork(flow_run)
        except NoForkServer:
            await self._start_cold(flow_run, task_status)
            return
        except BaseException:
            self._control_channel.unregister(flow_run.id)
            raise
        self.run = run
        try:
            task_status.started(ProcessHandle(cast(Any, run), termination_scope=run))
            await run.follow()
        except BaseException:
            # The worker is being ended.
            with anyio.CancelScope(shield=True):
                await self._drain(flow_run, run)
                await self.relinquish(flow_run, run)
                with anyio.move_on_after(HAND_BACK_SECONDS):
                    await _hand_back(flow_run.id, self._worker)
            raise
        finally:
            server.release()

    async def _fork(self, flow_run: FlowRun) -> tuple[ForkServer, ForkedRun]:
        environment = self._environment(flow_run)
        with contextlib.suppress(RuntimeError):  # No loopback to listen on: a stop is then a mere signal.
            port, token = self._control_channel.register(flow_run.id)
            environment |= {"PREFECT__CONTROL_PORT": str(port), "PREFECT__CONTROL_TOKEN": token}
        request = Request(environment, str(self._cwd), self._configuration.stream_output)
        server = await self._servers.ready(environment)
        try:
            return server, await server.fork(request)
        except NoForkServer:
            # It has died since the last run, as is known only now.
            server = await self._servers.ready(environment)
            return server, await server.fork(request)

    async def ended(self) -> None:
        """Wait for the end of a run that was asked to end; make it end after a while."""
        if self.run is not None:
            with anyio.move_on_after(STOP_GRACE):
                await self.run.ended.wait()
            with contextlib.suppress(ProcessLookupError):
                self.run.signal_all(signal.SIGKILL)
            await self.run.ended.wait()

    async def _drain(self, flow_run: FlowRun, run: ForkedRun) -> None:
        """
        Let the run end by itself, for a while. The worker has to be heard of meanwhile, or others take its runs; and
        it has to hear of stops, since whoever else would is being ended.
        """

        async def attend() -> None:
            for n in count():
                with contextlib.suppress(httpx.HTTPError):
                    if n % REPORT_EVERY == 0:
                        await self._report()
                    async with get_client() as client:
                        state = (await client.read_flow_run(flow_run.id)).state
                    if state is not None and state.is_cancelling():
                        beside.cancel_scope.cancel()
                await anyio.sleep(LOOK_SECONDS)

        with anyio.move_on_after(drain_seconds()):
            async with anyio.create_task_group() as beside:
                beside.start_soon(attend)
                await run.follow()
                beside.cancel_scope.cancel()

    async def relinquish(self, flow_run: FlowRun, run: ForkedRun) -> None:
        """
        End the run, which leaves its state as it is.

        Prefect's worker kills it outright. This lets it stop what it has begun elsewhere, in a container say.
        """
        with contextlib.suppress(ProcessLookupError), anyio.move_on_after(SHUTDOWN_GRACE):
            await self._control_channel.signal(flow_run.id, "relinquish")
            if self._control_channel.get_conclusion(flow_run.id) is not None:
                run.signal_all(signal.SIGTERM)
                await run.follow()
        with contextlib.suppress(ProcessLookupError):
            run.signal_all(signal.SIGKILL)

    def _environment(self, flow_run: FlowRun) -> dict[str, str]:
        environment = {
            **os.environ,
            **get_current_settings().to_environment_variables(exclude_unset=True),
            **self._configuration.env,
            "PREFECT__FLOW_RUN_ID": str(flow_run.id),
            "PREFECT__FLOW_ENTRYPOINT": self._configuration.module,
            # They are run by this worker, once it knows that the run has ended so.
            "PREFECT__ENABLE_CANCELLATION_AND_CRASHED_HOOKS": "false",
        }
        return {name: value for name, value in environment.items() if value is not None}

    async def _start_cold(self, flow_run: FlowRun, task_status: anyio.abc.TaskStatus[ProcessHandle]) -> None:
        starter = EngineCommandStarter(
            cwd=self._cwd,
            env={**self._configuration.env, "PREFECT__FLOW_ENTRYPOINT": self._configuration.module},
            stream_output=self._configuration.stream_output,
            control_channel=self._control_channel,
            isolate_process_group=True,
            env_overrides_settings=True,
        )
        await starter.start(flow_run, task_status=task_status)


def drain_seconds() -> float:
    """How long a worker that is told to end waits for its runs to end by themselves: ``$C2D_DRAIN_SECONDS``, else 0."""
    return float(os.environ.get("C2D_DRAIN_SECONDS") or 0)


async def _hand_back(run_id: UUID, worker: str) -> None:
    """Put a run of a worker that ends back into the queue; one that has ended in time stays as it is."""
    from flows.reconcile import HANDED_BACK, give_up  # noqa: PLC0415 - nothing for a fork server

    with contextlib.suppress(httpx.HTTPError), temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
        async with get_client() as client:
            await give_up(client, run_id, HANDED_BACK, worker=worker)


def _end_soon() -> None:
    """
    End this process, which has been told to, after a while at the latest.

    Nothing is left to do but to send what was logged; Prefect tries that for a minute where the server is away.
    """
    timer = threading.Timer(EXIT_SECONDS, os._exit, (0,))
    timer.daemon = True
    timer.start()


@dataclass(eq=False)
class Attempt:
    """One time that a run is run here, from its claim to the end of its process."""

    run_id: UUID
    context: FlowRunExecutorContext | None = None
    starter: ForkStarter | None = None
    left: bool = False
    """Another worker has the run now."""
    stopping: bool = False
    """It is being stopped, since nobody else did."""


async def _stop(attempt: Attempt, context: FlowRunExecutorContext) -> None:
    try:
        await context._cancellation_manager.cancel_by_id(attempt.run_id)
    except httpx.HTTPError:
        attempt.stopping = False  # the next round tries again


_ATTEMPT: Final[ContextVar[Attempt]] = ContextVar("attempt")


class Proposer(StateProposer):
    """Prefect's, but what it would call crashed is given up: a job goes back into the queue."""

    def __init__(self, client: PrefectClient, worker: str, attempt: Attempt | None) -> None:
        super().__init__(client=client)
        self._api = client
        self._worker = worker
        self._attempt = attempt

    async def propose_crashed(self, flow_run: FlowRun, message: str) -> State[Any] | None:
        from flows.reconcile import give_up  # noqa: PLC0415 - nothing for a fork server
        from flows.states import DIED  # noqa: PLC0415

        if self._attempt is not None and self._attempt.left:
            return None
        try:
            state = await give_up(self._api, flow_run.id, DIED, message, worker=self._worker)
        except httpx.HTTPError:
            # The server is away as well: the run is found to be lost when it is back.
            self._logger.warning("flow run %s: %s; Prefect cannot be told yet", flow_run.id, message)
            return None
        self._logger.warning("flow run %s: %s; now %s", flow_run.id, message, state.name if state else "as it was")
        return state if state is not None and state.is_crashed() else None


class Hooks(HookRunner):
    """
    Prefect's, but a run that is stopped has ended before its hooks are run and it is said to be cancelled.

    Here and not in the termination scope, because this is the first thing after the signal that can wait.
    """

    def __init__(self, starter: ForkStarter) -> None:
        super().__init__(resolve_flow=load_flow_from_flow_run)
        self._starter = starter

    async def run_cancellation_hooks(self, flow_run: FlowRun, state: State[Any]) -> None:
        await self._starter.ended()
        await super().run_cancellation_hooks(flow_run, state)


@contextlib.contextmanager
def own_name(name: str | None, work_pool: str) -> Iterator[str]:
    """
    The name of a worker, while this is entered: *name*, else one that is the same at the next start on this machine.

    Raises:
        RuntimeError: A worker named *name* is there already. They would take each other's runs for lost ones.
    """
    from blocks.environment import state_folder  # noqa: PLC0415 - nothing for a fork server

    folder = state_folder() / "workers"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for n in count(1):
        found = name or f"{socket.gethostname()}-{n}"
        with (folder / f"{quote(work_pool, safe='')}-{quote(found, safe='')}").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if name:
                    raise RuntimeError(
                        f"a worker named {name} serves {work_pool} already; choose another name"
                    ) from None
                continue
            yield found
            return


class WarmProcessWorker(ProcessWorker):
    """See the module."""

    type = WORKER_TYPE
    job_configuration = WarmJobConfiguration

    _display_name = "Warm process"
    _description = (
        "Runs flows that are installed beside the worker, each in a process forked from one that has imported them."
    )
    _documentation_url = ""

    def __init__(self, work_pool_name: str, *, name: str | None = None, **more: Any) -> None:
        # The same at the next start, so that what this one leaves is known for its own.
        self._names = contextlib.ExitStack()
        own = self._names.enter_context(own_name(name, work_pool_name))
        super().__init__(work_pool_name, name=own, **more)
        self._servers = ForkServers(self._logger.warning)
        self._wanted = asyncio.Event()
        self._asking = asyncio.Lock()
        self._listening = False
        self._reachable = True
        self._attempts: list[Attempt] = []

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        self._beside(self._warm_up)
        self._beside(self._ask_when_woken)
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        try:
            await super().__aexit__(*exc_info)
        finally:
            with anyio.CancelScope(shield=True):
                await self._servers.close()
            self._names.close()
            if isinstance(exc_info[1], asyncio.CancelledError):
                _end_soon()

    # ---- woken

    async def get_and_submit_flow_runs(self) -> list[FlowRun]:
        """Ask for work and take it. One at a time: an answer that is old must not be acted upon after a new one."""
        async with self._asking:
            try:
                runs = await super().get_and_submit_flow_runs()
            except httpx.HTTPError as problem:
                if isinstance(problem, httpx.HTTPStatusError) and problem.response.status_code < 500:
                    raise
                # Said once, and never a reason to end, as it is for Prefect's loop after a while: runs are in progress.
                level = logging.WARNING if self._reachable else logging.DEBUG
                self._logger.log(level, "no work can be had until the server answers: %s", problem)
                self._reachable = False
                return []
        self._reachable = True
        return runs

    async def _get_scheduled_flow_runs(self) -> list[WorkerFlowRunResponse]:
        # No retries: we ask again anyway, and who waits for a retry asks late when the server is back. For this alone:
        # what is begun here has these settings from us.
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
            return await super()._get_scheduled_flow_runs()

    def _beside(self, service: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run *service* until the worker is torn down."""

        async def run() -> None:
            with anyio.CancelScope() as scope:
                self._scheduled_task_scopes.add(scope)
                await service()

        assert self._runs_task_group is not None  # noqa: S101  # for mypy: it is there once the worker is set up
        self._runs_task_group.start_soon(run)

    async def _initialize_after_sync(self) -> None:
        # Only now is the pool known, whose events are wanted; later calls are heartbeats.
        await super()._initialize_after_sync()
        if self._has_successfully_synced and not self._listening:
            self._listening = True
            self._beside(self._listen)
            self._beside(self._reconcile)

    def _release_limit_slot(self, flow_run_id: UUID) -> None:
        super()._release_limit_slot(flow_run_id)
        self._wanted.set()

    async def _ask_when_woken(self) -> None:
        while True:
            await self._wanted.wait()
            # Before, not after, asking: what happens meanwhile wants another look. However many there are, one look.
            self._wanted.clear()
            try:
                # Prefect tells of a state before it has committed it, so a look can come too early.
                if not await self.get_and_submit_flow_runs():
                    await anyio.sleep(SECOND_LOOK_SECONDS)
                    await self.get_and_submit_flow_runs()
            except httpx.HTTPError as problem:
                # The loop that asks regularly says so and decides what becomes of it.
                self._logger.debug("asked for work in vain: %s", problem)

    async def _listen(self) -> None:
        """Hear of every run of this pool that becomes due, and of every one that ends and leaves a slot."""
        seconds = 1.0
        while True:
            try:
                async with get_events_subscriber(filter=self._events(), reconnect_on_clean_close=True) as events:
                    # What happened before we listened is told by asking.
                    self._wanted.set()
                    seconds = 1.0
                    async for _ in events:
                        self._wanted.set()
            except Exception as problem:
                # Whatever it is, the worker goes on without: it asks regularly as well.
                level = logging.WARNING if seconds == 1.0 else logging.DEBUG
                self._logger.log(level, "not woken by events until they can be had again: %s", problem)
            await anyio.sleep(seconds)
            seconds = min(2 * seconds, 10.0)

    def _events(self) -> EventFilter:
        # By type of state, not by name of event: that is the name of the state, and our flows choose theirs.
        due = [StateType.SCHEDULED]
        ended = [StateType.COMPLETED, StateType.FAILED, StateType.CRASHED, StateType.CANCELLED]
        return EventFilter(
            event=EventNameFilter(prefix=["prefect.flow-run."]),
            resource=EventResourceFilter(
                labels=ResourceSpecification({"prefect.state-type": [state.value for state in due + ended]})
            ),
            any_resource=EventAnyResourceFilter(id=[f"prefect.work-pool.{self.work_pool.id}"]),
        )

    # ---- reconciling

    async def _reconcile(self) -> None:
        """Look after what was lost, until the worker is torn down."""
        # Nothing for a fork server.
        from flows.compute import key_file  # noqa: PLC0415
        from flows.prefect_jobs import PrefectJobs  # noqa: PLC0415
        from flows.reconcile import Reconciler  # noqa: PLC0415
        from flows.sealing import Seal  # noqa: PLC0415

        # A store or an engine that hangs holds threads; those of the runs must not wait for them.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS))
        reconciler = Reconciler(
            client=self.client,
            jobs=lambda: PrefectJobs(self.client, Seal.from_file(key_file()), local_workers=True),
            work_pool=self._work_pool_name,
            worker=self.name,
            live=lambda: self._submitting_flow_run_ids | {attempt.run_id for attempt in self._attempts},
            stop=self._stop_late,
            leave=self._leave,
            logger=self._logger,
        )
        # Each by itself: runs must not wait for a store that hangs.
        self._beside(lambda: self._again_and_again(reconciler.upkeep, UPKEEP_SECONDS))
        self._beside(lambda: self._again_and_again(reconciler.folders, UPKEEP_SECONDS))

        async def runs() -> None:
            if await reconciler.runs():
                self._wanted.set()

        await self._again_and_again(runs, RECONCILE_SECONDS)

    async def _again_and_again(self, round: Callable[[], Coroutine[Any, Any, Any]], seconds: float) -> None:
        from flows.errors import NotReady  # noqa: PLC0415 - nothing for a fork server

        while True:
            try:
                # No retries: the next round is one. In a task of its own, which nobody else has these settings from.
                with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), anyio.fail_after(ROUND_SECONDS):
                    await round()
            except Exception as problem:
                # Whatever it is, the next round may go well, and nobody else would do this.
                away = isinstance(problem, httpx.HTTPError | NotReady)
                level = logging.DEBUG if away else logging.ERROR
                self._logger.log(level, "what is lost could not be looked after: %r", problem)
            await anyio.sleep(seconds)

    async def _stop_late(self, run_id: UUID) -> None:
        """Stop a run whose stop Prefect's own observer has not been told of. Does not wait for its end."""
        for attempt in self._attempts:
            if attempt.run_id == run_id and attempt.context is not None and not attempt.stopping:
                attempt.stopping = True
                self._beside(partial(_stop, attempt, attempt.context))

    async def _leave(self, run_id: UUID) -> None:
        """End a run of ours that another worker has now."""
        for attempt in self._attempts:
            if attempt.run_id == run_id and attempt.context is not None:
                attempt.left = True
                await attempt.context.process_manager.kill(run_id, force=True)

    async def _propose_pending_state(self, flow_run: FlowRun) -> bool:
        """Prefect's, but the claim says whose it is."""
        from flows.reconcile import claimed  # noqa: PLC0415 - nothing for a fork server

        try:
            state: State[Any] = await propose_state(self.client, claimed(self.name), flow_run_id=flow_run.id)
        except Abort:
            return False  # another worker was first
        except Exception as problem:
            # If it was claimed all the same, it is found to be lost.
            self._logger.warning("flow run %s could not be claimed: %s", flow_run.id, problem)
            return False
        if not state.is_pending():
            return False
        if await self._one_too_many(flow_run):
            await self._put_back(flow_run)
            return False
        return True

    async def _one_too_many(self, flow_run: FlowRun) -> bool:
        """
        Whether a run that was claimed is more than its queue has slots for.

        Prefect's server can give out two runs for one slot: on PostgreSQL it passes over a run that is being claimed at
        this moment, and does not count it yet (prefect 3.8.8, ``FOR UPDATE SKIP LOCKED``). All claims are recorded by
        the time that they are counted here; so of two one at least goes back, and at worst both.
        """
        try:
            queue = await self.client.read_work_queue(flow_run.work_queue_id) if flow_run.work_queue_id else None
            if queue is None or queue.concurrency_limit is None:
                return False
            # What the server counts, and nothing else: else it would give out again what goes back here.
            busy = await self.client.count_flow_runs(
                flow_run_filter=FlowRunFilter(
                    state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING]))
                ),
                work_queue_filter=WorkQueueFilter(id=WorkQueueFilterId(any_=[queue.id])),
            )
        except httpx.HTTPError:
            return False
        return busy > queue.concurrency_limit

    async def _put_back(self, flow_run: FlowRun) -> None:
        """Into the state that a run had before it was claimed. If that fails, it is found to be lost."""
        from flows.reconcile import HANDED_BACK  # noqa: PLC0415 - nothing for a fork server

        if (before := flow_run.state) is None:
            return
        at = before.state_details.scheduled_time
        # The server lets none but a scheduled run become late; and what was lost once is not to count twice.
        queued: State[Any] = (
            AwaitingRetry(message=HANDED_BACK, scheduled_time=at)
            if before.name == "AwaitingRetry"
            else Scheduled(message=before.message, scheduled_time=at)
        )
        with contextlib.suppress(httpx.HTTPError):
            answer = await self.client.set_flow_run_state(flow_run.id, queued)
            if answer.status is not SetStateStatus.ACCEPT:
                self._logger.warning("flow run %s was not put back: %s", flow_run.id, answer.details)

    async def sync_with_backend(self) -> None:
        """Prefect's, but that the server is away is no reason to end: Prefect's loop does, after half an hour."""
        try:
            await super().sync_with_backend()
        except httpx.HTTPError as problem:
            if not self._has_successfully_synced or (
                isinstance(problem, httpx.HTTPStatusError) and problem.response.status_code < 500
            ):
                raise
            self._logger.debug("no heartbeat could be sent: %s", problem)

    async def _submit_run(self, flow_run: FlowRun) -> None:
        try:
            await super()._submit_run(flow_run)
        except httpx.HTTPError as problem:
            # It would end the worker, and with it all that it runs.
            self._logger.warning("flow run %s was not begun, for the server is away: %s", flow_run.id, problem)
            self._submitting_flow_run_ids.discard(flow_run.id)
            self._release_limit_slot(flow_run.id)

    async def _heartbeat(self) -> None:
        """Prefect's own are sent by a loop that has ended when this worker is being ended."""
        await self.client.send_worker_heartbeat(
            self._work_pool_name, self.name, heartbeat_interval_seconds=self.heartbeat_interval_seconds
        )

    async def _submit_run_and_capture_errors(
        self, flow_run: FlowRun, task_status: anyio.abc.TaskStatus[int | Exception] | None = None
    ) -> BaseWorkerResult | Exception:
        attempt = Attempt(flow_run.id)
        _ATTEMPT.set(attempt)  # in a task of its own, which ends with this
        self._attempts.append(attempt)
        try:
            return await super()._submit_run_and_capture_errors(flow_run, task_status)
        finally:
            self._attempts.remove(attempt)

    async def _propose_crashed_state(
        self, flow_run: FlowRun, message: str, client: PrefectClient | None = None
    ) -> None:
        """A run that could not be begun is given up; of one that was begun, its executor has told."""
        attempt = _ATTEMPT.get(None)
        if attempt is None or attempt.context is None:
            await Proposer(client or self.client, self.name, attempt).propose_crashed(flow_run, message)

    # ---- forking

    async def _warm_up(self) -> None:
        """Have a server for the environment that most runs have, before the first of them."""
        with contextlib.suppress(NoForkServer):  # said already
            await self._servers.ready(
                {**os.environ, **get_current_settings().to_environment_variables(exclude_unset=True)}
            )

    async def run(
        self,
        flow_run: FlowRun,
        configuration: ProcessJobConfiguration,
        task_status: anyio.abc.TaskStatus[int] | None = None,
    ) -> ProcessWorkerResult:
        if not isinstance(configuration, WarmJobConfiguration) or configuration.module is None:
            return await super().run(flow_run, configuration, task_status)
        with configuration.folder() as cwd:
            execution = await self._execute(flow_run, configuration, cwd, task_status)
        if execution is None or execution.status_code is None:
            raise RuntimeError("the process of the flow run was not started")
        return ProcessWorkerResult(status_code=execution.status_code, identifier=str(execution.handle.pid))

    async def _execute(
        self,
        flow_run: FlowRun,
        configuration: WarmJobConfiguration,
        cwd: Path,
        task_status: anyio.abc.TaskStatus[int] | None,
    ) -> FlowRunExecutionResult | None:
        result: FlowRunExecutionResult | None = None
        async with FlowRunExecutorContext() as context, anyio.create_task_group() as tasks:
            attempt = _ATTEMPT.get()
            context._state_proposer = Proposer(context.client, self.name, attempt)
            starter = ForkStarter(
                self._servers, configuration, cwd, context.control_channel, worker=self.name, report=self._heartbeat
            )
            attempt.context, attempt.starter = context, starter
            executor = context.create_executor(flow_run, starter, propose_submitting=False, hook_runner=Hooks(starter))

            async def execute(task_status: anyio.abc.TaskStatus[ProcessHandle]) -> None:
                nonlocal result
                result = await executor.submit(task_status)

            handle: ProcessHandle = await tasks.start(execute)
            if task_status is not None and handle.pid is not None:
                task_status.started(handle.pid)
        return result
