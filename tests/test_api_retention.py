"""Results that have expired, over the real app: the record stays, and nothing else can be had, in any dialect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount

from flows.jobs import MemoryJobs
from flows.status import Status
from tests import factories
from tests.factories import Client, brizo_sign, client, consumer_signed, settings

OWNER: LocalAccount = Account.from_key(b"\x0a" * 32)
OPERATOR: Final = "/api/v1/operator"
SERVICES: Final = "/api/services"
BRIZO: Final = "/api/v1/brizo/services/compute"
WEEK: Final = timedelta(days=7)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.at = datetime(2026, 11, 22, 9, 28, 7, 590750, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.at


@pytest.fixture(scope="module")
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, clock: Clock) -> Iterator[Client]:
    with client(settings(tmp_path_factory.mktemp("api")), MemoryJobs(factories.offers(), now=clock)) as made:
        yield made


@pytest.fixture
def job_id(house: Client, clock: Clock) -> str:
    """A job that has ended with an output and its algorithm's log."""
    job_id = house.started(owner=OWNER.address, agreementId=f"{clock.at.timestamp()}")
    files = [factories.result("x.txt", b"done"), factories.result("a.log", b"log", kind="algorithmLog")]
    house.jobs.publish(job_id, files)
    house.jobs.move(job_id, Status.COMPLETED, reason="all is done")
    return job_id


def of_operator(house: Client, job_id: str) -> Any:
    return house.get(f"{OPERATOR}/compute", params={"jobId": job_id}).json()[0]


def of_early_operator(house: Client, job_id: str) -> Any:
    return house.get(f"{OPERATOR}/status", params={"jobId": job_id}).json()[0]


def of_provider(house: Client, job_id: str) -> Any:
    query = {**consumer_signed(OWNER, job_id), "jobId": job_id}
    return house.get(f"{SERVICES}/compute", params=query).json()[0]


def of_brizo(house: Client, job_id: str) -> Any:
    signature = brizo_sign(OWNER, f"{OWNER.address}{job_id}")
    query = {"consumerAddress": OWNER.address, "jobId": job_id, "signature": signature}
    return house.get(BRIZO, params=query).json()[0]


DIALECTS: Final[list[Callable[[Client, str], Any]]] = [of_operator, of_early_operator, of_provider, of_brizo]


def links_in(job: dict[str, Any]) -> list[str]:
    """Every URL that a status shows."""
    found = [job.get(name) for name in ("algologURL", "algorithmLogUrl", "algologUrl")]
    for name in ("outputsURL", "resultsUrls", "outputsUrl"):
        found += job.get(name, [])
    found += [result["url"] for result in job.get("results", ())]
    return [url for url in found if url]


@pytest.mark.parametrize("status_of", DIALECTS, ids=lambda status_of: status_of.__name__)
def test_a_status_tells_when_results_expire_and_that_they_have(
    house: Client, clock: Clock, job_id: str, status_of: Callable[[Client, str], Any]
) -> None:
    """A Unix time beside that of the end; past it links and results are empty, and everything else stays."""
    job = status_of(house, job_id)
    assert 7 * 86_400 == pytest.approx(float(job["expireTimestamp"]) - float(job["dateFinished"]))
    links = links_in(job)
    assert len(links) >= 2
    assert {200} == {house.get(link).status_code for link in links}
    clock.at += WEEK
    told = status_of(house, job_id)
    assert [] == links_in(told)
    assert told.get("results", "") == ""
    assert told["reason"].startswith("all is done; its results expired at 20")
    changed = {name for name in job if job[name] != told[name]}
    assert "reason" in changed
    assert not changed & {"status", "statusText", "dateCreated", "dateFinished", "expireTimestamp", "history", "jobId"}


def test_a_link_ends_with_the_results(house: Client, clock: Clock, job_id: str) -> None:
    """On the second, however long the link itself would hold, and in words of its own."""
    clock.at += WEEK - timedelta(seconds=1)
    (link, *_) = links_in(of_operator(house, job_id))
    assert 200 == house.get(link).status_code
    clock.at += timedelta(seconds=1)
    answer = house.get(link)
    assert 410 == answer.status_code
    assert f"The results of job {job_id} expired at" in answer.json()["error"]
    assert 410 == house.request("HEAD", link).status_code


@pytest.mark.parametrize("index", [0, 1])
def test_results_by_their_index_are_gone(house: Client, clock: Clock, job_id: str, index: int) -> None:
    """410 for who may have them; others learn as little as before."""

    def codes() -> list[int]:
        named = {"jobId": job_id, "index": index}
        return [
            house.get(f"{OPERATOR}/getResult", params={**named, "owner": OWNER.address}).status_code,
            house.get(f"{OPERATOR}/getResult", params={**named, "owner": factories.OWNER}).status_code,
            house.get(
                f"{SERVICES}/computeResult", params={**named, **consumer_signed(OWNER, job_id, index)}
            ).status_code,
            house.get(
                f"{SERVICES}/computeResult", params={**named, **consumer_signed(factories.STRANGER, job_id, index)}
            ).status_code,
        ]

    assert [200, 404, 200, 404] == codes()
    clock.at += WEEK
    assert [410, 404, 410, 404] == codes()


@pytest.mark.parametrize("status_of", DIALECTS, ids=lambda status_of: status_of.__name__)
def test_a_job_that_is_going_has_no_such_time(
    house: Client, clock: Clock, status_of: Callable[[Client, str], Any]
) -> None:
    """Null until it has ended."""
    clock.at += timedelta(seconds=1)
    job_id = house.started(owner=OWNER.address, agreementId=f"{clock.at.timestamp()}")
    assert status_of(house, job_id)["expireTimestamp"] is None
