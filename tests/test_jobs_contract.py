"""What every implementation of ``Jobs`` keeps: in memory, and over a real Prefect server."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, WorkPoolUpdate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.responses import OrchestrationResult, SetStateStatus
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Pending, Scheduled

from blocks.environment import load_environments, state_folder
from blocks.store import Kind, Manifest, ManifestFile
from cli.service import free_port
from flows.errors import (
    AgreementInUse,
    InvalidParameter,
    InvalidWorkflow,
    JobNotFound,
    NoSuchResult,
    NotReady,
    NotRestartable,
    ResultsExpired,
)
from flows.jobs import Expiry, Job, JobQuery, Jobs, MemoryJobs
from flows.prefect_jobs import DELETING, KEPT, REMOVAL_SECONDS, REMOVING, PrefectJobs
from flows.sealing import Seal, create_key_file
from flows.stages import FLOW_NAME, job_tag
from flows.states import STOPPED_IN_QUEUE, taken_out_of_the_queue
from flows.status import Status
from flows.workflow import Workflow, parse_workflow
from tests import documents
from tests.conftest import PrefectServer
from tests.documents import data, offer, stage
from tests.factories import result

pytestmark = pytest.mark.anyio

ENVIRONMENT: Final = "unattended"
"""Nobody runs its jobs, so that they wait for as long as a test looks at them."""

FADING: Final = "fading"
"""The same, and what its jobs leave expires after a second."""

HOPELESS: Final = "hopeless"
"""The same, and its jobs wait for a second only."""

MARKER: Final = "hush-c4ca4238a0b923"

Opened = Callable[[], AbstractAsyncContextManager[Jobs]]


@asynccontextmanager
async def in_memory() -> AsyncIterator[Jobs]:
    yield MemoryJobs(
        {
            ENVIRONMENT: offer(ENVIRONMENT),
            FADING: offer(FADING, storage_expiry=3),
            HOPELESS: offer(HOPELESS, max_wait=3),
        }
    )


@asynccontextmanager
async def over_prefect(server: PrefectServer) -> AsyncIterator[PrefectJobs]:
    create_key_file(server.key_file)
    # As in the API's process: beside the client it is given, this implementation listens to events, and Prefect
    # finds those by its setting alone.
    with temporary_settings({PREFECT_API_URL: server.api}):
        async with get_client() as client:
            await client.update_work_pool(ENVIRONMENT, WorkPoolUpdate(is_paused=True))
            yield PrefectJobs(client, Seal.from_file(server.key_file), local_workers=False)


@pytest.fixture(params=[MemoryJobs, pytest.param(PrefectJobs, marks=pytest.mark.server)])
def opened(request: pytest.FixtureRequest) -> Opened:
    """Opens an implementation; several times for several at once."""
    if request.param is MemoryJobs:
        return in_memory
    server: PrefectServer = request.getfixturevalue("prefect_server")
    return lambda: over_prefect(server)


@pytest.fixture
async def jobs(opened: Opened) -> AsyncIterator[Jobs]:
    async with opened() as implementation:
        yield implementation


@pytest.fixture
async def prefect_jobs(prefect_server: PrefectServer) -> AsyncIterator[PrefectJobs]:
    async with over_prefect(prefect_server) as implementation:
        yield implementation


def document(
    *,
    agreement: str = "",
    owner: str = "",
    environment: str = ENVIRONMENT,
    more: dict[str, Any] | None = None,
    **stage_of: Any,
) -> Workflow:
    """One that nobody else has: agreement and owner are made up where they are not given."""
    return parse_workflow(
        documents.workflow(
            stages=[stage(environment=environment, **stage_of)],
            agreement=agreement or uuid4().hex,
            owner=owner or f"0x{uuid4().hex}AB",
            **(more or {}),
        )
    )


def by_id(job: Job) -> JobQuery:
    return JobQuery(job_id=job.id)


async def only(found: Awaitable[list[Job]]) -> Job:
    (job,) = await found
    return job


# Taking in.


async def test_a_job_that_was_taken_in(jobs: Jobs) -> None:
    """A job waits under the names of its document and says what it waits for."""
    wanted = document(
        input=[data("did:op:b", index=1), data("did:op:a", index=0)],
        algorithm={"id": "did:op:c"},
    )
    job = await jobs.submit(wanted)
    assert (wanted.agreement_id, wanted.owner, ENVIRONMENT) == (job.agreement_id, job.owner, job.environment)
    assert 32 == len(job.id) == len(bytes.fromhex(job.id)) * 2
    assert (Status.WARMING_UP, None, False) == (job.status, job.finished, job.ended)
    assert "waiting" in job.reason
    assert [Status.WARMING_UP] == [transition.status for transition in job.history]
    assert ("did:op:c", ("did:op:a", "did:op:b")) == (job.algorithm_did, job.input_dids)
    assert (0.0, 1, ()) == (job.progress, job.stages, job.results)
    assert job == await only(jobs.find(by_id(job)))


async def test_a_repeat_is_the_same_job(jobs: Jobs) -> None:
    """The same agreement and document again, however spelled, answers the job there is."""
    agreement, owner = uuid4().hex, f"0x{uuid4().hex}"
    first = await jobs.submit(document(agreement=agreement, owner=owner, output={"brizoUrl": "https://b"}))
    second = await jobs.submit(
        document(agreement=agreement, owner=owner, output={"brizoUri": "https://b"}, more={"colour": 1})
    )
    assert first == second
    assert 1 == len(await jobs.find(JobQuery(agreement_id=agreement)))


async def test_ten_at_once_are_one_job(jobs: Jobs) -> None:
    """Ten requests at the same time leave one job."""
    wanted = document()
    taken = await asyncio.gather(*(jobs.submit(wanted) for _ in range(10)))
    assert 1 == len({job.id for job in taken})
    assert 1 == len(await jobs.find(JobQuery(agreement_id=wanted.agreement_id)))


async def test_an_agreement_is_for_one_document(jobs: Jobs) -> None:
    """Another document under an agreement in use is refused, and the job there is stays as it was."""
    job = await jobs.submit(document())
    for other in (
        document(agreement=job.agreement_id, owner=job.owner, rawcode="print('other')"),
        document(agreement=job.agreement_id),
    ):
        with pytest.raises(AgreementInUse):
            await jobs.submit(other)
    assert [job] == await jobs.find(JobQuery(agreement_id=job.agreement_id))


async def test_two_documents_at_once_under_one_agreement(jobs: Jobs) -> None:
    """Whichever of two documents comes first has the agreement, and all requests with the other are refused."""
    agreement = uuid4().hex
    wanted = [document(agreement=agreement, rawcode=code) for code in ("print(1)", "print(2)")]
    answers = await asyncio.gather(*(jobs.submit(wanted[n % 2]) for n in range(8)), return_exceptions=True)
    taken = [answer for answer in answers if isinstance(answer, Job)]
    assert (4, 1) == (len(taken), len({job.id for job in taken}))
    assert {Job, AgreementInUse} == {type(answer) for answer in answers}


async def test_a_document_that_cannot_be_run(jobs: Jobs) -> None:
    """A refused document leaves nothing behind: its agreement is free."""
    agreement = uuid4().hex
    with pytest.raises(InvalidWorkflow) as refusal:
        await jobs.submit(document(agreement=agreement, rawcode="", compute={"Instances": 2}))
    assert ["stages.0.algorithm", "stages.0.compute.Instances"] == [p.path for p in refusal.value.problems]
    assert [] == await jobs.find(JobQuery(agreement_id=agreement))
    await jobs.submit(document(agreement=agreement))


async def test_a_large_document(jobs: Jobs) -> None:
    """A megabyte of code that hardly compresses is taken in, repeated and deleted like any other."""
    wanted = document(rawcode=large())
    job = await jobs.submit(wanted)
    assert job == await jobs.submit(wanted)
    assert Status.DELETED is (await only(jobs.delete(by_id(job)))).status
    assert [] == await jobs.find(by_id(job))


def large() -> str:
    return random.Random(1).randbytes(500_000).hex()


# Finding.


async def test_each_selector(jobs: Jobs) -> None:
    """Id, agreement and owner each find what they name; together they must all hold."""
    owner = f"0x{uuid4().hex}AB"
    inputs = [data("did:op:more", index=1), data("did:op:main", index=0)]
    first, second = [await jobs.submit(document(owner=owner, input=inputs)) for _ in range(2)]
    stranger = await jobs.submit(document())
    assert ("did:op:main", "") == (first.document_id, stranger.document_id)
    for query, found in (
        (JobQuery(job_id=first.id), [first]),
        (JobQuery(agreement_id=second.agreement_id), [second]),
        (JobQuery(owner=owner), [first, second]),
        (JobQuery(owner=owner, agreement_id=first.agreement_id), [first]),
        (JobQuery(owner=owner, job_id=second.id), [second]),
        (JobQuery(job_id=first.id, agreement_id=first.agreement_id, owner=owner), [first]),
        (JobQuery(job_id=first.id, agreement_id=second.agreement_id), []),
        (JobQuery(job_id=first.id, owner=stranger.owner), []),
        (JobQuery(agreement_id=first.agreement_id, owner=stranger.owner), []),
        (JobQuery(job_id=uuid4().hex), []),
        (JobQuery(agreement_id=first.agreement_id[:-1]), []),
        (JobQuery(owner=owner[:-1]), []),
        (JobQuery(document_id="did:op:main", owner=owner), [first, second]),
        (JobQuery(document_id="did:op:main", agreement_id=first.agreement_id), [first]),
        (JobQuery(document_id="did:op:more", owner=owner), []),
    ):
        assert [job.id for job in found] == [job.id for job in await jobs.find(query)], query


async def test_owners_are_the_same_in_any_case(jobs: Jobs) -> None:
    """Addresses compare without regard to case, agreements with."""
    job = await jobs.submit(document(agreement=f"Abc{uuid4().hex}"))
    for owner in (job.owner.upper(), job.owner.lower()):
        assert [job] == await jobs.find(JobQuery(owner=owner))
    assert [] == await jobs.find(JobQuery(agreement_id=job.agreement_id.lower()))
    assert job.owner == (await only(jobs.find(by_id(job)))).owner


@pytest.mark.parametrize("agreement", ["0x" + "a" * 198, "a b", "übereinkunft", "x:y,z", "a'b\"c%", "owner:0x1", "{}"])
async def test_agreements_are_any_text(jobs: Jobs, agreement: str) -> None:
    """An agreement is found by exactly what it is called, whatever signs are in it."""
    job = await jobs.submit(document(agreement=agreement))
    assert [job] == await jobs.find(JobQuery(agreement_id=agreement))
    assert [] == await jobs.find(JobQuery(owner=agreement))
    await jobs.delete(by_id(job))


async def test_nothing_named_is_nothing_found(jobs: Jobs) -> None:
    """A query that names nothing finds, stops and deletes nothing; it never means every job."""
    job = await jobs.submit(document())
    for query in (JobQuery(), JobQuery(job_id="", agreement_id="", owner="", document_id="")):
        assert ([], [], []) == (await jobs.find(query), await jobs.stop(query), await jobs.delete(query))
    assert job == await only(jobs.find(by_id(job)))


async def test_oldest_first(jobs: Jobs) -> None:
    """Jobs come in the order they were taken in."""
    owner = f"0x{uuid4().hex}"
    taken = [(await jobs.submit(document(owner=owner))).id for _ in range(5)]
    assert taken == [job.id for job in await jobs.find(JobQuery(owner=owner))]
    assert taken == [job.id for job in await jobs.running() if job.owner == owner]


# Stopping.


async def test_a_waiting_job_is_stopped(jobs: Jobs) -> None:
    """A job that waits is stopped at once, keeps the step it was in, and no longer counts as running."""
    job = await jobs.submit(document())
    stopped = await only(jobs.stop(by_id(job)))
    assert (Status.STOPPED, Status.WARMING_UP, True) == (stopped.status, stopped.stopped_in, stopped.ended)
    assert stopped.finished is not None and stopped.finished >= job.created
    assert "stopped on request" == stopped.reason
    assert [Status.WARMING_UP, Status.STOPPED] == [transition.status for transition in stopped.history]
    assert stopped == await only(jobs.find(by_id(job)))
    assert job.id not in [each.id for each in await jobs.running()]


async def test_a_stop_can_be_seen(jobs: Jobs) -> None:
    """``stopreq`` tells that a job did not end by itself."""
    job = await jobs.submit(document())
    assert 0 == job.stop_request
    assert 1 == (await only(jobs.stop(by_id(job)))).stop_request


async def test_stopping_again_changes_nothing(jobs: Jobs) -> None:
    """A job that has ended stays as it ended, also when stopped by several at the same time."""
    job = await jobs.submit(document())
    await asyncio.gather(*(jobs.stop(by_id(job)) for _ in range(3)))
    ended = await only(jobs.find(by_id(job)))
    assert ended == await only(jobs.stop(by_id(job))) == await only(jobs.find(by_id(job)))


async def test_a_stopped_job_keeps_its_agreement(jobs: Jobs) -> None:
    """The same document again answers the stopped job; it is not started anew behind its owner's back."""
    wanted = document()
    job = await jobs.submit(wanted)
    stopped = await only(jobs.stop(by_id(job)))
    assert stopped == await jobs.submit(wanted)
    with pytest.raises(AgreementInUse):
        await jobs.submit(document(agreement=job.agreement_id))


