"""Catalogues: one contract for all of them, then what each has to stand."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest
import yaml

from blocks.assets import Asset, AssetMalformed, AssetWithheld, LocalAsset
from blocks.catalogue import (
    LARGEST,
    Catalogue,
    Catalogues,
    CatalogueUnavailable,
    LocalCatalogue,
    MetadataStore,
    Problem,
    derived_did,
)
from blocks.files import UrlFile
from blocks.guard import guarded_session
from blocks.keys import ProviderKey, create_keystore, files_of
from blocks.limits import FetchLimits
from tests.file_server import LOOPBACK, FileServer
from tests.test_assets import ddo

pytestmark = pytest.mark.anyio

DOCS: Final = Path(__file__).parent.parent / "docs" / "catalogue.md"
MARKER: Final = "hush-1679091c5a88"
CLEAR: Final = [{"type": "url", "url": f"https://example.org/{MARKER}", "method": "GET"}]
DID: Final = "did:op:b9a4b1c0a8a4e8dd6f4c7a5d5cfe5a1a7f7b6d1f9fd0b4a7a1a9f6ce7e8f0d01"
ADDRESS: Final = "0xC41808BBef371AD5CFc76466dDF9dEe228d2BdAA"
OTHER: Final = "0x0070997970C51812dc3A010C7d01b50e0d17dc79"


# What every catalogue does.


@dataclass
class Source:
    """A catalogue, and how documents get into it. *takes*: seconds until a change is taken up, at most."""

    catalogue: Catalogue
    publish: Callable[[dict[str, Any]], None]
    local: bool
    gone: Catalogue
    """The same over a source that is not there."""
    takes: float = 2.5


@contextlib.contextmanager
def folder(tmp_path: Path) -> Iterator[Source]:
    where = tmp_path / "assets"
    where.mkdir()

    def publish(document: dict[str, Any]) -> None:
        path = where / document["id"].rpartition(":")[2] / "asset.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(document))

    yield Source(LocalCatalogue(where), publish, True, LocalCatalogue(tmp_path / "nowhere"))


@contextlib.contextmanager
def one_file(tmp_path: Path) -> Iterator[Source]:
    path = tmp_path / "catalogue.yaml"
    path.write_text("")
    published: dict[str, Any] = {}

    def publish(document: dict[str, Any]) -> None:
        published[document["id"]] = document
        path.write_text(yaml.safe_dump({"assets": list(published.values())}))

    yield Source(LocalCatalogue(path), publish, True, LocalCatalogue(tmp_path / "nowhere.yaml"))


def store_at(url: str, session: aiohttp.ClientSession, **options: Any) -> MetadataStore:
    return MetadataStore(url, session, **{"seconds": 1.0, "attempts": 3, "cache_seconds": 0.2, **options})


def served(server: FileServer, body: Any, did: str = DID, **options: Any) -> str:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return server.add(text, name=f"api/aquarius/assets/ddo/{did}", **options)


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
def stores(file_server: FileServer, session: aiohttp.ClientSession) -> Source:
    gone = store_at("http://127.0.0.1:9", session, attempts=1)
    return Source(
        store_at(file_server.url + "/", session),
        lambda document: (served(file_server, document, document["id"]), None)[1],
        False,
        gone,
    )


@pytest.fixture(params=["folder", "one file", "metadata store", "several"])
def source(request: pytest.FixtureRequest, tmp_path: Path, stores: Source) -> Iterator[Source]:
    empty = tmp_path / "empty"
    empty.mkdir()
    match request.param:
        case "folder":
            with folder(tmp_path) as source:
                yield source
        case "one file":
            with one_file(tmp_path) as source:
                yield source
        case "metadata store":
            yield stores
        case _:
            catalogue = Catalogues([LocalCatalogue(empty), stores.catalogue])
            yield Source(catalogue, stores.publish, False, Catalogues([LocalCatalogue(empty), stores.gone]))


async def until(holds: Callable[[], Awaitable[bool]], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not await holds():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.05)
    return True


async def test_what_is_published_is_found(source: Source) -> None:
    """As values, and as a document; whether it is this house's own is told by its type."""
    source.publish(ddo())
    asset = await source.catalogue.asset(DID)
    assert asset is not None
    assert (DID, "dataset", ["access", "compute"]) == (asset.id, asset.metadata.type, [s.type for s in asset.services])
    assert source.local is isinstance(asset, LocalAsset)
    assert ddo() == await source.catalogue.ddo(DID)


