"""CUDA C++ compiled at run time by NVRTC, which comes with torch: no compiler on the user's machine."""

import ctypes
import hashlib
import importlib.util
import os
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = "LAMABENCH_NVRTC_CACHE_DIR"  # the environment's name of the folder of compiled kernels
LEAST_CAPABILITY = (8, 0)  # cp.async and bfloat16 products on the matrix units


# The order matters: looking up a submodule of a missing package raises an error.
INSTALLED = importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None


def reasons(device_type: str) -> list[str]:
    """Every reason why these kernels cannot run on a kind of device; empty where they can."""
    if device_type != "cuda":
        return ["needs an NVIDIA GPU"]
    refusals = []
    if torch.version.hip:
        refusals.append("does not run on AMD GPUs")
    if not INSTALLED:
        refusals.append("the package cuda-bindings is not installed")
    if not torch.cuda.is_available():
        refusals.append("torch sees no GPU")
    elif not torch.version.hip and torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        refusals.append(
            f"needs compute capability 8.0 or newer, not {'.'.join(map(str, torch.cuda.get_device_capability()))}"
        )
    return refusals


def cache_folder() -> Path:
    """The folder in which processes share compiled kernels: that of LAMABENCH_NVRTC_CACHE_DIR, or the user's."""
    return Path(folder) if (folder := os.environ.get(FOLDER)) else user_cache()


def user_cache() -> Path:
    """The user's folder of caches: lamabench below XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lamabench"


@cache
def compile_source(files: tuple[Path, ...], constants: tuple[tuple[str, int], ...], capability: str) -> bytes:
    """The machine code ("cubin") of some source files, joined, with `#define`s, for a compute capability like "90".

    Needs no GPU. The cache serves a source that the same compiler has compiled before. Raises RuntimeError with the
    compiler's log.
    """
    nvrtc = import_module("cuda.bindings.nvrtc")
    source = "".join(f"#define {name} {value}\n" for name, value in constants)
    source += "".join(f'#line 1 "{file.name}"\n{file.read_text(encoding="utf-8")}' for file in files)
    options = [f"--gpu-architecture=sm_{capability}", "--std=c++17"]
    version = _ok(nvrtc.nvrtcVersion())[1:]
    key = hashlib.sha256(repr((source, options, version)).encode()).hexdigest()
    cached = cache_folder() / f"{key}.cubin"
    with suppress(OSError):
        return cached.read_bytes()
    code = _compile(source, files[-1].name, options)
    with suppress(OSError):  # a cache that cannot be written only costs time
        cached.parent.mkdir(parents=True, exist_ok=True)
        temporary = cached.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(code)
        temporary.replace(cached)
    return code


def _compile(source: str, name: str, options: list[str]) -> bytes:
    nvrtc = import_module("cuda.bindings.nvrtc")
    program = _ok(nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], []))[1]
    status = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])[0]
    if int(status):
        log = bytes(_ok(nvrtc.nvrtcGetProgramLogSize(program))[1])
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"NVRTC refused {name}:\n{log.decode(errors='replace')}")
    code = bytes(_ok(nvrtc.nvrtcGetCUBINSize(program))[1])
    _ok(nvrtc.nvrtcGetCUBIN(program, code))
    nvrtc.nvrtcDestroyProgram(program)
    return code


def _ok(result: tuple) -> tuple:
    if int(result[0]):
        raise RuntimeError(f"CUDA: {result[0]!r}")
    return result


def _ensure_context(driver: Any) -> None:
    """Give this thread the context of the current device. A thread that has not called CUDA yet has none; autograd's
    threads may be such threads."""
    if not int(_ok(driver.cuCtxGetCurrent())[1]):
        device = _ok(driver.cuDeviceGet(torch.cuda.current_device()))[1]
        _ok(driver.cuCtxSetCurrent(_ok(driver.cuDevicePrimaryCtxRetain(device))[1]))


class Kernel:
    """A function of compiled code, loaded on one device: `kernel(grid, threads_of_a_block, *arguments)`. Nothing runs
    if the grid has no block, which CUDA would refuse.

    Arguments are tensors (their address), None (a null pointer), int (32 bits) or `ctypes` values.
    """

    def __init__(self, code: bytes, name: str, shared: int) -> None:
        self.driver = driver = import_module("cuda.bindings.driver")
        _ensure_context(driver)
        self.module = _ok(driver.cuModuleLoadData(code))[1]
        self.function = _ok(driver.cuModuleGetFunction(self.module, name.encode()))[1]
        self.shared = shared
        if shared > 48 * 1024:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _ok(driver.cuFuncSetAttribute(self.function, attribute, shared))

    def blocks_at_once(self, threads: int) -> int:
        """How many blocks of that many threads the whole device runs at a time."""
        blocks = _ok(self.driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self.function, threads, self.shared))[1]
        return max(1, blocks) * torch.cuda.get_device_properties().multi_processor_count

    def __call__(self, grid: tuple[int, int], threads: int, *arguments: Any) -> None:
        if 0 in grid:
            return
        _ensure_context(self.driver)
        values, types = zip(*(_argument(v) for v in arguments), strict=True)
        stream = torch.cuda.current_stream().cuda_stream
        _ok(
            self.driver.cuLaunchKernel(
                self.function, *grid, 1, threads, 1, 1, self.shared, stream, (values, types), 0
            )
        )  # fmt: skip


def _argument(v: Any) -> tuple[int, type]:
    if v is None or isinstance(v, Tensor):
        return (0 if v is None else v.data_ptr()), ctypes.c_void_p
    return (v, ctypes.c_int) if isinstance(v, int) else (v.value, type(v))


@cache
def kernel(
    files: tuple[Path, ...], name: str, constants: tuple[tuple[str, int], ...], shared: int, device: int
) -> Kernel:
    """A kernel on the current device, whose index is `device`. It is compiled and loaded once a process."""
    major, minor = torch.cuda.get_device_capability(device)
    return Kernel(compile_source(files, constants, f"{major}{minor}"), name, shared)
