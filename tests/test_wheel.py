"""The wheel holds all of the suite and nothing else, and works without the checkout."""

import configparser
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOUSES = ("ablations", "baselines", "harness", "kernels", "launch", "models", "reports")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is, or would be, committed; a build leaves its dirt there."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    copy = tmp_path_factory.mktemp("tree")
    for name in names:
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def information(unpacked: Path) -> Path:
    (folder,) = unpacked.glob("*.dist-info")
    return folder


def test_holds_every_source_and_configuration_and_nothing_else(tree: Path, unpacked: Path):
    expected = {
        f"lamabench/{path.relative_to(tree).as_posix()}"
        for house in HOUSES
        for pattern in ("*.py", "*.yaml", "*.cu", "*.cuh", "README.md", "RECORDS.md", "COLUMNS.md")
        for path in (tree / house).rglob(pattern)
    }
    records = [path for path in (tree / "reports/records").rglob("*") if path.is_file()]
    assert {path.suffix for path in records} == {".json", ".jsonl", ".npy", ".npz", ".png"}
    records = [path for path in records if path.suffix != ".png"]  # grids of samples, which no report reads
    records += (tree / "reports/page").iterdir()
    expected |= {f"lamabench/{path.relative_to(tree).as_posix()}" for path in records}
    held = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    code = {name for name in held if ".dist-info/" not in name}
    assert code - expected == set()
    assert expected - code == set(), "a new package belongs into [tool.setuptools] packages of pyproject.toml"
    assert len(expected) >= 2 * len(HOUSES)
    assert {name.partition("/")[0] for name in held} == {"lamabench", information(unpacked).name}


# Run with -I -S: no working folder and no .pth file, so the editable install, hence the checkout, is out of reach.
IMPORT_ALL = """
import importlib, json, sys
names, path = json.loads(sys.argv[1])
sys.path[:0] = path
for name in names:
    importlib.import_module(name)
print(json.dumps({n: m.__file__ for n, m in sys.modules.items() if n.startswith("lamabench.") and m.__file__}))
"""


def test_every_module_imports_from_the_wheel_alone(unpacked: Path):
    files = [path.relative_to(unpacked).with_suffix("") for path in unpacked.rglob("*.py")]
    names = sorted(".".join(file.parts).removesuffix(".__init__") for file in files if file.name != "__main__")
    path = [str(unpacked), *(entry for entry in sys.path if Path(entry).is_dir() and Path(entry).resolve() != ROOT)]
    command = [sys.executable, "-I", "-S", "-c", IMPORT_ALL, json.dumps([names, path])]
    answer = subprocess.run(command, cwd=unpacked, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    loaded = json.loads(answer.stdout.splitlines()[-1])
    assert set(names) <= set(loaded)
    strays = {name: file for name, file in loaded.items() if not Path(file).is_relative_to(unpacked)}
    assert strays == {}


def test_the_command_points_into_the_wheel(unpacked: Path):
    entries = configparser.ConfigParser()
    entries.read(information(unpacked) / "entry_points.txt")
    module, _, function = entries["console_scripts"]["lamabench"].partition(":")
    source = unpacked / f"{module.replace('.', '/')}.py"
    assert source.is_file() and f"def {function}(" in source.read_text(encoding="utf-8")
