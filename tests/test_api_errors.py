"""What is answered when something is wrong: JSON, one object with ``error``, nothing of the request."""

from __future__ import annotations

import json
import logging
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api.app import create_app
from api.parameters import BodyTooLarge
from blocks.catalogue import Catalogues
from flows.broker import Broker
from flows.errors import AssetRefused, InvalidWorkflow, LinkExpired, MissingParameter, NotReady, Problem, Refusal
from flows.jobs import Job, JobQuery, MemoryJobs
from tests import factories
from tests.factories import Client, client, offers, settings

STATUS = "/api/v1/operator/status"
COMPUTE = "/api/v1/operator/compute"


class FailingJobs(MemoryJobs):
    """Raises what it was given, whatever is searched for."""

    fault: Exception = RuntimeError("hunter2")

    async def find(self, query: JobQuery) -> list[Job]:
        raise self.fault


@pytest.fixture(scope="module")
def jobs() -> FailingJobs:
    return FailingJobs(offers())


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory, jobs: FailingJobs) -> Iterator[Client]:
    with client(settings(tmp_path_factory.mktemp("api"), max_body_bytes=1000), jobs) as made:
        yield made


def every_refusal() -> list[Refusal]:
    def subclasses(of: type[Refusal]) -> Iterator[type[Refusal]]:
        for found in of.__subclasses__():
            yield found
            yield from subclasses(found)

    made: dict[type[Refusal], Refusal] = {
        MissingParameter: MissingParameter("owner", "GET:/status"),
        InvalidWorkflow: InvalidWorkflow([Problem("stages", "is required")]),
        BodyTooLarge: BodyTooLarge(5),
        AssetRefused: AssetRefused("dataset", "missing", "a text"),
    }
    return [
        made.get(found) or _plain(found)
        for found in subclasses(Refusal)
        if found.__module__.startswith(("api.", "flows."))
    ]


def _plain(refusal: type[Refusal]) -> Refusal:
    try:
        return refusal()
    except TypeError:
        return refusal("a text")


@pytest.mark.parametrize("refusal", every_refusal(), ids=lambda refusal: refusal.slug)
def test_every_refusal_is_answered_with_its_code_and_text(failing: Client, jobs: FailingJobs, refusal: Refusal) -> None:
    """4xx for the caller's faults, 503 where the service is in the way; slugs tell them apart."""
    jobs.fault = refusal
    answer = failing.get(STATUS, params={"owner": "0x1"})
    text = "Missing stages" if isinstance(refusal, InvalidWorkflow) else str(refusal)
    assert (refusal.http, text) == (answer.status_code, answer.json()["error"])
    assert ("retry-after" in answer.headers) is isinstance(refusal, NotReady)
    assert 1 == sum(other.slug == refusal.slug for other in every_refusal())


def test_a_bug_is_answered_without_a_word_and_logged_once(
    failing: Client, jobs: FailingJobs, caplog: pytest.LogCaptureFixture
) -> None:
    """The log tells where, not what the request held."""
    jobs.fault = RuntimeError("hunter2")
    with caplog.at_level(logging.INFO):
        answer = failing.get(STATUS, params={"owner": "0xhunter2"})
    assert (500, {"error": "internal error"}) == (answer.status_code, answer.json())
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert "RuntimeError" in record.getMessage()
    assert "GET /api/v1/operator/status failed" in record.getMessage()
    assert "hunter2" not in record.getMessage()


@pytest.mark.parametrize(
    ("method", "url", "code"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/api/v1/operator/status/", 404),
        ("GET", "/api/v1/operator/init", 405),
        ("PATCH", COMPUTE, 405),
        ("GET", "/api/results/forged/file", 404),
    ],
)
def test_what_is_not_there_is_answered_in_json(failing: Client, method: str, url: str, code: int) -> None:
    """Never HTML."""
    answer = failing.request(method, url)
    assert code == answer.status_code
    assert "application/json" == answer.headers["content-type"]
    assert ["error"] == list(answer.json())


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"{", "The body is not JSON: EOF while parsing an object at line 1 column 1"),
        (b"<html>", "The body is not JSON: expected value at line 1 column 1"),
        (b'{"owner": "\\ud800"}', "The body is not JSON: unexpected end of hex escape at line 1 column 18"),
        (b"[1]", "The body must be a JSON object"),
        (b'"text"', "The body must be a JSON object"),
        (b"null", "The body must be a JSON object"),
        (b'{"owner": "\xff"}', "The body is not UTF-8, from byte 11"),
        (b'{"owner": "1", "owner": "2"}', "owner: given more than once"),
        (b'{"workflow": {"a": [{"b": 1, "b": 2}]}}', "workflow.a.0.b: given more than once"),
        (b'{"workflow": {"maxtime": NaN}}', "workflow.maxtime: NaN is no JSON number"),
        (b'{"workflow": {"maxtime": -Infinity}}', "workflow.maxtime: -Infinity is no JSON number"),
        (b'{"index": 1e999}', "index: the number is out of range"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "a: nested more than 64 deep"),
    ],
)
def test_a_body_that_can_be_misread_is_refused(failing: Client, body: bytes, text: str) -> None:
    """400, naming the field."""
    answer = failing.request("GET", STATUS, content=body)
    assert (400, text) == (answer.status_code, answer.json()["error"])


@pytest.mark.parametrize(
    ("url", "body", "text"),
    [
        (f"{STATUS}?jobId=1&jobId=2", b"", "jobId: given more than once"),
        (f"{STATUS}?owner=0x1", b'{"owner": "0x2"}', "owner: the query string and the body differ"),
    ],
)
def test_a_parameter_has_one_value(failing: Client, url: str, body: bytes, text: str) -> None:
    """Two could be read as either."""
    answer = failing.request("GET", url, content=body)
    assert (400, text) == (answer.status_code, answer.json()["error"])


