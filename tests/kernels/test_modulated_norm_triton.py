"""The Triton norm with residual and modulation against float64, interpreted on the CPU and (marked gpu) on a GPU.

Triton decides at import whether it interprets, so that the CPU's tests run in their own process.
"""

import importlib.util

import pytest
import torch
from lamabench.baselines.dit import DiTConfig
from lamabench.harness.measure.models import fill_constants
from lamabench.kernels import modulated_norm as op
from lamabench.kernels.errors import InputError
from lamabench.kernels.modulated_norm import backend_triton
from lamabench.models.lamamba import LaMambaConfig
from lamabench.models.registry import build, select_backends

INSTALLED = importlib.util.find_spec("triton") is not None

SMALL = [
    (2, 3, 5, 7),
    (3, 5),  # one token without an axis
    (1, 1, 16),
    (2, 83, 64),  # one tile (two in float32), rows of three programs, the last ones beyond the image
    (2, 9, 68),  # five tiles of 16, the last one padded
    (1, 33, 320),  # five tiles, four programs in the backward pass; one image, because two take twice as long
    (2, 6, 384),  # three
    (2, 7, 448),  # seven
    (1, 13, 1152),  # five, the last one half padded; a row over four warps
    (1, 2, 4096),
    (0, 4, 8),
    (2, 0, 8),
]
# The types of the stream, and of the branch and vectors: one precision, bfloat16, and that of DiT under autocast.
TYPES = {"float32": (torch.float32,) * 2, "bfloat16": (torch.bfloat16,) * 2, "mixed": (torch.float32, torch.bfloat16)}
CASES = [(True, True), (False, True), (True, False), (False, False)]  # with weight and bias, with a branch
# Four programs an image take seconds in low precision: with all of the arguments alone, and in float32 in every case.
LOW = [(SMALL[0], *case) for case in CASES] + [(SMALL[3], *case) for case in CASES] + [(SMALL[5], True, True)]


def make(shape, types="float32", affine=True, branch=True, device="cpu", offset=0.0):
    """Arguments of `modulated_norm` by name; the vectors are parts of one projection, and every second branch is half
    of a projection. The mean of x is about `offset` deviations."""
    generator = torch.Generator().manual_seed(0)
    images, *_, channels = shape
    stream, low = TYPES[types]
    x = (torch.randn(shape, generator=generator) + offset).to(device, stream)
    added = torch.randn((*shape[:-1], 2 * channels), generator=generator).to(device, low).chunk(2, dim=-1)[1]
    shift, scale, gate = torch.randn(images, 4 * channels, generator=generator).to(device, low).chunk(4, dim=-1)[1:]
    weight, bias = (torch.randn(channels, generator=generator).to(device) for _ in range(2))
    given = {"x": x, "shift": shift, "scale": scale}
    given |= {"weight": weight, "bias": bias} if affine else {}
    given |= {"branch": added, "gate": gate} if branch else {}
    return {name: v.detach().requires_grad_() for name, v in given.items()}


def run(given, backend):
    """Both outputs and every gradient, in float64. The gradients of the outputs have strided rows too."""
    x, low = given["x"], given["shift"].dtype
    with torch.autocast(x.device.type, torch.bfloat16, enabled=low == torch.bfloat16):
        stream, y = op.modulated_norm(**given, backend=backend)
    assert stream.dtype == x.dtype and (y.dtype == low or backend == "torch")
    y = y.to(low)  # as the Linear that follows does under autocast
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn((*x.shape[:-1], 3 * x.shape[-1]), generator=generator).to(x.device).chunk(3, dim=-1)[:2]
    weights = [weight.to(v.dtype) for weight, v in zip(weights, (stream, y), strict=True)]
    grads = torch.autograd.grad([stream, y], list(given.values()), weights)
    assert [g.dtype for g in grads] == [v.dtype for v in given.values()]
    return [v.double() for v in (stream, y, *grads)]


