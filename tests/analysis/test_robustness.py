"""The spread of each choice: values at their best, keys in order, bad input told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from record_factory import record, write

from analysis.robustness import Ablation, main, spreads, values


def run(result: float, **options: Any) -> dict[str, Any]:
    return record(result=result, method="brecq", **options)


@pytest.fixture
def losses(tmp_path: Path) -> Ablation:
    records = [run(result, method_config={"loss": loss}) for loss, result in (("l2", 90.0), ("kl", 84.0))]
    return Ablation(write(tmp_path / "losses", *records), "method.loss")


@pytest.fixture
def optimizers(tmp_path: Path) -> Ablation:
    """Each of two optimizers is best at another rate."""
    results = {("adam", 0.1): 60.0, ("adam", 0.001): 91.0, ("sgd", 0.1): 88.0, ("sgd", 0.001): 50.0}
    records = [
        run(result, method_config={"optimizer": name, "rounding_rate": rate})
        for (name, rate), result in results.items()
    ]
    return Ablation(write(tmp_path / "optimizers", *records), "method.optimizer")


@pytest.fixture
def seeds(tmp_path: Path) -> Ablation:
    return Ablation(write(tmp_path / "seeds", *(run(88.0 + seed, seed=seed) for seed in range(3))), "seed")


def test_values_stand_at_their_best_rate(optimizers: Ablation) -> None:
    found = values([optimizers]).set_index("value")
    assert found["mean"].to_dict() == {"adam": 91.0, "sgd": 88.0}


def test_a_row_per_key_with_its_ends_data_first(
    losses: Ablation, optimizers: Ablation, seeds: Ablation
) -> None:
    summary = spreads(values([losses, optimizers, seeds]))
    assert summary["title"].tolist() == ["seed", "optimizer", "loss"]
    assert summary["spread"].tolist() == [2.0, 3.0, 6.0]
    loss = summary.iloc[2]
    assert (loss["best"], loss["worst"], loss["values"]) == ("l2", "kl", 2)


def test_files_and_table(losses: Ablation, seeds: Ablation, tmp_path: Path, capsys) -> None:
    main([*(f"{a.folder}={a.key}" for a in (losses, seeds)), "--output", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "| loss" in said
    assert "90.00 (l2)" in said
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        f"robustness.{ending}" for ending in ("md", "csv", "png", "pdf")
    }


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("nothing", "is not FOLDER=KEY"),
        ("{losses}=method.p", "they differ in: .*method.loss"),
        ("{empty}=seed", "no record with a result under"),
    ],
)
def test_bad_input(losses: Ablation, tmp_path: Path, argument: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=message):
        main([argument.format(losses=losses.folder, empty=tmp_path / "empty")])
