"""Compute environments: from prefect.yaml to what is on offer, and to a real Prefect server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from uuid import UUID, uuid4

import httpx
import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Pending, Scheduled
from pydantic import ValidationError

from blocks.containers import DockerRunner
from blocks.environment import ComputeEnvironment, load_environments_sync
from blocks.keys import ProviderKey
from blocks.limits import GIB, Offer
from blocks.pods import KubernetesRunner
from blocks.process import ProcessRunner
from blocks.remote import Access
from cli.service import ROOT
from flows.environments import COORDINATORS, MOST_COORDINATORS, read_definitions, register_from
from tests.conftest import DEFINITIONS, PrefectServer

MARKER: Final = "hush-a87ff679a2f3"
KEY: Final = "0c" * 32
SIGNER: Final = ProviderKey.from_secret(KEY)


def written(folder: Path, *environments: dict[str, object]) -> Path:
    path = folder / f"{uuid4().hex}.yaml"
    path.write_text(yaml.safe_dump({"definitions": {"environments": list(environments)}}))
    return path


def one(id: str, *, pool: str = "", offer: dict[str, object] | None = None, **more: object) -> dict[str, object]:
    return {"offer": {"id": id, **(offer or {})}, "work_pool": pool or f"pool-{id}", **more}


# Reading.


def test_what_this_checkout_offers() -> None:
    """prefect.yaml defines one environment with the limits it says, on a pool that is one of its deployments."""
    (only,) = read_definitions(ROOT / "prefect.yaml")
    assert ("default", "c2d", "warm-process", 2) == (
        only.offer.id,
        only.work_pool,
        only.work_pool_type,
        only.offer.max_jobs,
    )
    assert (3600, 2 * GIB, 10 * GIB) == (
        only.offer.limits.seconds,
        only.offer.limits.memory_bytes,
        only.offer.limits.disk_bytes,
    )
    assert ((), "", "", False) == (only.offer.fetch.networks, only.offer.cpu_type, only.results, only.allow_unsandboxed)


@pytest.mark.parametrize("path", [ROOT / "prefect.yaml", DEFINITIONS], ids=["ours", "of the tests"])
def test_every_environment_is_deployed(path: Path) -> None:
    """An environment that is on offer has a deployment of its name, on its own queue of its own pool."""
    deployments = {each["name"]: each["work_pool"] for each in yaml.safe_load(path.read_text())["deployments"]}
    for environment in read_definitions(path):
        id = environment.offer.id
        assert {"name": environment.work_pool, "work_queue_name": id} == deployments[id]


def test_variables_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in braces comes from the environment, with commas where a list is wanted."""
    monkeypatch.setenv("C2D_NETWORKS", "127.0.0.0/8, 10.0.0.0/8")
    monkeypatch.setenv("C2D_RESULTS", "s3://bucket/results")
    monkeypatch.setenv("C2D_CPU_TYPE", "fast")
    monkeypatch.setenv("C2D_ALLOW_UNSANDBOXED", "true")
    (only,) = read_definitions(ROOT / "prefect.yaml")
    assert ("127.0.0.0/8", "10.0.0.0/8") == only.offer.fetch.networks
    assert ("s3://bucket/results", "fast", True) == (only.results, only.offer.cpu_type, only.allow_unsandboxed)


def test_results_and_documents_are_apart(tmp_path: Path) -> None:
    """Both are kept below the URL of the environment, and never in one folder."""
    (here, there) = read_definitions(
        written(tmp_path, one("here"), one("there", results="s3://bucket/x/", results_options={"key": MARKER}))
    )
    assert ("s3://bucket/x/results", "s3://bucket/x/documents") == (there.store().url, there.documents().url)
    assert here.store().url.startswith("file:///") and here.store().url != here.documents().url
    assert MARKER not in f"{there!r} {there} {there.store()!r}"


def test_how_files_are_reached(tmp_path: Path) -> None:
    """Gateways and nodes are what the operator wrote; keys in the URLs of nodes are not shown."""
    node = f"https://node.example/{MARKER}"
    (here, there) = read_definitions(
        written(tmp_path, one("here"), one("there", ipfs_gateway="http://127.0.0.1:8080", chains={"1": node}))
    )
    assert Access() == here.access()
    assert Access(ipfs_gateway="http://127.0.0.1:8080", chains={1: node}) == there.access()
    assert MARKER not in f"{there!r} {there} {there.access()!r}"


