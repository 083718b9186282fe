"""Speed of the operators at the shapes of a model, compared with each other and with the machine's limits.

A forward pass of the model gives the calls of each operator. Every usable backend is compared with the reference in
float64 for one or two images, and is timed with the whole batch only if rule 4 of DESIGN.md holds.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels import OPERATORS
from ...kernels.errors import InputError, unknown
from ...kernels.operator import Timed, Yardstick, output_weights
from ...models.registry import Backbone, build, called_operators, select_backends
from ..device import device_name, exact_float32
from ..sections import BenchConfig
from .calls import Call, as_in_the_model, calls_of, fresh, listed
from .check import Held, WrongOutput, or_null, relative_rms
from .clocks import conditions, reader
from .gpus import exponentials_per_s, peak_flops
from .models import Line, fill_constants, no_number
from .search import FINISHED
from .timing import LEAST, began, keeping, one_at_a_time, quantiles, release, time_calls

# The relative error of an operator in isolation that is allowed on top of twice that of plain torch in the same
# precision. It is smaller than that of a model.
OPERATOR_FLOOR = {"float32": 1e-5, "bfloat16": 1e-4}
PASSES = {"forward": "forward", "train": "forward+backward"}
OVERWRITE_S = 5e-4  # about the seconds that a GPU takes to overwrite 2 GiB (an H100: 0.7 ms)


def pairs_of(net: Backbone, batch: int, precision: str, device: str) -> list[tuple[Call, Call]]:
    """Every different call in a forward pass, with few images and with `batch` images: with one if `batch` is odd, else
    with two, of which a batch can have equally many copies."""
    few_images = calls_of(net, 2 - batch % 2, precision, device)
    if batch <= 2:
        return [(few, few) for few in few_images if few.args]
    # A whole batch with its graph might not fit. Arguments need gradients where those of few images do.
    with torch.no_grad():
        whole_batch = calls_of(net, batch, precision, device)
    pairs = zip(few_images, whole_batch, strict=True)
    return [(few, many._replace(wanted=few.wanted)) for few, many in pairs if few.args]


def copy_images(few: Call, many: Call) -> Tensor:
    """Overwrite the images of a call with copies of those of another, equally many of each and in a random order, so
    that what is timed can be compared with few expected results. Memory layouts stay those of the model. Returns the
    place in `few` of each image."""
    count, batch = len(few.args[0]), len(many.args[0])
    if batch == count:
        return torch.arange(batch)
    images = torch.randperm(batch, generator=torch.Generator().manual_seed(0)) % count
    for small, large in zip(few.args, many.args, strict=True):
        if isinstance(small, Tensor) and small.shape != large.shape:
            large.copy_(small[images.to(small.device)])
    return images


def limits(device: str, precision: str) -> dict[str, float | None]:
    """The limits of the machine: bytes a second of a large copy, measured now, and the device's exponentials and FLOPs
    a second, None if they are not known."""
    source = torch.empty(2**28 if device.startswith("cuda") else 2**22, device=device)  # 1 GiB, far larger than a cache
    target = torch.empty_like(source)
    timed = time_queued(partial(target.copy_, source), device, 10)
    cuda, name = device.startswith("cuda"), device_name(device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if cuda else 0
    return {
        "bytes_per_s": 2 * source.numel() * source.element_size() / (timed["p50_ms"] / 1e3),
        "exponentials_per_s": exponentials_per_s(name, processors) if cuda else None,
        "flops_per_s": peak_flops(name, precision),
    }


def needs(call: Call, result: int, backward: bool) -> dict[str, int]:
    """What a call needs of the machine, as fields of a record, of which reports derive the least times (gpus.floors).

    Bytes: inputs and outputs (`result` bytes) once; in the backward pass the inputs and the outputs' gradients once
    more, and every gradient. Products: two FLOPs per multiply-add, three times as many with the backward pass.
    Exponentials: once in each pass.
    """
    inputs = sum(arg.numel() * arg.element_size() for arg in call.args if isinstance(arg, Tensor))
    gradients = sum(
        arg.numel() * arg.element_size() for arg, wanted in zip(call.args, call.wanted, strict=True) if wanted
    )
    work = OPERATORS[call.operator].work(*call.args)
    return {
        "call_bytes": inputs + result + ((inputs + result + gradients) if backward else 0),
        "call_exponentials": work.exponentials * (2 if backward else 1),
        "call_flops": 2 * work.macs * (3 if backward else 1),
    }


def time_queued(step: Callable[[], Any], device: str, repeats: int, seconds: float = 1.0) -> dict[str, Any]:
    """Time calls with cold caches on the device, as fields of a record.

    Before each call the device overwrites other memory, so that its caches hold other data. The host queues the call
    meanwhile, so that its own time does not count. On a CPU, the host's time counts. Measures as many calls as fit into
    `seconds`, at least 5 and at most `repeats`. The GPU's clock and power are read while it works (`conditions`).
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
    read, readings = reader(device), []
    times, started = [], time.perf_counter()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    while len(times) < repeats and (len(times) < LEAST or time.perf_counter() - started < seconds):
        for _ in range(overwrites):
            other.zero_()
        start.record()
        step()
        end.record()
        readings.append(read())
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(end))
    return {**quantiles(times), **conditions(readings), "repeats": len(times)}


