"""Assets at other providers: a real metadata store, a real provider (ours), and servers that only pretend to be one."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from threading import Event
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import pytest
from aiohttp import web
from eth_account import Account
from eth_account.messages import encode_defunct
from eth_utils.crypto import keccak
from pydantic import SecretStr

from blocks.assets import RemoteAsset
from blocks.environment import ComputeEnvironment
from blocks.keys import ProviderKey
from blocks.limits import FetchLimits, Offer
from blocks.remote import Access
from flows.build import Site, provision_algorithm
from flows.plan import PlannedStage
from tasks.provision import (
    AlgorithmUnreachable,
    FetchedFile,
    InputSource,
    InputUnreachable,
    fetch_algorithm,
    fetch_inputs,
)
from tests.documents import OWNER, planned, stage
from tests.file_server import LOOPBACK, FileServer, Received
from tests.other_provider import SERVICE, OtherProvider, ddo, publish

SECRET: Final = "hush-70c1db56f301"
SIGNER: Final = ProviderKey.from_secret("0a" * 32)
STRANGER: Final = ProviderKey.from_secret("0b" * 32)
ONCE: Final = LOOPBACK.model_copy(update={"attempts": 1})

MANY: Final = 12
CODE: Final = b"print('hello')\n"


@pytest.fixture(scope="module")
def server() -> Iterator[FileServer]:
    with FileServer() as server:
        yield server


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, server: FileServer) -> Iterator[OtherProvider]:
    """With everything the tests here ask for, so that none of them has to wait for its catalogue to look again."""
    other = OtherProvider(tmp_path_factory.mktemp("other"), server)
    other.offer("did:op:data", b"first", b"second", allow=[SIGNER.address])
    other.offer("did:op:more", b"third")
    other.offer("did:op:many", *(f"{n}".encode() for n in range(MANY)))
    other.offer("did:op:code", CODE, type="algorithm")
    here = server.add(b"here", name=f"{SECRET}-here")
    gone = f"{server.url}/{SECRET}-gone"
    other.write(ddo("did:op:gone", other.url, [here, gone]))
    asked = server.add(b"x", name=SECRET)
    other.write(ddo("did:op:asked", other.url, [asked]))
    with other:
        yield other


def asset(store: OtherProvider | FileServer, did: str = "did:op:data", **more: Any) -> RemoteAsset:
    url = store.metadata_url if isinstance(store, OtherProvider) else store.url
    return RemoteAsset(**{"did": did, "service_id": SERVICE, "metadata_url": url, **more})


def fetched(
    into: Path, *assets: RemoteAsset, limits: FetchLimits = LOOPBACK, signer: ProviderKey | None = SIGNER, **more: Any
) -> tuple[FetchedFile, ...]:
    sources = [InputSource(each.did, n, remote=each) for n, each in enumerate(assets)]
    return fetch_inputs(sources, into, limits, access=Access(signer=signer), **more)


def refused(
    into: Path, *assets: RemoteAsset, limits: FetchLimits = ONCE, signer: ProviderKey | None = SIGNER, **more: Any
) -> str:
    """The message of the failure, and the assertion that it and its traceback tell nothing of where anything is."""
    try:
        fetched(into, *assets, limits=limits, signer=signer, **more)
    except InputUnreachable as error:
        assert error.__cause__ is None and error.__context__ is None
        shown = traceback.format_exc() + repr(error)
        for secret in (SECRET, "://", "127.0.0"):
            assert secret not in shown
        assert not list(into.rglob("*.part"))
        return str(error)
    raise AssertionError("it was fetched")


# What arrives from a real provider


def test_every_file_of_an_asset_arrives_in_order(other: OtherProvider, tmp_path: Path) -> None:
    """Of two assets at once; one of them is offered to nobody but the address of the environment's key."""
    seen: list[tuple[int, int, int, int]] = []
    files = fetched(tmp_path, asset(other), asset(other, "did:op:more"), on_progress=lambda *told: seen.append(told))
    assert [("did:op:data", 0), ("did:op:data", 1), ("did:op:more", 0)] == [(f.input_id, f.position) for f in files]
    assert [b"first", b"second"] == [(tmp_path / "data" / n).read_bytes() for n in "01"]
    assert b"third" == (tmp_path / "more" / "0").read_bytes()
    assert hashlib.sha256(b"second").hexdigest() == files[1].sha256
    assert (16, 3, 3) == (seen[-1][0], *seen[-1][2:])


