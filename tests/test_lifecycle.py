"""
Stop and deletion in every status, over the whole service: what is gone within five seconds, what stays for a restart,
and that of a deleted job nothing is left.

Each status is held by something real: a queue without a worker, a lock, a server that dawdles, an algorithm that does
not want to end, thousands of files, a store that hangs.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID, uuid4

import httpx
import psutil
import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount

from cli.service import Service
from flows.prefect_jobs import DELETING
from tests import documents
from tests.documents import data, stage
from tests.factories import brizo_sign, consumer_signed
from tests.file_server import FileServer
from tests.test_end_to_end import OPERATOR, OUTPUT, Consumer

pytestmark = [pytest.mark.worker, pytest.mark.sandbox, pytest.mark.slow]

PROMISED: Final = 5.0
"""Seconds until a stop is answered: what users are promised, and so measured."""

PROVIDER: Final = "/api/services/compute"
BRIZO: Final = "/api/v1/brizo/services/compute"
DIALECTS: Final = ("operator", "brizo", "provider")

STUBBORN: Final = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sh", "-c", "trap '' TERM; sleep {marker}; :"], start_new_session=True)
print("begun", flush=True)
time.sleep(50)
"""
"""An algorithm that ignores what asks it to end, with a child in a session of its own that does so as well."""

MANY: Final = """
import os
for n in range(9_000):
    open(os.environ["OUTPUTS"] + f"/{n}", "wb").write(bytes([1, n % 256]) * 40)
"""
"""So many files of a kind that nobody knows keep the filter busy for seconds."""


@dataclass(frozen=True)
class Owner:
    """Speaks of its jobs in each dialect. Nobody else in these tests has its key."""

    http: httpx.Client
    key: LocalAccount

    def document(self, *stages: dict[str, Any]) -> dict[str, Any]:
        return documents.workflow(stages=list(stages), agreement=f"0x{uuid4().hex}", owner=self.key.address)

    def call(self, dialect: str, method: str, job_id: str) -> httpx.Response:
        if dialect == "operator":
            return self.http.request(method, f"{OPERATOR}/compute", params={"jobId": job_id})
        if dialect == "brizo":
            signature = brizo_sign(self.key, f"{self.key.address}{job_id}")
            named = {"jobId": job_id, "consumerAddress": self.key.address, "signature": signature}
            return self.http.request(method, BRIZO, params=named)
        return self.http.request(method, PROVIDER, params={**consumer_signed(self.key, job_id), "jobId": job_id})

    def told(self, dialect: str, method: str, job_id: str) -> dict[str, Any]:
        answer = self.call(dialect, method, job_id)
        assert 200 == answer.status_code, answer.text
        found = answer.json()
        (job,) = found if isinstance(found, list) else [found]
        return dict(job)

    def is_unknown(self, dialect: str, method: str, job_id: str) -> bool:
        answer = self.call(dialect, method, job_id)
        return answer.status_code == 404 or (answer.status_code == 200 and answer.json() == [])


@pytest.fixture(scope="module")
def owner(service: Service) -> Iterator[Owner]:
    with httpx.Client(base_url=service.api_url, timeout=60.0) as http:
        yield Owner(http, Account.from_key(os.urandom(32)))


@pytest.fixture(scope="module")
def consumer(owner: Owner) -> Consumer:
    return Consumer(owner.http)


@pytest.fixture(scope="module")
def files() -> Iterator[FileServer]:
    with FileServer() as server:
        yield server


