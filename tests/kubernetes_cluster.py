"""
A real Kubernetes cluster for tests: etcd, API server, controllers, scheduler, and a kubelet on an engine of its own.

All of it listens on free ports of loopback, keeps its files in one folder and is stopped by pid. Pods have a network
in which there is nothing but the node's end of it. Needs root, and what ``scripts/install-kubernetes`` installs and
builds.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import yaml

from blocks.pods import KubernetesRunner
from cli.service import free_port
from tests.docker_engine import Engine, docker_engine

NODE: Final = "here"
NAMESPACE: Final = "c2d-jobs"
CLAIM: Final = "c2d-work"
PIDS: Final = 160
"""Processes of one pod, by the kubelet."""
GATEWAY: Final = "172.30.0.1"
"""The node, as pods see it."""
_SERVICE: Final = "10.250.0.1"
"""What pods are told to be the API server: the first address for services."""

_MANIFESTS: Final = Path(__file__).parent.parent / "deploy" / "kubernetes" / "algorithms"
_ADMIN: Final = "c2d-admin-token"
_TUNED: Final = ("vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops")
"""What a kubelet sets on its machine, which is not this cluster's alone."""

T = TypeVar("T")


def binaries() -> Path:
    """Where ``scripts/install-kubernetes`` keeps what it has built."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    return Path(os.environ.get("C2D_KUBERNETES") or f"{cache}/c2d/kubernetes-1.20.2") / "bin"


@dataclass
class Cluster:
    """A cluster with the manifests of the repository applied, and a claim for all of this machine's temporary files."""

    folder: Path
    url: str
    engine: Engine
    within: tuple[str, ...]
    """A command that starts another one in the network of the node."""
    api_server: _Part
    kubelet: _Part
    mount: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))
    """What the claim stands for."""

    @property
    def worker(self) -> Path:
        """A kubeconfig of the service's account, which may do no more than the manifests say."""
        file = self.folder / "worker.kubeconfig"
        if not file.exists():
            file.write_text(yaml.safe_dump(self.kubeconfig(self.token())))
        return file

    def kubeconfig(self, token: str = _ADMIN) -> dict[str, Any]:
        """Everything a client needs, the token included."""
        authority = (self.folder / "certs" / "apiserver.crt").read_bytes()
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {
                    "name": "tests",
                    "cluster": {"server": self.url, "certificate-authority-data": _base64(authority)},
                }
            ],
            "users": [{"name": "tests", "user": {"token": token}}],
            "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": "tests", "namespace": NAMESPACE}}],
            "current-context": "tests",
        }

    def kubectl(self, *arguments: str, input: str | None = None) -> str:
        """What kubectl prints, as the administrator."""
        done = subprocess.run(
            ["kubectl", "--kubeconfig", self.folder / "admin.kubeconfig", "--request-timeout=30s", *arguments],
            input=input,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert 0 == done.returncode, done.stderr
        return done.stdout

    def get(self, *arguments: str) -> Any:
        return json.loads(self.kubectl("get", "-o", "json", *arguments))

    def apply(self, *documents: Mapping[str, Any]) -> None:
        self.kubectl("apply", "-f", "-", input=yaml.safe_dump_all(documents))

    def jobs(self) -> list[str]:
        return sorted(job["metadata"]["name"] for job in self.get("jobs", "-n", NAMESPACE)["items"])

    def pods(self) -> list[dict[str, Any]]:
        return list(self.get("pods", "-n", NAMESPACE)["items"])

    def token(self, account: str = "c2d-worker", namespace: str = NAMESPACE) -> str:
        """A token of a service account, as a pod of that account would have it."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        answer = self.kubectl(
            *("create", "--raw", path, "-f", "-"),
            input=json.dumps({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}),
        )
        return str(json.loads(answer)["status"]["token"])

    def runner(self, **more: Any) -> KubernetesRunner:
        """As the account of the service."""
        return KubernetesRunner(
            **{
                "kubeconfig": str(self.worker),
                "namespace": NAMESPACE,
                "claim": CLAIM,
                "mount": str(self.mount),
                "service": str(self.folder),
                "alone_seconds": 6.0,
                **more,
            }
        )

    def advertise(self, gpus: int, resource: str = "nvidia.com/gpu") -> None:
        """Let the node say that it has so many, as a device plugin would; 0 takes them away."""
        path = f"/status/capacity/{resource.replace('/', '~1')}"
        patch = [{"op": "add", "path": path, "value": str(gpus)}]
        self._call("PATCH", f"/api/v1/nodes/{NODE}/status", patch)
        assert _eventually(lambda: str(gpus) == self.get("node", NODE)["status"]["allocatable"].get(resource, "0"), 30)

    @contextmanager
    def opened(self, *ports: int) -> Iterator[None]:
        """
        While this lasts, pods reach the API server at the address that they are told, as with a kube-proxy, and what
        listens on these ports of this machine's loopback, at GATEWAY.
        """
        (api,) = re.findall(r"\d+$", self.url)
        address = (f"{_SERVICE}/32", "dev", "lo")
        self._in_node("ip", "address", "add", *address)
        try:
            with ExitStack() as ways:
                ways.enter_context(_forwarded(self._listener(_SERVICE, 443), int(api)))
                for port in ports:
                    ways.enter_context(_forwarded(self._listener(GATEWAY, port), port))
                yield
        finally:
            self._in_node("ip", "address", "del", *address)

    def _in_node(self, *command: str, **more: Any) -> None:
        subprocess.run([*self.within, *command], check=True, timeout=30, **more)

    def _listener(self, address: str, port: int) -> socket.socket:
        """A socket that listens in the network of the node: it stays where it was made, whoever has it."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            script = (
                "import socket, sys; there = socket.create_server((sys.argv[1], int(sys.argv[2])), backlog=128); "
                "socket.send_fds(socket.socket(fileno=int(sys.argv[3])), [b'.'], [there.fileno()])"
            )
            command = (sys.executable, "-I", "-c", script, address, f"{port}", f"{theirs.fileno()}")
            self._in_node(*command, pass_fds=[theirs.fileno()])
            _, (found,), _, _ = socket.recv_fds(ours, 1, 1)
        return socket.socket(fileno=found)

    @contextmanager
    def without_api(self) -> Iterator[None]:
        """While this lasts, the API server is dead. Everything else is as it was."""
        self.api_server.end(kill=True)
        try:
            yield
        finally:
            self.api_server.start()
            _until(lambda: bool(_told(self, "get", "--raw", "/readyz")), self.folder)
            # A kubelet of this version is deaf to some things for minutes once nobody has answered it.
            self.kubelet.end()
            self.kubelet.start()
            self._until_the_node_listens()

    def _until_the_node_listens(self) -> None:
        pod = {"name": "listens", "namespace": "default"}
        container = {"name": "true", "image": "c2d-tests/python:3", "command": ["true"]}
        spec = {"restartPolicy": "Never", "containers": [container]}
        self.apply({"apiVersion": "v1", "kind": "Pod", "metadata": pod, "spec": spec})
        phase = ("get", "pod", "listens", "-n", "default", "-o", "jsonpath={.status.phase}")
        _until(lambda: "Succeeded" == _told(self, *phase), self.folder)
        self.kubectl("delete", "pod", "listens", "-n", "default", "--wait=false")

    def _call(self, method: str, path: str, body: Any) -> None:
        """What kubectl of this version cannot: a patch of a status."""
        import ssl  # noqa: PLC0415
        import urllib.request  # noqa: PLC0415

        request = urllib.request.Request(
            f"{self.url}{path}",
            method=method,
            data=json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {_ADMIN}", "Content-Type": "application/json-patch+json"},
        )
        context = ssl.create_default_context(cafile=str(self.folder / "certs" / "apiserver.crt"))
        with urllib.request.urlopen(request, timeout=30, context=context) as answer:
            answer.read()