def test_how_algorithms_are_shut_in(tmp_path: Path) -> None:
    """As processes unless containers are asked for, then as the operator wrote; passwords are not shown."""
    credentials = {"docker.io": {"username": "u", "password": MARKER}}
    here, there = read_definitions(
        written(
            tmp_path,
            one("here"),
            one("there", runner="docker", docker_runtime="runsc", pull="never", registries=credentials),
        )
    )
    assert ProcessRunner() == here.make_runner()
    runner = there.make_runner()
    assert isinstance(runner, DockerRunner)
    assert ("", "bridge", "runsc", "never") == (runner.host, runner.network, runner.runtime, runner.pull)
    assert (credentials, str(there.workspace_root())) == (runner.registries, runner.service)
    assert MARKER not in f"{there!r} {there} {runner!r} {there.model_dump_json()}"


@pytest.mark.parametrize("address", ["", SIGNER.address, SIGNER.address.lower()])
def test_a_key_is_an_environments_address(tmp_path: Path, address: str) -> None:
    """Orders are made out to the address of its key, unless the offer names it itself; the key is not shown."""
    (with_key,) = read_definitions(
        written(tmp_path, one("here", offer={"consumer_address": address}, signer=f"0x{KEY}"))
    )
    signer = with_key.access().signer
    assert signer is not None
    assert SIGNER.address == signer.address
    assert (address or SIGNER.address) == with_key.offer.consumer_address
    assert KEY not in f"{with_key!r} {with_key} {with_key.access()!r} {with_key.model_dump_json()}"


def test_a_cluster_is_told_where(tmp_path: Path) -> None:
    """What an operator says of a cluster is what its runner goes by; what is left out is as the manifests make it."""
    block = ComputeEnvironment.model_validate(
        {
            "offer": {"id": "a", "limits": {"gpus": 2}, "max_wait": 77},
            "work_pool": "p",
            "runner": "kubernetes",
            "workspace": str(tmp_path),
            "pull": "always",
            "kubernetes": {"pull_secrets": ["ghcr"], "node_selector": {"accelerator": "h100"}},
        }
    )
    runner = block.make_runner()
    assert isinstance(runner, KubernetesRunner)
    assert ("c2d-jobs", "c2d-work", "c2d-algorithm") == (runner.namespace, runner.claim, runner.account)
    assert (str(tmp_path), 77, "always") == (runner.mount, runner.wait_seconds, runner.pull)
    assert (("ghcr",), {"accelerator": "h100"}) == (runner.pull_secrets, runner.node_selector)


