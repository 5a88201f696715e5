"""
Does El Niño raise the growth of CO2? Stage 0 of the demo; standard library only.

Weekly CO2 at Mauna Loa is averaged by month and described twice: its level by a quadratic trend and two
harmonics of the year, its growth over twelve months by a trend and the sea surface temperature off Peru some
months before. The growth model is then asked to forecast, month after month, with nothing but what was
known at the time, against two baselines.

Reads every file of every data set in DIDS and tells them apart by their header. Parameters, all optional, in
algoCustomData.json: climatology, max_lag, horizon, test_from, hac_lags.
"""

import csv
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

INPUTS = Path(os.environ.get("INPUTS", "/data/inputs"))
OUTPUTS = Path(os.environ.get("OUTPUTS", "/data/outputs"))

DEFAULTS = {
    "climatology": [1951, 1980],  # years that say what is normal; all of them before test_from
    "max_lag": 12,  # months
    "horizon": 6,  # months from what is known to what is forecast
    "test_from": 1981,
    "hac_lags": 18,  # months; growth over twelve months overlaps itself, so its errors hang together
}
MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
SEASONS = ("cos_year", "sin_year", "cos_half_year", "sin_half_year")
LEVEL = ("mean_1980", "per_decade", "per_decade_squared", *SEASONS)
GROWTH = ("growth_1980", "per_decade", "per_degree_nino")

Month = int  # counted from year 0: year * 12 + (month - 1)
Series = dict[Month, float]


class Fit(NamedTuple):
    coefficients: list[float]
    standard_errors: list[float]
    r_squared: float
    rmse: float
    fitted: list[float]

    def as_json(self, names: Sequence[str]) -> dict[str, object]:
        rows = zip(names, self.coefficients, self.standard_errors, strict=True)
        return {
            "n": len(self.fitted),
            "r_squared": self.r_squared,
            "rmse": self.rmse,
            "terms": {name: {"value": b, "standard_error": se, "t": b / se} for name, b, se in rows},
        }


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def solve(columns: Sequence[Sequence[float]], y: Sequence[float]) -> tuple[list[float], list[list[float]]]:
    """Least squares by QR (modified Gram-Schmidt): the coefficients, and the inverse of R."""
    k = len(columns)
    q = [list(column) for column in columns]
    r = [[0.0] * k for _ in range(k)]
    target, along = list(y), [0.0] * k
    for i in range(k):
        r[i][i] = math.sqrt(dot(q[i], q[i]))
        q[i] = [x / r[i][i] for x in q[i]]
        for j in range(i + 1, k):
            r[i][j] = dot(q[i], q[j])
            q[j] = [x - r[i][j] * z for x, z in zip(q[j], q[i], strict=True)]
        along[i] = dot(q[i], target)
        target = [x - along[i] * z for x, z in zip(target, q[i], strict=True)]
    inverse = [[0.0] * k for _ in range(k)]
    for j in range(k):
        for i in range(j, -1, -1):
            rest = sum(r[i][m] * inverse[m][j] for m in range(i + 1, j + 1))
            inverse[i][j] = ((i == j) - rest) / r[i][i]
    return [dot(row, along) for row in inverse], inverse


def regress(rows: Sequence[Sequence[float]], y: Sequence[float], hac_lags: int) -> Fit:
    """Least squares with standard errors that bear autocorrelation (Newey and West 1987)."""
    columns = list(zip(*rows, strict=True))
    b, inverse = solve(columns, y)
    fitted = [dot(row, b) for row in rows]
    residuals = [actual - value for actual, value in zip(y, fitted, strict=True)]
    k, n = len(b), len(y)
    scores = [[e * x for x in row] for e, row in zip(residuals, rows, strict=True)]
    meat = [[0.0] * k for _ in range(k)]
    for lag in range(hac_lags + 1):
        weight = (1 - lag / (hac_lags + 1)) * (0.5 if lag == 0 else 1.0)
        for i in range(k):
            for j in range(k):
                cross = sum(now[i] * then[j] for now, then in zip(scores[lag:], scores, strict=False))
                meat[i][j] += weight * cross
                meat[j][i] += weight * cross
    bread = [[dot(inverse[i], inverse[j]) for j in range(k)] for i in range(k)]  # (X'X)^-1 = R^-1 R^-T
    variances = [sum(bread[i][u] * meat[u][v] * bread[v][i] for u in range(k) for v in range(k)) for i in range(k)]
    errors = [math.sqrt(variance * n / (n - k)) for variance in variances]
    squares = dot(residuals, residuals)
    return Fit(b, errors, 1 - squares / (n * statistics.pvariance(y)), math.sqrt(squares / n), fitted)


