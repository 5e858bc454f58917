"""The experiments of the papers: headers, jobs, local twins, and what is said where data are missing."""

from __future__ import annotations

import functools
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from transformers import AutoModelForCausalLM

from analysis.papers import papers, published
from ptq.config import CONF_DIR, build, choices
from ptq.methods.method import check_pair
from ptq.runner import GROUPS, run

FIELDS = ("Paper", "Expected", "Time", "Hardware", "Command")
PAPERS = [name for name in papers() if name != "anchors"]
OURS = [
    name
    for name in choices("experiment")
    if "\n# Paper:" in (CONF_DIR / "experiment" / f"{name}.yaml").read_text()
]
FULL = [name for name in OURS if not name.endswith("_local")]
RESHAPING = ("method", "grid", "tuning")  # groups whose choices have different keys


def paper_of(name: str) -> str:
    return max((paper for paper in PAPERS if name.startswith(f"{paper}_")), key=len)


def header(name: str) -> str:
    lines = (CONF_DIR / "experiment" / f"{name}.yaml").read_text().splitlines()
    return "\n".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def composed(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("config", overrides=[f"+experiment={name}", *overrides], return_hydra_config=True)


@functools.cache
def swept(name: str) -> dict[str, list[str]]:
    """Values of each key that the experiment sweeps, as they stand on a command line."""
    params = OmegaConf.to_container(composed(name).hydra.sweeper.params)
    assert isinstance(params, dict)
    return {str(key): re.findall(r"\[[^]]*\]|[^,\s]+", str(values)) for key, values in params.items()}


def first_jobs(name: str) -> list[list[str]]:
    """One job for each combination of the groups that bring other keys, else with the first value of each."""
    params = swept(name)
    options = [
        [f"{key}={value}" for value in (values if key in RESHAPING else values[:1])]
        for key, values in params.items()
    ]
    return [list(job) for job in itertools.product(*options)]


def chosen(config: DictConfig) -> dict[str, str]:
    return {group: config.hydra.runtime.choices[group] for group in GROUPS}


@pytest.mark.parametrize("name", OURS)
def test_the_header_has_its_fields(name: str) -> None:
    found = re.findall(r"(?:^|\. )(\w+): ", header(name), re.MULTILINE)
    assert [field for field in found if field in FIELDS] == list(FIELDS)
    assert f"+experiment={name} " in header(name)
    assert paper_of(name)


@pytest.mark.parametrize("name", FULL)
def test_expected_numbers_are_the_published_ones(name: str) -> None:
    expected = header(name).split("Expected: ")[1].split("Time: ")[0]
    frame = published(paper_of(name))
    known = {f"{value:.{digits}f}" for value in [*frame["value"], *frame["float"]] for digits in (2, 3)}
    assert set(re.findall(r"(?<![\d.])\d+\.\d\d\d?(?!\d)(?! is| above| far)", expected)) - {"0.65"} <= known


@pytest.mark.parametrize("name", OURS)
def test_its_jobs_build(name: str) -> None:
    for job in first_jobs(name):
        config = composed(name, *job)
        parts = {group: build(config[group], group) for group in GROUPS}
        check_pair(parts["method"], parts["grid"])
    assert config.name == name


@pytest.mark.parametrize("name", FULL)
def test_every_experiment_has_a_local_twin_of_its_shape(name: str) -> None:
    assert f"{name}_local" in OURS
    assert set(swept(f"{name}_local")) == set(swept(name))


@pytest.mark.parametrize("name", OURS)
def test_every_swept_choice_exists(name: str) -> None:
    for key, values in swept(name).items():
        assert len(values) == len(set(values))
        if key in GROUPS:
            assert set(values) <= set(choices(key))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No hub answers, and PTQ_DATA is empty."""

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", unreachable)
    monkeypatch.setattr("timm.create_model", unreachable)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", unreachable)
    monkeypatch.setenv("PTQ_DATA", str(tmp_path))
    return tmp_path


def failure(folder: Path, name: str, *overrides: str) -> str:
    """The error of the experiment's first job, from its record."""
    job = [*first_jobs(name)[0], "progress=false", f"output_dir={folder}", *overrides]
    config = composed(name, *job)
    names = chosen(config)
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    record = run(config, names)
    assert record["status"] == "failed"
    assert record["error"]["traceback"] is None, "wrong input, not a fault"
    assert (Path(record["directory"]) / "record.json").is_file()
    return str(record["error"]["message"])


@pytest.mark.parametrize("name", FULL)
def test_without_weights_a_job_says_what_to_provide(name: str, offline: Path) -> None:
    message = failure(offline, name)
    assert "no route to host" in message
    assert re.search(r"model\.checkpoint=FILE|`hf download", message)


def test_without_imagenet_a_job_says_what_to_provide(offline: Path) -> None:
    message = failure(offline, "comq_cnn", "model.pretrained=false")
    assert str(offline / "imagenet") in message
    assert "put it there" in message
