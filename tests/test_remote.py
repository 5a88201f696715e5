"""Files of every kind, opened where they are: what arrives, what is refused, what nobody gets to see."""

from __future__ import annotations

import asyncio
import hashlib
import json
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from aiohttp import web
from eth_abi.abi import encode
from graphql import GraphQLArgument, GraphQLField, GraphQLObjectType, GraphQLSchema, GraphQLString, graphql_sync
from hypothesis import given
from hypothesis import strategies as st
from multiformats import CID, multihash

from blocks.files import ArweaveFile, FileObject, GraphqlFile, IpfsFile, SmartContractFile, UrlFile
from blocks.ipfs import AHEAD, DEEPEST, LARGEST_BLOCK, NotThatFile, check_block, parse_cid, read_node
from blocks.limits import MIB, FetchLimits
from blocks.remote import LARGEST_REFUSAL, Access, Unreachable, check_file, remotes
from blocks.urls import ForbiddenUrl
from cli.service import free_port
from tasks.provision import InputSource, fetch_inputs
from tests.file_server import LOOPBACK, FileServer, Received

SECRET: Final = "hush-5b1e7c0d"
METADATA: Final = "http://169.254.169.254/latest/meta-data/"
ONCE: Final = LOOPBACK.model_copy(update={"attempts": 1})
TRANSACTION: Final = "x" * 43


@pytest.fixture
def elsewhere() -> Iterator[FileServer]:
    """A second server, of another origin and at another address."""
    with FileServer("127.0.0.2") as server:
        yield server


def opened(
    file: FileObject, access: Access | None = None, limits: FetchLimits = ONCE
) -> tuple[bytes, int | None, str | None]:
    """Content, announced size and media type."""

    async def read() -> tuple[bytes, int | None, str | None]:
        async with remotes(limits, access or Access()) as remote:
            stream = await remote.open(file)
            try:
                body = b""
                while chunk := await stream.read():
                    body += chunk
            finally:
                await stream.close()
            return body, stream.size, stream.content_type

    return asyncio.run(read())


def refused(file: FileObject, access: Access | None = None, limits: FetchLimits = ONCE) -> str:
    """Why it cannot be had; and the assertion that nothing of file or operator can be seen in the traceback."""
    try:
        opened(file, access, limits)
    except Unreachable as error:
        assert error.__cause__ is None
        assert error.__context__ is None
        shown = traceback.format_exc() + repr(error)
        for secret in (SECRET, "://", "127.0.0.", "169.254"):
            assert secret not in shown
        return error.words
    raise AssertionError("it was fetched")


# URLs with a method and headers


def test_an_owners_headers_and_method_are_sent(file_server: FileServer) -> None:
    """A file behind an API key, asked for by POST, arrives with its size and type."""
    headers = {"X-Api-Key": SECRET, "Authorization": f"Bearer {SECRET}"}
    url = file_server.add(b"a,b", methods=("POST",), wants=headers, headers={"Content-Type": "text/csv; charset=x"})
    assert (b"a,b", 3, "text/csv") == opened(UrlFile(url=url, method="POST", headers=headers))
    assert "answered 401" == refused(UrlFile(url=url, method="POST", headers={"X-Api-Key": "guess"}))
    assert "answered 405" == refused(UrlFile(url=url, headers=headers))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_owners_headers_do_not_leave_its_server(
    file_server: FileServer, elsewhere: FileServer, status: int, method: str
) -> None:
    """They follow a redirect on the same server, and none to another one, nor back from there."""
    anything = ("GET", "POST")
    home = file_server.add(b"back", name="home", methods=anything)
    away = elsewhere.add(redirect_to=home, name="away", status=status, methods=anything)
    near = file_server.add(redirect_to=away, name="near", status=status, methods=anything)
    start = file_server.add(redirect_to=near, name="start", status=status, methods=anything)
    headers = {"X-Api-Key": SECRET, "Authorization": SECRET, "cookie": SECRET, "User-Agent": SECRET}
    file = UrlFile.model_validate({"url": start, "method": method, "headers": headers})
    assert b"back" == opened(file)[0]
    assert ["/start", "/near", "/home"] == [request.target for request in file_server.received]
    assert [True, True, False] == [SECRET in str(request.headers) for request in file_server.received]
    (request,) = elsewhere.received
    assert SECRET not in str(request)


