"""What the dialects of consumers have in common: how they name things, and what each consumer may see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

from fastapi.requests import Request
from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from api import wire
from api.auth import Caller
from api.parameters import parse_object
from api.service import Service
from blocks.shapes import JsonText
from blocks.store import Kind
from flows.errors import InvalidParameter, JobNotFound, NoSuchResult, Refusal
from flows.jobs import ADMIN_KINDS, Job, JobQuery, parse_job_id, results_expired

ADDRESS: Final = r"^0x[0-9a-fA-F]{40}$"
Address = Annotated[str, Field(pattern=ADDRESS, description="0x and 40 hex digits, in any case of letters")]
_OUTPUT: Final = frozenset({Kind.OUTPUT})
_CONSUMERS: Final = frozenset(Kind) - ADMIN_KINDS


def parse_if_text(value: Any) -> Any:
    """A part that stands as JSON in a query string; everything else as it is."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.startswith("{"):
        return parse_object(text)
    if not text.startswith("["):
        return value
    # As strict as for an object, which it is made part of.
    return parse_object('{"list": ' + text + "}")["list"]


Object = Mapping[str, Any]
OptionalObject = Annotated[
    Object,
    BeforeValidator(
        lambda value: {} if value in (None, "") else parse_if_text(value),
        json_schema_input_type=Object | JsonText | None,
    ),
]


def parse_if_json(value: Any) -> Any:
    """A value that may be anything: JSON where a text is an object or a list of it, else as it is."""
    try:
        return parse_if_text(value)
    except InvalidParameter:
        return value


def one_job(value: Any) -> Any:
    """As it was written, since that is what was signed; in form the id of a job."""
    if not isinstance(value, str):
        raise PydanticCustomError("job_id", "must be 32 hexadecimal digits")
    try:
        parse_job_id(value)
    except Refusal:
        raise PydanticCustomError("job_id", "must be 32 hexadecimal digits") from None
    return value


JobId = Annotated[
    str,
    BeforeValidator(
        lambda value: value if value == "" else one_job(value),
        json_schema_input_type=Annotated[str, Field(pattern=r"^([0-9a-fA-F]{32})?$")],
    ),
    Field(description="32 hex digits; empty is as if it were left out"),
]


def visible(job: Job, caller: Caller, request: Request, service: Service, *, named: bool = False) -> wire.View:
    """
    What *caller* may see of *job*: its owner all but what is for admins, an address on its whitelist the outputs, an
    admin what is for admins. Others see no URL; with *named*, when the job's id was given, names and sizes of files,
    because clients of the original do not sign here and choose by them what to fetch.
    """
    base = str(service.settings.public_url or request.base_url).rstrip("/")

    def link(of: Job, index: int) -> str:
        return base + service.links.path(of, index)

    kinds = _kinds(job, caller)
    if kinds:
        return wire.View(link=link, admin=caller.admin, kinds=kinds)
    return wire.View(link=None, kinds=_CONSUMERS if named else frozenset())


def _kinds(job: Job, caller: Caller) -> frozenset[str]:
    """Of the files of *job* that *caller* may have."""
    kinds: frozenset[str] = frozenset()
    if caller.address == job.owner.lower():
        kinds |= _CONSUMERS
    elif caller.address is not None and caller.address in job.whitelist:
        kinds |= _OUTPUT
    return kinds | ADMIN_KINDS if caller.admin else kinds


async def result_of(service: Service, job_id: str, index: int, caller: Caller) -> Job:
    """
    The job whose result *index* the *caller* may have.

    Raises:
        JobNotFound: There is none of this id, or none of which this caller may know.
        ResultsExpired
        NoSuchResult
    """
    found = await service.jobs_for(JobQuery(job_id=parse_job_id(job_id)), caller)
    if not found or not (kinds := _kinds(found[0], caller)):
        raise JobNotFound(f"consumerAddress has no job {job_id}")
    job = found[0]
    if job.expired:
        raise results_expired(job)
    if not job.results:
        raise NoSuchResult(f"No results for job {job_id}")
    if not 0 <= index < len(job.results) or job.results[index].kind not in kinds:
        raise NoSuchResult(f"No such index {index} in this compute job")
    return job
