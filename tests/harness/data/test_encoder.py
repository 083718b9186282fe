"""Encoders: from images to what the network sees, and back."""

import pytest
import torch
from lamabench.harness.data.encoder import KINDS, encoder, to_model_range, to_uint8
from lamabench.harness.data.images import load
from lamabench.harness.sections import DataConfig, EncoderConfig
from lamabench.kernels.errors import InputError


def test_ranges_are_inverse():
    every = torch.arange(256, dtype=torch.uint8)
    scaled = to_model_range(every)
    assert scaled.dtype == torch.float32 and (scaled[0], scaled[255]) == (-1, 1)
    assert torch.equal(to_uint8(scaled), every)
    assert to_uint8(torch.tensor([-3.0, 7.0, 0.001, -0.003])).tolist() == [0, 255, 128, 127]
    for value in (torch.nan, torch.inf):
        with pytest.raises(FloatingPointError, match="not finite"):
            to_uint8(torch.tensor([0.0, value]))


@pytest.mark.parametrize("kind", KINDS)
def test_shape_and_round_trip(kind):
    config = DataConfig("synthetic", size=8, channels=3, num_classes=0)
    data, coder = load(config), encoder(EncoderConfig(kind))
    images = torch.stack([data[i][0] for i in range(4)])
    x = coder.encode(images)
    channels, side = coder.shape(config)
    assert x.dtype == torch.float32 and tuple(x.shape) == (4, channels, side, side) and coder.shape(data) == (3, 8)
    assert torch.equal(coder.encode(images[2]), x[2])
    back = coder.decode(x)
    assert back.dtype == torch.uint8 and torch.equal(back, images)
    with pytest.raises(FloatingPointError, match="not finite"):
        coder.decode(x * torch.nan)


def test_kinds():
    for kind in KINDS:
        assert isinstance(encoder(EncoderConfig(kind)), KINDS[kind])
    with pytest.raises(InputError, match=r"unknown encoder\.kind 'vae'; choices: pixels"):
        encoder(EncoderConfig("vae"))