@dataclass(frozen=True)
class House:
    """What a service keeps, looked at from behind."""

    service: Service

    @property
    def work(self) -> Path:
        return self.service.state / "work"

    @property
    def results(self) -> Path:
        return self.service.state / "store" / "results"

    def on_disk(self) -> set[str]:
        """Names, folders among them, of what is kept of jobs."""
        kept = [self.work, self.results, self.service.state / "store" / "documents"]
        return {str(path.relative_to(self.service.state)) for folder in kept for path in folder.rglob("*")}

    def in_prefect(self, *job_ids: str) -> dict[str, list[Any]]:
        """What Prefect's API shows of jobs, those that are no more among them."""
        ids = [str(UUID(job_id)) for job_id in job_ids]
        by_run = {"flow_run_id": {"any_": ids}}
        asked: dict[str, dict[str, Any]] = {
            "flow_runs": {"flow_runs": {"id": {"any_": ids}}},
            "artifacts": {"artifacts": by_run},
            "logs": {"logs": by_run},
            "task_runs": {"task_runs": by_run},
        }
        with httpx.Client(base_url=f"{self.service.prefect_url}/api") as http:
            return {kind: http.post(f"/{kind}/filter", json=filters).json() for kind, filters in asked.items()}

    def nothing_of(self, *job_ids: str) -> bool:
        """Nothing of these jobs is left; Prefect removes log lines a moment later."""
        deadline = time.monotonic() + 10.0
        while any((left := self.in_prefect(*job_ids)).values()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not any(left.values()), left
        return not [path for job_id in job_ids for path in self.service.state.rglob(f"*{job_id}*")]


@pytest.fixture(scope="module")
def house(service: Service) -> House:
    return House(service)


def processes(marker: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if marker in " ".join(process.cmdline()):
                found.append(process)
    return found


# Bringing jobs to a status and holding them there. Each yields the id of a job that is in it.


@dataclass(frozen=True)
class Holding:
    owner: Owner
    consumer: Consumer
    files: FileServer
    house: House
    marker: str
    stack: ExitStack

    def submit(self, **wanted: Any) -> str:
        return self.consumer.submit(self.owner.document(stage(**wanted)))

    def until(self, job_id: str, *statuses: int) -> str:
        job = self.consumer.wait(job_id, lambda job: job["status"] in statuses or job["dateFinished"] is not None)
        assert job["status"] in statuses, job
        return job_id

    def waiting(self) -> str:
        return self.until(self.submit(environment="unattended"), 1)

    def started(self) -> str:
        """Another process works in the folder of the job."""
        job_id = self.submit(rawcode="import time\ntime.sleep(50)")
        folder = self.house.work / job_id
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = self.stack.enter_context((folder / "lock").open("a+"))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return self.until(job_id, 10)

    def configuring(self) -> str:
        url = self.files.add(size=2**30, pause=0.5)
        return self.until(self.submit(input=[data("did:op:aa", url)]), 20)

    def provisioned(self) -> str:
        """Provisioning ends while the call is on its way: no job stays in this status."""
        url = self.files.add(b"x" * 600_000, pause=0.5)
        job_id = self.submit(input=[data("did:op:aa", url)], rawcode=STUBBORN.format(marker=self.marker))
        self.until(job_id, 20, 30, 40)
        time.sleep(0.8)
        return job_id

    def running(self) -> str:
        job_id = self.submit(rawcode=STUBBORN.format(marker=self.marker))
        self.until(job_id, 40)
        log = self.house.work / job_id / "0" / "algorithm.log"
        deadline = time.monotonic() + 30.0
        while not (log.is_file() and log.read_bytes()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert processes(self.marker)
        return job_id

    def filtering(self) -> str:
        return self.until(self.submit(rawcode=MANY), 50)

    def publishing(self) -> str:
        """A named pipe that nobody reads is in the place of a result: whoever opens it hangs, as with a dead server."""
        job_id = self.submit(rawcode=f"import time\ntime.sleep(1)\n{OUTPUT}")
        place = self.house.results / job_id / "files" / "0" / "output" / "x.txt"
        place.parent.mkdir(parents=True)
        os.mkfifo(place)
        return self.until(job_id, 60)


STATUSES: Final[Mapping[str, Callable[[Holding], str]]] = {
    "1 waiting": Holding.waiting,
    "10 started": Holding.started,
    "20 configuring": Holding.configuring,
    "30 provisioned": Holding.provisioned,
    "40 running": Holding.running,
    "50 filtering": Holding.filtering,
    "60 publishing": Holding.publishing,
}


@pytest.fixture
def holding(owner: Owner, consumer: Consumer, files: FileServer, house: House) -> Iterator[Holding]:
    with ExitStack() as stack:
        marker = f"{50_000 + int.from_bytes(os.urandom(2), 'big')}.{os.getpid()}"
        yield Holding(owner, consumer, files, house, marker, stack)


@pytest.mark.parametrize("n, name", list(enumerate(STATUSES)), ids=list(STATUSES))
def test_a_job_is_stopped_and_deleted_in_every_status(holding: Holding, n: int, name: str) -> None:
    """
    Of two jobs in the same status one is stopped, in time, by one dialect, and then deleted; the other is deleted by
    another dialect as it is. The answers are 7 and 8, no process is left, and in the end nothing of them either.
    """
    owner, house = holding.owner, holding.house
    before = house.on_disk()
    dialect, other, third = (DIALECTS[(n + offset) % 3] for offset in range(3))
    with ThreadPoolExecutor(2) as pool:
        to_stop, to_delete = pool.map(lambda _: STATUSES[name](holding), range(2))

    began = time.monotonic()
    stopped = owner.told(dialect, "PUT", to_stop)
    seconds = time.monotonic() - began
    assert (7, "Job stopped") == (stopped["status"], stopped["statusText"])
    assert seconds < PROMISED

    deleted = owner.told(other, "DELETE", to_delete)
    assert (8, "Job deleted successfully") == (deleted["status"], deleted["statusText"])
    assert [] == processes(holding.marker)

    again = owner.told(third, "PUT", to_stop)
    assert (7, stopped["dateFinished"]) == (again["status"], again["dateFinished"])
    assert 8 == owner.told(third, "DELETE", to_stop)["status"]
    for job_id in (to_stop, to_delete):
        assert all(owner.is_unknown(each, method, job_id) for each in DIALECTS for method in ("GET", "PUT", "DELETE"))
    assert house.nothing_of(to_stop, to_delete)
    assert before == house.on_disk()


@pytest.mark.parametrize("seconds", [0.0, 0.2, 0.4, 0.6, 0.8, 1.1])
def test_a_stop_that_comes_while_a_job_is_being_begun(holding: Holding, seconds: float) -> None:
    """Taken by a worker, forked, about to fetch or to run: it is stopped, and nothing of it goes on."""
    job_id = holding.submit(rawcode=STUBBORN.format(marker=holding.marker))
    time.sleep(seconds)
    began = time.monotonic()
    stopped = holding.owner.told(DIALECTS[int(seconds * 10) % 3], "PUT", job_id)
    took = time.monotonic() - began
    assert 7 == stopped["status"], stopped
    assert took < PROMISED
    assert [] == processes(holding.marker)
    assert 8 == holding.owner.told("operator", "DELETE", job_id)["status"]
    assert holding.house.nothing_of(job_id)
    assert [] == processes(holding.marker)


def test_what_a_stop_leaves(holding: Holding) -> None:
    """
    What a stage has published can be had, the log of the one that was stopped is in the job's folder, what was fetched
    is not fetched again. Deleted, links to its results are dead.
    """
    owner, consumer, files = holding.owner, holding.consumer, holding.files
    url = files.add(b"x")
    job_id = consumer.submit(
        owner.document(
            stage(index=0, input=[data("did:op:aa", url)], rawcode=OUTPUT),
            stage(index=1, rawcode="import time\nprint('begun', flush=True)\ntime.sleep(50)"),
        )
    )
    log = holding.house.work / job_id / "1" / "algorithm.log"
    for _ in range(2):
        consumer.wait(job_id, lambda job: log.is_file() and log.read_bytes() == b"begun\n")
        stopped = owner.told("provider", "PUT", job_id)
        assert (7, 1) == (stopped["status"], stopped["stopreq"])
        job = consumer.job(job_id)
        assert (7, 1) == (job["status"], job["stage"])
        assert b"done" == consumer.read(job, "x.txt")
        # A shell may still say that its child was terminated.
        assert log.read_bytes().startswith(b"begun\n")
        assert (log.parents[1] / "0" / "data" / "inputs" / "aa" / "0").read_bytes() == b"x"
        if _ == 0:
            consumer.http.post(f"{OPERATOR}/compute", json={"jobId": job_id}).raise_for_status()
            assert 7 != consumer.job(job_id)["status"]
            consumer.wait(job_id, lambda job: job["status"] == 40)
    assert 1 == files.requests[url]
    links = [result["url"] for result in job["results"]]
    assert 8 == owner.told("brizo", "DELETE", job_id)["status"]
    assert {404} == {consumer.http.get(link).status_code for link in links}
    assert holding.house.nothing_of(job_id)


def test_a_deletion_is_finished_whoever_began_it(holding: Holding) -> None:
    """The API that began it is gone: the job is unknown in every dialect, and whoever asks again has it deleted."""
    owner, house = holding.owner, holding.house
    job_id = holding.submit(environment="unattended")
    with httpx.Client(base_url=f"{house.service.prefect_url}/api") as http:
        run = f"/flow_runs/{UUID(job_id)}"
        http.patch(run, json={"tags": [*http.get(run).json()["tags"], DELETING]}).raise_for_status()
    assert all(owner.is_unknown(each, method, job_id) for each in DIALECTS for method in ("GET", "PUT"))
    assert 8 == owner.told("provider", "DELETE", job_id)["status"]
    assert all(owner.is_unknown(each, "DELETE", job_id) for each in DIALECTS)
    assert house.nothing_of(job_id)