@pytest.mark.parametrize(
    "broken",
    [
        {"work_pool": "p"},
        {"offer": {"id": "a"}},
        {"offer": {"id": "../a"}, "work_pool": "p"},
        {"offer": {"id": "a", "limits": {"second": 1}}, "work_pool": "p"},
        {"offer": {"id": "a", "limits": {"seconds": 0}}, "work_pool": "p"},
        {"offer": {"id": "a", "fetch": {"networks": "10.0.0.1/8"}}, "work_pool": "p"},
        {"offer": {"id": "a", "fetch": {"networks": "everything"}}, "work_pool": "p"},
        {"offer": {"id": "a"}, "work_pool": "p", "runner": "trust"},
        {"offer": {"id": "a", "limits": {"gpus": 1}}, "work_pool": "p"},
        {"offer": {"id": "a", "gpus": 1}, "work_pool": "p"},
        {"offer": {"id": "a"}, "work_pool": "p", "link_seconds": 60},
        {"offer": {"id": "a"}, "work_pool": "p", "link_seconds": 700_000, "results": "s3://a/b"},
        {"offer": {"id": "a", "gpus": 3}, "work_pool": "p", "runner": "docker", "gpu_devices": ["0", "1"]},
        {"offer": {"id": "a", "gpus": 1}, "work_pool": "p", "runner": "docker", "gpu_devices": ["all"] * 2},
        {"offer": {"id": "a"}, "work_pool": "p", "runner": "docker", "allow_unsandboxed": True},
        {"offer": {"id": "a"}, "work_pool": "p", "runner": "docker", "path": ["/opt/bin"]},
        {"offer": {"id": "a"}, "work_pool": "p", "runner": "docker", "pull": "sometimes"},
        {"offer": {"id": "a"}, "work_pool": "p", "kubernetes": {"claim": "data"}},
        {"offer": {"id": "a"}, "work_pool": "p", "runner": "kubernetes", "kubernetes": {"claim": "no name"}},
        {"offer": {"id": "a"}, "work_pool": "p", "runner": "kubernetes", "kubernetes": {"node": "here"}},
        {"offer": {"id": "a"}, "work_pool": "p", "runner": "kubernetes", "system": ["/opt"]},
        {
            "offer": {"id": "a"},
            "work_pool": "p",
            "runner": "kubernetes",
            "registries": {"ghcr.io": {"username": "u", "password": MARKER}},
        },
        {"offer": {"id": "a"}, "work_pool": "p", "registries": {"docker.io": MARKER}},
        {"offer": {"id": "a"}, "work_pool": "p", "registries": {"docker.io": {"password": MARKER}}},
        {
            "offer": {"id": "a"},
            "work_pool": "p",
            "registries": {"ghcr.io/name": {"username": "u", "password": MARKER}},
        },
        {"offer": {"id": "a"}, "work_pool": "p", "ipfs_gateway": "127.0.0.1:8080"},
        {"offer": {"id": "a"}, "work_pool": "p", "arweave_gateway": "ftp://a.example"},
        {"offer": {"id": "a"}, "work_pool": "p", "chains": {"main": "https://a.example"}},
        {"offer": {"id": "a"}, "work_pool": "p", "chains": {"1": "a.example"}},
        {"offer": {"id": "a"}, "work_pool": "p", "metadata_stores": ["a.example"]},
        {"offer": {"id": "a"}, "work_pool": "p", "signer": MARKER},
        {"offer": {"id": "a"}, "work_pool": "p", "signer": "00" * 32},
        {"offer": {"id": "a", "consumer_address": "0x" + "12" * 20}, "work_pool": "p", "signer": KEY},
    ],
)
def test_mistakes_of_an_operator(tmp_path: Path, broken: dict[str, object]) -> None:
    """A definition with a mistake is refused, not read as something near it."""
    with pytest.raises(ValidationError) as refusal:
        read_definitions(written(tmp_path, broken))
    assert MARKER not in str(refusal.value) and KEY not in str(refusal.value)


def test_a_file_without_environments(tmp_path: Path) -> None:
    """A prefect.yaml of someone else defines none."""
    path = tmp_path / "prefect.yaml"
    path.write_text("name: other\n")
    assert [] == read_definitions(path)


# Registering.


@pytest.fixture
def client(prefect_server: PrefectServer) -> Iterator[SyncPrefectClient]:
    with temporary_settings({PREFECT_API_URL: prefect_server.api}), get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def names(client: SyncPrefectClient) -> Iterator[list[str]]:
    """Two ids nobody else uses; what was registered under them is gone afterwards."""
    ids = [f"t{uuid4().hex[:8]}" for _ in range(2)]
    yield ids
    for id in ids:
        block = next((d for d in client.read_block_documents() if d.name == id), None)
        if block is not None:
            client.delete_block_document(block.id)
        with suppress(ObjectNotFound):
            client.delete_work_pool(f"pool-{id}")


def slots(client: SyncPrefectClient, pool: str, queue: str) -> int | None:
    return client.read_work_queue_by_name(queue, work_pool_name=pool).concurrency_limit


def offers(client: SyncPrefectClient) -> dict[str, Offer]:
    return {id: block.offer for id, block in load_environments_sync(client).items()}


@pytest.mark.server
def test_registered_environments_are_on_offer(client: SyncPrefectClient, names: list[str], tmp_path: Path) -> None:
    """What was registered is read back as it was defined, and its queue is there with as many slots as jobs."""
    first, second = names
    path = written(tmp_path, one(first, offer={"max_jobs": 3, "limits": {"seconds": 7}}), one(second))
    assert names == register_from(path)
    defined = {environment.offer.id: environment.offer for environment in read_definitions(path)}
    assert defined == {id: offer for id, offer in offers(client).items() if id in names}
    pools = [client.read_work_pool(f"pool-{id}") for id in names]
    assert [("warm-process", None)] * 2 == [(pool.type, pool.concurrency_limit) for pool in pools]
    assert [3, 2] == [slots(client, f"pool-{id}", id) for id in names]
    assert [MOST_COORDINATORS] * 2 == [slots(client, f"pool-{id}", COORDINATORS) for id in names]


