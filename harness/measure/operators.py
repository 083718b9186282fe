"""Speed of the operators at the shapes of a model, compared with each other and with the machine's limits.

A forward pass of the model gives the calls of each operator. Every usable backend is compared with the reference in
float64 for one image, and is timed with the whole batch only if rule 4 of DESIGN.md holds.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels import OPERATORS
from ...kernels.operator import Yardstick
from ...models.registry import Backbone, build, select_backends
from ..device import device_name, exact_float32
from ..sections import BenchConfig
from .calls import Call, as_in_the_model, calls_of, fresh
from .check import Held, WrongOutput, or_null, relative_rms
from .gpus import exponentials_per_s, peak_flops
from .models import Line, fill_constants, no_number, release
from .search import FINISHED
from .timing import LEAST, one_at_a_time, quantiles, time_calls

# The relative error of an operator in isolation that is allowed on top of twice that of plain torch in the same
# precision. It is smaller than that of a model.
OPERATOR_FLOOR = {"float32": 1e-5, "bfloat16": 1e-4}
PASSES = {"forward": "forward", "train": "forward+backward"}
OVERWRITE_S = 5e-4  # about the seconds that a GPU takes to overwrite 2 GiB (an H100: 0.7 ms)


def pairs_of(net: Backbone, batch: int, precision: str, device: str) -> list[tuple[Call, Call]]:
    """Every different call in a forward pass, with one image and with `batch` images."""
    one_image = calls_of(net, 1, precision, device)
    # A whole batch with its graph might not fit. Arguments need gradients where those of one image do.
    with torch.no_grad():
        whole_batch = calls_of(net, batch, precision, device)
    pairs = zip(one_image, whole_batch, strict=True)
    return [(one, many._replace(wanted=one.wanted)) for one, many in pairs if one.args]


def limits(device: str, precision: str) -> dict[str, float | None]:
    """The limits of the machine: bytes a second of a large copy, measured now, and the device's exponentials and FLOPs
    a second, None if they are not known."""
    source = torch.empty(2**28 if device.startswith("cuda") else 2**22, device=device)  # 1 GiB, far larger than a cache
    target = torch.empty_like(source)
    timed = time_queued(partial(target.copy_, source), device, 10)
    cuda, name = device.startswith("cuda"), device_name(device)
    return {
        "bytes_per_s": 2 * source.numel() * source.element_size() / (timed["p50_ms"] / 1e3),
        "exponentials_per_s": exponentials_per_s(name) if cuda else None,
        "flops_per_s": peak_flops(name, precision),
    }


def floors(call: Call, result: int, backward: bool, machine: dict[str, float | None]) -> dict[str, float | None]:
    """The least time of a call in ms by each limit of the machine (see `limits`), None if the limit is not known.

    Bytes: inputs and output (`result` bytes) once; in the backward pass the inputs and the output's gradient once more,
    and every gradient. Products: two FLOPs per multiply-add, three times as many with the backward pass. Exponentials:
    once in each pass.
    """
    inputs = sum(arg.numel() * arg.element_size() for arg in call.args if isinstance(arg, Tensor))
    gradients = sum(
        arg.numel() * arg.element_size() for arg, wanted in zip(call.args, call.wanted, strict=True) if wanted
    )
    work = OPERATORS[call.operator].work(*call.args)
    needs = {
        "bytes": inputs + result + ((inputs + result + gradients) if backward else 0),
        "exponentials": work.exponentials * (2 if backward else 1),
        "flops": 2 * work.macs * (3 if backward else 1),
    }
    return {
        f"{name}_floor_ms": None if (rate := machine[f"{name}_per_s"]) is None else 1e3 * need / rate
        for name, need in needs.items()
    }


def time_queued(step: Callable[[], Any], device: str, repeats: int, seconds: float = 1.0) -> dict[str, Any]:
    """Time calls with cold caches on the device, as fields of a record.

    Before each call the device overwrites other memory, so that its caches hold other data. The host queues the call
    meanwhile, so that its own time does not count. On a CPU, the host's time counts. Measures as many calls as fit into
    `seconds`, at least 5 and at most `repeats`.
    """
    if not device.startswith("cuda"):
        return time_calls(step, device, 1, repeats, seconds)
    other = torch.empty(2**31, dtype=torch.int8, device=device)  # larger than the caches
    for _ in range(3):
        step()
    torch.cuda.synchronize(device)
    queued = time.perf_counter()
    step()
    overwrites = 1 + int(2 * (time.perf_counter() - queued) / OVERWRITE_S)  # twice as long as the host needs
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


def bench_operators(
    model: Any, settings: BenchConfig, backend: Any, device: str, say: Callable[[str], None] = lambda text: None
) -> Iterator[Line]:
    """A row for every operator of the model, shape, usable backend and pass: the fields of `operator_speed` records.

    `model` is a model's configuration. `backend` is a BackendConfig, the backends of the model while its calls are
    recorded. `settings.batch_size` is one batch in a list, or `auto` (64); the precision is `settings.precision`. Of
    `settings.modes`, `forward` is the forward pass and `train` is forward and backward with every gradient that
    training needs. The reference is not timed, but the yardsticks of an operator are. Times are those of the device
    (see `time_queued`), in ms. `floor_ms` is the largest of three floors (see `floors`), and `floor` its name.

    The `state` of a row is "wrong" if the backend fails its check, and "oom" or "failed" if it cannot run. Such rows
    have no time. After the last row, raises WrongOutput if any was wrong or failed. If another process measures on the
    same GPU, this waits for its end.
    """
    exact_float32()
    batch = 64 if settings.batch_size == "auto" else settings.batch_size[0]
    with one_at_a_time(device, say):
        torch.manual_seed(0)
        with torch.device(device):
            net = build(model).to(device)
        fill_constants(net)
        select_backends(net, vars(backend), device.split(":")[0])
        calls = pairs_of(net.train(), batch, settings.precision, device)
        del net
        release(device)
        for name in dict.fromkeys(one.operator for one, _ in calls):
            say(f"{name} left out: {OPERATORS[name].why_not(device.split(':')[0]) or 'none'}")
        bad, subject = [], Subject(settings, device, batch, model.input_size, limits(device, settings.precision))
        for one, many in calls:
            for row in subject.rows(one, many):
                outcome = f"{row['p50_ms']:.3f} ms" if row["state"] == "done" else f"{row['state']}: {row['error']}"
                text = f"{row['operator']}={row['backend'][row['operator']]}, {row['shape']}, {row['pass']}: {outcome}"
                say(text)
                bad += [text] if row["state"] not in FINISHED else []
                yield row
    if bad:
        raise WrongOutput(f"{len(bad)} measurements without a number, the first: {bad[0]}")


class Subject:
    """What the measurements of all calls share: settings, device, batch and the machine's limits."""

    def __init__(
        self, settings: BenchConfig, device: str, batch: int, input_size: int, machine: dict[str, float | None]
    ) -> None:
        self.settings, self.device, self.batch = settings, device, batch
        self.input_size, self.machine = input_size, machine

    def rows(self, one: Call, many: Call) -> Iterator[Line]:
        """A row for every backend, yardstick and pass of a call, checked with one image and timed with `many`."""
        operator, device_type = OPERATORS[one.operator], self.device.split(":")[0]
        held = Held(one, self.settings.precision, self.device)
        # In the type of the first argument, because plain torch may return another (CUDA's autocast norms in float32).
        result = held.plain[0].numel() * one.args[0].element_size() * self.batch
        for backend in operator.backends.values():
            if backend.name != "reference" and not backend.reasons(device_type):
                run = as_in_the_model(backend.run, self.settings.precision, self.device)
                compare = partial(held.compare, run, OPERATOR_FLOOR[self.settings.precision])
                yield from self.passes(backend.name, compare, partial(_steps, run, many), many, result)
        for yardstick in operator.yardsticks:
            if not yardstick.reasons(device_type):
                compare = partial(compare_yardstick, yardstick, one, held.exact)
                yield from self.passes(yardstick.name, compare, partial(_rival_steps, yardstick, many), many, result)

    def passes(
        self, backend: str, compare: Callable[[], Line], steps: Callable[[], dict], call: Call, result: int
    ) -> Iterator[Line]:
        try:
            checked = compare()
            release(self.device)
            prepared = steps() if checked["state"] == "done" else {}
        except Exception as error:
            checked, prepared = no_number(error), {}
        for mode in self.settings.modes:
            row: Line = {
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

    def against_floors(self, call: Call, result: int, backward: bool, milliseconds: float) -> Line:
        """Every limit and floor, the largest floor, and the time over that floor."""
        by_limit = floors(call, result, backward, self.machine)
        values = {name.removesuffix("_floor_ms"): value for name, value in by_limit.items() if value is not None}
        largest = max(values, key=lambda name: values[name])
        more = {"floor": largest, "floor_ms": values[largest], "times_floor": milliseconds / values[largest]}
        return {**self.machine, **by_limit, **more}


def compare_yardstick(yardstick: Yardstick, call: Call, exact: list[Tensor]) -> Line:
    """The relative RMS error of a yardstick's output and first gradient together (see `Held.compare`)."""
    outcome = yardstick.prepare(*call.args).output_and_gradient()
    error, first = relative_rms([v.double() for v in outcome], exact[:2]), call.names[1]
    row: Line = {"state": "done", "relative_error": or_null(error), "error_of": f"output and {first}"}
    if not error <= yardstick.limit:
        text = f"output and gradient of {first} off by {error:.1e}, limit {yardstick.limit:.0e}"
        row |= {"state": "wrong", "error": text}
    return row


def _steps(run: Callable[..., Tensor], call: Call) -> dict[str, Callable[[], Any]]:
    args, leaves = fresh(call)
    with torch.no_grad():
        weights = torch.randn_like(run(*args))

    def both() -> None:
        torch.autograd.grad(run(*args), leaves, weights)

    return {"forward": torch.no_grad()(partial(run, *args)), "forward+backward": both}


def _rival_steps(yardstick: Yardstick, call: Call) -> dict[str, Callable[[], Any]]:
    timed = yardstick.prepare(*call.args)
    return {"forward": timed.forward, "forward+backward": timed.both}
