"""The table status x killed part, for a terminal and for the documentation. Pure."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from rich.table import Table

from chaos.plan import STATUSES, Part, applies
from flows.status import TEXT, Status

BEGIN: Final = "<!-- chaos: begin -->"
END: Final = "<!-- chaos: end -->"
"""Between the two, each on a line of its own, stands what ``--out`` writes."""

NOT_APPLICABLE: Final = "–"


@dataclass(frozen=True)
class Failure:
    """A promise that was not kept: by which kill, to which job (none: the service as a whole), and how."""

    kill: str
    job: str
    expected: str
    seen: str


@dataclass
class Tally:
    """Kills so far by the status the target was in and by the part that was killed, and what failed."""

    runs: Counter[tuple[Status, Part]] = field(default_factory=Counter)
    failed: Counter[tuple[Status, Part]] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    missed: int = 0
    """Kills that stand in no cell: there was nothing to be killed any more, or the target had just ended."""
    jobs: int = 0
    seconds: float = 0.0
    """Of the kills that were taken up from an earlier run."""

    def count(self, status: Status, part: Part, failures: Sequence[Failure]) -> None:
        self.runs[status, part] += 1
        self.failed[status, part] += bool(failures)
        self.failures.extend(failures)

    def miss(self, failures: Sequence[Failure]) -> None:
        self.missed += 1
        self.failures.extend(failures)

    def take_up(self, lines: Iterable[str]) -> int:
        """
        Count what an earlier run has written, a line of JSON for each of its kills.

        Returns:
            How many kills it has done, those that stand in no cell among them.
        """
        done = 0
        for line in lines:
            done += 1
            told = json.loads(line)
            kill = str(told["kill"])
            failures = [Failure(kill, "", "a promise kept", broken) for broken in told["broken"]]
            self.jobs += len(told["jobs"])
            self.seconds += sum(told["seconds"])
            status, part = Status(told["status"]), _part_of(kill)
            if status in STATUSES and applies(status, part):
                self.count(status, part, failures)
            else:
                self.miss(failures)
        return done

    @property
    def kills(self) -> int:
        return self.runs.total()

    def cell(self, status: Status, part: Part) -> str:
        """``runs/failures``."""
        if not applies(status, part):
            return NOT_APPLICABLE
        return f"{self.runs[status, part]}/{self.failed[status, part]}"

    def rows(self) -> list[list[str]]:
        """One for each status, and their sum."""
        rows = [[f"{int(status)} {TEXT[status]}", *(self.cell(status, part) for part in Part)] for status in STATUSES]
        sums = [
            f"{sum(self.runs[status, part] for status in STATUSES)}/"
            f"{sum(self.failed[status, part] for status in STATUSES)}"
            for part in Part
        ]
        return [*rows, ["all", *sums]]


def _part_of(kill: str) -> Part:
    found = re.match(r"kill \d+: (\w+) in ", kill)
    assert found is not None, f"not told by a kill: {kill}"
    return Part(found[1])


def shown(tally: Tally) -> Table:
    """For a terminal."""
    table = Table("status", *Part, title="kills/failures, by the target's status and the part that was killed")
    for row in tally.rows():
        table.add_row(*row)
    return table


def markdown(tally: Tally, circumstances: Mapping[str, object]) -> str:
    """For the documentation; *circumstances* are said above the table."""
    lines = [
        "; ".join(f"{what}: {value}" for what, value in circumstances.items()) + ".",
        "",
        _row(["status", *Part]),
        _row(["---"] * (1 + len(Part))),
        *map(_row, tally.rows()),
    ]
    if tally.failures:
        lines += [
            "",
            *(f"- {failure.kill}: expected {failure.expected}, seen {failure.seen}" for failure in tally.failures),
        ]
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def put_between(text: str, written: str) -> str:
    """
    *text* with *written* between the two marks.

    Raises:
        ValueError: The marks are not there.
    """
    new, found = re.subn(
        rf"(?<={re.escape(BEGIN)}\n).*?(?={re.escape(END)})", lambda _: f"\n{written}\n\n", text, flags=re.DOTALL
    )
    if not found:
        raise ValueError(f"there is no line {BEGIN} before a line {END}")
    return new
