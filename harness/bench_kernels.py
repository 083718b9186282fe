"""Speed of the operators at the shapes of a model, against each other and against the machine's limits.

A model's forward pass says with what an operator is called. Every usable backend is then held against the reference in
float64 at one image, and timed at the whole batch only where rule 4 of DESIGN.md holds.
"""

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import attention, depthwise_conv, selective_scan, window_attention
from ..kernels.backend import Operator
from ..kernels.selective_scan import mamba_ssm
from .backbones import OPERATORS, Backbone, build, select_backends
from .bench import Row, fill_constants, release
from .bench_check import WrongOutput, relative_rms
from .bench_plan import FINISHED
from .config import Config
from .mamba_scan import ScanAlone, output_weights
from .provenance import device_name, pick_device
from .timing import LEAST, exponentials_per_s, first_line, out_of_memory, peak_flops, quantiles, time_calls
from .train import autocast

PASSES = {"forward": "forward", "train": "forward+backward"}
# Relative errors that are allowed on top of twice those of plain torch in the same precision.
FLOOR = {"float32": 1e-5, "bfloat16": 1e-4}
ALONE = "mamba_ssm (scan alone)"
ALONE_LIMIT = 2e-2  # it rounds step sizes and outputs to bfloat16: a yardstick of time, not of accuracy
OVERWRITE_S = 5e-4  # about what a GPU takes to overwrite 2 GiB (an H100: 0.7 ms)


class Call(NamedTuple):
    """One call of an operator's backend: its arguments, and which of them have a gradient."""

    operator: str
    args: tuple[Any, ...]
    wanted: tuple[bool, ...]

    @property
    def signature(self) -> tuple[Any, ...]:
        """What tells calls apart: the shape and type of every tensor, and every number."""
        return tuple((tuple(arg.shape), arg.dtype) if isinstance(arg, Tensor) else arg for arg in self.args)

    def shape(self, batch: int) -> str:
        """For people: the tensors that grow with the batch and have a gradient, and the numbers."""
        words = []
        for name, arg, wanted in zip(_names(self.operator), self.args, self.wanted, strict=True):
            if isinstance(arg, Tensor) and wanted and arg.shape[0] == batch:
                words.append(f"{name} {'×'.join(map(str, arg.shape))}")
            elif isinstance(arg, int):
                words.append(f"{name} {arg}")
        return ", ".join(words)


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """The calls that backends get while this lasts; those like an earlier one have lost their arguments."""
    calls: list[Call] = []
    seen: set[Any] = set()
    resolve = Operator.resolve

    def watched(self: Operator, request: str, device_type: str) -> Any:
        backend = resolve(self, request, device_type)

        def run(*args: Any) -> Tensor:
            wanted = tuple(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
            call = Call(self.name, tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args), wanted)
            key = (self.name, call.signature)
            calls.append(call._replace(args=()) if key in seen else call)
            seen.add(key)
            return backend.run(*args)

        return replace(backend, run=run)

    Operator.resolve = watched  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        Operator.resolve = resolve  # type: ignore[method-assign]


def calls_of(net: Backbone, batch: int, precision: str, device: str) -> list[tuple[Call, Call]]:
    """Every different call in a forward pass, for one image and for `batch` of them."""
    made = []
    for size in (1, batch):
        config = net.config
        x = torch.randn(size, config.in_channels, config.input_size, config.input_size, device=device)
        t = torch.randint(0, 1000, (size,), device=device)
        # Arguments need gradients where those of one image do; a whole batch with its graph might not fit.
        with torch.set_grad_enabled(size == 1), autocast(device, precision), recorded() as calls:
            net(x, t, torch.zeros_like(t))
        made.append(calls)
    return [(one, many._replace(wanted=one.wanted)) for one, many in zip(*made, strict=True) if one.args]


def work(call: Call) -> tuple[int, int]:
    """Multiply-adds of the matrix products of a call, and its exponentials (one a decay and one a softplus; one a
    score; one a SiLU)."""
    given = dict(zip(_names(call.operator), call.args, strict=True))
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
    raise NotImplementedError(f"say in bench_kernels.py what {call.operator} has to compute")


def _names(operator: str) -> list[str]:
    return list(inspect.signature(OPERATORS[operator].backends["reference"].run).parameters)


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


