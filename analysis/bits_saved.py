"""What one method saves over another on one model, in stored bits per coefficient.

Two numbers. The average horizontal distance between the two result-against-bits curves over the results that
both reach (after Bjøntegaard, ITU-T VCEG-M33, with a monotone interpolant in place of his cubic), and the
bits that each needs to stay within a fixed drop of the float model.

A curve is bits as a function of quality: top-1 as it is, perplexity as −log, so that more is better. Its
points are rearranged, bits and qualities sorted apart, so that more bits never mean less quality; of equal
qualities the one with the fewest bits stays; PCHIP joins them. Nothing is extrapolated: outside its measured
results a curve gives a bound or nothing. x is what is stored, never the nominal width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import PchipInterpolator

from analysis.collect import aggregate
from analysis.curves import curve_points
from analysis.names import METRICS, Metric, method_order
from analysis.tables import split_by_model

Array = NDArray[np.float64]

POINT_DROPS = (0.5, 1.0, 2.0)  # points of top-1 or top-5
PERPLEXITY_RISES = (1.0, 5.0, 10.0)  # per cent of the float perplexity
RESAMPLES = 1000
LEVEL = 0.95
LOST_RESAMPLES = 0.05  # more than this share of resamples without a common range: no interval


@dataclass(frozen=True)
class Average:
    """Average bits saved over `low` to `high` (qualities); NaN and the reason where there is none."""

    saved: float
    low: float = math.nan
    high: float = math.nan
    reason: str = ""


@dataclass(frozen=True)
class Bounds:
    """A number known to lie between two; equal when it is known."""

    low: float
    high: float

    def minus(self, other: Bounds) -> Bounds:
        return Bounds(self.low - other.high, self.high - other.low)


class Curve:
    """Bits needed for a quality, from measured points (bits, quality), one per width."""

    def __init__(self, bits: ArrayLike, quality: ArrayLike) -> None:
        bits, quality = np.sort(np.asarray(bits, float)), np.sort(np.asarray(quality, float))
        first = np.append(True, np.diff(quality) > 0)  # of equal qualities, the fewest bits
        self.bits, self.quality = bits[first], quality[first]
        self._interpolant = PchipInterpolator(self.quality, self.bits) if len(self.bits) > 1 else None

    @property
    def low(self) -> float:
        return float(self.quality[0])

    @property
    def high(self) -> float:
        return float(self.quality[-1])

    def needed(self, quality: float) -> Bounds:
        """Bits that reach `quality`; one-sided outside the measured qualities."""
        if quality > self.high:
            return Bounds(float(self.bits[-1]), math.inf)
        if quality < self.low:
            return Bounds(-math.inf, float(self.bits[0]))
        value = float(self.bits[0] if self._interpolant is None else self._interpolant(quality))
        return Bounds(value, value)

    def mean_bits(self, low: float, high: float) -> float:
        """Average of the bits over the qualities from `low` to `high`, both measured."""
        assert self._interpolant is not None
        return float(self._interpolant.integrate(low, high)) / (high - low)


def average_saved(base: Curve, other: Curve, metric: Metric) -> Average:
    """Average over the common qualities of the bits that `other` needs less than `base`."""
    for name, curve in (("the baseline", base), ("the method", other)):
        if len(curve.bits) < 2:
            return Average(math.nan, reason=f"{name} has one result only; a curve takes two")
    low, high = max(base.low, other.low), min(base.high, other.high)
    if not low < high:
        spans = [f"{_span(curve.low, curve.high, metric)}" for curve in (base, other)]
        return Average(
            math.nan, reason=f"no common range: the baseline has {spans[0]}, the method {spans[1]}"
        )
    return Average(base.mean_bits(low, high) - other.mean_bits(low, high), low, high)


def quality(result: ArrayLike, metric: Metric) -> Array:
    """A scale on which more is better: per cent as they are, perplexity as −log."""
    values = np.asarray(result, float)
    return values if metric.higher_is_better else -np.log(values)


def result(quality: float, metric: Metric) -> float:
    """Inverse of `quality`."""
    return quality if metric.higher_is_better else math.exp(-quality)


def drops(metric: Metric) -> dict[str, float]:
    """How a drop from float is called → its size in quality."""
    if metric.higher_is_better:
        return {f"−{drop:g} {'point' if drop == 1 else 'points'}": -drop for drop in POINT_DROPS}
    return {f"+{rise:g} %": -math.log1p(rise / 100) for rise in PERPLEXITY_RISES}


def bits_saved(frame: pd.DataFrame, baseline: str | None = None) -> pd.DataFrame:
    """One row per model and curve: bits saved against the model's baseline.

    `frame` comes from `collect.collect`. `baseline` is a method label; by default rtn where it is, else the
    first method in table order. Columns: `saved` with `saved_low`, `saved_high` (95 % bootstrap) and
    `interval` (what was resampled, or why not), `range_low`, `range_high` (results), `reason` (why `saved` is
    missing), and per drop i: `drop_i` (its name), `needed_i_low`, `needed_i_high`, `saved_i_low`,
    `saved_i_high` (bounds, equal where the number is known). Rows without a baseline have NaN and the reason.
    """
    cells = aggregate(frame)
    points = curve_points(cells)
    rows = []
    for _, block in split_by_model(points):
        metric = METRICS[block["metric"].iloc[0]]
        lines = sorted(set(block["line"]), key=method_order)
        base = baseline_line(block, baseline)
        parts = {line: _replicas(frame, block[block["line"] == line]) for line in lines}
        target = float(quality(block["float"].mean(), metric))
        for line in lines:
            place = block.iloc[0]
            row: dict[str, Any] = {
                "model": place["model"],
                "data": place["data"],
                "method": block.loc[block["line"] == line, "method"].iloc[0],
                "line": line,
                "baseline": base or "",
                "metric": metric.name,
                "float": block["float"].mean(),
                "points": len(parts[line]),
            }
            against = parts.get(base or "")
            rows.append({**row, **_compare(against, parts[line], line == base, metric, target)})
    return pd.DataFrame(rows)


def baseline_line(block: pd.DataFrame, baseline: str | None) -> str | None:
    """The curve of one model that others are set against; None where `baseline` has no result there.

    A name that is a method with several curves means its plain one (no groups, no wider ends) if it has one.
    """
    lines = sorted(set(block["line"]), key=method_order)
    wanted = baseline or ("rtn" if "rtn" in set(block["method"]) else lines[0])
    if wanted in lines:
        return wanted
    of_method = sorted(set(block.loc[block["method"] == wanted, "line"]), key=lambda line: (len(line), line))
    return of_method[0] if of_method else None


@dataclass(frozen=True)
class Replica:
    """One point of a curve with what it can be resampled from."""

    bits: float
    results: Array  # per seed
    seeds: tuple[int, ...]
    samples: int | None  # evaluation samples; None where the record does not say


def _replicas(frame: pd.DataFrame, line: pd.DataFrame) -> list[Replica]:
    found = []
    for _, point in line.iterrows():
        same = [frame[key] == point[key] for key in ("model", "data", "method", "bits")]
        done = frame[np.logical_and.reduce([*same, frame["status"] == "done"])]
        samples = done["samples"].min()
        found.append(
            Replica(
                bits=point["bits_per_coefficient"],
                results=done["quantized"].to_numpy(float),
                seeds=tuple(-1 if pd.isna(seed) else int(seed) for seed in done["seed"]),
                samples=int(samples) if samples > 0 else None,
            )
        )
    return found


def _compare(
    base: list[Replica] | None, other: list[Replica], itself: bool, metric: Metric, target: float
) -> dict[str, Any]:
    curve = _curve(other, metric)
    row: dict[str, Any] = dict.fromkeys(
        ("saved", "saved_low", "saved_high", "range_low", "range_high"), math.nan
    )
    row |= {"interval": "", "reason": ""}
    if base is None:
        row["reason"] = "the baseline has no result on this model"
    elif not itself:
        average = average_saved(_curve(base, metric), curve, metric)
        row |= {"saved": average.saved, "reason": average.reason}
        if math.isfinite(average.saved):
            ends = sorted(result(end, metric) for end in (average.low, average.high))
            row["range_low"], row["range_high"] = ends
            row["saved_low"], row["saved_high"], row["interval"] = bootstrap(base, other, metric)
    for i, (name, drop) in enumerate(drops(metric).items(), start=1):
        needed = curve.needed(target + drop)
        saved = Bounds(-math.inf, math.inf)
        if base is not None and not itself:
            saved = _curve(base, metric).needed(target + drop).minus(needed)
        row |= {f"drop_{i}": name, f"needed_{i}_low": needed.low, f"needed_{i}_high": needed.high}
        row |= {f"saved_{i}_low": saved.low, f"saved_{i}_high": saved.high}
    return row


def bootstrap(
    base: Sequence[Replica], other: Sequence[Replica], metric: Metric, resamples: int = RESAMPLES
) -> tuple[float, float, str]:
    """95 % percentile interval of the average bits saved, and what was resampled or why there is none.

    With two seeds or more at every point, seeds: the same draw for all points where all have the same seeds.
    Otherwise, for an accuracy, the evaluation samples of each point as a binomial; the points are drawn apart
    although they share their samples, which widens the interval.
    """
    rng = np.random.default_rng(0)
    points = [*base, *other]
    fewest = min(len(point.results) for point in points)
    if fewest > 1:
        paired = len({point.seeds for point in points}) == 1

        def draw() -> list[float]:
            picks = rng.integers(fewest, size=fewest)
            return [
                float(
                    p.results[picks if paired else rng.integers(len(p.results), size=len(p.results))].mean()
                )
                for p in points
            ]

        what = (
            f"{fewest} seeds" if len({len(point.results) for point in points}) == 1 else f"≥ {fewest} seeds"
        )
    elif not metric.higher_is_better:
        return math.nan, math.nan, "n/a: one seed"
    elif any(point.samples is None for point in points):
        return math.nan, math.nan, "n/a: one seed, evaluation samples unknown"
    else:
        counts = [point.samples or 0 for point in points]
        shares = [float(np.clip(point.results.mean() / 100, 0, 1)) for point in points]

        def draw() -> list[float]:
            return [float(x) for x in 100 * rng.binomial(counts, shares) / np.asarray(counts)]

        what = f"{min(counts)} samples" if len(set(counts)) == 1 else f"≥ {min(counts)} samples"
    bits = [point.bits for point in points]
    middle = len(base)
    found = []
    for _ in range(resamples):
        y = quality(draw(), metric)
        curves = Curve(bits[:middle], y[:middle]), Curve(bits[middle:], y[middle:])
        found.append(average_saved(*curves, metric).saved)
    kept = np.asarray(found)[np.isfinite(found)]
    if len(kept) < (1 - LOST_RESAMPLES) * resamples:
        return (
            math.nan,
            math.nan,
            f"n/a: {resamples - len(kept)} of {resamples} resamples have no common range",
        )
    low, high = np.quantile(kept, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high), what


def _curve(points: Sequence[Replica], metric: Metric) -> Curve:
    means = [point.results.mean() for point in points]
    return Curve([point.bits for point in points], quality(means, metric))


def _span(low: float, high: float, metric: Metric) -> str:
    ends = sorted({result(low, metric), result(high, metric)})
    return " to ".join(metric.format(end) for end in ends)
