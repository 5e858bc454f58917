"""What an unfinished job has done so far, kept on disk, so that a killed run goes on instead of starting
again.

A job keeps a folder beside its record: a file for each finished unit of the model, one for the training loop
that is under way, and `about.json`, which says whose work this is. Each file is written whole or not at all.
The state of the global random generators travels with each, so a job that goes on draws what it would have
drawn. Writing waits until the last write is `every_seconds` old, and longer where writing is slow, so short
jobs leave no file and long ones spend little on theirs.
"""

from __future__ import annotations

import io
import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ptq.errors import InputError
from ptq.records import write_bytes, write_json
from ptq.seeding import random_state, set_random_state

log = logging.getLogger(__name__)
ABOUT = "about.json"
SHARE = 0.05  # of the time, at most, goes into writing


@dataclass(kw_only=True)
class Spent:
    """What earlier, interrupted runs of a job took, up to their last write."""

    runs: int
    seconds: float
    peak_memory_bytes: int


class Store:
    """The folder of one job.

    `identity` is everything that must agree for old work to be of use (config, versions, kind of device);
    work of another identity is thrown away. `peak_memory` is asked at each write.
    """

    def __init__(
        self, folder: Path, identity: dict[str, Any], every_seconds: float, peak_memory: Callable[[], int]
    ) -> None:
        self.folder, self.identity, self.peak_memory = folder, identity, peak_memory
        self.every = every_seconds
        self.pending: dict[str, tuple[bytes, str | None]] = {}
        self.spent = Spent(runs=0, seconds=0.0, peak_memory_bytes=0)
        self.start = self.written = time.monotonic()
        about = _read(folder / ABOUT)
        if about.get("identity") == identity:
            self.spent = Spent(**about["spent"])
            log.info("going on with a job that was interrupted after %.0f s", self.spent.seconds)
        elif folder.exists():
            log.info("work of another version, or on another kind of device, is thrown away: %s", folder)
            shutil.rmtree(folder, ignore_errors=True)

    def due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() - self.written >= self.every

    def load(self, key: str) -> Any | None:
        """The state under `key`, tensors on the host, and the random generators as they were; None where
        there is none.
        """
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise InputError(
                f"{path} cannot be read ({str(error).splitlines()[0]}); "
                "set rerun=true to start this job from its beginning"
            ) from error
        set_random_state(content["random"])
        return content["state"]

    def holds(self, key: str) -> bool:
        """Whether there is a state under `key`."""
        return self._path(key).is_file()

    def put(self, key: str, state: Any, ends: str | None = None) -> None:
        """Write `state` at the next occasion. Once it lies there, other keys that begin with `ends` go."""
        buffer = io.BytesIO()
        torch.save({"random": random_state(), "state": state}, buffer)
        gone = [old for old in self.pending if old == key or (ends is not None and old.startswith(ends))]
        for old in gone:
            del self.pending[old]
        self.pending[key] = (buffer.getvalue(), ends)
        if self.due():
            self._write()

    def _write(self) -> None:
        started = time.monotonic()
        try:
            # first whose work it is: states without it are of no use to the next run
            spent = Spent(
                runs=self.spent.runs + 1,
                seconds=self.spent.seconds + started - self.start,
                peak_memory_bytes=max(self.spent.peak_memory_bytes, self.peak_memory()),
            )
            write_json(self.folder / ABOUT, {"identity": self.identity, "spent": asdict(spent)})
            for key, (content, ends) in self.pending.items():
                write_bytes(self._path(key), content)
                if ends is not None:
                    for path in self.folder.glob(f"{ends}*.pt"):
                        if path != self._path(key):
                            path.unlink(missing_ok=True)
        except OSError as error:  # the job itself does not need the folder
            log.warning(
                "work so far cannot be saved in %s; an interruption would lose it: %s", self.folder, error
            )
            self.every = math.inf
        self.pending.clear()
        self.written = time.monotonic()
        self.every = max(self.every, (self.written - started) / SHARE)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.pt"


@dataclass(frozen=True)
class Resume:
    """The place of one part of a job (a unit, a training loop) in the store; without a store nothing is kept.

    States are nested lists and dicts of tensors, numbers, strings and None. They are asked for only when they
    are about to be kept.
    """

    store: Store | None = None
    prefix: str = ""

    def within(self, name: str) -> Resume:
        """The place of a part of this part."""
        return Resume(self.store, f"{self.prefix}{name}.")

    def holds(self, key: str) -> bool:
        """Whether there is a state under `key`."""
        return self.store is not None and self.store.holds(self.prefix + key)

    def load(self, key: str) -> Any | None:
        """The state under `key`, tensors on the host, or None. The global random generators are put back to
        where they were when it was kept.
        """
        return None if self.store is None else self.store.load(self.prefix + key)

    def save(self, key: str, state: Callable[[], Any]) -> None:
        """Write the state where it is time to; for loops that call this after each round."""
        if self.store is not None and self.store.due():
            self.store.put(self.prefix + key, state())

    def keep(self, key: str, state: Callable[[], Any]) -> None:
        """Write the state now or with whatever is written next; for what will not come again."""
        if self.store is not None:
            self.store.put(self.prefix + key, state())

    def finish(self, key: str, state: Callable[[], Any]) -> None:
        """As `keep`; once it is written, all other states of this part go."""
        if self.store is not None:
            self.store.put(self.prefix + key, state(), ends=self.prefix)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return content if isinstance(content, dict) else {}