def label(month: Month) -> str:
    return f"{month // 12}-{month % 12 + 1:02}"


def decades(month: Month) -> float:
    """Since the start of 1980, from the middle of the month: a scale on which the terms are of like size."""
    return (month + 0.5 - 1980 * 12) / 120


def read_all() -> tuple[Series, Series]:
    """Monthly CO2 in ppm and monthly sea surface temperature in °C."""
    weeks: dict[Month, list[float]] = {}
    sea: Series = {}
    for did in json.loads(os.environ["DIDS"]):
        folder = INPUTS / did
        for path in sorted((p for p in folder.iterdir() if p.is_file()), key=lambda p: int(p.name)):
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            header = set(rows[0]) if rows else set()
            name = f"{did[:8]}/{path.name}"
            if {"date", "co2"} <= header:
                measured = [row for row in rows if row["co2"]]
                for row in measured:
                    date = row["date"]
                    weeks.setdefault(int(date[:4]) * 12 + int(date[4:6]) - 1, []).append(float(row["co2"]))
                print(f"{name}: CO2, {len(rows)} weeks, {len(rows) - len(measured)} without a value")
            elif {"YEAR", *MONTHS} <= header:
                for row in rows:
                    sea |= {int(row["YEAR"]) * 12 + m: float(row[key]) for m, key in enumerate(MONTHS)}
                print(f"{name}: sea surface temperature, {len(rows)} years")
            else:
                print(f"{name}: neither of the two headers; left out")
    if not weeks or not sea:
        raise SystemExit("needs a data set with the columns date,co2 and one with YEAR,JAN,...,DEC")
    return {month: statistics.fmean(values) for month, values in sorted(weeks.items())}, sea


def anomalies(sea: Series, first: int, last: int) -> Series:
    """Each month less the mean of that month of the year in *first* to *last*."""
    normal = [statistics.fmean(sea[year * 12 + m] for year in range(first, last + 1)) for m in range(12)]
    return {month: value - normal[month % 12] for month, value in sea.items()}


def seasons(month: Month) -> list[float]:
    t, angle = decades(month), 2 * math.pi * (month % 12 + 0.5) / 12
    return [1, t, t * t, math.cos(angle), math.sin(angle), math.cos(2 * angle), math.sin(2 * angle)]


def backtest(
    growth: Series, terms: Callable[[Month, int], list[float]], horizon: int, test_from: int
) -> Iterator[dict[str, float]]:
    """
    One forecast a month from *test_from* on, fitted anew each time on the months up to its origin.

    The forecast adds what the growth was at the origin to the terms of the model, all of them at least
    *horizon* months old. *trend* knows the calendar only; *naive* says that growth stays what it was.
    """
    usable = [month for month in growth if month - horizon in growth]
    rows = {month: [*terms(month, horizon), growth[month - horizon]] for month in usable}
    for month in usable:
        if month < test_from * 12:
            continue
        known = [other for other in usable if other <= month - horizon]
        columns = list(zip(*(rows[other] for other in known), strict=True))
        y = [growth[other] for other in known]
        yield {
            "month": month,
            "actual": growth[month],
            "model": dot(rows[month], solve(columns, y)[0]),
            "trend": dot(rows[month][:2], solve(columns[:2], y)[0]),
            "naive": growth[month - horizon],
        }


