"""What is known of a study before anything is written: data, scores, devices, disk space, similar trainings."""

import os
import re
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from image_sets import picture, write_shards
from lamabench.ablations.study import load, names
from lamabench.harness.config import Config
from lamabench.harness.keys import training_key
from lamabench.harness.measure.cost import cost
from lamabench.harness.scoring import networks
from lamabench.harness.sections import ObjectiveConfig
from lamabench.kernels.errors import InputError
from lamabench.launch import notes
from lamabench.launch.cli import main
from lamabench.launch.plan import pieces, plan
from latents_of_a_study import NEEDED
from PIL import Image


def test_disk_space(study):
    runs = plan(study({"sample.guidance": [1.0, 2.0]}, train__snapshots=[1, 3]))
    params = cost(runs[0].config.model).params
    # Two checkpoints of four tensors per parameter, and the weights of steps 1, 3 and 4; both runs share a training.
    assert notes.room(runs) == {"1.0": pytest.approx(4 * params * (2 * 4 + 3) / 2**30)}


def test_an_axis_over_a_list_setting_gets_a_hint(study):
    def hint(axes):
        mine = study(axes, model="lamamba_nano")
        mine = replace(mine, base={key: value for key, value in mine.base.items() if not key.startswith("model.")})
        return list(notes.hints(mine, plan(mine)))

    assert hint({"model.mixers": ["ssm", "window"]}) == [
        "axis model.mixers takes its 2 values one at a time; write [[ssm, window]] to combine them"
    ]
    assert hint({"model.mixers": [["ssm"], ["window"]]}) == hint({"model.d_state": [1, 4]}) == []


def test_snapshots_beyond_the_end_are_told_of(study):
    def hint(snapshots, axes=None):
        runs = plan(study(axes or {"train.lr": [1e-3, 1e-4]}, train__snapshots=snapshots))  # 4 steps of 4 images
        return list(notes.hints(study(), runs))

    assert hint([]) == hint([1, 4]) == hint(16) == []
    assert hint([4, 5, 9]) == ["0.001, 0.0001: train.snapshots 5, 9 will not be kept, beyond the end, train.steps 4"]
    assert hint(17) == ["0.001, 0.0001: train.snapshots 17 keeps only the end, train.steps 4: that is after 16 images"]
    assert [line.split(":")[0] for line in hint([5], {"train.steps": [4, 8]})] == ["4"]


def test_weights_that_will_not_be_there_are_told_of(study):
    def hint(**more):
        settings = {"train__ema_powers": [0.05, 0.1], "train__steps": 40, **more}
        return list(notes.hints(study(), plan(study(**settings))))

    many = list(range(2, 40, 2))
    assert (
        hint(sample__weights="power@0.13", train__snapshots=many) == hint(sample__weights="power@0.1") == hint() == []
    )
    (line,) = hint(sample__weights="power@0.13")
    assert "power@0.13 of step 40 would have a profile that is wrong by 13%" in line and "train.snapshots" in line


def pictures(path, count=20, level=0):
    images = np.full((count, 8, 8, 1), level, np.uint8)
    np.savez(path, images=images, labels=np.arange(count) % 10)
    return str(path)


def lines_of(runs):
    return list(notes.data(runs, notes.contents(runs)))


def test_data_are_checked_where_they_can_be_read(study, finish, tmp_path):
    settings = {"data": "npz", "data__path": pictures(tmp_path / "a.npz"), "data__channels": 1}
    mine = study(stages=["train"], **settings)
    (run,) = plan(mine)
    assert lines_of([run]) == []
    finish(run.training, data_fingerprint="bb")
    (line,) = lines_of([run])
    assert re.search(r"trained on other data \(fingerprint bb, now \w{16}\): give the new set another data\.name", line)
    notes.check([run], here=True)  # nothing is to do
    longer = study(stages=["train"], train__steps=8, **settings)
    for more in (longer, study(stages=["train", "sample", "evaluate"], **settings)):
        for piece in pieces(plan(more)):
            if piece.task.kind == "samples":
                finish(piece.task, "sample")
        assert lines_of(plan(more)) == [line]
        with pytest.raises(InputError, match="trained on other data"):
            notes.check(plan(more), here=True)


