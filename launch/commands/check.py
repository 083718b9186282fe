"""`lamabench check`: asks of a user's own model what the tests ask of every registered one. On the CPU."""

import argparse
import copy
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...harness.measure.cost import cost
from ...kernels import OPERATORS
from ...kernels.errors import InputError
from ...models import registry
from ...models.registry import Backbone
from ..compose import load_plugins, model_config
from ..output import split_arguments

MANY = 20_000_000  # parameters from which the checks take minutes
ROUNDING = 1e-9  # relative, of float64 sums
# Steps of a central difference and the relative error allowed, about step² and rounding / step. The second is for
# what computes in float32 within a float64 network.
DIFFERENCES = ((1e-5, 1e-5), (1e-3, 1e-3))
Batch = tuple[Tensor, Tensor, Tensor]


class Wrong(Exception):
    """What a check did not like, in one line."""


class Subject:
    """A configuration, its network with nothing at zero, so that every branch reaches the output, and a float64 twin
    that runs the reference backends."""

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
    """The norm of the difference over that of the exact values; infinite where a value is no number."""
    got, exact = got.detach().double(), exact.detach().double()
    error = float((got - exact).norm() / exact.norm().clamp_min(1e-300))
    return error if math.isfinite(error) else math.inf


def _weights(out: Tensor) -> Tensor:
    return torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)


def _gradients(net: Backbone, call: Callable[..., Tensor], batch: Batch) -> dict[str, Tensor]:
    """The output, and the gradient of its weighted sum for every trained parameter that has one."""
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    out = call(*batch)
    gradients = torch.autograd.grad(out, list(named.values()), _weights(out), allow_unused=True)
    there = {name: value for name, value in zip(named, gradients, strict=True) if value is not None}
    return {"the output": out.detach(), **there}


def _shapes(it: Subject) -> str:
    channels, side = registry.out_channels(it.config), it.config.input_size
    for size in (1, 2, 3):
        with torch.no_grad():
            out = it.net.eval()(*it.batch(size))
        if tuple(out.shape) != (size, channels, side, side):
            raise Wrong(f"a batch of {size} gives {list(out.shape)}, not {[size, channels, side, side]}")
        if out.dtype != torch.float32 or not out.isfinite().all():
            raise Wrong(f"a batch of {size} gives {out.dtype} with {int((~out.isfinite()).sum())} values not finite")
    if registry.from_dict(json.loads(json.dumps(registry.to_dict(it.config)))) != it.config:
        raise Wrong("the configuration is not the same when written as JSON and read again")
    return f"[B, {channels}, {side}, {side}]"


def _determinism(it: Subject) -> str:
    torch.manual_seed(7)
    first = registry.build(it.config).state_dict()
    torch.manual_seed(7)
    for name, value in registry.build(it.config).state_dict().items():
        if not torch.equal(value, first[name]):
            raise Wrong(f"{name} differs when built again from the same seed: draw from torch's global generator alone")
    for mode in (True, False):
        it.net.train(mode)
        state = torch.get_rng_state()
        with torch.no_grad():
            out, again = it.net(*it.batch(2)), it.net(*it.batch(2))
        where = "training" if mode else "evaluation"
        if not torch.equal(torch.get_rng_state(), state):
            raise Wrong(f"a pass in {where} draws random numbers, which checkpointing and resuming do not repeat")
        if not torch.equal(out, again):
            raise Wrong(f"two passes in {where} over one batch differ")
    return "the same bits again"


def _conditions(it: Subject) -> str:
    """Time, label and null class are read."""
    net, (x, t, y) = it.net.eval(), it.batch(2)
    null = net.null_class
    if null not in (None, it.config.num_classes):
        raise Wrong(f"null_class is {null}: it must be {it.config.num_classes}, the number after those of the labels")
    with torch.no_grad():
        out = net(x, t, y)
        if torch.equal(out, net(x, 999 - t, y)):
            raise Wrong("the output does not depend on t")
        if it.config.num_classes > 1 and torch.equal(out, net(x, t, (y + 1) % it.config.num_classes)):
            raise Wrong("the output does not depend on y")
        if null is None:
            return "no null class: train.class_dropout=0, and no guidance"
        other = net(x, t, torch.full_like(y, null))
    if not other.isfinite().all() or (it.config.num_classes and torch.equal(out, other)):
        raise Wrong(f"the null class {null} gives what a label gives, or values that are not finite")
    return f"null class {null}"


