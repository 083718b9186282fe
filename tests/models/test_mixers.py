"""Entries of `mixers`: their mixers, their stages, and errors for bad entries."""

import copy
from dataclasses import dataclass, fields, replace
from typing import Literal

import pytest
import torch
from lamabench.ablations.study import Study
from lamabench.harness.measure.cost import cost
from lamabench.kernels.errors import InputError
from lamabench.launch.compose import compose, model_config
from lamabench.models import Mixer, create_model, register_mixer
from lamabench.models.lamamba import SHARED, LaMamba, LaMambaConfig
from lamabench.models.mixers import MIXERS, ConvMixer
from lamabench.models.mixers.scan import SS2D
from lamabench.models.registry import describe, from_dict, preset, presets
from torch import nn

TINY = LaMambaConfig(
    input_size=8, in_channels=2, num_classes=3, dim=8, depths=[1, 2, 1], bottleneck_depth=1, num_heads=2,
    window_size=2, d_state=2,
)  # fmt: skip


def kinds(blocks):
    return [[type(mixer).__name__ for mixer in block.mixers] for block in blocks]


def test_an_entry_overrides_and_the_model_sets_the_rest():
    config = replace(TINY, mixers=[{"kind": "window", "size": 4}, "window", {"kind": "ssm", "d_state": 3}, "ssm"])
    four, two, three, shared = LaMamba(config).encoder[0].blocks[0].mixers
    assert (four.window, four.heads, two.window, two.heads) == (4, 2, 2, 2)
    assert (three.d_state, shared.d_state) == (3, 2)
    config = replace(config, window_size=8, num_heads=4, d_state=5)
    four, eight, three, five = LaMamba(config).encoder[0].blocks[0].mixers
    assert (four.window, four.heads, eight.window, eight.heads) == (4, 4, 8, 4)
    assert (three.d_state, five.d_state) == (3, 5)


def test_a_scan_with_paths_of_its_own_needs_no_pairs():
    class Upwards(SS2D):
        def keep_paths(self, scan, side):
            order = torch.arange(side * side).flip(0)[None]
            self.register_buffer("order", order, persistent=False)
            self.register_buffer("inverse", order.argsort(dim=1), persistent=False)

    settings = {"dim": 4, "side": 2, "d_state": 1, "scan": "unidirectional", "ratio": 1, "conv_bias": True}
    upwards, downwards = Upwards(**settings), SS2D(**settings)
    upwards.load_state_dict(downwards.state_dict())
    for net in (upwards, downwards):
        torch.nn.init.zeros_(net.conv2d.weight)
        net.conv2d.weight.data[:, :, 1, 1] = 1  # the convolution mixes nothing
    x = torch.randn(1, 2, 2, 4)
    torch.testing.assert_close(upwards(x), downwards(x.flip(1, 2)).flip(1, 2))


def test_every_shared_field_is_a_setting_of_a_mixer():
    settings = {f.metadata.get("model", f.name) for kind in ("ssm", "window", "global") for f in fields(MIXERS[kind])}
    assert settings == set(SHARED) and set(SHARED) <= {f.name for f in fields(LaMambaConfig)}


SPELLINGS = [
    ({"window_size": 4}, {"mixers": ["ssm", {"kind": "window", "size": 4}]}),
    ({"d_state": 5}, {"mixers": [{"kind": "ssm", "d_state": 5}, "window"]}),
    ({"d_state": 5}, {"d_state": 7, "mixers": [{"d_state": 5, "kind": "ssm"}, "window"]}),
    ({}, {"mixers": [["ssm", "window"]] * 3}),
    ({}, {"mixers": ["ssm", "none", "window"]}),
    ({"mixers": []}, {"mixers": ["none"], "num_heads": 4, "scan": "cross"}),
    ({"mixers": ["ssm"]}, {"mixers": "ssm", "window_size": 4}),
    ({"mixers": ["window"], "shift": False}, {"mixers": {"kind": "window", "shift": False}}),
    ({}, {"out_channels": 4}),
]


@pytest.mark.parametrize(("one", "other"), SPELLINGS)
def test_two_spellings_of_one_network_have_one_description(one, other):
    one, other = replace(TINY, **one), replace(TINY, **other)
    assert describe(one) == describe(other)
    torch.manual_seed(0)
    first = LaMamba(one).state_dict()
    torch.manual_seed(0)
    second = LaMamba(other).state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "change", [{"d_state": 4}, {"window_size": 4}, {"num_heads": 4}, {"shift": False}, {"out_channels": 2},
               {"mixers": ["window", "ssm"]}, {"mixers": [["ssm", "window"], ["ssm", "window"], ["ssm"]]}],
)  # fmt: skip
def test_other_networks_have_other_descriptions(change):
    assert describe(replace(TINY, **change)) != describe(TINY)


