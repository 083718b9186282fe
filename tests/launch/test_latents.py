"""Latents from end to end on digits: encode, train, sample, decode, score. And what is refused on the way."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lamabench import reports
from lamabench.harness.config import check_fit
from lamabench.harness.data import encoder
from lamabench.harness.keys import training_key
from lamabench.harness.record import read_records
from lamabench.harness.sampling import Sampler
from lamabench.harness.sections import DataConfig
from lamabench.harness.shards import open_samples
from lamabench.harness.training.checkpoint import load_weights
from lamabench.kernels.errors import InputError
from lamabench.launch import notes
from lamabench.launch.cli import main
from lamabench.launch.compose import compose
from lamabench.launch.plan import plan
from lamabench.models.registry import out_channels
from PIL import Image

from ..autoencoders import save_kl
from ..latent_caches import FACTS, write_cache

DIGITS = ["data=digits", "data.size=16", "run.device=cpu"]
MODEL = ["model=dit_nano", "model.depth=1", "model.hidden_size=16", "model.num_heads=2"]
TRAIN = ["train.batch_size=4", "train.precision=float32", "run.device=cpu", "run.log_every=2", "run.heldout_every=2"]
TRAIN += ["run.preview_every=4", "evaluate.heldout_count=8"]
DRAW = ["sample.count=12", "sample.method=ddim", "sample.steps=2", "run.device=cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with an autoencoder, a cache and a training on it that was continued."""
    root = tmp_path_factory.mktemp("digits")
    save_kl(root / "vae", in_channels=1)
    for split, name in (("most", "cache"), ("test", "cache/test")):
        words = [*DIGITS, f"data.split={split}", "--to", str(root / name)]
        assert main(["encode", *words, f"encoder={root}/vae"]) == 0
    for steps in (4, 6):
        words = [*MODEL, *TRAIN, f"train.steps={steps}", f"encoder={root}/cache", f"run.root={root}/runs"]
        assert main(["train", *words]) == 0
    (run,) = (root / "runs/train").glob("dit*")
    return root, run


