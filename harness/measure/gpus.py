"""Peak rates of GPUs, by torch's name of the device, and how close measurements come to them.

Reports derive these from records, so there is no torch here, and a corrected peak corrects old records too.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple


class GPU(NamedTuple):
    """Dense peaks of matrix products in 1e12 operations a second, and the clock in GHz, None if it is not known."""

    name: str  # a regular expression for torch's name of the device
    bfloat16: float
    float32: float
    clock: float | None


# Source: NVIDIA's data sheets, halved where they include sparsity. Boost clocks, but clocks under load
# for H100 SXM and H200.
GPUS = (
    #   name                                             bf16   fp32   GHz
    GPU(r"A100(-SXM4-..GB|-PCIE-40GB| 80GB PCIe)$",     312.0,  19.5, 1.410),
    GPU(r"H100 PCIe$",                                  756.0,  51.0, 1.755),
    GPU(r"H100 NVL$",                                   835.0,  60.0, 1.785),
    GPU(r"H100 80GB HBM3$",                             989.0,  67.0, 1.755),
    GPU(r"H200 NVL$",                                   835.0,  60.0, 1.785),
    GPU(r"H200$",                                       989.0,  67.0, 1.755),
    GPU(r"B200$",                                      2250.0,  75.0, None),
    GPU(r"L40S$",                                       362.0,  91.6, 2.520),
    GPU(r"NVIDIA L4$",                                  121.0,  30.3, 2.040),
    GPU(r"RTX 4090$",                                   165.2,  82.6, 2.520),
)  # fmt: skip


def gpu(name: str) -> GPU | None:
    """The row of a device by torch's name. None if its peaks are not known, for example for a slice of a GPU."""
    return next((row for row in GPUS if re.search(row.name, name)), None)


def peak_flops(device_name: str, precision: str) -> float | None:
    """The dense peak of matrix products in FLOP/s. None if it is not known."""
    row = gpu(device_name)
    return None if row is None else 1e12 * getattr(row, precision)


def mfu(macs: int, mode: str, images_per_s: float, device_name: str, precision: str) -> float | None:
    """Model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B): FLOPs a second over the device's peak. A
    forward pass has two FLOPs per multiply-add, training three times as many. None if the peak is not known."""
    peak = peak_flops(device_name, precision)
    return None if peak is None else 2 * macs * {"forward": 1, "train": 3}[mode] * images_per_s / peak


def exponentials_per_s(device_name: str, processors: int) -> float | None:
    """Exponentials a second of the special-function units: 16 per clock and multiprocessor. None if the clock is not
    known."""
    row = gpu(device_name)
    return None if row is None or row.clock is None else 16e9 * row.clock * processors


def floors(row: Mapping[str, Any]) -> dict[str, Any]:
    """Of a record of an operator: the least time of the call in ms by each limit of the machine, null if the limit is
    not known; `floor_ms`, the largest of them; `floor`, its name; and `times_floor`, the median time over it. Empty if
    the record does not say what the call needs."""
    if not row.get("p50_ms") or row.get("call_bytes") is None:
        return {}
    limits = [(name, row[f"call_{name}"], row.get(f"{name}_per_s")) for name in ("bytes", "exponentials", "flops")]
    least = {name: 1e3 * need / rate if rate else None for name, need, rate in limits}
    known = {name: value for name, value in least.items() if value is not None}
    largest = max(known, key=lambda name: known[name])
    derived = {"floor": largest, "floor_ms": known[largest], "times_floor": row["p50_ms"] / known[largest]}
    return {f"{name}_floor_ms": value for name, value in least.items()} | derived


def derived(row: Mapping[str, Any]) -> dict[str, Any]:
    """What follows from a record of a speed, and so is not in it: `mfu` of a model, `floors` of an operator. Records of
    earlier versions have it, and keep it where it cannot be derived."""
    if row["kind"] == "operator_speed":
        return floors(row)
    if row["kind"] != "speed" or not row.get("images_per_s") or not row.get("macs"):
        return {}
    device = (row.get("provenance") or {}).get("device") or ""
    speed = row["images_per_s"] / (row.get("processes") or 1)
    used = mfu(row["macs"], row["mode"], speed, device, row["precision"])
    return {} if used is None else {"mfu": used}
