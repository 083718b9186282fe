"""What is said of the trainings of a study before its scores are compared."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from lamabench.reports.checks import checks
from lamabench.reports.evidence import Evidence
from lamabench.reports.runs import Line, read
from run_folders import drawn, line, scored, trained, write

FD = "FD-EffNetLite0-512"


def write_curve(root: Path, name: str, metrics: Mapping[str, list[float]], training: Line | None = None) -> None:
    """Write a training with scores at 3, 6, 9 and 12 thousand steps of 64 images, in each of `metrics` its own. Its
    seed is 1 if its name ends with -s1."""
    about: Line = {"variant": {"model": "dit_demo", "a": name.partition("-")[0]}, "seed": int(name.endswith("-s1"))}
    for place, step in enumerate((3000, 6000, 9000, 12_000)):
        done = [trained() | (training or {}) | {"steps": step}] if step == 12_000 else []
        moment = {"checkpoint_step": step, "images_seen": 64 * step}
        scores = [scored(each[place], metric=metric) | {"key": metric} | moment for metric, each in metrics.items()]
        write(root, name, [*done, drawn(), *scores], step=step, **about)


def study(
    root: Path,
    curves: dict[str, list[float]],
    training: Line | None = None,
    metrics: Mapping[str, float] = MappingProxyType({FD: 1.0}),
) -> list[str]:
    """The checks of a study with a training for each curve. Its scores in a metric are the curve times a factor."""
    for name, values in curves.items():
        each = {metric: [factor * value for value in values] for metric, factor in metrics.items()}
        write_curve(root, name, each, training)
    return checks(Evidence(read([root])).variants)


def test_the_order_of_the_last_third(tmp_path: Path) -> None:
    """Only moments from 8,000 steps on count, so that `c`, which overtakes early, changes no order."""
    curves = {"a": [9.0, 8.0, 5.0, 4.0], "b": [9.5, 8.5, 6.0, 5.0], "c": [9.9, 7.0, 4.0, 3.0]}
    where = "over the last 2 moments of the training (576,000 to 768,000 images)"
    assert study(tmp_path / "1", curves)[-1] == (f"In FD-EffNetLite0-512, the order of 3 variants is the same {where}.")
    curves["b"][-1] = 3.5
    text = study(tmp_path / "2", curves)[-1]
    assert text == f"In FD-EffNetLite0-512, the order of some variants changes {where}: `a a` and `a b`."


def test_metrics_with_the_same_order_share_a_sentence(tmp_path: Path) -> None:
    """The inception score is better if it is higher, and one of the distances has another order."""
    curves = {"a": [9.0, 8.0, 5.0, 4.0], "b": [9.5, 8.5, 6.0, 5.0]}
    kinds = {FD: 1.0, "KD-EffNetLite0-512": 2.0, "IS-512": -1.0, "held-out loss": -1.0}
    *_, first, second = study(tmp_path, curves, metrics=kinds)
    assert first.startswith(f"In {FD}, KD-EffNetLite0-512 and IS-512, the order of 2 variants is the same over ")
    assert second.startswith("In held-out loss, the order of 2 variants is the same over ")


def test_of_many_pairs_that_change_places_a_few_are_named(tmp_path: Path) -> None:
    """Four variants whose order is reversed are six pairs."""
    curves = {name: [9.0, 8.0, 5.0 + place, 4.0 - place] for place, name in enumerate("abcd")}
    text = study(tmp_path, curves)[-1]
    assert text.endswith(": `a a` and `a b`; `a a` and `a c`; `a a` and `a d`; `a b` and `a c`; 2 more.")


def test_changes_of_which_only_unnamed_ones_differ_are_told_apart(tmp_path: Path) -> None:
    """Of five variants all pairs but one change places in one metric, and all in the other."""
    every = {name: [9.0, 8.0, 5.0 + place, 4.0 - place] for place, name in enumerate("abcde")}
    for name, values in every.items():
        last = {"KD-EffNetLite0-512": 5.5 if name == "e" else values[-1], FD: values[-1]}
        write_curve(tmp_path, name, {metric: [*values[:-1], end] for metric, end in last.items()})
    text = [line for line in checks(Evidence(read([tmp_path])).variants) if "changes" in line]
    assert len(text) == 2


def test_a_training_without_the_end_has_no_say(tmp_path: Path) -> None:
    """At its last moments the others are in the middle of theirs."""
    curves = {"a": [9.0, 8.0, 5.0, 4.0], "b": [9.5, 8.5, 6.0, 5.0]}
    text = study(tmp_path, curves)[-1]
    assert "(576,000 to 768,000 images)" in text
    for step, value in ((3000, 3.0), (6000, 9.9)):  # it stopped, and would change places
        scores = [drawn(), scored(value) | {"checkpoint_step": step, "images_seen": 64 * step}]
        write(tmp_path, "z", scores, variant={"model": "dit_demo", "a": "z"}, step=step)
    assert checks(Evidence(read([tmp_path])).variants)[-1] == text


def test_samples_drawn_in_two_ways_are_of_one_training(tmp_path: Path) -> None:
    training = [trained() | {"waiting_share": 0.5}]
    for guidance in (1.0, 2.0):
        write(tmp_path, "a", [*training, drawn(), scored(guidance)], guidance=guidance)
        training = []
    runs = read([tmp_path])
    assert len(runs) == 2
    first, second, _ = checks(Evidence(runs).variants)
    assert first == "None of 1 training diverged." and second.startswith("1 of 1 training waited for data")


def test_what_trainings_took(tmp_path: Path) -> None:
    """Two trainings of two processes and half an hour each: the hours of processes count."""
    took = {"seconds": 1800.0, "process_seconds": 3600.0}
    text = study(tmp_path, {"a": [4.0, 3.0, 2.0, 1.0], "b": [4.0, 3.0, 2.0, 1.0]}, took)
    assert text[1] == "2 trainings took 2 hours of A CPU in all, compilation included."


def test_one_variant_has_no_order(tmp_path: Path) -> None:
    assert study(tmp_path, {"a": [4.0, 3.0, 2.0, 1.0]}) == [
        "None of 1 training diverged.",
        "1 training took 0.0267 hours of A CPU in all, compilation included.",
    ]


def test_samples_that_are_copies_of_training_images(tmp_path: Path) -> None:
    """Of 101 test images at 1 … 101, a twentieth lie below 6."""
    study(tmp_path, {"a": [4.0, 3.0, 2.0, 1.0], "b": [4.0, 3.0, 2.0, 1.0], "c": [4.0, 3.0, 2.0, 1.0]})
    test = [float(place) for place in range(1, 102)]
    files = {name: next((tmp_path / "demo" / name).resolve().glob("samples/*")) / "neighbours.json" for name in "abc"}
    for name, near in (("a", 5.9), ("b", 6.1)):
        spaces = {"pixels": {"distance": [near, 50.0], "test_distance": test},
                  "inception_v3": {"distance": [7.0, 50.0], "test_distance": test},
                  "dinov2": {"distance": [0.0], "test_distance": None}}  # fmt: skip
        files[name].write_text(json.dumps(spaces), encoding="utf-8")
    files["c"].write_text('{"pixels": {"distance": [1.0]}}', encoding="utf-8")
    damaged, pixels, features = checks(Evidence(read([tmp_path])).variants)[2:5]
    assert damaged == f"{files['c']} is damaged: `lamabench evaluate --neighbours` writes it again."
    assert pixels == (
        "Of 4 samples of 2 trainings, 25.0 % are nearer to a training image, in pixels, than 95 % of 101 test images "
        "are, 0.0 % to 50.0 % by training; of new images it would be about 5 % (not measured: `a c` seed 0)."
    )
    assert "2 trainings, 0.0 % are nearer to a training image, in the features of inception_v3, than" in features


def test_trainings_that_waited_and_one_that_diverged(tmp_path: Path) -> None:
    curves = {"a": [4.0, 3.0, 2.0, 1.0]}
    patient = study(tmp_path / "1", curves, {"waiting_share": 0.0199})
    assert patient[1] == "None of 1 training waited for data for more than 2 % of the time (2.0 % at most)."
    root = tmp_path / "2"
    write(
        root, "z", [line("train", "diverged", error="step 3: the loss is nan")], variant={"model": "dit_demo", "a": "z"}
    )
    text = study(root, curves, {"waiting_share": 0.031})
    assert text[:2] == [
        "1 of 2 trainings diverged: `a z` seed 0.",
        "1 of 1 training waited for data for more than 2 % of the time: `a a` seed 0 (3.1 % at most).",
    ]


def test_a_loss_that_rose_again(tmp_path: Path) -> None:
    """A finite loss of more than twice the lowest one is said, or of more than twice another seed's last one. One of
    twice is not, nor one early in the training."""
    every = {"a": [1.0, 0.1, 0.21], "b": [1.0, 0.1, 0.2], "c": [1.0, 9.0, 0.1], "d-s0": [1.0, 0.9, 0.21]}
    for name, losses in {**every, "d-s1": [1.0, 0.2, 0.1]}.items():
        write_curve(tmp_path, name, {FD: [4.0, 3.0, 2.0, 1.0]})
        lines = [{"step": 10 * at, "images": 640 * at, "loss": loss} for at, loss in enumerate(losses)]
        log = (tmp_path / "demo" / name).resolve() / "metrics.jsonl"
        log.write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    text = checks(Evidence(read([tmp_path])).variants)
    assert text[:2] == [
        "None of 5 trainings diverged.",
        "2 of 5 trainings ended with more than twice its lowest loss, or that of another seed: `a a` seed 0, "
        "`a d` seed 0.",
    ]