async def test_only_what_matches_is_stopped(jobs: Jobs) -> None:
    """Stopping by owner ends all of an owner's jobs and nobody else's; a selector too many saves them."""
    owner = f"0x{uuid4().hex}"
    first, second = [await jobs.submit(document(owner=owner)) for _ in range(2)]
    stranger = await jobs.submit(document())
    assert [] == await jobs.stop(JobQuery(job_id=first.id, owner=stranger.owner))
    assert [Status.STOPPED] * 2 == [job.status for job in await jobs.stop(JobQuery(owner=owner.upper()))]
    assert Status.WARMING_UP is (await only(jobs.find(by_id(stranger)))).status
    assert {first.id, second.id}.isdisjoint(job.id for job in await jobs.running())


async def test_stopping_by_agreement(jobs: Jobs) -> None:
    """Ends the job of exactly that agreement: not those of the same owner, nor one whose agreement begins the same."""
    owner, agreement = f"0x{uuid4().hex}", uuid4().hex
    meant = await jobs.submit(document(owner=owner, agreement=agreement))
    others = [
        await jobs.submit(document(owner=owner, agreement=other))
        for other in (f"{agreement}1", agreement[:-1], agreement.upper())
    ]
    assert [] == await jobs.stop(JobQuery(agreement_id=agreement, owner=f"{owner}0"))
    assert [meant.id] == [job.id for job in await jobs.stop(JobQuery(agreement_id=agreement))]
    assert [Status.STOPPED] == [job.status for job in await jobs.find(by_id(meant))]
    assert {job.id for job in others} <= {job.id for job in await jobs.running()}
    await jobs.delete(JobQuery(owner=owner))


