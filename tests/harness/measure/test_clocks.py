"""The clock and power of a GPU, read from a library that stands in for NVIDIA's."""

import ctypes
import shutil
import subprocess
import types

import pytest
import torch
from lamabench.harness.measure import clocks, operators, timing
from lamabench.harness.measure.clocks import Reading

COMPILER = shutil.which("gcc")
# Each call of a function answers with the next value, as often as there are values, and then refuses.
SOURCE = """
#include <string.h>
static int clocks, powers, masks, device;
int nvmlInit_v2(void) { return INIT; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    *handle = &device;
    return strcmp(uuid, "GPU-12ab") != 0;
}
int nvmlDeviceGetClockInfo(void *handle, unsigned kind, unsigned *mhz) {
    const unsigned values[] = {1980, 1200, 1755};
    if (handle != &device || kind != 1 || clocks == 3) return 1;
    *mhz = values[clocks++];
    return 0;
}
int nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatts) {
    const unsigned values[] = {650500, 699000};
    if (handle != &device || powers == 2) return 1;
    *milliwatts = values[powers++];
    return 0;
}
int REASONS(void *handle, unsigned long long *mask) {
    const unsigned long long values[] = {1, 1 | 4, 64};
    if (handle != &device || masks == 3) return 1;
    *mask = values[masks++];
    return 0;
}
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A function that builds the library and puts it in the place of NVML."""
    if COMPILER is None:
        pytest.skip("needs gcc")
    devices = types.SimpleNamespace(get_device_properties=lambda device: types.SimpleNamespace(uuid=device[5:]))
    monkeypatch.setattr(clocks.torch, "cuda", devices)
    clocks._library.cache_clear()

    def build(reasons="nvmlDeviceGetCurrentClocksEventReasons", init=0):
        (tmp_path / "nvml.c").write_text(SOURCE)
        target = tmp_path / "libfake.so"
        names = [f"-DREASONS={reasons}", f"-DINIT={init}"]
        subprocess.run([COMPILER, "-shared", "-fPIC", *names, tmp_path / "nvml.c", "-o", target], check=True)
        monkeypatch.setattr(clocks, "LIBRARY", str(target))

    yield build
    clocks._library.cache_clear()


@pytest.mark.parametrize(
    "name", ["nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"]
)
def test_the_driver_is_asked_for_the_device_that_is_measured(name, library):
    library(name)
    assert clocks.reader("cuda:5e")() == Reading()  # another device, as a slice of a GPU is
    read = clocks.reader("cuda:12ab")
    first, second, third, fourth = read(), read(), read(), read()
    assert first == Reading(1980, 650500, 1) and second == Reading(1200, 699000, 5)
    assert third == Reading(1755, None, 64) and fourth == Reading()  # an answer that is refused is no answer
    assert clocks.conditions([first, second, third, fourth]) == {
        "clock_mhz": 1755, "power_w": 674.75, "throttled": "power cap, heat (hardware)",
    }  # fmt: skip
    assert clocks.conditions([first])["throttled"] == ""  # known, and for no reason


@pytest.mark.parametrize("what", ["missing", "no library", "no driver"])
def test_without_the_library_every_reading_is_empty(what, library, tmp_path, monkeypatch):
    library(init=9 if what == "no driver" else 0)
    if what == "missing":
        monkeypatch.setattr(clocks, "LIBRARY", "libnowhere.so.1")
    if what == "no library":
        (tmp_path / "text.so").write_text("no code")
        monkeypatch.setattr(clocks, "LIBRARY", str(tmp_path / "text.so"))
    read = clocks.reader("cuda:12ab")
    assert read() == Reading()
    assert clocks.conditions([read(), read()]) == {"clock_mhz": None, "power_w": None, "throttled": None}


def test_one_reading_for_each_measured_call(monkeypatch):
    counts = iter(range(100, 200))
    monkeypatch.setattr(timing, "reader", lambda device: lambda: Reading(next(counts), 1000, 0))
    row = timing.time_calls(lambda: None, "cpu", 3, 5, 10.0)
    assert (row["repeats"], row["clock_mhz"], row["power_w"], row["throttled"]) == (5, 102, 1.0, "")


@pytest.mark.gpu
def test_a_busy_gpu_has_a_clock_and_a_power():
    library = ctypes.CDLL(clocks.LIBRARY)
    assert library.nvmlInit_v2() == 0
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    row = operators.time_queued(lambda: a @ a, "cuda", 20)
    assert 500 < row["clock_mhz"] < 3000 and 100 < row["power_w"] < 1500 and row["throttled"] is not None
