"""`sweep run` on this machine: which GPU a job sees, and how jobs end with the command."""

import os
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from lamabench.ablations.study import Study
from lamabench.harness.disk import read_lines
from lamabench.kernels.errors import InputError
from lamabench.launch import local
from lamabench.launch.cli import main
from lamabench.launch.plan import pieces, plan
from processes import forked_jobs

SMALL = {"model": "dit_nano", "model.depth": 1, "model.hidden_size": 16, "model.num_heads": 2, "data": "digits",
         "data.size": 8, "train.batch_size": 4, "train.precision": "float32"}  # fmt: skip
UUIDS = ["GPU-1d2f3a4b-aaaa-bbbb-cccc-000000000000", "GPU-1d2f3a4b-aaaa-bbbb-cccc-000000000001"]
SLICES = ["MIG-5e6f7a8b-aaaa-bbbb-cccc-000000000000", "MIG-5e6f7a8b-aaaa-bbbb-cccc-000000000001"]


def runs(root, count=2, **more):
    """The trainings of a study."""
    axes = {"train.lr": [(1 + place) * 1e-3 for place in range(count)]}
    study = Study("s", "?", base={**SMALL, "run.root": str(root), **more}, axes=axes, stages=["train"])
    return pieces(plan(study))


@pytest.mark.parametrize(
    ("visible", "count", "names"),
    [
        (None, 0, []),
        (None, 3, ["0", "1", "2"]),
        ("", 0, []),
        ("-1", 0, []),
        ("2, 5", 2, ["2", "5"]),
        ("3,-1,1", 1, ["3"]),  # CUDA stops at the first name that it does not know
        ("0,9", 1, ["0"]),
        (",".join(UUIDS), 2, UUIDS),
        (",".join(SLICES), 1, SLICES),  # a process sees one slice, however many there are
        (",".join(SLICES), 0, []),
    ],
)
def test_the_gpus_of_our_own_variable_are_shared_out(visible, count, names, monkeypatch):
    assert local.names(visible, count) == names
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local.gpus() == names


@pytest.mark.parametrize("names", [["0"], ["3", "5"], UUIDS, SLICES, ["0", "1", "2", "3"]])
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_jobs_are_spread_evenly_over_the_gpus(names, device):
    busy = []
    for _ in range(3 * len(names)):
        busy.append(local.visible_to(device, names, busy))
        counts = Counter(busy)
        assert set(counts) <= set(names) and max(counts.values()) - min(counts[name] for name in names) <= 1
    busy.remove(names[-1])  # a job ended: the next one takes its place
    assert local.visible_to(device, names, busy) == names[-1]


def test_jobs_that_want_no_gpu_see_none():
    assert local.visible_to("cpu", UUIDS, []) == local.visible_to("auto", [], []) == ""
    assert local.visible_to("cuda:1", UUIDS, []) == ",".join(UUIDS)  # it picks the second one itself


def test_as_many_runs_at_a_time_as_gpus_or_cores(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(6))
    six, cpu = runs(tmp_path, 6), runs(tmp_path, 6, **{"run.device": "cpu"})
    assert [local.parallelism(six, names) for names in ([], ["0"], UUIDS)] == [6, 1, 2]
    assert local.parallelism(cpu, ["0"]) == 6 and local.parallelism(six[:1], UUIDS) == 1 == local.parallelism([], [])


@pytest.mark.parametrize("visible", ["", *UUIDS, SLICES[0], "5"])
def test_a_job_sees_what_it_was_given(visible, tmp_path):
    job = local.LocalExecutor(tmp_path, visible).submit(os.getenv, "CUDA_VISIBLE_DEVICES")
    assert job.result() == visible