@pytest.mark.parametrize(
    "header", ["Host", "content-length", "Transfer-Encoding", "Connection", "Proxy-Authorization", "Expect"]
)
def test_headers_that_are_not_the_owners(file_server: FileServer, header: str) -> None:
    """What steers the connection or the address of a request is refused before there is one."""
    file = UrlFile(url=file_server.add(b"x", name=SECRET), headers={header: SECRET})
    assert "refused: it sets a header that is not its owner's to set" == refused(file)
    assert not file_server.received


def test_a_file_with_headers_is_tried_again(file_server: FileServer, tmp_path: Path) -> None:
    """Tries, Retry-After and all else of fetching are the same for every kind."""
    file = UrlFile(url=file_server.add(b"x", fail_times=2), headers={"X-Api-Key": SECRET})
    fetch_inputs([InputSource("a", 0, (file,))], tmp_path, LOOPBACK)
    assert b"x" == (tmp_path / "a" / "0").read_bytes()


def test_size_and_type_are_known_before_anything_is_read(file_server: FileServer) -> None:
    """Who only wants to know about a file opens it and reads nothing."""
    url = file_server.add(size=300 * MIB)

    async def look() -> tuple[int | None, str | None]:
        async with remotes(ONCE, Access()) as remote:
            stream = await remote.open(UrlFile(url=url))
            await stream.close()
            return stream.size, stream.content_type

    assert (300 * MIB, "application/octet-stream") == asyncio.run(look())


# IPFS: blocks as Kubo and others make them


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def unixfs(kind: int, data: bytes = b"", sizes: tuple[int, ...] = (), total: int | None = None) -> bytes:
    whole = len(data) + sum(sizes) if total is None else total
    return (
        field(1, kind)
        + (field(2, data) if data else b"")
        + field(3, whole)
        + b"".join(field(4, size) for size in sizes)
    )


def node(inner: bytes, links: tuple[CID, ...] = ()) -> bytes:
    """A block of DAG-PB: links with hash, empty name and size, then the data."""
    return b"".join(field(2, field(1, bytes(cid)) + field(2, b"") + field(3, 1)) for cid in links) + field(1, inner)


class Gateway:
    """A trustless gateway on *server*: blocks by their identifiers, one at a time."""

    def __init__(self, server: FileServer) -> None:
        self.server = server
        self.access = Access(ipfs_gateway=f"{server.url}/gw/?token={SECRET}")
        self.asked: list[str] = []

    def put(self, block: bytes, codec: str = "raw", hash: str = "sha2-256", instead: bytes | None = None) -> CID:
        """Serve *block*, or *instead* of it something else under its identifier."""
        cid = CID("base32", 1, codec, (hash, multihash.get(hash).unwrap(multihash.digest(block, hash))))

        def answer(request: Received) -> web.Response:
            self.asked.append(request.target)
            if request.headers["Accept"] != "application/vnd.ipld.raw" or "format=raw" not in request.target:
                return web.Response(status=400)
            if f"token={SECRET}" not in request.target:
                return web.Response(status=401)
            return web.Response(body=block if instead is None else instead)

        self.server.on(f"gw/ipfs/{cid}", answer)
        return cid

    def tree(self, parts: list[bytes], width: int = 3) -> CID:
        """A file of raw leaves under as many levels of nodes as it takes."""
        level = [(self.put(part), len(part)) for part in parts]
        while len(level) > 1:
            groups = [level[at : at + width] for at in range(0, len(level), width)]
            level = [
                (
                    self.put(node(unixfs(2, sizes=tuple(n for _, n in group)), tuple(c for c, _ in group)), "dag-pb"),
                    sum(n for _, n in group),
                )
                for group in groups
            ]
        return level[0][0]


@pytest.fixture
def gateway(file_server: FileServer) -> Gateway:
    return Gateway(file_server)


def ipfs(cid: CID | str) -> IpfsFile:
    return IpfsFile(type="ipfs", hash=str(cid))


def test_a_file_of_one_block(gateway: Gateway) -> None:
    """A raw block is the file."""
    assert (b"one block", 9, None) == opened(ipfs(gateway.put(b"one block")), gateway.access)


