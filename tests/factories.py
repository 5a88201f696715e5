"""Small builders of what tests need: documents, offers, settings, keys, results, and a client of the real app."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final

import httpx
import uvicorn
from anyio.from_thread import BlockingPortal, start_blocking_portal
from eth_account import Account
from eth_account.messages import encode_defunct
from eth_account.signers.local import LocalAccount
from eth_utils.crypto import keccak
from fastapi import FastAPI
from sqlalchemy import text

from api.agreements import Agreements
from api.app import create_app
from api.protocol import JsonProtocol
from api.settings import Settings
from blocks.catalogue import Catalogues
from blocks.limits import Limits, Offer
from flows.broker import Broker
from flows.jobs import Job, MemoryJobs, Result, only_job
from flows.sealing import create_key_file
from flows.workflow import parse_workflow

SPEC: Final = Path(__file__).parent / "spec"

OWNER: Final = "0xC41808BBef371AD5CFc76466dDF9dEe228d2BdAA"
PROVIDER: Final[LocalAccount] = Account.from_key(b"\x01" * 32)
ADMIN: Final[LocalAccount] = Account.from_key(b"\x02" * 32)
STRANGER: Final[LocalAccount] = Account.from_key(b"\x03" * 32)


def workflow(**changes: Any) -> dict[str, Any]:
    """One stage in ``withgpu``; *changes* replace keys of the document."""
    return {"agreementId": "111", "owner": OWNER, "stages": [stage()], **changes}


def stage(**changes: Any) -> dict[str, Any]:
    return {
        "index": 0,
        "input": [{"id": "did:op:01", "index": 0, "url": ["https://example.com/data.csv"]}],
        "compute": {"Instances": 1, "namespace": "withgpu", "maxtime": 60},
        "algorithm": {
            "id": "did:op:02",
            "rawcode": "print('hello')",
            "container": {"image": "python", "tag": "3.12", "entrypoint": "python3 $ALGO"},
        },
        "output": {"whitelist": [], "publishoutput": True, "publishalgolog": True},
        **changes,
    }


def offers() -> dict[str, Offer]:
    return {"withgpu": Offer(id="withgpu", desc="has a GPU", limits=Limits(gpus=1)), "small": Offer(id="small")}


def settings(folder: Path, **changes: Any) -> Settings:
    """Open to this machine only, nothing read from the environment; *changes* replace settings."""
    create_key_file(folder / "key")
    values = {"key_file": folder / "key", "nonce_database": "sqlite+aiosqlite://", **changes}
    return Settings.model_validate(values)


def result(filename: str, body: bytes, kind: str = "output", media_type: str = "text/plain") -> tuple[Result, bytes]:
    digest = hashlib.sha256(body).hexdigest()
    return Result(filename=filename, filesize=len(body), media_type=media_type, kind=kind, sha256=digest), body


_clock: Final = count(1_700_000_000_000)


def next_nonce() -> int:
    """Greater than all before it."""
    return next(_clock)


def sign(key: LocalAccount, message: str) -> str:
    """In the Provider's scheme."""
    signed = key.sign_message(encode_defunct(primitive=keccak(text=message)))
    return "0x" + bytes(signed.signature).hex()


def signed(key: LocalAccount, owner: str = "", job_id: str = "", *, nonce: int | str | float = 0) -> dict[str, Any]:
    """``providerSignature`` and ``nonce``, each time a greater one, over ``owner + [job_id] + nonce``."""
    nonce = nonce or next(_clock)
    return {"providerSignature": sign(key, f"{owner}{job_id}{nonce}"), "nonce": nonce}


def consumer_signed(key: LocalAccount, *parts: object, nonce: int | str = 0) -> dict[str, Any]:
    """``consumerAddress``, ``signature`` and ``nonce``, each time a greater one, over address + *parts* + nonce."""
    nonce = nonce or next(_clock)
    message = f"{key.address}{''.join(map(str, parts))}{nonce}"
    return {"consumerAddress": key.address, "signature": sign(key, message), "nonce": nonce}


def brizo_sign(key: LocalAccount, message: str) -> str:
    """In Brizo's scheme: plain EIP-191 over the text."""
    return "0x" + bytes(key.sign_message(encode_defunct(text=message)).signature).hex()


class Client:
    """A client of the real app in this process, and the jobs under it. Answers are those of httpx."""

    def __init__(self, portal: BlockingPortal, http: httpx.AsyncClient, app: FastAPI, jobs: MemoryJobs) -> None:
        self._portal = portal
        self._http = http
        self.app = app
        self.jobs = jobs

    def request(self, method: str, url: str, **options: Any) -> httpx.Response:
        return self._portal.call(partial(self._http.request, method, url, **options))

    def get(self, url: str, **options: Any) -> httpx.Response:
        return self.request("GET", url, **options)

    def post(self, url: str, **options: Any) -> httpx.Response:
        return self.request("POST", url, **options)

    def put(self, url: str, **options: Any) -> httpx.Response:
        return self.request("PUT", url, **options)

    def delete(self, url: str, **options: Any) -> httpx.Response:
        return self.request("DELETE", url, **options)

    def emptied(self) -> Client:
        """The same app over no jobs: making an app takes longer than most tests."""
        self.jobs = MemoryJobs(offers())
        service = self.app.state.service
        broker = replace(service.broker, jobs=self.jobs)
        self.app.state.service = replace(service, jobs=self.jobs, broker=broker)
        self._portal.call(_forget, service.agreements)
        return self

    def started(self, **changes: Any) -> str:
        """The id of a new job, put straight under the app."""
        return self._portal.call(self.jobs.submit, parse_workflow(workflow(**changes))).id

    def job(self, job_id: str) -> Job:
        """As the jobs under the app have it."""
        return self._portal.call(only_job, self.jobs, job_id)


async def _forget(agreements: Agreements) -> None:
    """Which agreements were used: the jobs they were used for are gone."""
    async with agreements._database.transaction() as connection:
        await connection.execute(text("DELETE FROM used_agreements"))


@contextmanager
def client(of: Settings, jobs: MemoryJobs | None = None, peer: str = "127.0.0.1", **broker: Any) -> Iterator[Client]:
    """
    The app as its server runs it, lifespan and all, but without a socket; *peer* is where calls come from, *broker*
    are parts of the broker.
    """
    jobs = jobs if jobs is not None else MemoryJobs(offers())
    app = create_app(of, Broker(jobs=jobs, **{"catalogue": Catalogues([]), **broker}))

    @asynccontextmanager
    async def running() -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=(peer, 50_000))
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://localhost:8030") as http,
        ):
            yield http

    with start_blocking_portal() as portal, portal.wrap_async_context_manager(running()) as http:
        yield Client(portal, http, app, jobs)


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The URL of *app* behind a real server, which speaks HTTP as that of ``api.main`` does."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=JsonProtocol, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server has not started"
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def spec(name: str) -> Any:
    """An example of the documents, as printed."""
    return json.loads((SPEC / name).read_text(encoding="utf-8"))
