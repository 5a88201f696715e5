"""
Registers compute environments and their work pools, from ``definitions.environments`` of prefect.yaml.

**Importing this module registers.** ``prefect deploy`` refuses a deployment whose work pool does not exist, and
it asks before it runs any step of a deployment; the one thing it does earlier is to import the entrypoint. So
prefect.yaml names this module's flow as its first deployment, and a bare server needs nothing but
``prefect deploy --all``. Nothing else imports this module.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from prefect import flow

from flows.environments import register_from

DEFINITIONS: Final = "C2D_DEFINITIONS"
"""Environment variable naming the file given to ``prefect deploy --prefect-file``, which tells no flow of it."""


@flow(name="register-environments")
def register_environments() -> list[str]:
    """Register once more, for example after prefect.yaml has changed. Returns the ids, in the file's order."""
    return register_from(Path(os.environ.get(DEFINITIONS, "prefect.yaml")))


# `prefect deploy` imports this on its event loop, where saving a block would hand back a coroutine that nobody
# awaits; a thread has no loop.
with ThreadPoolExecutor(1) as _thread:
    _thread.submit(register_environments.fn).result()
