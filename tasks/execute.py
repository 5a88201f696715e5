"""Run one algorithm in its workspace. One effect, plain arguments."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event

from blocks.limits import Limits
from blocks.runner import Execution, ExitReport, Image, Runner, Waiting, unheard
from tasks.workspace import Workspace, idle


def execute_algorithm(
    runner: Runner,
    workspace: Workspace,
    *,
    job: str,
    name: str,
    entrypoint: str,
    image: Image,
    dids: Sequence[str],
    algorithm_did: str,
    secret: str,
    variables: Mapping[str, str],
    limits: Limits,
    network: bool,
    stop: Event,
    on_waiting: Waiting = unheard,
) -> ExitReport:
    """
    Run the algorithm of *workspace* to its end or to a limit. Blocks for up to ``limits.seconds``.

    *dids* are the names of the input folders. *variables* are the consumer's own and cannot replace the
    documented ones. Setting *stop* ends it within about half a second. *on_waiting* is told why it cannot begin yet.

    Source: contract, section 4, "What the algorithm sees".
    """
    return runner.run(
        Execution(
            job=job,
            name=name,
            entrypoint=entrypoint,
            folders=workspace.folders,
            limits=limits,
            image=image,
            variables={
                **variables,
                "DIDS": json.dumps(list(dids)),
                "TRANSFORMATION_DID": algorithm_did,
                "secret": secret,
            },
            network=network,
        ),
        stop=stop,
        on_waiting=on_waiting,
    )


def end_left_runs(runner: Runner, root: Path) -> list[str]:
    """
    End what still runs of jobs on which no process of this machine works any more, and remove what is left of it.
    *root* is the folder of the jobs. Safe to repeat, and beside jobs in progress.

    For what dies together with its caller there is nothing to do. Of the rest, an algorithm would otherwise run on
    without a deadline, and write where the next try of its job does. Without *root* another volume is mounted than
    the jobs', and who works on them cannot be told: nothing is ended.

    Returns:
        The ids of the jobs.

    Raises:
        OSError: What runs the algorithms does not answer.
    """
    ended: list[str] = []
    if not root.is_dir():
        return ended
    for job in sorted(runner.jobs_left()):
        with idle(root, job) as left:
            if left:
                runner.remove_job(job)
                ended.append(job)
    return ended
