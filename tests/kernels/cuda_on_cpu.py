"""CUDA C++ kernels without a GPU: g++ compiles them, and the threads of a block take turns (cuda_on_cpu.h)."""

import ctypes
import itertools
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from lamabench.kernels.nvrtc import _argument

HEADER = Path(__file__).with_suffix(".h")
TURNS = Path(__file__).with_suffix(".cpp")
COMPILER = shutil.which("g++")
DEFINITION = re.compile(r"^(?:template <[^>]*> )?__device__ [^;{]*\{", re.MULTILINE)
FAULTS = {1: "its threads wait in vain", 2: "it writes beyond its shared memory", 3: "its addresses are not aligned"}
KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(([^)]*)\)')


def without_ptx(source: str) -> str:
    """The source without the functions that have inline PTX: cuda_on_cpu.h has these."""
    pieces, place = [], 0
    for match in DEFINITION.finditer(source):
        depth = itertools.accumulate({"{": 1, "}": -1}.get(letter, 0) for letter in source[match.end() - 1 :])
        end = match.end() + next(index for index, open_ in enumerate(depth) if open_ == 0)
        if re.search(r"\basm\b", source[match.start() : end]):
            pieces.append(source[place : match.start()])
            place = end
    return "".join([*pieces, source[place:]])


@cache
def compiled(files: tuple[Path, ...], constants: tuple[tuple[str, int], ...], folder: Path) -> ctypes.CDLL:
    """A library of the files: `run_NAME(arguments, columns, rows, threads, shared, late, seed)` for every kernel."""
    source = without_ptx("".join(file.read_text() for file in files))
    header, turns = _compiled_once(folder)
    lines = [f'#include "{header}"', *(f"#define {name} {value}" for name, value in constants)]
    calls = []
    for name, parameters in KERNEL.findall(source):
        types = [re.sub(r"__restrict__|\w+$", "", one.strip()) for one in parameters.split(",")]
        values = ", ".join(f"*({kind}*)arguments[{place}]" for place, kind in enumerate(types))
        calls.append(
            f'extern "C" int run_{name}(void** arguments, int columns, int rows, int threads, int shared, int late, '
            f"unsigned seed) {{ return launch("
            f"[&] {{ {name}({values}); }}, columns, rows, threads, shared, late, seed); }}"
        )
    text = "\n".join([*lines, source, *calls])
    path = folder / f"{files[-1].stem}-{abs(hash(constants)):x}"
    path.with_suffix(".cpp").write_text(text)
    _compile("-shared", path.with_suffix(".cpp"), turns, "-o", path.with_suffix(".so"))
    return ctypes.CDLL(str(path.with_suffix(".so")))


@cache
def _compiled_once(folder: Path) -> tuple[Path, Path]:
    """What all kernels share, which takes most of a compilation: the header, with its compiled form beside it, and the
    object that runs their threads."""
    header, turns = folder / HEADER.name, folder / "turns.o"
    shutil.copy(HEADER, header)
    _compile("-x", "c++-header", header, "-o", f"{header}.gch")
    _compile("-c", TURNS, "-o", turns)
    return header, turns


def _compile(*words: str | Path) -> None:
    assert COMPILER is not None
    # What some systems fortify takes a jump to another stack for an overflow.
    command = [COMPILER, "-std=c++17", "-Og", "-w", "-fPIC", "-U_FORTIFY_SOURCE", *words]
    outcome = subprocess.run(command, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr[:4000]


class Kernel:
    """As `nvrtc.Kernel`, for tensors on the CPU. With `late`, copies to shared memory land as late as they may. `seed`
    decides the order of the threads."""

    late, seed = True, 0

    def __init__(self, library: ctypes.CDLL, name: str, shared: int) -> None:
        self.call, self.name, self.shared = getattr(library, f"run_{name}"), name, shared

    def blocks_at_once(self, threads: int) -> int:
        """Few, so that a block has several pieces of work."""
        return 3

    def __call__(self, grid: tuple[int, int], threads: int, *arguments: Any) -> None:
        values = [kind(value) for value, kind in map(_argument, arguments)]
        packed = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        fault = self.call(packed, *grid, threads, self.shared, int(self.late), self.seed)
        assert not fault, f"{self.name}: {FAULTS[fault]}"
