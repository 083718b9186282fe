"""What SLURM's commands say, and asking them again."""

import os

import pytest
from lamabench.launch.slurm import client


def test_task_ids():
    assert client.tasks_of("7_3", 9) == ["7_3"]
    assert client.tasks_of("7_[1,3-5%2]", 9) == ["7_1", "7_3", "7_4", "7_5"]
    assert client.tasks_of("7_[0-4:2%2]", 9) == ["7_0", "7_2", "7_4"]
    # As Debian's SLURM 22.05 says it in the first four seconds after tasks of half a second.
    assert client.tasks_of("7", 1) == ["7_0"] and client.tasks_of("7", 3) == []


def test_sacct_says_every_task_that_did_not_start(tmp_path, monkeypatch):
    """By default it cuts a long list off, as `7_[1,3,…,51-...]`."""
    (tmp_path / "sacct").write_text('#!/bin/sh\necho "7_[1,3-4]|PENDING|$SLURM_BITSTR_LEN:0"\necho "8|FAILED|28:0"\n')
    (tmp_path / "sacct").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    states = client.accounted({"7": 5, "8": 1}, "2026-01-01T00:00:00")
    assert states == {f"7_{task}": [("PENDING", "0:0")] for task in (1, 3, 4)} | {"8_0": [("FAILED", "28:0")]}


def test_what_sbatch_says(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "a.sh").touch()
    (tmp_path / "sbatch").touch(mode=0o755)
    for output, job in (("7", "7"), ("7;here", "7"), ("-----\n Welcome to 2 nodes\n\n7", "7")):
        (tmp_path / "sbatch").write_text(f"#!/bin/sh\nprintf '%s\\n' '{output}'\n")
        assert client.sbatch(tmp_path / "a.sh", "n") == job
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho welcome\n")
    with pytest.raises(client.SlurmError, match="sbatch gave no job id: 'welcome'"):
        client.sbatch(tmp_path / "a.sh", "n")
    monkeypatch.setattr(client, "ANSWER_S", 0.5)
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho no room for more >&2\nexec sleep 60\n")
    with pytest.raises(client.Passing, match=r"sbatch gave no answer within 0.5 s \(no room for more\)"):
        client.call("sbatch")
