"""Folders have one writer at a time, and studies list the folders that they share."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time

import pytest
from lamabench.harness import run as folders
from lamabench.kernels.errors import InputError

INFO = {"kind": "training", "key": "a" * 12, "study": "s", "name": "n", "variant": {}, "seed": 0, "config": {"x": 1}}
ENTRY = {"name": "small", "variant": {"model": "dit_nano"}, "seed": 0, "model": "dit_nano", "family": "dit"}
ENTRY |= {"title": "DiT-nano", "training": "trainings/dit-digits-1", "model_folder": "models/dit-2", "samples": []}
PAIR = {"better": {"model": "a"}, "worse": {"model": "b"}}
FACTS = {"question": "q?", "claim": "", "answer": "a", "budget": "b", "axes": {"z": [4, None], "a": [[1], True]}}


def test_a_folder_keeps_its_description(tmp_path):
    folder = folders.create(tmp_path / "t", INFO)
    folders.create(folder, INFO | {"study": "another", "config": {"x": 2}})
    assert folders.read_info(folder) == {"layout": 2, **INFO, "config": {"x": 2}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a run folder: it has no config.json"),
        ("{", "is not JSON"),
        ("[]", "was not written by lamabench"),
        ("null", "was not written by lamabench"),
        ('{"config": []}', "was not written by lamabench: its config is"),
        ('{"layout": 2, "config": {}, "key": "a"}', "was not written by lamabench: its kind is None"),
        ("[" * 100_000, "is not JSON"),
        ('{"id": "0", "config": {}}', "was written by an earlier version .*: read it with that version .* or train"),
        ('{"layout": 9, "config": {}}', "was written by a newer version of lamabench: its layout is 9"),
    ],
)
def test_other_folders_are_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        folders.read_run(tmp_path)
    assert "\n" not in str(caught.value)


def test_two_processes_do_not_work_in_one_folder(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from lamabench.harness.run import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert folders.is_locked(tmp_path)
        with pytest.raises(folders.Busy, match=f"being worked on by process {other.pid}"), folders.locked(tmp_path):
            pass
    finally:
        other.kill()
        other.wait()
    deadline = time.monotonic() + 10
    while folders.is_locked(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    with folders.locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_one_line(tmp_path, monkeypatch, number):
    """Such as Lustre mounted without -o flock, or NFS without its lock daemon."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    (tmp_path / ".lock").touch()
    monkeypatch.setattr("fcntl.flock", refuse)
    with (
        pytest.raises(InputError, match=r"file system of .*/\.lock has no locks \(.*\).*: give a run\.root on one"),
        folders.locked(tmp_path),
    ):
        pass
    with pytest.raises(InputError, match="has no locks"):
        folders.is_locked(tmp_path)


def test_a_study_names_its_folders_and_links_to_them(tmp_path):
    (tmp_path / ENTRY["training"]).mkdir(parents=True)
    home = folders.write_study(tmp_path, "s", "/a/s.yaml", [ENTRY])
    assert os.readlink(home / "small") == "../trainings/dit-digits-1" and (home / "small").is_dir()
    moved = home.parent.rename(tmp_path.with_name("elsewhere"))
    assert (moved / "s" / "small").is_dir(), "links are relative: a root can be moved"
    folders.write_study(moved, "s", "/a/s.yaml", [ENTRY | {"name": "large", "training": None}])
    assert [run["name"] for run in folders.read_study(moved / "s")["runs"]] == ["large"]
    assert os.readlink(moved / "s" / "large") == "../models/dit-2"


def test_single_commands_add_to_their_study(tmp_path):
    folders.write_study(tmp_path, "train", None, [ENTRY | {"samples": ["a"]}], add=True)
    folders.write_study(tmp_path, "train", None, [ENTRY | {"samples": ["b", "a"]}], add=True)
    folders.write_study(tmp_path, "train", None, [ENTRY | {"name": "other"}], add=True)
    runs = {run["name"]: run["samples"] for run in folders.read_study(tmp_path / "train")["runs"]}
    assert runs == {"small": ["a", "b"], "other": []}
    for steps, furthest in ((8, 8), (4, 8)):
        folders.write_study(tmp_path, "train", None, [ENTRY | {"steps": steps}], add=True)
        assert folders.read_study(tmp_path / "train")["runs"][0]["steps"] == furthest


