"""
What a stage puts out, on its way to a stage that another worker runs, maybe on another machine: into a store, and out
of it again.

It is raw: nothing of it leaves the house, and no consumer can ask for it. File names are the algorithm's, in whatever
bytes; so in the store files have numbers, and their names stand in the manifest, quoted.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from threading import Event
from typing import BinaryIO, Final, cast
from urllib.parse import quote, unquote_to_bytes

from blocks.store import Kind, Manifest, ManifestFile, NotStored, ResultStore, StoreUnavailable
from tasks.provision import FetchedFile, InputUnreachable
from tasks.results import PublishFailed, open_regular, regular_files
from tasks.stopping import NEVER, Stoppable, go_on

TRANSFERS: Final = 4
"""Files on their way at a time."""

_TYPE: Final = "application/octet-stream"


def hand_over(
    store: ResultStore,
    job_id: str,
    stage: int,
    outputs: Path,
    *,
    stop: Event = NEVER,
    before_it_shows: Callable[[], None] = lambda: None,
) -> None:
    """
    Put the regular files under *outputs* into *store*, a few at a time and in bounded memory, then their manifest. To
    be called when they have been filtered, as ``link_stage_outputs``. May be repeated.

    *before_it_shows* is called when all but the manifest is there; what it raises keeps that back.

    Raises:
        PublishFailed: The store failed. Nothing of the stage can be received.
        Stopped: *stop* was set, from any thread.
    """

    def send(numbered: tuple[int, str]) -> ManifestFile:
        number, path = numbered
        go_on(stop)
        name = f"{stage}/{Kind.OUTPUT}/{number}"
        with open_regular(outputs, path) as file:
            stored = store.put_stream(job_id, name, cast(BinaryIO, Stoppable(file, stop)))
        return ManifestFile(
            path=quote(os.fsencode(path)),
            name=name,
            size=stored.size,
            sha256=stored.sha256,
            type=_TYPE,
            kind=Kind.OUTPUT,
            stage=stage,
        )

    failure = None
    pool = ThreadPoolExecutor(TRANSFERS, thread_name_prefix="hand-over")
    try:
        files = tuple(pool.map(send, enumerate(regular_files(outputs))))
        go_on(stop)
        before_it_shows()
        store.publish_manifest(job_id, stage, Manifest(files=files, created=datetime.now(UTC)))
    except StoreUnavailable as error:
        go_on(stop)
        failure = str(error)
    finally:
        pool.shutdown(cancel_futures=True)
    if failure is not None:
        raise PublishFailed(f"outputs for a later stage: {failure}")


def handed_over(store: ResultStore, job_id: str, stage: int) -> str:
    """
    A checksum of what a stage has handed over: another one whenever it has done so again.

    Raises:
        InputUnreachable: It has not, or the store cannot be reached.
    """
    return hashlib.sha256(_part(store, job_id, stage).model_dump_json().encode()).hexdigest()


def receive(store: ResultStore, job_id: str, stage: int, into: Path, *, stop: Event = NEVER) -> tuple[FetchedFile, ...]:
    """
    Fetch what *stage* has handed over as ``<into>/<the same relative path>``, in bounded memory.

    Returns:
        As ``link_stage_outputs``.

    Raises:
        InputUnreachable: It has not handed over, the store cannot be reached, or what is there is not what was sent.
        Stopped: *stop* was set, from any thread.
    """
    into.mkdir(parents=True, exist_ok=True)
    part = _part(store, job_id, stage)
    fetch = partial(_fetch, store, job_id, into, stop=stop)
    failure = None
    pool = ThreadPoolExecutor(TRANSFERS, thread_name_prefix="receive")
    try:
        return tuple(pool.map(fetch, range(len(part.files)), part.files))
    except (StoreUnavailable, NotStored) as error:
        go_on(stop)
        failure = str(error)
    finally:
        pool.shutdown(cancel_futures=True)
    raise InputUnreachable(_sentence(stage, failure))


def _part(store: ResultStore, job_id: str, stage: int) -> Manifest:
    try:
        return store.part(job_id, stage)
    except (StoreUnavailable, NotStored) as error:
        failure = str(error)
    raise InputUnreachable(_sentence(stage, failure))


def _sentence(stage: int, failure: str) -> str:
    return f"what stage {stage} has put out cannot be had from its environment's store: {failure}"


def _fetch(
    store: ResultStore, job_id: str, into: Path, position: int, file: ManifestFile, *, stop: Event
) -> FetchedFile:
    started = time.monotonic()
    target = into / _relative(file.path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    digest, size = hashlib.sha256(), 0
    with target.open("xb") as copy:
        for piece in store.stream(job_id, file.name):
            go_on(stop)
            digest.update(piece)
            size += len(piece)
            copy.write(piece)
    if (size, digest.hexdigest()) != (file.size, file.sha256):
        raise StoreUnavailable("a file is not what was put there")
    # As a linked one: the stage may run as another user.
    target.chmod(0o644)
    return FetchedFile(into.name, position, size, file.sha256, None, time.monotonic() - started)


def _relative(quoted: str) -> str:
    path = os.fsdecode(unquote_to_bytes(quoted))
    if "\0" in path or any(part in {"", ".", ".."} for part in path.split("/")):
        raise StoreUnavailable("a manifest could not be read: it is damaged")
    return path
