"""
The GPUs of one machine, shared out among the runs of its Docker engine.

An engine that is asked for a number of GPUs gives the same first ones to everybody. So runs are given devices by name:
each container tells by a label which it has, and what no container has is free. Who finds too few free waits until
there are enough, and whoever comes later waits behind, or a run that wants many would never get them.
"""

from __future__ import annotations

import fcntl
import io
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Lock
from typing import Final

import docker
from cachetools import TTLCache, cached
from docker.errors import APIError, ImageNotFound
from docker.types import DeviceRequest

from blocks.runner import Waiting

GPUS: Final = "c2d.gpus"
"""Label of a container: the devices it has, separated by commas."""

LOOK_AGAIN: Final = 0.25
"""Seconds between two looks at what is free."""

_PROBE: Final = "c2d-gpu-probe"
_NO_PROGRAM: Final = ("no such file", "not found")
_VISIBLE: Final = "NVIDIA_VISIBLE_DEVICES"


class NoGpu(Exception):
    """Why a run got none, as one sentence for the consumer."""


@contextmanager
def allotted(
    client: docker.DockerClient,
    wanted: int,
    devices: Sequence[str],
    turn: Path,
    *,
    stop: Event,
    on_waiting: Waiting,
    seconds: float,
) -> Iterator[tuple[str, ...]]:
    """
    Wait until *wanted* of *devices* are free. They are the caller's once a container has their label; until then, in
    here, nobody else takes any: all runs that choose among these devices have to name the same file as their *turn*.

    Raises:
        NoGpu: *stop* was set, or *seconds* have passed.
    """
    end = time.monotonic() + seconds

    def pause(why: str) -> None:
        on_waiting(why)
        if stop.wait(LOOK_AGAIN):
            raise NoGpu("stopped while it waited for a GPU")
        if time.monotonic() > end:
            raise NoGpu(f"{_counted(wanted)} did not become free within {seconds:g} s")

    with turn.open("a") as file:
        while not _locked(file.fileno()):
            pause(f"waiting for {_counted(wanted)}: another job waits for GPUs and comes first")
        while len(free := _free(client, devices)) < wanted:
            taken = f"{len(devices) - len(free)} of {len(devices)}"
            pause(f"waiting for {_counted(wanted)}: {taken} are in use by other jobs")
        yield tuple(free[:wanted])


def request(devices: Sequence[str]) -> list[DeviceRequest]:
    return [DeviceRequest(device_ids=list(devices), capabilities=[["gpu"]])] if devices else []


def visible(devices: Sequence[str]) -> dict[str, str | None]:
    """
    Variables by which NVIDIA's runtime is told what to show: what is given out, whatever image and consumer say. None
    takes a variable of the image away; where that runtime is the engine's default, it would show all devices.
    """
    return {_VISIBLE: ",".join(devices) or None}


def _counted(wanted: int) -> str:
    return f"{wanted} GPU{'s' if wanted > 1 else ''}"


def _locked(descriptor: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _free(client: docker.DockerClient, devices: Sequence[str]) -> list[str]:
    taken: set[str] = set()
    for container in client.api.containers(all=True, filters={"label": [GPUS]}):
        if container["State"] not in ("exited", "dead"):
            taken.update(container["Labels"][GPUS].split(","))
    return [device for device in devices if device not in taken]


@cached(TTLCache(maxsize=64, ttl=60), key=lambda client, host, devices: (host, tuple(devices)), lock=Lock())
def _tried(client: docker.DockerClient, host: str, devices: Sequence[str]) -> None:
    """Raises: APIError, with what the engine says of a container with all *devices* before it looks for a program."""
    try:
        client.api.inspect_image(_PROBE)
    except ImageNotFound:
        empty = io.BytesIO()
        tarfile.open(fileobj=empty, mode="w").close()
        client.api.import_image_from_data(empty.getvalue(), repository=_PROBE, tag="latest")
    made = client.api.create_container(
        _PROBE,
        command=["/none"],
        environment=visible(devices),
        host_config=client.api.create_host_config(network_mode="none", device_requests=request(devices)),
    )
    try:
        client.api.start(made["Id"])
    except APIError as refusal:
        if not any(words in str(refusal.explanation) for words in _NO_PROGRAM):
            raise
    finally:
        client.api.remove_container(made["Id"], force=True, v=True)


def obstacle(client: docker.DockerClient, host: str, devices: Sequence[str]) -> str | None:
    """
    Why no run on the engine could have *devices*, as one sentence with the remedy. An engine does not tell what it
    has, so a container that can start nothing is started. That all is well is believed for a minute.
    """
    try:
        _tried(client, host, devices)
    except APIError as refusal:
        words = str(refusal.explanation or refusal)
        if "could not select device driver" in words:
            return (
                "the Docker engine knows of no GPU driver; install NVIDIA's driver and container toolkit, restart the"
                " engine, or offer no GPU"
            )
        return f"the Docker engine cannot give out the GPUs {','.join(devices)}: {words.strip().splitlines()[-1][:200]}"
    return None
