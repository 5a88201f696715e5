"""
Assets at other Providers: looked up in a metadata store, listed, and downloaded with a signature of our own.

Who has named the metadata store, and whom a document in it names as Provider, may be anybody: both are asked through
the guard, neither is followed elsewhere, and nothing they say is repeated. Contract, sections 4 and 5.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import aiohttp
from pydantic_core import from_json
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential
from yarl import URL

from blocks.assets import AssetService, AssetUnusable, RemoteAsset
from blocks.catalogue import CatalogueUnavailable, MetadataStore
from blocks.guard import guarded_session
from blocks.limits import MIB, FetchLimits
from blocks.remote import (
    TRANSIENT_STATUS,
    Access,
    HttpStream,
    Stream,
    Unreachable,
    check_status,
    in_words,
    tried,
    whole_body,
)
from blocks.urls import HTTP, ForbiddenUrl, check_url

if TYPE_CHECKING:
    from blocks.keys import ProviderKey

MOST_FILES: Final = 10_000
"""Files of one asset; a longer list is refused."""
LARGEST_LIST: Final = 4 * MIB
"""Bytes of what a Provider answers in JSON."""
RACES: Final = 8
"""Tries of one download whose nonce others, with the same key, have overtaken each time."""

NO_SIGNER: Final = "this environment has no key to sign downloads at other providers with"

_PROVIDER: Final = "its provider"
# Names and paths as the Provider has them; one that tells others is believed.
_ENDPOINTS: Final[Mapping[str, tuple[str, str]]] = {
    "fileinfo": ("POST", "/api/services/fileinfo"),
    "nonce": ("GET", "/api/services/nonce"),
    "download": ("GET", "/api/services/download"),
}
# No dots at the beginning of a part: such a path would lead out of where the Provider is.
_PATH: Final = re.compile(r"(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*){1,20}/?")
_NONCE: Final = re.compile(r"([0-9]{1,100})(?:\.([0-9]{1,100}))?")


@dataclass
class _Provider:
    """One Provider, by the URL in a service. *lock* is held while it is asked what must not overlap."""

    root: str
    endpoints: Mapping[str, tuple[str, str]] | None = None
    """None: not asked yet."""
    nonce: int | None = None
    """The last one given away here, or told; None: not asked yet."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(frozen=True)
class AssetFile:
    """A file of an asset, in its Provider's count from 0. Opened by the ``Providers`` that found it."""

    asset: RemoteAsset
    index: int
    provider: _Provider = field(repr=False)


@dataclass(frozen=True)
class FoundAsset:
    """*ddo* is the asset's document, without files that stand in it in clear. There is one file or more."""

    ddo: Mapping[str, Any] = field(repr=False)
    files: tuple[AssetFile, ...]


@asynccontextmanager
async def providers(limits: FetchLimits, access: Access) -> AsyncIterator[Providers]:
    """Other Providers, for the time of the ``async with``; its connections are closed at the end."""
    async with AsyncExitStack() as stack:
        yield Providers(limits, access, stack)


