"""Overrides: words of a command line that are texts, settings whose values are data, and `~` in paths."""

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from lamabench.ablations.study import Setting, Study
from lamabench.ablations.words import literal
from lamabench.harness.config import Config
from lamabench.kernels.errors import InputError
from lamabench.launch import plan
from lamabench.launch.compose import as_data, compose, model_config, override, plugin_names
from lamabench.launch.output import command, split_arguments
from lamabench.launch.slurm import cluster
from omegaconf import OmegaConf

HOME = os.path.expanduser("~")
# What a person types after the `=`, and the text that it is.
TEXTS = [
    ("/x/a=b/c", "/x/a=b/c"),
    ("a,b", "a,b"),
    ("uü (v2)", "uü (v2)"),
    ("[a]{b}", "[a]{b}"),
    ("it's", "it's"),
    ("a:b@c#d", "a:b@c#d"),
    ("1e3", "1e3"),
    ("true", "true"),
    ("a\\b\\", "a\\b\\"),
    (" a ", " a "),
    ("'null'", "null"),
    ("'a, b'", "a, b"),
    ('"a\'b"', "a'b"),
    ("'it\\'s'", "it's"),
    ("'a','b'", "'a','b'"),
    ("'", "'"),
]


@pytest.mark.parametrize(("typed", "text"), TEXTS)
def test_a_word_for_a_text_is_taken_as_it_is(typed, text):
    config, _ = compose([f"data.name={typed}", "train.steps=7"])
    assert config.data.name == text and config.train.steps == 7
    stored = override(config, [f"run.root={typed}", "sample.count=3"])
    assert (stored.run.root, stored.sample.count, stored.data) == (text, 3, config.data)


def test_an_empty_text_is_a_name_and_no_path():
    assert compose(["data.name="])[0].data.name == ""
    for word in ("run.root=", "data.path=''", "evaluate.features_path="):
        with pytest.raises(InputError, match=f"^{word.split('=')[0]} is empty"):
            compose([word])


