"""Answers as the documentation shows them: made by what makes the real ones, of a job that never was."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from api import wire
from blocks.limits import Limits, Offer
from flows.jobs import EnvironmentState, Job, Result, Transition
from flows.status import Dialect, Status

ADDRESS: Final = "0xC41808BBef371AD5CFc76466dDF9dEe228d2BdAA"
JOB_ID: Final = "0a1b2c3d4e5f60718293a4b5c6d7e8f9"
SIGNATURE: Final = "0x" + "5e" * 64 + "1b"
NONCE: Final = 1795328887590
DATASET: Final = "did:op:" + "11" * 32
ALGORITHM: Final = "did:op:" + "22" * 32
SERVICE_ID: Final = "33" * 32
ORDER: Final = "0x" + "44" * 32

Answers = dict[int | str, dict[str, Any]]
"""For ``responses=`` of a route."""

_AT: Final = datetime(2026, 11, 22, 9, 28, 7, 590750, tzinfo=UTC)
_JOB: Final = Job(
    id=JOB_ID,
    owner=ADDRESS,
    agreement_id=ORDER,
    environment="small",
    status=Status.COMPLETED,
    created=_AT,
    finished=_AT.replace(minute=30),
    expires=_AT.replace(day=29, minute=30),
    reason="the job has ended",
    progress=1.0,
    history=(Transition(Status.WARMING_UP, _AT), Transition(Status.COMPLETED, _AT.replace(minute=30))),
    results=(
        Result(
            filename="model.bin", filesize=1024, media_type="application/octet-stream", kind="output", sha256="5a" * 32
        ),
        Result(filename="algorithm.log", filesize=17, media_type="text/plain", kind="algorithmLog", sha256="6b" * 32),
    ),
    algorithm_did=ALGORITHM,
    input_dids=(DATASET,),
    document_id=DATASET,
)
_VIEW: Final = wire.View(
    link=lambda job, index: f"https://provider.example/api/results/WyIwYTFiMmMzZCJd.c2ln/{job.results[index].filename}"
)
_ENVIRONMENT: Final = EnvironmentState(
    offer=Offer(id="small", desc="two cores, no GPU", limits=Limits()), running=1, waiting=0, last_seen=_AT
)


def shown(example: Any, *, status: int = 200, media_type: str = "application/json") -> Answers:
    """The good answer of a call, by *example*."""
    return {status: {"content": {media_type: {"example": example}}}}


def linked(answers: Answers, links: dict[str, Any]) -> Answers:
    return {status: {**answer, "links": links} for status, answer in answers.items()}


_BINARY: Final = {"content": {"*/*": {"schema": {"type": "string", "format": "binary"}}}}
FILE: Final[Answers] = {200: {"description": "The file, in the media type it has", **_BINARY}}
RANGE: Final = {
    "name": "Range",
    "in": "header",
    "required": False,
    "description": "The part that is wanted, as in RFC 9110; what cannot be understood is passed over",
    "schema": {"type": "string"},
    "example": "bytes=0-1023",
}
RANGE_OF_FILE: Final[Answers] = {
    **FILE,
    307: {
        "description": "Where the environment has results fetched from its store: a link that holds for a short time",
        "headers": {"Location": {"required": True, "schema": {"type": "string", "format": "uri"}}},
    },
    206: {
        "description": "The part that the header Range asks for",
        "headers": {"Content-Range": {"required": True, "schema": {"type": "string"}}},
        **_BINARY,
    },
    416: {
        "description": "The range lies outside the file",
        "headers": {"Content-Range": {"required": True, "schema": {"type": "string"}}},
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}},
    },
}
EXPIRED: Final[Answers] = {
    410: {
        "description": "The link has expired, and the job's status has a new one; or its results have",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}},
    }
}
GONE: Final[Answers] = {
    410: {
        "description": "The job's results have expired",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}},
    }
}
HEAD_OF_FILE: Final[Answers] = {
    200: {"description": "The headers that GET would answer with, Content-Length among them"}
}


def _led_to(prefix: str, *calls: str, job: str, **more: str) -> dict[str, Any]:
    """OpenAPI's links: what can be asked next about the job that *job* points to."""
    return {call.lower(): {"operationId": f"{prefix}{call}", "parameters": {"jobId": job, **more}} for call in calls}


_FIRST: Final = "$response.body#/0/jobId"
_OPERATOR_NEXT: Final = ("ComputeStatus", "ComputeStop", "ComputeDelete", "Status")
EARLY: Final = shown([wire.early_status(_JOB, Dialect.OPERATOR, _VIEW).model_dump()])
OPERATOR: Final = shown([wire.operator_status(_JOB, _VIEW).model_dump()])
PROVIDER: Final = shown([wire.provider_status(_JOB, _VIEW).model_dump()])
BRIZO: Final = shown(wire.brizo_status(_JOB, _VIEW).model_dump())
BRIZO_LIST: Final = shown([wire.brizo_status(_JOB, _VIEW).model_dump()])
OPERATOR_STARTED: Final = linked(OPERATOR, _led_to("operator", *_OPERATOR_NEXT, job=_FIRST))
OPERATOR_INIT: Final = linked(
    shown(JOB_ID, media_type="text/plain"), _led_to("operator", *_OPERATOR_NEXT, job="$response.body")
)
ENVIRONMENTS: Final = shown([wire.environment(_ENVIRONMENT, address=ADDRESS).model_dump()])

_FEE: Final = {
    "providerFeeAddress": ADDRESS,
    "providerFeeToken": "0x" + "55" * 20,
    "providerFeeAmount": "1000000000000000000",
    "providerData": "0x7b7d",
    "v": 27,
    "r": "0x" + "66" * 32,
    "s": "0x" + "77" * 32,
    "validUntil": 1795332487,
}
FEES: Final = shown({"datasets": [{"datatoken": "0x" + "88" * 20, "providerFee": _FEE}], "algorithm": {}})
ACCESS_FEE: Final = shown(
    {
        "datatoken": "0x" + "88" * 20,
        "providerFee": _FEE | {"providerFeeAmount": "0"},
        "nonce": NONCE,
        "computeAddress": ADDRESS,
    }
)
FILES: Final = shown([{"index": 0, "valid": True, "contentLength": "8", "contentType": "text/csv"}])

# What calls are shown with.
CONSUMER: Final = {"consumerAddress": ADDRESS, "signature": SIGNATURE, "nonce": NONCE}
START: Final = {
    **CONSUMER,
    "environment": "small",
    "dataset": {"documentId": DATASET, "serviceId": SERVICE_ID, "transferTxId": ORDER},
    "algorithm": {"documentId": ALGORITHM, "serviceId": SERVICE_ID, "transferTxId": ORDER},
    "output": {"whitelist": []},
}
INITIALIZE: Final = {
    "consumerAddress": ADDRESS,
    "datasets": [{"documentId": DATASET, "serviceId": SERVICE_ID}],
    "algorithm": {"documentId": ALGORITHM, "serviceId": SERVICE_ID},
    "compute": {"env": "small", "validUntil": 1795332487},
}
FILE_OBJECT: Final = {"type": "url", "url": "https://example.com/data.csv", "method": "GET", "checksum": True}
CONTAINER: Final = {"image": "python", "tag": "3.12", "entrypoint": "python3 $ALGO", "checksum": "sha256:" + "99" * 32}
BRIZO_START: Final = {
    "signature": SIGNATURE,
    "serviceAgreementId": ORDER,
    "consumerAddress": ADDRESS,
    "algorithmMeta": {"rawcode": "print('hello')", "container": CONTAINER},
}