def test_a_file_of_many_blocks_arrives_in_order(gateway: Gateway) -> None:
    """Leaves of several levels come in the order of the file; its size is known from its root."""
    parts = [bytes([n]) * (1000 + n) for n in range(50)]
    body = b"".join(parts)
    assert (body, len(body), None) == opened(ipfs(gateway.tree(parts)), gateway.access)
    assert len(gateway.asked) == len(set(gateway.asked))


def test_blocks_are_asked_for_ahead(gateway: Gateway) -> None:
    """Blocks come side by side, not one round trip after the other, and never all at once."""
    parts = [bytes([n]) for n in range(100)]
    assert b"".join(parts) == opened(ipfs(gateway.tree(parts, width=100)), gateway.access)[0]
    assert 1 < gateway.server.most_at_once <= AHEAD + 1


def test_files_of_older_make(gateway: Gateway) -> None:
    """Version 0 identifiers, leaves inside DAG-PB (types Raw and File), bytes beside links, an empty file."""
    leaves = [node(unixfs(0, b"raw ")), node(unixfs(2, b"file "))]
    cids = [gateway.put(leaf, "dag-pb") for leaf in leaves]
    root = gateway.put(node(unixfs(2, b"first ", (4, 5)), tuple(cids)), "dag-pb")
    assert b"first raw file " == opened(ipfs(root), gateway.access)[0]
    block = node(unixfs(2, b"old"))
    old = CID("base58btc", 0, "dag-pb", ("sha2-256", hashlib.sha256(block).digest()))
    gateway.server.on(f"gw/ipfs/{old}", lambda request: web.Response(body=block))
    assert str(old).startswith("Qm")
    assert b"old" == opened(ipfs(old), gateway.access)[0]
    assert (b"", 0, None) == opened(ipfs(gateway.put(node(unixfs(2)), "dag-pb")), gateway.access)


def test_an_identifier_may_hold_the_file_itself(gateway: Gateway) -> None:
    """A few bytes are in the identifier; nobody is asked for them."""
    cid = CID("base32", 1, "raw", ("identity", b"inline"))
    assert b"inline" == opened(ipfs(cid), gateway.access)[0]
    assert not gateway.asked


@pytest.mark.parametrize("hash", ["sha2-512", "sha3-256", "blake2b-256"])
def test_strong_hash_functions(gateway: Gateway, hash: str) -> None:
    assert b"strong" == opened(ipfs(gateway.put(b"strong", hash=hash)), gateway.access)[0]


@pytest.mark.parametrize("lie", [b"another block", b"", SECRET.encode()])
def test_a_lying_gateway(gateway: Gateway, lie: bytes) -> None:
    """A block that is not the one asked for is not believed, wherever in the file it is, and not asked for again."""
    words = "what came does not match its content identifier"
    three = LOOPBACK
    assert words == refused(ipfs(gateway.put(b"the block", instead=lie)), gateway.access, three)
    leaf = gateway.put(b"the leaf", instead=lie)
    root = gateway.put(node(unixfs(2, sizes=(2, 8)), (gateway.put(b"ok"), leaf)), "dag-pb")
    assert words == refused(ipfs(root), gateway.access, three)
    assert 4 == len(gateway.asked)


def test_a_lying_gateway_leaves_no_file(gateway: Gateway, tmp_path: Path) -> None:
    leaf = gateway.put(b"the leaf", instead=b"a lie")
    root = gateway.put(node(unixfs(2, sizes=(2, 8)), (gateway.put(b"ok"), leaf)), "dag-pb")
    with pytest.raises(Exception, match=r"file 1 of 1: what came does not match its content identifier$"):
        fetch_inputs([InputSource("a", 0, (ipfs(root),))], tmp_path, LOOPBACK, access=gateway.access)
    assert [] == list((tmp_path / "a").iterdir())