def hold(given, floor):
    """DESIGN.md, rule 4: at most twice the error of plain torch in the same precision, plus a floor."""
    exact = {name: v.detach().double().requires_grad_() for name, v in given.items()}
    results = (run(given, "triton"), run(given, "torch"), run(exact, "torch"))
    for name, fast, plain, true in zip(("x'", "y", *given), *results, strict=True):
        error = (fast - true).norm()
        assert error <= 2 * (plain - true).norm() + floor * true.norm(), (name, float(error / true.norm()))


@pytest.mark.interpreted
@pytest.mark.parametrize(("affine", "branch"), CASES)
@pytest.mark.parametrize("shape", SMALL)
def test_small(shape, affine, branch, poison):
    hold(make(shape, "float32", affine, branch), floor=2e-6)


@pytest.mark.interpreted
@pytest.mark.parametrize("types", ["bfloat16", "mixed"])
@pytest.mark.parametrize(("shape", "affine", "branch"), LOW)
def test_small_low(shape, affine, branch, types, poison):
    # A unit in bfloat16's last place, because interpreted Triton truncates where a GPU rounds.
    hold(make(shape, types, affine, branch), floor=2e-3)


@pytest.mark.interpreted
def test_small_far_from_zero(poison):
    """The mean is a thousand deviations, and squares are summed around it."""
    hold(make((2, 6, 100), offset=1000.0), floor=2e-6)


