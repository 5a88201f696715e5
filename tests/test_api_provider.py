"""The Provider's dialect over the real app: who may do what, every code of the contract's section 6, the wire."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from eth_account import Account
from eth_account.signers.local import LocalAccount

from blocks.catalogue import LocalCatalogue
from blocks.keys import ProviderKey
from blocks.limits import FetchLimits, Offer
from flows.status import Status
from tests import factories
from tests.factories import ADMIN, Client, consumer_signed, next_nonce, sign
from tests.file_server import FileServer

ALICE: LocalAccount = Account.from_key(b"\x0a" * 32)
BOB: LocalAccount = Account.from_key(b"\x0b" * 32)
CAROL: LocalAccount = Account.from_key(b"\x0c" * 32)
KEY = ProviderKey.from_secret("07" * 32)
SERVICES = "/api/services"

CHECKSUM = "sha256:" + "ab" * 32
CONTAINER = {"image": "python", "tag": "3.12", "entrypoint": "python3 $ALGO", "checksum": CHECKSUM}
META = {"rawcode": "print('hello')", "container": CONTAINER}


def did(name: str) -> str:
    return f"did:op:{name}"


def dataset(name: str, **more: Any) -> dict[str, Any]:
    """An asset as its owner writes it into the catalogue: raw code allowed, computing only."""
    asset: dict[str, Any] = {"id": did(name), "name": name, "type": "dataset"}
    if "services" not in more:
        compute = {"allowRawAlgorithm": True, **more.pop("compute", {})}
        asset |= {"files": more.pop("files", ["https://example.com/data.csv"]), "compute": compute}
    return asset | more


def algorithm(name: str, **more: Any) -> dict[str, Any]:
    container = {**CONTAINER, **more.pop("container", {})}
    asset: dict[str, Any] = {"id": did(name), "name": name, "type": "algorithm", "container": container}
    return asset | ({} if "services" in more else {"files": ["https://example.com/algorithm.py"]}) | more


def ddo(name: str, **service: Any) -> dict[str, Any]:
    """A complete document, which is taken as it is, with one service for computing."""
    return {
        "@context": ["https://w3id.org/did/v1"],
        "id": did(name),
        "version": "4.1.0",
        "name": name,
        "metadata": {"type": "dataset", "name": name},
        "services": [
            {"id": "s", "type": "compute", "files": [{"type": "url", "url": "https://example.com/x"}], **service}
        ],
    }


class House:
    """A provider with a catalogue of its own, and its consumers."""

    def __init__(self, client: Client, folder: Path) -> None:
        self.client = client
        self._folder = folder

    def offer(self, *assets: Mapping[str, Any]) -> None:
        for asset in assets:
            path = self._folder / f"{asset['name']}.yaml"
            path.write_text(yaml.safe_dump(dict(asset)), encoding="utf-8")

    def start(self, key: LocalAccount = ALICE, **call: Any) -> Any:
        """POST compute on ``data``, with raw code unless *call* says otherwise; the HTTP answer."""
        body: dict[str, Any] = {
            "dataset": {"documentId": did("data"), "serviceId": "compute"},
            "algorithm": {"meta": META},
            "environment": "small",
            **call,
        }
        named = body["dataset"].get("documentId", "") if isinstance(body["dataset"], dict) else ""
        signed = consumer_signed(key, call.get("jobId", ""), named)
        return self.client.post(f"{SERVICES}/compute", json={**signed, **body})

    def started(self, key: LocalAccount = ALICE, **call: Any) -> str:
        answer = self.start(key, **call)
        assert 200 == answer.status_code, answer.text
        return str(answer.json()[0]["jobId"])

    def refused(self, **call: Any) -> Any:
        """The ``error`` of a start that is refused for its meaning."""
        answer = self.start(**call)
        assert 400 == answer.status_code, answer.text
        assert answer.json()["message"]
        return answer.json()["error"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("catalogue")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[Client]:
    settings = factories.settings(tmp_path_factory.mktemp("settings"), admins=ADMIN.address)
    with factories.client(
        settings,
        catalogue=LocalCatalogue(folder, seconds_between_looks=0),
        key=KEY,
        limits=FetchLimits(networks=("127.0.0.0/8",)),
    ) as client:
        yield client


@pytest.fixture
def house(shared: Client, folder: Path) -> House:
    for path in folder.iterdir():
        path.unlink()
    house = House(shared.emptied(), folder)
    house.offer(dataset("data"))
    return house


def test_a_job_is_started_and_told_as_documented(house: House) -> None:
    """An array of one status object, with every field of spec 002 and those real clients read."""
    answer = house.start()
    assert 200 == answer.status_code, answer.text
    (job,) = answer.json()
    assert ALICE.address == job["owner"]
    assert did("data") == job["documentId"]
    assert (1, "Warming up") == (job["status"], job["statusText"])
    assert job["dateFinished"] is None
    assert float(job["dateCreated"]) > 0
    assert "" == job["results"]
    assert (None, [], "") == (job["algorithmLogUrl"], job["resultsUrls"], job["resultsDid"])
    assert {"agreementId", "stopreq", "removed", "algoDID", "inputDID"} <= set(job)


def test_the_document_is_what_the_consumer_asked_for(house: House) -> None:
    """One stage: the asset's files, no network, the consumer's code and parameters."""
    house.started(algorithm={"meta": META, "algocustomdata": {"n": 3}}, output={"whitelist": [BOB.address]})
    (job,) = house.client.jobs._jobs.values()
    assert "small" == job.environment
    assert (BOB.address.lower(),) == job.whitelist


def test_parameters_may_stand_in_the_query(house: House) -> None:
    """Objects as JSON; contract, section 1."""
    signed = consumer_signed(ALICE, did("data"))
    query = {
        **signed,
        "environment": "small",
        "dataset": json.dumps({"documentId": did("data"), "serviceId": "compute"}),
        "algorithm": json.dumps({"meta": META}),
    }
    assert 200 == house.client.post(f"{SERVICES}/compute", params=query).status_code


# Who may do what.


def test_the_signature_has_to_be_the_consumers(house: House) -> None:
    """Of another key, or over another text: a fault of the field, as the original answers it."""
    forged = consumer_signed(BOB, did("data")) | {"consumerAddress": ALICE.address}
    other = consumer_signed(ALICE, did("other"))
    for signed in (forged, other, forged | {"signature": "0x00"}):
        body = {"dataset": {"documentId": did("data"), "serviceId": "compute"}, "algorithm": {"meta": META}}
        answer = house.client.post(f"{SERVICES}/compute", json={**body, **signed})
        assert 400 == answer.status_code
        expected = {
            "success": False,
            "message": "Validation error",
            "errors": {"signature": ["Invalid signature provided."]},
        }
        assert expected == answer.json()
    assert [] == list(house.client.jobs._jobs)


def test_a_nonce_is_good_once(house: House) -> None:
    """The same call again is a replay; a smaller nonce, too."""
    signed = consumer_signed(ALICE, did("data"))
    body = {
        **signed,
        "environment": "small",
        "dataset": {"documentId": did("data"), "serviceId": "compute"},
        "algorithm": {"meta": META},
    }
    assert 200 == house.client.post(f"{SERVICES}/compute", json=body).status_code
    again = house.client.post(f"{SERVICES}/compute", json=body)
    assert (400, ["nonce"]) == (again.status_code, list(again.json()["errors"]))


def test_a_call_that_is_refused_leaves_the_nonce(house: House) -> None:
    """So that what could not be had just now can be asked for again, with the same signature."""
    signed = consumer_signed(ALICE, did("data"))
    body = {**signed, "algorithm": {"meta": META}, "environment": "small"}
    dataset_ = {"documentId": did("data"), "serviceId": "nonesuch"}
    assert 400 == house.client.post(f"{SERVICES}/compute", json={**body, "dataset": dataset_}).status_code
    dataset_["serviceId"] = "compute"
    assert 200 == house.client.post(f"{SERVICES}/compute", json={**body, "dataset": dataset_}).status_code


def test_jobs_are_selected_by_agreement_id_as_ocean_js_gives_it(house: House) -> None:
    """The order with or without 0x, or the data set; beside a jobId it does not count."""
    compute = f"{SERVICES}/compute"
    first, second = house.started(), house.started()

    def found(**query: str) -> list[str]:
        return [
            job["jobId"] for job in house.client.get(compute, params=query | {"consumerAddress": ALICE.address}).json()
        ]

    agreement = house.client.job(first).agreement_id
    assert agreement.startswith("0x")
    assert [first] == found(agreementId=agreement) == found(agreementId=agreement.removeprefix("0x"))
    assert [first, second] == found(agreementId=did("data"))
    assert [] == found(agreementId="0x" + "77" * 32)
    assert [second] == found(agreementId=agreement, jobId=second)
    stopped = house.client.put(compute, json=consumer_signed(ALICE) | {"agreementId": agreement.removeprefix("0x")})
    assert [(first, 7)] == [(job["jobId"], job["status"]) for job in stopped.json()]


def test_status_unsigned_has_no_url(house: House) -> None:
    """Names and sizes by the job's id, no checksum; the owner, signed, sees links; an admin what is for admins."""
    job_id = house.started()
    house.client.jobs.publish(
        job_id,
        [
            factories.result("out.txt", b"result"),
            factories.result("algorithm.log", b"log", kind="algorithmLog"),
            factories.result("configuration.log", b"secret", kind="configrationLog"),
        ],
    )
    house.client.jobs.move(job_id, Status.COMPLETED)
    by_owner = house.client.get(f"{SERVICES}/compute", params={"consumerAddress": ALICE.address}).json()
    assert ["" for _ in by_owner] == [job["results"] for job in by_owner]
    (job,) = house.client.get(f"{SERVICES}/compute", params={"jobId": job_id}).json()
    assert "http" not in json.dumps(job)
    assert ["out.txt", "algorithm.log"] == [result["filename"] for result in job["results"]]
    assert [None, None] == [result["sha256"] for result in job["results"]]
    signed = consumer_signed(ALICE, job_id)
    (job,) = house.client.get(f"{SERVICES}/compute", params={**signed, "jobId": job_id}).json()
    assert b"result" == house.client.get(job["resultsUrls"][0]).content
    assert b"log" == house.client.get(job["algorithmLogUrl"]).content
    assert "configuration.log" not in json.dumps(job)
    signed = consumer_signed(ADMIN, job_id)
    (seen,) = house.client.get(f"{SERVICES}/compute", params={**signed, "jobId": job_id}).json()
    assert ["configrationLog"] == [result["type"] for result in seen["results"]]
    assert b"secret" == house.client.get(seen["results"][0]["url"]).content
    output = {**consumer_signed(ADMIN, job_id, 0), "jobId": job_id, "index": 0}
    assert 404 == house.client.get(f"{SERVICES}/computeResult", params=output).status_code


