"""How networks are called, and the check of a field that says so."""

from ...kernels.errors import unknown
from ..device import COMPILE_OPTIONS, WHOLE_STEP

# How a network is called: directly, through torch.compile, with CUDA graphs too, or with CUDA graphs and autotuning.
COMPILE = ("eager", *COMPILE_OPTIONS)
BENCH_COMPILE = (*COMPILE, WHOLE_STEP)  # the last one is a mode of training only
TRAIN_COMPILE = ("auto", *BENCH_COMPILE)  # auto: whole-step on a GPU, eager elsewhere
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


def check_compile(name: str, value: str, choices: tuple[str, ...] = COMPILE) -> None:
    if value not in choices:
        raise unknown(name, value, choices)
