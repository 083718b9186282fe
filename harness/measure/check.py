"""The check before a number is printed (DESIGN.md, rule 4): models and operators compute what the reference computes.

The output and the gradients of a model test it as a whole, but a small gradient is lost among all others: if that of
the queries is garbage, the whole moves by 1 %. So each operator is also compared with the reference in isolation.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import OPERATORS
from ...models.registry import Backbone, called_operators, out_channels
from ..device import autocast
from ..training.graph import WARM_UP
from ..training.step import TrainStep
from .calls import Call, as_in_the_model, calls_of, results
from .timing import release

# From this many tokens on, `Operator.exact` replaces the reference, which may loop over tokens or store all scores.
MANY_TOKENS = 1024
# The relative RMS error of a model that is allowed on top of twice the error of plain torch in the same precision.
MODEL_FLOOR = {"float32": 1e-4, "bfloat16": 5e-3}
TIMES = 1000  # different times of a batch
SLICE = 16  # images that are compared at a time, so that few of them are in float64
SMALL = 2**20  # bytes; torch's allocator has separate blocks for tensors up to this size


class WrongOutput(RuntimeError):
    """The measured backends do not compute what the reference computes."""


@dataclass
class Reference:
    """The results of the reference backends for one image in float32, on the CPU, so that they take no GPU memory.

    `t` is in the middle of the objective's range, 0 to `span`. `output` is [channels of the head, S, S]. `gradients`
    are those of the sum of `output` times `weights`, one for each trained parameter. `plain_output` and
    `plain_gradients` are the relative RMS errors of the same backends in the measured precision. `backends` names the
    backends by operator.
    """

    image: Tensor
    t: float
    span: float
    y: int
    weights: Tensor
    output: Tensor
    gradients: list[Tensor]
    plain_output: float
    plain_gradients: float
    backends: dict[str, str]


def trained(net: Backbone) -> list[Tensor]:
    """The parameters that are trained."""
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


@contextmanager
def without_dropout(net: Backbone) -> Iterator[None]:
    """Switch dropout off within the context, because no two passes with it can be compared."""
    layers = [(module, module.training) for module in net.modules() if isinstance(module, nn.Dropout)]
    for module, _ in layers:
        module.eval()
    try:
        yield
    finally:
        for module, training in layers:
            module.train(training)


@contextmanager
def with_backends(net: Backbone, backends: dict[str, str]) -> Iterator[None]:
    """Use these backends within the context, in training mode without dropout and with checkpointed blocks, so that a
    large image fits. Afterwards the net is as before."""
    before = [(operators, dict(operators)) for operators in called_operators(net)]
    flags = net.checkpointing, net.training
    for operators, _ in before:
        operators.update({name: backends[name] for name in operators})
    net.checkpointing = True
    net.train()
    try:
        with without_dropout(net):
            yield
    finally:
        for operators, names in before:
            operators.update(names)
        net.checkpointing = flags[0]
        net.train(flags[1])


def reference(net: Backbone, precision: str, device: str, span: float = TIMES) -> Reference:
    """The reference for a net whose objective has t from 0 to `span`. The image and the output weights are drawn from
    seed 0."""
    config = net.config
    tokens = (config.input_size // getattr(config, "patch_size", 1)) ** 2
    many = tokens >= MANY_TOKENS
    backends = {name: operator.exact if many else "reference" for name, operator in OPERATORS.items()}
    called = {name for operators in called_operators(net) for name in operators}
    against = {name: backend for name, backend in backends.items() if name in called}
    draw = torch.Generator().manual_seed(0)
    image = torch.randn(config.in_channels, config.input_size, config.input_size, generator=draw)
    channels = out_channels(config)
    weights = torch.randn(channels, config.input_size, config.input_size, generator=draw)
    weights = weights.bfloat16()  # exact in every precision
    expected = Reference(image, span / 2, span, 0, weights, image, [], 0.0, 0.0, against)
    with with_backends(net, backends):
        output, gradients = _one_image(net, expected, "float32", device)
        expected.output, expected.gradients = _to_host(output), [_to_host(gradient) for gradient in gradients]
        del output, gradients
        if precision != "float32":
            output, gradients = _one_image(net, expected, precision, device)
            expected.plain_output = relative_rms([output], [expected.output])
            expected.plain_gradients = relative_rms(gradients, expected.gradients)
    return expected


def _one_image(net: Backbone, expected: Reference, precision: str, device: str) -> tuple[Tensor, list[Tensor]]:
    x, t, y = batch_of(expected, 1, device)
    with autocast(device, precision):
        out = net(x, t, y)
    out.backward(expected.weights[None].to(out))
    return out[0].detach().float(), _take_gradients(net)


def _to_host(v: Tensor) -> Tensor:
    return v.cpu().pin_memory() if v.is_cuda else v.clone()  # pinned, because every measurement copies it back


def _take_gradients(net: Backbone) -> list[Tensor]:
    """The gradients of the trained parameters, which are removed from the parameters."""
    parameters = trained(net)
    gradients = [torch.zeros_like(v) if v.grad is None else v.grad for v in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradients


def batch_of(expected: Reference, batch: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Random x [B, C, S, S], t [B] and y [B]. The first and last image are those of the reference."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *expected.image.shape, generator=draw)
    t = torch.randint(0, TIMES, (batch,), generator=draw) * (expected.span / TIMES)
    y = torch.zeros(batch, dtype=torch.int64)
    x[0] = x[-1] = expected.image
    t[0] = t[-1] = expected.t
    y[0] = y[-1] = expected.y
    return x.to(device), t.float().to(device), y.to(device)


def check(
    call: Callable[..., Tensor], net: Backbone, expected: Reference, batch: int, mode: str, precision: str, device: str
) -> dict[str, float]:
    """Compare `call`, which is `net` or `net` compiled, with the reference at the batch that is measured.

    Returns the relative RMS errors as fields of a record: `output_error` of the first and the last image and, in mode
    `train`, `gradient_error` of all parameters together. Only the last image has a gradient, so that the reference
    needs only one image. Raises WrongOutput if an error exceeds twice that of the reference backends in the same
    precision plus `MODEL_FLOOR`.
    """
    x, t, y = batch_of(expected, batch, device)
    with torch.set_grad_enabled(mode == "train"), autocast(device, precision), without_dropout(net):
        out = call(x, t, y)
    errors = {"output_error": ends_error(out, expected, precision)}
    if mode == "train":
        weights = torch.zeros_like(out)
        weights[-1] = expected.weights.to(out)
        out.backward(weights)
        errors["gradient_error"] = error = relative_rms(_take_gradients(net), expected.gradients)
        _within("gradient", error, expected.plain_gradients, precision)
    return errors


def ends_error(out: Tensor, expected: Reference, precision: str) -> float:
    """The relative RMS error of the first and the last image of an output, whose inputs were those of `batch_of`.
    Raises WrongOutput as `check` does."""
    ends = [out[place].detach().float() for place in (0, -1)]
    error = relative_rms(ends, [expected.output, expected.output])
    _within("output", error, expected.plain_output, precision)
    return error


def _within(what: str, error: float, plain: float, precision: str) -> None:
    limit = 2 * plain + MODEL_FLOOR[precision]
    if not error <= limit:
        raise WrongOutput(
            f"{what} off by {error:.2e} (relative RMS) from the reference, limit {limit:.1e}: not measured"
        )


def check_whole_step(step: TrainStep, batch: Mapping[str, Tensor], precision: str, warm_up: int = WARM_UP) -> None:
    """Compare the losses and gradients of a step that replays a CUDA graph (`WholeStep`) with those of the last step
    before the capture, which runs directly. The memory of that step is free by then. The weights must not change from
    step to step. Raises WrongOutput if the two differ, relative to their norm, by more than `MODEL_FLOOR`."""
    for _ in range(warm_up - 1):
        step(batch)
    direct = [value.cpu() for value in _outcome(step, batch)]
    release(step.device)
    step(batch)  # captures the step, and replays it for the first time
    if not (error := relative_rms(_outcome(step, batch), direct)) <= MODEL_FLOOR[precision]:
        raise WrongOutput(f"the whole step as a CUDA graph is off by {error:.2e} (relative RMS): not measured")
    step.window.zero_()


def check_step(step: TrainStep, batch: Mapping[str, Tensor], precision: str) -> float:
    """Compare the gradients that the last call of a step left, with `batch`, with those of the same step run directly.
    The weights must not have changed since. Returns the relative RMS error. Raises WrongOutput if it exceeds
    `MODEL_FLOOR`. The step cannot be called again, because its graph and the direct step need the memory twice."""
    left = [p.grad.cpu() for p in trained(step.net) if p.grad is not None]
    step.close()
    step.net.zero_grad(set_to_none=True)
    release(step.device)
    step.without_graph(batch)
    gradients = [p.grad for p in trained(step.net) if p.grad is not None]
    if not (error := relative_rms(gradients, left)) <= MODEL_FLOOR[precision]:
        raise WrongOutput(f"the last timed step is off by {error:.2e} (relative RMS): not measured")
    return error


def _outcome(step: TrainStep, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """The losses and gradients of one call of a step."""
    step.window.zero_()
    step(batch)
    losses = step.window[: len(step.objective.metrics)].clone()
    return [losses, *(p.grad for p in trained(step.net) if p.grad is not None)]


def relative_rms(outcome: list[Tensor], exact: list[Tensor]) -> float:
    """The norm of the differences over the norm of the exact values, for all tensors together. Only the norm of the
    differences if all exact values are zero, such as the gradient of queries that see a single key."""
    sums = torch.zeros(2, dtype=torch.float64, device=outcome[0].device)
    for values, expected in zip(outcome, exact, strict=True):
        true = expected.to(values.device, non_blocking=True).double()
        sums += torch.stack([(values - true).square().sum(), true.square().sum()])
    difference, size = sums.tolist()
    return math.sqrt(difference / (size or 1.0))


class Held:
    """The expected results of one call: `exact`, in float64, and `plain`, those of the operator's rival in the model's
    precision (see `results`); `rivals` are the errors of the latter. `backend` is the reference of the whole model (see
    `Operator.exact_alone`)."""

    def __init__(self, call: Call, precision: str, device: str, backend: str = "reference") -> None:
        self.call, self.precision, self.device = call, precision, device
        operator = OPERATORS[call.operator]
        self.exact = results(operator.exact_alone(backend), call, torch.float64)
        self.plain = results(as_in_the_model(operator.rival, precision, device), call)
        self.rivals = [relative_rms([a], [b]) for a, b in zip(self.plain, self.exact, strict=True)]

    def compare(self, run: Callable[..., Any], floor: float) -> dict[str, Any]:
        """Relative RMS errors of a backend as fields of a row: `relative_error` is the largest (null if it is not
        finite) and `error_of` the output or gradient that has it.

        `state` is "wrong" if an error exceeds twice that of plain torch plus `floor`, and `error` names it. On a GPU
        the backend gets memory full of NaN.
        """
        size = 8 * sum(arg.nbytes for arg in self.call.args if isinstance(arg, Tensor))
        outcome = results(run, self.call, spoil=lambda: fill_free_memory(self.device, size))
        errors = [relative_rms([a], [b]) for a, b in zip(outcome, self.exact, strict=True)]
        worst, wrong = self._worst(errors, self.rivals, floor)
        row = {"state": "done", "relative_error": or_null(errors[worst]), "error_of": self.call.names[worst]}
        return row | ({"state": "wrong", "error": wrong} if wrong else {})

    def compare_timed(
        self, outcome: list[Tensor], images: Tensor, floor: float, plain: Callable[[], list[Tensor]]
    ) -> dict[str, Any]:
        """As `compare`, for the results of a call with copies of the images of this one: the output and, if they were
        asked for, the gradients. `images` [B] says which image of this call each is a copy of: equally often each, and
        in order if there is one copy of each. `timed_error` is the largest error.

        `plain` returns the results of plain torch for that call. It is called if an error is larger than plain torch's
        with few images allows, because sums over many images in low precision have larger errors."""
        errors = self._errors_of_copies(outcome, images)
        worst, wrong = self._worst(errors, self.rivals, floor)
        if wrong:
            worst, wrong = self._worst(errors, self._errors_of_copies(plain(), images), floor)
        row: dict[str, Any] = {"timed_error": or_null(errors[worst])}
        return row | ({"state": "wrong", "error": f"what was timed: {wrong}"} if wrong else {})

    def _errors_of_copies(self, outcome: list[Tensor], images: Tensor) -> list[float]:
        copies, errors = len(images) / len(self.exact[0]), []
        for value, true in zip(outcome, self.exact[: len(outcome)], strict=True):
            if value.shape == true.shape:  # a sum over the images, of which there are equally many copies
                errors.append(relative_rms([value.double() / copies], [true]))
            else:
                parts = [true[part] for part in images.split(SLICE)]
                error = relative_rms(list(value.split(SLICE)), parts)
                errors.append(error if bool(true.any()) else error / math.sqrt(copies))
        return errors

    def _worst(self, errors: list[float], rivals: list[float], floor: float) -> tuple[int, str | None]:
        """The place of the largest error, and the first that is too large in words."""
        worst = max(range(len(errors)), key=lambda place: math.inf if math.isnan(errors[place]) else errors[place])
        for name, error, rival in zip(self.call.names, errors, rivals, strict=False):  # forward has the outputs alone
            if not error <= 2 * rival + floor:
                return worst, f"{name} off by {error:.1e}, plain torch by {rival:.1e}"
        return worst, None


def check_operators(
    net: Backbone, backends: dict[str, str], exact: dict[str, str], precision: str, device: str
) -> float | None:
    """Compare every different call of an operator by `net` for one image, with `backends`, to the same call by `exact`.

    Both are {operator: backend}. Returns the largest relative RMS error of any output or gradient, None if the net
    calls no operator. Raises WrongOutput for the first call with an error that is too large (see `Held.compare`). The
    floor is that of whole models, so that an adapter that rounds internally, such as mamba-ssm's, can be measured in a
    model.
    """
    with with_backends(net, backends):
        calls = [call for call in calls_of(net, 1, precision, device) if call.args]
    errors = []
    for call in calls:
        name = backends[call.operator]
        run = as_in_the_model(OPERATORS[call.operator].backends[name].run, precision, device)
        row = Held(call, precision, device, exact[call.operator]).compare(run, MODEL_FLOOR[precision])
        if row["state"] != "done":
            raise WrongOutput(f"{call.operator}={name}: {row['error']}: not measured")
        errors.append(row["relative_error"])
    return max(errors, default=None)


def fill_free_memory(device: str, size: int) -> None:
    """Set every bit of the GPU memory that torch's allocator hands out next, which is NaN in every float type.

    A kernel that reads memory that nobody wrote then returns NaN, whatever the memory contained before. Fills every gap
    in the blocks that torch holds, and `size` bytes (at most half of the free memory) of new blocks. Does nothing on a
    CPU.
    """
    if not device.startswith("cuda"):
        return
    torch.cuda.empty_cache()  # only gaps remain
    sizes = [SMALL] * 8  # four blocks for small tensors
    for segment in torch.cuda.memory_snapshot():
        most = SMALL if segment["segment_type"] == "small" else segment["total_size"]
        for gap in (block["size"] for block in segment["blocks"] if block["state"] == "inactive"):
            sizes += [min(most, gap - start) for start in range(0, gap, most)]
    sizes.append(min(max(size, 32 * SMALL), torch.cuda.mem_get_info(device)[0] // 2))
    # All at once, so that each has its own place. A tensor that fits a gap exactly is placed there.
    _ = [torch.full((size,), 255, dtype=torch.uint8, device=device) for size in sizes]


def or_null(error: float) -> float | None:
    """A number as a record can hold it: null if it is not finite."""
    return error if math.isfinite(error) else None
