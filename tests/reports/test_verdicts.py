"""Sentences that are computed from the numbers of a study."""

from pathlib import Path

import pytest
from lamabench.reports.evidence import Evidence
from lamabench.reports.runs import read
from lamabench.reports.verdicts import headline, sentences
from run_folders import Line, cost, line, made, put, scored, swept, trained, write
from scipy import stats

FD = "FD-EffNetLite0-512"
BASE = [20.0, 21.0, 19.5, 20.5, 22.0]
FOUR = [23.1, 24.3, 22.4, 23.8, 25.0]
EIGHT = [21.2, 22.1, 20.9, 21.6, 23.4]
SIXTEEN = [20.2, 20.9, 19.9, 20.1, 22.3]


def fill(root: Path, study: str, axis: str, values: dict[object, list[float]], **more: object) -> None:
    """A study along one axis, the base first."""
    for value, numbers in values.items():
        for seed, number in enumerate(numbers):
            variant = {axis: value, **more}
            lines = [cost(), made(scored(number))]
            write(
                root, f"{study}-{value}-{more}-s{seed}", lines, title="DiT-S/2", variant=variant, seed=seed, study=study
            )


def of(root: Path, study: str) -> Evidence:
    return Evidence(read([root / study]))


@pytest.fixture
def window(tmp_path: Path) -> Path:
    fill(tmp_path, "window", "model.window_size", {32: BASE, 4: FOUR, 8: EIGHT, 16: SIXTEEN})
    return tmp_path


def half(values: list[float], base: list[float]) -> float:
    low, high = stats.ttest_rel(values, base).confidence_interval(0.95)
    return (high - low) / 2


def test_variants_against_the_base(window: Path) -> None:
    first, best, *rest = sentences(of(window, "window"))
    low, high = stats.ttest_rel(SIXTEEN, BASE).confidence_interval(0.95)
    assert first == (
        "Of 4 variants, `window 4` and `window 8` are worse than the base `window 32` "
        f"({FD} +3.12 ± {half(FOUR, BASE):.2f} and +1.24 ± {half(EIGHT, BASE):.2f} over 5 seeds); "
        f"`window 16` is inconclusive (interval {low:+.2f} to {high:+.2f} over 5 seeds)."
    )
    assert best == (
        f"No variant is best in {FD}: `window 32` and `window 16` are not distinguishable (the interval includes 0)."
    )
    assert rest == [
        f"The best window in {FD} is the largest of 4 tried, 32, which is not distinguishable from 16 (the interval "
        "includes 0)."
    ]
    assert headline(of(window, "window")) == (
        f"Against the base `window 32` in {FD}, 2 of 3 variants are worse and 1 is inconclusive."
    )


def test_a_best_variant(tmp_path: Path) -> None:
    fill(tmp_path, "window", "model.window_size", {4: FOUR, 8: EIGHT, 16: [value - 5 for value in BASE]})
    (first, best, end) = sentences(of(tmp_path, "window"))
    assert first.startswith("Of 3 variants, `window 8` and `window 16` are better than the base `window 4` (")
    assert best == f"`window 16` is best in {FD}: 15.6 ± 1.2 before 21.8 ± 1.2 of `window 8`."
    assert end == f"The best window in {FD} is the largest of 3 tried, 16."
    assert headline(of(tmp_path, "window")) == f"`window 16` is best in {FD} (15.6 ± 1.2 over 5 seeds)."


def test_the_best_in_the_middle_of_an_axis_is_no_end(tmp_path: Path) -> None:
    fill(tmp_path, "guidance", "sample.guidance", {1.0: FOUR[:3], 1.5: BASE[:3], 4.0: EIGHT[:3]})
    assert sentences(of(tmp_path, "guidance"))[-1] == f"The best guidance in {FD} is 1.5 (of 3 tried)."


def test_the_best_value_is_that_of_common_seeds(tmp_path: Path) -> None:
    """Over the seed that all have, 4.0 is best, although the means over the seeds of each are lowest at 1.5."""
    fill(tmp_path, "guidance", "sample.guidance", {1.0: [9.0], 1.5: [8.0, 2.0, 2.0], 4.0: [7.0, 7.0, 7.0]})
    text = sentences(of(tmp_path, "guidance"))[-1]
    start = f"The best guidance in {FD} is the largest of 3 tried, 4, which is not distinguishable from 1.5 ("
    assert text.startswith(start)


