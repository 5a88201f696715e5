"""
Where assets are looked up: this house's own catalogue of files, and metadata stores of others.

A catalogue is asked again for every job, and what it answers is at most seconds old: an owner who takes back
trust in an algorithm must not find it running a minute later.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import re
import stat
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, Self
from urllib.parse import urlsplit

import aiohttp
import yaml
from cachetools import TTLCache
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import from_json
from tenacity import (
    AsyncRetrying,
    retry_if_exception_type,
    stop_after_attempt,
    stop_after_delay,
    wait_exponential_jitter,
)

from blocks.assets import (
    DID,
    Agreement,
    Asset,
    AssetMalformed,
    AssetUnusable,
    AssetWithheld,
    ComputeRules,
    LocalAsset,
    TrustedAlgorithm,
    faults_of,
    parse_asset,
    usable_asset,
)
from blocks.files import BadFile, parse_file
from blocks.guard import ForbiddenAddress
from blocks.limits import MIB
from blocks.urls import ForbiddenUrl

LARGEST: Final = MIB
"""Bytes of one document: a file of the local catalogue, an answer of a metadata store."""
MOST_FILES: Final = 10_000
"""Files of a local catalogue; more is a folder that was not meant."""
SECONDS_BETWEEN_LOOKS: Final = 1.0

_DID: Final = re.compile(DID)
_ENCRYPTED: Final = re.compile(r"(?:0x)?(?:[0-9a-fA-F]{2})+")
_SUFFIXES: Final = frozenset({".yaml", ".yml", ".json"})
_TRANSIENT: Final = frozenset({408, 425, 429})
_log: Final = logging.getLogger(__name__)


class CatalogueUnavailable(Exception):
    """A source of assets does not answer. Says which one, without what may be secret in its address; *why* does not."""

    def __init__(self, source: str, why: str) -> None:
        super().__init__(f"{source}: {why}")
        self.why = why


class Problem(NamedTuple):
    """Something in a local catalogue that is not offered, and why; quotes names of fields, never their values."""

    file: str
    """Relative to the catalogue."""
    sentence: str


class Catalogue(ABC):
    """Finds assets by DID. A DID that cannot be one is unknown."""

    @abstractmethod
    async def asset(self, did: str) -> Asset | None:
        """
        The asset, or None if it is unknown here.

        Raises:
            CatalogueUnavailable: Whether it is known cannot be said now.
            AssetMalformed: Known, and described in a way that cannot be used.
            AssetWithheld: Known, and withdrawn, in purgatory or encrypted as a whole.
        """

    @abstractmethod
    async def ddo(self, did: str) -> Mapping[str, Any] | None:
        """
        The asset's document for everybody to read: as it is, but for files in clear, which are left out.

        Raises:
            CatalogueUnavailable
            AssetMalformed
        """

    async def agreement(self, agreement_id: str) -> Agreement | None:
        """What was granted under *agreement_id*, if anything. Raises CatalogueUnavailable."""
        return None


class Catalogues(Catalogue):
    """
    Several in the order given; the first that knows an asset answers.

    One that cannot be reached, or holds the asset back, is not passed over: the next one's rules for the same
    asset may be others than those that hold.
    """

    def __init__(self, catalogues: Sequence[Catalogue]) -> None:
        self._catalogues = tuple(catalogues)

    async def asset(self, did: str) -> Asset | None:
        for catalogue in self._catalogues:
            if (found := await catalogue.asset(did)) is not None:
                return found
        return None

    async def ddo(self, did: str) -> Mapping[str, Any] | None:
        for catalogue in self._catalogues:
            if (found := await catalogue.ddo(did)) is not None:
                return found
        return None

    async def agreement(self, agreement_id: str) -> Agreement | None:
        for catalogue in self._catalogues:
            if (found := await catalogue.agreement(agreement_id)) is not None:
                return found
        return None


def _without_clear_files(ddo: Mapping[str, Any]) -> dict[str, Any]:
    services = ddo.get("services")
    if not isinstance(services, list):
        return dict(ddo)
    return {
        **ddo,
        "services": [
            {**service, "files": service["files"] if _is_encrypted(service["files"]) else ""}
            if isinstance(service, Mapping) and "files" in service
            else service
            for service in services
        ],
    }


def _is_encrypted(files: Any) -> bool:
    return isinstance(files, str) and _ENCRYPTED.fullmatch(files) is not None


# A metadata store.


class _Transient(CatalogueUnavailable):
    """May pass."""


class MetadataStore(Catalogue):
    """
    Assets as a metadata store has them: ``GET <url>/api/aquarius/assets/ddo/<did>``.

    *session* is the caller's: ``blocks.guard.guarded_session`` where a consumer has named the store, any other
    where the operator has. *seconds* are those of one try; after twice as many no further one is made.

    What was found is kept for *cache_seconds*, so that the parts of one job ask once. That is also how long an
    algorithm may still be trusted here after its trust was taken back there; 0 keeps nothing. That an asset is
    unknown is never kept.

    Raises:
        ValueError: *url* is not http or https, or has no host, or carries credentials.
    """

    def __init__(
        self,
        url: str,
        session: aiohttp.ClientSession,
        *,
        seconds: float = 10.0,
        attempts: int = 3,
        cache_seconds: float = 5.0,
        largest: int = LARGEST,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise ValueError("the address of a metadata store is http:// or https://, a host, and no credentials")
        self._url = url.rstrip("/")
        self._name = f"metadata store {parts.hostname}"
        self._session = session
        self._seconds = seconds
        self._attempts = attempts
        self._largest = largest
        self._known: TTLCache[str, Any] = TTLCache(maxsize=256, ttl=cache_seconds)

    async def asset(self, did: str) -> Asset | None:
        document = await self._document(did)
        return None if document is None else usable_asset(document)

    async def ddo(self, did: str) -> Mapping[str, Any] | None:
        document = await self._document(did)
        return _without_clear_files(document) if isinstance(document, Mapping) else None

    async def _document(self, did: str) -> Any:
        """A mapping with the right id, text (of an encrypted document), or None."""
        if not _DID.fullmatch(did):
            return None
        if (known := self._known.get(did)) is not None:
            return known
        asking = AsyncRetrying(
            retry=retry_if_exception_type(_Transient),
            stop=stop_after_attempt(self._attempts) | stop_after_delay(2 * self._seconds),
            wait=wait_exponential_jitter(multiplier=0.1, max=2),
            reraise=True,
        )
        document: Any = await asking(self._ask, did)
        if document is None:
            return None
        if not isinstance(document, str):
            if not isinstance(document, Mapping):
                raise AssetMalformed("the document is not an object")
            if document.get("id") != did:
                raise AssetMalformed("id: it is another than the one asked for")
        self._known[did] = document
        return document

    async def _ask(self, did: str) -> Any:
        try:
            # Redirects are not followed: whoever answers decides what is trusted, so it has to be who was named.
            async with self._session.get(
                f"{self._url}/api/aquarius/assets/ddo/{did}",
                allow_redirects=False,
                headers={"Accept": "application/json", "Accept-Encoding": "identity"},
                timeout=aiohttp.ClientTimeout(total=self._seconds),
            ) as answer:
                if answer.status == 404:
                    return None
                self._check_status(answer.status)
                body = await self._body(answer)
        except TimeoutError:
            raise _Transient(self._name, f"no answer within {self._seconds:g} s") from None
        except (aiohttp.ClientError, ForbiddenUrl) as fault:
            forbidden = isinstance(fault, ForbiddenUrl) or isinstance(
                getattr(fault, "os_error", None), ForbiddenAddress
            )
            kind = CatalogueUnavailable if forbidden else _Transient
            why = "its address is not allowed" if forbidden else "it cannot be reached"
            raise kind(self._name, why) from None
        try:
            # With a bound of its own on depth; json's is the recursion limit, which other packages raise until the
            # stack overflows.
            return from_json(body, allow_inf_nan=False)
        except ValueError:
            raise CatalogueUnavailable(self._name, "it answered something that is not JSON") from None

    def _check_status(self, status: int) -> None:
        if status == 200:
            return
        why = "it redirects elsewhere; name its final address" if 300 <= status < 400 else f"it answered {status}"
        kind = _Transient if status >= 500 or status in _TRANSIENT else CatalogueUnavailable
        raise kind(self._name, why)

    async def _body(self, answer: aiohttp.ClientResponse) -> bytes:
        body = bytearray()
        async for chunk in answer.content.iter_any():
            body += chunk
            if len(body) > self._largest:
                raise CatalogueUnavailable(self._name, "its answer is too long")
        return bytes(body)


# The local catalogue.


@dataclass(frozen=True)
class _Contents:
    """What one file says, or all of them together. *unusable*: DIDs that are known and not on offer, and why."""

    assets: Mapping[str, LocalAsset] = field(default_factory=dict)
    documents: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    agreements: Mapping[str, Agreement] = field(default_factory=dict)
    unusable: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def dids(self) -> frozenset[str]:
        return frozenset((*self.assets, *self.unusable))


_Signature = tuple[int, ...]


@dataclass(frozen=True)
class _State:
    files: Mapping[str, tuple[_Signature, _Contents]] = field(default_factory=dict)
    all: _Contents = field(default_factory=_Contents)
    problems: tuple[Problem, ...] = ()


class LocalCatalogue(Catalogue):
    """
    This house's own catalogue: one file, or a folder whose ``.yaml``, ``.yml`` and ``.json`` files are read, also
    those of its sub-folders; names that start with a dot are not. What may stand in a file: docs/catalogue.md.

    Changes on disk are taken up at the next question, at most a second later. Whatever is wrong is reported by
    ``problems`` and logged once, and nothing else suffers from it: a bad asset takes no other of its file along,
    a file that cannot be read no other file. An asset that is bad now is not offered as it was before: the
    change that went wrong may have been the one that forbids something. It is not unknown either but
    ``AssetMalformed``, so that no later catalogue answers for it. The same holds for a DID that stands twice.
    """

    def __init__(self, path: Path, *, seconds_between_looks: float = SECONDS_BETWEEN_LOOKS) -> None:
        self._path = path
        self._seconds = seconds_between_looks
        self._state = _State()
        self._look_after = 0.0
        self._looking = threading.Lock()

    async def asset(self, did: str) -> LocalAsset | None:
        contents = (await self._current()).all
        if did in contents.unusable:
            raise AssetMalformed(contents.unusable[did])
        asset = contents.assets.get(did)
        if asset is not None and asset.withheld:
            raise AssetWithheld(asset.withheld)
        return asset

    async def ddo(self, did: str) -> Mapping[str, Any] | None:
        contents = (await self._current()).all
        if did in contents.unusable:
            raise AssetMalformed(contents.unusable[did])
        return contents.documents.get(did)

    async def agreement(self, agreement_id: str) -> Agreement | None:
        return (await self._current()).all.agreements.get(agreement_id.lower())

    async def assets(self) -> tuple[LocalAsset, ...]:
        """All that are on offer, by name. Raises CatalogueUnavailable."""
        return tuple(sorted((await self._current()).all.assets.values(), key=lambda asset: asset.metadata.name))

    async def problems(self) -> tuple[Problem, ...]:
        """What is wrong now, by file. Raises CatalogueUnavailable."""
        return (await self._current()).problems

    async def _current(self) -> _State:
        if time.monotonic() < self._look_after:
            return self._state
        return await asyncio.to_thread(self._look)

    def _look(self) -> _State:
        with self._looking:
            if time.monotonic() < self._look_after:
                return self._state
            found, unreadable = self._files()
            files: dict[str, tuple[_Signature, _Contents]] = {}
            for name, (path, signature) in sorted(found.items()):
                before = self._state.files.get(name)
                files[name] = (
                    before
                    if before is not None and before[0] == signature
                    else (signature, _read(path, before[1] if before else _Contents()))
                )
            state = _together(files, unreadable)
            for problem in sorted(set(state.problems) - set(self._state.problems)):
                _log.warning("catalogue: %s: %s", *problem)
            self._state = state
            self._look_after = time.monotonic() + self._seconds
            return state

    def _files(self) -> tuple[dict[str, tuple[Path, _Signature]], list[Problem]]:
        """Every file by its name in the catalogue, with what tells that it was changed."""
        unreadable: list[Problem] = []
        found: dict[str, tuple[Path, _Signature]] = {}
        for path in self._paths(unreadable):
            name = path.name if path == self._path else path.relative_to(self._path).as_posix()
            try:
                seen = path.stat()
            except OSError as fault:
                unreadable.append(Problem(name, f"it cannot be read ({fault.strerror})"))
                continue
            if not stat.S_ISREG(seen.st_mode):
                unreadable.append(Problem(name, "it is not a file"))
                continue
            # With the time of the change and not of the content alone: that one is carried along by a copy.
            found[name] = (path, (seen.st_mtime_ns, seen.st_ctime_ns, seen.st_size, seen.st_ino, seen.st_dev))
            if len(found) > MOST_FILES:
                raise CatalogueUnavailable(f"catalogue {self._path}", f"it has more than {MOST_FILES} files")
        return found, unreadable

    def _paths(self, unreadable: list[Problem]) -> Iterator[Path]:
        if not self._path.is_dir():
            if not self._path.exists():
                raise CatalogueUnavailable(f"catalogue {self._path}", "there is no such file or folder")
            yield self._path
            return

        def cannot(fault: OSError) -> None:
            where = Path(fault.filename)
            if where == self._path:
                raise CatalogueUnavailable(f"catalogue {self._path}", f"it cannot be read ({fault.strerror})") from None
            unreadable.append(
                Problem(where.relative_to(self._path).as_posix(), f"it cannot be read ({fault.strerror})")
            )

        for folder, folders, names in os.walk(self._path, onerror=cannot):
            folders[:] = [each for each in folders if not each.startswith(".")]
            for name in names:
                if not name.startswith(".") and Path(name).suffix.lower() in _SUFFIXES:
                    yield Path(folder, name)


def _together(files: Mapping[str, tuple[_Signature, _Contents]], unreadable: Iterable[Problem]) -> _State:
    problems = [*unreadable]
    for name, (_, contents) in files.items():
        problems += [Problem(name, sentence) for sentence in contents.problems]
    dids = Counter(did for _, contents in files.values() for did in contents.dids)
    granted = Counter(agreement for _, contents in files.values() for agreement in contents.agreements)
    unusable: dict[str, str] = {}
    for name, (_, contents) in files.items():
        unusable |= contents.unusable
        for did in contents.dids:
            if dids[did] > 1:
                unusable[did] = "it stands in more than one file"
                problems.append(Problem(name, f"{did} stands in more than one file; it is not offered"))
        if any(granted[agreement] > 1 for agreement in contents.agreements):
            problems.append(Problem(name, "an agreement stands in more than one file; it is not granted"))
    every = [contents for _, contents in files.values()]
    merged = _Contents(
        assets={did: asset for each in every for did, asset in each.assets.items() if did not in unusable},
        documents={did: ddo for each in every for did, ddo in each.documents.items() if did not in unusable},
        agreements={id: agreement for each in every for id, agreement in each.agreements.items() if granted[id] == 1},
        unusable=unusable,
    )
    return _State(files, merged, tuple(sorted(problems)))


def _read(path: Path, before: _Contents) -> _Contents:
    """What stands in a file. What stood in it *before* is unusable where the file cannot be read any more."""
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise _Unreadable(f"it is longer than {LARGEST} bytes")
        document = _json(text) if path.suffix.lower() == ".json" else _yaml(text)
        assets, agreements = _parts(document)
    except (OSError, _Unreadable) as fault:
        why = f"it cannot be read ({fault.strerror})" if isinstance(fault, OSError) else str(fault)
        return _Contents(unusable=dict.fromkeys(before.dids, f"its file: {why}"), problems=(why,))
    return _contents(assets, agreements)


def _parts(document: Any) -> tuple[list[Any], Mapping[Any, Any]]:
    if document is None:
        return [], {}
    if isinstance(document, list):
        return document, {}
    if not isinstance(document, Mapping):
        raise _Unreadable("it holds neither an asset nor a list of assets")
    if not {"assets", "agreements"} & document.keys():
        return [document], {}
    if strange := document.keys() - {"assets", "agreements"}:
        raise _Unreadable(f"beside assets and agreements there may be nothing: {', '.join(sorted(map(str, strange)))}")
    assets, agreements = document.get("assets") or [], document.get("agreements") or {}
    if not isinstance(assets, list):
        raise _Unreadable("assets: it is not a list")
    if not isinstance(agreements, Mapping):
        raise _Unreadable("agreements: it is not a mapping of ids")
    return assets, agreements


def _contents(assets: Sequence[Any], agreements: Mapping[Any, Any]) -> _Contents:
    parsed: dict[str, LocalAsset] = {}
    documents: dict[str, Mapping[str, Any]] = {}
    unusable: dict[str, str] = {}
    problems: list[str] = []
    for n, written in enumerate(assets):
        where = f"assets.{n}: " if len(assets) > 1 else ""
        did = _did_of(written)
        try:
            if did is not None and (did in parsed or did in unusable):
                raise AssetMalformed(f"{did} stands in the file twice")
            ddo = _whole(written)
            asset = parse_asset(ddo, LocalAsset)
            _check(asset)
        except AssetUnusable as fault:
            problems.append(f"{where}{fault}")
            if did is not None:
                parsed.pop(did, None)
                documents.pop(did, None)
                unusable[did] = str(fault)
            continue
        parsed[asset.id] = asset
        documents[asset.id] = _without_clear_files(ddo)
    granted: dict[str, Agreement] = {}
    twice: set[str] = set()
    for n, (agreement_id, grant) in enumerate(agreements.items()):
        try:
            agreement = Agreement.model_validate({**grant, "id": agreement_id} if isinstance(grant, Mapping) else grant)
        except ValidationError as fault:
            problems.append(f"agreements.{n}: {'; '.join(faults_of(fault))}")
            continue
        if agreement.id in granted:
            problems.append(f"agreements.{n}: the same id stands in the file twice; it is not granted")
            twice.add(agreement.id)
        granted[agreement.id] = agreement
    for agreement_id in twice:
        del granted[agreement_id]
    return _Contents(parsed, documents, granted, unusable, tuple(problems))


def _check(asset: LocalAsset) -> None:
    if not _DID.fullmatch(asset.id):
        raise AssetMalformed("id: it is not did:op: with letters, digits, _ and -")
    if not asset.services:
        raise AssetMalformed("services: there is none")
    if len({service.id for service in asset.services}) < len(asset.services):
        raise AssetMalformed("services: two of them have the same id")
    for n, service in enumerate(asset.services):
        if isinstance(service.files, str) and service.files:
            if not _is_encrypted(service.files):
                raise AssetMalformed(f"services.{n}.files: text that is not the hex of encrypted files; give a list")
        elif not isinstance(service.files, list) or not service.files:
            raise AssetMalformed(f"services.{n}.files: a list of files, or the hex of encrypted ones, is needed")
        else:
            _check_files(service.files, n)


def _check_files(files: Sequence[Any], service: int) -> None:
    for n, file in enumerate(files):
        try:
            parse_file(file)
        except BadFile as fault:
            raise AssetMalformed(f"services.{service}.files.{n}: {fault}") from None


# How an owner writes an asset down.


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


_Address = Annotated[str, BeforeValidator(_lower), StringConstraints(pattern=r"^(0x[0-9a-f]{40}|\*)$")]
_Words = Annotated[tuple[str, ...], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


class _Written(BaseModel):
    """Strict where a DDO is lenient: a rule whose name is misspelt would otherwise be no rule at all."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class _WrittenTrusted(TrustedAlgorithm):
    model_config = ConfigDict(extra="forbid", populate_by_name=False)

    did: Annotated[str, StringConstraints(pattern=rf"{DID}|^\*$")]

    @model_validator(mode="before")
    @classmethod
    def _a_did_alone(cls, value: Any) -> Any:
        return {"did": value} if isinstance(value, str) else value


