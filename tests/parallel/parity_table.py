"""Gradient parity of every architecture of the zoo: `python tests/parallel/parity_table.py --out FILE`.

Each model runs one step over ranks, with another batch and other padding on each and the balance loss on, and once
unwrapped on the whole batch in one process. Writes FILE.json and FILE.md (a table for the README); exits with 1 when an
architecture that should pass does not.
"""

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_zoo import NOT_WRAPPABLE, SPECS, ZOO, make_batch
from run_ranks import RankError, run_ranks

MESHES = [(2, 2), (4, 4), (4, 2)]  # ranks, ep


def parity(name: str, ep: int) -> dict[str, Any]:
    """One rank of one comparison, all ranks being data ranks; a row of the table, equal on every rank."""
    import torch.distributed as dist

    import moeweave as mw
    from moeweave.parallel.verify import gradient_parity

    models = []

    def prepare(model: Any) -> None:
        models.append(model.train(SPECS[name].training))

    mesh = mw.Mesh(dp=dist.get_world_size(), ep=ep)
    report = gradient_parity(ZOO[name], partial(make_batch, name), mesh, prepare=prepare)
    record = models[-1]._moeweave
    experts = [block.experts.get_parameter(key) for block in record.blocks for key in block.params]
    return {
        "architecture": name,
        "experts": layout(record.blocks[0]),
        "blocks": len(record.blocks),
        "ranks": dist.get_world_size(),
        "ep": ep,
        "experts_per_rank": sorted({call.num_local for call in record.calls}),
        "share_held": sorted({param.to_local().numel() / param.numel() for param in experts}),
        "aux_loss": record.aux_checked,
        "loss_error": report.loss_error,
        "norm_error": report.norm_error,
        "worst": report.worst,
        "worst_name": report.worst_name,
        "gradients": len(report.errors),
        "tolerance": report.tolerance,
        "ok": report.ok,
    }


def layout(block: Any) -> str:
    """Which path a block's experts take, and how its weights lie where that is not the usual way."""
    if block.kind != "packed":
        return f"own forward ({block.kind})"
    from moeweave.parallel.adapter import is_gated

    experts = block.experts
    odd = {
        "no gate": not is_gated(experts),
        "transposed": experts.is_transposed,
        "interleaved": not getattr(experts, "is_concatenated", True),
        "bias": experts.has_bias,
        "own gate": is_gated(experts) and type(experts)._apply_gate.__module__.startswith("transformers.models."),
        "post-norm": getattr(experts, "has_post_expert_norm", False),
    }
    return ", ".join(["grouped GEMM", *(word for word, holds in odd.items() if holds)])


def rows(names: list[str]) -> list[dict[str, Any]]:
    table = []
    for name in names:
        for ranks, ep in MESHES if name not in NOT_WRAPPABLE else []:
            try:
                row = run_ranks(ranks, parity, name, ep)[0]
            except RankError as error:
                row = {"architecture": name, "ranks": ranks, "ep": ep, "ok": False, "reason": str(error).split("\n")[0]}
            table.append(row)
            print(line(row), flush=True)
        if name in NOT_WRAPPABLE:
            table.append({"architecture": name, "reason": NOT_WRAPPABLE[name]})
            print(line(table[-1]), flush=True)
    return table


def line(row: dict[str, Any]) -> str:
    """One comparison, for the terminal."""
    if "ok" not in row:
        return f"{row['architecture']}: not compared: {row['reason']}"
    where = f"{row['architecture']}: {row['ranks']} ranks, ep {row['ep']}:"
    if "worst" not in row:
        return f"{where} FAILED: {row['reason']}"
    errors = f"loss {row['loss_error']:.1e}, worst gradient {row['worst']:.1e} {row['worst_name']}"
    return f"{where} {'pass' if row['ok'] else 'FAILED'}: {errors} ({row['experts']})"


def markdown(table: list[dict[str, Any]]) -> str:
    """One line an architecture: the worst gradient error on each mesh, and the parameter of the largest."""
    meshes = " | ".join(f"{ranks} ranks, ep {ep}" for ranks, ep in MESHES)
    lines = [
        f"| architecture | experts | balance loss | {meshes} | worst parameter |",
        "|---" * (4 + len(MESHES)) + "|",
    ]
    for name in dict.fromkeys(row["architecture"] for row in table):
        own = [row for row in table if row["architecture"] == name]
        cells = [f"{r['worst']:.1e}" if r.get("ok") else "FAILED" if "ok" in r else "-" for r in own]
        measured = [row for row in own if "worst" in row]
        if not measured:
            reason = own[0]["reason"]
            lines.append(f"| {name} | - | - | {' | '.join(['-'] * len(MESHES))} | not compared: {reason} |")
            continue
        worst = max(measured, key=lambda row: row["worst"])
        aux = "yes" if worst["aux_loss"] else "none"
        lines.append(f"| {name} | {worst['experts']} | {aux} | {' | '.join(cells)} | `{worst['worst_name']}` |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where to write, without suffix")
    parser.add_argument("--only", nargs="*", default=list(ZOO), help="architectures; all of the zoo by default")
    chosen = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Ranks import the function by its module's name, which is not __main__.
    from moeweave.launch import runlog
    from parity_table import rows

    table = rows(chosen.only)
    passed = sorted({row["architecture"] for row in table} - {r["architecture"] for r in table if not r.get("ok")})
    result = {**runlog.provenance(), "rows": table}
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    on = ", ".join(f"{package} {result['versions'][package]}" for package in ("torch", "transformers"))
    heading = f"{len(passed)} of {len(chosen.only)} architectures pass, fp32, {on}."
    chosen.out.with_suffix(".md").write_text(f"{heading}\n\n{markdown(table)}\n")
    print(heading)
    return int(any(row.get("ok") is False for row in table))


if __name__ == "__main__":
    sys.exit(main())
