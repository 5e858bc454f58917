"""The saved quantized model: a folder with two safetensors files and one JSON file, and back to identical
outputs.

`quantized.safetensors` holds what each layer is, packed codes and grid parameters (packed_file.py), so its
size is bits_per_coefficient × weights / 8 and some fifteen bytes a tensor; `float.safetensors` holds all
other tensors; `model.json` says how to build the model, and holds checksums of the others and of itself.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ptq import packed_file
from ptq.activations import ActivationQuantizer
from ptq.config import build
from ptq.errors import InputError
from ptq.layers import QuantizedLayer, names_of, replace_module
from ptq.models.adapter import load_state_strictly
from ptq.preparation import FoldedNorm, fold

FORMAT = 4
QUANTIZED, FLOAT = "quantized.safetensors", "float.safetensors"


def save(module: nn.Module, directory: Path | str, model_config: dict[str, Any] | None = None) -> Path:
    """Write a quantized model to `directory`; `model_config` (a conf/model node) lets `load` rebuild the
    float model.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    facts, packed, rest = contents(module)
    folded = {n: m.layer for n, m in module.named_modules() if isinstance(m, FoldedNorm)}
    content = {"format": FORMAT, "model": model_config, "folded_norms": folded}
    parts = {name: directory / f"{name}.part" for name in (QUANTIZED, FLOAT)}
    packed_file.write(parts[QUANTIZED], facts, packed)
    save_file(rest, parts[FLOAT])
    content["checksums"] = {name: _checksum(part) for name, part in parts.items()}
    for name, part in parts.items():
        part.replace(directory / name)
    content["checksum"] = _checksum_of(content)
    part = directory / "model.json.part"
    part.write_text(json.dumps(content, indent=1))
    part.replace(directory / "model.json")
    return directory


def load(directory: Path | str, module: nn.Module | None = None) -> nn.Module:
    """The model that `save` wrote, in eval mode. `module` is a float model of that architecture; its weights
    are replaced.

    Without `module` the saved model config builds it. Raises InputError naming files that are missing or
    damaged, and tensors that are missing or left over.
    """
    directory = Path(directory)
    content = _verified(directory)
    if module is None:
        if content["model"] is None:
            raise InputError(
                f"{directory} does not say how to build its model; pass the float model as `module`"
            )
        module = build(content["model"], "model").load().module
    layers, packed = packed_file.read(directory / QUANTIZED)
    rest = load_file(directory / FLOAT)
    known = dict(module.named_modules())
    folded = content.get("folded_norms", {})
    strangers = sorted({*layers, *folded, *folded.values()} - known.keys())
    if strangers:
        raise InputError(f"{directory} has layers that the model lacks: {', '.join(strangers)}")
    for norm, layer in folded.items():
        fold(module, layer, norm)
    replace_layers(module, layers, packed, rest)
    types = {k: t.dtype for k, t in module.state_dict().items()}
    other = [k for k, t in rest.items() if k in types and types[k] != t.dtype]
    if other:
        raise InputError(
            f"{directory} holds {rest[other[0]].dtype} tensors, the given model {types[other[0]]}: "
            f"{', '.join(other[:5])}; load the float model in the saved type"
        )
    load_state_strictly(module, {**packed, **rest}, directory)
    for name in layers:  # entropy-coded layers decode here, so a damaged file is refused now
        try:
            replaced = module.get_submodule(name)
            assert isinstance(replaced, QuantizedLayer)
            if coded(replaced.facts):
                replaced.grid_and_codes()
        except InputError as error:
            raise InputError(f"{directory}: layer {name!r}: {error}") from error
    return module.eval()


def _verified(directory: Path) -> dict[str, Any]:
    """The content of model.json, once the folder is whole and every file is what `save` wrote."""
    for name in ("model.json", QUANTIZED, FLOAT):
        if not (directory / name).is_file():
            raise InputError(f"{directory} is not a saved quantized model: {name} is missing")
    try:
        content = json.loads((directory / "model.json").read_text())
        known = content.get("format")
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{directory}/model.json is damaged: {error}; save the model again") from error
    if known != FORMAT:
        raise InputError(f"{directory}/model.json has format {known!r}; this version reads {FORMAT}")
    if content.pop("checksum", None) != _checksum_of(content):
        damaged = ["model.json"]
    else:
        sums = content["checksums"]
        damaged = [name for name in (QUANTIZED, FLOAT) if _checksum(directory / name) != sums[name]]
    if damaged:
        raise InputError(
            f"{directory} is damaged: {', '.join(damaged)} no longer matches its checksum; "
            "save the model again"
        )
    return content


