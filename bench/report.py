"""What measurements leave behind: a section each in ``RESULTS.md``, and their figures in ``results.json``."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil

TITLE = "# Results of `make bench`"
RESULTS = Path(__file__).with_name("RESULTS.md")
FIGURES = Path(__file__).with_name("results.json")


@dataclass(frozen=True)
class Row:
    """One figure; *middle* and *worst* are of the same unit."""

    what: str
    middle: str
    worst: str
    how: str


def write_section(name: str, rows: Sequence[Row], path: Path = RESULTS) -> None:
    """Put *rows* into the section *name*; the others stay as they are, each with when and where it was measured."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    sections = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    lines = [
        "",
        _where(),
        "",
        "| measured | median | worst | how |",
        "|---|---|---|---|",
        *(f"| {row.what} | {row.middle} | {row.worst} | {row.how} |" for row in rows),
    ]
    sections[name] = "\n".join(lines)
    parts = [TITLE, *(f"## {title}\n\n{body.strip()}" for title, body in sections.items())]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def write_figures(figures: Mapping[str, float], path: Path = FIGURES) -> None:
    """Add *figures*, or put them in the place of those of the same names; all others stay."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**known, **figures}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _where() -> str:
    memory = psutil.virtual_memory().total / 1024**3
    versions = ", ".join(f"{name} {version(name)}" for name in ("prefect", "fastapi", "fsspec", "aiohttp", "pydantic"))
    return (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC; {os.cpu_count()} cores, load {os.getloadavg()[1]:.1f}, "
        f"{memory:.0f} GiB, {platform.machine()}, Linux {platform.release().split('-')[0]}, "
        f"Python {platform.python_version()}; {versions}."
    )