@pytest.mark.parametrize("here", [True, False])
def test_data_that_are_missing_stop_a_run_and_not_a_plan(study, finish, tmp_path, here, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 2**16)  # 4 GiB, as pages × size
    (tmp_path / "junk.npz").write_text("x")
    (tmp_path / "empty").mkdir()
    cases = [
        ({"data": "npz", "data__path": str(tmp_path / "no.npz")}, r"no\.npz does not exist"),
        ({"data": "npz", "data__path": str(tmp_path / "junk.npz")}, r"junk\.npz is not a readable \.npz"),
        ({"data": "npz"}, r"data\.path is not set"),
        ({"data": "cifar10", "data__path": str(tmp_path)}, "does not contain all of CIFAR-10"),
        ({"data": "folder", "data__path": str(tmp_path / "empty"), "data__num_classes": 0}, "contains no image"),
        ({"data__size": 16384}, "GiB of memory"),
    ]
    for number, (settings, message) in enumerate(cases):
        settings = {"data__channels": 1, "data__name": f"set{number}", **settings}
        runs = plan(study(stages=["train"], **settings))
        (line,) = lines_of(runs)
        assert re.fullmatch(f"data cannot be used: .*{message}.*", line)
        with pytest.raises(InputError, match=f"^dit_nano: .*{message}"):
            notes.check(runs, here)
        finish(runs[0].training)
        notes.check(runs, here)  # nothing is to do
    assert lines_of(plan(study(stages=["bench"], data="npz"))) == []  # it reads no data


