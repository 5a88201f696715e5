"""The operator's dialects: the early one of specs 000 and 001, and the one it ran with later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Annotated, Any, Final, Self

from fastapi import APIRouter, Depends
from fastapi.requests import Request
from fastapi.responses import PlainTextResponse, Response
from pydantic import BeforeValidator, Field, model_validator
from starlette.concurrency import run_in_threadpool

from api import answers, wire
from api.auth import ANONYMOUS, Caller
from api.download import download
from api.nonces import Nonce
from api.parameters import Call, documented, given, label, parse_object
from api.service import Service, ServiceDep
from blocks.shapes import JsonText, Whole
from flows.errors import (
    EmptyPayload,
    InvalidParameter,
    JobNotFound,
    MissingParameter,
    NoSelector,
    NoSuchResult,
    UnknownEnvironment,
)
from flows.jobs import ADMIN_KINDS, Job, JobQuery, only_job, parse_job_id, results_expired
from flows.workflow import Name, Workflow, parse_workflow

EXAMPLE: Final = json.loads((files("api") / "examples" / "init.json").read_text(encoding="utf-8"))


def _admit(request: Request, service: ServiceDep) -> None:
    service.gate.admit(request)


router = APIRouter(prefix="/api/v1/operator", tags=["operator"], dependencies=[Depends(_admit)])


def _job_id(text: Any) -> Any:
    # As it was written: that is what a caller has signed.
    if isinstance(text, str):
        parse_job_id(text)
    return text


JobId = Annotated[
    str,
    BeforeValidator(_job_id),
    Field(description="32 hex digits", json_schema_extra={"pattern": "^[0-9a-fA-F]{32}$"}),
]


class Signed(Call):
    """A call with a provider's signature, which a service without a list of providers does not ask for."""

    providerSignature: Annotated[
        str, Field(description="Over owner + [jobId] + nonce, in the Provider's scheme: 0x and 130 hex digits")
    ] = ""
    nonce: Annotated[Nonce, Field(description="Greater than the last one; a number of any size, or a string")] = ""


class Selection(Signed):
    """Which jobs are meant: those that match every part that is given."""

    # Absent is the default; given but empty, or null, is refused: for a call that stops or deletes, a selector
    # read as absent would mean more jobs than the caller named.
    agreementId: Name = ""
    jobId: JobId = ""
    owner: Name = ""

    @model_validator(mode="after")
    def _names_something(self) -> Self:
        if not (self.agreementId or self.jobId or self.owner):
            raise NoSelector
        return self

    @property
    def query(self) -> JobQuery:
        return JobQuery(
            job_id=parse_job_id(self.jobId) if self.jobId else None,
            agreement_id=self.agreementId or None,
            owner=self.owner or None,
        )


class ResultCall(Signed):
    owner: Name
    index: Annotated[int, Whole(), Field(description="As `results` tells it")]
    jobId: JobId


class Start(Signed):
    """
    A new job, or one that was stopped or has failed once more. Agreement and owner stand in the workflow (spec 000),
    beside it, or in both and agree.
    """

    workflow: Annotated[
        dict[str, Any],
        BeforeValidator(
            lambda w: parse_object(w) if isinstance(w, str) else w, json_schema_input_type=Workflow | JsonText
        ),
        Field(description="Required without jobId; with it, the document that takes the place of the job's"),
    ] = {}  # noqa: RUF012  # pydantic copies it
    agreementId: Name = ""
    owner: Name = ""
    environment: Annotated[Name, Field(description="Where stages run that name none in compute.namespace")] = ""
    jobId: Annotated[JobId, Field(description="A stopped or failed job, to be restarted under this id")] = ""

    @model_validator(mode="before")
    @classmethod
    def _unwrapped(cls, values: Any) -> Any:
        """A document posted as it is, without the outer key: its stages tell."""
        if not values:
            raise EmptyPayload
        if isinstance(values, dict) and "workflow" not in values and "stages" in values:
            beside = ("environment", "jobId", "providerSignature", "nonce")
            return {"workflow": values} | {name: values[name] for name in beside if name in values}
        return values

    @property
    def named_owner(self) -> str:
        inside = self.workflow.get("owner")
        return inside if isinstance(inside, str) and inside else self.owner

    @property
    def document(self) -> Workflow:
        """Raises InvalidWorkflow, InvalidParameter."""
        merged = {key: value for key, value in self.workflow.items() if key != "stages" or value}
        for name, beside in (("agreementId", self.agreementId), ("owner", self.owner)):
            inside = merged.get(name)
            if not inside and beside:
                merged[name] = beside
            elif beside and not _same(name, inside, beside):
                raise InvalidParameter(f"{name}: the one in the workflow and the one beside it differ")
        if self.environment and isinstance(merged.get("stages"), list):
            merged["stages"] = [_placed(stage, self.environment) for stage in merged["stages"]]
        return parse_workflow(merged)


