"""The folders of one run, whichever way it is shut in: whose they are meanwhile, and how much is in them."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil

from blocks.runner import Folders

NOBODY: Final = 65534
LOG_NAME: Final = "algorithm.log"
"""Name of the log among those the algorithm sees."""


def private_uid(name: str) -> int:
    """
    The user of one run, so that its processes are counted alone and no other run's are within its reach.

    The upper half of the ids this process can become (a container may have 65536 of them), which no
    distribution gives to people. That two of a thousand simultaneous runs share one has a chance below one in a
    thousand; then they share the count of processes.
    """
    if os.geteuid() != 0:
        return NOBODY
    extents = [list(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    end = min(max(inside + count for inside, _, count in extents), 2**31)
    if end <= NOBODY:
        raise OSError("the user namespace of the service has no user ids for algorithms")
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
    return end // 2 + digest % (end - end // 2 - 1)


class DiskWatch:
    """
    What the run has written, measured in slices between two looks at the run.

    A tree may have millions of entries: the deadline does not wait for their sum, and a measurement that was
    expensive is not repeated soon.
    """

    SLICE: Final = 0.02
    LONGEST: Final = 30.0

    def __init__(
        self, folders: Folders, limit: int, *, members: Callable[[], Iterable[psutil.Process]], top: int | None
    ) -> None:
        """*members* are the processes of the run; *top* is one in whose view its scratch is, None without any."""
        self._members = members
        self._top = top
        self._folders = folders
        self._limit = limit
        self._sizes: Generator[int, None, None] | None = None
        self._total = 0
        self._cost = 0.0
        self._due = 0.0

    def full(self) -> bool:
        began = time.monotonic()
        if self._sizes is None:
            if began < self._due:
                return False
            self._sizes, self._total, self._cost = self._measure(), 0, 0.0
        for size in self._sizes:
            self._total += size
            if self._total >= self._limit:
                return True
            if time.monotonic() - began > self.SLICE:
                self._cost += self.SLICE
                return False
        self._sizes = None
        now = time.monotonic()
        self._cost += now - began
        self._due = now + min(10 * self._cost, self.LONGEST)
        return False

    def close(self) -> None:
        """End a measurement that is under way: it holds a folder open."""
        if self._sizes is not None:
            self._sizes.close()

    def _measure(self) -> Generator[int, None, None]:
        yield size_of(self._folders.log.lstat())
        yield from scratch_bytes(self._top)
        tops = (self._folders.outputs, self._folders.logs)
        devices = {top.stat().st_dev for top in tops}
        for found, _ in unlinked(self._members()):
            if found.st_dev in devices:
                yield size_of(found)
        for top in tops:
            for folder, name, found in entries(top):
                if os.geteuid() != 0 and stat.S_ISDIR(found.st_mode) and found.st_mode & 0o700 != 0o700:
                    # Not for root, who may enter anyway. What is closed cannot be measured, and would be opened
                    # at the end of the run in any case.
                    _open_up(folder, name)
                yield size_of(found)


def size_of(found: os.stat_result) -> int:
    """
    Bytes an entry counts for: what it occupies or, if more, what it would occupy as a copy in the results. Never
    less than a block: a machine runs out of inodes as it runs out of bytes.
    """
    return max(found.st_size, found.st_blocks * 512, 4096)


def scratch_bytes(top: int | None) -> Iterator[int]:
    """Bytes on each tmpfs that the process *top* sees; none if that is None. What is no mount is no tmpfs."""
    if top is not None:
        for folder in ("tmp", "dev/shm"):
            with suppress(OSError):
                path = Path(f"/proc/{top}/root/{folder}")
                if path.stat().st_dev != path.parent.stat().st_dev:
                    state = os.statvfs(path)
                    yield (state.f_blocks - state.f_bfree) * state.f_frsize


def unlinked(members: Iterable[psutil.Process]) -> Iterator[tuple[os.stat_result, bool]]:
    """Files without a name, alive in a descriptor only, and whether they are memory (memfd) and not on a disk."""
    seen = set()
    for process in members:
        with suppress(OSError):
            for link in Path(f"/proc/{process.pid}/fd").iterdir():
                with suppress(OSError):
                    found = link.stat()
                    identity = (found.st_dev, found.st_ino)
                    if found.st_nlink == 0 and stat.S_ISREG(found.st_mode) and identity not in seen:
                        seen.add(identity)
                        yield found, str(link.readlink()).startswith("/memfd:")


def entries(top: Path) -> Iterator[tuple[int, str, os.stat_result]]:
    """
    Everything below *top*, a folder before its content, as (descriptor of its folder, name, lstat).

    Never follows a link and never opens anything but folders, so neither a swapped name nor a pipe can mislead or
    hold it. Holds two descriptors at any depth, deeper than any path can be long. Follows what changes meanwhile
    as far as it can: a branch that is moved away is left out.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    here = os.open(top, flags)
    levels: list[tuple[tuple[int, int], list[str]]] = []
    try:
        while True:
            folders = []
            with suppress(PermissionError), os.scandir(here) as listing:
                for entry in listing:
                    with suppress(OSError):
                        found = entry.stat(follow_symlinks=False)
                        yield here, entry.name, found
                        if stat.S_ISDIR(found.st_mode):
                            folders.append(entry.name)
            levels.append((_identity(here), folders))
            deeper = None
            while deeper is None:
                while levels[-1][1] and deeper is None:
                    with suppress(OSError):
                        deeper = os.open(levels[-1][1].pop(), flags, dir_fd=here)
                if deeper is None:
                    levels.pop()
                    if not levels:
                        return
                    above = os.open("..", flags, dir_fd=here)
                    os.close(here)
                    here = above
                    if _identity(here) != levels[-1][0]:
                        return
            os.close(here)
            here = deeper
    finally:
        os.close(here)


