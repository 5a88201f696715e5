"""Fetching: inputs, algorithms and what is handed from stage to stage; the guard on the way out."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event

import fsspec
import pytest
from cryptography.fernet import Fernet
from hypothesis import given
from hypothesis import strategies as st

from blocks.files import BadFile, IpfsFile, UrlFile, parse_files
from blocks.guard import is_allowed
from blocks.limits import MIB, FetchLimits
from blocks.remote import Access
from blocks.urls import ForbiddenUrl, check_url
from flows.sealing import Seal
from tasks.provision import (
    ORIGIN,
    AlgorithmUnreachable,
    FetchedFile,
    InputSource,
    InputUnreachable,
    configuration_log,
    fetch_algorithm,
    fetch_inputs,
    link_stage_outputs,
    write_parameters,
)
from tasks.stopping import Stopped
from tasks.workspace import Workspace
from tests.file_server import LOOPBACK, FileServer
from tests.s3_server import s3_server

SECRET = "hush-d41d8cd98f"


@pytest.fixture
def file_server() -> Iterator[FileServer]:
    with FileServer() as server:
        yield server


def one(*urls: str, did: str = "did:op:a1", index: int = 0) -> InputSource:
    return InputSource(did, index, tuple(UrlFile(url=url) for url in urls))


def limited(**changes: object) -> FetchLimits:
    return LOOPBACK.model_copy(update=changes)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def unreachable(urls: str | tuple[str, ...], into: Path, limits: FetchLimits = LOOPBACK) -> str:
    """The message of the failure, and the assertion that no secret of the URL can be seen in its traceback."""
    source = one(*([urls] if isinstance(urls, str) else urls))
    try:
        fetch_inputs([source], into, limits)
    except InputUnreachable as error:
        assert error.__cause__ is None
        assert error.__context__ is None
        shown = traceback.format_exc() + repr(error)
        assert SECRET not in shown
        assert "://" not in shown
        assert "127.0.0.1" not in shown
        return str(error)
    raise AssertionError("it was fetched")


# What arrives


def test_one_file_per_url_in_order(file_server: FileServer, tmp_path: Path) -> None:
    """Files come back in the order of the URLs, whatever order they arrive in."""
    urls = file_server.add(b"first", delay=0.2), file_server.add(b"second")
    fetched = fetch_inputs([one(*urls)], tmp_path, LOOPBACK)
    assert [(tmp_path / "a1" / n).read_bytes() for n in "01"] == [b"first", b"second"]
    assert [file.position for file in fetched] == [0, 1]
    assert hashlib.sha256(b"first").hexdigest() == fetched[0].sha256
    assert [file.size for file in fetched] == [5, 6]
    assert names(tmp_path / "a1") == ["0", "1"]


def test_inputs_with_the_same_id_do_not_overwrite_each_other(file_server: FileServer, tmp_path: Path) -> None:
    """The second input of an id goes on counting where the first one stopped, with or without the prefix."""
    sources = [
        one(file_server.add(b"a"), file_server.add(b"b")),
        one(file_server.add(b"c"), did="a1", index=1),
    ]
    fetch_inputs(sources, tmp_path, LOOPBACK)
    assert [(tmp_path / "a1" / n).read_bytes() for n in "012"] == [b"a", b"b", b"c"]


def test_content_type_is_the_servers_without_parameters(file_server: FileServer, tmp_path: Path) -> None:
    """What the server calls it is kept, for the log; nonsense is not."""
    good = file_server.add(b"a,b", headers={"Content-Type": "text/csv; charset=utf-8"})
    bad = file_server.add(b"a,b", headers={"Content-Type": f"no type at all {SECRET}"})
    fetched = fetch_inputs([one(good, bad)], tmp_path, LOOPBACK)
    assert [file.content_type for file in fetched] == ["text/csv", None]


def test_no_inputs_are_no_files(tmp_path: Path) -> None:
    """A stage without inputs needs no network."""
    assert fetch_inputs([], tmp_path, FetchLimits()) == ()


def test_a_repeat_overwrites(file_server: FileServer, tmp_path: Path) -> None:
    """The same fetch again gives the newer content."""
    url = file_server.add(b"old, and longer", name="x")
    fetch_inputs([one(url)], tmp_path, LOOPBACK)
    file_server.add(b"new", name="x")
    fetch_inputs([one(url)], tmp_path, LOOPBACK)
    assert (tmp_path / "a1" / "0").read_bytes() == b"new"


def test_an_empty_file_is_a_file(file_server: FileServer, tmp_path: Path) -> None:
    fetched = fetch_inputs([one(file_server.add(b""))], tmp_path, LOOPBACK)
    assert fetched[0].size == 0
    assert (tmp_path / "a1" / "0").read_bytes() == b""


def test_a_url_is_asked_for_as_it_is_spelt(file_server: FileServer, tmp_path: Path) -> None:
    """One GET, no HEAD; escapes and signs of a signed query are not respelt; spaces are escaped."""
    url = file_server.add(b"x", name="x")
    fetch_inputs([one(f"{url}?sig=%7Ea%2Fb+c&n=a b#part")], tmp_path, LOOPBACK)
    assert file_server.requests[url] == 1


def test_a_redirect_is_followed(file_server: FileServer, tmp_path: Path) -> None:
    target = file_server.add(b"there")
    fetch_inputs([one(file_server.add(redirect_to=target))], tmp_path, LOOPBACK)
    assert (tmp_path / "a1" / "0").read_bytes() == b"there"


def test_many_slow_inputs_arrive_side_by_side(file_server: FileServer, tmp_path: Path) -> None:
    """With the default limits fifty answers, each 200 ms late, cost far less than one after the other."""
    limits = FetchLimits(networks=LOOPBACK.networks)
    sources = [one(file_server.add(b"x", delay=0.2), did=f"did:op:{n}", index=n) for n in range(50)]
    started = time.monotonic()
    fetch_inputs(sources, tmp_path, limits)
    parallel = time.monotonic() - started
    started = time.monotonic()
    for source in sources[:4]:
        fetch_inputs([source], tmp_path, limits)
    serial = (time.monotonic() - started) / 4 * 50
    assert parallel < serial / 5
    assert 16 < file_server.most_at_once <= limits.connections_per_host


def test_connections_per_host_are_bounded(file_server: FileServer, tmp_path: Path) -> None:
    urls = [file_server.add(b"x", delay=0.05) for _ in range(12)]
    fetch_inputs([one(*urls)], tmp_path, limited(connections_per_host=3))
    assert file_server.most_at_once == 3


def test_progress_is_told_and_ends_complete(file_server: FileServer, tmp_path: Path) -> None:
    """The last report says all bytes and files, in the calling thread."""
    seen: list[tuple[int, int, int, int]] = []
    urls = file_server.add(size=3 * MIB), file_server.add(b"abc")
    fetch_inputs([one(*urls)], tmp_path, LOOPBACK, on_progress=lambda *report: seen.append(report))
    assert seen[-1] == (3 * MIB + 3, 3 * MIB + 3, 2, 2)
    assert seen == sorted(seen, key=lambda report: report[0])


MEASURE = """
import sys, psutil, threading, time
from pathlib import Path
from blocks.files import UrlFile
from tasks.provision import InputSource, fetch_inputs
from tests.file_server import LOOPBACK
url, small, into = sys.argv[1:]
fetch_inputs([InputSource("warm", 0, (UrlFile(url=small),))], Path(into), LOOPBACK)
me, peak = psutil.Process(), 0
before = me.memory_info().rss
def watch():
    global peak
    while True:
        peak = max(peak, me.memory_info().rss)
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
(file,) = fetch_inputs([InputSource("big", 0, (UrlFile(url=url),))], Path(into), LOOPBACK)
print(file.size, peak - before)
"""


def test_a_large_file_needs_little_memory(file_server: FileServer, tmp_path: Path) -> None:
    """300 MiB grow the process by less than a fifth of that."""
    urls = file_server.add(size=300 * MIB), file_server.add(b"small")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *urls, str(tmp_path)], capture_output=True, text=True, check=True
    )
    size, grown = map(int, done.stdout.split())
    assert size == 300 * MIB
    assert grown < 60 * MIB


# What goes wrong


def test_not_found_is_said_by_position_and_asked_once(file_server: FileServer, tmp_path: Path) -> None:
    """A 404 is not tried again, and the message names input and URL by number."""
    good = file_server.add(b"x")
    missing = f"{file_server.url}/{SECRET}?key={SECRET}"
    message = unreachable((good, missing), tmp_path)
    assert message == "input 0 (did:op:a1), URL 2 of 2: answered 404"
    assert file_server.requests[missing.partition("?")[0]] == 1


@pytest.mark.parametrize("status", [400, 401, 403, 410, 451])
def test_refusals_of_a_server_are_not_tried_again(file_server: FileServer, tmp_path: Path, status: int) -> None:
    url = file_server.add(status=status, name=SECRET)
    assert unreachable(url, tmp_path).endswith(f"answered {status}")
    assert file_server.requests[url] == 1


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_passing_troubles_are_tried_again(file_server: FileServer, tmp_path: Path, status: int) -> None:
    url = file_server.add(status=status, name=SECRET)
    assert unreachable(url, tmp_path, limited(attempts=2)).endswith(f"answered {status} (2 tries)")
    assert file_server.requests[url] == 2


def test_success_after_503(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.add(b"at last", fail_times=2)
    fetch_inputs([one(url)], tmp_path, LOOPBACK)
    assert (tmp_path / "a1" / "0").read_bytes() == b"at last"
    assert file_server.requests[url] == 3


def test_retry_after_is_honoured(file_server: FileServer, tmp_path: Path) -> None:
    """A server that asks for a second gets it."""
    url = file_server.add(b"x", fail_times=1, headers={"Retry-After": "1"})
    (file,) = fetch_inputs([one(url)], tmp_path, LOOPBACK)
    assert file.seconds >= 1


def test_no_answer_is_given_up(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.add(hang=True, name=SECRET)
    started = time.monotonic()
    message = unreachable(url, tmp_path, limited(seconds_silent=0.3, attempts=1))
    assert message.endswith("URL 1 of 1: did not answer within 0.3 s")
    assert time.monotonic() - started < 5


def test_the_deadline_of_a_stage_holds(file_server: FileServer, tmp_path: Path) -> None:
    """Whatever the single timeouts are, and it names what is missing."""
    urls = file_server.add(b"x"), file_server.add(hang=True, name=SECRET)
    message = unreachable(urls, tmp_path, limited(seconds_total=0.5))
    assert message == "input 0 (did:op:a1), URL 2 of 2: not here after 0.5 s in all"


def test_the_first_failure_cancels_the_rest(file_server: FileServer, tmp_path: Path) -> None:
    """A 404 does not wait for a hanging neighbour, and leaves no partial file."""
    urls = file_server.add(hang=True), file_server.add(size=50 * MIB), file_server.add(status=404, delay=0.1)
    started = time.monotonic()
    assert "URL 3 of 3" in unreachable(urls, tmp_path)
    assert time.monotonic() - started < 3
    assert not list(tmp_path.rglob("*.part"))


def test_a_short_body_is_an_error(file_server: FileServer, tmp_path: Path) -> None:
    """A connection cut in the middle is tried again and leaves no file that looks complete."""
    url = file_server.add(b"x" * 100_000, drop_after=1000, name=SECRET)
    message = unreachable(url, tmp_path, limited(attempts=2))
    assert message.endswith("broke off before its end (2 tries)")
    assert names(tmp_path / "a1") == []


def test_a_body_cut_once_is_counted_once(file_server: FileServer, tmp_path: Path) -> None:
    """What a failed try brought does not count against the ceiling, nor in the progress."""
    url = file_server.add(size=MIB, fail_times=1)
    seen: list[tuple[int, int, int, int]] = []
    fetch_inputs([one(url)], tmp_path, limited(total_bytes=MIB), on_progress=lambda *r: seen.append(r))
    assert seen[-1] == (MIB, MIB, 1, 1)


@pytest.mark.parametrize("announced", [True, False])
def test_too_many_bytes_over_all_inputs(file_server: FileServer, tmp_path: Path, announced: bool) -> None:
    """The ceiling holds for all inputs together, whether or not the servers say how much will come."""
    headers = None if announced else {"Content-Encoding": "identity"}
    sources = [one(file_server.add(size=MIB, headers=headers), did=did) for did in ("a", "b")]
    with pytest.raises(InputUnreachable, match=r"more than 1500000 bytes in all$"):
        fetch_inputs(sources, tmp_path, limited(total_bytes=1_500_000))
    assert not list(tmp_path.rglob("*.part"))


def test_a_name_that_does_not_resolve(tmp_path: Path) -> None:
    message = unreachable(f"http://{SECRET}.invalid/x", tmp_path)
    assert message.endswith("URL 1 of 1: its host name does not resolve")


def test_a_port_where_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    message = unreachable(f"http://127.0.0.1:{port}/{SECRET}", tmp_path, limited(attempts=2))
    assert message.endswith("refuses connections (2 tries)")


def test_a_server_that_does_not_speak_http(tmp_path: Path) -> None:
    """Neither its bytes nor its URL are in the message."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        greeter = (
            "import socket, sys\n"
            "server = socket.socket(fileno=int(sys.argv[1]))\n"
            "while True:\n"
            "    peer, _ = server.accept()\n"
            "    peer.recv(9999)\n"
            f"    peer.sendall(b'{SECRET} says hello\\r\\n\\r\\n')\n"
            "    peer.close()\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", greeter, str(server.fileno())], pass_fds=[server.fileno()]
        ) as process:
            message = unreachable(f"http://127.0.0.1:{port}/{SECRET}", tmp_path, limited(attempts=1))
            process.kill()
    assert message.endswith("did not answer in proper HTTP")


