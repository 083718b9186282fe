"""Speed of the operators at the shapes of a model, against each other and against the machine's limits.

A model's forward pass says with what an operator is called. Every usable backend is then held against the reference in
float64 at one image, and timed at the whole batch only where rule 4 of DESIGN.md holds.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels import OPERATORS, attention, depthwise_conv, selective_scan, window_attention
from ...kernels.selective_scan import backend_mamba_ssm
from ...models.registry import Backbone, build, select_backends
from ..config import Config
from ..device import device_name, exact_float32, pick_device
from .check import WrongOutput, relative_rms
from .gpus import exponentials_per_s, peak_flops
from .mamba_scan import ScanAlone
from .models import Row, fill_constants, no_number, release
from .operator_check import Call, Held, argument_names, as_in_the_model, calls_of, fresh, or_null
from .search import FINISHED
from .timing import LEAST, one_at_a_time, quantiles, time_calls

# Relative errors that are allowed on top of twice those of plain torch in the same precision: less than in a model.
FLOOR = {"float32": 1e-5, "bfloat16": 1e-4}
PASSES = {"forward": "forward", "train": "forward+backward"}
ALONE = "mamba_ssm (scan alone)"
ALONE_LIMIT = 2e-2  # it rounds step sizes and outputs to bfloat16: a yardstick of time, not of accuracy
OVERWRITE_S = 5e-4  # about what a GPU takes to overwrite 2 GiB (an H100: 0.7 ms)


def pairs_of(net: Backbone, batch: int, precision: str, device: str) -> list[tuple[Call, Call]]:
    """Every different call in a forward pass, for one image and for `batch` of them."""
    one_image = calls_of(net, 1, precision, device)
    # Arguments need gradients where those of one image do; a whole batch with its graph might not fit.
    with torch.no_grad():
        whole_batch = calls_of(net, batch, precision, device)
    pairs = zip(one_image, whole_batch, strict=True)
    return [(one, many._replace(wanted=one.wanted)) for one, many in pairs if one.args]


def work(call: Call) -> tuple[int, int]:
    """Multiply-adds of the matrix products of a call, and its exponentials (one a decay and one a softplus; one a
    score; one a SiLU)."""
    given = dict(zip(argument_names(call.operator), call.args, strict=True))
    if call.operator == "selective_scan":
        batch, length, channels = given["x"].shape
        directions, rank, states = *given["dt"].shape[2:], given["b"].shape[3]
        size = batch * length * directions * channels
        return selective_scan.macs(batch, length, directions, channels, rank), (states + 1) * size
    if call.operator == "window_attention":
        batch, height, width, three = given["qkv"].shape
        window, heads = given["window"], given["heads"]
        macs = window_attention.macs(batch, height, width, three // 3, window)
        return macs, batch * height * width * window**2 * heads
    if call.operator == "attention":
        batch, heads, queries, head_dim = given["q"].shape
        keys = given["k"].shape[2]
        return attention.macs(batch, heads, queries, keys, head_dim), batch * heads * queries * keys
    if call.operator == "depthwise_conv":
        batch, height, width, channels = given["x"].shape
        macs = depthwise_conv.macs(batch, height, width, channels, given["weight"].shape[-1])
        return macs, batch * height * width * channels
    if call.operator == "gated_norm":
        return 0, given["y"].numel()
    raise NotImplementedError(f"say in measure/operators.py what {call.operator} has to compute")


def limits(device: str, precision: str) -> dict[str, float | None]:
    """What the machine gives: bytes a second of a large copy, measured now; exponentials and FLOPs a second, known of
    its kind or null."""
    source = torch.empty(2**28 if device.startswith("cuda") else 2**22, device=device)  # 1 GiB, far more than a cache
    target = torch.empty_like(source)
    timed = time_queued(partial(target.copy_, source), device, 10)
    cuda, name = device.startswith("cuda"), device_name(device)
    return {
        "bytes_per_s": 2 * source.numel() * source.element_size() / (timed["p50_ms"] / 1e3),
        "exponentials_per_s": exponentials_per_s(name) if cuda else None,
        "flops_per_s": peak_flops(name, precision),
    }


def floors(call: Call, result: int, backward: bool, machine: dict[str, float | None]) -> dict[str, float | None]:
    """The least time of a call in ms by each limit of the machine (see `limits`), null where that is not known.

    Bytes: inputs and output (`result` bytes) once; backward inputs and the output's gradient once more, and every
    gradient. Products: two FLOPs a multiply-add, three times that with the backward pass. Exponentials: once in each
    pass.
    """
    inputs = sum(arg.numel() * arg.element_size() for arg in call.args if isinstance(arg, Tensor))
    gradients = sum(
        arg.numel() * arg.element_size() for arg, wanted in zip(call.args, call.wanted, strict=True) if wanted
    )
    macs, exponentials = work(call)
    needs = {
        "bytes": inputs + result + ((inputs + result + gradients) if backward else 0),
        "exponentials": exponentials * (2 if backward else 1),
        "flops": 2 * macs * (3 if backward else 1),
    }
    return {
        f"{name}_floor_ms": None if (rate := machine[f"{name}_per_s"]) is None else 1e3 * need / rate
        for name, need in needs.items()
    }


def time_queued(step: Callable[[], Any], device: str, repeats: int, seconds: float = 1.0) -> dict[str, Any]:
    """Time that the device itself takes for a call, cold: its caches hold other data, and the host has queued the call
    while the device was busy with that, so that its own time does not count. On a CPU, the host's time. Of at most
    `repeats` calls, as many as fit into `seconds` and at least 5."""
    if not device.startswith("cuda"):
        return time_calls(step, device, 1, repeats, seconds)
    other = torch.empty(2**31, dtype=torch.int8, device=device)  # more than the caches hold
    for _ in range(3):
        step()
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    step()
    overwrites = 1 + int(2 * (time.perf_counter() - began) / OVERWRITE_S)  # twice as long as the host takes
    times, started = [], time.perf_counter()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    while len(times) < repeats and (len(times) < LEAST or time.perf_counter() - started < seconds):
        for _ in range(overwrites):
            other.zero_()
        start.record()
        step()
        end.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(end))
    return {**quantiles(times), "repeats": len(times)}


def bench_kernels(config: Config, say: Callable[[str], None] = lambda text: None) -> Iterator[Row]:
    """A row for every operator of the model, shape, usable backend and pass: the fields of `bench` records.

    At the first of `bench.batch_size` (`auto`: 64), in `bench.precision`, for `bench.modes`: the forward pass, or
    forward and backward with every gradient that training needs. The reference is what the others are held against
    and is not timed. Times are the device's (see `time_queued`), in ms; `floor_ms` is the largest of three floors (see
    `floors`), `floor` its name. `state` "wrong" stands where a backend does not pass its check, "oom" or "failed"
    where it cannot run; such rows have no time, and after the last one WrongOutput is raised where any was wrong or
    failed. On a GPU that another process measures on, waits until that has ended.
    """
    exact_float32()
    device, settings = pick_device(config.run.device), config.bench
    batch = 64 if settings.batch_size == "auto" else settings.batch_size[0]
    with one_at_a_time(device, say):
        torch.manual_seed(0)
        with torch.device(device):
            net = build(config.model).to(device)
        fill_constants(net)
        select_backends(net, vars(config.backend), device.split(":")[0])
        calls = pairs_of(net.train(), batch, settings.precision, device)
        del net
        release(device)
        for name in dict.fromkeys(one.operator for one, _ in calls):
            say(f"{name} left out: {OPERATORS[name].why_not(device.split(':')[0]) or 'none'}")
        bad, subject = [], Subject(config, device, batch, limits(device, settings.precision))
        for one, many in calls:
            for row in subject.rows(one, many):
                told = f"{row['p50_ms']:.3f} ms" if row["state"] == "done" else f"{row['state']}: {row['error']}"
                text = f"{row['operator']}={row['backend'][row['operator']]}, {row['shape']}, {row['pass']}: {told}"
                say(text)
                bad += [text] if row["state"] not in FINISHED else []
                yield row
    if bad:
        raise WrongOutput(f"{len(bad)} measurements without a number, the first: {bad[0]}")


class Subject:
    """What all calls are measured with."""

    def __init__(self, config: Config, device: str, batch: int, machine: dict[str, float | None]) -> None:
        self.settings, self.device, self.batch = config.bench, device, batch
        self.input_size, self.machine = config.model.input_size, machine

    def rows(self, one: Call, many: Call) -> Iterator[Row]:
        """Every backend and pass of a call: checked with one image, timed with many."""
        operator, device_type = OPERATORS[one.operator], self.device.split(":")[0]
        held = Held(one, self.settings.precision, self.device)
        # In the type of the first argument: plain torch may give another (CUDA's autocast norms in float32).
        result = held.plain[0].numel() * one.args[0].element_size() * self.batch
        for backend in operator.backends.values():
            if backend.name != "reference" and not backend.reasons(device_type):
                run = as_in_the_model(backend.run, self.settings.precision, self.device)
                compare, steps = partial(held.compare, run, FLOOR[self.settings.precision]), partial(_steps, run, many)
                yield from self.passes(backend.name, compare, steps, many, result)
        if operator.name == "selective_scan" and device_type == "cuda" and backend_mamba_ssm.INSTALLED:
            alone = partial(_compare_alone, one, held.exact)
            yield from self.passes(ALONE, alone, partial(_steps_alone, many), many, result)

    def passes(
        self, backend: str, compare: Callable[[], Row], steps: Callable[[], dict], call: Call, result: int
    ) -> Iterator[Row]:
        try:
            checked = compare()
            release(self.device)
            prepared = steps() if checked["state"] == "done" else {}
        except Exception as error:
            checked, prepared = no_number(error), {}
        for mode in self.settings.modes:
            row: Row = {
                "operator": call.operator,
                "shape": call.shape(self.batch),
                "batch_size": self.batch,
                "input_size": self.input_size,
                "precision": self.settings.precision,
                "threads": torch.get_num_threads(),
                "backend": {call.operator: backend},
                "pass": PASSES[mode],
                **checked,
            }
            if prepared:
                try:
                    timed = time_queued(prepared[PASSES[mode]], self.device, self.settings.repeats)
                    row |= {**timed, **self.against_floors(call, result, mode == "train", timed["p50_ms"])}
                except Exception as error:
                    row |= no_number(error)
            release(self.device)
            yield row

    def against_floors(self, call: Call, result: int, backward: bool, milliseconds: float) -> Row:
        """Every limit and floor, the largest floor, and the time over it."""
        found = floors(call, result, backward, self.machine)
        known = {name.removesuffix("_floor_ms"): value for name, value in found.items() if value is not None}
        largest = max(known, key=lambda name: known[name])
        more = {"floor": largest, "floor_ms": known[largest], "times_floor": milliseconds / known[largest]}
        return {**self.machine, **found, **more}


def _compare_alone(one: Call, exact: list[Tensor]) -> Row:
    error = relative_rms([v.double() for v in ScanAlone(*one.args).output_and_gradient()], exact[:2])
    row: Row = {"state": "done", "relative_error": or_null(error), "error_of": "output and x"}
    if not error <= ALONE_LIMIT:
        row |= {"state": "wrong", "error": f"output and gradient of x off by {error:.1e}, limit {ALONE_LIMIT:.0e}"}
    return row


def _steps(run: Callable[..., Tensor], call: Call) -> dict[str, Callable[[], Any]]:
    args, leaves = fresh(call)
    with torch.no_grad():
        weights = torch.randn_like(run(*args))

    def both() -> None:
        torch.autograd.grad(run(*args), leaves, weights)

    return {"forward": torch.no_grad()(partial(run, *args)), "forward+backward": both}


def _steps_alone(call: Call) -> dict[str, Callable[[], Any]]:
    scan = ScanAlone(*call.args)
    return {"forward": scan.forward, "forward+backward": scan.both}