def test_results_are_for_the_owner_and_the_whitelist(house: House) -> None:
    """The whitelist gets outputs, not logs; all others learn not even that there is such a job."""
    job_id = house.started(output={"whitelist": [BOB.address]})
    house.client.jobs.publish(
        job_id, [factories.result("out.txt", b"0123456789"), factories.result("a.log", b"log", kind="algorithmLog")]
    )
    house.client.jobs.move(job_id, Status.COMPLETED)

    def fetch(key: LocalAccount, index: int, **headers: str) -> Any:
        query = {**consumer_signed(key, job_id, index), "jobId": job_id, "index": index}
        return house.client.get(f"{SERVICES}/computeResult", params=query, headers=headers)

    assert (200, b"0123456789") == ((answer := fetch(ALICE, 0)).status_code, answer.content)
    assert "out.txt" in answer.headers["content-disposition"]
    assert answer.headers["content-type"].startswith("text/plain")
    assert (206, b"234") == ((answer := fetch(ALICE, 0, Range="bytes=2-4")).status_code, answer.content)
    assert (200, b"log") == ((answer := fetch(ALICE, 1)).status_code, answer.content)
    assert (200, 404) == (fetch(BOB, 0).status_code, fetch(BOB, 1).status_code)
    assert 404 == fetch(CAROL, 0).status_code
    assert (404, 404) == (fetch(ALICE, 2).status_code, fetch(ALICE, -1).status_code)
    for key, shown in ((BOB, 1), (CAROL, None)):
        signed = {**consumer_signed(key, job_id), "jobId": job_id}
        jobs = house.client.get(f"{SERVICES}/compute", params=signed).json()
        assert ([shown] if shown else []) == [len(job["resultsUrls"]) for job in jobs]


