"""The corpus of hostile URLs and servers: by no way in does any of it get through, and each is refused by its name."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from multiformats import CID, multihash
from yarl import URL

from blocks.assets import RemoteAsset
from blocks.files import ArweaveFile, FileObject, GraphqlFile, IpfsFile, UrlFile
from blocks.guard import ForbiddenAddress, guarded_session, is_allowed
from blocks.keys import ProviderKey
from blocks.limits import FetchLimits
from blocks.provider import providers
from blocks.provider_fees import ProviderUnreachable, initialize
from blocks.remote import LONGEST_WAIT, Access, Unreachable, pause, remotes
from blocks.urls import ForbiddenUrl, check_url
from flows.errors import InvalidWorkflow
from tasks.provision import (
    AlgorithmUnreachable,
    InputSource,
    InputUnreachable,
    fetch_algorithm,
    fetch_inputs,
)
from tests.documents import data, planned, stage
from tests.file_server import FileServer
from tests.hostile.names import NAMES
from tests.hostile.servers import SECONDS, SERVERS, SILENT, TOO_LATE, TOO_SILENT, TOTAL, Server, played
from tests.hostile.urls import BAD_HOST, CORPUS, DISGUISED, IPV6, NO_HOST, NOT_PUBLIC, PLACES, Hostile
from tests.other_provider import SERVICE, ddo

HERE: Final = "127.0.0.3"
"""The one address that may be fetched from in these tests; no URL of the corpus leads to it."""
LIMITS: Final = FetchLimits(networks=(f"{HERE}/32",), attempts=1, seconds_to_connect=30, seconds_silent=30)
SIGNER: Final = ProviderKey.from_secret("0a" * 32)

# Of a redirect, only what is a URL of its own says where to; and a header holds no line ends.
ELSEWHERE: Final = tuple(
    each for each in CORPUS if each.refusal in {NOT_PUBLIC, DISGUISED} and re.match(r"https?://[^/.]", each.url)
)
BY_REDIRECT: Final = frozenset(
    {NOT_PUBLIC, DISGUISED, BAD_HOST, "its URL is not valid", "redirects to a URL that is not http"}
)


def test_the_corpus_is_as_large_as_it_says() -> None:
    """More than five hundred ideas, no two of them the same, neither by name nor by what is sent."""
    assert len(CORPUS) + len(SERVERS) + len(NAMES) > 1000
    assert len(CORPUS) == len({each.idea for each in CORPUS}) == len({each.url for each in CORPUS})
    assert len(SERVERS) == len({each.idea for each in SERVERS})
    assert len(ELSEWHERE) > 500


# Texts


@pytest.mark.parametrize("each", CORPUS, ids=str)
def test_its_text(each: Hostile) -> None:
    """What can be told from the text is told; of the rest, the host is a name of this machine or an inner address."""
    try:
        allowed = check_url(each.url, ("http", "https"))
    except ForbiddenUrl as refused:
        assert each.refusal == f"refused: {refused.reason}"
    else:
        host = URL(allowed).host
        assert host is not None
        assert each.refusal == NOT_PUBLIC
        assert host == "localhost" or not is_allowed(host, FetchLimits())


@pytest.mark.parametrize("address", [*PLACES.values(), *(each for each in IPV6.values() if "ff9b" not in each.lower())])
def test_an_operator_may_allow_it(address: str) -> None:
    """What is refused is so by default, not for ever: a network of the operator's is reached by its addresses."""
    limits = FetchLimits(networks=(f"{address}/{128 if ':' in address else 32}",))
    assert is_allowed(address, limits)
    assert not is_allowed("10.99.99.99", limits)


def problems(part: dict[str, Any]) -> dict[str, str]:
    """What is wrong with a document of this one input, by its place there."""
    with pytest.raises(InvalidWorkflow) as caught:
        planned(stage(input=[part]))
    return {problem.path: problem.message for problem in caught.value.problems}


# Ways in. Each takes all of it in one go, for nothing of it gets as far as the network.


