"""How many cycles a scheduler takes for one product of its matrix units (`mma.sync`): `python -m
lamabench.kernels.product_rate` prints it for the products that the kernels of this folder use, or could use."""

import sys
from pathlib import Path

import torch

from . import nvrtc

SOURCE = Path(__file__).with_suffix(".cu")
KINDS = ("m16n8k8 tf32", "m16n8k4 tf32", "m16n8k16 bf16", "m16n8k8 bf16")
SCHEDULERS = 4  # of a multiprocessor
CHAINS, LOOPS = 16, 512


def cycles(kind: str, warps: int) -> float:
    """Cycles for each product of a scheduler, where it has so many warps, from first to last, the median of the
    multiprocessors of the current GPU."""
    device, blocks = torch.cuda.current_device(), torch.cuda.get_device_properties().multi_processor_count
    threads = 32 * warps * SCHEDULERS
    constants = {"KIND": KINDS.index(kind), "WARPS": warps * SCHEDULERS, "CHAINS": CHAINS, "LOOPS": LOOPS}
    kernel = nvrtc.kernel((SOURCE,), "product_rate", tuple(constants.items()), 0, device)
    times = torch.empty(blocks, warps * SCHEDULERS, 2, dtype=torch.int64, device="cuda")
    sums = torch.empty(blocks, threads, device="cuda")
    for _ in range(2):  # the first call loads the code
        kernel((blocks, 1), threads, times, sums)
    spans = times[..., 1].amax(1) - times[..., 0].amin(1)
    return spans.double().median().item() / (CHAINS * LOOPS * warps)


def main() -> None:
    if reasons := nvrtc.reasons("cuda"):
        sys.exit(f"product_rate: {'; '.join(reasons)}")
    print(f"{torch.cuda.get_device_name()}: cycles of a scheduler for each mma.sync, with 1, 2 and 4 warps")
    for kind in KINDS:
        print(f"{kind:14s} " + " ".join(f"{cycles(kind, warps):7.2f}" for warps in (1, 2, 4)))


if __name__ == "__main__":
    main()
