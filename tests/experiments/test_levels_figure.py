from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from experiments.levels import levels, main

LAYER = "blocks.0.mlp.fc2"


def test_every_level_of_each_grid_is_listed() -> None:
    place, points = levels("digits_vit", LAYER, 0, 3, ["affine", "ptnq", "codebook"])
    assert place == f"{LAYER}, row 0"
    found = points[points["kind"] == "level"].groupby("grid")
    assert found.size().to_dict() == {"affine": 8, "ptnq": 8, "codebook": 8}
    assert found["share"].sum().tolist() == pytest.approx([1.0] * 3)
    steps = points[points["grid"] == "affine"]["value"].diff().dropna()
    assert steps.max() == pytest.approx(steps.min(), rel=1e-3)


def test_figure_and_numbers_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([f"layer={LAYER}", "row=1", "bits=2", "grids=affine", f"output={tmp_path}"])
    stem = f"levels_digits_vit_{LAYER}_1_w2"
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{stem}.csv", f"{stem}.pdf", f"{stem}.png"]
    assert f"{stem}.png" in capsys.readouterr().out
    assert (pd.read_csv(tmp_path / f"{stem}.csv")["kind"] == "level").sum() == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layr=x"], "'layr=x' is not key=value"),
        (["bits=three"], "bits and row must be numbers"),
        (["layer=blocks.0.mlp.fc9"], "has no layer 'blocks.0.mlp.fc9' to quantize; did you mean"),
        ([f"layer={LAYER}", "row=10000"], "row must be from 0 to"),
        ([f"layer={LAYER}", "grids=affin"], "did you mean 'affine'"),
        ([f"layer={LAYER}", "grids="], "grids is empty"),
        ([f"layer={LAYER}", "bits=8", "grids=affine"], "more than 64 levels"),
    ],
)
def test_wrong_input_is_one_message(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="1"):
        main([*words, f"output={tmp_path}"])
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