async def told(attempts: Mapping[str, Awaitable[object]]) -> dict[str, str]:
    """What each is refused with, by its idea."""

    async def words(attempt: Awaitable[object]) -> str:
        try:
            await attempt
        except Unreachable as trouble:
            return trouble.words
        except ProviderUnreachable as trouble:
            return trouble.reason
        return "it got through"

    return dict(zip(attempts, await asyncio.gather(*map(words, attempts.values())), strict=True))


def opened(
    make: Callable[[Hostile], FileObject], corpus: tuple[Hostile, ...], access: Access | None = None
) -> dict[str, str]:
    async def run() -> dict[str, str]:
        async with remotes(LIMITS, access or Access()) as opener:
            return await told({each.idea: opener.open(make(each)) for each in corpus})

    return asyncio.run(run())


def test_as_the_url_of_an_input() -> None:
    """Whatever is named, what comes back is the refusal of the corpus, word for word."""
    # Without pydantic's checks, which refuse some of these texts before they come here.
    found = opened(lambda each: UrlFile.model_construct(url=each.url), CORPUS)
    assert found == {each.idea: each.refusal for each in CORPUS}


def test_as_a_url_with_a_query_of_graphql() -> None:
    found = opened(lambda each: GraphqlFile.model_construct(url=each.url, query="{a}", type="graphql"), CORPUS)
    assert found == {each.idea: each.refusal for each in CORPUS}


def test_as_the_url_of_an_algorithm(tmp_path: Path) -> None:
    """One of each refusal: the rest of the way is that of an input."""
    one_of_each = {each.refusal: each for each in CORPUS}
    for refusal, each in one_of_each.items():
        with pytest.raises(AlgorithmUnreachable) as caught:
            fetch_algorithm(UrlFile.model_construct(url=each.url), None, tmp_path / "algorithm", LIMITS)
        assert str(caught.value) == f"the algorithm's URL: {refusal}"
    assert len(one_of_each) == 8
    assert not list(tmp_path.iterdir())


def test_in_a_document() -> None:
    """A plan is not made of what its text gives away; it names the place and not the URL."""
    for each in CORPUS:
        if each.refusal == NOT_PUBLIC or "\ud800" in each.url or not each.url:
            continue
        assert f"refused: {problems(data('did:op:a', each.url))['stages.0.input.0.url.0']}" == each.refusal


@pytest.fixture(scope="module")
def server() -> Iterator[FileServer]:
    with FileServer(HERE) as server:
        yield server


def redirects(server: FileServer, prefix: str) -> Callable[[Hostile], str]:
    """The URL, on *server*, of a redirect to a place of the corpus."""

    def url(each: Hostile) -> str:
        name = f"{prefix}/{quote(each.idea, safe='')}"
        server.add(redirect_to=each.url, name=f"{prefix}/{each.idea}")
        return f"{server.url}/{name}"

    return url


def test_by_a_redirect(server: FileServer) -> None:
    """A server that may be asked sends elsewhere: no connection is made there."""
    url = redirects(server, "redirect")
    found = opened(lambda each: UrlFile(url=url(each)), ELSEWHERE)
    assert {idea: words for idea, words in found.items() if words not in BY_REDIRECT} == {}


def test_by_a_redirect_of_a_gateway_to_ipfs(server: FileServer) -> None:
    """The operator may configure any address; where that sends to is not the operator's word."""
    cids = {}
    for each in ELSEWHERE:
        cid = CID(
            "base32",
            1,
            "raw",
            ("sha2-256", multihash.get("sha2-256").unwrap(multihash.digest(each.idea.encode(), "sha2-256"))),
        )
        cids[each.idea] = IpfsFile(type="ipfs", hash=str(cid))
        server.add(redirect_to=each.url, name=f"ipfs/{cid}")
    found = opened(lambda each: cids[each.idea], ELSEWHERE, Access(ipfs_gateway=server.url))
    allowed = {f"at the IPFS gateway: {words}" for words in (*BY_REDIRECT, NO_HOST)}
    assert {idea: words for idea, words in found.items() if words not in allowed} == {}


