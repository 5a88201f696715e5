"""The web service, put together: pieces, routes, and what every refusal and fault is answered with."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from http import HTTPStatus
from importlib.metadata import version
from typing import Any, Final

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.requests import Request
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import brizo_service, operator_service, provider_service, results
from api.agreements import Agreements
from api.auth import ConsumerGate, OperatorGate
from api.database import Database
from api.links import Links
from api.nonces import Nonces
from api.refusals import invalid, refused
from api.service import Service
from api.settings import Settings
from api.tokens import Tokens
from api.wire import AssetError, ErrorAnswer, FieldErrors
from flows.broker import Broker
from flows.errors import NotReady, Refusal

SOFTWARE: Final = "compute-to-data"
_INTRODUCTION: Final = """
Runs algorithms beside data that must not leave: one job, told in four dialects.

* Parameters stand in the query string or in a JSON body, whatever the verb; objects and lists stand in a query as JSON.
  Below, each call shows one of the two. A parameter given twice has to say the same. Unknown ones are ignored.
* `dateCreated` and `dateFinished` are Unix times, as decimal strings of seconds. A job has ended when `dateFinished`
  is not null; `statusText` says how, and `reason` what it waits for until then.
* A nonce has to be greater than the last one that was accepted for the address.
* Links to results are signed and expire; asking for the status again makes new ones.
* Errors are JSON: a text in `error`, or what the dialect's clients expect there.
"""
_TAGS: Final = [
    {"name": "service", "description": "What this is, and whether it is there."},
    {
        "name": "operator",
        "description": "For providers, which sign `owner + [jobId] + nonce`. Without a list of them this machine only.",
    },
    {
        "name": "provider",
        "description": "For consumers, who sign the keccak hash of `consumerAddress + … + nonce` as EIP-191, or hold a "
        "token. Data sets and algorithms are assets, named by their DID.",
    },
    {"name": "brizo", "description": "For consumers of Brizo, who sign plain EIP-191 texts, or an auth token."},
    {"name": "results", "description": "Where `url`, `outputsURL` and their like point to."},
]
ROUTERS: Final = (operator_service.router, provider_service.router, brizo_service.router, results.router)
_SECONDS_TO_TRY_AGAIN: Final = "5"
_RECURSION_LIMIT: Final = 1_000

logger = logging.getLogger(__name__)


def create_app(settings: Settings, broker: Broker) -> FastAPI:
    """The service over *broker* and its jobs. Its database is opened when the server starts, closed when it ends."""
    # py_ecc, which comes with eth_account, raises this to 100,000: deep recursion would end the process by stack
    # overflow instead of raising.
    sys.setrecursionlimit(_RECURSION_LIMIT)
    database = Database(settings.nonce_database)
    nonces = Nonces(database)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await database.open()
        yield
        await database.close()

    # Brings the files of /docs along: a service beside data that must not leave may well have no way to the internet.
    app = FastAPIOffline(
        title=SOFTWARE,
        version=version(SOFTWARE),
        description=_INTRODUCTION,
        openapi_tags=_TAGS,
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
        generate_unique_id_function=_operation,
    )
    app.state.service = Service(
        settings=settings,
        jobs=broker.jobs,
        broker=broker,
        gate=OperatorGate(settings, nonces),
        agreements=Agreements(database),
        consumers=ConsumerGate(settings, nonces, Tokens(database, settings.key_file)),
        links=Links(settings.key_file, settings.link_seconds),
    )
    routers = (_about(broker), *ROUTERS)
    for router in routers:
        for route in router.routes:
            if isinstance(route, APIRoute):
                # Else the documentation names a call by its endpoint's name, in title case.
                route.summary = route.description.split(".")[0].split("; ")[0]
        app.include_router(router)
    # As FastAPI's own documentation does it.
    app.openapi = _described(app)  # type: ignore[method-assign]
    app.exception_handler(Refusal)(_refused)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HTTPException)(_unroutable(routers))
    app.add_middleware(Faults)
    return app


def _operation(route: APIRoute) -> str:
    """Its id in the document: the name by which real clients know it."""
    return f"{route.name}Head" if "HEAD" in (route.methods or ()) else route.name


_REFUSED: Final = {
    400: "Something is missing, malformed, or cannot be had; the answer says what",
    401: "A signature, nonce or token does not hold",
    403: "Not allowed to this caller",
    404: "There is no such thing, or none that this caller may know of",
    409: "The job is in no state for this",
    413: "The body is too large",
    500: "A fault of this service; its log says more",
    502: "Where the file is kept does not give it",
    503: "Something the service relies on is away; Retry-After says when to try again",
}
"""What every call of a dialect may be answered with instead."""
_UNHEARD: Final = (400, 500)
"""What is left of it for calls that read nothing: what is no HTTP, and what nobody expected."""
_EXAMPLES: Final = {
    "ErrorAnswer": {"error": "jobId must be 32 hexadecimal digits"},
    "FieldErrors": {
        "success": False,
        "message": "Validation error",
        "errors": {"signature": ["Invalid signature provided."]},
    },
    "AssetError": {"error": {"datasets[0]": "did_not_found"}, "message": "There is no such asset"},
}


def _described(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """
    The OpenAPI document with the errors of each dialect. Not by FastAPI's ``responses``: that would tell errors in the
    media type of the call's good answer, and adds a 422 that this service never answers.
    """
    described = app.openapi
    reference = "#/components/schemas/{model}"
    _, errors = models_json_schema(
        [(model, "serialization") for model in (ErrorAnswer, FieldErrors, AssetError)], ref_template=reference
    )

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        document = described()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas |= errors["$defs"]
        # They describe the 422.
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        for path, calls in document["paths"].items():
            provider = path.startswith(provider_service.router.prefix)
            names = ("FieldErrors", "AssetError", "ErrorAnswer") if provider else ("ErrorAnswer",)
            answers = [{"$ref": reference.format(model=name)} for name in names]
            content = {
                "application/json": {
                    "schema": {"anyOf": answers} if provider else answers[0],
                    "examples": {name: {"value": _EXAMPLES[name]} for name in names},
                }
            }
            for call in calls.values():
                call["responses"].pop("422", None)
                for status in _UNHEARD if call["tags"] == ["service"] else _REFUSED:
                    call["responses"].setdefault(str(status), {"description": _REFUSED[status], "content": content})
        return document

    return openapi


def _about(broker: Broker) -> APIRouter:
    router = APIRouter(tags=["service"])
    described = {
        "software": SOFTWARE,
        "version": version(SOFTWARE),
        "providerAddresses": {str(chain): broker.key.address for chain in broker.chains} if broker.key else {},
        "chainIds": list(broker.chains),
        "serviceEndpoints": _endpoints(),
    }

    @router.get("/")
    async def about() -> dict[str, Any]:
        """What this is, and every endpoint by name."""
        return described

    @router.get("/health")
    async def health() -> dict[str, str]:
        """Answers as long as this process does; says nothing about what it relies on."""
        return {"status": "alive"}

    return router


def _endpoints() -> dict[str, list[str]]:
    return {
        route.name: [*(route.methods or ()), route.path_format]
        for router in ROUTERS
        for route in router.routes
        if isinstance(route, APIRoute) and "HEAD" not in (route.methods or ())
    }


async def _refused(request: Request, refusal: Refusal) -> JSONResponse:
    """The one place where a refusal becomes an answer; its class carries the code."""
    status, answer = refused(request, refusal)
    if not isinstance(refusal, NotReady):
        return JSONResponse(answer, status)
    logger.warning("%s: %s", refusal, refusal.__cause__ or "no cause given")
    return JSONResponse(answer, status, headers={"Retry-After": _SECONDS_TO_TRY_AGAIN})


async def _invalid(request: Request, fault: RequestValidationError) -> JSONResponse:
    status, answer = invalid(request, fault)
    return JSONResponse(answer, status)


def _unroutable(routers: Iterable[APIRouter]) -> Callable[[Request, HTTPException], Awaitable[JSONResponse]]:
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]

    async def answer(request: Request, fault: HTTPException) -> JSONResponse:
        headers = dict(fault.headers or {})
        if fault.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            # Each method is a route of its own here, and Starlette tells the methods of the first one only.
            here = [route for route in routes if route.path_regex.match(request.scope["path"])]
            headers |= (
                {"Allow": ", ".join(sorted({method for route in here for method in route.methods or ()}))}
                if here
                else {}
            )
        return JSONResponse({"error": fault.detail.lower()}, fault.status_code, headers=headers)

    return answer


class Faults:
    """
    Answers 500 for what nobody expected, and logs it once: where it happened and what it was, not what it said,
    since that may quote the request.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def observed(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, observed)
        except ClientDisconnect:
            return  # nobody is left to answer
        except Exception as fault:
            if scope["type"] != "http":
                raise
            route = getattr(scope.get("route"), "path", "unknown path")
            logger.error("%s %s failed: %s", scope["method"], route, _trace(fault))
            if started:
                # The client has the head of another answer already; only a broken connection tells it.
                raise
            await JSONResponse({"error": "internal error"}, 500)(scope, receive, send)


def _trace(fault: BaseException) -> str:
    parts = []
    cause: BaseException | None = fault
    while cause is not None:
        parts.append(f"{type(cause).__name__}\n{''.join(traceback.format_tb(cause.__traceback__))}")
        cause = cause.__cause__ or cause.__context__
    return "\ncaused by ".join(parts)
