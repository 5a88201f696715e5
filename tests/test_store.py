"""One contract over every kind of store: a folder, memory, and a real S3 endpoint."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
import traceback
import tracemalloc
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocks.limits import MIB
from blocks.store import (
    Kind,
    Manifest,
    ManifestFile,
    NotStored,
    ResultStore,
    StoreUnavailable,
    _stored_name,
)
from tests.s3_server import s3_server

JOB = "0123456789abcdef" * 2
OTHER = "f" * 32
# Put together here, so that the source lines a traceback quotes do not contain it.
SECRET = "-".join(("hu", "sh"))


@pytest.fixture(scope="session")
def s3_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ResultStore]:
    with s3_server(tmp_path_factory.mktemp("s3") / "root") as options:
        yield ResultStore("s3://results", options)


@pytest.fixture(params=["folder", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ResultStore:
    """An empty store."""
    match request.param:
        case "folder":
            return ResultStore(str(tmp_path / "results"))
        case "memory":
            return ResultStore(f"memory://{uuid4().hex}")
        case _:
            shared: ResultStore = request.getfixturevalue("s3_store")
            return ResultStore(f"{shared.url}/{uuid4().hex}", shared.storage_options)


def file(path: str, kind: Kind = Kind.OUTPUT, stage: int = 0) -> ManifestFile:
    return ManifestFile(
        path=path,
        name=f"{stage}/{kind}/{path}",
        size=1,
        sha256="00" * 32,
        type="text/plain",
        kind=kind,
        stage=stage,
    )


def manifest(*files: ManifestFile) -> Manifest:
    return Manifest(files=files, created=datetime.now(UTC))


def test_what_is_put_can_be_read(store: ResultStore) -> None:
    """Bytes, size and checksum are those of what was sent."""
    stored = store.put_bytes(JOB, "0/output/a.txt", b"hello")
    assert (stored.size, stored.sha256) == (5, hashlib.sha256(b"hello").hexdigest())
    assert store.read_bytes(JOB, "0/output/a.txt") == b"hello"
    assert store.size(JOB, "0/output/a.txt") == 5
    assert store.exists(JOB, "0/output/a.txt")


def test_an_empty_file_is_kept(store: ResultStore) -> None:
    store.put_bytes(JOB, "empty", b"")
    assert store.read_bytes(JOB, "empty") == b""
    assert store.size(JOB, "empty") == 0
    assert list(store.stream(JOB, "empty")) == []


def test_readers_that_wait_hold_little(store: ResultStore) -> None:
    """A hundred readers, each in the middle of its file, as clients on slow lines are; who reads alone asks seldom."""
    content = bytes(24 * MIB)
    store.put_bytes(JOB, "large", content)
    store.read_bytes(JOB, "large")
    tracemalloc.start()
    try:
        readers = []
        for _ in range(100):
            reader = store.stream(JOB, "large")
            taken = sum(len(next(reader)) for _ in range(40))
            assert 10 * MIB == taken
            readers.append(reader)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 300 * MIB, held
    for reader in readers:
        reader.close()
    assert content == b"".join(store.stream(JOB, "large"))


def test_a_link_to_the_store_itself(store: ResultStore) -> None:
    """Where stores can: whole or a range, under the headers given, for its time, and for this file alone."""
    name = "0/output/ä b.html"
    store.put_bytes(JOB, name, b"0123456789")
    store.put_bytes(JOB, "0/output/other", b"other")
    headers = {"disposition": "attachment; filename=b.html", "media_type": "text/html; charset=utf-8"}
    link = store.link(JOB, name, 60, **headers)
    if not store.url.startswith("s3://"):
        assert link is None
        return
    assert link is not None
    whole = httpx.get(link)
    assert (200, b"0123456789") == (whole.status_code, whole.content)
    assert [*headers.values()] == [whole.headers["content-disposition"], whole.headers["content-type"]]
    part = httpx.get(link, headers={"Range": "bytes=2-4"})
    assert b"234" == part.content  # rclone answers 200
    assert 403 == httpx.get(link.replace("b.html?", "other?")).status_code
    assert 403 == httpx.get(link.replace("X-Amz-Expires=60", "X-Amz-Expires=600000")).status_code
    assert 403 == httpx.put(link, content=b"mine").status_code
    assert "X-Amz-Expires=60&" in link


def test_results_of_single_stages_can_be_taken_back(store: ResultStore) -> None:
    """What the others have published stays; nothing to take back is no error."""
    store.retract(JOB, [0])
    assert frozenset() == store.stages(JOB)
    for stage in (0, 1, 10):
        store.put_bytes(JOB, f"{stage}/output/a", b"a")
        store.publish_manifest(JOB, stage, manifest(file("a", stage=stage)))
    assert {0, 1, 10} == store.stages(JOB)
    store.retract(JOB, [10])
    assert {10} == store.stages(JOB)
    assert [False, False, True] == [store.exists(JOB, f"{stage}/output/a") for stage in (0, 1, 10)]
    store.retract(JOB, [])
    assert store.manifest(JOB) is None and not store.exists(JOB, "10/output/a")


def test_a_repeat_replaces(store: ResultStore) -> None:
    store.put_bytes(JOB, "a", b"old, and longer")
    store.put_bytes(JOB, "a", b"new")
    assert store.read_bytes(JOB, "a") == b"new"


def test_what_is_not_there_is_not_there(store: ResultStore) -> None:
    """A missing file, a folder and a job without anything are all "not stored", never an empty answer."""
    store.put_bytes(JOB, "folder/a", b"a")
    for job, name in ((JOB, "none"), (JOB, "folder"), (OTHER, "a")):
        assert not store.exists(job, name)
        with pytest.raises(NotStored):
            store.size(job, name)
        with pytest.raises(NotStored):
            store.stream(job, name)
    with pytest.raises(NotStored):
        store.read_bytes(JOB, "none")


def test_a_file_larger_than_a_part(store: ResultStore, tmp_path: Path) -> None:
    """20 MiB go up in several parts and come back the same, in pieces of 1 MiB at most."""
    content = b"".join(hashlib.sha256(bytes([n])).digest() * 32 * 1024 for n in range(20))
    path = tmp_path / "large"
    path.write_bytes(content)
    stored = store.put_file(JOB, "large", path)
    assert (stored.size, stored.sha256) == (20 * MIB, hashlib.sha256(content).hexdigest())
    pieces = list(store.stream(JOB, "large"))
    assert max(map(len, pieces)) <= MIB
    assert b"".join(pieces) == content


@pytest.mark.parametrize(
    ("start", "end"),
    [(0, None), (0, 1), (5, 5), (1, 3 * MIB), (3 * MIB - 1, None), (MIB - 1, MIB + 1), (10**9, None), (7, 10**9)],
)
def test_ranges(store: ResultStore, start: int, end: int | None) -> None:
    """Start included, end not, beyond the end nothing: as a slice."""
    content = bytes(range(256)) * (3 * MIB // 256)
    store.put_bytes(JOB, "a", content)
    assert b"".join(store.stream(JOB, "a", start, end)) == content[start:end]


def test_two_readers_do_not_disturb_each_other(store: ResultStore) -> None:
    store.put_bytes(JOB, "a", b"0123456789")
    with store.open(JOB, "a") as one, store.open(JOB, "a") as two:
        assert one.read(3) == b"012"
        assert two.read(2) == b"01"
        assert one.seek(-1, 2) == 9
        assert one.read() == b"9"
        assert two.read() == b"23456789"


@pytest.mark.parametrize(
    "name",
    [
        "a b/c+d&e=f?versionId=1#g%20.txt",
        "ü/日本語.csv",
        "back\\slash",
        "*[a]?{b}",
        "..hidden/...",
        "n" * 255,
        "/".join(["é" * 100] * 4),
        ":memory:",
    ],
)
def test_names_of_all_kinds(store: ResultStore, name: str) -> None:
    """Whatever a file system calls a file, it can be stored, and does not get mixed up with a neighbour."""
    store.put_bytes(JOB, name, b"right")
    store.put_bytes(JOB, f"{name}x", b"wrong")
    assert store.read_bytes(JOB, name) == b"right"


@pytest.mark.parametrize("name", ["", "/a", "a/", "../a", "a/../b", "./a", "a//b", "a\0b"])
def test_names_that_are_no_relative_paths(store: ResultStore, name: str) -> None:
    with pytest.raises(ValueError, match="relative path"):
        store.put_bytes(JOB, name, b"")


@pytest.mark.parametrize("job", ["", "..", JOB[:-1], JOB + "0", JOB.upper(), f"../{JOB}"])
def test_ids_that_are_no_job_ids(store: ResultStore, job: str) -> None:
    """Least of all may they delete."""
    with pytest.raises(ValueError, match="job id"):
        store.delete_job(job)


@given(st.lists(st.text(min_size=1, max_size=300).filter(lambda s: "\0" not in s), min_size=2, max_size=2))
def test_stored_names_are_safe_and_different(names: list[str]) -> None:
    """Plain characters, no longer than a key may be, never upwards, and no two names become one."""
    stored = []
    for name in names:
        try:
            stored.append(_stored_name(name))
        except ValueError:
            return
    for each in stored:
        assert len(each) <= 800
        assert all(part.strip(".") for part in each.split("/"))
        assert all(len(part) <= 200 for part in each.split("/"))
        assert each.isascii()
        assert not set(each) & set(" \\%?#*:&+")
    assert (names[0] == names[1]) == (stored[0] == stored[1])


def test_nothing_is_visible_before_the_manifest(store: ResultStore) -> None:
    store.put_bytes(JOB, "0/output/a", b"a")
    assert store.manifest(JOB) is None
    part = manifest(file("a"))
    store.publish_manifest(JOB, 0, part)
    assert store.manifest(JOB) == part


def test_a_manifest_is_replaced_by_its_repeat(store: ResultStore) -> None:
    store.publish_manifest(JOB, 0, manifest(file("old")))
    store.publish_manifest(JOB, 0, manifest(file("new")))
    found = store.manifest(JOB)
    assert found is not None
    assert [each.path for each in found.files] == ["new"]


def test_stages_are_merged_in_their_order(store: ResultStore) -> None:
    """With more than one stage paths say which; stage 10 comes after stage 2."""
    for stage in (10, 2):
        store.publish_manifest(
            JOB,
            stage,
            manifest(file("algorithm.log", Kind.ALGORITHM_LOG, stage), file("b", stage=stage), file("a", stage=stage)),
        )
    found = store.manifest(JOB)
    assert found is not None
    assert [each.path for each in found.ordered()] == [
        "2/a",
        "2/b",
        "10/a",
        "10/b",
        "2/algorithm.log",
        "10/algorithm.log",
    ]
    assert found.ordered()[0].name == "2/output/a"


def test_order_of_results() -> None:
    """Outputs by path, the algorithm's log, then the other logs; what only admins see is last."""
    files = [file(kind.value, kind) for kind in reversed(Kind)] + [file("z/a"), file("a/z"), file("B")]
    assert [each.path for each in manifest(*files).ordered()] == [
        "B",
        "a/z",
        "output",
        "z/a",
        "algorithmLog",
        "filteringLog",
        "configrationLog",
        "publishLog",
    ]


