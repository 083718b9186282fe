"""Sampling draws the same images in any batches, and never mixes images of two weights or settings in a file."""

import gc
import io
import shutil
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from lamabench.baselines.dit import DiTConfig
from lamabench.harness import sampling
from lamabench.harness.config import Config
from lamabench.harness.data.encoder import to_uint8
from lamabench.harness.device import round_weights
from lamabench.harness.diffusion.gaussian import Chain
from lamabench.harness.progress import Progress
from lamabench.harness.random import Stream, generator
from lamabench.harness.sampling import Sampler, generate, labels_of, load_weights
from lamabench.harness.sampling import draw as draw_list
from lamabench.harness.sections import DataConfig, RunConfig, SampleConfig, TrainConfig
from lamabench.harness.shards import Shards, labels_at
from lamabench.harness.training.loop import train
from lamabench.kernels.errors import InputError
from lamabench.models.registry import build

DIT = DiTConfig(input_size=8, in_channels=1, num_classes=10, patch_size=2, hidden_size=16, depth=1, num_heads=2)
STEP = 4


def make(**sample):
    return Config(
        model=DIT,
        data=DataConfig(kind="digits", size=8, channels=1, num_classes=10),
        train=TrainConfig(
            steps=STEP, batch_size=4, ema_decay=0.5, ema_decays=[0.1], precision="float32", lr=1e-2, ema_rampup=False
        ),
        sample=SampleConfig(**{"count": 10, "method": "ddim", "steps": 4, "batch_size": 4, **sample}),
        run=RunConfig(device="cpu", log_every=2, checkpoint_every=2),
    )


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """A training of four steps with weights of step 2 and 4."""
    folder = tmp_path_factory.mktemp("training")
    train(folder, make(), Progress())
    return folder


def draw(out, training, config, step=STEP, progress=None):
    out.mkdir(exist_ok=True)
    record = generate(out, training, config, step, progress or Progress())
    place = out / "shards" / record["shards"]
    return Shards(place)[:], labels_at(place), record


def setting(config, **changes):
    return replace(config, sample=replace(config.sample, **changes))


