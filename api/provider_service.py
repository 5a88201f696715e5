"""The Provider's dialect: specs 002 and 004, and what its clients call beside them; contract, sections 1 to 7."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final
from uuid import uuid4

from fastapi import APIRouter, Depends, Header, Query
from fastapi.requests import Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import AliasChoices, BeforeValidator, Field, StringConstraints, ValidationError
from starlette.concurrency import run_in_threadpool

from api import answers, wire
from api.auth import ANONYMOUS, Caller
from api.consumers import Address, JobId, OptionalObject, one_job, parse_if_json, parse_if_text, result_of, visible
from api.download import download as download_result
from api.files import describe, stream
from api.nonces import Nonce
from api.parameters import Call, documented, given, read_body
from api.service import Service, ServiceDep, any_spelling
from blocks.assets import DID_PREFIX
from blocks.assets import Container as AssetContainer
from blocks.shapes import JsonText, Switch, Whole
from flows.broker import MAX_DATASETS, AlgorithmAsk, Ask, DatasetAsk
from flows.errors import AssetRefused, InvalidParameter, MissingParameter, NoSuchResult, NotReady
from flows.jobs import JobQuery
from flows.trust import container_refusal

LARGEST_PLAIN: Final = 10 * 1024**2
"""Bytes that are encrypted in one call: a list of files, or a whole document."""

router = APIRouter(prefix="/api/services", tags=["provider"])

Text = Annotated[str, StringConstraints(max_length=8_192)]
Did = Annotated[Text, Field(description="The asset's DID")]
ServiceId = Annotated[Text, Field(description="Of the asset's services, as its DDO has it")]
Order = Annotated[Text, Field(description="Transaction that has ordered the service; empty for an asset of no chain")]
Userdata = Annotated[OptionalObject, Field(description="Parameters for the source of the files, by name")]
Token = Annotated[str, Header(alias="AuthToken", description="In place of signature and nonce; see createAuthToken")]


class Signed(Call):
    """A call of a consumer who proves to be one, by signature and nonce, or by an auth token."""

    consumerAddress: Address
    signature: Annotated[Text, Field(description="In the Provider's scheme: 0x and 130 hex digits")] = ""
    nonce: Annotated[Nonce, Field(description="Greater than the last one; a number of any size, or a string")] = ""


class Dataset(Call):
    documentId: Did = ""
    serviceId: ServiceId = ""
    transferTxId: Order = ""
    userdata: Userdata = Field(default_factory=dict)

    @property
    def ask(self) -> DatasetAsk:
        return DatasetAsk(self.documentId, self.serviceId, self.transferTxId, self.userdata)


class Algorithm(Dataset):
    meta: Annotated[
        dict[str, Any] | None,
        BeforeValidator(parse_if_text, json_schema_input_type=dict[str, Any] | JsonText | None),
        Field(description="An algorithm that is not published: rawcode, url or remote, and container"),
    ] = None
    algocustomdata: Annotated[Any, BeforeValidator(parse_if_json)] = None

    @property
    def ask(self) -> AlgorithmAsk:
        return AlgorithmAsk(
            self.documentId,
            self.serviceId,
            self.transferTxId,
            self.userdata,
            meta=self.meta,
            custom_data=self.algocustomdata,
        )


_Datasets = Annotated[list[Dataset], Field(max_length=MAX_DATASETS)]
Datasets = Annotated[_Datasets, BeforeValidator(parse_if_text, json_schema_input_type=_Datasets | JsonText)]
OneDataset = Annotated[Dataset, BeforeValidator(parse_if_text, json_schema_input_type=Dataset | JsonText)]
OneAlgorithm = Annotated[Algorithm, BeforeValidator(parse_if_text, json_schema_input_type=Algorithm | JsonText)]


class Start(Signed):
    dataset: OneDataset
    algorithm: OneAlgorithm
    environment: Annotated[Text, Field(description="As computeEnvironments names it; empty for the default one")] = ""
    additionalDatasets: Annotated[
        Any,
        Field(validation_alias=AliasChoices("additionalDatasets", "additionalInputs")),
        BeforeValidator(parse_if_text, json_schema_input_type=list[Dataset] | JsonText | None),
    ] = None
    output: Annotated[Any, BeforeValidator(parse_if_text, json_schema_input_type=dict[str, Any] | JsonText | None)] = (
        None
    )
    jobId: Annotated[JobId, Field(description="A job that was stopped or has failed: it is started again")] = ""

    @property
    def ask(self) -> Ask:
        """Raises AssetRefused."""
        return Ask(
            consumer=self.consumerAddress,
            datasets=(self.dataset.ask, *_additional(self.additionalDatasets)),
            algorithm=self.algorithm.ask,
            environment=self.environment,
            output=_output(self.output),
        )


class Selection(Signed):
    documentId: Did = ""
    jobId: JobId = ""
    agreementId: Annotated[Text, Field(description="The order that paid, or a documentId; jobId goes before it")] = ""


class StatusQuery(Selection):
    consumerAddress: Annotated[Address | None, Field(description="Whose jobs; needed with a signature")] = None  # type: ignore[assignment]


class ResultCall(Signed):
    jobId: Annotated[str, BeforeValidator(one_job), Field(json_schema_extra={"pattern": "^[0-9a-fA-F]{32}$"})]
    index: Annotated[int, Whole(), Field(description="As `results` tells it")]


class Compute(Call):
    env: Annotated[Text, Field(description="As computeEnvironments names it")] = ""
    validUntil: Annotated[int, Whole(ge=0, le=2**53), Field(description="Unix time in seconds")]


class Initialize(Call):
    datasets: Datasets
    algorithm: OneAlgorithm
    compute: Annotated[Compute, BeforeValidator(parse_if_text, json_schema_input_type=Compute | JsonText)]
    consumerAddress: Address


class InitializeAccess(Call):
    documentId: Did
    serviceId: ServiceId
    consumerAddress: Address
    fileIndex: Annotated[int, Whole()] | None = None
    userdata: Userdata = Field(default_factory=dict)


class Download(Signed):
    documentId: Did
    serviceId: ServiceId
    transferTxId: Order = ""
    fileIndex: Annotated[int, Whole(ge=0)]
    userdata: Userdata = Field(default_factory=dict)


class FileInfo(Call):
    """Files of an asset, by *did* and *serviceId*; or one file object, as it would stand in an asset."""

    model_config = Call.model_config | {"extra": "allow"}

    did: Did = ""
    serviceId: ServiceId = ""
    checksum: Annotated[Switch, Field(description="Read each file whole and tell its SHA-256")] = False
    userdata: Userdata = Field(default_factory=dict)


class Container(Call):
    entrypoint: Text = ""
    image: Text = ""
    tag: Text = ""
    checksum: Text = ""


class NonceQuery(Call):
    userAddress: Address


class TokenCall(Call):
    address: Address
    expiration: Annotated[
        int, Whole(ge=0, le=2**53), Field(description="Unix time in seconds, at most 30 days from now")
    ]
    signature: Text = ""
    nonce: Nonce = ""


class TokenDelete(TokenCall):
    expiration: Annotated[int, Whole()] = 0
    token: Text


class EnvironmentQuery(Call):
    chainId: Annotated[int, Whole()] | None = None
    byChain: Annotated[Switch, Field(description="Answer an object keyed by chain id")] = False


StartGiven = Annotated[Start, Depends(given(Start))]
SelectionGiven = Annotated[Selection, Depends(given(Selection))]
StatusGiven = Annotated[StatusQuery, Depends(given(StatusQuery))]
ResultGiven = Annotated[ResultCall, Depends(given(ResultCall))]
InitializeGiven = Annotated[Initialize, Depends(given(Initialize))]
InitializeAccessGiven = Annotated[InitializeAccess, Depends(given(InitializeAccess))]
DownloadGiven = Annotated[Download, Depends(given(Download))]
FileInfoGiven = Annotated[FileInfo, Depends(given(FileInfo))]
ContainerGiven = Annotated[Container, Depends(given(Container))]
NonceGiven = Annotated[NonceQuery, Depends(given(NonceQuery))]
TokenGiven = Annotated[TokenCall, Depends(given(TokenCall))]
TokenDeleteGiven = Annotated[TokenDelete, Depends(given(TokenDelete))]
EnvironmentGiven = Annotated[EnvironmentQuery, Depends(given(EnvironmentQuery))]

# What the documentation shows calls with.
_NAMED: Final = {**answers.CONSUMER, "jobId": answers.JOB_ID}
_ASSET: Final = {
    "documentId": answers.DATASET,
    "serviceId": answers.SERVICE_ID,
    "consumerAddress": answers.ADDRESS,
    "fileIndex": 0,
}
_TOKEN: Final = {
    "address": answers.ADDRESS,
    "signature": answers.SIGNATURE,
    "nonce": answers.NONCE,
    "expiration": answers.NONCE // 1000 + 86_400,
    "token": "WyIweGM0MTgiLDE3OTV.c2lnbmF0dXJl",
}


@router.post(
    "/compute", name="computeStart", responses=answers.PROVIDER, openapi_extra=documented(Start, answers.START)
)
async def start(
    call: StartGiven, request: Request, service: ServiceDep, token: Token = ""
) -> list[wire.ProviderStatus]:
    """Create new job or restart one that was stopped or has failed."""
    message = f"{call.consumerAddress}{call.jobId}{call.dataset.documentId}"
    caller = await _caller(call, message, service, token)
    earlier = await service.own_job(call.jobId, caller) if call.jobId else None
    approved = await service.broker.approve(call.ask)
    agreement = approved.agreement(earlier, f"0x{uuid4().hex}")
    workflow = await run_in_threadpool(approved.workflow, agreement)
    await service.consumers.use(caller)
    job = await service.start(workflow, earlier)
    return [wire.provider_status(job, visible(job, caller, request, service))]


@router.get(
    "/compute",
    name="computeStatus",
    responses=answers.PROVIDER,
    openapi_extra=documented(StatusQuery, _NAMED, body=False),
)
async def read_status(
    call: StatusGiven, request: Request, service: ServiceDep, token: Token = ""
) -> list[wire.ProviderStatus]:
    """Status of every job that matches all that is given. Unsigned it comes without URLs."""
    caller = ANONYMOUS
    if call.signature or token:
        caller = await _caller(call, _selected(call), service, token)
        await service.consumers.use(caller)
    jobs = await service.jobs_for(_query(call), caller)
    return [wire.provider_status(job, visible(job, caller, request, service, named=bool(call.jobId))) for job in jobs]


@router.put(
    "/compute",
    name="computeStop",
    responses=answers.PROVIDER,
    openapi_extra=documented(Selection, _NAMED, body=False),
)
async def stop(
    call: SelectionGiven, request: Request, service: ServiceDep, token: Token = ""
) -> list[wire.ProviderStatus]:
    """Stop every job of the consumer that matches all that is given."""
    if "jobId" in call.model_fields_set and not (call.jobId or call.documentId or call.agreementId):
        raise InvalidParameter("jobId: is empty; leave it out to stop all jobs of consumerAddress")
    # Without a job named, the form that leaves the nonce out would stop all there are and all there will be.
    bare = f"{call.consumerAddress}{call.jobId}" if call.jobId else ""
    caller = await _caller(call, _selected(call), service, token, bare=bare)
    await service.consumers.use(caller)
    jobs = await any_spelling(service.jobs.stop, _query(call))
    return [wire.provider_status(job, visible(job, caller, request, service)) for job in jobs]


@router.delete(
    "/compute",
    name="computeDelete",
    responses=answers.PROVIDER,
    openapi_extra=documented(Selection, _NAMED, body=False),
)
async def delete(
    call: SelectionGiven, request: Request, service: ServiceDep, token: Token = ""
) -> list[wire.ProviderStatus]:
    """Stop and remove every job of the consumer that matches, with all it has left; answers their last status."""
    if not (call.documentId or call.jobId):
        raise InvalidParameter("jobId: give jobId or documentId, so that it is clear what is to be deleted")
    caller = await _caller(call, _selected(call), service, token)
    await service.consumers.use(caller)
    jobs = await any_spelling(service.jobs.delete, _query(call))
    return [wire.provider_status(job, visible(job, caller, request, service)) for job in jobs]


@router.get(
    "/computeResult",
    name="computeResult",
    response_class=Response,
    responses=answers.RANGE_OF_FILE | answers.GONE,
    openapi_extra=documented(ResultCall, {**_NAMED, "index": 0}, body=False, headers=[answers.RANGE]),
)
async def read_result(call: ResultGiven, request: Request, service: ServiceDep, token: Token = "") -> Response:
    """One file a job has published, by its index in `results`; whole, or a range of it."""
    caller = await _caller(call, f"{call.consumerAddress}{call.jobId}{call.index}", service, token)
    job = await result_of(service, call.jobId, call.index, caller)
    await service.consumers.use(caller)
    return await download_result(request, service.jobs, job, call.index)


@router.get(
    "/computeEnvironments",
    name="computeEnvironments",
    responses=answers.ENVIRONMENTS,
    openapi_extra=documented(EnvironmentQuery, body=False),
)
async def environments(
    call: EnvironmentGiven, service: ServiceDep
) -> list[wire.Environment] | dict[str, list[wire.Environment]]:
    """The compute environments on offer."""
    return await service.environments(call.chainId, by_chain=call.byChain)


@router.post(
    "/initializeCompute",
    name="initializeCompute",
    responses=answers.FEES,
    openapi_extra=documented(Initialize, answers.INITIALIZE),
)
async def initialize_compute(call: InitializeGiven, service: ServiceDep) -> dict[str, Any]:
    """What has to be ordered and paid before a job can be started; names orders that are still good."""
    ask = Ask(
        consumer=call.consumerAddress,
        datasets=tuple(dataset.ask for dataset in call.datasets),
        algorithm=call.algorithm.ask,
        environment=call.compute.env,
    )
    return await service.broker.fees(ask, call.compute.validUntil)


@router.get(
    "/initialize",
    name="initialize",
    responses=answers.ACCESS_FEE,
    openapi_extra=documented(InitializeAccess, _ASSET, body=False),
)
async def initialize(call: InitializeAccessGiven, service: ServiceDep) -> dict[str, Any]:
    """What has to be ordered before a file can be downloaded."""
    ask = DatasetAsk(call.documentId, call.serviceId, userdata=call.userdata)
    part, fee = await service.broker.access_fee(ask, call.consumerAddress)
    if call.fileIndex is not None and not -1 <= call.fileIndex < len(part.files or ()):
        raise NoSuchResult(f"No such fileIndex {call.fileIndex}")
    nonce = wire.exact(await service.consumers.nonces.latest(call.consumerAddress))
    return {
        "datatoken": part.service.datatoken,
        "providerFee": None,
        **fee,
        "nonce": nonce,
        "computeAddress": service.address,
    }


@router.get(
    "/download",
    name="download",
    response_class=Response,
    responses=answers.FILE,
    openapi_extra=documented(Download, {**_ASSET, **answers.CONSUMER, "transferTxId": answers.ORDER}, body=False),
)
async def download(call: DownloadGiven, request: Request, service: ServiceDep, token: Token = "") -> Response:
    """A file of an asset that its owner offers for download and the consumer has ordered."""
    caller = await _caller(call, call.documentId, service, token)
    ask = DatasetAsk(call.documentId, call.serviceId, call.transferTxId, call.userdata)
    part = await service.broker.download(ask, call.consumerAddress, ordered=True)
    files = part.files or ()
    if call.fileIndex >= len(files):
        raise NoSuchResult(f"No such fileIndex {call.fileIndex}")
    await service.consumers.use(caller)
    return await stream(files[call.fileIndex], f"file{call.fileIndex}", service.broker)


@router.post(
    "/fileinfo",
    name="fileinfo",
    responses=answers.FILES,
    openapi_extra=documented(FileInfo, answers.FILE_OBJECT),
)
async def file_info(call: FileInfoGiven, service: ServiceDep) -> list[dict[str, Any]]:
    """Whether each file can be read, its size and type, and on demand its checksum."""
    file = {**(call.model_extra or {})}
    return await describe(
        service.broker,
        did=call.did,
        service_id=call.serviceId,
        file=file,
        parameters=call.userdata,
        checksum=call.checksum,
    )


@router.post(
    "/encrypt",
    name="encrypt",
    status_code=201,
    response_class=PlainTextResponse,
    responses=answers.shown("0x04a3c1f0", status=201, media_type="text/plain"),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "minLength": 1}}},
        }
    },
)
async def encrypt(request: Request, service: ServiceDep, chainId: Annotated[int | None, Query()] = None) -> str:
    """The body, encrypted so that this provider alone can read it: for the `files` of a DDO."""
    body = await read_body(request, LARGEST_PLAIN)
    if not body:
        raise InvalidParameter("the body is empty; send what is to be encrypted")
    if service.broker.key is None:
        raise NotReady("This provider has no key; its operator has to configure one.")
    return "0x" + (await run_in_threadpool(service.broker.key.encrypt, body)).hex()


@router.post(
    "/validateContainer",
    name="validateContainer",
    responses=answers.shown({"valid": True}),
    openapi_extra=documented(Container, answers.CONTAINER),
)
async def validate_container(call: ContainerGiven) -> Response:
    """Whether an algorithm's container says all that is needed to run it."""
    code = container_refusal(AssetContainer.model_validate(call.model_dump()))
    if code is not None:
        return JSONResponse({"error": {"algorithm.container": code}}, 400)
    return JSONResponse({"valid": True})


