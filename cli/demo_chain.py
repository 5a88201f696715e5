"""
``c2d demo-chain``: the main job once more, through the Provider's dialect, with paid orders on a chain of our own.

A publisher puts two data sets and an algorithm on the chain and into the catalogue; a consumer asks what it costs,
orders, pays, starts the job with a signature and fetches the results with others. All of it over HTTP and on the
chain, by nothing that another client could not do as well.
"""

from __future__ import annotations

import json
import tempfile
import time
import zipapp
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import yaml
from eth_account.messages import encode_defunct
from eth_account.signers.local import LocalAccount
from eth_utils.crypto import keccak
from rich.console import Console
from rich.table import Table

from cli.demo import EXAMPLES, DemoFailed, download, follow, serving, show
from cli.local_chain import CHAIN_ID, LocalChain, Published
from cli.service import Service

PRICE: Final = "0.25"
"""Of a minute in the environment, in whole units of the fee token."""
DECIMALS: Final = 6
PURSE: Final = 100 * 10**DECIMALS
SERVICES: Final = "/api/services"
IMAGE: Final = {
    "image": "python",
    "tag": "3.12-slim",
    "entrypoint": "python3 $ALGO",
    # A process environment runs with the machine's own Python and does not look at it; consumers have to name one.
    "checksum": "sha256:" + "0" * 64,
}


@dataclass(frozen=True)
class Offered:
    """An asset on the chain and in the catalogue."""

    published: Published
    service_id: str
    title: str

    def order(self, tx_id: str = "") -> dict[str, str]:
        """As the Provider's calls name it."""
        named = {"documentId": self.published.did, "serviceId": self.service_id}
        return {**named, "transferTxId": tx_id} if tx_id else named


def run_demo_chain(state: Path, console: Console) -> Path:
    """
    Start a chain and the service in *state*, offer, order, pay, run, show and keep what comes out, stop everything.

    Returns:
        The folder with the results.

    Raises:
        DemoFailed, CannotStart.
    """
    began = time.monotonic()

    def say(line: str) -> None:
        console.print(f"[dim]{time.monotonic() - began:6.1f} s[/dim]  {line}", highlight=False, soft_wrap=True)

    say("starting: a chain of our own (anvil) with Ocean's contracts")
    state.mkdir(parents=True, exist_ok=True)
    with (
        LocalChain(state / "chain") as chain,
        tempfile.TemporaryDirectory() as archives,
        serving(EXAMPLES) as data,
        serving(Path(archives)) as code,
    ):
        _archive(Path(archives) / "study.pyz")
        token = chain.new_token(DECIMALS)
        chain.give(token, chain.consumer.address, PURSE)
        service = Service(
            state=state,
            variables={
                # The data of this demo are served from this machine; elsewhere such addresses are refused.
                "C2D_NETWORKS": "127.0.0.0/8",
                "C2D_CHAINS": json.dumps([{"id": CHAIN_ID, "rpc": chain.url, "fee_token": token}]),
                "C2D_PRICE_MIN": PRICE,
            },
            say=lambda line: say(f"starting: {line}"),
        )
        with service, httpx.Client(base_url=service.api_url, timeout=60.0) as client:
            console.print(f"\nAPI {service.api_url}/docs   Prefect UI {service.prefect_url}\n")
            datasets, algorithm = _publish(chain, client, state / "catalogue", data, f"{code}study.pyz")
            for offered in (*datasets, algorithm):
                say(f"offered: {offered.title}, {offered.published.did[:20]}…")
            consumer = Consumer(client, chain.consumer)
            environment = consumer.environment()
            before = chain.balance(token, chain.consumer.address)
            orders = consumer.order(chain, datasets, algorithm, environment, console)
            paid = before - chain.balance(token, chain.consumer.address)
            say(f"paid: {paid / 10**DECIMALS:g} of the fee token, and a datatoken for each asset\n")
            job_id = consumer.start(datasets, algorithm, orders, str(environment["id"]))
            console.print(f"POST {SERVICES}/compute -> job {job_id}\n")
            follow(lambda: consumer.status(job_id), console)
            folder = state / "results" / job_id
            download(client, consumer.results(job_id), folder, console)
        say("stopped everything")
    show(folder, console)
    return folder


