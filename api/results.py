"""Result links: whoever holds one may fetch the file it was made for, until it expires."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.requests import Request
from fastapi.responses import Response

from api import answers
from api.download import download
from api.links import PREFIX
from api.service import ServiceDep
from flows.errors import NoSuchResult
from flows.jobs import only_job, results_expired

router = APIRouter(prefix=PREFIX, tags=["results"])


@router.head(
    "/{token}/{filename:path}",
    name="resultLink",
    response_class=Response,
    responses=answers.HEAD_OF_FILE | answers.EXPIRED,
)
@router.get(
    "/{token}/{filename:path}",
    name="resultLink",
    response_class=Response,
    responses=answers.RANGE_OF_FILE | answers.EXPIRED,
    openapi_extra={"parameters": [answers.RANGE]},
)
async def follow(token: str, filename: str, request: Request, service: ServiceDep) -> Response:
    """The file a link was made for. The name at its end decides nothing."""
    job_id, index, mark = service.links.resolve(token)
    job = await only_job(service.jobs, job_id)
    if job.expired:
        raise results_expired(job)
    if not service.links.holds(job, index, mark):
        raise NoSuchResult("There is no such result any more")
    return await download(request, service.jobs, job, index)