def _checksum(path: Path) -> int:
    """CRC-32 of a file."""
    found = 0
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            found = zlib.crc32(chunk, found)
    return found


def _checksum_of(content: dict[str, Any]) -> int:
    """CRC-32 of what model.json says, however it is laid out."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def contents(
    module: nn.Module, part: str = ""
) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor], dict[str, Tensor]]:
    """What a quantized model is, on the host: facts of each quantized layer, packed tensors, all other
    tensors. `part` is the name of a submodule that is wanted alone; names are the whole model's.
    """
    facts, packed = _quantized_contents(module, part)
    prefix = f"{part}." if part else ""
    state = module.get_submodule(part).state_dict(prefix=prefix)
    rest = {k: t.cpu().clone().contiguous() for k, t in state.items() if k not in packed}
    return facts, packed, rest


def _quantized_contents(
    module: nn.Module, part: str = ""
) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    inside = dict(module.get_submodule(part).named_modules(prefix=part))
    layers = {n: m for n, m in inside.items() if isinstance(m, QuantizedLayer)}
    packed = {
        f"{n}.{k}": t.cpu().contiguous() for n, layer in layers.items() for k, t in layer.packed.items()
    }
    leaders: dict[int, str] = {}  # first layer of those that share a quantizer of their input
    facts = {}
    for n, layer in layers.items():
        facts[n] = dict(layer.facts)
        if layer.input_quantizer is not None:
            facts[n]["input_quantizer"] = layer.input_quantizer.facts()
            leader = leaders.setdefault(id(layer.input_quantizer), n)
            if leader != n:
                facts[n]["input_quantizer"]["shared_with"] = leader
    return facts, packed


def file_bytes(module: nn.Module) -> int:
    """Size that the file of the quantized layers has or would have, directory and header included."""
    return packed_file.file_bytes(*_quantized_contents(module))


def replace_layers(
    module: nn.Module, layers: dict[str, dict[str, Any]], packed: dict[str, Tensor], rest: dict[str, Tensor]
) -> None:
    """Put quantized layers in the place of the float ones, from what `contents` gave."""
    for name, stored in layers.items():
        facts = dict(stored)
        quantizer = _input_quantizer(facts.pop("input_quantizer", None), module, rest, name)
        tensors = {k.removeprefix(f"{name}."): t for k, t in packed.items() if k.rpartition(".")[0] == name}
        layer, bias = module.get_submodule(name), rest.get(f"{name}.bias")
        device = next((p.device for p in layer.parameters()), torch.device("cpu"))
        quantized = QuantizedLayer(tensors, facts, bias, quantizer).to(device).train(layer.training)
        for alias in names_of(module, layer):
            replace_module(module, alias, quantized)


def _input_quantizer(
    stored: dict[str, Any] | None, module: nn.Module, tensors: dict[str, Tensor], name: str
) -> ActivationQuantizer | None:
    """The quantizer of layer `name`'s input, from the file's facts and float tensors, or that of the layer
    it is shared with, which has been put back into `module`; None where the input is float.
    """
    if stored is None:
        return None
    facts = dict(stored)
    leader = facts.pop("shared_with", None)
    if leader is not None:
        other = module.get_submodule(leader)
        assert isinstance(other, QuantizedLayer)
        return other.input_quantizer
    prefix = f"{name}.input_quantizer."
    own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    return ActivationQuantizer.from_storage(own, facts)


def coded(facts: dict[str, Any]) -> bool:
    """Whether a layer's codes are a stream that can be damaged: its facts, or those of a grid in it, hold a
    checksum.
    """
    return "checksum" in facts or any(coded(f) for f in facts.values() if isinstance(f, dict))


def quantized_bytes(directory: Path | str) -> int:
    """Bytes of packed tensors in the saved file, its directory left out."""
    return packed_file.packed_bytes(packed_file.read(Path(directory) / QUANTIZED)[1])
