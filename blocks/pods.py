"""
Algorithms as Jobs of a Kubernetes cluster, beside data on a claim that this process and their pods both mount.

What stands between an algorithm and its node is the cluster's: namespaces, cgroups, the default seccomp profile, no
capability and no way to gain one, a root that is read-only, no token. What the cluster does not do is done here, or
told in ``docs/operate.md``:

- The log. What containers print a cluster keeps on its nodes and hands to whoever collects logs, line by line; that is
  no place for what is said about private data, and not every byte of it arrives. So it goes through a pipe on the claim
  to a second container of the pod, which does nothing but write it into the log. The algorithm can write to the pipe
  only. Neither does it have anything to say in the pod's description: its entrypoint and variables are on the claim.
- Disk. A claim has no quota for one run, so outputs and logs are measured from here, and a single file cannot get past
  the limit. Files without a name cannot be seen from here.
- Time. It begins with the algorithm, not with the wait for a node, and is kept in the pod; from here, and by the
  cluster at last, if the algorithm does away with what keeps it.
- The end of the caller. In the pod somebody looks whether this process still gives a sign of life on the claim.
- Network. Whether a pod has one is decided by the cluster's network plugin, from the labels that it is given here.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shlex
import shutil
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from datetime import datetime
from math import ceil
from pathlib import Path
from threading import Event
from typing import Any, Final, Literal, TypeVar
from uuid import uuid4

import aiohttp
from kubernetes_asyncio import config
from kubernetes_asyncio.client import (
    ApiClient,
    ApiException,
    AuthorizationV1Api,
    BatchV1Api,
    Configuration,
    CoreV1Api,
)
from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_fixed

from blocks.limits import Limits
from blocks.run_folder import LOG_NAME, DiskWatch, give_back, hand_over, private_uid
from blocks.runner import (
    GRACE,
    TICK,
    Ending,
    Execution,
    ExitReport,
    Image,
    ImageUnavailable,
    Progress,
    Runner,
    Waiting,
    told_of_code,
    told_of_limit,
    unheard,
    untold,
    without_paths,
)

T = TypeVar("T")

REQUEST: Final = 15.0
"""Seconds one request to the API server may take."""
PATIENCE: Final = 60.0
"""Seconds an API server may be away while something is asked of it. A run that goes on has more: see ``AWAY``."""
AWAY: Final = 600.0
"""Seconds after the deadline of a run in which its end has to be heard of."""
LOOK: Final = 0.3
"""Seconds between two looks at a pod."""
LATE: Final = 3.0
"""Seconds after its time that a run is ended from here, if nobody in the pod has ended it."""
SETTLED: Final = 10.0
"""Seconds for the last of an output to reach the log."""
REMOVAL: Final = 120.0
"""Seconds for a Job and its pod to be gone."""
KEPT: Final = 600
"""Seconds the cluster keeps a Job that ended and was not removed by anybody."""
HEARD: Final = 3.0
"""Seconds after which a node has heard that a pod is to end. What it begins for it later, because it was getting an
image, finds no script to run."""
TAKEN: Final = 10.0
"""Seconds after which a container that is said to run has begun to."""
SIGN: Final = 2.0
"""Seconds between two signs of life."""

SERVICE: Final = "c2d.service"
JOB: Final = "c2d.job"
RUN: Final = "c2d.run"
TRY: Final = "c2d.try"
NETWORK: Final = "c2d.network"
"""Labels of a Job and its pod: the service, since those that share a namespace leave each other's alone; the service's
job; the run's name; itself; and whether it may have a network, which the policies go by."""


