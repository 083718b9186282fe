"""Where compilers keep what they compile for a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from lamabench.harness import caches, device, launcher
from lamabench.harness.measure import models
from lamabench.kernels import nvrtc
from lamabench.models import registry

NAMES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "LAMABENCH_NVRTC_CACHE_DIR")


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """What the code sets does not outlive the test. The environment of this process named no folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher, "GIVEN", frozenset())
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def kept(monkeypatch, gpu):
    """The folders for a GPU, as a new process has them."""
    for name in NAMES:
        os.environ.pop(name, None)
    monkeypatch.setattr(device, "device_name", lambda device: gpu if device.startswith("cuda") else "CPU")
    caches.keep_compiled("runs", "cuda")
    return [Path(os.environ[name]) for name in NAMES]


def test_the_jobs_of_a_root_share_what_they_compile_for_one_gpu(monkeypatch, tmp_path):
    first, again, other = (kept(monkeypatch, gpu) for gpu in ("H100", "H100", "A100"))
    assert first == again and not {*first} & {*other} and len({*first}) == 3
    assert all(folder.is_relative_to(tmp_path / "runs" / ".cache") for folder in [*first, *other])
    assert nvrtc.cache_folder() == other[2] and not list(tmp_path.iterdir())


def test_a_folder_of_the_user_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(launcher, "GIVEN", frozenset({"TRITON_CACHE_DIR"}))
    monkeypatch.setattr(device, "device_name", lambda device: device)
    caches.keep_compiled("runs", "cuda")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path) and NAMES[0] in os.environ


FRESH = """
import os
from lamabench.harness import parallel  # as every command does first
import torch
from lamabench.harness import caches, device
from lamabench.models import registry
with torch.device("meta"):
    registry.build(registry.preset("dit_nano").config)
device.device_name = lambda device: device
before = os.environ["TORCHINDUCTOR_CACHE_DIR"]
caches.keep_compiled("runs", "cuda")
print(before, os.environ["TORCHINDUCTOR_CACHE_DIR"], *caches.own(), sep="\\n")
"""


@pytest.mark.parametrize("named", [None, "", "mine"])
def test_a_folder_that_torch_chose_is_not_the_users(named, monkeypatch, tmp_path):
    """torch writes its own choice into the environment when a network is built on the device `meta`. It takes an empty
    name for the working directory, which nobody chose either."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    if named is not None:
        monkeypatch.setenv(NAMES[0], named and str(tmp_path / named))
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=True)
    before, after, *own = done.stdout.splitlines()
    assert Path(before).parent == {None: tmp_path / "temporary", "": tmp_path.parent, "mine": tmp_path}[named]
    assert after == before if named else Path(after).is_relative_to(tmp_path / "runs" / ".cache")
    assert {*own} == {*NAMES[1:]} if named else {*own} == {*NAMES}


def test_on_a_cpu_nothing_changes():
    """The code of one CPU may not run on another, and Inductor's cache does not tell them apart."""
    caches.keep_compiled("runs", "cpu")
    assert not {*NAMES} & os.environ.keys()


def test_the_other_processes_of_a_benchmark_share_the_folders(monkeypatch):
    """They know no root: the first process sends them its folders."""
    first = kept(monkeypatch, "H100")
    sent = caches.folders()
    for name in NAMES:
        monkeypatch.delenv(name)
    monkeypatch.setattr(models, "bench", lambda *arguments, **settings: iter(()))
    plain = {"settings": {}, "backend": {}, "objective": {}, "device": "cpu", "sources": []}
    models.join(registry.to_dict(registry.preset("dit_nano").config), **plain, compiled=sent)
    assert [Path(os.environ[name]) for name in NAMES] == first