def test_a_listing_says_what_its_study_is_about(tmp_path):
    folders.write_study(tmp_path, "s", "/a/s.yaml", [ENTRY])
    assert "about" not in folders.read_study(tmp_path / "s")  # as in listings of earlier versions
    folders.write_study(tmp_path, "s", "/a/s.yaml", [ENTRY], about=FACTS)
    assert list(folders.read_study(tmp_path / "s")["about"].items()) == list(FACTS.items())
    folders.write_study(tmp_path, "s", "/a/s.yaml", [ENTRY | {"name": "other"}], add=True)
    listing = folders.read_study(tmp_path / "s")
    assert listing["about"] == FACTS and [run["name"] for run in listing["runs"]] == ["small", "other"]


def test_commands_at_the_same_time_lose_no_folder(tmp_path):
    """What a listing loses, prune deletes."""
    code = (
        "import json, sys; from pathlib import Path; from lamabench.harness.run import write_study\n"
        "entry = json.loads(sys.argv[2]); sys.stdin.read()\n"
        "for n in range(10):\n"
        "    write_study(Path(sys.argv[1]), 'train', None, [entry | {'name': entry['name'] + str(n)}], True)"
    )
    words = [[sys.executable, "-c", code, str(tmp_path), json.dumps(ENTRY | {"name": name})] for name in "abc"]
    several = [subprocess.Popen(one, stdin=subprocess.PIPE) for one in words]
    for one in several:  # all at once
        assert one.stdin is not None
        one.stdin.close()
    assert [one.wait() for one in several] == [0, 0, 0]
    names = {run["name"] for run in folders.read_study(tmp_path / "train")["runs"]}
    assert names == {f"{name}{n}" for name in "abc" for n in range(10)}