def test_two_axes_have_an_end_for_each_line(tmp_path: Path) -> None:
    for mixers, shift in ((["ssm"], 0.0), (["conv"], 1.0), ([], 2.0)):
        values: dict[object, list[float]] = {2: FOUR, 4: EIGHT, 8: BASE}
        if not mixers:
            values = {2: BASE, 4: EIGHT, 8: FOUR}
        moved = {value: [number + shift for number in numbers[:3]] for value, numbers in values.items()}
        fill(tmp_path, "mine", "model.window_size", moved, **{"model.mixers": mixers})
    ends = [sentence for sentence in sentences(of(tmp_path, "mine")) if "tried" in sentence]
    assert ends == [
        f"The best window in {FD} is the largest of 3 tried, 8, with `ssm` and `conv`.",
        f"The best window in {FD} is the smallest of 3 tried, 2, with `no mixers`.",
    ]


def test_inconclusive_has_its_reason(tmp_path: Path) -> None:
    fill(tmp_path, "few", "model.depth", {1: [1.0, 2.0], 2: [5.0, 7.0], 3: [8.0]})
    assert sentences(of(tmp_path, "few"))[0] == (
        f"Of 3 variants, none is better or worse than the base `depth 1` in {FD}: `depth 2` is inconclusive (2 common "
        "seeds, and 3 are needed; difference +4.5 ± 6.4); `depth 3` is inconclusive (1 common seed, and 3 are needed; "
        "difference +7.000)."
    )
    assert headline(of(tmp_path, "few")) == (
        f"Inconclusive: no variant is better or worse than the base `depth 1` in {FD} (2 common seeds, and 3 are "
        "needed; 1 common seed, and 3 are needed)."
    )
    for seed, number in enumerate(BASE):
        for name, step, shift in (("short", 300, 9.0), ("long", 600, 0.0)):
            lines = [made(scored(number + shift))]
            entry: Line = {"steps": 600}
            write(tmp_path, f"{name}-s{seed}", lines, variant={"v": name}, seed=seed, step=step, study="l", entry=entry)
        write(
            tmp_path,
            f"long-s{seed}",
            [made(scored(1.0), steps=2)],
            variant={"v": "long"},
            seed=seed,
            study="l",
            steps=2,
        )
    first = sentences(of(tmp_path, "l"))[0]
    assert first.startswith("Of 3 variants, none is better or worse than the base `v short` in ")
    assert first.endswith(
        "`v long, 50 sampling steps` and `v long, 2 sampling steps` are inconclusive (the weights are of different "
        "steps; differences -9.000 ± 0 and -28.6 ± 1.2)."
    )


def test_what_is_missing(tmp_path: Path) -> None:
    fill(tmp_path, "w", "model.window_size", {4: FOUR[:3], 8: EIGHT[:3]})
    failed = line("train", "oom", error="tried 3 GiB")
    more = {3: [cost()], 4: [failed], 5: [made(scored(20.0)), failed]}
    for seed, lines in more.items():
        write(tmp_path, f"w-8-s{seed}", lines, title="DiT-S/2", variant={"model.window_size": 8}, seed=seed, study="w")
    write(tmp_path, "w-2-s0", [cost()], title="DiT-S/2", variant={"model.window_size": 2}, seed=0, study="w")
    write(tmp_path, "w-2-s1", [trained()], title="DiT-S/2", variant={"model.window_size": 2}, seed=1, study="w")
    (tmp_path / "w" / "w-4-{}-s1").resolve().joinpath("record.jsonl").write_text("junk\n")
    first, *rest = sentences(of(tmp_path, "w"))
    absent, early = (sentence for sentence in rest if "planned run" in sentence)
    assert first.endswith("; `window 2` has no score.")
    assert absent == (
        f"5 of 11 planned runs have no {FD}: 1 unreadable (`w-4-{{}}-s1`); 2 not started (`window 8` seed 3 and "
        "`window 2` seed 0); 1 oom (`window 8` seed 4); 1 trained (`window 2` seed 1)."
    )
    assert early == "1 of 11 planned runs has a score and is not done: 1 oom (`window 8` seed 5)."


