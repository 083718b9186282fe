"""Encoders: from images to what the network sees, and back."""

import numpy as np
import pytest
import torch
from lamabench.harness.data.encoder import Pixels, encoder, to_model_range, to_uint8
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


def test_pixels_are_images_in_the_range_of_the_model():
    config = DataConfig("synthetic", size=8, channels=3, num_classes=0)
    data, coder = load(config), encoder(EncoderConfig())
    some = np.array([5, 0, 2])
    images = torch.stack([data[i][0] for i in some])
    x = coder.inputs(coder.load(config), some, some.tolist(), 0)
    assert torch.equal(x, to_model_range(images)) and coder.shape(config) == coder.shape(data) == (3, 8)
    assert torch.equal(coder.inputs(data, some, some.tolist(), 0, np.array([False, True, False]))[1], x[1].flip(-1))
    assert torch.equal(coder.decode(x), images) and torch.equal(coder.pictures(data, some, "cpu"), images)
    with pytest.raises(FloatingPointError, match="not finite"):
        coder.decode(x * torch.nan)


def test_kinds():
    assert isinstance(encoder(EncoderConfig()), Pixels)
    with pytest.raises(InputError, match=r"unknown encoder\.kind 'vae'; choices: pixels, latents"):
        encoder(EncoderConfig("vae"))
    with pytest.raises(InputError, match=r"encoder\.path is a setting of latents, and encoder\.kind is pixels"):
        EncoderConfig(path="latents")
    with pytest.raises(InputError, match=r"encoder\.identity of latents is not set: encoder=FOLDER takes it"):
        EncoderConfig("latents", path="latents")
