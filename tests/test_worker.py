"""
The worker of type ``warm-process`` against a real Prefect server, beside a stock process worker.

The server here is a test's own: one test takes it down.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Final, TypeVar
from uuid import UUID

import httpx
import psutil
import pytest
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Cancelling

from cli.service import ROOT, START_DEADLINE, Part, free_port
from flows.reconcile import HANDED_BACK
from flows.worker import WORKER_TYPE, WarmProcessWorker

pytestmark = [pytest.mark.worker, pytest.mark.slow]

QUERY_SECONDS: Final = 1
"""How often the workers ask, where a test does not want them to be woken alone."""

NEVER: Final = 3600

KINDS: Final = {"warm": WORKER_TYPE, "alone": WORKER_TYPE, "stock": "process"}
"""Type of each work pool."""

PROBE: Final = '''
"""Flows that tell what they see. No fork server knows of this module: each run imports it anew."""

import json, os, random, signal, sys, threading, time
from pathlib import Path

BEGAN = time.time()
SEEN = []

from prefect import flow
from prefect.exceptions import TerminationSignal


def tell(into, **more):
    SEEN.append(into)
    told = {
        "began": time.time(),
        "pid": os.getpid(),
        "parent": os.getppid(),
        "session": os.getsid(0),
        "cwd": os.getcwd(),
        "environment": dict(os.environ),
        "seen": SEEN,
        "random": random.random(),
        "argv": sys.argv[1:],
        "files": [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3)],
        "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        **more,
    }
    Path(into + ".part").write_text(json.dumps(told))
    Path(into + ".part").rename(into)


@flow(persist_result=False)
def report(into, seconds=0.0):
    tell(into)
    time.sleep(seconds)
    print("reported by", os.getpid())


@flow(persist_result=False)
def hold(into):
    tell(into)
    try:
        time.sleep(120)
    except TerminationSignal:
        tell(into + ".stopped")
        raise


@flow(persist_result=False)
def stubborn(into):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    tell(into)
    time.sleep(120)


@flow(persist_result=False)
def fail(into):
    raise ValueError("as it was told")
'''


@dataclass
class Site:
    """
    A Prefect server with the flows of ``PROBE`` deployed to three work pools.

    ``warm`` has the worker most tests share, ``alone`` that of a single test, ``stock`` one of Prefect's own kind.
    """

    folder: Path
    port: int
    server: Part | None = None
    told: Iterator[int] = field(default_factory=count)

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    def environment(self, **more: str) -> dict[str, str]:
        return {
            **os.environ,
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_API_URL": self.api,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": str(QUERY_SECONDS),
            "PYTHONPATH": str(self.folder / "code"),
            **more,
        }

    def _launch(self, name: str, *arguments: str, **variables: str) -> Part:
        log = self.folder / f"{name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                # A shell that starts the tests in the background has SIGINT ignored, by which a worker is stopped.
                ["env", "--default-signal=INT", sys.executable, "-m", "prefect", *arguments],
                cwd=ROOT,
                env=self.environment(**variables),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Part(name, process, log)

    def start(self) -> None:
        self.server = self._launch("server", "server", "start", "--host", "127.0.0.1", "--port", str(self.port))

        def healthy() -> bool:
            try:
                return httpx.get(f"{self.api}/health", timeout=5.0).is_success
            except httpx.HTTPError:
                return False

        wait_for(healthy, START_DEADLINE)

    def stop(self) -> None:
        if self.server is not None:
            self.server.stop()

    @contextmanager
    def worker(self, pool: str = "alone", **variables: str) -> Iterator[Part]:
        """A worker that has started; killed with everything it left at the end."""
        kind = KINDS[pool]
        log = self.folder / f"worker-{pool}.log"
        seen = log.read_text().count(" started!") if log.exists() else 0
        part = self._launch(f"worker-{pool}", "worker", "start", "--pool", pool, "--type", kind, **variables)
        try:
            wait_for(lambda: log.read_text().count(" started!") > seen, START_DEADLINE)
            if kind == WORKER_TYPE:
                wait_for(lambda: fork_servers(part), START_DEADLINE)
            yield part
        finally:
            part.stop()

    def into(self) -> Path:
        """A file for a run to tell into."""
        return self.folder / f"told-{next(self.told)}"


Answer = TypeVar("Answer")


def wait_for(condition: Callable[[], Answer | None], seconds: float = 60.0) -> Answer:
    """What *condition* answers once it answers anything true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := condition():
            return answer
        time.sleep(0.02)
    pytest.fail(f"not within {seconds:g} s")


