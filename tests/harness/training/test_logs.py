"""Lines of metrics: what they mean, after interruptions too, and the loggers that get them."""

import importlib
import json
import shutil
import struct
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from lamabench.harness.disk import read_lines
from lamabench.harness.keys import config_to_dict
from lamabench.harness.random import Stream, generator
from lamabench.harness.run import create
from lamabench.harness.training import loggers
from lamabench.harness.training.checkpoint import files, load, save
from lamabench.harness.training.folder import Position
from lamabench.harness.training.logs import Speed, peak_of
from lamabench.harness.training.previews import write_preview
from lamabench.harness.training.window import new_window, sums, window_means
from lamabench.kernels.errors import InputError
from lamabench.launch.cli import main
from trainings import assert_same, longer, make, metrics, stop_at, trained

QUARTERS = [f"loss_q{number}" for number in (1, 2, 3, 4)]


def test_the_loss_by_quarter_of_t():
    """Against a loop in float64; t of 1 is in the last quarter of [0, 1]; two steps of two passes each."""
    rng = np.random.default_rng(0)
    loss, t = (
        rng.random((2, 8)),
        np.array([[0, 0.2, 0.249, 0.25, 0.5, 0.7, 0.3, 0.1], [0.6, 0.74, 0, 0, 0, 0.1, 0.2, 0]]),
    )
    window = new_window(("loss",), "cpu")
    for step in range(2):
        for part in (slice(0, 4), slice(4, 8)):
            one, two = torch.tensor(loss[step, part]).float(), torch.tensor(t[step, part]).float()
            window[:-2] += sums({"loss": one}, ("loss",), two, 1.0) / 2
    means = window_means(window, ("loss",), 2)
    assert means["loss"] == pytest.approx(loss.mean(), rel=1e-6)
    for number, name in enumerate(QUARTERS[:3]):
        inside = (t >= number / 4) & (t < (number + 1) / 4)
        assert means[name] == pytest.approx(loss[inside].mean(), rel=1e-6), name
    assert means["loss_q4"] is None
    window[:-2] += sums({"loss": torch.tensor([7.0])}, ("loss",), torch.tensor([1.0]), 1.0)
    assert window_means(window, ("loss",), 3)["loss_q4"] == pytest.approx(7)


def shares(step, batch=4):
    """The number of images of a step in each quarter of t, from the seed 0."""
    items = range((step - 1) * batch, step * batch)
    t = [int(generator(0, Stream.TRAIN, item).integers(1000)) for item in items]
    return np.histogram(t, bins=[0, 250, 500, 750, 1000])[0]


def test_means_over_an_interruption_with_another_log_every(tmp_path, monkeypatch):
    """Every field is the mean of those of single steps: of the loss by quarter over its images."""
    single = metrics(trained(tmp_path / "single", make(steps=6, log_every=1, warmup=4)))
    broken = tmp_path / "broken"
    stop_at(monkeypatch, 6, broken, make(steps=9, log_every=3, checkpoint_every=4, warmup=4))
    lines = metrics(trained(broken, make(steps=6, log_every=2, warmup=4)))
    assert [line["step"] for line in lines] == [3, 6]
    for line, steps in zip(lines, (range(1, 4), range(4, 7)), strict=True):
        ones = [single[step - 1] for step in steps]
        for name in ("loss", "mse", "vb", "grad_norm"):
            assert line[name] == pytest.approx(np.mean([one[name] for one in ones]), rel=1e-6), name
        assert line["lr"] == ones[-1]["lr"] == pytest.approx(1e-3 * min(1, steps[-1] / 4))
        for quarter, name in enumerate(QUARTERS):
            counts = [shares(step)[quarter] for step in steps]
            total = sum(count * (one[name] or 0) for count, one in zip(counts, ones, strict=True))
            if sum(counts):
                assert line[name] == pytest.approx(total / sum(counts), rel=1e-5), name
            else:
                assert line[name] is None
    assert any(one[name] is None for one in single for name in QUARTERS)


def test_a_checkpoint_of_before_has_no_sums_of_gradients(tmp_path, monkeypatch):
    """What cannot be known of the window that it interrupts is null; the losses are right, and so is the next line."""
    config = make(steps=9, log_every=3, checkpoint_every=4)
    whole, broken = trained(tmp_path / "whole", config), tmp_path / "broken"
    stop_at(monkeypatch, 6, broken, config)
    saved = load(files(broken / "checkpoints")[0])
    later = tmp_path / "later"
    shutil.copytree(broken, later)
    saved.tensors["window"] = (sums := saved.tensors["window"])[:-1].clone()  # without the largest loss
    save(later / "checkpoints", saved)
    assert metrics(trained(later, config)) == metrics(whole)
    saved.tensors["window"] = sums[:3].clone()
    save(broken / "checkpoints", saved)
    lines, expected = metrics(trained(broken, config)), metrics(whole)
    unknown = dict.fromkeys(("grad_norm", *QUARTERS))
    assert lines == [expected[0], expected[1] | unknown, expected[2]]
    saved.tensors["window"] = saved.tensors["window"][:2].clone()
    save(broken / "checkpoints", saved)
    with pytest.raises(InputError, match="no complete checkpoint"):
        trained(broken, longer(config, 12))


