"""
This service's provisioning beside other ways to get the same files, over a wire of 50 ms with so many bytes a second
for each connection: one after another, curl, aria2c; and s3fs from an S3 endpoint.

Everybody may have the same number of connections. aria2c and curl are Debian's; what is missing is installed where
that may be done without a question, and else left out and told so. Nobody but this service computes checksums
meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import randbytes
from typing import Any

import httpx
import s3fs
from rich.console import Console

from bench.report import Row, write_figures
from bench.wire import file_server, wire
from blocks.files import UrlFile
from blocks.limits import FetchLimits
from blocks.remote import Access
from tasks.provision import InputSource, fetch_inputs
from tests.s3_server import s3_server

ROUND_TRIP = 0.05
RATE = 4e6
CONNECTIONS = 16
"""For everybody: aria2c takes no more from one host."""
ROUNDS = 3
SECONDS = 1800
"""After so long a tool has failed."""


@dataclass(frozen=True)
class Case:
    """*count* files of *size* bytes."""

    count: int
    size: int
    label: str

    @property
    def names(self) -> list[str]:
        return [f"{self.label.replace(' ', '-')}-{n}" for n in range(self.count)]


BIG = Case(1, 1_000_000_000, "1 x 1 GB")
MANY = Case(100, 1_000_000, "100 x 1 MB")
SMALL = Case(2000, 10_000, "2000 x 10 kB")
CASES = (BIG, MANY, SMALL)
OBJECT = Case(1, 250_000_000, "1 x 250 MB")

Tool = Callable[[str, Case, Path], float]
"""Fetches the files of a case from a root URL into an empty folder, and tells the seconds it took."""


def one_after_another(root: str, case: Case, into: Path) -> float:
    """httpx, which keeps its connection."""
    started = time.monotonic()
    with httpx.Client(timeout=60.0) as client:
        for name in case.names:
            with client.stream("GET", f"{root}/{name}") as response, (into / name).open("wb") as file:
                response.raise_for_status()
                for chunk in response.iter_bytes(512 * 1024):
                    file.write(chunk)
    return time.monotonic() - started


def curl(root: str, case: Case, into: Path) -> float:
    """It keeps its connections, and takes one for each file."""
    listed = "".join(f'url = "{root}/{name}"\noutput = "{into / name}"\n' for name in case.names)
    command = ["curl", "--silent", "--fail", "--parallel", "--parallel-immediate", "--config", "-"]
    return _run([*command, "--parallel-max", str(CONNECTIONS)], listed)


def aria2c(root: str, case: Case, into: Path) -> float:
    """It takes a file to pieces of a megabyte or more."""
    command = ["aria2c", "--quiet", "--no-conf", "--file-allocation=none", "--min-split-size=1M", "--input-file=-"]
    bounds = [f"--{name}={CONNECTIONS}" for name in ("max-connection-per-server", "split", "max-concurrent-downloads")]
    return _run([*command, *bounds, f"--dir={into}"], "".join(f"{root}/{name}\n" for name in case.names))


def _run(command: list[str], given: str) -> float:
    started = time.monotonic()
    subprocess.run(command, input=given, text=True, check=True, timeout=SECONDS, capture_output=True)
    return time.monotonic() - started


class Service:
    """This service's provisioning, in a process with all that a worker has imported when it forks a job."""

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        self._options = options
        self.peaks: dict[Case, list[int]] = defaultdict(list)
        """Bytes that were resident at most, by case."""

    def __call__(self, root: str, case: Case, into: Path) -> float:
        given = json.dumps([[f"{root}/{name}" for name in case.names], str(into), self._options])
        done = subprocess.run(
            [sys.executable, "-m", "bench.fetch"],
            input=given,
            text=True,
            check=True,
            timeout=SECONDS,
            capture_output=True,
        )
        seconds, peak = json.loads(done.stdout.splitlines()[-1])
        self.peaks[case].append(peak)
        # It names files by their numbers; where they are is the same.
        folder = into / "x"
        for n, name in enumerate(case.names):
            (folder / str(n)).rename(into / name)
        folder.rmdir()
        return float(seconds)


def _provision() -> None:
    """In the process of ``Service``."""
    import flows.compute  # noqa: F401, PLC0415 - for its memory

    urls, into, options = json.loads(sys.stdin.read())
    limits = FetchLimits(
        schemes=("http", "s3"),
        networks=("127.0.0.0/8",),
        connections=CONNECTIONS,
        connections_per_host=CONNECTIONS,
    )
    access = Access(storage_options={"s3": options} if options else {})
    source = InputSource("x", 0, tuple(UrlFile(url=url) for url in urls))
    started = time.monotonic()
    fetch_inputs([source], Path(into), limits, access=access)
    seconds = time.monotonic() - started
    # Not getrusage: what it tells is also of the process this one was started from.
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    print(json.dumps([seconds, int(peak.split()[1]) * 1024]))


