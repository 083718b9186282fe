"""Speed and memory of a backbone. There is no number if outputs or gradients do not agree with the reference."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels.errors import InputError
from ...models import plugins, registry
from ...models.registry import Backbone, build, select_backends
from .. import caches, parallel
from ..checks import check_batch
from ..device import (
    WHOLE_STEP,
    autocast,
    compiled,
    device_type,
    exact_float32,
    is_cuda,
    own_device,
    round_weights,
    training_mode,
)
from ..diffusion.objective import Objective, objective
from ..sections import CUDA_GRAPHS, BackendConfig, BenchConfig, ObjectiveConfig, TrainConfig
from ..training import averaging, graph
from ..training.graph import Update, WholeStep
from ..training.step import TrainStep
from .check import (
    Reference,
    WrongOutput,
    batch_of,
    check,
    check_operators,
    check_step,
    check_whole_step,
    ends_error,
    reference,
)
from .cost import cost
from .search import FINISHED, Point, next_point
from .timing import began, first_line, keeping, one_at_a_time, out_of_memory, release, time_calls

Line = dict[str, Any]
Say = Callable[[str], None]


def model_at(model: Any, input_size: int) -> Any:
    """A model's configuration for another input size. Raises InputError if the model cannot have that size."""
    return replace(model, input_size=input_size)


def check_bench(model: Any, settings: BenchConfig, backend: Any, device: str, processes: int = 1) -> None:
    """Raise InputError if the model cannot have one of the input sizes, if no tensor can be as large as the model needs
    there, if a named backend cannot run, for `whole-step` without a GPU, and for anything but training steps of whole
    parts in several processes."""
    if processes > 1 and settings.modes != ["train"]:
        raise InputError(f"{processes} processes measure training steps together: give bench.modes=[train]")
    if processes > 1 and settings.batch_size == "auto":
        raise InputError(f"{processes} processes measure a batch of a given size: bench.batch_size=N, of all together")
    for size in settings.batch_size if processes > 1 else []:
        check_batch(size, processes, "bench.batch_size")
    for size in settings.input_sizes or [model.input_size]:
        cost(model_at(model, size))
    for kind in settings.compile:
        training_mode(kind, device, section="bench")
    with torch.device("meta"):
        net = build(model)
    select_backends(net, vars(backend), device_type(device))


def bench(
    model: Any,
    settings: BenchConfig,
    backend: Any,
    objective_config: ObjectiveConfig,
    device: str,
    say: Say = lambda text: None,
    rows: Sequence[Line] = (),
    together: bool = False,
    ahead: bool = False,
) -> Iterator[Line]:
    """Every measurement of `model` that `settings` ask for and `rows` do not have, as the fields of `speed` records.

    `backend` is a BackendConfig. Weights are random with nothing at zero, inputs are random. `forward` is one call
    without gradients, with weights rounded beforehand as in sampling (`device.round_weights`). `train` is a step of the
    training loop (`TrainStep`): forward, loss, backward, AdamW, EMA. Milliseconds are those of a batch: median,
    quartiles, 20th and 80th percentile. `peak_memory_gib` is null on
    the CPU and, with CUDA graphs, all memory that torch holds. `disturbed` says what else kept the host busy, so that
    the times may be too long. If another process measures on the same GPU, this waits for its end (`one_at_a_time`).

    The last timed call is held to the same as the call before: a forward pass is compared with float32, and a step with
    the same step run without a CUDA graph, of which it must have the gradients (`timed_error`).

    Before the measurements, every operator that the model calls is compared with the reference in isolation, for one
    image (see `check_operators`). `operator_error` is the largest relative RMS error of an output or a gradient, null
    if the model calls no operator. Then each call of the model is compared with float32 (see `check`). A row that fails
    its check has `state` "wrong" and no number. Rows of "oom" and "failed" (for example if torch.compile fails) have no
    number either, and the next measurement follows. After the last one, raises WrongOutput if any was wrong or failed.
    Raises InputError if a size does not fit the model or a named backend cannot run.

    With `together`, all processes of the run (parallel.py) do a step, each with a GPU and an equal part of the batch,
    as in training. Rows have the numbers of the first process, the images per second of all, and `processes`.

    With `ahead`, calls are compiled and checked, not timed. Several models compile at a time, in as many processes, and
    a later call finds the compiled code.
    """
    check_bench(model, settings, backend, device, parallel.size() if together else 1)
    together = together and parallel.size() > 1
    exact_float32()
    rows, subject, bad, goal = list(rows), None, [], objective(objective_config)
    if next_point(settings, model.input_size, rows) is None:
        return  # without waiting for the GPU
    if together and parallel.rank() == 0:
        sections = {"settings": settings, "backend": backend, "objective": objective_config}
        plain = {name: vars(section) for name, section in sections.items()}
        shared = {"device": device, "sources": plugins.loaded(), "compiled": caches.folders()}
        parallel.call("bench", model=registry.to_dict(model), **plain, **shared)
    with parallel.attending("bench") if together else nullcontext(), one_at_a_time(device, say, ahead):
        while (point := _next(settings, model, rows, together)) is not None:
            try:
                if subject is None or subject.net.config.input_size != point.input_size:
                    subject = None  # frees the old one before the new one is built
                    release(device)
                    subject = Subject(model_at(model, point.input_size), settings, backend, goal, device, say, together)
                row = subject.row(point, ahead)
            except InputError:
                raise
            except Exception as error:  # such as too little memory for the weights
                row = {**point._asdict(), "precision": settings.precision, **no_number(error)}
                row |= {"threads": torch.get_num_threads(), "began": began()}
            say(describe(row))
            rows.append(row)
            bad += [row] if row["state"] not in FINISHED else []
            yield row
        subject = None
        release(device)
    if bad:
        raise WrongOutput(f"{len(bad)} measurements without a number, the first: {describe(bad[0])}")


