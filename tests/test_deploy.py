"""Deploying: the image, pools of Prefect's own workers and who looks after them, and the manifests."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import httpx
import psutil
import pytest
import yaml
from cryptography.fernet import Fernet
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings

from blocks.environment import load_environments_sync
from blocks.runner import Image
from chaos.parts import Postgres
from cli.service import ROOT, Part, Service, free_port
from flows.environments import register_from
from flows.prefect_jobs import STOP_DEADLINE
from flows.reconcile import HANDED_BACK
from flows.sealing import create_key_file
from tests.conftest import PrefectServer
from tests.docker_engine import IMAGE, Engine
from tests.documents import stage
from tests.kubernetes_cluster import Cluster
from tests.product_image import PRODUCT, USER, build_product
from tests.runner_bench import eventually
from tests.test_end_to_end import Consumer, workflow

# Whichever comes first builds the image.
pytestmark = pytest.mark.timeout(600)

POOL: Final = "c2d-docker"
COMPLETED: Final = 70
STOPPED: Final = 7

WRITES: Final = "import os\nopen(os.environ['OUTPUTS'] + '/n.txt', 'w').write('made')\n"
SLEEPS: Final = "import time\nprint('begun', flush=True)\ntime.sleep({})\n" + WRITES


# The image.


@pytest.fixture(scope="session")
def product(engine: Engine) -> Image:
    """The service's own image on the engine of the tests."""
    build_product(engine)
    return PRODUCT


def said(engine: Engine, image: Image, *command: str, **more: Any) -> str:
    """What *command* prints in a container of *image*, both outputs."""
    answer = engine.client.containers.run(
        image.reference, list(command), remove=True, network_mode="none", stderr=True, **more
    )
    return bytes(answer).decode()


@pytest.mark.docker
@pytest.mark.slow
def test_the_image_has_what_the_lock_file_names(engine: Engine, product: Image) -> None:
    """Each package in the version of uv.lock, and beside them this project and nothing."""
    script = "import importlib.metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions()), sep='\\n')"
    there = {line.lower().replace("_", "-") for line in said(engine, product, "python", "-c", script).splitlines()}
    uv = shutil.which("uv", path=f"{ROOT}/.bootstrap/bin:{os.environ['PATH']}")
    assert uv
    export = [uv, "export", "--frozen", "--quiet", "--no-dev", "--no-emit-project", "--no-hashes"]
    told = subprocess.run(export, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    named = {
        match[1].lower().replace("_", "-").replace(".", "-"): bool(match[2])
        for match in re.finditer(r"^([\w.\-]+==[^ ;\n]+)( ;.*)?$", told, re.MULTILINE)
    }
    there = {one.replace(".", "-") for one in there}
    ours = {one for one in there if one.startswith("compute-to-data==")}
    assert 1 == len(ours)
    assert there - ours <= named.keys()
    # What a marker leaves out on this Python need not be there.
    assert {name for name, conditional in named.items() if not conditional} <= there


@pytest.mark.docker
@pytest.mark.slow
def test_the_image_has_no_more_than_it_needs(engine: Engine, product: Image) -> None:
    """An ordinary user, a shell, no pip, no wheels left, and a health check."""
    assert [str(USER), str(USER)] == said(
        engine, product, "python", "-c", "import os; print(os.getuid(), os.getgid())"
    ).split()
    assert "here" == said(engine, product, "/bin/sh", "-c", "echo here").strip()
    found = said(
        engine,
        product,
        "python",
        "-c",
        "import os, importlib.util as u; print(u.find_spec('pip'), os.path.exists('/wheels'))",
    )
    assert ["None", "False"] == found.split()
    assert "C2D_HEALTH_URL" in " ".join(
        engine.client.images.get(product.reference).attrs["Config"]["Healthcheck"]["Test"]
    )


@pytest.mark.docker
@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["c2d", "--help"], "upkeep"),
        (["c2d", "plan", "--help"], "environments"),
        (["prefect", "work-pool", "get-default-base-job-template", "--type", "warm-process"], "job_configuration"),
        (["prefect", "--version"], "3.8.8"),
    ],
    ids=["c2d", "plan", "worker type", "prefect"],
)
def test_the_commands_of_the_image(engine: Engine, product: Image, command: list[str], words: str) -> None:
    """They start, with a root that cannot be written to and without a capability."""
    text = said(
        engine,
        product,
        *command,
        read_only=True,
        tmpfs={"/tmp": "mode=1777"},
        cap_drop=["ALL"],
        security_opt=["no-new-privileges:true"],
        environment={"COLUMNS": "300"},
    )
    assert words in text


