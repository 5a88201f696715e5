"""``c2d demo``: the main job on real data, done as a consumer would, over HTTP."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Final
from uuid import uuid4

import httpx
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress
from rich.table import Table

from cli.service import ROOT, Service

EXAMPLES: Final = ROOT / "examples"
PLACEHOLDER: Final = "http://127.0.0.1:8000/"
"""What the example documents call the examples folder; see examples/README.md."""

JOB_DEADLINE: Final = 300.0
COMPLETED: Final = 70


class DemoFailed(Exception):
    """Something was not as it has to be; the message says what."""


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Requests are the service's business, not the demo's output."""


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """A real HTTP file server over *folder*; yields its base URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def load_example(name: str, base_url: str) -> dict[str, Any]:
    """An example document with its data at *base_url*, under an agreement of its own so that it can be repeated."""
    text = (EXAMPLES / name).read_text(encoding="utf-8").replace(PLACEHOLDER, base_url)
    document: dict[str, Any] = json.loads(text)
    return {**document, "agreementId": f"0x{uuid4().hex}"}


def run_demo(state: Path, console: Console) -> Path:
    """
    Start the service in *state*, run ``examples/workflow.json``, show and keep what comes out, stop everything.

    Returns:
        The folder with the results.

    Raises:
        DemoFailed, CannotStart.
    """
    began = time.monotonic()
    with serving(EXAMPLES) as base_url:
        service = Service(
            state=state,
            # The data of this demo are served from this machine; elsewhere such addresses are refused.
            variables={"C2D_NETWORKS": "127.0.0.0/8"},
            say=lambda line: console.print(f"[dim]{time.monotonic() - began:6.1f} s[/dim]  starting: {line}"),
        )
        with service, httpx.Client(base_url=service.api_url, timeout=30.0) as client:
            console.print(f"\nAPI {service.api_url}/docs   Prefect UI {service.prefect_url}\n")
            job_id = _submit(client, load_example("workflow.json", base_url))
            console.print(f"POST /api/v1/operator/init -> job {job_id}\n")
            job = follow(lambda: _status(client, job_id), console)
            folder = state / "results" / job_id
            download(client, job["results"], folder, console)
        console.print(f"\n[dim]{time.monotonic() - began:6.1f} s[/dim]  stopped everything")
    show(folder, console)
    return folder


def _submit(client: httpx.Client, document: Mapping[str, Any]) -> str:
    answer = client.post("/api/v1/operator/init", json={"workflow": document})
    if answer.is_error:
        raise DemoFailed(f"the workflow was refused: {answer.text}")
    return answer.text


def _status(client: httpx.Client, job_id: str) -> dict[str, Any]:
    answer = client.get("/api/v1/operator/compute", params={"jobId": job_id})
    answer.raise_for_status()
    return dict(answer.json()[0])


def follow(status: Callable[[], dict[str, Any]], console: Console) -> dict[str, Any]:
    """Print every status of a job as it changes. Raises DemoFailed unless the job completes."""
    submitted = time.monotonic()
    console.print("   since start  status  text                     stage  reason")
    shown = 0
    last = ""
    while time.monotonic() - submitted < JOB_DEADLINE:
        job = status()
        created = float(job["dateCreated"])
        # The history holds also what was over before the next poll; the reason belongs to the last of it.
        history = job["history"]
        for n, passed in enumerate(history[shown:], start=shown):
            reason = job["reason"] if n == len(history) - 1 and passed["status"] == job["status"] else ""
            _line(console, float(passed["at"]) - created, passed, reason)
            last = reason or last
        if len(history) == shown and job["reason"] != last:
            _line(console, time.monotonic() - submitted, {**history[-1], "statusText": ""}, job["reason"])
            last = job["reason"]
        shown = len(history)
        if job["dateFinished"] is not None:
            if job["status"] != COMPLETED:
                raise DemoFailed(f"the job ended with {job['status']} {job['statusText']}: {job['reason']}")
            return dict(job)
        time.sleep(0.25)
    raise DemoFailed(f"the job has not ended within {JOB_DEADLINE:g} s")


def _line(console: Console, seconds: float, passed: Mapping[str, Any], reason: str) -> None:
    stage = "" if passed.get("stage") is None else passed["stage"]
    console.print(
        f"[dim]{seconds:12.2f} s[/dim]  {passed['status']:>6}  {passed['statusText']:<24} {stage!s:>5}  {reason}",
        highlight=False,
        soft_wrap=True,
    )


def download(client: httpx.Client, results: Sequence[Mapping[str, Any]], folder: Path, console: Console) -> None:
    """Every file, streamed, checked against the checksum the status told."""
    table = Table("index", "type", "file", "bytes", "sha256")
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("downloading", total=sum(int(result["filesize"]) for result in results))
        for result in results:
            target = folder / result["filename"]
            target.parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            with client.stream("GET", result["url"]) as answer, target.open("wb") as file:
                answer.raise_for_status()
                for piece in answer.iter_bytes():
                    digest.update(piece)
                    file.write(piece)
                    progress.advance(task, len(piece))
            if digest.hexdigest() != result["sha256"]:
                raise DemoFailed(f"{result['filename']} is not what the status announced")
            table.add_row(
                str(result["index"]), result["type"], result["filename"], str(result["filesize"]), result["sha256"][:12]
            )
    console.print()
    console.print(table)


def show(folder: Path, console: Console) -> None:
    """Print the report among the results. Raises: DemoFailed, if there is none."""
    report = folder / "1" / "report.md"
    if not report.is_file():
        raise DemoFailed("the second stage published no report.md")
    console.print()
    console.print(Markdown(report.read_text(encoding="utf-8")))
    console.print(f"\nresults: {folder}   picture: {folder / '1' / 'chart.svg'}")
