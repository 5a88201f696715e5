"""Orders through the dialects of consumers: a real node, real contracts, the real app; jobs in memory."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import uvicorn
from eth_account import Account
from eth_account.signers.local import LocalAccount
from hexbytes import HexBytes
from web3 import Web3

from api.app import create_app
from blocks.catalogue import LocalCatalogue
from blocks.chain import ONE_TOKEN, Chain
from blocks.files import parse_files
from blocks.keys import ProviderKey, seal_files
from blocks.limits import FetchLimits, Limits, Offer
from cli.local_chain import CHAIN_ID, Fee, LocalChain, Published
from flows.broker import Broker
from flows.jobs import Job, MemoryJobs
from flows.status import Status
from flows.workflow import Workflow
from tests import factories
from tests.chain import Return, config, order_started_log, poke, provider_fee_log, replace_code
from tests.factories import Client, brizo_sign, consumer_signed, next_nonce, sign
from tests.file_server import FileServer

pytestmark = pytest.mark.chain

KEY = ProviderKey.from_secret("07" * 32)
OTHER_KEY = ProviderKey.from_secret("08" * 32)
FORGER = ProviderKey.from_secret("09" * 32)
NEXT_OWNER: LocalAccount = Account.from_key(b"\x0c" * 32)
SERVICES = "/api/services"
BRIZO = "/api/v1/brizo/services/compute"
CONTAINER = {"image": "python", "tag": "3.12", "entrypoint": "python3 $ALGO", "checksum": "sha256:" + "ab" * 32}
RAW = {"meta": {"rawcode": "print('hello')", "container": CONTAINER}}
LONGEST = 3_600
LIMITS = FetchLimits(networks=("127.0.0.0/8",))
OFFERS = {
    "free": Offer(id="free", limits=Limits(seconds=LONGEST)),
    "dear": Offer(id="dear", price_min=2.5, limits=Limits(seconds=LONGEST)),
    "other": Offer(id="other", price_min=2.5, limits=Limits(seconds=LONGEST)),
}
NOWHERE = "0x" + "ab" * 32
"""A transaction that there is not."""


@dataclass
class Clock:
    """The time as the service has it; the chain has one of its own."""

    ahead: float = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


@dataclass(frozen=True)
class Item:
    """An asset on the chain and in the catalogue."""

    published: Published
    service: str

    @property
    def did(self) -> str:
        return self.published.did

    def named(self, tx_id: str = "") -> dict[str, Any]:
        """As the Provider's calls name it."""
        named = {"documentId": self.did, "serviceId": self.service}
        return {**named, "transferTxId": tx_id} if tx_id else named


@dataclass
class Ledger(MemoryJobs):
    """Keeps the document of each job."""

    documents: dict[str, Workflow] = field(default_factory=dict)

    async def submit(self, workflow: Workflow) -> Job:
        job = await super().submit(workflow)
        self.documents[job.id] = workflow
        return job


class Market:
    """A provider with a chain, publishers who offer on it, and a consumer who has money."""

    def __init__(self, client: Client, chain: LocalChain, folder: Path, clock: Clock, token: str) -> None:
        self.client = client
        self.chain = chain
        self.clock = clock
        self.token = token
        self._folder = folder
        self._written = 0

    # What publishers do.

    def dataset(self, service: str = "compute", **more: Any) -> Item:
        return self.offer("dataset", service, **more)

    def algorithm(self, **more: Any) -> Item:
        return self.offer("algorithm", "access", **more)

    def offer(
        self,
        kind: str,
        service: str,
        *,
        published: Published | None = None,
        key: ProviderKey = KEY,
        url: str = "https://example.com/file",
        chain_id: int = CHAIN_ID,
        timeout: int = 0,
        compute: Mapping[str, Any] | None = None,
        endpoint: str = "http://127.0.0.1",
        **ddo: Any,
    ) -> Item:
        """An asset of the publisher's with one service, encrypted to *key*."""
        published = published or self.chain.publish()
        files = parse_files([{"type": "url", "url": url}])
        described = {
            "id": service,
            "type": "access" if service == "access" else "compute",
            "files": seal_files(files, key=key, nft_address=published.nft, datatoken=published.datatoken),
            "datatokenAddress": published.datatoken,
            "serviceEndpoint": endpoint,
            "timeout": timeout,
            "compute": {"allowRawAlgorithm": True, **(compute or {})},
        }
        container = {"algorithm": {"container": CONTAINER}} if kind == "algorithm" else {}
        self.write(
            {
                "id": published.did,
                "version": "4.1.0",
                "chainId": chain_id,
                "nftAddress": published.nft,
                "metadata": {"type": kind, "name": kind, **container},
                "services": [described],
                **ddo,
            }
        )
        return Item(published, service)

    def write(self, asset: Mapping[str, Any]) -> None:
        """Into the catalogue, which is opened anew: one that is open looks for changes once a second."""
        self._written += 1
        (self._folder / f"{self._written}.json").write_text(json.dumps(asset))
        self.rewire(catalogue=LocalCatalogue(self._folder))

    def rewire(self, **parts: Any) -> None:
        """Put other parts into the broker of the app."""
        service = self.client.app.state.service
        broker = replace(service.broker, **parts)
        self.client.app.state.service = replace(service, broker=broker, jobs=broker.jobs)

    # What consumers do.

    def costs(self, *datasets: dict[str, Any], **ask: Any) -> Any:
        """initializeCompute; the HTTP answer."""
        seconds = ask.pop("seconds", 600)
        body = {
            "datasets": list(datasets),
            "algorithm": ask.pop("algorithm", RAW),
            "compute": {"env": ask.pop("environment", "dear"), "validUntil": int(self.clock()) + seconds},
            "consumerAddress": self.chain.consumer.address,
            **ask,
        }
        return self.client.post(f"{SERVICES}/initializeCompute", json=body)

    def costs_of(self, *datasets: dict[str, Any], **ask: Any) -> dict[str, Any]:
        answer = self.costs(*datasets, **ask)
        assert 200 == answer.status_code, answer.text
        return dict(answer.json())

    def order(self, item: Item, fee: Fee, **more: Any) -> str:
        """On the chain; the transaction."""
        self.chain.mint(item.published.datatoken, more.get("payer", self.chain.consumer).address)
        return self.chain.order(item.published.datatoken, fee, **more)

    def ordered(self, item: Item, **ask: Any) -> str:
        """As a client orders one data set to run on."""
        return self.order(item, self.costs_of(item.named(), **ask)["datasets"][0]["providerFee"])

    def fee(self, item: Item, **changes: Any) -> Fee:
        """One of this provider's own making, *changes* apart."""
        values: dict[str, Any] = {
            "datatoken": item.published.datatoken.lower(),
            "service_id": item.service,
            "environment": "dear",
            "amount": 25 * 10**6,
            "valid_until": int(self.clock()) + 600,
            "now": float(int(self.clock())),
        }
        key = changes.pop("key", KEY)
        signing = Chain(config(self.chain, fee_token=changes.pop("token", self.token)), key.address)
        return signing.provider_fee(key.sign_hash, **{**values, **changes})

    def body(self, dataset: dict[str, Any], key: LocalAccount | None = None, **call: Any) -> dict[str, Any]:
        """Of POST compute, signed."""
        signed = consumer_signed(key or self.chain.consumer, call.get("jobId", ""), dataset.get("documentId", ""))
        return {**signed, "dataset": dataset, "algorithm": RAW, "environment": "dear", **call}

    def start(self, dataset: dict[str, Any], key: LocalAccount | None = None, **call: Any) -> Any:
        """POST compute; the HTTP answer."""
        return self.client.post(f"{SERVICES}/compute", json=self.body(dataset, key, **call))

    def started(self, dataset: dict[str, Any], key: LocalAccount | None = None, **call: Any) -> Job:
        answer = self.start(dataset, key, **call)
        assert 200 == answer.status_code, answer.text
        return self.client.job(answer.json()[0]["jobId"])

    def refused(self, dataset: dict[str, Any], key: LocalAccount | None = None, **call: Any) -> tuple[Any, str]:
        """``error`` and the sentence; nobody has got a job for it."""
        before = len(self.client.jobs._jobs)
        answer = self.start(dataset, key, **call)
        assert 400 == answer.status_code, answer.text
        assert before == len(self.client.jobs._jobs)
        return answer.json()["error"], answer.json()["message"]

    def seconds(self, job: Job) -> float:
        """How long it may take."""
        jobs = self.client.jobs
        assert isinstance(jobs, Ledger)
        return float(jobs.documents[job.id].stages[0].compute.maxtime or 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("catalogue")


@pytest.fixture(scope="module")
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def token(chain: LocalChain) -> str:
    """In which fees are paid; the consumer has plenty."""
    token = chain.new_token(6)
    chain.give(token, chain.consumer.address, 10**12)
    return token


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory, chain: LocalChain, folder: Path, clock: Clock, token: str
) -> Iterator[Client]:
    """One app for all: making one takes longer than most tests."""
    orders = Chain(config(chain, fee_token=token, factory=chain.factory.address), KEY.address, clock)
    with factories.client(
        factories.settings(tmp_path_factory.mktemp("settings")),
        Ledger(OFFERS),
        catalogue=LocalCatalogue(folder),
        chains={chain.chain_id: orders},
        key=KEY,
        limits=LIMITS,
        metadata_url="https://metadata.example.com",
        now=clock,
    ) as client:
        yield client
        client._portal.call(orders.close)


