"""`lamabench reference`, and scores against the file that it writes."""

import json
import os
import re

import numpy as np
import pytest
import torch
from lamabench.harness.scoring import features, reference
from lamabench.launch.cli import main

DATA = ["data=digits", "data.size=8", "run.device=cpu"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty folder, and a random projection of the pixels in place of the slow network."""
    maps = {
        "1280": torch.randn(192, 1280, generator=torch.Generator().manual_seed(0)),
        "logits": torch.randn(192, 1000, generator=torch.Generator().manual_seed(1)),
    }

    def project(extractor, batches):
        for batch in batches:
            pixels = batch.expand(-1, 3, -1, -1).flatten(1).float() / 255
            yield {layer: (pixels @ maps[layer]).numpy() for layer in extractor.features_list}

    monkeypatch.setattr(features, "extract", project)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *words):
    code = main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_reference_serves_in_place_of_its_data(capsys, place):
    code, out, err = run(capsys, "reference", *DATA, "evaluate.reference_count=600", "--out", "r.npz")
    lines = out.splitlines()
    assert code == 0 and "reference 600/600" in err
    assert lines[0].startswith("digits-600: 600 images of 8 x 8 x 1, ") and lines[2] == "dimensions: mu 1280"
    assert lines[-1] == "written; lamabench evaluate RUN evaluate.reference=r.npz"
    code, out, err = run(capsys, "reference", *DATA, "evaluate.reference_count=600", "--json")
    facts = json.loads(out)
    assert code == 0 and err == "" and facts["file"] is None, "nothing is computed again"
    assert (facts["name"], facts["count"], facts["dimensions"]) == ("digits-600", 600, {"mu": 1280})
    assert lines[4] == f"protocol: {facts['protocol']}" and lines[3] == f"checksum: {facts['checksum'][:16]}"
    with np.load("r.npz") as there:
        assert there["mu"].shape == (1280,) and there["sigma"].shape == (1280, 1280) and there["count"] == 600
        assert there["network"] == "efficientnet-lite0" and there["weights"] == facts["weights"]

    images = np.random.default_rng(0).integers(0, 256, (150, 8, 8, 1), dtype=np.uint8)
    np.savez("s.npz", images=images)
    metrics = "evaluate.metrics=[fd,kid]"
    with_data = run(capsys, "evaluate", "s.npz", *DATA, "evaluate.reference_count=600", metrics, "--json")
    with_file = run(capsys, "evaluate", "s.npz", "evaluate.reference=r.npz", "run.device=cpu", metrics, "--json")
    (theirs, kernel), (ours,) = json.loads(with_data[1]), json.loads(with_file[1])
    assert with_data[0] == 0 and with_file[0] == 1, "KID has no value"
    assert "kid needs features of the reference, and r.npz has moments only" in with_file[2]
    assert ours["value"] == theirs["value"] and ours["protocol"] == theirs["protocol"], "the same images"
    assert ours["floor"] is None and 0 < theirs["floor"] < theirs["value"] and abs(kernel["floor"]) < kernel["value"]
    bias = "150 samples, fewer than twice the 1280 features: bias dominates; compare kid"
    assert ours["note"] == theirs["note"] == bias and kernel["note"] is None
    assert with_data[2].splitlines()[-1] == f"lamabench evaluate: FD-EffNetLite0-150: {bias}"
    table = run(capsys, "evaluate", "s.npz", *DATA, "evaluate.reference_count=600", metrics)[1]
    assert "Floor" in table.splitlines()[0] and f"{theirs['floor']:,.3f}" in table

    code, out, err = run(capsys, "evaluate", "s.npz", "evaluate.reference=s.npz", "run.device=cpu", metrics)
    assert code == 0 and "the floor is that of 75 images, half of the reference" in err, "its images serve too"


def test_a_file_that_cannot_be_written_is_refused_before_the_pass(capsys, place, monkeypatch):
    (place / "shut").mkdir()
    original = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "shut" not in str(path) and original(path, mode))
    code, out, err = run(capsys, "reference", *DATA, "--out", "shut/r.npz")
    assert (code, out) == (2, "") and not (place / "runs").exists(), "no pass over the images"
    assert err == "lamabench reference: error: cannot write --out shut/r.npz: shut is not writable\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "reference needs data: data=NAME; choices: cifar10, digits"),
        (["data=digitz"], "unknown data 'digitz'"),
        (["data=digits", "evaluate.seed=1"], "reference takes data=NAME, .*not 'evaluate.seed=1'"),
        (["data=digits", "train.steps=1"], "reference takes data=NAME, .*not 'train.steps=1'"),
        (["data=digits", "evaluate.features=vgg"], "unknown evaluate.features 'vgg'"),
        (["data=digits", "evaluate.reference_count=9999"], "evaluate.reference_count 9999 is more than the 1797"),
        (["data=digits", "--out", "r.txt"], "--out r.txt must be a FILE.npz in a folder that exists"),
        (["data=digits", "--out", "no/r.npz"], "--out no/r.npz must be a FILE.npz in a folder that exists"),
    ],
)
def test_bad_input(capsys, place, words, message):
    code, out, err = run(capsys, "reference", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("lamabench reference: error: ") and re.search(message, err)
    assert not list(place.iterdir())


def test_a_file_of_other_contents_is_refused_though_all_is_scored(capsys, place):
    """A held-out loss has another reference, and is none of the scores against the file."""
    small = "model=dit_nano model.depth=1 model.hidden_size=16 model.num_heads=2 train.steps=2 train.batch_size=8"
    words = [*DATA, "data.split=most", *small.split(), "train.precision=float32"]
    assert run(capsys, "train", *words)[0] == 0
    (link,) = map(str, (place / "runs" / "train").glob("dit_nano*"))
    drawn = ["sample.count=4", "sample.method=ddim", "sample.steps=2"]
    assert run(capsys, "sample", link, *drawn)[0] == 0
    reference = ["reference", *DATA, "data.split=most", "--out", "r.npz"]
    assert run(capsys, *reference, "evaluate.reference_count=9")[0] == 0
    score = ["evaluate", link, *drawn, "evaluate.reference=r.npz", "--json"]
    rows = json.loads(run(capsys, *score, "evaluate.metrics=[heldout,fd]")[1])
    code, out, err = run(capsys, *score, "evaluate.metrics=[heldout,fd,isc]")
    assert code == 1 and json.loads(out) == rows and "isc needs at least 10 samples" in err
    assert run(capsys, *reference, "evaluate.reference_count=8")[0] == 0
    for metrics in ("[fd]", "[heldout,fd]", "[fd,isc]"):
        code, out, err = run(capsys, *score, f"evaluate.metrics={metrics}")
        assert (code, out) == (2, "") and "r.npz has other contents than the file of this name" in err
    assert run(capsys, *score, "evaluate.metrics=[heldout]")[0] == 0

    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), dtype=np.uint8)
    np.savez(place / "s.npz", images=images)
    theirs = ["evaluate", "s.npz", "--as", "them", "evaluate.reference=r.npz", "evaluate.metrics=[fd]", "--json"]
    counts = []
    for count in (8, 9):
        assert run(capsys, *reference, f"evaluate.reference_count={count}")[0] == 0
        counts += [row["reference_count"] for row in json.loads(run(capsys, *theirs)[1])]
    assert counts == [8, 9], "other people's samples are scored again"


def test_an_interrupted_pass_says_whether_it_begins_again(capsys, place, monkeypatch):
    """Features that are kept are saved at the end. A longer pass saves what it has every minute."""
    project = features.extract

    def interrupted(extractor, batches):
        for number, layers in enumerate(project(extractor, batches)):
            if number == 1:
                raise KeyboardInterrupt(15)
            yield layers

    monkeypatch.setattr(features, "extract", interrupted)
    words = ["reference", *DATA, "evaluate.reference_count=200", "evaluate.batch_size=64"]
    code, out, err = run(capsys, *words)
    assert (code, out) == (143, "") and not list(place.glob("runs/.cache/*.safetensors"))
    assert err.splitlines()[-1].startswith("lamabench reference: ended by SIGTERM; the same command begins again, ")
    monkeypatch.setattr(reference, "KEPT_BYTES", 0)
    code, out, err = run(capsys, *words)
    assert (code, out) == (143, "")
    assert err.splitlines()[-1] == "lamabench reference: ended by SIGTERM; the same command continues"