def test_the_document_is_handed_over_without_files_in_clear(other: OtherProvider, tmp_path: Path) -> None:
    """It is the one of the metadata store, where somebody has left URLs standing in it."""
    found: dict[str, Any] = {}
    fetched(tmp_path, asset(other), on_found=found.__setitem__)
    (document,) = found.values()
    assert ("did:op:data", "did:op:data") == (*found, document["id"])
    assert SERVICE == document["services"][0]["id"]
    assert "" == document["services"][0]["files"]


def test_userdata_reaches_the_source(other: OtherProvider, server: FileServer, tmp_path: Path) -> None:
    """By way of the other provider, both where files are listed and where they are downloaded."""
    fetched(tmp_path, asset(other, "did:op:asked", userdata={"rows": 7, "of": "räume"}))
    asked = [parse_qs(urlsplit(r.target).query) for r in server.received if r.target.startswith(f"/{SECRET}?")]
    assert [{"rows": ["7"], "of": ["räume"]}] * 2 == asked


def test_an_algorithm_of_another_provider(other: OtherProvider, tmp_path: Path) -> None:
    """Its first file, executable; raw code wins over it, as over nothing else."""
    into = tmp_path / "algorithm"
    remote = asset(other, "did:op:code")
    file = fetch_algorithm(None, None, into, LOOPBACK, remote=remote, access=Access(signer=SIGNER))
    assert (CODE, 0o555, len(CODE)) == (into.read_bytes(), into.stat().st_mode & 0o777, file.size)
    fetch_algorithm(None, "raw", into, LOOPBACK, remote=remote, access=Access(signer=SIGNER))
    assert b"raw" == into.read_bytes()


def test_several_workers_with_the_same_key(other: OtherProvider, tmp_path: Path) -> None:
    """Each takes all files while the others do, though a nonce has to be greater than that of whoever came before."""
    with ThreadPoolExecutor(4) as workers:
        done = list(workers.map(lambda n: fetched(tmp_path / f"{n}", asset(other, "did:op:many")), range(4)))
    assert [[len(f"{n}") for n in range(MANY)]] * 4 == [[file.size for file in files] for files in done]
    assert [f"{n}" for n in range(MANY)] == [(tmp_path / "3" / "many" / f"{n}").read_text() for n in range(MANY)]


# What can be wrong, with a real provider


def test_an_asset_that_is_not_known(other: OtherProvider, tmp_path: Path) -> None:
    message = refused(tmp_path, asset(other), asset(other, "did:op:unknown"))
    assert "input 1 (did:op:unknown): the asset is not known to the metadata store" == message


def test_a_service_that_is_not_there(other: OtherProvider, tmp_path: Path) -> None:
    message = refused(tmp_path, asset(other, service_id=SECRET))
    assert "input 0 (did:op:data): the asset has no service of this id" == message


def test_an_environment_without_a_key(other: OtherProvider, server: FileServer, tmp_path: Path) -> None:
    """Nobody is asked anything."""
    before = len(server.received)
    message = refused(tmp_path, asset(other), signer=None)
    assert message == "input 0 (did:op:data): this environment has no key to sign downloads at other providers with"
    with pytest.raises(AlgorithmUnreachable, match=r"^the algorithm: this environment has no key"):
        fetch_algorithm(None, None, tmp_path / "a", LOOPBACK, remote=asset(other, "did:op:code"))
    assert before == len(server.received)


def test_a_provider_that_refuses_the_download(other: OtherProvider, tmp_path: Path) -> None:
    """The asset is not offered to the address of this key. Its words are not repeated."""
    message = refused(tmp_path, asset(other), signer=STRANGER)
    assert message.startswith("input 0 (did:op:data), file ")
    assert message.endswith(" of 2: its provider refuses the download (400)")


def test_a_file_the_provider_cannot_read(other: OtherProvider, tmp_path: Path) -> None:
    """It says so in its list, and no other file is fetched for nothing."""
    message = refused(tmp_path, asset(other, "did:op:gone"))
    assert "input 0 (did:op:gone): file 2 of 2 cannot be read, its provider says" == message
    assert [] == list(tmp_path.iterdir())


def test_a_service_of_another_provider(other: OtherProvider, server: FileServer, tmp_path: Path) -> None:
    """The document names a provider that does not have the asset."""
    publish(server, ddo("did:op:elsewhere", other.url, []))
    message = refused(tmp_path, asset(other, "did:op:elsewhere"))
    assert "input 0 (did:op:elsewhere): its provider refuses the list of its files (400)" == message


