"""
What ends by itself, over the whole service: what a job left goes some seconds after its end and its record stays; a job
that waits for too long is not begun.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Final

import httpx
import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings

from cli.service import ROOT, Service
from flows.environments import read_definitions
from flows.expire import FLOW_NAME
from tests.documents import stage
from tests.test_end_to_end import OPERATOR, OUTPUT, Consumer, code, workflow

pytestmark = [pytest.mark.worker, pytest.mark.sandbox, pytest.mark.slow]

ENVIRONMENT: Final = "brief"
KEPT_FOR: Final = 10.0
"""Seconds, by tests/prefect.yaml."""

FAILS: Final = OUTPUT + "raise SystemExit(3)\n"


@pytest.fixture(scope="module")
def consumer(service: Service) -> Iterator[Consumer]:
    with httpx.Client(base_url=service.api_url, timeout=60.0) as http:
        yield Consumer(http)


def remove_expired(service: Service) -> tuple[FlowRun, list[Any]]:
    """The deployed flow as its schedule would start it, and the tables that it has left."""
    with (
        temporary_settings({PREFECT_API_URL: f"{service.prefect_url}/api"}),
        get_client(sync_client=True) as client,
    ):
        run = client.create_flow_run_from_deployment(client.read_deployment_by_name(f"{FLOW_NAME}/tests").id)
        deadline = time.monotonic() + 120
        while not (run.state and run.state.is_final()) and time.monotonic() < deadline:
            time.sleep(0.5)
            run = client.read_flow_run(run.id)
        tables = client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
        )
    return run, tables


def test_what_a_job_leaves_is_gone_some_time_after_its_end(consumer: Consumer, service: Service) -> None:
    """
    Until then its links hold; from then on they are 410 at once, and the deployed flow removes results and folders.
    """
    jobs: list[str] = []
    for text, status, body in ((OUTPUT, 70, b"done"), (FAILS, 41, b"")):
        # One after the other: what is not looked at in time is gone.
        job_id = consumer.submit(workflow(stages=[stage(algorithm=code(text), environment=ENVIRONMENT)]))
        jobs.append(job_id)
        job = consumer.wait(job_id)
        assert status == job["status"], job
        assert KEPT_FOR == pytest.approx(float(job["expireTimestamp"]) - float(job["dateFinished"]))
        url = job["results"][0]["url"]
        answer = httpx.get(url)
        assert (200, body) == (answer.status_code, answer.content)
        time.sleep(max(0.0, float(job["expireTimestamp"]) - time.time()) + 0.1)
        assert 410 == httpx.get(url).status_code
        named = {"jobId": job_id, "owner": job["owner"], "index": 0}
        assert 410 == consumer.http.get(f"{OPERATOR}/getResult", params=named).status_code
        told = consumer.job(job_id)
        assert (status, "", job["history"]) == (told["status"], told["results"], told["history"])
        assert "its results expired at" in told["reason"]
        stored = service.state / "store" / "results" / job_id
        assert stored.is_dir()
    completed, failed = jobs
    assert (service.state / "work" / failed).is_dir()

    run, tables = remove_expired(service)
    assert run.state is not None and run.state.is_completed(), run.state
    rows = yaml.safe_load(str(tables[0].data))
    assert {completed, failed} <= {row["job"] for row in rows}
    for job_id in (completed, failed):
        assert not (service.state / "store" / "results" / job_id).exists()
        assert not (service.state / "work" / job_id).exists()
        assert consumer.job(job_id)["dateFinished"] is not None
    assert run.id.hex not in [job["jobId"] for job in consumer.http.get(f"{OPERATOR}/runningjobs").json()]
    assert [] == consumer.http.get(f"{OPERATOR}/status", params={"jobId": run.id.hex}).json()

    again, tables = remove_expired(service)
    assert again.state is not None and again.state.is_completed()
    assert [] == tables
    # A job that failed can be done again all the same, from its beginning.
    assert 200 == consumer.http.post(f"{OPERATOR}/compute", json={"jobId": failed}).status_code
    assert 41 == consumer.wait(failed)["status"]


def test_this_checkout_removes_by_a_schedule_in_every_pool() -> None:
    """Prefect's own: a deployment for each work pool, with a time in it."""
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    removing = [each for each in deployments if each["entrypoint"] == "flows.expire.expire"]
    pools = {environment.work_pool for environment in read_definitions(ROOT / "prefect.yaml")}
    assert pools == {each["work_pool"]["name"] for each in removing if each["schedules"]}


def test_a_job_that_waits_too_long_is_not_begun_and_holds_up_nobody(consumer: Consumer, service: Service) -> None:
    """
    Two jobs for one slot: the second says what it waits for and ends as expired. Meanwhile a job of another environment
    on the same pool runs.
    """
    one, other = [
        consumer.submit(
            workflow(stages=[stage(algorithm=code(f"import time\ntime.sleep({seconds})"), environment="impatient")])
        )
        for seconds in (20, 1)
    ]
    late = consumer.wait(other)
    assert (2, "Job expired in queue") == (late["status"], late["statusText"]), late
    assert "did not come within 3 s" in late["reason"]
    assert [1, 2] == [passage["status"] for passage in late["history"]]
    elsewhere = consumer.wait(consumer.submit(workflow(stages=[stage(algorithm=code(OUTPUT))])))
    first = consumer.job(one)
    if first["status"] != 2:
        # Where the machine is too busy to take it within three seconds, both have expired.
        assert 70 == consumer.wait(one)["status"]
    assert 70 == elsewhere["status"]
    assert late == consumer.job(other)
    (queued,) = consumer.http.post(f"{OPERATOR}/compute", json={"jobId": other}).json()
    assert (1, None) == (queued["status"], queued["dateFinished"])
