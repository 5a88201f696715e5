"""
A whole job in a work pool of Prefect's own Kubernetes worker: worker, upkeep, flow and algorithm are pods, made by the
manifests and the job template of the repository. Server and API are on this machine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import psutil
import pytest
import yaml

from cli.service import ROOT, Service, free_port
from tests.docker_engine import IMAGE
from tests.documents import stage
from tests.kubernetes_cluster import GATEWAY, NAMESPACE, Cluster
from tests.product_image import PRODUCT, USER, build_product
from tests.runner_bench import eventually
from tests.test_end_to_end import Consumer, workflow

# The first of them builds the image.
pytestmark = [pytest.mark.kubernetes, pytest.mark.worker, pytest.mark.slow, pytest.mark.timeout(900)]

COMPLETED: Final = 70
STOPPED: Final = 7

CLAIM: Final = "c2d-flows"
"""The cluster of the tests has one of the name that is shipped, of another folder."""

TOKEN: Final = "/var/run/secrets/kubernetes.io/serviceaccount"

OF_NODE: Final = {"/etc/hosts", "/dev/termination-log"}
"""What a kubelet puts into every container."""

FLOWS: Final = "prefect.io/flow-run-id"
"""Label of what Prefect's worker makes."""

WRITES: Final = "import os\nopen(os.environ['OUTPUTS'] + '/n.txt', 'w').write('made')\n"
SLEEPS: Final = "import time\nprint('begun', flush=True)\ntime.sleep({})\n" + WRITES


def here(text: str, state: Path, prefect_port: int) -> str:
    """
    What of the repository's files has to be another one here: the claim; its mount, since the API reads results at the
    same path as flows write them; and where the server is, for there is no name server.
    """
    return (
        text.replace('"c2d-work"', f'"{CLAIM}"')
        .replace("{claimName: c2d-work}", f"{{claimName: {CLAIM}}}")
        .replace("/var/lib/c2d", str(state))
        .replace("prefect-server.c2d:4200", f"{GATEWAY}:{prefect_port}")
    )


def definitions(kubernetes: Path, state: Path) -> Path:
    """prefect.yaml in *kubernetes*, with small limits."""
    path = kubernetes / "prefect.yaml"
    document = yaml.safe_load(path.read_text())
    (environment,) = document["definitions"]["environments"]
    limits = {"seconds": 60, "memory_bytes": 2**28, "disk_bytes": 2**26, "cpus": 0.2}
    environment["offer"] |= {"max_jobs": 4, "limits": limits}
    environment["kubernetes"]["claim"] = CLAIM
    for deployment in document["deployments"]:
        deployment.pop("schedules", None)
        # That what is left of a flow is seen to go.
        deployment["work_pool"]["job_variables"]["finished_job_ttl"] = 5
    path.write_text(yaml.safe_dump(document))
    return path


def volume(state: Path) -> Iterator[Mapping[str, Any]]:
    size = {"storage": "10Gi"}
    common = {"accessModes": ["ReadWriteMany"], "storageClassName": CLAIM}
    yield {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": CLAIM},
        "spec": {**common, "capacity": size, "hostPath": {"path": str(state)}},
    }
    yield {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": CLAIM, "namespace": NAMESPACE},
        "spec": {**common, "resources": {"requests": size}},
    }


def parts(manifests: str, state: Path) -> list[dict[str, Any]]:
    """Of all that is shipped: worker, upkeep, their accounts and rights, and the secrets that they and flows read."""
    documents = [document for document in yaml.safe_load_all(manifests) if document]
    kept = [each for each in documents if each["kind"] in ("ServiceAccount", "Role", "RoleBinding", "Secret")]
    for document in documents:
        if document["kind"] == "Deployment" and document["metadata"]["name"] in ("c2d-worker", "c2d-upkeep"):
            (container,) = document["spec"]["template"]["spec"]["containers"]
            # The kubelet of the tests is not in the network of its pods, so it would find none of them healthy.
            for probe in ("startupProbe", "livenessProbe"):
                container.pop(probe, None)
            # The image says where the state is, which is elsewhere here.
            container["env"].append({"name": "C2D_STATE", "value": str(state)})
            kept.append(document)
    return kept


