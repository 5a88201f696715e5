"""Starts the API: the one place that reads settings and opens connections."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp
import uvicorn
from fastapi import FastAPI
from prefect import get_client
from pydantic import ValidationError

from api.app import create_app
from api.protocol import JsonProtocol
from api.settings import Settings
from blocks.catalogue import Catalogue, Catalogues, LocalCatalogue, MetadataStore
from blocks.chain import Chain
from blocks.keys import KeyUnusable, load_provider_key
from blocks.limits import FetchLimits
from blocks.remote import Access
from flows.broker import Broker
from flows.prefect_jobs import PrefectJobs
from flows.sealing import Seal


@asynccontextmanager
async def created(settings: Settings) -> AsyncIterator[FastAPI]:
    """
    The service over the Prefect server that ``PREFECT_API_URL`` names.

    Raises:
        KeyUnusable
    """
    key = await load_provider_key(
        block=settings.provider_key_block,
        keystore=settings.keystore,
        password_file=settings.keystore_password_file,
    )
    print(f"provider address: {key.address if key else 'none, since no key is set'}", file=sys.stderr)
    async with AsyncExitStack() as stack:
        sources: list[Catalogue] = []
        if settings.catalogue is not None:
            sources.append(LocalCatalogue(settings.catalogue))
        if settings.metadata_store is not None:
            # The operator's own word, so its address may be one that consumers may not name.
            session = await stack.enter_async_context(aiohttp.ClientSession(trust_env=False))
            sources.append(MetadataStore(str(settings.metadata_store), session))
        # Without a key nobody could tell its fees from forged ones.
        chains = {config.id: Chain(config, key.address) for config in settings.chains if key is not None}
        for chain in chains.values():
            stack.push_async_callback(chain.close)
        client = await stack.enter_async_context(get_client())
        jobs = PrefectJobs(client, Seal.from_file(settings.key_file), local_workers=settings.local_workers)
        broker = Broker(
            jobs=jobs,
            sources=jobs.sources,
            catalogue=Catalogues(sources),
            chains=chains,
            key=key,
            limits=FetchLimits(networks=settings.networks),
            access=Access(
                ipfs_gateway=settings.ipfs_gateway,
                arweave_gateway=settings.arweave_gateway,
                chains={config.id: config.rpc.get_secret_value() for config in settings.chains},
            ),
            deny_unlisted=settings.deny_unlisted_algorithms,
            default_environment=settings.default_environment,
            metadata_url=str(settings.metadata_store or "").rstrip("/"),
        )
        yield create_app(settings, broker)


async def _serve(settings: Settings) -> None:
    async with created(settings) as app:
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            log_level="warning",
            http=JsonProtocol,
            server_header=False,
            # The address of the peer decides who is on loopback; a header must not be able to say so.
            proxy_headers=False,
            timeout_graceful_shutdown=10,
        )
        await uvicorn.Server(config).serve()


def main() -> None:
    try:
        settings = Settings()  # from the environment
    except ValidationError as fault:
        for error in fault.errors(include_url=False, include_input=False, include_context=False):
            name = "_".join(map(str, error["loc"])).upper()
            print(f"C2D_{name}: {error['msg']}" if name else error["msg"], file=sys.stderr)
        sys.exit(2)
    try:
        asyncio.run(_serve(settings))
    except KeyUnusable as fault:
        print(fault, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
