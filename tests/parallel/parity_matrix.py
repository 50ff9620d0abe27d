"""Gradient parity of every combination of axes: `python tests/parallel/parity_matrix.py --out FILE`.

Each combination runs one step over gloo ranks, with another batch and other padding on each data rank, and once in one
process on the whole batch: loss, every gradient, the global norm, and the parameters after a clipped step of SGD (Adam
would hide a factor). Writes FILE.json and FILE.md (a table for the README); exits with 1 when a row fails.

A row is the sizes of its mesh and fields of its plan; another axis joins by adding rows to `ROWS`, and `--missing` runs
only what FILE.json lacks. With `nodes` the ranks are told to lie on that many nodes, equally many on each.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hf_zoo
from faked_nodes import write_nodes
from run_ranks import RankError, run_ranks

MODELS = ("mixtral", "qwen3_moe", "deepseek_v3")
GRADIENT, NORM = 1e-5, 1e-6  # what errors must not exceed
PLAN_FIELDS = ("schedule", "sequence", "tp_sequence", "data", "dispatcher", "recompute")
# Sizes of the mesh, and what the plan says besides, as `name: size` and `field: value` of one mapping.
ROWS: list[dict[str, Any]] = [
    dict(dp=4, ep=2),
    dict(dp=4, ep=4),
    dict(dp=4, etp=2),
    dict(dp=4, ep=2, etp=2),
    dict(dp=4, ep=2, etp=2, data="ddp"),
    dict(dp_replicate=2, dp=2, ep=2),
    dict(dp=2, tp=2),
    dict(dp=2, tp=2, ep=2),
    dict(dp=2, tp=2, ep=4, recompute=True),
    dict(dp=2, tp=2, etp=2),
    dict(dp=2, tp=2, ep=2, etp=2, dispatcher="allgather"),
    dict(pp=2, dp=2),
    dict(pp=2, dp=2, ep=2),
    dict(pp=2, dp=2, ep=2, schedule="zero_bubble"),
    dict(pp=2, dp=2, etp=2, schedule="interleaved"),
    dict(pp=2, tp=2),
    dict(pp=2, tp=2, ep=2, schedule="dualpipev"),
    dict(pp=2, tp=2, etp=2, schedule="gpipe"),
    dict(pp=4),
    dict(dp=2, sp=2, sequence="ulysses"),
    dict(dp=2, sp=2, ep=2, sequence="ring"),
    dict(sp=4, ep=4, sequence="ulysses", recompute=True),
    dict(dp=2, sp=2, etp=2, sequence="ulysses"),
    dict(tp=2, sp=2, sequence="ulysses"),
    dict(tp=2, sp=2, ep=2, sequence="ring", tp_sequence=True),
    dict(dp=2, tp=2, ep=2, tp_sequence=True),
    dict(pp=2, sp=2, sequence="ulysses", schedule="zero_bubble"),
    dict(pp=2, sp=2, ep=2, sequence="ring"),
    dict(dp=4, ep=4, dispatcher="alltoall"),
    dict(dp=2, tp=2, ep=4, dispatcher="onesided"),
    dict(dp=2, sp=2, ep=4, sequence="ulysses", dispatcher="allgather"),
    dict(pp=2, dp=2, ep=2, dispatcher="alltoall"),
    dict(dp=4, ep=4, dispatcher="hierarchical", nodes=2),
    dict(dp=4, ep=2, etp=2, dispatcher="hierarchical", nodes=2),
    dict(dp_replicate=2, dp=2, ep=2, dispatcher="hierarchical", nodes=4),
    dict(dp=2, tp=2, ep=4, dispatcher="hierarchical", nodes=2),
    dict(dp=2, sp=2, ep=4, sequence="ulysses", dispatcher="hierarchical", nodes=2),
    dict(sp=4, ep=4, sequence="ring", dispatcher="hierarchical", nodes=2),
    dict(pp=2, dp=2, ep=2, dispatcher="hierarchical", nodes=4),
    dict(dp=8, ep=4, etp=2),
    dict(dp=4, tp=2, ep=4),
    dict(dp=4, tp=2, ep=2, etp=2),
    dict(dp_replicate=2, dp=2, tp=2, ep=4),
    dict(pp=2, dp=4, ep=2, etp=2),
    dict(pp=2, dp=2, tp=2),
    dict(pp=2, dp=2, tp=2, ep=4),
    dict(pp=2, dp=2, tp=2, etp=2),
    dict(pp=2, dp=2, tp=2, ep=2, etp=2, schedule="zero_bubble"),
    dict(pp=2, dp_replicate=2, dp=2, ep=2),
    dict(pp=4, dp=2, ep=2),
    dict(pp=4, tp=2, ep=2),
    dict(dp=2, tp=2, sp=2, ep=4, sequence="ulysses", tp_sequence=True),
    dict(dp=2, tp=2, sp=2, ep=2, etp=2, sequence="ring"),
    dict(pp=2, dp=2, sp=2, ep=2, sequence="ring"),
    dict(pp=2, dp=2, sp=2, etp=2, sequence="ulysses", schedule="interleaved"),
    dict(pp=2, tp=2, sp=2, ep=4, sequence="ulysses", tp_sequence=True),
    dict(dp=2, tp=2, sp=2, ep=4, sequence="ring", dispatcher="alltoall"),
    dict(pp=2, dp=2, sp=2, ep=4, sequence="ulysses", dispatcher="allgather"),
    dict(pp=2, dp=2, tp=2, ep=4, dispatcher="hierarchical", nodes=4),
    dict(pp=2, dp=2, sp=2, ep=4, sequence="ring", dispatcher="hierarchical", nodes=4),
    dict(dp=2, tp=2, sp=2, ep=4, sequence="ulysses", tp_sequence=True, dispatcher="hierarchical", nodes=4),
    dict(pp=2, dp=4, tp=2, ep=4, etp=2),
    dict(pp=2, dp=2, tp=2, sp=2, ep=2, sequence="ulysses"),
    dict(pp=2, dp=2, tp=2, sp=2, ep=2, sequence="ring", tp_sequence=True),
    dict(pp=2, dp=2, tp=2, sp=2, ep=4, etp=2, sequence="ulysses", tp_sequence=True, schedule="zero_bubble"),
    dict(pp=2, dp=2, tp=2, sp=2, ep=4, sequence="ulysses", dispatcher="hierarchical", nodes=8),
]
AXES = ("pp", "tp", "dp", "sp", "ep", "etp")


def sizes_of(row: dict[str, Any]) -> dict[str, int]:
    return {name: value for name, value in row.items() if name not in (*PLAN_FIELDS, "nodes")}


def ranks_of(row: dict[str, Any]) -> int:
    count = 1
    for axis, size in sizes_of(row).items():
        count *= 1 if axis in ("ep", "etp") else size
    return count


def name_of(row: dict[str, Any]) -> str:
    sizes = " ".join(f"{axis}{size}".replace("dp_replicate", "rep") for axis, size in sizes_of(row).items())
    rest = [name if value is True else str(value) for name, value in row.items() if name in PLAN_FIELDS]
    return ", ".join([sizes, *rest, *([f"{row['nodes']} nodes"] if "nodes" in row else [])])


def pairs() -> set[tuple[str, str]]:
    """Pairs of axes above one that some row has."""
    return {pair for row in ROWS for pair in itertools.combinations([a for a in AXES if row.get(a, 1) > 1], 2)}


def plan_of(row: dict[str, Any], folder: str) -> dict[str, Any]:
    """Fields of a row's plan; `folder` takes the file that says on which node each rank is."""
    fields = {name: value for name, value in row.items() if name in PLAN_FIELDS}
    if "nodes" in row:
        share = ranks_of(row) // row["nodes"]
        fields["topology"] = write_nodes(Path(folder), [rank // share for rank in range(ranks_of(row))])
    return fields


def check_dispatcher(model: Any, row: dict[str, Any]) -> None:
    """The tokens of `model` went by the dispatcher of the row, between nodes where it has some."""
    for call in vars(model)["_moeweave"].calls if "dispatcher" in row else ():
        assert type(call.dispatcher).__name__.lower() == f"{row['dispatcher']}dispatcher", call.dispatcher
        assert "nodes" not in row or call.dispatcher.nodes.num_nodes > 1, call.dispatcher.nodes


def compare(model: str, row: dict[str, Any]) -> dict[str, Any]:
    """One rank of one comparison; equal on every rank."""
    import torch
    import torch.distributed as dist

    import moeweave as mw
    from moeweave.parallel.hf.boxes import whole_tensor
    from moeweave.parallel.names import named_params
    from moeweave.parallel.schedules import Layout
    from moeweave.parallel.verify import gradient_parity

    mesh = mw.Mesh(**sizes_of(row), device="cpu")
    models: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        plan = mw.Plan(**plan_of(row, folder))
        stages = Layout(plan.schedule, mesh.sizes.pp).num_stages
        build = partial(hf_zoo.build, model, num_hidden_layers=max(2, stages))
        batch = partial(hf_zoo.make_batch, model, rows=2 * mesh.sizes.pp, length=15)
        report = gradient_parity(build, batch, mesh, plan, prepare=models.append)
    reference, wrapped = models
    check_dispatcher(wrapped, row)
    start = {name: param.detach().clone() for name, param in build().named_parameters()}
    max_norm = report.reference_norm / 2
    torch.nn.utils.clip_grad_norm_(reference.parameters(), max_norm)
    mw.clip_grad_norm_(wrapped, max_norm)
    for groups in (reference.parameters(), mw.param_groups(wrapped)):
        # So large a rate that storing the parameter rounds nothing of the update away.
        torch.optim.SGD(groups, lr=1000.0).step()
    want = {name: param.detach() for name, param in reference.named_parameters()}
    whole = {name: whole_tensor(param) for name, param in named_params(wrapped).items()}
    moved = {name: want[name] - start[name] for name in whole}
    update = max(float((whole[name] - want[name]).norm() / moved[name].norm()) for name in whole if moved[name].any())
    worst_update = torch.tensor(update, dtype=torch.float64)
    dist.all_reduce(worst_update, op=dist.ReduceOp.MAX)
    return {
        "model": model,
        "mesh": name_of(row),
        "row": row,
        "ranks": mesh.world,
        "loss_error": report.loss_error,
        "gradient": report.worst,
        "worst_name": report.worst_name,
        "gradients": len(report.errors),
        "update": float(worst_update),
        "norm": report.norm_error,
        "ok": max(report.worst, report.loss_error, float(worst_update)) <= GRADIENT and report.norm_error <= NORM,
    }


def run(model: str, row: dict[str, Any]) -> dict[str, Any]:
    try:
        found: dict[str, Any] = run_ranks(ranks_of(row), compare, model, row)[0]
        return found
    except RankError as error:
        failed = {"model": model, "mesh": name_of(row), "row": row, "ranks": ranks_of(row), "ok": False}
        return {**failed, "reason": str(error).split("\n")[0]}


def line(found: dict[str, Any]) -> str:
    """One comparison, for the terminal."""
    where = f"{found['ranks']} ranks, {found['mesh']}, {found['model']}:"
    if "reason" in found:
        return f"{where} FAILED: {found['reason']}"
    errors = f"gradient {found['gradient']:.1e}, update {found['update']:.1e}, norm {found['norm']:.1e}"
    return f"{where} {'pass' if found['ok'] else 'FAILED'}: {errors} ({found['worst_name']})"


def markdown(table: list[dict[str, Any]]) -> str:
    """A line a mesh: the worst gradient of each model, the worst update and norm of all."""
    lines = [
        f"| ranks | mesh | {' | '.join(MODELS)} | SGD update | norm |",
        "|---" * (4 + len(MODELS)) + "|",
    ]
    for mesh in dict.fromkeys(found["mesh"] for found in table):
        own = {found["model"]: found for found in table if found["mesh"] == mesh}
        cells = [f"{own[m]['gradient']:.1e}" if own.get(m, {}).get("ok") else "FAILED" for m in MODELS if m in own]
        measured = [found for found in own.values() if "update" in found]
        worst = [f"{max(found[key] for found in measured):.1e}" if measured else "-" for key in ("update", "norm")]
        lines.append(f"| {next(iter(own.values()))['ranks']} | {mesh} | {' | '.join(cells)} | {' | '.join(worst)} |")
    return "\n".join(lines)


def kept(path: Path, versions: dict[str, str]) -> dict[tuple[str, str], dict[str, Any]]:
    """Comparisons that passed, from the file at `path`, by model and mesh.

    Raises:
        ValueError: they were made with other releases.
    """
    held = json.loads(path.read_text())
    if held["versions"] != versions:
        raise ValueError(f"{path} is of {held['versions']}, these are {versions}. Run all rows, without --missing.")
    return {(found["model"], found["mesh"]): found for found in held["rows"] if found["ok"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where to write, without suffix")
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="architectures; all by default")
    parser.add_argument("--ranks", type=int, nargs="*", help="only rows of that many ranks")
    parser.add_argument("--missing", action="store_true", help="only what the file at --out lacks; the rest is kept")
    chosen = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Ranks import the functions by this module's name, which is not __main__.
    from parity_matrix import run

    versions = {package: importlib.metadata.version(package) for package in ("torch", "transformers")}
    known = kept(chosen.out.with_suffix(".json"), versions) if chosen.missing else {}
    table = []
    for row in ROWS:
        for model in chosen.models if not chosen.ranks or ranks_of(row) in chosen.ranks else ():
            found = known.get((model, name_of(row)))
            table.append(found or run(model, row))
            if found is None:
                print(line(table[-1]), flush=True)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.with_suffix(".json").write_text(json.dumps({"versions": versions, "rows": table}, indent=1) + "\n")
    on = ", ".join(f"{package} {version}" for package, version in versions.items())
    passed = sum(found["ok"] for found in table)
    heading = f"{passed} of {len(table)} comparisons pass, fp32, {on}."
    chosen.out.with_suffix(".md").write_text(f"{heading}\n\n{markdown(table)}\n")
    print(heading)
    return int(passed < len(table))


if __name__ == "__main__":
    sys.exit(main())