def test_a_body_may_be_announced_or_turn_out_too_large(failing: Client) -> None:
    """By Content-Length, or in chunks that tell nothing beforehand."""

    async def chunks() -> object:
        for _ in range(50):
            yield b" " * 100

    for content in (b" " * 1001, chunks()):
        answer = failing.post(COMPUTE, content=content)
        assert (413, "The body is larger than 1000 bytes") == (answer.status_code, answer.json()["error"])


def test_depth_and_digits_beyond_any_parser_are_refused(tmp_path: Path) -> None:
    """Bodies that make a JSON parser run out of stack, or an integer take minutes."""
    with client(settings(tmp_path)) as local:
        deep = local.post(COMPUTE, content=b'{"workflow":' * 200_000)
        long = local.post(COMPUTE, content=b'{"workflow": {"maxtime": ' + b"9" * 5_000 + b"}}")
    assert 400 == deep.status_code == long.status_code
    assert deep.json()["error"].startswith("The body is not JSON: recursion limit exceeded")
    assert long.json()["error"].startswith("The body is not JSON: number out of range")
    assert sys.getrecursionlimit() <= 1_000


def test_the_root_tells_every_endpoint_by_name(failing: Client) -> None:
    """Real clients find them there; each is one that answers, whatever it answers."""
    described = failing.get("/").json()
    assert {"software", "version", "providerAddresses", "chainIds", "serviceEndpoints"} == set(described)
    assert ["PUT", COMPUTE] == described["serviceEndpoints"]["operatorComputeStop"]
    for method, path in described["serviceEndpoints"].values():
        assert 405 != failing.request(method, path).status_code


def test_the_documentation_is_served(failing: Client) -> None:
    """/docs, over /openapi.json."""
    assert "swagger" in failing.get("/docs").text
    assert COMPUTE in json.loads(failing.get("/openapi.json").content)["paths"]


def test_an_expired_link_says_what_to_do(failing: Client, jobs: FailingJobs) -> None:
    """410, in the words of the refusal."""
    jobs.fault = LinkExpired()
    assert 410 == failing.get(STATUS, params={"owner": "1"}).status_code


# What fuzzing has found; tests/test_fuzz.py.


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PATCH", COMPUTE, "DELETE, GET, POST, PUT"),
        ("OPTIONS", "/api/services/compute", "DELETE, GET, POST, PUT"),
        ("DELETE", "/api/v1/operator/getResult", "GET, HEAD"),
        ("POST", "/api/results/token/name", "GET, HEAD"),
    ],
)
def test_a_method_that_is_not_there_is_answered_with_those_that_are(
    failing: Client, method: str, path: str, allowed: str
) -> None:
    """Each is a route of its own; Starlette's Allow tells the first."""
    answer = failing.request(method, path)
    assert (405, allowed) == (answer.status_code, answer.headers["allow"])


@pytest.mark.parametrize(
    "request_head",
    [b"hello\r\n\r\n", b"GET / HTTP/1.1\r\nAuthToken: \x00\r\n\r\n", b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n"],
)
def test_what_is_no_http_is_answered_in_json(tmp_path: Path, request_head: bytes) -> None:
    """By the server, before the app hears of it; uvicorn's own answer is plain text."""
    app = create_app(settings(tmp_path), Broker(jobs=MemoryJobs(offers()), catalogue=Catalogues([])))
    with (
        factories.serving(app) as url,
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as connection,
    ):
        connection.sendall(request_head)
        head, _, body = b"".join(iter(lambda: connection.recv(65_536), b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"content-type: application/json" in head
    assert ["error"] == list(json.loads(body))


def test_the_document_tells_errors_in_json(failing: Client) -> None:
    """Whatever media type the good answer has; and no 422, which this service never answers."""
    calls = _calls(failing)
    for call in calls.values():
        assert {"400", "500"} <= set(call["responses"])
        assert "422" not in call["responses"]
        for status, answer in call["responses"].items():
            assert int(status) < 400 or ["application/json"] == list(answer["content"]), (call["operationId"], status)
    assert {"text/plain"} == set(calls["operatorInit"]["responses"]["200"]["content"])
    assert {"200", "206", "416", "410"} <= set(calls["resultLink"]["responses"])
    assert {"201"} == {status for status in calls["encrypt"]["responses"] if status < "400"}
    assert {"operatorGetResultHead", "resultLinkHead"} <= set(calls)


def test_the_document_tells_what_is_taken(failing: Client) -> None:
    """Bounds, forms and every spelling; what may be left out is not told as an empty text."""
    calls = _calls(failing)
    start = calls["operatorComputeStart"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    output = start["workflow"]["anyOf"][0]["properties"]["stages"]["items"]["properties"]["output"]["properties"]
    assert {"publishoutput", "publishOutput", "metadataUri", "metadataUrl"} <= set(output)
    assert {"string", "integer", "number"} == {kind["type"] for kind in start["nonce"]["anyOf"]}
    query = {part["name"]: part for part in calls["computeResult"]["parameters"]}
    assert "^[0-9a-fA-F]{32}$" == query["jobId"]["schema"]["pattern"]
    assert "integer" == query["index"]["schema"]["type"]
    assert isinstance(query["nonce"]["example"], str)
    assert {"consumerAddress", "jobId", "index"} == {name for name, part in query.items() if part["required"]}


def _calls(client: Client) -> dict[str, Any]:
    paths = client.get("/openapi.json").json()["paths"].values()
    return {call["operationId"]: call for path in paths for call in path.values()}