@pytest.fixture
def market(shared: Client, chain: LocalChain, folder: Path, clock: Clock, token: str) -> Iterator[Market]:
    for path in folder.iterdir():
        path.unlink()
    clock.ahead = 0
    wired = shared.app.state.service
    shared.jobs = Ledger(OFFERS)
    market = Market(shared, chain, folder, clock, token)
    market.rewire(jobs=shared.jobs, catalogue=LocalCatalogue(folder))
    with chain.rolled_back():
        yield market
    shared.app.state.service = wired


@contextmanager
def asking(market: Market, **changes: Any) -> Iterator[None]:
    """The app asks a node by other means for the while; *changes* are those of its configuration."""
    orders = Chain(config(market.chain, fee_token=market.token, **changes), KEY.address, market.clock)
    before = market.client.app.state.service.broker.chains
    market.rewire(chains={market.chain.chain_id: orders})
    try:
        yield
    finally:
        market.rewire(chains=before)
        market.client._portal.call(orders.close)


def price_of(seconds: float) -> int:
    """In smallest units of the fee token, in ``dear``."""
    return math.ceil(Fraction(str(seconds)) * Fraction("2.5") / 60 * 10**6)


# Orders that pay.


def test_a_paid_order_starts_a_job(market: Market) -> None:
    """One asset is charged, the others cost nothing; the job is that of the transaction which paid, for its time."""
    main, more, algorithm = market.dataset(), market.dataset(), market.algorithm()
    costs = market.costs_of(main.named(), more.named(), algorithm=algorithm.named())
    entries = [*costs["datasets"], costs["algorithm"]]
    items = (main, more, algorithm)
    assert [item.published.datatoken for item in items] == [entry["datatoken"] for entry in entries]
    assert [{"datatoken", "providerFee"}] * 3 == [set(entry) for entry in entries]
    charged, *others = [int(entry["providerFee"]["providerFeeAmount"]) for entry in entries]
    assert [0, 0] == others
    tx_ids = [market.order(item, entry["providerFee"]) for item, entry in zip(items, entries, strict=True)]
    assert charged == market.chain.balance(market.token, KEY.address)
    job = market.started(
        main.named(tx_ids[0]), additionalDatasets=[more.named(tx_ids[1])], algorithm=algorithm.named(tx_ids[2])
    )
    assert tx_ids[0] == job.agreement_id
    assert (main.did, more.did) == job.input_dids
    assert algorithm.did == job.algorithm_did
    assert 590 <= market.seconds(job) <= 600
    assert price_of(market.seconds(job)) == charged


def test_what_was_paid_for_does_not_melt_away(market: Market) -> None:
    """The time between the question, the payment and the start is nobody's loss, and makes no fee too little."""
    item = market.dataset()
    fee = market.costs_of(item.named())["datasets"][0]["providerFee"]
    market.clock.ahead = 500
    tx_id = market.order(item, fee)
    job = market.started(item.named(tx_id))
    assert 590 <= market.seconds(job) <= 600


def test_a_client_orders_for_the_environment(market: Market) -> None:
    """As ocean's clients do: the order's consumer is the environment's address, its payer the user, who starts."""
    (environment, *_) = market.client.get(f"{SERVICES}/computeEnvironments").json()
    item = market.dataset()
    fee = market.costs_of(item.named())["datasets"][0]["providerFee"]
    tx_id = market.order(item, fee, consumer=environment["consumerAddress"])
    market.started(item.named(tx_id))


