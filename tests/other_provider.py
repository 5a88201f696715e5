"""Another house for tests: its Provider, which is ours under uvicorn, and the metadata store its assets stand in."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import uvicorn

from api.app import create_app
from blocks.catalogue import LocalCatalogue
from blocks.keys import ProviderKey
from flows.broker import Broker
from flows.jobs import MemoryJobs
from tests.factories import settings
from tests.file_server import LOOPBACK, FileServer

SERVICE: Final = "download"
"""The id of every asset's service."""
SECONDS_TO_START: Final = 20.0


def ddo(
    did: str, endpoint: str, files: Sequence[str], *, allow: Sequence[str] = (), type: str = "dataset"
) -> dict[str, Any]:
    """The document of an asset with one service for downloads at *endpoint*; *files* are URLs, in clear."""
    container = {"image": "python", "tag": "3.12", "entrypoint": "python3 $ALGO", "checksum": "sha256:" + "ab" * 32}
    return {
        "id": did,
        "version": "4.1.0",
        "metadata": {
            "type": type,
            "name": did,
            **({"algorithm": {"container": container}} if type != "dataset" else {}),
        },
        "services": [
            {
                "id": SERVICE,
                "type": "access",
                "files": [{"type": "url", "url": url, "method": "GET"} for url in files],
                "datatokenAddress": "",
                "serviceEndpoint": endpoint,
                "timeout": 0,
                "consumerParameters": [{"name": name, "type": "text"} for name in ("rows", "of", "token")],
            }
        ],
        "credentials": {"allow": [{"type": "address", "values": list(allow)}] if allow else [], "deny": []},
    }


def publish(store: FileServer, document: dict[str, Any], **answer: Any) -> None:
    """Into a metadata store, which is a file server."""
    store.add(json.dumps(document).encode(), name=f"api/aquarius/assets/ddo/{document['id']}", **answer)


class OtherProvider:
    """
    Runs until the ``with`` block ends. What it serves and what its metadata store has lies on *server*.

    >>> with FileServer() as server, OtherProvider(folder, server) as other:
    ...     other.offer("did:op:aa", b"1,2,3")
    """

    def __init__(self, folder: Path, server: FileServer) -> None:
        self._catalogue = folder / "catalogue"
        self._catalogue.mkdir()
        self._files = server
        # No other process can take the port before the server does.
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        broker = Broker(
            jobs=MemoryJobs({}),
            catalogue=LocalCatalogue(self._catalogue),
            key=ProviderKey.from_secret("0e" * 32),
            limits=LOOPBACK.model_copy(update={"attempts": 1}),
        )
        nonces = f"sqlite+aiosqlite:///{folder / 'nonces.sqlite'}"
        app = create_app(settings(folder, nonce_database=nonces), broker)
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    @property
    def metadata_url(self) -> str:
        return self._files.url

    def offer(self, did: str, *contents: bytes, allow: Sequence[str] = (), type: str = "dataset") -> list[str]:
        """
        Offer an asset of these files to the addresses *allow*, or to all; before the first call or a second later.

        Returns:
            The URLs of the files, which nobody but this provider has to know.
        """
        name = did.removeprefix("did:op:")
        urls = [self._files.add(content, name=f"{name}-source-{n}") for n, content in enumerate(contents)]
        self.write(ddo(did, self.url, urls, allow=allow, type=type))
        return urls

    def write(self, document: dict[str, Any]) -> None:
        """Into the catalogue and the metadata store, where its files, too, stand in clear."""
        (self._catalogue / f"{document['id'].removeprefix('did:op:')}.json").write_text(json.dumps(document))
        publish(self._files, document)

    def __enter__(self) -> Self:
        self._thread.start()
        deadline = threading.Event()
        for _ in range(int(SECONDS_TO_START / 0.05)):
            if self._server.started:
                return self
            deadline.wait(0.05)
        raise RuntimeError("the other provider does not start")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()
