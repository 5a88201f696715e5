"""
Jobs whose stages are in several environments, over the whole service with a worker for each of two pools: to their
consumers they are jobs like all others.

The environment ``beside`` is in the second pool and keeps folders and results of its own, as on another machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import httpx
import pytest

from cli.service import Service
from flows.environments import COORDINATORS
from flows.stages import job_tag
from tests.documents import data, outputs_of, stage
from tests.file_server import FileServer
from tests.test_end_to_end import OPERATOR, OUTPUT, Consumer, statuses
from tests.test_lifecycle import DIALECTS, PROMISED, House, Owner, consumer, files, owner, processes
from tests.test_retention import remove_expired

pytestmark = [pytest.mark.worker, pytest.mark.sandbox, pytest.mark.slow]

__all__ = ["consumer", "files", "owner"]

HERE: Final = "default"
SINGLE: Final = "withgpu"
"""One job at a time, in the same pool."""
BESIDE: Final = "beside"
"""One job at a time, in the other pool."""

DRAWS: Final = """
import os, random
o = os.environ["OUTPUTS"]
os.makedirs(o + "/deep/er")
open(o + "/deep/er/n.txt", "w").write(str(random.random()))
open(o + "/raw.bin", "wb").write(bytes(range(256)) * 20_000)
open(os.fsencode(o) + b"/\\xff\\xfe odd", "w").write("odd")
os.symlink("/etc/passwd", o + "/passwd")
"""
"""What is put out: a random number, some megabytes, a name in no encoding, and a link."""

READS: Final = """
import hashlib, json, os
folder = os.environ["INPUTS"] + "/drawn"
seen = {
    "n": open(folder + "/deep/er/n.txt").read(),
    "raw": hashlib.sha256(open(folder + "/raw.bin", "rb").read()).hexdigest(),
    "names": sorted(os.fsencode(name).hex() for name in os.listdir(folder)),
    "writable": os.access(folder + "/raw.bin", os.W_OK),
}
json.dump(seen, open(os.environ["OUTPUTS"] + "/seen.json", "w"))
"""

SLEEPS: Final = "import subprocess\nprint('begun', flush=True)\nsubprocess.run(['sleep', '{marker}'])\n"


@dataclass(frozen=True)
class Behind(House):
    """Both houses, and the runs that do the stages of a job."""

    @property
    def roots(self) -> list[Path]:
        return [self.service.state, self.service.state / "beside"]

    def store(self, environment: str) -> Path:
        return self.service.state / ("beside/store" if environment == BESIDE else "store")

    def handed_over(self, job_id: str) -> set[int]:
        """Stages of a job of which something is handed over, in any of the stores."""
        found = [self.store(name) / "handover" / job_id / "manifest" for name in (HERE, BESIDE)]
        return {int(path.stem) for folder in found if folder.is_dir() for path in folder.iterdir()}

    def prefect(self, path: str, **body: Any) -> Any:
        with httpx.Client(base_url=f"{self.service.prefect_url}/api", timeout=30.0) as http:
            return http.post(path, json=body).raise_for_status().json()

    def stage_runs(self, job_id: str) -> dict[int, dict[str, Any]]:
        found = self.prefect("/flow_runs/filter", flow_runs={"tags": {"any_": [job_tag(job_id)]}})
        return {run["parameters"]["stage"]: run for run in found}

    def run_ids(self, job_id: str) -> list[str]:
        """Of the job and of its stages, as their folders are named."""
        return [job_id, *(UUID(run["id"]).hex for run in self.stage_runs(job_id).values())]

    def run(self, run_id: str) -> dict[str, Any]:
        (run,) = self.prefect("/flow_runs/filter", flow_runs={"id": {"any_": [str(UUID(run_id))]}})
        return dict(run)

    def kill(self, run_id: str) -> None:
        """The process that does a run, at once and with all that it has started."""
        pid = int(str(self.run(run_id)["infrastructure_pid"]).rpartition(":")[2])
        os.killpg(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def house(service: Service) -> Behind:
    return Behind(service)


@pytest.fixture
def marker() -> str:
    return f"{50_000 + int.from_bytes(os.urandom(2), 'big')}.{os.getpid()}"


def until(holds: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def restarted(consumer: Consumer, job_id: str, **more: Any) -> None:
    consumer.http.post(f"{OPERATOR}/compute", json={"jobId": job_id, **more}).raise_for_status()


def handing_on(*environments: str, last: str = READS) -> list[dict[str, Any]]:
    """A stage in each of *environments*; each reads what the first has drawn."""
    first, *others = environments
    return [
        stage(0, rawcode=DRAWS, environment=first),
        *(
            stage(n, rawcode=last, environment=name, input=[outputs_of(0, id="drawn")])
            for n, name in enumerate(others, start=1)
        ),
    ]


def test_stages_hand_on_from_one_pool_to_another_and_back(owner: Owner, consumer: Consumer, house: Behind) -> None:
    """
    Three stages, from one environment to another and back: what is handed over is what was put out, links apart; the
    results of all are had by one list, the statuses are those of one job, and in the end nothing but results is left.
    """
    third = stage(
        2,
        environment=HERE,
        input=[outputs_of(1, id="seen"), outputs_of(0, id="drawn")],
        after=[1, 0],
        rawcode=f"{READS}\nprint(open(os.environ['INPUTS'] + '/seen/seen.json').read())",
    )
    job_id = consumer.submit(owner.document(*handing_on(HERE, BESIDE), third))
    job = consumer.wait(job_id)
    assert (70, "Job completed") == (job["status"], job["statusText"]), job["reason"]
    assert [
        "0/deep/er/n.txt",
        "0/raw.bin",
        "1/seen.json",
        "2/seen.json",
        "0/algorithm.log",
        "1/algorithm.log",
        "2/algorithm.log",
    ] == [result["filename"] for result in job["results"]][:7]
    drawn = consumer.read(job, "0/deep/er/n.txt").decode()
    for n in (1, 2):
        seen = json.loads(consumer.read(job, f"{n}/seen.json"))
        assert (drawn, False) == (seen["n"], seen["writable"])
        assert ["64656570", "7261772e62696e", "fffe206f6464"] == seen["names"]
        raw = next(result for result in job["results"] if result["filename"] == "0/raw.bin")
        assert raw["sha256"] == seen["raw"]
    assert json.loads(consumer.read(job, "1/seen.json")) == json.loads(consumer.read(job, "2/algorithm.log"))

    seen_statuses = consumer.wait(job_id, lambda job: statuses(job).count(60) == 3)["history"]
    passed = [(each["status"], each["stage"]) for each in seen_statuses]
    assert [(1, None), (10, None)] == passed[:2] and (70, None) == passed[-1]
    assert [(n, s) for s in (0, 1, 2) for n in (20, 30, 40, 50, 60)] == passed[2:-1]
    listed = owner.http.get(f"{OPERATOR}/compute", params={"owner": job["owner"]}).json()
    assert [job_id] == [each["jobId"] for each in listed]
    assert {0: HERE, 1: BESIDE, 2: HERE} == {n: run["work_queue_name"] for n, run in house.stage_runs(job_id).items()}
    until(lambda: not house.handed_over(job_id))
    folders = [root / "work" / run_id for root in house.roots for run_id in house.run_ids(job_id)]
    until(lambda: not any(folder.exists() for folder in folders))


def test_two_jobs_that_cross(owner: Owner, consumer: Consumer, house: Behind) -> None:
    """
    One goes from A to B and one from B to A, both with one slot: neither holds what the other waits for. The stages of
    each environment are counted there, and the jobs' own runs nowhere.
    """
    there, back = [consumer.submit(owner.document(*handing_on(*way))) for way in ((SINGLE, BESIDE), (BESIDE, SINGLE))]
    for job_id in (there, back):
        job = consumer.wait(job_id)
        assert 70 == job["status"], job["reason"]
        assert consumer.read(job, "0/deep/er/n.txt").decode() == json.loads(consumer.read(job, "1/seen.json"))["n"]
        assert COORDINATORS == house.run(job_id)["work_queue_name"]
    assert {0: SINGLE, 1: BESIDE} == {n: run["work_queue_name"] for n, run in house.stage_runs(there).items()}


def test_independent_stages_run_side_by_side_and_fail_alone(owner: Owner, consumer: Consumer, house: Behind) -> None:
    """
    Two stages that wait for nothing run at the same time in two pools. One fails: those after it are not begun, the
    other goes on and what it publishes stays; the job has the failure of the first.
    """
    job_id = consumer.submit(
        owner.document(
            stage(0, environment=BESIDE, rawcode="import sys, time\ntime.sleep(15)\nsys.exit(7)"),
            stage(1, environment=HERE, after=[], rawcode=f"import time\ntime.sleep(15)\n{OUTPUT}"),
            stage(2, environment=HERE, after=[0], rawcode=OUTPUT),
        )
    )
    until(lambda: ["RUNNING"] * 2 == [run["state_type"] for run in house.stage_runs(job_id).values()])
    job = consumer.wait(job_id)
    assert (41, 0) == (job["status"], job["stage"]), job["reason"]
    assert job["reason"].startswith("stage 0: exit code 7")
    assert b"done" == consumer.read(job, "1/x.txt")
    assert {0, 1} == house.stage_runs(job_id).keys()


def test_a_slot_that_is_taken_and_a_store_that_is_away(
    owner: Owner, consumer: Consumer, house: Behind, marker: str
) -> None:
    """
    A stage that waits for a slot says so, in the status that the job is in by its steps. What it is to read cannot be
    had when it begins: 31, and the sentence says which stage's. Restarted, it goes on with what was put out.
    """
    holder = consumer.submit(owner.document(stage(environment=BESIDE, rawcode=SLEEPS.format(marker=marker))))
    consumer.wait(holder, lambda job: job["status"] == 40)
    job_id = consumer.submit(owner.document(*handing_on(HERE, BESIDE)))
    waits = "stage 1 is waiting for a free slot: 1 of 1 jobs are running in `beside`; this one is next"
    waiting = consumer.wait(job_id, lambda job: waits in job["reason"] or job["dateFinished"] is not None)
    assert (60, 0, waits) == (waiting["status"], waiting["stage"], waiting["reason"])
    listed = {each["id"]: each["currentJobs"] for each in owner.http.get(f"{OPERATOR}/environments").json()}
    assert (0, 1) == (listed[HERE], listed[BESIDE])

    place = house.store(HERE) / "handover"
    place.rename(place.with_name("away"))
    place.touch()
    try:
        owner.told("operator", "PUT", holder)
        failed = consumer.wait(job_id)
    finally:
        place.unlink()
        place.with_name("away").rename(place)
    assert (31, 1, "Data provisioning failed") == (failed["status"], failed["stage"], failed["statusText"])
    assert "stage 1: what stage 0 has put out cannot be had" in failed["reason"]
    assert str(house.service.state) not in failed["reason"]
    drawn = consumer.read(failed, "deep/er/n.txt")
    assert [8] == [owner.told("operator", "DELETE", holder)["status"]]

    restarted(consumer, job_id)
    job = consumer.wait(job_id)
    assert 70 == job["status"], job["reason"]
    assert drawn == consumer.read(job, "0/deep/er/n.txt")


def test_results_that_cannot_be_handed_over(owner: Owner, consumer: Consumer) -> None:
    """A stage whose store takes nothing fails as one whose results cannot be published, and the next is not begun."""
    job = consumer.wait(consumer.submit(owner.document(*handing_on("lost", BESIDE))))
    assert (62, 0) == (job["status"], job["stage"]), job["reason"]
    assert 1 not in {each["stage"] for each in job["history"]}


def test_a_stage_that_waits_for_too_long(owner: Owner, consumer: Consumer) -> None:
    """Its environment lets nobody wait for so long: the job has expired in the queue."""
    job = consumer.wait(consumer.submit(owner.document(*handing_on(HERE, "hopeless"))))
    assert (2, 1) == (job["status"], job["stage"]), job["reason"]
    assert "stage 1: its turn in `hopeless` did not come" in job["reason"]


def test_what_a_job_in_two_environments_leaves_expires_together(
    owner: Owner, consumer: Consumer, house: Behind
) -> None:
    """
    When the first of them lets go of it: from the stores of both, with a document that is too large for Prefect, which
    each stage has read all the same.
    """
    padding = hashlib.shake_256(b"not to be compressed").hexdigest(500_000)
    stages = handing_on("brief", BESIDE)
    stages[1]["algorithm"]["rawcode"] += f"# {padding}\nraise SystemExit(3)\n"
    job_id = consumer.submit(owner.document(*stages))
    job = consumer.wait(job_id)
    assert (41, 1) == (job["status"], job["stage"]), job["reason"]
    assert 10.0 == pytest.approx(float(job["expireTimestamp"]) - float(job["dateFinished"]))
    places = [house.store(name) / part for name in (HERE, BESIDE) for part in ("results", "handover")]
    assert [True, True, True, False] == [(place / job_id).exists() for place in places]
    time.sleep(max(0.0, float(job["expireTimestamp"]) - time.time()) + 0.1)
    assert "" == consumer.job(job_id)["results"]
    run, _ = remove_expired(house.service)
    assert run.state is not None and run.state.is_completed(), run.state
    assert [False] * 4 == [(place / job_id).exists() for place in places]
    refused = consumer.http.post(f"{OPERATOR}/compute", json={"jobId": job_id})
    assert (409, True) == (refused.status_code, "has expired" in refused.json()["error"])


def test_restart_after_a_failure_in_the_second_stage(
    owner: Owner, consumer: Consumer, files: FileServer, house: Behind
) -> None:
    """
    What is done stays done, under the same id, for as long as it is there and asked for: without what the first stage
    has handed over, or with another document, it is done once more, and the second reads what it has put out now.
    """
    url, later = files.add(b"x", name="first"), files.add(status=404, name="later.py")
    stages = handing_on(HERE, BESIDE)
    stages[0]["input"] = [data("did:op:aa", url)]
    stages[1]["algorithm"] = {**stages[1]["algorithm"], "rawcode": None, "url": later}
    document = owner.document(*stages)
    job_id = consumer.submit(document)
    failed = consumer.wait(job_id)
    assert (32, 1) == (failed["status"], failed["stage"]), failed["reason"]
    drawn = consumer.read(failed, "deep/er/n.txt")
    runs = house.stage_runs(job_id)

    restarted(consumer, job_id)
    again = consumer.wait(job_id)
    assert (32, drawn) == (again["status"], consumer.read(again, "deep/er/n.txt"))
    assert (1, 1, 2) == (files.requests[url], *(house.stage_runs(job_id)[n]["run_count"] for n in (0, 1)))

    shutil.rmtree(house.store(HERE) / "handover" / job_id)
    restarted(consumer, job_id)
    third = consumer.wait(job_id)
    assert (32, 2) == (third["status"], files.requests[url])
    again_drawn = consumer.read(third, "deep/er/n.txt")
    assert drawn != again_drawn

    files.add(READS.encode(), name="later.py")
    changed = {**stages[0], "algorithm": {**stages[0]["algorithm"], "rawcode": f"{DRAWS}\nprint('changed')"}}
    restarted(consumer, job_id, workflow={**document, "stages": [changed, stages[1]]})
    job = consumer.wait(job_id)
    assert 70 == job["status"], job["reason"]
    now = consumer.read(job, "0/deep/er/n.txt")
    assert (3, now.decode()) == (files.requests[url], json.loads(consumer.read(job, "1/seen.json"))["n"])
    assert now not in (drawn, again_drawn)
    assert b"changed\n" == consumer.read(job, "0/algorithm.log")
    assert {n: run["id"] for n, run in runs.items()} == {n: run["id"] for n, run in house.stage_runs(job_id).items()}
    seen = [(each["status"], each["stage"]) for each in job["history"]]
    assert 3 == seen.count((32, 1)) and 4 == seen.count((1, None)) and (70, None) == seen[-1]


def test_processes_that_are_killed(owner: Owner, consumer: Consumer, house: Behind, files: FileServer) -> None:
    """
    That of the job's own run while its second stage runs, and then that of the stage: each goes on, nothing is done
    twice that was done, and the job does not notice.
    """
    url = files.add(b"x", name="killed")
    slow = f"import time\nprint('begun', flush=True)\ntime.sleep(10)\n{READS}"
    first, second = handing_on(HERE, BESIDE, last=slow)
    second["input"].append(data("did:op:aa", url))
    job_id = consumer.submit(owner.document(first, second))
    consumer.wait(job_id, lambda job: (job["status"], job["stage"]) == (40, 1))
    stage_run = UUID(house.stage_runs(job_id)[1]["id"]).hex
    house.kill(job_id)
    until(lambda: house.run(job_id)["run_count"] == 2)
    assert (40, 1) == (consumer.job(job_id)["status"], house.run(stage_run)["run_count"])
    house.kill(stage_run)
    # Why it waits is told for as long as it does, which is too short to be seen here for sure.
    until(lambda: house.run(stage_run)["run_count"] == 2)
    assert consumer.job(job_id)["dateFinished"] is None
    job = consumer.wait(job_id)
    assert 70 == job["status"], job["reason"]
    assert (2, 2) == (house.run(job_id)["run_count"], house.run(stage_run)["run_count"])
    assert 1 == files.requests[url]
    assert consumer.read(job, "0/deep/er/n.txt").decode() == json.loads(consumer.read(job, "1/seen.json"))["n"]


@dataclass(frozen=True)
class Held:
    """Jobs of two stages, held in a phase of the second."""

    owner: Owner
    consumer: Consumer
    house: Behind
    marker: str

    def waiting(self) -> str:
        """The second stage waits for a worker that never comes."""
        job_id = self.consumer.submit(self.owner.document(*handing_on(BESIDE, "unattended")))
        self.consumer.wait(job_id, lambda job: "none has ever reported for `unattended`" in job["reason"])
        return job_id

    def running(self) -> str:
        """The second stage runs, in the other pool than the first."""
        job_id = self.consumer.submit(
            self.owner.document(*handing_on(BESIDE, HERE, last=SLEEPS.format(marker=self.marker)))
        )
        self.consumer.wait(job_id, lambda job: (job["status"], job["stage"]) == (40, 1))
        until(lambda: processes(self.marker))
        return job_id

    def interrupted(self) -> str:
        """Nobody runs the job's own run at this moment, and the second stage goes on."""
        job_id = self.running()
        self.house.kill(job_id)
        return job_id