@pytest.mark.parametrize(
    "did",
    [
        "did:op:01",
        "",
        "x",
        "did:op:",
        "did:op:../../x",
        "did:op:a/b",
        "did:op:a?b",
        "did:ope:01",
        DID + "\n",
        "did:op:" + "a" * 200,
    ],
)
async def test_what_is_not_known(source: Source, did: str) -> None:
    """No asset, no document, no error; nor for what cannot be a DID."""
    assert await source.catalogue.asset(did) is None
    assert await source.catalogue.ddo(did) is None
    assert await source.catalogue.agreement(did) is None


async def test_a_malformed_document(source: Source) -> None:
    """Is known and cannot be used; what stands in it is not repeated."""
    source.publish({**ddo(), "services": MARKER})
    with pytest.raises(AssetMalformed, match="services") as fault:
        await source.catalogue.asset(DID)
    assert MARKER not in str(fault.value)


@pytest.mark.parametrize("change", [{"nft": {"state": 3}}, {"purgatory": {"state": True}}])
async def test_an_asset_that_is_held_back(source: Source, change: dict[str, Any]) -> None:
    """By its publisher or by the store; its document may still be read."""
    source.publish({**ddo(), **change})
    with pytest.raises(AssetWithheld):
        await source.catalogue.asset(DID)
    assert {**ddo(), **change} == await source.catalogue.ddo(DID)


async def test_files_in_clear_are_not_handed_out(source: Source) -> None:
    """The document for everybody has encrypted files as they are and no others; the own catalogue's are used."""
    document = ddo()
    document["services"][0]["files"] = CLEAR
    source.publish(document)
    shown = await source.catalogue.ddo(DID)
    assert shown is not None and ["", "0x04aa17e2"] == [service["files"] for service in shown["services"]]
    asset = await source.catalogue.asset(DID)
    assert asset is not None
    if source.local:
        assert (UrlFile.model_validate(CLEAR[0]),) == files_of(asset, asset.services[0], None)


async def test_a_change_is_taken_up(source: Source) -> None:
    """Within seconds, while it goes on being asked."""

    async def trusts(count: int) -> bool:
        asset = await source.catalogue.asset(DID)
        return asset is not None and count == len(asset.services[1].compute.trusted_algorithms)

    document = ddo()
    source.publish(document)
    assert await trusts(1)
    document["services"][1]["compute"]["publisherTrustedAlgorithms"] = []
    source.publish(document)
    assert await until(lambda: trusts(0), source.takes)


async def test_a_source_that_is_not_there(source: Source) -> None:
    """Is not taken for one that knows nothing."""
    for asked in (source.gone.asset(DID), source.gone.ddo(DID)):
        with pytest.raises(CatalogueUnavailable):
            await asked


async def test_many_ask_at_once(source: Source) -> None:
    source.publish(ddo())
    found = await asyncio.gather(*(source.catalogue.asset(DID) for _ in range(50)))
    assert {DID} == {asset.id for asset in found if asset is not None}


# Several.


async def test_the_first_that_knows_it_answers(tmp_path: Path, stores: Source) -> None:
    """An asset of the own catalogue is not overridden by a store; a store is asked for the others."""
    stores.publish(ddo())
    with folder(tmp_path) as own:
        both = Catalogues([own.catalogue, stores.catalogue])
        assert Asset is type(await both.asset(DID))
        own.publish({**ddo(), "metadata": {"type": "dataset", "name": "mine"}})

        async def mine() -> bool:
            asset = await both.asset(DID)
            return asset is not None and "mine" == asset.metadata.name

        assert await until(mine, own.takes)