@pytest.mark.parametrize(("device", "count", "seen"), [("cuda", 0, "none"), ("cuda:2", 2, "GPUs 0 to 1")])
def test_a_gpu_that_is_not_there_is_one_line_and_leaves_nothing(device, count, seen, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"question": "?", "base": SMALL, "axes": {"train.lr": [1e-3]}}))
    assert main(["sweep", "run", "s.yaml", f"run.device={device}"]) == 2
    err = capsys.readouterr().err
    assert f"run.device={device} asks for a GPU, and torch sees {seen}" in err and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()
    with pytest.raises(InputError, match="asks for a GPU"):
        local.check_devices(runs(tmp_path, **{"run.device": device}), [])


@pytest.mark.parametrize(("names", "parallel", "each"), [(UUIDS, None, [1, 1]), (SLICES, 3, [2, 1])])
def test_jobs_share_the_gpus_and_none_works_on_the_cpu(names, parallel, each, tmp_path, monkeypatch, capsys, jobs):
    """The command sees two GPUs that its jobs do not see, as with a broken driver. No job is then done on the CPU."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(names))
    mine = runs(tmp_path, sum(each), **{"train.steps": 2})
    assert not local.run_local(mine, parallel)
    err = capsys.readouterr().err
    assert [err.count(f"started on GPU {name}") for name in names] == each
    errors = [read_lines(run.folder / "attempts.jsonl")[-1]["error"] for run in mine]
    given = [error.split("CUDA_VISIBLE_DEVICES: ")[1].rstrip(")") for error in errors]
    assert sorted(map(given.count, names), reverse=True) == each
    assert not any((run.folder / "record.jsonl").exists() for run in mine)
    assert all(f"{run.name}: failed: {error}" in err for run, error in zip(mine, errors, strict=True))


@pytest.fixture
def threads(monkeypatch):
    """The threads and the GPU of each job that is started; a job is done at once."""
    seen = []
    monkeypatch.setattr(local, "_start", lambda runs, threads, visible, say: seen.append((threads, visible)) or
                        local._Job([replace(run, task=replace(run.task, stages=())) for run in runs]))  # fmt: skip
    return seen


def test_without_a_gpu_jobs_share_the_cores(threads, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(6))
    mine = runs(tmp_path, 3)
    local.run_local(mine)
    local.run_local(mine, 1)
    assert threads == [(2, "")] * 3 + [(6, "")] * 3


def test_a_job_with_a_gpu_leaves_cores_to_other_commands(threads, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", UUIDS[1])
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(32))
    mine = runs(tmp_path, 1)
    local.run_local(mine)
    local.run_local(mine, 8)
    assert threads == [(8, UUIDS[1]), (4, UUIDS[1])]


STEPS = (2, 4, 6, 8)


def sets(root):
    """The trainings of two runs, and the sets of each at four moments."""
    more = {"train.steps": 8, "train.snapshots": list(STEPS), "sample.at": "all", "sample.count": 6,
            "sample.method": "ddim", "sample.steps": 2, "run.device": "cpu", "run.root": str(root)}  # fmt: skip
    study = Study("s", "?", base=SMALL | more, axes={"train.lr": [1e-3, 2e-3]}, stages=["train", "sample"])
    return pieces(plan(study))


@pytest.fixture(scope="module")
def sampled(start, tmp_path_factory):
    """Makes a root, in which the first of two runs is trained. Its sets of samples, and those of the other one."""
    trained = tmp_path_factory.mktemp("trained")
    with forked_jobs(start):
        assert local.run_local([run for run in sets(trained) if run.task.kind == "training"][:1], 1)

    def copied(root):
        shutil.copytree(trained, root, dirs_exist_ok=True)
        return [run for run in sets(root) if run.task.kind == "samples"]

    return copied


def jobs_of(runs):
    """The jobs that worked on runs, in their order."""
    return [
        [line["job"] for line in read_lines(run.folder / "attempts.jsonl") if line["event"] == "start"] for run in runs
    ]


def images_of(runs):
    return [[path.read_bytes() for path in sorted(run.folder.glob("shards/*/0*.npy"))] for run in runs]


def test_sets_of_one_training_share_processes(sampled, tmp_path, capsys, jobs):
    """With one process, it draws all. With two, each draws half. The images are the same, and one set that cannot be
    drawn keeps no other one from it."""
    one, two, three = (sampled(tmp_path / name) for name in "abc")
    assert [len(local.together(one, free)) for free in (1, 2, 3, 4, 9)] == [4, 2, 2, 1, 1]
    assert local.together(one[4:], 1) == []  # that training has no weights
    assert not local.run_local(one, 1)
    (first,), *others = jobs_of(one[:4])
    assert others == [[first]] * 3
    err = capsys.readouterr().err
    assert err.count(f"follows {one[0].name}, log") == 3 and all(f"{run.name}: done" in err for run in one[:4])
    assert local.run_local(two[:4], 2)
    jobs = jobs_of(two[:4])
    assert jobs[0] == jobs[1] != jobs[2] == jobs[3]
    assert images_of(one[:4]) == images_of(two[:4]) and all(images_of(one[:4]))
    weights = Path(three[1].task.training) / "weights" / "step-00000004.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert not local.run_local(three[:4], 1)
    assert [run.missing() for run in three[:4]] == [[], ["sample"], [], []]
    assert f"{three[1].name}: failed: " in capsys.readouterr().err


def test_sets_that_a_lost_process_did_not_reach_are_drawn(sampled, tmp_path, monkeypatch, capsys):
    """The process dies at the second of four sets. That one failed, and the next process draws the other two."""
    runs = sampled(tmp_path)[:4]
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "sitecustomize.py").write_text(DIES)
    monkeypatch.setenv("DIES_AT", str(runs[1].folder))
    assert not local.run_local(runs, 1)
    assert [run.missing() for run in runs] == [[], ["sample"], [], []]
    jobs = jobs_of(runs)
    assert jobs[0] == jobs[1] != jobs[2] == jobs[3]
    assert f"{runs[1].name}: " in capsys.readouterr().err


# A module that Python imports at its start: a process ends by SIGKILL when it begins to draw in a folder.
DIES = """
import os, signal, sys
def hook(event, words):
    if event == "open" and str(words[0]).startswith(os.environ["DIES_AT"] + "/shards"):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
