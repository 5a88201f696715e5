"""
A real Docker engine and a real registry for tests, started with folders of their own and stopped by their pids.

The images are put together from what is on this machine, so that nothing has to be downloaded. Needs root, and what
``scripts/install-docker`` installs.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import docker
from docker.errors import DockerException, ImageNotFound

from blocks.containers import DockerRunner
from blocks.runner import Image
from cli.service import free_port, until_answered

IMAGE: Final = Image("c2d-tests/python", "3")
"""Python, sh and the usual tools."""

_TOOLS: Final = """
    cat chmod cp cut df echo env false grep head id ln ls mkdir mv nohup rm seq setsid sh sleep sort stat tail
    touch tr true wc
""".split()  # noqa: SIM905
_LEFT_OUT: Final = {"test", "idlelib", "tkinter", "__pycache__", "ensurepip", "lib2to3", "turtledemo"}


@dataclass
class Engine:
    """A Docker engine."""

    folder: Path
    client: docker.DockerClient
    process: subprocess.Popen[bytes] | None
    """None for one that was there before."""

    @property
    def host(self) -> str:
        return f"unix://{self.folder}/docker.sock"

    def runner(self, **more: Any) -> DockerRunner:
        """On this engine, with the machine's network for those who may have one: the engine has no bridge."""
        return DockerRunner(**{"host": self.host, "network": "host", "service": str(self.folder), **more})

    def build(
        self,
        image: Image,
        changes: Sequence[str] = (),
        files: Mapping[str, bytes] | None = None,
        *,
        python: bool = False,
    ) -> None:
        """An image of the usual tools, with further *files*, and *changes* as in a Dockerfile."""
        path = self.folder / "image.tar"
        with path.open("wb") as file:
            _assemble(file, files or {}, python=python)
        try:
            self.import_archive(image, path, changes)
        finally:
            path.unlink()

    def import_archive(self, image: Image, path: Path, changes: Sequence[str] = ()) -> None:
        with path.open("rb") as file:
            answer = self.client.api.import_image_from_data(
                file, repository=image.name, tag=image.tag, changes=["ENV PATH=/usr/bin:/bin", *changes]
            )
        told = [json.loads(line) for line in answer.splitlines()]
        assert not any("error" in line for line in told), told

    def has(self, image: Image) -> bool:
        return any(image.reference in (*i.tags, *i.attrs["RepoDigests"]) for i in self.client.images.list())

    def forget(self, image: Image) -> None:
        """Remove the names of the image's repository; what no other name keeps is gone."""
        for found in self.client.images.list():
            for name in (*found.tags, *found.attrs["RepoDigests"]):
                if name.startswith((f"{image.name}:", f"{image.name}@")):
                    with suppress(ImageNotFound):
                        self.client.images.remove(name, noprune=False)

    def containers(self) -> list[str]:
        # Not the list of objects: the library looks at each, and one may be gone by then.
        return sorted(found["Names"][0].removeprefix("/") for found in self.client.api.containers(all=True))

    def volumes(self) -> list[str]:
        return sorted(volume.name for volume in self.client.volumes.list())


NO_BRIDGE: Final = ("--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false")


