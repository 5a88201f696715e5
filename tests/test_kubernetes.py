"""What is particular to a cluster: what a pod gets, why it waits, how it ends, what is left of it, what it cannot."""

from __future__ import annotations

import base64
import json
import pickle
import re
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from blocks.limits import MIB
from blocks.runner import Ending, ExitReport, Image, ImageUnavailable
from tests.docker_engine import PASSWORD, USER, Registry, docker_registry, published
from tests.kubernetes_cluster import CLAIM, GATEWAY, NAMESPACE, PIDS, Cluster
from tests.runner_bench import Bench, bench, eventually, sleepers
from tests.runner_support import Dropped, caller, reachable_python

pytestmark = pytest.mark.kubernetes

ABSENT = "sha256:" + "ab" * 32
PULL_SECRET = "tests-registry"
WAITS = 'touch $OUTPUTS/begun; until [ -e "$INPUTS/go" ]; do sleep 0.05; done'


@pytest.fixture
def here(cluster: Cluster, root: Path) -> Bench:
    return bench(cluster.runner(), root)


class Going:
    """A run in a thread of its own, that ``go`` lets end if it waits for that."""

    def __init__(self, here: Bench, script: str = WAITS, *, network: bool = False, **limits: float) -> None:
        self.here = here
        self.told: list[str] = []
        self.stop = threading.Event()
        self._ends: list[ExitReport] = []
        execution = here.execution(
            script,
            entrypoint="sh $ALGO # of the consumer's",
            limits=limits,
            variables={"GREETING": "s3cret $(HOSTNAME) $$"},
            network=network,
        )
        self._thread = threading.Thread(
            target=lambda: self._ends.append(
                here.runner.run(execution, stop=self.stop, on_waiting=self.told.append),
            )
        )
        self._thread.start()

    def begun(self) -> bool:
        return eventually((self.here.outputs / "begun").exists, 60)

    def go(self) -> ExitReport:
        self.here.folders.inputs.joinpath("go").touch()
        return self.end()

    def end(self) -> ExitReport:
        self._thread.join(120)
        assert self._ends, "the run has not ended"
        return self._ends[0]


Start = Callable[..., Going]


@pytest.fixture
def start() -> Iterator[Start]:
    """Makes a ``Going``; what still runs at the end is stopped."""
    runs: list[Going] = []

    def begin(*arguments: Any, **more: Any) -> Going:
        runs.append(Going(*arguments, **more))
        return runs[-1]

    yield begin
    for run in runs:
        run.stop.set()
        run.end()


def pods_of(cluster: Cluster, here: Bench) -> list[dict[str, Any]]:
    return [pod for pod in cluster.pods() if pod["metadata"]["labels"].get("c2d.run") == here.name]


def containers_of(cluster: Cluster, here: Bench) -> dict[str, str]:
    """Their ids by name. The node tells them a second after it has begun them."""

    def told() -> dict[str, str]:
        (pod,) = pods_of(cluster, here)
        statuses = pod["status"].get("containerStatuses", ())
        return {
            each["name"]: each["containerID"].removeprefix("docker://") for each in statuses if "containerID" in each
        }

    assert eventually(lambda: len(told()) == 2, 10)
    return told()


def forget(cluster: Cluster, image: Image) -> None:
    """A node keeps the containers of a pod that is gone for a minute."""
    assert eventually(lambda: not cluster.pods(), 60)
    cluster.engine.client.containers.prune()
    cluster.engine.forget(image)


def another(here: Bench, name: str, **more: Any) -> Bench:
    """A second bench beside *here*."""
    made = bench(here.runner, here.root / name)
    for field, value in more.items():
        setattr(made, field, value)
    return made


# --- What a pod gets ------------------------------------------------------------------------------------------


