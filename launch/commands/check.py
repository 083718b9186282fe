"""`lamabench check`: checks a user's own model as the tests check every registered model, on the CPU."""

import argparse
import copy
import json
import math
import re
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...harness.measure.cost import cost
from ...kernels import OPERATORS
from ...kernels.errors import InputError
from ...models import registry
from ...models.registry import Backbone
from ..compose import load_plugins, model_config, text_of
from ..output import split_arguments

MANY = 20_000_000  # with this many parameters or more, the checks take minutes
ROUNDING = 1e-9  # relative rounding error of float64 sums
# Steps of a central difference, each with the relative error allowed: about step² plus rounding / step. The second pair
# is for modules that compute in float32 within a float64 network.
DIFFERENCES = ((1e-5, 1e-5), (1e-3, 1e-3))
Batch = tuple[Tensor, Tensor, Tensor]


class Wrong(Exception):
    """What a check found wrong, in one line."""


class Subject:
    """A configuration, its network, and a float64 twin of the network that runs the reference backends. No parameter
    is zero, so that every branch reaches the output."""

    def __init__(self, config: Any) -> None:
        self.config = config
        torch.manual_seed(0)
        self.net = registry.build(config)
        _disturb(self.net)
        registry.select_backends(self.net, {}, "cpu")
        self.wide = copy.deepcopy(self.net).double()
        registry.select_backends(self.wide, dict.fromkeys(OPERATORS, "reference"), "cpu")

    def batch(self, size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
        """Random x [B, C, S, S], t [B] and y [B]."""
        config, draw = self.config, torch.Generator().manual_seed(seed)
        x = torch.randn(size, config.in_channels, config.input_size, config.input_size, generator=draw)
        t = 999 * torch.rand(size, generator=draw)
        y = torch.randint(0, max(config.num_classes, 1), (size,), generator=draw)
        return x.to(dtype), t, y


def _disturb(net: Backbone) -> None:
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in net.parameters() if p.requires_grad):
            scale = 0.5 * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.add_(scale * torch.randn(parameter.shape, generator=draw))


def _error(got: Tensor, exact: Tensor) -> float:
    """The norm of the difference over the norm of the exact values; infinite if a value is not finite."""
    got, exact = got.detach().double(), exact.detach().double()
    error = float((got - exact).norm() / exact.norm().clamp_min(1e-300))
    return error if math.isfinite(error) else math.inf


def _weights(out: Tensor) -> Tensor:
    return torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)


def _gradients(net: Backbone, call: Callable[..., Tensor], batch: Batch) -> dict[str, Tensor]:
    """The output, and the gradient of its weighted sum for every trainable parameter that has one."""
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    out = call(*batch)
    gradients = torch.autograd.grad(out, list(parameters.values()), _weights(out), allow_unused=True)
    by_name = {name: value for name, value in zip(parameters, gradients, strict=True) if value is not None}
    return {"the output": out.detach(), **by_name}


def _shapes(subject: Subject) -> str:
    channels, side = registry.out_channels(subject.config), subject.config.input_size
    for size in (1, 2, 3):
        with torch.no_grad():
            out = subject.net.eval()(*subject.batch(size))
        if tuple(out.shape) != (size, channels, side, side):
            raise Wrong(f"a batch of {size} gives {list(out.shape)}, not {[size, channels, side, side]}")
        if out.dtype != torch.float32 or not out.isfinite().all():
            bad = int((~out.isfinite()).sum())
            raise Wrong(f"a batch of {size} gives {out.dtype}, of which {bad} values are not finite")
    if registry.from_dict(json.loads(json.dumps(registry.to_dict(subject.config)))) != subject.config:
        raise Wrong("the configuration changes when it is written as JSON and read again")
    return f"[B, {channels}, {side}, {side}]"


def _determinism(subject: Subject) -> str:
    torch.manual_seed(7)
    first = registry.build(subject.config).state_dict()
    torch.manual_seed(7)
    for name, value in registry.build(subject.config).state_dict().items():
        if not torch.equal(value, first[name]):
            raise Wrong(f"{name} differs when built again from the same seed: draw only from torch's global generator")
    for mode in (True, False):
        subject.net.train(mode)
        state = torch.get_rng_state()
        with torch.no_grad():
            out, again = subject.net(*subject.batch(2)), subject.net(*subject.batch(2))
        where = "training" if mode else "evaluation"
        if not torch.equal(torch.get_rng_state(), state):
            raise Wrong(
                f"a pass in {where} draws random numbers, which checkpointing and resuming do not repeat; dropout is "
                "repeated where the configuration has a field `dropout`, which must be 0 here"
            )
        if not torch.equal(out, again):
            raise Wrong(f"two passes in {where} over the same batch differ")
    return "equal to the last bit"