def _identity(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino


def _open_up(folder: int, name: str) -> None:
    """Let the owner of a folder in. By descriptor: chmod would follow a link put there meanwhile."""
    with suppress(OSError):
        descriptor = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            Path(f"/proc/self/fd/{descriptor}").chmod(0o700 | stat.S_IMODE(os.fstat(descriptor).st_mode))
        finally:
            os.close(descriptor)


def hand_over(folders: Folders, uid: int) -> None:
    """As root, make the folders the algorithm writes its own and those it reads readable for it."""
    if os.geteuid() != 0:
        return
    for top in (folders.outputs, folders.logs):
        os.chown(top, uid, uid, follow_symlinks=False)
        top.chmod(0o700 | stat.S_IMODE(top.stat().st_mode))
    folders.log.chmod(0o444 | stat.S_IMODE(folders.log.stat().st_mode))
    for top in (folders.inputs, folders.ddos, folders.transformations):
        top.chmod(0o555 | stat.S_IMODE(top.stat().st_mode))
        for folder, name, found in entries(top):
            wanted = 0o555 if stat.S_ISDIR(found.st_mode) or found.st_mode & 0o100 else 0o444
            plain = stat.S_ISDIR(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink == 1)
            if plain and found.st_mode & wanted != wanted:
                os.chmod(name, wanted | stat.S_IMODE(found.st_mode), dir_fd=folder)


def give_back(folders: Folders, *, shown: bool) -> int:
    """
    Make everything a run has left the caller's and readable by it; return the bytes written. *shown*: the log was
    shown to the algorithm among its own.

    Nothing of the run is alive, so what a name stands for does not change between two calls.
    """
    written = size_of(folders.log.lstat())
    for top in (folders.outputs, folders.logs):
        if os.geteuid() == 0:
            os.chown(top, os.geteuid(), os.getegid(), follow_symlinks=False)
        top.chmod(0o700 | (0o777 & top.stat().st_mode))
        for folder, name, found in entries(top):
            written += size_of(found)
            if found.st_uid != os.geteuid():
                os.chown(name, os.geteuid(), os.getegid(), dir_fd=folder, follow_symlinks=False)
            # Less setuid, setgid and sticky: the owner is another one now.
            mode = (0o700 if stat.S_ISDIR(found.st_mode) else 0o600) | (0o777 & found.st_mode)
            if not stat.S_ISLNK(found.st_mode) and mode != stat.S_IMODE(found.st_mode):
                os.chmod(name, mode, dir_fd=folder)
    if shown:
        # Where the log was shown; empty here, and the algorithm could not remove or replace it.
        (folders.logs / LOG_NAME).unlink(missing_ok=True)
    return written
