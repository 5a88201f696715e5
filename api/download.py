"""One result as an HTTP answer: whole or one range of it (RFC 9110, section 14)."""

from __future__ import annotations

import re
import unicodedata
from typing import Final
from urllib.parse import quote

from fastapi.requests import Request
from fastapi.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.concurrency import iterate_in_threadpool
from werkzeug.datastructures import Range
from werkzeug.http import dump_options_header, parse_range_header

from flows.jobs import Job, Jobs, Result

_MEDIA_TYPE: Final = re.compile(r"[\w.+-]+/[\w.+-]+(; ?charset=[\w-]+)?", re.ASCII)
_RFC8187_PLAIN: Final = "!#$&+-.^_`|~"


async def download(request: Request, jobs: Jobs, job: Job, index: int) -> Response:
    """
    Result *index* of *job*, which it has; or, where its environment says so, where the store has it. The file's bytes
    never pass through the event loop's own thread.

    Several ranges at once are answered with the whole file, as RFC 9110 allows.
    """
    result = job.results[index]
    size = result.filesize
    headers = _headers(result)
    if request.method == "HEAD":
        return Response(headers={**headers, "Content-Length": str(size)})
    link = await jobs.link(job.id, index, headers["Content-Disposition"], headers["Content-Type"])
    if link is not None:
        # Whoever has it can read the file: no cache may keep it, and no log of ours has it.
        return RedirectResponse(link, 307, headers={"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"})
    wanted = _wanted_range(request, result)
    start, end = 0, size
    if wanted is not None:
        satisfiable = _clamped(wanted, size).range_for_length(size)
        if satisfiable is None:
            return JSONResponse(
                {"error": "The range lies outside the file"}, 416, headers={"Content-Range": f"bytes */{size}"}
            )
        start, end = satisfiable
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    chunks = await jobs.read(job.id, index, start, end)
    return StreamingResponse(
        iterate_in_threadpool(chunks),
        200 if wanted is None else 206,
        headers={**headers, "Content-Length": str(end - start)},
    )


def _headers(result: Result) -> dict[str, str]:
    return {
        "Content-Type": result.media_type if _MEDIA_TYPE.fullmatch(result.media_type) else "application/octet-stream",
        "Content-Disposition": content_disposition(result.filename),
        "ETag": _etag(result),
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
        # What an algorithm wrote must not run as a page of this service.
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "sandbox; default-src 'none'",
    }


def _etag(result: Result) -> str:
    return f'"{result.sha256}"'


def content_disposition(filename: str) -> str:
    """``attachment`` with the last part of *filename*, safe whatever it holds: RFC 6266 and RFC 8187."""
    name = filename.rpartition("/")[2]
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode("ascii")
    options: dict[str, str] = {"filename": "".join(c for c in plain if c.isprintable()) or "result"}
    if options["filename"] != name:
        options["filename*"] = f"UTF-8''{quote(name, safe=_RFC8187_PLAIN, errors='replace')}"
    return dump_options_header("attachment", options)


def _wanted_range(request: Request, result: Result) -> Range | None:
    """The one range asked for; None means the whole file, as for a range that cannot be understood."""
    condition = request.headers.get("if-range")
    if condition is not None and condition != _etag(result):
        return None
    wanted = parse_range_header(request.headers.get("range"))
    return wanted if wanted is not None and wanted.units == "bytes" and len(wanted.ranges) == 1 else None


def _clamped(wanted: Range, size: int) -> Range:
    """Of a file shorter than the suffix asked for, all is meant; werkzeug would find that unsatisfiable."""
    start, end = wanted.ranges[0]
    return Range("bytes", [(max(start, -size), end)]) if start < 0 < size else wanted
