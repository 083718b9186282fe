"""Runs: variants of studies, whose models, trainings and samples may be shared, and single folders."""

import json
from pathlib import Path

import pytest
from lamabench.harness.run import create, write_study
from lamabench.kernels.errors import InputError
from lamabench.reports.queries import state_of, timings
from lamabench.reports.runs import Run, read
from run_folders import cost, drawn, everything, line, scored, summary_rows, swept, trained, write


def names(runs: list[Run]) -> list[tuple[str, str]]:
    return [(run.info["study"], run.info["name"]) for run in runs]


def test_a_root_a_study_a_link_and_a_folder_give_the_same_rows(three: Path) -> None:
    assert names(read([three])) == [("demo", "adm"), ("demo", "dit"), ("demo", "lamamba")]
    assert names(read([three / "demo"])) == names(read([three, three / "demo", three / "demo" / "dit"]))
    (link,), (folder,) = (read([path]) for path in (three / "demo" / "dit", (three / "demo" / "dit").resolve()))
    assert link.rows == folder.rows and link.metrics == folder.metrics and link.samples == folder.samples
    assert [row["kind"] for row in link.rows] == ["cost", "speed", "speed", "train", "sample", "score"]
    assert link.rows[0]["macs"] == 20_000_000 and link.last("score") == link.rows[-1]
    (model,) = read([next((three / "models").glob("dit-*"))])
    assert [row["kind"] for row in model.rows] == ["cost", "speed", "speed"]
    (samples,) = read([next((three / "demo" / "dit").glob("samples/*"))])
    assert samples.rows == link.rows and samples.samples == link.samples


def test_folders_that_no_study_names_are_read_too(three: Path) -> None:
    (three / "demo" / ".study.json").unlink()
    bare = read([three])
    # The models of trainings are not runs of their own.
    assert names(bare) == [("demo", "adm"), ("demo", "dit"), ("demo", "lamamba")]
    put = {"kind": "model", "key": "c" * 12, "study": "bench", "name": "x", "family": "dit", "model": "x", "title": "X"}
    create(three / "models" / "dit-cccccccccccc", {**put, "config": {"model": {"family": "dit", "depth": 1}}})
    assert names(read([three])) == [("bench", "x"), *names(bare)]
    assert names(read([three / "models"]))[0] == ("bench", "x")


def test_runs_say_what_their_study_is_about(tmp_path: Path) -> None:
    facts = {"question": "q?", "claim": "c", "answer": "", "budget": "", "axes": {"model.window_size": [8, 4, None]}}
    for name in ("one", "two"):
        write(tmp_path, name, [cost()], variant={"model.window_size": 8}, facts=facts)
    write(tmp_path, "old", [cost(2)], study="old")
    (tmp_path / "demo" / "two").resolve().joinpath("config.json").write_text("{")
    about = {run.info["name"]: (run.info["about"], bool(run.damage)) for run in read([tmp_path])}
    assert about == {"one": (facts, False), "two": (facts, True), "old": ({}, False)}
    (alone,) = read([(tmp_path / "demo" / "one").resolve()])
    assert alone.info["about"] == {}


def test_seeds_and_studies_share_a_model_and_a_training(tmp_path: Path) -> None:
    for seed in (0, 1):
        write(tmp_path, f"a-s{seed}", [trained(0.5 + seed), *([] if seed else [cost()])], seed=seed)
    assert [row["macs"] for row in summary_rows([tmp_path])] == [10_000_000] * 2
    first = json.loads((tmp_path / "demo" / ".study.json").read_text())["runs"][0]
    write_study(tmp_path, "other", "other.yaml", [{**first, "study": "other", "name": "one"}])
    rows = {row["study"]: row["final_loss"] for row in summary_rows([tmp_path]) if row["seed"] == 0}
    assert rows == {"demo": 0.5, "other": 0.5}


def test_a_variant_of_fewer_steps_is_a_moment_of_a_shared_training(tmp_path: Path) -> None:
    for steps, loss in ((2, 0.5), (4, 0.25)):
        lines = [trained(loss, steps), scored(10.0 / steps)]
        variant = {"train.steps": steps}
        write(tmp_path, f"long-{steps}", lines, step=steps, variant=variant, curve=[1.0] * 4, entry={"steps": steps})
    listing = json.loads((tmp_path / "demo" / ".study.json").read_text())
    (one, two), root = listing["runs"], tmp_path.resolve()
    for source in ("record.jsonl", "metrics.jsonl"):  # one training, with the records of both
        text = (root / one["training"] / source).read_text() + (root / two["training"] / source).read_text()
        (root / two["training"] / source).write_text(text)
    one["training"] = two["training"]
    (tmp_path / "demo" / ".study.json").write_text(json.dumps(listing))
    rows = {row["name"]: row for row in summary_rows([tmp_path])}
    values = {name: (row["final_loss"], row["FD-EffNetLite0-512"]) for name, row in rows.items()}
    assert values == {"long-2": (0.5, 5.0), "long-4": (0.25, 2.5)}
    assert [max(line["step"] for line in run.metrics) for run in read([tmp_path / "demo"])] == [2, 4]


