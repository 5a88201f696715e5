"""The operator dialects over the real app and the jobs in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.status import Dialect, Status, project
from tests.factories import (
    ADMIN,
    OWNER,
    PROVIDER,
    SPEC,
    STRANGER,
    Client,
    client,
    result,
    settings,
    sign,
    signed,
    spec,
    stage,
    workflow,
)

INIT = "/api/v1/operator/init"
STATUS = "/api/v1/operator/status"
COMPUTE = "/api/v1/operator/compute"
RESULT = "/api/v1/operator/getResult"
UNKNOWN = "0" * 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("api")


@pytest.fixture(scope="module")
def apps(folder: Path) -> Iterator[dict[str, Client]]:
    """Open to this machine only; by the table of their ``/status``."""
    with (
        client(settings(folder)) as later,
        client(settings(folder, status_table="001")) as early,
    ):
        yield {"000": later, "001": early}


@pytest.fixture
def local(apps: dict[str, Client]) -> Client:
    """With the settings a service has by itself, and no jobs."""
    return apps["000"].emptied()


@pytest.fixture
def listed(folder: Path) -> Iterator[Client]:
    """With a list of providers, called from elsewhere."""
    of = settings(folder, host="0.0.0.0", providers=PROVIDER.address, admins=ADMIN.address)
    with client(of, peer="203.0.113.7") as made:
        yield made


def start(client: Client, **changes: Any) -> str:
    """A new job by the API; its id."""
    answer = client.post(INIT, json={"workflow": workflow(**changes)})
    assert 200 == answer.status_code, answer.text
    return answer.text


def publish(client: Client, job_id: str) -> None:
    """Outputs, the algorithm's log, and two logs that are for admins only."""
    client.jobs.publish(
        job_id,
        [
            result("a/model.csv", b"x,y\n", media_type="text/csv"),
            result("b.bin", b"\x00\x01", media_type="application/octet-stream"),
            result("algorithm.log", b"hello\n", "algorithmLog"),
            result("configuration.log", b"secret\n", "configrationLog"),
            result("publish.log", b"secret too\n", "publishLog"),
        ],
    )


@pytest.mark.parametrize("path", sorted(SPEC.glob("*-init-request.json")), ids=lambda path: path.stem)
def test_an_example_of_the_documents_is_accepted_as_printed(local: Client, path: Path) -> None:
    """POST /init answers the id of the new job as plain text."""
    answer = local.post(INIT, content=path.read_bytes(), headers={"content-type": "application/json"})
    assert 200 == answer.status_code
    assert answer.headers["content-type"].startswith("text/plain")
    assert [answer.text] == [job["jobId"] for job in local.get(STATUS, params={"agreementId": "111"}).json()]


@pytest.mark.parametrize("path", sorted(SPEC.glob("*-status-request.txt")), ids=lambda path: path.stem)
def test_a_status_request_of_the_documents_is_accepted_as_printed(local: Client, path: Path) -> None:
    """A search that finds nothing is an empty array."""
    method, url = path.read_text().split()
    answer = local.request(method, url)
    assert (200, []) == (answer.status_code, answer.json())


def test_the_other_spelling_of_every_key_is_accepted(local: Client) -> None:
    """The later operator's spelling of the output, in the example of the documents."""
    body = spec("000-init-request.json")
    output = body["workflow"]["stages"][0]["output"]
    for early, late in {
        "brizoUrl": "brizoUri",
        "metadataUrl": "metadataUri",
        "secretStoreUrl": "secretStoreUri",
        "publishoutput": "publishOutput",
        "publishalgolog": "publishAlgorithmLog",
    }.items():
        output[late] = output.pop(early)
    assert 200 == local.post(INIT, json=body).status_code


def test_a_document_needs_no_outer_key(local: Client) -> None:
    """A document posted as ``c2d plan`` reads it is the same job as one under ``workflow``."""
    document = workflow()
    bare, wrapped = local.post(INIT, json=document), local.post(INIT, json={"workflow": document})
    assert (200, bare.text) == (wrapped.status_code, wrapped.text)


