"""Tables as papers print them: a block per model, a row per method, a column per bits setting."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.collect import bits_order
from analysis.names import METRICS, MISSING, Metric, method_order, model_title

NOTE = (
    "Each cell: result @ bits stored per quantized coefficient (codes, scales, offsets and tables). "
    "Best result of each column in bold."
)


@dataclass(frozen=True)
class Cell:
    """One entry of a table: result and stored bits per coefficient as printed, and whether it is best."""

    result: str
    stored: str = ""
    best: bool = False


@dataclass(frozen=True)
class Block:
    """The table of one model; the float row stands apart because it has no bits setting."""

    title: str
    model: str
    subtitle: str  # metric with unit and direction, and what ± means
    columns: list[str]
    float_result: str
    rows: list[tuple[str, list[Cell]]]


def blocks(cells: pd.DataFrame) -> list[Block]:
    """One block per model, or per model and data where a model met several; `cells` come from `aggregate`."""
    return [_block(title, block) for title, block in split_by_model(cells)]


def split_by_model(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(title, rows) per model and data; the title names the data only where it tells two blocks apart."""
    data_of = frame.groupby("model")["data"].nunique()
    return [
        (model_title(model) + (f" on {data}" if data_of[model] > 1 else ""), part)
        for (model, data), part in frame.groupby(["model", "data"], sort=False)
    ]


def block_metric(block: pd.DataFrame) -> Metric | None:
    """The metric the block's records report; None when none of them got so far."""
    return next((METRICS[name] for name in block["metric"] if name in METRICS), None)


def best_rows(block: pd.DataFrame) -> set[Any]:
    """Index labels of the best cell of each column; results that print alike are equally good."""
    metric = block_metric(block)
    best: set[Any] = set()
    for _, column in block.groupby("bits"):
        results = column["mean"].dropna()
        if metric is None or results.empty:
            continue
        top = metric.format(results.max() if metric.higher_is_better else results.min())
        best |= {index for index, value in results.items() if metric.format(value) == top}
    return best


def _block(title: str, block: pd.DataFrame) -> Block:
    metric, best = block_metric(block), best_rows(block)
    order = {row["bits"]: bits_order(row) for _, row in block.iterrows()}
    columns = sorted(order, key=lambda bits: order[bits])
    counts = set(block.loc[block["n"] > 0, "n"])
    shared_n = counts.pop() if len(counts) == 1 else None
    by_place = {(row["method"], row["bits"]): (index, row) for index, row in block.iterrows()}

    def cell(method: str, bits: str) -> Cell:
        if (method, bits) not in by_place:
            return Cell(MISSING)
        index, row = by_place[method, bits]
        if row["n"] == 0 or metric is None:
            return Cell("failed")
        result = metric.format(row["mean"])
        if row["n"] > 1:
            result += f" ± {metric.format(row['std'])}" + ("" if shared_n else f" (n={row['n']})")
        stored = MISSING if pd.isna(row["bits_per_coefficient"]) else f"{row['bits_per_coefficient']:.2f}"
        return Cell(result, stored, index in best)

    subtitle = f"{metric.title}, {metric.direction}" if metric else "no result"
    if shared_n and shared_n > 1:
        subtitle += f"; mean ± std over n = {shared_n} seeds"
    elif block["n"].max() > 1:
        subtitle += "; mean ± std over n seeds"
    before = sorted({metric.format(value) for value in block["float"].dropna()}, key=float) if metric else []
    return Block(
        title,
        str(block["model"].iloc[0]),
        subtitle,
        columns,
        " / ".join(before) or MISSING,
        [
            (method, [cell(method, bits) for bits in columns])
            for method in sorted(set(block["method"]), key=method_order)
        ],
    )


def markdown(cells: pd.DataFrame, below: dict[tuple[str, str], str] | None = None) -> str:
    """The table in Markdown, aligned so that it also reads in a terminal.

    `below` holds Markdown to set under the table of a (model, data).
    """
    parts: list[str] = []
    for title, block in split_by_model(cells):
        place = block["model"].iloc[0], block["data"].iloc[0]
        parts += [_markdown_block(_block(title, block)), *filter(None, [(below or {}).get(place)])]
    return "\n\n".join([*parts, NOTE]) + "\n"