def test_an_id_that_is_no_file_name_is_a_bug(tmp_path: Path) -> None:
    """The compiler refuses them; one that comes here anyway writes nothing."""
    for did in ("did:op:../x", "did:op:", "..", "a/b", "a\0b"):
        with pytest.raises(ValueError, match="not a file name"):
            fetch_inputs([one("http://x.invalid", did=did)], tmp_path, LOOPBACK)
    assert names(tmp_path) == []


def test_a_source_does_not_print_its_urls() -> None:
    assert SECRET not in repr(one(f"http://x/{SECRET}"))


def test_a_file_that_is_no_url_is_called_a_file(file_server: FileServer, tmp_path: Path) -> None:
    """Kinds that need something of the operator's are refused where it is not configured, and said by position."""
    files = UrlFile(url=file_server.add(b"x")), IpfsFile(type="ipfs", hash="Qm" + SECRET.replace("-", "") * 3)
    with pytest.raises(InputUnreachable) as caught:
        fetch_inputs([InputSource("did:op:a1", 0, files)], tmp_path, LOOPBACK)
    assert str(caught.value) == "input 0 (did:op:a1), file 2 of 2: refused: no gateway to IPFS is configured here"
    with pytest.raises(AlgorithmUnreachable, match=r"^the algorithm's file: refused: no gateway"):
        fetch_algorithm(files[1], None, tmp_path / "algorithm", LOOPBACK)


