"""A queue without room for a whole study, and clusters without arrays: `sweep submit` with imitations of SLURM."""

import json
import os
from pathlib import Path

import pytest
from lamabench.launch.slurm import client, snapshot


def once(cluster, count):
    """Whether so many tasks were submitted, each once."""
    folders = [task.folder for task in cluster.tasks()]
    return len(folders) == len(set(folders)) == count


def test_what_fits_is_queued_and_the_same_command_queues_the_rest(cluster, capsys, finish):
    path = cluster.study(10, ["train", "sample"])
    cluster.set("room", 7)
    assert cluster.submit(path) == 0
    out = capsys.readouterr().out
    text = "13 jobs not queued (the cluster takes no more jobs of yours, QOSMaxSubmitJobPerUserLimit): the same command"
    assert text in out and len(cluster.queued()) == 7
    first = cluster.arrays()
    assert [task.kind for task in cluster.tasks()] == ["training"] * 7
    assert len(cluster.lines("calls")) < 8  # it halves, and does not try each size
    assert {array.job for array in first} == {key.split("_")[0] for key in cluster.queued()}
    for array in first:  # jobs read their tasks from the manifest
        content = json.loads((array.folder / "manifest.json").read_text())["arrays"][array.index]
        assert content["tasks"] == array.tasks and content["name"] == array.name
        assert f"--array=0-{len(array.tasks) - 1}%" in (array.folder / f"array-{array.index}.sh").read_text()
        assert (array.folder / f"array-{array.index}.pkl").is_file()

    assert cluster.submit(path) == 1  # the queue is full
    assert "13 jobs not queued" in capsys.readouterr().err
    assert not Path("runs/s/.sweep/0002").exists() and cluster.arrays() == first

    cluster.set("room", 100)
    assert cluster.submit(path, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert [row["tasks"] for row in answer["arrays"]] == [3, 7, 3] or sum(
        row["tasks"] for row in answer["arrays"]
    ) == 13
    assert answer["rest"] == ""
    assert once(cluster, 20) and len(cluster.queued()) == 20
    assert cluster.submit(path) == 0 and "nothing to queue" in capsys.readouterr().out


@pytest.mark.parametrize("room", [1, 3, 11, 12])
def test_every_task_is_queued_once_whatever_room_there_is(room, cluster, capsys, finish):
    path = cluster.study(12)
    cluster.set("room", room)
    for _ in range(12):
        assert cluster.submit(path) == 0
        assert len(cluster.queued()) <= room
        for task in cluster.tasks():
            finish(task)
        cluster.leave(99)
        if "not queued" not in capsys.readouterr().out:
            break
    assert once(cluster, 12)


def test_parts_of_an_array_run_one_after_the_other_if_parallel_says_so(cluster):
    cluster.set("room", 6)
    cluster.set("sbatch", (cluster.tools / "sbatch").read_text().replace("room=", 'echo "$@" >> words\nroom=', 1))
    assert cluster.submit(cluster.study(8), "--parallel", "2") == 0
    assert len(cluster.queued()) == 6
    orders = [[word for word in line.split() if word.startswith("--dependency")] for line in cluster.lines("words")]
    assert orders[0] == [] and ["--dependency=afterany:1"] in orders


def test_a_limit_of_ones_own(cluster, capsys):
    path = cluster.study(5)
    cluster.set("queue", "9_0|RUNNING|other|None\n")
    assert cluster.submit(path, "cluster.queue_at_most=4") == 0
    assert "2 jobs not queued (cluster.queue_at_most is 4): the same command" in capsys.readouterr().out
    assert len(cluster.queued()) == 4
    assert cluster.submit(path, "cluster.queue_at_most=4") == 0
    out = capsys.readouterr().out
    assert "2 jobs not queued" in out and "nothing to queue" not in out and not Path("runs/s/.sweep/0002").exists()
    cluster.leave(1)
    assert cluster.submit(path, "cluster.queue_at_most=4") == 0
    assert "1 job not queued" in capsys.readouterr().out and len(cluster.queued()) == 4


def test_a_refusal_for_another_reason_leaves_no_submission(cluster, capsys):
    path = cluster.study(2, variants={"a": {}, "b": {"train.lr": 1e-3, "cluster.time_min": 7}}, axes={})
    cluster.set("refusal", "sbatch: error: invalid partition specified: x\n")
    assert cluster.submit(path) == 1
    err = capsys.readouterr().err
    assert "invalid partition specified: x: 0 of 2 arrays are queued" in err
    assert err.count("\n") == 1 and not Path("runs/s").exists()
    cluster.set("refusal", "")
    assert cluster.submit(path) == 0
    cluster.set("refusal", "sbatch: error: invalid partition specified: x\n")
    assert cluster.submit(cluster.study(3)) == 1  # what was queued earlier stays
    assert not Path("runs/s/.sweep/0002").exists() and len(cluster.arrays()) == 2


def test_an_answer_that_never_came_keeps_the_submission(cluster, monkeypatch):
    """The array may be in the queue."""
    monkeypatch.setattr(client, "DELAYS_S", ())
    cluster.set("refusal", "sbatch: error: Socket timed out on send/recv operation\n")
    assert cluster.submit(cluster.study(2)) == 1
    assert [len(array.tasks) for array in cluster.arrays()] == [2]


@pytest.mark.parametrize(("line", "code", "words"), [("MaxArraySize = 0", 2, "takes no job arrays (MaxArraySize is 0)"),
                                                     ("MaxArraySize = 1", 0, ""), ("nothing", 0, "")])  # fmt: skip
def test_a_cluster_without_arrays_is_one_line_and_leaves_nothing(line, code, words, cluster, capsys):
    path = cluster.study(2)
    cluster.set("config", line)
    assert cluster.submit(path) == code
    err = capsys.readouterr().err
    assert words in err and Path("runs").exists() == (not code) and (not code or err.count("\n") == 1)
    assert len(cluster.queued()) == (0 if code else 2)


def test_a_user_without_a_name(cluster, monkeypatch, capsys):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert cluster.submit(cluster.study(1)) == 0, capsys.readouterr().err
    assert json.loads(Path("runs/s/.sweep/0001/manifest.json").read_text())["user"] == str(os.getuid())


def test_a_root_that_cannot_be_written_is_bad_input(cluster, capsys):
    Path("file").touch()
    for root in ("file", "file/below", "/proc/below"):
        assert cluster.submit(cluster.study(1), f"run.root={root}") == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and root in err and "goes on from what was queued" not in err


def test_the_snapshot_is_the_code_of_the_jobs(cluster):
    assert cluster.submit(cluster.study(1)) == 0
    code = json.loads(Path("runs/s/.sweep/0001/manifest.json").read_text())["code"]
    assert code["sha256"] == snapshot.code_sha256(Path(code["path"], "lamabench")) and code["plugins"] == {}
