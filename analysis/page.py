"""One self-contained page: tables that sort, figures, what each job was, and what went wrong."""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from analysis import paper_table, savings_table, tables
from analysis.collect import Collection
from analysis.commands import command
from analysis.compare import drop
from analysis.figures import Drawings
from analysis.files import STYLE
from analysis.labels import bits_label
from analysis.layer_figure import bits_settings
from analysis.names import METRICS, MISSING, method_order, model_title
from analysis.records import Record, dict_at
from analysis.tables import split_by_model

TEMPLATE = "page.html.jinja"
NUMERIC = (*"0123456789–−≤>+-.", "")  # what the text of a number or of a gap begins with
PIXELS_PER_INCH = 132
ALT = {  # figures of all models, and what a reader who cannot see them is told
    "curves": "Result against stored bits per coefficient",
    "time": "Result against seconds to quantize",
    "errors": "Error of the layers against stored bits, with the Gaussian limit",
}


@dataclass(frozen=True)
class Entry:
    """A table's cell: its text, the value it is sorted by where that is another, and whether it is bold."""

    text: str
    value: float | str | None = None
    bold: bool = False
    small: str = ""


@dataclass(frozen=True)
class Grid:
    """A table: header, rows, and rows that stay above them however these are sorted."""

    header: list[str]
    rows: list[list[Entry]]
    fixed: list[list[Entry]] = field(default_factory=list)

    @property
    def left(self) -> list[bool]:
        """Per column whether it holds words, which stand to the left."""
        return [
            j == 0 or all(row[j].text[:1] not in NUMERIC for row in self.rows)
            for j in range(len(self.header))
        ]


@dataclass(frozen=True)
class Image:
    """A drawing as a data URI, so that names inside one cannot meet those of another; width in pixels."""

    uri: str
    width: int


@dataclass(frozen=True)
class Model:
    """The section of one model."""

    anchor: str
    title: str
    subtitle: str
    results: Grid
    savings: Grid | None
    savings_title: str
    savings_notes: list[str]
    figure: Image | None  # the error of each layer
    layers: list[tuple[str, Grid]]  # per bits setting


@dataclass(frozen=True)
class Job:
    """What one record says of itself."""

    title: str
    status: str
    error: str
    traceback: str
    command: str
    config: str
    path: str


