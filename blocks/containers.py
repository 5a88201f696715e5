"""
Algorithms as containers of a Docker engine on the worker's machine.

What stands between an algorithm and the machine is the engine's: namespaces, cgroups, its default seccomp profile,
no capability and no way to gain one, a root that is read-only, a user of its own; with the runtime ``runsc`` also a
kernel of its own. Three things the engine does not do are done here:

- Disk. An engine has no quota for what is mounted into a container, a tmpfs would hold results of gigabytes in memory,
  and an image file mounted for each run would be one more thing a crash leaves behind. So outputs, logs and files
  without a name are measured while the algorithm runs, as the process runner does; a single file cannot get past the
  limit, and the only other places that can be written are memory.
- The end of the caller. A program beside each run removes the container when the caller is gone. Should that be
  killed too, the container is found by its labels: ``jobs_left`` and ``remove_job``, and by its name when the same
  run is begun again.
- Endings. In every container stands a small ``sh`` before the algorithm, which hands a request to end on to all
  processes; as the first process of its namespace an algorithm would be deaf to it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from posixpath import normpath
from threading import Event
from typing import IO, Any, Final, Literal
from uuid import uuid4

import docker
import psutil
from docker.auth import resolve_repository_name
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.types import LogConfig, Mount, Ulimit
from docker.utils import parse_repository_tag

from blocks import container_guard, gpus
from blocks.limits import Limits
from blocks.run_folder import LOG_NAME, DiskWatch, give_back, hand_over, private_uid
from blocks.runner import (
    GRACE,
    TICK,
    Ending,
    Execution,
    ExitReport,
    Folders,
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

PullPolicy = Literal["always", "missing", "never"]

SETUP: Final = 60.0
"""Seconds the engine may take for one call, other than a pull."""
SETTLED: Final = 10.0
"""Seconds after which a container whose first process is over is over too."""

_SILENT: Final = "the Docker engine does not answer"

_KERNEL_THREADS: Final = 256
"""Further threads for a runtime of the operator's choice: gVisor's kernel runs within the limits of its container, and
at a few dozen does not start but hang, and the engine with it."""

JOB: Final = "c2d.job"
SERVICE: Final = "c2d.service"
TRY: Final = "c2d.try"
"""Labels of a container: its job; the service, since those that share an engine leave each other's alone; itself."""