def _next(settings: BenchConfig, model: Any, rows: Sequence[Line], together: bool) -> Point | None:
    """The next measurement. Of processes that measure together, the first one chooses, because its rows have times."""
    point = next_point(settings, model.input_size, rows)
    return parallel.gather(point)[0] if together else point


def join(
    model: Any, settings: Any, backend: Any, objective: Any, device: str, sources: Sequence[Any], compiled: Any
) -> None:
    """What the other processes of a run do in `bench` of the first one: the same measurements."""
    caches.share(compiled)
    plugins.load_recorded(sources)
    here = (BenchConfig(**settings), BackendConfig(**backend), ObjectiveConfig(**objective))
    with suppress(WrongOutput):
        for _ in bench(registry.from_dict(model), *here, own_device(device), together=True):
            pass


class Subject:
    """A model at one input size on the device, with its operators checked.

    `reference` is what its calls are compared with or, if there is none, the fields that every row has instead of
    numbers.
    """

    def __init__(
        self,
        model: Any,
        settings: BenchConfig,
        backend: Any,
        goal: Objective,
        device: str,
        say: Say,
        together: bool = False,
    ) -> None:
        self.settings, self.goal, self.device = settings, goal, device
        self.processes = parallel.size() if together else 1
        torch.manual_seed(0)
        with torch.device(self.device):  # the GPU initialises a large model in a second
            self.net = build(model).to(self.device)
        fill_constants(self.net)
        self.backend = select_backends(self.net, vars(backend), device_type(device))
        counted = cost(model)
        self.macs, self.flops = counted.macs, counted.flops
        self.reference: Reference | Line
        self.operator_error: float | None = None
        try:
            expected = reference(self.net, self.settings.precision, self.device, goal.span)
            exact = expected.backends
            self.operator_error = check_operators(self.net, self.backend, exact, self.settings.precision, self.device)
            self.reference = expected
            against = ", ".join(f"{operator}={name}" for operator, name in exact.items())
            alone = "" if self.operator_error is None else f"; operators alone off by {self.operator_error:.1e} at most"
            say(f"input {model.input_size}: checked against float32, {against or 'no operators'}{alone}")
        except InputError:
            raise
        except Exception as error:
            self.reference = no_number(error)
            if self.reference["state"] == "oom":
                self.reference["error"] = f"no reference for one image: {self.reference['error']}"
        release(self.device)

    def row(self, point: Point, ahead: bool = False) -> Line:
        """One measurement, or why there is none."""
        row = {
            **point._asdict(),
            "precision": self.settings.precision,
            "backend": self.backend,
            "threads": torch.get_num_threads(),
            "began": began(),
            "macs": self.macs,
            "flops": self.flops,
            "processes": self.processes if self.processes > 1 else None,
        }
        if isinstance(self.reference, dict):
            return row | self.reference
        checked = {"checked_against": self.reference.backends, "operator_error": self.operator_error}
        try:
            row |= {"state": "done", **checked, **self.measure(point, self.reference, ahead)}
        except InputError:
            raise
        except Exception as error:
            row |= no_number(error)
        self.net.zero_grad(set_to_none=True)
        if point.compile != "eager":
            torch.compiler.reset()  # CUDA graphs keep their memory
        release(self.device)
        self.net.to(self.device)
        return row

    def measure(self, point: Point, expected: Reference, ahead: bool = False) -> Line:
        """Check the call, then time it, unless `ahead`."""
        net = self.net
        if point.mode == "forward" and self.settings.precision == "bfloat16":
            net = copy.deepcopy(self.net)
            round_weights(net, self.settings.precision)
            self.net.to("cpu")  # until this measurement ends
        graphs, whole = point.compile in CUDA_GRAPHS, point.compile == WHOLE_STEP
        net.train(point.mode == "train")
        net.checkpointing = point.checkpointing
        call = compiled(net, point.compile)
        warm_up, most, batch = graph.WARM_UP, int, point.batch_size // self.processes
        if self.processes > 1:
            call, warm_up, most = averaging.averaging(net, call, 1), averaging.WARM_UP, parallel.most
        started = time.perf_counter()
        against = (call, net, expected, batch, point.mode, self.settings.precision, self.device)
        # DDP belongs to the stream in which it first runs, and a step is captured in one that is not the default.
        stream = torch.cuda.Stream(self.device) if whole and self.processes > 1 else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2 if graphs else 0):  # a plain call and the recording; later calls are replays
                check(*against)
            errors = check(*against)
        seconds = time.perf_counter() - started  # mostly compilation
        release(self.device)
        x, t, y = batch_of(expected, batch, self.device)
        how = (call, net, self.device, self.settings.precision)
        training: TrainStep | None = None
        if point.mode == "train":
            whole_step = partial(WholeStep, warm_up=warm_up, most=most, stream=stream)
            training = training_step(*how, self.goal, whole_step if whole else None)
            if whole:
                check_whole_step(training, noisy(x, t, y), self.settings.precision, warm_up)

            def step() -> Any:
                training(inputs := noisy(x, t, y))
                return inputs

        else:
            step = partial(forward(*how), x, t, y)
        if ahead:
            return {**errors, "check_s": time.perf_counter() - started}
        calls = (self.settings.warmup, self.settings.repeats, self.settings.seconds)
        kept, last = keeping(step)
        timed = time_calls(kept, self.device, *calls, most)
        if (graphs or whole) and is_cuda(self.device):  # a replay allocates nothing, its memory is what the graphs hold
            timed["peak_memory_gib"] = torch.cuda.memory_reserved(self.device) / 2**30
        if training is None:
            errors["timed_error"] = ends_error(last[0], expected, self.settings.precision)
        elif not net.draws:  # another call would draw other dropout
            errors["timed_error"] = check_step(training, last[0], self.settings.precision)
        speed = 1e3 * point.batch_size / timed["p50_ms"]
        return {**errors, "check_s": seconds, **timed, "images_per_s": speed}