PHASES: Final[Mapping[str, Callable[[Held], str]]] = {
    "waiting": Held.waiting,
    "running": Held.running,
    "interrupted": Held.interrupted,
}


@pytest.mark.parametrize("n, name", list(enumerate(PHASES)), ids=list(PHASES))
def test_a_job_is_stopped_and_deleted_with_its_stages(
    owner: Owner, consumer: Consumer, house: Behind, marker: str, n: int, name: str
) -> None:
    """
    Of two jobs in the same phase one is stopped, in time, and then deleted, the other is deleted as it is; each time
    all its runs end, and nothing is left of it: no process, no folder, nothing in either store, nothing in Prefect.
    """
    held = Held(owner, consumer, house, marker)
    with ThreadPoolExecutor(2) as pool:
        to_stop, to_delete = pool.map(lambda _: PHASES[name](held), range(2))
    of_both = [*house.run_ids(to_stop), *house.run_ids(to_delete)]
    assert 6 == len(of_both)

    began = time.monotonic()
    stopped = owner.told(DIALECTS[n], "PUT", to_stop)
    seconds = time.monotonic() - began
    assert (7, "Job stopped") == (stopped["status"], stopped["statusText"])
    assert seconds < PROMISED
    assert {"COMPLETED", "CANCELLED"} == {run["state_type"] for run in house.stage_runs(to_stop).values()}
    assert "CANCELLED" == house.stage_runs(to_stop)[1]["state_type"]
    assert {0} == house.handed_over(to_stop)

    deleted = owner.told(DIALECTS[(n + 1) % 3], "DELETE", to_delete)
    assert (8, "Job deleted successfully") == (deleted["status"], deleted["statusText"])
    assert [] == processes(marker)
    assert 8 == owner.told("operator", "DELETE", to_stop)["status"]
    for job_id in (to_stop, to_delete):
        assert all(owner.is_unknown(each, method, job_id) for each in DIALECTS for method in ("GET", "PUT", "DELETE"))
        assert {} == house.stage_runs(job_id)
    assert house.nothing_of(*of_both)