def test_stop_and_delete_are_the_owners(house: House) -> None:
    """Others find nothing to stop; a deleted job is unknown."""
    job_id = house.started()
    for call in (house.client.put, house.client.delete):
        answer = call(f"{SERVICES}/compute", params={**consumer_signed(BOB, job_id), "jobId": job_id})
        assert (200, []) == (answer.status_code, answer.json())
    answer = house.client.put(
        f"{SERVICES}/compute",
        json={**consumer_signed(ALICE, job_id, did("data")), "jobId": job_id, "documentId": did("data")},
    )
    assert [(7, "Job stopped")] == [(job["status"], job["statusText"]) for job in answer.json()]
    answer = house.client.delete(f"{SERVICES}/compute", params={**consumer_signed(ALICE, job_id), "jobId": job_id})
    assert [(8, "Job deleted successfully", 1)] == [
        (job["status"], job["statusText"], job["removed"]) for job in answer.json()
    ]
    assert [] == house.client.get(f"{SERVICES}/compute", params={"jobId": job_id}).json()


def test_delete_without_a_job_named_is_refused(house: House) -> None:
    """An owner's address alone would mean all of them."""
    house.started()
    answer = house.client.delete(f"{SERVICES}/compute", params=consumer_signed(ALICE))
    assert (400, ["jobId"]) == (answer.status_code, list(answer.json()["errors"]))
    assert 1 == len(house.client.jobs._jobs)


