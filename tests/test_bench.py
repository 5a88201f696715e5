"""What measurements stand on: a wire that is as long as it says, and a report that keeps what others have measured."""

from __future__ import annotations

import json
import time
from pathlib import Path

import httpx
import pytest

from bench.report import Row, write_figures, write_section
from bench.wire import wire
from tests.file_server import FileServer


def test_a_section_takes_the_place_of_its_own(tmp_path: Path) -> None:
    """The others stay as they were, in their order."""
    path = tmp_path / "RESULTS.md"
    write_section("one", [Row("a", "1 s", "2 s", "here")], path)
    write_section("two", [Row("b", "3 s", "", "there")], path)
    before = path.read_text().partition("## two")
    write_section("one", [Row("c", "5 s", "", "again")], path)
    after = path.read_text().partition("## two")
    assert "| a | 1 s | 2 s | here |" in before[0]
    assert "| c | 5 s |  | again |" in after[0]
    assert "| a |" not in after[0]
    assert before[1:] == after[1:]


def test_figures_are_added(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_figures({"a": 1.0, "b": 2.0}, path)
    write_figures({"b": 3.0, "c": 4.0}, path)
    assert json.loads(path.read_text()) == {"a": 1.0, "b": 3.0, "c": 4.0}


@pytest.mark.parametrize("size", [0, 10, 300_000])
def test_a_wire_is_as_long_and_as_narrow_as_it_says(size: int) -> None:
    """What comes through is what was sent; no sooner than the handshake, the request and the bytes take."""
    body = bytes(n % 251 for n in range(size))
    with FileServer() as server, wire(server.port, round_trip=0.05, rate=1e6) as port:
        path = server.add(body).removeprefix(server.url)
        with httpx.Client(timeout=30) as client:
            for least in (0.1, 0.05):
                started = time.monotonic()
                assert client.get(f"http://127.0.0.1:{port}{path}").content == body
                assert time.monotonic() - started >= least + size / 1e6
