"""conf/ and the classes it names: every choice builds, every experiment composes, every wrong key is
explained.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.overrides import GROUPS, check_overrides
from ptq.config import CONF_DIR, build, choices, companion, load_choice
from ptq.errors import InputError

ALL = [(group, name) for group in GROUPS if group != "experiment" for name in choices(group)]


@dataclass(kw_only=True)
class Sample:
    size: int
    rate: float
    name: str = "plain"


def sample(**values: object) -> object:
    return build({"_target_": f"{__name__}.Sample", **values}, "group")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 1, "rate": 0.5, "siez": 2}, "unknown key group.siez for Sample.*did you mean 'size'"),
        ({"size": 1}, "missing key group.rate for Sample"),
        ({"size": 64.5, "rate": 1}, "ill-typed value for group.size of Sample.*64.5"),
        ({"size": "many", "rate": 1}, "ill-typed value for group.size"),
        ({"_target_": "ptq.no.Such", "size": 1}, "cannot be imported"),
        ({"_target_": "pathlib.Path"}, "is not a dataclass"),
    ],
    ids=["unknown", "missing", "float", "word", "target", "class"],
)
def test_wrong_keys_stop_with_their_name(values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sample(**values)


def test_right_keys_build() -> None:
    assert sample(size=3, rate=1) == Sample(size=3, rate=1.0)
    with pytest.raises(InputError, match="no _target_"):
        build({"size": 3})


@pytest.mark.parametrize(("group", "name"), ALL, ids=["/".join(pair) for pair in ALL])
def test_every_choice_builds_alone_and_composed(group: str, name: str) -> None:
    node = load_choice(group, name)
    built = build(node, group)
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("config", overrides=[f"{group}={name}"])
    assert OmegaConf.to_container(config[group], resolve=True) == OmegaConf.to_container(node, resolve=True)
    assert build(config[group], group) == built or group == "data"
    assert (CONF_DIR / group / f"{name}.yaml").read_text().startswith("# "), (
        "a choice starts with a line that explains it"
    )


@pytest.mark.parametrize("name", choices("method"))
def test_a_methods_own_grid_yields_to_the_command_line(name: str) -> None:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        own = compose("config", overrides=[f"method={name}"])
        given = compose("config", overrides=[f"method={name}", "grid=symmetric"])
    assert own.grid == load_choice("grid", companion("method", name, "grid") or "affine")
    assert given.grid == load_choice("grid", "symmetric")


@pytest.mark.parametrize("name", choices("experiment"))
def test_every_experiment_composes_and_says_what_it_is(name: str) -> None:
    text = (CONF_DIR / "experiment" / f"{name}.yaml").read_text()
    header = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    for word in ("Time", "Command", "float|Expected"):
        assert re.search(word, header), f"{name}.yaml says nothing about {word}"
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("config", overrides=[f"+experiment={name}"], return_hydra_config=True)
    for group, values in config.hydra.sweeper.params.items():
        if group in GROUPS:
            assert set(values.split(",")) <= set(choices(group))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method=comk"], "unknown method 'comk'; known: .*did you mean 'comq'"),
        (["bits=w3", "budget=3.2"], "unknown key 'bits.budget'"),
        (["-m", "method=rtn,gptk"], "unknown method 'gptk'.*did you mean 'gptq'"),
        (["model=resnet19"], "unknown model 'resnet19'.*did you mean 'resnet18'"),
        (["data=cifar"], "unknown data 'cifar'.*did you mean 'cifar10'"),
        (["bits=w_4"], "unknown bits 'w_4'.*did you mean 'w4'"),
        (["bits=1.5"], "unknown bits '1.5'"),
        (["+experiment=quickstrat"], "unknown experiment 'quickstrat'.*did you mean 'quickstart'"),
        (["method.sweps=3"], "unknown key 'method.sweps'.*did you mean 'method.sweeps'"),
        (["method=gptq", "method.dampning=0.1"], "did you mean 'method.damping'"),
        (["sead=3"], "unknown key 'sead'.*did you mean 'seed'"),
        (["seed=[1"], "cannot read override"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_typos_on_the_command_line_get_a_suggestion(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=f"(?s){message}"):
        check_overrides(arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        [
            "-m",
            "model=deit_small,resnet18",
            "method=rtn,gptq,comq",
            "bits=w4,w3,w2",
            "calibration=imagenet_1024",
        ],
        ["model=llama3_8b", "method=comq", "grid=symmetric", "bits=w3g128", "calibration=wikitext2"],
        ["+bits.layers={head: 8}", "seed=1,2", "method.shrink=[1.0,0.9]", "hydra/launcher=joblib"],
        ["-m", "+experiment=quickstart", "~tracker"],
        ["bits=mixed", "budget=3.2"],
    ],
    ids=["sweep", "llama", "values", "experiment", "budget"],
)
def test_good_command_lines_pass(arguments: list[str]) -> None:
    check_overrides(arguments)


def test_commands_in_the_readme_compose() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    commands = [line.strip() for line in re.findall(r"^(?:PTQ_DATA=\S+ )?ptq-run .*$", readme, re.MULTILINE)]
    assert len(commands) >= 3
    for command in commands:
        words = [w for w in command.split("#")[0].split() if not w.startswith(("PTQ_DATA", "ptq-run", "-"))]
        check_overrides(words)
