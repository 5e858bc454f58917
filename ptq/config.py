"""From YAML to objects: `_target_` names a dataclass, and that dataclass is the schema."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ptq.errors import InputError, suggestion

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"


def build(node: DictConfig | dict[str, Any], group: str = "") -> Any:
    """Build the dataclass that `_target_` names from the other keys of `node`.

    Unknown, missing or ill-typed keys raise InputError with the key's name; `group` is the prefix shown with
    it.
    """
    if not isinstance(node, DictConfig):
        node = OmegaConf.create(node)
    container = OmegaConf.to_container(node, resolve=True)
    assert isinstance(container, dict)
    values = {str(key): value for key, value in container.items()}
    where = f"{group}." if group else ""
    target = values.pop("_target_", None)
    if target is None:
        raise InputError(f"{group or 'config'} has no _target_: name the dataclass that these keys describe")
    try:
        cls = get_class(target)
    except Exception as error:
        raise InputError(f"{where}_target_={target!r} cannot be imported: {error}") from error
    if not dataclasses.is_dataclass(cls):
        raise InputError(f"{where}_target_={target!r} is not a dataclass")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in values:
        if key not in fields:
            known = ", ".join(fields) or "none"
            raise InputError(
                f"unknown key {where}{key} for {cls.__name__}; known: {known}{suggestion(key, fields)}"
            )
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise InputError(
                f"missing key {where}{name} for {cls.__name__}; set it in the YAML or on the command line"
            )
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        hint = str(error).splitlines()[0]
        raise InputError(f"ill-typed value for {where}{key} of {cls.__name__}: {hint}") from error


def choices(group: str) -> list[str]:
    """Names that `group=NAME` accepts, from the files of conf/."""
    return sorted(
        p.relative_to(CONF_DIR / group).with_suffix("").as_posix() for p in (CONF_DIR / group).rglob("*.yaml")
    )


def load_choice(group: str, name: str, **overrides: Any) -> DictConfig:
    """The YAML of one choice of a group (its defaults list applied within the group), with overrides merged
    in.
    """
    node, defaults = _read(group, name)
    merged: DictConfig | ListConfig = OmegaConf.create({})
    for entry in defaults:
        if isinstance(entry, str) and entry != "_self_":
            merged = OmegaConf.merge(merged, load_choice(group, entry))
    merged = OmegaConf.merge(merged, node)
    # replaced, not merged: a list or mapping given here is the whole of it
    for key, value in overrides.items():
        OmegaConf.update(merged, key, value, merge=False)
    assert isinstance(merged, DictConfig)
    return merged


def companion(group: str, name: str, other: str) -> str | None:
    """The choice of group `other` that a choice names as its own (`override /grid@_global_.grid: affine`), or
    None.
    """
    for entry in _read(group, name)[1]:
        if isinstance(entry, DictConfig):
            for key, value in entry.items():
                if str(key) == f"override /{other}@_global_.{other}":
                    return str(value)
    return None


def _read(group: str, name: str) -> tuple[DictConfig, list[Any]]:
    """A choice's own keys and its defaults list."""
    known = choices(group)
    if name not in known:
        raise InputError(f"unknown {group} {name!r}; known: {', '.join(known)}{suggestion(name, known)}")
    node = OmegaConf.load(CONF_DIR / group / f"{name}.yaml")
    assert isinstance(node, DictConfig)
    return node, list(node.pop("defaults", []))