async def test_who_holds_an_asset_back_is_not_passed_over(tmp_path: Path, stores: Source) -> None:
    """Broken here, or not to be asked now: another's rules for the same asset are not those that hold."""
    stores.publish(ddo())
    with folder(tmp_path) as own:
        own.publish({**ddo(), "services": []})
        with pytest.raises(AssetMalformed):
            await Catalogues([own.catalogue, stores.catalogue]).asset(DID)
        with pytest.raises(CatalogueUnavailable):
            await Catalogues([own.gone, stores.catalogue]).asset(DID)


async def test_an_agreement_of_any_of_them(tmp_path: Path, stores: Source) -> None:
    (tmp_path / "a.yaml").write_text("agreements: {0xAB: {did: did:op:01}}")
    both = Catalogues([stores.catalogue, LocalCatalogue(tmp_path)])
    agreement = await both.agreement("0xaB")
    assert agreement is not None and "did:op:01" == agreement.did


# A metadata store.


@pytest.mark.parametrize(
    ("options", "says", "tries"),
    [
        ({"status": 500}, "answered 500", 3),
        ({"status": 503}, "answered 503", 3),
        ({"status": 429}, "answered 429", 3),
        ({"status": 400}, "answered 400", 1),
        ({"status": 403}, "answered 403", 1),
        ({"redirect_to": "http://127.0.0.1:9/"}, "redirects", 1),
        ({"size": 2 * LARGEST}, "too long", 1),
        ({"drop_after": 5}, "cannot be reached", 3),
        ({"hang": True}, "no answer within 0.3 s", 2),
    ],
)
async def test_faults_of_a_store(
    file_server: FileServer, session: aiohttp.ClientSession, options: dict[str, Any], says: str, tries: int
) -> None:
    """Tried again where it may pass, at most so often; the fault names the host."""
    url = served(file_server, ddo(), **options)
    store = store_at(file_server.url, session, **({"seconds": 0.3} if "hang" in options else {}))
    with pytest.raises(CatalogueUnavailable, match=f"127.0.0.1: .*{says}"):
        await store.asset(DID)
    assert tries == file_server.requests[url]


async def test_a_fault_that_passes(file_server: FileServer, session: aiohttp.ClientSession) -> None:
    url = served(file_server, ddo(), fail_times=2)
    assert await store_at(file_server.url, session).asset(DID) is not None
    assert 3 == file_server.requests[url]


@pytest.mark.parametrize("body", [b"<html>", b"", b"\xff", b"[" * 100_000])
async def test_what_is_not_json(file_server: FileServer, session: aiohttp.ClientSession, body: bytes) -> None:
    """A page of some proxy tells nothing of the asset."""
    served(file_server, body)
    with pytest.raises(CatalogueUnavailable, match="not JSON"):
        await store_at(file_server.url, session).asset(DID)


@pytest.mark.parametrize("body", [{**ddo(), "id": "did:op:01"}, {}, [], [ddo()], None, 1])
async def test_another_document(file_server: FileServer, session: aiohttp.ClientSession, body: Any) -> None:
    """Than the one asked for is refused, whatever is in it; null is no document."""
    served(file_server, body)
    store = store_at(file_server.url, session)
    if body is None:
        assert await store.asset(DID) is None
        return
    for asked in (store.asset(DID), store.ddo(DID)):
        with pytest.raises(AssetMalformed):
            await asked


async def test_an_encrypted_document(file_server: FileServer, session: aiohttp.ClientSession) -> None:
    served(file_server, "0x04fe0c61")
    store = store_at(file_server.url, session)
    with pytest.raises(AssetWithheld, match="encrypted"):
        await store.asset(DID)
    assert await store.ddo(DID) is None


