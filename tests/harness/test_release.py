"""Exports: the same weights and images without the run, a model card that the hub reads, and nothing half-written."""

import json
import resource
import shutil
from dataclasses import replace
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from lamabench.baselines.dit import DiTConfig
from lamabench.harness.config import Config
from lamabench.harness.disk import append
from lamabench.harness.model_card import card
from lamabench.harness.progress import Progress
from lamabench.harness.record import row
from lamabench.harness.release import (
    check_repository,
    collect,
    config_of_export,
    open_hub,
    upload,
    write_export,
)
from lamabench.harness.run import Busy, locked, open_run
from lamabench.harness.sampling import draw
from lamabench.harness.sections import DataConfig, ObjectiveConfig, RunConfig, SampleConfig, TrainConfig
from lamabench.harness.stages import execute
from lamabench.harness.tasks import tasks
from lamabench.harness.training.checkpoint import load_weights
from lamabench.kernels.errors import InputError
from lamabench.launch.commands.export import draw_grid
from lamabench.models import create_model
from PIL import Image
from safetensors.torch import load_file

DIT = DiTConfig(input_size=8, in_channels=1, num_classes=10, patch_size=2, hidden_size=16, depth=1, num_heads=2)
LABELS = [0, 3, 9]
ABOUT = {
    "study": "s",
    "name": "n",
    "variant": {},
    "seed": 0,
    "model": "dit_nano",
    "family": "dit",
    "title": "DiT | mine",
}


def make(root):
    return Config(
        model=DIT,
        data=DataConfig(kind="digits", size=8, channels=1, num_classes=10),
        objective=ObjectiveConfig(schedule="cosine"),
        train=TrainConfig(steps=4, batch_size=4, ema_decay=0.5, precision="float32", lr=1e-2, snapshots=[2]),
        sample=SampleConfig(count=9, method="ddim", steps=3, clip=True),
        run=RunConfig(device="cpu", root=str(root)),
    )


