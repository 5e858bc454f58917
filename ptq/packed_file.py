"""The file of a model's quantized layers: what each is and its packed tensors, with little around them.

A safetensors file of two byte tensors. `directory` is compressed JSON: the layers' facts, then name, type and
shape of each packed tensor; `data` is their bytes one after the other. A model of many small layers pays 100
bytes and more a tensor for the usual header of names and offsets, and as much again for facts in plain JSON;
here some twenty bytes, which `file_bytes` counts with the rest.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ptq.errors import InputError

Facts = dict[str, dict[str, Any]]
TYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    )
}


def write(path: Path, facts: Facts, packed: dict[str, Tensor]) -> None:
    """Write `facts` of each layer and all `packed` tensors (on the host)."""
    parts = [t.contiguous().reshape(-1).view(torch.uint8) for t in packed.values()]
    data = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8)
    save_file({"directory": _directory(facts, packed), "data": data}, path)


def read(path: Path) -> tuple[Facts, dict[str, Tensor]]:
    """What `write` was given. Raises InputError naming the path when the directory and the data disagree."""
    content = load_file(path)
    try:
        said = json.loads(zlib.decompress(content["directory"].numpy().tobytes()))
        packed, start = {}, 0
        for name, type_name, shape in said["tensors"]:
            size = math.prod(shape) * TYPES[type_name].itemsize
            part = content["data"][start : start + size].clone()
            packed[name] = part.view(TYPES[type_name]).reshape(shape)
            start += size
        if start != content["data"].numel():
            raise ValueError(f"{content['data'].numel()} bytes of data, {start} in the directory")
    except (KeyError, ValueError, RuntimeError, zlib.error) as error:
        raise InputError(f"{path} is damaged: {error}; save the model again") from error
    return said["layers"], packed


def file_bytes(facts: Facts, packed: dict[str, Tensor]) -> int:
    """Size of the file that `write` makes, all of it."""
    directory, data = _directory(facts, packed).numel(), packed_bytes(packed)
    header = {
        name: {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
        for name, start, end in (("data", 0, data), ("directory", data, data + directory))
    }
    words = math.ceil(len(json.dumps(header, separators=(",", ":"))) / 8)
    return 8 + 8 * words + directory + data


def packed_bytes(packed: dict[str, Tensor]) -> int:
    """Bytes of the packed tensors alone."""
    return sum(t.numel() * t.element_size() for t in packed.values())


def _directory(facts: Facts, packed: dict[str, Tensor]) -> Tensor:
    table = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in packed.items()]
    plain = json.dumps({"layers": facts, "tensors": table}, separators=(",", ":")).encode()
    return torch.frombuffer(bytearray(zlib.compress(plain, 9)), dtype=torch.uint8)
