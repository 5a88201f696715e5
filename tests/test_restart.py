"""
Restart of jobs over the whole service: what had finished is not done again, what had not is.

Algorithms have no network, so what was done is told by the file server's count of requests and by a random number.
The jobs are started together, by a fixture, since each takes seconds.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import httpx
import pytest

from cli.service import Service
from tests.documents import data, outputs_of, stage
from tests.file_server import FileServer
from tests.test_end_to_end import OPERATOR, OUTPUT, Consumer, statuses, workflow

pytestmark = [pytest.mark.worker, pytest.mark.sandbox, pytest.mark.slow]

DRAWS: Final = "import os, random\nopen(os.environ['OUTPUTS'] + '/n.txt', 'w').write(str(random.random()))\n"
PASSES_ON: Final = (
    "import os\nn = open(os.environ['INPUTS'] + '/drawn/n.txt').read()\n"
    "open(os.environ['OUTPUTS'] + '/same.txt', 'w').write(n)\n"
)
SLEEPS: Final = "import time\nprint('begun', flush=True)\ntime.sleep(50)\n"
OBEYS: Final = f"import os, sys\nif open(os.environ['INPUTS'] + '/aa/0').read() == 'fail': sys.exit(1)\n{OUTPUT}"


@dataclass(frozen=True)
class Started:
    """Jobs that were submitted, by name: their documents, their ids and the URLs of their inputs."""

    documents: Mapping[str, dict[str, Any]]
    ids: Mapping[str, str]
    urls: Mapping[str, str]


@pytest.fixture(scope="module")
def consumer(service: Service) -> Iterator[Consumer]:
    with httpx.Client(base_url=service.api_url, timeout=60.0) as http:
        yield Consumer(http)


@pytest.fixture(scope="module")
def files() -> Iterator[FileServer]:
    with FileServer() as server:
        yield server


@pytest.fixture(scope="module")
def jobs(consumer: Consumer, files: FileServer) -> Started:
    urls = {name: files.add(body, name=name) for name, body in (("two", b"x"), ("long", b"x"), ("odd", b"fail"))}
    later = files.add(status=404, name="later.py")
    documents = {
        "two stages": workflow(
            stages=[
                stage(index=0, input=[data("did:op:aa", urls["two"])], rawcode=DRAWS),
                stage(index=1, input=[outputs_of(0, id="drawn")], rawcode=None, url=later),
            ]
        ),
        "long": workflow(stages=[stage(input=[data("did:op:aa", urls["long"])], rawcode=SLEEPS)]),
        "odd": workflow(stages=[stage(input=[data("did:op:aa", urls["odd"])], rawcode=OBEYS)]),
    }
    return Started(documents, {name: consumer.submit(document) for name, document in documents.items()}, urls)


def restart(consumer: Consumer, job_id: str, **more: Any) -> httpx.Response:
    return consumer.http.post(f"{OPERATOR}/compute", json={"jobId": job_id, **more})


def restarted(consumer: Consumer, job_id: str, **more: Any) -> dict[str, Any]:
    """The job as the restart answers it."""
    answer = restart(consumer, job_id, **more)
    assert 200 == answer.status_code, answer.text
    (job,) = answer.json()
    assert job_id == job["jobId"]
    return dict(job)


def test_a_stage_that_had_finished_is_not_run_again(
    consumer: Consumer, files: FileServer, jobs: Started, service: Service
) -> None:
    """
    The second of two stages failed. However many restart the job at once, it runs once more under its id, with the
    outputs of the first as they were; afterwards there is nothing left to restart.
    """
    job_id = jobs.ids["two stages"]
    failed = consumer.wait(job_id)
    assert (32, 1) == (failed["status"], failed["stage"])
    drawn = consumer.read(failed, "n.txt")
    files.add(PASSES_ON.encode(), name="later.py")

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: restart(consumer, job_id), range(4)))
    assert [200, 409, 409, 409] == sorted(answer.status_code for answer in answers)
    (queued,) = next(answer for answer in answers if answer.status_code == 200).json()
    assert (None, "", 0) == (queued["dateFinished"], queued["results"], queued["stopreq"])

    job = consumer.wait(job_id)
    assert 70 == job["status"], job["reason"]
    assert 1 == files.requests[jobs.urls["two"]]
    assert drawn == consumer.read(job, "0/n.txt") == consumer.read(job, "1/same.txt")
    names = [result["filename"] for result in job["results"]]
    assert len(names) == len(set(names))
    assert failed["dateCreated"] == job["dateCreated"]
    history = consumer.wait(job_id, lambda job: statuses(job).count(60) == 2)["history"]
    seen = [(passed["status"], passed["stage"]) for passed in history]
    assert [(1, None), (10, None)] == seen[:2] and (70, None) == seen[-1]
    again = seen.index((32, 1)) + 1
    assert [(1, None), (10, None)] == seen[again : again + 2]
    assert 0 not in {of_stage for _, of_stage in seen[again:]}
    assert not (service.state / "work" / job_id).exists()

    refused = restart(consumer, job_id)
    assert 409 == refused.status_code
    assert "Job completed" in refused.json()["error"]


def test_a_stopped_job_goes_on(consumer: Consumer, files: FileServer, jobs: Started) -> None:
    """
    A stopped job is restarted, stopped once more, and restarted with another algorithm: what it had fetched stays,
    the algorithm that was stopped runs again, the new one is run. While it runs it cannot be restarted.
    """
    job_id = jobs.ids["long"]
    for _ in range(2):
        consumer.wait(job_id, lambda job: job["status"] == 40)
        refused = restart(consumer, job_id)
        assert 409 == refused.status_code
        assert "still going" in refused.json()["error"]
        consumer.http.put(f"{OPERATOR}/compute", params={"jobId": job_id}).raise_for_status()
        stopped = consumer.wait(job_id)
        assert (7, 1) == (stopped["status"], stopped["stopreq"])
        if _ == 0:
            assert (1, 0) == (restarted(consumer, job_id)["status"], consumer.job(job_id)["stopreq"])

    document = jobs.documents["long"]
    (only,) = document["stages"]
    changed = {**document, "stages": [{**only, "algorithm": {**only["algorithm"], "rawcode": OUTPUT}}]}
    restarted(consumer, job_id, workflow=changed)
    job = consumer.wait(job_id)
    assert 70 == job["status"], job["reason"]
    assert b"done" == consumer.read(job, "x.txt")
    assert 1 == files.requests[jobs.urls["long"]]
    # The document it has now is the one it was restarted with.
    assert job_id == consumer.submit(changed)
    assert 400 == consumer.http.post(f"{OPERATOR}/init", json={"workflow": document}).status_code


def test_without_its_folder_a_job_begins_anew(
    consumer: Consumer, files: FileServer, jobs: Started, service: Service
) -> None:
    """
    An algorithm that fails runs again at a restart, over the inputs that were fetched. Once the job's folder is gone
    from the machine, its inputs are fetched again.
    """
    job_id, url = jobs.ids["odd"], jobs.urls["odd"]
    failed = consumer.wait(job_id)
    assert (41, "algorithm.log") == (failed["status"], failed["results"][0]["filename"])
    folder = service.state / "work" / job_id
    assert {"inputs", "ddos", "transformations"} == {path.name for path in (folder / "0" / "data").iterdir()}

    restarted(consumer, job_id)
    again = consumer.wait(job_id)
    assert (41, 1) == (again["status"], files.requests[url])
    assert 2 == statuses(consumer.wait(job_id, lambda job: statuses(job).count(60) == 2)).count(40)

    files.add(b"go", name="odd")
    shutil.rmtree(folder)
    restarted(consumer, job_id)
    job = consumer.wait(job_id)
    assert (70, 2) == (job["status"], files.requests[url]), job["reason"]
    assert b"done" == consumer.read(job, "x.txt")
