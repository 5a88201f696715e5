"""
Removes a container once the process that started it is gone: the engine would let it run on.

A program, started beside each run: it reads its input to the end and takes an end without a word for a death. It
imports nothing until then, because there is one for every run in progress.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress

DONE = b"done"
PATIENCE = 30.0
"""Seconds to go on trying while the engine does not answer."""
ABSENT = 2.0
"""Seconds for which a container must not be there: the engine may be about to make it."""


def main(host: str, label: str) -> None:
    """*label* is one only that container has: a later run may have the same name by the time this one is removed."""
    if sys.stdin.buffer.read() == DONE:
        return
    import docker  # noqa: PLC0415

    end = time.monotonic() + PATIENCE
    absent_since: float | None = None
    while (now := time.monotonic()) < end and (absent_since is None or now - absent_since < ABSENT):
        with suppress(docker.errors.DockerException, OSError):
            client = docker.DockerClient(base_url=host) if host else docker.from_env()
            try:
                found = client.api.containers(all=True, filters={"label": [label]})
                for container in found:
                    client.api.remove_container(container["Id"], force=True, v=True)
                if not found:
                    absent_since = absent_since or now
            finally:
                client.close()
        time.sleep(0.1)


if __name__ == "__main__":
    main(*sys.argv[1:])