def results(run: Callable[..., Tensor], call: Call, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The output and every wanted gradient, of the output times fixed random weights; `dtype` for all float tensors."""
    args, leaves = _fresh(call, dtype)
    out = run(*args)
    weights = output_weights(out.shape).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def _fresh(call: Call, dtype: torch.dtype | None = None) -> tuple[list[Any], list[Tensor]]:
    """The arguments of a call, and those among them that have a gradient."""
    args, leaves = list(call.args), []
    for place, (arg, wanted) in enumerate(zip(call.args, call.wanted, strict=True)):
        if isinstance(arg, Tensor) and arg.is_floating_point():
            args[place] = arg.to(dtype or arg.dtype).detach().requires_grad_(wanted)
            leaves += [args[place]] if wanted else []
    return args, leaves


def bench_kernels(config: Config, say: Callable[[str], None] = lambda text: None) -> Iterator[Row]:
    """A row for every operator of the model, shape, usable backend and pass: the fields of `bench` records.

    At the first of `bench.batch_size` (`auto`: 64), in `bench.precision`, for `bench.modes`: the forward pass, or
    forward and backward with every gradient that training needs. The reference is what the others are held against
    and is not timed. Times are the device's (see `time_queued`), in ms; `floor_ms` is the largest of three floors (see
    `floors`), `floor` its name. `state` "wrong" stands where a backend does not pass its check, "oom" or "failed"
    where it cannot run; such rows have no time, and after the last one WrongOutput is raised where any was wrong or
    failed.
    """
    device, settings = pick_device(config.run.device), config.bench
    batch = 64 if settings.batch_size == "auto" else settings.batch_size[0]
    torch.manual_seed(0)
    with torch.device(device):
        net = build(config.model).to(device)
    fill_constants(net)
    select_backends(net, vars(config.backend), device.split(":")[0])
    calls = calls_of(net.train(), batch, settings.precision, device)
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
        names = ["output", *(name for name, wanted in zip(_names(one.operator), one.wanted, strict=True) if wanted)]
        exact = results(operator.backends["reference"].run, one, torch.float64)
        plain = results(self.as_in_the_model(operator.resolve("auto", "cpu").run), one)
        result = plain[0].numel() * plain[0].element_size() * self.batch
        for backend in operator.backends.values():
            if backend.name != "reference" and not backend.reasons(device_type):
                run = self.as_in_the_model(backend.run)
                compare = partial(_compare, run, one, plain, exact, FLOOR[self.settings.precision], names)
                yield from self.passes(backend.name, compare, partial(_steps, run, many), many, result)
        if operator.name == "selective_scan" and device_type == "cuda" and mamba_ssm.INSTALLED:
            alone = partial(_compare_alone, one, exact)
            yield from self.passes(ALONE, alone, partial(_steps_alone, many), many, result)

    def as_in_the_model(self, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A backend under the autocast that it has in a model."""

        def wrapped(*args: Any) -> Tensor:
            with autocast(self.device, self.settings.precision):
                return run(*args)

        return wrapped

    def passes(
        self, backend: str, compare: Callable[[], Row], steps: Callable[[], dict], call: Call, result: int
    ) -> Iterator[Row]:
        try:
            checked = compare()
            prepared = steps() if checked["state"] == "done" else {}
        except Exception as error:
            checked, prepared = _no_number(error), {}
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
                    row |= _no_number(error)
            release(self.device)
            yield row

    def against_floors(self, call: Call, result: int, backward: bool, milliseconds: float) -> Row:
        """Every limit and floor, the largest floor, and the time over it."""
        found = floors(call, result, backward, self.machine)
        known = {name.removesuffix("_floor_ms"): value for name, value in found.items() if value is not None}
        largest = max(known, key=lambda name: known[name])
        more = {"floor": largest, "floor_ms": known[largest], "times_floor": milliseconds / known[largest]}
        return {**self.machine, **found, **more}


def _compare(
    run: Callable[..., Tensor], one: Call, plain: list[Tensor], exact: list[Tensor], floor: float, names: list[str]
) -> Row:
    """Relative RMS errors against float64 as fields of a row: `relative_error` the largest, `error_of` what has it.
    State "wrong" where one is more than twice that of plain torch plus `floor`."""
    found = results(run, one)
    errors = [relative_rms([a.double()], [b]) for a, b in zip(found, exact, strict=True)]
    rivals = [relative_rms([a.double()], [b]) for a, b in zip(plain, exact, strict=True)]
    row: Row = {"state": "done", "relative_error": max(errors), "error_of": names[errors.index(max(errors))]}
    for name, error, rival in zip(names, errors, rivals, strict=True):
        if not error <= 2 * rival + floor:
            return row | {"state": "wrong", "error": f"{name} off by {error:.1e}, plain torch by {rival:.1e}"}
    return row


def _compare_alone(one: Call, exact: list[Tensor]) -> Row:
    error = relative_rms([v.double() for v in ScanAlone(*one.args).output_and_gradient()], exact[:2])
    row: Row = {"state": "done", "relative_error": error, "error_of": "output and x"}
    if not error <= ALONE_LIMIT:
        row |= {"state": "wrong", "error": f"output and gradient of x off by {error:.1e}, limit {ALONE_LIMIT:.0e}"}
    return row


def _steps(run: Callable[..., Tensor], call: Call) -> dict[str, Callable[[], Any]]:
    args, leaves = _fresh(call)
    with torch.no_grad():
        weights = torch.randn_like(run(*args))

    def both() -> None:
        torch.autograd.grad(run(*args), leaves, weights)

    return {"forward": torch.no_grad()(partial(run, *args)), "forward+backward": both}


def _steps_alone(call: Call) -> dict[str, Callable[[], Any]]:
    scan = ScanAlone(*call.args)
    return {"forward": scan.forward, "forward+backward": scan.both}


def _no_number(error: Exception) -> Row:
    return {"state": "oom" if out_of_memory(error) else "failed", "error": first_line(error)}
