"""
The whole service as its consumers meet it: real Prefect server, worker, API and file server, over HTTP.

A job takes seconds, most of it the start of its process. So all of them are submitted first, by the fixtures, and
each test looks at its own.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from blocks.keys import ProviderKey
from blocks.limits import MIB
from blocks.store import Manifest
from cli.service import Service
from flows.sealing import Seal
from tests import documents
from tests.documents import stage
from tests.file_server import FileServer
from tests.other_provider import SERVICE, OtherProvider

pytestmark = [pytest.mark.worker, pytest.mark.sandbox, pytest.mark.slow]

OPERATOR = "/api/v1/operator"
SPEC = Path(__file__).parent / "spec"
MARKER = "m4rk3r-n0t-t0-b3-f0und"
DEADLINE = 240.0

OUTPUT = "import os\nopen(os.environ['OUTPUTS'] + '/x.txt', 'w').write('done')\n"


def workflow(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """A document under an agreement of its own."""
    return documents.workflow(stages=stages, agreement=uuid4().hex)


def code(text: str, **algorithm: Any) -> dict[str, Any]:
    """An algorithm in Python, given as raw code."""
    container = {"image": "python", "tag": "3.12", "entrypoint": "python3 $ALGO"}
    return {"rawcode": text, "container": container, **algorithm}


@dataclass
class Consumer:
    """Speaks to the API as a consumer does."""

    http: httpx.Client

    def submit(self, document: Mapping[str, Any]) -> str:
        answer = self.http.post(f"{OPERATOR}/init", json={"workflow": document})
        assert 200 == answer.status_code, answer.text
        return answer.text

    def job(self, job_id: str) -> dict[str, Any]:
        answer = self.http.get(f"{OPERATOR}/compute", params={"jobId": job_id})
        assert 200 == answer.status_code, answer.text
        (job,) = answer.json()
        return dict(job)

    def wait(self, job_id: str, until: Callable[[dict[str, Any]], bool] | None = None) -> dict[str, Any]:
        """The job once it has ended, or once *until* holds. Fails after a deadline: no job may hang."""
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            job = self.job(job_id)
            if job["dateFinished"] is not None if until is None else until(job):
                return job
            time.sleep(0.2)
        pytest.fail(f"the job is still in {job['status']} {job['statusText']}: {job['reason']}")

    def read(self, job: Mapping[str, Any], filename: str) -> bytes:
        (result,) = [result for result in job["results"] if result["filename"] == filename]
        answer = self.http.get(result["url"])
        assert 200 == answer.status_code, answer.text
        return answer.content


@pytest.fixture(scope="module")
def consumer(service: Service) -> Iterator[Consumer]:
    with httpx.Client(base_url=service.api_url, timeout=60.0) as http:
        yield Consumer(http)


@pytest.fixture(scope="module")
def files() -> Iterator[FileServer]:
    with FileServer() as server:
        yield server


@pytest.fixture(scope="module")
def abroad(tmp_path_factory: pytest.TempPathFactory, files: FileServer) -> Iterator[OtherProvider]:
    """Another provider, which has data for nobody but the environment here, and an algorithm for all."""
    signer = ProviderKey.from_secret("0a" * 32)  # as in prefect.yaml
    with OtherProvider(tmp_path_factory.mktemp("abroad"), files) as other:
        other.offer("did:op:f1", b"40", b"2", allow=[signer.address])
        other.offer("did:op:f2", ADDS.encode(), type="algorithm")
        yield other


@pytest.fixture(scope="module")
def jobs(consumer: Consumer, files: FileServer, abroad: OtherProvider) -> dict[str, str]:
    """The jobs of this module by name, all submitted."""

    def one(algorithm: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        return workflow(stages=[stage(algorithm=algorithm, **more)])

    def data(url: str | list[str], did: str = "did:op:aa") -> list[dict[str, Any]]:
        return [{"id": did, "index": 0, "url": url}]

    secret = f"?signature={MARKER}"
    two_urls = [files.add(b"first", delay=0.3) + secret, files.add(b"second") + secret]
    remote = {"serviceId": SERVICE}
    adds = {**code(""), "rawcode": None, "id": "did:op:f2", "remote": remote}
    from_abroad = {
        "input": [{"id": "did:op:f1", "remote": {**remote, "userdata": {"token": MARKER}}}, *data(two_urls[0])],
        "output": {"metadataUri": abroad.metadata_url},
    }
    wanted = {
        "abroad": one({**adds, "sha256": hashlib.sha256(ADDS.encode()).hexdigest()}, **from_abroad),
        "not approved": one({**adds, "sha256": "ab" * 32}, **from_abroad),
        "everything": workflow(
            stages=[
                stage(
                    input=[
                        {"id": "did:op:aa", "index": 0, "url": two_urls},
                        {"id": "did:op:bb", "index": 1, "url": files.add(b"third") + secret},
                    ],
                    algorithm=code(
                        f"# {MARKER}\n" + SEES_EVERYTHING,
                        container={**code("")["container"], "entrypoint": f": {MARKER}; python3 $ALGO"},
                        id="did:op:cc",
                        algocustomdata={"threshold": 3, "note": MARKER},
                        algouserdata={"token": MARKER},
                        envs={"GREETING": "hello", "TOKEN": MARKER},
                    ),
                )
            ]
        ),
        "slow input": one(code(OUTPUT), input=data(files.add(size=12 * MIB, pause=0.4, ranges="ignored"))),
        "stages": workflow(
            stages=[
                stage(
                    index=0,
                    algorithm=code(
                        "import os\nos.makedirs(os.environ['OUTPUTS'] + '/deep/er')\n"
                        "open(os.environ['OUTPUTS'] + '/deep/er/n.txt', 'w').write('20')\n"
                    ),
                ),
                stage(index=1, algorithm=code(OUTPUT), after=[]),
                stage(
                    index=2,
                    input=[{"id": "before", "stage": 0}],
                    algorithm=code(
                        "import os\n"
                        "n = int(open(os.environ['INPUTS'] + '/before/deep/er/n.txt').read())\n"
                        "open(os.environ['OUTPUTS'] + '/sum.txt', 'w').write(str(n + 22))\n"
                    ),
                ),
            ]
        ),
        "first stage fails": workflow(
            stages=[stage(index=0, algorithm=code("raise SystemExit(7)")), stage(index=1, algorithm=code(OUTPUT))]
        ),
        "404": one(code(OUTPUT), input=data(files.add(b"", status=404) + secret)),
        "never answers": one(code(OUTPUT), input=data(files.add(b"", hang=True) + secret)),
        "no such name": one(code(OUTPUT), input=data(f"http://{MARKER}.invalid/x.csv")),
        "forbidden address": one(code(OUTPUT), input=data(f"http://169.254.169.254/{MARKER}")),
        "algorithm 404": one(
            {"url": files.add(b"", status=404) + secret, "container": code("")["container"]}, input=[]
        ),
        "exit code": one(code("import sys\nprint('going', 'down', flush=True)\nsys.exit(3)")),
        "too long": one(code("import time\ntime.sleep(60)"), compute={"maxtime": 2}),
        "too much memory": one(code("x = []\nwhile True: x.append(bytearray(8 * 2**20))")),
        "too much disk": one(
            code("import os\nf = open(os.environ['OUTPUTS'] + '/big', 'wb')\nwhile True: f.write(bytes(2**20))")
        ),
        "too much output": one(
            code("import os\nopen(os.environ['OUTPUTS'] + '/big', 'w').write('x' * 5000)"),
            environment="tight",
        ),
        "no store": one(code(OUTPUT), environment="lost"),
        "links": one(
            code(
                "import os\no = os.environ['OUTPUTS']\nos.symlink('/etc/passwd', o + '/passwd')\n"
                "os.mkfifo(o + '/pipe')\nopen(o + '/plain.txt', 'w').write('plain')\n"
            )
        ),
        "nothing published": one(code(OUTPUT), output={"publishoutput": False, "publishalgolog": False}),
        "algorithm by URL": one(
            {"url": files.add(OUTPUT.encode()), "rawcode": "exit(9)", "container": code("")["container"]}
        ),
        "reaches out": one(code(f"import urllib.request\nurllib.request.urlopen('{files.add(b'x')}', timeout=5)")),
    }
    return {name: consumer.submit(document) for name, document in wanted.items()}


SEES_EVERYTHING = """
import json, os
inputs, outputs = os.environ["INPUTS"], os.environ["OUTPUTS"]
dids = json.loads(os.environ["DIDS"])
seen = {
    "dids": dids,
    "transformation": os.environ["TRANSFORMATION_DID"],
    "volume": os.environ["VOLUME"],
    "logs": os.environ["LOGS"],
    "greeting": os.environ["GREETING"],
    "secret": len(os.environ["secret"]),
    "custom": json.load(open(f"{inputs}/algoCustomData.json"))["threshold"],
    "ddos": sorted(os.listdir("/data/ddos")),
    "files": {
        f"{did}/{name}": open(f"{inputs}/{did}/{name}").read()
        for did in dids for name in sorted(os.listdir(f"{inputs}/{did}"))
    },
    "code": os.access("/data/transformations/algorithm", os.X_OK),
}
os.makedirs(f"{outputs}/a/b")
json.dump(seen, open(f"{outputs}/a/b/seen.json", "w"))
open(f"{outputs}/z.bin", "wb").write(bytes(range(256)))
print("seen", flush=True)
"""


ADDS = """
import json, os
folder = os.environ["INPUTS"] + "/f1"
total = sum(int(open(f"{folder}/{n}").read()) for n in sorted(os.listdir(folder)))
ddo = json.load(open(os.environ["VOLUME"] + "/ddos/f1"))
json.dump([total, ddo["services"][0]], open(os.environ["OUTPUTS"] + "/sum.json", "w"))
"""


def statuses(job: Mapping[str, Any]) -> list[int]:
    return [passed["status"] for passed in job["history"]]


def test_a_job_passes_every_status_in_order(consumer: Consumer, jobs: Mapping[str, str]) -> None:
    """From warming up to completed, each status of the table once and in its order."""
    job = consumer.wait(jobs["everything"])
    assert (70, "Job completed") == (job["status"], job["statusText"])
    history = consumer.wait(jobs["everything"], lambda job: len(job["history"]) == 8)["history"]
    assert [1, 10, 20, 30, 40, 50, 60, 70] == [passed["status"] for passed in history]
    assert sorted(passed["at"] for passed in history) == [passed["at"] for passed in history]


def test_the_algorithm_sees_what_is_documented(consumer: Consumer, jobs: Mapping[str, str]) -> None:
    """Folders, files in the order of their URLs, parameters and variables are those of the contract, section 4."""
    job = consumer.wait(jobs["everything"])
    seen = json.loads(consumer.read(job, "a/b/seen.json"))
    assert {
        "dids": ["aa", "bb"],
        "transformation": "cc",
        "volume": "/data",
        "logs": "/data/logs",
        "greeting": "hello",
        "secret": 64,
        "custom": 3,
        "ddos": ["aa", "bb"],
        "files": {"aa/0": "first", "aa/1": "second", "bb/0": "third"},
        "code": True,
    } == seen


def test_results_are_in_order_and_whole(consumer: Consumer, jobs: Mapping[str, str]) -> None:
    """Outputs by path with their folders, then the algorithm's log; each has the checksum that was announced."""
    job = consumer.wait(jobs["everything"])
    assert ["a/b/seen.json", "z.bin", "algorithm.log", "filtering.log"] == [r["filename"] for r in job["results"]]
    for result in job["results"]:
        content = consumer.http.get(result["url"]).content
        assert (result["filesize"], result["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert b"seen\n" == consumer.read(job, "algorithm.log")


def test_what_was_read_is_in_the_manifest(service: Service, consumer: Consumer, jobs: Mapping[str, str]) -> None:
    """Of each file its size, checksum, time and source; where it is from can be read with the service's key only."""
    job = consumer.wait(jobs["everything"])
    text = (service.state / "store" / "results" / job["jobId"] / "manifest" / "0.json").read_text()
    assert MARKER not in text and "127.0.0.1" not in text
    read = Manifest.model_validate_json(text).inputs
    contents = [b"first", b"second"]
    assert [(5, 0), (6, 1)] == [(each.size, each.position) for each in read[:2]]
    assert [hashlib.sha256(content).hexdigest() for content in contents] == [each.sha256 for each in read[:2]]
    assert {("did:op:aa", "origin", 0)} == {(each.input, each.source, each.stage) for each in read[:2]}
    seal = Seal.from_file(service.state / "key")
    assert all(MARKER in seal.open(each.location)["url"] for each in read[:2])
    assert float(job["dateCreated"]) <= read[0].fetched.timestamp() <= float(job["dateFinished"])


def test_get_result_by_index_and_range(consumer: Consumer, jobs: Mapping[str, str]) -> None:
    """getResult serves a result by its index, whole or in part, to its owner only."""
    job = consumer.wait(jobs["everything"])
    call = {"jobId": job["jobId"], "owner": job["owner"], "index": 1}
    whole = consumer.http.get(f"{OPERATOR}/getResult", params=call)
    part = consumer.http.get(f"{OPERATOR}/getResult", params=call, headers={"Range": "bytes=10-19"})
    other = consumer.http.get(f"{OPERATOR}/getResult", params={**call, "owner": "0x99"})
    assert bytes(range(256)) == whole.content
    assert (206, bytes(range(10, 20)), "bytes 10-19/256") == (
        part.status_code,
        part.content,
        part.headers["content-range"],
    )
    assert 404 == other.status_code


def test_the_early_dialect_tells_the_same(consumer: Consumer, jobs: Mapping[str, str]) -> None:
    """``/status`` counts to 6 and links outputs and the algorithm's log."""
    job = consumer.wait(jobs["everything"])
    (early,) = consumer.http.get(f"{OPERATOR}/status", params={"jobId": job["jobId"]}).json()
    assert 6 == early["status"]
    assert 2 == len(early["outputsURL"])
    assert b"seen\n" == consumer.http.get(early["algologURL"]).content
    assert early["configlogURL"] is None and early["publishlogURL"] is None


def test_stages_hand_on_their_outputs(consumer: Consumer, jobs: Mapping[str, str]) -> None:
    """A stage reads another's outputs by their paths; results name their stage once there are several."""
    job = consumer.wait(jobs["stages"])
    assert 70 == job["status"], job["reason"]
    assert b"42" == consumer.read(job, "2/sum.txt")
    assert b"20" == consumer.read(job, "0/deep/er/n.txt")


def test_independent_stages_run_side_by_side(consumer: Consumer, jobs: Mapping[str, str]) -> None:
    """Two stages that wait for nothing are both being provisioned before either has published."""
    consumer.wait(jobs["stages"])
    history = consumer.wait(jobs["stages"], lambda job: statuses(job).count(60) == 3)["history"]
    begun = {p["stage"]: float(p["at"]) for p in history if p["status"] == 20}
    published = {p["stage"]: float(p["at"]) for p in history if p["status"] == 60}
    assert max(begun[0], begun[1]) < min(published[0], published[1])
    assert begun[2] > published[0]


def test_data_and_algorithm_of_another_provider(
    consumer: Consumer, jobs: Mapping[str, str], abroad: OtherProvider
) -> None:
    """Looked up, downloaded with the environment's key, and run; the document is there and tells no source."""
    job = consumer.wait(jobs["abroad"])
    assert 70 == job["status"], job["reason"]
    total, service = json.loads(consumer.read(job, "sum.json"))
    assert (42, abroad.url, "") == (total, service["serviceEndpoint"], service["files"])


def test_an_algorithm_that_was_not_approved_is_32(consumer: Consumer, jobs: Mapping[str, str]) -> None:
    """What an owner trusts by its checksum and has been changed since is not run."""
    job = consumer.wait(jobs["not approved"])
    assert 32 == job["status"]
    assert "is not the file that was approved" in job["reason"]
    assert 40 not in statuses(job)


def test_how_long_a_fetch_still_takes_is_told(consumer: Consumer, jobs: Mapping[str, str]) -> None:
    """In words with the bytes that are here, and as a number; and no more once it is over."""

    def estimated(job: Mapping[str, Any]) -> bool:
        return job["secondsLeft"] is not None or job["dateFinished"] is not None

    job = consumer.wait(jobs["slow input"], estimated)
    assert 20 == job["status"] and 0.0 <= job["secondsLeft"] < 60.0
    assert re.search(r"0 of 1 files, [0-9.]+ of 12\.0 MiB, about [0-9]+ s left", job["reason"])
    assert (70, None) == ((ended := consumer.wait(job["jobId"]))["status"], ended["secondsLeft"])


def test_a_stage_is_not_begun_after_one_that_failed(consumer: Consumer, jobs: Mapping[str, str]) -> None:
    """The job ends with the failure of the first stage, names it, and the second never runs."""
    job = consumer.wait(jobs["first stage fails"])
    assert (41, 0) == (job["status"], job["stage"])
    assert "exit code 7" in job["statusText"]
    assert 1 not in {passed["stage"] for passed in job["history"]}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("404", "answered 404"),
        ("never answers", "did not answer"),
        ("no such name", "does not resolve"),
        ("forbidden address", "not public"),
    ],
)
def test_an_input_that_cannot_be_had_is_31(consumer: Consumer, jobs: Mapping[str, str], name: str, words: str) -> None:
    """Data provisioning failed, and the reason says which input and why, without its URL."""
    job = consumer.wait(jobs[name])
    assert (31, "Data provisioning failed") == (job["status"], job["statusText"])
    assert "did:op:aa" in job["reason"] and words in job["reason"]
    assert MARKER not in json.dumps(job)