def _independence(it: Subject) -> str:
    batch, other = it.batch(3, dtype=torch.float64), it.batch(3, seed=5, dtype=torch.float64)
    beside = [torch.cat([own[:1], value[1:]]) for own, value in zip(batch, (100 * other[0], *other[1:]), strict=True)]
    for mode in (True, False):
        it.wide.train(mode)
        with torch.no_grad():
            error = _error(it.wide(*beside)[0], it.wide(*batch)[0])
        if error > ROUNDING:
            where = "training" if mode else "evaluation"
            raise Wrong(f"in {where} an image's output depends on its neighbours in the batch ({error:.1e}, relative)")
    return "an image alone decides its output"


def _differences(it: Subject) -> str:
    """Autograd in float64 through the reference backends against central differences, along a random direction of all
    parameters whose names differ in numbers alone."""
    net, batch = it.wide.train(), it.batch(1, dtype=torch.float64)
    gradients = _gradients(net, net, batch)
    groups: dict[str, list[str]] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(re.sub(r"\d+", "*", name), []).append(name)
            if name not in gradients or not gradients[name].any():
                raise Wrong(f"{name} has no gradient: nothing that the output depends on reads it")
    draw = torch.Generator().manual_seed(2)
    parameters = dict(net.named_parameters())
    for title, names in groups.items():
        along = {name: torch.randn(parameters[name].shape, generator=draw, dtype=torch.float64) for name in names}
        along = {name: value * gradients[name].norm() / value.norm() for name, value in along.items()}
        # Toward the gradient as well, so that what is compared is no small difference of large terms.
        along = {name: value + gradients[name] for name, value in along.items()}
        norm = _norm(along)
        exact = sum(float((gradients[name] * value).sum()) for name, value in along.items()) / norm
        found = []
        for step, allowed in DIFFERENCES:
            ends = []
            for end in (step, -step):
                _move(parameters, along, end / norm)
                with torch.no_grad():
                    out = net(*batch)
                ends.append(float((out * _weights(out)).sum()))
                _move(parameters, along, -end / norm)
            found.append((ends[0] - ends[1]) / (2 * step))
            # What a difference of two sums of that size rounds away.
            if abs(found[-1] - exact) <= allowed * abs(exact) + 1e-14 * max(map(abs, ends)) / step:
                break
        else:
            raise Wrong(f"the gradient of {title} is {exact:.6g} along a line, by finite differences {found[0]:.6g}")
    return f"{len(groups)} groups of parameters against finite differences"


def _move(parameters: dict[str, torch.nn.Parameter], along: dict[str, Tensor], step: float) -> None:
    with torch.no_grad():
        for name, value in along.items():
            parameters[name].add_(value, alpha=step)


def _precisions(it: Subject) -> str:
    """Float32 and bfloat16 autocast, by the backends that `auto` takes, against the float64 twin."""
    x, t, y = it.batch(2)
    exact = _gradients(it.wide.train(), it.wide, (x.double(), t, y))
    whole = _norm(exact)
    for precision in ("float32", "bfloat16"):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            got = _gradients(it.net.train(), it.net, (x, t, y))
        errors = {name: got[name].double() - value for name, value in exact.items()}
        if not _norm(errors) <= 0.1 * whole:  # the error of one gradient of eight numbers is a draw in bfloat16
            raise Wrong(f"output and gradients are off by {_norm(errors) / whole:.1e} (relative) in {precision}")
        for name, value in exact.items() if precision == "float32" else ():
            error = float(errors[name].norm())
            if not error <= 1e-4 * (float(value.norm()) + 1e-2 * whole):
                raise Wrong(f"{name} or its gradient is off by {error / float(value.norm()):.1e} (relative) in float32")
    return "float32 and bfloat16 against float64"


def _norm(values: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in values.values()))


