"""Brizo's dialect over the real app: spec 003, its signatures, its tokens, its table."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from eth_account import Account
from eth_account.signers.local import LocalAccount

from blocks.catalogue import LocalCatalogue
from flows.status import Status
from tests import factories
from tests.factories import Client, brizo_sign

ALICE: LocalAccount = Account.from_key(b"\x0a" * 32)
BOB: LocalAccount = Account.from_key(b"\x0b" * 32)
COMPUTE = "/api/v1/brizo/services/compute"
AGREEMENT = "0x" + "11" * 32
BOBS = "0x" + "22" * 32
META = {"rawcode": "print('hello')", "container": {"image": "python", "tag": "3.12", "entrypoint": "python3 $ALGO"}}
CATALOGUE = {
    "assets": [
        {
            "id": "did:op:data",
            "name": "data",
            "type": "dataset",
            "files": ["https://example.com/data.csv"],
            "compute": {"allowRawAlgorithm": True},
        },
        {
            "id": "did:op:algo",
            "name": "algo",
            "type": "algorithm",
            "files": ["https://example.com/algorithm.py"],
            "container": META["container"],
        },
    ],
    "agreements": {
        AGREEMENT: {"did": "did:op:data"},
        BOBS: {"did": "did:op:data", "consumer": BOB.address, "algorithm": "did:op:algo"},
    },
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("brizo")
    catalogue = folder / "catalogue.yaml"
    catalogue.write_text(yaml.safe_dump(CATALOGUE), encoding="utf-8")
    offers = factories.offers()
    offers.pop("withgpu")
    with factories.client(factories.settings(folder), catalogue=LocalCatalogue(catalogue)) as client:
        yield client


@pytest.fixture
def client(shared: Client) -> Client:
    shared.emptied()
    shared.jobs.offers = {"small": factories.offers()["small"]}
    return shared


def signed(key: LocalAccount, agreement: str = "", job_id: str = "", **more: Any) -> dict[str, Any]:
    """A call over consumerAddress + [jobId] + serviceAgreementId."""
    call: dict[str, Any] = {"consumerAddress": key.address, **more}
    if agreement:
        call["serviceAgreementId"] = agreement
    if job_id:
        call["jobId"] = job_id
    return {**call, "signature": brizo_sign(key, f"{key.address}{job_id}{agreement}")}


def started(client: Client) -> dict[str, Any]:
    answer = client.post(COMPUTE, json=signed(ALICE, AGREEMENT, algorithmMeta=META))
    assert 200 == answer.status_code, answer.text
    job: dict[str, Any] = answer.json()
    return job


def test_start_answers_one_object_in_its_spellings(client: Client) -> None:
    """Spec 003, "Status and Result"."""
    job = started(client)
    assert (ALICE.address, AGREEMENT, 1) == (job["owner"], job["agreementId"], job["status"])
    assert (None, [], "", None) == (job["algologUrl"], job["outputsUrl"], job["resultsDid"], job["dateFinished"])


def test_start_by_query_as_real_clients_and_the_document_do(client: Client) -> None:
    """The example of the document has everything in the query, a client of its time an empty jobId beside a body."""
    call = signed(
        ALICE, AGREEMENT, algorithmMeta='{"rawcode": "x", "container": {"image": "python", "entrypoint": "x"}}'
    )
    assert 200 == client.post(COMPUTE, params=call).status_code
    again = signed(BOB, BOBS, algorithmDID="did:op:algo", algorithmMeta=None, output={}) | {"jobId": ""}
    assert 200 == client.post(COMPUTE, json=again).status_code


def test_an_agreement_is_good_for_one_job(client: Client) -> None:
    """The same call again answers the job there is; another algorithm needs another agreement."""
    job = started(client)
    assert job["jobId"] == started(client)["jobId"]
    other = signed(ALICE, AGREEMENT, algorithmMeta={**META, "rawcode": "print('other')"})
    assert 400 == client.post(COMPUTE, json=other).status_code


def test_an_agreement_is_known_with_and_without_0x(client: Client) -> None:
    """squid-js leaves it out in every call; however it is written, it is one agreement and one job."""
    bare = AGREEMENT.removeprefix("0x")
    job = started(client)
    again = client.post(COMPUTE, json=signed(ALICE, bare, algorithmMeta=META))
    assert (job["jobId"], AGREEMENT) == (again.json()["jobId"], again.json()["agreementId"])
    for spelling in (AGREEMENT, bare, bare.upper()):
        (found,) = client.get(COMPUTE, params={"serviceAgreementId": spelling}).json()
        assert job["jobId"] == found["jobId"]
    assert [] == client.get(COMPUTE, params={"serviceAgreementId": BOBS}).json()
    assert 7 == client.put(COMPUTE, json=signed(ALICE, bare)).json()["status"]
    restarted = client.post(COMPUTE, json=signed(ALICE, bare, job["jobId"], algorithmMeta=META))
    assert (job["jobId"], 1) == (restarted.json()["jobId"], restarted.json()["status"])
    assert 8 == client.delete(COMPUTE, json=signed(ALICE, bare)).json()["status"]


def test_a_job_is_restarted_under_its_own_agreement(client: Client) -> None:
    """Another one that the consumer may use does not replace it."""
    job = started(client)
    assert 200 == client.put(COMPUTE, json=signed(ALICE, AGREEMENT)).status_code
    other = client.post(COMPUTE, json=signed(ALICE, BOBS, job["jobId"], algorithmMeta=META))
    assert 400 == other.status_code
    assert "its own agreement" in other.json()["error"]


def test_agreements_bind_consumer_and_algorithm(client: Client) -> None:
    """What the owner has granted to somebody, for something, is nobody else's."""
    for call, code in (
        (signed(ALICE, BOBS, algorithmDid="did:op:algo"), "order_invalid"),
        (signed(BOB, BOBS, algorithmMeta=META), "not_trusted_algo"),
        (signed(BOB, "0x33", algorithmMeta=META), "order_invalid"),
        (signed(BOB, BOBS, algorithmDid="did:op:nonesuch"), "did_not_found"),
        (signed(ALICE, AGREEMENT), "missing_meta_documentId"),
    ):
        answer = client.post(COMPUTE, json=call)
        assert (400, code) == (answer.status_code, answer.json()["code"])