def test_the_example_in_the_api_description_is_that_of_the_document(local: Client) -> None:
    """Whoever tries it out from /docs sends what spec 000 prints."""
    description = local.get("/openapi.json").json()["paths"][INIT]["post"]
    assert spec("000-init-request.json") == description["requestBody"]["content"]["application/json"]["example"]


def test_status_has_the_fields_of_the_document_in_its_spelling(local: Client) -> None:
    """Spec 000 "Status", and what is told beyond it."""
    start(local)
    (status,) = local.get(STATUS, params={"owner": OWNER}).json()
    documented = {"owner", "agreementId", "jobId", "dateCreated", "dateFinished", "status", "statusText"}
    documented |= {"configlogURL", "publishlogURL", "algologURL", "outputsURL"}
    assert documented | {"expireTimestamp", "reason", "progress", "secondsLeft", "stage", "stages", "history"} == set(
        status
    )
    assert status["dateFinished"] is None
    assert float(status["dateCreated"]) > 1_700_000_000
    assert "waiting for a worker" == status["reason"]


@pytest.mark.parametrize("table", ["000", "001"])
@pytest.mark.parametrize("reached", set(Status) - {Status.DELETED}, ids=lambda status: status.name)
def test_every_status_is_seen_in_the_numbers_of_the_table_set(
    apps: dict[str, Client], table: str, reached: Status
) -> None:
    """/status counts as 000 or 001 does, /compute as the full table; an end is told by dateFinished in both."""
    local = apps[table].emptied()
    job_id = start(local)
    local.jobs.move(job_id, Status.RUNNING)
    job = local.jobs.move(job_id, reached)
    (early,) = local.get(STATUS, params={"jobId": job_id}).json()
    (later,) = local.get(COMPUTE, params={"jobId": job_id}).json()
    assert project(reached, Dialect(table), stopped_in=Status.RUNNING) == early["status"]
    assert reached == later["status"]
    assert job.text == early["statusText"] == later["statusText"]
    assert job.ended is (early["dateFinished"] is not None) is (later["dateFinished"] is not None)
    assert ["Warming up", "Running algorithm", job.text] == [passage["statusText"] for passage in early["history"]]


def test_owner_is_found_whatever_the_case_of_its_address(local: Client) -> None:
    """Addresses compare case-insensitively."""
    job_id = start(local)
    assert [job_id] == [job["jobId"] for job in local.get(STATUS, params={"owner": OWNER.lower()}).json()]


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
@pytest.mark.parametrize("way", ["query", "body"])
def test_every_verb_reads_its_parameters_from_query_or_body(local: Client, method: str, way: str) -> None:
    """Real clients do both, on GET and DELETE too, and omit the content type."""
    job_id = start(local)
    options = {"params": {"jobId": job_id}} if way == "query" else {"content": json.dumps({"jobId": job_id})}
    answer = local.request(method, COMPUTE, **options)
    assert [job_id] == [job["jobId"] for job in answer.json()]


def test_a_workflow_may_stand_in_the_query_string(local: Client) -> None:
    """As JSON text."""
    answer = local.post(COMPUTE, params={"workflow": json.dumps(workflow())})
    assert [1] == [job["status"] for job in answer.json()]


def test_stop_ends_what_runs_and_leaves_what_has_ended(local: Client) -> None:
    """PUT answers all that match, as they are afterwards."""
    done, running = start(local, agreementId="1"), start(local, agreementId="2")
    local.jobs.move(done, Status.COMPLETED)
    stopped = local.put(COMPUTE, params={"owner": OWNER}).json()
    assert {done: 70, running: 7} == {job["jobId"]: job["status"] for job in stopped}


