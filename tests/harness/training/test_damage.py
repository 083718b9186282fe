"""Files of a training that are whole but hold something else: training falls back, and reading is one line."""

import json
import os
import re
import shutil

import pytest
import torch
from lamabench.harness.training import checkpoint, storage
from lamabench.kernels.errors import InputError
from safetensors import safe_open
from safetensors.torch import save_file
from trainings import DIT, make, tensors, trained


def rewritten(path, header=None, changes=None):
    """Write a file again with another header, or with tensors changed (None: removed)."""
    with safe_open(path, framework="pt") as file:
        there = json.loads(file.metadata()["lamabench"])
        values = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    values = {name: value for name, value in {**values, **(changes or {})}.items() if value is not None}
    there = {**there, "sum": storage.byte_sum(values)} if header is None else header(there)
    path.unlink()
    save_file(values, path, metadata={"lamabench": json.dumps(there)})


NAME = "blocks.0.mlp.fc1.weight"
TENSORS = [
    ({f"model/{NAME}": None}, f"model/{NAME} is missing"),
    ({f"ema/{NAME}": torch.zeros(3)}, rf"ema/{NAME} is \[3\], not \[64, 16\]"),
    ({f"exp_avg/{NAME}": None}, f"exp_avg/{NAME} is missing"),
    ({f"exp_avg_sq/{NAME}": torch.zeros(1)}, rf"exp_avg_sq/{NAME} is \[1\]"),
    ({"window": None}, "window is missing"),
    ({"model/other": torch.zeros(3)}, "model/other is not of the model"),
]
HEADERS = [
    (lambda there: [], "it is no JSON object"),
    (lambda there: None, "it is no JSON object"),
    (lambda there: "text", "it is no JSON object"),
    (lambda there: {k: v for k, v in there.items() if k != "step"}, "its step is None"),
    (lambda there: {**there, "step": "6"}, "its step is '6'"),
    (lambda there: {**there, "step": True}, "its step is True"),
    (lambda there: {**there, "seconds": None}, "its seconds is None"),
    (lambda there: {**there, "model": []}, r"its model is \[\]"),
    (lambda there: {**there, "stretches": {}}, "its stretches is {}"),
    (lambda there: {**there, "stretches": [3]}, "its from_step is None"),
    (lambda there: {**there, "window_start": "0"}, "its window_start is '0'"),
    (lambda there: {**there, "step": 4}, "was renamed: it is of step 4"),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A training of six steps, and the tensors that it has after eight."""
    folder = trained(tmp_path_factory.mktemp("six") / "a", make())
    return folder, tensors(trained(tmp_path_factory.mktemp("eight") / "a", make(steps=8)))


@pytest.mark.parametrize(("changes", "words"), TENSORS)
def test_tensors_that_do_not_fit_fall_back(tmp_path, capsys, undisturbed, changes, words):
    folder = shutil.copytree(undisturbed[0], tmp_path / "a")
    rewritten(checkpoint.files(folder / "checkpoints")[0], changes=changes)
    trained(folder, make(steps=8))
    err = capsys.readouterr().err
    assert re.search(f"do not fit the model: {words}", err) and "continuing at step 4 of 8" in err
    assert all(torch.equal(v, undisturbed[1][k]) for k, v in tensors(folder).items())


@pytest.mark.parametrize(("header", "words"), HEADERS)
def test_headers_of_another_shape_fall_back(tmp_path, capsys, undisturbed, header, words):
    folder = shutil.copytree(undisturbed[0], tmp_path / "a")
    newest = checkpoint.files(folder / "checkpoints")[0]
    rewritten(newest, header)
    with pytest.raises(InputError, match=rf"{newest.name} .*{words}"):
        checkpoint.load(newest)
    trained(folder, make(steps=8))
    assert "falling back to the one before" in (err := capsys.readouterr().err) and "continuing at step 4 of 8" in err
    assert all(torch.equal(v, undisturbed[1][k]) for k, v in tensors(folder).items())


@pytest.mark.parametrize("whole", [True, False])
def test_weights_that_do_not_fit_are_one_line(tmp_path, undisturbed, whole):
    """Both with their tensors and by names and shapes alone."""
    folder = shutil.copytree(undisturbed[0], tmp_path / "a")
    path = folder / "weights" / checkpoint.file_name(6)
    assert checkpoint.load_weights(folder, 6, model=DIT, tensors=whole).step == 6
    for value, words in ((None, "is missing"), (torch.zeros(2, 2), r"is \[2, 2\], not \[64, 16\]")):
        rewritten(path, changes={NAME: value})
        with pytest.raises(InputError, match=f"the tensors in {path} do not fit the model: {NAME} {words}$"):
            checkpoint.load_weights(folder, 6, model=DIT, tensors=whole)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="is truncated or damaged"):
        checkpoint.load_weights(folder, 6, model=DIT, tensors=whole)


def test_weights_without_permission(another_user, undisturbed):
    folder, acting = another_user
    shutil.copytree(undisturbed[0], folder, dirs_exist_ok=True)
    folder.chmod(0o755)
    path = folder / "weights" / checkpoint.file_name(6)
    path.chmod(0)
    with acting(), pytest.raises(InputError, match=f"cannot read {path}: Permission denied"):
        checkpoint.load_weights(folder, 6)
    path.parent.chmod(0)
    with acting(), pytest.raises(InputError, match=f"cannot read {path.parent}: Permission denied"):
        checkpoint.moments(folder)
    assert checkpoint.moments(folder / "nothing") == []


def test_a_folder_that_is_not_utf8_is_named(tmp_path, undisturbed):
    folder = tmp_path / os.fsdecode(b"d\xff")
    shutil.copytree(undisturbed[0], folder)
    with pytest.raises(InputError, match=r"d\\udcff.* is not UTF-8, which checkpoints need: rename the folder"):
        checkpoint.load_weights(folder, 6)
