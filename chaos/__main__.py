"""
The crash test: ``python -m chaos``, see docs/reliability.md.

Starts the whole service, kills one part of it at a random moment of a job's life, lets it heal, looks at every job,
and so on. The same seed does the same.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import psutil
from cyclopts import App
from rich.console import Console
from rich.progress import Progress

from chaos import plan, table
from chaos.driver import Driver, NotUp
from chaos.parts import NoDatabase, Stand
from chaos.plan import Kill, Part
from cli.service import CannotStart, interruptible

app = App(name="chaos", help="Kill one part after another and see what becomes of the jobs.")


@app.default
def main(
    *,
    kills: int = 21,
    seed: int = 1,
    minutes: float = 90.0,
    database: Literal["postgres", "sqlite"] = "postgres",
    only: tuple[Part, ...] = (),
    out: Path | None = None,
    resume: Path | None = None,
) -> int:
    """Exits 1 if a promise was not kept.

    Parameters
    ----------
    kills
        How many.
    seed
        Of everything that is random about them.
    minutes
        No kill is begun after so many.
    database
        Where Prefect keeps its records. SQLite is no part of its own, so nothing is killed in that column.
    only
        The parts to be killed; all if not given.
    out
        A Markdown file with the two marks between which the table is written, after every kill.
    resume
        The ``kills.jsonl`` of a run of the same seed that was interrupted: it goes on after what is told there.
    """
    parts = tuple(part for part in only or Part if part is not Part.DATABASE or database == "postgres")
    console = Console()
    console.print(f"seed {seed}, {kills} kills of {', '.join(parts)}")
    folder = Path(tempfile.mkdtemp(prefix="c2d-chaos-"))
    tally = table.Tally()
    told = resume.read_text(encoding="utf-8") if resume is not None else ""
    before = tally.take_up(told.splitlines())
    (folder / "kills.jsonl").write_text(told, encoding="utf-8")
    began = time.monotonic()
    problem: BaseException | None = None

    def write() -> None:
        if out is not None:
            facts = _circumstances(seed, tally, database, tally.seconds + time.monotonic() - began)
            out.write_text(
                table.put_between(out.read_text(encoding="utf-8"), table.markdown(tally, facts)), encoding="utf-8"
            )

    interruptible()
    try:
        with Progress(console=console) as progress, Stand(folder, postgres=database == "postgres") as stand:
            task = progress.add_task("kills", total=kills, completed=before)

            def done(kill: Kill) -> None:
                progress.update(task, advance=1, description=str(kill))
                write()

            left = plan.kills(kills, seed, parts)[before:]
            planned = (kill for kill in left if time.monotonic() - began < 60 * minutes)
            Driver(stand, tally, lambda line: console.print(line, markup=False, highlight=False)).run(planned, done)
    except (KeyboardInterrupt, NotUp, CannotStart, NoDatabase) as fault:
        problem = fault
    console.print(table.shown(tally))
    console.print(
        f"{tally.kills} kills, {tally.jobs} jobs, {len(tally.failures)} failures, {tally.missed} missed, "
        f"{(time.monotonic() - began) / 60:.1f} minutes, seed {seed}"
    )
    for failure in tally.failures:
        console.print(f"{failure.kill}: {failure.job}: expected {failure.expected}, seen {failure.seen}", markup=False)
    if problem is not None:
        console.print(f"ended before its time: {type(problem).__name__} {problem}", markup=False)
    if problem is None and not tally.failures:
        shutil.rmtree(folder)
        return 0
    console.print(f"logs and all else are kept in {folder}", markup=False)
    return 1


def _circumstances(seed: int, tally: table.Tally, database: str, seconds: float) -> dict[str, object]:
    memory = psutil.virtual_memory().total / 1024**3
    versions = ", ".join(f"{name} {version(name)}" for name in ("prefect", "fastapi"))
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "machine": f"{os.cpu_count()} cores, {memory:.0f} GiB, Linux {platform.release().split('-')[0]}",
        "versions": f"Python {platform.python_version()}, {versions}, {database}",
        "seed": seed,
        "kills": tally.kills,
        "jobs": tally.jobs,
        "failures": len(tally.failures),
        "duration": f"{seconds / 60:.0f} min",
    }


if __name__ == "__main__":
    sys.exit(app())