@dataclass(frozen=True)
class Pool:
    """A service whose environment ``kubernetes`` is served by pods."""

    service: Service
    cluster: Cluster
    state: Path
    consumer: Consumer
    secrets: tuple[str, ...]
    """None of which may be read in a pod's description or in what a part says."""

    def flows(self) -> list[dict[str, Any]]:
        """The pods that run flows."""
        return list(self.cluster.get("pods", "-n", NAMESPACE, "-l", FLOWS)["items"])

    def algorithms(self) -> list[dict[str, Any]]:
        return list(self.cluster.get("pods", "-n", NAMESPACE, "-l", "c2d.job")["items"])

    def submit(self, seconds: float = 0.0) -> str:
        container = {"image": IMAGE.name, "tag": IMAGE.tag, "entrypoint": "python3 $ALGO"}
        algorithm = {"rawcode": SLEEPS.format(seconds), "container": container}
        return self.consumer.submit(workflow(stages=[stage(algorithm=algorithm, environment="kubernetes")]))

    def submit_running(self, seconds: float) -> str:
        """A job whose algorithm runs."""
        job_id = self.submit(seconds)
        if not eventually(lambda: any(running(pod) for pod in self.algorithms()), 180):
            pytest.fail(f"{self.consumer.job(job_id)}\n{self.told()}")
        return job_id

    def completed(self, job_id: str) -> dict[str, Any]:
        job = self.consumer.wait(job_id)
        assert COMPLETED == job["status"], f"{job}\n{self.told()}"
        return job

    def said(self) -> dict[str, str]:
        """What every container of the product has said, by its name."""
        client = self.cluster.engine.client.api
        found = client.containers(all=True, filters={"ancestor": PRODUCT.reference})
        return {each["Names"][0]: client.logs(each["Id"]).decode(errors="replace") for each in found}

    def told(self) -> str:
        """For whoever reads of a failure."""
        events = self.cluster.kubectl("get", "events", "--all-namespaces", "--sort-by=.lastTimestamp")
        return "\n".join([events[-3000:], *(f"{name}: {text[-2500:]}" for name, text in self.said().items())])


def remove(cluster: Cluster) -> None:
    """All that runs, and nothing else: the accounts and rights are those of other tests as well."""
    cluster.kubectl("delete", "deployments", "--all", "--all-namespaces")
    cluster.kubectl("delete", "jobs,pods", "--all", "--all-namespaces", "--grace-period=0", "--force")


def running(pod: Mapping[str, Any]) -> bool:
    states = [each["state"] for each in pod["status"].get("containerStatuses", ())]
    return bool(states) and all("running" in state for state in states)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> Iterator[Pool]:
    build_product(cluster.engine)
    folder = tmp_path_factory.mktemp("kubernetes-pool")
    kubernetes = folder / "kubernetes"
    shutil.copytree(ROOT / "deploy" / "kubernetes", kubernetes)
    subprocess.run([kubernetes / "make-secrets"], check=True, timeout=30)
    login = (kubernetes / "prefect.env").read_text().strip().partition("=")[2]
    key = (kubernetes / "key").read_text().strip()
    with ExitStack() as stack:
        # A folder as the root of a volume is: pods of the product own it, and its parents everybody may pass.
        state = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="c2d-state-")))
        os.chown(state, USER, USER)
        port = free_port()
        for name in ("prefect.yaml", "base-job-template.json", "flows/upkeep.yaml", "service/worker.yaml"):
            file = kubernetes / name
            file.write_text(here(file.read_text(), state, port))
        (folder / "state").mkdir()
        shutil.copy(kubernetes / "key", folder / "state" / "key")
        service = stack.enter_context(
            Service(
                state=folder / "state",
                definitions=definitions(kubernetes, state),
                prefect_port=port,
                variables={
                    "PREFECT_SERVER_API_AUTH_STRING": login,
                    "PREFECT_API_AUTH_STRING": login,
                    "C2D_IMAGE": PRODUCT.reference,
                    "C2D_RESULTS": (state / "store").as_uri(),
                    # What could be in the way of a flow cannot be seen from here.
                    "C2D_LOCAL_WORKERS": "false",
                },
            )
        )
        stack.enter_context(cluster.opened(port))
        images = {"name": "compute-to-data", "newName": PRODUCT.name, "newTag": PRODUCT.tag}
        document = yaml.safe_load((kubernetes / "kustomization.yaml").read_text())
        (kubernetes / "kustomization.yaml").write_text(yaml.safe_dump({**document, "images": [images]}))
        cluster.kubectl("apply", "-f", str(kubernetes / "service" / "namespace.yaml"))
        made = parts(cluster.kubectl("kustomize", str(kubernetes)), state)
        http = stack.enter_context(httpx.Client(base_url=service.api_url, timeout=60.0))
        stack.callback(remove, cluster)
        cluster.apply(*volume(state), *made)
        yield Pool(service, cluster, state, Consumer(http), (login, key))