def test_a_checksum_that_was_approved(other: OtherProvider, tmp_path: Path) -> None:
    """The file that was approved is run and another one is not, nor does it stay."""
    into = tmp_path / "algorithm"
    remote, access = asset(other, "did:op:code"), Access(signer=SIGNER)
    approved = hashlib.sha256(CODE).hexdigest()
    fetch_algorithm(None, None, into, LOOPBACK, remote=remote, sha256=approved, access=access)
    with pytest.raises(AlgorithmUnreachable, match=r"^the algorithm's file: is not the file that was approved$"):
        fetch_algorithm(None, None, into, LOOPBACK, remote=remote, sha256="00" * 32, access=access)
    with pytest.raises(AlgorithmUnreachable, match=r"^the algorithm's code: is not the file that was approved$"):
        fetch_algorithm(None, "raw", into, LOOPBACK, sha256=approved)
    assert not into.exists()


def site(environment: ComputeEnvironment, stage: PlannedStage) -> Site:
    return Site(job_id="1" * 32, run_id="1" * 32, stage=stage, environment=environment)


def test_the_step_of_a_flow(other: OtherProvider, tmp_path: Path) -> None:
    """From the document over the plan to the algorithm in the job's folder, with the key of the environment's block."""
    offer = Offer(id="default", fetch=LOOPBACK)
    environment = ComputeEnvironment(offer=offer, work_pool="p", workspace=str(tmp_path), signer=SecretStr("0a" * 32))
    assert SIGNER.address == environment.offer.consumer_address
    algorithm = {"id": "did:op:code", "remote": {"serviceId": SERVICE}}

    def provisioned(**more: Any) -> tuple[Site, Any]:
        plan = planned(
            stage(rawcode=None, algorithm=algorithm | more, output={"metadataUri": other.metadata_url}), on=offer
        )
        assert "at another provider" in str(plan)
        where = site(environment, plan.stages[0])
        return where, provision_algorithm.fn(where, [])

    where, state = provisioned(sha256=hashlib.sha256(CODE).hexdigest().upper())
    assert state.is_completed()
    assert CODE == where.workspace.algorithm.read_bytes()
    where, state = provisioned(sha256="ab" * 32)
    assert ("Algorithm unreachable", True) == (state.name, state.is_failed())
    assert "the algorithm's file: is not the file that was approved" == state.message


# Servers that pretend to be a provider


@dataclass
class Pretender:
    """A provider by hand: what it is told to answer, and what it was asked."""

    server: FileServer
    last: int | str | float | None = 0
    """What it says is the last nonce."""
    asked: list[dict[str, str]] = field(default_factory=list)
    """The parameters of each download."""

    def __post_init__(self) -> None:
        publish(self.server, ddo("did:op:data", self.server.url, []))
        self.server.on("", lambda _: web.json_response({"software": "Provider"}))
        self.lists([{"index": 0, "valid": True}])
        self.server.on("api/services/nonce", lambda _: web.json_response({"nonce": self.last}))
        self.downloads(lambda given: web.Response(body=b"data"))

    def lists(self, answer: Any) -> None:
        self.server.on("api/services/fileinfo", lambda _: web.json_response(answer))

    def downloads(self, answer: Callable[[dict[str, str]], web.Response], at: str = "api/services/download") -> None:
        def download(received: Received) -> web.Response:
            given = {name: values[0] for name, values in parse_qs(urlsplit(received.target).query).items()}
            self.asked.append(given)
            return answer(given)

        self.server.on(at, download)

    @property
    def nonces(self) -> list[int]:
        return [int(given["nonce"]) for given in self.asked]


@pytest.fixture
def pretender(file_server: FileServer) -> Pretender:
    return Pretender(file_server)


def test_what_a_provider_is_asked(pretender: Pretender, tmp_path: Path) -> None:
    """The parameters of a download are those of the Provider's API, and the signature is that of its scheme."""
    remote = asset(pretender.server, tx_id="0x12", userdata={"a": [1]})
    fetched(tmp_path, remote)
    (given,) = pretender.asked
    signature = given.pop("signature")
    message = keccak(text=f"did:op:data{given['nonce']}")
    assert SIGNER.address == Account.recover_message(encode_defunct(primitive=message), signature=signature)
    assert abs(time.time() * 1e6 - int(given.pop("nonce"))) < 60e6
    assert {
        "documentId": "did:op:data",
        "serviceId": SERVICE,
        "fileIndex": "0",
        "transferTxId": "0x12",
        "consumerAddress": SIGNER.address,
        "userdata": '{"a": [1]}',
    } == given
    (listed,) = [r for r in pretender.server.received if "fileinfo" in r.target]
    assert {"did": "did:op:data", "serviceId": SERVICE, "userdata": {"a": [1]}} == json.loads(listed.body)


