"""The cost count against the papers, counts of the released code, fvcore and sums by hand."""

import json
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from lamabench.harness.measure.cost import PARTS, Count, cost
from lamabench.kernels.errors import InputError
from lamabench.launch.cli import main
from lamabench.models.lamamba import LaMambaConfig
from lamabench.models.mixers import SS2D
from lamabench.models.registry import build, preset, presets
from lamabench.reports import published
from torch import nn

PUBLISHED = published.read()
SAVINGS = [
    (row, side)
    for rows, side in ((PUBLISHED.imagenet_256, 32), (PUBLISHED.imagenet_512, 64))
    for row in rows
    if row.macs_vs_dit_xl2_percent
]
DIT = [row for row in PUBLISHED.steps_400k if row.model.startswith("DiT-")]
NAMES = {p.title: name for name, p in presets().items()} | {
    "LaMamba-Diff-XL d_state 16 (inferred)": "lamamba_xl",
    "LaMamba-Diff-XL d_state 1 (released file)": "lamamba_xl_release",
}


@cache
def at_size(name, size):
    return cost(replace(preset(name).config, input_size=size))


def of_preset(name):
    return at_size(name, preset(name).config.input_size)


@pytest.mark.parametrize("row", PUBLISHED.counted_from_released_code, ids=lambda r: f"{r.model}@{r.size}")
def test_counts_of_the_released_code(row):
    counted = at_size(NAMES[row.model], row.size)
    assert round(counted.params / 1e6, 3) == row.params_m
    assert round(counted.macs / 1e9, 3) == row.macs_g
    if row.paper_g is not None:
        # Within 0.02 %. A number that is printed with fewer digits (6.06) must agree after rounding.
        close = abs(counted.paper_gflops - row.paper_g) <= 2e-4 * row.paper_g
        assert close or round(counted.paper_gflops, 2) == row.paper_g


@pytest.mark.parametrize("row", DIT, ids=lambda r: r.model)
def test_table_of_the_dit_paper(row):
    counted = of_preset(NAMES[row.model])
    last_digit = 10 ** -len(str(row.macs_g).split(".")[1])
    assert abs(counted.paper_gflops - row.macs_g) <= max(0.01 * row.macs_g, last_digit)
    # The paper rounds parameters to millions (it prints 130.5 for B/2 as 130).
    assert abs(counted.params / 1e6 - row.params_m) <= 0.6


@pytest.mark.parametrize(("row", "side"), SAVINGS, ids=lambda one: str(one if isinstance(one, int) else one.model))
def test_the_saving_that_the_lamamba_paper_claims(row, side):
    lamamba, dit = at_size("lamamba_xl", side), at_size("dit_xl_2", side)
    saving = 100 * (lamamba.paper_gflops / dit.paper_gflops - 1)
    assert row.model == "LaMamba-Diff-XL" and saving == pytest.approx(row.macs_vs_dit_xl2_percent, abs=0.2)


def test_every_published_cost_is_compared():
    assert (len(PUBLISHED.counted_from_released_code), len(DIT), len(SAVINGS)) == (12, 12, 2)


@pytest.mark.parametrize(
    ("name", "params_m"), [("lamamba_s", 28.16), ("lamamba_s68", 31.65), ("lamamba_b", 136.34), ("lamamba_l", 478.1)]
)
def test_presets_that_no_paper_has(name, params_m):
    assert of_preset(name).params / 1e6 == pytest.approx(params_m, abs=0.05)


@pytest.mark.parametrize("name", presets())
def test_parts_add_up(name):
    counted = of_preset(name)
    assert tuple(counted.parts) == PARTS
    assert sum(p.macs for p in counted.parts.values()) == counted.macs
    assert sum(p.params for p in counted.parts.values()) == counted.params
    assert sum(p.flops for p in counted.parts.values()) == counted.flops


def test_nano_models_have_similar_sizes():
    sizes = [of_preset(name).params for name in ("lamamba_nano", "dit_nano", "unet_nano")]
    assert min(sizes) >= 0.5e6 and max(sizes) <= 3e6 and max(sizes) / min(sizes) < 1.25


