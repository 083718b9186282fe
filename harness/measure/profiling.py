"""The kernels of one call of a model, by class, so that their number and time can be named. No result is checked."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from ...models.registry import build, select_backends
from ..device import WHOLE_STEP, compiled, device_type, exact_float32, round_weights
from ..diffusion.objective import objective
from ..sections import ObjectiveConfig
from ..training.graph import WARM_UP, WholeStep
from .models import Line, fill_constants, forward, noisy, training_step
from .search import Point
from .timing import one_at_a_time, synchronize

# The first class counts whose expression is in the name of a kernel or of the operator that started it. Kernels of
# torch.compile are triton_poi (pointwise), triton_red and triton_per (reductions) and triton_tem (products).
CLASSES = (
    ("pointwise", r"triton_poi_"),
    ("reductions", r"triton_(red|per)_"),
    ("products", r"triton_tem_"),
    ("scan backward", r"scan\w*(backward|_bwd)|scan_segments"),
    ("scan forward", r"selective_scan|scan_forward|prepare_(tokens|weights)"),
    ("optimizer", r"multi_tensor_apply|fused_?adam|_foreach_"),
    ("other", r"lamabench::|fmha|flash|attend|attention|conv|implicit_gemm"),
    ("products", r"gemm|nvjet|cutlass|cublas|splitk|aten::(add|b|badd)?(mm|bmm)\b"),
    ("reductions", r"reduce|norm(?!al)|softmax|aten::(sum|mean|amax)\b"),
    ("pointwise", r"elementwise|memcpy|memset|copy|fill|cat|index|aten::(add|sub|mul|div|silu|gelu|neg|exp)_?\b"),
)
SHAPES = 3  # of a kernel that are listed, the most frequent first


def class_of(kernel: str, operator: str = "") -> str:
    """The class of a kernel that an operator of torch started."""
    text = f"{operator} {kernel}"
    return next((name for name, words in CLASSES if re.search(words, text, re.IGNORECASE)), "other")


def profiled(model: Any, point: Point, precision: str, backend: Any, goal: ObjectiveConfig, device: str) -> list[Line]:
    """The kernels of one call of a model, after warm-up calls: see `rows_of`. `point` says which call."""
    exact_float32()
    with one_at_a_time(device, lambda text: None):
        call = _call(model, point, precision, backend, goal, device)
        for _ in range(WARM_UP + 2):  # with `whole-step`, the last is a replay
            call()
        synchronize(device)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.startswith("cuda") else [])]
        with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
            call()
            synchronize(device)
        return rows_of(profile.events() or [], device)


def _call(
    model: Any, point: Point, precision: str, backend: Any, goal: ObjectiveConfig, device: str
) -> Callable[[], Any]:
    torch.manual_seed(0)
    with torch.device(device):
        net = build(model).to(device)
    fill_constants(net)
    select_backends(net, vars(backend), device_type(device))
    train = point.mode == "train"
    net.train(train)
    net.checkpointing = point.checkpointing
    if not train:
        round_weights(net, precision)
    how = (compiled(net, point.compile), net, device, precision)
    x = torch.randn(point.batch_size, model.in_channels, model.input_size, model.input_size, device=device)
    y, kind = torch.zeros(len(x), dtype=torch.int64, device=device), objective(goal)
    t = torch.rand(len(x), device=device) * kind.span
    if not train:
        return partial(forward(*how), x, t, y)
    step = training_step(*how, kind, WholeStep if point.compile == WHOLE_STEP else None)
    return lambda: step(noisy(x, t, y))


def rows_of(events: Iterable[Any], device: str) -> list[Line]:
    """One row for each kernel, and each operator of torch that starts it, from the events of torch's profiler: `class`,
    `kernel`, `operator` and `shapes` of its inputs (empty in a replayed CUDA graph, where only kernels are known),
    `count`, and `ms` in all. Sorted by class and time, the slowest first. On a CPU, an operator of torch stands for a
    kernel, with its time less that of the operators that it calls."""
    events = list(events)
    times: dict[tuple[str, str], list[float]] = {}
    shapes: dict[tuple[str, str], Counter[str]] = {}

    def note(kernel: str, operator: str, microseconds: float, inputs: Any) -> None:
        times.setdefault((kernel, operator), []).append(microseconds / 1e3)
        words = ", ".join("×".join(map(str, shape)) for shape in inputs or () if shape)
        shapes.setdefault((kernel, operator), Counter()).update([words] if words else [])

    if device.startswith("cuda"):
        known: Counter[str] = Counter()
        for event in events:
            # The runtime (cudaLaunchKernel) numbers its calls itself, perhaps as torch numbers its operators.
            for kernel in () if event.name.startswith("cu") else event.kernels:
                note(kernel.name, event.name, kernel.duration, event.input_shapes)
                known[kernel.name] += 1
        for event in events:
            if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False):
                known[event.name] -= 1
                if known[event.name] < 0:  # no operator started it, as in a CUDA graph
                    note(event.name, "", event.time_range.elapsed_us(), ())
    else:
        for event in events:
            if event.name.startswith("aten::"):
                note(event.name, "", event.self_cpu_time_total, event.input_shapes)
    rows = [
        {
            "class": class_of(*key),
            "kernel": key[0],
            "operator": key[1],
            "count": len(times[key]),
            "ms": sum(times[key]),
            "shapes": "; ".join(f"{words} ({count})" for words, count in shapes[key].most_common(SHAPES)),
        }
        for key in times
    ]
    return sorted(rows, key=lambda row: (row["class"], -row["ms"]))


def totals(rows: Iterable[Line]) -> list[Line]:
    """One row for each class: `count`, `ms` and `share` of all, the slowest first; and one for all."""
    classes: dict[str, list[Line]] = {}
    for row in rows:
        classes.setdefault(row["class"], []).append(row)
    every = {**classes, "all": [row for members in classes.values() for row in members]}
    whole = sum(row["ms"] for row in every["all"]) or 1.0
    sums = [(name, sum(row["count"] for row in part), sum(row["ms"] for row in part)) for name, part in every.items()]
    ordered = sorted(sums, key=lambda one: (one[0] == "all", -one[2]))
    return [{"class": name, "count": count, "ms": ms, "share": ms / whole} for name, count, ms in ordered]