def test_endpoints_a_provider_tells(pretender: Pretender, tmp_path: Path) -> None:
    """They are found by name; a path that leads to another server or out of its place is not believed."""
    told = {"download": ["POST", "/else/where"], "fileinfo": ["GET", "//evil.example/x"], "nonce": ["GET", "/a/../b"]}
    pretender.server.on("", lambda _: web.json_response({"serviceEndpoints": told}))
    bodies: list[Any] = []

    def download(received: Received) -> web.Response:
        bodies.append(json.loads(received.body))
        return web.Response(body=b"data")

    pretender.server.on("else/where", download)
    fetched(tmp_path, asset(pretender.server))
    assert ["did:op:data"] == [body["documentId"] for body in bodies]
    assert {"/", "/else/where", "/api/services/fileinfo", "/api/services/nonce"} <= {
        urlsplit(r.target).path for r in pretender.server.received
    }


@pytest.mark.parametrize("answer", [b"", b"[" * 100_000, b"[1]", b'{"serviceEndpoints": [1]}', None])
def test_a_provider_that_does_not_tell(pretender: Pretender, tmp_path: Path, answer: bytes | None) -> None:
    """Its endpoints are then where they are known to be."""
    pretender.server.on("", lambda _: web.Response(status=404) if answer is None else web.Response(body=answer))
    fetched(tmp_path, asset(pretender.server))
    assert b"data" == (tmp_path / "data" / "0").read_bytes()


@pytest.mark.parametrize("last", [None, 7, "7", "1795328887590.75", 1795328887590.75, 10**30, f"{10**30}"])
def test_nonces_are_greater_than_the_last_one(
    pretender: Pretender, tmp_path: Path, last: int | str | float | None
) -> None:
    """However a provider writes it; it is asked once, and each file gets a greater one than the file before."""
    pretender.last = last
    pretender.lists([{"index": n, "valid": True} for n in range(5)])
    fetched(tmp_path, asset(pretender.server))
    assert sorted(set(pretender.nonces)) == pretender.nonces
    assert pretender.nonces[0] > Decimal(last or 0)
    assert 1 == len([r for r in pretender.server.received if "nonce?" in r.target])


def test_who_is_overtaken_tries_again(pretender: Pretender, tmp_path: Path) -> None:
    """With a nonce greater than the one that came before; the original refuses it as it refuses a signature."""
    overtaking = 3

    def answer(given: dict[str, str]) -> web.Response:
        if len(pretender.asked) <= overtaking:
            pretender.last = int(given["nonce"]) + 1_000_000_000
            return web.json_response({"errors": {"signature": [SECRET]}}, status=400)
        return web.Response(body=b"data")

    pretender.downloads(answer)
    fetched(tmp_path, asset(pretender.server))
    assert overtaking + 1 == len(pretender.asked)
    assert sorted(set(pretender.nonces)) == pretender.nonces
    assert pretender.nonces[-1] > int(pretender.last or 0)


def test_who_is_overtaken_for_ever_gives_up(pretender: Pretender, tmp_path: Path) -> None:
    pretender.last = 10**20

    def answer(given: dict[str, str]) -> web.Response:
        pretender.last = int(given["nonce"])
        return web.Response(status=401, text=SECRET)

    pretender.downloads(answer)
    message = refused(tmp_path, asset(pretender.server))
    assert message.endswith("file 1 of 1: its provider refuses the download (401)")
    assert 8 == len(pretender.asked)


@pytest.mark.parametrize("status", [400, 403, 404, 410])
def test_a_refusal_is_not_tried_again(pretender: Pretender, tmp_path: Path, status: int) -> None:
    pretender.downloads(lambda given: web.Response(status=status, text=SECRET))
    message = refused(tmp_path, asset(pretender.server), limits=LOOPBACK)
    assert message.endswith(f"file 1 of 1: its provider refuses the download ({status})")
    assert 1 == len(pretender.asked)


