"""Damaged and foreign files: `cancel` ends every job all the same, and `status` names the file and goes on."""

import json
import shutil
from pathlib import Path

import pytest
from lamabench.harness.disk import append
from lamabench.harness.stages import prepare
from lamabench.kernels.errors import InputError
from lamabench.launch import worker
from lamabench.launch.cli import main

DAMAGE = {
    "empty": b"", "cut": b'{"arrays": [', "junk": b"not json\n", "bytes": b"\xff\xfe\x00", "list": b"[]",
    "null": b"null", "number": b"7", "nothing": b"{}",
    "foreign": b'{"arrays": [{"a": 1}], "runs": 3, "overrides": 1, "time": "x"}',
    "entries": b'{"time": "2026-01-01T00:00:00+00:00", "arrays": [{"name": "a", "cluster": {}, "tasks": [3]}]}',
    "newer": b'{"time": "2026-01-01T00:00:00+00:00", "arrays": [{"name": "a", "cluster": {"new": 1}, "tasks": []}]}',
}  # fmt: skip


def do(action, *words, code=0):
    assert main(["sweep", action, "s.yaml", *words]) == code


@pytest.fixture(scope="module")
def submitted(tmp_path_factory):
    """Where the fixture `two` keeps what two submissions write, which take half a second."""
    return tmp_path_factory.mktemp("submitted")


@pytest.fixture
def two(cluster, submitted):
    """Two submissions of a study, of one task each, both in the queue."""
    kept = submitted / "work"
    if not kept.exists():
        assert cluster.submit(cluster.study(1)) == 0
        assert cluster.submit(cluster.study(2)) == 0
        shutil.copytree(cluster.tools.parent, submitted, symlinks=True, dirs_exist_ok=True)
        (submitted / "place").write_text(str(cluster.tools.parent))
    else:
        shutil.copytree(kept, ".", symlinks=True, dirs_exist_ok=True)
        place = (submitted / "place").read_text()
        for file in Path("runs/s").rglob("*.json"):
            file.write_text(file.read_text().replace(place, str(cluster.tools.parent)))
        for name in ("queue", "id", "calls", "words"):
            shutil.copyfile(submitted / "tools" / name, cluster.tools / name)
    assert cluster.queued() == ["1_0", "2_0"]
    return cluster


@pytest.mark.parametrize("name", ["0001/manifest.json", "asked.json"])
@pytest.mark.parametrize("damage", [*DAMAGE, "folder", "gone"])
def test_cancel_works_and_status_goes_on(name, damage, two, capsys):
    path = two.home / name
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "gone":
        path.write_bytes(DAMAGE[damage])
    capsys.readouterr()
    do("status")
    out, err = capsys.readouterr()
    names_it = not (name == "asked.json" and damage == "gone")  # as of a study that was never submitted
    assert (str(path) in err) == names_it and err.count("\n") <= 1
    states = ["planned" if name.startswith("0001") else "queued", "queued"]
    assert [line.split()[2] for line in out.splitlines() if line.startswith("0.000")] == states
    if name.startswith("0001"):
        assert two.submit("s.yaml") == 2  # what is queued is not known
        assert "ignored" in capsys.readouterr().err and two.queued() == ["1_0", "2_0"]
    do("cancel")
    out, err = capsys.readouterr()
    assert out == "cancelled: job 1, 2\n" and two.lines("ended") == ["1 2"] and (str(path) in err) == names_it


def test_cancel_works_without_the_listing_of_a_study(two, capsys):
    path = Path("runs/s/.study.json")
    for text in (b"", b"[]", b"\xff", b'{"runs": 3}'):
        path.write_bytes(text)
        two.set("ended", "")
        capsys.readouterr()
        do("cancel")
        out, err = capsys.readouterr()
        assert out == "cancelled: job 1, 2\n" and str(path) in err and err.count("\n") == 1


@pytest.mark.parametrize("action", [("status",), ("cancel", "--only", "*2*")])
def test_the_listing_of_a_study_is_not_needed_to_tell_of_its_jobs_and_to_end_some(action, two, capsys):
    path = Path("runs/s/.study.json")
    path.write_bytes(b"[]")
    capsys.readouterr()
    do(*action)
    out, err = capsys.readouterr()
    assert str(path) in err and err.count("\n") == 1
    assert "2 queued" in out if action == ("status",) else out == "cancelled: job 2_0\n"
    assert two.submit("s.yaml") == 2  # which writes the listing


