"""One training by single commands: other lengths of it, its moments, its weights, and data that changed."""

import re
import shlex
import shutil

import numpy as np
import pytest
import yaml
from lamabench.harness.run import read_run, read_study
from lamabench.harness.sampling import Sampler
from lamabench.harness.shards import open_samples
from lamabench.launch.cli import main
from lamabench.launch.commands import train
from lamabench.launch.compose import compose

QUICK = [
    "data=digits", "data.size=8", "train.batch_size=4", "train.precision=float32", "run.log_every=2",
    "run.checkpoint_every=2", "run.device=cpu", "sample.method=ddim", "sample.steps=3", "sample.count=20",
    "evaluate.metrics=[fd]", "evaluate.reference_count=50",
]  # fmt: skip
DIT = ["model=dit_nano", "model.depth=1", "model.hidden_size=16", "model.num_heads=2"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(capsys, *words):
    code = main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_other_lengths_of_a_training(capsys, tmp_path):
    """Fewer steps than reached: said of that moment where it is kept, else one line with the nearest that are."""

    def train(*words):
        code, out, err = run(capsys, "train", *DIT, *QUICK, *words)
        return code, out + err.replace(str(tmp_path), "")

    assert train("train.steps=4", "train.snapshots=[1]")[0] == train("train.steps=8")[0] == 0
    (folder,) = (tmp_path / "runs" / "train").glob("dit_nano-digits-*")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.json*")}
    for words, message in (
        (["train.steps=5"], "step 5 was not kept; the nearest kept: 4 and 6"),
        (["train.steps=8", "train.snapshots=[3]"], "step 3 was not kept; the nearest kept: 1 and 4"),
    ):
        code, text = train(*words)
        assert code == 2 and message in text and text.count("\n") == 1
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.json*")}
    assert ": 4 steps, loss" in train("train.steps=4")[1] and ": 8 steps, loss" in train("train.steps=8")[1]
    assert ": 1 step, loss" in train("train.steps=1")[1]
    code, text = train("train.steps=10", "train.snapshots=[3,11]")
    assert code == 0 and text.count("train.snapshots 11 will not be kept, beyond the end, train.steps 10\n") == 1
    assert code == 0 and "step 3 was not kept" in text and ": 10 steps, loss" in text
    assert read_run(folder).last("train").moments == [1, 4, 8, 10]
    for file in folder.glob("checkpoints/*"):
        file.unlink()
    code, text = train("train.steps=12")
    assert code == 2 and "trained to step 10, and no full checkpoint is left to go on from" in text


def test_moments_and_weights_that_a_training_has(capsys, tmp_path):
    assert run(capsys, "train", *DIT, *QUICK, "train.steps=6", "train.snapshots=[1]")[0] == 0
    (folder,) = (tmp_path / "runs" / "train").glob("dit_nano-digits-*")

    def drawn(*words):
        before = {*folder.glob("samples/*")}
        code, _, err = run(capsys, "sample", str(folder), "sample.count=2", *words)
        rows = [read_run(one).last("sample") for one in {*folder.glob("samples/*")} - before]
        return code, err, sorted((row.checkpoint_step, row.weights) for row in rows)

    assert drawn("sample.at=all")[2] == [(1, "ema"), (6, "ema")]
    assert drawn("sample.at=all", "sample.weights=live")[2] == [(4, "live"), (6, "live")]
    for words, message in (
        (["sample.at=[1]", "sample.weights=live"], "step 1 was not kept; the nearest kept: 4 (live weights)"),
        (["sample.at=[4,5]"], "step 5 was not kept; the nearest kept: 4 and 6 (ema weights)"),
        (["sample.at=[9]"], "sample.at 9 is beyond the end of the training"),
    ):
        code, err, rows = drawn(*words)
        assert code == 2 and message in err and err.count("\n") == 1 and rows == []
    listed = read_study(folder.parent)["runs"][0]["samples"]
    assert len(listed) == 4, "what could not be drawn is not listed"
    for file in folder.glob("checkpoints/*"):
        file.unlink()
    assert "has no live weights any more" in drawn("sample.at=all", "sample.weights=live")[1]
    code, out, _ = run(capsys, "sample", str(folder), "sample.count=2", "backend.attention=reference")
    assert code == 0 and "backend" not in out, "the next command takes no backend"


def test_curves_of_a_training_that_exists(capsys, tmp_path):
    """They have all moments that it kept, also of an earlier request. Each line has the count of its set."""
    for words in (["train.steps=4", "train.snapshots=[1,2]"], ["train.steps=6", "train.snapshots=[5]"]):
        assert run(capsys, "train", *DIT, *QUICK, *words)[0] == 0
    (folder,) = (tmp_path / "runs" / "train").glob("dit_nano-digits-*")
    asked = [str(folder), "sample.count=4", "sample.curve_count=2"]
    for _ in range(2):
        code, out, _ = run(capsys, "sample", *asked)
        sets = re.findall(r": (\d) images at step (\d)", out)
        assert code == 0 and sets == [*(("2", step) for step in "12456"), ("4", "6")]
    code, _, err = run(capsys, "sample", *asked, "--to", "x.npz")
    words = "not 2 images at step 1 and 2 images at step 2: give sample.at=[N] and sample.curve_count=null"
    assert code == 2 and f"--to takes one set of samples, {words}" in err
    assert run(capsys, "sample", *asked, "sample.curve_count=null", "--to", "x.npz")[0] == 0
    guide = [f"sample.guide={folder}", "sample.guide_at=1", "sample.guidance=2"]
    code, _, err = run(capsys, "sample", *asked, *guide)
    assert code == 2 and "guide to nowhere: give no sample.curve_count or a smaller model" in err


def test_data_that_changed_under_one_name(capsys, tmp_path):
    """One line, before anything is written, by every command that reads them."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (60, 8, 8, 1), dtype=np.uint8), np.arange(60) % 10
    np.savez(tmp_path / "d.npz", images=images, labels=labels)
    words = [*DIT, *QUICK, "data=npz", "data.path=d.npz", "data.channels=1", "data.num_classes=10"]
    assert run(capsys, "train", *words, "train.steps=2")[0] == 0
    (folder,) = (tmp_path / "runs" / "train").glob("dit_nano-npz-*")
    assert run(capsys, "sample", str(folder))[0] == run(capsys, "evaluate", str(folder))[0] == 0
    (score,) = [row for one in folder.glob("samples/*") for row in read_run(one).records if row.kind == "score"]
    assert score.data_fingerprint == read_run(folder).last("train").data_fingerprint
    images[5, 1, 2, 0] ^= 1
    np.savez(tmp_path / "d.npz", images=images, labels=labels)
    path = tmp_path / "s.yaml"
    settings = {key: yaml.safe_load(value) for key, value in (word.split("=", 1) for word in words)}
    data = {"question": "?", "base": settings | {"train.steps": 4}, "variants": {"one": {}}, "stages": ["train"]}
    path.write_text(yaml.safe_dump(data))

    def written():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}

    before = written()
    for command in (
        ["train", *words, "train.steps=4"],
        ["evaluate", str(folder), "evaluate.metrics=[prc]"],
        ["sweep", "run", str(path)],
    ):
        code, _, err = run(capsys, *command)
        assert code == 2 and "was trained on other data" in err and "another data.name" in err
        assert err.count("\n") == 1 and written() == before
    assert run(capsys, "evaluate", str(folder))[0] == 0  # what is scored needs no data
    assert run(capsys, "train", *words, "train.steps=4", "data.name=new")[0] == 0


def test_a_root_that_cannot_be_written_is_one_line(capsys, tmp_path):
    (tmp_path / "runs").write_text("a file in its place")
    code, _, err = run(capsys, "train", *DIT, *QUICK, "train.steps=2")
    assert code == 2 and "cannot write below runs: " in err and err.count("\n") == 1


def test_commands_below_an_odd_folder_can_be_pasted(capsys, tmp_path, monkeypatch):
    """Paths with `=`, `,`, `(`, quotes, a space and letters that are not ASCII, typed, with `~`, and as printed."""
    monkeypatch.setenv("HOME", str(tmp_path))
    odd = tmp_path / "a=b, (ü) [it's]"
    odd.mkdir()
    code, out, _ = run(capsys, "train", *DIT, *QUICK, "train.steps=2", f"run.root={odd}/r", "data.name=x/${seed}, y")
    assert code == 0
    (folder,) = (odd / "r" / "train").glob("dit_nano-digits-*")
    assert shlex.split(next_command(out))[:3] == ["lamabench", "sample", str(folder)]
    short = f"~/{odd.name}/r/train/{folder.name}"
    few = ["sample.count=2", "sample.method=ddim", "sample.steps=2"]
    before = sorted(odd.rglob("*"))
    for command in (["sample", short, "run.device=tpu"], ["sample", short, "run.root=/x/${x}/r"]):
        code, out, err = run(capsys, *command)
        assert code == 2 and err.count("\n") == 1 and not out
    code, _, err = run(capsys, "evaluate", short, *few)
    assert code == 2 and sorted(odd.rglob("*")) == before
    draw = shlex.split(err.split("draw them first: ")[1])
    assert draw == ["lamabench", "sample", f"{odd}/r/train/{folder.name}", *few]
    code, out, _ = run(capsys, *draw[1:], "run.root=~/other=root")
    assert code == 0 and list((tmp_path / "other=root" / "trainings").glob("*/samples/*/shards/*/labels.npy"))
    words = shlex.split(next_command(out))
    assert words[1:] == ["evaluate", draw[2], *few, "run.root=~/other=root"]
    code, out, _ = run(capsys, *words[1:], "evaluate.metrics=[fd]", "evaluate.reference_count=20")
    assert code == 0 and "fd" in out.lower()
    code, out, _ = run(capsys, "report", "~/other=root", "--out", "~/o ut")
    assert code == 0 and (tmp_path / "o ut").is_dir() and not (tmp_path / "~").exists()


def next_command(out):
    (line,) = [line for line in out.splitlines() if line.startswith("next: ")]
    return line.removeprefix("next: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "demo", "--stages", ""], "unknown stage of demo ''"),
        (["run", "demo", "--only", ""], "no variant is called ''"),
        (["prune", "demo", "--only", ""], "--only is for plan"),
        (["plan", "demo", "cluster="], "unknown cluster ''"),
        (["plan", "demo", "run.root=a\udcff"], "is not text in UTF-8"),
        (["plan", ""], "unknown study ''"),
    ],
)
def test_empty_words_are_not_taken_as_not_given(words, message, capsys, tmp_path):
    code, out, err = run(capsys, "sweep", *words)
    assert code == 2 and not out and message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_samples_elsewhere_are_scored_below_our_root(capsys, tmp_path):
    """As of a colleague whose folder cannot be written. Metrics that cannot be computed leave the others."""
    assert run(capsys, "train", *DIT, *QUICK, "train.steps=2")[0] == 0
    (training,) = (tmp_path / "runs" / "trainings").iterdir()
    words = ["evaluate", str(training), "run.root=mine"]
    code, _, err = run(capsys, *words)
    assert code == 2 and "has no samples to score" in err and not (tmp_path / "mine").exists()
    assert run(capsys, "sample", str(training))[0] == 0
    before = {path: path.stat().st_mtime_ns for path in training.rglob("*")}
    for _ in range(2):
        code, out, err = run(capsys, *words, "evaluate.metrics=[kid,fd]")
        assert code == 1 and "FD-EffNetLite0-20" in out
        assert err.endswith("lamabench evaluate: kid needs at least 100 samples, 20 given\n")
    assert before == {path: path.stat().st_mtime_ns for path in training.rglob("*")}
    (samples,) = (tmp_path / "mine" / "trainings" / training.name / "samples").iterdir()
    states = [(row.kind, row.state) for row in read_run(samples).records]
    assert states == [("sample", "done"), ("score", "done"), ("score", "failed"), ("score", "failed")]
    code, out, err = run(capsys, *words, "evaluate.metrics=[kid]")
    assert code == 2 and "kid needs at least 100 samples, 20 given" in err and not out


def test_samples_that_are_being_drawn(capsys, tmp_path, monkeypatch):
    assert run(capsys, "train", *DIT, *QUICK, "train.steps=2")[0] == 0
    (training,) = (tmp_path / "runs" / "trainings").iterdir()
    draw = Sampler.draw
    messages = []

    def looked(self, indices):  # as another process would
        messages.append(run(capsys, "evaluate", str(training))[::2])
        return draw(self, indices)

    monkeypatch.setattr(Sampler, "draw", looked)
    assert run(capsys, "sample", str(training))[0] == 0
    ((code, err),) = messages
    assert code == 2 and f"its samples are being drawn; lamabench sample {training} helps" in err


def test_sample_leaves_nothing_of_weights_that_it_cannot_read(capsys, tmp_path):
    assert run(capsys, "train", *DIT, *QUICK, "train.steps=2")[0] == 0
    (training,) = (tmp_path / "runs" / "trainings").iterdir()
    (file,) = training.glob("weights/*")
    whole = file.read_bytes()

    def written():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}

    before = written()
    for device, words in (("tpu", "tpu"), ("cuda:9", "cuda:9")):
        code, _, err = run(capsys, "sample", str(training), f"run.device={device}")
        assert code == 2 and words in err and err.count("\n") == 1 and written() == before
    for content in (b"", whole[:5], whole[: len(whole) // 2], b"\xff" * 100):
        file.write_bytes(content)
        before = written()
        code, _, err = run(capsys, "sample", str(training), "run.device=cpu")
        assert code == 2 and "is truncated or damaged" in err and err.count("\n") == 1 and written() == before


def test_samples_whose_images_are_gone_are_drawn_again(capsys, tmp_path):
    """The same images, and the record says why there are several drawings."""
    assert run(capsys, "train", *DIT, *QUICK, "train.steps=2")[0] == 0
    (folder,) = (tmp_path / "runs" / "train").glob("dit_nano-digits-*")
    words = ["sample", str(folder), "sample.count=5", "sample.batch_size=2", "sample.method=ddim", "sample.steps=2"]
    assert run(capsys, *words)[0] == 0
    (shards,) = folder.glob("samples/*/shards/*")
    (_, second, _), before = sorted(shards.glob("0*.npy")), open_samples(shards)[:]
    damages = [lambda: shutil.rmtree(shards), second.unlink, lambda: second.write_bytes(second.read_bytes()[:100])]
    for damage in damages:
        damage()
        code, out, err = run(capsys, "evaluate", *words[1:], "evaluate.metrics=[fd]")
        assert (code, out) == (2, "") and err.count("\n") == 1
        assert f"{shards.name} was deleted or damaged; draw the samples again: lamabench sample" in err
        assert run(capsys, *words)[0] == 0
        assert (open_samples(shards)[:] == before).all()
    states = [(row.state, row.error) for row in read_run(shards.parents[1]).records]
    assert states == [("done", None), *[("failed", "the images were deleted or damaged"), ("done", None)] * 3]
    shutil.rmtree(shards)
    (folder / "weights" / "step-00000002.safetensors").unlink()
    (folder / "checkpoints" / "step-00000002.safetensors").unlink()
    assert run(capsys, *words)[0] == 2  # nothing is left to draw from
    assert len(read_run(shards.parents[1]).records) == len(states)


def test_a_gpu_that_waited_for_data_is_told(monkeypatch):
    words = ["model=dit_nano", "data=digits"]
    plain, gpu = (compose([*words, *more])[0] for more in ((), ("train.noise=gpu",)))
    assert train.late({"waiting_share": 0.5}, plain) == ""  # on a CPU
    monkeypatch.setattr(train, "pick_device", lambda device: "cuda")
    assert train.late({"waiting_share": None}, plain) == train.late({"waiting_share": 0.05}, plain) == ""
    text = "the GPU waited for data 12% of the time: run.workers=N sets how many processes load them"
    assert train.late({"waiting_share": 0.12}, gpu) == text
    assert train.late({"waiting_share": 0.12}, plain).startswith(f"{text}; train.noise=gpu")