def test_signature_or_token(client: Client) -> None:
    """A token is signed over a time and good for a day; neither is another's."""
    now = int(time.time())

    def token(key: LocalAccount, at: int) -> str:
        return f"{brizo_sign(key, f'Ocean Protocol Authentication{chr(10)}{at}')}-{at}"

    call = {"consumerAddress": ALICE.address, "serviceAgreementId": AGREEMENT, "algorithmMeta": META}
    for signature, status in (
        (token(ALICE, now), 200),
        (token(ALICE, now - 86_000), 200),
        (token(ALICE, now - 86_500), 401),
        (token(ALICE, now + 3_600), 401),
        (token(BOB, now), 401),
        (token(ALICE, now)[:-1] + "x", 401),
        (brizo_sign(BOB, f"{ALICE.address}{AGREEMENT}"), 401),
        (factories.sign(ALICE, f"{ALICE.address}{AGREEMENT}"), 401),
        ("nonsense", 401),
    ):
        assert status == client.post(COMPUTE, json={**call, "signature": signature}).status_code, signature


def test_the_table_has_eight_numbers(client: Client) -> None:
    """Contract, section 2: a stopped job is 7, a failed one keeps its step, with dateFinished set."""
    for status, number in (
        (Status.STARTED, 1),
        (Status.CONFIGURING, 2),
        (Status.DATA_FAILED, 2),
        (Status.RUNNING, 3),
        (Status.RUN_FAILED, 3),
        (Status.FILTERING, 4),
        (Status.PUBLISHING, 5),
        (Status.COMPLETED, 6),
        (Status.STOPPED, 7),
    ):
        job = started(client)
        client.jobs.move(job["jobId"], status)
        (told,) = client.get(COMPUTE, params={"jobId": job["jobId"]}).json()
        assert number == told["status"], status
        client.emptied()
        client.jobs.offers = {"small": factories.offers()["small"]}


def test_status_shows_urls_to_the_owner_only(client: Client) -> None:
    """Unsigned, or signed by another, it comes without."""
    job_id = started(client)["jobId"]
    client.jobs.publish(job_id, [factories.result("o.txt", b"out"), factories.result("a.log", b"log", "algorithmLog")])
    client.jobs.move(job_id, Status.COMPLETED)
    (mine,) = client.get(COMPUTE, params=signed(ALICE, AGREEMENT, job_id)).json()
    assert (b"out", b"log") == (client.get(mine["outputsUrl"][0]).content, client.get(mine["algologUrl"]).content)
    for query in ({"jobId": job_id}, {"serviceAgreementId": AGREEMENT}, {"consumerAddress": ALICE.address}):
        (told,) = client.get(COMPUTE, params=query).json()
        assert ([], None) == (told["outputsUrl"], told["algologUrl"])
    assert 401 == client.get(COMPUTE, params={**signed(BOB, "", job_id), "consumerAddress": ALICE.address}).status_code
    assert [] == client.get(COMPUTE, params=signed(BOB, "", job_id)).json()
    assert 400 == client.get(COMPUTE).status_code


def test_stop_restart_and_delete(client: Client) -> None:
    """One object each; a job is restarted under its id; others find none."""
    job_id = started(client)["jobId"]
    assert 404 == client.put(COMPUTE, params=signed(BOB, "", job_id)).status_code
    assert 401 == client.put(COMPUTE, params={**signed(BOB, "", job_id), "consumerAddress": ALICE.address}).status_code
    assert 400 == client.delete(COMPUTE, params=signed(ALICE)).status_code
    # As a client of its time writes it, with an empty jobId where there is none.
    call = {**signed(ALICE, AGREEMENT), "jobId": ""}
    assert (7, "Job stopped") == ((told := client.put(COMPUTE, params=call).json())["status"], told["statusText"])
    again = client.post(COMPUTE, json=signed(ALICE, AGREEMENT, job_id, algorithmMeta=META)).json()
    assert (job_id, 1, None) == (again["jobId"], again["status"], again["dateFinished"])
    told = client.delete(COMPUTE, params=signed(ALICE, "", job_id)).json()
    assert (8, "Job deleted successfully") == (told["status"], told["statusText"])
    assert [] == client.get(COMPUTE, params={"jobId": job_id}).json()
    answer = client.post(COMPUTE, json=signed(ALICE, AGREEMENT, algorithmMeta=META))
    assert 400 == answer.status_code, "an agreement is good for one job, also when that is deleted"


def test_the_agreement_is_found_on_disk_alone(client: Client, tmp_path: Path) -> None:
    """Without a catalogue no agreement is known, and that is said, not guessed."""
    with factories.client(factories.settings(tmp_path)) as bare:
        answer = bare.post(COMPUTE, json=signed(ALICE, AGREEMENT, algorithmMeta=META))
        assert (400, "order_invalid") == (answer.status_code, answer.json()["code"])
