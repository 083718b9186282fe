"""A run of an earlier version: this one reads it, goes on with it, samples it and reports it.

`golden/run` was left by schema 2, layout 2, and is never made anew. It is older than `train.ema_rampup`, so the same
request says train.ema_rampup=false today:

    lamabench train model=dit_nano model.depth=1 model.hidden_size=8 model.num_heads=2 data=digits data.size=8 \
        train.steps=4 train.batch_size=4 train.precision=float32 train.lr=1e-3 train.ema_decay=0.5 \
        'train.snapshots=[2]' run.log_every=2 run.checkpoint_every=4 run.device=cpu
    lamabench sample RUN sample.count=8 sample.method=ddim sample.steps=3
    lamabench evaluate RUN sample.count=8 sample.method=ddim sample.steps=3 'evaluate.metrics=[prc]' \
        evaluate.reference_count=20
"""

import shutil
from pathlib import Path

import lamabench.harness as harness
import lamabench.reports as reports
import numpy as np
import pytest
import torch
from lamabench.harness.disk import read_lines
from lamabench.harness.record import read_records
from lamabench.harness.shards import images_of, open_samples
from lamabench.launch.cli import main

GOLDEN = Path(__file__).parent / "golden" / "run"
NAME = "dit_nano-digits-057d987afdd1"
TRAIN = """
model=dit_nano model.depth=1 model.hidden_size=8 model.num_heads=2 data=digits data.size=8 train.batch_size=4
train.precision=float32 train.lr=1e-3 train.ema_decay=0.5 train.ema_rampup=false train.snapshots=[2] run.log_every=2
run.device=cpu
""".split()
# By default, fewer images than classes are spread over all classes since, which is another set.
SAMPLE = ["sample.count=8", "sample.method=ddim", "sample.steps=3", "sample.labels=cyclic"]
SCORE = ["evaluate.metrics=[prc]", "evaluate.reference_count=20"]


@pytest.fixture
def root(tmp_path, monkeypatch):
    shutil.copytree(GOLDEN, tmp_path / "runs", symlinks=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def contents(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name in KEPT}


KEPT = ("record.jsonl", "metrics.jsonl", "samples.npz", "step-00000002.safetensors", "step-00000004.safetensors")


def test_it_is_read(root):
    run = harness.open_run(root / "train" / NAME)
    assert run.config.train.steps == 4 and run.moments == [2, 4]
    assert [row.kind for row in run.records] == ["train", "sample", "score", "score"]
    first, last = run.model(at=2), run.model()
    assert sum(v.numel() for v in last.parameters()) == sum(v.numel() for v in first.parameters()) > 1000
    assert run.sample([1, 2, 3], steps=3).shape == (3, 8, 8, 1)


def test_the_same_requests_are_answered(root, capsys):
    """Its keys are those of today: nothing is trained, drawn or scored again."""
    before = contents(root)
    assert main(["train", *TRAIN, "train.steps=4"]) == 0
    assert main(["sample", f"runs/train/{NAME}", *SAMPLE]) == 0
    assert main(["evaluate", f"runs/train/{NAME}", *SAMPLE, *SCORE]) == 0
    assert "precision-EffNetLite0-8" in capsys.readouterr().out
    assert contents(root) == before and len(list((root / "trainings").iterdir())) == 1


def test_a_request_of_today_has_a_ramp_and_names_it(root, capsys):
    words = [word for word in TRAIN if not word.startswith("train.ema_rampup")]
    assert main(["train", *words, "train.steps=4"]) == 0
    line = f"{NAME.replace('_nano', '')}, finished to step 4, differs only in train.ema_rampup (False there)"
    assert line in capsys.readouterr().err
    assert main(["train", *words, "train.steps=4"]) == 0
    assert line not in capsys.readouterr().err and len(list((root / "trainings").iterdir())) == 2


def test_it_goes_on(root):
    """As a training of today does from the start, but for the rounding of another machine."""
    assert main(["train", *TRAIN, "train.steps=8"]) == 0
    (folder,) = (root / "trainings").iterdir()
    rows = read_records(folder / "record.jsonl")
    assert [row.steps for row in rows] == [4, 8]  # type: ignore[attr-defined]
    assert [stretch["from_step"] for stretch in rows[-1].stretches][:1] == [0]  # type: ignore[attr-defined]
    assert main(["train", *TRAIN, "train.steps=8", "run.root=anew"]) == 0
    (anew,) = (root.parent / "anew" / "trainings").iterdir()
    assert anew.name == folder.name
    losses = [[line["loss"] for line in read_lines(one / "metrics.jsonl")] for one in (folder, anew)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    ours, theirs = (harness.open_run(one).model() for one in (folder, anew))
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)


def test_it_is_sampled_and_reported(root, capsys):
    assert main(["sample", f"runs/train/{NAME}", *SAMPLE, "sample.at=[2]"]) == 0
    folders = sorted((root / "trainings").glob("*/samples/*"))
    early, late = (open_samples(images_of(folder))[:] for folder in folders)
    assert early.shape == late.shape == (8, 8, 8, 1) and not np.array_equal(early, late)
    assert main(["report", "runs", "--out", "out"]) == 0
    assert "DiT-nano/2" in (root.parent / "out" / "summary.md").read_text()
    frame = reports.load("runs")
    assert len(frame) >= 2 and "precision-EffNetLite0-8" in set(frame["metric"])