class Consumer:
    """Speaks the Provider's dialect, as any client of it."""

    def __init__(self, client: httpx.Client, account: LocalAccount) -> None:
        self._client = client
        self._account = account
        about = self._answer(client.get("/"))
        self._endpoints: Mapping[str, Sequence[str]] = about["serviceEndpoints"]

    def environment(self) -> dict[str, Any]:
        """The first that is on offer on the chain."""
        offered = self._call("computeEnvironments", params={"chainId": CHAIN_ID})
        return dict(offered[0])

    def order(
        self,
        chain: LocalChain,
        datasets: Sequence[Offered],
        algorithm: Offered,
        environment: Mapping[str, Any],
        console: Console,
    ) -> dict[str, str]:
        """Ask what is to be paid, order it on the chain; the transactions, by DID."""
        seconds = min(300, int(environment["maxJobDuration"]))
        costs = self._call(
            "initializeCompute",
            json={
                "datasets": [dataset.order() for dataset in datasets],
                "algorithm": algorithm.order(),
                "compute": {"env": environment["id"], "validUntil": int(time.time()) + seconds},
                "consumerAddress": self._account.address,
            },
        )
        table = Table("asset", "provider's fee", "valid until", "order (transaction)")
        orders = {}
        for offered, cost in zip((*datasets, algorithm), (*costs["datasets"], costs["algorithm"]), strict=True):
            fee = cost["providerFee"]
            chain.mint(cost["datatoken"], self._account.address)
            tx_id = chain.order(
                cost["datatoken"], fee, payer=self._account, consumer=str(environment["consumerAddress"])
            )
            orders[offered.published.did] = tx_id
            until = time.strftime("%H:%M:%S", time.localtime(int(fee["validUntil"])))
            amount = int(fee["providerFeeAmount"]) / 10**DECIMALS
            table.add_row(offered.title, f"{amount:g}", until, f"{tx_id[:18]}…")
        console.print(table)
        return orders

    def start(
        self, datasets: Sequence[Offered], algorithm: Offered, orders: Mapping[str, str], environment: str
    ) -> str:
        main, *more = (dataset.order(orders[dataset.published.did]) for dataset in datasets)
        workflow = json.loads((EXAMPLES / "workflow.json").read_text(encoding="utf-8"))
        parameters: dict[str, Any] = {}
        for stage in workflow["stages"]:
            parameters |= stage["algorithm"]["algocustomdata"]
        answer = self._call(
            "computeStart",
            json={
                **self._signed(main["documentId"]),
                "environment": environment,
                "dataset": main,
                "additionalDatasets": more,
                "algorithm": {**algorithm.order(orders[algorithm.published.did]), "algocustomdata": parameters},
            },
        )
        return str(answer[0]["jobId"])

    def status(self, job_id: str) -> dict[str, Any]:
        """Unsigned: without links and checksums."""
        return dict(self._call("computeStatus", params={"jobId": job_id})[0])

    def results(self, job_id: str) -> list[dict[str, Any]]:
        """Of the job, which has ended: each with the signed URL it can be fetched from, once."""
        (job,) = self._call("computeStatus", params={**self._signed(job_id), "jobId": job_id})
        _, path = self._endpoints["computeResult"]
        results = []
        for result in job["results"]:
            query = {**self._signed(job_id, result["index"]), "jobId": job_id, "index": result["index"]}
            results.append({**result, "url": str(self._client.base_url.join(path).copy_merge_params(query))})
        return results

    def _signed(self, *parts: object) -> dict[str, str]:
        """Address, nonce and a signature over address + *parts* + nonce."""
        # Time, not the last one plus one: results are signed for before the first of them is fetched.
        nonce = str(time.time_ns())
        message = f"{self._account.address}{''.join(map(str, parts))}{nonce}"
        signature = self._account.sign_message(encode_defunct(primitive=keccak(text=message))).signature
        return {"consumerAddress": self._account.address, "nonce": nonce, "signature": f"0x{signature.hex()}"}

    def _call(self, name: str, **options: Any) -> Any:
        """An endpoint by the name that ``GET /`` lists it under."""
        method, path = self._endpoints[name]
        return self._answer(self._client.request(method, path, **options))

    @staticmethod
    def _answer(answer: httpx.Response) -> Any:
        if answer.is_error:
            raise DemoFailed(f"{answer.request.method} {answer.request.url.path} was refused: {answer.text}")
        return answer.json()


