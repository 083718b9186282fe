"""YAML of studies and clusters: what is refused in one line, and the values that come through."""

import subprocess
import sys
import time

import pytest
from lamabench.ablations.study import load as load_study
from lamabench.ablations.yaml_file import DEPTH, VALUES, read_yaml
from lamabench.kernels.errors import InputError
from lamabench.launch.slurm.cluster import load as load_cluster

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 9))
BAD = [
    ("a: 1\na: 2", "key 'a' occurs twice"),
    ("x: {a: 1, 'a': 2}", "key 'a' occurs twice"),
    ("x: &x {a: 1}\ny: {<<: *x, b: 2, <<: *x}", "key '<<' occurs twice"),
    ("1: a", "the key '1' is not a text"),
    ("no: a", "the key 'no' is not a text"),
    ("? [a]\n: b", "the key .* is not a text"),
    ("a: &a [*a]", "an alias is part of what it repeats"),
    ("a: &a {b: {c: *a}}", "an alias is part of what it repeats"),
    ("a: &a {<<: *a}", "an alias is part of what it repeats"),
    (BOMB, "more than 100,000 values"),
    (MERGES, "more than 100,000 values"),
    ("[" * 3000 + "]" * 3000, "more than 50 levels"),
    ("a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 400)), "more than 50 levels"),
    ("a: 2020-01-01", "'2020-01-01' is a timestamp"),
    ("a: 2020-13-45", "'2020-13-45' is a timestamp"),
    ("a: !!set {b, c}", "a set has no place here"),
    ("a: !!binary aGk=", "is a binary"),
    ("a: !!python/object/apply:os.system [ls]", "has no place here"),
    ("a: !!int x", "invalid literal"),
    ("a: !!float x", "could not convert"),
    (r'a: "b\0c"', "is not text"),
    (r'a: "\ud800"', "is not text"),
    (b"a: \xff", "can't decode byte 0xff"),
    ("a: b\n---\na: c", "expected a single document"),
    ("a: <<", "is not YAML"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=range(len(BAD)))
def test_what_is_refused_is_one_line_at_once(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    start = time.process_time()
    for load in (read_yaml, lambda path: load_study(str(path)), lambda path: load_cluster(str(path))):
        with pytest.raises(InputError, match=message) as caught:
            load(path)
        assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{path} is not YAML: ")
    assert time.process_time() - start < 10


def test_plain_data_come_through(tmp_path):
    path = tmp_path / "x.yaml"
    text = "a: &a {lr: 1.0e-3, n: 2, 'on': on}\nb: {<<: *a, n: 3}\nc: [*a, [], null, '1e3', \"ü→\", -.inf]\n"
    path.write_text(text, encoding="utf-8")
    a = {"lr": 1e-3, "n": 2, "on": True}
    assert read_yaml(path) == {"a": a, "b": a | {"n": 3}, "c": [a, [], None, "1e3", "ü→", float("-inf")]}


def test_the_limits_are_just_above_what_passes(tmp_path):
    path = tmp_path / "x.yaml"
    for levels in (DEPTH - 1, DEPTH):  # the text inside is a level too
        path.write_text("[" * levels + "x" + "]" * levels)
        if levels < DEPTH:
            read_yaml(path)
        else:
            with pytest.raises(InputError, match="levels"):
                read_yaml(path)
    ten = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"  # ten values, with the list itself
    for copies in (VALUES // 10 - 10, VALUES // 10):
        path.write_text(ten + f"b: [{', '.join(['*a0'] * copies)}]")
        if copies < VALUES // 10:
            assert len(read_yaml(path)["b"]) == copies
        else:
            with pytest.raises(InputError, match="values"):
                read_yaml(path)


def test_files_are_utf_8_under_any_locale(tmp_path):
    (tmp_path / "s.yaml").write_text("question: a→b?\naxes: {model: [dit_nano]}\n", encoding="utf-8")
    (tmp_path / "c.yaml").write_text("account: ü→\n", encoding="utf-8")
    code = (
        "import locale; from lamabench.ablations.study import load; from lamabench.launch.slurm import cluster; "
        "print(locale.getpreferredencoding(), ascii(load('s.yaml').question), ascii(cluster.load('c.yaml').account))"
    )
    posix = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, cwd=tmp_path, env=posix, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["ANSI_X3.4-1968", r"'a\u2192b?'", r"'\xfc\u2192'"]
