"""`lamabench convert`: a run of released weights is sampled, scored, costed, benched and reported like a training."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lamabench.harness import open_run
from lamabench.harness import released as runs
from lamabench.harness.record import read_records
from lamabench.harness.shards import open_samples, set_of
from lamabench.launch.cli import main
from lamabench.launch.commands import convert
from lamabench.launch.prune import named_folders, unnamed_folders
from safetensors.torch import load_file, save_file

from ..autoencoders import save_kl
from ..models.released.originals import ROUNDING, TimmDiT, drawn, error

DRAW = ["sample.count=16", "sample.method=ddim", "sample.steps=2", "sample.batch_size=16"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = drawn(TimmDiT(8, 1, 10, 2, 32, 1, 2))
    torch.save(net.state_dict(), "small.pt")
    return net


def converted(*words: str) -> Path:
    assert main(["convert", *words]) == 0
    (folder,) = Path("runs/weights").iterdir()
    return folder


def test_a_run_of_released_weights(place, capsys):
    words = ["small.pt", "--to", "small", "model.num_heads=2", "data=digits", "data.size=8", "data.split=most"]
    folder = converted(*words)
    link = Path("runs/train") / folder.name
    text = capsys.readouterr().out
    digest = hashlib.sha256(Path("small.pt").read_bytes()).hexdigest()
    assert f"{folder}: DiT, small.pt, SHA-256 {digest[:12]}" in text
    assert f"next: lamabench sample {link} sample.count=160" in text

    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 10])
    run = open_run(link)
    assert error(run.model()(x, t, y), place(x, t, y)) < ROUNDING
    assert run.moments == [0]

    assert main(["sample", str(link), *DRAW]) == 0
    (samples,) = folder.glob("samples/*")
    images = open_samples(set_of(samples))
    direct = run.sample([index % 10 for index in range(16)], steps=2)
    assert np.abs(np.asarray(images[:], int) - direct.astype(int)).max() <= 1
    evaluate = ["evaluate", str(link), *DRAW, "evaluate.metrics=[fd,heldout]", "evaluate.reference_count=16"]
    assert main([*evaluate, "evaluate.heldout_count=8"]) == 0
    rows = [row.flat() for row in read_records(samples / "record.jsonl")]
    assert [(row["kind"], row.get("metric")) for row in rows] == [
        ("sample", None), ("score", "held-out loss"), ("score", "FD-EffNetLite0-16"),
    ]  # fmt: skip
    for row in rows:  # how long the weights were trained is unknown, and is not 0
        assert row["state"] == "done" and row["checkpoint_step"] == 0
        assert [row[name] for name in ("images_seen", "training_flops", "training_seconds")] == [None] * 3

    capsys.readouterr()
    assert main(["cost", str(link), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["params"] == sum(one.numel() for one in place.parameters())
    assert main(["bench", str(link), "bench.modes=[forward]", "bench.batch_size=1", "bench.seconds=0.01"]) == 0
    (model,) = Path("runs/models").iterdir()
    assert [row.kind for row in read_records(model / "record.jsonl")] == ["cost", "speed"]

    capsys.readouterr()
    assert main(["report", str(link), "--table", "runs", "--format", "csv"]) == 0
    assert f"DiT,small.pt,{digest}," in capsys.readouterr().out
    assert main(["report", "runs", "--table", "summary", "--format", "csv"]) == 0
    table = capsys.readouterr().out
    assert [line.split(",")[0] for line in table.splitlines()] == ["study", "bench", "train"]
    assert table.count(",done\n") == 2
    named = named_folders(Path("runs"))
    assert not list(unnamed_folders(Path("runs"), named))
    assert folder in set(unnamed_folders(Path("runs"), named - {folder}))


def test_the_same_command_continues(place, monkeypatch, capsys):
    words = ["small.pt", "model.num_heads=2", "data=digits", "data.size=8"]
    with monkeypatch.context() as patch:
        patch.setattr(convert.runs, "keep_weights", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["convert", *words]) == 130
    folder = converted(*words)
    file = folder / "weights" / "step-00000000.safetensors"
    first = file.read_bytes()
    assert converted(*words) == folder  # nothing is written twice
    assert [row.kind for row in read_records(folder / "record.jsonl")] == ["convert"]
    file.write_bytes(first[:-7])
    converted(*words)
    assert file.read_bytes() == first


def test_keys_are_of_the_tensors_not_of_the_file(place):
    words = ["model.num_heads=2", "data=digits", "data.size=8", "--to", "one"]
    one = converted("small.pt", *words)
    state = torch.load("small.pt", weights_only=True)
    torch.save({"ema": state, "model": {}, "opt": {}}, "other.pt")
    assert converted("other.pt", *words) == one
    sources = [row.flat()["file"] for row in read_records(one / "record.jsonl")]
    assert sources == ["small.pt", "other.pt"]  # both are on record
    state["pos_embed"] += 1
    torch.save(state, "third.pt")
    assert main(["convert", "third.pt", *words]) == 0
    assert len(list(Path("runs/weights").iterdir())) == 2


def test_weights_of_an_objective_without_a_posterior(place, capsys):
    """Such weights have no variances, and their default sampler is one that fits."""
    net = drawn(TimmDiT(8, 1, 10, 2, 32, 1, 2))
    state = net.state_dict()
    for name in ("weight", "bias"):
        state[f"final_layer.linear.{name}"] = state[f"final_layer.linear.{name}"][:4]
    torch.save(state, "flow.pt")
    words = ["flow.pt", "model.num_heads=2", "model.out_channels=1", "data=digits", "data.size=8"]
    assert main(["convert", *words]) == 2
    error = capsys.readouterr().err
    assert "has 1 channels, and objective ddpm needs 2; choices: objective.kind=v, objective.kind=flow" in error
    folder = converted(*words, "objective.kind=flow")
    assert open_run(folder).config.sample.method == "ddim"
    assert main(["sample", str(folder), "sample.count=4", "sample.steps=2"]) == 0


def test_a_folder_is_known_by_the_bytes_of_its_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}", encoding="utf-8")
        save_file({"w": torch.ones(3)}, tmp_path / name / "x.safetensors")
    assert runs.file_digest(tmp_path / "a") == runs.file_digest(tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text("{ }", encoding="utf-8")
    assert runs.file_digest(tmp_path / "a") != runs.file_digest(tmp_path / "b")
    tensors = load_file(tmp_path / "a" / "x.safetensors")
    assert runs.tensors_digest(tensors) != runs.tensors_digest({"w": torch.ones(3, 1)})


def test_latents_need_an_encoder(tmp_path, monkeypatch, capsys):
    """Without one, they are costed and benched; with a cache of latents, its autoencoder decodes the samples."""
    monkeypatch.chdir(tmp_path)
    net = drawn(TimmDiT(4, 4, 10, 2, 32, 1, 2))
    torch.save(net.state_dict(), "latent.pt")
    folder = converted("latent.pt", "model.num_heads=2")
    text = capsys.readouterr().out
    assert "draws latents of 4 × 4 × 4, which only an autoencoder decodes: encoder=FOLDER names" in text
    assert f"next: lamabench bench runs/train/{folder.name}" in text
    assert main(["sample", str(folder), *DRAW]) == 2
    assert "which only an autoencoder decodes: encoder=FOLDER" in capsys.readouterr().err
    assert not list(folder.glob("samples/*"))

    for seed, name in ((0, "one"), (1, "two")):
        save_kl(tmp_path / f"kl-{name}", seed=seed, in_channels=1)
        encode = ["encode", "data=digits", "data.size=16", "data.split=test", f"encoder=kl-{name}", "--to", name]
        assert main(encode) == 0
        assert main(["sample", str(folder), *DRAW, f"encoder={name}"]) == 0
    sets = {path.name: open_samples(set_of(path))[:] for path in folder.glob("samples/*")}
    assert len(sets) == 2  # of one set of weights, by what decoded them
    assert all(images.shape == (16, 16, 16, 1) for images in sets.values())
    one, two = sets.values()
    assert not np.array_equal(one, two)
    assert converted("latent.pt", "model.num_heads=2", "encoder=one") == folder  # the key is of the weights
    assert "next: lamabench sample" in capsys.readouterr().out
    assert open_run(folder).config.encoder.kind == "latents"
    assert main(["encode", "data=digits", "data.size=8", "data.split=test", "encoder=kl-one", "--to", "small"]) == 0
    capsys.readouterr()
    assert main(["sample", str(folder), *DRAW, "encoder=small"]) == 2
    assert "model.input_size 4 does not fit encoder.side 2" in capsys.readouterr().err
