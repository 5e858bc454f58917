"""Check command-line overrides before Hydra sees them, so that a typo gets a suggestion instead of a stack of
frames.
"""

from __future__ import annotations

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf

from ptq.config import CONF_DIR, choices
from ptq.errors import InputError, suggestion

GROUPS = sorted(
    p.name for p in CONF_DIR.iterdir() if p.is_dir() and p.name != "hydra" and not p.name.startswith("_")
)


SHORT = {"budget": "bits.budget"}  # what may be said of a choice without its group


def spelled_out(arguments: list[str]) -> list[str]:
    """The command line with short keys (`bits=mixed budget=3.2`) in full."""
    pairs = [a.partition("=") for a in arguments]
    return [f"{SHORT.get(key, key)}{equals}{value}" for key, equals, value in pairs]


def check_overrides(arguments: list[str]) -> None:
    """Raise InputError for an unknown group choice or an unknown key, naming what was probably meant."""
    words = [a for a in spelled_out(arguments) if "=" in a and not a.startswith("-")]
    try:
        overrides = OverridesParser.create().parse_overrides(words)
    except OverrideParseException as error:
        raise InputError(f"cannot read override {error.override!r}: {error}") from error
    for override in overrides:
        group = override.key_or_group
        if group in GROUPS and not override.is_delete():
            known = choices(group)
            for choice in _choices(override):
                if choice is not None and choice not in known:
                    raise InputError(
                        f"unknown {group} {choice!r}; known: {', '.join(known)}{suggestion(choice, known)}"
                    )
    _check_keys(overrides)


def _choices(override: Override) -> list[str | None]:
    value = override.value()
    found = value.list if isinstance(value, ChoiceSweep) else value if isinstance(value, list) else [value]
    return [v.text if isinstance(v, QuotedString) else None if v is None else str(v) for v in found]


def _check_keys(overrides: list[Override]) -> None:
    """Plain `key=value` overrides must name a key that the composed config has."""
    grouped = [o for o in overrides if o.key_or_group in GROUPS]
    first = [
        f"{'+' if o.is_add() else ''}{o.key_or_group}={_choices(o)[0] or 'null'}"
        for o in grouped
        if not o.is_delete()
    ]
    plain = [o for o in overrides if o.key_or_group not in GROUPS and not o.is_add() and not o.is_delete()]
    plain = [o for o in plain if not o.key_or_group.startswith("hydra")]
    if not plain:
        return
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            config = compose("config", overrides=first)
    except HydraException as error:
        raise InputError(str(error)) from error
    known = _keys(config)
    for override in plain:
        key = override.key_or_group
        # a key below a mapping that may hold anything (bits.layers) is for the dataclass to judge
        if OmegaConf.select(config, key, throw_on_missing=False) is None and key not in known:
            parent = key.rpartition(".")[0]
            holder = OmegaConf.select(config, parent) if parent else config
            if isinstance(holder, DictConfig) and not holder and parent:
                continue
            # offer keys of the same depth or of the same last word
            raise InputError(f"unknown key {key!r}{suggestion(key, known)}")


def _keys(node: DictConfig | ListConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    if isinstance(node, DictConfig):
        for key in node:
            keys.append(f"{prefix}{key}")
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none():
                keys += _keys(child, f"{prefix}{key}.")
    return keys
