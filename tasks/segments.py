"""
How one large file is dealt out to several who read it at the same time. Pure.

Each reads a segment from its start to its end and takes another. Segments lie in the order of the file and get
smaller towards its end: the first bytes are there first, so a checksum can follow closely, and nobody is left with a
large piece when all others are done. Who finds none left takes half of the largest that is still being read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from blocks.limits import MIB

SMALLEST: Final = 4 * MIB
"""Bytes of a segment. At 8 MB/s it takes half a second, ten times what asking for it takes at 50 ms."""
LARGEST: Final = 128 * MIB
"""Bytes. Times the readers, that is how far they may be ahead of the checksum: the kernel should still hold it all."""
LARGE: Final = 2 * SMALLEST
"""Bytes from which a file is dealt out."""


@dataclass
class Segment:
    """The bytes from *at* to before *end* are still to be read. *at* grows; *end* may come nearer meanwhile."""

    at: int
    end: int

    @property
    def left(self) -> int:
        return self.end - self.at


def cuts(size: int, readers: int) -> Iterator[tuple[int, int]]:
    """Start and end of each segment: rounds of one for every reader, each of three quarters of what is left."""
    at = 0
    while at < size:
        length = min(max((size - at) * 3 // (4 * readers), SMALLEST), LARGEST)
        for _ in range(readers):
            end = at + length
            if size - end < SMALLEST // 2:
                end = size
            if at < size:
                yield at, end
            at = end


class Segments:
    """
    Those of one file of *size* bytes, by start and end. *grain* is how many bytes past ``at`` a reader may already
    have in hand.
    """

    def __init__(self, size: int, each: Iterable[tuple[int, int]], grain: int) -> None:
        self.size = size
        self._grain = grain
        self._open = deque(Segment(start, end) for start, end in each)
        self._waiting = deque(self._open)
        self._taken: list[Segment] = []

    def take(self) -> Segment | None:
        """The next one to read; None: what is left is being read, and too little of it to be shared."""
        if self._waiting:
            segment = self._waiting.popleft()
        elif (largest := max(self._taken, key=lambda each: each.left, default=None)) and (
            largest.left >= 2 * self._grain
        ):
            middle = largest.at + largest.left // 2
            segment = Segment(middle, largest.end)
            largest.end = middle
            self._open.insert(self._open.index(largest) + 1, segment)
        else:
            return None
        self._taken.append(segment)
        return segment

    def give_back(self, segment: Segment) -> None:
        """Somebody has given it up; the next one to take begins where it stopped."""
        self._taken.remove(segment)
        self._waiting.appendleft(segment)

    def done(self, segment: Segment) -> None:
        self._taken.remove(segment)

    @property
    def front(self) -> int:
        """Every byte before this one is there."""
        while self._open and self._open[0].left <= 0:
            self._open.popleft()
        return self._open[0].at if self._open else self.size
