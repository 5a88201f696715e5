"""What a job is, what can be asked of the jobs there are, and a small real implementation in memory."""

from __future__ import annotations

import hashlib
import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from typing import Any

from blocks.limits import Offer
from flows.errors import (
    AgreementInUse,
    InvalidParameter,
    JobNotFound,
    NoSuchResult,
    NotReady,
    NotRestartable,
    ResultsExpired,
)
from flows.plan import Plan, compile_plan
from flows.status import TERMINAL, TEXT, Status
from flows.workflow import Workflow


class StopRequest(IntEnum):
    """``stopreq`` on the wire."""

    NONE = 0
    STOP = 1
    TIMED_OUT = 2


@dataclass(frozen=True)
class Transition:
    """A status a job has had. Polling can miss a short one; this list cannot."""

    status: Status
    at: datetime
    stage: int | None = None


@dataclass(frozen=True)
class Result:
    """One file a job has published; its place in ``Job.results`` is its index on the wire."""

    filename: str
    """Relative, ``/``-separated; prefixed with ``<stage>/`` where several stages have published."""
    filesize: int
    media_type: str
    kind: str
    """output, algorithmLog, configrationLog (spelled so on the wire), filteringLog, publishLog."""
    sha256: str


ADMIN_KINDS = frozenset({"configrationLog", "publishLog"})
"""Logs for admins only; spec 000 "Status"."""


@dataclass(frozen=True)
class Job:
    """A job as every dialect tells of it. Times are UTC."""

    id: str
    """32 hex digits."""
    owner: str
    agreement_id: str
    environment: str
    """That of the first stage."""
    status: Status
    created: datetime
    finished: datetime | None = None
    expires: datetime | None = None
    """When its results are gone; None while it runs, and while its environment is not registered."""
    expired: bool = False
    """Whether they are. ``results`` is empty then, whatever there was."""
    detail: str = ""
    """Follows the status text where the table says that the text tells which, as in 41."""
    reason: str = ""
    """Why the job is where it is and what comes next; never empty while it runs."""
    stopped_in: Status = Status.WARMING_UP
    """For a stopped or deleted job: the last status before."""
    stage: int | None = None
    stages: int = 1
    progress: float = 0.0
    """0 to 1: the share of the steps that are done, with the bytes of the running fetch counted in."""
    seconds_left: float | None = None
    """What the running fetch still takes, estimated; None where nothing is fetched or nobody can say."""
    history: tuple[Transition, ...] = ()
    results: tuple[Result, ...] = ()
    stop_request: StopRequest = StopRequest.NONE
    removed: bool = False
    algorithm_did: str | None = None
    input_dids: tuple[str, ...] = ()
    document_id: str = ""
    """The main data set: the id of the first input of the first stage; empty if there is none."""
    whitelist: tuple[str, ...] = ()
    """Addresses, in lower case, that may have the results beside the owner."""
    gpus: Mapping[str, int] = field(default_factory=dict)
    """That its algorithms have at this moment, by environment."""
    places: Mapping[int, str] = field(default_factory=dict)
    """The environment of each stage, by its index; empty where all are in ``environment``."""

    @property
    def environments(self) -> tuple[str, ...]:
        """Each environment that a stage is in, once; that of the first stage first."""
        return tuple(dict.fromkeys((self.environment, *self.places.values())))

    @property
    def text(self) -> str:
        """``statusText``."""
        return f"{TEXT[self.status]}: {self.detail}" if self.detail else TEXT[self.status]

    @property
    def ended(self) -> bool:
        return self.status in TERMINAL

    @property
    def restartable(self) -> bool:
        """Whether it was stopped or has failed, so that there is something left of it to do."""
        return self.ended and self.status not in (Status.COMPLETED, Status.DELETED)


@dataclass(frozen=True)
class Expiry:
    """What one round of ``Jobs.expire`` or ``Jobs.finish_deletions`` has come to."""

    removed: tuple[Job, ...] = ()
    failed: tuple[Job, ...] = ()
    """The store did not remove what these left, or not all of it; the next round tries again."""


@dataclass(frozen=True)
class JobQuery:
    """Which jobs are meant: those that match every part that is given. Nothing given matches nothing."""

    job_id: str | None = None
    agreement_id: str | None = None
    owner: str | None = None
    document_id: str | None = None
    """Matches ``Job.document_id``."""

    @property
    def empty(self) -> bool:
        return not (self.job_id or self.agreement_id or self.owner or self.document_id)

    def matches(self, job: Job) -> bool:
        return (
            not self.empty
            and (not self.job_id or self.job_id == job.id)
            and (not self.agreement_id or self.agreement_id == job.agreement_id)
            and (not self.owner or self.owner.lower() == job.owner.lower())
            and (not self.document_id or self.document_id == job.document_id)
        )