def test_a_folder_that_was_not_read_yet_is_read_before_a_run_and_not_before_a_submit(study, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "set" / "a").mkdir(parents=True)
    for name in ("one.png", "two.png"):
        Image.new("RGB", (9, 9)).save(tmp_path / "set" / "a" / name)
    settings = {"data": "folder", "data__path": str(tmp_path / "set"), "data__num_classes": 1}
    runs = plan(study(stages=["train"], **settings))
    unread = [f"data not checked: {tmp_path / 'set'} was not read yet, or changed since"]
    notes.check(runs, here=False)
    assert lines_of(runs) == unread
    whole = (tmp_path / "set" / "a" / "one.png").read_bytes()
    (tmp_path / "set" / "a" / "one.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"^dit_nano: .*one\.png"):
        notes.check(runs, here=True)
    (tmp_path / "set" / "a" / "one.png").write_bytes(whole)
    for path in (tmp_path / "set" / "a").iterdir():
        os.utime(path, (1, 1))  # what changed a moment ago is not cached
    assert lines_of(runs) == unread
    notes.check(runs, here=True)
    assert lines_of(runs) == []


def test_shards_that_were_not_read_yet(study, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shard = write_shards(tmp_path / "set", [picture(i, i % 2) for i in range(4)], shards=1) / "train-0000.tar"
    settings = {"data": "webdataset", "data__path": str(tmp_path / "set"), "data__num_classes": 2}
    runs = plan(study(stages=["train"], **settings))
    notes.check(runs, here=False)
    assert lines_of(runs) == [f"data not checked: {tmp_path / 'set'} was not read yet, or changed since"]
    notes.check(runs, here=True)
    assert lines_of(runs) == []
    wrong = plan(study(stages=["train"], **{**settings, "data__num_classes": 3}))
    with pytest.raises(InputError, match=r"^dit_nano: data\.num_classes is 3, but .* has 2 classes"):
        notes.check(wrong, here=False)
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"^dit_nano: .*train-0000\.tar is not a whole tar file"):
        notes.check(runs, here=True)


def test_scores_that_cannot_be_computed_are_told_before_training(study, finish, tmp_path):
    mine = study(stages=["train", "sample", "evaluate"])
    whole = {"sample.count": 100, "evaluate.metrics": "[fd,kid,prc,isc]", "evaluate.reference_count": 100}
    cases = {
        (): None,
        ("sample.count=99",): "kid needs at least 100 samples, 99 given",
        ("sample.curve_count=99",): "kid needs at least 100 samples, 99 given; sample.curve_count, evaluate",
        ("evaluate.reference_count=99",): "kid needs at least 100 reference images, 99 given",
        ("evaluate.reference_count=1797",): None,
        ("evaluate.reference_count=1798",): "evaluate.reference_count 1798 is more than the 1797 images of the data",
        ("evaluate.metrics=[isc]", "sample.count=9"): "isc needs at least 10 samples, 9 given",
        ("evaluate.metrics=[isc]", "sample.count=10", "evaluate.reference_count=1"): None,
        ("evaluate.metrics=[prc]", "sample.count=4", "evaluate.reference_count=3"): "prc needs at least 4 reference",
        ("evaluate.features=inception_v3", "evaluate.features_path=/no/where"): "/no/where does not exist",
        ("evaluate.features_path=/no/where",): "has no effect for efficientnet_lite0",
    }
    for words, message in cases.items():
        runs = plan(mine, [*(f"{key}={value}" for key, value in whole.items()), *words])
        texts = notes.scoring(runs[0], notes.contents(runs))
        assert not texts if message is None else message in texts[0], words
        if message is not None:
            with pytest.raises(InputError, match=f"^dit_nano: .*{re.escape(message)}"):
                notes.check(runs, here=False)
    runs = plan(mine, ["sample.count=2", "evaluate.reference_count=1"])
    assert len(list(notes.problems(runs, notes.contents(runs)))) == 1
    for piece in pieces(runs):
        finish(piece.task)
    notes.check(runs, here=False)  # they were computed elsewhere


def test_weights_of_networks_that_are_missing_are_told_before_training(study, finish, tmp_path, monkeypatch):
    """On this machine they stop runs; jobs may find them elsewhere. A folder that is given must have them."""
    monkeypatch.setattr(networks, "cache_folder", lambda: tmp_path / "cache")
    (tmp_path / "mine").mkdir()
    mine = study(stages=["train", "sample", "evaluate"], sample__count=100, evaluate__features="dinov2_vitl14")
    for path, folder in ((None, "cache"), (tmp_path / "mine", "mine")):
        runs = plan(mine, [] if path is None else [f"evaluate.features_path={path}"])
        message = re.escape(
            f"dit_nano: the weights of dinov2_vitl14 are missing: {tmp_path / folder}/dinov2_vitl14_pre"
        )
        (line,) = notes.hints(mine, runs)
        assert re.match(message, line) and "curl -fLO https" in line
        with pytest.raises(InputError, match=f"^{message}"):
            notes.check(runs, here=True)
        assert bool(notes.scoring(runs[0], notes.contents(runs))) == (path is not None)
        allowed = plan(mine, [*([] if path is None else [f"evaluate.features_path={path}"]), "evaluate.download=true"])
        notes.check(allowed, here=True)
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "dinov2_vitl14_pretrain.pth").touch()
        notes.check(runs, here=True)
        assert not list(notes.hints(mine, runs))


def test_a_plan_says_what_is_missing_once(tmp_path, monkeypatch, capsys):
    """A file of weights that does not exist is a problem of the run and of its scores."""
    monkeypatch.chdir(tmp_path)
    text = "question: q\nbase: {data: digits}\naxes: {model: [dit_nano]}\nstages: [train, sample, evaluate]"
    (tmp_path / "s.yaml").write_text(text)
    assert main(["sweep", "plan", "s.yaml", "evaluate.features=inception_v3", "evaluate.features_path=no.pt"]) == 0
    assert capsys.readouterr().out.count("evaluate.features_path no.pt does not exist") == 1