async def test_stopping_by_owner_leaves_the_ended_as_they_are(jobs: Jobs) -> None:
    """One that was stopped before, with what it has published, is answered with the others and unchanged."""
    owner = f"0x{uuid4().hex}"
    before = await ended(jobs, owner=owner)
    going = await jobs.submit(document(owner=owner))
    after = await jobs.stop(JobQuery(owner=owner))
    assert [before.id, going.id] == [job.id for job in after]
    assert before == after[0]
    assert ["x.txt"] == [each.filename for each in after[0].results]


# Restarting.


async def test_a_stopped_job_waits_again(jobs: Jobs) -> None:
    """It has its id, its names and its past, and is otherwise as one that was just taken in."""
    wanted = document(input=[data("did:op:a")])
    job = await jobs.submit(wanted)
    stopped = await only(jobs.stop(by_id(job)))
    queued = await jobs.restart(job.id)
    assert (Status.WARMING_UP, None, False, 0) == (queued.status, queued.finished, queued.ended, queued.stop_request)
    assert (job.id, job.created, job.input_dids, ()) == (queued.id, queued.created, queued.input_dids, queued.results)
    assert "waiting" in queued.reason
    expected = [Status.WARMING_UP, Status.STOPPED, Status.WARMING_UP]
    assert expected == [transition.status for transition in queued.history]
    assert stopped.history[-1].at == queued.history[1].at
    assert queued == await only(jobs.find(by_id(job))) == await jobs.submit(wanted)
    assert job.id in [each.id for each in await jobs.running()]


async def test_a_restarted_job_is_stopped_and_deleted_like_any_other(jobs: Jobs) -> None:
    """Nothing of its first life stands in the way of the end of its second."""
    job = await jobs.submit(document())
    await jobs.stop(by_id(job))
    await jobs.restart(job.id)
    stopped = await only(jobs.stop(by_id(job)))
    assert (Status.STOPPED, Status.WARMING_UP, 1) == (stopped.status, stopped.stopped_in, stopped.stop_request)
    assert 2 == [transition.status for transition in stopped.history].count(Status.STOPPED)
    await jobs.restart(job.id)
    await jobs.delete(by_id(job))
    assert [] == await jobs.find(by_id(job))


async def test_restarts_at_once_are_one(jobs: Jobs) -> None:
    """One of them restarts the job; to the others it is a job that is going already."""
    job = await jobs.submit(document())
    await jobs.stop(by_id(job))
    answers = await asyncio.gather(*(jobs.restart(job.id) for _ in range(4)), return_exceptions=True)
    assert [Job] == [type(answer) for answer in answers if not isinstance(answer, NotRestartable)]
    history = (await only(jobs.find(by_id(job)))).history
    assert 2 == [transition.status for transition in history].count(Status.WARMING_UP)


async def test_what_cannot_be_restarted(jobs: Jobs) -> None:
    """A job that waits is going already, and one that nobody knows cannot be restarted; each says so."""
    job = await jobs.submit(document())
    with pytest.raises(NotRestartable, match="still going"):
        await jobs.restart(job.id)
    assert job == await only(jobs.find(by_id(job)))
    with pytest.raises(JobNotFound):
        await jobs.restart(uuid4().hex)


@pytest.mark.parametrize("size", ["small", "large"])
async def test_a_restart_with_another_document(jobs: Jobs, size: str) -> None:
    """The new document takes the place of the old one, for whoever repeats it and for whoever reads the job."""
    filling = large() if size == "large" else ""
    first = document(rawcode=f"# 1 {filling}", input=[data("did:op:a")])
    job = await jobs.submit(first)
    await jobs.stop(by_id(job))
    second = document(
        agreement=job.agreement_id,
        owner=job.owner.upper(),
        rawcode=f"# 2 {filling}",
        input=[data("did:op:b")],
        output={"whitelist": ["0xAB"]},
    )
    queued = await jobs.restart(job.id, second)
    assert (("did:op:b",), "did:op:b", ("0xab",)) == (queued.input_dids, queued.document_id, queued.whitelist)
    assert queued == await jobs.submit(second)
    assert [queued] == await jobs.find(JobQuery(document_id="did:op:b", owner=job.owner))
    assert [] == await jobs.find(JobQuery(document_id="did:op:a", owner=job.owner))
    with pytest.raises(AgreementInUse):
        await jobs.submit(first)
    await jobs.delete(by_id(job))


async def test_a_restart_with_a_document_that_will_not_do(jobs: Jobs) -> None:
    """One that cannot be run, or is another's or another job's, is refused, and the job stays as it ended."""
    job = await jobs.submit(document())
    stopped = await only(jobs.stop(by_id(job)))
    for refused, error in (
        (document(agreement=job.agreement_id, owner=job.owner, rawcode=""), InvalidWorkflow),
        (document(owner=job.owner), InvalidParameter),
        (document(agreement=job.agreement_id), InvalidParameter),
    ):
        with pytest.raises(error):
            await jobs.restart(job.id, refused)
    assert stopped == await only(jobs.find(by_id(job)))


# Deleting.


@pytest.mark.parametrize("stopped_first", [False, True])
async def test_a_deleted_job_is_unknown(jobs: Jobs, stopped_first: bool) -> None:
    """Deleting answers the job one last time, as deleted; afterwards nothing knows it."""
    job = await jobs.submit(document())
    if stopped_first:
        await jobs.stop(by_id(job))
    deleted = await only(jobs.delete(by_id(job)))
    assert (job.id, Status.DELETED, Status.WARMING_UP) == (deleted.id, deleted.status, deleted.stopped_in)
    assert deleted.removed and deleted.finished is not None and deleted.reason
    assert Status.DELETED is deleted.history[-1].status
    for query in (by_id(job), JobQuery(agreement_id=job.agreement_id), JobQuery(owner=job.owner)):
        assert ([], [], []) == (await jobs.find(query), await jobs.stop(query), await jobs.delete(query))
    with pytest.raises(JobNotFound):
        await jobs.read(job.id, 0, 0, 1)