def parse_job_id(text: str) -> str:
    """
    32 hex digits, in lower case.

    Raises:
        InvalidParameter: Anything else. A short id is refused, never read as absent: in the original system a
            one-letter id stopped all of an owner's jobs.
    """
    value = text.lower()
    if len(value) != 32 or any(c not in "0123456789abcdef" for c in value):
        raise InvalidParameter("jobId must be 32 hexadecimal digits")
    return value


def document_digest(workflow: Workflow) -> bytes:
    """SHA-256 of what the document says, independent of its spelling. Tells a repeat from another job."""
    # Without the documents of assets, which metadata stores write anew with every order that is made.
    documents = {"stages": {"__all__": {"input": {"__all__": {"ddo"}}}}}
    said = {
        **workflow.model_dump(mode="json", exclude=documents),
        "owner": workflow.owner.lower(),
    }  # addresses have no case
    canonical = json.dumps(said, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).digest()


@dataclass(frozen=True)
class EnvironmentState:
    """An environment on offer and how busy it is."""

    offer: Offer
    running: int
    waiting: int
    last_seen: datetime | None
    """When a worker of its pool last reported; None: never."""
    free_gpus: int = 0
    """Those of its GPUs that no job has at this moment."""
    obstacle: str | None = None
    """Why it cannot run jobs at present; None when it can."""


class Jobs(ABC):
    """
    The jobs of this service. Every implementation passes ``tests/test_jobs_contract.py``.

    Every method may raise NotReady when what it relies on cannot be reached.
    """

    @abstractmethod
    async def submit(self, workflow: Workflow) -> Job:
        """
        Take a job in: durable when this returns, and nothing else waits for it.

        The same agreement and document again, at the same time or later, answers the one job there is.

        Raises:
            InvalidWorkflow: Every problem of the document.
            AgreementInUse: Another document already has this agreement.
            NotReady: So does a job that is still being deleted.
        """

    @abstractmethod
    async def find(self, query: JobQuery) -> list[Job]:
        """Jobs that match, oldest first; an empty list when none does."""

    @abstractmethod
    async def running(self) -> list[Job]:
        """Every job that has not ended, oldest first."""

    @abstractmethod
    async def stop(self, query: JobQuery) -> list[Job]:
        """
        End the matching jobs that have not ended and answer all matching, as they are afterwards.

        A job that has ended is left as it is. Returns once the algorithm is gone, or after a deadline with
        ``stop_request`` set.
        """

    @abstractmethod
    async def restart(self, job_id: str, workflow: Workflow | None = None) -> Job:
        """
        Queue a job that was stopped or has failed again, under its id; steps that had finished are not done again.

        *workflow* takes the place of its document, and what it changes is done anew with all that follows from it.
        Several calls at the same time begin it once.

        Raises:
            JobNotFound
            NotRestartable: It is still going, or completed; or its document has expired and there is no *workflow*.
            InvalidWorkflow: Every problem of *workflow*.
            InvalidParameter: *workflow* has another agreement or owner than the job, or other environments.
        """

    @abstractmethod
    async def delete(self, query: JobQuery) -> list[Job]:
        """
        Stop the matching jobs, then remove them with everything they left; answers each as DELETED.

        From the first moment on they are unknown to all other methods. What cannot be removed is NotReady, and stays
        so until a repeat of this, or ``finish_deletions``, has done it; only then its agreement is free.
        """

    @abstractmethod
    async def finish_deletions(self, *environments: str, most: int = 100) -> Expiry:
        """
        Take up at most *most* of the deletions that were begun and not finished, of jobs of these *environments*; of
        all if none is named. May be called as often as one likes, and in several places at once.
        """

    @abstractmethod
    async def environments(self) -> list[EnvironmentState]:
        """What is on offer, by id."""

    @abstractmethod
    async def expire_waiting(self, environment: str, *, most: int = 100) -> list[Job]:
        """
        End the jobs of *environment* that have waited for longer than its ``max_wait`` and that nobody has looked at
        since; who looks at one ends it. At most *most*, the oldest first; answers those.
        """

    @abstractmethod
    async def expire(self, environment: str, *, grace: float = 0.0, most: int = 100) -> Expiry:
        """
        Remove from the stores what the jobs of *environment* left that expired *grace* seconds ago or earlier. Their
        records stay.

        Each job is dealt with once for each time it has ended, *most* jobs at a time. A job that is going, or that is
        restarted at this moment, is left alone. An environment that is not registered has no jobs here.
        """

    @abstractmethod
    async def link(self, job_id: str, index: int, disposition: str, media_type: str) -> str | None:
        """
        A URL at which a result can be had from its store, for a short time and by whoever has the URL, with these
        headers Content-Disposition and Content-Type. None where the job's environment wants it to be had here; then
        ``read`` tells whether it can be.

        Raises:
            JobNotFound, NoSuchResult, ResultsExpired.
        """

    @abstractmethod
    async def read(self, job_id: str, index: int, start: int, end: int) -> Iterator[bytes]:
        """
        Bytes *start* to *end* (exclusive) of a result, in chunks. The iterator blocks.

        Raises:
            JobNotFound, NoSuchResult, ResultsExpired.
        """


