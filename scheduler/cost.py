"""What moving and computing costs, in seconds: one function prices a plan and simulates it.

Alpha-beta model: a collective over n workers on B local bytes takes
    alpha * (hops + 1) + bytes on the wire / bandwidth
(one alpha for starting it) with hops = n-1 for all-gather, reduce-scatter and all-to-all, 2(n-1) for
all-reduce (the ring's figures, as in Thakur, Rabenseifner and Gropp 2005), and (n-1)/n B, 2(n-1)/n B,
(n-1)/n^2 B bytes for the *whole* tensor's B.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshtape.runtime.overlap import BESIDE
from meshtape.runtime.shards import REPLICATE, Placement, is_partial


@dataclass(frozen=True)
class Link:
    """Calibrated constants of one kind of connection."""

    latency: float          # seconds per hop
    bandwidth: float        # bytes per second
    overlaps: bool = False  # whether its collectives run beside kernels, on a thread or stream of their own


@dataclass(frozen=True)
class Device:
    """Calibrated constants of one kind of worker."""

    flops: float            # multiply-add operations count two
    memory: float           # bytes per second
    call: float             # seconds per kernel call


LINKS = {
    "self": Link(0.0, 1e12),
    "threads": Link(30e-6, 6e9),
    "shm": Link(4e-6, 5e9),
    "tcp": Link(40e-6, 1e9, "tcp" in BESIDE),
    "nccl": Link(8e-6, 2e11, "nccl" in BESIDE),
    # Device arrays by way of the host: over PCIe, through one of the above, and back.
    "staged+shm": Link(40e-6, 3e9),
    "staged+threads": Link(60e-6, 3e9),
    "staged+tcp": Link(80e-6, 9e8),
}
# What of a bucket's time may be latency, where smaller buckets can start earlier; the size of a bucket where
# they cannot, in bytes.
LATENCY_SHARE = 0.1
WHOLE_BUCKET = 16 << 20
CPU = Device(flops=6e10, memory=8e9, call=2e-6)
GPU = Device(flops=4e13, memory=3e12, call=5e-6)


def move_bytes(before: Placement, after: Placement, whole: float, n: int) -> float:
    """Bytes that each worker puts on the wire when one placement changes on an axis of n workers.

    `whole` is the size in bytes of the tensor as if that axis were not there.
    """
    if n == 1 or before in (after, REPLICATE) or is_partial(after):
        return 0.0
    if is_partial(before):
        return whole * (n - 1) / n * (2 if after == REPLICATE else 1)
    return whole * (n - 1) / n if after == REPLICATE else whole * (n - 1) / (n * n)


def move_seconds(before: Placement, after: Placement, whole: float, n: int, link: Link) -> float:
    """Time of that change. Cutting a replicated tensor is local and costs nothing worth counting.

    Spreading a sharded tensor over Partial moves nothing either, but whoever reads it must reduce it whole:
    that is priced in, or plans would put off an all-gather for an all-reduce of twice the cost.
    """
    if n > 1 and is_partial(after) and not is_partial(before) and before != REPLICATE:
        return move_seconds(after, REPLICATE, whole, n, link)
    wire = move_bytes(before, after, whole, n)
    if n == 1 or before in (after, REPLICATE) or is_partial(after):
        return 0.0
    hops = 2 * (n - 1) if is_partial(before) and after == REPLICATE else n - 1
    return (hops + 1) * link.latency + wire / link.bandwidth


def bucket_bytes(link: Link, n: int) -> int:
    """How large a bucket of reductions over n workers should be.

    Where collectives run beside kernels, a bucket is sent as soon as its latency is a small share of an
    all-reduce's time: (2 (n-1) + 1) alpha = share * 2 (n-1)/n bytes / bandwidth.
    """
    if not link.overlaps or n == 1:
        return WHOLE_BUCKET
    hops = 2 * (n - 1)
    return round((hops + 1) * link.latency * link.bandwidth * n / (hops * LATENCY_SHARE))


def compute_seconds(flops: float, traffic: float, device: Device) -> float:
    """Roofline: the longer of arithmetic and memory traffic, plus one call."""
    return device.call + max(flops / device.flops, traffic / device.memory)
