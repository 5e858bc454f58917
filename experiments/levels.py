"""The weights of one row of a layer beside the values that grids allow for them: a figure and its numbers.

Command: python -m experiments.levels [model=… layer=… row=… bits=3 grids=affine,ptnq,codebook output=…]
Grids are names of conf/grid, fitted to the whole layer, every input counting alike. Without `layer`, the
layer with the longest rows; without `row`, the row whose kurtosis is the median of that layer's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from analysis.files import write_csv, write_figure
from analysis.level_figure import draw_levels, level_points
from ptq.config import build, load_choice
from ptq.errors import InputError, suggestion
from ptq.layers import weight_matrix

USUAL = {
    "model": "digits_vit",
    "layer": "",
    "row": "",
    "bits": "3",
    "grids": "affine,ptnq,codebook",
    "output": "outputs/levels",
}
MOST_LEVELS = 64  # more lines than these say nothing


def levels(
    model: str, layer: str, row: int | None, bits: float, grids: Sequence[str]
) -> tuple[str, pd.DataFrame]:
    """`layer, row N` and what `level_figure.draw_levels` draws of it.

    Raises InputError on a model, layer, row or grid that there is not, or a grid of too many levels.
    """
    adapter = build(load_choice("model", model), "model").load()
    layers = {name: weight_matrix(module).float() for name, module in adapter.quantizable().items()}
    layer = layer or max(layers, key=lambda name: (layers[name].shape[-1], layers[name].numel()))
    if layer not in layers:
        raise InputError(f"{model} has no layer {layer!r} to quantize{suggestion(layer, layers)}")
    W = layers[layer]  # [groups, out, in]
    rows = W.flatten(0, 1)  # [groups · out, in]
    row = _typical_row(rows) if row is None else row
    if not 0 <= row < len(rows):
        raise InputError(f"row must be from 0 to {len(rows) - 1} in {layer!r}; got {row}")
    H = torch.eye(W.shape[-1]).expand(W.shape[0], -1, -1)
    fitted = {}
    for name in grids:
        spec = build(load_choice("grid", name), "grid")
        spec.check(bits, None)
        grid = spec.fit(W, bits, None, H)
        codes = grid.round(W)
        if grid.code_max - grid.code_min >= MOST_LEVELS:
            raise InputError(
                f"grid={name} at {bits:g} bits has more than {MOST_LEVELS} levels; take fewer bits or "
                "another grid"
            )
        table = [
            grid.values(torch.full_like(codes, code)).flatten(0, 1)[row, 0]
            for code in range(grid.code_min, grid.code_max + 1)
        ]
        fitted[name] = (torch.stack(table).numpy(), grid.values(codes).flatten(0, 1)[row].numpy())
    return f"{layer}, row {row}", level_points(rows[row].numpy(), fitted)


def _typical_row(rows: Tensor) -> int:
    """The row [in] of rows [out, in] with the median kurtosis; constant rows count as lowest."""
    centred = rows - rows.mean(-1, keepdim=True)
    variance = centred.square().mean(-1)
    kurtosis = centred.pow(4).mean(-1) / variance.square().clamp_min(torch.finfo(rows.dtype).tiny)
    return int(kurtosis.argsort()[len(rows) // 2])


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; wrong input ends in one plain message and exit status 1."""
    options = dict(USUAL)
    try:
        for word in sys.argv[1:] if argv is None else argv:
            key, equals, value = word.partition("=")
            if key not in USUAL or not equals:
                raise InputError(f"{word!r} is not key=value with a key of: {', '.join(USUAL)}")
            options[key] = value
        try:
            bits = float(options["bits"])
            row = int(options["row"]) if options["row"] else None
        except ValueError as error:
            raise InputError(f"bits and row must be numbers: {error}") from None
        grids = [grid for grid in options["grids"].split(",") if grid]
        if not grids:
            raise InputError("grids is empty; name at least one of conf/grid, such as grids=affine,ptnq")
        place, points = levels(options["model"], options["layer"], row, bits, grids)
        figure = draw_levels(points, f"{options['model']} · {place} · {bits:g} bits")
        name = f"levels_{options['model']}_{place.replace(', row ', '_')}_w{bits:g}"
        folder = Path(options["output"])
        for path in [*write_figure(figure, folder, name), write_csv(folder / f"{name}.csv", points)]:
            print(path)
    except InputError as error:
        print(f"levels: error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