def test_the_orders_consumer_may_start_as_well(market: Market) -> None:
    """Somebody else has paid."""
    item = market.dataset()
    fee = market.costs_of(item.named())["datasets"][0]["providerFee"]
    tx_id = market.order(item, fee, consumer=market.chain.stranger.address)
    job = market.started(item.named(tx_id), market.chain.stranger)
    assert market.chain.stranger.address == job.owner


def test_time_beyond_the_longest_job_costs_nothing(market: Market) -> None:
    """And is not granted: a day of validity, an hour of work."""
    item = market.dataset()
    fee = market.costs_of(item.named(), seconds=86_400)["datasets"][0]["providerFee"]
    assert price_of(LONGEST) == int(fee["providerFeeAmount"])
    job = market.started(item.named(market.order(item, fee)))
    assert LONGEST == market.seconds(job)


@pytest.mark.parametrize("until", [2**53, "9007199254740992"])
def test_a_moment_as_far_away_as_can_be(market: Market, until: Any) -> None:
    """The contract and the signature can hold it."""
    item = market.dataset()
    compute = {"env": "dear", "validUntil": until}
    fee = market.costs_of(item.named(), compute=compute)["datasets"][0]["providerFee"]
    assert (2**53, price_of(LONGEST)) == (fee["validUntil"], int(fee["providerFeeAmount"]))
    assert LONGEST == market.seconds(market.started(item.named(market.order(item, fee))))


@pytest.mark.parametrize("until", [0, -1, 1, 2**53 + 1, 2**400, 1.5, "soon", None, True])
def test_no_moment_to_come(market: Market, until: Any) -> None:
    """The field is named."""
    answer = market.costs(market.dataset().named(), compute={"env": "dear", "validUntil": until})
    assert (400, ["compute.validUntil"]) == (answer.status_code, list(answer.json()["errors"]))


def test_a_free_environment(market: Market) -> None:
    """An asset on a chain has to be ordered all the same, without a fee; one of no chain does not."""
    item = market.dataset()
    home = {"id": "did:op:home", "name": "home", "type": "dataset", "files": ["https://example.com/x"]}
    market.write({**home, "compute": {"allowRawAlgorithm": True}})
    plain = {"documentId": "did:op:home", "serviceId": "compute"}
    costs = market.costs_of(plain, item.named(), environment="free")["datasets"]
    assert ({}, "0") == (costs[0], costs[1]["providerFee"]["providerFeeAmount"])
    assert {"dataset.transferTxId": "missing"} == market.refused(item.named(), environment="free")[0]
    tx_id = market.order(item, costs[1]["providerFee"])
    job = market.started(plain, environment="free", additionalDatasets=[item.named(tx_id)])
    assert (tx_id, LONGEST) == (job.agreement_id, market.seconds(job))
    assert "0x" == market.started(plain, environment="free").agreement_id[:2]


def test_a_price_that_nobody_could_pay(market: Market) -> None:
    """Where nothing is ordered on a chain: told before the job is, in the same words."""
    home = {"id": "did:op:home", "name": "home", "type": "dataset", "files": ["https://example.com/x"]}
    market.write({**home, "compute": {"allowRawAlgorithm": True}})
    plain = {"documentId": "did:op:home", "serviceId": "compute"}
    answer = market.costs(plain)
    assert (400, {"order": "fees_not_paid"}) == (answer.status_code, answer.json()["error"])
    assert answer.json()["message"] == market.refused(plain)[1]


# Orders that are used again.


def test_an_order_that_is_still_good_need_not_be_made_again(market: Market) -> None:
    """Neither ordered nor paid; with a fee that has run out, or is for less, only that."""
    item = market.dataset()
    tx_id = market.ordered(item)
    assert [{"validOrder": tx_id}] == market.costs_of(item.named(tx_id), seconds=500)["datasets"]
    (longer,) = market.costs_of(item.named(tx_id), seconds=1_000)["datasets"]
    assert (tx_id, item.published.datatoken) == (longer["validOrder"], longer["datatoken"])
    assert price_of(990) < int(longer["providerFee"]["providerFeeAmount"]) <= price_of(1_000)
    market.clock.ahead = 700
    (later,) = market.costs_of(item.named(tx_id))["datasets"]
    assert (tx_id, {"validOrder", "datatoken", "providerFee"}) == (later["validOrder"], set(later))
    (unknown,) = market.costs_of(item.named(NOWHERE))["datasets"]
    assert {"datatoken", "providerFee"} == set(unknown)


def test_a_reused_order_starts_a_second_job(market: Market) -> None:
    """For a new fee and no new datatoken; named by the second transaction, and asked about by either."""
    item = market.dataset()
    first = market.ordered(item)
    one = market.started(item.named(first))
    (again,) = market.costs_of(item.named(first), seconds=500)["datasets"]
    assert first == again["validOrder"]
    second = market.chain.reuse(item.published.datatoken, first, again["providerFee"])
    (good,) = market.costs_of(item.named(second), seconds=400)["datasets"]
    assert {"validOrder": second} == good, "a client starts with what it is told, and the first has paid for a job"
    two = market.started(item.named(second))
    assert one.id != two.id
    assert (second, True) == (two.agreement_id, 490 <= market.seconds(two) <= 500)
    (third,) = market.costs_of(item.named(second), seconds=300)["datasets"]
    assert first == third["validOrder"], "what is reused is the order, not its reuse"


def test_an_order_pays_for_one_job(market: Market) -> None:
    """For the same one as often as it is asked for; another is refused and told what to do, however it is spelled."""
    item = market.dataset()
    tx_id = market.ordered(item)
    one = market.started(item.named(tx_id))
    market.clock.ahead = 30
    assert one.id == market.started(item.named(tx_id)).id
    shouted, bare = "0x" + tx_id[2:].upper(), tx_id[2:]
    assert one.id == market.started(item.named(shouted)).id == market.started(item.named(bare)).id
    other = {"meta": {"rawcode": "print('another')", "container": CONTAINER}}
    for spelled in (tx_id, shouted, bare):
        error, message = market.refused(item.named(spelled), algorithm=other)
        assert {"order": "in_use_or_not_on_chain"} == error
        assert "reuse it on chain" in message