def test_a_pod_is_bounded(start: Start, cluster: Cluster, here: Bench) -> None:
    """As the API server has it: every limit is on, nothing of the node is in it, and of the claim only its own."""
    run = start(here, cpus=0.5, memory_bytes=100 * MIB, disk_bytes=8 * MIB, seconds=33)
    assert run.begun()
    (pod,) = pods_of(cluster, here)
    (job,) = [
        job for job in cluster.get("jobs", "-n", NAMESPACE)["items"] if job["metadata"]["name"].endswith(here.name)
    ]
    assert run.go().ok, here.log
    assert (0, 1, 1) == tuple(job["spec"][name] for name in ("backoffLimit", "completions", "parallelism"))
    assert job["spec"]["activeDeadlineSeconds"] >= 33
    assert job["spec"]["ttlSecondsAfterFinished"] > 0
    spec = pod["spec"]
    assert ("Never", "c2d-algorithm", False, False) == tuple(
        spec[name]
        for name in ("restartPolicy", "serviceAccountName", "automountServiceAccountToken", "enableServiceLinks")
    )
    assert not any(spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"))
    assert "None" == spec["dnsPolicy"]
    own = spec["securityContext"]
    assert own["runAsNonRoot"] and own["runAsUser"] == own["runAsGroup"] >= 1000
    assert {"type": "RuntimeDefault"} == own["seccompProfile"]
    assert [{"claimName": CLAIM}] == [
        v["persistentVolumeClaim"] for v in spec["volumes"] if "persistentVolumeClaim" in v
    ]
    assert [{"medium": "Memory", "sizeLimit": f"{8 * MIB}"}] * 2 == [
        v["emptyDir"] for v in spec["volumes"] if "emptyDir" in v
    ]
    assert 3 == len(spec["volumes"])
    for container in spec["containers"]:
        context = container["securityContext"]
        assert (False, False, True, {"drop": ["ALL"]}) == (
            context["allowPrivilegeEscalation"],
            context["privileged"],
            context["readOnlyRootFilesystem"],
            context["capabilities"],
        )
        resources = container["resources"]
        assert resources["limits"] == resources["requests"]
        assert {"cpu", "memory", "ephemeral-storage"} == resources["limits"].keys()
    algorithm = next(c for c in spec["containers"] if c["name"] == "algorithm")
    assert ("500m", f"{100 * MIB}") == tuple(algorithm["resources"]["limits"][name] for name in ("cpu", "memory"))
    mounts = {m["mountPath"]: m for m in algorithm["volumeMounts"] if m["name"] == "work"}
    assert {"/data/outputs", "/data/logs"} == {path for path, mount in mounts.items() if not mount.get("readOnly")}
    inside = here.root.relative_to(cluster.mount)
    assert all(
        Path(mount["subPath"]).is_relative_to(inside) and mount["subPath"] != str(inside) for mount in mounts.values()
    )
    assert "Guaranteed" == pod["status"]["qosClass"]


def test_nothing_is_said_but_in_the_log(start: Start, cluster: Cluster, here: Bench) -> None:
    """Neither code nor variables are in the pod's description, nor what is printed in that of its containers."""
    script = f'echo "$GREETING"; echo again >&2; echo more >/proc/1/fd/1; echo x >/proc/1/fd/2; {WAITS}'
    run = start(here, script)
    assert run.begun()
    described = cluster.kubectl("get", "pods,jobs,events", "-n", NAMESPACE, "-o", "yaml")
    printed = [cluster.engine.client.api.logs(each) for each in containers_of(cluster, here).values()]
    assert run.go().ok
    assert here.log.startswith("s3cret $(HOSTNAME) $$\nagain\nmore\n")
    assert "s3cret" not in described
    assert "of the consumer's" not in described
    assert [b"", b""] == printed


def test_what_may_have_a_network_is_labelled(start: Start, cluster: Cluster, here: Bench) -> None:
    """The policies that are shipped select pods by a label; of a run's two kinds each is meant by the right ones."""
    policies = {
        each["metadata"]["name"]: each["spec"] for each in cluster.get("networkpolicy", "-n", NAMESPACE)["items"]
    }
    denied = policies["c2d-algorithms-have-none"]
    assert ["Egress", "Ingress"] == sorted(denied["policyTypes"])
    assert not denied.get("egress") and not denied.get("ingress")
    selectors = {
        name: ",".join(
            [
                *(f"{key}={value}" for key, value in spec["podSelector"].get("matchLabels", {}).items()),
                *(each["key"] for each in spec["podSelector"].get("matchExpressions", [])),
            ]
        )
        for name, spec in policies.items()
    }
    assert {"Exists"} == {each["operator"] for each in denied["podSelector"]["matchExpressions"]}
    for network in (False, True):
        bench_ = another(here, f"network-{network}")
        run = start(bench_, network=network)
        assert run.begun()
        meant = {
            name
            for name, selector in selectors.items()
            if cluster.kubectl("get", "pods", "-n", NAMESPACE, "-l", f"{selector},c2d.run={bench_.name}", "-o", "name")
        }
        assert run.go().ok
        assert meant == (set(policies) if network else {"c2d-algorithms-have-none"})


def test_processes_of_a_worker_that_is_not_root(cluster: Cluster, root: Path) -> None:
    """Algorithms are the worker's user then and are not counted by user: it is the node that bounds a pod."""
    if reachable_python(again=True) is None:
        pytest.skip("no Python that an unprivileged user can start from a program of its own")
    config = root / "kubeconfig"
    config.write_text(cluster.worker.read_text())
    here = bench(Dropped(cluster.runner(kubeconfig=str(config))), root)
    report = here.python("""\
        import os, time
        print(os.getuid(), *os.getgroups())
        os.mkdir(os.environ["OUTPUTS"] + "/closed", 0)
        count = 1
        try:
            while os.fork():
                count += 1
            time.sleep(60)
        except BlockingIOError:
            print("bounded", count)
    """)
    assert report.ok, (report, here.log)
    assert [str(here.caller_uid)] * 2 == here.log.split()[:2]
    assert PIDS / 2 < int(here.log.split()[-1]) <= PIDS
    found = (here.outputs / "closed").stat()
    assert (here.caller_uid, 0o700) == (found.st_uid, found.st_mode & 0o700)


# --- Images ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def node_registry(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry that asks for a password, which the namespace has as a secret."""
    with docker_registry(tmp_path_factory.mktemp("node-registry"), within=cluster.within) as started:
        auth = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        credentials = json.dumps({"auths": {started.host: {"auth": auth}}})
        cluster.apply(
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": PULL_SECRET, "namespace": NAMESPACE},
                "type": "kubernetes.io/dockerconfigjson",
                "stringData": {".dockerconfigjson": credentials},
            }
        )
        yield started


