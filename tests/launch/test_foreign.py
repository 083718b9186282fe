"""Protocols of generation, and scores of other people's samples, as the commands tell and record them."""

import json

import lamabench.reports as reports
import numpy as np
import pytest
from lamabench.ablations.study import load, names
from lamabench.harness.disk import write_lines
from lamabench.harness.keys import config_of
from lamabench.harness.progress import Progress
from lamabench.harness.record import read_records
from lamabench.harness.run import read_info
from lamabench.harness.scoring import foreign
from lamabench.harness.scoring.networks import sha256
from lamabench.harness.scoring.protocol import protocol_hash
from lamabench.harness.scoring.score import score_set
from lamabench.launch import plan
from lamabench.launch.cli import main
from lamabench.launch.compose import compose
from PIL import Image

DATA = ["data=digits", "data.size=8", "run.device=cpu"]
TRAIN = [
    "train", "model=dit_nano", "model.depth=1", "model.hidden_size=16", "model.num_heads=2", "train.steps=2",
    "train.batch_size=2", "train.precision=float32", *DATA,
]  # fmt: skip
SCORE = ["evaluate.metrics=[fd]", "evaluate.reference_count=20"]
PLAIN = ["sample.count=12", "sample.method=ddim", "sample.steps=2"]
GUIDED = ["sample.count=12", "sample.steps=3", "sample.guidance=4", "sample.clip=true", "sample.labels=random"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a training and two sets of samples, and the images of one of them in a file and in a folder."""
    folder = tmp_path_factory.mktemp("foreign")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        assert main(TRAIN) == 0
        (run,) = (folder / "runs" / "train").glob("dit_nano-*")
        assert main(["sample", str(run), *PLAIN, "--to", "theirs.npz"]) == 0
        assert main(["sample", str(run), *GUIDED, "--to", "theirs/deep"]) == 0
        yield folder


@pytest.fixture
def command(place, capsys):
    """Runs a command: (exit code, output, errors)."""
    capsys.readouterr()

    def run(*words):
        code = main(list(map(str, words)))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def rows_of(command, *words):
    code, out, err = command("evaluate", *words, "--json")
    assert code == 0, err
    return json.loads(out)


def test_two_ways_of_drawing_are_told_apart(place, command):
    """One checkpoint, one evaluation protocol, two generation protocols: on the terminal, as JSON and on record."""
    (run,) = (place / "runs" / "train").glob("dit_nano-*")
    plain, guided = (rows_of(command, run, *drawn, *SCORE)[0] for drawn in (PLAIN, GUIDED))
    assert plain["protocol"] == guided["protocol"] and plain["evaluation"] == guided["evaluation"]
    assert plain["evaluation"]["metric"] == "fd" and plain["evaluation"]["count"] == 12
    assert plain["generation_protocol"] != guided["generation_protocol"]
    assert guided["generation"] == {
        "objective": "ddpm", "schedule": "linear", "sampler": "ancestral", "steps": 3, "timesteps": "even",
        "guidance": 4.0, "guidance_channels": None, "clip": True, "labels": "random", "weights": "ema",
        "precision": "float32", "encoder": "pixels",
    }  # fmt: skip
    for row, drawn, phrase in (
        (plain, PLAIN, "2 ddim steps, no guidance, balanced labels, EMA, float32"),
        (guided, GUIDED, "3 ancestral steps, guidance 4, clipped, random labels, EMA, float32"),
    ):
        assert row["generation_protocol"] == protocol_hash(row["generation"])
        out = command("evaluate", run, *drawn, *SCORE)[1]
        assert f"Generation {row['generation_protocol']}: {phrase}\n" in out
        assert f"Protocol {row['protocol']}: 12 samples against 20 digits, features efficientnet_lite0\n" in out
        (score,) = [
            one for one in read_records(run / "samples" / row["samples"] / "record.jsonl") if one.key == row["key"]
        ]
        assert {name: getattr(score, name) for name in row if name.startswith(("gen", "prot", "eval"))} == {
            name: value for name, value in row.items() if name.startswith(("gen", "prot", "eval"))
        }


def test_the_protocol_is_of_the_samples_and_not_of_the_command(place, command):
    (run,) = (place / "runs" / "train").glob("dit_nano-*")
    samples = rows_of(command, run, *PLAIN, *SCORE)[0]["samples"]
    config = config_of(run, read_info(run))
    config.sample.guidance, config.sample.method, config.sample.steps = 9.0, "ancestral", 77
    config.evaluate.metrics, config.evaluate.reference_count = ["fd"], 20
    (line,) = score_set(run / "samples" / samples, run, 0, config, ["fd"], Progress())
    assert [line["generation"][name] for name in ("sampler", "steps", "guidance")] == ["ddim", 2, 1.0]


def test_scores_of_an_earlier_version_are_shown_with_how_their_samples_were_drawn(place, command):
    (run,) = (place / "runs" / "train").glob("dit_nano-*")
    before = rows_of(command, run, *PLAIN, *SCORE)[0]
    record = run / "samples" / before["samples"] / "record.jsonl"
    whole = record.read_bytes()
    later = ("generation", "generation_protocol", "evaluation")
    lines = [{k: v for k, v in json.loads(line).items() if k not in later} for line in whole.splitlines()]
    write_lines(record, lines)
    row = rows_of(command, run, *PLAIN, *SCORE)[0]
    assert row["generation"] == before["generation"] and row["evaluation"] is None
    assert row["generation_protocol"] == before["generation_protocol"]
    record.write_bytes(whole)


def test_scores_of_a_name_are_by_the_same_weights(place, command, monkeypatch):
    """Because keys do not have the path of weights. Nothing is computed or written for others."""
    for name in ("mine", "other"):
        (place / f"{name}.pth").write_bytes(name.encode())
    line = {"request": "fd", "metric": "FD", "value": 1.0, "count": 12, "protocol": "0" * 8}
    line["evaluation"] = {"weights": sha256(place / "mine.pth")}
    monkeypatch.setattr(foreign, "evaluate", lambda *_, **__: iter([line]))
    inception = [*DATA, *SCORE, "evaluate.features=inception_v3"]
    words = ["theirs.npz", "--as", "weighed", *inception, "run.root=apart"]
    rows_of(command, *words, "evaluate.features_path=mine.pth")
    (folder,) = (place / "apart" / "foreign").glob("weighed-*")
    before = (folder / "record.jsonl").read_bytes()
    code, out, err = command("evaluate", *words, "evaluate.features_path=other.pth")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "other.pth has other weights" in err and "another name (--as) keeps both" in err
    assert (folder / "record.jsonl").read_bytes() == before
    assert len(rows_of(command, *words, "evaluate.features_path=mine.pth")) == 1
    assert (folder / "record.jsonl").read_bytes() == before


def test_their_samples_are_a_row(place, command, monkeypatch):
    """The same images in a file and in a folder score the same; only missing scores are computed; the row is in the
    tables of the root and of the study that was named."""
    asked = []

    def evaluate(*words, **options):
        asked.append(list(words[3]))
        return original(*words, **options)

    original = foreign.evaluate
    monkeypatch.setattr(foreign, "evaluate", evaluate)
    (run,) = (place / "runs" / "train").glob("dit_nano-*")
    ours = rows_of(command, run, *GUIDED, *SCORE)[0]
    theirs = rows_of(command, "theirs", "--as", "edm", *DATA, *SCORE)[0]
    assert theirs["value"] == pytest.approx(ours["value"], rel=1e-6) and theirs["protocol"] == ours["protocol"]
    assert theirs["generation"] == {"source": "unknown"} and theirs["generation_protocol"] is None
    (folder,) = (place / "runs" / "foreign").glob("edm-*")
    assert read_info(folder)["kind"] == "foreign" and read_info(folder)["count"] == 12

    more = ["evaluate.metrics=[fd,prc]", SCORE[1]]
    stated = ["--generation", "sampler=heun,steps=18", "--study", "train"]
    rows = rows_of(command, "theirs", "--as", "edm", *DATA, *more, *stated)
    assert asked == [["fd"], ["prc"]] and len(rows) == 3
    assert all(row["generation"] == {"sampler": "heun", "steps": 18} for row in rows), "of earlier scores too"
    code, out, _ = command("evaluate", "theirs", "--as", "edm", *DATA, *more)
    assert code == 0 and "18 heun steps\n" in out and len(asked) == 2, "what was stated stays"
    size = (folder / "record.jsonl").stat().st_size
    rows_of(command, "theirs", "--as", "edm", *DATA, *more)
    assert (folder / "record.jsonl").stat().st_size == size

    rows_of(command, "theirs.npz", "--as", "other", *DATA, *SCORE)
    for root, expected in (("runs", ["edm", "other"]), ("runs/train", ["edm"])):
        frame = reports.load(root)
        assert sorted(set(frame[frame["family"] == "foreign"]["label"])) == expected
        values = frame[(frame["label"] == "edm") & (frame["metric"] == theirs["metric"])]["value"]
        assert values.tolist() == [theirs["value"]], "once"
        assert command("report", root, "--out", f"out/{root}")[0] == 0
        assert "| edm " in (place / "out" / root / "summary.md").read_text()
    assert len(reports.load(folder)) == 3
    code, _, err = command("evaluate", folder)
    assert code == 2 and "is the folder of a set of other people's samples; name that of a training" in err
    assert command("sweep", "prune", "demo", "--yes")[0] == 0 and folder.is_dir()
    assert command("sweep", "status", "demo")[0] == 0


def test_sets_of_one_name_are_no_seeds(place, command):
    for number in (1, 2):
        (place / f"many{number}").mkdir()
        for image in range(4):
            Image.fromarray(np.full((8, 8), 9 * image * number, np.uint8)).save(
                place / f"many{number}" / f"{image}.png"
            )
        rows_of(command, f"many{number}", "--as", "many", *DATA, *SCORE, "run.root=elsewhere")
    assert command("report", "elsewhere", "--out", "out/many")[0] == 0
    assert not (place / "out" / "many" / "seeds.md").exists()
    labels = set(reports.load("elsewhere")["label"])
    assert len(labels) == 2 and all(label.startswith("many [") for label in labels)


def test_scores_against_other_data_do_not_count(place, command):
    """The key has the name of the data and not their contents, which the record has."""
    values = []
    for seed in (1, 2, 2):
        images = np.random.default_rng(seed).integers(0, 99 * seed, (12, 8, 8, 1), np.uint8)
        np.savez(place / "own.npz", images=images, labels=np.arange(12) % 10)
        words = ["data=npz", "data.path=own.npz", "data.size=8", "data.channels=1", "data.num_classes=10"]
        values.append(rows_of(command, "theirs.npz", "--as", "moved", *words, "evaluate.metrics=[fd]")[0]["value"])
    assert values[0] != values[1] == values[2]


def test_subsets_are_drawn_alike_for_all_seeds_of_training(study):
    assert compose(["model=dit_nano", "data=digits", "seed=3"])[0].evaluate.seed == 0
    runs = plan.plan(study(seeds=(0, 1, 2)))
    assert [(run.config.seed, run.config.evaluate.seed) for run in runs] == [(0, 0), (1, 0), (2, 0)]
    settings = {setting.key for name in names() for one in load(name).expand() for setting in one.overrides}
    assert "seed" in settings and "evaluate.seed" not in settings