def test_a_glance_takes_no_lock_from_a_writer(tmp_path):
    """`is_locked` holds a shared lock for a moment; a writer that comes then waits for it."""
    with folders.locked(tmp_path):
        pass
    with open(tmp_path / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        timer = threading.Timer(0.05, fcntl.flock, (file, fcntl.LOCK_UN))
        timer.start()
        with folders.locked(tmp_path, wait_s=10):
            assert (tmp_path / ".lock").read_text() == str(os.getpid())
        timer.join()


def test_two_study_files_of_one_name_are_not_one_study(tmp_path):
    folders.write_study(tmp_path, "window", "/p/window.yaml", [ENTRY])
    before = (tmp_path / "window" / folders.STUDY).read_bytes()
    with pytest.raises(
        InputError, match=r"belongs to the study /p/window\.yaml, not to /q/window\.yaml: rename the file"
    ):
        folders.write_study(tmp_path, "window", "/q/window.yaml", [])
    assert (tmp_path / "window" / folders.STUDY).read_bytes() == before
    folders.write_study(tmp_path, "train", None, [ENTRY])
    with pytest.raises(InputError, match="belongs to the study of single commands"):
        folders.check_study(tmp_path, "train", "/q/train.yaml")
    for name in ("trainings", "models", ".cache"):
        with pytest.raises(InputError, match="cannot be called"):
            folders.check_study(tmp_path, name, "/q/x.yaml")


def test_a_folder_in_the_place_of_a_link_stays(tmp_path):
    (tmp_path / "s" / "small").mkdir(parents=True)
    folders.write_study(tmp_path, "s", None, [ENTRY])
    assert not (tmp_path / "s" / "small").is_symlink()
    assert json.loads((tmp_path / "s" / folders.STUDY).read_text())["runs"][0]["name"] == "small"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("null", "was not written by lamabench: it is no JSON object"),
        ('{"runs": []}', None),
        ('{"runs": [], "file": 3}', "was not written by lamabench: its file is 3"),
        ('{"runs": {}, "file": null}', "was not written by lamabench: its runs is {}"),
        ('{"runs": [null], "file": null}', "was not written by lamabench: in run 1, it is no JSON object"),
        (json.dumps({"runs": [ENTRY, {**ENTRY, "samples": 1}], "file": None}), "lamabench: in run 2, its samples is 1"),
        (json.dumps({"runs": [{**ENTRY, "samples": [7]}], "file": None}), "lamabench: in run 1, its samples is 7"),
        (json.dumps({"runs": [{**ENTRY, "steps": "9"}], "file": None}), "lamabench: in run 1, its steps is '9'"),
        (json.dumps({"runs": [{**ENTRY, "training": None}], "file": "/a/s.yaml"}), None),
        (json.dumps({"runs": [], "file": None, "about": FACTS}), None),
        (json.dumps({"runs": [], "file": None, "about": None}), "lamabench: in about, it is no JSON object"),
        (json.dumps({"runs": [], "file": None, "about": {**FACTS, "claim": 1}}), "lamabench: in about, its claim is 1"),
        (
            json.dumps({"runs": [], "file": None, "about": {**FACTS, "axes": {"a": 2}}}),
            "lamabench: in axes, its a is 2",
        ),
        (json.dumps({"runs": [], "file": None, "about": {**FACTS, "verdicts": {"c": [PAIR]}}}), None),
        (
            json.dumps({"runs": [], "file": None, "about": {**FACTS, "verdicts": 1}}),
            "lamabench: in about, its verdicts is 1",
        ),
        (json.dumps({"runs": [], "file": None, "about": {**FACTS, "verdicts": {"c": 1}}}), "in verdicts, its c is 1"),
        (
            json.dumps({"runs": [], "file": None, "about": {**FACTS, "verdicts": {"c": [{**PAIR, "worse": "b"}]}}}),
            "lamabench: in verdicts, its worse is 'b'",
        ),
    ],
)
def test_a_listing_is_checked(tmp_path, content, message):
    (tmp_path / folders.STUDY).write_text(content)
    if message is None:
        assert "runs" in folders.read_study(tmp_path)
        return
    with pytest.raises(InputError, match=rf"\.study\.json .*{message}"):
        folders.read_study(tmp_path)


def test_a_folder_of_another_user_is_one_line(another_user):
    root, acting = another_user
    folders.write_study(root, "s", None, [ENTRY])
    folder = folders.create(root / "t", INFO)
    with folders.locked(folder):
        pass
    with acting():
        assert folders.read_info(folder)["key"] == INFO["key"] and not folders.is_locked(folder)
        for work in (
            lambda: folders.create(root / "other", INFO),
            lambda: folders.create(folder, INFO | {"config": {"x": 2}}),
            lambda: folders.locked(folder).__enter__(),
        ):
            with pytest.raises(InputError, match=rf"cannot write {root}.*: Permission denied"):
                work()
        for study in ("s", "new"):
            with pytest.raises(InputError, match=rf"cannot write (below )?{root}.*: Permission denied"):
                folders.write_study(root, study, None, [ENTRY])
    folder.chmod(0)
    with acting():
        for read in (folders.read_run, folders.is_locked):
            with pytest.raises(InputError, match=r"cannot read .*: Permission denied"):
                read(folder)


@pytest.mark.parametrize(
    ("place", "reason"), [("file", "exists"), ("file/deeper", "Not a dir"), ("x" * 300, "too long")]
)
def test_a_root_that_cannot_be_is_one_line(tmp_path, place, reason):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"cannot write .*{reason}"):
        folders.create(tmp_path / place, INFO)
    with pytest.raises(InputError, match=r"cannot (write below|read) .*(Not a directory|too long)"):
        folders.write_study(tmp_path / place, "s", None, [ENTRY])
