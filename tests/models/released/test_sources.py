"""Released weights of DiT and guided-diffusion give the outputs of the networks in originals.py, and of diffusers."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from lamabench.kernels.errors import InputError
from lamabench.models import create_model, released
from lamabench.models.registry import preset
from lamabench.models.released import configuration, guided_diffusion
from lamabench.models.released.files import Source
from safetensors.torch import save_file

from .originals import DIT_FIELDS, ROUNDING, GuidedUNet, TimmDiT, dit, drawn, error, inputs


@pytest.mark.parametrize("form", ["bare", "training file", "safetensors", "of several processes", "half"])
def test_dit_in_every_form(tmp_path, form):
    net = dit()
    state = net.state_dict()
    path = tmp_path / ("a.safetensors" if form == "safetensors" else "a.pt")
    if form == "safetensors":
        save_file(state, path)
    elif form == "training file":
        live = {name: torch.zeros_like(value) for name, value in state.items()}
        args = argparse.Namespace(model="DiT-nano", results_dir="results")
        torch.save({"model": live, "ema": state, "opt": {"state": {}}, "args": args}, path)
    elif form == "of several processes":
        torch.save({f"module.{name}": value for name, value in state.items()}, path)
    else:
        torch.save({name: value.half() for name, value in state.items()} if form == "half" else state, path)
    ours = create_model("dit_nano", pretrained=path, **DIT_FIELDS)
    x, t, y = inputs(4, 8, 6)
    assert error(ours(x, t, y), net(x, t, y)) < (3e-3 if form == "half" else ROUNDING)
    assert {value.dtype for value in ours.state_dict().values()} == {torch.float32}


def test_a_preset_tells_the_heads(tmp_path):
    """DiT-S is 384 wide and 12 deep; its heads are in no tensor."""
    net = TimmDiT(8, 4, 5, 4, 384, 12, 6)
    torch.save(drawn(net).state_dict(), tmp_path / "s.pt")
    ours = released.load(tmp_path / "s.pt").net
    assert (ours.config.num_heads, ours.config.patch_size, ours.config.num_classes) == (6, 4, 5)
    x, t, y = inputs(4, 8, 6)
    assert error(ours(x, t, y), net(x, t, y)) < ROUNDING
    torch.save(dit().state_dict(), tmp_path / "other.pt")
    with pytest.raises(
        InputError, match=r"does not tell num_heads \(DiT's have .*give model=NAME, or model.num_heads=…$"
    ):
        released.load(tmp_path / "other.pt")
    assert released.load(tmp_path / "other.pt", settings={"num_heads": 3}).net.config.num_heads == 3


def test_files_whose_time_runs_the_other_way_are_said(tmp_path):
    """SiT's and LightningDiT's: DiT's names, but x_t = t x_0 + (1 - t) noise and the velocity x_0 - noise."""
    torch.save(dit().state_dict(), tmp_path / "SiT-XL-2-256x256.pt")
    torch.save(create_model("dit_modern_nano", qk_norm=False).state_dict(), tmp_path / "xl.pt")
    told = {"rope": True, "swiglu": True, "rms_norm": True}
    for name, title, settings in (("SiT-XL-2-256x256.pt", "SiT", {}), ("xl.pt", "LightningDiT", told)):
        (note,) = released.load(tmp_path / name, settings=settings | {"num_heads": 3}).notes
        assert note.startswith(f"{title}'s files") and "t is 1 at the image" in note


def diffusers_dit(**more: Any) -> Any:
    sizes = {"num_attention_heads": 3, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8}
    net: Any = drawn(DiTTransformer2DModel(**sizes, num_embeds_ada_norm=5, out_channels=8, **more))  # type: ignore[arg-type]
    for block in net.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(net.transformer_blocks[0].norm1.emb.state_dict())
    return net


