"""What leaves the house, and what does not."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import socket
import struct
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks.limits import MIB, FilterLimits
from blocks.store import Kind, ResultStore
from tasks.results import (
    NAMED,
    FilterReport,
    OutputFile,
    PublishFailed,
    Refused,
    Rule,
    cut_log,
    filter_outputs,
    media_type,
    open_regular,
    publish_outputs,
)
from tasks.stopping import Stopped

JOB = "0123456789abcdef" * 2


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    folder = tmp_path / "outputs"
    folder.mkdir()
    return folder


def filtered(outputs: Path, **limits: object) -> FilterReport:
    return filter_outputs(outputs, [], FilterLimits.model_validate(limits))


def rules(report: FilterReport) -> dict[str, Rule]:
    return {refused.path: refused.rule for refused in report.refused}


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a", "b")
    return buffer.getvalue()


# The filter


def test_ordinary_files_pass_in_the_order_of_their_paths(outputs: Path) -> None:
    (outputs / "sub" / "deeper").mkdir(parents=True)
    (outputs / "sub" / "deeper" / "a.json").write_text('{"a": 1}')
    (outputs / "z.csv").write_text("a,b\n1,2\n")
    (outputs / "empty").touch()
    report = filtered(outputs)
    assert report.passed
    assert report.allowed == (
        OutputFile(path="empty", size=0, media_type="application/x-empty"),
        OutputFile(path="sub/deeper/a.json", size=8, media_type="application/json"),
        OutputFile(path="z.csv", size=8, media_type="text/csv"),
    )


def test_no_outputs_pass(outputs: Path) -> None:
    assert filtered(outputs) == FilterReport()
    assert FilterReport().passed


def test_links_and_special_files_stay_and_the_job_goes_on(outputs: Path, tmp_path: Path) -> None:
    """Whatever a link points to, inside or outside, a folder or nothing, it is not followed."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (outputs / "good").write_text("good")
    (outputs / "absolute").symlink_to(secret)
    (outputs / "relative").symlink_to("good")
    (outputs / "nowhere").symlink_to("nothing")
    (outputs / "folder").symlink_to(tmp_path)
    os.link(secret, outputs / "hard")
    os.mkfifo(outputs / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(outputs / "socket"))
        report = filtered(outputs)
    assert report.passed
    assert [file.path for file in report.allowed] == ["good"]
    assert rules(report) == {
        **dict.fromkeys(("absolute", "relative", "nowhere", "folder", "hard"), Rule.LINK),
        **dict.fromkeys(("pipe", "socket"), Rule.SPECIAL),
    }


def test_two_names_of_one_file_inside_are_two_files(outputs: Path) -> None:
    """A hard link leads outside only if there is a name outside."""
    (outputs / "a").write_text("same")
    os.link(outputs / "a", outputs / "b")
    assert [file.path for file in filtered(outputs).allowed] == ["a", "b"]


@pytest.mark.parametrize("name", [b"\xff\xfe", b"a\nb", b"\x1b[31m", "a\u202eb".encode(), b"\x7f"])
def test_names_that_cannot_be_shown_stay(outputs: Path, name: bytes) -> None:
    """And the report can be printed and sent all the same."""
    with open(os.path.join(os.fsencode(outputs), name), "wb"):  # noqa: PTH118, PTH123  a name Path cannot spell
        pass
    report = filtered(outputs)
    assert report.passed
    assert [refused.rule for refused in report.refused] == [Rule.NAME]
    assert all(line.isprintable() for line in str(report).splitlines())
    assert len(str(report).splitlines()) == 2
    assert FilterReport.model_validate_json(report.model_dump_json()) == report
    str(report).encode()


def test_a_path_without_end_stays(outputs: Path) -> None:
    """An algorithm can nest folders deeper than any path may be long."""
    here = os.open(outputs, os.O_RDONLY)
    for _ in range(60):
        os.mkdir("d" * 200, dir_fd=here)
        there = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = there
    os.close(here)
    report = filtered(outputs)
    assert report.passed
    assert [refused.rule for refused in report.refused] == [Rule.NAME]