def page(
    title: str,
    found: Collection,
    cells: pd.DataFrame,
    savings: pd.DataFrame,
    drawn: Drawings,
    warnings: Sequence[str],
    published: pd.DataFrame | None = None,
) -> str:
    """The HTML. `cells` come from `aggregate`, `savings` from `savings_table.with_limit`, `published` rows
    from `compare`.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jobs = [_job(record, row) for record, (_, row) in zip(found.records, found.frame.iterrows(), strict=True)]
    return environment.get_template(TEMPLATE).render(
        title=title,
        count=len(jobs),
        failed=[job for job in jobs if job.status != "done"],
        problems=found.problems,
        duplicates=found.duplicates,
        warnings=list(warnings),
        summary=_summary(cells),
        figures=[(ALT[name], _svg(drawn.figures[name])) for name in ALT if name in drawn.figures],
        models=_models(cells, savings, drawn),
        published=[(name, _plain_grid(rows), notes) for name, rows, notes in paper_table.blocks(published)]
        if published is not None
        else [],
        jobs=jobs,
        environment=_environment(found.records),
        notes={"table": tables.NOTE, "savings": savings_table.NOTE, "paper": paper_table.NOTE},
    )


def _summary(cells: pd.DataFrame) -> Grid:
    """Every cell of every model in one table."""
    header = ["model", "method", "bits", "result", "float", "loss", "stored bits", "whole model", "solving"]
    header += ["whole job", "memory", "jobs"]
    best = {index for _, block in split_by_model(cells) for index in tables.best_rows(block)}
    rows = []
    for index, row in cells.iterrows():
        metric = METRICS.get(row["metric"])
        loss = drop(row["metric"], row["mean"], row["float"]) if metric else math.nan
        spread = f" ± {metric.format(row['std'])}" if metric and row["n"] > 1 else ""
        failed = f", {row['failed']} failed" if row["failed"] else ""
        rows.append(
            [
                Entry(model_title(row["model"])),
                Entry(row["method"]),
                Entry(row["bits"], row["bits_per_coefficient"]),
                Entry(_result(metric, row["mean"], row["n"]) + spread, row["mean"], index in best),
                Entry(_result(metric, row["float"]), row["float"]),
                Entry(paper_table.drop_text(row["metric"], loss), loss),
                Entry(_number(row["bits_per_coefficient"], ".3f"), row["bits_per_coefficient"]),
                Entry(_number(row["model_bits_per_coefficient"], ".3f"), row["model_bits_per_coefficient"]),
                Entry(paper_table.seconds_text(row["solve_seconds"]), row["solve_seconds"]),
                Entry(paper_table.seconds_text(row["seconds"]), row["seconds"]),
                Entry(paper_table.memory_text(row["peak_memory_bytes"]), row["peak_memory_bytes"]),
                Entry(f"{row['n']}{failed}", row["n"]),
            ]
        )
    return Grid(header, rows)


def _models(cells: pd.DataFrame, savings: pd.DataFrame, drawn: Drawings) -> list[Model]:
    saved = {}
    if len(savings):
        for _, block in split_by_model(savings):
            saved[tuple(block[["model", "data"]].iloc[0])] = block
    errors = drawn.points.get("layers")
    found = []
    for number, ((_, block), table) in enumerate(
        zip(split_by_model(cells), tables.blocks(cells), strict=True), start=1
    ):
        place = tuple(block[["model", "data"]].iloc[0])
        own = saved.get(place)
        layers: list[tuple[str, Grid]] = []
        if errors is not None:
            mine = errors[(errors["model"] == place[0]) & (errors["data"] == place[1])]
            settings = [each for each in bits_settings(block) if each in set(mine["bits"])]
            layers = [(each, _layer_errors(mine[mine["bits"] == each])) for each in settings]
        known = own is not None and not savings_table.one_width(own)
        found.append(
            Model(
                anchor=f"model{number}",
                title=table.title,
                subtitle=f"{table.model} · {table.subtitle}",
                results=_results(table),
                savings=_plain_grid(savings_table.rows(own)) if own is not None and known else None,
                savings_title=savings_table.subtitle(own) if own is not None else "",
                savings_notes=savings_table.notes(own) if own is not None and known else [],
                figure=_svg(drawn.figures[drawn.of_model[place]]) if place in drawn.of_model else None,
                layers=layers,
            )
        )
    return found


def _results(table: tables.Block) -> Grid:
    """The table of one model as papers print it."""
    blank = [Entry("")] * (len(table.columns) - 1)
    rows = [
        [
            Entry(method),
            *(
                Entry(cell.result, None, cell.best, f"@ {cell.stored}" if cell.stored else "")
                for cell in entries
            ),
        ]
        for method, entries in table.rows
    ]
    return Grid(["method", *table.columns], rows, [[Entry("float"), Entry(table.float_result), *blank]])


def _layer_errors(points: pd.DataFrame) -> Grid:
    """Rows the layers, columns the methods; the least error of a layer is bold."""
    methods = sorted(set(points["method"]), key=method_order)
    values = points.pivot_table(index=["position", "layer"], columns="method", values="relative_error")
    rows = []
    for (position, layer), errors in values.iterrows():
        least = errors.min()
        entries = [
            Entry(_number(errors.get(m, math.nan), ".4f"), errors.get(m), errors.get(m) == least)
            for m in methods
        ]
        rows.append([Entry(str(position), position), Entry(layer), *entries])
    return Grid(["", "layer", *methods], rows)


def _plain_grid(rows: list[list[str]]) -> Grid:
    return Grid(rows[0], [[Entry(text) for text in row] for row in rows[1:]])


def _job(record: Record, row: pd.Series) -> Job:
    error = record.content.get("error")
    setting = bits_label(dict_at(record.config, "bits"))
    seed = "" if record.seed is None else f", seed {record.seed}"
    return Job(
        title=f"{model_title(row['model'])} · {row['method']} · {setting}{seed}",
        status=str(record.content["status"]),
        error=record.error,
        traceback=str(error.get("traceback") or "") if isinstance(error, dict) else "",
        command=command(record) if record.config else "",
        config=yaml.safe_dump(record.config, sort_keys=False, allow_unicode=True) if record.config else "",
        path=str(record.path),
    )


def _environment(records: Sequence[Record]) -> Grid:
    """Devices and versions, with the number of jobs that had each."""
    counts: Counter[tuple[str, str]] = Counter()
    for record in records:
        counts["device", str(record.content.get("device") or MISSING)] += 1
        counts.update((name, str(value)) for name, value in dict_at(record.content, "versions").items())
    rows = [[Entry(name), Entry(value), Entry(str(number))] for (name, value), number in counts.items()]
    return Grid(["what", "is", "jobs"], sorted(rows, key=lambda row: (row[0].text != "device", row[0].text)))


def _result(metric: Any, value: float, n: int = 1) -> str:
    if metric is None or not n:
        return "failed" if not n else MISSING
    return metric.format(value) if not math.isnan(value) else MISSING


def _number(value: float, form: str) -> str:
    return f"{value:{form}}".replace("-", "−") if math.isfinite(value) else MISSING


def _svg(figure: Figure) -> Image:
    buffer = io.BytesIO()
    with mpl.rc_context(
        {**mpl.rc_params_from_file(STYLE, use_default_template=False), "svg.hashsalt": "ptq"}
    ):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    uri = f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Image(uri, round(PIXELS_PER_INCH * figure.get_figwidth()))