def test_by_a_redirect_of_a_gateway_to_arweave(server: FileServer) -> None:
    names = {each.idea: f"{n:043d}" for n, each in enumerate(ELSEWHERE)}
    for each in ELSEWHERE:
        server.add(redirect_to=each.url, name=names[each.idea])
    found = opened(
        lambda each: ArweaveFile(type="arweave", transaction_id=names[each.idea]),
        ELSEWHERE,
        Access(arweave_gateway=server.url),
    )
    allowed = {f"at the Arweave gateway: {words}" for words in (*BY_REDIRECT, NO_HOST)}
    assert {idea: words for idea, words in found.items() if words not in allowed} == {}


def test_as_a_metadata_store() -> None:
    """A consumer names the store in which assets are looked up."""

    async def run() -> dict[str, str]:
        async with providers(LIMITS, Access(signer=SIGNER)) as others:
            assets = {each: RemoteAsset(did="did:op:a", service_id=SERVICE, metadata_url=each.url) for each in CORPUS}
            return await told({each.idea: others.find(asset) for each, asset in assets.items()})

    found = asyncio.run(run())
    for each in CORPUS:
        if each.refusal == NOT_PUBLIC:
            assert found[each.idea] == "the metadata store: its address is not allowed", each
        else:
            assert found[each.idea] == f"the metadata store's address is {each.refusal}", each


def test_as_the_endpoint_of_a_service(server: FileServer) -> None:
    """Whoever publishes an asset names the provider that has its files."""
    corpus = tuple(each for each in CORPUS if each.url and "\ud800" not in each.url)

    async def run() -> dict[str, str]:
        attempts = {}
        async with providers(LIMITS, Access(signer=SIGNER)) as others:
            for n, each in enumerate(corpus):
                document = ddo(f"did:op:{n}", each.url, ["http://x.invalid/"])
                server.add(json.dumps(document).encode(), name=f"api/aquarius/assets/ddo/did:op:{n}")
                asset = RemoteAsset(did=f"did:op:{n}", service_id=SERVICE, metadata_url=server.url)
                attempts[each.idea] = others.find(asset)
            return await told(attempts)

    found = asyncio.run(run())
    for each in corpus:
        if each.refusal == NOT_PUBLIC:
            assert found[each.idea] == f"its provider: {NOT_PUBLIC}", each
        elif each.url.strip():
            assert found[each.idea] == f"the address of its provider is {each.refusal}", each


def test_as_a_provider_that_is_asked_for_its_fees() -> None:
    async def run() -> dict[str, str]:
        given: dict[str, Any] = {"limits": LIMITS, "datatoken": "", "document_id": "", "service_id": ""}
        async with guarded_session(LIMITS) as session:
            return await told(
                {
                    each.idea: initialize(session, each.url, **given, consumer="", tx_id="", userdata={})
                    for each in CORPUS
                }
            )

    found = asyncio.run(run())
    for each in CORPUS:
        expected = "it cannot be reached" if each.refusal == NOT_PUBLIC else "its address is none that may be asked"
        assert found[each.idea] == expected, each


# Names that lead elsewhere when they are looked up


class Answers(AbstractResolver):
    """Whatever is asked for, these, one list after the other; the last for ever."""

    def __init__(self, *answers: list[str]) -> None:
        self._answers = list(answers)
        self.asked = 0

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_UNSPEC) -> list[ResolveResult]:
        self.asked += 1
        addresses = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for address in addresses
        ]

    async def close(self) -> None: ...


@pytest.mark.parametrize(
    "address", [*PLACES.values(), *IPV6.values(), "::ffff:127.0.0.1", "64:ff9b::7f00:1", "fe80::1%1"]
)
def test_a_name_that_leads_inside(address: str) -> None:
    """Nothing is believed of a name but the address that is connected to."""

    async def run() -> None:
        resolver = Answers([address])
        async with guarded_session(FetchLimits(), resolver) as session:
            with pytest.raises(OSError) as caught:
                await session.get("http://rebound.example:80/")
            assert isinstance(getattr(caught.value, "os_error", None), ForbiddenAddress)
        assert resolver.asked

    asyncio.run(run())