def test_a_deleted_job_is_told_of_once_and_then_unknown(local: Client) -> None:
    """DELETE answers the last status object with status 8; after that the job is not found."""
    job_id = start(local)
    publish(local, job_id)
    (last,) = local.delete(COMPUTE, params={"jobId": job_id}).json()
    assert (8, "Job deleted successfully", 1, "") == (
        last["status"],
        last["statusText"],
        last["removed"],
        last["results"],
    )
    for method, url in (("GET", STATUS), ("GET", COMPUTE), ("PUT", COMPUTE), ("DELETE", COMPUTE)):
        assert [] == local.request(method, url, params={"jobId": job_id}).json()
    gone = local.get(RESULT, params={"jobId": job_id, "index": 0, "owner": OWNER})
    assert (404, {"error": f"No job {job_id}"}) == (gone.status_code, gone.json())


def test_running_jobs_are_those_that_have_not_ended(local: Client) -> None:
    """GET /runningjobs, of all owners."""
    done, running = start(local, agreementId="1"), start(local, agreementId="2")
    local.jobs.move(done, Status.RUN_FAILED, detail="exit code 3")
    assert [running] == [job["jobId"] for job in local.get("/api/v1/operator/runningjobs").json()]


def test_the_same_job_again_is_the_same_job(local: Client) -> None:
    """A client that lost the answer asks again and gets it."""
    assert start(local) == start(local)


def test_agreement_and_owner_may_stand_beside_the_workflow(local: Client) -> None:
    """As the later operator has it; answers an array of one."""
    body = {"workflow": {"stages": [stage(compute={})]}, "agreementId": "7", "owner": OWNER, "environment": "small"}
    (job,) = local.post(COMPUTE, json=body).json()
    assert ("7", OWNER, 1, "") == (job["agreementId"], job["owner"], job["status"], job["results"])
    assert (0, 0, "did:op:02", ["did:op:01"]) == (job["stopreq"], job["removed"], job["algoDID"], job["inputDID"])
    documented = {"agreementId", "jobId", "owner", "status", "statusText", "dateCreated", "dateFinished"}
    assert documented | {"results", "stopreq", "removed", "algoDID", "inputDID"} <= set(job)
    assert "small" == local.job(job["jobId"]).environment


def test_an_environment_beside_the_workflow_leaves_stages_that_name_one(local: Client) -> None:
    """It is for those that name none."""
    (job,) = local.post(COMPUTE, json={"workflow": workflow(), "environment": "small"}).json()
    assert "withgpu" == local.job(job["jobId"]).environment


def test_results_have_an_index_a_link_and_a_hash(local: Client) -> None:
    """Logs for admins only are left out; the others keep their places."""
    job_id = start(local)
    publish(local, job_id)
    (job,) = local.get(COMPUTE, params={"jobId": job_id}).json()
    assert [(0, "a/model.csv", 4, "output"), (1, "b.bin", 2, "output"), (2, "algorithm.log", 6, "algorithmLog")] == [
        (entry["index"], entry["filename"], entry["filesize"], entry["type"]) for entry in job["results"]
    ]
    assert all(len(entry["sha256"]) == 64 for entry in job["results"])
    assert b"hello\n" == local.get(job["results"][2]["url"]).content


def test_links_of_the_early_status_lead_to_the_files(local: Client) -> None:
    """algologURL and outputsURL, absolute, each fetched without any signature."""
    job_id = start(local)
    publish(local, job_id)
    (job,) = local.get(STATUS, params={"jobId": job_id}).json()
    assert job["algologURL"].startswith("http://localhost:8030/api/results/")
    assert [b"x,y\n", b"\x00\x01"] == [local.get(url).content for url in job["outputsURL"]]
    assert (None, None) == (job["configlogURL"], job["publishlogURL"])


def test_links_start_with_the_public_url(folder: Path) -> None:
    """Behind a proxy, the address clients reach this service by."""
    with client(settings(folder, public_url="https://c2d.example.com/base/")) as local:
        job_id = start(local)
        publish(local, job_id)
        (job,) = local.get(STATUS, params={"jobId": job_id}).json()
    assert job["algologURL"].startswith("https://c2d.example.com/base/api/results/")