async def test_files_as_text_in_clear(file_server: FileServer, session: aiohttp.ClientSession) -> None:
    """Only the hex of encrypted files is shown."""
    document = ddo()
    document["services"][0]["files"] = f"https://example.org/{MARKER}"
    served(file_server, document)
    assert MARKER not in json.dumps(await store_at(file_server.url, session).ddo(DID))


async def test_what_was_found_is_kept_for_a_moment(file_server: FileServer, session: aiohttp.ClientSession) -> None:
    """Asset and document are asked for once; what is unknown is asked for each time; 0 keeps nothing."""
    url = served(file_server, ddo())
    keeps, keeps_not = (
        store_at(file_server.url, session, cache_seconds=60),
        store_at(file_server.url, session, cache_seconds=0),
    )
    for _ in range(3):
        assert await keeps.asset(DID) is not None and await keeps.ddo(DID) is not None
        assert await keeps.asset("did:op:01") is None
    assert 1 == file_server.requests[url]
    assert 3 == file_server.requests[url.replace(DID, "did:op:01")]
    await keeps_not.asset(DID)
    await keeps_not.asset(DID)
    assert 3 == file_server.requests[url]


async def test_a_did_that_cannot_be_one_is_not_asked_for(
    file_server: FileServer, session: aiohttp.ClientSession
) -> None:
    store = store_at(file_server.url, session)
    for did in ("did:op:../../../admin", "did:op:a%2fb", "did:op:a#b", "", "did:op:é"):
        assert await store.asset(did) is None
    assert not file_server.requests


async def test_a_store_inside_the_house(file_server: FileServer) -> None:
    """Where a consumer has named the store, the guard of the session holds, and is not asked three times."""
    served(file_server, ddo())
    async with guarded_session(FetchLimits()) as session:
        with pytest.raises(CatalogueUnavailable, match="not allowed"):
            await store_at(file_server.url, session).asset(DID)
    assert not file_server.requests
    async with guarded_session(LOOPBACK) as session:
        assert await store_at(file_server.url, session).asset(DID) is not None


@pytest.mark.parametrize(
    "url", ["", "example.org", "file:///etc", "ftp://example.org", "https://", "https://a:hush@example.org"]
)
async def test_addresses_of_stores(session: aiohttp.ClientSession, url: str) -> None:
    with pytest.raises(ValueError, match="metadata store") as fault:
        MetadataStore(url, session)
    assert "hush" not in str(fault.value)


# The local catalogue.


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


async def problems_of(path: Path) -> tuple[Problem, ...]:
    return await LocalCatalogue(path).problems()


async def only(path: Path) -> LocalAsset:
    """The only asset of a catalogue in which nothing is wrong."""
    catalogue = LocalCatalogue(path)
    assert () == await catalogue.problems()
    (asset,) = await catalogue.assets()
    return asset


SHORT: Final = "name: Rivers\ntype: dataset\nfiles: [https://example.org/a.csv]\n"


async def test_the_shortest_data_set(tmp_path: Path) -> None:
    """One service, for computing; open to every consumer; no raw code, no network."""
    asset = await only(write(tmp_path / "a.yaml", SHORT))
    (service,) = asset.services
    assert (derived_did("Rivers"), None, "", None) == (asset.id, asset.chain_id, asset.nft_address, asset.publisher)
    assert ("compute", "compute", 0, "") == (service.id, service.type, service.timeout, service.datatoken)
    assert (False, False) == (service.compute.allow_raw_algorithm, service.compute.allow_network_access)
    assert () == asset.credentials.allow and () == asset.credentials.deny
    assert (UrlFile(url="https://example.org/a.csv"),) == files_of(asset, service, None)