def no_number(error: Exception) -> Line:
    """State and error of a row that has no number."""
    if isinstance(error, WrongOutput):
        return {"state": "wrong", "error": str(error)}
    return {"state": "oom" if out_of_memory(error) else "failed", "error": first_line(error)}


def describe(row: Line) -> str:
    """A row as a line of progress."""
    checkpointing = " checkpointed" if row["checkpointing"] else ""
    processes = f" of {row['processes']} processes" if row.get("processes") else ""
    where = f"input {row['input_size']}, {row['mode']}{checkpointing}, {row['compile']}, batch {row['batch_size']}"
    where += f"{processes}: "
    if row["state"] != "done":
        return where + f"{row['state']}: {row['error']}"
    if "images_per_s" not in row:
        return where + f"compiled and checked in {row['check_s']:.0f} s"
    memory = "" if row["peak_memory_gib"] is None else f", {row['peak_memory_gib']:.1f} GiB"
    disturbed = f" (disturbed: {row['disturbed']})" if row.get("disturbed") else ""
    return where + f"{row['images_per_s']:.4g} images/s{memory}{disturbed}"


def fill_constants(net: Backbone) -> None:
    """Perturb every parameter that starts at a constant, because zeros hide work and gates of zero hide errors.

    Adds 0.5 times normal noise to vectors (gates, biases, norms), so that every block contributes, and 0.02 times to
    other parameters.
    """
    for parameter in net.parameters():
        if bool((parameter == parameter.flatten()[0]).all()):
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * (0.5 if parameter.ndim == 1 else 0.02))


def forward(call: Callable[..., Tensor], net: Backbone, device: str, precision: str) -> Callable[..., Tensor]:
    """A forward pass without gradients."""

    @torch.no_grad()
    def step(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with autocast(device, precision):
            return call(x, t, y)

    return step


def training_step(
    call: Callable[..., Tensor],
    net: Backbone,
    device: str,
    precision: str,
    goal: Objective,
    graph: Callable[[Update], Update] | None,
) -> TrainStep:
    """A step of the training loop. The learning rate is 0: the same work, but the weights stay those of the check."""
    training = TrainStep(net, goal, TrainConfig(precision=precision), call=call, device=device, graph=graph)
    training.lr = 0.0
    return training


def noisy(x: Tensor, t: Tensor, y: Tensor) -> dict[str, Tensor]:
    """A batch of training with random noise."""
    return {"x0": x, "y": y, "t": t, "noise": torch.randn_like(x)}