class _Part:
    """A part that can be started again."""

    def __init__(self, log: Path, command: Sequence[str | Path]) -> None:
        self._log = log
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def end(self, *, kill: bool = False) -> None:
        if self._process is not None:
            if kill:
                self._process.kill()
            _end(self._process)


@contextmanager
def kubernetes_cluster(folder: Path) -> Iterator[Cluster]:
    """*folder* has to have a short path: the engine's sockets are in it."""
    assert os.geteuid() == 0, "a cluster of one's own needs root: sudo make test-kubernetes"
    built = binaries()
    assert (built / "kubelet").exists(), "there is no Kubernetes: scripts/install-kubernetes builds it"
    etcd, peers, api, controllers, scheduler, kubelet, health = (free_port() for _ in range(7))
    cluster_url = f"https://127.0.0.1:{api}"
    admin = folder / "admin.kubeconfig"
    with ExitStack() as parts:

        def start(name: str, *command: Any) -> subprocess.Popen[bytes]:
            return parts.enter_context(_started(folder / f"{name}.log", command))

        _keys(folder, _ADMIN)
        start(
            "etcd",
            *("etcd", "--data-dir", folder / "etcd", "--unsafe-no-fsync", "--logger", "zap"),
            *(
                "--listen-client-urls",
                f"http://127.0.0.1:{etcd}",
                "--advertise-client-urls",
                f"http://127.0.0.1:{etcd}",
            ),
            *("--listen-peer-urls", f"http://127.0.0.1:{peers}"),
            *("--initial-advertise-peer-urls", f"http://127.0.0.1:{peers}"),
            *("--initial-cluster", f"default=http://127.0.0.1:{peers}"),
        )
        api_server = _Part(
            folder / "apiserver.log",
            [
                str(built / "kube-apiserver"),
                *(f"--etcd-servers=http://127.0.0.1:{etcd}", "--bind-address=127.0.0.1"),
                *("--advertise-address=127.0.0.1", f"--secure-port={api}", "--insecure-port=0"),
                *(f"--cert-dir={folder}/certs", f"--token-auth-file={folder}/tokens.csv"),
                *("--service-cluster-ip-range=10.250.0.0/24", "--authorization-mode=Node,RBAC"),
                "--service-account-issuer=https://kubernetes.default.svc",
                *(f"--service-account-signing-key-file={folder}/sa.key", f"--service-account-key-file={folder}/sa.key"),
                *("--enable-admission-plugins=NodeRestriction", "--endpoint-reconciler-type=none"),
                *("--allow-privileged=true", "--kubelet-preferred-address-types=Hostname"),
                "--feature-gates=TTLAfterFinished=true",
            ],
        )
        parts.callback(api_server.end)
        api_server.start()
        holder = _node_space(folder)
        parts.callback(_end, holder)
        within = [f"--mount=/proc/{holder.pid}/ns/mnt"]
        network = f"--net=/proc/{holder.pid}/ns/net"
        # Before the engine, whose containers are in it until the engine has ended.
        root_group = _groups(folder)
        parts.callback(_remove_groups, root_group)
        (folder / "engine").mkdir()
        engine = parts.enter_context(
            docker_engine(
                folder / "engine",
                within=["nsenter", *within, network],
                # Pods do not reach each other.
                network=["--bip", f"{GATEWAY}/24", "--icc=false"],
                **_runtime(folder),
            )
        )
        _pause(engine, built)
        cluster = Cluster(
            folder,
            cluster_url,
            engine,
            ("nsenter", network),
            api_server,
            _Part(
                folder / "kubelet.log",
                [
                    *("nsenter", *within, str(built / "kubelet"), f"--config={folder}/kubelet.yaml"),
                    *(f"--kubeconfig={admin}", f"--hostname-override={NODE}"),
                    *(f"--root-dir={folder}/kubelet", f"--cert-dir={folder}/pki"),
                    *("--container-runtime=docker", f"--docker-endpoint={engine.host}", "--network-plugin="),
                    "--pod-infra-container-image=c2d-tests/pause:1",
                ],
            ),
        )
        _until((folder / "certs" / "apiserver.crt").exists, folder)
        admin.write_text(yaml.safe_dump(cluster.kubeconfig()))
        admin.chmod(0o600)
        _until(lambda: bool(_told(cluster, "get", "--raw", "/readyz")), folder)
        common = [
            *(f"--kubeconfig={admin}", f"--authentication-kubeconfig={admin}", f"--authorization-kubeconfig={admin}"),
            *("--bind-address=127.0.0.1", "--port=0", "--leader-elect=false"),
        ]
        start(
            "controllers",
            built / "kube-controller-manager",
            *common,
            *(f"--secure-port={controllers}", f"--service-account-private-key-file={folder}/sa.key"),
            # By which pods know the API server: beside their token lies the certificate of its authority.
            f"--root-ca-file={folder}/certs/apiserver.crt",
            *(
                "--feature-gates=TTLAfterFinished=true",
                "--controllers=*,-cloud-node-lifecycle,-route,-service,-csrsigning",
            ),
        )
        start("scheduler", built / "kube-scheduler", *common, f"--secure-port={scheduler}")
        configuration = folder / "kubelet.yaml"
        configuration.write_text(yaml.safe_dump(_kubelet(folder, root_group, kubelet, health)))
        parts.callback(cluster.kubelet.end)
        cluster.kubelet.start()
        _until(lambda: "True" == _told(cluster, "get", "node", NODE, "-o", f"jsonpath={_READY}"), folder)
        cluster.kubectl("apply", "-k", str(_MANIFESTS))
        cluster.apply(*_volume(cluster.mount))
        _until(lambda: "Bound" == _told(cluster, *_CLAIMED), folder)
        try:
            yield cluster
        finally:
            # Else the engine would be left with containers that nobody knows.
            cluster.kubectl("delete", "jobs,pods", "--all", "--all-namespaces", "--grace-period=0", "--force")


