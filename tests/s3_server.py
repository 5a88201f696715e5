"""A real S3 server for tests: rclone over a folder. It checks signatures: wrong credentials are refused."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

KEY = "test-key"
SECRET = "test-secret-0123456789"


@contextmanager
def s3_server(folder: Path, bucket: str = "results") -> Iterator[dict[str, Any]]:
    """Serve *folder*, with *bucket* in it, on a free loopback port; yields ``storage_options`` for fsspec."""
    (folder / bucket).mkdir(parents=True)
    port = _free_port()
    server = subprocess.Popen(
        [
            rclone(),
            "serve",
            "s3",
            "--addr",
            f"127.0.0.1:{port}",
            "--auth-key",
            f"{KEY},{SECRET}",
            "--vfs-cache-mode",
            "full",
            # Without these rclone reads the configuration and fills the cache of whoever runs the tests.
            "--config",
            "",
            "--cache-dir",
            str(folder.parent / f"{folder.name}-cache"),
            str(folder),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_until_open(port, server)
        yield {"key": KEY, "secret": SECRET, "endpoint_url": f"http://127.0.0.1:{port}"}
    finally:
        server.terminate()
        server.wait(10)


def rclone() -> str:
    beside_python = Path(sys.executable).with_name("rclone")
    found = str(beside_python) if beside_python.exists() else shutil.which("rclone")
    assert found, "rclone is not installed: uv sync installs it from the dev group"
    return found


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_open(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 20
    while server.poll() is None and time.monotonic() < deadline:
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise AssertionError("the S3 server did not start")