@pytest.mark.docker
@pytest.mark.slow
def test_the_api_of_the_image_says_what_it_lacks(engine: Engine, product: Image) -> None:
    """Without a key and a database for nonces it ends at once and names both variables."""
    container = engine.client.containers.create(product.reference, network_mode="none")
    try:
        container.start()
        assert 2 == container.wait(timeout=60)["StatusCode"]
        text = container.logs().decode()
        assert "C2D_KEY_FILE" in text and "C2D_NONCE_DATABASE" in text
    finally:
        container.remove(force=True)


# A pool of Prefect's own Docker worker.


@dataclass
class Programs:
    """Programs beside a service, each with a log; ended when this is left."""

    service: Service
    variables: Mapping[str, str]
    folder: Path
    parts: dict[str, Part] = field(default_factory=dict)

    def start(self, name: str, *command: str) -> Part:
        log = self.folder / f"{name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                [Path(sys.executable).with_name(command[0]), *command[1:]],
                cwd=ROOT,
                env={**self.service.environment(), **self.variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.parts[name] = Part(name, process, log)
        return self.parts[name]

    def end(self) -> None:
        for part in self.parts.values():
            part.stop()


@dataclass(frozen=True)
class DockerPool:
    """A service whose environment ``docker`` is served by Prefect's Docker worker."""

    service: Service
    programs: Programs
    engine: Engine
    state: Path
    consumer: Consumer

    def start_worker(self) -> Part:
        worker = ("worker", "start", "--pool", POOL, "--type", "docker", "--name", "of-the-tests")
        return self.programs.start("worker", "prefect", *worker)

    def flows(self) -> list[str]:
        """Ids of the containers that run flows."""
        found = self.engine.client.api.containers(filters={"label": "io.prefect.flow-run-id"})
        return [str(container["Id"]) for container in found]

    def algorithms(self) -> list[str]:
        return [name for name in self.engine.containers() if name.startswith("c2d-")]

    def submit(self, seconds: float = 0.0) -> str:
        container = {"image": IMAGE.name, "tag": IMAGE.tag, "entrypoint": "python3 $ALGO"}
        algorithm = {"rawcode": SLEEPS.format(seconds), "container": container}
        return self.consumer.submit(workflow(stages=[stage(algorithm=algorithm, environment="docker")]))

    def submit_running(self, seconds: float) -> str:
        """A job whose algorithm runs."""
        job_id = self.submit(seconds)
        assert eventually(lambda: f"c2d-{job_id}-0" in self.engine.containers(), 90), self.consumer.job(job_id)
        return job_id


def definitions(folder: Path, engine: Engine, state: Path) -> Path:
    """deploy/docker/prefect.yaml for this engine: what an operator sets for his machine, and small limits."""
    document = yaml.safe_load((ROOT / "deploy" / "docker" / "prefect.yaml").read_text())
    (environment,) = document["definitions"]["environments"]
    environment["offer"] |= {"max_jobs": 4, "limits": {"seconds": 60, "memory_bytes": 2**28, "disk_bytes": 2**26}}
    environment |= {"workspace": str(state / "work"), "results": (state / "store").as_uri()}
    machine = {
        "image": PRODUCT.reference,
        "groups": [str((engine.folder / "docker.sock").stat().st_gid)],
        "volumes": [
            f"{engine.folder}/docker.sock:/var/run/docker.sock",
            f"{state}:{state}",
            f"{state}/key:/run/secrets/c2d-key:ro",
        ],
    }
    for deployment in document["deployments"]:
        deployment["work_pool"]["job_variables"] = machine
        deployment.pop("schedules", None)
    path = folder / "prefect.yaml"
    path.write_text(yaml.safe_dump(document))
    shutil.copy(ROOT / "deploy" / "docker" / "base-job-template.json", folder)
    return path


@pytest.fixture(scope="module")
def docker_pool(tmp_path_factory: pytest.TempPathFactory, engine: Engine, product: Image) -> Iterator[DockerPool]:
    folder = tmp_path_factory.mktemp("docker-pool")
    with ExitStack() as stack:
        # A folder as /var/lib/c2d of a machine is, whose parents everybody may pass.
        state = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="c2d-state-")))
        service = stack.enter_context(
            Service(
                state=folder / "state",
                definitions=definitions(folder, engine, state),
                variables={"DOCKER_HOST": engine.host},
            )
        )
        shutil.copy(service.state / "key", state / "key")
        for path in (state, state / "key"):
            os.chown(path, USER, USER)
        programs = Programs(service, {}, folder)
        stack.callback(programs.end)
        http = stack.enter_context(httpx.Client(base_url=service.api_url, timeout=60.0))
        pool = DockerPool(service, programs, engine, state, Consumer(http))
        pool.start_worker()
        programs.start("upkeep", "c2d", "upkeep", "--pool", POOL)
        yield pool


