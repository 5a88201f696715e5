"""How work that takes long hears that its job is being stopped."""

from __future__ import annotations

import io
from threading import Event
from typing import IO, Final

NEVER: Final = Event()
"""For callers whom nobody stops. Never set."""


class Stopped(Exception):
    """The job is being stopped. What was begun is left as it is: the next try of the job tidies up."""


def go_on(stop: Event) -> None:
    """Raises Stopped once *stop* is set. To be asked between two pieces of work of which none takes a second."""
    if stop.is_set():
        raise Stopped


class Stoppable(io.RawIOBase):
    """A file, read only for as long as the job is not being stopped; then Stopped is raised."""

    def __init__(self, file: IO[bytes], stop: Event) -> None:
        super().__init__()
        self._file = file
        self._stop = stop

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        go_on(self._stop)
        return self._file.read(size)
