"""Sealing: what goes through Prefect can be read by the workers and by nobody else."""

from __future__ import annotations

import base64
import stat
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from cryptography.fernet import Fernet
from hypothesis import given
from hypothesis import strategies as st

from flows.sealing import CannotUnseal, Seal, create_key_file

SECRET = "hush-0cc175b9c0f1"
SEAL = Seal([Fernet.generate_key()])


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=5,
    )
)
def test_what_was_sealed_comes_out(document: Any) -> None:
    """Any JSON value is opened as it was closed."""
    assert document == SEAL.open(SEAL.close(document))


def test_another_key() -> None:
    """Without the key nothing is opened, and the message says what to look at."""
    with pytest.raises(CannotUnseal, match="C2D_KEY_FILE") as refusal:
        Seal([Fernet.generate_key()]).open(SEAL.close({"k": SECRET}))
    assert SECRET not in str(refusal.value)


@pytest.mark.parametrize("text", ["", "x", "é", "gAAAAA==", "gAAAAA", "\x00"])
def test_no_seal_at_all(text: str) -> None:
    """What was never sealed is refused like what was sealed with another key."""
    with pytest.raises(CannotUnseal):
        SEAL.open(text)


def test_an_altered_document() -> None:
    """One letter changed anywhere, and the seal is broken."""
    sealed = SEAL.close({"k": SECRET})
    for place in range(0, len(sealed.rstrip("=")) - 1, 7):
        other = "A" if sealed[place] != "A" else "B"
        with pytest.raises(CannotUnseal):
            SEAL.open(sealed[:place] + other + sealed[place + 1 :])


def test_a_sealed_text_that_is_no_document() -> None:
    """The right key over the wrong content is no traceback of a decompressor."""
    key = Fernet.generate_key()
    for content in (b"", b"no zlib", zlib.compress(b"no json")):
        with pytest.raises(CannotUnseal):
            Seal([key]).open(Fernet(key).encrypt(content).decode())


def test_nothing_can_be_read_in_a_sealed_document() -> None:
    """Neither the text nor what it decodes to holds a word of the document; a repeat looks different."""
    sealed = SEAL.close({"url": SECRET, "code": SECRET * 100})
    assert SECRET not in sealed
    assert SECRET.encode() not in base64.urlsafe_b64decode(sealed)
    assert sealed != SEAL.close({"url": SECRET, "code": SECRET * 100})


def test_a_new_key_in_front(tmp_path: Path) -> None:
    """After a rotation old documents still open, new ones are sealed with the new key, fingerprints stay."""
    old, new = Fernet.generate_key(), Fernet.generate_key()
    (tmp_path / "key").write_bytes(new + b"\n" + old + b"\n")
    before, after = Seal([old]), Seal.from_file(tmp_path / "key")
    assert [SECRET] == after.open(before.close([SECRET]))
    assert [SECRET] == Seal([new]).open(after.close([SECRET]))
    with pytest.raises(CannotUnseal):
        before.open(after.close([SECRET]))
    assert before.fingerprint(b"x") == after.fingerprint(b"x")


def test_fingerprints() -> None:
    """The same for the same content, another for other content and for another key."""
    assert SEAL.fingerprint(b"x") == SEAL.fingerprint(b"x")
    seen = {SEAL.fingerprint(b"x"), SEAL.fingerprint(b"y"), Seal([Fernet.generate_key()]).fingerprint(b"x")}
    assert 3 == len(seen)
    assert {64} == {len(bytes.fromhex(each)) * 2 for each in seen}


def test_the_key_is_its_users_alone(tmp_path: Path) -> None:
    """The file can be read by its user only, the folder made for it be entered by its user only."""
    create_key_file(tmp_path / "state" / "key")
    modes = [stat.S_IMODE((tmp_path / "state" / name).stat().st_mode) for name in ("key", ".")]
    assert [0o600, 0o700] == modes


def test_a_key_stays(tmp_path: Path) -> None:
    """Making the key once more changes nothing: what was sealed must open tomorrow."""
    create_key_file(tmp_path / "key")
    sealed = Seal.from_file(tmp_path / "key").close([SECRET])
    create_key_file(tmp_path / "key")
    assert [SECRET] == Seal.from_file(tmp_path / "key").open(sealed)
    assert ["key"] == [path.name for path in tmp_path.iterdir()]


def test_many_make_the_key_at_the_same_moment(tmp_path: Path) -> None:
    """Whoever comes out of it reads one and the same whole key, and nothing else is left."""
    count = 16
    for n in range(10):
        path, start = tmp_path / str(n) / "key", Barrier(count)

        def make(path: Path = path, start: Barrier = start) -> str:
            start.wait()
            create_key_file(path)
            return Seal.from_file(path).fingerprint(b"x")

        with ThreadPoolExecutor(count) as threads:
            assert 1 == len({each.result() for each in [threads.submit(make) for _ in range(count)]})
        assert [path] == list(path.parent.iterdir())
