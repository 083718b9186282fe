"""Autoguidance by another training: what is drawn, its key, its record, its cost, and guides that do not fit."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from lamabench.baselines.dit import DiTConfig
from lamabench.harness.config import Config
from lamabench.harness.data.encoder import to_uint8
from lamabench.harness.diffusion.gaussian import DDPM
from lamabench.harness.diffusion.samplers import index_noise, ratios, sample
from lamabench.harness.guide import flops, passes, resolved
from lamabench.harness.keys import samples_key
from lamabench.harness.measure.cost import cost
from lamabench.harness.progress import Progress
from lamabench.harness.run import create, read_run
from lamabench.harness.sampling import generate
from lamabench.harness.scoring.protocol import generation_of, words
from lamabench.harness.sections import DataConfig, ObjectiveConfig, RunConfig, SampleConfig, TrainConfig
from lamabench.harness.shards import Shards
from lamabench.harness.stages import execute
from lamabench.harness.tasks import tasks
from lamabench.harness.training.checkpoint import load_weights
from lamabench.kernels.errors import InputError
from lamabench.models.registry import build

DIT = DiTConfig(input_size=8, in_channels=1, num_classes=10, patch_size=2, hidden_size=16, depth=2, num_heads=2)
SMALL = replace(DIT, depth=1, hidden_size=8)
STEP, COUNT, STEPS = 4, 4, 5
MIDDLE = [0.5, 40.0]  # of the ratios of five DDIM steps, some are in it and some on each side


def make(root, model=DIT, seed=0, **sample):
    settings = {"count": COUNT, "method": "ddim", "steps": STEPS, "batch_size": 3, "guidance": 2.0, **sample}
    return Config(
        model=model,
        data=DataConfig(kind="digits", size=8, channels=1, num_classes=10),
        train=TrainConfig(steps=STEP, batch_size=4, ema_decay=0.5, precision="float32", lr=1e-2, snapshots=[2]),
        sample=SampleConfig(**settings),
        run=RunConfig(device="cpu", root=str(root)),
        seed=seed,
    )


def about(name):
    return {"study": "s", "name": name, "variant": {}, "seed": 0, "model": name, "family": "dit", "title": name}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A root, and the folders of a training and of one of a smaller model, each with the moments 2 and 4."""
    root, folders = tmp_path_factory.mktemp("root"), []
    for name, model in (("dit_mine", DIT), ("dit_small", SMALL)):
        (task,) = tasks(make(root, model), about(name), ["train"])
        execute(task, Progress())
        folders.append(task.path)
    return root, *folders


def drawn(trained, **sample):
    """The folder of a set of samples, its images and its record."""
    (task,) = tasks(make(trained[0], **sample), about("dit_mine"), ["sample"])
    execute(task, Progress())
    record = read_run(task.path).last("sample", "done").flat()
    return task.path, Shards(task.path / "shards" / record["shards"])[:], record


def net_of(folder, step, model):
    net = build(model).eval()
    net.load_state_dict(load_weights(folder, step, "ema", model).tensors)
    return net


def test_images_are_guided_by_the_weights_of_the_other_training(trained):
    _, own, small = trained
    folder, images, record = drawn(trained, guide=str(small), guide_at=2, guidance_interval=MIDDLE)
    x = next(index_noise(0, range(COUNT), (1, 8, 8), 1))
    net, guide = net_of(own, STEP, DIT), net_of(small, 2, SMALL)
    inside = [MIDDLE[0] < sigma <= MIDDLE[1] for sigma in ratios(DDPM(), "ddim", STEPS)]
    assert 0 < sum(inside) < STEPS
    calls = iter(inside)

    def by_hand(x, t, y):
        out = net(x, t, y)
        return 2 * out - guide(x, t, y) if next(calls) else out

    x0 = sample(by_hand, x, torch.tensor([0, 2, 5, 7]), objective=DDPM(), method="ddim", steps=STEPS)
    expected = to_uint8(x0).permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(expected - images).max() <= 1 and images.std() > 20
    assert np.abs(drawn(trained, guidance=1.0)[1].astype(int) - images).max() > 1

    assert (record["passes"], record["guide_passes"]) == (STEPS, sum(inside))
    assert record["sampling_flops"] == STEPS * cost(DIT).flops + sum(inside) * cost(SMALL).flops
    assert record["guide_key"] == small.name.rsplit("-", 1)[1] and record["guidance_interval"] == "0.5 to 40"
    assert record["guide"].startswith("dit_small ") and record["guide"].endswith(" at step 2")
    text = words(generation_of(folder))
    assert (
        text == f"5 ddim steps, autoguidance 2 by {record['guide']} at sigma 0.5 to 40, balanced labels, EMA, float32"
    )
    assert json.loads((folder / "config.json").read_text())["config"]["sample"]["guide_at"] == 2


def test_scale_one_reads_no_guide(trained, monkeypatch):
    monkeypatch.setattr("lamabench.harness.sampling.open_guide", lambda config: pytest.fail("the guide was read"))
    folder, plain, _ = drawn(trained, guidance=1.0)
    other, images, record = drawn(trained, guidance=1.0, guide=str(trained[2]))
    assert np.array_equal(plain, images) and record["guide"] is None and record["guide_passes"] == 0
    assert generation_of(folder) == generation_of(other)