def test_null_and_groups():
    assert compose(["data.path=null"])[0].data.path is None
    assert compose(["model='dit_nano'", "data=digits"])[1] == {"model": "dit_nano", "data": "digits"}
    for word, message in (
        ("model=ü", "unknown model 'ü'"),
        ("data=a,b", "unknown data 'a,b'"),
        ("run.root=null", "root"),
        ("run.root=a\0b", "is not text"),
        ("run.root=a\udcffb", "is not text"),
        ("train.steps=\udcff", "is not text"),
        ("evaluate.metrics=[a(b]", "may need quotes"),
        ("seed=nan", "seed"),
        ("model.mixers=" + "[" * 3000 + "]" * 3000, "lists in lists"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            compose([word])
        assert "\n" not in str(caught.value)


def test_home_in_paths():
    config, _ = compose(["run.root=~/r", "data.path='~/d,e'", "data.name=~/n", "evaluate.features_path=~/f"])
    assert (config.run.root, config.data.path, config.data.name) == (f"{HOME}/r", f"{HOME}/d,e", "~/n")
    assert config.evaluate.features_path == f"{HOME}/f"
    assert compose(["run.root=~nobody-here/r"])[0].run.root == "~nobody-here/r"
    assert override(config, ["run.root=~/s"]).run.root == f"{HOME}/s"
    study = Study("s", "?", base={"run.root": "~/t", "data.path": "~/u"}, variants={"a": {}})
    (run,) = plan.plan(study)
    assert (run.config.run.root, run.config.data.path) == (f"{HOME}/t", f"{HOME}/u")
    assert plan.home(study) == Path(f"{HOME}/t/s") and plan.home(study, ["run.root=~/v"]) == Path(f"{HOME}/v/s")
    assert plugin_names(["plugins=~/ü (1)/m.py"]) == [f"{HOME}/ü (1)/m.py"]
    assert plugin_names(["plugins=[~/m (ü).py, package.module]"]) == [f"{HOME}/m (ü).py", "package.module"]
    assert plugin_names(["plugins=['/a,b/m.py',c]"]) == ["/a,b/m.py", "c"] and plugin_names(["plugins=[]"]) == []


def test_references_of_a_study_are_numbers_or_refused():
    """On a command line `${key}` is what it always was."""
    config, _ = compose(["data.size=${seed}", "seed=8"])
    assert config.data.size == 8 and compose(["data.name=n${seed}", "seed=8"])[0].data.name == "n8"
    assert compose(["data.name=a\\${b}"])[0].data.name == "a${b}"
    settings = [Setting("data.size", "${seed}"), Setting("seed", 8)]
    assert compose(settings)[0].data.size == 8
    for text in ("${seed}", "/data/${x}", "${oc.env:HOME}", "a${"):
        with pytest.raises(InputError, match=r"data\.path=.* has a \$\{…\}"):
            compose([Setting("data.path", text)])
    for word in ("run.root=/a/${x}/b", "run.root=/a/${", "run.root=${run.root}"):
        for call in (lambda word: compose([word]), lambda word: override(config, [word])):
            with pytest.raises(InputError) as caught:
                call(word)
            assert "\n" not in str(caught.value)


def test_what_a_training_was_given_stays_whatever_it_contains():
    config: Config = compose([])[0]
    for root in ("/a/${x}/b", "/a/${", "\\${x}", "/${oc.env:HOME}"):
        given = replace(config, run=replace(config.run, root=root))
        assert override(given, ["run.device=cpu"]).run == replace(given.run, device="cpu")


@pytest.mark.parametrize("value", [1, 1.0, True, None, "1", "true", "null", "a,b", [1, "1"], {"a": "b:c"}, [[]], ""])
def test_a_setting_is_equal_to_itself_alone(value):
    others = [
        1,
        1.0,
        True,
        None,
        "1",
        "true",
        "null",
        "a,b",
        [1, "1"],
        {"a": "b:c"},
        [[]],
        "",
        "[]",
        {"a": "b", "c": 1},
    ]
    assert sum(Setting("k", value) == Setting("k", other) for other in others) == 1
    assert Setting("k", value) != Setting("j", value) and Setting("k", value) != f"k={literal(value)}"


def test_whole_numbers_with_a_point():
    (variant,) = Study("s", "?", variants={"a": {"model": "lamamba_nano", "model.ssm_ratio": 2.0}}).expand()
    for config in (
        compose(["model=lamamba_nano", "model.ssm_ratio=2.0"])[0].model,
        compose(variant.overrides)[0].model,
        model_config("lamamba_nano", ["ssm_ratio=2e0"]),
    ):
        assert config.ssm_ratio == 2 and type(config.ssm_ratio) is int
    sizes = compose(["bench.input_sizes=[32.0,64]"])[0].bench.input_sizes
    assert sizes is not None and sizes == [32, 64] and all(type(size) is int for size in sizes)
    for words in (["model.ssm_ratio=2.5"], ["bench.input_sizes=[32.5]"], ["train.steps=inf"], ["train.steps=true"]):
        with pytest.raises(InputError, match="Value"):
            compose(["model=lamamba_nano", *words])


def test_setup_of_a_cluster_is_bash(tmp_path):
    path = tmp_path / "c.yaml"
    lines = ['export A="${HOME:-/tmp}/a,b"', "echo \\${x} 'ü'", "echo ${"]
    path.write_text(json.dumps({"setup": lines}), encoding="utf-8")  # JSON is YAML
    assert cluster.load(str(path)).setup == lines
    assert cluster.load("slurm", [Setting("cluster.setup", lines)]).setup == lines
    assert cluster.load("slurm", ["cluster.partition=${x}, ü"]).partition == "${x}, ü"


@pytest.mark.parametrize("text", ["${x}", "\\${x}", "\\\\${x", "a\\", "$", "{$}{", "${a:${b}}", "\\\\\\${${"])
def test_escaped_data_come_back(text):
    node = OmegaConf.create(as_data({"a": [{"b": text}]}))
    assert OmegaConf.to_container(node, resolve=True) == {"a": [{"b": text}]}


def test_paths_with_an_equals_sign_are_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("t=t").mkdir()
    long = "x" * 300
    words = ["t=t", "~/t=t", "/no/such=run", "./a=b", f"{long}=1", "a=b", "run.root=/x=y", "m"]
    assert split_arguments(words) == (
        ["t=t", "~/t=t", "/no/such=run", "./a=b", "m"],
        [f"{long}=1", "a=b", "run.root=/x=y"],
    )
    with pytest.raises(InputError, match="NUL"):
        split_arguments(["a\0b"])


def test_a_command_can_be_pasted():
    words = ["sample", "/a b/(c)/it's", "run.root=$HOME/ü"]
    assert shlex.split(command(*words)) == ["lamabench", *words]
    assert command("sample", Path("runs/train/x-1")) == "lamabench sample runs/train/x-1"