def test_the_held_out_loss_needs_no_weights_of_a_network(study, tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "cache_folder", lambda: tmp_path / "cache")
    settings = {"data__split": "most", "evaluate__features": "inception_v3", "evaluate__metrics": ["heldout"]}
    mine = study(stages=["train", "evaluate"], **settings)
    runs = plan(mine)
    assert not list(notes.hints(mine, runs))
    notes.check(runs, here=True)


def test_spatial_features_of_samples_whose_images_are_not_kept(study, finish, tmp_path):
    settings = {"sample__count": 100, "evaluate__features": "inception_v3", "evaluate__metrics": ["sfid"]}
    runs = plan(study(stages=["train", "sample", "evaluate"], sample__keep="features", **settings))
    (text,) = notes.scoring(runs[0], notes.contents(runs))
    assert text == "sfid needs spatial features, which sample.keep=features does not keep: give sample.keep=images"
    finish(runs[0].tasks[-1])
    assert not notes.scoring(runs[0], notes.contents(runs))


def test_the_counts_of_committed_studies_suffice():
    for name in names():
        study = load(name)
        for one in (study, *([study.debug_size()] if study.debug else [])):
            first = replace(one, seeds=one.seeds[:1])  # no count depends on the seed
            for run in plan(first, NEEDED.get(name, ()) if one is study else ()):
                assert notes.scoring(run, {}) == [], run.name


@pytest.mark.parametrize("device", ["tpu", "cuda:", "cuda:x", "CUDA", "mps", "", "-1", "cuda:-1", "cuda:٣", "cpu:0"])
def test_a_device_that_exists_nowhere_is_refused_everywhere(study, device):
    (run,) = plan(study(stages=["train"]))
    run = replace(run, tasks=tuple(with_device(task, device) for task in run.tasks))
    for here in (True, False):
        with pytest.raises(InputError, match=r"run\.device"):
            notes.check([run], here)


def test_a_gpu_is_asked_of_the_machine_that_works(study):
    (run,) = plan(study(stages=["train"]))
    for device, here in (("auto", True), ("cpu", True), ("auto", False), ("cuda", False), ("cuda:7", False)):
        notes.devices([replace(run, tasks=tuple(with_device(task, device) for task in run.tasks))], here)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match=r"run\.device=cuda:7 asks for a GPU, and torch sees none"):
            notes.devices([replace(run, tasks=tuple(with_device(task, "cuda:7") for task in run.tasks))], True)


def with_device(task, device):
    return replace(task, config=task.config | {"run": task.config["run"] | {"device": device}})


def test_each_average_takes_its_disk_space(study):
    """A checkpoint has another copy of the weights for each, and so has each kept moment."""
    one, three = (
        notes.gib(plan(study(stages=["train"]), words)[0].training) for words in ([], ["train.ema_decays=[0.9,0.99]"])
    )
    assert three / one == pytest.approx((6 * 2 + 3) / (4 * 2 + 1))
    powers = plan(study(stages=["train"]), ["train.ema_decays=[0.9]", "train.ema_powers=[0.1]"])[0].training
    assert notes.gib(powers) == three


@dataclass
class Joined(ObjectiveConfig):
    """An objective with a field that was added later and whose default is not its `since` value."""

    shift: float = field(default=2.0, metadata={"since": 1.0})


def test_finished_trainings_that_differ_only_in_a_later_field_are_named(study, finish):
    (run,) = plan(study(stages=["train"]))
    finish(run.training)

    def with_objective(**values):
        config: Config = replace(run.config, objective=Joined(**values))
        return replace(run, config=config, tasks=(replace(run.training, key=training_key(config)),))

    (line,) = notes.earlier([at_home(with_objective())])
    assert line == f"dit_nano: {run.folder}, finished to step 4, differs only in objective.shift (1.0 there)"
    assert training_key(with_objective(shift=1.0).config) == run.id
    assert list(notes.earlier([at_home(with_objective(kind="ddpm", shift=1.0))])) == []


def at_home(run):
    """The run with its training in the folder of its configuration."""
    return replace(run, tasks=(replace(run.tasks[0], folder=str(run.folder)),))