def _conditions(subject: Subject) -> str:
    """The output depends on time, label and null class."""
    net, (x, t, y) = subject.net.eval(), subject.batch(2)
    null, num_classes = net.null_class, subject.config.num_classes
    if null not in (None, num_classes):
        raise Wrong(f"null_class is {null}: it must be {num_classes}, the number after the labels")
    with torch.no_grad():
        out = net(x, t, y)
        if torch.equal(out, net(x, 999 - t, y)):
            raise Wrong("the output does not depend on t")
        if num_classes > 1 and torch.equal(out, net(x, t, (y + 1) % num_classes)):
            raise Wrong("the output does not depend on y")
        if null is None:
            return "no null class: use train.class_dropout=0 and no guidance"
        other = net(x, t, torch.full_like(y, null))
    if not other.isfinite().all() or (num_classes and torch.equal(out, other)):
        raise Wrong(f"the null class {null} gives the output of a label, or values that are not finite")
    return f"null class {null}"


def _independence(subject: Subject) -> str:
    batch, other = subject.batch(3, dtype=torch.float64), subject.batch(3, seed=5, dtype=torch.float64)
    mixed = [torch.cat([own[:1], value[1:]]) for own, value in zip(batch, (100 * other[0], *other[1:]), strict=True)]
    for mode in (True, False):
        subject.wide.train(mode)
        with torch.no_grad():
            error = _error(subject.wide(*mixed)[0], subject.wide(*batch)[0])
        if error > ROUNDING:
            where = "training" if mode else "evaluation"
            raise Wrong(f"in {where} an image's output depends on its neighbours in the batch ({error:.1e}, relative)")
    return "an output depends only on its own image"


def _differences(subject: Subject) -> str:
    """Gradients of autograd against central differences, in float64 through the reference backends. Parameters whose
    names differ only in numbers form a group; each group is moved along one random direction."""
    net, batch = subject.wide.train(), subject.batch(1, dtype=torch.float64)
    gradients = _gradients(net, net, batch)
    groups: dict[str, list[str]] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(re.sub(r"\d+", "*", name), []).append(name)
            if name not in gradients or not gradients[name].any():
                raise Wrong(f"{name} has no gradient: the output does not depend on it")
    draw = torch.Generator().manual_seed(2)
    parameters = dict(net.named_parameters())
    for title, names in groups.items():
        along = {name: torch.randn(parameters[name].shape, generator=draw, dtype=torch.float64) for name in names}
        along = {name: value * gradients[name].norm() / value.norm() for name, value in along.items()}
        # Add the gradient itself, so that the slope is not a small difference of large terms.
        along = {name: value + gradients[name] for name, value in along.items()}
        norm = _norm(along)
        exact = sum(float((gradients[name] * value).sum()) for name, value in along.items()) / norm
        slopes = []
        for step, allowed in DIFFERENCES:
            sums = []
            for offset in (step, -step):
                _move(parameters, along, offset / norm)
                with torch.no_grad():
                    out = net(*batch)
                sums.append(float((out * _weights(out)).sum()))
                _move(parameters, along, -offset / norm)
            slopes.append((sums[0] - sums[1]) / (2 * step))
            # The second term is the rounding error of a difference of two sums of that size.
            if abs(slopes[-1] - exact) <= allowed * abs(exact) + 1e-14 * max(map(abs, sums)) / step:
                break
        else:
            raise Wrong(f"the gradient of {title} along a line is {exact:.6g}, by finite differences {slopes[0]:.6g}")
    return f"{len(groups)} groups of parameters agree with finite differences"


def _move(parameters: dict[str, torch.nn.Parameter], along: dict[str, Tensor], step: float) -> None:
    with torch.no_grad():
        for name, value in along.items():
            parameters[name].add_(value, alpha=step)


def _precisions(subject: Subject) -> str:
    """Float32 and bfloat16 autocast, with the backends that `auto` picks, against the float64 twin."""
    x, t, y = subject.batch(2)
    exact = _gradients(subject.wide.train(), subject.wide, (x.double(), t, y))
    whole = _norm(exact)
    for precision in ("float32", "bfloat16"):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            got = _gradients(subject.net.train(), subject.net, (x, t, y))
        errors = {name: got[name].double() - value for name, value in exact.items()}
        if not _norm(errors) <= 0.1 * whole:  # of all gradients: in bfloat16 that of a few numbers is mostly noise
            raise Wrong(f"output and gradients are off by {_norm(errors) / whole:.1e} (relative) in {precision}")
        for name, value in exact.items() if precision == "float32" else ():
            error = float(errors[name].norm())
            if not error <= 1e-4 * (float(value.norm()) + 1e-2 * whole):
                raise Wrong(f"{name} or its gradient is off by {error / float(value.norm()):.1e} (relative) in float32")
    return "float32 and bfloat16 agree with float64"


def _norm(values: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in values.values()))


def _checkpoints(subject: Subject) -> str:
    (plain, whole), (got, part) = (_memory(subject.net, subject.batch(2), on) for on in (False, True))
    if not part < whole:
        raise Wrong("checkpointing saves no memory: call every block through run_block")
    for name, value in plain.items():
        if name not in got or not torch.equal(got[name], value):
            raise Wrong(f"{name} or its gradient differs with checkpointing")
    return f"equal to the last bit, with {part / whole:.0%} of the memory for the backward pass"