def test_free_orders_are_used_once_too(market: Market) -> None:
    """The first asset's order is the job's; for a second job it is reused, for a fee of nothing."""
    item, algorithm = market.dataset(), market.algorithm()
    costs = market.costs_of(item.named(), algorithm=algorithm.named(), environment="free")
    first = market.order(item, costs["datasets"][0]["providerFee"])
    code = market.order(algorithm, costs["algorithm"]["providerFee"])
    named: dict[str, Any] = {"algorithm": algorithm.named(code), "environment": "free"}
    one = market.started(item.named(first), **named)
    again = market.costs_of(item.named(first), **named, seconds=500)
    assert {"validOrder": code} == again["algorithm"]
    fee = again["datasets"][0]["providerFee"]
    assert ("0", first) == (fee["providerFeeAmount"], again["datasets"][0]["validOrder"])
    second = market.chain.reuse(item.published.datatoken, first, fee)
    assert one.id != market.started(item.named(second), **named).id


def test_only_what_has_paid_counts_as_paid(market: Market) -> None:
    """Of several orders that are good, the price stands with none if one has paid, and else with the first."""
    one, two = market.dataset(), market.dataset()
    costs = market.costs_of(one.named(), two.named())["datasets"]
    paid, unpaid = (market.order(item, cost["providerFee"]) for item, cost in zip((one, two), costs, strict=True))
    good = market.costs_of(two.named(unpaid), one.named(paid), seconds=500)["datasets"]
    assert [{"validOrder": unpaid}, {"validOrder": paid}] == good
    (alone,) = market.costs_of(two.named(unpaid), seconds=500)["datasets"]
    assert (unpaid, True) == (alone["validOrder"], int(alone["providerFee"]["providerFeeAmount"]) > 0)
    error, message = market.refused(two.named(unpaid))
    assert {"order": "fees_not_paid"} == error
    assert "initializeCompute" in message
    job = market.started(two.named(unpaid), additionalDatasets=[one.named(paid)])
    assert paid == job.agreement_id
    swapped = market.costs_of(two.named(unpaid), one.named(paid), seconds=400)["datasets"]
    assert {"validOrder": unpaid} == swapped[0]
    assert int(swapped[1]["providerFee"]["providerFeeAmount"]) > 0, "it has paid for the job there is"


def test_a_job_is_started_again_under_its_own_order(market: Market) -> None:
    """Another order would pay for any number of such jobs, since it becomes the agreement of none."""
    item = market.dataset()
    tx_id = market.ordered(item)
    job = market.started(item.named(tx_id))
    market.client.jobs.move(job.id, Status.RUN_FAILED, detail="exit code 1")
    error, message = market.refused(item.named(market.ordered(item)), jobId=job.id)
    assert ({"order": "order_invalid"}, True) == (error, "jobId" in message)
    assert job.id == market.started(item.named(tx_id), jobId=job.id).id


# Orders that do not hold.


Change = Callable[[Market], tuple[Item, str]]


def expired(market: Market) -> tuple[Item, str]:
    item = market.dataset(timeout=300)
    tx_id = market.ordered(item)
    market.clock.ahead = 310
    return item, tx_id


def fees_expired(market: Market) -> tuple[Item, str]:
    item = market.dataset()
    tx_id = market.ordered(item)
    market.clock.ahead = 600 + 120
    return item, tx_id


def for_another_service(market: Market) -> tuple[Item, str]:
    item = market.dataset()
    return item, market.order(item, market.fee(item, service_id="another"))


def by_another_index(market: Market) -> tuple[Item, str]:
    item = market.dataset()
    return item, market.order(item, market.fee(item), service_index=1)


def of_another_datatoken(market: Market) -> tuple[Item, str]:
    item, cheap = market.dataset(), market.dataset()
    return item, market.ordered(cheap)


def for_another_environment(market: Market) -> tuple[Item, str]:
    item = market.dataset()
    return item, market.ordered(item, environment="other")


def of_another_consumer(market: Market) -> tuple[Item, str]:
    item = market.dataset()
    fee = market.fee(item, amount=0)
    stranger = market.chain.stranger
    return item, market.order(item, fee, payer=stranger)


def of_another_provider(market: Market) -> tuple[Item, str]:
    item = market.dataset()
    return item, market.order(item, market.fee(item, key=FORGER))


def with_a_forged_signature(market: Market) -> tuple[Item, str]:
    """The contract refuses those; this one has been replaced by a publisher's own, which does not."""
    item = market.dataset()
    chain, me = market.chain, market.chain.consumer.address
    fee = provider_fee_log(
        FORGER.sign_hash,
        address=KEY.address,
        token=market.token,
        amount=25 * 10**6,
        data=bytes(HexBytes(str(market.fee(item)["providerData"]))),
        valid_until=int(market.clock()) + 600,
    )
    started = order_started_log(consumer=me, payer=me, amount=ONE_TOKEN, service_index=0, timestamp=chain.now)
    replace_code(chain, item.published.datatoken, fee, started)
    return item, poke(chain, item.published.datatoken)


def reverted(market: Market) -> tuple[Item, str]:
    item = market.dataset()
    call = market.chain.start_order(item.published.datatoken, market.fee(item), consumer=market.chain.consumer.address)
    tx_id = market.chain.send(call, market.chain.consumer, mined=False)  # has no datatoken
    assert 0 == market.chain.receipt(tx_id)["status"]
    return item, tx_id


def unknown(market: Market) -> tuple[Item, str]:
    return market.dataset(), NOWHERE


def malformed(market: Market) -> tuple[Item, str]:
    return market.dataset(), "0x12'; drop"


def revoked(market: Market) -> tuple[Item, str]:
    item = market.dataset()
    tx_id = market.ordered(item)
    market.chain.set_state(item.published.nft, 3)
    return item, tx_id


INVALID: list[tuple[Change, str]] = [
    (expired, "The order has expired."),
    (fees_expired, "The provider fee has expired."),
    (for_another_service, "paid no provider fee for this service"),
    (by_another_index, "orders no such service"),
    (of_another_datatoken, "paid no provider fee for this service"),
    (for_another_environment, "The provider fee is for another environment."),
    (of_another_consumer, "neither for this consumer nor paid by it"),
    (of_another_provider, "paid to another provider"),
    (with_a_forged_signature, "not signed by this provider"),
    (reverted, "The transaction has failed."),
    (unknown, "There is no such transaction."),
    (malformed, "no transaction id"),
    (revoked, "not offered any more"),
]