def _checkpoints(it: Subject) -> str:
    (plain, whole), (got, part) = (_kept(it.net, it.batch(2), on) for on in (False, True))
    if not part < whole:
        raise Wrong("checkpointing saves no memory: call every block through run_block")
    for name, value in plain.items():
        if name not in got or not torch.equal(got[name], value):
            raise Wrong(f"{name} differs with checkpointing, or its gradient does")
    return f"the same bits, {part / whole:.0%} of what is kept for the backward pass"


def _kept(net: Backbone, batch: Batch, on: bool) -> tuple[dict[str, Tensor], int]:
    """Output and gradients with or without checkpointing, and the bytes that autograd keeps between its passes."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    net.train()
    net.checkpointing = on
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            gradients = _gradients(net, net, batch)
    finally:
        net.checkpointing = False
    return gradients, sum(kept.values())


def _compiles(it: Subject) -> str:
    from torch._dynamo.exc import TorchDynamoException  # a second

    torch.compiler.reset()
    call = torch.compile(it.net.train(), backend="aot_eager", fullgraph=True, dynamic=False)
    plain = _gradients(it.net, it.net, it.batch(2))
    try:
        got = _gradients(it.net, call, it.batch(2))
    except TorchDynamoException as error:
        raise Wrong(f"torch.compile does not take it in one graph: {_break(error)}") from None
    finally:
        torch.compiler.reset()
    whole = _norm(plain)
    for name, value in plain.items():
        if not float((got[name] - value).norm()) <= 1e-5 * (float(value.norm()) + 1e-2 * whole):
            raise Wrong(f"{name} or its gradient is another when compiled ({_error(got[name], value):.1e}, relative)")
    return "one graph"


def _break(error: Exception) -> str:
    """Why a graph breaks, and the line of the user's code where it does."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    places = [line for line in lines if line.startswith("File ") and "/torch/" not in line]
    return " ".join([lines[0] if lines else type(error).__name__, *(f"({place})" for place in places[-1:])])


def _costs(it: Subject) -> str:
    try:
        counted = cost(it.config)
    except KeyError as error:
        raise Wrong(f"a module has the part {error}, which no cost has") from None
    except RuntimeError as error:
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
    """Every check of `CHECKS` on a configuration's network: rows with `check`, `ok` and `detail`, each said when known.

    Whatever the network raises is that check's answer.
    """
    rows = []
    state = torch.get_rng_state()
    subject = Subject(config)
    for name, run_check in CHECKS.items():
        try:
            ok, detail = True, run_check(subject)
        except Wrong as wrong:
            ok, detail = False, str(wrong)
        except Exception as error:  # of the user's model: no traceback, and the other checks go on
            ok, detail = False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        rows.append({"check": name, "ok": ok, "detail": detail})
        say(rows[-1])
    torch.set_rng_state(state)
    return rows


def run(args: argparse.Namespace) -> int:
    """Check a model: a line a check, exit code 1 where one fails."""
    name, fields = _named(args.words)
    config = model_config(name, fields)

    def say(row: dict[str, Any]) -> None:
        print(f"{'ok   ' if row['ok'] else 'WRONG'} {row['check']:14s} {row['detail']}", flush=True)

    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in registry.build(config).parameters())
    if count >= MANY and not args.json:
        print(f"{name} has {count / 1e6:.0f} million parameters: this takes minutes, a small size checks the same code")
    rows = check(config, (lambda row: None) if args.json else say)
    wrong = sum(not row["ok"] for row in rows)
    if args.json:
        print(json.dumps([{"model": name, **row} for row in rows], indent=1))
    else:
        print(f"{name}: {f'{wrong} of {len(rows)} checks failed' if wrong else f'all {len(rows)} checks passed'}")
    return 1 if wrong else 0


def _named(words: Sequence[str]) -> tuple[str, list[str]]:
    """The model that `NAME` or `model=NAME` chooses, and the fields to set, after plug-ins were imported."""
    names, overrides = split_arguments(words)
    overrides = load_plugins(overrides)
    names += [text.removeprefix("model=") for text in overrides if text.startswith("model=")]
    if len(names) != 1:
        raise InputError(f"check needs one model, not {names or 'none'}; choices: {', '.join(registry.presets())}")
    return names[0], [text for text in overrides if not text.startswith("model=")]
