"""Assets: what is on offer and under which rules, as a DDO says it. Pure values; contract, section 7."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal, TypeVar, overload

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from blocks.files import Parameters

ACTIVE: Final = 0
"""``nft.state`` of an asset that may be used."""
UNLISTED: Final = 5
"""``nft.state`` of an asset that markets do not show and that may be used all the same."""

DID: Final = r"^did:op:[0-9A-Za-z_-]{1,128}$"
"""What may stand in a URL, in a file name and in a tag as it is."""

DID_PREFIX: Final = "did:op:"


def folder_name(asset_id: str) -> str:
    """The name of a data set's folder: its id without ``did:op:``."""
    return asset_id.removeprefix(DID_PREFIX)


class AssetUnusable(Exception):
    """An asset that is known and cannot be used. The text names fields, never what stands in them."""


class AssetMalformed(AssetUnusable):
    """A DDO that is none."""


class AssetWithheld(AssetUnusable):
    """Withdrawn by its publisher, in purgatory, or encrypted as a whole."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True, hide_input_in_errors=True)


def _or_empty(value: Any) -> Any:
    return () if value is None else value


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


Address = Annotated[str, BeforeValidator(_lower)]
"""In lower case: addresses compare case-insensitively."""


class TrustedAlgorithm(_Part):
    """An algorithm a data set's owner trusts. Checksums that are given have to match."""

    did: str | None = None
    files_checksum: str | None = Field(default=None, alias="filesChecksum")
    container_checksum: str | None = Field(default=None, alias="containerSectionChecksum")


class ComputeRules(_Part):
    """What may be run on a data set. ``trusted_algorithms`` None and empty differ only in how they are spelled."""

    allow_raw_algorithm: bool = Field(default=False, alias="allowRawAlgorithm")
    allow_network_access: bool = Field(default=False, alias="allowNetworkAccess")
    trusted_algorithms: Annotated[tuple[TrustedAlgorithm, ...], BeforeValidator(_or_empty)] = Field(
        default=(), alias="publisherTrustedAlgorithms"
    )
    trusted_publishers: Annotated[tuple[Address, ...], BeforeValidator(_or_empty)] = Field(
        default=(), alias="publisherTrustedAlgorithmPublishers"
    )


class ConsumerParameter(_Part):
    name: str
    required: bool = False


class AssetService(_Part):
    """One way to use an asset. *files* is encrypted to its provider's key (hex), or in clear in a local catalogue."""

    id: str
    index: int = 0
    """Its place among the asset's services; what an order on chain names."""
    type: str
    files: Any = Field(default=None, repr=False)
    datatoken: Address = Field(default="", alias="datatokenAddress")
    endpoint: str = Field(default="", alias="serviceEndpoint")
    timeout: Annotated[int, Field(ge=0)] = 0
    """Seconds an order is good for; 0 is for ever."""
    compute: Annotated[ComputeRules, BeforeValidator(lambda value: value or {})] = ComputeRules()
    parameters: Annotated[tuple[ConsumerParameter, ...], BeforeValidator(_or_empty)] = Field(
        default=(), alias="consumerParameters"
    )


class Credential(_Part):
    type: str
    values: tuple[Address, ...] = ()


class Credentials(_Part):
    """Who may use an asset. An empty *allow* allows everybody who is not denied."""

    allow: Annotated[tuple[Credential, ...], BeforeValidator(_or_empty)] = ()
    deny: Annotated[tuple[Credential, ...], BeforeValidator(_or_empty)] = ()


class Container(_Part):
    """Of a published algorithm."""

    entrypoint: str = ""
    image: str = ""
    tag: str = ""
    checksum: str = ""


class AlgorithmMetadata(_Part):
    container: Container = Container()
    parameters: Annotated[tuple[ConsumerParameter, ...], BeforeValidator(_or_empty)] = Field(
        default=(), alias="consumerParameters"
    )


class Metadata(_Part):
    type: Literal["dataset", "algorithm"]
    name: str = ""
    algorithm: AlgorithmMetadata | None = None


class Nft(_Part):
    owner: Address | None = None
    state: int = ACTIVE


class Purgatory(_Part):
    """Where a metadata store puts what has been complained of."""

    state: bool = False