@pytest.mark.parametrize(
    ("limits", "rule"),
    [
        ({"files": 2}, Rule.COUNT),
        ({"file_bytes": 9}, Rule.SIZE),
        ({"total_bytes": 29}, Rule.TOTAL),
        ({"types": ("image/*", "text/csv")}, Rule.TYPE),
    ],
)
def test_beyond_a_limit_everything_is_withheld(outputs: Path, limits: dict[str, object], rule: Rule) -> None:
    for name in "abc":
        (outputs / name).write_text("0123456789")
    report = filtered(outputs, **limits)
    assert not report.passed
    assert {refused.rule for refused in report.refused} == {rule}
    assert "withheld" in str(report)


def test_at_a_limit_everything_passes(outputs: Path) -> None:
    for name in "abc":
        (outputs / name).write_text("0123456789")
    assert filtered(outputs, files=3, file_bytes=10, total_bytes=30, types=("text/*",)).passed


def test_a_sparse_file_counts_as_what_it_would_send(outputs: Path) -> None:
    with (outputs / "sparse").open("wb") as file:
        file.truncate(10 * 1024**3)
    assert rules(filtered(outputs))["sparse"] is Rule.SIZE


def test_folders_and_links_without_end_are_given_up(outputs: Path) -> None:
    """They are no files, but each costs time and memory."""
    for n in range(60):
        (outputs / str(n)).mkdir()
    assert not filtered(outputs, files=5).passed
    assert filtered(outputs, files=6).passed


