"""`moeweave-verify`: proves a wrapped model on any mesh and plan: loss and every gradient against one process."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

import moeweave as mw
from moeweave.launch import cli, elastic, env, prepare
from moeweave.launch.report import shown
from moeweave.launch.schema import BatchConfig, ConfigError, VerifyConfig
from moeweave.parallel.verify import ParityReport, gradient_parity

PROGRAM = cli.Program(
    name="moeweave-verify",
    config="verify",
    summary=(
        "Runs one step of a wrapped model over ranks, with other and unequally padded data on each, and compares its\n"
        "loss and every gradient with the unwrapped model on the whole batch in one process."
    ),
    examples=(
        ("moeweave-verify", "the quickstart's model on Mesh(dp=2, ep=2)"),
        ("moeweave-verify model=mixtral mesh.dp=2 mesh.ep=2 mesh.device=cpu", "a tiny Mixtral on two CPU ranks"),
        (
            "moeweave-verify model=olmoe model.overrides.output_router_logits=true mesh.dp=4 mesh.ep=2",
            "with the load-balancing loss, two copies of each expert",
        ),
        (
            "moeweave-verify model=path/to/config.json plan.data=ddp plan.dispatcher=alltoall",
            "any config, another plan",
        ),
    ),
    schema=VerifyConfig,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 equal, 1 not, 2 the config cannot run."""
    return cli.run(PROGRAM, cli.starting(PROGRAM, start), argv)


def start(config: VerifyConfig) -> int:
    """Runs a checked config; returns the exit code."""
    if config.model.weights:
        raise ConfigError("model.weights=true: the proof builds its own random weights. Set model.weights=false.")
    model = prepare.check_model(config.model, config.mesh, config.plan)
    ranks = env.launched_ranks()
    if ranks is not None:
        config.mesh.sizes().check_world(ranks.world)
        report = prove(config)
    else:
        num_ranks = config.mesh.sizes().world
        elastic.check_device("mesh.device", config.mesh.device, num_ranks)
        on_cpu = config.mesh.device == "cpu" or not elastic.has_accelerator()
        with elastic.passing_logs("moeweave-verify-") as logs:
            report = elastic.start_ranks(prove, config, num_ranks=num_ranks, log_dir=logs, on_cpu=on_cpu)
    if ranks is None or ranks.rank == 0:
        _print(report, config, prepare.describe(model))
    code = 0 if report.ok else 1
    if ranks is not None:
        elastic.leave(code)
    return code


def prove(config: VerifyConfig) -> ParityReport:
    """One rank's part of the proof."""
    mesh = mw.Mesh(**dataclasses.asdict(config.mesh))
    build = prepare.model_builder(config.model, config.seed)
    num_ids = prepare.vocab_size(build()) or 2
    report = gradient_parity(
        build,
        lambda data_rank: make_batch(config.batch, num_ids, config.seed, data_rank),
        mesh,
        mw.Plan.from_dict(config.plan),
    )
    dist.destroy_process_group()
    return report


def make_batch(config: BatchConfig, num_ids: int, seed: int, data_rank: int) -> dict[str, Tensor]:
    """ids_BS, mask_BS and labels_BS (int64) of one data rank: B rows of random ids, each padded on the right by another
    amount, so that ranks have different numbers of labels. The first row is whole."""
    generator = torch.Generator().manual_seed(seed * 100_003 + data_rank)
    ids_BS = torch.randint(min(3, num_ids - 1), num_ids, (config.rows, config.length), generator=generator)
    padding_B = torch.tensor(
        [(5 * row + 3 * data_rank * (row > 0)) % (config.length // 2) for row in range(config.rows)]
    )
    mask_BS = (torch.arange(config.length)[None, :] < config.length - padding_B[:, None]).long()
    return {
        "input_ids": ids_BS.masked_fill(mask_BS == 0, 0),
        "attention_mask": mask_BS,
        "labels": ids_BS.masked_fill(mask_BS == 0, -100),
    }


def _print(report: ParityReport, config: VerifyConfig, model: str) -> None:
    console = Console()
    plan, default = mw.Plan.from_dict(config.plan), mw.Plan()
    chosen = {name: value for name, value in vars(plan).items() if value != getattr(default, name)}
    words = ", ".join(f"{name}={value}" for name, value in chosen.items()) or "the default"
    words += " (its codec left out)" * (plan.codec != default.codec)
    console.print(f"{model}; mesh {shown(config.mesh.sizes())}; plan {words}", highlight=False)
    table = Table("", "over ranks", "one process", "relative error")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("loss", f"{report.loss:.6f}", f"{report.reference_loss:.6f}", f"{report.loss_error:.1e}")
    table.add_row("gradient norm", f"{report.norm:.6f}", f"{report.reference_norm:.6f}", f"{report.norm_error:.1e}")
    worst = sorted(report.errors.items(), key=lambda item: -item[1])
    for name, error in worst[: config.show]:
        table.add_row(name, "", "", f"{error:.1e}", style="red" if error > report.tolerance else "")
    console.print(table)
    hidden = len(worst) - config.show
    if hidden > 0:
        print(f"and {hidden} parameters with smaller errors")
    largest = max(report.worst, report.loss_error, report.norm_error)
    verdict = "equal" if report.ok else "NOT equal"
    print(f"{verdict}: largest relative error {largest:.2e}, tolerance {report.tolerance:.0e}")


if __name__ == "__main__":
    sys.exit(main())