class Asset(_Part):
    """A data set or an algorithm. *chain_id* is None for one that is offered without a chain."""

    id: str
    chain_id: int | None = Field(default=None, alias="chainId")
    nft_address: Address = Field(default="", alias="nftAddress")
    metadata: Metadata
    services: tuple[AssetService, ...]
    credentials: Annotated[Credentials, BeforeValidator(lambda value: value or {})] = Credentials()
    nft: Annotated[Nft, BeforeValidator(lambda value: value or {})] = Nft()
    purgatory: Annotated[Purgatory, BeforeValidator(lambda value: value or {})] = Purgatory()

    @model_validator(mode="before")
    @classmethod
    def _numbered(cls, values: Any) -> Any:
        """A service's place is not written down in a DDO; the list is its order."""
        services = values.get("services") if isinstance(values, Mapping) else None
        if isinstance(services, list):
            numbered = [
                {**service, "index": n} if isinstance(service, Mapping) else service
                for n, service in enumerate(services)
            ]
            return {**values, "services": numbered}
        return values

    @property
    def publisher(self) -> str | None:
        """Owner of the asset's NFT, in lower case."""
        return self.nft.owner

    @property
    def withheld(self) -> str | None:
        """Why it may not be used, if it may not; the NFT's state is what the document says, not the chain."""
        return _withheld(self.nft, self.purgatory)

    def service(self, service_id: str) -> AssetService | None:
        return next((service for service in self.services if service.id == service_id), None)


class LocalAsset(Asset):
    """
    An asset of this house's own catalogue: its files may stand in clear.

    A type and not a field, so that no document from elsewhere can say it of itself, and so that whoever writes
    an asset down and reads it again has lost the permission instead of having gained it.
    """


@dataclass(frozen=True)
class RemoteAsset:
    """An asset whose files are at another Provider, and where its document is. *tx_id* is the order, if it has one."""

    did: str
    service_id: str
    tx_id: str = ""
    userdata: Parameters = field(default_factory=dict, repr=False)
    metadata_url: str = field(default="", repr=False)
    """Of the metadata store that has its document."""


class Agreement(_Part):
    """What a data owner has granted under a name, for clients that give nothing but that name (Brizo)."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    id: Annotated[str, BeforeValidator(_lower), StringConstraints(pattern=r"^[0-9a-z._-]{1,128}$")]
    """In lower case: hexadecimal ids compare case-insensitively."""
    did: Annotated[str, StringConstraints(pattern=DID)]
    service_id: str | None = Field(default=None, alias="serviceId")
    """None: the asset's first compute service."""
    consumer: Annotated[str, BeforeValidator(_lower), StringConstraints(pattern=r"^0x[0-9a-f]{40}$")] | None = None
    """None: whoever the asset's credentials let in."""
    algorithm: Annotated[str, StringConstraints(pattern=DID)] | None = None
    """None: whatever the asset's rules let run."""


_HEXADECIMAL: Final = re.compile(r"(?:0x)?([0-9a-f]+)")


def spellings(agreement_id: str) -> tuple[str, ...]:
    """
    Under which an agreement may be known, the one given first. Some clients leave out 0x, one of them not everywhere.
    """
    lower = agreement_id.lower()
    found = _HEXADECIMAL.fullmatch(lower)
    digits = (f"0x{found[1]}", found[1]) if found else ()
    return tuple(dict.fromkeys((agreement_id, lower, *digits)))


_Kind = TypeVar("_Kind", bound=Asset)


@overload
def parse_asset(ddo: Any) -> Asset: ...
@overload
def parse_asset(ddo: Any, kind: type[_Kind]) -> _Kind: ...
def parse_asset(ddo: Any, kind: type[Asset] = Asset) -> Asset:
    """
    A DDO as values.

    Raises:
        AssetMalformed
    """
    try:
        return kind.model_validate(ddo)
    except ValidationError as fault:
        faults = faults_of(fault)
    raise AssetMalformed("; ".join(faults))


def usable_asset(ddo: Any) -> Asset:
    """
    The DDO of a metadata store as values, if the asset may be used.

    Raises:
        AssetWithheld: Also for what is left of the document of a withdrawn asset, without metadata and services.
        AssetMalformed
    """
    if isinstance(ddo, str):
        raise AssetWithheld("its document is encrypted")
    if isinstance(ddo, Mapping) and not ddo.get("metadata") and (why := _withheld_rest(ddo)):
        raise AssetWithheld(why)
    asset = parse_asset(ddo)
    if asset.withheld:
        raise AssetWithheld(asset.withheld)
    return asset


def _withheld(nft: Nft, purgatory: Purgatory) -> str | None:
    if purgatory.state:
        return "it is in purgatory"
    if nft.state not in (ACTIVE, UNLISTED):
        return f"its publisher has withdrawn it (state {nft.state})"
    return None


def _withheld_rest(ddo: Mapping[str, Any]) -> str | None:
    try:
        return _withheld(Nft.model_validate(ddo.get("nft") or {}), Purgatory.model_validate(ddo.get("purgatory") or {}))
    except ValidationError:
        return None


def faults_of(fault: ValidationError) -> list[str]:
    """What is wrong where, as ``services.0.id: Field required``, and nothing of the values."""
    return [
        f"{'.'.join(map(str, error['loc']))}: {error['msg'].removeprefix('Value error, ')}".removeprefix(": ")
        for error in fault.errors(include_url=False, include_context=False, include_input=False)
    ]
