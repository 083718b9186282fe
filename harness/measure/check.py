"""What has to hold before a number is printed: outputs and gradients agree with float32 (DESIGN.md, rule 4)."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import OPERATORS
from ...models.registry import Backbone, called_operators
from ..device import autocast

# From that many tokens on, where the references loop over every token or keep every score, plain torch checks instead.
MANY_TOKENS = 1024
PLAIN = {"selective_scan": "torch", "attention": "sdpa"}
# Relative RMS error that is allowed on top of twice what plain torch has in the same precision.
FLOOR = {"float32": 1e-4, "bfloat16": 5e-3}


class WrongOutput(RuntimeError):
    """The backends to be measured do not compute what the reference does."""


@dataclass
class Reference:
    """One image through the reference backends in float32, on the CPU, so that it takes no memory of the GPU's.

    `output` [2C, S, S] and `gradients`, of the parameters that are trained, of the sum of `output` times `weights`;
    `plain_output` and `plain_gradients` are the relative RMS errors of the same backends in the precision to be
    measured; `backends` names them.
    """

    image: Tensor
    t: int
    y: int
    weights: Tensor
    output: Tensor
    gradients: list[Tensor]
    plain_output: float
    plain_gradients: float
    backends: dict[str, str]


def trained(net: Backbone) -> list[Tensor]:
    """The parameters that have a gradient."""
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


@contextmanager
def with_backends(net: Backbone, backends: dict[str, str]) -> Iterator[None]:
    """These backends, in training and with checkpointed blocks so that a large image fits; afterwards all is as
    before."""
    before = [(operators, dict(operators)) for operators in called_operators(net)]
    flags = net.checkpointing, net.training
    for operators, _ in before:
        operators.update({name: backends[name] for name in operators})
    net.checkpointing = True
    net.train()
    try:
        yield
    finally:
        for operators, chosen in before:
            operators.update(chosen)
        net.checkpointing = flags[0]
        net.train(flags[1])


def reference(net: Backbone, precision: str, device: str) -> Reference:
    """The reference for a net, with an image, a time, a label and output weights drawn from seed 0."""
    config = net.config
    tokens = (config.input_size // getattr(config, "patch_size", 1)) ** 2
    plain = PLAIN if tokens >= MANY_TOKENS else {}
    backends = {name: plain.get(name, "reference") for name in OPERATORS}
    called = {name for operators in called_operators(net) for name in operators}
    draw = torch.Generator().manual_seed(0)
    image = torch.randn(config.in_channels, config.input_size, config.input_size, generator=draw)
    weights = torch.randn(2 * config.in_channels, config.input_size, config.input_size, generator=draw)
    weights = weights.bfloat16()  # exact in every precision
    made = Reference(image, 500, 0, weights, image, [], 0.0, 0.0, {k: v for k, v in backends.items() if k in called})
    with with_backends(net, backends):
        output, gradients = _one_image(net, made, "float32", device)
        made.output, made.gradients = _to_host(output), [_to_host(gradient) for gradient in gradients]
        del output, gradients
        if precision != "float32":
            output, gradients = _one_image(net, made, precision, device)
            made.plain_output = relative_rms([output], [made.output])
            made.plain_gradients = relative_rms(gradients, made.gradients)
    return made


def _one_image(net: Backbone, made: Reference, precision: str, device: str) -> tuple[Tensor, list[Tensor]]:
    x, t, y = batch_of(made, 1, device)
    with autocast(device, precision):
        out = net(x, t, y)
    out.backward(made.weights[None].to(out))
    return out[0].detach().float(), _take_gradients(net)


def _to_host(v: Tensor) -> Tensor:
    return v.cpu().pin_memory() if v.is_cuda else v.clone()  # pinned: it comes back for every measurement


def _take_gradients(net: Backbone) -> list[Tensor]:
    """The gradients of the trained parameters, which have none afterwards."""
    parameters = trained(net)
    found = [torch.zeros_like(v) if v.grad is None else v.grad for v in parameters]
    for parameter in parameters:
        parameter.grad = None
    return found


def batch_of(made: Reference, batch: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Random x [B, C, S, S], t [B], y [B] whose first and last image are the reference's."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *made.image.shape, generator=draw)
    t, y = torch.randint(0, 1000, (batch,), generator=draw), torch.zeros(batch, dtype=torch.int64)
    x[0] = x[-1] = made.image
    t[0] = t[-1] = made.t
    y[0] = y[-1] = made.y
    return x.to(device), t.float().to(device), y.to(device)


def check(
    call: Callable[..., Tensor], net: Backbone, made: Reference, batch: int, mode: str, precision: str, device: str
) -> dict[str, float]:
    """Hold `call`, which is `net` or `net` compiled, against the reference at the very batch that is measured.

    Returns the relative RMS errors as fields of a record: `output_error` of the first and the last image and, in mode
    `train`, `gradient_error` of all parameters together. Only the last image has a gradient, so that one image is all
    that the reference needs. Raises WrongOutput where an error is more than twice that of the reference backends in
    the same precision plus `FLOOR`.
    """
    x, t, y = batch_of(made, batch, device)
    with torch.set_grad_enabled(mode == "train"), autocast(device, precision):
        out = call(x, t, y)
    ends = [out[place].detach().float() for place in (0, -1)]
    errors = {"output_error": relative_rms(ends, [made.output, made.output])}
    if mode == "train":
        weights = torch.zeros_like(out)
        weights[-1] = made.weights.to(out)
        out.backward(weights)
        errors["gradient_error"] = relative_rms(_take_gradients(net), made.gradients)
    for name, plain in (("output_error", made.plain_output), ("gradient_error", made.plain_gradients)):
        limit = 2 * plain + FLOOR[precision]
        if name in errors and not errors[name] <= limit:
            raise WrongOutput(
                f"{name.removesuffix('_error')} off by {errors[name]:.2e} (relative RMS) from the reference, "
                f"limit {limit:.1e}: not measured"
            )
    return errors


def relative_rms(found: list[Tensor], exact: list[Tensor]) -> float:
    """The norm of the differences over the norm of the exact values, all tensors together; the former alone where the
    exact values are all zero (of queries that see one key, for one)."""
    sums = torch.zeros(2, dtype=torch.float64, device=found[0].device)
    for ours, theirs in zip(found, exact, strict=True):
        true = theirs.to(ours.device, non_blocking=True).double()
        sums += torch.stack([(ours - true).square().sum(), true.square().sum()])
    wrong, size = sums.tolist()
    return math.sqrt(wrong / (size or 1.0))