def test_a_block_that_is_too_large(gateway: Gateway) -> None:
    """No block is held in memory that peers would not exchange, true or not."""
    cid = gateway.put(bytes(LARGEST_BLOCK + 1))
    assert f"at the IPFS gateway: answers with more than {LARGEST_BLOCK} bytes" == refused(ipfs(cid), gateway.access)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (node(unixfs(1)), "it is a folder; name a file in it"),
        (node(unixfs(5)), "it is a folder; name a file in it"),
        (node(unixfs(4, b"/etc/passwd")), "it is neither a file nor a folder of IPFS"),
        (node(b""), "it is neither a file nor a folder of IPFS"),
        (b"\xff" * 20, "it is not a proper file of IPFS"),
        (field(1, b"x" * 300)[:100], "it is not a proper file of IPFS"),
        (b"\x09" + b"x" * 8, "it is not a proper file of IPFS"),
        (node(unixfs(2, sizes=(1,)), (CID("base32", 1, "dag-cbor", ("sha2-256", b"x" * 32)),)), "its content identif"),
        (
            node(unixfs(2, sizes=(1,)), (CID("base32", 1, "raw", ("sha1", b"x" * 20)),)),
            "its content identifier is made",
        ),
        (node(unixfs(2, b"abc", total=4)), "its sizes do not add up"),
        (node(unixfs(2, sizes=(1, 2)), (CID("base32", 1, "raw", ("identity", b"x")),)), "its sizes do not add up"),
        (node(unixfs(2, sizes=(0,)), (CID("base32", 1, "raw", ("identity", b"")),)), "its sizes do not add up"),
        (node(unixfs(2, sizes=(9,)), (CID("base32", 1, "raw", ("identity", b"x")),)), "its sizes do not add up"),
    ],
)
def test_blocks_that_are_no_files(gateway: Gateway, block: bytes, words: str) -> None:
    """True blocks of something else are refused in words, each for its reason."""
    assert refused(ipfs(gateway.put(block, "dag-pb")), gateway.access).startswith(words)


def test_a_tree_that_is_too_deep(gateway: Gateway) -> None:
    """Levels of nodes with one link each end somewhere."""
    cid = gateway.put(b"x")
    for _ in range(DEEPEST + 1):
        cid = gateway.put(node(unixfs(2, sizes=(1,)), (cid,)), "dag-pb")
    assert "it has too many parts" == refused(ipfs(cid), gateway.access)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("QmNoContentIdentifier", "it is not a content identifier"),
        ("hush5b1e7c0dhush5b1e7c0d", "it is not a content identifier"),
        (str(CID("base32", 1, "dag-cbor", ("sha2-256", b"x" * 32))), "its content identifier is not that of a file"),
        (str(CID("base32", 1, "libp2p-key", ("sha2-256", b"x" * 32))), "its content identifier is not that of a file"),
        (str(CID("base32", 1, "raw", ("sha1", b"x" * 20))), "its content identifier is made with a hash function"),
        (str(CID("base32", 1, "raw", ("md5", b"x" * 16))), "its content identifier is made with a hash function"),
    ],
)
def test_identifiers_that_are_refused(gateway: Gateway, text: str, reason: str) -> None:
    """Told before a gateway is asked."""
    with pytest.raises(ForbiddenUrl, match=f"^{reason}"):
        check_file(ipfs(text), ONCE, gateway.access)
    assert not gateway.asked


def test_an_identifier_that_holds_too_much() -> None:
    with pytest.raises(NotThatFile, match="holds too much itself"):
        parse_cid(str(CID("base32", 1, "raw", ("identity", b"x" * 129))))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_node_or_refused(block: bytes) -> None:
    """Whatever a block holds, it is read or refused, and nothing else is raised."""
    cid = CID("base32", 1, "dag-pb", ("sha2-256", hashlib.sha256(block).digest()))
    check_block(cid, block)
    try:
        found = read_node(cid, block)
    except NotThatFile:
        return
    assert found.size == len(found.data) + sum(link.size for link in found.links)


@given(st.binary(max_size=100), st.integers(0, 99))
def test_a_changed_byte_is_noticed(block: bytes, at: int) -> None:
    cid = CID("base32", 1, "raw", ("sha2-256", hashlib.sha256(block).digest()))
    changed = bytearray(block or b"x")
    changed[at % len(changed)] ^= 1
    with pytest.raises(NotThatFile):
        check_block(cid, bytes(changed))


def test_a_block_is_asked_for_again(gateway: Gateway, file_server: FileServer) -> None:
    """A gateway that fails once in the middle of a file costs one block, not the file."""
    good, late = gateway.put(b"good"), gateway.put(b"late")
    root = gateway.put(node(unixfs(2, sizes=(4, 4)), (good, late)), "dag-pb")
    failed: list[str] = []

    def answer(request: Received) -> web.Response:
        if not failed:
            failed.append(request.target)
            return web.Response(status=503)
        return web.Response(body=b"late")

    file_server.on(f"gw/ipfs/{late}", answer)
    assert b"goodlate" == opened(ipfs(root), gateway.access, LOOPBACK)[0]
    assert 2 == len(gateway.asked)


