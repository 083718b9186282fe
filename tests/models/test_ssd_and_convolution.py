"""Mamba-2's scan and the convolution as mixers, against dense sums in float64, scipy and costs by hand."""

from dataclasses import replace

import pytest
import torch
from lamabench.harness.measure.cost import Count, cost
from lamabench.kernels.cross_scan import DIRECTIONS, scan_paths
from lamabench.models.lamamba import LaMamba, LaMambaConfig
from lamabench.models.mixers import SSD2D, ConvMixer
from lamabench.models.mixers.ssd import head_width
from lamabench.models.registry import describe
from scipy.signal import correlate2d
from torch.autograd import gradcheck
from torch.nn import functional as F

TINY = LaMambaConfig(
    input_size=4, in_channels=1, num_classes=0, dim=16, depths=[1], bottleneck_depth=0, num_heads=1, layout="isotropic"
)


def dense(net, x, scan):
    """`SSD2D` with every pair of tokens: y_i = Σ_{j ≤ i} (c_i · b_j) exp(Σ_{j < l ≤ i} delta_l a) delta_j x_j."""
    batch, side, _, _ = x.shape
    inner, states = net.out_norm.normalized_shape[0], net.d_state
    (k, heads), length = net.dt_bias.shape, side * side
    z, xbc, dt = net.in_proj(x).tensor_split([inner, 2 * inner + 2 * k * states], dim=-1)
    xbc = F.silu(F.conv2d(xbc.permute(0, 3, 1, 2), net.conv2d.weight, net.conv2d.bias, padding=1, groups=xbc.shape[-1]))
    x, b, c = xbc.flatten(2).transpose(1, 2).tensor_split([inner, inner + k * states], dim=-1)
    out = 0
    for i, path in enumerate(scan_paths(scan, side, side).order):
        u = x[:, path].view(batch, length, heads, -1)
        bi, ci = (v[:, path, i * states : (i + 1) * states] for v in (b, c))
        delta = F.softplus(dt.flatten(1, 2)[:, path, i * heads : (i + 1) * heads] + net.dt_bias[i])
        total = torch.cumsum(-delta * net.A_logs[i].exp(), dim=1)
        between = (total[:, :, None] - total[:, None]).clamp(max=0)  # of later tokens, which `tril` leaves out
        weights = between.exp().permute(0, 3, 1, 2).tril().permute(0, 2, 3, 1)
        weights = weights * torch.einsum("bin,bjn->bij", ci, bi)[..., None]
        y = torch.einsum("bijh,bjh,bjhp->bihp", weights, delta, u) + net.Ds[i][:, None] * u
        place = torch.empty_like(path)
        place[path] = torch.arange(length)
        out = out + y.flatten(2)[:, place]
    norm = net.out_norm
    y = F.layer_norm(out, norm.normalized_shape, norm.weight, norm.bias, norm.eps).view(batch, side, side, -1)
    return net.out_proj(y * F.silu(z))


@pytest.mark.parametrize(
    ("dim", "side", "states", "head", "scan", "ratio", "bias"),
    [
        (6, 3, 5, 4, "continuous", 2, False),  # three heads of 4
        (5, 5, 3, 64, "bidirectional", 1, True),  # one head
        (4, 9, 2, 1, "cross", 2, False),  # 81 tokens are two chunks; heads of one channel
    ],
)
def test_ssd_is_the_dense_sum_of_the_paper(dim, side, states, head, scan, ratio, bias):
    """Output and every gradient in float64."""
    torch.manual_seed(0)
    net = SSD2D(dim, side, states, head, scan, ratio, bias).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, side, side, dim, dtype=torch.float64, requires_grad=True)
    inputs = [x, *net.parameters()]
    results = []
    for run in (lambda: net(x), lambda: dense(net, x, scan)):
        y = run()
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        results.append([y.detach(), *torch.autograd.grad((y * weights).sum(), inputs)])
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() <= 1e-11 * other.norm()


def test_the_start_of_ssd_is_mamba_2s():
    """Step sizes in [1e-3, 1e-1], -A in [1, 16], skip 1, as in arXiv 2405.21060's code."""
    net = SSD2D(64, 4, 64, 64, "continuous", 2, False)
    assert net.dt_bias.shape == net.A_logs.shape == net.Ds.shape == (4, 2)
    steps, rates = F.softplus(net.dt_bias), net.A_logs.exp()
    assert ((steps >= 0.999e-3) & (steps <= 0.1001)).all() and ((rates >= 0.999) & (rates <= 16.001)).all()
    assert (net.Ds == 1).all()


def test_heads_have_the_largest_width_that_divides():
    widths = {(128, 64): 64, (512, 64): 64, (28, 64): 28, (544, 64): 34, (288, 64): 48, (7, 3): 1, (12, 1): 1}
    assert {pair: head_width(*pair) for pair in widths} == widths


