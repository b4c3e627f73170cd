"""Generated from chapters/02_pretraining.py by chapters/export.py; edit the chapter."""

__all__ = [
    "Hardware",
    "A100",
    "collective_seconds",
    "compute_seconds",
    "group_seconds",
    "step_seconds",
]


# ---------- chapters/02_pretraining.py · How long a step takes

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    "A GPU, its node and its network: data sheets, and shares of them that were measured. Bytes, seconds, FLOP/s."

    memory: int = 80 * 2**30  # A100 80GB (NVIDIA's data sheet)
    reserve: int = 6 * 2**30  # ours: 0.8 GiB that PyTorch cannot see, CUDA context, NCCL's buffers, fragmentation
    peak_flops: float = 312e12  # dense bfloat16 (data sheet)
    matmul: float = 0.859  # 267.9 TFLOP/s: best matrix product of mamf-finder (stas00/ml-engineering, accelerators)
    attention: float = 0.6  # FlashAttention-2 reaches 50 to 73 % of the A100's peak (arXiv 2307.08691, abstract)
    bandwidth: float = 2039e9  # HBM2e, SXM (data sheet)
    streaming: float = 0.85  # ours: share of it that element-wise kernels reach
    gpus_per_node: int = 8
    nvlink: float = 235e9  # each way, of 300 (data sheet); bus bandwidth of NCCL's all-reduce (ml-engineering, network)
    network: float = 25e9 * 0.78  # a GPU's 200 Gb/s (section 2.2.1); ours: the same share of it as of NVLink
    # NCCL's own model of a ring's latency (src/graph/tuning.cc): base, a hop on NVLink, a hop between nodes, and the
    # share of the bandwidth that is left, for the protocols Simple and LL128
    protocols: tuple = ((8.4e-6, 3.4e-6, 14.0e-6, 1.0), (14.0e-6, 1.9e-6, 4.0e-6, 0.92))


A100 = Hardware()


def collective_seconds(hardware: Hardware, kind: str, size: float, calls: float, ranks: int, per_node: int) -> float:
    """Time of `calls` collectives (all_gather, reduce_scatter, all_reduce) that together move whole tensors of `size`
    bytes round a ring of `ranks` GPUs, `per_node` of them in each node."""
    if ranks == 1 or not calls:
        return 0.0
    rounds = 2 if kind == "all_reduce" else 1
    nodes = -(-ranks // per_node)
    speed = hardware.nvlink if nodes == 1 else min(hardware.nvlink, per_node * hardware.network)
    return rounds * min(
        size * (ranks - 1) / ranks / (speed * share) + calls * (base + (ranks - nodes) * near + (nodes - 1) * far)
        for base, near, far, share in hardware.protocols
    )


def compute_seconds(hardware: Hardware, work: dict[str, float], fused: bool) -> float:
    """Time of a GPU's own work: matrix products, attention, and bytes moved by all other kernels.

    `fused`: torch.compile merges neighbouring kernels, and what is left reads and writes the operands of the products.
    """
    get = work.get
    moved = get("copies", 0) + get("operands" if fused else "elementwise", 0)
    flops = get("matmul", 0) / hardware.matmul + get("attention", 0) / 2 / hardware.attention  # causal: half of it
    return flops / hardware.peak_flops + moved / (hardware.bandwidth * hardware.streaming)


def group_seconds(hardware: Hardware, work: dict[str, float], group: str, gpus: int, tp: int) -> float:
    "Time of all collectives of the group 'dp' or 'tp' in some work."
    node = min(gpus, hardware.gpus_per_node)
    ranks, per_node = (tp, tp) if group == "tp" else (gpus // tp, max(1, node // tp))
    return sum(
        collective_seconds(
            hardware, kind, work.get(f"{group} {kind}", 0), work.get(f"{group} {kind} calls", 0), ranks, per_node
        )
        for kind in ("all_gather", "reduce_scatter", "all_reduce")
    )


def step_seconds(hardware: Hardware, work: dict, layers: int, passes: int, gpus: int, tp: int, fused: bool) -> dict:
    """Seconds of an optimiser step: in all, and of them 'compute', and exposed 'tp' and 'dp' communication.

    `work`: of the phases, 'rest' and one 'block'. FSDP's collectives run beside a block's other work; the rest shows.
    """
    total = {"compute": 0.0, "tp": 0.0, "dp": 0.0}
    for phase, parts in work.items():
        times = {"update": 1, "first": passes - 1, "last": 1}[phase.split()[0]]
        for part, count in (("rest", times), ("block", times * layers)):
            compute = compute_seconds(hardware, parts[part], fused and part == "block" and phase != "update")
            tp_time, dp_time = (group_seconds(hardware, parts[part], group, gpus, tp) for group in ("tp", "dp"))
            hidden = compute + tp_time if part == "block" and phase != "update" else 0
            total["compute"] += count * compute
            total["tp"] += count * tp_time
            total["dp"] += count * max(0.0, dp_time - hidden)
    return total | {"step": sum(total.values())}