def test_environments_are_listed_in_both_spellings(local: Client) -> None:
    """Contract, section 3."""
    small, withgpu = local.get("/api/v1/operator/environments").json()
    assert ("small", "withgpu") == (small["id"], withgpu["id"])
    assert (1, 1, 1, 1) == (withgpu["nGPU"], withgpu["gpuNumber"], withgpu["nCPU"], withgpu["cpuNumber"])
    assert (2, 10, 3600, 2, 0) == tuple(
        small[name] for name in ("ramGB", "diskGB", "maxJobDuration", "maxJobs", "currentJobs")
    )
    assert float(small["lastSeen"]) > 1_700_000_000


# -- Restart


def test_a_stopped_job_is_restarted_by_its_id(local: Client) -> None:
    """POST with the id alone: /compute answers the status of the same job, waiting again, and /init its id."""
    job_id = local.started()
    (stopped,) = local.put(COMPUTE, params={"jobId": job_id}).json()
    (job,) = local.post(COMPUTE, json={"jobId": job_id}).json()
    assert (job_id, 1, None, 0) == (job["jobId"], job["status"], job["dateFinished"], job["stopreq"])
    assert stopped["dateCreated"] == job["dateCreated"]
    local.put(COMPUTE, params={"jobId": job_id})
    assert job_id == local.post(INIT, json={"jobId": job_id, "owner": OWNER.lower(), "agreementId": "111"}).text


def test_a_job_is_restarted_with_another_document(local: Client) -> None:
    """In the outer key or posted as it is."""
    job_id = local.started()
    changed = workflow(stages=[stage(input=[])])
    for body in ({"workflow": changed, "jobId": job_id}, {**changed, "jobId": job_id}):
        local.put(COMPUTE, params={"jobId": job_id})
        assert job_id == local.post(INIT, json=body).text
        assert () == local.job(job_id).input_dids


def test_a_job_that_goes_on_or_is_completed_is_not_restarted(local: Client) -> None:
    """409, and what can be done instead."""
    job_id = local.started()
    going = local.post(COMPUTE, json={"jobId": job_id})
    assert 409 == going.status_code and "stop it, or wait" in going.json()["error"]
    local.jobs.move(job_id, Status.COMPLETED)
    completed = local.post(COMPUTE, json={"jobId": job_id})
    assert 409 == completed.status_code and "another agreement" in completed.json()["error"]


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        ({"jobId": UNKNOWN}, 404, f"No job {UNKNOWN}"),
        ({"owner": "0x2"}, 404, "No job"),
        ({"agreementId": "112"}, 404, "No job"),
        ({"workflow": workflow(owner="0x2")}, 404, "No job"),
        ({"workflow": workflow(agreementId="112")}, 400, "agreementId: a job is restarted under its own agreement"),
        ({"workflow": workflow(stages=[])}, 400, "Missing stages"),
    ],
    ids=["id", "owner", "agreement", "owner inside", "agreement inside", "document"],
)
def test_a_restart_that_names_something_else_is_refused(
    local: Client, change: dict[str, Any], code: int, text: str
) -> None:
    """The job stays as it ended. To who names another owner there is no such job, as in any other call."""
    job_id = local.started()
    local.put(COMPUTE, params={"jobId": job_id})
    answer = local.post(COMPUTE, json={"jobId": job_id, **change})
    assert code == answer.status_code
    assert answer.json()["error"].startswith(text)
    assert Status.STOPPED is local.job(job_id).status


def test_a_restart_is_signed_over_the_job_too(listed: Client) -> None:
    """owner + jobId + nonce, as every call that names a job."""
    job_id = listed.started()
    named = {"owner": OWNER, "jobId": job_id}
    listed.put(COMPUTE, json=named | signed(PROVIDER, OWNER, job_id))
    refused = listed.post(COMPUTE, json=named | signed(PROVIDER, OWNER))
    assert 403 == refused.status_code
    (job,) = listed.post(COMPUTE, json=named | signed(PROVIDER, OWNER, job_id)).json()
    assert 1 == job["status"]


