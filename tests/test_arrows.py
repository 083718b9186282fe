"""The houses import only along the arrows of DESIGN.md, and none of them can be found as a top-level package."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# DESIGN.md's table: a house imports itself and what stands here, a house or one module of it.
ARROWS: dict[str, set[str]] = {
    "kernels": set(),
    "models": {"kernels"},
    "baselines": {"kernels", "models"},
    "harness": {"kernels", "models", "baselines"},
    "ablations": {"kernels.errors"},
    "launch": {"harness", "ablations", "reports", "models", "kernels"},
    "reports": {
        "harness.grid",
        "harness.disk",
        "harness.measure.gpus",
        "harness.record",
        "harness.run",
        "harness.scoring.protocol",
        "harness.shards",
        "kernels.errors",
    },
}
# Other people's packages, for the houses that are held to some. The accelerated kernels of `kernels` are optional.
ABROAD: dict[str, set[str]] = {
    "kernels": {"torch", "triton", "cuda", "selective_scan_cuda", "flash_attn", "flash_attn_interface"},
    "ablations": {"yaml", "omegaconf"},
    "reports": {"numpy", "pandas", "scipy", "matplotlib", "tabulate", "jinja2", "PIL", "yaml"},
}


def imports(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that a module of `package` imports, at any depth of its code.

    `from a import b` gives `a.b`; `import_module("a")` and `__import__("a")` count too.
    """

    def absolute(name: str, level: int) -> str:
        if not level:
            return name
        parents = package.split(".")
        base = parents[: len(parents) - (level - 1)] if level <= len(parents) else ["(above)"]
        return ".".join([*base, name] if name else base)

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, absolute(f"{node.module}.{alias.name}" if node.module else alias.name, node.level)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[0].value
            if called in ("import_module", "__import__") and isinstance(name, str):
                level = len(name) - len(name.lstrip("."))
                if level and any(isinstance(anchor, ast.Name) and anchor.id == "__name__" for anchor in node.args[1:]):
                    level -= 1  # counted from the module, not from its package
                yield node.lineno, absolute(name.lstrip("."), level)


def refused(house: str, name: str) -> bool:
    """Whether a module of `house` may not import the absolute name `name`."""
    top, _, rest = name.partition(".")
    if top in ARROWS or top == "(above)":
        return True
    if top == "lamabench":
        return not any(rest == other or rest.startswith(f"{other}.") for other in {house, *ARROWS[house]})
    return house in ABROAD and top not in ABROAD[house] and top not in sys.stdlib_module_names


def wrong_arrows(root: Path) -> list[str]:
    """`file:line house -> name` for every import of the houses below `root` that the tables do not allow."""
    wrong = []
    for house in ARROWS:
        for path in sorted((root / house).rglob("*.py")):
            where = path.relative_to(root)
            package = ".".join(["lamabench", *where.parent.parts])
            for line, name in imports(path.read_text(encoding="utf-8"), package):
                if refused(house, name):
                    wrong.append(f"{where}:{line} {house} -> {name}")
    return wrong


def test_imports_follow_the_arrows():
    assert {house for house in ARROWS if list((ROOT / house).rglob("*.py"))} == set(ARROWS)
    assert wrong_arrows(ROOT) == []


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("kernels/a/b.py", "from ...models import layers"),
        ("kernels/a/b.py", "from ... import models"),
        ("kernels/a.py", "import numpy as np"),
        ("kernels/a.py", "from ..kernels.errors import InputError\nimport lamabench.harness.measure.cost"),
        ("models/a.py", "def f():\n    from ..harness.cost import count"),
        ("models/a.py", "from ..baselines.dit import DiT"),
        ("models/a.py", "import lamabench"),
        ("models/a.py", "from kernels.errors import InputError"),
        ("models/a.py", "import importlib\nimportlib.import_module('lamabench.launch.cli')"),
        ("models/a.py", "from importlib import import_module\nimport_module('..launch', __package__)"),
        ("models/a.py", "from importlib import import_module\nimport_module('...launch', __name__)"),
        ("baselines/a.py", "from ..harness import record"),
        ("harness/a.py", "from ..reports import tables"),
        ("harness/a.py", "from ...other import thing"),
        ("ablations/a.py", "from ..kernels import OPERATORS"),
        ("ablations/a.py", "import torch"),
        ("launch/a.py", "from ..baselines import dit"),
        ("reports/a.py", "from ..harness import cost"),
        ("reports/a.py", "from ..kernels import errors, OPERATORS"),
        ("reports/a.py", "from ..harness.runs import read"),
        ("reports/a.py", "from .. import harness"),
        ("reports/a.py", "try:\n    import torch\nexcept ImportError:\n    torch = None"),
    ],
)
def test_the_walker_sees_a_wrong_import(tmp_path: Path, where: str, line: str):
    path = tmp_path / where
    path.parent.mkdir(parents=True)
    path.write_text(f"import math\n\n{line}\n")
    (wrong,) = wrong_arrows(tmp_path)
    assert wrong.startswith(f"{where}:")


