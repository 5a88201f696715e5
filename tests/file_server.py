"""A real HTTP server for tests: files on loopback, with the faults of servers that consumers name."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from aiohttp import web
from multidict import CIMultiDict

from blocks.limits import FetchLimits

CHUNK = 256 * 1024

Ranges = Literal["given", "ignored", "shifted", "short", "renamed"]
"""What comes of a request for a range: that part; the whole file; another part; half of it; that of another content."""

LOOPBACK = FetchLimits(networks=("127.0.0.0/8",), seconds_to_connect=5, seconds_silent=5, seconds_total=60)
"""Limits under which a ``FileServer`` may be fetched from."""


@dataclass
class _File:
    body: bytes | Path | None
    size: int
    status: int = 200
    delay: float = 0.0
    pause: float = 0.0
    hang: bool = False
    drop_after: int | None = None
    redirect_to: str | None = None
    fail_times: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    methods: tuple[str, ...] = ("GET", "HEAD")
    wants: Mapping[str, str] = field(default_factory=dict)
    drop_times: int | None = None
    ranges: Ranges = "given"
    at_most: int | None = None
    at_once: int = 0

    async def chunks(self, start: int, end: int) -> AsyncIterator[bytes]:
        if isinstance(self.body, Path):
            with self.body.open("rb") as file:
                file.seek(start)
                while start < end:
                    chunk = file.read(min(CHUNK, end - start))
                    yield chunk
                    start += len(chunk)
        elif self.body is not None:
            yield self.body[start:end]
        else:
            zeros = bytes(CHUNK)
            while start < end:
                yield zeros[: end - start]
                start += CHUNK


def _length(body: bytes | Path) -> int:
    return body.stat().st_size if isinstance(body, Path) else len(body)


@dataclass(frozen=True)
class Received:
    """A request as it came. *target* is path and query."""

    method: str
    target: str
    headers: CIMultiDict[str]
    body: bytes


Answer = Callable[[Received], web.Response]


class FileServer:
    """
    Serves what was added, in a thread of its own, until the ``with`` block ends.

    >>> with FileServer() as server:
    ...     url = server.add(b"1,2,3", name="numbers.csv")
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._host = host
        self._files: dict[str, _File] = {}
        self._answers: dict[str, Answer] = {}
        self._names = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._port = 0
        self._waiting = 0
        self.requests: Counter[str] = Counter()
        """Requests answered or hung, by URL, whatever their method."""
        self.received: list[Received] = []
        """Every request, in the order they came."""
        self.most_at_once = 0
        """The largest number of requests that were open at the same time."""

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http://{self._host}:{self._port}"

    @property
    def port(self) -> int:
        return self._port

    def add(
        self,
        body: bytes | Path = b"",
        *,
        name: str | None = None,
        status: int = 200,
        delay: float = 0.0,
        pause: float = 0.0,
        hang: bool = False,
        drop_after: int | None = None,
        redirect_to: str | None = None,
        fail_times: int = 0,
        size: int | None = None,
        headers: Mapping[str, str] | None = None,
        methods: tuple[str, ...] = ("GET", "HEAD"),
        wants: Mapping[str, str] | None = None,
        drop_times: int | None = None,
        ranges: Ranges = "given",
        at_most: int | None = None,
    ) -> str:
        """
        Serve one more file and return its URL.

        *size*: so many zero bytes, made as they are sent, instead of *body*.
        *delay*: seconds before the answer. *pause*: seconds after each piece of the body. *hang*: no answer at all.
        *drop_after*: the connection is cut after so many bytes of a body announced in full.
        *fail_times*: so many requests are answered 503 first. *headers*: of every answer, also of those 503.
        *redirect_to* with a *status* redirects with that one. *methods*: others are answered 405. *wants*: requests
        without these headers are answered 401. *drop_times*: so many connections are cut, the later ones not; all, if
        it is not given. *at_most*: more requests than these at the same time are answered 429. An ``If-Range`` that is
        not the ETag or Last-Modified in *headers* gets the whole file.
        """
        path = f"/{name or next(self._names)}"
        self._answers.pop(path, None)
        self._files[path] = _File(
            body if size is None else None,
            _length(body) if size is None else size,
            status=status,
            delay=delay,
            pause=pause,
            hang=hang,
            drop_after=drop_after,
            redirect_to=redirect_to,
            fail_times=fail_times,
            headers=headers or {},
            methods=methods,
            wants=wants or {},
            drop_times=drop_times,
            ranges=ranges,
            at_most=at_most,
        )
        return self.url + path

    def on(self, name: str, answer: Answer) -> str:
        """Answer every request for one more path by a function, called in a thread, and return its URL."""
        self._answers[f"/{name}"] = answer
        return f"{self.url}/{name}"

    async def _start(self) -> None:
        # Cancelled handlers end their waits, so a hung request does not keep the server from closing.
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, 0, backlog=512)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests[self.url + request.path] += 1
        received = Received(request.method, request.path_qs, CIMultiDict(request.headers), await request.read())
        self.received.append(received)
        self._waiting += 1
        self.most_at_once = max(self.most_at_once, self._waiting)
        try:
            if answer := self._answers.get(request.path):
                return await asyncio.to_thread(answer, received)
            return await self._serve(request)
        finally:
            self._waiting -= 1

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        file = self._files.get(request.path)
        if file is None:
            return web.Response(status=404, text="no such file")
        if request.method not in file.methods:
            return web.Response(status=405)
        if any(request.headers.get(name) != value for name, value in file.wants.items()):
            return web.Response(status=401)
        if file.hang:
            await asyncio.sleep(3600)
        await asyncio.sleep(file.delay)
        if file.fail_times > 0:
            file.fail_times -= 1
            return web.Response(status=503, text="try again", headers=file.headers)
        if file.redirect_to is not None:
            status = 302 if file.status == 200 else file.status
            return web.Response(status=status, headers={"Location": file.redirect_to, **file.headers})
        if file.status != 200:
            return web.Response(status=file.status, text="no", headers=file.headers)
        if file.at_most is not None and file.at_once >= file.at_most:
            return web.Response(status=429, text="too many")
        file.at_once += 1
        try:
            return await self._send(request, file)
        finally:
            file.at_once -= 1

    async def _send(self, request: web.Request, file: _File) -> web.StreamResponse:
        asked = request.http_range
        partial = asked.start is not None and file.ranges != "ignored"
        current = file.headers.get("ETag") or file.headers.get("Last-Modified")
        if request.headers.get("If-Range", current) != current:
            partial = False
        if partial and (asked.start or 0) >= file.size:
            return web.Response(status=416)
        start, end, _ = slice(asked.start, asked.stop).indices(file.size) if partial else (0, file.size, 1)
        response = web.StreamResponse(
            status=206 if partial else 200,
            headers={"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **file.headers},
        )
        if partial and file.ranges == "renamed":
            response.headers["ETag"] = '"another"'
        if partial and file.ranges == "shifted":
            start, end = start - 1, end - 1
        if partial and file.ranges == "short":
            end = start + (end - start) // 2
        response.content_length = end - start
        if partial:
            response.headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        sent = 0
        async for chunk in file.chunks(start, end):
            cut = file.drop_after is not None and file.drop_times != 0
            if cut and file.drop_after is not None and sent + len(chunk) > file.drop_after:
                if file.drop_times is not None:
                    file.drop_times -= 1
                await response.write(chunk[: file.drop_after - sent])
                assert request.transport is not None
                request.transport.close()
                return response
            await response.write(chunk)
            sent += len(chunk)
            await asyncio.sleep(file.pause)
        await response.write_eof()
        return response