async def only_job(jobs: Jobs, job_id: str) -> Job:
    """The job with this id. Raises JobNotFound."""
    found = await jobs.find(JobQuery(job_id=job_id))
    if not found:
        raise JobNotFound(f"No job {job_id}")
    return found[0]


def expiry_of(job: Job, offers: Mapping[str, Offer]) -> datetime | None:
    """
    When the results of *job* expire by what its environments offer now; ``Job.expires``.

    All of them at once, when the first of its environments lets go of them; None if that cannot be known.
    """
    if job.finished is None or not all(name in offers for name in job.environments):
        return None
    return job.finished + timedelta(seconds=min(offers[name].storage_expiry for name in job.environments))


def overdue(since: datetime, offer: Offer | None, now: datetime) -> bool:
    """Whether a job that was queued at *since* has waited for longer than its environment lets it."""
    return offer is not None and 0 < offer.max_wait < (now - since).total_seconds()


def waited_too_long(offer: Offer) -> str:
    """Why a job has expired in the queue, and what can be done."""
    return f"its turn in `{offer.id}` did not come within {offer.max_wait} s; restart it to queue it again"


def as_of(job: Job, now: datetime) -> Job:
    """
    *job* as it may be told of at *now*: without results once they have expired.

    Told so on the second, whether or not anybody has removed them yet.
    """
    if job.expires is None or now < job.expires or job.expired:
        return job
    return replace(job, expired=True, results=(), reason=f"{job.reason}; its results expired at {_second(job.expires)}")


def results_expired(job: Job) -> ResultsExpired:
    """Since when there is nothing to be had of an expired *job*."""
    assert job.expires is not None  # noqa: S101  # for mypy: it has expired
    return ResultsExpired(
        f"The results of job {job.id} expired at {_second(job.expires)}; submit a new job under another agreement to "
        "compute them again"
    )


