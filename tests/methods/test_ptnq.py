"""PTNQ's choice: the best survivor, early dropping, and grids without candidates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from ptq.errors import InputError
from ptq.methods.method import check_pair
from ptq.methods.selecting import CandidateGrid, SelectingMethod, chooses
from tests.conftest import random_problem

POOL = {"functions": ["linear", "tanh", "exp"], "initialisations": ["ones"], "schedules": ["linear"]}


class Table:
    """A trial that looks results up and notes what it was asked."""

    def __init__(self, results: dict[str, dict[float, dict[str, Any]]]) -> None:
        self.results = results
        self.asked: list[tuple[str, float]] = []

    def __call__(self, name: str, grid: Any, bits: float) -> dict[str, Any]:
        function = name.split("/")[0]
        assert grid.functions[0].value == function
        self.asked.append((function, bits))
        return self.results[function][bits]


def top1(value: float, error: float = 0.1) -> dict[str, Any]:
    return {"top1": value, "top5": 99.0, "weight_error": error}


def test_the_best_survivor_is_chosen_and_failures_are_dropped(choice) -> None:
    trial = Table(
        {
            "linear": {8: top1(90.0), 6: top1(85.0), 4: top1(70.0)},
            "tanh": {8: top1(89.0), 6: top1(86.0), 4: top1(75.0)},
            "exp": {8: top1(10.0), 6: top1(91.0), 4: top1(91.0)},
        }
    )
    method = choice("method", "ptnq_paper", widths=[6, 8, 4])
    selection = method.select(choice("grid", "ptnq_paper", **POOL), 4.0, top1(90.0), trial)
    assert selection.facts["chosen"] == "tanh/ones/linear"
    assert selection.grid.functions[0].value == "tanh"
    assert ("exp", 8) in trial.asked
    assert ("exp", 6) not in trial.asked
    assert [step["bits"] for step in selection.facts["widths"]] == [8, 6, 4]
    assert selection.facts["widths"][0]["failed"] == ["exp/ones/linear"]
    assert selection.facts["tried"] == 7
    assert selection.facts["saved_by_dropping"] == 2
    assert selection.facts["validation"]["top1"] == 75.0
    assert selection.facts["signs"]["unsigned_only"] == []


def test_perplexity_ties_and_reasons(choice) -> None:
    def perplexity(value: float, error: float) -> dict[str, Any]:
        return {"perplexity": value, "weight_error": error}

    trial = Table(
        {
            "linear": {3: perplexity(6.0, 0.2)},
            "tanh": {3: perplexity(6.0, 0.1)},
            "exp": {3: {"failed": "logits are NaN"}},
        }
    )
    method = choice("method", "ptnq_paper", widths=[])
    selection = method.select(choice("grid", "ptnq_paper", **POOL), 3.0, {"perplexity": 5.0}, trial)
    assert selection.facts["chosen"] == "tanh/ones/linear"
    assert selection.facts["widths"][0]["failed"] == ["exp/ones/linear"]
    assert selection.facts["widths"][0]["metrics"]["exp/ones/linear"] == {"failed": "logits are NaN"}


def test_where_all_fail_none_is_dropped(choice) -> None:
    results = {f: {8: top1(10.0), 2: top1(10.0 + k)} for k, f in enumerate(POOL["functions"])}
    trial = Table(results)
    method = choice("method", "ptnq_paper", widths=[8])
    selection = method.select(choice("grid", "ptnq_paper", **POOL), 2.0, top1(90.0), trial)
    assert selection.facts["chosen"] == "exp/ones/linear"
    assert selection.facts["tried"] == 6


def test_one_candidate_is_not_tried(choice) -> None:
    grid, method = choice("grid", "ptnq_function"), choice("method", "ptnq_function")
    assert isinstance(method, SelectingMethod)
    assert not chooses(method, grid)
    selection = method.select(grid, 4.0, top1(90.0), Table({}))
    assert selection.facts["chosen"] == "arcsinh/search/cosine_restarts"


def test_the_control_has_as_many_runs_as_the_paper_has_methods(choice) -> None:
    control, paper = choice("grid", "ptnq_affine_control"), choice("grid", "ptnq_paper")
    assert isinstance(control, CandidateGrid)
    assert len(control.candidates()) == len(paper.candidates()) == 19 * 4 * 3
    assert chooses(choice("method", "ptnq_affine_control"), control)
    problem = random_problem(6, 40)
    whole = choice("grid", "affine").fit(problem.W, 3)
    first, *_, last = control.candidates().values()
    assert_close(first.fit(problem.W, 3).scale, whole.scale)
    assert_close(last.fit(problem.W, 3).scale, 0.4 * whole.scale, rtol=1e-3, atol=0)
    errors = [
        float((problem.W - grid.values(grid.round(problem.W))).square().sum())
        for grid in (c.fit(problem.W, 3) for c in control.candidates().values())
    ]
    best = control.fit(problem.W, 3)
    assert float((problem.W - best.values(best.round(problem.W))).square().sum()) == pytest.approx(
        min(errors)
    )


def test_a_grid_without_candidates_is_refused(choice) -> None:
    with pytest.raises(InputError, match=r"chooses among the candidates.*grid=ptnq_paper"):
        check_pair(choice("method", "ptnq_paper"), choice("grid", "affine"))


def test_without_a_task_the_weight_error_decides(choice) -> None:
    problem = random_problem(4, 60)
    spec = choice("grid", "ptnq_paper", steps=20, search_rounds=8, search_candidates=20)
    codes, grid = choice("method", "ptnq_paper").quantize_layer(problem, spec, 4, None)
    plain = choice("grid", "ptnq_function", functions=["linear"], initialisations=["ones"], steps=0)
    rough = plain.fit(problem.W, 4)
    rough_error = (problem.W - rough.values(rough.round(problem.W))).square().sum()
    assert float((problem.W - grid.values(codes)).square().sum()) < float(rough_error)
    assert torch.equal(codes, grid.round(problem.W))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"min_accuracy_fraction": 1.0}, "less than 1; got 1"),
        ({"max_perplexity_factor": 1.0}, "greater than 1; got 1"),
    ],
    ids=["accuracy", "perplexity"],
)
def test_wrong_thresholds(choice, overrides: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choice("method", "ptnq_paper", **overrides)
