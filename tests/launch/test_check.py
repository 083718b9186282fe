"""`lamabench check` passes correct models. Each model with one fault fails the check that is made for it."""

import json
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from lamabench.baselines.adm import ADMConfig
from lamabench.baselines.dit import DiT, DiTConfig
from lamabench.launch.cli import main
from lamabench.launch.commands.check import CHECKS, check
from lamabench.models import Preset, register
from lamabench.models.lamamba import LaMambaConfig
from torch import nn

TINY = DiTConfig(4, 1, 3, patch_size=2, hidden_size=16, depth=1, num_heads=2)
RIGHT: dict[str, Any] = {
    "dit": TINY,
    "lamamba": LaMambaConfig(
        input_size=4, in_channels=1, num_classes=3, dim=8, depths=[1], num_heads=2, window_size=2, d_state=2,
        layout="isotropic", mixers=["ssm", "window", "global", "conv"],
    ),
    "adm": ADMConfig(4, 1, 3, 64, 1, [1], [], num_head_channels=16, null_class=True),
    "adm without labels": ADMConfig(4, 1, 0, 64, 1, [1], [], num_head_channels=16),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_registered_models_pass(name):
    rows = check(RIGHT[name])
    assert [row["check"] for row in rows] == list(CHECKS)
    assert all(row["ok"] for row in rows), rows


class HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, *gradients):
        return 0.99 * gradients[0]


@dataclass
class FaultyConfig(DiTConfig):
    fault: str = ""


