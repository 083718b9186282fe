"""Modules of users: their names, one import each, and errors for broken ones."""

import hashlib
import importlib
import json
import os
import pickle
import py_compile
import sys
from pathlib import Path

import pytest
from lamabench.harness import open_run
from lamabench.kernels.errors import InputError
from lamabench.launch.cli import main
from lamabench.launch.compose import compose, load_plugins
from lamabench.models import create_model, list_models, plugins, registry
from lamabench.models.mixers import MIXERS

SOURCE = """
from dataclasses import dataclass

from torch import nn

from lamabench.models import Mixer, register_mixer


class Plain(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        return self.out(x)


@register_mixer("plain")
@dataclass
class PlainMixer(Mixer):
    def build(self, dim, side, shift):
        return Plain(dim)
"""


@pytest.fixture
def here(tmp_path, monkeypatch, registered):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(SOURCE)
    return tmp_path


@pytest.fixture
def install(here, monkeypatch):
    """Installs a package `others` whose plug-in `plain` is a module of this source. Returns the file that names it."""
    modules = []

    def write(module, source):
        (here / f"{module}.py").write_text(source)
        folder = here / "others-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[lamabench.plugins]\nplain = {module}\n")
        monkeypatch.syspath_prepend(here)
        importlib.invalidate_caches()
        plugins.entry_points.cache_clear()
        modules.append(module)
        return folder / "entry_points.txt"

    yield write
    plugins.entry_points.cache_clear()
    for module in modules:
        sys.modules.pop(module, None)


def test_a_file_runs_as_it_is(here):
    """Not as bytecode says that is of a file of this size and second."""
    file = Path("mine.py")
    file.write_text("raise RuntimeError(1)\n")
    then = file.stat()
    py_compile.compile(str(file))
    file.write_text("raise RuntimeError(2)\n")
    os.utime(file, ns=(then.st_atime_ns, then.st_mtime_ns))
    with pytest.raises(InputError, match=r"plug-in mine.py, line 1: RuntimeError: 2"):
        plugins.load(["mine.py"])


def test_a_file_is_imported_once_under_its_own_name(here):
    (plugin,) = plugins.load(["mine.py"])
    assert plugin == plugins.Plugin("mine", here / "mine.py", hashlib.sha256(SOURCE.encode()).hexdigest())
    mixer = MIXERS["plain"]
    assert mixer.__module__ == "lamabench_plugin_mine" and sys.modules[mixer.__module__].PlainMixer is mixer
    assert pickle.loads(pickle.dumps(mixer())) == mixer()
    copied = here / "snapshot" / "mine.py"
    copied.parent.mkdir()
    copied.write_text(SOURCE)
    assert plugins.load([str(here / "mine.py"), "./mine.py", str(copied)]) == [plugin] * 3
    assert plugins.load(["mine.py"], folder=copied.parent) == [plugin]
    assert MIXERS["plain"] is mixer