class S3fs:
    """s3fs itself, with pieces small enough that there is one for each connection."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options

    def __call__(self, root: str, case: Case, into: Path) -> float:
        async def get() -> float:
            pool = {"max_pool_connections": CONNECTIONS}
            store = s3fs.S3FileSystem(**self._options, config_kwargs=pool, asynchronous=True, skip_instance_cache=True)
            session = await store.set_session()
            try:
                paths = [f"{root.removeprefix('s3://')}/{name}" for name in case.names]
                targets = [str(into / name) for name in case.names]
                started = time.monotonic()
                await store._get(
                    paths, targets, batch_size=CONNECTIONS, max_concurrency=CONNECTIONS, chunksize=8 * 1024**2
                )
                return time.monotonic() - started
            finally:
                await session.close()

        return asyncio.run(get())


def _measure(
    root: str,
    cases: Sequence[Case],
    tools: dict[str, Tool],
    once: set[tuple[str, Case]],
    folder: Path,
    console: Console,
) -> dict[tuple[str, Case], list[float]]:
    """Seconds by tool and case. In rounds, one tool after the other: what slows one down is likely to slow down all."""
    seconds: dict[tuple[str, Case], list[float]] = defaultdict(list)

    def measure(tool: str, case: Case) -> None:
        into = folder / f"{tool}-{case.label}".replace(" ", "-")
        into.mkdir()
        try:
            seconds[tool, case].append(tools[tool](root, case, into))
            if [case.size] * case.count != [(into / name).stat().st_size for name in case.names]:
                raise SystemExit(f"{tool} has not fetched {case.label}")
        finally:
            shutil.rmtree(into)
        console.print(f"{case.label:>14}  {tool:<18} {seconds[tool, case][-1]:8.2f} s")

    # Each has one connection and waits for it; nothing is lost by waiting side by side.
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda each: measure(*each), sorted(once, key=str)))
    for _, case, tool in product(range(ROUNDS), cases, tools):
        if (tool, case) not in once:
            measure(tool, case)
    return seconds


def fetching(console: Console) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        yield from _over_http(folder, console)
        yield from _from_s3(folder, console)


def _over_http(folder: Path, console: Console) -> Iterator[Row]:
    service = Service()
    tools: dict[str, Tool] = {"this service": service, "one after another": one_after_another}
    for name, package, tool in (("curl", "curl", curl), ("aria2c", "aria2", aria2c)):
        if shutil.which(name) or _installed(package):
            tools[name] = tool
        else:
            console.print(f"[bold]{name} is not installed, and left out[/bold]")
    # One connection's rate is what these take, whatever else the machine does.
    once = {("one after another", case) for case in CASES} | ({("curl", BIG)} if "curl" in tools else set())
    data = folder / "data"
    data.mkdir()
    for case in CASES:
        _fill(data, case)
    with file_server(data) as port, wire(port, round_trip=ROUND_TRIP, rate=RATE) as near:
        seconds = _measure(f"http://127.0.0.1:{near}", CASES, tools, once, folder, console)
    shutil.rmtree(data)

    middle = {key: statistics.median(each) for key, each in seconds.items()}
    ratios = {}
    for case in CASES:
        for used in tools:
            each = seconds[used, case]
            how = (
                f"{middle[used, case] / middle['this service', case]:.2f} times this service's; measured {len(each)} x"
            )
            yield Row(f"{case.label}: {used}", f"{middle[used, case]:.2f} s", f"{max(each):.2f} s", how)
        ratios[case] = middle["this service", case] / min(
            middle[tool, case] for tool in tools if tool != "this service"
        )
    peak = max(service.peaks[BIG]) / 1e6
    yield Row("memory for 1 x 1 GB", "", f"{peak:.0f} MB", "resident, all that a job of a worker has imported included")
    write_figures(
        {
            "fetch_many_speedup_over_sequential": round(
                middle["one after another", MANY] / middle["this service", MANY], 2
            ),
            "fetch_ratio_to_best_peer_worst_case": round(max(ratios.values()), 3),
            "fetch_1gb_worker_rss_mb": round(peak, 1),
        }
    )


def _from_s3(folder: Path, console: Console) -> Iterator[Row]:
    cases = (OBJECT, MANY)
    with s3_server(folder / "s3", "data") as options:
        for case in cases:
            _fill(folder / "s3" / "data", case)
        port = int(options["endpoint_url"].rpartition(":")[2])
        with wire(port, round_trip=ROUND_TRIP, rate=RATE) as near:
            far = {**options, "endpoint_url": f"http://127.0.0.1:{near}"}
            service = Service(far)
            tools: dict[str, Tool] = {"this service": service, "s3fs": S3fs(far)}
            seconds = _measure("s3://data", cases, tools, set(), folder, console)
    for case, tool in product(cases, tools):
        each = seconds[tool, case]
        memory = f"; {max(service.peaks[case]) / 1e6:.0f} MB resident" if tool == "this service" else ""
        yield Row(
            f"S3, {case.label}: {tool}",
            f"{statistics.median(each):.2f} s",
            f"{max(each):.2f} s",
            f"measured {len(each)} x{memory}",
        )


def _installed(package: str) -> bool:
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return False
    command = ["apt-get", "install", "--yes", "--no-install-recommends", package]
    return subprocess.run(command, check=False, timeout=SECONDS, capture_output=True).returncode == 0


def _fill(folder: Path, case: Case) -> None:
    for name in case.names:
        with (folder / name).open("wb") as file:
            left = case.size
            while left:
                piece = randbytes(min(left, 8 * 1024**2))
                left -= file.write(piece)


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        _provision()
