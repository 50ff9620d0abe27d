"""What users of HCCL Test look for on NPUs: its names of the operations and its four columns."""

from __future__ import annotations

from typing import Any

NAMES = {
    "all_reduce": "HcclAllReduce",
    "all_gather": "HcclAllGather",
    "reduce_scatter": "HcclReduceScatter",
    "all_to_all": "HcclAlltoAll",
    "all_to_all_v": "HcclAlltoAllV",
    "broadcast": "HcclBroadcast",
    "send_recv": "HcclSend, HcclRecv",
    "send_recv_both": "HcclSend, HcclRecv",
    "pairs": "HcclSend, HcclRecv",
}


def table(op: str, lines: list[dict[str, Any]]) -> list[str]:
    """data_size, aveg_time (so spelled there), alg_bandwidth and check_result of the out-of-place lines.

    Where an operation has only in-place lines, of those. The time is the mean, as in HCCL Test.
    """
    shown = [line for line in lines if not line["in_place"]] or lines
    out = ["#", f"# {NAMES[op]}", "data_size(Bytes): | aveg_time(us): | alg_bandwidth(GB/s): | check_result:"]
    for line in shown:
        time, bandwidth = "-", "-"
        if "mean" in line:
            time, bandwidth = f"{line['mean']:.2f}", f"{line['size'] / line['mean'] / 1e3:.5f}"
        verdict = "failed" if line["wrong"] else "success"
        out.append(f"{line['size']:<17} | {time:<14} | {bandwidth:<20} | {verdict}")
    return out