def test_an_algorithm_that_cannot_be_had_is_32(consumer: Consumer, jobs: Mapping[str, str]) -> None:
    """Algorithm provisioning failed, for a URL that answers 404."""
    job = consumer.wait(jobs["algorithm 404"])
    assert (32, "Algorithm provisioning failed") == (job["status"], job["statusText"])
    assert "answered 404" in job["reason"]


@pytest.mark.parametrize(
    ("name", "text", "stop_request"),
    [("exit code", "exit code 3", 0), ("too long", "timed out", 2), ("too much memory", "out of memory", 0)],
)
def test_the_ways_an_algorithm_fails_are_told_apart(
    consumer: Consumer, jobs: Mapping[str, str], name: str, text: str, stop_request: int
) -> None:
    """All are 41; the text says which, and stopreq that it was the time."""
    job = consumer.wait(jobs[name])
    assert (41, stop_request) == (job["status"], job["stopreq"])
    assert job["statusText"].startswith(f"Failed to run algorithm: {text}")


def test_a_failed_algorithm_publishes_its_log_as_result_0(consumer: Consumer, jobs: Mapping[str, str]) -> None:
    """What it printed before it failed can be read; nothing else of it leaves."""
    job = consumer.wait(jobs["exit code"])
    assert "algorithm.log" == job["results"][0]["filename"]
    assert b"going down\n" == consumer.read(job, "algorithm.log")


