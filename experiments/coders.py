"""The entropy grid on a seeded layer: error at stored rates against the Gaussian limit, and its coder beside
others on the same codes.

Command: python -m experiments.coders [--size 1024] [--bits 1 2 3 4] [--pairs watersic:entropy_columns …]
         python -m experiments.coders --model FOLDER (of a saved model: the streams of its layers)
All rates are bits per weight. `stored` is the file: stream, steps, everything; `pooled entropy` is the usual
estimate for one histogram; Huffman's and zstd's figures are of the codes alone, without tables for Huffman.
"""

from __future__ import annotations

import argparse
import heapq
import math
import time
from pathlib import Path

import numpy as np
import pandas as pd
import zstandard
from hydra.utils import get_class

from experiments.benchmark import distortion_limit, gram, seeded_layer
from ptq import packed_file
from ptq.checkpoint import QUANTIZED, coded
from ptq.coding import Ints, decode, encode, entropy
from ptq.config import build, load_choice
from ptq.errors import InputError
from ptq.problem import LayerProblem
from ptq.rate import quantize_to_rate


def huffman_bits(codes: Ints) -> float:
    """Mean length of a Huffman code for the pooled histogram."""
    heap = [int(count) for count in np.unique(codes, return_counts=True)[1]]
    heapq.heapify(heap)
    total = 0 if len(heap) > 1 else codes.size
    while len(heap) > 1:
        joined = heapq.heappop(heap) + heapq.heappop(heap)
        total += joined
        heapq.heappush(heap, joined)
    return total / codes.size


def zstd_bits(codes: Ints) -> float:
    """zstd at its highest level on the codes as bytes (two where they need them), column by column."""
    narrow = np.int8 if np.abs(codes).max() < 128 else np.int16
    data = np.ascontiguousarray(codes.T.astype(narrow)).tobytes()
    return 8 * len(zstandard.ZstdCompressor(level=22).compress(data)) / codes.size


def rows(size: int, tokens: int, bits: list[float], pairs: list[str]) -> pd.DataFrame:
    """One row per target and method:grid pair."""
    W, X, X_held_out = seeded_layer(size, tokens)
    problem, held_out = (LayerProblem("seeded", W, gram(x)) for x in (X, X_held_out))
    table = []
    for target in bits:
        limit = distortion_limit(problem.H[0], target)
        for pair in pairs:
            method, grid_name = pair.split(":")
            spec = build(load_choice("grid", grid_name))
            started = time.perf_counter()
            codes, grid = quantize_to_rate(build(load_choice("method", method)), problem, spec, target, None)
            solved = time.perf_counter() - started
            matrix = codes[0].numpy().astype(np.int64)
            started = time.perf_counter()
            stream = encode(matrix, [])
            encoded = time.perf_counter() - started
            started = time.perf_counter()
            again, _ = decode(stream, matrix.shape, [])
            decoded = time.perf_counter() - started
            assert np.array_equal(again, matrix)
            stored = sum(grid.storage_bits(codes).values()) / codes.numel()
            error = problem.relative_error(grid.values(codes))
            table.append(
                {
                    "target": target,
                    "method:grid": pair,
                    "stored": stored,
                    "error": error,
                    "held-out error": held_out.relative_error(grid.values(codes)),
                    "limit": limit,
                    "bits above limit": stored - target + math.log2(error / limit),
                    "pooled entropy": entropy(matrix),
                    "Huffman": huffman_bits(matrix),
                    "zstd": zstd_bits(matrix),
                    "search, s": solved,
                    "encode, M/s": matrix.size / 1e6 / encoded,
                    "decode, M/s": matrix.size / 1e6 / decoded,
                }
            )
    return pd.DataFrame(table)


def model_rows(directory: Path) -> pd.DataFrame:
    """One row per entropy-coded layer of a saved model, one for all of them, and one for the file with its
    directory (of any other quantized layers too).
    """
    facts, packed = packed_file.read(directory / QUANTIZED)
    table, seconds_of_all = [], 0.0
    for name, layer in facts.items():
        if not coded(layer):
            continue
        tensors = {k.removeprefix(f"{name}."): t for k, t in packed.items() if k.rpartition(".")[0] == name}
        started = time.perf_counter()
        _, codes = get_class(layer["grid"]).from_storage(tensors, layer)
        seconds = time.perf_counter() - started
        seconds_of_all += seconds
        stored = 8 * sum(t.numel() * t.element_size() for t in tensors.values()) / codes.numel()
        matrix = codes.flatten(0, 1).numpy().astype(np.int64)
        estimate = entropy(matrix)
        others = huffman_bits(matrix), zstd_bits(matrix)
        speed = codes.numel() / 1e6 / seconds
        table.append((name, codes.numel(), stored, estimate, stored - estimate, *others, speed))
    columns = ["layer", "weights", "stored", "pooled entropy", "gap", "Huffman", "zstd", "decode, M/s"]
    frame = pd.DataFrame(table, columns=columns)
    if frame.empty:
        raise InputError(f"{directory} has no entropy-coded layer; save a model made with grid=entropy")
    weights = frame["weights"]
    means = [float((frame[c] * weights).sum() / weights.sum()) for c in columns[2:7]]
    total, speed = weights.sum(), weights.sum() / 1e6 / seconds_of_all
    frame.loc[len(frame)] = ["all", total, *means, speed]
    directory = 8 * (packed_file.file_bytes(facts, packed) - packed_file.packed_bytes(packed)) / total
    stored, estimate, gap, *others = means
    frame.loc[len(frame)] = ["file", total, stored + directory, estimate, gap + directory, *others, speed]
    return frame


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--bits", type=float, nargs="+", default=[1, 2, 3, 4])
    pairs = ["rtn:entropy", "gptq:entropy", "gptq:entropy_columns", "watersic:entropy_columns"]
    parser.add_argument("--pairs", nargs="+", default=pairs)
    parser.add_argument("--model", type=Path, help="folder of a saved model; nothing else is done then")
    options = parser.parse_args()
    if options.model is not None:
        print(model_rows(options.model).to_markdown(index=False, floatfmt=("", ",.0f", *[".4f"] * 5, ".1f")))
        return
    table = rows(options.size, options.tokens, options.bits, options.pairs)
    print(table.to_markdown(index=False, floatfmt=("g", "", *[".4f"] * 8, ".1f", ".1f", ".1f")))


if __name__ == "__main__":
    main()