def test_a_derived_did() -> None:
    """Written down, because others refer to it: it must never change."""
    assert "did:op:2e996c751ec86a5c7eaa81b2b8a4ad893e6b630962d3494708c430b673bb29e6" == derived_did("Rivers")
    assert derived_did("Rivers") == derived_did(" Rivers ") != derived_did("rivers")


async def test_an_algorithm_in_short(tmp_path: Path) -> None:
    asset = await only(
        write(
            tmp_path / "a.yaml",
            f"name: Flood\ntype: algorithm\nid: did:op:flood\nowner: {ADDRESS}\nfiles: https://example.org/a.py\n"
            "container: {entrypoint: python3 $ALGO, image: python, checksum: sha256:00}\n",
        )
    )
    algorithm = asset.metadata.algorithm
    assert algorithm is not None and ("python3 $ALGO", "sha256:00") == (
        algorithm.container.entrypoint,
        algorithm.container.checksum,
    )
    assert (["access"], ADDRESS.lower()) == ([service.type for service in asset.services], asset.publisher)


async def test_addresses_without_quotes(tmp_path: Path) -> None:
    """YAML reads them as numbers and loses their zeros; here they stay what they are. So do dates and ids."""
    asset = await only(
        write(
            tmp_path / "a.yaml",
            f"{SHORT}license: 2024-01-01\nversion: 12:30\nallow: [{OTHER}]\ndeny:\n- {ADDRESS}\n"
            f"compute: {{publisherTrustedAlgorithmPublishers: [{OTHER}], "
            "publisherTrustedAlgorithms: [did:op:01, '*']}\n",
        )
    )
    assert (OTHER.lower(),) == asset.credentials.allow[0].values
    assert (ADDRESS.lower(),) == asset.credentials.deny[0].values
    rules = asset.services[0].compute
    assert (OTHER.lower(),) == rules.trusted_publishers
    assert ["did:op:01", "*"] == [algorithm.did for algorithm in rules.trusted_algorithms]


@pytest.mark.parametrize(
    ("more", "names"),
    [
        (f"alow: [{ADDRESS}]", "alow"),
        ("allow: []", "allow"),
        ("allow: ['0x12']", "allow.0"),
        (f"allow: {ADDRESS}", "allow"),
        ("compute: {allow_raw_algorithm: true}", "compute.allow_raw_algorithm"),
        ("compute: {publisherTrustedAlgorithms: [{did: did:op:01, filesCheckum: ab}]}", "filesCheckum"),
        ("compute: {publisherTrustedAlgorithms: [{filesChecksum: ab}]}", "publisherTrustedAlgorithms.0.did"),
        ("compute: {publisherTrustedAlgorithmPublishers: [me]}", "publisherTrustedAlgorithmPublishers.0"),
        ("container: {entrypoint: a, image: b}", "container"),
        ("services: [{id: a, type: access, files: [https://a.b/c]}]", "services"),
        ("timeout: -1", "timeout"),
        ("id: did:op:a/b", "id"),
        ("name: another", "line 4"),
        (f"files: {MARKER}", "line 4"),
    ],
)
async def test_mistakes_of_an_owner(tmp_path: Path, more: str, names: str) -> None:
    """Each is said, with file and field; the asset is not offered with half of its rules."""
    catalogue = LocalCatalogue(write(tmp_path / "mine.yaml", f"{SHORT}{more}\n"))
    (problem,) = await catalogue.problems()
    assert "mine.yaml" == problem.file and names in problem.sentence
    assert MARKER not in problem.sentence and "0x12" not in problem.sentence
    assert () == await catalogue.assets()


