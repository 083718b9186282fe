"""The held-out loss in studies: it needs no samples, and data without a test split are told of before."""

import pytest
from lamabench.harness.progress import Quiet
from lamabench.harness.record import read_records
from lamabench.harness.stages import execute, missing, start_problem
from lamabench.kernels.errors import InputError
from lamabench.launch import notes
from lamabench.launch.plan import pieces, plan
from PIL import Image

HELD = {"data__split": "most", "evaluate__metrics": ["heldout"], "run__log_every": 2, "run__device": "cpu"}


def test_a_study_scores_every_moment_without_samples(study, tmp_path):
    runs = plan(study(stages=("train", "evaluate"), train__snapshots=[2], sample__at="all", **HELD))
    assert not list(notes.problems(runs, notes.contents(runs)))
    tasks = [piece.task for piece in pieces(runs)]
    assert [start_problem(task) for task in tasks] == [
        None, *(f"{tasks[0].folder} has no weights of step {step}" for step in (2, 4)),
    ]  # fmt: skip
    for task in tasks:
        execute(task, Quiet())
        assert start_problem(task) is None
    rows = [
        (row.kind, row.metric, row.checkpoint_step)
        for task in tasks[1:]
        for row in read_records(task.path / "record.jsonl")
    ]
    assert rows == [("score", "held-out loss", 2), ("score", "held-out loss", 4)]
    assert not list(tmp_path.glob("trainings/*/samples/*/shards"))
    assert not any(missing(task) for task in tasks)


def test_other_scores_of_the_same_request_need_samples(study):
    runs = plan(study(stages=("train", "evaluate"), **{**HELD, "evaluate__metrics": ["heldout", "fd"]}))
    training, samples = (piece.task for piece in pieces(runs))
    execute(training, Quiet())
    assert start_problem(samples) == f"{samples.folder} has no samples"


def folders(tmp_path, *names):
    for name in names:
        (tmp_path / name).mkdir()
        for i in range(6):
            Image.new("L", (8, 8), 40 * i + len(name)).save(tmp_path / name / f"{i}.png")
    data = {"data": "folder", "data__path": f"{tmp_path}/train", "data__num_classes": 0, "data__channels": 1}
    return {**data, "data__size": 8, **HELD, "data__split": "train"}


@pytest.mark.parametrize("score", [{}, {"evaluate__split": "test", "evaluate__metrics": ["fd"]}])
def test_a_test_split_that_is_missing_stops_a_study(study, tmp_path, score):
    runs = plan(study(stages=("train", "evaluate"), **{**folders(tmp_path, "train"), **score}))
    with pytest.raises(InputError, match=r"the test split of data 'folder' is test or val beside"):
        notes.check(runs, here=True)


def test_a_test_split_that_is_too_small_is_told_of(study, tmp_path):
    settings = {**folders(tmp_path, "train", "test"), "evaluate__split": "test", "evaluate__metrics": ["heldout", "fd"]}
    runs = plan(study(stages=("train", "evaluate"), **settings, evaluate__reference_count=7))
    known = notes.contents(runs)
    assert len(known) == 2
    assert "evaluate.reference_count 7 is more than the 6 images of the data" in "".join(notes.problems(runs, known))
