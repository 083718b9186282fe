"""Records as files: what pandas reads back, the table of columns, and reports without torch or pyarrow."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import lamabench.reports as reports
import pandas as pd
import pytest
from lamabench.harness import record
from lamabench.reports import dictionary
from lamabench.reports import frame as frames
from lamabench.reports.report import build
from lamabench.reports.requirements import requirements
from run_folders import cost, drawn, line, made, scored, swept, trained, write

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a record of every kind, and one of an early version, without the fields that joined later."""
    root = tmp_path_factory.mktemp("data")
    heldout = {**scored(0.5, "h", "held-out loss"), "by_timestep": {"62": 0.75, "937": 0.25}}
    operator = line(
        "operator_speed", operator="selective_scan", shape="a", backend={"selective_scan": "torch"}, p50_ms=2.0,
        floor="bytes", floor_ms=0.5, times_floor=4.0, **{"pass": "forward"},
    )  # fmt: skip
    lines = [cost(), trained(), drawn(), {**made(scored(2.0, std=0.1)), "floor": 1.5}, heldout, operator]
    write(root, "new", [*lines, swept("train", 9.0, mfu=0.5)], seed=3, variant={"model.window_size": 4})
    write(root, "old", [line("score", metric="FID", value=7.0, count=50_000, protocol="p", provenance=WHERE_ONCE)])
    return root


WHERE_ONCE = {"commit": "b" * 40, "dirty": True, "device": "cpu"}  # a provenance with fewer entries


def test_files_hold_what_load_returns(root: Path, tmp_path: Path) -> None:
    records = reports.load(root)
    assert frames.write(records, tmp_path) == ["records.csv", "records.parquet"]
    text, table = pd.read_csv(tmp_path / "records.csv"), pd.read_parquet(tmp_path / "records.parquet")
    assert list(text.columns) == list(table.columns) == list(records.columns) and len(text) == len(table) == 6
    for name in records.columns:
        for read in (text, table):
            there = records[name].notna()
            assert (read[name].notna() == there).all(), name
            assert [str(one) for one in read[name][there].astype(records[name].dtype)] == [
                str(one) for one in records[name][there]
            ], name
    again = tmp_path / "again"
    again.mkdir()
    frames.write(reports.load(root), again)
    for name in ("records.csv", "records.parquet"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_columns_have_one_type_each(root: Path) -> None:
    records = reports.load(root)
    by_kind = {kind: rows.iloc[0] for kind, rows in records.groupby("kind")}
    assert by_kind["operator_speed"]["floor_name"] == "bytes" and pd.isna(by_kind["operator_speed"]["floor"])
    heldout = records[records["metric"] == "held-out loss"].iloc[0]
    assert (heldout["by_timestep_62"], heldout["by_timestep_937"], heldout["seed"]) == (0.75, 0.25, 3)
    old = records[records["name"] == "old"].iloc[0]
    assert (old["metric"], old["value"], old["commit"], old["dirty"]) == ("FID", 7.0, "b" * 40, True)
    words = {"str": ("string", "str"), "int": ("Int64",), "float": ("Float64",), "bool": ("boolean",)}
    types = {row.column: row.type for row in reports.columns().itertuples()}
    for name in records.columns:
        if name in types and records[name].notna().any():
            assert str(records[name].dtype) in words[types[name]], name


def test_every_column_is_in_the_table_and_the_page(root: Path) -> None:
    table = reports.columns()
    assert table["column"].is_unique and table["meaning"].str.len().min() > 0
    names = set(table["column"])
    patterns = [re.sub("PART|T$", ".+", name) for name in dictionary.PATTERNS]
    for name in reports.load(root).columns:
        assert name in names or any(re.fullmatch(pattern, name) for pattern in patterns), name
    units = dict(zip(table["column"], table["unit"], strict=True))
    assert (units["p50_ms"], units["peak_memory_gib"], units["images_per_s"]) == ("ms", "GiB", "images/s")
    assert (units["training_seconds"], units["params"], units["mfu"]) == ("s", "parameters", "share of 1")
    kinds = dict(zip(table["column"], table["kinds"], strict=True))
    assert kinds["macs"] == "speed, cost" and kinds["value"] == "score" and kinds["commit"] == "all"
    scores = {name for name, _ in record.field_types(record.ROWS["score"]).items()} - {"provenance", "by_timestep"}
    assert scores <= names
    page = Path(dictionary.__file__).with_name("COLUMNS.md").read_text()
    assert page == dictionary.page(), "make it again: python -m lamabench.reports.dictionary > reports/COLUMNS.md"


def test_without_pyarrow_there_is_no_parquet(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "find_spec", lambda name: None)
    assert frames.write(reports.load(root), tmp_path) == ["records.csv"]
    assert [path.name for path in tmp_path.iterdir()] == ["records.csv"]


def test_a_report_has_all_records(root: Path, tmp_path: Path) -> None:
    files = {path.name for path in build([root], tmp_path / "out")}
    assert {"records.csv", "records.parquet"} <= files
    assert len(pd.read_parquet(tmp_path / "out" / "records.parquet")) == 6
    assert "records.csv, records.parquet: all records" in (tmp_path / "out" / "README.md").read_text()


# What a laptop with the extra `reports` does not have.
BLOCKED = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in %r.split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from lamabench.launch.cli import main
for words in %r:
    code = main(words)
    assert code == 0, (words, code)
import lamabench.reports as reports
assert len(reports.load(%r)) == 6 and len(reports.columns()) > 80
assert main(["train", "model=dit_nano", "data=digits"]) == 2
"""
HEAVY = "torch torchvision timm hydra omegaconf submitit fvcore sklearn safetensors torch_fidelity triton"


def test_reports_need_no_torch(root: Path, tmp_path: Path) -> None:
    committed = Path(reports.__file__).with_name("records")
    commands = [
        ["report", str(committed / "bench"), str(root), "--out", str(tmp_path / "out")],
        ["compare", str(root / "demo" / "new"), str(root / "demo" / "new")],
        ["runs", str(root), "state=done", "sort=fd"],
        ["runs", str(committed), "family=dit"],
        ["studies", str(root)],
    ]
    code = BLOCKED % (HEAVY, commands, str(root))
    answer = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "out" / "summary.csv").is_file() and "dit_xl_2" in answer.stdout
    assert answer.stderr.splitlines()[-1].startswith("lamabench train: error: train needs torch: install lamabench")


def declared(name: str) -> list[str]:
    """A list of pyproject.toml."""
    match = re.search(rf"^{name} = (\[.*?^\])", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert match is not None
    return ast.literal_eval(match[1])


def test_the_extra_names_what_reports_and_their_commands_import() -> None:
    files = [*(ROOT / "reports").glob("*.py"), ROOT / "ablations" / "yaml_file.py", ROOT / "launch" / "output.py"]
    trees = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    names = {alias.name for node in trees if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in trees if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    packages = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
    called = {"PIL": "pillow", "yaml": "pyyaml"}
    extra = declared("reports")
    # pandas needs pyarrow for Parquet, and jinja2 for LaTeX.
    assert {re.split("[<>=]", one)[0] for one in extra} == {called.get(name, name) for name in packages} | {
        "pyarrow",
        "jinja2",
    }
    assert set(extra) - set(declared("dependencies")) == {one for one in extra if one.startswith("pyarrow")}


def test_requirements_are_printed_for_pip() -> None:
    lines = ["torch>=2", 'numpy>=1.26; extra == "reports"', "wandb; extra == 'logs'", "pandas>=2; extra == 'reports'"]
    assert requirements(lines) == ["numpy>=1.26", "pandas>=2"]