def test_a_deleted_job_is_gone_and_the_others_are_not(store: ResultStore) -> None:
    """Deleting twice, or what never was, is no error."""
    for job in (JOB, OTHER):
        store.put_bytes(job, "0/output/sub/a", b"a")
        store.publish_manifest(job, 0, manifest(file("sub/a")))
    assert sorted(store.jobs()) == [JOB, OTHER]
    for _ in range(2):
        store.delete_job(JOB)
    assert store.manifest(JOB) is None
    assert not store.exists(JOB, "0/output/sub/a")
    assert store.read_bytes(OTHER, "0/output/sub/a") == b"a"
    assert list(store.jobs()) == [OTHER]


def test_an_empty_store_has_no_jobs(store: ResultStore) -> None:
    assert list(store.jobs()) == []
    assert store.manifest(JOB) is None
    store.delete_job(JOB)


def test_what_another_process_wrote_is_seen(store: ResultStore, tmp_path: Path) -> None:
    """No listing is remembered between calls: the API and the worker are two processes."""
    if store.url.startswith("memory"):
        pytest.skip("memory is not shared")
    assert list(store.jobs()) == []
    (tmp_path / "store").write_bytes(pickle.dumps(store))
    write = (
        "import pickle, sys\nfrom pathlib import Path\n"
        "store = pickle.loads(Path(sys.argv[1]).read_bytes())\nstore.put_bytes(sys.argv[2], 'a', b'a')\n"
    )
    subprocess.run([sys.executable, "-c", write, str(tmp_path / "store"), JOB], check=True)
    assert list(store.jobs()) == [JOB]
    assert store.read_bytes(JOB, "a") == b"a"