class _WrittenRules(ComputeRules):
    model_config = ConfigDict(extra="forbid", populate_by_name=False)

    trusted_algorithms: tuple[_WrittenTrusted, ...] = Field(default=(), alias="publisherTrustedAlgorithms")
    trusted_publishers: tuple[_Address, ...] = Field(default=(), alias="publisherTrustedAlgorithmPublishers")


class _WrittenUse(_Written):
    files: Any = Field(default=None, repr=False)
    compute: _WrittenRules | None = None
    timeout: Annotated[int, Field(ge=0)] = 0
    consumerParameters: tuple[dict[str, Any], ...] = ()

    @field_validator("files")
    @classmethod
    def _as_objects(cls, files: Any) -> Any:
        if _is_encrypted(files):
            return files
        if isinstance(files, str | Mapping):
            files = [files]
        if not isinstance(files, list):
            return files
        return [_file(file) for file in files]


def _file(file: Any) -> Any:
    if not isinstance(file, str):
        return file
    if not urlsplit(file).scheme:
        raise ValueError("a file is a URL with its scheme, such as https://, or an object with a type")
    return {"type": "url", "url": file, "method": "GET"}


class _WrittenService(_WrittenUse):
    id: Annotated[str, StringConstraints(pattern=r"^[0-9A-Za-z._-]{1,128}$")]
    type: Literal["access", "compute"]

    @model_validator(mode="after")
    def _rules_where_they_count(self) -> Self:
        if self.compute is not None and self.type != "compute":
            raise ValueError("compute: rules for algorithms belong to a service of type compute")
        return self

    def ddo(self) -> dict[str, Any]:
        rules = {"compute": self.compute.model_dump(by_alias=True, exclude_none=True)} if self.compute else {}
        return {
            "id": self.id,
            "type": self.type,
            "files": self.files,
            "datatokenAddress": "",
            "serviceEndpoint": "",
            "timeout": self.timeout,
            "consumerParameters": [*self.consumerParameters],
            **rules,
        }