def fork_servers(worker: Part) -> list[psutil.Process]:
    """The fork servers of a worker, ready or not; not the runs forked from them."""
    children = psutil.Process(worker.process.pid).children(recursive=True)
    return [child for child in children if "flows.worker" in " ".join(child.cmdline()) and not is_fork(child)]


def is_fork(process: psutil.Process) -> bool:
    """It has not become another program since it was forked."""
    parent = process.parent()
    return parent is not None and parent.cmdline() == process.cmdline()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    started = Site(tmp_path_factory.mktemp("warm"), free_port())
    (started.folder / "code").mkdir()
    (started.folder / "code" / "probe.py").write_text(PROBE)
    try:
        started.start()
        yield started
    finally:
        started.stop()


@dataclass
class Runs:
    """Submits runs and looks at them."""

    site: Site
    client: SyncPrefectClient
    deployments: dict[str, UUID]

    def submit(self, flow: str, pool: str = "warm", **parameters: Any) -> tuple[UUID, Path]:
        into = self.site.into()
        run = self.client.create_flow_run_from_deployment(
            self.deployments[f"{flow}/{pool}"], parameters={"into": str(into), **parameters}
        )
        return run.id, into

    def read(self, run: UUID) -> FlowRun:
        return self.client.read_flow_run(run)

    def state(self, run: UUID) -> State[Any]:
        state = self.read(run).state
        assert state is not None
        return state

    def end(self, run: UUID, seconds: float = 60.0) -> State[Any]:
        """The state it ended in."""
        return wait_for(lambda: state if (state := self.state(run)).is_final() else None, seconds)

    def give_up(self, submitted: Iterable[tuple[UUID, Path]]) -> None:
        """Say of runs whose worker is gone that they are over."""
        for run, _ in submitted:
            self.client.set_flow_run_state(run, Cancelled(), force=True)

    def told(self, into: Path) -> dict[str, Any]:
        """What a run tells once it has begun."""
        wait_for(into.exists)
        return dict(json.loads(into.read_text()))

    def seconds_to_start(self, pool: str) -> float:
        began = time.time()
        run, into = self.submit("report", pool)
        seconds = float(self.told(into)["began"]) - began
        assert StateType.COMPLETED is self.end(run).type
        return seconds


@pytest.fixture(scope="module")
def runs(site: Site) -> Iterator[Runs]:
    with (
        temporary_settings({PREFECT_API_URL: site.api}),
        get_client(sync_client=True) as client,
    ):
        template = WarmProcessWorker.get_default_base_job_template()
        deployments = {}
        for pool, kind in KINDS.items():
            client.create_work_pool(WorkPoolCreate(name=pool, type=kind, base_job_template=template))
            for flow in ("report", "hold", "stubborn", "fail"):
                deployments[f"{flow}/{pool}"] = client.create_deployment(
                    client.create_flow_from_name(flow),
                    name=pool,
                    work_pool_name=pool,
                    entrypoint=f"probe.{flow}",
                )
        yield Runs(site, client, deployments)


@pytest.fixture(scope="module")
def worker(site: Site, runs: Runs) -> Iterator[Part]:
    """A worker for the tests that do not end theirs."""
    with site.worker("warm") as started:
        yield started


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_run_completes(runs: Runs, worker: Part) -> None:
    """It leads its own session, starts in a folder of its own that goes with it, and its output is in the log."""
    run, into = runs.submit("report")
    state = runs.end(run)
    told = runs.told(into)
    assert StateType.COMPLETED is state.type
    assert told["pid"] == told["session"]
    assert str(run) == told["environment"]["PREFECT__FLOW_RUN_ID"]
    assert [] == told["argv"]
    assert told["interrupt"]
    assert "/dev/null" == told["files"][0]
    wait_for(lambda: not Path(told["cwd"]).exists())
    assert f"reported by {told['pid']}" in worker.log.read_text()
    assert str(told["pid"]) == runs.read(run).infrastructure_pid
    assert told["parent"] in [server.pid for server in fork_servers(worker)]


