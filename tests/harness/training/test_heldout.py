"""The held-out loss: closed forms of networks that predict 0, and that only weights and images change it."""

import json
import math
import signal
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from lamabench.harness import parallel, signals
from lamabench.harness.config import check_fit
from lamabench.harness.data.images import load, load_held_out
from lamabench.harness.data.splits import held_out
from lamabench.harness.diffusion.flow import Flow
from lamabench.harness.diffusion.gaussian import DDPM
from lamabench.harness.diffusion.vprediction import VPrediction
from lamabench.harness.disk import read_lines
from lamabench.harness.keys import score_key
from lamabench.harness.record import read_records
from lamabench.harness.scoring.heldout import TIMES, heldout_losses, mean
from lamabench.harness.scoring.reference import reference_of
from lamabench.harness.training.start import initial_model
from lamabench.kernels.errors import InputError
from lamabench.launch.cli import main
from PIL import Image
from trainings import DIT, FAMILIES, assert_same, make, metrics, trained

EVERY = [62, 187, 312, 437, 562, 687, 812, 937]


def zero(x, t, y):
    return torch.zeros(len(x), 2 * x.shape[1], *x.shape[2:])


def most(config, **settings):
    """A configuration with a test split of 225 digits."""
    evaluate = replace(config.evaluate, **settings)
    return replace(config, data=replace(config.data, split="most"), evaluate=evaluate)


def held(config):
    return load(held_out(config.data))


