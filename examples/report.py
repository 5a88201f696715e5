"""
Tables and a chart of what fit.py found. Stage 1 of the demo; standard library only.

Its one data set is the outputs of the stage before, under the names they were published by. Writes report.md,
chart.svg and summary.json. algoCustomData.json may give a title.
"""

import csv
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

INPUTS = Path(os.environ.get("INPUTS", "/data/inputs"))
OUTPUTS = Path(os.environ.get("OUTPUTS", "/data/outputs"))

TITLE = "CO2 at Mauna Loa and El Niño"

# Okabe and Ito's colours: they stay apart for colour-blind readers.
BLUE, VERMILION, ORANGE, SKY, INK, FAINT = "#0072b2", "#d55e00", "#e69f00", "#56b4e9", "#222222", "#dddddd"

STYLE = (
    f"text{{font:13px sans-serif;fill:{INK}}}.name{{font-size:20px;font-weight:bold}}.head{{font-weight:bold}}"
    ".mid{text-anchor:middle}.end{text-anchor:end}"
    f".grid{{stroke:{FAINT}}}.axis{{stroke:{INK};fill:none}}"
)

WIDTH, LEFT, RIGHT = 960, 72, 24
Point = tuple[float, float]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Markdown that can also be read as it is: first column to the left, numbers to the right."""
    cells = [list(head), *map(list, rows)]
    widths = [max(3, *(len(row[n]) for row in cells)) for n in range(len(head))]

    def line(row: Sequence[str]) -> str:
        padded = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = f"|{'-' * (widths[0] + 2)}|{'|'.join('-' * (w + 1) + ':' for w in widths[1:])}|"
    return [line(cells[0]), rule, *map(line, cells[1:])]


def terms(fit: dict[str, Any]) -> list[list[str]]:
    return [
        [name, f"{term['value']:.3f}", f"{term['standard_error']:.3f}", f"{term['t']:.1f}"]
        for name, term in fit["terms"].items()
    ]


def report(title: str, model: dict[str, Any], by_year: list[dict[str, str]]) -> str:
    level, growth, test = model["level"], model["growth"], model["backtest"]
    nino = growth["terms"]["per_degree_nino"]
    low, high = (nino["value"] + sign * 1.96 * nino["standard_error"] for sign in (-1, 1))
    better = sum(float(row["model"]) < float(row["naive"]) for row in by_year)
    return "\n".join(
        [
            f"# {title}",
            "",
            f"{model['months']['n']} months, {model['months']['first']} to {model['months']['last']}.",
            f"A degree more off Peru goes with {nino['value']:.2f} ppm more growth of CO2 in a year "
            f"(95 %: {low:.2f} to {high:.2f}),",
            f"{growth['lag_months']} months later. It lifts the share of the growth that is explained from "
            f"{growth['r_squared_without_nino']:.0%} to {growth['r_squared']:.0%}.",
            "An association, not a cause; the volcanic cooling after 1991 is one thing the model does not know.",
            "",
            "## Growth over twelve months, ppm",
            "",
            *table(["term", "value", "std. error", "t"], terms(growth)),
            "",
            "## Level, ppm",
            "",
            *table(["term", "value", "std. error", "t"], terms(level)),
            "",
            f"R2 {level['r_squared']:.4f}, RMSE {level['rmse']:.2f} ppm; "
            f"the seasons swing by {level['swing']:.1f} ppm, "
            f"highest in {level['peak'].title()}, lowest in {level['trough'].title()}.",
            "",
            f"## Forecasts {test['horizon_months']} months ahead, {test['n']} of them",
            "",
            *table(
                ["forecast", "RMSE, ppm", "against naive"],
                [
                    [name, f"{rmse:.3f}", f"{rmse / test['rmse']['naive'] - 1:+.1%}"]
                    for name, rmse in test["rmse"].items()
                ],
            ),
            "",
            f"Better than naive in {better} of {len(by_year)} years. Naive: growth stays what it was. "
            "Trend: the calendar only.",
            "",
        ]
    )


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from *low* to *high*."""
    raw = (high - low) / about
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw)
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


