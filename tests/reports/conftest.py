"""Three runs and a report of them."""

from pathlib import Path

import pytest
from lamabench.reports.report import build
from run_folders import write_three


@pytest.fixture
def three(tmp_path: Path) -> Path:
    return write_three(tmp_path / "runs")


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of the same three runs; tests must not change it."""
    folder = tmp_path_factory.mktemp("reports")
    build([write_three(folder / "runs")], folder / "out")
    return folder / "out"
