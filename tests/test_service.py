"""
The service as its operator meets it: ``c2d up`` and ``c2d demo`` as processes, signals sent to them and to their parts.

A start takes many seconds, so the life of one state folder is told in chapters. Each chapter is a fixture that starts
the service, does to it what is to be observed, and keeps the observations; the tests look at these.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any, Final, TypeVar
from uuid import uuid4

import httpx
import psutil
import pytest
import yaml

from cli.service import MARK, RESTARTS, CannotStart, Service, free_port
from tests.conftest import DEFINITIONS
from tests.documents import stage
from tests.test_end_to_end import OPERATOR, OUTPUT, Consumer, code, workflow

# A chapter starts the service up to three times and runs as many jobs.
pytestmark = [pytest.mark.worker, pytest.mark.sandbox, pytest.mark.slow, pytest.mark.timeout(600)]

C2D: Final = str(Path(sys.executable).with_name("c2d"))
READY: Final = "Ctrl-C stops the service."
START: Final = 150.0
END: Final = 30.0
"""Seconds after a signal within which everything has to be gone."""

SECRET: Final = "s3cr3t_" + "not_to_be_shown"

COMPLETED: Final = 70
RUNNING: Final = 40
STOPPED: Final = 7
WAITING: Final = 1


T = TypeVar("T")


def until(found: Callable[[], T], seconds: float, what: str) -> T:
    """What *found* answers, once that is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            if answer := found():
                return answer
        time.sleep(0.1)
    pytest.fail(f"not within {seconds:g} s: {what}")


def processes(word: str) -> list[psutil.Process]:
    """Every process that has *word* in its command line or environment, but this one."""
    found = []
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            texts = [Path(f"/proc/{process.pid}/{name}").read_bytes() for name in ("cmdline", "environ")]
            if process.pid != os.getpid() and any(word.encode() in text for text in texts):
                found.append(process)
    return found