def test_too_much_written_is_42(consumer: Consumer, jobs: Mapping[str, str]) -> None:
    """An algorithm that fills its disk is ended."""
    job = consumer.wait(jobs["too much disk"])
    assert 42 == job["status"]
    assert job["statusText"].startswith("Disk quota exceeded")


def test_too_much_output_is_51(consumer: Consumer, jobs: Mapping[str, str]) -> None:
    """Outputs above the environment's size limit are withheld, and the report names the limit."""
    job = consumer.wait(jobs["too much output"])
    assert (51, "Results withheld by the filter") == (job["status"], job["statusText"])
    assert {"algorithmLog", "filteringLog"} == {result["type"] for result in job["results"]}
    assert b"1000 are allowed" in consumer.read(job, "filtering.log")


def test_a_store_that_cannot_be_written_is_62(consumer: Consumer, jobs: Mapping[str, str]) -> None:
    """Failed to upload results; the status can be read all the same, without results."""
    job = consumer.wait(jobs["no store"])
    assert (62, "Failed to upload results to storage", "") == (job["status"], job["statusText"], job["results"])
    assert job["reason"]


def test_without_a_sandbox_a_job_is_refused(consumer: Consumer) -> None:
    """An environment that cannot shut algorithms in takes none, and says what its operator has to do."""
    document = workflow(stages=[stage(algorithm=code(OUTPUT), environment="unsealed")])
    answer = consumer.http.post(f"{OPERATOR}/init", json={"workflow": document})
    assert 503 == answer.status_code
    assert "cannot shut an algorithm in" in answer.json()["error"]
    (listed,) = [e for e in consumer.http.get(f"{OPERATOR}/environments").json() if e["id"] == "unsealed"]
    assert listed["obstacle"]