"""


@pytest.mark.parametrize(
    ("number", "everyone", "code", "last"),
    [
        (signal.SIGINT, True, 130, "lamabench sweep: interrupted; the same command continues"),
        (signal.SIGTERM, False, 143, "lamabench sweep: ended by SIGTERM; the same command continues"),
        pytest.param(
            *(signal.SIGHUP, True, 129, "lamabench sweep: ended by SIGHUP; the same command continues"),
            marks=pytest.mark.soak,
        ),
    ],
)
def test_jobs_save_and_end_with_the_command(number, everyone, code, last, tmp_path, terminal):
    """Ctrl-C and the end of a terminal reach every process of it, `kill` only the command. None leaves a job behind."""
    base = {**SMALL, "train.steps": 200000, "run.checkpoint_every": 200000}
    study = {"question": "?", "base": base, "axes": {"train.lr": [1e-3, 2e-3]}, "stages": ["train"]}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(study))
    command = terminal(tmp_path, "sweep", "run", "s.yaml", "--parallel", "2", CUDA_VISIBLE_DEVICES="")
    command.until(lambda: len(list(tmp_path.glob("runs/trainings/*/progress.json"))) == 2)
    (os.killpg if everyone else os.kill)(command.pids[0], number)
    status, err = command.codes, command.text("err")
    assert status == [code] and err.splitlines()[-1].endswith(last) and "Traceback" not in err
    assert "saving, then ending" in err and err.count(last) == 1
    with pytest.raises(ProcessLookupError):
        os.killpg(command.pids[0], 0)  # no process of its session is left
    for folder in tmp_path.glob("runs/trainings/*"):
        (saved,) = (folder / "checkpoints").iterdir()
        assert 0 < int(saved.stem[5:]) < 200000
        assert [line["event"] for line in read_lines(folder / "attempts.jsonl")] == ["start", "stop"]
    assert len(list(tmp_path.glob("runs/trainings/*"))) == 2