def test_a_stop_whose_nonce_is_sent_but_not_signed(house: House) -> None:
    """As a widespread client signs it: for one job, and once."""
    job_id = house.started()
    nonce = str(next_nonce())
    body = {"consumerAddress": ALICE.address, "jobId": job_id, "nonce": nonce, "agreementId": ""}
    body["signature"] = sign(ALICE, f"{ALICE.address}{job_id}")
    answer = house.client.put(f"{SERVICES}/compute", json=body)
    assert [7] == [job["status"] for job in answer.json()]
    assert 400 == house.client.put(f"{SERVICES}/compute", json=body).status_code
    body["nonce"] = str(next_nonce())
    assert 400 == house.client.put(f"{SERVICES}/compute", json=body).status_code
    assert 400 == house.client.delete(f"{SERVICES}/compute", json=body).status_code
    every = {"consumerAddress": ALICE.address, "nonce": str(next_nonce()), "signature": sign(ALICE, ALICE.address)}
    assert 400 == house.client.put(f"{SERVICES}/compute", json=every).status_code
    empty = {**consumer_signed(ALICE), "jobId": ""}
    answer = house.client.put(f"{SERVICES}/compute", json=empty)
    assert (400, ["jobId"]) == (answer.status_code, list(answer.json()["errors"]))


def test_digits_cannot_be_moved_from_an_index_to_the_nonce(house: House) -> None:
    """The parts of what is signed stand side by side: one text is good for one call, however it is taken apart."""
    fred: LocalAccount = Account.from_key(b"\x0f" * 32)
    job_id = house.started(fred)
    house.client.jobs.publish(job_id, [factories.result(f"{n}.txt", b"x") for n in range(13)])
    house.client.jobs.move(job_id, Status.COMPLETED)
    call = {**consumer_signed(fred, job_id, 12), "jobId": job_id, "index": 12}
    assert 200 == house.client.get(f"{SERVICES}/computeResult", params=call).status_code
    moved = {**call, "index": 1, "nonce": f"2{call['nonce']}"}
    assert 400 == house.client.get(f"{SERVICES}/computeResult", params=moved).status_code
    again = {**consumer_signed(fred, job_id, 1), "jobId": job_id, "index": 1}
    assert 200 == house.client.get(f"{SERVICES}/computeResult", params=again).status_code


def test_a_result_that_is_not_there_leaves_the_nonce(house: House) -> None:
    """So that it can be asked for again once it is."""
    job_id = house.started()
    call = {**consumer_signed(ALICE, job_id, 0), "jobId": job_id, "index": 0}
    assert 404 == house.client.get(f"{SERVICES}/computeResult", params=call).status_code
    house.client.jobs.publish(job_id, [factories.result("out.txt", b"result")])
    assert 200 == house.client.get(f"{SERVICES}/computeResult", params=call).status_code


def test_only_declared_parameters_reach_a_source(house: House, file_server: FileServer) -> None:
    """Else a trusted algorithm could become another, and a stranger could ask with the owner's credentials."""
    url = file_server.add(b"data")
    house.offer(
        dataset("plain", files=[url]),
        dataset("asks", files=[url], consumerParameters=[{"name": "year", "type": "text", "required": True}]),
        dataset("closed", files=[url], allow=[BOB.address], consumerParameters=[{"name": "year", "type": "text"}]),
        algorithm("algo", files=[url]),
    )
    published = {"documentId": did("algo"), "serviceId": "access"}
    evil = {**published, "userdata": {"ref": "evil"}}
    assert {"algorithm": "invalid"} == house.refused(algorithm=evil)
    for name, userdata, status in (
        ("plain", {}, 200),
        ("plain", {"name": "Smith"}, 400),
        ("asks", {}, 400),
        ("asks", {"year": "2001"}, 200),
        ("asks", {"year": "2001", "name": "Smith"}, 400),
    ):
        named = {"documentId": did(name), "serviceId": "compute", "userdata": userdata}
        assert status == house.start(dataset=named).status_code, (name, userdata)
    for name, userdata, status in (
        ("plain", {"name": "Smith"}, 400),
        ("asks", {"year": "2001"}, 200),
        ("closed", {"year": "2001"}, 200),
        ("closed", {}, 200),
    ):
        asked = {"did": did(name), "serviceId": "compute", "userdata": userdata}
        answer = house.client.post(f"{SERVICES}/fileinfo", json=asked)
        assert status == answer.status_code, (name, userdata, answer.text)
    asked_for = [r.target for r in file_server.received if "year" in r.target]
    assert 1 == len(asked_for), "only that of the asset that is for everybody"


