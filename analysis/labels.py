"""How the jobs of a sweep are told apart: labels of bits settings and of methods."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from analysis.records import Record, dict_at, flatten, plain

# Keys of the config that say where a job runs or writes, not what it computes.
NOT_A_CHOICE = {
    "seed",
    "label",
    "name",
    "tracker",
    "output_dir",
    "progress",
    "dry_run",
    "save_model",
    "rerun",
    "report",
}

# What a row and a column of a table already say, and where the run was logged.
IN_THE_LABELS = {
    "choices.model",
    "choices.data",
    "choices.method",
    "choices.grid",
    "choices.bits",
    "choices.tracker",
    "bits.weight",
    "bits.budget",
    "bits.activation",
    "bits.activation_first_last",
    "bits.group_size",
    "bits.first_last",
}

UNSET = "unset"


def bits_label(bits: dict[str, Any]) -> str:
    """`W3`, `W4A8`, `W3 g128`, `W3 · 8-bit ends`, `mixed 3.2`, `mixed as W3`: the setting, as a column
    is called.
    """
    weight, exceptions = bits.get("weight"), _groups_and_ends(bits)
    label = f"W{plain(weight)}" if weight is not None else "W?"
    if _is_mixed(bits):
        label = f"mixed as {label}" if bits.get("budget") is None else f"mixed {plain(bits['budget'])}"
    activation = _activation(bits)
    label += f" {activation}" if activation and _is_mixed(bits) else activation
    if exceptions.startswith("g"):
        return f"{label} {exceptions}"
    return f"{label} · {exceptions}" if exceptions else label


def bits_variant(bits: dict[str, Any]) -> str:
    """What is left of the label without the width: `g128`, `8-bit ends`, `mixed · A8 · g128` or nothing."""
    mixed = "mixed" if _is_mixed(bits) else ""
    return " · ".join(filter(None, [mixed, _activation(bits), _groups_and_ends(bits)]))


def _is_mixed(bits: dict[str, Any]) -> bool:
    """Whether layers or rows chose their own widths."""
    return "candidates" in bits


def _activation(bits: dict[str, Any]) -> str:
    return f"A{plain(bits['activation'])}" if bits.get("activation") is not None else ""


def _groups_and_ends(bits: dict[str, Any]) -> str:
    parts = []
    if bits.get("group_size") is not None:
        parts.append(f"g{plain(bits['group_size'])}")
    if bits.get("first_last") is not None:
        parts.append(f"{plain(bits['first_last'])}-bit ends")
    return " · ".join(parts)


def method_labels(records: Sequence[Record]) -> list[str]:
    """One label per record: the method, and in brackets whatever sets it apart.

    That is the grid when it is not the method's most common one, and the config keys that differ among
    records which would otherwise be the same cell of a table with the same seed. A key is left out where it
    has the method's most common value.
    """
    choices = [dict_at(record.config, "choices") for record in records]
    configs = [dict(flatten(record.config)) for record in records]
    names = [
        str(record.content.get("label") or choice.get("method") or "unknown method")
        for record, choice in zip(records, choices, strict=True)
    ]
    collisions: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    members: dict[str, list[int]] = defaultdict(list)
    for i, (record, choice, name) in enumerate(zip(records, choices, names, strict=True)):
        cell = (choice.get("model"), choice.get("data"), choice.get("grid"))
        bits = bits_label(dict_at(record.config, "bits"))
        collisions[(name, *map(str, cell), bits, record.seed)].append(i)
        members[name].append(i)
    keys: dict[str, set[str]] = {name: {"choices.grid"} for name in members}
    for (name, *_), group in collisions.items():
        keys[name] |= _differing([configs[i] for i in group])
    places = [(choice.get("model"), choice.get("data")) for choice in choices]
    labels = list(names)
    for name, group in members.items():
        short = _short_names(keys[name])
        shown: dict[int, list[str]] = defaultdict(list)
        for key in sorted(keys[name], key=lambda key: (key != "choices.grid", key)):
            values = {i: plain(configs[i].get(key, UNSET)) for i in group}
            # A method's own key has one usual value everywhere, a key of calibration or eval one per model.
            own = key == "choices.grid" or key.startswith(("method.", "grid."))
            for peers in [group] if own else _grouped(group, places):
                usual = _most_common([values[i] for i in peers])
                for i in peers:
                    if values[i] != usual:
                        shown[i].append(f"{short[key]}={values[i]}")
        for i, parts in shown.items():
            labels[i] = f"{name} ({', '.join(parts)})"
    return labels


def _differing(configs: Sequence[dict[str, Any]]) -> set[str]:
    """Keys on which the configs differ; keys of a group whose choice alone explains them are left out."""
    known = {key for config in configs for key in config if key.split(".")[0] not in NOT_A_CHOICE}
    values = {key: {plain(config.get(key, UNSET)) for config in configs} for key in known - IN_THE_LABELS}
    keys = {key for key in values if len(values[key]) > 1}
    choices = {key.split(".")[1] for key in keys if key.startswith("choices.")}
    return {
        key
        for key in keys
        if key.split(".")[0] not in choices or not _explained(configs, key, by=f"choices.{key.split('.')[0]}")
    }


def _explained(configs: Sequence[dict[str, Any]], key: str, by: str) -> bool:
    pairs = {(plain(config.get(by, UNSET)), plain(config.get(key, UNSET))) for config in configs}
    return len(pairs) == len({choice for choice, _ in pairs})


def _most_common(values: Sequence[str]) -> str | None:
    """The most common value; None when two are equally common, so that both get named."""
    ranked = Counter(values).most_common(2)
    return None if len(ranked) == 2 and ranked[0][1] == ranked[1][1] else ranked[0][0]


def _grouped(items: Sequence[int], keys: Sequence[Any]) -> list[list[int]]:
    groups: dict[Any, list[int]] = defaultdict(list)
    for item in items:
        groups[keys[item]].append(item)
    return list(groups.values())


def _short_names(keys: Iterable[str]) -> dict[str, str]:
    last = Counter(key.rsplit(".", 1)[-1] for key in keys)
    return {key: short if last[short := key.rsplit(".", 1)[-1]] == 1 else key for key in keys}