class Providers:
    """What is known of other Providers, their nonces among it. Made by ``providers``."""

    def __init__(self, limits: FetchLimits, access: Access, stack: AsyncExitStack) -> None:
        self._limits = limits
        self._signer = access.signer
        self._allowed_stores = {url.rstrip("/") for url in access.metadata_stores}
        self._stack = stack
        self._opened: aiohttp.ClientSession | None = None
        self._known: dict[str, _Provider] = {}
        self._stores: dict[str, MetadataStore] = {}

    async def find(self, asset: RemoteAsset) -> FoundAsset:
        """
        Look *asset* up, and ask its Provider for its files.

        Raises:
            Unreachable: Also where there is no key to download them with, or one of them cannot be had.
        """
        if self._signer is None:
            raise Unreachable(NO_SIGNER)
        if self._allowed_stores and asset.metadata_url.rstrip("/") not in self._allowed_stores:
            raise Unreachable("the metadata store is not one in which this environment looks assets up")
        ddo, service = await self._looked_up(asset)
        if not service.endpoint:
            raise Unreachable("the asset's service names no provider")
        root = self._root(service.endpoint)
        provider = self._known.setdefault(root, _Provider(root))
        async with provider.lock:
            if provider.endpoints is None:
                provider.endpoints = await tried(self._limits, partial(self._described, provider))
        indexes = await tried(self._limits, partial(self._listed, provider, asset))
        return FoundAsset(ddo, tuple(AssetFile(asset, index, provider) for index in indexes))

    async def open(self, file: AssetFile) -> Stream:
        """
        Begin to download *file*.

        A Provider takes only nonces greater than the last one of an address, so of the downloads from one Provider
        each is begun when the one before has been answered; their bodies arrive side by side. Other tasks, jobs and
        machines may sign with the same key: who is overtaken by them tries again with a greater nonce.

        Raises:
            Unreachable
        """
        racing = AsyncRetrying(
            retry=retry_if_exception_type(_Overtaken),
            stop=stop_after_attempt(RACES),
            wait=wait_random_exponential(multiplier=0.05, max=1.0),
            reraise=True,
        )
        response: aiohttp.ClientResponse = await racing(self._download, file)
        return HttpStream(response, self._limits)

    # The metadata store.

    async def _looked_up(self, asset: RemoteAsset) -> tuple[Mapping[str, Any], AssetService]:
        try:
            check_url(asset.metadata_url, [scheme for scheme in self._limits.schemes if scheme in HTTP])
            if asset.metadata_url not in self._stores:
                self._stores[asset.metadata_url] = MetadataStore(
                    asset.metadata_url,
                    self._session(),
                    seconds=self._limits.seconds_silent,
                    attempts=self._limits.attempts,
                )
            store = self._stores[asset.metadata_url]
            known, ddo = await store.asset(asset.did), await store.ddo(asset.did)
        except ForbiddenUrl as refused:
            words = f"the metadata store's address is refused: {refused.reason}"
        except CatalogueUnavailable as fault:
            words = f"the metadata store: {fault.why}"
        except AssetUnusable as fault:
            words = f"the asset cannot be used: {fault}"
        except ValueError:
            words = "the metadata store's address is not valid"
        else:
            if known is None or ddo is None:
                raise Unreachable("the asset is not known to the metadata store")
            service = known.service(asset.service_id)
            if service is None:
                raise Unreachable("the asset has no service of this id")
            return ddo, service
        raise Unreachable(words)

    # The Provider.

    def _root(self, endpoint: str) -> str:
        try:
            url = check_url(endpoint, [scheme for scheme in self._limits.schemes if scheme in HTTP])
        except ForbiddenUrl as refused:
            reason = refused.reason
        else:
            return url.partition("?")[0].rstrip("/")
        raise Unreachable(f"the address of its provider is refused: {reason}")

    async def _described(self, provider: _Provider) -> Mapping[str, tuple[str, str]]:
        """Where its endpoints are, as it says itself; where it does not, where they are known to be."""
        response = await self._request("GET", provider.root, "/", {})
        if 300 <= response.status < 500 and response.status not in TRANSIENT_STATUS:
            response.release()
            return _ENDPOINTS
        await self._check(response, "to say what it is")
        body = await self._body(response)
        try:
            answer = from_json(body)
        except ValueError:
            return _ENDPOINTS
        told = answer.get("serviceEndpoints") if isinstance(answer, Mapping) else None
        return {**_ENDPOINTS, **_told_endpoints(told)}

    async def _listed(self, provider: _Provider, asset: RemoteAsset) -> list[int]:
        given = {"did": asset.did, "serviceId": asset.service_id, **_userdata(asset)}
        return _indexes(await self._json(provider, "fileinfo", given, "the list of its files"))

    async def _nonce(self, provider: _Provider) -> int:
        """The last one it has accepted of our address."""
        given = {"userAddress": self._key.address}
        answer = await tried(self._limits, partial(self._json, provider, "nonce", given, "to tell the nonce"))
        return _number(answer.get("nonce") if isinstance(answer, Mapping) else "")

    async def _download(self, file: AssetFile) -> aiohttp.ClientResponse:
        provider, asset = file.provider, file.asset
        async with provider.lock:
            if provider.nonce is None:
                provider.nonce = await self._nonce(provider)
            # By the clock, so that those who sign with the same key elsewhere are most likely below it when they have
            # asked before and above it when they ask afterwards. Microseconds stay below 2^53: exact in JavaScript.
            nonce = provider.nonce = max(provider.nonce + 1, time.time_ns() // 1_000)
            given = {
                "documentId": asset.did,
                "serviceId": asset.service_id,
                "fileIndex": file.index,
                "consumerAddress": self._key.address,
                "nonce": str(nonce),
                "signature": self._key.sign(f"{asset.did}{nonce}"),
                **({"transferTxId": asset.tx_id} if asset.tx_id else {}),
                **_userdata(asset),
            }
            response = await self._call(provider, "download", given)
            if response.status in (400, 401):
                # Providers do not agree on how to say that a nonce is too small, and the original says it as it says
                # that a signature is wrong. The nonce itself tells.
                response.release()
                provider.nonce = await self._nonce(provider)
                if provider.nonce >= nonce:
                    raise _Overtaken(_refusal("the download", response.status))
        await self._check(response, "the download")
        return response

    async def _json(self, provider: _Provider, name: str, given: Mapping[str, Any], what: str) -> Any:
        response = await self._call(provider, name, given)
        await self._check(response, what)
        body = await self._body(response)
        try:
            return from_json(body)
        except ValueError:
            pass
        raise Unreachable(f"{_PROVIDER} does not answer in JSON")

    async def _call(self, provider: _Provider, name: str, given: Mapping[str, Any]) -> aiohttp.ClientResponse:
        method, path = (provider.endpoints or _ENDPOINTS)[name]
        return await self._request(method, provider.root, path, given)

    async def _request(self, method: str, root: str, path: str, given: Mapping[str, Any]) -> aiohttp.ClientResponse:
        """*given* goes into the query of a GET and into the body of a POST. Redirects are answers."""
        url = URL(f"{root}{path}", encoded=True)
        query = {name: value if isinstance(value, str) else json.dumps(value) for name, value in given.items()}
        sent: dict[str, Any] = {"params": query} if method == "GET" else {"json": dict(given)}
        request = self._session().request(method, url, allow_redirects=False, **sent)
        return await in_words(request, self._limits, _PROVIDER)

    async def _check(self, response: aiohttp.ClientResponse, what: str) -> None:
        """Raises Unreachable, with the body given up, for every status but success."""
        status = response.status
        if 300 <= status < 500 and status not in TRANSIENT_STATUS:
            response.release()
            raise Unreachable(_refusal(what, status))
        await in_words(check_status(response), self._limits, _PROVIDER)

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        return await in_words(whole_body(_here(response), LARGEST_LIST), self._limits, _PROVIDER)

    @property
    def _key(self) -> ProviderKey:
        if self._signer is None:
            raise Unreachable(NO_SIGNER)
        return self._signer

    def _session(self) -> aiohttp.ClientSession:
        if self._opened is None:
            self._opened = guarded_session(self._limits, headers={"Accept-Encoding": "identity"})
            self._stack.push_async_callback(self._opened.close)
        return self._opened


class _Overtaken(Unreachable):
    """Refused, and the nonce was not greater than the last one accepted, which another one had signed."""


async def _here(response: aiohttp.ClientResponse) -> aiohttp.ClientResponse:
    return response


def _refusal(what: str, status: int) -> str:
    return f"{_PROVIDER} redirects elsewhere" if status < 400 else f"{_PROVIDER} refuses {what} ({status})"


def _userdata(asset: RemoteAsset) -> dict[str, Any]:
    return {"userdata": dict(asset.userdata)} if asset.userdata else {}


def _told_endpoints(told: Any) -> dict[str, tuple[str, str]]:
    """Those of ``{name: [METHOD, path]}`` that are asked for here and can be."""
    if not isinstance(told, Mapping):
        return {}
    found = {}
    for name in _ENDPOINTS:
        match told.get(name):
            case ["GET" | "POST" as method, str() as path] if _PATH.fullmatch(path):
                found[name] = (method, path)
    return found


def _indexes(answer: Any) -> list[int]:
    """Of ``[{index, valid, …}]``, each of them valid. One without an index has that of its place."""
    if (
        not isinstance(answer, list)
        or len(answer) > MOST_FILES
        or not all(isinstance(each, Mapping) for each in answer)
    ):
        raise Unreachable(f"{_PROVIDER} does not list its files as it should")
    if not answer:
        raise Unreachable(f"{_PROVIDER} lists no files")
    seen: dict[int, None] = {}
    for place, each in enumerate(answer):
        index = each.get("index", place)
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < MOST_FILES or index in seen:
            raise Unreachable(f"{_PROVIDER} does not list its files as it should")
        if each.get("valid") is not True:
            raise Unreachable(f"file {place + 1} of {len(answer)} cannot be read, its provider says")
        seen[index] = None
    return list(seen)


def _number(told: Any) -> int:
    """A nonce as Providers write it: a number or its digits, none for the first; a fraction is rounded up."""
    if told is None:
        return 0
    if isinstance(told, float) and math.isfinite(told):
        return max(0, math.ceil(told))
    written = _NONCE.fullmatch(str(told)) if isinstance(told, int | str) and not isinstance(told, bool) else None
    if written is None:
        raise Unreachable(f"{_PROVIDER} tells a nonce that is no number")
    return int(written[1]) + bool((written[2] or "").strip("0"))