async def test_a_deleted_job_frees_its_agreement(jobs: Jobs) -> None:
    """After a deletion the agreement takes any document, as a job of its own."""
    job = await jobs.submit(document())
    await jobs.delete(by_id(job))
    other = await jobs.submit(document(agreement=job.agreement_id, rawcode="print('other')"))
    assert job.id != other.id
    assert [other] == await jobs.find(JobQuery(agreement_id=job.agreement_id))


async def test_only_what_matches_is_deleted(jobs: Jobs) -> None:
    """Jobs of other owners survive a deletion."""
    mine, other = await jobs.submit(document()), await jobs.submit(document())
    assert [] == await jobs.delete(JobQuery(job_id=other.id, owner=mine.owner))
    assert [mine.id] == [job.id for job in await jobs.delete(JobQuery(owner=mine.owner))]
    assert other == await only(jobs.find(by_id(other)))


async def cut_off(jobs: Jobs, job: Job) -> None:
    """The deletion of *job* has been begun, and whoever began it is gone."""
    if isinstance(jobs, MemoryJobs):
        jobs.begin_deletion(job.id)
        return
    async with get_client() as client:
        tags = (await client.read_flow_run(UUID(job.id))).tags
        await client.update_flow_run(UUID(job.id), tags=[*tags, DELETING])


@pytest.mark.parametrize("has_ended", [False, True])
async def test_a_job_that_is_being_deleted_is_unknown(jobs: Jobs, has_ended: bool) -> None:
    """From the first moment on, to everybody; only its agreement is not free before all of it is gone."""
    wanted = document()
    job = await jobs.submit(wanted)
    if has_ended:
        await published(jobs, job)
        await jobs.stop(by_id(job))
    await cut_off(jobs, job)
    for query in (by_id(job), JobQuery(agreement_id=job.agreement_id), JobQuery(owner=job.owner)):
        assert ([], []) == (await jobs.find(query), await jobs.stop(query))
    assert job.id not in [each.id for each in await jobs.running()]
    for call in (jobs.read(job.id, 0, 0, 1), jobs.restart(job.id), jobs.restart(job.id, wanted)):
        with pytest.raises(JobNotFound):
            await call
    for again in (wanted, document(agreement=job.agreement_id)):
        with pytest.raises(NotReady, match="being deleted"):
            await jobs.submit(again)
    assert Status.DELETED is (await only(jobs.delete(by_id(job)))).status
    assert [] == await jobs.delete(by_id(job))
    assert job.id != (await jobs.submit(wanted)).id
    await jobs.delete(JobQuery(agreement_id=job.agreement_id))


async def test_a_deletion_that_was_cut_off_is_finished(jobs: Jobs) -> None:
    """By the next round, for the environments it is about; what is not being deleted is left alone."""
    going, other, elsewhere = [await jobs.submit(document(environment=name)) for name in (ENVIRONMENT, FADING, FADING)]
    done = await ended(jobs)
    for job in (going, done, elsewhere):
        await cut_off(jobs, job)
    finished = await jobs.finish_deletions(ENVIRONMENT)
    assert {going.id, done.id} == {job.id for job in finished.removed}
    assert () == finished.failed
    assert Expiry() == await jobs.finish_deletions(ENVIRONMENT)
    assert [elsewhere.id] == [job.id for job in (await jobs.finish_deletions()).removed]
    assert [] == await jobs.delete(by_id(going)) == await jobs.delete(by_id(done))
    assert [other.id] == [job.id for job in await jobs.delete(by_id(other))]


async def test_a_bounded_number_of_deletions_is_finished_at_a_time(jobs: Jobs) -> None:
    """The next round goes on."""
    begun = [await jobs.submit(document()) for _ in range(3)]
    for job in begun:
        await cut_off(jobs, job)
    rounds = [[job.id for job in (await jobs.finish_deletions(ENVIRONMENT, most=2)).removed] for _ in range(3)]
    assert [2, 1, 0] == [len(found) for found in rounds]
    assert {job.id for job in begun} == {job for found in rounds for job in found}


async def test_deletions_at_once(jobs: Jobs) -> None:
    """However many delete a job at the same time, it is gone, and each is told so or that there is none."""
    job = await ended(jobs)
    answers = await asyncio.gather(*(jobs.delete(by_id(job)) for _ in range(4)))
    assert {Status.DELETED} == {told.status for answer in answers for told in answer}
    assert [] == await jobs.delete(by_id(job))


# In several environments.


def spread(*environments: str, agreement: str = "", owner: str = "", **first: Any) -> Workflow:
    """A stage in each of *environments*; *first* is said of the first one."""
    one, *others = environments
    return parse_workflow(
        documents.workflow(
            stages=[stage(0, environment=one, **first), *(stage(n, environment=e) for n, e in enumerate(others, 1))],
            agreement=agreement or uuid4().hex,
            owner=owner or f"0x{uuid4().hex}AB",
        )
    )


async def test_a_job_in_several_environments_is_one_job(jobs: Jobs) -> None:
    """Taken in, found, stopped, restarted and deleted like any other, with the environment of its first stage."""
    wanted = spread(FADING, ENVIRONMENT, FADING)
    job = await jobs.submit(wanted)
    assert (FADING, (FADING, ENVIRONMENT), 3) == (job.environment, job.environments, job.stages)
    assert {0: FADING, 1: ENVIRONMENT, 2: FADING} == job.places
    assert "waiting" in job.reason
    assert job == await jobs.submit(wanted) == await only(jobs.find(JobQuery(agreement_id=job.agreement_id)))
    assert [job.id] == [each.id for each in await jobs.running() if each.owner == job.owner]
    stopped = await only(jobs.stop(by_id(job)))
    assert Status.STOPPED is stopped.status
    assert Status.WARMING_UP is (await jobs.restart(job.id)).status
    assert Status.DELETED is (await only(jobs.delete(by_id(job)))).status
    assert [] == await jobs.find(by_id(job))


async def test_a_job_is_restarted_where_it_was(jobs: Jobs) -> None:
    """Each stage in its environment: neither elsewhere nor with other stages, whether it is in one or in several."""
    for before, others in (
        ((ENVIRONMENT, FADING), ((FADING, ENVIRONMENT), (ENVIRONMENT,), (ENVIRONMENT, FADING, FADING))),
        ((ENVIRONMENT,), ((ENVIRONMENT, FADING), (FADING,))),
    ):
        job = await jobs.submit(spread(*before))
        stopped = await only(jobs.stop(by_id(job)))
        for other in others:
            with pytest.raises(InvalidParameter, match="where it was"):
                await jobs.restart(job.id, spread(*other, agreement=job.agreement_id, owner=job.owner))
        assert stopped == await only(jobs.find(by_id(job)))
        changed = spread(*before, agreement=job.agreement_id, owner=job.owner, rawcode="print('other')")
        assert Status.WARMING_UP is (await jobs.restart(job.id, changed)).status
        await jobs.delete(by_id(job))