_READY: Final = '{.status.conditions[?(@.type=="Ready")].status}'
_CLAIMED: Final = ("get", "-n", NAMESPACE, "pvc", CLAIM, "-o", "jsonpath={.status.phase}")


def _keys(folder: Path, admin: str) -> None:
    subprocess.run(["openssl", "genrsa", "-out", folder / "sa.key", "2048"], check=True, capture_output=True)
    (folder / "tokens.csv").write_text(f'{admin},admin,1,"system:masters"\n')


def _node_space(folder: Path) -> subprocess.Popen[bytes]:
    """
    A process with mounts and a network of its own, for the engine and, without that network, the kubelet. In it, what
    a kubelet sets on its machine are plain files.
    """
    mounts = []
    for name in _TUNED:
        file = folder / name.replace("/", "-")
        file.write_bytes(Path("/proc/sys", name).read_bytes())
        mounts.append(f"mount --bind {file} /proc/sys/{name}")
    ready = folder / "space"
    script = " && ".join(["ip link set lo up", *mounts, f"touch {ready}", "exec sleep infinity"])
    holder = subprocess.Popen(["unshare", "--net", "--mount", "--propagation", "private", "sh", "-c", script])
    assert _eventually(lambda: ready.exists() or holder.poll() is not None, 30) and holder.poll() is None
    return holder