def _same(name: str, inside: object, beside: str) -> bool:
    return str(inside).lower() == beside.lower() if name == "owner" else inside == beside


def _placed(stage: Any, environment: str) -> Any:
    if not isinstance(stage, Mapping) or not isinstance(stage.get("compute"), Mapping):
        return stage
    compute = stage["compute"]
    return stage if compute.get("namespace") else {**stage, "compute": {**compute, "namespace": environment}}


StartGiven = Annotated[Start, Depends(given(Start))]
SelectionGiven = Annotated[Selection, Depends(given(Selection))]
ResultGiven = Annotated[ResultCall, Depends(given(ResultCall))]
SignedGiven = Annotated[Signed, Depends(given(Signed))]

# What the documentation shows calls with.
_SIGNED: Final = {"providerSignature": answers.SIGNATURE, "nonce": answers.NONCE}
_NAMED: Final = {**_SIGNED, "owner": answers.ADDRESS, "jobId": answers.JOB_ID}


@router.post(
    "/init",
    name="operatorInit",
    response_class=PlainTextResponse,
    responses=answers.OPERATOR_INIT,
    openapi_extra=documented(Start, EXAMPLE),
)
async def init(call: StartGiven, request: Request, service: ServiceDep) -> str:
    """Create new job, or restart the one named by jobId; answers its id. Spec 000."""
    return (await _start(call, request, service))[0].id


@router.get(
    "/status",
    name="operatorStatus",
    responses=answers.EARLY,
    openapi_extra=documented(Selection, _NAMED, body=False),
)
async def read_status(call: SelectionGiven, request: Request, service: ServiceDep) -> list[wire.EarlyStatus]:
    """Status of every job that matches all that is given; specs 000 and 001. Unsigned it may come without URLs."""
    caller = await _caller(call, request, service, owner=call.owner, job_id=call.jobId, unsigned=True)
    view = _view(caller, request, service)
    jobs = await service.jobs.find(call.query)
    return [wire.early_status(job, service.settings.status_dialect, view) for job in jobs]


@router.post(
    "/compute",
    name="operatorComputeStart",
    responses=answers.OPERATOR_STARTED,
    openapi_extra=documented(Start, EXAMPLE),
)
async def start(call: StartGiven, request: Request, service: ServiceDep) -> list[wire.OperatorStatus]:
    """Create new job, or restart the one named by jobId; answers its status."""
    job, caller = await _start(call, request, service)
    return [wire.operator_status(job, _view(caller, request, service))]


@router.get(
    "/compute",
    name="operatorComputeStatus",
    responses=answers.OPERATOR,
    openapi_extra=documented(Selection, _NAMED, body=False),
)
async def compute_status(call: SelectionGiven, request: Request, service: ServiceDep) -> list[wire.OperatorStatus]:
    """Status of every job that matches all that is given."""
    view = await _signed_view(call, request, service)
    return [wire.operator_status(job, view) for job in await service.jobs.find(call.query)]


@router.put(
    "/compute",
    name="operatorComputeStop",
    responses=answers.OPERATOR,
    openapi_extra=documented(Selection, _NAMED, body=False),
)
async def stop(call: SelectionGiven, request: Request, service: ServiceDep) -> list[wire.OperatorStatus]:
    """Stop every job that matches all that is given."""
    view = await _signed_view(call, request, service)
    return [wire.operator_status(job, view) for job in await service.jobs.stop(call.query)]


@router.delete(
    "/compute",
    name="operatorComputeDelete",
    responses=answers.OPERATOR,
    openapi_extra=documented(Selection, _NAMED, body=False),
)
async def delete(call: SelectionGiven, request: Request, service: ServiceDep) -> list[wire.OperatorStatus]:
    """Stop and remove every job that matches all that is given, with all it has left; answers their last status."""
    view = await _signed_view(call, request, service)
    return [wire.operator_status(job, view) for job in await service.jobs.delete(call.query)]


