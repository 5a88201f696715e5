"""What every test stands on: nothing of this machine's own is touched, and a real service is started once at most."""

# ruff: noqa: PLC0415 - Imported where needed: Prefect takes a second to import, and reads its settings then.

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

_PREFIXES: Final = ("PREFECT_", "C2D_")
_FOLDER: Final = tempfile.TemporaryDirectory(prefix="c2d-tests-")

_KEPT: Final = {"C2D_KUBERNETES"}
"""Of the machine: where ``scripts/install-kubernetes`` has built a cluster."""

for _name in [name for name in os.environ if name.startswith(_PREFIXES) and name not in _KEPT]:
    del os.environ[_name]
os.environ["PREFECT_HOME"] = f"{_FOLDER.name}/prefect"
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
# Whoever forgets to say which server would otherwise start one of its own, on the quiet.
os.environ["PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"] = "false"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["C2D_STATE"] = f"{_FOLDER.name}/state"

if TYPE_CHECKING:
    from cli.local_chain import LocalChain
    from cli.service import Service
    from tests.docker_engine import Engine, Registry
    from tests.file_server import FileServer
    from tests.kubernetes_cluster import Cluster

DEFINITIONS: Final = Path(__file__).parent / "prefect.yaml"
"""The environments of every service started here; in ``unattended`` no worker ever takes a job."""

VARIABLES: Final = {"C2D_NETWORKS": "127.0.0.0/8"}


def pytest_unconfigure() -> None:
    _FOLDER.cleanup()


def _settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_PREFIXES)}


@pytest.fixture(autouse=True)
def no_settings_leak() -> Iterator[None]:
    """A test that leaves a setting behind fails, instead of the one after it."""
    before = _settings()
    yield
    assert before == _settings(), "this test has changed settings in the environment and not put them back"


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Tests marked ``anyio`` run on asyncio, as the service does."""
    return "asyncio"


@pytest.fixture
def file_server() -> Iterator[FileServer]:
    """A real HTTP server on loopback that serves what is added to it."""
    from tests.file_server import FileServer

    with FileServer() as server:
        yield server


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalChain]:
    """
    A chain with Ocean's contracts on it. For tests marked ``chain``.

    All of them use the same one: who changes its time or its settings does so in ``chain.rolled_back()``.
    """
    from cli.local_chain import LocalChain

    with LocalChain(tmp_path_factory.mktemp("chain")) as started:
        yield started


@pytest.fixture
def root() -> Iterator[Path]:
    """A folder for a runner. Not tmp_path: its parents are closed to the users algorithms run as."""
    folder = Path(tempfile.mkdtemp(prefix="c2d-test-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """A Docker engine of its own. For tests marked ``docker``."""
    from tests.docker_engine import docker_engine

    # A short path: its socket is in it.
    with tempfile.TemporaryDirectory(prefix="c2d-docker-") as folder, docker_engine(Path(folder)) as started:
        yield started


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A Kubernetes cluster of its own, with one node. For tests marked ``kubernetes``."""
    from tests.kubernetes_cluster import kubernetes_cluster

    with tempfile.TemporaryDirectory(prefix="c2d-k8s-") as folder, kubernetes_cluster(Path(folder)) as started:
        yield started


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry that asks for a password. For tests marked ``docker``."""
    from tests.docker_engine import docker_registry

    with docker_registry(tmp_path_factory.mktemp("registry")) as started:
        yield started


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The whole service: Prefect server, workers, API. For tests marked ``worker``."""
    from cli.service import Service

    with Service(state=tmp_path_factory.mktemp("service"), definitions=DEFINITIONS, variables=VARIABLES) as started:
        yield started


@dataclass(frozen=True)
class PrefectServer:
    """A Prefect server with the environments of ``DEFINITIONS`` deployed."""

    state: Path
    """Its folder, as that of a service."""
    url: str
    """Without ``/api``."""

    @property
    def api(self) -> str:
        return f"{self.url}/api"

    @property
    def key_file(self) -> Path:
        return self.state / "key"

    @property
    def database(self) -> Path:
        return self.state / "prefect" / "prefect.db"


@pytest.fixture(scope="session")
def prefect_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """A Prefect server, for tests marked ``server``: that of the service if one is started here anyway, else alone."""
    from cli.service import ROOT, Part, Service, free_port, until_answered

    beside = "PYTEST_XDIST_WORKER" in os.environ
    if not beside and any(item.get_closest_marker("worker") for item in request.session.items):
        shared: Service = request.getfixturevalue("service")
        yield PrefectServer(shared.state, shared.prefect_url)
        return
    # Not entered: what it would set for its parts is wanted, not the parts.
    alone = Service(
        state=tmp_path_factory.mktemp("prefect"),
        definitions=DEFINITIONS,
        variables=VARIABLES,
        prefect_port=free_port(),
    )
    prefect = [sys.executable, "-m", "prefect"]
    log = alone.state / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*prefect, "server", "start", "--host", "127.0.0.1", "--port", f"{alone.prefect_port}"],
            cwd=ROOT,
            env=alone.environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    part = Part("prefect-server", process, log)
    try:
        until_answered(f"{alone.prefect_url}/api/health")
        subprocess.run(
            [*prefect, "--no-prompt", "deploy", "--all", "--prefect-file", str(DEFINITIONS)],
            cwd=ROOT,
            env=alone.environment(),
            check=True,
            capture_output=True,
        )
        yield PrefectServer(alone.state, alone.prefect_url)
    finally:
        part.stop()