def _archive(target: Path) -> None:
    """``fit.py``, ``report.py`` and what runs both, as the one file that an algorithm is."""
    with tempfile.TemporaryDirectory() as folder:
        for name, inside in (("study.py", "__main__.py"), ("fit.py", "fit.py"), ("report.py", "report.py")):
            (Path(folder) / inside).write_bytes((EXAMPLES / name).read_bytes())
        zipapp.create_archive(folder, target)


def _publish(
    chain: LocalChain, client: httpx.Client, catalogue: Path, data: str, code: str
) -> tuple[list[Offered], Offered]:
    """What the owners do: an NFT and a datatoken for each asset, its files encrypted, its DDO in the catalogue."""
    titles = ("CO2 at Mauna Loa", "Sea temperature off Peru")
    files = (
        ["data/mauna-loa-co2-1958-1979.csv", "data/mauna-loa-co2-1980-2001.csv"],
        ["data/nino-1-2-sst-1950-2010.csv"],
    )
    for earlier in catalogue.glob("demo-*.yaml"):
        earlier.unlink()
    algorithm = _offer(chain, client, catalogue, "Does El Niño raise the growth of CO2?", [code], kind="algorithm")
    rules = {
        "allowRawAlgorithm": False,
        "allowNetworkAccess": False,
        "publisherTrustedAlgorithms": [{"did": algorithm.published.did}],
        "publisherTrustedAlgorithmPublishers": [],
    }
    datasets = [
        _offer(chain, client, catalogue, title, [f"{data}{name}" for name in names], compute=rules)
        for title, names in zip(titles, files, strict=True)
    ]
    # The catalogue looks for changes once a second.
    time.sleep(1.1)
    return datasets, algorithm


def _offer(
    chain: LocalChain,
    client: httpx.Client,
    catalogue: Path,
    title: str,
    urls: Sequence[str],
    *,
    kind: str = "dataset",
    compute: Mapping[str, Any] | None = None,
) -> Offered:
    published = chain.publish(title)
    sealed = client.post(
        f"{SERVICES}/encrypt",
        params={"chainId": CHAIN_ID},
        content=json.dumps(
            {
                "nftAddress": published.nft,
                "datatokenAddress": published.datatoken,
                "files": [{"type": "url", "url": url, "method": "GET"} for url in urls],
            }
        ),
        headers={"Content-Type": "application/octet-stream"},
    )
    if sealed.is_error:
        raise DemoFailed(f"the files could not be encrypted: {sealed.text}")
    service_type = "access" if kind == "algorithm" else "compute"
    metadata = {
        "created": "2026-01-01T00:00:00Z",
        "updated": "2026-01-01T00:00:00Z",
        "type": kind,
        "name": title,
        "description": title,
        "author": "the demo",
        "license": "CC0",
        **({"algorithm": {"language": "python", "version": "1", "container": IMAGE}} if kind == "algorithm" else {}),
    }
    ddo = {
        "@context": ["https://w3id.org/did/v1"],
        "id": published.did,
        "version": "4.1.0",
        "chainId": CHAIN_ID,
        "nftAddress": published.nft,
        "metadata": metadata,
        "services": [
            {
                "id": service_type,
                "type": service_type,
                "files": sealed.text,
                "datatokenAddress": published.datatoken,
                "serviceEndpoint": str(client.base_url).rstrip("/"),
                "timeout": 86_400,
                **({"compute": dict(compute)} if compute else {}),
            }
        ],
        "nft": {"address": published.nft, "owner": chain.publisher.address, "state": 0},
    }
    target = catalogue / f"demo-{published.nft.lower()}.yaml"
    # In one move, so that the catalogue never reads half of it.
    part = target.with_suffix(".part")
    part.write_text(yaml.safe_dump(ddo, allow_unicode=True), encoding="utf-8")
    part.replace(target)
    return Offered(published, service_type, title)