@pytest.mark.parametrize("side", [4, 9])  # one chunk; two, the second of them with 17 of 64 tokens
def test_cost_of_ssd_by_hand(side):
    dim, states, head = 16, 3, 8
    net = replace(TINY, input_size=side, mixers=[{"kind": "ssd", "d_state": states, "head_dim": head}])
    inner, tokens, k, heads = 2 * dim, side * side, 4, 4
    convolved = inner + 2 * k * states
    per_token = dim * (inner + convolved + k * heads) + 9 * convolved + inner * dim
    chunk, whole = (16, 16) if side == 4 else (64, 128)
    scan = k * (whole * chunk * (states + inner) + 2 * (whole - chunk) * states * inner)
    part = cost(net).parts["ssm"]
    assert part.macs == tokens * per_token + scan
    assert part.params == (
        dim * (inner + convolved + k * heads) + 9 * convolved + 3 * k * heads + 2 * inner + inner * dim
    )
    assert part.flops == 2 * part.macs + 5 * tokens * inner and cost(net).parts["scan"].flops == 0


def test_both_counts_see_the_products_of_ssd():
    """Every operator that runs has a known cost, so that the counts must be equal and none covers the other."""
    mixer = SSD2D(8, 9, 3, 4, "cross", 2, True).to("meta")
    count = Count(mixer)
    with torch.no_grad(), count.watching():
        mixer(torch.empty(1, 9, 9, 8, device="meta"))
    assert not count.unknown and count.asked[mixer]["macs"] == count.watched[mixer]["macs"] > 0


@pytest.mark.parametrize(("kernel", "side"), [(1, 4), (5, 3), (7, 8), (13, 5), (31, 16)])
def test_a_kernel_against_scipy(kernel, side):
    torch.manual_seed(0)
    net = ConvMixer(3, kernel).double()
    x = torch.randn(1, side, side, 3, dtype=torch.float64)
    inside = net.in_proj(x).detach()[0].numpy()
    maps = [
        correlate2d(inside[..., i], net.conv2d.weight.detach()[i, 0].numpy(), "full")[
            kernel // 2 : kernel // 2 + side, kernel // 2 : kernel // 2 + side
        ]
        + net.conv2d.bias[i].item()
        for i in range(3)
    ]
    expected = net.out_proj(F.gelu(torch.stack([torch.from_numpy(one) for one in maps], dim=-1)))
    torch.testing.assert_close(net(x)[0], expected, rtol=1e-12, atol=1e-13)


def test_gradients_of_a_kernel_that_is_larger_than_the_grid():
    torch.manual_seed(0)
    net = ConvMixer(2, 13).double()
    names = [name for name, _ in net.named_parameters()]

    def call(x, *values):
        return torch.func.functional_call(net, dict(zip(names, values, strict=True)), x)

    x = torch.randn(1, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(call, (x, *net.parameters()), fast_mode=True)


def conv_of(side, **settings):
    config = replace(TINY, input_size=side, mixers=[{"kind": "conv", **settings}])
    return LaMamba(config).encoder[0].blocks[0].mixers[0].conv2d


def test_a_kernel_is_cut_to_what_a_grid_reaches():
    """The cut changes no output: the weights around it meet zeros alone. 7 × 7 and less stay as they were."""
    assert [conv_of(side, kernel=31).kernel_size[0] for side in (8, 16, 32)] == [15, 31, 31]
    assert [conv_of(side).kernel_size[0] for side in (2, 4, 8)] == [7, 7, 7]
    assert [conv_of(4, kernel=k).kernel_size[0] for k in (1, 3, 9)] == [1, 3, 7]
    torch.manual_seed(0)
    whole, cut = ConvMixer(2, 31).double(), ConvMixer(2, 9).double()
    state = whole.state_dict()
    cut.load_state_dict(state | {"conv2d.weight": state["conv2d.weight"][:, :, 11:20, 11:20]})
    x = torch.randn(1, 5, 5, 2, dtype=torch.float64)
    torch.testing.assert_close(cut(x), whole(x), rtol=1e-13, atol=1e-14)


def test_the_kernel_of_before_has_the_key_of_before():
    plain, large = (describe(replace(TINY, mixers=[one]))["mixers"] for one in ("conv", {"kind": "conv", "kernel": 31}))
    assert plain == describe(replace(TINY, mixers=[{"kind": "conv", "kernel": 7}]))["mixers"] == [{"kind": "conv"}]
    assert large == [{"kind": "conv", "kernel": 31}]


def test_the_states_of_ssd_are_its_own():
    """`d_state` of the model is the selective scan's, but `scan` and `ssm_ratio` are shared."""
    config = replace(TINY, d_state=16, scan="cross", ssm_ratio=1, mixers=["ssd"])
    (mixer,) = describe(config)["mixers"]
    assert (mixer["d_state"], mixer["scan"], mixer["ssm_ratio"]) == (64, "cross", 1)
    assert LaMamba(config).encoder[0].blocks[0].mixers[0].dt_bias.shape == (DIRECTIONS["cross"], 1)