def _second(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


def not_restartable(job: Job) -> NotRestartable:
    """Why *job* cannot be restarted and what can be done instead."""
    if job.ended:
        return NotRestartable(
            f"Job {job.id} has ended as `{job.text}`, so there is nothing to restart; submit a new job under another "
            "agreement to compute it again"
        )
    return NotRestartable(f"Job {job.id} is still going (`{job.text}`); stop it, or wait until it has ended")


def check_takes_over(job: Job, plan: Plan) -> None:
    """
    Whether *plan* may become that of *job*.

    Raises:
        InvalidParameter: It is somebody else's, another job's, or to be run elsewhere.
    """
    if plan.agreement_id != job.agreement_id:
        raise InvalidParameter("agreementId: a job is restarted under its own agreement; the workflow names another")
    if plan.owner.lower() != job.owner.lower():
        raise InvalidParameter("owner: a job is restarted for its own owner; the workflow names another")
    if job.places and job.places != places_of(plan):
        raise InvalidParameter(
            "workflow: a job in several environments is restarted where it was; the workflow has other stages, or has "
            "them in other environments"
        )
    if not job.places and plan.environments != (job.environment,):
        raise InvalidParameter(
            f"workflow: a job is restarted where it was; its environment is `{job.environment}`, the workflow names "
            "another"
        )


def places_of(plan: Plan) -> dict[int, str]:
    """``Job.places``."""
    several = len(plan.environments) > 1
    return {stage.index: stage.environment for stage in plan.stages} if several else {}


def summary_of(plan: Plan) -> Mapping[str, Any]:
    """What may be read in clear of a sealed document: names and numbers, no URL, code or user data."""
    stages = plan.stages
    return {
        "agreement": plan.agreement_id,
        "owner": plan.owner,
        "environments": list(plan.environments),
        "places": {str(index): environment for index, environment in places_of(plan).items()},
        "stages": [stage.index for stage in stages],
        "seconds": {str(stage.index): stage.limits.seconds for stage in stages},
        "gpus": {str(stage.index): stage.limits.gpus for stage in stages if stage.limits.gpus},
        "inputs": [planned.id for stage in stages for planned in stage.inputs if planned.stage is None],
        "document": next((planned.id for planned in stages[0].inputs), ""),
        "whitelist": list(plan.whitelist),
        "urls": sum(len(planned.files) for stage in stages for planned in stage.inputs),
        "algorithm": next((stage.algorithm_id for stage in stages if stage.algorithm_id), None),
        "image": f"{stages[-1].container.image}:{stages[-1].container.tag}",
    }


def _told_by(plan: Plan) -> dict[str, Any]:
    """Fields of a job that its document tells."""
    summary = summary_of(plan)
    return {
        "stages": len(plan.stages),
        "algorithm_did": summary["algorithm"],
        "input_dids": tuple(summary["inputs"]),
        "document_id": summary["document"],
        "whitelist": tuple(summary["whitelist"]),
        "places": places_of(plan),
    }


@dataclass
class MemoryJobs(Jobs):
    """
    Jobs in memory, moved by the caller instead of by a flow: for tests of what stands above.

    Not safe over threads; one event loop only.
    """

    offers: Mapping[str, Offer]
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    _jobs: dict[str, Job] = field(default_factory=dict)
    _digests: dict[str, bytes] = field(default_factory=dict)
    _bodies: dict[tuple[str, int], bytes] = field(default_factory=dict)
    _kept: set[str] = field(default_factory=set)
    """Jobs that may have left something."""
    _deleting: dict[str, Job] = field(default_factory=dict)
    """Jobs whose deletion was begun: no jobs any more, but for their agreements."""

    async def submit(self, workflow: Workflow) -> Job:
        plan = compile_plan(workflow, self.offers)
        digest = document_digest(workflow)
        self._end_overdue()
        if any(job.agreement_id == plan.agreement_id for job in self._deleting.values()):
            raise NotReady("The job that had this agreement is still being deleted; try again in a moment.")
        for job in self._jobs.values():
            if job.agreement_id == plan.agreement_id:
                if self._digests[job.id] != digest:
                    raise AgreementInUse
                return as_of(job, self.now())
        at = self.now()
        job = Job(
            id=uuid.uuid4().hex,
            owner=plan.owner,
            agreement_id=plan.agreement_id,
            environment=plan.stages[0].environment,
            status=Status.WARMING_UP,
            created=at,
            reason="waiting for a worker",
            history=(Transition(Status.WARMING_UP, at),),
            **_told_by(plan),
        )
        self._jobs[job.id] = job
        self._digests[job.id] = digest
        self._kept.add(job.id)
        return job

    def move(self, job_id: str, status: Status, *, detail: str = "", reason: str = "") -> Job:
        """Bring a job to *status*, as its flow would."""
        at = self.now()
        job = self._jobs[job_id]
        moved = replace(
            job,
            status=status,
            detail=detail,
            reason=reason or TEXT[status],
            finished=at if status in TERMINAL else None,
            stopped_in=job.status,
            progress=1.0 if status is Status.COMPLETED else job.progress,
            history=(*job.history, Transition(status, at)),
            stop_request=StopRequest.STOP if status is Status.STOPPED else job.stop_request,
        )
        self._jobs[job_id] = moved = replace(moved, expires=expiry_of(moved, self.offers))
        return as_of(moved, at)

    def publish(self, job_id: str, results: Iterable[tuple[Result, bytes]]) -> None:
        """Give a job results, in their order on the wire."""
        pairs = list(results)
        self._jobs[job_id] = replace(self._jobs[job_id], results=tuple(result for result, _ in pairs))
        for index, (_, body) in enumerate(pairs):
            self._bodies[job_id, index] = body

    def _end_overdue(self) -> list[Job]:
        """Who looks at a job that has waited for too long ends it."""
        now = self.now()
        found = [
            (job, offer)
            for job in self._jobs.values()
            if job.status is Status.WARMING_UP
            and (offer := self.offers.get(job.environment)) is not None
            and overdue(job.history[-1].at, offer, now)
        ]
        return [self.move(job.id, Status.EXPIRED_IN_QUEUE, reason=waited_too_long(offer)) for job, offer in found]

    async def find(self, query: JobQuery) -> list[Job]:
        self._end_overdue()
        now = self.now()
        found = sorted((job for job in self._jobs.values() if query.matches(job)), key=lambda job: job.created)
        return [as_of(job, now) for job in found]

    async def running(self) -> list[Job]:
        self._end_overdue()
        return sorted((job for job in self._jobs.values() if not job.ended), key=lambda job: job.created)

    async def stop(self, query: JobQuery) -> list[Job]:
        for job in await self.find(query):
            if not job.ended:
                self.move(job.id, Status.STOPPED, reason="stopped on request")
        return await self.find(query)

    async def restart(self, job_id: str, workflow: Workflow | None = None) -> Job:
        await only_job(self, job_id)
        job = self._jobs[job_id]
        if not job.restartable:
            raise not_restartable(job)
        changes: dict[str, Any] = {}
        if workflow is not None:
            plan = compile_plan(workflow, self.offers)
            check_takes_over(job, plan)
            changes = _told_by(plan)
            self._digests[job_id] = document_digest(workflow)
        self._bodies = {key: body for key, body in self._bodies.items() if key[0] != job_id}
        self._jobs[job_id] = replace(
            job,
            status=Status.WARMING_UP,
            detail="",
            reason="waiting for a worker",
            finished=None,
            expires=None,
            stopped_in=Status.WARMING_UP,
            stage=None,
            progress=0.0,
            history=(*job.history, Transition(Status.WARMING_UP, self.now())),
            results=(),
            stop_request=StopRequest.NONE,
            **changes,
        )
        self._kept.add(job_id)
        return self._jobs[job_id]

    def begin_deletion(self, job_id: str) -> None:
        """The first half of a deletion: as it is left when it is cut off."""
        self._deleting[job_id] = self._jobs.pop(job_id)

    async def delete(self, query: JobQuery) -> list[Job]:
        for job in await self.find(query):
            self.begin_deletion(job.id)
        return [self._remove(job) for job in list(self._deleting.values()) if query.matches(job)]

    async def finish_deletions(self, *environments: str, most: int = 100) -> Expiry:
        begun = [job for job in self._deleting.values() if not environments or {*job.environments} & {*environments}]
        return Expiry(tuple(self._remove(job) for job in begun[:most]))

    def _remove(self, job: Job) -> Job:
        self._jobs[job.id] = self._deleting.pop(job.id)
        last = job.stopped_in if job.status is Status.STOPPED else job.status
        if not job.ended:
            self.move(job.id, Status.STOPPED)
        gone = self.move(job.id, Status.DELETED)
        del self._jobs[job.id], self._digests[job.id]
        self._bodies = {key: body for key, body in self._bodies.items() if key[0] != job.id}
        return replace(gone, stopped_in=last, removed=True, results=(), expires=None, expired=False)

    async def expire_waiting(self, environment: str, *, most: int = 100) -> list[Job]:
        return [job for job in self._end_overdue() if job.environment == environment][:most]

    async def expire(self, environment: str, *, grace: float = 0.0, most: int = 100) -> Expiry:
        before = self.now() - timedelta(seconds=grace)
        found = [as_of(job, before) for job in self._jobs.values() if environment in job.environments]
        expired = [job for job in found if job.expired and job.id in self._kept][:most]
        gone = {job.id for job in expired}
        self._kept -= gone
        self._bodies = {key: body for key, body in self._bodies.items() if key[0] not in gone}
        return Expiry(removed=tuple(expired))

    async def environments(self) -> list[EnvironmentState]:
        return [
            EnvironmentState(offer=offer, running=0, waiting=0, last_seen=self.now())
            for _, offer in sorted(self.offers.items())
        ]

    async def read(self, job_id: str, index: int, start: int, end: int) -> Iterator[bytes]:
        job = await only_job(self, job_id)
        if job.expired:
            raise results_expired(job)
        if (job_id, index) not in self._bodies:
            raise NoSuchResult(f"No such index {index} in this compute job")
        return iter([self._bodies[job_id, index][start:end]])

    async def link(self, job_id: str, index: int, disposition: str, media_type: str) -> str | None:
        return None