def test_encode_train_sample_decode_score(trained, capsys):
    """The stored images are those that diffusers decodes of the drawn latents; scores compare them with the images."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    root, run = trained
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6] and 0.5 < lines[1]["heldout_loss"] < 2
    with Image.open(run / "previews/step-00000004.png") as picture:
        assert picture.width > 64
    assert main(["sample", str(run), *DRAW]) == 0
    (samples,) = (run / "samples").iterdir()
    (shards,) = (one for one in (samples / "shards").iterdir() if one.is_dir())
    images = open_samples(shards)[:12]
    config, _ = compose([*MODEL, *TRAIN, *DRAW, f"encoder={root}/cache", "train.steps=6"])
    sampler = Sampler(config, load_weights(run, 6, "ema", config.model).tensors, "cpu")
    z = sampler.draw(range(12))
    net = AutoencoderKL.from_pretrained(root / "vae").eval()
    with torch.no_grad():
        pixels = net.decode(z / net.config.scaling_factor).sample
    expected = ((pixels.double() + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert images.shape == (12, 16, 16, 1) and abs(images - expected).max() < 0.51  # rounded
    with np.load(run / "real.npz") as real:
        assert real["images"].shape == (10, 16, 16, 1)
    scores = ["evaluate.metrics=[fd,heldout]", "evaluate.reference_count=12", "evaluate.heldout_count=8"]
    assert main(["evaluate", str(run), *DRAW, *scores]) == 0
    assert "latents " in capsys.readouterr().out
    rows = [row.flat() for row in read_records(samples / "record.jsonl") if row.kind == "score"]
    index = json.loads((root / "cache/index.json").read_text(encoding="utf-8"))
    by_name = {row["metric"]: row for row in rows}
    assert by_name["FD-EffNetLite0-12"]["data_fingerprint"] == index["fingerprint"]
    assert by_name["FD-EffNetLite0-12"]["generation"]["encoder"] == f"latents {index['encoder']['identity']}"
    assert by_name["held-out loss"]["value"] == pytest.approx(lines[2]["heldout_loss"], abs=0.2)
    assert len(reports.load(root / "runs/train")) >= 2


def test_samples_need_the_autoencoder_of_the_latents(trained, tmp_path, capsys):
    """Another one is refused, and one that lies elsewhere is named by hand. Nothing is left behind."""
    root, run = trained
    draw = ["sample", str(run), *DRAW, "sample.seed=5"]
    save_kl(tmp_path / "other", in_channels=1, seed=5)
    before = sorted((run / "samples").iterdir()) if (run / "samples").exists() else []

    def refused(*words):
        assert main([*draw, *words]) == 2
        return capsys.readouterr().err

    assert "is not the autoencoder of the latents: its identity is " in refused(f"encoder.decoder={tmp_path}/other")
    shutil.move(root / "vae", tmp_path / "vae")
    encoder._autoencoder.cache_clear()  # another process would read it again
    try:
        assert "images cannot be decoded: autoencoder" in refused()
        assert (sorted((run / "samples").iterdir()) if before else []) == before
        assert main([*draw, f"encoder.decoder={tmp_path}/vae"]) == 0
    finally:
        shutil.move(tmp_path / "vae", root / "vae")


def test_a_folder_names_data_encoder_and_shape(tmp_path):
    """`encoder=FOLDER` is enough; data that are given must agree, and no key knows where the cache lies."""
    data = DataConfig("synthetic", size=8, channels=1, num_classes=4)
    for name in ("here", "there"):
        write_cache(tmp_path / name, data)
    config, chosen = compose([*MODEL, f"encoder={tmp_path}/here"])
    check_fit(config)
    assert (config.encoder.kind, config.encoder.identity, config.encoder.scale) == ("latents", FACTS.identity, 0.5)
    assert (config.model.in_channels, config.model.input_size, config.model.num_classes) == (4, 4, 4)
    assert (config.data.size, chosen["data"]) == (8, "synthetic") and out_channels(config.model) == 8
    key = training_key(config)
    same = compose([*MODEL, "data=synthetic", "data.size=8", f"encoder.path={tmp_path}/there", "encoder.decoder=x"])[0]
    assert training_key(same) == key
    pixels = compose([*MODEL, f"encoder={tmp_path}/here", "encoder=pixels", "data=synthetic"])[0]
    assert pixels == compose([*MODEL, "data=synthetic"])[0] and training_key(pixels) != key
    assert compose([*MODEL, f"encoder={tmp_path}/here", "data.num_classes=0"])[0].model.num_classes == 0
    for words, message in (
        (["data=digits"], "data=digits is of kind 'digits', but the latents in .*here are of 'synthetic'"),
        (["data.size=16"], r"data\.size is 16, but the latents in .*here are of data\.size=8"),
        (["encoder.scale=1"], r"encoder\.scale is 1\.0, but the latents in .*here have 0\.5"),
        (["sample.clip=true"], "sample.clip=true clamps predicted images .*, but latents have no bounds"),
        (
            ["model.in_channels=3"],
            "model.in_channels 3 does not fit encoder.channels 4: leave out model.in_channels",
        ),
    ):
        with pytest.raises(InputError, match=message):
            check_fit(compose([*MODEL, f"encoder={tmp_path}/here", *words])[0])


def test_what_a_study_on_latents_needs_is_told_of(study, tmp_path):
    """A training needs the cache and no images. Scores need the images, or a file in their place."""
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "train.npz", images=images, labels=np.arange(12) % 4)
    data = DataConfig("npz", path=str(tmp_path / "train.npz"), size=8, channels=1, num_classes=4)
    write_cache(tmp_path / "cache", data, parts=(5,))
    (tmp_path / "train.npz").rename(tmp_path / "away.npz")
    base = {"data": "npz", "encoder": str(tmp_path / "cache"), "data.size": 8}

    def runs(stages, **more):
        settings = {**base, **more, "run.device": "cpu"}
        return plan(study(stages=stages, **{name.replace(".", "__"): value for name, value in settings.items()}))

    notes.check(runs(("train",)), here=True)
    with pytest.raises(InputError, match=r"train\.npz does not exist; scores need the images, or evaluate\.reference"):
        notes.check(runs(("train", "evaluate")), here=True)
    file = {"evaluate.reference": str(tmp_path / "away.npz"), "evaluate.reference_count": 5}
    notes.check(runs(("train", "evaluate"), **file), here=True)
    with pytest.raises(InputError, match="images cannot be decoded: autoencoder nowhere/autoencoder is neither"):
        notes.check(runs(("train", "sample")), here=True)
    lines = list(notes.without_networks(runs(("train", "sample"))))
    assert len(lines) == 1 and "encoder.decoder=SOURCE says where the autoencoder lies" in lines[0]
    with pytest.raises(InputError, match=r"there are no latents of the test split: .*test does not exist"):
        notes.check(runs(("train",), **{"run.heldout_every": 2, "run.log_every": 2}), here=True)
    next(Path(tmp_path / "cache").glob("*.safetensors")).unlink()
    with pytest.raises(InputError, match=r"cannot read .*safetensors: No such file"):
        notes.check(runs(("train",)), here=True)