def test_too_many_data_sets_are_refused_before_they_cost_anything(house: House) -> None:
    """In both calls that name them."""
    one = {"documentId": did("data"), "serviceId": "compute"}
    assert {"additional_input": "invalid"} == house.refused(additionalDatasets=[one] * 100)
    ask = {"datasets": [one] * 101, "algorithm": {"meta": META}, "consumerAddress": ALICE.address}
    ask["compute"] = {"env": "small", "validUntil": int(time.time()) + 600}
    answer = house.client.post(f"{SERVICES}/initializeCompute", json=ask)
    assert (400, ["datasets"]) == (answer.status_code, list(answer.json()["errors"]))


def test_a_delete_whose_nonce_is_signed_but_not_sent(house: House) -> None:
    """As the same client signs that: the next one after the last."""
    erin: LocalAccount = Account.from_key(b"\x0e" * 32)
    job_id = house.started(erin)
    last = house.client.get(f"{SERVICES}/nonce", params={"userAddress": erin.address}).json()["nonce"]
    body = {"consumerAddress": erin.address, "jobId": job_id, "documentId": did("data")}
    body["signature"] = sign(erin, f"{erin.address}{job_id}{did('data')}{last + 1}")
    assert [8] == [job["status"] for job in house.client.delete(f"{SERVICES}/compute", json=body).json()]
    assert 400 == house.client.delete(f"{SERVICES}/compute", json=body).status_code


def test_a_job_that_ended_badly_is_started_again_under_its_id(house: House) -> None:
    """By its owner only, and not while it runs or once it is done."""
    job_id = house.started()
    running = house.start(jobId=job_id)
    assert 409 == running.status_code
    house.client.jobs.move(job_id, Status.RUN_FAILED, detail="exit code 1")
    assert 404 == house.start(BOB, jobId=job_id).status_code
    (job,) = house.start(jobId=job_id).json()
    assert (job_id, 1, None) == (job["jobId"], job["status"], job["dateFinished"])
    house.client.jobs.move(job_id, Status.COMPLETED)
    assert 409 == house.start(jobId=job_id).status_code
    assert 404 == house.start(jobId="0" * 32).status_code


# Tokens and nonces.


def test_a_token_stands_for_signatures_until_it_is_deleted(house: House) -> None:
    """It is the address's own; deleted, it is good for nothing."""
    nonce = next_nonce()
    query = {
        "address": ALICE.address,
        "expiration": int(time.time()) + 600,
        "nonce": nonce,
        "signature": sign(ALICE, f"{ALICE.address}{nonce}"),
    }
    token = house.client.get(f"{SERVICES}/createAuthToken", params=query).json()["token"]
    job_id = house.started()
    house.client.jobs.publish(job_id, [factories.result("out.txt", b"result")])
    house.client.jobs.move(job_id, Status.COMPLETED)
    mine = {"consumerAddress": ALICE.address, "jobId": job_id, "index": 0}
    assert b"result" == house.client.get(f"{SERVICES}/computeResult", params=mine, headers={"AuthToken": token}).content
    theirs = {**mine, "consumerAddress": BOB.address}
    assert 401 == house.client.get(f"{SERVICES}/computeResult", params=theirs, headers={"AuthToken": token}).status_code
    assert 400 == house.client.get(f"{SERVICES}/computeResult", params=mine).status_code
    gone = {"address": ALICE.address, "token": token}
    assert 200 == house.client.delete(f"{SERVICES}/deleteAuthToken", json=gone).status_code
    for spelt in (token, f"{token}=", f"{token}=="):
        answer = house.client.get(f"{SERVICES}/computeResult", params=mine, headers={"AuthToken": spelt})
        assert 401 == answer.status_code


@pytest.mark.parametrize("days", [None, -1, 400])
def test_a_token_lives_neither_in_the_past_nor_for_ever(house: House, days: int | None) -> None:
    """The field is named."""
    expiration = 0 if days is None else int(time.time()) + days * 86_400
    nonce = next_nonce()
    query = {"address": ALICE.address, "expiration": expiration, "nonce": nonce}
    query["signature"] = sign(ALICE, f"{ALICE.address}{nonce}")
    answer = house.client.get(f"{SERVICES}/createAuthToken", params=query)
    assert (400, ["expiration"]) == (answer.status_code, list(answer.json()["errors"]))