# The guard


@pytest.mark.parametrize("host", ["127.0.0.1", "2130706433", "127.1", "localhost", "0.0.0.0", "[::ffff:127.0.0.1]"])
def test_loopback_is_refused_however_it_is_spelt(file_server: FileServer, tmp_path: Path, host: str) -> None:
    """Nothing is sent to a server in the house."""
    url = file_server.add(b"inside", name=SECRET)
    message = unreachable(f"http://{host}:{file_server.port}/{SECRET}", tmp_path, FetchLimits())
    assert message.endswith(("address is not public", "its host is an address that is not spelt as one"))
    assert file_server.requests[url] == 0


def test_a_redirect_into_the_house_is_refused(file_server: FileServer, tmp_path: Path) -> None:
    """The first server is allowed, the one it points to is not, and gets no request."""
    with socket.create_server(("127.0.0.2", 0)) as inside:
        inside.settimeout(0.2)
        target = f"http://127.0.0.2:{inside.getsockname()[1]}/{SECRET}"
        url = file_server.add(redirect_to=target, name=SECRET)
        message = unreachable(url, tmp_path, limited(networks=("127.0.0.1/32",)))
        with pytest.raises(TimeoutError):
            inside.accept()
    assert message.endswith("address is not public")
    assert file_server.requests[url] == 1


