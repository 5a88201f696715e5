"""
Other providers: what one of them asks for files that are encrypted to its key, in its own words of ``initialize``.

Who it is stands in the document of an asset, so a stranger has named it, and whatever it answers may be made up:
it is asked through the guard, read up to a limit, and only the known fields are passed on, each of its known form.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Annotated, Any, Final

import aiohttp
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError
from yarl import URL

from blocks.files import Address
from blocks.limits import FetchLimits
from blocks.urls import HTTP, ForbiddenUrl, check_url

SECONDS: Final = 10.0
"""It may take to answer, all told."""
LARGEST_ANSWER: Final = 64 * 1024
"""Bytes. A real one has one."""

_PATH: Final = "api/services/initialize"
_TRANSIENT: Final = frozenset({408, 425, 429})
_LARGEST_NUMBER: Final = 2**256


class ProviderUnreachable(Exception):
    """It does not answer, or nothing that makes sense. *reason* is a sentence that quotes nothing."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class ProviderRefuses(Exception):
    """It does not let this consumer have the files. Its own words are a stranger's, and not passed on."""


def _digits(value: Any) -> Any:
    """Amounts are numbers in some versions, and texts in those whose authors have met JavaScript."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _uint256(value: str) -> str:
    if int(value) >= _LARGEST_NUMBER:
        raise ValueError("is too large for a contract")
    return value


Amount = Annotated[str, BeforeValidator(_digits), StringConstraints(pattern=r"^[0-9]{1,78}$"), AfterValidator(_uint256)]
Word = Annotated[str, StringConstraints(pattern=r"^0x[0-9a-fA-F]{64}$")]
Hex = Annotated[str, StringConstraints(pattern=r"^0x([0-9a-fA-F]{2})*$", max_length=8_194)]


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True, strict=True)


class ProviderFee(_Answer):
    """As ``startOrder`` takes it."""

    providerFeeAddress: Address
    providerFeeToken: Address
    providerFeeAmount: Amount
    providerData: Hex
    v: Annotated[int, Field(ge=27, le=28)]
    r: Word
    s: Word
    validUntil: Annotated[int, Field(ge=0, lt=_LARGEST_NUMBER)]


class Initialized(_Answer):
    """What has to be ordered; with *validOrder* an order can be used once more."""

    datatoken: Address
    providerFee: ProviderFee | None = None
    validOrder: Word | None = None


async def initialize(
    session: aiohttp.ClientSession,
    endpoint: str,
    *,
    limits: FetchLimits,
    datatoken: str,
    document_id: str,
    service_id: str,
    consumer: str,
    tx_id: str,
    userdata: Mapping[str, Any],
) -> Initialized:
    """
    ``GET <endpoint>/api/services/initialize``; *session* is one of ``blocks.guard.guarded_session``.

    Args:
        datatoken: Of the service, as the asset's document says; an answer about another is none.
        tx_id: An earlier order, "" for none.

    Raises:
        ProviderUnreachable, ProviderRefuses
    """
    asked = {"documentId": document_id, "serviceId": service_id, "consumerAddress": consumer}
    if tx_id:
        asked["transferTxId"] = tx_id
    if userdata:
        asked["userdata"] = json.dumps(userdata)
    try:
        url = _url(endpoint, limits).with_query(asked)
        # Not by the session's own limits alone: they do not count a slow trickle, nor the wait for a connection.
        async with asyncio.timeout(SECONDS), session.get(url, allow_redirects=False) as answer:
            status = answer.status
            body = await _body(answer) if status == 200 else b""
    except ProviderUnreachable:
        raise
    except TimeoutError:
        raise ProviderUnreachable("it does not answer in time") from None
    except (ForbiddenUrl, aiohttp.InvalidURL):
        raise ProviderUnreachable("its address is none that may be asked") from None
    except (aiohttp.ClientError, OSError, ValueError):
        raise ProviderUnreachable("it cannot be reached") from None
    if 400 <= status < 500 and status not in _TRANSIENT:
        raise ProviderRefuses
    if status != 200:
        raise ProviderUnreachable("it does not answer as a provider does")
    return _read(body, datatoken)


def _url(endpoint: str, limits: FetchLimits) -> URL:
    schemes = [scheme for scheme in limits.schemes if scheme in HTTP]
    return URL(check_url(endpoint, schemes), encoded=True).with_query(None) / _PATH


async def _body(answer: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in answer.content.iter_any():
        body += chunk
        if len(body) > LARGEST_ANSWER:
            raise ProviderUnreachable("its answer is too long")
    return bytes(body)


def _read(body: bytes, datatoken: str) -> Initialized:
    try:
        said = Initialized.model_validate_json(body)
    except ValidationError:
        said = None
    if said is None or not (said.providerFee or said.validOrder):
        raise ProviderUnreachable("it does not answer as a provider does")
    if said.datatoken.lower() != datatoken.lower():
        raise ProviderUnreachable("it names another datatoken than the asset's document")
    return said
