"""Files that cannot be read, or whose weights do not fit: one line with the cause and the likely cure."""

import json
import os
import pickle
import zipfile
from typing import Any

import pytest
import torch
from lamabench.kernels.errors import InputError
from lamabench.models import released
from safetensors.torch import save_file
from torch import nn

from .originals import dit


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


def test_files_that_do_not_fit(tmp_path, capsys):
    state = dit().state_dict()
    told = {"num_heads": 3}

    def fault(content: Any, name: str = "a.pt", **more: Any) -> str:
        torch.save(content, tmp_path / name)
        with pytest.raises(InputError) as caught:
            released.load(tmp_path / name, **{"settings": told, **more})
        assert "\n" not in str(caught.value)
        return str(caught.value).replace(str(tmp_path), "")

    assert "has print, which only code can read" in fault({"ema": Harmful()})
    assert "lamabench runs no code" in fault(nn.Linear(2, 2))
    assert capsys.readouterr().out == ""
    live = fault({"model": state, "opt": {}})
    assert live.startswith("/a.pt is a training file without averaged weights (ema): it has model, opt; if `model`")
    less = {name: value for name, value in state.items() if name != "blocks.1.attn.qkv.bias"}
    assert fault(less).endswith("1 missing: blocks.1.attn.qkv.bias; the file is incomplete")
    more = fault({**state, "blocks.0.attn.q_norm.weight": torch.ones(16)})
    assert more.endswith("1 unexpected: blocks.0.attn.q_norm.weight; the code that wrote it has parts that this model "
                         "lacks, so that it is of another model or version")  # fmt: skip
    bent = fault({**state, "blocks.0.mlp.fc1.bias": torch.ones(7)})
    assert bent.endswith("blocks.0.mlp.fc1.bias [7] for [192]; it is of a model of other sizes")
    assert "has the weights of no model that lamabench reads (DiT, guided-diffusion, " in fault({"a": torch.ones(1)})
    assert "no state dict: it has int" in fault(3)
    assert "its 'step' is int" in fault({"step": 3})
    assert "does not fit dit_s_2: it has input_size 8, not 32; " in fault(state, preset="dit_s_2", settings={})
    assert "but unet_nano is no such model" in fault(state, preset="unet_nano", settings={})
    assert "it has depth 2, not 3" in fault(state, settings={**told, "depth": 3})
    (tmp_path / "text.pt").write_text("hello", encoding="utf-8")
    (tmp_path / "empty.pt").touch()
    with open(tmp_path / "plain.pt", "wb") as file:
        pickle.dump({"a": 1}, file, protocol=2)
    for name in ("text.pt", "empty.pt", "plain.pt"):
        with pytest.raises(InputError, match=r"is no file that torch.save wrote, or is damaged|no state dict"):
            released.load(tmp_path / name)
    with pytest.raises(InputError, match=r"is no folder of diffusers: it has no config.json"):
        released.load(tmp_path)


def refused(path: Any, **more: Any) -> str:
    with pytest.raises(InputError) as caught:
        released.load(path, **{"settings": {"num_heads": 3}, **more})
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(path), "FILE")


def test_tensors_that_no_network_has(tmp_path):
    state, head = dit().state_dict(), "final_layer.linear.weight"
    path = tmp_path / "a.pt"

    def fault(value: Any, name: str = head) -> str:
        torch.save({**state, name: value}, path)
        return refused(path)

    weight = state[head]
    assert fault(weight * torch.nan) == fault(weight.double() * 1e300) == fault(weight / 0)
    assert fault(weight / 0).startswith(f"FILE: its '{head}' is not finite")
    for value in (weight.to(torch.complex64), weight.to_sparse(), weight.to("meta")):
        assert fault(value).startswith(f"FILE: its '{head}' is no plain tensor of real numbers")
    for kind in (torch.int8, torch.bool):
        assert f"1 not of real numbers: {head}; it is quantised" in fault(weight.to(kind))
    assert "has the shape [1000000000, 48], for which the file has too few numbers" in fault(
        torch.zeros(1, 1).expand(10**9, 48), "y_embedder.embedding_table.weight"
    )
    assert fault(torch.tensor(1.0), "x_embedder.proj.weight").startswith("FILE has x_embedder.proj.weight [], not 4")
    assert fault(torch.zeros(0, 4, 2, 2), "x_embedder.proj.weight").startswith("FILE has x_embedder.proj.weight [0, 4")
    assert "1 unexpected: blocks.999" in fault(weight, f"blocks.{'9' * 5000}.x")


def test_a_compressed_archive_is_not_read_as_numbers(tmp_path):
    torch.save(dit().state_dict(), tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as old,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for one in old.infolist():
            new.writestr(one.filename, old.read(one))
    assert refused(tmp_path / "b.pt").startswith("FILE is a compressed archive")
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(whole[: len(whole) // 2])
    assert refused(tmp_path / "a.pt") == "FILE is no file that torch.save wrote, or is damaged"
    os.mkfifo(tmp_path / "pipe.pt")
    assert refused(tmp_path / "pipe.pt") == "no such file or folder: FILE"


def test_folders_of_another_form(tmp_path):
    block = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    tensors = {block: torch.zeros(6, 48), "pos_embed.proj.weight": torch.zeros(48, 1, 2, 2)}
    save_file({**tensors, "proj_out_2.weight": torch.zeros(8, 48)}, tmp_path / "diffusion_pytorch_model.safetensors")
    for settings in ({"sample_size": "x"}, {"sample_size": [8]}, {"num_attention_heads": "x"}, {"norm_eps": "x"}):
        (tmp_path / "config.json").write_text(json.dumps({"sample_size": 8, **settings}), encoding="utf-8")
        assert refused(tmp_path).startswith("FILE has tensors or settings of a form that diffusers' DiT does not have")
    for names in ([1], {"a": 3}, {"a": "../x.safetensors"}, {}):
        index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": names}), encoding="utf-8")
        assert refused(tmp_path).endswith("is damaged: its weight_map should name files of its folder")