def test_image_is_pulled_by_checksum(cluster: Cluster, node_registry: Registry, root: Path) -> None:
    """With a secret of the namespace; the tag beside a checksum means nothing."""
    image = published(cluster.engine, node_registry, marker=b"in the image")
    here = bench(cluster.runner(pull_secrets=[PULL_SECRET]), root)
    here.image = here.runner.fetch_image(Image(image.name, "no-such-tag", image.checksum))
    assert here.sh("cat /marker").ok, here.log
    assert "in the image" == here.log
    forget(cluster, image)


@pytest.mark.parametrize("absent", ["tag", "checksum", "credentials", "registry", "never"])
def test_a_missing_image_is_told(cluster: Cluster, node_registry: Registry, root: Path, absent: str) -> None:
    """Whatever it is for: no run, in the node's words, without the password."""
    image = published(cluster.engine, node_registry, again=uuid.uuid4().bytes)
    secrets = [] if absent == "credentials" else [PULL_SECRET]
    here = bench(cluster.runner(pull_secrets=secrets, pull="never" if absent == "never" else "missing"), root)
    here.image = {
        "tag": Image(image.name, "none"),
        "checksum": Image(image.name, image.tag, ABSENT),
        "registry": Image("127.0.0.1:9/study"),
    }.get(absent, image)
    report = here.sh("echo started", cpus=0.05)
    assert (Ending.IMAGE_UNAVAILABLE, None, "") == (report.ending, report.code, here.log)
    words = {
        "tag": "not found",
        "checksum": "not found",
        "credentials": "no basic auth credentials",
        "registry": "connection refused",
        "never": "Never",
    }
    assert words[absent] in report.detail, report.detail
    assert PASSWORD not in report.detail