class Faulty(DiT):
    """DiT with one fault."""

    def __init__(self, config: FaultyConfig) -> None:
        super().__init__(config)
        self.extra = nn.Parameter(torch.ones(1)) if config.fault == "dead parameter" else None
        if config.fault == "seed":
            self.t_embedder.mlp[0].weight.data.normal_(generator=self.generator)
        self.calls = 0

    generator = torch.Generator()

    @property
    def null_class(self):
        return {"null is a label": 0, "null is none of its rows": 7}.get(self.config.fault, self.config.num_classes)

    def run_block(self, block, *inputs):
        fault = self.config.fault
        if fault == "no checkpoints":
            return block(*inputs)
        if fault == "checkpoints" and self.checkpointing and self.training:
            return 1.001 * super().run_block(block, *inputs)
        return super().run_block(block, *inputs)

    def forward(self, x, t, y):
        fault = self.config.fault
        if fault == "time":
            t = torch.zeros_like(t)
        if fault == "label":
            y = torch.where(y == 3, y, 0)
        if fault == "labels alike":
            y = torch.zeros_like(y)
        out = super().forward(x, t, y)
        if fault == "shape":
            return out[:, :1]
        if fault == "odd batch":
            return out[: len(out) // 2 * 2]
        if fault == "not finite":
            return out / 0
        if fault == "neighbours":
            return out + 1e-3 * out.mean(dim=0)
        if fault == "neighbours in training" and self.training:
            return out - 0.1 * out.mean(dim=0, keepdim=True)
        if fault == "noise":
            return out + 1e-6 * torch.randn_like(out)
        if fault == "state":
            self.calls += 1
            return out + self.calls
        if fault == "cost":
            return torch.special.erfinv(torch.tanh(out) / 2)
        if fault == "gradient":
            return HalfGradient.apply(out)
        if fault == "float32":
            return out.float()
        if fault == "half":
            return out.half().to(out.dtype) if out.dtype == torch.float32 else out
        if fault == "bfloat16" and torch.is_autocast_enabled("cpu"):
            raise RuntimeError("no kernel for BFloat16")
        if fault == "break":
            torch._dynamo.graph_break()
        if fault == "compiled" and torch.compiler.is_compiling():
            return 1.01 * out
        return out


FAULTS = [
    ("shape", "shapes", r"a batch of 1 gives \[1, 1, 4, 4\], not \[1, 2, 4, 4\]"),
    ("odd batch", "shapes", r"a batch of 1 gives \[0, 2"),
    ("not finite", "shapes", "of which 32 values are not finite"),
    ("seed", "determinism", "t_embedder.mlp.0.weight differs when built again from the same seed"),
    ("noise", "determinism", "a pass in training draws random numbers"),
    ("state", "determinism", "two passes in training over the same batch differ"),
    ("time", "conditions", "the output does not depend on t"),
    ("label", "conditions", "the output does not depend on y"),
    ("labels alike", "conditions", "the output does not depend on y"),
    ("null is a label", "conditions", "null_class is 0: it must be 3"),
    ("null is none of its rows", "conditions", "null_class is 7"),
    ("neighbours", "independence", "in training an image's output depends on its neighbours"),
    ("neighbours in training", "independence", "in training an image's output depends on its neighbours"),
    ("cost", "cost", "Faulty calls aten::(special_)?erfinv, whose cost is not known: give Faulty own_macs"),
    ("no checkpoints", "checkpointing", "checkpointing saves no memory"),
    ("checkpoints", "checkpointing", "differs with checkpointing"),
    ("half", "precision", "off by .* in float32"),
    ("bfloat16", "precision", "RuntimeError: no kernel for BFloat16"),
    ("break", "compile", "does not compile it into one graph"),
    ("compiled", "compile", "differs when compiled"),
    ("gradient", "gradients", r"the gradient of .* along a line is .*, by finite differences"),
    ("dead parameter", "gradients", "extra has no gradient"),
]


@pytest.fixture
def faulty(registered):
    register("faulty", FaultyConfig, Faulty, [Preset("faulty", "Faulty", FaultyConfig(**vars(TINY)), "ours")])


@pytest.mark.parametrize(("fault", "name", "message"), FAULTS, ids=[fault for fault, *_ in FAULTS])
def test_a_fault_is_named_by_its_check(faulty, monkeypatch, fault, name, message):
    """Only that check runs: to compile each faulty model, which one check does, would take most of the time."""
    monkeypatch.setattr("lamabench.launch.commands.check.CHECKS", {name: CHECKS[name]})
    (row,) = check(FaultyConfig(**vars(TINY), fault=fault))
    assert row["check"] == name and not row["ok"]
    assert re.search(message, row["detail"]), row["detail"]
    assert "\n" not in row["detail"]


def test_a_module_that_computes_in_float32_passes(faulty):
    assert all(row["ok"] for row in check(FaultyConfig(**vars(TINY), fault="float32")))


def test_the_command(faulty, capsys):
    assert main(["check", "faulty"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CHECKS) + 1 and lines[-1] == f"faulty: all {len(CHECKS)} checks passed"
    assert main(["check", "model=faulty", "fault=shape", "depth=1", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [row["check"] for row in rows] == list(CHECKS)
    assert {row["model"] for row in rows} == {"faulty"}


def test_an_exception_of_the_users_code_is_one_line_that_names_its_place(registered, tmp_path, capsys):
    source = """
from lamabench.baselines.dit import DiT, DiTConfig
from lamabench.models import Preset, register


class MyConfig(DiTConfig):
    pass


class Mine(DiT):
    def __init__(self, config):
        super().__init__(config)
        if config.depth == 2:
            raise RuntimeError("not two of them")

    def forward(self, x, t, y):
        return super().forward(x.flatten(1), t, y)


register("mine", MyConfig, Mine, [Preset("mine", "Mine", MyConfig(4, 1, 3, 2, 16, 1, 2), "ours")])
"""
    (tmp_path / "my_file.py").write_text(source)
    words = ["check", "mine", f"plugins=[{tmp_path / 'my_file.py'}]"]
    assert main([*words, "depth=2"]) == 1
    line, end = capsys.readouterr().out.splitlines()
    assert line.split(maxsplit=2) == ["WRONG", "build", "RuntimeError: not two of them (my_file.py, line 14)"]
    assert end == "mine: 1 of 1 checks failed"
    assert main(words) == 1
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("WRONG shapes") and first.endswith("(my_file.py, line 17)")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "check needs one model, not none; choices: lamamba_t"),
        (["dit_nano", "model=unet_nano"], "check needs one model"),
        (["dit_nan"], "unknown model 'dit_nan'"),
        (["dit_nano", "depht=1"], "unknown key 'depht'"),
    ],
)
def test_bad_arguments_are_one_line(words, message, capsys):
    assert main(["check", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