@dataclass(frozen=True)
class DockerRunner(Runner):
    """
    One container per run, of the image the execution names.

    The engine has to see the folders of a run where the caller sees them, so it is one on the same machine. As root
    the algorithm gets a user id of its own, with what that means for the folders (see ``ProcessRunner``); as any
    other user, who has to be allowed to speak to the engine, it runs under the caller's.
    """

    host: str = ""
    """Of the engine, such as ``unix:///run/docker.sock``. Empty: what DOCKER_HOST says, else the usual socket."""
    pull: PullPolicy = "missing"
    """
    When a registry is asked: with ``always`` for what a tag means, each time an image is fetched; else, and for an
    image by checksum, only for what is not here. What is here is everybody's, whoever had the credentials for it.
    """
    registries: Mapping[str, Mapping[str, str]] = field(default_factory=dict, repr=False)
    """``username`` and ``password`` by host of the registry, ``docker.io`` for Docker's own."""
    runtime: str = ""
    """Of the engine's runtimes, such as ``runsc``. Empty: its default."""
    network: str = "bridge"
    """The engine's network for algorithms that may have one."""
    scratch_bytes: int = 0
    """Size of ``/tmp`` and of ``/dev/shm``. 0: as much as the run may have of memory or of disk, if that is less."""
    pull_seconds: float = 3600.0
    """Deadline of a pull."""
    service: str = ""
    """Whose containers these are, among the services that share the engine."""
    gpus: tuple[str, ...] = ()
    """The engine's GPUs that runs may have, as the engine knows them: numbers or UUIDs."""
    gpu_turn: Path = Path("gpus.lock")
    """A file, the same for all runs that choose among these GPUs."""
    gpu_seconds: float = 86_400.0
    """How long a run waits for GPUs that others have."""

    def obstacle(self) -> str | None:
        try:
            with closing(self._connect()) as client:
                missing = self._missing(client.info())
                return missing or (gpus.obstacle(client, self.host, self.gpus) if self.gpus else None)
        except OSError as error:
            return f"{_SILENT}: {_words(error)}; start it, or let this user speak to it"

    def _missing(self, info: Mapping[str, Any]) -> str | None:
        security = " ".join(info.get("SecurityOptions") or ())
        if info.get("OSType") != "linux":
            return "the Docker engine runs no Linux containers; use one that does"
        if "name=rootless" in security or "name=userns" in security:
            return "the Docker engine maps user ids, which the folders of a run do not follow; use one that does not"
        if "name=seccomp" not in security or "profile=unconfined" in security:
            return "the Docker engine has no seccomp profile; start it with its default one"
        for limit, name in {"MemoryLimit": "memory", "PidsLimit": "processes", "CpuCfsQuota": "cpus"}.items():
            if not info.get(limit):
                return f"the Docker engine cannot limit {name}; give it the cgroup controller for that"
        if self.runtime and self.runtime not in info.get("Runtimes", {}):
            return f"the Docker engine has no runtime {self.runtime}; name it in the engine's daemon.json"
        return None

    def fetch_image(self, image: Image, *, on_progress: Progress = untold, stop: Event | None = None) -> Image:
        try:
            client = self._connect()
        except OSError as error:
            raise ImageUnavailable(f"{_SILENT}: {_words(error)}") from None
        with closing(client):
            asks = self.pull == "always" and not image.checksum
            found = self._image(client, image, on_progress, stop or Event(), asks=asks)
        if image.checksum:
            return image
        names = {image.name, image.name.removeprefix("docker.io/"), image.name.removeprefix("docker.io/library/")}
        checksums = [d.partition("@")[2] for d in _digests(found) if d.partition("@")[0] in names]
        return Image(image.name, image.tag, checksums[0]) if checksums else image

    def jobs_left(self) -> frozenset[str]:
        with closing(self._connect()) as client:
            found = client.api.containers(all=True, filters={"label": [f"{SERVICE}={self.service}"]})
        return frozenset(container["Labels"][JOB] for container in found)

    def remove_job(self, job: str) -> None:
        labels = [f"{SERVICE}={self.service}", f"{JOB}={job}"]
        with closing(self._connect()) as client:
            for container in client.api.containers(all=True, filters={"label": labels}):
                _remove(client, container["Id"])

    def run(self, execution: Execution, *, stop: Event | None = None, on_waiting: Waiting = unheard) -> ExitReport:
        stop = stop or Event()
        if obstacle := self.obstacle():
            return ExitReport(Ending.REFUSED, None, 0.0, obstacle)
        with closing(self._connect()) as client:
            try:
                image = self._image(client, execution.image, untold, stop, asks=False)
            except ImageUnavailable as reason:
                if stop.is_set():
                    return ExitReport(Ending.STOPPED, None, 0.0, told_of_limit(Ending.STOPPED, execution.limits))
                return ExitReport(Ending.IMAGE_UNAVAILABLE, None, 0.0, str(reason))
            return self._carry_out(client, execution, image, stop, on_waiting)

    def _connect(self) -> docker.DockerClient:
        """Raises: OSError if no engine answers."""
        try:
            if self.host:
                return docker.DockerClient(base_url=self.host, timeout=SETUP)
            return docker.from_env(timeout=SETUP)
        except DockerException as error:
            raise OSError(_words(error)) from None

    # --- Images -------------------------------------------------------------------------------------------------

    def _image(
        self, client: docker.DockerClient, image: Image, on_progress: Progress, stop: Event, *, asks: bool
    ) -> Mapping[str, Any]:
        """What the engine knows of the image, pulled if it is not here or *asks*. Raises: ImageUnavailable."""
        try:
            registry, _ = resolve_repository_name(image.name)
        except DockerException:
            registry = ""
        if not registry or parse_repository_tag(image.name)[1]:
            raise ImageUnavailable(f"{image.name} is no name of an image; a tag or checksum is a field of its own")
        found = _inspected(client, image)
        if self.pull == "never":
            if found is None:
                raise ImageUnavailable(f"{image.reference} is not on the machine, and this environment pulls no image")
        elif found is None or asks:
            credentials = self.registries.get(registry, {})
            _Pull(client, image, credentials, on_progress).wait(self.pull_seconds, stop)
            found = _inspected(client, image)
            if found is None:
                raise ImageUnavailable(f"{image.reference} was pulled and is not there")
        if image.checksum and image.checksum not in [digest.partition("@")[2] for digest in _digests(found)]:
            raise ImageUnavailable(f"what the engine has for {image.reference} has another checksum")
        return found

    # --- One run ------------------------------------------------------------------------------------------------

    def _carry_out(
        self,
        client: docker.DockerClient,
        execution: Execution,
        image: Mapping[str, Any],
        stop: Event,
        on_waiting: Waiting,
    ) -> ExitReport:
        folders, limits = execution.folders, execution.limits
        name = f"c2d-{execution.name}"
        uid = private_uid(execution.name) if os.geteuid() == 0 else os.geteuid()
        gid = uid if os.geteuid() == 0 else os.getegid()
        try:
            with ExitStack() as undo:
                log = undo.enter_context(folders.log.open("ab", buffering=0))
                mark = uuid4().hex
                undo.enter_context(_guarded(self.host, f"{TRY}={mark}"))
                _remove(client, name)
                turn = undo.enter_context(ExitStack())
                try:
                    devices = turn.enter_context(self._devices(client, limits.gpus, stop, on_waiting))
                except gpus.NoGpu as reason:
                    if stop.is_set():
                        return ExitReport(Ending.STOPPED, None, 0.0, told_of_limit(Ending.STOPPED, limits))
                    return ExitReport(Ending.REFUSED, None, 0.0, str(reason))
                # Else the engine makes it, as root, whoever the caller is.
                (folders.logs / LOG_NAME).unlink(missing_ok=True)
                (folders.logs / LOG_NAME).touch(exist_ok=False)
                hand_over(folders, uid)
                undo.callback(_remove, client, name)
                try:
                    client.api.create_container_from_config(
                        self._configuration(client, execution, image, user=f"{uid}:{gid}", mark=mark, devices=devices),
                        name,
                    )
                    turn.close()
                    on_waiting("")
                    output = _Output(client.api.attach(name, stream=True, demux=True), log, limits.disk_bytes)
                    killed = undo.enter_context(_oom_kills(client, name))
                    began = time.monotonic()
                    client.api.start(name)
                except APIError as refusal:
                    return ExitReport(Ending.REFUSED, None, 0.0, _why_not_started(refusal))
                ending = _watch(client, name, output, execution, killed, deadline=began + limits.seconds, stop=stop)
                state = _ended(client, name, output, by_itself=ending is Ending.EXITED)
                seconds = time.monotonic() - began
        finally:
            written = give_back(folders, shown=True)
        code = int(state["ExitCode"])
        if ending is Ending.EXITED and (output.out_of_memory or killed.is_set() or state["OOMKilled"]):
            # Whatever the code: a parent may not have noticed that a child was killed. And whoever tells of it: the
            # engine forgets it if it learns of the end of the container first.
            ending = Ending.OUT_OF_MEMORY
        if ending is Ending.EXITED and (output.full or code == 128 + signal.SIGXFSZ or written >= limits.disk_bytes):
            ending = Ending.DISK_FULL
        if ending is Ending.EXITED:
            return ExitReport(ending, code, seconds, told_of_code(code))
        return ExitReport(ending, None, seconds, told_of_limit(ending, limits))

    def _devices(
        self, client: docker.DockerClient, wanted: int, stop: Event, on_waiting: Waiting
    ) -> AbstractContextManager[tuple[str, ...]]:
        """Raises, when it is entered: NoGpu."""
        if not wanted:
            return nullcontext(())
        return gpus.allotted(
            client, wanted, self.gpus, self.gpu_turn, stop=stop, on_waiting=on_waiting, seconds=self.gpu_seconds
        )

    def _configuration(
        self,
        client: docker.DockerClient,
        execution: Execution,
        image: Mapping[str, Any],
        *,
        user: str,
        mark: str,
        devices: Sequence[str],
    ) -> dict[str, Any]:
        limits = execution.limits
        own = image["Config"] or {}
        scratch = self.scratch_bytes or min(limits.disk_bytes, limits.memory_bytes)
        tmpfs = f"rw,exec,nosuid,nodev,mode=1777,size={scratch}"
        host = client.api.create_host_config(
            mounts=_mounts(execution.folders),
            # A volume that an image declares would be a folder of the machine without any limit.
            tmpfs=dict.fromkeys({"/tmp", *map(normpath, own.get("Volumes") or ())} - _TREE.keys(), tmpfs),  # noqa: S108
            shm_size=scratch,
            read_only=True,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges:true"],
            network_mode=self.network if execution.network else "none",
            ipc_mode="private",
            cgroupns="private",
            mem_limit=limits.memory_bytes,
            memswap_limit=limits.memory_bytes,
            # The porter counts as one.
            pids_limit=limits.processes + 1 + (_KERNEL_THREADS if self.runtime else 0),
            nano_cpus=int(max(0.01, min(limits.cpus, client.info()["NCPU"])) * 1e9),
            ulimits=_ulimits(limits),
            # What it prints goes to its log and nowhere else; the engine's own has no limit.
            log_config=LogConfig(type=LogConfig.types.NONE),
            runtime=self.runtime or None,
            device_requests=gpus.request(devices),
        )
        return dict(
            client.api.create_container_config(
                image["Id"],
                command=[execution.entrypoint],
                entrypoint=["/bin/sh", "-c", _PORTER.format(mark=_OOM_MARK.decode()), "sh"],
                environment=_variables(execution, own.get("Env") or ()) | gpus.visible(devices),
                user=user,
                hostname="c2d",
                working_dir="/data",
                labels={SERVICE: self.service, JOB: execution.job or execution.name, TRY: mark}
                | ({gpus.GPUS: ",".join(devices)} if devices else {}),
                healthcheck={"test": ["NONE"]},
                host_config=host,
            )
        )