@router.head(
    "/getResult",
    name="operatorGetResult",
    response_class=Response,
    responses=answers.HEAD_OF_FILE | answers.GONE,
    openapi_extra=documented(ResultCall, {**_NAMED, "index": 0}, body=False),
)
@router.get(
    "/getResult",
    name="operatorGetResult",
    response_class=Response,
    responses=answers.RANGE_OF_FILE | answers.GONE,
    openapi_extra=documented(ResultCall, {**_NAMED, "index": 0}, body=False, headers=[answers.RANGE]),
)
async def get_result(call: ResultGiven, request: Request, service: ServiceDep) -> Response:
    """One file a job has published, by its index in ``results``; whole, or a range of it."""
    caller = await _caller(call, request, service, owner=call.owner, job_id=call.jobId)
    job = await only_job(service.jobs, parse_job_id(call.jobId))
    _check_result(job, call, caller)
    return await download(request, service.jobs, job, call.index)


@router.get("/environments", name="operatorEnvironments", responses=answers.ENVIRONMENTS)
async def environments(service: ServiceDep) -> list[wire.Environment]:
    """The compute environments on offer."""
    return [wire.environment(state) for state in await service.jobs.environments()]


@router.get(
    "/runningjobs",
    name="operatorRunningJobs",
    responses=answers.OPERATOR,
    openapi_extra=documented(Signed, _SIGNED, body=False),
)
async def running_jobs(call: SignedGiven, request: Request, service: ServiceDep) -> list[wire.OperatorStatus]:
    """Every job that has not ended. Here the nonce alone is signed."""
    view = _view(await _caller(call, request, service), request, service)
    return [wire.operator_status(job, view) for job in await service.jobs.running()]


async def _start(call: Start, request: Request, service: Service) -> tuple[Job, Caller]:
    if "workflow" not in call.model_fields_set and not call.jobId:
        raise MissingParameter("workflow", label(request))
    # Who calls comes first: what is not signed by a provider must not cost more than its signature's check.
    caller = await _caller(call, request, service, owner=call.named_owner, job_id=call.jobId)
    workflow = await run_in_threadpool(lambda: call.document) if "workflow" in call.model_fields_set else None
    if call.environment and call.environment not in {state.offer.id for state in await service.jobs.environments()}:
        raise UnknownEnvironment
    if not call.jobId:
        assert workflow is not None  # noqa: S101  # for mypy: it is required then
        return await service.jobs.submit(workflow), caller
    # To whoever names another owner or agreement there is no such job, as when stopping it.
    named = JobQuery(parse_job_id(call.jobId), call.agreementId or None, call.named_owner or None)
    if not await service.jobs.find(named):
        raise JobNotFound(f"No job {call.jobId}")
    return await service.jobs.restart(parse_job_id(call.jobId), workflow), caller


async def _signed_view(call: Selection, request: Request, service: Service) -> wire.View:
    return _view(await _caller(call, request, service, owner=call.owner, job_id=call.jobId), request, service)


async def _caller(
    call: Signed, request: Request, service: Service, *, owner: str = "", job_id: str = "", unsigned: bool = False
) -> Caller:
    """Who calls. With a list of providers a call has to be signed, except where *unsigned* lets it pass."""
    if not call.providerSignature and (unsigned or not service.settings.providers):
        return ANONYMOUS
    for name in ("providerSignature", "nonce"):
        if not getattr(call, name):
            raise MissingParameter(name, label(request))
    return await service.gate.caller(owner=owner, job_id=job_id, signature=call.providerSignature, nonce=call.nonce)


def _view(caller: Caller, request: Request, service: Service) -> wire.View:
    """With a list of providers, who has not signed sees no URLs."""
    if caller is ANONYMOUS and service.settings.providers:
        return wire.View(link=None)
    base = str(service.settings.public_url or request.base_url).rstrip("/")
    return wire.View(
        link=lambda job, index: base + service.links.path(job, index),
        admin=caller.admin,
    )


def _check_result(job: Job, call: ResultCall, caller: Caller) -> None:
    """Raises NoSuchResult, in the words of the original, and ResultsExpired."""
    if call.owner.lower() != job.owner.lower():
        raise NoSuchResult(f"Owner {call.owner} mismatch for job {call.jobId}")
    if job.expired:
        raise results_expired(job)
    if not job.results:
        raise NoSuchResult(f"No results for job {call.jobId}")
    if call.index < 0:
        raise NoSuchResult(f"Negative index {call.index}")
    hidden = call.index < len(job.results) and job.results[call.index].kind in ADMIN_KINDS and not caller.admin
    if call.index >= len(job.results) or hidden:
        raise NoSuchResult(f"No such index {call.index} in this compute job")
