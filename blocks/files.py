"""What a data set's owner can point at: file objects as the Provider knows them. Pure values; contract, section 7."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

LONGEST_URL: Final = 8_192
CHECKSUMS: Final = {"md5": 32, "sha1": 40, "sha224": 56, "sha256": 64, "sha384": 96, "sha512": 128}
"""Hash functions that an owner may have used, and the digits of what they make."""

Url = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_URL)]
Address = Annotated[str, StringConstraints(pattern=r"^0x[0-9a-fA-F]{40}$")]
Headers = Annotated[
    Mapping[
        Annotated[str, StringConstraints(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}$")],
        Annotated[str, StringConstraints(pattern=r"^[\t\x20-\x7e\x80-\xff]*$", max_length=8_192)],
    ],
    Field(repr=False),
]
Parameters = Mapping[str, Any]
"""What a consumer hands on to a data set's source (``userdata``), by name."""


class BadParameters(ValueError):
    """A consumer's parameters do not fit a file. The text names parameters, never the file."""


class _File(BaseModel):
    """Everything but the type may be its owner's secret, so none of it is in a repr or an error."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True, hide_input_in_errors=True)

    checksum: Annotated[str, StringConstraints(to_lower=True)] | None = None
    """In hex; what arrives has to have it. With ``checksumType`` as in OEP-8, metadata of an asset's files."""
    checksum_type: Annotated[str, StringConstraints(to_lower=True)] = Field(default="sha256", alias="checksumType")

    @field_validator("checksum", mode="before")
    @classmethod
    def _empty(cls, given: Any) -> Any:
        return given or None

    @model_validator(mode="after")
    def _checkable(self) -> Self:
        if self.checksum is not None:
            length = CHECKSUMS.get(self.checksum_type.replace("-", ""))
            if length is None:
                raise ValueError(f"checksumType: must be one of {', '.join(CHECKSUMS)}")
            if not re.fullmatch(rf"[0-9a-f]{{{length}}}", self.checksum):
                raise ValueError(f"checksum: must be {length} hexadecimal digits")
        return self

    @property
    def declared(self) -> tuple[str, str] | None:
        """Name of a hash function, as hashlib has it, and what it makes of this file, in hex."""
        return None if self.checksum is None else (self.checksum_type.replace("-", ""), self.checksum)

    def given(self, parameters: Parameters) -> Self:
        """
        This file with a consumer's *parameters*.

        Raises:
            BadParameters: It takes none, or not these.
        """
        if parameters:
            raise BadParameters("this file takes no parameters")
        return self


class UrlFile(_File):
    """A file behind a URL: http and https with method and headers; any other scheme as fsspec opens it."""

    type: Literal["url"] = "url"
    url: Url = Field(repr=False)
    method: Literal["GET", "POST"] = "GET"
    headers: Headers = {}

    def given(self, parameters: Parameters) -> Self:
        """*parameters* are appended to the query; one that the owner has set already cannot be set anew."""
        if not parameters:
            return self
        try:
            parts = urlsplit(self.url)
            own = {name for name, _ in parse_qsl(parts.query, keep_blank_values=True)}
            more = urlencode(
                {name: value if isinstance(value, str) else json.dumps(value) for name, value in parameters.items()}
            )
        except ValueError:
            # No URL at all, or half a character (a lone surrogate) in a parameter.
            raise BadParameters("they do not fit into the URL of this file") from None
        if own & set(parameters):
            raise BadParameters(f"{', '.join(sorted(own & set(parameters)))}: set by the owner of the file")
        query = f"{parts.query}&{more}" if parts.query else more
        return self.model_copy(update={"url": urlunsplit(parts._replace(query=query))})


class IpfsFile(_File):
    """A file by its content identifier, fetched through the operator's gateway and checked against it."""

    type: Literal["ipfs"]
    hash: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]{10,200}$")] = Field(repr=False)


class ArweaveFile(_File):
    """A transaction of the Arweave network, fetched through the operator's gateway."""

    type: Literal["arweave"]
    transaction_id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{43}$")] = Field(
        alias="transactionId", repr=False
    )


class GraphqlFile(_File):
    """The answer to a query, as JSON."""

    type: Literal["graphql"]
    url: Url = Field(repr=False)
    query: Annotated[str, StringConstraints(min_length=1, max_length=100_000)] = Field(repr=False)
    variables: Mapping[str, Any] = Field(default={}, repr=False)
    headers: Headers = {}

    def given(self, parameters: Parameters) -> Self:
        """*parameters* are the query's variables; those of the owner hold."""
        return self.model_copy(update={"variables": {**parameters, **self.variables}})


class SmartContractFile(_File):
    """What a view function of a contract returns, as JSON."""

    type: Literal["smartcontract"]
    address: Address = Field(repr=False)
    chain_id: Annotated[int, Field(ge=0)] = Field(alias="chainId")
    abi: Mapping[str, Any] = Field(repr=False)
    """Of one function; it has to be ``view`` or ``pure``."""
    arguments: Mapping[str, Any] = Field(default={}, repr=False)
    """By the names of the function's inputs."""

    @model_validator(mode="after")
    def _reads_only(self) -> Self:
        if self.abi.get("type") != "function" or self.abi.get("stateMutability") not in ("view", "pure"):
            raise ValueError("abi: must be that of one view or pure function")
        return self

    def given(self, parameters: Parameters) -> Self:
        """*parameters* are the function's arguments, by name."""
        return self.model_copy(update={"arguments": {**parameters, **self.arguments}})


File = UrlFile | IpfsFile | ArweaveFile | GraphqlFile | SmartContractFile
FileObject = Annotated[File, Field(discriminator="type")]
"""The same as a field of a document."""

_ONE: Final[TypeAdapter[File]] = TypeAdapter(FileObject)


class BadFile(ValueError):
    """No file object. The text names fields, never what stands in them."""


def parse_file(value: Any) -> File:
    """
    A file object as it stands in an asset. One without a type is a URL, as in older assets.

    Raises:
        BadFile
    """
    if isinstance(value, Mapping) and "type" not in value:
        value = {**value, "type": "url"}
    try:
        return _ONE.validate_python(value)
    except ValidationError as fault:
        faults = [
            # Pydantic's own words quote the type that was given, which is whatever an owner has mistyped there.
            f"type: must be one of {error['ctx']['expected_tags']}"
            if error["type"] == "union_tag_invalid"
            else f"{_field(error['loc'][1:])}{error['msg'].removeprefix('Value error, ')}"
            for error in fault.errors(include_url=False, include_input=False)
        ]
    raise BadFile("; ".join(faults))


def _field(location: tuple[int | str, ...]) -> str:
    """
    What a message begins with; nothing for one that names its fields itself. Of headers only that: what stands in
    place of a name may be a value.
    """
    names = list(map(str, location))
    return "".join(f"{name}: " for name in [".".join(names[:1] if "headers" in names else names)] if name)


def parse_files(values: Any) -> tuple[File, ...]:
    """Several of them. Raises BadFile."""
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise BadFile("expected a list of files")
    return tuple(parse_file(value) for value in values)