def test_passing_troubles_are_tried_again(pretender: Pretender, tmp_path: Path) -> None:
    """Each time with a signature of its own."""
    pretender.downloads(lambda given: web.Response(status=502 if len(pretender.asked) < 3 else 200, body=b"data"))
    fetched(tmp_path, asset(pretender.server))
    assert 3 == len({given["signature"] for given in pretender.asked})
    pretender.downloads(lambda given: web.Response(status=503))
    assert refused(tmp_path, asset(pretender.server)).endswith("its provider: answered 503")


def test_a_signature_is_not_taken_elsewhere(pretender: Pretender, tmp_path: Path) -> None:
    """A provider that redirects is not followed, not even to itself."""
    targets = [f"http://localhost:{pretender.server.port}/else", "/else"]
    pretender.downloads(lambda _: web.Response(status=307, headers={"Location": targets.pop()}))
    for _ in range(2):
        assert refused(tmp_path, asset(pretender.server)).endswith("its provider redirects elsewhere")
    assert [] == targets
    assert not [r for r in pretender.server.received if "else" in r.target]


def test_a_list_by_the_providers_own_count(pretender: Pretender, tmp_path: Path) -> None:
    """Files are asked for by the index the provider gives them, and counted here from 0."""
    pretender.lists([{"index": 4, "valid": True}, {"index": 2, "valid": True}])
    pretender.downloads(lambda given: web.Response(text=given["fileIndex"]))
    fetched(tmp_path, asset(pretender.server))
    assert ["4", "2"] == [(tmp_path / "data" / n).read_text() for n in "01"]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([], "its provider lists no files"),
        ({}, "its provider does not list its files as it should"),
        ([SECRET], "its provider does not list its files as it should"),
        ([{"index": -1, "valid": True}], "its provider does not list its files as it should"),
        ([{"index": 0, "valid": True}] * 2, "its provider does not list its files as it should"),
        ([{"index": SECRET, "valid": True}], "its provider does not list its files as it should"),
        ([{"valid": True}] * 10_001, "its provider does not list its files as it should"),
        ([{"index": 0, "valid": False}], "file 1 of 1 cannot be read, its provider says"),
        ([{"index": 0}], "file 1 of 1 cannot be read, its provider says"),
    ],
)
def test_lists_that_are_none(pretender: Pretender, tmp_path: Path, answer: Any, words: str) -> None:
    pretender.lists(answer)
    assert f"input 0 (did:op:data): {words}" == refused(tmp_path, asset(pretender.server))


@pytest.mark.parametrize("answer", [b"", SECRET.encode(), b"[" * 100_000, b"[" + b" " * 5 * 2**20 + b"]"])
def test_answers_that_are_none(pretender: Pretender, tmp_path: Path, answer: bytes) -> None:
    """No JSON, nested without end, or too long."""
    pretender.server.on("api/services/fileinfo", lambda _: web.Response(body=answer))
    words = "answers with more than 4194304 bytes" if len(answer) > 2**20 else "does not answer in JSON"
    assert refused(tmp_path, asset(pretender.server)).endswith(words)


@pytest.mark.parametrize("nonce", ["", SECRET, True, [1], "9" * 101, "-1"])
def test_nonces_that_are_none(pretender: Pretender, tmp_path: Path, nonce: Any) -> None:
    pretender.last = nonce
    assert refused(tmp_path, asset(pretender.server)).endswith("its provider tells a nonce that is no number")
    assert [] == pretender.asked


def test_too_many_bytes(pretender: Pretender, tmp_path: Path) -> None:
    """The ceiling of a stage holds for what other providers send."""
    message = refused(tmp_path, asset(pretender.server), limits=ONCE.model_copy(update={"total_bytes": 3}))
    assert message.endswith("file 1 of 1: more than 3 bytes")


# Where a provider and a metadata store may be


def test_a_provider_at_an_address_that_is_not_public(pretender: Pretender, tmp_path: Path) -> None:
    """The metadata store is allowed, the provider its document names is not, and is asked nothing."""
    with socket.create_server(("127.0.0.2", 0)) as inside:
        inside.settimeout(0.2)
        publish(pretender.server, ddo("did:op:data", f"http://127.0.0.2:{inside.getsockname()[1]}/{SECRET}", []))
        limits = ONCE.model_copy(update={"networks": ("127.0.0.1/32",)})
        message = refused(tmp_path, asset(pretender.server), limits=limits)
        with pytest.raises(TimeoutError):
            inside.accept()
    assert "input 0 (did:op:data): its provider: address is not public" == message