def test_one_block_by_hand():
    """One stage with one block in the encoder and two in the decoder, only window attention, no bottleneck."""
    side, dim, window, classes = 8, 8, 4, 5
    config = LaMambaConfig(
        input_size=side, in_channels=2, num_classes=classes, dim=dim, depths=[1], bottleneck_depth=0, num_heads=2,
        window_size=window, mixers=["window"],
    )  # fmt: skip
    tokens, blocks = side * side, 3
    attention = blocks * (tokens * (3 * dim * dim + dim * dim) + 2 * tokens * window**2 * dim)
    mlp = blocks * tokens * 2 * dim * 4 * dim
    # Time embedder, adaLN of each block, the projection of the two decoder blocks, and both of these for the head.
    conditioning = 256 * dim + dim * dim + blocks * dim * 6 * dim + 2 * dim * dim + dim * dim + dim * 2 * dim
    rest = tokens * (2 * dim + dim * dim + dim * 4)  # stem, expansion, last Linear
    counted = cost(config)
    by_part = {name: part.macs for name, part in counted.parts.items() if part.macs}
    assert by_part == {"attention": attention, "mlp": mlp, "conditioning": conditioning, "rest": rest}
    # Normalised elements: two norms per block, stem and expansion are affine, the head's norm is not.
    affine, plain = tokens * dim * (2 * blocks + 2), tokens * dim
    assert counted.flops == 2 * counted.macs + 5 * affine + 4 * plain
    assert counted.paper_gflops * 1e9 == pytest.approx(counted.macs + 5 * affine + 4 * plain)


def test_scan_by_hand():
    """A scan has 9·K·E·L·N + K·E·L operations; projections and step sizes are multiply-adds."""
    dim, side, states = 16, 4, 3
    config = LaMambaConfig(
        input_size=side, in_channels=1, num_classes=0, dim=dim, depths=[1], bottleneck_depth=0, num_heads=1,
        d_state=states, mixers=["ssm"], layout="isotropic",
    )  # fmt: skip
    inner, tokens, k, rank = 2 * dim, side * side, 4, 1
    counted = cost(config)
    assert counted.parts["scan"].flops == 9 * k * inner * tokens * states + k * inner * tokens
    per_token = dim * 2 * inner + 9 * inner + k * (rank + 2 * states) * inner + k * rank * inner + inner * dim
    assert counted.parts["ssm"].macs == tokens * per_token


def test_norm_after_the_scan_by_hand():
    """Five operations per element, for torch's LayerNorm and for the fused operator."""
    mixer = SS2D(16, 4, 3, "cross", 2, False).to("meta")
    count = Count(mixer)
    x = torch.empty(2, 4, 4, 16, device="meta")
    with torch.no_grad(), count.watching():
        mixer(x)
    assert count.totals()["affine_norm"] == count.watched[mixer]["affine_norm"] == 2 * 4 * 4 * 32
    assert count.parts["ssm"]["flops"] == 2 * count.parts["ssm"]["macs"] + 5 * 2 * 4 * 4 * 32
    y, weight = torch.empty(2, 4, 4, 32, device="meta"), torch.empty(32, device="meta")
    count = Count(mixer)
    with count.watching():
        torch.ops.lamabench.gated_norm(y, y, weight, weight, 1e-5)
    assert count.watched[mixer]["affine_norm"] == 2 * 4 * 4 * 32


@pytest.mark.parametrize("name", ["dit_nano", "dit_modern_nano", "lamamba_nano", "unet_nano", "uvit_nano"])
def test_blocks_that_are_alike_count_as_if_each_had_run(monkeypatch, name):
    config = preset(name).config
    shared = cost(config)
    monkeypatch.setattr("lamabench.harness.measure.cost._pickled", lambda *_: None)
    assert cost(config) == shared


class Repeated(nn.Module):
    def __init__(self, times, part="mlp"):
        super().__init__()
        self.linear, self.times, self.part, self.runs = nn.Linear(3, 3), times, part, []

    def forward(self, x):
        self.runs.append(x)
        for _ in range(self.times):
            x = self.linear(x)
        return x