@pytest.mark.parametrize(
    "files",
    [MARKER, f"[{MARKER}]", "[]", "null", "{}", f"[{{type: {MARKER}}}]", f"[{{type: url, {MARKER}: 1}}]", "5", "[5]"],
)
async def test_files_that_are_none(tmp_path: Path, files: str) -> None:
    """Said when the catalogue is read, and not when the first job fails; in a full document as in a short one."""
    short = f"name: a\ntype: dataset\nfiles: {files}\n"
    full = json.dumps({**ddo(), "services": [{"id": "a", "type": "compute", "files": yaml.safe_load(files)}]})
    for name, text in (("short.yaml", short), ("full.json", full)):
        (problem,) = await problems_of(write(tmp_path / name, text))
        assert "files" in problem.sentence and MARKER not in problem.sentence


async def test_a_service_with_rules_that_would_not_count(tmp_path: Path) -> None:
    service = "{id: a, type: access, files: [https://a.b/c], compute: {allowRawAlgorithm: true}}"
    (problem,) = await problems_of(write(tmp_path / "a.yaml", f"name: a\ntype: dataset\nservices: [{service}]\n"))
    assert "services.0: compute" in problem.sentence


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.yaml", "a: [", "line "),
        ("a.yaml", "a: !!python/object/apply:os.getcwd []", "line 1"),
        ("a.yaml", "&a [*a]", "JSON"),
        ("a.yaml", "? [a]\n: b", "line 1"),
        ("a.yaml", "a: .nan", "JSON"),
        ("a.yaml", "--- 1\n--- 2", "line 2"),
        ("a.yaml", "\0", "YAML"),
        ("a.yaml", "just words", "neither"),
        ("a.yaml", "assets: {}\nother: 1", "other"),
        ("a.yaml", "assets: {a: 1}", "not a list"),
        ("a.yaml", "agreements: [1]", "not a mapping"),
        ("a.yaml", "x" * (LARGEST + 1), "longer"),
        ("a.yaml", "a: &a [" + "x," * 50 + "]\n" + "".join(
            f"{name}: &{name} [{','.join([f'*{before}'] * 20)}]\n" for before, name in ("ab", "bc", "cd", "de", "ef")
        ), "aliases"),
        ("a.json", "{", "line 1"),
        ("a.json", '{"a": 1, "a": 2}', "twice"),
        ("a.json", '{"a": NaN}', "NaN"),
        ("a.json", "[" * 100_000, "JSON"),
        ("a.json", "[1]", "not a mapping"),
    ],
)  # fmt: skip
async def test_a_file_that_cannot_be_read(tmp_path: Path, name: str, text: str, says: str) -> None:
    """Is reported, quoting nothing of it, and takes no other file along."""
    write(tmp_path / name, text)
    write(tmp_path / "good.yaml", SHORT)
    catalogue = LocalCatalogue(tmp_path)
    (problem,) = await catalogue.problems()
    assert name == problem.file and says in problem.sentence
    assert MARKER not in problem.sentence
    assert await catalogue.asset(derived_did("Rivers")) is not None


async def test_a_bad_asset_among_others(tmp_path: Path) -> None:
    """Takes none of its file along; it is known and not to be used, also after a restart."""
    write(
        tmp_path / "a.yaml",
        "assets:\n- {name: one, type: dataset, files: [https://a.b/c]}\n"
        "- {name: two, type: dataset, files: [https://a.b/c], alow: []}\n- {name: three, type: dataset, files: [https://a.b/c]}\n",
    )
    catalogue = LocalCatalogue(tmp_path)
    assert ["one", "three"] == [asset.metadata.name for asset in await catalogue.assets()]
    assert (Problem("a.yaml", "assets.1: alow: Extra inputs are not permitted"),) == await catalogue.problems()
    for asked in (catalogue.asset(derived_did("two")), catalogue.ddo(derived_did("two"))):
        with pytest.raises(AssetMalformed, match="alow"):
            await asked


