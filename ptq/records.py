"""One job, one `record.json`: written atomically, read back to know whether the job is done."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RECORD = "record.json"
IGNORED = (
    "name",
    "output_dir",
    "tracker",
    "progress",
    "dry_run",
    "save_model",
    "save_every_s",
    "rerun",
    "choices",
)


# keys that came later, with the value that all jobs before them had
LATER: dict[str, Any] = {
    "tf32": False,
    "bfloat16": False,
    "model.skip_embeddings": True,
    "calibration.balance": False,
    "calibration.image_augmentation": [],
    "calibration.crop_scale": [0.5, 1.0],
    "calibration.crop_ratio": [0.75, 1.3333],
    "calibration.jitter": 0.4,
    "method.fisher_rank": 15,
    "method.low_rank_fraction": 0.5,
    "method.relative_regularisation": False,
    "eval.integers": False,
}


def config_hash(config: dict[str, Any]) -> str:
    """Twelve hex digits of everything in a resolved config that can change the result."""
    relevant = _without_later({k: v for k, v in config.items() if k not in IGNORED})
    return hashlib.sha256(json.dumps(relevant, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _without_later(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`config` less the later keys that have the value of before."""
    kept = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if name not in LATER or value != LATER[name]:
            kept[key] = _without_later(value, f"{name}.") if isinstance(value, dict) else value
    return kept


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader, or a crash, sees the old file or the new one whole."""
    write_bytes(path, json.dumps(content, indent=1, default=str).encode())


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_json`, any content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def read_record(directory: Path) -> dict[str, Any] | None:
    """The record in `directory`, or None where there is none that can be read."""
    try:
        content = json.loads((directory / RECORD).read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return content if isinstance(content, dict) else None


def finished(directory: Path, expected_hash: str) -> dict[str, Any] | None:
    """The record of this very job if it is done, else None."""
    record = read_record(directory)
    if record and record.get("status") == "done" and record.get("config_hash") == expected_hash:
        return record
    return None


def versions() -> dict[str, str]:
    """Versions of what computes, and the commit of this code where it is known."""
    found = {"python": platform.python_version()}
    for package in ("ptq", "torch", "torchvision", "timm", "transformers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    commit = _commit()
    return {**found, "commit": commit} if commit else found


def _commit() -> str | None:
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
