"""Outputs on their way to a stage elsewhere: over every kind of store, whatever an algorithm has made them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Final
from uuid import uuid4

import pytest

from blocks.store import Kind, ResultStore
from tasks.handover import hand_over, handed_over, receive
from tasks.provision import InputUnreachable
from tasks.results import PublishFailed
from tasks.stopping import Stopped
from tests.test_store import s3_store

__all__ = ["s3_store"]

JOB: Final = "0123456789abcdef" * 2
SECRET: Final = "hush-5f1e"


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ResultStore:
    """An empty store."""
    if request.param == "folder":
        return ResultStore(str(tmp_path / "handover"))
    shared: ResultStore = request.getfixturevalue("s3_store")
    return ResultStore(f"{shared.url}/{uuid4().hex}", shared.storage_options)


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """Names and files of all kinds."""
    folder = tmp_path / "outputs"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "empty").touch()
    (folder / "deep" / "er" / "n.txt").write_text("42")
    (folder / "a b%41=").write_bytes(b"\0\xff")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff\n")).write_text("odd")
    (folder / ("x" * 250)).write_text("long")
    (folder / "private").write_text("p")
    (folder / "private").chmod(0o600)
    (folder / "link").symlink_to("/etc/passwd")
    os.mkfifo(folder / "pipe")
    return folder


def contents(folder: Path) -> dict[bytes, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {os.fsencode(path.relative_to(folder)): path.read_bytes() for path in found}


def test_what_arrives_is_what_was_put_out(store: ResultStore, outputs: Path, tmp_path: Path) -> None:
    """Every regular file under its own name, whatever that is, readable by others; neither links nor what they mean."""
    hand_over(store, JOB, 3, outputs)
    fetched = receive(store, JOB, 3, tmp_path / "in")
    assert contents(outputs) == contents(tmp_path / "in")
    assert 6 == len(fetched) == len(contents(outputs))
    assert [*range(6)] == [each.position for each in fetched]
    assert {"in"} == {each.input_id for each in fetched}
    number = next(each for each in fetched if each.sha256 == hashlib.sha256(b"42").hexdigest())
    assert 2 == number.size
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in (tmp_path / "in").rglob("*") if path.is_file())
    assert not (tmp_path / "in" / "link").is_symlink() and not (tmp_path / "in" / "pipe").exists()
    # Whatever a try before this one has left.
    assert [each.sha256 for each in fetched] == [each.sha256 for each in receive(store, JOB, 3, tmp_path / "in")]


def test_many_files_and_none(store: ResultStore, tmp_path: Path) -> None:
    """Hundreds arrive, and of a stage that puts out nothing nothing does: that is no failure."""
    for name in ("many", "none"):
        (tmp_path / name).mkdir()
    for n in range(300):
        (tmp_path / "many" / f"{n}").write_text(str(n))
    hand_over(store, JOB, 0, tmp_path / "many")
    hand_over(store, JOB, 1, tmp_path / "none")
    assert 300 == len(receive(store, JOB, 0, tmp_path / "a"))
    assert contents(tmp_path / "many") == contents(tmp_path / "a")
    assert () == receive(store, JOB, 1, tmp_path / "b")
    assert (tmp_path / "b").is_dir()


def test_what_is_handed_over_again_is_known_for_another(store: ResultStore, outputs: Path, tmp_path: Path) -> None:
    """Also with the same files: who has read what was there before is to read again."""
    hand_over(store, JOB, 0, outputs)
    first = handed_over(store, JOB, 0)
    assert first == handed_over(store, JOB, 0)
    (outputs / "empty").unlink()
    hand_over(store, JOB, 0, outputs)
    assert first != handed_over(store, JOB, 0)
    receive(store, JOB, 0, tmp_path / "in")
    assert contents(outputs) == contents(tmp_path / "in")


def test_what_was_not_handed_over(store: ResultStore, tmp_path: Path) -> None:
    """It says which stage's it is, and nothing of where it was looked for."""
    for ask in (lambda: receive(store, JOB, 7, tmp_path / "in"), lambda: handed_over(store, JOB, 7)):
        with pytest.raises(InputUnreachable, match="what stage 7 has put out") as refused:
            ask()
        assert str(tmp_path) not in str(refused.value)


def test_a_file_that_was_changed_on_the_way(store: ResultStore, outputs: Path, tmp_path: Path) -> None:
    """One byte is enough, also with the size as it was; and so is a file that is gone."""
    hand_over(store, JOB, 0, outputs)
    (number,) = [file.name for file in store.part(JOB, 0).files if file.path == "deep/er/n.txt"]
    store.put_bytes(JOB, number, b"43")
    with pytest.raises(InputUnreachable, match="not what was put there"):
        receive(store, JOB, 0, tmp_path / "in")
    store.put_bytes(JOB, number, b"4")
    with pytest.raises(InputUnreachable):
        receive(store, JOB, 0, tmp_path / "in")


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "a//x", "%2e%2e/x", "x%00", ""])
def test_a_manifest_that_leads_outside(tmp_path: Path, path: str) -> None:
    """Whoever can write to the store cannot write beside a stage's inputs by it."""
    store = ResultStore(str(tmp_path / "handover"))
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "a").write_text("a")
    hand_over(store, JOB, 0, tmp_path / "outputs")
    part = store.part(JOB, 0)
    store.publish_manifest(
        JOB, 0, part.model_copy(update={"files": (part.files[0].model_copy(update={"path": path}),)})
    )
    with pytest.raises(InputUnreachable, match="damaged"):
        receive(store, JOB, 0, tmp_path / "deep" / "in")
    assert [] == [each for each in (tmp_path / "deep").rglob("*") if each.is_file()]


def test_a_store_that_takes_nothing(outputs: Path, tmp_path: Path) -> None:
    """It fails as a publication does, with neither place nor name in its words."""
    (tmp_path / "file").touch()
    store = ResultStore(f"file://{tmp_path}/file/{SECRET}")
    with pytest.raises(PublishFailed, match="outputs for a later stage") as refused:
        hand_over(store, JOB, 0, outputs)
    assert SECRET not in f"{refused.value!r}" and str(tmp_path) not in str(refused.value)


def test_a_stop_is_heard(store: ResultStore, outputs: Path, tmp_path: Path) -> None:
    """Nothing shows of what was stopped on its way there."""
    stop = Event()
    stop.set()
    with pytest.raises(Stopped):
        hand_over(store, JOB, 0, outputs, stop=stop)
    assert frozenset() == store.stages(JOB)
    hand_over(store, JOB, 0, outputs)
    with pytest.raises(Stopped):
        receive(store, JOB, 0, tmp_path / "in", stop=stop)


def test_nothing_shows_that_is_not_ours_any_more(store: ResultStore, outputs: Path) -> None:
    """What is asked before the manifest can keep it back."""
    asked: list[int] = []

    def refuse(times: list[int]) -> Callable[[], None]:
        def ask() -> None:
            times.append(len(list(store.jobs())))
            raise Stopped

        return ask

    with pytest.raises(Stopped):
        hand_over(store, JOB, 0, outputs, before_it_shows=refuse(asked))
    assert ([1], frozenset()) == (asked, store.stages(JOB))
    assert store.exists(JOB, f"0/{Kind.OUTPUT}/0")
