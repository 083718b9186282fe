"""Peak rates of GPUs by name, and model FLOPs utilisation."""

import pytest
from lamabench.harness.measure import gpus


def test_mfu_by_hand():
    # DiT-XL/2 at 256 px: 118.621e9 MACs; the 1917 images/s of torch.compile are 454.8 TFLOP/s of 989.
    forward = gpus.mfu(118_621_000_000, "forward", 1917.0, "NVIDIA H100 80GB HBM3", "bfloat16")
    assert forward == pytest.approx(454.793 / 989, rel=1e-4)
    assert gpus.mfu(10**12, "train", 10.0, "NVIDIA A100-SXM4-80GB", "bfloat16") == pytest.approx(60 / 312)
    assert gpus.mfu(10**12, "train", 1.0, "NVIDIA A100-SXM4-80GB", "float32") == pytest.approx(6 / 19.5)
    assert gpus.mfu(10**12, "forward", 10.0, "Intel(R) Xeon(R)", "float32") is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12), ("NVIDIA A100 80GB PCIe", 312e12), ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12), ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12), ("NVIDIA B200", 2250e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)  # fmt: skip
def test_peaks_by_name(name, peak):
    assert gpus.peak_flops(name, "bfloat16") == peak


def test_what_follows_from_a_record_of_a_model():
    """Forward and training, of one process and of two; nothing for an unknown device or without multiply-adds."""
    row = {"kind": "speed", "macs": 10**12, "mode": "train", "images_per_s": 20.0, "precision": "bfloat16"}
    row |= {"provenance": {"device": "NVIDIA A100-SXM4-80GB"}}
    assert gpus.derived(row) == {"mfu": pytest.approx(120 / 312)}
    assert gpus.derived({**row, "processes": 2, "mode": "forward"}) == {"mfu": pytest.approx(20 / 312)}
    assert gpus.derived({**row, "provenance": None}) == gpus.derived({**row, "macs": None}) == {}
    assert gpus.derived({**row, "images_per_s": None}) == gpus.derived({"kind": "score"}) == {}