@dataclass
class Up:
    """``c2d up`` on *state*, as an operator starts it."""

    state: Path
    process: subprocess.Popen[str] = field(init=False)
    lines: list[str] = field(default_factory=list)

    def start(self) -> None:
        """Returns once it says that it is up."""
        self.process = subprocess.Popen(
            [C2D, "up", "--state", self.state, "--api-port", "0", "--prefect-port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        Thread(target=self._read, daemon=True).start()
        until(lambda: READY in self.text or self.process.poll() is not None, START, "the service is up")
        assert READY in self.text, self.text

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def address(self, what: str) -> str:
        (found,) = re.findall(rf"^{what} +(\S+)$", self.text, re.MULTILINE)
        return str(found)

    def pid_of(self, part: str) -> int:
        """Its process, known by a word of its command line."""
        for child in psutil.Process(self.process.pid).children():
            with suppress(psutil.Error):
                if part in child.cmdline():
                    return child.pid
        return 0

    def end(self, how: signal.Signals) -> Ended:
        """Send it a signal; wait until all of it is gone, or too long."""
        began = time.monotonic()
        self.process.send_signal(how)
        return self.ended(began)

    def ended(self, began: float) -> Ended:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END)
        # By itself everything ends at once; what a killed service leaves needs a moment.
        grace = END if self.process.returncode == -signal.SIGKILL else 0.5
        psutil.wait_procs(processes(str(self.state)), timeout=grace)
        left = [" ".join(process.cmdline()) for process in processes(str(self.state))]
        return Ended(self.process.poll(), time.monotonic() - began, left, self.text)


@dataclass(frozen=True)
class Ended:
    """How a ``c2d up`` has ended."""

    code: int | None
    seconds: float
    left: list[str]
    text: str


@contextmanager
def up(state: Path) -> Iterator[tuple[Up, Consumer]]:
    """A started service and somebody who uses it; whatever comes, nothing of it is left after the block."""
    service = Up(state)
    try:
        service.start()
        with httpx.Client(base_url=service.address("API"), timeout=60.0) as http:
            yield service, Consumer(http)
    finally:
        for process in processes(str(state)):
            with suppress(psutil.NoSuchProcess):
                process.kill()


@dataclass(frozen=True)
class Sleeper:
    """A job whose algorithm sleeps, under a name by which its process is found."""

    seconds: int
    name: str = field(default_factory=lambda: f"sleeper-{uuid4().hex}")

    @property
    def document(self) -> dict[str, Any]:
        container = {"image": "python", "tag": "3.12", "entrypoint": f"python3 $ALGO {self.name}"}
        text = f"import time\ntime.sleep({self.seconds})\n{OUTPUT}"
        return workflow(stages=[stage(algorithm=code(text, container=container))])

    def processes(self) -> list[psutil.Process]:
        return [process for process in processes(self.name) if Path(process.name()).name.startswith("python")]


def submit_running(consumer: Consumer, sleeper: Sleeper) -> str:
    """Submit it, and return its id once its algorithm runs."""
    job_id = consumer.submit(sleeper.document)
    consumer.wait(job_id, lambda job: job["status"] == RUNNING)
    until(sleeper.processes, 10, "the algorithm runs")
    return job_id


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("operator") / "state"


@dataclass(frozen=True)
class Interrupted:
    """A service that was interrupted with one job running, one being stopped and one waiting."""

    pages: Mapping[str, int]
    second: subprocess.CompletedProcess[str]
    ended: Ended
    algorithms_left: int
    ids: Mapping[str, str]


@pytest.fixture(scope="module")
def interrupted(state: Path) -> Interrupted:
    sleepers = {"running": Sleeper(15), "being stopped": Sleeper(50), "waiting": Sleeper(0)}
    with up(state) as (service, consumer):
        addresses = {what: service.address(what) for what in ("API", "documentation", "Prefect UI")}
        pages = {what: httpx.get(url, follow_redirects=True).status_code for what, url in addresses.items()}
        second = subprocess.run([C2D, "up", "--state", state], capture_output=True, text=True, check=False)
        ids = {name: consumer.submit(sleeper.document) for name, sleeper in sleepers.items()}
        for name in ("running", "being stopped"):
            consumer.wait(ids[name], lambda job: job["status"] == RUNNING)
            until(sleepers[name].processes, 10, "the algorithm runs")
        assert WAITING == consumer.job(ids["waiting"])["status"]

        def stop() -> None:
            with suppress(httpx.TransportError):
                httpx.put(f"{addresses['API']}{OPERATOR}/compute", params={"jobId": ids["being stopped"]}, timeout=60)

        stopping = Thread(target=stop)
        stopping.start()
        until(lambda: consumer.job(ids["being stopped"])["stopreq"], 10, "the stop has arrived")
        ended = service.end(signal.SIGINT)
        stopping.join()
        return Interrupted(pages, second, ended, sum(len(s.processes()) for s in sleepers.values()), ids)


@dataclass(frozen=True)
class Resumed:
    """The next start on the same folder, and its end by SIGTERM with a job running."""

    jobs: Mapping[str, dict[str, Any]]
    ended: Ended
    sleeper: Sleeper
    id: str


@pytest.fixture(scope="module")
def resumed(state: Path, interrupted: Interrupted) -> Resumed:
    with up(state) as (service, consumer):
        jobs = {name: consumer.wait(job_id) for name, job_id in interrupted.ids.items()}
        sleeper = Sleeper(10)
        job_id = submit_running(consumer, sleeper)
        return Resumed(jobs, service.end(signal.SIGTERM), sleeper, job_id)


@dataclass(frozen=True)
class Killed:
    """A service that was killed outright with a job running."""

    ended: Ended
    sleeper: Sleeper
    id: str


@pytest.fixture(scope="module")
def killed(state: Path, resumed: Resumed) -> Killed:
    with up(state) as (service, consumer):
        consumer.wait(resumed.id, lambda job: job["status"] == RUNNING)
        until(resumed.sleeper.processes, 10, "the algorithm runs again")
        return Killed(service.end(signal.SIGKILL), resumed.sleeper, resumed.id)


@dataclass(frozen=True)
class Mended:
    """A service whose parts were killed one after the other."""

    job: Mapping[str, Any]
    algorithms_left: int
    """Of the killed worker, when there is the next."""
    job_of_killed_worker: Mapping[str, Any]
    job_of_killed_server: Mapping[str, Any]
    ended: Ended


@pytest.fixture(scope="module")
def mended(state: Path, killed: Killed) -> Mended:
    with up(state) as (service, consumer):

        def kill(part: str) -> int:
            pid = service.pid_of(part)
            os.kill(pid, signal.SIGKILL)
            return pid

        def replaced(part: str, pid: int) -> None:
            until(lambda: service.pid_of(part) not in (0, pid), START, f"{part} is started again")
            # Of an endpoint that asks Prefect: until that answers, the API tells everybody to try again.
            until(lambda: consumer.http.get(f"{OPERATOR}/environments").is_success, START, "all of it answers")

        job = consumer.wait(killed.id)

        replaced("api.main", kill("api.main"))

        sleeper = Sleeper(15)
        job_id = submit_running(consumer, sleeper)
        replaced("worker", kill("worker"))
        # Looked at when the next worker has only just been started: by itself the algorithm would run on.
        algorithms_left = len(sleeper.processes())
        worker_job = consumer.wait(job_id)

        sleeper = Sleeper(20)
        job_id = submit_running(consumer, sleeper)
        replaced("server", kill("server"))
        server_job = consumer.wait(job_id)

        began = time.monotonic()
        kill("api.main")
        return Mended(job, algorithms_left, worker_job, server_job, service.ended(began))


def test_up_prints_addresses_that_answer(interrupted: Interrupted) -> None:
    """The API, its documentation and the Prefect UI are where ``c2d up`` says."""
    assert {"API": 200, "documentation": 200, "Prefect UI": 200} == interrupted.pages


def test_a_second_service_on_the_same_folder_is_refused(interrupted: Interrupted, state: Path) -> None:
    """It says that there is one already and where, and exits 1; the first does not notice."""
    assert 1 == interrupted.second.returncode
    assert f"another service is running in {state}" in interrupted.second.stderr
    assert "Prefect server" not in interrupted.second.stdout


def test_ctrl_c_ends_everything(interrupted: Interrupted) -> None:
    """Exit code 0 within half a minute, jobs in flight or not; no process is left, no algorithm either."""
    ended = interrupted.ended
    assert (0, [], 0) == (ended.code, ended.left, interrupted.algorithms_left), ended.text
    assert ended.seconds < END
    assert "Traceback" not in ended.text


def test_a_job_in_flight_goes_on_at_the_next_start(resumed: Resumed) -> None:
    """It runs to its end, under the same id."""
    assert COMPLETED == resumed.jobs["running"]["status"], resumed.jobs["running"]["reason"]


def test_a_job_that_waited_is_run_after_the_next_start(resumed: Resumed) -> None:
    """It kept its place in the queue."""
    assert COMPLETED == resumed.jobs["waiting"]["status"], resumed.jobs["waiting"]["reason"]


def test_a_job_that_was_being_stopped_stays_stopped(resumed: Resumed) -> None:
    """A service that goes down in the middle of a stop does not bring the job back to life, and says why it ended."""
    job = resumed.jobs["being stopped"]
    assert (STOPPED, 1) == (job["status"], job["stopreq"])
    assert job["reason"]


def test_sigterm_ends_everything_too(resumed: Resumed) -> None:
    """As Ctrl-C does: a service manager gets exit code 0 and nothing is left."""
    assert (0, [], []) == (resumed.ended.code, resumed.ended.left, resumed.sleeper.processes()), resumed.ended.text
    assert resumed.ended.seconds < END


def test_nothing_outlives_a_service_that_is_killed(killed: Killed) -> None:
    """SIGKILL leaves no chance to clean up; parts, the job's process and the algorithm end by themselves."""
    assert (-signal.SIGKILL, [], []) == (killed.ended.code, killed.ended.left, killed.sleeper.processes())
    assert killed.ended.seconds < END


def test_a_job_survives_the_kill_of_its_service(mended: Mended) -> None:
    """At the next start it goes on, the third time in its life, and ends."""
    assert COMPLETED == mended.job["status"], mended.job["reason"]
    # Its algorithm had been fetched the first time, and has never ended before.
    seen = [passed["status"] for passed in mended.job["history"]]
    assert (1, 3) == (seen.count(20), seen.count(RUNNING))


def test_a_killed_worker_is_replaced_and_its_job_runs_once_more_but_never_twice_at_once(mended: Mended) -> None:
    """What the worker left behind is ended before its job goes on: both would write in one folder."""
    job = mended.job_of_killed_worker
    assert (COMPLETED, 0) == (job["status"], mended.algorithms_left), job["reason"]
    assert "worker-c2d once more, since it was ended by SIGKILL" in mended.ended.text


def test_a_killed_api_is_replaced(mended: Mended) -> None:
    """Under the same address, without a word to the jobs."""
    assert "api once more, since it was ended by SIGKILL" in mended.ended.text


def test_a_killed_prefect_server_is_replaced_and_nobody_else_notices(mended: Mended) -> None:
    """The algorithm that ran meanwhile runs on, once, and its job ends."""
    assert [RUNNING] == [n for n in (passed["status"] for passed in mended.job_of_killed_server["history"]) if n == 40]
    assert COMPLETED == mended.job_of_killed_server["status"], mended.job_of_killed_server["reason"]
    assert "prefect-server once more, since it was ended by SIGKILL" in mended.ended.text


def test_parts_that_end_again_and_again_end_the_service(mended: Mended, state: Path) -> None:
    """After three replacements within an hour the next is not made: exit code 1, the part and its log are named."""
    assert (1, []) == (mended.ended.code, mended.ended.left)
    assert f"api was ended by SIGKILL; parts have been started again {RESTARTS} times" in mended.ended.text
    assert f"Its log is {state / 'logs' / 'api.log'}" in mended.ended.text


@pytest.mark.parametrize("user", ["the API", "the Prefect server"])
def test_a_taken_port_is_named_before_anything_is_started(tmp_path: Path, user: str) -> None:
    """The message says which port and for whom; no part has been started then."""
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        ports = {"api_port": port} if user == "the API" else {"prefect_port": port}
        with pytest.raises(CannotStart, match=rf"port {port} cannot be used for {user}: address already in use"):
            Service(state=tmp_path, **ports).__enter__()
    assert [] == list((tmp_path / "logs").iterdir())


def test_a_state_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A file where the folder should be, as any other obstacle, is an answer and not a traceback."""
    (tmp_path / "file").touch()
    with pytest.raises(CannotStart, match=r"state folder .*/file/state cannot be used: Not a directory"):
        Service(state=tmp_path / "file" / "state").__enter__()


def test_what_an_earlier_service_left_is_ended_at_the_start(tmp_path: Path) -> None:
    """A process with the mark of this folder goes, and the port it held is free; one with another mark stays."""
    lock = tmp_path / "lock"
    lock.touch()
    mark = f"{lock.stat().st_dev}:{lock.stat().st_ino}"
    port = free_port()
    program = f"import socket\nlistening = socket.create_server(('127.0.0.1', {port}))\nprint(flush=True)\ninput()"
    with (
        closing(socket.create_server(("127.0.0.1", 0))) as taken,
        marked(mark, program) as left,
        marked(f"{mark}0", "print(flush=True)\ninput()") as other,
    ):
        with pytest.raises(CannotStart, match="for the API"):  # that is, after the port of the Prefect server
            Service(state=tmp_path, prefect_port=port, api_port=taken.getsockname()[1]).__enter__()
        assert (False, True) == (psutil.pid_exists(left.pid), psutil.pid_exists(other.pid))


@contextmanager
def marked(mark: str, program: str) -> Iterator[subprocess.Popen[bytes]]:
    """A running Python program that looks as if a service had started it."""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, MARK: mark},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"definitions: {{environments: [{{offer: {{id: x, max_jobs: {SECRET}}}}}]}}", "offer.max_jobs: Input should"),
        (f"definitions:\n  key: {SECRET}\n bad: [", "line 3: "),
        (f"- {SECRET}", "AttributeError"),
        (None, "No such file or directory"),
    ],
    ids=["wrong type", "no YAML", "no mapping", "missing"],
)
def test_mistakes_in_the_definitions_are_told_before_anything_is_started(
    tmp_path: Path, text: str | None, words: str
) -> None:
    """The message names the file, the place and the mistake, but quotes nothing, which may be a credential."""
    definitions = tmp_path / "prefect.yaml"
    if text is not None:
        definitions.write_text(text)
    with pytest.raises(CannotStart) as told:
        Service(state=tmp_path / "state", definitions=definitions).__enter__()
    assert f"{definitions} cannot be used: " in str(told.value) and words in str(told.value)
    assert SECRET not in str(told.value)
    assert not (tmp_path / "state").exists()


def test_a_part_that_fails_is_shown_by_the_end_of_its_log_without_secrets(tmp_path: Path) -> None:
    """``prefect deploy`` quotes what it cannot import; a credential of the definitions is left out of that."""
    document = yaml.safe_load(DEFINITIONS.read_text())
    for environment in document["definitions"]["environments"]:
        environment["results_options"] = {"secret": SECRET}
    document["deployments"][1]["entrypoint"] = f"flows.compute.{SECRET}"
    definitions = tmp_path / "prefect.yaml"
    definitions.write_text(yaml.safe_dump(document))
    state = tmp_path / "state"
    with pytest.raises(CannotStart) as told:
        Service(state=state, definitions=definitions).__enter__()
    log = state / "logs" / "deploy.log"
    assert f"deploy ended with exit code 1. Its log is {log}" in str(told.value)
    assert SECRET in log.read_text()
    assert "***" in str(told.value) and SECRET not in str(told.value)
    assert [] == processes(str(state))


def demo(state: Path, variables: Mapping[str, str], command: str = "demo") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [C2D, command, "--state", state],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_demo_runs_and_leaves_nothing_running(tmp_path: Path) -> None:
    """Exit code 0, the results are there, every process is gone."""
    done = demo(tmp_path / "demo", {})
    assert 0 == done.returncode, done.stdout + done.stderr
    assert "Job completed" in done.stdout and "stopped everything" in done.stdout
    (chart,) = (tmp_path / "demo" / "results").rglob("chart.svg")
    assert chart.stat().st_size
    assert [] == processes(str(tmp_path))


@pytest.mark.chain
def test_the_demo_on_a_chain_pays_for_the_same_job(tmp_path: Path) -> None:
    """Exit code 0, the same report, every process is gone, the node among them."""
    done = demo(tmp_path / "demo", {}, "demo-chain")
    assert 0 == done.returncode, done.stdout + done.stderr
    assert "paid: 1.2" in done.stdout and "Job completed" in done.stdout
    (report,) = (tmp_path / "demo" / "results").rglob("1/report.md")
    assert "0.39 ppm" in report.read_text(encoding="utf-8")
    assert [] == processes(str(tmp_path))


def test_the_demo_fails_where_no_algorithm_can_be_shut_in(tmp_path: Path) -> None:
    """On a machine without bubblewrap the job is refused: exit code 1, the remedy, and every process is gone."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("env", "setpriv", "prlimit", "sh", "uname", "git"):
        if found := shutil.which(name):
            (programs / name).symlink_to(found)
    done = demo(tmp_path / "demo", {"PATH": str(programs)})
    assert 1 == done.returncode
    assert "apt-get install bubblewrap" in done.stderr
    assert [] == processes(str(tmp_path))
