"""Servers that mean harm or are broken, each with what is said of it. A corpus, not a test."""

from __future__ import annotations

import asyncio
import gzip
import threading
import zlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

MIB: Final = 1024**2
TOTAL: Final = MIB
"""Bytes that may be fetched from them in all."""
SECONDS: Final = 1.0
SILENT: Final = 0.4

NOT_HTTP: Final = "did not answer in proper HTTP"
BROKE_OFF: Final = "broke off before its end"
CLOSED: Final = "closed the connection"
TOO_MUCH: Final = f"more than {TOTAL} bytes"
TOO_LATE: Final = f"not here after {SECONDS:g} s in all"
TOO_SILENT: Final = f"did not answer within {SILENT:g} s"
CIRCLES: Final = "redirects too often"
PART: Final = "answered with a part of it only"

Play = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass(frozen=True)
class Server:
    """*play* is what it does once a request has come; after that it closes the connection."""

    idea: str
    refusal: str
    play: Play

    def __str__(self) -> str:
        return self.idea


def _says(*pieces: bytes) -> Play:
    async def play(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()

    return play


def _forever(first: bytes, again: bytes, pause: float = 0.0) -> Play:
    async def play(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        while True:
            writer.write(again)
            await writer.drain()
            await asyncio.sleep(pause)

    return play


def _hangs(first: bytes = b"") -> Play:
    async def play(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        await writer.drain()
        await asyncio.sleep(3600)

    return play


async def _resets(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


def _ok(*headers: str, body: bytes = b"") -> bytes:
    return "\r\n".join(["HTTP/1.1 200 OK", *headers, "", ""]).encode("latin-1") + body


def _moved(location: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Moved\r\nLocation: {location}\r\nConnection: close\r\n\r\n".encode()


_counted = iter(range(10**9))


async def _moves_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Every time to a place that nobody has been to."""
    while True:
        writer.write(f"HTTP/1.1 302 Moved\r\nLocation: /{next(_counted)}\r\nContent-Length: 0\r\n\r\n".encode())
        await writer.drain()
        await reader.readuntil(b"\r\n\r\n")


_ZEROS: Final = bytes(32 * MIB)
_GZIP: Final = gzip.compress(_ZEROS, 9)
_CHUNKED: Final = "Transfer-Encoding: chunked"

SERVERS: Final = (
    # What is no HTTP.
    Server("closes at once", CLOSED, _says()),
    Server("resets", CLOSED, _resets),
    Server("greets as a mail server", NOT_HTTP, _says(b"220 mail ESMTP\r\n")),
    Server("greets as SSH", NOT_HTTP, _says(b"SSH-2.0-OpenSSH_9.2\r\n")),
    Server("answers as Redis", NOT_HTTP, _says(b"-ERR unknown command\r\n")),
    Server("answers in TLS", NOT_HTTP, _says(b"\x15\x03\x01\x00\x02\x02\x28")),
    Server("answers in HTTP/2", NOT_HTTP, _says(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00" + bytes(18))),
    Server("answers in HTTP/0.9", NOT_HTTP, _says(b"<html>hello</html>")),
    Server("answers in zeros", NOT_HTTP, _says(bytes(100_000))),
    Server("has a version of its own", NOT_HTTP, _says(b"HTTP/1.x 200 OK\r\n\r\n")),
    Server("has no status", NOT_HTTP, _says(b"HTTP/1.1\r\n\r\n")),
    Server("has a status of letters", NOT_HTTP, _says(b"HTTP/1.1 abc OK\r\n\r\n")),
    Server("has a status of two digits", NOT_HTTP, _says(b"HTTP/1.1 20 OK\r\n\r\n")),
    Server("has a status of four digits", NOT_HTTP, _says(b"HTTP/1.1 2000 OK\r\n\r\n")),
    Server("has a negative status", NOT_HTTP, _says(b"HTTP/1.1 -200 OK\r\n\r\n")),
    Server("breaks off in the status", CLOSED, _says(b"HTTP/1.1 20")),
    Server("breaks off in the headers", CLOSED, _says(b"HTTP/1.1 200 OK\r\nContent-Le")),
    # Headers.
    Server("a header without a colon", NOT_HTTP, _says(_ok("Nothing"))),
    Server("a header without a name", NOT_HTTP, _says(_ok(": x"))),
    Server("a header with a space in its name", NOT_HTTP, _says(_ok("Content Length: 1", body=b"x"))),
    Server("a header with a zero", NOT_HTTP, _says(_ok("X: a\0b", "Content-Length: 1", body=b"x"))),
    Server("a header with a carriage return", NOT_HTTP, _says(_ok("X: a\rb", "Content-Length: 1", body=b"x"))),
    Server("a header that is too long", NOT_HTTP, _says(_ok(f"X: {'x' * MIB}"))),
    Server("a name of a header that is too long", NOT_HTTP, _says(_ok(f"{'x' * MIB}: x"))),
    Server("a reason that is too long", NOT_HTTP, _says(b"HTTP/1.1 200 " + b"x" * MIB + b"\r\n\r\n")),
    Server("too many headers", NOT_HTTP, _says(_ok(*(f"X-{n}: x" for n in range(50_000))))),
    Server("headers without an end", NOT_HTTP, _forever(b"HTTP/1.1 200 OK\r\n", b"X-Y: z\r\n" * 1000)),
    Server("a header without an end", NOT_HTTP, _forever(b"HTTP/1.1 200 OK\r\nX: ", b"x" * 65_536)),
    Server("a first line without an end", NOT_HTTP, _forever(b"HTTP/1.1 200 ", b"x" * 65_536)),
    Server("headers that drip", TOO_LATE, _forever(b"HTTP/1.1 200 OK\r\nX: ", b"x", 0.1)),
    Server("a first line that drips", TOO_LATE, _forever(b"HTTP/1.1 200 ", b"x", 0.1)),
    # Lengths.
    Server("a negative length", NOT_HTTP, _says(_ok("Content-Length: -1", body=b"x"))),
    Server("a length with a sign", NOT_HTTP, _says(_ok("Content-Length: +1", body=b"x"))),
    Server("a length of letters", NOT_HTTP, _says(_ok("Content-Length: one", body=b"x"))),
    Server("a length in hexadecimal", NOT_HTTP, _says(_ok("Content-Length: 0x1", body=b"x"))),
    Server("a length with an underscore", NOT_HTTP, _says(_ok("Content-Length: 1_0", body=b"x" * 10))),
    Server("a length with a fraction", NOT_HTTP, _says(_ok("Content-Length: 1.0", body=b"x"))),
    Server("an empty length", NOT_HTTP, _says(_ok("Content-Length: ", body=b"x"))),
    Server("a length in superscript", NOT_HTTP, _says(_ok("Content-Length: \u00b2", body=b"xx"))),
    Server("two lengths", NOT_HTTP, _says(_ok("Content-Length: 1", "Content-Length: 2", body=b"xx"))),
    Server("two lengths in one", NOT_HTTP, _says(_ok("Content-Length: 1, 2", body=b"xx"))),
    Server("a length beyond any number", NOT_HTTP, _says(_ok(f"Content-Length: {10**30}", body=b"x"))),
    Server("a length beyond the limit", TOO_MUCH, _says(_ok(f"Content-Length: {10**15}", body=b"x"))),
    Server("a length beyond the body", BROKE_OFF, _says(_ok("Content-Length: 1000", body=b"x"))),
    Server("a length and no body", BROKE_OFF, _says(_ok("Content-Length: 1000"))),
    Server("a length and chunks", NOT_HTTP, _says(_ok("Content-Length: 5", _CHUNKED, body=b"0\r\n\r\n"))),
    Server("a body without an end", TOO_MUCH, _forever(_ok(), b"x" * 65_536)),
    Server("a body that drips", TOO_LATE, _forever(_ok(), b"x", 0.1)),
    Server("a body that drips, of a length", TOO_LATE, _forever(_ok("Content-Length: 1000"), b"x", 0.1)),
    Server("a body that stops", TOO_SILENT, _hangs(_ok("Content-Length: 1000", body=b"x"))),
    Server("headers that stop", TOO_SILENT, _hangs(b"HTTP/1.1 200 OK\r\n")),
    Server("no answer at all", TOO_SILENT, _hangs()),
    # Chunks.
    Server("a chunk that is cut", BROKE_OFF, _says(_ok(_CHUNKED, body=b"A\r\n12345"))),
    Server("chunks without a last one", BROKE_OFF, _says(_ok(_CHUNKED, body=b"5\r\n12345\r\n"))),
    Server("a last chunk that is cut", BROKE_OFF, _says(_ok(_CHUNKED, body=b"5\r\n12345\r\n0\r\n"))),
    Server("a chunk longer than it says", NOT_HTTP, _says(_ok(_CHUNKED, body=b"2\r\n12345\r\n0\r\n\r\n"))),
    Server("a chunk of a negative size", NOT_HTTP, _says(_ok(_CHUNKED, body=b"-5\r\n12345\r\n0\r\n\r\n"))),
    Server("a chunk of a size with a sign", NOT_HTTP, _says(_ok(_CHUNKED, body=b"+5\r\n12345\r\n0\r\n\r\n"))),
    Server("a chunk of a size with 0x", NOT_HTTP, _says(_ok(_CHUNKED, body=b"0x5\r\n12345\r\n0\r\n\r\n"))),
    Server("a chunk of a size with an underscore", NOT_HTTP, _says(_ok(_CHUNKED, body=b"1_0\r\n" + b"x" * 16))),
    Server("a chunk of a size of letters", NOT_HTTP, _says(_ok(_CHUNKED, body=b"five\r\n12345\r\n0\r\n\r\n"))),
    Server("a chunk of an empty size", NOT_HTTP, _says(_ok(_CHUNKED, body=b"\r\n12345\r\n0\r\n\r\n"))),
    Server("a chunk beyond any size", NOT_HTTP, _says(_ok(_CHUNKED, body=b"F" * 40 + b"\r\n12345"))),
    Server("a chunk that wraps", NOT_HTTP, _says(_ok(_CHUNKED, body=b"10000000000000005\r\n12345\r\n0\r\n\r\n"))),
    Server("a line of a chunk without an end", TOO_LATE, _forever(_ok(_CHUNKED, body=b"5;"), b"x" * 65_536)),
    Server("trailers without an end", NOT_HTTP, _says(_ok(_CHUNKED, body=b"0\r\n"), b"X-Y: z\r\n" * 100_000)),
    Server("chunks without an end", TOO_MUCH, _forever(_ok(_CHUNKED), b"10000\r\n" + b"x" * 65_536 + b"\r\n")),
    Server("small chunks without an end", TOO_MUCH, _forever(_ok(_CHUNKED), b"80\r\n%b\r\n" % (b"x" * 128) * 1000)),
    Server("chunks that drip", TOO_LATE, _forever(_ok(_CHUNKED), b"1\r\nx\r\n", 0.1)),
    # Encodings.
    Server(
        "a bomb of gzip", TOO_MUCH, _says(_ok("Content-Encoding: gzip", f"Content-Length: {len(_GZIP)}", body=_GZIP))
    ),
    Server(
        "a bomb of gzip, chunked",
        TOO_MUCH,
        _says(_ok("Content-Encoding: gzip", _CHUNKED, body=b"%x\r\n%b\r\n0\r\n\r\n" % (len(_GZIP), _GZIP))),
    ),
    Server("a bomb of deflate", TOO_MUCH, _says(_ok("Content-Encoding: deflate", body=zlib.compress(_ZEROS, 9)))),
    Server(
        "a bomb of many members", TOO_MUCH, _says(_ok("Content-Encoding: gzip", body=gzip.compress(bytes(MIB)) * 64))
    ),
    Server("a bomb in capitals", TOO_MUCH, _says(_ok("CONTENT-ENCODING: GZIP", body=_GZIP))),
    Server("no gzip", BROKE_OFF, _says(_ok("Content-Encoding: gzip", "Content-Length: 5", body=b"plain"))),
    Server(
        "gzip that is cut",
        BROKE_OFF,
        _says(_ok("Content-Encoding: gzip", f"Content-Length: {len(_GZIP)}", body=_GZIP[: len(_GZIP) // 64])),
    ),
    # Statuses.
    Server("goes on for ever with 100", TOO_LATE, _forever(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 10, 0.01)),
    Server("goes on for ever with 103", TOO_LATE, _forever(b"", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", 0.01)),
    Server(
        "switches protocols",
        "answered 101",
        _says(b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n"),
    ),
    Server(
        "a part without being asked",
        PART,
        _says(b"HTTP/1.1 206 Partial\r\nContent-Range: bytes 0-0/9\r\nContent-Length: 1\r\n\r\nx"),
    ),
    Server(
        "parts without being asked",
        PART,
        _says(b"HTTP/1.1 206 Partial\r\nContent-Type: multipart/byteranges; boundary=x\r\n\r\n--x--"),
    ),
    Server("not modified", "answered 304", _says(b"HTTP/1.1 304 Not Modified\r\n\r\n")),
    Server("many choices", "answered 300", _says(b"HTTP/1.1 300 Choices\r\nContent-Length: 0\r\n\r\n")),
    Server(
        "asks for a proxy", "answered 305", _says(b"HTTP/1.1 305 Use Proxy\r\nLocation: http://127.0.0.1:1/\r\n\r\n")
    ),
    Server(
        "asks for credentials",
        "answered 401",
        _says(b'HTTP/1.1 401 No\r\nWWW-Authenticate: Basic realm="x"\r\nContent-Length: 0\r\n\r\n'),
    ),
    Server(
        "asks for credentials of a proxy",
        "answered 407",
        _says(b'HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm="x"\r\nContent-Length: 0\r\n\r\n'),
    ),
    Server("an error without an end", "answered 500", _forever(b"HTTP/1.1 500 No\r\n\r\n", b"x" * 65_536)),
    Server(
        "an error that is a bomb", "answered 404", _says(b"HTTP/1.1 404 No\r\nContent-Encoding: gzip\r\n\r\n" + _GZIP)
    ),
    # Redirects.
    Server("a redirect to nowhere", "answered 302", _says(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n")),
    Server("a circle", CIRCLES, _says(_moved("/"))),
    Server("a circle that keeps its connection", CIRCLES, _moves_on),
    Server("a circle of 307", CIRCLES, _says(_moved("/", 307))),
    Server("a circle of 308", CIRCLES, _says(_moved("/", 308))),
    Server("a circle of 303", CIRCLES, _says(_moved("/", 303))),
    Server("a redirect that is too long", NOT_HTTP, _says(_moved("/" + "x" * MIB))),
    Server("a redirect to a broken URL", "its URL is not valid", _says(_moved("http://[/"))),
    Server("a redirect to a port out of range", "its URL is not valid", _says(_moved("http://127.0.0.1:99999/"))),
    Server("a redirect to a file", "redirects to a URL that is not http", _says(_moved("file:///etc/passwd"))),
    Server("a redirect to data", "redirects to a URL that is not http", _says(_moved("data:text/plain,x"))),
    Server("a redirect to a script", "redirects to a URL that is not http", _says(_moved("javascript:x"))),
    Server("a redirect to gopher", "redirects to a URL that is not http", _says(_moved("gopher://127.0.0.1/x"))),
    Server("a redirect to a websocket", "redirects to a URL that is not http", _says(_moved("ws://127.0.0.1/"))),
    Server("a redirect that drips", TOO_LATE, _forever(b"HTTP/1.1 302 Found\r\nLocation: /", b"x", 0.1)),
)


@contextmanager
def played(server: Server, host: str) -> Iterator[str]:
    """The URL of it, until the ``with`` ends."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await reader.readuntil(b"\r\n\r\n")
            await server.play(reader, writer)
        writer.close()

    async def start() -> asyncio.Server:
        return await asyncio.start_server(answer, host, 0)

    async def stop() -> None:
        listening.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    listening = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield f"http://{host}:{listening.sockets[0].getsockname()[1]}/"
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