def test_links_and_special_files_never_leave(consumer: Consumer, jobs: Mapping[str, str]) -> None:
    """A link to a file of the machine and a pipe stay behind, named in the report; the plain file leaves."""
    job = consumer.wait(jobs["links"])
    assert 70 == job["status"]
    assert ["plain.txt"] == [r["filename"] for r in job["results"] if r["type"] == "output"]
    report = consumer.read(job, "filtering.log")
    assert b"passwd: link" in report and b"pipe: special" in report


def test_what_is_not_to_be_published_is_not(consumer: Consumer, jobs: Mapping[str, str]) -> None:
    """publishoutput and publishalgolog are honoured."""
    job = consumer.wait(jobs["nothing published"])
    assert 70 == job["status"]
    assert not {"output", "algorithmLog"} & {result["type"] for result in job["results"] or ()}


def test_url_wins_over_rawcode(consumer: Consumer, jobs: Mapping[str, str]) -> None:
    """As in the document's own example, which gives both."""
    job = consumer.wait(jobs["algorithm by URL"])
    assert 70 == job["status"], job["reason"]
    assert b"done" == consumer.read(job, "x.txt")


def test_the_algorithm_has_no_network(consumer: Consumer, jobs: Mapping[str, str]) -> None:
    """Not even the file server that its inputs came from can be reached from inside."""
    job = consumer.wait(jobs["reaches out"])
    assert 41 == job["status"]
    assert b"URLError" in consumer.read(job, "algorithm.log")


