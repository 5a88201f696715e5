"""Files of assets over HTTP: what they are, and the files themselves for those who have ordered them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from typing import Any, Final

from fastapi.responses import Response, StreamingResponse

from blocks.assets import AssetUnusable
from blocks.catalogue import CatalogueUnavailable
from blocks.files import BadFile, BadParameters, File, parse_file
from blocks.keys import FilesUnavailable, files_of
from blocks.limits import GIB, FetchLimits
from blocks.remote import Access, Remotes, Unreachable, remotes
from blocks.urls import ForbiddenUrl
from flows.broker import Broker, given_to
from flows.errors import InvalidParameter, NotReady, SourceFailed

SECONDS: Final = 60.0
"""Deadline of looking at the files of one call, checksums among them. What is not read by then counts as not valid."""
LARGEST: Final = GIB
"""Bytes of a file that is read for its checksum."""
MOST: Final = 20_000
"""Files looked at in one call; as many as a document may name."""


async def describe(
    broker: Broker, *, did: str, service_id: str, file: Mapping[str, Any], parameters: Mapping[str, Any], checksum: bool
) -> list[dict[str, Any]]:
    """
    What ``fileinfo`` answers: ``index, valid, contentLength, contentType``, with *checksum* also ``checksum`` and
    ``checksumType``; of the files of an asset, or of the one *file*. Nothing tells where a file is.

    Raises:
        InvalidParameter, NotReady
    """
    files = await _named(broker, did, service_id, parameters) if did else (_given(file, parameters),)
    if len(files) > MOST:
        raise InvalidParameter(f"did: the service has {len(files)} files; at most {MOST} are described")
    async with broker.reads, AsyncExitStack() as stack:
        ways: list[tuple[tuple[FetchLimits, Access], Remotes]] = []
        chosen = []
        for one in files:
            way = await broker.reach(one)
            if way not in (known for known, _ in ways):
                ways.append((way, await stack.enter_async_context(remotes(*way))))
            chosen.append(next(opened for known, opened in ways if known == way))
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_described(*pair, checksum)) for pair in zip(chosen, files, strict=True)]
            _, late = await asyncio.wait(tasks, timeout=SECONDS)
            for task in late:
                task.cancel()
    return [
        {"index": index, **({"valid": False} if task.cancelled() else task.result())}
        for index, task in enumerate(tasks)
    ]


async def stream(file: File, name: str, broker: Broker) -> Response:
    """
    The bytes of *file* as they come from its source.

    Raises:
        SourceFailed: It does not give the file.
    """
    stack = AsyncExitStack()
    try:
        opened = await stack.enter_async_context(remotes(*(await broker.reach(file))))
        async with asyncio.timeout(SECONDS):
            source = await opened.open(file)
            first = await source.read()
    except (Unreachable, ForbiddenUrl, TimeoutError):
        await stack.aclose()
        raise SourceFailed("The source of this file does not give it at present.") from None
    except BaseException:
        await stack.aclose()
        raise

    async def body() -> AsyncIterator[bytes]:
        try:
            block = first
            while block:
                yield block
                block = await source.read()
        finally:
            try:
                await source.close()
            finally:
                await stack.aclose()

    headers = {"Content-Disposition": f"attachment;filename={name}", "X-Content-Type-Options": "nosniff"}
    if source.size is not None:
        headers["Content-Length"] = str(source.size)
    return StreamingResponse(body(), media_type=source.content_type or "application/octet-stream", headers=headers)


async def _named(broker: Broker, did: str, service_id: str, parameters: Mapping[str, Any]) -> tuple[File, ...]:
    if not service_id:
        raise InvalidParameter("serviceId: is required together with did")
    try:
        asset = await broker.catalogue.asset(did)
        if asset is None:
            raise InvalidParameter("did: Cannot resolve DID")
        service = asset.service(service_id)
        if service is None:
            raise InvalidParameter("serviceId: Invalid serviceId")
        files = files_of(asset, service, broker.key)
        # Nobody signs here, and what a source answers to a parameter can be told by its size: of an asset that is not
        # for everybody the files are described as they are without any.
        restricted = asset.credentials.allow or asset.credentials.deny
        return files if restricted or not parameters else given_to(files, service, parameters)
    except BadParameters as fault:
        raise InvalidParameter(f"userdata: {fault}") from None
    except CatalogueUnavailable:
        raise NotReady("The catalogue of assets cannot be reached; try again in a moment.") from None
    except (AssetUnusable, FilesUnavailable):
        raise InvalidParameter("did: Unable to get dataset files") from None


def _given(file: Mapping[str, Any], parameters: Mapping[str, Any]) -> File:
    if not file:
        raise InvalidParameter("did: give did and serviceId, or a file object: type and what belongs to it")
    try:
        return parse_file(file).given(parameters)
    except BadFile as fault:
        raise InvalidParameter(str(fault)) from None
    except BadParameters as fault:
        raise InvalidParameter(f"userdata: {fault}") from None


async def _described(opened: Remotes, file: File, checksum: bool) -> dict[str, Any]:
    digest = hashlib.sha256()
    size = 0
    try:
        async with opened.slot(file):
            source = await opened.open(file)
            try:
                while block := await source.read():
                    digest.update(block)
                    size += len(block)
                    if not checksum:
                        break
                    if size > LARGEST:
                        return {"valid": False}
            finally:
                await source.close()
    except (Unreachable, ForbiddenUrl):
        return {"valid": False}
    whole = size if checksum else source.size
    told: dict[str, Any] = {
        "valid": True,
        "contentLength": "" if whole is None else str(whole),
        "contentType": source.content_type or "",
    }
    return {**told, "checksum": digest.hexdigest(), "checksumType": "sha256"} if checksum else told