def test_blocks_are_alike_only_if_nothing_about_them_differs():
    """One is like the first. Others differ in a number, their part, their input or a hook."""
    with torch.device("meta"):
        blocks = nn.ModuleList(Repeated(*each) for each in ((1,), (1,), (2,), (1, "ssm"), (1,), (1,)))
        x = torch.empty(4, 3)
    blocks[-1].register_forward_hook(lambda *_: None)
    count = Count(blocks)
    with torch.no_grad(), count.watching():
        for block, value in zip(blocks, [x, x, x, x, x[:2], x], strict=True):
            assert count.run_block(block, value).shape == value.shape
    assert [len(block.runs) for block in blocks] == [1, 0, 1, 1, 1, 1]
    assert [count.asked[block.linear]["macs"] for block in blocks] == [36, 36, 72, 36, 18, 36]
    assert (count.parts["mlp"]["macs"], count.parts["ssm"]["macs"]) == (36 + 36 + 72 + 18 + 36, 36)
    assert count.totals()["macs"] == 36 * 6.5


def test_fvcore_counts_the_same_products():
    """A third count. The model has neither scan nor attention because fvcore does not know fused attention."""
    config = LaMambaConfig(
        input_size=8, in_channels=2, num_classes=3, dim=8, depths=[1, 1, 1], bottleneck_depth=1, num_heads=1,
        mixers=["conv"],
    )  # fmt: skip
    net = build(config).eval()
    label = torch.zeros(1, dtype=torch.int64)
    counted = FlopCountAnalysis(net, (torch.zeros(1, 2, 8, 8), label, label))
    counted.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    by_operator = counted.by_operator()
    assert by_operator["linear"] + by_operator["conv"] == cost(config).macs