@pytest.mark.parametrize(("change", "reason"), INVALID, ids=lambda value: getattr(value, "__name__", ""))
def test_an_order_that_does_not_hold(market: Market, change: Change, reason: str) -> None:
    """Refused with the code of the part it was made for, and a sentence that says why and quotes nothing."""
    item, tx_id = change(market)
    error, message = market.refused(item.named(tx_id))
    assert {"dataset.serviceId": "order_invalid"} == error
    assert reason in message
    assert tx_id not in message


@pytest.mark.parametrize("amount", ["too little", "just enough", "other token"])
def test_a_fee_that_is_not_the_price(market: Market, amount: str) -> None:
    """One unit less than the price of the time it was signed for; all of it, in another token."""
    item = market.dataset()
    if amount == "other token":
        token = market.chain.new_token(6)
        market.chain.give(token, market.chain.consumer.address, 10**12)
        fee = market.fee(item, token=token)
    else:
        fee = market.fee(item, amount=25 * 10**6 - (amount == "too little"))
    tx_id = market.order(item, fee)
    if amount == "just enough":
        assert 600 == market.seconds(market.started(item.named(tx_id)))
        return
    error, message = market.refused(item.named(tx_id))
    assert {"order": "fees_not_paid"} == error
    assert "see initializeCompute" in message
    (again,) = market.costs_of(item.named(tx_id), seconds=300)["datasets"]
    assert int(again["providerFee"]["providerFeeAmount"]) > 0


def test_what_is_not_ordered_at_all(market: Market) -> None:
    """Of a data set, of another, of an algorithm."""
    main, more, algorithm = market.dataset(), market.dataset(), market.algorithm()
    tx_id = market.ordered(main)
    assert {"dataset.transferTxId": "missing"} == market.refused(main.named())[0]
    refused = market.refused(main.named(tx_id), additionalDatasets=[more.named()])[0]
    assert {"datasets[1].transferTxId": "missing"} == refused
    assert {"algorithm.transferTxId": "missing"} == market.refused(main.named(tx_id), algorithm=algorithm.named())[0]


def test_the_order_of_an_algorithm(market: Market) -> None:
    """Has a code of its own; so has that of a further data set."""
    main, more, algorithm = market.dataset(), market.dataset(), market.algorithm()
    tx_id = market.ordered(main)
    error, message = market.refused(main.named(tx_id), algorithm=algorithm.named(NOWHERE))
    assert {"algorithm": "in_use_or_not_on_chain"} == error
    assert "There is no such transaction." in message
    error, _ = market.refused(main.named(tx_id), additionalDatasets=[more.named(tx_id)])
    assert {"datasets[1].serviceId": "order_invalid"} == error


def test_a_chain_that_is_not_served(market: Market) -> None:
    """Told when it is asked what it costs, too."""
    item = market.dataset(chain_id=1)
    error, message = market.refused(item.named(NOWHERE))
    assert {"dataset": "order_invalid"} == error
    assert "does not serve" in message
    answer = market.costs(item.named())
    assert (400, {"datasets[0]": "order_invalid"}) == (answer.status_code, answer.json()["error"])


def test_who_may_not_use_it_is_told_before_he_pays(market: Market) -> None:
    """And has paid for nothing if he does not ask."""
    denied: dict[str, Any] = {"credentials": {"deny": [{"type": "address", "values": [market.chain.consumer.address]}]}}
    item, algorithm = market.dataset(**denied), market.algorithm(**denied)
    answer = market.costs(item.named())
    assert (400, {"datasets[0]": "invalid"}) == (answer.status_code, answer.json()["error"])
    assert {"dataset": "invalid"} == market.refused(item.named(NOWHERE))[0]
    refused = market.refused(market.dataset().named(NOWHERE), algorithm=algorithm.named(NOWHERE))[0]
    assert {"algorithm.credentials": "invalid"} == refused


@pytest.mark.parametrize(
    ("algorithm", "error"),
    [
        ({"meta": {"rawcode": "x"}}, {"algorithm.container": "missing_entrypoint_image_checksum"}),
        (
            {"meta": {"rawcode": "x", "container": {**CONTAINER, "checksum": "ab"}}},
            {"algorithm.container": "checksum_prefix"},
        ),
        ({"meta": {"container": CONTAINER}}, {"algorithm": "meta_oneof_url_rawcode_remote"}),
        ({"meta": {"url": "ftp://example.com/x", "container": CONTAINER}}, "its scheme is not one of"),
        ({"meta": {"rawcode": "x", "container": {**CONTAINER, "tag": "a b"}}}, "algorithm.container.tag"),
        ({}, {"algorithm": "missing_meta_documentId"}),
    ],
)
def test_what_could_not_be_started_is_not_sold(market: Market, algorithm: dict[str, Any], error: Any) -> None:
    """initializeCompute refuses what compute will refuse, in the same words."""
    item = market.dataset()
    answer = market.costs(item.named(), algorithm=algorithm)
    assert 400 == answer.status_code
    said = answer.json()["error"]
    assert (error in said) if isinstance(error, str) else (error == said)
    started = market.start(item.named(market.ordered(item)), algorithm=algorithm)
    assert (400, said) == (started.status_code, started.json()["error"])


def test_nobody_asks_for_the_price_of_everything(market: Market) -> None:
    """As many data sets as a job may have, and at least one."""
    item = market.dataset()
    none = market.costs()
    assert (400, {"datasets": "invalid"}) == (none.status_code, none.json()["error"])
    many = market.costs(*[item.named()] * 101)
    assert (400, ["datasets"]) == (many.status_code, list(many.json()["errors"]))
    twice = market.costs(item.named(), item.named())
    assert (400, True) == (twice.status_code, "input 0 has this id too" in twice.json()["error"])


@pytest.mark.parametrize("field", ["documentId", "userdata"])
def test_a_further_data_set_of_no_form(market: Market, field: str) -> None:
    """Refused by its code."""
    item = market.dataset()
    further = {**item.named(NOWHERE), field: [1]}
    assert {"additional_input": "invalid"} == market.refused(item.named(NOWHERE), additionalDatasets=[further])[0]