def test_tables_take_the_furthest_moment(tmp_path: Path) -> None:
    for step, value in ((600, 2.0), (200, 6.0)):
        lines = [trained(), drawn(), scored(value)] if step == 600 else [drawn(), scored(value)]
        run = write(tmp_path, "one", lines, step=step)
    for path in (tmp_path, run, run.resolve()):
        (one,) = read([path])
        assert summary_rows([path])[0]["FD-EffNetLite0-512"] == 2.0
        assert [(row["value"], row["checkpoint_step"]) for row in one.earlier if row["kind"] == "score"] == [(6.0, 200)]


def test_samples_drawn_in_two_ways_are_two_rows(tmp_path: Path) -> None:
    for steps, value in ((50, 2.0), (250, 1.0)):
        write(tmp_path, "one", [drawn(steps), scored(value), *([cost()] if steps == 50 else [])], steps=steps)
    rows = {row["label"]: row for row in summary_rows([tmp_path])}
    values = {label: row["FD-EffNetLite0-512"] for label, row in rows.items()}
    assert values == {"50 sampling steps": 2.0, "250 sampling steps": 1.0}
    assert {row["macs"] for row in rows.values()} == {10_000_000}


def test_sets_of_one_way_are_one_row(tmp_path: Path) -> None:
    """A score's name has its number of images. The row shows the largest set."""
    for count in (40, 60, 50):
        write(tmp_path, "one", [drawn(), scored(float(count), metric=f"FD-{count}")], count=count)
    (run,), (row,) = read([tmp_path]), summary_rows([tmp_path])
    assert [row[f"FD-{count}"] for count in (40, 50, 60)] == [40.0, 50.0, 60.0]
    assert run.samples is not None
    assert json.loads((run.samples / "config.json").read_text())["config"]["sample"]["count"] == 60


def test_columns_of_two_references_have_their_names(tmp_path: Path) -> None:
    one, two = ({"protocol": name[0], "reference": name} for name in ("cifar10 test", "train"))
    write(tmp_path, "one", [drawn(), scored(1.0) | one, scored(2.0) | two])
    (row,) = summary_rows([tmp_path])
    assert (row["FD-EffNetLite0-512@cifar10-test"], row["FD-EffNetLite0-512@train"]) == (1.0, 2.0)
    write(tmp_path, "one", [scored(3.0) | one | {"protocol": "b"}])
    (row,) = summary_rows([tmp_path])
    assert [row[f"FD-EffNetLite0-512@{name}"] for name in "ctb"] == [1.0, 2.0, 3.0]


def test_columns_of_two_objectives_have_their_names(tmp_path: Path) -> None:
    one, two = ({"protocol": kind, "evaluation": {"objective": {"kind": kind}}} for kind in ("ddpm", "flow"))
    loss = {"metric": "held-out loss", "reference": "digits"}
    write(tmp_path, "one", [drawn(), scored(1.0) | loss | one, scored(2.0) | loss | two])
    (row,) = summary_rows([tmp_path])
    assert (row["held-out loss@ddpm"], row["held-out loss@flow"]) == (1.0, 2.0)
    write(tmp_path, "one", [scored(3.0) | loss | two | {"protocol": "f", "reference": "faces"}])
    (row,) = summary_rows([tmp_path])
    names = ("digits-ddpm", "digits-flow", "faces-flow")
    assert [row[f"held-out loss@{name}"] for name in names] == [1.0, 2.0, 3.0]


def test_references_whose_names_are_one_word_keep_their_columns(tmp_path: Path) -> None:
    one, two = {"protocol": "a", "reference": "cifar10 test"}, {"protocol": "b", "reference": "cifar10-test"}
    write(tmp_path, "one", [drawn(), scored(1.0) | one, scored(2.0) | two])
    (row,) = summary_rows([tmp_path])
    assert [row[f"FD-EffNetLite0-512@{protocol}"] for protocol in "ab"] == [1.0, 2.0]