@pytest.mark.parametrize(
    ("name", "skips"),
    [
        ("dit_nano", {"scaled_dot_product_attention": 4}),
        ("dit_modern_nano", {"rms_norm": 17, "scaled_dot_product_attention": 4}),
        ("uvit_nano", {"scaled_dot_product_attention": 5}),
        ("lamamba_nano", {"scaled_dot_product_attention": 10, "selective_scan": 10}),
    ],
)
def test_the_column_of_fvcore_is_what_it_counts(name, skips, capsys):
    assert main(["cost", name, "--fvcore", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    config = preset(name).config
    label = torch.zeros(1, dtype=torch.int64)
    direct = FlopCountAnalysis(build(config).eval(), (torch.randn(1, 1, 16, 16), label, label))
    direct.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    assert row["fvcore"] == {"total": direct.total(), "skipped": dict(direct.unsupported_ops())}
    assert row["fvcore_g"] == direct.total() / 1e9
    assert row["fvcore_skips"] == ", ".join(f"{times} {skipped}" for skipped, times in skips.items())
    by_operator = direct.by_operator()
    assert by_operator["linear"] + by_operator["conv"] < row["macs"]  # it has no attention
    assert main(["cost", name, "--fvcore"]) == 0
    table = capsys.readouterr().out
    assert "fvcore (G)" in table and row["fvcore_skips"] in table


def test_without_fvcore_cost_is_as_before(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fvcore.nn", None)
    assert main(["cost", "dit_nano"]) == 0 and "fvcore" not in capsys.readouterr().out
    assert main(["cost", "dit_nano", "--fvcore"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "fvcore cannot be imported" in err and "pip install fvcore" in err


class Inside(nn.Module):
    """A net that consists of one module for tokens [1, 4, 4, 8]."""

    def __init__(self, module):
        super().__init__()
        self.mixer = module

    def forward(self, x):
        return self.mixer(x)


def counted_inside(module):
    """The totals of a net that consists of this module."""
    net = Inside(module).to("meta")
    count = Count(net)
    with torch.no_grad(), count.watching():
        net(torch.empty(1, 4, 4, 8, device="meta"))
    return count.totals()


class Strange(nn.Module):
    """A layer of unknown type, with operators of known cost."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.weight


class FourierMixer(nn.Module):
    """Filters in the frequency domain between two projections (GFNet, arXiv 2107.00645): torch.fft and a product."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.filter = nn.Parameter(torch.ones(4, 3, 8, 2))

    def forward(self, x):
        frequencies = torch.fft.rfft2(self.linear(x), dim=(1, 2)) * torch.view_as_complex(self.filter)
        return torch.fft.irfft2(frequencies, dim=(1, 2), s=(4, 4)) @ self.linear.weight


class DeclaredFourierMixer(FourierMixer):
    own = 5000

    def own_macs(self, x):
        return self.own


PRODUCT = 4 * 4 * 8 * 8  # multiply-adds of a matrix [8, 8] with every token


def test_an_unknown_layer_is_one_line():
    with pytest.raises(
        InputError, match=r"^the cost of Strange \(mixer\) is not known: give Strange own_macs\(\*inputs"
    ):
        counted_inside(Strange())


def test_an_unknown_operator_is_one_line():
    with pytest.raises(InputError) as error:
        counted_inside(FourierMixer())
    assert str(error.value) == (
        "FourierMixer (mixer) calls aten::_fft_r2c, whose cost is not known: give FourierMixer own_macs(*inputs), "
        "the multiply-adds of a call outside its child modules"
    )


def test_own_macs_covers_the_operators_in_a_module():
    """The count is the module's number and its Linear. A number below the known products is an error."""
    assert counted_inside(DeclaredFourierMixer())["macs"] == 5000 + PRODUCT
    short = DeclaredFourierMixer()
    short.own = PRODUCT - 1
    with pytest.raises(
        InputError, match=rf"DeclaredFourierMixer \(mixer\) differ: .* macs {PRODUCT - 1}, .* {PRODUCT}$"
    ):
        counted_inside(short)


def test_own_macs_does_not_cover_child_modules():
    class Outer(Inside):
        def own_macs(self, x):
            return 0

    with pytest.raises(InputError, match=r"^FourierMixer \(mixer\.mixer\) calls aten::_fft_r2c"):
        counted_inside(Outer(FourierMixer()))


def test_the_command_prints_it_as_one_line(monkeypatch, capsys):
    class Fourier(build(TINY_DIT).__class__):
        def forward(self, x, t, y):
            return torch.fft.fft2(super().forward(x, t, y)).real

    monkeypatch.setattr("lamabench.harness.measure.cost.build", Fourier)
    assert main(["cost", "dit_nano"]) == 2
    line = capsys.readouterr().err
    assert "Fourier calls aten::_fft_c2c, whose cost is not known: give Fourier own_macs" in line
    assert line.count("\n") == 1 and "Traceback" not in line


def test_an_unknown_part_is_an_error():
    strange = nn.Identity()
    strange.part = "mixer"
    with pytest.raises(InputError, match=r"unknown part of Identity \(mixer\) 'mixer'; choices: ssm, scan, attention"):
        counted_inside(strange)


def test_disagreeing_counts_are_an_error(monkeypatch):
    block = type(build(TINY_DIT).blocks[0].attn)
    monkeypatch.setattr(block, "own_macs", lambda self, x: 7)
    with pytest.raises(
        InputError, match=r"two counts of Attention \(blocks\.0\.attn\) differ: .* macs 7, by the .* macs \d+"
    ):
        cost(TINY_DIT)


TINY_DIT = replace(preset("dit_nano").config, depth=1)


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("dit_nano", {"input_size": 100_000}, "model.input_size must be at most 16,384, not 100000"),
        ("lamamba_nano", {"input_size": 10**12}, "model.input_size must be at most 16,384"),
        ("dit_nano", {"hidden_size": 3 * 10**12}, "the model is too large: .*overflow"),
        ("dit_nano", {"hidden_size": 3 * 10**20}, "the model is too large: "),
    ],
)
def test_what_is_too_large_to_count(name, fields, words):
    with pytest.raises(InputError, match=words) as caught:
        cost(replace(preset(name).config, **fields))
    assert "\n" not in str(caught.value)
