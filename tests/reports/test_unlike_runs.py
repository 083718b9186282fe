"""Reports of runs that differ in more than a table can rank: objectives, encoders, released weights, architectures."""

import json
from pathlib import Path
from typing import Any

import pytest
from lamabench.reports.compare import compare
from lamabench.reports.loss import loss
from lamabench.reports.moments import series_of
from lamabench.reports.names import axis_word, labels
from lamabench.reports.queries import timings
from lamabench.reports.runs import read
from lamabench.reports.seeds import seeds
from lamabench.reports.speed import measurements
from lamabench.reports.style import Look
from lamabench.reports.summary import summary
from run_folders import cost, drawn, made, scored, swept, trained, write

UNLIKE = "Losses are of different quantities and do not compare, because {} differ."
RELEASED = {"name": "small", "tensors": "f" * 64}


def edit(run: Path, **sections: Any) -> None:
    """Change sections of the configurations of a run's training and of its samples."""
    home = run.resolve()
    for path in (home / "config.json", *home.glob("samples/*/config.json")):
        info = json.loads(path.read_text(encoding="utf-8"))
        info["config"] |= sections
        path.write_text(json.dumps(info), encoding="utf-8")


@pytest.mark.parametrize(
    ("one", "two", "names"),
    [
        ({"objective": {"kind": "v"}}, {"objective": {"kind": "flow"}}, "objectives"),
        ({"encoder": {"kind": "pixels"}}, {"encoder": {"kind": "latents", "identity": "a"}}, "encoders"),
        ({"objective": {"kind": "flow"}, "data": {"size": 8}}, {"data": {"size": 9}}, "objectives and data"),
        ({"encoder": {"path": "a", "decoder": "b"}}, {"encoder": {"path": "c", "decoder": "d"}}, ""),
    ],
)
def test_losses_of_different_quantities_are_said_to_be(tmp_path: Path, one: Any, two: Any, names: str) -> None:
    for name, sections in (("a", one), ("b", two)):
        for seed in (0, 1):
            edit(
                write(tmp_path, f"{name}-s{seed}", [trained()], variant={"v": name}, seed=seed, curve=[1.0, 0.5]),
                **sections,
            )
    runs = read([tmp_path])
    overview = summary(runs)
    expected = [UNLIKE.format(names)] if names else []
    for table in (overview, seeds(overview)):
        assert [note for note in table.notes if note.startswith("Losses")] == expected
    figure: Any = loss(runs, overview)
    text = " ".join(figure._supxlabel.get_text().split()) if figure._supxlabel else ""
    assert ("do not compare" in text) == bool(names)


def test_sizes_of_two_architectures_of_one_family_are_two_lines(tmp_path: Path) -> None:
    """They have colours and markers of their own, so that no line goes from one to the other."""
    for place, (size, macs) in enumerate((("S", 1e9), ("B", 4e9))):
        for title, more in (("DiT", 0), ("Modern DiT", 1e6), ("U-ViT", 2e6)):
            family = "uvit" if title == "U-ViT" else "dit"
            name = f"{title.lower().replace(' ', '_').replace('-', '')}_{size.lower()}_2"
            write(tmp_path, name, [cost(int(macs + more))], family, f"{title}-{size}/2", {"model": name}, seed=place)
    overview = summary(read([tmp_path]))
    titles = {row["group"]: row["title"] for row in overview.rows}
    lines = {one.label: [titles[group] for group in one.groups] for one in series_of(overview.rows)}
    assert lines == {name: [f"{name}-S/2", f"{name}-B/2"] for name in ("DiT", "Modern DiT", "U-ViT")}
    look = Look(overview)
    by_title = {title: group for group, title in titles.items()}
    for size in ("S", "B"):
        groups = [by_title[f"{name}-{size}/2"] for name in lines]
        assert len({look.colour(group) for group in groups}) == len({look.marker(group) for group in groups}) == 3


def test_released_weights_beside_trainings(tmp_path: Path) -> None:
    """Their title is their name, how they were trained is not on record, and nobody is better than they are."""
    for seed in range(3):
        variant = {"model": "dit_demo", "train.lr": 1e-3, "train.steps": 600}
        write(tmp_path, f"own-s{seed}", [made(scored(9.0 + seed))], variant=variant, seed=seed)
        run = write(
            tmp_path, f"theirs-s{seed}", [made(scored(5.0 + seed))], title="small", variant={}, seed=seed, step=0
        )
        edit(run, released=RELEASED)
    assert set(labels(read([tmp_path])).values()) == {"DiT-demo", "small"}
    result = compare(tmp_path / "demo" / "own", tmp_path / "demo" / "theirs")
    (row,) = result.scores.rows
    assert (row["verdict"], row["b_step"]) == ("inconclusive", None)
    assert row["reason"] == "it is not on record how long released weights were trained"
    assert {one["field"]: one["b_value"] for one in result.configuration.rows} == {
        "train.batch_size": None,
        "train.steps": None,
    }


def test_pixels_of_latents(tmp_path: Path) -> None:
    """sd-vae's four channels and SD3's sixteen are of 8 × 8 pixels, VA-VAE's thirty-two of 16 × 16."""
    for channels in (3, 4, 16, 32):
        line = swept("train", 10.0, input_size=16)
        write(tmp_path, f"c{channels}", [line], variant={"variant": f"c{channels}"}, model={"in_channels": channels})
    assert {row["px"] for row in measurements(read([tmp_path]))} == {16, 128, 256}


@pytest.mark.parametrize(
    ("axis", "value", "words"),
    [
        ("objective.kind", "v", "v-prediction"),
        ("objective.kind", "flow", "flow matching"),
        ("objective.kind", "ddpm", "ddpm"),
        ("objective.times", "logit_normal", "logit_normal t"),
        ("encoder", "/data/caches/vae-ema/", "vae-ema"),
        ("sample.guide", "runs/train/dit_nano-digits-012", "guide dit_nano-digits-012"),
    ],
)
def test_words_of_axes(axis: str, value: str, words: str) -> None:
    assert axis_word(axis, value) == words


def test_channels_that_nothing_guides_make_no_column(tmp_path: Path) -> None:
    """Throughputs of sampling without guidance stand in one column, whatever number of channels would be guided."""
    for channels in (3, None):
        line = {**drawn(), "guidance_channels": channels}
        write(tmp_path, f"c{channels}", [line], variant={"sample.guidance_channels": channels}, seed=0)
    assert len(timings(read([tmp_path]), "sample")) == 1
