"""Jobs in containers, over the whole service: by checksum from a registry, pulled slowly, missing, stopped, killed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any, Final

import httpx
import psutil
import pytest
import yaml

from blocks.containers import TRY
from blocks.runner import Image
from cli.service import Service
from tests.conftest import DEFINITIONS
from tests.docker_engine import PASSWORD, USER, Engine, Registry, published, slowly
from tests.documents import outputs_of, stage
from tests.runner_bench import eventually
from tests.test_end_to_end import Consumer, workflow

pytestmark = [pytest.mark.docker, pytest.mark.worker, pytest.mark.slow]

WRITES: Final = "import os\nopen(os.environ['OUTPUTS'] + '/n.txt', 'w').write(open('/marker').read())\n"
READS: Final = (
    "import os\nfound = open(os.environ['INPUTS'] + '/first/n.txt').read()\n"
    "open(os.environ['OUTPUTS'] + '/same.txt', 'w').write(found + str(os.getuid() >= 1000))\n"
)
SLEEPS: Final = "import time\nprint('begun', flush=True)\ntime.sleep(50)\n"


@pytest.fixture(scope="module")
def slow_registry(registry: Registry) -> Iterator[Registry]:
    with slowly(registry, 4_000_000) as slow:
        yield slow


@pytest.fixture(scope="module")
def docker_service(
    tmp_path_factory: pytest.TempPathFactory, engine: Engine, registry: Registry, slow_registry: Registry
) -> Iterator[Service]:
    """A service whose only environment runs containers."""
    folder = tmp_path_factory.mktemp("docker-service")
    tests = yaml.safe_load(DEFINITIONS.read_text())
    (default, *_) = tests["definitions"]["environments"]
    credentials = {"username": USER, "password": PASSWORD}
    tests["definitions"]["environments"] = [
        {
            **default,
            "offer": {**default["offer"], "max_jobs": 6},
            "runner": "docker",
            "docker_host": engine.host,
            "registries": {registry.host: credentials, slow_registry.host: credentials},
        }
    ]
    tests["deployments"] = [
        each for each in tests["deployments"] if each["name"] in ("register-environments", "default")
    ]
    definitions = folder / "prefect.yaml"
    definitions.write_text(yaml.safe_dump(tests))
    with Service(state=folder / "state", definitions=definitions, variables={"C2D_NETWORKS": "127.0.0.0/8"}) as started:
        yield started


@pytest.fixture(scope="module")
def consumer(docker_service: Service) -> Iterator[Consumer]:
    with httpx.Client(base_url=docker_service.api_url, timeout=60.0) as http:
        yield Consumer(http)


@pytest.fixture(scope="module")
def image(engine: Engine, registry: Registry) -> Image:
    """Python and a marker, at the registry and not on the engine."""
    return published(engine, registry, python=True, marker=b"in the image")


def code(image: Image, text: str, **more: Any) -> dict[str, Any]:
    container = {"image": image.name, "tag": image.tag, "checksum": image.checksum, "entrypoint": "python3 $ALGO"}
    return {"rawcode": text, "container": {key: value for key, value in container.items() if value}, **more}


def test_a_job_in_containers(consumer: Consumer, engine: Engine, image: Image) -> None:
    """Two stages of one image by checksum: what the first writes the second reads and what it writes is published."""
    job = consumer.wait(
        consumer.submit(
            workflow(
                stages=[
                    stage(index=0, algorithm=code(image, WRITES)),
                    stage(index=1, input=[outputs_of(0, id="first")], algorithm=code(image, READS)),
                ]
            )
        )
    )
    assert (70, "Job completed") == (job["status"], job["statusText"]), job["reason"]
    assert b"in the imageTrue" == consumer.read(job, "1/same.txt"), job["results"]
    assert [] == engine.containers()


def test_a_missing_image_is_status_11(consumer: Consumer, engine: Engine, registry: Registry, image: Image) -> None:
    """The reason names the image and never the password."""
    absent = Image(image.name, "none")
    job = consumer.wait(consumer.submit(workflow(stages=[stage(algorithm=code(absent, SLEEPS))])))
    assert (11, "Pulling algorithm image failed") == (job["status"], job["statusText"]), job["reason"]
    assert f"{absent.reference} could not be pulled" in job["reason"]
    assert PASSWORD not in str(job)
    (short,) = consumer.http.get("/api/v1/operator/status", params={"jobId": job["jobId"]}).json()
    assert 2 == short["status"]


def test_a_pull_can_be_watched(consumer: Consumer, engine: Engine, registry: Registry, slow_registry: Registry) -> None:
    """While the image comes the job is being configured, and its reason says how far that is."""
    there = published(engine, registry, python=True, bulk=os.urandom(12_000_000))
    slow = Image(there.name.replace(registry.host, slow_registry.host), there.tag, there.checksum)
    id = consumer.submit(workflow(stages=[stage(algorithm=code(slow, "print('hello')\n"))]))
    seen = consumer.wait(id, lambda job: "Image of stage 0: 0 of 1 layers" in job["reason"] or job["dateFinished"])
    assert (20, None) == (seen["status"], seen["dateFinished"]), seen["reason"]
    assert 70 == consumer.wait(id)["status"]


def test_a_stopped_job_leaves_no_container(consumer: Consumer, engine: Engine, image: Image) -> None:
    """Within five seconds of the request."""
    id = consumer.submit(workflow(stages=[stage(algorithm=code(image, SLEEPS))]))
    assert eventually(lambda: f"c2d-{id}-0" in engine.containers(), 60)
    began = time.monotonic()
    assert consumer.http.put("/api/v1/operator/compute", params={"jobId": id}).is_success
    assert eventually(lambda: not engine.containers(), 10)
    assert time.monotonic() - began < 5
    assert 7 == consumer.wait(id)["status"]


@pytest.mark.parametrize(("watcher_too", "seconds"), [(False, 5), (True, 60)], ids=["alone", "with its watcher"])
def test_a_killed_flow_leaves_no_container(
    consumer: Consumer, engine: Engine, image: Image, watcher_too: bool, seconds: float
) -> None:
    """
    SIGKILL of the process that runs a job ends its container, at once or, if what watches over it was killed as well,
    before the job goes on. Deleting the job ends the next one.
    """
    id = consumer.submit(workflow(stages=[stage(algorithm=code(image, SLEEPS))]))
    name = f"c2d-{id}-0"
    assert eventually(lambda: name in engine.containers(), 60)
    container = engine.client.api.inspect_container(name)
    label = f"{TRY}={container['Config']['Labels'][TRY]}"
    watcher = next(p for p in psutil.process_iter(["cmdline"]) if label in (p.info["cmdline"] or ()))
    flow = watcher.parent()
    assert flow is not None
    if watcher_too:
        watcher.kill()
    flow.kill()

    def ids() -> list[str]:
        found = [each["Id"] for each in engine.client.api.containers(all=True)]
        assert len(found) <= 1
        return found

    assert eventually(lambda: container["Id"] not in ids(), seconds)
    assert eventually(lambda: engine.containers() == [name], 60)
    assert consumer.http.delete("/api/v1/operator/compute", params={"jobId": id}).is_success
    assert eventually(lambda: not engine.containers(), 20)
