"""The clock and the power of a GPU during a measurement, and why its clock was held down, as the driver says (NVML)."""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from statistics import median
from typing import Any, NamedTuple

import torch

LIBRARY = "libnvidia-ml.so.1"  # comes with the driver
MULTIPROCESSORS = 1  # the clock of NVML that is meant
# The bits of NVML's reasons for a low clock. The lowest bit is left out: nothing was running.
REASONS = {
    0x2: "application clocks", 0x4: "power cap", 0x8: "hardware slowdown", 0x10: "sync boost", 0x20: "heat",
    0x40: "heat (hardware)", 0x80: "power brake", 0x100: "display clocks",
}  # fmt: skip


class Reading(NamedTuple):
    """The state of a GPU at one moment, None where the driver does not say."""

    clock_mhz: int | None = None
    milliwatts: int | None = None
    reasons: int | None = None


def reader(device: str) -> Callable[[], Reading]:
    """A function that reads the state of a device. It takes well under a millisecond and never fails: on a CPU, and
    without NVIDIA's library, every reading is empty."""
    if not device.startswith("cuda"):
        return Reading
    library = _library()
    handle = ctypes.c_void_p()
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # of a slice of a GPU, NVML does not know it
    if library is None or library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)):
        return Reading

    def ask(name: str, kind: Any, *arguments: int) -> int | None:
        value, function = kind(), getattr(library, name, None)
        if function is None or function(handle, *arguments, ctypes.byref(value)):
            return None
        return value.value

    def read() -> Reading:
        clock = ask("nvmlDeviceGetClockInfo", ctypes.c_uint, MULTIPROCESSORS)
        power = ask("nvmlDeviceGetPowerUsage", ctypes.c_uint)
        reasons = ask("nvmlDeviceGetCurrentClocksEventReasons", ctypes.c_ulonglong)
        if reasons is None:  # its name in older drivers
            reasons = ask("nvmlDeviceGetCurrentClocksThrottleReasons", ctypes.c_ulonglong)
        return Reading(clock, power, reasons)

    return read


@cache
def _library() -> Any:
    """NVML, ready to be asked; None where it is not installed or finds no driver."""
    try:
        library = ctypes.CDLL(LIBRARY)
        return None if library.nvmlInit_v2() else library
    except (OSError, AttributeError):
        return None


def conditions(readings: Sequence[Reading]) -> dict[str, Any]:
    """Readings during a measurement as fields of a record: the median clock and power, null if they are not known, and
    every reason for a low clock that one of the readings had, empty if none had one."""
    clocks = [reading.clock_mhz for reading in readings if reading.clock_mhz is not None]
    powers = [reading.milliwatts / 1e3 for reading in readings if reading.milliwatts is not None]
    masks = [reading.reasons for reading in readings if reading.reasons is not None]
    words = [text for bit, text in REASONS.items() if any(mask & bit for mask in masks)]
    return {
        "clock_mhz": median(clocks) if clocks else None,
        "power_w": median(powers) if powers else None,
        "throttled": ", ".join(words) if masks else None,
    }
