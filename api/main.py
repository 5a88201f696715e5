"""Starts the API: the one place that reads settings and opens connections."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI
from prefect import get_client
from pydantic import ValidationError

from api.app import create_app
from api.settings import Settings
from flows.prefect_jobs import PrefectJobs
from flows.sealing import Seal


def create(settings: Settings) -> FastAPI:
    """The service over the Prefect server that ``PREFECT_API_URL`` names."""
    client = get_client()
    jobs = PrefectJobs(client, Seal.from_file(settings.key_file), local_workers=settings.local_workers)
    app = create_app(settings, jobs)
    own = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(served: FastAPI) -> AsyncIterator[None]:
        async with client, own(served):
            yield

    app.router.lifespan_context = lifespan
    return app


def main() -> None:
    try:
        settings = Settings()  # from the environment
    except ValidationError as fault:
        for error in fault.errors(include_url=False, include_input=False, include_context=False):
            name = "_".join(map(str, error["loc"])).upper()
            print(f"C2D_{name}: {error['msg']}" if name else error["msg"], file=sys.stderr)
        sys.exit(2)
    uvicorn.run(
        create(settings),
        host=settings.host,
        port=settings.port,
        log_level="warning",
        server_header=False,
        # The address of the peer decides who is on loopback; a header must not be able to say so.
        proxy_headers=False,
        timeout_graceful_shutdown=10,
    )


if __name__ == "__main__":
    main()
