"""
Clients of others, as they are, against the whole service with paid orders on a real chain: the life of a job, and of
one that is stopped while it runs. What runs in which version, and what no client can do: clients/README.md.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import pytest
import yaml
from aiohttp import web
from eth_account.signers.local import LocalAccount

from cli.demo_chain import IMAGE
from cli.local_chain import CHAIN_ID, LocalChain, Published
from cli.service import ROOT, Service
from tests import clients
from tests.clients import PYTHON, Steps
from tests.file_server import FileServer

pytestmark = [
    pytest.mark.clients,
    pytest.mark.worker,
    pytest.mark.sandbox,
    pytest.mark.chain,
    pytest.mark.slow,
    # Of which most may go into installing the clients, once.
    pytest.mark.timeout(900),
]

DECIMALS: Final = 6
PRICE: Final = "0.25"
"""Of a minute, in whole units of the fee token."""
DATA: Final = b"1,2,3\n4,5,6\n"
PAID: Final = "paid"
FREE: Final = "free"

ALGORITHM: Final = """
import json, os, pathlib, time
inputs = pathlib.Path(os.environ["INPUTS"])
custom = inputs / "algoCustomData.json"
seconds = json.loads(custom.read_text() or "{}").get("seconds", SECONDS) if custom.exists() else SECONDS
print("begun", flush=True)
time.sleep(seconds)
files = [path for did in json.loads(os.environ["DIDS"]) for path in sorted((inputs / did).iterdir())]
pathlib.Path(os.environ["OUTPUTS"], "sizes.json").write_text(json.dumps([path.stat().st_size for path in files]))
"""
RESULT: Final = json.dumps([len(DATA)])


@dataclass(frozen=True)
class World:
    """What the clients meet: a chain, the service on it, files, and a metadata store."""

    chain: LocalChain
    token: str
    service: Service
    files: FileServer
    data: str
    code: str

    @property
    def catalogue(self) -> Path:
        return self.service.state / "catalogue"

    def given(self, account: LocalAccount, **more: Any) -> dict[str, Any]:
        """What every client is told."""
        return {
            "provider": self.service.api_url,
            "rpc": self.chain.url,
            "chainId": CHAIN_ID,
            "key": "0x" + bytes(account.key).hex(),
            "account": account.address,
            "file": self.data,
            **more,
        }

    def equip(self, account: LocalAccount, assets: Sequence[Published]) -> None:
        """A consumer who can pay for two jobs."""
        self.chain.give(self.token, account.address, 100 * 10**DECIMALS)
        for asset in assets:
            self.chain.mint(asset.datatoken, account.address, 2 * 10**18)

    def asset(self, published: Published, files: str, kind: str) -> dict[str, Any]:
        """The DDO of a data set or an algorithm with *files* as a client has encrypted them."""
        service = "access" if kind == "algorithm" else "compute"
        metadata: dict[str, Any] = {
            "created": "2026-01-01T00:00:00Z",
            "updated": "2026-01-01T00:00:00Z",
            "type": kind,
            "name": kind,
            "description": kind,
            "author": "the tests",
            "license": "CC0",
        }
        if kind == "algorithm":
            metadata["algorithm"] = {"language": "python", "version": "1", "container": IMAGE}
        rules = {
            "allowRawAlgorithm": False,
            "allowNetworkAccess": False,
            "publisherTrustedAlgorithms": [],
            "publisherTrustedAlgorithmPublishers": [self.chain.publisher.address],
        }
        return {
            "@context": ["https://w3id.org/did/v1"],
            "id": published.did,
            "version": "4.1.0",
            "chainId": CHAIN_ID,
            "nftAddress": published.nft,
            "metadata": metadata,
            "services": [
                {
                    "id": service,
                    "type": service,
                    "files": files,
                    "datatokenAddress": published.datatoken,
                    "serviceEndpoint": self.service.api_url,
                    "timeout": 86_400,
                    **({"compute": rules} if kind == "dataset" else {}),
                }
            ],
            "datatokens": [{"address": published.datatoken, "name": kind, "symbol": "DT", "serviceId": service}],
            "nft": {"address": published.nft, "owner": self.chain.publisher.address, "state": 0},
        }

    def to_encrypt(self, dataset: Published, algorithm: Published) -> dict[str, Any]:
        """Files of both, in clear, as they are encrypted for a DDO."""
        return {
            name: {
                "nftAddress": published.nft,
                "datatokenAddress": published.datatoken,
                "files": [{"type": "url", "url": url, "method": "GET"}],
            }
            for name, published, url in (("dataset", dataset, self.data), ("algorithm", algorithm, self.code))
        }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("clients")
    with LocalChain(folder / "chain") as chain, FileServer() as files:
        files.on("", lambda _: web.Response(text="{}"))  # ocean.py asks its metadata store whether it is there
        token = chain.new_token(DECIMALS)
        service = Service(
            state=folder / "state",
            definitions=_definitions(folder / "prefect.yaml"),
            variables={
                "C2D_NETWORKS": "127.0.0.0/8",
                "C2D_CHAINS": json.dumps([{"id": CHAIN_ID, "rpc": chain.url, "fee_token": token}]),
                "C2D_ENVIRONMENTS_BY_CHAIN": "true",
                "C2D_DEFAULT_ENVIRONMENT": FREE,
                "C2D_METADATA_STORE": files.url,
            },
        )
        data = files.add(DATA, name="data.csv")
        code = files.add(ALGORITHM.replace("SECONDS", "0").encode(), name="algorithm.py")
        with service:
            yield World(chain, token, service, files, data, code)


def _definitions(path: Path) -> Path:
    """As the checkout's, with two environments: one that is free, and one that is not."""
    document = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    (environment,) = document["definitions"]["environments"]
    document["definitions"]["environments"] = [
        {**environment, "offer": {**environment["offer"], "id": name, "price_min": price}}
        for name, price in ((FREE, "0"), (PAID, PRICE))
    ]
    register, job, _ = document["deployments"]
    document["deployments"] = [
        register,
        *({**job, "name": name, "work_pool": {**job["work_pool"], "work_queue_name": name}} for name in (FREE, PAID)),
    ]
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def _encrypted(steps: Steps) -> dict[str, str]:
    return {told["name"]: told["files"] for told in steps.all("encrypt")}


