"""`ptq-report DIR...`: the records of a sweep as tables and figures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis import paper_table, savings_table, tables
from analysis.against import UnknownKeyError, against
from analysis.against import markdown as against_markdown
from analysis.against_figure import draw_against
from analysis.bits_saved import bits_saved
from analysis.checks import mixed_protocols
from analysis.collect import aggregate, collect_all
from analysis.compare import compare
from analysis.curves import curve_points
from analysis.figures import draw
from analysis.files import write_csv, write_figure, write_text
from analysis.loss_curves import loss_points
from analysis.names import method_order
from analysis.papers import papers, published


class NoRecordsError(ValueError):
    """A folder to report on is missing or holds no record; the message says which."""


@dataclass(frozen=True)
class Report:
    """What was written: the Markdown tables, every file, and lines on what a reader should know.

    `problems` has a line per record that gave no result, `warnings` one per way in which jobs do not compare,
    `duplicates` one per record that another replaces.
    """

    markdown: str
    paths: list[Path]
    problems: list[str]
    warnings: list[str]
    duplicates: list[str]
    paper: str = ""  # the published numbers beside ours, where a paper was asked for
    against: str = ""  # the results against one key, where that was asked for

    def text(self) -> str:
        """The report as the command prints it."""
        parts = [
            self.markdown,
            *filter(None, [self.paper, self.against]),
            "Written:\n" + "\n".join(f"  {path}" for path in self.paths),
        ]
        for title, lines in (
            ("Not run alike", self.warnings),
            ("Duplicates", self.duplicates),
            ("Problems", self.problems),
        ):
            if lines:
                parts.append(f"{title} ({len(lines)}):\n" + "\n".join(f"  {line}" for line in lines))
        return "\n\n".join(part.rstrip("\n") for part in parts)


class UnknownBaselineError(ValueError):
    """No record has a result of the method to set the others against; the message names those that have."""


def write_report(
    dirs: list[Path],
    output: Path | None = None,
    metric: str | None = None,
    baseline: str | None = None,
    paper: str | None = None,
    html: bool = False,
    key: str | None = None,
) -> Report:
    """Read every record under `dirs`; write tables and figures into `output`, by default `dirs[0]`.

    `metric` is for image models, by default top1; language models have perplexity. `baseline` is the method
    that bits are saved against, by default rtn where a model has it, else its first. `paper` names published
    numbers to set beside ours. `html` adds report.html, all of it on one page. `key` is a key of the config
    to set the results against. Raises NoRecordsError, UnknownBaselineError, UnknownKeyError and
    UnknownPaperError.
    """
    for folder in dirs:
        if not folder.is_dir():
            raise NoRecordsError(
                f"{folder} is not a folder; give the folder that a sweep wrote its jobs into"
            )
    found = collect_all(dirs, metric)
    if found.frame.empty:
        searched = ", ".join(map(str, dirs))
        raise NoRecordsError(
            "\n  ".join([f"no record.json with a result or an error under {searched}", *found.problems])
        )
    folder = output or dirs[0]
    cells = aggregate(found.frame)
    points = curve_points(cells)
    if baseline and baseline not in {*points["line"], *points["method"]}:
        known = ", ".join(sorted(set(points["method"]), key=method_order)) or "none"
        raise UnknownBaselineError(f"no result of the baseline {baseline!r}; methods with results: {known}")
    savings = savings_table.with_limit(bits_saved(found.frame, baseline), points, found.layers)
    table = tables.markdown(cells, below=savings_table.markdown(savings))
    table += f"\n{savings_table.NOTE}\n" if len(savings) else ""
    drawn = draw(cells, found.layers)
    drawn.add_losses(loss_points(found), cells)
    warnings = mixed_protocols(found.frame, found.records)
    paths = [
        write_text(folder / "table.md", table),
        write_csv(folder / "table.csv", tables.tidy(cells)),
        write_text(folder / "table.tex", tables.latex(cells)),
        write_csv(folder / "bits_saved.csv", savings),
        write_text(folder / "bits_saved.tex", savings_table.latex(savings)),
        *drawn.write(folder),
    ]
    beside, rows = "", None
    if paper:
        rows = compare(published(paper), found.frame)
        beside = paper_table.markdown(rows, paper)
        paths += [
            write_text(folder / f"paper_{paper}.md", beside),
            write_csv(folder / f"paper_{paper}.csv", rows),
            write_text(folder / f"paper_{paper}.tex", paper_table.latex(rows, paper)),
        ]
    ablation = ""
    if key:
        values = against(found, key)
        ablation = against_markdown(values, key)
        paths += [
            write_text(folder / "against.md", ablation),
            write_csv(folder / "against.csv", values),
            *write_figure(draw_against(values, key), folder, "against"),
        ]
    if html:
        from analysis.page import page  # here, so that only a page pays for what commands are made from

        content = page(dirs[0].resolve().name, found, cells, savings, drawn, warnings, rows)
        paths.append(write_text(folder / "report.html", content))
    return Report(table, paths, found.problems, warnings, found.duplicates, beside, ablation)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `ptq-report`; exit status 1 when there is nothing to report on."""
    parser = argparse.ArgumentParser(
        prog="ptq-report", description="Tables and figures from the records under the given folders."
    )
    parser.add_argument(
        "dirs", nargs="+", type=Path, metavar="DIR", help="folder with job folders, at any depth"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write; default: the first DIR")
    parser.add_argument("--metric", choices=["top1", "top5"], help="metric of image models; default: top1")
    parser.add_argument(
        "--baseline", metavar="NAME", help="method that bits are saved against; default: rtn, else the first"
    )
    parser.add_argument(
        "--paper",
        choices=papers(),
        help="set this paper's published numbers beside ours in tables of their own",
    )
    parser.add_argument(
        "--html", action="store_true", help="also write report.html: everything on one page, from disk"
    )
    parser.add_argument(
        "--against", metavar="KEY", help="also set the results against this key of the config (method.sweeps)"
    )
    options = parser.parse_args(argv)
    try:
        report = write_report(
            options.dirs,
            options.output,
            options.metric,
            options.baseline,
            options.paper,
            options.html,
            options.against,
        )
    except (NoRecordsError, UnknownBaselineError, UnknownKeyError) as error:
        raise SystemExit(f"ptq-report: {error}") from None
    print(report.text())


if __name__ == "__main__":
    main()
