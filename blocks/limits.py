"""What one run of an algorithm may use, and what a compute environment offers. Pure values."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_network
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]

CENTURY = 3_155_760_000
"""Seconds. What is to last for ever is given this; far beyond it the calendar of Python ends."""

MIB = 1024**2
GIB = 1024**3


def _listed(value: Any) -> Any:
    """A list, or one string with commas: the form an environment variable can have."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _networks(blocks: Iterable[str]) -> tuple[str, ...]:
    return tuple(str(ip_network(block)) for block in blocks)


class Limits(BaseModel):
    """Ceilings of one run. Bytes are bytes, times are seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: Annotated[float, Field(gt=0)] = 3600.0
    """Wall-clock time of the algorithm; past it the run ends as timed out."""
    memory_bytes: Positive = 2 * GIB
    """Memory of the algorithm and all its children together."""
    processes: Positive = 256
    """Processes and threads together."""
    disk_bytes: Positive = 10 * GIB
    """Everything the algorithm writes: outputs, logs, scratch, together."""
    cpus: Annotated[float, Field(gt=0)] = 1.0
    gpus: Annotated[int, Field(ge=0)] = 0
    """What one run may have; one that asks for none has none."""

    def capped(self, **wanted: float | None) -> Self:
        """These limits, each lowered (never raised) to the *wanted* value where one is given."""
        lower = {name: min(value, getattr(self, name)) for name, value in wanted.items() if value is not None}
        return self.model_copy(update=lower)


class FetchLimits(BaseModel):
    """How inputs and algorithms may be fetched."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schemes: tuple[str, ...] = ("http", "https")
    """URL schemes a consumer may name. Anything fsspec opens can be added; chains (``zip::``) never."""
    networks: Annotated[tuple[str, ...], BeforeValidator(_listed), AfterValidator(_networks)] = ()
    """CIDR blocks of non-public addresses that are allowed all the same, for example ``127.0.0.0/8``."""
    connections: Positive = 64
    connections_per_host: Positive = 32
    """A large file is read over as many."""
    seconds_to_connect: Annotated[float, Field(gt=0)] = 10.0
    seconds_silent: Annotated[float, Field(gt=0)] = 30.0
    """Longest silence on a connection before it counts as dead."""
    seconds_total: Annotated[float, Field(gt=0)] = 3600.0
    """Deadline of the whole provisioning of one stage."""
    attempts: Positive = 3
    """Tries per URL; only transient failures are tried again, and one that has brought a MiB does not count."""
    total_bytes: Positive = 100 * GIB
    algorithm_bytes: Positive = 64 * MIB


class FilterLimits(BaseModel):
    """What may leave the house."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: Positive = 10_000
    file_bytes: Positive = 1 * GIB
    total_bytes: Positive = 5 * GIB
    log_bytes: Positive = 10 * MIB
    """A log longer than this is cut at the front with a notice, never withheld."""
    types: tuple[str, ...] = ()
    """Media types, found by content, that may leave (``text/*`` patterns work). Empty means any."""


class Offer(BaseModel):
    """A compute environment as consumers see it and as plans are checked against it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    desc: str = ""
    limits: Limits = Limits()
    fetch: FetchLimits = FetchLimits()
    filter: FilterLimits = FilterLimits()
    network: bool = False
    """Whether an algorithm may have a network at all."""
    cpu_type: str = ""
    gpu_type: str = ""
    gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs for all jobs together; never less than one job may have."""
    price_min: Annotated[float, Field(ge=0)] = 0.0
    """Price of a minute, in units of *fee_token*."""
    fee_token: str = ""
    consumer_address: str = ""
    max_jobs: Positive = 2
    max_wait: Annotated[int, Field(ge=0, le=CENTURY)] = 86_400
    """Seconds a job may wait for its turn; past them it ends as expired in the queue. 0: for ever."""
    storage_expiry: Annotated[int, Field(gt=0, le=CENTURY)] = 604_800
    """Seconds results are kept after the end of their job."""

    @property
    def all_gpus(self) -> int:
        return max(self.gpus, self.limits.gpus)
