"""The file of a model's quantized layers: what each is and its packed tensors, with little around them.

A safetensors file of one byte tensor: the length of the directory in four bytes, the directory, the bytes of
all packed tensors one after the other. The directory is JSON, compressed from what every such file says: the
layers' facts, then name, type and shape of each packed tensor. A model of many small layers pays 100 bytes
and more a tensor for the usual header of names and offsets, and as much again for facts in plain JSON; here
some fifteen bytes, which `file_bytes` counts with the rest.
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

NAME = "layers"
LENGTH_BYTES = 4
# what compression starts from, the commonest last: a change makes files of before unreadable
DICTIONARY = (
    b'{"layers":{"ptq.grids.ptnq.ptq.grids.codebook.CodebookGridptq.grids.power.PowerGridptq.grids.scaled.'
    b'RowScaledptq.grids.row_widths."offset""zero_point""levels""float32""int32","group_size":null,"code_min":0'
    b',"in_features":,"per_tensor":false,"offset_exponent":0,"scale_exponent":ptq.grids.affine.AffineGrid'
    b'"input_quantizer":{"bits":8,"signed":false},"geometry":{"kind":"linear","in_features":64,"out_features":'
    b'10}},"model.layers.0.self_attn.q_projmodel.layers.0.mlp.gate_projblocks.0.attn.qkvblocks.0.mlp.fc1'
    b'features.0.squeeze"layer1.0.conv1":{"grid":"ptq.grids.entropy.EntropyGrid","bits":2.0,"shape":[1,16,144],'
    b'"code_max":32767,"unit_size":144,"octave_parts":4,"flat":true,"flat_rows":true,"parameter_bits":16,'
    b'"step_exponent":-15,"checksum":,"decode_once":true,"geometry":{"kind":"conv2d","in_channels":16,'
    b'"out_channels":16,"kernel_size":[3,3],"stride":[1,1],"dilation":[1,1],"groups":1,"padding":[1,1,1,1],'
    b'"padding_mode":"zeros"}}},"tensors":[[".zero_point","uint8",[]],[".scale","float16",[]],'
    b'["layer1.0.conv1.codes","uint8",[]],["layer1.0.conv1.step","float16",[1]]]}'
)


def write(path: Path, facts: Facts, packed: dict[str, Tensor]) -> None:
    """Write `facts` of each layer and all `packed` tensors (on the host)."""
    directory = _directory(facts, packed)
    parts = [t.contiguous().reshape(-1).view(torch.uint8) for t in packed.values()]
    head = torch.frombuffer(
        bytearray(len(directory).to_bytes(LENGTH_BYTES, "little") + directory), dtype=torch.uint8
    )
    save_file({NAME: torch.cat([head, *parts])}, path)


def read(path: Path) -> tuple[Facts, dict[str, Tensor]]:
    """What `write` was given. Raises InputError naming the path when the directory and the data disagree."""
    try:
        data = load_file(path)[NAME]
        start = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES].numpy().tobytes(), "little")
        said = json.loads(
            zlib.decompressobj(zdict=DICTIONARY).decompress(data[LENGTH_BYTES:start].numpy().tobytes())
        )
        packed = {}
        for name, type_name, shape in said["tensors"]:
            size = math.prod(shape) * TYPES[type_name].itemsize
            packed[name] = data[start : start + size].clone().view(TYPES[type_name]).reshape(shape)
            start += size
        if start != data.numel():
            raise ValueError(f"{data.numel()} bytes, of which the directory knows {start}")
    except (KeyError, ValueError, RuntimeError, zlib.error) as error:
        raise InputError(f"{path} is damaged: {error}; save the model again") from error
    return said["layers"], packed


def file_bytes(facts: Facts, packed: dict[str, Tensor]) -> int:
    """Size of the file that `write` makes, all of it."""
    size = LENGTH_BYTES + len(_directory(facts, packed)) + packed_bytes(packed)
    header = json.dumps(
        {NAME: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}, separators=(",", ":")
    )
    return 8 + 8 * math.ceil(len(header) / 8) + size


def packed_bytes(packed: dict[str, Tensor]) -> int:
    """Bytes of the packed tensors alone."""
    return sum(t.numel() * t.element_size() for t in packed.values())


def _directory(facts: Facts, packed: dict[str, Tensor]) -> bytes:
    table = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in packed.items()]
    plain = json.dumps({"layers": facts, "tensors": table}, separators=(",", ":")).encode()
    compressor = zlib.compressobj(level=9, memLevel=9, zdict=DICTIONARY)
    return compressor.compress(plain) + compressor.flush()