def test_a_damaged_manifest_is_no_manifest(tmp_path: Path) -> None:
    """Neither half a result nor an empty one: the store is at fault, and says so without its content."""
    store = ResultStore(str(tmp_path))
    store.publish_manifest(JOB, 0, manifest(file("a")))
    (tmp_path / JOB / "manifest" / "0.json").write_text(f'{{"files": "{SECRET}"')
    with pytest.raises(StoreUnavailable, match="damaged") as caught:
        store.manifest(JOB)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_a_folder_keeps_no_partial_manifest(tmp_path: Path) -> None:
    store = ResultStore(str(tmp_path))
    store.publish_manifest(JOB, 0, manifest())
    assert [path.name for path in (tmp_path / JOB / "manifest").iterdir()] == ["0.json"]


def test_a_store_prints_no_credentials() -> None:
    assert SECRET not in repr(ResultStore("s3://results", {"secret": SECRET}))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """A file in the folder's place: said in words, without a path."""
    (tmp_path / SECRET).write_text("not a folder")
    check_refused(ResultStore(str(tmp_path / SECRET)))


@pytest.mark.s3
def test_wrong_credentials(s3_store: ResultStore) -> None:
    check_refused(
        ResultStore(f"s3://results/{SECRET}", {**s3_store.storage_options, "secret": SECRET}), "access is denied"
    )


@pytest.mark.s3
def test_a_bucket_that_is_not_there(s3_store: ResultStore) -> None:
    check_refused(ResultStore(f"s3://{SECRET}", s3_store.storage_options), "does not exist")


def test_an_endpoint_that_is_down() -> None:
    """Not "nothing there": a result must not be reported missing because the store is down."""
    options = {"key": SECRET, "secret": SECRET, "endpoint_url": "http://127.0.0.1:9"}
    check_refused(ResultStore(f"s3://{SECRET}", options))
    with pytest.raises(StoreUnavailable):
        ResultStore(f"s3://{SECRET}", options).exists(JOB, "a")


def check_refused(store: ResultStore, message: str | None = None) -> None:
    """Writing fails as it should, and its traceback tells nothing."""
    with pytest.raises(StoreUnavailable, match=message) as caught:
        store.put_bytes(JOB, "a", SECRET.encode())
    assert caught.value.__context__ is None
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert "127.0.0.1" not in str(caught.value)
