"""Brizo's dialect: spec 003; contract, sections 1 to 5."""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends
from fastapi.requests import Request
from pydantic import AliasChoices, BeforeValidator, Field, StringConstraints
from starlette.concurrency import run_in_threadpool

from api import answers, wire
from api.auth import ANONYMOUS, Caller
from api.consumers import Address, JobId, OptionalObject, parse_if_text, visible
from api.parameters import Call, documented, given
from api.service import Service, ServiceDep, any_spelling
from blocks.assets import spellings
from blocks.shapes import JsonText
from flows.broker import AlgorithmAsk, Ask, DatasetAsk
from flows.errors import InvalidParameter, JobNotFound
from flows.jobs import Job, JobQuery, parse_job_id

router = APIRouter(prefix="/api/v1/brizo/services", tags=["brizo"])

Text = Annotated[str, StringConstraints(max_length=8_192)]
Signature = Annotated[
    Text, Field(description="Plain EIP-191 over consumerAddress + [jobId] + serviceAgreementId; or an auth token")
]


class Start(Call):
    signature: Signature
    serviceAgreementId: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    consumerAddress: Address
    algorithmDid: Annotated[Text | None, Field(validation_alias=AliasChoices("algorithmDid", "algorithmDID"))] = None
    algorithmMeta: Annotated[
        dict[str, Any] | None,
        BeforeValidator(parse_if_text, json_schema_input_type=dict[str, Any] | JsonText | None),
        Field(description="An algorithm that is not published: rawcode or url, and container"),
    ] = None
    output: OptionalObject = Field(default_factory=dict)
    jobId: Annotated[JobId, Field(description="A job that was stopped or has failed: it is started again")] = ""


class Selection(Call):
    signature: Signature = ""
    serviceAgreementId: Text = ""
    jobId: JobId = ""
    consumerAddress: Address | None = None


StartGiven = Annotated[Start, Depends(given(Start))]
SelectionGiven = Annotated[Selection, Depends(given(Selection))]

# What the documentation shows calls with.
_NAMED: Final = {
    "signature": answers.SIGNATURE,
    "consumerAddress": answers.ADDRESS,
    "serviceAgreementId": answers.ORDER,
    "jobId": answers.JOB_ID,
}


@router.post(
    "/compute",
    name="brizoComputeStart",
    responses=answers.BRIZO,
    openapi_extra=documented(Start, answers.BRIZO_START),
)
async def start(call: StartGiven, request: Request, service: ServiceDep) -> wire.BrizoStatus:
    """Create new job or restart one that was stopped or has failed."""
    caller = await service.consumers.brizo_caller(
        call.consumerAddress, f"{call.consumerAddress}{call.jobId}{call.serviceAgreementId}", call.signature
    )
    earlier = await service.own_job(call.jobId, caller) if call.jobId else None
    algorithm = await _algorithm(call, service)
    if earlier is not None and earlier.agreement_id not in spellings(call.serviceAgreementId):
        raise InvalidParameter("jobId: a job is restarted under its own agreement; serviceAgreementId names another")
    dataset, agreed = await service.broker.agreed(
        call.serviceAgreementId, call.consumerAddress, algorithm.document_id or None
    )
    ask = Ask(
        consumer=call.consumerAddress,
        datasets=(dataset,),
        algorithm=algorithm,
        output=call.output,
        image_pinned=False,
    )
    approved = await service.broker.approve(ask)
    # As the catalogue or the chain spells it: an agreement is good for one job, however it is written.
    agreement = approved.agreement(earlier, agreed)
    workflow = await run_in_threadpool(approved.workflow, agreement)
    job = await service.start(workflow, earlier)
    return wire.brizo_status(job, visible(job, caller, request, service))


@router.get(
    "/compute",
    name="brizoComputeStatus",
    responses=answers.BRIZO_LIST,
    openapi_extra=documented(Selection, _NAMED, body=False),
)
async def read_status(call: SelectionGiven, request: Request, service: ServiceDep) -> list[wire.BrizoStatus]:
    """Status of every job that matches all that is given. Unsigned it comes without URLs."""
    caller = await _caller(call, service) if call.signature else ANONYMOUS
    query = _query(call)
    if query.empty:
        raise InvalidParameter("give one of serviceAgreementId, jobId and consumerAddress")
    jobs = await any_spelling(service.jobs.find, query)
    return [wire.brizo_status(job, visible(job, caller, request, service)) for job in jobs]


@router.put(
    "/compute",
    name="brizoComputeStop",
    responses=answers.BRIZO,
    openapi_extra=documented(Selection, _NAMED, body=False),
)
async def stop(call: SelectionGiven, request: Request, service: ServiceDep) -> wire.BrizoStatus:
    """Stop every job of the consumer that matches all that is given; answers the latest of them."""
    caller = await _caller(call, service)
    jobs = await any_spelling(service.jobs.stop, _query(call))
    return _one(jobs, caller, request, service)


@router.delete(
    "/compute",
    name="brizoComputeDelete",
    responses=answers.BRIZO,
    openapi_extra=documented(Selection, _NAMED, body=False),
)
async def delete(call: SelectionGiven, request: Request, service: ServiceDep) -> wire.BrizoStatus:
    """Stop and remove every job of the consumer that matches, with all it has left; answers the latest of them."""
    if not (call.serviceAgreementId or call.jobId):
        raise InvalidParameter("jobId: give jobId or serviceAgreementId, so that it is clear what is to be deleted")
    caller = await _caller(call, service)
    jobs = await any_spelling(service.jobs.delete, _query(call))
    return _one(jobs, caller, request, service)


async def _caller(call: Selection, service: Service) -> Caller:
    for name in ("consumerAddress", "signature"):
        if not getattr(call, name):
            raise InvalidParameter(f"{name}: is required")
    signed = f"{call.consumerAddress}{call.jobId}{call.serviceAgreementId}"
    return await service.consumers.brizo_caller(str(call.consumerAddress), signed, call.signature)


def _query(call: Selection) -> JobQuery:
    return JobQuery(
        job_id=parse_job_id(call.jobId) if call.jobId else None,
        agreement_id=call.serviceAgreementId or None,
        owner=call.consumerAddress,
    )


def _one(jobs: list[Job], caller: Caller, request: Request, service: Service) -> wire.BrizoStatus:
    if not jobs:
        raise JobNotFound("consumerAddress has no job that matches")
    return wire.brizo_status(jobs[-1], visible(jobs[-1], caller, request, service))


async def _algorithm(call: Start, service: Service) -> AlgorithmAsk:
    if call.algorithmMeta or not call.algorithmDid:
        return AlgorithmAsk(meta=call.algorithmMeta)
    found: DatasetAsk = await service.broker.only_service(call.algorithmDid)
    return AlgorithmAsk(document_id=found.document_id, service_id=found.service_id)