@router.get(
    "/nonce",
    name="nonce",
    responses=answers.shown({"nonce": answers.NONCE}),
    openapi_extra=documented(NonceQuery, {"userAddress": answers.ADDRESS}, body=False),
)
async def nonce(call: NonceGiven, service: ServiceDep) -> dict[str, int | str]:
    """The last nonce accepted for an address; the next one has to be greater. Beyond 2^53 it comes as a string."""
    return {"nonce": wire.exact(await service.consumers.nonces.latest(call.userAddress))}


@router.get(
    "/createAuthToken",
    name="create_auth_token",
    responses=answers.shown({"token": _TOKEN["token"]}),
    openapi_extra=documented(TokenCall, _TOKEN, body=False),
)
async def create_auth_token(call: TokenGiven, service: ServiceDep) -> dict[str, str]:
    """A token that stands for the signature of `address` until it expires. Signed is address + nonce."""
    caller = await _holder(call, service)
    token = service.consumers.tokens.create(call.address, call.expiration)
    await service.consumers.use(caller)
    return {"token": token}


@router.delete(
    "/deleteAuthToken",
    name="delete_auth_token",
    responses=answers.shown({"success": "Token has been deactivated."}),
    openapi_extra=documented(TokenDelete, _TOKEN, body=False),
)
async def delete_auth_token(call: TokenDeleteGiven, service: ServiceDep) -> dict[str, str]:
    """Make a token worthless before it expires. Whoever holds it may do so; signed is address + nonce, if at all."""
    if call.signature:
        await service.consumers.use(await _holder(call, service))
    await service.consumers.tokens.delete(call.token, call.address)
    return {"success": "Token has been deactivated."}


