"""
Runs every measurement, or those that are named, prints a table of each, writes ``RESULTS.md`` and ``results.json``.

Two things are compared only within one run: machines are shared and noisy.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from uuid import uuid4

import httpx
import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.fetch import fetching
from bench.report import Row, write_section
from blocks.files import UrlFile
from blocks.limits import FetchLimits
from cli.service import ROOT, Service
from tasks.provision import InputSource, fetch_inputs
from tests.documents import stage, workflow
from tests.file_server import FileServer

JOBS = 20
INPUTS = 50
DELAY = 0.2
LOOPBACK = FetchLimits(networks=("127.0.0.0/8",))


def job_latency(console: Console) -> Iterator[Row]:
    """The same by both types of worker, each on a service of its own, one after the other."""
    for kind in ("process", "warm-process"):
        yield from _latency_by(kind, console)


def _latency_by(kind: str, console: Console) -> Iterator[Row]:
    """POST to algorithm started and POST to completed, for a no-op algorithm on a warm service, one job at a time."""
    started: list[float] = []
    completed: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        definitions = Path(folder) / "prefect.yaml"
        text = (ROOT / "prefect.yaml").read_text(encoding="utf-8")
        definitions.write_text(
            text.replace("work_pool_type: warm-process", f"work_pool_type: {kind}"), encoding="utf-8"
        )
        _run_jobs(Service(state=Path(folder) / "state", definitions=definitions, say=console.print), started, completed)
    how = f"{kind} worker; {JOBS} jobs, one after another; clocks of the service"
    yield _seconds("POST to algorithm started", started, how)
    yield _seconds("POST to job completed", completed, how)


def _run_jobs(service: Service, started: list[float], completed: list[float]) -> None:
    with (
        service,
        httpx.Client(base_url=service.api_url, timeout=60.0) as client,
    ):
        _one_job(client)  # the service is warm afterwards
        for _ in track(range(JOBS), description="no-op jobs"):
            to_start, to_end = _one_job(client)
            started.append(to_start)
            completed.append(to_end)


def _one_job(client: httpx.Client) -> tuple[float, float]:
    document = workflow(agreement=uuid4().hex, stages=[stage(rawcode="true", entrypoint="sh $ALGO")])
    posted = time.time()
    answer = client.post("/api/v1/operator/init", json={"workflow": document}).raise_for_status()
    while True:
        (job,) = client.get("/api/v1/operator/compute", params={"jobId": answer.text}).raise_for_status().json()
        # Ended, and the last step is recorded too: Prefect records task runs a little behind the flow run.
        at = {passed["status"]: float(passed["at"]) for passed in job["history"]}
        if job["dateFinished"] is not None and 40 in at:
            if job["status"] != 70:
                raise SystemExit(f"a job failed: {job['statusText']}")
            return at[40] - posted, at[70] - posted
        time.sleep(0.1)


def slow_inputs(console: Console) -> Iterator[Row]:
    """50 inputs from a server that delays each answer by 200 ms: together, and one after another."""
    with FileServer() as server, tempfile.TemporaryDirectory() as folder:
        sources = [
            InputSource(id=f"did:op:{n}", index=n, files=(UrlFile(url=server.add(b"x" * 1000, delay=DELAY)),))
            for n in range(INPUTS)
        ]
        together = _timed(lambda: fetch_inputs(sources, Path(folder) / "together", LOOPBACK))
        console.print("50 slow inputs one after another ...")
        alone = _timed(lambda: [fetch_inputs([source], Path(folder) / "alone", LOOPBACK) for source in sources])
    yield Row(
        f"fetch of {INPUTS} inputs, each answer {DELAY * 1000:g} ms late", f"{together:.2f} s", "", "default settings"
    )
    yield Row("the same fetches one after another", f"{alone:.2f} s", "", f"{alone / together:.1f} times as long")


def big_input(console: Console) -> Iterator[Row]:
    """One large input: speed, and how much the memory of the fetching process grows."""
    size = 2 * 1024**3
    console.print("one input of 2 GiB ...")
    process = psutil.Process()
    with FileServer() as server, tempfile.TemporaryDirectory() as folder:
        source = InputSource(id="did:op:big", index=0, files=(UrlFile(url=server.add(b"", size=size)),))
        before = process.memory_info().rss
        peak = before

        def watch(*_: int) -> None:
            nonlocal peak
            peak = max(peak, process.memory_info().rss)

        seconds = _timed(lambda: fetch_inputs([source], Path(folder), LOOPBACK, on_progress=watch))
    yield Row(
        "fetch of one input of 2 GiB",
        f"{size / seconds / 1024**2:.0f} MiB/s",
        "",
        f"memory grows by {(peak - before) / 1024**2:.0f} MiB, the file server in the same process included",
    )


def _timed(action: Callable[[], object]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


def _seconds(what: str, values: list[float], how: str) -> Row:
    return Row(what, f"{statistics.median(values):.2f} s", f"{max(values):.2f} s", how)


MEASUREMENTS: dict[str, Callable[[Console], Iterable[Row]]] = {
    "inputs": lambda console: [*slow_inputs(console), *big_input(console)],
    "fetch": fetching,
    "jobs": job_latency,
}


def main() -> None:
    console = Console()
    names = sys.argv[1:] or list(MEASUREMENTS)
    if unknown := set(names) - set(MEASUREMENTS):
        raise SystemExit(f"no such measurement: {', '.join(unknown)}; there are {', '.join(MEASUREMENTS)}")
    for name in names:
        rows = list(MEASUREMENTS[name](console))
        table = Table("measured", "median", "worst", "how", title=name)
        for row in rows:
            table.add_row(row.what, row.middle, row.worst, row.how)
        console.print(table)
        write_section(name, rows)


if __name__ == "__main__":
    main()