def test_a_gateway_that_is_down(gateway: Gateway) -> None:
    cid = CID("base32", 1, "raw", ("sha2-256", b"x" * 32))
    assert "at the IPFS gateway: answered 404" == refused(ipfs(cid), gateway.access)
    down = Access(ipfs_gateway=f"http://127.0.0.1:{free_port()}/{SECRET}")
    two = ONCE.model_copy(update={"attempts": 2})
    assert "at the IPFS gateway: refuses connections (2 tries)" == refused(ipfs(cid), down, two)


def test_a_gateway_may_be_inside_the_house(gateway: Gateway) -> None:
    """It is the operator's choice; the same address named by a consumer is refused."""
    strict = FetchLimits(attempts=1)
    cid = gateway.put(b"inside")
    assert b"inside" == opened(ipfs(cid), gateway.access, strict)[0]
    assert "address is not public" == refused(UrlFile(url=f"{gateway.server.url}/gw/ipfs/{cid}"), None, strict)


# Arweave


def test_a_transaction_of_arweave(file_server: FileServer) -> None:
    url = file_server.add(b"permanent", name=f"ar/{TRANSACTION}", headers={"Content-Type": "text/plain"})
    file = ArweaveFile(type="arweave", transaction_id=TRANSACTION)
    access = Access(arweave_gateway=f"{file_server.url}/ar")
    assert (b"permanent", 9, "text/plain") == opened(file, access, FetchLimits())
    assert file_server.requests[url] == 1


def test_a_transaction_that_is_not_confirmed(file_server: FileServer) -> None:
    """A gateway's 202 is no content, and may be otherwise a moment later."""
    answers = [web.Response(status=202, text="Pending"), web.Response(body=b"now")]
    file_server.on(TRANSACTION, lambda request: answers.pop(0))
    file = ArweaveFile(type="arweave", transaction_id=TRANSACTION)
    access = Access(arweave_gateway=file_server.url)
    assert "its transaction is not confirmed yet" == refused(file, access)
    assert b"now" == opened(file, access)[0]


def test_a_gateway_sends_on_to_another_server(file_server: FileServer, elsewhere: FileServer) -> None:
    """Gateways have a host for each file; it is fetched from as if a consumer had named it, so not in the house."""
    file = ArweaveFile(type="arweave", transaction_id=TRANSACTION)
    file_server.add(redirect_to=elsewhere.add(b"sandboxed", name=SECRET), name=TRANSACTION)
    access = Access(arweave_gateway=file_server.url)
    assert b"sandboxed" == opened(file, access, ONCE)[0]
    assert "at the Arweave gateway: address is not public" == refused(file, access, FetchLimits(attempts=1))
    assert 1 == len(elsewhere.received)


# GraphQL

SCHEMA: Final = GraphQLSchema(
    GraphQLObjectType(
        "Query",
        {
            "hello": GraphQLField(
                GraphQLString,
                args={"name": GraphQLArgument(GraphQLString)},
                resolve=lambda _root, _info, name="world": f"hello {name}",
            )
        },
    )
)


def answer_graphql(request: Received) -> web.Response:
    if request.method != "POST" or request.headers.get("X-Api-Key") != SECRET:
        return web.Response(status=401)
    asked = json.loads(request.body)
    result = graphql_sync(SCHEMA, asked["query"], variable_values=asked["variables"])
    return web.json_response(result.formatted, content_type="application/graphql-response+json")


def graphql(url: str, query: str = "query Q($n: String) { hello(name: $n) }", **more: Any) -> GraphqlFile:
    return GraphqlFile.model_validate(
        {"type": "graphql", "url": url, "query": query, "headers": {"X-Api-Key": SECRET}, **more}
    )


def test_the_answer_to_a_query_is_the_file(file_server: FileServer) -> None:
    """Query, variables and headers go to the endpoint; its whole answer, in JSON, is what arrives."""
    url = file_server.on("graphql", answer_graphql)
    body, size, content_type = opened(graphql(url, variables={"n": "ocean"}))
    assert {"data": {"hello": "hello ocean"}} == json.loads(body)
    assert (len(body), "application/graphql-response+json") == (size, content_type)