@pytest.mark.server
def test_registering_again_brings_up_to_date(client: SyncPrefectClient, names: list[str], tmp_path: Path) -> None:
    """A repeat changes what the file says has changed, and keeps what an operator has set in the pool."""
    first, second = names
    register_from(written(tmp_path, one(first), one(second)))
    client.update_work_pool(f"pool-{first}", WorkPoolUpdate(description="mine", concurrency_limit=7))
    coordinators = client.read_work_queue_by_name(COORDINATORS, work_pool_name=f"pool-{first}")
    client.update_work_queue(coordinators.id, concurrency_limit=3)
    register_from(written(tmp_path, one(first, offer={"max_jobs": 5, "desc": "new"}), one(second)))
    pool = client.read_work_pool(f"pool-{first}")
    assert 3 == slots(client, f"pool-{first}", COORDINATORS)
    assert (5, 7, "mine") == (slots(client, f"pool-{first}", first), pool.concurrency_limit, pool.description)
    assert "new" == offers(client)[first].desc


@pytest.mark.server
def test_a_shared_pool_has_slots_for_all(client: SyncPrefectClient, names: list[str], tmp_path: Path) -> None:
    """One environment full of jobs, with more of them waiting, does not hold up another one on its pool."""
    first, second = names
    pool = f"pool-{first}"
    register_from(written(tmp_path, one(first, offer={"max_jobs": 1}), one(second, pool=pool)))
    assert [1, 2] == [slots(client, pool, id) for id in names]
    flow = client.create_flow_from_name(f"flow-{first}")
    deployment = client.create_deployment(flow, name=first, work_pool_name=pool, work_queue_name=first)

    def submitted(id: str) -> UUID:
        run = client.create_flow_run_from_deployment(deployment, state=Scheduled(), work_queue_name=id)
        return run.id

    def given_out() -> list[UUID]:
        """What a worker of the pool is given when it asks."""
        # Prefect's own, so that its rows are read as a worker reads them.
        return [each.flow_run.id for each in client.get_scheduled_flow_runs_for_work_pool(pool)]

    firsts = [submitted(first) for _ in range(3)]
    assert firsts[:1] == given_out()
    client.set_flow_run_state(firsts[0], Pending())
    assert [] == given_out()
    seconds = [submitted(second) for _ in range(3)]
    assert seconds[:2] == given_out()
    client.set_flow_run_state(seconds[0], Pending())
    assert seconds[1:2] == given_out()
    client.set_flow_run_state(firsts[0], Cancelled())
    assert {firsts[1], seconds[1]} == {*given_out()}
    client.delete_deployment(deployment)


@pytest.mark.server
def test_credentials_of_a_store_are_kept_secret(
    client: SyncPrefectClient, prefect_server: PrefectServer, names: list[str], tmp_path: Path
) -> None:
    """Options and key are there for who needs them, and neither in the API's plain answer nor in the database."""
    first, second = names
    secret: dict[str, Any] = {
        "results": "s3://bucket",
        "results_options": {"key": MARKER},
        "fetch_options": {"s3": {"key": MARKER}},
        "signer": KEY,
    }
    register_from(written(tmp_path, one(first, **secret), one(second)))
    block = load_environments_sync(client)[first]
    assert {"key": MARKER} == dict(block.store().storage_options)
    assert {"s3": {"key": MARKER}} == dict(block.access().storage_options)
    signer = block.access().signer
    assert signer is not None and SIGNER.address == signer.address == block.offer.consumer_address
    shown = httpx.post(f"{prefect_server.api}/block_documents/filter", json={}).raise_for_status().text
    stored = b"".join(path.read_bytes() for path in prefect_server.database.parent.glob("prefect.db*"))
    assert first in shown and first.encode() in stored
    assert MARKER not in shown and MARKER.encode() not in stored
    assert KEY not in shown and KEY.encode() not in stored
    assert isinstance(block, ComputeEnvironment)
