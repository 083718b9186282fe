"""Autoencoders, held against diffusers' own encode and decode."""

import json

import pytest
import torch
from lamabench.harness.data import autoencoder
from lamabench.harness.data.autoencoder import load
from lamabench.kernels.errors import InputError
from safetensors.torch import load_file, save_file

from ...autoencoders import save_kl, save_tiny

WEIGHTS = "diffusion_pytorch_model.safetensors"


def images(count=5, channels=3, side=16):
    return torch.randint(0, 256, (count, channels, side, side), generator=torch.manual_seed(3), dtype=torch.uint8)


def in_range(x):
    return x.double().div(255).mul(2).sub(1).float()


@pytest.mark.parametrize("channels", [4, 16])
def test_kl_is_that_of_diffusers(tmp_path, channels):
    net = save_kl(tmp_path, channels=channels, scaling_factor=0.3611, shift_factor=0.1159)
    ours = load(str(tmp_path))
    assert (ours.kind, ours.scale, ours.shift) == ("AutoencoderKL", 0.3611, 0.1159)
    assert (ours.in_channels, ours.channels, ours.factor) == (3, channels, 4)
    x = images()
    with torch.no_grad():
        posterior = net.encode(in_range(x)).latent_dist
        mean, logvar = ours.encode(x)
        assert mean.shape == (5, channels, 4, 4) and mean.dtype == torch.float32
        assert torch.allclose(mean, posterior.mean, atol=1e-5) and mean.std() > 0.05
        assert torch.allclose(logvar, posterior.logvar, atol=1e-5)
        seen = (posterior.mean - 0.1159) * 0.3611  # what pipelines do, and its inverse
        picture = net.decode(seen / 0.3611 + 0.1159).sample.add(1).mul(127.5).clamp(0, 255).round()
    decoded = ours.decode(seen)
    assert decoded.dtype == torch.uint8 and decoded.shape == x.shape
    assert (decoded.float() - picture).abs().max() <= 1 and (decoded.float() - picture).abs().mean() < 0.01
    assert decoded.float().std() > 1


def test_tiny_is_that_of_diffusers(tmp_path):
    net = save_tiny(tmp_path)
    ours = load(str(tmp_path))
    assert (ours.kind, ours.scale, ours.shift, ours.factor) == ("AutoencoderTiny", 1.0, 0.0, 4)
    x = images()
    with torch.no_grad():
        latents = net.encode(in_range(x)).latents
        mean, logvar = ours.encode(x)
        assert logvar is None and torch.allclose(mean, latents, atol=1e-5) and mean.std() > 1e-3
        picture = net.decode(latents).sample.add(1).mul(127.5).clamp(0, 255).round()
    assert (ours.decode(latents).float() - picture).abs().max() <= 1


def test_a_batch_larger_than_memory_is_encoded_in_parts(tmp_path, monkeypatch):
    save_kl(tmp_path)
    ours = load(str(tmp_path))
    whole, sizes = ours.encode(images())[0], []
    ours.net.encoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    monkeypatch.setattr(autoencoder, "PIXELS", 2 * 16 * 16)
    assert torch.allclose(ours.encode(images())[0], whole, atol=1e-6)
    assert sizes == [2, 2, 1]


def test_identity_is_of_the_function_alone(tmp_path):
    save_kl(tmp_path / "a")
    identity = load(str(tmp_path / "a")).identity
    assert len(identity) == 12 and int(identity, 16) >= 0
    half = {name: value.half() for name, value in load_file(tmp_path / "a" / WEIGHTS).items()}
    files = {
        "copy": {name: value.float() for name, value in half.items()},
        "half": half,  # the same values, stored in half the space
    }
    for name, tensors in files.items():
        save_kl(tmp_path / name)
        save_file(tensors, tmp_path / name / WEIGHTS)
    assert load(str(tmp_path / "copy")).identity == load(str(tmp_path / "half")).identity != identity
    save_kl(tmp_path / "seed", seed=1)
    save_kl(tmp_path / "act", act_fn="relu")
    save_kl(tmp_path / "scale", scaling_factor=0.5)
    save_kl(tmp_path / "tiles", force_upcast=False)
    assert load(str(tmp_path / "seed")).identity != identity
    assert load(str(tmp_path / "act")).identity != identity
    assert load(str(tmp_path / "scale")).identity == identity  # the scale is said beside it
    assert load(str(tmp_path / "tiles")).identity == identity


def test_a_pipeline_folder_has_its_autoencoder_in_vae(tmp_path):
    save_kl(tmp_path / "vae")
    assert load(str(tmp_path)).identity == load(str(tmp_path / "vae")).identity


def test_an_id_of_the_hub_is_read_from_the_cache_alone(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"some/vae is neither a folder nor in the cache .*--download"):
        load("some/vae")
    home = tmp_path / "models--some--vae"
    save_kl(home / "snapshots" / ("0" * 40))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    save_kl(tmp_path / "plain")
    assert load("some/vae").identity == load(str(tmp_path / "plain")).identity


def edited(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without_a_tensor(folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors["encoder.conv_in.weight"]
    save_file(tensors, folder / WEIGHTS)


def with_another_tensor(folder):
    save_file({**load_file(folder / WEIGHTS), "more": torch.zeros(1)}, folder / WEIGHTS)


BAD = {
    "no such folder": (None, "does not exist; give a folder"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "has no weights as safetensors"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
    "another kind": (lambda folder: edited(folder, _class_name="VQModel"), "unknown kind of autoencoder .*'VQModel'"),
    "a scale for each channel": (lambda folder: edited(folder, latents_mean=[0.0] * 4), "latents_mean"),
    "cut weights": (lambda folder: (folder / WEIGHTS).write_bytes(b"\x10\0\0"), "cannot be read"),
    "a tensor is missing": (without_a_tensor, r"lack encoder.conv_in.weight \(1 such tensors\)"),
    "another tensor": (with_another_tensor, "have an unknown more"),
    "another shape": (lambda folder: edited(folder, latent_channels=8), "cannot be read|do not fit"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_loaded(tmp_path, case):
    damage, message = BAD[case]
    if damage is not None:
        save_kl(tmp_path / "vae")
        damage(tmp_path / "vae")
    with pytest.raises(InputError, match=message) as error:
        load(str(tmp_path / "vae"))
    assert "\n" not in str(error.value)


def test_without_diffusers_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(autoencoder, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'lamabench\[latents\]'"):
        load(str(tmp_path))


def test_images_that_do_not_fit(tmp_path):
    save_kl(tmp_path)
    ours = load(str(tmp_path))
    with pytest.raises(InputError, match=r"data.channels is 1, but .* 3: set data.channels=3"):
        ours.encode(images(channels=1))
    with pytest.raises(InputError, match=r"data.size 18 is not divisible by 4, .* 16 and 20"):
        ours.check(3, 18)
    with pytest.raises(FloatingPointError):
        ours.decode(torch.full((1, 4, 4, 4), float("nan")))