def _named(published: Published, service_id: str) -> dict[str, str]:
    return {"did": published.did, "serviceId": service_id}


@pytest.fixture(scope="module")
def ocean_js(world: World, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """ocean.js; its assets stand in the local catalogue, their files encrypted by itself."""
    folder = tmp_path_factory.mktemp("ocean-js")
    account = world.chain.consumer
    dataset, algorithm = world.chain.publish("data"), world.chain.publish("algorithm")
    world.equip(account, (dataset, algorithm))
    clear = world.given(account, encrypt=world.to_encrypt(dataset, algorithm))
    files = _encrypted(clients.ocean_js("encrypt", clear, folder))
    for kind, published in (("dataset", dataset), ("algorithm", algorithm)):
        ddo = world.asset(published, files[kind], kind)
        (world.catalogue / f"{kind}.json").write_text(json.dumps(ddo), encoding="utf-8")
    time.sleep(1.1)  # the catalogue looks for changes once a second
    given = world.given(account, dataset=_named(dataset, "compute"), algorithm=_named(algorithm, "access"))
    return clients.ocean_js("jobs", given, folder)


@pytest.fixture(scope="module")
def ocean_py(world: World, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """ocean.py; its assets are known to a metadata store alone, their files encrypted by itself."""
    if sys.version_info[:2] != PYTHON:
        pytest.skip("what ocean.py pins has wheels for Python 3.11 only")
    folder = tmp_path_factory.mktemp("ocean-py")
    account = world.chain.stranger
    dataset, algorithm = world.chain.publish("data"), world.chain.publish("algorithm")
    world.equip(account, (dataset, algorithm))
    clear = world.given(account, encrypt=world.to_encrypt(dataset, algorithm))
    files = _encrypted(clients.ocean_py("encrypt", clear, folder))
    for kind, published in (("dataset", dataset), ("algorithm", algorithm)):
        body = json.dumps(world.asset(published, files[kind], kind)).encode()
        world.files.add(body, name=f"api/aquarius/assets/ddo/{published.did}")
    addresses = folder / "address.json"
    addresses.write_text(
        json.dumps({"development": {"chainId": CHAIN_ID, "ERC721Factory": world.chain.factory.address}}),
        encoding="utf-8",
    )
    given = world.given(
        account,
        metadata=world.files.url,
        dataset=_named(dataset, "compute"),
        algorithm=_named(algorithm, "access"),
    )
    return clients.ocean_py("jobs", given, folder, ADDRESS_FILE=str(addresses))


@pytest.fixture(scope="module")
def squid_js(world: World, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """squid-js; its agreements stand in the local catalogue."""
    account = world.chain.owner
    agreements = [f"0x{uuid4().hex}{uuid4().hex}" for _ in range(2)]
    did = "did:op:rivers"
    document = {
        "assets": [
            {
                "name": "Rivers",
                "id": did,
                "type": "dataset",
                "files": [world.data],
                "compute": {"allowRawAlgorithm": True},
            }
        ],
        "agreements": {agreement: {"did": did, "consumer": account.address} for agreement in agreements},
    }
    (world.catalogue / "rivers.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    time.sleep(1.1)
    given = world.given(
        account,
        did=did,
        agreements=agreements,
        algorithm={"language": "python", "format": "py", "version": "1", "container": IMAGE},
        quick=ALGORITHM.replace("SECONDS", "0"),
        slow=ALGORITHM.replace("SECONDS", "100"),
    )
    return clients.squid_js(given, tmp_path_factory.mktemp("squid-js"))


CLIENTS: Final = ("ocean_js", "ocean_py")


@pytest.fixture(scope="module", params=CLIENTS)
def provider_client(request: pytest.FixtureRequest) -> Steps:
    """Each client of the Provider in turn. That its assets can be used at all shows that it encrypted their files."""
    steps: Steps = request.getfixturevalue(request.param)
    return steps


def test_the_service_is_found(provider_client: Steps) -> None:
    """By ``GET /``: it is valid, and every endpoint is there."""
    found = provider_client["discovery"]
    assert found["valid"]
    assert ["POST", "/api/services/compute"] == found["serviceEndpoints"]["computeStart"]


def test_environments_are_found(provider_client: Steps, world: World) -> None:
    """Under the chain's id, with the price and the token it is to be paid in."""
    environments = {each["id"]: each for each in provider_client["environments"]["environments"]}
    assert {FREE: 0, PAID: float(PRICE)} == {name: each["priceMin"] for name, each in environments.items()}
    assert world.token == environments[PAID]["feeToken"]


def test_ocean_py_finds_what_is_free(ocean_py: Steps) -> None:
    assert FREE == ocean_py["environments"]["free"]["id"]


def test_file_info(provider_client: Steps) -> None:
    """Of an asset, with a checksum, and of a file."""
    info = provider_client["fileinfo"]
    (asset,) = info["asset"]
    assert (True, str(len(DATA)), hashlib.sha256(DATA).hexdigest()) == (
        asset["valid"],
        asset["contentLength"],
        asset["checksum"],
    )
    assert info["file"]


def test_initialize(provider_client: Steps) -> None:
    """An access service can be ordered; it costs nothing here."""
    told = provider_client["initialize"]
    assert "0" == told["providerFee"]["providerFeeAmount"]
    assert told["datatoken"]


def test_the_first_job_is_ordered_and_paid(provider_client: Steps) -> None:
    """initializeCompute asks for the price once, with the data set."""
    first, _ = provider_client.all("initializeCompute")
    (dataset,) = first["datasets"]
    # 300 s, less what the client's own clock has lost until it asked.
    assert 1_150_000 < int(dataset["providerFee"]["providerFeeAmount"]) <= 1_250_000
    assert "0" == first["algorithm"]["providerFee"]["providerFeeAmount"]


def test_the_first_job_runs_to_its_end(provider_client: Steps) -> None:
    """Its status says so, and each result is downloaded by its place among those that are listed."""
    job = provider_client["status"]["job"]
    assert (70, "Job completed") == (job["status"], job["statusText"]), job["reason"]
    results = provider_client.all("result")
    assert [result["type"] for result in job["results"]] == [result["type"] for result in results]
    texts = {result["name"]: result["text"] for result in results}
    assert (RESULT, "begun\n") == (texts["sizes.json"], texts["algorithm.log"])


def test_ocean_py_reads_outputs_in_one_call(ocean_py: Steps) -> None:
    """It asks for every result from 0 on and keeps the outputs."""
    assert [RESULT] == ocean_py["outputs"]["texts"]


def test_an_order_is_reused_for_another_job(provider_client: Steps) -> None:
    """initializeCompute names the order and asks for the price again, since one payment is good for one job."""
    _, again = provider_client.all("initializeCompute")
    first, second = provider_client.all("order")
    (dataset,) = again["datasets"]
    assert _tx(first["dataset"]) == dataset["validOrder"]
    assert int(dataset["providerFee"]["providerFeeAmount"])
    assert _tx(second["dataset"]) != _tx(first["dataset"])


def test_a_running_job_is_stopped(provider_client: Steps) -> None:
    """It runs, is stopped, and its status says so afterwards."""
    assert 40 == provider_client["running"]["job"]["status"]
    stopped = provider_client["stopped"]["job"]
    assert (7, "Job stopped", 1) == (stopped["status"], stopped["statusText"], stopped["stopreq"])


def test_a_job_is_deleted(provider_client: Steps) -> None:
    """ocean.js signs a nonce and does not send it; the next one is meant."""
    told = provider_client["delete"]
    assert 8 == (told["jobs"][0] if "jobs" in told else told["job"])["status"]
    for afterwards in provider_client.all("deleted"):
        assert [] == afterwards["jobs"]


def test_ocean_js_finds_jobs_by_their_order(ocean_js: Steps) -> None:
    """It sends the transaction without 0x."""
    assert [ocean_js["status"]["job"]["jobId"]] == [job["jobId"] for job in ocean_js["agreement"]["jobs"]]


def test_squid_finds_the_service(squid_js: Steps) -> None:
    assert squid_js["discovery"]["serviceEndpoints"]["brizoComputeStart"]


def test_squid_runs_a_job(squid_js: Steps) -> None:
    """
    Under an agreement that it names without 0x, and that stands in the catalogue with it; started twice it is one job.

    By its class Brizo: OceanCompute, around it, takes the first of the jobs that a start answers, and by spec 003 that
    answer is one job and no list.
    """
    first = squid_js.all("start")[0]["job"]
    assert squid_js["again"]["job"]["jobId"] == first["jobId"]
    job = squid_js["status"]["job"]
    assert (first["jobId"], first["agreementId"]) == (job["jobId"], job["agreementId"])
    assert job["agreementId"].startswith("0x")
    assert (6, "Job completed") == (job["status"], job["statusText"]), job["reason"]
    assert [job["jobId"]] == [each["jobId"] for each in squid_js["agreement"]["jobs"]]


def test_squid_downloads_results(squid_js: Steps) -> None:
    """By the signed links in resultsUrls and algorithmLogUrl, as it calls what spec 003 has other names for."""
    assert [RESULT, "begun\n"] == [result["text"] for result in squid_js.all("result")]


def test_squid_stops_and_deletes_a_running_job(squid_js: Steps) -> None:
    """With a token instead of signatures."""
    assert 3 == squid_js["running"]["job"]["status"]
    stopped = squid_js["stopped"]["job"]
    assert (7, "Job stopped") == (stopped["status"], stopped["statusText"])
    assert 8 == squid_js["delete"]["job"]["status"]
    assert [] == squid_js["deleted"]["jobs"]


def _tx(order: Any) -> Any:
    """The transaction: ocean_js.js tells more about an order."""
    return order["tx"] if isinstance(order, dict) else order
