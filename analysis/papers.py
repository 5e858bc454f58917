"""The papers' own numbers as data: one CSV per paper under `published/`, one row per printed value.

A row without a value is a gap: the paper (or we) should have the number and it could not be found. Tier A was
read in the authors' repository, documentation or PDF, tier B in a transcription or another paper's quotation.
An empty protocol field means that the source does not say.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).with_name("published")

NUMBERS = (
    "weight_bits",
    "activation_bits",  # empty: activations stay float
    "group_size",  # empty: the whole row, or see `granularity`
    "value",  # per cent, perplexity, or points for top1_gain
    "float",  # of the checkpoint that the value belongs to
    "context",  # tokens of an evaluation window
    "calibration_samples",
    "hours",  # to quantize, on the paper's hardware
)
WORDS = (
    "paper",
    "table",
    "method",  # as printed
    "family",  # what it is called here, see names.KNOWN_METHODS; empty where there is no counterpart
    "model",  # as papers call it
    "ours",  # its choice of conf/model; empty where there is none
    "data",  # what is evaluated on
    "metric",
    "granularity",  # of the weight scales
    "first_last",  # all: at the target width; 8; blocks: only layers inside blocks are quantized
    "tuning",  # none, block, network, or labels for supervised tuning
    "calibration",  # none: no data
    "tier",
    "source",  # where the value was read
    "notes",
)


class UnknownPaperError(ValueError):
    """No file of published numbers has this name; the message lists those there are."""


def papers() -> list[str]:
    """Names that `published` takes."""
    return sorted(path.stem for path in FOLDER.glob("*.csv"))


def published(paper: str) -> pd.DataFrame:
    """Published numbers of a paper in file order; NaN or the empty string where a field is empty."""
    if paper not in papers():
        raise UnknownPaperError(f"no published numbers of {paper!r}; there are: {', '.join(papers())}")
    frame = pd.read_csv(FOLDER / f"{paper}.csv", dtype=str, keep_default_na=False)
    return frame.assign(**{name: pd.to_numeric(frame[name]) for name in NUMBERS})
