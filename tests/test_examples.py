"""The example workflow: its document, its data, and what its algorithms find."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from blocks.files import FileObject, UrlFile
from blocks.limits import Offer
from flows.plan import PlannedStage, compile_plan
from flows.workflow import parse_workflow

EXAMPLES = Path(__file__).parent.parent / "examples"
BASE = "http://127.0.0.1:8000/"
OFFERS = {"default": Offer(id="default")}


def planned(document: str) -> tuple[PlannedStage, ...]:
    return compile_plan(parse_workflow(json.loads((EXAMPLES / document).read_text("utf-8"))), OFFERS).stages


def urls(files: Iterable[FileObject | None]) -> list[str]:
    return [file.url for file in files if isinstance(file, UrlFile)]


def run(stage: PlannedStage, data: Path, outputs: Mapping[int, Path] | None = None) -> str:
    """Lay out *data* as the algorithm of *stage* would find /data, run it there and return what it printed."""
    for part in stage.inputs:
        folder = data / "inputs" / part.id.removeprefix("did:op:")
        if part.stage is not None:
            folder.parent.mkdir(parents=True)
            folder.symlink_to((outputs or {})[part.stage])
            continue
        folder.mkdir(parents=True)
        for n, url in enumerate(urls(part.files)):
            (folder / str(n)).symlink_to(EXAMPLES / url.removeprefix(BASE))
    (data / "outputs").mkdir()
    (data / "inputs" / "algoCustomData.json").write_text(json.dumps(stage.custom_data), "utf-8")
    if stage.rawcode is not None:
        algorithm = data / "algorithm"
        algorithm.write_text(stage.rawcode, "utf-8")
    else:
        (url,) = urls([stage.algorithm_file])
        algorithm = EXAMPLES / url.removeprefix(BASE)
    done = subprocess.run(
        # Without site-packages, as in a sandbox that has an interpreter and nothing more.
        [sys.executable, "-I", "-S", algorithm],
        env={
            "DIDS": json.dumps(stage.dids),
            "INPUTS": str(data / "inputs"),
            "OUTPUTS": str(data / "outputs"),
            "LC_ALL": "C",
        },
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The outputs of stage 0 and what it printed."""
    data = tmp_path_factory.mktemp("fit")
    log = run(planned("workflow.json")[0], data)
    return data / "outputs", log


@pytest.fixture(scope="module")
def model(fit: tuple[Path, str]) -> Any:
    return json.loads((fit[0] / "model.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def report(fit: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of stage 1."""
    data = tmp_path_factory.mktemp("report")
    run(planned("workflow.json")[1], data, {0: fit[0]})
    return data / "outputs"


def test_the_document_becomes_the_plan_the_demo_shows() -> None:
    """Two data sets, one of two files; the second stage reads the first and waits for it."""
    first, second = planned("workflow.json")
    assert [len(part.files) for part in first.inputs] == [2, 1]
    assert second.dids == ("fit",)
    assert second.depends_on == (0,)


@pytest.mark.parametrize("document", ["workflow.json", "rawcode.json"])
def test_every_url_is_a_file_of_the_folder(document: str) -> None:
    """What is served at the base is enough; nothing has to be fetched from elsewhere."""
    for stage in planned(document):
        named = [file for part in stage.inputs for file in part.files]
        for url in urls([*named, *([stage.algorithm_file] if stage.algorithm_file else [])]):
            assert url.startswith(BASE)
            assert (EXAMPLES / url.removeprefix(BASE)).is_file()


def test_the_data_are_those_whose_origin_is_told() -> None:
    """Rows and checksums in the table are those of the files, and no file is missing from it."""
    table = re.findall(
        r"^\| `(\S+\.csv)` \| (\d+) \| `([0-9a-f]{64})` \|$",
        (EXAMPLES / "data" / "README.md").read_text("utf-8"),
        re.M,
    )
    assert {path.name for path in (EXAMPLES / "data").glob("*.csv")} == {name for name, _, _ in table}
    for name, rows, digest in table:
        content = (EXAMPLES / "data" / name).read_bytes()
        assert digest == hashlib.sha256(content).hexdigest()
        assert int(rows) == len(list(csv.DictReader(content.decode().splitlines())))


def test_growth_rises_with_the_sea_off_peru(model: Any) -> None:
    """About 0.4 ppm per degree, a few months later, far outside its own error; as the literature has it."""
    effect = model["growth"]["terms"]["per_degree_nino"]
    assert 0.3 < effect["value"] < 0.5
    assert effect["t"] > 4
    assert 3 <= model["growth"]["lag_months"] <= 6
    assert model["growth"]["r_squared"] > 2 * model["growth"]["r_squared_without_nino"]


def test_the_level_is_that_of_the_keeling_curve(model: Any) -> None:
    """Near 338 ppm in 1980, rising ever faster, highest in May and lowest in October."""
    level = model["level"]
    assert 337 < level["terms"]["mean_1980"]["value"] < 339
    assert 12 < level["terms"]["per_decade"]["value"] < 15
    assert level["terms"]["per_decade_squared"]["t"] > 10
    assert (level["peak"], level["trough"]) == ("MAY", "OCT")
    assert 5 < level["swing"] < 7
    assert level["r_squared"] > 0.99


def test_forecasts_beat_both_baselines(model: Any) -> None:
    """Out of sample, over 21 years of months."""
    rmse = model["backtest"]["rmse"]
    assert model["backtest"]["n"] == 252
    assert rmse["model"] < 0.95 * min(rmse["naive"], rmse["trend"])


def test_every_month_has_its_prediction(fit: tuple[Path, str], model: Any) -> None:
    """One row a month of data; a growth only where the month a year before was measured too."""
    with (fit[0] / "predictions.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert model["months"]["n"] == len(rows)
    assert model["growth"]["n"] == sum(bool(row["growth"]) for row in rows)


def test_the_log_tells_what_was_read_and_found(fit: tuple[Path, str]) -> None:
    """Who only gets the log still learns something."""
    assert "1136 weeks, 54 without a value" in fit[1]
    assert "252 forecasts 6 months ahead" in fit[1]


def test_the_report_is_about_the_first_stages_model(report: Path, model: Any) -> None:
    """The same figures, and a chart any reader of SVG can read."""
    summary = json.loads((report / "summary.json").read_text("utf-8"))
    assert model["backtest"]["rmse"] == summary["forecast_rmse"]
    text = (report / "report.md").read_text("utf-8")
    assert f"{model['growth']['terms']['per_degree_nino']['value']:.2f} ppm" in text
    chart = ET.parse(report / "chart.svg").getroot()
    words = [element.text for element in chart.iter("{http://www.w3.org/2000/svg}text")]
    assert {"ppm", "ppm a year", "°C", "1960", "2000", "CO2 at Mauna Loa and El Niño"} <= set(words)


def test_code_in_the_document_runs_too(tmp_path: Path) -> None:
    """The year of the great El Niño was the warmest off Peru."""
    (stage,) = planned("rawcode.json")
    run(stage, tmp_path)
    assert (tmp_path / "outputs" / "warmest.txt").read_text("utf-8") == "1997: 25.78\n"