# -- Refusals, in the words of the original


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "payload seems empty."),
        ({"nonce": 1}, '"workflow" is required in the call to POST:/compute'),
        ({"workflow": {"stages": [stage()], "owner": OWNER}}, '"agreementId" is required in the call to POST:/compute'),
        ({"workflow": workflow(stages=[])}, "Missing stages"),
        ({"workflow": workflow(stages=None)}, "Missing stages"),
        ({"workflow": {"agreementId": "1", "owner": OWNER}}, "Missing stages"),
        ({"workflow": workflow(), "environment": "nope"}, "Environment invalid or does not exist"),
        (
            {"workflow": workflow(stages=[stage(compute={"namespace": "nope"})])},
            "Environment invalid or does not exist",
        ),
        ({"workflow": workflow(stages=[stage(compute={})])}, "Environment invalid or does not exist"),
        (
            {"workflow": workflow(), "agreementId": "2"},
            "agreementId: the one in the workflow and the one beside it differ",
        ),
        ({"workflow": workflow(), "owner": "0x2"}, "owner: the one in the workflow and the one beside it differ"),
        ({"workflow": workflow(), "jobId": "1"}, "jobId must be 32 hexadecimal digits"),
        ({"workflow": workflow(), "jobId": ""}, "jobId must be 32 hexadecimal digits"),
        ({"workflow": [1]}, "workflow: Input should be a valid dictionary"),
    ],
)
def test_a_job_that_cannot_start_is_refused_in_documented_words(local: Client, body: Any, text: str) -> None:
    """400 and the operator's text."""
    answer = local.post(COMPUTE, json=body)
    assert (400, text) == (answer.status_code, answer.json()["error"])


@pytest.mark.parametrize("part", ["algorithm", "compute", "input", "output"])
def test_a_missing_part_is_named_with_its_stage(local: Client, part: str) -> None:
    """``Missing <part> in stage <n>``."""
    broken = {key: value for key, value in stage(index=1).items() if key != part}
    answer = local.post(INIT, json={"workflow": workflow(stages=[stage(), broken])})
    assert (400, f"Missing {part} in stage 1") == (answer.status_code, answer.json()["error"])
    assert [{"path": f"stages.1.{part}", "message": "is required"}] == answer.json()["problems"]


def test_every_problem_of_a_document_is_told_at_once(local: Client) -> None:
    """With its path, and nothing of what the document holds."""
    broken = {"input": [{"id": "a", "url": 5}], "algorithm": {"rawcode": "hunter2"}}
    answer = local.post(INIT, json={"workflow": {"owner": OWNER, "stages": [broken]}})
    assert 400 == answer.status_code
    assert {"agreementId", "stages.0.compute", "stages.0.input.0.url", "stages.0.output"} <= {
        problem["path"] for problem in answer.json()["problems"]
    }
    for text in ("Missing compute in stage 0", "Missing output in stage 0"):
        assert text in answer.json()["error"]
    assert "hunter2" not in answer.text


def test_an_agreement_is_used_once(local: Client) -> None:
    """Another document under the agreement of a job there is."""
    start(local)
    answer = local.post(INIT, json={"workflow": workflow(stages=[stage(input=[])])})
    assert (400, "`agreementId` already in use for other job.") == (answer.status_code, answer.json()["error"])