def test_a_flow_in_a_pod_of_its_own(pool: Pool) -> None:
    """
    The job completes. Its flow ran with the account that may make Jobs and its algorithm with none, both without root
    and capabilities; no secret can be read in what the cluster keeps of them, nor in what any part has said.
    """
    job_id = pool.submit_running(15)
    (flow,), (algorithm,) = pool.flows(), pool.algorithms()
    assert ("c2d-worker", "c2d-algorithm") == tuple(pod["spec"]["serviceAccountName"] for pod in (flow, algorithm))
    for pod in (flow, algorithm):
        whole = pod["spec"]["securityContext"]
        assert (True, USER, {"type": "RuntimeDefault"}) == (
            whole["runAsNonRoot"],
            whole["runAsUser"],
            whole["seccompProfile"],
        )
        for container in pod["spec"]["containers"]:
            own = container["securityContext"]
            assert (False, True, ["ALL"]) == (
                own["allowPrivilegeEscalation"],
                own["readOnlyRootFilesystem"],
                own["capabilities"]["drop"],
            )
    # What the engine has made of it.
    client = pool.cluster.engine.client.api
    found = [
        client.inspect_container(each["Id"])
        for pod in (flow, algorithm)
        for each in client.containers(filters={"label": f"io.kubernetes.pod.uid={pod['metadata']['uid']}"})
        if each["Labels"]["io.kubernetes.docker.type"] == "container"
    ]
    assert ["algorithm", "log", "prefect-job"] == sorted(
        each["Config"]["Labels"]["io.kubernetes.container.name"] for each in found
    )
    writable = {
        "prefect-job": {"/tmp", str(pool.state)},
        "algorithm": {"/data/outputs", "/data/logs", "/tmp", "/dev/shm"},
        "log": {"/log"},
    }
    for each in found:
        name = each["Config"]["Labels"]["io.kubernetes.container.name"]
        host = each["HostConfig"]
        assert (True, ["ALL"], False) == (host["ReadonlyRootfs"], host["CapDrop"], host["Privileged"])
        assert "no-new-privileges" in str(host["SecurityOpt"])
        assert str(USER) == each["Config"]["User"].partition(":")[0]
        assert (name == "prefect-job") == any(mount["Destination"] == TOKEN for mount in each["Mounts"])
        assert writable[name] == {mount["Destination"] for mount in each["Mounts"] if mount["RW"]} - OF_NODE
    # By name, in the one pod that needs it.
    login = {"secretKeyRef": {"key": "PREFECT_API_AUTH_STRING", "name": "c2d-prefect"}}
    (container,) = flow["spec"]["containers"]
    assert [login] == [each["valueFrom"] for each in container["env"] if each["name"] == "PREFECT_API_AUTH_STRING"]
    kept = json.dumps([pool.cluster.get(kind, "-n", NAMESPACE) for kind in ("pods", "jobs", "events")])
    assert not [secret for secret in pool.secrets if secret in kept]
    assert "PREFECT" not in json.dumps(algorithm["spec"])

    job = pool.completed(job_id)
    assert b"made" == pool.consumer.read(job, "n.txt")
    said = pool.said()
    assert any("worker" in name for name in said) and any("upkeep" in name for name in said)
    assert not [name for name, text in said.items() if any(secret in text for secret in pool.secrets)]
    assert not [name for name, text in said.items() if "Traceback" in text or "Forbidden" in text], said
    # The upkeep sees who works on a folder from its own pod, and leaves them alone.
    assert not [name for name, text in said.items() if "was ended" in text], said
    assert eventually(lambda: not pool.cluster.jobs() and not pool.flows() and not pool.algorithms(), 60)
    assert eventually(lambda: not (pool.state / "work" / job_id).exists(), 30)


def test_a_stop_reaches_a_flow_in_a_pod(pool: Pool) -> None:
    """The algorithm's Job is asked to go within ten seconds of the request. Nothing is left of it or of the flow's."""
    job_id = pool.submit_running(50)
    assert pool.consumer.http.put("/api/v1/operator/compute", params={"jobId": job_id}).is_success

    def going() -> bool:
        jobs = pool.cluster.get("jobs", "-n", NAMESPACE, "-l", "c2d.job")["items"]
        return all(job["metadata"].get("deletionTimestamp") for job in jobs)

    assert eventually(going, 10)
    job = pool.consumer.wait(job_id)
    assert STOPPED == job["status"], f"{job}\n{pool.told()}"
    assert eventually(lambda: not pool.cluster.jobs() and not pool.flows() and not pool.algorithms(), 60)
    assert STOPPED == pool.consumer.job(job_id)["status"]


def test_a_flow_whose_pod_is_killed_goes_on(pool: Pool) -> None:
    """
    SIGKILL of all that runs in the flow's pod: at no moment the job seems to have ended, its algorithm is not left
    running, and it completes in another pod.
    """
    job_id = pool.submit_running(20)
    (flow,), (algorithm,) = pool.flows(), pool.algorithms()
    client = pool.cluster.engine.client.api
    (container,) = [
        each["Id"]
        for each in client.containers(filters={"label": f"io.kubernetes.pod.uid={flow['metadata']['uid']}"})
        if each["Labels"]["io.kubernetes.docker.type"] == "container"
    ]
    psutil.Process(client.inspect_container(container)["State"]["Pid"]).kill()
    again = pool.consumer.wait(job_id, lambda job: job["status"] == 1 or job["dateFinished"] is not None)
    assert (1, None) == (again["status"], again["dateFinished"]), f"{again}\n{pool.told()}"
    job = pool.completed(job_id)
    assert b"made" == pool.consumer.read(job, "n.txt")
    assert 2 == [passed["status"] for passed in job["history"]].count(40)
    left = {pod["metadata"]["uid"] for pod in (*pool.flows(), *pool.algorithms())}
    assert algorithm["metadata"]["uid"] not in left
    assert eventually(lambda: not pool.cluster.jobs() and not pool.flows() and not pool.algorithms(), 60)