def _markdown_block(block: Block) -> str:
    def entry(cell: Cell) -> str:
        result = f"**{cell.result}**" if cell.best else cell.result
        return f"{result} @ {cell.stored}" if cell.stored else result

    rows = [["method", *block.columns], ["float", block.float_result, *[""] * (len(block.columns) - 1)]]
    rows += [[method, *map(entry, entries)] for method, entries in block.rows]
    return f"### {block.title} (`{block.model}`) · {block.subtitle}\n\n{markdown_rows(rows)}"


def markdown_rows(rows: list[list[str]]) -> str:
    """A Markdown table, the first row its header, the first column to the left, the others to the right."""
    rows = [[text.replace("|", "\\|").replace("<", "&lt;") for text in row] for row in rows]
    widths = [max(3, *(len(row[j]) for row in rows)) for j in range(len(rows[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for row in [rows[0], rule, *rows[1:]]:
        entries = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        lines.append(f"| {' | '.join(entries)} |")
    return "\n".join(lines)


def tidy(cells: pd.DataFrame) -> pd.DataFrame:
    """The long form: a row per cell with every number in full, and whether it is the best of its column."""
    best = {index for _, block in split_by_model(cells) for index in best_rows(block)}
    return cells.assign(best=[index in best for index in cells.index])


GREEK = {
    "α": "alpha",
    "β": "beta",
    "γ": "gamma",
    "δ": "delta",
    "ε": "epsilon",
    "λ": "lambda",
    "μ": "mu",
    "σ": "sigma",
    "τ": "tau",
    "Δ": "Delta",
    "Σ": "Sigma",
}
LATEX_SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "·": r"$\cdot$",
    "–": "--",
    "…": r"\ldots{}",
    "−": r"$-$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "→": r"$\rightarrow$",
    "×": r"$\times$",
    "’": "'",
    "“": "``",
    "”": "''",
    **{letter: rf"$\{name}$" for letter, name in GREEK.items()},
}
PLAIN_LATIN = 0x17F  # the last character that any TeX with UTF-8 input has without further packages


def latex_escape(text: str) -> str:
    """Text that prints as it reads, whatever signs it holds; a sign that TeX lacks by its code point."""
    found = re.sub("|".join(map(re.escape, LATEX_SPECIAL)), lambda match: LATEX_SPECIAL[match.group()], text)
    return "".join(sign if ord(sign) <= PLAIN_LATIN else f"U+{ord(sign):04X}" for sign in found)


def latex(cells: pd.DataFrame) -> str:
    """A booktabs tabular, all models in one, each block under its own header."""
    found = blocks(cells)
    width = 1 + max(len(block.columns) for block in found)
    lines = ["% needs \\usepackage{booktabs}", f"\\begin{{tabular}}{{l{'r' * (width - 1)}}}", "\\toprule"]
    for position, block in enumerate(found):
        lines += ["\\midrule[\\heavyrulewidth]"] if position else []
        lines += _latex_block(block, width)
    lines += ["\\bottomrule", "\\end{tabular}"]
    return "\n".join([*lines, f"% {NOTE}"]) + "\n"


def _latex_block(block: Block, width: int) -> list[str]:
    def entry(cell: Cell) -> str:
        result = latex_escape(cell.result)
        result = f"\\textbf{{{result}}}" if cell.best else result
        return f"{result} {{\\scriptsize @\\,{latex_escape(cell.stored)}}}" if cell.stored else result

    def line(entries: list[str]) -> str:
        return " & ".join(entries + [""] * (width - len(entries))).rstrip() + r" \\"

    header = f"\\textbf{{{latex_escape(block.title)}}} {latex_escape('· ' + block.subtitle)}"
    return [
        f"\\multicolumn{{{width}}}{{l}}{{{header}}} \\\\",
        line(["method", *map(latex_escape, block.columns)]),
        "\\midrule",
        line(["float", latex_escape(block.float_result)]),
        *(line([latex_escape(method), *map(entry, entries)]) for method, entries in block.rows),
    ]
