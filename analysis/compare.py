"""Published numbers and ours side by side: one row per published value and run of ours, and what differs."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from analysis.collect import aggregate
from analysis.labels import bits_label
from analysis.names import method_family, model_title
from analysis.protocol import EVALUATION, EVALUATION_SAMPLES, PROTOCOL

WITHOUT_DATA = ("rtn", "hqq")  # families whose result no calibration set changes

# Two checkpoints whose float results differ by more than this are not the same.
SAME_POINTS = 0.1
SAME_PERPLEXITY = 0.005  # fraction

OUR_NUMBERS = ("mean", "std", "n", "bits_per_coefficient", "seconds", "peak_memory_bytes")


def compare(published: pd.DataFrame, frame: pd.DataFrame) -> pd.DataFrame:
    """Rows in the order of the published table, then our runs of which it says nothing.

    `published` comes from `papers.published`, `frame` from `collect.collect`. A published value meets every
    run of its model (`ours`), method family, weight and activation width and group size. `status` is done,
    failed, not run, or no published value. Drops are what quantization loses of each one's own float number,
    in points or per cent of a perplexity; differences are ours less the paper's. `differs` names what is
    known to differ in the protocol, `unstated` what the source does not say.
    """
    cells = _cells(frame)
    rows, met = [], set()
    for _, printed in published.iterrows():
        found = [index for index, cell in cells.iterrows() if _same(printed, cell)]
        met |= set(found)
        rows += [_row(printed, cells.loc[index]) for index in found] or [_row(printed, None)]
    known = published[published["ours"] != ""].drop_duplicates("ours").set_index("ours")["model"].to_dict()
    for index, cell in cells.iterrows():
        if index not in met:
            title = known.get(cell["model"], model_title(cell["model"]))
            rows.append(_row(None, cell) | {"model": title})
    found = pd.DataFrame(rows)
    # A failed run of ours has no metric of its own: it takes that of its model.
    metrics = found[found["metric"] != ""].drop_duplicates("ours").set_index("ours")["metric"].to_dict()
    found["metric"] = [
        metric or metrics.get(ours, "") for metric, ours in zip(found["metric"], found["ours"], strict=True)
    ]
    return found


def drop(metric: str, result: float, before: float) -> float:
    """Points lost, or per cent of perplexity gained."""
    if metric == "top1_gain":
        return math.nan
    return 100 * (result / before - 1) if metric == "perplexity" else before - result


def setting(printed: pd.Series) -> str:
    """`W3`, `W2 g64`, `W4A8 per tensor`."""
    label = bits_label({"weight": printed["weight_bits"]})
    if not math.isnan(printed["activation_bits"]):
        label += f"A{printed['activation_bits']:g}"
    if printed["granularity"] == "tensor":
        return f"{label} per tensor"
    if not math.isnan(printed["group_size"]):
        return f"{label} g{printed['group_size']:g}"
    return label + (" groups" if printed["granularity"].startswith("group") else "")


def _cells(frame: pd.DataFrame) -> pd.DataFrame:
    """The cells of `aggregate` with the protocol of each, equal for all seeds."""
    keys = ["model", "data", "method", "bits"]
    done_first = frame.sort_values("status", kind="stable")  # "done" before "failed"
    extra = done_first.groupby(keys, sort=False, as_index=False)[
        [*PROTOCOL, "samples", "method_name"]
    ].first()
    return aggregate(frame).merge(extra, on=keys, how="left")


def _same(printed: pd.Series, cell: pd.Series) -> bool:
    return (
        printed["ours"] != ""
        and (cell["model"], method_family(cell["method"])) == (printed["ours"], printed["family"])
        and cell["metric"] in ("", printed["metric"])
        and cell["weight_bits"] == printed["weight_bits"]
        and _equal(cell["group_size"], printed["group_size"])
        and _equal(cell["activation_bits"], printed["activation_bits"])
        and not printed["granularity"].startswith("group (")
    )


def _equal(a: float, b: float) -> bool:
    return a == b or (pd.isna(a) and pd.isna(b))


def _row(printed: pd.Series | None, cell: pd.Series | None) -> dict[str, Any]:
    row: dict[str, Any] = {}
    if printed is not None:
        metric = str(printed["metric"])
        row |= {name: printed[name] for name in ("paper", "table", "method", "family", "model", "ours")}
        row |= {"metric": metric, "setting": setting(printed)}
        row |= {"published": printed["value"], "published_float": printed["float"]}
        row["published_drop"] = drop(metric, printed["value"], printed["float"])
        row["published_hours"] = printed["hours"]
    else:
        assert cell is not None
        metric = str(cell["metric"])
        row |= {"paper": "", "table": "", "method": "", "family": method_family(cell["method"])}
        row |= {"model": "", "ours": cell["model"], "metric": metric}
        row |= {"setting": cell["bits"], **dict.fromkeys(_PUBLISHED, math.nan)}
    row |= {name: (cell if printed is None else printed)[name] for name in ("weight_bits", "group_size")}
    row |= {"run": "", "run_setting": "", "status": "not run", "failed": 0}
    row |= {"float": math.nan, **dict.fromkeys(OUR_NUMBERS, math.nan), "drop": math.nan}
    if cell is not None:
        row |= {"run": cell["method"], "run_setting": cell["bits"], "float": cell["float"]}
        row |= {name: cell[name] for name in OUR_NUMBERS}
        row |= {"drop": drop(metric, cell["mean"], cell["float"]), "failed": cell["failed"]}
        row["status"] = "failed" if cell["n"] == 0 else "done"
    if printed is None or math.isnan(row["published"]):
        row["status"] = "no published value" if row["status"] == "done" else row["status"]
    row["difference"] = row["mean"] - row["published"]
    row["drop_difference"] = row["drop"] - row["published_drop"]
    differs, unstated = ([], []) if printed is None or cell is None else _protocol(printed, cell)
    row |= {"differs": ", ".join(differs), "unstated": ", ".join(unstated)}
    for name in ("tier", "source", "notes"):
        row[name] = "" if printed is None else printed[name]
    return row


_PUBLISHED = ("published", "published_float", "published_drop", "published_hours")


def _protocol(printed: pd.Series, cell: pd.Series) -> tuple[list[str], list[str]]:
    """What differs, each with the paper's value and ours, and what the source does not say."""
    pairs: list[tuple[str, Any, Any]] = [
        ("first/last", printed["first_last"], cell["first_last"]),
        ("tuning", printed["tuning"], cell["tuning"]),
        ("evaluation data", printed["data"], EVALUATION.get(cell["data"], cell["data"])),
    ]
    if printed["family"] not in WITHOUT_DATA:
        pairs.append(("calibration", printed["calibration"], cell["calibration_data"]))
        if "none" not in (printed["calibration"], cell["calibration_data"]):
            size = printed["calibration_samples"]
            pairs.append(("calibration size", size, cell["calibration_samples"]))
    if printed["metric"] == "perplexity":
        pairs.append(("context", printed["context"], cell["context"]))
    differs, unstated = [], []
    for name, theirs, ours in pairs:
        if theirs == "" or pd.isna(theirs):
            unstated.append(name)
        elif theirs != ours:
            differs.append(f"{name} ({_word(theirs)} → {_word(ours)})")
    if printed["granularity"] == "tensor":
        differs.append("granularity (per tensor there)")
    full = EVALUATION_SAMPLES.get(printed["data"], math.nan)
    if cell["samples"] < full:
        differs.append(f"evaluation samples ({full:g} → {cell['samples']:g})")
    if _other_checkpoint(str(printed["metric"]), printed["float"], cell["float"]):
        differs.append("float model")
    return differs, unstated


def _other_checkpoint(metric: str, theirs: float, ours: float) -> bool:
    if metric == "perplexity":
        return abs(ours / theirs - 1) > SAME_PERPLEXITY
    return abs(ours - theirs) > SAME_POINTS


def _word(value: Any) -> str:
    if isinstance(value, str):
        return value or "–"
    return "–" if pd.isna(value) else f"{value:g}"