def test_a_name_that_changes_its_mind(server: FileServer) -> None:
    """The second look-up leads inside, after the first was allowed; so does one of two addresses of the same name."""
    url = server.add(b"x")
    with FileServer("127.0.0.4") as inside:
        inside.on("x", lambda _: web.Response(text="secret"))

        async def run() -> None:
            resolver = Answers([HERE], ["127.0.0.4"])
            async with guarded_session(LIMITS, resolver) as session:
                async with session.get(url.replace(HERE, "rebound.example"), headers={"Connection": "close"}) as answer:
                    assert await answer.read() == b"x"
                session.connector.clear_dns_cache()  # type: ignore[union-attr] # as time does
                with pytest.raises(OSError):
                    await session.get(f"http://rebound.example:{inside.port}/x")
            assert resolver.asked == 2
            resolver = Answers(["127.0.0.4", "::ffff:127.0.0.4"])
            async with guarded_session(LIMITS, resolver) as session:
                with pytest.raises(OSError):
                    await session.get(f"http://rebound.example:{inside.port}/x")

        asyncio.run(run())
        assert not inside.received


# Servers


@pytest.mark.parametrize("each", SERVERS, ids=str)
def test_its_server(each: Server, tmp_path: Path) -> None:
    """It ends, within its time and its bytes, by its name, and leaves nothing on the disk."""
    # The others have as long as a busy machine may take.
    times = {"seconds_silent": SILENT if each.refusal == TOO_SILENT else 30}
    times["seconds_total"] = SECONDS if each.refusal == TOO_LATE else 60
    limits = LIMITS.model_copy(update={**times, "total_bytes": TOTAL, "connections_per_host": 1})
    with played(each, HERE) as url, pytest.raises(InputUnreachable) as caught:
        fetch_inputs([InputSource("a", 0, (UrlFile(url=url),))], tmp_path, limits)
    assert str(caught.value) == f"input 0 (a), URL 1 of 1: {each.refusal}"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_comes_behind_a_body_is_no_answer(tmp_path: Path) -> None:
    """A server that sends two answers to one request has not answered the next one."""
    smuggled = b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nsmuggled"

    async def play(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ntrue" + smuggled)
        await writer.drain()
        await asyncio.sleep(1)

    limits = LIMITS.model_copy(update={"connections_per_host": 1})
    with played(Server("two answers", "", play), HERE) as url:
        files = (UrlFile(url=url), UrlFile(url=f"{url}b"), UrlFile(url=f"{url}c"))
        fetch_inputs([InputSource("a", 0, files)], tmp_path, limits)
    assert {path.read_bytes() for path in (tmp_path / "a").iterdir()} == {b"true"}


@pytest.mark.parametrize("asked", [0.0, 1.0, 29.9, 3600.0, 1e9, float("inf")])
def test_a_server_that_asks_for_patience(asked: float) -> None:
    """It gets some, and no more than there is for anybody."""
    found = pause(1, Unreachable("x", transient=True, wait=asked))
    assert min(asked, LONGEST_WAIT) <= found <= LONGEST_WAIT


@pytest.mark.parametrize("tried", [1, 2, 10, 1000, 10**9])
def test_nobody_waits_for_ever(tried: int) -> None:
    assert 0 < pause(tried, None) <= LONGEST_WAIT


# Names


@pytest.mark.parametrize(("idea", "name"), NAMES.items(), ids=NAMES)
def test_its_name(idea: str, name: str, tmp_path: Path) -> None:
    """No id of a data set becomes a path: it is refused in the plan, and what came further would write nothing."""
    said = problems(data(name))["stages.0.input.0.id"]
    assert said.startswith(("is no safe name", "is a reserved name", "String should "))
    with pytest.raises((ValueError, InputUnreachable, OSError)):
        fetch_inputs([InputSource(name, 0, (UrlFile(url="http://127.0.0.1/"),))], tmp_path / "in", LIMITS)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in tmp_path.iterdir() if path.name != "in"]