@pytest.mark.parametrize("name", ["c2d-tests/python:3", "127.0.0.1:5/x:y", "UPPER", "a//b"])
def test_what_is_no_name_of_an_image(cluster: Cluster, name: str, root: Path) -> None:
    """A tag in the name, or no name at all, is the consumer's to mend, before anything is asked of the cluster."""
    with pytest.raises(ImageUnavailable):
        cluster.runner().fetch_image(Image(name))


def test_image_without_a_shell(cluster: Cluster, here: Bench) -> None:
    """Nothing can be started in it; the reason says so."""
    here.image = Image("c2d-tests/empty", "1")
    (here.root / "content").mkdir()
    (here.root / "content" / "file").write_text("no program")
    archive = here.root / "empty.tar"
    subprocess.run(["tar", "-cf", archive, "-C", here.root / "content", "."], check=True)
    cluster.engine.import_archive(here.image, archive)
    report = here.sh("true")
    assert (Ending.REFUSED, "the image has no /bin/sh, by which the entrypoint is run") == (
        report.ending,
        report.detail,
    )


# --- Waiting --------------------------------------------------------------------------------------------------


def test_no_place_is_told_in_the_schedulers_words(start: Start, cluster: Cluster, root: Path) -> None:
    """While it waits, and as the reason of its end once that was for too long."""
    run = start(bench(cluster.runner(wait_seconds=3), root), cpus=64)
    report = run.end()
    assert (Ending.REFUSED, None) == (report.ending, report.code)
    assert "within 3 s" in report.detail
    assert "Insufficient cpu" in report.detail
    assert any("Insufficient cpu" in told for told in run.told)
    assert "" == run.told[-1]


@contextmanager
def applied(cluster: Cluster, document: dict[str, Any]) -> Iterator[None]:
    cluster.apply(document)
    try:
        yield
    finally:
        cluster.kubectl("delete", "-f", "-", input=yaml.safe_dump(document))


def test_a_quota_is_waited_for(start: Start, cluster: Cluster, here: Bench) -> None:
    """The words are those of the cluster; a stop ends the wait."""
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "none", "namespace": NAMESPACE},
        "spec": {"hard": {"limits.memory": "1Mi"}},
    }
    with applied(cluster, quota):
        time.sleep(1)  # until it counts
        run = start(here)
        assert eventually(lambda: any("exceeded quota" in told for told in run.told), 30), run.told
        run.stop.set()
        assert Ending.STOPPED is run.end().ending
    assert not pods_of(cluster, here)


def test_what_can_never_be_is_refused_at_once(cluster: Cluster, root: Path) -> None:
    """A pod that the cluster lets nobody make, such as one of an account that is not there."""
    here = bench(cluster.runner(account="nobody"), root)
    report = here.sh("echo started")
    assert (Ending.REFUSED, "") == (report.ending, here.log)
    assert "service account" in report.detail


def test_gpus_are_the_clusters_to_give(start: Start, cluster: Cluster, root: Path) -> None:
    """Two of four run; three more wait, in the scheduler's words, until those are free; five are not to be had."""
    top = bench(cluster.runner(), root)
    cluster.advertise(4)
    try:
        two = start(another(top, "two"), gpus=2, cpus=0.1)
        assert two.begun()
        (pod,) = pods_of(cluster, two.here)
        assert "2" == pod["spec"]["containers"][1]["resources"]["limits"]["nvidia.com/gpu"]
        three = start(another(top, "three"), gpus=3, cpus=0.1)
        assert eventually(lambda: any("Insufficient nvidia.com/gpu" in told for told in three.told), 30), three.told
        assert two.go().ok
        assert three.begun()
        assert "" == three.told[-1]
        assert three.go().ok
        five = start(bench(cluster.runner(wait_seconds=3), root / "five"), gpus=5, cpus=0.1).end()
        assert Ending.REFUSED is five.ending
        assert "Insufficient nvidia.com/gpu" in five.detail
    finally:
        cluster.advertise(0)