@pytest.mark.parametrize("path", sorted(SPEC.glob("*.json")), ids=lambda path: path.stem)
def test_the_example_of_the_document_runs(consumer: Consumer, path: Path) -> None:
    """Spec 000's request, as printed, is taken and ends with a stated reason: its URLs cannot be reached here."""
    document = json.loads(path.read_text())
    if "workflow" not in document:
        pytest.skip("not a request")
    document["workflow"]["agreementId"] = f"e2e-{path.stem}"
    job = consumer.wait(consumer.submit(document["workflow"]))
    assert 31 == job["status"]
    assert job["reason"]


def test_the_same_submission_at_once_is_one_job(consumer: Consumer) -> None:
    """Ten requests with one agreement and document get one id; another document under it is refused."""
    document = workflow(stages=[stage(algorithm=code(OUTPUT), environment="unattended")])
    with ThreadPoolExecutor(10) as pool:
        ids = set(pool.map(consumer.submit, [document] * 10))
    assert 1 == len(ids)
    other = {**document, "stages": [stage(algorithm=code("pass"), environment="unattended")]}
    answer = consumer.http.post(f"{OPERATOR}/init", json={"workflow": other})
    assert (400, "`agreementId` already in use for other job.") == (answer.status_code, answer.json()["error"])


def test_a_waiting_job_says_what_it_waits_for(consumer: Consumer) -> None:
    """A job in an environment without a worker is warming up and says that none has reported."""
    document = workflow(stages=[stage(algorithm=code(OUTPUT), environment="unattended")])
    job = consumer.job(consumer.submit(document))
    assert (1, "Warming up") == (job["status"], job["statusText"])
    assert "none has ever reported" in job["reason"]