def test_a_stopped_job_goes_on(owner: Owner, consumer: Consumer, house: Behind, marker: str) -> None:
    """Stopped in its second stage and restarted: the first stays as it was, and the second is run again."""
    job_id = Held(owner, consumer, house, marker).running()
    stopped = owner.told("provider", "PUT", job_id)
    assert (7, 1) == (stopped["status"], stopped["stopreq"])
    assert (7, 1) == (consumer.job(job_id)["status"], consumer.job(job_id)["stage"])
    restarted(consumer, job_id)
    consumer.wait(job_id, lambda job: (job["status"], job["stage"]) == (40, 1))
    until(lambda: processes(marker))
    assert (1, 2) == tuple(run["run_count"] for _, run in sorted(house.stage_runs(job_id).items()))
    assert 8 == owner.told("brizo", "DELETE", job_id)["status"]
    assert [] == processes(marker)


def test_a_stage_does_not_outlive_its_job(owner: Owner, consumer: Consumer, house: Behind, marker: str) -> None:
    """The job's own run was ended by somebody who did not know of its stages: they end, too."""
    job_id = Held(owner, consumer, house, marker).running()
    state = {"type": "CANCELLED", "name": "Cancelled", "message": "by hand"}
    house.prefect(f"/flow_runs/{UUID(job_id)}/set_state", state=state, force=True)
    until(lambda: house.stage_runs(job_id)[1]["state_type"] == "CANCELLED")
    until(lambda: not processes(marker))
    assert 7 == consumer.job(job_id)["status"]
    assert 8 == owner.told("operator", "DELETE", job_id)["status"]
