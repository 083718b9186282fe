"""An operator needs a folder and a name in `kernels.NAMES`. Commands, counts, floors, checks and benchmarks follow."""

import json
import subprocess
import sys

import pytest
import torch
from lamabench.kernels import OPERATORS
from lamabench.kernels.operator import Backend, Operator, Work

# A folder like those of the suite: doubling by its own torch operator, a wrong backend, and yardsticks, two of them
# wrong once there are many images.
FOLDER = """
import torch

from ..operator import Backend, Operator, Work, Yardstick


@torch.library.custom_op("toy::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


doubled.register_fake(lambda x: x.new_empty(x.shape))
doubled.register_autograd(lambda ctx, grad: grad * 2)


class Halves:
    def __init__(self, weights, x):
        self.weights, self.x = weights, x

    def forward(self):
        return [self.x + self.x]

    def both(self):
        return [*self.forward(), 2 * self.weights.to(self.x)]

    def results(self, returned):
        return returned


class Lost(Halves):
    def forward(self):
        return [self.x + self.x * (len(self.x) < 3)]


class Flat(Halves):
    def both(self):
        return [*self.forward(), 2 * self.weights.to(self.x) * (len(self.x) < 3)]


def work(x):
    return Work(macs=3 * x.numel(), exponentials=x.numel())


def reference(x):
    return x + x


OPERATOR = Operator(
    "toy",
    [Backend("own", doubled), Backend("wrong", lambda x: x * 2.01), Backend("reference", reference)],
    work,
    traced={"toy::doubled": work},
    rival=lambda x: 2 * x,
    yardsticks=[Yardstick(kind.__name__, kind, limit=1e-6) for kind in (Halves, Lost, Flat)],
)


def toy(x, backend="auto"):
    return OPERATOR.resolve(backend, x.device.type).run(x)
"""

# The code of somebody with such a folder: its name in one place, and a backbone that calls it.
SCRIPT = """
import json, sys
import lamabench.kernels as kernels

kernels.NAMES += ("toy",)
kernels.__path__.append(sys.argv[1])

from dataclasses import dataclass
from torch import nn
from lamabench.harness.sections import BenchConfig, BackendConfig
from lamabench.harness.measure import check, operators
from lamabench.harness.measure.cost import cost
from lamabench.kernels.toy import toy
from lamabench.models.registry import Backbone, PaperSum, build, register, select_backends


@dataclass
class ToyConfig:
    input_size: int = 4
    in_channels: int = 2
    num_classes: int = 3
    out_channels: int | None = None


class Doubling(nn.Module):
    def __init__(self):
        super().__init__()
        self.operators = {"toy": "auto"}

    def forward(self, x):
        return toy(x, self.operators["toy"])

    def own_macs(self, x):
        return 3 * x.numel()


class Toy(Backbone):
    paper_sum = PaperSum(0, 0, 0)

    def __init__(self, config):
        super().__init__()
        self.config, self.conv, self.doubling = config, nn.Conv2d(2, 4, 1), Doubling()

    def forward(self, x, t, y):
        return self.doubling(self.conv(x))


register("toy", ToyConfig, Toy, [])
config = ToyConfig()
answer = {"macs": cost(config).macs, "choices": vars(BackendConfig(toy="wrong"))}
settings = BenchConfig(batch_size=[4], repeats=1, precision="float32", modes=["forward", "train"])
rows = []
try:
    rows += (row for row in operators.bench_operators(config, settings, BackendConfig(), "cpu"))
except check.WrongOutput as error:
    answer["wrong"] = str(error)
answer["rows"] = [{k: row.get(k) for k in ("backend", "pass", "state", "error", "p50_ms", "error_of")} for row in rows]
net = build(config)
exact = check.reference(net, "float32", "cpu").backends
answer["own"] = check.check_operators(net, select_backends(net, {"toy": "own"}, "cpu"), exact, "float32", "cpu")
try:
    check.check_operators(net, select_backends(net, {"toy": "wrong"}, "cpu"), exact, "float32", "cpu")
except check.WrongOutput as error:
    answer["check"] = str(error)
(one, _), = operators.pairs_of(net, 2, "float32", "cpu")
answer["needs"] = operators.needs(one, 0, False)
print(json.dumps(answer))
"""


