"""lamabench.models from Python."""

import json
import subprocess
import sys
from dataclasses import dataclass, make_dataclass, replace

import pytest
import torch
from lamabench.harness.measure.cost import cost
from lamabench.kernels.errors import InputError
from lamabench.models import Backbone, Preset, create_model, list_models, register
from lamabench.models.registry import SHAPE, build, describe, families, preset, presets

PROBE = """
import json, sys
import lamabench.models as models
imports = [sorted(name for name in sys.modules if name.startswith(("torch", "lamabench.")))]
assert models.Mixer and models.Backbone
imports.append(sorted(name for name in sys.modules if name.startswith("lamabench.baselines")))
imports.append(models.list_models("dit_s_*"))
print(json.dumps(imports))
"""


def test_importing_models_imports_nothing_else():
    answer = subprocess.run([sys.executable, "-I", "-c", PROBE], capture_output=True, text=True, check=True)
    first, baselines, models = json.loads(answer.stdout)
    assert first == ["lamabench.models"]
    assert baselines == []
    assert models == ["dit_s_2", "dit_s_4", "dit_s_8"]


def test_list_models():
    assert list_models() == list(presets())
    assert list_models("*_nano") == ["lamamba_nano", "dit_nano", "dit_modern_nano", "unet_nano", "uvit_nano"]
    assert list_models("vit*") == []


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("lamamba_nano", "d_state", 4),
        ("dit_nano", "depth", 1),
        ("dit_nano", "rope", True),
        ("unet_nano", "num_heads", 2),
        ("uvit_nano", "depth", 3),
    ],
)
def test_create_model_is_the_preset_with_changed_fields(name, field, value):
    torch.manual_seed(3)
    net = create_model(name, **{field: value})
    torch.manual_seed(3)
    other = build(replace(preset(name).config, **{field: value})).state_dict()
    assert getattr(net.config, field) == value
    assert net.state_dict().keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in net.state_dict().items())


BAD = [
    (("lamamba_q", {}), r"unknown model 'lamamba_q' \(did you mean"),
    (("dit_nano", {"d_state": 4}), "unknown field of dit_nano 'd_state'.*choices: input_size"),
    (("lamamba_nano", {"d_state": "4"}), "d_state of lamamba_nano must be of type int, not '4'"),
    (("lamamba_nano", {"depths": [1, "2", 1]}), "an item of depths of lamamba_nano must be of type int, not '2'"),
    (("unet_nano", {"out_channels": 1.5}), r"out_channels of unet_nano must be of type int \| None, not 1.5"),
    (("dit_nano", {"depth": True}), "depth of dit_nano must be of type int, not True"),
    (("lamamba_nano", {"window_size": 3}), "window_size 3 does not divide"),
    (("dit_nano", {"pretrained": "none.safetensors"}), "no such file or folder: none.safetensors"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_errors_are_one_line(call, message):
    name, settings = call
    with pytest.raises(InputError, match=message) as caught:
        create_model(name, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", list_models("*_nano"))
def test_out_channels_sets_the_head(name):
    x, t, y = torch.randn(2, 1, 16, 16), torch.tensor([0.0, 998.5]), torch.tensor([1, 2])
    plain, three = create_model(name), create_model(name, out_channels=3)
    assert plain(x, t, y).shape == (2, 2, 16, 16) and three(x, t, y).shape == (2, 3, 16, 16)
    more = cost(three.config)
    assert more.params > cost(plain.config).params and more.macs > cost(plain.config).macs
    assert describe(plain.config)["out_channels"] == 2 and describe(three.config)["out_channels"] == 3
    with pytest.raises(InputError, match="out_channels must be 1 or more, or null, not 0"):
        create_model(name, out_channels=0)


@pytest.mark.parametrize("name", list_models("*_nano"))
def test_a_model_may_be_of_bfloat16_throughout(name):
    """Weights, images and output, without autocast; beside float32 with the same weights."""
    torch.manual_seed(0)
    net = create_model(name).to(torch.bfloat16)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    size = net.config.input_size
    x, t, y = torch.randn(2, net.config.in_channels, size, size).bfloat16(), torch.tensor([5.0, 700.0]), torch.arange(2)
    out = net(x, t, y)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16 and all(p.grad is not None for p in net.parameters() if p.requires_grad)
    wide = net.float()(x.float(), t, y)
    assert (out.float() - wide).norm() < 0.03 * wide.norm()


@pytest.mark.parametrize("name", ["lamamba_nano", "dit_nano", "uvit_nano"])
def test_images_of_another_shape_are_refused_in_one_line(name):
    net, t, y = create_model(name), torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    size = net.config.input_size
    for shape in ((1, size, 2 * size), (3, size, size), (1, size // 2, size // 2)):
        words = rf"takes images of 1 × {size} × {size} .*, not {' × '.join(map(str, shape))}$"
        with pytest.raises(InputError, match=words):
            net(torch.zeros(2, *shape), t, y)


def test_names_of_families_do_not_collide(registered):
    config = make_dataclass("Config", [(name, int, 1) for name in SHAPE])
    net = type("Net", (Backbone,), {})
    for family, models, message in (
        ("dit", [], "family 'dit' is registered already, by .*DiT"),
        ("mine", [Preset("dit_nano", "", config(), "")], "model 'dit_nano' is registered already, by dit"),
        ("mine", [Preset("a", "", config(), "")] * 2, "model 'a' is registered already, by mine"),
    ):
        with pytest.raises(InputError, match=message):
            register(family, config, net, models)
    assert "mine" not in families()

    @dataclass
    class Small:
        input_size: int = 1

    with pytest.raises(InputError, match="Small must be a dataclass with the fields in_channels, num_classes, out_ch"):
        register("mine", Small, net, [])
    register("mine", config, net, [Preset("a", "A", config(), "")])
    register("mine", config, net, [Preset("b", "B", config(), "")])  # a notebook cell that ran twice
    assert list_models("[ab]") == ["b"]