def test_runs_share_nothing(runs: Runs, worker: Part) -> None:
    """Two at once: another process, folder, environment and randomness each, and no trace of the other."""
    submitted = [runs.submit("report", seconds=8.0) for _ in range(2)]
    first, second = (runs.told(into) for _, into in submitted)
    assert first["pid"] != second["pid"]
    assert first["parent"] == second["parent"]
    assert first["cwd"] != second["cwd"]
    assert first["random"] != second["random"]
    for told, (run, into) in zip((first, second), submitted, strict=True):
        assert [str(into)] == told["seen"]
        assert str(run) == told["environment"]["PREFECT__FLOW_RUN_ID"]
    assert alive(first["pid"]) and alive(second["pid"])
    assert {StateType.COMPLETED} == {runs.end(run).type for run, _ in submitted}


def test_the_fork_server_has_nothing_to_hand_on(runs: Runs, worker: Part) -> None:
    """After many runs: one thread, its socket to the worker, no other; no variable and no module of a run."""
    run, _ = runs.submit("report")
    runs.end(run)
    (server,) = fork_servers(worker)
    wait_for(lambda: not server.children())
    assert 1 == server.num_threads()
    open_files = {str(file.readlink()) for file in Path(f"/proc/{server.pid}/fd").iterdir()}
    sockets = {name for name in open_files if name.startswith("socket:")}
    assert 1 == len(sockets)
    assert {"/dev/null", str(worker.log)} >= open_files - sockets
    assert [] == server.net_connections()
    assert not [name for name in server.environ() if name.startswith("PREFECT__")]
    assert not [mapped.path for mapped in server.memory_maps() if "probe" in mapped.path]


def test_a_variable_of_the_job_is_there_from_the_start(runs: Runs, worker: Part) -> None:
    """A run with an environment of its own is forked from an interpreter that was started with it."""
    into = runs.site.into()
    run = runs.client.create_flow_run_from_deployment(
        runs.deployments["report/warm"],
        parameters={"into": str(into)},
        job_variables={"env": {"PREFECT_LOGGING_LEVEL": "ERROR", "MARKER": "here"}},
    )
    told = runs.told(into)
    assert ("ERROR", "here") == (told["environment"]["PREFECT_LOGGING_LEVEL"], told["environment"]["MARKER"])
    assert StateType.COMPLETED is runs.end(run.id).type
    assert "here" in [server.environ().get("MARKER") for server in fork_servers(worker)]
    _, other = runs.submit("report")
    assert "MARKER" not in runs.told(other)["environment"]


def test_a_failing_flow_fails(runs: Runs, worker: Part) -> None:
    """With its own exception: what the engine has said is not taken for a crash."""
    run, _ = runs.submit("fail")
    state = runs.end(run)
    assert StateType.FAILED is state.type
    assert "as it was told" in (state.message or "")


def test_a_stopped_run_is_told_and_cancelled(runs: Runs, worker: Part) -> None:
    """The flow's own handling of the stop is done before the run is cancelled, and nobody waits long for that."""
    run, into = runs.submit("hold")
    told = runs.told(into)
    runs.client.set_flow_run_state(run, Cancelling())
    stopped = time.time()
    state = runs.end(run)
    assert StateType.CANCELLED is state.type
    assert Path(f"{into}.stopped").exists()
    assert not alive(told["pid"])
    assert 5.0 > time.time() - stopped


def test_a_killed_run_has_crashed(runs: Runs, worker: Part) -> None:
    """A run whose process is killed is reported, with the signal."""
    run, into = runs.submit("hold")
    os.kill(runs.told(into)["pid"], signal.SIGKILL)
    state = runs.end(run)
    assert StateType.CRASHED is state.type
    assert "-9" in (state.message or "")


def test_a_new_fork_server_follows_one_that_died(runs: Runs, worker: Part) -> None:
    """Its runs die with it and are reported; the next run is none the worse."""
    run, into = runs.submit("hold")
    told = runs.told(into)
    os.kill(told["parent"], signal.SIGKILL)
    assert StateType.CRASHED is runs.end(run).type
    assert not alive(told["pid"])
    after, into = runs.submit("report")
    assert StateType.COMPLETED is runs.end(after).type
    assert runs.told(into)["parent"] in [server.pid for server in fork_servers(worker)]


def test_new_code_is_run(runs: Runs, worker: Part) -> None:
    """Once a file of this project is newer than the fork server, runs come from a new one."""
    before = runs.told(runs.submit("report")[1])["parent"]
    (ROOT / "flows" / "worker.py").touch()
    run, into = runs.submit("report")
    assert before != runs.told(into)["parent"]
    assert StateType.COMPLETED is runs.end(run).type