SCORE = {
    "metric": "FD-EffNetLite0-9", "value": 12.345, "sampling_error": 0.5, "count": 9, "protocol": "0123abcd",
    "reference": "digits", "reference_count": 1797, "checkpoint_step": 4, "weights": "ema",
    "generation": {"sampler": "ddim", "steps": 3, "guidance": 1.0}, "generation_protocol": "89abcdef",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a training with samples, a score of the exported weights and one of others."""
    root = tmp_path_factory.mktemp("root")
    training, samples = tasks(make(root), ABOUT, ["train", "sample"])
    for task in (training, samples):
        execute(task, Progress())
    append(samples.path / "record.jsonl", row("score", key="a", **SCORE).as_dict())
    append(
        samples.path / "record.jsonl", row("score", key="b", **SCORE | {"checkpoint_step": 2, "value": 99.0}).as_dict()
    )
    return training.path


def text_of(export, source="here"):
    return lambda info: card(info, export.scores, export.samples_row, source, {"0123abcd": "network efficientnet"})


def exported(trained, target, **choice):
    export = collect(trained, **choice)
    write_export(target, export, text_of(export), draw_grid)
    return target


def test_the_same_weights_and_images_without_the_run(trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    expected = load_weights(copy, 4, "ema", DIT).tensors
    images = open_run(copy).sample(LABELS, steps=3)
    folder = exported(copy, tmp_path / "mine")
    shutil.rmtree(copy)
    tensors = load_file(folder / "model.safetensors")
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in tensors)
    net = create_model("dit_nano", pretrained=folder)
    assert not net.training and all(torch.equal(net.state_dict()[name], expected[name]) for name in expected)
    config = config_of_export(folder)
    assert (config.model, config.objective, config.encoder) == (DIT, make("").objective, make("").encoder)
    again = draw(net, replace(config, sample=replace(config.sample, steps=3)), LABELS, 0)
    assert np.array_equal(again, images) and images.std() > 20


def test_other_weights(trained, tmp_path):
    for at, kind in ((2, "ema"), ("last", "live")):
        folder = exported(trained, tmp_path / f"{at}", at=at, kind=kind)
        expected = load_weights(trained, 4 if at == "last" else at, kind, DIT).tensors
        tensors = load_file(folder / "model.safetensors")
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert not (folder / "grid.png").exists() and "None were drawn with these weights" in text
    with pytest.raises(InputError, match="step 3 was not kept; the nearest kept: 2 and 4"):
        collect(trained, at=3)


def test_the_hub_reads_the_model_card(trained, tmp_path):
    folder = exported(trained, tmp_path / "mine")
    parsed = huggingface_hub.ModelCard.load(folder / "README.md")
    assert parsed.data.library_name == "lamabench" and "dit" in parsed.data.tags
    (result,) = parsed.data.eval_results
    assert (result.metric_name, result.metric_value, result.dataset_name) == ("FD-EffNetLite0-9", 12.345, "digits")
    assert result.metric_args == {"protocol": "0123abcd", "generation_protocol": "89abcdef"}
    text = parsed.text
    assert "| FD-EffNetLite0-9 | 12.35 | 0.5 | 9 | digits (1,797) | `0123abcd` | 3 ddim steps, no guidance |" in text
    assert "says nothing about other trainings" in text and "Protocol `0123abcd`: network efficientnet" in text
    assert "of step 4 after 16 images" in text and "ddpm, cosine schedule" in text and r"DiT \| mine" in text
    assert (
        "![Samples](grid.png)" in text and "3 ddim steps, no guidance, clipped, balanced labels, EMA, float32" in text
    )
    assert Image.open(folder / "grid.png").format == "PNG"
    info = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert info["training"]["key"] == trained.name.rsplit("-", 1)[1] and len(info["training"]["commit"]) == 40
    assert str(trained.parent.parent) not in json.dumps(info) + text, "no path of this machine"


def test_nothing_is_half_written(trained, tmp_path):
    export, target = collect(trained), tmp_path / "below" / "mine"

    def killed(samples, picture):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_export(target, export, text_of(export), killed)
    assert not list(target.parent.iterdir())
    write_export(target, export, text_of(export), draw_grid)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        write_export(target, export, text_of(export, "there"), killed)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    (target.parent / ".mine.export.tmp").mkdir()  # as a killed process leaves it
    write_export(target, export, text_of(export, "there"), draw_grid)
    assert [path.name for path in target.parent.iterdir()] == ["mine"]
    assert 'pretrained="there"' in (target / "README.md").read_text(encoding="utf-8")
    assert {path.stat().st_mode & 0o777 for path in target.iterdir()} == {(target / "README.md").stat().st_mode & 0o777}


def test_other_folders_are_not_overwritten(trained, tmp_path):
    export = collect(trained)

    def refused(target, message):
        with pytest.raises(InputError, match=message) as caught:
            write_export(target, export, text_of(export), draw_grid)
        assert "\n" not in str(caught.value)

    (tmp_path / "empty").mkdir()
    write_export(tmp_path / "empty", export, text_of(export), draw_grid)
    (tmp_path / "file").write_text("mine")
    refused(tmp_path / "file", "is a file")
    refused(tmp_path / "file" / "below", "is a file")
    refused(tmp_path, "holds empty, which is no part of an export")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    refused(tmp_path / "other", "is not an earlier export")
    refused(exported(trained, tmp_path / "two", at=2), "has the ema weights of step 2 of")
    assert (tmp_path / "other" / "config.json").read_text() == "{}"


class Hub:
    """A hub of one repository, as `HfApi` sees it."""

    def __init__(self, folder):
        self.folder, self.commits = folder, []

    def repo_exists(self, name):
        return self.folder.exists()

    def list_repo_files(self, name):
        return [".gitattributes", *(path.name for path in self.folder.iterdir())]

    def hf_hub_download(self, name, file, local_dir):
        return shutil.copy(self.folder / file, local_dir)

    def create_repo(self, name, private, exist_ok):
        assert private and exist_ok
        self.folder.mkdir(exist_ok=True)

    def upload_folder(self, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, self.folder, dirs_exist_ok=True)
        self.commits.append(commit_message)
        return f"https://huggingface.co/{repo_id}"


def test_a_repository_of_the_hub(trained, tmp_path, monkeypatch):
    hub, export = Hub(tmp_path / "hub"), collect(trained)
    for _ in range(2):  # the second one adds what was scored since
        check_repository(hub, "me/mine", export)
        assert upload(hub, "me/mine", exported(trained, tmp_path / "mine"), export) == "https://huggingface.co/me/mine"
    assert len(hub.commits) == 2 and hub.commits[0].startswith("DiT | mine: ema weights of step 4 of ")
    with pytest.raises(InputError, match=r"hf:me/mine has the ema weights of step 4 of .*, not these"):
        check_repository(hub, "me/mine", collect(trained, at=2))
    (hub.folder / "pytorch_model.bin").write_text("of others")
    with pytest.raises(InputError, match=r"hf:me/mine holds pytorch_model.bin, which is no part of an export"):
        check_repository(hub, "me/mine", export)
    monkeypatch.setattr(hub, "list_repo_files", lambda name: 1 / 0)
    with pytest.raises(InputError, match="hf:me/mine: ZeroDivisionError: division by zero"):
        check_repository(hub, "me/mine", export)

    asked = []

    def download(name, **options):
        asked.append((name, options["revision"]))
        return str(hub.folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    net = create_model("dit_nano", pretrained="hf:me/mine@abc", hidden_size=16)
    assert asked == [("me/mine", "abc")] and net.config == DIT


def test_the_hub_needs_a_name_a_login_and_a_package(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(InputError, match="hf:me/mine needs a login: hf auth login"):
        open_hub("me/mine")
    with pytest.raises(InputError, match="hf:mine is no repository: write hf:owner/name"):
        open_hub("mine")
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="needs huggingface-hub: pip install"):
        create_model("dit_nano", pretrained="hf:me/mine")
    offline = SimpleNamespace(snapshot_download=lambda *names, **options: 1 / 0)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", offline)
    with pytest.raises(InputError, match="cannot get hf:me/mine: ZeroDivisionError"):
        create_model("dit_nano", pretrained="hf:me/mine")


def test_exports_that_do_not_fit(trained, tmp_path):
    folder = exported(trained, tmp_path / "mine")
    config = (folder / "config.json").read_text(encoding="utf-8")

    def refused(message, name="dit_nano", **settings):
        with pytest.raises(InputError, match=message) as caught:
            create_model(name, pretrained=folder, **settings)
        assert "\n" not in str(caught.value)

    refused("is dit_nano, not dit_s_2", "dit_s_2")
    refused("has depth 1, not 3", depth=3)
    refused("unknown field of dit_nano 'dept'", dept=3)
    plain = json.loads(config)
    for change, message in (
        ({"lamabench_export": 2}, "newer version of lamabench: its schema is 2"),
        ({"weights": None}, "is damaged: its weights is None"),
        ({"config": {}}, "is damaged: its config has no model"),
        (
            {"config": {"model": {"family": "mine"}}, "plugins": [{"name": "my_net"}]},
            "needs the plug-ins my_net: import",
        ),
    ):
        (folder / "config.json").write_text(json.dumps(plain | change))
        refused(message)
    (folder / "config.json").write_text(config)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused("truncated or damaged")
    (folder / "model.safetensors").unlink()
    refused("cannot read .*model.safetensors")


def test_an_export_that_a_kill_moved_aside_comes_back(trained, tmp_path):
    """A kill between the two renames leaves only the folder aside; an export that then fails puts it back."""
    target, aside = tmp_path / "out", tmp_path / ".out.export.old.tmp"
    exported(trained, target)
    before = (target / "config.json").read_bytes()
    target.rename(aside)
    (tmp_path / ".out.export.tmp").mkdir()
    (tmp_path / ".out.export.lock").touch()

    def killed(samples, picture):
        raise KeyboardInterrupt

    export = collect(trained)
    with pytest.raises(KeyboardInterrupt):
        write_export(target, export, text_of(export), killed)
    assert (target / "config.json").read_bytes() == before
    exported(trained, target)
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


def test_two_exports_to_one_folder_do_not_mix(trained, tmp_path):
    with locked(tmp_path, name=".out.export.lock"), pytest.raises(Busy, match="is being worked on by process"):
        exported(trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_an_error_of_the_system(trained, tmp_path):
    """safetensors has an exception of its own, of which commands know nothing. A limit of the size of files stands for
    the disk."""
    export = collect(trained)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_export(tmp_path / "out", export, text_of(export), draw_grid)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