def whatever_the_layout(device):
    """Misaligned, strided and broadcast inputs and gradients give what dense copies give."""
    given = {name: v.detach() for name, v in make((4, 3, 6, 20), device=device).items()}
    whole = torch.randn(given["x"].numel() + 1, device=device)
    tensors = (
        given
        | {
            "x": whole[1:].view(4, 3, 6, 20),  # not at a multiple of 16 bytes
            "branch": given["branch"].transpose(1, 2).contiguous().transpose(1, 2),  # rows of an image in another order
            "gate": given["gate"].t().contiguous().t(),
            "scale": given["scale"][:1].expand(4, 20),
        }
    )
    results = []
    for copy in (False, True):
        inputs = {name: (v.clone().contiguous() if copy else v).requires_grad_() for name, v in tensors.items()}
        out = op.modulated_norm(**inputs, backend="triton")
        grads = [torch.ones(1, device=device).expand(v.shape) for v in out]
        grads = [v.contiguous() if copy else v for v in grads]
        results.append([*out, *torch.autograd.grad(out, list(inputs.values()), grads)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other) and torch.isfinite(one).all()


@pytest.mark.interpreted
def test_small_whatever_the_layout(poison):
    whatever_the_layout("cpu")


@pytest.mark.interpreted
def test_small_types_that_differ(poison):
    """A bfloat16 stream becomes float32 by a float32 branch, and every gradient has the type of its input."""
    given = {name: v.detach() for name, v in make((2, 3, 6)).items()}
    given |= {"x": given["x"].bfloat16(), "scale": given["scale"].bfloat16(), "weight": given["weight"].bfloat16()}
    inputs = {name: v.requires_grad_() for name, v in given.items()}
    stream, y = op.modulated_norm(**inputs, backend="triton")
    grads = torch.autograd.grad([stream, y], list(inputs.values()), [torch.ones_like(stream), torch.ones_like(y)])
    assert [v.dtype for v in grads] == [v.dtype for v in inputs.values()]
    exact = {name: v.detach().double() for name, v in inputs.items()}
    for one, other in zip((stream, y), op.modulated_norm(**exact, backend="torch"), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.interpreted
def test_small_unused_outputs(poison):
    """A model that reads one output alone."""
    for place in range(2):
        results = []
        for backend in ("triton", "torch"):
            given = make((2, 5, 8))
            out = op.modulated_norm(**given, backend=backend)[place]
            results.append(torch.autograd.grad(out.square().sum(), list(given.values()), allow_unused=True))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, rtol=1e-4, atol=1e-4)


@pytest.mark.interpreted
@pytest.mark.parametrize("name", ["lamamba", "parallel", "dit"])
def test_small_models(name, poison):
    """Outputs and all gradients of whole models, with checkpointed blocks: a U-Net, mixers in parallel, a DiT."""
    lamamba = {"input_size": 4, "in_channels": 1, "num_classes": 3, "dim": 8, "num_heads": 2, "window_size": 2}
    config = {
        "lamamba": LaMambaConfig(**lamamba, depths=[1, 1, 1], bottleneck_depth=1, mixers=["window"]),
        "parallel": LaMambaConfig(**lamamba, depths=[1], layout="isotropic", mixers=["window", "conv"], parallel=True),
        "dit": DiTConfig(4, 1, 3, patch_size=1, hidden_size=20, depth=2, num_heads=1),
    }[name]
    torch.manual_seed(0)
    net = build(config).train()
    fill_constants(net)
    net.checkpointing = True
    inputs = torch.randn(3, 1, 4, 4), torch.tensor([1.0, 400, 900]), torch.tensor([0, 1, 3])
    results = []
    for backend in ("triton", "torch"):
        assert select_backends(net, {"modulated_norm": backend}, "cpu")["modulated_norm"] == backend
        out = net(*inputs)
        results.append(
            [out, *torch.autograd.grad(out.square().sum(), [p for p in net.parameters() if p.requires_grad])]
        )
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.interpreted
@pytest.mark.parametrize(("affine", "branch"), CASES)
def test_torch_opcheck(affine, branch):
    given = make((2, 3, 8), affine=affine, branch=branch)
    names = ("x", "branch", "gate", "shift", "scale", "weight", "bias")
    arguments = [given.get(name) for name in names]
    torch.library.opcheck(torch.ops.lamabench.modulated_norm.default, (*arguments, 1e-5))
    x, added, gate, _, scale, weight, _ = (None if v is None else v.detach() for v in arguments)
    g_stream = torch.ones_like(x) if branch else None
    backward = (g_stream, torch.ones_like(x), x, added, gate, scale, weight, 1e-5)
    torch.library.opcheck(torch.ops.lamabench.modulated_norm_backward.default, backward)


@pytest.mark.skipif(not INSTALLED, reason="triton is not installed")
@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize(("channels", "wide", "affine"), [(68, False, True), (64, True, False)])
def test_kernels_compile_for_an_h100(channels, wide, affine, branch):
    """Without a GPU, because what is interpreted may still not compile."""
    import triton
    from lamabench.kernels.modulated_norm import triton_kernels
    from triton.backends.compiler import GPUTarget

    stream = "*fp32" if wide else "*bf16"
    types = {"eps": "fp32", "partial": "*fp32", "weight": "*fp32", "bias": "*fp32"}
    types |= dict.fromkeys(("x", "stream", "g_x", "g_stream"), stream)
    types |= dict.fromkeys(("branch", "gate", "shift", "scale", "y", "g_y", "g_branch"), "*bf16")
    constants = backend_triton.tiles(channels, wide)
    warps = constants.pop("num_warps")
    constants |= {} if affine else {"weight": None, "bias": None}
    constants |= {} if branch else {"branch": None, "gate": None, "g_stream": None}
    options = {"num_warps": warps, "enable_fp_fusion": True}
    for kernel in (triton_kernels.forward, triton_kernels.backward):
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
        own = {name: value for name, value in constants.items() if name in signature}
        source = triton.compiler.ASTSource(kernel, signature, own)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert len(compiled.asm["cubin"]) > 1000


@pytest.mark.parametrize("wide", [False, True])
def test_tiles_hold_every_row(wide):
    for channels in range(1, backend_triton.LARGEST + 1):
        constants = backend_triton.tiles(channels, wide)
        size, count = constants["BE"], -(-channels // constants["BE"])
        threads = 32 * constants["num_warps"]
        assert count in backend_triton.OF_A_THREAD and threads <= 1024
        assert constants["R"] * size == threads * backend_triton.OF_A_THREAD[count]
        assert channels <= 16 or count * size * 4 <= channels * 5 + 64  # little padding


@pytest.mark.parametrize("direction", [backend_triton.FORWARD, backend_triton.BACKWARD])
@pytest.mark.parametrize("shape", [(256, 64, 256), (256, 1024, 64), (4, 4096, 320), (64, 64, 1280), (256, 256, 384)])
def test_programs_fill_an_h100(shape, direction):
    """15 or more warps for each of 132 multiprocessors, and long programs in the backward pass: their three float32
    rows of sums are an eighth of what they move (six rows of 2 bytes a token) at most."""
    images, tokens, channels = shape
    constants = backend_triton.tiles(channels, False)
    span = backend_triton.tokens_of_a_program(images, tokens, constants, direction)
    assert images * -(-tokens // span) * constants["num_warps"] >= 15 * 132
    assert direction == backend_triton.FORWARD or span * 6 * 2 >= 8 * 3 * 4


def test_errors(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    chosen = [op.OPERATOR.resolve("auto", device).name for device in ("cpu", "cuda", "meta")]
    assert chosen == ["torch", "triton" if INSTALLED else "torch", "torch"]
    with pytest.raises(InputError, match=r"'triton' cannot run on cpu: .*Usable here: torch, reference"):
        op.OPERATOR.resolve("triton", "cpu")
    names = ("x", "branch", "gate", "shift", "scale", "weight", "bias")
    given = make((2, 3, 4))
    for mixed in names:
        inputs = [given[name].double() if name == mixed else given[name] for name in names]
        with pytest.raises(InputError, match="not in float64; use 'torch' or 'reference'"):
            backend_triton.modulated_norm(*inputs, 1e-5)
    wide = make((1, 4097))
    with pytest.raises(InputError, match="holds at most 4096 channels, not 4097; use 'torch' or 'reference'"):
        backend_triton.modulated_norm(*(wide[name] for name in names), 1e-5)


BIG = [
    # LaMamba-S at 256 px
    (256, 32, 32, 64),
    (256, 16, 16, 128),
    (256, 8, 8, 256),
    # LaMamba-XL at 256 px, then at 512
    (64, 32, 32, 320),
    (64, 16, 16, 640),
    (64, 8, 8, 1280),
    (4, 64, 64, 320),
    # DiT-S/2 and XL/2
    (256, 256, 384),
    (64, 256, 1152),
    # Awkward sizes
    (1000, 7),
    (1, 4099, 33),
    (97, 5, 100),
    (3, 1, 1283),
    (5, 103, 4096),
    (2, 65536, 16),
    (0, 4, 8),
]


@pytest.mark.gpu
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize(("affine", "branch"), CASES)
@pytest.mark.parametrize("shape", BIG)
def test_on_the_gpu(shape, affine, branch, types, poison):
    hold(make(shape, types, affine, branch, "cuda"), floor=3e-6 if types == "float32" else 2e-5)


@pytest.mark.gpu
def test_far_from_zero_on_the_gpu(poison):
    hold(make((6, 100, 640), device="cuda", offset=1000.0), floor=3e-6)


@pytest.mark.gpu
def test_whatever_the_layout_on_the_gpu(poison):
    whatever_the_layout("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", BIG[:6])
def test_results_repeat_to_the_bit(shape):
    given = make(shape, "bfloat16", device="cuda")
    for one, other in zip(run(given, "triton"), run(given, "triton"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize(("affine", "branch"), CASES)
def test_compiled_in_one_graph(affine, branch):
    given = make((4, 8, 8, 320), "bfloat16", affine, branch, device="cuda")
    compiled = torch.compile(lambda v: op.modulated_norm(**v, backend="triton"), fullgraph=True)
    results = []
    for call in (compiled, lambda v: op.modulated_norm(**v, backend="triton")):
        out = call(given)
        results.append([*out, *torch.autograd.grad(out, list(given.values()), [torch.ones_like(v) for v in out])])
    for name, one, other in zip(("x'", "y", *given), *results, strict=True):
        if name in ("x'", "y", "x", "branch"):
            assert torch.equal(one, other), name
        else:  # the last sums are torch's, in its order
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
