"""Records of a study go from one root to another, where the study is done and can be reported."""

import json
import tarfile

import pytest
from lamabench.ablations.study import Study
from lamabench.harness.progress import Quiet
from lamabench.harness.stages import execute
from lamabench.launch import archive
from lamabench.launch.plan import pieces, plan, write
from run_folders import drawn, scored, trained
from run_folders import write as write_run

SMALL = {"model": "dit_nano", "model.depth": 1, "model.hidden_size": 16, "model.num_heads": 2, "data": "digits",
         "data.size": 8, "train.batch_size": 4, "train.precision": "float32", "train.steps": 2, "sample.count": 20,
         "sample.method": "ddim", "sample.steps": 2, "evaluate.metrics": ["prc"], "evaluate.reference_count": 12,
         "run.device": "cpu"}  # fmt: skip
STAGES = ["cost", "train", "sample", "evaluate"]


def study(root, seeds):
    return Study("s", "?", base={**SMALL, "run.root": str(root)}, axes={"train.lr": [1e-3]}, seeds=seeds, stages=STAGES)


def states(root):
    return {run.name: run.state() for run in plan(study(root, [0, 1, 2]))}


def test_archives_of_two_machines_make_one_root(tmp_path):
    """Each machine did one seed, and the second began another, which is left out."""
    files = []
    for machine, seed in enumerate((0, 1)):
        root, files = tmp_path / f"machine{machine}", [*files, tmp_path / f"{machine}.tar.gz"]
        runs = plan(study(root, [0, 1, 2]))
        write(study(root, [0, 1, 2]), runs)
        for piece in pieces([run for run in runs if run.config.seed == seed]):
            execute(piece.task, Quiet())
        begun = next(run for run in runs if run.config.seed == 2).training
        if seed == 1:
            begun.path.mkdir()
            (begun.path / "metrics.jsonl").write_text("")
        left = archive.pack(root, files[-1])
        assert left == ([f"trainings/{begun.path.name}: is not trained"] if seed else [])
    home = tmp_path / "home"
    home.mkdir()
    assert [line.split("/")[0] for line in archive.unpack(home, files)] == ["models"]  # both had its cost
    assert states(home) == {"0.001-s0": "done", "0.001-s1": "done", "0.001-s2": "planned"}
    names = {path.name for path in home.rglob("*") if path.is_file()}
    assert names <= {"config.json", "record.jsonl", "metrics.jsonl", "real.npz", "grid.png", ".study.json"}
    assert len([*home.rglob("grid.png")]) == 2
    listing = json.loads((home / "s" / ".study.json").read_text())
    assert listing["study"] == "s" and [run["seed"] for run in listing["runs"]] == [0, 1, 2]
    again = archive.unpack(home, files)
    assert len(again) == 3 and all(line.endswith("left as it was") for line in again)


def test_no_weights_and_nothing_outside_the_root(tmp_path):
    with pytest.raises(archive.InputError, match="has no study"):
        archive.pack(tmp_path, tmp_path / "x.tar.gz")
    evil, home = tmp_path / "evil.tar.gz", tmp_path / "home"
    (tmp_path / "f").write_text("x")
    home.mkdir()
    with tarfile.open(evil, "w:gz") as file:
        file.add(tmp_path / "f", "../outside")
    with pytest.raises(archive.InputError, match=r"cannot unpack .*evil\.tar\.gz"):
        archive.unpack(home, [evil])
    assert not (tmp_path / "outside").exists()


def root_of(path):
    """A root with a study of two trainings, each with a set of scored samples whose images are gone."""
    for name in ("a", "b"):
        write_run(path, name, [trained(), drawn(), scored(1.0)], count=2, variant={"model": f"dit_{name}"})
    return path


def records(root):
    return len([*root.rglob("record.jsonl")])


def test_what_was_unpacked_in_part_is_unpacked_again(tmp_path, monkeypatch):
    """A training with a record is left as it is, so that its record is written after its samples."""
    root, file, home = root_of(tmp_path / "root"), tmp_path / "x.tar.gz", tmp_path / "home"
    archive.pack(root, file)
    home.mkdir()
    written, write = [], archive.write_atomically

    def killed(path, data):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, data)

    monkeypatch.setattr(archive, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        archive.unpack(home, [file])
    monkeypatch.setattr(archive, "write_atomically", write)
    assert archive.unpack(home, [file]) == [] and records(home) == 4
    assert len(archive.unpack(home, [file])) == 2


def test_a_damaged_archive_is_an_error_before_anything_is_written(tmp_path):
    file, home = tmp_path / "x.tar.gz", tmp_path / "home"
    archive.pack(root_of(tmp_path / "root"), file)
    home.mkdir()
    whole = file.read_bytes()
    for part in (whole[: len(whole) // 2], whole[:600] + bytes(300) + whole[900:], b"x"):
        file.write_bytes(part)
        with pytest.raises(archive.InputError, match=r"cannot unpack .*x\.tar\.gz: "):
            archive.unpack(home, [file])
        assert not [*home.iterdir()]


def test_a_damaged_record_leaves_out_its_training_alone(tmp_path):
    root, file = root_of(tmp_path / "root"), tmp_path / "x.tar.gz"
    first, second = sorted((root / "trainings").iterdir())
    with (first / "record.jsonl").open("a") as record:
        record.write('{"kind": "trian"}\n')
    line = archive.pack(root, file)[0]
    assert line.startswith(f"trainings/{first.name}: ") and "is not a record of lamabench" in line
    with tarfile.open(file) as packed:
        assert {name.split("/")[1] for name in packed.getnames()} == {second.name, ".study.json"}


def test_a_set_without_scores_is_left_out_alone_and_comes_with_the_next_archive(tmp_path):
    root, home, files = root_of(tmp_path / "root"), tmp_path / "home", [tmp_path / "1.tar.gz", tmp_path / "2.tar.gz"]
    one = min(root.glob("trainings/*/samples/*"))
    name = one.relative_to(root).as_posix()
    rows = (one / "record.jsonl").read_text()
    failed = json.loads(rows.splitlines()[-1]) | {"state": "oom", "value": None, "error": "CUDA out of memory"}
    (one / "record.jsonl").write_text(rows.splitlines()[0] + "\n" + json.dumps(failed) + "\n")
    assert f"{name}: has no scores" in archive.pack(root, files[0])
    home.mkdir()
    assert archive.unpack(home, files[:1]) == [] and records(home) == 3
    (one / "record.jsonl").write_text(rows)
    archive.pack(root, files[1])
    assert len(archive.unpack(home, files[1:])) == 2  # both trainings were there
    assert records(home) == 4 and (home / name / "record.jsonl").read_text() == rows


def test_an_archive_is_whole_or_absent(tmp_path, monkeypatch):
    root, file = root_of(tmp_path / "root"), tmp_path / "x.tar.gz"

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(archive.tarfile.TarFile, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        archive.pack(root, file)
    assert {path.name for path in tmp_path.iterdir()} == {"root"}


def test_scores_are_packed_without_images(tmp_path):
    root, file = root_of(tmp_path / "root"), tmp_path / "x.tar.gz"
    lines = archive.pack(root, file)
    assert len(lines) == 2 and all("has no grid of images: " in line for line in lines)
    with tarfile.open(file) as packed:
        assert sum(name.endswith("record.jsonl") for name in packed.getnames()) == 4