async def _holder(call: TokenCall, service: Service) -> Caller:
    if not call.signature:
        raise MissingParameter("signature", "createAuthToken")
    if not call.nonce:
        raise MissingParameter("nonce", "createAuthToken")
    return await service.consumers.caller(call.address, call.address, call.signature, call.nonce)


async def _caller(call: Signed, message: str, service: Service, token: str, *, bare: str = "") -> Caller:
    if not call.consumerAddress:
        raise MissingParameter("consumerAddress", "")
    if not call.signature and not token:
        raise MissingParameter("signature", "")
    return await service.consumers.caller(
        call.consumerAddress, message, call.signature, call.nonce, token=token, bare=bare
    )


def _selected(call: Selection) -> str:
    return f"{call.consumerAddress}{call.jobId}{call.documentId}"


def _query(call: Selection) -> JobQuery:
    # ocean.js: agreementId is the order, without 0x, or the data set; beside jobId it may be anything.
    agreement = "" if call.jobId else call.agreementId
    by_document = agreement.startswith(DID_PREFIX)
    return JobQuery(
        job_id=call.jobId.lower() or None,
        agreement_id=None if by_document else agreement or None,
        document_id=call.documentId or (agreement if by_document else None) or None,
        owner=call.consumerAddress,
    )


def _additional(value: Any) -> tuple[DatasetAsk, ...]:
    if value in (None, "", []):
        return ()
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        raise AssetRefused("additional_input", "invalid", "additionalDatasets: must be a list of data sets")
    if len(value) >= MAX_DATASETS:
        raise AssetRefused("additional_input", "invalid", f"give at most {MAX_DATASETS} data sets in all")
    try:
        return tuple(Dataset.model_validate(each).ask for each in value)
    except ValidationError:
        raise AssetRefused("additional_input", "invalid", "additionalDatasets: a field is of the wrong form") from None


def _output(value: Any) -> Mapping[str, Any]:
    if value in (None, ""):
        return {}
    if not isinstance(value, Mapping):
        raise AssetRefused("output", "invalid", "output: must be an object")
    return value