def test_a_module_is_named_by_its_name(here, monkeypatch):
    package = here / "my_plugin_package"
    package.mkdir()
    (package / "__init__.py").write_text("from . import inside\n")
    (package / "inside.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(here)
    (plugin,) = plugins.load(["my_plugin_package"])
    (inside,) = plugins.load(["my_plugin_package.inside"])
    assert (plugin.path, inside.path) == (package, package / "inside.py")
    assert inside.sha256 == hashlib.sha256(SOURCE.encode()).hexdigest()
    assert "plain" in MIXERS
    (package / "inside.py").write_text(SOURCE + "\n")  # the hash of a package covers all its sources
    assert plugins.source_hash(package) != plugin.sha256


BROKEN = [
    ("x = 1\ny = nothing\n", "line 2: NameError: name 'nothing' is not defined"),
    ("x = 1\n\ndef f(:\n", "line 3: SyntaxError: invalid syntax"),
    ("import no_such_module\n", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
    ("def f():\n    raise RuntimeError('two\\nlines')\n\nf()\n", "line 2: RuntimeError: two$"),
    ("import sys\nsys.exit('no')\n", "line 2: SystemExit: no"),
    ("import json\n\njson.loads('{')\n", "line 3: JSONDecodeError: "),
    (SOURCE.replace('"plain"', '"window"'), "line 1[89]: InputError: mixer 'window' is registered already, by "),
]


@pytest.mark.parametrize(("source", "message"), BROKEN)
def test_the_error_of_a_broken_file_is_one_line_with_its_line_number(here, source, message):
    Path("mine.py").write_text(source)
    with pytest.raises(InputError, match=f"^plug-in mine.py, {message}") as caught:
        plugins.load(["mine.py"])
    assert "\n" not in str(caught.value) and "lamabench_plugin_mine" not in sys.modules
    Path("mine.py").write_text(SOURCE)  # a repaired file is imported
    assert plugins.load(["mine.py"])[0].name == "mine"


def test_errors_for_names_of_no_plugin(here):
    Path("text.txt").write_text("")
    Path("other").mkdir()
    Path("other/mine.py").write_text(SOURCE.replace("plain", "other"))
    for name, message in (
        ("missing.py", f"plug-in missing.py: there is no .py file at {here / 'missing.py'}"),
        ("./text.txt", "plug-in text.txt: there is no .py file at"),
        ("missing", "plug-in missing: there is no module missing; give a file by its path, such as missing.py"),
        ("missing.too", "there is no module missing.too"),
        ("", "a plug-in must be the path of a .py file or the name of a module, not ''"),
        (3, "not 3"),
    ):
        with pytest.raises(InputError, match=message):
            plugins.load([name])
    plugins.load(["mine.py"])
    with pytest.raises(InputError, match=r"two plug-ins have the name mine: .*/mine.py and .*/other/mine.py"):
        plugins.load(["other/mine.py"])
    Path("mine.py").write_text(SOURCE + "\n")
    with pytest.raises(InputError, match=r"plug-in mine.py has changed since this process imported it"):
        plugins.load(["mine.py"])


def test_entry_points_of_installed_packages(here, install):
    names = install("installed_plugin", SOURCE)
    (plugin,) = plugins.entry_points()
    assert (plugin.name, plugin.path) == ("installed_plugin", here / "installed_plugin.py")
    assert "plain" in MIXERS
    plugins.entry_points.cache_clear()
    names.write_text("[lamabench.plugins]\nplain = not_there\n")
    with pytest.raises(InputError, match="plug-in plain of others: there is no module not_there"):
        plugins.entry_points()
        sys.modules.pop("installed_plugin", None)


def test_words_on_a_command_line(here, capsys):
    with pytest.raises(InputError, match="unknown mixer 'plain'"):
        compose(["model.mixers=[plain]"])
    assert load_plugins(["a=1", "plugins=[mine.py]", "b=2"]) == ["a=1", "b=2"]
    config, _ = compose(["model=lamamba_nano", "plugins=mine.py", "model.mixers=[plain]"])
    assert config.model.mixers == ["plain"]
    assert main(["cost", "lamamba_nano", "mixers=[plain]", "plugins=[mine.py]", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["macs"] > 0
    assert main(["cost", "lamamba_nano", "mixers=[plain]", "plugins=[no.py]"]) == 2
    assert "plug-in no.py: there is no .py file at" in capsys.readouterr().err


def test_a_preset_that_is_registered_again_is_composed_again(here):
    """A second registration invalidates what compose cached of the first."""
    family = "from lamabench.baselines.dit import DiT, DiTConfig\nfrom lamabench.models import Preset, register\n\n\n"
    family += "class Mine(DiT):\n    pass\n\n\nclass MineConfig(DiTConfig):\n    pass\n\n\n"
    family += "register('mine', MineConfig, Mine, [Preset('mine_s', 'Mine', MineConfig(depth={}), 'ours')])\n"
    for depth in (3, 5):
        Path("family.py").write_text(family.format(depth))
        plugins._LOADED.clear()
        config, info = compose(["model=mine_s", "data=digits", "plugins=family.py"])
        assert (config.model.depth, info["model"]) == (depth, "mine_s")
        assert registry.family_of(config.model).name == "mine"


FAMILY = """
from lamabench.baselines.dit import DiT, DiTConfig
from lamabench.models import Preset, register


class Mine(DiT):
    pass


class MineConfig(DiTConfig):
    pass


register("mine", MineConfig, Mine, [Preset("mine_s", "Mine", MineConfig(16, 1, 10, 4, 16, 1, 2), "ours")])
"""
TRAIN = ["train", "model=mine_s", "data=digits", "train.steps=1", "train.batch_size=2", "train.precision=float32"]


@pytest.fixture
def own(here, monkeypatch):
    """A family in `mine.py`, which Python finds by its own name too."""
    monkeypatch.syspath_prepend(here)
    importlib.invalidate_caches()
    Path("mine.py").write_text(FAMILY)
    yield here
    sys.modules.pop("mine", None)


def test_a_file_that_python_imports_too_is_one_module(own):
    importlib.import_module("mine")
    (plugin,) = plugins.load(["mine.py"])
    assert plugin.path == own / "mine.py"
    assert sys.modules["lamabench_plugin_mine"] is sys.modules["mine"]
    assert plugins.loaded() == [{"name": "mine", "path": str(plugin.path), "sha256": plugin.sha256}]


def test_a_file_that_python_imports_later_is_one_module(own):
    plugins.load(["mine.py"])
    assert importlib.import_module("mine") is sys.modules["lamabench_plugin_mine"]


def test_a_module_of_another_file_keeps_its_name(own):
    Path("json.py").write_text(FAMILY)
    plugins.load(["json.py"])
    assert sys.modules["json"] is json


def forget():
    """As another process begins."""
    plugins._LOADED.clear()
    for name in ("mine", "lamabench_plugin_mine"):
        sys.modules.pop(name, None)
    registry._FAMILIES.pop("mine", None)


def test_a_run_whose_plugin_was_moved(own, capsys):
    assert main([*TRAIN, "plugins=[mine.py]"]) == 0
    (run,) = Path("runs/train").glob("mine*")
    Path("elsewhere").mkdir()
    Path("mine.py").rename("elsewhere/mine.py")
    draw = ["sample", str(run), "sample.count=1", "sample.method=ddim", "sample.steps=2"]
    forget()
    assert main(draw) == 2
    error = capsys.readouterr().err
    assert "there is no .py file at" in error and "name it with plugins=[FILE.py]" in error
    assert main([*draw, "plugins=[elsewhere/mine.py]"]) == 0
    forget()
    sys.path.insert(0, "elsewhere")
    try:
        importlib.invalidate_caches()
        importlib.import_module("mine")
        assert open_run(run).config.model.depth == 1
    finally:
        sys.path.remove("elsewhere")
    forget()
    assert main([*TRAIN, "plugins=[elsewhere/mine.py]", "train.steps=2"]) == 0  # the run learns where it is now
    forget()
    assert open_run(run).moments == [1, 2]
    assert main(["evaluate", str(run), "plugins=[elsewhere/mine.py]", "train.steps=3"]) == 2
    assert "would make another training" in capsys.readouterr().err


def test_at_is_a_step_or_last(own):
    plugins.load(["mine.py"])
    assert main(TRAIN) == 0
    (run,) = Path("runs/train").glob("mine*")
    with pytest.raises(InputError, match="at must be a step or 'last', not 'all'"):
        open_run(run).model(at="all")


def test_models_of_plugins_are_listed(own, capsys, monkeypatch):
    monkeypatch.setattr(registry, "_FAMILIES", {"uvit": registry.families()["uvit"]})  # few, which are soon counted
    monkeypatch.setattr(registry, "MODULES", registry.MODULES[-1:])
    assert main(["models", "plugins=[mine.py]", "--json"]) == 0
    assert "mine_s" in [row["model"] for row in json.loads(capsys.readouterr().out)]
    assert main(["models", "input_size=4"]) == 2
    assert "models takes nothing but plugins=[FILE.py,…], not input_size=4" in capsys.readouterr().err


def test_python_knows_the_models_of_installed_packages(install):
    """Without the command too; the package asks the registry while it is imported."""
    install("installed_family", FAMILY)
    assert list_models("mine*") == ["mine_s"]
    assert create_model("mine_s", depth=2).config.depth == 2