def test_speed_in_closed_form(tmp_path):
    """1000 images of 1e9 multiply-adds in 2 s are 3e12 operations a second, three passes of two operations each."""
    speed = Speed(Position(10, 5.0), 50, 10**9, 12e12, "cpu")
    assert speed.since(Position(30, 7.0)) == {"images_per_s": 500.0, "mfu": 0.25}
    assert speed.since(Position(40, 7.5)) == {"images_per_s": 1000.0, "mfu": 0.5}
    assert Speed(Position(), 50, 10**9, None, "cpu").since(Position(1, 0.5)) == {"images_per_s": 100.0}
    h100 = "NVIDIA H100 80GB HBM3"
    assert peak_of([h100] * 4, "bfloat16") == 4 * 989e12 and peak_of([h100, h100], "float32") == 2 * 67e12
    assert peak_of([h100, "some CPU"], "bfloat16") is None
    lines = read_lines(trained(tmp_path, make()) / "metrics.jsonl")
    assert all(line["images_per_s"] > 0 and not {"mfu", "peak_memory_gib"} & line.keys() for line in lines)
    seconds = [0, *(line["seconds"] for line in lines)]
    for line, took in zip(lines, np.diff(seconds), strict=True):
        assert line["images_per_s"] == pytest.approx(8 / took, rel=0.2)


@pytest.mark.gpu
def test_lines_of_a_step_that_is_one_graph(tmp_path):
    """The sums of a captured step are those of a plain one, and a GPU has a peak of memory and, if it is known, MFU."""
    lines = []
    for compile in ("compile", "whole-step"):  # the same kernels
        config = make(steps=12, log_every=3, compile=compile, clip=0.5, warmup=5)
        config = replace(config, run=replace(config.run, device="cuda", micro_batch=2))
        lines.append(read_lines(trained(tmp_path / compile, config) / "metrics.jsonl"))
    for one, other in zip(*lines, strict=True):
        for name in ("loss", "grad_norm", "lr", *QUARTERS):
            assert (one[name] is None) == (other[name] is None), name
            assert one[name] is None or one[name] == pytest.approx(other[name], rel=1e-3), name
        assert one["peak_memory_gib"] > 0 < other["peak_memory_gib"]
        known = peak_of([torch.cuda.get_device_name()], "float32") is not None
        assert ("mfu" in one, "mfu" in other) == (known, known)


def logging(*names):
    config = make(steps=10, log_every=2, checkpoint_every=6)
    return replace(config, run=replace(config.run, log_to=list(names), preview_every=3))


def interrupted(tmp_path, monkeypatch, name):
    """A training with a logger that stops at step 9, after the checkpoint of step 6 and the line of step 8, and goes
    on."""
    config = logging(name)
    config = replace(config, sample=replace(config.sample, steps=2))
    folder = tmp_path / "dit-digits-0123456789ab"
    create(folder, {"kind": "training", "key": "0123456789ab", "study": "demo", "config": config_to_dict(config)})

    def stop(training, step, *words):
        if step == 9:
            raise KeyboardInterrupt
        return write_preview(training, step, *words)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("lamabench.harness.training.logs.write_preview", stop)
        trained(folder, config)
    assert [line["step"] for line in metrics(folder)] == [2, 4, 6, 8]
    assert [path.stem for path in files(folder / "checkpoints")] == ["step-00000006"]
    return trained(folder, config)


def scalars(folder):
    """{field: {step: value}} of the lines of metrics."""
    lines = read_lines(folder / "metrics.jsonl")
    names = {name for line in lines for name in line} - {"step"}
    return {n: {line["step"]: line[n] for line in lines if line.get(n) is not None} for n in names}