@pytest.mark.parametrize(("method", "url"), [("GET", STATUS), ("GET", COMPUTE), ("PUT", COMPUTE), ("DELETE", COMPUTE)])
@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "You have to specify one of agreementId, jobId or owner"),
        ({"jobId": "1", "owner": OWNER}, "jobId must be 32 hexadecimal digits"),
        ({"jobId": "", "owner": OWNER}, "jobId must be 32 hexadecimal digits"),
        ({"jobId": None, "owner": OWNER}, "jobId: Input should be a valid string"),
        ({"jobId": "g" * 32, "owner": OWNER}, "jobId must be 32 hexadecimal digits"),
        ({"agreementId": "", "owner": OWNER}, "agreementId: String should have at least 1 character"),
        ({"agreementId": None, "owner": OWNER}, "agreementId: Input should be a valid string"),
        ({"owner": "\x00"}, r"owner: String should match pattern '^[^\x00-\x1f\x7f]+$'"),
    ],
)
def test_a_selector_is_never_read_as_absent(local: Client, method: str, url: str, given: Any, text: str) -> None:
    """In the original a one-letter jobId stopped all of an owner's jobs."""
    job_id = start(local)
    answer = local.request(method, url, json=given)
    assert (400, text) == (answer.status_code, answer.json()["error"])
    assert Status.WARMING_UP == local.job(job_id).status


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        ({"owner": None}, 400, '"owner" is required in the call to GET:/getResult'),
        ({"jobId": None}, 400, '"jobId" is required in the call to GET:/getResult'),
        ({"index": None}, 400, '"index" is required in the call to GET:/getResult'),
        ({"index": "x"}, 400, "index: must be a whole number, or its digits as a text"),
        ({"owner": "0x5"}, 404, "Owner 0x5 mismatch for job {job_id}"),
        ({"index": "-1"}, 404, "Negative index -1"),
        ({"index": "5"}, 404, "No such index 5 in this compute job"),
        ({"index": "3"}, 404, "No such index 3 in this compute job"),
        ({"jobId": UNKNOWN}, 404, f"No job {UNKNOWN}"),
    ],
)
def test_a_result_that_is_not_there_is_refused_in_documented_words(
    local: Client, change: dict[str, Any], code: int, text: str
) -> None:
    """getResult; index 3 is a log for admins only."""
    job_id = start(local)
    publish(local, job_id)
    given = {"jobId": job_id, "index": "0", "owner": OWNER, **change}
    answer = local.get(RESULT, params={name: value for name, value in given.items() if value is not None})
    assert (code, text.format(job_id=job_id)) == (answer.status_code, answer.json()["error"])


def test_a_job_without_results_says_so(local: Client) -> None:
    """getResult before anything is published."""
    job_id = start(local)
    answer = local.get(RESULT, params={"jobId": job_id, "index": 0, "owner": OWNER})
    assert (404, f"No results for job {job_id}") == (answer.status_code, answer.json()["error"])


# -- Who may


def test_a_listed_provider_runs_a_job_from_start_to_end(listed: Client) -> None:
    """Each call signed over owner + [jobId] + nonce, with a greater nonce each time."""
    body = {"workflow": {"stages": [stage()]}, "agreementId": "9", "owner": OWNER, "environment": "withgpu"}
    (job,) = listed.post(COMPUTE, json=body | signed(PROVIDER, OWNER)).json()
    job_id = job["jobId"]
    publish(listed, job_id)
    named = {"owner": OWNER, "jobId": job_id}
    (job,) = listed.get(COMPUTE, params=named | signed(PROVIDER, OWNER, job_id)).json()
    assert ["a/model.csv", "b.bin", "algorithm.log"] == [entry["filename"] for entry in job["results"]]
    file = listed.get(RESULT, params=named | {"index": "0"} | signed(PROVIDER, OWNER, job_id))
    assert b"x,y\n" == file.content
    assert 1 == len(listed.get("/api/v1/operator/runningjobs", params=signed(PROVIDER)).json())
    assert [7] == [job["status"] for job in listed.put(COMPUTE, json=named | signed(PROVIDER, OWNER, job_id)).json()]
    assert [8] == [job["status"] for job in listed.delete(COMPUTE, json=named | signed(PROVIDER, OWNER, job_id)).json()]