def test_samples_of_an_earlier_version_were_drawn_in_the_same_way(tmp_path: Path) -> None:
    """Their folders do not say how labels and timesteps were chosen, and have no guide."""
    later = {"labels": "balanced", "timesteps": "even", "guidance_interval": None}
    none = {"guide": None, "guide_at": "last", "guide_weights": "ema", "guide_key": None}
    guide = {"guide": "/x/small-0123456789ab", "guide_at": 6, "guide_weights": "live", "guide_key": "0123456789ab"}
    write(tmp_path, "one", [drawn(50), scored(2.0)])
    write(tmp_path, "one", [drawn(50), scored(1.0)], guidance=2.0, **later, **none)
    labels = {row["label"] for row in summary_rows([tmp_path])}
    assert labels == {"DiT-demo", "DiT-demo, guidance 2"}
    write(tmp_path, "one", [drawn(50), scored(1.0)], guidance=2.0, **later, **guide)
    labels = {row["label"] for row in summary_rows([tmp_path])}
    guides = {"guidance 2, no guide", "guidance 2, guide small-0123456789ab at step 6 (live)"}
    assert labels == guides | {"no guide"}


def test_a_run_is_timed_with_the_backends_that_it_asks_for(tmp_path: Path) -> None:
    lines = [swept("train", 100.0), swept("train", 50.0, asked={"attention": "torch"})]
    for name, backend in (("plain", {"attention": "auto"}), ("torch", {"attention": "torch"})):
        variant = {"model": "dit_demo"}
        write(tmp_path, f"{name}-s0", lines, variant=variant, entry={"backend": backend}, trains=False)
    ((_, rows),) = timings(read([tmp_path]), "speed", "train").items()
    assert {run.info["name"]: row["images_per_s"] for run, row in rows.items()} == {"plain-s0": 100.0, "torch-s0": 50.0}


def test_samples_below_another_root_have_the_records_of_their_training(tmp_path: Path) -> None:
    home = write(tmp_path / "source", "one", [trained(0.125)], curve=[1.0]).resolve()
    info = json.loads((home / "config.json").read_text())
    copy = create(tmp_path / "copy" / "trainings" / home.name, {**info, "weights": str(home)})
    (run,) = read([copy])
    assert run.rows == read([home])[0].rows and run.metrics == [{"step": 1, "images": 64, "loss": 1.0}]


def test_a_run_that_has_not_started_is_a_row(tmp_path: Path) -> None:
    write(tmp_path, "one", [trained()])
    entry = json.loads((tmp_path / "demo" / ".study.json").read_text())["runs"][0]
    entry |= {"name": "two", "training": "trainings/dit-digits-000000000000", "model_folder": "models/dit-000000000000"}
    write_study(tmp_path, "demo", "demo.yaml", [entry], add=True)
    assert [(run.info["name"], run.info["id"], *state_of(run)) for run in read([tmp_path])][1] == (
        "two", "000000000000", "not started", ""
    )  # fmt: skip


@pytest.mark.parametrize("below", ["", "demo", "demo/a-00000000"])
def test_folders_of_the_earlier_layout_are_one_line(tmp_path: Path, below: str) -> None:
    folder = tmp_path / "demo" / "a-00000000"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"id": "0", "study": "demo", "name": "a", "config": {}}))
    with pytest.raises(InputError, match="a-00000000 was written by an earlier version of lamabench") as caught:
        read([tmp_path / below])
    assert "\n" not in str(caught.value)


def test_records_of_a_newer_version_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, "one", everything(1.0, 1.0))
    for path in tmp_path.glob("**/record.jsonl"):
        text = path.read_text()
        path.write_text(text + text.splitlines()[0].replace('"schema": 2', '"schema": 3') + "\n")
        with pytest.raises(
            InputError, match=r"record\.jsonl line \d has schema 3, of a newer version of lamabench; this"
        ):
            read([tmp_path])
        path.write_text(text)
    config = next(tmp_path.glob("models/*/config.json"))
    config.write_text(config.read_text().replace('"layout": 2', '"layout": 3'))
    with pytest.raises(InputError, match="was written by a newer version of lamabench: its layout is 3"):
        read([tmp_path])


def test_a_failed_score_counts_until_one_of_its_key_is_done(tmp_path: Path) -> None:
    failed = line("score", "failed", metric="prc", error="no weights of the network", key="k" * 12)
    lines = [{**scored(0.5, metric=f"{name}-X"), "key": "k" * 12} for name in ("Precision", "Recall")]
    write(tmp_path / "a", "one", [drawn(), failed])
    write(tmp_path / "b", "one", [drawn(), failed, *lines])
    assert state_of(read([tmp_path / "a"])[0]) == ("failed", "evaluate prc: no weights of the network")
    assert state_of(read([tmp_path / "b"])[0]) == ("done", "")
