"""`--multirun`: a run for each combination of values, by Hydra's own sweepers and launchers.

`moeweave-train --multirun optim.lr=1e-3,3e-3` runs one after the other here. Plugins that are installed work as in any
Hydra program: `hydra/launcher=submitit_slurm` sends each run to Slurm as a job of its own, on ranks of its one machine.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from moeweave.launch import cli, compose
from moeweave.launch.strict import build


def run(program: cli.Program, start: Callable[[Any], int], arguments: cli.Arguments) -> int:
    """Hands the command line to Hydra; returns 0, or Hydra's exit code once a run has failed."""
    lines = compose.hydra_lines(program.schema, arguments.overrides, arguments.config_dir, sweep=True)
    GlobalHydra.instance().clear()
    job = functools.partial(_job, program.schema, start)
    functools.update_wrapper(job, _job)  # Hydra names the job after the function's file
    entry = hydra.main(
        config_path=str(compose.CONFIGS.absolute()), config_name=program.config, **compose.version_base()
    )
    before, sys.argv = sys.argv, [sys.argv[0], "--multirun", f"hydra.job.name={program.config}", *lines]
    try:
        entry(job)()
    except SystemExit as error:
        return int(error.code or 0)
    finally:
        sys.argv = before
    return 0


def _job(schema: type, start: Callable[[Any], int], composed: DictConfig) -> None:
    """One run of a sweep, in the process that Hydra's launcher chose. Its folder is the one that Hydra made for it."""
    values: Any = OmegaConf.to_container(composed, resolve=True)
    config: Any = build(schema, values)
    run_config = getattr(config, "run", None)
    if run_config is not None and run_config.dir is None:
        own = dataclasses.replace(run_config, dir=HydraConfig.get().runtime.output_dir)
        config = dataclasses.replace(config, run=own)
    code = start(config)
    if code:
        raise RuntimeError(f"the run in {HydraConfig.get().runtime.output_dir} ended with exit code {code}")