async def test_results_in_several_environments_expire_together(jobs: Jobs) -> None:
    """When the first of the environments lets go of them; whichever of them is asked to, once."""
    for environments in ((FADING, ENVIRONMENT), (ENVIRONMENT, FADING)):
        job = await jobs.submit(spread(*environments))
        await published(jobs, job)
        stopped = await only(jobs.stop(by_id(job)))
        assert stopped.finished is not None
        assert stopped.finished + timedelta(seconds=3) == stopped.expires
        await past(stopped)
        assert (True, ()) == ((told := await only(jobs.find(by_id(job)))).expired, told.results)
        await jobs.expire(FADING, most=1000)
        assert job.id not in [each.id for each in (await jobs.expire(FADING, most=1000)).removed]
        await jobs.delete(by_id(job))


async def test_a_deletion_in_several_environments_is_finished(jobs: Jobs) -> None:
    """By whoever looks after one of them."""
    for name in (ENVIRONMENT, FADING):
        job = await jobs.submit(spread(ENVIRONMENT, FADING))
        await cut_off(jobs, job)
        assert [job.id] == [each.id for each in (await jobs.finish_deletions(name)).removed]
        assert [] == await jobs.find(by_id(job)) == await jobs.delete(by_id(job))


# Environments and results.


async def test_what_is_on_offer(jobs: Jobs) -> None:
    """Environments come in the order of their ids, with what is on offer in each."""
    states = await jobs.environments()
    ids = [state.offer.id for state in states]
    assert sorted(ids) == ids
    assert ENVIRONMENT in ids
    assert all(state.running >= 0 and state.waiting >= 0 and state.offer.max_jobs > 0 for state in states)


@pytest.mark.parametrize("index", [0, 7, -1])
async def test_a_result_that_is_not_there(jobs: Jobs, index: int) -> None:
    """A job without results has no result of any number, and a job nobody knows has none either."""
    job = await jobs.submit(document())
    with pytest.raises(NoSuchResult):
        await jobs.read(job.id, index, 0, 1)
    with pytest.raises(JobNotFound):
        await jobs.read(uuid4().hex, index, 0, 1)


# Expiry.


async def published(jobs: Jobs, job: Job) -> None:
    """The job has one result, put where its flow would put it."""
    if isinstance(jobs, MemoryJobs):
        jobs.publish(job.id, [result("x.txt", b"done")])
        return
    async with get_client() as client:
        store = (await load_environments(client))[job.environment].store()
    put = store.put_bytes(job.id, "0/output/x.txt", b"done")
    file = ManifestFile(
        path="x.txt",
        name="0/output/x.txt",
        size=put.size,
        sha256=put.sha256,
        type="text/plain",
        kind=Kind.OUTPUT,
        stage=0,
    )
    store.publish_manifest(job.id, 0, Manifest(files=(file,), created=datetime.now(UTC)))


async def ended(jobs: Jobs, **wanted: Any) -> Job:
    """A job that was stopped after it had published."""
    job = await jobs.submit(document(**wanted))
    await published(jobs, job)
    return await only(jobs.stop(by_id(job)))


async def past(job: Job) -> None:
    assert job.expires is not None
    await asyncio.sleep((job.expires - datetime.now(UTC)).total_seconds() + 0.05)


async def test_results_expire_some_time_after_the_end(jobs: Jobs) -> None:
    """A job that is going has no such time; one that has ended has it, and its results until then."""
    waiting = await jobs.submit(document())
    job = await ended(jobs)
    assert job.finished is not None
    assert (None, job.finished + timedelta(days=7)) == (waiting.expires, job.expires)
    assert (False, ["x.txt"]) == (job.expired, [each.filename for each in job.results])
    assert b"done" == b"".join(await jobs.read(job.id, 0, 0, 4))


async def test_a_job_past_its_expiry_keeps_its_record(jobs: Jobs) -> None:
    """All but its results, and says since when they are gone; whether or not anybody has removed them."""
    job = await ended(jobs, environment=FADING)
    await past(job)
    told = await only(jobs.find(by_id(job)))
    assert job.expires is not None
    assert (True, (), job.expires) == (told.expired, told.results, told.expires)
    assert told.reason.endswith(f"its results expired at {job.expires:%Y-%m-%dT%H:%M:%SZ}")
    same = {name: getattr(job, name) for name in ("status", "stopped_in", "created", "finished", "history", "owner")}
    assert same == {name: getattr(told, name) for name in same}
    with pytest.raises(ResultsExpired, match="expired at"):
        await jobs.read(job.id, 0, 0, 4)
    await jobs.expire(FADING)
    assert told == await only(jobs.find(by_id(job)))
    with pytest.raises(ResultsExpired):
        await jobs.read(job.id, 0, 0, 4)


async def test_what_has_expired_is_removed_once(jobs: Jobs) -> None:
    """Neither before nor again, nor within the time of grace."""
    job = await ended(jobs, environment=FADING)
    other = await ended(jobs)
    going = await jobs.submit(document(environment=FADING))
    assert job.id not in [each.id for each in (await jobs.expire(FADING)).removed]
    await past(job)
    assert job.id not in [each.id for each in (await jobs.expire(FADING, grace=60)).removed]
    done = await jobs.expire(FADING, most=1000)
    assert job.id in [each.id for each in done.removed]
    assert () == done.failed
    # Jobs of other tests may expire meanwhile.
    assert job.id not in [each.id for each in (await jobs.expire(FADING)).removed]
    assert Expiry() == await jobs.expire("nowhere")
    assert [other] == await jobs.find(by_id(other))
    assert [going] == await jobs.find(by_id(going))
    await jobs.delete(by_id(going))


async def test_a_bounded_number_is_removed_at_a_time(jobs: Jobs) -> None:
    """The next round goes on."""
    await jobs.expire(FADING, most=1000)
    expired = [await ended(jobs, environment=FADING) for _ in range(3)]
    await past(expired[-1])
    rounds = [[job.id for job in (await jobs.expire(FADING, most=2)).removed] for _ in range(3)]
    assert [2, 1, 0] == [len(found) for found in rounds]
    assert {job.id for job in expired} == {job for found in rounds for job in found}


@pytest.mark.parametrize("removed", [False, True])
async def test_a_restarted_job_expires_anew(jobs: Jobs, removed: bool) -> None:
    """While it is going nothing of it is removed, and after its next end it has all its time again."""
    job = await ended(jobs, environment=FADING)
    await past(job)
    if removed:
        await jobs.expire(FADING, most=1000)
    queued = await jobs.restart(job.id)
    assert (None, False) == (queued.expires, queued.expired)
    assert job.id not in [each.id for each in (await jobs.expire(FADING)).removed]
    await published(jobs, job)
    again = await only(jobs.stop(by_id(job)))
    assert job.expires is not None and again.expires is not None
    assert job.expires < again.expires
    assert ["x.txt"] == [each.filename for each in again.results]
    await past(again)
    assert job.id in [each.id for each in (await jobs.expire(FADING, most=1000)).removed]


