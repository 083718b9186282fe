"""Cluster files and settings: what would smuggle a line into a batch file, or break it, is refused in one line."""

import shlex

import pytest
from lamabench.ablations.study import Setting
from lamabench.kernels.errors import InputError
from lamabench.launch.slurm.cluster import ClusterConfig, load
from lamabench.launch.slurm.requests import load_over

BAD = [
    ({"partition": "a\n#SBATCH --exclusive"}, "cluster.partition is a name without line breaks"),
    ({"account": "a\rb"}, "cluster.account is a name without line breaks"),
    ({"qos": "a\0b"}, "cluster.qos is a name without line breaks"),
    ({"constraint": "a\x1bb"}, "cluster.constraint is a name without line breaks"),
    ({"options": ["--comment=it's"]}, "its quotes in pairs"),
    ({"options": ["--comment='a"]}, "its quotes in pairs"),
    ({"options": ["--x \\"]}, "its quotes in pairs"),
    ({"options": ["--x\n#SBATCH --y"]}, "each one line"),
    ({"options": ["--x\ry"]}, "no control characters"),
    ({"options": ["--x\0y"]}, "no control characters"),
    ({"setup": ["echo a\0b"]}, "no control characters"),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=str)
def test_what_would_break_a_batch_file_is_one_line(values, message):
    (setting,) = [Setting(f"cluster.{key}", value) for key, value in values.items()]
    for make in (lambda: ClusterConfig(**values), lambda: load("slurm", [setting])):
        with pytest.raises(InputError, match=message) as caught:
            make()
        assert "\n" not in str(caught.value)


def test_options_and_lines_that_a_shell_understands():
    options = ["--comment='it is'", '--comment="it\'s"', "--exclude=node[01-03],x", "--mail-user=ü@b"]
    setup = ["module load a/b", "if true; then\n  echo a\tb\nfi"]
    cluster = load("slurm", [Setting("cluster.options", options), Setting("cluster.setup", setup)])
    assert (cluster.options, cluster.setup) == (options, setup)
    assert [shlex.split(text) for text in options][1] == ["--comment=it's"]


def test_one_line_needs_no_list_in_a_file_or_a_stage(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("setup: export A=${HOME}\noptions:\nstage: {evaluate: {setup: 'echo ${x}'}}\n")
    train, evaluate = (load(str(path), (), stage) for stage in ("train", "evaluate"))
    assert (train.setup, train.options, evaluate.setup) == (["export A=${HOME}"], [], ["echo ${x}"])
    path.write_text("setup: {echo: a}\n")
    with pytest.raises(InputError, match="are lines of text, not"):
        load(str(path))


def test_a_file_below_home_and_files_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("time_min: 1\ntime_min: 2\n")
    (tmp_path / "d.yaml").write_text("time_min: 3\n")
    assert load("~/d.yaml").time_min == 3
    for name, message in (
        ("~/c.yaml", "key 'time_min' occurs twice"),
        ("~/e.yaml", r"unknown cluster '~/e\.yaml'.*or a path to a \.yaml file"),
        ("", "unknown cluster ''"),
        ("x" * 300, "File name too long"),
        (f"{tmp_path}/d.yaml/x.yaml", "Not a directory"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            load(name)
        assert "\n" not in str(caught.value)


def test_a_changed_cluster_keeps_every_text():
    given = ClusterConfig(
        partition="ü, (a)", account='it\'s "b"', mem_gb=0.5, setup=["echo ${x}"], options=["--x='a b'"]
    )
    assert load_over(given, []) == given
    changed = load_over(given, ["cluster.partition=p=q", "cluster.options=[--y]"])
    assert (changed.partition, changed.options, changed.setup) == ("p=q", ["--y"], given.setup)
