"""A training by each objective from the command line: its head, its default sampler, its records in words."""

import json
from pathlib import Path

import pytest
from lamabench.harness.record import read_records
from lamabench.harness.run import open_run
from lamabench.launch.cli import main
from lamabench.launch.compose import compose
from lamabench.models.registry import preset

SMALL = """
model=dit_nano model.depth=1 model.hidden_size=16 model.num_heads=2 data=digits data.size=8 data.split=most
train.batch_size=4 train.precision=float32 train.compile=eager run.device=cpu run.log_every=2 run.heldout_every=4
run.preview_every=4 evaluate.heldout_count=8 sample.count=12 sample.steps=3 sample.batch_size=12
""".split()
DIGITS = ["model=dit_nano", "data=digits"]
ARMS = [
    ("v", [], "v-prediction, 3 ancestral steps"),
    ("flow", ["objective.times=logit_normal"], "flow matching, 3 euler steps"),
]


@pytest.mark.parametrize(("kind", "more", "text"), ARMS)
def test_train_sample_and_score(tmp_path: Path, capsys, kind, more, text):
    words = [*SMALL, *more, f"objective.kind={kind}", f"run.root={tmp_path}"]
    assert main(["train", *words, "train.steps=4"]) == 0
    (folder,) = tmp_path.glob("trainings/*")
    assert open_run(folder).config.model.out_channels == 1
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {"loss", "loss_q1", "loss_q4", "grad_norm"} <= lines[-1].keys() and "vb" not in lines[-1]
    assert lines[-1]["heldout_loss"] > 0 and lines[-1]["heldout_loss_8"] > 0
    assert (folder / "previews" / "step-00000004.png").is_file()
    assert main(["sample", str(folder)]) == 0
    assert main(["evaluate", str(folder), "evaluate.metrics=[prc,heldout]", "evaluate.reference_count=12"]) == 0
    out = capsys.readouterr().out
    assert text in out
    rows = [row.flat() for path in folder.glob("samples/*/record.jsonl") for row in read_records(path)]
    scores = {row["metric"]: row for row in rows if row["kind"] == "score"}
    assert {row["method"] for row in rows if row["kind"] == "sample"} == {text.split()[-2]}
    heldout = scores["held-out loss"]
    assert heldout["value"] == pytest.approx(lines[-1]["heldout_loss"], rel=1e-5)
    schedule = {} if kind == "flow" else {"schedule": "linear"}  # flow matching has none
    assert heldout["evaluation"]["objective"] == {"kind": kind} | schedule
    times = [float(t) for t in heldout["by_timestep"]]
    assert times[0] == (0.0625 if kind == "flow" else 62) and len(times) == 8


def test_the_head_and_the_sampler_follow_from_the_objective():
    for kind, channels, method in (("ddpm", None, "ancestral"), ("v", 1, "ancestral"), ("flow", 1, "euler")):
        config, _ = compose([*DIGITS, f"objective.kind={kind}"])
        assert (config.model.out_channels, config.sample.method) == (channels, method)
    assert compose([*DIGITS, "objective.kind=flow", "sample.method=heun"])[0].sample.method == "heun"


def test_cost_has_the_head_of_the_objective(capsys):
    """DiT's head is a Linear from the width to p² · channels values a token: of 1 channel instead of 2."""

    def row(*words: str):
        assert main(["cost", "dit_nano", *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)[0]

    ddpm, v, flow = (row(f"objective.kind={kind}") for kind in ("ddpm", "v", "flow"))
    config = preset("dit_nano").config
    values, tokens = config.patch_size**2 * config.in_channels, (config.input_size // config.patch_size) ** 2
    assert v == flow and ddpm == row()
    assert ddpm["params"] - v["params"] == values * (config.hidden_size + 1)
    assert ddpm["macs"] - v["macs"] == tokens * values * config.hidden_size
