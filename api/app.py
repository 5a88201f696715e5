"""The web service, put together: pieces, routes, and what every refusal and fault is answered with."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
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

from api import operator_service, results
from api.auth import OperatorGate
from api.links import Links
from api.nonces import Nonces
from api.parameters import label
from api.service import Service
from api.settings import Settings
from api.wire import operator_text
from flows.errors import InvalidWorkflow, MissingParameter, NotReady, Refusal
from flows.jobs import Jobs

SOFTWARE: Final = "compute-to-data"
ROUTERS: Final = (operator_service.router, results.router)
_SECONDS_TO_TRY_AGAIN: Final = "5"
_RECURSION_LIMIT: Final = 1_000

logger = logging.getLogger(__name__)


def create_app(settings: Settings, jobs: Jobs) -> FastAPI:
    """The service over *jobs*. Its nonce database is opened when the server starts, closed when it ends."""
    # py_ecc, which comes with eth_account, raises this to 100,000: deep recursion would end the process by stack
    # overflow instead of raising.
    sys.setrecursionlimit(_RECURSION_LIMIT)
    nonces = Nonces(settings.nonce_database)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await nonces.open()
        yield
        await nonces.close()

    # Brings the files of /docs along: a service beside data that must not leave may well have no way to the internet.
    app = FastAPIOffline(
        title=SOFTWARE, version=version(SOFTWARE), lifespan=lifespan, redirect_slashes=False, redoc_url=None
    )
    app.state.service = Service(
        settings=settings,
        jobs=jobs,
        gate=OperatorGate(settings, nonces),
        links=Links(settings.key_file, settings.link_seconds),
    )
    for router in (_about(settings), *ROUTERS):
        for route in router.routes:
            if isinstance(route, APIRoute):
                # Else the documentation names a call by its endpoint's name, in title case.
                route.summary = route.description.split(".")[0].split("; ")[0]
        app.include_router(router)
    app.exception_handler(Refusal)(_refused)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HTTPException)(_unroutable)
    app.add_middleware(Faults)
    return app


def _about(settings: Settings) -> APIRouter:
    router = APIRouter(tags=["service"])
    described = {
        "software": SOFTWARE,
        "version": version(SOFTWARE),
        "providerAddresses": settings.provider_addresses,
        "chainIds": settings.chain_ids,
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
    answer: dict[str, Any] = {"error": str(refusal)}
    if isinstance(refusal, InvalidWorkflow):
        texts = dict.fromkeys(operator_text(problem, label(request)) for problem in refusal.problems)
        problems = [{"path": problem.path, "message": problem.message} for problem in refusal.problems]
        answer = {"error": "; ".join(texts), "problems": problems}
    if not isinstance(refusal, NotReady):
        return JSONResponse(answer, refusal.http)
    logger.warning("%s: %s", refusal, refusal.__cause__ or "no cause given")
    return JSONResponse(answer, refusal.http, headers={"Retry-After": _SECONDS_TO_TRY_AGAIN})


async def _invalid(request: Request, fault: RequestValidationError) -> JSONResponse:
    problems = [{"path": ".".join(map(str, error["loc"])), "message": error["msg"]} for error in fault.errors()]
    missing = next((error["loc"][-1] for error in fault.errors() if error["type"] == "missing"), None)
    if missing is not None:
        text = str(MissingParameter(missing, label(request)))
    else:
        text = "; ".join(f"{problem['path']}: {problem['message']}" for problem in problems)
    return JSONResponse({"error": text, "problems": problems}, 400)


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