@contextmanager
def docker_engine(
    folder: Path,
    *,
    programs: Path | None = None,
    within: Sequence[str] = (),
    network: Sequence[str] = NO_BRIDGE,
    **configuration: Any,
) -> Iterator[Engine]:
    """
    An engine with IMAGE in it; by default without networks but ``none`` and ``host``. It finds what is in *programs*,
    too.

    *folder* has to have a short path: a socket's may have 107 characters. *within* is a command that starts another
    one where the engine is to be, such as ``nsenter``, and *network* tells the engine what it finds there.
    """
    assert os.geteuid() == 0, "a Docker engine of one's own needs root: sudo make test-docker"
    assert shutil.which("dockerd"), "there is no dockerd: scripts/install-docker installs it"
    for name in ("data", "exec"):
        (folder / name).mkdir()
    runtimes = {}
    if runsc := shutil.which("runsc"):
        runtimes["runsc"] = {"path": runsc, "runtimeArgs": ["--platform=ptrace", "--network=none"]}
    (folder / "daemon.json").write_text(json.dumps({"runtimes": runtimes, **configuration}))
    log = folder / "dockerd.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *within,
                "dockerd",
                *("--config-file", folder / "daemon.json", "--host", f"unix://{folder}/docker.sock"),
                *("--data-root", folder / "data", "--exec-root", folder / "exec", "--pidfile", folder / "docker.pid"),
                *("--cgroup-parent", f"/{folder.name}"),
                *("--containerd-namespace", folder.name, "--containerd-plugins-namespace", f"{folder.name}-plugins"),
                # Else an engine beside systemd has groups of that, with other names.
                *("--exec-opt", "native.cgroupdriver=cgroupfs"),
                *network,
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"} if programs else None,
        )
    try:
        with closing(_client(folder, process, log)) as client:
            engine = Engine(folder, client, process)
            engine.build(IMAGE, python=True)
            yield engine
            for container in client.containers.list(all=True):
                container.remove(force=True, v=True)
    finally:
        _stop(process, folder)


def _client(folder: Path, process: subprocess.Popen[bytes], log: Path) -> docker.DockerClient:
    patience = time.monotonic() + 60
    while True:
        with suppress(DockerException):
            return docker.DockerClient(base_url=f"unix://{folder}/docker.sock")
        assert process.poll() is None and time.monotonic() < patience, log.read_text()[-2000:]
        time.sleep(0.1)


def _stop(process: subprocess.Popen[bytes], folder: Path) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for mount in Path("/proc/self/mountinfo").read_text().splitlines():
        if (where := mount.split()[4]).startswith(f"{folder}/"):
            subprocess.run(["umount", "--lazy", where], check=False)
    for cgroup in Path("/sys/fs/cgroup").glob(f"*/{folder.name}"):
        with suppress(OSError):
            cgroup.rmdir()


# --- An image of what is here ---------------------------------------------------------------------------------


def _assemble(into: Any, more: Mapping[str, bytes], *, python: bool) -> None:
    files: dict[str, Path] = {}
    programs: list[Path] = []
    if python:
        executable, library = system_python()
        programs.append(executable)
        for top, folders, names in os.walk(library):
            folders[:] = [name for name in folders if name not in _LEFT_OUT]
            for name in names:
                files[f"{top}/{name}"] = Path(top, name).resolve()
                if ".so" in name:
                    programs.append(Path(top, name))
        for name in ("python3", "python"):
            files[f"/usr/bin/{name}"] = executable.resolve()
    for name in _TOOLS:
        found = shutil.which(name, path="/usr/bin:/bin")
        assert found, name
        files[f"/bin/{name}"] = Path(found).resolve()
        programs.append(Path(found))
    for program in programs:
        files |= {path: Path(path).resolve() for path in _libraries(program)}
    with tarfile.open(fileobj=into, mode="w|") as archive:
        for path, mode in {"/tmp": 0o1777, "/data": 0o755, "/root": 0o700, "/etc": 0o755}.items():
            folder = tarfile.TarInfo(f".{path}")
            folder.type, folder.mode = tarfile.DIRTYPE, mode
            archive.addfile(folder)
        for path, source in sorted((path, source) for path, source in files.items() if path not in more):
            _add(archive, path, source.read_bytes(), 0o755 if os.access(source, os.X_OK) else 0o644)
        _add(archive, "/etc/passwd", b"root:x:0:0::/root:/bin/sh\n")
        _add(archive, "/etc/nsswitch.conf", b"hosts: files dns\n")
        for path, content in more.items():
            _add(archive, path, content, 0o755)


def system_python() -> tuple[Path, Path]:
    """The program and its library."""
    found = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    assert found, "no Python of the system to make an image of"
    script = "import sys, sysconfig; print(sys.executable); print(sysconfig.get_path('stdlib'))"
    executable, library = subprocess.check_output([found, "-I", "-c", script], text=True).split()
    return Path(executable), Path(library)