async def test_a_restart_at_the_same_time(jobs: Jobs) -> None:
    """Whichever comes first, what the job leaves from its restart on is not removed with what it left before."""
    for _ in range(3):
        job = await ended(jobs, environment=FADING)
        await past(job)
        _, answer = await asyncio.gather(jobs.expire(FADING, most=1000), jobs.restart(job.id), return_exceptions=True)
        if isinstance(answer, NotReady):
            answer = await jobs.restart(job.id)
        assert isinstance(answer, Job), answer
        await published(jobs, job)
        assert () == (await jobs.expire(FADING)).removed
        assert 1 == len((await only(jobs.stop(by_id(job)))).results)


# Waiting for too long.

TOO_LONG: Final = 3.1


async def test_a_job_that_waited_too_long_has_ended(jobs: Jobs) -> None:
    """Whoever looks at it; it says for how long it was let wait, and is no stopped job."""
    job = await jobs.submit(document(environment=HOPELESS))
    other = await jobs.submit(document())
    assert Status.WARMING_UP is job.status
    await asyncio.sleep(TOO_LONG)
    told = await only(jobs.find(by_id(job)))
    assert (Status.EXPIRED_IN_QUEUE, True, 0, ()) == (told.status, told.ended, told.stop_request, told.results)
    assert told.finished is not None and told.finished > job.created
    assert told.reason.startswith("its turn in `hopeless` did not come within 3 s")
    assert ("Job expired in queue", None) == (told.text, told.stage)
    assert [Status.WARMING_UP, Status.EXPIRED_IN_QUEUE] == [transition.status for transition in told.history]
    assert told == await only(jobs.find(by_id(job))) == await only(jobs.stop(by_id(job)))
    running = [each.id for each in await jobs.running()]
    assert (False, True) == (job.id in running, other.id in running)
    await jobs.delete(by_id(job))


async def test_a_job_nobody_looks_at_is_ended_too(jobs: Jobs) -> None:
    """By the round that is made now and then; a job that still has time is left alone."""
    job = await jobs.submit(document(environment=HOPELESS))
    await asyncio.sleep(TOO_LONG)
    fresh = await jobs.submit(document(environment=HOPELESS))
    ended = [each.id for each in await jobs.expire_waiting(HOPELESS, most=1000)]
    # In memory taking in the second one was a look at the first.
    assert isinstance(jobs, MemoryJobs) or job.id in ended
    assert fresh.id not in ended
    assert Status.EXPIRED_IN_QUEUE is (await only(jobs.find(by_id(job)))).status
    assert [] == await jobs.expire_waiting("nowhere") == await jobs.expire_waiting(ENVIRONMENT)


async def test_a_restarted_job_has_all_its_time_again(jobs: Jobs) -> None:
    """It counts from when it was queued the last time."""
    job = await jobs.submit(document(environment=HOPELESS))
    await asyncio.sleep(TOO_LONG)
    assert (await only(jobs.find(by_id(job)))).restartable
    queued = await jobs.restart(job.id)
    assert (Status.WARMING_UP, None) == (queued.status, queued.finished)
    await asyncio.sleep(TOO_LONG)
    again = await only(jobs.find(by_id(job)))
    expected = [Status.WARMING_UP, Status.EXPIRED_IN_QUEUE] * 2
    assert expected == [transition.status for transition in again.history]
    await jobs.delete(by_id(job))


# Only over Prefect.


async def taken(client: PrefectClient, job: Job) -> bool:
    """Whether a worker that has read the queue a moment ago gets this job now."""
    answer: OrchestrationResult[Any] = await client.set_flow_run_state(UUID(job.id), Pending())
    return answer.status is SetStateStatus.ACCEPT


@pytest.mark.server
async def test_a_job_told_as_expired_is_never_begun(prefect_jobs: PrefectJobs) -> None:
    """The server refuses it to a worker; and a job that a worker has got is not ended, however long it took."""
    late, in_time = [await prefect_jobs.submit(document(environment=HOPELESS)) for _ in range(2)]
    async with get_client() as client:
        assert await taken(client, in_time)
        await asyncio.sleep(TOO_LONG)
        assert Status.EXPIRED_IN_QUEUE is (await only(prefect_jobs.find(by_id(late)))).status
        assert not await taken(client, late)
    assert Status.EXPIRED_IN_QUEUE is (await only(prefect_jobs.find(by_id(late)))).status
    assert Status.WARMING_UP is (await only(prefect_jobs.find(by_id(in_time)))).status
    await prefect_jobs.delete(by_id(late))


@pytest.mark.server
async def test_a_worker_and_a_reader_at_the_same_time(prefect_jobs: PrefectJobs) -> None:
    """One of them has the job: what is told is what becomes of it."""
    waiting = [await prefect_jobs.submit(document(environment=HOPELESS)) for _ in range(6)]
    await asyncio.sleep(TOO_LONG)

    async def told(job: Job) -> Status:
        return (await only(prefect_jobs.find(by_id(job)))).status

    async with get_client() as client:
        for job in waiting:
            first, second, begun = await asyncio.gather(told(job), told(job), taken(client, job))
            after = await told(job)
            assert (Status.WARMING_UP if begun else Status.EXPIRED_IN_QUEUE) is after
            assert begun or not await taken(client, job)
            # Never expired and then alive again. Taken out by one, it may look as if taken to the other for a moment.
            assert Status.EXPIRED_IN_QUEUE not in (first, second) or after is Status.EXPIRED_IN_QUEUE


@pytest.mark.server
@pytest.mark.parametrize("looked_at", [True, False])
async def test_an_end_that_was_cut_off(prefect_jobs: PrefectJobs, looked_at: bool) -> None:
    """Taken out of the queue, and who did it is gone: the next that looks ends the job, or the next round does."""
    job = await prefect_jobs.submit(document(environment=HOPELESS))
    async with get_client() as client:
        await client.set_flow_run_state(UUID(job.id), taken_out_of_the_queue())
        assert not await taken(client, job)
    if looked_at:
        assert Status.EXPIRED_IN_QUEUE is (await only(prefect_jobs.find(by_id(job)))).status
    else:
        assert job.id in [each.id for each in await prefect_jobs.expire_waiting(HOPELESS, most=1000)]
    await prefect_jobs.delete(by_id(job))


@pytest.mark.server
async def test_nothing_is_left_of_what_has_expired(prefect_jobs: PrefectJobs) -> None:
    """Neither results nor a document too large for Prefect, without which a restart needs another one."""
    wanted = document(environment=FADING, rawcode=large())
    job = await prefect_jobs.submit(wanted)
    await published(prefect_jobs, job)
    stopped = await only(prefect_jobs.stop(by_id(job)))
    assert stored(job.id)
    await past(stopped)
    await prefect_jobs.expire(FADING, most=1000)
    assert not [path for path in state_folder().rglob("*") if path.is_file() and job.id in str(path)]
    with pytest.raises(NotRestartable, match="send it along"):
        await prefect_jobs.restart(job.id)
    assert Status.WARMING_UP is (await prefect_jobs.restart(job.id, wanted)).status
    await prefect_jobs.delete(by_id(job))


