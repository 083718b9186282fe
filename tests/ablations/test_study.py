"""Studies: the runs that a YAML file expands into, and the errors of a bad file."""

import re
import time
from dataclasses import replace

import pytest
import torch
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from lamabench.ablations.study import STAGES as STUDY_STAGES
from lamabench.ablations.study import Study, load, names
from lamabench.ablations.words import literal
from lamabench.harness.keys import config_to_dict
from lamabench.harness.progress import Progress
from lamabench.harness.stages import execute
from lamabench.harness.tasks import STAGES
from lamabench.kernels.errors import InputError
from lamabench.launch.compose import compose, model_config
from lamabench.launch.plan import pieces, plan
from lamabench.models.registry import build
from latents_of_a_study import NEEDED
from omegaconf import OmegaConf

QUESTIONS = ["guidance_latents", "rivals"]  # of samples of latents, of families
LONG = ["block_mix", "d_state", "dit_block", "guidance", "lr", "resolution", "scale", "scan", "unet", "window"]
LONG += [name for name in names() if name.startswith("cifar10_")]


def write(tmp_path, **data):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


def test_axes_multiply_in_order():
    study = Study(
        "s", "?", base={"data": "digits"}, axes={"model": ["a", "b"], "model.shift": [True, False]}, seeds=[0, 7]
    )
    variants = study.expand()
    assert [study.run_name(v) for v in variants] == [
        f"{model}-{shift}-s{seed}" for model in "ab" for shift in (True, False) for seed in (0, 7)
    ]
    assert [*map(str, variants[1].overrides)] == ["data=digits", "model=a", "model.shift=true", "seed=7"]
    assert variants[1].values == {"model": "a", "model.shift": True} and variants[1].name == "a-True"
    assert variants[1].settings == {"data": "digits", "model": "a", "model.shift": True} and variants[1].seed == 7


def test_a_value_of_an_axis_brings_settings_along(tmp_path):
    """They come before those of the base, and after those of the debug size."""
    per = {"model": {"unet_nano": {"train.lr": 1e-3, "train.steps": 9}}, "data.size": {"8": {"train.batch_size": 4}}}
    path = write(
        tmp_path, question="?", base={"train.lr": 1e-4}, per=per, debug={"data.size": [4]},
        axes={"model": ["dit_nano", "unet_nano"], "data.size": [8, 16]},
    )  # fmt: skip
    study = load(path)
    rates = {(*variant.values.values(),): variant.settings for variant in study.expand()}
    assert {key: settings["train.lr"] for key, settings in rates.items()} == {
        (8, "dit_nano"): 1e-4, (16, "dit_nano"): 1e-4, (8, "unet_nano"): 1e-3, (16, "unet_nano"): 1e-3,
    }  # fmt: skip
    assert [settings.get("train.batch_size") for settings in rates.values()] == [4, 4, None, None]
    dit, unet = study.debug_size().expand()
    assert unet.settings == {**dit.settings, "model": "unet_nano", "train.lr": 1e-3}
    assert dit.settings["train.steps"] == 2 and dit.settings["train.batch_size"] == 2
    assert study.about()["per"] == "data.size 8: train.batch_size=4; model unet_nano: train.lr=0.001, train.steps=9"
    assert "per" not in Study("s", "?", axes={"model": ["dit_nano"]}).about()
    with pytest.raises(InputError, match=r"unknown axis in per in study s.*'modle'"):  # of one that is built in Python
        Study("s", "?", axes={"model": ["dit_nano"]}, per={"modle": {}}).expand()


@pytest.mark.parametrize(
    ("per", "message"),
    [
        ({"modle": {"dit_nano": {}}}, "unknown axis in per in .* 'modle' .*choices: model"),
        ({"model": {"dit_nana": {}}}, "unknown value of model in per in .* 'dit_nana' .*choices: dit_nano, unet_nano"),
        ({"model": {"dit_nano": {"model": "unet_nano"}}}, "per gives model, which is an axis"),
        ({"model": {"dit_nano": 3}}, "model in per must map values to settings, not {'dit_nano': 3}"),
        ({"model": 3}, "model in per must map values to settings, not 3"),
        ({"model": {"dit_nano": {"seed": 3}}}, "seed is not a setting of runs"),
        ([], r"per must be a dict, not \[\]"),
    ],
)
def test_settings_of_no_value_are_refused(tmp_path, per, message):
    axes = {"model": ["dit_nano", "unet_nano"]}
    with pytest.raises(InputError, match=message):
        load(write(tmp_path, question="?", axes=axes, per=per))