class _WrittenContainer(_Written):
    entrypoint: Annotated[str, StringConstraints(min_length=1)]
    image: Annotated[str, StringConstraints(min_length=1)]
    tag: str = ""
    checksum: str = ""


class _WrittenAsset(_WrittenUse):
    """An asset in short; docs/catalogue.md."""

    id: Annotated[str, StringConstraints(pattern=DID)] = ""
    name: Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
    type: Literal["dataset", "algorithm"]
    description: str = ""
    author: str = ""
    license: str = ""
    tags: _Words = ()
    language: str = ""
    version: str = ""
    container: _WrittenContainer | None = None
    owner: _Address | None = None
    allow: Annotated[tuple[_Address, ...], Field(min_length=1)] | None = None
    deny: tuple[_Address, ...] = ()
    services: Annotated[tuple[_WrittenService, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _of_one_piece(self) -> Self:
        if self.type == "algorithm" and self.container is None:
            raise ValueError("container: an algorithm needs one")
        if self.type == "dataset" and self.container is not None:
            raise ValueError("container: a data set has none")
        if self.services is not None and self.model_fields_set & set(_WrittenUse.model_fields):
            raise ValueError("services: files, compute, timeout and consumerParameters stand in each of them")
        return self

    def ddo(self) -> dict[str, Any]:
        type: Literal["access", "compute"] = "compute" if self.type == "dataset" else "access"
        use = {name: getattr(self, name) for name in _WrittenUse.model_fields}
        services = self.services or (_WrittenService.model_construct(id=type, type=type, **use),)
        return {
            "@context": ["https://w3id.org/did/v1"],
            "id": self.id or derived_did(self.name),
            "version": "4.1.0",
            "nftAddress": "",
            "metadata": {
                "type": self.type,
                "name": self.name,
                "description": self.description,
                "author": self.author,
                "license": self.license,
                "tags": [*self.tags],
                **({"algorithm": self._algorithm()} if self.container else {}),
            },
            "services": [service.ddo() for service in services],
            "credentials": {
                "allow": [{"type": "address", "values": [*self.allow]}] if self.allow else [],
                "deny": [{"type": "address", "values": [*self.deny]}] if self.deny else [],
            },
            **({"nft": {"owner": self.owner, "state": 0}} if self.owner else {}),
        }

    def _algorithm(self) -> dict[str, Any]:
        assert self.container is not None  # noqa: S101 - for the type checker; asked by the caller
        return {
            "language": self.language,
            "version": self.version,
            "container": self.container.model_dump(),
            "consumerParameters": [*self.consumerParameters],
        }


def derived_did(name: str) -> str:
    """The DID of an asset that is written down without one: of its *name*, so a new name is a new asset."""
    return f"did:op:{hashlib.sha256(name.strip().encode()).hexdigest()}"


def _did_of(written: Any) -> str | None:
    if not isinstance(written, Mapping):
        return None
    if "id" in written or "metadata" in written:
        did = written.get("id")
        return did if isinstance(did, str) and _DID.fullmatch(did) else None
    name = written.get("name")
    return derived_did(name) if isinstance(name, str) and name.strip() else None


def _whole(written: Any) -> dict[str, Any]:
    """The DDO of an asset as it was written down. A full one, known by its ``metadata``, stays as it is."""
    if not isinstance(written, Mapping):
        raise AssetMalformed("it is not a mapping")
    if "metadata" in written:
        return dict(written)
    try:
        return _WrittenAsset.model_validate(written).ddo()
    except ValidationError as fault:
        faults = faults_of(fault)
    raise AssetMalformed("; ".join(faults))


# Files as JSON values.


class _Unreadable(Exception):
    """A file as a whole. Quotes nothing of it."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc] # 10 times faster where it is built
    """
    Safe YAML, with the values JSON has and nothing else.

    YAML 1.1 reads an address without quotes as a number, 12:30 as 750 and a date as a date. A key that stands
    twice is an error here: of two lists of who may use something, one would be lost without a word.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, "a key stands twice", key.start_mark)
                seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


_INT: Final = "tag:yaml.org,2002:int"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, "tag:yaml.org,2002:timestamp")]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(r"^[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))


def _yaml(text: bytes) -> Any:
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a safe loader, made stricter
        return json.loads(_bounded_json(value))
    except yaml.MarkedYAMLError as fault:
        # Not its own text, which quotes the line.
        where = f"line {fault.problem_mark.line + 1}: " if fault.problem_mark else ""
        raise _Unreadable(f"{where}it is not YAML ({fault.problem})") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        raise _Unreadable("it is not YAML, or holds values that JSON does not know") from None


def _bounded_json(value: Any) -> str:
    """As JSON, written out piece by piece: a few aliases of aliases are a document larger than the machine."""
    size, pieces = 0, []
    for piece in json.JSONEncoder(allow_nan=False).iterencode(value):
        size += len(piece)
        if size > 2 * LARGEST:
            raise _Unreadable("its aliases make it too long")
        pieces.append(piece)
    return "".join(pieces)


def _json(text: bytes) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except json.JSONDecodeError as fault:
        raise _Unreadable(f"line {fault.lineno}: it is not JSON ({fault.msg})") from None
    except (ValueError, RecursionError):
        raise _Unreadable("it is not JSON") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise _Unreadable("a key stands twice")
    return mapping


def _no_number(name: str) -> Any:
    raise _Unreadable(f"{name} is not a number in JSON")
