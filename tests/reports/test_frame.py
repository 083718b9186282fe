"""Records as a pandas frame."""

from pathlib import Path

import lamabench.reports as reports
import pandas as pd
import pytest
from lamabench.kernels.errors import InputError
from run_folders import WHERE, cost, drawn, line, made, scored, swept, timed, trained, write


def write_runs(root: Path) -> Path:
    """Two seeds of one variant, scored at two moments."""
    for seed in (0, 1):
        speed = timed("train", 64.0, peak_memory_gib=2.5, mfu=0.25)
        lines = [trained(), drawn(), scored(2.0 + seed), *([] if seed else [cost(), speed])]
        variant = {"train.lr": 0.1}
        write(root, f"a-s{seed}", lines, variant=variant, seed=seed)
        write(
            root,
            f"a-s{seed}",
            [drawn(), {**scored(6.0 + seed), "images_seen": 200}],
            variant=variant,
            seed=seed,
            step=200,
        )
    return root


def test_one_row_per_score_speed_and_cost(tmp_path: Path) -> None:
    frame = reports.load(write_runs(tmp_path))
    assert list(frame["kind"]) == ["score"] * 4 + ["speed", "cost"]  # those of the model appear once for both seeds
    scores = frame[frame["kind"] == "score"]
    values = {(row.seed, row.checkpoint_step): row.value for row in scores.itertuples()}
    assert values == {(0, 600): 2.0, (1, 600): 3.0, (0, 200): 6.0, (1, 200): 7.0}
    assert set(scores["label"]) == {"DiT-demo"} and set(scores["variant"]) == {"train.lr=0.1"}
    assert (scores["sample_method"] == "ddim").all() and (scores["sample_steps"] == 50).all()
    assert list(scores[scores["images_seen"].notna()]["value"]) == [6.0, 7.0]
    speed, counted = frame[frame["kind"] == "speed"].iloc[0], frame[frame["kind"] == "cost"].iloc[0]
    assert (speed["images_per_s"], speed["p50_ms"], speed["peak_memory_gib"], speed["mfu"]) == (64.0, 250.0, 2.5, 0.25)
    assert speed["backend"] == "attention=sdpa" and pd.isna(speed["seed"]) and speed["device"] == WHERE["device"]
    assert (counted["params"], counted["macs"], counted["mlp_macs"]) == (1_000_000, 10_000_000, 4_000_000)
    assert counted["commit"] == "a" * 40 and (frame["state"] == "done").all()
    assert frame["key"].is_unique and not {"operator", "std", "parts", "provenance"} & set(frame.columns)


def test_protocols_are_hashes_and_words(tmp_path: Path) -> None:
    row = {
        **made(scored(2.0)),
        "evaluation": {"network": "x", "weights": "ab" * 32, "reference": {"count": 3}, "y": None},
    }
    write(tmp_path, "one", [drawn(), {**row, "floor": 1.5, "note": "few"}, scored(3.0, metric="KID-X")])
    new, old = reports.load(tmp_path).itertuples()
    assert new.evaluation == "network x, weights abababababab, reference (count 3)" and new.protocol == "p1"
    assert new.generation == "50 ddim steps, clipped" and new.generation_protocol == "g50"
    assert (new.floor, new.note) == (1.5, "few")
    assert pd.isna(old.evaluation) and pd.isna(old.generation) and pd.isna(old.generation_protocol)


def test_the_newest_row_of_a_key_counts_and_failures_are_rows(tmp_path: Path) -> None:
    full = {**swept("train", 1.0, 128), "state": "oom", "error": "full"}
    write(tmp_path, "one", [swept("train", 9.0), swept("train", 10.0), full, line("cost", "failed", error="no")])
    frame = reports.load([tmp_path / "demo"])
    assert [(row.kind, row.state) for row in frame.itertuples()] == [
        ("speed", "done"), ("speed", "oom"), ("cost", "failed")
    ]  # fmt: skip
    assert frame["images_per_s"].iloc[0] == 10.0 and list(frame["error"].iloc[1:]) == ["full", "no"]


def test_an_error_that_names_a_file_whose_bytes_are_not_utf8_is_a_row(tmp_path: Path) -> None:
    write(tmp_path, "one", [line("cost", "failed", error="no file d\udcff"), swept("train", 9.0)], title="DiT-β")
    frame = reports.load([tmp_path / "demo"])
    assert list(frame["error"].dropna()) == ["no file d\\udcff"] and set(frame["title"]) == {"DiT-β"}


def test_every_column_is_in_the_docstring_or_in_the_page_of_records(tmp_path: Path) -> None:
    from lamabench.harness import record

    frame = reports.load(str(write_runs(tmp_path)))
    fields = {name for row in record.ROWS.values() for name in record.row(row.kind, state="failed").flat()}
    words = set((reports.load.__doc__ or "").replace("`", " ").replace(",", " ").split())
    parts = {f"{part}_{what}" for part in ("ssm", "scan", "attention", "mlp") for what in ("params", "macs", "flops")}
    assert [name for name in frame.columns if name not in fields | words | parts] == []


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        reports.load(tmp_path / "nowhere")