def test_a_redirect_may_not_leave_the_schemes(file_server: FileServer, tmp_path: Path) -> None:
    url = file_server.add(redirect_to=f"file:///etc/{SECRET}")
    assert unreachable(url, tmp_path).endswith("redirects to a URL that is not http")


def test_a_circle_of_redirects_ends(file_server: FileServer, tmp_path: Path) -> None:
    url = f"{file_server.url}/circle"
    file_server.add(redirect_to=url, name="circle")
    assert unreachable(url, tmp_path).endswith("redirects too often")
    assert file_server.requests[url] <= 10


@pytest.mark.parametrize(
    "address",
    [
        *("10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.100.100.200", "192.0.0.192"),
        *("168.63.129.16", "0.0.0.0", "224.0.0.1", "255.255.255.255", "198.18.0.1", "127.0.0.1"),
        *("::1", "::", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1", "fec0::1"),
        *("::ffff:10.0.0.1", "64:ff9b::a00:1", "64:ff9b:1::a00:1", "2002:a00:1::1", "::10.0.0.1"),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_allowed(address, FetchLimits())


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"])
def test_public_addresses(address: str) -> None:
    assert is_allowed(address, FetchLimits())


def test_an_operators_networks_are_allowed_and_no_others() -> None:
    limits = FetchLimits(networks=("10.1.0.0/16", "::1/128"))
    assert is_allowed("10.1.2.3", limits)
    assert is_allowed("::ffff:10.1.2.3", limits)
    assert is_allowed("::1", limits)
    assert not is_allowed("10.2.0.1", limits)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("file:///etc/passwd", "scheme"),
        ("ftp://x/y", "scheme"),
        ("no-scheme", "scheme"),
        ("zip://a::http://x/y", "chain"),
        ("http://x/a::b", "chain"),
        ("http://me:secret@x/", "credentials"),
        ("http://", "no host"),
        ("http:///x", "no host"),
        ("http://x\0y/", "control"),
        ("http://x/\r\nHost: y", "control"),
        ("http://x:99999/", "port"),
        ("http://[x/", "host"),
        ("http://a b/", "host"),
    ],
)
def test_urls_that_are_refused(url: str, reason: str) -> None:
    with pytest.raises(ForbiddenUrl, match=reason):
        check_url(url, FetchLimits().schemes)


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        (" HTTP://Example.COM ", "http://example.com/"),
        ("https://example.com:8443/a%2Fb?x=%7E+y&z=1#f", "https://example.com:8443/a%2Fb?x=%7E+y&z=1"),
        ("http://bücher.example/ü b", "http://xn--bcher-kva.example/%C3%BC%20b"),
        ("http://[2606:4700::1111]/x", "http://[2606:4700::1111]/x"),
    ],
)
def test_urls_are_normalised(url: str, normal: str) -> None:
    assert normal == check_url(url, FetchLimits().schemes)


