"""What the commands say of samples of which only features are kept."""

from lamabench.harness.run import read_run
from lamabench.harness.shards import Shards
from lamabench.launch import notes
from lamabench.launch.cli import main
from lamabench.launch.plan import plan, rows

WORDS = [
    "model=dit_nano", "model.depth=1", "model.hidden_size=16", "model.num_heads=2", "data=digits", "data.size=8",
    "train.steps=2", "train.batch_size=4", "train.precision=float32", "run.device=cpu", "sample.method=ddim",
    "sample.steps=2", "sample.count=20", "evaluate.metrics=[fd]", "evaluate.reference_count=20",
]  # fmt: skip


def test_commands(capsys, tmp_path, monkeypatch):
    def run(*words):
        code = main(list(words))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    def refused(*words):
        code, out, err = run(*words)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        return err

    monkeypatch.chdir(tmp_path)
    assert run("train", *WORDS)[0] == 0
    (path,) = (tmp_path / "runs" / "train").glob("dit_nano-digits-*")
    folder, keep = str(path), "sample.keep=features"
    code, out, _ = run("sample", folder, keep)
    assert code == 0 and "20 features (and the first images) at step 2" in out and out.count("\n") == 3
    (samples,) = path.glob("samples/*")
    (place,) = samples.glob("shards/*-efficientnet_lite0-*")
    assert len(Shards(place, "features")) == 20 and (samples / "grid.png").exists()

    code, scores, _ = run("evaluate", folder)
    assert code == 0 and "FD-EffNetLite0-20" in scores, "features serve, whatever is kept by default"
    assert run("evaluate", folder, keep)[1] == scores
    words = refused("evaluate", folder, "evaluate.features=inception_v3")
    assert "only their features of efficientnet_lite0; draw them again: lamabench sample" in words
    assert words.endswith("evaluate.features=inception_v3\n")
    words = refused("sample", folder, keep, "evaluate.features=inception_v3", "evaluate.features_path=no.pth")
    assert "evaluate.features_path no.pth does not exist" in words
    words = refused("sample", folder, keep, "--to", "a.npz")
    assert words.endswith(f"draw and keep them: lamabench sample {folder} sample.keep=images --to a.npz\n")
    assert not (tmp_path / "a.npz").exists()

    assert run("sample", folder, "--to", "a.npz")[0] == 0, "images are asked for, and drawn anew"
    assert (tmp_path / "a.npz").exists() and not place.exists()
    assert run("evaluate", folder)[1] == scores, "the scores are still those of the features"
    assert run("sample", folder, keep, "--to", "b.npz")[0] == 0
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    drawings = [row.features for row in read_run(samples).records if row.kind == "sample"]
    assert drawings == ["efficientnet_lite0", None], "the images serve"


def test_plans_say_what_is_drawn_anew(study, finish):
    features = plan(study(sample__keep="features"))
    for task in features[0].tasks:
        finish(task, **({"features": "efficientnet_lite0"} if task.kind == "samples" else {}))
    (features[0].tasks[-1].path / "shards").mkdir()
    images, other = plan(study()), plan(study(sample__keep="features", evaluate__features="inception_v3"))
    assert not list(notes.hints(study(), features)) and rows(features)[0]["to do"] == ""
    for runs, left in ((images, "sample"), (other, "sample evaluate")):
        (line,) = (one for one in notes.hints(study(), runs) if "weights of" not in one)  # which may be missing here
        assert line.endswith(
            "samples at step 4 are drawn anew, because only features of efficientnet_lite0 are kept of them"
        )
        assert (rows(runs)[0]["to do"], rows(runs)[0]["state"]) == (left, "planned")
