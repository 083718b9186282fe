"""Losses that jump or are not finite leave a snapshot, and its replay finds the step, the image and the layer."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
from lamabench.harness.data.images import load
from lamabench.harness.data.items import TrainItems, epoch_order
from lamabench.harness.keys import config_to_dict
from lamabench.harness.run import create
from lamabench.harness.training import failures
from lamabench.harness.training.replay import main, replay
from lamabench.harness.training.steps import Diverged
from lamabench.kernels.errors import InputError
from torch import nn
from trainings import DIT, assert_same, longer, make, metrics, trained


@pytest.fixture
def spoil(monkeypatch):
    """Multiplies the noise of some items of the training, {item: factor}."""

    def spoil(factors):
        get = TrainItems.__getitems__

        def spoilt(self, indices):
            batch = get(self, indices)
            for row, i in enumerate(indices):
                batch["noise"][row] *= factors.get(i, 1.0)
            return batch

        monkeypatch.setattr(TrainItems, "__getitems__", spoilt)

    return spoil


def folder_of(path, config):
    """A training folder with its config.json."""
    return create(path, {"kind": "training", "key": "0" * 12, "config": config_to_dict(config)})


def snapshots(folder):
    return sorted(folder.glob("failures/*"))


def facts_of(snapshot):
    return json.loads((snapshot / "failure.json").read_text())


@pytest.mark.parametrize("batch", [{}, {"micro_batch": 2}])
def test_replay_finds_where_a_loss_stopped_to_be_finite(batch, spoil, tmp_path, capsys, monkeypatch):
    """Image 26 of the training, in step 7, gets infinite noise. A checkpoint of step 4 precedes it, and the line of
    step 10 would be the first to show it, but the checkpoint of step 8 is not written."""
    config = make(steps=12, log_every=5, checkpoint_every=4)
    config = replace(config, run=replace(config.run, **batch))
    spoil({26: math.inf})
    folder = folder_of(tmp_path / "run", config)
    with pytest.raises(Diverged, match="the loss is not finite by step 8 of 12"):
        trained(folder, config)
    (snapshot,) = snapshots(folder)
    facts = facts_of(snapshot)
    assert snapshot.name == "step-00000008" and facts["kind"] == "diverged"
    assert (facts["checkpoint"], facts["first_step"], facts["last_step"]) == (4, 6, 8)
    assert facts["images"] == [20, 32] and facts["seed"] == 0 and facts["stretch"]["commit"]
    assert facts["command"] in capsys.readouterr().err
    rows = list(replay(snapshot, "cpu"))
    with pytest.raises(Diverged, match="by step 7"):
        trained(tmp_path / "single", make(steps=12, log_every=1))
    (alone,) = [line for line in metrics(tmp_path / "single") if line["step"] == 6]
    assert [row["step"] for row in rows] == [6, 7]
    assert rows[0]["loss"] == pytest.approx(alone["loss"], rel=1e-6) and rows[0]["layer"] is None
    assert rows[0]["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)
    assert not math.isfinite(rows[1]["loss"])
    data = load(config.data, print)
    assert rows[1]["image"] == epoch_order(0, 0, len(data))[26]
    assert rows[1]["layer"] == "x_embedder.proj" and rows[1]["gradient"]
    monkeypatch.setattr(sys, "argv", ["replay", str(snapshot), "--device", "cpu"])
    assert main() == 0
    assert "first output that is not finite: x_embedder.proj" in capsys.readouterr().out.splitlines()[-1]


def test_replay_names_a_layer_inside(tmp_path, monkeypatch):
    """A block whose GELU overflows in step 3, where all before it is finite."""
    config, calls = make(steps=3, log_every=3, checkpoint_every=3), []
    forward = nn.GELU.forward

    def overflow(self, x):
        calls.append(x)
        return forward(self, x) * (math.inf if len(calls) == 3 else 1)

    monkeypatch.setattr(nn.GELU, "forward", overflow)
    folder = folder_of(tmp_path, config)
    with pytest.raises(Diverged):
        trained(folder, config)
    calls.clear()
    rows = list(replay(snapshots(folder)[0], "cpu"))
    assert [(row["step"], row["layer"]) for row in rows] == [(1, None), (2, None), (3, "blocks.0.mlp.act")]


def test_a_gradient_that_is_not_finite_saves_no_bad_weights(tmp_path, monkeypatch):
    """The loss of step 4 is finite, but its update would spoil the weights of the checkpoint of that step."""
    from lamabench.harness.diffusion.gaussian import DDPM

    loss, calls = DDPM.loss, []

    def overflow(self, out, *inputs):
        calls.append(out)
        if len(calls) == 4:
            out = out.clone()
            out.register_hook(lambda gradient: gradient * math.inf)
        return loss(self, out, *inputs)

    monkeypatch.setattr(DDPM, "loss", overflow)
    folder = folder_of(tmp_path, make())
    with pytest.raises(
        Diverged, match=r"the gradient is not finite by step 4 of 6: loss [\d.]+, .*, grad_norm (nan|inf)"
    ):
        trained(folder, make())
    assert [path.stem for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    calls[:] = calls[:2]
    (_, last) = replay(snapshots(folder)[0], "cpu")
    assert last["step"] == 4 and math.isfinite(last["loss"]) and last["layer"] is None and last["gradient"]


def test_a_natural_divergence_is_found_at_its_step(tmp_path):
    config = make(steps=40, lr=1e18, log_every=50, checkpoint_every=50)
    folder = folder_of(tmp_path / "run", config)
    with pytest.raises(Diverged):
        trained(folder, config)
    with pytest.raises(Diverged) as caught:
        trained(tmp_path / "single", make(steps=40, lr=1e18, log_every=1, checkpoint_every=50))
    rows = list(replay(snapshots(folder)[0], "cpu"))
    assert f"by step {rows[-1]['step']} of" in str(caught.value)
    assert len(rows) == rows[-1]["step"] == len(metrics(tmp_path / "single")) + 1


def test_spikes_leave_a_few_snapshots_and_the_training_goes_on(spoil, tmp_path, capsys):
    """Noise of a hundred times in the steps 9, 13, … 25 raises losses to more than five times the usual ones."""
    steps = range(9, 26, 4)
    spoil({4 * step - 3: 100.0 for step in steps})
    config = make(DIT, steps=30, log_every=1, checkpoint_every=6)
    folder = trained(folder_of(tmp_path / "run", config), config)
    assert [line["step"] for line in metrics(folder)] == [*range(1, 31)]
    lines = [line for line in capsys.readouterr().err.splitlines() if "times the usual" in line]
    assert [int(line.split("by step ")[1].split(",")[0]) for line in lines] == [*steps]
    places = snapshots(folder)
    assert [path.name for path in places] == [f"step-{step:08d}" for step in (9, 13, 17)]
    for place, step, start in zip(places, (9, 13, 17), (6, 12, 12), strict=True):
        facts = facts_of(place)
        assert (facts["kind"], facts["checkpoint"]) == ("spike", start)
        assert (facts["first_step"], facts["last_step"]) == (step, step)
        (row,) = replay(place, "cpu")  # the checkpoint is kept with the snapshot, though the training deleted it
        assert row["loss"] == pytest.approx(metrics(folder)[step - 1]["loss"], rel=1e-5)
        assert row["image"] == epoch_order(0, 0, len(load(config.data, print)))[4 * step - 3]
        assert row["layer"] is row["gradient"] is None
    broken = trained(folder_of(tmp_path / "broken", config), longer(config, 8))
    assert_same(folder, trained(broken, config))
    assert [path.name for path in snapshots(broken)] == [path.name for path in places]  # the losses before are known


@pytest.mark.parametrize("passes", [{}, {"micro_batch": 2}])
def test_a_spike_of_one_step_is_seen_in_a_window_of_many(passes, spoil, tmp_path, capsys):
    """Step 33 of 40 has noise of six times. The mean of its window of five steps is below five times the usual one."""
    config = make(DIT, steps=40, log_every=5, checkpoint_every=10)
    config = replace(config, run=replace(config.run, **passes))
    folder = trained(folder_of(tmp_path / "usual", config), config)
    assert not snapshots(folder)
    spoil({4 * 33 - 3: 6.0})
    folder = trained(folder_of(tmp_path / "run", config), config)
    usual = sorted(line["loss"] for line in metrics(folder)[:6])[3]
    assert metrics(folder)[6]["step"] == 35 and metrics(folder)[6]["loss"] < 5 * usual
    (snapshot,) = snapshots(folder)
    assert "by step 35, more than 5 times the usual" in capsys.readouterr().err
    rows = list(replay(snapshot, "cpu"))
    assert [row["step"] for row in rows] == [31, 32, 33, 34, 35]
    assert max(rows, key=lambda row: row["loss"])["step"] == 33
    assert "largest" not in metrics(folder)[6]


def test_what_is_no_spike(tmp_path):
    losses = [3.0, 1.0, 1.0, 1.0, 1.0, 4.9, 5.0]
    said = []
    watch = failures.Failures(tmp_path, None, "", [], [], said.append)
    watch._leave = lambda kind, at, latest, text: said.append(text)
    for step, loss in enumerate(losses):
        watch.look(failures.Position(step), loss)
    assert not said
    watch.look(failures.Position(7), 5.1)
    assert said == ["the loss is 5.1 by step 7, more than 5 times the usual 1"]


def test_a_snapshot_that_cannot_be_written_is_one_line(spoil, tmp_path, capsys):
    config = make(DIT, steps=10, log_every=1)
    spoil({36: 100.0})
    folder = folder_of(tmp_path, config)
    (folder / "failures").touch()
    trained(folder, config)
    assert "the usual" in (err := capsys.readouterr().err) and "no snapshot can be written: " in err


def test_what_is_no_snapshot(tmp_path):
    code = [sys.executable, "-m", "lamabench.harness.training.replay", str(tmp_path)]
    done = subprocess.run(code, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{tmp_path} is no snapshot of a failure: it has no failure.json\n"
    (tmp_path / "failure.json").write_text("{}")
    with pytest.raises(InputError, match="it has no checkpoint"):
        list(replay(tmp_path))