def test_where_gpus_are_is_the_operators_to_say(cluster: Cluster, root: Path) -> None:
    """Nodes with a label, and behind a taint: neither is gone to without, and with both it runs."""
    cluster.kubectl("label", "node", "--all", "accelerator=h100")
    cluster.kubectl("taint", "node", "--all", "gpu=true:NoSchedule")
    try:
        refused = bench(cluster.runner(wait_seconds=2), root / "plain").sh("true")
        assert "taint" in refused.detail, refused
        tolerations = [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}]
        elsewhere = cluster.runner(wait_seconds=2, node_selector={"accelerator": "a100"}, tolerations=tolerations)
        assert re.search("node (selector|affinity)", bench(elsewhere, root / "elsewhere").sh("true").detail)
        at_home = cluster.runner(node_selector={"accelerator": "h100"}, tolerations=tolerations)
        assert bench(at_home, root / "home").sh("true").ok
    finally:
        cluster.kubectl("taint", "node", "--all", "gpu-")
        cluster.kubectl("label", "node", "--all", "accelerator-")


def test_a_runtime_of_its_own_for_those_without_network(start: Start, cluster: Cluster, root: Path) -> None:
    """Where the operator names one; a class that is not there is told."""
    with applied(
        cluster,
        {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "offline"}, "handler": "docker"},
    ):
        runner = cluster.runner(runtime_class="nosuch", runtime_class_offline="offline")
        run = start(bench(runner, root / "offline"))
        assert run.begun()
        (pod,) = pods_of(cluster, run.here)
        assert run.go().ok
        assert "offline" == pod["spec"]["runtimeClassName"]
    refused = start(bench(runner, root / "online"), network=True).end()
    assert Ending.REFUSED is refused.ending
    assert "nosuch" in refused.detail


# --- Ends -----------------------------------------------------------------------------------------------------


def test_who_kills_what_watches_it_is_ended_all_the_same(here: Bench) -> None:
    """By this side, a little later."""
    script = """\
        import os, signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.kill(-1, signal.SIGKILL)
        print("alone", flush=True)
        time.sleep(98786)
    """
    report = here.runner.run(here.execution(script, entrypoint="exec python3 $ALGO", limits={"seconds": 2}))
    assert "alone\n" == here.log
    assert (Ending.TIMED_OUT, None) == (report.ending, report.code)


def test_the_cluster_ends_what_nobody_else_does(start: Start, cluster: Cluster, here: Bench) -> None:
    """The deadline of the pod, counted by its node."""
    run = start(bench(cluster.runner(pull_seconds=60), here.root / "pod"), WAITS, seconds=100)
    assert run.begun()
    (pod,) = pods_of(cluster, run.here)
    assert pod["spec"]["activeDeadlineSeconds"] <= 100 + 60 + 60
    patch = json.dumps({"spec": {"activeDeadlineSeconds": 1}})
    cluster.kubectl("patch", "pod", "-n", NAMESPACE, pod["metadata"]["name"], "-p", patch)
    assert Ending.TIMED_OUT is run.end().ending


def test_an_api_server_that_is_away_ends_no_run(start: Start, cluster: Cluster, here: Bench) -> None:
    """What runs goes on, and its end is heard of when the server is back; its log arrives meanwhile."""
    run = start(here, f'{WAITS}; echo "still here"; exit 7')
    assert run.begun()
    with cluster.without_api():
        here.folders.inputs.joinpath("go").touch()
        assert eventually(lambda: "still here\n" == here.log, 10)
        time.sleep(3)
    assert (Ending.EXITED, 7) == (run.end().ending, run.end().code)


def test_a_removed_job_ends_its_run(start: Start, cluster: Cluster, here: Bench) -> None:
    """When somebody removes the Job of a run in progress, the run is over, and says that it was killed."""
    run = start(here, "touch $OUTPUTS/begun; sleep 98783", seconds=90)
    assert run.begun()
    here.runner.remove_job(f"job-{here.name}")
    report = run.end()
    assert (Ending.EXITED, 137, "was ended by SIGKILL") == (report.ending, report.code, report.detail)
    assert [] == sleepers("98783")


