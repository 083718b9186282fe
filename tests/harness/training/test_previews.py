"""Previews: the same noise each time, and not a bit of the training changes."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from lamabench.harness.data.images import load
from lamabench.harness.progress import Progress
from lamabench.harness.run import open_run
from lamabench.harness.training.loop import train
from lamabench.harness.training.previews import preview_settings, write_preview, write_real
from lamabench.harness.training.steps import Diverged
from PIL import Image
from test_failures import folder_of
from trainings import DIT, assert_same, make, trained


def previewing(model=DIT, every=2, **settings):
    config = make(model, steps=6, snapshots=[4], **settings)
    sample = replace(config.sample, steps=3, clip=True)
    return replace(config, run=replace(config.run, preview_every=every), sample=sample)


def test_previews_change_no_bit_of_the_training(tmp_path):
    """With dropout, whose numbers are drawn from torch's random state."""
    config = previewing(replace(DIT, dropout=0.2))
    plain = replace(config, run=replace(config.run, preview_every=0))
    states, folders = [], []
    for name, one in (("with", config), ("without", plain)):
        torch.manual_seed(3)
        folders.append(trained(tmp_path / name, one))
        states.append(torch.get_rng_state())
    assert_same(*folders)
    assert torch.equal(*states)
    assert not (tmp_path / "without" / "previews").exists()


def test_a_preview_is_what_the_averaged_weights_draw(tmp_path):
    """The picture of step 4 is that of the kept weights of step 4, from the noise of the images 0 … 15."""
    config = previewing()
    folder = trained(folder_of(tmp_path, config), config)
    paths = sorted((folder / "previews").iterdir())
    assert [path.name for path in paths] == [f"step-{step:08d}.png" for step in (2, 4, 6)]
    labels = [index * 10 // 10 % 10 for index in range(16)]
    images = open_run(folder).sample(labels, steps=3, method="dpmpp_2m", at=4)
    assert images.shape == (16, 8, 8, 1)
    picture = np.asarray(Image.open(paths[1]))
    for index in range(16):
        row, column = divmod(index, 4)
        cell = picture[row * 51 :, column * 51 :][:48, :48]
        assert np.array_equal(cell[3::6, 3::6, :1], images[index]), index
    assert len({path.read_bytes() for path in paths}) == 3


def test_the_settings_of_previews():
    """At most 20 steps of a method that every objective has, and evenly spread classes if they outnumber the images."""
    from lamabench.harness.sampling import labels_of

    config = previewing()
    assert preview_settings(config).sample.steps == 3
    many = replace(config, sample=replace(config.sample, steps=250))
    many = replace(many, model=replace(DIT, num_classes=1000))
    settings = preview_settings(many)
    assert (settings.sample.steps, settings.sample.method) == (20, "dpmpp_2m")
    assert labels_of(settings, range(16)).tolist() == [index * 1000 // 16 for index in range(16)]


def test_a_preview_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "previews").touch()
    trained(tmp_path, previewing(every=4))
    assert "no preview of step 4: " in capsys.readouterr().err


def test_a_preview_does_not_hide_that_a_training_diverges(tmp_path, capsys):
    """Its images are not finite two steps before metrics are looked at."""
    config = previewing(lr=1e30)
    folder = folder_of(tmp_path, replace(config, run=replace(config.run, log_every=6, checkpoint_every=6)))
    with pytest.raises(Diverged, match="the loss is not finite by step 4 of 6"):
        trained(folder, open_run(folder).config)
    assert "no preview of step 2: images have values that are not finite" in capsys.readouterr().err
    assert (folder / "failures" / "step-00000004" / "failure.json").exists()


def test_the_time_of_previews_is_no_training(tmp_path, monkeypatch):
    from lamabench.harness.training import logs, steps

    class Clock:
        ahead = 0

        def perf_counter(self):
            return time.perf_counter() + self.ahead

    def slow(*words):
        clock.ahead += 10_000
        return write_preview(*words)

    clock = Clock()
    monkeypatch.setattr(steps, "time", clock)
    monkeypatch.setattr(logs, "write_preview", slow)
    tmp_path.joinpath("run").mkdir()
    record = train(tmp_path / "run", previewing(), Progress())
    assert clock.ahead >= 20_000 and 0 < record["seconds"] < 10_000


def test_a_training_keeps_one_image_of_each_class(tmp_path):
    config = make(DIT)
    with np.load(trained(folder_of(tmp_path, config), config) / "real.npz") as file:
        images, labels = file["images"], file["labels"]
    data = load(config.data)
    assert list(labels) == list(range(10)) and images.shape == (10, 8, 8, 1) and images.dtype == np.uint8
    for label, image in zip(labels, images, strict=True):
        first = next(i for i in range(len(data)) if data.labels[i] == label)
        assert np.array_equal(image[..., 0], data.image(first)[0].numpy())


def test_of_one_class_the_first_images_are_kept(tmp_path):
    data = load(replace(make(DIT).data, num_classes=0))
    write_real(tmp_path, data)
    with np.load(tmp_path / "real.npz") as file:
        assert np.array_equal(file["images"][:, :, :, 0], [data.image(i)[0].numpy() for i in range(10)])
    before = (tmp_path / "real.npz").read_bytes()
    write_real(tmp_path, data)
    assert (tmp_path / "real.npz").read_bytes() == before