@pytest.mark.server
async def test_a_removal_that_was_cut_off(prefect_jobs: PrefectJobs) -> None:
    """Meanwhile the job is not restarted; after a while another takes it up."""
    job = await ended(prefect_jobs, environment=FADING)
    await past(job)
    async with get_client() as client:
        tags = (await client.read_flow_run(UUID(job.id))).tags
        await client.update_flow_run(UUID(job.id), tags=[*tags, f"{REMOVING}{time.time():.0f}"])
        with pytest.raises(NotReady, match="being removed"):
            await prefect_jobs.restart(job.id)
        assert job.id not in [each.id for each in (await prefect_jobs.expire(FADING, most=1000)).removed]
        await client.update_flow_run(UUID(job.id), tags=[*tags, f"{REMOVING}{time.time() - 2 * REMOVAL_SECONDS:.0f}"])
        assert [job.id] == [each.id for each in (await prefect_jobs.expire(FADING, most=1000)).removed]
        assert {*tags} - {KEPT} == {*(await client.read_flow_run(UUID(job.id))).tags}
    assert Status.WARMING_UP is (await prefect_jobs.restart(job.id)).status
    await prefect_jobs.delete(by_id(job))


@pytest.mark.server
async def test_a_deletion_that_cannot_be_finished(
    prefect_jobs: PrefectJobs, prefect_server: PrefectServer, tmp_path: Path
) -> None:
    """
    While a store is away it is NotReady, however often it is asked for, and the job stays unknown; it is finished once
    the store is back. Meanwhile nothing of the job expires.
    """
    job = await ended(prefect_jobs, environment=FADING)
    await past(job)
    async with get_client() as client:
        block = (await load_environments(client))[FADING]
        (tmp_path / "file").touch()
        away = block.model_copy(update={"results": f"file://{tmp_path}/file/results"})
        await away.save(FADING, overwrite=True)
        try:
            async with over_prefect(prefect_server) as others:
                for _ in range(2):
                    with pytest.raises(NotReady, match="store"):
                        await others.delete(by_id(job))
                assert [job.id] == [each.id for each in (await others.finish_deletions()).failed]
                assert [] == await others.find(by_id(job))
                assert job.id not in [each.id for each in (await others.expire(FADING)).failed]
        finally:
            await block.save(FADING, overwrite=True)
    async with over_prefect(prefect_server) as others:
        assert Status.DELETED is (await only(others.delete(by_id(job)))).status
        assert [] == await others.delete(by_id(job))
    assert not stored(job.id)


async def stage_run(client: PrefectClient, job: Job, index: int, environment: str) -> UUID:
    """A run that does a stage of *job*, as the job's own run would begin it."""
    deployment = await client.read_deployment_by_name(f"{FLOW_NAME}/{environment}")
    run = await client.create_flow_run_from_deployment(
        deployment.id,
        parameters={"sealed": "", "summary": {"environments": [environment]}, "job": job.id, "stage": index},
        state=Scheduled(),
        tags=[job_tag(job.id), f"environment:{environment}"],
        work_queue_name=environment,
    )
    return run.id


@pytest.mark.server
async def test_runs_of_stages_are_no_jobs(prefect_server: PrefectServer) -> None:
    """
    They cannot be asked for. Each counts in its environment, and the job in none; the job says what they wait for.
    They are stopped with it, and deleted with it.
    """
    async with over_prefect(prefect_server) as jobs, over_prefect(prefect_server) as later, get_client() as client:
        before = {state.offer.id: state.waiting for state in await jobs.environments()}
        job = await jobs.submit(spread(ENVIRONMENT, FADING))
        runs = [await stage_run(client, job, n, name) for n, name in enumerate((ENVIRONMENT, FADING))]
        after = {state.offer.id: state.waiting for state in await later.environments()}
        assert [1, 1] == [after[name] - before[name] for name in (ENVIRONMENT, FADING)]
        for run_id in runs:
            assert [] == await jobs.find(JobQuery(job_id=run_id.hex)) == await jobs.delete(JobQuery(job_id=run_id.hex))
            with pytest.raises(JobNotFound):
                await jobs.restart(run_id.hex)
        assert {run_id.hex for run_id in runs}.isdisjoint(each.id for each in await jobs.running())
        told = await only(jobs.find(by_id(job)))
        assert "stage 0 is waiting for a worker" in told.reason and "; stage 1 is waiting for a worker" in told.reason
        assert Status.STOPPED is (await only(jobs.stop(by_id(job)))).status
        states = [(await client.read_flow_run(run_id)).state for run_id in runs]
        assert [StateType.CANCELLED] * 2 == [state.type for state in states if state is not None]
        await jobs.delete(by_id(job))
        for run_id in runs:
            with pytest.raises(ObjectNotFound):
                await client.read_flow_run(run_id)


@pytest.mark.server
async def test_what_was_handed_over_is_swept(prefect_jobs: PrefectJobs) -> None:
    """Of jobs that are completed, or no more, where nobody did it when they ended; not of those that may go on."""
    async with get_client() as client:
        store = (await load_environments(client))[FADING].handover()
        going, done = [await prefect_jobs.submit(spread(ENVIRONMENT, FADING)) for _ in range(2)]
        await client.set_flow_run_state(UUID(done.id), Completed(name="Job completed"), force=True)
    unknown = uuid4().hex
    for job_id in (going.id, done.id, unknown):
        store.put_bytes(job_id, "0/output/0", b"x")
    assert {done.id, unknown} <= set(await prefect_jobs.sweep_handovers(FADING))
    assert [True, False, False] == [store.exists(each, "0/output/0") for each in (going.id, done.id, unknown)]
    await prefect_jobs.delete(by_id(going))
    assert going.id not in list(store.jobs())
    await prefect_jobs.delete(by_id(done))


@pytest.mark.server
async def test_a_stop_that_was_cut_off(prefect_jobs: PrefectJobs) -> None:
    """Taken out of the queue to be stopped, and who did it is gone: the next that looks stops the job."""
    job = await prefect_jobs.submit(document())
    async with get_client() as client:
        await client.set_flow_run_state(UUID(job.id), taken_out_of_the_queue(STOPPED_IN_QUEUE))
        assert not await taken(client, job)
    told = await only(prefect_jobs.find(by_id(job)))
    assert (Status.STOPPED, 1, "stopped on request") == (told.status, told.stop_request, told.reason)
    await prefect_jobs.delete(by_id(job))


@pytest.mark.server
async def test_a_worker_and_a_stop_at_the_same_time(prefect_jobs: PrefectJobs) -> None:
    """Whichever comes first: a job told as stopped is not given to a worker any more."""
    waiting = [await prefect_jobs.submit(document()) for _ in range(6)]
    async with get_client() as client:
        for job in waiting:
            begun, _ = await asyncio.gather(taken(client, job), stopped_or_asked_to(prefect_jobs, job))
            if not begun:
                assert Status.STOPPED is (await only(prefect_jobs.find(by_id(job)))).status
                assert not await taken(client, job)


async def stopped_or_asked_to(jobs: Jobs, job: Job) -> None:
    """A job that a worker has got is not waited for here: there is none that would end it."""
    with suppress(TimeoutError):
        async with asyncio.timeout(2.0):
            await jobs.stop(by_id(job))


