"""What holds over the whole tree, and would be noticed last where it does not."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import api.app
from flows.build import TASK_FOR
from flows.errors import Refusal
from flows.status import TEXT, Phase, Status

ROOT: Final = Path(api.app.__file__).parent.parent


def refusals(kind: type[Refusal] = Refusal) -> Iterator[type[Refusal]]:
    for each in kind.__subclasses__():
        yield each
        yield from refusals(each)


def test_layers_hold() -> None:
    """The rooms import only to their right, and the core imports no engine, no web and no I/O."""
    program = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stdout


def test_every_refusal_can_be_told_apart() -> None:
    """Each refusal has a slug of its own, and none of them answers with a code that is no fault."""
    found = list(refusals())
    slugs = [kind.__dict__["slug"] for kind in found]
    assert sorted(set(slugs)) == sorted(slugs)
    assert Refusal.slug not in slugs
    assert {kind.http for kind in found} <= {400, 401, 403, 404, 409, 410, 413, 415, 429, 502, 503}


def test_every_status_has_a_text() -> None:
    """No code goes out without its text."""
    assert set(Status) == set(TEXT)
    assert all(TEXT.values())


def test_every_phase_has_a_task() -> None:
    """What can be planned can be done."""
    assert set(Phase) == set(TASK_FOR)
    assert len(Phase) == len({task.fn for task in TASK_FOR.values()})


def test_every_code_of_the_contract_is_provoked() -> None:
    """What section 6 promises the Provider's clients, some test of its dialect has seen answered."""
    root = Path(__file__).parent
    contract = (root.parent / "docs" / "contract.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"and codes `([^`]+)`", contract)
    codes = set(re.findall(r"\w+", listed))
    seen = "".join((root / name).read_text(encoding="utf-8") for name in ("test_api_provider.py", "test_api_orders.py"))
    assert len(codes) > 20
    assert set() == {code for code in codes if f'"{code}"' not in seen}
