"""LaMamba-Diff's training files and the options of its YAML. The golden files have the released code's outputs."""

import argparse
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from lamabench.kernels.errors import InputError
from lamabench.models import released
from safetensors import safe_open
from torch import Tensor, nn

from .originals import ROUNDING, error

GOLDEN = Path(__file__).parents[2] / "golden"


def lamamba(name: str) -> tuple[dict[str, str], dict[str, Tensor], dict[str, Tensor]]:
    """A golden file of the released code: what it says of its sizes, its state dict, inputs and output."""
    with safe_open(GOLDEN / f"lamamba_tiny_{name}.safetensors", "pt") as file:
        meta, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    state = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    return meta, state, tensors


def vssm(meta: dict[str, str], **more: Any) -> dict[str, Any]:
    options = {"PATCH_SIZE": 1, "WINDOW_SIZE": int(meta["window_size"]), "EMBED_DIM": int(meta["dim"])}
    options |= {"SSM_D_STATE": int(meta["d_state"]), "CONTINUOUS_SCAN": meta["scan"] == "continuous"}
    options |= {"SSM_FORWARDTYPE": "v2", "SSM_CONV_BIAS": False, "DOWNSAMPLE": "v1", "IN_CHANS": 4, **more}
    return {"MODEL": {"TYPE": "LaMamba-Diff", "VSSM": options}}


def exact(net: nn.Module, tensors: dict[str, Tensor]) -> float:
    return error(net(tensors["input.x"], tensors["input.t"], tensors["input.y"]), tensors["output"])


@pytest.mark.parametrize("name", ["continuous", "cross"])
def test_lamamba_with_its_yaml(tmp_path, name):
    meta, state, tensors = lamamba(name)
    torch.save(state, tmp_path / "0400000.pt")
    with pytest.raises(InputError, match=r"does not tell scan \(its YAML tells that.*--config FILE.yaml"):
        released.load(tmp_path / "0400000.pt")
    (tmp_path / "any.yaml").write_text(yaml.safe_dump(vssm(meta)), encoding="utf-8")
    weights = released.load(tmp_path / "0400000.pt")
    assert exact(weights.net.eval(), tensors) < ROUNDING
    assert weights.notes == [f"options are those in {tmp_path / 'any.yaml'}"]
    (tmp_path / "other.yaml").write_text("a: 1", encoding="utf-8")  # which of two?
    with pytest.raises(InputError, match="does not tell scan"):
        released.load(tmp_path / "0400000.pt")
    named = released.load(tmp_path / "0400000.pt", settings_path=tmp_path / "any.yaml")
    assert named.net.config == weights.net.config


def test_lamamba_training_file_needs_neither_yacs_nor_a_yaml(tmp_path, monkeypatch):
    meta, state, tensors = lamamba("cross")
    module = ModuleType("yacs.config")
    node = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    module.CfgNode = node  # type: ignore[attr-defined]
    config = node(
        {
            key: node({k: node(v) if isinstance(v, dict) else v for k, v in one.items()})
            for key, one in vssm(meta).items()
        }
    )
    config.__dict__["__immutable__"] = True
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        args = argparse.Namespace(num_heads=[4] * 4, image_size=64, opts=None)
        live = {name: value + 1 for name, value in state.items()}
        torch.save({"model": live, "ema": state, "opt": {}, "args": args, "config": config}, tmp_path / "0000010.pt")
    assert "yacs" not in sys.modules
    assert exact(released.load(tmp_path / "0000010.pt").net.eval(), tensors) < ROUNDING


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"SSM_ACT_LAYER": "gelu"}, "SSM_ACT_LAYER gelu is not in lamabench; choices: silu"),
        ({"MLP_ACT_LAYER": "relu"}, "MLP_ACT_LAYER relu is not in lamabench; choices: gelu"),
        ({"SSM_FORWARDTYPE": "v2noz"}, "SSM_FORWARDTYPE v2noz is not in lamabench; choices: v31d"),
        ({"DOWNSAMPLE": "v2"}, "DOWNSAMPLE v2 is not in lamabench; choices: v1"),
        ({"SSM_D_STATE": 16}, "d_state .*, but SSM_D_STATE is 16 in .*any.yaml: it is of another training"),
        ({"SSM_ACT": "silu"}, "unknown option of MODEL.VSSM in .*any.yaml 'SSM_ACT' .*choices: SSM_ACT_LAYER"),
    ],
)
def test_lamamba_options_that_no_parameter_shows(tmp_path, options, message):
    meta, state, _ = lamamba("cross")
    torch.save(state, tmp_path / "a.pt")
    (tmp_path / "any.yaml").write_text(yaml.safe_dump(vssm(meta, **options)), encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        released.load(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)