def _memory(net: Backbone, batch: Batch, on: bool) -> tuple[dict[str, Tensor], int]:
    """Output and gradients with or without checkpointing, and the bytes that autograd saves for the backward pass."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    net.train()
    net.checkpointing = on
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            gradients = _gradients(net, net, batch)
    finally:
        net.checkpointing = False
    return gradients, sum(storages.values())


def _compiles(subject: Subject) -> str:
    from torch._dynamo.exc import TorchDynamoException  # importing it takes a second

    net = subject.net.train()
    torch.compiler.reset()
    call = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=False)
    plain = _gradients(net, net, subject.batch(2))
    try:
        got = _gradients(net, call, subject.batch(2))
    except TorchDynamoException as error:
        raise Wrong(f"torch.compile does not compile it into one graph: {_break(error)}") from None
    finally:
        torch.compiler.reset()
    whole = _norm(plain)
    for name, value in plain.items():
        if not float((got[name] - value).norm()) <= 1e-5 * (float(value.norm()) + 1e-2 * whole):
            raise Wrong(f"{name} or its gradient differs when compiled ({_error(got[name], value):.1e}, relative)")
    return "one graph"


def _break(error: Exception) -> str:
    """Why the graph breaks, and in which line of the user's code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    places = [line for line in lines if line.startswith("File ") and "/torch/" not in line]
    return " ".join([lines[0] if lines else type(error).__name__, *(f"({place})" for place in places[-1:])])


def _costs(it: Subject) -> str:
    try:
        counted = cost(it.config)
    except InputError as error:
        raise Wrong(str(error)) from None
    return f"{counted.params / 1e6:.3f} M parameters, {counted.macs / 1e9:.3f} G multiply-adds"


CHECKS: dict[str, Callable[[Subject], str]] = {
    "shapes": _shapes,
    "determinism": _determinism,
    "conditions": _conditions,
    "independence": _independence,
    "cost": _costs,
    "checkpointing": _checkpoints,
    "precision": _precisions,
    "compile": _compiles,
    "gradients": _differences,
}


def check(config: Any, say: Callable[[dict[str, Any]], None] = lambda row: None) -> list[dict[str, Any]]:
    """Run every check of `CHECKS` on the network of a configuration.

    Returns rows with `check`, `ok` and `detail`, and passes each to `say` as soon as it is there. A check in which the
    network raises an exception has failed, with the exception as its detail. A network that cannot be built gives the
    one row `build`.
    """
    rows: list[dict[str, Any]] = []
    state = torch.get_rng_state()

    def note(name: str, ok: bool, detail: str) -> None:
        rows.append({"check": name, "ok": ok, "detail": detail})
        say(rows[-1])

    try:
        subject = Subject(config)
    except Exception as error:
        note("build", False, _one_line(error))
        return rows
    for name, run_check in CHECKS.items():
        try:
            note(name, True, run_check(subject))
        except Wrong as wrong:
            note(name, False, str(wrong))
        except Exception as error:  # of the user's model: no traceback, and the other checks go on
            note(name, False, _one_line(error))
    torch.set_rng_state(state)
    return rows


def _one_line(error: Exception) -> str:
    """An exception, and the last line outside this suite and torch that it came from."""
    text = " ".join(str(error).split())
    text = text if isinstance(error, InputError) else f"{type(error).__name__}: {text[:300]}"
    places = [
        f" ({Path(frame.f_code.co_filename).name}, line {line})"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "").split(".")[0] not in ("lamabench", "torch")
    ]
    return text + (places[-1] if places else "")


def run(args: argparse.Namespace) -> int:
    """Check a model and print a line for each check. The exit code is 1 if one fails."""
    name, fields = _model_and_fields(args.words)
    config = model_config(name, fields)

    def say(row: dict[str, Any]) -> None:
        print(f"{'ok   ' if row['ok'] else 'WRONG'} {row['check']:14s} {row['detail']}", flush=True)

    if not args.json and (count := _parameters(config)) >= MANY:
        print(
            f"{name} has {count / 1e6:.0f} million parameters, so this takes minutes; a small size checks the same code"
        )
    rows = check(config, (lambda row: None) if args.json else say)
    wrong = sum(not row["ok"] for row in rows)
    if args.json:
        print(json.dumps([{"model": name, **row} for row in rows], indent=1))
    else:
        print(f"{name}: {f'{wrong} of {len(rows)} checks failed' if wrong else f'all {len(rows)} checks passed'}")
    return 1 if wrong else 0


def _parameters(config: Any) -> int:
    """How many parameters a model has; 0 if it cannot be built, which the checks report."""
    try:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in registry.build(config).parameters())
    except Exception:
        return 0


def _model_and_fields(words: Sequence[str]) -> tuple[str, list[str]]:
    """The model that `NAME` or `model=NAME` selects, and the fields to set. Imports plug-ins first."""
    names, overrides = split_arguments(words)
    overrides = load_plugins(overrides)
    names += [str(text_of(text)) for text in overrides if text.startswith("model=")]
    if len(names) != 1:
        raise InputError(f"check needs one model, not {names or 'none'}; choices: {', '.join(registry.presets())}")
    return names[0], [text for text in overrides if not text.startswith("model=")]