def noise(image, number, shape):
    """By numpy's own Philox: the key is the seed 0 and the stream 6."""
    bits = np.random.Philox(key=np.array([0, 6], np.uint64), counter=[0, 0, 0, image * TIMES + number])
    return np.random.Generator(bits).standard_normal(shape, dtype=np.float32).astype(np.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_with_a_zero_head_has_the_variance_of_the_noise(family):
    """The loss is the mean square of the noise, which is 1 ± √(2 / elements)."""
    config = most(make(FAMILIES[family]))
    net = initial_model(config).eval()
    *_, weight, bias = net.parameters()
    with torch.no_grad():
        weight.zero_()
        bias.zero_()
    losses, error = heldout_losses(net, DDPM(), held(config), config, "cpu")
    assert list(losses) == EVERY
    for number, loss in enumerate(losses.values()):
        squares = [noise(image, number, (1, 8, 8)) ** 2 for image in range(225)]
        assert loss == pytest.approx(np.mean(squares), rel=1e-6)
    assert mean(losses) == pytest.approx(1, abs=4 * math.sqrt(2 / (8 * 225 * 64)))
    of_images = [np.mean([noise(i, number, (1, 8, 8)) ** 2 for number in range(TIMES)]) for i in range(225)]
    assert error == pytest.approx(np.std(of_images, ddof=1) / 15, rel=1e-5)
    assert error == pytest.approx(math.sqrt(2 / (8 * 225 * 64)), rel=0.2)  # if images differ by their noise only


def test_flow_has_its_own_closed_form():
    """E|noise - x_0|² is 1 + E x_0², and a network that knows the images makes no error at any t."""
    config = most(make())
    images = held(config)
    losses, _ = heldout_losses(lambda x, t, y: torch.zeros_like(x), Flow(), images, config, "cpu")
    x0 = images.images_at(np.arange(225)).double() / 127.5 - 1
    assert list(losses) == [1 / 16, 3 / 16, 5 / 16, 7 / 16, 9 / 16, 11 / 16, 13 / 16, 15 / 16]
    assert mean(losses) == pytest.approx(1 + x0.square().mean().item(), rel=0.02)

    grey = torch.full((225, 1, 8, 8), 51, dtype=torch.uint8)
    images.images = grey  # every x_0 is -0.6, so that x_t says the noise
    exact, _ = heldout_losses(lambda x, t, y: (x + 0.6) / t.view(-1, 1, 1, 1), Flow(), images, config, "cpu")
    assert mean(exact) < 1e-10


def test_v_has_its_own_closed_form():
    """E|v|² is alpha_bar + (1 - alpha_bar) E x_0² at each timestep."""
    config = most(make())
    images = held(config)
    losses, _ = heldout_losses(lambda x, t, y: torch.zeros_like(x), VPrediction(), images, config, "cpu")
    x0 = images.images_at(np.arange(225)).double() / 127.5 - 1
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[EVERY]
    expected = alpha_bar + (1 - alpha_bar) * x0.square().mean().item()
    assert list(losses) == EVERY
    assert list(losses.values()) == pytest.approx(expected, rel=0.05)


def test_every_image_has_its_label_and_noise_in_any_batch():
    """What the network gets, by image: its own label, and never the null class."""
    config = replace(most(make(), heldout_count=40), train=replace(make().train, class_dropout=0.9))
    images, seen = held(config), {}
    for size in (7, 40):
        given = seen[size] = []

        def net(x, t, y, given=given):
            given += [(int(time), int(label), one.sum().item()) for one, time, label in zip(x, t, y, strict=True)]
            return zero(x, t, y)

        heldout_losses(net, DDPM(), images, replace(config, evaluate=replace(config.evaluate, batch_size=size)), "cpu")
    assert sorted(seen[7]) == sorted(seen[40]) and len(seen[7]) == 40 * TIMES
    labels = [label for time, label, _ in seen[40] if time == 62]
    chosen = sorted(labels) != sorted(images.labels[:40].tolist())  # not the first images, which may be of one class
    assert chosen and max(labels) <= 9


def test_batches_change_it_by_rounding_and_processes_by_nothing(monkeypatch):
    config = most(make())
    net, images = initial_model(config).eval(), held(config)
    torch.manual_seed(0)
    for value in net.parameters():
        torch.nn.init.normal_(value, std=0.1)

    def losses(size=32, **more):
        return heldout_losses(
            net, DDPM(), images, most(config, batch_size=size), "cpu", **more
        )  # fmt: skip

    alone, error = losses()
    assert len(set(alone.values())) == TIMES and (alone, error) == losses()
    smaller, other = losses(size=5)
    assert list(smaller.values()) == pytest.approx(list(alone.values()), rel=1e-5)
    assert other == pytest.approx(error, rel=1e-4)
    parts = []
    monkeypatch.setattr(parallel, "size", lambda: 3)
    monkeypatch.setattr(parallel, "agreeing", nullcontext)
    monkeypatch.setattr(parallel, "stopping", lambda: False)
    for rank in (2, 1, 0):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(parallel, "gather", lambda sums: parts.append(sums) or parts)
        together = losses(together=True)
    assert [len(part) for part in parts] == [2, 3, 3]  # of 8 batches
    assert together == (alone, error)


@pytest.mark.parametrize("family", ["dit", "lamamba"])
def test_a_training_with_it_is_the_same_training(tmp_path, family):
    """With dropout, whose numbers are drawn from torch's random state."""
    model = replace(DIT, dropout=0.2) if family == "dit" else FAMILIES[family]
    plain = most(make(model))
    config = replace(plain, run=replace(plain.run, heldout_every=4))
    states, folders = [], []
    for name, one in (("with", config), ("without", plain)):
        torch.manual_seed(3)
        folders.append(trained(tmp_path / name, one))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    lines = metrics(folders[0])
    assert [line["step"] for line in lines if "heldout_loss" in line] == [4]
    line = lines[1]
    parts = [line[f"heldout_loss_{number}"] for number in range(1, 9)]
    assert line["heldout_loss"] == pytest.approx(np.mean(parts), rel=1e-12)
    stripped = [{k: v for k, v in one.items() if not k.startswith("heldout")} for one in read_lines(
        folders[0] / "metrics.jsonl")]  # fmt: skip
    (folders[0] / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in stripped))
    assert_same(*folders)


@pytest.mark.parametrize("end", [4, 6])
def test_a_signal_ends_it_within_a_batch_and_the_training_goes_on_bit_for_bit(tmp_path, monkeypatch, capsys, end):
    """The line of that step is written by the training that continues, unless the signal came at the last step."""
    plain = most(make(steps=end), batch_size=32)
    config = replace(plain, run=replace(plain.run, heldout_every=4))
    whole = trained(tmp_path / "whole", config)
    calls = []

    def heed(original=parallel.heed):
        calls.append(None)
        if len(calls) == 3:
            signals.take(signal.SIGTERM)
        original()

    monkeypatch.setattr(signals, "_noted", [])
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "heed", heed)
        with pytest.raises(signals.Stopped) if end > 4 else nullcontext():
            trained(tmp_path / "cut", config)
    assert len(calls) == 3, "of 8 batches"
    lines = read_lines(tmp_path / "cut" / "metrics.jsonl")
    assert [line["step"] for line in lines] == ([2] if end > 4 else [2, 4])
    assert not any("heldout_loss" in line for line in lines)
    signals._noted.clear()
    assert ", heldout " not in capsys.readouterr().err
    trained(tmp_path / "cut", config)
    if end > 4:
        assert ", heldout " in capsys.readouterr().err  # it is no part of the first step
        assert_same(tmp_path / "cut", whole)
        assert [line["step"] for line in metrics(whole) if "heldout_loss" in line] == [4]