@given(st.text(max_size=60))
def test_a_refusal_never_quotes(tail: str) -> None:
    """Whatever follows the marker, the reason does not show it; what is allowed is printable ASCII."""
    try:
        allowed = check_url(f"http://{SECRET}{tail}", FetchLimits().schemes)
    except ForbiddenUrl as refused:
        assert SECRET not in refused.reason
    else:
        assert allowed.isascii()
        assert allowed.isprintable()
        assert " " not in allowed
        assert allowed == check_url(allowed, FetchLimits().schemes)


# Other file systems


def test_a_file_system_that_is_not_asynchronous(tmp_path: Path) -> None:
    """An operator may allow anything fsspec opens."""
    fsspec.filesystem("memory").pipe_file("/in/x", b"remembered")
    limits = FetchLimits(schemes=("memory",))
    (file,) = fetch_inputs([one("memory://in/x")], tmp_path, limits)
    assert (tmp_path / "a1" / "0").read_bytes() == b"remembered"
    assert file.size == 10
    assert unreachable(f"memory://{SECRET}", tmp_path, limits).endswith("does not exist")


@pytest.mark.s3
def test_s3_with_the_operators_credentials(tmp_path: Path) -> None:
    """Credentials come from the operator; a missing object and a wrong secret are said in words."""
    (tmp_path / "s3" / "data").mkdir(parents=True)
    (tmp_path / "s3" / "data" / "x").write_bytes(b"y" * 3 * MIB)
    limits = FetchLimits(schemes=("s3",))
    source = [one("s3://data/x")]
    with s3_server(tmp_path / "s3") as options:
        wrong = {**options, "secret": "wrong"}
        (file,) = fetch_inputs(source, tmp_path, limits, access=Access(storage_options={"s3": options}))
        assert 3 * MIB == file.size == (tmp_path / "a1" / "0").stat().st_size
        with pytest.raises(InputUnreachable, match=r"does not exist$"):
            fetch_inputs([one("s3://data/none")], tmp_path, limits, access=Access(storage_options={"s3": options}))
        with pytest.raises(InputUnreachable, match=r"access is denied$"):
            fetch_inputs(source, tmp_path, limits, access=Access(storage_options={"s3": wrong}))