def check_only(model: Any, only: Sequence[str], backend: Any) -> None:
    """Raise InputError, with the choices, for the name of an operator that a model does not call, and if `backend`
    names the reference for an operator that is to be timed (see `bench_operators`)."""
    with torch.device("meta"):
        called = list(dict.fromkeys(name for names in called_operators(build(model)) for name in names))
    for name in only:
        if name not in called:
            raise unknown("operator of this model", name, called)
    for name in only or called:
        if getattr(backend, name) == "reference":
            choices = ", ".join(["auto", *(other for other in OPERATORS[name].backends if other != "reference")])
            raise InputError(f"backend.{name}=reference is what others are held to, and is not timed; use {choices}")


def bench_operators(
    model: Any,
    settings: BenchConfig,
    backend: Any,
    device: str,
    say: Callable[[str], None] = lambda text: None,
    only: Sequence[str] = (),
) -> Iterator[Line]:
    """A row for every operator of the model, shape, usable backend and pass: the fields of `operator_speed` records.

    `model` is a model's configuration. `backend` is a BackendConfig, the backends of the model while its calls are
    recorded; a backend that it names is the only one of its operator that is timed. `only` names the operators that are
    timed; empty: all. `settings.batch_size` is a list of batches, or `auto` (64); the precision is
    `settings.precision`. Of `settings.modes`, `forward` is the forward pass and `train` is forward and backward with
    every gradient that training needs. The reference is not timed, but the yardsticks of an operator are. Times are
    those of the device (see `time_queued`), in ms, beside what the call needs (`needs`) and the machine has (`limits`).

    A backend is checked before it is timed, with one or two images. The images that are timed are copies of these, so
    that what the last timed call returned is checked too, each image and each gradient (`timed_error`).

    The `state` of a row is "wrong" if the backend fails a check, and "oom" or "failed" if it cannot run. Such rows
    have no time. After the last row, raises WrongOutput if any was wrong or failed. If another process measures on the
    same GPU, this waits for its end.
    """
    exact_float32()
    batches = [64] if settings.batch_size == "auto" else settings.batch_size
    with one_at_a_time(device, say):
        bad, machine, held = [], limits(device, settings.precision), {}
        for batch in batches:
            torch.manual_seed(0)
            with torch.device(device):
                net = build(model).to(device)
            fill_constants(net)
            select_backends(net, vars(backend), device.split(":")[0])
            calls = pairs_of(net.train(), batch, settings.precision, device)
            del net
            release(device)
            calls = [pair for pair in calls if not only or pair[0].operator in only]
            for name in [] if held else dict.fromkeys(few.operator for few, _ in calls):
                say(f"{name} left out: {OPERATORS[name].why_not(device.split(':')[0]) or 'none'}")
            subject, named = Subject(settings, backend, device, batch, model.input_size, machine), set()
            for few, many in calls:
                key, shape = (few.operator, few.signature), many.shape(few)
                if (few.operator, shape) in named:  # its parameters differ, which shapes that grow do not say
                    shape += f", without {', '.join(few.missing)}"
                named.add((few.operator, shape))
                held[key] = held.get(key) or Held(few, settings.precision, device)
                for row in subject.rows(held[key], few, many, shape):
                    outcome = f"{row['p50_ms']:.3f} ms" if row["state"] == "done" else f"{row['state']}: {row['error']}"
                    text = f"{row['operator']}={row['backend'][row['operator']]}, {row['shape']}, {row['pass']}"
                    say(f"{text}: {outcome}")
                    bad += [f"{text}: {outcome}"] if row["state"] not in FINISHED else []
                    yield row
    if bad:
        raise WrongOutput(f"{len(bad)} measurements without a number, the first: {bad[0]}")