SMALL = """model=dit_nano model.depth=1 model.hidden_size=16 model.num_heads=2 data=digits data.size=8 data.split=most
train.batch_size=8 train.precision=float32 train.steps=4 train.lr=1e-2 run.log_every=2 run.device=cpu""".split()


def test_the_score_needs_no_samples_and_is_what_the_training_logs(tmp_path, capsys):
    root = f"run.root={tmp_path}"
    assert main(["train", *SMALL, root, "run.heldout_every=2"]) == 0
    (run,) = (tmp_path / "train").glob("dit_nano*")
    capsys.readouterr()
    asked = ["evaluate", str(run), "evaluate.metrics=[heldout]", "--json"]
    assert main(asked) == 0
    (row,) = json.loads(capsys.readouterr().out)
    last = read_lines(run / "metrics.jsonl")[-1]
    assert (row["metric"], row["count"], row["reference"], row["weights"]) == (
        "held-out loss",
        225,
        "digits test",
        "ema",
    )
    assert row["value"] == last["heldout_loss"]
    assert list(row["by_timestep"].values()) == [last[f"heldout_loss_{number}"] for number in range(1, 9)]
    assert row["samples"] is None and row["evaluation"]["weights"] == "ema"
    assert row["data_fingerprint"] == row["evaluation"]["reference"]["fingerprint"]
    (folder,) = (run / "samples").iterdir()
    assert not (folder / "shards").exists() and [one.kind for one in read_records(folder / "record.jsonl")] == ["score"]

    assert main([*asked, "evaluate.batch_size=9"]) == 0  # of the same key: nothing is done again
    assert len(read_records(folder / "record.jsonl")) == 1
    capsys.readouterr()
    assert main([*asked, "evaluate.heldout_count=20"]) == 0
    (fewer,) = json.loads(capsys.readouterr().out)
    assert fewer["count"] == 20 and fewer["protocol"] != row["protocol"]
    assert main(["evaluate", str(run), "evaluate.metrics=[heldout,fd]"]) == 2
    assert "has no samples to score; draw them first" in capsys.readouterr().err


def test_the_protocol_has_the_size_of_images_in_files(tmp_path, capsys):
    """The fingerprint of a folder is of its files, whatever their images are resized to."""
    rng, rows = np.random.default_rng(0), []
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for number in range(8):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / f"{number}.png")
    data = ["data=folder", f"data.path={tmp_path}/train", "data.num_classes=0"]
    words = [word for word in SMALL if not word.startswith("data")] + [*data, f"run.root={tmp_path}/runs"]
    for size in (8, 16):
        assert main(["train", *words, f"data.size={size}"]) == 0
        (run,) = {*(tmp_path / "runs/trainings").iterdir()} - {one["run"] for one in rows}
        capsys.readouterr()
        assert main(["evaluate", str(run), "evaluate.metrics=[heldout]", "--json"]) == 0
        rows.append({"run": run, **json.loads(capsys.readouterr().out)[0]})
    one, two = rows
    assert one["evaluation"]["reference"] == two["evaluation"]["reference"]
    assert [row["evaluation"]["images"] for row in rows] == [[8, 8, 3], [16, 16, 3]]
    assert one["protocol"] != two["protocol"]


def test_the_key_holds_what_it_reads():
    config = most(make())

    def key(config, metric="heldout"):
        return score_key(config, "s", metric)

    assert key(config) == key(most(config, features="inception_v3", reference_count=9, seed=3, split="test"))
    assert key(config) != key(most(config, heldout_count=7))
    assert key(config) != key(replace(config, data=replace(config.data, split="train")))
    assert key(config, "fd") == key(most(config, heldout_count=7), "fd") != key(most(config, split="test"), "fd")


def test_the_reference_may_be_the_test_split():
    config = most(make(), split="test")
    reference, images = reference_of(config), held(config)
    assert (reference.name, reference.fingerprint, len(reference.images)) == ("digits test", images.fingerprint, 225)
    assert reference_of(most(make())).name == "digits"
    check_fit(config)
    with pytest.raises(InputError, match=r"data\.split=most leaves every eighth image"):
        check_fit(replace(make(), evaluate=config.evaluate))


def test_a_test_split_of_other_classes_is_refused():
    config = most(make())
    with pytest.raises(InputError, match="the test split of data 'digits' has other classes than the training data: 9"):
        load_held_out(config.data, [*map(str, range(9)), "nine"])
