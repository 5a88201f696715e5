"""Results over HTTP: ranges, names, kinds, links."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlencode, urlsplit

import httpx
import pytest
import yaml
from cryptography.fernet import Fernet
from werkzeug.http import parse_options_header

from api.download import content_disposition
from api.links import Links
from cli.service import Service
from flows.errors import LinkExpired, NoSuchResult
from flows.jobs import Job, MemoryJobs
from flows.sealing import create_key_file
from flows.status import Status
from tests.conftest import DEFINITIONS
from tests.documents import stage
from tests.factories import OWNER, Client, client, offers, result, settings
from tests.s3_server import s3_server
from tests.test_end_to_end import Consumer, workflow

BODY = b"0123456789"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("api")


@pytest.fixture(scope="module")
def local(folder: Path) -> Iterator[Client]:
    with client(settings(folder)) as made:
        yield made


@pytest.fixture(scope="module")
def job_id(local: Client) -> str:
    job_id = local.started()
    local.jobs.publish(
        job_id,
        [result("digits.txt", BODY), result("empty", b""), result("x.html", b"<script>", media_type="a/b\r\nX: y")],
    )
    return job_id


@pytest.fixture(scope="module")
def url(local: Client, job_id: str) -> str:
    """The link to the ten digits."""
    (job,) = local.get("/api/v1/operator/compute", params={"jobId": job_id}).json()
    return str(job["results"][0]["url"])


def etag(body: bytes = BODY) -> str:
    return f'"{result("any", body)[0].sha256}"'


def test_a_whole_file_tells_its_length_kind_name_and_hash(local: Client, url: str) -> None:
    """And that it is no page of this service."""
    answer = local.get(url)
    assert (200, BODY) == (answer.status_code, answer.content)
    assert ("10", "text/plain", "bytes", etag(), "nosniff") == tuple(
        answer.headers[name]
        for name in ("content-length", "content-type", "accept-ranges", "etag", "x-content-type-options")
    )
    assert "attachment; filename=digits.txt" == answer.headers["content-disposition"]


def test_head_tells_the_same_without_the_file(local: Client, url: str, job_id: str) -> None:
    """On links and on getResult."""
    whole = local.get(url)
    result_url = f"/api/v1/operator/getResult?jobId={job_id}&index=0&owner={OWNER}"
    for head in (local.request("HEAD", url), local.request("HEAD", result_url)):
        assert (200, b"", whole.headers) == (head.status_code, head.content, head.headers)


@pytest.mark.parametrize(
    ("asked", "content", "content_range"),
    [
        ("bytes=0-0", b"0", "bytes 0-0/10"),
        ("bytes=2-4", b"234", "bytes 2-4/10"),
        ("bytes=7-", b"789", "bytes 7-9/10"),
        ("bytes=7-99", b"789", "bytes 7-9/10"),
        ("bytes=-3", b"789", "bytes 7-9/10"),
        ("bytes=-99", BODY, "bytes 0-9/10"),
    ],
)
def test_one_range_is_answered_alone(local: Client, url: str, asked: str, content: bytes, content_range: str) -> None:
    """206, RFC 9110 section 14."""
    answer = local.get(url, headers={"range": asked})
    assert (206, content, content_range, str(len(content))) == (
        answer.status_code,
        answer.content,
        answer.headers["content-range"],
        answer.headers["content-length"],
    )


@pytest.mark.parametrize(
    "asked", ["bytes=0-1,5-6", "bytes=5-2", "bytes=x-", "bytes=-0", "lines=1-2", "bytes", "bytes=" + "9" * 5000 + "-"]
)
def test_other_ranges_are_answered_with_the_whole(local: Client, url: str, asked: str) -> None:
    """Several at once, malformed ones, other units."""
    answer = local.get(url, headers={"range": asked})
    assert (200, BODY) == (answer.status_code, answer.content)
    assert "content-range" not in answer.headers


@pytest.mark.parametrize("asked", ["bytes=10-", "bytes=10-20", "bytes=99999999999999999999-"])
def test_a_range_outside_the_file_is_refused(local: Client, url: str, asked: str) -> None:
    """416 tells how long the file is."""
    answer = local.get(url, headers={"range": asked})
    assert (416, "bytes */10") == (answer.status_code, answer.headers["content-range"])
    assert {"error": "The range lies outside the file"} == answer.json()


@pytest.mark.parametrize(
    ("condition", "code"),
    [(etag(), 206), (etag(b"other"), 200), (f"W/{etag()}", 200), ("Wed, 21 Oct 2015 07:28:00 GMT", 200)],
)
def test_a_range_of_another_version_is_the_whole(local: Client, url: str, condition: str, code: int) -> None:
    """If-Range compares strongly; there is no date to compare with."""
    assert code == local.get(url, headers={"range": "bytes=1-2", "if-range": condition}).status_code


def test_an_empty_file_is_answered_whole(local: Client, job_id: str) -> None:
    """Any range of it lies outside."""
    url = f"/api/v1/operator/getResult?jobId={job_id}&index=1&owner={OWNER}"
    assert (200, b"") == (local.get(url).status_code, local.get(url).content)
    assert 416 == local.get(url, headers={"range": "bytes=0-"}).status_code
    assert 416 == local.get(url, headers={"range": "bytes=-1"}).status_code


def test_a_kind_that_is_no_header_is_replaced(local: Client, job_id: str) -> None:
    """An algorithm must not be able to write headers."""
    answer = local.get(f"/api/v1/operator/getResult?jobId={job_id}&index=2&owner={OWNER}")
    assert "application/octet-stream" == answer.headers["content-type"]
    assert "x" not in answer.headers


@pytest.mark.parametrize(
    "name",
    [
        "plain.txt",
        "with blank.txt",
        'quo"te\\.txt',
        "a;b=c.txt",
        "größe.csv",
        "文件.txt",
        "new\r\nX-Evil: 1",
        "'%41.txt",
        "",
    ],
)
def test_any_name_is_a_safe_header(name: str) -> None:
    """RFC 6266: a plain fallback, and the exact name by RFC 8187 where it differs."""
    header = content_disposition(f"folder/{name}")
    assert header.isascii()
    assert header.isprintable()
    kind, options = parse_options_header(header)
    assert "attachment" == kind
    assert (name or "result") == options["filename"] or name == unquote(header.partition("UTF-8''")[2])


def test_a_name_that_is_not_unicode_is_no_fault() -> None:
    """File systems hold any bytes; Python gives them as surrogates."""
    assert content_disposition("bad\udcff.bin").startswith("attachment; filename=bad.bin")


def test_a_link_ends_in_the_files_name_and_the_name_decides_nothing(local: Client, url: str) -> None:
    """Download tools take it from there."""
    assert url.endswith("/digits.txt")
    assert BODY == local.get(url.replace("digits.txt", "other/name.exe")).content


@pytest.mark.parametrize("place", [0, 10, -1])
def test_a_forged_link_is_unknown(local: Client, url: str, place: int) -> None:
    """One character of the token, anywhere."""
    token = urlsplit(url).path.split("/")[3]
    changed = "A" if token[place] != "A" else "Q"
    position = place % len(token)
    forged = token[:position] + changed + token[position + 1 :]
    assert 404 == local.get(f"/api/results/{forged}/digits.txt").status_code


def test_a_link_expires(folder: Path, job_id: str, local: Client) -> None:
    """410, and only for links that this service has made."""
    create_key_file(folder / "key")
    expired = Links(folder / "key", seconds=-1)
    token = expired.path(local.job(job_id), 0).split("/")[3]
    with pytest.raises(LinkExpired):
        expired.resolve(token)
    with pytest.raises(NoSuchResult):
        expired.resolve(token[:-1] + ("A" if token[-1] != "A" else "Q"))
    of = settings(folder).model_copy(update={"link_seconds": -1})
    with client(of, local.jobs) as late:
        answer = late.get(f"/api/results/{token}/f")
    assert (410, {"error": str(LinkExpired())}) == (answer.status_code, answer.json())


def finished(body: bytes = b"x") -> Job:
    """A job with one result."""
    return Job(
        id="0" * 32,
        owner="0x1",
        agreement_id="a",
        environment="default",
        status=Status.COMPLETED,
        created=datetime.now(UTC),
        results=(result("f", body)[0],),
    )


def test_a_link_is_for_the_file_it_was_made_for(tmp_path: Path) -> None:
    """A job that is started again may have another one in its place, which may be for fewer."""
    create_key_file(tmp_path / "key")
    links = Links(tmp_path / "key", 60)
    job = finished()
    _, index, mark = links.resolve(links.path(job, 0).split("/")[3])
    assert links.holds(job, index, mark)
    assert not links.holds(finished(b"y"), index, mark)
    assert not links.holds(replace(job, results=()), index, mark)


def test_links_outlive_a_new_key_while_the_old_one_is_listed(tmp_path: Path) -> None:
    """The newest key stands first in the key file."""
    file = tmp_path / "key"
    old, new = Fernet.generate_key(), Fernet.generate_key()
    file.write_bytes(old)
    job = finished()
    token = Links(file, 60).path(job, 0).split("/")[3]
    file.write_bytes(new + b"\n" + old)
    rotated = Links(file, 60)
    assert (job.id, 0) == rotated.resolve(token)[:2]
    newer = rotated.path(job, 0).split("/")[3]
    file.write_bytes(new)
    assert (job.id, 0) == Links(file, 60).resolve(newer)[:2]
    with pytest.raises(NoSuchResult):
        Links(file, 60).resolve(token)


def test_a_key_that_is_too_short_is_no_key(tmp_path: Path) -> None:
    """Refused at the start, not found guessable later."""
    (tmp_path / "key").write_bytes(b"changeme")
    with pytest.raises(ValueError, match="must hold the service's keys"):
        Links(tmp_path / "key", 60)


def test_the_link_to_a_deleted_job_is_unknown(local: Client) -> None:
    """However long it would have held."""
    job_id = local.started(agreementId="to be deleted")
    local.jobs.publish(job_id, [result("digits.txt", BODY)])
    (job,) = local.get("/api/v1/operator/status", params={"jobId": job_id}).json()
    assert 200 == local.get(job["outputsURL"][0]).status_code
    local.delete("/api/v1/operator/compute", params={"jobId": job_id})
    assert 404 == local.get(job["outputsURL"][0]).status_code


class InTheStore(MemoryJobs):
    """Jobs of an environment that has results fetched from its store."""

    async def link(self, job_id: str, index: int, disposition: str, media_type: str) -> str | None:
        return f"https://store.example/{job_id}/{index}?{urlencode({'name': disposition, 'type': media_type})}"


def test_where_the_store_has_it(folder: Path) -> None:
    """GET is sent on, with what the store is to call it, and kept by nobody; HEAD is answered here."""
    with client(settings(folder), InTheStore(offers())) as made:
        job_id = made.started()
        made.jobs.publish(job_id, [result("a b.txt", BODY)])
        (job,) = made.get("/api/v1/operator/compute", params={"jobId": job_id}).json()
        sent_on = made.get(job["results"][0]["url"], headers={"range": "bytes=2-4"})
        query = urlencode({"name": 'attachment; filename="a b.txt"', "type": "text/plain"})
        assert (307, f"https://store.example/{job_id}/0?{query}") == (sent_on.status_code, sent_on.headers["location"])
        assert ("no-store", "no-referrer") == (sent_on.headers["cache-control"], sent_on.headers["referrer-policy"])
        head = made.request("HEAD", job["results"][0]["url"])
        assert (200, "10") == (head.status_code, head.headers["content-length"])


@pytest.mark.worker
@pytest.mark.s3
@pytest.mark.slow
def test_results_are_had_from_the_store_itself(tmp_path: Path) -> None:
    """Over a real store that checks signatures; a client that follows redirects notices nothing."""
    with s3_server(tmp_path / "s3") as options:
        tests = yaml.safe_load(DEFINITIONS.read_text())
        default = tests["definitions"]["environments"][0]
        tests["definitions"]["environments"] = [
            {**default, "results": "s3://results/c2d", "results_options": options, "link_seconds": 60}
        ]
        tests["deployments"] = [
            each for each in tests["deployments"] if each["name"] in ("register-environments", "default")
        ]
        definitions = tmp_path / "prefect.yaml"
        definitions.write_text(yaml.safe_dump(tests))
        writes = "import os\nopen(os.environ['OUTPUTS'] + '/x.txt', 'w').write('0123456789')\n"
        with (
            Service(state=tmp_path / "state", definitions=definitions, variables={}) as service,
            httpx.Client(base_url=service.api_url, timeout=60.0) as http,
        ):
            consumer = Consumer(http)
            job_id = consumer.submit(workflow(stages=[stage(rawcode=writes)]))
            job = consumer.wait(job_id, lambda job: job["status"] == 70 and bool(job["results"]))
            (url,) = [found["url"] for found in job["results"] if found["filename"] == "x.txt"]
            sent_on = http.get(url)
            assert 307 == sent_on.status_code
            assert sent_on.headers["location"].startswith(f"{options['endpoint_url']}/results/c2d/")
            assert options["secret"] not in sent_on.headers["location"]
            got = http.get(url, headers={"range": "bytes=2-4"}, follow_redirects=True)
            assert b"234" == got.content  # rclone answers 200
            assert "attachment; filename=x.txt" == got.headers["content-disposition"]
            log = "".join(path.read_text() for path in (tmp_path / "state" / "logs").iterdir())
            assert "X-Amz-Signature" not in log
