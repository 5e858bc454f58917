"""Where data and downloaded weights are: relative paths lie under the folder that PTQ_DATA names."""

from __future__ import annotations

import os
from pathlib import Path

from ptq.errors import InputError

VARIABLE = "PTQ_DATA"


def data_root(needed_for: str = "local data and weights") -> Path:
    """The folder that the environment variable PTQ_DATA names; InputError where it is unset or no folder."""
    value = os.environ.get(VARIABLE, "")
    if not value:
        raise InputError(
            f"{VARIABLE} is unset, and {needed_for} is looked for under the folder it names; "
            f"set it with `export {VARIABLE}=/path/to/data`, or give an absolute path instead"
        )
    root = Path(value).expanduser()
    if not root.is_dir():
        raise InputError(
            f"{VARIABLE}={value} is not a folder, and {needed_for} is looked for there; "
            f"set {VARIABLE} to an existing folder, or give an absolute path instead"
        )
    return root


def resolve(path: str | Path, needed_for: str) -> Path:
    """The existing file or folder that `path` means: as it is when absolute or with `~`, else under PTQ_DATA.

    Raises InputError with the full path looked at when it does not exist; `needed_for` says who needs it.
    """
    given = Path(path).expanduser()
    if given.is_absolute():
        full = given
        way_out = "correct the path"
    else:
        full = data_root(f"{needed_for} ({given})") / given
        way_out = f"put it there, point {VARIABLE} to the folder that has it, or give an absolute path"
    if not full.exists():
        raise InputError(f"{needed_for} not found: {full} does not exist; {way_out}")
    return full
