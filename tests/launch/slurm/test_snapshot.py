"""The code that queued jobs import."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from lamabench.harness import provenance
from lamabench.kernels.errors import InputError
from lamabench.launch.plan import Piece
from lamabench.launch.slurm import snapshot
from lamabench.launch.slurm.cluster import ClusterConfig
from lamabench.launch.slurm.executor import SlurmExecutor


def git(folder, *words):
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A small repository in the place of ours."""
    folder = tmp_path / "checkout"
    for name in ("kernels/a.py", "harness/provenance.py", "ablations/s.yaml", "README.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"# {name}\n")
    git(tmp_path, "init", "-q", str(folder))
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "all")
    monkeypatch.setattr(snapshot, "ROOT", folder)
    monkeypatch.setattr(snapshot, "code", lambda: {"commit": git(folder, "rev-parse", "HEAD").strip(), "dirty": False})
    return folder


def test_a_snapshot_is_the_committed_tree(checkout, tmp_path):
    commit = git(checkout, "rev-parse", "HEAD").strip()
    snapshot.check(dirty=False)
    frozen = snapshot.freeze(tmp_path / "code")
    code = Path(frozen["path"]) / "lamabench"
    assert {path.relative_to(code).as_posix() for path in code.rglob("*") if path.is_file()} == {
        "kernels/a.py", "harness/provenance.py", "ablations/s.yaml", "SNAPSHOT.json",
    }  # fmt: skip
    assert json.loads((code / "SNAPSHOT.json").read_text())["commit"] == commit == frozen["commit"]
    assert snapshot.freeze(tmp_path / "code") == frozen and len(list((tmp_path / "code").iterdir())) == 1
    (checkout / "notes.txt").write_text("mine")
    snapshot.check(dirty=False)  # not code

    (checkout / "kernels" / "a.py").write_text("# changed\n")
    (checkout / "kernels" / "b.py").write_bytes(b"# new \xe9\r\n")  # what is no UTF-8 is kept too
    with pytest.raises(InputError, match=r"kernels/a\.py, kernels/b\.py\): commit them, or give --dirty"):
        snapshot.check(dirty=False)
    snapshot.check(dirty=True)
    dirty = snapshot.freeze(tmp_path / "code")
    assert dirty["dirty"] and dirty["path"] != frozen["path"]
    assert (code / "kernels" / "a.py").read_text() == "# kernels/a.py\n"
    assert (Path(dirty["path"]) / "lamabench" / "kernels" / "b.py").read_bytes() == b"# new \xe9\r\n"
    assert git(checkout, "status", "--porcelain").split() == [
        "M",
        "kernels/a.py",
        "??",
        "kernels/b.py",
        "??",
        "notes.txt",
    ]
    git(checkout, "stash", "-u")
    git(checkout, "apply", "--whitespace=nowarn", dirty["diff"])  # what was saved makes the tree again
    assert (checkout / "kernels" / "a.py").read_text() == "# changed\n"
    assert (checkout / "kernels" / "b.py").read_bytes() == b"# new \xe9\r\n"


def test_a_snapshot_that_was_changed_is_made_anew(checkout, tmp_path):
    """A retry would otherwise run what was changed under the name of the commit."""
    frozen = snapshot.freeze(tmp_path / "code")
    file = Path(frozen["path"]) / "lamabench" / "kernels" / "a.py"
    for damage in (
        lambda: file.write_text("# edited\n"),
        lambda: file.unlink(),
        lambda: (file.parents[1] / "SNAPSHOT.json").unlink(),
        lambda: shutil.rmtree(frozen["path"]),
    ):
        damage()
        assert snapshot.freeze(tmp_path / "code") == frozen and file.read_text() == "# kernels/a.py\n"
        assert [path.name for path in (tmp_path / "code").iterdir()] == [Path(frozen["path"]).name]


def test_the_repository_may_be_of_another_user(checkout, tmp_path):
    """Nothing is added to it."""
    (checkout / "kernels" / "b.py").write_text("# new\n")
    before = sorted((checkout / ".git").rglob("*"))
    dirty = snapshot.freeze(tmp_path / "code")
    assert "+# new" in Path(dirty["diff"]).read_text()
    assert sorted((checkout / ".git").rglob("*")) == before


def test_a_copy_of_a_plugin_that_was_changed_is_made_anew(tmp_path):
    (plugin := tmp_path / "mine_too.py").write_text("A = 1\n")
    piece = Piece("run", None, plugins=(str(plugin), "json"))
    for _ in range(2):
        kept = snapshot.with_plugins(piece, tmp_path / "code")
        copy = Path(kept.plugins[0])
        assert copy.read_text() == "A = 1\n" and kept.plugins[1] == "json"
        hashes = snapshot.plugin_hashes([kept])
        assert hashes[str(copy)] == hashlib.sha256(b"A = 1\n").hexdigest() and set(hashes) == {*kept.plugins}
        copy.write_text("A = 2\n")


def test_records_of_measurements_are_not_code(checkout, monkeypatch):
    """So that the second of two measurements that add to committed records is of the commit, as the first is."""
    monkeypatch.setattr(provenance, "__file__", str(checkout / "harness" / "provenance.py"))
    record = checkout / "reports" / "records" / "bench" / "dit" / "record.jsonl"
    record.parent.mkdir(parents=True)
    record.write_text("{}\n")
    git(checkout, "add", "-A")
    git(checkout, "commit", "-q", "-m", "measured")
    record.write_text("{}\n{}\n")
    assert provenance.code() == {"commit": git(checkout, "rev-parse", "HEAD").strip(), "dirty": False}
    (checkout / "README.md").write_text("changed")
    assert provenance.code()["dirty"]


@pytest.mark.parametrize("dirty", [False, True])
def test_a_checkout_that_git_refuses_is_not_taken_for_an_installed_package(dirty, checkout, tmp_path, monkeypatch):
    """As git refuses a folder of another user: jobs would import what is edited while they wait."""
    monkeypatch.setattr(snapshot, "code", lambda: {"commit": None, "dirty": None})
    (tmp_path / "git").write_text("#!/bin/sh\necho 'fatal: detected dubious ownership in repository' >&2; exit 128\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(InputError, match=r"git rev-parse failed in .*: fatal: detected dubious ownership"):
        snapshot.check(dirty)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="git is not installed on this machine"):
        snapshot.check(dirty)


def test_a_snapshot_on_a_full_disk_is_one_short_line(checkout, tmp_path, monkeypatch):
    real = f'[ "$3" = checkout-index ] || exec {shutil.which("git")} "$@"'
    full = 'for file in $(seq 99); do echo "unable to write $file"; done >&2; exit 1'
    (tmp_path / "git").write_text(f"#!/bin/bash\n{real}\n{full}\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(InputError, match=r"unable to write 1; [\d.]+ MiB are free there: is the disk full") as caught:
        snapshot.freeze(tmp_path / "code")
    assert len(str(caught.value)) < 300 and not list((tmp_path / "code").iterdir())


def test_an_installed_package_is_its_own_snapshot(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "ROOT", tmp_path)
    monkeypatch.setattr(snapshot, "code", lambda: {"commit": None, "dirty": None})
    snapshot.check(dirty=False)
    code = snapshot.freeze(tmp_path / "code")
    assert code["path"] is None and code["version"] == "0.1.0" and not list(tmp_path.iterdir())
    assert snapshot.words(code) == "lamabench 0.1.0 as installed"
    assert "PYTHONPATH" not in SlurmExecutor(tmp_path / "a", ClusterConfig(), "n", code["path"]).batch_file(1)
