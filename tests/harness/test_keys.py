"""The key of a stage changes with what the stage reads, and with nothing else."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from lamabench.baselines.dit import DiTConfig
from lamabench.harness import keys
from lamabench.harness.config import Config
from lamabench.harness.sections import BackendConfig, DataConfig, TrainConfig
from lamabench.models import registry
from lamabench.models.fields import declared

DIT = DiTConfig(input_size=8, in_channels=1, num_classes=10, patch_size=2, hidden_size=16, depth=1, num_heads=2)
CONFIG = Config(DIT, DataConfig(kind="digits", size=8), train=TrainConfig(steps=4, batch_size=4))
GOLDEN = Path(__file__).parents[1] / "golden" / "keys.json"


def change(section, **values):
    return replace(CONFIG, **{section: replace(getattr(CONFIG, section), **values)})


IN_NO_KEY = {
    "root": change("run", root="elsewhere"),
    "device": change("run", device="cuda:1"),
    "workers": change("run", workers=3),
    "micro-batch": change("run", micro_batch=2),
    "path": change("data", path="/data"),
    "bench": change("bench", repeats=7),
    "batch of samples": change("sample", batch_size=3),
    "what is kept of samples": change("sample", keep="features"),
    "batch of scores": change("evaluate", batch_size=3),
    "path of features": change("evaluate", features_path="/weights.pth"),
    "download of features": change("evaluate", download=True),
}
OF_TRAINING = {
    "model": replace(CONFIG, model=replace(DIT, depth=2)),
    "seed": replace(CONFIG, seed=1),
    "name of the data": change("data", name="mine"),
    "split": change("data", split="test"),
    "learning rate": change("train", lr=2e-4),
    "warm-up": change("train", warmup=10),
    "betas": change("train", betas=[0.9, 0.99]),
    "clip": change("train", clip=1.0),
    "averages": change("train", ema_decays=[0.99]),
    "averages of powers": change("train", ema_powers=[0.1]),
    "no ramp of the average": change("train", ema_rampup=False),
    "precision": change("train", precision="float32"),
    "compile": change("train", compile="compile"),
    "schedule": change("objective", schedule="cosine"),
    "dropout": replace(CONFIG, model=replace(DIT, dropout=0.1)),
    "backend": change("backend", attention="sdpa"),
}
OF_NO_TRAINING = {
    "steps": change("train", steps=8),
    "snapshots": change("train", snapshots=[2]),
    "count": change("sample", count=10),
    "moments": change("sample", at=[2]),
    "metrics": change("evaluate", metrics=["fd"]),
    "seed of scores": change("evaluate", seed=1),
}


@pytest.mark.parametrize("name", [*IN_NO_KEY, *OF_NO_TRAINING])
def test_settings_that_training_does_not_read_leave_its_key(name):
    assert keys.training_key((IN_NO_KEY | OF_NO_TRAINING)[name]) == keys.training_key(CONFIG)


def test_settings_that_training_reads_change_its_key():
    every = {name: keys.training_key(config) for name, config in OF_TRAINING.items()}
    assert len({keys.training_key(CONFIG), *every.values()}) == len(every) + 1
    assert all(len(key) == 12 and int(key, 16) >= 0 for key in every.values())


def test_samples_depend_on_one_moment_and_their_settings():
    first = keys.samples_key(CONFIG, 4)
    for config in IN_NO_KEY.values():
        assert keys.samples_key(config, 4) == first
    assert keys.samples_key(change("train", steps=8), 4) == first, "a longer training keeps its earlier samples"
    assert keys.samples_key(change("sample", seed=0), 4) == first, "null is the training's seed, which is 0"
    for values in ({"labels": "cyclic"}, {"timesteps": "even"}, {"curve_count": 7}):
        assert keys.samples_key(change("sample", **values), 4) == first
    others = [
        change("sample", **values) for values in ({"count": 10}, {"guidance": 2.0}, {"weights": "live"}, {"seed": 1})
    ]
    assert len({first, keys.samples_key(CONFIG, 3), *(keys.samples_key(config, 4) for config in others)}) == 6


def test_labels_and_timesteps_of_samples_have_keys_of_their_own():
    """The key tells classes apart: those of fewer images than classes are others than in earlier versions, whose key is
    that of cyclic labels."""
    few = [change("sample", count=5, labels=labels) for labels in ("balanced", "random", "cyclic")]
    many = [change("sample", labels="random"), change("sample", timesteps="ddim")]
    ids = [keys.samples_key(config, 4) for config in (*few, *many, CONFIG)]
    assert len(set(ids)) == 6
    sample = {name: value for name, value in declared(few[2].sample).items() if name not in ("labels", "timesteps")}
    for name in ("batch_size", "at", "weights", "seed", "keep"):
        sample.pop(name)
    assert ids[2] == keys.digest("samples", [keys.training_key(CONFIG), 4, "ema"], sample, 0)
    assert [keys.label_rule(config) for config in few] == ["spread", "random", "cyclic"]
    no_classes = [replace(config, model=replace(DIT, num_classes=0)) for config in few]
    assert len({keys.samples_key(config, 4) for config in no_classes}) == 1


def test_a_score_depends_on_one_metric():
    def key(config, metric):
        return keys.score_key(config, "0" * 12, metric)

    more = change("evaluate", metrics=["fd", "kid", "prc", "isc"])
    assert key(more, "fd") == key(CONFIG, "fd") != key(CONFIG, "kid")
    seeded = change("evaluate", seed=1)
    assert key(seeded, "fd") == key(CONFIG, "fd"), "the Fréchet distance draws nothing"
    assert key(seeded, "kid") != key(CONFIG, "kid")
    assert key(replace(CONFIG, seed=1), "kid") == key(CONFIG, "kid"), "never the training's seed"
    assert key(change("evaluate", reference_count=100), "fd") != key(CONFIG, "fd")
    assert key(change("data", flip=True), "fd") == key(CONFIG, "fd"), "a reference is not flipped"
    test = change("evaluate", split="test")
    assert key(test, "fd@train") == key(CONFIG, "fd") != key(test, "fd") == key(CONFIG, "fd@test")
    fewer, every = change("evaluate", prc_reference_count=50), change("evaluate", prc_reference_count=None)
    assert len({key(config, "prc") for config in (CONFIG, fewer, every)}) == 3
    assert len({key(config, "kid") for config in (CONFIG, fewer, every)}) == 1, "of precision and recall only"
    small = [change("evaluate", reference_count=50, prc_reference_count=one) for one in (None, 10_000, 50, 49)]
    assert len({key(config, "prc") for config in small}) == len({key(config, "prc") for config in small[2:]}) == 2


def test_a_speed_depends_on_the_whole_measurement():
    row = {"input_size": 8, "mode": "train", "compile": "eager", "checkpointing": False, "precision": "float32"}
    row |= {"batch_size": 4}
    first = keys.speed_key(DIT, row, BackendConfig(), "a GPU")
    assert first == keys.speed_key(DIT, row | {"images_per_s": 3.0}, BackendConfig(), "a GPU")
    changes = [{"mode": "forward"}, {"compile": "compile"}, {"batch_size": 8}, {"checkpointing": True}]
    others = [keys.speed_key(DIT, row | one, BackendConfig(), "a GPU") for one in changes]
    others += [
        keys.speed_key(DIT, row, BackendConfig(), "another"),
        keys.speed_key(DIT, row, BackendConfig(attention="sdpa"), "a GPU"),
    ]
    assert len({first, *others}) == 7


def test_a_field_that_is_added_later_changes_no_key():
    @dataclass
    class Grown(TrainConfig):
        later: int = field(default=100, metadata={"since": 0})

    old, new = TrainConfig(steps=4), Grown(steps=4, later=0)
    assert declared(old) == declared(new) != declared(Grown(steps=4))
    assert keys.digest(declared(old)) == keys.digest(declared(new))


def test_a_run_of_an_earlier_version_has_no_ramp_of_its_average():
    """Its config.json lacks the field. A new run has the ramp, and so another key."""
    saved = keys.config_to_dict(CONFIG)
    del saved["train"]["ema_rampup"], saved["train"]["ema_decays"], saved["train"]["betas"]
    old = keys.config_from_dict(saved)
    assert (old.train.ema_rampup, old.train.ema_decays, old.train.betas) == (False, [], [0.9, 0.999])
    assert CONFIG.train.ema_rampup and keys.training_key(old) != keys.training_key(CONFIG)


def test_keys_do_not_depend_on_the_order_of_fields():
    assert keys.digest({"a": 1, "b": {"c": 2, "d": 3}}) == keys.digest({"b": {"d": 3, "c": 2}, "a": 1})


def test_a_folder_follows_from_its_key_alone(tmp_path):
    folder = keys.training_folder(tmp_path, change("data", name="my set/2"))
    assert (
        folder.parent == tmp_path / "trainings" and folder.name.startswith("dit-my_set_2-") and len(folder.name) == 25
    )
    assert keys.model_folder(tmp_path, DIT) == tmp_path / "models" / f"dit-{keys.model_key(DIT)}"


def test_configuration_survives_json():
    config = change("bench", batch_size="auto")
    assert keys.config_from_dict(json.loads(json.dumps(keys.config_to_dict(config)))) == config


def table():
    """The keys of the model, training, samples and score of every preset, with the first version's default settings."""
    keys_by_preset = {}
    for name, preset in registry.presets().items():
        model = preset.config
        data = DataConfig(size=model.input_size, channels=model.in_channels, num_classes=model.num_classes)
        config = Config(model, data, train=TrainConfig(ema_rampup=False))
        samples = keys.samples_key(config, 1000)
        keys_by_preset[name] = [
            keys.model_key(model),
            keys.training_key(config),
            samples,
            keys.score_key(config, samples, "kid"),
        ]
    return keys_by_preset


def test_no_key_of_an_earlier_version_changes():
    """A changed key would lose every run that has it. `python tests/harness/test_keys.py` adds new presets."""
    golden = json.loads(GOLDEN.read_text())
    now = table()
    assert {name: now[name] for name in golden} == golden
    assert now.keys() == golden.keys()


if __name__ == "__main__":
    earlier = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    GOLDEN.write_text(json.dumps(table() | earlier, indent=1) + "\n")