# The algorithm


def test_an_algorithm_from_a_url_wins_over_raw_code(file_server: FileServer, tmp_path: Path) -> None:
    into = tmp_path / "algorithm"
    fetched = fetch_algorithm(UrlFile(url=file_server.add(b"from url")), "raw", into, LOOPBACK)
    assert into.read_bytes() == b"from url"
    assert into.stat().st_mode & 0o777 == 0o555
    assert fetched.size == 8


def test_an_algorithm_from_raw_code_twice(tmp_path: Path) -> None:
    """A repeat replaces the read-only file an earlier try left."""
    into = tmp_path / "algorithm"
    fetch_algorithm(None, "old", into, LOOPBACK)
    fetched = fetch_algorithm(None, "print('ü')", into, LOOPBACK)
    assert into.read_text(encoding="utf-8") == "print('ü')"
    assert fetched.size == 11
    assert into.stat().st_mode & 0o777 == 0o555


def test_an_algorithm_too_large_or_missing(file_server: FileServer, tmp_path: Path) -> None:
    into = tmp_path / "algorithm"
    tight = limited(algorithm_bytes=3)
    with pytest.raises(AlgorithmUnreachable, match="more than 3 bytes"):
        fetch_algorithm(None, "long", into, tight)
    with pytest.raises(AlgorithmUnreachable, match="URL: more than 3 bytes"):
        fetch_algorithm(UrlFile(url=file_server.add(b"long")), None, into, tight)
    with pytest.raises(AlgorithmUnreachable, match="URL: answered 404") as caught:
        fetch_algorithm(UrlFile(url=f"{file_server.url}/{SECRET}"), None, into, LOOPBACK)
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert names(tmp_path) == []


# Between stages, and what else an algorithm reads


def test_outputs_of_a_stage_become_inputs(tmp_path: Path) -> None:
    """Regular files with their folders, sorted; what links point to is not handed on."""
    outputs, into = tmp_path / "outputs", tmp_path / "inputs" / "stage-0"
    (outputs / "sub").mkdir(parents=True)
    (outputs / "b.txt").write_bytes(b"b")
    (outputs / "sub" / "a.txt").write_bytes(b"aa")
    (tmp_path / "secret").write_bytes(b"secret")
    (outputs / "link").symlink_to(tmp_path / "secret")
    (outputs / "folder").symlink_to(tmp_path)
    os.mkfifo(outputs / "pipe")
    for _ in range(2):
        linked = link_stage_outputs(outputs, into)
    assert [(f.input_id, f.position, f.size) for f in linked] == [("stage-0", 0, 1), ("stage-0", 1, 2)]
    assert sorted(path.relative_to(into).as_posix() for path in into.rglob("*") if not path.is_dir()) == [
        "b.txt",
        "sub/a.txt",
    ]
    assert hashlib.sha256(b"aa").hexdigest() == linked[1].sha256
    assert (into / "b.txt").stat().st_ino == (outputs / "b.txt").stat().st_ino


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_outputs_are_copied_to_another_file_system(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    (outputs / "x").write_bytes(b"x" * MIB)
    with TemporaryDirectory(dir="/dev/shm") as elsewhere:
        if Path(elsewhere).stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("the same file system")
        (linked,) = link_stage_outputs(outputs, Path(elsewhere) / "in")
        assert hashlib.sha256((Path(elsewhere) / "in" / "x").read_bytes()).hexdigest() == linked.sha256
        assert linked.size == MIB


def test_handing_on_that_is_stopped(tmp_path: Path) -> None:
    """Outputs may be many gigabytes, and each is read for its checksum."""
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "x").write_bytes(b"x")
    stop = Event()
    stop.set()
    with pytest.raises(Stopped):
        link_stage_outputs(tmp_path / "outputs", tmp_path / "in", stop=stop)