# SIGTERM is handed on to all processes but this one, which lives until they are gone: were it the algorithm's shell
# that ends first, the rest would go with it in the middle of their cleaning up. Only a shell that waits for a child in
# the background hears a signal; the price is that the algorithm has SIGINT and SIGQUIT ignored. The algorithm's two
# outputs become one, because the order between two would be lost; the other is left for what stands here at the end.
_PORTER: Final = """
    trap 'asked=1; kill -TERM -1' TERM
    /bin/sh -c "$1" 2>&1 &
    wait $!
    code=$?
    [ -z "$asked" ] || while kill -0 -1 2>/dev/null; do sleep 0.02; done
    for file in /sys/fs/cgroup/memory/memory.oom_control /sys/fs/cgroup/memory.events; do
        [ ! -r $file ] || while read -r what count; do
            [ "$what" != oom_kill ] || [ "$count" = 0 ] || echo {mark} >&2
        done < $file
    done
    exit $code
"""
_OOM_MARK: Final = b"processes were killed for memory"

_TREE: Final = {
    "/data/inputs": "inputs",
    "/data/ddos": "ddos",
    "/data/transformations": "transformations",
    "/data/outputs": "outputs",
    "/data/logs": "logs",
}
_WRITABLE: Final = ("outputs", "logs")