def test_the_description_is_complete_and_plain():
    plain = describe(replace(TINY, mixers=["ssm", {"kind": "window", "size": 4}, "global", "conv", "ssd"]))
    assert plain["mixers"] == [
        {"kind": "ssm", "d_state": 2, "scan": "continuous", "ssm_ratio": 2, "conv_bias": False},
        {"kind": "window", "size": 4, "num_heads": 2, "shift": True, "relative_bias": True},
        {"kind": "global", "num_heads": 2},
        {"kind": "conv"},
        {"kind": "ssd", "d_state": 64, "head_dim": 64, "scan": "continuous", "ssm_ratio": 2, "conv_bias": False},
    ]
    assert plain["family"] == "lamamba" and plain["out_channels"] == 4
    composed = {f.name for f in fields(LaMambaConfig)}
    assert plain.keys() == (composed - set(SHARED) - {"dropout"}) | {"family"}  # no dropout is as before it was a field
    assert describe(replace(TINY, dropout=0.1))["dropout"] == 0.1
    stages = describe(replace(TINY, mixers=[["ssm"], [], ["conv"]]))["mixers"]
    assert [[mixer["kind"] for mixer in stage] for stage in stages] == [["ssm"], [], ["conv"]]


@pytest.mark.parametrize("name", presets())
def test_a_description_makes_the_same_network_again(name):
    plain = describe(preset(name).config)
    assert describe(from_dict(plain)) == plain


def test_the_decoder_has_the_lists_of_its_twins_and_the_middle_the_last():
    net = LaMamba(replace(TINY, mixers=[["conv"], ["ssm", "conv"], ["global"]]))
    first, second, third = ["ConvMixer"], ["SS2D", "ConvMixer"], ["GlobalAttention"]
    assert [kinds(stage.blocks) for stage in net.encoder] == [[first], [second] * 2, [third]]
    assert kinds(net.middle) == [third]
    assert [kinds(stage.blocks) for stage in net.decoder] == [[third] * 2, [second] * 3, [first] * 2]
    stack = LaMamba(replace(TINY, layout="isotropic", mixers=[["conv"], ["ssm", "conv"], ["global"]]))
    assert [kinds(stage.blocks) for stage in stack.encoder] == [[first, second, second, third]]


def test_attention_at_low_resolutions_costs_what_its_stages_cost():
    """Scores and values of global attention: 2 · L² · C a block; stages of 8 and 4 tokens a side, 8 and 16 wide."""
    net = replace(TINY, depths=[1, 1, 1], mixers=[["conv"], ["conv"], ["global"]])
    projections = {stage: 4 * tokens * dim * dim for stage, tokens, dim in ((0, 64, 8), (2, 16, 16))}
    scores = {stage: 2 * tokens**2 * dim for stage, tokens, dim in ((0, 64, 8), (2, 16, 16))}
    counted = cost(net).parts["attention"].macs
    assert counted == 4 * (projections[2] + scores[2])  # encoder, middle, two blocks in the decoder
    everywhere = cost(replace(net, mixers=["global"])).parts["attention"].macs
    assert everywhere - counted == 3 * (projections[0] + scores[0]) + 3 * (projections[2] + scores[2])


def test_a_window_must_divide_only_the_grids_of_its_stages():
    with pytest.raises(
        InputError, match=r"window_size 8 does not divide the 12 × 12 grid.*choices: \[1, 2, 3, 4, 6, 12\]"
    ):
        replace(TINY, input_size=24, mixers=[["window"], ["window"], ["window"]], window_size=8)
    config = replace(TINY, input_size=24, mixers=[["window"], ["ssm"], ["ssm"]], window_size=8)
    assert LaMamba(config).encoder[0].blocks[0].mixers[0].window == 8


BAD = [
    (["ssm", "mamba"], "unknown mixer 'mamba'; choices: window, global, conv, ssm, ssd, none"),
    ([{"kind": "windw"}], r"unknown mixer 'windw' \(did you mean 'window'\?\); choices: window"),
    ([{"kind": "window", "sizes": 4}], r"unknown setting of mixer window 'sizes' \(did you mean 'size'.*num_heads"),
    ([{"kind": "window", "size": "4"}], "size of mixer window must be of type int, not '4'"),
    ([{"kind": "window", "size": True}], "size of mixer window must be of type int, not True"),
    ([{"kind": "ssm", "conv_bias": 1}], "conv_bias of mixer ssm must be of type bool, not 1"),
    ([{"kind": "ssm", "scan": "snake"}], "unknown scan 'snake'; choices: continuous"),
    ([{"kind": "ssm", "d_state": 0}], "d_state must be 1 or more, not 0"),
    ([{"kind": "window", "size": 3}], r"window_size 3 does not divide the 8 × 8 grid.*choices: \[1, 2, 4, 8\]"),
    ([{"kind": "global", "num_heads": 3}], r"num_heads 3 does not divide dim 8; choices: \[1, 2, 4, 8\]"),
    ([{"kind": "ssd", "d_state": 0}], "d_state must be 1 or more, not 0"),
    ([{"kind": "ssd", "head_dim": 0}], "head_dim must be 1 or more, not 0"),
    ([{"kind": "ssd", "scan": "snake"}], "unknown scan 'snake'; choices: continuous"),
    ([{"kind": "conv", "kernel": 8}], "kernel must be odd and 1 or more, not 8"),
    ([{"kind": "conv", "kernel": -1}], "kernel must be odd and 1 or more, not -1"),
    ([{"size": 4}], "a mixer must be a kind or a mapping with a kind, not .*kinds: window, global"),
    ([None], "a mixer must be a kind.*not None"),
    ([{"kind": "none", "size": 4}], "unknown setting of mixer none 'size'"),
    (["ssm", ["window"]], "mixers must be a list of mixers, or a list for each stage, not"),
    ([["ssm"], ["window"]], "mixers has 2 lists for 3 stages: give one for each stage"),
]


