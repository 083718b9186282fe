"""Files that cannot be read, or whose weights do not fit: one line with the cause and the likely cure."""

import pickle
from typing import Any

import pytest
import torch
from lamabench.kernels.errors import InputError
from lamabench.models import released
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