class Subject:
    """What the measurements of all calls share: settings, backends as asked for, device, batch and the machine's
    limits."""

    def __init__(
        self,
        settings: BenchConfig,
        backend: Any,
        device: str,
        batch: int,
        input_size: int,
        machine: dict[str, float | None],
    ) -> None:
        self.settings, self.backend, self.device, self.batch = settings, backend, device, batch
        self.input_size, self.machine = input_size, machine

    def rows(self, held: Held, few: Call, many: Call, shape: str) -> Iterator[Line]:
        """A row for every backend, yardstick and pass of a call, `shape` in words, checked with `few` images, whose
        results are `held`, and timed with `many`."""
        operator, device_type = OPERATORS[few.operator], self.device.split(":")[0]
        asked, floor = getattr(self.backend, few.operator), OPERATOR_FLOOR[self.settings.precision]
        images = copy_images(few, many)
        places, exact = images.to(self.device), held.exact[: len(few.outputs)]
        weights = [output_weights(v.shape).to(self.device)[places] for v in exact]
        # In the types of the operator, because plain torch may return others (CUDA's autocast norms in float32).
        result = sum(v.numel() * kind.itemsize for v, kind in zip(weights, few.outputs.values(), strict=True))
        rival = as_in_the_model(operator.rival, self.settings.precision, self.device)
        timed = partial(
            held.compare_timed,
            images=images,
            floor=floor,
            plain=lambda: _steps(rival, many, weights)["forward+backward"](),
        )
        for backend in operator.backends.values():
            if backend.name != "reference" and asked in ("auto", backend.name) and not backend.reasons(device_type):
                run = as_in_the_model(backend.run, self.settings.precision, self.device)
                compare = partial(held.compare, run, floor), timed
                steps = partial(_steps, run, many, weights)
                yield from self.passes(backend.name, compare, steps, many, shape, result)
        for yardstick in operator.yardsticks if asked == "auto" else ():
            if not yardstick.reasons(device_type):
                beside = HeldYardstick(yardstick, held, images)
                compare, steps = (beside.compare, beside.compare_timed), partial(beside.steps, many, weights[0])
                yield from self.passes(yardstick.name, compare, steps, many, shape, result)

    def passes(
        self,
        backend: str,
        compare: tuple[Callable[[], Line], Callable[[Any], Line]],
        steps: Callable[[], dict],
        call: Call,
        shape: str,
        result: int,
    ) -> Iterator[Line]:
        """A row for each pass. `compare` are the check before the clock starts, and that of what was timed."""
        try:
            checked = compare[0]()
            release(self.device)
            prepared = steps() if checked["state"] == "done" else {}
        except Exception as error:
            checked, prepared = no_number(error), {}
        for mode in self.settings.modes:
            row: Line = {
                "operator": call.operator,
                "shape": shape,
                "batch_size": self.batch,
                "input_size": self.input_size,
                "precision": self.settings.precision,
                "threads": torch.get_num_threads(),
                "began": began(),
                "backend": {call.operator: backend},
                "pass": PASSES[mode],
                **checked,
            }
            if prepared:
                try:
                    row |= self.timed(prepared[PASSES[mode]], compare[1])
                    row |= {**self.machine, **needs(call, result, mode == "train")} if row["state"] == "done" else {}
                except Exception as error:
                    row |= no_number(error)
            release(self.device)
            yield row

    def timed(self, step: Callable[[], Any], compare: Callable[[Any], Line]) -> Line:
        """The time of a pass, and the error of what the last call returned; if that is wrong, no time."""
        kept, last = keeping(step)
        measured = time_queued(kept, self.device, self.settings.repeats)
        compared = compare(last[0])
        return compared if compared.get("state") == "wrong" else {**measured, **compared}


