"""The gated residual, norm and modulation: the reference against torch in float64 and by hand, and bad input."""

import math

import pytest
import torch
from lamabench.harness.measure.cost import Count
from lamabench.kernels import modulated_norm as op
from lamabench.kernels.errors import InputError
from lamabench.models.layers import ModulatedNorm
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional as F

NAMES = ("x", "shift", "scale", "weight", "bias", "branch", "gate")


def make(shape, affine=True, branch=True, dtype=torch.float64):
    """Arguments of `modulated_norm` by name; the vectors are parts of one projection."""
    generator = torch.Generator().manual_seed(0)
    images, *_, channels = shape
    x, added = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    shift, scale, gate = torch.randn(images, 4 * channels, generator=generator, dtype=dtype).chunk(4, dim=-1)[1:]
    weight, bias = (torch.randn(channels, generator=generator, dtype=dtype) for _ in range(2))
    given = {"x": x, "shift": shift, "scale": scale}
    given |= {"weight": weight, "bias": bias} if affine else {}
    given |= {"branch": added, "gate": gate} if branch else {}
    return {name: v.detach().requires_grad_() for name, v in given.items()}


def outputs_and_gradients(run, given):
    """Of a loss that weights both outputs, with other weights each."""
    out = run(**given)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in out]
    return [*out, *torch.autograd.grad(out, list(given.values()), weights)]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 7, 6), (2, 4), (1, 1, 1)])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_output_and_gradients_are_those_of_the_expression(shape, affine, branch, backend):
    def expression(x, shift, scale, weight=None, bias=None, branch=None, gate=None):
        of_images = (slice(None), *[None] * (x.ndim - 2))
        stream = x if branch is None else torch.addcmul(x, gate[of_images], branch)
        normed = F.layer_norm(stream, shape[-1:], weight, bias, 0.3)
        return stream, torch.addcmul(shift[of_images], normed, 1 + scale[of_images])

    given = make(shape, affine, branch)
    actual = outputs_and_gradients(lambda **v: op.modulated_norm(**v, eps=0.3, backend=backend), given)
    for one, other in zip(actual, outputs_and_gradients(expression, given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_by_hand(backend):
    """x' = [1, 3, 5, 7], mean 4, variance 5 + 4 = 9: a third of the distance to the mean; times 2, plus 1 (weight and
    bias); times 1 + 2, plus 10."""
    x = torch.tensor([[[3.0, 4, 5, 6]]], dtype=torch.float64)
    branch, gate = torch.tensor([[[-4.0, -2, 0, 2]]]).double(), torch.full((1, 4), 0.5).double()
    vectors = [torch.full((1, 4), value).double() for value in (10.0, 2)]
    affine = [torch.full((4,), value).double() for value in (2.0, 1)]
    stream, y = op.modulated_norm(x, *vectors, *affine, 4.0, branch, gate, backend)
    assert stream.tolist() == [[[1, 3, 5, 7]]]
    torch.testing.assert_close(y, torch.tensor([[[7.0, 11, 15, 19]]]).double())


@pytest.mark.parametrize("affine", [True, False])
def test_reference_against_finite_differences(affine):
    given = make((2, 3, 4), affine)
    assert gradcheck(
        lambda *v: op.modulated_norm(**dict(zip(given, v, strict=True)), backend="reference"), list(given.values())
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_torch_equals_the_modules_to_the_bit(autocast):
    dtype = torch.bfloat16 if autocast else torch.float32
    given = make((2, 5, 6, 20), dtype=dtype)
    affine = {name: given.pop(name) for name in ("weight", "bias")}
    own, plain = ModulatedNorm(20), nn.LayerNorm(20)
    for norm in (own, plain):
        norm.load_state_dict(affine)

    def by_torch(x, shift, scale, branch, gate):
        shift, scale, gate = (v[:, None, None] for v in (shift, scale, gate))
        x = x + branch * gate
        return x, plain(x) * (1 + scale) + shift

    results = []
    for run, norm in ((by_torch, plain), (lambda gate, **v: own(**v, g=gate), own)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(outputs_and_gradients(run, given))
            out = run(**given)
        results[-1] += torch.autograd.grad(out, list(norm.parameters()), [torch.ones_like(v) for v in out])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("branch", [torch.float32, torch.bfloat16])
def test_types_of_the_reference(branch):
    given = {name: v.detach().bfloat16() for name, v in make((2, 3, 4)).items()}
    given["branch"] = given["branch"].to(branch)
    stream, y = op.modulated_norm(**given, backend="reference")
    assert (stream.dtype, y.dtype) == (branch, torch.bfloat16)
    assert op.OPERATOR.outputs(given["x"], given["branch"], given["gate"], given["shift"]) == {
        "x'": branch,
        "y": torch.bfloat16,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": ()}, r"x and branch must be \[B, \.\.\., D\].*not \[\], "),
        ({name: (2, 3, 0) if name == "x" else None for name in ("x", "branch", "gate")}, r"D above 0, not \[2, 3, 0\]"),
        ({"shift": (1, 4)}, r"not \[2, 3, 4\], \[2, 3, 4\], \[2, 4\], \[1, 4\]"),
        ({"scale": (2, 1, 4)}, r"not .*\[2, 1, 4\]"),
        ({"gate": (2, 3)}, r"not .*\[2, 3\]"),
        ({"branch": (2, 1, 4)}, r"not .*\[2, 1, 4\]"),
        ({"weight": (3,)}, r"not .*\[3\]"),
        ({"bias": (1, 4)}, r"not .*\[1, 4\]"),
        ({"gate": None}, "both given or both None"),
        ({"branch": None}, "both given or both None"),
        ({"bias": None}, "both given or both None"),
    ],
)
def test_shapes_that_do_not_fit(change, message):
    given = make((2, 3, 4)) | {name: None if shape is None else torch.zeros(shape) for name, shape in change.items()}
    with pytest.raises(InputError, match=message):
        op.modulated_norm(**given)


@pytest.mark.parametrize("eps", [0.0, -1e-5, math.nan])
def test_eps_must_be_above_zero(eps):
    with pytest.raises(InputError, match=f"eps must be above 0, not {eps}"):
        op.modulated_norm(**make((2, 3)), eps=eps)


@pytest.mark.parametrize("affine", [True, False])
def test_both_counts_of_a_cost_have_every_element(affine):
    """By the plain operators and by the custom one, with five operations an element, or four without parameters."""
    norm = ModulatedNorm(4, affine=affine).to("meta")
    given = [torch.empty(shape, device="meta") for shape in ((2, 3, 4), (2, 4), (2, 4), (2, 3, 4), (2, 4))]
    name = "affine_norm" if affine else "plain_norm"
    count = Count(norm)
    with torch.no_grad(), count.watching():
        norm(*given)
    assert count.totals()[name] == count.watched[norm][name] == 24
    assert count.parts["rest"]["flops"] == 24 * (5 if affine else 4)
    x, shift, scale, branch, gate = given
    count = Count(norm)
    with torch.no_grad(), count.watching():
        torch.ops.lamabench.modulated_norm(x, branch, gate, shift, scale, norm.weight, norm.bias, 1e-5)
    assert count.watched[norm][name] == 24 and sum(count.watched[norm].values()) == 24
