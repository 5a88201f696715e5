"""Spellings: a job, a result and an environment as each dialect writes them. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, Field

from blocks.limits import GIB
from flows.errors import MissingParameter, Problem, UnknownEnvironment
from flows.jobs import ADMIN_KINDS, EnvironmentState, Job, Result
from flows.status import TEXT, Dialect, Status, project


@dataclass(frozen=True)
class View:
    """
    What one caller may see. *link* makes the URL of a job's result by its index; None: no URLs. *kinds* are those of
    the results that are named at all; None: every one that is not for admins.
    """

    link: Callable[[Job, int], str] | None
    admin: bool = False
    kinds: frozenset[str] | None = None

    def results(self, job: Job) -> Iterator[tuple[int, Result]]:
        """The visible results, with their index among all."""
        return (
            (index, result)
            for index, result in enumerate(job.results)
            if (self.admin or result.kind not in ADMIN_KINDS) and (self.kinds is None or result.kind in self.kinds)
        )

    def urls(self, job: Job, kind: str) -> list[str]:
        if self.link is None:
            return []
        return [self.link(job, index) for index, result in self.results(job) if result.kind == kind]


Timestamp = Annotated[str, Field(examples=["1795328887.590750"])]
"""Unix time, decimal seconds as a string. The documents print ISO times; real clients parse a number."""


def timestamp(at: datetime) -> str:
    return f"{at.timestamp():.6f}"


class Passage(BaseModel):
    """One status a job has had."""

    status: int
    statusText: str
    at: Timestamp
    stage: int | None


class JobStatus(BaseModel):
    """What every status object tells; the last six and *expireTimestamp* are not in the documents."""

    owner: str
    agreementId: str
    jobId: str
    dateCreated: Timestamp
    dateFinished: Timestamp | None = Field(description="null until the job has ended, whatever became of it")
    expireTimestamp: Timestamp | None = Field(description="When its results are gone; null until the job has ended")
    status: int
    statusText: str
    reason: str = Field(description="Why the job is where it is and what comes next")
    progress: float = Field(description="0 to 1")
    secondsLeft: float | None = Field(description="Of fetching inputs or image, estimated; null at all other times")
    stage: int | None
    stages: int
    history: list[Passage]


class EarlyStatus(JobStatus):
    """Spec 000 "Status"."""

    configlogURL: str | None = Field(description="for admins only")
    publishlogURL: str | None = Field(description="for admins only")
    algologURL: str | None
    outputsURL: list[str]


class ResultEntry(BaseModel):
    filename: str
    filesize: int
    type: str
    index: int
    url: str | None
    sha256: str | None = Field(description="null where there is no URL: it would tell of a small file what it holds")


class OperatorStatus(JobStatus):
    """As the operator service later ran; contract, section 3."""

    results: list[ResultEntry] | Literal[""] = Field(description='"" until there are any')
    stopreq: int = Field(description="0 none, 1 stop requested, 2 timed out")
    removed: int
    algoDID: str | None
    inputDID: list[str]


class ProviderStatus(OperatorStatus):
    """Specs 002 and 004; contract, section 3."""

    documentId: str
    algorithmLogUrl: str | None = Field(description="for the owner")
    resultsUrls: list[str] = Field(description="for the owner and the addresses on the whitelist")
    resultsDid: str


class BrizoStatus(JobStatus):
    """Spec 003."""

    algologUrl: str | None = Field(description="for the owner")
    outputsUrl: list[str] = Field(description="for the owner and the addresses on the whitelist")
    resultsDid: str
    algorithmLogUrl: str | None = Field(description="as algologUrl; not in the document, but its clients read it")
    resultsUrls: list[str] = Field(description="as outputsUrl; not in the document, but its clients read it")


class Environment(BaseModel):
    """A compute environment, in both spellings at once; contract, section 3. The last four are not in it."""

    id: str
    desc: str
    cpuType: str
    nCPU: int | float
    cpuNumber: int | float
    gpuType: str
    nGPU: int
    gpuNumber: int
    ramGB: int | float = Field(description="GiB")
    diskGB: int | float = Field(description="GiB")
    priceMin: float
    currentJobs: int
    maxJobs: int
    consumerAddress: str
    storageExpiry: int = Field(description="seconds")
    maxJobDuration: int | float = Field(description="seconds")
    lastSeen: Timestamp | None
    feeToken: str
    queuedJobs: int
    totalGPU: int = Field(description="for all jobs together; gpuNumber is what one job may have")
    freeGPU: int = Field(description="those of totalGPU that no job has at present")
    obstacle: str | None = Field(description="Why it cannot run jobs at present")


class ProblemEntry(BaseModel):
    """One thing that is wrong. *path* is dotted."""

    path: str
    message: str


class ErrorAnswer(BaseModel):
    """A refusal, or a fault of the service."""

    error: str
    problems: list[ProblemEntry] | None = None
    code: str | None = None


class AssetError(BaseModel):
    """The Provider's answer to what cannot be had: a code by the part of the request; contract, section 6."""

    error: dict[str, str]
    message: str | None = None


class FieldErrors(BaseModel):
    """The Provider's answer to parameters of the wrong form."""

    success: Literal[False]
    message: str
    errors: dict[str, list[str]]