async def test_a_file_that_breaks_and_is_mended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What was good before is not served on: it may be what the change forbids. It is logged once."""
    path = write(tmp_path / "a.yaml", SHORT)
    catalogue, did = LocalCatalogue(tmp_path), derived_did("Rivers")
    assert await catalogue.asset(did) is not None
    write(path, f"{SHORT}deny: [")

    async def broken() -> bool:
        try:
            return await catalogue.asset(did) is None
        except AssetMalformed:
            return True

    with caplog.at_level(logging.WARNING, "blocks.catalogue"):
        assert await until(broken, 2.5)
        with pytest.raises(AssetMalformed, match="its file: line"):
            await catalogue.asset(did)
        write(tmp_path / "b.yaml", SHORT.replace("Rivers", "Lakes"))
        assert await until(lambda: _offers(catalogue, "Lakes"), 2.5)
    assert 1 == len(caplog.records) and "a.yaml" in caplog.text
    write(path, SHORT)
    assert await until(lambda: _offers(catalogue, "Rivers", "Lakes"), 2.5)
    assert () == await catalogue.problems()
    path.unlink()
    assert await until(lambda: _offers(catalogue, "Lakes"), 2.5)
    assert await catalogue.asset(did) is None


async def _offers(catalogue: LocalCatalogue, *names: str) -> bool:
    return set(names) == {asset.metadata.name for asset in await catalogue.assets()}


async def test_an_asset_that_stands_twice(tmp_path: Path) -> None:
    """Is offered by neither, in one file or in two: nobody could tell whose rules hold."""
    write(tmp_path / "a.yaml", SHORT)
    write(tmp_path / "b.yaml", SHORT + "compute: {allowRawAlgorithm: true}\n")
    twice = "- {name: one, type: dataset, files: [https://a.b/c]}\n"
    write(tmp_path / "c.yaml", twice * 3)
    catalogue = LocalCatalogue(tmp_path)
    assert () == await catalogue.assets()
    for name in ("Rivers", "one"):
        with pytest.raises(AssetMalformed, match=r"twice|more than one"):
            await catalogue.asset(derived_did(name))
    assert ["a.yaml", "b.yaml", "c.yaml", "c.yaml"] == [problem.file for problem in await catalogue.problems()]


async def test_which_files_are_read(tmp_path: Path) -> None:
    """Those of three endings in all folders, also behind links; not hidden ones, and nothing that is no file."""
    outside = write(tmp_path / "elsewhere" / "linked", SHORT.replace("Rivers", "linked"))
    root = tmp_path / "catalogue"
    for name in ("a.yaml", "b/c.yml", "b/d.JSON", ".git/e.yaml", ".f.yaml", "g.yaml~", "readme.md"):
        text = SHORT.replace("Rivers", name)
        write(root / name, json.dumps(yaml.safe_load(text)) if name.endswith("JSON") else text)
    (root / "h.yaml").symlink_to(outside)
    (root / "gone.yaml").symlink_to(tmp_path / "nothing")
    (root / "folder.yaml").mkdir()
    os.mkfifo(root / "pipe.yaml")
    catalogue = LocalCatalogue(root)
    assert {"a.yaml", "b/c.yml", "b/d.JSON", "linked"} == {asset.metadata.name for asset in await catalogue.assets()}
    assert ["gone.yaml", "pipe.yaml"] == [problem.file for problem in await catalogue.problems()]


async def test_a_change_that_looks_like_none(tmp_path: Path) -> None:
    """Same length and same time of writing, as a copy with its times has them: it is seen all the same."""
    path = write(tmp_path / "a.yaml", SHORT)
    catalogue = LocalCatalogue(path)
    assert await _offers(catalogue, "Rivers")
    before = path.stat()
    write(path, SHORT.replace("Rivers", "Rovers"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert await until(lambda: _offers(catalogue, "Rovers"), 2.5)


async def test_agreements(tmp_path: Path) -> None:
    """By id, in whatever case, numbers too; what is wrong with one is said by its place, since ids are secret."""
    write(
        tmp_path / "a.yaml",
        "agreements:\n"
        "  111: {did: did:op:01}\n"
        f"  0x0aB: {{did: did:op:02, serviceId: s, consumer: {OTHER}, algorithm: did:op:03}}\n"
        f"  {MARKER}: {{did: did:op:01, consumr: {ADDRESS}}}\n"
        f"  {MARKER}2: null\n"
        "  sAme: {did: did:op:01}\n"
        "  same: {did: did:op:02}\n",
    )
    write(tmp_path / "b.yaml", "agreements: {222: {did: did:op:01}}")
    write(tmp_path / "c.yaml", "agreements: {222: {did: did:op:02}}")
    catalogue = LocalCatalogue(tmp_path)
    first, second = await catalogue.agreement("111"), await catalogue.agreement("0x0Ab")
    assert first is not None and second is not None
    assert ("did:op:01", None, None, None) == (first.did, first.service_id, first.consumer, first.algorithm)
    assert ("did:op:02", "s", OTHER.lower(), "did:op:03") == (
        second.did,
        second.service_id,
        second.consumer,
        second.algorithm,
    )
    for unknown in (MARKER, f"{MARKER}2", "same", "222", "", "333"):
        assert await catalogue.agreement(unknown) is None
    problems = await catalogue.problems()
    assert ["a.yaml", "a.yaml", "a.yaml", "b.yaml", "c.yaml"] == [problem.file for problem in problems]
    assert MARKER not in str(problems)


async def test_reading_does_not_hold_the_event_loop(tmp_path: Path) -> None:
    """A large catalogue is read in a thread: others go on meanwhile."""
    for n in range(20):
        assets = [{"name": f"{n}-{m}", "type": "dataset", "files": ["https://a.b/c"]} for m in range(50)]
        write(tmp_path / f"{n}.yaml", yaml.safe_dump(assets))
    longest, last = 0.0, time.monotonic()
    reading = asyncio.ensure_future(LocalCatalogue(tmp_path).assets())
    while not reading.done():
        await asyncio.sleep(0.005)
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
    assert 1000 == len(await reading)
    assert longest < 0.5


# The documentation.


def blocks_of(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCS.read_text("utf-8"), re.S | re.M)


async def test_examples_are_taken_as_printed(tmp_path: Path) -> None:
    """Each example of the documentation alone in a folder, under the name it gives itself."""
    seen: dict[str, Any] = {}
    for text in blocks_of("yaml"):
        match = re.match(r"# (\S+\.yaml)\n", text)
        assert match is not None
        catalogue = LocalCatalogue(write(tmp_path / match[1] / match[1], text).parent)
        assert () == await catalogue.problems()
        seen[match[1]] = [asset.metadata.name for asset in await catalogue.assets()]
        if match[1] == "agreements.yaml":
            granted = await catalogue.agreement("0x2c8f7d7a3f1e4b0d9a6c5e4f3b2a19087f6e5d4c3b2a1908f7e6d5c4b3a29180")
            assert granted is not None and "did:op:sst" == granted.did
    assert {
        "rivers.yaml": ["Daily discharge of twelve rivers"],
        "catalogue.yaml": ["Daily discharge of twelve rivers", "Sea surface temperatures"],
        "patients.yaml": ["Length of stay, by ward"],
        "flood.yaml": ["Flood frequency"],
        "agreements.yaml": [],
    } == seen


async def test_encrypting_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program of the documentation prints what the catalogue takes and the provider opens."""
    create_keystore(tmp_path / "keystore.json", MARKER, random_password=True)
    write(tmp_path / "password", f"{MARKER}\n")
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    (program,) = blocks_of("python")
    with contextlib.redirect_stdout(printed):
        exec(program, {})
    asset = await only(write(tmp_path / "a.yaml", f'name: a\ntype: dataset\nfiles: "{printed.getvalue().strip()}"\n'))
    key = ProviderKey.from_keystore(tmp_path / "keystore.json", MARKER)
    assert (UrlFile(url="https://data.example.org/stays.csv"),) == files_of(asset, asset.services[0], key)
