"""Noise of a GPU against Philox in numpy and Box and Muller in float64, interpreted on the CPU and, marked gpu, on one.

Triton decides at import whether it interprets, so that the CPU's tests run in their own process.
"""

import importlib.util
import math

import numpy as np
import pytest
import torch
from lamabench.harness.data.images import load
from lamabench.harness.data.items import TrainItems
from lamabench.harness.diffusion.gaussian import DDPM
from lamabench.harness.random import Stream
from lamabench.harness.sections import DataConfig
from scipy import stats

device_of = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
)
SEEDS = (0, 1, 7, 2**31 + 5, 2**32, 2**63 + 1, 2**64 - 1)
INDICES = (0, 1, 2, 2**31, 2**32, 2**32 + 1, 2**44 + 12345)


def philox(counter, key):
    """Ten rounds of Philox4x32 (Salmon et al., 2011, section 3): counter uint32 [..., 4], key two words."""
    c = [np.asarray(counter[..., i], dtype=np.uint64) for i in range(4)]
    low, k = np.uint64(0xFFFFFFFF), list(key)
    for _ in range(10):
        first, second = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (second >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]),
            second & low,
            (first >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]),
            first & low,
        ]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return np.stack(c, axis=-1).astype(np.uint32)


def expected(seed, index, shape):
    """The noise of one image. The uniform numbers and the angles are float32, as on the GPU. The rest is float64."""
    size = math.prod(shape)
    counter = np.zeros((-(-size // 4), 4), dtype=np.uint64)
    counter[:, 0] = np.arange(len(counter))
    counter[:, 1:] = int(Stream.TRAIN), index % 2**32, index >> 32
    words = philox(counter, (seed % 2**32, seed >> 32)).reshape(-1, 2)
    unit = (words[:, 0].astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)).astype(np.float64)
    angle = (words[:, 1].astype(np.int32).astype(np.float32) * np.float32(2 * np.pi * 2**-32)).astype(np.float64)
    radius = np.sqrt(-2 * np.log(unit))
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return pairs.reshape(-1)[:size].reshape(shape)


@pytest.mark.parametrize(
    "counter, key, answer",
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter, key, answer):
    """Those of philox4x32-10 in kat_vectors of Random123, the authors' library."""
    counter, key, answer = ([int(word, 16) for word in text.split()] for text in (counter, key, answer))
    assert philox(np.array(counter, dtype=np.uint64), key).tolist() == answer


@device_of
@pytest.mark.parametrize("shape", [(1,), (2, 3, 5), (3, 33, 32)])  # 1 and 30 end inside four elements; two programs
def test_numbers(shape, device):
    from lamabench.harness.data.noise import noise

    for seed in SEEDS:
        drawn = noise(seed, torch.tensor(INDICES, device=device), shape)
        assert drawn.shape == (len(INDICES), *shape) and drawn.dtype == torch.float32
        true = np.stack([expected(seed, index, shape) for index in INDICES])
        np.testing.assert_allclose(drawn.double().cpu().numpy(), true, rtol=1e-6, atol=1e-6)
        alone = noise(seed, torch.tensor(INDICES[3:4], device=device), shape)
        assert torch.equal(alone[0], drawn[3])  # whatever the batch is


@device_of
def test_moments(device):
    """Of 61,440 numbers, or 13 million on a GPU, of which no two images or elements go together."""
    from lamabench.harness.data.noise import noise

    images = 20 if device == "cpu" else 4096
    x = noise(3, torch.arange(images, device=device), (3, 32, 32)).double().cpu().numpy().reshape(images, -1)
    assert stats.kstest(x.ravel()[: 10**6], "norm").pvalue > 1e-3
    off = 4 / x.size**0.5
    assert abs(x.mean()) < off and abs(x.var() - 1) < off * 2**0.5 and abs((x**4).mean() - 3) < off * 96**0.5
    for a, b in ((x[1:], x[:-1]), (x[:, 1:], x[:, :-1]), (x[:, 2:], x[:, :-2]), (x[:, 0::4], x[:, 2::4])):
        assert abs((a * b).mean()) < 4 / a.size**0.5
        assert abs(((a**2 - 1) * (b**2 - 1)).mean()) < 8 / a.size**0.5


def test_items_have_their_index_instead():
    data = load(DataConfig(size=8))
    options = {"seed": 5, "flip": True, "class_dropout": 0.5, "null_class": 10}
    with_noise, without = TrainItems(data, DDPM(), **options), TrainItems(data, DDPM(), **options, noise=False)
    a, b = with_noise.__getitems__([3, 2000, 7]), without.__getitems__([3, 2000, 7])
    assert list(b) == ["x0", "y", "t", "index"] and b["index"].tolist() == [3, 2000, 7]
    assert all(torch.equal(a[name], b[name]) for name in ("x0", "y", "t"))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_no_instruction_leaves_its_rounding_to_the_gpu(capability, monkeypatch, tmp_path):
    """Approximations of the special function units have an error that a generation of GPUs may change."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from lamabench.harness.data.noise import BLOCK, kernel
    from triton.backends.compiler import GPUTarget

    types = {"out": "*fp32", "indices": "*i64", "seed": "u64", "stream": "i32", "size": "i32", "programs": "i32"}
    source = triton.compiler.ASTSource(kernel, {**types, "BLOCK": "constexpr"}, {"BLOCK": BLOCK})
    target = GPUTarget("cuda", capability, 32)
    ptx = triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm["ptx"]
    assert "sqrt.rn.f32" in ptx and "mul.rn.f32" in ptx and ".approx" not in ptx