def test_a_metadata_store_at_an_address_that_is_not_public(pretender: Pretender, tmp_path: Path) -> None:
    message = refused(tmp_path, asset(pretender.server), limits=FetchLimits())
    assert "input 0 (did:op:data): the metadata store: its address is not allowed" == message
    assert [] == pretender.server.received


def test_only_the_metadata_stores_an_operator_lists(other: OtherProvider, server: FileServer, tmp_path: Path) -> None:
    """Where they are listed: any other could name a server that hands our signature on."""
    source = [InputSource("did:op:data", 0, remote=asset(other))]
    fetch_inputs(source, tmp_path, LOOPBACK, access=Access(signer=SIGNER, metadata_stores=(f"{other.metadata_url}/",)))
    before = len(server.received)
    with pytest.raises(InputUnreachable, match="not one in which this environment looks assets up"):
        fetch_inputs(source, tmp_path, LOOPBACK, access=Access(signer=SIGNER, metadata_stores=("https://a.example",)))
    assert before == len(server.received)


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        ("", "the asset's service names no provider"),
        (f"ftp://{SECRET}", "the address of its provider is refused: its scheme is not one of http, https"),
        (f"http://a:{SECRET}@b", "the address of its provider is refused: it carries credentials"),
        (f"http://{SECRET}.invalid", "its provider: its host name does not resolve"),
    ],
)
def test_endpoints_that_lead_nowhere(pretender: Pretender, tmp_path: Path, endpoint: str, words: str) -> None:
    publish(pretender.server, ddo("did:op:data", endpoint, []))
    assert f"input 0 (did:op:data): {words}" == refused(tmp_path, asset(pretender.server))


def test_a_provider_that_is_down(pretender: Pretender, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        down = f"http://127.0.0.1:{probe.getsockname()[1]}/{SECRET}"
    publish(pretender.server, ddo("did:op:data", down, []))
    limits = LOOPBACK.model_copy(update={"attempts": 2})
    message = refused(tmp_path, asset(pretender.server), limits=limits)
    assert "input 0 (did:op:data): its provider: refuses connections (2 tries)" == message


def test_a_metadata_store_that_is_down_or_talks_nonsense(pretender: Pretender, tmp_path: Path) -> None:
    remote = asset(pretender.server, metadata_url="http://127.0.0.1:9")
    assert "input 0 (did:op:data): the metadata store: it cannot be reached" == refused(tmp_path, remote)
    path = "api/aquarius/assets/ddo/did:op:data"
    pretender.server.add(b"[" * 100_000, name=path)
    assert refused(tmp_path, asset(pretender.server)).endswith(
        "the metadata store: it answered something that is not JSON"
    )
    pretender.server.add(json.dumps({"id": "did:op:data", "metadata": SECRET}).encode(), name=path)
    assert "input 0 (did:op:data): the asset cannot be used: " in refused(tmp_path, asset(pretender.server))


def test_a_withdrawn_asset(pretender: Pretender, tmp_path: Path) -> None:
    publish(pretender.server, {**ddo("did:op:data", pretender.server.url, []), "purgatory": {"state": True}})
    message = refused(tmp_path, asset(pretender.server))
    assert "input 0 (did:op:data): the asset cannot be used: it is in purgatory" == message


# Ends


def test_the_deadline_holds_while_assets_are_looked_up(pretender: Pretender, tmp_path: Path) -> None:
    publish(pretender.server, ddo("did:op:data", pretender.server.url, []), hang=True)
    message = refused(tmp_path, asset(pretender.server), limits=LOOPBACK.model_copy(update={"seconds_total": 0.5}))
    assert "input 0 (did:op:data): not here after 0.5 s in all" == message


def test_a_stop_ends_the_looking_up(pretender: Pretender, tmp_path: Path) -> None:
    """Whatever hangs is given up within a second."""
    publish(pretender.server, ddo("did:op:data", pretender.server.url, []), hang=True)
    stop = Event()
    threading.Timer(0.3, stop.set).start()
    started = time.monotonic()
    assert "the job is being stopped" == refused(tmp_path, asset(pretender.server), stop=stop)
    assert time.monotonic() - started < 3


def test_nothing_of_it_is_shown() -> None:
    """Neither what goes to the source nor where the metadata store is."""
    remote = RemoteAsset("did:op:a", "s", userdata={"k": SECRET}, metadata_url=f"http://{SECRET}")
    shown = f"{remote!r} {InputSource('did:op:a', 0, remote=remote)!r} {Access(signer=SIGNER)!r}"
    assert SECRET not in shown
    assert "did:op:a" in shown and OWNER not in shown