@dataclass(frozen=True)
class KubernetesRunner(Runner):
    """
    One Job with one pod per run, of the image the execution names, which has to have sh, cat, env and sleep.

    The folders of a run have to be on the claim. As root the algorithm gets a user id of its own, with what that means
    for the folders (see ``ProcessRunner``), and its processes are counted; as any other user it runs under the
    caller's, and the node's limit of processes for a pod is the only one.

    What a tag means is decided on the node, when the run begins: only a checksum makes a run of what was asked for.
    ``ExitReport.seconds`` are whole ones, by the node's clock.
    """

    namespace: str = "c2d-jobs"
    claim: str = "c2d-work"
    mount: str = ""
    """Where the claim is mounted for this process."""
    block: str = ""
    """Name of a saved block of the type KubernetesClusterConfig. Empty: what a pod has, else what a kubeconfig says."""
    kubeconfig: str = ""
    """Path of a file. Empty: KUBECONFIG, else that of this user."""
    context: str = ""
    """In the kubeconfig. Empty: its current one."""
    account: str = "c2d-algorithm"
    """The service account of the pods, which has no rights and whose token they do not get."""
    pull: Literal["always", "missing", "never"] = "missing"
    """When a node asks the registry."""
    pull_secrets: Sequence[str] = ()
    """Names of secrets in the namespace, with credentials for registries."""
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: Sequence[Mapping[str, Any]] = ()
    """As in the description of a pod."""
    runtime_class: str = ""
    runtime_class_offline: str = ""
    """For runs that may have no network, such as one that gives them none. Empty: as for the others."""
    gpu_resource: str = "nvidia.com/gpu"
    scratch_bytes: int = 0
    """Size of ``/tmp`` and of ``/dev/shm``. 0: as much as the run may have of memory or of disk, if that is less."""
    wait_seconds: float = 3600.0
    """Deadline for a place on a node."""
    pull_seconds: float = 3600.0
    """Deadline from there to the algorithm's beginning: its image has to be pulled."""
    alone_seconds: float = 60.0
    """How long an algorithm goes on after the last sign of life of this process."""
    service: str = ""
    """Whose Jobs these are, among the services that share the namespace."""

    def obstacle(self) -> str | None:
        async def ask() -> str | None:
            async with self._connected() as api:
                return await self._obstacle(api, patience=0.0)

        try:
            return _done(ask())
        except _Unreachable as problem:
            return str(problem)

    def fetch_image(self, image: Image, *, on_progress: Progress = untold, stop: Event | None = None) -> Image:
        """The node pulls it, when the run begins; here only its name is looked at."""
        if not _IMAGE_NAME.fullmatch(image.name):
            raise ImageUnavailable(f"{image.name} is no name of an image; a tag or checksum is a field of its own")
        return image

    def jobs_left(self) -> frozenset[str]:
        async def find() -> frozenset[str]:
            async with self._connected() as api:
                found = await _insisting(
                    BatchV1Api(api).list_namespaced_job, self.namespace, label_selector=f"{SERVICE}={self._service}"
                )
            # Those that are being removed are not left to anybody.
            return frozenset(job.metadata.labels[JOB] for job in found.items if not job.metadata.deletion_timestamp)

        return _done(find())

    def remove_job(self, job: str) -> None:
        async def remove() -> None:
            async with self._connected() as api:
                await self._remove(api, f"{SERVICE}={self._service},{JOB}={job}")

        _done(remove())

    def run(self, execution: Execution, *, stop: Event | None = None, on_waiting: Waiting = unheard) -> ExitReport:
        async def carry_out() -> ExitReport:
            async with self._connected() as api:
                obstacle = await self._obstacle(api, patience=PATIENCE) or self._elsewhere(execution)
                if obstacle:
                    return ExitReport(Ending.REFUSED, None, 0.0, obstacle)
                return await self._carry_out(api, execution, stop or Event(), on_waiting)

        try:
            return _done(carry_out())
        except _Unreachable as problem:
            return ExitReport(Ending.REFUSED, None, 0.0, str(problem))

    def _mounted(self) -> bool:
        return bool(self.mount) and Path(self.mount).is_dir()

    def _elsewhere(self, execution: Execution) -> str | None:
        inside = execution.folders.log.is_relative_to(Path(self.mount).resolve())
        return (
            None
            if inside
            else f"the folders of jobs are not on the claim, which is mounted at {self.mount}; put them there"
        )

    @property
    def _service(self) -> str:
        """Of any text, one that can be a label."""
        return hashlib.sha256(self.service.encode()).hexdigest()[:16]

    # --- The cluster --------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[ApiClient]:
        """Raises: _Unreachable."""
        try:
            client = await self._client()
        except (config.ConfigException, ValueError, OSError) as error:
            raise _Unreachable(
                f"nothing says how the Kubernetes cluster is reached: {_words(error)}; name a block or a kubeconfig"
            ) from None
        async with client:
            yield client

    async def _client(self) -> ApiClient:
        if self.block:
            from prefect_kubernetes.credentials import KubernetesClusterConfig  # noqa: PLC0415 - two seconds

            block = await KubernetesClusterConfig.aload(self.block)
            saved: ApiClient = await block.get_api_client()
            return saved
        configuration = Configuration()
        if not (self.kubeconfig or self.context):
            with suppress(config.ConfigException):
                config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
                return ApiClient(configuration)
        await config.load_kube_config(
            config_file=self.kubeconfig or None, context=self.context or None, client_configuration=configuration
        )
        return ApiClient(configuration)

    async def _obstacle(self, api: ApiClient, *, patience: float) -> str | None:
        if not self._mounted():
            where = self.mount or "any folder"
            return f"the claim {self.claim} is not mounted here at {where}; mount it, and name where"
        asking: dict[str, Any] = {"patience": patience, "started": False}
        try:
            claim = await _insisting(
                CoreV1Api(api).read_namespaced_persistent_volume_claim, self.claim, self.namespace, **asking
            )
            if claim.status.phase == "Lost":
                return f"the claim {self.claim} has lost its volume; make it anew"
            for verb, group, resource in _NEEDED:
                attributes = {"namespace": self.namespace, "verb": verb, "group": group, "resource": resource}
                review = {"spec": {"resourceAttributes": attributes}}
                answer = await _insisting(AuthorizationV1Api(api).create_self_subject_access_review, review, **asking)
                if not answer.status.allowed:
                    return (
                        f"this account may not {verb} {resource} in the namespace {self.namespace}; give it that right"
                    )
        except ApiException as refusal:
            if refusal.status == 404:
                return f"there is no claim {self.claim} in the namespace {self.namespace}; make it"
            return f"the Kubernetes cluster refuses this account: {_words(refusal)}; see the rights it needs"
        return None

    async def _remove(self, api: ApiClient, labels: str, *, gone: bool = False) -> None:
        """
        Delete the Jobs with these labels and wait until nothing of them runs; none there is fine. *gone*: until the
        cluster has forgotten them as well, which can take ten seconds longer.

        Raises: TimeoutError.
        """
        jobs, core = BatchV1Api(api), CoreV1Api(api)
        patience = time.monotonic() + REMOVAL
        asked: dict[str, float] = {}
        while time.monotonic() < patience:
            left = (await _insisting(jobs.list_namespaced_job, self.namespace, label_selector=labels)).items
            for job in left:
                if job.metadata.uid not in asked:
                    await _insisting(_delete, jobs, job)
                    asked[job.metadata.uid] = time.monotonic()
            pods = (await _insisting(core.list_namespaced_pod, self.namespace, label_selector=labels)).items
            if not pods and not left:
                return
            # Of a Job without a pod one may be about to be made.
            made = {job.metadata.name for job in left} <= {pod.metadata.labels.get("job-name") for pod in pods}
            known = time.monotonic() - max(asked.values(), default=0.0) > HEARD
            if made and not gone and all(_is_over(pod, known) for pod in pods):
                return
            await asyncio.sleep(2 * TICK)
        raise TimeoutError("a Job cannot be removed from the Kubernetes cluster")

    # --- One run ------------------------------------------------------------------------------------------------

    async def _carry_out(self, api: ApiClient, execution: Execution, stop: Event, on_waiting: Waiting) -> ExitReport:
        folders, limits = execution.folders, execution.limits
        labels = f"{SERVICE}={self._service},{RUN}={execution.name}"
        root = os.geteuid() == 0
        uid = private_uid(execution.name) if root else os.geteuid()
        gid = uid if root else os.getegid()
        control = _control(execution)
        mark = uuid4().hex
        job = self._job(execution, uid=uid, gid=gid, mark=mark)
        folders.log.touch()
        try:
            await self._remove(api, labels, gone=True)
            shutil.rmtree(control, ignore_errors=True)
            (folders.logs / LOG_NAME).unlink(missing_ok=True)
            # Else the node makes it, as root, whoever the caller is.
            (folders.logs / LOG_NAME).touch(exist_ok=False)
            hand_over(folders, uid)
            _prepare(execution, uid, counted=root, alone_seconds=self.alone_seconds)
            try:
                end = await self._watched(api, job, execution, stop, on_waiting)
            finally:
                await self._remove(api, labels)
        finally:
            shutil.rmtree(control, ignore_errors=True)
            if root:
                os.chown(folders.log, os.geteuid(), os.getegid())
            written = give_back(folders, shown=True)
        on_waiting("")
        ending, code = end.ending, end.code
        if ending is Ending.EXITED and (code == 128 + signal.SIGXFSZ or written >= limits.disk_bytes):
            ending = Ending.DISK_FULL
        if ending is Ending.EXITED:
            assert code is not None  # noqa: S101 - for mypy
            return ExitReport(ending, code, end.seconds, told_of_code(code))
        seconds = max(end.seconds, limits.seconds) if ending is Ending.TIMED_OUT else end.seconds
        return ExitReport(ending, None, seconds, end.words or told_of_limit(ending, limits))

    async def _watched(
        self, api: ApiClient, job: Mapping[str, Any], execution: Execution, stop: Event, on_waiting: Waiting
    ) -> _End:
        """Make the Job and wait for its end or for a limit. What is left of it then may still be running."""
        limits = execution.limits
        try:
            await _insisting(_create, BatchV1Api(api), self.namespace, job)
        except ApiException as refusal:
            return _End(Ending.REFUSED, words=f"the Kubernetes cluster refuses its Job: {_words(refusal)}")
        wait = _Wait(self.wait_seconds, self.pull_seconds, on_waiting)
        life = _SignsOfLife(_control(execution))
        began: float | None = None
        async with _looking(api, self.namespace, job) as sight:
            with closing(DiskWatch(execution.folders, limits.disk_bytes, members=list, top=None)) as disk:
                while (end := sight.last.end) is None:
                    life.give(taken=began is not None and time.monotonic() - began > TAKEN)
                    if began is None and sight.last.begun:
                        began = time.monotonic()
                        on_waiting("")
                    ran = 0.0 if began is None else time.monotonic() - began
                    if stop.is_set():
                        end = _End(Ending.STOPPED, seconds=ran)
                    elif disk.full():
                        end = _End(Ending.DISK_FULL, seconds=ran)
                    elif began is None:
                        end = wait.over(sight.last)
                    elif ran >= limits.seconds + LATE and sight.at > began + limits.seconds:
                        end = _End(Ending.TIMED_OUT, seconds=ran)
                    elif ran >= limits.seconds + AWAY:
                        raise OSError("the Kubernetes cluster has not told how a run went on")
                    if end is not None:
                        break
                    await asyncio.sleep(TICK)
        return end

    def _job(self, execution: Execution, *, uid: int, gid: int, mark: str) -> dict[str, Any]:
        limits = execution.limits
        labels = {
            "app.kubernetes.io/part-of": "compute-to-data",
            SERVICE: self._service,
            JOB: execution.job or execution.name,
            RUN: execution.name,
            TRY: mark,
            NETWORK: str(execution.network).lower(),
        }
        scratch = self.scratch_bytes or min(limits.disk_bytes, limits.memory_bytes)
        runtime_class = (not execution.network and self.runtime_class_offline) or self.runtime_class
        resources: dict[str, str] = {
            "cpu": f"{max(1, round(limits.cpus * 1000))}m",
            "memory": str(limits.memory_bytes),
            # Its root is read-only, it prints nothing, and its scratch is memory.
            "ephemeral-storage": "64Mi",
        }
        if limits.gpus:
            resources[self.gpu_resource] = str(limits.gpus)
        containers = [
            # First, so that an algorithm never waits for it.
            _container(
                _LOG,
                "/",
                _IN_PLACE.format(condition=f"[ -p /c2d/{_OUTPUT} ]", then=_LOGGER.format(blocks=_blocks(limits))),
                {"cpu": "50m", "memory": "32Mi", "ephemeral-storage": "16Mi"},
                [self._shown(_control(execution), "/c2d"), self._shown(execution.folders.log, "/log", writable=True)],
            ),
            _container(
                _ALGORITHM,
                "/data",
                _IN_PLACE.format(condition=f"read -r turn </c2d/{_TURN}", then="exec /bin/sh /c2d/run"),
                resources,
                [
                    self._shown(_control(execution), "/c2d"),
                    *(
                        self._shown(getattr(execution.folders, name), path, writable=name in _WRITABLE)
                        for path, name in _TREE.items()
                    ),
                    self._shown(execution.folders.log, f"/data/logs/{LOG_NAME}"),
                    {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - the run's own
                    {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108
                ],
            ),
        ]
        for container in containers:
            container["image"] = execution.image.reference
            # An image may ask for all there are, and some nodes give them to it.
            given = container["name"] == _ALGORITHM and limits.gpus
            container["env"] = [] if given else [{"name": _GPUS, "value": "void"}]
            container["imagePullPolicy"] = {"always": "Always", "missing": "IfNotPresent", "never": "Never"}[self.pull]
        begins = ceil(self.pull_seconds + limits.seconds + PATIENCE)
        pod: dict[str, Any] = {
            "restartPolicy": "Never",
            "activeDeadlineSeconds": begins,
            "terminationGracePeriodSeconds": 1,
            "serviceAccountName": self.account,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "hostname": "c2d",
            "hostNetwork": False,
            "hostPID": False,
            "hostIPC": False,
            "shareProcessNamespace": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": uid,
                "runAsGroup": gid,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "imagePullSecrets": [{"name": name} for name in self.pull_secrets],
            "nodeSelector": dict(self.node_selector),
            "tolerations": [dict(toleration) for toleration in self.tolerations],
            "containers": containers,
            "volumes": [
                {"name": "work", "persistentVolumeClaim": {"claimName": self.claim}},
                *(
                    {"name": name, "emptyDir": {"medium": "Memory", "sizeLimit": str(scratch)}}
                    for name in ("tmp", "shm")
                ),
            ],
        }
        if runtime_class:
            pod["runtimeClassName"] = runtime_class
        if not execution.network:
            # Nobody to ask, where the policies are not kept either.
            pod |= {"dnsPolicy": "None", "dnsConfig": {"nameservers": ["127.0.0.1"]}}
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": f"c2d-{execution.name}".lower(), "labels": labels},
            "spec": {
                "parallelism": 1,
                "completions": 1,
                "backoffLimit": 0,
                # Backstops, for when nobody is left who knows of it.
                "activeDeadlineSeconds": ceil(self.wait_seconds) + begins,
                "ttlSecondsAfterFinished": KEPT,
                "template": {"metadata": {"labels": labels}, "spec": pod},
            },
        }

    def _shown(self, path: Path, at: str, *, writable: bool = False) -> dict[str, Any]:
        """A part of the claim. Raises: ValueError for what is not on it."""
        inside = path.relative_to(Path(self.mount).resolve())
        return {"name": "work", "mountPath": at, "subPath": str(inside), "readOnly": not writable}


_IMAGE_NAME: Final = re.compile(
    r"([A-Za-z0-9.-]+(:[0-9]{1,5})?/)?"
    r"[a-z0-9]+((\.|__?|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|__?|-+)[a-z0-9]+)*)*"
)
"""A host, which may be left out, and a path."""

_NEEDED: Final = (
    ("create", "batch", "jobs"),
    ("list", "batch", "jobs"),
    ("delete", "batch", "jobs"),
    ("list", "", "pods"),
    ("list", "", "events"),
)

_ALGORITHM: Final = "algorithm"
_LOG: Final = "log"
_TREE: Final = {
    "/data/inputs": "inputs",
    "/data/ddos": "ddos",
    "/data/transformations": "transformations",
    "/data/outputs": "outputs",
    "/data/logs": "logs",
}
_WRITABLE: Final = ("outputs", "logs")


def _container(
    name: str, folder: str, script: str, resources: Mapping[str, str], mounts: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    return {
        "name": name,
        "command": ["/bin/sh", "-c", script],
        "workingDir": folder,
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "volumeMounts": list(mounts),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "privileged": False,
            "capabilities": {"drop": ["ALL"]},
        },
    }


# --- In the pod -----------------------------------------------------------------------------------------------

_SIGN: Final = "sign"
_TURN: Final = "turn"
"""Is there until the first pod has begun; any other, of whoever's making, does nothing."""
_OUTPUT: Final = "output"

_LATE_MARK: Final = "late"
_MEMORY_MARK: Final = "memory"
_ELSEWHERE_MARK: Final = "elsewhere"

# A folder that is not there, because another volume is mounted here, a node makes. By opening it a file is asked for
# anew on every file system.
_IN_PLACE: Final = (
    f"{{condition}} 2>/dev/null || {{{{ echo {_ELSEWHERE_MARK} >/dev/termination-log; exit 1; }}}}; {{then}}"
)

# Deaf to a request to end, so that the last words of the algorithm arrive.
_LOGGER: Final = f"trap '' TERM; ulimit -c 0; ulimit -f {{blocks}}; exec cat /c2d/{_OUTPUT} >>/log"

# The first process of its container. Nobody else can end it but the node, by whatever signal, and when it ends all end.
# What it hears of itself from the two that watch, and of a request to end, is handled by traps that do not return:
# nothing is lost that arrives between two commands. Of the container's own output it lets go at once.
_PORTER: Final = f"""\
exec >/c2d/{_OUTPUT} 2>/dev/null
ulimit -c 0
ulimit -f {{blocks}}
{{processes}}
files='/sys/fs/cgroup/memory/memory.oom_control /sys/fs/cgroup/memory.events'
killed() {{{{
    for file in $files; do
        [ ! -r $file ] || while read -r what count; do
            [ "$what" != oom_kill ] || [ "$count" = 0 ] || return 0
        done <$file
    done
    return 1
}}}}
end() {{{{
    trap '' TERM USR1 USR2
    [ -z "$1" ] || echo "$1" >/dev/termination-log
    kill -TERM -1
    looks=0
    while [ $looks -lt {{looks}} ] && kill -0 -1; do
        looks=$((looks + 1))
        sleep 0.02
    done
    exit 143
}}}}
trap 'end ""' TERM
trap 'end {_LATE_MARK}' USR1
trap 'echo {_MEMORY_MARK} >/dev/termination-log; exit 137' USR2
(
    sleep {{seconds}}
    while kill -USR1 1; do sleep 1; done
) >/dev/null &
(
    quiet=0
    while sleep 0.5; do
        killed && kill -USR2 1
        read -r now </c2d/{_SIGN}
        quiet=$((quiet + 1))
        [ "$now" = "$before" ] || quiet=0
        before=$now
        [ $quiet -lt {{alone}} ] || kill -USR1 1
    done
) >/dev/null &
env {{without}} \\
    HOME=/tmp "LANG=${{{{LANG:-C.UTF-8}}}}" {{variables}} \\
    /bin/sh -c {{entrypoint}} 2>&1 &
wait $!
code=$?
killed && echo {_MEMORY_MARK} >/dev/termination-log
exit $code
"""
_GPUS: Final = "NVIDIA_VISIBLE_DEVICES"
_CLUSTERS: Final = (
    *("KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT", "KUBERNETES_SERVICE_PORT_HTTPS", "KUBERNETES_PORT"),
    *(f"KUBERNETES_PORT_443_TCP{part}" for part in ("", "_PROTO", "_PORT", "_ADDR")),
)
"""Variables that every pod gets, of the API server."""
_OURS: Final = 6
"""Processes of a run's user that are not the algorithm's: the porter, two that watch and what they wait for, the pod's
own, what writes the log; less one, since one of these is away for a moment twice a second."""


def _control(execution: Execution) -> Path:
    """The folder by which the pod and this process speak; the algorithm may read it, as nobody else may."""
    return execution.folders.log.with_name(f"{execution.folders.log.name}.pod")


def _prepare(execution: Execution, uid: int, *, counted: bool, alone_seconds: float) -> None:
    control = _control(execution)
    limits = execution.limits
    variables = {
        **execution.variables,
        "VOLUME": "/data",
        "INPUTS": "/data/inputs",
        "OUTPUTS": "/data/outputs",
        "LOGS": "/data/logs",
        "ALGO": "/data/transformations/algorithm",
    }
    processes = limits.processes + _OURS
    script = _PORTER.format(
        blocks=_blocks(limits),
        # The name of this limit depends on the shell.
        processes=f"ulimit -u {processes} || ulimit -p {processes}" if counted else "",
        looks=round(GRACE / 0.02),
        seconds=f"{limits.seconds:f}",
        alone=ceil(alone_seconds / 0.5),
        without=" ".join(f"-u {name}" for name in (*_CLUSTERS, *(() if limits.gpus else (_GPUS,)))),
        variables=" ".join(shlex.quote(f"{name}={value}") for name, value in variables.items()),
        entrypoint=shlex.quote(execution.entrypoint),
    )
    control.mkdir(mode=0o755)
    control.chmod(0o755)
    run = control / "run"
    run.touch(mode=0o600)
    run.write_bytes(script.encode("utf-8", "surrogateescape"))
    os.mkfifo(control / _OUTPUT, 0o600)
    (control / _SIGN).write_text("0\n")
    (control / _SIGN).chmod(0o644)
    (control / _TURN).write_text("first\n")
    (control / _TURN).chmod(0o644)
    if os.geteuid() == 0:
        for path in (run, control / _OUTPUT, execution.folders.log):
            os.chown(path, uid, uid)


def _blocks(limits: Limits) -> int:
    """What one file may have, as a shell counts it."""
    return ceil(limits.disk_bytes / 512)


# --- What is seen of a pod ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _End:
    ending: Ending
    code: int | None = None
    seconds: float = 0.0
    words: str = ""


@dataclass(frozen=True)
class _Seen:
    """Of a Job, at one look."""

    why: str = ""
    """It has not begun."""
    placed: bool = False
    begun: bool = False
    end: _End | None = None


@dataclass
class _Sight:
    """What was seen last, and when somebody began to look at it."""

    last: _Seen = field(default_factory=_Seen)
    at: float = 0.0


class _Wait:
    """For a run to begin: for a place at first, and then for what is needed there."""

    def __init__(self, place_seconds: float, pull_seconds: float, on_waiting: Waiting) -> None:
        self._began = time.monotonic()
        self._placed: float | None = None
        self._place_seconds = place_seconds
        self._pull_seconds = pull_seconds
        self._on_waiting = on_waiting
        self._told = ""

    def over(self, seen: _Seen) -> _End | None:
        """The end of one that waited for too long."""
        now = time.monotonic()
        if seen.placed and self._placed is None:
            self._placed = now
        if seen.why != self._told:
            self._told = seen.why
            self._on_waiting(f"waiting for the cluster: {seen.why}" if seen.why else "")
        if self._placed is None:
            since, seconds, what = self._began, self._place_seconds, "there was no place for it"
        else:
            since, seconds, what = self._placed, self._pull_seconds, "it could not be begun"
        if now - since < seconds:
            return None
        return _End(Ending.REFUSED, words=f"{what} within {seconds:g} s: {seen.why or 'no reason is told'}")


class _SignsOfLife:
    """By which a pod knows that whoever waits for it is there."""

    def __init__(self, control: Path) -> None:
        self._file = control / _SIGN
        self._given = 0
        self._due = 0.0

    def give(self, *, taken: bool) -> None:
        """*taken*: the pod has begun for certain, so that no second one may."""
        if (now := time.monotonic()) >= self._due:
            self._given, self._due = self._given + 1, now + SIGN
            self._file.write_text(f"{self._given}\n")
            if taken:
                self._file.with_name(_TURN).unlink(missing_ok=True)


@asynccontextmanager
async def _looking(api: ApiClient, namespace: str, job: Mapping[str, Any]) -> AsyncIterator[_Sight]:
    """While this lasts, look at a Job every now and then. An API server that is away is only waited for."""
    sight = _Sight()
    eye = _Eye(CoreV1Api(api), BatchV1Api(api), namespace, job)

    async def look() -> None:
        while True:
            at = time.monotonic()
            try:
                sight.last, sight.at = await eye.look(), at
            except Exception as error:
                if not _passes(error, started=True):
                    raise
            await asyncio.sleep(LOOK)

    task = asyncio.create_task(look())
    owner = asyncio.current_task()
    # A bug, or a right that was taken away: whoever waits for what is seen would wait for ever.
    task.add_done_callback(lambda done: owner.cancel() if owner and not done.cancelled() else None)
    try:
        yield sight
    except asyncio.CancelledError:
        if task.done() and not task.cancelled() and (error := task.exception()) is not None:
            if owner is not None:
                owner.uncancel()
            raise OSError(f"the Kubernetes cluster does not tell how a run goes on: {_words(error)}") from error
        raise
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


class _Eye:
    """Looks at one Job; knows the pod that it saw first."""

    def __init__(self, core: CoreV1Api, jobs: BatchV1Api, namespace: str, job: Mapping[str, Any]) -> None:
        self._core = core
        self._jobs = jobs
        self._namespace = namespace
        self._name = job["metadata"]["name"]
        self._labels = ",".join(f"{key}={job['metadata']['labels'][key]}" for key in (SERVICE, TRY))
        self._image = job["spec"]["template"]["spec"]["containers"][0]["image"]
        self._pod = ""
        self._begun = False
        self._over_since: float | None = None

    async def look(self) -> _Seen:
        found = await self._core.list_namespaced_pod(
            self._namespace, label_selector=self._labels, _request_timeout=REQUEST
        )
        pods = [pod for pod in found.items if not self._pod or pod.metadata.uid == self._pod]
        if not pods:
            return await self._without_pod()
        pod = min(pods, key=lambda each: each.metadata.creation_timestamp)
        self._pod = pod.metadata.uid
        return await self._with_pod(pod)

    async def _without_pod(self) -> _Seen:
        try:
            job = await self._jobs.read_namespaced_job(self._name, self._namespace, _request_timeout=REQUEST)
        except ApiException as answer:
            if answer.status != 404:
                raise
            return _Seen(end=_KILLED)
        if any(c.type == "Failed" and c.reason == "DeadlineExceeded" for c in job.status.conditions or ()):
            return _Seen(end=_End(Ending.TIMED_OUT if self._begun else Ending.REFUSED, words="its Job has timed out"))
        if self._pod or job.metadata.deletion_timestamp:
            # By somebody else.
            return _Seen(end=_KILLED)
        refusal = await self._warning(f"name={self._name}", "FailedCreate")
        if refusal and "exceeded quota" not in refusal and re.search(r"forbidden|not found|invalid", refusal):
            return _Seen(end=_End(Ending.REFUSED, words=f"the Kubernetes cluster refuses its pod: {refusal}"))
        return _Seen(why=refusal)

    async def _with_pod(self, pod: Any) -> _Seen:
        status = pod.status
        states = {each.name: each.state for each in status.container_statuses or ()}
        own, log = states.get(_ALGORITHM), states.get(_LOG)
        self._begun = self._begun or bool(own and (own.running or own.terminated))
        end = None
        if status.phase == "Failed" and status.reason:
            end = _of_pod(status, begun=self._begun)
        elif own and own.terminated:
            self._over_since = self._over_since or time.monotonic()
            # Else the last of its output is on the way.
            if not (log and log.running) or time.monotonic() - self._over_since > SETTLED:
                end = _of_container(own.terminated)
        elif pod.metadata.deletion_timestamp:
            # By somebody else. The cluster makes another pod of the Job at once, over what this one has written.
            end = _KILLED
        elif log and log.terminated:
            end = _of_logger(log.terminated)
        elif not self._begun:
            return await self._of_begin(pod, [state.waiting for state in states.values() if state.waiting])
        return _Seen(placed=True, begun=self._begun, end=end)

    async def _of_begin(self, pod: Any, waiting: Sequence[Any]) -> _Seen:
        """Why a pod has not begun."""
        for each in waiting:
            if (end := await self._of_waiting(each)) is not None:
                return _Seen(placed=True, end=end)
        for condition in pod.status.conditions or ():
            if condition.type == "PodScheduled" and condition.status != "True":
                return _Seen(why=_words(condition.message or condition.reason or ""))
        if not pod.spec.node_name:
            return _Seen()
        unusual = [each.message or each.reason for each in waiting if each.reason not in _USUAL]
        why = _words(unusual[0]) if unusual else await self._warning(f"uid={self._pod}", "FailedMount")
        return _Seen(placed=True, why=why)

    async def _of_waiting(self, waiting: Any) -> _End | None:
        """What will not pass by itself."""
        match waiting.reason:
            case reason if reason in _NO_IMAGE:
                words = self._said(waiting.message)
                if waiting.reason == "ImagePullBackOff":
                    # It says only that there was a failure.
                    words = await self._warning(f"uid={self._pod}", "Failed", "Failed to pull") or words
                return _End(Ending.IMAGE_UNAVAILABLE, words=f"{self._image} could not be pulled: {words}")
            case "CreateContainerError" | "CreateContainerConfigError" | "RunContainerError":
                return _End(Ending.REFUSED, words=_why_not_started(waiting.message or ""))
        return None

    async def _warning(self, about: str, reason: str, beginning: str = "") -> str:
        """The words of the last such event about a Job or a pod."""
        found = await self._core.list_namespaced_event(
            self._namespace, field_selector=f"involvedObject.{about},reason={reason}", _request_timeout=REQUEST
        )
        told = [event for event in found.items if (event.message or "").startswith(beginning)]
        last = max(told, key=lambda event: str(event.last_timestamp or event.event_time), default=None)
        return self._said(last.message) if last is not None else ""

    def _said(self, message: str | None) -> str:
        """Without the name of the image, which is long and known."""
        text = (message or "").replace(f'Failed to pull image "{self._image}": ', "")
        return _words(text.replace(self._image, "the image")) if text else ""


_USUAL: Final = ("ContainerCreating", "PodInitializing", None)
"""Reasons of a container that is about to begin."""
_NO_IMAGE: Final = frozenset(
    {
        *("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"),
        *("ImageInspectError", "SignatureValidationFailed"),
    }
)
_KILLED: Final = _End(Ending.EXITED, 128 + signal.SIGKILL)
"""Of a run whose Job or pod somebody has removed."""


def _is_over(pod: Any, known: bool) -> bool:
    """Whether nothing of a pod that is to end runs, nor will; *known*: that it is to, by its node."""
    states = [each.state for each in pod.status.container_statuses or ()]
    if not states:
        return known and pod.status.phase in ("Succeeded", "Failed")
    # A pod can be told to have failed before its containers have ended.
    return all(state.terminated for state in states) or (known and not any(state.running for state in states))


def _of_pod(status: Any, *, begun: bool) -> _End:
    """The end of a pod that its node has ended."""
    message = status.message or ""
    match status.reason:
        case "Evicted" if "memory" in message:
            return _End(Ending.OUT_OF_MEMORY)
        case "Evicted":
            return _End(Ending.DISK_FULL)
        case "DeadlineExceeded":
            return _End(Ending.TIMED_OUT if begun else Ending.REFUSED, words="" if begun else "was never begun")
    if begun:
        return _KILLED
    return _End(Ending.REFUSED, words=f"its node has refused it: {_words(message or status.reason)}")


def _of_container(ended: Any) -> _End:
    message = (ended.message or "").strip()
    if ended.reason in ("ContainerCannotRun", "StartError"):
        return _End(Ending.REFUSED, words=_why_not_started(message))
    seconds = _seconds(ended.started_at, ended.finished_at)
    # Whatever the code: a parent may not have noticed that a child was killed.
    if ended.reason == "OOMKilled" or message == _MEMORY_MARK:
        return _End(Ending.OUT_OF_MEMORY, seconds=seconds)
    if message == _LATE_MARK:
        return _End(Ending.TIMED_OUT, seconds=seconds)
    if message == _ELSEWHERE_MARK:
        return _End(Ending.REFUSED, words="the claim is not what is mounted here: its folders are not on it")
    return _End(Ending.EXITED, ended.exit_code, seconds)


def _of_logger(ended: Any) -> _End:
    """The end of a pod in which nobody writes the log any more."""
    if ended.reason in ("ContainerCannotRun", "StartError"):
        return _End(Ending.REFUSED, words=_why_not_started(ended.message or ""))
    if (ended.message or "").strip() == _ELSEWHERE_MARK:
        return _End(Ending.REFUSED, words="the claim is not what is mounted here: its folders are not on it")
    if ended.exit_code == 128 + signal.SIGXFSZ:
        return _End(Ending.DISK_FULL)
    return _End(Ending.REFUSED, words=f"what writes the log has ended with {ended.exit_code}; the image needs cat")


def _seconds(started: datetime | None, finished: datetime | None) -> float:
    return max(0.0, (finished - started).total_seconds()) if started and finished else 0.0


# --- Requests -------------------------------------------------------------------------------------------------


class _Unreachable(OSError):
    """Why there is no cluster, as one sentence with the remedy."""


def _done(work: Coroutine[Any, Any, T]) -> T:
    """Do it in this thread, or in one of its own if this one has an event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(asyncio.run(work))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    for error in errors:
        raise error
    return results[0]


async def _insisting(
    ask: Callable[..., Awaitable[Any]], *what: Any, patience: float = PATIENCE, started: bool = True, **more: Any
) -> Any:
    """
    What is asked of the API server, again for so long if it is away; *started*: it has answered us before.

    Raises: _Unreachable; ApiException for a refusal.
    """

    async def once() -> Any:
        return await ask(*what, _request_timeout=REQUEST, **more)

    asked = AsyncRetrying(
        retry=retry_if_exception(lambda error: _passes(error, started=started)),
        stop=stop_after_delay(patience),
        wait=wait_fixed(0.5),
        reraise=True,
    )
    try:
        return await asked(once)
    except Exception as error:
        if not _passes(error, started=False):
            raise
        raise _Unreachable(
            f"the Kubernetes API server does not answer: {_words(error)}; start it, or name it"
        ) from None


def _passes(error: BaseException, *, started: bool) -> bool:
    """Whether it may be otherwise a moment later."""
    if isinstance(error, ApiException):
        # An API server that has just been started does not know anybody's rights yet.
        passing = (None, 0, 408, 429, *((401, 403) if started else ()))
        return error.status in passing or int(error.status) >= 500
    return isinstance(error, aiohttp.ClientError | asyncio.TimeoutError | OSError)


async def _create(jobs: BatchV1Api, namespace: str, job: Any, **more: Any) -> None:
    try:
        await jobs.create_namespaced_job(namespace, job, **more)
    except ApiException as conflict:
        if conflict.status != 409:
            raise
        # Ours, if an earlier answer was lost.
        found = await jobs.read_namespaced_job(job["metadata"]["name"], namespace, **more)
        if (found.metadata.labels or {}).get(TRY) != job["metadata"]["labels"][TRY]:
            raise


async def _delete(jobs: BatchV1Api, job: Any, **more: Any) -> None:
    """In the foreground: it is there until its pod is gone."""
    body: Any = {"propagationPolicy": "Foreground", "preconditions": {"uid": job.metadata.uid}}
    try:
        await jobs.delete_namespaced_job(job.metadata.name, job.metadata.namespace, body=body, **more)
    except ApiException as answer:
        if answer.status not in (404, 409):  # gone, or another one of that name
            raise


# --- Words ----------------------------------------------------------------------------------------------------


def _why_not_started(message: str) -> str:
    if '"/bin/sh"' in message and "no such file" in message:
        return "the image has no /bin/sh, by which the entrypoint is run"
    return f"the node has not started the container: {_words(message)}"


def _words(error: object) -> str:
    """What the cluster said, short, in one line, without addresses' secrets and paths of a machine."""
    text = str(error)
    if isinstance(error, ApiException):
        told = re.search(r'"message":\s*"((?:[^"\\]|\\.)*)"', str(error.body or ""))
        text = told[1].replace('\\"', '"') if told else f"{error.status} {error.reason}"
    text = re.sub(r"rpc error: code = \w+ desc = |Error response from daemon: ", "", text)
    # An address may hold a password, or a signature in its query.
    text = re.sub(r"\b[a-z]+://[^\s\"']+", "(address)", text)
    return without_paths(text.strip() or type(error).__name__)