def _runtime(folder: Path) -> dict[str, Any]:
    """Root of a virtual machine may not put a process beyond the reach of the OOM killer, as a kubelet asks it to."""
    file = folder / "runc-unadjusted"
    file.write_text(
        "#!/bin/sh\n"
        'for argument; do [ "$last" != --bundle ] || bundle=$argument; last=$argument; done\n'
        '[ -z "$bundle" ] || sed -i -E \'s/"oomScoreAdj":-[0-9]+/"oomScoreAdj":0/\' "$bundle/config.json"\n'
        'exec runc "$@"\n'
    )
    file.chmod(0o755)
    return {"default-runtime": "unadjusted", "runtimes": {"unadjusted": {"path": str(file)}}}


def _pause(engine: Engine, built: Path) -> None:
    """The image of what holds a pod together."""
    from blocks.runner import Image  # noqa: PLC0415

    archive = engine.folder / "pause.tar"
    subprocess.run(["tar", "-cf", archive, "-C", built, "pause"], check=True)
    engine.import_archive(Image("c2d-tests/pause", "1"), archive, ['ENTRYPOINT ["/pause"]'])


def _groups(folder: Path) -> str:
    """A control group of its own below which pods are, in every hierarchy, named like *folder*."""
    for hierarchy in _hierarchies():
        (hierarchy / f"{folder.name}-pods").mkdir()
        if (cpus := hierarchy / "cpuset.cpus").exists():  # a new one has none, and then nothing runs in it
            for file in (cpus, hierarchy / "cpuset.mems"):
                (hierarchy / f"{folder.name}-pods" / file.name).write_text(file.read_text())
    return f"/{folder.name}-pods"


