"""The steps of a training of several processes are repeated in one."""

import pytest
from lamabench.harness.disk import read_lines
from lamabench.harness.keys import config_of
from lamabench.harness.run import read_info, read_run
from lamabench.harness.training.failures import Failures
from lamabench.harness.training.folder import Position
from lamabench.harness.training.replay import replay
from processes import training

STEPS = 12


@pytest.mark.parametrize("passes", [[], ["run.micro_batch=2"]])
def test_dropout_is_that_of_each_process(passes, start, tmp_path):
    """The losses of steps depend on the masks, and are those of the training."""
    words = ["model.dropout=0.5", "train.lr=1e-2", f"train.steps={STEPS}", "run.log_every=1", *passes]
    assert start(tmp_path, *words, count=2).codes == [0, 0]
    folder = training(tmp_path)
    config, record = config_of(folder, read_info(folder)), read_run(folder).last("train")
    for path in (folder / "checkpoints").iterdir():
        path.unlink()  # from the initial weights
    watch = Failures(folder, config, record.data_fingerprint, record.stretches, [], print)
    watch.diverged(Position(step=STEPS), "asked for")
    (snapshot,) = folder.glob("failures/*")
    losses = [line["loss"] for line in read_lines(folder / "metrics.jsonl")]
    assert [row["loss"] for row in replay(snapshot, "cpu")] == pytest.approx(losses, rel=1e-5)