def test_a_name_in_one_place_is_enough(tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "__init__.py").write_text(FOLDER)
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path)]
    outcome = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    answer = json.loads(outcome.stdout)
    values = 4 * 4 * 4  # of the tensor that is doubled
    assert answer["choices"]["toy"] == "wrong"
    assert answer["macs"] == values * 2 + 3 * values  # of the convolution, then of the operator
    assert answer["needs"] == {"call_bytes": 2 * values * 4, "call_exponentials": 2 * values, "call_flops": 12 * values}
    rows = [(row["backend"]["toy"], row["pass"], row["state"], row["p50_ms"] is not None) for row in answer["rows"]]
    passes = ("forward", "forward+backward")
    expected = [("own", "done", True), ("wrong", "wrong", False), ("Halves", "done", True), ("Lost", "wrong", False)]
    expected = [(name, when, state, timed) for name, state, timed in expected for when in passes]
    assert rows == [*expected, ("Flat", "forward", "done", True), ("Flat", "forward+backward", "wrong", False)]
    assert "toy=wrong" in answer["wrong"] and answer["rows"][5]["error_of"] == "output and x"
    flat = answer["rows"][-1]["error"]
    assert flat.startswith("what was timed: output and gradient of x off by") and "limit 1e-06" in flat
    assert answer["own"] < 1e-6
    assert answer["check"].startswith("toy=wrong: output off by 5.0e-03, plain torch by")


def test_a_watcher_sees_every_call_and_leaves_nothing_behind():
    seen = []
    first, second = Backend("first", lambda x: x + 1), Backend("reference", lambda x: x + 2)
    operator = Operator("watched", [first, second], lambda x: Work(macs=x))
    assert operator.resolve("auto", "cpu") is first and operator.arguments == ["x"]
    with operator.watched(seen.append):
        assert operator.resolve("auto", "cpu").run(1) == 2 and operator.resolve("reference", "cpu").run(5) == 7
        assert operator.resolve("auto", "cpu").name == "first"
        with operator.watched(lambda x: seen.append(-x)):
            operator.resolve("auto", "cpu").run(3)
        operator.resolve("auto", "cpu").run(4)
    assert seen == [1, 5, -3, 4]
    assert operator.resolve("auto", "cpu") is first and operator.resolve("reference", "cpu") is second
    with pytest.raises(RuntimeError, match="stop"), operator.watched(seen.append):
        raise RuntimeError("stop")
    assert operator.resolve("auto", "cpu") is first


@pytest.mark.parametrize("name", OPERATORS)
def test_a_compiled_call_is_one_graph(name):
    """The graph has the cached backend, also after watching."""
    operator = OPERATORS[name]
    with operator.watched(lambda *args: None):
        watched = operator.resolve("auto", "cpu")
    backend = operator.resolve("auto", "cpu")
    assert watched.run is not backend.run and backend is operator.backends[backend.name]
    torch.compiler.reset()
    traced = torch.compile(lambda x: x + len(operator.resolve("auto", "cpu").name), fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(torch.zeros(1)), torch.tensor([float(len(backend.name))]))


def test_exact_backends_of_models_and_of_single_calls():
    """The reference, or its replacement for many tokens, which for single calls is plain torch in float64."""
    for operator in OPERATORS.values():
        assert operator.exact in operator.backends
        assert operator.exact_alone("reference") is operator.backends["reference"].run
    scan, attention = OPERATORS["selective_scan"], OPERATORS["attention"]
    assert scan.exact_alone(scan.exact) is scan.backends["torch"].run
    assert attention.exact_alone(attention.exact) is not attention.backends["sdpa"].run