@pytest.mark.docker
@pytest.mark.slow
def test_a_flow_in_a_container_of_its_own(docker_pool: DockerPool) -> None:
    """The job completes; its flow ran without root, capabilities or a root that can be written to."""
    job_id = docker_pool.submit_running(3)
    (flow,) = docker_pool.flows()
    found = docker_pool.engine.client.api.inspect_container(flow)
    host, config = found["HostConfig"], found["Config"]
    assert f"{USER}:{USER}" == config["User"]
    assert (True, ["ALL"], False) == (host["ReadonlyRootfs"], host["CapDrop"], host["Privileged"])
    assert "no-new-privileges:true" in host["SecurityOpt"]
    key = (docker_pool.state / "key").read_text().strip()
    assert key not in json.dumps(found)
    job = docker_pool.consumer.wait(job_id)
    assert COMPLETED == job["status"], job["reason"]
    assert b"made" == docker_pool.consumer.read(job, "n.txt")
    assert eventually(lambda: not docker_pool.engine.containers(), 30)
    assert eventually(lambda: not (docker_pool.state / "work" / job_id).exists(), 10)


@pytest.mark.docker
@pytest.mark.slow
def test_a_flow_whose_container_is_killed_goes_on(docker_pool: DockerPool) -> None:
    """
    SIGKILL of all that runs in the flow's container: at no moment the job seems to have ended, its algorithm is not
    left running, and it completes.
    """
    job_id = docker_pool.submit_running(8)
    (flow,) = docker_pool.flows()
    (algorithm,) = docker_pool.algorithms()
    before = docker_pool.engine.client.api.inspect_container(algorithm)["Id"]
    docker_pool.engine.client.api.kill(flow, "SIGKILL")
    again = docker_pool.consumer.wait(job_id, lambda job: job["status"] == 1 or job["dateFinished"] is not None)
    assert (1, None) == (again["status"], again["dateFinished"]), again
    job = docker_pool.consumer.wait(job_id)
    assert COMPLETED == job["status"], job["reason"]
    # Nothing of the algorithm's outputs is of the first try.
    assert b"made" == docker_pool.consumer.read(job, "n.txt")
    assert 2 == [passed["status"] for passed in job["history"]].count(40)
    assert before not in [c["Id"] for c in docker_pool.engine.client.api.containers(all=True)]


def _forked(process: psutil.Process) -> bool:
    """Whether it is a run: the only process that looks like the one that it was forked from."""
    parent = process.parent()
    return parent is not None and bool(process.cmdline()) and list(process.cmdline()) == list(parent.cmdline())


