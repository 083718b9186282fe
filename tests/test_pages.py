"""The pages name what there is: links, tables and figures, studies, and speeds as recorded."""

import csv
import io
import os
import re
import subprocess
from math import exp, floor, log, log10, sqrt
from pathlib import Path
from statistics import fmean, median, stdev

import numpy as np
import pytest
from lamabench.ablations import study as suite
from lamabench.harness.disk import read_lines
from lamabench.launch.cli import parser
from lamabench.launch.commands.bench import asked_of
from lamabench.reports.claims import claims
from lamabench.reports.contents import FIGURES, TABLES
from lamabench.reports.moments import curves, hours_of
from lamabench.reports.report import evidence_of, table_text
from lamabench.reports.runs import read
from lamabench.reports.timesteps import timesteps
from scipy.stats import t

ROOT = Path(__file__).parents[1]
METRIC = "FD-EffNetLite0-10k@cifar10-test"
FOLDERS = ("ablations", "baselines", "harness", "kernels", "launch", "models", "reports")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])


def rows_below(text: str, heading: str) -> list[list[str]]:
    """The cells of the first Markdown table below a heading, without its header. A table's own header is a heading."""
    table = re.search(r"(?:^\|.*\n)+", text[text.index(heading) :], re.MULTILINE)
    assert table is not None
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines()[2:]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file(page: Path) -> None:
    targets = re.findall(r"\]\((?!\w+://|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1500


def test_the_gallery_has_every_table_and_figure_in_order() -> None:
    text = (ROOT / "reports" / "README.md").read_text(encoding="utf-8")
    assert [name for row in rows_below(text, "## Tables") for name in re.findall(r"`([\w*]+)`", row[0])] == [*TABLES]
    assert re.findall(r"^\*\*`([\w*]+)`\*\*", text, re.MULTILINE) == [*FIGURES]


def test_the_list_of_studies_has_their_data_and_seeds() -> None:
    words = {"CIFAR-10": "cifar10", "a folder of yours": "folder", "digits": "digits", "none, speed only": "synthetic"}
    rows = rows_below((ROOT / "launch" / "README.md").read_text(encoding="utf-8"), "## Studies of the suite")
    assert sorted(row[0].strip("`") for row in rows) == sorted(suite.names())
    for name, _, data, seeds in rows:
        study = suite.load(name.strip("`"))
        assert seeds == (str(len(study.seeds)) if "train" in study.stages else ""), name
        if data == "a cache of latents of yours":
            assert study.base["encoder.kind"] == "latents" and "data" not in study.base, name
            continue
        assert study.base["data"] == words[data] if "data" in study.base else data == "none, speed only", name
        if words[data] in ("cifar10", "folder"):
            images = 640_000 if name.startswith("`cifar10_") else 25_600_000
            assert study.base["train.steps"] * 256 == images and study.base["model.dropout"] > 0, name


SPEEDS = ["batch_size", "images_per_s", "peak_memory_gib", "mfu", "speed_up", "flops_ratio", "realised", "memory_ratio",
          "memory_batch"]  # fmt: skip


@pytest.mark.parametrize(
    ("page", "heading", "records", "count", "columns"),
    [
        ("README.md", "## How fast they are", "bench-h200", 5, ["images_per_s", "speed_up", "flops_ratio", "realised"]),
        ("kernels/README.md", "## One H200", "bench-h200", 7, SPEEDS),
        ("kernels/README.md", "## One H100", "bench", 24, SPEEDS),
    ],
)
def test_speeds_are_those_of_the_records(page: str, heading: str, records: str, count: int, columns: list[str]) -> None:
    text = table_text(evidence_of([ROOT / "reports" / "records" / records]), "bench", "csv")
    recorded = [row for row in csv.DictReader(io.StringIO(text)) if row["compile"] != "eager"]
    rows = rows_below((ROOT / page).read_text(encoding="utf-8"), heading)
    assert len(rows) == count
    for title, pixels, mode, *numbers in rows:
        title, kept, _ = title.partition(", states kept")
        here = title, pixels.replace(",", ""), mode, bool(kept)
        (row,) = [
            row for row in recorded if (row["title"], row["px"], row["mode"], "cuda_kept" in row["backend"]) == here
        ]
        for number, key in zip(numbers, columns, strict=True):
            value = float(row[key]) * (100 if key == "mfu" else 1)
            assert f"{value:,.{len(number.partition('.')[2])}f}" == number, (*here, key)


def test_qualities_are_those_of_the_records() -> None:
    """The mean over three seeds and half its interval, of Student's t; minutes are the median. Paired differences
    are of the same scores."""
    runs = [run for run in read([ROOT / "reports" / "records" / "cifar10"]) if run.last("train", "done")]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = rows_below(readme, "## How good they are")
    assert {row[0] for row in rows} == {run.info["title"] for run in runs}
    values: dict[str, dict[int, float]] = {}
    noisy: dict[str, list[float]] = {}
    for title, params, macs, rate, minutes, quality, heldout in rows:
        at, seeds = {"title": title, "train.lr": float(rate)}.items(), {}
        for run in runs:
            if at <= {**run.info["variant"], "title": run.info["title"]}.items():
                seeds[run.info["seed"]] = run
        assert sorted(seeds) == [0, 1, 2], title
        values[title], losses, times = {}, [], []
        for seed, run in sorted(seeds.items()):
            scores = [row for row in run.rows if row["kind"] == "score" and row["images_seen"] == 640_000]
            for row in scores:
                if row["metric"] == "FD-EffNetLite0-10k" and row["reference"] == "cifar10 test":
                    values[title][seed] = row["value"]
            held_out = {row["value"]: row["by_timestep"]["937"] for row in scores if row["metric"] == "held-out loss"}
            losses += held_out
            noisy.setdefault(title, []).extend(held_out.values())
            if scores:
                hours, cost = hours_of(run, scores[0]), run.last("cost", "done")
                assert hours is not None and hours[1] == "NVIDIA H200, bfloat16" and cost is not None
                assert (f"{cost['params'] / 1e6:.3f}", f"{cost['macs'] / 1e9:.3f}") == (params, macs)
                times.append(60 * hours[0])
        for numbers, text, places in (([*values[title].values()], quality, 1), (losses, heldout, 5)):
            assert text == with_interval(numbers, places), title
        assert f"{median(times):.2f}" == minutes
    for one, other in (("T", "DiT-T/2"), ("S (dim 68)", "DiT-S/2"), ("T", "U-Net-T"), ("S (dim 68)", "U-Net-S")):
        differences = [values[f"LaMamba-Diff-{one}"][seed] - values[other][seed] for seed in (0, 1, 2)]
        words = to_two_digits(fmean(differences), t.ppf(0.975, 2) * stdev(differences) / sqrt(3))
        assert f"| LaMamba-Diff-{one[0]} than {other} | {words} |" in readme
    ratio = fmean(noisy["U-Net-T"]) / fmean(noisy["LaMamba-Diff-T"])
    small = fmean(noisy["DiT-T/2"]) / fmean(noisy["LaMamba-Diff-T"])
    words = f"at t = 937 the U-Net-T has {ratio:.1f} times the loss of LaMamba-Diff-T, DiT-T/2 {small:.1f} times"
    gallery = (ROOT / "reports" / "README.md").read_text(encoding="utf-8")
    assert words in " ".join(gallery.split())


def test_verdicts_are_those_of_the_records() -> None:
    """The README's pairs are those of two studies, with the differences and the verdict of each pair."""
    rows = rows_below((ROOT / "README.md").read_text(encoding="utf-8"), "| Is it better?")
    text = table_text(evidence_of([ROOT / "reports" / "records" / "cifar10"]), "verdicts", "csv")
    pairs = {
        tuple(row[side].removesuffix(" (dim 68)") for side in ("variant", "against")): row
        for row in csv.DictReader(io.StringIO(text))
        if row["study"] in ("cifar10_scale", "cifar10_block_mix")
    }
    assert len(rows) == len(pairs) == 6
    for name, *differences, verdict in rows:
        row = pairs[tuple(name.split(" than "))]
        for cell, key in zip(differences, ("difference", "flops_difference", "hours_difference"), strict=True):
            assert cell == to_two_digits(float(row[key]), float(row[f"{key}_ci95"])), (name, key)
        assert row["verdict"].removesuffix(" here") == verdict and row["n"] == "3"
        metrics = METRIC, "FD-EffNetLite0-2k@cifar10-test"
        assert (row["metric"], row["curve_metric"]) == metrics


def test_what_the_readme_leaves_open_is_so_in_the_records() -> None:
    """Held-out loss at equal GPU time, of the four pairs of scale, and that of the U-Net-T at another rate."""
    evidence = evidence_of([ROOT / "reports" / "records" / "cifar10"])
    pairs = [pair for claim in claims(evidence) if claim.study == "cifar10_scale" for pair in claim.pairs]
    assert [pair.others["hours"]["held-out loss"].verdict for pair in pairs] == ["worse"] * 4
    assert not any(pair.at("hours").verdict == "better" for pair in pairs)
    rates = evidence.studies["cifar10_lr"].variants
    group_of = {label: group for group, label in rates.labels.items()}
    names = group_of["U-Net-T, lr 8e-4"], group_of["LaMamba-Diff-T, lr 3.2e-3"]
    result = rates.difference("held-out loss", *names)
    assert result is not None and result.verdict == "better"


def test_flow_matching_is_as_in_the_records() -> None:
    """Two paired seeds of each, at equal images and equal GPU time; held-out losses by timestep are those of the last
    moment."""
    evidence = evidence_of([ROOT / "reports" / "records" / "cifar10"])
    pairs = [pair for claim in claims(evidence) if claim.study == "cifar10_objective" for pair in claim.pairs]
    by_labels, one = {pair.labels: pair for pair in pairs}, "LaMamba-Diff-T, flow matching"
    behind = []  # the U-Net-T at equal images and time, then DiT-T/2
    for other in ("U-Net-T", "DiT-T/2"):
        for budget in ("", "hours"):
            mean = by_labels[one, f"{other}, flow matching"].at(budget).mean
            assert mean is not None and mean.n == 2 and mean.half is not None
            behind.append(f"{mean.value:.0f} ± {mean.half:.0f}")
    unet, unet_hours, dit, dit_hours = behind
    words = f"{unet} behind the U-Net-T and {dit.removeprefix('-')} ahead of DiT-T/2 at equal images, "
    words += f"{unet_hours} and {dit_hours} behind at equal time. The {18 + len(behind)} intervals"
    assert dit[0] == "-" and words in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    figures = timesteps(evidence)
    assert isinstance(figures, dict)
    panel = figures["timesteps_cifar10_objective"].axes[1]
    assert panel.get_ylabel().replace("\n", " ") == f"held-out loss@flow over that of {one}"
    thick = [line.get_ydata() for line in panel.lines if line.get_marker() != "None"]
    spread = [max(each) / min(each) for each in zip(*thick, strict=True)]
    assert len(thick) == 3 and len(spread) == 8 and max(spread) < 1.02
    alphas = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    assert max(x for line in panel.lines for x in line.get_xdata()) == 0.9375
    at = np.abs(np.log(alphas / (1 - alphas)) - 2 * np.log(0.0625 / 0.9375)).argmin()
    gallery = " ".join((ROOT / "reports" / "README.md").read_text(encoding="utf-8").split())
    assert f"the eight times scored, of which the noisiest has the signal-to-noise ratio of DDPM's t = {at}." in gallery


def test_the_other_mixes_are_as_in_the_records() -> None:
    """Differences to ssm+window with Bonferroni's intervals of five variants, and over common seeds at the most GPU
    time that both spent, on straight lines between the logarithms of time and score."""
    variants = evidence_of([ROOT / "reports" / "records" / "cifar10"]).studies["cifar10_block_mix"].variants
    values = {variants.labels[group]: each for group, each in variants.values[METRIC].items()}
    assert len(values) == 6
    freedom = sum(len(each) - 1 for each in values.values())
    pooled = sum((len(each) - 1) * stdev(each.values()) ** 2 for each in values.values()) / freedom
    lines: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for run, rows in curves(variants.evidence.runs)["FD-EffNetLite0-2k@cifar10-test"].items():
        points = [(hours_of(run, row), row["value"]) for row in rows]
        known = sorted((log(hours[0]), log(value)) for hours, value in points if hours is not None)
        lines[variants.labels[run.group], run.info["seed"]] = known
    words, base = [], values["ssm+window"]
    for mix in ("global", "conv+window-of-like-parameters"):
        half = t.ppf(1 - 0.025 / 5, freedom) * sqrt(pooled * (1 / len(values[mix]) + 1 / len(base)))
        ahead = []
        for seed in values[mix]:
            two = [np.array(lines[name, seed]).T for name in ("ssm+window", mix)]
            most = min(times[-1] for times, _ in two)
            one, other = (exp(np.interp(most, *curve)) for curve in two)
            ahead.append(one - other)
        words.append(f"{fmean(values[mix].values()) - fmean(base.values()):.1f} ± {half:.1f} behind")
        words.append(f"{fmean(ahead):.0f} ahead")
    sentence = f"smaller global attention is {words[0]} ssm+window but {words[1]} at equal time, and a wider "
    sentence += f"conv+window {words[2]} and {words[3]}."
    assert sentence in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def with_interval(numbers: list[float], places: int) -> str:
    half = t.ppf(0.975, len(numbers) - 1) * stdev(numbers) / sqrt(len(numbers))
    return f"{fmean(numbers):.{places}f} ± {half:.{places}f}"


def to_two_digits(mean: float, half: float) -> str:
    """A signed difference and half its interval, to two digits of the latter."""
    places = max(0, 1 - floor(log10(half)))
    return f"{mean:+.{places}f} ± {half:.{places}f}"


def test_several_gpus_are_those_of_the_records() -> None:
    """Losses and memory of DDP and FSDP2, and the training that went on: its number of processes, losses and steps."""
    records = ROOT / "reports" / "records" / "several-gpus"
    text = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    words = " ".join(text.split())
    lines = {
        path.name: {line["step"]: line for line in read_lines(next(path.glob("trainings/*/metrics.jsonl")))}
        for path in records.glob("[!s]*/")
    }
    for name, folder in (("DDP", "ddp"), ("FSDP2", "fsdp")):
        (run,) = read([records / folder])
        row, last = run.last("train", "done"), lines[folder][60]
        assert row is not None and row["processes"] == 2
        losses = f"{lines[folder][10]['loss']:.4f}", f"{last['loss']:.4f}"
        cells = [name, row["compile"], *losses, f"{last['peak_memory_gib']:.1f}"]
        assert re.search(r"\| +".join(rf"{re.escape(cell)} *" for cell in cells), text), cells
    assert f"at {lines['fsdp-eager'][60]['images_per_s']:.0f} images/s with it on two" in words
    four = {line["step"]: line for line in read_lines(records / "four-then-two.jsonl")}
    pair = " ".join(f"{four[step]['images_per_s']:,.0f} and" for step in (30, 20)).removesuffix(" and")
    assert f"and at {pair} on four" in words and f"({four[40]['loss']:.4f} by step 40)" in words
    (run,) = read([records / "continued"])
    row = run.last("train", "done")
    assert row is not None
    assert [(part["from_step"], part.get("processes", 1)) for part in row["stretches"]] == [(0, 2), (200, 1)]
    assert f"went on from step 200, with {lines['continued'][250]['loss']:.4f} by step 250" in text
    (one,), (two,) = (read([records / f"sampled-on-{count}"]) for count in (1, 2))
    assert {row["key"] for run in (one, two) for row in run.rows if row["kind"] == "sample"} == {"30f99e024ef8"}


def calls_of_measurements(folder: Path, words: list[str], command: str) -> list[list[str]]:
    """The calls that measure.sh makes of `lamabench`, which writes its arguments down and then runs `command`."""
    (folder / "lamabench").write_text(f'#!/bin/sh\nprintf "%s|" "$@" >>"$CALLS"; echo >>"$CALLS"\n{command}\n')
    (folder / "lamabench").chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": f"{folder}/calls", "AHEAD": "1"}
    subprocess.run([ROOT / "kernels" / "measure.sh", *words], env=environment, check=True)
    return [line.split("|")[:-1] for line in (folder / "calls").read_text().splitlines()]


@pytest.mark.parametrize("words", [[], ["run.root=a folder's", "bench.seconds=1"]])
def test_the_script_of_measurements_compiles_each_model_ahead(words: list[str], tmp_path: Path) -> None:
    calls = calls_of_measurements(tmp_path, words, "")
    assert all(call[-len(words) :] == words for call in calls if words)
    ahead = [call[2:] for call in calls if call[1] == "--ahead"]
    assert calls[: len(ahead)] == [["bench", "--ahead", *call] for call in ahead]
    measured = [call[1:] for call in calls[len(ahead) :] if call[0] == "bench" and "max-autotune" not in str(call)]
    models = [[one for one in call if "=" not in one] for call in measured]
    assert [call[:1] for call in ahead] == [[model] for names in models for model in names]
    settings = [call[len(names) :] for call, names in zip(measured, models, strict=True) for _ in names]
    assert [call[1:] for call in ahead] == settings


def test_a_model_that_could_not_compile_beside_others_compiles_again(tmp_path: Path) -> None:
    fails = 'case "$*" in *"--ahead lamamba_s"*) [ "$(grep -c "ahead|lamamba_s" "$CALLS")" -gt 3 ];; esac'
    calls = calls_of_measurements(tmp_path, [], fails)
    ahead = [call[2:] for call in calls if call[1] == "--ahead"]
    assert calls[: len(ahead)] == [["bench", "--ahead", *call] for call in ahead]
    small = [call for call in ahead if call[0] == "lamamba_s"]
    assert len(small) == 5 and small[:2] == small[2:4] and small[4] == small[0] != small[1] and small[2:] == ahead[-3:]


def test_the_script_of_measurements_has_models_and_settings_that_there_are() -> None:
    script = [str(ROOT / "kernels" / "measure.sh"), "run.device=cpu"]
    lines = subprocess.run(script, env={**os.environ, "PRINT": "1"}, capture_output=True, text=True, check=True).stdout
    commands = [line.split()[1:] for line in lines.splitlines()]
    assert [words[0] for words in commands] == ["bench"] * 6 + ["bench-kernels"] * 2 + ["bench"] * 10
    for words in commands:
        args, settings = parser().parse_known_args(
            words
        )  # settings after an option are left, as `lamabench` takes them
        args.words += settings
        for config, task in asked_of(args, "bench"):
            assert config.run.device == "cpu" and task.plans
