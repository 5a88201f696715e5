"""``c2d catalogue``: what a data owner is told, with no server at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def catalogue(path: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("c2d")
    return subprocess.run(
        [program, "catalogue", path], capture_output=True, text=True, check=False, env={"COLUMNS": "200"}
    )


def test_what_is_on_offer_and_what_is_wrong(tmp_path: Path) -> None:
    """A bad asset takes none of the others along, and is told with its place; its values are not."""
    (tmp_path / "good.yaml").write_text("name: Rivers\ntype: dataset\nid: did:op:rivers\nfiles: [https://x.org/a]\n")
    assert 0 == catalogue(tmp_path).returncode
    (tmp_path / "bad.yaml").write_text("name: Lakes\ntype: hunter2\nfiles: [https://x.org/hunter2]\n")
    told = catalogue(tmp_path)
    assert 1 == told.returncode
    assert "did:op:rivers" in told.stdout and "compute (compute)" in told.stdout
    assert "bad.yaml: type:" in told.stderr
    assert "hunter2" not in told.stdout + told.stderr


def test_a_catalogue_that_is_not_there(tmp_path: Path) -> None:
    """A sentence and an exit code, no traceback."""
    told = catalogue(tmp_path / "nowhere")
    assert 1 == told.returncode
    assert "there is no such file or folder" in told.stderr and "Traceback" not in told.stderr
