"""What is killed when: the same seed, the same kills. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice
from typing import Final

from flows.status import Status

STATUSES: Final = (
    Status.WARMING_UP,
    Status.STARTED,
    Status.CONFIGURING,
    Status.PROVISIONED,
    Status.RUNNING,
    Status.FILTERING,
    Status.PUBLISHING,
)
"""Those a job can be in when something dies."""


class Part(StrEnum):
    """What is killed; ALL is loss of power."""

    FLOW = "flow"
    WORKER = "worker"
    API = "api"
    SERVER = "server"
    DATABASE = "database"
    ALGORITHM = "algorithm"
    ALL = "all"


@dataclass(frozen=True)
class Shape:
    """
    A job that stays in *status* for *seconds*, and short in all others.

    *stages*: the first is the long one. *number* is what its algorithm calculates with, so that results differ.
    """

    status: Status
    seconds: float
    stages: int
    number: int


@dataclass(frozen=True)
class Kill:
    """
    One kill: *part* dies while the job of shape *target* is in its status, beside jobs of the shapes *others*.

    *into*: how far into that status, 0 to 1. *outage*: seconds until a database is started again; other parts are
    the service's own to start.
    """

    number: int
    part: Part
    target: Shape
    others: tuple[Shape, ...]
    into: float
    outage: float

    @property
    def status(self) -> Status:
        return self.target.status

    def __str__(self) -> str:
        return f"kill {self.number}: {self.part} in {int(self.status)}, {self.into:.0%} into it"


def applies(status: Status, part: Part) -> bool:
    """Whether *part* is there to be killed while a job is in *status*."""
    match part:
        case Part.FLOW:
            return status is not Status.WARMING_UP
        case Part.ALGORITHM:
            return status is Status.RUNNING
        case _:
            return True


def kills(count: int, seed: int, parts: tuple[Part, ...] = tuple(Part)) -> list[Kill]:
    """The first *count* kills of *seed*. Every cell of the table comes once before any comes again."""
    return list(islice(_without_end(random.Random(seed), parts), count))


def one_of_each(seed: int, parts: tuple[Part, ...] = tuple(Part)) -> list[Kill]:
    """One kill of every part, each in another status."""
    chance = random.Random(seed)
    statuses = list(STATUSES)
    while not all(map(applies, statuses, parts)):
        chance.shuffle(statuses)
    once = {(kill.status, kill.part): kill for kill in reversed(kills(len(STATUSES) * len(parts), seed, parts))}
    return [replace(once[cell], number=number) for number, cell in enumerate(zip(statuses, parts, strict=False), 1)]


def _without_end(chance: random.Random, parts: tuple[Part, ...]) -> Iterator[Kill]:
    cells = [(status, part) for status in STATUSES for part in parts if applies(status, part)]
    number = 0
    while cells:
        chance.shuffle(cells)
        for status, part in cells:
            number += 1
            yield Kill(
                number,
                part,
                target=_shape(chance, status),
                others=tuple(_shape(chance, chance.choice(STATUSES[1:])) for _ in range(2)),
                into=round(chance.random(), 3),
                outage=round(chance.uniform(0.0, 2.0), 3),
            )


def _shape(chance: random.Random, status: Status) -> Shape:
    return Shape(
        status,
        seconds=round(chance.uniform(0.8, 2.0), 3),
        stages=chance.choice((1, 1, 2)),
        number=chance.randrange(10**9),
    )
