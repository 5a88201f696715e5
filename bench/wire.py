"""
A wire with length and width, for measuring on loopback: a TCP proxy that makes every round trip take longer and gives
each connection only so many bytes a second. It runs in a process of its own, as do the servers here.

>>> with file_server(Path("/srv/data")) as port, wire(port, round_trip=0.05, rate=8e6) as near:
...     print(f"http://127.0.0.1:{near}/file")
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

from tests.s3_server import rclone

SLACK: Final = 256 * 1024
"""Bytes a direction may hold beyond what is on the wire: about what the kernel's buffers hold."""


@contextmanager
def wire(to: int, *, round_trip: float, rate: float) -> Iterator[int]:
    """
    The port of a proxy to port *to*, until the ``with`` ends. *round_trip* in seconds, *rate* in bytes a second, of
    each connection and each direction.
    """
    command = [sys.executable, "-m", "bench.wire", str(to), str(round_trip), str(rate)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            port = process.stdout.readline().strip() if process.stdout else ""
            if not port:
                raise SystemExit("the proxy of the measurement did not start")
            yield int(port)
        finally:
            process.terminate()


@contextmanager
def file_server(folder: Path) -> Iterator[int]:
    """The port of a server of *folder* that gives ranges and keeps connections, until the ``with`` ends."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = [rclone(), "serve", "http", str(folder), "--addr", f"127.0.0.1:{port}", "--read-only", "--config", ""]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 30
            while True:
                with closing(socket.socket()) as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                if time.monotonic() > deadline:
                    raise SystemExit("the file server of the measurement did not start")
                time.sleep(0.05)
            yield port
        finally:
            process.terminate()


class _End(asyncio.Protocol):
    """
    One end of a connection. What it receives leaves at the *other* end half a round trip later, and not before
    everything ahead of it has had its time on the wire.
    """

    def __init__(self, round_trip: float, rate: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._half = round_trip / 2
        self._rate = rate
        self._room = int(rate * self._half) + SLACK
        self._on_the_way: deque[tuple[float, bytes]] = deque()
        self._held = 0
        self._waiting = False
        self._blocked = False
        self.free_at = 0.0
        self.other: _End
        self.transport: asyncio.Transport

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        # Longer ones would arrive all at once, late.
        for at in range(0, len(data), 65_536):
            piece = data[at : at + 65_536]
            self.free_at = max(self._loop.time(), self.free_at) + len(piece) / self._rate
            self._on_the_way.append((self.free_at + self._half, piece))
        self._held += len(data)
        if self._held > self._room:
            self.transport.pause_reading()
        self._next()

    def connection_lost(self, error: Exception | None) -> None:
        self._on_the_way.append((max(self._loop.time(), self.free_at) + self._half, b""))
        self._next()
        # Nobody is left to be told anything.
        self.other.drop()

    def drop(self) -> None:
        self._on_the_way.clear()

    def pause_writing(self) -> None:
        self.other._blocked = True

    def resume_writing(self) -> None:
        self.other._blocked = False
        self.other._next()

    def _next(self) -> None:
        if self._on_the_way and not self._waiting and not self._blocked:
            self._waiting = True
            self._loop.call_at(self._on_the_way[0][0], self._deliver)

    def _deliver(self) -> None:
        self._waiting = False
        while self._on_the_way and not self._blocked and self._on_the_way[0][0] <= self._loop.time():
            _, piece = self._on_the_way.popleft()
            if not piece:
                self.other.transport.close()
                return
            if not self.other.transport.is_closing():
                self.other.transport.write(piece)
            self._held -= len(piece)
        if self._held <= self._room and not self.transport.is_closing():
            self.transport.resume_reading()
        self._next()


async def _serve(to: int, round_trip: float, rate: float) -> None:
    loop = asyncio.get_running_loop()
    connecting = set()

    async def connect(near: _End) -> None:
        _, near.other = await loop.create_connection(lambda: _End(round_trip, rate), "127.0.0.1", to)
        near.other.other = near
        # The kernel has accepted at once; over a real wire that would have taken a round trip.
        near.free_at = loop.time() + round_trip
        near.transport.resume_reading()

    class Near(_End):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.pause_reading()
            task = loop.create_task(connect(self))
            connecting.add(task)
            task.add_done_callback(connecting.discard)

    server = await loop.create_server(lambda: Near(round_trip, rate), "127.0.0.1", 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])))
