"""The web service, put together: pieces, routes, and what every refusal and fault is answered with."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import AsyncIterator, Callable
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
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import brizo_service, operator_service, provider_service, results
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
        title=SOFTWARE, version=version(SOFTWARE), lifespan=lifespan, redirect_slashes=False, redoc_url=None
    )
    app.state.service = Service(
        settings=settings,
        jobs=broker.jobs,
        broker=broker,
        gate=OperatorGate(settings, nonces),
        consumers=ConsumerGate(settings, nonces, Tokens(database, settings.key_file)),
        links=Links(settings.key_file, settings.link_seconds),
    )
    for router in (_about(broker), *ROUTERS):
        for route in router.routes:
            if isinstance(route, APIRoute):
                # Else the documentation names a call by its endpoint's name, in title case.
                route.summary = route.description.split(".")[0].split("; ")[0]
        app.include_router(router, responses=_faults(router))
    # As FastAPI's own documentation does it.
    app.openapi = _described(app)  # type: ignore[method-assign]
    app.exception_handler(Refusal)(_refused)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HTTPException)(_unroutable)
    app.add_middleware(Faults)
    return app


_STATUSES: Final = (400, 401, 403, 404, 405, 409, 410, 413, 416, 500, 502, 503)


def _faults(router: APIRouter) -> dict[int | str, dict[str, Any]]:
    """What every call may be answered with instead, for the documentation."""
    provider = router.prefix == provider_service.router.prefix
    model: Any = FieldErrors | AssetError | ErrorAnswer if provider else ErrorAnswer
    return {status: {"model": model, "description": HTTPStatus(status).phrase} for status in _STATUSES}


def _described(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """The OpenAPI document, without the 422 that FastAPI answers wrong parameters with and this service does not."""
    described = app.openapi

    def openapi() -> dict[str, Any]:
        document = described()
        for path in document["paths"].values():
            for call in path.values():
                call.get("responses", {}).pop("422", None)
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
        if isinstance(route, APIRoute) and route.include_in_schema
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


async def _unroutable(_: Request, fault: HTTPException) -> JSONResponse:
    return JSONResponse({"error": fault.detail.lower()}, fault.status_code, headers=fault.headers)


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