@pytest.mark.parametrize(
    ("method", "url", "given"),
    [
        ("POST", INIT, {"workflow": workflow()}),
        ("POST", COMPUTE, {"workflow": workflow()}),
        ("GET", COMPUTE, {"owner": OWNER}),
        ("PUT", COMPUTE, {"owner": OWNER}),
        ("DELETE", COMPUTE, {"owner": OWNER}),
        ("GET", RESULT, {"owner": OWNER, "jobId": UNKNOWN, "index": 0}),
        ("GET", "/api/v1/operator/runningjobs", {}),
    ],
)
def test_with_a_list_of_providers_every_call_is_signed_by_one(
    listed: Client, method: str, url: str, given: dict[str, Any]
) -> None:
    """Unsigned, half signed, signed by nobody, signed by a stranger."""
    call = f"{method}:/{url.rpartition('/')[2]}"
    owner, job_id = given.get("owner", OWNER if "workflow" in given else ""), given.get("jobId", "")
    stranger = signed(STRANGER, owner, job_id)

    def refused(extra: dict[str, Any]) -> tuple[int, str]:
        answer = listed.request(method, url, json=given | extra)
        return answer.status_code, answer.json()["error"]

    assert (400, f'"providerSignature" is required in the call to {call}') == refused({})
    assert (400, f'"nonce" is required in the call to {call}') == refused({"providerSignature": "0x00"})
    assert (401, "Failed to recover address") == refused({"providerSignature": "0x00", "nonce": 1})
    assert (403, f"{STRANGER.address.lower()} signed owner + [jobId] + nonce and is not on the list of providers") == (
        refused(stranger)
    )
    assert [] == listed.get(STATUS, params={"owner": OWNER}).json()


def test_unsigned_status_has_no_urls_and_a_providers_has(listed: Client) -> None:
    """The early dialect was signed by nobody: with a list of providers it tells how a job is doing, no more."""
    job_id = listed.started()
    publish(listed, job_id)
    named = {"owner": OWNER, "jobId": job_id}
    (unsigned,) = listed.get(STATUS, params=named).json()
    (provider,) = listed.get(STATUS, params=named | signed(PROVIDER, OWNER, job_id)).json()
    (admin,) = listed.get(STATUS, params=named | signed(ADMIN, OWNER, job_id)).json()
    urls = ("algologURL", "configlogURL", "publishlogURL")
    assert ([None, None, None], []) == ([unsigned[name] for name in urls], unsigned["outputsURL"])
    assert [True, False, False] == [provider[name] is not None for name in urls]
    assert [True, True, True] == [admin[name] is not None for name in urls]
    assert b"secret\n" == listed.get(admin["configlogURL"]).content


def test_only_an_admin_reads_the_logs_for_admins(listed: Client) -> None:
    """getResult of the configuration log."""
    job_id = listed.started()
    publish(listed, job_id)
    named = {"owner": OWNER, "jobId": job_id, "index": 3}
    assert 404 == listed.get(RESULT, params=named | signed(PROVIDER, OWNER, job_id)).status_code
    assert b"secret\n" == listed.get(RESULT, params=named | signed(ADMIN, OWNER, job_id)).content


def test_a_replayed_call_is_refused(listed: Client) -> None:
    """An equal nonce is a replay, and so is a smaller one."""
    call = {"owner": OWNER} | signed(PROVIDER, OWNER, nonce=10**40)
    assert 200 == listed.get(COMPUTE, params=call).status_code
    smaller = {"owner": OWNER} | signed(PROVIDER, OWNER, nonce=10**40 - 1)
    for again in (call, smaller):
        answer = listed.get(COMPUTE, params=again)
        assert (401, "`nonce` must be greater than the last one accepted for this address") == (
            answer.status_code,
            answer.json()["error"],
        )


def test_a_refused_call_uses_no_nonce(listed: Client) -> None:
    """Nobody can use up another's nonces with a signature that is not theirs."""
    forged = {"owner": OWNER, "nonce": 10**60, "providerSignature": sign(STRANGER, f"{OWNER}{10**60}")}
    assert 403 == listed.get(COMPUTE, params=forged).status_code
    assert 200 == listed.get(COMPUTE, params={"owner": OWNER} | signed(PROVIDER, OWNER)).status_code


def test_a_nonce_with_a_fraction_is_signed_as_written(listed: Client) -> None:
    """The original Provider signs its calls to the operator with Python's ``timestamp() * 1000``."""
    for nonce in (1695652412345.678, "1695652412345.6781", 1695652412346.0):
        call = {"owner": OWNER} | signed(PROVIDER, OWNER, nonce=nonce)
        assert 200 == listed.request("GET", COMPUTE, json=call).status_code, nonce