def write_csv(path: Path, rows: Sequence[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def main() -> None:
    started = time.monotonic()
    custom = INPUTS / "algoCustomData.json"
    given = (json.loads(custom.read_text("utf-8")) if custom.exists() else None) or {}
    p = DEFAULTS | {name: value for name, value in given.items() if name in DEFAULTS}
    print("parameters:", json.dumps(p))
    co2, sea = read_all()
    months = list(co2)
    print(f"{len(months)} months of CO2, {label(months[0])} to {label(months[-1])}")

    level = regress([seasons(month) for month in months], list(co2.values()), p["hac_lags"])
    cycle = [dot(level.coefficients[3:], seasons(month)[3:]) for month in range(12)]
    swing = max(cycle) - min(cycle)
    peak, trough = MONTHS[cycle.index(max(cycle))], MONTHS[cycle.index(min(cycle))]
    print(f"level: R2 {level.r_squared:.4f}, RMSE {level.rmse:.2f} ppm; swing {swing:.1f} ppm, top in {peak}")

    nino = anomalies(sea, *p["climatology"])
    growth = {month: value - co2[month - 12] for month, value in co2.items() if month - 12 in co2}

    def terms(month: Month, lag: int) -> list[float]:
        year_before = [nino[month - lag - back] for back in range(12)]
        return [1, decades(month), statistics.fmean(year_before)]

    fits = {
        lag: regress([terms(month, lag) for month in growth], list(growth.values()), p["hac_lags"])
        for lag in range(p["max_lag"] + 1)
    }
    lag = max(fits, key=lambda tried: fits[tried].r_squared)
    best = fits[lag]
    calendar = regress([terms(month, 0)[:2] for month in growth], list(growth.values()), p["hac_lags"])
    effect, error = best.coefficients[2], best.standard_errors[2]
    print(f"growth: {effect:.2f} +- {error:.2f} ppm a year per degree C, {lag} months later;", end=" ")
    print(f"R2 {best.r_squared:.2f}, without El Niño {calendar.r_squared:.2f}")

    tests = list(backtest(growth, terms, p["horizon"], p["test_from"]))
    scores = {
        name: math.sqrt(statistics.fmean((row[name] - row["actual"]) ** 2 for row in tests))
        for name in ("model", "trend", "naive")
    }
    skill = 1 - scores["model"] / scores["naive"]
    print(f"{len(tests)} forecasts {p['horizon']} months ahead, RMSE in ppm:", end=" ")
    print(", ".join(f"{name} {value:.3f}" for name, value in scores.items()), f"({skill:.0%} below naive)")

    OUTPUTS.mkdir(parents=True, exist_ok=True)
    model = {
        "months": {"first": label(months[0]), "last": label(months[-1]), "n": len(months)},
        "parameters": p,
        "level": level.as_json(LEVEL) | {"swing": swing, "peak": peak, "trough": trough},
        "growth": best.as_json(GROWTH)
        | {
            "lag_months": lag,
            "r_squared_without_nino": calendar.r_squared,
            "r_squared_by_lag": [fits[tried].r_squared for tried in sorted(fits)],
        },
        "backtest": {"n": len(tests), "horizon_months": p["horizon"], "rmse": scores, "skill": skill},
    }
    (OUTPUTS / "model.json").write_text(json.dumps(model, indent=2) + "\n", "utf-8")
    growth_fitted = dict(zip(growth, best.fitted, strict=True))
    write_csv(
        OUTPUTS / "predictions.csv",
        [
            {
                "month": label(month),
                "co2": rounded(co2[month]),
                "co2_fitted": rounded(fitted),
                "growth": rounded(growth.get(month)),
                "growth_fitted": rounded(growth_fitted.get(month)),
                "nino": rounded(nino.get(month)),
            }
            for month, fitted in zip(months, level.fitted, strict=True)
        ],
    )
    write_csv(
        OUTPUTS / "backtest" / "forecasts.csv",
        [
            {"month": label(int(row["month"]))}
            | {name: rounded(row[name]) for name in ("actual", "model", "trend", "naive")}
            for row in tests
        ],
    )
    write_csv(
        OUTPUTS / "backtest" / "rmse_by_year.csv",
        [
            {"year": year, "forecasts": len(rows)}
            | {
                name: rounded(math.sqrt(statistics.fmean((row[name] - row["actual"]) ** 2 for row in rows)))
                for name in scores
            }
            for year in sorted({int(row["month"]) // 12 for row in tests})
            for rows in [[row for row in tests if int(row["month"]) // 12 == year]]
        ],
    )
    written = sorted(str(path.relative_to(OUTPUTS)) for path in OUTPUTS.rglob("*") if path.is_file())
    print(f"wrote {', '.join(written)} in {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
