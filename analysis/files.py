"""Files of a report: written whole or not at all, figures with their fonts."""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

STYLE = Path(__file__).with_name("style.mplstyle")


def write_bytes(path: Path, content: bytes) -> Path:
    """Replace `path` in one step, so that an interrupted write leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(path)
    return path


def write_text(path: Path, content: str) -> Path:
    """As `write_bytes`, in UTF-8."""
    return write_bytes(path, content.encode())


def write_csv(path: Path, frame: pd.DataFrame) -> Path:
    """All digits of every number; an empty field where there is none."""
    return write_text(path, frame.to_csv(index=False))


def write_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write `name`.png and `name`.pdf; the same figure gives the same PDF bytes."""
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it reports each glyph it embeds
    png, pdf = io.BytesIO(), io.BytesIO()
    with mpl.rc_context(fname=STYLE):  # resolution and font embedding are read when a figure is saved
        figure.savefig(png, format="png")
        figure.savefig(pdf, format="pdf", metadata={"CreationDate": None})
    return [
        write_bytes(folder / f"{name}.png", png.getvalue()),
        write_bytes(folder / f"{name}.pdf", pdf.getvalue()),
    ]
