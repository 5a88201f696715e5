"""``c2d plan``: a document, read and judged without a server."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from cli.main import app
from cli.service import ROOT
from tests.documents import data, outputs_of, stage, workflow

EXAMPLE: Final = ROOT / "examples" / "workflow.json"


@dataclass(frozen=True)
class Answer:
    code: object
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.err.splitlines()


@pytest.fixture
def c2d(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: str | Path) -> Answer:
        with pytest.raises(SystemExit) as end:
            app([str(word) for word in words])
        printed = capsys.readouterr()
        return Answer(end.value.code, printed.out, printed.err)

    return run


def written(folder: Path, document: Any) -> Path:
    path = folder / "workflow.json"
    path.write_text(json.dumps(document))
    return path


def test_the_example_can_be_run(c2d: Any) -> None:
    """The document of the examples is planned for the environment of this checkout: two stages, one after the other."""
    answer = c2d("plan", EXAMPLE)
    assert (0, "") == (answer.code, answer.err)
    assert "stage 0 in default\n" in answer.out
    assert "stage 1 in default, after stage 0\n" in answer.out
    assert "  limits     300 s, 2 GiB memory, 10 GiB disk, 1 cpu, 0 gpu\n" in answer.out
    assert "1/run                  <-  1/provision-data, 1/provision-algorithm\n" in answer.out


def test_with_or_without_the_outer_key(c2d: Any, tmp_path: Path) -> None:
    """A document may be written as it is posted or without what is around it."""
    inner = json.loads(EXAMPLE.read_text())
    assert c2d("plan", EXAMPLE) == c2d("plan", written(tmp_path, {"workflow": inner}))


def test_every_problem_is_printed(c2d: Any, tmp_path: Path) -> None:
    """A document that cannot be run is answered with all that is wrong with it, a line each, and a failure."""
    path = written(
        tmp_path,
        workflow(
            stages=[
                stage(environment="moon", input=[data("../a", "https:///etc/passwd")]),
                stage(rawcode=None, entrypoint="", input=[outputs_of(7)]),
            ]
        ),
    )
    answer = c2d("plan", path)
    assert (1, "") == (answer.code, answer.out)
    assert [
        "stages.0.compute.namespace",
        "stages.0.input.0.id",
        "stages.0.input.0.url.0",
        "stages.1.algorithm",
        "stages.1.algorithm.container.entrypoint",
        "stages.1.input.0.stage",
    ] == [line.split(":")[0] for line in answer.lines]


def test_faults_of_shape_are_printed(c2d: Any, tmp_path: Path) -> None:
    """The same for a document that is none."""
    answer = c2d("plan", written(tmp_path, {"stages": [{}], "owner": "[red]x"}))
    assert 1 == answer.code
    assert "agreementId: is required" in answer.lines
    assert "stages.0.algorithm: is required" in answer.lines


@pytest.mark.parametrize("text", ["", "{", "no json", "[1", '{"a": NaN'])
def test_what_is_no_json(c2d: Any, tmp_path: Path, text: str) -> None:
    """A file that is no JSON is named as such, without a traceback."""
    path = tmp_path / "broken.json"
    path.write_text(text)
    answer = c2d("plan", path)
    assert (1, 1) == (answer.code, len(answer.lines))
    assert f"{path}: cannot be read as JSON" in answer.err


def test_no_file(c2d: Any, tmp_path: Path) -> None:
    """A file that is not there is named, without a traceback."""
    answer = c2d("plan", tmp_path / "nowhere.json")
    assert 1 == answer.code
    assert "nowhere.json" in answer.err
    assert "Traceback" not in answer.err


@pytest.mark.parametrize("document", ["[]", "7", "null", '"x"', "{}", '{"workflow": 1}'])
def test_json_that_is_no_document(c2d: Any, tmp_path: Path, document: str) -> None:
    """Any other JSON is refused like any other bad document."""
    path = tmp_path / "other.json"
    path.write_text(document)
    assert 1 == c2d("plan", path).code


def test_environments_of_another_file(c2d: Any, tmp_path: Path) -> None:
    """The environments are those of the prefect.yaml that is named."""
    other = tmp_path / "prefect.yaml"
    other.write_text("definitions: {environments: [{work_pool: p, offer: {id: small, limits: {seconds: 5}}}]}")
    path = written(tmp_path, workflow(stages=[stage(environment="small")]))
    assert 1 == c2d("plan", path).code
    answer = c2d("plan", path, "--environments", other)
    assert 0 == answer.code
    assert "limits     5 s" in answer.out
