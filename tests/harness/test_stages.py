"""Each stage is done once and does not repeat others, and a longer training continues a shorter one."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from lamabench.baselines.dit import DiTConfig
from lamabench.harness import stages
from lamabench.harness.config import Config
from lamabench.harness.moments import asked_moments, sampled_moments
from lamabench.harness.progress import Progress
from lamabench.harness.record import read_records
from lamabench.harness.run import Busy, locked, open_run
from lamabench.harness.sections import BenchConfig, DataConfig, EvaluateConfig, RunConfig, SampleConfig, TrainConfig
from lamabench.harness.shards import open_samples, set_of
from lamabench.harness.stages import execute, missing
from lamabench.harness.tasks import STAGES, Task, merged, tasks
from lamabench.harness.training.checkpoint import moments
from lamabench.kernels.errors import InputError
from lamabench.models.registry import build

DIT = DiTConfig(input_size=8, in_channels=1, num_classes=10, patch_size=2, hidden_size=16, depth=1, num_heads=2)
ABOUT = {"study": "s", "name": "n", "variant": {}, "seed": 0, "model": "dit_nano", "family": "dit", "title": "DiT-nano"}


@pytest.fixture
def config(tmp_path):
    return Config(
        DIT,
        DataConfig(kind="digits", size=8, channels=1, num_classes=10),
        train=TrainConfig(steps=4, batch_size=4, ema_decay=0.5, precision="float32"),
        sample=SampleConfig(count=10, method="ddim", steps=4, batch_size=4),
        evaluate=EvaluateConfig(metrics=["fd"]),
        bench=BenchConfig(batch_size=2, repeats=3, warmup=1, precision="float32"),
        run=RunConfig(root=str(tmp_path), device="cpu", log_every=2, checkpoint_every=2),
    )


@pytest.fixture
def scored(monkeypatch):
    """Replaces scores by the mean of the samples, and lists the requested metrics."""
    asked = []

    def score(samples, config, metrics, cache, progress):
        asked.append(list(metrics))
        mean = float(open_samples(samples)[:].mean())
        row = {"count": 10, "protocol": "p", "features": "none"}
        return [{"request": metric, "metric": metric.upper(), "value": mean, **row} for metric in metrics]

    monkeypatch.setattr("lamabench.harness.scoring.score.score", score)
    return asked


def change(config, section, **values):
    return replace(config, **{section: replace(getattr(config, section), **values)})


def do(config, wanted=STAGES):
    """Do what a configuration requests. Returns the stages that were missing before, by kind of folder."""
    stages_by_kind = {}
    for task in tasks(config, ABOUT, wanted):
        stages_by_kind.setdefault(task.kind, []).extend(missing(task))
        execute(task, Progress())
        assert missing(task) == []
    return stages_by_kind


def test_the_count_of_fvcore_is_recorded_where_it_is_asked_for(config):
    do(config, ("cost",))
    counted = change(config, "run", fvcore=True)
    assert do(counted, ("cost",)) == {"model": ["cost"]} and do(counted, ("cost",)) == {"model": []}
    assert do(config, ("cost",)) == {"model": []}  # a record with more serves too
    (task,) = tasks(config, ABOUT, ("cost",))
    first, second = read_records(task.path / "record.jsonl")
    label = torch.zeros(1, dtype=torch.int64)
    direct = FlopCountAnalysis(build(DIT).eval(), (torch.randn(1, 1, 8, 8), label, label))
    direct.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    assert (second.fvcore, second.fvcore_skips) == (direct.total(), "1 scaled_dot_product_attention")
    assert (first.key, first.macs, first.fvcore) == (second.key, second.macs, None)


def kinds(folder):
    return [row.kind for row in read_records(folder / "record.jsonl")]


def test_every_stage_once(config, scored):
    wanted = tasks(config, ABOUT, STAGES)
    assert [task.kind for task in wanted] == ["model", "training", "samples"]
    assert do(config) == {"model": ["cost", "bench"], "training": ["train"], "samples": ["sample", "evaluate"]}
    model, training, samples = (task.path for task in wanted)
    assert kinds(model) == ["cost", "speed", "speed"] and kinds(training) == ["train"]
    assert kinds(samples) == ["sample", "score"] and samples.parent.parent == training
    for folder in (model, training, samples):
        for row in read_records(folder / "record.jsonl"):
            assert row.state == "done" and {"commit", "device", "torch"} <= row.provenance.keys()
    score = read_records(samples / "record.jsonl")[-1]
    assert (score.metric, score.checkpoint_step, score.images_seen, score.samples) == ("FD", 4, 16, wanted[2].key)
    assert score.training_flops > 0 and score.training_seconds > 0
    before = {path: path.read_bytes() for path in Path(config.run.root).rglob("*.jsonl")}
    assert not any(do(config).values())
    assert before == {path: path.read_bytes() for path in Path(config.run.root).rglob("*.jsonl")}


def test_a_task_is_plain_data(config):
    for task in tasks(config, ABOUT, STAGES):
        assert Task.from_dict(json.loads(json.dumps(asdict(task)))) == task
    with pytest.raises(InputError, match=r"unknown stage 'tarin' .*did you mean 'train'"):
        tasks(config, ABOUT, ["tarin"])


@pytest.mark.parametrize(
    ("section", "values", "again"),
    [
        ("sample", {"count": 12}, {"samples": ["sample", "evaluate"]}),
        ("evaluate", {"metrics": ["fd", "prc"]}, {"samples": ["evaluate"]}),
        ("evaluate", {"reference_count": 100}, {"samples": ["evaluate"]}),
        ("bench", {"modes": ["forward", "train"], "batch_size": [2, 3]}, {"model": ["bench"]}),
        ("bench", {"repeats": 5}, {}),
        ("run", {"log_every": 1}, {}),
    ],
)
def test_an_edit_trains_nothing(config, scored, section, values, again):
    do(config)
    repeated = do(change(config, section, **values))
    assert {kind: names for kind, names in repeated.items() if names} == again
    assert len(list(Path(config.run.root, "trainings").iterdir())) == 1


def test_an_added_metric_computes_only_itself(config, scored):
    do(config)
    do(change(config, "evaluate", metrics=["fd", "kid"]))
    assert scored == [["fd"], ["kid"]]


def test_a_longer_training_continues_and_keeps_earlier_samples(config, scored):
    do(config)
    training = tasks(config, ABOUT, ["train"])[0].path
    longer = change(config, "train", steps=8)
    assert do(longer) == {"model": [], "training": ["train"], "samples": ["sample", "evaluate"]}
    assert moments(training) == [4, 8] and len(list(training.glob("samples/*/shards/*/labels.npy"))) == 2
    assert [row.steps for row in read_records(training / "record.jsonl")] == [4, 8]
    assert not any(do(config).values()), "the shorter request stays answered"
    assert open_run(training).config.train.steps == 8


def test_moments_are_kept_and_sampled(config, scored):
    config = change(config, "train", snapshots=[1, 3])
    config = change(config, "sample", at="all")
    do(config)
    training = tasks(config, ABOUT, ["train"])[0].path
    assert moments(training) == [1, 3, 4]
    steps = {row.checkpoint_step for path in training.glob("samples/*/record.jsonl") for row in read_records(path)}
    assert steps == {1, 3, 4}


@pytest.mark.parametrize(
    ("snapshots", "at", "steps"),
    [
        ([], "last", [10]),
        ([3, 40], "last", [3, 10]),
        ([], [2, 5], [2, 5, 10]),
        (12, "last", [3, 6, 9, 10]),
        (100, "all", [10]),
    ],
)
def test_asked_moments(config, snapshots, at, steps):
    """With 4 images per step, every 12 images means every 3 steps."""
    config = change(change(config, "train", snapshots=snapshots, steps=10), "sample", at=at)
    assert asked_moments(config) == steps
    assert sampled_moments(config) == {"last": [10], "all": steps}.get(at if isinstance(at, str) else "", at)


def test_curves_have_a_set_of_their_own_at_every_moment(config, scored):
    """It is the set that a request for as many images at all moments draws."""
    config = change(change(config, "train", snapshots=[2]), "sample", curve_count=6)
    do(config)
    sets = [task for task in tasks(config, ABOUT, STAGES) if task.kind == "samples"]
    assert [(task.step, task.config["sample"]["count"]) for task in sets] == [(2, 6), (4, 6), (4, 10)]
    assert [len(open_samples(set_of(task.path))) for task in sets] == [6, 6, 10]
    alike = [change(config, "sample", curve_count=None), change(config, "sample", curve_count=None, count=6, at="all")]
    assert [do(one) for one in alike] == 2 * [{"model": [], "training": [], "samples": []}]


def test_a_moment_beyond_the_end_is_one_line(config):
    with pytest.raises(InputError, match=r"sample\.at 9 is beyond the end of the training, train\.steps 4"):
        tasks(change(config, "sample", at=[2, 9]), ABOUT, ["sample"])


def test_fewer_steps_than_reached(config, scored):
    """A shorter training is done if its end was kept. Otherwise one line names the nearest kept steps."""
    do(change(config, "train", steps=8, snapshots=[4]), ["train"])
    shorter = tasks(config, ABOUT, ["train", "sample"])
    assert [missing(task) for task in shorter] == [[], ["sample"]] and stages.problem(shorter[1]) is None
    other = tasks(change(config, "train", steps=5), ABOUT, ["train", "sample"])
    assert missing(other[0]) == []
    assert stages.problem(other[1]) == "step 5 was not kept; the nearest kept: 4 and 6"
    with pytest.raises(InputError, match="step 5"):
        execute(other[1], Progress())


def test_a_moment_that_only_a_checkpoint_holds_is_to_be_kept(config, scored):
    """The checkpoint goes as training goes on, and a moment that is asked for must not."""
    do(change(config, "train", steps=8), ["train"])
    asked = change(config, "train", steps=8, snapshots=[3, 6])
    (task,) = tasks(asked, ABOUT, ["train"])
    assert missing(task) == ["train"] and moments(task.path) == [8] and stages.lost(task) == [3]
    execute(task, Progress())
    assert missing(task) == [] and moments(task.path) == [6, 8]
    shorter = tasks(change(config, "train", steps=6), ABOUT, ["train", "sample"])
    assert [missing(one) for one in shorter] == [[], ["sample"]]
    do(change(config, "train", steps=12), ["train"])
    execute(shorter[1], Progress())
    assert [row.steps for row in read_records(task.path / "record.jsonl")] == [8, 8, 12], "the newest goes furthest"


def test_scores_are_of_the_data_that_were_learned(config, scored, tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (20, 8, 8, 1), dtype=np.uint8), np.arange(20) % 10
    config = change(config, "data", kind="npz", path=str(tmp_path / "d.npz"))
    np.savez(tmp_path / "d.npz", images=images, labels=labels)
    do(config, ["train", "sample"])
    images[3, 2, 1, 0] ^= 1
    np.savez(tmp_path / "d.npz", images=images, labels=labels)
    samples = tasks(config, ABOUT, ["train", "sample", "evaluate"])[1]
    with pytest.raises(InputError, match=r"was trained on other data .*another data\.name"):
        execute(samples, Progress())
    for file in Path(samples.training).glob("*/step-*"):
        file.unlink()
    with pytest.raises(InputError, match="was trained on other data"):  # the record says so too
        execute(samples, Progress())
    assert scored == []


def test_scores_outlive_pruned_weights(config, scored):
    do(config)
    training = tasks(config, ABOUT, ["train"])[0].path
    for file in [*training.glob("weights/*"), *training.glob("checkpoints/*")]:
        file.unlink()
    assert not any(do(config).values())
    with pytest.raises(InputError):
        execute(tasks(change(config, "train", steps=8), ABOUT, ["train"])[0], Progress())


def test_variants_share_what_they_have_in_common(config):
    """Two lengths, two guidances and two benchmarks need one training and one model."""
    several = [
        config,
        change(config, "train", steps=8),
        change(config, "sample", guidance=2.0),
        change(config, "bench", batch_size=3),
    ]
    merged_tasks = merged(task for one in several for task in tasks(one, ABOUT, STAGES))
    assert [task.kind for task in merged_tasks] == ["model", "training", "samples", "samples", "samples"]
    assert merged_tasks[1].moments == (4, 8) and merged_tasks[1].config["train"]["steps"] == 8
    assert len(merged_tasks[0].plans) == 2 and {task.step for task in merged_tasks[2:]} == {4, 8}


def test_a_failed_stage_is_recorded_and_repeated(config, monkeypatch):
    (task,) = tasks(config, ABOUT, ["train"])

    def crash(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def full(*_):
        raise OSError(28, "No space left on device", "/scratch")

    with monkeypatch.context() as patch, pytest.raises(torch.cuda.OutOfMemoryError):
        patch.setattr("lamabench.harness.training.loop.train", crash)
        execute(task, Progress())
    (row,) = read_records(task.path / "record.jsonl")
    assert row.state == "oom" and row.error is not None and "Tried to allocate 2 GiB; it passed 4 images" in row.error
    assert missing(task) == ["train"] and (task.path / "error.log").is_file()
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr("lamabench.harness.training.loop.train", full)
        execute(task, Progress())
    assert read_records(task.path / "record.jsonl")[-1].error == "No space left on device: /scratch"
    execute(task, Progress())
    assert [row.state for row in read_records(task.path / "record.jsonl")] == ["oom", "failed", "done"]
    assert not (task.path / "error.log").exists()


def test_a_folder_that_another_process_works_in_stays_as_it_is(config):
    do(config, ["train"])
    (longer,) = tasks(change(config, "train", steps=8), ABOUT, ["train"])
    before = {path: path.read_bytes() for path in longer.path.rglob("*") if path.is_file()}
    with locked(longer.path):
        before[longer.path / ".lock"] = (longer.path / ".lock").read_bytes()
        stages.prepare(longer)
        with pytest.raises(Busy, match="is being worked on by process"):
            execute(longer, Progress())
        assert before == {path: path.read_bytes() for path in longer.path.rglob("*") if path.is_file()}
    execute(longer, Progress())
    assert open_run(longer.path).config.train.steps == 8


def test_an_opened_run(config, scored):
    do(change(config, "train", snapshots=[2]))
    run = open_run(tasks(config, ABOUT, ["train"])[0].path)
    assert run.moments == [2, 4] and {row.kind for row in run.records} == {"train", "sample", "score"}
    early, late = run.model(at=2), run.model()
    assert any(not torch.equal(a, b) for a, b in zip(early.parameters(), late.parameters(), strict=True))
    images = run.sample([3, 1, 4], steps=3)
    assert images.shape == (3, 8, 8, 1) and images.dtype == np.uint8
    assert np.array_equal(images[1:2], run.sample([3, 1], steps=3)[1:])
    with pytest.raises(InputError, match="step 3"):
        run.model(at=3)