def test_a_query_that_fails(file_server: FileServer) -> None:
    """Errors without data are no file, though the status says 200; nothing of them is quoted."""
    url = file_server.on("graphql", answer_graphql)
    assert "answered with errors and no data" == refused(graphql(url, query="{ nothing }"))
    assert "answered 401" == refused(graphql(url, headers={}))
    assert "did not answer in JSON as GraphQL has it" == refused(
        graphql(file_server.on("html", lambda _: web.Response(text=f"<html>{SECRET}</html>")))
    )


def test_a_long_answer_is_streamed(file_server: FileServer) -> None:
    """One with data in it is not held in memory to be looked into."""
    body = json.dumps({"data": {"rows": "x" * (3 * LARGEST_REFUSAL)}}).encode()
    url = file_server.on("graphql", lambda _: web.Response(body=body, content_type="application/json"))
    assert (body, len(body), "application/json") == opened(graphql(url))


@pytest.mark.parametrize("status", [302, 307, 308])
def test_a_query_is_not_sent_on(file_server: FileServer, elsewhere: FileServer, status: int) -> None:
    """Neither query nor headers follow a redirect to another server."""
    away = elsewhere.on("graphql", lambda _: web.json_response({"data": {}}))
    url = file_server.add(redirect_to=away, status=status, methods=("POST",))
    file = graphql(url, query=f'{{ hello(name: "{SECRET}") }}')
    if status == 302:
        assert b'{"data": {}}' == opened(file)[0]
        assert [("GET", b"")] == [(request.method, request.body) for request in elsewhere.received]
    else:
        assert "refused: it redirects what is sent to it to another server" == refused(file)
    assert SECRET not in str(elsewhere.received)


# Contracts: programs of a few bytes in a real node

CHAIN: Final = 31337
CONTRACT: Final = "0x00000000000000000000000000000000000c0dE5"
ECHO: Final = bytes.fromhex("600436038060045f375ff3")
"""Returns its arguments: copies the call without its selector and returns that."""


def says(data: bytes, end: int = 0xF3) -> bytes:
    """A program that returns *data*, or with *end* 0xfd refuses with it."""
    size = len(data).to_bytes(2, "big")
    return b"\x61" + size + b"\x80\x60\x0a\x5f\x39\x5f" + bytes([end]) + data