def test_the_key_has_the_guide_and_no_path(trained, tmp_path):
    root, own, small = trained
    copy = tmp_path / "elsewhere"
    shutil.copytree(small, copy)

    def key(**sample):
        return samples_key(resolved(make(root, **sample)), STEP)

    plain = key()
    assert key(guide=str(small)) == key(guide=str(copy)) == key(guide=str(small), guide_at=4) != plain
    keys = {plain, key(guide=str(small)), key(guide=str(small), guide_at=2), key(guide=str(own), guide_at=2)}
    keys |= {key(guide=str(small), guide_weights="live"), key(guidance_interval=MIDDLE)}
    assert len(keys) == 6
    assert key(guide_at=2, guide_weights="live") == plain, "they say nothing without a guide"


def test_guides_of_other_seeds_are_one_way_of_drawing(trained, tmp_path):
    small = trained[2]
    other = make(tmp_path, SMALL, seed=1)
    (task,) = tasks(other, about("dit_small"), ["train"])
    execute(task, Progress())
    ways = [drawn(trained, guide=str(folder), guide_at=2) for folder in (small, task.path)]
    assert ways[0][2]["guide_key"] != ways[1][2]["guide_key"] and not np.array_equal(ways[0][1], ways[1][1])
    assert generation_of(ways[0][0]) == generation_of(ways[1][0])


def test_passes_and_flops(trained):
    root, _, small = trained
    assert passes(make(root)) == (2 * STEPS, 0) and passes(make(root, guidance=1.0)) == (STEPS, 0)
    assert passes(make(root, guide=str(small))) == (STEPS, STEPS)
    inside = passes(make(root, guidance_interval=MIDDLE))[0] - STEPS
    assert 0 < inside < STEPS and passes(make(root, guidance_interval=MIDDLE, guide=str(small))) == (STEPS, inside)
    assert flops(make(root)) == 2 * STEPS * cost(DIT).flops
    assert flops(make(root, guide=str(small))) == STEPS * (cost(DIT).flops + cost(SMALL).flops)


def test_an_unconditional_model_can_be_guided_by_another(tmp_path):
    sample = {"count": 2, "steps": 2}
    for depth in (1, 2):
        config = make(tmp_path, replace(SMALL, depth=depth, num_classes=0), guidance=float(depth), **sample)
        config = replace(config, data=replace(config.data, num_classes=0), train=replace(config.train, class_dropout=0))
        (task,) = tasks(config, about("free"), ["train"])
        execute(task, Progress())
        if depth == 1:
            sample["guide"] = str(task.path)
    (task,) = tasks(config, about("free"), ["sample"])
    execute(task, Progress())
    assert read_run(task.path).last("sample", "done").guide_passes == 2


@pytest.mark.parametrize("auto", [False, True])
def test_compiled_networks_keep_their_shapes(trained, tmp_path, traced, auto):
    """Of whole batches and a part of one: a graph for the guided batch and one for the plain one, or one for each
    network."""
    config = resolved(make(trained[0], guidance_interval=MIDDLE, guide=str(trained[2]) if auto else None))
    first = generate(tmp_path, trained[1], config, STEP, Progress())
    eager = Shards(tmp_path / "shards" / first["shards"])[:]
    torch._dynamo.utils.counters.clear()
    config = replace(config, sample=replace(config.sample, compile="compile"))
    second = generate(tmp_path, trained[1], config, STEP, Progress())
    assert traced == [{"fullgraph": True, "dynamic": False}] * (2 if auto else 1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert np.abs(Shards(tmp_path / "shards" / second["shards"])[:].astype(int) - eager).max() <= 1


def test_guides_that_do_not_fit(trained, tmp_path):
    root, own, small = trained

    def refused(message, **sample):
        with pytest.raises(InputError, match=message) as caught:
            tasks(make(root, **sample), about("dit_mine"), ["sample"])
        assert "\n" not in str(caught.value)

    refused("sample.guide: .*nowhere is not a run folder", guide=str(tmp_path / "nowhere"))
    refused("step 3 was not kept; the nearest kept: 2 and 4", guide=str(small), guide_at=3)
    refused("has no weights ema@0.3", guide=str(small), guide_weights="ema@0.3")
    refused("has the weights that are sampled.*an earlier step", guide=str(own))
    refused("is the training .*, not abc any more", guide=str(small), guide_key="abc")
    config = make(root, SMALL)
    others = {
        "objective.schedule cosine, and the model": replace(config, objective=ObjectiveConfig(schedule="cosine")),
        "num_classes 5, and the model 10": replace(config, model=replace(SMALL, num_classes=5)),
        "input_size 16, and the model 8": replace(config, model=replace(SMALL, input_size=16)),
    }
    for number, (message, other) in enumerate(others.items()):
        (task,) = tasks(other, about("other"), ["train"])
        folder = create(
            tmp_path / str(number), {"kind": "training", "key": task.key, **task.about, "config": task.config}
        )
        refused(message, guide=str(folder))
    (task,) = tasks(config, about("x"), ["cost"])
    refused("is the folder of a model", guide=str(create(tmp_path / "m", {"kind": "model", "key": "k", "config": {}})))
    folder = create(tmp_path / "none", {"kind": "training", "key": "k", **about("x"), "config": task.config})
    refused("has no weights yet", guide=str(folder))