@pytest.mark.docker
@pytest.mark.slow
def test_a_flow_whose_process_is_killed_goes_on(docker_pool: DockerPool) -> None:
    """What watches over it in the container puts the job back into the queue, and the worker notices nothing."""
    job_id = docker_pool.submit_running(8)
    (flow,) = docker_pool.flows()
    inside = {int(row[0]) for row in docker_pool.engine.client.api.top(flow, ps_args="-eo pid")["Processes"]}
    forks = [psutil.Process(pid) for pid in inside if _forked(psutil.Process(pid))]
    (run,) = forks
    run.kill()
    ended: list[dict[str, Any]] = []

    def over(job: dict[str, Any]) -> bool:
        ended.extend([job] if job["dateFinished"] is not None else [])
        return bool(job["status"] == COMPLETED)

    job = docker_pool.consumer.wait(job_id, over)
    assert [job] == ended
    assert 2 == [passed["status"] for passed in job["history"]].count(40)


@pytest.mark.docker
@pytest.mark.slow
def test_a_flow_whose_container_is_told_to_end_hands_its_job_back(docker_pool: DockerPool) -> None:
    """SIGTERM, as of an engine that is shut down: the algorithm is ended, the job goes on, and nothing was lost."""
    job_id = docker_pool.submit_running(8)
    (flow,) = docker_pool.flows()
    docker_pool.engine.client.api.stop(flow, timeout=30)
    job = docker_pool.consumer.wait(job_id)
    assert COMPLETED == job["status"], job["reason"]
    server = temporary_settings({PREFECT_API_URL: f"{docker_pool.service.prefect_url}/api"})
    with server, get_client(sync_client=True) as client:
        states = client.read_flow_run_states(UUID(job_id))
    assert [HANDED_BACK] == [state.message for state in states if state.name == "AwaitingRetry"]
    assert not [state for state in states if state.is_crashed()]


@pytest.mark.docker
@pytest.mark.slow
def test_a_flow_that_nobody_tells_of_is_found(docker_pool: DockerPool) -> None:
    """The worker is killed and then the flow's container, as with their machine: the job goes on and completes."""
    job_id = docker_pool.submit_running(5)
    docker_pool.programs.parts["worker"].process.kill()
    (flow,) = docker_pool.flows()
    docker_pool.engine.client.api.kill(flow, "SIGKILL")
    docker_pool.start_worker()
    job = docker_pool.consumer.wait(job_id)
    assert COMPLETED == job["status"], job["reason"]
    assert 2 == [passed["status"] for passed in job["history"]].count(40)


@pytest.mark.docker
@pytest.mark.slow
def test_a_stop_reaches_a_flow_in_a_container(docker_pool: DockerPool) -> None:
    """The algorithm is gone within seconds and the job has stopped; deleted, nothing of it is left."""
    job_id = docker_pool.submit_running(55)
    began = time.monotonic()
    answer = docker_pool.consumer.http.put("/api/v1/operator/compute", params={"jobId": job_id})
    assert answer.is_success, answer.text
    took = time.monotonic() - began
    assert [] == docker_pool.algorithms()
    job = docker_pool.consumer.wait(job_id)
    assert STOPPED == job["status"], job["reason"]
    # It is the end of the run that the answer waits for, not the end of its patience.
    assert took < STOP_DEADLINE
    deleted = docker_pool.consumer.http.delete("/api/v1/operator/compute", params={"jobId": job_id})
    assert deleted.is_success, deleted.text
    assert eventually(lambda: not docker_pool.engine.containers(), 30)
    assert not (docker_pool.state / "work" / job_id).exists()
    assert not list((docker_pool.state / "store").rglob(f"*{job_id}*"))
    assert [] == docker_pool.consumer.http.get("/api/v1/operator/compute", params={"jobId": job_id}).json()


# What is deployed.