def test_the_nonce_told_can_be_counted_on(house: House) -> None:
    """0 for who never signed; a number that JavaScript keeps exactly, or a string."""

    def told(key: LocalAccount) -> Any:
        return house.client.get(f"{SERVICES}/nonce", params={"userAddress": key.address}).json()["nonce"]

    dave: LocalAccount = Account.from_key(b"\x0d" * 32)
    assert 0 == told(dave)
    for nonce, expected in ((7, 7), (2**53, 2**53), (2**53 + 1, str(2**53 + 1)), (10**80, str(10**80))):
        house.client.put(f"{SERVICES}/compute", json={**consumer_signed(dave, nonce=nonce)})
        assert expected == told(dave)


# Meaning: every code of the contract's section 6.


def test_codes_of_data_sets(house: House) -> None:
    """In the words of the original, by the part of the request."""
    house.offer(
        ddo("odd", type="wonder"),
        dataset("download", services=[{"id": "s", "type": "access", "files": ["https://example.com/x"]}]),
        dataset("closed", deny=[ALICE.address]),
        dataset("foreign", services=[{"id": "s", "type": "compute", "files": "0x" + "ab" * 200}]),
    )

    def of(document: str, service: str = "compute") -> Any:
        return house.refused(dataset={"documentId": document, "serviceId": service})

    assert {"dataset.documentId": "missing"} == house.refused(dataset={"serviceId": "compute"})
    assert {"dataset.serviceId": "missing"} == house.refused(dataset={"documentId": did("data")})
    assert {"dataset.documentId": "did_not_found"} == of(did("nonesuch"))
    assert {"dataset.serviceId": "not_found"} == of(did("data"), "nonesuch")
    assert {"dataset.serviceId": "service_not_access_compute"} == of(did("odd"), "s")
    assert {"dataset.serviceId": "main_service_compute"} == of(did("download"), "s")
    assert {"dataset.serviceId": "compute_services_not_in_same_provider"} == of(did("foreign"), "s")
    assert {"dataset": "invalid"} == of(did("closed"))
    good = {"documentId": did("data"), "serviceId": "compute"}
    assert {"datasets[1].documentId": "did_not_found"} == house.refused(
        dataset=good, additionalDatasets=[{"documentId": did("nonesuch"), "serviceId": "compute"}]
    )
    assert {"additional_input": "invalid"} == house.refused(additionalDatasets="nonsense")
    assert {"output": "invalid"} == house.refused(output="nonsense")


def test_codes_of_algorithms(house: House) -> None:
    """Raw and published."""
    house.offer(
        algorithm("algo"),
        algorithm("loose", container={"checksum": ""}),
        algorithm("closed", deny=[ALICE.address]),
        algorithm("nothere", services=[{"id": "s", "type": "compute", "files": "0x" + "ab" * 200}]),
    )

    def of(**ask: Any) -> Any:
        return house.refused(algorithm=ask)

    assert {"algorithm": "missing_meta_documentId"} == of()
    assert {"algorithm": "meta_oneof_url_rawcode_remote"} == of(meta={"container": CONTAINER})
    container = {"algorithm.container": "missing_entrypoint_image_checksum"}
    assert container == of(meta={"rawcode": "x"})
    assert container == of(meta={"rawcode": "x", "container": {**CONTAINER, "checksum": ""}})
    assert {"algorithm.container": "checksum_prefix"} == of(
        meta={"rawcode": "x", "container": {**CONTAINER, "checksum": "ab"}}
    )
    assert {"algorithm.serviceId": "missing"} == of(documentId=did("algo"))
    assert {"algorithm.documentId": "did_not_found"} == of(documentId=did("nonesuch"), serviceId="access")
    assert {"algorithm.serviceId": "not_found"} == of(documentId=did("algo"), serviceId="nonesuch")
    assert {"algorithm": "not_algo"} == of(documentId=did("data"), serviceId="compute")
    assert {"algorithm.credentials": "invalid"} == of(documentId=did("closed"), serviceId="access")
    assert container == of(documentId=did("loose"), serviceId="access")
    same = {"algorithm.serviceId": "compute_services_not_in_same_provider"}
    assert same == of(documentId=did("nothere"), serviceId="s")