@pytest.mark.parametrize(("mixers", "message"), BAD)
def test_a_bad_entry_is_one_line(mixers, message):
    with pytest.raises(InputError, match=message) as caught:
        replace(TINY, mixers=mixers)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"d_state": 0}, {"scan": "snake"}, {"window_size": 0}, {"num_heads": 0}])
def test_shared_fields_are_checked_even_if_no_mixer_reads_them(change):
    with pytest.raises(InputError, match=next(iter(change))):
        replace(TINY, mixers=["conv"], **change)


@pytest.mark.parametrize(
    ("word", "mixers"),
    [
        ("[ssm,{kind:window,size:4}]", ["ssm", {"kind": "window", "size": 4}]),
        ("[[ssm,window],[ssm,window],[ssm,global],[ssm,global]]", [["ssm", "window"]] * 2 + [["ssm", "global"]] * 2),
        ("ssm", ["ssm"]),
        ("{kind:window,size:4}", [{"kind": "window", "size": 4}]),
        ("[]", []),
    ],
)
def test_entries_on_a_command_line_and_in_a_study(word, mixers):
    composed, _ = compose([f"model.mixers={word}"])
    assert composed.model.mixers == mixers
    assert model_config("lamamba_s", [f"mixers={word}"]).mixers == mixers
    (variant,) = Study("s", "?", variants={"x": {"model.mixers": mixers}}).expand()
    assert compose(variant.overrides)[0].model.mixers == mixers


def test_variants_with_other_settings_have_other_names():
    axis = [["ssm"], [{"kind": "window", "size": 4}], [{"kind": "window", "num_heads": 4}], [["ssm"], ["global"]]]
    names = [variant.name for variant in Study("s", "?", axes={"model.mixers": axis}).expand()]
    assert names == ["ssm", "window.size4", "window.num_heads4", "ssm_global"]


def test_a_mixer_of_a_user(registered):
    @register_mixer("mine")
    @dataclass
    class Mine(Mixer):
        num_heads: int  # the model's
        mode: Literal["a", "b"] = "a"
        scale: float = 1.0

        def build(self, dim, side, shift):
            return ConvMixer(dim) if self.num_heads == 2 else nn.Identity()

    net = create_model("lamamba_nano", mixers=["mine", {"kind": "mine", "num_heads": 2, "scale": 2}])
    assert kinds(net.encoder[0].blocks) == [["Identity", "ConvMixer"]]
    assert describe(net.config)["mixers"] == [
        {"kind": "mine", "num_heads": 4, "mode": "a", "scale": 1.0},
        {"kind": "mine", "num_heads": 2, "mode": "a", "scale": 2.0},
    ]
    with pytest.raises(InputError, match="mode of mixer mine must be one of a, b, not 'c'"):
        replace(TINY, mixers=[{"kind": "mine", "mode": "c"}])


def test_kinds_do_not_collide(registered):
    for kind, message in (("window", "'window' is registered already, by .*WindowMixer"), ("none", "'none' is")):
        with pytest.raises(InputError, match=message):
            register_mixer(kind)(dataclass(type("Other", (Mixer,), {})))
    for wrong in (int, type("Plain", (), {})):
        with pytest.raises(InputError, match="must be a dataclass derived from"):
            register_mixer("mine")(wrong)
    mine = dataclass(type("Mine", (Mixer,), {}))
    register_mixer("mine")(mine)
    register_mixer("mine")(copy.copy(mine))  # a notebook cell that ran twice
    needs = dataclass(type("Needs", (Mixer,), {"__annotations__": {"size": int}}))
    register_mixer("needs")(needs)
    with pytest.raises(InputError, match=r"mixer needs needs size: write \{kind: needs, size: …\}"):
        replace(TINY, mixers=["needs"])


def test_a_setting_that_joins_later_is_left_out_at_its_since_value(registered):
    from dataclasses import field

    later = field(default=0, metadata={"since": 0})
    grown = dataclass(type("Grown", (Mixer,), {"__annotations__": {"extra": int}, "extra": later}))
    register_mixer("grown")(grown)
    assert describe(replace(TINY, mixers=["grown"]))["mixers"] == [{"kind": "grown"}]
    changed = describe(replace(TINY, mixers=[{"kind": "grown", "extra": 1}]))["mixers"]
    assert changed == [{"kind": "grown", "extra": 1}]
