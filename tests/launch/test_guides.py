"""Studies whose samples are guided by another training: they outlive changes of that training, and prune keeps it."""

import shutil

import pytest
from lamabench.harness.progress import Progress
from lamabench.harness.stages import execute
from lamabench.kernels.errors import InputError
from lamabench.launch.plan import listing, plan, write
from lamabench.launch.prune import checkpoints, named_folders, unnamed_folders

DRAW = {"sample__count": 3, "sample__method": "ddim", "sample__steps": 2, "sample__guidance": 2.0}


def do(runs):
    for run in runs:
        for task in run.tasks:
            execute(task, Progress())


@pytest.fixture
def guide(study):
    """The folder of a training of 4 steps, which no .study.json names."""
    runs = plan(study(stages=["train"], model__depth=2))
    do(runs)
    return runs[0].folder


def test_samples_stay_done_when_their_guide_is_trained_further_or_loses_its_weights(study, guide):
    guided = study(stages=["train", "sample"], sample__guide=str(guide), sample__guide_at=4, **DRAW)
    do(plan(guided))
    do(plan(study(stages=["train"], model__depth=2, train__steps=6)))
    (run,) = plan(guided)
    assert run.state() == "done"
    shutil.rmtree(guide / "weights")
    shutil.rmtree(guide / "checkpoints")
    assert plan(guided)[0].state() == "done"
    with pytest.raises(InputError, match="step 4 was not kept; none is kept"):
        plan(guided, ["sample.steps=3"])


def test_a_study_names_the_step_of_a_guide(study, guide):
    with pytest.raises(InputError, match=r"a study needs sample.guide_at=STEP, .*\(steps that it has: 4\)"):
        plan(study(stages=["train", "sample"], sample__guide=str(guide), **DRAW))


def test_prune_keeps_guides(study, guide):
    guided = study(stages=["train", "sample"], sample__guide=str(guide), sample__guide_at=4, **DRAW)
    runs = plan(guided)
    root = runs[0].root
    assert guide in set(unnamed_folders(root, named_folders(root)))
    assert guide not in set(unnamed_folders(root, named_folders(root, {"now": listing(runs)})))
    write(guided, runs)
    assert guide not in set(unnamed_folders(root, named_folders(root)))
    alone = plan(study(stages=["train"], model__depth=2))
    assert list(checkpoints(alone)) == []
    do(runs)
    assert [one.folder for one in checkpoints(alone)] == [guide]
    assert all("guide" not in entry for entry in listing(alone))