def test_trust_rules_of_a_data_set(house: House, file_server: FileServer) -> None:
    """Each refusal has its code; what an owner trusts runs."""
    url = file_server.add(b"print('trusted')")
    published = {"documentId": did("algo"), "serviceId": "access"}
    raw = {"meta": META}
    house.offer(algorithm("algo", files=[url], owner=BOB.address))

    def rules(**compute: Any) -> Any:
        house.offer(dataset("data", compute=compute))
        answer = house.start(algorithm=published)
        return 200 if answer.status_code == 200 else answer.json()["error"]

    assert 200 == rules()
    house.offer(dataset("data", compute={"allowRawAlgorithm": False}))
    assert {"dataset": "no_raw_algo_allowed"} == house.refused(algorithm=raw)
    assert {"dataset": "not_trusted_algo"} == rules(publisherTrustedAlgorithms=[{"did": did("other")}])
    house.offer(ddo("nameless", compute={"publisherTrustedAlgorithms": [{"filesChecksum": "x"}]}))
    nameless = house.refused(dataset={"documentId": did("nameless"), "serviceId": "s"}, algorithm=published)
    assert {"dataset": "no_publisherTrustedAlgorithms"} == nameless
    assert {"dataset": "not_trusted_algo_publisher"} == rules(publisherTrustedAlgorithmPublishers=[CAROL.address])
    assert 200 == rules(publisherTrustedAlgorithmPublishers=[BOB.address])
    wrong = {"did": did("algo"), "filesChecksum": "00" * 32}
    assert {"dataset": "algorithm_file_checksum_mismatch"} == rules(publisherTrustedAlgorithms=[wrong])
    wrong = {"did": did("algo"), "containerSectionChecksum": "00" * 32}
    assert {"dataset": "algorithm_container_checksum_mismatch"} == rules(publisherTrustedAlgorithms=[wrong])
    right = {
        "did": did("algo"),
        "filesChecksum": hashlib.sha256(b"print('trusted')").hexdigest(),
        "containerSectionChecksum": hashlib.sha256(f"python3 $ALGO{CHECKSUM}".encode()).hexdigest(),
    }
    assert 200 == rules(publisherTrustedAlgorithms=[right])
    house.offer(algorithm("algo", files=[url + "/gone"]))
    assert {"algorithm": "file_unavailable"} == rules(publisherTrustedAlgorithms=[right])


def test_missing_fields_are_named(house: House) -> None:
    """As the original names them: a list of texts for each field."""
    answer = house.client.post(f"{SERVICES}/compute", json={"nonce": 1})
    assert 400 == answer.status_code
    errors = answer.json()["errors"]
    assert {"consumerAddress", "dataset", "algorithm"} == set(errors)
    assert ["The dataset field is required."] == errors["dataset"]


# Environments, fees, files.


def test_environments_as_an_array_and_by_chain(house: House) -> None:
    """Both spellings of every field; free ones only, since nobody can pay without a chain."""
    house.client.jobs.offers = {"small": Offer(id="small"), "dear": Offer(id="dear", price_min=1.5)}
    (one,) = house.client.get(f"{SERVICES}/computeEnvironments").json()
    assert ("small", 0) == (one["id"], one["priceMin"])
    assert KEY.address == one["consumerAddress"]
    assert one["nCPU"] == one["cpuNumber"]
    assert {} == house.client.get(f"{SERVICES}/computeEnvironments", params={"byChain": 1}).json()
    by_chain = house.client.get(f"{SERVICES}/computeEnvironments", params={"byChain": 1, "chainId": 8996}).json()
    assert ["small"] == [each["id"] for each in by_chain["8996"]]
    answer = house.start(environment="dear")
    assert (400, "Environment invalid or does not exist") == (answer.status_code, answer.json()["error"])


def test_nothing_is_owed_without_a_chain(house: House) -> None:
    """One entry for each asset, empty; what could not be started is refused the same way."""
    ask = {
        "datasets": [{"documentId": did("data"), "serviceId": "compute"}],
        "algorithm": {"meta": META},
        "compute": {"env": "small", "validUntil": int(time.time()) + 600},
        "consumerAddress": ALICE.address,
    }
    assert {"datasets": [{}]} == house.client.post(f"{SERVICES}/initializeCompute", json=ask).json()
    late = {**ask, "compute": {"env": "small", "validUntil": 1}}
    answer = house.client.post(f"{SERVICES}/initializeCompute", json=late)
    assert (400, ["compute.validUntil"]) == (answer.status_code, list(answer.json()["errors"]))
    unknown = {**ask, "datasets": [{"documentId": did("nonesuch"), "serviceId": "compute"}]}
    answer = house.client.post(f"{SERVICES}/initializeCompute", json=unknown)
    assert {"datasets[0].documentId": "did_not_found"} == answer.json()["error"]