def test_stop_ends_a_running_algorithm(consumer: Consumer, jobs: Mapping[str, str]) -> None:
    """PUT ends it and answers 7; the short table keeps the step it was in; stopping again changes nothing."""
    algorithm = code("import time\nprint('begun', flush=True)\ntime.sleep(50)")
    job_id = consumer.submit(workflow(stages=[stage(algorithm=algorithm)]))
    consumer.wait(job_id, lambda job: job["status"] == 40)
    (asked,) = consumer.http.put(f"{OPERATOR}/compute", params={"jobId": job_id}).json()
    assert 1 == asked["stopreq"]
    stopped = consumer.wait(job_id)  # on a busy machine the answer may come before the process is gone
    assert (7, "Job stopped", 1) == (stopped["status"], stopped["statusText"], stopped["stopreq"])
    assert stopped["dateFinished"] is not None
    (early,) = consumer.http.get(f"{OPERATOR}/status", params={"jobId": job_id}).json()
    assert 3 == early["status"]
    (again,) = consumer.http.put(f"{OPERATOR}/compute", params={"jobId": job_id}).json()
    assert (7, stopped["dateFinished"]) == (again["status"], again["dateFinished"])


def test_delete_leaves_nothing(consumer: Consumer, service: Service) -> None:
    """DELETE answers 8; afterwards the job is unknown, its links are dead, and no file of it is left."""
    document = workflow(stages=[stage(algorithm=code(OUTPUT))])
    job = consumer.wait(consumer.submit(document))
    link = job["results"][0]["url"]
    (deleted,) = consumer.http.request("DELETE", f"{OPERATOR}/compute", params={"jobId": job["jobId"]}).json()
    assert (8, "Job deleted successfully") == (deleted["status"], deleted["statusText"])
    assert [] == consumer.http.get(f"{OPERATOR}/compute", params={"jobId": job["jobId"]}).json()
    assert 404 == consumer.http.get(link).status_code
    assert [] == list(service.state.rglob(f"*{job['jobId']}*"))
    assert consumer.submit(document) != job["jobId"]


