"""How the three-stream schedule shares out an exchange, from what a topology file measured.

Pure functions of facts that every rank has alike: the file is read once for all.
"""

from __future__ import annotations

from moeweave.comm.topology import Topology

DEFAULT_SHARE = 0.25  # of push, where no rates are known


def push_share(push_gbps: float, dma_gbps: float, *, measured_sms: int = 0, num_sms: int = 0) -> float:
    """The part of the bytes on push with which both planes end at the same time.

    Args:
        push_gbps, dma_gbps: rates of each plane.
        measured_sms: multiprocessors behind push_gbps, 0 where there are none.
        num_sms: what the budget leaves to push of them, 0 for all. Fewer carry in proportion, which is the least that
            they do: a link may be full before all of them send.

    100 and 300 GB/s: 0.25. With 33 of 132 multiprocessors push has 25: 25 / 325 = 0.077.
    """
    left = min(num_sms / measured_sms, 1.0) if num_sms and measured_sms else 1.0
    rate = push_gbps * left
    return round(rate / (rate + dma_gbps), 3)


def rates_of_planes(topology: Topology | None, size: int) -> tuple[float, float] | None:
    """GB/s of push and dma, where the file has them for as many ranks."""
    if topology is None or topology.num_ranks != size or not topology.push_gbps or not topology.dma_gbps:
        return None
    return topology.push_gbps, topology.dma_gbps


def share_of(topology: Topology | None, size: int, num_sms: int = 0) -> tuple[float, str]:
    """The push plane's share for a group of `size` ranks, and the reason."""
    rates = rates_of_planes(topology, size)
    if topology is None or rates is None:
        return DEFAULT_SHARE, f"no rates of both planes are known for {size} ranks"
    share = push_share(*rates, measured_sms=topology.push_sms, num_sms=num_sms)
    budget = f", {num_sms} of {topology.push_sms} multiprocessors" if num_sms and topology.push_sms else ""
    return share, f"push {rates[0]:.3g}, dma {rates[1]:.3g} GB/s measured{budget}"


def form_over_windows(size: int, top_k: int, rates: tuple[float, float], all_to_all_gbps: float) -> tuple[str, str]:
    """Form "gathered" over windows or "routed" over collectives, by the time that a token's rows take, and the reason.

    A row goes to size - 1 ranks if gathered, at the `rates` of both planes together, and before the router has run; if
    routed to the ranks of its routes, top_k * (size - 1) / size on average, by an all-to-all, after it. What the router
    hides is not counted: it depends on the layer.

    2 ranks, top-1, planes of 1 and 3 GB/s, all-to-all of 1.5: routed 0.5 / 1.5 against gathered 1 / 4: gathered.
    """
    gathered, routed = 1 / sum(rates), top_k / size / all_to_all_gbps
    speeds = f"push {rates[0]:.3g}, dma {rates[1]:.3g}, all-to-all {all_to_all_gbps:.3g} GB/s measured"
    reason = f"top_k {top_k}, ep {size}, {speeds}: routed rows take {routed / gathered:.2f} of gathered rows' time"
    return ("gathered" if routed > gathered else "routed"), reason
