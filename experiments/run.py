"""`ptq-run`: compose a config, do its job (or, with -m, every job of the sweep), report."""

from __future__ import annotations

import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.overrides import check_overrides, spelled_out
from ptq.config import CONF_DIR
from ptq.errors import InputError
from ptq.hardware import keep_freed_memory
from ptq.runner import GROUPS, run


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")
def job(config: DictConfig) -> dict[str, object]:
    """One job, in the process that the launcher gives it."""
    keep_freed_memory()
    hydra_config = HydraConfig.get()
    chosen = hydra_config.runtime.choices
    try:
        record = run(config, {group: chosen[group] for group in GROUPS if chosen.get(group)})
    except InputError as error:  # no record could be written, or none was asked for
        print(f"ptq-run: error: {error}", file=sys.stderr)
        sys.exit(1)
    single = hydra_config.mode is not None and hydra_config.mode.name == "RUN"
    if single and record["status"] == "failed":
        error = record["error"]
        assert isinstance(error, dict)
        if error["traceback"]:  # wrong input has said what it is already
            print(error["traceback"], file=sys.stderr)
        sys.exit(1)
    return record


def main() -> None:
    """Entry point of the console command: wrong input ends in one plain message and exit status 1."""
    try:
        sys.argv[1:] = spelled_out(sys.argv[1:])
        check_overrides(sys.argv[1:])
        job()
    except InputError as error:
        print(f"ptq-run: error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
