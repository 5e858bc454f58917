"""Synthetic records: what a job writes, without the job."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

LAYERS = ("stem", "block1.conv", "block2.conv", "head")


def record(
    model: str = "digits_resnet",
    method: str = "comq",
    bits: float = 3,
    result: float = 90.0,
    *,
    seed: int = 0,
    before: float = 98.5,
    metric: str = "top1",
    stored: float | None = None,
    grid: str = "affine",
    data: str = "digits",
    choices: dict[str, str] | None = None,
    method_config: dict[str, Any] | None = None,
    bits_config: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    **top: Any,
) -> dict[str, Any]:
    """A finished record; keyword arguments replace or add keys at the level their name says."""
    total = stored if stored is not None else bits + 0.0625
    resolved = {
        "choices": {
            "model": model,
            "data": data,
            "method": method,
            "grid": grid,
            "bits": f"w{bits:g}",
            "calibration": "default",
            **(choices or {}),
        },
        "method": {"sweeps": 3, "target": "quantized_path", **(method_config or {})},
        "bits": {"weight": float(bits), "group_size": None, "first_last": None, **(bits_config or {})},
        "calibration": {"num_samples": 128},
        "seed": seed,
        **(config or {}),
    }
    extra = {"top5": 99.0} if metric == "top1" else {}
    return {
        "status": "done",
        "error": None,
        "config": resolved,
        "config_hash": hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()[:12],
        "float": {metric: before, "samples": 360, **extra},
        "quantized": {metric: result, "samples": 360, **extra},
        "bits_per_coefficient": {"codes": float(bits), "parameters": total - bits, "total": total},
        "model_bits_per_coefficient": total + 0.5,
        "layers": [
            {
                "name": name,
                "shape": [8, 8],
                "bits": bits,
                "relative_error": 0.01 * 4.0 ** (4 - bits) * (1 + i),
            }
            for i, name in enumerate(LAYERS)
        ],
        "seconds": {
            "load": 0.1,
            "calibrate_and_quantize": 2.0,
            "evaluate": 0.4,
            "capture": 0.5,
            "solve": 1.5,
            "limit": 0.25,
            "total": 2.5,
        },
        "peak_memory_bytes": 1_000_000,
        "device": "cpu",
        "seed": seed,
        "label": None,
        **top,
    }


def failed(message: str = "H is singular", **options: Any) -> dict[str, Any]:
    """A record of a job that stopped: its config and its error, no result."""
    content = record(**options)
    kept = {key: content[key] for key in ("config", "config_hash", "seed", "label")}
    return {
        "status": "failed",
        "error": {"type": "RuntimeError", "message": message, "layer": "head"},
        **kept,
    }


def write(folder: Path, *records: dict[str, Any]) -> Path:
    """Write each record into a job folder of its own."""
    start = len(list(folder.glob("job*")))
    for number, content in enumerate(records, start=start):
        path = folder / f"job{number:03d}" / "record.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
    return folder
