"""Every LaTeX file of a report: its syntax always, and a real compilation where a TeX is found."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from record_factory import failed, record, write

from analysis import paper_table, savings_table, tables
from analysis.bits_saved import bits_saved
from analysis.collect import aggregate, collect_all
from analysis.compare import compare
from analysis.curves import curve_points
from analysis.papers import published

NASTY = r"a_b & 50% #1 {x} $y$ \z~^ <|> λ=3 “é” 漢"
OPTIONS = {"metric": "perplexity", "data": "topics", "before": 3.9}
LINES = {"toprule", "midrule", "bottomrule", "midrule[\\heavyrulewidth]"}


def find_tex() -> str | None:
    """tectonic, which fetches what it lacks, or a pdflatex that has booktabs."""
    if shutil.which("tectonic"):
        return "tectonic"
    if not (shutil.which("pdflatex") and shutil.which("kpsewhich")):
        return None
    found = subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True, text=True).stdout
    return "pdflatex" if found.strip() else None


TEX = find_tex()


def sweep(folder: Path, name: str) -> Path:
    both = [record(method=m, bits=b, result=98 - 4.0 ** (4 - b)) for m in ("rtn", "comq") for b in (4, 3, 2)]
    records = {
        "usual": [*both, *(record("topics_llama", bits=b, result=9 - b, **OPTIONS) for b in (4, 3, 2))],
        "nasty": [*both, record(label=NASTY, bits=3), record(label=NASTY, bits=2, result=-0.5)],
        "seeds": [record(seed=seed, result=90 + seed) for seed in range(3)],
        "one width": [record(method="rtn"), record(method="comq")],
        "failed": [failed(method="comq"), failed(method="rtn", bits=2)],
        "published": [
            record("resnet18", "comq", b, 60.0 + b, data="imagenet", before=69.8) for b in (4, 3, 2)
        ],
    }
    return write(folder, *records[name])


def texts(folder: Path, name: str) -> list[str]:
    found = collect_all([sweep(folder, name)])
    cells = aggregate(found.frame)
    savings = savings_table.with_limit(bits_saved(found.frame), curve_points(cells), found.layers)
    made = [tables.latex(cells), savings_table.latex(savings)]
    if name == "published":
        made.append(paper_table.latex(compare(published("comq"), found.frame), "comq"))
    return made


NAMES = ["usual", "nasty", "seeds", "one width", "failed", "published"]


def check_syntax(text: str) -> None:
    """Raise AssertionError on what TeX would stop at, or set wrongly."""
    for line in text.splitlines():
        if line.startswith("%"):
            continue
        bare = re.sub(r"\\[\\{}&%#$_]", "", line.removesuffix(r"\\").replace(r"\\ ", ""))
        assert bare.count("{") == bare.count("}"), line
        assert bare.count("$") % 2 == 0, line
        assert not re.search(r"[%#]", bare), line
        outside = re.sub(r"\$[^$]*\$", "", bare)
        assert not re.search(r"[_^<>|]", outside), line
        assert all(ord(sign) <= tables.PLAIN_LATIN for sign in line), line
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    found = re.findall(r"\\begin\{tabular\}\{(l+r*)\}\n(.*?)\\end\{tabular\}", body, re.DOTALL)
    assert len(found) == body.count(r"\begin{") == body.count(r"\end{")
    for columns, rows in found:
        for row in filter(None, rows.splitlines()):
            if row.removeprefix("\\") in LINES:
                continue
            assert row.endswith(r"\\"), row
            cells = row.removesuffix(r"\\").replace(r"\&", "").split("&")
            spanned = re.match(r"\\multicolumn\{(\d+)\}", row)
            assert (int(spanned.group(1)) if spanned else len(cells)) <= len(columns), row
            assert bool(spanned) <= (len(cells) == 1), row


@pytest.mark.parametrize("name", NAMES)
def test_syntax(tmp_path: Path, name: str) -> None:
    for text in texts(tmp_path, name):
        check_syntax(text)


@pytest.mark.parametrize(
    "broken",
    [
        "\\begin{tabular}{lr}\na & b & c \\\\\n\\end{tabular}",
        "\\begin{tabular}{lr}\na_b & c \\\\\n\\end{tabular}",
        "\\begin{tabular}{lr}\n50% & c \\\\\n\\end{tabular}",
        "\\begin{tabular}{lr}\n\\textbf{a & c \\\\\n\\end{tabular}",
        "\\begin{tabular}{lr}\na & b\n\\end{tabular}",
        "\\begin{tabular}{lr}\na & 漢 \\\\\n\\end{tabular}",
        "\\begin{tabular}{lr}\na & c \\\\\n",
    ],
)
def test_the_check_finds_what_is_broken(broken: str) -> None:
    with pytest.raises(AssertionError):
        check_syntax(broken)


@pytest.mark.skipif(TEX is None, reason="neither tectonic nor pdflatex with booktabs is on the PATH")
def test_everything_compiles(tmp_path: Path) -> None:
    assert TEX is not None
    made = [text for name in NAMES for text in texts(tmp_path / name, name)]
    document = "\n\n".join(
        [r"\documentclass{article}", r"\usepackage{booktabs}", r"\begin{document}", *made, r"\end{document}"]
    )
    (tmp_path / "document.tex").write_text(document)
    flags = [] if TEX == "tectonic" else ["-interaction=nonstopmode", "-halt-on-error"]
    done = subprocess.run(
        [TEX, *flags, "document.tex"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "document.pdf").read_bytes().startswith(b"%PDF")
    assert "Missing character" not in done.stdout


def test_escaped_text_keeps_plain_letters() -> None:
    assert tables.latex_escape("λ=3 é 漢") == r"$\lambda$=3 é U+6F22"