def test_speed(tmp_path: Path) -> None:
    """Speed over that of the base; of three sizes the crossing; and of a folder of benchmarks over that of DiT-XL/2."""
    speeds = {"dit": (100.0, 40.0, 4.0), "two": (50.0, 44.0, 10.0), "three": (144.0, None, None)}
    for name, numbers in speeds.items():
        timings = [
            swept("train", number, input_size=side, flops=26_000_000 if name == "dit" else 10_000_000)
            for number, side in zip(numbers, (16, 32, 64), strict=True)
            if number
        ]
        write(tmp_path, name, timings, title=name.upper(), variant={"model": f"{name}_xl_2"}, study="speed")
    two, three = sentences(of(tmp_path, "speed"))[:2]
    assert two == (
        "In training, `TWO` overtakes `DIT` at 29 px (interpolated); it is 0.500 to 2.50 times as fast, bfloat16, "
        "NVIDIA H100 80GB HBM3."
    )
    assert three == (
        "`THREE` is 1.44 times as fast as `DIT` in training at 16 px (of 2.60 times fewer FLOPs), bfloat16, "
        "NVIDIA H100 80GB HBM3."
    )
    assert headline(of(tmp_path, "speed")) == two
    for name in ("dit", "three"):
        info: Line = {"kind": "model", "key": f"{name:x<12}", "study": "bench", "name": name, "family": name}
        info |= {"model": f"{name}_xl_2", "title": name.upper(), "seed": 0, "variant": {}, "config": {"model": {}}}
        rate = 50.0 if name == "dit" else 100.0
        put(
            tmp_path / "alone" / "models" / name,
            info,
            [swept("train", rate, disturbed="load 9" if rate > 50 else None)],
        )
    (alone,) = sentences(Evidence(read([tmp_path / "alone"])))
    assert alone == (
        "`THREE` is 2.00 times as fast as `DIT` in training at 8 px (with as many FLOPs), bfloat16, NVIDIA H100 "
        "80GB HBM3, disturbed by other work."
    )


def test_many_variants_are_counted_and_not_all_named(tmp_path: Path) -> None:
    fill(tmp_path, "many", "model.depth", {depth: [value + depth for value in BASE[:3]] for depth in range(1, 15)})
    first, best, end = sentences(of(tmp_path, "many"))
    assert first == (
        "Of 14 variants, `depth 2`, `depth 3`, `depth 4`, `depth 5` and 9 more are worse than the base `depth 1` "
        f"({FD} +1.00 to +13.0 over 3 seeds)."
    )
    assert best.startswith("`depth 1` is best") and end == f"The best depth in {FD} is the smallest of 14 tried, 1."
    assert headline(of(tmp_path, "many")).startswith("The base `depth 1` is best")


def test_nothing_on_record(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path, name, [cost()], variant={"v": name})
    assert sentences(of(tmp_path, "demo")) == [
        "2 of 2 planned runs have no score: 2 not started (`v a` seed 0 and `v b` seed 0)."
    ]
    assert headline(of(tmp_path, "demo")) == "No scores yet."
    fill(tmp_path, "rest", "v", {"b": BASE[:3], "c": EIGHT[:3]})
    listing = tmp_path / "rest" / ".study.json"
    listing.write_text(listing.read_text().replace('"file": "rest.yaml"', '"file": null'))
    assert headline(of(tmp_path, "rest")).startswith("`v b` is best") or "no study" in headline(of(tmp_path, "rest"))


def test_the_set_of_most_images_has_sentences(tmp_path: Path) -> None:
    """Of one network and reference. Another reference has sentences of its own."""
    for name, value in (("a", 4.0), ("b", 3.0)):
        few = scored(value, "p2", "FD-EffNetLite0-2k") | {"count": 2000}
        most = scored(value, "p3", "FD-EffNetLite0-10k") | {"count": 10_000}
        write(tmp_path, name, [cost(), made(few), made(most), made(few | {"reference": "other", "protocol": "p4"})],
              variant={"v": name})  # fmt: skip
    told = {word for text in sentences(of(tmp_path, "demo")) for word in text.split() if word.startswith("FD-")}
    assert {word.strip(":;,.") for word in told} == {"FD-EffNetLite0-10k", "FD-EffNetLite0-2k@other"}