@pytest.mark.parametrize(
    "nonce", ["01", "-1", "+1", "1e5", " 1", "0x1", "1_0", "٣", "", "1.", ".5", True, -1, 1e30, [1]]
)
def test_a_nonce_that_is_no_plain_number_is_refused(listed: Client, nonce: Any) -> None:
    """Two readers could understand it differently."""
    call = {"owner": OWNER, "providerSignature": "0x" + "1" * 130, "nonce": nonce}
    answer = listed.request("GET", COMPUTE, json=call)
    assert 400 == answer.status_code
    assert answer.json()["error"].startswith("nonce: must be a number in plain digits")


def test_a_signature_without_the_nonce_counts_in_a_sequence_of_its_own(listed: Client) -> None:
    """The form the original checked by mistake. Whoever sees it must not be able to use up the other nonces."""
    without = {"owner": OWNER, "providerSignature": sign(PROVIDER, OWNER)}
    assert 200 == listed.get(COMPUTE, params=without | {"nonce": 10**50}).status_code
    assert 401 == listed.get(COMPUTE, params=without | {"nonce": 10**50}).status_code
    assert 200 == listed.get(COMPUTE, params={"owner": OWNER} | signed(PROVIDER, OWNER)).status_code


def test_a_signature_cannot_be_cut_elsewhere(listed: Client) -> None:
    """``owner`` one digit shorter and the nonce one longer is the same text."""
    owner = "0x" + "1" * 40
    once = {"owner": owner} | signed(PROVIDER, owner, nonce=77)
    assert 200 == listed.get(COMPUTE, params=once).status_code
    answer = listed.get(COMPUTE, params=once | {"owner": owner[:-1], "nonce": "177"})
    assert (400, "owner: in a signed call it must be an address, 0x and 40 hex digits") == (
        answer.status_code,
        answer.json()["error"],
    )


def test_without_a_list_a_signature_still_counts(folder: Path) -> None:
    """It is checked, its nonce is used up, and an admin's shows what is for admins."""
    with client(settings(folder, admins=ADMIN.address)) as local:
        job_id = start(local)
        publish(local, job_id)
        call = {"jobId": job_id} | signed(ADMIN, "", job_id)
        assert local.get(STATUS, params=call).json()[0]["configlogURL"]
        assert 401 == local.get(STATUS, params=call).status_code
        assert 401 == local.get(STATUS, params={"jobId": job_id, "providerSignature": "0x", "nonce": 1}).status_code


@pytest.mark.parametrize("peer", ["203.0.113.7", "10.0.0.1", "::ffff:203.0.113.7", ""])
def test_without_a_list_of_providers_only_this_machine_is_answered(folder: Path, peer: str) -> None:
    """By the address the call comes from; asked of every call."""
    with client(settings(folder), peer=peer) as remote:
        for method, url in (("POST", INIT), ("GET", STATUS), ("GET", "/api/v1/operator/environments")):
            assert 403 == remote.request(method, url).status_code
        assert 200 == remote.get("/health").status_code


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"host": "127.0.0.1:8030"}, 200),
        ({"host": "[::1]:8030"}, 200),
        ({"host": "rebound.example.com:8030"}, 403),
        ({"host": "[broken"}, 403),
        ({"origin": "http://localhost:8030"}, 200),
        ({"origin": "http://localhost:3000"}, 403),
        ({"origin": "https://evil.example.com"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"x-forwarded-for": "203.0.113.7"}, 403),
    ],
)
def test_without_a_list_of_providers_no_other_sites_page_is_answered(
    local: Client, headers: dict[str, str], code: int
) -> None:
    """A page may post blindly to this machine, and by a name of its own that points here read the answers."""
    assert code == local.get("/api/v1/operator/environments", headers=headers).status_code


def test_told_so_in_so_many_words_everybody_is_answered(folder: Path) -> None:
    """allow_open_operator."""
    with client(settings(folder, host="0.0.0.0", allow_open_operator=True), peer="203.0.113.7") as remote:
        job_id = start(remote)
        assert [job_id] == [job["jobId"] for job in remote.get(COMPUTE, params={"jobId": job_id}).json()]