KINDS: Final = {
    "compose": ("c2d", "warm-process", "docker"),
    "docker": ("c2d-docker", "docker", "docker"),
    "kubernetes": ("c2d-kubernetes", "kubernetes", "kubernetes"),
}
"""By folder of deploy/: work pool, its type, environment."""


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_each_kind_of_pool_is_deployed(prefect_server: PrefectServer, kind: str) -> None:
    """One command on a server that knows nothing of it: pool and template, queue and limit, deployments, variables."""
    pool, pool_type, environment = KINDS[kind]
    file = ROOT / "deploy" / kind / "prefect.yaml"
    variables = {
        "PREFECT_API_URL": prefect_server.api,
        "C2D_DEFINITIONS": str(file),
        "C2D_IMAGE": "registry.example.org/c2d:7",
        "C2D_DOCKER_GROUP": "4711",
    }
    subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", file],
        env={**os.environ, **variables},
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=180,
    )
    document = yaml.safe_load(file.read_text())
    with temporary_settings({PREFECT_API_URL: prefect_server.api}), get_client(sync_client=True) as client:
        made = client.read_work_pool(pool)
        assert pool_type == made.type
        template = file.parent / "base-job-template.json"
        if template.exists():
            assert json.loads(template.read_text()) == made.base_job_template
        (offered,) = document["definitions"]["environments"]
        block = load_environments_sync(client)[environment]
        queue = client.read_work_queue_by_name(environment, work_pool_name=pool)
        assert (offered["offer"]["max_jobs"], pool) == (queue.concurrency_limit, block.work_pool)
        for flow, name, into in (
            ("register-environments", document["deployments"][0]["name"], "_upkeep"),
            ("compute", environment, environment),
            ("expire", pool, "_upkeep"),
        ):
            deployment = client.read_deployment_by_name(f"{flow}/{name}")
            assert (pool, into) == (deployment.work_pool_name, deployment.work_queue_name)
            wanted = {
                "compose": {},
                "docker": {"image": "registry.example.org/c2d:7", "groups": ["4711"]},
                "kubernetes": {"image": "registry.example.org/c2d:7"},
            }[kind]
            assert wanted == deployment.job_variables
            assert bool(deployment.schedules) == (flow == "expire")
            client.delete_deployment(deployment.id)
        with suppress(ObjectNotFound):
            client.delete_work_pool(pool)
        for saved in client.read_block_documents_by_type("compute-environment"):
            if saved.name == environment:
                client.delete_block_document(saved.id)


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_a_template_is_one_that_prefect_accepts(kind: str) -> None:
    """Each name in braces is a variable that has a default or may be left out, and none is described for nothing."""
    template = json.loads((ROOT / "deploy" / kind / "base-job-template.json").read_text())
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    properties = template["variables"]["properties"]
    assert used == properties.keys()
    assert {name for name, told in properties.items() if told.get("default") is None} <= {
        "labels",
        "name",
        "network_mode",
    }


def test_a_template_that_is_none_is_refused(tmp_path: Path) -> None:
    """The sentence names the file; nothing has been asked of a server by then."""
    for text, words in ((None, "cannot be read as JSON"), ("{", "cannot be read as JSON"), ("[]", "is no base job")):
        environment = {
            "offer": {"id": "x"},
            "work_pool": "x",
            "work_pool_type": "docker",
            "work_pool_template": "t.json",
        }
        (tmp_path / "prefect.yaml").write_text(yaml.safe_dump({"definitions": {"environments": [environment]}}))
        if text is not None:
            (tmp_path / "t.json").write_text(text)
        with (
            temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}),
            pytest.raises(ValueError, match=rf"t\.json.*{words}"),
        ):
            register_from(tmp_path / "prefect.yaml")


# Compose.


SET: Final = {
    "PREFECT_AUTH": "c2d:one",
    "PREFECT_ENCRYPTION_KEY": Fernet.generate_key().decode(),
    "POSTGRES_PASSWORD": "three",
    "DOCKER_GROUP": "4711",
    "C2D_PROVIDERS": "0x" + "1" * 40,
    "C2D_PUBLIC_URL": "https://compute.example.org/",
}