def test_the_walker_lets_right_imports_pass(tmp_path: Path):
    right = {
        "kernels/a/b.py": "import torch\nfrom ..errors import InputError\nfrom . import reference\nimport triton",
        "models/a.py": "from ..kernels.errors import unknown\nfrom .layers import gate\nimport numpy",
        "harness/a.py": "from ..baselines.dit import DiT\nimport lamabench.models.registry",
        "ablations/a.py": "import yaml\nfrom pathlib import Path\nfrom ..kernels.errors import InputError",
        "launch/a.py": "from ..reports import report\nfrom ..kernels.errors import InputError\nfrom .. import harness",
        "launch/b.py": "import importlib\nimportlib.import_module('..commands.doctor', __name__)",
        "reports/a.py": "from ..harness.run import Run\nfrom ..harness import record\nfrom ..kernels import errors",
    }
    for where, source in right.items():
        path = tmp_path / where
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    assert wrong_arrows(tmp_path) == []


def test_nothing_imports_a_house_by_its_bare_name():
    folders = [*ARROWS, "tests"]
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")] + list(ROOT.glob("*.py"))
    wrong = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in sources
        for line, name in imports(path.read_text(encoding="utf-8"), "lamabench.of.the.test")
        if name.partition(".")[0] in ARROWS
    ]
    assert sources and wrong == []


def inside_the_checkout(origins: list[str]) -> list[str]:
    return [origin for origin in origins if Path(origin).resolve().is_relative_to(ROOT)]


FIND = """
import importlib.util, json, sys
origins = {}
for name in sys.argv[1:]:
    spec = importlib.util.find_spec(name)
    origins[name] = [] if spec is None else [spec.origin] if spec.origin else list(spec.submodule_search_locations)
print(json.dumps(origins))
"""


def test_a_python_started_in_the_checkout_finds_no_house_at_top_level():
    # -I leaves the working folder out on every Python; 3.11 and newer know PYTHONSAFEPATH, which cluster jobs set.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONSAFEPATH": "1"}
    for options in [["-I"], []] if sys.version_info >= (3, 11) else [["-I"]]:
        command = [sys.executable, *options, "-c", FIND, *ARROWS, "lamabench.kernels"]
        answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        origins = json.loads(answer.stdout)
        assert inside_the_checkout(origins.pop("lamabench.kernels")), "the probe must see what is there"
        assert {name: inside_the_checkout(places) for name, places in origins.items()} == {name: [] for name in ARROWS}


def test_pytest_itself_finds_no_house_at_top_level(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config):
    command = getattr(pytestconfig, "workerinput", {}).get("mainargv", sys.argv)
    if Path(command[0]).name == "__main__.py":  # `python -m pytest` puts the folder there, not pytest's import mode
        place = sys.path.index(os.getcwd())
        monkeypatch.setattr(sys, "path", sys.path[:place] + sys.path[place + 1 :])
    for name in ARROWS:
        spec = importlib.util.find_spec(name)
        places = [] if spec is None else [spec.origin] if spec.origin else list(spec.submodule_search_locations or [])
        assert inside_the_checkout([place for place in places if place]) == []


def test_reports_load_no_torch():
    modules = sorted(f"lamabench.reports.{path.stem}" for path in (ROOT / "reports").glob("[!_]*.py"))
    probe = (
        "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]; print('torch' in sys.modules)"
    )
    command = [sys.executable, "-I", "-c", probe, *modules]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert modules and answer.stdout.split() == ["False"]


def test_files_are_of_a_good_size():
    """DESIGN.md: no file of Python over 400 lines, the training loop under 200."""
    folders = (*ARROWS, "tests")
    sizes = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name: size for name, size in sizes.items() if size > 400} == {}
    assert sizes["harness/training/loop.py"] < 200 and len(sizes) > 100