class Kill(Progress):
    """Interrupts the call after `count` images."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def update(self, stage, done, total, **facts):
        if done >= self.count:
            raise KeyboardInterrupt


@pytest.fixture
def drawn(monkeypatch):
    """The batches for which the network is called."""
    original, batches = Sampler.draw, []

    def watched(self, indices):
        batches.append(indices)
        return original(self, indices)

    monkeypatch.setattr(Sampler, "draw", watched)
    return batches


@pytest.mark.parametrize(("timesteps", "first"), [("even", 999), ("ddim", 500)])
def test_images_follow_from_the_weights(tmp_path, training, timesteps, first):
    """Against two explicit steps of DDIM (2010.02502, eq. 12), from noise by image index."""
    images, _, record = draw(tmp_path, training, make(steps=2, count=3, labels="cyclic", timesteps=timesteps))
    assert (record["labels"], record["timesteps"]) == ("cyclic", timesteps)
    net = build(DIT).eval()
    net.load_state_dict(load_weights(training, STEP, "ema", DIT).tensors)
    start = [generator(0, Stream.SAMPLE, i).standard_normal((1, 8, 8), dtype=np.float32) for i in range(3)]
    x = torch.tensor(np.stack(start))
    alphas = Chain().alpha_bar.float()
    with torch.no_grad():
        for t, before in ((first, alphas[0]), (0, torch.tensor(1.0))):
            noise = net(x, torch.full((3,), t), torch.arange(3))[:, :1]
            x0 = (x - (1 - alphas[t]).sqrt() * noise) / alphas[t].sqrt()
            x = before.sqrt() * x0 + (1 - before).sqrt() * noise
    assert np.abs(to_uint8(x).permute(0, 2, 3, 1).numpy().astype(int) - images).max() <= 1
    assert images.std() > 20


@pytest.mark.parametrize("kind", ["ema", "live", "ema@0.1"])
def test_kinds_of_weights_and_moments_differ(tmp_path, training, kind):
    images, _, record = draw(tmp_path, training, make(weights=kind))
    facts = {name: record[name] for name in ("checkpoint_step", "weights", "images_seen", "seed", "count")}
    assert facts == {"checkpoint_step": 4, "weights": kind, "images_seen": 16, "seed": 0, "count": 10}
    assert record["training_seconds"] > 0 and record["images_per_s"] > 0
    other, _, record = draw(tmp_path, training, make(weights={"ema": "live", "live": "ema", "ema@0.1": "ema"}[kind]))
    earlier, _, at_two = draw(tmp_path, training, make(weights=kind), step=2)
    assert (at_two["checkpoint_step"], at_two["images_seen"]) == (2, 8)
    assert len({picture.tobytes() for picture in (images, other, earlier)}) == 3


def test_the_seed_of_the_noise(tmp_path, training):
    plain, _, record = draw(tmp_path / "plain", training, make())
    own, _, _ = draw(tmp_path / "own", training, make(seed=0))
    other, _, one = draw(tmp_path, training, make(seed=1))
    assert np.array_equal(plain, own) and (record["seed"], one["seed"]) == (0, 1)
    assert not np.array_equal(plain, other)
    of_training, _, _ = draw(tmp_path, training, replace(make(), seed=1))
    assert np.array_equal(of_training, other)


def labels(count, start=0, stop=None, classes=10, **sample):
    config = replace(make(count=count, **sample), model=replace(DIT, num_classes=classes))
    return labels_of(config, range(start, count if stop is None else stop)).tolist()


def test_labels_are_balanced_over_all_classes():
    assert labels(100) == [*range(10)] * 10 and labels(105, 5, 25) == [*range(5, 10), *range(10), *range(5)]
    assert labels(10) == labels(10, labels="cyclic") == [*range(10)]
    assert labels(5) == [0, 2, 4, 6, 8] and labels(8) == [0, 1, 2, 3, 5, 6, 7, 8] and labels(8, 3, 5) == [3, 5]
    assert labels(500, classes=1000) == [*range(0, 1000, 2)] and labels(1, classes=1000) == [0]
    assert labels(500, classes=1000, labels="cyclic") == [*range(500)]
    assert [labels(3, classes=0, labels=rule) for rule in ("balanced", "random", "cyclic")] == [[0, 0, 0]] * 3


def test_random_labels_follow_from_seed_and_index():
    """Against Philox itself: key (seed, 5), counter = index."""
    expected = [
        int(np.random.Generator(np.random.Philox(key=[7, 5], counter=[0, 0, 0, index])).integers(10))
        for index in range(2000)
    ]
    assert labels(2000, labels="random", seed=7) == expected
    assert labels(2000, 50, 60, labels="random", seed=7) == expected[50:60] == labels(60, 50, labels="random", seed=7)
    assert labels(2000, labels="random", seed=8) != expected
    assert min(np.bincount(expected)) > 150 and max(np.bincount(expected)) < 250  # 200 each, within 3.7 deviations


def test_random_labels_are_those_of_the_images(tmp_path, training):
    config = make(labels="random", seed=3)
    images, drawn, record = draw(tmp_path, training, config)
    net = build(DIT).eval()
    net.load_state_dict(load_weights(training, STEP, "ema", DIT).tensors)
    assert record["labels"] == "random" and drawn.tolist() == labels(10, labels="random", seed=3) != [*range(10)]
    again = draw_list(net, config, drawn.tolist(), 3)
    assert np.abs(again.astype(int) - images).max() <= 1
    others = draw_list(net, config, [*range(10)], 3)
    assert np.abs(others.astype(int) - images).max() > 1, "the labels matter"


def test_batch_size_does_not_change_samples(tmp_path, training):
    first, labels, _ = draw(tmp_path / "4", training, make())
    assert first.shape == (10, 8, 8, 1) and labels.tolist() == list(range(10))
    again, _, _ = draw(tmp_path / "3", training, make(batch_size=3))
    assert np.abs(again.astype(int) - first).max() <= 1  # rounding of a float at the edge of an integer


def test_a_compiled_network_draws_the_same(tmp_path, training, traced):
    """Two whole batches and a part of a third take one graph and give no extra images."""
    first, _, _ = draw(tmp_path, training, make(guidance=2.0))
    assert not traced
    counts = torch._dynamo.utils.counters
    counts.clear()
    again, _, record = draw(tmp_path, training, make(guidance=2.0, compile="compile"))
    assert record["compile"] == "compile" and traced == [{"fullgraph": True, "dynamic": False}]
    assert counts["stats"]["unique_graphs"] == 1
    assert np.abs(again.astype(int) - first).max() <= 1 and len(first) == 10


def test_a_compiled_network_draws_the_sets_of_a_process(tmp_path, training, traced):
    """It takes the weights of each set. Another batch size is compiled anew."""
    sets = []
    for number, (kind, step, batch) in enumerate([("ema", 4, 4), ("ema", 2, 4), ("live", 4, 4), ("live", 4, 5)]):
        config = make(compile="compile", weights=kind, batch_size=batch, count=5)
        sets.append((draw(tmp_path / f"{number}", training, config, step)[0], config, step))
        assert len(traced) == (1 if batch == 4 else 2)
    for number, (images, config, step) in enumerate(sets):
        sampling._kept.forget()
        alone, _, record = draw(tmp_path / f"alone-{number}", training, config, step)
        assert np.array_equal(alone, images) and record["weights"] == config.sample.weights
    assert len({images.tobytes() for images, _, _ in sets[:3]}) == 3


def test_weights_are_rounded_as_they_are_loaded(training):
    tensors = load_weights(training, STEP, "ema", DIT).tensors
    config = make(precision="bfloat16")
    call = Sampler(config, tensors, "cpu").call
    assert isinstance(call, torch.nn.Module)
    drawn = call.state_dict()
    net = build(DIT)
    net.load_state_dict(tensors)
    round_weights(net, "bfloat16")
    assert all(torch.equal(value, drawn[name]) and value.dtype == drawn[name].dtype for name, value in
               net.state_dict().items())  # fmt: skip


def test_a_network_is_freed_before_the_next_is_built(tmp_path, training, traced, monkeypatch):
    built = []

    def watched(model):
        assert [one() for one in built] == [None] * len(built)
        built.append(weakref.ref(net := build(model)))
        return net

    monkeypatch.setattr(sampling, "build", watched)
    for batch in (4, 5):
        draw(tmp_path, training, make(compile="compile", batch_size=batch))
    monkeypatch.setattr(sampling, "_sampled", lambda *args: torch.full((4, 1, 8, 8), torch.nan))
    with pytest.raises(InputError, match="not finite"):
        draw(tmp_path, training, make(compile="compile", batch_size=4, steps=3))
    gc.collect()
    assert [one() for one in built] == [None] * 3


@pytest.mark.gpu
def test_cuda_graphs_draw_with_the_weights_of_each_set(tmp_path, training):
    config = replace(make(compile="reduce-overhead"), run=RunConfig(device="cuda"))
    sets = [draw(tmp_path / f"{step}", training, config, step)[0] for step in (4, 2)]
    for step, images in zip((4, 2), sets, strict=True):
        sampling._kept.forget()
        assert np.array_equal(draw(tmp_path / f"alone-{step}", training, config, step)[0], images)
    sampling._kept.forget()
    assert not np.array_equal(*sets)


def test_killed_sampling_continues(tmp_path, training, drawn):
    config = make(method="ancestral")
    expected, _, _ = draw(tmp_path / "whole", training, config)
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path, training, config, progress=Kill(8))
    drawn.clear()
    images, _, _ = draw(tmp_path, training, config)
    assert drawn == [range(8, 10)]
    assert np.array_equal(images, expected)


def test_a_damaged_shard_is_drawn_again(tmp_path, training, drawn):
    expected, _, _ = draw(tmp_path, training, make())
    whole = io.BytesIO()
    np.save(whole, expected[:4])
    for content in (b"", whole.getvalue()[:100], whole.getvalue()[:-1], b"PK", np.zeros(3).tobytes(), "few", "loop"):
        shutil.rmtree(tmp_path / "shards")
        with pytest.raises(KeyboardInterrupt):
            draw(tmp_path, training, make(), progress=Kill(8))
        (shard,) = tmp_path.glob("shards/*/00000000-00000004.npy")
        if content == "few":
            np.save(shard, expected[:3])
        elif content == "loop":
            shard.unlink()
            shard.symlink_to(shard)
        else:
            shard.write_bytes(content)
        drawn.clear()
        images, _, _ = draw(tmp_path, training, make())
        assert sorted(drawn, key=lambda part: part.start) == [range(0, 4), range(8, 10)], content
        assert np.array_equal(images, expected), content


OTHERS = {
    "step": (2, {}),
    "weights": (STEP, {"weights": "live"}),
    "seed": (STEP, {"seed": 7}),
    "guidance": (STEP, {"guidance": 2.0}),
    "precision": (STEP, {"precision": "bfloat16"}),
    "steps": (STEP, {"steps": 5}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_parts_of_other_weights_or_settings_are_not_used(tmp_path, training, drawn, name):
    step, changes = OTHERS[name]
    config = setting(make(), **changes)
    expected, _, _ = draw(tmp_path / "alone", training, config, step)
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path, training, make(), progress=Kill(8))
    drawn.clear()
    images, _, _ = draw(tmp_path, training, config, step)
    assert drawn == [range(0, 4), range(4, 8), range(8, 10)]
    assert np.array_equal(images, expected)


def test_a_larger_count_begins_with_the_same_images(tmp_path, training):
    few, _, _ = draw(tmp_path, training, make())
    many, labels, _ = draw(tmp_path, training, make(count=14))
    assert len(many) == 14 and np.abs(many[:10].astype(int) - few).max() <= 1
    assert labels.tolist() == [i % 10 for i in range(14)]


def test_weights_that_cannot_be_sampled(tmp_path, training):
    with pytest.raises(InputError, match="step"):
        generate(tmp_path, training, make(), 3, Progress())
    other = replace(make(), model=replace(DIT, hidden_size=32))
    with pytest.raises(InputError, match=r"of another model.*hidden_size 16 there, 32 here"):
        generate(tmp_path, training, other, STEP, Progress())
    assert not list(tmp_path.iterdir())


def test_images_that_are_not_finite(tmp_path, training, monkeypatch):
    monkeypatch.setattr(Sampler, "draw", lambda self, indices: torch.full((len(indices), 1, 8, 8), torch.nan))
    with pytest.raises(InputError, match="the ema weights of step 4 give images that are not finite"):
        generate(tmp_path, training, make(), STEP, Progress())
    assert not list(tmp_path.glob("shards/*/*.npy"))


def test_a_missing_folder_is_not_created_again(tmp_path, training):
    with pytest.raises(FileNotFoundError):
        generate(tmp_path / "away", training, make(), STEP, Progress())
    assert not list(tmp_path.iterdir())