def composed(*over: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """deploy/compose.yaml as Compose understands it, and files *over* it; with these variables and no others."""
    files = [option for name in ("compose.yaml", *over) for option in ("--file", ROOT / "deploy" / name)]
    with tempfile.NamedTemporaryFile() as nothing:
        return subprocess.run(
            ["docker-compose", *files, "--env-file", nothing.name, "config"],
            env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", **variables},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )


@pytest.mark.docker
def test_compose_reads_its_file() -> None:
    """Every service is restarted, limited and has no capability to spare; ours are read-only and not root."""
    done = composed(**SET)
    assert 0 == done.returncode, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    assert {"postgres", "prefect-server", "definitions", "api", "worker"} == services.keys()
    for name, service in services.items():
        assert service["restart"] in ("unless-stopped", "on-failure"), name
        assert (["ALL"], ["no-new-privileges:true"]) == (service["cap_drop"], service["security_opt"]), name
        assert service["mem_limit"] and service["pids_limit"] and "privileged" not in service, name
        if name != "postgres":
            assert ("10001:10001", True) == (service["user"], service["read_only"]), name
        for port in service.get("ports", ()):
            assert str(port).startswith("127.0.0.1:"), name
    # The engine is the worker's alone.
    assert ["worker"] == [name for name, service in services.items() if "docker.sock" in str(service.get("volumes"))]


@pytest.mark.docker
def test_compose_reads_its_file_for_several_servers() -> None:
    """Redis has a password, the servers are told of it, and what runs in the background runs once."""
    done = composed("compose.redis.yaml", **SET, REDIS_PASSWORD="four")
    assert 0 == done.returncode, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    assert "--no-services" in services["prefect-server"]["command"]
    for name in ("prefect-server", "prefect-services"):
        variables = services[name]["environment"]
        assert ("redis", "four") == (
            variables["PREFECT_REDIS_MESSAGING_HOST"],
            variables["PREFECT_REDIS_MESSAGING_PASSWORD"],
        )
        assert variables["PREFECT_SERVER_DATABASE_CONNECTION_URL"].startswith("postgresql+asyncpg://")
    assert "four" not in str(services["redis"]["command"])
    assert "REDIS_PASSWORD" in composed("compose.redis.yaml", **SET).stderr


@pytest.mark.docker
@pytest.mark.parametrize("name", sorted(SET))
def test_compose_has_no_password_of_its_own(name: str) -> None:
    """Without a value for any of these it starts nothing and says which one is missing."""
    done = composed(**{other: value for other, value in SET.items() if other != name})
    assert 0 != done.returncode
    assert name in done.stderr


@dataclass
class Composed:
    """The services of deploy/compose.yaml, each as a container on the network of this machine."""

    engine: Engine
    state: Path
    database: str
    server: int = field(default_factory=free_port)
    api: int = field(default_factory=free_port)
    health: int = field(default_factory=free_port)
    started: list[Any] = field(default_factory=list)

    def start(self, name: str) -> Any:
        """As it stands in the file, but for addresses and for where the files of this machine are."""
        variables = {**SET, "C2D_STATE": str(self.state), "DOCKER_GROUP": str(self._socket.stat().st_gid)}
        service = yaml.safe_load(composed(**variables).stdout)["services"][name]
        own = {
            "prefect-server": {"C2D_HEALTH_URL": f"http://127.0.0.1:{self.server}/api/health"},
            "api": {"C2D_PORT": f"{self.api}", "C2D_PROVIDERS": "", "C2D_HEALTH_URL": f"{self.url}/health"},
            "worker": {
                "PREFECT_WORKER_WEBSERVER_PORT": f"{self.health}",
                "C2D_HEALTH_URL": f"http://127.0.0.1:{self.health}/health",
            },
        }.get(name, {})
        container = self.engine.client.containers.create(
            PRODUCT.reference,
            [self._here(part) for part in service.get("command", ())] or None,
            environment={key: self._here(value) for key, value in service["environment"].items()} | own,
            volumes=[self._volume(volume) for volume in service.get("volumes", ())]
            + ([f"{self.state}/key:/run/secrets/key:ro"] if "secrets" in service else []),
            network_mode="host",
            pid_mode=service.get("pid"),
            group_add=service.get("group_add"),
            user=service["user"],
            read_only=service["read_only"],
            tmpfs=dict(mount.split(":", 1) for mount in service["tmpfs"]),
            cap_drop=service["cap_drop"],
            security_opt=service["security_opt"],
            mem_limit=service["mem_limit"],
            pids_limit=service["pids_limit"],
        )
        self.started.append(container)
        container.start()
        return container

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.api}"

    @property
    def _socket(self) -> Path:
        return self.engine.folder / "docker.sock"

    def _here(self, text: Any) -> str:
        text = str(text).replace("prefect-server:4200", f"127.0.0.1:{self.server}").replace("0.0.0.0", "127.0.0.1")
        return re.sub(r"postgresql\+asyncpg:.*", self.database, re.sub("^4200$", f"{self.server}", text))

    def _volume(self, volume: Any) -> str:
        text = volume if isinstance(volume, str) else f"{volume['source']}:{volume['target']}"
        return re.sub("^/var/run/docker.sock:", f"{self._socket}:", text)

    def until_healthy(self, container: Any) -> None:
        def found() -> str:
            container.reload()
            state = container.attrs["State"]
            assert state["Running"], container.logs().decode()[-3000:]
            return str(state["Health"]["Status"])

        assert eventually(lambda: found() == "healthy", 180), container.logs().decode()[-3000:]


@pytest.mark.docker
@pytest.mark.slow
@pytest.mark.skipif(Postgres.obstacle() is not None, reason=str(Postgres.obstacle()))
def test_the_services_of_compose_run_a_job(engine: Engine, product: Image, tmp_path: Path) -> None:
    """
    Server on PostgreSQL, definitions, API and worker, each from the image with what the file says of it: all become
    healthy, and a job in a container beside the worker completes.
    """
    with (
        Postgres(tmp_path / "postgres.log") as postgres,
        tempfile.TemporaryDirectory(prefix="c2d-state-") as folder,
    ):
        state = Path(folder)
        (state / "store").mkdir()
        create_key_file(state / "key")
        for path in (state, state / "store", state / "key"):
            os.chown(path, USER, USER)
        parts = Composed(engine, state, postgres.url)
        try:
            parts.until_healthy(parts.start("prefect-server"))
            definitions = parts.start("definitions")
            assert 0 == definitions.wait(timeout=180)["StatusCode"], definitions.logs().decode()[-3000:]
            api, worker = parts.start("api"), parts.start("worker")
            parts.until_healthy(api)
            parts.until_healthy(worker)
            with httpx.Client(base_url=parts.url, timeout=60.0) as http:
                consumer = Consumer(http)
                container = {"image": IMAGE.name, "tag": IMAGE.tag, "entrypoint": "python3 $ALGO"}
                algorithm = {"rawcode": WRITES, "container": container}
                job = consumer.wait(
                    consumer.submit(workflow(stages=[stage(algorithm=algorithm, environment="docker")]))
                )
                assert COMPLETED == job["status"], job["reason"]
                (result,) = [result for result in job["results"] if result["filename"] == "n.txt"]
                # Its link begins with the address that is public.
                link = str(result["url"]).replace(SET["C2D_PUBLIC_URL"], f"{parts.url}/")
                assert b"made" == http.get(link).content
            key = (state / "key").read_text().strip()
            assert not [part.name for part in parts.started if key in part.logs().decode()]
            # What Prefect's server says of its own database is not ours to judge.
            assert not [part.name for part in (api, worker) if "Traceback" in part.logs().decode()]
        finally:
            for part in reversed(parts.started):
                part.remove(force=True, v=True)


# The manifests.


@pytest.fixture
def manifests(tmp_path: Path) -> Path:
    """deploy/kubernetes with secrets of its own."""
    folder = tmp_path / "kubernetes"
    shutil.copytree(ROOT / "deploy" / "kubernetes", folder)
    subprocess.run([folder / "make-secrets"], check=True, timeout=30)
    return folder


def test_secrets_are_made_once(manifests: Path) -> None:
    """Three files for their owner alone, with values of their own; what is there already stays as it is."""
    names = ("key", "prefect.env", "secrets.env")
    before = {name: (manifests / name).read_text() for name in names}
    assert all(0o600 == (manifests / name).stat().st_mode & 0o777 for name in names)
    Fernet(before["key"].strip())
    Fernet(re.findall(r"^PREFECT_SERVER_ENCRYPTION_KEY=(.+)$", before["secrets.env"], re.MULTILINE)[0])
    (login,) = re.findall(r"^PREFECT_API_AUTH_STRING=(.+)$", before["prefect.env"], re.MULTILINE)
    assert f"PREFECT_SERVER_API_AUTH_STRING={login}\n" in before["secrets.env"] and len(login) > 30
    subprocess.run([manifests / "make-secrets"], check=True, timeout=30)
    assert before == {name: (manifests / name).read_text() for name in names}


@pytest.mark.kubernetes
@pytest.mark.slow
def test_a_cluster_accepts_the_manifests(cluster: Cluster, manifests: Path) -> None:
    """All of them, by its own validation; every pod is one that the strictest of its policies lets in."""
    for part in ("service", "algorithms"):
        cluster.kubectl("apply", "-f", str(manifests / part / "namespace.yaml"))
    documents = list(yaml.safe_load_all(cluster.kubectl("kustomize", str(manifests))))
    for document in documents:
        if document["kind"] == "PersistentVolumeClaim":
            # The cluster of the tests has one of this name, and a claim cannot become another.
            document["metadata"]["name"] += "-as-shipped"
    told = cluster.kubectl(*("apply", "--dry-run=server", "-o", "json", "-f", "-"), input=yaml.safe_dump_all(documents))
    items = json.loads(told)["items"]
    kinds = {item["kind"] for item in items}
    assert {"Deployment", "Job", "Service", "Secret", "Role", "NetworkPolicy", "PersistentVolumeClaim"} <= kinds
    for item in items:
        if item["kind"] in ("Deployment", "Job"):
            unshut = unrestricted(item["spec"]["template"]["spec"])
            assert not unshut, (item["metadata"]["name"], unshut)


def test_the_pod_of_a_flow_is_shut_in() -> None:
    """As those of the manifests: no root, no privilege, nothing to write to but its volumes."""
    template = json.loads((ROOT / "deploy" / "kubernetes" / "base-job-template.json").read_text())
    spec = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    assert not unrestricted(spec)
    assert "C2D_KEY" not in json.dumps(template["variables"]["properties"]["env"]["default"]).replace(
        "C2D_KEY_FILE", ""
    )


def unrestricted(pod: Mapping[str, Any]) -> list[str]:
    """What of the policy `restricted` does not hold for a pod, and what of ours."""
    whole = pod["securityContext"]
    missing = [] if whole.get("runAsNonRoot") is True and whole.get("runAsUser") == USER else ["runAsNonRoot"]
    missing += [] if whole.get("seccompProfile") == {"type": "RuntimeDefault"} else ["seccompProfile"]
    missing += [name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    for container in pod["containers"]:
        own = container["securityContext"]
        missing += [] if own.get("allowPrivilegeEscalation") is False else ["allowPrivilegeEscalation"]
        missing += [] if own.get("readOnlyRootFilesystem") is True else ["readOnlyRootFilesystem"]
        missing += [] if own.get("capabilities") == {"drop": ["ALL"]} else ["capabilities"]
        missing += [] if "memory" in container["resources"]["limits"] else ["limits"]
    return missing