def _remove_groups(name: str) -> None:
    for hierarchy in _hierarchies():
        for group, _, _ in os.walk(f"{hierarchy}{name}", topdown=False):
            with suppress(OSError):
                Path(group).rmdir()


def _hierarchies() -> list[Path]:
    top = Path("/sys/fs/cgroup")
    if (top / "cgroup.controllers").exists():
        return [top]
    return [path for path in top.iterdir() if path.is_dir() and not path.is_symlink()]


def _kubelet(folder: Path, group: str, port: int, health: int) -> dict[str, Any]:
    (folder / "volume-plugins").mkdir()
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": "127.0.0.1",
        "port": port,
        "readOnlyPort": 0,
        "healthzBindAddress": "127.0.0.1",
        "healthzPort": health,
        # As a cluster has it. Nobody asks this one for anything but the API server, which does not.
        "authentication": {"anonymous": {"enabled": False}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": group,
        "enforceNodeAllocatable": ["pods"],
        "failSwapOn": False,
        "makeIPTablesUtilChains": False,
        "podPidsLimit": PIDS,
        "resolvConf": "",
        "volumePluginDir": str(folder / "volume-plugins"),
        "nodeStatusUpdateFrequency": "2s",
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        # Else a tmpfs has half of the machine's memory as its size. On by default in every later version.
        "featureGates": {"SizeMemoryBackedVolumes": True},
    }


def _volume(mount: Path) -> Sequence[Mapping[str, Any]]:
    modes = ["ReadWriteMany"]
    size = {"storage": "10Gi"}
    return [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": CLAIM},
            "spec": {
                "accessModes": modes,
                "capacity": size,
                "hostPath": {"path": str(mount)},
                "storageClassName": "tests",
            },
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": CLAIM, "namespace": NAMESPACE},
            "spec": {"accessModes": modes, "resources": {"requests": size}, "storageClassName": "tests"},
        },
    ]


@contextmanager
def _forwarded(listener: socket.socket, port: int) -> Iterator[None]:
    """While this lasts, whoever connects to *listener*, which is closed at last, speaks to that port of loopback."""

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while chunk := await source.read(2**16):
                sink.write(chunk)
                await sink.drain()
            sink.write_eof()

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            to = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.close()
            return
        try:
            await asyncio.gather(copy(reader, to[1]), copy(to[0], writer))
        except asyncio.CancelledError:
            pass  # By the end of the loop, of which asyncio would complain.
        finally:
            to[1].close()
            writer.close()

    async def serve(ended: asyncio.Event) -> None:
        server = await asyncio.start_server(speak, sock=listener)
        await ended.wait()
        # What still speaks is ended with the loop.
        server.close()

    loop, ended = asyncio.new_event_loop(), asyncio.Event()

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(serve(ended))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(30)
        assert not thread.is_alive()


# --- Parts ----------------------------------------------------------------------------------------------------


@contextmanager
def _started(log: Path, command: Sequence[str | Path]) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _told(cluster: Cluster, *arguments: str) -> str:
    """What kubectl prints; nothing while it cannot."""
    with suppress(AssertionError):
        return cluster.kubectl(*arguments)
    return ""


def _until(true: Callable[[], bool], folder: Path) -> None:
    if not _eventually(true, 120):
        raise AssertionError("\n".join(f"{log.name}: {log.read_text()[-1500:]}" for log in folder.rglob("*.log")))


def _eventually(true: Callable[[], bool], seconds: float) -> bool:
    patience = time.monotonic() + seconds
    while not true():
        if time.monotonic() > patience:
            return False
        time.sleep(0.1)
    return True


def _base64(content: bytes) -> str:
    import base64  # noqa: PLC0415

    return base64.b64encode(content).decode()