def test_parameters_that_fit_into_no_url(market: Market) -> None:
    """A data set's owner can have written any text in its place."""
    item = market.dataset(url="http://[")
    answer = market.costs({**item.named(), "userdata": {"n": "1"}})
    assert (400, {"datasets[0]": "invalid"}) == (answer.status_code, answer.json()["error"])
    assert "[" not in answer.json()["message"]


# A node that is away.


def dead_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@pytest.mark.parametrize("how", ["silent", "gone"])
def test_a_node_that_does_not_answer(market: Market, how: str) -> None:
    """A clear 503; nothing is lost, and the very same call succeeds when the node is back."""
    item = market.dataset()
    tx_id = market.ordered(item)
    body = market.body(item.named(tx_id))
    address = {"userAddress": market.chain.consumer.address}
    nonce = market.client.get(f"{SERVICES}/nonce", params=address).json()
    away = {"rpc": f"http://127.0.0.1:{dead_port()}"} if how == "gone" else {}
    with asking(market, seconds=0.5, attempts=1, **away):
        try:
            if how == "silent":
                os.kill(market.chain.process.pid, signal.SIGSTOP)
            answers = [
                market.client.post(f"{SERVICES}/compute", json=body),
                market.costs(item.named(tx_id)),
                market.client.post(BRIZO, json=brizo(market, tx_id, algorithmMeta=RAW["meta"])),
            ]
        finally:
            os.kill(market.chain.process.pid, signal.SIGCONT)
    for answer in answers:
        assert (503, "5") == (answer.status_code, answer.headers["Retry-After"]), answer.text
        assert "The chain's node cannot be reached" in answer.json()["error"]
        assert str(market.chain.port) not in answer.text
    assert {} == market.client.jobs._jobs
    assert nonce == market.client.get(f"{SERVICES}/nonce", params=address).json()
    answer = market.client.post(f"{SERVICES}/compute", json=body)
    assert (200, tx_id) == (answer.status_code, answer.json()[0]["agreementId"])


# Brizo.


def brizo(market: Market, agreement: str, **more: Any) -> dict[str, Any]:
    """A call over consumerAddress + serviceAgreementId."""
    consumer = market.chain.consumer
    call = {"consumerAddress": consumer.address, "serviceAgreementId": agreement, **more}
    return {**call, "signature": brizo_sign(consumer, f"{consumer.address}{agreement}")}


def test_an_order_is_an_agreement_of_brizos(market: Market) -> None:
    """It names the data set by the transaction alone, and pays for one job, however it is spelled and wherever."""
    item = market.dataset()
    tx_id = market.ordered(item)
    market.rewire(default_environment="dear")
    answer = market.client.post(BRIZO, json=brizo(market, tx_id, algorithmMeta=RAW["meta"]))
    assert (200, tx_id) == (answer.status_code, answer.json()["agreementId"]), answer.text
    job = market.client.job(answer.json()["jobId"])
    assert (item.did,) == job.input_dids
    assert 590 <= market.seconds(job) <= 600
    other = {**RAW["meta"], "rawcode": "print('another')"}
    shouted = "0x" + tx_id[2:].upper()
    for spelled in (tx_id, shouted):
        answer = market.client.post(BRIZO, json=brizo(market, spelled, algorithmMeta=other))
        assert (400, True) == (answer.status_code, "has had its job" in answer.json()["error"]), answer.text
    error, _ = market.refused(item.named(tx_id), algorithm={"meta": other})
    assert {"order": "in_use_or_not_on_chain"} == error


@pytest.mark.parametrize("agreement", [NOWHERE, "0x12", "whatever"])
def test_no_order_is_no_agreement_of_brizos(market: Market, agreement: str) -> None:
    """Whether or not it looks like one."""
    market.rewire(default_environment="dear")
    answer = market.client.post(BRIZO, json=brizo(market, agreement, algorithmMeta=RAW["meta"]))
    assert (400, "order_invalid") == (answer.status_code, answer.json()["code"])
    assert agreement not in answer.json()["error"]


def test_an_agreement_is_looked_for_on_every_chain(market: Market) -> None:
    """One whose node is away does not hide what is ordered on another; only if none has it, nobody can say."""
    item = market.dataset()
    tx_id = market.ordered(item)
    served = market.client.app.state.service.broker.chains[CHAIN_ID]
    away = config(market.chain, id=1, rpc=f"http://127.0.0.1:{dead_port()}", seconds=0.5, attempts=1)
    orders = Chain(away, KEY.address, market.clock)
    market.rewire(chains={1: orders, CHAIN_ID: served}, default_environment="dear")
    try:
        found = market.client.post(BRIZO, json=brizo(market, tx_id, algorithmMeta=RAW["meta"]))
        unknown = market.client.post(BRIZO, json=brizo(market, NOWHERE, algorithmMeta=RAW["meta"]))
    finally:
        market.client._portal.call(orders.close)
    assert (200, 503) == (found.status_code, unknown.status_code)


# Downloads.


def download(market: Market, item: Item, tx_id: str, key: LocalAccount | None = None) -> Any:
    key = key or market.chain.consumer
    nonce = next_nonce()
    query = {
        "consumerAddress": key.address,
        **item.named(tx_id),
        "fileIndex": 0,
        "nonce": nonce,
        "signature": sign(key, f"{item.did}{nonce}"),
    }
    return market.client.get(f"{SERVICES}/download", params=query)


def test_a_file_is_downloaded_by_who_has_ordered_it(market: Market, file_server: FileServer) -> None:
    """After initialize and an order without a price; by nobody else, and not without."""
    item = market.dataset("access", url=file_server.add(b"1,2,3"))
    query = {**item.named(), "consumerAddress": market.chain.consumer.address}
    about = market.client.get(f"{SERVICES}/initialize", params=query).json()
    assert (item.published.datatoken, KEY.address) == (about["datatoken"], about["computeAddress"])
    assert ("0", 0) == (about["providerFee"]["providerFeeAmount"], about["providerFee"]["validUntil"])
    assert {"dataset.transferTxId": "missing"} == download(market, item, "").json()["error"]
    tx_id = market.order(item, about["providerFee"])
    stranger = download(market, item, tx_id, market.chain.stranger)
    assert (400, {"dataset.serviceId": "order_invalid"}) == (stranger.status_code, stranger.json()["error"])
    assert (200, b"1,2,3") == ((answer := download(market, item, tx_id)).status_code, answer.content)
    assert (200, b"1,2,3") == ((answer := download(market, item, tx_id)).status_code, answer.content)
    error, _ = market.refused(market.dataset().named(tx_id))
    assert {"dataset.serviceId": "order_invalid"} == error, "what opens a download starts no job"