def _steps(run: Callable[..., Any], call: Call, weights: list[Tensor]) -> dict[str, Callable[[], list[Tensor]]]:
    """Both passes, which return what `calls.results` returns. `weights` are those of the outputs."""
    args, leaves = fresh(call)
    with torch.no_grad():
        alike = [torch.empty_like(v).copy_(weight) for v, weight in zip(listed(run(*args)), weights, strict=True)]

    def both() -> list[Tensor]:
        out = listed(run(*args))
        return [*(v.detach() for v in out), *torch.autograd.grad(out, leaves, alike)]

    return {"forward": torch.no_grad()(lambda: listed(run(*args))), "forward+backward": both}


class HeldYardstick:
    """A yardstick beside the backends of a call: `held` has the expected results of few images, and `images` says which
    of these each timed image is a copy of."""

    def __init__(self, yardstick: Yardstick, held: Held, images: Tensor) -> None:
        self.yardstick, self.held, self.images = yardstick, held, images

    def steps(self, call: Call, weights: Tensor) -> dict[str, Callable[[], tuple[Timed, Any]]]:
        """Both passes, which return what was prepared and what it returned. `weights` are those of the output."""
        timed = self.yardstick.prepare(weights, *call.args)
        return {"forward": lambda: (timed, timed.forward()), "forward+backward": lambda: (timed, timed.both())}

    def compare(self) -> Line:
        """The relative RMS error of the output and the first gradient together, of the few images (as
        `Held.compare`)."""
        few, exact = self.held.call, self.held.exact[0]
        both = self.steps(few, output_weights(exact.shape).to(exact.device))["forward+backward"]
        error, wrong = self._error(both(), torch.arange(len(exact)))
        row: Line = {"state": "done", "relative_error": or_null(error), "error_of": f"output and {few.names[1]}"}
        return row | ({"state": "wrong", "error": wrong} if wrong else {})

    def compare_timed(self, outcome: tuple[Timed, Any]) -> Line:
        """The same of what a timed pass returned (as `Held.compare_timed`)."""
        error, wrong = self._error(outcome, self.images)
        row: Line = {"timed_error": or_null(error)}
        return row | ({"state": "wrong", "error": f"what was timed: {wrong}"} if wrong else {})

    def _error(self, outcome: tuple[Timed, Any], images: Tensor) -> tuple[float, str | None]:
        timed, returned = outcome
        values = timed.results(returned)
        exact = [true[images] for true in self.held.exact[: len(values)]]
        error, limit = relative_rms(values, exact), self.yardstick.limit
        what = ["output", f"gradient of {self.held.call.names[1]}"][: len(values)]
        return error, None if error <= limit else f"{' and '.join(what)} off by {error:.1e}, limit {limit:.0e}"
