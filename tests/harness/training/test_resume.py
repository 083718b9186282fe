"""A continued training equals an uninterrupted one, keeps its moments, and keeps its backends."""

import math
from dataclasses import replace

import pytest
import torch
from lamabench.harness.disk import append
from lamabench.harness.measure.cost import cost
from lamabench.harness.progress import Progress
from lamabench.harness.provenance import provenance
from lamabench.harness.record import row
from lamabench.harness.sections import BackendConfig
from lamabench.harness.training import checkpoint, resume
from lamabench.harness.training.folder import Position
from lamabench.harness.training.loop import train
from lamabench.harness.training.resume import asked_moments, backends_to_ask, with_stretch
from lamabench.kernels import OPERATORS
from lamabench.kernels.errors import InputError
from trainings import DIT, FAMILIES, LAMAMBA, assert_same, longer, make, metrics, tensors, trained


# LaMamba is slow on a CPU, and test_step.py continues its training.
@pytest.mark.parametrize("family", ["dit", "adm", pytest.param("lamamba", marks=pytest.mark.soak)])
def test_a_longer_training_equals_an_uninterrupted_one(family, tmp_path):
    """With 3, 7 and 12 steps and a line every 2, both ends interrupt a window of metrics, which is complete later."""
    config = make(FAMILIES[family], 12, snapshots=[2, 8])
    whole, broken = trained(tmp_path / "whole", config), tmp_path / "broken"
    ends = []
    for steps in (3, 7):
        alone = trained(tmp_path / str(steps), longer(config, steps))
        assert_same(alone, trained(broken, longer(config, steps)))
        assert [line["step"] for line in metrics(broken)] == [*range(2, steps, 2), steps]
        ends.append(checkpoint.load_weights(broken, steps).tensors)
    assert_same(whole, trained(broken, config))
    assert checkpoint.moments(broken) == [2, 3, 7, 8, 12] and checkpoint.moments(whole) == [2, 8, 12]
    for step in (2, 8, 12):
        actual, expected = (checkpoint.load_weights(folder, step) for folder in (broken, whole))
        assert all(torch.equal(v, expected.tensors[name]) for name, v in actual.tensors.items())
        assert actual.loss == expected.loss
    for steps, before in zip((3, 7), ends, strict=True):  # weights of earlier samples do not change
        assert all(torch.equal(v, before[name]) for name, v in checkpoint.load_weights(broken, steps).tensors.items())


def test_the_record_counts_images_and_flops(tmp_path):
    record = train(tmp_path, make(steps=4, snapshots=[2]), Progress())
    assert record["images"] == 16 and record["moments"] == [2, 4]
    assert record["training_flops"] == 3 * cost(DIT).flops * 16  # forward once, backward twice as much
    (stretch,) = record["stretches"]
    assert stretch["from_step"] == 0 and stretch["backend"] == record["backend"]
    assert record["backend"] == {"modulated_norm": "torch", "attention": "sdpa"}
    assert set(stretch) == {"from_step", "backend", "compile", "torch", "commit", "dirty", "device", "host"}
    assert stretch["torch"] == torch.__version__


def test_a_training_from_before_an_operator_had_a_name_goes_on():
    """With the backend that computes what it computed, whatever `auto` takes now, and without a new stretch."""
    here = {key: provenance("cpu")[key] for key in ("torch", "commit", "dirty", "device", "host")}
    before = [{"from_step": 0, "backend": {"attention": "sdpa"}, "compile": "eager", **here}]
    at = Position(4)

    def stretches(backend):
        return with_stretch(before, at, backend, "eager", "cpu", print, [{}])

    assert stretches({"modulated_norm": "torch", "attention": "sdpa"}) == before
    other = {"modulated_norm": "reference", "attention": "sdpa"}
    assert stretches(other) == [*before, {"from_step": 4, "backend": other, "compile": "eager", **here}]
    config = make()
    asked = backends_to_ask(config, before, "cpu", print)
    assert (asked["modulated_norm"], asked["attention"], asked["ssd"]) == ("torch", "sdpa", "auto")
    assert backends_to_ask(config, [], "cpu", print)["modulated_norm"] == "auto"
    config.backend.modulated_norm = "reference"
    assert backends_to_ask(config, before, "cpu", print)["modulated_norm"] == "reference"


