"""What an operator sets, by environment variables named ``C2D_…``; read once, in ``api.main``."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, HttpUrl, StringConstraints, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from blocks.chain import ChainConfig
from flows.status import Dialect


def _words(value: Any) -> Any:
    return value.replace(",", " ").split() if isinstance(value, str) else value


Address = Annotated[str, StringConstraints(pattern=r"^0x[0-9a-fA-F]{40}$", to_lower=True)]
Addresses = Annotated[frozenset[Address], NoDecode, BeforeValidator(_words)]
"""Separated by commas or blanks; in lower case once read, since addresses compare case-insensitively."""


Networks = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_words)]


def is_loopback(host: str) -> bool:
    """Whether *host*, a name or an address without port and brackets, can only be this machine."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Settings(BaseSettings):
    """Times are seconds, sizes are bytes."""

    model_config = SettingsConfigDict(env_prefix="C2D_", frozen=True, extra="ignore", hide_input_in_errors=True)

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8050
    public_url: HttpUrl | None = None
    """What clients reach this service by; result links start with it. Without it, the host they asked for."""
    providers: Addresses = frozenset()
    """Whose signature opens the operator API. Empty: it is open, but to this machine only."""
    admins: Addresses = frozenset()
    """Who, beyond what providers may, sees the configuration and publishing logs."""
    allow_open_operator: bool = False
    """Open the operator API to everybody who can reach it, without any signature."""
    status_table: Literal["000", "001"] = "000"
    """The document whose numbers ``/status`` uses."""
    link_seconds: Annotated[int, Field(gt=0)] = 3600
    key_file: Path
    """The service's keys, one a line: the first is used, the others are still recognised."""
    nonce_database: str
    """
    Of nonces and deleted tokens: ``sqlite+aiosqlite:///<file>`` or ``postgresql+asyncpg://…``. What it forgets can be
    replayed.
    """
    max_body_bytes: Annotated[int, Field(gt=0)] = 32 * 1024**2
    """Raw code of 10 MiB may stand escaped in a document."""
    local_workers: bool = False
    """The workers run on this machine: an environment that cannot shut algorithms in here is refused at once."""
    catalogue: Path | None = None
    """Assets on offer without a metadata store: a folder, or one YAML file."""
    metadata_store: HttpUrl | None = None
    """Where assets are looked up that the catalogue does not have."""
    chains: tuple[ChainConfig, ...] = ()
    """JSON: ``[{"id": 137, "rpc": "https://…", "fee_token": "0x…"}]``. Empty: nothing is ordered or paid on a chain."""
    provider_key_block: str | None = None
    """Name of the Prefect Secret block with this provider's key, in hex or as a keystore."""
    keystore: Path | None = None
    """This provider's key as an encrypted keystore file; either it or the block."""
    keystore_password_file: Path | None = None
    deny_unlisted_algorithms: bool = False
    """A data set that lists no trusted algorithms and publishers allows none, instead of any that is published."""
    default_environment: str = ""
    """Where jobs of the Provider's and Brizo's dialects run that name none; needless where there is only one."""
    environments_by_chain: bool = False
    """``computeEnvironments`` answers an object keyed by chain id, as some clients of the Provider expect."""
    networks: Networks = ()
    """CIDR blocks of non-public addresses this process may read files of assets from all the same."""
    ipfs_gateway: str = ""
    arweave_gateway: str = ""

    @property
    def status_dialect(self) -> Dialect:
        return Dialect(self.status_table)

    @property
    def open_to_loopback_only(self) -> bool:
        return not self.providers and not self.allow_open_operator

    @model_validator(mode="after")
    def _closed_unless_told(self) -> Self:
        if self.open_to_loopback_only and not is_loopback(self.host):
            raise ValueError(
                f"the operator API would be open to everybody who reaches {self.host}: list who may use it in "
                "C2D_PROVIDERS, listen on 127.0.0.1, or say so with C2D_ALLOW_OPEN_OPERATOR=true"
            )
        return self