def test_files_are_described_without_telling_where_they_are(house: House, file_server: FileServer) -> None:
    """Of an asset or of a file object; with a checksum on demand."""
    url = file_server.add(b"a,b\n1,2\n")
    house.offer(dataset("data", files=[url, url + "/gone"]))
    answer = house.client.post(f"{SERVICES}/fileinfo", json={"did": did("data"), "serviceId": "compute"})
    assert [True, False] == [file["valid"] for file in answer.json()]
    assert "127.0.0.1" not in answer.text
    answer = house.client.post(
        f"{SERVICES}/fileinfo", json={"type": "url", "url": url, "method": "GET", "checksum": True}
    )
    (file,) = answer.json()
    assert ("8", hashlib.sha256(b"a,b\n1,2\n").hexdigest()) == (file["contentLength"], file["checksum"])
    for bad in ({}, {"did": did("data")}, {"did": did("nonesuch"), "serviceId": "x"}, {"type": "wonder"}):
        assert 400 == house.client.post(f"{SERVICES}/fileinfo", json=bad).status_code


def test_a_file_is_downloaded_where_its_owner_offers_that(house: House, file_server: FileServer) -> None:
    """Of an access service; never of one for computing."""
    url = file_server.add(b"for everybody")
    house.offer(dataset("open", services=[{"id": "s", "type": "access", "files": [url]}]), dataset("data", files=[url]))

    def fetch(name: str, service: str, index: int = 0) -> Any:
        nonce = next_nonce()
        query = {
            "consumerAddress": ALICE.address,
            "documentId": did(name),
            "serviceId": service,
            "fileIndex": index,
            "nonce": nonce,
            "signature": sign(ALICE, f"{did(name)}{nonce}"),
        }
        return house.client.get(f"{SERVICES}/download", params=query)

    assert (200, b"for everybody") == ((answer := fetch("open", "s")).status_code, answer.content)
    assert "attachment;filename=file0" == answer.headers["content-disposition"]
    assert 404 == fetch("open", "s", 1).status_code
    assert {"dataset.serviceId": "invalid"} == fetch("data", "compute").json()["error"]


def test_what_is_encrypted_only_this_provider_reads(house: House) -> None:
    """Answered with 201 and the text in hex."""
    answer = house.client.post(f"{SERVICES}/encrypt?chainId=8996", content=b'{"files": []}')
    assert 201 == answer.status_code
    assert b'{"files": []}' == KEY.decrypt(bytes.fromhex(answer.text.removeprefix("0x")))
    assert 400 == house.client.post(f"{SERVICES}/encrypt", content=b"").status_code


def test_containers_are_validated(house: House) -> None:
    """The code says what is wrong."""
    assert 200 == house.client.post(f"{SERVICES}/validateContainer", json=CONTAINER).status_code
    answer = house.client.post(f"{SERVICES}/validateContainer", json={**CONTAINER, "checksum": "md5:1"})
    assert (400, {"algorithm.container": "checksum_prefix"}) == (answer.status_code, answer.json()["error"])


def test_the_map_of_endpoints_has_the_names_clients_look_for(house: House) -> None:
    """GET / ; method first."""
    about = house.client.get("/").json()
    expected = {
        "computeDelete": ["DELETE", "/api/services/compute"],
        "computeEnvironments": ["GET", "/api/services/computeEnvironments"],
        "computeResult": ["GET", "/api/services/computeResult"],
        "computeStart": ["POST", "/api/services/compute"],
        "computeStatus": ["GET", "/api/services/compute"],
        "computeStop": ["PUT", "/api/services/compute"],
        "create_auth_token": ["GET", "/api/services/createAuthToken"],
        "delete_auth_token": ["DELETE", "/api/services/deleteAuthToken"],
        "download": ["GET", "/api/services/download"],
        "encrypt": ["POST", "/api/services/encrypt"],
        "fileinfo": ["POST", "/api/services/fileinfo"],
        "initialize": ["GET", "/api/services/initialize"],
        "initializeCompute": ["POST", "/api/services/initializeCompute"],
        "nonce": ["GET", "/api/services/nonce"],
        "validateContainer": ["POST", "/api/services/validateContainer"],
    }
    assert expected.items() <= about["serviceEndpoints"].items()
    assert {} == about["providerAddresses"]


def test_a_time_beyond_any_clock_is_refused(house: House) -> None:
    """As a fault of the field: as a float it would be none."""
    nonce = next_nonce()
    signature = sign(ALICE, f"{ALICE.address}{nonce}")
    query = {"address": ALICE.address, "nonce": nonce, "signature": signature, "expiration": "9" * 400}
    for call in ({"params": query}, {"json": {**query, "expiration": 10**400}}):
        answer = house.client.get(f"{SERVICES}/createAuthToken", **call)
        assert (400, ["expiration"]) == (answer.status_code, list(answer.json()["errors"]))