def test_a_removed_pod_ends_its_run(start: Start, cluster: Cluster, here: Bench) -> None:
    """A second pod of its Job would write over what the first has written: it is not waited for."""
    run = start(here, "touch $OUTPUTS/begun; echo begun; sleep 98784", seconds=90)
    assert run.begun()
    (pod,) = pods_of(cluster, here)
    cluster.kubectl("delete", "pod", "-n", NAMESPACE, pod["metadata"]["name"], "--wait=false")
    report = run.end()
    assert (Ending.EXITED, False) == (report.ending, report.ok)
    assert "begun\n" == here.log
    assert eventually(lambda: not pods_of(cluster, here), 30)


def test_a_second_pod_does_nothing(start: Start, cluster: Cluster, here: Bench) -> None:
    """Whoever makes it: once a run has begun, what its pods are made of runs nothing any more."""
    run = start(here, f"echo begun; {WAITS}", seconds=90, cpus=0.1)
    assert run.begun()
    assert eventually(lambda: not (here.root / "algorithm.log.pod" / "turn").exists(), 30)
    (pod,) = pods_of(cluster, here)
    copy = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "copy", "namespace": NAMESPACE},
        "spec": {key: value for key, value in pod["spec"].items() if key != "nodeName"},
    }
    cluster.apply(copy)

    def ends() -> list[str]:
        status = cluster.get("pod", "copy", "-n", NAMESPACE)["status"]
        states = [each["state"] for each in status.get("containerStatuses", ()) if each["name"] == "algorithm"]
        return [state["terminated"]["message"].strip() for state in states if "terminated" in state]

    try:
        assert eventually(lambda: bool(ends()), 60)
        assert ["elsewhere"] == ends()
    finally:
        cluster.kubectl("delete", "pod", "copy", "-n", NAMESPACE, "--wait=false")
    assert run.go().ok
    assert "begun\n" == here.log


# --- What is left ---------------------------------------------------------------------------------------------


def begun(here: Bench, seconds: str) -> subprocess.Popen[bytes]:
    """A caller in the middle of a run."""
    execution = here.execution(f"exec sleep {seconds}", entrypoint="sh $ALGO", limits={"seconds": 60})
    command, environment = caller(here.runner)
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, cwd="/")
    assert process.stdin is not None
    with process.stdin as pipe:
        pipe.write(pickle.dumps((here.runner, execution)))
    assert eventually(lambda: bool(sleepers(seconds)), 60)
    return process


def test_what_everybody_has_forgotten_is_found(cluster: Cluster, root: Path) -> None:
    """A Job whose caller was killed is known by its labels, and removed with them; not by another service."""
    here = bench(cluster.runner(alone_seconds=600), root)
    process = begun(here, "98781")
    process.kill()
    process.wait()
    assert {f"job-{here.name}"} == here.runner.jobs_left()
    elsewhere = cluster.runner(service="another service of this namespace")
    assert frozenset() == elsewhere.jobs_left()
    elsewhere.remove_job(f"job-{here.name}")
    assert sleepers("98781")
    here.runner.remove_job(f"job-{here.name}")
    assert (frozenset(), []) == (here.runner.jobs_left(), sleepers("98781"))
    here.runner.remove_job(f"job-{here.name}")


def test_a_run_ends_what_an_earlier_one_left(cluster: Cluster, root: Path) -> None:
    """Two never write into the same outputs: what has the name is gone before anything is started."""
    here = bench(cluster.runner(alone_seconds=600), root)
    process = begun(here, "98782")
    process.kill()
    process.wait()
    assert sleepers("98782")
    assert here.sh("echo again").ok
    assert "again\n" == here.log
    assert [] == sleepers("98782")


def test_nothing_is_left(start: Start, cluster: Cluster, here: Bench) -> None:
    """After a run, as after a stop, neither Job nor pod, nor what the two sides spoke by."""
    assert here.sh("true").ok
    run = start(here, "touch $OUTPUTS/begun; sleep 98785")
    assert run.begun()
    run.stop.set()
    assert Ending.STOPPED is run.end().ending
    assert [] == sleepers("98785")
    assert ["algorithm.log", "data"] == sorted(path.name for path in here.root.iterdir())
    assert eventually(lambda: not cluster.jobs() and not cluster.pods(), 30)