def _add(archive: tarfile.TarFile, path: str, content: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(f".{path}")
    entry.size, entry.mode = len(content), mode
    archive.addfile(entry, io.BytesIO(content))


def _libraries(program: Path) -> Iterable[str]:
    told = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    return set(re.findall(r"(/\S+)", told)) - {f"{program}:"}


# --- A registry -----------------------------------------------------------------------------------------------

USER: Final = "puller"
PASSWORD: Final = "registry-password-5f2c"
_HTPASSWD: Final = f"{USER}:$2b$05$nSDRI.IBjExhAn/Ahb4nr.0mZhazMqZpDzDel8ATyq6NNg9CUPJEy\n"
"""The bcrypt hash of PASSWORD."""


@dataclass(frozen=True)
class Registry:
    """A registry that asks for USER and PASSWORD."""

    host: str

    def push(self, engine: Engine, image: Image, name: str, tag: str = "1") -> Image:
        """Put *image* of *engine* there as *name*, and not under that name on the engine. Answers with its digest."""
        pushed = Image(f"{self.host}/{name}", tag)
        engine.client.images.get(image.reference).tag(pushed.name, pushed.tag)
        credentials = {"username": USER, "password": PASSWORD}
        told = list(engine.client.api.push(pushed.name, pushed.tag, stream=True, decode=True, auth_config=credentials))
        assert not any("error" in line for line in told), told
        engine.forget(pushed)
        (digest,) = [line["aux"]["Digest"] for line in told if "aux" in line]
        return Image(pushed.name, pushed.tag, digest)


def published(engine: Engine, registry: Registry, *, python: bool = False, **files: bytes) -> Image:
    """``study:1`` of the registry as it is from now on; its content is only there."""
    made = Image("c2d-tests/made", "1")
    # An engine that has the parts of an image, or had it once, asks nobody for it.
    content = {"id": uuid4().bytes, **files}
    engine.build(made, files={f"/{name}": text for name, text in content.items()}, python=python)
    image = registry.push(engine, made, "study")
    engine.forget(made)
    return image


@contextmanager
def docker_registry(folder: Path, *, within: Sequence[str] = ()) -> Iterator[Registry]:
    """
    A registry that keeps its images in *folder*, on a free loopback port. *within* is a command that starts another one
    where the engine is.
    """
    port = free_port()
    (folder / "htpasswd").write_text(_HTPASSWD)
    configuration = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": f"{folder}/registry"}},
        "http": {"addr": f"127.0.0.1:{port}"},
        "auth": {"htpasswd": {"realm": "tests", "path": f"{folder}/htpasswd"}},
    }
    (folder / "registry.json").write_text(json.dumps(configuration))  # JSON is YAML
    with (folder / "registry.log").open("wb") as output:
        process = subprocess.Popen(
            [*within, "docker-registry", "serve", folder / "registry.json"], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        if within:
            asks = f"from cli.service import until_answered; until_answered('http://127.0.0.1:{port}/')"
            subprocess.run([*within, sys.executable, "-c", asks], check=True, timeout=120)
        else:
            until_answered(f"http://127.0.0.1:{port}/")
        yield Registry(f"127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def slowly(registry: Registry, bytes_per_second: int) -> Iterator[Registry]:
    """The same registry under another address, over a slow line."""
    host, port = registry.host.split(":")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def forward(source: socket.socket, sink: socket.socket) -> None:
            with suppress(OSError):
                while chunk := source.recv(max(1, bytes_per_second // 20)):
                    sink.sendall(chunk)
                    time.sleep(len(chunk) / bytes_per_second)
            for end in (source, sink):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

        def serve() -> None:
            with suppress(OSError):
                while True:
                    client = server.accept()[0]
                    upstream = socket.create_connection((host, int(port)))
                    for ends in ((client, upstream), (upstream, client)):
                        threading.Thread(target=forward, args=ends, daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield Registry(f"127.0.0.1:{server.getsockname()[1]}")
        server.shutdown(socket.SHUT_RDWR)
