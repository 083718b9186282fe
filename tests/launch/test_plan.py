"""Plans: the tasks that the runs of a study ask for, what they share, and their states according to their folders."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from lamabench.ablations.study import Study, load, names
from lamabench.harness.keys import config_from_dict, training_key
from lamabench.harness.run import locked, read_study
from lamabench.kernels.errors import InputError
from lamabench.launch import gpu_hours, prune
from lamabench.launch.plan import (
    keys_of,
    left_of,
    listing,
    look,
    missing_metrics,
    pieces,
    plan,
    rows,
    select_stages,
    select_variants,
    write,
)
from latents_of_a_study import NEEDED


def to_do(study, *overrides):
    """The missing stages, by kind of folder."""
    stages = {}
    for piece in pieces(plan(study, overrides)):
        if missing := piece.missing():
            stages.setdefault(piece.task.kind, []).append(missing)
    return stages


def finish_all(study, finish, *overrides):
    for piece in pieces(plan(study, overrides)):
        finish(piece.task)


def test_a_plan_lists_the_tasks_of_each_run(study, tmp_path):
    (run,) = plan(study())
    assert [(task.kind, task.stages) for task in run.tasks] == [
        ("model", ("cost", "bench")),
        ("training", ("train",)),
        ("samples", ("sample", "evaluate")),
    ]
    assert run.about == {"study": "s", "name": "dit_nano", "variant": {"model": "dit_nano"}, "seed": 0,
                         "model": "dit_nano", "family": "dit", "title": "DiT-nano/2"}  # fmt: skip
    assert run.id == training_key(run.config) and run.folder == tmp_path / "trainings" / f"dit-digits-{run.id}"
    assert (run.state(), run.missing()) == ("planned", ["cost", "bench", "train", "sample", "evaluate"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("edit", "again"),
    [
        ("sample.count=6", {"samples": [["sample", "evaluate"]]}),
        ("evaluate.reference_count=6", {"samples": [["evaluate"]]}),
        ("bench.batch_size=3", {"model": [["bench"]]}),
        ("bench.repeats=3", {}),
        ("run.micro_batch=2", {}),
        ("sample.batch_size=3", {}),
    ],
)
def test_an_edit_of_sample_evaluate_or_bench_trains_nothing(study, finish, edit, again):
    finish_all(study(), finish)
    assert to_do(study()) == {} and plan(study())[0].state() == "done"
    assert to_do(study(), edit) == again


def test_a_metric_added_plans_only_that_metric(study, finish):
    finish_all(study(), finish)
    more = study(evaluate__metrics=["fd", "kid"])
    assert to_do(more) == {"samples": [["evaluate"]]}
    (samples,) = [piece.task for piece in pieces(plan(more)) if piece.task.kind == "samples"]
    assert missing_metrics(samples) == ["kid"]
    assert plan(more)[0].state() == "planned"


def test_nine_studies_share_one_training():
    shared = [name for name in names() if name not in ("crossover", "demo", "resolution")]
    runs = [run for name in shared for run in plan(load(name), NEEDED.get(name, ()))]
    plain = plan(load("scan"))[0]
    assert plain.name == "continuous-s0"
    studies = {run.about["study"] for run in runs if run.training and run.training.key == plain.training.key}
    assert studies == {
        "block_mix",
        "d_state",
        "guidance",
        "lr",
        "objective",
        "rivals",
        "scale",
        "scan",
        "unet",
        "window",
    }
    assert len({run.folder for run in runs if run.id == plain.id}) == 1


def test_variants_that_do_not_affect_training_share_it(study, finish):
    axes = {"sample.guidance": [1.0, 2.0], "train.lr": [1e-4, 2e-4]}
    runs = plan(study(axes, stages=["cost", "train", "sample"]))
    every = pieces(runs)
    assert [piece.task.kind for piece in every] == ["model", "training", "training"] + ["samples"] * 4
    assert [piece.run for piece in every[:3]] == ["1.0-0.0001", "1.0-0.0001", "1.0-0.0002"]
    assert not any(piece.ready() for piece in every[3:]) and all(piece.ready() for piece in every[:3])
    finish(every[1].task)
    assert [piece.ready() for piece in every[3:]] == [True, False, True, False]
    assert [run.missing() for run in runs][:2] == [["cost", "sample"], ["cost", "train", "sample"]]
    hours, others = gpu_hours.of_runs(runs, [])
    assert [isinstance(one, str) for one in hours] == [True, True, False, False]
    assert others == ["", "", "1.0-0.0001", "1.0-0.0002"]


def test_more_steps_are_the_same_training_with_a_moment_each(study, finish):
    runs = plan(study({"train.steps": [2, 4, 8]}, stages=["train", "sample"]))
    assert len({run.id for run in runs}) == 1 and [run.training.moments for run in runs] == [(2,), (4,), (8,)]
    (training, *samples) = pieces(runs)
    assert training.task.moments == (2, 4, 8) and training.task.config["train"]["steps"] == 8
    assert [piece.task.step for piece in samples] == [2, 4, 8]
    finish(training.task)
    assert [run.missing() for run in runs] == [["sample"]] * 3 and all(piece.ready() for piece in samples)


def test_an_extension_plans_the_training_and_the_samples_of_its_end(study, finish):
    finish_all(study(stages=["train"]), finish)
    longer = study(stages=["train"], train__steps=8)
    assert to_do(longer) == {"training": [["train"]]} and plan(longer)[0].state() == "planned"
    finish_all(study(), finish)
    assert to_do(study(), "train.steps=8") == {"training": [["train"]], "samples": [["sample", "evaluate"]]}
    assert to_do(study()) == {}


def test_a_longer_training_that_failed_leaves_the_shorter_one_done(study, finish, fail):
    finish_all(study(stages=["train"]), finish)
    (longer,) = plan(study(stages=["train"]), ["train.steps=8"])
    fail(longer.training, "train", "diverged")
    assert longer.state() == "diverged" and longer.looks()[0].error == "why"
    assert plan(study(stages=["train"]))[0].state() == "done"


def test_fewer_steps_than_reached_need_a_moment_that_was_kept(study, finish):
    finish_all(study(train__snapshots=[2]), finish)
    assert plan(study(train__steps=2, stages=["train"]))[0].problems() == []
    assert to_do(study(train__steps=2, stages=["train", "sample"])) == {"samples": [["sample"]]}
    (run,) = plan(study(train__steps=3, stages=["train", "sample"]))
    assert run.problems() == ["step 3 was not kept; the nearest kept: 2 and 4"]
    assert plan(study(train__steps=3, stages=["train"]))[0].problems() == run.problems()
    # A job is not asked for the impossible, so that it does the rest.
    (training, *_) = pieces(plan(study({"train.steps": [3, 8]}, stages=["train", "sample"])))
    assert training.task.moments == (8,)


def test_scores_outlive_pruned_weights(study, finish):
    finish_all(study(), finish)
    (run,) = plan(study())
    for file in run.folder.glob("*/step-*"):
        file.unlink()
    assert to_do(study()) == {} and run.problems() == []
    assert plan(study(), ["sample.steps=5"])[0].problems() == ["step 4 was not kept; none is kept"]


def test_states_come_from_folders(study, finish, fail):
    (run,) = plan(study())
    model, training, samples = run.tasks
    fail(training, "train", "oom")
    assert (run.state(), rows([run])[0]["error"]) == ("oom", "why")
    with locked(training.path):
        assert run.state() == "running"
    finish(training)
    assert run.state() == "planned"
    fail(model, "bench")
    assert run.state() == "failed" and look(model).missing == ("cost", "bench")
    finish(model)
    assert look(model).state == "done"
    finish(samples, "sample")
    fail(samples, "evaluate")
    assert (look(samples).state, look(samples).missing) == ("failed", ("evaluate",))
    # A metric of another study failed in the same folder, and a benchmark of another study in the folder of the model.
    other = replace(samples, metrics=("kid",))
    assert look(other).state == "planned"
    finish(samples, "evaluate")
    fail(other, "evaluate")
    assert run.state() == "done" and look(other).state == "failed"
    bench = replace(model, plans=({**model.plans[0], "bench": {**model.plans[0]["bench"], "batch_size": [9]}},))
    fail(bench, "bench")
    assert (look(model).state, look(bench).state) == ("done", "failed")


def test_the_keys_of_what_is_left_are_those_of_the_stages_to_do(study, finish):
    model, _, samples = (piece.task for piece in pieces(plan(study())))
    assert left_of(model, ["cost", "bench"]) == keys_of(model) and len(keys_of(model)) == 2
    assert left_of(model, ["cost"]) == keys_of(model) - left_of(model, ["bench"]) == {model.key}
    assert left_of(samples, ["evaluate"]) == keys_of(samples) - {samples.key}
    finish(model)
    assert left_of(model, ["bench"]) == set()


def test_a_training_that_began_and_did_not_end_is_stopped(study, finish):
    (run,) = plan(study(stages=["train"]))
    finish(run.training, "none")
    assert run.state() == "planned"
    (run.folder / "metrics.jsonl").write_text('{"step": 1}\n')
    assert run.state() == "stopped"


def test_a_listing_says_how_far_and_with_what(study, finish):
    """Reports read the length that a study asks for from it: a shared training may have gone further."""
    finish_all(study(train__steps=8, stages=["train"]), finish)
    (entry,) = listing(plan(study(train__steps=6, backend__attention="reference")))
    assert (entry["steps"], entry["backend"]) == (6, {"attention": "reference"})
    assert listing(plan(study(stages=["cost"])))[0]["steps"] is None


def test_a_run_is_not_called_as_what_lies_beside_its_link(study):
    with pytest.raises(InputError, match="a run cannot be called 'report'"):
        plan(replace(study(), axes={}, variants={"report": {}}))


def test_training_that_cannot_go_on_is_a_problem(study, finish):
    finish_all(study(stages=["train"]), finish)
    (longer,) = plan(study(stages=["train"], train__steps=8))
    assert longer.problems() == []
    for file in longer.folder.glob("checkpoints/*"):
        file.unlink()
    assert longer.problems() == ["trained to step 4, and no full checkpoint is left to go on from"]
    assert plan(study(stages=["train"]))[0].problems() == []


def test_checkpoints_that_another_study_needs_stay(study, finish):
    finish_all(study(stages=["train", "sample"]), finish)
    runs = plan(study(stages=["train", "sample"]))
    (one,) = prune.checkpoints(runs)
    assert [file.parent.name for file in one.files] == ["checkpoints"]
    for more in ({"train__steps": 8}, {"sample__weights": "live"}):
        other = replace(study(stages=["train", "sample"], **more), name="other")
        write(other, plan(other))
        assert list(prune.checkpoints(runs)) == []
        finish_all(other, finish)
        runs = plan(study(stages=["train", "sample"], **more))
        (one,) = prune.checkpoints(runs)
        assert one.folder == runs[0].folder


def test_checkpoints_of_a_study_that_draws_no_samples_are_freed(study, finish):
    """Weights that only a full checkpoint has are needed until the held-out loss is there."""
    held = {"data__split": "most", "evaluate__metrics": ["heldout"], "sample__weights": "live"}
    mine = study(stages=["train", "evaluate"], **held)
    runs = plan(mine)
    write(mine, runs)
    training, score = pieces(runs)
    finish(training.task)
    assert list(prune.checkpoints(plan(study(stages=["train"], data__split="most")))) == []
    finish(score.task)
    (one,) = prune.checkpoints(runs)
    assert one.folder == runs[0].folder
    more = replace(study(stages=["train", "sample"], **held), name="other")  # draws what was only scored
    write(more, plan(more))
    assert list(prune.checkpoints(runs)) == []


def test_two_runs_that_ask_for_the_same_are_refused(study):
    same = Study("s", "?", variants={"a": {"model": "dit_nano"}, "b": {"model": "dit_nano", "sample.batch_size": 7}})
    with pytest.raises(InputError, match="b and a are the same run"):
        plan(same)
    scored = {name: {"model": "dit_nano", "evaluate.features": name} for name in ("inception_v3", "dinov2_vitl14")}
    with pytest.raises(InputError, match="dinov2_vitl14 and inception_v3 are the same run; they differ in how samples"):
        plan(Study("s", "?", variants=scored, stages=["train", "sample", "evaluate"]))
    with pytest.raises(InputError, match="are the same run"):  # the cost of a model is the same for all seeds
        plan(study(stages=["cost"], seeds=(0, 1)))
    assert len(plan(study(stages=["cost", "train"], seeds=(0, 1)))) == 2
    roots = {"a": {"run.root": "a", "model": "dit_nano"}, "b": {"run.root": "b", "model": "unet_nano"}}
    with pytest.raises(InputError, match=r"all runs must have the same run\.root, not a, b"):
        plan(Study("s", "?", variants=roots))


def test_another_study_file_of_that_name_is_refused_without_writing(study, tmp_path):
    mine = replace(study(), file="/here/s.yaml")
    runs = plan(mine)
    write(mine, runs)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"belongs to the study /here/s\.yaml, not to /there/s\.yaml"):
        plan(replace(mine, file="/there/s.yaml"))
    assert sorted(tmp_path.rglob("*")) == before and plan(mine)
    assert [path.name for path in (tmp_path / "s").iterdir() if path.is_symlink()] == ["dit_nano"]
    assert (tmp_path / "s" / "dit_nano").resolve() == runs[0].folder.resolve()
    with pytest.raises(InputError, match="a study cannot be called 'models'"):
        plan(replace(mine, name="models"))


def test_the_listing_of_a_study_says_what_it_is_about(study, tmp_path):
    mine = study()
    write(mine, plan(mine))
    about = read_study(tmp_path / "s")["about"]
    assert about == {"question": mine.question, "claim": "", "answer": "", "budget": "", "axes": mine.axes}
    assert "verdicts" not in mine.about()
    whole = load("block_mix")
    order = {"better": {"variant": "ssm+window"}, "worse": {"variant": "window+ssm"}}
    assert whole.about()["verdicts"]["The scan is better first than second"] == [order]
    judged = replace(
        mine, axes={"model": ["dit_nano", "dit_modern_nano"]}, verdicts={"It wins": [["dit_nano", "dit_modern_nano"]]}
    )
    write(judged, plan(judged))
    pair = {"better": {"model": "dit_nano"}, "worse": {"model": "dit_modern_nano"}}
    assert read_study(tmp_path / "s")["about"]["verdicts"] == {"It wins": [pair]}
    assert whole.about()["axes"] == {"variant": list(whole.variants)} and whole.about()["claim"] == whole.claim


def test_links_of_former_variants_are_deleted(study, tmp_path):
    for rates in ([1e-4, 2e-4], [1e-4]):
        mine = study({"train.lr": rates})
        write(mine, plan(mine))
    assert [path.name for path in (tmp_path / "s").iterdir() if path.is_symlink()] == ["0.0001"]


def test_variants_are_selected_by_pattern(study):
    runs = plan(study({"sample.guidance": [1.0, 2.0], "train.lr": [1e-4, 2e-4]}, seeds=(0, 1)))
    assert [run.name for run in select_variants(runs, "2.0-*1,*2-s1")] == [
        "1.0-0.0002-s1", "2.0-0.0001-s0", "2.0-0.0001-s1", "2.0-0.0002-s1",
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"no variant is called 'x\*'; variants: 1\.0-0\.0001, 1\.0-0\.0002, 2\.0"):
        select_variants(runs, "1*,x*")


def test_stages_are_selected(study):
    """Without stages that need weights, no run waits for a training."""
    mine = study({"sample.guidance": [1.0, 2.0]})
    runs = plan(mine)
    (model,) = pieces(select_stages(runs, ["cost"], mine))
    assert model.task.stages == ("cost",) and model.task.plans == ()
    model, samples, other = pieces(select_stages(runs, ["sample", "cost"], mine))
    assert [piece.task.stages for piece in (model, samples, other)] == [("cost",), ("sample",), ("sample",)]
    assert samples.task.metrics == () and not samples.ready()
    with pytest.raises(InputError, match=r"unknown stage of s .smaple. \(did you mean .sample.\?\)"):
        select_stages(runs, ["smaple"], mine)


def test_a_damaged_file_is_a_state_and_not_an_error(study, finish, tmp_path):
    finish_all(study(), finish)
    (run,) = plan(study())
    for folder in (task.path for task in run.tasks):
        for name in ("config.json", "record.jsonl"):
            whole = (folder / name).read_bytes()
            for content in (b"", b"junk\n", b"[]\n", b"null\n", b"{}\n", b"\xff\xfe\n"):
                if (name, content) == ("record.jsonl", b""):
                    continue  # nothing was done yet
                (folder / name).write_bytes(content)
                assert run.state() == "unreadable" and str(folder / name) in run.unreadable(), content
                (row,) = rows([run])
                assert (row["state"], row["error"]) == ("unreadable", run.unreadable())
            (folder / name).write_bytes(whole)
    assert run.state() == "done" and run.unreadable() == ""


def test_tasks_are_plain_data_that_a_manifest_can_hold(study):
    from lamabench.harness.tasks import Task
    from lamabench.launch.slurm.jobs import entry

    for piece in pieces(plan(study(run__root="relative"))):
        plain = json.loads(json.dumps(entry(piece)))
        task = Task.from_dict(plain["task"])
        assert Path(plain["folder"]).is_absolute() and task.folder == plain["folder"]
        assert config_from_dict(task.config).run.root == str(Path("relative").resolve())
        assert (task.key, task.stages, task.metrics) == (piece.task.key, piece.task.stages, piece.task.metrics)


def test_a_thousand_runs_are_planned_in_seconds(record_property):
    models, rates = ["dit_s_2", "lamamba_s", "unet_s", "lamamba_b"], [i * 1e-5 for i in range(1, 26)]
    axes = {"model": models, "train.lr": rates, "model.input_size": [32], "data.size": [32]}
    large = Study("large", "?", base={"data": "cifar10", "sample.clip": True}, axes=axes, seeds=list(range(10)))
    started = time.process_time()  # the tests on SLURM run beside this one
    runs = plan(large)
    table, tasks = rows(runs), pieces(runs)
    seconds = time.process_time() - started
    record_property("seconds", round(seconds, 2))
    assert len(runs) == len(table) == 1000 and len(tasks) == 2004
    assert seconds < 15, f"{seconds:.1f} s of a core; 5 s is the aim, 300 s is what Hydra alone takes"