def test_a_folder_that_cannot_be_read_is_one_line_of_status(two, capsys, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied", "runs/trainings")

    monkeypatch.setattr("lamabench.launch.prune.unnamed_folders", refuse)
    capsys.readouterr()
    do("status")
    assert capsys.readouterr().err == "cannot read runs/trainings: Permission denied\n"


@pytest.mark.parametrize("words", [(), ("--only", "*")])
def test_cancel_leaves_the_jobs_of_another_study_of_the_name(words, two, capsys):
    Path("other").mkdir()
    Path("s.yaml").rename("other/s.yaml")
    assert main(["sweep", "cancel", "other/s.yaml", *words]) == 2 and two.lines("ended") == []
    assert "belongs to the study" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["text", "folder", "denied"])
def test_cancel_works_without_a_batch_file_or_a_lock(damage, two, capsys, monkeypatch):
    batch, lock = two.home / "0001" / "array-0.sh", two.home / ".lock"
    if damage == "text":
        batch.write_text("#SBATCH --job-name='half\n")
    if damage == "folder":
        lock.unlink()
        lock.mkdir()
    if damage == "denied":
        real = Path.read_text

        def refuse(self, *args, **more):
            if self.name == batch.name and self.parent.name == "0001":
                raise PermissionError(13, "Permission denied", str(self))
            return real(self, *args, **more)

        monkeypatch.setattr(Path, "read_text", refuse)
    capsys.readouterr()
    do("cancel")
    out, err = capsys.readouterr()
    assert out == "cancelled: job 1, 2\n" and two.lines("ended") == ["1 2"]  # manifests tell the names too
    assert err.count("\n") == (damage != "folder") and (damage == "folder" or f"cannot read {batch}: " in err)


def test_cancel_needs_no_room_on_the_disk(two, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lamabench.launch.slurm.submit.locked", full)
    do("cancel")
    assert two.lines("ended") == ["1 2"]


def test_a_folder_that_is_not_ours_is_no_submission(two):
    (two.home / "0001.bak").mkdir()
    (two.home / "0001.bak" / "manifest.json").write_text("{}")
    two.leave(2)
    assert two.submit(two.study(3)) == 0 and len(two.arrays()) == 3


@pytest.mark.parametrize(
    "line",
    [b"junk\n", b"[]\n", b"null\n", b"{}\n", b'{"a": 1}\n', b'{"job": 7, "event": "end"}\n', b"\xff\xff\n",
     b'{"job": "1_0", "event": "start", "restart": "x", "records": 0}\n'],
)  # fmt: skip
def test_a_run_with_damaged_attempts_is_unreadable_and_the_others_are_shown(line, two, capsys, monkeypatch):
    first, second = two.tasks()
    attempts = prepare(first) / "attempts.jsonl"
    attempts.write_bytes(line)
    append(prepare(second) / "attempts.jsonl", {"event": "start", "job": "2_0", "records": 0, "restart": 0})
    capsys.readouterr()
    do("status", "--json")
    rows = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in rows] == ["unreadable", "preempted"]
    assert str(attempts.relative_to(Path.cwd())) in rows[0]["error"] and "line 1" in rows[0]["error"]
    do("status")
    assert "1 unreadable" in capsys.readouterr().out
    two.leave(2)
    do("retry", "--dirty")
    assert two.queued() == ["3_0"] and two.arrays()[-1].tasks[0]["folder"] == str(second.path.resolve())
    with pytest.raises(InputError, match="line 1"):
        worker.read_attempts(first.path, "1_0")
    monkeypatch.setenv("SUBMITIT_DEBUG_JOB_ID", "1")
    assert not worker.Attempt(first.path).stuck()  # a run that saves itself is queued again


def test_status_goes_on_past_the_listing_of_another_study(two, capsys):
    (other := Path("runs/other")).mkdir()
    (other / ".study.json").write_text("{")
    capsys.readouterr()
    do("status")
    out, err = capsys.readouterr()
    assert "2 queued" in out and "runs/other/.study.json is not JSON" in err


def test_a_file_that_may_not_be_read_is_named(two, capsys, monkeypatch):
    real = Path.read_text

    def refuse(self, *args, **more):
        if self.name == "array-0.job" and self.parent.name == "0001":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **more)

    monkeypatch.setattr(Path, "read_text", refuse)
    capsys.readouterr()
    do("status")
    assert f"cannot read {two.home / '0001' / 'manifest.json'}: Permission denied" in capsys.readouterr().err