# --- Breaking out ---------------------------------------------------------------------------------------------


def test_there_is_no_way_to_the_cluster(cluster: Cluster, here: Bench) -> None:
    """No token, no name and no address of the API server, nor of the node."""
    port = cluster.url.rsplit(":", 1)[1]
    report = here.python(f"""\
        import os, pathlib, socket
        assert not [name for name in os.environ if "KUBERNETES" in name]
        print(*[p for p in ("/var/run/secrets", "/run/secrets") if os.path.exists(p)])
        for address in (("127.0.0.1", {port}), ("10.250.0.1", 443), ("{GATEWAY}", {port}), ("169.254.169.254", 80)):
            try:
                socket.create_connection(address, timeout=2)
                print("reached", address)
            except OSError:
                pass
        try:
            print(socket.getaddrinfo("kubernetes.default.svc", 443))
        except OSError:
            pass
    """)
    assert report.ok, here.log
    assert "" == here.log.strip()


def test_the_claim_is_not_everybodys(cluster: Cluster, here: Bench) -> None:
    """Of other jobs' folders nothing is there, whatever way is tried; what the two sides speak by can only be used."""
    (here.root / "secret").write_text("c2d-secret")
    (here.root / "secret").chmod(0o644)
    (here.root / "data" / "secret").write_text("c2d-secret")
    script = f"""\
        cd $OUTPUTS
        ls -d {cluster.mount}/c2d-* {here.root} 2>/dev/null
        for way in .. ../.. ../../.. /proc/1/root/data/outputs/.. /proc/self/cwd/..; do
            cat $way/secret $way/data/secret 2>/dev/null
        done
        ln -s {here.root}/secret link; cat link 2>/dev/null
        for file in /c2d/run /c2d/sign /c2d/new /log; do (echo x >>$file) 2>/dev/null && echo "written: $file"; done
        rm -f /c2d/output /c2d/run 2>/dev/null
        mv /c2d/output /c2d/other 2>/dev/null
        chmod 777 /c2d/run 2>/dev/null && echo changed
        [ -p /c2d/output ] || echo gone
        exit 0
    """
    report = here.sh(script)
    assert report.ok
    assert "" == here.log


def test_an_algorithm_cannot_take_its_log_back(here: Bench) -> None:
    """It can write to the pipe as often as it likes, and add to the log by that; not more."""
    script = """\
        import os
        print("first", flush=True)
        pipe = os.open("/c2d/output", os.O_WRONLY)
        os.write(pipe, b"second\\n")
        for call in (lambda: os.ftruncate(pipe, 0), lambda: os.truncate("/data/logs/algorithm.log", 0)):
            try:
                call()
                print("done")
            except OSError:
                print("refused", flush=True)
    """
    assert here.python(script).ok, here.log
    assert "first\nsecond\nrefused\nrefused\n" == here.log


def test_an_image_does_not_decide_how_it_is_run(start: Start, cluster: Cluster, here: Bench) -> None:
    """Its user and entrypoint; its variables belong to its programs."""
    here.image = Image("c2d-tests/hostile", "1")
    cluster.engine.build(
        here.image,
        changes=[
            *('ENTRYPOINT ["/bin/false"]', 'CMD ["nothing"]', "USER root", "WORKDIR /root"),
            *("ENV OWN=1", "ENV LANG=de_DE.UTF-8", "ENV INPUTS=/elsewhere", "ENV NVIDIA_VISIBLE_DEVICES=all"),
        ],
    )
    run = start(
        here, f"id -u; pwd; echo $OWN $LANG $INPUTS $HOME; cp /bin/id /tmp/id; chmod 4755 /tmp/id; /tmp/id -u; {WAITS}"
    )
    assert run.begun()
    described = cluster.engine.client.api.inspect_container(containers_of(cluster, here)["algorithm"])
    assert run.go().ok, here.log
    uid, *rest, again = here.log.splitlines()
    assert int(uid) >= 1000
    assert uid == again
    assert ["/data", "1 de_DE.UTF-8 /data/inputs /tmp"] == rest
    assert [v for v in described["Config"]["Env"] if "NVIDIA" in v] == ["NVIDIA_VISIBLE_DEVICES=void"]


