"""
``python -m flows.attempt``: runs the one flow run that a container or a pod was started for; the command of the job
templates in ``deploy/``.

Prefect's own is ``prefect flow-run execute``. This does as this project's worker does: a stop is over when the process
is, a job whose process died goes back into the queue without having seemed to end, and so does one whose container is
told to end. It starts one interpreter less, and ends with exit code 0 whenever it has told what became of the run, or
the worker that started the container would tell something else.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import anyio
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.logging import get_logger
from prefect.runner._flow_run_executor import FlowRunExecutorContext

from flows.worker import ForkServers, ForkStarter, Hooks, Proposer, WarmJobConfiguration

RUN: Final = "PREFECT__FLOW_RUN_ID"
"""Environment variable with the id of the run, set by Prefect's workers."""


class _Proposer(Proposer):
    """Leaves a run alone that has been begun elsewhere since: it was taken up, for nobody heard of this process."""

    begun: int

    async def propose_crashed(self, flow_run: FlowRun, message: str) -> State[Any] | None:
        if (await self._api.read_flow_run(flow_run.id)).run_count > self.begun:
            return None
        return await super().propose_crashed(flow_run, message)


async def attempt(run_id: UUID) -> bool:
    """
    Run it to its end, or hand it back when this process is told to end.

    Returns:
        Whether that could be done. It cannot for a run whose code is not installed here.
    """
    logger = get_logger("attempt")
    async with get_client() as client:
        run = await client.read_flow_run(run_id)
        deployment = await client.read_deployment(run.deployment_id) if run.deployment_id is not None else None
    configuration = WarmJobConfiguration()
    configuration.prepare_for_flow_run(run, deployment)
    if configuration.module is None:
        return False
    name = run.labels.get("prefect.worker.name")
    worker = name if isinstance(name, str) else ""
    servers = ForkServers(logger.warning)

    async def nothing() -> None:
        """It is the worker that is heard of, not this."""

    with anyio.CancelScope() as scope, tempfile.TemporaryDirectory() as folder:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, scope.cancel)
        try:
            async with FlowRunExecutorContext() as context:
                proposer = _Proposer(context.client, worker, None)
                proposer.begun = run.run_count + 1
                context._state_proposer = proposer
                starter = ForkStarter(
                    servers, configuration, Path(folder), context.control_channel, worker=worker, report=nothing
                )
                executor = context.create_executor(run, starter, propose_submitting=False, hook_runner=Hooks(starter))
                await executor.submit()
        finally:
            with anyio.CancelScope(shield=True):
                await servers.close()
    return True


def main() -> None:
    try:
        run_id = UUID(os.environ[RUN])
    except (KeyError, ValueError):
        sys.exit(f"{RUN} does not name a flow run; Prefect's worker sets it")
    if not asyncio.run(attempt(run_id)):
        os.execvp("prefect", ["prefect", "flow-run", "execute"])  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    main()