def test_named_variants_and_literals():
    variants = {
        "x": {"model.mixers": ["ssm", "window"], "data.path": None, "train.lr": 1e-4},
        "y": {"model.mixers": []},
    }
    x, y = Study("s", "?", variants=variants).expand()
    assert [*map(str, x.overrides)] == ["model.mixers=[ssm,window]", "data.path=null", "train.lr=0.0001", "seed=0"]
    assert [*map(str, y.overrides)] == ["model.mixers=[]", "seed=0"] and y.values == {"variant": "y"}


TEXTS = [
    "/data/a,b",
    "null",
    "True",
    "1e3",
    "a=b",
    "it's",
    "back\\slash",
    "q\\'",
    "a b",
    "f(x)",
    "a[0]",
    "数字",
    "a#b",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_read_as_the_same_text(text):
    variants = {"x": {"data.name": text, "data.path": f"/here/{text}", "sample.at": [1, 2], "data.flip": True}}
    (variant,) = Study("s", "?", variants=variants).expand()
    config, _ = compose(variant.overrides)
    assert (config.data.name, config.data.path) == (text, f"/here/{text}")
    assert config.sample.at == [1, 2] and config.data.flip is True


def test_a_list_of_texts_and_settings():
    values = ["a,b", [1, "null"], {"kind": "window", "size": 4}]
    assert literal(values) == "['a,b',[1,'null'],{kind:window,size:4}]"


COLLIDING = [
    ({"model.mixers": [[], ["none"]]}, r"the values \[\] and \['none'\] of axis model\.mixers .* be called 'none'"),
    ({"data.name": ["a b", "a@b"]}, "'a b' and 'a@b' of axis data.name would both be called 'a_b'"),
    ({"train.lr": [0.1, 0.2, 0.1]}, "the values 0.1 and 0.1 of axis train.lr"),
]


@pytest.mark.parametrize(("axes", "message"), COLLIDING)
def test_values_with_the_same_name_are_refused(axes, message):
    with pytest.raises(InputError, match=message):
        Study("s", "?", axes=axes).expand()


def test_words_have_no_hyphen():
    """So that no two combinations get the same name."""
    axes = {"data.name": ["a", "a-b"], "data.kind": ["b-c", "c"], "model.mixers": [[{"kind": "window", "size": 4}]]}
    variants = Study("s", "?", axes=axes).expand()
    assert [variant.name for variant in variants] == [
        f"{name}-{kind}-window.size4" for name in ("a", "a_b") for kind in ("b_c", "c")
    ]


@pytest.mark.parametrize("name", names())
def test_committed_studies_plan(name):
    study = load(name)
    runs = plan(study, NEEDED.get(name, ()))
    assert study.question.endswith("?") and study.file == f"lamabench:{name}"
    assert len({run.name for run in runs}) == len(runs) == len(study.expand())
    for model in {run.tasks[0].key: run.config.model for run in runs}.values():
        with torch.device("meta"):
            build(model)


@pytest.mark.parametrize("name", [*QUESTIONS, *(pytest.param(name, marks=pytest.mark.soak) for name in LONG)])
def test_debug_sizes_run_to_the_end(name, tmp_path, monkeypatch):
    monkeypatch.setattr(Progress, "say", lambda *_: None)
    runs = plan(load(name).debug_size(), [f"run.root={tmp_path}", "run.device=cpu"])
    assert {run.about["study"] for run in runs} == {f"{name}-debug"}
    for piece in pieces(runs):
        assert piece.ready()
        execute(piece.task, Progress(piece.folder))
    assert [run.state() for run in runs] == ["done"] * len(runs)


def test_studies_extend_a_file(tmp_path):
    (tmp_path / "_base.yaml").write_text(
        yaml.safe_dump(
            {"base": {"train.lr": 1, "data": "digits"}, "debug": {"train.steps": 3}, "plugins": ["mine.py"],
             "stages": ["cost"], "variants": {"a": {}}}
        )
    )  # fmt: skip
    mine = {"question": "?", "extends": "_base", "base": {"train.lr": 2}, "axes": {"model": ["dit_nano"]}}
    study = load(write(tmp_path, **mine))
    assert study.base == {"train.lr": 2, "data": "digits"} and study.debug == {"train.steps": 3}
    assert study.axes == mine["axes"] and study.variants == {} and study.stages == ["cost"]
    assert study.plugins == [str(tmp_path / "mine.py")] and study.file == str(tmp_path / "mine.yaml")
    builtin = load(write(tmp_path, question="?", extends="_cifar10", axes={"model": ["dit_nano"]}))
    assert builtin.base["data"] == "cifar10"
    by_path = load(write(tmp_path, question="?", extends="./_base.yaml"))
    assert by_path.variants == {"a": {}}
    assert "_cifar10" not in names()
    with pytest.raises(InputError, match="unknown study '_cifar10'"):
        load("_cifar10")
    with pytest.raises(InputError, match=r"extends 'nothing', but there is no file .*nothing\.yaml"):
        load(write(tmp_path, question="?", extends="nothing", axes={"model": ["dit_nano"]}))
    with pytest.raises(InputError, match="extends 'mine', which extends it in turn"):
        load(write(tmp_path, question="?", extends="mine", axes={"model": ["dit_nano"]}))


def test_debug_size_replaces_settings_and_axes(tmp_path):
    axes = {"model": ["dit_s_2"], "train.steps": [5, 6]}
    debug = {"model": ["dit_nano"], "train.lr": 0.5}
    study = load(write(tmp_path, question="?", base={"train.lr": 1}, axes=axes, seeds=[1, 2], debug=debug))
    small = study.debug_size()
    assert small.name == "mine-debug" and small.axes == axes | {"model": ["dit_nano"]} and small.seeds == [1]
    assert small.base["train.lr"] == 0.5 and small.base["data"] == "digits" and "train.steps" not in small.base
    variants = {"a": {"model.dim": 64, "model.shift": False}}
    assert Study("s", "?", variants=variants, debug={"model.dim": 8}).debug_size().variants == {
        "a": {"model.dim": 8, "model.shift": False}
    }
    with pytest.raises(InputError, match="study s has no debug size"):
        Study("s", "?", variants=variants).debug_size()


def test_stages_are_those_of_a_run():
    assert STUDY_STAGES == STAGES


def test_unknown_study_lists_the_choices():
    with pytest.raises(InputError, match=r"unknown study 'dmeo' \(did you mean 'demo'\?\); choices: .*demo"):
        load("dmeo")


AXES = {"model": ["dit_nano"]}
BAD = [
    ({"axes": AXES}, "a study needs a question"),
    ({"question": "?", "axes": AXES, "variants": {"a": {}}}, "either axes or variants, not both"),
    ({"question": "?"}, "either axes or variants, not both"),
    ({"question": "?", "axes": {"model": "dit_nano"}}, "axis model must be a list of values, not 'dit_nano'"),
    (
        {"question": "?", "axes": AXES, "seed": [0]},
        r"unknown key in .*mine\.yaml 'seed' \(did you mean 'seeds'\?\); choices: question, claim, answer, budget",
    ),
    ({"question": "?", "axes": AXES, "seeds": ["a"]}, "seeds must be whole numbers, not 'a'"),
    ({"question": "?", "axes": AXES, "seeds": []}, "seeds must list at least one"),
    ({"question": "?", "axes": AXES, "stages": ["fly"]}, r"unknown stage in .*mine\.yaml 'fly'; choices: cost, train"),
    ({"question": "?", "axes": AXES, "stages": ["smaple"]}, r"'smaple' \(did you mean 'sample'\?\)"),
    ({"question": "?", "axes": [1]}, "axes must be a dict"),
    ({"question": "?", "axes": AXES, "debug": {"model": "dit_s_2"}}, "axis model must be a list of values, not 'dit_s"),
    ({"question": "?", "axes": AXES, "base": {"seed": 3}}, r"list the seeds, such as seeds: \[0, 1\]"),
    ({"question": "?", "axes": {"seed": [1, 2]}}, "list the seeds"),
    ({"question": "?", "variants": {"a": {"seed": 1}}}, "list the seeds"),
    ({"question": "?", "variants": {"a/b": {}}}, "a text without / that does not begin with a dot, not 'a/b'"),
    ({"question": "?", "variants": {"": {}}}, "the name of a variant becomes a link: .*, not ''"),
    ({"question": "?", "variants": {"a" * 300: {}}}, "at most 200 bytes"),
    ({"question": "?", "variants": {"a\nb": {}}}, r"must be printable, not 'a\\nb'"),
    ({"question": "?", "variants": {"a\tb": {}}}, "must be printable"),
    ({"question": "?", "variants": {"é" * 101: {}}}, "at most 200 bytes"),
    ({"question": "?", "axes": AXES, "seeds": [float("nan")]}, "seeds must be whole numbers, not nan"),
    ({"question": "?", "axes": AXES, "seeds": [1, 1]}, r"seeds lists a seed twice: \[1, 1\]"),
    ({"question": "?", "axes": AXES, "plugins": [1]}, "plugins must be Python files or modules, not 1"),
]


WIDE = {f"model.{key}": [*range(50)] for key in ("depth", "hidden_size", "num_heads", "patch_size", "x", "y")}
REFUSED = [
    (Study("s", "?", axes=WIDE), "study s would have 15,625,000,000 runs; at most 100,000 are allowed"),
    (Study("s", "?", axes={"train.lr": [1]}, seeds=[*range(100_001)]), "study s would have 100,001 runs"),
    (
        Study("s", "?", variants={str(n): {} for n in range(400)}, seeds=[*range(251)]),
        "study s would have 100,400 runs",
    ),
    (Study("s", "?", axes={"data.path": ["a" * 201]}), "at most 200 bytes"),
    (Study("s", "?", axes={"data.name": [".lock", "x"]}), "does not begin with a dot, not '.lock'"),
    (Study("s", "?", variants={"a\udcffb": {}}), "must be printable"),
]


@pytest.mark.parametrize(("study", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_too_large_or_has_no_name_is_one_line_at_once(study, message):
    start = time.process_time()
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        study.expand()
    assert "\n" not in str(caught.value) and time.process_time() - start < 2


def test_a_hundred_thousand_runs_are_allowed():
    axes = {"model.depth": [*range(100)], "train.lr": [*range(100)]}
    assert len(Study("s", "?", axes=axes, seeds=[*range(10)]).expand()) == 100_000


def test_files_of_studies_by_odd_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    content = {"question": "?", "axes": {"model": ["dit_nano"]}, "plugins": ["~/p.py", "q.py"]}
    (tmp_path / "a=b").mkdir()
    (tmp_path / "a=b" / "mine.yaml").write_text(yaml.safe_dump(content))
    study = load("~/a=b/mine.yaml")
    assert study.file == str(tmp_path / "a=b" / "mine.yaml")
    assert study.plugins == [str(tmp_path / "p.py"), str(tmp_path / "a=b" / "q.py")]
    extending = {"question": "?", "extends": "~/a=b/mine.yaml", "base": {"train.lr": 1}}
    assert load(write(tmp_path, **extending)).axes == content["axes"]
    for name, message in (
        ("~/a=b/no.yaml", "unknown study '~/a=b/no.yaml'"),
        ("~/a=b/mine", "unknown study"),
        ("", "unknown study ''"),
        ("x" * 300 + ".yaml", "File name too long"),
        (f"{tmp_path / 'a=b' / 'mine.yaml'}/x.yaml", "Not a directory"),
        ("a\0b.yaml", "must be printable"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            load(name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("data", "message"), BAD)
def test_bad_studies_are_one_line(tmp_path, data, message):
    with pytest.raises(InputError, match=message) as caught:
        load(write(tmp_path, **data))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["question: [\n", "question: a\naxes: {model: [a]}\naxes: {model: [b]}\n"])
def test_broken_yaml_is_one_line(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="is not YAML" if "[\n" in text else "key 'axes' occurs twice") as caught:
        load(str(path))
    assert "\n" not in str(caught.value)


def hydra_config(overrides):
    """The configuration that Hydra itself composes from overrides, as plain data."""
    with initialize_config_module("lamabench.launch.conf", version_base="1.3"):
        return config_to_dict(OmegaConf.to_object(hydra_compose("config", [*map(str, overrides)])))  # type: ignore[arg-type]


MIXED = Study(
    "mixed",
    "?",
    base={"data": "digits", "train.steps": 7, "bench.batch_size": "auto", "run.root": "elsewhere"},
    variants={
        "plain": {"model": "dit_nano"},
        "changed": {"model": "dit_nano", "model.depth": 3, "train.lr": 1e-3, "sample.guidance_channels": 1},
        "data": {"model": "unet_nano", "data": "cifar10", "data.path": "/some where", "data.size": 64},
        "mixers": {"model": "lamamba_nano", "model.mixers": ["window", "ssm"], "model.parallel": True},
        "empty": {"model": "lamamba_nano", "model.mixers": [], "evaluate.metrics": ["fd"], "data.channels": 3},
        "tied": {"model": "lamamba_nano", "model.dim": "${train.batch_size}", "train.batch_size": 64},
        "floats": {"model": "unet_nano", "model.channel_mult": [1, 2.0], "evaluate.reference_count": None},
    },
    seeds=[0, 5],
)
LARGE = pytest.param(replace(load("block_mix"), seeds=[0]), marks=pytest.mark.soak)


@pytest.mark.parametrize("study", [load("demo"), LARGE, MIXED], ids=lambda study: study.name)
def test_configurations_equal_those_of_hydra(study):
    more = ["train.steps=9", "data.flip=true", "data.size=32"]
    for overrides in ([], more):
        for run, variant in zip(plan(study, overrides), study.expand(), strict=True):
            assert config_to_dict(run.config) == hydra_config([*variant.overrides, *overrides])


def test_configurations_share_nothing():
    first, _ = compose(["model=lamamba_nano"])
    first.model.mixers.append("conv")
    first.bench.modes.clear()
    again, _ = compose(["model=lamamba_nano"])
    assert again.model.mixers == ["ssm", "window"] and again.bench.modes == ["forward", "train"]


TYPOS = [
    (["model=dit"], "unknown model 'dit'"),
    (
        ["data=digit"],
        r"unknown data 'digit' \(did you mean 'digits'\?\); choices: cifar10, digits, folder, hf, npz, synthetic",
    ),
    (["model=dit_nano", "model.skip=add"], "unknown key in model 'skip'; choices: input_size"),
    (["train.stesp=3"], r"unknown key in train 'stesp' \(did you mean 'steps'\?\)"),
    (["trian.steps=3"], r"unknown key 'trian' \(did you mean 'train'\?\)"),
    (["train.steps.x=3"], "unknown key in train.steps 'x'"),
    (["train={steps: 3}"], "train is a section; set one of its keys: steps"),
    (["seed=one"], "Value 'one'"),
    (["train.steps=1.5"], "train.steps: Value '1.5'"),
    (["train.ema_decay=2"], "train.ema_decay must be at least 0 and below 1, not 2.0"),
    (["train.steps=???"], "missing mandatory value: steps"),
    (["train.steps=1,2"], "'train.steps=1,2' gives several values"),
    (["+train.steps=1"], "'\\+train.steps=1' is not an override; write key=value"),
    (["~train.steps=1"], "is not an override"),
    (["data.size=${train.stesp}"], "stesp"),
]


@pytest.mark.parametrize(("overrides", "message"), TYPOS, ids=lambda value: str(value))
def test_a_typo_is_one_line_every_time(overrides, message):
    compose([])
    for _ in range(2):  # caches do not swallow errors
        with pytest.raises(InputError, match=message) as caught:
            compose(overrides)
        assert "\n" not in str(caught.value)


def test_one_value_for_a_list_is_a_list_of_one():
    one = ["bench.compile=compile", "bench.input_sizes=32", "bench.checkpointing=true", "model.mixers=ssm"]
    several = ["bench.compile=[compile]", "bench.input_sizes=[32]", "bench.checkpointing=[true]", "model.mixers=[ssm]"]
    more = ["model=lamamba_nano", "train.batch_size=2"]
    assert compose([*more, *one])[0] == compose([*more, *several])[0]
    assert compose([*more, "bench.input_sizes=null"])[0].bench.input_sizes is None
    assert model_config("lamamba_nano", ["mixers=ssm"]).mixers == ["ssm"]
