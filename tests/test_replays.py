"""The same signed request, thousands of times at once, at two processes of the API over one database."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import aiohttp
import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount

from cli.service import ROOT, free_port, until_answered
from flows.sealing import create_key_file
from tests.factories import sign

pytestmark = [pytest.mark.slow, pytest.mark.postgres]

REPLAYS = 10_000
AT_ONCE = 400
ALICE: LocalAccount = Account.from_key(b"\x0a" * 32)


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite+aiosqlite:///{tmp_path}/nonces.db"
        return
    with tempfile.TemporaryDirectory() as folder:
        server = pytest.importorskip("pgserver.postgres_server").get_server(Path(folder) / "data")
        yield server.get_uri().replace("postgresql://", "postgresql+asyncpg://")
        server.cleanup()


@contextmanager
def api(database: str, folder: Path) -> Iterator[str]:
    """A process of the API as it is run anywhere; nothing asked of it here needs the Prefect server."""
    port = free_port()
    create_key_file(folder / "key")
    environment = {
        **os.environ,
        "C2D_PORT": str(port),
        "C2D_KEY_FILE": str(folder / "key"),
        "C2D_NONCE_DATABASE": database,
        "PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "api.main"], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    )
    url = f"http://127.0.0.1:{port}"
    try:
        until_answered(f"{url}/health")
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


async def rush(urls: list[str], query: dict[str, str]) -> Counter[int]:
    """How often each status came, of REPLAYS requests, by turns to each of *urls*."""
    statuses: Counter[int] = Counter()
    todo = iter(range(REPLAYS))

    async def ask(session: aiohttp.ClientSession) -> None:
        for n in todo:
            async with session.get(f"{urls[n % 2]}/api/services/createAuthToken", params=query) as answer:
                await answer.read()
                statuses[answer.status] += 1

    connector = aiohttp.TCPConnector(limit=AT_ONCE)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=240)) as session:
        await asyncio.gather(*(ask(session) for _ in range(AT_ONCE)))
    return statuses


def test_of_ten_thousand_replays_one_is_accepted(database: str, tmp_path: Path) -> None:
    """Whichever process they reach; all others are refused, none fails."""
    nonce = str(10**30)
    query = {
        "address": ALICE.address,
        "expiration": str(int(time.time()) + 3_600),
        "nonce": nonce,
        "signature": sign(ALICE, f"{ALICE.address}{nonce}"),
    }
    with ExitStack() as stack:
        urls = [stack.enter_context(api(database, tmp_path)) for _ in range(2)]
        assert Counter({400: REPLAYS - 1, 200: 1}) == asyncio.run(rush(urls, query))