# Environments.


def test_environments_with_a_chain(market: Market) -> None:
    """Those with a price are on offer; which chain, which token and whose address is told."""

    market.client.jobs.now = lambda: datetime.now(UTC).replace(microsecond=0, second=0)

    def offered(**query: Any) -> Any:
        return market.client.get(f"{SERVICES}/computeEnvironments", params=query).json()

    assert ["dear", "free", "other"] == [each["id"] for each in offered()]
    dear = offered()[0]
    assert (2.5, KEY.address, market.token) == (dear["priceMin"], dear["consumerAddress"], dear["feeToken"])
    assert offered() == offered(chainId=CHAIN_ID)
    assert [] == offered(chainId=1)
    assert {str(CHAIN_ID): offered()} == offered(byChain=1) == offered(byChain=1, chainId=CHAIN_ID)
    assert {} == offered(byChain=1, chainId=1)
    about = market.client.get("/").json()
    assert ([CHAIN_ID], {str(CHAIN_ID): KEY.address}) == (about["chainIds"], about["providerAddresses"])


def test_several_chains(market: Market, tmp_path: Path) -> None:
    """An asset is ordered on its own, in the token of fees there; a job may use assets of both."""
    with LocalChain(tmp_path / "second", chain_id=8997) as second:
        token = second.new_token(18)
        second.give(token, second.consumer.address, 10**24)
        orders = Chain(config(second, fee_token=token), KEY.address, market.clock)
        served = market.client.app.state.service.broker.chains[CHAIN_ID]
        market.rewire(chains={CHAIN_ID: served, 8997: orders})
        ours, theirs = market.dataset(), market.dataset(published=second.publish(), chain_id=8997)

        def order(item: Item, fee: Fee) -> str:
            second.mint(item.published.datatoken, second.consumer.address)
            return second.order(item.published.datatoken, fee)

        costs = market.costs_of(ours.named(), theirs.named())["datasets"]
        fees = [cost["providerFee"] for cost in costs]
        assert [market.token, token] == [fee["providerFeeToken"] for fee in fees]
        assert (True, "0") == (int(fees[0]["providerFeeAmount"]) > 0, fees[1]["providerFeeAmount"])
        one, two = market.order(ours, fees[0]), order(theirs, fees[1])
        job = market.started(ours.named(one), additionalDatasets=[theirs.named(two)])
        assert (one, (ours.did, theirs.did)) == (job.agreement_id, job.input_dids)
        assert "no such transaction" in market.refused(ours.named(two))[1]
        alone = market.costs_of(theirs.named())["datasets"][0]["providerFee"]
        paid = order(theirs, alone)
        job = market.started(theirs.named(paid))
        assert int(alone["providerFeeAmount"]) == math.ceil(Fraction(market.seconds(job)) * 5 / 120 * 10**18)
        by_chain = market.client.get(f"{SERVICES}/computeEnvironments", params={"byChain": 1}).json()
        assert {str(CHAIN_ID): market.token, "8997": token} == {
            chain: offered[0]["feeToken"] for chain, offered in by_chain.items()
        }
        market.client._portal.call(orders.close)


# Whose algorithm it is.


def trusting(market: Market, publisher: str) -> Item:
    return market.dataset(compute={"publisherTrustedAlgorithmPublishers": [publisher]})


def trust(market: Market, dataset: Item, algorithm: Item) -> Any:
    """What initializeCompute says of the two: None, or the error."""
    answer = market.costs(dataset.named(), algorithm=algorithm.named())
    return None if answer.status_code == 200 else answer.json()["error"]


def test_the_publisher_is_who_owns_the_nft(market: Market) -> None:
    """As the chain says; a document says what its author likes, and an algorithm can change hands."""
    chain = market.chain
    honest = market.algorithm(nft={"owner": chain.stranger.address})
    liar = market.algorithm(nft={"owner": NEXT_OWNER.address})
    not_trusted = {"datasets[0]": "not_trusted_algo_publisher"}
    dataset = trusting(market, chain.publisher.address.upper().replace("0X", "0x"))
    assert trust(market, dataset, honest) is None
    for_next = trusting(market, NEXT_OWNER.address)
    assert not_trusted == trust(market, for_next, liar)
    call = chain.nft(honest.published.nft).functions.transferFrom(chain.publisher.address, NEXT_OWNER.address, 1)
    chain.send(call, chain.publisher)
    assert not_trusted == trust(market, dataset, honest)
    assert trust(market, for_next, honest) is None


def test_a_contract_that_says_whose_it_is(market: Market) -> None:
    """It is none of the factory's."""
    publisher = market.chain.publisher.address
    fake = Web3.to_checksum_address("0x" + "66" * 20)
    replace_code(market.chain, fake, Return(bytes(12) + bytes(HexBytes(publisher))))
    published = replace(market.chain.publish(), nft=fake)
    item = market.algorithm(published=published)
    assert {"datasets[0]": "not_trusted_algo_publisher"} == trust(market, trusting(market, publisher), item)
    assert trust(market, trusting(market, "*"), item) is None


def test_whose_it_is_where_nobody_can_ask(market: Market) -> None:
    """On no chain the document's word counts; of a chain that is not served none does; of one that is away none yet."""
    owner = market.chain.stranger.address
    home = {"id": "did:op:home", "name": "home", "type": "algorithm", "owner": owner, "container": CONTAINER}
    market.write({**home, "files": ["https://example.com/x"]})
    dataset = trusting(market, owner)
    plain = {"documentId": "did:op:home", "serviceId": "access"}
    assert 200 == market.costs(dataset.named(), algorithm=plain).status_code
    elsewhere = market.algorithm(key=OTHER_KEY, chain_id=1, nft={"owner": owner})
    assert {"datasets[0]": "not_trusted_algo_publisher"} == trust(market, dataset, elsewhere)
    here = market.algorithm()
    with asking(market, seconds=0.5, attempts=1, rpc=f"http://127.0.0.1:{dead_port()}"):
        assert 503 == market.costs(dataset.named(), algorithm=here.named()).status_code


# Files at another provider.