@pytest.mark.parametrize(
    ("snapshots", "steps", "asked"),
    [
        ([], 10, [10]),
        ([3, 10, 5], 10, [3, 5, 10]),
        ([3, 20], 10, [3, 10]),  # a study of several lengths requests only steps that a training reaches
        (8, 10, [2, 4, 6, 8, 10]),
        (10, 10, [3, 5, 8, 10]),  # 10, 20, 30 and 40 images, four per step
        (7, 4, [2, 4]),
        (3, 3, [1, 2, 3]),  # several multiples in one step are one moment
        (100, 10, [10]),
    ],
)
def test_requested_moments(snapshots, steps, asked):
    config = make(steps=steps, snapshots=snapshots)
    assert asked_moments(config) == asked
    if isinstance(snapshots, int):
        by_hand = {math.ceil(k * snapshots / 4) for k in range(1, 100)}
        assert asked == sorted({step for step in by_hand if step <= steps} | {steps})


def test_moments_of_samples_are_kept_too(tmp_path):
    folder = trained(tmp_path, make(), 3, 5)
    assert checkpoint.moments(folder) == [3, 5, 6]
    with pytest.raises(InputError, match="step 7 is asked for, but the training has the steps 1 to 6"):
        trained(folder, make(), 7)


def test_a_shorter_training_is_done_if_its_end_was_kept(tmp_path):
    folder = trained(tmp_path, make(snapshots=[3]))
    before = tensors(folder), metrics(folder)
    record = train(folder, make(steps=3), Progress())
    assert (record["steps"], record["images"]) == (3, 12) and record["final_loss"] is not None
    assert record["seconds"] < train(folder, make(), Progress())["seconds"]
    assert metrics(folder) == before[1] and all(torch.equal(v, before[0][k]) for k, v in tensors(folder).items())


@pytest.mark.parametrize(("steps", "snapshots"), [(2, []), (6, [2])])
def test_a_passed_moment_is_one_line(tmp_path, steps, snapshots):
    folder = trained(tmp_path, make(checkpoint_every=6, snapshots=[1, 3]))
    with pytest.raises(InputError, match=r"step 2 of .* was not kept, .* at step 6 already; the nearest kept: 1 and 3"):
        trained(folder, make(steps=steps, snapshots=snapshots))


def test_a_longer_training_continues_without_passed_moments(tmp_path, capsys):
    """Pruned weights do not stop a training. The stage that needs them reports it."""
    folder = trained(tmp_path, make(checkpoint_every=6, snapshots=[2, 3]))
    (folder / "weights" / checkpoint.file_name(2)).unlink()
    trained(folder, make(steps=8, snapshots=[2, 3]))
    assert checkpoint.moments(folder) == [3, 6, 8]
    assert f"step 2 of {folder} was not kept, and the training is at step 6 already" in capsys.readouterr().err


def test_a_moment_in_a_checkpoint_is_kept(tmp_path):
    """For the last two checkpoints, and after a kill between a checkpoint and the weights of its step."""
    folder = trained(tmp_path / "a", make(snapshots=[4]))
    expected = {step: checkpoint.load_weights(folder, step) for step in (4, 6)}
    for path in checkpoint.files(folder / "weights"):
        path.unlink()
    trained(folder, make(), 4)
    for step, weights in expected.items():
        again = checkpoint.load_weights(folder, step)
        assert again.loss == weights.loss
        assert all(torch.equal(v, again.tensors[name]) for name, v in weights.tensors.items())


@pytest.mark.parametrize("left", ["weights", "record"])
@pytest.mark.parametrize("gone", ["pruned", "damaged"])
def test_a_training_without_checkpoints_does_not_start_again(tmp_path, left, gone):
    folder = trained(tmp_path, make())
    done = {"steps": 6, "images": 24, "seconds": 1.0, "final_loss": 0.1, "batch_size": 4}
    append(folder / "record.jsonl", row("train", key="", **done).as_dict())
    for path in checkpoint.files(folder / "checkpoints"):
        path.unlink() if gone == "pruned" else path.write_bytes(b"")
    if left == "weights":
        (folder / "record.jsonl").unlink()
    else:
        (folder / "weights" / checkpoint.file_name(6)).unlink()
    lines = metrics(folder)
    words = "the nearest kept: 6" if left == "weights" else "none is kept"
    with pytest.raises(InputError, match=f"was trained, but has no complete checkpoint .* to step 8; {words}$"):
        trained(folder, make(steps=8))
    assert metrics(folder) == lines
    if left == "weights":  # this request needs nothing else
        assert train(folder, make(), Progress())["steps"] == 6