# --- The cluster ----------------------------------------------------------------------------------------------


def test_cluster_stands_here(cluster: Cluster) -> None:
    """The cluster of these tests has no obstacle, for the account that the manifests make."""
    assert cluster.runner().obstacle() is None


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"claim": "nosuch"}, "there is no claim nosuch in the namespace c2d-jobs"),
        ({"mount": "/nowhere/at/all"}, "is not mounted here at /nowhere/at/all"),
        ({"namespace": "default"}, "the Kubernetes cluster refuses this account"),
        ({"kubeconfig": "/nowhere/at/all"}, "nothing says how the Kubernetes cluster is reached"),
    ],
)
def test_what_is_missing_is_told(cluster: Cluster, root: Path, wrong: dict[str, str], words: str) -> None:
    """As one sentence; nothing is run then."""
    here = bench(cluster.runner(**wrong), root)
    assert words in (here.runner.obstacle() or "")
    report = here.sh("echo started")
    assert (Ending.REFUSED, "", here.runner.obstacle()) == (report.ending, here.log, report.detail)


def test_nobody_at_the_api_server(cluster: Cluster, root: Path) -> None:
    """It is told at once that the cluster does not answer."""
    nobody = yaml.safe_load(cluster.worker.read_text())
    nobody["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:9"
    (root / "kubeconfig").write_text(yaml.safe_dump(nobody))
    assert "does not answer" in (cluster.runner(kubeconfig=str(root / "kubeconfig")).obstacle() or "")


def test_another_volume_is_no_claim(cluster: Cluster, root: Path) -> None:
    """A folder that is mounted here and is not the claim gives no algorithm empty inputs: nothing is run."""
    nested = f"nested-{uuid.uuid4().hex}"
    here = bench(cluster.runner(mount=str(root)), root / nested)
    try:
        report = here.sh("echo started")
    finally:
        shutil.rmtree(cluster.mount / nested)
    assert (Ending.REFUSED, "") == (report.ending, here.log)
    assert "the claim is not what is mounted here" in report.detail


def may(cluster: Cluster, account: str, *what: str, namespace: str = NAMESPACE) -> bool:
    """Whether it may, as the API server says."""
    config = str(cluster.folder / "admin.kubeconfig")
    who = f"system:serviceaccount:{NAMESPACE}:{account}"
    asked = subprocess.run(
        ["kubectl", "--kubeconfig", config, "auth", "can-i", *what, "-n", namespace, "--as", who],
        capture_output=True,
        text=True,
        check=False,
    )
    answer = asked.stdout.strip()
    assert answer in ("yes", "no"), asked.stderr
    return answer == "yes"


def test_rights_are_as_small_as_they_can_be(cluster: Cluster) -> None:
    """What the suite runs with is not more than it needs: no secrets, no logs, no way into a pod, nowhere else."""
    assert may(cluster, "c2d-worker", "create", "jobs")
    for what in ("get secrets", "get pods --subresource=log", "create pods", "create pods --subresource=exec"):
        assert not may(cluster, "c2d-worker", *what.split()), what
    assert not may(cluster, "c2d-worker", "create", "jobs", namespace="default")
    assert not may(cluster, "c2d-worker", "update", "jobs")
    for verb in ("get", "list", "create", "delete"):
        for resource in ("pods", "jobs", "secrets", "persistentvolumeclaims"):
            assert not may(cluster, "c2d-algorithm", verb, resource)


def test_a_right_that_is_missing_is_told(cluster: Cluster, root: Path) -> None:
    """Which, and where, before anything is run."""
    config = root / "kubeconfig"
    config.write_text(yaml.safe_dump(cluster.kubeconfig(cluster.token("c2d-algorithm"))))
    obstacle = cluster.runner(kubeconfig=str(config)).obstacle() or ""
    assert "refuses this account" in obstacle
    assert "persistentvolumeclaims" in obstacle