@contextmanager
def another_provider(market: Market, folder: Path, catalogue: Path) -> Iterator[str]:
    """A second service of ours, with a key of its own, over HTTP; its URL."""
    chains = {CHAIN_ID: Chain(config(market.chain, fee_token=market.token), OTHER_KEY.address)}
    broker = Broker(jobs=MemoryJobs(OFFERS), catalogue=LocalCatalogue(catalogue), chains=chains, key=OTHER_KEY)
    app = create_app(factories.settings(folder), broker)
    # No other process can take the port before the server does.
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        for _ in range(200):
            if server.started:
                break
            time.sleep(0.05)
        assert server.started
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()


def test_another_provider_is_asked_for_its_own_fee(market: Market, tmp_path: Path, folder: Path) -> None:
    """Signed by it, and good for an order on the chain; what is charged here stands with what is here."""
    with another_provider(market, tmp_path, folder) as url:
        main = market.dataset()
        theirs = market.dataset("access", key=OTHER_KEY, endpoint=f"{url}/")
        algorithm = market.algorithm(key=OTHER_KEY, endpoint=url)
        costs = market.costs_of(main.named(), theirs.named(), algorithm=algorithm.named())
        ours, their_fee = (entry["providerFee"] for entry in costs["datasets"])
        assert (KEY.address, True) == (ours["providerFeeAddress"], int(ours["providerFeeAmount"]) > 0)
        assert {"datatoken", "providerFee"} == set(costs["datasets"][1]) == set(costs["algorithm"])
        assert (OTHER_KEY.address, "0", 0) == (
            their_fee["providerFeeAddress"],
            their_fee["providerFeeAmount"],
            their_fee["validUntil"],
        )
        market.order(theirs, their_fee)
        market.order(algorithm, costs["algorithm"]["providerFee"])
        denied: dict[str, Any] = {
            "credentials": {"deny": [{"type": "address", "values": [market.chain.consumer.address]}]}
        }
        refused = market.costs(main.named(), market.dataset("access", key=OTHER_KEY, endpoint=url, **denied).named())
        assert (400, {"datasets[1]": "invalid"}) == (refused.status_code, refused.json()["error"])
        compute = market.dataset("access", key=FORGER, endpoint=url)
        refused = market.costs(main.named(), compute.named())
        assert (400, {"datasets[1]": "file_unavailable"}) == (refused.status_code, refused.json()["error"])


GOOD_FEE = {
    "providerFeeAddress": OTHER_KEY.address,
    "providerFeeToken": "0x" + "00" * 20,
    "providerFeeAmount": 0,
    "providerData": "0x7b7d",
    "v": 27,
    "r": "0x" + "11" * 32,
    "s": "0x" + "22" * 32,
    "validUntil": 0,
}


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ({"more": {"secret": "x"}}, 200),
        ({"providerFee": None}, 502),
        ({"providerFee": None, "validOrder": NOWHERE}, 200),
        ({"datatoken": "0x" + "77" * 20}, 502),
        ({"datatoken": None}, 502),
        *(
            ({"providerFee": {**GOOD_FEE, **change}}, 502)
            for change in (
                {"v": 1},
                {"v": True},
                {"r": "0x11"},
                {"s": 5},
                {"providerData": "0x" + "ab" * 5_000},
                {"providerFeeAmount": -1},
                {"providerFeeAmount": str(2**256)},
                {"providerFeeAmount": "1e9"},
                {"providerFeeToken": "http://evil"},
                {"validUntil": 2**256},
                {"validUntil": 1.5},
            )
        ),
        (b"[" * 20_000, 502),
        (b"<html>", 502),
        (b" " * 70_000 + b"{}", 502),
        (500, 502),
        (429, 502),
        (404, 400),
        (302, 502),
    ],
    ids=lambda value: str(value)[:60],
)
def test_another_provider_says_what_it_likes(market: Market, file_server: FileServer, answer: Any, status: int) -> None:
    """Only what has the known form is passed on; it is asked once, as the original asks."""
    main = market.dataset()
    theirs = market.dataset("access", key=OTHER_KEY, endpoint=f"{file_server.url}/p?key=s3cr3t")
    good = {"datatoken": theirs.published.datatoken, "providerFee": GOOD_FEE, "nonce": 1}
    body = json.dumps({**good, **answer}).encode() if isinstance(answer, dict) else answer
    served: dict[str, Any] = {"body": body} if isinstance(body, bytes) else {"status": body}
    if answer == 302:
        served["redirect_to"] = file_server.add(json.dumps(good).encode())
    url = file_server.add(name=f"p{SERVICES}/initialize", **served)
    said = market.costs(main.named(), theirs.named(NOWHERE))
    assert status == said.status_code, said.text
    assert 1 == file_server.requests[url] == len(file_server.received)
    for part in (f"documentId={theirs.did}", "serviceId=access", f"transferTxId={NOWHERE}"):
        assert part in unquote(file_server.received[0].target)
    assert f"consumerAddress={market.chain.consumer.address}" in file_server.received[0].target
    assert "127.0.0.1" not in said.text
    assert "s3cr3t" not in said.text + file_server.received[0].target
    if status == 200:
        theirs_cost = said.json()["datasets"][1]
        assert {"datatoken", "providerFee", "validOrder"} >= set(theirs_cost)
        if "providerFee" in theirs_cost:
            assert {**GOOD_FEE, "providerFeeAmount": "0"} == theirs_cost["providerFee"]


@pytest.mark.parametrize("where", ["hangs", "gone", "inside", "ftp://example.com", "nonsense", ""])
def test_another_provider_cannot_be_asked(market: Market, file_server: FileServer, where: str) -> None:
    """It does not answer, or is where this service sends nobody's requests."""
    endpoint = where
    if where == "hangs":
        endpoint = f"{file_server.url}/p"
        file_server.add(name=f"p{SERVICES}/initialize", hang=True)
        market.rewire(limits=LIMITS.model_copy(update={"seconds_silent": 0.5}))
    if where == "gone":
        endpoint = f"http://127.0.0.1:{dead_port()}"
    if where == "inside":
        endpoint = file_server.url
        market.rewire(limits=FetchLimits())
    theirs = market.dataset("access", key=OTHER_KEY, endpoint=endpoint)
    answer = market.costs(market.dataset().named(), theirs.named())
    assert 502 == answer.status_code, answer.text
    assert "127.0.0.1" not in answer.text
    assert answer.json()["error"].startswith("datasets[1]: another provider has its files, and it")
    assert where == "hangs" or not file_server.received