def elsewhere(monkeypatch, **other):
    """Change facts about this machine."""
    here = resume.provenance
    monkeypatch.setattr(resume, "provenance", lambda device: {**here(device), **other})


@pytest.mark.parametrize("field", ["commit", "torch", "device", "host"])
def test_a_difference_begins_another_stretch(tmp_path, monkeypatch, capsys, field):
    folder = trained(tmp_path, make(steps=2))
    trained(folder, make(steps=4))
    capsys.readouterr()
    elsewhere(monkeypatch, **{field: "another"})
    record = train(folder, make(steps=6), Progress())
    assert [stretch["from_step"] for stretch in record["stretches"]] == [0, 4]
    assert record["stretches"][1] == {**record["stretches"][0], "from_step": 4, field: "another"}
    assert ("the code is commit another from step 4 on" in capsys.readouterr().err) == (field == "commit")


def use(monkeypatch, operator, name, reasons):
    """Replace a backend by plain torch. It runs, or refuses for these reasons."""
    backends = OPERATORS[operator].backends
    run = backends["torch"].run
    monkeypatch.setitem(backends, name, replace(backends[name], run=run, reasons=lambda device: reasons, auto_on=None))
    monkeypatch.setattr(OPERATORS[operator], "_resolved", {})


def test_auto_continues_with_earlier_backends(tmp_path, monkeypatch):
    """Triton becomes usable and is first in the order, but the scan stays the one of the training so far."""
    config = make(LAMAMBA, 2)
    folder = trained(tmp_path / "a", config)
    with monkeypatch.context() as patch:
        use(patch, "selective_scan", "triton", [])
        backends = OPERATORS["selective_scan"].backends
        first = {"triton": backends["triton"], **backends}
        patch.setattr(OPERATORS["selective_scan"], "backends", first)
        record = train(folder, longer(config, 4), Progress())
        assert record["backend"]["selective_scan"] == "torch" and len(record["stretches"]) == 1
        new = train(trained(tmp_path / "b", longer(config, 1)), config, Progress())
        assert new["backend"]["selective_scan"] == "triton"


def test_backends_that_cannot_run_here_are_one_line(tmp_path, monkeypatch, capsys):
    config = make(LAMAMBA, 2)
    with monkeypatch.context() as patch:
        use(patch, "selective_scan", "triton", [])
        backends = OPERATORS["selective_scan"].backends
        patch.setattr(OPERATORS["selective_scan"], "backends", {"triton": backends["triton"], **backends})
        folder = trained(tmp_path, config)
    OPERATORS["selective_scan"]._resolved.clear()
    message = r"the training ran selective_scan=triton, which cannot run here \(.*\); run.new_backends=true continues"
    with pytest.raises(InputError, match=message) as caught:
        trained(folder, longer(config, 4))
    assert "\n" not in str(caught.value)
    config.run.new_backends = True
    record = train(folder, longer(config, 4), Progress())
    assert [(s["from_step"], s["backend"]["selective_scan"]) for s in record["stretches"]] == [
        (0, "triton"),
        (2, "torch"),
    ]
    assert "continuing with another one" in capsys.readouterr().err
    config.run.new_backends = False  # the backends of the last stretch can run
    assert len(train(folder, longer(config, 6), Progress())["stretches"]) == 2


def test_a_backend_by_name_is_used(tmp_path):
    config = make(LAMAMBA, 2)
    folder = trained(tmp_path, config)
    named = replace(longer(config, 4), backend=BackendConfig(selective_scan="reference"))
    stretches = train(folder, named, Progress())["stretches"]
    assert [stretch["backend"]["selective_scan"] for stretch in stretches] == ["torch", "reference"]