class Panel:
    """One pair of axes: years to the right, *low* to *high* upwards between *top* and *top* + *height*."""

    def __init__(
        self, years: tuple[int, int], low: float, high: float, top: float, height: float, unit: str, head: str
    ) -> None:
        self.years, self.low, self.high, self.top, self.height = years, low, high, top, height
        self.unit, self.head = unit, head

    def x(self, year: float) -> float:
        first, last = self.years
        return LEFT + (WIDTH - LEFT - RIGHT) * (year - first) / (last - first)

    def y(self, value: float) -> float:
        return self.top + self.height * (self.high - value) / (self.high - self.low)

    def frame(self) -> Iterator[str]:
        bottom, right = self.top + self.height, WIDTH - RIGHT
        yield f'<text x="{LEFT}" y="{self.top - 14}" class="head">{escape(self.head)}</text>'
        for value in ticks(self.low, self.high, 5):
            y = self.y(value)
            yield f'<line x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" class="grid"/>'
            yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" class="end">{value:g}</text>'
        for year in range(math.ceil(self.years[0] / 5) * 5, self.years[1] + 1, 5):
            x = self.x(year)
            yield f'<line x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 5}" class="axis"/>'
            yield f'<text x="{x:.1f}" y="{bottom + 20}" class="mid">{year}</text>'
        yield f'<path d="M{LEFT} {self.top}V{bottom}H{right}" class="axis"/>'
        middle = self.top + self.height / 2
        yield f'<text transform="translate(20 {middle}) rotate(-90)" class="mid">{escape(self.unit)}</text>'

    def line(self, points: Iterable[Point], colour: str, width: float) -> str:
        """Broken where a month is missing."""
        path, before = "", -math.inf
        for year, value in points:
            path += f"{'L' if year - before < 0.13 else 'M'}{self.x(year):.1f} {self.y(value):.1f}"
            before = year
        return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-linejoin="round"/>'

    def columns(self, points: Iterable[Point]) -> Iterator[str]:
        """From zero, warm and cold in two colours; one path each, as a thousand elements would be slow."""
        zero, width = self.y(0), self.x(1 / 12) - self.x(0)
        paths = {ORANGE: "", SKY: ""}
        for year, value in points:
            x = self.x(year) - width / 2
            paths[ORANGE if value > 0 else SKY] += f"M{x:.1f} {zero:.1f}h{width:.1f}V{self.y(value):.1f}h-{width:.1f}z"
        for colour, path in paths.items():
            yield f'<path d="{path}" fill="{colour}"/>'

    def legend(self, entries: Sequence[tuple[str, str]]) -> Iterator[str]:
        x = float(WIDTH - RIGHT)
        for text, colour in reversed(entries):
            x -= 7.2 * len(text)
            yield f'<text x="{x:.1f}" y="{self.top - 14}">{escape(text)}</text>'
            yield f'<line x1="{x - 24:.1f}" y1="{self.top - 18}" x2="{x - 6:.1f}" y2="{self.top - 18}" '
            yield f'stroke="{colour}" stroke-width="3"/>'
            x -= 40


def chart(title: str, months: list[dict[str, str]], lag: int) -> str:
    def points(column: str) -> list[Point]:
        return [
            (int(row["month"][:4]) + (int(row["month"][5:]) - 0.5) / 12, float(row[column]))
            for row in months
            if row[column]
        ]

    years = (int(months[0]["month"][:4]), int(months[-1]["month"][:4]) + 1)
    co2, growth, nino = points("co2"), points("growth"), points("nino")
    values = [value for _, value in co2]
    level = Panel(years, math.floor(min(values) / 5) * 5, math.ceil(max(values) / 5) * 5, 92, 200,
                  "ppm", "CO2, monthly mean")  # fmt: skip
    most = math.ceil(max(value for _, value in growth))
    least = math.floor(min(0, *(value for _, value in growth)))
    change = Panel(years, least, most, 370, 180, "ppm a year", "Growth over twelve months")
    warmth = Panel(years, math.floor(min(v for _, v in nino)), math.ceil(max(v for _, v in nino)), 628, 120,
                   "°C", "Sea surface off Peru, departure from normal")  # fmt: skip
    parts = [
        *level.frame(),
        level.line(co2, BLUE, 1.4),
        level.line(points("co2_fitted"), VERMILION, 1),
        *level.legend([("measured", BLUE), ("trend and seasons", VERMILION)]),
        *change.frame(),
        change.line(growth, BLUE, 1.4),
        change.line(points("growth_fitted"), VERMILION, 2.2),
        *change.legend([("measured", BLUE), (f"trend and El Niño {lag} months before", VERMILION)]),
        *warmth.frame(),
        *warmth.columns(nino),
        *warmth.legend([("warmer: El Niño", ORANGE), ("colder: La Niña", SKY)]),
    ]
    height = 808
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
            f'<text x="{LEFT}" y="36" class="name">{escape(title)}</text>',
            *parts,
            f'<text x="{LEFT}" y="{height - 10}">Data: Keeling and Whorf, Scripps Institution of Oceanography; '
            "NOAA Climate Prediction Center</text>",
            "</svg>",
            "",
        ]
    )


def main() -> None:
    custom = INPUTS / "algoCustomData.json"
    given = (json.loads(custom.read_text("utf-8")) if custom.exists() else None) or {}
    title = str(given.get("title", TITLE))
    (before,) = json.loads(os.environ["DIDS"])
    folder = INPUTS / before
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    print(f"from the stage before: {', '.join(found)}")
    model = json.loads((folder / "model.json").read_text("utf-8"))
    months = read_csv(folder / "predictions.csv")
    by_year = read_csv(folder / "backtest" / "rmse_by_year.csv")

    OUTPUTS.mkdir(parents=True, exist_ok=True)
    text = report(title, model, by_year)
    (OUTPUTS / "report.md").write_text(text, "utf-8")
    (OUTPUTS / "chart.svg").write_text(chart(title, months, model["growth"]["lag_months"]), "utf-8")
    effect = model["growth"]["terms"]["per_degree_nino"]
    summary = {
        "months": model["months"],
        "ppm_per_degree_nino": effect["value"],
        "standard_error": effect["standard_error"],
        "lag_months": model["growth"]["lag_months"],
        "r_squared": model["growth"]["r_squared"],
        "r_squared_without_nino": model["growth"]["r_squared_without_nino"],
        "forecast_rmse": model["backtest"]["rmse"],
        "skill": model["backtest"]["skill"],
    }
    (OUTPUTS / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
    print(text)


if __name__ == "__main__":
    main()
