"""Labels of groups of runs, as people write them."""

from pathlib import Path
from typing import Any

import pytest
from lamabench.ablations import study as studies
from lamabench.reports.names import axis_noun, axis_word, labels, shared
from lamabench.reports.runs import read
from run_folders import write

WORDS = [
    ("model.window_size", 8, "window 8"),
    ("model.mixers", ["conv", "window"], "conv + window"),
    ("model.mixers", [], "no mixers"),
    ("model.mixers", ["ssm", {"kind": "window", "size": 4}], "ssm + window (size 4)"),
    ("model.mixers", [["ssm"], ["ssm", "window"]], "ssm | ssm + window"),
    ("model.scan", "bidirectional_4", "bidirectional_4 scan"),
    ("model.d_state", 16, "d_state 16"),
    ("model.skip", "none", "no skip"),
    ("model.skip", "concat", "skip concat"),
    ("model.shift", False, "no shift"),
    ("model.relative_bias", True, "relative bias"),
    ("model.parallel", True, "parallel"),
    ("model.parallel", False, "in series"),
    ("model.depths", [2, 2, 6, 2], "depths 2-2-6-2"),
    ("model.dropout", 0.1, "dropout 0.1"),
    ("model.dropout", 0.0, "no dropout"),
    ("train.lr", 4.0e-3, "lr 4e-3"),
    ("train.lr", 1e-4, "lr 1e-4"),
    ("train.lr", 0.1, "lr 0.1"),
    ("train.lr", 1.25e-5, "lr 1.25e-5"),
    ("train.steps", 100_000, "100K steps"),
    ("train.steps", 1200, "1200 steps"),
    ("train.steps", 123_456, "123,456 steps"),
    ("train.betas", [0.9, 0.999], "betas 0.9-0.999"),
    ("train.clip", None, "no gradient clip"),
    ("data", "cifar10", "cifar10"),
    ("data.size", 64, "64 px"),
    ("data.flip", True, "flips"),
    ("sample.guidance", 2.5, "guidance 2.5"),
    ("sample.guidance", 1.0, "no guidance"),
    ("sample.guidance_channels", None, "all channels guided"),
    ("sample.steps", 50, "50 sampling steps"),
    ("sample.clip", False, "no clipping"),
    ("backend.selective_scan", "triton", "selective scan triton"),
    ("model.my_new_field", 3, "my new field 3"),
    ("model.mixers", "[ssm,window]", "ssm + window"),  # as earlier versions recorded it
    ("model.mixers", "[]", "no mixers"),
    ("model.parallel", "true", "parallel"),
    ("model.scan", "[not a list", "[not a list scan"),
    ("seed", 1, ""),
    ("sample.seed", 1, ""),
    ("model", "dit_s_2", ""),
]


@pytest.mark.parametrize(("axis", "value", "words"), WORDS)
def test_an_axis_value_in_words(axis: str, value: Any, words: str) -> None:
    assert axis_word(axis, value) == words


def test_an_axis_without_a_value() -> None:
    nouns = {"model.window_size": "window", "model.mixers": "mixers", "train.lr": "lr", "data.size": "px"}
    assert {axis: axis_noun(axis) for axis in nouns} == nouns


@pytest.mark.parametrize("name", studies.names())
def test_axes_of_the_studies_are_words(name: str) -> None:
    """No committed study has a label with the syntax of Python or of an override, and no two values look the same."""
    for axis, values in studies.load(name).axes.items():
        words = [axis_word(axis, value) for value in values]
        assert not set("".join(words)) & set("[]{}='"), words
        assert axis == "model" or len({*words}) == len(values)


def test_several_models_are_named_with_what_differs(tmp_path: Path) -> None:
    same = {"model.shift": False}
    for size in (2, 8):
        variant = {"model.window_size": size, "model.mixers": ["conv", "window"], **same}
        write(tmp_path, f"a{size}", [], "lamamba", "LaMamba-Diff-nano", variant)
    write(tmp_path, "b", [], variant=same)
    runs = read([tmp_path])
    ours = [f"LaMamba-Diff-nano, window {size}, conv + window" for size in (2, 8)]
    assert sorted(labels(runs).values()) == ["DiT-demo", *ours]
    assert shared(runs) == "no shift"


def test_variants_of_one_model_are_named_by_what_differs_alone(tmp_path: Path) -> None:
    for seed in (0, 1):
        for size in (4, 8):
            variant = {"model": "lamamba_s", "model.window_size": size, "train.lr": 1e-4, "seed": seed}
            write(tmp_path, f"w{size}-s{seed}", [], "lamamba", "LaMamba-Diff-S", variant, seed)
    runs = read([tmp_path])
    assert sorted(labels(runs).values()) == ["window 4", "window 8"]
    assert shared(runs) == "LaMamba-Diff-S, lr 1e-4"
    one = [run for run in runs if run.info["variant"]["model.window_size"] == 4]
    assert list(labels(one).values()) == ["LaMamba-Diff-S"] and shared(one) == "LaMamba-Diff-S, window 4, lr 1e-4"
    write(tmp_path, "named", [], "lamamba", "LaMamba-Diff-S", {"variant": "stack-of-like-macs"}, study="unet")
    write(tmp_path, "base", [], "lamamba", "LaMamba-Diff-S", {"model": "lamamba_s"}, study="scale")
    assert sorted(labels(read([tmp_path])).values()) == [
        "LaMamba-Diff-S",
        "LaMamba-Diff-S, stack-of-like-macs",
        "LaMamba-Diff-S, window 4, lr 1e-4",
        "LaMamba-Diff-S, window 8, lr 1e-4",
    ]


def test_labels_are_unique(tmp_path: Path) -> None:
    write(tmp_path, "a", [], study="first")
    write(tmp_path, "a", [], study="second")
    runs = read([tmp_path, tmp_path / "first"])  # a run named twice is one run
    assert sorted(labels(runs).values()) == ["DiT-demo [first]", "DiT-demo [second]"]
    write(tmp_path, "b", [], variant={"x": 1}, study="second")
    write(tmp_path, "c", [], variant={"x": "1"}, study="third")
    assert len({*labels(read([tmp_path])).values()}) == 4


def test_a_damaged_run_does_not_lengthen_labels(tmp_path: Path) -> None:
    for size in (4, 8):
        write(tmp_path, f"w{size}", [], variant={"model.window_size": size})
    (next((tmp_path / "trainings").glob("*")) / "config.json").write_text("{")
    names = labels(read([tmp_path]))
    assert sorted(names.values()) == ["window 4", "window 8"]  # the listing says what it is