def test_tensorboard_shows_one_run_after_an_interruption(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = interrupted(tmp_path, monkeypatch, "tensorboard")
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    expected = scalars(folder)
    assert set(events.Tags()["scalars"]) == expected.keys() >= {"loss", "grad_norm", "lr", "images_per_s"}
    for name, values in expected.items():
        seen = events.Scalars(name)
        assert [one.step for one in seen] == list(values), name  # none twice
        assert [one.value for one in seen] == pytest.approx(list(values.values()), rel=1e-6), name
    assert list(expected["loss"]) == [2, 4, 6, 8, 10]
    assert [one.step for one in events.Images("preview")] == [3, 6, 9]
    (text,) = events.Tensors("config/text_summary")
    assert '"kind": "ddpm"' in text.tensor_proto.string_val[0].decode()


def wandb_records(path):
    """The records of a .wandb file: a log of LevelDB's format, in blocks of 32 KiB, of protocol buffers."""
    record = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    data, place, body = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (rest := 2**15 - place % 2**15) < 7:
            place += rest
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        body += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record.FromString(body)
            body = b""


def test_wandb_has_one_run_after_an_interruption(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = interrupted(tmp_path, monkeypatch, "wandb")
    parts = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(parts) == 2  # of one run, which `wandb sync` joins
    history = {}
    for part in parts:
        records = list(wandb_records(part))
        (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"][:1]
        assert (run.run_id, run.run_group, run.display_name) == ("0123456789ab", "demo", folder.name)
        for record in records:
            if record.WhichOneof("record_type") == "history":
                values = {
                    (one.key or ".".join(one.nested_key)): json.loads(one.value_json) for one in record.history.item
                }
                step = values["_step"]
                assert step not in history  # none twice
                history[step] = values
    for name, expected in scalars(folder).items():
        seen = {step: one[name] for step, one in history.items() if name in one}
        if name in ("seconds", "images_per_s"):  # of step 8, those of the first time
            assert seen.keys() == expected.keys()
        else:
            assert seen == pytest.approx(expected), name
    assert [step for step, one in history.items() if "preview._type" in one] == [3, 6, 9]


def test_trackio_has_one_run_after_an_interruption(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    storage = pytest.importorskip("trackio.sqlite_storage", reason="trackio is not installed")
    folder = interrupted(tmp_path, monkeypatch, "trackio")
    lines = storage.SQLiteStorage.get_logs("lamabench", folder.name)
    expected = scalars(folder)
    assert [line["step"] for line in lines if "loss" in line] == list(expected["loss"])  # none twice
    assert [line["loss"] for line in lines if "loss" in line] == list(expected["loss"].values())
    assert [line["step"] for line in lines if "preview" in line] == [3, 6, 9]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_logger_that_is_not_installed_is_refused(name, tmp_path, monkeypatch, capsys):
    for package in loggers.PACKAGES[name]:
        monkeypatch.setitem(sys.modules, package, None)
    line = f"run.log_to={name}, which is not installed: pip install {name}"
    with pytest.raises(InputError, match=f"^{line}$"):
        trained(tmp_path / "folder", logging(name))
    monkeypatch.chdir(tmp_path)
    words = ["model=dit_nano", "data=digits", "data.size=8", f"run.log_to=[{name}]"]
    assert main(["train", *words]) == 2
    assert capsys.readouterr().err == f"lamabench train: error: {line}\n"
    assert [one.name for one in tmp_path.rglob("*")] == ["folder"]


def test_a_folder_is_no_package(tmp_path, monkeypatch):
    """As wandb leaves one with its name."""
    (tmp_path / "wandbee").mkdir()
    monkeypatch.setitem(loggers.PACKAGES, "wandb", ("wandbee",))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match="pip install wandbee"):
        loggers.check_loggers(["wandb"])
    (tmp_path / "wandbee" / "__init__.py").touch()
    loggers.check_loggers(["wandb"])


class Fragile:
    """A logger that keeps what it gets, and fails at a step."""

    overwrites = True

    def __init__(self, training, fails):
        self.steps, self.fails, self.closed = [], fails, False
        if fails == 0:
            raise OSError("no network")

    def line(self, step, values):
        if step == self.fails:
            raise ConnectionError("broken\npipe")
        self.steps.append(step)

    def picture(self, step, name, path):
        pass

    def close(self):
        if self.fails == "close":
            time.sleep(5)


def test_a_logger_that_fails_does_not_end_the_training(tmp_path, monkeypatch, capsys):
    opened = {}

    def opens(name, fails):
        def open(training):
            opened[name] = Fragile(training, fails)
            return opened[name]

        return open

    cases = {"tensorboard": 4, "wandb": 0, "trackio": "close"}
    monkeypatch.setattr(loggers, "LOGGERS", {name: opens(name, fails) for name, fails in cases.items()})
    monkeypatch.setattr(loggers, "CLOSE_S", 0.05)
    monkeypatch.setattr(loggers, "PACKAGES", dict.fromkeys(cases, ("torch",)))
    config = replace(logging(*cases), run=replace(logging(*cases).run, preview_every=0))
    folder = trained(tmp_path / "fragile", config)
    assert_same(folder, trained(tmp_path / "plain", make(steps=10, log_every=2, checkpoint_every=6)))
    assert opened["tensorboard"].steps == [2] and opened["trackio"].steps == [2, 4, 6, 8, 10]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("run.log_to")]
    assert lines == [
        "run.log_to: wandb failed, and the training goes on without it: OSError: no network",
        "run.log_to: tensorboard failed, and the training goes on without it: ConnectionError: broken pipe",
        "run.log_to: trackio still sends after 0.05 s: going on without it",
    ]