def test_a_report_names_only_so_many(outputs: Path) -> None:
    for n in range(NAMED + 7):
        (outputs / str(n)).symlink_to("x")
    report = filtered(outputs)
    assert len(report.refused) == NAMED + 1
    assert report.refused[-1] == Refused(path="", rule=Rule.LINK, message="7 more")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"plain words\n", "text/plain"),
        ("Käse\n".encode(), "text/plain"),
        (b"a,b\n1,2\n3,4\n", "text/csv"),
        (b'"a;b";c\n1;2\n', "text/csv"),
        (b"a\tb\n1\t2\n", "text/tab-separated-values"),
        (b"one, two\nthree\n", "text/plain"),
        (b'{"a": [1, 2]}', "application/json"),
        (b'\xef\xbb\xbf{"a": 1}', "application/json"),
        (b'{\n "a": 1\n}\n', "application/json"),
        (b'{"a": 1}\n{"a": 2}\n', "application/x-ndjson"),
        (b"{not json", "text/plain"),
        (b"[" * 100_000, "text/plain"),
        (b'{"a": "' + b"x" * 5 * MIB + b'"}\n', "application/json"),
        (b"<!DOCTYPE html><html>", "text/html"),
        (b"<?xml version='1.0'?><svg/>", "image/svg+xml"),
        (b"#!/bin/sh\n", "text/x-script"),
        (b"\x7fELF\x02\x01\x01" + bytes(60), "application/x-executable"),
        (b"MZ\x90\0" + bytes(60), "application/x-executable"),
        (b"MZ is a name\n", "text/plain"),
        (b"\xcf\xfa\xed\xfe" + bytes(60), "application/x-executable"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "image/png"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(50), "image/jpeg"),
        (b"%PDF-1.7\n%\xe2\xe3\n1 0 obj\n", "application/pdf"),
        (gzip.compress(b"a" * 100), "application/gzip"),
        (archive(), "application/zip"),
        (b"\x93NUMPY\x01\0v\0", "application/x-npy"),
        (b"PAR1" + bytes(50) + b"PAR1", "application/vnd.apache.parquet"),
        (b"\x80\x04\x95\x10" + bytes(20), "application/x-python-pickle"),
        (struct.pack("<50d", *(n * 0.37 for n in range(50))), "application/octet-stream"),
        (bytes(range(128, 256)), "application/octet-stream"),
        (b"", "application/x-empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_types_are_found_by_content(content: bytes, expected: str) -> None:
    assert media_type(io.BytesIO(content)) == expected


def test_a_text_is_text_to_its_end() -> None:
    """Bytes behind 2 MiB of text do not leave as text."""
    text = b"0123456\n" * (2 * MIB // 8)
    assert media_type(io.BytesIO(text)) == "text/plain"
    assert media_type(io.BytesIO(text + b"\x00\x01")) == "application/octet-stream"
    assert media_type(io.BytesIO(text + b"\xff")) == "application/octet-stream"


@given(st.binary(max_size=300))
def test_any_content_has_a_type(content: bytes) -> None:
    """And what is called a text can be read as one."""
    found = media_type(io.BytesIO(content))
    assert found.count("/") == 1
    if found.startswith("text/") and found != "text/x-script":
        content.decode("utf-8")


@settings(max_examples=30)
@given(
    st.dictionaries(st.binary(min_size=1, max_size=20).filter(lambda n: not {0, 47} & set(n)), st.binary(max_size=20))
)
def test_any_outputs_have_a_report(tmp_path_factory: pytest.TempPathFactory, files: dict[bytes, bytes]) -> None:
    """Every file is either allowed or refused, whatever it is called, and the report can be printed and sent."""
    outputs = tmp_path_factory.mktemp("outputs")
    written = 0
    for name, content in files.items():
        if name in {b".", b".."}:
            continue
        with open(os.path.join(os.fsencode(outputs), name), "wb") as file:  # noqa: PTH118, PTH123
            file.write(content)
        written += 1
    report = filtered(outputs)
    assert len(report.allowed) + len(report.refused) == written
    assert json.loads(report.model_dump_json())
    str(report).encode()


def test_a_link_put_in_a_files_place_is_not_opened(outputs: Path, tmp_path: Path) -> None:
    """Neither in the file's own place nor in that of a folder."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a").write_text("secret")
    (outputs / "folder").symlink_to(tmp_path / "elsewhere")
    (outputs / "a").symlink_to(tmp_path / "elsewhere" / "a")
    os.mkfifo(outputs / "pipe")
    for path in ("folder/a", "a", "pipe", "none"):
        with pytest.raises(OSError):
            open_regular(outputs, path)


# Logs


def test_a_short_log_stays(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("short")
    cut_log(log, 5)
    assert log.read_text() == "short"
    cut_log(tmp_path / "none", 5)


def test_a_long_log_keeps_its_end(outputs: Path, tmp_path: Path) -> None:
    """The notice is a line of its own and says how much there was; the first line kept is whole."""
    log = tmp_path / "log"
    log.write_text("".join(f"line {n} ü\n" for n in range(10_000)), encoding="utf-8")
    size = log.stat().st_size
    filter_outputs(outputs, [log], FilterLimits(log_bytes=1000))
    notice, first, *_, last = log.read_text(encoding="utf-8").splitlines()
    assert str(size) in notice
    assert first.startswith("line ")
    assert last == "line 9999 ü"
    assert log.stat().st_size <= 1000


def test_a_long_log_without_lines_keeps_its_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * 100_000 + b"end")
    cut_log(log, 10_000)
    assert log.stat().st_size == 10_000
    assert log.read_bytes().endswith(b"xend")


# Publication


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    return ResultStore(str(tmp_path / "store"))


@pytest.fixture
def logs(tmp_path: Path) -> dict[Kind, Path]:
    """All logs but the publish log, which publishing writes."""
    paths = {
        Kind.ALGORITHM_LOG: tmp_path / "algorithm.log",
        Kind.CONFIGURATION_LOG: tmp_path / "configuration.log",
        Kind.FILTERING_LOG: tmp_path / "filtering.log",
    }
    for kind, path in paths.items():
        path.write_text(kind)
    return {**paths, Kind.PUBLISH_LOG: tmp_path / "publish.log"}


def test_outputs_and_logs_are_published_in_their_order(
    outputs: Path, store: ResultStore, logs: dict[Kind, Path]
) -> None:
    """Sub-directories stay; checksum and size are those of what was stored; the log of it all is stored too."""
    (outputs / "sub").mkdir()
    (outputs / "sub" / "a.txt").write_text("in sub")
    (outputs / "algorithm.log").write_text("an output like a log")
    part = publish_outputs(
        store, JOB, 0, outputs, filtered(outputs), logs=logs, publish_output=True, publish_algorithm_log=True
    )
    assert store.manifest(JOB) == part
    assert [(file.path, file.kind) for file in part.ordered()] == [
        ("algorithm.log", Kind.OUTPUT),
        ("sub/a.txt", Kind.OUTPUT),
        ("algorithm.log", Kind.ALGORITHM_LOG),
        ("filtering.log", Kind.FILTERING_LOG),
        ("configuration.log", Kind.CONFIGURATION_LOG),
        ("publish.log", Kind.PUBLISH_LOG),
    ]
    for file in part.files:
        content = store.read_bytes(JOB, file.name)
        assert (file.size, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert store.read_bytes(JOB, part.ordered()[0].name) == b"an output like a log"
    assert "sub/a.txt" in logs[Kind.PUBLISH_LOG].read_text()


@pytest.mark.parametrize(
    ("output", "log", "expected"),
    [
        (False, True, ["algorithm.log"]),
        (True, False, ["a"]),
        (False, False, []),
    ],
)
def test_what_is_not_wanted_is_not_published(
    outputs: Path, store: ResultStore, logs: dict[Kind, Path], output: bool, log: bool, expected: list[str]
) -> None:
    (outputs / "a").write_text("a")
    part = publish_outputs(
        store, JOB, 0, outputs, filtered(outputs), logs=logs, publish_output=output, publish_algorithm_log=log
    )
    others = {"configuration.log", "filtering.log", "publish.log"}
    assert [file.path for file in part.ordered() if file.path not in others] == expected
    assert not output or store.exists(JOB, "0/output/a")


def test_withheld_outputs_do_not_reach_the_store(outputs: Path, store: ResultStore, logs: dict[Kind, Path]) -> None:
    """Not even those that would have been allowed alone."""
    (outputs / "small").write_text("a")
    (outputs / "large").write_text("a" * 100)
    report = filtered(outputs, file_bytes=10)
    part = publish_outputs(store, JOB, 0, outputs, report, logs=logs, publish_output=True, publish_algorithm_log=True)
    assert Kind.OUTPUT not in {file.kind for file in part.files}
    assert not store.exists(JOB, "0/output/small")


def test_a_repeat_publishes_the_same(outputs: Path, store: ResultStore, logs: dict[Kind, Path]) -> None:
    (outputs / "a").write_text("a")
    report = filtered(outputs)
    one, two = (
        publish_outputs(store, JOB, 0, outputs, report, logs=logs, publish_output=True, publish_algorithm_log=True)
        for _ in range(2)
    )
    assert one.files == two.files
    assert store.manifest(JOB) == two


def swap_for_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


@pytest.mark.parametrize("change", [Path.unlink, swap_for_link, lambda path: path.write_text("longer")])
def test_an_output_changed_after_the_filter_fails(
    outputs: Path, store: ResultStore, logs: dict[Kind, Path], change: Callable[[Path], object]
) -> None:
    """And nothing becomes visible."""
    (outputs / "a").write_text("a")
    report = filtered(outputs)
    change(outputs / "a")
    with pytest.raises(PublishFailed):
        publish_outputs(store, JOB, 0, outputs, report, logs=logs, publish_output=True, publish_algorithm_log=True)
    assert store.manifest(JOB) is None


def test_a_store_that_fails_is_said_by_position(outputs: Path, logs: dict[Kind, Path], tmp_path: Path) -> None:
    """Neither the name of the output nor the place of the store is told."""
    secret = "-".join(("hu", "sh"))
    (tmp_path / secret).write_text("not a folder")
    (outputs / secret).write_text("a")
    store = ResultStore(str(tmp_path / secret))
    with pytest.raises(PublishFailed, match="output 1 of 1") as caught:
        publish_outputs(
            store,
            JOB,
            0,
            outputs,
            filtered(outputs),
            logs=logs,
            publish_output=True,
            publish_algorithm_log=True,
        )
    assert secret not in "".join(traceback.format_exception(caught.value))


class SetWhenAsked(Event):
    """An event that is set when it has been asked for so many times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self._left = times

    def is_set(self) -> bool:
        self._left -= 1
        if self._left < 0:
            self.set()
        return super().is_set()


@pytest.mark.parametrize("asked", [0, 1, 5, 10])
def test_a_filter_that_is_stopped(outputs: Path, asked: int) -> None:
    """Wherever it is: among the names, or in the middle of a file."""
    for n in range(3):
        (outputs / f"{n}").write_bytes(b"a" * 3 * MIB)
    with pytest.raises(Stopped):
        filter_outputs(outputs, [], FilterLimits(), stop=SetWhenAsked(asked))


@pytest.mark.parametrize("asked", [0, 2, 4, 8])
def test_a_publication_that_is_stopped(outputs: Path, store: ResultStore, logs: dict[Kind, Path], asked: int) -> None:
    """Nothing becomes visible, and it is no failure of the store."""
    for n in range(3):
        (outputs / f"{n}").write_bytes(b"a" * 3 * MIB)
    with pytest.raises(Stopped):
        publish_outputs(
            store,
            JOB,
            0,
            outputs,
            filtered(outputs),
            logs=logs,
            publish_output=True,
            publish_algorithm_log=True,
            stop=SetWhenAsked(asked),
        )
    assert store.manifest(JOB) is None