def test_parameters_are_json(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "0")
    workspace.create()
    write_parameters({"k": "ü"}, {"did:op:a1": {"id": "did:op:a1"}}, workspace)
    assert json.loads(workspace.custom_data.read_text(encoding="utf-8")) == {"k": "ü"}
    assert json.loads((workspace.ddos / "a1").read_text(encoding="utf-8")) == {"id": "did:op:a1"}
    write_parameters(None, {}, workspace)
    assert json.loads(workspace.custom_data.read_text(encoding="utf-8")) == {}


def test_configuration_log() -> None:
    file = FetchedFile("did:op:a1", 0, 5, "ab" * 32, "text/csv", 0.126)
    algorithm = FetchedFile("algorithm", 0, 7, "cd" * 32, None, 0.0)
    assert configuration_log([file], algorithm).splitlines() == [
        f"input did:op:a1 0: 5 bytes, sha256 {'ab' * 32}, text/csv, 0.13 s",
        f"algorithm: 7 bytes, sha256 {'cd' * 32}, 0.00 s",
    ]


@pytest.mark.parametrize("function", ["md5", "SHA-1", "sha256", "SHA-512"])
def test_a_declared_checksum_is_verified(file_server: FileServer, tmp_path: Path, function: str) -> None:
    """As OEP-8 declares it, in any of its spellings; a file that has another one does not stay."""
    url = file_server.add(b"declared")
    digest = hashlib.new(function.replace("-", ""), b"declared").hexdigest().upper()
    declared = {"url": url, "checksum": digest, "checksumType": function}
    (fetched,) = fetch_inputs([InputSource("a", 0, parse_files([declared]))], tmp_path, LOOPBACK)
    assert (8, b"declared") == (fetched.size, (tmp_path / "a" / "0").read_bytes())
    other = parse_files([{"url": file_server.add(b"another"), "checksum": digest, "checksumType": function}])
    with pytest.raises(InputUnreachable, match="has another checksum than its owner declares") as refused:
        fetch_inputs([InputSource("a", 0, other)], tmp_path, LOOPBACK)
    assert digest.lower() not in str(refused.value)
    assert [] == names(tmp_path / "a")


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ({"checksum": "ab" * 31}, "checksum: must be 64 hexadecimal digits"),
        ({"checksum": "zz" * 16, "checksumType": "md5"}, "checksum: must be 32 hexadecimal digits"),
        ({"checksum": "ab" * 32, "checksumType": "crc32"}, "checksumType: must be one of md5, sha1"),
    ],
)
def test_a_checksum_that_is_none_is_refused(declared: dict[str, str], words: str) -> None:
    with pytest.raises(BadFile, match=f"^{words}"):
        parse_files([{"url": "https://example.com/x", **declared}])
    assert parse_files([{"url": "https://example.com/x", "checksum": "", "checksumType": ""}])


def test_where_a_file_is_from_is_told_to_this_service_only(file_server: FileServer, tmp_path: Path) -> None:
    url = f"{file_server.add(b'x')}?{SECRET}"
    seal = Seal([Fernet.generate_key()])
    before = datetime.now(UTC)
    (fetched,) = fetch_inputs([one(url)], tmp_path, LOOPBACK, seal=seal.close)
    assert SECRET not in fetched.location and SECRET not in repr(fetched)
    assert url == seal.open(fetched.location)["url"]
    assert ORIGIN == fetched.source and before <= fetched.at <= datetime.now(UTC)