def early_status(job: Job, dialect: Dialect, view: View) -> EarlyStatus:
    """``/status``, numbered as *dialect* (000 or 001) does."""
    return EarlyStatus(
        **_told(job, dialect),
        configlogURL=_last(view.urls(job, "configrationLog")),
        publishlogURL=_last(view.urls(job, "publishLog")),
        algologURL=_last(view.urls(job, "algorithmLog")),
        outputsURL=view.urls(job, "output"),
    )


def operator_status(job: Job, view: View) -> OperatorStatus:
    """``/compute`` and ``/runningjobs``, with the full table of numbers."""
    return OperatorStatus(**_results_told(job, view))


def provider_status(job: Job, view: View) -> ProviderStatus:
    return ProviderStatus(
        **_results_told(job, view),
        documentId=job.document_id,
        algorithmLogUrl=_last(view.urls(job, "algorithmLog")),
        resultsUrls=view.urls(job, "output"),
        resultsDid="",
    )


def brizo_status(job: Job, view: View) -> BrizoStatus:
    log, outputs = _last(view.urls(job, "algorithmLog")), view.urls(job, "output")
    return BrizoStatus(
        **_told(job, Dialect.BRIZO),
        algologUrl=log,
        outputsUrl=outputs,
        resultsDid="",
        algorithmLogUrl=log,
        resultsUrls=outputs,
    )


def environment(state: EnvironmentState, *, address: str = "", fee_token: str = "") -> Environment:
    """*address* and *fee_token* stand in where the environment has none of its own."""
    offer = state.offer
    limits = offer.limits
    return Environment(
        id=offer.id,
        desc=offer.desc,
        cpuType=offer.cpu_type,
        nCPU=_plain(limits.cpus),
        cpuNumber=_plain(limits.cpus),
        gpuType=offer.gpu_type,
        nGPU=limits.gpus,
        gpuNumber=limits.gpus,
        ramGB=_plain(limits.memory_bytes / GIB),
        diskGB=_plain(limits.disk_bytes / GIB),
        priceMin=offer.price_min,
        currentJobs=state.running,
        maxJobs=offer.max_jobs,
        consumerAddress=offer.consumer_address or address,
        storageExpiry=offer.storage_expiry,
        maxJobDuration=_plain(limits.seconds),
        lastSeen=timestamp(state.last_seen) if state.last_seen else None,
        feeToken=offer.fee_token or fee_token,
        queuedJobs=state.waiting,
        totalGPU=offer.all_gpus,
        freeGPU=state.free_gpus,
        obstacle=state.obstacle,
    )


def exact(nonce: int) -> int | str:
    """A number that JavaScript, too, reads exactly: a string beyond 2^53."""
    return nonce if nonce <= 2**53 else str(nonce)


def _results_told(job: Job, view: View) -> dict[str, Any]:
    return {
        **_told(job, Dialect.PROVIDER),
        "results": [
            ResultEntry(
                filename=result.filename,
                filesize=result.filesize,
                type=result.kind,
                index=index,
                url=view.link(job, index) if view.link else None,
                sha256=result.sha256 if view.link else None,
            )
            for index, result in view.results(job)
        ]
        or "",
        "stopreq": job.stop_request,
        "removed": int(job.removed),
        "algoDID": job.algorithm_did,
        "inputDID": list(job.input_dids),
    }


def _told(job: Job, dialect: Dialect) -> dict[str, Any]:
    return {
        "owner": job.owner,
        "agreementId": job.agreement_id,
        "jobId": job.id,
        "dateCreated": timestamp(job.created),
        "dateFinished": timestamp(job.finished) if job.finished else None,
        "expireTimestamp": timestamp(job.expires) if job.expires else None,
        "status": project(job.status, dialect, stopped_in=job.stopped_in),
        "statusText": job.text,
        "reason": job.reason,
        "progress": job.progress,
        "secondsLeft": None if job.seconds_left is None else round(job.seconds_left, 1),
        "stage": job.stage,
        "stages": job.stages,
        "history": list(_history(job, dialect)),
    }


def _history(job: Job, dialect: Dialect) -> Iterator[Passage]:
    step = Status.WARMING_UP
    for passage in job.history:
        if passage.status not in (Status.STOPPED, Status.DELETED):
            step = passage.status
        yield Passage(
            status=project(passage.status, dialect, stopped_in=step),
            statusText=TEXT[passage.status],
            at=timestamp(passage.at),
            stage=passage.stage,
        )


def _last(urls: list[str]) -> str | None:
    """Of the logs of several stages, the one of the stage that came last."""
    return urls[-1] if urls else None


def _plain(number: float) -> int | float:
    """2 rather than 2.0, as the documents print it."""
    return int(number) if float(number).is_integer() else number


_PART: Final = re.compile(r"stages\.(\d+)\.(algorithm|compute|input|output)")
_NAMESPACE: Final = re.compile(r"stages\.\d+\.compute\.namespace")


def operator_text(problem: Problem, call: str) -> str:
    """A problem of a workflow document in the words of the original operator, where it had words for it."""
    part = _PART.fullmatch(problem.path)
    if _NAMESPACE.fullmatch(problem.path):
        return str(UnknownEnvironment())
    if problem.message != "is required":
        return str(problem)
    if problem.path == "stages":
        return "Missing stages"
    if problem.path in ("agreementId", "owner"):
        return str(MissingParameter(problem.path, call))
    return f"Missing {part[2]} in stage {part[1]}" if part else str(problem)