def test_without_a_fork_server_runs_start_cold(site: Site, runs: Runs, worker: Part) -> None:
    """Where none can start, here for an environment that hides our code from it: the worker says so, and runs it."""
    (site.folder / "hides" / "flows").mkdir(parents=True)
    (site.folder / "hides" / "flows" / "__init__.py").touch()
    into = site.into()
    run = runs.client.create_flow_run_from_deployment(
        runs.deployments["report/warm"],
        parameters={"into": str(into)},
        job_variables={"env": {"PYTHONPATH": f"{site.folder / 'hides'}:{site.folder / 'code'}"}},
    )
    assert StateType.COMPLETED is runs.end(run.id).type
    assert worker.process.pid == runs.told(into)["parent"]
    assert 1 == worker.log.read_text().count("no fork server")


def test_it_is_woken(site: Site, runs: Runs) -> None:
    """A worker that hardly ever asks begins a run at once, one that waits for a slot too."""
    pool = WorkPoolUpdate(concurrency_limit=1)
    runs.client.update_work_pool("alone", pool)
    with site.worker(PREFECT_WORKER_QUERY_SECONDS=str(NEVER)):
        submitted = [runs.submit("report", "alone", seconds=1.0) for _ in range(3)]
        assert {StateType.COMPLETED} == {runs.end(run).type for run, _ in submitted}
    runs.client.update_work_pool("alone", WorkPoolUpdate(concurrency_limit=None))


def test_it_starts_sooner_than_a_stock_worker(site: Site, runs: Runs, worker: Part) -> None:
    """Three runs by each on the same server, in turn; machines are shared and noisy, so only the ratio is asserted."""
    seconds: dict[str, list[float]] = {"warm": [], "stock": []}
    with site.worker("stock"):
        for _ in range(3):
            for pool, measured in seconds.items():
                measured.append(runs.seconds_to_start(pool))
    print({pool: [round(second, 2) for second in measured] for pool, measured in seconds.items()})
    assert 0.7 > statistics.median(seconds["warm"]) / statistics.median(seconds["stock"])


def test_a_worker_that_drains_lets_its_runs_end(site: Site, runs: Runs) -> None:
    """SIGTERM: for as long as it is told to wait; what is scheduled meanwhile it does not begin."""
    with site.worker(C2D_DRAIN_SECONDS="60") as worker:
        run, into = runs.submit("report", "alone", seconds=4.0)
        runs.told(into)
        worker.process.send_signal(signal.SIGTERM)
        time.sleep(1.0)
        late = runs.submit("report", "alone")
        worker.process.wait(40.0)
    assert (StateType.COMPLETED, StateType.SCHEDULED) == (runs.state(run).type, runs.state(late[0]).type)
    runs.give_up([late])


def test_ending_the_worker_ends_its_runs(site: Site, runs: Runs) -> None:
    """SIGTERM: the flow is told; one that does not listen is killed. They are no jobs, which would be handed back."""
    with site.worker() as worker:
        submitted = [runs.submit("hold", "alone"), runs.submit("stubborn", "alone")]
        told = [runs.told(into) for _, into in submitted]
        left = fork_servers(worker)
        worker.process.send_signal(signal.SIGTERM)
        worker.process.wait(40.0)
        assert not any(alive(process["pid"]) for process in told)
        wait_for(lambda: not any(alive(server.pid) for server in left), 5.0)
    assert Path(f"{submitted[0][1]}.stopped").exists()
    states = [runs.state(run) for run, _ in submitted]
    assert {(StateType.CRASHED, HANDED_BACK)} == {(state.type, state.message) for state in states}
    runs.give_up(submitted)


def test_killing_the_worker_ends_its_runs(site: Site, runs: Runs) -> None:
    """SIGKILL, which it cannot answer: within seconds nothing of it is left."""
    with site.worker() as worker:
        submitted = [runs.submit("stubborn", "alone")]
        told = runs.told(submitted[0][1])
        left = [told["pid"], *(server.pid for server in fork_servers(worker))]
        worker.process.kill()
        wait_for(lambda: not any(alive(pid) for pid in left), 5.0)
    runs.give_up(submitted)


def test_it_outlives_its_server(site: Site, runs: Runs) -> None:
    """After the server has been away, a worker that hardly ever asks is woken as before."""
    with site.worker(PREFECT_WORKER_QUERY_SECONDS=str(NEVER)):
        before, _ = runs.submit("report", "alone")
        assert StateType.COMPLETED is runs.end(before).type
        site.stop()
        site.start()
        for _ in range(2):
            after, _ = runs.submit("report", "alone")
            assert StateType.COMPLETED is runs.end(after).type
