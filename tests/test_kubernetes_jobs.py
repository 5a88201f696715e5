"""Jobs in a cluster, over the whole service: two stages, waiting for a place, a missing image, stopped, killed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import httpx
import psutil
import pytest
import yaml

from cli.service import Service
from tests.conftest import DEFINITIONS
from tests.docker_engine import IMAGE
from tests.documents import outputs_of, stage
from tests.kubernetes_cluster import NAMESPACE, Cluster
from tests.runner_bench import eventually
from tests.test_end_to_end import Consumer, workflow

pytestmark = [pytest.mark.kubernetes, pytest.mark.worker, pytest.mark.slow]

WRITES: Final = "import os\nopen(os.environ['OUTPUTS'] + '/n.txt', 'w').write('from a pod')\nprint('written')\n"
READS: Final = (
    "import os\nfound = open(os.environ['INPUTS'] + '/first/n.txt').read()\n"
    "open(os.environ['OUTPUTS'] + '/same.txt', 'w').write(found + str(os.getuid() >= 1000))\n"
)
SLEEPS: Final = "import time\nprint('begun', flush=True)\ntime.sleep(50)\n"


@pytest.fixture(scope="module")
def kubernetes_service(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> Iterator[Service]:
    """A service whose only environment runs Jobs, with the account of the manifests; it offers GPUs."""
    folder = tmp_path_factory.mktemp("kubernetes-service")
    tests = yaml.safe_load(DEFINITIONS.read_text())
    (default, *_) = tests["definitions"]["environments"]
    limits = {**default["offer"]["limits"], "gpus": 2, "cpus": 0.2}
    tests["definitions"]["environments"] = [
        {
            **default,
            "offer": {**default["offer"], "max_jobs": 6, "limits": limits, "gpus": 2},
            "runner": "kubernetes",
            "kubernetes": {"mount": str(cluster.mount), "wait_seconds": 30},
        }
    ]
    tests["deployments"] = [
        each for each in tests["deployments"] if each["name"] in ("register-environments", "default")
    ]
    definitions = folder / "prefect.yaml"
    definitions.write_text(yaml.safe_dump(tests))
    variables = {"C2D_NETWORKS": "127.0.0.0/8", "KUBECONFIG": str(cluster.worker)}
    with Service(state=folder / "state", definitions=definitions, variables=variables) as started:
        yield started


@pytest.fixture(scope="module")
def consumer(kubernetes_service: Service) -> Iterator[Consumer]:
    with httpx.Client(base_url=kubernetes_service.api_url, timeout=60.0) as http:
        yield Consumer(http)


def code(text: str, tag: str = IMAGE.tag) -> dict[str, Any]:
    return {"rawcode": text, "container": {"image": IMAGE.name, "tag": tag, "entrypoint": "python3 $ALGO"}}


def name_of(job_id: str) -> str:
    return f"c2d-{job_id}-0"


def test_a_job_in_a_cluster(consumer: Consumer, cluster: Cluster) -> None:
    """Two stages: what the first writes the second reads, and what that writes is published."""
    job = consumer.wait(
        consumer.submit(
            workflow(
                stages=[
                    stage(index=0, algorithm=code(WRITES)),
                    stage(index=1, input=[outputs_of(0, id="first")], algorithm=code(READS)),
                ]
            )
        )
    )
    assert (70, "Job completed") == (job["status"], job["statusText"]), job["reason"]
    assert b"from a podTrue" == consumer.read(job, "1/same.txt"), job["results"]
    assert eventually(lambda: not cluster.jobs(), 30)


def test_a_missing_image_is_status_11(consumer: Consumer) -> None:
    """It is known when the run is to begin, and told as the image's failure."""
    job = consumer.wait(consumer.submit(workflow(stages=[stage(algorithm=code(SLEEPS, tag="none"))])))
    assert (11, "Pulling algorithm image failed") == (job["status"], job["statusText"]), job["reason"]
    assert "c2d-tests/python:none could not be pulled" in job["reason"]


def test_a_job_waits_for_gpus(consumer: Consumer, cluster: Cluster) -> None:
    """The scheduler's words are the job's reason while it waits; it runs when there are any, or ends with them."""
    wants = stage(algorithm=code(WRITES), compute={"resources": {"gpu": 2}})
    id = consumer.submit(workflow(stages=[wants]))
    waits = consumer.wait(id, lambda job: "Insufficient nvidia.com/gpu" in job["reason"] or job["dateFinished"])
    assert waits["dateFinished"] is None, waits["reason"]
    assert 40 == waits["status"]
    cluster.advertise(2)
    try:
        assert 70 == consumer.wait(id)["status"]
    finally:
        cluster.advertise(0)
    ended = consumer.wait(consumer.submit(workflow(stages=[wants])))
    assert ended["status"] not in (70, 40)
    assert "there was no place for it within 30 s" in ended["reason"]
    assert "Insufficient nvidia.com/gpu" in ended["reason"]


def test_a_stopped_job_leaves_no_pod(consumer: Consumer, cluster: Cluster) -> None:
    """Its Job is asked to go while its flow is being stopped, and it goes."""
    id = consumer.submit(workflow(stages=[stage(algorithm=code(SLEEPS))]))
    assert eventually(lambda: name_of(id) in cluster.jobs(), 60)
    assert eventually(lambda: any("running" in str(pod["status"]) for pod in cluster.pods()), 60)
    assert consumer.http.put("/api/v1/operator/compute", params={"jobId": id}).is_success

    def going() -> bool:
        jobs = cluster.get("jobs", "-n", NAMESPACE)["items"]
        return all(job["metadata"].get("deletionTimestamp") for job in jobs)

    assert eventually(going, 20)
    assert 7 == consumer.wait(id)["status"]
    assert eventually(lambda: not cluster.jobs(), 60)


def test_a_killed_flow_leaves_no_second_pod(consumer: Consumer, kubernetes_service: Service, cluster: Cluster) -> None:
    """
    After SIGKILL of the process that runs a job the next try ends what the first has left before it begins. Deleting
    the job ends that one.
    """
    id = consumer.submit(workflow(stages=[stage(algorithm=code(SLEEPS))]))
    assert eventually(lambda: name_of(id) in cluster.jobs(), 60)
    (first,) = [pod["metadata"]["uid"] for pod in cluster.pods() if name_of(id) in pod["metadata"]["name"]]
    lock = kubernetes_service.state / "work" / id / "lock"
    flow = next(
        process for process in psutil.process_iter() if any(file.path == str(lock) for file in _open_files(process))
    )
    flow.kill()

    def uids() -> list[str]:
        found = [pod["metadata"]["uid"] for pod in cluster.pods() if name_of(id) in pod["metadata"]["name"]]
        assert len(found) <= 1
        return found

    assert eventually(lambda: first not in uids(), 90)
    assert eventually(lambda: bool(uids()), 90)
    assert consumer.http.delete("/api/v1/operator/compute", params={"jobId": id}).is_success
    assert eventually(lambda: not cluster.jobs() and not uids(), 60)


def _open_files(process: psutil.Process) -> list[Any]:
    try:
        return list(process.open_files())
    except psutil.Error:
        return []