def test_delete_stops_a_running_job_first(consumer: Consumer, service: Service) -> None:
    """A running job can be deleted; its folder goes with it."""
    job_id = consumer.submit(workflow(stages=[stage(algorithm=code("import time\ntime.sleep(50)"))]))
    consumer.wait(job_id, lambda job: job["status"] == 40)
    deadline = time.monotonic() + DEADLINE
    while (answer := consumer.http.request("DELETE", f"{OPERATOR}/compute", json={"jobId": job_id})).status_code == 503:
        assert "still being stopped" in answer.json()["error"]  # on a busy machine
        assert time.monotonic() < deadline
    (deleted,) = answer.json()
    assert 8 == deleted["status"]
    assert [] == consumer.http.get(f"{OPERATOR}/compute", params={"jobId": job_id}).json()
    assert [] == list(service.state.rglob(f"*{job_id}*"))


def test_a_big_document_is_taken(consumer: Consumer) -> None:
    """Raw code beyond what fits a flow run's parameters runs as well."""
    padding = hashlib.shake_256(b"not to be compressed").hexdigest(500_000)
    job = consumer.wait(consumer.submit(workflow(stages=[stage(algorithm=code(f"{OUTPUT}# {padding}\n"))])))
    assert 70 == job["status"], job["reason"]


def test_environments_are_listed(consumer: Consumer) -> None:
    """Every environment, in both spellings, with the truth about its workers."""
    listed = {e["id"]: e for e in consumer.http.get(f"{OPERATOR}/environments").json()}
    workers = {"default", "withgpu", "tight", "lost", "unsealed", "brief", "impatient", "beside"}
    assert workers | {"unattended", "fading", "hopeless"} == set(listed)
    assert (1, 1) == (listed["withgpu"]["nCPU"], listed["withgpu"]["cpuNumber"])
    assert listed["default"]["lastSeen"] and not listed["unattended"]["lastSeen"]


def test_finished_jobs_leave_no_workspace(consumer: Consumer, service: Service, jobs: Mapping[str, str]) -> None:
    """
    What a job fetched and made is gone with its completion; results are in the store alone. One that failed keeps what
    a restart can use, and nothing that its algorithm wrote.
    """
    ended = {job_id: consumer.wait(job_id) for job_id in jobs.values()}
    left = {path.name for path in (service.state / "work").iterdir()}
    assert {job_id for job_id, job in ended.items() if job["status"] == 70}.isdisjoint(left)
    kept = service.state / "work" / jobs["too much disk"] / "0"
    assert {"inputs", "ddos", "transformations"} == {path.name for path in (kept / "data").iterdir()}
    assert not (kept / "algorithm.log").exists()


def test_no_secret_is_anywhere(consumer: Consumer, service: Service, jobs: Mapping[str, str]) -> None:
    """URLs, raw code and user data stand in clear in no database, log, artifact or file the service keeps."""
    for job_id in jobs.values():
        consumer.wait(job_id)
    with sqlite3.connect(service.state / "prefect" / "prefect.db") as database:
        database.execute("PRAGMA wal_checkpoint(FULL)")
    files = [path for path in service.state.rglob("*") if path.is_file()]
    assert any(path.name == "prefect.db" for path in files)
    assert [] == [path for path in files if MARKER.encode() in path.read_bytes()]