def _mounts(folders: Folders) -> list[Mount]:
    tree = [
        Mount(target, str(getattr(folders, name)), type="bind", read_only=name not in _WRITABLE)
        for target, name in _TREE.items()
    ]
    return [*tree, Mount(f"/data/logs/{LOG_NAME}", str(folders.log), type="bind", read_only=True)]


def _variables(execution: Execution, own: Sequence[str]) -> dict[str, str | None]:
    """Beside those of the image, which belong to its programs."""
    lang = {} if any(variable.startswith("LANG=") for variable in own) else {"LANG": "C.UTF-8"}
    return {
        "HOME": "/tmp",  # noqa: S108 - the run's own
        **lang,
        **execution.variables,
        "VOLUME": "/data",
        "INPUTS": "/data/inputs",
        "OUTPUTS": "/data/outputs",
        "LOGS": "/data/logs",
        "ALGO": "/data/transformations/algorithm",
    }


def _ulimits(limits: Limits) -> list[Ulimit]:
    wanted = {"fsize": limits.disk_bytes, "core": 0, "nofile": 16_384}
    return [Ulimit(name=name, soft=value, hard=value) for name, value in wanted.items()]


def _watch(
    client: docker.DockerClient,
    name: str,
    output: _Output,
    execution: Execution,
    killed: Event,
    *,
    deadline: float,
    stop: Event,
) -> Ending:
    """Wait for the end or for a limit. Only at the deadline and on a stop has the algorithm been asked to end."""

    def ask_to_end(until: float) -> None:
        with suppress(APIError):
            client.api.kill(name, "SIGTERM")
        output.ended.wait(until - time.monotonic())

    top = _first_process(client, name)
    with closing(
        DiskWatch(
            execution.folders,
            execution.limits.disk_bytes,
            members=lambda: _alive(top),
            top=top.pid if top is not None else None,
        )
    ) as disk:
        while not output.ended.wait(max(0.0, min(TICK, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                ask_to_end(deadline + GRACE)
                return Ending.TIMED_OUT
            if stop.is_set():
                ask_to_end(time.monotonic() + GRACE)
                return Ending.STOPPED
            if killed.is_set():
                return Ending.OUT_OF_MEMORY
            if output.full or disk.full():
                return Ending.DISK_FULL
    return Ending.EXITED


def _ended(client: docker.DockerClient, name: str, output: _Output, *, by_itself: bool) -> Mapping[str, Any]:
    """The state of a container that ends *by_itself* or else is killed."""
    try:
        if by_itself:
            # That nobody can print any more is its end, unless somebody has closed what belongs to the porter.
            with suppress(OSError):
                client.api.wait(name, timeout=SETTLED)
        with suppress(APIError):  # it has ended
            client.api.kill(name, "SIGKILL")
        client.api.wait(name)
        output.join()
        return dict(client.api.inspect_container(name)["State"])
    except NotFound:
        # Somebody has removed it, and killed it for that.
        return {"ExitCode": 128 + signal.SIGKILL, "OOMKilled": False}


def _first_process(client: docker.DockerClient, name: str) -> psutil.Process | None:
    """Pid 1 of a container; None if it is over, or its number is not one of this machine's."""
    with suppress(psutil.Error, OSError):
        container = client.api.inspect_container(name)
        if (pid := container["State"]["Pid"]) and container["Id"] in Path(f"/proc/{pid}/cgroup").read_text():
            return psutil.Process(pid)
    return None


def _alive(top: psutil.Process | None) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return [] if top is None else top.children(recursive=True)
    return []


class _Output:
    """What an algorithm prints, written into the log by a thread as it comes, up to the limit of disk."""

    def __init__(self, chunks: Iterator[tuple[bytes | None, bytes | None]], log: IO[bytes], limit: int) -> None:
        self._chunks = chunks
        self._log = log
        self._limit = limit
        self.full = False
        self.out_of_memory = False
        """So the porter told."""
        self.ended = Event()
        """Nobody in the container can print any more: it is over."""
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def _copy(self) -> None:
        written = self._log.seek(0, os.SEEK_END)
        try:
            for chunk, aside in self._chunks:
                self.out_of_memory |= _OOM_MARK in (aside or b"")
                if chunk is None:
                    continue
                # Beyond the limit it is read and dropped, so that nothing waits for it, until the container is killed.
                part = chunk[: max(0, self._limit - written)]
                if len(part) < len(chunk):
                    self.full = True
                while part:
                    count = self._log.write(part)
                    written, part = written + count, part[count:]
        except OSError:
            # A log that cannot be written: the disk is full in earnest.
            self.full = True
        finally:
            self.ended.set()

    def join(self) -> None:
        self._thread.join(SETUP)


@contextmanager
def _oom_kills(client: docker.DockerClient, name: str) -> Iterator[Event]:
    """Set when a process of a container is killed for memory: those who wait for it might wait for ever."""
    events = client.api.events(filters={"container": [name], "event": ["oom"]})
    seen = Event()

    def follow() -> None:
        for _ in events:
            seen.set()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        events.close()
        thread.join(SETUP)


@contextmanager
def _guarded(host: str, label: str) -> Iterator[None]:
    """While this lasts, the end of this process is the end of the container with that label."""
    with subprocess.Popen(
        [sys.executable, "-P", str(container_guard.__file__), host, label],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    ) as guard:
        try:
            yield
        finally:
            guard.communicate(container_guard.DONE)


def _remove(client: docker.DockerClient, name: str) -> None:
    """Kill and remove a container with its volumes; none there is fine. Raises: APIError, TimeoutError."""
    patience = time.monotonic() + SETUP
    while time.monotonic() < patience:
        try:
            client.api.remove_container(name, force=True, v=True)
        except NotFound:
            return
        except APIError as conflict:
            if conflict.status_code != 409:  # somebody else is removing it
                raise
        time.sleep(TICK / 5)
    raise TimeoutError("a container cannot be removed")


# --- Pulling --------------------------------------------------------------------------------------------------

_LAYER: Final = frozenset(
    {
        *("Pulling fs layer", "Waiting", "Downloading", "Verifying Checksum", "Download complete", "Extracting"),
        *("Pull complete", "Already exists"),
    }
)


class _Pull:
    """A pull by a thread of its own: a registry that is silent must not keep a job from being stopped."""

    def __init__(
        self, client: docker.DockerClient, image: Image, credentials: Mapping[str, str], on_progress: Progress
    ) -> None:
        self._client = client
        self._image = image
        self._credentials = credentials
        self._on_progress = on_progress
        self._failure = ""
        self._bug: Exception | None = None
        self._done = Event()
        threading.Thread(target=self._pull, daemon=True).start()

    def wait(self, seconds: float, stop: Event) -> None:
        """Raises: ImageUnavailable. What is under way then, the engine ends when this process ends."""
        deadline = time.monotonic() + seconds
        while not self._done.wait(TICK):
            if stop.is_set():
                raise ImageUnavailable("stopped on request")
            if time.monotonic() > deadline:
                raise ImageUnavailable(f"{self._image.reference} could not be pulled within {seconds:g} s")
        if self._bug is not None:
            raise self._bug
        if self._failure:
            raise ImageUnavailable(f"{self._image.reference} could not be pulled: {self._failure}")

    def _pull(self) -> None:
        layers: dict[str, tuple[int, int, bool]] = {}
        try:
            # Empty credentials are none at all; without any, the library would look for those of this user.
            for told in self._client.api.pull(
                self._image.name,
                tag=self._image.checksum or self._image.tag,
                auth_config=dict(self._credentials),
                stream=True,
                decode=True,
            ):
                if "error" in told:
                    self._failure = self._failure or self._hidden(told["error"])
                elif told.get("status") in _LAYER:
                    layers[told["id"]] = _layer(told, layers.get(told["id"], (0, 0, False)))
                    done, total, ended = zip(*layers.values(), strict=True)
                    self._on_progress(sum(done), sum(total), sum(ended), len(layers))
        except (DockerException, OSError) as error:
            self._failure = self._failure or self._hidden(error)
        except Exception as bug:  # such as of whom the progress is told
            self._bug = bug
        finally:
            self._done.set()

    def _hidden(self, error: object) -> str:
        words = _words(error)
        for secret in filter(None, self._credentials.values()):
            words = words.replace(secret, "…")
        return words


def _layer(told: Mapping[str, Any], before: tuple[int, int, bool]) -> tuple[int, int, bool]:
    """Bytes here, bytes in all, and whether it is done, after one more line of the engine's."""
    done, total, _ = before
    match told["status"]:
        case "Downloading":
            detail = told.get("progressDetail") or {}
            return int(detail.get("current", done)), int(detail.get("total", total)), False
        case "Pull complete" | "Already exists":
            return total, total, True
        case "Download complete" | "Extracting":
            return total, total, False
    return before


def _inspected(client: docker.DockerClient, image: Image) -> Mapping[str, Any] | None:
    try:
        return dict(client.api.inspect_image(image.reference))
    except ImageNotFound:
        return None
    except APIError as refusal:
        if refusal.status_code != 400:
            raise
        raise ImageUnavailable(f"{image.reference} cannot be had: {_words(refusal)}") from None


def _digests(found: Mapping[str, Any]) -> list[str]:
    return list(found.get("RepoDigests") or ())


# --- Words ----------------------------------------------------------------------------------------------------


def _why_not_started(refusal: APIError) -> str:
    words = str(refusal.explanation or refusal)
    if '"/bin/sh"' in words and "no such file" in words:
        return "the image has no /bin/sh, by which the entrypoint is run"
    return f"the engine has not started the container: {_words(refusal)}"


def _words(error: object) -> str:
    """What the engine said, short, in one line, without addresses' secrets and paths of this machine."""
    text = str(error.explanation or error) if isinstance(error, APIError) else str(error)
    # An address may hold a password, or a signature in its query.
    return without_paths(re.sub(r"\b[a-z]+://\S+", "(address)", text))
