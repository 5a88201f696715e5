"""The command line: ``c2d up``, ``c2d demo``, ``c2d demo-chain``, ``c2d plan``, ``c2d catalogue``, ``c2d upkeep``."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import anyio
import httpx
from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from blocks.assets import LocalAsset
from blocks.catalogue import CatalogueUnavailable, LocalCatalogue, Problem
from blocks.environment import state_folder
from cli.demo import DemoFailed, run_demo
from cli.demo_chain import run_demo_chain
from cli.local_chain import TransactionFailed
from cli.service import ROOT, CannotStart, Service, interruptible, wait_for_interrupt
from flows.environments import read_definitions
from flows.errors import InvalidWorkflow
from flows.plan import compile_plan
from flows.workflow import parse_workflow

app = App(name="c2d", help="Bring the algorithm to the data.")
_console = Console()
_errors = Console(stderr=True)


@app.command
def up(*, state: Path | None = None, api_port: int = 8050, prefect_port: int = 4200) -> int:
    """Start the whole service on this machine and keep it in the foreground; Ctrl-C ends it.

    Parameters
    ----------
    state
        Folder of everything that is kept (default: $C2D_STATE, else .c2d).
    api_port
        Port of the API; 0 for any free one.
    prefect_port
        Port of the Prefect server and its UI; 0 for any free one.
    """
    service = Service(
        state=state or state_folder(),
        api_port=api_port,
        prefect_port=prefect_port,
        say=lambda line: _line(f"starting: {line}"),
    )
    try:
        with service:
            _line(f"\nAPI            {service.api_url}")
            _line(f"documentation  {service.api_url}/docs")
            _line(f"Prefect UI     {service.prefect_url}")
            _line(f"state          {service.state}")
            _line(f"catalogue      {service.state / 'catalogue'}")
            _line(f"provider       {service.provider_address or 'see the log of the API'}")
            _line(f"sandbox        {sandbox_line()}\n\nCtrl-C stops the service.")
            wait_for_interrupt(service)
            _line("stopping; jobs in flight go on at the next start")
    except (CannotStart, KeyboardInterrupt) as problem:
        _failed(str(problem) or "interrupted")
        return 1
    return 0


@app.command
def demo(*, state: Path | None = None) -> int:
    """Run a real two-stage job through a service started for it: submit, follow, download, show, stop.

    Parameters
    ----------
    state
        Folder of the demo's service and results (default: demo in $C2D_STATE, else .c2d/demo).
    """
    _console.print(f"sandbox: {sandbox_line()}\n")
    try:
        run_demo(state or state_folder() / "demo", _console)
    except (CannotStart, DemoFailed, httpx.HTTPError) as problem:
        _failed(f"the demo failed: {problem}")
        return 1
    return 0


@app.command
def demo_chain(*, state: Path | None = None) -> int:
    """Run the same job through the Provider's dialect, ordered and paid for on a chain started for it.

    Parameters
    ----------
    state
        Folder of the demo's chain, service and results (default: demo-chain in $C2D_STATE, else .c2d/demo-chain).
    """
    _console.print(f"sandbox: {sandbox_line()}\n")
    try:
        run_demo_chain(state or state_folder() / "demo-chain", _console)
    except (CannotStart, DemoFailed, TransactionFailed, httpx.HTTPError) as problem:
        _failed(f"the demo failed: {problem}")
        return 1
    return 0


@app.command
def plan(workflow: Path, *, environments: Annotated[Path, Parameter()] = ROOT / "prefect.yaml") -> int:
    """Print what would be done for a workflow document, or everything that is wrong with it. Needs no server.

    Parameters
    ----------
    workflow
        The document as it would be posted, with or without the outer "workflow" key.
    environments
        The prefect.yaml that defines the compute environments.
    """
    try:
        document = json.loads(workflow.read_text())
    except (OSError, ValueError) as fault:
        _errors.print(f"{workflow}: cannot be read as JSON ({fault})", markup=False, highlight=False, soft_wrap=True)
        return 1
    inner = document.get("workflow", document) if isinstance(document, dict) else document
    offers = {block.offer.id: block.offer for block in read_definitions(environments)}
    try:
        _console.print(str(compile_plan(parse_workflow(inner), offers)), markup=False, highlight=False, soft_wrap=True)
    except InvalidWorkflow as refusal:
        for problem in refusal.problems:
            _errors.print(str(problem), markup=False, highlight=False, soft_wrap=True)
        return 1
    return 0


@app.command
def catalogue(path: Path | None = None) -> int:
    """Show what a catalogue offers, and everything that is wrong with it. Needs no server.

    Parameters
    ----------
    path
        The folder or file (default: catalogue in $C2D_STATE, else .c2d/catalogue).
    """
    try:
        assets, problems = asyncio.run(_offered(LocalCatalogue(path or state_folder() / "catalogue")))
    except CatalogueUnavailable as fault:
        _failed(str(fault))
        return 1
    table = Table("did", "type", "services", "name")
    for asset in assets:
        services = ", ".join(f"{service.id} ({service.type})" for service in asset.services)
        table.add_row(asset.id, asset.metadata.type, services, asset.metadata.name)
    _console.print(table)
    for problem in problems:
        _failed(f"{problem.file}: {problem.sentence}")
    return 1 if problems else 0


@app.command
def upkeep(*, pool: str) -> int:
    """Look after a work pool that Prefect's own workers serve, until Ctrl-C; see docs/reliability.md.

    Parameters
    ----------
    pool
        Name of the work pool, of type process, docker or kubernetes. Its server is at $PREFECT_API_URL; the job
        folders and the key are found by $C2D_STATE and $C2D_KEY_FILE, as by its runs.
    """
    # A second that no other command has to wait.
    from prefect.logging import get_logger  # noqa: PLC0415

    from flows.upkeep import CannotKeepUp, keep_up  # noqa: PLC0415

    try:
        asyncio.run(_until_interrupted(keep_up(pool, get_logger("upkeep"))))
    except CannotKeepUp as problem:
        _failed(str(problem))
        return 1
    return 0


async def _until_interrupted(work: Coroutine[Any, Any, None]) -> None:
    """An exception that a signal raises somewhere in a program of many tasks would be told as a failure of one."""
    with anyio.CancelScope() as scope:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, scope.cancel)
        await work


async def _offered(catalogue: LocalCatalogue) -> tuple[tuple[LocalAsset, ...], tuple[Problem, ...]]:
    return await catalogue.assets(), await catalogue.problems()


def _line(text: str) -> None:
    """As it is: no markup in a path, no line break in an address that somebody copies."""
    _console.print(text, markup=False, highlight=False, soft_wrap=True)


def _failed(text: str) -> None:
    _errors.print(text, style="red", markup=False, highlight=False, soft_wrap=True)


def sandbox_line() -> str:
    """Whether the environments of prefect.yaml can shut algorithms in on this machine, and what follows."""
    lines = []
    for block in read_definitions(ROOT / "prefect.yaml"):
        obstacle = block.make_runner().obstacle()
        if obstacle is None:
            what = "algorithms are shut in by bubblewrap"
        elif block.allow_unsandboxed:
            what = f"none; algorithms are run all the same, as the environment allows. {obstacle}"
        else:
            what = f"none; every job is refused. {obstacle}"
        lines.append(f"{block.offer.id}: {what}")
    return "; ".join(lines)


def main() -> None:
    interruptible()
    sys.exit(app())