@pytest.mark.server
async def test_prefect_keeps_nothing_of_a_deleted_job(prefect_jobs: PrefectJobs, prefect_server: PrefectServer) -> None:
    """Nor artifacts, which Prefect leaves when their run is deleted; those of other jobs stay."""
    job, other = [await prefect_jobs.submit(document()) for _ in range(2)]
    async with PrefectClient(prefect_server.api) as client:
        for run_id in (UUID(job.id), UUID(other.id)):
            for n in range(3):
                artifact = ArtifactCreate(key=f"results-{n}", type="table", data="[]", flow_run_id=run_id)
                await client.create_artifact(artifact)
        await prefect_jobs.delete(by_id(job))
        counts = [
            len(
                await client.read_artifacts(
                    artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[UUID(each.id)]))
                )
            )
            for each in (job, other)
        ]
    assert [0, 3] == counts
    await prefect_jobs.delete(by_id(other))


@pytest.mark.server
async def test_a_job_whose_environment_is_not_registered_any_more(
    prefect_jobs: PrefectJobs, prefect_server: PrefectServer
) -> None:
    """Nothing says for how long it is to be kept: nothing is removed, and it is counted."""
    job = await ended(prefect_jobs, environment=FADING)
    before = await prefect_jobs.unattended()
    async with get_client() as client:
        tags = (await client.read_flow_run(UUID(job.id))).tags
        await client.update_flow_run(
            UUID(job.id), tags=[tag for tag in tags if not tag.startswith("environment:")] + ["environment:gone"]
        )
    assert before + 1 == await prefect_jobs.unattended()
    assert Expiry() == await prefect_jobs.expire("gone")
    assert stored(job.id)
    async with get_client() as client:
        await client.update_flow_run(UUID(job.id), tags=tags)
    await prefect_jobs.delete(by_id(job))


@pytest.mark.server
async def test_a_job_outlives_who_took_it_in(prefect_jobs: PrefectJobs, prefect_server: PrefectServer) -> None:
    """What one instance took in, another one knows: nothing is kept but in Prefect."""
    job = await prefect_jobs.submit(document())
    async with over_prefect(prefect_server) as others:
        assert [job] == await others.find(by_id(job))
        await others.delete(by_id(job))
    assert [] == await prefect_jobs.find(by_id(job))


@pytest.mark.server
async def test_ten_instances_at_once_are_one_job(prefect_server: PrefectServer) -> None:
    """Nor does it matter which instance a request reaches: Prefect's database decides."""
    wanted = document()

    async def submit() -> str:
        async with over_prefect(prefect_server) as instance:
            return (await instance.submit(wanted)).id

    assert 1 == len(set(await asyncio.gather(*(submit() for _ in range(10)))))


def full_of_secrets(code: str = "") -> Workflow:
    return document(
        input=[data("a", f"https://{MARKER}.example/a?token={MARKER}")],
        url=f"https://a.example/{MARKER}",
        rawcode=f"# {MARKER}\n{code}",
        algorithm={
            "algouserdata": {"token": MARKER, MARKER: 1},
            "algocustomdata": [MARKER],
            "envs": {"TOKEN": MARKER},
        },
    )


@pytest.mark.server
@pytest.mark.parametrize("code", ["", "large"], ids=["in parameters", "in the store"])
async def test_no_secret_reaches_prefect(prefect_jobs: PrefectJobs, prefect_server: PrefectServer, code: str) -> None:
    """Neither Prefect's database nor its API shows a word of URLs, code, user data or variables."""
    job = await prefect_jobs.submit(full_of_secrets(large() if code else ""))
    async with httpx.AsyncClient(base_url=prefect_server.api) as http:
        shown = (await http.get(f"/flow_runs/{UUID(job.id)}")).raise_for_status().text
    stored = b"".join(path.read_bytes() for path in prefect_server.database.parent.glob("prefect.db*"))
    assert job.agreement_id in shown and job.agreement_id.encode() in stored
    assert MARKER not in shown
    assert MARKER.encode() not in stored
    assert not [path for path in state_folder().rglob("*") if path.is_file() and MARKER.encode() in path.read_bytes()]
    await prefect_jobs.delete(by_id(job))


async def sealed_of(server: PrefectServer, job: Job) -> Any:
    """What a worker opens for this job, read where it would read it."""
    async with PrefectClient(server.api) as client:
        parameters = (await client.read_flow_run(UUID(job.id))).parameters
    seal = Seal.from_file(server.key_file)
    if "stored_in" not in parameters:
        return seal.open(parameters["sealed"])
    (file,) = stored(parameters["sealed"])
    return seal.open(file.read_text())


def stored(name: str) -> list[Path]:
    return [path for path in state_folder().rglob("*") if path.is_file() and name in str(path)]


@pytest.mark.server
@pytest.mark.parametrize("code", ["print('small')", large()], ids=["small", "large"])
async def test_a_worker_opens_what_was_taken_in(
    prefect_jobs: PrefectJobs, prefect_server: PrefectServer, code: str
) -> None:
    """What is sealed for a worker is the document, and stays it when another one is refused under its agreement."""
    wanted = document(rawcode=code)
    job = await prefect_jobs.submit(wanted)
    assert wanted == parse_workflow(await sealed_of(prefect_server, job))
    with pytest.raises(AgreementInUse):
        await prefect_jobs.submit(document(agreement=job.agreement_id, owner=job.owner, rawcode=f"{code}#"))
    assert wanted == parse_workflow(await sealed_of(prefect_server, job))


@pytest.mark.server
async def test_nothing_is_left_of_large_documents(prefect_jobs: PrefectJobs) -> None:
    """A document kept in the store goes with its job, and one that was refused leaves none there."""

    def files() -> set[Path]:
        return {path for path in state_folder().rglob("*") if path.is_file()}

    before = files()
    job = await prefect_jobs.submit(document(rawcode=large()))
    assert 1 == len(files() - before)
    with pytest.raises(AgreementInUse):
        await prefect_jobs.submit(document(agreement=job.agreement_id, rawcode=f"{large()}#"))
    assert 1 == len(files() - before)
    await prefect_jobs.stop(by_id(job))
    for refused in (document(), document(agreement=job.agreement_id, rawcode=f"{large()}#")):
        with pytest.raises(InvalidParameter):
            await prefect_jobs.restart(job.id, refused)
    await prefect_jobs.restart(job.id, document(agreement=job.agreement_id, owner=job.owner, rawcode=f"{large()}#"))
    assert 1 == len(files() - before)
    await prefect_jobs.stop(by_id(job))
    await prefect_jobs.restart(job.id, document(agreement=job.agreement_id, owner=job.owner))
    assert before == files()
    await prefect_jobs.delete(by_id(job))
    assert before == files()


@pytest.mark.server
async def test_without_a_server(tmp_path: Path) -> None:
    """A Prefect server that cannot be reached is told as such, not as a traceback."""
    create_key_file(tmp_path / "key")
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api"}):
        async with get_client() as client:
            away = PrefectJobs(client, Seal.from_file(tmp_path / "key"))
            for call in (
                away.submit(document()),
                away.find(JobQuery(owner="0x1")),
                away.running(),
                away.environments(),
            ):
                with pytest.raises(NotReady):
                    await call
