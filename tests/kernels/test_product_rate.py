"""The rate of products of the matrix units. Without a GPU, it is compiled."""

import pytest
from lamabench.kernels import nvrtc, product_rate


@pytest.mark.skipif(not nvrtc.INSTALLED, reason="needs cuda-bindings")
@pytest.mark.parametrize("kind", range(len(product_rate.KINDS)))
def test_every_kind_compiles(kind):
    constants = (("KIND", kind), ("WARPS", 16), ("CHAINS", product_rate.CHAINS), ("LOOPS", product_rate.LOOPS))
    assert nvrtc.compile_source((product_rate.SOURCE,), constants, "90")


@pytest.mark.gpu
def test_a_product_of_twice_the_depth_takes_no_less_time():
    """No product is faster than the peak of an H100, 512 bfloat16 multiply-adds a cycle and scheduler."""
    cycles = {kind: product_rate.cycles(kind, 4) for kind in product_rate.KINDS}
    assert cycles["m16n8k16 bf16"] > 3.9 and all(value < 70 for value in cycles.values())
    assert cycles["m16n8k16 bf16"] > 0.95 * cycles["m16n8k8 bf16"]
    assert cycles["m16n8k8 tf32"] > 0.95 * cycles["m16n8k4 tf32"]