@pytest.fixture(scope="module")
def node_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Ethereum node, a throw-away chain in it."""
    from cli.local_chain import Node  # noqa: PLC0415 - web3 takes seconds, and only these tests need it

    with Node(tmp_path_factory.mktemp("chain"), chain_id=CHAIN) as node:
        yield node.url


def deploy(node_url: str, program: bytes) -> None:
    body = {"jsonrpc": "2.0", "id": 1, "method": "anvil_setCode", "params": [CONTRACT, f"0x{program.hex()}"]}
    assert "error" not in httpx.post(node_url, json=body).raise_for_status().json()


def view(inputs: list[Any], outputs: list[Any], arguments: Mapping[str, Any] | None = None, **more: Any) -> Any:
    abi = {"type": "function", "name": "read", "stateMutability": "view", "inputs": inputs, "outputs": outputs}
    return SmartContractFile.model_validate(
        {
            "type": "smartcontract",
            "address": CONTRACT.lower(),
            "chainId": CHAIN,
            "abi": abi,
            "arguments": arguments or {},
            **more,
        }
    )


def chains(url: str) -> Access:
    return Access(chains={CHAIN: url})


def typed(*kinds: str) -> list[dict[str, Any]]:
    return [{"name": f"a{n}", "type": kind} for n, kind in enumerate(kinds)]


@pytest.mark.chain
def test_a_value_of_a_contract_is_the_file(node_url: str) -> None:
    """One output as it is, in JSON."""
    deploy(node_url, says(encode(["string"], ["hello from the chain"])))
    body, size, content_type = opened(view([], typed("string")), chains(node_url))
    assert b'"hello from the chain"' == body
    assert (len(body), "application/json") == (size, content_type)


@pytest.mark.chain
def test_arguments_by_name_and_values_of_every_type(node_url: str) -> None:
    """What goes in by name, whatever its order, comes out in the order of the outputs, exact in any reader of JSON."""
    deploy(node_url, ECHO)
    kinds = [
        *typed("uint256", "int64", "bool", "bytes32", "bytes", "address", "string[]", "uint8[2][]"),
        {
            "name": "a8",
            "type": "tuple",
            "components": [{"name": "x", "type": "uint256"}, {"name": "y", "type": "string"}],
        },
    ]
    arguments = {
        "a8": {"y": "why", "x": str(2**200)},
        "a7": [[1, 2], [3, 4]],
        "a6": ["a", "ü"],
        "a5": CONTRACT.lower(),
        "a4": "0x0102",
        "a3": "0x" + "11" * 32,
        "a2": True,
        "a1": -5,
        "a0": 2**53,
    }
    assert [
        str(2**53),
        -5,
        True,
        "0x" + "11" * 32,
        "0x0102",
        CONTRACT,
        ["a", "ü"],
        [[1, 2], [3, 4]],
        [str(2**200), "why"],
    ] == json.loads(opened(view(kinds, kinds, arguments), chains(node_url))[0])


@pytest.mark.chain
@pytest.mark.parametrize(
    "arguments", [{}, {"a0": SECRET}, {"a0": -1}, {"a0": 1, SECRET: 2}, {"a0": 2**256}, {"a0": [1]}, {"a0": None}]
)
def test_arguments_that_do_not_fit(node_url: str, arguments: Mapping[str, Any]) -> None:
    deploy(node_url, ECHO)
    words = refused(view(typed("uint256"), typed("uint256"), arguments), chains(node_url))
    assert "its arguments do not fit its function" == words


@pytest.mark.chain
def test_a_contract_that_does_not_answer(node_url: str) -> None:
    """A refusal, no contract at all, and an answer of another shape."""
    deploy(node_url, says(bytes.fromhex("08c379a0") + encode(["string"], [SECRET]), end=0xFD))
    assert "the contract refuses the call" == refused(view([], typed("string")), chains(node_url))
    deploy(node_url, b"")
    assert "there is no such function at that address" == refused(view([], typed("string")), chains(node_url))
    deploy(node_url, says(b"short"))
    assert "there is no such function at that address" == refused(view([], typed("string")), chains(node_url))


@pytest.mark.chain
def test_a_contract_cannot_have_this_machine_fetch_for_it(node_url: str, file_server: FileServer) -> None:
    """EIP-3668: a contract that refuses with a URL to look at is refused, and the URL is not looked at."""
    url = file_server.add(b"{}", name=SECRET)
    lookup = encode(
        ["address", "string[]", "bytes", "bytes4", "bytes"],
        [CONTRACT, [f"{url}/{{sender}}/{{data}}.json"], b"", b"", b""],
    )
    deploy(node_url, says(bytes.fromhex("556f1830") + lookup, end=0xFD))
    assert "the contract refuses the call" == refused(view([], typed("string")), chains(node_url))
    assert not file_server.received


def test_a_node_that_is_down_or_strange(file_server: FileServer, elsewhere: FileServer) -> None:
    """Its URL holds a key and is shown by no failure."""
    file = view([], typed("string"))
    at = "at the node of its chain: "
    assert f"{at}refuses connections" == refused(file, chains(f"http://127.0.0.1:{free_port()}/{SECRET}"))
    assert f"{at}answered 429" == refused(file, chains(file_server.add(status=429, name=SECRET, methods=("POST",))))
    html = file_server.on(f"html/{SECRET}", lambda _: web.Response(text=f"<html>{SECRET}"))
    assert refused(file, chains(html)).startswith("could not be read (")
    error = {"jsonrpc": "2.0", "id": 0, "error": {"code": -32000, "message": SECRET}}
    strange = file_server.on(f"error/{SECRET}", lambda _: web.json_response(error))
    assert "the node of its chain refuses the call" == refused(file, chains(strange))
    hanging = file_server.add(hang=True, name=f"hang/{SECRET}", methods=("POST",))
    impatient = ONCE.model_copy(update={"seconds_silent": 0.3})
    assert f"{at}did not answer within 0.3 s" == refused(file, chains(hanging), impatient)
    away = elsewhere.add(b"{}", methods=("POST",))
    moved = file_server.add(redirect_to=away, status=307, methods=("POST",))
    assert f"{at}redirects to another server" == refused(file, chains(moved))
    assert not elsewhere.received


# What no kind does


def through_every_kind(server: FileServer, target: str) -> list[tuple[str, FileObject, Access]]:
    """*target* named, or redirected to, by each kind of file there is."""

    def moved(path: str, status: int = 302) -> str:
        return server.add(redirect_to=target, name=path, status=status, methods=("GET", "POST"))

    cid = CID("base32", 1, "raw", ("sha2-256", b"x" * 32))
    for path in (f"ipfs/{cid}", TRANSACTION):
        moved(path)
    return [
        ("GET", UrlFile(url=target), Access()),
        ("headers", UrlFile(url=target, headers={"Metadata": "true"}), Access()),
        ("POST", UrlFile(url=target, method="POST"), Access()),
        ("GET, moved", UrlFile(url=moved("a")), Access()),
        ("headers, moved", UrlFile(url=moved("b"), headers={"Metadata": "true"}), Access()),
        ("POST, moved", UrlFile(url=moved("c", 307), method="POST"), Access()),
        ("graphql", graphql(target), Access()),
        ("graphql, moved", graphql(moved("d")), Access()),
        ("graphql, moved with its body", graphql(moved("e", 307)), Access()),
        ("ipfs, moved", ipfs(cid), Access(ipfs_gateway=server.url)),
        (
            "arweave, moved",
            ArweaveFile(type="arweave", transaction_id=TRANSACTION),
            Access(arweave_gateway=server.url),
        ),
        ("contract, moved", view([], []), chains(moved("f", 307))),
    ]


def test_the_metadata_service_is_out_of_reach(file_server: FileServer) -> None:
    """No kind of file leads to the address that hands a machine its secrets, named or redirected to."""
    for kind, file, access in through_every_kind(file_server, METADATA):
        words = refused(file, access)
        assert words.endswith(("address is not public", "to another server")), (kind, words)


def test_a_server_in_the_house_gets_no_request(file_server: FileServer, elsewhere: FileServer) -> None:
    """The same, seen from the server that nobody may reach."""
    only_the_first = ONCE.model_copy(update={"networks": ("127.0.0.1/32",)})
    for kind, file, access in through_every_kind(file_server, elsewhere.add(b"inside", methods=("GET", "POST"))):
        words = refused(file, access, only_the_first)
        assert words.endswith(("address is not public", "to another server")), (kind, words)
    assert not elsewhere.received


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (ipfs("Qm" + "x" * 44), "no gateway to IPFS is configured here"),
        (ArweaveFile(type="arweave", transaction_id=TRANSACTION), "no gateway to Arweave is configured here"),
        (view([], []), "its chain is not configured here"),
        (UrlFile(url="s3://a/b"), "its scheme is not one of http, https"),
        (graphql(f"https://a:{SECRET}@b/"), "it carries credentials"),
    ],
)
def test_what_can_be_told_without_asking(file: FileObject, reason: str) -> None:
    """Nothing is asked of the network for a file that cannot be had here."""
    with pytest.raises(ForbiddenUrl) as caught:
        check_file(file, FetchLimits(), Access())
    assert reason == caught.value.reason
    assert f"refused: {reason}" == refused(file, None, FetchLimits())


def test_how_sources_are_reached_is_not_printed() -> None:
    """Credentials of stores and keys of nodes are not in a repr."""
    assert SECRET not in repr(Access(storage_options={"s3": {"key": SECRET}}, chains={1: f"https://node/{SECRET}"}))


def test_every_kind_side_by_side(file_server: FileServer, gateway: Gateway, tmp_path: Path) -> None:
    """One input of several kinds, fetched together, in its order."""
    access = Access(ipfs_gateway=gateway.access.ipfs_gateway, arweave_gateway=file_server.url)
    file_server.add(b"arweave", name=TRANSACTION)
    files: tuple[FileObject, ...] = (
        UrlFile(url=file_server.add(b"url")),
        ipfs(gateway.tree([b"ip", b"fs"])),
        ArweaveFile(type="arweave", transaction_id=TRANSACTION),
        graphql(file_server.on("graphql", answer_graphql)),
    )
    fetched = fetch_inputs([InputSource("did:op:a", 0, files)], tmp_path, LOOPBACK, access=access)
    assert [b"url", b"ipfs", b"arweave", b'{"data": {"hello": "hello world"}}'] == [
        (tmp_path / "a" / str(file.position)).read_bytes() for file in fetched
    ]