@pytest.mark.parametrize("pipeline", [False, True])
def test_diffusers_folder(tmp_path, pipeline):
    """The outputs are diffusers' where its frequencies and epsilon are DiT's, and differ where they are its own."""
    net = diffusers_dit(norm_eps=1e-6)
    net.save_pretrained(tmp_path / "transformer" if pipeline else tmp_path)
    weights = released.load(tmp_path)
    assert vars(weights.net.config).items() >= DIT_FIELDS.items()
    x, t, y = inputs(4, 8, 6)
    own = net(x, timestep=t, class_labels=y).sample
    for block in net.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    assert error(weights.net(x, t, y), net(x, timestep=t, class_labels=y).sample) < ROUNDING
    assert error(weights.net(x, t, y), own) > 1e-3
    assert "10000^(-i/128)" in weights.notes[0] and len(weights.notes) == 1


def test_diffusers_that_dit_is_not(tmp_path):
    diffusers_dit().save_pretrained(tmp_path / "eps")
    assert "diffusers has 1e-05 before the MLP" in released.load(tmp_path / "eps").notes[1]
    diffusers_dit(activation_fn="geglu").save_pretrained(tmp_path / "geglu")
    with pytest.raises(InputError, match="has activation_fn 'geglu', and DiT has 'gelu-approximate'"):
        released.load(tmp_path / "geglu")
    net = diffusers_dit()
    net.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight.data[0] += 1
    net.save_pretrained(tmp_path / "two")
    with pytest.raises(InputError, match=r"blocks 0 and 1 differ in class_embedder.embedding_table"):
        released.load(tmp_path / "two")


UNETS = {
    "legacy": ([1, 2, 2], 1, [2, 4], 1, 16, False, 5),
    "new": ([1, 2, 2], 1, [2, 4], 1, 16, True, 5),
    "heads by number": ([1, 2], 2, [1, 2], 2, -1, False, 5),
    "half of the first level": ([0.5, 1], 1, [2], 1, 32, True, 5),
    "unconditional": ([1, 1, 2], 1, [4], 1, 32, False, 0),
}


@pytest.mark.parametrize("name", UNETS)
def test_guided_diffusion(tmp_path, name):
    mult, depth, ds, heads, head, new, classes = UNETS[name]
    net = drawn(GuidedUNet(64 if name.startswith("half") else 32, mult, depth, ds, heads, head, new, classes))
    torch.save(net.state_dict(), tmp_path / "a.pt")
    told = {"input_size": 16, "num_heads": heads, "num_head_channels": head, "new_attention_order": new}
    ours = released.load(tmp_path / "a.pt", settings=told).net
    x, t, y = inputs(3, 16, max(classes, 1))
    assert error(ours(x, t, y), net(x, t, y)) < ROUNDING
    other = released.load(tmp_path / "a.pt", settings=told | {"new_attention_order": not new}).net
    one_head = name == "half of the first level"
    assert (error(other(x, t, y), net(x, t, y)) > 1e-2) != (one_head and ours.config.widths[-1] == 32)


PUBLISHED_UNETS = {
    "adm_128": (256, [1, 1, 2, 3, 4], 2, [4, 8, 16], False),
    "adm_64": (192, [1, 2, 3, 4], 3, [2, 4, 8], True),
    "adm_256": (256, [1, 1, 2, 2, 4, 4], 2, [8, 16, 32], False),
    "adm_512": (256, [0.5, 1, 1, 2, 2, 4, 4], 2, [16, 32, 64], False),
}


@pytest.mark.parametrize("name", PUBLISHED_UNETS)
def test_published_unets_are_known_by_their_sizes(name):
    """The flags of guided-diffusion's README; on the meta device, because only names and shapes matter."""

    base, mult, depth, ds, new = PUBLISHED_UNETS[name]
    with torch.device("meta"):
        net = GuidedUNet(base, mult, depth, ds, 1, 64, new, 1000)
    source = Source(Path("a.pt"), net.state_dict(), "model")
    assert configuration(source, guided_diffusion, None, {}) == preset(name).config
